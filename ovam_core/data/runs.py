"""A run over many images, export or evaluation: its folder, the rows of what is done, its worker processes and devices.

An image is done when its row lies in the folder's state, which is written last; every file is written beside its place
and renamed, so at no instant does a name stand for half a file. A run that was killed therefore goes on where it was.
"""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import torch
from filelock import FileLock, Timeout

from ovam_core.data.layout import FOLDERS, ITEMS, LOCK, SETTINGS, STATE
from ovam_core.data.prompts import Item
from ovam_core.errors import InputError
from ovam_core.io import files
from ovam_core.io.files import write_atomically

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

LEFT_BY_SYSTEMS = (".DS_Store", "Thumbs.db", "desktop.ini")  # what file browsers put into a folder


def write_done(folder: Path, index: int, contents: dict[str, bytes], row: dict[str, Any]) -> None:
    """Writes the files of image number `index`, by path within the folder, then the row that says it is done. Raises
    OSError.
    """
    for path, data in contents.items():
        write_atomically(folder / path, data)
    state = {"row": row, "bytes": {path: len(data) for path, data in contents.items()}}
    write_atomically(folder / ITEMS / f"{index:06d}.json", _json(state))


def read_done(folder: Path, item: Item) -> dict[str, Any] | None:
    """The row of an image that is done, else None. Files that have gone, are links or have another size mean that it is
    not.
    """
    try:
        state = json.loads((folder / ITEMS / f"{item.index:06d}.json").read_bytes())
        row, sizes = state["row"], state["bytes"]
        named = {row[key] for key in ("file_name", "mask_file_name", "heatmaps") if key in row}
        whole = named <= sizes.keys() and all(_is_whole(folder, path, size) for path, size in sizes.items())
        return row if whole else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _is_whole(folder: Path, path: str, size: int) -> bool:
    status = (folder / path).lstat()
    return stat.S_ISREG(status.st_mode) and status.st_size == size and Path(path).parent.as_posix() in FOLDERS


def _json(value: Any, indent: int | None = None) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=indent) + "\n").encode()


# ------------------------------------------------------------------------------------------------ the folder


def disk_sentence(error: OSError, folder: Path | str, run: str = "export") -> str:
    """What to tell a person whose export, or other run, met an error of the file system."""
    if error.errno in NO_SPACE:
        return (
            f"The disk of '{folder}' is full; free some space and start the same {run} again, it goes on where it was."
        )
    reason = (error.strerror or str(error) or "not possible").lower()
    return f"Cannot write to '{folder}': {reason}; when that is mended, start the same {run} again."


def check_folder(folder: Path, settings: dict[str, Any], run: str = "export") -> None:
    """Raises InputError where the folder holds a run of other settings, other things, or links in the place of what a
    run makes; changes nothing.

    A folder whose run had come no further than its own folders is as good as a new one.
    """
    try:
        if not folder.exists():
            return
        if not folder.is_dir():
            raise InputError(f"'{folder}' is a file; choose a folder for the {run}.")
        check_own(folder, run)
        begun = (folder / SETTINGS).exists() and (folder / SETTINGS).stat().st_size > 0
        if not begun and not all(_is_nothing(path) for path in folder.iterdir()):
            raise InputError(f"The folder '{folder}' is not empty and holds no {run}; choose another.")
    except OSError as error:
        raise InputError(disk_sentence(error, folder, run)) from None
    if not begun:
        return
    try:
        there = json.loads((folder / SETTINGS).read_bytes())
    except (OSError, ValueError):
        raise InputError(f"The settings of the {run} in '{folder}' cannot be read; choose another folder.") from None
    if not isinstance(there, dict):
        raise InputError(f"The settings of the {run} in '{folder}' cannot be read; choose another folder.")
    for name in [*settings, *(there.keys() - settings.keys())]:
        if there.get(name) != settings.get(name):
            raise InputError(
                f"The folder '{folder}' holds an {run} with another setting of '{name.replace('_', ' ')}' "
                f"({_short(there.get(name))} there, {_short(settings.get(name))} now); use the same or another folder."
            )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _is_nothing(path: Path) -> bool:
    """Whether what lies in a folder is there before a run's first file is: its state, and its folders, still empty."""
    if path.name in FOLDERS and path.is_dir():
        return path.name == STATE or all(one.is_dir() or _is_nothing(one) for one in path.rglob("*"))
    return path.name in LEFT_BY_SYSTEMS or files.PART.fullmatch(path.name) is not None


def check_own(folder: Path, run: str = "export") -> None:
    """Raises InputError for links where a run's folders, lock and settings go: what they lead to is not the run's."""
    for name in (*FOLDERS, LOCK, SETTINGS):
        try:
            status = (folder / name).lstat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        is_folder = name in FOLDERS
        # A lock is emptied when it is taken, under all of its names.
        if stat.S_ISLNK(status.st_mode) or (name == LOCK and status.st_nlink > 1):
            raise InputError(
                f"'{folder / name}' is a link, which an {run} does not follow; take it away, or choose another folder."
            )
        if not (stat.S_ISDIR if is_folder else stat.S_ISREG)(status.st_mode):
            kind = "folder" if is_folder else "file"
            raise InputError(
                f"'{folder / name}' is in the place of a {kind} of the {run}; take it away, or choose another folder."
            )


def clear_parts(folder: Path) -> None:
    """Takes away files that were being written when a process was killed."""
    for name in ("", *FOLDERS):
        files.clear_parts(folder / name)


@contextmanager
def locked(folder: Path, run: str = "export"):
    """Holds the folder, made if need be, for this process; the lock goes with the process, however it ends.

    Raises InputError where another run is going on in the folder, and where it cannot be made.
    """
    lock = FileLock(folder / LOCK)
    try:
        check_own(folder, run)
        (folder / STATE).mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(
            f"Another {run} is running in '{folder}'; wait for its end or choose another folder."
        ) from None
    except OSError as error:
        raise InputError(disk_sentence(error, folder, run)) from None
    try:
        yield
    finally:
        lock.release()


QUEUE = 3  # jobs a worker has before it, at most: what is made waits in memory


def cores() -> int:
    """The CPU cores of this machine that this process may use, whatever OMP_NUM_THREADS says."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))


@dataclass(frozen=True)
class Process:
    """Which of how many processes this one is. wait: returns when all of them have called it."""

    rank: int = 0
    ranks: int = 1
    wait: Callable[[], None] = field(default=lambda: None, repr=False)


@contextmanager
def repeatable(threads: int | None) -> Iterator[None]:
    """The threads of the settings, and cuDNN without its search for the fastest algorithm, which may end
    differently.
    """
    flags = torch.backends.cudnn
    before = (flags.deterministic, flags.benchmark, torch.get_num_threads())
    flags.deterministic, flags.benchmark = True, False
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        flags.deterministic, flags.benchmark = before[:2]
        torch.set_num_threads(before[2])


# ------------------------------------------------------------------------------------------------ workers


def worker_count(ranks: int) -> int:
    """One worker keeps up with a CPU, whose cores make images; a GPU leaves its host's cores free."""
    return min(4, max(1, (os.cpu_count() or 1) // ranks - 1))


@contextmanager
def process_pool(workers: int) -> Iterator[Executor]:
    """An executor of processes; of none, for 0. After an error nothing more is begun."""
    pool = _processes(workers) if workers > 0 else _Here()
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _processes(workers: int) -> ProcessPoolExecutor:
    pool = ProcessPoolExecutor(workers, mp_context=_context(), initializer=_begin_worker)
    # Starts them while the first image is being made: a fork server answers only when its imports are done.
    threading.Thread(target=_start, args=(pool,), daemon=True).start()
    return pool


def _start(pool: ProcessPoolExecutor) -> None:
    with suppress(RuntimeError):  # shut down before it began
        pool.submit(os.getpid)


# A fork of this process would inherit its CUDA context and the locks of its threads; a fork server is a clean process
# that imports once for all workers.
KIND = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
CONTEXT: Any = type(multiprocessing.get_context(KIND))


class Worker(CONTEXT.Process):
    """A process that does not run the script that starts it once more, as Python's own do: its jobs need nothing of it,
    and a script without `if __name__ == "__main__":` would begin its export anew in each.
    """

    def start(self) -> None:
        script = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            super().start()
        finally:
            sys.modules["__main__"] = script


class Workers(CONTEXT):
    """The context of `Worker`."""

    Process = Worker


def _context() -> multiprocessing.context.BaseContext:
    context = Workers()
    if KIND == "forkserver":
        context.set_forkserver_preload([__name__])
    return context


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    if hasattr(os, "nice"):
        os.nice(5)  # never in the way of the generation
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    """A killed parent takes its workers along: they would wait for jobs for ever."""
    wait_for([sentinel])
    os._exit(1)


class _Here(Executor):
    """Runs jobs at once, in this process."""

    def submit(self, function: Callable, /, *arguments: Any, **named: Any) -> Future:
        future: Future = Future()
        try:
            future.set_result(function(*arguments, **named))
        except Exception as error:
            future.set_exception(error)
        return future


# ------------------------------------------------------------------------------------------------ many devices


def launched(device: str | None) -> tuple[Process, str | None]:
    """This process's place among those of `accelerate launch`, and its device; (the only one, device) without it."""
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        return Process(), device
    from accelerate import PartialState

    asked = device or os.environ.get("OVAM_DEVICE")
    on_cpu = asked == "cpu" or not torch.cuda.is_available()
    # The first process may wait long for the last: shares are equal in number, not in time.
    state = PartialState(cpu=on_cpu, timeout=timedelta(days=30))
    own = Process(state.process_index, state.num_processes, state.wait_for_everyone)
    return own, "cpu" if on_cpu else str(state.device)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def digest_of_file(path: Path) -> str:
    """`digest` of what a file holds; "" for one that cannot be read: who reads it says so better."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except OSError:
        return ""
