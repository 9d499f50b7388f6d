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

from ovam_core.dataset import zip_folder


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
    """One export folder a visitor, thread safe."""

    def __init__(self, keep: float, clock: Callable[[], float] = time.monotonic):
        self.keep, self.clock = keep, clock
        self._jobs: dict[str, _Job] = {}
        self._lock = threading.Lock()

    def folder(self, owner: str, about: str) -> Path:
        """The visitor's folder for an export described by `about`: the one there is, to go on, or a new, empty one."""
        self.sweep()
        with self._lock:
            job = self._jobs.get(owner)
            if job is None or job.about != about:
                if job is not None:
                    shutil.rmtree(job.folder, ignore_errors=True)
                job = self._jobs[owner] = _Job(about, Path(tempfile.mkdtemp(prefix="ovam-export-")))
            job.used = self.clock()
            return job.folder / "dataset"

    def pack(self, owner: str) -> Path:
        """All of the visitor's data set in one zip beside it."""
        with self._lock:
            self._jobs[owner].used = self.clock()
            home = self._jobs[owner].folder
        target = home / "dataset.zip"
        zip_folder(home / "dataset", target)
        return target

    def drop_owner(self, owner: str) -> None:
        """Frees the disk of a visitor who has left."""
        with self._lock:
            job = self._jobs.pop(owner, None)
        if job is not None:
            shutil.rmtree(job.folder, ignore_errors=True)

    def sweep(self) -> None:
        """Frees the disk of exports that nobody came back to."""
        with self._lock:
            old = [owner for owner, job in self._jobs.items() if job.used <= self.clock() - self.keep]
        for owner in old:
            self.drop_owner(owner)
