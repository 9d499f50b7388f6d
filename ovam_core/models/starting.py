"""Start from a picture: diffusers' own image-to-image pipelines, on the modules of one that draws from a text."""

from __future__ import annotations

import copy
import inspect
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from ovam_core.errors import InputError
from ovam_core.io.pictures import read_photo
from ovam_core.models.adapter import Pipeline
from ovam_core.models.registry import ADAPTERS, adapter_of

# What a pipeline of diffusers is made with and keeps to itself, beside its modules and its config.
KEPT = ("watermark", "_progress_bar_config", "ovam_name", "ovam_words")


def starting_from_picture(pipe: Pipeline) -> Pipeline:
    """A pipeline of the same modules that starts from a picture: nothing is loaded, and `pipe` stays as it is.

    The scheduler is a copy, since such a pipeline sets its own state. Raises InputError for a pipeline that has none.
    """
    import diffusers

    made_of = getattr(diffusers, _image_to_image(pipe))
    given: dict[str, Any] = {**pipe.config, **pipe.components, "scheduler": copy.deepcopy(pipe.scheduler)}
    taken = inspect.signature(made_of.__init__).parameters
    made = made_of(**{name: value for name, value in given.items() if name in taken})
    for name in KEPT:
        if hasattr(pipe, name):
            setattr(made, name, getattr(pipe, name))
    return made


def start_arguments(pipe: Pipeline, start: Image.Image, strength: float) -> dict[str, Any]:
    """What such a pipeline is called with beside what the other is; start: of `fitted_start`. It has the image's size
    from the picture, and is told it where it asks.
    """
    told = {"width": start.width, "height": start.height}
    asked = inspect.signature(type(pipe).__call__).parameters
    return {"image": start, "strength": strength} | {name: side for name, side in told.items() if name in asked}


def fitted_start(start: Image.Image | str | Path, size: tuple[int, int]) -> Image.Image:
    """A picture or its file as RGB at `size` (width, height): upright, resized to cover it, cropped about its middle.

    One that has the size already keeps its pixels. Raises InputError for what is no picture.
    """
    if not isinstance(start, Image.Image | str | Path):
        raise InputError(f"The start is a {type(start).__name__}: give a picture or its file.")
    fitted = ImageOps.fit(read_photo(start), size, Image.Resampling.LANCZOS)
    return Image.fromarray(np.asarray(fitted))  # without what the file said of camera and place


def starts_from_pictures(pipe: Pipeline) -> bool:
    """Whether this model can start from a picture."""
    try:
        _image_to_image(pipe)
    except InputError:
        return False
    return True


def check_start(pipe: Pipeline, steps: int, strength: float) -> None:
    """Raises InputError, one sentence, where this model starts from no picture, or would not run a single step."""
    _image_to_image(pipe)
    if adapter_of(pipe).steps_run(steps, strength) < 1:
        least = math.ceil(1000 / steps) / 1000
        raise InputError(
            f"A strength of {strength:g} runs none of {steps} steps: choose {least:g} at least, or more steps."
        )


def _image_to_image(pipe: Pipeline) -> str:
    """The name of diffusers' class."""
    starts = adapter_of(pipe).starts
    found = next((starts[kind.__name__] for kind in type(pipe).__mro__ if kind.__name__ in starts), None)
    if found is None:
        *names, last = (one.name for one in ADAPTERS if one.starts)
        raise InputError(
            f"A {type(pipe).__name__} cannot start from a picture: leave it out, or load a model of "
            f"{', '.join(names)} or {last}."
        )
    return found
