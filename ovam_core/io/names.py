"""TODO: what this module is."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

# ------------------------------------------------------------------------------------------------- files


def slugs(labels: Sequence[str], longest: int = 40) -> list[str]:
    """File name parts for words: letters, digits and hyphens only (of any script), distinct, never a way out."""
    taken: set[str] = set()
    names = []
    for label in labels:
        plain = unicodedata.normalize("NFKC", label).lower()
        base = re.sub(r"[\W_]+", "-", plain).strip("-")[:longest].strip("-") or "word"
        name, count = base, 1
        while name in taken:
            count += 1
            name = f"{base}-{count}"
        taken.add(name)
        names.append(name)
    return names
