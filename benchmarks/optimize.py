"""Recipes of token optimisation side by side: `python -m benchmarks.optimize` prints a Markdown table.

One token a class, from one image of "A photograph of a <classname>" with the annotator's mask, as in the paper. Columns: the
lowest loss (Eq. 6) after so many epochs, an epoch being one evaluation of loss and gradient; how far the embedding went;
then how good the token is on images of other seeds, by mean IoU at the one threshold that serves it best. The first
row is the class name, not optimised.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # run as a file, not with -m, its own folder stands there

import numpy as np
import torch

from ovam_core.attention.heatmap import heatmaps, resize
from ovam_core.data.metrics import best_threshold, sweep, table
from ovam_core.models.load import load_pipeline
from ovam_core.models.presets import EMBEDDED, own_choice
from ovam_core.optimization import RECIPES, OptimizeSettings, initial_embedding, optimize
from ovam_core.query import words_in_sentence
from training import annotator
from training.annotated import SEEDS, generations
from training.figures import largest_class, prompt_for
from training.nouns import VOC_CLASSES

AT = (1, 5, 10, 20, 50, 100, 200, 500)
THRESHOLDS = np.linspace(0.02, 0.98, 49)
CANDIDATES = {
    "paper": RECIPES["paper"],
    "fast": RECIPES["fast"],
    **{f"momentum {rate}": OptimizeSettings("", 100, "momentum", rate, stay=0.0) for rate in (10.0, 30.0)},
    **{f"adam {rate}": OptimizeSettings("", 100, "adam", rate, stay=0.0) for rate in (0.03, 0.1, 0.3)},
    **{
        f"lbfgs, stay {stay}": OptimizeSettings("", 100, "lbfgs", 1.0, stay=stay)
        for stay in (0.0, 0.001, 0.01, 0.1, 1.0)
    },
}


def examples(pipe, network, name: str, count: int, steps: int | None):
    """(recording, mask uint8 [H, W]) of the first `count` seeds whose image shows the class."""
    number, found = VOC_CLASSES.index(name) + 1, []
    for image, recording in generations(pipe, [prompt_for(name)] * len(SEEDS), list(SEEDS), steps):
        labels = annotator.annotate(network, [image])[0]
        if largest_class(labels) == number and 0.05 <= (labels == number).mean() <= 0.8:
            found.append((own_choice(pipe, recording), (labels == number).astype(np.uint8)))
        if len(found) == count:
            return found
    raise ValueError(f"Only {len(found)} of {len(SEEDS)} seeds show a {name}; ask for fewer images.")


def transfer(name: str, embedding: torch.Tensor, row: Sequence[int], others) -> list[np.ndarray]:
    """Counts [T, 3] on every other image."""
    with torch.no_grad():
        maps = [heatmaps(recording, embedding)[list(row)].mean(dim=0, keepdim=True) for recording, _ in others]
    return [
        sweep(resize(one, mask.shape)[0].numpy(), mask > 0, THRESHOLDS)
        for one, (_, mask) in zip(maps, others, strict=True)
    ]


def measure(pipe, network, classes: Sequence[str], candidates: dict, others: int, steps: int | None) -> list[dict]:
    """One result a candidate: losses [epochs] averaged over classes, seconds an epoch, distance, transfer."""
    results = {
        name: {"losses": [], "seconds": [], "distance": [], "counts": []} for name in ("class name", *candidates)
    }
    owners = []
    for title in classes:
        (recording, mask), *rest = examples(pipe, network, title, 1 + others, steps)
        start = initial_embedding(pipe, [title])
        asked = words_in_sentence(pipe, prompt_for(title), [title])
        results["class name"]["counts"] += transfer(title, asked.embedding, asked.groups[0], rest)
        owners += [title] * len(rest)
        for name, settings in candidates.items():
            found = optimize([recording], [mask], start, settings)
            mine = results[name]
            lowest = np.minimum.accumulate(found.losses)
            mine["losses"].append(np.pad(lowest, (0, settings.epochs - len(lowest)), mode="edge"))
            mine["seconds"].append(found.seconds / max(found.epochs, 1))
            mine["distance"].append(float((found.embedding - start).norm()))
            mine["counts"] += transfer(title, found.embedding, [1], rest)
        print(f"{title} done", flush=True)
    summary = []
    for name, mine in results.items():
        threshold, score, _ = best_threshold(np.stack(mine["counts"]), owners, THRESHOLDS)
        losses = np.mean(mine["losses"], axis=0).tolist() if mine["losses"] else []
        summary.append(
            {
                "recipe": name,
                "losses": losses,
                "iou": score,
                "threshold": threshold,
                "seconds_an_epoch": float(np.mean(mine["seconds"] or [0])),
                "distance": float(np.mean(mine["distance"] or [0])),
            }
        )
    return summary


def report(summary: list[dict]) -> str:
    rows = []
    for one in summary:
        losses = [f"{one['losses'][at - 1]:.3f}" if at <= len(one["losses"]) else "" for at in AT]
        time = f"{1000 * one['seconds_an_epoch']:.0f}" if one["losses"] else ""
        rows.append(
            [one["recipe"], *losses, time, f"{one['distance']:.0f}", f"{one['iou']:.3f}", f"{one['threshold']:.2f}"]
        )
    header = ["recipe", *[f"loss at {at}" for at in AT], "ms an epoch", "distance", "mIoU elsewhere", "at tau"]
    return table(header, rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="2 classes, 1 other image, 25 epochs at most")
    parser.add_argument("--classes", nargs="+", default=VOC_CLASSES[::3], choices=VOC_CLASSES, metavar="NAME")
    parser.add_argument("--others", type=int, default=4, help="other images of each class")
    parser.add_argument("--steps", type=int, help="denoising steps (the model's own)")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args(arguments)
    candidates, classes, others = CANDIDATES, list(options.classes), options.others
    if options.quick:
        candidates = {
            name: OptimizeSettings(**{**vars(x), "epochs": min(25, x.epochs)}) for name, x in CANDIDATES.items()
        }
        classes, others = classes[:2], 1
    pipe = load_pipeline(EMBEDDED, "cpu")
    summary = measure(pipe, annotator.load(), classes, candidates, others, options.steps)
    print(
        f"\n{len(classes)} classes, {others} other images of each, {torch.get_num_threads()} threads\n\n{report(summary)}"
    )
    if options.json:
        options.json.write_text(json.dumps(summary, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
