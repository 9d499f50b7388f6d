"""Masks that people bring, of any mode and size, as labels at the size of an image.

A mask is a drawing: its background is black, or its darkest colour, and the object is what differs from that by more
than half of the drawing's contrast. So a drawing means the same in every mode, and the numbers behind the colours of a
palette count for several classes alone. Two kinds of files are more than drawings: label maps, as VOC's, whose 255 is
left out, and layers, of which the opaque part is the object.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import NoReturn

import numpy as np
from PIL import Image

from ovam_core.errors import InputError
from ovam_core.io.pictures import as_rgb, open_picture, upright
from ovam_core.plot import VOC_PALETTE

IGNORE = 255  # label of pixels that the loss leaves out
LARGEST_VOC_ID = 20
LARGEST_COCO_ID = 182

LOSSY = ("JPEG", "MPO")  # formats whose values are never labels
ANALYSED = 300_000  # pixels, about, that the colours of a drawing are looked for in
APART = 0.1  # of the contrast: what colours differ by at least that are not one
NEAR = 8  # of 255: the same, in a drawing of few colours, but for its edges
FEW = 8  # how many these are
ASIDE = 0.45  # of the contrast: how far a colour lies from all blends of two that is a third
BLEND = 0.15  # of the way from background to object: how far from it a shade of the edge may lie
SEAM = 3  # pixels: how wide a shade along an object may be that belongs to its edge
OBJECT = 0.01  # of what is not background: what a colour covers that is not noise
STRAY = 4  # pixels of a colour that is nothing yet
BORDER = 0.15  # of an object's width: how wide the border around it may be that a label map leaves out
SHARE = 0.05  # of an area: what is no part of it yet


def read_mask(image: Image.Image | str | Path, size: tuple[int, int], classes: int = 1) -> np.ndarray:
    """A mask of any size and mode as labels at the image's size: uint8 `[H, W]` of 0, 1 to `classes`, and 255 (ignore).

    image: picture or file, upright by its EXIF orientation. size: (H, W) of the generated image; nearest neighbour.
    One class: what differs from the background, the darkest colour, by more than half of the mask's own contrast,
    whatever the mode; or the opaque part of a picture that is transparent elsewhere. 255 is ignored only beside another
    label, as in VOC's files, where it may be their cream, and as a ring around one grey; else it is white.
    Several classes: the values are the labels (grey and palette modes), or VOC's colours stand for them.
    Raises InputError for an empty or full mask, another aspect ratio, several labels or colours where one class is
    wanted.
    """
    height, width = size
    with _opened(image) as picture:
        labels_are_lost = picture.format in LOSSY
        try:
            picture = upright(picture)
        except Exception:  # as broken EXIF data makes it
            raise InputError("The mask is not a whole picture; save it again as PNG.") from None
        if abs(picture.width * height / (picture.height * width) - 1) > 0.02:
            raise InputError(
                f"The mask is {picture.width}x{picture.height} and the image {width}x{height}: their shapes differ; "
                "give the mask of the whole image."
            )
        own = _several(picture, classes, labels_are_lost) if classes > 1 else _one(picture, labels_are_lost)
    labels = np.asarray(Image.fromarray(own).resize((width, height), Image.Resampling.NEAREST))
    if not ((labels > 0) & (labels != IGNORE)).any():
        raise InputError("The mask is empty: mark the object in it.")
    if not (labels == 0).any():
        raise InputError("The mask covers the whole image: leave the background out of it.")
    return labels


def _opened(image: Image.Image | str | Path) -> AbstractContextManager[Image.Image]:
    name = "" if isinstance(image, Image.Image) else Path(image).name
    polygons = name.lower().endswith(".json")
    return open_picture(
        image,
        f"The mask '{name}' holds outlines, as labelme writes them; export it as a picture (labelme_export_json)."
        if polygons
        else f"The mask '{name}' is not a picture that can be read; give a PNG.",
        missing=f"There is no mask file '{image}'.",
        too_large="The mask is {size}; that is too large, give it at the image's size.",
        broken="The mask is not a whole picture; save it again as PNG.",
    )


# ------------------------------------------------------------------------------------------------ several classes


def _several(picture: Image.Image, classes: int, labels_are_lost: bool) -> np.ndarray:
    """uint8 labels 0 to `classes` and 255."""
    if labels_are_lost:
        raise InputError("A JPEG changes the labels of a mask of several classes; save it as PNG.")
    labels = _numbers(picture, classes)
    highest = int(labels[labels != IGNORE].max(initial=0))
    if highest > classes:
        raise InputError(f"The mask holds the label {highest}, but there are {classes} classes: 1 to {classes}.")
    return labels.astype(np.uint8)


def _numbers(picture: Image.Image, classes: int) -> np.ndarray:
    """The labels that a picture's values are, or its colours stand for."""
    colors, hidden = _colors(picture)
    by_color = _voc_ids(colors)
    if picture.mode == "P":
        labels = np.asarray(picture)
        has_color = labels < _palette_size(picture)
        black = labels[has_color & ~colors.any(axis=-1) & (labels != IGNORE)]
        by_voc = by_color is not None and by_color[by_color != IGNORE].max(initial=0) <= classes
        if not by_voc or (labels == by_color)[has_color].all():
            if black.any():
                raise InputError(
                    "The mask's palette has black at another number than 0, so that its numbers are no labels; save it "
                    "as a grey PNG whose values are the labels."
                )
            return labels
        raise InputError(
            "The mask's palette gives VOC's colours other numbers than VOC does; save it as a grey PNG whose values "
            "are the labels."
        )
    if picture.mode[0] in "1LIF" and picture.mode != "LAB":
        grey = picture.getchannel(0) if picture.mode in ("LA", "La") else picture
        labels = _numbers_there(grey).astype(np.int64)
    elif (colors == colors[..., :1]).all():
        labels = colors[..., 0]
    elif by_color is None:
        raise InputError(
            f"A mask of {classes} classes has numbers: save it as a grey or palette PNG whose values are the labels."
        )
    else:
        labels = by_color
    return labels if hidden is None else np.where(hidden, 0, labels)


# ------------------------------------------------------------------------------------------------ one class


def _one(picture: Image.Image, labels_are_lost: bool) -> np.ndarray:
    """uint8 labels 0, 1 and 255."""
    colors, hidden = _colors(picture)
    if hidden is not None:
        shown = np.where(hidden[..., None], np.uint8(0), colors)
        ids = _label_map(shown)
        by_key = picture.mode in ("1", "L", "RGB")  # one colour is said to be transparent
        return _layer(colors, hidden, by_key) if ids is None else _only_label(ids)
    if not labels_are_lost:
        ids = _indices(picture, colors)
        if ids is None:
            ids = _label_map(colors, exact=picture.mode[0] not in "IF" or _is_small(_numbers_there(picture)))
        if ids is not None:
            return _only_label(ids)
    return _drawn(colors)


def _colors(picture: Image.Image) -> tuple[np.ndarray, np.ndarray | None]:
    """uint8 `[H, W, 3]`, and bool `[H, W]`, what is transparent, where that varies enough to hide something; else None.

    Grey of more than 8 bits by its own range.
    """
    if picture.mode[0] in "IF":
        values = _numbers_there(picture)
        if not _is_small(values) and values.any():
            values = values * np.float32(255 / values.max())
        return np.repeat(values.round().astype(np.uint8)[..., None], 3, axis=2), None
    if picture.mode in ("La", "RGBa"):
        picture = picture.convert("LA" if picture.mode == "La" else "RGBA")
    if not picture.has_transparency_data:
        return np.asarray(as_rgb(picture)), None
    pixels = np.asarray(picture.convert("RGBA"))
    colors, alpha = pixels[..., :3], pixels[..., 3]
    low, high = int(alpha.min()), int(alpha.max())
    if high and (low == high or (2 * low > high and (colors != colors[0, 0]).any())):
        return colors, None  # nothing is hidden: the colours are what varies
    return colors, alpha <= (low + high) / 2


def _numbers_there(picture: Image.Image) -> np.ndarray:
    """The values of a grey picture, float32, 0 where they are none or below."""
    return np.nan_to_num(np.asarray(picture).astype(np.float32), posinf=0).clip(0)


def _is_small(values: np.ndarray) -> bool:
    """Whether all are whole numbers of 8 bits."""
    return bool(values.max() <= 255 and (values == np.rint(values)).all())


def _palette_size(picture: Image.Image) -> int:
    return len(picture.getpalette() or ()) // 3


def _indices(picture: Image.Image, colors: np.ndarray) -> np.ndarray | None:
    """The numbers of a palette that are surely labels: those that have no colour in it, or a few, and 255 for what is
    left out, not all of them grey.
    """
    if picture.mode != "P":
        return None
    numbers = np.asarray(picture)
    used = np.unique(numbers)
    if used[-1] >= _palette_size(picture):
        return numbers
    if (colors == colors[..., :1]).all():
        return None
    marked = _marked(used)
    by_voc = not len(marked) and _voc_ids(colors) is not None
    return numbers if used[-1] == IGNORE and (by_voc or 0 < len(marked) <= LARGEST_VOC_ID) else None


def _label_map(colors: np.ndarray, exact: bool = True) -> np.ndarray | None:
    """The labels of a label map, by VOC's colours, as small greys or as a grey in a ring of 255; None for any other
    picture.

    exact: whether the greys are the picture's own numbers.
    """
    if (colors == colors[..., :1]).all():
        grey = colors[..., 0]
        is_map = exact and (0 < _marked(grey).max(initial=0) <= LARGEST_VOC_ID or _is_ringed(grey))
        ids = grey if is_map else None
    else:
        ids = _voc_ids(colors)
        if ids is not None and len(_marked(ids)) > 1 and not _are_several(_marked(ids)):
            return None
    return None if ids is None or not len(_marked(ids)) else ids


def _is_ringed(ids: np.ndarray) -> bool:
    """Whether there is one label, and 255 is a border between it and 0, narrow beside the label's own width."""
    marked = _marked(ids)
    if len(marked) != 1 or marked[0] > LARGEST_COCO_ID:
        return False
    void, own = ids == IGNORE, ids == marked[0]
    around = _grown(own, 1) & ~own
    return _is_within(around, void) and _is_within(void, _grown(own, round(BORDER * float(own.sum()) ** 0.5)))


def _is_within(part: np.ndarray, area: np.ndarray) -> bool:
    """Whether there is a part, bool `[h, w]`, and hardly any of it is outside of the area."""
    return bool((part & ~area).sum() < SHARE * part.sum())


def _are_several(ids: np.ndarray) -> bool:
    """Whether VOC's colours of these are labels of several classes, and not the shades of one soft edge."""
    colors = np.asarray(VOC_PALETTE).reshape(256, 3)[ids]
    return ids[-1] <= LARGEST_VOC_ID and bool(np.cross(colors[0], colors[1:]).any())


def _marked(ids: np.ndarray) -> np.ndarray:
    """The labels of classes among these, each once."""
    return np.unique(ids[(ids > 0) & (ids < IGNORE)])


def _voc_ids(colors: np.ndarray) -> np.ndarray | None:
    """The labels of a picture in VOC's colours alone; None where there is another colour."""
    codes = _codes(colors)
    palette = _codes(np.asarray(VOC_PALETTE, np.uint8).reshape(256, 3))
    order = np.argsort(palette)
    places = np.searchsorted(palette[order], codes).clip(max=255)
    return order[places].astype(np.uint8) if (palette[order][places] == codes).all() else None


def _codes(colors: np.ndarray) -> np.ndarray:
    red, green, blue = (colors[..., channel].astype(np.uint32) for channel in range(3))
    return (red << 16) | (green << 8) | blue


def _only_label(ids: np.ndarray) -> np.ndarray:
    marked = _marked(ids).tolist()
    if len(marked) > 1:
        listed = ", ".join(map(str, marked[:5]))
        raise InputError(f"The mask holds several labels ({listed}): give a mask of one class, or name every class.")
    return np.select([ids == 0, ids == IGNORE], [0, IGNORE], 1).astype(np.uint8)


def _layer(colors: np.ndarray, hidden: np.ndarray, by_key: bool) -> np.ndarray:
    """The opaque part of a layer, or of a picture that was cut out.

    Raises InputError where that part is itself a drawing on black.
    """
    if hidden.all():
        return np.zeros(hidden.shape, np.uint8)
    shown = colors[~hidden].astype(np.int16)
    brightness = shown.max(axis=-1)
    brightest = shown[brightness.argmax()]
    near = brightest.max() / 16
    black, bright = (brightness <= near).mean(), (abs(shown - brightest).max(axis=-1) <= near).mean()
    is_drawing = brightest.any() and min(black, bright) > SHARE and black + bright > 0.5
    if is_drawing or (by_key and not brightest.any()):
        raise InputError(
            "The mask has black parts and transparent ones, and either may be the background: save it without "
            "transparency."
        )
    return (~hidden).astype(np.uint8)


# ------------------------------------------------------------------------------------------------ drawings


def _drawn(colors: np.ndarray) -> np.ndarray:
    """uint8 0 and 1: what of a drawing is nearer to the object's colour than to the background's."""
    step = max(1, int((colors.shape[0] * colors.shape[1] / ANALYSED) ** 0.5))
    sample = colors[::step, ::step].astype(np.int16)
    contrast = int((sample.max(axis=(0, 1)) - sample.min(axis=(0, 1))).max())
    if contrast == 0:
        return np.full(colors.shape[:2], int(sample.any()), np.uint8)
    background, marked = _two_colors(sample, contrast, max(1, SEAM // step))
    way = marked - background
    along = np.zeros(colors.shape[:2], np.float32)
    for channel in range(3):
        along += (colors[..., channel] - np.float32(background[channel])) * np.float32(way[channel])
    return (along > float(way @ way) / 2).astype(np.uint8)


def _two_colors(sample: np.ndarray, contrast: int, seam: int) -> tuple[np.ndarray, np.ndarray]:
    """The colours of background and object, float `[3]`.

    sample: int16 `[h, w, 3]`. contrast: of its widest channel. seam: how wide a shade of the edge may be, in pixels.

    Raises InputError for more colours than these.
    """
    colors = sample.reshape(-1, 3).astype(np.float32)
    brightness = colors.max(axis=-1)
    background = colors[brightness <= brightness.min() + contrast / 32].mean(axis=0)
    spans = _spans(sample)
    few = colors if _are_few(colors) else sample[spans == 0]
    if len(few) and _are_few(few):
        groups = _groups(few, min(NEAR, contrast / 4), STRAY + 1, contrast)
    else:
        flat = sample[spans <= max(2, contrast // 16)]
        beside = int((flat.max(axis=-1) > brightness.min() + APART * contrast).sum())
        groups = _groups(flat, APART * contrast, max(STRAY + 1, OBJECT * beside), contrast)
    if groups and groups[0].max() - brightness.min() < ASIDE * contrast:  # JPEG has pixels darker than the darkest
        background, *groups = groups
    away = np.linalg.norm(colors - background, axis=1)
    marked = groups.pop() if groups else colors[away >= away.max() - contrast / 32].mean(axis=0)
    if marked.max() < 2 * background.max() and max(np.ptp(marked), np.ptp(background)) > contrast / 8:
        _refuse([background, marked], "and none of them is black, the background's")
    wide = round(BORDER * float((away > away.max() / 2).sum()) ** 0.5)
    others = _no_edges(groups, background, marked, sample, wide)
    steps = [
        color
        for color in _no_edges(groups, background, marked, sample, seam)
        if min(abs(color - background).max(), abs(color - marked).max()) > APART * contrast
    ]
    others = others or steps * (len(steps) == 1)  # one alone is a trimap's; more are those of a wide soft edge
    if others:
        _refuse([*others, marked])
    way = marked - background
    aside = colors[np.linalg.norm(colors - _blends(colors, background, marked), axis=1) > ASIDE * contrast]
    if len(aside) > SHARE * (away > np.linalg.norm(way) / 2).sum():
        _refuse([marked, aside.mean(axis=0)])
    return background, marked


def _blends(colors: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The blend of two colours `[3]` that is nearest to each of `[n, 3]`."""
    way = other - one
    return ((colors - one) @ way / (way @ way)).clip(0, 1)[:, None] * way + one


def _no_edges(
    groups: list[np.ndarray], background: np.ndarray, marked: np.ndarray, sample: np.ndarray, seam: int
) -> list[np.ndarray]:
    """Those of the colours that are no shades of the object's edge, as a soft mask in few colours has them: blends of
    background and object, each a narrow seam along what is brighter.
    """
    way = marked - background
    scale = way / (way @ way)
    places = [float((color - background) @ scale) for color in groups]
    along = (sample - background.astype(np.float32)) @ scale.astype(np.float32)
    others = []
    for color, place, below, above in zip(groups, places, [0, *places], [*places[1:], 1], strict=False):
        is_blend = np.linalg.norm(color - _blends(color[None], background, marked)[0]) < BLEND * np.linalg.norm(way)
        brighter = along > (place + above) / 2
        shade = (along > (below + place) / 2) & ~brighter
        if not (is_blend and _is_within(shade, _grown(brighter, seam))):
            others.append(color)
    return others


def _grown(mask: np.ndarray, by: int) -> np.ndarray:
    """The pixels of which one of a mask, bool `[h, w]`, is at most `by` rows and columns away."""
    sums = np.pad(mask, ((by + 1, by), (by + 1, by))).cumsum(0).cumsum(1)
    side = 2 * by + 1
    return sums[side:, side:] + sums[:-side, :-side] > sums[side:, :-side] + sums[:-side, side:]


def _are_few(colors: np.ndarray) -> bool:
    return len(np.unique(_codes(colors))) <= FEW


def _spans(sample: np.ndarray) -> np.ndarray:
    """int16 `[h, w]`: by how much a channel varies among each pixel and its eight neighbours; 255 at the frame."""
    spans = np.full(sample.shape[:2], 255, np.int16)
    if min(spans.shape) >= 3:
        windows = np.lib.stride_tricks.sliding_window_view(sample, (3, 3), axis=(0, 1))
        spans[1:-1, 1:-1] = (windows.max(axis=(-2, -1)) - windows.min(axis=(-2, -1))).max(axis=-1)
    return spans


def _groups(colors: np.ndarray, apart: float, least: float, contrast: int) -> list[np.ndarray]:
    """The mean colours of the groups that these `[n, 3]` fall into, the darkest first; shades between two join them.

    Left out are groups of less than `least` pixels and those that are a whole ramp.
    """
    if not len(colors):
        return []
    width = max(1, int(apart / 4))
    _, place, counts = np.unique(_codes(colors // width), return_inverse=True, return_counts=True)
    means = np.stack([np.bincount(place, colors[:, channel]) / counts for channel in range(3)], axis=1)
    common = counts >= least / 8
    means, counts = means[common], counts[common]
    near = np.abs(means[:, None] - means[None]).max(axis=-1) < apart
    groups = []
    left = np.ones(len(means), bool)
    while left.any():
        group = np.zeros(len(means), bool)
        group[np.flatnonzero(left)[0]] = True
        while (grown := near[group].any(axis=0)).sum() > group.sum():
            group = grown
        if counts[group].sum() >= least and np.ptp(means[group], axis=0).max() <= 2 * APART * contrast:
            groups.append(np.average(means[group], axis=0, weights=counts[group]))
        left &= ~group
    return sorted(groups, key=lambda color: float(color.max()))


def _refuse(colors: list[np.ndarray], more: str = "for one object") -> NoReturn:
    listed = ", ".join("({:.0f}, {:.0f}, {:.0f})".format(*color) for color in colors[:5])
    raise InputError(
        f"The mask holds several colours {more}: {listed}; leave one object in it, of one colour on black."
    )
