"""The paper's tables on the embedded model: `python -m benchmarks.quality` prints Markdown and writes it with JSON.

* VOC-sim: "A photograph of a <classname>", 20 classes. COCO-cap's counterpart: rich captions of several objects of the
  world that the model was trained on (held-out seeds), in which a class may be named by a synonym or a hypernym.
* Truth: the annotator's label maps of the generated images. As in the paper the main object of each image is evaluated
  (the class asked for in VOC-sim; in captions the caption's class that covers most), and images without a clear one are
  left out.
* "Ceiling": the truth itself, averaged over the cells of the attention grid and cut at each threshold: what a perfect
  map would score there, for the edge of an object on a coarse grid lies where the map is a half.
* Every row is given at the paper's thresholds and at its own best single threshold. The search for that one is made
  without the dense CRF, which would have to run at every threshold; so it compares maps, not post-processing.
* The interval is a 95 % bootstrap over images.
* Rendered scenes with exact masks, looked at as photographs are: OVAM and GoCA, with and without its parts
  (rendered.py).

A run that was stopped goes on where it was: counts and label maps are kept in --work, pictures are not.
`--first-seed` moves to images that the table does not use, to choose tau and alpha on.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from benchmarks import rendered
from benchmarks.written import write
from ovam_core import Picture, Recording, Token, methods
from ovam_core.attention.heatmap import resize
from ovam_core.attention.mask import densecrf, self_attention_map
from ovam_core.data.metrics import best_threshold, by_class, confusion, gain, interval, miou, sweep, table
from ovam_core.methods import ATTN2MASK, DAAM, HeatmapMethod, cut_maps, weighted_maps
from ovam_core.models.load import embedded_folder
from ovam_core.models.presets import EMBEDDED, ModelDefaults
from ovam_core.ovam import OVAM
from ovam_core.query import Query, token_query, word_queries
from ovam_core.tokens import folder_for, library
from training import annotator, world
from training.annotated import SEEDS as TOKEN_SEEDS
from training.annotated import generations
from training.figures import prompt_for
from training.nouns import VOC_CLASSES, VOC_NOUNS

THRESHOLDS = np.round(np.linspace(0.02, 0.98, 49), 2)
FIRST_SEED = 1000  # beyond those of the tokens
CAPTIONS = world.HELD_OUT + 3_000_000
CLEAR = 0.02  # share of the image that an object must cover to count as its main object
ALPHAS = (0.0, 0.5, 0.7, 0.85, 0.95)
MANY_OBJECTS = (0.0, 0.6, 0.4)  # shares of captions with 1, 2, 3 objects
SETS = ("voc-sim", "captions")
CEILING = "Ceiling"
SPREADING = (methods.ISEG, methods.FA_SEG, methods.DATASET_DIFFUSION)
BANDS = (0.05, 0.1)
KINDS = ("name", "token")
HEADER = ("tau", "mIoU", "95 %", "mIoU at best tau, no CRF", "95 %", "best tau", "n")
SIDE_BY_SIDE = {
    *(("Methods", name) for name in ("DAAM", "OVAM", "OVAM, own tau", "Attn2Mask")),
    *(("Refinements", name) for name in ("OVAM, no CRF", *(one.name for one in SPREADING))),
}
JSON_KEYS = {"kind": "asked", "step_indices": "steps"}  # of a row, where quality.json has other names

Annotate = Callable[[Sequence[Image.Image]], np.ndarray]  # images to label maps uint8 [N, H, W]


@dataclass(frozen=True)
class Row:
    """One way to make a mask.

    kind: asked by name or by token. step_indices: denoising steps, resolutions: attention grids; None for those that
    the model recommends. alpha 1 leaves the self-attention map out; inverted: 1 + alpha - A in place of A, for the sign
    of Eq. 8. method: whose maps they are, None for OVAM's. uncertain: half-width of the band about tau, in shares of
    the peak, whose pixels count nowhere, as those that an export labels 255.
    """

    table: str
    name: str
    kind: str
    tau: float
    alpha: float
    crf: bool
    step_indices: tuple[int, ...] | None = None
    resolutions: tuple[int, ...] | None = None
    inverted: bool = False
    method: str | None = None
    uncertain: float = 0.0

    @property
    def key(self) -> str:
        return f"{self.table} / {self.name} / {self.kind}"

    def to_json(self) -> dict[str, Any]:
        """The row as quality.json holds it."""
        return {JSON_KEYS.get(name, name): value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Run:
    """Rows that share a generation, of `steps` denoising steps.

    only: the one step that is recorded, None for all. every: measured on every `every`-th image. suffix: of the cache.
    """

    rows: list[Row]
    steps: int
    only: int | None = None
    every: int = 1
    suffix: str = ""


@dataclass(frozen=True)
class PlannedImage:
    """An image to be made: its key in the cache, prompt, seed and the classes that its main object may be of."""

    key: str
    prompt: str
    seed: int
    classes: tuple[str, ...]


# ------------------------------------------------------------------------------------------ what is measured


def main_rows(steps: int, resolutions: Sequence[int], preset: ModelDefaults) -> list[Row]:
    """Rows that share the ordinary generation: Tables 1, 2, 4, 5, Fig. 6 and the choice of alpha.

    preset: of the model, whose tau and alpha stand beside the paper's.
    """
    rows, everything = [], tuple(range(steps))
    own_cuts = {"name": (preset.tau, preset.alpha), "token": (preset.token_tau, preset.token_alpha)}
    for kind in KINDS:
        (plain, _), (tau, alpha) = published_cut(DAAM, kind), published_cut(methods.OVAM, kind)
        rows += [
            Row("Methods", "DAAM", kind, plain, 1.0, DAAM.crf),
            Row("Methods", "OVAM", kind, tau, alpha, methods.OVAM.crf),
            Row("Methods", "OVAM, own tau", kind, *own_cuts[kind], methods.OVAM.crf),
            # The others use the grids and steps that this model's preset names.
            Row("Methods", "DAAM, all grids and steps", kind, plain, 1.0, DAAM.crf, everything, tuple(resolutions)),
            Row("Methods", "OVAM, all grids and steps", kind, tau, alpha, True, everything, tuple(resolutions)),
            Row("Post-processing", "threshold alone", kind, tau, 1.0, False),
            Row("Post-processing", "self-attention", kind, tau, alpha, False),
            Row("Post-processing", "dense CRF", kind, tau, 1.0, True),
            Row("Post-processing", "self-attention and dense CRF", kind, tau, alpha, True),
            Row("Refinements", "OVAM, no CRF", kind, *own_cuts[kind], False),
            *(Row("Refinements", one.name, kind, one.tau, 1.0, one.crf, method=one.name) for one in SPREADING),
            *(
                Row("Refinements", f"OVAM, 255 within {band:g}", kind, *own_cuts[kind], True, uncertain=band)
                for band in BANDS
            ),
            Row(CEILING, "a perfect map", kind, tau, 1.0, False),
            Row(CEILING, "a perfect map, dense CRF", kind, tau, 1.0, True),
        ]
        for count in range(1, len(resolutions) + 1):
            for grids in itertools.combinations(resolutions, count):
                name = " + ".join(f"{grid}x{grid}" for grid in grids)
                rows.append(Row("Resolutions", name, kind, tau, alpha, True, resolutions=grids))
        for at in sorted({round(share * (steps - 1)) for share in (0, 0.25, 0.5, 0.75, 1)}):
            rows += [
                Row("Steps", f"t = {at}", kind, tau, alpha, False, step_indices=(at,)),
                Row("Steps", f"t <= {at}", kind, tau, alpha, False, step_indices=tuple(range(at + 1))),
                Row("Steps", f"t >= {at}", kind, tau, alpha, False, step_indices=tuple(range(at, steps))),
            ]
        rows += [Row("Alpha", f"alpha {x:g}", kind, tau, x, False) for x in ALPHAS]
        rows += [Row("Alpha", f"alpha {x:g}, inverted", kind, tau, x, False, inverted=True) for x in ALPHAS]
    return rows


def attn2mask_rows(step: int) -> list[Row]:
    """Rows of the long generation, of which one step is used."""
    return [
        Row("Methods", "Attn2Mask", kind, *published_cut(ATTN2MASK, kind), ATTN2MASK.crf, step_indices=(step,))
        for kind in KINDS
    ]


def published_cut(method: HeatmapMethod, kind: str) -> tuple[float, float]:
    """(tau, alpha) of a method in its paper."""
    return (method.token_tau, method.token_alpha) if kind == "token" else (method.tau, method.alpha)


def planned_images(
    name: str, first_seed: int, images: int, captions: int, classes: Sequence[str]
) -> list[PlannedImage]:
    """The images of a set, the same ones for the same numbers."""
    if name == "voc-sim":
        return [
            PlannedImage(f"{title}-{first_seed + k}", prompt_for(title), first_seed + k, (title,))
            for title in classes
            for k in range(images)
        ]
    planned, seed = [], CAPTIONS + 10_000 * first_seed
    while len(planned) < captions:
        scene = world.scene(seed, 32, VOC_NOUNS, MANY_OBJECTS)
        shown = tuple(noun for noun in scene.nouns if noun in classes)
        if shown and len(scene.nouns) > 1:
            planned.append(PlannedImage(f"caption-{seed}", scene.caption, first_seed + len(planned), shown))
        seed += 1
    return planned


def main_object(labels: np.ndarray, classes: Sequence[str]) -> str | None:
    """The class that covers most of the label map uint8 `[H, W]`; None if none is clear."""
    covered = {name: (labels == VOC_CLASSES.index(name) + 1).mean() for name in classes}
    best = max(covered, key=covered.get)
    return best if covered[best] >= CLEAR else None


def grids_of(ovam: OVAM) -> list[int]:
    """The attention grids that the recorder keeps at the model's own size, from the largest."""
    side = max(ovam.preset.height, ovam.preset.width)
    return [side // stride for stride in ovam.adapter.strides]


# ----------------------------------------------------------------------------------------------- measuring


def part_of(row: Row, ovam: OVAM, recording: Recording) -> Recording:
    """The part of a recording that a row looks at."""
    return methods.looked_at(ovam.pipe, method_of(row), recording, row.step_indices, row.resolutions)


def method_of(row: Row) -> methods.Method:
    """Whose maps a row cuts."""
    return methods.method_named(row.method or methods.OVAM.name)


def queries_of(ovam: OVAM, name: str, token: Token) -> dict[str, Query]:
    """The paper's attribution prompts of a class: its name in "A photograph of a <classname>", and its token."""
    (by_name,) = word_queries(ovam.pipe, [name], sentence=prompt_for(name))
    return {"name": by_name, "token": token_query(ovam.pipe, token)}


@torch.no_grad()
def evaluate(
    ovam: OVAM, picture: Picture, truth: np.ndarray, queries: Mapping[str, Query], rows: Sequence[Row]
) -> dict[str, dict[str, Any]]:
    """Counts of every row on one image: key to {"counts": [3], "sweep": [T, 3]}.

    truth: bool `[H, W]`, the object. queries: by kind, "name" and "token".
    """
    pixels = np.asarray(picture.image.convert("RGB"))
    parts: dict[Any, Picture] = {}
    maps: dict[Any, Tensor] = {}
    refined: dict[bytes, np.ndarray] = {}
    results = {}
    for row in rows:
        key = (row.step_indices, row.resolutions, row.method)
        if key not in parts:
            parts[key] = replace(picture, recording=part_of(row, ovam, picture.recording))
            maps[key] = method_of(row).heatmaps(ovam.pipe, parts[key], [queries[kind] for kind in KINDS])
        map_ = maps[key][KINDS.index(row.kind)]
        if row.table == CEILING:
            seen = parts[key].recording
            map_ = resize(perfect_map(truth, seen)[None], (seen.height, seen.width))[0]
        query = replace(queries[row.kind], tau=row.tau, alpha=row.alpha)
        weigh = inverted_maps if row.inverted else weighted_maps
        weighted = weigh(parts[key], map_[None], [query], truth.shape)
        mask = cut_maps(weighted, [query])[0].numpy()
        if row.crf:  # rows of different tables may be the same mask
            cut = mask.tobytes()
            if cut not in refined:
                refined[cut] = densecrf(mask, pixels)
            mask = refined[cut]
        scaled = weighted[0].numpy()
        unsure = np.abs(scaled / scaled.max() - row.tau) < row.uncertain if row.uncertain else None
        results[row.key] = {
            "counts": confusion(mask, truth, unsure).tolist(),
            "sweep": sweep(scaled, truth, THRESHOLDS, unsure).tolist(),
        }
    return results


def inverted_maps(picture: Picture, maps: Tensor, queries: Sequence[Query], size: tuple[int, int]) -> Tensor:
    """`weighted_maps` of one query with 1 + alpha - A in place of A."""
    (query,) = queries
    attention = self_attention_map(picture.of_branch(query.branch), query.alpha)
    return resize(maps * (1 + query.alpha - attention), size)


def perfect_map(truth: np.ndarray, recording: Recording) -> Tensor:
    """The share of each cell of the recording's finest grid that the object bool `[H, W]` covers: float32 `[h, w]`."""
    finest = max((layer.height, layer.width) for layer in recording.layers)
    return F.adaptive_avg_pool2d(torch.from_numpy(truth)[None].float(), finest)[0]


class Cache:
    """Results of a set of images: a JSON line an image, and its label map as PNG. Another fingerprint starts anew."""

    def __init__(self, folder: Path, fingerprint: str):
        self.folder, self.lines = folder, folder / f"{fingerprint[:16]}.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        self.known: dict[str, dict[str, Any]] = {}
        if self.lines.exists():
            for line in self.lines.read_text(encoding="utf-8").splitlines():
                try:
                    result = json.loads(line)
                except ValueError:  # cut off while it was written
                    continue
                self.known[result["key"]] = result

    def add(self, result: dict[str, Any], labels: np.ndarray) -> None:
        Image.fromarray(labels).save(self.folder / f"{result['key'].replace(' ', '-')}.png")
        begins = "\n" if self.lines.exists() and not self.lines.read_bytes().endswith(b"\n") else ""
        with self.lines.open("a", encoding="utf-8") as file:
            file.write(begins + json.dumps(result) + "\n")
        self.known[result["key"]] = result


def fingerprint(folder: Path, tokens: Mapping[str, Token], about: dict[str, Any]) -> str:
    """Of all that the results depend on: the files of the model and of the annotator, the tokens, the rows."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for path in (*sorted(folder.rglob("*.safetensors")), *sorted(annotator.FOLDER.glob("*.safetensors"))):
        digest.update(path.read_bytes())
    for name in sorted(tokens):
        digest.update(tokens[name].to_bytes())
    return digest.hexdigest()


def measure(
    ovam: OVAM,
    annotate: Annotate,
    planned: Sequence[PlannedImage],
    tokens: Mapping[str, Token],
    run: Run,
    cache: Cache,
    batch: int,
) -> list[dict[str, Any]]:
    """The results of all images, those of an earlier run from the cache."""
    missing = [image for image in planned if image.key not in cache.known]
    prompts, seeds = [image.prompt for image in missing], [image.seed for image in missing]
    keep = {name for row in run.rows for name in method_of(row).keeps}
    pairs = generations(ovam.pipe, prompts, seeds, run.steps, batch, run.only, keep)
    begun = time.perf_counter()
    for number, (plan, (image, recording)) in enumerate(zip(missing, pairs, strict=True), start=1):
        labels = annotate([image])[0]
        name = main_object(labels, plan.classes)
        result: dict[str, Any] = {"key": plan.key, "class": name, "rows": {}}
        if name is not None:
            truth = labels == VOC_CLASSES.index(name) + 1
            queries = queries_of(ovam, name, tokens[name])
            result["rows"] = evaluate(ovam, Picture(image, recording), truth, queries, run.rows)
        cache.add(result, labels)
        left = (time.perf_counter() - begun) / number * (len(missing) - number)
        sys.stderr.write(f"\r{cache.folder.name}: {number} of {len(missing)}, {left / 60:.0f} minutes left   ")
    if missing:
        sys.stderr.write("\n")
    return [cache.known[image.key] for image in planned]


# ------------------------------------------------------------------------------------------------- reporting


def summarise(rows: Sequence[Row], results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The figures of every row, in percent: mIoU and its interval at its own threshold, and at its best one."""
    clear = [result for result in results if result["class"] is not None]
    if not clear:
        raise ValueError("No image shows its class clearly: there is nothing to measure.")
    classes, images = [result["class"] for result in clear], [result["key"] for result in clear]
    summary = []
    for row in rows:
        counts = np.array([result["rows"][row.key]["counts"] for result in clear])
        all_counts = np.array([result["rows"][row.key]["sweep"] for result in clear])
        threshold, score, index = best_threshold(all_counts, classes, THRESHOLDS)
        low, high = interval(counts, classes, images)
        best_low, best_high = interval(all_counts[:, index], classes, images)
        summary.append(
            row.to_json()
            | {
                "key": row.key,
                "n": len(clear),
                "made": len(results),
                "miou": 100 * miou(counts, classes),
                "low": 100 * low,
                "high": 100 * high,
                "best_tau": threshold,
                "best_miou": 100 * score,
                "best_low": 100 * best_low,
                "best_high": 100 * best_high,
                "by_class": {name: 100 * value for name, value in by_class(counts, classes).items()},
            }
        )
    return summary


def gains(rows: Sequence[Row], results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Token over name of every row, on the same images: at the paper's thresholds, and each at its own best one."""
    clear = [result for result in results if result["class"] is not None]
    classes, images = [result["class"] for result in clear], [result["key"] for result in clear]
    pairs: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        pairs.setdefault((row.table, row.name), {})[row.kind] = row.key
    gained = []
    for (group, name), keys in pairs.items():
        paper, best = [], []
        for kind in KINDS:
            paper.append(np.array([result["rows"][keys[kind]]["counts"] for result in clear]))
            swept = np.array([result["rows"][keys[kind]]["sweep"] for result in clear])
            best.append(swept[:, best_threshold(swept, classes, THRESHOLDS)[2]])
        values = [tuple(100 * x for x in gain(*counts, classes, images)) for counts in (paper, best)]
        gained.append({"table": group, "name": name, "paper": values[0], "best": values[1]})
    return gained


def report(figures: dict[str, Any]) -> str:
    """Markdown: a section a set, a table a group of rows."""
    parts = []
    for title, figures_of_set in figures["sets"].items():
        parts.append(f"## {title}\n\n{figures_of_set['about']}")
        rows = figures_of_set["rows"]
        parts.append(side_by_side(rows))
        for group in dict.fromkeys(row["table"] for row in rows):
            lines = [_line(row) for row in rows if row["table"] == group]
            parts.append(table([group, *HEADER], lines))
        lines = [
            [
                f"{gained['table']}: {gained['name']}",
                *(f"{mean:+.1f} ({low:+.1f} to {high:+.1f})" for mean, low, high in (gained["paper"], gained["best"])),
            ]
            for gained in figures_of_set["gains"]
            if gained["table"] == "Methods"
        ]
        parts.append(table(["Token over name, mIoU points", "at the row's tau", "each at its best"], lines))
    parts.append(f"## rendered scenes, exact masks\n\n{rendered.report(figures['rendered'])}")
    return "\n\n".join(parts) + "\n"


def side_by_side(rows: Sequence[dict[str, Any]]) -> str:
    """A line a method, from the best: as this model cuts it where the model says so, else as published. What was
    measured on fewer images, and so on other classes, stands last.
    """
    own = [row for row in rows if (row["table"], row["name"]) in SIDE_BY_SIDE]
    best = sorted(own, key=lambda row: (-row["n"], -row["miou"]))
    return table(["From the best", *HEADER], [_line(row) for row in best])


def _line(row: dict[str, Any]) -> list[Any]:
    return [
        f"{row['name']}, {row['asked']}",
        f"{row['tau']:g}",
        f"{row['miou']:.1f}",
        f"{row['low']:.1f} to {row['high']:.1f}",
        f"{row['best_miou']:.1f}",
        f"{row['best_low']:.1f} to {row['best_high']:.1f}",
        f"{row['best_tau']:.2f}",
        row["n"],
    ]


# ------------------------------------------------------------------------------------------------ the command


def measure_set(
    name: str,
    ovam: OVAM,
    annotate: Annotate,
    tokens: Mapping[str, Token],
    runs: Sequence[Run],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """The figures of a set of images: about, rows, gains."""
    planned = planned_images(name, options.first_seed, options.images, options.captions, options.classes)
    summary, gained, about = [], [], []
    for run in runs:
        rows = [row.to_json() for row in run.rows]
        depends = {"rows": rows, "steps": run.steps, "thresholds": THRESHOLDS.tolist()}
        cache = Cache(options.work / f"{name}{run.suffix}", fingerprint(embedded_folder(), tokens, depends))
        results = measure(ovam, annotate, planned[:: run.every], tokens, run, cache, options.batch)
        summary += summarise(run.rows, results)
        gained += gains(run.rows, results)
        clear = sum(result["class"] is not None for result in results)
        about.append(f"{clear} of {len(results)} images of {run.steps} steps show a clear object.")
    return {"about": " ".join(about), "rows": summary, "gains": gained}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=6, help="VOC-sim: images a class (30 in the paper)")
    parser.add_argument("--captions", type=int, default=60, help="images of rich captions (300 for the full table)")
    parser.add_argument("--scenes", type=int, default=120, help="rendered scenes with exact masks")
    parser.add_argument("--classes", nargs="+", default=VOC_CLASSES, choices=VOC_CLASSES, metavar="NAME")
    parser.add_argument("--tokens", type=Path, default=folder_for(EMBEDDED))
    parser.add_argument("--first-seed", type=int, default=FIRST_SEED, help="other images, to choose tau and alpha on")
    parser.add_argument("--steps", type=int, help="denoising steps (the model's own)")
    parser.add_argument(
        "--attn2mask-every", type=int, default=1, metavar="K", help="its 100 steps on every K-th image; 0 for none"
    )
    parser.add_argument("--batch", type=int, default=6, help="images made together")
    parser.add_argument(
        "--work", type=Path, default=Path("outputs/quality"), help="for what a stopped run goes on from"
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/quality"), help="for quality.md and quality.json")
    parser.add_argument(
        "--smoke", action="store_true", help="2 classes, 1 image each, 2 captions, few steps: only that it runs"
    )
    options = parser.parse_args(arguments)
    if options.first_seed <= max(TOKEN_SEEDS):
        parser.error(f"seeds up to {max(TOKEN_SEEDS)} belong to the tokens; choose a larger one.")
    options.long, options.only = ATTN2MASK.run_steps, ATTN2MASK.step
    if options.smoke:
        small = {"images": 1, "captions": 2, "scenes": 2, "classes": options.classes[:2], "steps": 3}
        options = argparse.Namespace(**(vars(options) | small | {"long": 4, "only": 2}))
    return options


def main(arguments: Sequence[str] | None = None, annotate: Annotate | None = None, ovam: OVAM | None = None) -> int:
    """annotate: default the trained annotator. ovam: default the embedded model."""
    options = parse(arguments)
    ovam = ovam or OVAM.from_pretrained(EMBEDDED, "cpu")
    annotate = annotate or partial(annotator.annotate, annotator.load())
    tokens = library(EMBEDDED, options.tokens)
    absent = [name for name in options.classes if name not in tokens]
    if absent:
        raise ValueError(
            f"There is no token for {', '.join(absent)} in {options.tokens}: run python -m training.annotated."
        )
    tokens = {name: tokens[name] for name in options.classes}
    steps = options.steps or ovam.preset.steps
    runs = [Run(main_rows(steps, grids_of(ovam), ovam.preset), steps)]
    if options.attn2mask_every:
        rows = attn2mask_rows(options.only)
        runs.append(Run(rows, options.long, options.only, every=options.attn2mask_every, suffix="-long"))

    figures: dict[str, Any] = {"model": EMBEDDED, "steps": steps, "first_seed": options.first_seed}
    figures["sets"] = {name: measure_set(name, ovam, annotate, tokens, runs, options) for name in SETS}
    figures["rendered"] = rendered.measure(ovam, tokens, options.scenes)
    write(options.out, "quality", figures, report(figures))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
