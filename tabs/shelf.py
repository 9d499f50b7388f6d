"""Tokens on offer: those that ship for the model, and those that a visitor made or brought, kept to that visitor."""

from __future__ import annotations

import shutil
import tempfile
import threading
from pathlib import Path

from ovam_core import tokens
from ovam_core.errors import InputError
from ovam_core.io.names import slugs

PER_VISITOR = 40


class Shelf:
    """Names to token files, thread safe. A visitor's own lie in a folder that goes when the visitor goes."""

    def __init__(self, model: str):
        self.shipped = {f"{name} · {model}": path for name, path in tokens.library(model).items()}
        self._own: dict[str, dict[str, Path]] = {}
        self._folders: dict[str, Path] = {}
        self._lock = threading.Lock()

    def names(self, owner: str) -> list[str]:
        """What the visitor may pick, their own first."""
        with self._lock:
            return [*reversed(self._own.get(owner, {})), *self.shipped]

    def add(self, owner: str, token: tokens.Token) -> str:
        """Keeps a token for a visitor; returns its name. One of the same class takes the place of the earlier one.

        Raises InputError where the visitor has PER_VISITOR already.
        """
        name = f"{', '.join(token.names)[:60]} · yours"
        with self._lock:
            own = self._own.setdefault(owner, {})
            if name not in own and len(own) >= PER_VISITOR:
                raise InputError(
                    f"There are {PER_VISITOR} tokens of yours here already; reload the page to begin anew."
                )
            if owner not in self._folders:
                self._folders[owner] = Path(tempfile.mkdtemp(prefix="ovam-tokens-"))
            folder = self._folders[owner]
            free = own.get(name) or folder / f"{slugs([*own, name])[-1]}{tokens.SUFFIX}"
            own[name] = tokens.save(free, token)
        return name

    def folder(self, owner: str, target: Path) -> Path:
        """Copies all tokens that the visitor may use into `target`, their own in place of shipped ones of the same class."""
        target.mkdir(parents=True, exist_ok=True)
        with self._lock:
            own = dict(self._own.get(owner, {}))
        chosen: dict[tuple[str, ...], Path] = {}
        for path in (*self.shipped.values(), *own.values()):
            chosen[tokens.load(path).names] = path
        for number, path in enumerate(chosen.values()):
            shutil.copyfile(path, target / f"{number:03d}{tokens.SUFFIX}")
        return target

    def path(self, owner: str, name: str) -> Path:
        """Raises InputError for a name that is not on this visitor's shelf: a client can send any."""
        with self._lock:
            found = {**self.shipped, **self._own.get(owner, {})}.get(str(name))
        if found is None:
            raise InputError(f"There is no token '{str(name)[:60]}' here (any more); choose one of the list.")
        return found

    def drop_owner(self, owner: str) -> None:
        """Forgets a visitor's tokens, files included."""
        with self._lock:
            self._own.pop(owner, None)
            folder = self._folders.pop(owner, None)
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
