"""Every method of the papers by name, and their combinations: from a picture's recording to heatmaps and masks.

DAAM, Attn2Mask and OVAM: section 4.1 and supplement A.3 of the OVAM paper. GoCA: attention/goca.py. All have one shape,
`Method`: `heatmaps` looks at the recording, `masks` cuts; METHODS lists them. A new method is a new class, or a new
set of numbers, and an entry in METHODS. One that needs files of its own (downstream/) is made by who uses it and given
in place of a name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from ovam_core.attention.affinity import Affinity, iseg, sharpened, spread
from ovam_core.attention.crf import densecrf_each
from ovam_core.attention.goca import GocaOptions, attribute_weighted, goca, label_pixels
from ovam_core.attention.heatmap import AttributionPrompt, attribute, resize, summed
from ovam_core.attention.mask import binary_masks, self_attention_map
from ovam_core.attention.outputs import concept_maps
from ovam_core.attention.recording import Recording
from ovam_core.checks import MAX_PROMPT, check_text
from ovam_core.errors import InputError
from ovam_core.models.presets import ModelDefaults, recommended_grids, recommended_steps
from ovam_core.models.registry import adapter_of
from ovam_core.picture import Picture
from ovam_core.query import (
    Query,
    attribute_words,
    background_words,
    caption_words,
    listed_words,
    parse_words,
    word_queries,
)
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
    `record_goca`; needs_features: the features of `record_features`; keeps: what `record` keeps on
    request. weighs_grids:
    whether it looks at all grids, whichever the model recommends. crf: whether a dense CRF follows. has_alpha:
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
    def keeps(self) -> frozenset[str]: ...
    @property
    def weighs_grids(self) -> bool: ...
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


def _as_they_are(maps: Tensor) -> Tensor:
    return maps


@dataclass(frozen=True)
class HeatmapMethod:
    """Masks from the heatmaps of a recording, each map cut for itself (Eq. 9).

    run_steps: denoising steps of the run, None for the model's own number. step: the one step used, None for all.
    tau, alpha: threshold (Eq. 9) and self-attention floor (Eq. 8; 1 leaves it out) for words; token_tau, token_alpha:
    for optimised tokens. grid_weights: (latents to a pixel of the grid, weight) of the grids whose maps are averaged, 1
    for the finest of a UNet (64 of 64), 2 for 32, ...; all maps alike where none of these was recorded. weighs_grids:
    whether they are taken where the model recommends other grids.
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
    grid_weights: tuple[tuple[int, float], ...] = ()
    weighs_grids: bool = False

    takes_tokens: ClassVar[bool] = True
    cuts_each: ClassVar[bool] = True
    needs_goca: ClassVar[bool] = False
    needs_features: ClassVar[bool] = False
    keeps: ClassVar[frozenset[str]] = frozenset()

    @property
    def has_alpha(self) -> bool:
        return self.alpha < 1

    def check(self, settings: SegmentSettings) -> None:
        if self.asks == "token" and (settings.words or settings.sentence.strip() or not settings.tokens):
            raise InputError(f"{self.name} takes tokens, not words: choose a token and no words, or another method.")
        if self.step is not None and settings.step_indices is not None:
            raise InputError(f"{self.name} looks at a step of its own; name no denoising steps.")
        if self.weighs_grids and settings.resolutions is not None:
            raise InputError(f"{self.name} weighs the grids itself; name no resolutions.")

    def check_words(self, pipe: Pipeline, caption: str, words: Sequence[str]) -> None:
        """Any word can be asked."""

    def words(self, pipe: Pipeline, settings: SegmentSettings) -> list[Query]:
        return word_queries(pipe, settings.words, settings.sentence, settings.template)

    def cut(self, query: Query, given: Cut, preset: ModelDefaults | None) -> Query:
        tau, alpha = _decided(self, query, given, preset)
        return replace(query, tau=tau, alpha=alpha)

    def heatmaps(self, pipe: Pipeline, picture: Picture, queries: Sequence[Query]) -> Tensor:
        return self._mean_maps(picture, queries)

    def _mean_maps(
        self, picture: Picture, queries: Sequence[Query], each: Callable[[Tensor], Tensor] = _as_they_are
    ) -> Tensor:
        """The mean map of each label, of the grids as they weigh. each: done to the maps of every grid before."""
        picture = self._looked_at(picture)
        weights = weights_of_grids(picture.recording, dict(self.grid_weights))
        if not weights:
            return attribute_queries(picture, queries)
        maps = (weight * each(attribute_queries(_of_grid(picture, grid), queries)) for grid, weight in weights.items())
        return summed(maps) / sum(weights.values())

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
        return densecrf_each(masks, np.asarray(picture.image.convert("RGB")), on_label)

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


def _unchanged(maps: Tensor, _matrix: Tensor) -> Tensor:
    return maps


def _over_sum(maps: Tensor) -> Tensor:
    return maps / maps.sum(dim=(1, 2), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


@dataclass(frozen=True)
class SpreadMethod(HeatmapMethod):
    """Maps spread along self-attention matrices, from 0 to 1 each, then cut at a share of the peak.

    refine: (maps `[L, h, w]`, the matrix as `prepare` made it) to maps of the same shape, from 0 to 1. matrix_weights:
    how much the maps along the matrix of each grid count, by its latents to a pixel; () for the finest grid alone,
    which also stands in where a recording has none of those. each: done to the maps of a grid before they are weighed.
    A token's own tau does not hold here: it is a share of another map's peak.
    """

    refine: Callable[[Tensor, Tensor], Tensor] = _unchanged
    prepare: Callable[[Tensor], Tensor] = Tensor.float
    matrix_weights: tuple[tuple[int, float], ...] = ()
    each: Callable[[Tensor], Tensor] = _as_they_are

    keeps: ClassVar[frozenset[str]] = frozenset({"matrix"})

    def cut(self, query: Query, given: Cut, preset: ModelDefaults | None) -> Query:
        tau, own = (given.token_tau, self.token_tau) if query.kind == "token" else (given.tau, self.tau)
        return replace(query, tau=own if tau is None else tau, alpha=1.0)

    def heatmaps(self, pipe: Pipeline, picture: Picture, queries: Sequence[Query]) -> Tensor:
        maps = self._mean_maps(picture, queries, self.each)
        found: dict[str, list[tuple[float, Affinity]]] = {}
        spread_out = []
        for query, rows in zip(queries, rows_of_labels(queries), strict=True):
            if query.branch not in found:
                affinities = self._affinities(picture.of_branch(query.branch))
                found[query.branch] = [(weight, self._prepared(one, maps.device)) for weight, one in affinities]
            spread_out.append(self._spread(maps[rows], found[query.branch]))
        return torch.cat(spread_out)

    def _prepared(self, affinity: Affinity, device: torch.device) -> Affinity:
        return replace(affinity, matrix=self.prepare(affinity.matrix.to(device)))

    def _spread(self, maps: Tensor, affinities: Sequence[tuple[float, Affinity]]) -> Tensor:
        """The weighted mean of the maps along each matrix, on the finest grid of those."""
        finest = max((one.height, one.width) for _, one in affinities)
        along = (
            weight * resize(self.refine(resize(maps, (one.height, one.width)), one.matrix), finest)
            for weight, one in affinities
        )
        return summed(along) / sum(weight for weight, _ in affinities)

    def _affinities(self, recording: Recording) -> list[tuple[float, Affinity]]:
        """Those that count, with their weights, the finest first."""
        if not recording.affinities:
            raise InputError(
                f"{self.name} needs the self-attention as a matrix, which was not recorded with this picture (67 MB "
                f"for a grid of 64 x 64): make it again with {self.name} chosen from the start, in Python with "
                'keep=["matrix"], or choose another method.'
            )
        by_grid = {max(one.height, one.width): one for one in recording.affinities}
        weights = _weights(recording, by_grid, dict(self.matrix_weights))
        return [(weight, by_grid[grid]) for grid, weight in weights.items()] or [(1.0, recording.affinities[0])]


def weights_of_grids(recording: Recording, weights: Mapping[int, float]) -> dict[int, float]:
    """The weight of each recorded grid, by its larger side, of those by the latents to a pixel of the grid."""
    return _weights(recording, recording.resolutions, weights)


def _weights(recording: Recording, grids: Iterable[int], weights: Mapping[int, float]) -> dict[int, float]:
    side = max(recording.height, recording.width)
    found = {grid: weights.get(round(side / grid), 0.0) for grid in grids}
    return {grid: weight for grid, weight in found.items() if weight > 0}


def _of_grid(picture: Picture, grid: int) -> Picture:
    others = {branch: one.select(resolutions=[grid]) for branch, one in picture.others.items()}
    return replace(picture, recording=picture.recording.select(resolutions=[grid]), others=others)


def looked_at(
    pipe: Pipeline,
    method: Method,
    recording: Recording,
    step_indices: Sequence[int] | None = None,
    resolutions: Sequence[int] | None = None,
) -> Recording:
    """The steps and grids of a recording that were named, else those that the model recommends, unless the method has
    its own.
    """
    used = recording.select(steps=step_indices, resolutions=resolutions)
    if resolutions is None and not method.weighs_grids:
        used = recommended_grids(pipe, used)
    if step_indices is None and method.step is None:
        used = recommended_steps(pipe, used)
    return used


# ------------------------------------------------------------------------------------ methods that compare words


@dataclass(frozen=True)
class GocaMethod:
    """Words compared with each other and with background nouns at each pixel; the largest score has the pixel.

    asking: (pipe, caption, words) to their attribution prompt. options: what is otherwise than the model's published
    settings (models/goca.py), None for nothing. offset: added to the
    background's score, the largest of its nouns'. tau: the background's score where there is no such noun.
    background: nouns of what is none of the words; None for the caption's other content words (`background_words`),
    among which a synonym of a word that is asked for would take its pixels: then name them.
    """

    name: str
    about: str
    asking: Callable[[Pipeline, str, Sequence[str]], AttributionPrompt]
    options: GocaOptions | None = None
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
    keeps: ClassVar[frozenset[str]] = frozenset()
    weighs_grids: ClassVar[bool] = False
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


@dataclass(frozen=True)
class ConceptMethod(GocaMethod):
    """Words compared as GoCA does, by what the pixels and they read in joint attention: attention/outputs.py.

    A word is one concept, of several tokens the mean of their embeddings, whatever `asking` says.
    """

    asking: Callable[[Pipeline, str, Sequence[str]], AttributionPrompt] = listed_words

    needs_goca: ClassVar[bool] = False
    keeps: ClassVar[frozenset[str]] = frozenset({"outputs"})

    def check(self, settings: SegmentSettings) -> None:
        if settings.tokens:
            raise InputError(f"{self.name} compares words; for a token choose {OVAM_TOKEN.name}.")
        if settings.sentence.strip() or settings.template != "{}":
            raise InputError(f"{self.name} asks for words alone; leave the attribution sentence and the template out.")

    def check_words(self, pipe: Pipeline, caption: str, words: Sequence[str]) -> None:
        if not adapter_of(pipe).output_names:
            raise InputError(
                f"{self.name} reads joint attention, which {adapter_of(pipe).name} has not: load a model of Stable "
                "Diffusion 3, Flux or Flux 2, or choose another method."
            )
        self._concepts(pipe, caption, words)

    def heatmaps(self, pipe: Pipeline, picture: Picture, queries: Sequence[Query]) -> Tensor:
        words = [label for query in queries for label in query.labels]
        adapter = adapter_of(pipe)
        return concept_maps(
            picture.of_branch(queries[0].branch),
            self._concepts(pipe, picture.caption, words),
            adapter.temperature,
        )

    def _concepts(self, pipe: Pipeline, caption: str, words: Sequence[str]) -> Tensor:
        """`[C, embed_dim]`: of the words, then of what stands for the background."""
        background = background_words(caption, words) if self.background is None else self.background
        if len(words) + len(background) < 2:
            raise InputError(
                f"{self.name} compares words at each pixel: ask for two or more, such as an object and a background."
            )
        prompts = attribute_words(pipe, [*words, *background])
        return torch.stack([row for prompt in prompts for row in prompt.means(prompt.embedding)])


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
# Grids as shares of Stable Diffusion's latents, 64 wide: 8, 16, 32 and 64 are 8, 4, 2 and 1 latents to a pixel.
ISEG = SpreadMethod(
    "iSeg",
    "Maps multiplied by a sharpened self-attention matrix, 8 times over: sharper edges, no dense CRF.",
    crf=False,
    # Of an only class its code's background has (1 - map)^2: the class wins above (3 - sqrt 5) / 2.
    tau=0.382,
    alpha=1.0,
    token_tau=0.382,
    token_alpha=1.0,
    refine=partial(iseg, rounds=8),
    prepare=partial(sharpened, entropy=0.015),
    # 0.7 and 0.3 of maps that are over their sums on their own grids; here they have been resized to 64 before.
    grid_weights=((4, 0.7 * 16), (2, 0.3 * 4)),
    each=_over_sum,
)
FA_SEG = SpreadMethod(
    "FA-Seg",
    "Grids weighted 0.15, 0.7, 0.15, 0 from coarse to fine, spread along each grid's squared self-attention matrix.",
    crf=False,
    tau=0.55,
    alpha=1.0,
    token_tau=0.55,
    token_alpha=1.0,
    refine=partial(spread, power=2),
    grid_weights=((8, 0.15), (4, 0.7), (2, 0.15)),
    matrix_weights=((8, 0.1), (4, 0.1), (2, 0.5), (1, 0.3)),
    weighs_grids=True,
)
DATASET_DIFFUSION = SpreadMethod(
    "Dataset Diffusion",
    "The maps of one coarse grid, spread along the fourth power of a finer grid's self-attention matrix.",
    crf=False,
    tau=0.55,
    alpha=1.0,
    token_tau=0.55,
    token_alpha=1.0,
    refine=partial(spread, power=4),
    grid_weights=((4, 1.0),),
    matrix_weights=((2, 1.0),),
    weighs_grids=True,
)
CONCEPT_ATTENTION = ConceptMethod(
    "ConceptAttention",
    "Words compared by what pixels and words read in joint attention: Stable Diffusion 3, Flux and Flux 2 alone.",
)
METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        DAAM,
        ATTN2MASK,
        OVAM,
        OVAM_TOKEN,
        GOCA,
        GOCA_ANY,
        OVAM_WEIGHTED,
        GOCA_TOKEN,
        ISEG,
        FA_SEG,
        DATASET_DIFFUSION,
        CONCEPT_ATTENTION,
    )
}


def method_named(name: str | Method) -> Method:
    """The method of this name, whatever its case; a method itself is that. Raises InputError that lists them all."""
    if not isinstance(name, str | type) and isinstance(name, Method):
        return name
    found = {plain_name(known): method for known, method in METHODS.items()}
    wanted = plain_name(str(name))
    for system, source in SYSTEMS.items():
        if wanted == plain_name(system) or wanted.endswith(f" + {plain_name(system)}"):
            raise InputError(
                f"{system} has trained modules, whose weights are yours to bring: its authors publish them at "
                f"{source}; give them with --weights, or method={system.replace(' ', '')}(weights) in Python."
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
