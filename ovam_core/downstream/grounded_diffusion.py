"""Grounded Diffusion: Li et al., "Guiding Text-to-Image Diffusion Model Towards Grounded Generation", arXiv 2301.05221.

Features of the last step, fused from coarse to fine; 4 x 4 patches of them are the memory of a small transformer whose
one query is the class embedding; what comes out of it, times the fused features, is the mask. 18,796,560 parameters.
Names are those of the authors' state dict, the "transfromer_decoder" among them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovam_core.attention.features import Features
from ovam_core.downstream.method import SystemMethod
from ovam_core.downstream.pyramid import Layout, Mlp, Pyramid, Statistics, by_grid, resized
from ovam_core.models.registry import adapter_of

if TYPE_CHECKING:
    from ovam_core.models.adapter import Pipeline

_WIDTHS = (16, 32, 64, 128)  # of the four grids, coarsest first
_MIXED = (48, 112, 240)
_WIDTH, _HEADS, _LAYERS, _HIDDEN = 512, 8, 3, 2048  # of the decoder
PATCH = 4
TRAINED_WITH = "photograph"  # in "a photograph of a <class>", the authors' training prompt


class DecoderLayer(nn.Module):
    """Self-attention, cross-attention, feed-forward, each on its own layer norm and added; no positions, no biases in
    the attention.
    """

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(_WIDTH, _HEADS, bias=False)
        self.multihead_attn = nn.MultiheadAttention(_WIDTH, _HEADS, bias=False)
        self.linear1, self.linear2 = nn.Linear(_WIDTH, _HIDDEN), nn.Linear(_HIDDEN, _WIDTH)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(_WIDTH), nn.LayerNorm(_WIDTH), nn.LayerNorm(_WIDTH)

    def forward(self, query: Tensor, memory: Tensor) -> Tensor:
        """query: `[1, 512]`; memory: `[n, 512]`."""
        normed = self.norm1(query)
        query = query + self.self_attn(normed, normed, normed, need_weights=False)[0]
        query = query + self.multihead_attn(self.norm2(query), memory, memory, need_weights=False)[0]
        return query + self.linear2(F.relu(self.linear1(self.norm3(query))))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([DecoderLayer() for _ in range(_LAYERS)])

    def forward(self, query: Tensor, memory: Tensor) -> Tensor:
        for layer in self.layers:
            query = layer(query, memory)
        return query


class GroundingModule(Pyramid):
    """The authors' module."""

    def __init__(self, layout: Layout, statistics: Statistics):
        super().__init__(layout.without_last, _WIDTHS, _MIXED, statistics)
        self.transfromer_decoder = Decoder()
        self.mlp = Mlp(_WIDTH, _WIDTH, _MIXED[-1])
        self.to_k = nn.Linear(_MIXED[-1] * PATCH**2, _WIDTH, bias=False)
        self.to_q = nn.Linear(layout.text, _WIDTH, bias=False)

    def memory(self, fused: Tensor) -> Tensor:
        """Keys of the fused features `[1, 240, h, w]`: `[h w / 16, 512]`, a row for each 4 x 4 patch."""
        return self.to_k(F.unfold(fused, PATCH, stride=PATCH)[0].T)

    def forward(self, fused: Tensor, memory: Tensor, embedding: Tensor) -> Tensor:
        """Logits `[h, w]` of one class embedding `[1, E]`, which is asked alone."""
        found = self.mlp(self.transfromer_decoder(self.to_q(embedding), memory))
        return torch.einsum("d,dhw->hw", found[0], fused[0])


class GroundedDiffusion(SystemMethod[GroundingModule]):
    """Grounded Diffusion as a method: see `SystemMethod`. Published with DDIM, 50 steps, guidance 7.5, 512 pixels.

    The mask is where the probability is over 0.5. The authors resize the fused features to 512 x 512 before the product
    with the mask's embedding; here the product is resized, which is the same, both being linear, and 240 times less.
    """

    name: ClassVar[str] = "Grounded Diffusion"
    about: ClassVar[str] = "A trained module of its authors reads the UNet's features of the last step, by the class."

    def _empty(self, layout: Layout, statistics: Statistics) -> GroundingModule:
        return GroundingModule(layout, statistics)

    def class_embedding(self, pipe: Pipeline, caption: str, word: str) -> Tensor:
        """The mean of the text encoder's outputs over the class's tokens in "a <second word> of a <class>".

        The second word is the caption's ("photo" of "a photo of a lion"). Where there is none the authors' script
        fails; ours then reads "photograph", as in their training. Their script takes the tokens from the fifth on,
        which are the class's as long as the second word is one token; ours are the class's whatever it is.
        """
        said = caption.split()
        before = f"a {said[1] if len(said) > 1 else TRAINED_WITH} of a "
        adapter = adapter_of(pipe)
        tokens, start = adapter.tokenize(before + word), len(adapter.spelled(before))
        rows = [row for row, (first, end) in enumerate(tokens.spans) if end > first >= start]
        with torch.no_grad():
            return adapter.encode(tokens)[rows].mean(dim=0, keepdim=True)

    def probabilities(self, features: Features, embeddings: Sequence[Tensor]) -> Tensor:
        grids = [torch.cat(one)[None] for one in by_grid(without_last(features.layers))]
        *_, fused = self.net.fused(grids)
        memory = self.net.memory(fused)
        logits = torch.stack([self.net(fused, memory, one) for one in embeddings])
        return resized(logits[None], features.image_size)[0].sigmoid()


def without_last(layers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The layers without the last attention, or resnet, of an up block that ends in an upsampler.

    In the authors' UNet that layer and the upsampler are one block, whose output is the upsampler's.
    """
    names = list(layers)
    followed = {before for before, after in pairwise(names) if ".upsamplers." in after}
    return {name: x for name, x in layers.items() if name not in followed}
