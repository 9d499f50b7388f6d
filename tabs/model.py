"""The one model of the page: one run at a time, and what is done where memory runs short."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import gradio as gr
import torch

from ovam_core.errors import Stopped, is_out_of_memory, out_of_memory_as
from ovam_core.ovam import OVAM
from ovam_core.picture import Picture, Segmentation
from ovam_core.settings import GenerateSettings, PhotoSettings, SegmentSettings

from .session import Session, Sessions

NO_MEMORY = "The device has too little memory for this: choose a smaller size, or fewer steps."


class Model:
    """An OVAM, shared by all visitors.

    ovam: may be read, and asked about recordings, at any time; `alone` is for what drives its pipeline.
    """

    def __init__(self, ovam: OVAM, sessions: Sessions):
        self.ovam, self.sessions = ovam, sessions
        self.with_goca = ovam.serves_goca
        # Gradio lets the next run go ahead when a client is lost, while the thread of the last one still works.
        self._driving = threading.Lock()

    def draw(
        self,
        session: Session,
        settings: GenerateSettings,
        work: str,
        progress: gr.Progress,
        branch: str = "conditional",
    ) -> Picture:
        """Generates as a part of `work`, whose stop flag ends it. Raises Stopped, InputError."""
        with session.run(work) as stop:
            return self._drive(
                lambda: self.ovam.draw(
                    settings,
                    on_step=lambda done, total: progress((done, total), desc="Denoising", unit="steps"),
                    should_stop=stop.is_set,
                    branch=branch,
                    with_goca=self.with_goca,
                )
            )

    def look_at(self, session: Session, file: str, settings: PhotoSettings, work: str) -> Picture:
        """Records a photograph. Raises Stopped, InputError."""
        with session.run(work) as stop:
            if stop.is_set():  # while it waited; the passes themselves are short
                raise Stopped(0, len(settings.timesteps))
            return self._drive(lambda: self.ovam.look_at(file, settings, with_goca=self.with_goca))

    def _drive(self, run: Callable[[], Picture]) -> Picture:
        """Runs the model, alone; where memory is short, once more without the recordings of everybody."""
        with self._driving:
            try:
                return run()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise  # else the frames that hold its tensors are gone with it
            self.sessions.forget_pictures()
            torch.cuda.empty_cache()
            with out_of_memory_as(NO_MEMORY):
                return run()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """The model to oneself. Raises InputError where memory is short."""
        with self._driving, out_of_memory_as(NO_MEMORY):
            yield

    def answer(self, picture: Picture, settings: SegmentSettings) -> Segmentation:
        """Heatmaps and masks. Raises InputError."""
        with out_of_memory_as("The device has too little memory for this: ask for fewer words, or fewer steps."):
            return self.ovam.answer(picture, settings)
