"""Procedural backgrounds: `paint(name, size, rng)` gives float32 [size, size, 3] in 0..255."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

Painter = Callable[[int, np.random.Generator], np.ndarray]


def _resize(field: np.ndarray, size: int) -> np.ndarray:
    """float [h, w] to float32 [size, size], bicubic."""
    return np.asarray(Image.fromarray(field.astype(np.float32)).resize((size, size), Image.BICUBIC))


def _noise(size: int, rng: np.random.Generator, cells: tuple[int, int], octaves: int = 2) -> np.ndarray:
    """Smooth noise about 0 with deviation near 1; `cells` = rows, columns of the coarsest grid."""
    rows, columns = cells
    field = np.zeros((size, size), np.float32)
    for octave in range(octaves):
        grid = rng.standard_normal((min(rows << octave, size), min(columns << octave, size)))
        field += _resize(grid, size) * 0.6**octave
    return field


def _mix(first, second, share: np.ndarray) -> np.ndarray:
    """Two colours (or pictures [S, S, 3], 0 to 255) by a share [S, S] of the second, cut to 0 to 1: float32 [S, S,
    3].
    """
    share = np.clip(share, 0, 1)[..., None]
    return np.asarray(first, np.float32) * (1 - share) + np.asarray(second, np.float32) * share


def _rows(size: int) -> np.ndarray:
    """float32 [size, size] that goes from 0 in the first row to 1 in the last."""
    return np.broadcast_to(np.linspace(0, 1, size, dtype=np.float32)[:, None], (size, size))


def _texture(first, second, cells, octaves=2, sharpness=0.35) -> Painter:
    return lambda size, rng: _mix(first, second, 0.5 + sharpness * _noise(size, rng, cells, octaves))


def _horizon(size: int, rng: np.random.Generator, low=0.3, high=0.55, rough=0.0) -> np.ndarray:
    """1 below a horizon, 0 above it."""
    level = rng.uniform(low, high) + rough * _noise(size, rng, (1, 5))[size // 2][None, :]
    return np.clip((_rows(size) - level) * size / 2, 0, 1)


def _sky(size, rng):
    clouds = np.clip(_noise(size, rng, (5, 3), 3) - 0.3, 0, 1)
    return _mix(_mix((84, 160, 232), (182, 218, 246), _rows(size)), (250, 250, 252), clouds)


def _over(painter_above: Painter, painter_below: Painter, **horizon) -> Painter:
    def paint(size, rng):
        below = _horizon(size, rng, **horizon)[..., None]
        return painter_above(size, rng) * (1 - below) + painter_below(size, rng) * below

    return paint


def _road(size, rng):
    asphalt = _texture((98, 100, 106), (118, 120, 126), (16, 16), 2)(size, rng)
    line = rng.uniform(0.55, 0.8)
    dashes = (np.abs(_rows(size) - line) < 0.018) & ((_rows(size).T * 5 + rng.uniform()) % 1 < 0.55)
    return _mix(asphalt, (238, 232, 205), dashes.astype(np.float32))


def _haze(size, _rng):
    return _mix((160, 206, 240), (214, 234, 246), _rows(size))


def _night(size, rng):
    sky = _mix((10, 14, 44), (34, 38, 86), _rows(size) + 0.15 * _noise(size, rng, (3, 3)))
    return _mix(sky, (250, 246, 214), (rng.random((size, size)) > 0.997).astype(np.float32) * rng.uniform(0.6, 1))


def _bricks(size, rng):
    rows = int(rng.integers(9, 13))
    y, x = _rows(size) * rows, _rows(size).T * rows / 2
    course = np.floor(y)
    x = x + (course % 2) * 0.5
    mortar = ((y % 1) < 0.14) | ((x % 1) < 0.07)
    tone = rng.random((rows + 1, rows + 2))[course.astype(int).clip(0, rows), np.floor(x).astype(int).clip(0, rows + 1)]
    return _mix(_mix((150, 62, 46), (190, 92, 66), tone), (186, 140, 120), mortar.astype(np.float32))


def _planks(size, rng):
    boards = int(rng.integers(6, 9))
    y = _rows(size) * boards
    tone = rng.random(boards + 1)[np.floor(y).astype(int)] * 0.6 + 0.2 * _noise(size, rng, (30, 3))
    return _mix(_mix((150, 100, 58), (196, 146, 92), tone), (92, 58, 32), ((y % 1) < 0.06).astype(np.float32))


def _tiles(size, rng):
    count = int(rng.integers(5, 8))
    y, x = _rows(size) * count, _rows(size).T * count
    dark = ((np.floor(y) + np.floor(x)) % 2).astype(np.float32)
    grout = ((y % 1) < 0.06) | ((x % 1) < 0.06)
    return _mix(_mix((226, 230, 232), (190, 206, 212), dark), (168, 178, 184), grout.astype(np.float32))


def _forest(size, rng):
    leaves = _texture((28, 74, 40), (52, 104, 52), (7, 7), 2)(size, rng)
    columns = np.clip(_noise(size, rng, (1, 14), 1) - 0.7, 0, 1) * 2
    return _mix(leaves, (78, 54, 36), columns * 0.8)


def _mountains(size, rng):
    peaks = _horizon(size, rng, 0.3, 0.5, rough=0.12)
    rock = _mix((206, 214, 226), (112, 116, 132), (_rows(size) - 0.25) * 3 + 0.2 * _noise(size, rng, (6, 6)))
    return _sky(size, rng) * (1 - peaks[..., None]) + rock * peaks[..., None]


def _sunset(size, rng):
    glow = _mix((96, 58, 132), (252, 150, 72), _rows(size) * 1.3 + 0.12 * _noise(size, rng, (6, 2)))
    return _mix(glow, (60, 40, 74), _horizon(size, rng, 0.72, 0.88))


_grass = _texture((84, 150, 58), (116, 178, 74), (14, 14), 2)
_sand = _texture((222, 192, 138), (242, 218, 170), (16, 8), 3)
_snow = _texture((226, 234, 244), (250, 252, 255), (6, 6), 3)
_field = _texture((212, 178, 66), (238, 212, 112), (6, 30), 2)
_carpet = _texture((150, 40, 62), (176, 62, 82), (30, 30), 1)
_wall = _texture((214, 206, 190), (226, 220, 208), (3, 3), 2)
_water = _texture((20, 92, 150), (58, 150, 196), (20, 4), 2)

# name -> (how a caption says it, painter)
BACKGROUNDS: dict[str, tuple[str, Painter]] = {
    "grass": ("on grass", _over(_sky, _grass, low=-0.2, high=0.4)),
    "sea": ("in the sea", _over(_haze, _water, low=0.05, high=0.3)),
    "sky": ("in the sky", _sky),
    "road": ("on a road", _over(_haze, _road, low=0.05, high=0.35)),
    "sand": ("on sand", _over(_haze, _sand, low=-0.2, high=0.35)),
    "snow": ("in snow", _over(_sky, _snow, low=0.05, high=0.4)),
    "night": ("at night", _night),
    "brick wall": ("against a brick wall", _bricks),
    "wood floor": ("on a wood floor", _planks),
    "tiles": ("on tiles", _tiles),
    "forest": ("in a forest", _forest),
    "mountains": ("in the mountains", _mountains),
    "sunset": ("at sunset", _sunset),
    "field": ("in a field", _over(_sky, _field, low=0.1, high=0.45)),
    "carpet": ("on a carpet", _over(_wall, _carpet, low=0.2, high=0.55)),
}


def paint(name: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """The named background, float32 [size, size, 3] in 0..255, with its light varied."""
    canvas = BACKGROUNDS[name][1](size, rng)
    return np.clip(canvas * rng.uniform(0.85, 1.1) + rng.normal(0, 4, 3), 0, 255).astype(np.float32)
