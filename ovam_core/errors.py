"""All exceptions of the package, by what a caller does about them.

    ValueError
     └─ InputError           a person can mend it: show the sentence (gr.Error, exit status 2), keep what is already
     made
         ├─ HubUnreachable   the model is not on this machine and the hub does not answer: another model may do
         └─ OutOfMemory      the device has too little memory: something smaller may do
    Exception
     └─ Stopped              the caller asked for it: no fault

Everything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """What was handed in cannot be used. The message is one sentence: what is wrong, and what to do about it."""


class HubUnreachable(InputError):
    """The model lies not on this machine, and the hub cannot be reached."""


class OutOfMemory(InputError):
    """The device has too little memory for what was asked."""


class Stopped(Exception):
    """The caller asked to stop; `steps` denoising steps of `total` were done and no image was made."""

    def __init__(self, steps: int, total: int):
        super().__init__(f"Stopped after {steps} of {total} steps.")
        self.steps, self.total = steps, total


OUT_OF_MEMORY = (
    *("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory", "bad_alloc"),
    *("failed to map segment", "can't start new thread", "unable to allocate"),
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an accelerator, or the allocator of the CPU, had no memory left."""
    torch = sys.modules.get("torch")  # not imported for this: without it, no allocator of its own has failed
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    # torch's CPU allocator, oneDNN and the linker raise bare errors: their words are all there is to know them by.
    said = str(error).lower()
    return any(words in said for words in OUT_OF_MEMORY) or said.strip() == "could not create a primitive"


@contextmanager
def out_of_memory_as(sentence: str) -> Iterator[None]:
    """Raises OutOfMemory(sentence) in place of what an allocator raises when memory is short."""
    try:
        yield
    except Exception as error:
        if isinstance(error, InputError) or not is_out_of_memory(error):
            raise
        raise OutOfMemory(sentence) from None
