"""Pictures of strangers, in whatever format and mode they come: opened with care, and read as photographs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ovam_core.errors import InputError

MAX_PIXELS = 64_000_000  # of a picture that is decoded


@contextmanager
def open_picture(
    source: Image.Image | str | Path,
    unreadable: str,
    *,
    missing: str | None = None,
    too_large: str | None = None,
    broken: str | None = None,
) -> Iterator[Image.Image]:
    """A picture or its file, decoded. A file is closed at the end of the block; a picture that was given stays open.

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
    except (OSError, ValueError):
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
            return _rgb(ImageOps.exif_transpose(picture))
        except Exception:  # as broken EXIF data, or a mode without a way to RGB, make it
            raise InputError(broken) from None


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
