"""Text files as people's programs write them: UTF-8 with or without a byte order mark, UTF-16 as Windows has it."""

from __future__ import annotations

import codecs
import io
import stat
from collections.abc import Callable
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import TextIO

from ovam_core.errors import InputError

LARGEST_TEXT = 1 << 30

# Begins to read a text anew, with the line ends that `open` makes of a `newline`: None, or "" for those there are.
Opened = Callable[[str | None], TextIO]

_MARKS = {  # UTF-32's begins as UTF-16's does
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def read_text(path: Path, name: str, most: int = LARGEST_TEXT) -> str:
    """The text of a file, line ends as they stand. name: what messages call the file. most: bytes that are read.

    Raises InputError for a file that cannot be read, that is larger, or that is no text.
    """
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except (OSError, ValueError) as error:
        raise _unreadable(name, error) from None
    if len(data) > most:
        raise _too_large(name, most)
    return decoded(data, name)


def text_file(path: Path, name: str, most: int = LARGEST_TEXT) -> Opened:
    """The text of a file that is read as it is needed, as often as one likes, and never kept whole.

    What is no file of the disk, such as a pipe, can be read but once, and is. Raises InputError as `read_text`, for a
    file that is no text only where that is met.
    """
    try:
        about = path.stat()
    except (OSError, ValueError) as error:
        raise _unreadable(name, error) from None
    if not stat.S_ISREG(about.st_mode):
        return text_in_memory(read_text(path, name, most))
    if about.st_size > most:
        raise _too_large(name, most)
    with _opened(path, name) as file:
        return partial(_TextFile, path, name, _encoding(file.read(1000)))


def text_in_memory(text: str) -> Opened:
    """A text as `text_file` gives it."""
    return lambda newline: io.StringIO(text, newline=newline)


class _TextFile(io.TextIOWrapper):
    """A text file that raises InputError where it is none."""

    def __init__(self, path: Path, name: str, encoding: str, newline: str | None):
        self._called = name
        super().__init__(_opened(path, name), encoding=encoding, newline=newline)

    def __next__(self) -> str:  # type: ignore[override]  # as TextIOWrapper's own
        return self._checked(super().__next__)

    def read(self, size: int | None = -1, /) -> str:
        return self._checked(partial(super().read, size))

    def _checked(self, read: Callable[[], str]) -> str:
        try:
            return _without_zeros(read(), self._called)
        except UnicodeDecodeError:
            raise _no_text(self._called) from None
        except OSError as error:
            raise _unreadable(self._called, error) from None


def _opened(path: Path, name: str) -> BufferedReader:
    try:
        return path.open("rb")
    except OSError as error:
        raise _unreadable(name, error) from None


def decoded(data: bytes, name: str) -> str:
    """Bytes to text, without a byte order mark. Raises InputError for what is none."""
    try:
        return _without_zeros(data.decode(_encoding(data)), name)
    except UnicodeDecodeError:
        raise _no_text(name) from None


def _no_text(name: str) -> InputError:
    return InputError(f"{name} is not UTF-8 text; save it as UTF-8.")


def _unreadable(name: str, error: Exception) -> InputError:
    reason = getattr(error, "strerror", None) or "not possible"
    return InputError(f"{name} cannot be read: {reason.lower()}.")


def _too_large(name: str, most: int) -> InputError:
    return InputError(f"{name} is larger than {_size(most)}, the most that is read: split it.")


def _without_zeros(text: str, name: str) -> str:
    if "\0" in text:
        raise InputError(f"{name} is not a text file: it holds bytes of 0; save it as UTF-8 text.")
    return text


def _encoding(data: bytes) -> str:
    return next((one for mark, one in _MARKS.items() if data.startswith(mark)), None) or _unmarked(data)


def _unmarked(data: bytes) -> str:
    """UTF-16 without a mark has a byte of 0 beside each Latin letter, as no other text has."""
    start = data[:1000]
    for encoding, zeros, others in (("utf-16-le", start[1::2], start[::2]), ("utf-16-be", start[::2], start[1::2])):
        if zeros and zeros.count(0) > len(zeros) // 2 and 0 not in others:
            return encoding
    return "utf-8-sig"


def _size(count: int) -> str:
    return f"{count / 1e6:,.0f} MB" if count >= 1e6 else f"{count / 1e3:,.0f} kB"
