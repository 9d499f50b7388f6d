"""`ovam evaluate`: IoU of a method over a data set of photographs, or of annotated images."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import typer

from ovam_core.cli.options import (
    MASKS,
    PHOTO,
    BatchOptions,
    CutOptions,
    MethodOptions,
    ModelOptions,
    NoiseOptions,
    given,
    named,
    open_model,
    option,
)
from ovam_core.cli.progress import image_bar, move
from ovam_core.errors import InputError
from ovam_core.settings import DEFAULT_METHOD, HALVES, SET_NAMES, TABLES, parse_offsets

if TYPE_CHECKING:
    from ovam_core.data.evaluate import AnySet
    from ovam_core.ovam import OVAM

SWEEP = "-0.4:0.4:0.1"  # GoCA's ends; its step is not published


@dataclass(kw_only=True)
class Options(BatchOptions, ModelOptions, CutOptions, MethodOptions, NoiseOptions):
    """IoU of a method over a data set of photographs, or of annotated images.

    Runs a method over the photographs of a data set (--voc, or --data and --set), with a caption that lists the
    objects, or over a folder of annotated images (--annotated), and prints IoU a class and mIoU from one confusion
    matrix. Stopped at any instant and started again with the same --out, it goes on where it was. For several devices:
    accelerate launch --multi_gpu --num_processes N -m ovam_core evaluate ...
    """

    voc: str | None = option("folder with JPEGImages, SegmentationClass, ImageSets", metavar="DIR")
    data: str | None = option("folder of the set that --set names, as it is published", metavar="DIR")
    set: str = option("layout and classes of --data", default="voc", choices=SET_NAMES)
    annotated: str | None = option("folder with metadata.jsonl: prompt and seed, or photo; mask, class", metavar="DIR")
    split: str | None = option("list or folder of images", said="the set's usual one", metavar="NAME")
    names_from: str | None = option("with --data: only the images whose names are lines of FILE", metavar="FILE")
    classes_from: str = option(
        "what to ask for: the classes of the truth, or JSON of captions, entities or class lists by image name",
        default="gt",
        metavar="gt|FILE",
    )
    void: str | None = option(
        "what pixels without a label count as", said="ignore, or the protocol's", choices=("ignore", "background")
    )
    protocol: str | None = option(
        "GoCA's for the set: entities matched with the truth, words at the captions' end, a sweep", choices=("goca",)
    )
    table: str | None = option("with --annotated: settings of the paper's tables", choices=tuple(TABLES))
    limit: int | None = option("at most this many images", metavar="N")
    out: str | None = option(
        "folder for label maps and results, in which the run can go on", metavar="DIR", check=named
    )
    seed: int | None = option("of the first photograph's noise; the next has the next", said="0", panel=PHOTO)
    template: str | None = option(
        "attribution prompt of a class: 'a photograph of a {}'", said="{}", panel=MASKS, metavar="TEXT"
    )
    branch: str | None = option(
        "half of the guided batch that names are asked of", said="conditional", choices=HALVES, panel=MASKS
    )
    offsets: str | None = option(
        "of the background's score, with GoCA: mIoU at each from one pass, -0.4:0.4:0.1 or -0.2,0,0.2",
        said=f"none; with --protocol and GoCA, {SWEEP}",
        panel=MASKS,
        metavar="LIST",
    )


def run(options: Options) -> None:
    """Reads and refuses, then evaluates; the first of several processes speaks."""
    options.check_workers()
    noise = options.noise()

    from ovam_core.data import EvaluateSettings, evaluate_dataset
    from ovam_core.data.evaluate import RESULTS
    from ovam_core.data.runs import launched
    from ovam_core.methods import method_named

    check_options(options)
    data = None if options.annotated is not None else photographs(options)
    process, device = launched(options.device)
    ovam = open_model(options.model, device)
    found = annotated(ovam, options) if data is None else data
    method = method_named(options.method or DEFAULT_METHOD)
    swept = options.offsets or (SWEEP if options.protocol and not method.cuts_each else None)
    settings = EvaluateSettings.for_model(
        ovam,
        method.name,
        seed=options.seed,
        tau=options.tau,
        alpha=options.alpha,
        crf=options.crf(),
        tokens=options.tokens,
        template=options.template,
        threads=options.threads,
        branch=options.branch,
        table=options.table,
        offsets=None if swept is None else parse_offsets(swept),
        **noise,
    )
    with image_bar(process.rank == 0) as bar:
        result = evaluate_dataset(
            ovam,
            found,
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
        typer.echo(f"{settings.method} on {len(found.names)} images, also as JSON: {results}")


def check_options(options: Options) -> None:
    """Raises InputError for options that do not go together."""
    if len(given(voc=options.voc, data=options.data, annotated=options.annotated)) != 1:
        raise InputError("Give one of --voc, --data (with --set) and --annotated.")
    if options.data is None and options.set != "voc":
        raise InputError(f"--set {options.set} is the layout of --data; give that folder.")
    if options.names_from is not None and options.data is None:
        raise InputError("--names-from picks images of --data; give that folder.")
    of_photographs = given(split=options.split, void=options.void, protocol=options.protocol)
    if options.annotated is not None and (of_photographs or options.classes_from != "gt"):
        raise InputError("--annotated has its own list, classes and masks: leave the options of photographs out.")
    if options.annotated is not None and (options.noise() or options.seed is not None):
        raise InputError(
            "What makes or records the images of --annotated stands in its metadata.jsonl: leave --seed, --size, "
            "--timesteps and --mirror out."
        )
    if options.table is not None and options.annotated is None:
        raise InputError("--table is for generated images that were annotated; give their folder as --annotated.")


def photographs(options: Options) -> AnySet:
    from ovam_core.data import read_set
    from ovam_core.data.label_sets import label_set

    protocol = label_set(options.set).goca if options.protocol else None
    return read_set(
        options.set,
        options.voc or options.data or "",
        options.split,
        options.classes_from,
        options.limit,
        options.void,
        protocol,
        options.names_from,
    )


def annotated(ovam: OVAM, options: Options) -> AnySet:
    from ovam_core.data import read_annotated

    return read_annotated(options.annotated or "", ovam, options.limit)
