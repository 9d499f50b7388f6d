"""What is kept of one generated image, or of a photograph's passes: enough for the heatmap of any word afterwards."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ovam_core.attention.text_stream import TextStream
from ovam_core.errors import InputError

Branch = Literal["conditional", "unconditional", "all"]
BRANCHES = get_args(Branch)


@dataclass(frozen=True, eq=False)
class LayerQueries:
    """What one cross-attention layer asked, for one image.

    queries: `[T, heads, n, d]`, n = height * width, row-major, in the storage dtype; normalised and rotated where the
    model does so.
    keys: the model's own way from embedding to keys, `[L, embed_dim]` -> `[L, heads * d]` (`to_k` in a UNet); None
    where they come from the recording's text stream.
    scale: factor of the products before the softmax, 1 / sqrt(d) (Eq. 3).
    """

    name: str
    height: int
    width: int
    queries: Tensor
    keys: nn.Module | None
    scale: float

    @property
    def resolution(self) -> int:
        """The larger side of the layer's grid."""
        return max(self.height, self.width)


@dataclass(frozen=True, eq=False)
class LayerColumnSums:
    """How much attention each pixel received in one self-attention layer: float32 `[T, height * width]`.

    Summed over heads and over the pixels that attend, so each row of `sums` adds up to heads * n.
    """

    name: str
    height: int
    width: int
    sums: Tensor


@dataclass(frozen=True, eq=False)
class Recording:
    """All that is needed to ask for the heatmap of any word of one generated image.

    height, width: size of the heatmaps, the largest attention grid of the run (64 x 64 for SD 1.5 at 512 px).
    image_size: (height, width) of the image in pixels.
    timesteps: the scheduler's timestep of each kept step; step_indices: its number in the run, from 0. A step is
    one call of the denoiser: second-order schedulers (Heun, KDPM2) and PNDM call it more often than
    `num_inference_steps`.
    stream: with joint attention, what carries words to their keys; None with cross-attention. Its tensors are up to
    twice the size of the queries.
    The keys come from the pipeline's own layers: an adapter loaded or unloaded afterwards changes the maps.
    """

    layers: tuple[LayerQueries, ...]
    column_sums: tuple[LayerColumnSums, ...]
    timesteps: tuple[int, ...]
    step_indices: tuple[int, ...]
    height: int
    width: int
    image_size: tuple[int, int]
    embed_dim: int
    branch: Branch
    stream: TextStream | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held by the queries, the column sums and the text stream."""
        tensors = [x.queries for x in self.layers] + [x.sums for x in self.column_sums]
        held = sum(x.numel() * x.element_size() for x in tensors)
        return held if self.stream is None else held + self.stream.nbytes

    @property
    def resolutions(self) -> tuple[int, ...]:
        """The larger grid side of the recorded layers, each once, from the largest down."""
        return tuple(sorted({x.resolution for x in self.layers}, reverse=True))

    def select(
        self,
        steps: Iterable[int] | None = None,
        layers: Iterable[str] | None = None,
        resolutions: Iterable[int] | None = None,
    ) -> Recording:
        """The same recording with only some steps, layers or resolutions.

        steps: step numbers of the run (members of `step_indices`); layers: names or parts of names;
        resolutions: larger grid sides. None keeps all. Evenly spaced steps are views of the same memory, others
        are copied. Column sums follow `steps` only. The heatmap size stays.
        Raises InputError when nothing is left.
        """
        kept = named(self.layers, layers, lambda x: x.name)
        if resolutions is not None:
            wanted = set(resolutions)
            kept = [x for x in kept if x.resolution in wanted]
        if not kept:
            choice = f"the resolutions {', '.join(map(str, self.resolutions))}"
            if layers is not None:
                choice += f" and the layers {', '.join(x.name for x in self.layers)}"
            raise InputError(f"No recorded layer matches: choose among {choice}.")
        stream = None if self.stream is None else self.stream.up_to([x.name for x in kept])
        if steps is None:
            return replace(self, layers=tuple(kept), stream=stream)

        wanted = set(steps)
        rows = [row for row, index in enumerate(self.step_indices) if index in wanted]
        if not rows:
            raise InputError(f"None of these steps was recorded: choose among {_ranges(self.step_indices)}.")
        return replace(
            self,
            layers=tuple(replace(x, queries=_take_rows(x.queries, rows)) for x in kept),
            column_sums=tuple(replace(x, sums=_take_rows(x.sums, rows)) for x in self.column_sums),
            timesteps=tuple(self.timesteps[row] for row in rows),
            step_indices=tuple(self.step_indices[row] for row in rows),
            stream=None if stream is None else stream.each(lambda x: _take_rows(x, rows)),
        )

    def to(self, device: torch.device | str) -> Recording:
        """The same recording with its tensors on `device`. The model's layers stay where they are."""
        return replace(
            self,
            layers=tuple(replace(x, queries=x.queries.to(device)) for x in self.layers),
            column_sums=tuple(replace(x, sums=x.sums.to(device)) for x in self.column_sums),
            stream=None if self.stream is None else self.stream.each(lambda x: x.to(device)),
        )


def named(items: Iterable, parts: Iterable[str] | str | None, name_of: Callable[[Any], str]) -> list:
    """Those of `items` whose name contains one of `parts` (None: any); the mid block only when a part says so."""
    # A lone string is one name, not an iterable of letters.
    parts = [parts] if isinstance(parts, str) else [""] if parts is None else list(parts)

    def wanted(name: str) -> bool:
        return any(part in name and ("mid_block" in part or "mid_block" not in name) for part in parts)

    return [x for x in items if wanted(name_of(x))]


def _take_rows(x: Tensor, rows: list[int]) -> Tensor:
    """Rows of `x`: a view where they are evenly spaced, a copy otherwise."""
    step = rows[1] - rows[0] if len(rows) > 1 else 1
    if all(b - a == step for a, b in itertools.pairwise(rows)):
        return x[rows[0] : rows[-1] + 1 : step]
    return x[rows]


def _ranges(indices: tuple[int, ...]) -> str:
    return f"{indices[0]} to {indices[-1]}" if len(indices) > 1 else str(indices[0])
