"""The pictures: rendered scenes with exact masks, and a synthetic set whose masks are made in several ways.

Synthetic pictures are those of `ovam export`: the captions of scenes that nobody renders, each with the classes it
names. One generation answers by names and by tokens, into two folders that are what two exports would have made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from ovam_core.data.dataset import Job, prepare, write_job
from ovam_core.data.export import ExportSettings, batches_of, export_dataset, fingerprint, make_jobs
from ovam_core.data.filters import judge
from ovam_core.data.formats import read_labels
from ovam_core.data.prompts import Item, Prompt, Work, work_list
from ovam_core.data.runs import read_done, repeatable
from ovam_core.errors import InputError
from ovam_core.models.presets import EMBEDDED
from ovam_core.ovam import OVAM
from ovam_core.settings import Filters
from training import world
from training.nouns import VOC_CLASSES, VOC_NOUNS
from training.recipes import CPU

TEST, REAL, CAPTIONS = (world.HELD_OUT + offset for offset in (7_000_000, 8_000_000, 9_000_000))  # first seeds
SIDE = 128
WAYS = ("names", "tokens")
PRESENT = 0.01  # share of the picture from which on an object counts as there
SHUFFLE = 0  # seed
FILTERS = Filters()  # the paper's

Annotate = Callable[[list[Image.Image]], np.ndarray]  # pictures to label maps uint8 [N, H, W]


@dataclass(frozen=True)
class Pictures:
    """images: uint8 [N, H, W, 3]. labels: uint8 [N, H, W], 0 background, VOC's 1 to 20, 255 for nothing."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def part(self, chosen: np.ndarray) -> Pictures:
        return Pictures(self.images[chosen], self.labels[chosen])


def rendered(first_seed: int, count: int) -> Pictures:
    """Scenes of the world that the model was trained on, of seeds from `first_seed`, with exact masks."""
    scenes = [world.scene(first_seed + number, SIDE, VOC_NOUNS, CPU.counts) for number in range(count)]
    return Pictures(np.stack([scene.image for scene in scenes]), np.stack([scene.labels for scene in scenes]))


def few_of(pictures: Pictures, count: int, seed: int) -> Pictures:
    """`count` of the pictures: each seed begins at another place, and fewer are always among more."""
    return pictures.part(np.roll(np.arange(len(pictures)), -seed * len(pictures) // 5)[:count])


# ------------------------------------------------------------------------------------------------ synthetic


def captions(count: int, ovam: OVAM, settings: ExportSettings) -> Work:
    """An export's work: captions of `count` scenes, of one to three objects, with the classes that they name."""
    scenes = [world.scene(CAPTIONS + number, 32, VOC_NOUNS, CPU.counts) for number in range(count)]
    prompts = [Prompt(scene.caption, scene.nouns, seed=number) for number, scene in enumerate(scenes) if scene.nouns]
    return work_list(prompts, VOC_CLASSES, check=settings.check(ovam))


@dataclass(frozen=True)
class Plan:
    """An export by names and one by tokens, of the same pictures. folders, settings: by way."""

    count: int
    folders: Mapping[str, Path]
    settings: Mapping[str, ExportSettings]


def planned(count: int, folder: Path, steps: int | None, tokens: str) -> Plan:
    # One thread, since several processes make the pictures; see ExportSettings.
    named = ExportSettings.for_model(model(), steps=steps, threads=1, min_presence=0.0)
    settings = {"names": named, "tokens": replace(named, min_presence=None, tokens=tokens)}
    return Plan(count, {way: folder / way for way in WAYS}, settings)


@cache
def model() -> OVAM:
    return OVAM.from_pretrained(EMBEDDED, "cpu")


@cache
def works(plan_count: int, settings: ExportSettings) -> Work:
    return captions(plan_count, model(), settings)


def export_both(plan: Plan, pool: Executor | None) -> dict[str, list[dict[str, Any]]]:
    """Makes both exports, going on where they were; the rows of each.

    In the place of CLIP's similarities, for which the embedded model has no image tower, stand the presences of the
    classes' names (docs/methods.md): whether the model's own attention says that they are in the picture.
    """
    work = works(plan.count, plan.settings["names"])
    for way, settings in plan.settings.items():
        prepare(plan.folders[way], fingerprint(model(), work, settings, settings.queries(model(), work)))
    batches = [tuple(batch) for batch in batches_of(work.items, plan.settings["names"].batch_size)]
    missing = [batch for batch in batches if not all(map(_is_done(plan), batch))]
    done = (pool.map if pool else map)(write_batch, [plan] * len(missing), missing)
    for _ in tqdm(done, "pictures", total=len(missing), unit="batch", disable=None):
        pass
    # All of it is there: this is the exports' own end, which writes lists, card and metadata.
    found = {way: export_dataset(model(), work, plan.settings[way], plan.folders[way], workers=0).rows for way in WAYS}
    presences = [row["presences"] for row in found["names"]]
    return {
        way: [{**row, "clip_scores": own} for row, own in zip(rows, presences, strict=True)]
        for way, rows in found.items()
    }


def _is_done(plan: Plan) -> Callable[[Item], bool]:
    return lambda item: all(read_done(plan.folders[way], item) is not None for way in WAYS)


def write_batch(plan: Plan, batch: Sequence[Item]) -> None:
    """Makes the pictures of a batch once and writes them into both exports: its classes are asked for once a way."""
    work = works(plan.count, plan.settings["names"])
    queries = {
        _marked(name, way): query
        for way, settings in plan.settings.items()
        for name, query in settings.queries(model(), work).items()
    }
    doubled = Work(work.items, tuple(_marked(name, way) for way in WAYS for name in work.classes))
    items = [
        replace(item, classes=tuple(_marked(name, way) for way in WAYS for name in item.classes)) for item in batch
    ]
    settings = plan.settings["names"]
    with repeatable(settings.threads):
        jobs = make_jobs(model(), items, "", queries, doubled, settings)
    for item, job in zip(batch, jobs, strict=True):
        for number, way in enumerate(WAYS):
            part = slice(number * len(item.classes), (number + 1) * len(item.classes))
            half = half_of(job, part, item, work, plan.folders[way])
            if plan.settings[way].min_presence is None:
                del half.row["presences"]
            write_job(half)


def _marked(name: str, way: str) -> str:
    return f"{name} by {way}"


def half_of(job: Job, part: slice, item: Item, work: Work, folder: Path) -> Job:
    """The job of one way: the rows `part` of its classes, under their own names."""
    ids = work.ids(item.classes)
    return replace(
        job,
        folder=str(folder),
        item=item,
        ids=tuple(ids),
        scaled=job.scaled[part],
        masks=job.masks[part],
        taus=job.taus[part],
        row=job.row | {"classes": list(item.classes), "class_ids": ids, "presences": job.row["presences"][part]},
    )


def synthetic(
    plan: Plan, annotate: Annotate, pool: Executor | None = None
) -> tuple[dict[str, Pictures], dict[str, Any]]:
    """The sets names, tokens, annotator and shuffled, of the same pictures, and what is to be said of them.

    Kept are the pictures that the paper's filters leave in both exports. shuffled: the annotator's masks, each on
    another picture.
    """
    rows = export_both(plan, pool)
    kept = {way: np.array([row["kept"] for row in judge(rows[way], FILTERS)]) for way in WAYS}
    chosen = np.flatnonzero(kept["names"] & kept["tokens"])
    if not len(chosen):
        raise InputError(
            f"The filters leave none of the {plan.count} pictures in both exports; make more: --generated."
        )
    images, labels = _read(plan.folders["names"], rows["names"])
    annotated = np.concatenate([annotate([Image.fromarray(image)]) for image in images])
    masks = {"names": labels, "tokens": _read(plan.folders["tokens"], rows["tokens"])[1], "annotator": annotated}
    sets = {name: Pictures(images, own).part(chosen) for name, own in masks.items()}
    turned = np.roll(np.random.default_rng(SHUFFLE).permutation(len(chosen)), 1)
    order = np.empty_like(turned)
    order[np.roll(turned, -1)] = turned  # a ring: no picture keeps its own
    sets["shuffled"] = Pictures(sets["annotator"].images, sets["annotator"].labels[order])
    about = {"generated": len(images), "kept": {**{way: int(kept[way].sum()) for way in WAYS}, "both": len(chosen)}}
    about["filter"] = filter_facts(rows["names"], annotated, kept["names"])
    return sets, about


def _read(folder: Path, rows: Sequence[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    images = [np.asarray(Image.open(folder / row["file_name"]).convert("RGB")) for row in rows]
    return np.stack(images), np.stack([read_labels(folder / row["mask_file_name"]) for row in rows])


def filter_facts(rows: Sequence[dict[str, Any]], annotated: np.ndarray, kept: np.ndarray) -> dict[str, float]:
    """What the filter does for the classes asked for, in percent: there before it, there after it, and how often a
    class that is there scores above one that is not (of the same name).
    """
    there, scores, names, of_kept = [], [], [], []
    for row, labels, keep in zip(rows, annotated, kept, strict=True):
        there += [float((labels == label).mean()) >= PRESENT for label in row["class_ids"]]
        scores += row["clip_scores"]
        names += row["classes"]
        of_kept += [keep] * len(row["classes"])
    there, scores, names, of_kept = map(np.array, (there, scores, names, of_kept))
    pairs = [
        (scores[(names == name) & there][:, None] > scores[(names == name) & ~there][None]).ravel()
        for name in np.unique(names)
    ]
    won = np.concatenate(pairs)
    return {
        "there": 100 * float(there.mean()),
        "there_of_kept": 100 * float(there[of_kept].mean()) if of_kept.any() else float("nan"),
        "pairs_won": 100 * float(won.mean()) if len(won) else float("nan"),
    }
