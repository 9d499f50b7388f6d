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
    setting,
)
from ovam_core.cli.progress import counter
from ovam_core.cli.segment import SegmentOptions, answer, check_asked, read_asked
from ovam_core.errors import InputError
from ovam_core.settings import GenerateSettings


@dataclass(kw_only=True)
class Options(SegmentOptions, StepOptions, SizeOptions, SamplingOptions):
    """An image, then the heatmap and mask of any word.

    Makes an image and writes it with a heatmap, an overlay and a mask for each word.
    """

    prompt: str | None = argument("what the picture shows", required=False)
    seed: int | None = setting(GenerateSettings, "seed", said="0", panel=PICTURE)


def run(options: Options) -> None:
    """Reads everything, refuses what is wrong, and only then spends time on an image."""
    from ovam_core.methods import method_named
    from ovam_core.query import branch_of

    about_image = (
        given(
            prompt=options.prompt,
            negative_prompt=options.negative_prompt,
            seed=options.seed,
            steps=options.steps,
            guidance=options.guidance,
        )
        | options.width_and_height()
    )
    about_maps = options.about_maps()
    if options.use_steps is not None:
        about_maps["step_indices"] = options.step_indices()
    if options.settings is None and options.prompt is None:
        raise InputError("The prompt is missing; describe the picture in a few words.")
    before, asked, model, device = read_asked(options, about_maps, GenerateSettings)
    ovam = open_model(model, device)
    wanted = GenerateSettings.for_model(ovam.pipe, **about_image) if before is None else replace(before, **about_image)
    asked = check_asked(ovam, wanted, asked, options)
    with counter("step") as on_step:
        picture = ovam.draw(
            wanted,
            on_step=on_step,
            branch=branch_of(asked.tokens),
            with_goca=method_named(asked.method).needs_goca,
        )
    answer(ovam, picture, asked, options.out)
    typer.echo(f"seed {wanted.seed}, {wanted.steps} steps, {picture.seconds:.1f} s on {picture.device}: {options.out}")
