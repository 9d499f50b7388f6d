"""The first tab: an image, made or uploaded, then the heatmap and mask of any word."""

from __future__ import annotations

import html
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import gradio as gr

from ovam_core import plot
from ovam_core.checks import MAX_SEED
from ovam_core.errors import InputError, Stopped
from ovam_core.methods import METHODS, check_settings, method_named, settings_of_text
from ovam_core.models.load import learned_words, unknown_words
from ovam_core.models.presets import ModelDefaults
from ovam_core.ovam import OVAM
from ovam_core.picture import Picture, Segmentation
from ovam_core.query import branch_of, parse_words, token_query
from ovam_core.settings import (
    DEFAULT_METHOD,
    MAX_GUIDANCE,
    MAX_STEPS,
    MAX_TOKENS,
    MIN_SIDE,
    GenerateSettings,
    PhotoSettings,
    SegmentSettings,
    parse_numbers,
)
from ovam_core.tokens import SUFFIX, Token, last_part

from .events import CHECKS, MAPS, MODEL, PRIVATE, QUIET, RAW, Inputs, give_back, handler, shown
from .fields import PhotoFields, check_photo, crf_switch, takes_photographs
from .model import ANSWER, Model
from .render import SCALE, annotation, gallery_items, image_facts, shrunk
from .session import NO_IMAGE, Session

# Where the picture comes from, and what the button then says.
MAKE, UPLOAD = "Generate", "Upload a photograph"
DOES = {MAKE: "Generate", UPLOAD: "Find the words"}

EXAMPLES = [
    ["A photograph of a bird and a boat on the sea", "bird, ship"],
    ["A photograph of a sheep and a car on grass", "lamb, car"],
    ["A photograph of a dog and a car on a road", "pet"],
]
FIRST_SEED = 3  # at which the examples show their things apart
WORK = "generate"  # of this tab, by which Stop finds it
WAIT_FOR_TYPING = 450  # milliseconds after the last letter
NO_TOKENS = "The tokens are no list of names; choose them from the list."


# ------------------------------------------------------------------------------------------ from the page


def segment_settings(
    ovam: OVAM,
    picture: Picture | None,
    *,
    words: str = "",
    sentence: str = "",
    tau: Any,
    alpha: Any,
    crf: bool = True,
    steps: str = "",
    grids: Sequence[Any] = (),
    tokens: Sequence[Token] = (),
    method: str = DEFAULT_METHOD,
) -> SegmentSettings:
    """What is asked, as settings; grids ("1/8", ...) are turned into the resolutions of this recording.

    Words stay in their box while a method looks for tokens alone. Raises InputError for what cannot be read.
    """
    chosen = method_named(method)
    if chosen.asks == "token":
        words = sentence = ""
    # All of them is what a method that weighs every layer asks for.
    resolutions = None if picture is None or chosen.needs_goca else _resolutions(ovam, picture, grids)
    settings = settings_of_text(
        words,
        sentence,
        tau=tau,
        alpha=alpha,
        crf=crf,
        step_indices=parse_numbers(steps, "denoising steps"),
        resolutions=resolutions,
        tokens=tuple(tokens),
        method=chosen.name,
    )
    return for_tokens(settings, ovam.preset)


def _resolutions(ovam: OVAM, picture: Picture, grids: Sequence[Any]) -> tuple[int, ...]:
    there = grid_names(ovam)
    if unknown := [grid for grid in grids if grid not in there]:
        raise InputError(f"There is no attention grid '{str(unknown[0])[:40]}'; choose among {', '.join(there)}.")
    size, recorded = picture.recording.image_size, picture.recording.resolutions
    return tuple(one for one in recorded if grid_name(size, one) in grids)


def for_tokens(settings: SegmentSettings, preset: ModelDefaults) -> SegmentSettings:
    """The sliders hold for tokens too once they are moved; until then every token keeps to its file's tau and alpha."""
    tau = settings.tau if settings.tau != preset.tau else None
    alpha = settings.alpha if settings.alpha != preset.alpha else None
    return replace(settings, token_tau=tau, token_alpha=alpha)


def grid_name(image_size: tuple[int, int], resolution: int) -> str:
    """An attention grid as a share of the image's side, "1/8" say: the same word for every image size."""
    return f"1/{2 ** round(math.log2(max(image_size) / resolution))}"


def grid_names(ovam: OVAM) -> list[str]:
    """The grids on which this model's cross-attention works, finest first, from its own description."""
    return [f"1/{pixels}" for pixels in ovam.adapter.strides]


def recommended_grid_names(ovam: OVAM) -> list[str]:
    """Those of them that the model's preset names."""
    wanted = ovam.preset.strides
    return [f"1/{pixels}" for pixels in ovam.adapter.strides if wanted is None or pixels in wanted]


# -------------------------------------------------------------------------------------------- to the page


def zip_name(settings: GenerateSettings | PhotoSettings) -> str:
    """A file name that says what is in it."""
    kind = "photo-noise" if isinstance(settings, PhotoSettings) else "seed"
    return f"ovam-{kind}-{settings.seed}.zip"


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
    buttons = "".join(f'<button type="button">{html.escape(word)}</button>' for word in words)
    return (
        f"<details><summary>{html.escape(ovam.name)} is a tiny demo model that knows {len(words)} words: "
        f"<u>see them</u></summary><p>{buttons}</p></details>"
    )


def measures(found: Segmentation) -> dict[str, Any]:
    """The numbers behind the pictures, for the scale under the gallery and for programs that call the API."""
    return {
        "top": max(found.peaks),  # unrounded: the scale and the captions round it alike
        "words": found.labels,
        "peaks": [round(peak, 4) for peak in found.peaks],
        "mask_shares": [round(float(mask.mean()), 4) for mask in found.masks],
    }


# A word that is clicked is looked for too. The list of words is a text box, whose change the page hears of by "input".
ADD_WORD = """element.addEventListener('click', event => {
    const word = event.target.closest('button')?.textContent;
    const box = document.querySelector('#words textarea, #words input');
    if (!word || !box) return;
    const words = box.value.split(',').map(one => one.trim()).filter(Boolean);
    if (words.includes(word)) return;
    box.value = [...words, word].join(', ');
    box.dispatchEvent(new Event('input', {bubbles: true}));
})"""

# On a phone the picture is a screen further down.
SHOW_PICTURE = """() => {
    if (innerWidth <= 800) document.querySelector('#image').scrollIntoView({behavior: 'smooth', block: 'nearest'});
}"""


# --------------------------------------------------------------------------------------------------- the tab


class GenerateTab:
    """Its components, what happens on them, and what programs may call. Made inside gr.Blocks.

    key: the id of its picture; pick: its list of tokens; both of use to other tabs.
    """

    def __init__(self, model: Model):
        self.model, self.sessions, self.ovam = model, model.sessions, model.ovam
        self.key = gr.State(None)
        with gr.Row(elem_classes="columns"):
            with gr.Column(scale=4, min_width=320, elem_classes="give"):
                self._lay_out_questions()
                self._lay_out_image_settings()
            with gr.Column(scale=7, min_width=320, elem_classes="get"):
                self._lay_out_pictures()
                self._lay_out_folds()
                self._lay_out_end()
        self.of_prompt = [self.prompt, self.negative, self.seed, self.steps, self.guidance, self.width, self.height]
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
        ]
        self.everything = {self.source, *self.of_prompt, *self.upload.all, *self.asked_by}
        self.answers = [self.annotated, self.gallery, self.scale, self.map_facts]
        self._wire_runs()
        self._wire_maps()
        self._wire_files()
        self._wire_programs()

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
            self.prompt = gr.Textbox(EXAMPLES[0][0], label="Prompt", lines=2, elem_id="prompt")
        with gr.Column(visible=False, elem_classes="part") as self.for_photo:
            self.upload = PhotoFields("photo", "the words below", self.sessions.limits.pixels)
        self.words = gr.Textbox(
            EXAMPLES[0][1],
            label="Words to look for",
            info="Comma separated, phrases allowed. Change them at any time: the picture stays.",
            elem_id="words",
        )
        self.note = gr.HTML("", elem_id="note", elem_classes="note")
        if known := vocabulary(self.ovam):
            gr.HTML(known, js_on_load=ADD_WORD, elem_id="vocabulary")
        with gr.Row(elem_classes="tokens"):
            self.pick = gr.Dropdown(
                list(self.sessions.shipped),
                value=[],
                multiselect=True,
                max_choices=MAX_TOKENS,
                scale=4,
                min_width=180,
                label="Tokens",
                info="Each stands in for a class name, at the threshold of its file until a slider is moved.",
                elem_id="tokens",
            )
            self.bring = gr.UploadButton(
                "Add a file", file_types=[SUFFIX], scale=1, min_width=96, size="sm", elem_id="bring"
            )
        with gr.Row(elem_classes="buttons"):
            self.start = gr.Button("Generate", variant="primary", scale=3, min_width=120, elem_id="generate")
            self.halt = gr.Button("Stop", variant="stop", scale=1, min_width=80, interactive=False, elem_id="stop")

    def _lay_out_image_settings(self) -> None:
        with gr.Column(elem_classes="part") as self.more:
            with gr.Row(elem_classes="seed"):
                self.seed = gr.Number(
                    FIRST_SEED,
                    label="Seed",
                    precision=0,
                    minimum=0,
                    maximum=MAX_SEED,
                    scale=3,
                    min_width=120,
                    elem_id="seed",
                )
                self.dice = gr.Button("🎲 Random", scale=1, min_width=110, elem_id="dice")
            with gr.Accordion("Advanced: negative prompt, steps, guidance, size", open=False, elem_id="advanced"):
                self.negative = gr.Textbox("", label="Negative prompt", placeholder="what the picture should not show")
                self.steps = gr.Slider(1, MAX_STEPS, self.ovam.preset.steps, step=1, label="Steps", elem_id="steps")
                self.guidance = gr.Slider(0, MAX_GUIDANCE, self.ovam.preset.guidance, step=0.1, label="Guidance")
                with gr.Row():
                    sides = {
                        "minimum": MIN_SIDE,
                        "maximum": self.ovam.preset.max_size,
                        "step": self.ovam.adapter.side_multiple,
                    }
                    self.width = gr.Slider(value=self.ovam.preset.width, label="Width", min_width=130, **sides)
                    self.height = gr.Slider(value=self.ovam.preset.height, label="Height", min_width=130, **sides)
            self.examples = gr.Examples(
                EXAMPLES,
                [self.prompt, self.words],
                label="Examples: one click makes the picture",
                elem_id="examples",
                api_visibility="private",
                preload=False,
            )

    # ---- the right column: what you get

    def _lay_out_pictures(self) -> None:
        with gr.Row(elem_classes="pictures"):
            self.image = gr.Image(
                label="Image",
                type="pil",
                format="png",
                interactive=False,
                buttons=["download", "fullscreen"],
                min_width=220,
                elem_id="image",
                alt_text="The picture",
            )
            self.annotated = gr.AnnotatedImage(
                label="Masks · point at a word", format="png", min_width=220, elem_id="annotated"
            )
        # Beneath the masks that they change, so that both are on the screen while a slider is dragged.
        with gr.Row(elem_classes="live"):
            self.tau = gr.Slider(
                0, 1, self.ovam.preset.tau, step=0.01, label="Threshold τ", scale=5, min_width=200, elem_id="tau"
            )
            self.alpha = gr.Slider(
                0,
                1,
                self.ovam.preset.alpha,
                step=0.01,
                label="Self-attention α",
                scale=5,
                min_width=200,
                elem_id="alpha",
            )
            self.crf = gr.Checkbox(
                **{"value": True, **crf_switch()}, label="dCRF", scale=2, min_width=90, elem_id="crf"
            )
        self.gallery = gr.Gallery(
            label="Heatmaps",
            columns=3,
            height="auto",
            object_fit="contain",
            format="webp",  # a third of PNG's time, which was most of an answer's
            interactive=False,
            preview=False,
            buttons=["download", "fullscreen"],
            elem_id="gallery",
            elem_classes="gallery",
        )
        self.scale = gr.HTML(None, html_template=f"${{value ? `{SCALE}` : ''}}", elem_id="scale")
        if about := self.ovam.adapter.about:
            gr.HTML(html.escape(about), elem_id="about", elem_classes="facts")

    def _lay_out_folds(self) -> None:
        with gr.Accordion(f"Method: {DEFAULT_METHOD}", open=False, elem_id="methods") as self.methods:
            self.method = gr.Radio(
                [
                    (f"{method.name}: {method.about}", method.name)
                    for method in METHODS.values()
                    if self.model.with_goca or not method.needs_goca
                ],
                value=DEFAULT_METHOD,
                show_label=False,
                container=False,
                elem_id="method",
            )
        with gr.Accordion("Which steps, which resolutions, full attribution sentence", open=False, elem_id="which"):
            with gr.Row():
                self.used = gr.Textbox(
                    "",
                    label="Denoising steps",
                    info="0 is the first: 0-9, or 3, 5, 8, or all",
                    min_width=150,
                    placeholder="the model's own choice",
                    elem_id="used",
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
                elem_id="sentence",
            )

    def _lay_out_end(self) -> None:
        with gr.Row(elem_classes="end"):
            with gr.Column(scale=4, min_width=200, elem_classes="facts"):
                self.facts = gr.HTML("", elem_id="facts")
                self.map_facts = gr.HTML("", elem_id="map-facts")
            self.pack = gr.Button("Download all", scale=1, min_width=140, interactive=False, elem_id="pack")
        self.archive = gr.DownloadButton("zip", visible="hidden", elem_id="archive")

    # ---- what is asked, and its answer

    def image_settings(self, given: Inputs) -> GenerateSettings:
        """The left column as settings, not validated yet."""
        return GenerateSettings(
            prompt=given.text(self.prompt),
            negative_prompt=given.text(self.negative),
            seed=given.whole(self.seed),
            steps=given.whole(self.steps),
            guidance=given.number(self.guidance),
            width=given.whole(self.width),
            height=given.whole(self.height),
        )

    def asked_for(self, session: Session, picture: Picture | None, given: Inputs) -> SegmentSettings:
        names = given.names(self.pick, NO_TOKENS)
        if len(names) > MAX_TOKENS:  # before any is read
            raise InputError(f"{len(names):,} tokens are too many; give at most {MAX_TOKENS}.")
        return segment_settings(
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
            method=given.text(self.method),
        )

    def wanted(
        self, session: Session, given: Inputs
    ) -> tuple[GenerateSettings | PhotoSettings, str | None, SegmentSettings]:
        """What makes the picture, not validated yet, the file of a photograph, and what is asked."""
        asked = self.asked_for(session, None, given)
        if given.choice(self.source) == MAKE:
            return self.image_settings(given), None, asked
        file, settings = self.upload.read(self.ovam, given, asked)
        return settings, file, asked

    def answers_to(self, session: Session, picture: Picture, asked: SegmentSettings) -> tuple:
        with self.model.words_of(session) as before_word:
            begun = time.perf_counter()
            found = self.model.answer(picture, asked, before_word)
            masks, overlays = annotation(found), gallery_items(found, before_word)
        count = f"{len(found.labels)} map{'s' if len(found.labels) > 1 else ''}"
        seconds = time.perf_counter() - begun
        facts = f"{count} by {asked.method} from the recording in {seconds:.2f} s, the picture untouched"
        return masks, overlays, measures(found), facts

    # ---- the page: what is wrong is said before anything is queued, and beside the words while they are typed

    def _wire_runs(self) -> None:
        for trigger in (
            self.start.click,
            self.prompt.submit,
            self.upload.caption.submit,
            self.examples.load_input_event.then,
        ):
            self._wire_run(trigger)
        self.halt.click(self.stop_work, None, None, queue=False, **QUIET)
        self.source.change(
            self.choose, self.source, [self.for_prompt, self.for_photo, self.more, self.start], queue=False, **QUIET
        )

    def _wire_run(self, trigger: Callable) -> None:
        begun = trigger(self.begin, self.everything, [self.start, self.halt, self.note], **CHECKS, **QUIET)
        ran = begun.success(
            self.run,
            self.everything,
            [self.key, self.image, self.facts, self.pack],
            show_progress_on=self.image,
            **MODEL,
            **PRIVATE,
        )
        begun.success(None, js=SHOW_PICTURE, **PRIVATE)
        give_back(ran, self.start, self.halt)
        ran.success(self.redraw, {self.key, *self.asked_by}, [*self.answers, self.note], **MAPS, **QUIET)

    @handler
    def begin(self, values: dict, request: gr.Request):
        session = self.sessions.of(request)
        settings, file, asked = self.wanted(session, Inputs(values))
        if isinstance(settings, PhotoSettings):
            check_photo(self.ovam, file, settings)
        else:
            settings.validate(self.ovam.pipe)
        check_settings(asked)
        self.ovam.check_answerable(asked, settings)
        self.ovam.queries(asked)
        self.model.check_labels(asked)
        branch_of(asked.tokens)
        session.begin(WORK)
        return gr.Button(interactive=False), gr.Button(interactive=True), ""

    @handler
    def run(self, values: dict, request: gr.Request, progress=gr.Progress()):
        session = self.sessions.of(request)
        settings, file, asked = self.wanted(session, Inputs(values))
        try:
            if isinstance(settings, PhotoSettings):
                picture = self.model.look_at(session, file, settings, WORK)
            else:
                picture = self.model.draw(session, settings, WORK, progress, branch_of(asked.tokens))
        except Stopped as stopped:
            return gr.skip(), gr.skip(), html.escape(str(stopped)), gr.skip()
        return session.keep(picture), shrunk(picture.image), image_facts(picture), gr.Button(interactive=True)

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
            DOES.get(str(source), DOES[MAKE]),
        )

    # ---- maps and masks anew, from the recording: in the browser they wait for no other; the last change wins

    def _wire_maps(self) -> None:
        typed = gr.Button("Redraw", visible="hidden", elem_id="typed")
        boxes = (self.words, self.sentence, self.used)
        for box in boxes:
            # change, not input: that one misses what is pasted or dictated
            box.change(
                None,
                js=f"""() => {{
                clearTimeout(window.ovamTyping);
                window.ovamTyping = setTimeout(() => document.querySelector('#typed').click(), {WAIT_FOR_TYPING});
            }}""",
                **PRIVATE,
            )
        gr.on(
            [
                typed.click,
                *(box.submit for box in boxes),
                self.tau.change,
                self.alpha.change,
                self.crf.change,
                self.grids.change,
                self.pick.change,
                self.method.change,
            ],
            self.redraw,
            {self.key, *self.asked_by},
            [*self.answers, self.note],
            trigger_mode="always_last",
            **QUIET,
            **MAPS,
        )
        self.method.change(self.rules, self.method, [self.methods, self.alpha, self.crf], queue=False, **QUIET)

    @handler
    def redraw(self, values: dict, request: gr.Request):
        """Maps and masks anew. Nothing is said before there is an image: the empty states already do."""
        session, key = self.sessions.of(request), values[self.key]
        picture = session.find(key)
        if picture is None:
            return *[gr.skip()] * 4, html.escape(NO_IMAGE) if key else ""
        try:
            asked = self.asked_for(session, picture, Inputs(values))
            masks, *others = self.answers_to(session, picture, asked)
        except InputError as error:
            return *[gr.skip()] * 4, shown(str(error))
        colors = plot.word_colors([label for _, label in masks[1]])
        return (
            gr.AnnotatedImage(value=masks, color_map=colors),
            *others,
            unknown_words_hint(self.ovam, picture.caption, *asked.words),
        )

    @handler
    def rules(self, name):
        """What the method leaves alone cannot be moved."""
        method = method_named(name)
        return (
            gr.Accordion(label=f"Method: {method.name}"),
            gr.Slider(interactive=method.has_alpha),
            gr.Checkbox(**crf_switch(method.crf)),
        )

    # ---- token files in, everything out

    def _wire_files(self) -> None:
        self.bring.upload(self.brought, {self.bring, self.pick}, self.pick, **QUIET, concurrency_limit=None)
        self.dice.click(None, None, self.seed, js=f"() => Math.floor(Math.random() * {MAX_SEED + 1})", **PRIVATE)
        self.pack.click(
            self.zip_of,
            {self.key, *self.asked_by},
            self.archive,
            show_progress="minimal",
            **PRIVATE,
            concurrency_id="zips",
            concurrency_limit=4,
        ).success(None, js="() => setTimeout(() => document.querySelector('#archive').click(), 150)", **PRIVATE)

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
        return gr.Dropdown(choices=session.token_names(), value=[*dict.fromkeys([*chosen, name])])

    @handler
    def zip_of(self, values: dict, request: gr.Request):
        session = self.sessions.of(request)
        picture = session.picture(values[self.key])
        with self.model.words_of(session) as before_word:
            found = self.model.answer(picture, self.asked_for(session, picture, Inputs(values)), before_word)
        assert picture.settings is not None  # the page makes no other pictures
        return str(found.save_zip(session.download_folder() / zip_name(picture.settings)))

    # ---- the API: the same work, where every fault is an error

    def _wire_programs(self) -> None:
        with gr.Row(visible=False):
            for_programs = gr.Button("generate"), gr.Button("attribute"), gr.Button("photograph"), gr.Button("stop")
            self.named = gr.Textbox("", label="Words", info="what an empty caption is made of")
        shown = [self.key, self.image, self.facts]
        for_programs[0].click(self.api_generate, self.of_prompt, shown, api_name="generate", **MODEL, **RAW)
        for_programs[2].click(
            self.api_photograph, [*self.upload.all, self.named], shown, api_name="photograph", **MODEL, **RAW
        )
        for_programs[3].click(self.api_stop, None, None, api_name="stop", queue=False)
        for_programs[1].click(
            self.api_attribute, [self.key, *self.asked_by], self.answers, api_name="attribute", **MAPS, **RAW
        )

    # Parameters are written out: their names are the API's.
    @handler
    def api_generate(
        self, prompt, negative_prompt, seed, steps, guidance, width, height, request: gr.Request, progress=gr.Progress()
    ):
        """Makes an image and records it; /attribute then answers about it. Returns the image and a line of facts."""
        values = (prompt, negative_prompt, seed, steps, guidance, width, height)
        session = self.sessions.of(request)
        settings = self.image_settings(Inputs(dict(zip(self.of_prompt, values, strict=True))))
        session.begin(WORK)
        picture = self.model.draw(session, settings, WORK, progress)
        return session.keep(picture), picture.image, image_facts(picture)

    @handler
    def api_photograph(self, photo, caption, timesteps, seed, words, request: gr.Request):
        """Records a photograph; /attribute then answers about it. Without a caption, one is made of the words. Returns
        the image, shrunk where it is large, and a line of facts."""
        values = (photo, caption, timesteps, seed, words)
        given = Inputs(dict(zip([*self.upload.all, self.named], values, strict=True)))
        session, named = self.sessions.of(request), given.text(self.named)
        asked = SegmentSettings(words=tuple(parse_words(named)) if named else ())
        if not (given.text(self.upload.caption) or asked.words):
            raise InputError("There is neither a caption nor a word to make one of; give one of them.")
        file, settings = self.upload.read(self.ovam, given, asked)
        checked = check_photo(self.ovam, file, settings)
        session.begin(WORK)
        picture = self.model.look_at(session, checked, settings, WORK)
        return session.keep(picture), shrunk(picture.image), image_facts(picture)

    @handler
    def api_stop(self, request: gr.Request):
        """Stops whatever this session has running or waiting: images, optimisations (the best is kept), exports and
        answers."""
        self.sessions.of(request).stop()

    @handler
    def api_attribute(
        self, made_key, words, sentence, tau, alpha, crf, steps, grids, tokens, method, request: gr.Request
    ):
        """Masks, overlays, measures and a line of facts for any words, from this session's last image."""
        values = (words, sentence, tau, alpha, crf, steps, grids, tokens, method)
        session = self.sessions.of(request)
        picture = session.picture(made_key)
        given = Inputs(dict(zip(self.asked_by, values, strict=True)))
        return self.answers_to(session, picture, self.asked_for(session, picture, given))
