"""`python -m ovam_core generate | photo | optimize | tokens | export | evaluate`: the command line.

Bad input: one sentence, exit status 2.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ovam_core.data.annotated import METADATA, Example, by_class, learn, learn_apart, photo_settings, read_folder
from ovam_core.data.evaluate import RESULTS, EvaluateSettings, evaluate
from ovam_core.data.export import LIBRARY, ExportSettings, Progress, export, measure, plan
from ovam_core.data.filters import ClipScorer, Filters
from ovam_core.data.formats import FORMATS
from ovam_core.data.layout import SHEET
from ovam_core.data.prompts import class_list, read_prompts, template_prompts, work_list
from ovam_core.data.runs import launched
from ovam_core.data.voc_folder import GROUND_TRUTH, read_voc
from ovam_core.errors import InputError, out_of_memory_as
from ovam_core.io.files import make_folder
from ovam_core.io.pictures import read_photo
from ovam_core.methods import ALL_METHODS, OVAM, method_named
from ovam_core.models.families import family_of
from ovam_core.models.load import load_pipeline, quiet
from ovam_core.models.presets import EMBEDDED
from ovam_core.optimization import RECIPES, Epoch, Optimized, OptimizeSettings
from ovam_core.ovam import ask, attributions, branch_for, check_served, default_caption, generate, photograph
from ovam_core.picture import Generation, Made, load_settings, save
from ovam_core.settings import GenerateSettings, MapSettings, PhotoSettings, parse_numbers
from ovam_core.tokens import BRANCHES, Token, export_npy, fetch_voc_sd15, file_name, folder_for, import_file
from ovam_core.tokens import load as load_token
from ovam_core.tokens import save as save_token

MAX_GRID = 4096  # no attention grid is wider
METHOD_HELP = f"{'; '.join(ALL_METHODS).lower()} ({OVAM.name.lower()})"
MAX_NOISE = 999  # the last timestep of the training schedules


def a_name(text: str) -> str:
    """A file or folder to write; an empty name would be the current folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("its name is empty")
    return text


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line, like all others here."""

    def __init__(self, **given: Any):
        super().__init__(**given, allow_abbrev=False)

    def error(self, message: str) -> None:
        self.exit(2, f"Error: {message}; see {self.prog} --help.\n")


def parser() -> argparse.ArgumentParser:
    """The command line's grammar. Every option is None unless given, so that --settings can stand below them."""
    top = Parser(prog="python -m ovam_core", description=__doc__.splitlines()[0])
    commands = top.add_subparsers(dest="command", required=True, parser_class=Parser)
    one = commands.add_parser(
        "generate",
        help="an image, then the heatmap and mask of any word",
        description="Makes an image and writes it with a heatmap, an overlay and a mask for each word.",
    )
    one.add_argument("prompt", nargs="?", help="what the picture shows")
    add_asked(one)
    add_model(one)
    one.add_argument("--seed", type=int)
    add_run(one)
    one.add_argument("--timesteps", metavar="LIST", help="denoising steps to use for the maps, for example 0-9,14")
    one.set_defaults(run=run_generate)
    add_photo(commands)
    add_optimize(commands)
    add_tokens(commands)
    add_export(commands)
    add_evaluate(commands)
    return top


def add_model(one: argparse.ArgumentParser) -> None:
    """Options of every command that loads a model."""
    one.add_argument("--model", help="emoji-voc, a diffusers hub id or a folder")
    one.add_argument("--device", help="cuda, mps or cpu")


def add_run(one: argparse.ArgumentParser) -> None:
    """Options of the commands that draw images of any size."""
    add_sampling(one)
    one.add_argument("--size", metavar="WxH", help="pixels, multiples of 8, for example 128x96")


def add_sampling(one: argparse.ArgumentParser) -> None:
    """Options of every command that draws images."""
    one.add_argument("--negative-prompt", metavar="TEXT")
    one.add_argument("--steps", type=int, help="denoising steps")
    one.add_argument("--guidance", type=float, help="guidance scale")


def add_asked(one: argparse.ArgumentParser) -> None:
    """What `generate` and `photo` ask of one picture, and where the answers go."""
    one.add_argument("--words", nargs="+", metavar="WORD", help="words to look for; quote phrases: 'red bus'")
    one.add_argument("--attribution", metavar="SENTENCE", help="a full sentence to attribute; --words picks from it")
    one.add_argument("--token", nargs="+", metavar="FILE", help="token files whose classes to look for")
    one.add_argument("--out", type=a_name, required=True, metavar="DIR", help="folder for the files")
    one.add_argument(
        "--settings", metavar="FILE", help="a settings.json of this command to use again; other options change it"
    )
    one.add_argument("--tau", type=float, help="threshold of the masks, 0 to 1 (the model's; tokens: their own)")
    one.add_argument(
        "--alpha", type=float, help="floor of the self-attention map, 0 to 1 (the model's; tokens: their own)"
    )
    one.add_argument("--no-crf", action="store_true", default=None, help="masks without the dense CRF")
    one.add_argument("--resolutions", metavar="LIST", nargs="+", help="attention grids to use, for example 16,8")
    one.add_argument("--method", metavar="NAME", help=METHOD_HELP)


def parse_size(text: str) -> tuple[int, int]:
    """ "128x96" to (128, 96). Raises InputError for anything else."""
    sides = text.lower().replace("×", "x").split("x")
    if len(sides) != 2 or not all(side.strip().isascii() and side.strip().isdigit() for side in sides):
        raise InputError(f"The size '{text[:40]}' is not of the form WIDTHxHEIGHT; write for example 128x128.")
    if any(len(side.strip()) > 6 for side in sides):
        raise InputError("The size is far too large; write for example 128x128.")
    return int(sides[0]), int(sides[1])


def given(**values: object) -> dict:
    """The options that were really given."""
    return {name: value for name, value in values.items() if value is not None}


def given_maps(options: argparse.Namespace) -> dict:
    """The options about maps and masks that were given, as fields of MapSettings."""
    found = given(tau=options.tau, alpha=options.alpha, crf=None if options.no_crf is None else False)
    if options.resolutions is not None:
        found["resolutions"] = parse_numbers(",".join(options.resolutions), "resolutions", MAX_GRID)
    if options.token is not None:
        found["tokens"] = tuple(options.token)
    if options.method is not None:
        found["method"] = method_named(options.method).name
    return found


def run_generate(options: argparse.Namespace) -> None:
    """Reads everything, refuses what is wrong, and only then spends time on an image."""
    about_image = given(
        prompt=options.prompt,
        negative_prompt=options.negative_prompt,
        seed=options.seed,
        steps=options.steps,
        guidance=options.guidance,
    )
    if options.size is not None:
        about_image["width"], about_image["height"] = parse_size(options.size)
    about_maps = given_maps(options)
    if options.timesteps is not None:
        about_maps["steps"] = parse_numbers(options.timesteps, "timesteps")
    if options.settings is None and options.prompt is None:
        raise InputError("The prompt is missing; describe the picture in a few words.")
    before, asked, model, device = read_asked(options, about_maps, GenerateSettings)
    pipe = load_pipeline(model, device)
    wanted = GenerateSettings.for_model(pipe, **about_image) if before is None else replace(before, **about_image)
    asked = check_asked(pipe, wanted, asked, options)
    made = generate(
        pipe,
        wanted,
        on_step=show_progress if sys.stderr.isatty() else None,
        branch=branch_for(asked),
        with_goca=method_named(asked.method).needs_goca,
    )
    answer(pipe, made, asked, options.out)
    print(f"seed {wanted.seed}, {wanted.steps} steps, {made.seconds:.1f} s on {made.device}: {options.out}")


def read_asked(
    options: argparse.Namespace, about_maps: dict, kind: type[Made]
) -> tuple[Made | None, MapSettings, str, str]:
    """What made the picture (None without --settings), what to ask of it, the model and the device."""
    words = "" if options.words is None else ", ".join(options.words)
    if options.settings is None:
        asked = MapSettings.from_text(words, options.attribution or "", **about_maps)
        before, model, device = None, options.model, options.device
    else:
        before, asked, model, device = load_settings(options.settings, kind)
        asked = replace(asked, **about_maps)
        if options.words is not None or options.attribution is not None:
            fresh = MapSettings.from_text(words, options.attribution or "")
            asked = replace(asked, words=fresh.words, sentence=fresh.sentence)
        model, device = options.model or model, options.device or device
    asked.validate()
    return before, asked, model, device


def check_asked(pipe: Any, wanted: Made, asked: MapSettings, options: argparse.Namespace) -> MapSettings:
    """The same with the model's own numbers, once everything is known to work: better before the image than after it."""
    if asked.tokens:  # a number that is given holds for all
        asked = replace(asked, **given(token_tau=options.tau, token_alpha=options.alpha))
    asked = asked.filled(pipe)
    wanted.validate(pipe)
    check_served(pipe, asked, wanted)
    attributions(pipe, asked)
    make_folder(options.out)
    return asked


def answer(pipe: Any, made: Generation, asked: MapSettings, folder: str) -> None:
    """Maps and masks, written and listed."""
    maps = ask(pipe, made, asked)
    save(folder, made, maps, asked)
    for label, peak in zip(maps.labels, maps.peaks, strict=True):
        print(f"{label}: peak {peak:.2f}")
    if about := family_of(pipe).about:
        print(about)


# --------------------------------------------------------------------------------------- photographs


def add_photo(commands: argparse._SubParsersAction) -> None:
    """The grammar of `photo`."""
    one = commands.add_parser(
        "photo",
        help="the heatmap and mask of any word in a photograph",
        description="Noises a photograph, looks at it in one forward pass, and writes it with a heatmap, an overlay and a mask "
        "for each word, all at its own size.",
    )
    one.add_argument("image", metavar="IMAGE", help="the photograph: JPEG, PNG, or what else Pillow reads")
    one.add_argument("--caption", metavar="TEXT", help="what it shows (lists the words); '' for none")
    add_asked(one)
    add_model(one)
    add_noise(one)
    one.add_argument("--seed", type=int, help="of the noise (0)")
    one.set_defaults(run=run_photo)


def add_noise(one: argparse.ArgumentParser) -> None:
    """Options of every command that looks at photographs."""
    one.add_argument(
        "--timesteps", metavar="LIST", help="noise on a photograph, 0 to 999, one pass each: 100 or 100,200 (100)"
    )
    one.add_argument(
        "--size", metavar="WxH", help="pixels in which the model sees it (its own area, the photograph's shape)"
    )


def given_noise(options: argparse.Namespace) -> dict:
    """What `add_noise` added, as fields of PhotoSettings."""
    found = {}
    if options.timesteps is not None:
        found["timesteps"] = parse_numbers(options.timesteps, "timesteps", MAX_NOISE)
    if options.size is not None:
        found["width"], found["height"] = parse_size(options.size)
    return given(**found)


def run_photo(options: argparse.Namespace) -> None:
    """Reads everything, refuses what is wrong, and only then loads the model."""
    about_photo = given(caption=options.caption, seed=options.seed) | given_noise(options)
    photo = read_photo(options.image)
    before, asked, model, device = read_asked(options, given_maps(options), PhotoSettings)
    if before is None:
        before = PhotoSettings(caption=default_caption(asked))
    wanted = replace(before, **about_photo)
    pipe = load_pipeline(model, device)
    asked = check_asked(pipe, wanted, asked, options)
    made = photograph(pipe, photo, wanted, with_goca=method_named(asked.method).needs_goca)
    answer(pipe, made, asked, options.out)
    height, width = made.recording.image_size
    print(f"'{wanted.caption}', seen as {width}x{height}, {made.seconds:.1f} s on {made.device}: {options.out}")


# ---------------------------------------------------------------------------------------------- export


def add_export(commands: argparse._SubParsersAction) -> None:
    """The grammar of `export`."""
    batch = commands.add_parser(
        "export",
        help="prompts to a segmentation data set on disk",
        description="Makes a data set of images and label maps: VOC layout, metadata.jsonl, more on request. Stopped at "
        "any instant and started again, it goes on where it was. For several devices: accelerate launch --multi_gpu "
        "--num_processes N -m ovam_core export ... (several CPU processes too: --cpu would start only one).",
    )
    which = batch.add_mutually_exclusive_group(required=True)
    which.add_argument("--prompts", metavar="FILE", help="lines of text, .csv, .tsv, .jsonl, or COCO captions .json")
    which.add_argument("--template", metavar="TEXT", help="a prompt for each class: 'A photograph of a {}'")
    batch.add_argument("--out", type=a_name, required=True, metavar="DIR", help="folder for the data set")
    batch.add_argument("--classes", metavar="LIST", help="voc, or names in the order of their labels: 'cat, red bus'")
    batch.add_argument(
        "--tokens", metavar="DIR", nargs="?", const=LIBRARY, help="ask by class token: the model's own, or DIR's"
    )
    batch.add_argument("--images-per-prompt", metavar="N", type=int, default=1)
    batch.add_argument("--limit", metavar="N", type=int, help="at most this many prompts")
    batch.add_argument("--seed", type=int, default=0, help="of the first image; the next has the next (0)")
    add_model(batch)
    add_run(batch)
    batch.add_argument("--batch-size", metavar="N", type=int, help="images made together (4 on a GPU, else 1)")
    batch.add_argument(
        "--threads", metavar="N", type=int, help="CPU threads a process (all cores); part of the settings"
    )
    batch.add_argument("--tau", type=float, help="threshold, 0 to 1 (the model's; a token's own)")
    batch.add_argument(
        "--alpha", type=float, help="floor of the self-attention map, 0 to 1 (the model's; a token's own)"
    )
    batch.add_argument("--no-crf", action="store_true", help="masks without the dense CRF")
    batch.add_argument("--uncertain", metavar="U", type=float, help="label pixels this close to the threshold 255 (0)")
    batch.add_argument("--timesteps", metavar="LIST", help="denoising steps to use for the maps, for example 0-9,14")
    batch.add_argument("--resolutions", metavar="LIST", help="attention grids to use, for example 16,8")
    batch.add_argument(
        "--format", metavar="NAME", nargs="+", choices=FORMATS, help=f"{', '.join(FORMATS)}; voc is always there"
    )
    batch.add_argument("--heatmaps", action="store_true", help="keep the maps as float16")
    batch.add_argument(
        "--clip", metavar="MODEL", help="a CLIP model, such as openai/clip-vit-base-patch32, for its filter"
    )
    batch.add_argument("--clip-drop", metavar="SHARE", type=float, help="lowest share of each class to drop (0.3)")
    batch.add_argument("--min-coverage", metavar="SHARE", type=float, help="drop masks that cover less (0.05)")
    batch.add_argument("--max-coverage", metavar="SHARE", type=float, help="drop masks that cover more (0.95)")
    batch.add_argument("--workers", metavar="N", type=int, help="processes for dense CRF and files; 0 for none beside")
    batch.add_argument("--dry-run", action="store_true", help="say what would be made, how long and how large")
    batch.set_defaults(run=run_export)


def run_export(options: argparse.Namespace) -> None:
    """Reads and refuses, then exports; the first of several processes speaks."""
    classes = None if options.classes is None else class_list(options.classes)
    if options.template is not None:
        classes = classes or class_list("voc")
        prompts = template_prompts(options.template, classes)
    else:
        prompts = read_prompts(options.prompts)
    if options.negative_prompt is not None:
        prompts = [replace(one, negative=one.negative or options.negative_prompt) for one in prompts]
    if options.workers is not None and not 0 <= options.workers <= 64:
        raise InputError(f"The number of workers is {options.workers}; choose a whole number from 0 to 64.")
    filters = Filters(
        **given(min_coverage=options.min_coverage, max_coverage=options.max_coverage, clip_drop=options.clip_drop)
    )
    width, height = (None, None) if options.size is None else parse_size(options.size)

    process, device = launched(options.device)
    pipe = load_pipeline(options.model, device)
    settings = ExportSettings.for_model(
        pipe,
        steps=options.steps,
        guidance=options.guidance,
        width=width,
        height=height,
        tau=options.tau,
        alpha=options.alpha,
        crf=not options.no_crf,
        uncertain=options.uncertain,
        timesteps=None if options.timesteps is None else parse_numbers(options.timesteps, "timesteps"),
        resolutions=None
        if options.resolutions is None
        else parse_numbers(options.resolutions, "resolutions", MAX_GRID),
        tokens=options.tokens,
        formats=None if options.format is None else tuple(options.format),
        heatmaps=options.heatmaps,
        batch_size=options.batch_size,
        threads=options.threads,
        clip=options.clip,
        filters=filters,
    )
    settings.validate(pipe)
    work = work_list(prompts, classes, options.images_per_prompt, options.seed, options.limit, settings.check(pipe))
    planned = plan(pipe, work, settings, options.out)
    clip = None if settings.clip is None else ClipScorer(settings.clip, pipe._execution_device)
    if process.rank == 0:
        print(planned.text(), flush=True)
        if process.ranks > 1:
            print(f"{process.ranks} processes share the work.", flush=True)
    if options.dry_run:
        if process.rank == 0:
            print(measure(pipe, work, settings, planned.done, clip).text())
        return

    shares = process.ranks
    with tqdm(
        total=-(-planned.images // shares),
        initial=planned.done // shares,
        unit="image",
        disable=process.rank > 0,
        mininterval=0.5 if sys.stderr.isatty() else 30,
    ) as bar:

        def on_image(progress: Progress) -> None:
            bar.total = progress.total
            bar.update(progress.done - bar.n)

        summary = export(
            pipe,
            work,
            settings,
            options.out,
            process=process,
            workers=options.workers,
            clip=clip,
            on_image=on_image,
            on_note=bar.write,
        )
    if process.rank == 0:
        print(summary.text())
        print(f"{summary.timings.total:.1f} s: {options.out}, to look at: {os.path.join(options.out, SHEET)}")


# -------------------------------------------------------------------------------------------- evaluate


def add_evaluate(commands: argparse._SubParsersAction) -> None:
    """The grammar of `evaluate`."""
    one = commands.add_parser(
        "evaluate",
        help="IoU of a method over a data set of photographs in VOC layout",
        description="Runs a method over the photographs of a data set in VOC layout, with a caption that lists the objects, and "
        "prints IoU a class and mIoU from one confusion matrix. Stopped at any instant and started again with the same --out, it goes "
        "on where it was. For several devices: accelerate launch --multi_gpu --num_processes N -m ovam_core evaluate ...",
    )
    one.add_argument("--voc", required=True, metavar="DIR", help="folder with JPEGImages, SegmentationClass, ImageSets")
    one.add_argument("--split", default="val", help="list in ImageSets/Segmentation (val)")
    one.add_argument("--method", default=OVAM.name.lower(), metavar="NAME", help=METHOD_HELP)
    one.add_argument(
        "--classes-from",
        default=GROUND_TRUTH,
        metavar="gt|FILE",
        help="what to ask for: the classes of the truth, or JSON of captions or class lists by image name (gt)",
    )
    one.add_argument(
        "--tokens", metavar="DIR", nargs="?", const=LIBRARY, help="ask by class token: the model's own, or DIR's"
    )
    one.add_argument("--template", metavar="TEXT", help="attribution prompt of a class: 'a photograph of a {}' ({})")
    one.add_argument(
        "--out", type=a_name, metavar="DIR", help="folder for label maps and results, in which the run can go on"
    )
    one.add_argument("--limit", metavar="N", type=int, help="at most this many images")
    add_model(one)
    add_noise(one)
    one.add_argument("--seed", type=int, help="of the first photograph's noise; the next has the next (0)")
    one.add_argument("--tau", type=float, help="threshold, 0 to 1 (the method's)")
    one.add_argument("--alpha", type=float, help="floor of the self-attention map, 0 to 1 (the method's)")
    one.add_argument("--no-crf", action="store_true", default=None, help="masks without the dense CRF")
    one.add_argument("--threads", metavar="N", type=int, help="CPU threads a process (all cores); part of the settings")
    one.add_argument("--workers", metavar="N", type=int, help="processes for dense CRF and files; 0 for none beside")
    one.set_defaults(run=run_evaluate)


def run_evaluate(options: argparse.Namespace) -> None:
    """Reads and refuses, then evaluates; the first of several processes speaks."""
    if options.workers is not None and not 0 <= options.workers <= 64:
        raise InputError(f"The number of workers is {options.workers}; choose a whole number from 0 to 64.")
    noise = given_noise(options)
    data = read_voc(options.voc, options.split, options.classes_from, options.limit)
    process, device = launched(options.device)
    pipe = load_pipeline(options.model, device)
    settings = EvaluateSettings.for_model(
        pipe,
        options.method,
        seed=options.seed,
        tau=options.tau,
        alpha=options.alpha,
        crf=None if options.no_crf is None else False,
        tokens=options.tokens,
        template=options.template,
        threads=options.threads,
        **noise,
    )
    hidden = process.rank > 0
    with tqdm(unit="image", disable=hidden, mininterval=0.5 if sys.stderr.isatty() else 30) as bar:

        def on_image(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        result = evaluate(
            pipe, data, settings, options.out, process=process, workers=options.workers, on_image=on_image
        )
    if result is None:
        return
    print(result.text())
    if options.out is not None:
        print(f"{settings.method} on {len(data.names)} images, also as JSON: {os.path.join(options.out, RESULTS)}")


# --------------------------------------------------------------------------------- optimize and tokens


def add_optimize(commands: argparse._SubParsersAction) -> None:
    """The grammar of `optimize`."""
    one = commands.add_parser(
        "optimize",
        help="a class token from one mask, or from many",
        description="Learns the token of a class from a generated image and a mask of it (--prompt, --seed, --mask), from a "
        "photograph and a mask of it (--photo, --mask), from several of both (--image-set), or one token a class from a "
        "whole folder (--annotated).",
    )
    one.add_argument("--prompt", help="what the annotated image was made from")
    one.add_argument("--seed", type=int, help="the annotated image's seed, or that of the noise on a photograph (0)")
    one.add_argument("--mask", metavar="FILE", help="the mask: any picture of the image's shape, black is background")
    one.add_argument("--photo", metavar="FILE", help="a photograph in place of a generated image")
    one.add_argument("--caption", metavar="TEXT", help="what the photograph shows (names the class)")
    one.add_argument(
        "--image-set", metavar="DIR", help="folder with metadata.jsonl: prompt and seed, or photo; mask, class a line"
    )
    one.add_argument("--annotated", metavar="DIR", help="the same, but one token for each class in it")
    one.add_argument("--class", dest="classes", nargs="+", metavar="NAME", help="class of mask value 1, 2, ...")
    one.add_argument("--out", type=a_name, required=True, metavar="PATH", help="token file; with --annotated, a folder")
    add_model(one)
    add_sampling(one)
    add_noise(one)
    one.add_argument("--recipe", choices=list(RECIPES), default="fast", help="fast, or the paper's own")
    one.add_argument("--epochs", type=int, help="epochs instead of the recipe's")
    one.add_argument("--stay", type=float, metavar="W", help="weight on staying near the class name's embedding")
    one.add_argument(
        "--apart",
        type=float,
        metavar="W",
        help="with --annotated: weight on staying dark in the other classes' images; all recordings are held at a time",
    )
    one.add_argument("--branch", choices=list(BRANCHES), default="conditional", help="half of the guided batch")
    one.add_argument("--tau", type=float, help="threshold that the token file recommends (the model's)")
    one.add_argument("--alpha", type=float, help="self-attention floor that the token file recommends (the model's)")
    one.set_defaults(run=run_optimize)


def add_tokens(commands: argparse._SubParsersAction) -> None:
    """The grammar of `tokens`."""
    top = commands.add_parser("tokens", help="list, import, fetch and export tokens")
    actions = top.add_subparsers(dest="action", required=True, parser_class=Parser)
    one = actions.add_parser("list", help="the tokens of a model")
    one.add_argument("--model", default=EMBEDDED)
    one.add_argument("--folder", metavar="DIR", help="another folder than tokens/<model>")
    one.set_defaults(run=run_tokens_list)
    one = actions.add_parser("import", help="a NumPy file, such as the paper's tokens_VOC.npy, to token files")
    one.add_argument("file", metavar="FILE")
    one.add_argument("--model", required=True, help="the model that the tokens were found with")
    one.add_argument(
        "--branch", choices=list(BRANCHES), default="unconditional", help="default as the paper's: unconditional"
    )
    one.add_argument("--class", dest="classes", nargs="+", metavar="NAME", help="names of a plain array's rows")
    one.add_argument("--out", type=a_name, metavar="DIR", help="another folder than tokens/<model>")
    one.set_defaults(run=run_tokens_import)
    one = actions.add_parser("fetch", help="download published tokens")
    one.add_argument("name", choices=["voc-sd15"])
    one.add_argument("--out", type=a_name, metavar="DIR", help="another folder than tokens/<model>")
    one.set_defaults(run=run_tokens_fetch)
    one = actions.add_parser("export", help="one class as a plain [1, E] .npy")
    one.add_argument("file", metavar="TOKEN")
    one.add_argument("--out", type=a_name, required=True, metavar="FILE")
    one.add_argument("--class", dest="name", metavar="NAME", help="which class, if the token has several")
    one.set_defaults(run=run_tokens_export)


def run_optimize(options: argparse.Namespace) -> None:
    """One token from one image, one from several, or a set of tokens. Everything is read before an image is made.

    Ctrl-C while a token is learned keeps the best so far, and those before it.
    """
    settings = replace(RECIPES[options.recipe], **given(epochs=options.epochs, stay=options.stay))
    settings.validate()
    about_image = check_optimize(options)
    pipe = load_pipeline(options.model, options.device)
    sets = examples_of(pipe, options, about_image)
    make_folder(Path(options.out) if options.annotated is not None else Path(options.out).parent)
    with interruptible() as stop:
        for path, token, found in learned(pipe, sets, settings, options, stop):
            save_token(path, token)
            why = f" ({found.reason})" if found.reason else ""
            print(
                f"{', '.join(token.names)}: loss {found.loss:.4f} after {found.epochs} epochs, {found.seconds:.1f} s{why}: {path}"
            )
            if stop.asked:
                raise KeyboardInterrupt
            stop.waits = False


def check_optimize(options: argparse.Namespace) -> dict[str, Any]:
    """What the options say of the image. Raises InputError for options that do not go together."""
    ways = given(mask=options.mask, image_set=options.image_set, annotated=options.annotated)
    if len(ways) != 1:
        raise InputError("Give one of --mask (with --prompt), --image-set and --annotated.")
    if options.apart is not None and options.annotated is None:
        raise InputError("--apart keeps the classes of a folder apart; add --annotated, or leave it out.")
    for name, value in given(tau=options.tau, alpha=options.alpha).items():
        if not 0 <= value <= 1:
            raise InputError(f"{name} is {value}; choose a number from 0 to 1.")
    about_image = given(
        seed=options.seed,
        negative_prompt=options.negative_prompt,
        steps=options.steps,
        guidance=options.guidance,
    )
    about_image |= given_noise(options) | given(caption=options.caption)
    if options.mask is None and (options.prompt is not None or options.photo is not None or about_image):
        raise InputError(f"What makes the images stands in the folder's {METADATA}; leave those options out.")
    if options.photo is not None:
        check_photo(options)
    elif options.mask is not None:
        if options.prompt is None or options.classes is None:
            raise InputError("With --mask the prompt and the class are needed; add --prompt and --class.")
        if options.timesteps is not None or options.caption is not None:
            raise InputError("--timesteps and --caption belong to a photograph; add --photo, or leave them out.")
    return about_image


def examples_of(pipe: Any, options: argparse.Namespace, about_image: dict[str, Any]) -> dict[Path, list[Example]]:
    """The annotated images of each token that is to be made, by the token's file."""
    out = Path(options.out)
    if options.annotated is not None:
        return {
            out / file_name([name]): group for name, group in by_class(read_folder(options.annotated, pipe)).items()
        }
    if options.image_set is not None:
        examples = read_folder(options.image_set, pipe)
        return {out: [replace(one, classes=tuple(options.classes or one.classes)) for one in examples]}
    classes = tuple(options.classes)
    if options.photo is not None:
        image, file = photo_settings(classes, **about_image), Path(options.photo)
    else:
        image, file = GenerateSettings.for_model(pipe, options.prompt, **about_image), None
    image.validate(pipe)
    return {out: [Example(image, Path(options.mask), classes, file)]}


def learned(
    pipe: Any, sets: dict[Path, list[Example]], settings: OptimizeSettings, options: argparse.Namespace, stop: Interrupt
) -> Iterator[tuple[Path, Token, Optimized]]:
    """The token of each set, as it is found."""

    def on_epoch(epoch: Epoch) -> None:
        stop.waits = True  # from now on there is something to keep
        if sys.stderr.isatty():
            show_loss(epoch)

    wanted = {
        "branch": options.branch,
        "tau": options.tau,
        "alpha": options.alpha,
        "on_epoch": on_epoch,
        "should_stop": lambda: stop.asked,
    }
    if options.apart is None:
        for path, examples in sets.items():
            yield path, *learn(pipe, examples, settings, **wanted)
        return
    paths = {group[0].classes[0]: path for path, group in sets.items()}
    groups = {name: sets[path] for name, path in paths.items()}
    for name, *made in learn_apart(pipe, groups, settings, options.apart, **wanted):
        yield paths[name], *made


@dataclass
class Interrupt:
    """Ctrl-C. waits: whether it is to be remembered as `asked`, rather than to end the program at once."""

    waits: bool = False
    asked: bool = False


@contextmanager
def interruptible() -> Iterator[Interrupt]:
    """Within it, a Ctrl-C that `waits` only sets `asked`; the next one ends the program."""
    state = Interrupt()

    def note(*_: Any) -> None:
        if not state.waits or state.asked:
            raise KeyboardInterrupt
        state.asked = True

    if threading.current_thread() is not threading.main_thread():  # where no signal arrives
        yield state
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield state
    finally:
        signal.signal(signal.SIGINT, before)


def check_photo(options: argparse.Namespace) -> None:
    """Raises InputError for options that do not go with --photo."""
    if options.mask is None or options.classes is None:
        raise InputError("With --photo the mask and the class are needed; add --mask and --class.")
    if any(x is not None for x in (options.prompt, options.negative_prompt, options.steps, options.guidance)):
        raise InputError("A photograph has no prompt, steps or guidance; leave those options out, and see --caption.")
    if options.branch == "unconditional" and options.caption:
        raise InputError("The unconditional half sees no text; leave --caption or --branch out.")


def run_tokens_list(options: argparse.Namespace) -> None:
    folder = Path(options.folder or folder_for(options.model))
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        print(f"There are no tokens in {folder}.")
    for path in files:
        try:
            token = load_token(path)
        except InputError as error:
            print(f"{path.name}: {error}")
            continue
        loss = "" if token.loss is None else f", loss {token.loss:.4f}"
        seed = "" if token.seed is None else f", seed {token.seed}"
        shape = "x".join(map(str, token.embedding.shape))
        print(f"{', '.join(token.names)}: {shape}, {token.model}, {token.branch}{loss}{seed}: {path}")


def run_tokens_import(options: argparse.Namespace) -> None:
    made = import_file(options.file, options.model, classes=options.classes or (), branch=options.branch)
    folder = Path(options.out or folder_for(options.model))
    paths = [folder / file_name(token.names) for token in made]
    for path in paths:
        if path.exists():
            raise InputError(f"There is a token '{path}' already; give another folder by --out, or remove it.")
    for path, token in zip(paths, made, strict=True):
        print(f"{', '.join(token.names)}: {save_token(path, token)}")


def run_tokens_fetch(options: argparse.Namespace) -> None:
    for path in fetch_voc_sd15(options.out):
        print(path)


def run_tokens_export(options: argparse.Namespace) -> None:
    print(export_npy(load_token(options.file), options.out, options.name))


def show_loss(epoch: Epoch) -> None:
    """Loss and best loss on the terminal, in one line."""
    end = "\n" if epoch.number == epoch.of else ""
    sys.stderr.write(f"\repoch {epoch.number} of {epoch.of}, loss {epoch.loss:.4f}, best {epoch.best_loss:.4f} {end}")
    sys.stderr.flush()


def show_progress(done: int, total: int) -> None:
    """A counter on the terminal, in one line."""
    sys.stderr.write(f"\rstep {done} of {total}" + ("\n" if done == total else ""))
    sys.stderr.flush()


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, 2 for bad input, 130 for Ctrl-C."""
    options = parser().parse_args(arguments)
    quiet()
    try:
        with out_of_memory_as("The device has too little memory for this: choose a smaller size, or another --device."):
            options.run(options)
    except InputError as error:
        sys.stderr.write(f"Error: {' '.join(str(error).split())}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("\nStopped.\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
