"""`python -m ovam_core generate ...`: the package from the command line. Bad input: one sentence, exit status 2."""

from __future__ import annotations

import argparse
import sys
import warnings
from dataclasses import replace

import diffusers
import transformers

from .generate import (
    GenerateSettings,
    MapSettings,
    ask,
    attributions,
    generate,
    load_settings,
    make_folder,
    parse_numbers,
    save,
)
from .pipeline import load_pipeline

MAX_GRID = 4096  # no attention grid is wider


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line, like all others here."""

    def error(self, message: str) -> None:
        self.exit(2, f"Error: {message}; see {self.prog} --help.\n")


def parser() -> argparse.ArgumentParser:
    """The command line's grammar. Every option is None unless given, so that --settings can stand below them."""
    top = Parser(prog="python -m ovam_core", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True, parser_class=Parser)
    one = commands.add_parser(
        "generate",
        help="an image, then the heatmap and mask of any word",
        description="Makes an image and writes it with a heatmap, an overlay and a mask for each word.",
    )
    one.add_argument("prompt", nargs="?", help="what the picture shows")
    one.add_argument("--words", nargs="+", metavar="WORD", help="words to look for; quote phrases: 'red bus'")
    one.add_argument("--attribution", metavar="SENTENCE", help="a full sentence to attribute; --words picks from it")
    one.add_argument("--out", required=True, metavar="DIR", help="folder for the files")
    one.add_argument("--settings", metavar="FILE", help="a settings.json to make again; other options change it")
    one.add_argument("--model", help="emoji-voc, a diffusers hub id or a folder")
    one.add_argument("--device", help="cuda, mps or cpu")
    one.add_argument("--seed", type=int)
    one.add_argument("--steps", type=int, help="denoising steps")
    one.add_argument("--guidance", type=float, help="guidance scale")
    one.add_argument("--negative-prompt", metavar="TEXT")
    one.add_argument("--size", metavar="WxH", help="pixels, multiples of 8, for example 128x96")
    one.add_argument("--tau", type=float, help="threshold of the masks, 0 to 1 (0.4)")
    one.add_argument("--alpha", type=float, help="floor of the self-attention map, 0 to 1 (0.85)")
    one.add_argument("--no-crf", action="store_true", default=None, help="masks without the dense CRF")
    one.add_argument("--timesteps", metavar="LIST", help="denoising steps to use for the maps, for example 0-9,14")
    one.add_argument("--resolutions", metavar="LIST", nargs="+", help="attention grids to use, for example 16,8")
    return top


def parse_size(text: str) -> tuple[int, int]:
    """ "128x96" to (128, 96). Raises ValueError for anything else."""
    sides = text.lower().replace("×", "x").split("x")
    if len(sides) != 2 or not all(side.strip().isascii() and side.strip().isdigit() for side in sides):
        raise ValueError(f"The size '{text[:40]}' is not of the form WIDTHxHEIGHT; write for example 128x128.")
    if any(len(side.strip()) > 6 for side in sides):
        raise ValueError("The size is far too large; write for example 128x128.")
    return int(sides[0]), int(sides[1])


def given(**values: object) -> dict:
    """The options that were really given."""
    return {name: value for name, value in values.items() if value is not None}


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
    about_maps = given(tau=options.tau, alpha=options.alpha, crf=None if options.no_crf is None else False)
    if options.timesteps is not None:
        about_maps["steps"] = parse_numbers(options.timesteps, "timesteps")
    if options.resolutions is not None:
        about_maps["resolutions"] = parse_numbers(",".join(options.resolutions), "resolutions", MAX_GRID)
    words = None if options.words is None else ", ".join(options.words)

    if options.settings is not None:
        wanted, asked, model, device = load_settings(options.settings)
        wanted, asked = replace(wanted, **about_image), replace(asked, **about_maps)
        if words is not None or options.attribution is not None:
            fresh = MapSettings.from_text(words or "", options.attribution or "")
            asked = replace(asked, words=fresh.words, sentence=fresh.sentence)
        model, device = options.model or model, options.device or device
        asked.validate()
        pipe = load_pipeline(model, device)
    else:
        if options.prompt is None:
            raise ValueError("The prompt is missing; describe the picture in a few words.")
        asked = MapSettings.from_text(words or "", options.attribution or "", **about_maps)
        asked.validate()
        pipe = load_pipeline(options.model, options.device)
        wanted = GenerateSettings.for_model(pipe, **about_image)

    wanted.validate(pipe)
    attributions(pipe, asked)  # a word that the encoder refuses is better known before the image than after it
    make_folder(options.out)
    made = generate(pipe, wanted, on_step=show_progress if sys.stderr.isatty() else None)
    maps = ask(pipe, made, asked)
    save(options.out, made, maps, asked)
    for label, peak in zip(maps.labels, maps.peaks, strict=True):
        print(f"{label}: peak {peak:.2f}")
    print(f"seed {wanted.seed}, {wanted.steps} steps, {made.seconds:.1f} s on {made.device}: {options.out}")


def show_progress(done: int, total: int) -> None:
    """A counter on the terminal, in one line."""
    sys.stderr.write(f"\rstep {done} of {total}" + ("\n" if done == total else ""))
    sys.stderr.flush()


def quiet() -> None:
    """Keeps the libraries' notices and progress bars off the terminal: what is wrong is one sentence here."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    for logging in (transformers.utils.logging, diffusers.utils.logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, 2 for bad input, 130 for Ctrl-C."""
    options = parser().parse_args(arguments)
    quiet()
    try:
        run_generate(options)
    except ValueError as error:
        sys.stderr.write(f"Error: {' '.join(str(error).split())}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("\nStopped.\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
