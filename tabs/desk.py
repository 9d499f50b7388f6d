"""What stands behind all tabs: the model, the visitors' recordings and their stop flags."""

from __future__ import annotations

import html
import math
import threading
import time
from collections.abc import Callable
from typing import Any

import gradio as gr

from ovam_core.generate import GenerateSettings, Generation, Maps, MapSettings, Stopped, ask, generate
from ovam_core.goca import record_goca
from ovam_core.photo import PhotoSettings, photograph

from .jobs import Jobs, limits
from .shelf import Shelf
from .store import Store

NO_IMAGE = "There is no recorded image in this session (any more); generate one first."


def problem(error: Exception) -> gr.Error:
    """A ValueError of ours as a message of the page; gradio renders HTML, and the sentence may quote the visitor."""
    return gr.Error(html.escape(str(error), quote=False), print_exception=False)


def only_numbers(*fields: gr.Slider) -> None:
    """A client may send text, "NaN" for one, at which a slider itself only fails: say what is wrong instead."""

    def checked(field: gr.Slider, read: Callable) -> Callable:
        def preprocess(value: Any) -> Any:
            if not isinstance(value, (int, float)) or not math.isfinite(value):
                raise gr.Error(f"{field.label} is {html.escape(str(value)[:40])}; give a number.", print_exception=False)
            return read(value)

        return preprocess

    for field in fields:
        field.preprocess = checked(field, field.preprocess)


def visitor(request: gr.Request) -> str:
    """Whose picture, tokens and stop flag: one session of the page, or of an API client."""
    return request.session_hash or "api"


def serves_goca(pipe: Any) -> bool:
    """Whether GoCA's pass can be recorded with this model."""
    try:
        record_goca(pipe)
    except ValueError:
        return False
    return True


class Desk:
    """The one model and what visitors have made with it; a visitor is a session of the page, or of the API."""

    def __init__(self, pipe: Any, store: Store):
        self.pipe, self.store, self.shelf = pipe, store, Shelf(pipe.ovam_name)
        self.with_goca = serves_goca(pipe)
        self.limits = limits()
        self.jobs = Jobs(self.limits.keep)
        self.stops: dict[str, threading.Event] = {}

    def make(self, settings: GenerateSettings, request: gr.Request, progress: gr.Progress) -> tuple[str, Generation]:
        """Generates, keeps the recording, and returns its id with it. Raises Stopped, ValueError."""
        session, stop = visitor(request), self.flag(request)
        try:
            made = generate(
                self.pipe,
                settings,
                on_step=lambda done, total: progress((done, total), desc="Denoising", unit="steps"),
                should_stop=stop.is_set,
                with_goca=self.with_goca,
            )
        finally:
            self.end(request)
        return self.store.put(session, made), made

    def look(self, file: str, settings: PhotoSettings, request: gr.Request) -> tuple[str, Generation]:
        """Records a photograph, keeps the recording, and returns its id with it. Raises Stopped, ValueError."""
        session, stop = visitor(request), self.flag(request)
        try:
            if stop.is_set():  # while it waited; the passes themselves are short
                raise Stopped(0, len(settings.timesteps))
            made = photograph(self.pipe, file, settings, self.with_goca)
        finally:
            self.end(request)
        return self.store.put(session, made), made

    def find(self, key: str | None) -> Generation:
        made = self.store.get(key)
        if made is None:
            raise ValueError(NO_IMAGE)
        return made

    def answer(self, made: Generation, asked: MapSettings) -> tuple[Maps, float]:
        """Maps and masks, and the seconds they took."""
        begun = time.perf_counter()
        for last_try in (False, False, True):
            try:
                maps = ask(self.pipe, made, asked)
                return maps, time.perf_counter() - begun
            except RuntimeError as error:
                # A tokenizer in Rust refuses to be used in two threads at the same instant; a generation may do so.
                if last_try or "borrowed" not in str(error):
                    raise
                time.sleep(0.05)
        raise AssertionError

    def stop(self, request: gr.Request) -> None:
        event = self.stops.get(visitor(request))
        if event is not None:
            event.set()

    def flag(self, request: gr.Request) -> threading.Event:
        """The stop flag of the visitor's run."""
        return self.stops.setdefault(visitor(request), threading.Event())

    def begin(self, request: gr.Request) -> None:
        """A new stop flag for a run that is about to be queued, so that Stop works while it waits as well."""
        self.stops[visitor(request)] = threading.Event()

    def end(self, request: gr.Request) -> None:
        """The run is over; the next one gets a flag of its own."""
        self.stops.pop(visitor(request), None)

    def leave(self, request: gr.Request) -> None:
        """The visitor closed the page."""
        self.stop(request)
        self.store.drop_owner(visitor(request))
        self.shelf.drop_owner(visitor(request))
        self.jobs.drop_owner(visitor(request))
