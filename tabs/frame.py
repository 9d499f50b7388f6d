"""The frame of the page: its look, its tabs around one model, and how Gradio is to serve it."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import gradio as gr
import uvicorn
from gradio import http_server, route_utils
from gradio.exceptions import ServerFailedToStartError
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ovam_core import OVAM

from .canvas import MAX_PAINT
from .doors import Doors, watch
from .events import THREADS
from .export import MAX_TEXT, ExportTab
from .fields import MAX_UPLOAD_MB
from .generate import GenerateTab
from .head import head
from .model import Model
from .optimize import OptimizeTab
from .programs import Programs
from .scratch import patient
from .session import Sessions
from .starting import ASSETS, HEALTH, Starting
from .tools import can_serve_tools

CSS = [ASSETS / f"{name}.css" for name in ("page", "viewer", "generate", "optimize", "export")]
SKIP = '<a class="skip" href="#result">Skip to the result</a>'
clear_files = patient(route_utils.delete_files_created_by_app)
PATIENCE = 60.0  # seconds for the server to take its first request: Gradio's 5 are few on a busy machine

THEME = gr.themes.Default(
    primary_hue="indigo",
    secondary_hue="indigo",
    neutral_hue="slate",
    radius_size="lg",
    # Strings only: gradio's font objects would be fetched, from here or from outside.
    font=["ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],
    font_mono=["ui-monospace", "SF Mono", "Menlo", "Consolas", "monospace"],
).set(  # the defaults are too faint to read
    body_text_color_subdued="*neutral_500",
    body_text_color_subdued_dark="*neutral_400",
    block_info_text_color="*neutral_500",
    link_text_color_dark="*primary_300",
)


def build(ovam: OVAM, notice: str = "", sessions: Sessions | None = None) -> gr.Blocks:
    """The whole page around one model. sessions: what its visitors have, by default within the usual bounds."""
    sessions = sessions or Sessions(ovam.name)
    model = Model(ovam, sessions)
    with gr.Blocks(title="OVAM", analytics_enabled=False, delete_cache=(3600, 7200)) as page:
        Programs(model)
        gr.HTML(
            SKIP + head(ovam.name, str(ovam.device), notice),
            elem_id="head",
            js_on_load=(ASSETS / "page.js").read_text(encoding="utf-8"),
        )
        with gr.Tabs():
            with gr.Tab("Generate"):
                first = GenerateTab(model)
            with gr.Tab("Optimize a token") as second:
                learn = OptimizeTab(model, second, first.key, first.pick, first.renewed, first.words)
            with gr.Tab("Batch mask export"):
                third = ExportTab(model)
    page.sessions, page.most_text = sessions, min(MAX_TEXT, sessions.limits.text)
    watch(page, {third.text._id: page.most_text, learn.paint._id: MAX_PAINT})
    return page.queue(default_concurrency_limit=1, max_size=256, api_open=False)  # nobody passes by the queue


def launch(page: gr.Blocks, **options: Any) -> Any:
    """Starts a page of `build`; theme and css belong to launch() since Gradio 6."""
    route_utils.delete_files_created_by_app = clear_files
    doors = Middleware(Doors, page=page, sessions=page.sessions, most_text=page.most_text)
    return page.launch(
        app_kwargs={"middleware": [Middleware(compressed), doors], "routes": [Route(HEALTH, partial(_health, page))]},
        state_session_capacity=page.sessions.bounds.sessions + 200,  # whose states none of them loses; 0.3 MB each
        _frontend=False,  # else it gives up where the page takes 3 s to answer, as on a busy machine
        enable_monitoring=False,
        theme=THEME,
        css_paths=CSS,
        footer_links=["api"],
        run_history=False,
        max_threads=THREADS,
        ssr_mode=False,
        max_file_size=f"{MAX_UPLOAD_MB}mb",
        mcp_server=can_serve_tools(),
        **options,
    )


def compressed(app: ASGIApp) -> ASGIApp:
    """The page itself and its description, a tenth of the bytes: Gradio compresses its scripts and styles alone."""
    small = GZipMiddleware(app, minimum_size=1024)

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "").removeprefix(scope.get("root_path") or "")
        await (small if path.rstrip("/") in ("", "/config") else app)(scope, receive, send)

    return serve


async def _health(page: gr.Blocks, _request: Request) -> JSONResponse:
    """The end of what the starting page waits for."""
    ready = page.server_app.startup_events_triggered
    return JSONResponse({"ready": ready}, status_code=200 if ready else 503)


@contextmanager
def in_place_of(starting: Starting) -> Iterator[None]:
    """Within the block, Gradio serves on the sockets of the starting page, which never cease to listen; it would look
    for a port of its own and take it anew.
    """
    with patch.object(http_server, "start_server", partial(_start_server, starting.hand_over, starting)):
        yield


def _start_server(
    sockets: Callable[[], list[socket.socket]], starting: Starting, app: Any, **_settings: Any
) -> tuple[str, int, str, http_server.Server]:
    """What Gradio's function of this name returns: name, port, address and the server, which runs."""
    server = http_server.Server(uvicorn.Config(app, starting.host, starting.port, log_level="warning"))
    server.run = partial(server.run, sockets=sockets())  # type: ignore[method-assign]
    begun = time.monotonic()
    try:
        server.run_in_thread()
    except ServerFailedToStartError:
        while not server.started:
            if not server.thread.is_alive() or time.monotonic() - begun > PATIENCE:
                raise OSError("its server does not answer") from None
            time.sleep(0.01)
    return starting.name, starting.port, starting.address, server
