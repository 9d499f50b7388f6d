"""The dense CRF: masks refined along the edges of their image, several at once in processes of their own.

SimpleCRF holds Python's lock for as long as it computes, so threads would gain nothing. The processes run `serve` and
import neither torch nor the program that started them; until they are there, and wherever they cannot be, this one does
the work itself, to the same bits.
"""

from __future__ import annotations

import atexit
import os
import queue
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from hashlib import blake2b
from typing import Any, BinaryIO

import numpy as np

from ovam_core.errors import InputError

# SimpleCRF's documented defaults: weight, position and colour widths of the appearance kernel, weight and
# width of the smoothness kernel, iterations.
CRF_PARAMETERS = (10.0, 80.0, 13.0, 3.0, 3.0, 5.0)
NO_CRF = (
    "The dense CRF needs SimpleCRF, which is not installed here: install it with "
    "`CPPFLAGS=-DNPY_IN_ARRAY=NPY_ARRAY_IN_ARRAY pip install SimpleCRF==0.2.1.1`, or switch the dense CRF off."
)

MOST_PROCESSES = 8
MOST_KEPT = 64  # refined masks, a bit a pixel

_SIZE = struct.Struct("<2I")  # height and width, before the image's bytes and the mask's bits
_START = "import sys; sys.path[:] = sys.argv[1:]; from ovam_core.attention.crf import serve; serve()"


def crf_available() -> bool:
    """Whether `densecrf` can run: SimpleCRF is an extra, since it needs a C++ compiler."""
    try:
        import denseCRF  # noqa: F401
    except ImportError:
        return False
    return True


def densecrf(mask: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Refine a mask along the edges of its image by a fully connected CRF (SimpleCRF, its documented defaults).

    mask: bool `[H, W]`; image: uint8 RGB `[H, W, 3]`. Returns bool `[H, W]`; a mask of all or nothing stays as it is.
    Raises InputError for shapes that do not go together, and where SimpleCRF is not installed.
    """
    _check_shapes(mask, image)
    try:
        import denseCRF
    except ImportError:
        raise InputError(NO_CRF) from None
    if mask.all() or not mask.any():
        return mask.astype(bool)
    inside = mask.astype(np.float32)
    unary = np.stack([1 - inside, inside], axis=-1)
    return denseCRF.densecrf(np.ascontiguousarray(image, dtype=np.uint8), unary, CRF_PARAMETERS).astype(bool)


def _check_shapes(mask: np.ndarray, image: np.ndarray) -> None:
    if mask.ndim != 2 or image.shape != (*mask.shape, 3):
        raise InputError(
            f"The mask is {list(mask.shape)} and the image {list(image.shape)}: give [H, W] and [H, W, 3]."
        )


_kept: dict[bytes, np.ndarray] = {}  # bits of refined masks by what they were made of


def densecrf_each(
    masks: Sequence[np.ndarray] | np.ndarray, image: np.ndarray, on_label: Callable[[], None] | None = None
) -> np.ndarray:
    """`densecrf` of several masks bool `[H, W]` of one image: bool `[L, H, W]`, to the bits of one after the other.

    As many at once as there are cores, and only those that were not refined of late. on_label: called before the answer
    to each, in order; it may raise to end the rest. Raises InputError as `densecrf` does.
    """
    of_image = blake2b(image.tobytes(), digest_size=16)
    keys = []
    for mask in masks:
        _check_shapes(mask, image)
        told = of_image.copy()
        told.update(repr(mask.shape).encode() + mask.astype(bool).tobytes())
        keys.append(told.digest())
    left = dict.fromkeys(key for key in keys if key not in _kept)
    pool = _pool(os.getpid()) if len(left) > 1 and crf_available() else None
    found: list[np.ndarray] = []
    waiting: dict[bytes, Future] = {}
    try:
        for number, (key, mask) in enumerate(zip(keys, masks, strict=True)):
            if on_label is not None:
                on_label()
            if not waiting and pool is not None and pool.is_up:
                rest = {key: mask for key, mask in zip(keys[number:], masks[number:], strict=True) if key not in _kept}
                waiting = {key: pool.refine(mask, image) for key, mask in rest.items()} if len(rest) > 1 else {}
            found.append(_refined(key, mask, image, waiting))
    finally:
        for one in waiting.values():
            one.cancel()
    return np.stack(found)


def _refined(key: bytes, mask: np.ndarray, image: np.ndarray, waiting: dict[bytes, Future]) -> np.ndarray:
    bits = _kept.get(key)
    if bits is None or not crf_available():
        made = waiting[key].result() if key in waiting else densecrf(mask, image)
        bits = _kept[key] = np.packbits(made)
        for old in list(_kept)[:-MOST_KEPT]:
            _kept.pop(old, None)
    return _unpacked(bits, mask.shape)


def _unpacked(bits: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    height, width = shape
    return np.unpackbits(bits, count=height * width).reshape(height, width).astype(bool)


# ------------------------------------------------------------------------------------------------ processes


class _Process:
    """A process that refines one mask at a time. Raises OSError where it cannot be, or is no more."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,  # an interrupt of the terminal is this process's to answer
        )

    def wait(self) -> None:
        """Until it is ready."""
        self._read(1)

    def refine(self, mask: np.ndarray, image: np.ndarray) -> np.ndarray:
        height, width = mask.shape
        bits = np.packbits(mask.astype(bool))
        self._pipe("stdin").write(_SIZE.pack(height, width) + image.astype(np.uint8).tobytes() + bits.tobytes())
        self._pipe("stdin").flush()
        return _unpacked(np.frombuffer(self._read(len(bits)), dtype=np.uint8), mask.shape)

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        for name in ("stdin", "stdout"):
            with suppress(OSError):  # for what was not written yet
                self._pipe(name).close()

    def _read(self, count: int) -> bytes:
        data = self._pipe("stdout").read(count)
        if len(data) < count:
            raise BrokenPipeError("a process of the dense CRF has ended")
        return data

    def _pipe(self, name: str) -> Any:
        return getattr(self._process, name)


class _Pool:
    """As many processes as cores, each with a thread that waits for it."""

    def __init__(self, count: int) -> None:
        self._free: queue.SimpleQueue[_Process | None] = queue.SimpleQueue()  # None for one that has ended
        self._all: list[_Process] = []
        self._up = 0
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="dense CRF")
        atexit.register(self._end)
        for _ in range(count):
            self._threads.submit(self._start)

    @property
    def is_up(self) -> bool:
        return self._up > 0

    def refine(self, mask: np.ndarray, image: np.ndarray) -> Future:
        return self._threads.submit(self._refine, mask, image)

    def _start(self) -> None:
        try:
            process = _Process()
            self._all.append(process)
            process.wait()
        except (OSError, ValueError):
            return
        self._free.put(process)
        self._up += 1

    def _refine(self, mask: np.ndarray, image: np.ndarray) -> np.ndarray:
        if mask.all() or not mask.any():
            return densecrf(mask, image)
        process: _Process | None = self._free.get()
        made = None
        if process is not None:
            try:
                made = process.refine(mask, image)
            except (OSError, ValueError):
                process.end()
                self._up, process = self._up - 1, None
        self._free.put(process)
        return densecrf(mask, image) if made is None else made

    def _end(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in self._all:
            process.end()


@lru_cache(maxsize=1)
def _pool(_process: int) -> _Pool | None:
    """That of this process (a fork's is its parent's no more); None where one core or no interpreter is at hand."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return _Pool(min(cores, MOST_PROCESSES)) if cores > 1 and sys.executable else None


def serve() -> None:
    """In a process of the pool: refines what comes in until nothing does."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever the library prints is no answer
    questions: BinaryIO = sys.stdin.buffer
    if not crf_available():
        return
    answers.write(b".")
    answers.flush()
    while size := questions.read(_SIZE.size):
        height, width = _SIZE.unpack(size)
        image = np.frombuffer(questions.read(height * width * 3), dtype=np.uint8).reshape(height, width, 3)
        bits = np.frombuffer(questions.read(-(-height * width // 8)), dtype=np.uint8)
        answers.write(np.packbits(densecrf(_unpacked(bits, (height, width)), image)).tobytes())
        answers.flush()
