"""The third tab: prompts in, a segmentation data set out, as one zip."""

from __future__ import annotations

import html
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import gradio as gr

from ovam_core.checks import MAX_PROMPT, MAX_SEED
from ovam_core.data.dataset import finished
from ovam_core.data.export import (
    Estimate,
    ExportSettings,
    Plan,
    Progress,
    Summary,
    Timings,
    duration,
    export_dataset,
    export_methods,
    plan,
)
from ovam_core.data.filters import judge
from ovam_core.data.formats import SHEET_COLUMNS, SHEET_ROWS
from ovam_core.data.layout import METADATA, SHEET
from ovam_core.data.prompts import (
    KINDS,
    Bounds,
    Item,
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
from ovam_core.settings import DEFAULT_METHOD, MAX_STEPS, Filters

from . import report
from .events import CHECKS, MODEL, QUIET, Inputs, handler
from .exports import Export, described
from .fields import crf_switch
from .model import NO_MEMORY, Model
from .report import NOTHING_YET
from .sentences import shown
from .session import LOCAL, Limits, Session, StopFlag
from .worker import in_thread
from .zerogpu import check_batches

SCRIPT = (Path(__file__).parent / "assets" / "export.js").read_text(encoding="utf-8")
TEMPLATE, OWN = "A prompt for each class", "My own prompts"
NAMES, TOKENS = "by name", "by token, where there is one"
SHOW_EVERY = 0.5  # seconds between two looks at a running export
WAITING = 4  # times the limit that a run may last with what it waits for others
MAX_TEXT = 2_000_000  # characters of pasted prompts
WORK = "export"  # of this tab, by which Stop finds it
EXAMPLE = "A cat and a dog on grass\nA bus next to a bicycle on a road\nA sofa and a tv"
COVERAGE = "<p>Images whose labels cover less, or more, of the picture than this are dropped.</p>"
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


def title_of(way: str, template: str, prompts: list[Prompt], file: str | None) -> str:
    """What an export is called in the list: its template, its first prompt, or its file."""
    if way == TEMPLATE:
        return template
    more = f" and {len(prompts) - 1:,} more" if len(prompts) > 1 else ""
    return f"{prompts[0].text[:80]}{more}" + (f" ({Path(file).name})" if file else "")


# ------------------------------------------------------------------------------------------------- how long


@dataclass(frozen=True)
class Measured:
    """A run that ended. generation, rest: seconds an image, of the denoising steps and of all else. image_bytes: of an
    image's files; sheet_bytes: of what a data set has beside them, for each image of its contact sheet.
    """

    settings: ExportSettings
    generation: float
    rest: float
    image_bytes: float
    sheet_bytes: float


class Rates:
    """How long images took lately on this server, and how large they were; one model's, thread safe."""

    def __init__(self) -> None:
        self._runs: deque[Measured] = deque(maxlen=20)

    def add(self, settings: ExportSettings, summary: Summary, seconds: float, folder: Path) -> None:
        """A run that made images, in so many seconds without what it waited for others."""
        rows = summary.rows or []
        if not summary.made or not rows:
            return
        paths = [folder / row[key] for row in rows for key in ("file_name", "mask_file_name", "heatmaps") if key in row]
        images = sum(path.stat().st_size for path in paths)
        whole = sum(path.stat().st_size for path in (folder / SHEET, folder / METADATA))
        tiles = min(len(rows), SHEET_COLUMNS * SHEET_ROWS)
        generation = summary.timings.generation / summary.made
        rest = max(0.0, seconds / summary.made - generation)
        self._runs.append(Measured(settings, generation, rest, images / len(rows), whole / tiles))

    def estimate(self, planned: Plan) -> Estimate | None:
        """What is still to be made, by the runs most like it, the mean of the last 3; None until a run has ended."""
        settings = planned.settings
        if not self._runs:
            return None
        near = sorted(self._runs, key=lambda run: _unlike(run.settings, settings))
        alike = [run for run in near if _unlike(run.settings, settings) == _unlike(near[0].settings, settings)][-3:]
        area = settings.width * settings.height
        scales = [area / (run.settings.width * run.settings.height) for run in alike]
        seconds = [
            (run.generation * settings.steps / run.settings.steps + run.rest) * scale
            for run, scale in zip(alike, scales, strict=True)
        ]
        sizes = [run.image_bytes * scale for run, scale in zip(alike, scales, strict=True)]
        size, one = mean(sizes) * (2 if "parquet" in settings.formats else 1), mean(seconds)
        sheet = mean(run.sheet_bytes for run in alike) * min(planned.images, SHEET_COLUMNS * SHEET_ROWS)
        left = planned.images - planned.done
        return Estimate(one, size, one * left, min(size * planned.images + sheet, planned.largest_bytes))


def _unlike(one: ExportSettings, other: ExportSettings) -> tuple[bool, int, bool]:
    """How far a run is from another, for `sorted`: size first, then steps, then the dense CRF."""
    return (one.width, one.height) != (other.width, other.height), abs(one.steps - other.steps), one.crf != other.crf


class Stopwatch:
    """Seconds at work, in units, and since it was made, what it waited for others included; clock: for tests."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.clock, self.begun = clock, clock()
        self._done, self._since = 0.0, None  # of the units that ended; the beginning of the one under way
        self._waited = 0.0  # for a turn

    @contextmanager
    def unit(self, turn: AbstractContextManager) -> Iterator[None]:
        """A unit, which begins once there is a turn."""
        asked = self.clock()
        with turn:
            self._since = since = self.clock()
            self._waited += since - asked
            try:
                yield
            finally:
                self._since = None
                self._done += self.clock() - since

    @property
    def working(self) -> float:
        """Seconds since it was made, without those that it waited for a turn."""
        return self.clock() - self.begun - self._waited

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
        self.limits, self.exports, self.rates = self.sessions.limits, self.sessions.exports, Rates()
        with gr.Row(elem_classes="columns"):
            with gr.Column(scale=5, min_width=320, elem_classes="give"):
                self._lay_out_questions()
                self._lay_out_folds()
                self.kept = gr.HTML(
                    "", js_on_load=f"{SCRIPT}\nexportList(element, trigger, watch);", elem_id="export-kept"
                )
            with gr.Column(scale=7, min_width=320, elem_classes="get"):
                self._lay_out_results()
        self.asked = gr.State(None)  # the number of a run, the key of what it makes, whether it is another than shown
        self.shown = gr.State(None)  # the key of the export on the right
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
            self.method,
            self.uncertain,
            self.presence,
        }
        self._wire()

    def _lay_out_questions(self) -> None:
        self.way = gr.Radio([TEMPLATE, OWN], value=TEMPLATE, show_label=False, container=False, elem_id="export-way")
        self.template = gr.Textbox(
            "A photograph of a {}",
            label="Prompt",
            info="{} is where the class goes.",
            max_lines=1,
            max_length=MAX_PROMPT,
            elem_id="template",
        )
        with gr.Group(visible=False) as self.own:
            self.text = gr.Textbox(
                "", label="Prompts, one a line", lines=5, max_lines=12, placeholder=EXAMPLE, elem_id="export-prompts"
            )
            self.file = gr.File(
                label="or a file: txt, csv, tsv, jsonl, COCO captions json",
                file_types=[f".{kind}" for kind in KINDS],
                height=150,
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
        with gr.Row(elem_classes="buttons"):
            self.start = gr.Button("Export data set", variant="primary", scale=3, min_width=120, elem_id="export")
            self.halt = gr.Button(
                "Stop: resume later", variant="stop", scale=2, min_width=120, interactive=False, elem_id="export-stop"
            )
        self.state = gr.HTML("", elem_id="export-state")
        self.note = gr.HTML("", elem_id="export-note")

    def _lay_out_folds(self) -> None:
        with gr.Accordion("Filters, formats, steps", open=False, elem_id="export-more"):
            with gr.Row():
                self.low = gr.Slider(0, 1, 0.05, step=0.01, label="Least coverage", min_width=140, elem_id="low")
                self.high = gr.Slider(0, 1, 0.95, step=0.01, label="Most coverage", min_width=140)
            gr.HTML(COVERAGE, elem_classes="hint")
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
                self.crf = gr.Checkbox(
                    **{"value": True, **crf_switch()}, label="Sharpen edges (dense CRF)", min_width=80
                )
            self.method = gr.Dropdown(
                [method.name for method in export_methods()],
                value=DEFAULT_METHOD,
                label="Method",
                info="each class's map is cut for itself",
                elem_id="export-method",
            )
            with gr.Column(min_width=140):
                self.uncertain = gr.Slider(
                    0,
                    0.5,
                    0,
                    step=0.01,
                    label="Uncertain band",
                    info="pixels this close to the threshold are 255",
                    min_width=140,
                    elem_id="uncertain",
                )
                self.presence = gr.Slider(
                    0,
                    1,
                    0,
                    step=0.01,
                    label="Least presence",
                    info="classes that are probably not in a picture are left out of its labels; 0 leaves none out",
                    min_width=140,
                    elem_id="least-presence",
                )

    def _lay_out_results(self) -> None:
        self.facts = gr.HTML("", elem_id="export-facts", elem_classes="facts")
        self.pictures = gr.HTML(NOTHING_YET, elem_id="exported")
        self.result = gr.HTML("", elem_id="export-table")
        gr.HTML("", js_on_load=f"{SCRIPT}\nexportPictures(element);", elem_id="export-dialog")

    def _wire(self) -> None:
        self.way.change(self.choose, self.way, [self.template, self.own, self.classes], queue=False, **QUIET)
        changes = [field.change for field in self.given]
        # One event of all fields: of two that run at the same time, the older could have the last word.
        gr.on(changes, self.foresee, self.given, self.note, trigger_mode="always_last", **CHECKS, **QUIET)
        begun = [self.asked, self.halt, self.note, self.state, self.kept]
        self._make_after(self.start.click(self.begin, {*self.given, self.shown}, begun, **CHECKS, **QUIET))
        self._make_after(self.kept.submit(self.resume, self.shown, begun, **CHECKS, **QUIET))
        self.kept.input(self.greet, self.given, [self.kept, self.note], **CHECKS, **QUIET)
        self.kept.delete(self.remove, None, self.kept, **CHECKS, **QUIET)
        opened = self.kept.select(
            self.open, None, [self.state, self.facts, self.pictures, self.result, self.shown], **CHECKS, **QUIET
        )
        opened.failure(self.idle, self.given, [self.halt, self.kept, self.note], **CHECKS, **QUIET)
        self.halt.click(self.stop_work, None, None, queue=False, **QUIET)

    def _make_after(self, begun: Any) -> None:
        """A second run may begin while one is under way: it takes its place."""
        outputs = [self.state, self.facts, self.pictures, self.result, self.shown, self.kept]
        ran = begun.success(self.run, self.asked, outputs, trigger_mode="multiple", **MODEL, **QUIET)
        # The page of Gradio 6 does not come to `then` where a run has failed.
        for after in (ran.then, ran.failure):
            after(self.idle, self.given, [self.halt, self.kept, self.note], trigger_mode="multiple", **CHECKS, **QUIET)

    # ---- before a run

    @handler
    def choose(self, way):
        own = way == OWN
        return gr.Textbox(visible=not own), gr.Group(visible=own), [] if own else gr.skip()

    @handler
    def stop_work(self, request: gr.Request):
        self.sessions.of(request).stop(WORK)

    @handler
    def greet(self, values: dict, request: gr.Request, event: gr.EventData):
        """A page was opened: its visitor's exports, and what the settings would make."""
        session = self.sessions.of(request)
        session.recognize(_sent(event, "visitor"))
        return self._kept(session), self._foreseen(session, values)

    @handler
    def foresee(self, values: dict, request: gr.Request):
        return self._foreseen(self.sessions.of(request), values)

    def _foreseen(self, session: Session, values: dict) -> str:
        """What the settings would make, or in one sentence why they would not."""
        try:
            with self.planned(session, Inputs(values)) as (_, planned, _):
                return report.forecast(planned, self.rates.estimate(planned), self.limits.seconds)
        except InputError as error:
            return report.refused(shown(str(error)))

    @contextmanager
    def planned(self, session: Session, given: Inputs) -> Iterator[tuple[Work, Plan, str]]:
        """The work, the plan of it (and its settings, whose folder of tokens is there inside the block), and a title;
        everything that can be wrong is said here, as InputError.
        """
        work, settings, title = self.understood(given)
        with self.tokens_of(session, given) as tokens:
            there = self.exports.find(session.visitor, described(work, settings, tokens))
            settings = replace(settings, tokens=tokens and str(tokens))
            planned = plan(self.ovam, work, settings, there and there.folder)
            if planned.largest_bytes > self.limits.megabytes * 1e6:
                megabytes = f"{planned.largest_bytes / 1e6:,.0f} MB"
                raise InputError(f"This would be up to {megabytes}; at most {self.limits.megabytes:,} here.")
            yield work, planned, title

    def understood(self, given: Inputs) -> tuple[Work, ExportSettings, str]:
        """Work, settings without tokens, and title, within the limits."""
        check_batches(self.ovam)
        names = given.names(self.classes, NO_CLASSES)
        way, template, text = given.choice(self.way), given.text(self.template), given.text(self.text)
        file = given.file(self.file)
        prompts, classes = prompts_of(way, template, names, text, file, self.limits)
        each, seed = given.whole(self.each), given.whole(self.seed)
        within(self.limits, prompts, each)
        settings = ExportSettings.for_model(
            self.ovam,
            steps=given.whole(self.steps),
            crf=given.ticked(self.crf),
            formats=("voc", *given.several(self.formats)),
            filters=Filters(min_coverage=given.number(self.low), max_coverage=given.number(self.high)),
            method=given.choice(self.method),
            uncertain=given.number(self.uncertain),
            min_presence=given.number(self.presence) or None,
        )
        settings.validate(self.ovam)
        work = work_list(prompts, classes, each, seed, check=settings.check(self.ovam))
        if len(work.items) > self.limits.images:
            raise InputError(f"{len(work.items):,} images are too many here; at most {self.limits.images:,}.")
        return work, settings, title_of(way, template, prompts, file)

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
        session, shown_now = self.sessions.of(request), values.pop(self.shown, None)
        with self.planned(session, Inputs(values)) as (work, planned, title):
            tokens = planned.settings.tokens and Path(planned.settings.tokens)
            export = self.exports.ask(session.visitor, title, work, replace(planned.settings, tokens=None), tokens)
            note = report.forecast(planned, self.rates.estimate(planned), self.limits.seconds)
        return self._begun(session, export, shown_now, note)

    @handler
    def resume(self, shown_now, request: gr.Request, event: gr.EventData):
        session = self.sessions.of(request)
        export = self.exports.get(session.visitor, _sent(event, "export"))
        return self._begun(session, export, shown_now, gr.skip())

    def _begun(self, session: Session, export: Export, shown_now: Any, note: Any) -> tuple:
        stale = shown_now is not None and shown_now != export.key
        moment = report.bar(export.done, export.total, 0, 0.0, stale=stale)
        asked = (session.replace(WORK), export.key, stale)
        return asked, gr.Button(interactive=True), note, moment, self._kept(session)

    # ---- the list of exports

    def _kept(self, session: Session) -> str:
        return report.kept(self.exports.of(session.visitor), self.exports.keep, session.visitor)

    @handler
    def idle(self, values: dict, request: gr.Request):
        """After a run: whether there is still something to stop, what is kept, and what the settings would make now."""
        session = self.sessions.of(request)
        return gr.Button(interactive=session.runs(WORK)), self._kept(session), self._foreseen(session, values)

    @handler
    def remove(self, request: gr.Request, event: gr.EventData):
        session = self.sessions.of(request)
        self.exports.remove(session.visitor, _sent(event, "export"))
        return self._kept(session)

    @handler
    def open(self, request: gr.Request, event: gr.EventData):
        """An export of the list, on the right."""
        session = self.sessions.of(request)
        if session.runs(WORK):
            raise InputError("An export is being made; stop it, or wait for its end, to look at another.")
        export = self.exports.get(session.visitor, _sent(event, "export"))
        summary = self._so_far(export)
        facts = f"<p>{html.escape(of_all(summary))}</p>{report.download(export)}"
        moment = report.bar(len(summary.rows or ()), export.total, 0, 0.0)
        return moment, facts, report.gallery(export.folder, summary.rows or ()), report.results(summary), export.key

    @staticmethod
    def _so_far(export: Export) -> Summary:
        """What there is of an export, without the run that made it."""
        filters = export.settings.filters
        rows = finished(export.folder, export.work, filters)
        return Summary(rows, export.total, 0, not export.finished, Timings(), export.work.skipped, (), filters)

    # ---- a run

    @handler
    def run(self, asked, request: gr.Request):
        number, key, stale = asked if isinstance(asked, tuple) else ("", None, False)
        session = self.sessions.of(request)
        with session.run(WORK, number) as stop:
            export = self.exports.get(session.visitor, key)
            with session.making(export, stop) as folder:
                if folder is None:
                    yield (gr.skip(),) * 6  # nothing at all would be taken for no values
                    return
                for moment in self.make(session, export, stop, stale):
                    # What has been replaced must not draw over what took its place; and Gradio sends what came last
                    # once more at the end.
                    yield moment if session.is_latest(WORK, number) else (gr.skip(),) * len(moment)
                if not session.is_latest(WORK, number):
                    yield (gr.skip(),) * 6

    def make(self, session: Session, export: Export, stop: StopFlag, stale: bool) -> Iterator[tuple]:
        """Makes the data set; gives what the page shows, again and again: how far it is, facts, pictures, results, the
        key of what is shown, the list.

        stop: ends it; a visitor who left sets it too. stale: whether the page still shows another export. Raises
        InputError as `export_dataset` does.
        """
        watch, settings, folder = Stopwatch(), export.settings, export.folder
        so_far = self._so_far(export)
        rows: list[dict[str, Any]] = so_far.rows or []
        there = export.done = len(rows)
        skip = gr.skip()

        def over() -> bool:
            return stop.is_set() or watch.over(self.limits.seconds)

        def work(report_it: Callable[[Progress | Item], None]) -> Summary:
            """Without workers: each would import this whole page, for a few hundredths of a second an image."""
            with self.model.turns.work(session) as turns, out_of_memory_as(NO_MEMORY):
                return export_dataset(
                    self.ovam,
                    export.work,
                    settings,
                    folder,
                    workers=0,
                    on_image=report_it,
                    on_batch=lambda batch: report_it(batch[0]),
                    should_stop=over,
                    turn=lambda: watch.unit(turns.unit(over, Stopped(0, settings.steps))),
                )

        if there:
            yield self._moment(export, rows, there, watch, None)
        now: Item | None = None
        for reports, result in in_thread(work, SHOW_EVERY):
            now = next((one for one in reversed(reports) if isinstance(one, Item)), now)
            new = [one.row for one in reports if isinstance(one, Progress)]
            rows, export.done = [*rows, *new], len(rows) + len(new)
            if new:
                yield self._moment(export, rows, there, watch, now)
            elif result is None and not rows:
                yield report.bar(0, export.total, 0, 0.0, now, stale), *[skip] * 5
            summary = result
        export.done = len(summary.rows or ())
        self.rates.add(settings, summary, watch.working, folder)
        if summary.rows:
            export.pack()
        late = watch.over(self.limits.seconds) and not stop.is_set()
        about = ended(summary, export, watch.working, late, str(self.ovam.device))
        yield (
            report.bar(export.done, export.total, 0, 0.0),
            f"<p>{html.escape(about)}</p>{report.download(export)}",
            report.gallery(folder, summary.rows or ()),
            report.results(summary),
            export.key,
            skip,  # `idle` brings it, once the run has ended
        )

    def _moment(
        self, export: Export, rows: list[dict[str, Any]], there: int, watch: Stopwatch, now: Item | None
    ) -> tuple:
        """What the page shows while it runs. there: images that an earlier run made."""
        filters = export.settings.filters
        judged = judge(rows, filters)
        summary = Summary(judged, export.total, 0, True, Timings(), export.work.skipped, (), filters)
        seconds = time.monotonic() - watch.begun
        moment = report.bar(export.done, export.total, export.done - there, seconds, now)
        pictures = report.gallery(export.folder, judged)
        return moment, "", pictures, report.results(summary), export.key, gr.skip()


def of_all(summary: Summary) -> str:
    """How many of a data set's images there are, and are kept."""
    done, skipped = len(summary.rows or ()), len(summary.skipped)
    left_out = f" {report.counted(skipped, 'prompt was', 'prompts were')} skipped." if skipped else ""
    return f"{done:,} of {report.counted(summary.total, 'image')}, {summary.kept:,} kept by the filters.{left_out}"


def ended(summary: Summary, export: Export, seconds: float, over_time: bool, device: str) -> str:
    """The line of facts after a run."""
    why = ""
    if summary.stopped:
        why = " The time for one run is over:" if over_time else " Stopped:"
        why += " Resume goes on where it was."
    seeds = [item.seed for item in export.work.items]
    seed = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {min(seeds)} to {max(seeds)}"
    return (
        f"{of_all(summary)} {summary.made:,} made in this run of {duration(seconds)} · "
        f"{report.counted(export.settings.steps, 'step')} · {seed} · {device}.{why}"
    )


def _sent(event: Any, name: str) -> str:
    """A text that came with an event of the page's script; "" for anything else."""
    data = getattr(event, "_data", None)
    value = data.get(name) if isinstance(data, dict) else None
    return value if isinstance(value, str) and value.isascii() else ""
