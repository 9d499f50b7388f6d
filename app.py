"""The page: `python app.py`. It opens a model, lays out the tabs and starts; the work is in ovam_core and tabs/."""

from __future__ import annotations

import html
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before gradio is imported

import gradio as gr

from ovam_core import OVAM
from ovam_core.errors import HubUnreachable, InputError
from ovam_core.models.load import quiet
from ovam_core.models.presets import DEFAULT_HUB_MODEL, EMBEDDED
from tabs.export import ExportTab
from tabs.fields import MAX_UPLOAD_MB
from tabs.generate import GenerateTab
from tabs.model import Model
from tabs.optimize import OptimizeTab
from tabs.session import Sessions

PAPER = "https://openaccess.thecvf.com/content/CVPR2024/html/Marcos-Manchon_Open-Vocabulary_Attention_Maps_with_Token_Optimization_for_Semantic_Segmentation_in_CVPR_2024_paper.html"
CODE = "https://github.com/vpulab/ovam"
CSS = Path(__file__).parent / "tabs" / "style.css"

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
                ExportTab(model)
        page.unload(sessions.leave)
    return page.queue(default_concurrency_limit=1, max_size=64)


def launch(page: gr.Blocks, **options: Any) -> Any:
    """Starts the page; theme and css belong to launch() since Gradio 6."""
    return page.launch(
        theme=THEME,
        css_paths=CSS,
        footer_links=["api"],
        run_history=False,
        ssr_mode=False,
        max_file_size=f"{MAX_UPLOAD_MB}mb",
        **options,
    )


def main() -> int:
    quiet()
    try:
        ovam, notice = open_model()
    except InputError as error:
        sys.stderr.write(f"Error: {error}\n")
        return 2
    launch(build(ovam, notice))
    return 0


if __name__ == "__main__":
    sys.exit(main())
