"""File names made of words: letters, digits and hyphens alone, so that no word leads out of a folder."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence


def hyphenated(text: str, longest: int = 40) -> str:
    """The letters and digits (of any script) of a text in lower case, hyphens between; "" where there is none.

    longest: characters at most.
    """
    return re.sub(r"[\W_]+", "-", text.lower()).strip("-")[:longest].strip("-")


def slugs(labels: Sequence[str], longest: int = 40) -> list[str]:
    """A file name part for each label, no two the same; "word" where nothing is left of one."""
    taken: set[str] = set()
    names = []
    for label in labels:
        base = hyphenated(unicodedata.normalize("NFKC", label), longest) or "word"
        name, count = base, 1
        while name in taken:
            count += 1
            name = f"{base}-{count}"
        taken.add(name)
        names.append(name)
    return names
