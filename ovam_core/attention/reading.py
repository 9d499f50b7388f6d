"""How a text was read: by what it is known that words are asked of a picture as its own prompt was read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ovam_core.errors import InputError

# What moving weights, rounding them and unfusing a LoRA may change in them, as a share of their length.
MAX_WEIGHT_CHANGE = 0.004


@dataclass(frozen=True, eq=False)
class Reading:
    """The settings that a text was read with, and the text encoders that read it.

    clip_skip: how many of CLIP's last layers were left out, None for none. lora_scale: of the text encoders' LoRA
    layers, None for 1. parts: names of their matrices and of the LoRA layers in use, none where no encoder was loaded.
    numbers: a few of each, float32 `[parts, n]`, on the CPU; NaN where they could not be read. rounding: of the dtype
    that they are stored in.
    """

    clip_skip: int | None = None
    lora_scale: float | None = None
    parts: tuple[str, ...] = ()
    numbers: Tensor | None = None
    rounding: float = 0.0

    def is_same(self, other: Reading) -> bool:
        """Whether texts are read the same to the last bit; never so where a number of either could not be read."""
        if self.numbers is None or other.numbers is None:
            return False
        told = self.clip_skip, self.lora_scale, self.parts
        return told == (other.clip_skip, other.lora_scale, other.parts) and torch.equal(self.numbers, other.numbers)

    def check_same(self, other: Reading) -> None:
        """Raises InputError where words of the `other` reading are not read as the prompt was."""
        known = self.parts and other.parts
        if known and (self.parts != other.parts or _has_changed(self, other)):
            raise InputError(
                "The text encoder is no longer the one that read the prompt of this picture (a LoRA was loaded, set, "
                "fused or unloaded, or other weights were loaded over it): put it back, or make the picture again."
            )
        for name, then, now in (
            ("clip_skip", self.clip_skip or 0, other.clip_skip or 0),
            ("a LoRA scale", _scale(self), _scale(other)),
        ):
            if then != now:
                raise InputError(
                    f"The words were read with {name} of {now:g} and the prompt of this picture with {then:g}: read "
                    "them within `with read_as(recording.reading):`."
                )


def check_reading(then: Reading | None, readings: list[Reading | None]) -> None:
    """Raises InputError as `Reading.check_same`; None is not known, as of an embedding that was not read."""
    if then is not None:
        for one in {id(x): x for x in readings if x is not None}.values():
            then.check_same(one)


def _scale(reading: Reading) -> float:
    return 1.0 if reading.lora_scale is None else reading.lora_scale


def _has_changed(first: Reading, second: Reading) -> bool:
    if first.numbers is None or second.numbers is None:
        return False
    most = max(MAX_WEIGHT_CHANGE, 4 * first.rounding, 4 * second.rounding)
    change = torch.linalg.vector_norm(first.numbers - second.numbers, dim=1)
    return bool((change > most * torch.linalg.vector_norm(first.numbers, dim=1)).any())  # never so of NaN
