"""`ovam tokens`: the library of optimised tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import typer

from ovam_core.cli.options import argument, named, one_of, option
from ovam_core.errors import InputError
from ovam_core.settings import HALVES

if TYPE_CHECKING:
    from ovam_core.attention.recording import Branch

PUBLISHED = ("voc-sd15",)


@dataclass(kw_only=True)
class ListOptions:
    """The tokens of a model."""

    model: str = option("the model whose tokens they are", default="emoji-voc", metavar="NAME")
    folder: str | None = option("another folder than tokens/<model>", metavar="DIR")


@dataclass(kw_only=True)
class OutOptions:
    """Where tokens go."""

    out: str | None = option("another folder than tokens/<model>", metavar="DIR", check=named)


@dataclass(kw_only=True)
class ImportOptions(OutOptions):
    """A NumPy file, such as the paper's tokens_VOC.npy, or a textual inversion (.safetensors, .bin, .pt), to token
    files.
    """

    file: str = argument("the NumPy file, or the textual inversion")
    model: str = option("the model that the tokens were found with", required=True, metavar="NAME")
    branch: str = option(
        "half of the guided batch; the paper's are of the unconditional one", default="unconditional", choices=HALVES
    )
    classes: list[str] | None = option("names of a plain array's rows, or of the words", "--class", metavar="NAME...")  # noqa: RUF009


@dataclass(kw_only=True)
class FetchOptions(OutOptions):
    """Downloads published tokens."""

    name: str = argument("which", metavar="|".join(PUBLISHED), check=one_of(PUBLISHED))


@dataclass(kw_only=True)
class ExportOptions:
    """One class as a plain [1, E] .npy."""

    file: str = argument("the token file", metavar="TOKEN")
    out: str = option("the .npy file", required=True, metavar="FILE", check=named)
    name: str | None = option("which class, if the token has several", "--class", metavar="NAME")


def run_list(options: ListOptions) -> None:
    from ovam_core.io.token_files import FOLDER, SUFFIX, folder_in, list_token

    folder = Path(options.folder or folder_in(FOLDER, options.model))
    files = sorted(folder.glob(f"*{SUFFIX}"))
    if not files:
        typer.echo(f"There are no tokens in {folder}.")
    for path in files:
        try:
            token = list_token(path)
        except InputError as error:
            typer.echo(f"{path.name}: {error}")
            continue
        loss = "" if token.loss is None else f", loss {token.loss:.4f}"
        seed = "" if token.seed is None else f", seed {token.seed}"
        shape = "x".join(map(str, token.shape))
        typer.echo(f"{', '.join(token.names)}: {shape}, {token.model}, {token.branch}{loss}{seed}: {path}")


def run_import(options: ImportOptions) -> None:
    from ovam_core.tokens import folder_for, import_file, save_all

    branch = cast("Branch", options.branch)
    tokens = import_file(options.file, options.model, classes=options.classes or (), branch=branch)
    for path, token in zip(save_all(tokens, options.out or folder_for(options.model)), tokens, strict=True):
        typer.echo(f"{', '.join(token.names)}: {path}")
    if any(token.init.startswith("textual inversion") for token in tokens):
        typer.echo(
            "A textual inversion is what a text encoder reads, not what it gives: if the maps mean little, load the "
            "file into the pipeline (load_textual_inversion) and ask for its word."
        )


def run_fetch(options: FetchOptions) -> None:
    from ovam_core.published import fetch_voc_sd15

    for path in fetch_voc_sd15(options.out):
        typer.echo(path)


def run_export(options: ExportOptions) -> None:
    from ovam_core.tokens import Token, export_npy

    typer.echo(export_npy(Token.load(options.file), options.out, options.name))


ACTIONS: dict[str, tuple[Callable[[Any], None], type[Any]]] = {
    "list": (run_list, ListOptions),
    "import": (run_import, ImportOptions),
    "fetch": (run_fetch, FetchOptions),
    "export": (run_export, ExportOptions),
}
