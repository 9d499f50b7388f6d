"""The second tab: the token of a class, learned from one picture and one mask.

The canvas, the curve and all pictures are drawn in the browser (assets/optimize.js). What is shown comes as JSON, in a
mail: {"kind": ..., ...}; what goes wrong comes the same way, with the place of the page where it is said.
"""

from __future__ import annotations

import functools
import html
import inspect
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import gradio as gr
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ovam_core.attention.heatmap import claims, heatmaps
from ovam_core.checks import MAX_PROMPT, MAX_SEED, check_whole
from ovam_core.data.metrics import confusion, iou
from ovam_core.errors import InputError, Stopped, out_of_memory_as
from ovam_core.io.masks import IGNORE
from ovam_core.io.names import slugs
from ovam_core.models.presets import recommended_part
from ovam_core.optimization import RECIPES, Epoch, Optimized, OptimizeSettings, initial_embedding
from ovam_core.ovam import OVAM
from ovam_core.picture import Picture, Segmentation
from ovam_core.query import MAX_WORDS, branch_of, parse_words
from ovam_core.settings import GenerateSettings, PhotoSettings, SegmentSettings
from ovam_core.tokens import Token
from ovam_core.unlabelled import Unlabelled

from .annotator import Annotator
from .asked import prompt_words, renewal
from .canvas import (
    LIVE,
    PAINT,
    RESULT,
    SCRIPT,
    STROKES,
    TRIED,
    UPLOAD,
    connected,
    handed_over,
    painted_mask,
    read_any,
    skeleton,
    spot_of,
    sure_parts,
)
from .events import CHECKS, MAPS, MODEL, PRIVATE, QUIET, Inputs, handler, letterbox, said
from .fields import PhotoFields, check_photo, small_enough, takes_photographs
from .model import NO_MEMORY, SHORT, Model
from .render import image_facts, on_screen
from .session import FIRST, Session, StopFlag
from .verdict import verdict
from .viewer import grid, mask_url, picture_url
from .worker import in_thread

WORK, PICTURE, TRY = "optimize", "optimize: picture", "optimize: try"  # of this tab, by which Stop finds them
MAKE, PHOTO = "From a prompt", "From a photograph"
MAX_EPOCHS = 500
MAX_FURTHER = 16  # pictures without masks: a visitor's share of the model
SHOW_EVERY = 0.03  # seconds between two looks at a running search
MAPS_IN_A_RUN = 40  # heatmaps that are drawn of it at most; the fast recipe's takes as long as an epoch
GRID = 64  # pixels of a picture's side on which words are compared at a pixel
REACH = 0.85  # of the value at a pixel: what belongs to its region where no mask holds it
FIRST_PROMPT = "A photograph of a cat"
# Words that say how things stand to one another: what comes before the first of them is what the picture is of.
PLACES = re.compile(r"\b(?:above|at|behind|below|beside|by|in|inside|near|next|on|over|under|with|within)\b")
OF = re.compile(r"^.*?\b(?:photograph|photo|picture|image|painting|drawing)s? of\b")
ARTICLE = re.compile(r"^(?:an?|the|one|some|two|three|several|many)\s+")
ONE_AT_A_TIME = {"trigger_mode": "multiple"}  # the last one wins: it stops the others

Mail = dict[str, Any]


# -------------------------------------------------------------------------------------------- from the page


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


def number_of_pictures(further: Any) -> int:
    """Those without masks. Raises InputError for more than a visitor may ask for."""
    check_whole("The number of pictures without masks", further, 0, MAX_FURTHER)
    return further


# ----------------------------------------------------------------------------------- what a picture is of


def things_named(caption: str) -> list[str]:
    """What a caption says that the picture shows, each once: "A photo of a cat and a red car on grass" to ["cat", "red
    car"]. Longer phrases are left out.
    """
    text = PLACES.split(OF.sub("", " ".join(caption.lower().split())))[0]
    parts = [ARTICLE.sub("", part.strip(" .!?")) for part in re.split(r",|;|\band\b", text)]
    return list(dict.fromkeys(part for part in parts if part and len(part.split()) <= 3 and len(part) <= 30))


def class_for(things: Sequence[str], asked: Sequence[str], current: str) -> str:
    """The class to begin with at a picture of these things: the one there is if the picture shows it, else the one
    thing, or the one word that was asked of it; "" where it is anybody's guess.
    """
    kept = " ".join(current.split())
    if kept.lower() in {*things, *(word.lower() for word in asked)}:
        return kept
    return next((words[0] for words in (things, asked) if len(words) == 1), "")


# ---------------------------------------------------------------------------------------------- to the page


def note(place: str, sentence: str) -> Mail:
    """A message at a place of the page."""
    return {"kind": "note", "place": place, "said": sentence}


def refusal(place: str, sentence: str) -> Mail:
    """The same of what did not begin: what is under way goes on."""
    return note(place, sentence) | {"kind": "refused"}


def picture_mail(key: str, picture: Picture, things: Sequence[str]) -> Mail:
    """The picture for the canvas."""
    image = on_screen(picture.image)
    photo = isinstance(picture.settings, PhotoSettings)  # whose facts begin with the caption
    caption = "" if photo else f"“{html.escape(picture.caption)}” · "
    return {
        "kind": "picture",
        "key": key,
        "src": picture_url(image),
        "width": image.width,
        "height": image.height,
        "alt": picture.caption or "a photograph without a caption",
        "facts": f"{caption}{image_facts(picture)}",
        "things": list(things),
        "stem": stem(picture),
    }


def stem(picture: Picture) -> str:
    """How the names of a picture's files begin."""
    kind = "photo-noise" if isinstance(picture.settings, PhotoSettings) else "seed"
    return f"ovam-{kind}-{0 if picture.settings is None else picture.settings.seed}"


def paint_mail(key: Any, said: str, marked: np.ndarray, not_it: np.ndarray | None = None, **more: Any) -> Mail:
    """Masks for the canvas: bool [H, W] of the object, and of what is not it. key: of their picture, without which the
    page paints nothing. more: `add`, whether what is painted stays; `way`, how it is to be understood; `name`, the
    class where none is written.
    """
    background = None if not_it is None else mask_url(not_it)
    return {"kind": "paint", "key": key, "object": mask_url(marked), "background": background, "said": said, **more}


def pair_mail(found: Segmentation) -> Mail:
    """Maps and masks of a word (first) and its token (second)."""
    maps = found.heatmaps if found.grid_maps is None else found.grid_maps
    return {
        "maps": [grid(values) for values in maps],
        "top": max(found.peaks),
        "peaks": [round(peak, 3) for peak in found.peaks],
        "masks": [mask_url(mask) for mask in found.masks],
        "shares": [round(float(mask.mean()), 4) for mask in found.masks],
    }


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
    made: Unlabelled | None = None,
) -> Learned:
    """The token of a class from one picture. labels: uint8 [H, W] at the picture's size. made: to learn on from."""
    target = ovam.target(picture, labels)
    heard: dict[str, Any] = {"on_epoch": on_epoch, "should_stop": should_stop}
    if made is None:
        return ovam.learn([picture], [target], [name], settings, **heard)
    return ovam.learn_on([picture], [target], [name], made, settings, **heard)


def company(
    model: Model, session: Session, picture: Picture, name: str, further: int, stop: StopFlag
) -> Iterator[tuple[Mail, Unlabelled | None]]:
    """Makes the pictures without masks, each in a turn of its own, and says which is under way; they come last."""

    def make(report: Callable[[Mail], None]) -> Unlabelled:
        with model.turns.work(session) as work, out_of_memory_as(NO_MEMORY):

            def before_picture(done: int, of: int) -> None:
                if not work.next_unit(stop.is_set):
                    raise Stopped(done, of)
                report({"kind": "making", "said": f"Picture {done + 1} of {of} without a mask"})

            like, branch = picture.settings, picture.recording.branch
            heard: dict[str, Any] = {"on_picture": before_picture, "should_stop": stop.is_set}
            try:
                return model.ovam.unlabelled([name], further, like=like, branch=branch, **heard)
            except Stopped:
                raise InputError("Stopped before the first epoch: nothing was learned.") from None

    for reports, made in in_thread(make, SHOW_EVERY):
        if made is not None:
            yield {}, made
        elif reports:
            yield reports[-1], None


def search(
    ovam: OVAM,
    picture: Picture,
    labels: np.ndarray,
    name: str,
    settings: OptimizeSettings,
    should_stop: Callable[[], bool],
    work: AbstractContextManager,
    made: Unlabelled | None = None,
) -> Iterator[tuple[Tensor, list[float], Learned | None]]:
    """Runs `learn` within `work`, in a thread; gives (best embedding, losses so far, None) every SHOW_EVERY seconds,
    and at the end the result in the place of None. should_stop: asked before every epoch.
    """
    losses: list[float] = []

    def run(report: Callable[[Epoch], None]) -> Learned:
        with work, out_of_memory_as(NO_MEMORY):
            return learn(ovam, picture, labels, name, settings, should_stop, report, made=made)

    for epochs, learned in in_thread(run, SHOW_EVERY):
        losses += [epoch.loss for epoch in epochs]
        yield (learned[1] if learned else epochs[-1]).embedding, losses, learned


@torch.no_grad()
def preview(ovam: OVAM, picture: Picture, embedding: Tensor) -> np.ndarray:
    """The heatmap of the class as it is now, float32 `[h, w]` on the recording's grid."""
    return heatmaps(recommended_part(ovam.pipe, picture.recording), embedding)[1].float().cpu().numpy()


def frames(
    ovam: OVAM, picture: Picture, run: Iterator[tuple[Tensor, list[float], Learned | None]], epochs: int
) -> Iterator[tuple[Mail, Learned | None]]:
    """What the page draws of a `search`: all losses so far, with the heatmap about MAPS_IN_A_RUN times."""
    drawn = 0
    for embedding, losses, learned in run:
        frame: Mail = {"kind": "frame", "losses": [float(f"{loss:.5g}") for loss in losses], "of": epochs, "map": None}
        if learned or not drawn or len(losses) - drawn >= epochs / MAPS_IN_A_RUN:
            frame["map"], drawn = grid(preview(ovam, picture, embedding)), len(losses)
        yield frame, learned


def by_one_rule(ovam: OVAM, name: str, token: Token) -> SegmentSettings:
    """A word and its token, both cut at the model's tau and alpha for words."""
    tau, alpha = ovam.preset.tau, ovam.preset.alpha
    return SegmentSettings(words=(name,), tokens=(token,), tau=tau, alpha=alpha, token_tau=tau, token_alpha=alpha)


def told(place: str, *instead: Any, by: Callable[[str, str], Mail] = note) -> Callable[[Callable], Callable]:
    """Wraps a handler whose first output is a mail: what goes wrong is said at `place`, in a mail that `by` makes.
    instead: its other outputs.
    """

    def wrap(function: Callable) -> Callable:
        if inspect.isgeneratorfunction(function):

            @functools.wraps(function)
            def generate(*values: Any, **more: Any) -> Iterator[Any]:
                try:
                    with said():
                        yield from function(*values, **more)
                except gr.Error as error:
                    yield _outputs(by(place, error.message), instead)

            return generate

        @functools.wraps(function)
        def call(*values: Any, **more: Any) -> Any:
            try:
                with said():
                    return function(*values, **more)
            except gr.Error as error:
                return _outputs(by(place, error.message), instead)

        return call

    return wrap


def _outputs(mail: Mail, others: Sequence[Any]) -> Any:
    return (mail, *others) if others else mail


def lost(place: str) -> dict[str, Any]:
    """Keywords of a `failure`: where a call fails before its handler could say so, the page waits for it no more."""
    return {"fn": None, "js": f"() => window.ovamLearn?.failed('{place}')", **PRIVATE}


@contextmanager
def unless_replaced(session: Session, work: str, number: str) -> Iterator[None]:
    """What goes wrong in a run whose place another has taken is not said: it is forgotten."""
    try:
        yield
    except (InputError, Stopped):
        if session.is_latest(work, number):
            raise


# -------------------------------------------------------------------------------------------------- the tab


class OptimizeTab:
    """Its components and what happens on them. Made inside gr.Tab.

    from_generate: the id of the first tab's picture. pick: its list of tokens. renewed: where it is told that one of
    them is another now. asked: the words that are asked there.
    paint: what an event brings of the canvas, up to MAX_PAINT characters.
    """

    def __init__(
        self,
        model: Model,
        tab: gr.Tab,
        from_generate: gr.State,
        pick: gr.Dropdown,
        renewed: gr.State,
        asked: gr.Textbox | None = None,
    ):
        self.model, self.sessions, self.ovam = model, model.sessions, model.ovam
        self.tab, self.from_generate, self.pick, self.renewed = tab, from_generate, pick, renewed
        self.annotator = Annotator.at_hand()
        self.key, self.token_name = gr.State(None), gr.State(None)
        self.number, self.photo_number = gr.State(""), gr.State("")  # of the newest search, and of a photograph
        with gr.Row(elem_classes="learn"):
            with gr.Column(min_width=280, elem_classes="learn-picture"):
                self._lay_out_picture()
            with gr.Column(min_width=280, elem_classes="learn-mask"):
                self._lay_out_mask()
            with gr.Column(min_width=280, elem_classes="learn-class"):
                self._lay_out_class()
        gr.HTML(RESULT, elem_id="learn-results", js_on_load=None)
        self.download = gr.DownloadButton("Download token", interactive=False, min_width=150, elem_id="learn-download")
        self._lay_out_elsewhere()
        self._lay_out_wires()
        self.asked = asked or self.no_words
        self.shown = [self.to_canvas, self.key, self.name, self.prompt, self.seed]
        self.search_by = [self.name, self.recipe, self.epochs, self.rate, self.further]
        self._wire_picture()
        self._wire_mask()
        self._wire_search()
        self._wire_elsewhere()

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
            with gr.Row(elem_classes="learn-prompt"):
                self.prompt = gr.Textbox(
                    FIRST_PROMPT,
                    label="Prompt",
                    lines=1,
                    max_lines=3,
                    max_length=MAX_PROMPT,
                    scale=5,
                    min_width=180,
                    elem_id="learn-prompt",
                )
                self.seed = gr.Number(
                    1, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, min_width=80, elem_id="learn-seed"
                )
            with gr.Row(elem_classes="buttons"):
                self.draw = gr.Button("New picture", min_width=130, elem_id="learn-draw")
                self.take = gr.Button("Use the one from Generate", min_width=130, elem_id="learn-take")
        with gr.Column(visible=False, elem_classes="part") as self.for_photo:
            noise = self.ovam.adapter.photo_timestep
            self.upload = PhotoFields("learn-photo", "the class", self.sessions.limits.pixels, noise)
            with gr.Row(elem_classes="buttons"):
                self.use = gr.Button("Use this photograph", elem_id="learn-use")
        gr.HTML(
            '<p class="p-note" data-note="picture" role="alert"></p>', elem_id="learn-picture-note", js_on_load=None
        )

    def _lay_out_mask(self) -> None:
        gr.HTML("<h2>2 · Mask</h2>", elem_classes="step")
        with gr.Row(elem_classes="learn-ways"):
            self.way = gr.Radio(
                [PAINT, STROKES],
                value=PAINT,
                show_label=False,
                container=False,
                scale=4,
                min_width=200,
                elem_id="way",
                elem_classes="ways",
            )
            with gr.Column(scale=1, min_width=130, elem_id="mask-file"):
                self.file = gr.UploadButton(UPLOAD, file_types=["image"], elem_id="mask-upload")
        gr.HTML(
            skeleton(with_sam=self.annotator is not None),
            js_on_load=f"{SCRIPT}\nwindow.ovamLearn = ovamLearn(element, {{paint: '{PAINT}', strokes: '{STROKES}'}});",
            elem_id="canvas",
        )
        with gr.Row(elem_classes="learn-fill"):
            self.word = gr.Textbox(
                "",
                show_label=False,
                container=False,
                placeholder="the class, or any other word",
                max_lines=1,
                max_length=MAX_PROMPT,
                scale=3,
                min_width=140,
                elem_id="fill-word",
            )
            self.fill = gr.Button("Start from this word's mask", scale=2, min_width=180, elem_id="fill")

    def _lay_out_class(self) -> None:
        own = RECIPES["fast"]
        gr.HTML("<h2>3 · Class</h2>", elem_classes="step")
        self.name = gr.Textbox(
            "",
            label="Name of the class",
            placeholder="what you have painted, for example: cat",
            max_lines=1,
            max_length=MAX_PROMPT,
            elem_id="class-name",
        )
        gr.HTML('<div id="learn-things"></div>', elem_id="learn-names", js_on_load=None)
        with gr.Row(elem_classes="buttons"):
            self.start = gr.Button("Optimize token", variant="primary", scale=3, min_width=120, elem_id="learn")
            self.halt = gr.Button(
                "Stop: keep the best", variant="stop", scale=2, min_width=120, interactive=False, elem_id="learn-stop"
            )
        gr.HTML(LIVE, elem_id="live", js_on_load=None)
        with gr.Accordion("More pictures, recipe, epochs", open=False, elem_id="learn-more"):
            self.further = gr.Slider(
                0,
                MAX_FURTHER,
                0,
                step=1,
                label="Pictures without masks",
                info="Makes more pictures, of the class among other things, and learns from the masks of their words: "
                "better where a picture shows several things. Each takes as long as a new picture.",
                elem_id="further",
            )
            self.recipe = gr.Radio(
                list(RECIPES),
                value=own.recipe,
                label="Recipe",
                info="paper: as published, 500 epochs of gradient descent; published-code: its authors' library",
            )
            with gr.Row():
                self.epochs = gr.Slider(
                    1, MAX_EPOCHS, own.epochs, step=1, label="Epochs", elem_id="epochs", min_width=140
                )
                self.rate = gr.Number(own.rate, label="Learning rate", minimum=0, min_width=100)

    def _lay_out_elsewhere(self) -> None:
        gr.HTML("<h2>Try it on another prompt</h2>", elem_classes="step")
        with gr.Row(elem_classes="try"):
            self.other = gr.Textbox(
                "",
                label="Prompt",
                placeholder="A photograph of a cat on grass",
                max_length=MAX_PROMPT,
                lines=1,
                max_lines=3,
                scale=6,
                min_width=200,
                elem_id="try-prompt",
            )
            self.other_seed = gr.Number(
                2, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, min_width=90, elem_id="try-seed"
            )
            self.go = gr.Button("Go", interactive=False, min_width=80, elem_id="try")
        gr.HTML(TRIED, elem_id="tried-box", js_on_load=None)

    def _lay_out_wires(self) -> None:
        """What hands values to the page's script, and what it hands back or presses."""
        self.to_canvas, self.to_live, self.to_tried = (
            letterbox("ovamLearn", name) for name in ("canvas", "live", "tried")
        )
        self.paint = gr.Textbox("", label="What is painted", visible="hidden")
        self.spot = gr.Textbox("", label="The place clicked", visible="hidden")
        self.no_words = gr.Textbox("", label="Words", visible="hidden")
        self.clicked = gr.Button("A click in the picture", visible="hidden", elem_id="learn-clicked")
        self.clicked_sam = gr.Button("A click, for SAM", visible="hidden", elem_id="learn-clicked-sam")
        self.halt_picture = gr.Button("Stop the picture", visible="hidden", elem_id="learn-halt-picture")

    # ---- the picture

    def _wire_picture(self) -> None:
        self.source.change(
            lambda chosen: (gr.Column(visible=chosen != PHOTO), gr.Column(visible=chosen == PHOTO)),
            self.source,
            [self.for_prompt, self.for_photo],
            queue=False,
            **QUIET,
        )
        around = {self.from_generate, self.asked, self.name, self.key}
        self.take.click(self.take_picture, around, self.shown, **QUIET)
        self.tab.select(self.take_if_none, around, self.shown, **QUIET)
        for event in (self.draw.click, self.prompt.submit):
            event(None, js="() => window.ovamLearn?.busy('Waiting for the model')", **QUIET, **ONE_AT_A_TIME)
            drawn = event(
                self.draw_picture, {self.prompt, self.seed, self.name}, self.shown, **MODEL, **QUIET, **ONE_AT_A_TIME
            )
            drawn.failure(**lost("canvas"))
        photo = {*self.upload.all, self.name}
        for event in (self.use.click, self.upload.photo.upload):
            event(None, js="() => window.ovamLearn?.busy('Looking at the photograph')", **QUIET, **ONE_AT_A_TIME)
            checked = event(
                self.check_photograph, photo, [self.to_canvas, self.photo_number], **CHECKS, **QUIET, **ONE_AT_A_TIME
            )
            taken = checked.success(
                self.take_photograph, {*photo, self.photo_number}, self.shown, **MODEL, **QUIET, **ONE_AT_A_TIME
            )
            for one in (checked, taken):
                one.failure(**lost("canvas"))
        self.halt_picture.click(self.stop_picture, None, None, queue=False, **QUIET)

    def show(self, key: str, picture: Picture, current: str, asked: Sequence[str] = ()) -> tuple:
        """A picture for the canvas, its id, the class to begin with, and the prompt and seed that it was made with."""
        things = things_named(picture.caption)
        mail = picture_mail(key, picture, things)
        if not isinstance(picture.settings, GenerateSettings):
            return mail, key, current, gr.skip(), gr.skip()  # a photograph's caption was made of the class
        return mail, key, class_for(things, asked, current), picture.caption, picture.settings.seed

    def asked_words(self, given: Inputs) -> list[str]:
        try:
            return parse_words(given.text(self.asked))
        except InputError:
            return []

    @told("picture", *[gr.skip()] * 4)
    def take_picture(self, values: dict, request: gr.Request):
        session, given = self.sessions.of(request), Inputs(values)
        key = values[self.from_generate]
        session.picture(key)
        session.replace(PICTURE)  # one that is under way would take the place of this one
        return self.show(key, self.seen(session, key), given.text(self.name), self.asked_words(given))

    @told("picture", *[gr.skip()] * 4)
    def take_if_none(self, values: dict, request: gr.Request):
        """The first look at this tab shows a picture: the first tab's, or the one that the page opens with."""
        session, given = self.sessions.of(request), Inputs(values)
        if session.find(values[self.key]) is not None:
            return (gr.skip(),) * len(self.shown)
        key = next((key for key in (values[self.from_generate], FIRST) if session.find(key) is not None), None)
        if key is None:
            return (gr.skip(),) * len(self.shown)
        return self.show(key, self.seen(session, key), given.text(self.name), self.asked_words(given))

    def seen(self, session: Session, key: str | None) -> Picture:
        """The visitor's picture, no larger than a page shows. Raises InputError where there is none."""
        return session.screen(key) or session.picture(key)

    def image_settings(self, text: str, seed: Any) -> GenerateSettings:
        settings = GenerateSettings.for_model(self.ovam.pipe, text, seed=seed)
        settings.validate(self.ovam.pipe)
        return settings

    def drawing(
        self, session: Session, settings: GenerateSettings, work: str, number: str, branch: str = "conditional"
    ) -> Iterator[tuple[Mail, Picture | None]]:
        """Draws, and says meanwhile how far it is; the picture comes last, with an empty mail."""

        def make(report: Callable[[Mail], None]) -> Picture:
            def progress(where: tuple[int, int], desc: str = "", **_: str) -> None:
                done, of = where
                so_far = f", step {done} of {of}" if done else ""
                report({"kind": "working", "said": f"{desc}{so_far}", "share": done / of})

            return self.model.draw(session, settings, work, progress, branch, number)

        for reports, picture in in_thread(make, SHOW_EVERY):
            if picture is not None:
                yield {}, picture
            elif reports:
                yield reports[-1], None

    @told("canvas", *[gr.skip()] * 4)
    def draw_picture(self, values: dict, request: gr.Request):
        session, given = self.sessions.of(request), Inputs(values)
        settings = self.image_settings(given.text(self.prompt), given.whole(self.seed))
        number, picture = session.replace(PICTURE), None
        with unless_replaced(session, PICTURE, number):
            for mail, picture in self.drawing(session, settings, PICTURE, number):
                if picture is None and session.is_latest(PICTURE, number):
                    yield mail, *[gr.skip()] * 4
        if picture is None or not session.is_latest(PICTURE, number):
            yield (gr.skip(),) * len(self.shown)
            return
        key = session.keep(picture)
        yield self.show(key, self.seen(session, key), given.text(self.name))

    def read_photograph(self, given: Inputs) -> tuple[str | None, PhotoSettings]:
        """Raises InputError where nothing says what it shows."""
        name, caption = given.text(self.name).strip(), given.text(self.upload.caption).strip()
        if not (name or caption) and given.file(self.upload.photo):
            raise InputError("Say what the photograph shows: name the class below, or write a caption; then use it.")
        asked = SegmentSettings(words=(class_name(name),) if name else ())
        return self.upload.read(self.ovam, given, asked)

    @told("canvas", "")
    def check_photograph(self, values: dict, request: gr.Request):
        check_photo(self.ovam, *self.read_photograph(Inputs(values)))
        return note("canvas", ""), self.sessions.of(request).replace(PICTURE)

    @told("canvas", *[gr.skip()] * 4)
    def take_photograph(self, values: dict, request: gr.Request):
        session, given, number = self.sessions.of(request), Inputs(values), str(values[self.photo_number] or "")
        if not number:
            return (gr.skip(),) * len(self.shown)
        file, settings = self.read_photograph(given)
        picture = None
        with unless_replaced(session, PICTURE, number):
            picture = self.model.look_at(session, file or "", settings, PICTURE, number)
        if picture is None or not session.is_latest(PICTURE, number):
            return (gr.skip(),) * len(self.shown)
        key = session.keep(picture)
        return self.show(key, self.seen(session, key), given.text(self.name))

    # ---- the mask

    def _wire_mask(self) -> None:
        self.way.change(None, self.way, js="way => window.ovamLearn?.way(way)", **QUIET)
        self.recipe.change(self.usual, self.recipe, [self.epochs, self.rate], queue=False, **QUIET)
        self.file.upload(self.take_mask, {self.key, self.file}, [self.to_canvas, self.way], **CHECKS, **QUIET)
        for event in (self.fill.click, self.word.submit):
            event(None, js="() => window.ovamLearn?.busy('Looking for the word', true)", **QUIET)
            filled = event(self.take_word, {self.key, self.way, self.word, self.name}, self.to_canvas, **MAPS, **QUIET)
            filled.failure(**lost("canvas"))
        clicks = [(self.clicked, self.take_spot)]
        if self.annotator is not None:
            clicks.append((self.clicked_sam, self.take_region))
        for clicked, answer in clicks:
            spotted = clicked.click(None, None, self.spot, js="() => window.ovamLearn?.spot() ?? ''", **QUIET)
            found = spotted.then(
                answer, {self.key, self.way, self.spot, self.word, self.name}, self.to_canvas, **MAPS, **QUIET
            )
            found.failure(**lost("canvas"))

    @handler
    def usual(self, recipe):
        """Epochs and rate of a recipe."""
        settings = recipe_named(recipe)
        return settings.epochs, settings.rate

    @told("canvas", gr.skip())
    def take_mask(self, values: dict, request: gr.Request):
        """A mask file, painted on the canvas."""
        given, picture = Inputs(values), self.seen(self.sessions.of(request), values[self.key])
        file = small_enough(given.file(self.file), self.sessions.limits.pixels)
        labels = read_any(UPLOAD, [], file, (picture.image.height, picture.image.width))
        not_it = labels == 0 if (labels == IGNORE).any() else None
        way = PAINT if not_it is None else STROKES
        line = f"Your mask: the object covers {(labels == 1).mean():.0%}."
        return paint_mail(values[self.key], line, labels == 1, not_it, way=way), way

    @told("canvas")
    def take_word(self, values: dict, request: gr.Request):
        """The mask of a word, painted on the canvas."""
        session, given = self.sessions.of(request), Inputs(values)
        picture = self.seen(session, values[self.key])
        word = class_name(given.text(self.word).strip() or given.text(self.name))
        found = self.segmented(session, picture, word)
        mask, peak = found.masks[0], found.peaks[0]
        if not mask.any():
            raise InputError(f"The mask of '{word}' is empty here; try another word, or paint the object.")
        line = f"The mask of “{word}” (peak {peak:.2f}) covers {mask.mean():.0%} of the picture; paint on from here."
        if given.choice(self.way) == STROKES:
            return paint_mail(values[self.key], f"{line} What is near its edge stays bare.", *sure_parts(mask))
        return paint_mail(values[self.key], line, mask)

    def segmented(self, session: Session, picture: Picture, word: str) -> Segmentation:
        with self.model.words_of(session) as before_word:
            return self.model.answer(picture, SegmentSettings(words=(word,)), before_word)

    @told("canvas")
    def take_spot(self, values: dict, request: gr.Request):
        """The region of the word that is strongest at a pixel, painted in addition."""
        session, given = self.sessions.of(request), Inputs(values)
        picture = self.seen(session, values[self.key])
        x, y = spot_of(given.text(self.spot), (picture.image.height, picture.image.width))
        word, value = self.strongest(session, picture, x, y, self.own_words(given))
        found = self.segmented(session, picture, word)
        seed = np.zeros_like(found.masks[0])
        seed[y, x] = True
        in_mask, heat = bool(found.masks[0, y, x]), found.heatmaps[0]
        region = connected(found.masks[0] if in_mask else heat >= REACH * heat[y, x], seed)
        what = (
            "its mask's part under the click" if in_mask else "no mask holds this pixel, so what is as strong around it"
        )
        line = f"“{word}” is strongest here ({value:.2f}): {what} is painted, {region.mean():.0%} of the picture."
        return paint_mail(values[self.key], line, region, add=True, name=word)

    @told("canvas")
    def take_region(self, values: dict, request: gr.Request):
        """What SAM finds at a pixel, painted in addition; without a class yet, the word that is strongest there."""
        assert self.annotator is not None
        session, given = self.sessions.of(request), Inputs(values)
        picture = self.seen(session, values[self.key])
        x, y = spot_of(given.text(self.spot), (picture.image.height, picture.image.width))
        with self.model.words_of(session):
            region = self.annotator.mask(picture.image, x, y, self.ovam.device)
        name = given.text(self.name).strip() or self.strongest(session, picture, x, y, self.own_words(given))[0]
        line = f"What SAM finds at the click is painted, {region.mean():.0%} of the picture."
        return paint_mail(values[self.key], line, region, add=True, name=name)

    def own_words(self, given: Inputs) -> list[str]:
        """The class and the word beside the canvas, as far as they are written."""
        return [name for field in (self.name, self.word) if (name := " ".join(given.text(field).split()))]

    def strongest(self, session: Session, picture: Picture, x: int, y: int, own: Sequence[str]) -> tuple[str, float]:
        """The word whose map is largest at a pixel, and how large: of `own`, the picture's and the shipped classes."""
        shipped = [name for token in self.sessions.shipped.values() for name in token.names]
        named = [*own, *things_named(picture.caption), *prompt_words(picture.caption), *shipped]
        words = tuple(parse_words("\n".join(name.replace(",", " ") for name in dict.fromkeys(named[:MAX_WORDS]))))
        small = replace(picture, image=_small(picture.image), last_maps=None)
        with self.model.words_of(session) as before_word:
            found = self.model.answer(small, SegmentSettings(words=words, crf=False), before_word)
        at = (x * small.image.width // picture.image.width, y * small.image.height // picture.image.height)
        row, value = claims(found.heatmaps, *at)[0]
        return found.labels[row], value

    # ---- the search

    def _wire_search(self) -> None:
        # The browser hands over what is painted when it is asked to.
        given = {self.key, self.way, self.paint, *self.search_by}
        painted = self.start.click(
            None, None, self.paint, js="() => window.ovamLearn?.handOver() ?? ''", **QUIET, **ONE_AT_A_TIME
        )
        begun = painted.then(
            self.begin, given, [self.to_live, self.number, self.halt], **CHECKS, **QUIET, **ONE_AT_A_TIME
        )
        ran = begun.success(
            self.run,
            {self.number, *given},
            [self.to_live, self.download, self.token_name, self.pick, self.renewed, self.go],
            **MODEL,
            **QUIET,
            **ONE_AT_A_TIME,
        )
        for after in (ran.then, ran.failure):
            after(self.rest, None, self.halt, queue=False, **QUIET, **ONE_AT_A_TIME)
        begun.failure(**lost("begin"))
        ran.failure(**lost("learn"))
        self.halt.click(self.stop_work, None, None, queue=False, **QUIET)

    def understood(self, session: Session, values: dict) -> tuple[Picture, np.ndarray, str, OptimizeSettings, int]:
        """Everything that can be wrong, before anything is queued; last, the number of pictures without masks."""
        given, picture = Inputs(values), self.seen(session, values[self.key])
        name = class_name(given.text(self.name))
        settings = search_settings(given.text(self.recipe), given.whole(self.epochs), given.number(self.rate))
        layers = handed_over(given.text(self.paint))
        labels = painted_mask(layers, given.choice(self.way), (picture.image.height, picture.image.width))
        return picture, labels, name, settings, number_of_pictures(given.whole(self.further))

    @told("learn", "", gr.skip(), by=refusal)
    def begin(self, values: dict, request: gr.Request):
        session = self.sessions.of(request)
        _, _, name, settings, _ = self.understood(session, values)
        initial_embedding(self.ovam.pipe, [name])
        mail = {"kind": "begun", "key": values[self.key], "name": name, "of": settings.epochs}
        return mail, session.replace(WORK), gr.Button(interactive=True)

    @told("learn", *[gr.skip()] * 5)
    def run(self, values: dict, request: gr.Request):
        session, number, learned = self.sessions.of(request), str(values[self.number] or ""), None
        if not number:  # refused
            yield (gr.skip(),) * 6  # nothing at all would be taken for no values
            return
        asked = picture, labels, name, _, _ = self.understood(session, values)
        begun = time.monotonic()
        with unless_replaced(session, WORK, number), session.run(WORK, number) as stop:  # set, too, by who left
            for frame, found in self.searched(session, *asked, stop):
                learned = found
                if session.is_latest(WORK, number):
                    yield frame, *[gr.skip()] * 5
        if learned is None or not session.is_latest(WORK, number):  # another took its place
            yield (gr.skip(),) * 6
            return
        token, how = learned
        label = session.add_token(token)
        with self.model.words_of(session) as before_word:
            found = self.model.answer(picture, by_one_rule(self.ovam, name, token), before_word)
        mail = {
            "kind": "result",
            "key": values[self.key],
            "name": name,
            "verdict": verdict(name, found, labels, how),
            "seconds": round(time.monotonic() - begun, 2),
            "stem": f"{stem(picture)}-{slugs([name])[0]}",
        } | pair_mail(found)
        file = gr.DownloadButton(value=str(session.token_file(label)), interactive=True)
        listed = gr.Dropdown(choices=session.token_names())
        yield mail, file, label, listed, renewal(label), gr.Button(interactive=True)

    def searched(
        self,
        session: Session,
        picture: Picture,
        labels: np.ndarray,
        name: str,
        settings: OptimizeSettings,
        further: int,
        stop: StopFlag,
    ) -> Iterator[tuple[Mail, Learned | None]]:
        """Pictures without masks, where they are wanted, and the search: what the page draws of both."""
        made = None
        if further:
            for mail, made in company(self.model, session, picture, name, further, stop):
                if made is None:
                    yield mail, None
        work = self.model.turns.work(session)
        run = search(
            self.ovam, picture, labels, name, settings, lambda: not work.next_unit(stop.is_set, SHORT), work, made
        )
        yield from frames(self.ovam, picture, run, settings.epochs)

    @handler
    def rest(self, request: gr.Request):
        """After a run: there is something to stop only where another has begun."""
        return gr.Button(interactive=self.sessions.of(request).runs(WORK))

    @handler
    def stop_work(self, request: gr.Request):
        self.sessions.of(request).stop(WORK)

    @handler
    def stop_picture(self, request: gr.Request):
        self.sessions.of(request).stop(PICTURE, TRY)

    # ---- elsewhere

    def _wire_elsewhere(self) -> None:
        for event in (self.go.click, self.other.submit):
            event(None, js="() => window.ovamLearn?.trying()", **QUIET, **ONE_AT_A_TIME)
            tried = event(
                self.elsewhere,
                {self.token_name, self.other, self.other_seed},
                self.to_tried,
                **MODEL,
                **QUIET,
                **ONE_AT_A_TIME,
            )
            tried.failure(**lost("try"))

    @told("try")
    def elsewhere(self, values: dict, request: gr.Request):
        session, given = self.sessions.of(request), Inputs(values)
        if values[self.token_name] is None:
            raise InputError("There is no token yet; learn one first.")
        token = session.token(values[self.token_name])
        name = token.names[0]
        text = given.text(self.other)
        settings = self.image_settings(text, given.whole(self.other_seed))
        number, picture = session.replace(TRY), None
        with unless_replaced(session, TRY, number):
            # Looked at once, so not kept.
            for mail, picture in self.drawing(session, settings, TRY, number, branch_of([token])):
                if picture is None and session.is_latest(TRY, number):
                    yield mail
        if picture is None or not session.is_latest(TRY, number):
            yield gr.skip()
            return
        with self.model.words_of(session) as before_word:
            found = self.model.answer(picture, by_one_rule(self.ovam, name, token), before_word)
        both = float(iou(confusion(*found.masks)))
        yield {
            "kind": "tried",
            "name": name,
            "prompt": text,
            "seed": settings.seed,
            "src": picture_url(on_screen(picture.image)),
            "facts": image_facts(picture),
            "agree": None if np.isnan(both) else round(both, 3),
            "stem": f"{stem(picture)}-{slugs([name])[0]}",
        } | pair_mail(found)


def _small(image: Image.Image) -> Image.Image:
    """The picture on GRID pixels a side, of its shape."""
    scale = GRID / max(image.size)
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
