"""Rows by the steps that they are of: a cache may skip a layer at some steps, so layers differ in theirs."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Rows:
    """values: `[T, ...]`; steps: numbers of the run's calls of the denoiser, one a row, rising."""

    steps: tuple[int, ...]
    values: Tensor


def common(steps: tuple[int, ...], wanted: Collection[int]) -> tuple[int, ...]:
    """Those of `steps` that are wanted, in their order."""
    return steps if steps == wanted else tuple(step for step in steps if step in wanted)


def rows_of(values: Tensor, steps: tuple[int, ...], wanted: tuple[int, ...]) -> Tensor:
    """The rows of `values` `[T, ...]`, which are of `steps`, that are of `wanted`, some of them.

    A view where they are evenly spaced, a copy otherwise.
    """
    if steps == wanted:
        return values
    rows = [steps.index(step) for step in wanted]
    if not rows:
        return values[:0]
    apart = rows[1] - rows[0] if len(rows) > 1 else 1
    if all(b - a == apart for a, b in itertools.pairwise(rows)):
        return values[rows[0] : rows[-1] + 1 : apart]
    return values[rows]
