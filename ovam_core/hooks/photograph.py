"""Photographs: encoded, noised to one or a few timesteps, and recorded in one forward pass each.

    photo = read_photo("street.jpg")
    recording = record_image(pipe, photo, "A photograph of a car and a bus")
    maps = attribute(recording, attribute_words(pipe, ["car", "bus"]))
    masks = make_masks(recording, maps, photo)          # at the photograph's own size

The recording is what `record` makes of a generated image, its steps being the timesteps: all that follows is the same.
The model sees the photograph at its own area: `fitted_size` keeps the shape but for rounding the sides to the pixels of
one latent, or of one patch. What a denoiser is given and what a timestep means to it, its adapter knows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor

from ovam_core.attention.reading import Reading
from ovam_core.attention.recording import Branch, Recording
from ovam_core.checks import MAX_PROMPT, MAX_SEED, check_text, check_whole
from ovam_core.errors import InputError, Stopped
from ovam_core.hooks.recorder import record
from ovam_core.io.pictures import read_photo
from ovam_core.models.adapter import Pipeline
from ovam_core.models.presets import defaults_for
from ovam_core.models.reading import read_as
from ovam_core.models.registry import ADAPTERS, adapter_of, check_fits

MAX_TIMESTEPS = 50
MIN_PHOTO_SIDE = 32  # pixels
MIN_LATENTS = 8  # a side of what the model sees, at least
MAX_ASPECT = 4.0  # past it one side would have too few latents for the model


def record_image(
    pipe: Pipeline,
    image: Image.Image | str | Path,
    caption: str,
    timesteps: Sequence[int] | None = None,
    seed: int = 0,
    size: tuple[int, int] | None = None,
    mirror: bool = False,
    **kept: Any,
) -> Recording:
    """One photograph as a `Recording` whose T steps are the timesteps, in the order given.

    image: a picture or its file, any mode; turned upright by its EXIF orientation. caption: the text of the forward
    passes; the words asked for later need not be in it. Empty, the pass is the unconditional half's (with Flux, which
    has none, the empty prompt's), and `branch` says so.
    timesteps: 0 to 999, noise by the training schedule, whatever the sampler: DDPM's Eq. 4; in flow matching (Sana,
    Stable Diffusion 3, Flux) the share of noise, sigma, is the timestep / 1000. None: the model's usual one
    (`Adapter.photo_timestep`). seed: of the noise, which is drawn on
    the CPU for all timesteps at once.
    size: (height, width) in pixels that the model sees, multiples of the adapter's `photo_multiple`; None:
    `fitted_size`.
    mirror: the photograph is seen in a mirror, too (FA-Seg): T more steps, of the same timesteps, whose pixels are
    turned back to their places, so that every map is the mean of both.
    kept: keywords of `record`, such as resolutions, self_attention or offload.

    For masks at the photograph's own size, give `make_masks` the picture of `read_photo`. Raises InputError, one
    sentence, for what is no picture, too small, too long for its width, and for settings that PhotoSettings refuses.
    """
    return record_images(pipe, [image], [caption], timesteps, seed, size, mirror, **kept)[0]


def record_images(
    pipe: Pipeline,
    images: Sequence[Image.Image | str | Path],
    captions: Sequence[str],
    timesteps: Sequence[int] | None = None,
    seed: int = 0,
    size: tuple[int, int] | None = None,
    mirror: bool = False,
    **kept: Any,
) -> list[Recording]:
    """`record_image` for several photographs in one batch: one caption and one recording each.

    Photograph n has the noise of seed + n. Raises InputError where they do not share a size, given or fitted, where
    some captions are empty and some are not, and as `record_image` does.
    """
    noisy = prepare(pipe, images, captions, timesteps, seed, size, mirror)
    with read_as(Reading()), record(pipe, branch="all", mirrored=noisy.mirrored, **kept) as recorder:
        denoise(pipe, noisy)
    return [with_run_facts(recording, noisy) for recording in recorder.recordings]


@dataclass(frozen=True, eq=False)
class Noisy:
    """Photographs as the model is given them: what `denoise` passes forward, under whatever listens.

    latents: `[T, B, C, h, w]`, or packed as the denoiser takes them (`Adapter.packed`), in its dtype; timesteps: T of
    them; condition: the captions and all else that the denoiser gets, by its argument names (`Adapter.condition`).
    branch: which half of a guided batch the passes are like. mirrored: numbers of the passes that see a mirror image.
    """

    latents: Tensor
    timesteps: tuple[int, ...]
    condition: dict[str, Any]
    branch: Branch
    mirrored: tuple[int, ...] = ()


@torch.no_grad()
def prepare(
    pipe: Pipeline,
    images: Sequence[Image.Image | str | Path],
    captions: Sequence[str],
    timesteps: Sequence[int] | None = None,
    seed: int = 0,
    size: tuple[int, int] | None = None,
    mirror: bool = False,
) -> Noisy:
    """Everything before the forward passes; arguments and refusals as in `record_images`."""
    if not images or len(images) != len(captions):
        raise InputError(f"There are {len(images)} photographs and {len(captions)} captions: give each a caption.")
    if len({bool(caption.strip()) for caption in captions}) > 1:
        raise InputError("Some captions are empty and others are not: record those photographs apart.")
    adapter = adapter_of(pipe)
    timesteps = (adapter.photo_timestep,) if timesteps is None else timesteps
    for caption in captions:
        check_request(pipe, caption, timesteps, seed, size)
    photos = [read_photo(image) for image in images]
    sizes = {size or fitted_size(pipe, photo) for photo in photos}
    if len(sizes) > 1:
        raise InputError("The photographs differ in shape: record them apart, or give one size for all.")
    (shared,) = sizes
    sides = [photos, [ImageOps.mirror(photo) for photo in photos]] if mirror else [photos]
    latents = torch.cat(
        [
            torch.stack([noised(pipe, photo, timesteps, seed + n) for n, photo in enumerate(clean)], dim=1)
            for clean in (encode(pipe, side, shared) for side in sides)
        ]
    )
    with read_as(Reading()):  # and not as the pipeline's last call read its prompt
        condition = adapter.condition(captions, shared)
    return Noisy(
        latents=torch.stack([adapter.packed(batch) for batch in latents]).to(adapter.denoiser.dtype),
        timesteps=tuple(timesteps) * len(sides),
        condition=condition,
        branch="conditional" if captions[0].strip() else "unconditional",
        mirrored=tuple(range(len(timesteps), len(timesteps) * len(sides))),
    )


@torch.no_grad()
def denoise(pipe: Pipeline, noisy: Noisy, should_stop: Callable[[], bool] | None = None) -> None:
    """One forward pass a timestep, all photographs in it. Recorders with branch="all" see one image each.

    should_stop: asked before each pass. Raises Stopped where it says True.
    """
    adapter = adapter_of(pipe)
    for done, (latents, timestep) in enumerate(zip(noisy.latents, noisy.timesteps, strict=True)):
        if should_stop is not None and should_stop():
            raise Stopped(done, len(noisy.timesteps))
        with adapter.text_alone():
            adapter.denoiser(latents, timestep=adapter.moment(timestep, latents), **noisy.condition)


def with_run_facts(recording: Recording, noisy: Noisy) -> Recording:
    """With what a recorder cannot know: the half, and the timesteps, which Flux gets in the model's own precision."""
    timesteps = tuple(noisy.timesteps[step] for step in recording.step_indices)
    return replace(recording, branch=noisy.branch, timesteps=timesteps)


def fitted_size(pipe: Pipeline, photo: Image.Image) -> tuple[int, int]:
    """(height, width) in which the model sees a photograph: its shape, at the area of the model's own images.

    Each side is rounded to the nearest multiple of the adapter's `photo_multiple` and none exceeds the model's limit.
    Raises InputError for less than MIN_PHOTO_SIDE pixels and for one side more than MAX_ASPECT times the other.
    """
    photo_size = f"{photo.width}x{photo.height}"
    if min(photo.size) < MIN_PHOTO_SIDE:
        raise InputError(f"The picture is {photo_size}; each side needs {MIN_PHOTO_SIDE} pixels, give a larger one.")
    if max(photo.size) > MAX_ASPECT * min(photo.size):
        raise InputError(f"The picture is {photo_size}, one side more than {MAX_ASPECT:g} times the other; crop it.")
    defaults, multiple = defaults_for(pipe), adapter_of(pipe).photo_multiple
    scale = math.sqrt(defaults.width * defaults.height / (photo.width * photo.height))
    scale = min(scale, defaults.max_size / max(photo.size))
    height, width = (round(side * scale / multiple) * multiple for side in (photo.height, photo.width))
    return height, width


@torch.no_grad()
def encode(pipe: Pipeline, photos: Sequence[Image.Image], size: tuple[int, int]) -> Tensor:
    """The scaled latents of RGB pictures, float32 `[B, C, height / factor, width / factor]` (Flux 2: in patches of
    2 x 2, `[B, 4 C, ...]`); they depend on no seed. size: (height, width).
    """
    height, width = size
    small = [photo.resize((width, height), Image.Resampling.LANCZOS) for photo in photos]
    arrays = [torch.from_numpy(np.array(photo)) for photo in small]
    pixels = rearrange(arrays, "b h w c -> b c h w").float() / 127.5 - 1
    vae, dtype = pipe.vae, pipe.vae.dtype
    # SDXL's overflows in half precision.
    upcast = dtype == torch.float16 and getattr(vae.config, "force_upcast", False)
    if upcast:
        vae.to(torch.float32)
    try:
        return adapter_of(pipe).encode_image(pixels.to(pipe._execution_device, vae.dtype))
    finally:
        if upcast:
            vae.to(dtype)


def noised(pipe: Pipeline, latents: Tensor, timesteps: Sequence[int], seed: int = 0) -> Tensor:
    """Latents `[C, h, w]` with the model's noise of each of T timesteps, `[T, C, h, w]`."""
    several = latents.expand(len(timesteps), *latents.shape)
    noise = torch.randn(several.shape, generator=torch.Generator().manual_seed(seed)).to(several)
    return adapter_of(pipe).noised(several, noise, torch.tensor(timesteps, device=latents.device))


def check_kind(pipe: Pipeline) -> None:
    """Raises InputError for a pipeline of no family, which lacks a part, whose denoiser takes more than an image and a
    text, or which was trained with noise that is not known.
    """
    adapter, name = adapter_of(pipe), type(pipe).__name__
    *names, last = (kind.name for kind in ADAPTERS)
    able = f"load a text-to-image model of {', '.join(names)} or {last}."
    adapter.check_whole()
    if not adapter.is_plain:
        raise InputError(f"The denoiser of this {name} takes more than an image and a text; {able}")
    if not adapter.knows_noise:
        kind = type(pipe.scheduler).__name__
        raise InputError(f"The {kind} of this {name} does not tell the noise of the training; {able}")


def check_request(
    pipe: Pipeline, caption: str, timesteps: Sequence[int], seed: int, size: tuple[int, int] | None = None
) -> None:
    """Raises InputError, one sentence, for what this model cannot record.

    size: (height, width) in pixels that the model sees, None for `fitted_size`.
    """
    check_kind(pipe)
    check_text("The caption", caption, MAX_PROMPT)
    check_fits(pipe, "caption", caption)
    check_whole("The seed", seed, 0, MAX_SEED)
    _check_timesteps(pipe, timesteps)
    smallest, largest = MIN_LATENTS * pipe.vae_scale_factor, defaults_for(pipe).max_size
    multiple = adapter_of(pipe).photo_multiple
    for name, side in zip(("height", "width"), size or (), strict=False):
        check_whole(f"The {name}", side, smallest, largest)
        if side % multiple:
            below = side - side % multiple
            raise InputError(f"The {name} is {side} pixels, which is not a multiple of {multiple}; {below} would do.")


def _check_timesteps(pipe: Pipeline, timesteps: Sequence[int]) -> None:
    if not isinstance(timesteps, (tuple, list)):
        raise InputError(f"The timesteps are {timesteps}; give a list, such as 100, 200.")
    if not timesteps:
        raise InputError("No timestep is given; give at least one, such as 100.")
    if len(timesteps) > MAX_TIMESTEPS:
        raise InputError(f"{len(timesteps)} timesteps are too many; give at most {MAX_TIMESTEPS}.")
    for timestep in timesteps:
        check_whole("A timestep", timestep, 0, pipe.scheduler.config.num_train_timesteps - 1)
