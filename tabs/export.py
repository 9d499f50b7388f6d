"""The third tab: prompts in, a segmentation data set out, as one zip."""

from __future__ import annotations

import html
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ovam_core import plot
from ovam_core.checks import MAX_SEED
from ovam_core.data.export import ExportSettings, Progress, Summary, duration, export, plan
from ovam_core.data.filters import Filters
from ovam_core.data.formats import read_labels
from ovam_core.data.prompts import (
    KINDS,
    Prompt,
    Work,
    class_list,
    parse_prompts,
    read_prompts,
    template_prompts,
    work_list,
)
from ovam_core.data.voc import VOC_CLASSES
from ovam_core.errors import InputError
from ovam_core.models.presets import defaults_for
from ovam_core.settings import MAX_STEPS

from .beside import beside
from .desk import QUIET, Desk, only_lists, only_numbers, problem, visitor
from .generate import CHECKS, whole
from .jobs import Limits

TEMPLATE, OWN = "A prompt for each class", "My own prompts"
NAMES, TOKENS = "by name", "by token, where there is one"
SHOW_EVERY = 0.5  # seconds between two looks at a running export
SHOWN = 24  # pairs of image and mask in the gallery
MAX_TEXT = 2_000_000  # characters of pasted prompts
WORK = "export"  # of this tab, by which Stop finds it
EXAMPLE = "A cat and a dog on grass\nA bus next to a bicycle on a road\nA sofa and a tv"


# -------------------------------------------------------------------------------------------- from the page


def prompts_of(
    way: str, template: str, names: list[str], text: str, file: str | None
) -> tuple[list[Prompt], tuple | None]:
    """The prompts and the class list (None: those that the prompts name). Raises InputError, one sentence."""
    classes = class_list(", ".join(names)) if names else None
    if way == TEMPLATE:
        classes = classes or tuple(VOC_CLASSES)
        return template_prompts(template or "", classes), classes
    if file:
        return read_prompts(file), classes
    if not (text or "").strip():
        raise InputError("There are no prompts; paste some, one a line, or upload a file.")
    if len(text) > MAX_TEXT:
        raise InputError(
            f"The prompts have {len(text):,} characters; at most {MAX_TEXT:,} can be pasted, upload a file."
        )
    return parse_prompts(text), classes


def within(limits: Limits, prompts: list[Prompt], images_per_prompt: Any) -> None:
    """Raises InputError where one visitor asks for too much."""
    if len(prompts) > limits.prompts:
        raise InputError(f"{len(prompts):,} prompts are too many here; at most {limits.prompts:,}.")
    if isinstance(images_per_prompt, int) and len(prompts) * images_per_prompt > limits.images:
        raise InputError(f"{len(prompts) * images_per_prompt:,} images are too many here; at most {limits.images:,}.")


def described(work: Work, settings: ExportSettings, token_bytes: list[bytes]) -> str:
    """What an export is, as text: the same text goes on in the same folder."""
    own = asdict(settings) | {"tokens": settings.tokens and [one.hex() for one in token_bytes]}
    return json.dumps([own, [asdict(item) for item in work.items]], sort_keys=True, default=str)


# ---------------------------------------------------------------------------------------------- to the page


def side_by_side(folder: Path, row: dict[str, Any]) -> tuple[Image.Image, str]:
    """An image beside its label map in VOC's colours, and a caption."""
    image = Image.open(folder / row["file_name"]).convert("RGB")
    labels = plot.label_image(read_labels(folder / row["mask_file_name"])).convert("RGB")
    both = Image.new("RGB", (2 * image.width, image.height))
    both.paste(image)
    both.paste(labels, (image.width, 0))
    return plot.enlarge(both, 384), f"{', '.join(row['classes'])} · covers {row['coverage']:.0%}"


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
        (html.escape(one["class"]), one["images"], one["kept"], one["small"], one["large"], f"{one['coverage']:.0%}")
        for one in summary.by_class()
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
        f"{done:,} of {summary.total:,} images, {summary.kept:,} kept by the filters; {summary.made:,} made in this run "
        f"of {duration(seconds)}.{skipped}{why}"
    )


# -------------------------------------------------------------------------------------------------- the tab


class ExportTab:
    """Its components and what happens on them. Made inside gr.Blocks."""

    def __init__(self, desk: Desk):
        self.desk, self.pipe, self.limits = desk, desk.pipe, desk.limits
        with gr.Row(elem_classes="columns"):
            with gr.Column(scale=5, min_width=320, elem_classes="give"):
                self._lay_out_questions()
                self._lay_out_folds()
            with gr.Column(scale=7, min_width=320, elem_classes="get"):
                self._lay_out_results()
        only_lists(self.formats)
        only_numbers(self.each, self.seed, self.low, self.high, self.steps)
        self.given = [
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
        ]
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
            value=TOKENS if self.desk.shelf.shipped else NAMES,
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
                    defaults_for(self.pipe).steps,
                    step=1,
                    label="Steps",
                    min_width=140,
                    elem_id="export-steps",
                )
                self.crf = gr.Checkbox(True, label="dCRF", min_width=80)

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
            self.begin,
            self.given,
            [self.start, self.halt, self.note, self.state],
            concurrency_id="checks",
            concurrency_limit=CHECKS,
            **QUIET,
        )
        ran = begun.success(
            self.run,
            self.given,
            [self.state, self.gallery, self.result, self.facts, self.download],
            concurrency_id="model",
            concurrency_limit=1,
            **QUIET,
        )
        ran.then(
            lambda: (gr.Button(interactive=True), gr.Button(interactive=False)),
            None,
            [self.start, self.halt],
            queue=False,
            **QUIET,
        )
        self.halt.click(self.stop_work, None, None, queue=False, **QUIET)

    def choose(self, chosen):
        return (
            gr.Textbox(visible=chosen == TEMPLATE),
            gr.Group(visible=chosen == OWN),
            [] if chosen == OWN else gr.skip(),
        )

    def stop_work(self, request: gr.Request):
        self.desk.stop(request, WORK)

    def asked(
        self,
        owner: str,
        chosen,
        pattern,
        pasted,
        uploaded,
        names,
        ask_by,
        images,
        first,
        least,
        most,
        kinds,
        number,
        refine,
    ):
        """Work and settings; everything that can be wrong is said here."""
        if not all(isinstance(name, str) for name in names or ()):
            raise InputError("The classes are no list of names; write each as text.")
        prompts, wanted = prompts_of(chosen, pattern, names or [], pasted, uploaded)
        within(self.limits, prompts, whole(images))
        settings = ExportSettings.for_model(
            self.pipe,
            steps=whole(number),
            crf=bool(refine),
            formats=("voc", *(kinds or ())),
            filters=Filters(min_coverage=least, max_coverage=most),
        )
        settings.validate(self.pipe)
        work = work_list(prompts, wanted, whole(images), whole(first), check=settings.check(self.pipe))
        if len(work.items) > self.limits.images:
            raise InputError(f"{len(work.items):,} images are too many here; at most {self.limits.images:,}.")
        if ask_by == TOKENS and self.desk.shelf.names(owner):  # copies, which `forget` takes away
            copies = self.desk.shelf.folder(owner, Path(tempfile.mkdtemp(prefix="ovam-shelf-")))
            settings = replace(settings, tokens=str(copies))
        return work, settings

    def begin(self, request: gr.Request, *values):
        try:
            work, settings = self.asked(visitor(request), *values)
            forget(settings)
        except InputError as error:
            raise problem(error) from None
        self.desk.begin(request, WORK)
        return gr.Button(interactive=False), gr.Button(interactive=True), "", bar(0, len(work.items), 0, 0.0)

    def run(self, request: gr.Request, *values):
        settings, owner = None, visitor(request)
        begun, stop = time.monotonic(), self.desk.flag(request, WORK)
        out_of_time: Callable[[], bool] = lambda: time.monotonic() - begun > self.limits.seconds  # noqa: E731
        try:
            work, settings = self.asked(owner, *values)
            bodies = [path.read_bytes() for path in sorted(Path(settings.tokens).iterdir())] if settings.tokens else []
            folder = self.desk.jobs.folder(owner, described(work, settings, bodies))
            planned = plan(self.pipe, work, settings, folder)
            if planned.largest_bytes > self.limits.megabytes * 1e6:
                raise InputError(
                    f"This would be up to {planned.largest_bytes / 1e6:,.0f} MB; at most {self.limits.megabytes:,} here."
                )
            should_stop = lambda: stop.is_set() or out_of_time()  # noqa: E731
            work_it = lambda report: self.make(work, settings, folder, report, should_stop)  # noqa: E731
            shown: list[tuple[Image.Image, str]] = []
            yield bar(planned.done, planned.images, 0, 0.0), gr.skip(), "", "", gr.DownloadButton(interactive=False)
            for reports, summary in beside(work_it, SHOW_EVERY):
                shown = [side_by_side(folder, one.row) for one in reversed(reports)][:SHOWN] + shown
                shown = shown[:SHOWN]
                last: Progress | None = reports[-1] if reports else None
                if last is not None:
                    moment = bar(last.done, last.total, last.done - planned.done, time.monotonic() - begun)
                    yield moment, shown, *[gr.skip()] * 3
            over = out_of_time() and not stop.is_set()
            packed = self.desk.jobs.pack(folder) if summary.rows else None
            yield (
                bar(len(summary.rows or ()), summary.total, 0, 0.0),
                gr.skip(),
                table(summary),
                ended(summary, time.monotonic() - begun, over),
                gr.DownloadButton(value=packed and str(packed), interactive=packed is not None),
            )
        except InputError as error:
            raise problem(error) from None
        finally:
            stop.set()  # a visitor who left ends the export too
            self.desk.end(request, WORK, stop)
            forget(settings)

    def make(
        self,
        work: Work,
        settings: ExportSettings,
        folder: Path,
        report: Callable[[Progress], None],
        should_stop: Callable[[], bool],
    ) -> Summary:
        """Without workers: each would import this whole page, for a few hundredths of a second an image."""
        with self.desk.alone():
            return export(self.pipe, work, settings, folder, workers=0, on_image=report, should_stop=should_stop)


NOTHING_YET = "<p>Images and label maps will fill this side as they are made; the data set is one zip at the end.</p>"


def forget(settings: ExportSettings | None) -> None:
    """The copies of the tokens are of no further use."""
    if settings is not None and settings.tokens:
        shutil.rmtree(settings.tokens, ignore_errors=True)
