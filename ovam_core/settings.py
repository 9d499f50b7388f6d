"""What makes a picture, and what is asked of it: every setting's name, range, default and help, written once.

The command line takes its options from these fields, the page its limits, settings.json its keys; `validate` says what
is wrong in one sentence. Nothing here imports torch before a model is at hand.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, cast, get_args, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from ovam_core.checks import MAX_PROMPT, MAX_SEED, TIMESTEPS, check_whole
from ovam_core.errors import InputError

if TYPE_CHECKING:
    from ovam_core.models.adapter import Pipeline

MAX_STEPS = 200
MAX_GUIDANCE = 30.0
MAX_TOKENS = 32
MAX_GRID = 4096  # no attention grid is wider
MIN_SIDE = 64  # pixels of a generated image
MAX_TIMESTEP = 999  # the last of the training schedules
MAX_BATCH = 256
MAX_EPOCHS = 10_000
MAX_PROXIMITY = 1e6

# What files and options name; their modules import torch, and the command line lists them without it.
HALVES = ("conditional", "unconditional")  # of the guided batch
EVOLUTIONS = ("steps", "grids", "layers", "heads")  # what a heatmap is taken apart over
START_FILE = "start.png"  # the picture that a run began from, beside its settings.json
FORMATS = ("voc", "coco", "parquet")  # of a data set; "voc" is always there
CROSS_ENTROPY = "cross-entropy"  # a loss of the search for tokens
MAX_UNLABELLED = 64  # pictures without masks that a token is learned on from
LIBRARY = "library"  # in place of a folder: the tokens that ship for the model

# The names of methods.METHODS, in their order: the command line lists them without importing torch.
METHOD_NAMES = (
    "DAAM",
    "Attn2Mask",
    "OVAM",
    "OVAM + token",
    "GoCA",
    "GoCA, any word",
    "OVAM, GoCA's weights",
    "GoCA + token",
    "iSeg",
    "FA-Seg",
    "Dataset Diffusion",
    "ConceptAttention",
)
DEFAULT_METHOD = "OVAM"

# The names of data.label_sets.LABEL_SETS, in their order.
SET_NAMES = ("voc", "pascal-context-59", "pascal-context-60", "coco-object", "coco-stuff-27", "cityscapes", "ade20k")

# How the guidance is spread over the picture (hooks/guidance.py).
PLAIN, S_CFG, S_CFG_AVERAGE = "plain", "s-cfg", "s-cfg-average"
GUIDANCE_KINDS = (PLAIN, S_CFG, S_CFG_AVERAGE)

# Systems with trained modules of their own (downstream/), and where their authors publish the weights: who uses one
# brings them.
SYSTEMS = {
    "Grounded Diffusion": "https://github.com/Lipurple/Grounded-Diffusion",
    "DatasetDM": "https://github.com/showlab/DatasetDM",
    "SAM": "https://huggingface.co/facebook/sam-vit-base",
}


def _share(title: str, description: str) -> FieldInfo:
    return Field(title=title, description=description, ge=0.0, le=1.0)


def _text(title: str, description: str) -> FieldInfo:
    return Field(title=title, description=description, max_length=MAX_PROMPT)


Tau = Annotated[
    float | None, Field(title="The threshold tau", ge=0, le=1, description="threshold of the masks (Eq. 9)")
]
Alpha = Annotated[
    float | None,
    Field(title="Alpha", ge=0, le=1, description="floor of the self-attention map (Eq. 8); 1 leaves it out"),
]
Seed = Annotated[int, Field(title="The seed", ge=0, le=MAX_SEED, description="where the noise begins")]

Uncertain = Annotated[
    float, Field(title="The setting uncertain", ge=0, le=1, description="label pixels this close to the threshold 255")
]
MinPresence = Annotated[
    float | None,
    Field(
        title="The min presence",
        ge=0,
        le=1,
        description="leave out of a picture's labels the classes that are probably not in it: whose presence is lower; "
        "0 only says it of each",
    ),
]
BatchSize = Annotated[int, Field(title="The batch size", ge=1, le=MAX_BATCH, description="images made together")]
Threads = Annotated[
    int | None,
    Field(title="The number of threads", ge=1, le=1024, description="CPU threads a process; part of the settings"),
]


LATER = {"later": True}  # metadata of a field that older files lack


def json_names(settings_class: type) -> dict[str, str]:
    """Field name to the key under which it stands in files; files keep the keys that they have always had."""
    return {one.name: one.metadata.get("key", one.name) for one in fields(settings_class)}


class Settings:
    """What the dataclasses of settings share: fields checked by their own annotations, and JSON both ways."""

    def check_fields(self) -> None:
        """Raises InputError, one sentence, for the first field that is of another kind or out of its range."""
        values = {
            one.name: getattr(self, one.name)
            for one in fields(cast(Any, self))
            if one.name in _ranges(cast(Any, type(self)))
        }
        for name, value in values.items():
            check_field(type(self), name, value)

    def to_json(self) -> dict[str, Any]:
        """The fields as settings.json holds them; those that came later (LATER) only where they were given."""
        later = {one.name: one.default for one in fields(cast(Any, self)) if "later" in one.metadata}
        values = {name: getattr(self, name) for name in json_names(type(self))}
        kept = {name: value for name, value in values.items() if name not in later or value != later[name]}
        return {json_names(type(self))[name]: value for name, value in kept.items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The settings of a file. Raises InputError for a key that is not known, KeyError and TypeError for what is
        none.
        """
        names = {key: name for name, key in json_names(cls).items()}
        if unknown := sorted(set(values) - names.keys()):
            raise InputError(f"The settings hold '{unknown[0]}', which this version does not know.")
        return cls(**{names[key]: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def setting_info(settings_class: type, name: str) -> FieldInfo:
    """Title, description and range of a field, for option help and page limits."""
    return _ranges(settings_class)[name]


@cache
def _ranges(settings_class: Any) -> dict[str, FieldInfo]:
    hints = get_type_hints(settings_class, include_extras=True)
    annotated = {name: get_args(hint) for name, hint in hints.items() if hasattr(hint, "__metadata__")}
    return {name: next(x for x in parts[1:] if isinstance(x, FieldInfo)) for name, parts in annotated.items()}


@cache
def _adapter(settings_class: type, name: str) -> TypeAdapter:
    hint = get_type_hints(settings_class, include_extras=True)[name]
    return TypeAdapter(hint, config=ConfigDict(strict=True, arbitrary_types_allowed=True, allow_inf_nan=False))


def check_field(settings_class: type, name: str, value: Any) -> None:
    """Raises InputError where `value` is not what the field takes."""
    info = setting_info(settings_class, name)
    try:
        _adapter(settings_class, name).validate_python(value)
    except ValidationError:
        raise InputError(_sentence(info, value)) from None


def _sentence(info: FieldInfo, value: Any) -> str:
    limits = {
        kind: x
        for one in info.metadata
        for kind in ("ge", "le", "max_length")
        if (x := getattr(one, kind, None)) is not None
    }
    if "max_length" in limits:
        if not isinstance(value, str):
            return f"{info.title} is not text."
        if len(value) <= limits["max_length"]:  # which leaves halves of surrogate pairs: bytes of another encoding
            return f"{value[:40]!r} holds characters that are not Unicode: write it in UTF-8."
        return f"{info.title} has {len(value):,} characters; at most {limits['max_length']:,} are allowed."
    if "ge" in limits:
        whole = isinstance(limits["le"], int) and limits["le"] > 1
        kind, highest = ("whole number", f"{limits['le']}") if whole else ("number", f"{limits['le']:g}")
        return f"{info.title} is {value}; choose a {kind} from {limits['ge']:g} to {highest}."
    return f"{info.title} is {value!r}; write true or false."


# ------------------------------------------------------------------------------------------ what makes a picture


@dataclass(frozen=True)
class GenerateSettings(Settings):
    """What makes an image. `validate` must pass before a picture is made of it.

    start: what the run begins from in place of pure noise, cropped about its middle to the size; None for noise.
    strength: the share of the steps that are run then. In files both are there only with a start, which is the picture
    of START_FILE beside them. guidance_kind: of GUIDANCE_KINDS: the same strength everywhere, or S-CFG, a strength for
    each region of the prompt's words, found by GoCA's weights of heads and layers or by plain averages.
    """

    KIND: ClassVar[str] = "generation"  # its name in settings.json
    FORMAT: ClassVar[str] = "ovam-generate/1"

    prompt: Annotated[str, _text("The prompt", "what the picture shows")]
    negative_prompt: Annotated[str, _text("The negative prompt", "what the picture should not show")] = ""
    seed: Seed = 0
    steps: Annotated[int, Field(title="The number of steps", ge=1, le=MAX_STEPS, description="denoising steps")] = 25
    guidance: Annotated[
        float,
        Field(
            title="The guidance scale", ge=0.0, le=MAX_GUIDANCE, description="guidance scale; 1 and less switch it off"
        ),
    ] = 4.0
    width: int = 128
    height: int = 128
    start: Any = field(default=None, metadata=LATER)  # a picture or its file
    strength: Annotated[
        float,
        Field(
            title="The strength",
            ge=1 / MAX_STEPS,
            le=1.0,
            description="how much of the start picture is drawn anew: the share of the steps that are run",
        ),
    ] = 0.6
    guidance_kind: str = field(default=PLAIN, metadata=LATER)

    @property
    def caption(self) -> str:
        """The text of the recorded passes."""
        return self.prompt

    @classmethod
    def for_model(cls, pipe: Pipeline, prompt: str, **given: Any) -> GenerateSettings:
        """Settings with the model's own defaults in place of whatever is not given, or given as None."""
        from ovam_core.models.presets import defaults_for

        preset = defaults_for(pipe)
        usual = {name: getattr(preset, name) for name in ("steps", "guidance", "width", "height")}
        return cls(prompt=prompt, **(usual | {name: value for name, value in given.items() if value is not None}))

    def to_json(self) -> dict[str, Any]:
        values = super().to_json()
        if self.start is None:
            del values["strength"]
            return values
        return values | {"start": START_FILE}

    def validate(self, pipe: Pipeline) -> None:
        """Raises InputError, one sentence, where this model cannot make an image of these settings."""
        from ovam_core.hooks.guidance import check_guidance
        from ovam_core.models.presets import defaults_for
        from ovam_core.models.registry import adapter_of, check_draws
        from ovam_core.models.starting import check_start

        check_prompt(pipe, self.prompt)
        check_negative_prompt(pipe, self.negative_prompt)
        check_draws(type(pipe))
        adapter_of(pipe).check_whole()
        self.check_fields()
        check_sides(self.width, self.height, MIN_SIDE, defaults_for(pipe).max_size, adapter_of(pipe).side_multiple)
        if self.guidance_kind not in GUIDANCE_KINDS:
            raise InputError(
                f"The guidance is '{str(self.guidance_kind)[:40]}'; choose {', '.join(GUIDANCE_KINDS[:-1])} or "
                f"{GUIDANCE_KINDS[-1]}."
            )
        if self.guidance_kind != PLAIN:
            check_guidance(pipe, self.guidance)
        if self.start is not None:
            check_start(pipe, self.steps, self.strength)


def check_prompt(pipe: Pipeline, text: str) -> None:
    """Raises InputError for a prompt that this model cannot draw."""
    from ovam_core.models.registry import check_fits

    check_field(GenerateSettings, "prompt", text)
    if not text.strip():
        raise InputError("The prompt is empty; describe the picture in a few words.")
    check_fits(pipe, "prompt", text)


def check_negative_prompt(pipe: Pipeline, text: str) -> None:
    """Raises InputError for a negative prompt that this model cannot take."""
    from ovam_core.models.registry import check_fits

    check_field(GenerateSettings, "negative_prompt", text)
    check_fits(pipe, "negative prompt", text)


@dataclass(frozen=True)
class PhotoSettings(Settings):
    """What a photograph is recorded with. `validate` must pass before it is recorded.

    caption: empty, the pass is that of the unconditional half. timesteps: how much noise is added, each from 0 to the
    training schedule's last, 999; one forward pass each. width, height: pixels in which the model sees it, multiples of
    its adapter's `photo_multiple`; None, both of them, for the size that fits the photograph. mirror: as many passes
    see it in a mirror, too, and the maps are means of both.
    """

    KIND: ClassVar[str] = "photo"
    FORMAT: ClassVar[str] = "ovam-photo/1"

    caption: Annotated[str, _text("The caption", "what the photograph shows")] = ""
    timesteps: tuple[int, ...] = TIMESTEPS
    seed: Seed = 0
    width: int | None = None
    height: int | None = None
    mirror: Annotated[
        bool, Field(title="The mirror", description="see the photograph in a mirror, too, and average the maps")
    ] = field(default=False, metadata=LATER)

    @classmethod
    def for_model(cls, pipe: Pipeline, caption: str = "", **given: Any) -> PhotoSettings:
        """With the model's usual noise (`Adapter.photo_timestep`), where none is given."""
        from ovam_core.models.registry import adapter_of

        return cls(caption, **{"timesteps": (adapter_of(pipe).photo_timestep,), **given})

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width), or None."""
        return None if self.width is None or self.height is None else (self.height, self.width)

    def validate(self, pipe: Pipeline) -> None:
        """Raises InputError, one sentence, for what this model cannot record."""
        from ovam_core.hooks.photograph import check_request

        if (self.width is None) != (self.height is None):
            raise InputError("Only one side of the size is given; give width and height, or neither.")
        check_field(type(self), "mirror", self.mirror)
        check_request(pipe, self.caption, self.timesteps, self.seed, self.size)


def check_sides(width: Any, height: Any, smallest: int, largest: int, multiple: int) -> None:
    """Raises InputError for sides in pixels that are no whole numbers in range, or no multiples of `multiple`."""
    for name, side in (("width", width), ("height", height)):
        check_whole(f"The {name}", side, smallest, largest)
        if side % multiple:
            below = side - side % multiple
            raise InputError(f"The {name} is {side} pixels, which is not a multiple of {multiple}; {below} would do.")


# ------------------------------------------------------------------------------------------ what is asked of it


@dataclass(frozen=True)
class SegmentSettings(Settings):
    """What is asked of a recording. Words, or a sentence, or words to be found in a sentence; and tokens.

    words: each attributed alone, in `template`, so that no word's map depends on its neighbours. sentence: a full
    attribution sentence, its tokens jointly; with words, the maps of those words within it, without, of every token.
    tau, alpha: threshold and self-attention floor for words, None for the model's own (or the method's, where the
    model's do not hold); token_tau, token_alpha: for tokens, None for each token's own. step_indices: denoising steps
    to use, from 0; resolutions: larger sides of the attention grids to use; None for those that the model recommends.
    tokens: each a further attribution prompt; words are then optional. method: a name of methods.METHODS. What it does
    not use of tau, alpha and crf is left alone. branch: half of the guided batch that words are asked of; None for the
    conditional one; a token is of its own. evolution: over which of EVOLUTIONS each label's heatmap is taken apart.
    method may also be a `Method` itself, such as one with weights of its own; files hold its name.
    """

    words: tuple[str, ...] = ()
    sentence: Annotated[str, _text("The attribution sentence", "a full sentence to attribute; words pick from it")] = ""
    tau: Tau = None
    alpha: Alpha = None
    crf: Annotated[bool, Field(title="The dense CRF", description="refine the masks along the picture's edges")] = True
    step_indices: tuple[int, ...] | None = field(default=None, metadata={"key": "steps"})
    resolutions: tuple[int, ...] | None = None
    template: Annotated[str, _text("The template", "the attribution prompt around a word")] = "{}"
    tokens: tuple[Any, ...] = ()  # of Token
    token_tau: Annotated[float | None, Field(title="The tokens' tau", ge=0, le=1)] = None
    token_alpha: Annotated[float | None, Field(title="The tokens' alpha", ge=0, le=1)] = None
    method: Any = DEFAULT_METHOD  # a name, or a Method
    branch: str | None = field(default=None, metadata=LATER)
    evolution: str | None = field(default=None, metadata=LATER)

    def to_json(self) -> dict[str, Any]:
        values = super().to_json()
        return values | {"method": values["method"] if isinstance(self.method, str) else self.method.name}

    def validate(self) -> None:
        """Raises InputError, one sentence, for what no recording could answer; `methods.check_settings` asks the
        method, too.
        """
        if not self.words and not self.sentence.strip() and not self.tokens:
            raise InputError("There are no words to look for; give at least one, for example: cat.")
        self.check_fields()
        if "{}" not in self.template:
            raise InputError("The template has no {} where the word goes; write for example: a photo of a {}.")
        if len(self.tokens) > MAX_TOKENS:
            raise InputError(f"{len(self.tokens)} tokens are too many; give at most {MAX_TOKENS}.")
        for step in self.step_indices or ():
            check_whole("A step to use", step, 0, MAX_STEPS - 1)
        if self.step_indices is not None and not self.step_indices:
            raise InputError("No denoising step is chosen; choose at least one.")
        if self.resolutions is not None and not self.resolutions:
            raise InputError("No resolution is chosen; choose at least one.")
        for name, value, known in (("half", self.branch, HALVES), ("evolution", self.evolution, EVOLUTIONS)):
            if value is not None and value not in known:
                raise InputError(f"The {name} is {str(value)[:40]!r}; choose {' or '.join(known)}.")


# ------------------------------------------------------------------------------------------ tokens and data sets


@dataclass(frozen=True)
class OptimizeSettings(Settings):
    """How the embedding is found. `RECIPES` holds two that are known to be good, and the published code's.

    epochs: evaluations of loss and gradient. method: "descent" (plain gradient descent), "momentum" (0.9), "adam" or
    "lbfgs" (every evaluation of its line search counts as an epoch). rate: the learning rate, times `decay` every
    `decay_every` epochs. proximity: weight of the mean squared distance from the start, added to what is minimised but
    not to the losses that are reported; 0 leaves it out. loss: None for Eq. 7, or "cross-entropy": of the maps scaled
    to [0, 1] over all their values together, taken as logits.

    The default: the loss is smooth, has no noise and few unknowns, which is what L-BFGS is for. Seven classes, one
    image each, on the embedded model's first edition: the paper's recipe reached 0.240 in 500 epochs, L-BFGS 0.251 in
    20 and 0.226 in 50; momentum and Adam took 100 epochs and more. Without `proximity` it walks hundreds of times the
    length of the class name's embedding for the last hundredth, out of float16's range. A low loss on one image is not
    all: on other images of the class what stays nearer gains more (mIoU 0.790 by default, 0.816 with 0.1, 0.824 with 1;
    the paper's recipe 0.803, the class name 0.766): `python -m benchmarks.optimize`, its table in benchmarks/README.md.
    """

    recipe: str = "fast"
    epochs: Annotated[
        int,
        Field(title="The number of epochs", ge=1, le=MAX_EPOCHS, description="epochs of the search"),
    ] = 60
    method: Literal["descent", "momentum", "adam", "lbfgs"] = "lbfgs"
    rate: float = 1.0
    decay: float = 1.0
    decay_every: int = 120
    proximity: Annotated[
        float,
        Field(
            title="The weight on staying near the start",
            ge=0,
            le=MAX_PROXIMITY,
            description="weight on staying near the class name's embedding",
        ),
    ] = field(default=0.003, metadata={"key": "stay"})
    loss: str | None = field(default=None, metadata=LATER)

    def validate(self) -> None:
        """Raises InputError, one sentence, for settings that could find nothing."""
        self.check_fields()
        if self.method not in ("descent", "momentum", "adam", "lbfgs"):
            raise InputError(f"There is no method '{self.method}'; choose descent, momentum, adam or lbfgs.")
        if self.loss not in (None, CROSS_ENTROPY):
            raise InputError(f"There is no loss {str(self.loss)[:40]!r}; choose {CROSS_ENTROPY}, or leave it out.")
        if not math.isfinite(self.rate) or self.rate <= 0:
            raise InputError(f"The learning rate is {self.rate}; choose a number above 0.")
        if not 0 < self.decay <= 1 or self.decay_every < 1:
            raise InputError("The learning rate must decay by a factor above 0 and up to 1, every epoch or less often.")


# "published-code": what the authors' library does where nothing else is said, which is not what the paper writes. Their
# script for VOC has the same loss with a rate of 100, times 0.7 every 120 epochs, 800 in all. Both recorded the
# unconditional half.
RECIPES = {
    "fast": OptimizeSettings(),
    "paper": OptimizeSettings("paper", 500, "descent", 100.0, 0.7, 120, proximity=0.0),
    "published-code": OptimizeSettings(
        "published-code", 1000, "descent", 300.0, 0.7, 80, proximity=0.0, loss=CROSS_ENTROPY
    ),
}


@dataclass(frozen=True)
class TableSettings:
    """Settings of a row of the paper's tables 1 and 2, on a folder of annotated images; None for the method's own.

    about: for people. method: the only one that the numbers are of. tau, alpha: for names; token_tau, token_alpha: for
    tokens. branch: the half of the guided batch. template: the attribution prompt of a name.
    """

    about: str
    method: str | None = None
    tau: float | None = None
    alpha: float | None = None
    token_tau: float | None = None
    token_alpha: float | None = None
    branch: str | None = None
    template: str | None = None


# As printed, every method has its own tau and alpha on both sets; the notebooks that made the tables had others for
# OVAM, on 490 images of VOC-sim and 707 of COCO-cap that show their class well, and asked VOC-sim's names in their
# prompt. They cut at tau of the map's own peak before A_alpha is multiplied on, here it is the product's (Eq. 9); of a
# name of several words they took the last alone, here it is the mean.
TABLES = {
    "voc-sim": TableSettings("VOC-sim as printed", template="A photograph of a {}"),
    "coco-cap": TableSettings("COCO-cap as printed", template="A photograph of a {}"),
    "voc-sim-published-code": TableSettings(
        "VOC-sim as the notebooks ran it", "OVAM", 0.4, 0.85, 0.75, 0.95, "unconditional", "A photograph of a {}"
    ),
    "coco-cap-published-code": TableSettings(
        "COCO-cap as the notebooks ran it", "OVAM", 0.5, 0.91, 0.8, 0.99, "unconditional"
    ),
}


@dataclass(frozen=True)
class Filters(Settings):
    """Which images of an export are kept; shares of 0 to 1.

    min_coverage, max_coverage: of the image, that the labelled pixels may cover. clip_drop: of each class, the images
    of the lowest CLIP similarity that are dropped; needs scores.
    """

    min_coverage: Annotated[float, _share("The min coverage", "drop masks that cover less")] = 0.05
    max_coverage: Annotated[float, _share("The max coverage", "drop masks that cover more")] = 0.95
    clip_drop: Annotated[float, _share("The clip drop", "lowest share of each class to drop")] = 0.3

    def validate(self) -> None:
        """Raises InputError, one sentence, for what is no share."""
        self.check_fields()
        if self.min_coverage > self.max_coverage:
            raise InputError("The min coverage is above the max coverage; no image could be kept.")


# ------------------------------------------------------------------------------------------ what people type


def parse_numbers(text: str, name: str = "numbers", highest: int = MAX_STEPS - 1) -> tuple[int, ...] | None:
    """ "0-9, 14" to (0, 1, ..., 9, 14), sorted and without repeats; "" to None, "all" to every number up to `highest`.

    Raises InputError for anything else, and for a number above `highest` (before a huge range is written out).
    """
    if not text.strip():
        return None
    if text.strip().lower() == "all":
        return tuple(range(highest + 1))
    chosen: set[int] = set()
    for part in re.split(r"[,\s]+", re.sub(r"\s*-\s*", "-", text.strip()).strip(",")):
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part)
        if not match:
            raise InputError(f"'{(part or text)[:40]}' is not a list of {name}; write for example 0-9 or 3,5,8.")
        first, last = int(match[1]), int(match[2] or match[1])
        if last > highest or first > last:
            raise InputError(f"The {name} {part} are not within 0 to {highest} in rising order.")
        chosen.update(range(first, last + 1))
    return tuple(sorted(chosen))


MAX_OFFSETS = 101


def parse_offsets(text: str) -> tuple[float, ...]:
    """ "-0.4:0.4:0.1", from, to and step, or "-0.2,0,0.2", to numbers from -1 to 1, sorted, each once.

    Raises InputError for anything else.
    """
    sentence = f"'{text[:40]}' is no list of offsets from -1 to 1; write for example -0.4:0.4:0.1 or -0.2,0,0.2."
    ranged = ":" in text
    try:
        numbers = [float(part) for part in text.split(":" if ranged else ",")]
    except ValueError:
        raise InputError(sentence) from None
    if ranged:
        if len(numbers) != 3 or not all(map(math.isfinite, numbers)) or numbers[2] <= 0 or numbers[0] > numbers[1]:
            raise InputError(sentence)
        first, last, step = numbers
        count = (last - first) / step
        if count > MAX_OFFSETS:
            raise InputError(f"'{text[:40]}' are too many offsets; at most {MAX_OFFSETS} are swept.")
        numbers = [first + number * step for number in range(math.floor(count + 1e-9) + 1)]
    if len(numbers) > MAX_OFFSETS or not all(abs(number) <= 1 for number in numbers):  # nan is no such number, too
        raise InputError(sentence)
    return tuple(sorted({round(number, 9) + 0.0 for number in numbers}))  # -0.0 is 0


def parse_size(text: str) -> tuple[int, int]:
    """ "128x96" to (128, 96), width and height. Raises InputError for anything else."""
    sides = text.lower().replace("×", "x").split("x")
    if len(sides) != 2 or not all(side.strip().isascii() and side.strip().isdigit() for side in sides):
        raise InputError(f"The size '{text[:40]}' is not of the form WIDTHxHEIGHT; write for example 128x128.")
    if any(len(side.strip()) > 6 for side in sides):
        raise InputError("The size is far too large; write for example 128x128.")
    return int(sides[0]), int(sides[1])
