"""Recipes of token optimisation side by side: `python -m benchmarks.optimize` prints a Markdown table.

One token a class, from one image of "A photograph of a <classname>" with the annotator's mask, as in the paper.
Columns: the lowest loss (Eq. 6) after so many epochs, an epoch being one evaluation of loss and gradient; how far the
embedding went; then how good the token is on images of other seeds, by mean IoU at the one threshold that serves it
best. The first row is the class name, not optimised.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ovam_core import Recording, heatmaps, optimize
from ovam_core.attention.heatmap import resize
from ovam_core.data.metrics import best_threshold, sweep, table
from ovam_core.models.presets import EMBEDDED, recommended_part
from ovam_core.optimization import RECIPES, OptimizeSettings, initial_embedding
from ovam_core.ovam import OVAM
from ovam_core.query import words_in_sentence
from training import annotator
from training.annotated import SEEDS, generations
from training.figures import largest_class, prompt_for
from training.nouns import VOC_CLASSES

LOSS_AT = (1, 5, 10, 20, 50, 100, 200, 500)  # epochs
THRESHOLDS = np.linspace(0.02, 0.98, 49)
CANDIDATES = {
    "paper": RECIPES["paper"],
    "fast": RECIPES["fast"],
    **{f"momentum {rate}": OptimizeSettings("", 100, "momentum", rate, proximity=0.0) for rate in (10.0, 30.0)},
    **{f"adam {rate}": OptimizeSettings("", 100, "adam", rate, proximity=0.0) for rate in (0.03, 0.1, 0.3)},
    **{
        f"lbfgs, proximity {weight}": OptimizeSettings("", 100, "lbfgs", 1.0, proximity=weight)
        for weight in (0.0, 0.001, 0.01, 0.1, 1.0)
    },
}
BY_NAME = "class name"

Example = tuple[Recording, np.ndarray]  # the mask uint8 [H, W]


def examples(ovam: OVAM, network: Any, name: str, count: int, steps: int | None) -> list[Example]:
    """Those of the first `count` seeds whose image shows the class."""
    number, shown = VOC_CLASSES.index(name) + 1, []
    for image, recording in generations(ovam.pipe, [prompt_for(name)] * len(SEEDS), list(SEEDS), steps):
        labels = annotator.annotate(network, [image])[0]
        mask = labels == number
        if largest_class(labels) == number and 0.05 <= mask.mean() <= 0.8:
            shown.append((recommended_part(ovam.pipe, recording), mask.astype(np.uint8)))
        if len(shown) == count:
            return shown
    raise ValueError(f"Only {len(shown)} of {len(SEEDS)} seeds show a {name}; ask for fewer images.")


@torch.no_grad()
def transfer(embedding: Tensor, rows: Sequence[int], others: Sequence[Example]) -> list[np.ndarray]:
    """Counts `[T, 3]` on every other image, of the mean map of the embedding's `rows`."""
    maps = [heatmaps(recording, embedding)[list(rows)].mean(dim=0, keepdim=True) for recording, _ in others]
    return [
        sweep(resize(map_, mask.shape)[0].numpy(), mask > 0, THRESHOLDS)
        for map_, (_, mask) in zip(maps, others, strict=True)
    ]


def measure(
    ovam: OVAM,
    network: Any,
    classes: Sequence[str],
    candidates: Mapping[str, OptimizeSettings],
    others: int,
    steps: int | None,
) -> list[dict[str, Any]]:
    """One result a candidate: losses [epochs] averaged over classes, seconds an epoch, distance, transfer."""
    results: dict[str, dict[str, list]] = {
        name: {"losses": [], "seconds": [], "distance": [], "counts": []} for name in (BY_NAME, *candidates)
    }
    titles = []  # the class of each other image
    for title in classes:
        (recording, mask), *rest = examples(ovam, network, title, 1 + others, steps)
        start = initial_embedding(ovam.pipe, [title])
        by_name = words_in_sentence(ovam.pipe, prompt_for(title), [title])
        results[BY_NAME]["counts"] += transfer(by_name.embedding, by_name.groups[0], rest)
        titles += [title] * len(rest)
        for name, settings in candidates.items():
            optimized = optimize([recording], [mask], start, settings)
            result = results[name]
            lowest = np.minimum.accumulate(optimized.losses)
            result["losses"].append(np.pad(lowest, (0, settings.epochs - len(lowest)), mode="edge"))
            result["seconds"].append(optimized.seconds / max(optimized.epochs, 1))
            result["distance"].append(float((optimized.embedding - start).norm()))
            result["counts"] += transfer(optimized.embedding, [1], rest)
        print(f"{title} done", flush=True)
    return [summary(name, result, titles) for name, result in results.items()]


def summary(name: str, result: Mapping[str, list], titles: Sequence[str]) -> dict[str, Any]:
    threshold, score, _ = best_threshold(np.stack(result["counts"]), titles, THRESHOLDS)
    return {
        "recipe": name,
        "losses": np.mean(result["losses"], axis=0).tolist() if result["losses"] else [],
        "iou": score,
        "threshold": threshold,
        "seconds_an_epoch": float(np.mean(result["seconds"] or [0])),
        "distance": float(np.mean(result["distance"] or [0])),
    }


def report(summaries: Sequence[dict[str, Any]]) -> str:
    rows = []
    for recipe in summaries:
        losses = [f"{recipe['losses'][at - 1]:.3f}" if at <= len(recipe["losses"]) else "" for at in LOSS_AT]
        time = f"{1000 * recipe['seconds_an_epoch']:.0f}" if recipe["losses"] else ""
        quality = [f"{recipe['distance']:.0f}", f"{recipe['iou']:.3f}", f"{recipe['threshold']:.2f}"]
        rows.append([recipe["recipe"], *losses, time, *quality])
    header = ["recipe", *[f"loss at {at}" for at in LOSS_AT], "ms an epoch", "distance", "mIoU elsewhere", "at tau"]
    return table(header, rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.optimize", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="2 classes, 1 other image, 25 epochs at most")
    parser.add_argument("--classes", nargs="+", default=VOC_CLASSES[::3], choices=VOC_CLASSES, metavar="NAME")
    parser.add_argument("--others", type=int, default=4, help="other images of each class")
    parser.add_argument("--steps", type=int, help="denoising steps (the model's own)")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args(arguments)
    candidates, classes, others = CANDIDATES, list(options.classes), options.others
    if options.quick:
        candidates = {name: replace(recipe, epochs=min(25, recipe.epochs)) for name, recipe in CANDIDATES.items()}
        classes, others = classes[:2], 1
    ovam = OVAM.from_pretrained(EMBEDDED, "cpu")
    summaries = measure(ovam, annotator.load(), classes, candidates, others, options.steps)
    about = f"{len(classes)} classes, {others} other images of each, {torch.get_num_threads()} threads"
    print(f"\n{about}\n\n{report(summaries)}")
    if options.json:
        options.json.write_text(json.dumps(summaries, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
