"""Fields that several tabs have: a photograph with its caption and noise, and the switch of the dense CRF."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ovam_core.attention import mask
from ovam_core.checks import MAX_PROMPT, MAX_SEED
from ovam_core.errors import InputError
from ovam_core.hooks.photograph import check_kind, fitted_size
from ovam_core.io.pictures import read_photo
from ovam_core.ovam import OVAM, default_caption
from ovam_core.settings import PhotoSettings, SegmentSettings, parse_numbers

from .canvas import check_pixels
from .events import Inputs

MAX_UPLOAD_MB = 20  # of any file
NO_CRF = "SimpleCRF is not installed."


def takes_photographs(ovam: OVAM) -> bool:
    """Whether the upload is offered with this model."""
    try:
        check_kind(ovam.pipe)
    except InputError:
        return False
    return True


def crf_switch(method_has_it: bool = True) -> dict[str, Any]:
    """Keywords of the checkbox of the dense CRF: without SimpleCRF it is off, cannot be moved, and says why."""
    if not mask.crf_available():
        return {"value": False, "interactive": False, "info": NO_CRF}
    return {"interactive": method_has_it}


class PhotoFields:
    """Lays out the photograph's file, its caption, the timesteps and the seed of the noise.

    prefix: of the elements' ids. names: what an empty caption is made of, for people. pixels: that a photograph may
    have. timestep: the model's usual noise.
    """

    def __init__(self, prefix: str, names: str, pixels: int, timestep: int):
        self.pixels = pixels
        self.photo = gr.Image(
            label="Photograph",
            show_label=False,
            type="filepath",
            sources=["upload", "clipboard"],
            buttons=[],
            height=220,
            placeholder=f"Drop a photograph here, or click to choose one\nJPEG or PNG, up to {MAX_UPLOAD_MB} MB",
            elem_id=f"{prefix}-file",
            elem_classes="upload",
            alt_text="The photograph that was uploaded",
        )
        with gr.Accordion("Advanced: caption and noise", open=False, elem_id=f"{prefix}-more"):
            self.caption = gr.Textbox(
                "",
                label="Caption",
                info=f"What it shows. Left empty, it is made of {names}.",
                placeholder="A photograph of a cat and a car",
                max_length=MAX_PROMPT,
                elem_id=f"{prefix}-caption",
            )
            with gr.Row():
                self.timesteps = gr.Textbox(
                    str(timestep),
                    label="Timesteps",
                    max_length=MAX_PROMPT,
                    min_width=150,
                    elem_id=f"{prefix}-timesteps",
                    info="how much noise, 0 to 999; one pass each: 100, or 50, 100",
                )
                self.seed = gr.Number(
                    0,
                    label="Seed",
                    info="of the noise",
                    precision=0,
                    minimum=0,
                    maximum=MAX_SEED,
                    min_width=110,
                    elem_id=f"{prefix}-seed",
                )
            self.mirror = gr.Checkbox(
                False,
                label="See it in a mirror, too",
                info="the maps are means of both; twice the passes",
                elem_id=f"{prefix}-mirror",
            )
        self.all = [self.photo, self.caption, self.timesteps, self.seed, self.mirror]

    def read(self, ovam: OVAM, given: Inputs, asked: SegmentSettings) -> tuple[str | None, PhotoSettings]:
        """The photograph's file, of no more pixels than may be decoded, and what it is recorded with; no more of either
        is checked yet.

        asked: what an empty caption is made of.
        """
        texts = given.text(self.caption), given.text(self.timesteps)
        file = small_enough(given.file(self.photo), self.pixels)
        settings = photo_settings(ovam, *texts, given.whole(self.seed), asked)
        return file, replace(settings, mirror=given.ticked(self.mirror))


def small_enough(file: str | None, pixels: int) -> str | None:
    """The file of a picture. Raises InputError, told by its header alone, for one of more pixels; what is no picture is
    for others to say.
    """
    if file is None:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture = Image.open(file)
    except Exception:
        return file
    with picture:
        check_pixels(picture, pixels)
    return file


def photo_settings(ovam: OVAM, caption: str, timesteps: str, seed: Any, asked: SegmentSettings) -> PhotoSettings:
    """The fields as settings, not validated yet; asked: what an empty caption is made of."""
    steps = parse_numbers(timesteps, "timesteps", ovam.pipe.scheduler.config.num_train_timesteps - 1)
    steps = steps or (ovam.adapter.photo_timestep,)
    return PhotoSettings(" ".join(caption.split()) or default_caption(asked), steps, seed)


def check_photo(ovam: OVAM, file: str | None, settings: PhotoSettings) -> str:
    """The file. Raises InputError, one sentence, for whatever would keep the photograph from being recorded."""
    if not file:
        raise InputError("There is no photograph yet; upload one.")
    if not Path(file).is_file():
        raise InputError("The photograph is not on the server any more; upload it again.")
    settings.validate(ovam.pipe)
    fitted_size(ovam.pipe, read_photo(file))
    return file
