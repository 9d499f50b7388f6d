"""Exports of visitors on the server's disk: one folder each, within bounds, gone when finished and fetched or left."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ovam_core.data.formats import zip_folder


@dataclass(frozen=True)
class Limits:
    """What one visitor's export may cost. seconds: of one run; a stopped one goes on where it was."""

    prompts: int
    images: int
    megabytes: int
    seconds: float
    keep: float = 3600.0  # seconds that a data set waits for its visitor


HOSTED = Limits(prompts=200, images=200, megabytes=500, seconds=600)
LOCAL = Limits(prompts=20_000, images=20_000, megabytes=20_000, seconds=24 * 3600.0, keep=24 * 3600.0)


def limits() -> Limits:
    """Those of a shared Space, which sets SPACE_ID, or of one's own machine."""
    return HOSTED if os.environ.get("SPACE_ID") else LOCAL


@dataclass
class _Job:
    about: str
    folder: Path
    used: float = field(default_factory=time.monotonic)


class Jobs:
    """One export folder a visitor, or on one's own machine one an export; thread safe.

    keep: seconds that a folder waits. shared: visitors are one person, who finds a half-made export again after a
    reload of the page, and whose exports do not go with a page that is closed.
    """

    def __init__(self, keep: float, shared: bool = False, clock: Callable[[], float] = time.monotonic):
        self.keep, self.shared, self.clock = keep, shared, clock
        self._jobs: dict[str, _Job] = {}
        self._lock = threading.Lock()

    def folder(self, owner: str, about: str) -> Path:
        """The visitor's folder for an export described by `about`: the one there is, to go on, or a new, empty one."""
        self.sweep()
        key = about if self.shared else owner
        with self._lock:
            job = self._jobs.get(key)
            if job is None or job.about != about:
                if job is not None:
                    shutil.rmtree(job.folder, ignore_errors=True)
                job = self._jobs[key] = _Job(about, Path(tempfile.mkdtemp(prefix="ovam-export-")))
            job.used = self.clock()
            return job.folder / "dataset"

    def pack(self, folder: Path) -> Path:
        """All of the data set of `folder` in one zip beside it."""
        with self._lock:
            for job in self._jobs.values():
                if job.folder == folder.parent:
                    job.used = self.clock()
        target = folder.parent / "dataset.zip"
        zip_folder(folder, target)
        return target

    def drop_owner(self, owner: str) -> None:
        """Frees the disk of a visitor who has left."""
        if not self.shared:
            self._drop(owner)

    def _drop(self, key: str) -> None:
        with self._lock:
            job = self._jobs.pop(key, None)
        if job is not None:
            shutil.rmtree(job.folder, ignore_errors=True)

    def sweep(self) -> None:
        """Frees the disk of exports that nobody came back to."""
        with self._lock:
            old = [key for key, job in self._jobs.items() if job.used <= self.clock() - self.keep]
        for key in old:
            self._drop(key)
