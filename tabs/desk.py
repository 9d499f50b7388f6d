"""What stands behind all tabs: the model, the visitors' recordings and their stop flags."""

from __future__ import annotations

import html
import math
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
import torch

from ovam_core.errors import InputError, Stopped, is_out_of_memory, out_of_memory_as
from ovam_core.hooks.goca_recorder import record_goca
from ovam_core.ovam import ask, generate, photograph
from ovam_core.picture import Generation, Maps
from ovam_core.settings import GenerateSettings, MapSettings, PhotoSettings

from .jobs import LOCAL, Jobs, limits
from .shelf import Shelf
from .store import Store

# Events that are no part of the API, and those without a progress bar of Gradio's.
PRIVATE = {"api_visibility": "private"}
QUIET = {"show_progress": "hidden", **PRIVATE}
GRACE = 300.0  # seconds: a laptop that slept, or a lost network, is no visitor who left
NO_IMAGE = "There is no recorded image in this session (any more); generate one first."

NO_MEMORY = "The device has too little memory for this: choose a smaller size, or fewer steps."


def problem(error: Exception) -> gr.Error:
    """An InputError as a message of the page; gradio renders HTML, and the sentence may quote the visitor."""
    return gr.Error(html.escape(str(error), quote=False), print_exception=False)


def only_numbers(*fields: gr.Slider | gr.Number) -> None:
    """A client may send text, "NaN" for one, at which a field itself only fails: say what is wrong instead."""

    def checked(field: gr.Slider | gr.Number, read: Callable) -> Callable:
        def preprocess(value: Any) -> Any:
            if value is None and isinstance(field, gr.Number):  # left empty
                return read(value)
            if not isinstance(value, (int, float)) or not math.isfinite(value):
                raise gr.Error(
                    f"{field.label} is {html.escape(str(value)[:40])}; give a number.", print_exception=False
                )
            if getattr(field, "precision", None) == 0 and value != int(value):  # gradio would round it in silence
                raise gr.Error(f"{field.label} is {value}; give a whole number.", print_exception=False)
            return read(value)

        return preprocess

    for field in fields:
        field.preprocess = checked(field, field.preprocess)


def only_lists(*fields: gr.CheckboxGroup) -> None:
    """A client may send no list, at which a field itself only fails: none ticked is the same."""

    def checked(read: Callable) -> Callable:
        return lambda value: read(value if isinstance(value, list) else [])

    for field in fields:
        field.preprocess = checked(field.preprocess)


def visitor(request: gr.Request) -> str:
    """Whose picture, tokens and stop flag: one session of the page, or of an API client."""
    return request.session_hash or "api"


def serves_goca(pipe: Any) -> bool:
    """Whether GoCA's pass can be recorded with this model."""
    try:
        record_goca(pipe)
    except InputError:
        return False
    return True


class Desk:
    """The one model and what visitors have made with it; a visitor is a session of the page, or of the API."""

    def __init__(self, pipe: Any, store: Store):
        self.pipe, self.store, self.shelf = pipe, store, Shelf(pipe.ovam_name)
        self.with_goca = serves_goca(pipe)
        self.limits = limits()
        self.jobs = Jobs(self.limits.keep, shared=self.limits is LOCAL)
        self.stops: dict[tuple[str, str], threading.Event] = {}
        # Gradio lets the next run go ahead when a client is lost, while the thread of the last one still works.
        self.driving = threading.Lock()
        self._seen: dict[str, float] = {}
        self._zips: dict[str, Path] = {}

    def draw(
        self,
        settings: GenerateSettings,
        work: str,
        request: gr.Request,
        progress: gr.Progress,
        branch: str = "conditional",
    ) -> Generation:
        """Generates as a part of `work`, whose stop flag ends it. Raises Stopped, InputError."""
        stop = self.flag(request, work)
        try:
            return self._drive(
                lambda: generate(
                    self.pipe,
                    settings,
                    on_step=lambda done, total: progress((done, total), desc="Denoising", unit="steps"),
                    should_stop=stop.is_set,
                    branch=branch,
                    with_goca=self.with_goca,
                )
            )
        finally:
            self.end(request, work, stop)

    def look(self, file: str, settings: PhotoSettings, work: str, request: gr.Request) -> Generation:
        """Records a photograph. Raises Stopped, InputError."""
        stop = self.flag(request, work)
        try:
            if stop.is_set():  # while it waited; the passes themselves are short
                raise Stopped(0, len(settings.timesteps))
            return self._drive(lambda: photograph(self.pipe, file, settings, self.with_goca))
        finally:
            self.end(request, work, stop)

    def _drive(self, work: Callable[[], Generation]) -> Generation:
        """Runs the model, alone; where memory is short, once more without the recordings of everybody."""
        with self.driving:
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise  # else the frames that hold its tensors are gone with it
            self.store.clear()
            torch.cuda.empty_cache()
            with out_of_memory_as(NO_MEMORY):
                return work()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """The model to oneself. Raises InputError where memory is short."""
        with self.driving, out_of_memory_as(NO_MEMORY):
            yield

    def keep(self, made: Generation, request: gr.Request) -> str:
        """Keeps a recording for the visitor and returns its id; their oldest one may have to go."""
        return self.store.put(visitor(request), made)

    def find(self, key: str | None) -> Generation:
        made = self.store.get(key)
        if made is None:
            raise InputError(NO_IMAGE)
        return made

    def answer(self, made: Generation, asked: MapSettings) -> Maps:
        """Maps and masks. Raises InputError."""
        with out_of_memory_as("The device has too little memory for this: ask for fewer words, or fewer steps."):
            return ask(self.pipe, made, asked)

    def stop(self, request: gr.Request, *works: str) -> None:
        """Stops these works of the visitor; without a name, all."""
        for (owner, work), event in list(self.stops.items()):
            if owner == visitor(request) and (not works or work in works):
                event.set()

    def begin(self, request: gr.Request, work: str) -> None:
        """A new stop flag for a run that is about to be queued, so that Stop works while it waits as well."""
        self._seen[visitor(request)] = time.monotonic()
        self.stops[visitor(request), work] = threading.Event()

    def flag(self, request: gr.Request, work: str) -> threading.Event:
        """The stop flag of the visitor's run."""
        self._seen[visitor(request)] = time.monotonic()
        return self.stops.setdefault((visitor(request), work), threading.Event())

    def end(self, request: gr.Request, work: str, flag: threading.Event) -> None:
        """The run of this flag is over; one that was queued meanwhile keeps its own."""
        if self.stops.get((visitor(request), work)) is flag:
            del self.stops[visitor(request), work]

    def zip_folder(self, request: gr.Request) -> Path:
        """Where the visitor's download is packed: one at a time, the next in place of the last."""
        owner = visitor(request)
        if owner not in self._zips:
            self._zips[owner] = Path(tempfile.mkdtemp(prefix="ovam-zip-"))
        for old in self._zips[owner].iterdir():
            old.unlink()
        return self._zips[owner]

    def leave(self, request: gr.Request) -> None:
        """The visitor closed the page, or the connection broke: their runs stop, and after GRACE what they have goes."""
        self.stop(request)
        owner, left = visitor(request), time.monotonic()

        def forget() -> None:
            if self._seen.get(owner, 0.0) < left:
                self.forget(owner)

        timer = threading.Timer(GRACE, forget)
        timer.daemon = True
        timer.start()

    def forget(self, owner: str) -> None:
        """Frees what a visitor has: recordings, tokens, exports, downloads, flags."""
        self._seen.pop(owner, None)
        for one in [one for one in self.stops if one[0] == owner]:
            self.stops.pop(one, None)
        self.store.drop_owner(owner)
        self.shelf.drop_owner(owner)
        self.jobs.drop_owner(owner)
        if folder := self._zips.pop(owner, None):
            shutil.rmtree(folder, ignore_errors=True)
