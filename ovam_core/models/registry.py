"""Which pipeline has which adapter. A new family is a new file with a class, and an entry in ADAPTERS."""

from __future__ import annotations

import inspect
import re
from functools import cache

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

# What a pipeline that makes videos is asked for: diffusers has some eighty of them, with one or more of these each.
ASKED_OF_VIDEO = {"num_frames", "frames", "video_length", "video", "num_videos_per_prompt"}
# UNets whose batch is of frames, whatever pipeline they are put into.
VIDEO_UNETS = re.compile(r"UNet.*(Motion|3D|Temporal)|I2VGenXL")


UNNAMED = "unknown"


def model_name(pipe: Pipeline) -> str:
    """What a pipeline was loaded as, by this package or by diffusers; UNNAMED for one put together from parts."""
    return getattr(pipe, "ovam_name", None) or getattr(pipe, "name_or_path", None) or UNNAMED


def adapter_of(pipe: Pipeline) -> Adapter:
    """The adapter of a pipeline. Raises InputError, with the supported families, where there is none."""
    check_no_video(type(pipe), type(getattr(pipe, "unet", None)))
    for part in ("unet", "transformer"):
        if getattr(pipe, part, "") is None:
            raise InputError(f"This {type(pipe).__name__} was loaded without its {part}: load the whole model.")
    for kind in ADAPTERS:
        if kind.fits(pipe):
            return kind(pipe)
    raise _foreign(type(pipe))


def check_draws(kind: type) -> None:
    """Raises InputError for a class of pipelines that is of no family, or needs more than a text, as for inpainting."""
    check_no_video(kind)
    if not any(one.draws(kind) for one in ADAPTERS):
        raise _foreign(kind)


def check_no_video(kind: type, unet: type = object) -> None:
    """Raises InputError for a class of pipelines that makes videos: by what it is asked for, or by its UNet's class."""
    if _makes_videos(kind, unet):
        raise InputError(
            f"{kind.__name__} is not a text-to-image pipeline: it makes videos, and what is recorded are images; "
            f"load {_families()}."
        )


@cache
def _makes_videos(kind: type, unet: type) -> bool:
    calls = [vars(one)["__call__"] for one in kind.__mro__ if inspect.isfunction(vars(one).get("__call__"))]
    return (
        any(ASKED_OF_VIDEO & inspect.signature(call).parameters.keys() for call in calls)
        or any("Video" in one.__name__ for one in kind.__mro__)
        or any(VIDEO_UNETS.search(one.__name__) for one in unet.__mro__)
    )


def _foreign(kind: type) -> InputError:
    return InputError(
        f"{kind.__name__} is not a text-to-image pipeline of a family that can be recorded: load {_families()}."
    )


def _families() -> str:
    *names, last = (one.name for one in ADAPTERS)
    return f"{', '.join(names)} or {last}"


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
