"""The second tab: the token of a class, learned from one picture and one mask."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import gradio as gr
import numpy as np
import torch
from PIL import Image

from ovam_core import plot
from ovam_core.annotated import check_begun, photo_target, token_of
from ovam_core.evaluate import confusion, iou
from ovam_core.generate import (
    MAX_PROMPT,
    MAX_SEED,
    GenerateSettings,
    Generation,
    Maps,
    MapSettings,
    Stopped,
    branch_for,
)
from ovam_core.heatmap import heatmaps
from ovam_core.optimize import (
    IGNORE,
    RECIPES,
    Epoch,
    Optimized,
    OptimizeSettings,
    initial_embedding,
    optimize,
    read_mask,
)
from ovam_core.photo import PhotoSettings
from ovam_core.recorder import own_choice

from .beside import beside
from .desk import Desk, only_numbers, problem, visitor
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

    layers: RGBA, any scale of the same shape. Raises ValueError where nothing, or everything, is painted.
    """
    if not layers:
        raise ValueError("Nothing is painted yet; paint over the object in the picture.")
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
        raise ValueError(f"No stroke marks the {missing}; draw at least one of each colour.")
    return read_mask(marks, size)


def _rgb(color: str) -> tuple[int, int, int]:
    return tuple(bytes.fromhex(color[1:]))


def read_any(way: str, canvas: dict | None, file: str | None, size: tuple[int, int]) -> np.ndarray:
    """The mask by whichever way it was given."""
    if way == UPLOAD:
        if not file:
            raise ValueError("There is no mask file yet; upload one, or paint the object instead.")
        return read_mask(file, size)
    return painted_mask([layer for layer in (canvas or {}).get("layers", []) if layer is not None], way, size)


def class_name(text: str) -> str:
    """One clean class name. Raises ValueError for none, and for one that no text encoder could read."""
    name = " ".join((text or "").split())
    if not name:
        raise ValueError("The class has no name; write one, for example: cat.")
    if len(name) > 60 or "," in name:
        raise ValueError("The class name is not a name: give one word or a short phrase, without commas.")
    return name


def search_settings(recipe: str, epochs: Any, rate: Any) -> OptimizeSettings:
    """Recipe with its epochs and rate changed; ValueError where the server does not go along."""
    if recipe not in RECIPES:
        raise ValueError(f"There is no recipe '{str(recipe)[:40]}'; choose {' or '.join(RECIPES)}.")
    epochs = whole(epochs)
    if not isinstance(epochs, int) or not 1 <= epochs <= MAX_EPOCHS:
        raise ValueError(f"The number of epochs is {epochs}; choose a whole number from 1 to {MAX_EPOCHS}.")
    if not isinstance(rate, (int, float)):
        raise ValueError("The learning rate is not a number.")
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
    pipe: Any, made: Generation, labels: np.ndarray, name: str, settings: OptimizeSettings, should_stop: Callable[[], bool],
    driving: AbstractContextManager,
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
    return plot.overlay(on_screen(made.image), heatmaps(own_choice(pipe, made.recording), embedding)[1].cpu().numpy(), 1.0)


# -------------------------------------------------------------------------------------------------- the tab


def build(desk: Desk, tab: gr.Tab, from_generate: gr.State, pick: gr.Dropdown) -> None:
    """Lays the tab out and wires it. from_generate: id of the first tab's picture. pick: its list of tokens."""
    key = gr.State(None)
    recipe_of = RECIPES["fast"]

    with gr.Row(elem_classes="columns"):
        with gr.Column(scale=5, min_width=320, elem_classes="give"):
            gr.HTML("<h2>1 · Picture</h2>", elem_classes="step")
            source = gr.Radio(
                [MAKE, PHOTO], value=MAKE, show_label=False, container=False, elem_id="learn-source", elem_classes="ways",
                visible=takes_photographs(desk.pipe),
            )  # fmt: skip
            with gr.Column(elem_classes="part") as for_prompt:
                with gr.Group():
                    prompt = gr.Textbox(FIRST_PROMPT, label="Prompt", max_length=MAX_PROMPT, elem_id="learn-prompt")
                    with gr.Row(elem_classes="seed"):
                        seed = gr.Number(
                            1, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, min_width=90, elem_id="learn-seed"
                        )
                with gr.Row(elem_classes="buttons"):
                    draw = gr.Button("New picture", min_width=130, elem_id="learn-draw")
                    take = gr.Button("Use the one from Generate", min_width=130, elem_id="learn-take")
            with gr.Column(visible=False, elem_classes="part") as for_photo:
                of_photo = photo_fields("learn-photo", "the class")
                with gr.Row(elem_classes="buttons"):
                    use = gr.Button("Use this photograph", elem_id="learn-use")
            gr.HTML("<h2>2 · Mask</h2>", elem_classes="step")
            way = gr.Radio([PAINT, STROKES, UPLOAD], value=PAINT, show_label=False, container=False, elem_id="way", elem_classes="ways")
            hint = gr.HTML(HINTS[PAINT], elem_id="hint")
            canvas = gr.ImageEditor(
                type="pil", image_mode="RGBA", format="png", sources=(), transforms=(), layers=False,
                brush=gr.Brush(default_size=28, colors=[OBJECT, BACKGROUND], default_color=OBJECT, color_mode="fixed"),
                eraser=gr.Eraser(default_size=28), canvas_size=(512, 512), show_label=False, buttons=[], elem_id="canvas",
            )  # fmt: skip
            file = gr.File(label="Mask picture", file_types=["image"], visible=False, height=120, elem_id="mask-file")
            gr.HTML("<h2>3 · Class</h2>", elem_classes="step")
            name = gr.Textbox("cat", label="Name of the class", max_lines=1, elem_id="class-name")
            note = gr.HTML("", elem_id="learn-note", elem_classes="note")
            with gr.Row(elem_classes="buttons"):
                start = gr.Button("Optimize token", variant="primary", scale=3, min_width=120, interactive=False, elem_id="learn")
                halt = gr.Button("Stop: keep the best", variant="stop", scale=2, min_width=120, interactive=False, elem_id="learn-stop")
            with gr.Accordion("Recipe, epochs, rate", open=False, elem_id="learn-more"):
                recipe = gr.Radio(list(RECIPES), value=recipe_of.recipe, label="Recipe", info="paper: as published, 500 epochs of gradient descent")
                with gr.Row():
                    epochs = gr.Slider(1, MAX_EPOCHS, recipe_of.epochs, step=1, label="Epochs", elem_id="epochs", min_width=140)
                    rate = gr.Number(recipe_of.rate, label="Learning rate", minimum=0, min_width=100)

        with gr.Column(scale=7, min_width=320, elem_classes="get"):
            with gr.Row(elem_classes="pictures"):
                now = gr.Image(
                    label="Heatmap of the class, as it is learned", type="pil", format="png", interactive=False, min_width=220,
                    buttons=["download", "fullscreen"], elem_id="now", elem_classes="shown", alt_text="Heatmap of the class so far",
                )  # fmt: skip
                curve = gr.HTML(NO_CURVE, elem_id="curve", container=True, min_width=220)
            result = gr.HTML("", elem_id="verdict")
            with gr.Row(elem_classes="pictures"):
                heat = gr.ImageSlider(
                    label="Heatmap: word | token", type="pil", format="png", interactive=False, elem_id="heat-slider",
                    elem_classes="shown", min_width=220, buttons=["download", "fullscreen"],
                )  # fmt: skip
                masks = gr.ImageSlider(
                    label="Mask: word | token", type="pil", format="png", interactive=False, elem_id="mask-slider",
                    elem_classes="shown", min_width=220, buttons=["download", "fullscreen"],
                )  # fmt: skip
            with gr.Row(elem_classes="end"):
                facts = gr.HTML("", elem_id="learn-facts", elem_classes="facts")
                download = gr.DownloadButton("Download token", interactive=False, scale=1, min_width=150, elem_id="learn-download")
            gr.HTML("<h2>Try it on another prompt</h2>", elem_classes="step")
            with gr.Row(elem_classes="try"):
                other = gr.Textbox(
                    "A photograph of a cat on grass", show_label=False, container=False, max_length=MAX_PROMPT, scale=6,
                    min_width=200, elem_id="try-prompt",
                )  # fmt: skip
                other_seed = gr.Number(7, show_label=False, container=False, precision=0, minimum=0, maximum=MAX_SEED,
                                       scale=1, min_width=70, elem_id="try-seed")  # fmt: skip
                go = gr.Button("Go", scale=1, min_width=70, interactive=False, elem_id="try")
            tried = gr.Gallery(
                label="The token elsewhere", columns=3, height="auto", object_fit="contain", format="png", interactive=False,
                preview=False, buttons=["download", "fullscreen"], elem_id="tried", elem_classes="gallery",
            )  # fmt: skip

    only_numbers(seed, of_photo[-1], other_seed, epochs, rate)
    token_name = gr.State(None)
    private = {"api_visibility": "private"}
    quiet = {"show_progress": "hidden", **private}

    def show(made_key: str, made: Generation) -> tuple:
        return made_key, canvas_value(made.image), image_facts(made), gr.Button(interactive=True), ""

    shown = [key, canvas, facts, start, note]

    def take_picture(first_key):
        try:
            return show(first_key, desk.find(first_key))
        except ValueError as error:
            raise problem(error) from None

    def take_if_none(own_key, first_key):
        made = desk.store.get(first_key)
        return show(first_key, made) if own_key is None and made is not None else (gr.skip(),) * len(shown)

    def draw_picture(text, number, request: gr.Request, progress=gr.Progress()):
        try:
            settings = GenerateSettings.for_model(desk.pipe, text or "", seed=whole(number))
            made = desk.draw(settings, PICTURE, request, progress)
            return show(desk.keep(made, request), made)
        except (ValueError, Stopped) as error:
            raise problem(error) from None

    def read_photograph(file, *about_and_class):
        *about, text = about_and_class
        settings = photo_settings(desk.pipe, *about, MapSettings(words=(class_name(text),)))
        check_photo(desk.pipe, file, settings)
        return settings

    def check_photograph(request: gr.Request, *values):
        try:
            read_photograph(*values)
        except ValueError as error:
            raise problem(error) from None
        desk.begin(request, PICTURE)

    def take_photograph(request: gr.Request, *values):
        try:
            made = desk.look(values[0], read_photograph(*values), PICTURE, request)
            return show(desk.keep(made, request), made)
        except (ValueError, Stopped) as error:
            raise problem(error) from None

    photo, caption, *_ = of_photo
    gr.on(
        [photo.upload, use.click, caption.submit], check_photograph, [*of_photo, name], None, concurrency_id="checks",
        concurrency_limit=CHECKS, **quiet,
    ).success(
        take_photograph, [*of_photo, name], shown, concurrency_id="model", concurrency_limit=1, show_progress_on=canvas,
        **private,
    )  # fmt: skip
    source.change(
        lambda chosen: (gr.Column(visible=chosen != PHOTO), gr.Column(visible=chosen == PHOTO)), source,
        [for_prompt, for_photo], queue=False, **quiet,
    )  # fmt: skip
    take.click(take_picture, from_generate, shown, **quiet)
    tab.select(take_if_none, [key, from_generate], shown, **quiet)
    gr.on(
        [draw.click, prompt.submit], draw_picture, [prompt, seed], shown, concurrency_id="model", concurrency_limit=1,
        show_progress_on=canvas, **private,
    )  # fmt: skip
    # "A photograph of a potted plant" names the class as well; any other prompt leaves it as it is.
    prompt.change(None, [prompt, name], name, js=NAMED, **private)

    def choose(chosen):
        return HINTS.get(chosen, ""), gr.ImageEditor(visible=chosen != UPLOAD), gr.File(visible=chosen == UPLOAD)

    way.change(choose, way, [hint, canvas, file], queue=False, **quiet)
    recipe.change(lambda chosen: (RECIPES[chosen].epochs, RECIPES[chosen].rate), recipe, [epochs, rate], queue=False, **quiet)

    # ---- the search

    given = [key, way, canvas, file, name, recipe, epochs, rate]

    def understood(made_key, chosen, painted, uploaded, text, *search_by):
        """Everything that can be wrong, before anything is queued."""
        made = desk.find(made_key)
        labels = read_any(chosen, painted, uploaded, (made.image.height, made.image.width))
        return made, labels, class_name(text), search_settings(*search_by)

    def begin(request: gr.Request, *values):
        try:
            made, labels, called, _ = understood(*values)
            initial_embedding(desk.pipe, [called])
        except ValueError as error:
            raise problem(error) from None
        desk.begin(request, WORK)
        return gr.Button(interactive=False), gr.Button(interactive=True), "", given_mask(made.image, labels)

    def run(request: gr.Request, *values):
        try:
            made, labels, called, settings = understood(*values)
            stop = desk.flag(request, WORK)
            try:
                for state, losses in search(desk.pipe, made, labels, called, settings, stop.is_set, desk.driving):
                    yield preview(desk.pipe, made, state.embedding), curve_of(losses, settings), *[gr.skip()] * 8
            finally:
                stop.set()  # a visitor who left ends the search too
                desk.end(request, WORK, stop)
            owner = visitor(request)
            label = desk.shelf.add(owner, token_of([made], [called], state, settings))
            path = desk.shelf.path(owner, label)
            maps, _ = desk.answer(made, MapSettings(words=(called,), tokens=(str(path),)))
            pairs, scores = versus(made.image, maps), agreement(maps, labels)
            yield (
                gr.skip(), gr.skip(), verdict(called, *scores, state), *pairs, image_facts(made),
                gr.DownloadButton(value=str(path), interactive=True), label, gr.Dropdown(choices=desk.shelf.names(owner)),
                gr.Button(interactive=True),
            )  # fmt: skip
        except ValueError as error:
            raise problem(error) from None

    begun = start.click(
        begin, given, [start, halt, note, now], concurrency_id="checks", concurrency_limit=CHECKS, **quiet
    )
    ran = begun.success(
        run, given, [now, curve, result, heat, masks, facts, download, token_name, pick, go], concurrency_id="model",
        concurrency_limit=1, **quiet,
    )  # fmt: skip
    ran.then(lambda: (gr.Button(interactive=True), gr.Button(interactive=False)), None, [start, halt], queue=False, **quiet)

    def stop_work(request: gr.Request):
        desk.stop(request, WORK)

    halt.click(stop_work, None, None, queue=False, **quiet)

    # ---- elsewhere

    def elsewhere(label, text, number, called, request: gr.Request, progress=gr.Progress()):
        try:
            path = desk.shelf.path(visitor(request), label)
            asked = MapSettings(words=(class_name(called),), tokens=(str(path),))
            settings = GenerateSettings.for_model(desk.pipe, text or "", seed=whole(number))
            made = desk.draw(settings, PICTURE, request, progress, branch_for(asked))  # looked at once, so not kept
            maps, _ = desk.answer(made, asked)
        except (ValueError, Stopped) as error:
            raise problem(error) from None
        pair, cut = versus(made.image, maps)
        return [
            (plot.enlarge(made.image), "the picture"), (pair[0], f"{maps.labels[0]}: heatmap of the word"),
            (pair[1], "heatmap of the token"), (cut[0], "mask of the word"), (cut[1], "mask of the token"),
        ]  # fmt: skip

    gr.on(
        [go.click, other.submit], elsewhere, [token_name, other, other_seed, name], tried, concurrency_id="model",
        concurrency_limit=1, show_progress_on=tried, **private,
    )  # fmt: skip

    # ---- the API: the whole way in one call, on the picture of /generate

    def api_optimize(made_key, mask, name, recipe, epochs, rate, request: gr.Request):
        """Learns a token from this session's last picture and a mask file. Returns the token's file and a line of facts."""
        try:
            made, labels, called, settings = understood(made_key, UPLOAD, None, mask, name, recipe, epochs, rate)
            desk.begin(request, WORK)
            stop = desk.flag(request, WORK)
            try:
                target = target_of(desk.pipe, made, labels)
                with desk.driving:
                    found = optimize([own_choice(desk.pipe, made.recording)], [target], initial_embedding(desk.pipe, [called]), settings,
                                     should_stop=stop.is_set)  # fmt: skip
            finally:
                desk.end(request, WORK, stop)
            label = desk.shelf.add(visitor(request), token_of([made], [called], found, settings))
            line = f"loss {found.losses[0]:.4f} to {found.loss:.4f} in {found.epochs} epochs, {found.seconds:.1f} s"
            return str(desk.shelf.path(visitor(request), label)), line
        except ValueError as error:
            raise problem(error) from None

    with gr.Row(visible=False):
        for_programs, token_file, line = gr.Button("optimize"), gr.File(), gr.Textbox()
    for_programs.click(
        api_optimize, [from_generate, file, name, recipe, epochs, rate], [token_file, line], api_name="optimize",
        concurrency_id="model", concurrency_limit=1,
    )  # fmt: skip
