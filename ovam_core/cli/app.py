"""The commands put together, and what becomes of errors.

What a person can mend is one sentence on stderr and exit status 2; Ctrl-C is 130; a bug keeps its traceback, status 1.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import Annotated, Any

import typer
from typer.main import get_command

from ovam_core import __version__
from ovam_core.cli import evaluate, export, generate, optimize, photo, recorded, tokens
from ovam_core.cli.arguments import RENAMED, expand, split
from ovam_core.cli.options import add
from ovam_core.errors import InputError, out_of_memory_as

NAME = "ovam"
# click's own, whose module depends on typer's version.
UsageError: Any = typer.BadParameter.__bases__[0]

# What the system refuses, whatever the program does: no bug.
OUTSIDE = {
    getattr(errno, name)
    for name in (
        *("ENOSPC", "EDQUOT", "EFBIG", "EIO", "EROFS", "EACCES", "EPERM"),
        *("ENAMETOOLONG", "EISDIR", "ENOTDIR", "ELOOP", "EMFILE", "ENFILE"),
    )
    if hasattr(errno, name)
}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
for name, module in (
    ("generate", generate),
    ("photo", photo),
    ("segment", recorded),
    ("optimize", optimize),
    ("export", export),
    ("evaluate", evaluate),
):
    add(app, name, module.run, module.Options)
library = typer.Typer(help="List, import, fetch and export tokens.")
for name, (run, options) in tokens.ACTIONS.items():
    add(library, name, run, options)
app.add_typer(library, name="tokens")


def say_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"{NAME} {__version__}")
        raise typer.Exit


@app.callback(help="Heatmaps, masks, tokens and data sets from text-to-image diffusion models, for any word.")
def about(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=say_version, is_eager=True)
    ] = False,
) -> None: ...


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, 2 for bad input, 130 for Ctrl-C. Bugs are raised.

    arguments: without the program's name; None takes the process's own.
    """
    group = get_command(app)
    command, names, rest = split(group, sys.argv[1:] if arguments is None else arguments)
    given = [*names, *expand(command, rest, RENAMED.get(" ".join(names)))]
    try:
        with (
            out_of_memory_as("The device has too little memory for this: choose a smaller size, or another --device."),
            group.make_context(NAME, given) as context,
        ):
            group.invoke(context)
    except typer.Exit as left:  # --help, --version
        return left.exit_code
    except UsageError as error:
        return _refuse(f"{error.format_message().rstrip('. ')}; see {' '.join([NAME, *names])} --help.")
    except InputError as error:
        return _refuse(str(error))
    except KeyboardInterrupt:
        sys.stderr.write("\nStopped.\n")
        return 130
    except BrokenPipeError:  # who read has gone, as `| head` goes: nothing more is written, not even at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno not in OUTSIDE:
            raise
        where = f" '{str(error.filename)[:200]}'" if error.filename else ""
        return _refuse(f"Cannot use the file or folder{where}: {(error.strerror or 'not possible').lower()}.")
    return 0


def _refuse(sentence: str) -> int:
    sys.stderr.write(f"Error: {' '.join(sentence.split())}\n")
    return 2
