"""DatasetDM: Wu et al., "DatasetDM: Synthesizing Data with Perception Annotations Using Diffusion Models", NeurIPS
2023, arXiv 2308.06160; its open-vocabulary semantic decoder.

Features and cross-attention of the last step, fused from coarse to fine; 20 learned queries, each with the class
embedding beside it, look at three grids of them in turn through masked attention (Mask2Former). Names are those of the
authors' state dict.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ovam_core.attention.features import Features
from ovam_core.downstream.method import SystemMethod
from ovam_core.downstream.pyramid import Layout, Mlp, Pyramid, Statistics, by_grid, resized
from ovam_core.models.registry import adapter_of

if TYPE_CHECKING:
    from ovam_core.models.adapter import Pipeline

_WIDTH, _HEADS, _LAYERS, _HIDDEN = 256, 8, 10, 2048
_QUERIES = 20
_CLASSES = 2  # and one for nothing
_BEST = 3  # instances whose masks are looked at
# Sides of the mask features and of the three memories, to the finest grid's: 160, 20, 40 and 80 to 64.
MASK_SHARE, SHARES = 5 / 2, (5 / 16, 5 / 8, 5 / 4)
PERIOD = 10_000  # of the sines
PAIRS = 2  # a sine and a cosine


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(_WIDTH, _HEADS)
        self.norm = nn.LayerNorm(_WIDTH)

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        """x, places: `[queries, 1, 256]`."""
        asked = x + places
        return self.norm(x + self.self_attn(asked, asked, x, need_weights=False)[0])


class CrossAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.multihead_attn = nn.MultiheadAttention(_WIDTH, _HEADS)
        self.norm = nn.LayerNorm(_WIDTH)

    def forward(self, x: Tensor, places: Tensor, memory: Tensor, where: Tensor, hidden: Tensor) -> Tensor:
        """memory, where (its places): `[n, 1, 256]`; hidden: bool `[heads, queries, n]`, what is not looked at."""
        seen = self.multihead_attn(x + places, memory + where, memory, attn_mask=hidden, need_weights=False)[0]
        return self.norm(x + seen)


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(_WIDTH, _HIDDEN), nn.Linear(_HIDDEN, _WIDTH)
        self.norm = nn.LayerNorm(_WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.linear2(F.relu(self.linear1(x))))


class PerceptionDecoder(Pyramid):
    """The authors' module."""

    def __init__(self, layout: Layout, statistics: Statistics):
        maps = [layout.heads * layout.tokens * layers for layers in (1, 5, 5, 5)]
        given = [a + b for a, b in zip(layout.features, maps, strict=True)]
        super().__init__(given, (_WIDTH,) * 4, (_WIDTH,) * 3, statistics)
        self.query_feat, self.query_embed = nn.Embedding(_QUERIES, _WIDTH), nn.Embedding(_QUERIES, _WIDTH)
        self.query_feat_mlp = nn.Linear(_WIDTH + layout.text, _WIDTH, bias=False)
        self.query_embed_mlp = nn.Linear(_WIDTH + layout.text, _WIDTH, bias=False)
        self.decoder_norm = nn.LayerNorm(_WIDTH)
        self.level_embed = nn.Embedding(len(SHARES), _WIDTH)
        self.class_embed = nn.Linear(_WIDTH, _CLASSES + 1)
        self.mask_embed = Mlp(_WIDTH, _WIDTH, _WIDTH)
        self.transformer_self_attention_layers = nn.ModuleList([SelfAttention() for _ in range(_LAYERS)])
        self.transformer_cross_attention_layers = nn.ModuleList([CrossAttention() for _ in range(_LAYERS)])
        self.transformer_ffn_layers = nn.ModuleList([FeedForward() for _ in range(_LAYERS)])

    def scenes(self, grids: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """(the three memories, mask features), `[1, 256, h, w]` each, of the four grids `[1, C, h, w]`."""
        *memories, finest = self.fused(grids)
        height, width = grids[-1].shape[-2:]
        sizes = [(int(height * share), int(width * share)) for share in (*SHARES, MASK_SHARE)]
        *memories, masks = map(resized, (*memories, finest), sizes)
        return memories, masks

    def forward(self, memories: Sequence[Tensor], features: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """(class logits `[20, 3]`, mask logits `[20, h, w]`) of one class embedding `[1, E]`.

        The learned places go through `query_feat_mlp` and the learned features through `query_embed_mlp`: in the
        authors' code the two are exchanged, and the weights were trained so.
        """
        text = embedding.expand(_QUERIES, -1)
        places = self.query_feat_mlp(torch.cat([self.query_embed.weight, text], dim=1))[:, None]
        x = self.query_embed_mlp(torch.cat([self.query_feat.weight, text], dim=1))[:, None]
        where = [rearrange(sines(one), "b c h w -> (h w) b c") for one in memories]
        levels = [
            rearrange(one, "b c h w -> (h w) b c") + level
            for one, level in zip(memories, self.level_embed.weight, strict=True)
        ]
        sizes = [(one.shape[-2], one.shape[-1]) for one in memories]
        classes, masks = self._predicted(x, features)
        for number in range(_LAYERS):
            level = number % len(levels)
            hidden = _hidden(masks, sizes[level])
            x = self.transformer_cross_attention_layers[number](x, places, levels[level], where[level], hidden)
            x = self.transformer_self_attention_layers[number](x, places)
            x = self.transformer_ffn_layers[number](x)
            classes, masks = self._predicted(x, features)
        return classes, masks

    def _predicted(self, x: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        normed = self.decoder_norm(x)[:, 0]
        return self.class_embed(normed), torch.einsum("qc,chw->qhw", self.mask_embed(normed), features[0])


def _hidden(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """bool `[heads, queries, n]`: where a query's mask `[queries, h, w]` is under one half; nowhere, if it all is."""
    under = (resized(masks[None], size)[0].sigmoid() < 0.5).flatten(1)
    return (under & ~under.all(dim=1, keepdim=True)).expand(_HEADS, -1, -1)


def sines(x: Tensor) -> Tensor:
    """The places of a grid `[1, 256, h, w]` as sines and cosines of the same shape, rows first.

    Row r of h counts (r + 1) / (h + 1e-6) of a turn, divided by 10000^(2 k / 128) in the k-th of 64 pairs.
    """
    half = x.shape[1] // 2
    rates = PERIOD ** (PAIRS * torch.arange(half // PAIRS, device=x.device) / half)
    ways = []
    for side in x.shape[-2:]:
        turns = torch.arange(1, side + 1, device=x.device) / (side + 1e-6) * 2 * math.pi
        angles = turns[:, None] / rates
        ways.append(torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1))  # `[side, half]`
    height, width = x.shape[-2:]
    rows, columns = ways[0][:, None].expand(-1, width, -1), ways[1][None].expand(height, -1, -1)
    return rearrange(torch.cat([rows, columns], dim=2), "h w c -> 1 c h w")


def best_instance(classes: Tensor, masks: Tensor) -> Tensor:
    """The logits `[h, w]` of the best of the instances: class logits `[Q, 3]`, mask logits `[Q, h, w]`.

    Of the three that are most of a class, the one of the largest product of that share and the mean probability within
    its mask. Which of the two classes it is makes no difference.
    """
    scores, places = classes.softmax(dim=1)[:, :-1].flatten().topk(_BEST)
    chosen = masks[places // (classes.shape[1] - 1)]
    inside = (chosen > 0).flatten(1).float()
    sure = (chosen.sigmoid().flatten(1) * inside).sum(dim=1) / (inside.sum(dim=1) + 1e-6)
    return chosen[(scores * sure).argmax()]


class DatasetDM(SystemMethod[PerceptionDecoder]):
    """DatasetDM as a method: see `SystemMethod`. Published with Stable Diffusion 1.4, 50 steps, guidance 7, 512 pixels.

    The mask is where the best instance's probability is over 0.5. The authors keep the attention of the steps of which
    their generator switches it on: of the last one alone, so that their average over time is that step's. Their VOC
    classes are written in one word ("diningtable", "pottedplant", "tvmonitor").
    """

    name: ClassVar[str] = "DatasetDM"
    about: ClassVar[str] = (
        "A trained decoder of its authors reads features and attention of the last step, by the class."
    )

    def _empty(self, layout: Layout, statistics: Statistics) -> PerceptionDecoder:
        return PerceptionDecoder(layout, statistics)

    def class_embedding(self, pipe: Pipeline, caption: str, word: str) -> Tensor:  # noqa: ARG002
        """The mean of all the text encoder's outputs for the bare word, padding and special tokens included."""
        adapter = adapter_of(pipe)
        adapter.tokenize(word)
        with torch.no_grad():
            return adapter.encode_padded(word).mean(dim=0, keepdim=True)

    def probabilities(self, features: Features, embeddings: Sequence[Tensor]) -> Tensor:
        layers, maps = by_grid(features.layers), by_grid(upwards_first(features.attention))
        grids = [
            torch.cat([*own, *(one.flatten(0, 1) for one in seen)])[None]
            for own, seen in zip(layers, maps, strict=True)
        ]
        memories, mask_features = self.net.scenes(grids)
        found = []
        for embedding in embeddings:
            classes, masks = self.net(memories, mask_features, embedding)
            found.append(best_instance(classes, resized(masks[None], features.image_size)[0]))
        return torch.stack(found).sigmoid()


def upwards_first(attention: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The maps in the order of the authors' channels: of the up blocks, the middle block, the down blocks."""
    ways = ("up_blocks.", "mid_block.", "down_blocks.")
    return {name: x for way in ways for name, x in attention.items() if name.startswith(way)}
