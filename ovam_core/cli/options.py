"""Options that several commands share, each once. Those of a setting take its help and its range from settings.py.

A command's options are a dataclass that inherits from these, and `add` makes typer's command of it. An option is None
unless it was given, so that a settings.json, or the model's own numbers, can stand below it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_type_hints

import typer
from pydantic.fields import FieldInfo

from ovam_core.checks import check_whole
from ovam_core.settings import (
    DEFAULT_METHOD,
    MAX_GRID,
    MAX_TIMESTEP,
    METHOD_NAMES,
    GenerateSettings,
    PhotoSettings,
    SegmentSettings,
    Settings,
    Threads,
    parse_numbers,
    parse_size,
    setting_info,
)

if TYPE_CHECKING:
    from ovam_core.ovam import OVAM

# Headings of the help.
MODEL, PICTURE, PHOTO, MASKS, RUN = "Model", "Picture", "Photograph", "Heatmaps and masks", "Run"

TYPER = "typer"  # key of the option in a field's metadata

# What holds where an option is not given.
MODELS = "the model's"
MODELS_OR_TOKENS = "the model's, a token's own"


# ------------------------------------------------------------------------------------------ how an option is made


def option(
    help: str,
    name: str | None = None,
    *,
    default: Any = None,
    said: str | None = None,
    required: bool = False,
    choices: Sequence[str] = (),
    panel: str | None = None,
    check: Callable[[Any], Any] | None = None,
    **more: Any,
) -> Any:
    """A field of a command's options. name: "--class" where it is not the field's own. said: what holds where it is not
    given, for the help, if `default` does not say so. choices: all that it may be. panel: the heading it stands under.
    """
    if choices:
        more["metavar"], check = "|".join(choices), one_of(choices)
    if said is not None:
        more["show_default"] = said
    names = () if name is None else (name,)
    how = typer.Option(*names, help=help, rich_help_panel=panel, callback=check, **more)
    return field(metadata={TYPER: how}) if required else field(default=default, metadata={TYPER: how})


def setting(settings: type[Settings], name: str, **more: Any) -> Any:
    """The option of a setting: its description, its range and its default are the help."""
    default = getattr(settings, name, None)
    if default not in (None, ""):
        more.setdefault("said", f"{default}")
    return option(help_of(setting_info(settings, name)), **more)


def of_type(hint: Any, **more: Any) -> Any:
    """The option of a type of settings.py, such as `Threads`: its description and its range are the help."""
    return option(help_of(get_args(hint)[1]), **more)


def help_of(info: FieldInfo) -> str:
    limits = {
        end: value for one in info.metadata for end in ("ge", "le") if (value := getattr(one, end, None)) is not None
    }
    return f"{info.description}" + (f" ({limits['ge']:.12g} to {limits['le']:.12g})" if len(limits) == 2 else "")


def argument(help: str, *, required: bool = True, check: Callable[[Any], Any] | None = None, **more: Any) -> Any:
    """A field that is given by its place."""
    metadata = {TYPER: typer.Argument(help=help, callback=check, **more)}
    return field(metadata=metadata) if required else field(default=None, metadata=metadata)


def one_of(choices: Sequence[str]) -> Callable[[Any], Any]:
    """A check of a value, or of several, that may be nothing but these."""

    def check(value: Any) -> Any:
        for one in value if isinstance(value, list | tuple) else [value]:
            if one is not None and one not in choices:
                raise typer.BadParameter(f"invalid choice: {one!r} (choose from {', '.join(choices)})")
        return value

    return check


def named(value: str | None) -> str | None:
    """A file or folder to write; an empty name would be the current folder."""
    if value is not None and not value.strip():
        raise typer.BadParameter("its name is empty")
    return value


def add(app: typer.Typer, name: str, run: Callable[[Any], None], options: type[Any]) -> None:
    """The command `name`: reads the fields of the dataclass `options` from the command line, and runs with them."""

    def command(**given: Any) -> None:
        run(options(**given))

    hints = get_type_hints(options)
    parameters = [
        inspect.Parameter(
            one.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if one.default is MISSING else one.default,
            annotation=Annotated[hints[one.name], one.metadata[TYPER]],
        )
        for one in fields(options)
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what typer reads
    command.__annotations__ = {one.name: one.annotation for one in parameters}
    app.command(name, help=options.__doc__)(command)


def given(**values: Any) -> dict[str, Any]:
    """The options that were really given."""
    return {name: value for name, value in values.items() if value is not None}


# ------------------------------------------------------------------------------------------ what commands share


@dataclass(kw_only=True)
class ModelOptions:
    """Of every command that loads a model."""

    model: str | None = option("emoji-voc, a diffusers hub id or a folder", panel=MODEL)
    device: str | None = option("cuda, mps or cpu", panel=MODEL)


@dataclass(kw_only=True)
class SamplingOptions:
    """Of every command that draws images."""

    negative_prompt: str | None = setting(GenerateSettings, "negative_prompt", panel=PICTURE, metavar="TEXT")
    steps: int | None = setting(GenerateSettings, "steps", said=MODELS, panel=PICTURE)
    guidance: float | None = setting(GenerateSettings, "guidance", said=MODELS, panel=PICTURE)


@dataclass(kw_only=True)
class SizeOptions:
    """Of every command that draws images of any size."""

    size: str | None = option("pixels, multiples of 8, for example 128x96", said=MODELS, panel=PICTURE, metavar="WxH")

    def width_and_height(self) -> dict[str, int]:
        """The size as fields of settings; nothing where it is not given."""
        return {} if self.size is None else dict(zip(("width", "height"), parse_size(self.size), strict=True))


@dataclass(kw_only=True)
class NoiseOptions(SizeOptions):
    """Of every command that looks at photographs."""

    timesteps: str | None = option(
        f"noise on a photograph, 0 to {MAX_TIMESTEP}, one pass each: 100 or 100,200",
        said="the model's: 100, or 150 of flow matching",
        panel=PHOTO,
        metavar="LIST",
    )
    size: str | None = option(
        "pixels in which the model sees it", said="its own area, the photograph's shape", panel=PHOTO, metavar="WxH"
    )

    mirror: bool = option(help_of(setting_info(PhotoSettings, "mirror")), "--mirror", default=False, panel=PHOTO)

    def noise(self) -> dict[str, Any]:
        """What was given, as fields of PhotoSettings."""
        timesteps = None if self.timesteps is None else parse_numbers(self.timesteps, "timesteps", MAX_TIMESTEP)
        return given(timesteps=timesteps, mirror=self.mirror or None) | self.width_and_height()


@dataclass(kw_only=True)
class CutOptions:
    """Of every command that makes masks."""

    tau: float | None = setting(SegmentSettings, "tau", said=MODELS_OR_TOKENS, panel=MASKS)
    alpha: float | None = setting(SegmentSettings, "alpha", said=MODELS_OR_TOKENS, panel=MASKS)
    no_crf: bool = option("masks without the dense CRF", "--no-crf", default=False, panel=MASKS)

    def crf(self) -> bool | None:
        """False where it is switched off, None where nothing is said of it."""
        return False if self.no_crf else None


@dataclass(kw_only=True)
class StepOptions:
    """Of the commands whose pictures take several denoising steps."""

    use_steps: str | None = option(
        "denoising steps to use for the maps, from 0, for example 0-9,14", panel=MASKS, metavar="LIST"
    )

    def step_indices(self) -> tuple[int, ...] | None:
        """None where none are named."""
        return None if self.use_steps is None else parse_numbers(self.use_steps, "steps")


@dataclass(kw_only=True)
class GridOptions:
    """Of the commands that can choose among attention grids."""

    resolutions: list[str] | None = option("attention grids to use, for example 16,8", panel=MASKS, metavar="LIST...")  # noqa: RUF009

    def grids(self) -> tuple[int, ...] | None:
        """None where none are named."""
        return None if self.resolutions is None else parse_numbers(",".join(self.resolutions), "resolutions", MAX_GRID)


@dataclass(kw_only=True)
class MethodOptions:
    """Of the commands that can answer by any method."""

    method: str | None = option(
        "; ".join(METHOD_NAMES).lower(), said=DEFAULT_METHOD.lower(), panel=MASKS, metavar="NAME"
    )


@dataclass(kw_only=True)
class BatchOptions:
    """Of the commands that make many images, perhaps in several processes."""

    tokens: str | None = option("ask by class token: the model's own, or DIR's", panel=MASKS, metavar="[DIR]")
    threads: int | None = of_type(Threads, said="all cores", panel=RUN, metavar="N")
    workers: int | None = option("processes for dense CRF and files; 0 for none beside", panel=RUN, metavar="N")

    def check_workers(self) -> None:
        """Raises InputError for a number of processes that cannot be."""
        if self.workers is not None:
            check_whole("The number of workers", self.workers, 0, 64)


def open_model(model: str | None, device: str | None) -> OVAM:
    """The model, with the libraries' notices kept off the terminal."""
    from ovam_core.models.load import quiet
    from ovam_core.ovam import OVAM

    quiet()
    return OVAM.from_pretrained(model, device)
