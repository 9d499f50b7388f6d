"""What an attention layer projects, a head at a time: cut, normalised and turned as the model does it."""

from __future__ import annotations

from typing import Protocol

from einops import rearrange
from torch import Tensor, nn

Turn = tuple[Tensor, Tensor]  # cosines and sines `[n, d]` by which a rotary embedding turns queries and keys


class Attention(Protocol):
    """An attention layer of diffusers, as far as it is read here. Not every kind has every attribute."""

    heads: int
    scale: float
    is_cross_attention: bool
    norm_cross: nn.Module | None
    to_q: nn.Linear
    to_k: nn.Module
    to_v: nn.Module
    to_out: nn.ModuleList
    norm_q: nn.Module | None
    norm_k: nn.Module | None


def by_head(projected: Tensor, heads: int, norm: nn.Module | None = None) -> Tensor:
    """`[b, n, heads * d]` to `[b, heads, n, d]`; norm: the layer's own of a head's `d` channels, where it has one."""
    return normed(rearrange(projected, "b n (h d) -> b h n d", h=heads), norm)


def normed(x: Tensor, norm: nn.Module | None) -> Tensor:
    """Queries or keys of any shape after their own norm, where the layer has one."""
    return x if norm is None else norm(x)


def rotated(x: Tensor, turn: Turn | None) -> Tensor:
    """Queries or keys `[b, heads, n, d]` turned by their position (RoFormer, arXiv 2104.09864), channels in pairs.

    None leaves them as they are. Made in float32, returned in the dtype of `x`.
    """
    if turn is None:
        return x
    cosines, sines = (part.to(x.device) for part in turn)
    real, imaginary = rearrange(x, "b h n (d pair) -> pair b h n d", pair=2)
    quarter_turn = rearrange([-imaginary, real], "pair b h n d -> b h n (d pair)")
    return (x.float() * cosines + quarter_turn.float() * sines).to(x.dtype)
