"""The third tab: prompts in, a segmentation data set out, as one zip."""

from __future__ import annotations

import html
import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ovam_core.checks import MAX_SEED
from ovam_core.data.export import ExportSettings, Progress, Summary, duration, export_dataset, plan
from ovam_core.data.prompts import (
    KINDS,
    Bounds,
    Prompt,
    Work,
    class_list,
    parse_prompts,
    read_prompts,
    template_prompts,
    work_list,
)
from ovam_core.data.voc import VOC_CLASSES
from ovam_core.errors import InputError, Stopped, out_of_memory_as
from ovam_core.settings import MAX_STEPS, Filters

from .events import CHECKS, MODEL, QUIET, Inputs, give_back, handler
from .fields import crf_switch
from .model import NO_MEMORY, Model
from .render import side_by_side
from .session import LOCAL, Limits, Session, StopFlag, pack
from .worker import in_thread

TEMPLATE, OWN = "A prompt for each class", "My own prompts"
NAMES, TOKENS = "by name", "by token, where there is one"
SHOW_EVERY = 0.5  # seconds between two looks at a running export
WAITING = 4  # times the limit that a run may last with what it waits for others
SHOWN = 24  # pairs of image and mask in the gallery
MAX_TEXT = 2_000_000  # characters of pasted prompts
WORK = "export"  # of this tab, by which Stop finds it
EXAMPLE = "A cat and a dog on grass\nA bus next to a bicycle on a road\nA sofa and a tv"
NOTHING_YET = "<p>Images and label maps will fill this side as they are made; the data set is one zip at the end.</p>"
NO_CLASSES = "The classes are no list of names; write each as text."


# -------------------------------------------------------------------------------------------- from the page


def prompts_of(
    way: str, template: str, names: list[str], text: str, file: str | None, limits: Limits = LOCAL
) -> tuple[list[Prompt], tuple | None]:
    """The prompts and the class list (None: those that the prompts name). Raises InputError, one sentence; what is too
    large is refused before it is read.
    """
    classes = class_list(", ".join(names)) if names else None
    if way == TEMPLATE:
        classes = classes or tuple(VOC_CLASSES)
        return template_prompts(template, classes), classes
    if file:
        return read_prompts(file, Bounds(limits.text, limits.prompts)), classes
    if not text.strip():
        raise InputError("There are no prompts; paste some, one a line, or upload a file.")
    return parse_prompts(text, bounds=Bounds(min(MAX_TEXT, limits.text), limits.prompts)), classes


def within(limits: Limits, prompts: list[Prompt], images_per_prompt: Any) -> None:
    """Raises InputError where one visitor asks for too much."""
    if len(prompts) > limits.prompts:
        raise InputError(f"{len(prompts):,} prompts are too many here; at most {limits.prompts:,}.")
    if isinstance(images_per_prompt, int) and len(prompts) * images_per_prompt > limits.images:
        raise InputError(f"{len(prompts) * images_per_prompt:,} images are too many here; at most {limits.images:,}.")


def described(work: Work, settings: ExportSettings, tokens: Path | None) -> str:
    """What an export is, as text: the same text goes on in the same folder. tokens: the folder of those asked for."""
    bodies = None if tokens is None else [path.read_bytes().hex() for path in sorted(tokens.iterdir())]
    about = asdict(settings) | {"tokens": bodies}
    return json.dumps([about, [asdict(item) for item in work.items]], sort_keys=True, default=str)


# ---------------------------------------------------------------------------------------------- to the page


def bar(done: int, total: int, new: int, seconds: float) -> str:
    """How far it is, how fast, how long still."""
    rate = new / seconds if new and seconds > 0 else 0.0
    pace = f" · {rate * 60:.0f} a minute · {duration((total - done) / rate)} left" if rate and done < total else ""
    return (
        f'<div class="bar"><progress max="{total}" value="{done}" aria-label="images done"></progress>'
        f"<span><b>{done:,}</b> of {total:,}{pace}</span></div>"
    )


def table(summary: Summary) -> str:
    """Class, images, kept, dropped and why, as HTML."""
    if not summary.rows:
        return "<p>No image was finished.</p>"
    heads = ("class", "images", "kept", "too small", "too large", "mean coverage")
    rows = [
        (html.escape(row["class"]), row["images"], row["kept"], row["small"], row["large"], f"{row['coverage']:.0%}")
        for row in summary.by_class()
    ]
    head = "".join(f"<th>{name}</th>" for name in heads)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<table class="summary"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def ended(summary: Summary, seconds: float, over_time: bool) -> str:
    done = len(summary.rows or ())
    why = ""
    if summary.stopped:
        why = " The time for one run is over:" if over_time else " Stopped:"
        why += " press Export again to go on where it was."
    skipped = f" {len(summary.skipped):,} prompts were skipped." if summary.skipped else ""
    return html.escape(
        f"{done:,} of {summary.total:,} images, {summary.kept:,} kept by the filters; {summary.made:,} made in this "
        f"run of {duration(seconds)}.{skipped}{why}"
    )


class Stopwatch:
    """Seconds at work, in units, and since it was made, what it waited for others included; clock: for tests."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.clock, self.begun = clock, clock()
        self._done, self._since = 0.0, None  # of the units that ended; the beginning of the one under way

    @contextmanager
    def unit(self, turn: AbstractContextManager) -> Iterator[None]:
        """A unit, which begins once there is a turn."""
        with turn:
            self._since = since = self.clock()
            try:
                yield
            finally:
                self._since = None
                self._done += self.clock() - since

    def over(self, seconds: float) -> bool:
        """Whether the work has taken longer than this, or all of it WAITING times as long."""
        since = self._since
        at_work = self._done + (0.0 if since is None else self.clock() - since)
        return at_work > seconds or self.clock() - self.begun > WAITING * seconds


# -------------------------------------------------------------------------------------------------- the tab


class ExportTab:
    """Its components and what happens on them. Made inside gr.Blocks."""

    def __init__(self, model: Model):
        self.model, self.sessions, self.ovam = model, model.sessions, model.ovam
        self.limits = self.sessions.limits
        with gr.Row(elem_classes="columns"):
            with gr.Column(scale=5, min_width=320, elem_classes="give"):
                self._lay_out_questions()
                self._lay_out_folds()
            with gr.Column(scale=7, min_width=320, elem_classes="get"):
                self._lay_out_results()
        self.given = {
            self.way,
            self.template,
            self.text,
            self.file,
            self.classes,
            self.by,
            self.each,
            self.seed,
            self.low,
            self.high,
            self.formats,
            self.steps,
            self.crf,
        }
        self._wire()

    def _lay_out_questions(self) -> None:
        self.way = gr.Radio([TEMPLATE, OWN], value=TEMPLATE, show_label=False, container=False, elem_id="export-way")
        self.template = gr.Textbox(
            "A photograph of a {}", label="Prompt", info="{} is where the class goes.", max_lines=1, elem_id="template"
        )
        with gr.Group(visible=False) as self.own:
            self.text = gr.Textbox(
                "", label="Prompts, one a line", lines=5, max_lines=12, placeholder=EXAMPLE, elem_id="export-prompts"
            )
            self.file = gr.File(
                label="or a file: txt, csv, tsv, jsonl, COCO captions json",
                file_types=[f".{kind}" for kind in KINDS],
                height=110,
                elem_id="export-file",
            )
        self.classes = gr.Dropdown(
            list(VOC_CLASSES),
            value=["cat", "dog"],
            multiselect=True,
            allow_custom_value=True,
            label="Classes",
            info="Any words. None: all 20 VOC classes, or those that your prompts name.",
            elem_id="export-classes",
        )
        self.by = gr.Radio(
            [NAMES, TOKENS],
            value=TOKENS if self.sessions.shipped else NAMES,
            label="Ask for a class",
            elem_id="export-by",
        )
        with gr.Row():
            self.each = gr.Number(
                2,
                label="Images a prompt",
                precision=0,
                minimum=1,
                maximum=self.limits.images,
                min_width=90,
                elem_id="each",
            )
            self.seed = gr.Number(0, label="First seed", precision=0, minimum=0, maximum=MAX_SEED, min_width=90)
        self.note = gr.HTML("", elem_id="export-note", elem_classes="note")
        with gr.Row(elem_classes="buttons"):
            self.start = gr.Button("Export data set", variant="primary", scale=3, min_width=120, elem_id="export")
            self.halt = gr.Button(
                "Stop: resume later", variant="stop", scale=2, min_width=120, interactive=False, elem_id="export-stop"
            )

    def _lay_out_folds(self) -> None:
        with gr.Accordion("Filters, formats, steps", open=False, elem_id="export-more"):
            with gr.Row():
                self.low = gr.Slider(0, 1, 0.05, step=0.01, label="Least coverage", min_width=140, elem_id="low")
                self.high = gr.Slider(0, 1, 0.95, step=0.01, label="Most coverage", min_width=140)
            self.formats = gr.CheckboxGroup(
                ["coco", "parquet"], value=[], label="Beside the VOC layout", info="coco: instances with RLE"
            )
            with gr.Row():
                self.steps = gr.Slider(
                    1,
                    MAX_STEPS,
                    self.ovam.preset.steps,
                    step=1,
                    label="Steps",
                    min_width=140,
                    elem_id="export-steps",
                )
                self.crf = gr.Checkbox(**{"value": True, **crf_switch()}, label="dCRF", min_width=80)

    def _lay_out_results(self) -> None:
        self.state = gr.HTML(NOTHING_YET, elem_id="export-state")
        self.gallery = gr.Gallery(
            label="Image and label map",
            columns=3,
            height="auto",
            object_fit="contain",
            format="png",
            interactive=False,
            preview=False,
            buttons=["download", "fullscreen"],
            elem_id="exported",
            elem_classes="gallery",
        )
        self.result = gr.HTML("", elem_id="export-table")
        with gr.Row(elem_classes="end"):
            self.facts = gr.HTML("", elem_id="export-facts", elem_classes="facts")
            self.download = gr.DownloadButton(
                "Download zip", interactive=False, scale=1, min_width=150, elem_id="export-download"
            )

    def _wire(self) -> None:
        self.way.change(self.choose, self.way, [self.template, self.own, self.classes], queue=False, **QUIET)
        begun = self.start.click(
            self.begin, self.given, [self.start, self.halt, self.note, self.state], **CHECKS, **QUIET
        )
        ran = begun.success(
            self.run, self.given, [self.state, self.gallery, self.result, self.facts, self.download], **MODEL, **QUIET
        )
        give_back(ran, self.start, self.halt)
        self.halt.click(self.stop_work, None, None, queue=False, **QUIET)

    @handler
    def choose(self, way):
        own = way == OWN
        return gr.Textbox(visible=not own), gr.Group(visible=own), [] if own else gr.skip()

    @handler
    def stop_work(self, request: gr.Request):
        self.sessions.of(request).stop(WORK)

    def understood(self, given: Inputs) -> tuple[Work, ExportSettings]:
        """Work and settings, without tokens; everything that can be wrong is said here."""
        names = given.names(self.classes, NO_CLASSES)
        texts = given.text(self.template), names, given.text(self.text)
        prompts, classes = prompts_of(given.choice(self.way), *texts, given.file(self.file), self.limits)
        each, seed = given.whole(self.each), given.whole(self.seed)
        within(self.limits, prompts, each)
        settings = ExportSettings.for_model(
            self.ovam,
            steps=given.whole(self.steps),
            crf=given.ticked(self.crf),
            formats=("voc", *given.several(self.formats)),
            filters=Filters(min_coverage=given.number(self.low), max_coverage=given.number(self.high)),
        )
        settings.validate(self.ovam)
        work = work_list(prompts, classes, each, seed, check=settings.check(self.ovam))
        if len(work.items) > self.limits.images:
            raise InputError(f"{len(work.items):,} images are too many here; at most {self.limits.images:,}.")
        return work, settings

    @contextmanager
    def tokens_of(self, session: Session, given: Inputs) -> Iterator[Path | None]:
        """A folder of the tokens to ask for, for as long as they are needed; None to ask by name."""
        if given.choice(self.by) == NAMES or not session.token_names():
            yield None
            return
        with session.token_copies() as folder:
            yield folder

    @handler
    def begin(self, values: dict, request: gr.Request):
        session, given = self.sessions.of(request), Inputs(values)
        work, _ = self.understood(given)
        given.choice(self.by)
        session.begin(WORK)
        return gr.Button(interactive=False), gr.Button(interactive=True), "", bar(0, len(work.items), 0, 0.0)

    @handler
    def run(self, values: dict, request: gr.Request):
        session, given = self.sessions.of(request), Inputs(values)
        work, settings = self.understood(given)
        with session.run(WORK) as stop, self.tokens_of(session, given) as tokens:
            settings = replace(settings, tokens=tokens and str(tokens))
            with session.export_folder(described(work, settings, tokens)) as folder:
                yield from self.make(session, work, settings, folder, stop)

    def make(
        self, session: Session, work: Work, settings: ExportSettings, folder: Path, stop: StopFlag
    ) -> Iterator[tuple]:
        """Makes the data set in `folder`; gives what the page shows, again and again.

        stop: ends it; a visitor who left sets it too. Raises InputError as `plan` and `export_dataset` do.
        """
        watch = Stopwatch()
        planned = plan(self.ovam, work, settings, folder)
        if planned.largest_bytes > self.limits.megabytes * 1e6:
            megabytes = f"{planned.largest_bytes / 1e6:,.0f} MB"
            raise InputError(f"This would be up to {megabytes}; at most {self.limits.megabytes:,} here.")

        def over() -> bool:
            return stop.is_set() or watch.over(self.limits.seconds)

        def export(report: Callable[[Progress], None]) -> Summary:
            """Without workers: each would import this whole page, for a few hundredths of a second an image."""
            with self.model.turns.work(session) as turns, out_of_memory_as(NO_MEMORY):
                return export_dataset(
                    self.ovam,
                    work,
                    settings,
                    folder,
                    workers=0,
                    on_image=report,
                    should_stop=over,
                    turn=lambda: watch.unit(turns.unit(over, Stopped(0, settings.steps))),
                )

        shown: list[tuple[Image.Image, str]] = []
        yield bar(planned.done, planned.images, 0, 0.0), gr.skip(), "", "", gr.DownloadButton(interactive=False)
        for reports, result in in_thread(export, SHOW_EVERY):
            shown = [*(side_by_side(folder, report.row) for report in reversed(reports[-SHOWN:])), *shown][:SHOWN]
            if reports:
                last: Progress = reports[-1]
                moment = bar(last.done, last.total, last.done - planned.done, time.monotonic() - watch.begun)
                yield moment, shown, *[gr.skip()] * 3
            summary = result
        late = watch.over(self.limits.seconds) and not stop.is_set()
        packed = pack(folder) if summary.rows else None
        yield (
            bar(len(summary.rows or ()), summary.total, 0, 0.0),
            gr.skip(),
            table(summary),
            ended(summary, time.monotonic() - watch.begun, late),
            gr.DownloadButton(value=packed and str(packed), interactive=packed is not None),
        )
