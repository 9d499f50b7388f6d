"""Triton kernels: attention that is summed as it is made, and never stored. fused.py says when, and launches them.

Triton is imported here and nowhere else: no requirement of ours, it comes with torch's CUDA builds for Linux. The width
d and the strides within a head are constants of each kernel: only then does Triton see where eight halves may be loaded
at once.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _product(given, exact):
    """`given @ exact`: the one as the model stored it, the other float32. float32, right to about 2^-21 of the factors.

    Halves are multiplied as halves, by the two (high and low) whose sum the float32 is; it has to lie below 65504,
    where halves end, and bits of it below 2^-24, where they start, are lost. All else goes by "tf32x3", three products
    in the tensor cores' own format: bfloat16 too, since two of them are too coarse. ("tf32" alone errs by 2^-11, "ieee"
    takes no tensor cores.)
    """
    if given.dtype == tl.float16:
        high = exact.to(tl.float16)
        low = (exact - high.to(tl.float32)).to(tl.float16)
        return tl.dot(given, high) + tl.dot(given, low)
    else:
        return tl.dot(given.to(tl.float32), exact, input_precision="tf32x3")


@triton.jit
def _probabilities(products, inside, SOFTMAX: tl.constexpr):
    """Of products `[pixels, tokens]`: softmax over the tokens that are `inside`, or a sigmoid of each."""
    if SOFTMAX:
        products = tl.where(inside[None, :], products, -float("inf"))
        powers = tl.exp(products - tl.max(products, axis=1)[:, None])
        return powers / tl.sum(powers, axis=1)[:, None]
    else:
        return 1 / (1 + tl.exp(-products))


@triton.jit
def _tile(start, row, column, rows, columns, row_stride, column_stride):
    """`[rows, columns]` from a pointer; zero where `row` or `column` is past the end."""
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = start + row.to(tl.int64)[:, None] * row_stride + column[None, :] * column_stride
    return tl.load(at, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["heads", "rows", "pairs", "together"])
def sums_forward(
    keys,
    queries,
    bounds,
    parts,
    key_step,
    query_step,
    query_head,
    heads,
    n,
    rows,
    pairs,
    together,
    query_pixel: tl.constexpr,
    query_channel: tl.constexpr,
    d: tl.constexpr,
    SOFTMAX: tl.constexpr,
    TOKENS: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Of one prompt, PIXELS pixels and `together` of all `pairs` of a step and a head: its place in `parts`.

    keys: float32 `[heads, rows, d]`, and key_step from one step's to the next's (0: the steps share them); queries:
    `[T, heads, n, d]` by strides; bounds: int32, prompt p is the rows bounds[p] to bounds[p + 1], at most TOKENS.
    parts: float32 `[ceil(pairs / together), rows, n]`. Launched over (prompts, blocks of pixels, parts).
    """
    prompt, part = tl.program_id(0), tl.program_id(2)
    first, last = tl.load(bounds + prompt), tl.load(bounds + prompt + 1)
    token = first + tl.arange(0, TOKENS)
    pixel = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.arange(0, CHANNELS)
    total = tl.zeros((PIXELS, TOKENS), tl.float32)
    for pair in range(part * together, tl.minimum(pairs, (part + 1) * together)):
        step, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
        query = queries + step * query_step + head * query_head
        query = _tile(query, pixel, channel, n, d, query_pixel, query_channel)
        key = _tile(keys + step * key_step + head * rows * d, token, channel, last, d, d, 1)
        products = _product(query, tl.trans(key))
        total += _probabilities(products, token < last, SOFTMAX)
    inside = (token < last)[None, :] & (pixel < n)[:, None]
    at = parts + (part.to(tl.int64) * rows + token)[None, :] * n + pixel[:, None]
    tl.store(at, total, mask=inside)


@triton.jit(do_not_specialize=["heads", "rows", "groups", "pixel_blocks", "blocks", "together"])
def sums_backward(
    keys,
    queries,
    bounds,
    gradient,
    parts,
    query_step,
    query_head,
    heads,
    n,
    rows,
    groups,
    pixel_blocks,
    blocks,
    together,
    query_pixel: tl.constexpr,
    query_channel: tl.constexpr,
    d: tl.constexpr,
    SOFTMAX: tl.constexpr,
    TOKENS: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Of one prompt, the keys of one head, and `together` of all `blocks` of pixels of a step: its place in `parts`.

    keys: float32 `[groups, heads, rows, d]`, groups: 1 where the steps share them, else T; gradient: float32
    `[rows, n]`; blocks: those of all steps that share keys, `pixel_blocks` each. Queries and bounds as of
    `sums_forward`. parts: float32 `[ceil(blocks / together), groups, heads, rows, d]`. Launched over
    (prompts, groups * heads, parts).
    """
    prompt, owner, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, last = tl.load(bounds + prompt), tl.load(bounds + prompt + 1)
    token = first + tl.arange(0, TOKENS)
    channel = tl.arange(0, CHANNELS)
    head = (owner % heads).to(tl.int64)
    key = _tile(keys + owner.to(tl.int64) * rows * d, token, channel, last, d, d, 1)
    total = tl.zeros((CHANNELS, TOKENS), tl.float32)
    for block in range(part * together, tl.minimum(blocks, (part + 1) * together)):
        # One of them is 0: steps share the keys of the only group, or each group has one step.
        step = (owner // heads + block // pixel_blocks).to(tl.int64)
        pixel = block % pixel_blocks * PIXELS + tl.arange(0, PIXELS)
        query = queries + step * query_step + head * query_head
        query = _tile(query, pixel, channel, n, d, query_pixel, query_channel)
        products = _product(query, tl.trans(key))
        probabilities = _probabilities(products, token < last, SOFTMAX)
        # Zero for tokens and pixels past the end, and therefore their slopes.
        weighted = probabilities * _tile(gradient, pixel, token, n, last, 1, n)
        if SOFTMAX:
            slopes = weighted - probabilities * tl.sum(weighted, axis=1)[:, None]
        else:
            slopes = weighted - probabilities * weighted
        total += _product(tl.trans(query), slopes)
    inside = (channel < d)[:, None] & (token < last)[None, :]
    start = parts + (part.to(tl.int64) * groups * heads + owner) * rows * d
    tl.store(start + token[None, :] * d + channel[:, None], total, mask=inside)


@triton.jit
def _logits(query, key, scale):
    """`scale * query @ key^T` for powers of two. Halves are multiplied as halves: exactly, and summed in float32."""
    return tl.dot(query, tl.trans(key), input_precision="tf32x3") * (scale * 1.4426950408889634)


@triton.jit
def columns_norms(
    query,
    key,
    norms,
    scale,
    n,
    d: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Of PIXELS rows of one head's attention, the logarithm (to the base of two) of what the softmax divides by.

    query, key: `[heads, n, d]`; norms: float32 `[heads, n]`. Launched over (blocks of pixels, heads).
    """
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.arange(0, CHANNELS)
    own = _tile(query + head * n * d, row, channel, n, d, d, 1)
    largest = tl.full((PIXELS,), -float("inf"), tl.float32)
    total = tl.zeros((PIXELS,), tl.float32)
    for start in range(0, n, PIXELS):
        column = start + tl.arange(0, PIXELS)
        other = _tile(key + head * n * d, column, channel, n, d, d, 1)
        logits = tl.where((column < n)[None, :], _logits(own, other, scale), -float("inf"))
        larger = tl.maximum(largest, tl.max(logits, axis=1))
        total = total * tl.exp2(largest - larger) + tl.sum(tl.exp2(logits - larger[:, None]), axis=1)
        largest = larger
    tl.store(norms + head * n + row, largest + tl.log2(total), mask=row < n)


@triton.jit(do_not_specialize=["heads", "blocks", "together"])
def columns_sums(
    query,
    key,
    norms,
    parts,
    scale,
    heads,
    n,
    blocks,
    together,
    d: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Of PIXELS columns of one head's attention, the sum over `together` of all `blocks` of rows: its place in `parts`.

    Arguments as of `columns_norms`. parts: float32 `[ceil(blocks / together), heads, n]`. Launched over
    (blocks of pixels, heads, parts).
    """
    head, part = tl.program_id(1).to(tl.int64), tl.program_id(2)
    column = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.arange(0, CHANNELS)
    own = _tile(key + head * n * d, column, channel, n, d, d, 1)
    total = tl.zeros((PIXELS, PIXELS), tl.float32)
    for block in range(part * together, tl.minimum(blocks, (part + 1) * together)):
        row = block * PIXELS + tl.arange(0, PIXELS)
        other = _tile(query + head * n * d, row, channel, n, d, d, 1)
        norm = tl.load(norms + head * n + row, mask=row < n, other=float("inf"))  # rows past the end count nothing
        total += tl.exp2(_logits(own, other, scale) - norm[None, :])
    tl.store(parts + (part * heads + head) * n + column, tl.sum(total, axis=1), mask=column < n)
