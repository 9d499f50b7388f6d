"""`ovam generate`: an image, then the heatmap and mask of any word."""

from __future__ import annotations

from dataclasses import dataclass, replace

import typer

from ovam_core.cli.options import (
    PICTURE,
    SamplingOptions,
    SizeOptions,
    StepOptions,
    argument,
    given,
    open_model,
    option,
    setting,
)
from ovam_core.cli.progress import counter
from ovam_core.cli.segment import HalfOptions, RecordingOptions, SegmentOptions, answer, check_asked, read_asked
from ovam_core.errors import InputError
from ovam_core.settings import GUIDANCE_KINDS, PLAIN, GenerateSettings


@dataclass(kw_only=True)
class Options(SegmentOptions, HalfOptions, RecordingOptions, StepOptions, SizeOptions, SamplingOptions):
    """An image, then the heatmap and mask of any word.

    Makes an image and writes it with a heatmap, an overlay and a mask for each word.
    """

    prompt: str | None = argument("what the picture shows", required=False)
    seed: int | None = setting(GenerateSettings, "seed", said="0", panel=PICTURE)
    guidance_kind: str | None = option(
        "how the guidance is spread: s-cfg gives every region of the prompt's words a strength of its own",
        said=PLAIN,
        choices=GUIDANCE_KINDS,
        panel=PICTURE,
    )
    start: str | None = option("a picture to begin from in place of noise", panel=PICTURE, metavar="FILE")
    strength: float | None = setting(GenerateSettings, "strength", panel=PICTURE)


def run(options: Options) -> None:
    """Reads everything, refuses what is wrong, and only then spends time on an image."""
    from ovam_core.io.pictures import read_photo
    from ovam_core.methods import method_named
    from ovam_core.query import halves_of

    start = None if options.start is None else read_photo(options.start)
    about_image = (
        given(
            prompt=options.prompt,
            negative_prompt=options.negative_prompt,
            seed=options.seed,
            steps=options.steps,
            guidance=options.guidance,
            guidance_kind=options.guidance_kind,
            start=start,
            strength=options.strength,
        )
        | options.width_and_height()
    )
    about_maps = options.about_maps() | given(branch=options.branch)
    if options.use_steps is not None:
        about_maps["step_indices"] = options.step_indices()
    if options.settings is None and options.prompt is None:
        raise InputError("The prompt is missing; describe the picture in a few words.")
    before, asked, model, device = read_asked(options, about_maps, GenerateSettings)
    if options.strength is not None and start is None and (before is None or before.start is None):
        raise InputError("--strength is given and no picture to start from; give --start, or leave it out.")
    ovam = open_model(model, device)
    wanted = GenerateSettings.for_model(ovam.pipe, **about_image) if before is None else replace(before, **about_image)
    asked = check_asked(ovam, wanted, asked, options)
    options.check_recording()
    with counter("step") as on_step:
        picture = ovam.draw(
            wanted,
            on_step=on_step,
            branch=halves_of(asked),
            with_goca=ovam.serves_goca if options.recording else method_named(asked.method).needs_goca,
            with_features=method_named(asked.method).needs_features,
            keep=method_named(asked.method).keeps,
        )
    options.keep(picture)
    answer(ovam, picture, asked, options.out)
    steps = ovam.steps_run(wanted)
    typer.echo(f"seed {wanted.seed}, {steps} steps, {picture.seconds:.1f} s on {picture.device}: {options.out}")
