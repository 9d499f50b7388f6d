"""Maps, masks and losses to what the page shows: pictures at the size of a screen, and two pieces of HTML."""

from __future__ import annotations

import html
from collections.abc import Callable

import numpy as np
from PIL import Image

from ovam_core import plot
from ovam_core.picture import Picture, Segmentation
from ovam_core.settings import PhotoSettings

MAX_SHOWN = 1024  # pixels of a side on the page; a photograph may have many more

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
    """The line of facts under a picture, a photograph's caption before them; HTML."""
    if not isinstance(picture.settings, PhotoSettings):
        return run_facts(picture)
    caption = picture.settings.caption
    return f"{f'“{html.escape(caption)}”' if caption else 'no caption'} · {run_facts(picture)}"


def run_facts(picture: Picture) -> str:
    """How a picture was made, as plain text."""
    return f"{_how(picture)} · {picture.seconds:.1f} s on {picture.device}"


def _how(picture: Picture) -> str:
    settings = picture.settings
    if isinstance(settings, PhotoSettings):
        (height, width), steps = picture.recording.image_size, ", ".join(map(str, settings.timesteps))
        return (
            f"timestep{'s' * (len(settings.timesteps) > 1)} {steps} · noise seed {settings.seed} · "
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
