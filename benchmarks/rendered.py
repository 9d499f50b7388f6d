"""The methods against exact masks: held-out rendered scenes, looked at as photographs are (one pass at t = 100).

The caption lists the objects and the place, as GoCA asks for. Each class of a scene is one mask: OVAM and DAAM cut each map
for itself, asked in the paper's prompt; GoCA gives each pixel to one word or to the place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image

from ovam_core import tokens
from ovam_core.attention.goca import Parts
from ovam_core.attention.heatmap import Attribution
from ovam_core.data.metrics import by_class, confusion, gain, interval, miou, table
from ovam_core.methods import (
    DAAM,
    GOCA,
    GOCA_ANY,
    GOCA_TOKEN,
    OVAM,
    OVAM_WEIGHTED,
    GocaMethod,
    Method,
    Seen,
    maps_and_masks,
)
from ovam_core.models.presets import defaults_for, own_choice
from ovam_core.ovam import photograph
from ovam_core.query import caption_of, words_in_sentence
from ovam_core.settings import PhotoSettings
from training import backgrounds, world
from training.figures import prompt_for
from training.nouns import VOC_NOUNS

FIRST_SCENE = world.HELD_OUT + 5_000_000
SEVERAL = (0.0, 0.6, 0.4)  # shares of scenes with 1, 2, 3 objects
BASE = "OVAM, name"


@dataclass(frozen=True)
class Row:
    """A method as it is asked: by name or by token."""

    name: str
    method: Method | GocaMethod
    by_token: bool = False


def rows_for(pipe) -> list[Row]:
    """Every method that one pass over a photograph serves, and GoCA without each of its parts.

    "own tau": the thresholds and floors that pipeline.py gives this model, in place of the papers'.
    """
    own = defaults_for(pipe)
    cuts = {"tau": own.tau, "alpha": own.alpha, "token_tau": own.token_tau, "token_alpha": own.token_alpha}
    less = {"head weights": "heads", "layer weights": "layers", "rescaling": "rescale"}
    parts = {what: Parts(**{field: False}) for what, field in less.items()}
    parts |= {
        "blur": Parts(blur=0),
        "propagation": Parts(propagations=0),
        "any of it": Parts(False, False, False, 0, 0),
    }
    return [
        Row("DAAM, name", DAAM),
        Row(BASE, OVAM),
        Row("OVAM with GoCA's weights, name", OVAM_WEIGHTED),
        Row("DAAM, token", DAAM, True),
        Row("OVAM, token", OVAM, True),
        Row("OVAM, token, own tau", replace(OVAM, **cuts), True),
        Row("GoCA + token", GOCA_TOKEN, True),
        Row("GoCA + token, own tau", replace(GOCA_TOKEN, **cuts), True),
        Row("GoCA", GOCA),
        Row("GoCA, any word", GOCA_ANY),
        *(Row(f"GoCA without {what}", replace(GOCA, parts=which)) for what, which in parts.items()),
    ]


def scenes(count: int, classes: Sequence[str]) -> Iterator[tuple[int, world.Scene]]:
    """(seed, scene) of held-out scenes with two or three objects of `classes`, at least two of which found room."""
    nouns = tuple(noun for noun in VOC_NOUNS if noun.name in classes)
    shares = np.array(SEVERAL[: len(nouns)])
    seed = FIRST_SCENE
    while count:
        made = world.scene(seed, 128, nouns, tuple(shares / shares.sum()))
        if len(made.nouns) > 1:
            count -= 1
            yield seed, made
        seed += 1


def caption_for(made: world.Scene) -> str:
    return f"{caption_of(made.nouns)} {backgrounds.BACKGROUNDS[made.background][0]}"


def masks_of(row: Row, pipe, seen: Seen, names: Sequence[str], asked: dict[str, list[Attribution]]) -> np.ndarray:
    """Bool [names, H, W]. asked: attributions of the names, by "name" and "token"."""
    if isinstance(row.method, GocaMethod):
        return maps_and_masks(row.method, pipe, seen, names).masks
    maps = row.method.maps(seen, asked["token" if row.by_token else "name"])
    return row.method.masks(row.method.select(seen.recording), maps, seen.image, row.by_token)


@torch.no_grad()
def measure(pipe, loaded: dict[str, tokens.Token], count: int) -> list[dict]:
    """The figures of every row, in percent. loaded: the token of each class that a scene may hold."""
    rows = rows_for(pipe)
    counts, classes, images = {row.name: [] for row in rows}, [], []
    for seed, made in scenes(count, list(loaded)):
        picture, names = Image.fromarray(made.image), made.nouns
        taken = photograph(pipe, picture, PhotoSettings(caption_for(made), seed=seed % 2**32), with_goca=True)
        seen = Seen(picture, own_choice(pipe, taken.recording), taken.settings.caption, taken.goca)
        asked = {
            "name": [words_in_sentence(pipe, prompt_for(name), [name]) for name in names],
            "token": [tokens.attribution(pipe, loaded[name]) for name in names],
        }
        truth = [made.labels == world.LABELS[name] for name in names]
        for row in rows:
            pairs = zip(masks_of(row, pipe, seen, names, asked), truth, strict=True)
            counts[row.name] += [confusion(mask, right) for mask, right in pairs]
        classes += names
        images += [seed] * len(names)
    return [summary(row, counts, classes, images) for row in rows]


def summary(row: Row, counts: dict[str, list], classes: Sequence[str], images: Sequence[int]) -> dict:
    own, base = np.array(counts[row.name]), np.array(counts[BASE])
    low, high = interval(own, classes, images)
    return {
        "name": row.name,
        "miou": 100 * miou(own, classes),
        "low": 100 * low,
        "high": 100 * high,
        "over": [100 * value for value in gain(base, own, classes, images)],
        "n": len(set(images)),
        "by_class": {name: 100 * value for name, value in by_class(own, classes).items()},
    }


def report(figures: Sequence[dict]) -> str:
    """The table in Markdown."""
    lines = []
    for one in figures:
        gained = "{:+.1f} ({:+.1f} to {:+.1f})".format(*one["over"])
        lines.append([one["name"], f"{one['miou']:.1f}", f"{one['low']:.1f} to {one['high']:.1f}", gained, one["n"]])
    return table(["Rendered scenes", "mIoU", "95 %", f"over {BASE}", "n"], lines)
