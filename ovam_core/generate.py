"""One image and its maps, from settings to files: what the command line and the app share.

`generate` is the costly half (an image and its recording; photo.py has that of a photograph), `ask` the cheap one
(maps and masks of any words), `save` and `load_settings` the way to the disk and back. Nothing here knows attention:
that is recorder.py and heatmap.py; nothing here knows Gradio.
"""

from __future__ import annotations

import io
import json
import math
import re
import tempfile
import time
import unicodedata
import zipfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import diffusers
import numpy as np
import torch
from PIL import Image

from . import plot, tokens
from .families import family_of
from .files import write
from .goca import GocaRecording, record_goca
from .heatmap import resize
from .mask import label_map, make_masks
from .methods import (
    GOCA_TOKEN,
    OVAM,
    OVAM_TOKEN,
    GocaMethod,
    Method,
    Seen,
    maps_and_masks,
    method_named,
)
from .pipeline import defaults_for
from .recorder import Recording, own_grids, own_steps, record
from .text import (
    Attribution,
    attribute_sentence,
    attribute_words,
    parse_words,
    words_in_sentence,
)

if TYPE_CHECKING:
    from .photo import PhotoSettings

Made = TypeVar("Made")  # GenerateSettings or PhotoSettings

MAX_PROMPT = 2000  # characters, before the text encoder's own limit is looked at
MAX_STEPS = 200
MAX_GUIDANCE = 30.0
MAX_SEED = 2**32 - 1
MAX_TOKENS = 32
MIN_SIDE = 64

MAX_WORK_PIXELS = 1 << 21  # masks of larger photographs are made at this area: a dense CRF takes seconds a megapixel
MAX_ANSWER = 500_000_000  # values of the maps at image size, 2 GB

SETTINGS_FILE = "settings.json"


class Stopped(Exception):
    """The caller asked to stop; `steps` denoising steps of `total` were done and no image was made."""

    def __init__(self, steps: int, total: int):
        super().__init__(f"Stopped after {steps} of {total} steps.")
        self.steps, self.total = steps, total


# --------------------------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class GenerateSettings:
    """What makes an image. `validate` must pass before `generate` takes it.

    prompt, negative_prompt: text. seed: 0 to 2**32 - 1. steps: denoising steps, 1 to 200. guidance: classifier-free
    guidance scale, 0 to 30; 1 and less switch it off. width, height: pixels, multiples of 8 (16 or 32 in some families), 64 to the model's limit.
    """

    KIND: ClassVar[str] = "generation"  # its name in settings.json
    FORMAT: ClassVar[str] = "ovam-generate/1"

    prompt: str
    negative_prompt: str = ""
    seed: int = 0
    steps: int = 25
    guidance: float = 4.0
    width: int = 128
    height: int = 128

    @property
    def caption(self) -> str:
        """The text of the recorded passes."""
        return self.prompt

    @classmethod
    def for_model(cls, pipe: Any, prompt: str, **given: Any) -> GenerateSettings:
        """Settings with the model's own defaults in place of whatever is not given, or given as None."""
        defaults = defaults_for(pipe)
        own = {
            "steps": defaults.steps,
            "guidance": defaults.guidance,
            "width": defaults.width,
            "height": defaults.height,
        }
        return cls(prompt=prompt, **{**own, **{key: value for key, value in given.items() if value is not None}})

    def validate(self, pipe: Any) -> None:
        """Raises ValueError, one sentence, where this model cannot make an image of these settings."""
        check_text("The prompt", self.prompt, MAX_PROMPT)
        if not self.prompt.strip():
            raise ValueError("The prompt is empty; describe the picture in a few words.")
        check_text("The negative prompt", self.negative_prompt, MAX_PROMPT)
        for name, text in (("prompt", self.prompt), ("negative prompt", self.negative_prompt)):
            check_fits(pipe, name, text)
        check_whole("The seed", self.seed, 0, MAX_SEED)
        check_whole("The number of steps", self.steps, 1, MAX_STEPS)
        check_number("The guidance scale", self.guidance, 0.0, MAX_GUIDANCE)
        largest, multiple = defaults_for(pipe).max_size, family_of(pipe).side_multiple
        for name, side in (("width", self.width), ("height", self.height)):
            check_whole(f"The {name}", side, MIN_SIDE, largest)
            if side % multiple:
                below = side - side % multiple
                raise ValueError(
                    f"The {name} is {side} pixels, which is not a multiple of {multiple}; {below} would do."
                )


@dataclass(frozen=True)
class MapSettings:
    """What is asked of a recording. Words, or a sentence, or words to be found in a sentence.

    words: each attributed alone, in `template`, so that no word's map depends on its neighbours. sentence: a full
    attribution sentence, its tokens jointly; with words, the maps of those words within it, without, of every token.
    tau: threshold of Eq. 9, 0 to 1. alpha: floor of the self-attention map of Eq. 8, 0 to 1 (1 leaves it out). None
    for the model's own.
    crf: refine masks with a dense CRF. steps: indices of denoising steps to use, None for the model's own. resolutions: larger
    sides of the attention grids to use, None for the model's own choice.
    tokens: paths of token files, each a further attribution prompt; words are then optional. token_tau, token_alpha:
    tau and alpha for their masks, None for those of each token's file.
    method: a name of methods.ALL_METHODS. What it does not use of tau, alpha and crf is left alone.
    """

    words: tuple[str, ...] = ()
    sentence: str = ""
    tau: float | None = None
    alpha: float | None = None
    crf: bool = True
    steps: tuple[int, ...] | None = None
    resolutions: tuple[int, ...] | None = None
    template: str = "{}"
    tokens: tuple[str, ...] = ()
    token_tau: float | None = None
    token_alpha: float | None = None
    method: str = OVAM.name

    @classmethod
    def from_text(cls, words: str = "", sentence: str = "", **rest: Any) -> MapSettings:
        """From what people type: comma separated words, a sentence, or both. ValueError without either or a token."""
        check_text("The list of words", words, MAX_PROMPT)
        check_text("The attribution sentence", sentence, MAX_PROMPT)
        sentence = " ".join(sentence.split())
        by_token = rest.get("tokens") or method_named(rest.get("method", OVAM.name)).asks == "token"
        optional = bool(sentence or by_token)
        parsed = () if optional and not words.strip() else tuple(parse_words(words))
        return cls(words=parsed, sentence=sentence, **rest)

    def filled(self, pipe: Any) -> MapSettings:
        """The same with the model's own tau and alpha where none are given, or the method's where OVAM's do not hold."""
        own, method = defaults_for(pipe), method_named(self.method)
        # The model's tau stands for the share that most methods cut at; one of another share keeps its own.
        usual = own.tau if method.tau == OVAM.tau else method.tau
        tau, alpha = (mine if given is None else given for given, mine in ((self.tau, usual), (self.alpha, own.alpha)))
        return replace(self, tau=tau, alpha=alpha)

    def validate(self) -> None:
        """Raises ValueError, one sentence, for what no recording could answer."""
        self._check_method()
        if not self.words and not self.sentence.strip() and not self.tokens:
            raise ValueError("There are no words to look for; give at least one, for example: cat.")
        check_text("The attribution sentence", self.sentence, MAX_PROMPT)
        check_text("The template", self.template, MAX_PROMPT)
        if not isinstance(self.crf, bool):
            raise ValueError(f"The dense CRF is {self.crf!r}; write true or false.")
        if "{}" not in self.template:
            raise ValueError("The template has no {} where the word goes; write for example: a photo of a {}.")
        if len(self.tokens) > MAX_TOKENS:
            raise ValueError(f"{len(self.tokens)} tokens are too many; give at most {MAX_TOKENS}.")
        shares = {
            "The threshold tau": self.tau,
            "Alpha": self.alpha,
            "The tokens' tau": self.token_tau,
            "The tokens' alpha": self.token_alpha,
        }
        for name, value in shares.items():
            if value is not None:
                check_number(name, value, 0.0, 1.0)
        for step in self.steps or ():
            check_whole("A step to use", step, 0, MAX_STEPS - 1)
        if self.steps is not None and not self.steps:
            raise ValueError("No denoising step is chosen; choose at least one.")
        if self.resolutions is not None and not self.resolutions:
            raise ValueError("No resolution is chosen; choose at least one.")

    def _check_method(self) -> None:
        method = method_named(self.method)
        if method.asks == "token" and (self.words or self.sentence.strip() or not self.tokens):
            raise ValueError(f"{method.name} takes tokens, not words: choose a token and no words, or another method.")
        if isinstance(method, GocaMethod) and self.tokens:
            raise ValueError(
                f"{method.name} compares words; for a token choose {GOCA_TOKEN.name} or {OVAM_TOKEN.name}."
            )
        if isinstance(method, GocaMethod) and (self.sentence.strip() or self.template != "{}"):
            raise ValueError(
                f"{method.name} asks for words alone; leave the attribution sentence and the template out."
            )
        if (method.needs_goca or method.only is not None) and self.steps is not None:
            raise ValueError(f"{method.name} looks at a step of its own; name no denoising steps.")
        if method.needs_goca and self.resolutions is not None:
            raise ValueError(f"{method.name} weighs all layers; name no resolutions.")


def check_text(name: str, value: Any, limit: int) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{name} is not text.")
    if len(value) > limit:
        raise ValueError(f"{name} has {len(value):,} characters; at most {limit:,} are allowed.")


def check_whole(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name} is {value}; choose a whole number from {low} to {high}.")


def check_number(name: str, value: Any, low: float, high: float) -> None:
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not real or not math.isfinite(value) or not low <= value <= high:
        raise ValueError(f"{name} is {value}; choose a number from {low:g} to {high:g}.")


def check_fits(pipe: Any, name: str, text: str) -> None:
    """A pipeline cuts a long prompt and only logs it; the maps would then miss words in silence."""
    if not text.strip():
        return
    try:
        family_of(pipe).tokenize(text)
    except ValueError as error:
        raise ValueError(f"The {name} cannot be used: {error}") from None


def parse_numbers(text: str, name: str = "numbers", highest: int = MAX_STEPS - 1) -> tuple[int, ...] | None:
    """ "0-9, 14" to (0, 1, ..., 9, 14), sorted and without repeats; "" to None, "all" to every number up to `highest`.

    Raises ValueError for anything else, and for a number above `highest` (before a huge range is written out).
    """
    if not text.strip():
        return None
    if text.strip().lower() == "all":
        return tuple(range(highest + 1))
    chosen: set[int] = set()
    for part in re.split(r"[,\s]+", re.sub(r"\s*-\s*", "-", text.strip()).strip(",")):
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part)
        if not match:
            raise ValueError(f"'{(part or text)[:40]}' is not a list of {name}; write for example 0-9 or 3,5,8.")
        first, last = int(match[1]), int(match[2] or match[1])
        if last > highest or first > last:
            raise ValueError(f"The {name} {part} are not within 0 to {highest} in rising order.")
        chosen.update(range(first, last + 1))
    return tuple(sorted(chosen))


# ------------------------------------------------------------------------------------- image, then maps


@dataclass
class Generation:
    """An image with the recording it was made under, or a photograph with its own. `seconds`: wall time of the whole call."""

    image: Image.Image
    recording: Recording
    settings: GenerateSettings | PhotoSettings
    model: str
    device: str
    seconds: float
    dtype: str = "float32"
    goca: GocaRecording | None = None  # of one pass, for the methods that need it
    # The last heatmaps with what they answered: a new threshold needs no new ones.
    _last: tuple[Any, torch.Tensor] | None = field(default=None, repr=False, compare=False)

    @property
    def nbytes(self) -> int:
        """Bytes held: the recordings, the image and the last maps."""
        last = 0 if self._last is None else self._last[1].nbytes
        last += 0 if self.goca is None else self.goca.nbytes
        return self.recording.nbytes + self.image.width * self.image.height * 3 + last


@dataclass
class Maps:
    """Answers of `ask`. heatmaps: float32 [L, H, W] in [0, 1] at image size; masks: bool [L, H, W]; peaks: maxima."""

    labels: list[str]
    heatmaps: np.ndarray
    masks: np.ndarray
    peaks: list[float]


def generate(
    pipe: Any,
    settings: GenerateSettings,
    on_step: Callable[[int, int], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    branch: str = "conditional",
    with_goca: bool = False,
) -> Generation:
    """Makes one image under the recorder.

    on_step: called with (steps done, steps in all) after every denoising step, once with 0 before the first.
    should_stop: asked at every step; where it says True, `Stopped` is raised and nothing is kept.
    branch: half of the guided batch to record; `branch_for` knows which one token files need.
    with_goca: record the pass of GoCA beside it, for the methods that need one.
    Raises ValueError for settings that `validate` refuses, and where `record_goca` does not know the model's family.
    """
    settings.validate(pipe)
    beside = record_goca(pipe, branch=branch) if with_goca else nullcontext()
    begun = time.perf_counter()

    def after_step(done: int) -> None:
        done = min(done, settings.steps)  # some schedulers take a step or two more than asked for
        if should_stop is not None and should_stop():
            raise Stopped(done, settings.steps)
        if on_step is not None:
            on_step(done, settings.steps)

    after_step(0)
    family = family_of(pipe)
    # A generator on the CPU draws the same noise whatever the device.
    generator = torch.Generator("cpu").manual_seed(settings.seed)
    with record(pipe, branch=branch) as recorder, beside as weighted:
        images = pipe(
            prompt=settings.prompt,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            width=settings.width,
            height=settings.height,
            generator=generator,
            **family.arguments(settings.negative_prompt, after_step),
        ).images
    return Generation(
        image=images[0],
        recording=recorder.recordings[0],
        settings=settings,
        model=getattr(pipe, "ovam_name", str(getattr(pipe, "name_or_path", "unknown"))),
        device=str(pipe._execution_device),
        seconds=time.perf_counter() - begun,
        dtype=str(family.denoiser.dtype).removeprefix("torch."),
        goca=None if weighted is None else weighted.recordings[0],
    )


def branch_for(settings: MapSettings) -> str:
    """The half of the guided batch to record for these settings: the one their tokens were found on.

    Raises ValueError for tokens of different halves, which no one recording serves.
    """
    branches = {tokens.load(path).branch for path in settings.tokens} or {"conditional"}
    if len(branches) > 1:
        raise ValueError("These tokens were found on different halves of the guided batch; use them one at a time.")
    return branches.pop()


def attributions(pipe: Any, settings: MapSettings) -> list[Attribution]:
    """The words or sentence of the settings, then their tokens, as embeddings.

    Raises ValueError where the text encoder cannot take the text, or a token file cannot be used with this model.
    """
    settings.validate()
    return _of_text(pipe, settings) + [tokens.attribution(pipe, tokens.load(path)) for path in settings.tokens]


def _of_text(pipe: Any, settings: MapSettings) -> list[Attribution]:
    if settings.sentence.strip():
        if settings.words:
            return [words_in_sentence(pipe, settings.sentence, settings.words)]
        return [attribute_sentence(pipe, settings.sentence)]
    return attribute_words(pipe, settings.words, template=settings.template) if settings.words else []


def check_served(pipe: Any, settings: MapSettings, made: GenerateSettings | PhotoSettings) -> None:
    """Raises ValueError, one sentence, where an image of the settings `made` can have no recording for the method."""
    method = method_named(settings.method)
    if method.steps is not None and getattr(made, "steps", None) != method.steps:
        raise ValueError(
            f"{method.name} looks at step {method.only} of a run of {method.steps}: generate an image with "
            f"{method.steps} steps, or choose another method."
        )
    if isinstance(made, GenerateSettings):
        _check_parts(pipe, settings, made)
    if isinstance(method, GocaMethod):
        try:
            method.asking(pipe, made.caption, settings.words)
        except ValueError as error:
            raise ValueError(f"{method.name} cannot be asked this: {error}") from None


def _check_parts(pipe: Any, settings: MapSettings, made: GenerateSettings) -> None:
    """Refuses steps and grids that no recording of this image can have."""
    # A second-order scheduler calls the model twice a step, PNDM once more than it has steps.
    calls = made.steps * getattr(pipe.scheduler, "order", 1) + 1
    if settings.steps is not None and min(settings.steps) >= calls:
        raise ValueError(f"None of these steps is in a run of {made.steps}: choose among 0 to {made.steps - 1}.")
    side, strides = max(made.width, made.height), family_of(pipe).strides
    grids = {side // stride for stride in strides} | {-(-side // stride) for stride in strides}
    if settings.resolutions is not None and not grids & set(settings.resolutions):
        listed = ", ".join(str(grid) for grid in sorted(grids, reverse=True))
        raise ValueError(f"No attention grid is {settings.resolutions[-1]} wide: choose among {listed}.")


@torch.no_grad()
def ask(pipe: Any, generation: Generation, settings: MapSettings) -> Maps:
    """Heatmaps and masks of words, from the recording alone; the image is not made again.

    Raises ValueError for settings that the recording cannot answer (a step or resolution it does not hold, a method
    that needs another one, a token of the other half of the guided batch).
    """
    settings.validate()
    settings = settings.filled(pipe)
    check_served(pipe, settings, generation.settings)
    method = method_named(settings.method)
    if method.needs_goca and generation.goca is None:
        raise ValueError(f"{method.name} needs a pass that was not recorded with this image; choose another method.")
    recording = generation.recording.select(steps=settings.steps, resolutions=settings.resolutions)
    if settings.resolutions is None:
        recording = own_grids(pipe, recording)
    if settings.steps is None and method.only is None:
        recording = own_steps(pipe, recording)
    seen = Seen(_work_image(generation.image), recording, generation.settings.caption, generation.goca)
    if isinstance(method, GocaMethod):
        labels, maps, masks = _compare(pipe, generation, settings, replace(method, tau=settings.tau), seen)
    else:
        labels, maps, masks = _cut(pipe, generation, settings, method, seen)
    masks = np.stack([plot.resize_mask(mask, generation.image.size) for mask in masks])
    full = resize(maps, (generation.image.height, generation.image.width)).float().cpu().numpy()
    return Maps(labels, full, masks, [float(one.max()) for one in full])


def _compare(
    pipe: Any, generation: Generation, settings: MapSettings, method: GocaMethod, seen: Seen
) -> tuple[list[str], torch.Tensor, np.ndarray]:
    """Labels, maps and masks at the size of `seen.image`, of a method that gives each pixel to one word."""
    _check_answer(settings.words, generation.image)
    found = maps_and_masks(method, pipe, seen, settings.words)
    return list(found.labels), found.maps, found.masks


def _cut(
    pipe: Any, generation: Generation, settings: MapSettings, method: Method, seen: Seen
) -> tuple[list[str], torch.Tensor, np.ndarray]:
    """Labels, maps and masks at the size of `seen.image`, of a method that cuts each map for itself."""
    recording = method.select(seen.recording)
    loaded = [tokens.load(path) for path in settings.tokens]
    for token in loaded:
        if token.branch != recording.branch:
            names = ", ".join(token.names)
            raise ValueError(
                f"The token '{names}' was found on the {token.branch} half of the guided batch and this image was "
                f"recorded on the {recording.branch} one: make the image again with the token chosen."
            )
    of_text = _of_text(pipe, settings)
    of_tokens = [tokens.attribution(pipe, token) for token in loaded]
    words = [label for part in of_text for label in part.labels]
    # A word and the token of the same name stand side by side: say which is which.
    named = [f"{label} (token)" if label in words else label for part in of_tokens for label in part.labels]
    labels = _distinct([*words, *named])
    _check_answer(labels, generation.image)

    bodies = tuple(token.embedding.numpy().tobytes() for token in loaded)  # a file may change under its name
    question = (
        method.name,
        settings.words,
        settings.sentence,
        settings.template,
        settings.steps,
        settings.resolutions,
        bodies,
    )
    last = generation._last  # which another thread may replace at any time
    if last is None or last[0] != question:
        last = generation._last = (question, method.maps(seen, [*of_text, *of_tokens]))
    maps = last[1]

    # Words share a threshold; every token may bring its own. A method without self-attention keeps to 1.
    cuts = [(settings.tau, settings.alpha if method.alpha < 1 else 1.0)] * len(words)
    for token in loaded:
        tau = token.tau if settings.token_tau is None else settings.token_tau
        alpha = token.alpha if settings.token_alpha is None else settings.token_alpha
        cuts += [(tau, alpha if method.token_alpha < 1 else 1.0)] * len(token.names)
    masks = np.zeros((len(labels), seen.image.height, seen.image.width), dtype=bool)
    for tau, alpha in dict.fromkeys(cuts):
        rows = [row for row, cut in enumerate(cuts) if cut == (tau, alpha)]
        crf = settings.crf and method.crf
        masks[rows] = make_masks(recording, maps[rows], seen.image, tau=tau, alpha=alpha, crf=crf)
    return labels, maps, masks


def _check_answer(labels: Sequence[str], image: Image.Image) -> None:
    if len(labels) * image.width * image.height > MAX_ANSWER:
        raise ValueError(
            f"{len(labels)} words on a picture of {image.width}x{image.height} need too much memory; ask for fewer, or "
            "make it smaller."
        )


def _work_image(image: Image.Image) -> Image.Image:
    """The picture in which masks are made: itself, or for a large photograph one of MAX_WORK_PIXELS of its shape."""
    scale = math.sqrt(MAX_WORK_PIXELS / (image.width * image.height))
    if scale >= 1:
        return image
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)


def _distinct(labels: Sequence[str]) -> list[str]:
    """A sentence may hold a token twice; galleries, legends and files need names that differ."""
    seen: dict[str, int] = {}
    for_all = []
    for label in labels:
        seen[label] = seen.get(label, 0) + 1
        for_all.append(label if seen[label] == 1 else f"{label} ({seen[label]})")
    return for_all


# ------------------------------------------------------------------------------------------------- files


def slugs(labels: Sequence[str], longest: int = 40) -> list[str]:
    """File name parts for words: letters, digits and hyphens only (of any script), distinct, never a way out."""
    taken: set[str] = set()
    names = []
    for label in labels:
        plain = unicodedata.normalize("NFKC", label).lower()
        base = re.sub(r"[\W_]+", "-", plain).strip("-")[:longest].strip("-") or "word"
        name, count = base, 1
        while name in taken:
            count += 1
            name = f"{base}-{count}"
        taken.add(name)
        names.append(name)
    return names


def _npz(maps: Maps) -> bytes:
    buffer = io.BytesIO()
    words = np.array(maps.labels, dtype=np.str_)
    np.savez_compressed(buffer, maps=maps.heatmaps.astype(np.float32), words=words)
    return buffer.getvalue()


def contents(generation: Generation, maps: Maps, settings: MapSettings) -> dict[str, bytes]:
    """Every file of a result, by name, its tokens among them. The same result gives the same bytes: nothing here holds a
    time or a path of this machine.
    """
    kept = _token_files(settings.tokens)
    files = {"image.png": plot.png(generation.image), "heatmaps.npz": _npz(maps)}
    vmax = max(maps.peaks)  # one scale for all words, as in the app
    colors = plot.word_colors(maps.labels)
    for label, slug, heatmap, mask in zip(maps.labels, slugs(maps.labels), maps.heatmaps, maps.masks, strict=True):
        files[f"overlay_{slug}.png"] = plot.png(plot.overlay(generation.image, heatmap, vmax))
        files[f"mask_{slug}.png"] = plot.png(plot.mask_image(mask))
    files["labels.png"] = plot.png(plot.label_image(label_map(maps.heatmaps, maps.masks)))
    about = {
        "format": generation.settings.FORMAT,
        "model": generation.model,
        "device": generation.device,
        "dtype": generation.dtype,
        generation.settings.KIND: asdict(generation.settings),
        "maps": asdict(settings) | {"tokens": list(kept)},
        "words": [
            {"word": label, "label": index, "file": slug, "color": colors[label], "peak": round(peak, 6)}
            for index, (label, slug, peak) in enumerate(zip(maps.labels, slugs(maps.labels), maps.peaks), start=1)
        ],
        "files": sorted([*files, *kept, SETTINGS_FILE]),
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
    }
    files[SETTINGS_FILE] = (json.dumps(about, indent=2, ensure_ascii=False) + "\n").encode()
    return files | kept


def _token_files(paths: Sequence[str]) -> dict[str, bytes]:
    """Token files by the name they get in a result, "token_cat.safetensors"; in the order given."""
    names = slugs([" ".join(tokens.load(path).names) for path in paths])
    return {f"token_{name}{tokens.SUFFIX}": Path(path).read_bytes() for name, path in zip(names, paths, strict=True)}


def save(folder: str | Path, generation: Generation, maps: Maps, settings: MapSettings) -> list[Path]:
    """Writes a result into a folder, made if need be; each file is written beside its place and renamed.

    image.png; heatmaps.npz (`maps` float32 [L, H, W] in [0, 1] at image size, `words`); overlay_<word>.png and
    mask_<word>.png for each word; labels.png (ids in the order of the words, VOC palette); token_<class>.safetensors for
    each token asked for; settings.json, from which
    `python -m ovam_core generate --settings` makes the same bytes on the same machine, as `photo --settings` does with
    a photograph.
    Files of an earlier result in the folder that this one does not have are taken away.
    """
    folder = make_folder(folder)
    files = contents(generation, maps, settings)
    for name in _earlier(folder) - files.keys():
        (folder / name).unlink(missing_ok=True)
    for name, data in files.items():
        write(folder / name, data)
    return [folder / name for name in files]


def make_folder(folder: str | Path) -> Path:
    """The folder, made if need be. Raises ValueError if it cannot be made or written to."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"'{folder}' is, or lies in, a file: give a folder.") from None
    except OSError as error:
        reason = error.strerror or "not possible"
        raise ValueError(f"Cannot write to the folder '{folder}': {reason.lower()}.") from None
    return folder


def _earlier(folder: Path) -> set[str]:
    """Overlays and masks that a settings.json in the folder owns up to: only names that `save` itself makes."""
    try:
        listed = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))["files"]
        return {name for name in listed if re.fullmatch(r"(overlay|mask)_[\w-]+\.png|token_[\w-]+\.safetensors", name)}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def save_zip(path: str | Path, generation: Generation, maps: Maps, settings: MapSettings) -> Path:
    """The same files as `save`, in one zip."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:  # PNG and npz are compressed already
        for name, data in contents(generation, maps, settings).items():
            archive.writestr(zipfile.ZipInfo(name), data)  # ZipInfo's fixed date keeps the bytes the same
    write(Path(path), buffer.getvalue())
    return Path(path)


def load_settings(path: str | Path, made_by: type[Made] = GenerateSettings) -> tuple[Made, MapSettings, str, str]:
    """settings.json back to (settings of the image, maps, model, device). made_by: the class of the first,
    GenerateSettings or PhotoSettings.

    Raises ValueError if it is not one of `save`'s, or of another kind.
    """
    path = Path(path)
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise ValueError(f"There is no settings file '{path}' that can be read.") from None
    except (ValueError, RecursionError):
        raise ValueError(f"'{path}' is not a JSON file.") from None
    if not isinstance(about, dict) or about.get("format") != made_by.FORMAT:
        raise ValueError(f"'{path}' is not a settings.json of this program (format {made_by.FORMAT}).")
    try:
        made = made_by(**_known(made_by, about[made_by.KIND]))
        asked = MapSettings(**_known(MapSettings, about["maps"]))
        asked = replace(
            asked, **{key: _tuple(getattr(asked, key)) for key in ("words", "steps", "resolutions", "tokens")}
        )
        # Its tokens lie beside it.
        asked = replace(asked, tokens=tuple(str(path.parent / name) for name in asked.tokens))
        return made, asked, str(about["model"]), str(about["device"])
    except (KeyError, TypeError):
        raise ValueError(f"'{path}' lacks a setting or holds one of the wrong kind.") from None


def _known(cls: type, values: dict) -> dict:
    unknown = set(values) - {one.name for one in fields(cls)}
    if unknown:
        raise ValueError(f"The settings hold '{sorted(unknown)[0]}', which this version does not know.")
    return values


def _tuple(value: Any) -> tuple | None:
    """A list of the file. Raises TypeError for anything else, a text of several letters among them."""
    if value is not None and not isinstance(value, list | tuple):
        raise TypeError
    return None if value is None else tuple(value)
