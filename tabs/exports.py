"""The exports that the server keeps: what each is to make, whole, the folder it is made in, and whose it is.

What an export is to make stays with it, so that it goes on without the page that asked for it. The folders lie among
the files that Gradio serves: an image of one, or its zip, has an address that only who was told it knows.
"""

from __future__ import annotations

import hashlib
import json
import math
import secrets
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Protocol
from urllib.parse import quote

from gradio.utils import get_upload_folder

from ovam_core.data.export import ExportSettings
from ovam_core.data.formats import zip_folder
from ovam_core.data.prompts import Work
from ovam_core.errors import InputError

NEVER = math.inf
MOST = 1000  # exports without images, of everybody together
GONE = "This export is not kept any more; start it anew."
WAIT = 0.1  # seconds between two looks at whether a run that is to end has ended


class Flag(Protocol):
    """Whether a run is to end, as tabs/session.py has it."""

    def set(self) -> None: ...
    def is_set(self) -> bool: ...


@dataclass(eq=False)
class Export:
    """One export. key: its name, a long random text. owner: whose it is. title: for people. place: all of its files.

    asked: at this time of the world's clock. used: by the clock of `Exports`. done: images there are. flag: of the run
    that makes it now, else None. gone: whether its place is to go with the end of that run.
    """

    key: str
    owner: str
    about: str
    title: str
    work: Work
    settings: ExportSettings
    place: Path
    asked: float
    used: float
    done: int = 0
    flag: Flag | None = None
    gone: bool = False
    nbytes: int = field(default=0, repr=False)

    @property
    def folder(self) -> Path:
        """The data set."""
        return self.place / "dataset"

    @property
    def zip(self) -> Path:
        return self.place / "dataset.zip"

    @property
    def total(self) -> int:
        return len(self.work.items)

    @property
    def finished(self) -> bool:
        return self.done == self.total

    def pack(self) -> Path:
        """All of the data set in one zip. Raises OSError."""
        return zip_folder(self.folder, self.zip)


def address(file: Path) -> str:
    """Where the page finds a file of an export, relative to its own address."""
    return f"gradio_api/file={quote(file.as_posix())}"


def described(work: Work, settings: ExportSettings, tokens: Path | None) -> str:
    """A digest of what an export is: the same goes on in the same folder. tokens: the folder of those asked for."""
    bodies = None if tokens is None else [path.read_bytes().hex() for path in sorted(tokens.iterdir())]
    about = [asdict(settings) | {"tokens": bodies}, work.classes, [asdict(item) for item in work.items]]
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()


class Exports:
    """The exports of all visitors, within bounds; thread safe.

    keep: seconds that one waits for its owner. each: of one owner, of whom the oldest goes first; as owners come and
    go, there are no more than MOST without images of all. nbytes: on the disk, of all together. several: whether two of
    one owner may be made at a time.
    """

    def __init__(
        self,
        keep: float,
        each: int = 1000,
        nbytes: float = math.inf,
        several: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.keep, self.each, self.nbytes, self.several, self.clock = keep, each, nbytes, several, clock
        self._exports: dict[str, Export] = {}
        self._changed = threading.Condition()

    # ---- what there is

    def of(self, owner: str) -> list[Export]:
        """All that the owner has, the one used last first."""
        with self._changed:
            own = [export for export in self._exports.values() if export.owner == owner]
        return sorted(own, key=lambda export: export.used, reverse=True)

    def get(self, owner: str, key: object) -> Export:
        """Raises InputError where there is none of this key, or it is another's: nobody is told which."""
        with self._changed:
            export = self._exports.get(key) if isinstance(key, str) else None
        if export is None or export.owner != owner:
            raise InputError(GONE)
        return export

    def find(self, owner: str, about: str) -> Export | None:
        """The owner's export of this."""
        with self._changed:
            return self._find(owner, about)

    def _find(self, owner: str, about: str) -> Export | None:
        own = (one for one in self._exports.values() if one.owner == owner and one.about == about)
        return next(own, None)

    def ask(self, owner: str, title: str, work: Work, settings: ExportSettings, tokens: Path | None = None) -> Export:
        """The owner's export of this, a new one if there is none. tokens: a folder, of which it keeps a copy."""
        about = described(work, settings, tokens)
        self.sweep()
        with self._changed:
            export = self._find(owner, about)
            if export is None:
                key = secrets.token_urlsafe(18)
                place = Path(get_upload_folder()).resolve() / f"ovam-export-{key}"
                place.mkdir(mode=0o700, parents=True)
                if tokens is not None:
                    try:
                        shutil.copytree(tokens, place / "tokens")
                    except BaseException:  # a full disk: nobody would know of the folder
                        shutil.rmtree(place, ignore_errors=True)
                        raise
                    settings = replace(settings, tokens=str(place / "tokens"))
                export = Export(key, owner, about, title, work, settings, place, time.time(), self.clock())
                self._exports[key] = export
            export.used = self.clock()
            idle = sorted((one for one in self._exports.values() if one.flag is None), key=lambda one: one.used)
            own = [one for one in idle if one.owner == owner]
            bare = [one for one in idle if not one.done and one is not export]  # which no other bound holds for
            extra = {*own[: max(0, len(own) - self.each)], *bare[: max(0, len(bare) + 1 - MOST)]}
            for one in extra:
                del self._exports[one.key]
        _remove(extra)
        return export

    # ---- what is made

    @contextmanager
    def making(self, export: Export, flag: Flag) -> Iterator[Path | None]:
        """The folder in which a run with this flag makes the export; None where it was stopped before it could begin.

        What it takes the place of is stopped first, and waited for: another run of the same export and, where the owner
        may have but one, of any of theirs. Raises InputError for an export that has gone.
        """
        with self._changed:
            while rivals := [one for one in self._exports.values() if self._in_the_way(one, export)]:
                for one in rivals:
                    assert one.flag is not None
                    one.flag.set()
                if flag.is_set():
                    break
                self._changed.wait(WAIT)
            stopped = bool(rivals) or flag.is_set()
            if not stopped:
                if self._exports.get(export.key) is not export:
                    raise InputError(GONE)
                export.flag = flag
        if stopped:
            yield None
            return
        try:
            yield export.folder
        finally:
            self._let_go(export)

    def _in_the_way(self, other: Export, export: Export) -> bool:
        return other.flag is not None and (other is export or (not self.several and other.owner == export.owner))

    def _let_go(self, export: Export) -> None:
        size = _size(export.place)
        with self._changed:
            export.used, export.flag, export.nbytes = self.clock(), None, size
            self._changed.notify_all()
        if export.gone:
            _remove([export])
        self.sweep()

    # ---- what goes

    def remove(self, owner: str, key: object) -> None:
        """The export and its files go; a run of it stops first. Raises InputError as `get`."""
        export = self.get(owner, key)
        with self._changed:
            self._exports.pop(export.key, None)
            export.gone = True
            if export.flag is not None:
                export.flag.set()
                return
        _remove([export])

    def sweep(self) -> None:
        """Frees the disk of exports that nobody came back to, and of the oldest where there is no room for all."""
        with self._changed:
            idle = [one for one in self._exports.values() if one.flag is None]
            gone = [one for one in idle if self._due(one) <= self.clock()]
            left = sum(one.nbytes for one in self._exports.values() if one not in gone)
            for one in sorted(idle, key=lambda one: one.used):
                if left > self.nbytes and one not in gone:
                    gone.append(one)
                    left -= one.nbytes
            for one in gone:
                del self._exports[one.key]
        _remove(gone)

    def close(self) -> None:
        """Frees the disk of all."""
        with self._changed:
            gone = list(self._exports.values())
            self._exports.clear()
        _remove(gone)

    def next_due(self) -> float:
        """When the next sweep has something to do, by the clock; infinity for never."""
        with self._changed:
            return min(map(self._due, self._exports.values()), default=NEVER)

    def _due(self, export: Export) -> float:
        return NEVER if export.flag is not None else export.used + self.keep


def _size(folder: Path) -> int:
    """Bytes of all files in it; what goes meanwhile does not count."""
    size = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            about = path.lstat()
            size += about.st_size if stat.S_ISREG(about.st_mode) else 0
    return size


def _remove(exports: Iterable[Export]) -> None:
    for export in exports:
        shutil.rmtree(export.place, ignore_errors=True)
