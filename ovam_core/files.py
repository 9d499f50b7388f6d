"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A name in the same folder to write to; at the end it takes the place of `path`. Nothing is left of a block that fails."""
    part = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        yield part
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise


def write(path: Path, data: bytes) -> None:
    """Writes beside and renames. Raises OSError."""
    with beside(path) as part:
        part.write_bytes(data)
