"""`ovam optimize`: a class token from one mask, or from many."""

from __future__ import annotations

import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ovam_core.checks import check_number, check_whole
from ovam_core.cli.options import (
    MASKS,
    MODELS,
    PHOTO,
    ModelOptions,
    NoiseOptions,
    SamplingOptions,
    given,
    named,
    open_model,
    option,
    setting,
)
from ovam_core.cli.progress import EpochBar
from ovam_core.errors import InputError
from ovam_core.settings import HALVES, MAX_UNLABELLED, RECIPES, GenerateSettings, OptimizeSettings, PhotoSettings

if TYPE_CHECKING:
    from ovam_core.data.annotated import Example
    from ovam_core.optimization import Epoch, Optimized
    from ovam_core.ovam import OVAM
    from ovam_core.tokens import Token

SEARCH = "Search"


@dataclass(kw_only=True)
class Options(ModelOptions, NoiseOptions, SamplingOptions):
    """A class token from one mask, or from many.

    Learns the token of a class from a generated image and a mask of it (--prompt, --seed, --mask), from a photograph
    and a mask of it (--photo, --mask), from several of both (--image-set), or one token a class from a whole folder
    (--annotated).
    """

    prompt: str | None = option("what the annotated image was made from", metavar="TEXT")
    seed: int | None = option("the annotated image's seed, or that of the noise on a photograph", said="0")
    mask: str | None = option("the mask: any picture of the image's shape, black is background", metavar="FILE")
    image_set: str | None = option(
        "folder with metadata.jsonl: prompt and seed, or photo; mask, class a line", metavar="DIR"
    )
    annotated: str | None = option("the same, but one token for each class in it", metavar="DIR")
    classes: list[str] | None = option("class of mask value 1, 2, ...", "--class", metavar="NAME...")  # noqa: RUF009
    out: str = option("token file; with --annotated, a folder", required=True, metavar="PATH", check=named)
    photo: str | None = option("a photograph in place of a generated image", panel=PHOTO, metavar="FILE")
    caption: str | None = option("what the photograph shows", said="names the class", panel=PHOTO, metavar="TEXT")
    recipe: str = option(
        "fast, the paper's own, or that of its published code", default="fast", panel=SEARCH, choices=tuple(RECIPES)
    )
    epochs: int | None = setting(OptimizeSettings, "epochs", said="the recipe's", panel=SEARCH)
    proximity: float | None = setting(OptimizeSettings, "proximity", said="the recipe's", panel=SEARCH, metavar="W")
    unlabelled: int = option(
        "pictures without masks to learn on from, 0 to 64: they show the class among other things and cost a "
        "generation each (with --together: a class)",
        default=0,
        panel=SEARCH,
        metavar="N",
    )
    among: list[str] | None = option(  # noqa: RUF009
        "with --unlabelled: what may stand beside the class",
        said="a dozen common things",
        panel=SEARCH,
        metavar="NAME...",
    )
    together: bool = option(
        "with --annotated: all classes in one search, each the others' rival; all recordings are held at a time",
        default=False,
        panel=SEARCH,
    )
    branch: str = option("half of the guided batch", default="conditional", panel=SEARCH, choices=HALVES)
    tau: float | None = option("threshold that the token file recommends", said=MODELS, panel=MASKS)
    alpha: float | None = option("self-attention floor that the token file recommends", said=MODELS, panel=MASKS)


def run(options: Options) -> None:
    """One token from one image, one from several, or a set of tokens. Everything is read before an image is made.

    Ctrl-C while a token is learned keeps the best so far, and those before it.
    """
    from ovam_core.io.files import check_file_name, make_folder

    settings = replace(RECIPES[options.recipe], **given(epochs=options.epochs, proximity=options.proximity))
    settings.validate()
    about_image = check_options(options)
    ovam = open_model(options.model, options.device)
    sets = examples_of(ovam, options, about_image)
    if options.annotated is not None:
        make_folder(options.out)
    else:
        check_file_name(Path(options.out))
    with interruptible() as stop:
        for path, token, found in learned(ovam, sets, settings, options, stop):
            save(token, path)
            result = f"loss {found.loss:.4f} after {found.epochs} epochs, {found.seconds:.1f} s"
            why = f" ({found.reason})" if found.reason else ""
            typer.echo(f"{', '.join(token.names)}: {result}{why}: {path}")
            stop.waits = False
        if stop.asked:
            raise KeyboardInterrupt


def save(token: Token, path: Path) -> None:
    """Writes a token; where that cannot be done any more, elsewhere. Raises InputError that says where."""
    from ovam_core.tokens import file_name

    try:
        token.save(path)
    except InputError as error:
        try:
            kept = token.save(Path(tempfile.mkdtemp(prefix="ovam-")) / file_name(token.names))
        except (InputError, OSError):
            raise error from None
        raise InputError(f"{error} The token is kept in '{kept}'.") from None


def check_options(options: Options) -> dict[str, Any]:
    """What the options say of the image. Raises InputError for options that do not go together."""
    check_way(options)
    check_whole("The number of pictures without masks", options.unlabelled, 0, MAX_UNLABELLED)
    if options.among is not None and (not options.unlabelled or options.together):
        raise InputError(
            "--among names what stands beside the class in pictures without masks; it goes with --unlabelled, and not "
            "with --together, where the classes stand beside one another."
        )
    for name, value in given(tau=options.tau, alpha=options.alpha).items():
        check_number(name, value, 0, 1)
    about_image = given(
        seed=options.seed,
        negative_prompt=options.negative_prompt,
        steps=options.steps,
        guidance=options.guidance,
    )
    about_image |= options.noise() | given(caption=options.caption)
    if options.mask is None and (options.prompt is not None or options.photo is not None or about_image):
        raise InputError("What makes the images stands in the folder's metadata.jsonl; leave those options out.")
    if options.photo is not None:
        check_photo(options)
    elif options.mask is not None:
        if options.prompt is None or options.classes is None:
            raise InputError("With --mask the prompt and the class are needed; add --prompt and --class.")
        if options.timesteps is not None or options.caption is not None or options.mirror:
            raise InputError(
                "--timesteps, --mirror and --caption belong to a photograph; add --photo, or leave them out."
            )
    return about_image


def check_way(options: Options) -> None:
    """Raises InputError unless the annotated images are given in one way, and what belongs to it alone with it."""
    if len(given(mask=options.mask, image_set=options.image_set, annotated=options.annotated)) != 1:
        raise InputError("Give one of --mask (with --prompt), --image-set and --annotated.")
    if options.annotated is not None and options.classes is not None:
        raise InputError("The classes of --annotated stand in its metadata.jsonl; leave --class out.")
    if options.together and options.annotated is None:
        raise InputError("--together learns the classes of a folder in one search; add --annotated, or leave it out.")


def check_photo(options: Options) -> None:
    """Raises InputError for options that do not go with --photo."""
    if options.mask is None or options.classes is None:
        raise InputError("With --photo the mask and the class are needed; add --mask and --class.")
    if any(x is not None for x in (options.prompt, options.negative_prompt, options.steps, options.guidance)):
        raise InputError("A photograph has no prompt, steps or guidance; leave those options out, and see --caption.")
    if options.branch == "unconditional" and options.caption:
        raise InputError("The unconditional half sees no text; leave --caption or --branch out.")


def examples_of(ovam: OVAM, options: Options, about_image: dict[str, Any]) -> dict[Path, list[Example]]:
    """The annotated images of each token that is to be made, by the token's file."""
    from ovam_core.data.annotated import Example, by_class, photo_settings, read_folder
    from ovam_core.tokens import files_of

    out = Path(options.out)
    if options.annotated is not None:
        groups = by_class(read_folder(options.annotated, ovam))
        return dict(zip(files_of(([name] for name in groups), out), groups.values(), strict=True))
    if options.image_set is not None:
        examples = read_folder(options.image_set, ovam)
        return {out: [replace(one, classes=tuple(options.classes or one.classes)) for one in examples]}
    classes = tuple(options.classes or ())
    image: GenerateSettings | PhotoSettings
    if options.photo is not None:
        image, file = photo_settings(classes, **about_image), Path(options.photo)
    else:
        image, file = GenerateSettings.for_model(ovam.pipe, options.prompt or "", **about_image), None
    image.validate(ovam.pipe)
    return {out: [Example(image, Path(options.mask or ""), classes, file)]}


def learned(
    ovam: OVAM,
    sets: dict[Path, list[Example]],
    settings: OptimizeSettings,
    options: Options,
    stop: Interrupt,
) -> Iterator[tuple[Path, Token, Optimized]]:
    """The token of each set, as it is found."""
    from ovam_core.data import annotated

    bar = EpochBar()

    def on_epoch(epoch: Epoch) -> None:
        stop.waits = True  # from now on there is something to keep
        bar.show(epoch)

    wanted: dict[str, Any] = {
        "branch": options.branch,
        "tau": options.tau,
        "alpha": options.alpha,
        "on_epoch": on_epoch,
        "should_stop": lambda: stop.asked,
    }
    if not options.together:
        wanted |= {"unlabelled": options.unlabelled} | given(among=options.among)
        for path, examples in sets.items():
            token, found = annotated.learn(ovam, examples, settings, **wanted)
            bar.close()
            yield path, token, found
            if stop.asked:  # of one search for all classes every token is there
                return
        return
    paths = {group[0].classes[0]: path for path, group in sets.items()}
    groups = {name: sets[path] for name, path in paths.items()}
    for name, token, found in annotated.learn_together(ovam, groups, settings, options.unlabelled, **wanted):
        bar.close()
        yield paths[name], token, found


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
