"""A photograph of the visitor's: the same fields in both tabs, and what is read from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from ovam_core.checks import MAX_PROMPT, MAX_SEED
from ovam_core.errors import InputError
from ovam_core.hooks.photograph import TIMESTEPS, check_kind, fitted_size
from ovam_core.io.pictures import read_photo
from ovam_core.ovam import default_caption
from ovam_core.settings import MapSettings, PhotoSettings, parse_numbers

MAX_UPLOAD_MB = 20  # of any file


def takes_photographs(pipe: Any) -> bool:
    """Whether the upload is offered with this model."""
    try:
        check_kind(pipe)
    except InputError:
        return False
    return True


def photo_fields(prefix: str, names: str) -> list[gr.Image | gr.Textbox | gr.Number]:
    """Lays out the photograph's file, its caption, the timesteps and the seed of the noise, and returns them in this order.

    names: what an empty caption is made of.
    """
    photo = gr.Image(
        label="Photograph",
        show_label=False,
        type="filepath",
        image_mode=None,
        sources=["upload", "clipboard"],
        buttons=[],
        height=220,
        placeholder=f"Drop a photograph here, or click to choose one\nJPEG or PNG, up to {MAX_UPLOAD_MB} MB",
        elem_id=f"{prefix}-file",
        elem_classes="upload",
        alt_text="The photograph that was uploaded",
    )
    # Gradio would open the file, and in other modes than RGB turn and convert it; read_photo does, and says what is wrong.
    photo.preprocess = lambda file: None if file is None else file.path
    with gr.Accordion("Advanced: caption and noise", open=False, elem_id=f"{prefix}-more"):
        caption = gr.Textbox(
            "",
            label="Caption",
            info=f"What it shows. Left empty, it is made of {names}.",
            placeholder="A photograph of a cat and a car",
            max_length=MAX_PROMPT,
            elem_id=f"{prefix}-caption",
        )
        with gr.Row():
            timesteps = gr.Textbox(
                ", ".join(map(str, TIMESTEPS)),
                label="Timesteps",
                min_width=150,
                elem_id=f"{prefix}-timesteps",
                info="how much noise, 0 to 999; one pass each: 100, or 50, 100",
            )
            seed = gr.Number(
                0,
                label="Seed",
                info="of the noise",
                precision=0,
                minimum=0,
                maximum=MAX_SEED,
                min_width=110,
                elem_id=f"{prefix}-seed",
            )
    return [photo, caption, timesteps, seed]


def photo_settings(pipe: Any, caption: str, timesteps: str, seed: Any, asked: MapSettings) -> PhotoSettings:
    """The fields as settings, not validated yet; asked: what an empty caption is made of."""
    steps = parse_numbers(timesteps or "", "timesteps", pipe.scheduler.config.num_train_timesteps - 1)
    caption = " ".join((caption or "").split())
    return PhotoSettings(caption or default_caption(asked), steps or TIMESTEPS, seed)


def check_photo(pipe: Any, file: str | None, settings: PhotoSettings) -> None:
    """Raises InputError, one sentence, for whatever would keep the photograph from being recorded."""
    if not file:
        raise InputError("There is no photograph yet; upload one.")
    if not Path(file).is_file():
        raise InputError("The photograph is not on the server any more; upload it again.")
    settings.validate(pipe)
    fitted_size(pipe, read_photo(file))
