"""Masks that people bring, of any mode and size, as labels at the size of an image."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
from PIL import Image

from ovam_core.errors import InputError
from ovam_core.io.pictures import open_picture

IGNORE = 255  # label of pixels that the loss leaves out
LARGEST_VOC_ID = 20


def read_mask(image: Image.Image | str | Path, size: tuple[int, int], classes: int = 1) -> np.ndarray:
    """A mask of any size and mode as labels at the image's size: uint8 `[H, W]` of 0, 1 to `classes`, and 255 (ignore).

    image: picture or file. size: (H, W) of the generated image; nearest neighbour. One class: black is background,
    the rest object, whether it is 1, 255, a colour, a palette index or an opaque part of a transparent picture. 255 is
    ignore only beside another label, as in VOC's files; beside a grey it is white. Greys in between are cut at half.
    Several classes: the values are the labels (modes L and P).
    Raises InputError for an empty or full mask, another aspect ratio, several labels where one class is wanted.
    """
    height, width = size
    with _opened(image) as picture:
        if abs(picture.width * height / (picture.height * width) - 1) > 0.02:
            raise InputError(
                f"The mask is {picture.width}x{picture.height} and the image {width}x{height}: their shapes differ; "
                "give the mask of the whole image."
            )
        own_labels = Image.fromarray(_labels(picture, classes))
    labels = np.asarray(own_labels.resize((width, height), Image.Resampling.NEAREST))
    if not ((labels > 0) & (labels != IGNORE)).any():
        raise InputError("The mask is empty: mark the object in it.")
    if not (labels == 0).any():
        raise InputError("The mask covers the whole image: leave the background out of it.")
    return labels


def _opened(image: Image.Image | str | Path) -> AbstractContextManager[Image.Image]:
    name = "" if isinstance(image, Image.Image) else Path(image).name
    return open_picture(
        image,
        f"The mask '{name}' is not a picture that can be read.",
        missing=f"There is no mask file '{image}'.",
        too_large="The mask is {size}; that is too large, give it at the image's size.",
        broken="The mask is not a whole picture; save it again as PNG.",
    )


def _labels(picture: Image.Image, classes: int) -> np.ndarray:
    """uint8 labels at the picture's own size."""
    values, are_ids = _values(picture)
    present = set(np.unique(values).tolist())
    ids = sorted(present - {0, IGNORE})
    if classes > 1:
        if ids and ids[-1] > classes:
            raise InputError(f"The mask holds the label {ids[-1]}, but there are {classes} classes: 1 to {classes}.")
        return values.astype(np.uint8)
    if not ids:  # 0 and 255 alone: white is the object, unless the values are known to be label numbers
        return np.where(values == 0, 0, IGNORE if are_ids else 1).astype(np.uint8)
    if len(ids) == 1 and (are_ids or ids[0] <= LARGEST_VOC_ID or IGNORE not in present):
        return np.select([values == 0, values == ids[0]], [0, 1], IGNORE).astype(np.uint8)
    if are_ids or ids[-1] <= LARGEST_VOC_ID:
        listed = ", ".join(map(str, ids[:5]))
        raise InputError(f"The mask holds several labels ({listed}): give a mask of one class, or name every class.")
    return (values > max(present) / 2).astype(np.uint8)  # a soft edge, or JPEG's noise


def _values(picture: Image.Image) -> tuple[np.ndarray, bool]:
    """One number a pixel, and whether the numbers are surely labels and not brightness."""
    if "A" in picture.getbands():
        alpha = np.asarray(picture.getchannel("A"))
        if alpha.min() < 255:  # painted on a transparent layer, or a cut-out
            return np.where(alpha > 127, 1, 0), False
        picture = picture.convert("L" if picture.mode == "LA" else "RGB")
    if picture.mode == "P":
        colors = np.asarray(picture.convert("RGB"))
        if set(np.unique(colors).tolist()) <= {0, 255} and (colors == colors[..., :1]).all():
            return colors[..., 0], False  # a black and white picture that happens to have a palette
        return np.asarray(picture), True
    if picture.mode in ("1", "L", "I", "I;16", "I;16B", "I;16L", "F"):
        values = np.asarray(picture)
        if values.dtype != np.uint8:
            values = np.nan_to_num(values.astype(np.float32)).clip(0).astype(np.int32)
        return values, False
    colors = np.asarray(picture.convert("RGB"))
    if (colors == colors[..., :1]).all():
        return colors[..., 0], False
    return np.where(colors.max(axis=-1) > 127 if _is_soft(colors) else colors.any(axis=-1), 1, 0), False


def _is_soft(colors: np.ndarray) -> bool:
    """Whether a colour mask has more colours than one would paint: JPEG, or smoothed edges."""
    codes = colors.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)
    return len(np.unique(codes)) > 8
