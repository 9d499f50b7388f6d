"""The page: `python app.py`. It opens a model, lays out the tabs and starts; the work is in ovam_core and tabs/."""

from __future__ import annotations

import html
import os
import socket
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before gradio is imported
if not os.environ.get("GRADIO_SERVER_PORT", "0").isdecimal():  # the import of gradio would end in a traceback
    os.environ["OVAM_NO_PORT"] = os.environ.pop("GRADIO_SERVER_PORT")  # for `wanted_port` to say

import gradio as gr
import httpx
from starlette.middleware import Middleware

from ovam_core import OVAM
from ovam_core.errors import HubUnreachable, InputError
from ovam_core.models.load import quiet
from ovam_core.models.presets import DEFAULT_HUB_MODEL, EMBEDDED
from tabs.doors import Doors, watch
from tabs.events import THREADS
from tabs.export import MAX_TEXT, ExportTab
from tabs.fields import MAX_UPLOAD_MB
from tabs.generate import GenerateTab
from tabs.model import Model
from tabs.optimize import OptimizeTab
from tabs.scratch import ended_by_signals, own_folder
from tabs.session import Sessions

PAPER = "https://openaccess.thecvf.com/content/CVPR2024/html/Marcos-Manchon_Open-Vocabulary_Attention_Maps_with_Token_Optimization_for_Semantic_Segmentation_in_CVPR_2024_paper.html"
CODE = "https://github.com/vpulab/ovam"
PROXY = "The page cannot start: this machine does not reach its own address; set NO_PROXY=localhost,127.0.0.1."
ASSETS = Path(__file__).parent / "tabs" / "assets"
CSS = [ASSETS / f"{name}.css" for name in ("page", "viewer", "generate", "optimize", "export")]

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


def open_model() -> tuple[OVAM, str]:
    """The model, and a notice to show (or ""): the embedded one stands in for a hub that cannot be reached.

    A model that OVAM_MODEL asks for and that does not exist is an error, not a reason to show another: InputError.
    """
    wanted = os.environ.get("OVAM_MODEL")
    try:
        return OVAM.from_pretrained(), ""
    except InputError as error:
        if wanted and not isinstance(error, HubUnreachable):
            raise
        notice = f"{wanted or DEFAULT_HUB_MODEL} could not be loaded, so this page runs on {EMBEDDED}. {error}"
        return OVAM.from_pretrained(EMBEDDED), notice


def head(ovam: OVAM, notice: str) -> str:
    """Name, one sentence, the model in use, links; the notice below them if there is one."""
    model, device = html.escape(ovam.name), html.escape(str(ovam.device))
    warning = f'<p class="notice" role="status">{html.escape(notice)}</p>' if notice else ""
    return f"""<header class="head">
<div><h1>Open-Vocabulary Attention Maps</h1><p>Type any word and see where the model put it.</p></div>
<nav><span class="badge" title="model and device in use">{model}<b>{device}</b></span>
<a href="{PAPER}" target="_blank" rel="noopener">Paper</a><a href="{CODE}" target="_blank" rel="noopener">Code</a></nav>
</header>{warning}"""


def build(ovam: OVAM, notice: str = "", sessions: Sessions | None = None) -> gr.Blocks:
    """The whole page around one model. sessions: what its visitors have, by default within the usual bounds."""
    sessions = sessions or Sessions(ovam.name)
    model = Model(ovam, sessions)
    with gr.Blocks(title="OVAM", analytics_enabled=False, delete_cache=(3600, 7200)) as page:
        gr.HTML(head(ovam, notice), elem_id="head")
        with gr.Tabs():
            with gr.Tab("Generate"):
                first = GenerateTab(model)
            with gr.Tab("Optimize a token") as second:
                OptimizeTab(model, second, first.key, first.pick)
            with gr.Tab("Batch mask export"):
                third = ExportTab(model)
    page.sessions, page.most_text = sessions, min(MAX_TEXT, sessions.limits.text)
    watch(page, {third.text._id: page.most_text})
    return page.queue(default_concurrency_limit=1, max_size=256, api_open=False)  # nobody passes by the queue


def launch(page: gr.Blocks, **options: Any) -> Any:
    """Starts a page of `build`; theme and css belong to launch() since Gradio 6."""
    doors = Middleware(Doors, page=page, sessions=page.sessions, most_text=page.most_text)
    return page.launch(
        app_kwargs={"middleware": [doors]},
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
        **options,
    )


def wanted_port() -> int | None:
    """The port that GRADIO_SERVER_PORT names; None to let Gradio look for a free one from 7860 on.

    Raises InputError for one that is none, or taken: who asks for a port looks for the page there, and nowhere else.
    """
    port = os.environ.get("OVAM_NO_PORT") or os.environ.get("GRADIO_SERVER_PORT")
    if not port:
        return None
    if not port.isdecimal() or not 1 <= int(port[:6]) <= 65535:
        raise InputError(f"GRADIO_SERVER_PORT is '{port[:40]}'; set it to a port, a whole number from 1 to 65535.")
    host = os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1").strip("[]")
    try:
        family, *_, address = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, UnicodeError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        raise InputError(
            f"Port {port} of '{host}' cannot be served: {reason}; set GRADIO_SERVER_PORT to a free one."
        ) from None
    return int(port)


def serve(ovam: OVAM, notice: str, port: int | None) -> None:
    """The page, until it is ended; then nothing of it stays on the disk. Raises InputError where it cannot start."""
    with ended_by_signals(), own_folder():
        sessions = Sessions(ovam.name)
        page = build(ovam, notice, sessions)
        try:
            launch(page, server_port=port)
        except OSError as error:
            if page.is_running:
                raise
            raise InputError(f"The page cannot start: {error}") from None
        except Exception as error:
            if not isinstance(error, httpx.TransportError) and "proxy settings" not in str(error):  # of Gradio's words
                raise
            raise InputError(PROXY) from None
        finally:
            sessions.close()
            page.close(verbose=False)


def main() -> int:
    quiet()
    try:
        port = wanted_port()
        serve(*open_model(), port)
    except InputError as error:
        sys.stderr.write(f"Error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
