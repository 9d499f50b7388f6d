"""Photographs: encoded, noised to one or a few timesteps, and recorded in one forward pass each.

    photo = read_photo("street.jpg")
    recording = record_image(pipe, photo, "A photograph of a car and a bus")
    maps = attribute(recording, attribute_words(pipe, ["car", "bus"]))
    masks = make_masks(recording, maps, photo)          # at the photograph's own size

The recording is what `record` makes of a generated image, its steps being the timesteps: all that follows is the same.
The model sees the photograph at its own area: `fitted_size` keeps the shape but for rounding the sides to the pixels of
one latent, or of one patch. What a denoiser is given and what a timestep means to it, its family knows (family.py).
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor

from . import tokens
from .families import FAMILIES, family_of
from .generate import (
    MAX_PROMPT,
    MAX_SEED,
    Generation,
    MapSettings,
    branch_for,
    check_fits,
    check_text,
    check_whole,
)
from .goca import NOISE, record_goca
from .pipeline import defaults_for
from .recorder import Recording, record
from .text import FUNCTION_WORDS

TIMESTEPS = (100,)  # of 1000, as GoCA takes for SD 1.5, SDXL and PixArt
MAX_TIMESTEPS = 50
MAX_PIXELS = 64_000_000  # of an upload
MIN_SIDE = 32
MIN_LATENTS = 8  # a side of what the model sees, at least
MAX_ASPECT = 4.0  # past it one side would have too few latents for the model


@dataclass(frozen=True)
class PhotoSettings:
    """What a photograph is recorded with. `validate` must pass before `photograph` takes it.

    caption: what it shows; empty, the pass is that of the unconditional half. timesteps: how much noise is added, each
    from 0 to the training schedule's last, 999; one forward pass each. seed: of the noise, 0 to 2**32 - 1. width, height:
    pixels in which the model sees it, multiples of its family's `photo_multiple`; None, both of them, for `fitted_size`.
    """

    KIND: ClassVar[str] = "photo"
    FORMAT: ClassVar[str] = "ovam-photo/1"

    caption: str = ""
    timesteps: tuple[int, ...] = TIMESTEPS
    seed: int = 0
    width: int | None = None
    height: int | None = None

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width), or None."""
        return None if self.width is None or self.height is None else (self.height, self.width)

    def validate(self, pipe: Any) -> None:
        """Raises ValueError, one sentence, for what this model cannot record."""
        check_kind(pipe)
        check_text("The caption", self.caption, MAX_PROMPT)
        check_fits(pipe, "caption", self.caption)
        check_whole("The seed", self.seed, 0, MAX_SEED)
        _check_timesteps(pipe, self.timesteps)
        if (self.width is None) != (self.height is None):
            raise ValueError("Only one side of the size is given; give width and height, or neither.")
        smallest, largest = MIN_LATENTS * pipe.vae_scale_factor, defaults_for(pipe).max_size
        multiple = family_of(pipe).photo_multiple
        for name, side in (("width", self.width), ("height", self.height)):
            if side is not None:
                check_whole(f"The {name}", side, smallest, largest)
                if side % multiple:
                    below = side - side % multiple
                    raise ValueError(
                        f"The {name} is {side} pixels, which is not a multiple of {multiple}; {below} would do."
                    )


def photograph(
    pipe: Any, photo: Image.Image | str | Path, settings: PhotoSettings, with_goca: bool = False
) -> Generation:
    """A photograph with its recording, as `generate` gives an image with its own; `ask` and `save` take both.

    `image` is the upright RGB picture at the upload's size, and so are the maps and masks. with_goca: record, beside
    it, GoCA's pass: the one at the timestep nearest to the paper's 100. Raises ValueError for
    settings that `validate` refuses and for pictures that `read_photo` and `fitted_size` refuse.
    """
    settings.validate(pipe)
    begun = time.perf_counter()
    image = read_photo(photo)
    noisy = prepare(pipe, [image], [settings.caption], settings.timesteps, settings.seed, settings.size)
    goal = NOISE * pipe.scheduler.config.num_train_timesteps
    nearest = min(range(len(noisy.timesteps)), key=lambda step: abs(noisy.timesteps[step] - goal))
    beside = record_goca(pipe, branch="all", step=nearest) if with_goca else nullcontext()
    with record(pipe, branch="all") as recorder, beside as weighted:
        denoise(pipe, noisy)
    return Generation(
        image=image,
        recording=_told(recorder.recordings[0], noisy),
        settings=settings,
        model=getattr(pipe, "ovam_name", str(getattr(pipe, "name_or_path", "unknown"))),
        device=str(pipe._execution_device),
        seconds=time.perf_counter() - begun,
        dtype=str(family_of(pipe).denoiser.dtype).removeprefix("torch."),
        goca=None if weighted is None else weighted.recordings[0],
    )


def record_image(
    pipe: Any,
    image: Image.Image | str | Path,
    caption: str,
    timesteps: Sequence[int] = TIMESTEPS,
    seed: int = 0,
    size: tuple[int, int] | None = None,
    **kept: Any,
) -> Recording:
    """One photograph as a `Recording` whose T steps are the timesteps, in the order given.

    image: a picture or its file, any mode; turned upright by its EXIF orientation. caption: the text of the forward
    passes; the words asked for later need not be in it. Empty, the pass is the unconditional half's (with Flux, which
    has none, the empty prompt's), and `branch` says so.
    timesteps: 0 to 999, noise by the training schedule, whatever the sampler: DDPM's Eq. 4; in flow matching (Sana,
    Stable Diffusion 3, Flux) the share of noise, sigma, is the timestep / 1000. seed: of the noise, which is drawn on
    the CPU for all timesteps at once.
    size: (height, width) in pixels that the model sees, multiples of the family's `photo_multiple`; None: `fitted_size`.
    kept: keywords of `record`, such as resolutions, self_attention or offload.

    For masks at the photograph's own size, give `make_masks` the picture of `read_photo`. Raises ValueError, one
    sentence, for what is no picture, too small, too long for its width, and for settings that PhotoSettings refuses.
    """
    return record_images(pipe, [image], [caption], timesteps, seed, size, **kept)[0]


def record_images(
    pipe: Any,
    images: Sequence[Image.Image | str | Path],
    captions: Sequence[str],
    timesteps: Sequence[int] = TIMESTEPS,
    seed: int = 0,
    size: tuple[int, int] | None = None,
    **kept: Any,
) -> list[Recording]:
    """`record_image` for several photographs in one batch: one caption and one recording each.

    Photograph n has the noise of seed + n. Raises ValueError where they do not share a size, given or fitted, where some
    captions are empty and some are not, and as `record_image` does.
    """
    noisy = prepare(pipe, images, captions, timesteps, seed, size)
    with record(pipe, branch="all", **kept) as recorder:
        denoise(pipe, noisy)
    return [_told(one, noisy) for one in recorder.recordings]


@dataclass(frozen=True, eq=False)
class Noisy:
    """Photographs as the model is given them: what `denoise` passes forward, under whatever listens.

    latents: `[T, B, C, h, w]`, or packed as the denoiser takes them (`Family.packed`), in its dtype; timesteps: T of them; condition: the captions and all else that
    the denoiser gets, by its argument names (`Family.condition`). branch: which half of a guided batch the passes are like.
    """

    latents: Tensor
    timesteps: tuple[int, ...]
    condition: dict[str, Any]
    branch: str


@torch.no_grad()
def prepare(
    pipe: Any,
    images: Sequence[Image.Image | str | Path],
    captions: Sequence[str],
    timesteps: Sequence[int] = TIMESTEPS,
    seed: int = 0,
    size: tuple[int, int] | None = None,
) -> Noisy:
    """Everything before the forward passes; arguments and refusals as in `record_images`."""
    if not images or len(images) != len(captions):
        raise ValueError(f"There are {len(images)} photographs and {len(captions)} captions: give each a caption.")
    if len({bool(caption.strip()) for caption in captions}) > 1:
        raise ValueError("Some captions are empty and others are not: record those photographs apart.")
    height, width = size or (None, None)
    for caption in captions:
        PhotoSettings(caption, timesteps, seed, width, height).validate(pipe)
    photos = [read_photo(image) for image in images]
    sizes = {size or fitted_size(pipe, photo) for photo in photos}
    if len(sizes) > 1:
        raise ValueError("The photographs differ in shape: record them apart, or give one size for all.")
    (shared,), family = sizes, family_of(pipe)
    clean = encode(pipe, photos, shared)
    latents = torch.stack([noised(pipe, one, timesteps, seed + n) for n, one in enumerate(clean)], dim=1)
    return Noisy(
        latents=torch.stack([family.packed(one) for one in latents]).to(family.denoiser.dtype),
        timesteps=tuple(timesteps),
        condition=family.condition(captions, shared),
        branch="conditional" if captions[0].strip() else "unconditional",
    )


@torch.no_grad()
def denoise(pipe: Any, noisy: Noisy) -> None:
    """One forward pass a timestep, all photographs in it. Recorders with branch="all" see one image each."""
    family = family_of(pipe)
    for latents, timestep in zip(noisy.latents, noisy.timesteps, strict=True):
        family.denoiser(latents, timestep=family.moment(timestep, latents), **noisy.condition)


def _told(recording: Recording, noisy: Noisy) -> Recording:
    """With what a recorder cannot know: the half, and the timesteps, which Flux is given in the model's own precision."""
    timesteps = tuple(noisy.timesteps[step] for step in recording.step_indices)
    return replace(recording, branch=noisy.branch, timesteps=timesteps)


# ------------------------------------------------------------------------------------------------ pictures


def read_photo(source: Image.Image | str | Path) -> Image.Image:
    """A picture or its file, upright by its EXIF orientation, RGB, at its own size; what is transparent lies on white.

    Raises ValueError for what is no whole picture and for more than MAX_PIXELS, which the header tells before anything
    is decoded.
    """
    with _opened(source) as picture:
        if picture.width * picture.height > MAX_PIXELS:
            size = f"{picture.width}x{picture.height}"
            raise ValueError(f"The picture is {size}; at most {MAX_PIXELS:,} pixels are taken, make it smaller.")
        try:
            return _rgb(ImageOps.exif_transpose(picture))
        except Exception:  # a decoder fails in whatever way a broken file makes it
            raise ValueError(
                "The picture is not whole, or of a kind that cannot be read; save it again as JPEG or PNG."
            ) from None


def _opened(source: Image.Image | str | Path) -> AbstractContextManager[Image.Image]:
    """The head of a picture; a file is closed at the end of the block, a picture that was given stays as it is."""
    if isinstance(source, Image.Image):
        return nullcontext(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS is lower
            return Image.open(source)
    except FileNotFoundError:
        raise ValueError(f"There is no picture '{source}'.") from None
    except Image.DecompressionBombError:
        raise ValueError(f"The picture has more than {MAX_PIXELS:,} pixels; make it smaller.") from None
    except (OSError, ValueError):
        raise ValueError(f"'{Path(source).name}' is not a picture that can be read; give a JPEG or a PNG.") from None


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith(("I", "F")):  # 16 bits a pixel, which Pillow would cut off at 255
        values = np.nan_to_num(np.asarray(picture, dtype=np.float64)).clip(0)
        scale = 255 / 65535 if values.max() > 255 else 1
        return Image.fromarray((values * scale).clip(0, 255).round().astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        paper = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(paper, picture.convert("RGBA")).convert("RGB")
    plain = picture.convert("RGB")
    return plain.copy() if plain is picture else plain


def fitted_size(pipe: Any, photo: Image.Image) -> tuple[int, int]:
    """(height, width) in which the model sees a photograph: its shape, at the area of the model's own images.

    Each side is rounded to the nearest multiple of the family's `photo_multiple` and none exceeds the model's limit.
    Raises ValueError for less than MIN_SIDE pixels and for one side more than MAX_ASPECT times the other.
    """
    own_size = f"{photo.width}x{photo.height}"
    if min(photo.size) < MIN_SIDE:
        raise ValueError(f"The picture is {own_size}; each side needs {MIN_SIDE} pixels, give a larger one.")
    if max(photo.size) > MAX_ASPECT * min(photo.size):
        raise ValueError(f"The picture is {own_size}, one side more than {MAX_ASPECT:g} times the other; crop it.")
    own, multiple = defaults_for(pipe), family_of(pipe).photo_multiple
    scale = math.sqrt(own.width * own.height / (photo.width * photo.height))
    scale = min(scale, own.max_size / max(photo.size))
    return tuple(round(side * scale / multiple) * multiple for side in (photo.height, photo.width))


def caption_of(names: Sequence[str]) -> str:
    """ "A photograph of a cat, an aeroplane and the red bus": what to tell the model of a picture of these things."""
    names = [name.strip() for name in names if name.strip()]
    things = [name if name.split()[0].lower() in FUNCTION_WORDS else f"{_article(name)} {name}" for name in names]
    if len(things) < 2:
        return " ".join(["A photograph", *(f"of {thing}" for thing in things)])
    return f"A photograph of {', '.join(things[:-1])} and {things[-1]}"


def default_caption(asked: MapSettings) -> str:
    """What to tell the model of a photograph: the sentence, or that it shows the words and the tokens' classes; nothing,
    for tokens that were found without a text. Raises ValueError as `branch_for` does.
    """
    if branch_for(asked) == "unconditional":
        return ""
    names = [name for path in asked.tokens for name in tokens.load(path).names]
    return asked.sentence or caption_of(list(dict.fromkeys([*asked.words, *names])))


def _article(name: str) -> str:
    return "an" if name[0].lower() in "aeiou" else "a"


# ------------------------------------------------------------------------------------------------ tensors


@torch.no_grad()
def encode(pipe: Any, photos: Sequence[Image.Image], size: tuple[int, int]) -> Tensor:
    """The scaled latents of RGB pictures, float32 `[B, C, height / factor, width / factor]` (Flux 2: in patches of
    2 x 2, `[B, 4 C, ...]`); they depend on no seed. size: (height, width).
    """
    height, width = size
    small = [photo.resize((width, height), Image.Resampling.LANCZOS) for photo in photos]
    pixels = rearrange([torch.from_numpy(np.array(one)) for one in small], "b h w c -> b c h w").float() / 127.5 - 1
    vae, given = pipe.vae, pipe.vae.dtype
    # SDXL's overflows in half precision.
    upcast = given == torch.float16 and getattr(vae.config, "force_upcast", False)
    if upcast:
        vae.to(torch.float32)
    try:
        return family_of(pipe).encode_image(pixels.to(pipe._execution_device, vae.dtype))
    finally:
        if upcast:
            vae.to(given)


def noised(pipe: Any, latents: Tensor, timesteps: Sequence[int], seed: int = 0) -> Tensor:
    """Latents `[C, h, w]` with the family's noise of each of T timesteps, `[T, C, h, w]`."""
    several = latents.expand(len(timesteps), *latents.shape)
    noise = torch.randn(several.shape, generator=torch.Generator().manual_seed(seed)).to(several)
    return family_of(pipe).noised(several, noise, torch.tensor(timesteps, device=latents.device))


# ------------------------------------------------------------------------------------------------ refusals


def check_kind(pipe: Any) -> None:
    """Raises ValueError for a pipeline of no family, whose denoiser takes more than an image and a text, or which was
    trained with noise that is not known.
    """
    family, name = family_of(pipe), type(pipe).__name__
    *names, last = (one.name for one in FAMILIES)
    able = f"load a text-to-image model of {', '.join(names)} or {last}."
    if not family.is_plain:
        raise ValueError(f"The denoiser of this {name} takes more than an image and a text; {able}")
    if not family.knows_noise:
        kind = type(pipe.scheduler).__name__
        raise ValueError(f"The {kind} of this {name} does not tell the noise of the training; {able}")


def _check_timesteps(pipe: Any, timesteps: Sequence[int]) -> None:
    if not isinstance(timesteps, (tuple, list)):
        raise ValueError(f"The timesteps are {timesteps}; give a list, such as 100, 200.")
    if not timesteps:
        raise ValueError("No timestep is given; give at least one, such as 100.")
    if len(timesteps) > MAX_TIMESTEPS:
        raise ValueError(f"{len(timesteps)} timesteps are too many; give at most {MAX_TIMESTEPS}.")
    for timestep in timesteps:
        check_whole("A timestep", timestep, 0, pipe.scheduler.config.num_train_timesteps - 1)
