"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ovam_core.errors import InputError


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A name in the same folder to write to; at the end it takes the place of `path`. Nothing is left of a block that fails."""
    part = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        yield part
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise


def write(path: Path, data: bytes) -> None:
    """Writes beside and renames. Raises OSError."""
    with beside(path) as part:
        part.write_bytes(data)


def make_folder(folder: str | Path) -> Path:
    """The folder, made if need be. Raises InputError if it cannot be made or written to."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"'{folder}' is, or lies in, a file: give a folder.") from None
    except OSError as error:
        reason = error.strerror or "not possible"
        raise InputError(f"Cannot write to the folder '{folder}': {reason.lower()}.") from None
    return folder
