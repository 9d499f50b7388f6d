"""How much better a learned token does than the word: measures that can fail, and on what they were measured."""

from __future__ import annotations

import html

import numpy as np

from ovam_core.data.metrics import confusion, iou
from ovam_core.io.masks import IGNORE
from ovam_core.optimization import Optimized
from ovam_core.picture import Segmentation

from .canvas import connected


def agreement(found: Segmentation, labels: np.ndarray) -> tuple[float, float]:
    """IoU of the word's and of the token's mask with the mask given, where it is labelled."""
    before, after = (float(iou(confusion(mask, labels == 1, labels == IGNORE))) for mask in found.masks)
    return before, after


def right_share(mask: np.ndarray, labels: np.ndarray) -> float:
    """Of the labelled pixels, how many a mask has right: the mean of object and background, as strokes of the two may
    differ much in length.
    """
    return float((mask[labels == 1].mean() + (~mask)[labels == 0].mean()) / 2)


def held_share(mask: np.ndarray, labels: np.ndarray) -> float:
    """How much of a mask hangs together with a pixel that is labelled as the object: about the rest nobody has said
    anything. 0 for an empty mask.
    """
    return float(connected(mask, labels == 1).sum() / max(1, mask.sum()))


def verdict(name: str, found: Segmentation, labels: np.ndarray, search: Optimized) -> str:
    """How much better the token does than the word, by measures that can fail, and on what it was measured; HTML.

    found: word and token, cut by one rule. On a few strokes the IoU is 1 for almost any mask: there it is the loss that
    was minimised, and what of the masks nobody has looked at.
    """
    marked = int((labels != IGNORE).sum())
    word = html.escape(name)
    if marked > labels.size / 2:
        before, after = agreement(found, labels)
        where = "" if marked == labels.size else f" on the {marked:,} pixels that it labels"
        head = _change(word, f"{before:.2f}", f"{after:.2f}", f"IoU with your mask{where}", after > before)
        more = f"loss {search.losses[0]:.4f} → {search.loss:.4f}"
    else:
        of_strokes = f"loss on the {marked:,} pixels that you marked"
        head = _change(
            word, f"{search.losses[0]:.3f}", f"{search.loss:.3f}", of_strokes, search.loss < search.losses[0]
        )
        right, held = ([f"{share(mask, labels):.0%}" for mask in found.masks] for share in (right_share, held_share))
        more = (
            f"of these pixels {right[0]} → {right[1]} are right · of the whole mask {held[0]} → {held[1]} hangs "
            "together with your object strokes; the rest nobody has looked at"
        )
    asked = found.settings
    rule = f"both masks cut at τ {asked.tau:.2f}, α {asked.alpha:.2f}{', dense CRF' if asked.crf else ''}"
    how = search.reason or f"{search.epochs} epochs"
    return f"{head}<p>{more} · {rule}</p><p>{html.escape(how)} · {search.seconds:.1f} s</p>"


def _change(word: str, before: str, after: str, measure: str, better: bool) -> str:
    worse = "" if better else " <em>no better than the word</em>"
    return (
        f'<p class="verdict"><b>{before}</b> the word <i>{word}</i> → <b>{after}</b> its token{worse} '
        f"<span>{measure}</span></p>"
    )
