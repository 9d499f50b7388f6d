"""The paper's tables on the embedded model: `python -m benchmarks.quality` prints Markdown and writes it with JSON.

* VOC-sim: "A photograph of a <classname>", 20 classes. COCO-cap's counterpart: rich captions of several objects of the world
  that the model was trained on (held-out seeds), in which a class may be named by a synonym or a hypernym.
* Truth: the annotator's label maps of the generated images. As in the paper the main object of each image is evaluated (the
  class asked for in VOC-sim; in captions the caption's class that covers most), and images without a clear one are left out.
* "Ceiling": the truth itself, averaged over the cells of the attention grid and cut at each threshold: what a perfect map
  would score there, for the edge of an object on a coarse grid lies where the map is a half.
* Every row is given at the paper's thresholds and at its own best single threshold. The search for that one is made
  without the dense CRF, which would have to run at every threshold; so it compares maps, not post-processing.
* The interval is a 95 % bootstrap over images.
* Rendered scenes with exact masks, looked at as photographs are: OVAM and GoCA, with and without its parts (rendered.py).

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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # run as a file, not with -m, its own folder stands there

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from benchmarks import rendered
from ovam_core import tokens
from ovam_core.attention.heatmap import attribute, resize
from ovam_core.attention.mask import binary_masks, densecrf, self_attention_map
from ovam_core.data.metrics import best_threshold, by_class, confusion, gain, interval, miou, sweep, table
from ovam_core.methods import ATTN2MASK, DAAM, OVAM
from ovam_core.models.load import embedded_folder, load_pipeline
from ovam_core.models.presets import EMBEDDED, defaults_for, own_grids, own_steps
from ovam_core.query import words_in_sentence
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
ASKED = ("name", "token")


@dataclass(frozen=True)
class Row:
    """One way to make a mask. steps: indices of denoising steps, resolutions: attention grids; None for the model's own.

    alpha 1 leaves the self-attention map out; inverted: 1 + alpha - A in place of A, for the sign of Eq. 8.
    """

    table: str
    name: str
    asked: str
    tau: float
    alpha: float
    crf: bool
    steps: tuple[int, ...] | None = None
    resolutions: tuple[int, ...] | None = None
    inverted: bool = False

    @property
    def key(self) -> str:
        return f"{self.table} / {self.name} / {self.asked}"


@dataclass(frozen=True)
class Picture:
    """An image to be made: its key in the cache, prompt, seed and the classes that its main object may be of."""

    key: str
    prompt: str
    seed: int
    classes: tuple[str, ...]


# ------------------------------------------------------------------------------------------ what is measured


def main_rows(steps: int, resolutions: Sequence[int], own: dict[str, tuple[float, float]]) -> list[Row]:
    """Rows that share the ordinary generation: Tables 1, 2, 4, 5, Fig. 6 and the choice of alpha.

    own: the model's tau and alpha for "name" and "token", beside the paper's.
    """
    rows, everything = [], tuple(range(steps))
    for asked in ASKED:
        token = asked == "token"
        (plain, _), (tau, alpha) = DAAM.cut(token), OVAM.cut(token)
        rows += [
            Row("Methods", "DAAM", asked, plain, 1.0, DAAM.crf),
            Row("Methods", "OVAM", asked, tau, alpha, OVAM.crf),
            Row("Methods", "OVAM, own tau", asked, *own[asked], OVAM.crf),
            # The others use the grids and steps that this model's defaults name.
            Row("Methods", "DAAM, all grids and steps", asked, plain, 1.0, DAAM.crf, everything, tuple(resolutions)),
            Row("Methods", "OVAM, all grids and steps", asked, tau, alpha, OVAM.crf, everything, tuple(resolutions)),
            Row("Post-processing", "threshold alone", asked, tau, 1.0, False),
            Row("Post-processing", "self-attention", asked, tau, alpha, False),
            Row("Post-processing", "dense CRF", asked, tau, 1.0, True),
            Row("Post-processing", "self-attention and dense CRF", asked, tau, alpha, True),
        ]
        rows += [
            Row(CEILING, f"a perfect map{', dense CRF' if crf else ''}", asked, tau, 1.0, crf) for crf in (False, True)
        ]
        for count in range(1, len(resolutions) + 1):
            for grids in itertools.combinations(resolutions, count):
                name = " + ".join(f"{grid}x{grid}" for grid in grids)
                rows.append(Row("Resolutions", name, asked, tau, alpha, True, resolutions=grids))
        for at in sorted({round(share * (steps - 1)) for share in (0, 0.25, 0.5, 0.75, 1)}):
            rows += [
                Row("Steps", f"t = {at}", asked, tau, alpha, False, steps=(at,)),
                Row("Steps", f"t <= {at}", asked, tau, alpha, False, steps=tuple(range(at + 1))),
                Row("Steps", f"t >= {at}", asked, tau, alpha, False, steps=tuple(range(at, steps))),
            ]
        rows += [Row("Alpha", f"alpha {x:g}", asked, tau, x, False) for x in ALPHAS]
        rows += [Row("Alpha", f"alpha {x:g}, inverted", asked, tau, x, False, inverted=True) for x in ALPHAS]
    return rows


def own_cuts(pipe) -> dict[str, tuple[float, float]]:
    """(tau, alpha) that pipeline.py gives the model."""
    own = defaults_for(pipe)
    return {"name": (own.tau, own.alpha), "token": (own.token_tau, own.token_alpha)}


def attn2mask_rows(only: int) -> list[Row]:
    """Rows of the long generation, of which one step is used."""
    return [
        Row("Methods", "Attn2Mask", asked, *ATTN2MASK.cut(asked == "token"), ATTN2MASK.crf, steps=(only,))
        for asked in ASKED
    ]


def pictures(name: str, first_seed: int, images: int, captions: int, classes: Sequence[str]) -> list[Picture]:
    """The images of a set, the same ones for the same numbers."""
    if name == "voc-sim":
        return [
            Picture(f"{title}-{first_seed + k}", prompt_for(title), first_seed + k, (title,))
            for title in classes
            for k in range(images)
        ]
    found, seed = [], CAPTIONS + 10_000 * first_seed
    while len(found) < captions:
        made = world.scene(seed, 32, VOC_NOUNS, MANY_OBJECTS)
        shown = tuple(x for x in made.nouns if x in classes)
        if shown and len(made.nouns) > 1:
            found.append(Picture(f"caption-{seed}", made.caption, first_seed + len(found), shown))
        seed += 1
    return found


def main_object(labels: np.ndarray, classes: Sequence[str]) -> str | None:
    """The class that covers most of the label map uint8 [H, W]; None if none is clear."""
    covered = {name: (labels == VOC_CLASSES.index(name) + 1).mean() for name in classes}
    best = max(covered, key=covered.get)
    return best if covered[best] >= CLEAR else None


# ----------------------------------------------------------------------------------------------- measuring


def chosen_by(row: Row, pipe, recording):
    """The part of a recording that a row looks at."""
    chosen = recording.select(steps=row.steps, resolutions=row.resolutions)
    chosen = own_grids(pipe, chosen) if row.resolutions is None else chosen
    return own_steps(pipe, chosen) if row.steps is None else chosen


def evaluate(pipe, image: Image.Image, recording, truth: np.ndarray, asked: dict, rows: Sequence[Row]) -> dict:
    """Counts of every row on one image: key to {"counts": [3], "sweep": [T, 3]}. asked: "name", "token" to Attribution."""
    pixels, size = np.asarray(image.convert("RGB")), (image.height, image.width)
    maps, attentions, refined, results = {}, {}, {}, {}
    for row in rows:
        part = (row.steps, row.resolutions)
        chosen = chosen_by(row, pipe, recording)
        if part not in maps:
            maps[part] = dict(zip(ASKED, attribute(chosen, [asked[name] for name in ASKED]), strict=True))
        floor = (row.steps, row.alpha)
        if floor not in attentions:
            attentions[floor] = self_attention_map(chosen, row.alpha)
        weight = 1 + row.alpha - attentions[floor] if row.inverted else attentions[floor]
        map_ = perfect_map(truth, chosen) if row.table == CEILING else maps[part][row.asked]
        weighted = resize((map_ * weight)[None], size)
        mask = binary_masks(weighted, row.tau)[0].numpy()
        if row.crf:  # rows of different tables may be the same mask
            same = mask.tobytes()
            if same not in refined:
                refined[same] = densecrf(mask, pixels)
            mask = refined[same]
        results[row.key] = {
            "counts": confusion(mask, truth).tolist(),
            "sweep": sweep(weighted[0].numpy(), truth, THRESHOLDS).tolist(),
        }
    return results


def perfect_map(truth: np.ndarray, recording) -> torch.Tensor:
    """The share of each cell of the recording's grid that the object bool [H, W] covers: float32 [h, w]."""
    return F.adaptive_avg_pool2d(torch.from_numpy(truth)[None].float(), (recording.height, recording.width))[0]


def asked_of(pipe, name: str, loaded: dict) -> dict:
    """The paper's attribution prompts of a class: its name in "A photograph of a <classname>", and its token."""
    return {
        "name": words_in_sentence(pipe, prompt_for(name), [name]),
        "token": tokens.attribution(pipe, loaded[name]),
    }


class Cache:
    """Results of a set of images: a JSON line an image, and its label map as PNG. Another fingerprint starts anew."""

    def __init__(self, folder: Path, fingerprint: str):
        self.folder, self.lines = folder, folder / f"{fingerprint[:16]}.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        self.known = {}
        if self.lines.exists():
            for line in self.lines.read_text(encoding="utf-8").splitlines():
                try:
                    one = json.loads(line)
                except ValueError:  # cut off while it was written
                    continue
                self.known[one["key"]] = one

    def add(self, result: dict, labels: np.ndarray) -> None:
        Image.fromarray(labels).save(self.folder / f"{result['key'].replace(' ', '-')}.png")
        begins = "\n" if self.lines.exists() and not self.lines.read_bytes().endswith(b"\n") else ""
        with self.lines.open("a", encoding="utf-8") as file:
            file.write(begins + json.dumps(result) + "\n")
        self.known[result["key"]] = result


def fingerprint(folder: Path, token_files: dict[str, Path], about: dict) -> str:
    """Of all that the results depend on: the model's files, the tokens, the rows."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for path in [*sorted(folder.rglob("*.safetensors")), *(token_files[name] for name in sorted(token_files))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def measure(
    pipe,
    annotate: Callable,
    wanted: Sequence[Picture],
    loaded: dict,
    rows: Sequence[Row],
    steps: int,
    cache: Cache,
    batch: int,
    only: int | None = None,
) -> list[dict]:
    """The results of all images, those of an earlier run from the cache."""
    missing = [one for one in wanted if one.key not in cache.known]
    made = generations(pipe, [one.prompt for one in missing], [one.seed for one in missing], steps, batch, only)
    begun = time.perf_counter()
    for number, (one, (image, recording)) in enumerate(zip(missing, made, strict=True), start=1):
        labels = annotate([image])[0]
        name = main_object(labels, one.classes)
        result = {"key": one.key, "class": name, "rows": {}}
        if name is not None:
            truth = labels == VOC_CLASSES.index(name) + 1
            with torch.no_grad():
                result["rows"] = evaluate(pipe, image, recording, truth, asked_of(pipe, name, loaded), rows)
        cache.add(result, labels)
        left = (time.perf_counter() - begun) / number * (len(missing) - number)
        sys.stderr.write(f"\r{cache.folder.name}: {number} of {len(missing)}, {left / 60:.0f} minutes left   ")
    if missing:
        sys.stderr.write("\n")
    return [cache.known[one.key] for one in wanted]


# ------------------------------------------------------------------------------------------------- reporting


def summarise(rows: Sequence[Row], results: Sequence[dict]) -> list[dict]:
    """The figures of every row, in percent: mIoU and its interval at the paper's threshold, and at the row's best one."""
    clear = [one for one in results if one["class"] is not None]
    if not clear:
        raise ValueError("No image shows its class clearly: there is nothing to measure.")
    classes, images = [one["class"] for one in clear], [one["key"] for one in clear]
    summary = []
    for row in rows:
        counts = np.array([one["rows"][row.key]["counts"] for one in clear])
        all_counts = np.array([one["rows"][row.key]["sweep"] for one in clear])
        threshold, score, index = best_threshold(all_counts, classes, THRESHOLDS)
        low, high = interval(counts, classes, images)
        best_low, best_high = interval(all_counts[:, index], classes, images)
        summary.append(
            asdict(row)
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


def gains(rows: Sequence[Row], results: Sequence[dict]) -> list[dict]:
    """Token over name of every row, on the same images: at the paper's thresholds, and each at its own best one."""
    clear = [one for one in results if one["class"] is not None]
    classes, images = [one["class"] for one in clear], [one["key"] for one in clear]
    pairs = {}
    for row in rows:
        pairs.setdefault((row.table, row.name), {})[row.asked] = row.key
    found = []
    for (group, name), keys in pairs.items():
        paper, best = [], []
        for asked in ASKED:
            paper.append(np.array([one["rows"][keys[asked]]["counts"] for one in clear]))
            swept = np.array([one["rows"][keys[asked]]["sweep"] for one in clear])
            best.append(swept[:, best_threshold(swept, classes, THRESHOLDS)[2]])
        values = [tuple(100 * x for x in gain(*which, classes, images)) for which in (paper, best)]
        found.append({"table": group, "name": name, "paper": values[0], "best": values[1]})
    return found


def report(figures: dict) -> str:
    """Markdown: a section a set, a table a group of rows."""
    parts = []
    for title, one in figures["sets"].items():
        parts.append(f"## {title}\n\n{one['about']}")
        for group in dict.fromkeys(row["table"] for row in one["rows"]):
            lines = [
                [
                    f"{row['name']}, {row['asked']}",
                    f"{row['tau']:g}",
                    f"{row['miou']:.1f}",
                    f"{row['low']:.1f} to {row['high']:.1f}",
                    f"{row['best_miou']:.1f}",
                    f"{row['best_low']:.1f} to {row['best_high']:.1f}",
                    f"{row['best_tau']:.2f}",
                    row["n"],
                ]
                for row in one["rows"]
                if row["table"] == group
            ]
            header = [group, "tau", "mIoU", "95 %", "mIoU at best tau, no CRF", "95 %", "best tau", "n"]
            parts.append(table(header, lines))
        lines = [
            [
                f"{x['table']}: {x['name']}",
                *(f"{m:+.1f} ({low:+.1f} to {high:+.1f})" for m, low, high in (x["paper"], x["best"])),
            ]
            for x in one["gains"]
            if x["table"] == "Methods"
        ]
        parts.append(table(["Token over name, mIoU points", "at the row's tau", "each at its best"], lines))
    parts.append(f"## rendered scenes, exact masks\n\n{rendered.report(figures['rendered'])}")
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None, annotate: Callable | None = None, pipe=None) -> int:
    """annotate: images to label maps uint8 [N, H, W], default the trained annotator. pipe: default the embedded model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=6, help="VOC-sim: images a class (30 in the paper)")
    parser.add_argument("--captions", type=int, default=60, help="images of rich captions (300 for the full table)")
    parser.add_argument("--scenes", type=int, default=120, help="rendered scenes with exact masks")
    parser.add_argument("--classes", nargs="+", default=VOC_CLASSES, choices=VOC_CLASSES, metavar="NAME")
    parser.add_argument("--tokens", type=Path, default=tokens.folder_for(EMBEDDED))
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
    long = ATTN2MASK.steps
    only = ATTN2MASK.only
    if options.smoke:
        options = argparse.Namespace(
            **{**vars(options), "images": 1, "captions": 2, "scenes": 2, "classes": options.classes[:2], "steps": 3}
        )
        long, only = 4, 2

    pipe = pipe or load_pipeline(EMBEDDED, "cpu")
    if annotate is None:
        annotate = partial(annotator.annotate, annotator.load())
    files = tokens.library(EMBEDDED, options.tokens)
    absent = [name for name in options.classes if name not in files]
    if absent:
        raise ValueError(
            f"There is no token for {', '.join(absent)} in {options.tokens}: run python -m training.annotated."
        )
    loaded = {name: tokens.load(files[name]) for name in options.classes}
    steps = options.steps or defaults_for(pipe).steps
    rows, extra = main_rows(steps, grids_of(pipe), own_cuts(pipe)), attn2mask_rows(only)
    if not options.attn2mask_every:
        extra = []

    figures = {"model": EMBEDDED, "steps": steps, "first_seed": options.first_seed, "sets": {}}
    for name in SETS:
        wanted = pictures(name, options.first_seed, options.images, options.captions, options.classes)
        jobs = [("", rows, wanted, steps, None)]
        if extra:
            jobs.append(("-long", extra, wanted[:: options.attn2mask_every], long, only))
        summary, apart, about = [], [], ""
        for suffix, its_rows, its_pictures, its_steps, its_only in jobs:
            depends = {"rows": [asdict(row) for row in its_rows], "steps": its_steps, "thresholds": THRESHOLDS.tolist()}
            mark = fingerprint(embedded_folder(), {x: files[x] for x in options.classes}, depends)
            cache = Cache(options.work / f"{name}{suffix}", mark)
            results = measure(pipe, annotate, its_pictures, loaded, its_rows, its_steps, cache, options.batch, its_only)
            summary += summarise(its_rows, results)
            apart += gains(its_rows, results)
            clear = sum(one["class"] is not None for one in results)
            about += f"{clear} of {len(results)} images of {its_steps} steps show a clear object. "
        figures["sets"][name] = {"about": about.strip(), "rows": summary, "gains": apart}
    figures["rendered"] = rendered.measure(pipe, loaded, options.scenes)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "quality.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    (options.out / "quality.md").write_text(report(figures), encoding="utf-8")
    print(report(figures))
    return 0


def grids_of(pipe) -> list[int]:
    """The attention grids that the recorder keeps at the model's own size, from the largest."""
    side = max(defaults_for(pipe).height, defaults_for(pipe).width) // pipe.vae_scale_factor
    levels = [side >> number for number in range(len(pipe.unet.config.block_out_channels))]
    kinds = pipe.unet.config.down_block_types
    return [level for level, kind in zip(levels, kinds, strict=True) if "CrossAttn" in kind]


if __name__ == "__main__":
    raise SystemExit(main())
