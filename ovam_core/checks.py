"""Ranges and kinds of values that people and programs hand in: what is wrong is one sentence."""

from __future__ import annotations

import math
from typing import Any

from ovam_core.errors import InputError

MAX_PROMPT = 2000  # characters, before the text encoder's own limit is looked at
MAX_SEED = 2**32 - 1
TIMESTEPS = (100,)  # of 1000: the noise on photographs, as GoCA takes for SD 1.5, SDXL and PixArt


def check_text(name: str, value: Any, limit: int) -> None:
    if not isinstance(value, str):
        raise InputError(f"{name} is not text.")
    if len(value) > limit:
        raise InputError(f"{name} has {len(value):,} characters; at most {limit:,} are allowed.")


def check_whole(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InputError(f"{name} is {value}; choose a whole number from {low} to {high}.")


def check_number(name: str, value: Any, low: float, high: float) -> None:
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not real or not math.isfinite(value) or not low <= value <= high:
        raise InputError(f"{name} is {value}; choose a number from {low:g} to {high:g}.")
