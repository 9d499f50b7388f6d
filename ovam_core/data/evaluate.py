"""A method over a data set: IoU of each class and mIoU, from one confusion matrix over the set. In VOC layout:

    ROOT/ImageSets/Segmentation/val.txt        names, one a line
    ROOT/JPEGImages/NAME.jpg                   photographs (.png, too)
    ROOT/SegmentationClass/NAME.png            palette: 0 background, classes from 1, 255 ignored
    ROOT/classes.txt                           the name of each label, from 0; without it VOC's own 20 classes

The layouts of other sets: label_folder.py; annotated images, generated ones among them: annotated.py.

Each photograph is noised and recorded with a caption that lists its objects (hooks/photograph.py), its classes are
asked for as words or tokens, and the method makes the masks (methods.py). An image's answer depends on that image and
its number in the list alone, and sums of whole numbers on no order: so a killed run that goes on, and one by any number
of processes, give the same result. A class may be asked for by several words, of which the strongest has a pixel. A
sweep adds offsets to the score of GoCA's background, all on one pass. A run's folder:

    SegmentationClass/NAME.png                 what was found, palette PNG as VOC's evaluation server takes them
    results.json, results.md                   IoU, mIoU, the confusion matrix, all settings
    .ovam/                                     the state: settings.json, an image's confusion matrix in items/
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image

from ovam_core import plot
from ovam_core.attention.heatmap import resize
from ovam_core.attention.mask import NO_CRF, crf_available, densecrf, label_map
from ovam_core.attention.recording import Branch
from ovam_core.checks import MAX_SEED
from ovam_core.data import runs
from ovam_core.data.annotated import AnnotatedSet
from ovam_core.data.export import about_model, class_queries
from ovam_core.data.layout import ITEMS, LABEL_MAPS, SETTINGS
from ovam_core.data.metrics import confusion_matrix, iou, matrix_counts, table
from ovam_core.data.prompts import Item, Work
from ovam_core.data.runs import QUEUE, Process, cores, process_pool, repeatable, worker_count
from ovam_core.data.voc_folder import PhotoSet
from ovam_core.errors import InputError, out_of_memory_as
from ovam_core.hooks.photograph import record_image
from ovam_core.io.files import write_atomically
from ovam_core.io.pictures import read_photo
from ovam_core.methods import (
    Cut,
    GocaMethod,
    HeatmapMethod,
    Method,
    cut_maps,
    looked_at,
    method_named,
    over_peak,
    weighted_maps,
)
from ovam_core.models.registry import check_fits
from ovam_core.ovam import OVAM
from ovam_core.picture import Picture
from ovam_core.query import MAX_WORDS, Query
from ovam_core.settings import (
    HALVES,
    LATER,
    TABLES,
    TIMESTEPS,
    Alpha,
    GenerateSettings,
    PhotoSettings,
    Seed,
    Settings,
    Tau,
    Threads,
)

AnySet = PhotoSet | AnnotatedSet

RESULT_FORMAT = "ovam-evaluate/1"

RUN_KIND = "evaluation"  # what messages call it

RESULTS, TABLE = "results.json", "results.md"


# ------------------------------------------------------------------------------------------------ settings


@dataclass(frozen=True)
class EvaluateSettings(Settings):
    """Everything besides the data that a result depends on. `for_model` fills in what is not given.

    method: a name of METHODS. timesteps, seed, width, height: as in PhotoSettings; image i has the noise of seed + i.
    tau, alpha, crf: in place of the method's own, None for those. tokens: None asks for classes by name, "library" by
    the tokens of the model, else a folder of them; a class without a token is asked by name. template: the attribution
    prompt around a name. threads: of the CPU, where that does the work; see ExportSettings. token_tau, token_alpha: for
    tokens, None for tau and alpha. branch: half of the guided batch that names are asked of, None for the conditional
    one. offsets: of the background's score, for a method that compares words; the result itself is that without any.
    table: of TABLES, whose settings these are. mirror: photographs are seen in a mirror, too.
    """

    method: str
    timesteps: tuple[int, ...] = TIMESTEPS
    seed: Seed = 0
    width: int | None = None
    height: int | None = None
    tau: Tau = None
    alpha: Alpha = None
    crf: bool | None = None
    tokens: str | None = None
    template: str = "{}"
    threads: Threads = None
    token_tau: Tau = field(default=None, metadata=LATER)
    token_alpha: Alpha = field(default=None, metadata=LATER)
    branch: str | None = field(default=None, metadata=LATER)
    offsets: tuple[float, ...] | None = field(default=None, metadata=LATER)
    table: str | None = field(default=None, metadata=LATER)
    mirror: bool = field(default=False, metadata=LATER)

    @classmethod
    def for_model(cls, ovam: OVAM, method: str, **given: Any) -> EvaluateSettings:
        """Settings with the defaults of method and model for what is not given or None."""
        found = method_named(method)
        table = table_settings(given.get("table"), found)
        own = {
            "timesteps": timesteps_of(
                found, ovam.pipe.scheduler.config.num_train_timesteps, ovam.adapter.photo_timestep
            ),
            "threads": cores() if ovam.device.type == "cpu" else None,
        }
        return cls(found.name, **{**own, **table, **{name: x for name, x in given.items() if x is not None}})

    def validate(self, ovam: OVAM) -> None:
        """Raises InputError, one sentence, for what cannot be evaluated."""
        method = method_named(self.method)
        self.photo().validate(ovam.pipe)
        if method.needs_goca and (len(self.timesteps) > 1 or self.template != "{}"):
            raise InputError(f"{method.name} looks at one timestep and takes no template; leave the others out.")
        if not method.takes_tokens and (self.alpha is not None or self.crf):
            raise InputError(f"{method.name} has neither alpha nor a dense CRF; leave these settings out.")
        self.check_fields()
        if self.crf and not crf_available():
            raise InputError(NO_CRF)
        if self.branch is not None and self.branch not in HALVES:
            raise InputError(f"The half is {str(self.branch)[:40]!r}; choose {' or '.join(HALVES)}.")
        if self.offsets is not None and method.cuts_each:
            raise InputError(f"{method.name} has no background whose score an offset could raise; choose GoCA.")
        if self.offsets is not None and not all(abs(offset) <= 1 for offset in self.offsets):
            raise InputError("An offset of the background's score lies between -1 and 1.")

    def photo(self, item: Item | None = None) -> PhotoSettings:
        """How a photograph of the set is recorded; any, if none is given."""
        index, caption = (0, "") if item is None else (item.index, item.prompt)
        seed = self.seed if index == 0 else (self.seed + index) % (MAX_SEED + 1)
        return PhotoSettings(caption, self.timesteps, seed, self.width, self.height, self.mirror)


def table_settings(name: str | None, method: Method) -> dict[str, Any]:
    """What a row of the paper's tables says of the settings. Raises InputError for one that is not known, or is of
    another method.
    """
    if name is None:
        return {}
    if name not in TABLES:
        raise InputError(f"There is no table '{name[:40]}'; choose among {', '.join(TABLES)}.")
    table = TABLES[name]
    if table.method is not None and method.name.split(" + ")[0] != table.method:
        raise InputError(f"{table.about} is known of {table.method} alone; choose it, or the table as printed.")
    own = {key: value for key, value in asdict(table).items() if key not in ("about", "method")}
    if method.needs_goca or method.needs_features:  # they are asked for words alone
        own["template"] = None
    return {key: value for key, value in own.items() if value is not None}


def timesteps_of(method: Method, last: int, usual: int = TIMESTEPS[0]) -> tuple[int, ...]:
    """The noise at which a method looks at photographs: the usual, or that of the one step of a run that it takes."""
    return (
        (usual,)
        if method.step is None or method.run_steps is None
        else (round(last * (1 - method.step / method.run_steps)),)
    )


# ------------------------------------------------------------------------------------------------ one image


@dataclass(frozen=True)
class Job:
    """What a worker needs to finish one image. Plain arrays, so that it travels between processes.

    folder: of the run; "" to keep nothing. image: uint8 [H, W, 3]. scaled: float32 [L, H, W], the maps by which
    overlapping masks are told apart. masks: bool [L, H, W]. ids: the label of each. crf: whether a dense CRF follows.
    truth: uint8 [H, W]. labels: how many there are. swept: uint8 [offsets, H, W], the label map at each, if any.
    """

    folder: str
    index: int
    name: str
    image: np.ndarray
    scaled: np.ndarray
    masks: np.ndarray
    ids: tuple[int, ...]
    crf: bool
    truth: np.ndarray
    labels: int
    swept: np.ndarray | None = None


def found_labels(job: Job) -> np.ndarray:
    """The label map of a job, uint8 [H, W]."""
    masks = np.stack([densecrf(mask, job.image) for mask in job.masks]) if job.crf and len(job.masks) else job.masks
    return label_map(job.scaled, masks, job.ids)


def score_job(job: Job) -> dict[str, Any]:
    """The confusion matrix of an image as its row; writes it, and the label map. Runs in a worker process. Raises
    OSError.
    """
    labels = found_labels(job)
    row: dict[str, Any] = {"name": job.name, "confusion": _cells(labels, job)}
    if job.swept is not None:
        row["sweep"] = [_cells(one, job) for one in job.swept]
    if job.folder:
        files = {f"{LABEL_MAPS}/{job.name}.png": plot.png(plot.label_image(labels))}
        runs.write_done(Path(job.folder), job.index, files, row)
    return row


def _cells(labels: np.ndarray, job: Job) -> list[list[int]]:
    """What is not 0 of a confusion matrix: [truth, found, pixels]."""
    matrix = confusion_matrix(labels, job.truth, job.labels)
    return [[int(row), int(column), int(matrix[row, column])] for row, column in np.argwhere(matrix)]


@torch.no_grad()
def make_job(
    ovam: OVAM, data: AnySet, item: Item, queries: dict[str, Query], settings: EvaluateSettings, folder: Path | None
) -> Job:
    """The photograph of an item, recorded and asked. Raises InputError for files that do not belong together."""
    method, own, ids = method_named(settings.method), *questions(data, item, queries)
    picture: Picture | None
    if isinstance(data, AnnotatedSet):
        picture = annotated_picture(ovam, method, data, item, own)
        image = picture.image.convert("RGB")
        truth = data.truth(item, (image.height, image.width))
    else:
        image, truth = read_photo(data.photo(item)), data.truth(item)
        if truth.shape != (image.height, image.width):
            raise InputError(
                f"The label map of '{data.names[item.index]}' is {truth.shape[1]}x{truth.shape[0]} and its image "
                f"{image.width}x{image.height}; they must be of one size."
            )
        method = with_background(method, data, item, len(own))
        picture = record_picture(ovam, method, image, settings.photo(item), own) if own else None
    offsets, swept = settings.offsets or (), None
    if picture is None:
        scaled = masks = np.zeros((0, *truth.shape), bool)
        swept = np.zeros((len(offsets), *truth.shape), np.uint8)
    else:
        scaled, masks, at_offsets = answer(ovam, method, picture, own, offsets)
        if offsets:
            swept = np.stack([label_map(scaled, one, ids) for one in at_offsets])
    return Job(
        folder="" if folder is None else str(folder),
        index=item.index,
        name=data.names[item.index],
        image=np.asarray(image),
        scaled=scaled,
        masks=masks,
        ids=tuple(ids),
        crf=method.crf and crf_available() if settings.crf is None else settings.crf,
        truth=truth,
        labels=len(data.labels),
        swept=swept if offsets else None,
    )


def questions(data: AnySet, item: Item, queries: dict[str, Query]) -> tuple[list[Query], list[int]]:
    """What is asked of an image, and the label of each question: a class's token, or each of its words."""
    asked = [(name, name) for name in item.classes]
    if not isinstance(data, AnnotatedSet):
        asked = [
            (name if queries[name].kind == "token" or word == name else word_key(word), name)
            for word, name in data.asked[item.index].parts
        ]
    asked = list(dict.fromkeys(asked))
    return [queries[key] for key, _ in asked], data.work.ids(name for _, name in asked)


def with_background(method: Method, data: PhotoSet, item: Item, words: int) -> Method:
    """A method that compares words, with those that stand for the image's background, if they are named."""
    background = data.asked[item.index].background
    if background is None or not isinstance(method, GocaMethod):
        return method
    return replace(method, background=background[: max(0, MAX_WORDS - words)])


def answer(
    ovam: OVAM, method: Method, picture: Picture, queries: Sequence[Query], offsets: Sequence[float] = ()
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """What a method finds in a picture, but for its dense CRF: (the maps by which overlapping masks are told apart,
    float32; masks, bool), both `[L, H, W]` at the image's size; and the masks at each offset.
    """
    size = (picture.image.height, picture.image.width)
    photograph = not isinstance(picture.settings, GenerateSettings)
    if photograph and method.cuts_each and not method.needs_goca:
        maps = _of_timesteps(method).heatmaps(ovam.pipe, picture, queries)
        weighted = weighted_maps(picture, maps, queries, size)
        return over_peak(weighted).float().cpu().numpy(), cut_maps(weighted, queries).cpu().numpy(), []
    maps = method.heatmaps(ovam.pipe, picture, queries)
    scaled = resize(maps[: len(queries)], size)
    masks = method.masks(picture, maps, queries, crf=False)  # the dense CRF is a worker's
    swept = [
        raised.masks(picture, maps, [replace(query, tau=query.tau + offset) for query in queries], crf=False)
        for offset in offsets
        if isinstance(method, GocaMethod)
        for raised in [replace(method, offset=method.offset + offset)]
    ]
    return scaled.float().cpu().numpy(), masks, swept


def _of_timesteps(method: Method) -> Method:
    """The method on photographs: the step of a run that it looks at is their timestep."""
    return method if method.step is None else replace(cast(HeatmapMethod, method), step=None)


def annotated_picture(ovam: OVAM, method: Method, data: AnnotatedSet, item: Item, queries: Sequence[Query]) -> Picture:
    """The image of an item, with the parts of its recording that the method looks at."""
    image = data.examples[item.index].image
    if isinstance(image, GenerateSettings) and method.run_steps not in (None, image.steps):
        raise InputError(
            f"{method.name} is defined on runs of {method.run_steps} steps, and '{data.names[item.index]}' has "
            f"{image.steps}; annotate images of such runs."
        )
    picture = data.picture(ovam, item, queries[0].branch, method.needs_goca, method.keeps)
    if method.step is not None:
        return picture
    return replace(picture, recording=looked_at(ovam.pipe, method, picture.recording))


def record_picture(
    ovam: OVAM, method: Method, image: Image.Image, photo: PhotoSettings, queries: Sequence[Query]
) -> Picture:
    """A photograph with a recording for each half of the guided batch that a query belongs to: the conditional one sees
    the caption, the unconditional one none. For a method that needs GoCA's pass there is one half alone.
    """
    branches = sorted({query.branch for query in queries})
    captions = {"conditional": photo.caption, "unconditional": ""}
    if not method.needs_goca:
        about = (photo.timesteps, photo.seed, photo.size, photo.mirror)
        keep: dict[str, Any] = {"self_attention": any(query.alpha < 1 for query in queries), "keep": method.keeps}
        made = {branch: record_image(ovam.pipe, image, captions[branch], *about, **keep) for branch in branches}
        recordings = {branch: looked_at(ovam.pipe, _of_timesteps(method), one) for branch, one in made.items()}
        first, *others = branches
        return Picture(image, recordings[first], photo, others={branch: recordings[branch] for branch in others})
    if len(branches) > 1:
        raise InputError(f"{method.name} looks at one pass, but its tokens belong to different halves of a batch.")
    settings = replace(photo, caption=captions[branches[0]])
    return ovam.look_at(image, settings, with_goca=True)


def method_queries(ovam: OVAM, work: Work, settings: EvaluateSettings) -> dict[str, Query]:
    """How each class is asked for, with the method's published tau and alpha for words and tokens where none are
    given.
    """
    method = method_named(settings.method)
    token_tau = settings.tau if settings.token_tau is None else settings.token_tau
    token_alpha = settings.alpha if settings.token_alpha is None else settings.token_alpha
    given = Cut(settings.tau, settings.alpha, token_tau, token_alpha)
    queries = class_queries(ovam, work, settings.tokens, given, method, preset=None, template=settings.template)
    if settings.branch is not None:
        branch = cast(Branch, settings.branch)
        queries = {name: replace(one, branch=branch) if one.kind == "word" else one for name, one in queries.items()}
    words = [name for name, query in queries.items() if query.kind == "word"]
    if method.asks == "token" and words:
        raise InputError(f"{method.name} asks for tokens alone, and there is none for '{words[0]}'; add --tokens.")
    return queries


def word_key(word: str) -> str:
    """Where the query of a word stands, that is not the name of its class."""
    return f"word {word}"


def set_queries(ovam: OVAM, data: AnySet, settings: EvaluateSettings) -> dict[str, Query]:
    """`method_queries` of a set's classes, by name, and of the words by which it asks for them, by `word_key`."""
    queries = method_queries(ovam, data.work, settings)
    if isinstance(data, AnnotatedSet):
        return queries
    parts = {part for one in data.asked for part in one.parts if part[0] != part[1]}
    words = tuple(sorted({word for word, name in parts if queries[name].kind == "word"}))
    asked = method_queries(ovam, Work((Item(0, "", "", 0, words),), words), replace(settings, tokens=None))
    return queries | {word_key(word): query for word, query in asked.items()}


# ------------------------------------------------------------------------------------------------ the run


@dataclass(frozen=True, eq=False)
class Result:
    """matrix: int64 `[labels, labels]`, rows the truth, columns what was found. labels: their names. images: how
    many. background: whether label 0 is a class of the truth. sweep: the matrix at each offset of the background.
    """

    matrix: np.ndarray
    labels: tuple[str, ...]
    images: int
    settings: dict[str, Any]
    background: bool = True
    sweep: tuple[tuple[float, np.ndarray], ...] = ()

    @property
    def iou(self) -> dict[str, float | None]:
        """IoU of each label in [0, 1]; None for one that is neither in the truth nor was found."""
        values = iou(matrix_counts(self.matrix))
        return {
            name: None if math.isnan(value) else float(value) for name, value in zip(self.labels, values, strict=True)
        }

    @property
    def miou(self) -> float | None:
        """Mean IoU of the labels that occur, the background being one where the set has such a class: VOC's figure."""
        return _mean(self.iou.values()) if self.background else self.miou_objects

    @property
    def miou_objects(self) -> float | None:
        """The same without the background."""
        return _mean(value for name, value in self.iou.items() if name != "background")

    def text(self) -> str:
        """A Markdown table, in percent; one more of the offsets, if there are any."""
        shown = [(name, value, int(self.matrix[row].sum())) for row, (name, value) in enumerate(self.iou.items())]
        rows = [[name, _percent(value), f"{pixels:,}"] for name, value, pixels in shown if value is not None]
        return "\n".join(
            [
                table(["class", "IoU %", "pixels"], rows),
                "",
                f"mIoU {_percent(self.miou)} %, without the background {_percent(self.miou_objects)} %, "
                f"over {self.images:,} images.",
                *self._sweep_lines(),
            ]
        )

    def at_offsets(self) -> list[tuple[float, Result]]:
        """The result at each offset of the sweep."""
        return [(offset, replace(self, matrix=matrix, sweep=())) for offset, matrix in self.sweep]

    def _sweep_lines(self) -> list[str]:
        found = self.at_offsets()
        if not found:
            return []
        rows = [[f"{offset:g}", _percent(one.miou), _percent(one.miou_objects)] for offset, one in found]
        return ["", table(["offset", "mIoU %", "without the background %"], rows)]

    def json(self) -> bytes:
        about = {
            "format": RESULT_FORMAT,
            "images": self.images,
            "miou": self.miou,
            "miou_objects": self.miou_objects,
            "iou": self.iou,
            "labels": list(self.labels),
            "confusion": self.matrix.tolist(),
            "settings": self.settings,
        }
        if self.sweep:
            about["sweep"] = [
                {"offset": offset, "miou": one.miou, "miou_objects": one.miou_objects}
                for offset, one in self.at_offsets()
            ]
        return (json.dumps(about, ensure_ascii=False) + "\n").encode()


def _mean(values: Any) -> float | None:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def evaluate_dataset(
    ovam: OVAM,
    data: AnySet,
    settings: EvaluateSettings,
    out: str | Path | None = None,
    *,
    process: Process | None = None,
    workers: int | None = None,
    on_image: Callable[[int, int], None] | None = None,
) -> Result | None:
    """The method over the whole set; goes on where a run of the same settings in `out` was.

    out: the run's folder; None to keep nothing, in a single process. process: this process's share, for
    several that evaluate into one folder; all but the first return None. workers: processes for dense CRF and files, 0
    for none beside. on_image: called with (images done, images in all) of this process's share.
    Raises InputError, one sentence, for settings that cannot be, a folder of another run, files that cannot be read.
    """
    process = process or Process()
    settings.validate(ovam)
    if settings.table is not None and not isinstance(data, AnnotatedSet):
        raise InputError(f"The table {settings.table} is of generated images that were annotated; give their folder.")
    if not isinstance(data, AnnotatedSet):
        data = data.fitted(lambda caption, words: _fits(ovam, settings, caption, words))
        for caption in sorted({item.prompt for item in data.work.items}):
            replace(settings.photo(), caption=caption).validate(ovam.pipe)
    if out is None and process.ranks > 1:
        raise InputError("Several processes need a folder that they share; add --out.")
    queries = set_queries(ovam, data, settings)
    about = fingerprint(ovam, data, settings, queries)
    first = process.rank == 0
    folder = None if out is None else Path(out)
    with _held(folder, about, first), repeatable(settings.threads):
        try:
            process.wait()
            todo, rows = _share(data, folder, process)
            done = len(rows)
            count = worker_count(process.ranks) if workers is None else workers
            with out_of_memory_as("A photograph does not fit in memory; choose a smaller --size."):
                for item, row in _run(ovam, data, todo, queries, settings, folder, count):
                    rows[item.index] = row
                    if on_image is not None:
                        on_image(len(rows), done + len(todo))
            process.wait()
            return _finish(rows, data, folder, about) if first else None
        except OSError as error:
            raise InputError(runs.disk_sentence(error, folder or "", RUN_KIND)) from None
        except BrokenProcessPool:
            raise InputError(
                "A process that writes the files died, perhaps for want of memory; start the same evaluation again."
            ) from None


def _fits(ovam: OVAM, settings: EvaluateSettings, caption: str, words: int) -> bool:
    """Whether a caption can be read, and this many of its words be compared."""
    try:
        check_fits(ovam.pipe, "caption", caption)
    except InputError:
        return False
    return words <= MAX_WORDS or not method_named(settings.method).needs_goca


def fingerprint(ovam: OVAM, data: AnySet, settings: EvaluateSettings, queries: dict[str, Query]) -> dict[str, Any]:
    """What a result depends on, as it is kept in its folder; nothing of it names the machine."""
    values = {
        "program": RESULT_FORMAT,
        **settings.to_json(),
        "tokens": None if settings.tokens is None else "yes",
        "split": data.split,
        "images": len(data.names),
        "classes": list(data.work.classes),
        "data": data.fingerprint(),
        **data.about(),
        **about_model(ovam, queries),
    }
    return json.loads(json.dumps(values))  # as it will be read again: tuples are lists


@contextmanager
def _held(folder: Path | None, about: dict[str, Any], first: bool) -> Iterator[None]:
    """The run's folder, if there is one: checked, and by the first process locked and begun."""
    if folder is None:
        yield
        return
    runs.check_folder(folder, about, RUN_KIND)
    with runs.locked(folder, RUN_KIND) if first else nullcontext():
        if first:
            _begin(folder, about)
        yield


def _begin(folder: Path, about: dict[str, Any]) -> None:
    """Settings before the rest: another process that begins just now must not take the folder for a stranger's."""
    try:
        (folder / ITEMS).mkdir(parents=True, exist_ok=True)
        runs.clear_parts(folder)
        write_atomically(folder / SETTINGS, (json.dumps(about, ensure_ascii=False, indent=1) + "\n").encode())
        (folder / LABEL_MAPS).mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(runs.disk_sentence(error, folder, RUN_KIND)) from None


def _share(data: AnySet, folder: Path | None, process: Process) -> tuple[list[Item], dict[int, dict[str, Any]]]:
    """What is to be done of this process's share, and the rows of what is done by number."""
    own = data.work.items[process.rank :: process.ranks]
    if folder is None:
        return list(own), {}
    there = {item.index: row for item in own if (row := runs.read_done(folder, item)) is not None}
    return [item for item in own if item.index not in there], there


def _run(
    ovam: OVAM,
    data: AnySet,
    items: Sequence[Item],
    queries: dict[str, Query],
    settings: EvaluateSettings,
    folder: Path | None,
    workers: int,
) -> Iterator[tuple[Item, dict[str, Any]]]:
    """Does the images; gives each with its row when it is finished."""
    if not items:
        return
    pending: deque[tuple[Item, Future]] = deque()
    with process_pool(workers) as pool:
        for item in items:
            pending.append((item, pool.submit(score_job, make_job(ovam, data, item, queries, settings, folder))))
            while pending and (len(pending) >= QUEUE * max(workers, 1) or pending[0][1].done()):
                finished, future = pending.popleft()
                yield finished, future.result()
        for finished, future in pending:
            yield finished, future.result()


def _all_rows(data: AnySet, folder: Path) -> dict[int, dict[str, Any]]:
    rows = {}
    for item in data.work.items:
        row = runs.read_done(folder, item)
        if row is None:
            raise InputError(f"'{data.names[item.index]}' is missing in '{folder}'; start the same evaluation again.")
        rows[item.index] = row
    return rows


def _finish(rows: dict[int, dict[str, Any]], data: AnySet, folder: Path | None, about: dict[str, Any]) -> Result:
    """The result of the rows; with a folder of all that lie there, written beside them."""
    if folder is None:
        return _summed(rows, data, about)
    result = _summed(_all_rows(data, folder), data, about)
    write_atomically(folder / RESULTS, result.json())
    write_atomically(folder / TABLE, (result.text() + "\n").encode())
    return result


def _summed(rows: dict[int, dict[str, Any]], data: AnySet, about: dict[str, Any]) -> Result:
    offsets = about.get("offsets") or []
    sweep = tuple(
        (offset, _matrix((row["sweep"][place] for row in rows.values()), len(data.labels)))
        for place, offset in enumerate(offsets)
    )
    matrix = _matrix((row["confusion"] for row in rows.values()), len(data.labels))
    return Result(matrix, data.labels, len(data.names), about, data.has_background, sweep)


def _matrix(cells: Iterable[list[list[int]]], labels: int) -> np.ndarray:
    matrix = np.zeros((labels, labels), dtype=np.int64)
    for truth, found, pixels in (cell for image in cells for cell in image):
        matrix[truth, found] += pixels
    return matrix
