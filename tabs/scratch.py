"""Where the page keeps what is not to stay: a folder of each process, which goes with it.

What was killed without a word left its folder behind; the next start clears it away, and nobody else's.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from filelock import FileLock, Timeout

from ovam_core.errors import InputError

PREFIX = "ovam-page-"
LOCK = ".lock"  # beside the folder, held for as long as its process lives
ANSWER_FOLDER = "answer-"  # how the names of those begin that hold the files of one answer
TRIES = 10  # to clear files away while others come


@contextmanager
def own_folder() -> Iterator[Path]:
    """The folder for all temporary files of this process, Gradio's cache included; removed at the end of the block.

    Before, the folders of processes that live no more are removed. Raises InputError where none can be made.
    """
    base = Path(os.environ.get("GRADIO_TEMP_DIR") or tempfile.gettempdir())
    try:
        base.mkdir(parents=True, exist_ok=True)
        sweep(base)
        lock = _new_lock(base)
        folder = Path(lock.lock_file).with_suffix("")
        folder.mkdir(mode=0o700)
    except OSError as error:
        reason = (error.strerror or "not possible").lower()
        raise InputError(f"No temporary folder can be made in '{base}': {reason}; set TMPDIR to another.") from None
    try:
        with _in_use(folder):
            yield folder
    finally:
        _remove(folder)
        lock.release()
        Path(lock.lock_file).unlink(missing_ok=True)


def sweep(base: Path) -> None:
    """Removes the folders of own processes that live no more: nobody holds their locks."""
    for path in base.glob(f"{PREFIX}*{LOCK}"):
        with suppress(OSError, Timeout):
            # Only plain files of one's own: in a folder of everybody, others could lay a link there.
            about = path.lstat()
            if path.is_symlink() or not path.is_file() or about.st_uid != _user(about.st_uid):
                continue
            with FileLock(path, timeout=0):
                _remove(path.with_suffix(""))
                path.unlink(missing_ok=True)


def is_own(folder: Path) -> bool:
    """Whether a folder lies in that of a process, where nobody else has files."""
    return any(part.startswith(PREFIX) for part in folder.parts)


def _user(otherwise: int) -> int:
    return os.getuid() if hasattr(os, "getuid") else otherwise


def _new_lock(base: Path) -> FileLock:
    """Another start may sweep the file away before it is locked: only a lock that is still there will do."""
    while True:
        lock = FileLock(base / f"{PREFIX}{secrets.token_hex(6)}{LOCK}")
        with suppress(Timeout):
            lock.acquire(timeout=0)
            if Path(lock.lock_file).exists():
                return lock
            lock.release()


def _remove(folder: Path) -> None:
    if folder.is_dir() and not folder.is_symlink():
        for _ in range(2):  # a thread may have made one more file meanwhile
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _in_use(folder: Path) -> Iterator[None]:
    """Python's temporary files, child processes' and Gradio's cache in the folder."""
    names = ("TMPDIR", "TEMP", "TMP", "GRADIO_TEMP_DIR")
    before, tempdir = {name: os.environ.get(name) for name in names}, tempfile.tempdir
    os.environ.update(dict.fromkeys(names, str(folder)) | {"GRADIO_TEMP_DIR": str(folder / "gradio")})
    tempfile.tempdir = str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = tempdir
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def patient(clear_files: Callable[[Any, int | None], None]) -> Callable[[Any, int | None], None]:
    """Gradio's function that deletes a page's files of more than `age` seconds, such that it never fails: its hourly
    task would end for good. It goes through sets that uploads are added to meanwhile. Folders of answers go, too, once
    their files have gone.
    """

    def clear(page: Any, age: int | None) -> None:
        for _ in range(TRIES):
            try:
                clear_files(page, age)
                break
            except (RuntimeError, OSError):
                time.sleep(0.1)
        _remove_empty(Path(page.GRADIO_CACHE), age or 0)

    return clear


def _remove_empty(cache: Path, age: int) -> None:
    """Of the folders of answers those in which nothing was changed for `age` seconds."""
    for folder in cache.glob(f"{ANSWER_FOLDER}*"):
        with suppress(OSError):  # it is not empty, or gone
            if time.time() - folder.stat().st_mtime >= age:
                folder.rmdir()


def trim_memory() -> None:
    """Hands back to the system what was freed and glibc keeps for later, pictures that were decoded say; other
    allocators do so by themselves.
    """
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM, and a terminal that was closed, end the block as an error would: what is to be cleared away is. What the
    process was started to ignore, as by nohup, it goes on to ignore.
    """

    def end(_number: int, _frame: FrameType | None) -> None:
        for name in names:  # a second one must not interrupt the clearing
            signal.signal(name, signal.SIG_IGN)
        sys.exit(0)

    known = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    names = [name for name in known if signal.getsignal(name) != signal.SIG_IGN]
    before = {name: signal.signal(name, end) for name in names}
    try:
        yield
    finally:
        for name, was in before.items():
            signal.signal(name, was)
