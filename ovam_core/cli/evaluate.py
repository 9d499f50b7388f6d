"""`ovam evaluate`: IoU of a method over a data set of photographs in VOC layout."""

from __future__ import annotations

import os
from dataclasses import dataclass

import typer

from ovam_core.cli.options import (
    MASKS,
    PHOTO,
    BatchOptions,
    CutOptions,
    MethodOptions,
    ModelOptions,
    NoiseOptions,
    named,
    open_model,
    option,
)
from ovam_core.cli.progress import image_bar, move
from ovam_core.settings import DEFAULT_METHOD


@dataclass(kw_only=True)
class Options(BatchOptions, ModelOptions, CutOptions, MethodOptions, NoiseOptions):
    """IoU of a method over a data set of photographs in VOC layout.

    Runs a method over the photographs of a data set in VOC layout, with a caption that lists the objects, and prints
    IoU a class and mIoU from one confusion matrix. Stopped at any instant and started again with the same --out, it
    goes on where it was. For several devices: accelerate launch --multi_gpu --num_processes N -m ovam_core evaluate ...
    """

    voc: str = option("folder with JPEGImages, SegmentationClass, ImageSets", required=True, metavar="DIR")
    split: str = option("list in ImageSets/Segmentation", default="val", metavar="NAME")
    classes_from: str = option(
        "what to ask for: the classes of the truth, or JSON of captions or class lists by image name",
        default="gt",
        metavar="gt|FILE",
    )
    limit: int | None = option("at most this many images", metavar="N")
    out: str | None = option(
        "folder for label maps and results, in which the run can go on", metavar="DIR", check=named
    )
    seed: int | None = option("of the first photograph's noise; the next has the next", said="0", panel=PHOTO)
    template: str | None = option(
        "attribution prompt of a class: 'a photograph of a {}'", said="{}", panel=MASKS, metavar="TEXT"
    )


def run(options: Options) -> None:
    """Reads and refuses, then evaluates; the first of several processes speaks."""
    options.check_workers()
    noise = options.noise()

    from ovam_core.data import EvaluateSettings, evaluate_dataset, read_voc
    from ovam_core.data.evaluate import RESULTS
    from ovam_core.data.runs import launched

    data = read_voc(options.voc, options.split, options.classes_from, options.limit)
    process, device = launched(options.device)
    ovam = open_model(options.model, device)
    settings = EvaluateSettings.for_model(
        ovam,
        options.method or DEFAULT_METHOD,
        seed=options.seed,
        tau=options.tau,
        alpha=options.alpha,
        crf=options.crf(),
        tokens=options.tokens,
        template=options.template,
        threads=options.threads,
        **noise,
    )
    with image_bar(process.rank == 0) as bar:
        result = evaluate_dataset(
            ovam,
            data,
            settings,
            options.out,
            process=process,
            workers=options.workers,
            on_image=lambda done, total: move(bar, done, total),
        )
    if result is None:
        return
    typer.echo(result.text())
    if options.out is not None:
        results = os.path.join(options.out, RESULTS)
        typer.echo(f"{settings.method} on {len(data.names)} images, also as JSON: {results}")
