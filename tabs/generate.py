"""The first tab: an image, made or uploaded, then the heatmap and mask of any word."""

from __future__ import annotations

import html
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from ovam_core import plot
from ovam_core.checks import MAX_SEED
from ovam_core.errors import InputError, Stopped
from ovam_core.methods import ALL_METHODS, OVAM, GocaMethod, method_named
from ovam_core.models.families import family_of
from ovam_core.models.load import not_learned
from ovam_core.models.presets import ModelDefaults, defaults_for
from ovam_core.ovam import attributions, branch_for, check_served
from ovam_core.picture import Generation, Maps, save_zip
from ovam_core.query import parse_words
from ovam_core.settings import (
    MAX_GUIDANCE,
    MAX_STEPS,
    MAX_TOKENS,
    MIN_SIDE,
    GenerateSettings,
    MapSettings,
    PhotoSettings,
    parse_numbers,
)
from ovam_core.tokens import SUFFIX, attribution, last_part, load

from .desk import NO_IMAGE, PRIVATE, QUIET, Desk, only_lists, only_numbers, problem, visitor
from .upload import check_photo, photo_fields, photo_settings, takes_photographs

# Where the picture comes from, and what the button then says.
MAKE, UPLOAD = "Generate", "Upload a photograph"
DOES = {MAKE: "Generate", UPLOAD: "Find the words"}

EXAMPLES = [
    ["A photograph of a cat and a car on grass", "animal, car"],
    ["A photograph of a dog and a car on a road", "pet, car"],
    ["A photograph of a boat on the sea", "ship"],
]
FIRST_SEED = 6  # at which the examples show their things apart
WORK = "generate"  # of this tab, by which Stop finds it
MAX_SHOWN = 1024  # pixels of a side on the page; a photograph may have many more
CHECKS = 4  # uploads that are decoded at the same time, before any is queued
# The maps wait neither for the model nor, in the browser, for each other: the last change wins.
MAPS_QUEUE = {"concurrency_id": "maps", "concurrency_limit": 1}
WAIT_FOR_TYPING = 450  # milliseconds after the last letter


# ------------------------------------------------------------------------------------------ from the page


def whole(value: Any) -> Any:
    """A number field's float as an int where it is one; what else there is, `validate` refuses by name."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def image_settings(
    prompt: str, negative_prompt: str, seed: Any, steps: Any, guidance: Any, width: Any, height: Any
) -> GenerateSettings:
    """The left column as settings, not validated yet."""
    return GenerateSettings(
        prompt=prompt or "",
        negative_prompt=negative_prompt or "",
        seed=whole(seed),
        steps=whole(steps),
        guidance=guidance,
        width=whole(width),
        height=whole(height),
    )


def map_settings(
    generation: Generation | None,
    words: str,
    sentence: str,
    tau: float,
    alpha: float,
    crf: bool,
    steps: str,
    grids: list[str],
    tokens: Sequence[Path] = (),
    method: str = OVAM.name,
) -> MapSettings:
    """What is asked, as settings; tokens are files; grids ("1/8", ...) are turned into the resolutions of this recording.

    Words stay in their box while a method looks for tokens alone.
    """
    if method_named(method).asks == "token":
        words = sentence = ""
    resolutions = None
    if generation is not None:
        named = {grid_name(generation.recording.image_size, one): one for one in generation.recording.resolutions}
        chosen = tuple(size for name, size in named.items() if name in grids)
        # All of them is what a method that weighs every layer asks for.
        resolutions = None if method_named(method).needs_goca else chosen
    return MapSettings.from_text(
        words or "",
        sentence or "",
        tau=tau,
        alpha=alpha,
        crf=bool(crf),
        steps=parse_numbers(steps or "", "denoising steps"),
        resolutions=resolutions,
        tokens=tuple(map(str, tokens)),
        method=method_named(method).name,
    )


def for_tokens(asked: MapSettings, own: ModelDefaults) -> MapSettings:
    """The sliders hold for tokens too once they are moved; until then every token keeps to its file's tau and alpha."""
    tau, alpha = (
        value if value != usual else None for value, usual in ((asked.tau, own.tau), (asked.alpha, own.alpha))
    )
    return replace(asked, token_tau=tau, token_alpha=alpha)


def grid_name(image_size: tuple[int, int], resolution: int) -> str:
    """An attention grid as a share of the image's side, "1/8" say: the same word for every image size."""
    return f"1/{2 ** round(math.log2(max(image_size) / resolution))}"


def grid_names(pipe: Any) -> list[str]:
    """The grids on which this model's cross-attention works, finest first, from its own description."""
    return [f"1/{pixels}" for pixels in family_of(pipe).strides]


def own_grid_names(pipe: Any) -> list[str]:
    """Those of them that the model's defaults name."""
    wanted = defaults_for(pipe).strides
    return [f"1/{pixels}" for pixels in family_of(pipe).strides if wanted is None or pixels in wanted]


# -------------------------------------------------------------------------------------------- to the page


def shrunk(image: Image.Image, largest: int = MAX_SHOWN) -> Image.Image:
    """The picture with no side longer than `largest`."""
    scale = largest / max(image.size)
    if scale >= 1:
        return image
    return image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)


def on_screen(image: Image.Image) -> Image.Image:
    """The picture at a size for the page: small ones enlarged, large ones shrunk."""
    return plot.enlarge(shrunk(image))


def gallery_items(image: Image.Image, maps: Maps) -> list[tuple[Image.Image, str]]:
    """One overlay a word, all on the same scale; the caption is also the picture's alternative text."""
    large = on_screen(image)
    vmax = max(maps.peaks)
    return [
        (plot.overlay(large, heatmap, vmax), f"{label} · peak {peak:.2f}")
        for label, heatmap, peak in zip(maps.labels, maps.heatmaps, maps.peaks, strict=True)
    ]


def annotation(image: Image.Image, maps: Maps) -> tuple[Image.Image, list[tuple[np.ndarray, str]]]:
    """The picture with a mask a word, as gr.AnnotatedImage takes it."""
    large = on_screen(image)
    masks = [
        np.asarray(plot.mask_image(mask).resize(large.size, Image.Resampling.NEAREST), dtype=np.float32) / 255
        for mask in maps.masks
    ]
    return large, list(zip(masks, maps.labels, strict=True))


def image_facts(made: Generation) -> str:
    """The line of facts under a picture; HTML."""
    return f"{_how(made)} · {made.seconds:.1f} s on {made.device}"


def _how(made: Generation) -> str:
    one = made.settings
    if isinstance(one, PhotoSettings):
        (height, width), steps = made.recording.image_size, ", ".join(map(str, one.timesteps))
        caption = f"“{html.escape(one.caption)}”" if one.caption else "no caption"
        return (
            f"{caption} · timestep{'s' * (len(one.timesteps) > 1)} {steps} · noise seed {one.seed} · "
            f"{made.image.width} × {made.image.height} px, seen as {width} × {height}"
        )
    half = "" if made.recording.branch == "conditional" else f" · {made.recording.branch} half"
    return f"seed {one.seed} · {one.steps} steps · guidance {one.guidance:g} · {one.width} × {one.height} px{half}"


def zip_name(made: Generation) -> str:
    """A file name that says what is in it."""
    kind = "photo-noise" if isinstance(made.settings, PhotoSettings) else "seed"
    return f"ovam-{kind}-{made.settings.seed}.zip"


def strangers(pipe: Any, *texts: str) -> str:
    """What to say of words that the model never learned: its maps of them are no finding. HTML, or "" """
    unknown = not_learned(pipe, *texts)
    if not unknown:
        return ""
    listed = ", ".join(unknown[:8]) + (" …" if len(unknown) > 8 else "")
    return f'<span class="hint">{html.escape(pipe.ovam_name)} never learned: {html.escape(listed)}. Such words mean nothing to it.</span>'


def measures(maps: Maps) -> dict[str, Any]:
    """The numbers behind the pictures, for the scale under the gallery and for programs that call the API."""
    return {
        "top": max(maps.peaks),  # unrounded: the scale and the captions round it alike
        "words": maps.labels,
        "peaks": [round(peak, 4) for peak in maps.peaks],
        "mask_shares": [round(float(mask.mean()), 4) for mask in maps.masks],
    }


SCALE = f"""<div class="scale" role="img" aria-label="Colour scale of all heatmaps, from 0 to ${{value.top}}">
<span>0</span><i style="background: {plot.scale_css()}"></i><span>${{value.top.toFixed(2)}}</span>
<em>one scale for all words</em></div>"""


# On a phone the picture is a screen further down.
SHOW_PICTURE = "() => { if (innerWidth <= 800) document.querySelector('#image').scrollIntoView({behavior: 'smooth', block: 'nearest'}); }"


# --------------------------------------------------------------------------------------------------- the tab


class GenerateTab:
    """Its components, what happens on them, and what programs may call. Made inside gr.Blocks.

    key: the id of its picture; pick: its list of tokens; both of use to other tabs.
    """

    def __init__(self, desk: Desk):
        self.desk, self.pipe, self.defaults = desk, desk.pipe, defaults_for(desk.pipe)
        self.key = gr.State(None)
        with gr.Row(elem_classes="columns"):
            with gr.Column(scale=4, min_width=320, elem_classes="give"):
                self._lay_out_questions()
                self._lay_out_image_settings()
            with gr.Column(scale=7, min_width=320, elem_classes="get"):
                self._lay_out_pictures()
                self._lay_out_folds()
                self._lay_out_end()
        only_lists(self.which)
        only_numbers(
            self.seed, self.of_photo[-1], self.steps, self.guidance, self.width, self.height, self.tau, self.alpha
        )
        self.of_prompt = [self.prompt, self.negative, self.seed, self.steps, self.guidance, self.width, self.height]
        self.left = [self.source, *self.of_prompt, *self.of_photo]
        self.asked_by = [
            self.words,
            self.sentence,
            self.tau,
            self.alpha,
            self.crf,
            self.used,
            self.which,
            self.pick,
            self.method,
        ]
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
            visible=takes_photographs(self.pipe),
        )
        with gr.Column(elem_classes="part") as self.for_prompt:
            self.prompt = gr.Textbox(EXAMPLES[0][0], label="Prompt", lines=2, elem_id="prompt")
        with gr.Column(visible=False, elem_classes="part") as self.for_photo:
            self.of_photo = photo_fields("photo", "the words below")
        self.words = gr.Textbox(
            EXAMPLES[0][1],
            label="Words to look for",
            info="Comma separated, phrases allowed. Change them at any time: the picture stays.",
            elem_id="words",
        )
        self.note = gr.HTML("", elem_id="note", elem_classes="note")
        with gr.Row(elem_classes="tokens"):
            self.pick = gr.Dropdown(
                list(self.desk.shelf.shipped),
                value=[],
                multiselect=True,
                max_choices=MAX_TOKENS,
                scale=4,
                min_width=180,
                label="Tokens",
                info="Each stands in for a class name, at the threshold of its file until a slider is moved.",
                elem_id="tokens",
            )
            # The visitor's shelf checks the names; Gradio knows only those that were there when the page was built.
            self.pick.preprocess = lambda names: names
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
                self.steps = gr.Slider(1, MAX_STEPS, self.defaults.steps, step=1, label="Steps", elem_id="steps")
                self.guidance = gr.Slider(0, MAX_GUIDANCE, self.defaults.guidance, step=0.1, label="Guidance")
                with gr.Row():
                    sides = {
                        "minimum": MIN_SIDE,
                        "maximum": self.defaults.max_size,
                        "step": family_of(self.pipe).side_multiple,
                    }
                    self.width = gr.Slider(value=self.defaults.width, label="Width", min_width=130, **sides)
                    self.height = gr.Slider(value=self.defaults.height, label="Height", min_width=130, **sides)
            self.examples = gr.Examples(
                EXAMPLES,
                [self.prompt, self.words],
                label="Examples: one click makes the picture",
                elem_id="examples",
                **PRIVATE,
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
                0, 1, self.defaults.tau, step=0.01, label="Threshold τ", scale=5, min_width=200, elem_id="tau"
            )
            self.alpha = gr.Slider(
                0, 1, self.defaults.alpha, step=0.01, label="Self-attention α", scale=5, min_width=200, elem_id="alpha"
            )
            self.crf = gr.Checkbox(True, label="dCRF", scale=2, min_width=90, elem_id="crf")
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
        if about := family_of(self.pipe).about:
            gr.HTML(html.escape(about), elem_id="about", elem_classes="facts")

    def _lay_out_folds(self) -> None:
        with gr.Accordion(f"Method: {OVAM.name}", open=False, elem_id="methods") as self.methods:
            self.method = gr.Radio(
                [
                    (f"{one.name}: {one.about}", one.name)
                    for one in ALL_METHODS.values()
                    if self.desk.with_goca or not one.needs_goca
                ],
                value=OVAM.name,
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
                self.which = gr.CheckboxGroup(
                    grid_names(self.pipe),
                    value=own_grid_names(self.pipe),
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

    def asked_for(self, made: Generation | None, request: gr.Request, *values) -> MapSettings:
        *others, names, chosen = values
        if not isinstance(names, (list, tuple, type(None))):
            raise InputError("The tokens are no list of names; choose them from the list.")
        files = [self.desk.shelf.path(visitor(request), name) for name in names or ()]
        return for_tokens(map_settings(made, *others, files, chosen), self.defaults)

    def answers_of(self, made: Generation, asked: MapSettings) -> tuple:
        begun = time.perf_counter()
        maps = self.desk.answer(made, asked)
        masks, overlays = annotation(made.image, maps), gallery_items(made.image, maps)
        count = f"{len(maps.labels)} map{'s' if len(maps.labels) > 1 else ''}"
        facts = f"{count} by {asked.method} from the recording in {time.perf_counter() - begun:.2f} s, the picture untouched"
        return masks, overlays, measures(maps), facts

    # ---- the page: what is wrong is said before anything is queued, and beside the words while they are typed

    def _wire_runs(self) -> None:
        for trigger in (
            self.start.click,
            self.prompt.submit,
            self.of_photo[1].submit,
            self.examples.load_input_event.then,
        ):
            self._wire_run(trigger)
        self.halt.click(self.stop_work, None, None, queue=False, **QUIET)
        self.source.change(
            self.choose, self.source, [self.for_prompt, self.for_photo, self.more, self.start], queue=False, **QUIET
        )

    def _wire_run(self, trigger: Callable) -> None:
        begun = trigger(
            self.begin,
            self.left + self.asked_by,
            [self.start, self.halt, self.note],
            concurrency_id="checks",
            concurrency_limit=CHECKS,
            **QUIET,
        )
        made = begun.success(
            self.run,
            self.left + self.asked_by,
            [self.key, self.image, self.facts, self.pack],
            concurrency_id="model",
            concurrency_limit=1,
            show_progress_on=self.image,
            **PRIVATE,
        )
        begun.success(None, js=SHOW_PICTURE, **PRIVATE)
        made.then(self.finish, None, [self.start, self.halt], queue=False, **QUIET)
        made.success(self.redraw, [self.key, *self.asked_by], [*self.answers, self.note], **MAPS_QUEUE, **QUIET)

    def wanted(
        self, request: gr.Request, chosen, *values
    ) -> tuple[GenerateSettings | PhotoSettings, str | None, MapSettings]:
        """What makes the picture, not validated yet, the file of a photograph, and what is asked."""
        of_image, (file, *about) = values[: len(self.of_prompt)], values[len(self.of_prompt) : len(self.left) - 1]
        asked = self.asked_for(None, request, *values[len(self.left) - 1 :])
        if chosen == UPLOAD:
            return photo_settings(self.pipe, *about, asked), file, asked
        return image_settings(*of_image), None, asked

    def begin(self, request: gr.Request, *values):
        try:
            settings, file, asked = self.wanted(request, *values)
            if isinstance(settings, PhotoSettings):
                check_photo(self.pipe, file, settings)
            else:
                settings.validate(self.pipe)
            check_served(self.pipe, asked, settings)
            attributions(self.pipe, asked)
            branch_for(asked)
        except InputError as error:
            raise problem(error) from None
        self.desk.begin(request, WORK)
        return gr.Button(interactive=False), gr.Button(interactive=True), ""

    def run(self, request: gr.Request, progress=gr.Progress(), *values):
        try:
            settings, file, asked = self.wanted(request, *values)
            if isinstance(settings, PhotoSettings):
                made = self.desk.look(file, settings, WORK, request)
            else:
                made = self.desk.draw(settings, WORK, request, progress, branch_for(asked))
        except Stopped as stopped:
            return gr.skip(), gr.skip(), html.escape(str(stopped)), gr.skip()
        except InputError as error:
            raise problem(error) from None
        return self.desk.keep(made, request), shrunk(made.image), image_facts(made), gr.Button(interactive=True)

    def stop_work(self, request: gr.Request):
        self.desk.stop(request, WORK)

    def finish(self):
        return gr.Button(interactive=True), gr.Button(interactive=False)

    def choose(self, chosen):
        by_prompt = chosen != UPLOAD
        return (
            gr.Column(visible=by_prompt),
            gr.Column(visible=not by_prompt),
            gr.Column(visible=by_prompt),
            DOES.get(chosen),
        )

    # ---- maps and masks anew, from the recording

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
                self.which.change,
                self.pick.change,
                self.method.change,
            ],
            self.redraw,
            [self.key, *self.asked_by],
            [*self.answers, self.note],
            trigger_mode="always_last",
            **QUIET,
            **MAPS_QUEUE,
        )
        self.method.change(self.rules, self.method, [self.methods, self.alpha, self.crf], queue=False, **QUIET)

    def redraw(self, made_key, request: gr.Request, *values):
        """Maps and masks anew. Nothing is said before there is an image: the empty states already do."""
        made = self.desk.store.get(made_key)
        if made is None:
            return *[gr.skip()] * 4, html.escape(NO_IMAGE) if made_key else ""
        try:
            asked = self.asked_for(made, request, *values)
            masks, *others = self.answers_of(made, asked)
            colors = plot.word_colors([label for _, label in masks[1]])
            return (
                gr.AnnotatedImage(value=masks, color_map=colors),
                *others,
                strangers(self.pipe, made.settings.caption, *asked.words),
            )
        except InputError as error:
            return *[gr.skip()] * 4, html.escape(str(error))

    def rules(self, chosen):
        """What the method leaves alone cannot be moved."""
        one = method_named(chosen)
        floor = not isinstance(one, GocaMethod) and one.alpha < 1
        return gr.Accordion(label=f"Method: {one.name}"), gr.Slider(interactive=floor), gr.Checkbox(interactive=one.crf)

    # ---- token files in, everything out

    def _wire_files(self) -> None:
        self.bring.upload(self.brought, [self.bring, self.pick], self.pick, **QUIET, concurrency_limit=None)
        self.dice.click(None, None, self.seed, js=f"() => Math.floor(Math.random() * {MAX_SEED + 1})", **PRIVATE)
        self.pack.click(
            self.zip_of,
            [self.key, *self.asked_by],
            self.archive,
            show_progress="minimal",
            **PRIVATE,
            concurrency_id="zips",
            concurrency_limit=1,
        ).success(None, js="() => setTimeout(() => document.querySelector('#archive').click(), 150)", **PRIVATE)

    def brought(self, file, chosen, request: gr.Request):
        """A visitor's token file: read, tried on this model, and kept to this visitor."""
        try:
            token = load(file)
            attribution(self.pipe, token)
            name = self.desk.shelf.add(visitor(request), token)
        except InputError as error:
            raise problem(error) from None
        if (made_with := last_part(token.model)) != last_part(self.pipe.ovam_name):
            gr.Warning(
                html.escape(
                    f"This token was made with {made_with or 'an unnamed model'}, not with {self.pipe.ovam_name}: its maps may mean nothing here."
                )
            )
        return gr.Dropdown(choices=self.desk.shelf.names(visitor(request)), value=[*dict.fromkeys([*chosen, name])])

    def zip_of(self, made_key, request: gr.Request, *values):
        try:
            made = self.desk.find(made_key)
            asked = self.asked_for(made, request, *values)
            maps = self.desk.answer(made, asked)
        except InputError as error:
            raise problem(error) from None
        return str(save_zip(self.desk.zip_folder(request) / zip_name(made), made, maps, asked))

    # ---- the API: the same work, where every fault is an error

    def _wire_programs(self) -> None:
        with gr.Row(visible=False):
            for_programs = gr.Button("generate"), gr.Button("attribute"), gr.Button("photograph"), gr.Button("stop")
            named = gr.Textbox("", label="Words", info="what an empty caption is made of")
        for_programs[0].click(
            self.api_generate,
            self.of_prompt,
            [self.key, self.image, self.facts],
            api_name="generate",
            concurrency_id="model",
            concurrency_limit=1,
        )
        for_programs[2].click(
            self.api_photograph,
            [*self.of_photo, named],
            [self.key, self.image, self.facts],
            api_name="photograph",
            concurrency_id="model",
            concurrency_limit=1,
        )
        for_programs[3].click(self.api_stop, None, None, api_name="stop", queue=False)
        for_programs[1].click(
            self.api_attribute, [self.key, *self.asked_by], self.answers, api_name="attribute", **MAPS_QUEUE
        )

    # Parameters are written out: their names are the API's.
    def api_generate(
        self, prompt, negative_prompt, seed, steps, guidance, width, height, request: gr.Request, progress=gr.Progress()
    ):
        """Makes an image and records it; /attribute then answers about it. Returns the image and a line of facts."""
        try:
            settings = image_settings(prompt, negative_prompt, seed, steps, guidance, width, height)
            made = self.desk.draw(settings, WORK, request, progress)
        except (InputError, Stopped) as error:
            raise problem(error) from None
        return self.desk.keep(made, request), made.image, image_facts(made)

    def api_photograph(self, photo, caption, timesteps, seed, words, request: gr.Request):
        """Records a photograph; /attribute then answers about it. Without a caption, one is made of the words. Returns the
        image, shrunk where it is large, and a line of facts."""
        try:
            asked = MapSettings(words=tuple(parse_words(words)) if words else ())
            if not (caption or asked.words):
                raise InputError("There is neither a caption nor a word to make one of; give one of them.")
            settings = photo_settings(self.pipe, caption, timesteps, seed, asked)
            check_photo(self.pipe, photo, settings)
            made = self.desk.look(photo, settings, WORK, request)
        except (InputError, Stopped) as error:
            raise problem(error) from None
        return self.desk.keep(made, request), shrunk(made.image), image_facts(made)

    def api_stop(self, request: gr.Request):
        """Stops whatever this session has running: a generation, an optimisation (the best is kept) or an export."""
        self.desk.stop(request)

    def api_attribute(
        self, made_key, words, sentence, tau, alpha, crf, steps, grids, tokens, method, request: gr.Request
    ):
        """Masks, overlays, measures and a line of facts for any words, from this session's last image."""
        try:
            made = self.desk.find(made_key)
            asked = self.asked_for(made, request, words, sentence, tau, alpha, crf, steps, grids, tokens, method)
            return self.answers_of(made, asked)
        except InputError as error:
            raise problem(error) from None
