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

from . import dataset, plot
from .dataset import IGNORE, MASKS
from .evaluate import confusion_matrix, iou, matrix_counts, table
from .export import (
    QUEUE,
    Process,
    Question,
    about_model,
    cores,
    digest,
    process_pool,
    questions,
    repeatable,
    weigh,
    worker_count,
)
from .files import write
from .goca import record_goca
from .heatmap import resize
from .mask import densecrf, label_map
from .memory import short_memory_says
from .methods import GocaMethod, Method, Seen, maps_and_masks, method_named
from .photo import (
    TIMESTEPS,
    PhotoSettings,
    caption_of,
    denoise,
    prepare,
    read_photo,
    record_image,
)
from .plot import VOC_CLASSES
from .prompts import MAX_SEED, Item, Work, check_classes, find_classes, match_class
from .recorder import Recording, own_choice, record

FORMAT = "ovam-evaluate/1"
RUN = "evaluation"  # what messages call it
RESULTS, TABLE = "results.json", "results.md"
SUFFIXES = (".jpg", ".jpeg", ".png")
GROUND_TRUTH = "gt"


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
        """Raises ValueError, one sentence, for what cannot be evaluated."""
        method = method_named(self.method)
        self.photo().validate(pipe)
        if method.needs_goca and (len(self.timesteps) > 1 or self.template != "{}"):
            raise ValueError(f"{method.name} looks at one timestep and takes no template; leave the others out.")
        if isinstance(method, GocaMethod) and (self.alpha is not None or self.crf):
            raise ValueError(f"{method.name} has neither alpha nor a dense CRF; leave these settings out.")
        for name, value in (("tau", self.tau), ("alpha", self.alpha)):
            real = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is not None and not (real and math.isfinite(value) and 0 <= value <= 1):
                raise ValueError(f"The setting {name} is {value}; choose a number from 0 to 1.")
        threads = self.threads
        if threads is not None and (
            isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= 1024
        ):
            raise ValueError(f"The number of threads is {threads}; choose a whole number from 1 to 1024.")

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


# ------------------------------------------------------------------------------------------------ the data set


@dataclass(frozen=True)
class VocSet:
    """The images of a split. work: an item an image, its prompt the caption and its classes what is asked for;
    names: of their files, in the same order.
    """

    root: Path
    split: str
    names: tuple[str, ...]
    work: Work

    @property
    def labels(self) -> tuple[str, ...]:
        """The name of each label, from 0."""
        return ("background", *self.work.classes)

    def photo(self, item: Item) -> Path:
        return _photo_file(self.root, self.names[item.index])

    def truth(self, item: Item) -> np.ndarray:
        return read_truth(_truth_file(self.root, self.names[item.index]), len(self.work.classes))

    def fingerprint(self) -> str:
        """Changes with the list, the captions, the classes and the sizes of the files."""
        rows = [
            [
                name,
                item.prompt,
                *item.classes,
                self.photo(item).stat().st_size,
                _truth_file(self.root, name).stat().st_size,
            ]
            for name, item in zip(self.names, self.work.items, strict=True)
        ]
        return digest(json.dumps(rows).encode())


def read_voc(
    root: str | Path, split: str = "val", classes_from: str | Path = GROUND_TRUTH, limit: int | None = None
) -> VocSet:
    """The images of ROOT/ImageSets/Segmentation/<split>.txt, at most `limit`, with what is asked for in each.

    classes_from: "gt", the classes of the image's own truth; or a JSON file, by image name a caption, in which the
    classes are found by name and synonym, or a list of classes, or {"caption": ..., "classes": [...]}. Where there is no
    caption one lists the classes. Raises ValueError, one sentence, for what is missing or cannot be read.
    """
    root = Path(root)
    if limit is not None and limit < 1:
        raise ValueError(f"The limit is {limit}; choose a whole number from 1.")
    names = read_names(root, split)[:limit]
    classes = read_classes(root)
    for name in names:
        for file in (_photo_file(root, name), _truth_file(root, name)):
            if not file.is_file():
                raise ValueError(f"'{file.relative_to(root)}' is missing in '{root}', though {split}.txt names it.")
    if str(classes_from) == GROUND_TRUTH:
        wanted = [("", _present(_truth_file(root, name), classes)) for name in names]
    else:
        wanted = read_wanted(Path(classes_from), names, classes)
    items = [Item(index, caption or caption_of(own), "", 0, own) for index, (caption, own) in enumerate(wanted)]
    return VocSet(root, split, tuple(names), Work(tuple(items), classes))


def read_names(root: Path, split: str) -> list[str]:
    """The names of a split, in the order of its list."""
    if not split or Path(split).name != split:
        raise ValueError(f"'{split[:40]}' is not the name of a split; write for example val.")
    file = root / dataset.SETS / f"{split}.txt"
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise ValueError(
            f"There is no list of images '{file}' that can be read: is '{root}' a data set in VOC layout?"
        ) from None
    names = [line.split()[0] for line in lines if line.strip()]
    if not names:
        raise ValueError(f"The list '{file}' names no image.")
    for name in names:
        if Path(name).name != name or "\0" in name or name.startswith("."):
            raise ValueError(f"'{name[:80]}' in {split}.txt is not the name of an image.")
    if len(set(names)) < len(names):
        raise ValueError(f"The list '{file}' names an image twice.")
    return names


def read_classes(root: Path) -> tuple[str, ...]:
    """The classes of labels 1, 2, ...: the lines of ROOT/classes.txt after the background, VOC's without that file."""
    file = root / dataset.CLASSES
    if not file.exists():
        return VOC_CLASSES
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError):
        raise ValueError(f"'{file}' is no list of class names that can be read.") from None
    if lines[:1] != ["background"]:
        raise ValueError(f"The first line of '{file}' must be background, the name of label 0.")
    return check_classes(lines[1:])


def read_truth(path: Path, classes: int) -> np.ndarray:
    """The label map in a palette or grey PNG, uint8 `[H, W]`: 0 background, 1 to `classes`, 255 ignored."""
    try:
        with Image.open(path) as picture:
            mode, labels = picture.mode, np.array(picture)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise ValueError(f"'{path}' is not a label map that can be read.") from None
    if mode not in ("P", "L"):
        raise ValueError(
            f"'{path}' is of mode {mode}; a label map is a palette or grey PNG whose values are the labels."
        )
    highest = int(labels[labels != IGNORE].max(initial=0))
    if highest > classes:
        raise ValueError(f"'{path}' holds the label {highest}, but there are {classes} classes.")
    return labels


def read_wanted(file: Path, names: Sequence[str], classes: tuple[str, ...]) -> list[tuple[str, tuple[str, ...]]]:
    """(caption or "", classes) of each image from a JSON file; see `read_voc`."""
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"There is no file '{file}'; give gt or a JSON file of captions or classes.") from None
    except (OSError, ValueError, RecursionError):
        raise ValueError(f"'{file}' is not a JSON file that can be read.") from None
    if not isinstance(rows, dict):
        raise ValueError(f"'{file}' must be a JSON object with a caption or a list of classes by image name.")
    return [_wanted(rows.get(name), name, classes) for name in names]


def _wanted(row: Any, name: str, classes: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    if row is None:
        raise ValueError(f"The prompts say nothing of the image '{name}'.")
    if isinstance(row, str):
        return row.strip(), find_classes(row, classes)
    if isinstance(row, list):
        row = {"classes": row}
    caption, stated = (row.get("caption") or "", row.get("classes")) if isinstance(row, dict) else (None, None)
    is_list = isinstance(stated, list) and all(isinstance(one, str) for one in stated)
    if not isinstance(caption, str) or not (is_list or (stated is None and caption)):
        raise ValueError(
            f"The prompt of '{name}' is neither a caption nor a list of classes, nor an object with these."
        )
    if stated is None:
        return caption.strip(), find_classes(caption, classes)
    matched = {one: match_class(one, classes) for one in stated}
    unknown = [one for one, match in matched.items() if match is None]
    if unknown:
        raise ValueError(f"The class '{unknown[0][:60]}' of '{name}' is not among the classes of the data set.")
    return caption.strip(), tuple(one for one in classes if one in matched.values())


def _present(file: Path, classes: tuple[str, ...]) -> tuple[str, ...]:
    ids = np.unique(read_truth(file, len(classes)))
    return tuple(classes[label - 1] for label in ids if label not in (0, IGNORE))


def _photo_file(root: Path, name: str) -> Path:
    files = [root / dataset.IMAGES / f"{name}{suffix}" for suffix in SUFFIXES]
    return next((file for file in files if file.is_file()), files[0])


def _truth_file(root: Path, name: str) -> Path:
    return root / MASKS / f"{name}.png"


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
    """The photograph of an item, recorded and asked. Raises ValueError for files that do not belong together."""
    image, truth = read_photo(data.photo(item)), data.truth(item)
    if truth.shape != (image.height, image.width):
        raise ValueError(
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
        raise ValueError(f"{method.name} looks at one pass, but its tokens belong to different halves of a batch.")
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
        raise ValueError(f"{method.name} asks for tokens alone, and there is none for '{words[0]}'; add --tokens.")
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
    Raises ValueError, one sentence, for settings that cannot be, a folder of another run, files that cannot be read.
    """
    process = process or Process()
    settings.validate(pipe)
    for caption in sorted({item.prompt for item in data.work.items}):
        replace(settings.photo(), caption=caption).validate(pipe)
    if out is None and process.ranks > 1:
        raise ValueError("Several processes need a folder that they share; add --out.")
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
            with short_memory_says("A photograph does not fit in memory; choose a smaller --size."):
                for number in _run(pipe, data, todo, asked, settings, folder, count):
                    if on_image is not None:
                        on_image(done + number, done + len(todo))
            process.wait()
            return _finish(folder, data, about) if first else None
        except OSError as error:
            raise ValueError(dataset.disk_sentence(error, folder, RUN)) from None
        except BrokenProcessPool:
            raise ValueError(
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
    (folder / dataset.ITEMS).mkdir(parents=True, exist_ok=True)
    dataset.clear_parts(folder)
    write(folder / dataset.SETTINGS, (json.dumps(about, ensure_ascii=False, indent=1) + "\n").encode())
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
            raise ValueError(f"'{data.names[item.index]}' is missing in '{folder}'; start the same evaluation again.")
        for truth, found, pixels in row["confusion"]:
            matrix[truth, found] += pixels
    result = Result(matrix, data.labels, len(data.names), about)
    write(folder / RESULTS, result.json())
    write(folder / TABLE, (result.text() + "\n").encode())
    return result
