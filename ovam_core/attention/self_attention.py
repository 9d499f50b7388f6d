"""Self-attention received by each pixel (the sums of Eq. 8), of softmax and of linear attention."""

from __future__ import annotations

import functools

import torch
from einops import rearrange
from torch import Tensor

from ovam_core.attention.kernels import fused

# One block of softmax rows in `column_sums`. On a CPU it should stay in cache.
COLUMN_BLOCK_BYTES = {"cpu": 2 << 20, "other": 128 << 20}


def column_sums(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Attention received by each pixel, summed over heads and attending pixels (Eq. 8): float32 `[n]`.

    query, key: `[heads, n, d]`. The `[n, n]` attention is made in blocks of rows: the peak is about two blocks
    of COLUMN_BLOCK_BYTES (at least one row) in float32, 4 MiB on a CPU; all heads of a 64 x 64
    grid at once would be 512 MiB. On a GPU with Triton none of it is stored.
    """
    plain = functools.partial(_column_sums, query, key, scale)
    return fused.column_sums(query, key, scale, plain) if fused.serves_columns(query, key) else plain()


def _column_sums(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """`column_sums` in plain PyTorch: float32 `[n]` of `[heads, n, d]` in any floating dtype."""
    n = query.shape[1]
    block_bytes = COLUMN_BLOCK_BYTES["cpu" if query.device.type == "cpu" else "other"]
    rows = max(1, min(n, block_bytes // (4 * n)))
    total = torch.zeros(n, dtype=torch.float32, device=query.device)
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        key = rearrange(key.float() * scale, "h n d -> h d n").contiguous()
        # A head at a time: a product of many rows of one head takes half the time of one of few rows of all of them.
        for queries, keys in zip(query, key, strict=True):
            for block in queries.split(rows):
                total += torch.softmax(block.float() @ keys, dim=-1).sum(dim=0)
    return total


def linear_column_sums(query: Tensor, key: Tensor) -> Tensor:
    """The same for linear attention (Sana, arXiv 2410.10629): weights relu(q) . relu(k) / its sum over keys.

    query, key: `[heads, n, d]`. Returns float32 `[n]`; linear in n, no `[n, n]` attention is made.
    """
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        query, key = query.relu().float(), key.relu().float()
        norms = torch.einsum("h n d, h d -> h n", query, key.sum(dim=1))
        attending = (query / (norms[..., None] + 1e-15)).sum(dim=1)
        return torch.einsum("h n d, h d -> n", key, attending)
