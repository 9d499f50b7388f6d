"""Pictures of maps and masks: arrays and Pillow images in, Pillow images out; no figures and no global state."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ovam_core.errors import InputError

# Okabe and Ito's set without its black, then three of Paul Tol's: told apart with any kind of colour vision.
COLORS = (
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#CC79A7",
    "#0072B2",
    "#D55E00",
    "#F0E442",
    "#AA4499",
    "#44AA99",
    "#882255",
)

FRAME_SIDE = 512  # pixels of an animation's picture at most
CAPTION = 28  # of the bar below it
DIM = 0.45  # how bright the picture under a heatmap stays


def _voc_palette() -> tuple[int, ...]:
    """The 256 RGB triples of the VOC label files: the bits of the id, dealt to R, G and B from the top bit down."""
    ids = np.arange(256)
    palette = np.zeros((256, 3), dtype=np.uint8)
    for place in range(8):
        for channel in range(3):
            bit = (ids >> (3 * place + channel)) & 1
            palette[:, channel] |= (bit << (7 - place)).astype(np.uint8)
    return tuple(int(value) for value in palette.reshape(-1))


VOC_PALETTE = _voc_palette()


def word_colors(words: Sequence[str]) -> dict[str, str]:
    """One hex colour a word, in the order given; the set repeats after len(COLORS) words."""
    return {word: COLORS[index % len(COLORS)] for index, word in enumerate(words)}


def colorize(heatmap: np.ndarray, vmax: float | None = None, cmap: str = "turbo") -> np.ndarray:
    """A map in colours of a perceptually ordered table.

    heatmap: float [H, W], 0 or more.
    vmax: the value at the top of the table; None takes the map's own maximum. Give one to several maps to
        compare them. Zero or less shows the bottom colour everywhere.
    Returns uint8 [H, W, 3].
    """
    from matplotlib import colormaps  # a tenth of a second to import, which a picture without maps does not need

    heatmap = np.asarray(heatmap, dtype=np.float32)
    if heatmap.ndim != 2:
        raise InputError(f"A heatmap has two dimensions, this array has {heatmap.ndim}; pass one map at a time.")
    top = float(np.nanmax(heatmap)) if vmax is None else float(vmax)
    scaled = np.nan_to_num(heatmap / top, nan=0.0) if top > 0 else np.zeros_like(heatmap)
    return colormaps[cmap](np.clip(scaled, 0.0, 1.0), bytes=True)[..., :3]


def overlay(
    image: Image.Image,
    heatmap: np.ndarray,
    vmax: float | None = None,
    opacity: float = 0.65,
    cmap: str = "turbo",
) -> Image.Image:
    """The coloured map over the dimmed picture, at the picture's size.

    image: any mode, (W, H). heatmap: float [h, w] at any size, resized bilinearly to the picture's.
    vmax: as in `colorize`. opacity: share of the map in the mix, in [0, 1].
    Returns an RGB image of the picture's size.
    """
    if not 0.0 <= opacity <= 1.0:
        raise InputError(f"opacity is {opacity}; choose a number from 0 to 1.")
    heatmap = np.asarray(heatmap, dtype=np.float32)
    top = float(np.nanmax(heatmap)) if vmax is None else vmax  # before the resize, which lowers peaks
    heatmap = resize_map(heatmap, image.size)
    # A grey, darker picture below: its own colours would be read as values of the map.
    below = np.asarray(image.convert("L"), dtype=np.float32)[..., None] * DIM
    mixed = (1.0 - opacity) * below + opacity * colorize(heatmap, top, cmap).astype(np.float32)
    return Image.fromarray(np.clip(np.rint(mixed), 0, 255).astype(np.uint8))


def resize_map(heatmap: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A float map [h, w] to size (W, H) in Pillow's order, bilinear; unchanged where it already fits."""
    if (heatmap.shape[1], heatmap.shape[0]) == tuple(size):
        return heatmap
    return np.asarray(Image.fromarray(heatmap).resize(size, Image.Resampling.BILINEAR))


def resize_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A mask bool [h, w] to size (W, H) in Pillow's order, nearest neighbour; unchanged where it already fits."""
    if (mask.shape[1], mask.shape[0]) == tuple(size):
        return mask
    return np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))


def mask_image(mask: np.ndarray) -> Image.Image:
    """bool [H, W] to a black and white PNG picture (mode L, 0 and 255)."""
    return Image.fromarray(np.asarray(mask, dtype=bool).astype(np.uint8) * 255)


def label_image(label_map: np.ndarray) -> Image.Image:
    """A label map, uint8 [H, W] of ids, to a picture of mode P whose pixels are the ids, in VOC's palette."""
    label_map = np.asarray(label_map)
    if label_map.ndim != 2 or label_map.dtype != np.uint8:
        raise InputError(f"A label map is uint8 [H, W]; this is {label_map.dtype} {list(label_map.shape)}.")
    picture = Image.fromarray(label_map)
    picture.putpalette(VOC_PALETTE)  # turns mode L into P, the pixels stay
    return picture


def png(image: Image.Image) -> bytes:
    """The picture as the bytes of a PNG file, the same for the same pixels."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def frames(image: Image.Image, maps: np.ndarray, labels: Sequence[str], vmax: float | None = None) -> list[Image.Image]:
    """Maps over the dimmed picture, one picture each, with a caption below and how far along it is.

    maps: float `[N, h, w]`. labels: N captions. vmax: as in `colorize`, the same for all; None takes the largest of the
    maps. Returns RGB images of one size, no side of the picture over FRAME_SIDE.
    """
    if len(maps) != len(labels):
        raise InputError(f"There are {len(maps)} maps and {len(labels)} labels; give each map its label.")
    below = enlarge(image.convert("RGB"), FRAME_SIDE // 2)
    below.thumbnail((FRAME_SIDE, FRAME_SIDE), Image.Resampling.LANCZOS)
    top = float(np.nanmax(maps)) if vmax is None and len(maps) else vmax
    return [
        _captioned(overlay(below, one, top), label, (number + 1) / len(maps))
        for number, (one, label) in enumerate(zip(maps, labels, strict=True))
    ]


def _captioned(picture: Image.Image, caption: str, done: float) -> Image.Image:
    whole = Image.new("RGB", (picture.width, picture.height + CAPTION), "#18181b")
    whole.paste(picture)
    draw = ImageDraw.Draw(whole)
    draw.rectangle((0, picture.height, round(done * picture.width), picture.height + 2), fill=COLORS[0])
    middle = picture.height + 2 + (CAPTION - 2) / 2
    draw.text((8, middle), caption, fill="white", font=ImageFont.load_default(13), anchor="lm")
    return whole


def animation(frames: Sequence[Image.Image], milliseconds: int = 200, hold: int = 1200) -> bytes:
    """Pictures of one size as the bytes of an animated WebP that repeats, the same for the same pictures.

    milliseconds: of each picture; hold: of the last. Raises InputError for no picture, and for sizes that differ.
    """
    if not frames:
        raise InputError("There is no picture to animate; give one at least.")
    if len({frame.size for frame in frames}) > 1:
        raise InputError("The pictures of an animation must have one size; these differ.")
    buffer = io.BytesIO()
    first, *rest = (frame.convert("RGB") for frame in frames)
    durations = [milliseconds] * len(rest) + [hold]
    first.save(buffer, "WEBP", save_all=True, append_images=rest, duration=durations, loop=0, quality=80, method=4)
    return buffer.getvalue()


def enlarge(image: Image.Image, smallest: int = 512) -> Image.Image:
    """The picture, enlarged by a whole number so that its longer side has at least `smallest` pixels."""
    factor = -(-smallest // max(image.size))
    if factor <= 1:
        return image
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.LANCZOS)
