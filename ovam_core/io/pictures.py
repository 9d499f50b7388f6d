"""TODO: what this module is."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ovam_core.errors import InputError

MAX_PIXELS = 64_000_000  # of an upload


# ------------------------------------------------------------------------------------------------ pictures


def read_photo(source: Image.Image | str | Path) -> Image.Image:
    """A picture or its file, upright by its EXIF orientation, RGB, at its own size; what is transparent lies on white.

    Raises InputError for what is no whole picture and for more than MAX_PIXELS, which the header tells before anything
    is decoded.
    """
    with _opened(source) as picture:
        if picture.width * picture.height > MAX_PIXELS:
            size = f"{picture.width}x{picture.height}"
            raise InputError(f"The picture is {size}; at most {MAX_PIXELS:,} pixels are taken, make it smaller.")
        try:
            return _rgb(ImageOps.exif_transpose(picture))
        except Exception:  # a decoder fails in whatever way a broken file makes it
            raise InputError(
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
        raise InputError(f"There is no picture '{source}'.") from None
    except Image.DecompressionBombError:
        raise InputError(f"The picture has more than {MAX_PIXELS:,} pixels; make it smaller.") from None
    except (OSError, ValueError):
        raise InputError(f"'{Path(source).name}' is not a picture that can be read; give a JPEG or a PNG.") from None


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
