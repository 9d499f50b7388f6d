"""What the visitors of the page have: a `Session` each, and `Sessions`, which finds it and bounds them all.

Gradio's own session state copies and keeps whatever it is given; a recording can be a gigabyte. The page holds only a
random id of each, which is also what lets nobody else ask for it.
"""

from __future__ import annotations

import hmac
import os
import secrets
import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
from gradio.context import LocalContext

from ovam_core import tokens
from ovam_core.errors import InputError
from ovam_core.io.names import slugs
from ovam_core.io.pictures import MAX_PIXELS
from ovam_core.picture import Picture
from ovam_core.published import published_names, published_token
from ovam_core.tokens import Token

from .exports import NEVER, Export, Exports
from .render import shrunk
from .scratch import trim_memory

NO_IMAGE = "There is no recorded image in this session (any more); generate one first."
NO_SUCH_PICTURE = "There is no picture '{}' here (any more); make one, and give the id that came with it."
OVER = "This session is over; reload the page."
FULL = "Too many visitors are here just now; please come back in a few minutes."
MAX_OWN_TOKENS = 40
FIRST = "first"  # the id of the picture that the page opens with
MAX_ANNOUNCED = 4  # runs of one name that were announced and have not begun

GIB = 1 << 30


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
    exports: int = 1000  # that are kept of one visitor
    disk: float = NEVER  # megabytes of the exports of all visitors together
    text: int = 20_000_000
    pixels: int = MAX_PIXELS


HOSTED = Limits(
    prompts=200, images=200, megabytes=500, seconds=600, exports=3, disk=20_000, text=500_000, pixels=25_000_000
)
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
    pictures: int = 12
    nbytes: int = 4 * GIB
    seconds: float = 1800.0
    grace: float = 300.0
    idle: float = 24 * 3600.0
    unconnected: float = 1800.0


# ------------------------------------------------------------------------------------------------ pictures


@dataclass
class _Kept:
    owner: Session
    picture: Picture
    used: float
    screen: Picture | None = None  # the same at a size for the page, once it was asked for


def on_screen(picture: Picture) -> Picture:
    """The picture with its image no larger than a page shows, where masks are made; its recording is the same."""
    image = shrunk(picture.image)
    return picture if image is picture.image else replace(picture, image=image)


class Pictures:
    """The pictures of all visitors with their recordings, least recently used out first; its callers hold the lock."""

    def __init__(self, bounds: Bounds, clock: Callable[[], float]):
        self.bounds, self.clock = bounds, clock
        self._kept: OrderedDict[str, _Kept] = OrderedDict()  # least recently used first

    def put(self, owner: Session, picture: Picture) -> str:
        """Keeps a picture for a visitor and returns its id, a long random string; their oldest one may have to go."""
        key = secrets.token_urlsafe(18)
        self._kept[key] = _Kept(owner, picture, self.clock())
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

    def known(self, key: str) -> _Kept | None:
        """The picture of this id, whoever's it is, its time to live and its owner's begun anew; None if there is none.

        Whoever knows an id was told it.
        """
        owner = self._kept[key].owner if key in self._kept else None
        if owner is None:
            return None
        owner.seen = max(owner.seen, self.clock())
        return self.get(owner, key)

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
        return sum(kept.picture.nbytes for kept in self._kept.values())

    def next_due(self) -> float:
        """When the next one has outlived its time, by the clock; infinity for never."""
        return min((kept.used + self.bounds.seconds for kept in self._kept.values()), default=NEVER)

    def __len__(self) -> int:
        return len(self._kept)


# -------------------------------------------------------------------------------------------- one visitor


class StopFlag:
    """Whether a run is to end: somebody said so, or nobody waits for it any more.

    work: its name. number: by which a run finds the flag that was announced for it. taken: whether the run has begun.
    gone: says whether its client has hung up.
    """

    def __init__(self, work: str):
        self.work, self.number, self.taken = work, secrets.token_hex(8), False
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

    exports: those of all. visitor: whose of them this session may see; other than the session it outlives a reload.
    """

    def __init__(self, everyone: Sessions, owner: str):
        self._everyone, self._lock, self.owner = everyone, everyone.lock, owner
        self.seen, self.left = everyone.clock(), False  # when it last did something, and whether that was to leave
        self.closed = False
        self.exports, self.visitor = everyone.exports, everyone.new_visitor()
        self.last_picture = ""  # the id of the last picture that was kept
        self._tokens: dict[str, Path] = {}
        self._flags: list[StopFlag] = []  # of works that run, wait, or were announced
        self._newest: dict[str, str] = {}  # number of the run of each work that replaced the others
        self._files: Path | None = None

    # ---- pictures with their recordings

    def keep(self, picture: Picture) -> str:
        """Keeps a picture and returns its id, a long random string; the oldest one may have to go."""
        with self._lock:
            key = self.last_picture = "" if self.closed else self._everyone.pictures.put(self, picture)
        self._everyone.sweep()
        return key

    def find(self, key: str | None) -> Picture | None:
        """The picture of this id, its time to live begun anew; None if there is none (any more)."""
        self._everyone.sweep()
        with self._lock:
            if key == FIRST:
                return self._everyone.first
            kept = self._everyone.pictures.get(self, key)
            return kept and kept.picture

    def screen(self, key: str | None) -> Picture | None:
        """The same as `find`, with no side of its image longer than a page can show."""
        picture = self.find(key)
        with self._lock:
            kept = self._everyone.pictures.get(self, key)
            if kept is None or picture is None:
                return picture
            kept.screen = kept.screen or on_screen(kept.picture)
            return kept.screen

    def picture(self, key: str | None) -> Picture:
        """The same. Raises InputError if there is none (any more)."""
        picture = self.find(key)
        if picture is None:
            raise InputError(NO_IMAGE)
        return picture

    @property
    def working(self) -> bool:
        """Whether a run has begun and not ended; the caller holds the lock."""
        return any(flag.taken for flag in self._flags)

    @property
    def empty(self) -> bool:
        """Whether there is nothing that the visitor would miss; the caller holds the lock."""
        owned = self._tokens or self.working or self._files
        return not owned and not self._everyone.pictures.of(self)

    # ---- tokens: the model's, and those that the visitor made or brought

    def token_names(self) -> list[str]:
        """What the visitor may pick, their own first."""
        with self._lock:
            return [*reversed(self._tokens), *self._everyone.shipped, *self._everyone.published]

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
        """One of those, the paper's fetched. Raises InputError for a name that is none of this visitor's: a client can
        send any; and where the paper's cannot be fetched.
        """
        with self._lock:
            path, shipped = self._tokens.get(str(name)), self._everyone.shipped.get(str(name))
        paper = self._everyone.published.get(str(name))
        if path is None and paper is not None:
            return published_token(self._everyone.model, paper)
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

    def replace(self, work: str) -> str:
        """A stop flag for a run that takes the place of all others of its name, which stop; returns its number."""
        with self._lock:
            for flag in [flag for flag in self._flags if flag.work == work]:
                flag.set()
                if not flag.taken:
                    self._flags.remove(flag)
            flag = StopFlag(work)
            self._flags.append(flag)
            self._newest[work] = flag.number
            return flag.number

    def runs(self, work: str) -> bool:
        """Whether a run of this name is under way or announced, and was not stopped."""
        with self._lock:
            return any(flag.work == work and not flag.is_set() for flag in self._flags)

    def is_latest(self, work: str, number: str) -> bool:
        """Whether no other run has taken the place of this one."""
        with self._lock:
            return self._newest.get(work, number) == number

    @contextmanager
    def run(self, work: str, number: str = "") -> Iterator[StopFlag]:
        """The stop flag of a run for as long as it lasts: of its number, from `replace`, or the one announced last. It
        is set at its end, for what may work on in another thread; at once, for a run that was replaced before it began.
        Each run has a flag of its own. It counts as set once the client of the event under way in this thread has hung
        up, too.
        """
        with self._lock:
            announced = [flag for flag in self._flags if flag.work == work and not flag.taken]
            if number:
                announced = [flag for flag in announced if flag.number == number]
            if not announced:
                announced = [StopFlag(work)]
                self._flags += announced
                if number:
                    announced[0].set()
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
    def making(self, export: Export, flag: StopFlag) -> Iterator[Path | None]:
        """The folder to make an export in, as `Exports.making` gives it."""
        try:
            with self.exports.making(export, flag) as folder:
                yield folder
        finally:
            self._everyone.sweep()  # which sees to it that the folder goes in time

    def recognize(self, visitor: str) -> str:
        """Who the browser says this is, where this server once told it so; returns who it is now."""
        with self._lock:
            if self._everyone.knows(visitor):
                self.visitor = visitor
            return self.visitor

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
        """Frees all that the visitor has: pictures, tokens, downloads, stop flags. Exports wait for
        their own time, as whoever reloads the page comes back for them.
        """
        self.stop()
        with self._lock:
            self.closed = True
            files, self._files = self._files, None
            self._everyone.pictures.drop(self)
            self._tokens.clear()
            self._flags.clear()
        if files is not None:
            shutil.rmtree(files, ignore_errors=True)


# ------------------------------------------------------------------------------------------- all visitors


class Sessions:
    """The sessions of all visitors, within bounds; thread safe.

    model: whose shipped tokens are on offer. limits: what an export may cost; by default those of a shared Space, or of
    one's own machine. There visitors are one person, to whom all exports belong; on a Space each browser has a name of
    its own, by which its exports are found again after a reload of the page. connected: whether a visitor has a
    connection open whose end calls `leave`.
    """

    def __init__(
        self,
        model: str,
        bounds: Bounds | None = None,
        limits_of_exports: Limits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.bounds, self.limits, self.clock = bounds or Bounds(), limits_of_exports or limits(), clock
        self.model = SimpleNamespace(name=model)
        self.published = {f"{name} · the paper's": name for name in published_names(self.model)}
        self.shipped = {f"{name} · {model}": token for name, token in tokens.library(model).items()}
        own, disk = self.limits is LOCAL, self.limits.disk * 1e6
        self.exports = Exports(self.limits.keep, self.limits.exports, disk, several=own, clock=clock)
        self._secret = None if own else secrets.token_bytes(32)
        self.lock = threading.RLock()
        self.pictures = Pictures(self.bounds, clock)
        self.first: Picture | None = None  # that the page opens with, for everybody
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

    def new_visitor(self) -> str:
        """A name for a visitor, which their browser keeps and nobody can guess or make: it is signed. On one's own
        machine, where all are one person, "".
        """
        return "" if self._secret is None else self._signed(secrets.token_urlsafe(18))

    def knows(self, visitor: str) -> bool:
        """Whether this server gave this name to somebody."""
        signed = self._signed(visitor.partition(".")[0])
        return self._secret is not None and hmac.compare_digest(signed.encode(), visitor.encode())

    def _signed(self, name: str) -> str:
        return f"{name}.{hmac.new(self._secret or b'', name.encode(), 'sha256').hexdigest()}"

    def picture_of(self, key: str) -> Picture:
        """The picture of this id, whoever made it. Raises InputError if there is none (any more)."""
        self.sweep()
        with self.lock:
            kept = self.pictures.known(key)
            picture = self.first if key == FIRST else kept and kept.picture
        if picture is None:
            raise InputError(NO_SUCH_PICTURE.format(key[:40]))
        return picture

    def hang_up(self, owner: str) -> None:
        """The connection of a visitor of one call has ended: what they have running stops, what they made stays."""
        with self.lock:
            session = self._sessions.get(owner)
        if session is not None:
            session.stop()

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
        self.exports.sweep()
        if closing or dropped:
            trim_memory()
        self._wake_later()

    def _end(self, session: Session) -> float:
        """When it is over, by the clock, should nothing happen until then."""
        if session.left:
            return session.seen + self.bounds.grace
        seen = self.clock() if session.working else session.seen
        return seen + (self.bounds.idle if self.connected(session.owner) else self.bounds.unconnected)

    def _wake_later(self) -> None:
        """Memory and disk are given back on time even if nobody ever comes again."""
        with self.lock:
            dues = [self._end(session) for session in self._sessions.values()]
            due = min([self.pictures.next_due(), self.exports.next_due(), *dues])
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
        self.exports.close()
