"""What the page says to its visitors, before Gradio is there and after."""

from __future__ import annotations

import html
import os
import re
import sys
import tempfile
from pathlib import Path

OUR_FAULT = "Something went wrong on our side. Please try again."
MAX_SENTENCE = 600  # characters


def shown(sentence: str) -> str:
    """A sentence as the page may show it: it may quote the visitor, and name files by where the server keeps them.
    HTML, as Gradio renders messages.
    """
    readable = sentence.encode("utf-8", "replace").decode("utf-8")
    return html.escape(_server_paths().sub(r"\1", readable)[:MAX_SENTENCE], quote=False)


def _server_paths() -> re.Pattern:
    """Paths of files on this server; their last part, what an upload is called, is the group."""
    roots = {tempfile.gettempdir(), os.environ.get("GRADIO_TEMP_DIR", ""), str(Path.home()), os.getcwd(), sys.prefix}
    roots |= {str(Path(root).resolve()) for root in roots if root}
    listed = "|".join(re.escape(root) for root in sorted(roots, key=len, reverse=True) if len(root) > 1)
    return re.compile(rf"(?:{listed})[/\\](?:[^/\\\s'\"]+[/\\])*([^/\\\s'\"]*)")
