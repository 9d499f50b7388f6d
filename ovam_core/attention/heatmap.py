"""Equations 3 to 5 of the paper: pixel queries and a text embedding to one heatmap a token."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ovam_core.attention.kernels import fused
from ovam_core.attention.modules import call_frozen, check_same, probe, without_hooks
from ovam_core.attention.reading import Reading, check_reading
from ovam_core.attention.recording import LayerQueries, Recording
from ovam_core.errors import InputError

# Values (float32) of one block of attention or of converted queries, whichever is more. On a CPU a block
# should stay in cache between product, softmax and sum; on a GPU all steps of a layer go together.
BLOCK_VALUES = {"cpu": 1 << 19, "other": 1 << 27}
# Attention values of one layer that are kept for the gradient, 16 MiB; more than that are made again.
KEPT_VALUES = 1 << 22


def heatmaps(recording: Recording, embedding: Tensor) -> Tensor:
    """The heatmap of each token of an attribution prompt (Eq. 5), divided by the number of attention maps summed.

    embedding: `[L, embed_dim]`, any floating dtype. The softmax is over its L rows alone.
    Returns float32 `[L, recording.height, recording.width]` in [0, 1] that sum to one over tokens at each
    pixel, on the device of the queries (or of the embedding, when only that is on an accelerator).
    Differentiable with respect to `embedding`, and to nothing else. Raises InputError for an embedding of
    another shape or of whole or complex numbers and for one that is too large for the model. Without a gradient also
    for weights that are no longer those of the run; see `check_weights`.
    """
    return _heatmaps(recording, [embedding])[0]


def attribute(recording: Recording, prompts: AttributionPrompt | Sequence[AttributionPrompt]) -> Tensor:
    """One heatmap a label: the mean of the maps of the label's words (`AttributionPrompt.means`).

    Returns float32 `[labels, recording.height, recording.width]` in [0, 1], the labels of all prompts in their order.
    The queries are read once for all prompts; each has its own softmax, so the map of a word does not depend on the
    others.
    Raises InputError for no prompt, for an embedding of another width, and for words that were not read as the
    picture's prompt was.
    """
    if isinstance(prompts, AttributionPrompt):
        prompts = [prompts]
    if not prompts:
        raise InputError("There is no word to attribute: give at least one.")
    check_reading(recording.reading, [x.reading for x in prompts])
    all_maps = _heatmaps(recording, [x.embedding for x in prompts])
    return torch.stack([label for maps, prompt in zip(all_maps, prompts, strict=True) for label in prompt.means(maps)])


def resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """`[L, h, w]` to `[L, H, W]`, bilinear, corners not aligned."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps[None], size=tuple(size), mode="bilinear", align_corners=False)[0]


def claims(maps: Any, x: int, y: int) -> list[tuple[int, float]]:
    """Who claims a pixel: (row, value) of each map, the largest value first, equals in their order.

    maps: `[L, H, W]`, a tensor or an array, such as heatmaps of one recording; x, y: the pixel, from the upper left.
    The values themselves rank, not their shares of each map's peak: a word that is nowhere in the picture has a low map
    with a peak somewhere, all the same. Raises InputError for a point outside.
    """
    height, width = maps.shape[-2:]
    if not (0 <= x < width and 0 <= y < height):
        raise InputError(f"The point {x}, {y} lies outside of the picture of {width}x{height}.")
    values = [float(value) for value in maps[:, y, x]]
    return sorted(enumerate(values), key=lambda one: -one[1])


def summed(tensors: Iterable[Tensor]) -> Tensor:
    """The sum of one or more tensors of one shape, in their order."""
    return functools.reduce(torch.add, tensors)


def _heatmaps(recording: Recording, embeddings: list[Tensor]) -> list[Tensor]:
    """Eq. 5 for several prompts `[L, E]` at once: float32 `[L, H, W]` each, over every layer, step and head.

    Raises InputError for an embedding of another shape.
    """
    for embedding in embeddings:
        check_embedding(embedding, recording.embed_dim)
    sizes = [len(x) for x in embeddings]
    device = compute_device(recording, embeddings[0])
    wants_grad = torch.is_grad_enabled() and any(x.requires_grad for x in embeddings)
    with torch.set_grad_enabled(wants_grad), torch.autocast(device.type, enabled=False):
        stacked = torch.cat([x.to(device) for x in embeddings])
        grids: dict[tuple[int, int], Tensor] = {}
        for layer, keys in zip(recording.layers, keys_of(recording, stacked, sizes), strict=True):
            maps = rearrange(_layer_sums(layer, keys, sizes), "l (h w) -> l h w", h=layer.height)
            grid = layer.height, layer.width
            grids[grid] = grids[grid] + maps if grid in grids else maps
        # Resizing is linear: once a grid, after the sum over layers, steps and heads.
        total = summed(resize(maps, (recording.height, recording.width)) for maps in grids.values())
        count = sum(x.queries.shape[0] * x.queries.shape[1] for x in recording.layers)
        maps = total / count
    if not wants_grad:
        check_weights(recording)
        check_finite(maps)
    return list(maps.split(sizes))


def check_embedding(embedding: Tensor, width: int) -> None:
    """Raises InputError for what is not `[tokens, width]` of floating-point numbers."""
    if embedding.ndim != 2 or embedding.shape[1] != width or len(embedding) == 0:
        raise InputError(f"The embedding has shape {list(embedding.shape)}, but this model takes [tokens, {width}].")
    if not embedding.is_floating_point():
        kind = str(embedding.dtype).removeprefix("torch.")
        raise InputError(f"The embedding is {kind}, but this model takes floating-point numbers, such as float32.")


def check_finite(maps: Tensor) -> None:
    """Raises InputError for maps that are no numbers."""
    if not torch.isfinite(maps).all():
        raise InputError(
            "The maps are no numbers: the embedding is too large for this model and its number format, or the run "
            "itself went wrong; take another token, or make the picture again in float32."
        )


@torch.no_grad()
def check_weights(recording: Recording) -> None:
    """Raises InputError where the weights that make the keys are no longer those of the run."""
    check_layer_weights(recording.layers, recording.embed_dim)
    if recording.stream is not None and any(x.made is not None for x in recording.stream.blocks):
        check_same(
            (block.name, then, now)
            for block, made in recording.stream.tried(recording.embed_dim)
            for then, now in zip(block.made or (), made, strict=False)  # the last block of a part carries nothing on
        )


@torch.no_grad()
def check_layer_weights(layers: Iterable[LayerQueries], width: int) -> None:
    """`check_weights` of layers whose keys are of the embedding alone."""
    check_same((x.name, x.made, tried_keys(x.keys, width, x.dtype)) for x in layers if x.made is not None)


@torch.no_grad()
def tried_keys(keys: nn.Module | None, width: int, dtype: torch.dtype | None) -> Tensor:
    """What a layer's way to its keys makes of a probe: `[1, heads * d]`."""
    assert keys is not None, "a layer of a text stream"
    return call_frozen(without_hooks(keys), probe(1, width), dtype=dtype)


def compute_device(recording: Recording, embedding: Tensor) -> torch.device:
    """Where the maps of an embedding are made."""
    stored = recording.layers[0].queries.device
    return embedding.device if stored.type == "cpu" else stored


def layer_keys(layer: LayerQueries, embedding: Tensor) -> Tensor:
    """Eq. 4: the layer's keys, float32 `[heads, L, d]`, times the softmax's scale, on the embedding's device."""
    assert layer.keys is not None, "a layer of a text stream"
    keys = call_frozen(layer.keys, embedding, dtype=layer.dtype)
    keys = rearrange(keys, "l (h d) -> h l d", h=layer.queries.shape[1])
    return _scaled(keys, layer, embedding)


def keys_of(recording: Recording, embedding: Tensor, sizes: list[int]) -> Iterator[Tensor]:
    """The same for every layer; `[T, heads, L, d]` where the words are carried along a text stream.

    embedding: prompts of `sizes` rows one after the other.
    """
    if recording.stream is None:
        return (layer_keys(layer, embedding) for layer in recording.layers)
    names = [layer.name for layer in recording.layers]
    carried = zip(recording.layers, recording.stream.keys(embedding, sizes, names), strict=True)
    return (_scaled(keys, layer, embedding) for layer, keys in carried)


def _scaled(keys: Tensor, layer: LayerQueries, embedding: Tensor) -> Tensor:
    """Keys of any shape and dtype times the softmax's scale, float32, on the embedding's device."""
    return keys.to(embedding.device, torch.float32) * layer.scale


def _layer_sums(layer: LayerQueries, keys: Tensor, sizes: list[int]) -> Tensor:
    """Attention of every token to every pixel, summed over steps and heads: float32 `[sum(sizes), n]`.

    keys: `[heads, sum(sizes), d]`, or with the steps before the heads; prompts one after the other, each with a softmax
    of its own.
    """
    if all(size == 2 for size in sizes):  # the softmax over two tokens is a sigmoid: half of the products
        keys = keys[..., 1::2, :] - keys[..., 0::2, :]
        second = _sums(keys, layer.queries, None, torch.sigmoid, _sigmoid_slopes)
        first = layer.queries.shape[0] * layer.queries.shape[1] - second
        return rearrange([first, second], "two words n -> (words two) n")
    softmax, slopes = functools.partial(_softmax_each, sizes=sizes), functools.partial(_softmax_slopes, sizes=sizes)
    return _sums(keys, layer.queries, sizes, softmax, slopes)


def _sums(keys: Tensor, queries: Tensor, sizes: list[int] | None, normalise: Callable, slopes: Callable) -> Tensor:
    """`_ProbabilitySums`, or its kernels where they run.

    sizes: rows over which `normalise` sums, one prompt after the other; None where each row is on its own.
    """

    def plain(keys: Tensor, queries: Tensor) -> Tensor:
        return _ProbabilitySums.apply(keys, queries, normalise, slopes)

    if fused.serves(keys, queries, sizes):
        return fused.ProbabilitySums.apply(keys, queries, sizes, plain)
    return plain(keys, queries)


class _ProbabilitySums(torch.autograd.Function):
    """Sum over steps and heads of `normalise(keys @ queries^T)`: `[rows, n]` in the dtype of the keys.

    keys: `[heads, rows, d]`, or `[T, heads, rows, d]` where each step has its own; queries: `[T, heads, n, d]`, no
    gradient. slopes: (probabilities, gradient of the sum) to the gradient of the products. The probabilities
    `[T, heads, rows, n]` are kept for the backward while they are few (KEPT_VALUES), else made again there block by
    block; a converted copy of the queries is never kept.
    """

    @staticmethod
    def forward(ctx, keys: Tensor, queries: Tensor, normalise: Callable, slopes: Callable) -> Tensor:
        steps, heads, n, _ = queries.shape
        rows = keys.shape[-2]
        keep = ctx.needs_input_grad[0] and steps * heads * rows * n <= KEPT_VALUES
        total, kept = keys.new_zeros(rows, n), []
        for pixels, at, block in _blocks(queries, keys):
            probabilities = normalise(_products(_of_steps(keys, at), block))
            total[:, pixels] += reduce(probabilities, "t h l n -> l n", "sum")
            if keep:
                kept.append(probabilities)
        ctx.save_for_backward(keys, *kept)
        # Not among the saved: autograd refuses tensors of a run under inference_mode.
        ctx.queries, ctx.normalise, ctx.slopes = queries, normalise, slopes
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        keys, *kept = ctx.saved_tensors
        total = torch.zeros_like(keys)
        for number, (pixels, at, block) in enumerate(_blocks(ctx.queries, keys)):
            probabilities = kept[number] if kept else ctx.normalise(_products(_of_steps(keys, at), block))
            slopes = ctx.slopes(probabilities, gradient[:, pixels])
            of_steps = _of_steps(total, at)
            of_steps += (slopes @ block).sum_to_size(of_steps.shape)
        return total, None, None, None


def probabilities(layer: LayerQueries, keys: Tensor, sizes: list[int]) -> Iterator[tuple[slice, slice, Tensor]]:
    """A layer's attention maps (Eq. 3), a block at a time: pixels, rows of the layer's steps, and of these the
    probabilities float32 `[t, heads, sum(sizes), pixels]`. keys: of `keys_of`, each prompt with a softmax of its own.
    """
    for pixels, at, block in _blocks(layer.queries, keys):
        yield pixels, at, _softmax_each(_products(_of_steps(keys, at), block), sizes)


def _of_steps(keys: Tensor, at: slice) -> Tensor:
    """The keys of some steps: all of them where the steps share them."""
    return keys[at] if keys.ndim == 4 else keys


def _blocks(queries: Tensor, keys: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Pixels, steps and queries `[t, heads, pixels, d]`, in the keys' device and dtype, a block at a time."""
    steps, heads, n, d = queries.shape
    copied = queries.dtype != keys.dtype or queries.device != keys.device
    budget = BLOCK_VALUES["cpu" if keys.device.type == "cpu" else "other"]
    values = heads * max(keys.shape[-2], d if copied else 0)  # of one pixel at one step
    pixels = max(64, min(n, budget // values))
    together = max(1, min(steps, budget // (values * min(n, pixels))))
    for start in range(0, n, pixels):
        part = slice(start, min(n, start + pixels))
        for first in range(0, steps, together):
            at = slice(first, min(steps, first + together))
            yield part, at, queries[at, :, part].to(keys.device, keys.dtype, non_blocking=True)


def _products(keys: Tensor, block: Tensor) -> Tensor:
    """`[t, heads, rows, pixels]`: tokens before pixels, so that a softmax over few runs along many."""
    return keys @ rearrange(block, "t h n d -> t h d n")


def _sigmoid_slopes(probabilities: Tensor, gradient: Tensor) -> Tensor:
    """`p * (1 - p) * g` of tensors of one shape: the sigmoid's gradient from its values."""
    return torch.addcmul(probabilities, probabilities, probabilities, value=-1).mul_(gradient)


def _softmax_each(products: Tensor, sizes: list[int]) -> Tensor:
    """Softmax over the tokens of each prompt: `[..., sum(sizes), n]`."""
    if len(set(sizes)) == 1:
        split = rearrange(products, "t h (words l) n -> t h words l n", l=sizes[0])
        return rearrange(split.softmax(dim=-2), "t h words l n -> t h (words l) n")
    return torch.cat([part.softmax(dim=-2) for part in products.split(sizes, dim=-2)], dim=-2)


def _softmax_slopes(probabilities: Tensor, gradient: Tensor, sizes: list[int]) -> Tensor:
    """`p * (g - sum(p * g))` over the tokens of each prompt."""
    weighted = probabilities * gradient
    for slopes, p in zip(weighted.split(sizes, dim=-2), probabilities.split(sizes, dim=-2), strict=True):
        slopes.addcmul_(p, slopes.sum(dim=-2, keepdim=True), value=-1)
    return weighted


@dataclass(frozen=True, eq=False)
class AttributionPrompt:
    """An attribution prompt, encoded.

    embedding: `[L, E]` in the text encoder's dtype, on its device, the special tokens included.
    labels: what gets a map; groups: for each label the rows of `embedding` whose maps are averaged; shares: what each
    of them counts for, one in sum, None where they count alike.
    reading: how it was read, None for an embedding that was found.
    """

    embedding: Tensor
    labels: tuple[str, ...]
    groups: tuple[tuple[int, ...], ...]
    shares: tuple[tuple[float, ...], ...] | None = None
    reading: Reading | None = None

    def means(self, maps: Tensor, rows: Sequence[int] | None = None) -> list[Tensor]:
        """One map a label, `[...]` each, of one a row, `[L, ...]`.

        rows: those of `embedding` that `maps` holds, in its order; None for all.
        """
        if rows is not None:
            maps = maps[[rows.index(row) if row in rows else 0 for row in range(len(self.embedding))]]
        if self.shares is None:
            return [maps[list(group)].mean(dim=0) for group in self.groups]
        return [
            torch.einsum("r,r...->...", maps.new_tensor(shares), maps[list(group)])
            for group, shares in zip(self.groups, self.shares, strict=True)
        ]
