"""Pictures at the size of a screen, and how they were made as a line of facts."""

from __future__ import annotations

import html

from PIL import Image

from ovam_core import plot
from ovam_core.picture import Picture
from ovam_core.settings import PLAIN, PhotoSettings

MAX_SHOWN = 1024  # pixels of a side on the page; a photograph may have many more


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
    kind = "" if settings.guidance_kind == PLAIN else f" {settings.guidance_kind.upper()}"
    half = "" if picture.recording.branch == "conditional" else f" · {picture.recording.branch} half"
    return (
        f"seed {settings.seed} · {settings.steps} steps · guidance {settings.guidance:g}{kind} · "
        f"{settings.width} × {settings.height} px{half}"
    )
