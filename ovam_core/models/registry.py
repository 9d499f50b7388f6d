"""Which pipeline has which adapter. A new family is a new file with a class, and an entry in ADAPTERS."""

from __future__ import annotations

from ovam_core.errors import InputError
from ovam_core.models.adapter import Adapter, Pipeline
from ovam_core.models.flux import Flux, Flux2
from ovam_core.models.hunyuan_dit import HunyuanDiT
from ovam_core.models.pixart import PixArt
from ovam_core.models.sana import Sana
from ovam_core.models.sdxl import StableDiffusionXL
from ovam_core.models.stable_diffusion import StableDiffusion
from ovam_core.models.stable_diffusion_3 import StableDiffusion3

ADAPTERS: tuple[type[Adapter], ...] = (
    StableDiffusion,
    StableDiffusionXL,
    PixArt,
    Sana,
    HunyuanDiT,
    StableDiffusion3,
    Flux,
    Flux2,
)


def adapter_of(pipe: Pipeline) -> Adapter:
    """The adapter of a pipeline. Raises InputError, with the supported families, where there is none."""
    for part in ("unet", "transformer"):
        if getattr(pipe, part, "") is None:
            raise InputError(f"This {type(pipe).__name__} was loaded without its {part}: load the whole model.")
    for kind in ADAPTERS:
        if kind.fits(pipe):
            return kind(pipe)
    raise _foreign(type(pipe))


def check_draws(kind: type) -> None:
    """Raises InputError for a class of pipelines that is of no family, or needs more than a text, as for inpainting."""
    if not any(one.draws(kind) for one in ADAPTERS):
        raise _foreign(kind)


def _foreign(kind: type) -> InputError:
    *names, last = (one.name for one in ADAPTERS)
    return InputError(
        f"{kind.__name__} is not a text-to-image pipeline of a family that can be recorded: "
        f"load {', '.join(names)} or {last}."
    )


def check_fits(pipe: Pipeline, name: str, text: str) -> None:
    """Raises InputError for a text that the pipeline would cut, by the `name` that a person knows it by.

    A pipeline only logs that it cuts a long prompt; the maps would then miss words in silence. An empty text fits.
    """
    if not text.strip():
        return
    try:
        adapter_of(pipe).tokenize(text)
    except InputError as error:
        raise InputError(f"The {name} cannot be used: {error}") from None
