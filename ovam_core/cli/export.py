"""`ovam export`: prompts to a segmentation data set on disk."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

import typer

from ovam_core.cli.options import (
    MASKS,
    PICTURE,
    RUN,
    BatchOptions,
    CutOptions,
    GridOptions,
    MethodOptions,
    ModelOptions,
    SamplingOptions,
    SizeOptions,
    StepOptions,
    given,
    named,
    of_type,
    open_model,
    option,
    setting,
)
from ovam_core.cli.progress import image_bar, move, prompt_bar
from ovam_core.errors import InputError
from ovam_core.settings import FORMATS, BatchSize, Filters, MinPresence, Uncertain

if TYPE_CHECKING:
    from ovam_core.data.prompts import Prompt

FILTERS = "Filters"


@dataclass(kw_only=True)
class Options(
    BatchOptions, ModelOptions, GridOptions, StepOptions, CutOptions, MethodOptions, SizeOptions, SamplingOptions
):
    """Prompts to a segmentation data set on disk.

    Makes a data set of images and label maps: VOC layout, metadata.jsonl, more on request. Stopped at any instant and
    started again, it goes on where it was. For several devices: accelerate launch --multi_gpu --num_processes N -m
    ovam_core export ... (several CPU processes too: --cpu would start only one).
    """

    prompts: str | None = option("lines of text, .csv, .tsv, .jsonl, .json (a list, or COCO captions)", metavar="FILE")
    template: str | None = option("a prompt for each class: 'A photograph of a {}'", metavar="TEXT")
    classes: str | None = option("voc, or names in the order of their labels: 'cat, red bus'", metavar="LIST")
    images_per_prompt: int = option("images of each prompt", default=1, metavar="N")
    limit: int | None = option("at most this many prompts", metavar="N")
    out: str = option("folder for the data set", required=True, metavar="DIR", check=named)
    formats: list[str] | None = option(f"{', '.join(FORMATS)}; voc is always there", "--format", choices=FORMATS)  # noqa: RUF009
    heatmaps: bool = option("keep the maps as float16", "--heatmaps", default=False)
    dry_run: bool = option("say what would be made, how long and how large", "--dry-run", default=False)
    seed: int = option("of the first image; the next has the next", default=0, panel=PICTURE)
    uncertain: float | None = of_type(Uncertain, said="0", panel=MASKS, metavar="U")
    min_presence: float | None = of_type(MinPresence, said="none is", panel=FILTERS, metavar="SHARE")
    clip: str | None = option(
        "a CLIP model, such as openai/clip-vit-base-patch32, for its filter", panel=FILTERS, metavar="MODEL"
    )
    clip_drop: float | None = setting(Filters, "clip_drop", panel=FILTERS, metavar="SHARE")
    min_coverage: float | None = setting(Filters, "min_coverage", panel=FILTERS, metavar="SHARE")
    max_coverage: float | None = setting(Filters, "max_coverage", panel=FILTERS, metavar="SHARE")
    batch_size: int | None = of_type(BatchSize, said="4 on a GPU, else 1", panel=RUN, metavar="N")


def run(options: Options) -> None:
    """Reads and refuses, then exports; the first of several processes speaks."""
    if options.prompts is None and options.template is None:
        raise InputError("One of --prompts and --template is required.")
    if options.prompts is not None and options.template is not None:
        raise InputError("--template is not allowed with --prompts; leave one of them out.")

    from ovam_core.data import ExportSettings, export_dataset, work_list
    from ovam_core.data.export import Progress, measure, plan
    from ovam_core.data.filters import ClipScorer
    from ovam_core.data.layout import SHEET
    from ovam_core.data.runs import launched

    prompts, classes = read(options)
    options.check_workers()
    filters = Filters(
        **given(min_coverage=options.min_coverage, max_coverage=options.max_coverage, clip_drop=options.clip_drop)
    )
    size = options.width_and_height()

    process, device = launched(options.device)
    ovam = open_model(options.model, device)
    settings = ExportSettings.for_model(
        ovam,
        steps=options.steps,
        guidance=options.guidance,
        **size,
        tau=options.tau,
        alpha=options.alpha,
        crf=options.crf(),
        uncertain=options.uncertain,
        min_presence=options.min_presence,
        step_indices=options.step_indices(),
        resolutions=options.grids(),
        tokens=options.tokens,
        formats=None if options.formats is None else tuple(options.formats),
        heatmaps=options.heatmaps,
        batch_size=options.batch_size,
        threads=options.threads,
        clip=options.clip,
        filters=filters,
        method=options.method,
    )
    settings.validate(ovam)
    first = process.rank == 0
    with prompt_bar(first) as looked:
        work = work_list(
            prompts,
            classes,
            options.images_per_prompt,
            options.seed,
            options.limit,
            settings.check(ovam),
            lambda done, total: move(looked, done, total),
            options.negative_prompt or "",
        )
    planned = plan(ovam, work, settings, options.out)
    clip = None if settings.clip is None else ClipScorer(settings.clip, ovam.device)
    if first:
        typer.echo(planned.text())
        if process.ranks > 1:
            typer.echo(f"{process.ranks} processes share the work.")
    if options.dry_run:
        if first:
            typer.echo(measure(ovam, work, settings, planned.done, clip).text())
        return

    shares = process.ranks
    with image_bar(first, -(-planned.images // shares), planned.done // shares) as bar:

        def on_image(progress: Progress) -> None:
            move(bar, progress.done, progress.total)

        summary = export_dataset(
            ovam,
            work,
            settings,
            options.out,
            process=process,
            workers=options.workers,
            clip=clip,
            on_image=on_image,
            on_note=bar.write,
        )
    if first:
        typer.echo(summary.text())
        sheet = os.path.join(options.out, SHEET)
        typer.echo(f"{summary.timings.total:.1f} s: {options.out}, to look at: {sheet}")


def read(options: Options) -> tuple[Collection[Prompt], tuple[str, ...] | None]:
    """The prompts, and the classes where they are named."""
    from ovam_core.data.prompts import PromptFile, class_list, template_prompts

    classes = None if options.classes is None else class_list(options.classes)
    if options.template is not None:
        classes = classes or class_list("voc")
        return template_prompts(options.template, classes), classes
    return PromptFile(options.prompts or ""), classes
