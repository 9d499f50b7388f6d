"""Row 4: column sums of self-attention against materialised attention, and other ways to get them without it."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from benchmarks.speed.common import Bench, Line, assert_same, megabytes, peak_bytes, race, ratio_line
from ovam_core.attention.self_attention import column_sums


@torch.no_grad()
def self_attention(bench: Bench) -> list[Line]:
    others = {"the gradient of V": by_gradient, "two fused passes": by_two_passes}
    functions = {"materialised": materialised, "column_sums": column_sums} | others
    lines = []
    for name, side, heads, d in bench.sizes.grids:
        generator = torch.Generator(bench.device).manual_seed(0)
        draw = partial(torch.randn, (heads, side * side, d), generator=generator, device=bench.device)
        query, key = draw().to(bench.dtype), draw().to(bench.dtype)
        sides = {label: partial(function, query, key, d**-0.5) for label, function in functions.items()}
        expected = sides["materialised"]()
        assert_same(sides["column_sums"](), expected, rtol=1e-4, atol=1e-3)
        for other in others:
            assert_same(sides[other](), expected, rtol=1e-2 if bench.on_gpu else 1e-4, atol=1e-3)
        times = race(bench, sides, bench.sizes.rounds)
        peaks = {label: megabytes(peak_bytes(bench, call)) for label, call in sides.items()}
        for numerator in ("materialised", *others):
            note = f"peak memory {peaks[numerator]} and {peaks['column_sums']}"
            what = f"{name}, {heads} heads of {d}"
            lines.append(ratio_line(bench, 4, what, times, numerator, "column_sums", "", note))
    return lines


def materialised(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """The column sums of the whole `[heads, n, n]` attention."""
    products = query.float() @ rearrange(key.float(), "h n d -> h d n")
    return torch.softmax(products * scale, dim=-1).sum(dim=(0, 1))


def by_gradient(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """The gradient of the attention's summed output with respect to V: the fused kernel's own backward."""
    with torch.enable_grad():
        values = torch.zeros_like(key).requires_grad_()
        output = F.scaled_dot_product_attention(query[None], key[None], values[None], scale=scale)
        (gradient,) = torch.autograd.grad(output.sum(), values)
    return gradient[..., 0].float().sum(dim=0)


def by_two_passes(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Two forward passes of the fused kernel, of which only the logarithms of the sums are taken.

    The first gives each row's, l_i = log sum_j exp(s_ij). Then log sum_i exp(s_ij - l_i) is that of an attention in
    the other direction, with -l_i carried by two more columns: float16 holds it as a high and a low part.
    """
    rows = _log_sums(query, key, scale) / -scale
    high = rows.to(query.dtype)
    low = (rows - high.float()).to(query.dtype)
    ones = torch.ones_like(high)
    pad = query.new_zeros(*high.shape, 6)  # the kernel takes multiples of 8
    swapped_key = torch.cat([query, high[..., None], low[..., None], pad], dim=-1)
    swapped_query = torch.cat([key, ones[..., None], ones[..., None], pad], dim=-1)
    return _log_sums(swapped_query, swapped_key, scale).exp().sum(dim=0)


def _log_sums(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """log sum_j exp(scale * q_i . k_j), float32 `[heads, n]`."""
    name = "_scaled_dot_product_flash_attention" + ("" if query.is_cuda else "_for_cpu")
    kernel = getattr(torch.ops.aten, name)
    return kernel(query[None], key[None], key[None], scale=scale)[1][0].float()
