"""Attention summed as it is made, on a GPU: when the kernels of programs.py are used, their launch, and the way back.

The plain forms (heatmap.py, self_attention.py) stay what they are: the reference, and the way wherever a kernel cannot
go.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Result = TypeVar("Result")

# Pixels of a block, and the fewest tokens of one: what a matrix product of the tensor cores takes.
PIXELS, FEWEST = 64, 16
# Tokens of a prompt and values of its keys at most, both sides padded to powers of two: the keys lie in the shared
# memory of one processor, and the probabilities of a block in its registers.
MOST_TOKENS, MOST_VALUES = 128, 128 * 128
# The same of one pixel's query or key in self-attention, with what they are multiplied as.
MOST_CHANNEL_BYTES = 512
BYTES = {torch.float16: 2, torch.bfloat16: 2, torch.float32: 4}
# Programs that fill a GPU of up to about 150 processors some times over, so that the last ones do not wait for long.
PROGRAMS = 1024

# Kinds of launch that failed in this process.
_failed: set[tuple] = set()


def serves(keys: Tensor, queries: Tensor, sizes: Sequence[int] | None) -> bool:
    """Whether `ProbabilitySums` can take these: on one NVIDIA GPU (Ampere or newer) with Triton, no prompt too long.

    Older GPUs lack the number format of the kernels' products and would be slower than by the plain form.
    """
    if keys.device.type == "cpu":
        return False
    tokens, channels = _tile(sizes, queries.shape[-1])
    same = queries.device == keys.device and keys.dtype == torch.float32
    return same and _runs(keys.device) and tokens <= MOST_TOKENS and tokens * channels <= MOST_VALUES


class ProbabilitySums(torch.autograd.Function):
    """Sum over steps and heads of each prompt's softmax of `keys @ queries^T`: float32 `[rows, n]`.

    keys: float32 `[heads, rows, d]`, or `[T, heads, rows, d]` where each step has its own; queries: `[T, heads, n, d]`
    in any floating dtype, however strided, no gradient. sizes: rows of each prompt, one after the other; None: each row
    is on its own and gets a sigmoid. plain: the same of (keys, queries) without kernels, for where they fail.
    No probability is stored; the backward makes them again. Sums are made in the same order in every run.
    """

    @staticmethod
    def forward(ctx, keys: Tensor, queries: Tensor, sizes: Sequence[int] | None, plain: Callable) -> Tensor:
        ctx.save_for_backward(keys)
        # Not among the saved: autograd refuses tensors of a run under inference_mode.
        ctx.queries, ctx.sizes, ctx.plain = queries, sizes, plain
        return _attempt(
            ("sums", *_tile(sizes, queries.shape[-1])),
            lambda: _sums(keys.contiguous(), queries, sizes),
            lambda: plain(keys, queries),
        )

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        (keys,), queries, sizes = ctx.saved_tensors, ctx.queries, ctx.sizes
        total = _attempt(
            ("gradient", *_tile(sizes, queries.shape[-1])),
            lambda: _gradient(keys.contiguous(), queries, sizes, gradient.contiguous()),
            lambda: _plain_gradient(keys, queries, ctx.plain, gradient),
        )
        return total, None, None, None


def serves_columns(query: Tensor, key: Tensor) -> bool:
    """Whether `column_sums` can take these: of one dtype, on one GPU as of `serves`, no head too wide."""
    same = key.device == query.device and key.dtype == query.dtype and query.dtype in BYTES
    return same and _runs(query.device) and _power_of_two(query.shape[-1]) * BYTES[query.dtype] <= MOST_CHANNEL_BYTES


def column_sums(query: Tensor, key: Tensor, scale: float, plain: Callable[[], Tensor]) -> Tensor:
    """The sum over heads and rows of `softmax(scale * query @ key^T)`, no gradient: float32 `[n]`.

    query, key: `[heads, n, d]` in one dtype of BYTES. plain: the same without kernels, for where they
    fail. The attention is made twice, a block at a time: first for what each row is divided by, then for the sums.
    """
    kind = "columns", query.dtype, _power_of_two(query.shape[-1])
    return _attempt(kind, lambda: _column_sums(query, key, scale), plain)


def _column_sums(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Launches the two kernels of `column_sums`: float32 `[n]` of `[heads, n, d]`."""
    from ovam_core.attention.kernels.programs import columns_norms, columns_sums

    heads, n, d = query.shape
    channels = _power_of_two(d)
    blocks = _ceil(n, PIXELS)
    parts, together = _shares(blocks, blocks * heads)
    norms = torch.empty(heads, n, dtype=torch.float32, device=query.device)
    out = norms.new_empty(parts, heads, n)
    query, key = query.contiguous(), key.contiguous()
    cut = {"d": d, "PIXELS": PIXELS, "CHANNELS": channels} | _room(PIXELS * channels * BYTES[query.dtype])
    with torch.cuda.device_of(query):
        columns_norms[blocks, heads](query, key, norms, scale, n, **cut)
        columns_sums[blocks, heads, parts](query, key, norms, out, scale, heads, n, blocks, together, **cut)
    return out.sum(dim=(0, 1))


def _sums(keys: Tensor, queries: Tensor, sizes: Sequence[int] | None) -> Tensor:
    """Launches the forward kernel: float32 `[rows, n]` of what the class says."""
    from ovam_core.attention.kernels.programs import sums_forward

    steps, heads, n, _ = queries.shape
    rows = keys.shape[-2]
    bounds = _bounds(_prompts(sizes, rows), keys.device)
    prompts, blocks, pairs = len(bounds) - 1, _ceil(n, PIXELS), steps * heads
    parts, together = _shares(pairs, prompts * blocks)
    out = keys.new_empty(parts, rows, n)
    key_step = keys.stride(0) if keys.ndim == 4 else 0
    with torch.cuda.device_of(keys):
        sums_forward[prompts, blocks, parts](
            keys,
            queries,
            bounds,
            out,
            key_step,
            *queries.stride()[:2],
            heads,
            n,
            rows,
            pairs,
            together,
            **_constants(queries, sizes),
        )
    return out.sum(dim=0)


def _gradient(keys: Tensor, queries: Tensor, sizes: Sequence[int] | None, gradient: Tensor) -> Tensor:
    """Launches the backward kernel: the gradient to keys, in their shape, of one `[rows, n]` to the sums; float32."""
    from ovam_core.attention.kernels.programs import sums_backward

    steps, heads, n, _ = queries.shape
    rows = keys.shape[-2]
    bounds = _bounds(_prompts(sizes, rows), keys.device)
    groups = steps if keys.ndim == 4 else 1
    prompts, pixel_blocks = len(bounds) - 1, _ceil(n, PIXELS)
    blocks = steps // groups * pixel_blocks
    parts, together = _shares(blocks, prompts * groups * heads)
    # Slopes are multiplied as two halves each: the largest, at most half of the gradient's, lies near their upper end.
    factor = 2**15 / gradient.abs().amax().clamp(min=1e-30)
    out = keys.new_empty(parts, *keys.shape)
    with torch.cuda.device_of(keys):
        sums_backward[prompts, groups * heads, parts](
            keys,
            queries,
            bounds,
            gradient * factor,
            out,
            *queries.stride()[:2],
            heads,
            n,
            rows,
            groups,
            pixel_blocks,
            blocks,
            together,
            **_constants(queries, sizes),
        )
    return out.sum(dim=0) / factor


def _plain_gradient(keys: Tensor, queries: Tensor, plain: Callable, gradient: Tensor) -> Tensor:
    """The same by autograd through the plain form."""
    with torch.enable_grad():
        keys = keys.detach().requires_grad_()
        return torch.autograd.grad(plain(keys, queries), keys, gradient)[0]


@functools.cache
def _runs(device: torch.device) -> bool:
    """Whether the kernels are compiled for this device: CUDA of compute capability 8 at least, with Triton."""
    if device.type != "cuda" or torch.version.hip is not None or find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _attempt(kind: tuple, launch: Callable[[], Result], plain: Callable[[], Result]) -> Result:
    """What `launch` gives, or, where that kind of launch fails or has failed, what `plain` gives. Warns once."""
    if kind not in _failed:
        try:
            return launch()
        except torch.OutOfMemoryError:  # the plain form needs more
            raise
        except Exception as error:  # no compiler, a GPU with less shared memory, ...: Triton has many names for it
            if not _failed:
                warnings.warn(
                    f"The fused kernels cannot run here ({type(error).__name__}: {error}); the plain form is used, "
                    "with the same results in more time.",
                    stacklevel=2,
                )
            _failed.add(kind)
    return plain()


def _tile(sizes: Sequence[int] | None, d: int) -> tuple[int, int]:
    """(tokens, channels) of a block of keys, powers of two: the longest prompt fits."""
    return _power_of_two(max(sizes or [FEWEST])), _power_of_two(d)


def _constants(queries: Tensor, sizes: Sequence[int] | None) -> dict[str, int]:
    """What both kernels of `sums` are compiled for: strides and width of the queries, tile sizes, room."""
    tokens, channels = _tile(sizes, queries.shape[-1])
    pixel, channel = queries.stride()[2:]
    strides = {"query_pixel": pixel, "query_channel": channel, "d": queries.shape[-1]}
    cut = {"SOFTMAX": sizes is not None, "TOKENS": tokens, "PIXELS": PIXELS, "CHANNELS": channels}
    return strides | cut | _room(tokens * channels * 4)


def _prompts(sizes: Sequence[int] | None, rows: int) -> tuple[int, ...]:
    """Rows of each prompt; of each block of rows, where they are on their own."""
    if sizes is not None:
        return tuple(sizes)
    return tuple(min(FEWEST, rows - start) for start in range(0, rows, FEWEST))


@functools.lru_cache(maxsize=64)
def _bounds(prompts: tuple[int, ...], device: torch.device) -> Tensor:
    """First row of each prompt, and the end: int32. Kept, for an optimisation asks for the same thousands of times."""
    return torch.tensor([0, *prompts], device=device).cumsum(0).to(torch.int32)


def _shares(items: int, programs: int) -> tuple[int, int]:
    """(parts, items of a part): as many parts as make about PROGRAMS of `programs`, each with an item at least."""
    together = _ceil(items, _ceil(PROGRAMS, programs))
    return _ceil(items, together), together


def _room(size: int) -> dict[str, int]:
    """Warps of a program, and blocks of `size` bytes that it has under way: large ones leave no room for the next."""
    return {"num_warps": 4, "num_stages": 3} if size <= 8 << 10 else {"num_warps": 8, "num_stages": 1}


def _power_of_two(size: int) -> int:
    return max(FEWEST, 1 << (size - 1).bit_length())


def _ceil(size: int, block: int) -> int:
    return -(-size // block)
