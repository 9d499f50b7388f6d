"""The painted layers of the canvas: kept as they came, bounded, and decoded one by one where they are needed.

The browser sends them in pieces. Gradio would keep pieces without bound, and decode all of them, the picture beneath
included, before any handler is asked.
"""

from __future__ import annotations

import io
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ovam_core.errors import InputError

MAX_LAYERS = 4  # the page paints on one
MAX_LAYER_BYTES = 4 << 20  # of a layer's file
MAX_LAYER_PIXELS = 4 << 20  # the canvas has a quarter of it at most
MAX_KEPT_BYTES = 64 << 20  # of the pieces of all visitors that no event has asked for yet
MAX_KEPT = 256  # canvases that they are of
FORMATS = ("PNG", "WEBP", "JPEG")

Layer = bytes | str | Image.Image  # a file's content, its path, or the picture itself

TOO_MANY = f"The canvas has more than {MAX_LAYERS} layers; paint on one."
TOO_LARGE = f"A layer of the canvas is larger than {MAX_LAYER_BYTES >> 20} MB; paint less, or upload a mask."


class Pieces:
    """The layers that browsers have sent, by visitor and id of the canvas, until an event asks for them; the oldest go
    first. Thread safe. kept: bytes of all of them.
    """

    def __init__(self, nbytes: int = MAX_KEPT_BYTES, canvases: int = MAX_KEPT):
        self.nbytes, self.canvases, self.kept = nbytes, canvases, 0
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, str], dict[int, bytes]] = OrderedDict()

    def put(self, visitor: str, canvas: str, index: int, layer: bytes) -> None:
        """Keeps a layer. Raises InputError for one that cannot be of the page's canvas."""
        if not 0 <= index < MAX_LAYERS:
            raise InputError(TOO_MANY)
        if len(layer) > MAX_LAYER_BYTES:
            raise InputError(TOO_LARGE)
        with self._lock:
            layers = self._kept.setdefault((visitor, canvas), {})
            self.kept += len(layer) - len(layers.get(index, b""))
            layers[index] = layer
            self._kept.move_to_end((visitor, canvas))
            while len(self._kept) > 1 and (len(self._kept) > self.canvases or self.kept > self.nbytes):
                self._pop(next(iter(self._kept)))

    def take(self, visitor: str, canvas: str) -> list[bytes]:
        """The layers from the lowest up; they are kept no longer."""
        with self._lock:
            layers = self._pop((visitor, canvas))
        return [layers[index] for index in sorted(layers)]

    def drop(self, visitor: str) -> None:
        """Forgets all that a visitor sent."""
        with self._lock:
            for key in [key for key in self._kept if key[0] == visitor]:
                self._pop(key)

    def _pop(self, key: tuple[str, str]) -> dict[int, bytes]:
        layers = self._kept.pop(key, {})
        self.kept -= sum(map(len, layers.values()))
        return layers


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
