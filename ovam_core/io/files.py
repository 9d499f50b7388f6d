"""Files that are there whole or not at all, and names as other systems write them."""

from __future__ import annotations

import os
import re
import secrets
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

from ovam_core.errors import InputError

PART = re.compile(r"\.ovam-\d+-[0-9a-f]{16}\.part")  # a file that is being written


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A new, empty file in the same folder to write to; at the end of the block it takes the place of `path`.

    What is there under the name `path`, a link included, is replaced and never written to. Nothing is left of a block
    that fails. Raises OSError.
    """
    part = path.with_name(f".ovam-{os.getpid()}-{secrets.token_hex(8)}.part")  # no longer than any file's name
    os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield part
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise


def write_atomically(path: Path, data: bytes | Iterable[bytes]) -> None:
    """Writes a file, whole or piece by piece, that others see whole, or as it was before. Raises OSError."""
    with atomic_path(path) as part, part.open("wb") as file:
        file.writelines([data] if isinstance(data, bytes) else data)


def clear_parts(folder: Path) -> None:
    """Takes away what `atomic_path` was writing in this folder when its process was killed, and nothing else."""
    with suppress(OSError):
        for file in list(folder.iterdir()):
            if PART.fullmatch(file.name):
                file.unlink()


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
        raise InputError(f"Cannot write to the folder '{_shown(folder)}': {reason.lower()}.") from None
    return folder


def check_file_name(path: Path) -> None:
    """Raises InputError where no file of this name can be written: known before the work is done, not after it."""
    make_folder(path.parent)
    try:
        if path.is_dir():
            raise InputError(f"'{path}' is a folder: give the name of a file.")
        if not path.exists():
            path.open("xb").close()
            path.unlink()
    except OSError as error:
        reason = (error.strerror or "not possible").lower()
        raise InputError(f"Cannot write the file '{_shown(path)}': {reason}.") from None


def _shown(path: Path) -> str:
    """A path as messages show it, long names cut."""
    return str(path) if len(str(path)) < 200 else f"{str(path)[:200]}..."


def find_file(folder: Path, names: Sequence[str]) -> Path | None:
    """The file of the first of these names that there is; None where there is none.

    A name that is not there stands for the file that differs from it by case, or by how letters with marks are put
    together, alone: systems differ in what they take for the same name.
    """
    for name in names:
        if (folder / name).is_file():
            return folder / name
    try:
        there = _listed(folder, folder.stat().st_mtime_ns)
    except OSError:
        return None
    return next((folder / there[key] for name in names if (key := _key(name)) in there), None)


@lru_cache(maxsize=8)
def _listed(folder: Path, _changed: int) -> dict[str, str]:
    """The files' names in a folder, as it was when it was last changed, by what they have in common with others."""
    return {_key(entry.name): entry.name for entry in os.scandir(folder) if entry.is_file()}


def _key(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def shipped_folder(name: str) -> Path:
    """Where "models" or "tokens" that come with the package lie: beside it in a checkout, within it when installed."""
    package = Path(__file__).resolve().parents[1]
    beside = package.parent / name
    # Another package may have a folder of this name in site-packages.
    return beside if (beside / "emoji-voc").is_dir() else package / "shipped" / name
