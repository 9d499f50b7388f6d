"""What all events share: how they are wired, what a client sent, and what is said when something goes wrong."""

from __future__ import annotations

import functools
import html
import inspect
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component

from ovam_core.errors import InputError, Stopped

# The values of an event come as the client sent them, for `Inputs` to read. Gradio's own reading of a field fails
# without a sentence on text for a number or on no list; and what one puts in its place at a component is gone as soon
# as the component is updated in a visitor's session.
RAW = {"preprocess": False}
PRIVATE = {"api_visibility": "private", **RAW}  # no part of the API
QUIET = {"show_progress": "hidden", **PRIVATE}  # without a progress bar of Gradio's
CHECKS = {"concurrency_id": "checks", "concurrency_limit": 4}  # uploads that are decoded at the same time
MODEL = {"concurrency_id": "model", "concurrency_limit": 1}  # one at a time has the model

OUR_FAULT = "Something went wrong on our side. Please try again."

logger = logging.getLogger("ovam")


# ------------------------------------------------------------------------------------------ what goes wrong


@contextmanager
def _said() -> Iterator[None]:
    """An InputError, or a run that was stopped, as a message of the page; any other exception as our fault, its
    traceback in the log alone.
    """
    try:
        yield
    except gr.Error:
        raise
    except (InputError, Stopped) as error:
        # Gradio renders HTML, and the sentence may quote the visitor.
        raise gr.Error(html.escape(str(error), quote=False), print_exception=False) from None
    except Exception:
        logger.exception("A handler of the page failed.")
        raise gr.Error(OUR_FAULT, print_exception=False) from None


def handler(function: Callable) -> Callable:
    """Wraps what an event calls, a generator too, so that each fault becomes one sentence on the page."""
    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def generate(*values: Any, **more: Any) -> Iterator[Any]:
            with _said():
                yield from function(*values, **more)

        return generate

    @functools.wraps(function)
    def call(*values: Any, **more: Any) -> Any:
        with _said():
            return function(*values, **more)

    return call


def give_back(run: Any, start: gr.Button, halt: gr.Button) -> None:
    """After a run: it can be started again, and there is nothing to stop. The page of Gradio 6 does not come to `then`
    where a run has failed.
    """
    for after in (run.then, run.failure):
        after(_idle, None, [start, halt], queue=False, **QUIET)


def _idle() -> tuple[gr.Button, gr.Button]:
    return gr.Button(interactive=True), gr.Button(interactive=False)


# ----------------------------------------------------------------------------------------- what a client sent


class Inputs:
    """The values of an event by component, as JSON brought them: anything may stand anywhere.

    Says what is no number, no text, no list or no choice; ranges are checked with the settings that are made of them.
    """

    def __init__(self, values: Mapping[Component, Any]):
        self._values = values

    def number(self, field: gr.Number | gr.Slider) -> int | float | None:
        """A finite number, or None where a number's field was left empty. Raises InputError for all else."""
        value = self._values[field]
        if value is None and isinstance(field, gr.Number):
            return None
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise InputError(f"{field.label} is {str(value)[:40]}; give a number.")
        return value

    def whole(self, field: gr.Number | gr.Slider) -> int | float | None:
        """The same, an int where it is one. Raises InputError for a part in a field of whole numbers."""
        value = self.number(field)
        if isinstance(value, float) and value.is_integer():
            return int(value)
        if isinstance(value, float) and getattr(field, "precision", None) == 0:
            raise InputError(f"{field.label} is {value}; give a whole number.")
        return value

    def text(self, field: gr.Textbox) -> str:
        """Text; "" for none."""
        value = self._values[field]
        return "" if value is None else str(value)

    def ticked(self, field: gr.Checkbox) -> bool:
        return bool(self._values[field])

    def choice(self, field: gr.Radio) -> Any:
        """One of the choices. Raises InputError for any other."""
        value, choices = self._values[field], [choice for _, choice in field.choices]
        if value not in choices:
            raise InputError(f"There is no choice '{str(value)[:40]}'; choose {' or '.join(map(str, choices))}.")
        return value

    def names(self, field: gr.Dropdown, sentence: str) -> list[Any]:
        """A list, empty for none; what is in it is not checked. Raises InputError(sentence) for anything else."""
        value = self._values[field]
        if not isinstance(value, list | None):
            raise InputError(sentence)
        return value or []

    def several(self, field: gr.CheckboxGroup) -> list[Any]:
        """What is ticked; no list is the same as none."""
        value = self._values[field]
        return value if isinstance(value, list) else []

    def file(self, field: gr.File | gr.Image | gr.UploadButton) -> str | None:
        """The path of an upload; None for none. Raises InputError for any other path of the server: of pictures, Gradio
        does not look where they lie.
        """
        value = self._values[field]
        path = value.get("path") if isinstance(value, dict) else None
        if path is None:
            return None
        if not Path(path).resolve().is_relative_to(Path(field.GRADIO_CACHE).resolve()):
            raise InputError("This is no file that was uploaded here; upload it.")
        return path
