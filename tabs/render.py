"""Maps, masks and losses to what the page shows: pictures at the size of a screen, and two pieces of HTML."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ovam_core import plot
from ovam_core.data.formats import read_labels
from ovam_core.io.masks import IGNORE
from ovam_core.picture import Picture, Segmentation
from ovam_core.settings import PhotoSettings

MAX_SHOWN = 1024  # pixels of a side on the page; a photograph may have many more
MAX_CANVAS = 512  # pixels of a side: what the canvas is laid out for
OBJECT, BACKGROUND = "#e69f00", "#0072b2"

# Filled in by gr.HTML's template, from `measures` of the first tab.
SCALE = f"""<div class="scale" role="img" aria-label="Colour scale of all heatmaps, from 0 to ${{value.top}}">
<span>0</span><i style="background: {plot.scale_css()}"></i><span>${{value.top.toFixed(2)}}</span>
<em>one scale for all words</em></div>"""


def shrunk(image: Image.Image, largest: int = MAX_SHOWN) -> Image.Image:
    """The picture with no side longer than `largest`."""
    scale = largest / max(image.size)
    if scale >= 1:
        return image
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def on_screen(image: Image.Image) -> Image.Image:
    """The picture at a size for the page: small ones enlarged, large ones shrunk."""
    return plot.enlarge(shrunk(image))


def image_facts(picture: Picture) -> str:
    """The line of facts under a picture; HTML."""
    return f"{_how(picture)} · {picture.seconds:.1f} s on {picture.device}"


def _how(picture: Picture) -> str:
    settings = picture.settings
    if isinstance(settings, PhotoSettings):
        (height, width), steps = picture.recording.image_size, ", ".join(map(str, settings.timesteps))
        caption = f"“{html.escape(settings.caption)}”" if settings.caption else "no caption"
        return (
            f"{caption} · timestep{'s' * (len(settings.timesteps) > 1)} {steps} · noise seed {settings.seed} · "
            f"{picture.image.width} × {picture.image.height} px, seen as {width} × {height}"
        )
    assert settings is not None  # the page makes no other pictures
    half = "" if picture.recording.branch == "conditional" else f" · {picture.recording.branch} half"
    return (
        f"seed {settings.seed} · {settings.steps} steps · guidance {settings.guidance:g} · "
        f"{settings.width} × {settings.height} px{half}"
    )


# ------------------------------------------------------------------------------------- words and their maps


def gallery_items(found: Segmentation, before_word: Callable[[], None]) -> list[tuple[Image.Image, str]]:
    """One overlay a word, all on the same scale; the caption is also the picture's alternative text.

    before_word: called before each; it may raise to end the work.
    """
    image, top = on_screen(found.picture.image), max(found.peaks)
    items = []
    for label, heatmap, peak in zip(found.labels, found.heatmaps, found.peaks, strict=True):
        before_word()
        items.append((plot.overlay(image, heatmap, top), f"{label} · peak {peak:.2f}"))
    return items


def annotation(found: Segmentation) -> tuple[Image.Image, list[tuple[np.ndarray, str]]]:
    """The picture with a mask a word, as gr.AnnotatedImage takes it."""
    image = on_screen(found.picture.image)
    masks = [plot.resize_mask(mask, image.size).astype(np.float32) for mask in found.masks]
    return image, list(zip(masks, found.labels, strict=True))


# ------------------------------------------------------------------------------------------ a word's token


def canvas_value(image: Image.Image) -> dict[str, Any]:
    """A fresh canvas with the picture on it, at a size to paint on; read_mask brings the paint back to its size."""
    return {"background": plot.enlarge(shrunk(image, MAX_CANVAS)), "layers": [], "composite": None}


def given_mask(image: Image.Image, labels: np.ndarray) -> Image.Image:
    """The picture with the mask as it was understood: object and background in the two colours, the rest as it is.

    labels: uint8 [H, W] at the picture's size.
    """
    image = on_screen(image)
    labels = np.asarray(Image.fromarray(labels).resize(image.size, Image.Resampling.NEAREST))
    shown = plot.mask_overlay(image, labels == 1, OBJECT)
    return plot.mask_overlay(shown, labels == 0, BACKGROUND) if (labels == IGNORE).any() else shown


Pair = tuple[Image.Image, Image.Image]


def word_and_token(found: Segmentation) -> tuple[Pair, Pair]:
    """Heatmaps and masks of a word (first) and its token (second), as two pairs for gr.ImageSlider."""
    image, top = on_screen(found.picture.image), max(found.peaks)
    word, token = (plot.overlay(image, heatmap, top) for heatmap in found.heatmaps)
    word_mask, token_mask = (
        plot.mask_overlay(image, plot.resize_mask(mask, image.size), OBJECT) for mask in found.masks
    )
    return (word, token), (word_mask, token_mask)


def loss_curve(losses: Sequence[float], epochs: int) -> str:
    """The losses so far on an axis of all epochs, as HTML."""
    return f"<h3>Loss</h3>{plot.loss_curve(losses, epochs)}"


# ---------------------------------------------------------------------------------------------- a data set


def side_by_side(folder: Path, row: dict[str, Any]) -> tuple[Image.Image, str]:
    """An image of a data set beside its label map in VOC's colours, and a caption."""
    image = Image.open(folder / row["file_name"]).convert("RGB")
    labels = plot.label_image(read_labels(folder / row["mask_file_name"])).convert("RGB")
    both = Image.new("RGB", (2 * image.width, image.height))
    both.paste(image)
    both.paste(labels, (image.width, 0))
    return plot.enlarge(both, 384), f"{', '.join(row['classes'])} · covers {row['coverage']:.0%}"
