"""Token files: an optimised embedding with what it was made from; the library in `tokens/`; importers.

A token is a plain safetensors file. Nothing here unpickles a stranger's objects: the one pickled format that is read
(NumPy's, for the paper's published tokens) goes through an unpickler that knows arrays of numbers and nothing else.
"""

from __future__ import annotations

import io
import json
import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor

from ovam_core.attention.recording import Branch
from ovam_core.errors import InputError
from ovam_core.io.files import write_atomically
from ovam_core.io.names import hyphenated
from ovam_core.io.npy import MAX_ROWS, read_npy
from ovam_core.io.textual_inversion import is_textual_inversion, read_textual_inversion
from ovam_core.io.token_files import (
    BACKGROUND,
    FOLDER,
    MAX_VALUE,
    SUFFIX,
    TOKEN_FORMAT,
    answered,
    check_file,
    check_width,
    folder_in,
    is_sane,
    read_header,
)
from ovam_core.io.token_files import last_part as last_part  # where others look for it
from ovam_core.settings import HALVES

MAX_NAME = 200  # characters of a class name


@dataclass(frozen=True, eq=False)
class Token:
    """An embedding whose heatmaps segment a class, and how it came to be.

    embedding: float32 `[L, E]` on the CPU, finite; row 0 is the background if L > 1. classes: one name a row,
    row 0 "background" if L > 1. rivals: how many of the last rows get no map: they only take part in the softmax,
    where the classes lose to them what is theirs.
    model: `pipe.ovam_name` of the model it was found with. branch: the half of the guided batch whose queries it
    belongs to. tau, alpha: threshold and self-attention floor for its masks, 0 to 1.
    steps, prompt, seed: the image it was found on. init: what it started from. loss: the lowest one (Eq. 6).
    settings: how the image was made and the search was run, as JSON text. source: the file it was read from.
    Raises InputError for an embedding that is none.
    """

    embedding: Tensor
    classes: tuple[str, ...]
    model: str
    branch: Branch = "conditional"
    tau: float = 0.8
    alpha: float = 0.95
    steps: int | None = None
    prompt: str = ""
    seed: int | None = None
    init: str = ""
    loss: float | None = None
    settings: str = ""
    source: bytes | None = field(default=None, repr=False)
    rivals: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """The classes that get a map: those without the background and the rivals."""
        return answered(self.classes, self.rivals)

    def __post_init__(self) -> None:
        x = self.embedding
        if not isinstance(x, Tensor):
            raise InputError(f"The token's embedding is a {type(x).__name__}; it must be a tensor [rows, width].")
        if x.ndim != 2 or not 1 <= x.shape[0] <= MAX_ROWS or x.shape[1] == 0 or not x.is_floating_point():
            kind = str(x.dtype).removeprefix("torch.")
            raise InputError(f"The token's embedding is {kind} {list(x.shape)}; it must be float [rows, width].")
        x = x.detach().float()
        if not torch.isfinite(x).all():
            raise InputError("The token's embedding holds numbers that are not finite; make the token again.")
        largest = float(x.abs().max())
        if not is_sane(largest):
            raise InputError(
                f"The token's embedding holds {largest:.3g}, where a text encoder gives some tens and "
                f"{MAX_VALUE:,.0f} is the most that is taken; make the token again."
            )

    def validate(self) -> None:
        """Raises InputError, one sentence, for what is no token."""
        x = self.embedding
        if len(self.classes) != len(x):
            raise InputError(f"The token has {len(x)} rows but {len(self.classes)} class names; give one name a row.")
        if len(x) > 1 and self.classes[0] != BACKGROUND:
            raise InputError(f"The first row of a token of several rows is called '{BACKGROUND}'; name it so.")
        self._check_names()
        if not 0 <= self.rivals <= max(0, len(x) - 2):
            raise InputError(f"The token has {len(x)} rows and {self.rivals} of them as rivals; no class is left.")
        if self.branch not in HALVES:
            raise InputError(f"The token's branch is '{self.branch[:40]}'; it must be conditional or unconditional.")
        for name, value in (("tau", self.tau), ("alpha", self.alpha)):
            if not math.isfinite(value) or not 0 <= value <= 1:
                raise InputError(f"The token's {name} is {value}; it must lie between 0 and 1.")

    def _check_names(self) -> None:
        for name in self.classes:
            if not isinstance(name, str) or not name.strip() or len(name) > MAX_NAME or not name.isprintable():
                raise InputError(f"A class name of the token is not a name of 1 to {MAX_NAME} letters; rename it.")
        if len(set(self.classes)) != len(self.classes):
            raise InputError("The token names a class twice; give every row a name of its own.")

    def to_bytes(self) -> bytes:
        """The token as the bytes of a safetensors file: those it was read from, where it was."""
        self.validate()
        metadata = {
            "format": TOKEN_FORMAT,
            "model": self.model,
            "classes": json.dumps(list(self.classes), ensure_ascii=False),
            "branch": self.branch,
            "tau": repr(float(self.tau)),
            "alpha": repr(float(self.alpha)),
            "steps": "" if self.steps is None else str(self.steps),
            "prompt": self.prompt,
            "seed": "" if self.seed is None else str(self.seed),
            "init": self.init,
            "loss": "" if self.loss is None else repr(float(self.loss)),
            "settings": self.settings,
        }
        if self.rivals:
            metadata["rivals"] = str(self.rivals)
        embedding = self.embedding.detach().to("cpu", torch.float32).contiguous()
        # safetensors writes its metadata in an order of its own, another one each time.
        if self.source is not None and _read(self.source) == (metadata, embedding.numpy().tobytes()):
            return self.source
        return to_bytes({"embedding": embedding}, metadata)

    def save(self, path: str | Path) -> Path:
        """Writes the token as safetensors, whole or not at all. Raises InputError where it cannot be written."""
        return _write(Path(path), self.to_bytes())

    @classmethod
    def load(cls, path: str | Path) -> Token:
        """Reads a token file. Raises InputError, one sentence, for a file that is too large, broken or no token."""
        path = Path(path)
        check_file(path)
        try:
            data = path.read_bytes()
            tensors = from_bytes(data)
            metadata = _metadata(data)
        except (SafetensorError, OSError, ValueError, KeyError):
            raise InputError(f"'{path.name}' is not a whole safetensors file; download or make it again.") from None
        embedding = tensors.get("embedding")
        if metadata.get("format") != TOKEN_FORMAT or embedding is None:
            raise InputError(f"'{path.name}' is not a token of this program (format {TOKEN_FORMAT}).")
        try:
            classes = json.loads(metadata["classes"])
            token = cls(
                embedding=embedding.float() if embedding.is_floating_point() else embedding,
                classes=tuple(classes) if isinstance(classes, list) else (classes,),
                model=metadata["model"],
                branch=cast(Branch, metadata["branch"]),
                tau=float(metadata["tau"]),
                alpha=float(metadata["alpha"]),
                steps=_optional(int, metadata.get("steps", "")),
                prompt=metadata.get("prompt", ""),
                seed=_optional(int, metadata.get("seed", "")),
                init=metadata.get("init", ""),
                loss=_optional(float, metadata.get("loss", "")),
                settings=metadata.get("settings", ""),
                source=data,
                rivals=int(metadata.get("rivals", "0")),
            )
            token.validate()
        except (KeyError, TypeError, RecursionError):
            raise InputError(f"The token '{path.name}' lacks a setting or holds one of the wrong kind.") from None
        except ValueError as error:
            raise InputError(f"The token '{path.name}' cannot be used: {error}") from None
        return token


# ------------------------------------------------------------------------------------------------ files


def _metadata(data: bytes) -> dict[str, str]:
    """The metadata of a safetensors file that was found to be whole."""
    return read_header(data)[0].get("__metadata__", {})


def _read(data: bytes) -> tuple[dict[str, str], bytes]:
    """Metadata and numbers of a token's file, to compare."""
    return _metadata(data), from_bytes(data)["embedding"].float().numpy().tobytes()


def _optional(kind: type, text: str) -> Any:
    return kind(text) if text else None


def _write(path: Path, data: bytes) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)
    except OSError as error:
        raise InputError(f"Cannot write the file '{path}': {(error.strerror or 'not possible').lower()}.") from None
    return path


# ---------------------------------------------------------------------------------------------- library


def file_name(names: Sequence[str]) -> str:
    """The file of a token of these classes: "potted plant" to "potted-plant.safetensors"; never a way out."""
    return (hyphenated(" ".join(names), 80) or "token") + SUFFIX


def files_of(names: Iterable[Sequence[str]], folder: Path) -> list[Path]:
    """The file of each of several tokens, by its classes. Raises InputError where two have one."""
    paths = [folder / file_name(classes) for classes in names]
    for path in paths:
        if paths.count(path) > 1:
            raise InputError(f"Two names give one file, '{path}'; tell them apart by more than signs and capitals.")
    return paths


def save_all(tokens: Sequence[Token], folder: str | Path) -> list[Path]:
    """Writes tokens into a folder, each into the file of its classes.

    Raises InputError, before any is written, as `files_of` does and where a file holds another token.
    """
    paths = files_of((token.names for token in tokens), Path(folder))
    for path, token in zip(paths, tokens, strict=True):
        if path.exists() and not _holds(path, token):
            raise InputError(f"There is a token '{path}' already; give another folder by --out, or remove it.")
    return [token.save(path) for path, token in zip(paths, tokens, strict=True)]


def _holds(path: Path, token: Token) -> bool:
    try:
        return _read(Token.load(path).to_bytes()) == _read(token.to_bytes())
    except InputError:
        return False


def folder_for(model: str) -> Path:
    """Where the tokens of a model lie: `tokens/<last part of its name>`."""
    return folder_in(FOLDER, model)


def library(model: str, folder: str | Path | None = None) -> dict[str, Token]:
    """The tokens of a model by class name, sorted; tokens of several classes are called "cat, dog".

    folder: default `folder_for(model)`; one that does not exist is empty. A broken file is left out with a warning.
    """
    found = {}
    for path in sorted(Path(folder or folder_for(model)).glob(f"*{SUFFIX}")):
        try:
            token = Token.load(path)
        except InputError as error:
            warnings.warn(str(error), stacklevel=2)
        else:
            found[", ".join(token.names)] = token
    return dict(sorted(found.items()))


# ------------------------------------------------------------------------------------ import and export


def import_file(
    path: str | Path, model: str, *, classes: Sequence[str] = (), branch: Branch = "conditional", **about: Any
) -> list[Token]:
    """Tokens of a `.npy` file: one array `[E]` or `[L, E]`, or a pickled dict of such arrays, one token an entry; or of
    a textual inversion, one token of one row a word.

    model: the model they were found with. classes: names for a plain array's rows, its background left out, or for the
    words of a textual inversion (default: the file's name, or what it names); the keys of a dict are names themselves,
    "potted-plant" becomes "potted plant". Several vectors of a word become their mean, as the tokens of a word do.
    about: further fields of Token. Raises InputError for anything but arrays of finite floating-point numbers, of the
    model's width where that is known: a pickle that asks for any other object is refused before it is made.
    """
    path = Path(path)
    check_file(path)
    data = path.read_bytes()
    inverted = is_textual_inversion(data)
    if inverted:
        entries = _words_of(read_textual_inversion(data, path.name), path, classes)
    else:
        entries = _entries_of(read_npy(data, path.name), path, classes)
    made = []
    init = f"{'textual inversion ' if inverted else ''}imported from {path.name}"
    for names, array in entries:
        if array.dtype.kind != "f":
            raise InputError(
                f"'{path.name}' cannot be imported: it holds {array.dtype}, and no floating-point numbers."
            )
        with np.errstate(over="ignore"):
            rows = torch.from_numpy(np.atleast_2d(array).astype(np.float32))
        all_names = (BACKGROUND, *names) if len(rows) > 1 else names
        check_width(path.name, rows.shape[1], model, FOLDER)
        try:
            token = Token(rows, all_names, model, branch, **{"init": init, **about})
            token.validate()
        except InputError as error:
            raise InputError(f"'{path.name}' cannot be imported: {error}") from None
        made.append(token)
    return made


Entries = list[tuple[tuple[str, ...], np.ndarray]]  # names of the classes, and their rows


def _entries_of(content: np.ndarray | Mapping[str, np.ndarray], path: Path, classes: Sequence[str]) -> Entries:
    """Those of a NumPy file."""
    if isinstance(content, Mapping):
        return [((_spaced(key),), value) for key, value in content.items()]
    return [(tuple(classes) or (_spaced(path.stem),), content)]


def _words_of(vectors: Mapping[str, np.ndarray], path: Path, classes: Sequence[str]) -> Entries:
    """Those of a textual inversion. Raises InputError where the names are not as many as the words."""
    if classes and len(classes) != len(vectors):
        raise InputError(f"'{path.name}' holds {len(vectors)} words and {len(classes)} names are given; give as many.")
    names = classes or [_spaced(word.strip("<>")) or _spaced(path.stem) for word in vectors]
    rows = (x.mean(axis=0, keepdims=True) for x in vectors.values())
    return [((name,), row) for name, row in zip(names, rows, strict=True)]


def _spaced(name: str) -> str:
    """ "potted-plant" to "potted plant"."""
    return re.sub(r"[-_]+", " ", name).strip()


def export_npy(token: Token, path: str | Path, name: str | None = None) -> Path:
    """Writes one class's row as a plain float32 `[1, E]` `.npy`, as Grounded Diffusion's and DatasetDM's scripts take.

    name: the class, needed only where the token has several. Raises InputError for a class that it does not have.
    """
    if name is None and len(token.names) > 1:
        raise InputError(f"The token has the classes {', '.join(token.names)}; say which one to export.")
    name = name or token.names[0]
    if name not in token.names:
        raise InputError(f"The token has no class '{name}'; choose among {', '.join(token.names)}.")
    row = token.embedding[token.classes.index(name)]
    buffer = io.BytesIO()
    np.save(buffer, row[None].detach().to("cpu", torch.float32).numpy(), allow_pickle=False)
    return _write(Path(path), buffer.getvalue())
