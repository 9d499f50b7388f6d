"""The large picture of the first tab: what was found, as JSON for assets/viewer.js, and the element it draws in.

Maps go to the page once, a byte a value, on the grid of the recording; layers, thresholds and pointing are the
browser's. Nothing here knows Gradio.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib import colormaps
from PIL import Image

from ovam_core import plot
from ovam_core.attention.heatmap import claims
from ovam_core.methods import method_named
from ovam_core.models.presets import ModelDefaults
from ovam_core.picture import Picture, Segmentation
from ovam_core.presence import UNLIKELY
from ovam_core.settings import SegmentSettings

from .render import MAX_SHOWN, shrunk

SCRIPT = (Path(__file__).parent / "assets" / "viewer.js").read_text(encoding="utf-8")
MAX_LOSSLESS = 600 * 600  # pixels of a picture that is sent without loss: the page saves it as it came
Over = Literal["steps", "grids", "layers", "heads"]
Found = Segmentation | Sequence[Segmentation]
Received = Mapping[str, np.ndarray]  # by half of the guided batch, of OVAM.received_attention


# ------------------------------------------------------------------------------------------------- encodings


def grid(values: np.ndarray) -> dict[str, Any]:
    """A map `[h, w]`, not negative, a byte a value: the value is byte / 255 * top, to within a 510th of the peak."""
    return _grid(values)[0]


def fine_grid(values: np.ndarray) -> dict[str, Any]:
    """The same with a second byte for what the first leaves, so that a cut falls where the server's does: the value is
    (byte + fine / 255 - 1 / 2) / 255 * top.
    """
    sent, left = _grid(values)
    return sent | {"fine": _text(np.rint((left + 0.5) * 255).astype(np.uint8).tobytes())}


def _grid(values: np.ndarray) -> tuple[dict[str, Any], np.ndarray]:
    """The map as it is sent, and what the bytes leave of it, in bytes, -1/2 to 1/2."""
    values = np.asarray(values, dtype=np.float64)
    top = max(float(values.max()), 0.0)
    shares = np.clip(values / top, 0, 1) * 255 if top > 0 else np.zeros_like(values)
    steps = np.rint(shares)
    height, width = values.shape
    data = _text(steps.astype(np.uint8).tobytes())
    return {"w": width, "h": height, "top": top, "data": data}, shares - steps


def mask_url(mask: np.ndarray) -> str:
    """A mask, bool `[h, w]`, as a PNG of one bit a pixel."""
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(mask, dtype=bool)).save(buffer, format="PNG", optimize=True)
    return f"data:image/png;base64,{_text(buffer.getvalue())}"


def picture_url(image: Image.Image) -> str:
    """A picture as WebP: without loss where it is small."""
    buffer = io.BytesIO()
    lossless = image.width * image.height <= MAX_LOSSLESS
    image.convert("RGB").save(buffer, format="WEBP", lossless=lossless, quality=60 if lossless else 92, method=2)
    return f"data:image/webp;base64,{_text(buffer.getvalue())}"


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


# ------------------------------------------------------------------------------------------------ to the page


def answer(
    found: Found,
    received: Received | Sequence[Received],
    preset: ModelDefaults,
    *,
    key: str,
    facts: str = "",
    stem: str = "ovam",
    token_names: Sequence[str] = (),
    with_picture: bool = True,
) -> dict[str, Any]:
    """What was found of one picture, by one method or by several; the first is that of the large picture.

    received: of each, what OVAM.received_attention gives. preset: the model's, whose tau and alpha a token's own give
    way to once they are moved. key: of the picture. stem: how its files' names begin. token_names: of the settings'
    tokens, as the page lists them; their classes by default. with_picture: False where the page has it already.
    """
    several = [found] if isinstance(found, Segmentation) else list(found)
    attention = [received] if isinstance(received, Mapping) else list(received)
    first = several[0]
    asked = first.settings
    unlikely = None if preset.presence is None else UNLIKELY  # a raw score has no such point
    columns = [_column(one, weights, token_names) for one, weights in zip(several, attention, strict=True)]
    return {
        "key": key,
        "picture": _picture(first.picture, stem, with_picture),
        "prompt": first.picture.caption,
        "facts": facts,
        "parts": _parts(asked),
        "preset": {"tau": preset.tau, "alpha": preset.alpha, "unlikely": unlikely},
        "asked": {"tau": asked.tau, "alpha": asked.alpha, "crf": asked.crf},
        "columns": columns,
    }


def unanswered(picture: Picture, preset: ModelDefaults, *, key: str, facts: str, stem: str) -> dict[str, Any]:
    """A picture whose words could not be answered: the same without columns."""
    usual = {"tau": preset.tau, "alpha": preset.alpha}
    shown = _picture(picture, stem, with_picture=True)
    about = {"prompt": picture.caption, "facts": facts, "preset": usual, "asked": usual | {"crf": False}}
    return {"key": key, "picture": shown, "columns": []} | about


def failed_column(name: str, sentence: str) -> dict[str, Any]:
    """A method that cannot answer, beside those that can: why not, in a sentence."""
    method = method_named(name)
    empty = {"live": False, "crf": False, "hasAlpha": False, "words": [], "attention": {}}
    return {"method": method.name, "about": method.about, "said": sentence} | empty


def candidates(key: str, prompt: Segmentation | None = None, classes: Segmentation | None = None) -> dict[str, Any]:
    """Words that were not asked: the prompt's others and the model's classes, which can be pointed at all the same, as
    long as they are of the same parts of the run as those that were asked.
    """
    groups = [(name, found) for name, found in (("prompt", prompt), ("classes", classes)) if found is not None]
    parts = _parts(groups[0][1].settings) if groups else ""
    return {"key": key, "parts": parts, "groups": [_group(name, found) for name, found in groups]}


def _parts(asked: SegmentSettings) -> str:
    """What of a run maps are of: its steps, grids and half."""
    return json.dumps([asked.step_indices, asked.resolutions, asked.branch])


def strip(key: str, label: str, over: Over, frames: Iterable[tuple[str, np.ndarray]]) -> dict[str, Any]:
    """A word's maps over the steps, grids, layers or heads of the run: frames of a label and a map `[h, w]` each."""
    shown = [{"label": name, "map": grid(values)} for name, values in frames]
    return {"key": key, "label": label, "over": over, "frames": shown}


def point(found: Segmentation, x: int, y: int) -> list[dict[str, Any]]:
    """Which labels claim a pixel, the first most: value of the heatmap there, and whether the mask holds it.

    Raises InputError for a point outside of the picture.
    """
    return [
        {"label": found.labels[row], "value": round(value, 4), "in_mask": bool(found.masks[row, y, x])}
        for row, value in claims(found.heatmaps, x, y)
    ]


def _picture(picture: Picture, stem: str, with_picture: bool) -> dict[str, Any]:
    width, height = screen_size(picture.image.size)
    return {
        "src": picture_url(shrunk(picture.image)) if with_picture else None,
        "width": width,
        "height": height,
        "full": list(picture.image.size),
        "alt": picture.caption or "A photograph without a caption",
        "stem": stem,
    }


def screen_size(size: tuple[int, int]) -> tuple[int, int]:
    """Width and height of the picture that is sent for one of this size; `shrunk` makes it."""
    scale = min(1.0, MAX_SHOWN / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _column(found: Segmentation, received: Received, token_names: Sequence[str]) -> dict[str, Any]:
    method = method_named(found.settings.method)
    return {
        "method": method.name,
        "about": method.about,
        "live": method.cuts_each,
        "crf": method.crf,
        "hasAlpha": method.has_alpha,
        "words": _words(found, token_names, by_server=not method.cuts_each or (method.crf and found.settings.crf)),
        "attention": {branch: fine_grid(values) for branch, values in received.items()},
    }


def _words(found: Segmentation, token_names: Sequence[str], by_server: bool) -> list[dict[str, Any]]:
    """by_server: whether the browser cannot make the masks, so that they are sent."""
    colors = plot.word_colors(found.labels)
    maps = found.heatmaps if found.grid_maps is None else found.grid_maps
    size = screen_size(found.picture.image.size)
    presence = found.presence or [None] * len(found.labels)
    rows = zip(found.labels, _asked_for(found, token_names), maps, found.peaks, presence, found.masks, strict=True)
    return [
        {
            "label": label,
            "color": colors[label],
            "peak": peak,
            "presence": None if there is None else round(there, 4),
            "map": fine_grid(values),
            "mask": mask_url(plot.resize_mask(mask, size)) if by_server else None,
        }
        | asked
        for label, asked, values, peak, there, mask in rows
    ]


def _asked_for(found: Segmentation, token_names: Sequence[str]) -> list[dict[str, Any]]:
    """As what each label was asked for: the word or token that takes it away, and what it is cut at on its own."""
    settings = found.settings
    tokens = [
        {"asked": name, "kind": "token", "branch": token.branch, "tau": token.tau, "alpha": token.alpha}
        for token, name in zip(
            settings.tokens, token_names or [" ".join(x.names) for x in settings.tokens], strict=True
        )
        for _ in token.names
    ]
    words = found.labels[: len(found.labels) - len(tokens)]
    branches = [query.branch for query in found.queries for _ in query.labels]
    # Of a sentence without words every token is a label, and none can be taken away by itself.
    named: Sequence[str | None] = settings.words or [None] * len(words)
    own = {"kind": "word", "branch": "conditional", "tau": None, "alpha": None}
    listed = [{"asked": name} | own for name, _ in zip(named, words, strict=True)] + tokens
    return [one | {"branch": branch} for one, branch in zip(listed, branches, strict=True)] if branches else listed


def _group(name: str, found: Segmentation) -> dict[str, Any]:
    maps = found.heatmaps if found.grid_maps is None else found.grid_maps
    words = [{"label": label, "map": grid(values)} for label, values in zip(found.labels, maps, strict=True)]
    return {"name": name, "words": words}


# ------------------------------------------------------------------------------------------------ the element


def skeleton() -> str:
    """The element that `ovamViewer` draws in, as HTML: empty, it says what will appear."""
    turbo = colormaps["turbo"](np.arange(256), bytes=True)[:, :3].tobytes()
    return SKELETON.replace("TURBO", _text(turbo)).replace("PALETTE", _text(bytes(plot.VOC_PALETTE)))


def _buttons(group: str, named: Mapping[str, tuple[str, str]]) -> str:
    return "".join(
        f'<button type="button" data-{group}="{name}" title="{hint}" aria-pressed="false">{label}</button>'
        for name, (label, hint) in named.items()
    )


LAYERS = {
    "heatmap": ("Heatmap", "Where the model had the word in mind"),
    "masks": ("Masks", "The outline of every word's mask"),
    "winner": ("One winner", "One word a pixel: the map that is largest beside its own peak"),
    "picture": ("Picture", "The picture alone"),
}
OVER = {
    "steps": ("Steps", "One map a denoising step"),
    "grids": ("Grids", "One map an attention grid"),
    "layers": ("Layers", "One map a layer"),
    "heads": ("Heads", "One map a head"),
}
SAVES = {
    "picture": "Picture",
    "heatmap": "Heatmap",
    "mask": "Mask",
    "cutout": "Cut-out",
    "labels": "All masks as a label map",
}

SKELETON = f"""<div class="ovam-viewer empty" data-turbo="TURBO" data-palette="PALETTE">
<div class="v-bar" data-part="bar">
<div class="v-segments" role="group" aria-label="What is shown">{_buttons("layer", LAYERS)}</div>
<label class="v-opacity" data-part="opacity-field"><span>Opacity</span>
<input type="range" min="0" max="1" step="0.01" data-part="opacity"></label>
<details class="v-menu" data-part="menu"><summary>Save</summary><div data-part="saves">
{"".join(f'<button type="button" data-save="{name}">{label}</button>' for name, label in SAVES.items())}
<small data-part="size"></small></div></details>
</div>
<div class="v-stage" data-part="stage">
<p class="v-empty">The picture will appear here, and on it where the model put each of your words.</p>
<div class="v-frame" data-part="frame">
<canvas data-part="canvas" tabindex="0" role="img" aria-label="No picture yet"></canvas>
<div class="v-busy" data-part="busy" role="status"></div>
<div class="v-card" data-part="card" hidden></div>
</div>
<div class="v-stale" role="status"><span data-part="stale"></span></div>
</div>
<div class="v-legend" data-part="legend"></div>
<div class="v-chips" data-part="chips"></div>
<p class="v-caption" data-part="caption"></p>
<div class="v-over" data-part="over"><span data-part="over-title">When it appeared</span>
<div class="v-segments small" role="group" aria-label="Maps over the run">{_buttons("over", OVER)}</div></div>
<section class="v-strip" data-part="strip" hidden></section>
<div class="v-columns" data-part="columns" hidden></div>
<div class="v-spoken" data-part="spoken" aria-live="polite"></div>
</div>"""
