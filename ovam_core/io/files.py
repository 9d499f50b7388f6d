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
def atomic_path(path: Path) -> Iterator[Path]:
    """A name in the same folder to write to; at the end of the block it takes the place of `path`.

    Nothing is left of a block that fails. Raises OSError.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        yield part
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file that others see whole, or as it was before. Raises OSError."""
    with atomic_path(path) as part:
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


def shipped_folder(name: str) -> Path:
    """Where "models" or "tokens" that come with the package lie: beside it in a checkout, within it when installed."""
    package = Path(__file__).resolve().parents[1]
    beside = package.parent / name
    # Another package may have a folder of this name in site-packages.
    return beside if (beside / "emoji-voc").is_dir() else package / "shipped" / name
