"""The head of the page, which the starting page has as well."""

from __future__ import annotations

import html

PAPER = "https://openaccess.thecvf.com/content/CVPR2024/html/Marcos-Manchon_Open-Vocabulary_Attention_Maps_with_Token_Optimization_for_Semantic_Segmentation_in_CVPR_2024_paper.html"
CODE = "https://github.com/vpulab/ovam"


def head(model: str, device: str, notice: str = "") -> str:
    """Name, one sentence, the model in use, links; the notice below them if there is one."""
    model, device = html.escape(model), html.escape(device)
    warning = f'<p class="notice" role="status">{html.escape(notice)}</p>' if notice else ""
    return f"""<header class="head">
<div><h1>Open-Vocabulary Attention Maps</h1><p>Type any word and see where the model put it.</p></div>
<nav aria-label="About"><span class="badge" title="model and device in use"><span>{model}</span><b>{device}</b></span>
<a href="{PAPER}" target="_blank" rel="noopener">Paper</a><a href="{CODE}" target="_blank" rel="noopener">Code</a></nav>
</header>{warning}"""
