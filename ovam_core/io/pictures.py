"""Pictures of strangers, in whatever format and mode they come: opened with care, and read as photographs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps

from ovam_core.errors import InputError

MAX_PIXELS = 64_000_000  # of a picture that is decoded

# How a HEIC file begins, after its first four bytes: what telephones make, and what Pillow reads with a plug-in alone.
HEIC = tuple(b"ftyp" + brand for brand in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"))

DEPTHS = (8, 10, 12, 14, 16)  # bits that a camera gives a value; files keep them in 16


@contextmanager
def open_picture(
    source: Image.Image | str | Path,
    unreadable: str,
    *,
    missing: str | None = None,
    too_large: str | None = None,
    broken: str | None = None,
) -> Iterator[Image.Image]:
    """A picture or its file, decoded; of several frames or pages the first. A file is closed at the end of the block; a
    picture that was given stays open.

    Raises InputError with one of these sentences: unreadable, for what is no picture; missing, for no such file;
    too_large, for more than MAX_PIXELS, which the header tells before anything is decoded (its `{size}` is filled in);
    broken, for a picture that is not whole. Those that are not given are `unreadable`.
    """
    with _head(source, unreadable, missing or unreadable, too_large or unreadable) as picture:
        if picture.width * picture.height > MAX_PIXELS:
            raise InputError(_sized(too_large or unreadable, f"{picture.width}x{picture.height}"))
        try:
            picture.load()
        except Exception:  # a decoder fails in whatever way a broken file makes it
            raise InputError(broken or unreadable) from None
        yield picture


def _head(
    source: Image.Image | str | Path, unreadable: str, missing: str, too_large: str
) -> AbstractContextManager[Image.Image]:
    if isinstance(source, Image.Image):
        return nullcontext(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS is lower
            return Image.open(source)
    except FileNotFoundError:
        raise InputError(missing) from None
    except Image.DecompressionBombError:  # before its size is known here
        raise InputError(_sized(too_large, f"of more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels")) from None
    except (OSError, ValueError, SyntaxError):
        if _is_heic(source):
            return _heic(source, unreadable)
        raise InputError(unreadable) from None


def _is_heic(source: str | Path) -> bool:
    with suppress(OSError, ValueError), open(source, "rb") as file:
        return file.read(12)[4:] in HEIC
    return False


def _heic(source: str | Path, unreadable: str) -> Image.Image:
    try:
        import pillow_heif
    except ImportError:
        raise InputError(
            f"'{Path(source).name}' is a HEIC picture; save it as JPEG or PNG, or install what reads it: "
            "pip install pillow-heif."
        ) from None
    pillow_heif.register_heif_opener()
    try:
        return Image.open(source)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise InputError(unreadable) from None


def _sized(sentence: str, size: str) -> str:
    return sentence.replace("{size}", size)  # not `format`: a file's name may hold braces


def read_photo(source: Image.Image | str | Path) -> Image.Image:
    """A picture or its file, upright by its EXIF orientation, RGB, at its own size; what is transparent lies on white.

    Raises InputError for what is no whole picture and for more than MAX_PIXELS.
    """
    broken = "The picture is not whole, or of a kind that cannot be read; save it again as JPEG or PNG."
    name = "" if isinstance(source, Image.Image) else Path(source).name
    with open_picture(
        source,
        f"'{name}' is not a picture that can be read; give a JPEG or a PNG.",
        missing=f"There is no picture '{source}'.",
        too_large=f"The picture is {{size}}; at most {MAX_PIXELS:,} pixels are taken, make it smaller.",
        broken=broken,
    ) as picture:
        try:
            return as_rgb(upright(picture))
        except InputError:
            raise
        except Exception:  # as broken EXIF data, or a mode without a way to RGB, make it
            raise InputError(broken) from None


def upright(picture: Image.Image) -> Image.Image:
    """The picture as its EXIF orientation wants it seen; it may be the same object."""
    return ImageOps.exif_transpose(picture) if picture.getexif().get(0x0112, 1) != 1 else picture


def as_rgb(picture: Image.Image) -> Image.Image:
    """A picture of any mode as a new one of mode RGB; what is transparent lies on white.

    Values of more than 8 bits are brought to 8 by their range: whole numbers by the least of DEPTHS that holds them
    all, others from 0..1. Raises InputError for values of no such range.
    """
    if picture.mode.startswith(("I", "F")):
        return Image.fromarray(_eight_bits(np.asarray(picture))).convert("RGB")
    if picture.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        shown = ImageCms.profileToProfile(picture, lab, srgb, outputMode="RGB")
        assert shown is not None  # it is where the change is not made in place
        return shown
    if picture.mode.startswith(("La", "RGBa")):  # colours that are multiplied by their alpha
        picture = picture.convert("LA" if picture.mode == "La" else "RGBA")
    if picture.has_transparency_data:
        paper = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(paper, picture.convert("RGBA")).convert("RGB")
    plain = picture.convert("RGB")
    return plain.copy() if plain is picture else plain


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """Grey values of more than 8 bits as uint8."""
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        raise InputError("The picture holds values that are no numbers; save it again as PNG.")
    # Resampling goes a little beyond the ends.
    if low >= -0.01 and high <= 1.01 and values.dtype.kind == "f":
        top = 1.0
    else:
        whole = values.dtype.kind != "f" or bool((values == np.rint(values)).all())
        depth = next((depth for depth in DEPTHS if high < 2**depth), None)
        if low < 0 or depth is None or not (whole or 128 <= high <= 255):  # floats to 40, say, are no known range
            raise InputError(
                f"The picture's values go from {low:.6g} to {high:.6g}; what is read are whole numbers of at most 16 "
                "bits, or others from 0 to 1: save it as PNG."
            )
        top = float(2**depth - 1)
    return (values.astype(np.float32) * np.float32(255 / top)).clip(0, 255).round().astype(np.uint8)
