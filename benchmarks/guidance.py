"""S-CFG against plain guidance: `python -m benchmarks.guidance` prints Markdown and writes it with JSON.

* The embedded model, prompts of two and of three different classes of VOC ("A photograph of a cat, a bus and a sofa"),
  each with a seed of its own, at guidance scales w of 2, 3, 5, 7.5 and 10: plain, S-CFG with GoCA, with plain averages.
* Found: of the things that were asked for, those of which the annotator finds 1 % of the picture at least, as
  training/figures.py has it.
* The same prompts and seeds for every column: differences are paired, their intervals a 95 % bootstrap over prompts.
* Cost: seconds of a run over those of a plain one, taken in turns in this process; the median of the rounds.

A run that was stopped goes on where it was: what was found in each picture is kept in --work.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.quality import Annotate, Cache, fingerprint
from benchmarks.written import write
from ovam_core.data.metrics import table
from ovam_core.hooks.guidance import guided_by_region
from ovam_core.models.load import embedded_folder
from ovam_core.models.presets import EMBEDDED
from ovam_core.ovam import OVAM
from ovam_core.query import caption_of
from ovam_core.settings import GUIDANCE_KINDS, PLAIN, S_CFG_AVERAGE
from training import annotator
from training.figures import SHOWN
from training.nouns import VOC_CLASSES

SCALES = (2.0, 3.0, 5.0, 7.5, 10.0)
COUNTS = (2, 3)  # things in a prompt
TITLES = dict(zip(GUIDANCE_KINDS, ("plain", "S-CFG, GoCA", "S-CFG, averages"), strict=True))
DRAWS = 2000
COST_STEPS = 5  # of a run that is timed


@dataclass(frozen=True)
class Asked:
    """A prompt: the classes that it asks for, and the seed of its noise."""

    names: tuple[str, ...]
    seed: int

    @property
    def key(self) -> str:
        return f"{len(self.names)}-{self.seed}"


def prompts(number: int, first_seed: int) -> list[Asked]:
    """As many prompts of each count of things, the same ones for the same numbers."""
    asked = []
    for count in COUNTS:
        rng = np.random.default_rng([first_seed, count])
        drawn = [tuple(map(str, rng.choice(VOC_CLASSES, count, replace=False))) for _ in range(number)]
        asked += [Asked(names, first_seed + at) for at, names in enumerate(drawn)]
    return asked


def images(ovam: OVAM, asked: Sequence[Asked], scale: float, steps: int) -> list[Any]:
    """One picture a prompt, made together."""
    captions = [caption_of(one.names) for one in asked]
    return ovam.run(
        prompt=captions,
        num_inference_steps=steps,
        guidance_scale=scale,
        width=ovam.preset.width,
        height=ovam.preset.height,
        generator=[torch.Generator("cpu").manual_seed(one.seed) for one in asked],
    ).images


def guided(ovam: OVAM, asked: Sequence[Asked], kind: str, scale: float) -> Any:
    """What a run of these prompts stands in."""
    if kind == PLAIN:
        return nullcontext()
    captions = [caption_of(one.names) for one in asked]
    return guided_by_region(ovam.pipe, captions, scale, averages=kind == S_CFG_AVERAGE)


def measure(
    ovam: OVAM,
    annotate: Annotate,
    asked: Sequence[Asked],
    scales: Sequence[float],
    steps: int,
    batch: int,
    cache: Cache,
) -> dict[tuple[float, str], list[list[bool]]]:
    """Which of its things each prompt's picture shows, by scale and kind."""
    columns = [(scale, kind) for scale in scales for kind in GUIDANCE_KINDS]
    work = list(_missing(columns, asked, batch, cache))
    begun = time.perf_counter()
    for number, (scale, kind, part) in enumerate(work, start=1):
        with guided(ovam, part, kind, scale):
            made = images(ovam, part, scale, steps)
        for one, labels in zip(part, annotate(made), strict=True):
            shown = [bool((labels == VOC_CLASSES.index(name) + 1).mean() >= SHOWN) for name in one.names]
            cache.add({"key": key_of(one, scale, kind), "found": shown}, labels)
        left = (time.perf_counter() - begun) / number * (len(work) - number)
        sys.stderr.write(f"\rguidance: {number} of {len(work)}, {left / 60:.0f} minutes left   ")
    if work:
        sys.stderr.write("\n")
    return {(scale, kind): [cache.known[key_of(one, scale, kind)]["found"] for one in asked] for scale, kind in columns}


def key_of(asked: Asked, scale: float, kind: str) -> str:
    return f"{asked.key}-{kind}-{scale:g}"


def _missing(
    columns: Sequence[tuple[float, str]], asked: Sequence[Asked], batch: int, cache: Cache
) -> Iterator[tuple[float, str, list[Asked]]]:
    """Batches of prompts that a column lacks. A batch has always the same prompts: it rounds by its size."""
    for first in range(0, len(asked), batch):
        part = list(asked[first : first + batch])
        for scale, kind in columns:
            if any(key_of(one, scale, kind) not in cache.known for one in part):
                yield scale, kind, part


def share(found: Sequence[Sequence[bool]], weights: np.ndarray | None = None) -> np.ndarray:
    """Of the things asked for, those that are shown; weights `[draws, prompts]` of prompts, or one draw of all."""
    weights = np.ones((1, len(found))) if weights is None else weights
    shown, things = (np.array([of(one) for one in found], float) for of in (sum, len))
    return weights @ shown / (weights @ things)


def compared(found: Sequence[Sequence[bool]], plain: Sequence[Sequence[bool]]) -> dict[str, float]:
    """Share in percent, and points over plain with their interval: the same prompts are drawn for both."""
    weights = np.random.default_rng(0).multinomial(len(found), np.full(len(found), 1 / len(found)), size=DRAWS)
    apart = 100 * (share(found, weights) - share(plain, weights))
    low, high = np.quantile(apart, [0.025, 0.975])
    own, other = 100 * float(share(found)[0]), 100 * float(share(plain)[0])
    return {"found": own, "over_plain": own - other, "low": float(low), "high": float(high)}


def costs(ovam: OVAM, asked: Sequence[Asked], rounds: int, steps: int) -> dict[str, dict[str, float]]:
    """Seconds over those of a plain run: median, lowest and highest of the rounds, of one picture at a time."""
    ratios: dict[str, list[float]] = {kind: [] for kind in GUIDANCE_KINDS if kind != PLAIN}
    for number in range(rounds + 1):
        seconds = {kind: _seconds(ovam, asked[:1], kind, steps) for kind in GUIDANCE_KINDS}
        if number:  # the first round warms up
            for kind, values in ratios.items():
                values.append(seconds[kind] / seconds[PLAIN])
    return {kind: {"ratio": statistics.median(x), "low": min(x), "high": max(x)} for kind, x in ratios.items()}


def _seconds(ovam: OVAM, asked: Sequence[Asked], kind: str, steps: int) -> float:
    begun = time.perf_counter()
    with guided(ovam, asked, kind, ovam.preset.guidance):
        images(ovam, asked, ovam.preset.guidance, steps)
    return time.perf_counter() - begun


def summarise(
    asked: Sequence[Asked], found: Mapping[tuple[float, str], list[list[bool]]], scales: Sequence[float]
) -> dict[str, list[dict[str, Any]]]:
    """A row a scale and kind, over all prompts and over those of each count."""
    groups: dict[str, Callable[[Asked], bool]] = {"all": lambda _: True}
    groups |= {f"{count} things": (lambda one, count=count: len(one.names) == count) for count in COUNTS}
    rows: dict[str, list[dict[str, Any]]] = {}
    for title, belongs in groups.items():
        kept = [at for at, one in enumerate(asked) if belongs(one)]
        for scale in scales:
            plain = [found[scale, PLAIN][at] for at in kept]
            for kind in GUIDANCE_KINDS:
                figures = compared([found[scale, kind][at] for at in kept], plain)
                rows.setdefault(title, []).append({"scale": scale, "kind": kind, "prompts": len(kept)} | figures)
    return rows


def report(figures: dict[str, Any]) -> str:
    """Markdown: a table for all prompts and for each count of things, then the cost."""
    others = [kind for kind in GUIDANCE_KINDS if kind != PLAIN]
    parts = [f"`{figures['model']}`, {figures['steps']} steps: things found of those that were asked for, in percent."]
    for title, rows in figures["rows"].items():
        header = [f"w, {title}", TITLES[PLAIN]]
        header += [x for kind in others for x in (TITLES[kind], "points over plain, 95 %")]
        lines = []
        for scale in dict.fromkeys(row["scale"] for row in rows):
            own = {row["kind"]: row for row in rows if row["scale"] == scale}
            line = [f"{scale:g}", f"{own[PLAIN]['found']:.1f}"]
            for kind in others:
                row = own[kind]
                line += [f"{row['found']:.1f}", f"{row['over_plain']:+.1f} ({row['low']:+.1f} to {row['high']:+.1f})"]
            lines.append(line)
        parts.append(table([*header, "prompts"], [[*line, rows[0]["prompts"]] for line in lines]))
    lines = [
        [TITLES[kind], f"{x['ratio']:.2f}", f"{x['low']:.2f} to {x['high']:.2f}"] for kind, x in figures["cost"].items()
    ]
    parts.append(table(["Cost over plain, one picture", "ratio", "lowest to highest"], lines))
    return "\n\n".join(parts) + "\n"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.guidance", description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=60, help="of each count of things")
    parser.add_argument("--scales", type=float, nargs="+", default=SCALES, metavar="W")
    parser.add_argument("--first-seed", type=int, default=4000)
    parser.add_argument("--steps", type=int, help="denoising steps (the model's own)")
    parser.add_argument("--rounds", type=int, default=7, help="of the cost")
    parser.add_argument("--batch", type=int, default=6, help="pictures made together")
    parser.add_argument("--work", type=Path, default=Path("outputs/guidance"), help="what a stopped run goes on from")
    parser.add_argument("--out", type=Path, default=Path("outputs/guidance"), help="for guidance.md and guidance.json")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None, annotate: Annotate | None = None, ovam: OVAM | None = None) -> int:
    """annotate: default the trained annotator. ovam: default the embedded model."""
    options = parse(arguments)
    ovam = ovam or OVAM.from_pretrained(EMBEDDED, "cpu")
    annotate = annotate or partial(annotator.annotate, annotator.load())
    steps, asked = options.steps or ovam.preset.steps, prompts(options.prompts, options.first_seed)
    depends = {"steps": steps, "batch": options.batch, "first_seed": options.first_seed, "prompts": options.prompts}
    cache = Cache(options.work, fingerprint(embedded_folder(), {}, depends))
    found = measure(ovam, annotate, asked, options.scales, steps, options.batch, cache)
    figures = {
        "model": EMBEDDED,
        "steps": steps,
        "first_seed": options.first_seed,
        "rows": summarise(asked, found, options.scales),
        "cost": costs(ovam, asked, options.rounds, COST_STEPS),
    }
    write(options.out, "guidance", figures, report(figures))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
