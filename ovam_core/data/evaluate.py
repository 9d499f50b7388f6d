"""A method over a data set in VOC layout: IoU of each class and mIoU, from one confusion matrix over the set.

    ROOT/ImageSets/Segmentation/val.txt        names, one a line
    ROOT/JPEGImages/NAME.jpg                   photographs (.png, too)
    ROOT/SegmentationClass/NAME.png            palette: 0 background, classes from 1, 255 ignored
    ROOT/classes.txt                           the name of each label, from 0; without it VOC's own 20 classes

Each photograph is noised and recorded with a caption that lists its objects (photo.py), its classes are asked for as
words or tokens, and the method makes the masks (methods.py). An image's answer depends on that image and its number in
the list alone, and sums of whole numbers on no order: so a killed run that goes on, and one by any number of processes,
give the same result. A run's folder:

    SegmentationClass/NAME.png                 what was found, palette PNG as VOC's evaluation server takes them
    results.json, results.md                   IoU, mIoU, the confusion matrix, all settings
    .ovam/                                     the state: settings.json, an image's confusion matrix in items/
"""

from __future__ import annotations

import json
import math
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ovam_core import plot
from ovam_core.attention.heatmap import resize
from ovam_core.attention.mask import densecrf, label_map
from ovam_core.attention.recording import Recording
from ovam_core.data import runs as dataset
from ovam_core.data.export import Question, about_model, questions, weigh
from ovam_core.data.layout import ITEMS, MASKS, SETTINGS
from ovam_core.data.metrics import confusion_matrix, iou, matrix_counts, table
from ovam_core.data.prompts import MAX_SEED, Item, Work
from ovam_core.data.runs import QUEUE, Process, cores, process_pool, repeatable, worker_count
from ovam_core.data.voc_folder import VocSet
from ovam_core.errors import InputError, out_of_memory_as
from ovam_core.hooks.goca_recorder import record_goca
from ovam_core.hooks.photograph import TIMESTEPS, denoise, prepare, record_image
from ovam_core.hooks.recorder import record
from ovam_core.io.files import write
from ovam_core.io.pictures import read_photo
from ovam_core.methods import GocaMethod, Method, Seen, maps_and_masks, method_named
from ovam_core.models.presets import own_choice
from ovam_core.settings import PhotoSettings

FORMAT = "ovam-evaluate/1"

RUN = "evaluation"  # what messages call it

RESULTS, TABLE = "results.json", "results.md"


# ------------------------------------------------------------------------------------------------ settings


@dataclass(frozen=True)
class EvaluateSettings:
    """Everything besides the data that a result depends on. `for_model` fills in what is not given.

    method: a name of ALL_METHODS. timesteps, seed, width, height: as in PhotoSettings; image i has the noise of seed + i.
    tau, alpha, crf: in place of the method's own, None for those. tokens: None asks for classes by name, "library" by
    the tokens of the model, else a folder of them; a class without a token is asked by name. template: the attribution
    prompt around a name. threads: of the CPU, where that does the work; see ExportSettings.
    """

    method: str
    timesteps: tuple[int, ...] = TIMESTEPS
    seed: int = 0
    width: int | None = None
    height: int | None = None
    tau: float | None = None
    alpha: float | None = None
    crf: bool | None = None
    tokens: str | None = None
    template: str = "{}"
    threads: int | None = None

    @classmethod
    def for_model(cls, pipe: Any, method: str, **given: Any) -> EvaluateSettings:
        """Settings with the defaults of method and model for what is not given or None."""
        found = method_named(method)
        own = {
            "timesteps": timesteps_of(found, pipe.scheduler.config.num_train_timesteps),
            "threads": cores() if pipe._execution_device.type == "cpu" else None,
        }
        return cls(found.name, **{**own, **{name: value for name, value in given.items() if value is not None}})

    def validate(self, pipe: Any) -> None:
        """Raises InputError, one sentence, for what cannot be evaluated."""
        method = method_named(self.method)
        self.photo().validate(pipe)
        if method.needs_goca and (len(self.timesteps) > 1 or self.template != "{}"):
            raise InputError(f"{method.name} looks at one timestep and takes no template; leave the others out.")
        if isinstance(method, GocaMethod) and (self.alpha is not None or self.crf):
            raise InputError(f"{method.name} has neither alpha nor a dense CRF; leave these settings out.")
        for name, value in (("tau", self.tau), ("alpha", self.alpha)):
            real = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is not None and not (real and math.isfinite(value) and 0 <= value <= 1):
                raise InputError(f"The setting {name} is {value}; choose a number from 0 to 1.")
        threads = self.threads
        if threads is not None and (
            isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= 1024
        ):
            raise InputError(f"The number of threads is {threads}; choose a whole number from 1 to 1024.")

    def photo(self, item: Item | None = None) -> PhotoSettings:
        """How a photograph of the set is recorded; any, if none is given."""
        index, caption = (0, "") if item is None else (item.index, item.prompt)
        seed = self.seed if index == 0 else (self.seed + index) % (MAX_SEED + 1)
        return PhotoSettings(caption, self.timesteps, seed, self.width, self.height)


def method_of(settings: EvaluateSettings) -> Method | GocaMethod:
    """The method with the settings' tau, alpha and dense CRF in place of its own."""
    method = method_named(settings.method)
    if isinstance(method, GocaMethod):
        return method if settings.tau is None else replace(method, tau=settings.tau)
    given = {
        "tau": settings.tau,
        "token_tau": settings.tau,
        "alpha": settings.alpha,
        "token_alpha": settings.alpha,
        "crf": settings.crf,
    }
    return replace(method, **{name: value for name, value in given.items() if value is not None})


def timesteps_of(method: Method | GocaMethod, last: int) -> tuple[int, ...]:
    """The noise at which a method looks at photographs: TIMESTEPS, or that of the one step of a run that it takes."""
    return TIMESTEPS if method.only is None else (round(last * (1 - method.only / method.steps)),)


# ------------------------------------------------------------------------------------------------ one image


@dataclass(frozen=True)
class Job:
    """What a worker needs to finish one image. Plain arrays, so that it travels between processes.

    image: uint8 [H, W, 3]. scaled: float32 [L, H, W], the maps by which overlapping masks are told apart. masks: bool
    [L, H, W]. ids: the label of each. crf: whether a dense CRF follows. truth: uint8 [H, W]. labels: how many there are.
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


def found_labels(job: Job) -> np.ndarray:
    """The label map of a job, uint8 [H, W]."""
    masks = np.stack([densecrf(mask, job.image) for mask in job.masks]) if job.crf and len(job.masks) else job.masks
    return label_map(job.scaled, masks, job.ids)


def score_job(job: Job) -> None:
    """Writes the label map and the confusion matrix of an image. Runs in a worker process. Raises OSError."""
    labels = found_labels(job)
    matrix = confusion_matrix(labels, job.truth, job.labels)
    cells = [[int(row), int(column), int(matrix[row, column])] for row, column in np.argwhere(matrix)]
    files = {f"{MASKS}/{job.name}.png": plot.png(plot.label_image(labels))}
    dataset.write_done(Path(job.folder), job.index, files, {"name": job.name, "confusion": cells})


@torch.no_grad()
def make_job(
    pipe: Any, data: VocSet, item: Item, asked: dict[str, Question], settings: EvaluateSettings, folder: Path
) -> Job:
    """The photograph of an item, recorded and asked. Raises InputError for files that do not belong together."""
    image, truth = read_photo(data.photo(item)), data.truth(item)
    if truth.shape != (image.height, image.width):
        raise InputError(
            f"The label map of '{data.names[item.index]}' is {truth.shape[1]}x{truth.shape[0]} and its image "
            f"{image.width}x{image.height}; they must be of one size."
        )
    method, own, photo = method_of(settings), [asked[name] for name in item.classes], settings.photo(item)
    if not own:
        scaled = masks = np.zeros((0, *truth.shape), bool)
    elif method.needs_goca:
        scaled, masks = answer_in_one_pass(pipe, method, image, photo, item.classes, own)
    else:
        scaled, masks = answer(pipe, image, photo, own)
    return Job(
        folder=str(folder),
        index=item.index,
        name=data.names[item.index],
        image=np.asarray(image),
        scaled=scaled,
        masks=masks,
        ids=tuple(data.work.ids(item.classes)),
        crf=method.crf,
        truth=truth,
        labels=len(data.labels),
    )


def answer(
    pipe: Any, image: Image.Image, photo: PhotoSettings, asked: Sequence[Question]
) -> tuple[np.ndarray, np.ndarray]:
    """What a method finds that any recording serves, but for its dense CRF: (scaled maps float32, masks bool), both
    `[L, H, W]` at the image's size.
    """
    recordings = record_branches(pipe, image, photo, asked)
    _, scaled, masks = weigh(recordings, asked, (image.height, image.width))
    return scaled.float().cpu().numpy(), masks.cpu().numpy()


def answer_in_one_pass(
    pipe: Any,
    method: Method | GocaMethod,
    image: Image.Image,
    photo: PhotoSettings,
    names: Sequence[str],
    asked: Sequence[Question],
) -> tuple[np.ndarray, np.ndarray]:
    """The same for a method that needs the pass of `record_goca`."""
    branches = {one.branch for one in asked}
    if len(branches) > 1:
        raise InputError(f"{method.name} looks at one pass, but its tokens belong to different halves of a batch.")
    caption = photo.caption if branches == {"conditional"} else ""
    noisy = prepare(pipe, [image], [caption], photo.timesteps, photo.seed, photo.size)
    with record(pipe, branch="all") as plain, record_goca(pipe, branch="all") as weighted:
        denoise(pipe, noisy)
    recording = replace(plain.recordings[0], branch=noisy.branch)
    seen = Seen(image, recording, caption, weighted.recordings[0])
    words = [name for name, one in zip(names, asked, strict=True) if one.by == "word"]
    tokens = [one.attribution for one in asked if one.by == "token"]
    bare = method if isinstance(method, GocaMethod) else replace(method, crf=False)  # that is a worker's
    found = maps_and_masks(bare, pipe, seen, words, tokens)
    order = [found.labels.index(name) for name in names]
    return resize(found.maps, (image.height, image.width)).cpu().numpy()[order], found.masks[order]


def record_branches(
    pipe: Any, image: Image.Image, photo: PhotoSettings, asked: Sequence[Question]
) -> dict[str, Recording]:
    """A recording for each half of the guided batch that a question belongs to: with the caption, and without."""
    captions = {"conditional": photo.caption, "unconditional": ""}
    keep = {"self_attention": any(one.alpha < 1 for one in asked)}
    made = {
        branch: record_image(pipe, image, captions[branch], photo.timesteps, photo.seed, photo.size, **keep)
        for branch in sorted({one.branch for one in asked})
    }
    return {branch: own_choice(pipe, recording) for branch, recording in made.items()}


def method_questions(pipe: Any, work: Work, settings: EvaluateSettings) -> dict[str, Question]:
    """How each class is asked for, with the method's own tau and alpha for words and tokens where none are given."""
    method = method_of(settings)
    asked = questions(pipe, work, settings, settings.template)
    words = [name for name, one in asked.items() if one.by == "word"]
    if method.asks == "token" and words:
        raise InputError(f"{method.name} asks for tokens alone, and there is none for '{words[0]}'; add --tokens.")
    if isinstance(method, GocaMethod):
        return asked
    cuts = {name: method.cut(one.by == "token") for name, one in asked.items()}
    return {name: replace(one, tau=cuts[name][0], alpha=cuts[name][1]) for name, one in asked.items()}


# ------------------------------------------------------------------------------------------------ the run


@dataclass(frozen=True, eq=False)
class Result:
    """matrix: int64 `[labels, labels]`, rows the truth, columns what was found. labels: their names. images: how many."""

    matrix: np.ndarray
    labels: tuple[str, ...]
    images: int
    settings: dict[str, Any]

    @property
    def iou(self) -> dict[str, float | None]:
        """IoU of each label in [0, 1]; None for one that is neither in the truth nor was found."""
        values = iou(matrix_counts(self.matrix))
        return {
            name: None if math.isnan(value) else float(value) for name, value in zip(self.labels, values, strict=True)
        }

    @property
    def miou(self) -> float | None:
        """Mean IoU of the labels that occur, the background being one: VOC's figure."""
        return _mean(self.iou.values())

    @property
    def miou_objects(self) -> float | None:
        """The same without the background."""
        return _mean(value for name, value in self.iou.items() if name != "background")

    def text(self) -> str:
        """A Markdown table, in percent."""
        shown = [(name, value, int(self.matrix[row].sum())) for row, (name, value) in enumerate(self.iou.items())]
        rows = [[name, _percent(value), f"{pixels:,}"] for name, value, pixels in shown if value is not None]
        return "\n".join(
            [
                table(["class", "IoU %", "pixels"], rows),
                "",
                f"mIoU {_percent(self.miou)} %, without the background {_percent(self.miou_objects)} %, "
                f"over {self.images:,} images.",
            ]
        )

    def json(self) -> bytes:
        about = {
            "format": FORMAT,
            "images": self.images,
            "miou": self.miou,
            "miou_objects": self.miou_objects,
            "iou": self.iou,
            "labels": list(self.labels),
            "confusion": self.matrix.tolist(),
            "settings": self.settings,
        }
        return (json.dumps(about, ensure_ascii=False) + "\n").encode()


def _mean(values: Any) -> float | None:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def evaluate(
    pipe: Any,
    data: VocSet,
    settings: EvaluateSettings,
    out: str | Path | None = None,
    *,
    process: Process | None = None,
    workers: int | None = None,
    on_image: Callable[[int, int], None] | None = None,
) -> Result | None:
    """The method over the whole set; goes on where a run of the same settings in `out` was.

    out: the run's folder; None for one that is thrown away, in a single process. process: this process's share, for
    several that evaluate into one folder; all but the first return None. workers: processes for dense CRF and files, 0
    for none beside. on_image: called with (images done, images in all) of this process's share.
    Raises InputError, one sentence, for settings that cannot be, a folder of another run, files that cannot be read.
    """
    process = process or Process()
    settings.validate(pipe)
    for caption in sorted({item.prompt for item in data.work.items}):
        replace(settings.photo(), caption=caption).validate(pipe)
    if out is None and process.ranks > 1:
        raise InputError("Several processes need a folder that they share; add --out.")
    asked = method_questions(pipe, data.work, settings)
    about = fingerprint(pipe, data, settings, asked)
    first = process.rank == 0
    with ExitStack() as stack:
        folder = Path(out if out is not None else stack.enter_context(tempfile.TemporaryDirectory()))
        dataset.check_folder(folder, about, RUN)
        stack.enter_context(dataset.locked(folder, RUN) if first else nullcontext())
        stack.enter_context(repeatable(settings.threads))
        try:
            if first:
                _begin(folder, about)
            process.wait()
            todo, done = _share(data, folder, process)
            count = worker_count(process.ranks) if workers is None else workers
            with out_of_memory_as("A photograph does not fit in memory; choose a smaller --size."):
                for number in _run(pipe, data, todo, asked, settings, folder, count):
                    if on_image is not None:
                        on_image(done + number, done + len(todo))
            process.wait()
            return _finish(folder, data, about) if first else None
        except OSError as error:
            raise InputError(dataset.disk_sentence(error, folder, RUN)) from None
        except BrokenProcessPool:
            raise InputError(
                "A process that writes the files died, perhaps for want of memory; start the same evaluation again."
            ) from None


def fingerprint(pipe: Any, data: VocSet, settings: EvaluateSettings, asked: dict[str, Question]) -> dict[str, Any]:
    """What a result depends on, as it is kept in its folder; nothing of it names the machine."""
    values = {
        "program": FORMAT,
        **asdict(settings),
        "tokens": None if settings.tokens is None else "yes",
        "split": data.split,
        "images": len(data.names),
        "classes": list(data.work.classes),
        "data": data.fingerprint(),
        **about_model(pipe, asked),
    }
    return json.loads(json.dumps(values))  # as it will be read again: tuples are lists


def _begin(folder: Path, about: dict[str, Any]) -> None:
    """Settings before the rest: another process that begins just now must not take the folder for a stranger's."""
    (folder / ITEMS).mkdir(parents=True, exist_ok=True)
    dataset.clear_parts(folder)
    write(folder / SETTINGS, (json.dumps(about, ensure_ascii=False, indent=1) + "\n").encode())
    (folder / MASKS).mkdir(exist_ok=True)


def _share(data: VocSet, folder: Path, process: Process) -> tuple[list[Item], int]:
    """What is to be done of this process's share, and how much of it is done."""
    own = data.work.items[process.rank :: process.ranks]
    todo = [item for item in own if dataset.read_done(folder, item) is None]
    return todo, len(own) - len(todo)


def _run(
    pipe: Any,
    data: VocSet,
    items: Sequence[Item],
    asked: dict[str, Question],
    settings: EvaluateSettings,
    folder: Path,
    workers: int,
) -> Iterator[int]:
    """Does the images; gives how many are finished after each."""
    if not items:
        return
    pending: deque = deque()
    finished = 0
    with process_pool(workers) as pool:
        for item in items:
            pending.append(pool.submit(score_job, make_job(pipe, data, item, asked, settings, folder)))
            while pending and (len(pending) >= QUEUE * max(workers, 1) or pending[0].done()):
                pending.popleft().result()
                finished += 1
                yield finished
        while pending:
            pending.popleft().result()
            finished += 1
            yield finished


def _finish(folder: Path, data: VocSet, about: dict[str, Any]) -> Result:
    matrix = np.zeros((len(data.labels), len(data.labels)), dtype=np.int64)
    for item in data.work.items:
        row = dataset.read_done(folder, item)
        if row is None:
            raise InputError(f"'{data.names[item.index]}' is missing in '{folder}'; start the same evaluation again.")
        for truth, found, pixels in row["confusion"]:
            matrix[truth, found] += pixels
    result = Result(matrix, data.labels, len(data.names), about)
    write(folder / RESULTS, result.json())
    write(folder / TABLE, (result.text() + "\n").encode())
    return result
