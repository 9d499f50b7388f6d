"""GoCA: weights for heads and layers from one forward pass, scores rescaled at each pixel, maps propagated
along the self-attention ("Making Training-Free Diffusion Segmentors Scale with the Generative Power", arXiv
2603.06178).

    with record(pipe) as recorder, record_goca(pipe) as goca_recorder:
        image = pipe("a cat on a meadow").images[0]
    maps = goca(goca_recorder.recordings[0], caption_words(pipe, "a cat on a meadow", ["cat", "meadow"]))

The hooks only read: the image is bit-identical to one made without them, and none is left afterwards.

The paper asks for the words of the caption, whose keys it has from the pass (`caption_words`). Its weights
are properties of the pass and not of the words. So they also serve, and this is an extension of OVAM's kind,
any other attribution: words that are not in the caption, or an optimised token, whose keys take the place of
the caption's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from .families import PixArt, StableDiffusionXL, family_of
from .family import Call, Family
from .heatmap import layer_keys, resize
from .pipeline import EMBEDDED
from .recorder import Branch, Hooked, LayerQueries, named
from .text import FUNCTION_WORDS, MAX_WORDS, Attribution, encode_padded, words_in_sentence

FAMILIES = (Family, StableDiffusionXL, PixArt)  # those whose blocks have both attentions, with a softmax each

NOISE = 0.1  # the paper's t = 100 of 1000 training timesteps
PAPER_GRID = 64  # attention grid of the paper's models, for which its blur is meant

# Layers of the reference affinity that `reference_layer`'s rule would not choose.
REFERENCES = {EMBEDDED: "up_blocks.2.attentions.1.transformer_blocks.0.attn2"}

# Words of a caption that name nothing in the picture; the second kind may name all of it.
PLACE_WORDS = frozenset("next against inside outside above below front back top side left right beneath around".split())
PICTURE_WORDS = frozenset("photograph photo picture image painting drawing illustration view scene".split())

# Attention values (float32) made at once, all heads together.
BLOCK_VALUES = {"cpu": 1 << 20, "other": 1 << 26}


@dataclass(frozen=True, eq=False)
class WeightedLayer:
    """One cross-attention layer of the pass.

    layer: its queries `[1, heads, n, d]` and the way to its keys. heads: float32 `[heads, n]`, one in sum
    over heads. weight: of the whole layer, one in sum over layers.
    """

    layer: LayerQueries
    heads: Tensor
    weight: float


@dataclass(frozen=True, eq=False)
class SelfLayer:
    """One self-attention layer of the pass.

    queries, keys: `[heads, n, d]`, n = height * width, in the model's dtype. scale: factor of their products.
    """

    name: str
    height: int
    width: int
    queries: Tensor
    keys: Tensor
    scale: float


@dataclass(frozen=True, eq=False)
class GocaRecording:
    """What GoCA needs of one forward pass over one image.

    height, width: size of the maps, the largest attention grid. finest: the self-attentions of that grid.
    timestep: the scheduler's. reference: the layer whose queries made the reference affinity. The keys come
    from the pipeline's own layers, as in `Recording`.
    """

    layers: tuple[WeightedLayer, ...]
    finest: tuple[SelfLayer, ...]
    timestep: int
    height: int
    width: int
    embed_dim: int
    reference: str

    @property
    def nbytes(self) -> int:
        """Bytes held: about 50 MB for Stable Diffusion 1.5 at 512 px in float16."""
        tensors = [t for x in self.layers for t in (x.layer.queries, x.heads)]
        tensors += [t for x in self.finest for t in (x.queries, x.keys)]
        return sum(x.numel() * x.element_size() for x in tensors)

    def to(self, device: torch.device | str) -> GocaRecording:
        """The same recording with its tensors on `device`. The model's layers stay where they are."""
        return replace(
            self,
            layers=tuple(
                replace(x, layer=replace(x.layer, queries=x.layer.queries.to(device)), heads=x.heads.to(device))
                for x in self.layers
            ),
            finest=tuple(replace(x, queries=x.queries.to(device), keys=x.keys.to(device)) for x in self.finest),
        )


@dataclass(frozen=True)
class Parts:
    """Which parts of GoCA are in use; the defaults are the paper's for Stable Diffusion.

    heads, layers: the automatic weights; without them plain means. rescale: divide by the sum over content
    tokens. blur: side of the Gaussian in pixels of the paper's grid of 64 x 64, taken to the recording's grid
    (`blur_size`); 0 leaves it out. propagations: products with the mean self-attention; 0 for none.
    """

    heads: bool = True
    layers: bool = True
    rescale: bool = True
    blur: int = 5
    propagations: int = 2


# ---------------------------------------------------------------------------------------- from a recording to maps


@torch.no_grad()
def goca(recording: GocaRecording, asked: Attribution | Sequence[Attribution], parts: Parts | None = None) -> Tensor:
    """All steps of GoCA: one map a label, float32 `[labels, recording.height, recording.width]`, from 0 to 1.

    asked: what is compared at each pixel, objects and background nouns alike; labels of all attributions in
    their order. The paper's: one attribution of the caption (`caption_words`). The extension: any other, such
    as `listed_words`. A label of several tokens has the mean of their rescaled scores; the tokens of all
    labels are the content tokens. Raises ValueError for nothing asked, for an embedding of another width, and
    for rescaling with one content token, which would be one everywhere.
    """
    asked = [asked] if isinstance(asked, Attribution) else list(asked)
    parts = parts or Parts()
    content = [_content(one) for one in asked]
    if parts.rescale and sum(map(len, content)) == 1:
        raise ValueError("GoCA compares words at each pixel: ask for two or more, such as an object and a background.")
    scores = [scores[rows] for scores, rows in zip(_scores(recording, asked, parts), content, strict=True)]
    if parts.rescale:
        scores = rescale(torch.cat(scores)).split([len(rows) for rows in content])
    maps = torch.stack(
        [label for one, rows, own in zip(asked, content, scores, strict=True) for label in one.means(own, rows)]
    )
    maps = min_max(gaussian_blur(maps, blur_size(parts.blur, max(maps.shape[1:]))))
    return propagate(maps, recording.finest, parts.propagations) if parts.propagations else maps


@torch.no_grad()
def attribute_weighted(
    recording: GocaRecording, asked: Attribution | Sequence[Attribution], parts: Parts | None = None
) -> Tensor:
    """OVAM's heatmaps under GoCA's weights: `heatmap.attribute` of this one pass, but heads and layers weighted.

    An extension of this project, for words and for optimised tokens. Returns float32 `[labels,
    recording.height, recording.width]` in [0, 1]: for each label the mean of its tokens' scores (steps 1 and
    2 alone).
    """
    asked = [asked] if isinstance(asked, Attribution) else list(asked)
    return torch.stack(
        [
            label
            for one, scores in zip(asked, _scores(recording, asked, parts or Parts()), strict=True)
            for label in one.means(scores)
        ]
    )


def _scores(recording: GocaRecording, asked: list[Attribution], parts: Parts) -> list[Tensor]:
    if not asked:
        raise ValueError("There is no word to attribute: give at least one.")
    return [token_scores(recording, one.embedding, parts) for one in asked]


def _content(one: Attribution) -> list[int]:
    """The rows that some label stands on."""
    return sorted({row for group in one.groups for row in group})


def token_scores(recording: GocaRecording, embedding: Tensor, parts: Parts | None = None) -> Tensor:
    """Steps 1 and 2 for each token of an attribution prompt `[L, E]`.

    Returns float32 `[L, recording.height, recording.width]`, at each pixel one in sum over tokens.
    """
    parts = parts or Parts()
    if embedding.ndim != 2 or embedding.shape[1] != recording.embed_dim or len(embedding) == 0:
        raise ValueError(
            f"The embedding has shape {list(embedding.shape)}, but this model takes [tokens, {recording.embed_dim}]."
        )
    maps = []
    for one in recording.layers:
        heads = one.heads if parts.heads else torch.full_like(one.heads, 1 / len(one.heads))
        own = layer_map(cross_attention(one.layer, embedding), heads)
        maps.append(rearrange(own, "l (h w) -> l h w", h=one.layer.height))
    weights = [x.weight if parts.layers else 1 / len(maps) for x in recording.layers]
    return aggregate(maps, weights, (recording.height, recording.width))


def caption_words(pipe: Any, caption: str, words: Sequence[str]) -> Attribution:
    """Words of the caption, as the pass itself has read it, padding included: what the paper asks for.

    Raises ValueError for a word that is not in the caption.
    """
    return replace(words_in_sentence(pipe, caption, words), embedding=encode_padded(pipe, caption))


def listed_words(pipe: Any, caption: str, words: Sequence[str]) -> Attribution:
    """Any words, in one attribution prompt of their own, "cat, meadow"; `caption` is not looked at.

    The extension to words that are not in the caption.
    """
    return words_in_sentence(pipe, ", ".join(words), words)


def background_words(caption: str, words: Sequence[str]) -> tuple[str, ...]:
    """The caption's content words that are not asked for, in lower case, each once: they stand for the background.

    Words such as "photograph" only where nothing else is left. Part of speech is not known: "red" counts as
    "sky" does. No more than may be asked for together with `words`.
    """
    asked = {part for word in words for part in _words(word)}
    left = [x for x in dict.fromkeys(_words(caption)) if x not in asked | FUNCTION_WORDS | PLACE_WORDS]
    return tuple([x for x in left if x not in PICTURE_WORDS] or left)[: max(0, MAX_WORDS - len(words))]


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+(?:[-'’][^\W_]+)*", text.lower())


# ----------------------------------------------------------------------------------------------- step 1: heads


def head_weights(hidden: Tensor, projections: Tensor) -> Tensor:
    """<O_n, O> / sum_m <O_m, O> at each pixel; O_n = A_n V_n W_n is what head n adds to the layer's output O.

    hidden: A_n V_n, `[heads, n, d]`. projections: W_n, the head's slice of the output projection, `[heads, d,
    C]`. Returns float32 `[heads, n]`, one in sum over heads, not clamped. Heads that add nothing in sum weigh
    the same.
    """
    hidden, projections = hidden.float(), projections.float()
    output = torch.einsum("hnd,hdc->nc", hidden, projections)
    # <A V W, O> = <A V, O W^T>: heads times fewer values than the O_n themselves.
    agreement = (hidden * torch.einsum("nc,hdc->hnd", output, projections)).sum(dim=-1)
    total = agreement.sum(dim=0)
    return torch.where(total > 0, agreement / total, 1 / len(hidden))


def cross_attention(layer: LayerQueries, embedding: Tensor) -> Tensor:
    """A_n (Eq. 3 of OVAM) of each head for an attribution prompt `[L, E]`: float32 `[heads, L, n]`."""
    queries = layer.queries[0].float()
    keys = layer_keys(layer, embedding.to(queries.device))
    return (keys @ rearrange(queries, "h n d -> h d n")).softmax(dim=-2)


def layer_map(attention: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of the heads' maps: `[heads, L, n]` and `[heads, n]` to `[L, n]`."""
    return torch.einsum("hln,hn->ln", attention, weights)


# ---------------------------------------------------------------------------------------------- step 2: layers


def reference_affinity(features: Tensor) -> Tensor:
    """R = softmax(F F^T / sqrt(dim)) over pixels: features `[n, dim]` to float32 `[n, n]`."""
    features = features.float()
    return (features @ features.T / features.shape[1] ** 0.5).softmax(dim=-1)


def resized_self_attention(layer: SelfLayer, size: tuple[int, int]) -> Tensor:
    """S: the head-averaged self-attention of a layer on the grid `size`, float32 `[m, m]`, m = height * width.

    Attended pixels (keys) are resized bilinearly, attending ones (queries) are the nearest; then each row
    sums to one again, this project's addition. Resizing alone makes it sum to about
    m / n, so that a layer counts for more the coarser its grid is, whatever it attends to: the embedded
    model's three 4 x 4 layers then had 65 % of the weight, and the maps cut out objects worse than plain means.
    """
    pixels = torch.arange(layer.height * layer.width, device=layer.queries.device)
    grid = rearrange(pixels, "(h w) -> 1 1 h w", h=layer.height)
    # The nearest rows are taken before the softmax, which then is made for them alone.
    nearest = F.interpolate(grid.float(), size=size, mode="nearest").flatten().long()
    blocks = (
        resize(rearrange(rows, "m (h w) -> m h w", h=layer.height), size)
        for rows in _self_attention(layer, layer.queries[:, nearest])
    )
    return torch.cat([_shares(rearrange(rows, "m h w -> (h w) m")).T for rows in blocks])


def layer_weights(affinity: Tensor, attentions: Iterable[Tensor]) -> Tensor:
    """sum(R * S) of each layer over the sum of them all.

    affinity: R, attentions: S of each layer, all `[m, m]`. Returns float32 `[layers]`, one in sum.
    """
    agreement = torch.stack([(affinity * attention).sum() for attention in attentions])
    return agreement / agreement.sum()


def aggregate(maps: Sequence[Tensor], weights: Sequence[float], size: tuple[int, int]) -> Tensor:
    """The layers' maps in weighted sum, clamped at 0, then at each pixel one in sum over tokens.

    maps: `[L, h, w]` each, bilinear to `size`. Where no token is left above 0 they share alike. Returns float32
    `[L, *size]`.
    """
    total = sum(weight * resize(own, size) for own, weight in zip(maps, weights, strict=True)).clamp(min=0)
    return _shares(total)


# -------------------------------------------------------------------- steps 3 and 4: rescaling, propagation, labels


def rescale(scores: Tensor) -> Tensor:
    """Scores of the content tokens `[content, H, W]` over their sum at each pixel.

    What the special tokens, padding and articles had drawn is so taken out.
    """
    return _shares(scores)


def blur_size(blur: int, side: int) -> int:
    """A blur meant for PAPER_GRID on a grid of another side: the nearest odd number, 1 for none."""
    return 2 * max(0, round((blur * side / PAPER_GRID - 1) / 2)) + 1


def gaussian_blur(maps: Tensor, size: int) -> Tensor:
    """A Gaussian of `size` x `size` pixels on maps `[L, H, W]`.

    size: odd; sigma is 0.3 ((size - 1) / 2 - 1) + 0.8, as OpenCV has it. Edge pixels are repeated beyond the edge. Raises ValueError for an even or negative size.
    """
    if size < 1 or size % 2 == 0:
        raise ValueError(f"The blur is {size} pixels wide: give an odd number, 1 for none.")
    sigma = 0.3 * ((size - 1) / 2 - 1) + 0.8
    at = torch.arange(size, device=maps.device, dtype=maps.dtype) - size // 2
    kernel = torch.exp(-(at**2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    padded = F.pad(maps[:, None], [size // 2] * 4, mode="replicate")
    across = F.conv2d(padded, rearrange(kernel, "k -> 1 1 1 k"))
    return F.conv2d(across, rearrange(kernel, "k -> 1 1 k 1"))[:, 0]


def min_max(maps: Tensor) -> Tensor:
    """Each map of `[L, H, W]` scaled to [0, 1]; a constant one becomes 0."""
    low, high = (getattr(maps, name)(dim=(-2, -1), keepdim=True) for name in ("amin", "amax"))
    return torch.where(high > low, (maps - low) / (high - low), 0)


def propagate(maps: Tensor, layers: Sequence[SelfLayer], times: int) -> Tensor:
    """Maps `[L, H, W]` multiplied `times` times by the mean self-attention (of layers and heads), then min-max.

    Made in blocks of rows, BLOCK_VALUES at a time: the `[n, n]` attention never exists.
    """
    values = rearrange(maps, "l h w -> (h w) l").float()
    for _ in range(times):
        parts = [torch.cat([rows @ values for rows in _self_attention(x, x.queries)]) for x in layers]
        values = sum(parts) / len(parts)
    return min_max(rearrange(values, "(h w) l -> l h w", h=maps.shape[1]))


def label_pixels(objects: Tensor, backgrounds: Tensor, offset: float = 0.0) -> Tensor:
    """The object that wins each pixel: int64 `[H, W]`, 0 for the background, else 1 + its place in `objects`.

    objects, backgrounds: maps `[labels, H, W]`. The background's score is the largest of its nouns' plus
    `offset`; without a noun it is `offset` alone. Ties go to the background, then to the earlier object.
    """
    nouns = backgrounds if len(backgrounds) else torch.zeros_like(objects[:1])
    background = nouns.amax(dim=0, keepdim=True) + offset
    return torch.cat([background, objects]).argmax(dim=0)


def _shares(scores: Tensor) -> Tensor:
    total = scores.sum(dim=0, keepdim=True)
    return torch.where(total > 0, scores / total, 1 / len(scores))


def _self_attention(layer: SelfLayer, queries: Tensor) -> Iterable[Tensor]:
    """Head-averaged self-attention of some queries `[heads, m, d]` of the layer: blocks of rows, float32 `[rows, n]`."""
    heads, n, _ = layer.keys.shape
    keys = rearrange(layer.keys.float() * layer.scale, "h n d -> h d n")
    budget = BLOCK_VALUES["cpu" if keys.device.type == "cpu" else "other"]
    for block in queries.split(max(1, budget // (heads * n)), dim=1):
        yield reduce((block.float() @ keys).softmax(dim=-1), "h m n -> m n", "mean")


# ------------------------------------------------------------------------------------------------- the recorder


def record_goca(
    pipe: Any,
    *,
    branch: Branch = "conditional",
    step: int | None = None,
    layers: Iterable[str] | None = None,
    reference: str | None = None,
) -> GocaRecorder:
    """Record one forward pass inside the `with` block; may stand beside `record` in the same `with`.

    branch: as in `record`; "all" for direct calls of the denoiser. step: number of the denoiser's call to
    keep, from 0. None: the one whose timestep is nearest to a tenth of the
        training's (the paper's t = 100 of 1000); the first call with branch "all".
    layers: names or parts of names of cross-attentions, as in `record`; the mid block only if a part says so.
    reference: name of the cross-attention whose queries make the reference affinity, a part of it is enough;
    None for
        `reference_layer`'s choice.

    Inside the block it holds, for that one call, the queries of the cross-attentions, what enters their
    output projections, and the queries and keys of the self-attentions beside them: four times `[images, n,
    channels]` a block in the model's dtype, about 92 MB an image for Stable Diffusion 1.5 at 512 px in
    float16. About half of it stays (`GocaRecording.nbytes`). The weights are made at the end of the block, in
    blocks of BLOCK_VALUES.

    Raises ValueError for a pipeline of no family in FAMILIES, for names that match no layer, and at the end
    of the block when the wanted call was never made.
    """
    return GocaRecorder(pipe, branch, step, layers, reference)


def reference_layer(pipe: Any, names: Sequence[str]) -> str:
    """The cross-attention, of all in `names`, whose queries make the reference affinity.

    The paper's: Stable Diffusion 1 (and 2, of the same build), the second of the 32 x 32 up block, which is
    the last but one up block with attention; SDXL, the first of the last such block (64 x 64); PixArt, the
    middle one, block 13 of 28. Other UNets have what corresponds to Stable Diffusion 1. The embedded model
    has the second of its last up block (16 x 16): what corresponds would be 8 x 8, where an object is a
    handful of pixels.
    """
    known = REFERENCES.get(getattr(pipe, "ovam_name", ""))
    if known in names:
        return known
    ups: dict[str, list[str]] = {}
    for name in names:
        if name.startswith("up_blocks."):
            ups.setdefault(name.split(".attentions.")[0], []).append(name)
    if not ups:
        return names[(len(names) - 1) // 2]
    blocks = list(ups.values())
    if isinstance(family_of(pipe), StableDiffusionXL):
        return blocks[-1][0]
    chosen = blocks[-2:][0]
    return chosen[min(1, len(chosen) - 1)]


@dataclass(frozen=True)
class _Block:
    """A transformer block: its cross-attention, by name, and its self-attention."""

    name: str
    cross: nn.Module
    own: nn.Module


class GocaRecorder(Hooked):
    """Context manager made by `record_goca`. `recordings` holds one GocaRecording an image, in the order of
    `pipe(...).images`.
    """

    def __init__(self, pipe, branch, step, layers, reference):
        super().__init__(pipe, branch)
        self._step = step
        found = _blocks(self._family)
        names = [x.name for x in found]
        self._kept = _matching(names, layers)
        self._reference = reference_layer(pipe, names) if reference is None else _matching(names, reference)[0]
        self._blocks = [x for x in found if x.name in self._kept or x.name == self._reference]
        self._reset()

    def _reset(self) -> None:
        self._number = -1  # of the denoiser's call going on
        self._call: Call | None = None  # what the kept one was given
        self._keeping = False
        self._wanted: float | None = None  # the timestep to keep, where no step was named
        self._images = slice(0)  # the wanted part of the batch
        self._caught: dict[tuple[str, str], Tensor] = {}

    def _attach(self, on: Callable[[Any], None]) -> None:
        on(self._family.denoiser.register_forward_pre_hook(self._on_call, with_kwargs=True))
        for block in self._blocks:
            on(block.cross.to_q.register_forward_hook(self._after(block.name, "queries")))
            on(block.cross.to_out[0].register_forward_pre_hook(self._before(block.name, "hidden")))
            on(block.own.to_q.register_forward_hook(self._after(block.name, "own queries")))
            on(block.own.to_k.register_forward_hook(self._after(block.name, "own keys")))

    # What the hooks do. None of them returns a value, so none changes what the model computes.

    def _before(self, name: str, what: str):
        return lambda module, inputs: self._keep(name, what, inputs[0])

    def _after(self, name: str, what: str):
        return lambda module, inputs, output: self._keep(name, what, output)

    def _keep(self, name: str, what: str, tensor: Tensor) -> None:
        if self._keeping:  # an own copy, else the view would keep the whole batch alive
            self._caught[name, what] = tensor.detach()[self._images].clone()

    def _on_call(self, denoiser, args, kwargs) -> None:
        self._number += 1
        call = self._family.call(args, kwargs)
        self._keeping = not self._caught and self._is_wanted(call)
        if self._keeping:
            self._call = call
            self._images = self._wanted_images(call.batch)

    def _is_wanted(self, call: Call) -> bool:
        if self._step is not None:
            return self._number == self._step
        if self._branch == "all":
            return self._number == 0
        if self._wanted is None:  # the run's own schedule is known from its first call on
            scheduler = self._pipe.scheduler
            goal = NOISE * scheduler.config.num_train_timesteps
            self._wanted = min(scheduler.timesteps.tolist(), key=lambda t: abs(t - goal))
        return float(torch.as_tensor(call.timestep).flatten()[0]) == self._wanted

    # From what was caught to recordings.

    @torch.no_grad()
    def _finish(self) -> list[GocaRecording]:
        if not self._caught:
            raise ValueError(
                f"Nothing was recorded for GoCA: the model was called {self._number + 1} times, and the wanted call was "
                "not among them; call the pipeline inside the `with` block, or name another step."
            )
        device = self._caught[self._reference, "queries"].device
        timesteps = torch.as_tensor(self._call.timestep).flatten().expand(self._call.batch)[self._images].tolist()
        with torch.autocast(device.type, enabled=False):
            projections = {x.name: _projections(x.cross, self._caught[x.name, "hidden"]) for x in self._blocks}
            return [self._recording(image, int(at), projections) for image, at in enumerate(timesteps)]

    def _recording(self, image: int, timestep: int, projections: dict[str, Tensor]) -> GocaRecording:
        features = self._caught[self._reference, "queries"][image]
        affinity, size = reference_affinity(features), self._family.grid(len(features), self._call)
        kept = [x for x in self._blocks if x.name in self._kept]
        own = [self._self_layer(x, image) for x in kept]
        weights = layer_weights(affinity, (resized_self_attention(x, size) for x in own)).tolist()
        height, width = max(((x.height, x.width) for x in own), key=lambda x: x[0] * x[1])
        return GocaRecording(
            layers=tuple(
                self._layer(block, image, projections[block.name], weight)
                for block, weight in zip(kept, weights, strict=True)
            ),
            finest=tuple(x for x in own if (x.height, x.width) == (height, width)),
            timestep=timestep,
            height=height,
            width=width,
            embed_dim=self._family.embed_dim,
            reference=self._reference,
        )

    def _layer(self, block: _Block, image: int, projections: Tensor, weight: float) -> WeightedLayer:
        projected = self._one(block.name, "queries", image)
        queries = self._family.queries(block.cross, projected, self._call)
        hidden = rearrange(self._one(block.name, "hidden", image)[0], "n (h d) -> h n d", h=block.cross.heads)
        grid = self._family.grid(projected.shape[1], self._call)
        scale = float(block.cross.scale)
        layer = LayerQueries(block.name, *grid, queries.contiguous(), self._family.keys(block.cross), scale)
        return WeightedLayer(layer, head_weights(hidden, projections), weight)

    def _self_layer(self, block: _Block, image: int) -> SelfLayer:
        projected, keys = (self._one(block.name, what, image) for what in ("own queries", "own keys"))
        return SelfLayer(
            block.name,
            *self._family.grid(projected.shape[1], self._call),
            self._family.queries(block.own, projected, self._call)[0].contiguous(),
            self._family.self_keys(block.own, keys, self._call)[0].contiguous(),
            float(block.own.scale),
        )

    def _one(self, name: str, what: str, image: int) -> Tensor:
        """`[1, n, channels]` in memory of its own, else one image would keep the batch alive."""
        return self._caught[name, what][image : image + 1].clone()


def _projections(attention: nn.Module, hidden: Tensor) -> Tensor:
    """The output projection's slice of each head, `[heads, d, C]`, without the bias.

    The module may be wrapped (LoRA, offloaded weights): what it does to unit vectors is its matrix.
    """
    project = attention.to_out[0]
    units = torch.eye(hidden.shape[-1], dtype=hidden.dtype, device=hidden.device)
    matrix = project(units) - project(torch.zeros_like(units[:1]))
    return rearrange(matrix, "(h d) c -> h d c", h=attention.heads)


def _blocks(family: Family) -> list[_Block]:
    """The transformer blocks that have a self-attention and a cross-attention, in the order of the denoiser's
    modules.
    """
    if type(family) not in FAMILIES:
        *names, last = (x.name for x in FAMILIES)
        raise ValueError(f"GoCA is not there for {family.name}: load {', '.join(names)} or {last}, or take OVAM.")
    cross, own = family.attentions()
    beside = {name.rpartition(".")[0]: module for name, module in own.items()}
    parents = {name: name.rpartition(".")[0] for name in cross}
    blocks = [_Block(name, module, beside[parents[name]]) for name, module in cross.items() if parents[name] in beside]
    if not blocks:
        raise ValueError("This model has no block with a self-attention and a cross-attention, which GoCA needs.")
    return blocks


def _matching(names: Sequence[str], parts: Iterable[str] | str | None) -> list[str]:
    """`named`, but at least one."""
    found = named(names, parts, str)
    if not found:
        wanted = ", ".join([parts] if isinstance(parts, str) else parts or ())
        raise ValueError(f"No layer matches {wanted}: choose among {', '.join(names)}.")
    return found
