"""The methods against exact masks: held-out rendered scenes, looked at as photographs are (one pass at t = 100).

The caption lists the objects and the place, as GoCA asks for. Each class of a scene is one mask: OVAM and DAAM cut each
map for itself, asked in the paper's prompt; GoCA gives each pixel to one word or to the place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from ovam_core import Method, Picture, Token, methods
from ovam_core.attention.goca import GocaOptions
from ovam_core.data.metrics import by_class, confusion, gain, interval, miou, table
from ovam_core.methods import (
    DAAM,
    DATASET_DIFFUSION,
    FA_SEG,
    GOCA,
    GOCA_ANY,
    GOCA_TOKEN,
    ISEG,
    OVAM_WEIGHTED,
    Cut,
    looked_at,
)
from ovam_core.models.presets import ModelDefaults
from ovam_core.ovam import OVAM
from ovam_core.query import Query, caption_of, token_query
from ovam_core.settings import SegmentSettings
from training import backgrounds, world
from training.figures import prompt_for
from training.nouns import VOC_NOUNS

FIRST_SCENE = world.HELD_OUT + 5_000_000
SEVERAL = (0.0, 0.6, 0.4)  # shares of scenes with 1, 2, 3 objects
BASE, TUNED = "OVAM, name", "OVAM, name, own tau"
PUBLISHED = Cut()


@dataclass(frozen=True)
class Row:
    """A method, whether it is asked by token or by name, and thresholds in place of the published ones."""

    name: str
    method: Method
    by_token: bool = False
    given: Cut = PUBLISHED
    mirror: bool = False


def rows_for(preset: ModelDefaults) -> list[Row]:
    """Every method that one pass over a photograph serves, and GoCA without each of its parts.

    "own tau": the thresholds and floors of the model's preset, in place of the papers'.
    """
    own = Cut(preset.tau, preset.alpha, preset.token_tau, preset.token_alpha)
    fields = {"head weights": "heads", "layer weights": "layers", "rescaling": "rescale"}
    options = {part: GocaOptions(**{field: False}) for part, field in fields.items()}
    options |= {
        "blur": GocaOptions(blur=0),
        "propagation": GocaOptions(propagations=0),
        "the middle block": GocaOptions(names=("down_blocks", "up_blocks")),
        "even rows of S": GocaOptions(even_rows=False),
        "any of it": GocaOptions(False, False, False, 0, 0),
    }
    return [
        Row("DAAM, name", DAAM),
        Row(BASE, methods.OVAM),
        Row(TUNED, methods.OVAM, given=own),
        Row("OVAM with GoCA's weights, name", OVAM_WEIGHTED),
        Row("DAAM, token", DAAM, by_token=True),
        Row("OVAM, token", methods.OVAM, by_token=True),
        Row("OVAM, token, own tau", methods.OVAM, by_token=True, given=own),
        Row("GoCA + token", GOCA_TOKEN, by_token=True),
        Row("GoCA + token, own tau", GOCA_TOKEN, by_token=True, given=own),
        Row("GoCA", GOCA),
        Row("GoCA, any word", GOCA_ANY),
        Row("OVAM, mirror, name", methods.OVAM, mirror=True),
        Row("iSeg, name", ISEG),
        Row("FA-Seg, name", FA_SEG),
        Row("FA-Seg, mirror, name", FA_SEG, mirror=True),
        Row("Dataset Diffusion, name", DATASET_DIFFUSION),
        *(Row(f"GoCA without {part}", replace(GOCA, options=without)) for part, without in options.items()),
    ]


def scenes(count: int, classes: Sequence[str]) -> Iterator[tuple[int, world.Scene]]:
    """(seed, scene) of held-out scenes with two or three objects of `classes`, at least two of which found room."""
    nouns = tuple(noun for noun in VOC_NOUNS if noun.name in classes)
    shares = np.array(SEVERAL[: len(nouns)])
    seed = FIRST_SCENE
    while count:
        scene = world.scene(seed, 128, nouns, tuple(shares / shares.sum()))
        if len(scene.nouns) > 1:
            count -= 1
            yield seed, scene
        seed += 1


def caption_for(scene: world.Scene) -> str:
    return f"{caption_of(scene.nouns)} {backgrounds.BACKGROUNDS[scene.background][0]}"


def queries_of(row: Row, ovam: OVAM, names: Sequence[str], tokens: Mapping[str, Token]) -> list[Query]:
    """A query a name, cut as published where the row does not say otherwise: by token, or in the paper's prompt."""
    queries = []
    for name in names:
        paper = SegmentSettings(words=(name,), sentence=prompt_for(name))
        queries += [token_query(ovam.pipe, tokens[name])] if row.by_token else row.method.words(ovam.pipe, paper)
    return [row.method.cut(query, row.given, preset=None) for query in queries]


def masks_of(row: Row, ovam: OVAM, picture: Picture, queries: Sequence[Query]) -> np.ndarray:
    """Bool `[queries, H, W]`."""
    picture = replace(picture, recording=looked_at(ovam.pipe, row.method, picture.recording))
    return row.method.masks(picture, row.method.heatmaps(ovam.pipe, picture, queries), queries)


@torch.no_grad()
def measure(ovam: OVAM, tokens: Mapping[str, Token], count: int) -> list[dict[str, Any]]:
    """The figures of every row, in percent. tokens: of each class that a scene may hold."""
    rows = rows_for(ovam.preset)
    counts, classes, images = {row.name: [] for row in rows}, [], []
    for seed, scene in scenes(count, list(tokens)):
        names = scene.nouns
        image, caption = Image.fromarray(scene.image), caption_for(scene)
        pictures = {
            mirror: ovam.photograph(image, caption, seed=seed % 2**32, mirror=mirror, keep=["matrix"])
            for mirror in (False, True)
        }
        truth = [scene.labels == world.LABELS[name] for name in names]
        for row in rows:
            masks = masks_of(row, ovam, pictures[row.mirror], queries_of(row, ovam, names, tokens))
            counts[row.name] += [confusion(*pair) for pair in zip(masks, truth, strict=True)]
        classes += names
        images += [seed] * len(names)
    return [summary(row, counts, classes, images) for row in rows]


def summary(
    row: Row, counts: Mapping[str, list[np.ndarray]], classes: Sequence[str], images: Sequence[int]
) -> dict[str, Any]:
    of_row = np.array(counts[row.name])
    low, high = interval(of_row, classes, images)
    over = [[100 * x for x in gain(np.array(counts[base]), of_row, classes, images)] for base in (BASE, TUNED)]
    return {
        "name": row.name,
        "miou": 100 * miou(of_row, classes),
        "low": 100 * low,
        "high": 100 * high,
        "over": over[0],
        "over_tuned": over[1],
        "n": len(set(images)),
        "by_class": {name: 100 * value for name, value in by_class(of_row, classes).items()},
    }


def report(figures: Sequence[dict[str, Any]]) -> str:
    """The table in Markdown."""
    lines = []
    for row in figures:
        gained = ["{:+.1f} ({:+.1f} to {:+.1f})".format(*row[base]) for base in ("over", "over_tuned")]
        lines.append([row["name"], f"{row['miou']:.1f}", f"{row['low']:.1f} to {row['high']:.1f}", *gained, row["n"]])
    return table(["Rendered scenes", "mIoU", "95 %", f"over {BASE}", f"over {TUNED}", "n"], lines)
