"""What a pipeline's run is guided by, and which calls of its denoiser are its steps: heard while it runs.

What the rows of the denoiser's batch mean is known of diffusers' own pipelines, by their class (`Parts`); it is never
guessed. That there are as many rows as the run has images is checked at every step.
"""

from __future__ import annotations

import functools
import inspect
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ovam_core.errors import InputError

if TYPE_CHECKING:
    from ovam_core.models.adapter import Pipeline


@dataclass(frozen=True)
class Parts:
    """A batch of the denoiser: `count` parts, each with a row an image, one after the other.

    conditional, unconditional: the part of each branch, from 0; None where there is none. perturbed: parts at the end
    which some self-attentions leave out.
    """

    count: int
    conditional: int
    unconditional: int | None
    perturbed: int = 0


ALONE = Parts(1, 0, None)
GUIDED = Parts(2, 1, 0)  # diffusers concatenates [negative, positive]


class Listener:
    """What the recorder hears of a run beside the denoiser's own calls."""

    def __init__(self, pipe: Pipeline):
        self._pipe = pipe
        self._hooks: list[_MethodHook] = []
        self._images: int | None = None  # that the last batch has rows for
        self.on_step: Callable[[], None] = lambda: None  # told when the scheduler has what the denoiser made
        self._hear(getattr(pipe, "scheduler", None), "step", self._on_step)
        for processor in ("image_processor", "mask_processor"):
            self._hear(getattr(pipe, processor, None), "get_crop_region", self._on_crop)

    @property
    def name(self) -> str:
        """The pipeline's, as messages call it."""
        return type(self._pipe).__name__

    @property
    def guided(self) -> bool:
        """Whether the batch has a part for a negative prompt."""
        return _said(getattr(self._pipe, "do_classifier_free_guidance", None))

    @property
    def parts(self) -> Parts:
        """What the batch means now: a callback may end the guidance in the middle of a run."""
        return GUIDED if self.guided else ALONE

    def images(self, branch: str, batch: int) -> slice:
        """The rows of a branch, "conditional" or "unconditional", in a batch. Raises InputError where it has none."""
        parts = self.parts
        part = parts.unconditional if branch == "unconditional" else parts.conditional
        if part is None:
            raise InputError("Without guidance there is no unconditional half: record the conditional branch.")
        self._images, left = divmod(batch, parts.count)
        if left:
            raise self._unlike(f"{batch} rows")
        return slice(part * self._images, (part + 1) * self._images)

    def counts(self, _arguments: dict[str, Any]) -> bool:
        """Whether a call of the denoiser with these keyword arguments is a step of the run, and no pass beside it."""
        return True

    def remove(self) -> None:
        """Takes back all that was put on the pipeline."""
        for hook in reversed(self._hooks):
            hook.remove()
        self._hooks = []

    def _hear(self, owner: Any, name: str, before: Callable[[Callable, dict[str, Any]], None]) -> None:
        """Calls `before(method, arguments by name)` ahead of an object's method, if it has one of that name."""
        if hasattr(owner, name):
            self._hooks.append(_MethodHook(owner, name, before))

    def _on_step(self, _method: Callable, arguments: dict[str, Any]) -> None:
        sample = arguments.get("sample")
        if self._images is not None and sample is not None and len(sample) != self._images:
            raise self._unlike(f"rows for {self._images} images, of which it makes {len(sample)}")
        self.on_step()

    def _on_crop(self, _method: Callable, _arguments: dict[str, Any]) -> None:
        raise InputError(
            f"With padding_mask_crop this {self.name} draws a crop and pastes it back, and the maps would not fit the "
            "image: leave it out, or crop the picture and its mask yourself."
        )

    def _unlike(self, found: str) -> InputError:
        return InputError(
            f"This {self.name} gives its denoiser {found}, and a batch of {self.parts.count} parts was expected: "
            f"{EVERY_ROW}"
        )


# Of diffusers' pipelines with a UNet, those whose batch is [negative, positive] where they guide; with perturbed
# attention (PAG) the perturbed part comes behind.
UNETS = re.compile(
    r"StableDiffusion(XL)?(ControlNet|ControlNetUnion|Adapter)?(PAG)?(Img2Img|Inpaint)?Pipeline"
    r"|StableDiffusion(XL)?ControlNetXSPipeline|StableDiffusion(Depth2Img|LDM3D)Pipeline"
    r"|LatentConsistencyModel(Img2Img)?Pipeline|AltDiffusion(Img2Img)?Pipeline"
)
EDITING = "StableDiffusionInstructPix2PixPipeline"  # [text and image, image alone, neither]
EVERY_ROW = "record it with branch='all', which keeps every row, and choose among the recordings."


class UNetListener(Listener):
    """For pipelines with a UNet, which lay out their batch in several ways."""

    @property
    def parts(self) -> Parts:
        parts = super().parts
        if EDITING in _classes(self._pipe) and parts == GUIDED:
            return Parts(3, 0, 2)
        if getattr(self._pipe, "do_perturbed_attention_guidance", False):
            return replace(parts, count=parts.count + 1, perturbed=1)
        return parts


def unet_parts_known(pipe: Pipeline) -> bool:
    """Whether it is known what the rows of the batch mean of a pipeline with a UNet."""
    return any(name == EDITING or UNETS.fullmatch(name) for name in _classes(pipe))


def _classes(pipe: Pipeline) -> list[str]:
    """The names of the pipeline's class and of those it was made from."""
    return [kind.__name__ for kind in type(pipe).__mro__]


def _said(guided: bool | None) -> bool:
    if guided is None:
        raise InputError("Nothing says whether this run is guided: call the pipeline, or record with branch='all'.")
    return guided


class BinListener(Listener):
    """Refuses a size that the pipeline would replace by a near one and crop: maps would not fit the image."""

    def __init__(self, pipe: Pipeline):
        super().__init__(pipe)
        self._hear(pipe.image_processor, "classify_height_width_bin", self._on_bin)

    def _on_bin(self, method: Callable, arguments: dict[str, Any]) -> None:
        height, width = arguments["height"], arguments["width"]
        drawn_height, drawn_width = method(**arguments)
        if (drawn_height, drawn_width) != (height, width):
            raise InputError(
                f"The pipeline would draw {drawn_width}x{drawn_height} and crop it to {width}x{height}, and the "
                "maps would not fit the image: add use_resolution_binning=False."
            )


class EncodeListener(BinListener):
    """For pipelines that do not keep whether they guide: they say it where they encode the prompt."""

    def __init__(self, pipe: Pipeline):
        super().__init__(pipe)
        self._guided: bool | None = None
        self._hear(pipe, "encode_prompt", self._on_encode)

    def _on_encode(self, _method: Callable, arguments: dict[str, Any]) -> None:
        self._guided = bool(arguments["do_classifier_free_guidance"])

    @property
    def guided(self) -> bool:
        return _said(self._guided)


class SkipListener(Listener):
    """Stable Diffusion 3.5's skip-layer guidance makes a pass beside the guided batch, which is no step."""

    def counts(self, arguments: dict[str, Any]) -> bool:
        return arguments.get("skip_layers") is None


class PassListener(Listener):
    """For models that have guidance as an input; a true negative prompt has passes of its own, which do not count."""

    def __init__(self, pipe: Pipeline):
        super().__init__(pipe)
        self._pass = ""
        # Diffusers' pipelines that start from a picture do not say which pass it is: the prompt's is a step's first.
        self._unsaid, self._first = "Img2Img" in type(pipe).__name__, True
        self._hear(pipe.transformer, "cache_context", self._on_pass)

    @property
    def guided(self) -> bool:
        return False

    def _on_pass(self, _method: Callable, arguments: dict[str, Any]) -> None:
        self._pass = arguments["name"]

    def _on_step(self, method: Callable, arguments: dict[str, Any]) -> None:
        self._first = True
        super()._on_step(method, arguments)

    def counts(self, _arguments: dict[str, Any]) -> bool:
        first, self._first = self._first, False
        return self._pass != "uncond" and (first or not self._unsaid)


class _MethodHook:
    """Calls `before(method, arguments by name)` ahead of an object's method in this thread, until `remove`."""

    def __init__(self, owner: Any, name: str, before: Callable[[Callable, dict[str, Any]], None]):
        method, thread = getattr(owner, name), threading.get_ident()
        signature = inspect.signature(method)

        @functools.wraps(method)
        def hooked(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != thread:  # someone else's question about another recording
                return method(*args, **kwargs)
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            before(method, bound.arguments)
            return method(*args, **kwargs)

        self._owner, self._name = owner, name
        self._former = vars(owner).get(name)  # of the object itself, another hook perhaps
        setattr(owner, name, hooked)

    def remove(self) -> None:
        if self._former is None:
            delattr(self._owner, self._name)
        else:
            setattr(self._owner, self._name, self._former)
