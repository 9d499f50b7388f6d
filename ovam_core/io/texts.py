"""Text files as people's programs write them: UTF-8 with or without a byte order mark, UTF-16 as Windows has it."""

from __future__ import annotations

import codecs
from pathlib import Path

from ovam_core.errors import InputError

LARGEST_TEXT = 1 << 30

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
        reason = getattr(error, "strerror", None) or "not possible"
        raise InputError(f"{name} cannot be read: {reason.lower()}.") from None
    if len(data) > most:
        raise InputError(f"{name} is larger than {_size(most)}, the most that is read: split it.")
    return decoded(data, name)


def decoded(data: bytes, name: str) -> str:
    """Bytes to text, without a byte order mark. Raises InputError for what is none."""
    encoding = next((one for mark, one in _MARKS.items() if data.startswith(mark)), None) or _unmarked(data)
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        raise InputError(f"{name} is not UTF-8 text; save it as UTF-8.") from None
    if "\0" in text:
        raise InputError(f"{name} is not a text file: it holds bytes of 0; save it as UTF-8 text.")
    return text


def _unmarked(data: bytes) -> str:
    """UTF-16 without a mark has a byte of 0 beside each Latin letter, as no other text has."""
    start = data[:1000]
    for encoding, zeros, others in (("utf-16-le", start[1::2], start[::2]), ("utf-16-be", start[::2], start[1::2])):
        if zeros and zeros.count(0) > len(zeros) // 2 and 0 not in others:
            return encoding
    return "utf-8-sig"


def _size(count: int) -> str:
    return f"{count / 1e6:,.0f} MB" if count >= 1e6 else f"{count / 1e3:,.0f} kB"
