"""The address of the page: what makes a picture and what is asked of it, as names and texts, and back."""

from __future__ import annotations

import json
import re
from collections.abc import Container, Mapping
from typing import Any

from ovam_core.errors import InputError

MAX_LINK = 6000  # characters, as of the addresses that browsers and servers take

NO_LINK = "The address of this page cannot be read; the page starts anew."


def written(values: Mapping[str, Any], usual: Mapping[str, Any], always: Container[str] = ()) -> dict[str, str]:
    """The values that are not the usual ones, and those of the names in `always`, as texts.

    values, usual: text, numbers, yes or no, or lists of texts without commas, by name.
    """
    return {name: _text(value) for name, value in values.items() if name in always or value != usual[name]}


def read(text: str, usual: Mapping[str, Any]) -> dict[str, Any]:
    """The values of an address as JSON, `{"seed": "3", ...}`; the usual ones for those that it lacks.

    Each is read as what its usual one is. Names that are not known are passed over, as addresses collect strangers'
    parts. Raises InputError for what cannot be read.
    """
    try:
        given = json.loads(text) if len(text) <= MAX_LINK else None
    except (ValueError, RecursionError):
        given = None
    if not isinstance(given, dict):
        raise InputError(NO_LINK)
    return {name: _read(name, given[name], kind) if name in given else kind for name, kind in usual.items()}


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float):
        return f"{value:.6f}".rstrip("0").rstrip(".")  # never 1e-05
    return ",".join(value) if isinstance(value, list | tuple) else str(value)


def _read(name: str, text: Any, usual: Any) -> Any:
    if not isinstance(text, str):
        raise InputError(NO_LINK)
    if isinstance(usual, bool):
        return text == "1"
    if isinstance(usual, int | float):
        if not re.fullmatch(r"-?\d{1,12}(\.\d{1,12})?", text, re.ASCII):
            raise InputError(f"In the address of this page {name} is '{text[:40]}'; give a number.")
        return float(text) if isinstance(usual, float) or "." in text else int(text)
    return [part for part in text.split(",") if part] if isinstance(usual, list) else text
