"""The canvas of the second tab: its element, which assets/optimize.js draws in, and what it hands over, bounded before
it is decoded.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from PIL import Image, ImageDraw, ImageFilter

from ovam_core.errors import InputError
from ovam_core.io.masks import IGNORE, read_mask

SCRIPT = (Path(__file__).parent / "assets" / "optimize.js").read_text(encoding="utf-8")

MAX_LAYERS = 4  # the page paints on one
MAX_LAYER_BYTES = 4 << 20  # of a layer's file
MAX_LAYER_PIXELS = 4 << 20  # the canvas has a quarter of it at most
MAX_PAINT = 2_000_000  # characters of what the page hands over; strokes of the brush take 50,000
FORMATS = ("PNG",)
URL = "data:image/png;base64,"
PAINT, STROKES, UPLOAD = "Paint the object", "A few strokes", "Upload a mask"
SURE = 0.03  # of the picture's side: how far from a mask's edge its strokes stay

OBJECT, BACKGROUND = "#e6007e", "#00b4d8"  # magenta and cyan: the two colours of the brush

Layer = bytes | str | Image.Image  # a file's content, its path, or the picture itself

TOO_MANY = f"The canvas has more than {MAX_LAYERS} layers; paint on one."
TOO_LARGE = f"A layer of the canvas is larger than {MAX_LAYER_BYTES >> 20} MB; paint less, or upload a mask."
NO_CANVAS = "This is no canvas; paint anew."


def handed_over(text: str) -> list[Layer]:
    """What the page's canvas sends, a PNG as a data URL, as layers: none for "", a bare canvas. Raises InputError for
    any other text.
    """
    if not text:
        return []
    if not text.startswith(URL):
        raise InputError(NO_CANVAS)
    try:
        return [base64.b64decode(text[len(URL) :], validate=True)]
    except ValueError:
        raise InputError(NO_CANVAS) from None


def flattened(layers: Sequence[Layer]) -> Image.Image:
    """All layers upon one another, RGBA; one at a time is decoded.

    Raises InputError for none, too many, too large ones (told by the header alone), and for no pictures of one size.
    """
    if not layers:
        raise InputError("Nothing is painted yet; paint over the object in the picture.")
    if len(layers) > MAX_LAYERS:
        raise InputError(TOO_MANY)
    drawn = None
    for layer in layers:
        painted = _decoded(layer)
        if drawn is not None and painted.size != drawn.size:
            raise InputError("The layers of the canvas differ in size; paint anew.")
        drawn = painted if drawn is None else Image.alpha_composite(drawn, painted)
    assert drawn is not None
    return drawn


def _decoded(layer: Layer) -> Image.Image:
    """RGBA; its size is looked at before it is decoded."""
    if isinstance(layer, Image.Image):
        return layer.convert("RGBA")
    try:
        if (len(layer) if isinstance(layer, bytes) else Path(layer).stat().st_size) > MAX_LAYER_BYTES:
            raise InputError(TOO_LARGE)
        with Image.open(io.BytesIO(layer) if isinstance(layer, bytes) else layer, formats=FORMATS) as picture:
            check_pixels(picture, MAX_LAYER_PIXELS)
            return picture.convert("RGBA")
    except InputError:
        raise
    except Image.DecompressionBombError:
        raise InputError(f"The picture is too large; at most {MAX_LAYER_PIXELS:,} pixels, make it smaller.") from None
    except Exception:  # a decoder fails in whatever way a broken file makes it
        raise InputError("A layer of the canvas is no picture that can be read; paint anew.") from None


def check_pixels(picture: Image.Image, most: int) -> None:
    """Raises InputError for a picture, whose header alone is read so far, of more than `most` pixels."""
    if picture.width * picture.height > most:
        raise InputError(f"The picture is {picture.width}x{picture.height}; at most {most:,} pixels, make it smaller.")


# ------------------------------------------------------------------------------------------- paint to a mask


def painted_mask(layers: Sequence[Layer], way: str, size: tuple[int, int]) -> np.ndarray:
    """What was painted over the picture, as labels uint8 [H, W] at its true `size` (H, W): 0, 1, and with strokes 255
    where nothing was painted.

    layers: any scale of the same shape. Raises InputError where nothing, or everything, is painted, and as `flattened`.
    """
    pixels = np.asarray(flattened(layers)).astype(np.int16)
    to_object, to_background = (
        np.abs(pixels[..., :3] - np.array(_rgb(color), np.int16)).sum(axis=-1) for color in (OBJECT, BACKGROUND)
    )
    bare, nearer = pixels[..., 3] <= 127, to_object < to_background
    if way != STROKES:
        return read_mask(Image.fromarray((nearer & ~bare).astype(np.uint8) * 255), size)
    labels = np.where(bare, IGNORE, nearer.astype(np.uint8)).astype(np.uint8)
    for label, color in ((1, "object (magenta)"), (0, "background (cyan)")):
        if not (labels == label).any():
            raise InputError(f"No stroke marks the {color}; draw at least one of each colour.")
    # Palette mode says that these numbers are labels: 255 is nobody's brightness.
    marks = Image.fromarray(labels).convert("P")
    marks.putdata(labels.reshape(-1).tolist())
    marks.putpalette([value for color in ("#000000", OBJECT) for value in _rgb(color)])
    return read_mask(marks, size)


def _rgb(color: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(color[1:]))


def read_any(way: str, layers: Sequence[Layer], file: str | None, size: tuple[int, int]) -> np.ndarray:
    """The mask by whichever way it was given: layers painted on the canvas, or a file."""
    if way != UPLOAD:
        return painted_mask(layers, way, size)
    if not file:
        raise InputError("There is no mask file yet; upload one, or paint the object instead.")
    return read_mask(file, size)


def spot_of(text: str, size: tuple[int, int]) -> tuple[int, int]:
    """The pixel (x, y) of a picture of `size` (H, W) that was clicked: "0.25,0.5", shares of width and height. Raises
    InputError for anything else.
    """
    found = re.fullmatch(r"(0(?:\.\d{1,9})?|1),(0(?:\.\d{1,9})?|1)", text)
    if not found:
        raise InputError("This is no place in the picture; click in it again.")
    height, width = size
    x, y = float(found[1]), float(found[2])
    return min(int(x * width), width - 1), min(int(y * height), height - 1)


# ------------------------------------------------------------------------------------------- a mask to paint


def connected(mask: np.ndarray, seeds: np.ndarray, side: int = 256) -> np.ndarray:
    """The parts of a mask that hold a seed: bool [H, W] of bool [H, W] both. Found on at most `side` pixels a side, so
    that gaps of less than a pixel of these are none.
    """
    scale = max(1, -(-max(mask.shape) // side))
    small, left = (_pooled(values, scale) for values in (mask, seeds & mask))
    image = Image.fromarray(small.astype(np.uint8) * 255).copy()  # an array's own memory is not written to
    while left.any():
        y, x = np.argwhere(left)[0]
        ImageDraw.floodfill(image, (int(x), int(y)), 128)
        left &= np.asarray(image) == 255
    reached = (np.asarray(image) == 128).repeat(scale, axis=0).repeat(scale, axis=1)
    return mask & reached[: mask.shape[0], : mask.shape[1]]


def _pooled(mask: np.ndarray, scale: int) -> np.ndarray:
    """Whether anything of each block of `scale` pixels a side is marked."""
    height, width = (-(-length // scale) for length in mask.shape)
    padded = np.zeros((height * scale, width * scale), bool)
    padded[: mask.shape[0], : mask.shape[1]] = mask
    return padded.reshape(height, scale, width, scale).any(axis=(1, 3))


def sure_parts(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What of a mask surely is the object, and what surely is not: both keep away from its edge. bool [H, W] each."""
    image = Image.fromarray(mask.astype(np.uint8) * 255).convert("L")
    near = np.asarray(image.filter(ImageFilter.BoxBlur(max(1, round(SURE * max(mask.shape))))))
    inside, outside = near >= 250, near <= 5
    return (inside if inside.any() else mask), (outside if outside.any() else ~mask)


# ----------------------------------------------------------------------------------------------- the elements


def skeleton(with_sam: bool = False) -> str:
    """The canvas and its tools, as HTML; empty, it says what will appear. with_sam: clicks can be answered by SAM."""
    turbo = base64.b64encode(colormaps["turbo"](np.arange(256), bytes=True)[:, :3].tobytes()).decode("ascii")
    return CANVAS.replace("TURBO", turbo).replace("SAM_TOOL", SAM_TOOL if with_sam else "")


SAM_TOOL = """
<button type="button" data-tool="sam" aria-pressed="false"
title="Click in the picture: what Segment Anything finds there is painted">Click, by SAM</button>"""

CANVAS = f"""<div class="paint empty" data-object="{OBJECT}" data-background="{BACKGROUND}" data-turbo="TURBO">
<div class="p-tools" role="toolbar" aria-label="Brushes">
<div class="p-group" role="group" aria-label="What the pointer does">
<button type="button" data-tool="object" aria-pressed="true" title="Paint what belongs to the object"><i
style="background: {OBJECT}"></i>Object</button>
<button type="button" data-tool="background" aria-pressed="false" title="Paint what does not belong to it"><i
style="background: {BACKGROUND}"></i>Background</button>
<button type="button" data-tool="eraser" aria-pressed="false" title="Take paint away"><i class="rub"></i>Eraser</button>
<button type="button" data-tool="click" aria-pressed="false"
title="Click in the picture: the region of the word that is strongest there is painted">Click an object</button>SAM_TOOL
</div>
<label class="p-size"><span>Size</span><input type="range" min="1" max="25" step="0.5" value="7"
data-part="size" aria-label="Brush size, in percent of the picture's side"></label>
</div>
<div class="p-stage" data-part="stage">
<p class="p-empty">The picture to paint on will appear here: make one, or take the one from Generate.</p>
<img data-part="image" alt="">
<canvas data-part="canvas" tabindex="0" role="application" aria-label="No picture yet"></canvas>
<span class="p-ring" data-part="ring" hidden></span>
<div class="p-busy" data-part="busy" role="status" hidden><span data-part="busy-said"></span><progress max="1"
data-part="busy-share"></progress><button type="button" data-do="halt">Stop</button></div>
</div>
<div class="p-below"><p class="p-said" data-part="said" role="status"></p>
<button type="button" data-do="undo" disabled title="Takes the last stroke away (Ctrl Z)">Undo</button>
<button type="button" data-do="clear" disabled title="Takes all paint away; the picture stays">Clear paint</button>
</div>
<p class="p-note" data-note="canvas" role="alert"></p>
<p class="p-facts" id="learn-facts"></p>
</div>"""

LIVE = """<div class="live-search" id="learn-live">
<p class="p-note" data-note="learn" role="alert"></p>
<div class="l-pair">
<figure><figcaption>Loss</figcaption><div id="curve" class="l-curve"><p>The loss of every epoch is drawn here.</p></div>
</figure>
<figure><figcaption>Heatmap of the class</figcaption><div class="l-heat"><canvas id="now" role="img"
aria-label="No heatmap yet"></canvas><p>It sharpens here while the token is learned.</p></div></figure>
</div>
<p class="l-said" id="learn-said" role="status"></p>
<p class="l-stale" role="status"></p>
<div id="verdict"></div>
</div>"""

RESULT = """<div class="learned" id="learn-result" hidden>
<p class="l-stale"></p>
<div class="l-comparisons" data-part="comparisons"></div>
</div>"""

TRIED = """<div class="tried" id="tried">
<p class="p-note" data-note="try" role="alert"></p>
<p class="l-said" id="tried-said" role="status"></p>
<div class="t-strip" id="tried-strip" role="group" aria-label="Pictures tried"></div>
<div class="t-shown" id="tried-shown"><p class="t-empty">Once a token is learned: the same token on a picture that
it has never seen.</p></div>
</div>"""
