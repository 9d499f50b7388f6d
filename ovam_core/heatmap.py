"""Equations 3 to 5 of the paper: pixel queries and a text embedding to one heatmap a token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor

from .recorder import LayerQueries, Recording
from .text import Attribution

# Attention values (float32) made at once without gradients; with gradients all are kept, as autograd needs them. On a
# CPU a block should stay in cache between product, softmax and sum; on a GPU all steps of a layer go together.
BLOCK_VALUES = {"cpu": 1 << 20, "other": 1 << 27}


def heatmaps(recording: Recording, embedding: Tensor) -> Tensor:
    """The heatmap of each token of an attribution prompt (Eq. 5), divided by the number of attention maps summed.

    embedding: `[L, embed_dim]`, any floating dtype. The softmax is over its L rows alone.
    Returns float32 `[L, recording.height, recording.width]` in [0, 1] that sum to one over tokens at each pixel, on the
    device of the queries (or of the embedding, when only that is on an accelerator). Differentiable with respect
    to `embedding`, and to nothing else. Raises ValueError for an embedding of another shape.
    """
    return _heatmaps(recording, [embedding])[0]


def attribute(recording: Recording, attributions: Attribution | Sequence[Attribution]) -> Tensor:
    """One heatmap a label: the mean of the maps of the label's tokens. Labels of all attributions in their order.

    Returns float32 `[labels, recording.height, recording.width]` in [0, 1]. The queries are read once for all
    attributions; each has its own softmax, so the map of a word does not depend on the others.
    """
    if isinstance(attributions, Attribution):
        attributions = [attributions]
    if not attributions:
        raise ValueError("There is no word to attribute: give at least one.")
    all_maps = _heatmaps(recording, [x.embedding for x in attributions])
    return torch.stack(
        [
            maps[list(rows)].mean(dim=0)
            for maps, attribution in zip(all_maps, attributions, strict=True)
            for rows in attribution.groups
        ]
    )


def resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """`[L, h, w]` to `[L, H, W]`, bilinear, corners not aligned."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps[None], size=tuple(size), mode="bilinear", align_corners=False)[0]


def _heatmaps(recording: Recording, embeddings: list[Tensor]) -> list[Tensor]:
    for embedding in embeddings:
        if embedding.ndim != 2 or embedding.shape[1] != recording.embed_dim or len(embedding) == 0:
            raise ValueError(
                f"The embedding has shape {list(embedding.shape)}, but this model takes [tokens, {recording.embed_dim}]."
            )
    sizes = [len(x) for x in embeddings]
    device = _compute_device(recording, embeddings[0])
    wants_grad = torch.is_grad_enabled() and any(x.requires_grad for x in embeddings)
    with torch.set_grad_enabled(wants_grad), torch.autocast(device.type, enabled=False):
        stacked = torch.cat([x.to(device) for x in embeddings])
        total, count = 0, 0
        for layer in recording.layers:
            sums = _layer_sums(layer, _keys(layer, stacked), sizes)
            # Resizing is linear: once a layer, after the sum over steps and heads.
            grid = rearrange(sums, "l (h w) -> l h w", h=layer.height)
            total = total + resize(grid, (recording.height, recording.width))
            count += layer.queries.shape[0] * layer.queries.shape[1]
        return list((total / count).split(sizes))


def _compute_device(recording: Recording, embedding: Tensor) -> torch.device:
    stored = recording.layers[0].queries.device
    return embedding.device if stored.type == "cpu" else stored


def _keys(layer: LayerQueries, embedding: Tensor) -> Tensor:
    """Eq. 4: the layer's keys, float32 `[heads, L, d]`, times the softmax's scale, on the embedding's device.

    The layer may be elsewhere than the queries (CPU offload) and in another dtype.
    """
    parameter = next(layer.keys.parameters(), None)
    given = embedding
    if parameter is not None:
        given = given.to(parameter.dtype)
        if parameter.device.type != "meta":  # else accelerate's hooks bring weights and input together
            given = given.to(parameter.device)
    if torch.is_grad_enabled() and parameter is not None:
        frozen = {name: p.detach() for name, p in layer.keys.named_parameters()}
        keys = torch.func.functional_call(layer.keys, frozen, (given,))  # no gradient for the model
    else:
        keys = layer.keys(given)
    heads = layer.queries.shape[1]
    keys = rearrange(keys.to(embedding.device, torch.float32), "l (h d) -> h l d", h=heads)
    return keys * layer.scale


def _layer_sums(layer: LayerQueries, keys: Tensor, sizes: list[int]) -> Tensor:
    """Attention of every token to every pixel, summed over steps and heads: float32 `[sum(sizes), n]`.

    keys: `[heads, sum(sizes), d]`, prompts one after the other; each prompt has a softmax of its own.
    """
    if all(size == 2 for size in sizes):  # the softmax over two tokens is a sigmoid: half of the products
        keys = keys[:, 1::2] - keys[:, 0::2]
        second = _blockwise(layer.queries, keys, torch.sigmoid)
        first = layer.queries.shape[0] * layer.queries.shape[1] - second
        return rearrange([first, second], "two words n -> (words two) n")
    return _blockwise(layer.queries, keys, lambda logits: _softmax_each(logits, sizes))


def _softmax_each(logits: Tensor, sizes: list[int]) -> Tensor:
    """Softmax over the tokens of each prompt: `[..., sum(sizes), n]`."""
    if len(set(sizes)) == 1:
        split = rearrange(logits, "t h (words l) n -> t h words l n", l=sizes[0])
        return rearrange(split.softmax(dim=-2), "t h words l n -> t h (words l) n")
    return torch.cat([part.softmax(dim=-2) for part in logits.split(sizes, dim=-2)], dim=-2)


def _blockwise(queries: Tensor, keys: Tensor, normalise) -> Tensor:
    """Sum over steps and heads of `normalise(keys @ queries^T)`, float32 `[rows, n]`, tokens before pixels.

    Tokens before pixels, so that the softmax over few tokens runs along many pixels.
    """
    steps, heads, n, _ = queries.shape
    device = keys.device
    budget = BLOCK_VALUES["cpu" if device.type == "cpu" else "other"]
    values = heads * keys.shape[1]  # of one pixel at one step
    pixels = max(64, min(n, budget // values))
    together = max(1, min(steps, budget // (values * min(n, pixels))))
    columns = []
    for part in queries.split(pixels, dim=2):
        total = 0
        for block in part.split(together):
            block = block.to(device, non_blocking=True).float()
            logits = keys @ rearrange(block, "t h n d -> t h d n")
            total = total + reduce(normalise(logits), "t h l n -> l n", "sum")
        columns.append(total)
    return torch.cat(columns, dim=1)
