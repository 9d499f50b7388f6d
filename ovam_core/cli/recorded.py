"""`ovam segment`: the heatmap and mask of any word in a picture that was recorded before, by any process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import typer

from ovam_core.cli.options import StepOptions, argument, given, open_model
from ovam_core.cli.segment import HalfOptions, SegmentOptions, answer, check_asked, read_asked


@dataclass(kw_only=True)
class Options(SegmentOptions, HalfOptions, StepOptions):
    """The heatmap and mask of any word in a recorded picture.

    Asks a file of `generate --recording` or `photo --recording`, without making the picture again.
    """

    recording: str = argument("the recorded picture", metavar="FILE")


def run(options: Options) -> None:
    """Reads the file and what is asked, and only then loads the model that made it."""
    from ovam_core.picture import load_picture
    from ovam_core.settings import GenerateSettings, PhotoSettings

    picture = load_picture(options.recording)
    about_maps = options.about_maps() | given(branch=options.branch)
    if options.use_steps is not None:
        about_maps["step_indices"] = options.step_indices()
    made_by: Any = PhotoSettings if isinstance(picture.settings, PhotoSettings) else GenerateSettings
    _, asked, model, device = read_asked(options, about_maps, made_by)
    ovam = open_model(model or picture.model, device)
    picture = ovam.bind(picture)
    answer(ovam, picture, check_asked(ovam, picture.settings, asked, options), options.out)
    typer.echo(f"asked of {options.recording}, made by {picture.model}: {options.out}")
