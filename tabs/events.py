"""What all events share: how they are wired, what a client sent, and what is said when something goes wrong."""

from __future__ import annotations

import errno
import functools
import inspect
import logging
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component

from ovam_core.errors import InputError, Stopped, is_out_of_memory

from .sentences import OUR_FAULT, shown

# The values of an event come as the client sent them, for `Inputs` to read. Gradio's own reading of a field fails
# without a sentence on text for a number or on no list; and what one puts in its place at a component is gone as soon
# as the component is updated in a visitor's session.
RAW = {"preprocess": False}
PRIVATE = {"api_visibility": "private", **RAW}  # no part of the API
QUIET = {"show_progress": "hidden", **PRIVATE}  # without a progress bar of Gradio's
DECODED = 4  # uploads at the same time
CHECKS = {"concurrency_id": "checks", "concurrency_limit": DECODED}
# Gradio serves first what came first: works wait in tabs/turns.py instead, where visitors take turns.
MODEL = {"concurrency_id": "model", "concurrency_limit": 64}
MAPS = {"concurrency_id": "maps", "concurrency_limit": 64}
THREADS = 192  # of the server: for those that wait, and still some for what must not wait, as Stop

NO_ROOM = "The server's disk is full; please try again later."
NO_MEMORY = "The server has too little memory for this now; ask for less, or try again later."
NOT_UPLOADED = "This is no file that was uploaded here; upload it."
NO_ROOM_CODES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LETTERBOX = "letterbox"  # class of components that hand mails to the page's script
MAX_CHARS = 20_000  # of all texts in a value that a client sends
MAX_ITEMS = 1000  # of lists and objects in it, one in another counted, too
MAX_DEPTH = 8  # of lists in lists
MAX_NUMBER = 1e15  # beside which a float still knows whole numbers

logger = logging.getLogger("ovam")


# ------------------------------------------------------------------------------------------ what goes wrong


@contextmanager
def said() -> Iterator[None]:
    """An InputError, a run that was stopped, a full disk or a lack of memory as a message of the page; any other
    exception as our fault, its traceback in the log alone.
    """
    try:
        yield
    except gr.Error:
        raise
    except Exception as error:
        raise gr.Error(_sentence(error), print_exception=False) from None


def _sentence(error: Exception) -> str:
    first: BaseException = error
    while not isinstance(first, InputError) and first.__cause__ is not None:  # Gradio's own are raised from others'
        first = first.__cause__
    if isinstance(first, InputError | Stopped):
        return shown(str(first))
    if is_disk_full(first):
        return NO_ROOM
    if is_out_of_memory(first):
        return NO_MEMORY
    logger.error("A handler of the page failed.", exc_info=error)
    return OUR_FAULT


def is_disk_full(error: BaseException) -> bool:
    """Whether a file could not be written for want of room, or of the right to more of it."""
    if isinstance(error, OSError) and error.errno in NO_ROOM_CODES:
        return True
    said = str(error)  # libraries that write by themselves, safetensors say, have exceptions of their own
    return any(os.strerror(code) in said for code in NO_ROOM_CODES)


def handler(function: Callable) -> Callable:
    """Wraps what an event calls, a generator too, so that each fault becomes one sentence on the page."""
    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def generate(*values: Any, **more: Any) -> Iterator[Any]:
            with said():
                yield from function(*values, **more)

        return generate

    @functools.wraps(function)
    def call(*values: Any, **more: Any) -> Any:
        with said():
            return function(*values, **more)

    return call


# ------------------------------------------------------------------------------------------ what the page hears


def letterbox(script: str, function: str) -> gr.HTML:
    """A component that is never seen: each mail that it is given, a dict, goes once to this function of this script of
    the page, now or once that is there.

    What JavaScript draws in is no component of Gradio's: that would be rendered anew with every value.
    """
    give = f"""let last = null;
const give = () => {{
  const mail = props.value;
  if (!mail || mail.stamp === last) return;  // of a run, Gradio sends the last one twice
  if (!window.{script}) return setTimeout(give, 50);
  last = mail.stamp;
  window.{script}.{function}(mail);
}};
watch('value', give);
give();"""
    return gr.HTML(None, html_template="", js_on_load=give, visible="hidden", elem_classes=LETTERBOX)


def stamped(fields: Sequence[Any], values: Any) -> Any:
    """What an event gives to its fields, each mail with a stamp of its own: else the page would not hear of one that is
    like the last.
    """
    if len(fields) == 1:
        return _stamped(fields[0], values)
    if not isinstance(values, list | tuple):
        return values  # Gradio says that these are too few, as below
    return [_stamped(field, value) for field, value in zip(fields, values, strict=False)]


def _stamped(field: Any, value: Any) -> Any:
    is_mail = LETTERBOX in (getattr(field, "elem_classes", None) or ()) and isinstance(value, dict)
    return value | {"stamp": secrets.token_hex(8)} if is_mail and "__type__" not in value else value


# ----------------------------------------------------------------------------------------- what a client sent


def check_values(fields: Sequence[Any], values: Sequence[Any], most: Mapping[int, int]) -> None:
    """Raises InputError, one sentence, for values that are too few or too large, and for files that are no uploads.

    most: characters that may be sent for a component, by its id, where it is more than MAX_CHARS.
    """
    if len(values) < len(fields):
        raise InputError(f"This call takes {len(fields)} values and {len(values)} came; send all of them.")
    for field, value in zip(fields, values, strict=False):
        _check_value(field, value, most.get(field._id, MAX_CHARS))
        if isinstance(field, gr.Dataset) and not (isinstance(value, int) and 0 <= value < len(field.raw_samples)):
            raise InputError("There is no such example; choose one of the list.")  # Gradio's own handler reads it


def _check_value(field: Any, value: Any, most: int) -> None:
    name, items, chars, left = _name(field), 0, 0, [(value, 0)]
    while left:
        one, depth = left.pop()
        items += 1
        if items + len(left) > MAX_ITEMS or depth > MAX_DEPTH:
            raise InputError(f"{name} is a list of too many things; at most {MAX_ITEMS:,} can be sent.")
        if isinstance(one, str):
            chars += len(one)
            if chars > most:
                raise InputError(f"{name} has {chars:,} characters; at most {most:,} can be sent.")
        elif isinstance(one, list):
            left += [(part, depth + 1) for part in one[: MAX_ITEMS + 1]]
        elif isinstance(one, dict):
            if "path" in one:
                uploaded(field, one)
            left += [(part, depth + 1) for part in [*one, *one.values()][: MAX_ITEMS + 1]]


def uploaded(field: Any, value: dict[str, Any]) -> str | None:
    """The path of an upload, as Gradio describes it; None for none. Raises InputError for any other path of the server
    and for addresses, which Gradio would fetch.
    """
    path = value.get("path")
    if path is None:
        return None
    try:
        inside = isinstance(path, str) and Path(path).resolve().is_relative_to(Path(field.GRADIO_CACHE).resolve())
        there = inside and Path(path).is_file()
    except (OSError, ValueError, RuntimeError):  # no path at all
        inside = there = False
    if not inside:
        raise InputError(NOT_UPLOADED)
    if not there:
        raise InputError("The file is not on the server any more; upload it again.")
    return path


def quoted(value: Any) -> str:
    """What was sent, for a sentence: short, whatever it is."""
    if isinstance(value, str):
        return value[:40]
    if value is None or isinstance(value, bool | float):
        return str(value)
    if isinstance(value, int):
        return str(value) if abs(value) < 10**40 else "a number of more than 40 digits"
    return "a list" if isinstance(value, list) else "an object"


def _name(field: Any) -> str:
    return getattr(field, "label", None) or "What was sent"


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
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= MAX_NUMBER:
            raise InputError(f"{_name(field)} is {quoted(value)}; give a number.")
        return value

    def whole(self, field: gr.Number | gr.Slider) -> int | float | None:
        """The same, an int where it is one. Raises InputError for a part in a field of whole numbers."""
        value = self.number(field)
        if isinstance(value, float) and value.is_integer():
            return int(value)
        if isinstance(value, float) and getattr(field, "precision", None) == 0:
            raise InputError(f"{_name(field)} is {value}; give a whole number.")
        return value

    def text(self, field: gr.Textbox | gr.Radio) -> str:
        """Text; "" for none, a number as it is written. Raises InputError for all else, and halves of characters."""
        value = self._values[field]
        if value is None:
            return ""
        written = isinstance(value, str) or (isinstance(value, int | float) and abs(value) <= MAX_NUMBER)
        if isinstance(value, bool) or not written:
            raise InputError(f"{_name(field)} is {quoted(value)}; write text.")
        if not isinstance(value, str):
            return quoted(value)
        return _whole_characters(_name(field), value)

    def ticked(self, field: gr.Checkbox) -> bool:
        """Whether it is ticked; not for None. Raises InputError for all else."""
        value = self._values[field]
        if not isinstance(value, bool | None):
            raise InputError(f"{_name(field)} is {quoted(value)}; give true or false.")
        return bool(value)

    def choice(self, field: gr.Radio) -> Any:
        """One of the choices. Raises InputError for any other."""
        value, choices = self._values[field], [choice for _, choice in field.choices]
        if value not in choices:
            raise InputError(f"There is no choice '{quoted(value)}'; choose {' or '.join(map(str, choices))}.")
        return value

    def names(self, field: gr.Dropdown, sentence: str) -> list[str]:
        """A list of texts, empty for none. Raises InputError(sentence) for anything else."""
        value = self._values[field]
        if not isinstance(value, list | None) or not all(isinstance(name, str) for name in value or ()):
            raise InputError(sentence)
        return [_whole_characters(_name(field), name) for name in value or ()]

    def several(self, field: gr.CheckboxGroup) -> list[str]:
        """What is ticked, each once; none for None. Raises InputError for what is none of the choices."""
        value, choices = self._values[field], [choice for _, choice in field.choices]
        if value is None:
            return []
        unknown = [one for one in value if one not in choices] if isinstance(value, list) else [value]
        if unknown:
            raise InputError(f"{_name(field)}: there is no '{quoted(unknown[0])}'; choose among {', '.join(choices)}.")
        return list(dict.fromkeys(value))

    def file(self, field: gr.File | gr.Image | gr.UploadButton) -> str | None:
        """The path of an upload; None for none. Raises InputError for anything else, other paths of the server too: of
        pictures, Gradio does not look where they lie.
        """
        value = self._values[field]
        if value is None:
            return None
        if not isinstance(value, dict):
            raise InputError(NOT_UPLOADED)
        return uploaded(field, value)


def _whole_characters(name: str, text: str) -> str:
    """Raises InputError for halves of surrogate pairs, which no encoding can write."""
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise InputError(f"{name} holds characters that are not Unicode: write it in UTF-8.")
    return text
