"""Self-attention as a matrix, and maps spread along it: iSeg (arXiv 2409.03209), Dataset Diffusion (arXiv 2309.14303)
and FA-Seg.

The matrix of a grid is recorded on request alone (`hooks.recorder.record`, keep="matrix"): its memory grows with the
square of the pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ovam_core.errors import InputError

MAX_MATRIX_PIXELS = 9216  # of a grid whose matrix is recorded: 96 x 96, 340 MB; a grid of 64 x 64 has 67 MB
PAPER_GRID = 64  # of the papers' models
# Attention values (float32) made at once. On a CPU they should stay in cache.
MATRIX_VALUES = {"cpu": 1 << 19, "other": 1 << 26}


@dataclass(frozen=True, eq=False)
class Affinity:
    """The mean self-attention of one grid over all its layers, heads and recorded steps that the model
    recommends.

    matrix: float32 `[n, n]`, n = height * width, row-major; its rows, one an attending pixel, sum to one.
    """

    height: int
    width: int
    matrix: Tensor

    def to(self, device: torch.device | str) -> Affinity:
        return replace(self, matrix=self.matrix.to(device))


def check_size(height: int, width: int) -> None:
    """Raises InputError for a grid whose matrix would be too large to record."""
    n = height * width
    if n > MAX_MATRIX_PIXELS:
        side = math.isqrt(MAX_MATRIX_PIXELS)
        raise InputError(
            f"The self-attention matrix of a grid of {height} x {width} would take {4 * n * n / 1e9:.1f} GB: make the "
            f"picture smaller, so that its finest grid has at most {side} x {side}, or choose another method."
        )


@torch.no_grad()
def add_attention(total: Tensor, query: Tensor, key: Tensor, scale: float) -> None:
    """Adds a layer's self-attention, the mean of its heads, to `total` float32 `[n, n]`, in place.

    query, key: `[heads, n, d]`. Made in blocks of rows: beside `total`, MATRIX_VALUES exist at a time.
    """
    n = query.shape[1]
    rows = max(1, MATRIX_VALUES["cpu" if query.device.type == "cpu" else "other"] // n)
    with torch.autocast(query.device.type, enabled=False):
        key = (key.float() * scale).mT.contiguous()
        for queries, keys in zip(query, key, strict=True):
            for first in range(0, n, rows):
                block = (queries[first : first + rows].float() @ keys).softmax(dim=-1)
                total[first : first + rows].add_(block, alpha=1 / len(query))


@torch.no_grad()
def add_linear_attention(total: Tensor, query: Tensor, key: Tensor) -> None:
    """The same of linear attention (Sana): weights relu(q) . relu(k) over their sum."""
    with torch.autocast(query.device.type, enabled=False):
        for queries, keys in zip(query.relu().float(), key.relu().float(), strict=True):
            norms = (queries @ keys.sum(dim=0)).clamp_min(1e-15)
            total.addmm_(queries / norms[:, None], keys.mT, alpha=1 / len(query))


def sharpened(matrix: Tensor, entropy: float) -> Tensor:
    """iSeg's matrix of less entropy: each column over its maximum, `x + entropy * log10(e * x)`, negative values cut,
    rows that sum to one. entropy: 0.015 on VOC in the published code, 0.002 on Context, 0.2 on COCO; e: Euler's number.

    matrix: float `[n, n]`, 0 or more. Returns float32 of the same shape; a row that is left with nothing stays 0.
    """
    shares = matrix.float() / matrix.amax(dim=0).clamp_min(torch.finfo(torch.float32).tiny)
    logs = torch.where(shares > 0, torch.log10(math.e * shares.clamp_min(torch.finfo(torch.float32).tiny)), 0)
    kept = shares.add_(logs, alpha=entropy).clamp_(min=0)
    return kept / kept.sum(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def refined(maps: Tensor, matrix: Tensor, rounds: int) -> Tensor:
    """iSeg's rounds: maps multiplied by the matrix of `sharpened`, their minimum subtracted, scaled; again and again.

    maps: float32 `[L, h, w]`; matrix `[h * w, h * w]`. Returns float32 in [0, 1], minimum 0 and maximum 1 each.
    """
    return _repeated(maps, matrix, rounds, each=_from_zero)


def iseg(maps: Tensor, matrix: Tensor, rounds: int) -> Tensor:
    """`refined` with the rounds of the papers' grid of 64 x 64, in proportion on others: 8 are 2 on 16 x 16."""
    return refined(maps, matrix, max(1, round(rounds * max(maps.shape[1:]) / PAPER_GRID)))


def spread(maps: Tensor, matrix: Tensor, power: int) -> Tensor:
    """Maps multiplied by a power of the matrix, then from 0 to 1 each: 4 in Dataset Diffusion, 2 in FA-Seg.

    Shapes as in `refined`. The power of the matrix is never made: it is applied to the maps, one factor at a time.
    """
    return _repeated(maps, matrix, power, each=lambda values: values)


def _repeated(maps: Tensor, matrix: Tensor, times: int, each) -> Tensor:
    values = each(maps.flatten(1).float().mT)
    for _ in range(times):
        values = each(matrix.to(values) @ values)
    return _from_zero(values).mT.reshape(maps.shape)


def _from_zero(values: Tensor) -> Tensor:
    """`[n, L]` scaled to [0, 1] over n; what is constant becomes 0."""
    values = values - values.amin(dim=0)
    return values / values.amax(dim=0).clamp_min(torch.finfo(torch.float32).tiny)
