"""The page on ZeroGPU: a Space that is lent a GPU for one function call at a time, in a forked worker process.

The Space's own process never has the GPU. Its model lies in host memory, where it reads words and answers from
recordings. What needs the GPU (drawing, looking at a photograph, learning a token) is a job: plain data that goes to
the worker, which moves its copy of the model to the GPU and leaves a file; no tensor comes back any other way.
"""

from __future__ import annotations

import math
import os
import queue
import shutil
import tempfile
import threading
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ovam_core.attention.recording import Branch, Recording
from ovam_core.errors import InputError, OutOfMemory, Stopped, is_out_of_memory
from ovam_core.io.pictures import read_photo
from ovam_core.models.load import load_pipeline
from ovam_core.models.presets import DEFAULT_HUB_MODEL, defaults_for, recommended_part
from ovam_core.optimization import Epoch, Optimized
from ovam_core.ovam import OVAM
from ovam_core.picture import Picture
from ovam_core.settings import RECIPES, GenerateSettings, OptimizeSettings, PhotoSettings
from ovam_core.tokens import Token

if TYPE_CHECKING:
    import gradio as gr

MAX_KEPT = 1_500_000_000  # bytes of a picture's recordings that come back from the worker
BEAT = 0.2  # seconds after which the worker says that it is there, and is told to stop
ENDS = ("done", "refused", "stopped", "out of memory", "broke")
DIED = (
    "The GPU was taken back before this was done (its time or its memory ran out): try again, with fewer steps or a "
    "smaller size."
)
NO_MEMORY = "The GPU has too little memory for this: choose a smaller size, or fewer steps."
NO_BATCHES = (
    "A Space on ZeroGPU is lent a GPU for one picture at a time and makes no data sets: run `ovam export`, or this "
    "page, on a machine with a GPU of its own."
)
STOPPED = "Stopped before the first epoch: nothing was learned."

# How long a call may last is asked for beforehand: seconds to begin with, to bring a gigabyte to the GPU, for one step
# or one epoch, and what of that grows with the work.
BEGIN, GIGABYTE, STEP, EPOCH = 8.0, 0.5, 0.05, 0.02
STEP_OF_SIZE = 0.02  # for a step: times the denoiser's parameters in billions, times the picture's 512 x 512 squares
EPOCH_OF_GIGABYTE = 0.1  # for an epoch: times the gigabytes of the recordings
LEAST, MOST = 15, 120  # seconds; who asks for more waits longer, or is refused


def is_zerogpu() -> bool:
    """Whether this is a Space on ZeroGPU, as its package `spaces` tells it."""
    return os.environ.get("SPACES_ZERO_GPU", "").lower() in ("1", "t", "true")


if is_zerogpu():  # before anything uses CUDA; elsewhere nobody needs the package
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # whose threads do not outlive a fork
    try:
        import spaces
    except ImportError:
        raise InputError("This Space is on ZeroGPU and lacks its package: add `spaces` to requirements.txt.") from None


def open_ovam(model: str | None = None) -> OVAM:
    """`OVAM.from_pretrained`, or its like on ZeroGPU, where it must be called before the page is launched."""
    if not is_zerogpu():
        return OVAM.from_pretrained(model)
    name = model or os.environ.get("OVAM_MODEL") or DEFAULT_HUB_MODEL
    return OnZeroGPU(load_pipeline(name, "cpu", defaults_for(name).dtype), spaces.GPU)


# ------------------------------------------------------------------------------------------------------- jobs

Report = Callable[[Any], None]
Asked = Callable[[], bool]


@dataclass(frozen=True)
class Job(ABC):
    """What the worker is to do: plain data, since a worker may have been forked long before.

    folder: where it finds and leaves its files; a file STOP in it ends the work.
    """

    folder: str

    @abstractmethod
    def run(self, ovam: OVAM, report: Report, should_stop: Asked) -> Any:
        """In the worker, with a model on the GPU. Reports and result are plain data as well."""

    @abstractmethod
    def seconds(self, ovam: OVAM) -> float:
        """How long it may last once the model is on the GPU."""

    @property
    def stop_file(self) -> Path:
        return Path(self.folder) / "stop"


@dataclass(frozen=True)
class Draw(Job):
    """An image and its recordings. Reports (steps done, steps in all); its result is the name of the file."""

    settings: GenerateSettings
    branch: Branch
    with_goca: bool
    keep: tuple[str, ...] = ()

    def run(self, ovam: OVAM, report: Report, should_stop: Asked) -> str:
        made = ovam.draw(
            self.settings,
            on_step=lambda done, total: report((done, total)),
            should_stop=should_stop,
            branch=self.branch,
            with_goca=self.with_goca,
            keep=self.keep,
        )
        return _written(ovam, made, self.folder)

    def seconds(self, ovam: OVAM) -> float:
        return self.settings.steps * _step(ovam, self.settings.width, self.settings.height)


@dataclass(frozen=True)
class Look(Job):
    """A photograph's recording, of some passes. Its result is the name of the file."""

    photo: Image.Image
    settings: PhotoSettings
    with_goca: bool
    keep: tuple[str, ...] = ()

    def run(self, ovam: OVAM, _report: Report, should_stop: Asked) -> str:
        made = ovam.look_at(
            self.photo, self.settings, should_stop=should_stop, with_goca=self.with_goca, keep=self.keep
        )
        return _written(ovam, made, self.folder)

    def seconds(self, ovam: OVAM) -> float:
        return (
            (1 + self.settings.mirror)
            * len(self.settings.timesteps)
            * _step(ovam, ovam.preset.width, ovam.preset.height)
        )


@dataclass(frozen=True)
class Learn(Job):
    """A token, learned from recordings in files. Reports epochs; its result is the token, and how the search went."""

    files: list[str]
    targets: list[np.ndarray]
    classes: tuple[str, ...]
    settings: OptimizeSettings
    start: np.ndarray | None
    more: dict[str, Any]

    def run(self, ovam: OVAM, report: Report, should_stop: Asked) -> tuple[dict[str, Any], dict[str, Any]]:
        pictures = [_on(ovam.device, ovam.load_recording(file)) for file in self.files]
        learned = ovam.learn(
            pictures,
            self.targets,
            self.classes,
            self.settings,
            start=None if self.start is None else torch.from_numpy(self.start),
            on_epoch=lambda epoch: report(_sent(epoch)),
            should_stop=should_stop,
            **self.more,
        )
        token, found = map(_sent, learned)
        return token, found

    def seconds(self, _ovam: OVAM) -> float:
        gigabytes = sum(os.path.getsize(file) for file in self.files) / 1e9
        return gigabytes * GIGABYTE + self.settings.epochs * (EPOCH + EPOCH_OF_GIGABYTE * gigabytes)


def _step(ovam: OVAM, width: int, height: int) -> float:
    """Seconds of one denoising step."""
    billions = sum(x.numel() for x in ovam.adapter.denoiser.parameters()) / 1e9
    return STEP + STEP_OF_SIZE * billions * width * height / 512**2


def _on(device: torch.device, picture: Picture) -> Picture:
    return replace(picture, recording=picture.recording.to(device))


def _sent(values: Any) -> dict[str, Any]:
    """A flat dataclass as plain data."""
    held = {one.name: getattr(values, one.name) for one in fields(values)}
    return {name: x.detach().cpu().numpy() if isinstance(x, Tensor) else x for name, x in held.items()}


def _received(kind: type, values: dict[str, Any]) -> Any:
    """What was `_sent`."""
    return kind(**{name: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for name, x in values.items()})


# ------------------------------------------------------------------------------------------- what comes back


def _written(ovam: OVAM, picture: Picture, folder: str) -> str:
    """The picture's file, with as much of its recordings as MAX_KEPT allows."""
    return str(kept(ovam, picture, MAX_KEPT).save_recording(Path(folder) / "picture.safetensors"))


def kept(ovam: OVAM, picture: Picture, most: int) -> Picture:
    """The picture with recordings of at most so many bytes, if one step of each is no more than that.

    All of them where they fit. Else the steps and grids that the model recommends; else every second step of those,
    every third, ...
    """
    if picture.nbytes <= most:
        return picture
    picture = _each(picture, lambda recording: recommended_part(ovam.pipe, recording))
    held = picture.recording.nbytes + sum(one.nbytes for one in picture.others.values())
    every = math.ceil(held / max(1, most - (picture.nbytes - held)))
    return picture if every == 1 else _each(picture, lambda one: one.select(steps=one.step_indices[::every]))


def _each(picture: Picture, change: Callable[[Recording], Recording]) -> Picture:
    others = {branch: change(one) for branch, one in picture.others.items()}
    return replace(picture, recording=change(picture.recording), others=others)


# ----------------------------------------------------------------------------------------------- the model


class OnZeroGPU(OVAM):
    """An OVAM whose pipeline lies in host memory and is run by workers that have a GPU for one call.

    gpu: `spaces.GPU`, or what does as it does: wraps a generator function, whose every call then runs in a process that
    was forked from this one, with the GPU; arguments and what it yields go between them as plain data. device: of the
    worker. The verbs take and give what OVAM's do; pictures are bound to the layers here, in host memory.
    """

    def __init__(self, pipe: Any, gpu: Callable[..., Callable[[Callable], Callable]], device: str = "cuda"):
        super().__init__(pipe)
        self._device = device
        self._in_worker = gpu(duration=self.seconds)(self._work)

    def draw(
        self,
        settings: GenerateSettings,
        *,
        on_step: Callable[[int, int], None] | None = None,
        should_stop: Asked | None = None,
        branch: Branch = "conditional",
        with_goca: bool = False,
        with_features: bool = False,
        keep: Collection[str] = (),
    ) -> Picture:
        if with_features:
            raise InputError("On ZeroGPU no features are recorded; choose a method without weights of its own.")
        settings.validate(self.pipe)
        total = self.steps_run(settings)
        if should_stop is not None and should_stop():
            raise Stopped(0, total)
        if on_step is not None:
            on_step(0, total)

        def report(steps: tuple[int, int]) -> None:
            if on_step is not None and steps[0] > 0:
                on_step(*steps)

        with _folder() as folder:
            return self.load_recording(
                self._done(Draw(folder, settings, branch, with_goca, tuple(keep)), report, should_stop)
            )

    def look_at(
        self,
        photo: Image.Image | str | Path,
        settings: PhotoSettings,
        *,
        should_stop: Asked | None = None,
        with_goca: bool = False,
        keep: Collection[str] = (),
    ) -> Picture:
        settings.validate(self.pipe)
        photo = read_photo(photo)
        if should_stop is not None and should_stop():
            raise Stopped(0, len(settings.timesteps))
        with _folder() as folder:
            return self.load_recording(
                self._done(Look(folder, photo, settings, with_goca, tuple(keep)), _ignored, should_stop)
            )

    def learn(
        self,
        pictures: Sequence[Picture],
        targets: Sequence[np.ndarray],
        classes: Sequence[str],
        settings: OptimizeSettings = RECIPES["fast"],
        *,
        start: Tensor | None = None,
        weights: Sequence[float] | None = None,
        rivals: Sequence[str] = (),
        unlabelled: int = 0,
        tau: float | None = None,
        alpha: float | None = None,
        on_epoch: Callable[[Epoch], None] | None = None,
        should_stop: Asked | None = None,
    ) -> tuple[Token, Optimized]:
        settings.validate()
        if should_stop is not None and should_stop():
            raise InputError(STOPPED)

        def report(epoch: dict[str, Any]) -> None:
            if on_epoch is not None:
                on_epoch(_received(Epoch, epoch))

        with _folder() as folder:
            job = Learn(
                folder,
                [self._part_of(picture, Path(folder) / f"{number}") for number, picture in enumerate(pictures)],
                list(targets),
                tuple(classes),
                settings,
                None if start is None else start.detach().cpu().numpy(),
                {
                    "weights": weights,
                    "rivals": tuple(rivals),
                    "unlabelled": unlabelled,
                    "tau": tau,
                    "alpha": alpha,
                },
            )
            token, found = self._done(job, report, should_stop)
        return _received(Token, token), _received(Optimized, found)

    def run(self, **_arguments: Any) -> Any:
        """Raises InputError: the pipeline is never called in this process."""
        raise InputError(NO_BATCHES)

    def seconds(self, job: Job) -> int:
        """For how long a job asks for the GPU."""
        parts = [x for x in self.pipe.components.values() if isinstance(x, torch.nn.Module)]
        gigabytes = sum(x.nbytes for part in parts for x in part.parameters()) / 1e9
        return round(min(max(BEGIN + GIGABYTE * gigabytes + job.seconds(self), LEAST), MOST))

    def _part_of(self, picture: Picture, path: Path) -> str:
        """A file with what a token is learned from."""
        recording = recommended_part(self.pipe, picture.recording)
        return str(replace(picture, recording=recording, goca=None, others={}).save_recording(path))

    def _done(self, job: Job, report: Report, should_stop: Asked | None) -> Any:
        """The result of a job. report: told what it reports. should_stop: asked several times a second; after that the
        job ends as its verb does. Raises what the verb raises, and InputError where no GPU is to be had or the worker
        died.
        """
        from gradio import Error as GradioError

        events = self._in_worker(job)
        try:
            for kind, *told in events:
                if should_stop is not None and not job.stop_file.exists() and should_stop():
                    job.stop_file.touch()
                if kind == "report":
                    report(told[0])
                elif kind == "done":
                    return told[0]
                elif kind == "stopped":
                    raise Stopped(*told)
                elif kind == "refused":
                    raise InputError(*told)
                elif kind == "out of memory":
                    raise OutOfMemory(NO_MEMORY)
                elif kind == "broke":
                    raise WorkerError(*told)
        except GradioError as error:  # of `spaces`: no time left, nobody who lends, a worker that is gone
            raise InputError(_sentence(error)) from None
        finally:
            events.close()
        raise InputError(DIED)

    # ---- in the worker

    def _work(self, job: Job) -> Iterator[tuple]:
        """Does the job in a thread of its own, and tells of it: (kind, ...) again and again, plain data."""
        told: queue.SimpleQueue = queue.SimpleQueue()
        left = threading.Event()  # whether nobody listens any more

        def work() -> None:
            try:
                ovam = OVAM(self.pipe.to(self._device))
                told.put(("done", job.run(ovam, lambda x: told.put(("report", x)), should_stop)))
            except Exception as error:
                told.put(_ending(error))

        def should_stop() -> bool:
            return left.is_set() or job.stop_file.exists()

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        try:
            kind = ""
            while kind not in ENDS:
                try:
                    news = told.get(timeout=BEAT)
                except queue.Empty:
                    news = ("beat",)
                kind = news[0]
                yield news
        finally:
            left.set()
            worker.join()


def check_batches(ovam: OVAM) -> None:
    """Raises InputError for a model that makes no data sets."""
    if isinstance(ovam, OnZeroGPU):
        raise InputError(NO_BATCHES)


class WorkerError(RuntimeError):
    """A fault of ours in the worker; the message is its traceback."""


def _ending(error: Exception) -> tuple:
    """What is told of an error, in the worker."""
    if isinstance(error, Stopped):
        return "stopped", error.steps, error.total
    if isinstance(error, OutOfMemory) or is_out_of_memory(error):
        return ("out of memory",)
    if isinstance(error, InputError):
        return "refused", str(error)
    return "broke", "".join(traceback.format_exception(error))


def _sentence(error: gr.Error) -> str:
    """What `spaces` says of a call that it did not let run, or that did not end, as one sentence."""
    if "worker" in error.title.lower():
        return DIED
    said = " ".join(str(error.message).split()).rstrip(".")
    return f"There is no GPU for this just now: {said}."


@contextmanager
def _folder() -> Iterator[str]:
    """For the files of one job."""
    folder = tempfile.mkdtemp(prefix="ovam-job-")
    try:
        yield folder
    finally:
        with suppress(OSError):
            shutil.rmtree(folder)


def _ignored(_report: Any) -> None:
    pass
