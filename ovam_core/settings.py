"""TODO: what this module is."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ovam_core.checks import MAX_PROMPT, MAX_SEED, check_number, check_text, check_whole
from ovam_core.errors import InputError
from ovam_core.hooks.photograph import TIMESTEPS, check_request
from ovam_core.methods import GOCA_TOKEN, OVAM, OVAM_TOKEN, GocaMethod, method_named
from ovam_core.models.families import check_fits, family_of
from ovam_core.models.presets import defaults_for
from ovam_core.query import parse_words


@dataclass(frozen=True)
class PhotoSettings:
    """What a photograph is recorded with. `validate` must pass before `photograph` takes it.

    caption: what it shows; empty, the pass is that of the unconditional half. timesteps: how much noise is added, each
    from 0 to the training schedule's last, 999; one forward pass each. seed: of the noise, 0 to 2**32 - 1. width, height:
    pixels in which the model sees it, multiples of its family's `photo_multiple`; None, both of them, for `fitted_size`.
    """

    KIND: ClassVar[str] = "photo"
    FORMAT: ClassVar[str] = "ovam-photo/1"

    caption: str = ""
    timesteps: tuple[int, ...] = TIMESTEPS
    seed: int = 0
    width: int | None = None
    height: int | None = None

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width), or None."""
        return None if self.width is None or self.height is None else (self.height, self.width)

    def validate(self, pipe: Any) -> None:
        """Raises InputError, one sentence, for what this model cannot record."""
        if (self.width is None) != (self.height is None):
            raise InputError("Only one side of the size is given; give width and height, or neither.")
        check_request(pipe, self.caption, self.timesteps, self.seed, self.size)


MAX_STEPS = 200

MAX_GUIDANCE = 30.0


MAX_TOKENS = 32

MIN_SIDE = 64


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
        """Raises InputError, one sentence, where this model cannot make an image of these settings."""
        check_text("The prompt", self.prompt, MAX_PROMPT)
        if not self.prompt.strip():
            raise InputError("The prompt is empty; describe the picture in a few words.")
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
                raise InputError(
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
        """From what people type: comma separated words, a sentence, or both. InputError without either or a token."""
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
        """Raises InputError, one sentence, for what no recording could answer."""
        self._check_method()
        if not self.words and not self.sentence.strip() and not self.tokens:
            raise InputError("There are no words to look for; give at least one, for example: cat.")
        check_text("The attribution sentence", self.sentence, MAX_PROMPT)
        check_text("The template", self.template, MAX_PROMPT)
        if not isinstance(self.crf, bool):
            raise InputError(f"The dense CRF is {self.crf!r}; write true or false.")
        if "{}" not in self.template:
            raise InputError("The template has no {} where the word goes; write for example: a photo of a {}.")
        if len(self.tokens) > MAX_TOKENS:
            raise InputError(f"{len(self.tokens)} tokens are too many; give at most {MAX_TOKENS}.")
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
            raise InputError("No denoising step is chosen; choose at least one.")
        if self.resolutions is not None and not self.resolutions:
            raise InputError("No resolution is chosen; choose at least one.")

    def _check_method(self) -> None:
        method = method_named(self.method)
        if method.asks == "token" and (self.words or self.sentence.strip() or not self.tokens):
            raise InputError(f"{method.name} takes tokens, not words: choose a token and no words, or another method.")
        if isinstance(method, GocaMethod) and self.tokens:
            raise InputError(
                f"{method.name} compares words; for a token choose {GOCA_TOKEN.name} or {OVAM_TOKEN.name}."
            )
        if isinstance(method, GocaMethod) and (self.sentence.strip() or self.template != "{}"):
            raise InputError(
                f"{method.name} asks for words alone; leave the attribution sentence and the template out."
            )
        if (method.needs_goca or method.only is not None) and self.steps is not None:
            raise InputError(f"{method.name} looks at a step of its own; name no denoising steps.")
        if method.needs_goca and self.resolutions is not None:
            raise InputError(f"{method.name} weighs all layers; name no resolutions.")


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
