"""Progress on stderr: bars on a terminal; where stderr is a file, images alone, twice a minute."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tqdm import tqdm

if TYPE_CHECKING:
    from ovam_core.optimization import Epoch


@contextmanager
def counter(unit: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, none elsewhere, moved by what it gives: a function of what is done and how much there is."""
    with tqdm(unit=unit, disable=None) as bar:
        yield lambda done, total: move(bar, done, total)


def image_bar(shown: bool = True, total: int | None = None, done: int = 0) -> tqdm:
    """A bar for images. shown: only the first of several processes shows it."""
    between = 0.5 if sys.stderr.isatty() else 30.0
    return tqdm(total=total, initial=done, unit="image", disable=not shown, mininterval=between)


def prompt_bar(shown: bool = True) -> tqdm:
    """A bar for prompts that are looked at, where that takes more than a second or two."""
    between = 0.5 if sys.stderr.isatty() else 10.0
    return tqdm(unit="prompt", disable=not shown, mininterval=between, delay=1.0, leave=False)


def move(bar: tqdm, done: int, total: int) -> None:
    """Brings a bar to `done` of `total`."""
    bar.total = total
    bar.update(done - bar.n)


class EpochBar:
    """The loss of a search for a token, on a terminal; a new bar with each first epoch."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def show(self, epoch: Epoch) -> None:
        if self._bar is None:
            self._bar = tqdm(total=epoch.of, unit="epoch", disable=None)
        self._bar.set_postfix_str(f"loss {epoch.loss:.4f}, best {epoch.best_loss:.4f}", refresh=False)
        self._bar.update()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = None
