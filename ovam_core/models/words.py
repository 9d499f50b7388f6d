"""Words by Unicode: where one begins and ends, what counts as the same word, and lists of them.

Letters are compared as `plain` has them: "é" typed as one letter or as two, letters of full width, and a soft
hyphen within a word make no difference. Scripts without spaces (Chinese, Japanese, Thai, ...) are cut between all
letters, as Unicode's annex 29 cuts them: no dictionary is asked. Every pattern is linear in the text.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import regex

# Line_Break=SA is Unicode's class of the scripts of South East Asia that are written without spaces.
UNSPACED = r"[\p{Script_Extensions=Han}\p{Hiragana}\p{Line_Break=SA}--\p{P}]"
SPACED = rf"[\w--{UNSPACED}]"

# What Korean adds to a noun where other languages have words of their own.
PARTICLES = "들?(?:은|는|이|가|을|를|와|과|도|의|에|에서|에게|로|으로|랑|이랑|하고|만|까지|부터|처럼|보다|이나|나)?"

_UNIT = regex.compile(rf"[{UNSPACED}--\p{{M}}]\p{{M}}*|[{SPACED}--_]+|[^\s_\u200b\p{{Pd}}]", regex.V1)
_ASCII_UNIT = re.compile(r"[a-z0-9]+|[^\s_-]")
_PIECE = regex.compile(r"[[\w\u200b]--_]+|[^\w\s]+", regex.V1)
_WORD = regex.compile(r"[\w--_]+(?:[-'][\w--_]+)*", regex.V1)
_SPACED = regex.compile(SPACED, regex.V1)
_UNSPACED = regex.compile(UNSPACED, regex.V1)
_PARTICLES = regex.compile(PARTICLES)
_CLUSTER = regex.compile(r"\X")
_IGNORED = regex.compile(r"[\p{Default_Ignorable_Code_Point}--\u200b]", regex.V1)
_SEPARATORS = regex.compile(r"[,;\n\r、，；､،؛﹐﹑﹔]")  # noqa: RUF001
# Of numbers before a colon only "(boeing 747:1.3)": 10:30 and 16:9 are none.
_WEIGHT = regex.compile(
    r"""[^\s:](?<!\b\d+)\s*:+\s*[+-]?(?:\d*\.\d+|\d{1,2}\s*[)\]])  # cat:1.3, (cat:2)
    |\([^()]*\p{L}[^()]*:\s*[+-]?\d*\.\d+\s*\)  # (boeing 747:1.3)
    |::\s*[+-]?\d  # cat::2
    |\)(?:[+-]?\d*\.\d+|[+-]++(?!\w))  # (cat)1.3, (cat)++""",
    regex.VERBOSE,
)

HANGUL = "가"  # its first syllable

_ALIKE = str.maketrans("’ʼ‐‑", "''--")  # noqa: RUF001


def plain(text: str) -> str:
    """The letters by which texts are compared: NFKC, without case and without marks that are not seen."""
    if text.isascii():
        return text.lower()
    folded = unicodedata.normalize("NFKC", text).casefold()
    return unicodedata.normalize("NFC", _IGNORED.sub("", folded)).translate(_ALIKE)


def listed(text: str, more: str = "") -> list[str]:
    """The entries of a list, "cat, red  bus" to ["cat", "red bus"], composed (NFC).

    They are separated by commas, semicolons and line ends of any script. more: other separators.
    """
    for mark in more:
        text = text.replace(mark, ",")
    parts = (" ".join(part.split()) for part in _SEPARATORS.split(unicodedata.normalize("NFC", text)))
    return [part for part in parts if part]


def has_weight(word: str) -> bool:
    """Whether a word, or a part of it, has a weight of other programs: (cat:1.3), cat::2, (cat)1.3, (cat)++."""
    return _WEIGHT.search(unicodedata.normalize("NFKC", word)) is not None


# ------------------------------------------------------------------------------------------- words in a sentence


@dataclass(frozen=True)
class Piece:
    """A word within what was looked for. text: its plain letters; start, end: of its letters in the sentence."""

    text: str
    start: int
    end: int


def find_word(sentence: str, word: str, edges: Iterable[tuple[int, int]] = ()) -> list[list[Piece]]:
    """The pieces of a word or phrase at each place where it stands in the sentence, whatever its case.

    edges: the (start, end) of the sentence's tokens. Where a script has no spaces, places that begin and end with
    tokens are taken before those within one: a tokenizer that knows 熊猫 says that 猫 is not in it.
    """
    parts = plain(word).split()
    if not parts:
        return []
    letters, spans = _located(sentence)
    # What marks no more than a place where a line may end stands anywhere.
    phrase = r"\s+".join("\u200b*".join(map(regex.escape, part)) for part in parts)
    pattern = rf"{_begin(parts[0])}{phrase}{_end(parts[-1])}"
    found = list(regex.finditer(pattern, letters, regex.V1))
    if _UNSPACED.search(parts[0] + parts[-1]):
        edges = list(edges)
        starts, ends = {start for start, _ in edges}, {end for _, end in edges}
        whole = [x for x in found if spans[x.start()][0] in starts and spans[x.end() - 1][1] in ends]
        found = whole or found
    return [
        [
            Piece(piece.group(), spans[piece.start()][0], spans[piece.end() - 1][1])
            for piece in _PIECE.finditer(letters, match.start(), match.end())
        ]
        for match in found
    ]


def content_words(sentence: str, asked: Iterable[str]) -> list[str]:
    """The words of a sentence that are not in those that are asked for, plain, each once, "t-shirt" being one.

    In scripts without spaces, what stands between the words asked for.
    """
    sentence = plain(sentence)
    parts = {part for word in asked for part in _WORD.findall(plain(word))}
    for part in parts:
        if _UNSPACED.search(part):
            sentence = sentence.replace(part, " ")
    return [word for word in dict.fromkeys(_WORD.findall(sentence)) if word not in parts]


def _located(text: str) -> tuple[str, list[tuple[int, int]]]:
    """The plain letters of a text, and for each where it comes from: a letter with its marks is one place."""
    letters: list[str] = []
    spans: list[tuple[int, int]] = []
    for cluster in _CLUSTER.finditer(text):
        own = plain(cluster.group())
        letters.append(own)
        spans += [cluster.span()] * len(own)
    return "".join(letters), spans


def _begin(part: str) -> str:
    return rf"(?<!{SPACED})" if _SPACED.match(part) else ""


def _end(part: str) -> str:
    return rf"(?!\p{{M}})(?={PARTICLES}(?!{SPACED}))" if _SPACED.match(part[-1]) else r"(?!\p{M})"


# ------------------------------------------------------------------------------------------- words of a vocabulary


def units(text: str) -> list[str]:
    """What names are compared by: words, single letters of scripts without spaces, single marks; "red_bus", "red-bus"
    and "Red bus" are the same two.
    """
    return (_ASCII_UNIT if text.isascii() else _UNIT).findall(plain(text))


class Vocabulary:
    """Names, each with what it stands for; the longest name that begins at a place is the one that stands there."""

    def __init__(self) -> None:
        self._tree: dict[str, Any] = {}  # by unit; what a name that ends here stands for is at ""

    def add(self, name: str, meaning: str | None) -> None:
        """meaning: None for a name of nothing. A name that is added again changes its meaning."""
        node = self._tree
        for unit in units(name):
            node = node.setdefault(unit, {})
        node[""] = meaning

    def meaning(self, name: str) -> str | None:
        """What a whole name stands for; None for nothing."""
        node: dict[str, Any] | None = self._tree
        for unit in units(name):
            node = None if node is None else node.get(unit)
        return None if node is None else node.get("")

    def named_in(self, text: str) -> set[str]:
        """All that the names in a text stand for."""
        found, words, at = set(), units(text), 0
        while at < len(words):
            length, meaning = self._longest(words, at)
            if meaning is not None:
                found.add(meaning)
            at += length or 1
        return found

    def _longest(self, words: list[str], at: int) -> tuple[int, str | None]:
        node, best, meaning = self._tree, 0, None
        for length in range(1, len(words) - at + 1):
            word = words[at + length - 1]
            below = node.get(word)
            if below is None and word[-1] >= HANGUL:
                below = _without_particle(node, word)
            if below is None:
                break
            node = below
            if "" in node:
                best, meaning = length, node[""]
        return best, meaning


def _without_particle(node: dict[str, Any], word: str) -> dict[str, Any] | None:
    """The name that a word of Korean begins with, where it goes on with particles."""
    ends = range(len(word) - 1, max(0, len(word) - 5), -1)
    return next((node[word[:end]] for end in ends if word[:end] in node and _PARTICLES.fullmatch(word, end)), None)
