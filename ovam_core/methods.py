"""Every method of the papers by name, and their combinations: from a picture's recording to heatmaps and masks.

DAAM, Attn2Mask and OVAM: section 4.1 and supplement A.3 of the OVAM paper. GoCA: attention/goca.py. All have one shape,
`Method`: `heatmaps` looks at the recording, `masks` cuts; METHODS lists them. A new method is a new class, or a new
set of numbers, and an entry in METHODS. One that needs files of its own (downstream/) is made by who uses it and given
in place of a name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from ovam_core.attention.goca import GocaOptions, attribute_weighted, goca, label_pixels
from ovam_core.attention.heatmap import AttributionPrompt, attribute, resize
from ovam_core.attention.mask import binary_masks, densecrf, self_attention_map
from ovam_core.attention.recording import Recording
from ovam_core.checks import MAX_PROMPT, check_text
from ovam_core.errors import InputError
from ovam_core.models.presets import ModelDefaults
from ovam_core.picture import Picture
from ovam_core.query import Query, background_words, caption_words, listed_words, parse_words, word_queries
from ovam_core.settings import DEFAULT_METHOD, SYSTEMS, SegmentSettings, check_field

if TYPE_CHECKING:
    from ovam_core.models.adapter import Pipeline

Asks = Literal["words", "token"]
Size = tuple[int, int]  # (height, width)


@runtime_checkable
class Method(Protocol):
    """What OVAM.segment, the data sets and the benchmarks need of a method.

    name, about: for people, `about` one line. asks: words (and tokens beside them), or tokens alone. takes_tokens:
    whether a token can be asked. run_steps, step: steps of the run that the method is defined on, and the only one of
    it that it looks at; None for any, and for all. cuts_each: whether a mask follows from its own map, tau and alpha
    alone. needs_goca: whether the picture must bring the pass of
    `record_goca`; needs_features: the features of `record_features`. crf: whether a dense CRF follows. has_alpha:
    whether the self-attention map is used. tau, alpha, token_tau, token_alpha: as published.
    """

    @property
    def name(self) -> str: ...
    @property
    def about(self) -> str: ...
    @property
    def asks(self) -> Asks: ...
    @property
    def takes_tokens(self) -> bool: ...
    @property
    def cuts_each(self) -> bool: ...
    @property
    def run_steps(self) -> int | None: ...
    @property
    def step(self) -> int | None: ...
    @property
    def needs_goca(self) -> bool: ...
    @property
    def needs_features(self) -> bool: ...
    @property
    def crf(self) -> bool: ...
    @property
    def has_alpha(self) -> bool: ...

    def check(self, settings: SegmentSettings) -> None:
        """Raises InputError, one sentence, for settings that do not go with the method."""

    def check_words(self, pipe: Pipeline, caption: str, words: Sequence[str]) -> None:
        """Raises InputError for words that the method cannot ask a picture of this caption for."""

    def words(self, pipe: Pipeline, settings: SegmentSettings) -> list[Query]:
        """The words or the sentence of the settings, as this method asks for them."""

    def cut(self, query: Query, given: Cut, preset: ModelDefaults | None) -> Query:
        """The query with its tau and alpha decided: see `Cut`."""

    def heatmaps(self, pipe: Pipeline, picture: Picture, queries: Sequence[Query]) -> Tensor:
        """float32 `[labels, h, w]` in [0, 1] for the labels of all queries in their order; further rows may follow,
        of what the labels are compared with.
        """

    def masks(
        self,
        picture: Picture,
        maps: Tensor,
        queries: Sequence[Query],
        crf: bool = True,
        on_label: Callable[[], None] | None = None,
    ) -> np.ndarray:
        """Masks bool `[labels, H, W]` at the size of the picture's image, of `heatmaps`' answer to the same queries.

        on_label: called before each mask, if they are made one by one.
        """


@dataclass(frozen=True)
class Cut:
    """Thresholds that were given: they come before all others. None leaves the choice, in this order: for a token, its
    own; for a word, the model's preset, which stands for the share of 0.4 that most methods cut at, so that a method of
    another share keeps that; without a preset, the published one of the method, for tokens too.
    """

    tau: float | None = None
    alpha: float | None = None
    token_tau: float | None = None
    token_alpha: float | None = None


NOTHING_GIVEN = Cut()


# ------------------------------------------------------------------------------------ maps and cuts they share


def attribute_queries(picture: Picture, queries: Sequence[Query]) -> Tensor:
    """The mean map of each label (Eq. 5), float32 `[labels, h, w]`; the queries of a branch are read once for all."""
    found: dict[int, Tensor] = {}
    places = rows_of_labels(queries)
    for branch in dict.fromkeys(query.branch for query in queries):
        chosen = [n for n, query in enumerate(queries) if query.branch == branch]
        maps = attribute(picture.of_branch(branch), [queries[n].attribution for n in chosen])
        found.update(zip([row for n in chosen for row in places[n]], maps, strict=True))
    return torch.stack([found[row] for row in range(len(found))])


def weighted_maps(picture: Picture, maps: Tensor, queries: Sequence[Query], size: Size) -> Tensor:
    """A_alpha * D (Eq. 8) of maps `[labels, h, w]`, bilinear at `size`: float32 `[labels, H, W]`.

    GoCA's maps may lie on a coarser grid than A_alpha: they are brought to its grid first.
    """
    attention: dict[tuple[str, float], Tensor] = {}
    weighted = []
    for query, rows in zip(queries, rows_of_labels(queries), strict=True):
        key = (query.branch, query.alpha)
        if key not in attention:
            attention[key] = self_attention_map(picture.of_branch(query.branch), query.alpha).to(maps.device)
        received, own = attention[key], maps[rows].detach()
        own = own if own.shape[1:] == received.shape else resize(own, (received.shape[0], received.shape[1]))
        weighted.append(resize(own * received, size))
    return torch.cat(weighted)


def cut_maps(weighted: Tensor, queries: Sequence[Query]) -> Tensor:
    """Eq. 9 with each query's own tau: bool `[labels, H, W]`."""
    return torch.cat(
        [binary_masks(weighted[rows], query.tau) for query, rows in zip(queries, rows_of_labels(queries), strict=True)]
    )


def over_peak(weighted: Tensor) -> Tensor:
    """Maps `[labels, H, W]` over their own maxima: by these, overlapping masks are told apart in one label map."""
    return weighted / weighted.amax(dim=(1, 2), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def rows_of_labels(queries: Sequence[Query]) -> list[list[int]]:
    """The rows of each query's labels."""
    rows, first = [], 0
    for query in queries:
        rows.append(list(range(first, first + len(query.labels))))
        first += len(query.labels)
    return rows


def _image_size(picture: Picture) -> Size:
    return picture.image.height, picture.image.width


# ------------------------------------------------------------------------------------ methods that cut each map


@dataclass(frozen=True)
class HeatmapMethod:
    """Masks from the heatmaps of a recording, each map cut for itself (Eq. 9).

    run_steps: denoising steps of the run, None for the model's own number. step: the one step used, None for all.
    tau, alpha: threshold (Eq. 9) and self-attention floor (Eq. 8; 1 leaves it out) for words; token_tau, token_alpha:
    for optimised tokens.
    """

    name: str
    about: str
    run_steps: int | None = None
    step: int | None = None
    crf: bool = True
    tau: float = 0.4
    alpha: float = 0.85
    token_tau: float = 0.8
    token_alpha: float = 0.95
    asks: Asks = "words"

    takes_tokens: ClassVar[bool] = True
    cuts_each: ClassVar[bool] = True
    needs_goca: ClassVar[bool] = False
    needs_features: ClassVar[bool] = False

    @property
    def has_alpha(self) -> bool:
        return self.alpha < 1

    def check(self, settings: SegmentSettings) -> None:
        if self.asks == "token" and (settings.words or settings.sentence.strip() or not settings.tokens):
            raise InputError(f"{self.name} takes tokens, not words: choose a token and no words, or another method.")
        if self.step is not None and settings.step_indices is not None:
            raise InputError(f"{self.name} looks at a step of its own; name no denoising steps.")

    def check_words(self, pipe: Pipeline, caption: str, words: Sequence[str]) -> None:
        """Any word can be asked."""

    def words(self, pipe: Pipeline, settings: SegmentSettings) -> list[Query]:
        return word_queries(pipe, settings.words, settings.sentence, settings.template)

    def cut(self, query: Query, given: Cut, preset: ModelDefaults | None) -> Query:
        tau, alpha = _decided(self, query, given, preset)
        return replace(query, tau=tau, alpha=alpha)

    def heatmaps(self, pipe: Pipeline, picture: Picture, queries: Sequence[Query]) -> Tensor:
        return attribute_queries(self._looked_at(picture), queries)

    def masks(
        self,
        picture: Picture,
        maps: Tensor,
        queries: Sequence[Query],
        crf: bool = True,
        on_label: Callable[[], None] | None = None,
    ) -> np.ndarray:
        weighted = weighted_maps(self._looked_at(picture), maps, queries, _image_size(picture))
        masks = cut_maps(weighted, queries).cpu().numpy()
        if not (crf and self.crf):
            return masks
        pixels = np.asarray(picture.image.convert("RGB"))
        refined = []
        for mask in masks:
            if on_label is not None:
                on_label()
            refined.append(densecrf(mask, pixels))
        return np.stack(refined)

    def _looked_at(self, picture: Picture) -> Picture:
        """The picture with the steps that the method looks at, of each half of the guided batch."""
        others = {branch: self.select(one) for branch, one in picture.others.items()}
        return replace(picture, recording=self.select(picture.recording), others=others)

    def select(self, recording: Recording) -> Recording:
        """The steps of a recording that the method looks at."""
        return recording if self.step is None else recording.select(steps=[self.step])


def _decided(method: HeatmapMethod, query: Query, given: Cut, preset: ModelDefaults | None) -> tuple[float, float]:
    """(tau, alpha) of a query, in the order that `Cut` says; the one place where it is decided."""
    if query.kind == "token":
        own = (method.token_tau, method.token_alpha) if preset is None else (query.tau, query.alpha)
        tau, alpha, floor = given.token_tau, given.token_alpha, method.token_alpha
    else:
        tau_of_model = method.tau if preset is None or method.tau != OVAM.tau else preset.tau
        own = (tau_of_model, method.alpha if preset is None else preset.alpha)
        tau, alpha, floor = given.tau, given.alpha, method.alpha
    return own[0] if tau is None else tau, 1.0 if floor == 1 else (own[1] if alpha is None else alpha)


@dataclass(frozen=True)
class WeightedMethod(HeatmapMethod):
    """The same with GoCA's weights for heads and layers, from the one pass that they are made of: this project's
    extension.
    """

    needs_goca: ClassVar[bool] = True

    def check(self, settings: SegmentSettings) -> None:
        super().check(settings)
        _check_one_pass(self.name, settings)

    def heatmaps(self, pipe: Pipeline, picture: Picture, queries: Sequence[Query]) -> Tensor:
        return attribute_weighted(_pass_of(self.name, picture), [query.attribution for query in queries])


# ------------------------------------------------------------------------------------ methods that compare words


@dataclass(frozen=True)
class GocaMethod:
    """Words compared with each other and with background nouns at each pixel; the largest score has the pixel.

    asking: (pipe, caption, words) to their attribution prompt. options: the steps of GoCA in use. offset: added to the
    background's score, the largest of its nouns'. tau: the background's score where there is no such noun.
    background: nouns of what is none of the words; None for the caption's other content words (`background_words`),
    among which a synonym of a word that is asked for would take its pixels: then name them.
    """

    name: str
    about: str
    asking: Callable[[Pipeline, str, Sequence[str]], AttributionPrompt]
    options: GocaOptions = field(default_factory=GocaOptions)
    offset: float = 0.0
    tau: float = 0.4
    background: tuple[str, ...] | None = None

    run_steps: ClassVar[int | None] = None
    step: ClassVar[int | None] = None
    crf: ClassVar[bool] = False
    asks: ClassVar[Asks] = "words"
    takes_tokens: ClassVar[bool] = False
    cuts_each: ClassVar[bool] = False
    needs_goca: ClassVar[bool] = True
    needs_features: ClassVar[bool] = False
    has_alpha: ClassVar[bool] = False

    def check(self, settings: SegmentSettings) -> None:
        if settings.tokens:
            raise InputError(f"{self.name} compares words; for a token choose {GOCA_TOKEN.name} or {OVAM_TOKEN.name}.")
        if settings.sentence.strip() or settings.template != "{}":
            raise InputError(f"{self.name} asks for words alone; leave the attribution sentence and the template out.")
        _check_one_pass(self.name, settings)

    def check_words(self, pipe: Pipeline, caption: str, words: Sequence[str]) -> None:
        try:
            self.asking(pipe, caption, words)
        except InputError as error:
            raise InputError(f"{self.name} cannot be asked this: {error}") from None

    def words(self, pipe: Pipeline, settings: SegmentSettings) -> list[Query]:
        return [Query((word,), None) for word in settings.words]

    def cut(self, query: Query, given: Cut, preset: ModelDefaults | None) -> Query:
        own = self.tau if preset is None or self.tau != OVAM.tau else preset.tau
        return replace(query, tau=own if given.tau is None else given.tau)

    def heatmaps(self, pipe: Pipeline, picture: Picture, queries: Sequence[Query]) -> Tensor:
        if any(query.kind == "token" for query in queries):
            raise InputError(f"{self.name} compares words; for a token choose {GOCA_TOKEN.name} or {OVAM_TOKEN.name}.")
        recorded = _pass_of(self.name, picture)
        words = [label for query in queries for label in query.labels]
        background = background_words(picture.caption, words) if self.background is None else self.background
        prompt = self.asking(pipe, picture.caption, [*words, *background])
        return goca(recorded, prompt, self.options)

    def masks(
        self,
        picture: Picture,
        maps: Tensor,
        queries: Sequence[Query],
        crf: bool = True,
        on_label: Callable[[], None] | None = None,
    ) -> np.ndarray:
        words = sum(len(query.labels) for query in queries)
        full = resize(maps, _image_size(picture))
        offset = self.offset if len(maps) > words else queries[0].tau
        pixels = label_pixels(full[:words], full[words:], offset)
        return torch.stack([pixels == number for number in range(1, words + 1)]).cpu().numpy()


def _check_one_pass(name: str, settings: SegmentSettings) -> None:
    if settings.step_indices is not None:
        raise InputError(f"{name} looks at a step of its own; name no denoising steps.")
    if settings.resolutions is not None:
        raise InputError(f"{name} weighs all layers; name no resolutions.")


def _pass_of(name: str, picture: Picture):
    if picture.goca is None:
        raise InputError(f"{name} needs a pass that was not recorded with this image; choose another method.")
    return picture.goca


# ------------------------------------------------------------------------------------ the list


DAAM = HeatmapMethod(
    "DAAM",
    "The mean of all attention maps of a word, cut at a share of its peak.",
    crf=False,
    alpha=1.0,
    token_alpha=1.0,
)
ATTN2MASK = HeatmapMethod(
    "Attn2Mask",
    "The maps of step 50 of a run of 100 steps alone, cut, then refined by a dense CRF.",
    run_steps=100,
    step=50,
    tau=0.5,
    alpha=1.0,
    token_alpha=1.0,
)
OVAM = HeatmapMethod(
    "OVAM", "The mean of all maps, times the self-attention a pixel receives, cut, then refined by a dense CRF."
)
OVAM_TOKEN = HeatmapMethod(
    "OVAM + token", "OVAM with an embedding that was learned from a mask in place of the word.", asks="token"
)
GOCA = GocaMethod(
    "GoCA",
    "Words of the prompt, compared at each pixel: weighted heads and layers, spread along the self-attention.",
    caption_words,
)
GOCA_ANY = GocaMethod(
    "GoCA, any word",
    "GoCA for any word: what is compared is read as a list of its own. An extension of the paper.",
    listed_words,
)
OVAM_WEIGHTED = WeightedMethod(
    "OVAM, GoCA's weights",
    "OVAM on one pass, with GoCA's weights of heads and layers for the plain mean. Extends both papers.",
)
GOCA_TOKEN = WeightedMethod(
    "GoCA + token",
    "A learned embedding in place of the word, under GoCA's weights, on one pass. Extends both papers.",
    asks="token",
)
METHODS: dict[str, Method] = {
    method.name: method for method in (DAAM, ATTN2MASK, OVAM, OVAM_TOKEN, GOCA, GOCA_ANY, OVAM_WEIGHTED, GOCA_TOKEN)
}


def method_named(name: str | Method) -> Method:
    """The method of this name, whatever its case; a method itself is that. Raises InputError that lists them all."""
    if not isinstance(name, str | type) and isinstance(name, Method):
        return name
    found = {plain_name(known): method for known, method in METHODS.items()}
    wanted = plain_name(str(name))
    for system, source in SYSTEMS.items():
        if wanted == plain_name(system):
            raise InputError(
                f"{system} has trained modules, whose weights are yours to bring: its authors publish them at "
                f"{source}; give the file with --weights, or method={system.replace(' ', '')}(file) in Python."
            )
    if wanted not in found:
        raise InputError(f"There is no method '{str(name)[:40]}'; choose among {'; '.join(METHODS)}.")
    return found[wanted]


def plain_name(name: str) -> str:
    """A method's name as names are compared: "grounded-diffusion" is "Grounded Diffusion"."""
    return name.lower().replace("-", " ")


def settings_of_text(words: str = "", sentence: str = "", **rest: Any) -> SegmentSettings:
    """What people type, comma separated words, a sentence, or both, as settings; rest: further fields of them.

    Raises InputError for what cannot be read, and without words, sentence, token or a method that takes tokens alone.
    """
    check_text("The list of words", words, MAX_PROMPT)
    check_field(SegmentSettings, "sentence", sentence)
    sentence = " ".join(sentence.split())
    by_token = rest.get("tokens") or method_named(rest.get("method", DEFAULT_METHOD)).asks == "token"
    parsed = () if (sentence or by_token) and not words.strip() else tuple(parse_words(words))
    return SegmentSettings(words=parsed, sentence=sentence, **rest)


def check_settings(settings: SegmentSettings) -> None:
    """Raises InputError, one sentence, for settings that no recording could answer, or not by their method."""
    method_named(settings.method).check(settings)
    settings.validate()
