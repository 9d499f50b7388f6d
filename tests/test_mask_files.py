"""One meaning for a mask: the same drawing is the same mask in every mode and format, or it is refused by name."""

from __future__ import annotations

import io
from functools import partial

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from ovam_core import plot
from ovam_core.errors import InputError
from ovam_core.io.masks import IGNORE, read_mask

SIZE = HEIGHT, WIDTH = 60, 80


def drawing(draw) -> np.ndarray:
    canvas = Image.new("L", (WIDTH, HEIGHT))
    draw(ImageDraw.Draw(canvas))
    return np.asarray(canvas)


DISC = drawing(lambda draw: draw.ellipse((20, 10, 60, 50), fill=1)) > 0
TWO = drawing(lambda draw: (draw.ellipse((5, 10, 30, 35), fill=1), draw.rectangle((45, 20, 70, 50), fill=2)))


def in_colors(labels: np.ndarray, *colors) -> Image.Image:
    return Image.fromarray(np.array(colors, np.uint8)[labels.astype(int)])


def saved(picture: Image.Image, kind: str, **options) -> Image.Image:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    read = Image.open(buffer)
    read.load()
    return read


def overlap(labels: np.ndarray) -> float:
    found = labels == 1
    return (found & DISC).sum() / (found | DISC).sum()


def grey(picture: Image.Image, dtype, scale: float) -> Image.Image:
    return Image.fromarray((np.asarray(picture.convert("L"), dtype=float) * scale).astype(dtype))


def with_alpha(picture: Image.Image, alpha: np.ndarray | int) -> Image.Image:
    own = picture.convert("RGBA")
    own.putalpha(alpha if isinstance(alpha, int) else Image.fromarray(alpha))
    return own


EXACT = {
    **{mode: partial(Image.Image.convert, mode=mode) for mode in ("L", "LA", "RGBA", "CMYK", "YCbCr", "HSV", "RGBX")},
    "P of two colours": lambda picture: picture.quantize(2),
    "P, adaptive": lambda picture: picture.convert("P", palette=Image.Palette.ADAPTIVE),
    "I;16": lambda picture: grey(picture, np.uint16, 257),
    "I": lambda picture: grey(picture, np.int32, 1000),
    "F": lambda picture: grey(picture, np.float32, 1 / 255),
    "alpha the same everywhere": lambda picture: with_alpha(picture, 128),
    "alpha that hides nothing": lambda picture: with_alpha(picture, np.where(DISC, 200, 255).astype(np.uint8)),
    "a layer": lambda picture: with_alpha(picture, (DISC * 255).astype(np.uint8)),
    "a faint layer": lambda picture: with_alpha(picture, (DISC * 76).astype(np.uint8)),
    "PNG": partial(saved, kind="PNG"),
    "PNG, black transparent": partial(saved, kind="PNG", transparency=(0, 0, 0)),
    "grey PNG, black transparent": lambda picture: saved(picture.convert("L"), "PNG", transparency=0),
    "GIF": partial(saved, kind="GIF"),
    "BMP": partial(saved, kind="BMP"),
    "TIFF": partial(saved, kind="TIFF"),
    "WebP": partial(saved, kind="WEBP", lossless=True),
}
COLORS = ((0, 128, 0), (255, 0, 0), (0, 0, 255), (64, 0, 0), (40, 40, 40), (224, 224, 192), (255, 255, 255))


@pytest.mark.parametrize("way", EXACT)
def test_a_drawing_means_the_same_in_every_mode(way):
    for color in COLORS:
        labels = read_mask(EXACT[way](in_colors(DISC, (0, 0, 0), color)), SIZE)
        assert np.array_equal(labels, DISC), color


@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize(("kind", "quality"), [("JPEG", 40), ("JPEG", 90), ("WEBP", 50)])
def test_a_drawing_in_a_format_with_losses(color, kind, quality):
    assert overlap(read_mask(saved(in_colors(DISC, (0, 0, 0), color), kind, quality=quality), SIZE)) > 0.93


@pytest.mark.parametrize(("background", "color"), [((100,) * 3, (150,) * 3), ((0, 0, 64), (255, 255, 0))])
def test_the_cut_is_at_half_of_the_masks_own_contrast(background, color):
    picture = in_colors(DISC, background, color)
    assert np.array_equal(read_mask(picture, SIZE), DISC)
    assert overlap(read_mask(saved(picture, "JPEG", quality=60), SIZE)) > 0.95


def test_soft_edges_are_cut_at_half_in_few_colours_too():
    soft = in_colors(DISC, (0, 0, 0), (255, 255, 255)).filter(ImageFilter.GaussianBlur(2))
    for picture in (soft, soft.quantize(16), soft.quantize(4), saved(soft, "GIF"), saved(soft, "JPEG")):
        assert overlap(read_mask(picture, SIZE)) > 0.9


def test_exif_turns_the_mask_upright():
    turned = in_colors(DISC, (0, 0, 0), (255, 0, 0)).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    for kind in ("PNG", "TIFF", "JPEG"):
        assert overlap(read_mask(saved(turned, kind, exif=exif), SIZE)) > 0.97


def test_a_picture_that_was_cut_out_is_its_opaque_part():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8))
    white = in_colors(DISC, (255, 255, 255), (0, 0, 0))  # painted black; what is erased is white below
    for picture in (noise, white):
        assert np.array_equal(read_mask(with_alpha(picture, (DISC * 255).astype(np.uint8)), SIZE), DISC)


@pytest.mark.parametrize(
    "colors",
    [
        ((255, 0, 0), (0, 0, 255)),
        ((255, 0, 0), (128, 0, 0)),
        ((128, 128, 128), (255, 255, 255)),
        ((128, 0, 0), (0, 128, 0)),
    ],
)
def test_two_colours_for_one_class_are_refused_in_every_mode(colors):
    picture = in_colors(TWO, (0, 0, 0), *colors)
    for one in (picture, picture.quantize(3), picture.convert("L"), saved(picture, "JPEG"), picture.convert("RGBA")):
        with pytest.raises(InputError, match=r"several (colours|labels)") as caught:
            read_mask(one, SIZE)
        assert "\n" not in str(caught.value)


def test_the_colours_are_named():
    with pytest.raises(InputError, match=r"\(0, 0, 255\), \(255, 0, 0\)"):
        read_mask(in_colors(TWO, (0, 0, 0), (255, 0, 0), (0, 0, 255)), SIZE)
    with pytest.raises(InputError, match="none of them is black"):
        read_mask(in_colors(DISC, (255, 255, 255), (255, 0, 0)), SIZE)


def test_what_may_be_either_is_refused():
    bars = np.where(np.arange(WIDTH) < 10, 0, 255).astype(np.uint8)[None].repeat(HEIGHT, 0)
    for picture in (
        with_alpha(in_colors(DISC, (0, 0, 0), (255, 255, 255)), bars),
        saved(in_colors(DISC, (0, 0, 0), (255, 255, 255)).convert("L"), "PNG", transparency=255),
    ):
        with pytest.raises(InputError, match="either may be the background"):
            read_mask(picture, SIZE)


def board(*parts, background=(0, 0, 0)) -> Image.Image:
    """A drawing of discs and rectangles: (kind, box, colour)."""
    canvas = Image.new("RGB", (160, 120), background)
    for kind, box, color in parts:
        getattr(ImageDraw.Draw(canvas), kind)(box, fill=color)
    return canvas


def softened(picture: Image.Image) -> Image.Image:
    return picture.filter(ImageFilter.GaussianBlur(0.6))


WHITE, RED = (255, 255, 255), (255, 0, 0)
LEFT, RIGHT, SMALL = (10, 30, 70, 90), (90, 30, 150, 90), (100, 50, 109, 59)
SECOND_COLOURS = {
    "dark blue beside white": [("ellipse", LEFT, (0, 0, 36)), ("ellipse", RIGHT, WHITE)],
    "dark grey beside white": [("ellipse", LEFT, (35, 35, 35)), ("ellipse", RIGHT, WHITE)],
    "dark red beside yellow": [("ellipse", LEFT, (30, 0, 0)), ("ellipse", RIGHT, (255, 255, 0))],
    "a small green beside red": [("ellipse", LEFT, RED), ("rectangle", SMALL, (0, 255, 0))],
    "a small green in red": [("ellipse", RIGHT, RED), ("rectangle", SMALL, (0, 255, 0))],
    "a small grey beside white": [("ellipse", LEFT, WHITE), ("rectangle", SMALL, (128, 128, 128))],
    "a trimap": [("ellipse", LEFT, (128, 128, 128)), ("ellipse", (18, 38, 62, 82), WHITE)],
    "a trimap of a square": [("rectangle", LEFT, (100, 100, 100)), ("rectangle", (16, 36, 64, 84), WHITE)],
}


@pytest.mark.parametrize("kind", SECOND_COLOURS)
def test_a_second_colour_is_never_dropped(kind):
    picture = board(*SECOND_COLOURS[kind])
    for one in (picture, softened(picture), picture.convert("P", palette=Image.Palette.ADAPTIVE)):
        with pytest.raises(InputError, match="several colours"):
            read_mask(one, (120, 160))


def test_a_narrow_shade_along_the_object_is_its_edge():
    for width, color in ((1, (128, 128, 128)), (2, (90, 90, 90)), (3, (200, 200, 200))):
        inner = tuple(place + sign * width for place, sign in zip(LEFT, (1, 1, -1, -1), strict=True))
        picture = board(("rectangle", LEFT, color), ("rectangle", inner, WHITE))
        expected = np.asarray(picture)[..., 0] > 127
        assert np.array_equal(read_mask(picture, (120, 160)) == 1, expected), width
        assert np.array_equal(read_mask(picture.convert("L"), (120, 160)) == 1, expected), width


def test_a_mask_with_a_transparent_margin_is_no_layer():
    soft = board(("ellipse", LEFT, WHITE)).filter(ImageFilter.GaussianBlur(3))
    margin = np.zeros((120, 160), np.uint8)
    margin[8:-8, 8:-8] = 255
    for picture in (soft, saved(soft, "JPEG"), board(("ellipse", LEFT, RED)), softened(board(("ellipse", LEFT, RED)))):
        with pytest.raises(InputError, match="either may be the background"):
            read_mask(with_alpha(picture, margin), (120, 160))
    shades = np.linspace(60, 255, 160).astype(np.uint8)[None].repeat(120, 0)  # a cut-out that has little black
    shades[40:44, 40:60] = 0
    labels = read_mask(with_alpha(Image.fromarray(shades), margin), (120, 160))
    assert np.array_equal(labels == 1, margin > 0)


def test_a_layer_of_nothing_is_empty():
    for picture in (
        with_alpha(in_colors(DISC, (0, 0, 0), RED), 0),
        saved(Image.new("L", (80, 60)), "PNG", transparency=0),
    ):
        with pytest.raises(InputError, match="empty"):
            read_mask(picture, SIZE)


# ------------------------------------------------------------------------------------------------ label maps

FRAMED = np.where(DISC, 8, 0).astype(np.uint8)
FRAMED[:3] = FRAMED[:, :3] = IGNORE
VOC = plot.label_image(FRAMED)
LABEL_MAPS = {
    "P": VOC,
    "P, 0 transparent": saved(VOC, "PNG", transparency=0),
    "RGB": VOC.convert("RGB"),
    "RGBA": VOC.convert("RGBA"),
    "other numbers": VOC.convert("RGB").quantize(3),
    "GIF": saved(VOC, "GIF"),
    "L": Image.fromarray(FRAMED),
    "I;16": Image.fromarray(FRAMED.astype(np.uint16)),
    "F": Image.fromarray(FRAMED.astype(np.float32)),
}


@pytest.mark.parametrize("way", LABEL_MAPS)
def test_the_border_of_a_label_map_is_left_out(way):
    expected = np.where(FRAMED == 8, 1, FRAMED)
    assert np.array_equal(read_mask(LABEL_MAPS[way], SIZE), expected)


def test_a_label_map_as_jpeg_is_refused():
    with pytest.raises(InputError, match="several colours"):
        read_mask(saved(VOC.convert("RGB"), "JPEG"), SIZE)


def test_several_classes_by_number_or_by_vocs_colours():
    labels = TWO.copy()
    labels[0] = IGNORE
    voc = plot.label_image(labels)
    for picture in (voc, Image.fromarray(labels), voc.convert("RGB"), Image.fromarray(labels.astype(np.int32))):
        assert np.array_equal(read_mask(picture, SIZE, classes=2), labels)
    green_first = in_colors(TWO, (0, 0, 0), (0, 128, 0), (128, 0, 0)).quantize(3)
    for picture, part in (
        (saved(voc.convert("RGB"), "JPEG"), "JPEG changes the labels"),
        (in_colors(TWO, (0, 0, 0), (255, 0, 0), (0, 0, 255)), "of 2 classes has numbers"),
        (in_colors(TWO, (9, 9, 9), (0, 0, 0), (0, 0, 255)).quantize(3), "black at another number|of 2 classes"),
    ):
        with pytest.raises(InputError, match=part):
            read_mask(picture, SIZE, classes=2)
    if not np.array_equal(np.asarray(green_first), np.select([TWO == 1, TWO == 2], [2, 1], 0)):
        with pytest.raises(InputError, match="numbers"):
            read_mask(green_first, SIZE, classes=2)


def test_labelmes_outlines_are_refused_for_what_they_are(tmp_path):
    (tmp_path / "cat.json").write_text('{"shapes": []}')
    with pytest.raises(InputError, match="outlines, as labelme writes them"):
        read_mask(tmp_path / "cat.json", SIZE)


@pytest.mark.parametrize("label", [21, 37, 128, 182])
def test_a_ring_of_255_around_a_grey_label_is_left_out(label):
    picture = board(("ellipse", (20, 20, 100, 100), WHITE), ("ellipse", (24, 24, 96, 96), (label,) * 3))
    grey = np.asarray(picture.convert("L"))
    expected = np.select([grey == label, grey == IGNORE], [1, IGNORE], 0)
    for one in (picture.convert("L"), picture, Image.fromarray(grey.astype(np.uint16))):
        assert np.array_equal(read_mask(one, (120, 160)), expected)


def test_numbers_that_a_palette_has_no_colour_for_are_labels():
    for colors in ([0, 0, 0, 128, 0, 0], [0, 0, 0, 255, 255, 255], [255, 0, 0, 0, 255, 0], []):
        picture = Image.fromarray(TWO)
        picture.putpalette(colors)
        if picture.mode == "P":
            assert np.array_equal(read_mask(picture, SIZE, classes=2), TWO), colors
            with pytest.raises(InputError, match=r"several labels \(1, 2\)"):
                read_mask(picture, SIZE)
    framed = Image.fromarray(FRAMED)
    framed.putpalette(plot.VOC_PALETTE[: 3 * 9])
    assert np.array_equal(read_mask(framed, SIZE), np.where(FRAMED == 8, 1, FRAMED))
    assert np.array_equal(read_mask(framed, SIZE, classes=8), FRAMED)
    black_is_one = Image.fromarray(TWO)
    black_is_one.putpalette([9, 9, 9, 0, 0, 0])
    with pytest.raises(InputError, match="black at another number"):
        read_mask(black_is_one, SIZE, classes=2)
