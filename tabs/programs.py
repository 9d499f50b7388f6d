"""What programs may ask, by name: `gradio_client`, plain HTTP, and as tools (tabs/tools.py).

A picture is known by its id, a long random string: whoever knows it may ask about it, from any connection. The types
and docstrings of the endpoints are what programs read of them.
"""

# Without `from __future__ import annotations`: Gradio takes the types of answers as they stand.

import functools
import html
import inspect
import io
import math
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import gradio as gr
import numpy as np
from gradio.context import Context
from gradio.utils import get_function_description, get_function_params
from PIL import Image, ImageColor

from ovam_core import plot
from ovam_core.attention.heatmap import claims
from ovam_core.errors import InputError, out_of_memory_as
from ovam_core.io.masks import read_mask
from ovam_core.io.names import slugs
from ovam_core.methods import METHODS
from ovam_core.optimization import RECIPES
from ovam_core.picture import Picture, Segmentation
from ovam_core.query import MAX_WORDS, parse_words
from ovam_core.settings import (
    DEFAULT_METHOD,
    GUIDANCE_KINDS,
    MAX_TOKENS,
    PLAIN,
    GenerateSettings,
    SegmentSettings,
)
from ovam_core.tokens import Token

from .asked import NO_TOKENS, prompt_words, recommended_grid_names, segment_settings
from .events import DECODED, MAPS, MODEL, Inputs, handler
from .fields import check_photo, photo_settings, small_enough
from .model import NO_MEMORY, SHORT, Model
from .optimize import by_one_rule, class_name, company, learn, number_of_pictures, search_settings
from .render import image_facts, on_screen, shrunk
from .scratch import ANSWER_FOLDER
from .session import Session
from .tools import visitor_of
from .verdict import agreement

WORK = "program"  # of these calls, by which Stop finds it
File = gr.FileData
Method = Literal[tuple(METHODS)]
Recipe = Literal[tuple(RECIPES)]
GuidanceKind = Literal[GUIDANCE_KINDS]
LARGE = 100_000_000  # bytes of an answer's heatmaps, from which on it keeps its turn: each that waits holds its own
LABELS = {"tau": "Threshold", "alpha": "Self-attention", "crf": "Dense CRF", "rate": "Learning rate", "name": "Class"}


@dataclass
class Question:
    """What is asked of a picture, as a program sends it.

    Parameters:
        words: Any words or phrases, comma separated, such as "cat, the red bus".
        picture: The id that came with the picture; without it, the last one of this session.
        sentence: A whole sentence in which the words are looked up; without words, each token of it.
        tau: Threshold of the masks, 0 to 1; without it the method's, and each token's own.
        alpha: Floor of the self-attention, 0 to 1; without it the model's, and each token's own.
        crf: Whether the edges of masks are sharpened by a dense CRF.
        steps: Denoising steps to look at, 0 is the first: "0-9", or "3, 5, 8", or "all"; without it the model's own.
        grids: Attention grids as shares of the image's side, such as ["1/8", "1/16"]; without it the model's own.
        tokens: Names of class tokens to ask for too, such as ["cat · emoji-voc"].
        token_files: Token files (.safetensors) to ask for too.
        method: How maps and masks are made.
    """

    words: str
    picture: str = ""
    sentence: str = ""
    tau: float | None = None
    alpha: float | None = None
    crf: bool = True
    steps: str = ""
    grids: list[str] | None = None
    tokens: list[str] | None = None
    token_files: list[File] | None = None
    method: Method = DEFAULT_METHOD


def asks(function: Callable) -> Callable:
    """Wraps a method of (self, request, Question): programs see the fields of the question as its parameters."""
    own, fields = inspect.signature(function), inspect.signature(Question).parameters

    @functools.wraps(function)
    def call(self: Any, request: Any, *values: Any) -> Any:
        return function(self, request, Question(*values))

    parameters = [*list(own.parameters.values())[:2], *fields.values()]
    call.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {one.name: one.annotation for one in parameters[1:]} | {"return": own.return_annotation}
    what, returns = inspect.cleandoc(function.__doc__ or "").split("Returns:")
    about = inspect.cleandoc(Question.__doc__ or "").partition("Parameters:")[2]
    call.__doc__ = f"{what}Parameters:{about}\nReturns:{returns}"
    return call


class Programs:
    """The named endpoints. Made inside gr.Blocks before anything else: other handlers of these names get others."""

    def __init__(self, model: Model):
        self.model, self.sessions, self.ovam = model, model.sessions, model.ovam
        assert Context.root_block is not None  # else there is no page
        self.cache = Path(Context.root_block.GRADIO_CACHE)
        self.decoding = threading.Semaphore(DECODED)  # beside the page's own, which its queue bounds
        with gr.Row(visible=False):
            for function in (self.generate, self.photograph, self.optimize):
                _offer(function, **MODEL)
            for function in (self.attribute, self.masks, self.point, self.archive):
                _offer(function, **MAPS)
            for function in (self.tokens, self.stop):
                _offer(function, queue=False)

    # ---- pictures

    @handler
    def generate(
        self,
        request: gr.Request,
        prompt: str,
        negative_prompt: str = "",
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        width: int | None = None,
        height: int | None = None,
        guidance_kind: GuidanceKind = PLAIN,
    ) -> tuple[str, File, str]:
        """Makes an image of a prompt and records the model's attention; any words can then be looked for in it.

        Parameters:
            prompt: What the image is to show, such as "A photograph of a bird and a boat on the sea".
            negative_prompt: What it is not to show.
            seed: 0 to 4294967295; the same seed makes the same image.
            steps: Denoising steps, 1 to 200; without it the model's own.
            guidance: Guidance scale, 0 to 30; without it the model's own.
            width: In pixels; without it the model's own.
            height: In pixels; without it the model's own.
            guidance_kind: The guidance's strength is the same everywhere, or (S-CFG) each region's own.
        Returns:
            picture: its id, by which the other calls know it
            image: PNG
            facts: a line
        """
        settings = GenerateSettings.for_model(
            self.ovam.pipe,
            _text("Prompt", prompt),
            negative_prompt=_text("Negative prompt", negative_prompt),
            seed=_whole("Seed", seed),
            steps=_given(_whole, "Steps", steps),
            guidance=_given(_number, "Guidance", guidance),
            width=_given(_whole, "Width", width),
            height=_given(_whole, "Height", height),
            guidance_kind=_text("Guidance kind", guidance_kind),
        )
        settings.validate(self.ovam.pipe)
        session = self._session(request)
        picture = self.model.draw(session, settings, WORK, gr.Progress())
        return self._made(session, picture, picture.image)

    @handler
    def photograph(
        self,
        request: gr.Request,
        photo: File,
        caption: str = "",
        timesteps: str = "",
        seed: int = 0,
        words: str = "",
    ) -> tuple[str, File, str]:
        """Records the model's attention to a photograph; any words can then be looked for in it.

        Parameters:
            photo: A JPEG or PNG file; for tools a data: URL, or the address of an image that another tool gave.
            caption: What it shows, such as "A photograph of a cat and a car"; without it, one is made of the words.
            timesteps: How much noise is added, 0 to 999, one pass each, such as "50, 100"; empty for the model's own.
            seed: Of the noise, 0 to 4294967295.
            words: What a missing caption is made of, such as "cat, car".
        Returns:
            picture: its id, by which the other calls know it
            image: the photograph upright, shrunk where a side is longer than 1024 pixels
            facts: a line
        """
        named, written = _text("Words", words), _text("Caption", caption)
        asked = SegmentSettings(words=tuple(parse_words(named)) if named else ())
        if not (written or asked.words):
            raise InputError("There is neither a caption nor a word to make one of; give one of them.")
        settings = photo_settings(self.ovam, written, _text("Timesteps", timesteps), _whole("Seed", seed), asked)
        file = small_enough(self._path("Photograph", photo), self.sessions.limits.pixels)
        with self.decoding:
            checked = check_photo(self.ovam, file, settings)
        session = self._session(request)
        picture = self.model.look_at(session, checked, settings, WORK)
        return self._made(session, picture, shrunk(picture.image))

    def _made(self, session: Session, picture: Picture, shown: Image.Image) -> tuple[str, dict[str, Any], str]:
        with self._files() as folder:
            image = _put(folder / "image.png", plot.png(shown))
        return session.keep(picture), image, html.unescape(image_facts(picture))

    # ---- what is found in them

    @handler
    @asks
    def attribute(self, request: gr.Request, asked: Question) -> tuple[list[File], list[File], dict[str, Any], str]:
        """Finds any words in a picture: a heatmap and a mask of each, from its recording; the picture stays as it is.

        Returns:
            heatmaps: over the picture, one a word, all on one scale
            masks: at the picture's size, white where the word is, in the same order
            measures: the words, peaks of their heatmaps, presence (is it there at all, 0 to 1), their masks' shares
            facts: a line
        """
        begun = time.perf_counter()
        with self._found(request, asked) as (found, before_word), self._files() as folder:
            image, top = on_screen(found.picture.image), max(found.peaks)
            overlays, masks = [], []
            for name, heatmap, mask in zip(slugs(found.labels), found.heatmaps, found.masks, strict=True):
                before_word()
                overlays.append(_put(folder / f"heatmap_{name}.webp", _webp(plot.overlay(image, heatmap, top))))
                masks.append(_put(folder / f"mask_{name}.png", plot.png(plot.mask_image(mask))))
        return overlays, masks, _measures(found), _map_facts(found, begun)

    @handler
    @asks
    def masks(self, request: gr.Request, asked: Question) -> tuple[File, File, list[File], list[dict[str, Any]], str]:
        """Finds any words in a picture: who has which pixel, and the mask of each word, with numbers.

        Returns:
            label map: at the picture's size, pixels are the numbers of the words, 0 for none
            overview: the picture with each word's pixels in its colour
            masks: at the picture's size, white where the word is, in the order of the words
            words: of each its number, colour, peak, presence (is it there, 0 to 1), its mask's pixels, share and box
            facts: a line
        """
        begun = time.perf_counter()
        with self._found(request, asked) as (found, before_word), self._files() as folder:
            labels, rows, masks = found.label_map(), [], []
            colors = plot.word_colors(found.labels)
            for name, row, mask in zip(slugs(found.labels), _rows(found, colors), found.masks, strict=True):
                before_word()
                rows.append(row)
                masks.append(_put(folder / f"mask_{name}.png", plot.png(plot.mask_image(mask))))
            label_map = _put(folder / "labels.png", plot.png(plot.label_image(labels)))
            painted = _put(folder / "masks.webp", _webp(_painted(found.picture.image, labels, list(colors.values()))))
        return label_map, painted, masks, rows, _map_facts(found, begun)

    @handler
    def point(self, request: gr.Request, x: int, y: int, words: str = "", picture: str = "") -> list[dict[str, Any]]:
        """Says which words claim a pixel of a picture, by the values of their heatmaps there.

        Parameters:
            x: Pixels from the left edge of the picture.
            y: Pixels from its upper edge.
            words: Among which words, comma separated; without it, those of the prompt and the model's classes.
            picture: The id that came with the picture; without it, the last one of this session.
        Returns:
            claims: words with the values of their heatmaps there, the largest first
        """
        column, row, named = _whole("x", x), _whole("y", y), _text("Words", words)
        session = self._session(request)
        seen = self._picture(session, picture)
        claims(np.zeros((0, seen.image.height, seen.image.width)), column, row)  # refuses a point outside
        among = tuple(parse_words(named)) if named else self._usual_words(seen)
        image = shrunk(seen.image)  # which a photograph's maps are made for, or many words would not fit in memory
        shown = seen if image is seen.image else replace(seen, image=image)
        with self.model.words_of(session) as before_word:
            found = self.model.answer(shown, SegmentSettings(among, crf=False), before_word)
        at = column * image.width // seen.image.width, row * image.height // seen.image.height
        ranked = claims(found.heatmaps, *at)
        return [{"word": found.labels[number], "value": round(value, 4)} for number, value in ranked]

    def _usual_words(self, picture: Picture) -> tuple[str, ...]:
        """Those of the prompt, then the classes of the model's tokens, no more than may be asked for at once."""
        classes = [name for token in self.sessions.shipped.values() for name in token.names]
        among = dict.fromkeys([*prompt_words(picture.caption), *classes])
        if not among:
            raise InputError("This picture has no prompt whose words could be compared; give some words.")
        return tuple(among)[:MAX_WORDS]

    @handler
    @asks
    def archive(self, request: gr.Request, asked: Question) -> File:
        """Packs everything of an answer: image, raw heatmaps (npz), overlays, masks, label map, tokens, settings.

        Returns:
            zip: its settings.json makes the same bytes again
        """
        with self._found(request, asked) as (found, _), self._files() as folder:
            return _sent(found.save_zip(folder / "ovam.zip"))

    # ---- tokens

    @handler
    def optimize(
        self,
        request: gr.Request,
        mask: File,
        name: str,
        picture: str = "",
        recipe: Recipe = "fast",
        epochs: int | None = None,
        rate: float | None = None,
        unlabelled: int = 0,
    ) -> tuple[File, str, dict[str, Any], str]:
        """Learns a token, an embedding that stands for a class, from a picture and the mask of an object in it.

        Parameters:
            mask: A picture, white on the object, black elsewhere; for tools a data: URL, or another tool's address.
            name: The class that the token stands for, such as "cat".
            picture: The id that came with the picture; without it, the last one of this session.
            recipe: "fast", "paper" as published, or "published-code", as its authors' library has it.
            epochs: 1 to 500; without it the recipe's.
            rate: Learning rate; without it the recipe's.
            unlabelled: Pictures without masks to learn on from, 0 to 16: of the class among other things, made for it.
        Returns:
            token: its file, which may be given as one of token_files
            name: by which this session knows the token
            measures: IoU of the word's and of the token's mask with yours, first and best loss, epochs, seconds
            verdict: the same as a line
        """
        named = _text("Recipe", recipe)
        usual = RECIPES.get(named, RECIPES["fast"])  # any other is refused just below
        settings = search_settings(
            named,
            usual.epochs if epochs is None else _whole("Epochs", epochs),
            usual.rate if rate is None else _number("Learning rate", rate),
        )
        further = number_of_pictures(_whole("Pictures without masks", unlabelled))
        called = class_name(_text("Class", name))
        session = self._session(request)
        seen = self._picture(session, picture)
        file = small_enough(self._path("Mask", mask), self.sessions.limits.pixels)
        if file is None:
            raise InputError("There is no mask; give a picture of it.")
        with self.decoding:
            labels = read_mask(file, (seen.image.height, seen.image.width))
        with session.run(WORK) as stop:
            made = None
            if further:
                *_, (_, made) = company(self.model, session, seen, called, further, stop)
            with self.model.turns.work(session) as work, out_of_memory_as(NO_MEMORY):

                def ends() -> bool:
                    return not work.next_unit(stop.is_set, SHORT)

                token, how = learn(self.ovam, seen, labels, called, settings, ends, made=made)
        label = session.add_token(token)
        with self.model.words_of(session) as before_word:
            found = self.model.answer(seen, by_one_rule(self.ovam, called, token), before_word)
        word, learned = agreement(found, labels)
        numbers = {
            "word_iou": round(word, 4),
            "token_iou": round(learned, 4),
            "first_loss": round(how.losses[0], 4),
            "loss": round(how.loss, 4),
            "epochs": how.epochs,
            "seconds": round(how.seconds, 2),
        }
        line = (
            f"IoU with the mask: {word:.2f} the word, {learned:.2f} its token; "
            f"loss {how.losses[0]:.4f} to {how.loss:.4f} in {how.epochs} epochs, {how.seconds:.1f} s"
        )
        return _sent(session.token_file(label)), label, numbers, line

    @handler
    def tokens(self, request: gr.Request) -> list[str]:
        """Lists the class tokens by the names to ask for them: this session's own first, then the model's.

        Returns:
            tokens: their names
        """
        return self._session(request).token_names()

    @handler
    def stop(self, request: gr.Request) -> None:
        """Stops whatever this session has running or waiting: images, searches for tokens (the best is kept), exports
        and answers.
        """
        self._session(request).stop()

    # ---- what they share

    def _session(self, request: gr.Request) -> Session:
        return self.sessions.of(visitor_of(request))

    def _picture(self, session: Session, key: Any) -> Picture:
        named = _text("Picture", key).strip()
        return self.sessions.picture_of(named) if named else session.picture(session.last_picture)

    @contextmanager
    def _found(self, request: gr.Request, asked: Question) -> Iterator[tuple[Segmentation, Callable[[], None]]]:
        """The answer, and what is to be called before each of its words is drawn."""
        session = self._session(request)
        picture = self._picture(session, asked.picture)
        settings = self._settings(session, picture, asked)
        with self.model.words_of(session) as before_word:
            found = self.model.answer(picture, settings, before_word)
            yield found, partial(before_word, math.inf) if found.heatmaps.nbytes > LARGE else before_word

    def _settings(self, session: Session, picture: Picture, asked: Question) -> SegmentSettings:
        names, files = _names(NO_TOKENS, asked.tokens), asked.token_files
        if not isinstance(files, list | None):
            raise InputError("The token files are no list of files; give one.")
        if len(names) + len(files or ()) > MAX_TOKENS:  # before any is read
            raise InputError(f"{len(names) + len(files or ())} tokens are too many; give at most {MAX_TOKENS}.")
        paths = [self._path("Token file", file) or "" for file in files or ()]
        usual = recommended_grid_names(self.ovam)
        return segment_settings(
            self.ovam,
            picture,
            words=_text("Words", asked.words),
            sentence=_text("Sentence", asked.sentence),
            tau=_given(_number, "Threshold", asked.tau),
            alpha=_given(_number, "Self-attention", asked.alpha),
            crf=_ticked("Dense CRF", asked.crf),
            steps=_text("Steps", asked.steps),
            grids=usual if asked.grids is None else _names("The grids are no list of names.", asked.grids),
            tokens=[*map(session.token, names), *map(Token.load, paths)],
            method=_text("Method", asked.method),
        )

    def _path(self, name: str, value: Any) -> str | None:
        field = _Field(name, GRADIO_CACHE=str(self.cache))
        return Inputs({field: value}).file(field)

    @contextmanager
    def _files(self) -> Iterator[Path]:
        """A new folder of Gradio's cache for the files of one answer, which are cleared away with Gradio's own. None
        stay of an answer that fails.
        """
        folder = self.cache / f"{ANSWER_FOLDER}{secrets.token_hex(16)}"
        folder.mkdir(parents=True)
        try:
            yield folder
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


def _offer(function: Callable, **options: Any) -> None:
    """Makes an endpoint of the function's name; its docstring tells programs of each value."""
    gr.api(function, api_name=function.__name__, **options)
    assert Context.root_block is not None
    event = list(Context.root_block.fns.values())[-1]
    _, about, returns = get_function_description(function)
    for field, (name, *_) in zip(event.inputs, get_function_params(function), strict=True):
        field.label = LABELS.get(name, name.replace("_", " ").capitalize())
        field._api_info |= {"additional_description": about[name]}
    for field, said in zip(event.outputs, returns, strict=True):
        field.label, _, field._api_info["description"] = said.partition(": ")


# --------------------------------------------------------------------------------------- what programs sent


@dataclass(frozen=True)
class _Field:
    """What `Inputs` knows of a component."""

    label: str
    precision: int | None = None
    GRADIO_CACHE: str = ""


def _text(name: str, value: Any) -> str:
    field = _Field(name)
    return Inputs({field: value}).text(field)


def _number(name: str, value: Any) -> Any:
    field = _Field(name)
    return Inputs({field: value}).number(field)


def _whole(name: str, value: Any) -> Any:
    field = _Field(name, precision=0)
    return Inputs({field: value}).whole(field)


def _ticked(name: str, value: Any) -> bool:
    field = _Field(name)
    return Inputs({field: value}).ticked(field)


def _names(sentence: str, value: Any) -> list[str]:
    field = _Field("A name")
    return Inputs({field: value}).names(field, sentence)


def _given(read: Callable[[str, Any], Any], name: str, value: Any) -> Any:
    """None where nothing was sent."""
    return None if value is None else read(name, value)


# ------------------------------------------------------------------------------------------------- answers


def _measures(found: Segmentation) -> dict[str, Any]:
    return {
        "words": found.labels,
        "peaks": [round(peak, 4) for peak in found.peaks],
        "presence": [None if there is None else round(there, 4) for there in found.presence],
        "mask_shares": [round(float(mask.mean()), 4) for mask in found.masks],
    }


def _rows(found: Segmentation, colors: dict[str, str]) -> Iterator[dict[str, Any]]:
    """The numbers of each mask."""
    known = found.presence or [None] * len(found.labels)
    rows = zip(found.labels, found.peaks, known, found.masks, strict=True)
    for number, (label, peak, there, mask) in enumerate(rows, start=1):
        ys, xs = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
        yield {
            "word": label,
            "label": number,
            "color": colors[label],
            "peak": round(peak, 4),
            "presence": None if there is None else round(there, 4),
            "pixels": int(mask.sum()),
            "share": round(float(mask.mean()), 4),
            "box": [int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1] if xs.size else None,
        }


def _painted(image: Image.Image, labels: np.ndarray, colors: list[str], opacity: float = 0.55) -> Image.Image:
    """The picture as it is shown, the pixels of each label in its colour, the others dimmed a little."""
    image = on_screen(image)
    labels = np.asarray(Image.fromarray(labels).resize(image.size, Image.Resampling.NEAREST))
    pixels = np.asarray(image.convert("RGB"), np.float32)
    paint = np.asarray([(0, 0, 0), *map(ImageColor.getrgb, colors)], np.float32)[labels]
    mixed = np.where(labels[..., None] > 0, (1 - opacity) * pixels + opacity * paint, 0.6 * pixels)
    return Image.fromarray(np.rint(mixed).astype(np.uint8))


def _map_facts(found: Segmentation, begun: float) -> str:
    count = f"{len(found.labels)} map{'s' if len(found.labels) > 1 else ''}"
    return f"{count} by {found.settings.method} from the recording in {time.perf_counter() - begun:.2f} s"


def _put(path: Path, data: bytes) -> dict[str, Any]:
    path.write_bytes(data)
    return _sent(path)


def _sent(path: Path) -> dict[str, Any]:
    """A file as Gradio sends it."""
    return File(path=str(path), orig_name=path.name, size=path.stat().st_size).model_dump()


def _webp(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=90)
    return buffer.getvalue()
