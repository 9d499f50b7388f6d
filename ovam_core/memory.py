"""Memory that is short: however an allocator says it, one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an accelerator, or the allocator of the CPU, had no memory left."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    said = str(error).lower()
    return any(words in said for words in ("out of memory", "can't allocate memory", "not enough memory"))


@contextmanager
def short_memory_says(sentence: str) -> Iterator[None]:
    """Raises ValueError(sentence) in place of what an allocator raises when memory is short."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch's CPU allocator knows no better than RuntimeError
        if not is_out_of_memory(error):
            raise
        raise ValueError(sentence) from None
