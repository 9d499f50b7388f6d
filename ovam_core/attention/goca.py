"""GoCA's maths: one pass's attention to one map a label (arXiv 2603.06178).

Heads weigh by what they add to their layer's output (step 1), layers by how their self-attention agrees with a
reference (step 2), scores are rescaled at each pixel (step 3), and maps are propagated along the self-attention
(step 4). What is recorded of the pass: hooks/goca_recorder.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor

from ovam_core.attention.heatmap import (
    AttributionPrompt,
    check_embedding,
    check_finite,
    check_layer_weights,
    layer_keys,
    resize,
    summed,
)
from ovam_core.attention.reading import Reading, check_reading
from ovam_core.attention.recording import LayerQueries
from ovam_core.errors import InputError

PAPER_GRID = 64  # attention grid of the paper's models, for which its blur is meant
# Attention values (float32) made at once, all heads together.
ATTENTION_BLOCK = {"cpu": 1 << 20, "other": 1 << 26}


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
    from the pipeline's own layers, and `reading` is, as in `Recording`.
    """

    layers: tuple[WeightedLayer, ...]
    finest: tuple[SelfLayer, ...]
    timestep: int
    height: int
    width: int
    embed_dim: int
    reference: str
    reading: Reading | None = None

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

    def detached(self) -> GocaRecording:
        """As `Recording.detached`."""
        host = self.to("cpu")
        return replace(host, layers=tuple(replace(x, layer=x.layer.detached()) for x in host.layers))


@dataclass(frozen=True)
class GocaOptions:
    """Which steps of GoCA are in use; the defaults are the paper's for Stable Diffusion.

    heads, layers: the automatic weights; without them plain means. rescale: divide by the sum over content
    tokens. blur: side of the Gaussian in pixels of the paper's grid of 64 x 64, taken to the recording's grid
    (`blur_size`); 0 leaves it out. propagations: products with the mean self-attention; 0 for none.
    """

    heads: bool = True
    layers: bool = True
    rescale: bool = True
    blur: int = 5
    propagations: int = 2


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
    labels are the content tokens. Raises InputError for no prompt, for an embedding of another width, and
    for rescaling with one content token, which would be one everywhere.
    """
    prompts = [prompts] if isinstance(prompts, AttributionPrompt) else list(prompts)
    options = options or GocaOptions()
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
    maps = min_max(gaussian_blur(maps, blur_size(options.blur, max(maps.shape[1:]))))
    return propagate(maps, recording.finest, options.propagations) if options.propagations else maps


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
    scores = _scores(recording, prompts, options or GocaOptions())
    return torch.stack(
        [label for prompt, prompt_scores in zip(prompts, scores, strict=True) for label in prompt.means(prompt_scores)]
    )


def _scores(recording: GocaRecording, prompts: list[AttributionPrompt], options: GocaOptions) -> list[Tensor]:
    """`token_scores` of each prompt."""
    if not prompts:
        raise InputError("There is no word to attribute: give at least one.")
    check_reading(recording.reading, [x.reading for x in prompts])
    check_layer_weights((x.layer for x in recording.layers), recording.embed_dim)
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
    options = options or GocaOptions()
    check_embedding(embedding, recording.embed_dim)
    maps = []
    for weighted in recording.layers:
        heads = weighted.heads if options.heads else torch.full_like(weighted.heads, 1 / len(weighted.heads))
        pixels = layer_map(cross_attention(weighted.layer, embedding), heads)
        maps.append(rearrange(pixels, "l (h w) -> l h w", h=weighted.layer.height))
    weights = [x.weight if options.layers else 1 / len(maps) for x in recording.layers]
    return aggregate(maps, weights, (recording.height, recording.width))


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
        products = [torch.cat([rows @ values for rows in _self_attention(x, x.queries)]) for x in layers]
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


def _self_attention(layer: SelfLayer, queries: Tensor) -> Iterable[Tensor]:
    """Head-averaged self-attention of some queries `[heads, m, d]` of a layer: blocks of rows, float32 `[rows, n]`."""
    heads, n, _ = layer.keys.shape
    keys = rearrange(layer.keys.float() * layer.scale, "h n d -> h d n")
    budget = ATTENTION_BLOCK["cpu" if keys.device.type == "cpu" else "other"]
    for block in queries.split(max(1, budget // (heads * n)), dim=1):
        yield reduce((block.float() @ keys).softmax(dim=-1), "h m n -> m n", "mean")
