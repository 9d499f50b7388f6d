"""What stands before Gradio's own routes: requests are bounded and understood before anything is done with them, and
whatever goes wrong, in Gradio too, is said in one sentence.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs

import gradio as gr
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ovam_core.errors import InputError

from .events import NO_ROOM, OUR_FAULT, check_values, is_disk_full, said, stamped
from .fields import MAX_UPLOAD_MB
from .scratch import is_own, trim_memory
from .session import Sessions
from .tools import VISITOR, adapt

MAX_BODY = 1 << 20  # bytes of a request beside the text of a prompt file
MAX_TOOL_CALL = 4 << 20  # as the package of MCP has it
MAX_TOOL_CALLS = 16  # at a time: each keeps one of the 40 threads that send files, too
NAME = re.compile(r"[\w-]{1,64}", re.ASCII)  # of a session: the page's have 11 characters, uuids 36
API = "/gradio_api/"

# Of Gradio's routes, those that the page has no use for: what is going on here, other servers' files fetched by this
# one, videos decoded, pages stored, MCP's older way, which keeps a session of each client.
CLOSED = re.compile(
    rf"(?:{API}|/)(?:mcp/(?:sse|messages)|monitoring|deep_link|process_recording|profiling|run-history|proxy=|stream/|runs\b|vibe|undo-vibe"
    r"|component_server|file[=/]+\s*https?:)",
    re.IGNORECASE,
)
CALL = re.compile(rf"{API}(?P<way>run|api|call|queue/join)(?P<v2>/v2(?=/[^/]))?(?:/(?P<name>[^/]*))?/?")

NO_SUCH = "There is no such address here."
BAD_SESSION = "A session is named by 1 to 64 letters, digits, - and _."
NO_STREAM = "There is nothing to listen to here; a call of a tool is answered where it is made."
MANY_CALLS = "Too many tools are at work here just now; please try again in a moment."
UNREADABLE = "This request cannot be read; reload the page and try again."


class Refused(Exception):
    """A request that goes no further: its status and a sentence."""

    def __init__(self, status: int, sentence: str):
        super().__init__(sentence)
        self.status = status


# ------------------------------------------------------------------------------------------ who is there


class Beats:
    """The open connections by which visitors stay: whoever has closed the last one has left.

    A connection is its visitor's own where it was opened before, or within a minute of, their first request. To know
    another's name is not enough to end their session.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, most: int = 10_000):
        self.clock, self.most = clock, most
        self._first: OrderedDict[str, float] = OrderedDict()  # when each was first heard of
        self._open: dict[str, int] = {}  # 0 for those who may come back

    def heard(self, visitor: str) -> None:
        self._first.setdefault(visitor, self.clock())
        while len(self._first) > self.most:
            old, _ = self._first.popitem(last=False)
            if not self._open.get(old):
                self._open.pop(old, None)

    def open(self, visitor: str) -> bool:
        """Whether the connection counts."""
        if visitor not in self._open and self.clock() - self._first.get(visitor, self.clock()) > 60:
            return False
        self.heard(visitor)
        self._open[visitor] = self._open.get(visitor, 0) + 1
        return True

    def close(self, visitor: str) -> bool:
        """Whether it was the last one."""
        self._open[visitor] -= 1
        last = not self._open[visitor]
        if last and visitor not in self._first:  # forgotten meanwhile
            del self._open[visitor]
        return last

    def connected(self, visitor: str) -> bool:
        return self._open.get(visitor, 0) > 0


# ------------------------------------------------------------------------------------------ the middleware


class Doors:
    """ASGI middleware around Gradio's app. page: whose calls are known. most_text: characters of the longest text that
    may be sent.
    """

    def __init__(self, app: ASGIApp, page: gr.Blocks, sessions: Sessions, most_text: int):
        self.app, self.page, self.sessions = app, page, sessions
        self.most_body = MAX_BODY + 6 * most_text  # as \uXXXX
        self.beats, self._uploads, self._tool_calls = Beats(), 0, 0
        adapt(page)
        sessions.connected = self.beats.connected

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        answer = _Answer(send, as_mistake=CALL.fullmatch(_path(scope)) is not None)
        try:
            await self._let_in(scope, receive, answer.send)
        except Exception as error:
            if answer.begun:
                raise
            status, sentence = _fault(error)
            # Gradio's page shows `error`, FastAPI's clients read `detail`.
            await JSONResponse({"error": sentence, "detail": sentence}, status)(scope, receive, send)

    async def _let_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = _path(scope)
        if CLOSED.match(path):
            raise Refused(404, NO_SUCH)
        for name in parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", ()):
            _named(name)
        if (visitor := dict(scope["headers"]).get(VISITOR.encode())) is not None:
            _named(visitor.decode("latin-1"))
        if path.startswith(f"{API}heartbeat/"):
            await self._stay(path.removeprefix(f"{API}heartbeat/").rstrip("/"), scope, receive, send)
        elif path.startswith(f"{API}mcp"):
            await self._take_tool_call(scope, receive, send)
        elif scope["method"] != "POST":
            await self.app(scope, receive, send)
        elif path.startswith(f"{API}upload"):
            await self._take_upload(scope, receive, send)
        else:
            body = await _read(scope, receive, self.most_body)
            if call := CALL.fullmatch(path):
                body = self._understood(call, body)
            await self.app(_with_length(scope, body), _replay(body, receive), send)

    async def _stay(self, visitor: str, scope: Scope, receive: Receive, send: Send) -> None:
        if not self.beats.open(_named(visitor)):
            raise Refused(403, "This session was begun by another connection.")
        try:
            await self.app(scope, receive, send)
        finally:
            if self.beats.close(visitor):
                # Not awaited, as this task may be cancelled already; in a thread, as files may have to go.
                with suppress(RuntimeError):  # the server ends
                    leave = asyncio.get_running_loop().run_in_executor
                    leave(None, self.sessions.leave, SimpleNamespace(session_hash=visitor))

    async def _take_tool_call(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A call by MCP, which is a visitor of its own: its work ends with the connection that waits for it."""
        if scope["method"] != "POST":
            listens = b"text/event-stream" in dict(scope["headers"]).get(b"accept", b"")
            if listens or scope["method"] == "DELETE":
                raise Refused(405, NO_STREAM)
            await self.app(scope, receive, send)
            return
        body = await _read(scope, receive, MAX_TOOL_CALL)
        if self._tool_calls >= MAX_TOOL_CALLS:
            await _refused_tool(body)(scope, receive, send)
            return
        self._tool_calls += 1
        visitor = secrets.token_hex(16)
        try:
            named = _with_length(scope, body)
            others = [(name, value) for name, value in named["headers"] if name != VISITOR.encode()]
            named["headers"] = [*others, (VISITOR.encode(), visitor.encode())]
            await self.app(named, _replay(body, receive), send)
        finally:
            self._tool_calls -= 1
            with suppress(RuntimeError):  # the server ends
                asyncio.get_running_loop().run_in_executor(None, self.sessions.hang_up, visitor)

    async def _take_upload(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._uploads += 1
        try:
            most = (MAX_UPLOAD_MB << 20) + MAX_BODY
            await self.app(scope, _bounded(scope, receive, most), send)
        finally:
            self._uploads -= 1
            cache = Path(self.page.GRADIO_CACHE)
            if not self._uploads and is_own(cache):  # Gradio leaves what came of an upload that broke off
                for path in cache.glob("tmp*"):
                    with suppress(OSError):
                        path.unlink()

    def _understood(self, call: re.Match, body: bytes) -> bytes:
        """The body of a call, checked; a call without a session gets one of its own."""
        try:
            asked = json.loads(body)
        except (ValueError, RecursionError):
            raise Refused(400, "The request is not JSON.") from None
        if not isinstance(asked, dict):
            raise Refused(400, "The request is no JSON object.")
        fns, name = self.page.fns, call["name"]
        by_name = call["v2"] or asked.get("fn_index") is None
        if name and by_name and name not in {fn.api_name for fn in fns.values() if fn.fn}:
            raise Refused(404, f"There is no endpoint '/{name[:40]}' here.")
        if call["v2"] and call["way"] == "call":  # its body is the parameters by name
            return body
        if not isinstance(asked.get("data"), list):
            raise Refused(400, "The request has no 'data', a list of values.")
        index = asked.get("fn_index")
        if index is not None and (not isinstance(index, int) or index not in fns or fns[index].fn is None):
            raise Refused(404, "There is no function of this number here.")
        if not isinstance(asked.get("trigger_id"), int | None) or not isinstance(asked.get("event_id"), str | None):
            raise Refused(400, UNREADABLE)
        if asked.get("session_hash") is not None:
            self.beats.heard(_named(asked["session_hash"]))
        elif call["way"] in ("run", "api"):
            return json.dumps(asked | {"session_hash": secrets.token_hex(16)}).encode()
        return body


def _path(scope: Scope) -> str:
    path, root = scope["path"], scope.get("root_path") or ""
    return path[len(root) :] if path == root or path.startswith(f"{root}/") else path


def _named(name: Any) -> str:
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise Refused(400, BAD_SESSION)
    return name


def _fault(error: Exception) -> tuple[int, str]:
    """Status and sentence."""
    if isinstance(error, Refused):
        return error.status, str(error)
    if is_disk_full(error):
        return 507, NO_ROOM
    logging.getLogger("ovam").exception("A request failed.", exc_info=error)
    return 400, UNREADABLE


def _refused_tool(body: bytes) -> JSONResponse:
    """Too many tools are at work, as MCP says it: of an answer with another status its clients read nothing."""
    number = None
    with suppress(ValueError, RecursionError, AttributeError):
        number = json.loads(body).get("id")
    return JSONResponse({"jsonrpc": "2.0", "id": number, "error": {"code": -32000, "message": MANY_CALLS}})


class _Answer:
    """Hands on what the app answers. as_mistake: Gradio answers a call that cannot be with 500, which is for faults of
    the server's.
    """

    def __init__(self, send: Send, as_mistake: bool):
        self.begun = False
        self._send, self._as_mistake = send, as_mistake
        self._held: Message | None = None

    async def send(self, message: Message) -> None:
        self.begun = True
        if message["type"] == "http.response.start" and message["status"] == 500 and self._as_mistake:
            self._held = message
            return
        if self._held is not None:
            held, self._held = self._held, None
            if OUR_FAULT.encode() not in message.get("body", b""):
                held["status"] = 422
            await self._send(held)
        await self._send(message)


# ------------------------------------------------------------------------------------------------- bodies


def _bounded(scope: Scope, receive: Receive, most: int) -> Receive:
    """`receive`, which raises Refused as soon as more than `most` bytes are announced, or have come."""
    too_large = Refused(413, f"This is larger than the {most >> 20} MB that can be sent.")
    announced = dict(scope["headers"]).get(b"content-length", b"0")
    if not announced.isdigit() or len(announced) > 15 or int(announced) > most:
        raise too_large
    come = 0

    async def bounded() -> Message:
        nonlocal come
        message = await receive()
        come += len(message.get("body", b""))
        if come > most:
            raise too_large
        return message

    return bounded


async def _read(scope: Scope, receive: Receive, most: int) -> bytes:
    bounded, parts, more = _bounded(scope, receive, most), [], True
    while more:
        message = await bounded()
        if message["type"] == "http.disconnect":
            raise Refused(400, UNREADABLE)
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body once more, then what comes after it."""
    left = [body]

    async def again() -> Message:
        if left:
            return {"type": "http.request", "body": left.pop(), "more_body": False}
        return await receive()

    return again


def _with_length(scope: Scope, body: bytes) -> Scope:
    headers = [
        (name, value) for name, value in scope["headers"] if name not in (b"content-length", b"transfer-encoding")
    ]
    return {**scope, "headers": [*headers, (b"content-length", str(len(body)).encode())]}


# ---------------------------------------------------------------------------------------- within Gradio


def watch(page: gr.Blocks, most: Mapping[int, int]) -> None:
    """Bounds the values of every event of the page before Gradio reads them, stamps its mails, and says what goes wrong
    beside handlers: where values are read, and where answers are written.

    most: characters that may be sent for a component, by its id, where it is more than usual. Gradio makes components
    of a session's own once one is updated there; the page's own functions stay.
    """
    read, write, process = page.preprocess_data, page.postprocess_data, page.process_api
    trim_soon = _Trimming()

    async def preprocess_data(block_fn: Any, inputs: list[Any], *others: Any, **more: Any) -> list[Any]:
        with said():
            check_values(block_fn.inputs, inputs, most)
            try:
                return await read(block_fn, inputs, *others, **more)
            except (gr.Error, OSError):
                raise
            except Exception:
                logging.getLogger("ovam").info("The values of an event could not be read.", exc_info=True)
                raise InputError("What was sent cannot be read; reload the page and try again.") from None

    async def postprocess_data(block_fn: Any, values: Any, *others: Any) -> list[Any]:
        return await write(block_fn, stamped(block_fn.outputs, values), *others)

    async def process_api(*given: Any, **more: Any) -> dict[str, Any]:
        with said():
            try:
                return await process(*given, **more)
            finally:
                trim_soon()

    page.preprocess_data, page.postprocess_data = preprocess_data, postprocess_data  # type: ignore[method-assign]
    page.process_api = process_api  # type: ignore[method-assign]


class _Trimming:
    """Frees memory that nobody uses any more a moment after an event, once for all events meanwhile: until then what
    went wrong in one still holds what it had decoded.
    """

    def __init__(self) -> None:
        self._due = 0.0

    def __call__(self) -> None:
        now = time.monotonic()
        if now >= self._due:
            self._due = now + 1.0
            loop = asyncio.get_running_loop()
            loop.call_later(1.0, lambda: loop.run_in_executor(None, trim_memory))
