"""The second tab: the token of a class, learned from one picture and one mask."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import gradio as gr
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ovam_core import plot
from ovam_core.attention.heatmap import heatmaps
from ovam_core.checks import MAX_PROMPT, MAX_SEED, check_whole
from ovam_core.data.metrics import confusion, iou
from ovam_core.errors import InputError, out_of_memory_as
from ovam_core.io.masks import IGNORE, read_mask
from ovam_core.models.presets import recommended_part
from ovam_core.optimization import RECIPES, Epoch, Optimized, OptimizeSettings, initial_embedding
from ovam_core.ovam import OVAM
from ovam_core.picture import Picture, Segmentation
from ovam_core.query import branch_of
from ovam_core.settings import GenerateSettings, PhotoSettings, SegmentSettings
from ovam_core.tokens import Token

from .canvas import MAX_LAYERS, Layer, flattened
from .events import CHECKS, MODEL, PRIVATE, QUIET, RAW, Inputs, give_back, handler
from .fields import PhotoFields, check_photo, small_enough, takes_photographs
from .model import NO_MEMORY, SHORT, Model
from .render import (
    BACKGROUND,
    OBJECT,
    canvas_value,
    given_mask,
    image_facts,
    loss_curve,
    on_screen,
    word_and_token,
)
from .session import Session
from .worker import in_thread

WORK, PICTURE = "optimize", "optimize: picture"  # of this tab, by which Stop finds them
MAKE, PHOTO = "Generate", "Upload a photograph"
PAINT, STROKES, UPLOAD = "Paint the object", "A few strokes", "Upload a mask"
MAX_EPOCHS = 500
SHOW_EVERY = 0.4  # seconds between two looks at a running search
FIRST_PROMPT = "A photograph of a cat"
NO_CURVE = "<h3>Loss</h3><p>The loss of every epoch will be drawn here.</p>"
# A class that the prompt names, "a photograph of a potted plant", and nothing beside it.
NAMED = r"""(text, name) => {
    const more = '(?!.*\\b(?:and|at|by|in|near|next|of|on|under|with)\\b)';
    const found = new RegExp('^a photograph of an? ' + more + '([\\w -]+)$', 'i').exec(text.trim());
    return found ? found[1] : name;
}"""
HINTS = {
    PAINT: "Paint over the whole object; what stays bare is background.",
    STROKES: "Orange strokes on the object, blue ones on the background; what stays bare counts for nothing.",
    UPLOAD: "Black is background, white is the object; any size of the same shape. 255 beside 0 and 1 is left out.",
}


# -------------------------------------------------------------------------------------------- from the page


def painted_mask(layers: Sequence[Layer], way: str, size: tuple[int, int]) -> np.ndarray:
    """What was painted over the picture, as labels uint8 [H, W] at its true `size` (H, W): 0, 1, and with strokes 255
    where nothing was painted.

    layers: any scale of the same shape. Raises InputError where nothing, or everything, is painted, and as `flattened`.
    """
    drawn = flattened(layers)
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


def _rgb(color: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(color[1:]))


def read_any(way: str, layers: Sequence[Layer], file: str | None, size: tuple[int, int]) -> np.ndarray:
    """The mask by whichever way it was given: layers painted on the canvas, or a file."""
    if way != UPLOAD:
        return painted_mask(layers, way, size)
    if not file:
        raise InputError("There is no mask file yet; upload one, or paint the object instead.")
    return read_mask(file, size)


def class_name(text: str) -> str:
    """One clean class name. Raises InputError for none, and for one that no text encoder could read."""
    name = " ".join(text.split())
    if not name:
        raise InputError("The class has no name; write one, for example: cat.")
    if len(name) > 60 or "," in name:
        raise InputError("The class name is not a name: give one word or a short phrase, without commas.")
    return name


def recipe_named(name: Any) -> OptimizeSettings:
    """Raises InputError for a name of none."""
    if str(name) not in RECIPES:
        raise InputError(f"There is no recipe '{str(name)[:40]}'; choose {' or '.join(RECIPES)}.")
    return RECIPES[str(name)]


def search_settings(recipe: Any, epochs: Any, rate: Any) -> OptimizeSettings:
    """A recipe with its epochs and rate changed. Raises InputError where the server does not go along."""
    usual = recipe_named(recipe)
    check_whole("The number of epochs", epochs, 1, MAX_EPOCHS)
    if not isinstance(rate, (int, float)):
        raise InputError("The learning rate is not a number.")
    settings = replace(usual, epochs=epochs, rate=float(rate))
    settings.validate()
    return settings


# ---------------------------------------------------------------------------------------------- to the page


def agreement(found: Segmentation, labels: np.ndarray) -> tuple[float, float]:
    """IoU of the word's and of the token's mask with the mask given, where it is labelled."""
    before, after = (float(iou(confusion(mask, labels == 1, labels == IGNORE))) for mask in found.masks)
    return before, after


def verdict(name: str, before: float, after: float, search: Optimized) -> str:
    """How much better the token's mask fits the given one than the word's, and how the search went; HTML."""
    how = search.reason or f"{search.epochs} epochs"
    return (
        f'<p class="verdict"><b>{before:.2f}</b> the word <i>{html.escape(name)}</i> → <b>{after:.2f}</b> its token '
        f"<span>IoU with your mask</span></p>"
        f"<p>loss {search.losses[0]:.4f} → {search.loss:.4f} · {html.escape(how)} · {search.seconds:.1f} s</p>"
    )


# ------------------------------------------------------------------------------------------------- the work

Learned = tuple[Token, Optimized]


def learn(
    ovam: OVAM,
    picture: Picture,
    labels: np.ndarray,
    name: str,
    settings: OptimizeSettings,
    should_stop: Callable[[], bool],
    on_epoch: Callable[[Epoch], None] | None = None,
) -> Learned:
    """The token of a class from one picture. labels: uint8 [H, W] at the picture's size."""
    target = ovam.target(picture, labels)
    return ovam.learn([picture], [target], [name], settings, on_epoch=on_epoch, should_stop=should_stop)


def search(
    ovam: OVAM,
    picture: Picture,
    labels: np.ndarray,
    name: str,
    settings: OptimizeSettings,
    should_stop: Callable[[], bool],
    work: AbstractContextManager,
) -> Iterator[tuple[Tensor, list[float], Learned | None]]:
    """Runs `learn` within `work`, in a thread; gives (best embedding, losses so far, None) every SHOW_EVERY seconds,
    and at the end the result in the place of None. should_stop: asked before every epoch.
    """
    losses: list[float] = []

    def run(report: Callable[[Epoch], None]) -> Learned:
        with work, out_of_memory_as(NO_MEMORY):
            return learn(ovam, picture, labels, name, settings, should_stop, report)

    for epochs, learned in in_thread(run, SHOW_EVERY):
        losses += [epoch.loss for epoch in epochs]
        yield (learned[1] if learned else epochs[-1]).embedding, losses, learned


@torch.no_grad()
def preview(ovam: OVAM, picture: Picture, embedding: Tensor) -> Image.Image:
    """The heatmap of the class as it is now."""
    heatmap = heatmaps(recommended_part(ovam.pipe, picture.recording), embedding)[1]
    return plot.overlay(on_screen(picture.image), heatmap.cpu().numpy(), 1.0)


# -------------------------------------------------------------------------------------------------- the tab


class OptimizeTab:
    """Its components and what happens on them. Made inside gr.Tab.

    from_generate: the id of the first tab's picture. pick: its list of tokens.
    """

    def __init__(self, model: Model, tab: gr.Tab, from_generate: gr.State, pick: gr.Dropdown):
        self.model, self.sessions, self.ovam = model, model.sessions, model.ovam
        self.tab, self.from_generate, self.pick = tab, from_generate, pick
        self.key, self.token_name = gr.State(None), gr.State(None)
        with gr.Row(elem_classes="columns"):
            with gr.Column(scale=5, min_width=320, elem_classes="give"):
                self._lay_out_picture()
                self._lay_out_mask()
                self._lay_out_class()
            with gr.Column(scale=7, min_width=320, elem_classes="get"):
                self._lay_out_search()
                self._lay_out_elsewhere()
        self.shown = [self.key, self.canvas, self.facts, self.start, self.note]
        self.search_by = [self.file, self.name, self.recipe, self.epochs, self.rate]
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
            visible=takes_photographs(self.ovam),
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
            self.upload = PhotoFields("learn-photo", "the class", self.sessions.limits.pixels)
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
                label="Seed",
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
        from_photo = {*self.upload.all, self.name}
        gr.on(
            [self.upload.photo.upload, self.use.click, self.upload.caption.submit],
            self.check_photograph,
            from_photo,
            None,
            **CHECKS,
            **QUIET,
        ).success(self.take_photograph, from_photo, self.shown, show_progress_on=self.canvas, **MODEL, **PRIVATE)
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
            {self.prompt, self.seed},
            self.shown,
            show_progress_on=self.canvas,
            **MODEL,
            **PRIVATE,
        )
        # "A photograph of a potted plant" names the class as well; any other prompt leaves it as it is.
        self.prompt.change(None, [self.prompt, self.name], self.name, js=NAMED, **PRIVATE)

    def show(self, key: str, picture: Picture) -> tuple:
        return key, canvas_value(picture.image), image_facts(picture), gr.Button(interactive=True), ""

    @handler
    def take_picture(self, first_key, request: gr.Request):
        return self.show(first_key, self.sessions.of(request).picture(first_key))

    @handler
    def take_if_none(self, own_key, first_key, request: gr.Request):
        picture = None if own_key else self.sessions.of(request).find(first_key)
        return (gr.skip(),) * len(self.shown) if picture is None else self.show(first_key, picture)

    def image_settings(self, text: str, seed: Any) -> GenerateSettings:
        return GenerateSettings.for_model(self.ovam.pipe, text, seed=seed)

    @handler
    def draw_picture(self, values: dict, request: gr.Request, progress=gr.Progress()):
        session, given = self.sessions.of(request), Inputs(values)
        settings = self.image_settings(given.text(self.prompt), given.whole(self.seed))
        session.begin(PICTURE)
        picture = self.model.draw(session, settings, PICTURE, progress)
        return self.show(session.keep(picture), picture)

    def read_photograph(self, given: Inputs) -> tuple[str | None, PhotoSettings]:
        return self.upload.read(self.ovam, given, SegmentSettings(words=(class_name(given.text(self.name)),)))

    @handler
    def check_photograph(self, values: dict, request: gr.Request):
        check_photo(self.ovam, *self.read_photograph(Inputs(values)))
        self.sessions.of(request).begin(PICTURE)

    @handler
    def take_photograph(self, values: dict, request: gr.Request):
        session = self.sessions.of(request)
        file, settings = self.read_photograph(Inputs(values))
        picture = self.model.look_at(session, file or "", settings, PICTURE)
        return self.show(session.keep(picture), picture)

    # ---- the mask and the search

    def _wire_mask(self) -> None:
        self.way.change(self.choose, self.way, [self.hint, self.canvas, self.file], queue=False, **QUIET)
        self.recipe.change(self.usual, self.recipe, [self.epochs, self.rate], queue=False, **QUIET)

    @handler
    def choose(self, way):
        return HINTS.get(str(way), ""), gr.ImageEditor(visible=way != UPLOAD), gr.File(visible=way == UPLOAD)

    @handler
    def usual(self, recipe):
        """Epochs and rate of a recipe."""
        settings = recipe_named(recipe)
        return settings.epochs, settings.rate

    def _wire_search(self) -> None:
        given = {self.key, self.way, *self.search_by}
        # The browser sends the layers in pieces, and this event once all are there.
        painted = self.start.click(self.take_canvas, {self.canvas, self.key}, None, **CHECKS, **QUIET)
        begun = painted.success(self.begin, given, [self.start, self.halt, self.note, self.now], **CHECKS, **QUIET)
        ran = begun.success(
            self.run,
            given,
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
            **MODEL,
            **QUIET,
        )
        give_back(ran, self.start, self.halt)
        self.halt.click(self.stop_work, None, None, queue=False, **QUIET)

    @handler
    def take_canvas(self, values: dict, request: gr.Request):
        session = self.sessions.of(request)
        session.picture(values[self.key])  # without one, there is nothing to paint on
        canvas, files = Inputs(values).painted(self.canvas)
        layers = [*self.sessions.pieces.take(request.session_hash or "", canvas), *files]
        session.paint(values[self.key], layers[: MAX_LAYERS + 1])

    def understood(
        self, session: Session, key: str | None, way: str, given: Inputs
    ) -> tuple[Picture, np.ndarray, str, OptimizeSettings]:
        """Everything that can be wrong, before anything is queued."""
        picture = session.picture(key)
        size = (picture.image.height, picture.image.width)
        file = small_enough(given.file(self.file), self.sessions.limits.pixels)
        labels = read_any(way, session.painted(key), file, size)
        settings = search_settings(given.text(self.recipe), given.whole(self.epochs), given.number(self.rate))
        return picture, labels, class_name(given.text(self.name)), settings

    @handler
    def begin(self, values: dict, request: gr.Request):
        session, given = self.sessions.of(request), Inputs(values)
        picture, labels, name, _ = self.understood(session, values[self.key], given.choice(self.way), given)
        initial_embedding(self.ovam.pipe, [name])
        session.begin(WORK)
        return gr.Button(interactive=False), gr.Button(interactive=True), "", given_mask(picture.image, labels)

    @handler
    def run(self, values: dict, request: gr.Request):
        session, given = self.sessions.of(request), Inputs(values)
        picture, labels, name, settings = self.understood(session, values[self.key], given.choice(self.way), given)
        work = self.model.turns.work(session)
        with session.run(WORK) as stop:  # which a visitor who left sets too
            run = search(
                self.ovam, picture, labels, name, settings, lambda: not work.next_unit(stop.is_set, SHORT), work
            )
            for embedding, losses, result in run:
                yield preview(self.ovam, picture, embedding), loss_curve(losses, settings.epochs), *[gr.skip()] * 8
                learned = result
        token, how = learned
        label = session.add_token(token)
        with self.model.words_of(session) as before_word:
            found = self.model.answer(picture, SegmentSettings(words=(name,), tokens=(token,)), before_word)
        yield (
            gr.skip(),
            gr.skip(),
            verdict(name, *agreement(found, labels), how),
            *word_and_token(found),
            image_facts(picture),
            gr.DownloadButton(value=str(session.token_file(label)), interactive=True),
            label,
            gr.Dropdown(choices=session.token_names()),
            gr.Button(interactive=True),
        )

    @handler
    def stop_work(self, request: gr.Request):
        self.sessions.of(request).stop(WORK)

    # ---- elsewhere

    def _wire_elsewhere(self) -> None:
        gr.on(
            [self.go.click, self.other.submit],
            self.elsewhere,
            {self.token_name, self.other, self.other_seed, self.name},
            self.tried,
            show_progress_on=self.tried,
            **MODEL,
            **PRIVATE,
        )

    @handler
    def elsewhere(self, values: dict, request: gr.Request, progress=gr.Progress()):
        session, given = self.sessions.of(request), Inputs(values)
        token = session.token(values[self.token_name])
        asked = SegmentSettings(words=(class_name(given.text(self.name)),), tokens=(token,))
        settings = self.image_settings(given.text(self.other), given.whole(self.other_seed))
        session.begin(PICTURE)
        # Looked at once, so not kept.
        picture = self.model.draw(session, settings, PICTURE, progress, branch_of([token]))
        with self.model.words_of(session) as before_word:
            found = self.model.answer(picture, asked, before_word)
        heat, masks = word_and_token(found)
        return [
            (plot.enlarge(picture.image), "the picture"),
            (heat[0], f"{found.labels[0]}: heatmap of the word"),
            (heat[1], "heatmap of the token"),
            (masks[0], "mask of the word"),
            (masks[1], "mask of the token"),
        ]

    # ---- the API: the whole way in one call, on the picture of /generate

    def _wire_programs(self) -> None:
        with gr.Row(visible=False):
            for_programs, token_file, line = gr.Button("optimize"), gr.File(), gr.Textbox()
        for_programs.click(
            self.api_optimize,
            [self.from_generate, *self.search_by],
            [token_file, line],
            api_name="optimize",
            **MODEL,
            **RAW,
        )

    @handler
    def api_optimize(self, made_key, mask, name, recipe, epochs, rate, request: gr.Request):
        """Learns a token from this session's last picture and a mask file. Returns the token's file and a line of
        facts."""
        session = self.sessions.of(request)
        given = Inputs(dict(zip(self.search_by, (mask, name, recipe, epochs, rate), strict=True)))
        picture, labels, called, settings = self.understood(session, made_key, UPLOAD, given)
        session.begin(WORK)
        with session.run(WORK) as stop, self.model.turns.work(session) as work, out_of_memory_as(NO_MEMORY):
            token, how = learn(
                self.ovam, picture, labels, called, settings, lambda: not work.next_unit(stop.is_set, SHORT)
            )
        line = f"loss {how.losses[0]:.4f} to {how.loss:.4f} in {how.epochs} epochs, {how.seconds:.1f} s"
        return str(session.token_file(session.add_token(token))), line
