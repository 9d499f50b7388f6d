"""The one model of the page: who has it when, and what is done where memory runs short."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import gradio as gr
import torch

from ovam_core.errors import InputError, Stopped, is_out_of_memory, out_of_memory_as
from ovam_core.ovam import OVAM
from ovam_core.picture import Picture, Segmentation
from ovam_core.settings import GenerateSettings, PhotoSettings, SegmentSettings

from .session import Session, Sessions, StopFlag
from .turns import Turns

NO_MEMORY = "The device has too little memory for this: choose a smaller size, or fewer steps."
ANSWER = "answer"  # the work of words, by which Stop finds it
MAX_LABELS = 80  # words and classes of tokens in one answer: CLIP's longest sentence has 75, COCO 80
CHEAP = 32 * 32  # pixels of a finest grid whose self-attention matrix is always kept: 4 MB
SHORT = 0.5  # seconds that a turn lasts at least, where units are shorter than that: an epoch, a word
ANSWER_STOPPED = "Stopped before all words were answered; ask again."


class Model:
    """An OVAM, shared by all visitors.

    ovam: may be read, and asked about recordings, at any time; what drives its pipeline, or is long, needs a turn.
    turns, answering: at the model, and at the processor, which makes maps and masks of recordings meanwhile.
    """

    def __init__(self, ovam: OVAM, sessions: Sessions):
        self.ovam, self.sessions = ovam, sessions
        self.with_goca = ovam.serves_goca
        self.turns, self.answering = Turns(), Turns()

    def draw(
        self,
        session: Session,
        settings: GenerateSettings,
        work: str,
        progress: gr.Progress,
        branch: str = "conditional",
        number: str = "",
        keep: Collection[str] = (),
    ) -> Picture:
        """Generates as a part of `work`, whose stop flag ends it; number: of `Session.replace`; keep: of `OVAM.draw`.
        Raises Stopped, InputError.
        """
        with session.run(work, number) as stop:
            progress((0, settings.steps), desc="Waiting for the model", unit="steps")
            return self._drive(
                session,
                stop,
                settings.steps,
                lambda: self.ovam.draw(
                    settings,
                    on_step=lambda done, total: progress((done, total), desc="Denoising", unit="steps"),
                    should_stop=stop.is_set,
                    branch=branch,
                    with_goca=self.with_goca,
                    keep=self.kept(keep, (settings.height, settings.width)),
                ),
            )

    def look_at(
        self,
        session: Session,
        file: str,
        settings: PhotoSettings,
        work: str,
        number: str = "",
        keep: Collection[str] = (),
    ) -> Picture:
        """Records a photograph; keep: as in `draw`. Raises Stopped, InputError."""
        size = settings.size or (self.ovam.preset.height, self.ovam.preset.width)
        kept = self.kept(keep, size)
        with session.run(work, number) as stop:
            return self._drive(
                session,
                stop,
                len(settings.timesteps),
                lambda: self.ovam.look_at(file, settings, should_stop=stop.is_set, with_goca=self.with_goca, keep=kept),
            )

    def kept(self, keep: Collection[str], size: tuple[int, int]) -> frozenset[str]:
        """What to keep on request, of an image of (height, width): what is cheap, too, for methods chosen later."""
        finest = min(self.ovam.adapter.strides)
        cheap = {"matrix"} if (size[0] // finest) * (size[1] // finest) <= CHEAP else set()
        return frozenset(keep) | cheap

    def _drive(self, session: Session, stop: StopFlag, steps: int, run: Callable[[], Picture]) -> Picture:
        """Runs the model in a turn; where memory is short, once more without the recordings of everybody."""
        with self.turns.work(session) as work, work.unit(stop.is_set, Stopped(0, steps)):
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
    def words_of(self, session: Session) -> Iterator[Callable[..., None]]:
        """A work of answering; gives what is to be called before each word, where others may go first once the turn has
        lasted SHORT seconds, or as many as it is called with.

        Both raise InputError: where the visitor has too many such works, and where it was stopped.
        """
        with session.run(ANSWER) as stop, self.answering.work(session) as work:

            def before_word(least: float = SHORT) -> None:
                if not work.next_unit(stop.is_set, least):
                    raise InputError(ANSWER_STOPPED)

            before_word()
            yield before_word

    def answer(
        self, picture: Picture, settings: SegmentSettings, before_word: Callable[[], None] | None = None
    ) -> Segmentation:
        """Heatmaps and masks. before_word: called before the mask of each. Raises InputError."""
        self.check_labels(settings)
        with out_of_memory_as("The device has too little memory for this: ask for fewer words, or fewer steps."):
            return self.ovam.answer(picture, settings, on_label=before_word)

    def check_labels(self, settings: SegmentSettings) -> None:
        """Raises InputError for more than MAX_LABELS."""
        count = len(settings.words) + sum(len(token.names) for token in settings.tokens)
        if settings.sentence and not settings.words:
            count += sum(len(query.labels) for query in self.ovam.queries(settings) if query.kind != "token")
        if count > MAX_LABELS:
            raise InputError(f"{count} words and classes of tokens are too many at once; ask for at most {MAX_LABELS}.")
