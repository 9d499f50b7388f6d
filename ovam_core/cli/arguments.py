"""The argument list of the shell, brought to what click reads: one value an option, today's names."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from ovam_core.settings import EVOLUTIONS, LIBRARY

# What an option that is given without a value stands for.
WITHOUT_VALUE = {"--tokens": LIBRARY, "--evolution": EVOLUTIONS[0]}

# Old names of options, by command: understood until version 3, with a note.
RENAMED = {
    "generate": {"--timesteps": "--use-steps"},
    "export": {"--timesteps": "--use-steps"},
    "optimize": {"--stay": "--proximity", "--apart": "--together"},
}


def split(command: Any, arguments: Sequence[str]) -> tuple[Any, list[str], list[str]]:
    """The command that the arguments begin with: click's object, its names (["tokens", "list"]), and what follows."""
    names, rest = [], list(arguments)
    while rest and rest[0] in getattr(command, "commands", {}):
        command = command.commands[rest[0]]
        names.append(rest.pop(0))
    return command, names, rest


def expand(command: Any, arguments: Sequence[str], renamed: Mapping[str, str] | None = None) -> list[str]:
    """The arguments of a command with one value an option, as click needs them, by the command's own parameters.

        --words cat "red bus" --token a b   becomes   --words cat --words "red bus" --token a --token b
        --tokens --limit 3                  becomes   --tokens library --limit 3

    renamed: old names of options to new ones; a note is written where an old one stands. An option that takes one value
    and is followed by another option loses what follows, so that click says what is missing.
    """
    renamed = renamed or {}
    options = {name: parameter for parameter in command.params for name in parameter.opts if name.startswith("--")}
    known = {*options, *renamed}
    words = list(arguments)
    expanded: list[str] = []
    while words:
        word = words.pop(0)
        if word == "--":  # click's own sign for: no more options
            return [*expanded, word, *words]
        old, word = word, _new_name(word, renamed)
        name = word.partition("=")[0]
        if word != old and name in options and options[name].is_flag:  # a switch now, which once took a number
            word = name
            del words[: bool(words) and _is_value(words[0], known)]
        option = options.get(word)
        if option is None or option.is_flag:  # a value of no option, --name=value, a switch, or what click refuses
            expanded.append(word)
            continue
        values = list(takewhile(lambda after: _is_value(after, known), words))
        values = values if option.multiple else values[:1]
        del words[: len(values)]
        if not values and word in WITHOUT_VALUE:
            values = [WITHOUT_VALUE[word]]
        if not values:
            return [*expanded, word]
        expanded += [part for value in values for part in (word, value)]
    return expanded


def _is_value(word: str, options: set[str]) -> bool:
    """Whether a word is a value. What begins with a hyphen is an option, but for sentences, negative numbers and lists
    (-0.2,0,0.2) or ranges (-0.4:0.4:0.1) of numbers.
    """
    if not word.startswith("-") or word == "-":
        return True
    numbers = re.fullmatch(r"-\d*\.?\d+(?:[,:]-?\d*\.?\d+)*", word)
    return word.partition("=")[0] not in options and (" " in word or numbers is not None)


def _new_name(word: str, renamed: Mapping[str, str]) -> str:
    """The word, or the new name of an option that is given by its old one."""
    name, equals, value = word.partition("=")
    if name not in renamed:
        return word
    sys.stderr.write(f"Note: {name} is called {renamed[name]} now; the old name will go.\n")
    return renamed[name] + equals + value
