"""The way of the authors' published code (github.com/vpulab/ovam), written anew: what row 8 is compared with.

Of its `get_ovam_callable` with the arguments that it has by default, and of its `optimize_embedding` with the loss of
the paper: the products of each layer and step apart, all of them kept for one softmax over the tokens; the sums of each
layer resized to the finest grid, and their sum to the image. Layers in the middle block are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ovam_core.attention.recording import LayerQueries, Recording
from ovam_core.optimization import EDGE, OptimizeSettings


def as_published(recording: Recording) -> Recording:
    """The recording with its queries in the order in memory in which that code keeps them."""
    layers = (x for x in recording.layers if not x.name.startswith("mid_block"))
    return replace(recording, layers=tuple(replace(x, queries=x.queries.contiguous()) for x in layers))


def published_question(pipe: Any, recording: Recording, sentence: str) -> Tensor:
    """The maps of all tokens of a sentence at the size of the image, `[L, H, W]`, read by the pipeline's own parts."""
    read = pipe.tokenizer(sentence, return_tensors="pt")
    with torch.no_grad():
        embedding = pipe.text_encoder(**read.to(pipe.text_encoder.device))[0][0]
        return published_maps(recording, embedding)


def published_maps(recording: Recording, embedding: Tensor) -> Tensor:
    """Sums over layers, steps and heads, `[L, H, W]` at the size of the image; differentiable."""
    size = recording.height, recording.width
    sums = []
    for layer in recording.layers:
        one = _layer(layer, embedding)[None]
        sums.append(one if one.shape[-2:] == size else F.interpolate(one, size=size, mode="bilinear"))
    return F.interpolate(torch.stack(sums).sum(dim=0), size=recording.image_size, mode="bilinear")[0]


def _layer(layer: LayerQueries, embedding: Tensor) -> Tensor:
    """`[L, h, w]`."""
    keys: Any = layer.keys
    own = rearrange(keys(embedding.to(keys.weight.dtype)), "l (h d) -> h l d", h=layer.queries.shape[1]).contiguous()
    products = []
    for queries in layer.queries:
        empty = torch.empty(len(queries), queries.shape[1], own.shape[1], dtype=queries.dtype, device=queries.device)
        product = torch.baddbmm(empty, queries, own.mT, beta=0, alpha=layer.scale)
        products.append(rearrange(product, "heads (h w) l -> heads l h w", h=layer.height).contiguous())
    return torch.stack(products).softmax(dim=-3).sum(dim=0).sum(dim=0)


def published_losses(
    recording: Recording, target: Tensor, start: Tensor, settings: OptimizeSettings
) -> Sequence[float]:
    """Losses of its optimisation, one an epoch. target: float `[L, H, W]`; start: `[L, E]`."""
    embedding = start.detach().clone().requires_grad_()
    optimizer = torch.optim.SGD([embedding], lr=settings.rate)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, settings.decay_every, settings.decay)
    losses = []
    for _ in range(settings.epochs):
        optimizer.zero_grad()
        maps = published_maps(recording, embedding)
        shares = (maps / maps.sum(dim=0, keepdim=True)).clamp(EDGE, 1 - EDGE)
        loss = len(start) * F.binary_cross_entropy(shares, target)
        losses.append(float(loss.detach()))
        loss.backward(inputs=[embedding])  # and to no weight of the model
        optimizer.step()
        scheduler.step()
    return losses
