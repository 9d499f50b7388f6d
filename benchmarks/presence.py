"""Is a word in the picture at all? `python -m benchmarks.presence` prints Markdown and writes it with JSON.

* Pictures of two classes each ("A photograph of a cat and a bus"). What is really drawn is the annotator's word: a
  class is present where it covers 1 % of the picture at least, absent below 0.2 %, left out between the two.
* Asked are the model's 20 classes, common nouns that it does not know, and other names of what is present (kitten,
  animal). Present words against absent ones: area under the ROC curve, the chance that the present one scores higher.
* The constants are fitted on development pictures and all is measured on others; the interval is a 95 % bootstrap over
  pictures.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.written import write
from ovam_core.attention.heatmap import attribute
from ovam_core.attention.presence import settled
from ovam_core.attention.recording import Recording
from ovam_core.data.metrics import table
from ovam_core.models.load import embedded_folder
from ovam_core.models.presets import EMBEDDED, recommended_part
from ovam_core.ovam import OVAM
from ovam_core.presence import PresenceScorer
from ovam_core.query import Query, caption_of, token_query, word_queries
from ovam_core.tokens import folder_for, library
from training import annotator
from training.annotated import generations
from training.nouns import VOC_CLASSES, VOC_NOUNS

SHOWN, GONE = 0.01, 0.002  # shares of the picture: present from the one on, absent below the other
UNKNOWN = tuple("banana elephant guitar pizza laptop umbrella castle rocket clock tiger spoon tower".split())
SEEDS = {"development": 20_000, "test": 30_000}
DRAWS = 1000  # of the bootstrap
REPEATS = 15  # of the timing

Annotate = Callable[[Sequence[Image.Image]], np.ndarray]  # images to label maps uint8 [N, H, W]
Score = Callable[[Recording, Sequence[Query], str], list[float]]


@dataclass(frozen=True)
class Asked:
    """A word or token of a picture. kind: present, absent, asked (in the prompt and not drawn), unknown, synonym or
    hypernym (of what is present), or the first three of a token; scores: by name of the candidate.
    """

    picture: int
    kind: str
    scores: dict[str, float]


# ------------------------------------------------------------------------------------------------ candidates


def of_level(recording: Recording, queries: Sequence[Query], _caption: str, tau: float = 0.36) -> list[float]:
    """The mean of each map within its mask: how high it is."""
    maps = attribute(recording, [query.attribution for query in queries]).flatten(1)
    return [float(one[one >= tau * one.max()].mean()) for one in maps]


def of_contrast(recording: Recording, queries: Sequence[Query], _caption: str, tau: float = 0.36) -> list[float]:
    """The same less the mean outside of it."""
    maps = attribute(recording, [query.attribution for query in queries]).flatten(1)
    inside = [one >= tau * one.max() for one in maps]
    return [
        float(one[own].mean() - (one[~own].mean() if bool((~own).any()) else 0))
        for one, own in zip(maps, inside, strict=True)
    ]


def of_agreement(recording: Recording, queries: Sequence[Query], _caption: str) -> list[float]:
    """How alike the maps of the first and the last half of the steps are: their correlation."""
    steps, half = recording.step_indices, len(recording.step_indices) // 2
    halves = [recording.select(steps=part) if part else recording for part in (steps[:half], steps[half:])]
    prompts = [query.attribution for query in queries]
    first, second = (attribute(one, prompts).flatten(1).numpy() for one in halves)
    return [float(np.corrcoef(a, b)[0, 1]) for a, b in zip(first, second, strict=True)]


def by_rivals(scorer: PresenceScorer) -> Score:
    """The score that `segment` gives, before it is calibrated."""

    def score(recording: Recording, queries: Sequence[Query], caption: str) -> list[float]:
        return [x for x in scorer.raw(lambda _branch: recording, queries, caption) if x is not None]

    return score


CHOSEN, WITHOUT = "against the caption and scenery, last steps", "the same, caption unknown"


def candidates(ovam: OVAM) -> dict[str, Score]:
    chosen = by_rivals(ovam.presence)
    return {
        CHOSEN: chosen,
        WITHOUT: lambda recording, queries, _caption: chosen(recording, queries, ""),
        "level of the map in its mask": of_level,
        "contrast inside and outside": of_contrast,
        "contrast, last steps": lambda recording, queries, caption: of_contrast(settled(recording), queries, caption),
        "agreement over steps": of_agreement,
    }


# ------------------------------------------------------------------------------------------------ pictures


def planned(part: str, count: int) -> list[tuple[int, tuple[str, str]]]:
    """Seeds and the two classes of each picture, the same ones for the same numbers."""
    rng = np.random.default_rng(SEEDS[part])
    return [(SEEDS[part] + n, tuple(map(str, rng.choice(VOC_CLASSES, 2, replace=False)))) for n in range(count)]


def kinds_of(labels: np.ndarray, two: Sequence[str]) -> dict[str, str]:
    """What each word is in a picture of this label map uint8 [H, W]; without those that are neither there nor gone."""
    covered = {name: float((labels == number).mean()) for number, name in enumerate(VOC_CLASSES, start=1)}
    kinds = {name: "present" for name, share in covered.items() if share >= SHOWN}
    kinds |= {name: "asked" if name in two else "absent" for name, share in covered.items() if share < GONE}
    kinds |= dict.fromkeys(UNKNOWN, "unknown")
    for noun in VOC_NOUNS:
        if kinds.get(noun.name) == "present":
            kinds |= dict.fromkeys(noun.synonyms, "synonym") | dict.fromkeys(noun.hypernyms, "hypernym")
    return kinds


def ask(
    ovam: OVAM, annotate: Annotate, part: str, count: int, tokens: dict[str, Query], batch: int
) -> Iterator[tuple[Asked, Recording]]:
    """Every word and token of every picture, with its scores."""
    rows, scores = planned(part, count), candidates(ovam)
    prompts = [caption_of(two) for _, two in rows]
    words: dict[str, Query] = {}
    made = generations(ovam.pipe, prompts, [seed for seed, _ in rows], batch=batch)
    for number, ((_, two), prompt, (image, whole)) in enumerate(zip(rows, prompts, made, strict=True)):
        recording = recommended_part(ovam.pipe, whole)
        kinds = kinds_of(annotate([image])[0], two)
        new = [word for word in kinds if word not in words]
        words |= {word: word_queries(ovam.pipe, [word])[0] for word in new}
        asked = [(kind, words[word]) for word, kind in kinds.items()]
        asked += [(f"token {kinds[name]}", query) for name, query in tokens.items() if name in kinds]
        found = {name: score(recording, [query for _, query in asked], prompt) for name, score in scores.items()}
        for place, (kind, _) in enumerate(asked):
            yield Asked(number, kind, {name: values[place] for name, values in found.items()}), recording
        sys.stderr.write(f"\r{part}: {number + 1} of {count}   ")
    sys.stderr.write("\n")


# ------------------------------------------------------------------------------------------------ figures


def area(present: Sequence[float], absent: Sequence[float]) -> float:
    """Under the ROC curve; NaN where one of them is empty."""
    if not len(present) or not len(absent):
        return math.nan
    ordered = np.sort(absent)
    below, up_to = (np.searchsorted(ordered, present, side) for side in ("left", "right"))
    return float((below + up_to).mean() / 2 / len(ordered))


def area_of(
    asked: Sequence[Asked], name: str, present: Sequence[str], absent: Sequence[str]
) -> tuple[float, float, float]:
    """The area and its interval, drawn anew by pictures."""
    pictures = sorted({one.picture for one in asked})
    groups = {
        number: tuple(
            [one.scores[name] for one in asked if one.picture == number and one.kind in kinds]
            for kinds in (present, absent)
        )
        for number in pictures
    }
    rng = np.random.default_rng(0)

    def of(chosen: Sequence[int]) -> float:
        return area(*(np.array([x for number in chosen for x in groups[number][side]]) for side in (0, 1)))

    drawn = [of(rng.choice(pictures, len(pictures))) for _ in range(DRAWS)]
    low, high = np.nanquantile(drawn, [0.025, 0.975]) if np.isfinite(drawn).any() else (math.nan, math.nan)
    return of(pictures), float(low), float(high)


def fitted(asked: Sequence[Asked], name: str) -> tuple[float, float]:
    """Slope and offset of `calibrated`: a logistic regression, present words and absent ones counting alike."""
    rows = [one for one in asked if one.kind in ("present", *ABSENT)]
    truth = torch.tensor([one.kind == "present" for one in rows], dtype=torch.float64)
    raw = torch.tensor([min(max(one.scores[name], 1e-6), 1 - 1e-6) for one in rows], dtype=torch.float64)
    weights = torch.where(truth > 0, 0.5 / truth.sum(), 0.5 / (1 - truth).sum())
    odds, line = torch.logit(raw), torch.zeros(2, dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([line], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        search.zero_grad()
        error = torch.nn.functional.binary_cross_entropy_with_logits(
            line[0] * odds + line[1], truth, weights, reduction="sum"
        )
        total = error + 1e-4 * line[0] ** 2  # else a perfect separation has no end
        total.backward()
        return total

    search.step(loss)
    slope, offset = line.detach().tolist()
    return slope, offset


ABSENT = ("absent", "asked", "unknown")
COLUMNS = {
    "all absent words": (("present",), ABSENT),
    "classes not drawn": (("present",), ("absent", "asked")),
    "asked, not drawn": (("present",), ("asked",)),
    "words of no class": (("present",), ("unknown",)),
    "synonyms": (("synonym",), ("absent", "asked")),
    "hypernyms": (("hypernym",), ("absent", "asked")),
    "tokens": (("token present",), ("token absent", "token asked")),
}


def cost(ovam: OVAM, recording: Recording) -> dict[str, float]:
    """Milliseconds of two words' maps and of their scores, the median of turns; ratio: the second over the first."""
    queries = word_queries(ovam.pipe, ["cat", "bus"])
    caption, times = caption_of(["cat", "bus"]), np.zeros((2, REPEATS))
    work = (
        lambda: attribute(recording, [query.attribution for query in queries]),
        lambda: ovam.presence.scores(lambda _branch: recording, queries, caption),
    )
    for repeat in range(REPEATS):
        for row, do in enumerate(work):
            begun = time.perf_counter()
            do()
            times[row, repeat] = time.perf_counter() - begun
    maps, presence = np.median(times[:, 1:], axis=1) * 1000
    return {"maps": float(maps), "presence": float(presence), "ratio": float(presence / maps)}


def right_at_a_half(asked: Sequence[Asked], name: str, slope: float, offset: float) -> dict[str, float]:
    """Shares of present and of absent words that the calibrated score of a half puts on their side."""
    cut = 1 / (1 + math.exp(offset / slope))  # the raw score at which it is a half
    sides = {"present": ("present",), "absent": ABSENT}
    scores = {side: np.array([one.scores[name] for one in asked if one.kind in kinds]) for side, kinds in sides.items()}
    return {"present": float((scores["present"] >= cut).mean()), "absent": float((scores["absent"] < cut).mean())}


def report(figures: dict[str, Any]) -> str:
    """Markdown."""
    rows = [
        [name, *(_cell(row[column]) for column in COLUMNS)]
        for name, row in sorted(figures["candidates"].items(), key=lambda one: -one[1]["all absent words"][0])
    ]
    slope, offset = figures["presence"]
    counts = ", ".join(f"{count} {kind}" for kind, count in figures["counts"].items())
    sides, spent = figures["at_a_half"], figures["cost"]
    return (
        f"Presence, {figures['test']} pictures of two classes (constants of {figures['development']} others): area "
        f"under the ROC curve, present words against\n\n{table(['score', *COLUMNS], rows)}\n\n"
        f"Words: {counts}.\n\n"
        f"Preset: `presence=({slope:.2f}, {offset:.2f})`. Cut at a half it keeps {sides['present']:.1%} of the present "
        f"words and refuses {sides['absent']:.1%} of the absent ones.\n\n"
        f"Cost: {spent['presence']:.1f} ms beside {spent['maps']:.1f} ms of two words' maps, {spent['ratio']:.2f} of "
        "them.\n"
    )


def _cell(value: Sequence[float]) -> str:
    middle, low, high = value
    return "" if math.isnan(middle) else f"{middle:.3f} ({low:.3f} to {high:.3f})"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.presence", description=__doc__.splitlines()[0])
    parser.add_argument("--development", type=int, default=40, help="pictures that the constants are fitted on")
    parser.add_argument("--test", type=int, default=60, help="pictures that the table is of")
    parser.add_argument("--tokens", type=Path, default=folder_for(EMBEDDED))
    parser.add_argument("--batch", type=int, default=4, help="images made together")
    parser.add_argument("--out", type=Path, default=Path("outputs/presence"), help="for presence.md and presence.json")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None, annotate: Annotate | None = None, ovam: OVAM | None = None) -> int:
    """annotate: default the trained annotator. ovam: default the embedded model."""
    options = parse(arguments)
    ovam = ovam or OVAM.from_pretrained(EMBEDDED, "cpu")
    annotate = annotate or partial(annotator.annotate, annotator.load())
    tokens = {name: token_query(ovam.pipe, token) for name, token in library(EMBEDDED, options.tokens).items()}
    parts, recording = {}, None
    for part in SEEDS:
        found = list(ask(ovam, annotate, part, getattr(options, part), tokens, options.batch))
        parts[part], recording = [one for one, _ in found], found[-1][1]
    assert recording is not None
    measured = parts["test"]
    line = fitted(parts["development"], CHOSEN)
    kinds = sorted({one.kind for one in measured})
    figures: dict[str, Any] = {
        "model": EMBEDDED,
        "weights": embedded_folder().name,
        "development": options.development,
        "test": options.test,
        "counts": {kind: sum(one.kind == kind for one in measured) for kind in kinds},
        "candidates": {
            name: {column: area_of(measured, name, *sides) for column, sides in COLUMNS.items()}
            for name in measured[0].scores
        },
        "presence": line,
        "at_a_half": right_at_a_half(measured, CHOSEN, *line),
        "cost": cost(ovam, recording),
    }
    write(options.out, "presence", figures, report(figures))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
