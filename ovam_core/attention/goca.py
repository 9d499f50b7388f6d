"""GoCA's maths: one pass's attention to one map a label (arXiv 2603.06178).

Heads weigh by what they add to their layer's output (step 1), layers by how their self-attention agrees with a
reference (step 2), scores are rescaled at each pixel (step 3), and maps are propagated along the self-attention
(step 4). What is recorded of the pass: hooks/goca_recorder.py; the settings of each model: models/goca.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor

from ovam_core.attention.heatmap import (
    AttributionPrompt,
    check_embedding,
    check_finite,
    check_layer_weights,
    check_stream_weights,
    layer_keys,
    resize,
    summed,
)
from ovam_core.attention.reading import Reading, check_reading
from ovam_core.attention.recording import LayerQueries, named
from ovam_core.attention.text_stream import TextStream
from ovam_core.errors import InputError

PAPER_GRID = 64  # attention grid of the paper's models, for which its blur is meant
# Attention values (float32) made at once, all heads together.
ATTENTION_BLOCK = {"cpu": 1 << 20, "other": 1 << 26}


@dataclass(frozen=True)
class GocaOptions:
    """How GoCA makes maps of a pass. None: as the model's published settings have it (`GocaRecording.options`).

    heads, layers: the automatic weights; without them plain means. rescale: divide by the sum over content tokens.
    blur: side of the Gaussian in pixels; 0 leaves it out. propagations: products with the mean self-attention; 0 for
    none.
    names: names or parts of names of the layers that count. propagation: of the self-attentions that maps are
    propagated along. even_rows: rows of S sum to one before they are compared (`even_rows`). scaled_blur: the blur is
    meant for a grid of 64 x 64 and taken to the recording's (`blur_size`). The last two are this project's additions,
    off in the settings that are published.
    """

    heads: bool | None = None
    layers: bool | None = None
    rescale: bool | None = None
    blur: int | None = None
    propagations: int | None = None
    names: tuple[str, ...] | None = None
    propagation: tuple[str, ...] | None = None
    even_rows: bool | None = None
    scaled_blur: bool | None = None

    def over(self, others: GocaOptions) -> GocaOptions:
        """These, where they are given, and else the others."""
        own = {x.name: getattr(self, x.name) for x in fields(self)}
        return replace(others, **{name: value for name, value in own.items() if value is not None})


PUBLISHED = GocaOptions(True, True, True, 5, 2, even_rows=False, scaled_blur=False)  # of Stable Diffusion 1.5
OURS = replace(PUBLISHED, even_rows=True, scaled_blur=True)  # for models of another build, and before version 2.3


@dataclass(frozen=True, eq=False)
class WeightedLayer:
    """One cross-attention layer, or joint attention, of the pass.

    layer: its queries `[1, heads, n, d]` and the way to its keys. heads: float32 `[heads, n]`, one in sum over heads;
    None in joint attention, whose heads are not weighed. weight: of the whole layer, one in sum over layers, where rows
    of S sum to one; agreement: sum(R * S) without that, None in recordings of before version 2.3. others: float32
    `[heads, n]`, the log of what the image's keys have in the softmax; None where it is over the text alone.
    """

    layer: LayerQueries
    heads: Tensor | None
    weight: float
    agreement: float | None = None
    others: Tensor | None = None


@dataclass(frozen=True, eq=False)
class SelfLayer:
    """One self-attention layer of the pass.

    queries, keys: `[heads, n, d]`, n = height * width, in the model's dtype. scale: factor of their products.
    others: float32 `[heads, n]`, the log of what the text's keys have in a joint softmax: rows are then below one in
    sum. linear: relu(q) . relu(k) over its sum, in place of a softmax (Sana).
    """

    name: str
    height: int
    width: int
    queries: Tensor
    keys: Tensor
    scale: float
    others: Tensor | None = None
    linear: bool = False


@dataclass(frozen=True, eq=False)
class GocaRecording:
    """What GoCA needs of one forward pass over one image.

    height, width: size of the maps, the largest attention grid. finest: self-attentions of that grid, those that maps
    are propagated along. timestep: the scheduler's. reference: the layer whose features made the reference affinity.
    The keys come from the pipeline's own layers, `stream` and `reading` are, as in `Recording`. options: of the model,
    none of them None but the names.
    """

    layers: tuple[WeightedLayer, ...]
    finest: tuple[SelfLayer, ...]
    timestep: int
    height: int
    width: int
    embed_dim: int
    reference: str
    reading: Reading | None = None
    options: GocaOptions = OURS
    stream: TextStream | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held: about 50 MB for Stable Diffusion 1.5 at 512 px in float16, 4.3 GB for Flux at 1024."""
        tensors = [t for x in self.layers for t in (x.layer.queries, x.heads, x.others)]
        tensors += [t for x in self.finest for t in (x.queries, x.keys, x.others)]
        held = sum(x.nbytes for x in tensors if x is not None)
        return held if self.stream is None else held + self.stream.nbytes

    def to(self, device: torch.device | str) -> GocaRecording:
        """The same recording with its tensors on `device`. The model's layers stay where they are."""

        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        return replace(
            self,
            layers=tuple(
                replace(
                    x,
                    layer=replace(x.layer, queries=x.layer.queries.to(device)),
                    heads=moved(x.heads),
                    others=moved(x.others),
                )
                for x in self.layers
            ),
            finest=tuple(
                replace(x, queries=x.queries.to(device), keys=x.keys.to(device), others=moved(x.others))
                for x in self.finest
            ),
            stream=None if self.stream is None else self.stream.each(lambda x: x.to(device)),
        )

    def detached(self) -> GocaRecording:
        """As `Recording.detached`."""
        host = self.to("cpu")
        stream = None if host.stream is None else host.stream.detached()
        return replace(host, layers=tuple(replace(x, layer=x.layer.detached()) for x in host.layers), stream=stream)


@torch.no_grad()
def goca(
    recording: GocaRecording,
    prompts: AttributionPrompt | Sequence[AttributionPrompt],
    options: GocaOptions | None = None,
) -> Tensor:
    """All steps of GoCA: one map a label, float32 `[labels, recording.height, recording.width]`, from 0 to 1.

    prompts: what is compared at each pixel, objects and background nouns alike; labels of all prompts in
    their order. The paper's: one prompt of the caption (`caption_words`). The extension: any other, such
    as `listed_words`. A label of several tokens has the mean of their rescaled scores; the tokens of all
    labels are the content tokens. Raises InputError for no prompt, for an embedding of another width, for options
    that the pass was not recorded for, and for rescaling with one content token, which would be one everywhere.
    """
    prompts = [prompts] if isinstance(prompts, AttributionPrompt) else list(prompts)
    options = _settled(recording, options)
    content = [_content(prompt) for prompt in prompts]
    if options.rescale and sum(map(len, content)) == 1:
        raise InputError("GoCA compares words at each pixel: ask for two or more, such as an object and a background.")
    scores = [scores[rows] for scores, rows in zip(_scores(recording, prompts, options), content, strict=True)]
    if options.rescale:
        scores = list(rescale(torch.cat(scores)).split([len(rows) for rows in content]))
    maps = torch.stack(
        [
            label
            for prompt, rows, prompt_scores in zip(prompts, content, scores, strict=True)
            for label in prompt.means(prompt_scores, rows)
        ]
    )
    blur = options.blur or 1
    maps = min_max(gaussian_blur(maps, blur_size(blur, max(maps.shape[1:])) if options.scaled_blur else blur))
    if not options.propagations:
        return maps
    return propagate(maps, _chosen(recording.finest, options.propagation, lambda x: x.name), options.propagations)


@torch.no_grad()
def attribute_weighted(
    recording: GocaRecording,
    prompts: AttributionPrompt | Sequence[AttributionPrompt],
    options: GocaOptions | None = None,
) -> Tensor:
    """OVAM's heatmaps under GoCA's weights: `heatmap.attribute` of this one pass, but heads and layers weighted.

    An extension of this project, for words and for optimised tokens. Returns float32 `[labels,
    recording.height, recording.width]` in [0, 1]: for each label the mean of its tokens' scores (steps 1 and
    2 alone).
    """
    prompts = [prompts] if isinstance(prompts, AttributionPrompt) else list(prompts)
    scores = _scores(recording, prompts, _settled(recording, options))
    return torch.stack(
        [label for prompt, prompt_scores in zip(prompts, scores, strict=True) for label in prompt.means(prompt_scores)]
    )


def _settled(recording: GocaRecording, options: GocaOptions | None) -> GocaOptions:
    """The options with those of the model for what is not given."""
    return recording.options if options is None else options.over(recording.options)


def _chosen(layers: Sequence[Any], parts: tuple[str, ...] | None, name_of: Callable[[Any], str]) -> list[Any]:
    """Those that are named. Raises InputError where none is."""
    chosen = list(layers) if parts is None else named(layers, parts, name_of)
    if not chosen:
        there = ", ".join(map(name_of, layers))
        raise InputError(f"This pass has none of the layers {', '.join(parts or ())}: choose among {there}.")
    return chosen


def _scores(recording: GocaRecording, prompts: list[AttributionPrompt], options: GocaOptions) -> list[Tensor]:
    """`token_scores` of each prompt."""
    if not prompts:
        raise InputError("There is no word to attribute: give at least one.")
    check_reading(recording.reading, [x.reading for x in prompts])
    check_layer_weights((x.layer for x in recording.layers), recording.embed_dim)
    check_stream_weights(recording.stream, recording.embed_dim)
    scores = [token_scores(recording, prompt.embedding, options) for prompt in prompts]
    for one in scores:
        check_finite(one)
    return scores


def _content(prompt: AttributionPrompt) -> list[int]:
    """The rows that some label stands on."""
    return sorted({row for group in prompt.groups for row in group})


def token_scores(recording: GocaRecording, embedding: Tensor, options: GocaOptions | None = None) -> Tensor:
    """Steps 1 and 2 for each token of an attribution prompt `[L, E]`.

    Returns float32 `[L, recording.height, recording.width]`, at each pixel one in sum over tokens.
    """
    options = _settled(recording, options)
    check_embedding(embedding, recording.embed_dim)
    layers: list[WeightedLayer] = _chosen(recording.layers, options.names, lambda x: x.layer.name)
    maps = [
        rearrange(_map_of(one, keys, bool(options.heads)), "l (h w) -> l h w", h=one.layer.height)
        for one, keys in zip(layers, _keys(recording, layers, embedding), strict=True)
    ]
    return aggregate(maps, _weights_of(layers, options), (recording.height, recording.width))


def _weights_of(layers: Sequence[WeightedLayer], options: GocaOptions) -> list[float]:
    """Of each layer, one in sum."""
    if not options.layers:
        return [1 / len(layers)] * len(layers)
    own = [x.weight if options.even_rows or x.agreement is None else x.agreement for x in layers]
    return [weight / sum(own) for weight in own]


def _keys(recording: GocaRecording, layers: Sequence[WeightedLayer], embedding: Tensor) -> Iterator[Tensor]:
    """Each layer's keys of an embedding `[L, E]`: float32 `[heads, L, d]`, times the softmax's scale."""
    device = recording.layers[0].layer.queries.device
    embedding = embedding.to(device)
    if recording.stream is None:
        yield from (layer_keys(x.layer, embedding) for x in layers)
        return
    names = [x.layer.name for x in layers]
    for one, keys in zip(layers, recording.stream.keys(embedding, [len(embedding)], names), strict=True):
        yield keys[0].to(device, torch.float32) * one.layer.scale


def _map_of(weighted: WeightedLayer, keys: Tensor, by_heads: bool) -> Tensor:
    """Step 1 of one layer, `[L, n]`, a block of pixels at a time."""
    queries = weighted.layer.queries[0]
    heads, n, _ = queries.shape
    weights = torch.full((heads, n), 1 / heads, device=queries.device)
    if by_heads:
        if weighted.heads is None:
            raise InputError("The heads of a joint attention are not weighed: leave heads out of the options.")
        weights = weighted.heads
    budget = ATTENTION_BLOCK["cpu" if keys.device.type == "cpu" else "other"]
    size = max(64, budget // (heads * keys.shape[1]))
    maps = []
    for start in range(0, n, size):
        part = slice(start, start + size)
        others = None if weighted.others is None else weighted.others[:, part]
        maps.append(layer_map(cross_attention(queries[:, part], keys, others), weights[:, part]))
    return torch.cat(maps, dim=1)


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


def cross_attention(queries: Tensor, keys: Tensor, others: Tensor | None = None) -> Tensor:
    """A_n (Eq. 3 of OVAM) of each head, float32 `[heads, L, n]`: queries `[heads, n, d]`, scaled keys `[heads, L, d]`.

    others: the log of what else is in the softmax `[heads, n]`: the part of the L tokens is then below one in sum.
    """
    products = keys @ rearrange(queries.float(), "h n d -> h d n")
    if others is None:
        return products.softmax(dim=-2)
    return (products - torch.logaddexp(products.logsumexp(dim=-2), others)[:, None]).exp()


def log_mass(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """The log of the sum of exponentials of each query's products with all keys, float32 `[heads, n]`.

    queries `[heads, n, d]`, keys `[heads, m, d]`; in blocks of ATTENTION_BLOCK.
    """
    scaled = rearrange(keys.float() * scale, "h m d -> h d m")
    budget = ATTENTION_BLOCK["cpu" if scaled.device.type == "cpu" else "other"]
    blocks = queries.split(max(1, budget // (len(keys) * keys.shape[1])), dim=1)
    return torch.cat([(block.float() @ scaled).logsumexp(dim=-1) for block in blocks], dim=1)


def layer_map(attention: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of the heads' maps: `[heads, L, n]` and `[heads, n]` to `[L, n]`."""
    return torch.einsum("hln,hn->ln", attention, weights)


def reference_affinity(features: Tensor) -> Tensor:
    """R = softmax(F F^T / sqrt(dim)) over pixels: features `[n, dim]` to float32 `[n, n]`."""
    features = features.float()
    return (features @ features.T / features.shape[1] ** 0.5).softmax(dim=-1)


def resized_self_attention(layer: SelfLayer, size: tuple[int, int]) -> Tensor:
    """S: the head-averaged self-attention of a layer on the grid `size`, float32 `[m, m]`, m = height * width.

    Attended pixels (keys) are resized bilinearly, attending ones (queries) are the nearest.
    """
    pixels = torch.arange(layer.height * layer.width, device=layer.queries.device)
    grid = rearrange(pixels, "(h w) -> 1 1 h w", h=layer.height)
    # The nearest rows are taken before the softmax, which then is made for them alone.
    nearest = F.interpolate(grid.float(), size=size, mode="nearest").flatten().long()
    blocks = (
        resize(rearrange(rows, "m (h w) -> m h w", h=layer.height), size)
        for rows in self_attention_rows(layer, nearest)
    )
    return torch.cat([rearrange(rows, "m h w -> m (h w)") for rows in blocks])


def even_rows(attention: Tensor) -> Tensor:
    """S `[m, m]` with rows that sum to one, this project's addition.

    Resizing from n to m pixels makes them sum to about m / n, so that a layer counts for more the coarser its grid is,
    whatever it attends to: the embedded model's three 4 x 4 layers then had 65 % of the weight, and the maps cut out
    objects worse than plain means.
    """
    return _shares(attention.T).T


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
    weighted = summed(weight * resize(layer, size) for layer, weight in zip(maps, weights, strict=True))
    return _shares(weighted.clamp(min=0))


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

    size: odd; sigma is 0.3 ((size - 1) / 2 - 1) + 0.8, as OpenCV has it. Edge pixels are repeated beyond the edge.
    Raises InputError for an even or negative size.
    """
    if size < 1 or size % 2 == 0:
        raise InputError(f"The blur is {size} pixels wide: give an odd number, 1 for none.")
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

    Made in blocks of rows, ATTENTION_BLOCK at a time: the `[n, n]` attention never exists.
    """
    values = rearrange(maps, "l h w -> (h w) l").float()
    for _ in range(times):
        products = [torch.cat([rows @ values for rows in self_attention_rows(x)]) for x in layers]
        values = summed(products) / len(products)
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
    """Scores over their sum along the first dimension; alike where that is not above 0."""
    sums = scores.sum(dim=0, keepdim=True)
    return torch.where(sums > 0, scores / sums, 1 / len(scores))


def self_attention_rows(layer: SelfLayer, pixels: Tensor | None = None) -> Iterable[Tensor]:
    """Head-averaged self-attention of some pixels of a layer, None for all: blocks of rows, float32 `[rows, n]`."""
    heads, n, _ = layer.keys.shape
    attending = torch.arange(n, device=layer.keys.device) if pixels is None else pixels
    budget = ATTENTION_BLOCK["cpu" if layer.keys.device.type == "cpu" else "other"]
    # As `cross_attention` has them: keys before queries.
    keys = layer.keys.relu().float() if layer.linear else layer.keys.float() * layer.scale
    for part in attending.split(max(1, budget // (heads * n))):
        block = layer.queries[:, part]
        if layer.linear:
            products = keys @ rearrange(block.relu().float(), "h m d -> h d m")
            shares = products / products.sum(dim=1, keepdim=True).clamp_min(1e-15)
        else:
            shares = cross_attention(block, keys, None if layer.others is None else layer.others[:, part])
        yield reduce(shares, "h n m -> m n", "mean")
