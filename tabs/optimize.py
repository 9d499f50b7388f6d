"""The second tab: the token of a class, learned from one picture and one mask."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import gradio as gr
import numpy as np
import torch
from PIL import Image

from ovam_core import plot
from ovam_core.attention.heatmap import heatmaps
from ovam_core.checks import MAX_PROMPT, MAX_SEED
from ovam_core.data.annotated import check_begun, photo_target, token_of
from ovam_core.data.metrics import confusion, iou
from ovam_core.errors import InputError, Stopped
from ovam_core.io.masks import IGNORE, read_mask
from ovam_core.models.presets import own_choice
from ovam_core.optimization import RECIPES, Epoch, Optimized, OptimizeSettings, initial_embedding, optimize
from ovam_core.ovam import branch_for
from ovam_core.picture import Generation, Maps
from ovam_core.settings import GenerateSettings, MapSettings, PhotoSettings

from .beside import beside
from .desk import PRIVATE, QUIET, Desk, only_numbers, problem, visitor
from .generate import CHECKS, image_facts, on_screen, shrunk, whole
from .upload import check_photo, photo_fields, photo_settings, takes_photographs

WORK, PICTURE = "optimize", "optimize: picture"  # of this tab, by which Stop finds them
MAKE, PHOTO = "Generate", "Upload a photograph"
PAINT, STROKES, UPLOAD = "Paint the object", "A few strokes", "Upload a mask"
OBJECT, BACKGROUND = "#e69f00", "#0072b2"
MAX_EPOCHS = 500
SHOW_EVERY = 0.4  # seconds between two looks at a running search
MAX_CANVAS = 512  # pixels of a side: what the canvas is laid out for
FIRST_PROMPT = "A photograph of a cat"
NO_CURVE = "<h3>Loss</h3><p>The loss of every epoch will be drawn here.</p>"
NAMED = r"(text, name) => (/^a photograph of an? (?!.*\b(?:and|at|by|in|near|next|of|on|under|with)\b)([\w -]+)$/i.exec(text.trim()) || [, name])[1]"
HINTS = {
    PAINT: "Paint over the whole object; what stays bare is background.",
    STROKES: "Orange strokes on the object, blue ones on the background; what stays bare counts for nothing.",
    UPLOAD: "Black is background, white is the object; any size of the same shape. 255 beside 0 and 1 is left out.",
}


# -------------------------------------------------------------------------------------------- from the page


def painted_mask(layers: list[Image.Image], way: str, size: tuple[int, int]) -> np.ndarray:
    """What was painted over the picture, as labels uint8 [H, W] at its true `size` (H, W): 0, 1, and 255 for bare strokes.

    layers: RGBA, any scale of the same shape. Raises InputError where nothing, or everything, is painted.
    """
    if not layers:
        raise InputError("Nothing is painted yet; paint over the object in the picture.")
    drawn = Image.new("RGBA", layers[0].size)
    for layer in layers:
        drawn.alpha_composite(layer.convert("RGBA"))
    if way == PAINT:
        return read_mask(drawn, size)
    pixels = np.asarray(drawn).astype(int)
    near = [np.abs(pixels[..., :3] - np.array(_rgb(color))).sum(axis=-1) for color in (OBJECT, BACKGROUND)]
    labels = np.where(pixels[..., 3] <= 127, IGNORE, (near[0] < near[1]).astype(int)).astype(np.uint8)
    # Palette mode says that these numbers are labels: 255 is nobody's brightness.
    marks = Image.fromarray(labels).convert("P")
    marks.putdata(labels.reshape(-1).tolist())
    marks.putpalette([value for color in ("#000000", OBJECT) for value in _rgb(color)])
    if not (labels == 1).any() or not (labels == 0).any():
        missing = "object (orange)" if not (labels == 1).any() else "background (blue)"
        raise InputError(f"No stroke marks the {missing}; draw at least one of each colour.")
    return read_mask(marks, size)


def _rgb(color: str) -> tuple[int, int, int]:
    return tuple(bytes.fromhex(color[1:]))


def read_any(way: str, canvas: dict | None, file: str | None, size: tuple[int, int]) -> np.ndarray:
    """The mask by whichever way it was given."""
    if way == UPLOAD:
        if not file:
            raise InputError("There is no mask file yet; upload one, or paint the object instead.")
        return read_mask(file, size)
    return painted_mask([layer for layer in (canvas or {}).get("layers", []) if layer is not None], way, size)


def class_name(text: str) -> str:
    """One clean class name. Raises InputError for none, and for one that no text encoder could read."""
    name = " ".join((text or "").split())
    if not name:
        raise InputError("The class has no name; write one, for example: cat.")
    if len(name) > 60 or "," in name:
        raise InputError("The class name is not a name: give one word or a short phrase, without commas.")
    return name


def search_settings(recipe: str, epochs: Any, rate: Any) -> OptimizeSettings:
    """Recipe with its epochs and rate changed; InputError where the server does not go along."""
    if recipe not in RECIPES:
        raise InputError(f"There is no recipe '{str(recipe)[:40]}'; choose {' or '.join(RECIPES)}.")
    epochs = whole(epochs)
    if not isinstance(epochs, int) or not 1 <= epochs <= MAX_EPOCHS:
        raise InputError(f"The number of epochs is {epochs}; choose a whole number from 1 to {MAX_EPOCHS}.")
    if not isinstance(rate, (int, float)):
        raise InputError("The learning rate is not a number.")
    settings = replace(RECIPES[recipe], epochs=epochs, rate=float(rate))
    settings.validate()
    return settings


# ---------------------------------------------------------------------------------------------- to the page


def canvas_value(image: Image.Image) -> dict:
    """A fresh canvas with the picture on it, at a size to paint on; read_mask brings the paint back to its size."""
    return {"background": plot.enlarge(shrunk(image, MAX_CANVAS)), "layers": [], "composite": None}


def given_mask(image: Image.Image, labels: np.ndarray) -> Image.Image:
    """The picture with the mask as it was understood: object and background in the two colours, the rest as it is.

    labels: uint8 [H, W] at the picture's size.
    """
    image = on_screen(image)
    labels = np.asarray(Image.fromarray(labels).resize(image.size, Image.Resampling.NEAREST))
    shown = plot.mask_overlay(image, labels == 1, OBJECT)
    return plot.mask_overlay(shown, labels == 0, BACKGROUND) if (labels == IGNORE).any() else shown


def versus(image: Image.Image, maps: Maps) -> tuple[tuple, tuple]:
    """Heatmaps and masks of the word (first) and its token (second), as two pairs for gr.ImageSlider."""
    large, top = on_screen(image), max(maps.peaks)
    heat = tuple(plot.overlay(large, one, top) for one in maps.heatmaps)
    masks = tuple(plot.mask_overlay(large, _mask_of(mask, large.size), OBJECT) for mask in maps.masks)
    return heat, masks


def _mask_of(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(plot.mask_image(mask).resize(size, Image.Resampling.NEAREST)) > 127


def agreement(maps: Maps, labels: np.ndarray) -> tuple[float, float]:
    """IoU of the word's and of the token's mask with the mask given, where it is labelled."""
    before, after = (float(iou(confusion(mask, labels == 1, labels == IGNORE))) for mask in maps.masks)
    return before, after


def verdict(name: str, before: float, after: float, found: Optimized) -> str:
    how = found.reason or f"{found.epochs} epochs"
    return (
        f'<p class="verdict"><b>{before:.2f}</b> the word <i>{html.escape(name)}</i> → <b>{after:.2f}</b> its token '
        f"<span>IoU with your mask</span></p>"
        f"<p>loss {found.losses[0]:.4f} → {found.loss:.4f} · {html.escape(how)} · {found.seconds:.1f} s</p>"
    )


def curve_of(losses: list[float], settings: OptimizeSettings) -> str:
    return f"<h3>Loss</h3>{plot.loss_curve(losses, settings.epochs)}"


# ------------------------------------------------------------------------------------------------- the work


def target_of(pipe: Any, made: Generation, labels: np.ndarray) -> np.ndarray:
    """What the search is to match: labels at the picture's size, for a photograph at the size at which the model sees it."""
    if isinstance(made.settings, PhotoSettings):
        return photo_target(pipe, made.image, labels, made.settings)
    return labels


def search(
    pipe: Any,
    made: Generation,
    labels: np.ndarray,
    name: str,
    settings: OptimizeSettings,
    should_stop: Callable[[], bool],
    driving: AbstractContextManager = nullcontext(),
) -> Iterator[tuple[Epoch | Optimized, list[float]]]:
    """Runs `optimize` within `driving`; gives its latest epoch every SHOW_EVERY seconds, at the end the result, with the losses so far."""
    start, losses, target = initial_embedding(pipe, [name]), [], target_of(pipe, made, labels)
    recording = own_choice(pipe, made.recording)

    def work(report: Callable[[Epoch], None]) -> Optimized:
        with driving:
            return optimize([recording], [target], start, settings, report, should_stop)

    for epochs, found in beside(work, SHOW_EVERY):
        if found:
            check_begun(found)
        losses += [epoch.loss for epoch in epochs]
        yield (found or epochs[-1]), losses


@torch.no_grad()
def preview(pipe: Any, made: Generation, embedding: torch.Tensor) -> Image.Image:
    """The heatmap of the class as it is now."""
    return plot.overlay(
        on_screen(made.image), heatmaps(own_choice(pipe, made.recording), embedding)[1].cpu().numpy(), 1.0
    )


# -------------------------------------------------------------------------------------------------- the tab


class OptimizeTab:
    """Its components and what happens on them. Made inside gr.Tab.

    from_generate: the id of the first tab's picture. pick: its list of tokens.
    """

    def __init__(self, desk: Desk, tab: gr.Tab, from_generate: gr.State, pick: gr.Dropdown):
        self.desk, self.tab, self.from_generate, self.pick = desk, tab, from_generate, pick
        self.key, self.token_name = gr.State(None), gr.State(None)
        with gr.Row(elem_classes="columns"):
            with gr.Column(scale=5, min_width=320, elem_classes="give"):
                self._lay_out_picture()
                self._lay_out_mask()
                self._lay_out_class()
            with gr.Column(scale=7, min_width=320, elem_classes="get"):
                self._lay_out_search()
                self._lay_out_elsewhere()
        only_numbers(self.seed, self.of_photo[-1], self.other_seed, self.epochs, self.rate)
        self.shown = [self.key, self.canvas, self.facts, self.start, self.note]
        self.given = [self.key, self.way, self.canvas, self.file, self.name, self.recipe, self.epochs, self.rate]
        self._wire_picture()
        self._wire_mask()
        self._wire_search()
        self._wire_elsewhere()
        self._wire_programs()

    # ---- the left column: what you give

    def _lay_out_picture(self) -> None:
        gr.HTML("<h2>1 · Picture</h2>", elem_classes="step")
        self.source = gr.Radio(
            [MAKE, PHOTO],
            value=MAKE,
            show_label=False,
            container=False,
            elem_id="learn-source",
            elem_classes="ways",
            visible=takes_photographs(self.desk.pipe),
        )
        with gr.Column(elem_classes="part") as self.for_prompt:
            with gr.Group():
                self.prompt = gr.Textbox(FIRST_PROMPT, label="Prompt", max_length=MAX_PROMPT, elem_id="learn-prompt")
                with gr.Row(elem_classes="seed"):
                    self.seed = gr.Number(
                        1, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, min_width=90, elem_id="learn-seed"
                    )
            with gr.Row(elem_classes="buttons"):
                self.draw = gr.Button("New picture", min_width=130, elem_id="learn-draw")
                self.take = gr.Button("Use the one from Generate", min_width=130, elem_id="learn-take")
        with gr.Column(visible=False, elem_classes="part") as self.for_photo:
            self.of_photo = photo_fields("learn-photo", "the class")
            with gr.Row(elem_classes="buttons"):
                self.use = gr.Button("Use this photograph", elem_id="learn-use")

    def _lay_out_mask(self) -> None:
        gr.HTML("<h2>2 · Mask</h2>", elem_classes="step")
        self.way = gr.Radio(
            [PAINT, STROKES, UPLOAD], value=PAINT, show_label=False, container=False, elem_id="way", elem_classes="ways"
        )
        self.hint = gr.HTML(HINTS[PAINT], elem_id="hint")
        self.canvas = gr.ImageEditor(
            type="pil",
            image_mode="RGBA",
            format="png",
            sources=(),
            transforms=(),
            layers=False,
            brush=gr.Brush(default_size=28, colors=[OBJECT, BACKGROUND], default_color=OBJECT, color_mode="fixed"),
            eraser=gr.Eraser(default_size=28),
            canvas_size=(512, 512),
            show_label=False,
            buttons=[],
            elem_id="canvas",
        )
        self.file = gr.File(label="Mask picture", file_types=["image"], visible=False, height=120, elem_id="mask-file")

    def _lay_out_class(self) -> None:
        own = RECIPES["fast"]
        gr.HTML("<h2>3 · Class</h2>", elem_classes="step")
        self.name = gr.Textbox("cat", label="Name of the class", max_lines=1, elem_id="class-name")
        self.note = gr.HTML("", elem_id="learn-note", elem_classes="note")
        with gr.Row(elem_classes="buttons"):
            self.start = gr.Button(
                "Optimize token", variant="primary", scale=3, min_width=120, interactive=False, elem_id="learn"
            )
            self.halt = gr.Button(
                "Stop: keep the best", variant="stop", scale=2, min_width=120, interactive=False, elem_id="learn-stop"
            )
        with gr.Accordion("Recipe, epochs, rate", open=False, elem_id="learn-more"):
            self.recipe = gr.Radio(
                list(RECIPES),
                value=own.recipe,
                label="Recipe",
                info="paper: as published, 500 epochs of gradient descent",
            )
            with gr.Row():
                self.epochs = gr.Slider(
                    1, MAX_EPOCHS, own.epochs, step=1, label="Epochs", elem_id="epochs", min_width=140
                )
                self.rate = gr.Number(own.rate, label="Learning rate", minimum=0, min_width=100)

    # ---- the right column: what you get

    def _lay_out_search(self) -> None:
        with gr.Row(elem_classes="pictures"):
            self.now = gr.Image(
                label="Heatmap of the class, as it is learned",
                type="pil",
                format="png",
                interactive=False,
                min_width=220,
                buttons=["download", "fullscreen"],
                elem_id="now",
                elem_classes="shown",
                alt_text="Heatmap of the class so far",
            )
            self.curve = gr.HTML(NO_CURVE, elem_id="curve", container=True, min_width=220)
        self.result = gr.HTML("", elem_id="verdict")
        with gr.Row(elem_classes="pictures"):
            self.heat = gr.ImageSlider(
                label="Heatmap: word | token",
                type="pil",
                format="png",
                interactive=False,
                elem_id="heat-slider",
                elem_classes="shown",
                min_width=220,
                buttons=["download", "fullscreen"],
            )
            self.masks = gr.ImageSlider(
                label="Mask: word | token",
                type="pil",
                format="png",
                interactive=False,
                elem_id="mask-slider",
                elem_classes="shown",
                min_width=220,
                buttons=["download", "fullscreen"],
            )
        with gr.Row(elem_classes="end"):
            self.facts = gr.HTML("", elem_id="learn-facts", elem_classes="facts")
            self.download = gr.DownloadButton(
                "Download token", interactive=False, scale=1, min_width=150, elem_id="learn-download"
            )

    def _lay_out_elsewhere(self) -> None:
        gr.HTML("<h2>Try it on another prompt</h2>", elem_classes="step")
        with gr.Row(elem_classes="try"):
            self.other = gr.Textbox(
                "A photograph of a cat on grass",
                show_label=False,
                container=False,
                max_length=MAX_PROMPT,
                scale=6,
                min_width=200,
                elem_id="try-prompt",
            )
            self.other_seed = gr.Number(
                7,
                show_label=False,
                container=False,
                precision=0,
                minimum=0,
                maximum=MAX_SEED,
                scale=1,
                min_width=70,
                elem_id="try-seed",
            )
            self.go = gr.Button("Go", scale=1, min_width=70, interactive=False, elem_id="try")
        self.tried = gr.Gallery(
            label="The token elsewhere",
            columns=3,
            height="auto",
            object_fit="contain",
            format="png",
            interactive=False,
            preview=False,
            buttons=["download", "fullscreen"],
            elem_id="tried",
            elem_classes="gallery",
        )

    # ---- the picture

    def _wire_picture(self) -> None:
        photo, caption, *_ = self.of_photo
        gr.on(
            [photo.upload, self.use.click, caption.submit],
            self.check_photograph,
            [*self.of_photo, self.name],
            None,
            concurrency_id="checks",
            concurrency_limit=CHECKS,
            **QUIET,
        ).success(
            self.take_photograph,
            [*self.of_photo, self.name],
            self.shown,
            concurrency_id="model",
            concurrency_limit=1,
            show_progress_on=self.canvas,
            **PRIVATE,
        )
        self.source.change(
            lambda chosen: (gr.Column(visible=chosen != PHOTO), gr.Column(visible=chosen == PHOTO)),
            self.source,
            [self.for_prompt, self.for_photo],
            queue=False,
            **QUIET,
        )
        self.take.click(self.take_picture, self.from_generate, self.shown, **QUIET)
        self.tab.select(self.take_if_none, [self.key, self.from_generate], self.shown, **QUIET)
        gr.on(
            [self.draw.click, self.prompt.submit],
            self.draw_picture,
            [self.prompt, self.seed],
            self.shown,
            concurrency_id="model",
            concurrency_limit=1,
            show_progress_on=self.canvas,
            **PRIVATE,
        )
        # "A photograph of a potted plant" names the class as well; any other prompt leaves it as it is.
        self.prompt.change(None, [self.prompt, self.name], self.name, js=NAMED, **PRIVATE)

    def show(self, made_key: str, made: Generation) -> tuple:
        return made_key, canvas_value(made.image), image_facts(made), gr.Button(interactive=True), ""

    def take_picture(self, first_key):
        try:
            return self.show(first_key, self.desk.find(first_key))
        except InputError as error:
            raise problem(error) from None

    def take_if_none(self, own_key, first_key):
        made = self.desk.store.get(first_key)
        return self.show(first_key, made) if own_key is None and made is not None else (gr.skip(),) * len(self.shown)

    def draw_picture(self, text, number, request: gr.Request, progress=gr.Progress()):
        try:
            settings = GenerateSettings.for_model(self.desk.pipe, text or "", seed=whole(number))
            made = self.desk.draw(settings, PICTURE, request, progress)
            return self.show(self.desk.keep(made, request), made)
        except (InputError, Stopped) as error:
            raise problem(error) from None

    def read_photograph(self, file, *about_and_class):
        *about, text = about_and_class
        settings = photo_settings(self.desk.pipe, *about, MapSettings(words=(class_name(text),)))
        check_photo(self.desk.pipe, file, settings)
        return settings

    def check_photograph(self, request: gr.Request, *values):
        try:
            self.read_photograph(*values)
        except InputError as error:
            raise problem(error) from None
        self.desk.begin(request, PICTURE)

    def take_photograph(self, request: gr.Request, *values):
        try:
            made = self.desk.look(values[0], self.read_photograph(*values), PICTURE, request)
            return self.show(self.desk.keep(made, request), made)
        except (InputError, Stopped) as error:
            raise problem(error) from None

    # ---- the mask and the search

    def _wire_mask(self) -> None:
        self.way.change(self.choose, self.way, [self.hint, self.canvas, self.file], queue=False, **QUIET)
        self.recipe.change(
            lambda chosen: (RECIPES[chosen].epochs, RECIPES[chosen].rate),
            self.recipe,
            [self.epochs, self.rate],
            queue=False,
            **QUIET,
        )

    def choose(self, chosen):
        return HINTS.get(chosen, ""), gr.ImageEditor(visible=chosen != UPLOAD), gr.File(visible=chosen == UPLOAD)

    def _wire_search(self) -> None:
        begun = self.start.click(
            self.begin,
            self.given,
            [self.start, self.halt, self.note, self.now],
            concurrency_id="checks",
            concurrency_limit=CHECKS,
            **QUIET,
        )
        ran = begun.success(
            self.run,
            self.given,
            [
                self.now,
                self.curve,
                self.result,
                self.heat,
                self.masks,
                self.facts,
                self.download,
                self.token_name,
                self.pick,
                self.go,
            ],
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

    def understood(self, made_key, chosen, painted, uploaded, text, *search_by):
        """Everything that can be wrong, before anything is queued."""
        made = self.desk.find(made_key)
        labels = read_any(chosen, painted, uploaded, (made.image.height, made.image.width))
        return made, labels, class_name(text), search_settings(*search_by)

    def begin(self, request: gr.Request, *values):
        try:
            made, labels, called, _ = self.understood(*values)
            initial_embedding(self.desk.pipe, [called])
        except InputError as error:
            raise problem(error) from None
        self.desk.begin(request, WORK)
        return gr.Button(interactive=False), gr.Button(interactive=True), "", given_mask(made.image, labels)

    def run(self, request: gr.Request, *values):
        try:
            made, labels, called, settings = self.understood(*values)
            stop = self.desk.flag(request, WORK)
            try:
                for state, losses in search(
                    self.desk.pipe, made, labels, called, settings, stop.is_set, self.desk.alone()
                ):
                    yield preview(self.desk.pipe, made, state.embedding), curve_of(losses, settings), *[gr.skip()] * 8
            finally:
                stop.set()  # a visitor who left ends the search too
                self.desk.end(request, WORK, stop)
            owner = visitor(request)
            label = self.desk.shelf.add(owner, token_of([made], [called], state, settings))
            path = self.desk.shelf.path(owner, label)
            maps = self.desk.answer(made, MapSettings(words=(called,), tokens=(str(path),)))
            pairs, scores = versus(made.image, maps), agreement(maps, labels)
            yield (
                gr.skip(),
                gr.skip(),
                verdict(called, *scores, state),
                *pairs,
                image_facts(made),
                gr.DownloadButton(value=str(path), interactive=True),
                label,
                gr.Dropdown(choices=self.desk.shelf.names(owner)),
                gr.Button(interactive=True),
            )
        except InputError as error:
            raise problem(error) from None

    def stop_work(self, request: gr.Request):
        self.desk.stop(request, WORK)

    # ---- elsewhere

    def _wire_elsewhere(self) -> None:
        gr.on(
            [self.go.click, self.other.submit],
            self.elsewhere,
            [self.token_name, self.other, self.other_seed, self.name],
            self.tried,
            concurrency_id="model",
            concurrency_limit=1,
            show_progress_on=self.tried,
            **PRIVATE,
        )

    def elsewhere(self, label, text, number, called, request: gr.Request, progress=gr.Progress()):
        try:
            path = self.desk.shelf.path(visitor(request), label)
            asked = MapSettings(words=(class_name(called),), tokens=(str(path),))
            settings = GenerateSettings.for_model(self.desk.pipe, text or "", seed=whole(number))
            made = self.desk.draw(
                settings, PICTURE, request, progress, branch_for(asked)
            )  # looked at once, so not kept
            maps = self.desk.answer(made, asked)
        except (InputError, Stopped) as error:
            raise problem(error) from None
        pair, cut = versus(made.image, maps)
        return [
            (plot.enlarge(made.image), "the picture"),
            (pair[0], f"{maps.labels[0]}: heatmap of the word"),
            (pair[1], "heatmap of the token"),
            (cut[0], "mask of the word"),
            (cut[1], "mask of the token"),
        ]

    # ---- the API: the whole way in one call, on the picture of /generate

    def _wire_programs(self) -> None:
        with gr.Row(visible=False):
            for_programs, token_file, line = gr.Button("optimize"), gr.File(), gr.Textbox()
        for_programs.click(
            self.api_optimize,
            [self.from_generate, self.file, self.name, self.recipe, self.epochs, self.rate],
            [token_file, line],
            api_name="optimize",
            concurrency_id="model",
            concurrency_limit=1,
        )

    def api_optimize(self, made_key, mask, name, recipe, epochs, rate, request: gr.Request):
        """Learns a token from this session's last picture and a mask file. Returns the token's file and a line of facts."""
        try:
            made, labels, called, settings = self.understood(made_key, UPLOAD, None, mask, name, recipe, epochs, rate)
            self.desk.begin(request, WORK)
            stop = self.desk.flag(request, WORK)
            try:
                target = target_of(self.desk.pipe, made, labels)
                with self.desk.alone():
                    found = optimize(
                        [own_choice(self.desk.pipe, made.recording)],
                        [target],
                        initial_embedding(self.desk.pipe, [called]),
                        settings,
                        should_stop=stop.is_set,
                    )
            finally:
                self.desk.end(request, WORK, stop)
            label = self.desk.shelf.add(visitor(request), token_of([made], [called], found, settings))
            line = f"loss {found.losses[0]:.4f} to {found.loss:.4f} in {found.epochs} epochs, {found.seconds:.1f} s"
            return str(self.desk.shelf.path(visitor(request), label)), line
        except InputError as error:
            raise problem(error) from None
