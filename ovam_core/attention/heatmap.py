"""Equations 3 to 5 of the paper: pixel queries and a text embedding to one heatmap a token."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ovam_core.attention.kernels import fused
from ovam_core.attention.modules import call_frozen, check_same, is_heard, is_projection, probe, without_hooks
from ovam_core.attention.reading import Reading, check_reading
from ovam_core.attention.recording import LayerQueries, Recording, alike, is_laid_out, joint
from ovam_core.attention.text_stream import TextStream
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
    words = [x for x in prompts if _is_word(recording, x)]
    others = [x for x in prompts if x not in words]
    found: dict[AttributionPrompt, Sequence[Tensor]] = {}
    if words:
        found.update(zip(words, _word_maps(recording, words).split(1), strict=True))
    if others:
        all_maps = _heatmaps(recording, [x.embedding for x in others])
        found.update((prompt, prompt.means(maps)) for maps, prompt in zip(all_maps, others, strict=True))
    return torch.stack([label for prompt in prompts for label in found[prompt]])


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
        asked = merged(recording, device)
        if all(size == 2 for size in sizes):  # what the second row does not get, the first one does
            second = _pair_maps(asked, stacked, sizes)
            maps = torch.stack([1 - second, second], dim=1).flatten(0, 1)
        else:
            maps = _mean_maps(asked, keys_of(asked, stacked, sizes), functools.partial(_layer_sums, sizes=sizes))
    if not wants_grad:
        check_weights(recording)
        check_finite(maps)
    return list(maps.split(sizes))


def _mean_maps(recording: Recording, keys: Iterable[Tensor], sums: Callable[[LayerQueries, Tensor], Tensor]) -> Tensor:
    """`[rows, H, W]`, the mean over layers, steps and heads. keys: of each layer; sums: (layer, keys) to its sum over
    steps and heads, `[rows, n]`.
    """
    return _mean_of_grids(
        recording, _by_grid(recording, (sums(*one) for one in zip(recording.layers, keys, strict=True)))
    )


def _by_grid(recording: Recording, sums: Iterable[Tensor]) -> Iterator[Tensor]:
    """Sums of each layer, `[rows, n]`, to those of each grid, in the order of the layers."""
    grids: dict[tuple[int, int], Tensor] = {}
    for layer, maps in zip(recording.layers, sums, strict=True):
        grid = layer.height, layer.width
        grids[grid] = grids[grid] + maps if grid in grids else maps
    return iter(grids.values())


def _mean_of_grids(recording: Recording, sums: Iterable[Tensor]) -> Tensor:
    """The mean over layers, steps and heads of `_by_grid`, `[rows, H, W]`. Resizing is linear: once a grid."""
    grids = dict.fromkeys((x.height, x.width) for x in recording.layers)
    size = recording.height, recording.width
    total = summed(resize(maps.unflatten(1, grid), size) for grid, maps in zip(grids, sums, strict=True))
    return total / sum(x.queries.shape[0] * x.queries.shape[1] for x in recording.layers)


@torch.no_grad()
def merged(recording: Recording, device: torch.device) -> Recording:
    """A recording of the same maps, whose layers that lie `side_by_side` are one with all of their heads.

    For questions on `device` while the weights stay. The recording itself where its keys are more than projections.
    """
    if not _projects(recording, device):
        return recording
    layers: list[LayerQueries] = []
    for ones in alike(recording.layers):
        queries = joint(ones) if len(ones) > 1 else None
        layers += ones if queries is None else [_one_layer(ones, queries)]
    return replace(recording, layers=tuple(layers))


def _one_layer(layers: Sequence[Any], queries: Tensor) -> LayerQueries:
    keys = without_hooks(layers[0].keys)
    keys.weight = nn.Parameter(torch.cat([x.keys.weight.detach() for x in layers]), requires_grad=False)
    return replace(layers[0], name=", ".join(x.name for x in layers), queries=queries, keys=keys, made=None)


def _pair_maps(recording: Recording, embedding: Tensor, sizes: list[int]) -> Tensor:
    """Eq. 5 of the second row of prompts of two, `[prompts, H, W]`."""
    if _projects(recording, embedding.device):
        return _mean_of_grids(recording, _ProjectedSums.apply(embedding[1::2] - embedding[0::2], recording))
    apart = _differences(recording, embedding, sizes, slice(1, None, 2), slice(0, None, 2))
    return _mean_maps(recording, apart, _sigmoid_sums)


# ------------------------------------------------------------------------------------------------ single words


def _is_word(recording: Recording, prompt: AttributionPrompt) -> bool:
    """Whether it is a prompt of three rows of which one gets a map, asked without a gradient on a CPU: the usual word
    between its start and its end. On a GPU the kernels serve all prompts alike.
    """
    embedding = prompt.embedding
    return (
        embedding.shape == (3, recording.embed_dim)
        and embedding.is_floating_point()
        and [len(group) for group in prompt.groups] == [1]
        and recording.stream is None
        and compute_device(recording, embedding).type == "cpu"
        and not (torch.is_grad_enabled() and embedding.requires_grad)
    )


def _word_maps(recording: Recording, prompts: Sequence[AttributionPrompt]) -> Tensor:
    """Eq. 5 of the one row of each prompt that gets a map (`_is_word`): float32 `[prompts, H, W]`.

    Less the product of the first of the others, the softmax over three is sigmoid(a - log(1 + exp(b))): fewer
    exponentials. What prompts have in common, as the start, is multiplied once for all.
    """
    embeddings = torch.cat([x.embedding for x in prompts]).detach().float()
    rows: dict[bytes, int] = {}  # the first place of each
    numbers = [rows.setdefault(row.tobytes(), place) for place, row in enumerate(embeddings.numpy())]
    of_row = {place: number for number, place in enumerate(rows.values())}
    asked, others = [], []
    for number, prompt in enumerate(prompts):
        places = [of_row[place] for place in numbers[3 * number : 3 * number + 3]]
        wanted = prompt.groups[0][0]
        first, second = (place for row, place in enumerate(places) if row != wanted)
        asked.append((places[wanted], first))
        others.append((second, first))
    once = list(dict.fromkeys(others))
    of_prompt = [once.index(pair) for pair in others]
    rows_apart, less = zip(*asked, *once, strict=True)

    def sums(layer: LayerQueries, apart: Tensor) -> Tensor:
        total = apart.new_zeros(len(asked), layer.queries.shape[2])
        for pixels, _, block in _blocks(layer.queries, apart):
            word, rest = _products(apart, block).split([len(asked), len(once)], dim=1)
            rest = F.softplus(rest)
            rest = rest if len(once) in (1, len(asked)) else rest[:, of_prompt]
            total[:, pixels] += _sum_of_maps(word.sub_(rest).sigmoid_())
        return total

    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        asked_of = merged(recording, embeddings.device)
        apart = _differences(asked_of, embeddings[list(rows.values())], [len(rows)], list(rows_apart), list(less))
        maps = _mean_maps(asked_of, apart, sums)
    check_weights(recording)
    check_finite(maps)
    return maps


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
    check_stream_weights(recording.stream, recording.embed_dim)


@torch.no_grad()
def check_stream_weights(stream: TextStream | None, width: int) -> None:
    """`check_weights` of a text stream, where there is one."""
    if stream is not None and any(x.made is not None for x in stream.blocks):
        check_same(
            (block.name, then, now)
            for block, made in stream.tried(width)
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
    return call_frozen(without_hooks(keys) if is_heard(keys) else keys, probe(1, width), dtype=dtype)


def compute_device(recording: Recording, embedding: Tensor) -> torch.device:
    """Where the maps of an embedding are made."""
    stored = recording.layers[0].queries.device
    return embedding.device if stored.type == "cpu" else stored


def layer_keys(layer: LayerQueries, embedding: Tensor) -> Tensor:
    """Eq. 4: the layer's keys, float32 `[heads, L, d]`, times the softmax's scale, on the embedding's device."""
    assert layer.keys is not None, "a layer of a text stream"
    keys = call_frozen(layer.keys, embedding, dtype=layer.dtype)
    return _scaled(keys.unflatten(1, (layer.queries.shape[1], -1)).transpose(0, 1), layer, embedding)


def keys_of(recording: Recording, embedding: Tensor, sizes: list[int]) -> Iterator[Tensor]:
    """The same for every layer; `[T, heads, L, d]` where the words are carried along a text stream.

    embedding: prompts of `sizes` rows one after the other.
    """
    if recording.stream is None:
        return (layer_keys(layer, embedding) for layer in recording.layers)
    names = [layer.name for layer in recording.layers]
    carried = zip(recording.layers, recording.stream.keys(embedding, sizes, names), strict=True)
    return (_scaled(keys, layer, embedding) for layer, keys in carried)


def _differences(
    recording: Recording, embedding: Tensor, sizes: list[int], rows: slice | list[int], less: slice | list[int]
) -> Iterator[Tensor]:
    """`keys_of` some rows less those of others, of each layer: of the rows' difference where keys are no more than
    projections.
    """
    if _projects(recording, embedding.device):
        apart = embedding[rows] - embedding[less]
        return keys_of(recording, apart, [len(apart)])
    return (keys[..., rows, :] - keys[..., less, :] for keys in keys_of(recording, embedding, sizes))


def _projects(recording: Recording, device: torch.device) -> bool:
    """Whether the keys of all layers are no more than projections, in float32 on a CPU."""
    keys: list[Any] = [x.keys for x in recording.layers]
    return device.type == "cpu" and all(is_projection(x, device) and x.weight.dtype == torch.float32 for x in keys)


def _scaled(keys: Tensor, layer: LayerQueries, embedding: Tensor) -> Tensor:
    """Keys of any shape and dtype times the softmax's scale, float32, on the embedding's device."""
    return keys.to(embedding.device, torch.float32) * layer.scale


def _layer_sums(layer: LayerQueries, keys: Tensor, sizes: list[int]) -> Tensor:
    """Attention of every token to every pixel, summed over steps and heads: float32 `[sum(sizes), n]`.

    keys: `[heads, sum(sizes), d]`, or with the steps before the heads; prompts one after the other, each with a softmax
    of its own.
    """
    if all(size == 2 for size in sizes):
        second = _sigmoid_sums(layer, keys[..., 1::2, :] - keys[..., 0::2, :])
        first = layer.queries.shape[0] * layer.queries.shape[1] - second
        return torch.stack([first, second], dim=1).flatten(0, 1)
    softmax, slopes = functools.partial(_softmax_each, sizes=sizes), functools.partial(_softmax_slopes, sizes=sizes)
    return _sums(keys, layer.queries, sizes, softmax, slopes)


def _sigmoid_sums(layer: LayerQueries, apart: Tensor) -> Tensor:
    """The same of the second row of prompts of two, of its keys less the first one's: the softmax over two is a
    sigmoid, with half of the products.
    """
    return _sums(apart, layer.queries, None, torch.sigmoid, _sigmoid_slopes)


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
    """Sum over steps and heads of `normalise(keys @ queries^T)`: `[rows, n]` in the dtype of the keys. Products lie as
    `_products` has them.

    keys: `[heads, rows, d]`, or `[T, heads, rows, d]` where each step has its own; queries: `[T, heads, n, d]`, no
    gradient. slopes: (probabilities, gradient of the sum) to the gradient of the products. The probabilities
    `[T, heads, rows, n]` are kept for the backward while they are few (KEPT_VALUES), else made again there block by
    block; a converted copy of the queries is never kept.
    """

    @staticmethod
    def forward(ctx, keys: Tensor, queries: Tensor, normalise: Callable, slopes: Callable) -> Tensor:
        total, kept = _summed(keys, queries, normalise, ctx.needs_input_grad[0])
        ctx.save_for_backward(keys, *kept)
        # Not among the saved: autograd refuses tensors of a run under inference_mode.
        ctx.queries, ctx.normalise, ctx.slopes = queries, normalise, slopes
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        keys, *kept = ctx.saved_tensors
        return _key_gradient(keys, ctx.queries, kept, ctx.normalise, ctx.slopes, gradient), None, None, None


def _summed(keys: Tensor, queries: Tensor, normalise: Callable, keep: bool) -> tuple[Tensor, list[Tensor]]:
    """What `_ProbabilitySums` makes, and the probabilities of each block, where they are to be kept and few."""
    steps, heads, n, _ = queries.shape
    rows = keys.shape[-2]
    keep = keep and steps * heads * rows * n <= KEPT_VALUES
    total, kept = keys.new_zeros(rows, n), []
    for pixels, at, block in _blocks(queries, keys):
        probabilities = normalise(_products(_of_steps(keys, at), block))
        total[:, pixels] += _sum_of_maps(probabilities)
        if keep:
            kept.append(probabilities)
    return total, kept


def _key_gradient(
    keys: Tensor, queries: Tensor, kept: Sequence[Tensor], normalise: Callable, slopes: Callable, gradient: Tensor
) -> Tensor:
    """The gradient to keys, in their shape, of one to `_summed`, `[rows, n]`."""
    total = torch.zeros_like(keys)
    for number, (pixels, at, block) in enumerate(_blocks(queries, keys)):
        probabilities = kept[number] if kept else normalise(_products(_of_steps(keys, at), block))
        of_steps = _of_steps(total, at)
        of_block = _of_products(slopes(probabilities, gradient[:, None, pixels]), block, keys)
        of_steps += of_block.sum_to_size(of_steps.shape)
    return total


class _ProjectedSums(torch.autograd.Function):
    """`_sigmoid_sums` of all layers of a recording that `_projects`, one a grid: `[rows, n]` each.

    apart: `[rows, E]`, embeddings of second rows less those of first ones. One piece for all layers, as in small grids
    what surrounds a product takes longer than it does.
    """

    @staticmethod
    def forward(ctx, apart: Tensor, recording: Recording) -> tuple[Tensor, ...]:
        keys, sums, ctx.counts = [], [], []
        saved: list[Tensor] = []
        for layer in recording.layers:
            keys.append(layer_keys(layer, apart))
            total, kept = _summed(keys[-1], layer.queries, torch.sigmoid_, ctx.needs_input_grad[0])
            sums.append(total)
            ctx.counts.append(len(kept))
            saved += kept
        ctx.save_for_backward(*keys, *saved)
        ctx.recording = recording
        return tuple(_by_grid(recording, sums))

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor):
        layers: Sequence[Any] = ctx.recording.layers
        keys, saved = ctx.saved_tensors[: len(layers)], iter(ctx.saved_tensors[len(layers) :])
        grids = list(dict.fromkeys((x.height, x.width) for x in layers))
        total: Any = 0
        for layer, own, count in zip(layers, keys, ctx.counts, strict=True):
            kept, gradient = list(itertools.islice(saved, count)), gradients[grids.index((layer.height, layer.width))]
            of_keys = _key_gradient(own, layer.queries, kept, torch.sigmoid_, _sigmoid_slopes, gradient) * layer.scale
            total = total + of_keys.transpose(0, 1).flatten(1) @ layer.keys.weight.detach()
        return total, None


def probabilities(layer: LayerQueries, keys: Tensor, sizes: list[int]) -> Iterator[tuple[slice, slice, Tensor]]:
    """A layer's attention maps (Eq. 3), a block at a time: pixels, rows of the layer's steps, and of these the
    probabilities float32 `[t, heads, sum(sizes), pixels]`. keys: of `keys_of`, each prompt with a softmax of its own.
    """
    for pixels, at, block in _blocks(layer.queries, keys):
        made = _softmax_each(_products(_of_steps(keys, at), block), sizes)
        folded = made.shape[2] == len(block)
        yield pixels, at, made.permute(2, 0, 1, 3) if folded else made.squeeze(2).unflatten(0, (len(block), -1))


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
    """`[g, rows, t, pixels]`: tokens before pixels, so that a softmax over few runs along many.

    g: heads, with all steps of a head in one product, where the queries lie so (`laid_out`); else every head of every
    step on its own, and t is 1.
    """
    if not _folds(keys, block):
        return (keys @ block.mT).flatten(0, 1).unsqueeze(2)
    return torch.bmm(keys, _folded(block)).unflatten(2, (len(block), -1))


def _of_products(slopes: Tensor, block: Tensor, keys: Tensor) -> Tensor:
    """The gradient to keys of one to `_products(keys, block)`: `[heads, rows, d]`, with the steps before where they
    were not folded.
    """
    if not _folds(keys, block):
        return slopes.squeeze(2).unflatten(0, (len(block), -1)) @ block
    return torch.bmm(slopes.flatten(2), _folded(block).mT)


def _folds(keys: Tensor, block: Tensor) -> bool:
    return keys.ndim == 3 and is_laid_out(block)


def _folded(block: Tensor) -> Tensor:
    """`[heads, d, t * pixels]`, a view of queries `[t, heads, pixels, d]` that are laid out so."""
    return block.permute(1, 3, 0, 2).flatten(2)


def _sum_of_maps(probabilities: Tensor) -> Tensor:
    """`[g, rows, t, pixels]` to `[rows, pixels]`; one dimension after the other, which takes a tenth of the time."""
    return probabilities.sum(dim=0).sum(dim=1)


def _sigmoid_slopes(probabilities: Tensor, gradient: Tensor) -> Tensor:
    """`p * (1 - p) * g`: the sigmoid's gradient from its values."""
    return torch.addcmul(probabilities, probabilities, probabilities, value=-1).mul_(gradient)


def _softmax_each(products: Tensor, sizes: list[int]) -> Tensor:
    """Softmax over the tokens of each prompt: `[g, sum(sizes), t, n]`."""
    if len(set(sizes)) == 1:
        return products.unflatten(1, (-1, sizes[0])).softmax(dim=2).flatten(1, 2)
    return torch.cat([part.softmax(dim=1) for part in products.split(sizes, dim=1)], dim=1)


def _softmax_slopes(probabilities: Tensor, gradient: Tensor, sizes: list[int]) -> Tensor:
    """`p * (g - sum(p * g))` over the tokens of each prompt."""
    weighted = probabilities * gradient
    for slopes, p in zip(weighted.split(sizes, dim=1), probabilities.split(sizes, dim=1), strict=True):
        slopes.addcmul_(p, slopes.sum(dim=1, keepdim=True), value=-1)
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
