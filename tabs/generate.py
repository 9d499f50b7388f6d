"""The first tab: a picture, made or uploaded, then the heatmap and mask of any word."""

from __future__ import annotations

import html
import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from ovam_core import plot
from ovam_core.attention.evolution import Evolution
from ovam_core.checks import MAX_PROMPT, MAX_SEED
from ovam_core.data.voc import VOC_CLASSES
from ovam_core.errors import InputError, Stopped
from ovam_core.io.names import slugs
from ovam_core.methods import METHODS, check_settings, method_named
from ovam_core.models.load import learned_words, unknown_words
from ovam_core.models.starting import starts_from_pictures
from ovam_core.ovam import OVAM
from ovam_core.picture import Picture, Segmentation
from ovam_core.query import halves_of, token_query
from ovam_core.settings import (
    DEFAULT_METHOD,
    MAX_GUIDANCE,
    MAX_STEPS,
    MAX_TOKENS,
    MIN_SIDE,
    PLAIN,
    S_CFG,
    S_CFG_AVERAGE,
    GenerateSettings,
    PhotoSettings,
    SegmentSettings,
)
from ovam_core.tokens import SUFFIX, Token, last_part

from . import viewer
from .asked import NO_TOKENS, grid_names, prompt_words, recommended_grid_names, renewal, segment_settings
from .events import CHECKS, MAPS, MODEL, PRIVATE, QUIET, Inputs, handler, letterbox, shown
from .examples import EXAMPLES, buttons
from .fields import MAX_UPLOAD_MB, PhotoFields, check_photo, crf_switch, small_enough, takes_photographs
from .link import read, written
from .model import ANSWER, Model
from .render import run_facts, shrunk
from .session import FIRST, NO_IMAGE, Session
from .worker import in_thread

# Of which half of the guided batch words are asked; None as the model has it.
PROMPTS = "the prompt"
HALVES_OF = {PROMPTS: None, "the negative prompt": "unconditional"}

# How the guidance is spread over the picture.
KINDS = [("the same everywhere", PLAIN), ("by region", S_CFG), ("by region, plain averages", S_CFG_AVERAGE)]

# Where the picture comes from, and what the button then says.
MAKE, UPLOAD = "From a prompt", "From a photograph"
DOES = {MAKE: "Generate", UPLOAD: "Find the words"}

WORK = "generate"  # of this tab, by which Stop finds it
SHOW_EVERY = 0.2  # seconds between two looks at a running model
MAX_BESIDE = 3  # methods beside the chosen one
MAX_CANDIDATES = 24  # of the prompt's words
SMALL = 64  # pixels of a picture's longer side where only the maps' own grid matters
SCRIPT = (Path(__file__).parent / "assets" / "generate.js").read_text(encoding="utf-8")
FETCH = "() => setTimeout(() => document.querySelector('#archive').click(), 150)"  # once the page has its address
# Where a call fails, nothing may wait for it any more: another picture, the answer of words, a strip.
FAILED = "() => window.ovamPage.failed()"
UNANSWERED = "() => window.ovamPage.unanswered()"
NO_STRIP = "() => window.ovamPage.strip({})"
ALWAYS = ("prompt", "words", "seed")  # in the address, whatever they are


# -------------------------------------------------------------------------------------------- to the page


def zip_name(settings: GenerateSettings | PhotoSettings) -> str:
    """A file name that says what is in it."""
    return f"{stem(settings)}.zip"


def stem(settings: GenerateSettings | PhotoSettings) -> str:
    kind = "photo-noise" if isinstance(settings, PhotoSettings) else "seed"
    return f"ovam-{kind}-{settings.seed}"


def unknown_words_hint(ovam: OVAM, *texts: str) -> str:
    """What to say of words that the model never learned: its maps of them are no finding. HTML, or "" """
    unknown = unknown_words(ovam.pipe, *texts)
    if not unknown:
        return ""
    listed = ", ".join(unknown[:8]) + (" …" if len(unknown) > 8 else "")
    said = f"{ovam.name} never learned: {listed}. Such words mean nothing to it."
    return f'<span class="hint">{html.escape(said)}</span>'


def vocabulary(ovam: OVAM) -> str:
    """What a model of few words is, and its words, a button each, as HTML; "" for a model whose words are not known."""
    words = learned_words(ovam.pipe)
    if not words:
        return ""
    listed = "".join(f'<button type="button">{html.escape(word)}</button>' for word in words)
    return (
        f"<details><summary>{html.escape(ovam.name)} is a tiny demo model that knows {len(words)} words: "
        f"<u>see them</u></summary><p>{listed}</p></details>"
    )


# --------------------------------------------------------------------------------------------------- the tab


class GenerateTab:
    """Its components and what happens on them. Made inside gr.Blocks.

    key: the id of its picture; pick: its list of tokens; renewed: the last `renewal` of one; all of use to other tabs.
    """

    def __init__(self, model: Model):
        self.model, self.sessions, self.ovam = model, model.sessions, model.ovam
        self.key, self.renewed = gr.State(None), gr.State(("", ""))
        with gr.Row(elem_classes=["columns", "three"]):
            with gr.Column(scale=4, min_width=320, elem_classes="give"):
                self._lay_out_questions()
            with gr.Column(scale=8, min_width=320, elem_classes="get"):
                self._lay_out_picture()
                self._lay_out_how()
                self._lay_out_end()
            with gr.Column(scale=4, min_width=320, elem_classes="more"):  # where there is room, below the first
                self._lay_out_examples()
                self._lay_out_folds()
        self._lay_out_wires()
        self.of_prompt = [self.prompt, self.negative, self.seed, self.steps, self.guidance, self.width, self.height]
        self.of_prompt += [self.guided, self.begin_with, self.strength, self.both]
        self.asked_by = [
            self.words,
            self.sentence,
            self.tau,
            self.alpha,
            self.crf,
            self.used,
            self.grids,
            self.pick,
            self.method,
            self.beside,
            self.half,
        ]
        self.everything = {self.number, self.source, *self.of_prompt, *self.upload.all, *self.asked_by}
        self.linked = {
            "prompt": self.prompt,
            "words": self.words,
            "seed": self.seed,
            "negative": self.negative,
            "steps": self.steps,
            "guidance": self.guidance,
            "guided": self.guided,
            "width": self.width,
            "height": self.height,
            "tau": self.tau,
            "alpha": self.alpha,
            "crf": self.crf,
            "method": self.method,
            "beside": self.beside,
            "used": self.used,
            "grids": self.grids,
            "sentence": self.sentence,
            "half": self.half,
        }
        preset = self.ovam.preset
        self.usual = {
            "prompt": "",
            "words": "",
            "seed": 0,
            "negative": "",
            "steps": preset.steps,
            "guidance": float(preset.guidance),
            "guided": PLAIN,
            "width": preset.width,
            "height": preset.height,
            "tau": float(preset.tau),
            "alpha": float(preset.alpha),
            "crf": bool(crf_switch().get("value", True)),
            "method": DEFAULT_METHOD,
            "beside": [],
            "used": "",
            "grids": recommended_grid_names(self.ovam),
            "sentence": "",
            "half": PROMPTS,
        }
        self._wire_runs()
        self._wire_maps()
        self._wire_links()
        self._wire_files()

    # ---- the left column: what you give

    def _lay_out_questions(self) -> None:
        self.source = gr.Radio(
            [MAKE, UPLOAD],
            value=MAKE,
            show_label=False,
            container=False,
            elem_id="source",
            elem_classes="ways",
            visible=takes_photographs(self.ovam),
        )
        with gr.Column(elem_classes="part") as self.for_prompt:
            self.prompt = gr.Textbox(
                EXAMPLES[0].prompt, label="Prompt", lines=1, max_lines=4, max_length=MAX_PROMPT, elem_id="prompt"
            )
        with gr.Column(visible=False, elem_classes="part") as self.for_photo:
            noise = self.ovam.adapter.photo_timestep
            self.upload = PhotoFields("photo", "the words below", self.sessions.limits.pixels, noise)
        self.words = gr.Textbox(
            EXAMPLES[0].words,
            label="Words to look for",
            info="Comma separated, phrases allowed. Change them at any time: the picture stays.",
            lines=1,
            max_lines=3,
            max_length=MAX_PROMPT,
            elem_id="words",
        )
        self.note = gr.HTML("", elem_id="note", elem_classes="note")
        with gr.Row(elem_classes="buttons"):
            self.start = gr.Button("Generate", variant="primary", scale=3, min_width=120, elem_id="generate")
            self.halt = gr.Button("Stop", variant="stop", scale=1, min_width=80, interactive=False, elem_id="stop")

    def _lay_out_examples(self) -> None:
        with gr.Column(elem_classes="part") as self.for_examples:
            gr.HTML(buttons(self.ovam.name), js_on_load=None, apply_default_css=False, elem_id="examples")
        if known := vocabulary(self.ovam):
            gr.HTML(known, js_on_load=None, apply_default_css=False, elem_id="vocabulary")

    def _lay_out_folds(self) -> None:
        with (
            gr.Column(elem_classes="part") as self.more,
            gr.Accordion("Seed, steps, size, negative prompt", open=False, elem_id="advanced"),
        ):
            with gr.Row(elem_classes="seed"):
                self.seed = gr.Number(
                    EXAMPLES[0].seed,
                    label="Seed",
                    precision=0,
                    minimum=0,
                    maximum=MAX_SEED,
                    scale=3,
                    min_width=120,
                    elem_id="seed",
                )
                self.dice = gr.Button("🎲 Random", scale=1, min_width=110, elem_id="dice")
            self.negative = gr.Textbox(
                "",
                label="Negative prompt",
                placeholder="what the picture should not show",
                max_length=MAX_PROMPT,
                elem_id="negative",
            )
            self.both = gr.Checkbox(
                False,
                label="Record the negative prompt's half, too",
                info="so that words can be asked of it; twice the memory",
                elem_id="both",
            )
            self.steps = gr.Slider(1, MAX_STEPS, self.ovam.preset.steps, step=1, label="Steps", elem_id="steps")
            self.guidance = gr.Slider(0, MAX_GUIDANCE, self.ovam.preset.guidance, step=0.1, label="Guidance")
            self.guided = gr.Radio(
                KINDS,
                value=PLAIN,
                label="Strength of the guidance",
                info="By region is S-CFG: words weaker than the rest get more of it. Slower by about a quarter.",
                visible=self.ovam.serves_s_cfg,
                elem_id="guided",
            )
            with gr.Row():
                sides = {
                    "minimum": MIN_SIDE,
                    "maximum": self.ovam.preset.max_size,
                    "step": self.ovam.adapter.side_multiple,
                }
                self.width = gr.Slider(value=self.ovam.preset.width, label="Width", min_width=130, **sides)
                self.height = gr.Slider(value=self.ovam.preset.height, label="Height", min_width=130, **sides)
        with (
            gr.Column(elem_classes="part") as self.from_picture,
            gr.Accordion(
                "Start from a picture", open=False, elem_id="start-fold", visible=starts_from_pictures(self.ovam.pipe)
            ),
        ):
            self.begin_with = gr.Image(
                label="Start picture",
                show_label=False,
                type="filepath",
                sources=["upload", "clipboard"],
                buttons=[],
                height=180,
                placeholder=f"Drop a picture here, or click to choose one\nJPEG or PNG, up to {MAX_UPLOAD_MB} MB",
                elem_id="start-file",
                elem_classes="upload",
                alt_text="The picture to start from",
            )
            self.strength = gr.Slider(
                0.05,
                1,
                0.6,
                step=0.05,
                label="Strength",
                info="how much of it is drawn anew: the share of the steps that are run",
                elem_id="strength",
            )
        with gr.Accordion("Tokens", open=False, elem_id="token-fold"):
            self.pick = gr.Dropdown(
                [*self.sessions.shipped, *self.sessions.published],
                value=[],
                multiselect=True,
                max_choices=MAX_TOKENS,
                label="Tokens to look for",
                info="Each stands in for a class name, at the threshold of its file until a slider is moved.",
                elem_id="tokens",
            )
            self.bring = gr.UploadButton("Add a token file", file_types=[SUFFIX], size="sm", elem_id="bring")

    # ---- the right column: what you get

    def _lay_out_picture(self) -> None:
        gr.HTML('<p id="said" role="status" aria-live="polite"></p>', js_on_load=None)
        self.view = gr.HTML(
            viewer.skeleton(),
            js_on_load=f"{viewer.SCRIPT}\nwindow.ovamView = ovamViewer(element.querySelector('.ovam-viewer'));",
            apply_default_css=False,
            elem_id="viewer",
        )
        with gr.Row(elem_classes="live"):
            self.tau = gr.Slider(
                0,
                1,
                self.ovam.preset.tau,
                step=0.01,
                label="Threshold",
                info="τ: share of its peak at which a mask begins",
                scale=5,
                min_width=200,
                elem_id="tau",
            )
            self.alpha = gr.Slider(
                0,
                1,
                self.ovam.preset.alpha,
                step=0.01,
                label="Self-attention floor",
                info="α: lower trusts the picture's grouping more",
                scale=5,
                min_width=200,
                elem_id="alpha",
            )
            self.crf = gr.Checkbox(
                **{"value": True, "info": "dense CRF, on the server", **crf_switch()},
                label="Sharpen edges",
                scale=3,
                min_width=150,
                elem_id="crf",
            )
        if about := self.ovam.adapter.about:
            gr.HTML(html.escape(about), elem_id="about", elem_classes="facts")

    def _lay_out_how(self) -> None:
        names = [
            (f"{method.name}: {method.about}", method.name) for method in METHODS.values() if self.ovam.serves(method)
        ]
        with gr.Accordion(f"Method: {DEFAULT_METHOD}", open=False, elem_id="methods") as self.methods:
            self.method = gr.Radio(
                names, value=DEFAULT_METHOD, show_label=False, container=False, elem_id="method", elem_classes="listed"
            )
            self.beside = gr.CheckboxGroup(
                [name for _, name in names],
                value=[],
                label="Side by side with",
                info=f"up to {MAX_BESIDE} more methods, in columns beneath the picture",
                elem_id="beside",
            )
        with gr.Accordion("Which steps, which resolutions, full attribution sentence", open=False, elem_id="which"):
            with gr.Row():
                self.used = gr.Textbox(
                    "",
                    label="Denoising steps",
                    info="0 is the first: 0-9, or 3, 5, 8, or all",
                    min_width=150,
                    placeholder="the model's own choice",
                    max_length=MAX_PROMPT,
                    elem_id="used",
                )
                self.half = gr.Radio(
                    list(HALVES_OF), value=PROMPTS, label="Maps of", info="the half of the guided batch", elem_id="half"
                )
                self.grids = gr.CheckboxGroup(
                    grid_names(self.ovam),
                    value=recommended_grid_names(self.ovam),
                    label="Attention grids",
                    info="as shares of the image's side",
                    min_width=190,
                    elem_id="grids",
                )
            self.sentence = gr.Textbox(
                "",
                label="Full attribution sentence",
                info="Its tokens compete with one another. Words above are then looked up in it; "
                "without words every token gets a map.",
                placeholder="a photograph of a cat and a car",
                max_length=MAX_PROMPT,
                elem_id="sentence",
            )
        self.how_note = gr.HTML("", elem_id="how-note", elem_classes="note")

    def _lay_out_end(self) -> None:
        with gr.Row(elem_classes="end"):
            self.facts = gr.HTML("", elem_id="map-facts", elem_classes="facts")
            self.pack = gr.Button("Download all", scale=1, min_width=140, interactive=False, elem_id="pack")
        self.archive = gr.DownloadButton("zip", visible="hidden", elem_id="archive")
        gr.HTML('<section id="history" aria-label="Pictures of this session"></section>', js_on_load=None)

    def _lay_out_wires(self) -> None:
        """What only the page's script touches."""
        hidden = {"visible": "hidden"}
        self.number = gr.Textbox("", elem_id="run-number", **hidden)
        self.link = gr.Textbox("", label="The address", elem_id="link-in", max_length=8000, **hidden)
        self.follow = gr.Button("Follow", elem_id="link-go", **hidden)
        self.recall = gr.Button("Recall", elem_id="recall-go", **hidden)
        self.open = gr.Button("Open", elem_id="open-go", **hidden)
        self.typed = gr.Button("Redraw", elem_id="typed", **hidden)
        self.others = gr.Button("Other words", elem_id="candidates-go", **hidden)
        self.evolve = gr.Button("When it appeared", elem_id="strip-go", **hidden)
        self.film = gr.Button("Save the animation", elem_id="film-go", **hidden)
        self.strip_of = gr.Textbox("", label="When it appeared", elem_id="strip-of", max_length=2000, **hidden)
        self.answers, self.candidates, self.strip = (
            letterbox("ovamPage", name) for name in ("answer", "candidates", "strip")
        )
        gr.HTML("", js_on_load=SCRIPT, visible="hidden", elem_id="page-script")

    # ---- what is asked, and its answer

    def image_settings(self, given: Inputs) -> GenerateSettings:
        """The left column as settings, not validated yet."""
        start = small_enough(given.file(self.begin_with), self.sessions.limits.pixels)
        return GenerateSettings(
            prompt=given.text(self.prompt),
            negative_prompt=given.text(self.negative),
            seed=given.whole(self.seed),
            steps=given.whole(self.steps),
            guidance=given.number(self.guidance),
            guidance_kind=given.choice(self.guided),
            width=given.whole(self.width),
            height=given.whole(self.height),
            start=start,
            strength=given.number(self.strength) if start else 0.6,
        )

    def asked_for(
        self, session: Session, picture: Picture | None, given: Inputs, method: str | None = None
    ) -> SegmentSettings:
        """method: in place of the chosen one."""
        names = given.names(self.pick, NO_TOKENS)
        if len(names) > MAX_TOKENS:  # before any is read
            raise InputError(f"{len(names):,} tokens are too many; give at most {MAX_TOKENS}.")
        asked = segment_settings(
            self.ovam,
            picture,
            words=given.text(self.words),
            sentence=given.text(self.sentence),
            tau=given.number(self.tau),
            alpha=given.number(self.alpha),
            crf=given.ticked(self.crf),
            steps=given.text(self.used),
            grids=given.several(self.grids),
            tokens=[session.token(name) for name in names],
            method=method or given.text(self.method),
        )
        return replace(asked, branch=HALVES_OF[given.choice(self.half)])

    def beside_it(self, given: Inputs) -> list[str]:
        """The methods that are ticked beside the chosen one."""
        names = [name for name in given.several(self.beside) if name != given.text(self.method)]
        if len(names) > MAX_BESIDE:
            raise InputError(f"{len(names)} methods side by side are too many; tick at most {MAX_BESIDE}.")
        return names

    def wanted(
        self, session: Session, given: Inputs
    ) -> tuple[GenerateSettings | PhotoSettings, str | None, SegmentSettings]:
        """What makes the picture, not validated yet, the file of a photograph, and what is asked."""
        asked = self.asked_for(session, None, given)
        if given.choice(self.source) == MAKE:
            return self.image_settings(given), None, asked
        file, settings = self.upload.read(self.ovam, given, asked)
        return settings, file, asked

    def answer_of(
        self, session: Session, key: str, picture: Picture, given: Inputs, with_picture: bool = True
    ) -> tuple[dict[str, Any], str]:
        """The payload of the viewer, and a line of facts; with_picture: False where the page has it already.

        Raises InputError for what cannot be answered.
        """
        asked, whole = self.asked_for(session, picture, given), session.picture(key)
        others, failed = [], []
        with self.model.words_of(session) as before_word:
            begun = time.perf_counter()
            found = self.model.answer(picture, asked, before_word)
            for method in self.beside_it(given):
                try:
                    other = self.asked_for(session, picture, given, method)
                    others.append(self.model.answer(picture, other, before_word))
                except InputError as error:
                    failed.append(viewer.failed_column(method, str(error)))
        seconds = time.perf_counter() - begun
        many = f"{len(found.labels)} map{'s' if len(found.labels) > 1 else ''} by {asked.method}"
        facts = f"{many} from the recording in {seconds:.2f} s, the picture untouched"
        every = [found, *others]
        payload = viewer.answer(
            every,
            [self.ovam.received_attention(one) for one in every],
            self.ovam.preset,
            key=key,
            facts=run_facts(whole),
            stem=stem(picture.settings),
            token_names=given.names(self.pick, NO_TOKENS),
            with_picture=with_picture,
        )
        payload["columns"] += failed
        payload["picture"]["full"] = list(whole.image.size)
        return payload | {"words": given.text(self.words), "link": self.link_of(picture, given)}, facts

    def unanswered(self, key: str, picture: Picture, given: Inputs, sentence: str) -> dict[str, Any]:
        """The payload of a picture whose words cannot be answered."""
        facts, name = run_facts(picture), stem(picture.settings)
        payload = viewer.unanswered(picture, self.ovam.preset, key=key, facts=facts, stem=name)
        return payload | {"refused": sentence, "words": given.text(self.words), "link": self.link_of(picture, given)}

    def link_of(self, picture: Picture, given: Inputs) -> dict[str, str]:
        """What brings the same page back; nothing, where that takes a visitor's own picture."""
        made = picture.settings
        if not isinstance(made, GenerateSettings) or made.start is not None:
            return {}
        values = {
            "prompt": made.prompt,
            "seed": made.seed,
            "negative": made.negative_prompt,
            "steps": made.steps,
            "guidance": float(made.guidance),
            "guided": made.guidance_kind,
            "width": made.width,
            "height": made.height,
            "words": given.text(self.words),
            "tau": float(given.number(self.tau)),
            "alpha": float(given.number(self.alpha)),
            "crf": given.ticked(self.crf),
            "method": given.text(self.method),
            "beside": given.several(self.beside),
            "used": given.text(self.used),
            "grids": given.several(self.grids),
            "sentence": given.text(self.sentence),
            "half": given.choice(self.half),
        }
        return written(values, self.usual, ALWAYS)

    def candidates_of(self, session: Session, key: str, picture: Picture, given: Inputs) -> dict[str, Any]:
        """Maps of words that were not asked for, to point at: the prompt's own, and the classes of the model.

        By the method that takes any word, on the steps and grids that are chosen. The maps go to the page on their
        grid, so nothing is made at the picture's size; its own last maps stay, for the next threshold.
        """
        picture = replace(picture, image=shrunk(picture.image, SMALL))
        asked = self.asked_for(session, picture, given)
        plain = replace(asked, sentence="", tokens=(), crf=False, method=DEFAULT_METHOD)
        own = prompt_words(picture.caption)[:MAX_CANDIDATES]
        groups = {"prompt": own, "classes": [name for name in VOC_CLASSES if name not in own]}
        found = {}
        with self.model.words_of(session) as before_word:
            for name, words in groups.items():
                if words:
                    found[name] = self.model.answer(picture, replace(plain, words=tuple(words)), before_word)
        return viewer.candidates(key, **found)

    # ---- the page: what is wrong is said before anything is queued, and beside what it is about

    def _wire_runs(self) -> None:
        several = {"trigger_mode": "multiple"}  # the second click takes the place of the first
        followed = self.follow.click(
            self.followed,
            self.link,
            [self.source, self.begin_with, *self.linked.values(), self.note],
            **CHECKS,
            **QUIET,
            **several,
        )
        followed.failure(None, js=FAILED, **PRIVATE)
        for trigger in (self.start.click, self.prompt.submit, self.upload.caption.submit, followed.success):
            self._wire_run(trigger)
        self.upload.photo.upload(None, js="() => window.ovamPage.uploaded()", **PRIVATE)
        self.halt.click(self.stop_work, None, None, queue=False, **QUIET)
        self.source.change(
            self.choose,
            self.source,
            [self.for_prompt, self.for_photo, self.more, self.from_picture, self.for_examples, self.start],
            queue=False,
            **QUIET,
        )

    def _wire_run(self, trigger: Callable) -> None:
        several = {"trigger_mode": "multiple"}  # the second takes the place of the first
        begun = trigger(
            self.begin, self.everything, [self.number, self.halt, self.note, self.answers], **CHECKS, **QUIET, **several
        )
        begun.failure(None, js=FAILED, **PRIVATE)
        ran = begun.success(
            self.run,
            self.everything,
            [self.key, self.answers, self.candidates, self.note, self.facts, self.pack],
            **MODEL,
            **QUIET,
            **several,
        )
        for after in (ran.then, ran.failure):  # Gradio 6 does not come to `then` where a run has failed
            after(self.settle, None, self.halt, queue=False, **QUIET)
        ran.failure(None, js=FAILED, **PRIVATE)

    @handler
    def begin(self, values: dict, request: gr.Request):
        """Takes the place of what runs; what cannot be made is said, and leaves all else as it is."""
        session, given = self.sessions.of(request), Inputs(values)
        try:
            caption = self._check(session, given)
        except InputError as error:
            return "", gr.skip(), shown(str(error)), {"denied": str(error)}
        return session.replace(WORK), gr.Button(interactive=True), "", {"making": caption, "done": 0, "of": 0}

    def _check(self, session: Session, given: Inputs) -> str:
        """The caption of the picture to be. Raises InputError for what would fail later."""
        settings, file, asked = self.wanted(session, given)
        if isinstance(settings, PhotoSettings):
            check_photo(self.ovam, file, settings)
        else:
            settings.validate(self.ovam.pipe)
        check_settings(asked)
        self.ovam.check_answerable(asked, settings)
        self.ovam.queries(asked)
        self.model.check_labels(asked)
        self.beside_it(given)
        return settings.caption

    @handler
    def run(self, values: dict, request: gr.Request):
        """The picture, the words' answer, then the maps of words that nobody asked for."""
        session, given = self.sessions.of(request), Inputs(values)
        number, nothing = given.text(self.number), tuple([gr.skip()] * 6)
        if not number:  # refused
            yield nothing
            return
        settings, file, asked = self.wanted(session, given)
        caption, half = settings.caption, "all" if given.ticked(self.both) else halves_of(asked)
        methods = [method_named(name) for name in (asked.method, *self.beside_it(given))]
        keep = frozenset().union(*(method.keeps for method in methods))
        try:
            for progress, picture in in_thread(
                lambda report: self._make(session, settings, file, half, number, keep, report), SHOW_EVERY
            ):
                if progress and picture is None:
                    done, of = progress[-1]
                    yield gr.skip(), {"making": caption, "done": done, "of": of}, *[gr.skip()] * 4
        except Stopped as stopped:
            said = {"stopped": str(stopped)} if session.is_latest(WORK, number) else gr.skip()
            yield gr.skip(), said, *[gr.skip()] * 4
            return
        if not session.is_latest(WORK, number):
            yield nothing  # or Gradio sends the last progress once more
            return
        yield from self._show(session, session.keep(picture), given)

    def _make(
        self,
        session: Session,
        settings: GenerateSettings | PhotoSettings,
        file: str | None,
        half: str,
        number: str,
        keep: frozenset[str],
        report: Callable[[tuple[int, int]], None],
    ) -> Picture:
        if isinstance(settings, PhotoSettings):
            assert file is not None  # `begin` has seen to it
            return self.model.look_at(session, file, settings, WORK, number, keep)
        return self.model.draw(session, settings, WORK, lambda at, **_: report(at), half, number, keep)

    def _show(self, session: Session, key: str, given: Inputs) -> Iterator[tuple]:
        """What the page shows of a picture that is new to it: outputs of `run`."""
        picture, screen = session.picture(key), session.screen(key)
        assert screen is not None
        pack = gr.Button(self._pack_label(picture), interactive=True)
        try:
            payload, facts = self.answer_of(session, key, screen, given)
        except InputError as error:
            yield key, self.unanswered(key, screen, given, str(error)), gr.skip(), shown(str(error)), "", pack
        else:
            hint = unknown_words_hint(self.ovam, picture.caption, given.text(self.words))
            yield key, payload, gr.skip(), hint, html.escape(facts), pack
        try:
            yield gr.skip(), gr.skip(), self.candidates_of(session, key, screen, given), *[gr.skip()] * 3
        except InputError:  # nobody asked for them
            return

    def _pack_label(self, picture: Picture) -> str:
        return f"Download all · {picture.image.width} × {picture.image.height} px"

    @handler
    def settle(self, request: gr.Request):
        """Nothing to stop, unless another run took the place of the one that ended."""
        running = self.sessions.of(request).runs(WORK)
        return gr.Button(interactive=running)

    @handler
    def stop_work(self, request: gr.Request):
        self.sessions.of(request).stop(WORK, ANSWER)

    @handler
    def choose(self, source):
        by_prompt = source != UPLOAD
        return (
            gr.Column(visible=by_prompt),
            gr.Column(visible=not by_prompt),
            gr.Column(visible=by_prompt),
            gr.Column(visible=by_prompt),
            gr.Column(visible=by_prompt),
            DOES.get(str(source), DOES[MAKE]),
        )

    # ---- maps and masks anew, from the recording: in the browser they wait for no other; the last change wins

    def _wire_maps(self) -> None:
        boxes = (self.words, self.sentence, self.used)
        for box in boxes:
            # change, not input: that one misses what is pasted or dictated
            box.change(None, js="() => window.ovamPage.typed()", **PRIVATE)
        by_words = [self.typed.click, *(box.submit for box in boxes), self.crf.change, self.pick.change]
        by_method = [self.grids.change, self.half.change, self.method.change, self.beside.change]
        of_answer = {self.key, *self.asked_by}
        for triggers, redraw, given in (
            (by_words, self.redraw, of_answer),
            (by_method, self.redraw_how, of_answer),
            ([self.renewed.change], self.redraw_renewed, {self.renewed, *of_answer}),
        ):
            redrawn = gr.on(
                triggers,
                redraw,
                given,
                [self.answers, self.note, self.how_note, self.facts],
                trigger_mode="always_last",
                **QUIET,
                **MAPS,
            )
            redrawn.failure(None, js=UNANSWERED, **PRIVATE)
        self.method.change(self.rules, self.method, [self.methods, self.alpha, self.crf], queue=False, **QUIET)
        of_strip = {self.key, self.strip_of, *self.asked_by}
        last = {"trigger_mode": "always_last", **QUIET, **MAPS}
        evolved = self.evolve.click(self.evolution, of_strip, [self.strip, self.how_note], **last)
        evolved.failure(None, js=NO_STRIP, **PRIVATE)
        self.others.click(self.candidates_anew, {self.key, *self.asked_by}, self.candidates, **last)
        self.film.click(self.film_of, of_strip, self.archive, **QUIET, **MAPS).success(None, js=FETCH, **PRIVATE)

    @handler
    def redraw(self, values: dict, request: gr.Request):
        """Maps and masks anew; what is wrong is said beside the words."""
        payload, said, hint, facts = self._redrawn(values, request)
        return payload, said or hint, "", facts

    @handler
    def redraw_how(self, values: dict, request: gr.Request):
        """The same; what is wrong is said beside the methods and grids."""
        payload, said, hint, facts = self._redrawn(values, request)
        return payload, hint, said, facts

    @handler
    def redraw_renewed(self, values: dict, request: gr.Request):
        """The same where a token that is asked for is another one now."""
        name = values[self.renewed][0]
        picked = Inputs(values).names(self.pick, NO_TOKENS)
        return self.redraw(values, request) if name in picked else (gr.skip(),) * 4

    @handler
    def candidates_anew(self, values: dict, request: gr.Request):
        """Maps of words that nobody asked for, of the parts of the run that are looked at now."""
        session, key, given = self.sessions.of(request), values[self.key], Inputs(values)
        picture = session.screen(key)
        if picture is None:
            return gr.skip()
        try:
            return self.candidates_of(session, key, picture, given)
        except InputError:  # the words beside them say so
            return gr.skip()

    def _redrawn(self, values: dict, request: gr.Request) -> tuple[Any, str, Any, Any]:
        """Payload, what is wrong, what the model never learned, a line of facts. Nothing is said before there is a
        picture: the empty states already do.
        """
        session, key, given = self.sessions.of(request), values[self.key], Inputs(values)
        picture = session.screen(key)
        if picture is None:
            said = html.escape(NO_IMAGE) if key else ""
            return ({"refused": NO_IMAGE} if key else gr.skip()), said, gr.skip(), gr.skip()
        try:
            payload, facts = self.answer_of(session, key, picture, given, with_picture=False)
        except InputError as error:
            return {"refused": str(error)}, shown(str(error)), gr.skip(), gr.skip()
        hint = unknown_words_hint(self.ovam, picture.caption, given.text(self.words))
        return payload, "", hint, html.escape(facts)

    @handler
    def evolution(self, values: dict, request: gr.Request):
        """The map of one word by steps, grids, layers or heads."""
        session, key, given = self.sessions.of(request), values[self.key], Inputs(values)
        try:
            picture = session.picture(key)
            label, over = _strip_of(given.text(self.strip_of))
            with self.model.words_of(session):
                found = self._taken_apart(session, picture, given)
            return viewer.strip(key, label, over, zip(found.labels, found.maps, strict=True)), ""
        except InputError as error:
            return {"said": str(error)}, shown(str(error))

    def _taken_apart(self, session: Session, picture: Picture, given: Inputs) -> Evolution:
        label, over = _strip_of(given.text(self.strip_of))
        asked = self.asked_for(session, picture, given)
        words = {word.lower(): word for word in asked.words}
        token = next((one for one in asked.tokens if label.removesuffix(" (token)") in one.names), None)
        if label.lower() not in words and token is not None:
            return self.ovam.evolution(picture, token, over, label=label.removesuffix(" (token)"))
        if asked.sentence:
            return self.ovam.evolution(
                picture, label if asked.words else "", over, label=label, sentence=asked.sentence
            )
        return self.ovam.evolution(picture, label, over, branch=asked.branch)

    @handler
    def film_of(self, values: dict, request: gr.Request):
        """The same as a file, an animated picture."""
        session, key, given = self.sessions.of(request), values[self.key], Inputs(values)
        picture = session.picture(key)
        label, over = _strip_of(given.text(self.strip_of))
        with self.model.words_of(session):
            found = self._taken_apart(session, picture, given)
        film = plot.animation(plot.frames(picture.image, found.maps, found.labels))
        assert picture.settings is not None  # the page makes no other pictures
        file = session.download_folder() / f"{stem(picture.settings)}-{slugs([label])[0]}-{over}.webp"
        file.write_bytes(film)
        return str(file)

    @handler
    def rules(self, name):
        """What the method leaves alone cannot be moved."""
        method = method_named(name)
        return (
            gr.Accordion(label=f"Method: {method.name}"),
            gr.Slider(interactive=method.has_alpha),
            gr.Checkbox(**crf_switch(method.crf)),
        )

    # ---- addresses, the first picture, and the pictures before

    def _wire_links(self) -> None:
        recalled = self.recall.click(
            self.recalled,
            self.link,
            [self.source, self.begin_with, *self.linked.values(), self.answers],
            trigger_mode="multiple",
            **QUIET,
            **MAPS,
        )
        again = recalled.success(
            self.shown_again,
            {self.link, *self.asked_by},
            [self.key, self.answers, self.candidates, self.note, self.facts, self.pack],
            trigger_mode="multiple",
            **QUIET,
            **MAPS,
        )
        for event in (recalled, again):
            event.failure(None, js=FAILED, **PRIVATE)
        self.open.click(
            self.opened,
            {self.key, *self.asked_by},
            [self.key, self.answers, self.candidates, self.note, self.facts, self.pack],
            **QUIET,
            **MAPS,
        )

    @handler
    def followed(self, link):
        """The fields as an address has them."""
        values = self._of_link(link)
        return MAKE, None, *values, ""

    def _of_link(self, link: Any) -> list[Any]:
        if not isinstance(link, str):
            raise InputError("The address of this page cannot be read; the page starts anew.")
        values = read(link, self.usual)
        method_named(values["method"])
        return list(values.values())

    @handler
    def opened(self, values: dict, request: gr.Request):
        """The picture that the page opens with, where there is one."""
        session, given = self.sessions.of(request), Inputs(values)
        picture = session.find(FIRST)
        if picture is None:
            yield gr.skip(), {"empty": True}, *[gr.skip()] * 4
            return
        yield from self._show(session, FIRST, given)

    @handler
    def recalled(self, link, request: gr.Request):
        """A picture of before, where its recording is kept still: `{"key": "...", "link": {...}}`."""
        key, wanted = _recalled(link)
        fields: Sequence[Any] = [gr.skip()] * (2 + len(self.linked))
        if self.sessions.of(request).find(key) is None:
            return *fields, {"gone": wanted}
        if wanted:
            fields = [MAKE, None, *self._of_link(json.dumps(wanted))]
        return *fields, gr.skip()

    @handler
    def shown_again(self, values: dict, request: gr.Request):
        session, given = self.sessions.of(request), Inputs(values)
        key, _ = _recalled(values[self.link])
        if session.find(key) is None:
            yield tuple([gr.skip()] * 6)
            return
        assert key is not None
        yield from self._show(session, key, given)

    # ---- token files in, everything out

    def _wire_files(self) -> None:
        brought = [self.pick, self.renewed]
        self.bring.upload(self.brought, {self.bring, self.pick}, brought, **QUIET, concurrency_limit=None)
        self.dice.click(None, None, self.seed, js=f"() => Math.floor(Math.random() * {MAX_SEED + 1})", **PRIVATE)
        self.pack.click(
            self.zip_of,
            {self.key, *self.asked_by},
            self.archive,
            show_progress="minimal",
            **PRIVATE,
            concurrency_id="zips",
            concurrency_limit=4,
        ).success(None, js=FETCH, **PRIVATE)

    @handler
    def brought(self, values: dict, request: gr.Request):
        """A visitor's token file: read, tried on this model, and kept to this visitor."""
        session, given = self.sessions.of(request), Inputs(values)
        token = Token.load(given.file(self.bring) or "")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it warns of is said below, on the page
            token_query(self.ovam.pipe, token)
        name = session.add_token(token)
        if last_part(token.model) != last_part(self.ovam.name):
            made_with = last_part(token.model) or "an unnamed model"
            said = f"This token was made with {made_with}, not with {self.ovam.name}: its maps may mean nothing here."
            gr.Warning(html.escape(said))
        chosen = given.names(self.pick, NO_TOKENS)
        listed = gr.Dropdown(choices=session.token_names(), value=[*dict.fromkeys([*chosen, name])])
        return listed, renewal(name) if name in chosen else gr.skip()

    @handler
    def zip_of(self, values: dict, request: gr.Request):
        session = self.sessions.of(request)
        picture = session.picture(values[self.key])
        with self.model.words_of(session) as before_word:
            found: Segmentation = self.model.answer(
                picture, self.asked_for(session, picture, Inputs(values)), before_word
            )
        assert picture.settings is not None  # the page makes no other pictures
        return str(found.save_zip(session.download_folder() / zip_name(picture.settings)))


def _recalled(text: Any) -> tuple[str | None, Any]:
    """The key of a picture and its address, as the page's script asks for them; no key where it asks for no picture."""
    try:
        asked = json.loads(text)
        key, link = asked.get("key"), asked.get("link")
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise InputError("This picture cannot be brought back; make it again.") from None
    return (key if isinstance(key, str) else None), link


def _strip_of(text: str) -> tuple[str, str]:
    """What the page's script asks for, `{"label": "cat", "over": "steps"}`."""
    try:
        asked = json.loads(text)
        label, over = asked["label"], asked["over"]
    except (ValueError, TypeError, KeyError, RecursionError):
        label = over = None
    if not isinstance(label, str) or not isinstance(over, str):
        raise InputError("This word cannot be followed; choose one of the words below the picture.")
    return label, over
