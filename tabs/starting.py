"""The first page: it answers at once, while the libraries, the model and the page itself are being loaded.

`Starting` listens on the page's own port, says how far the start is, and hands its sockets, which go on listening, to
the server of the page: between the two no connection is refused. Nothing here imports what takes time.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from http.server import BaseHTTPRequestHandler
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from socketserver import TCPServer, ThreadingMixIn
from types import ModuleType
from urllib.parse import urlsplit

from ovam_core.errors import InputError

from .head import head
from .sentences import shown

ASSETS = Path(__file__).parent / "assets"
HEALTH = "/health"  # what the starting page asks, and a supervisor may
FIRST_PORT, PORTS = 7860, 100  # those that Gradio tries
WAIT = 1  # seconds after which whoever came too early may come again
PATIENCE = 10.0  # seconds for a slow client
MAX_BODY = 1 << 20  # bytes of a request that are read before it is answered
HEARD = 3.0  # seconds that a page that is open is waited for, to be told what went wrong


# ------------------------------------------------------------------------------------------------- port


def wanted_host() -> str:
    """What GRADIO_SERVER_NAME names, without the brackets of an IPv6 address; by default this machine alone."""
    return os.environ.get("GRADIO_SERVER_NAME", "").strip().strip("[]") or "127.0.0.1"


def wanted_port() -> int | None:
    """The port that GRADIO_SERVER_PORT names; None to look for a free one from 7860 on. Raises InputError for none."""
    port = os.environ.get("GRADIO_SERVER_PORT")
    if not port:
        return None
    if not port.isdecimal() or not 1 <= int(port[:6]) <= 65535:
        raise InputError(f"GRADIO_SERVER_PORT is '{port[:40]}'; set it to a port, a whole number from 1 to 65535.")
    return int(port)


def listen(host: str, port: int | None) -> list[socket.socket]:
    """Sockets that listen on all addresses of the host: on this port, or, with None, on the first that is free.

    Raises InputError where that cannot be: who asks for a port looks for the page there, and nowhere else.
    """
    ports = range(FIRST_PORT, FIRST_PORT + _number_of_ports()) if port is None else [port]
    for one in ports:
        try:
            return _listen(host, one)
        except (OSError, UnicodeError) as error:
            reason = (getattr(error, "strerror", None) or str(error)).lower().partition(" (while ")[0]
            if getattr(error, "errno", None) not in (errno.EADDRINUSE, errno.EACCES):
                break
    which = f"Port {one} of '{host}' cannot" if len(ports) == 1 else f"No port from {ports[0]} on of '{host}' can"
    raise InputError(f"{which} be served: {reason}; set GRADIO_SERVER_PORT to a free one.")


def _number_of_ports() -> int:
    """What GRADIO_NUM_PORTS says. Raises InputError for no number, which Gradio's import would end at."""
    number = os.environ.get("GRADIO_NUM_PORTS") or str(PORTS)
    if not number.isdecimal() or not 1 <= int(number[:6]) <= 10_000:
        raise InputError(f"GRADIO_NUM_PORTS is '{number[:40]}'; set it to a whole number from 1 to 10000.")
    return int(number)


def _listen(host: str, port: int) -> list[socket.socket]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    opened: list[socket.socket] = []
    try:
        for family, address in dict.fromkeys((family, address) for family, *_, address in found):
            opened.append(socket.create_server(address[:2], family=family, backlog=2048))
    except OSError:
        for one in opened:
            one.close()
        raise
    return opened


# ---------------------------------------------------------------------------------------------- progress


@dataclass(frozen=True)
class Progress:
    """How far the start is.

    steps: their names. step: the number of the one under way, from 0. part: how much of it is done, 0 to 1. note: more
    about it, "7 of 25" say. model: its name, where it is known. error: HTML, one sentence, once the start has failed.
    """

    steps: tuple[str, ...]
    step: int = 0
    part: float = 0.0
    note: str = ""
    model: str = ""
    error: str = ""
    ready: bool = False

    @property
    def sentence(self) -> str:
        """For programs that came too early."""
        return self.error or f"This page is still starting: {self.steps[self.step]}. Please come again."


class Starting:
    """The server of the first page; a context, at whose end it is gone. host, port: where it listens."""

    def __init__(self, host: str, port: int | None, steps: Sequence[str]):
        self.host, self.sockets = host, listen(host, port)
        self.port: int = self.sockets[0].getsockname()[1]
        self.progress = Progress(tuple(steps))
        self.begun = self.asked = time.monotonic()  # asked: when a page that is open last came to see
        self.told = threading.Event()  # whether one was told of an error
        self._servers = [_Server(self, one) for one in self.sockets]
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def address(self) -> str:
        """Where a browser finds the page."""
        return f"http://{'localhost' if self.host in ('0.0.0.0', '::') else self.name}:{self.port}/"

    @property
    def name(self) -> str:
        """The host, as an address has it."""
        return f"[{self.host}]" if ":" in self.host else self.host

    # ---- what the start says of itself

    def step(self, number: int, name: str) -> None:
        """The step of this number, from 0, begins; under this name, as more is known by now."""
        now = self.progress
        steps = (*now.steps[:number], name, *now.steps[number + 1 :])
        self.progress = replace(now, steps=steps, step=number, part=0.0, note="")

    def open_model(self, name: str) -> None:
        """The second step: this model is opened."""
        self.step(1, f"Opening {name}")
        self.progress = replace(self.progress, model=name)

    def part(self, done: int, total: int, note: str) -> None:
        """So much of the step is done."""
        self.progress = replace(self.progress, part=done / max(total, 1), note=note)

    def fail(self, sentence: str) -> None:
        """Tells whoever has the page open, who may come to see within a moment."""
        here = self._servers and self.asked > self.begun and time.monotonic() - self.asked < HEARD
        self.progress = replace(self.progress, error=shown(sentence))
        if here:
            self.told.wait(HEARD)
            time.sleep(0.1)  # its answer is on the way

    # ---- the end

    def hand_over(self) -> list[socket.socket]:
        """The sockets, for another server; they listen, and who comes meanwhile waits for it. A request that was let in
        before is still answered from here.
        """
        self._stop()
        sockets, self.sockets = self.sockets, []
        return sockets

    def _stop(self) -> None:
        for server in self._servers:
            server.shutdown()
        self._servers = []

    def __enter__(self) -> Starting:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        for one in self.sockets:
            one.close()


# ------------------------------------------------------------------------------------------------ server


class _Server(ThreadingMixIn, TCPServer):
    """A request a thread, on a socket that listens already."""

    daemon_threads, block_on_close = True, False

    def __init__(self, starting: Starting, listening: socket.socket):
        super().__init__(listening.getsockname(), _Answer, bind_and_activate=False)
        self.socket.close()
        listening.setblocking(False)  # else one that hung up at once would hold all others
        self.starting, self.socket = starting, listening

    def handle_error(self, *_: object) -> None:
        """A client that broke off is no news."""


class _Answer(BaseHTTPRequestHandler):
    """The page at its address; to all else, that it is too early."""

    server: _Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "OVAM", ""
    timeout = PATIENCE

    def answer(self) -> None:
        self._read_body()
        url, starting = urlsplit(self.path), self.server.starting
        path = url.path.rstrip("/")
        root = urlsplit(os.environ.get("GRADIO_ROOT_PATH", "")).path.rstrip("/")
        path = path.removeprefix(root) if path == root or path.startswith(f"{root}/") else path
        looking = self.command in ("GET", "HEAD") and path in ("", HEALTH)
        if looking:
            starting.asked = time.monotonic()
        progress = starting.progress
        if looking and not path:
            policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
            headers = {
                "Content-Type": "text/html; charset=utf-8",
                "Content-Security-Policy": f"{policy}; img-src data:",
            }
            self._send(200, starting_page(progress).encode(), headers)
        else:
            said = progress.sentence
            about = {**asdict(progress), "seconds": round(time.monotonic() - starting.begun, 1)}
            body = json.dumps({"error": said, "detail": said, **(about if looking else {})}).encode()
            status = 200 if looking and url.query == "page" else 503  # browsers make a note of every 503
            self._send(status, body, {"Content-Type": "application/json", "Retry-After": str(WAIT)})
        if looking and path and progress.error:
            starting.told.set()

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = answer

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        every = {"Content-Length": str(len(body)), "Cache-Control": "no-store", "Connection": "close"}
        for name, value in (headers | every).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _read_body(self) -> None:
        """Who is still writing does not hear an answer."""
        length = self.headers.get("Content-Length", "0")
        left = min(int(length[:9]), MAX_BODY) if length.isdecimal() else 0
        while left > 0 and (piece := self.rfile.read(min(left, 1 << 16))):
            left -= len(piece)

    def log_message(self, *_: object) -> None:
        """Nothing: the terminal is for the page's own address."""


def starting_page(progress: Progress) -> str:
    """The whole page, nothing of which lies elsewhere."""
    parts = {
        "<!-- head -->": head(progress.model, "starting"),
        "/* page.css */": (ASSETS / "page.css").read_text(encoding="utf-8"),
        "/* progress */ {}": json.dumps(asdict(progress)).replace("<", "\\u003c"),
    }
    text = (ASSETS / "starting.html").read_text(encoding="utf-8")
    for mark, part in parts.items():
        text = text.replace(mark, part)
    return text


# ------------------------------------------------------------------------------------------- the process


@contextmanager
def ended_at_once() -> Iterator[None]:
    """Within the block, which has nothing to clear away, signals end the process without an exception: that would come
    out of the middle of some library's import, which may take it for its own. What the process was started to ignore,
    as by nohup, it goes on to ignore.
    """
    statuses = {"SIGINT": 130, "SIGTERM": 0, "SIGHUP": 0}
    known = {getattr(signal, name): status for name, status in statuses.items() if hasattr(signal, name)}
    known = {number: status for number, status in known.items() if signal.getsignal(number) != signal.SIG_IGN}
    before = {number: signal.signal(number, lambda number, _: os._exit(known[number])) for number in known}
    try:
        yield
    finally:
        for number, was in before.items():
            signal.signal(number, was)


class WithoutStubs(MetaPathFinder):
    """Lets Gradio be imported without writing a stub of each component for editors, beside its own files: half of the
    time of its import.
    """

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == "gradio.component_meta" else None
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            module.create_or_modify_pyi = lambda *_: None  # type: ignore[attr-defined]

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
