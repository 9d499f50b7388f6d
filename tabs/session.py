"""What the visitors of the page have: a `Session` each, and `Sessions`, which finds it and bounds them all.

Gradio's own session state copies and keeps whatever it is given; a recording can be a gigabyte. The page holds only a
random id of each, which is also what lets nobody else ask for it.
"""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import gradio as gr
from gradio.context import LocalContext

from ovam_core import tokens
from ovam_core.data.formats import zip_folder
from ovam_core.errors import InputError
from ovam_core.io.names import slugs
from ovam_core.io.pictures import MAX_PIXELS
from ovam_core.picture import Picture
from ovam_core.tokens import Token

from .canvas import Layer, Pieces
from .scratch import trim_memory

NO_IMAGE = "There is no recorded image in this session (any more); generate one first."
OVER = "This session is over; reload the page."
FULL = "Too many visitors are here just now; please come back in a few minutes."
MAX_OWN_TOKENS = 40
MAX_ANNOUNCED = 4  # runs of one name that were announced and have not begun

GIB = 1 << 30
NEVER = float("inf")


@dataclass(frozen=True)
class Limits:
    """What one visitor may ask for: of an export, and of the pictures and texts that they bring.

    seconds: of one run at work; a stopped one goes on where it was. text: characters, or bytes of a file, of prompts.
    pixels: of a photograph or a mask, before it is decoded.
    """

    prompts: int
    images: int
    megabytes: int
    seconds: float
    keep: float = 3600.0  # seconds that a data set waits for its visitor
    text: int = 20_000_000
    pixels: int = MAX_PIXELS


HOSTED = Limits(prompts=200, images=200, megabytes=500, seconds=600, text=500_000, pixels=25_000_000)
LOCAL = Limits(prompts=20_000, images=20_000, megabytes=20_000, seconds=24 * 3600.0, keep=24 * 3600.0)


def limits() -> Limits:
    """Those of a shared Space, which sets SPACE_ID, or of one's own machine."""
    return HOSTED if os.environ.get("SPACE_ID") else LOCAL


@dataclass(frozen=True)
class Bounds:
    """What the server keeps for its visitors.

    sessions: of visitors, those without anything included. pictures: of one visitor. nbytes: of all pictures together;
    the newest is kept even where it alone is larger, or a large model could not be used at all. seconds: that a picture
    waits for its next use. grace: seconds that a visitor may be gone: a laptop that slept, or a lost network, is no
    visitor who left. idle: seconds without any event, after which a page that stays open counts as left alone.
    unconnected: the same for a client without the connection whose end says goodbye.
    """

    sessions: int = 1000
    pictures: int = 2
    nbytes: int = 4 * GIB
    seconds: float = 1800.0
    grace: float = 300.0
    idle: float = 24 * 3600.0
    unconnected: float = 1800.0


# ------------------------------------------------------------------------------------------------- exports


@dataclass
class _Export:
    folder: Path
    used: float
    running: bool = False


class Exports:
    """Folders of exports, each known by what it is an export of: the same goes on in the same folder.

    keep: seconds that a folder waits. several: whether one export leaves the others where they are. Thread safe.
    """

    def __init__(self, keep: float, several: bool, clock: Callable[[], float] = time.monotonic):
        self.keep, self.several, self.clock = keep, several, clock
        self._exports: dict[str, _Export] = {}
        self._lock = threading.Lock()

    @contextmanager
    def folder(self, about: str) -> Iterator[Path]:
        """The folder of the export described by `about`: the one there is, to go on, or a new, empty one. Its time to
        wait begins when the block ends. Raises InputError where that export is being made, or its folder would take
        the place of one that is.
        """
        self.sweep()
        with self._lock:
            if any(export.running and (key == about or not self.several) for key, export in self._exports.items()):
                raise InputError("An export of yours is being made already; wait for its end, or stop it.")
            others = [] if self.several else [self._exports.pop(key) for key in list(self._exports) if key != about]
            export = self._exports.get(about)
            if export is None:
                folder = Path(tempfile.mkdtemp(prefix="ovam-export-"))
                export = self._exports[about] = _Export(folder, self.clock())
            export.running = True
        _remove(others)
        try:
            yield export.folder / "dataset"
        finally:
            export.used, export.running = self.clock(), False

    def sweep(self) -> None:
        """Frees the disk of exports that nobody came back to."""
        with self._lock:
            old = [about for about, export in self._exports.items() if self._due(export) <= self.clock()]
            gone = [self._exports.pop(about) for about in old]
        _remove(gone)

    def close(self) -> None:
        """Frees the disk of all."""
        with self._lock:
            gone = list(self._exports.values())
            self._exports.clear()
        _remove(gone)

    def next_due(self) -> float:
        """When the next sweep has something to do, by the clock; infinity for never."""
        with self._lock:
            return min(map(self._due, self._exports.values()), default=NEVER)

    def _due(self, export: _Export) -> float:
        return NEVER if export.running else export.used + self.keep


def pack(folder: Path) -> Path:
    """All of the data set of an export's folder in one zip beside it."""
    target = folder.parent / "dataset.zip"
    zip_folder(folder, target)
    return target


def _remove(exports: list[_Export]) -> None:
    for export in exports:
        shutil.rmtree(export.folder, ignore_errors=True)


# ------------------------------------------------------------------------------------------------ pictures


@dataclass
class _Kept:
    owner: Session
    picture: Picture
    used: float
    painted: list[Layer]  # on it, at the last press of the button, as they came


class Pictures:
    """The pictures of all visitors with their recordings and what is painted on them, least recently used out first;
    its callers hold the lock.
    """

    def __init__(self, bounds: Bounds, clock: Callable[[], float]):
        self.bounds, self.clock = bounds, clock
        self._kept: OrderedDict[str, _Kept] = OrderedDict()  # least recently used first

    def put(self, owner: Session, picture: Picture) -> str:
        """Keeps a picture for a visitor and returns its id, a long random string; their oldest one may have to go."""
        key = secrets.token_urlsafe(18)
        self._kept[key] = _Kept(owner, picture, self.clock(), [])
        own = [key for key, kept in self._kept.items() if kept.owner is owner]
        for old in own[: -self.bounds.pictures]:
            del self._kept[old]
        return key

    def get(self, owner: Session, key: str | None) -> _Kept | None:
        """The visitor's picture, its time to live begun anew; None if there is none (any more)."""
        kept = self._kept.get(key or "")
        if kept is None or kept.owner is not owner:
            return None
        kept.used = self.clock()
        self._kept.move_to_end(key or "")
        return kept

    def of(self, owner: Session) -> list[Picture]:
        """All that the visitor has."""
        return [kept.picture for kept in self._kept.values() if kept.owner is owner]

    def drop(self, owner: Session | None = None) -> None:
        """Forgets all that a visitor has; without one, everything of everybody."""
        for key in [key for key, kept in self._kept.items() if owner in (None, kept.owner)]:
            del self._kept[key]

    def sweep(self) -> None:
        """Lets go of what has outlived its time or does not fit."""
        oldest = self.clock() - self.bounds.seconds
        for key in [key for key, kept in self._kept.items() if kept.used <= oldest]:
            del self._kept[key]
        while len(self._kept) > 1 and self.nbytes > self.bounds.nbytes:
            self._kept.popitem(last=False)

    @property
    def nbytes(self) -> int:
        layers = (layer for kept in self._kept.values() for layer in kept.painted)
        painted = sum(len(layer) for layer in layers if isinstance(layer, bytes))
        return painted + sum(kept.picture.nbytes for kept in self._kept.values())

    def next_due(self) -> float:
        """When the next one has outlived its time, by the clock; infinity for never."""
        return min((kept.used + self.bounds.seconds for kept in self._kept.values()), default=NEVER)

    def __len__(self) -> int:
        return len(self._kept)


# -------------------------------------------------------------------------------------------- one visitor


class StopFlag:
    """Whether a run is to end: somebody said so, or nobody waits for it any more.

    work: its name. taken: whether the run has begun. gone: says whether its client has hung up.
    """

    def __init__(self, work: str):
        self.work, self.taken = work, False
        self.gone: Callable[[], bool] = _never
        self._stopped = threading.Event()

    def set(self) -> None:
        self._stopped.set()

    def is_set(self) -> bool:
        return self._stopped.is_set() or self.gone()


def _never() -> bool:
    return False


def hung_up() -> Callable[[], bool]:
    """Says whether the client of the event under way in this thread has closed its connection.

    Gradio marks the event and lets its function work on. A client that keeps no heartbeat never `leave`s.
    """
    blocks, event_id = LocalContext.blocks.get(None), LocalContext.event_id.get(None)
    event = None if blocks is None else blocks._queue.event_ids_to_events.get(event_id or "")
    return _never if event is None else lambda: not event.alive


class Session:
    """One visitor: a session of the page, or of an API client. Made by `Sessions`, whose lock it shares; thread safe.

    exports: the visitor's own, or on one's own machine those of all.
    """

    def __init__(self, everyone: Sessions, owner: str):
        self._everyone, self._lock, self.owner = everyone, everyone.lock, owner
        self.seen, self.left = everyone.clock(), False  # when it last did something, and whether that was to leave
        self.closed = False
        self.exports = everyone.exports or Exports(everyone.limits.keep, several=False, clock=everyone.clock)
        self._tokens: dict[str, Path] = {}
        self._flags: list[StopFlag] = []  # of works that run, wait, or were announced
        self._files: Path | None = None

    # ---- pictures with their recordings

    def keep(self, picture: Picture) -> str:
        """Keeps a picture and returns its id, a long random string; the oldest one may have to go."""
        with self._lock:
            key = "" if self.closed else self._everyone.pictures.put(self, picture)
        self._everyone.sweep()
        return key

    def find(self, key: str | None) -> Picture | None:
        """The picture of this id, its time to live begun anew; None if there is none (any more)."""
        self._everyone.sweep()
        with self._lock:
            kept = self._everyone.pictures.get(self, key)
            return kept and kept.picture

    def picture(self, key: str | None) -> Picture:
        """The same. Raises InputError if there is none (any more)."""
        picture = self.find(key)
        if picture is None:
            raise InputError(NO_IMAGE)
        return picture

    def paint(self, key: str | None, layers: list[Layer]) -> None:
        """Keeps what is painted on a picture, for as long as that is kept. Raises InputError where it is not."""
        with self._lock:
            kept = self._everyone.pictures.get(self, key)
            if kept is None:
                raise InputError(NO_IMAGE)
            kept.painted = layers
        self._everyone.sweep()

    def painted(self, key: str | None) -> list[Layer]:
        """What is painted on the picture of this id."""
        with self._lock:
            kept = self._everyone.pictures.get(self, key)
            return kept.painted if kept else []

    @property
    def working(self) -> bool:
        """Whether a run has begun and not ended; the caller holds the lock."""
        return any(flag.taken for flag in self._flags)

    @property
    def empty(self) -> bool:
        """Whether there is nothing that the visitor would miss; the caller holds the lock."""
        owned = self._tokens or self.working or self._files
        exported = self.exports is not self._everyone.exports and self.exports.next_due() < NEVER
        return not owned and not exported and not self._everyone.pictures.of(self)

    # ---- tokens: the model's, and those that the visitor made or brought

    def token_names(self) -> list[str]:
        """What the visitor may pick, their own first."""
        with self._lock:
            return [*reversed(self._tokens), *self._everyone.shipped]

    def add_token(self, token: Token) -> str:
        """Keeps a token; returns its name. One of the same class takes the place of the earlier one.

        Raises InputError where the visitor has MAX_OWN_TOKENS already.
        """
        name = f"{', '.join(token.names)[:60]} · yours"
        with self._lock:
            if name not in self._tokens and len(self._tokens) >= MAX_OWN_TOKENS:
                raise InputError(
                    f"There are {MAX_OWN_TOKENS} tokens of yours here already; reload the page to begin anew."
                )
            free = f"{slugs([*self._tokens, name])[-1]}{tokens.SUFFIX}"
            path = self._tokens.get(name) or self._folder("tokens") / free
            self._tokens[name] = token.save(path)
        return name

    def token(self, name: str) -> Token:
        """Raises InputError for a name that is none of this visitor's: a client can send any."""
        with self._lock:
            path, shipped = self._tokens.get(str(name)), self._everyone.shipped.get(str(name))
        if path is None and shipped is None:
            raise InputError(f"There is no token '{str(name)[:60]}' here (any more); choose one of the list.")
        return shipped if path is None else Token.load(path)

    def token_file(self, name: str) -> Path:
        """The file of a token of the visitor's own. Raises InputError for any other name."""
        with self._lock:
            path = self._tokens.get(str(name))
        if path is None:
            raise InputError(f"There is no token '{str(name)[:60]}' of yours here (any more).")
        return path

    @contextmanager
    def token_copies(self) -> Iterator[Path]:
        """A folder with copies of all tokens that the visitor may use, their own in place of shipped ones of the same
        class.
        """
        with self._lock:
            own = [Token.load(path) for path in self._tokens.values()]
        chosen = {token.names: token for token in (*self._everyone.shipped.values(), *own)}
        with tempfile.TemporaryDirectory(prefix="ovam-tokens-") as folder:
            for number, token in enumerate(chosen.values()):
                token.save(Path(folder) / f"{number:03d}{tokens.SUFFIX}")
            yield Path(folder)

    # ---- runs

    def begin(self, work: str) -> None:
        """A stop flag for a run that is about to be queued, so that Stop works while it waits as well."""
        with self._lock:
            announced = [flag for flag in self._flags if flag.work == work and not flag.taken]
            for old in announced[: max(0, len(announced) + 1 - MAX_ANNOUNCED)]:
                self._flags.remove(old)  # whose run never came
            self._flags.append(StopFlag(work))

    @contextmanager
    def run(self, work: str) -> Iterator[StopFlag]:
        """The stop flag of a run, the one announced last, for as long as it lasts; set at its end, for what may work on
        in another thread. Each run has a flag of its own. It counts as set once the client of the event under way in
        this thread has hung up, too.
        """
        with self._lock:
            announced = [flag for flag in self._flags if flag.work == work and not flag.taken]
            if not announced:
                announced = [StopFlag(work)]
                self._flags += announced
            flag = announced[-1]
            flag.taken, flag.gone = True, hung_up()
            if self.closed:
                flag.set()
        try:
            yield flag
        finally:
            flag.set()
            with self._lock:
                self.seen = self._everyone.clock()
                if flag in self._flags:
                    self._flags.remove(flag)

    def stop(self, *works: str) -> None:
        """Stops these works, those that wait included; without a name, all."""
        with self._lock:
            for flag in self._flags:
                if not works or flag.work in works:
                    flag.set()

    # ---- files

    @contextmanager
    def export_folder(self, about: str) -> Iterator[Path]:
        """The folder of an export described by `about`, as `Exports.folder` gives it."""
        try:
            with self.exports.folder(about) as folder:
                yield folder
        finally:
            self._everyone.sweep()  # which sees to it that the folder goes in time

    def download_folder(self) -> Path:
        """Where a download is packed: one at a time, the next in place of the last."""
        with self._lock:
            folder = self._folder("download")
            for old in folder.iterdir():
                old.unlink()
            return folder

    def _folder(self, name: str) -> Path:
        if self.closed:
            raise InputError(OVER)
        if self._files is None:
            self._files = Path(tempfile.mkdtemp(prefix="ovam-session-"))
        folder = self._files / name
        folder.mkdir(exist_ok=True)
        return folder

    def close(self) -> None:
        """Frees all that the visitor has: pictures and what they paint, tokens, exports of their own, downloads, stop
        flags.
        """
        self.stop()
        with self._lock:
            self.closed = True
            files, self._files = self._files, None
            self._everyone.pictures.drop(self)
            self._everyone.pieces.drop(self.owner)
            self._tokens.clear()
            self._flags.clear()
        if files is not None:
            shutil.rmtree(files, ignore_errors=True)
        if self.exports is not self._everyone.exports:
            self.exports.close()


# ------------------------------------------------------------------------------------------- all visitors


class Sessions:
    """The sessions of all visitors, within bounds; thread safe.

    model: whose shipped tokens are on offer. limits: what an export may cost; by default those of a shared Space, or of
    one's own machine. There visitors are one person, who finds a half-made export again after a reload of the page, and
    whose exports do not go with a page that is closed. connected: whether a visitor has a connection open whose end
    calls `leave`.
    """

    def __init__(
        self,
        model: str,
        bounds: Bounds | None = None,
        limits_of_exports: Limits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.bounds, self.limits, self.clock = bounds or Bounds(), limits_of_exports or limits(), clock
        self.shipped = {f"{name} · {model}": token for name, token in tokens.library(model).items()}
        self.exports = Exports(self.limits.keep, several=True, clock=clock) if self.limits is LOCAL else None
        self.lock = threading.RLock()
        self.pictures, self.pieces = Pictures(self.bounds, clock), Pieces()
        self.connected: Callable[[str], bool] = lambda _: False
        self._sessions: dict[str, Session] = {}
        self._timer: threading.Timer | None = None
        self._wake_at = NEVER

    def of(self, request: gr.Request) -> Session:
        """The visitor's session, who is there (again)."""
        owner = request.session_hash or "api"
        with self.lock:
            session = self._sessions.get(owner)
            if session is None:
                self._make_room()
                session = self._sessions[owner] = Session(self, owner)
            session.seen, session.left = self.clock(), False
            return session

    def _make_room(self) -> None:
        """For one more session: those that have nothing, or are over, go, the longest unseen first. Raises InputError
        where there is none.
        """
        while len(self._sessions) >= self.bounds.sessions:
            now = self.clock()
            free = [(one.seen, owner) for owner, one in self._sessions.items() if one.empty or self._end(one) <= now]
            if not free:
                raise InputError(FULL)
            self._sessions.pop(min(free)[1]).close()

    def leave(self, request: gr.Request) -> None:
        """The visitor closed the page, or the connection broke: their runs stop, and unless they come back within the
        grace, what they have goes.
        """
        with self.lock:
            session = self._sessions.get(request.session_hash or "api")
            if session is None:
                return
            session.stop()
            session.seen, session.left = self.clock(), True
        self.sweep()

    def forget_pictures(self) -> None:
        """Lets go of all pictures of everybody: memory is short."""
        with self.lock:
            self.pictures.drop()

    def sweep(self) -> None:
        """Lets go of what has outlived its time or does not fit, and sees to it that it is called again."""
        with self.lock:
            gone = [owner for owner, session in self._sessions.items() if self._end(session) <= self.clock()]
            closing = [self._sessions.pop(owner) for owner in gone]
            held = len(self.pictures)
            self.pictures.sweep()
            dropped = held - len(self.pictures)
        for session in closing:
            session.close()
        for exports in self._all_exports():
            exports.sweep()
        if closing or dropped:
            trim_memory()
        self._wake_later()

    def _end(self, session: Session) -> float:
        """When it is over, by the clock, should nothing happen until then."""
        if session.left:
            return session.seen + self.bounds.grace
        seen = self.clock() if session.working else session.seen
        return seen + (self.bounds.idle if self.connected(session.owner) else self.bounds.unconnected)

    def _all_exports(self) -> list[Exports]:
        with self.lock:
            own = [session.exports for session in self._sessions.values()]
        return own if self.exports is None else [self.exports]

    def _wake_later(self) -> None:
        """Memory and disk are given back on time even if nobody ever comes again."""
        with self.lock:
            dues = [self._end(session) for session in self._sessions.values()]
            dues += [exports.next_due() for exports in self._all_exports()]
            due = min([self.pictures.next_due(), *dues])
            if due >= self._wake_at:
                return
            if self._timer is not None:
                self._timer.cancel()
            self._wake_at = due
            self._timer = threading.Timer(max(1.0, due - self.clock()), self._wake)
            self._timer.daemon = True
            self._timer.start()

    def _wake(self) -> None:
        with self.lock:
            self._wake_at, self._timer = NEVER, None
        self.sweep()

    def close(self) -> None:
        """Frees everything of everybody, exports included."""
        with self.lock:
            closing = list(self._sessions.values())
            self._sessions.clear()
            if self._timer is not None:
                self._timer.cancel()
        for session in closing:
            session.close()
        if self.exports is not None:
            self.exports.close()
