"""Token files: an optimised embedding with what it was made from; the library in `tokens/`; importers.

A token is a plain safetensors file. Nothing here unpickles a stranger's objects: the one pickled format that is read
(NumPy's, for the paper's published tokens) goes through an unpickler that knows arrays of numbers and nothing else.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import tempfile
import urllib.request
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from ovam_core.attention.heatmap import Attribution
from ovam_core.errors import InputError
from ovam_core.io.files import write
from ovam_core.io.npy import MAX_ROWS, _read_npy
from ovam_core.models.families import family_of
from ovam_core.models.presets import DEFAULT_HUB_MODEL
from ovam_core.query import background_embedding

FORMAT = "ovam-token/1"

SUFFIX = ".safetensors"

FOLDER = Path(__file__).resolve().parent.parent / "tokens"

BACKGROUND = "background"

BRANCHES = ("conditional", "unconditional")

MAX_BYTES = 4 << 20  # a hundred times the largest token one would make

MAX_NAME = 200  # characters of a class name

VOC_SD15_URL = "https://raw.githubusercontent.com/vpulab/ovam/main/docs/assets/tokens_VOC.npy"

VOC_SD15_SHA256 = "532f05423bedaf3c2c227bfdbedab0746bccf5e52e6f7f007cda097a322a51cc"


@dataclass(frozen=True, eq=False)
class Token:
    """An embedding whose heatmaps segment a class, and how it came to be.

    embedding: float32 `[L, E]` on the CPU, finite; row 0 is the background if L > 1. classes: one name a row,
    row 0 "background" if L > 1. model: `pipe.ovam_name` of the model it was found with. branch: the half of the guided
    batch whose queries it belongs to. tau, alpha: threshold and self-attention floor for its masks, 0 to 1.
    steps, prompt, seed: the image it was found on. init: what it started from. loss: the lowest one (Eq. 6).
    settings: how the image was made and the search was run, as JSON text.
    """

    embedding: Tensor
    classes: tuple[str, ...]
    model: str
    branch: str = "conditional"
    tau: float = 0.8
    alpha: float = 0.95
    steps: int | None = None
    prompt: str = ""
    seed: int | None = None
    init: str = ""
    loss: float | None = None
    settings: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """The classes without the background."""
        return self.classes[1:] if len(self.classes) > 1 else self.classes

    def validate(self) -> None:
        """Raises InputError, one sentence, for what is no token."""
        x = self.embedding
        if x.ndim != 2 or not 1 <= x.shape[0] <= MAX_ROWS or x.shape[1] == 0 or not x.is_floating_point():
            raise InputError(f"The token's embedding is {x.dtype} {list(x.shape)}; it must be float [rows, width].")
        if not torch.isfinite(x).all():
            raise InputError("The token's embedding holds numbers that are not finite; make the token again.")
        if len(self.classes) != len(x):
            raise InputError(f"The token has {len(x)} rows but {len(self.classes)} class names; give one name a row.")
        if len(x) > 1 and self.classes[0] != BACKGROUND:
            raise InputError(f"The first row of a token of several rows is called '{BACKGROUND}'; name it so.")
        for name in self.classes:
            if not isinstance(name, str) or not name.strip() or len(name) > MAX_NAME or not name.isprintable():
                raise InputError(f"A class name of the token is not a name of 1 to {MAX_NAME} letters; rename it.")
        if len(set(self.classes)) != len(self.classes):
            raise InputError("The token names a class twice; give every row a name of its own.")
        if self.branch not in BRANCHES:
            raise InputError(f"The token's branch is '{self.branch[:40]}'; it must be conditional or unconditional.")
        for name, value in (("tau", self.tau), ("alpha", self.alpha)):
            if not math.isfinite(value) or not 0 <= value <= 1:
                raise InputError(f"The token's {name} is {value}; it must lie between 0 and 1.")


# ------------------------------------------------------------------------------------------------ files


def save(path: str | Path, token: Token) -> Path:
    """Writes a token as safetensors, beside its place and renamed. Raises InputError where it cannot be written."""
    token.validate()
    metadata = {
        "format": FORMAT,
        "model": token.model,
        "classes": json.dumps(list(token.classes), ensure_ascii=False),
        "branch": token.branch,
        "tau": repr(float(token.tau)),
        "alpha": repr(float(token.alpha)),
        "steps": "" if token.steps is None else str(token.steps),
        "prompt": token.prompt,
        "seed": "" if token.seed is None else str(token.seed),
        "init": token.init,
        "loss": "" if token.loss is None else repr(float(token.loss)),
        "settings": token.settings,
    }
    embedding = token.embedding.detach().to("cpu", torch.float32).contiguous()
    return _write(Path(path), to_bytes({"embedding": embedding}, metadata))


def load(path: str | Path) -> Token:
    """Reads a token file. Raises InputError, one sentence, for a file that is too large, broken or no token."""
    path = Path(path)
    _check_file(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            embedding = file.get_tensor("embedding") if "embedding" in file.keys() else None  # noqa: SIM118
    except (SafetensorError, OSError, ValueError):
        raise InputError(f"'{path.name}' is not a whole safetensors file; download or make it again.") from None
    if metadata.get("format") != FORMAT or embedding is None:
        raise InputError(f"'{path.name}' is not a token of this program (format {FORMAT}).")
    try:
        classes = json.loads(metadata["classes"])
        token = Token(
            embedding=embedding.float(),
            classes=tuple(classes) if isinstance(classes, list) else (classes,),
            model=metadata["model"],
            branch=metadata["branch"],
            tau=float(metadata["tau"]),
            alpha=float(metadata["alpha"]),
            steps=_optional(int, metadata.get("steps", "")),
            prompt=metadata.get("prompt", ""),
            seed=_optional(int, metadata.get("seed", "")),
            init=metadata.get("init", ""),
            loss=_optional(float, metadata.get("loss", "")),
            settings=metadata.get("settings", ""),
        )
        token.validate()
    except (KeyError, TypeError, RecursionError):
        raise InputError(f"The token '{path.name}' lacks a setting or holds one of the wrong kind.") from None
    except ValueError as error:
        raise InputError(f"The token '{path.name}' cannot be used: {error}") from None
    return token


def _optional(kind: type, text: str) -> Any:
    return kind(text) if text else None


def _check_file(path: Path) -> None:
    try:
        regular, size = path.is_file(), path.stat().st_size
    except (OSError, ValueError):
        regular, size = False, 0
    if not regular:
        raise InputError(f"There is no token file '{path}' that can be read.")
    if size > MAX_BYTES:
        raise InputError(f"'{path.name}' has {size:,} bytes; a token has at most {MAX_BYTES:,}.")


def _write(path: Path, data: bytes) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, data)
    except OSError as error:
        raise InputError(f"Cannot write the file '{path}': {(error.strerror or 'not possible').lower()}.") from None
    return path


# ---------------------------------------------------------------------------------------------- library


def file_name(names: Sequence[str]) -> str:
    """The file of a token of these classes: "potted plant" to "potted-plant.safetensors"; never a way out."""
    plain = re.sub(r"[\W_]+", "-", " ".join(names).lower()).strip("-")[:80].strip("-")
    return (plain or "token") + SUFFIX


def folder_for(model: str) -> Path:
    """Where the tokens of a model lie: `tokens/<last part of its name>`."""
    return FOLDER / (re.sub(r"[^\w.-]+", "-", last_part(model)).strip(".-") or "model")


def library(model: str, folder: str | Path | None = None) -> dict[str, Path]:
    """Class name to token file for a model, sorted; tokens of several classes are called "cat, dog".

    folder: default `folder_for(model)`; one that does not exist is empty. A broken file is left out with a warning.
    """
    found = {}
    for path in sorted(Path(folder or folder_for(model)).glob(f"*{SUFFIX}")):
        try:
            found[", ".join(load(path).names)] = path
        except InputError as error:
            warnings.warn(str(error), stacklevel=2)
    return dict(sorted(found.items()))


def last_part(model: str) -> str:
    """Forks and local copies keep the last part of a hub id: runwayml/stable-diffusion-v1-5 is stable-diffusion-v1-5."""
    return model.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]


# -------------------------------------------------------------------------------------------------- use


def attribution(pipe: Any, token: Token) -> Attribution:
    """The token as an attribution prompt: one label a class, the background without one.

    A token of one row gets this text encoder's `<SoT>` (T5: `</s>`) as its background row, as a softmax over one token is constant.
    Raises InputError for a token of another width; warns for one of another model.
    """
    token.validate()
    width = family_of(pipe).embed_dim
    if token.embedding.shape[1] != width:
        raise InputError(
            f"The token '{', '.join(token.names)}' is {token.embedding.shape[1]} wide and this model takes {width}; "
            f"it was made with {token.model or 'another model'}."
        )
    name = getattr(pipe, "ovam_name", "")
    if last_part(name) != last_part(token.model):
        warnings.warn(
            f"The token '{', '.join(token.names)}' was made with {token.model or 'an unnamed model'}, not with {name}: "
            "its maps may mean nothing here.",
            stacklevel=2,
        )
    embedding = token.embedding.to(pipe._execution_device)
    if len(embedding) == 1:
        start = background_embedding(pipe, "A photograph")
        embedding = torch.cat([start.to(embedding), embedding])
    groups = tuple((row,) for row in range(1, len(embedding)))
    return Attribution(embedding, token.names, groups)


# ------------------------------------------------------------------------------------ import and export


def import_file(
    path: str | Path, model: str, *, classes: Sequence[str] = (), branch: str = "conditional", **about: Any
) -> list[Token]:
    """Tokens of a `.npy` file: one array `[E]` or `[L, E]`, or a pickled dict of such arrays, one token an entry.

    model: the model they were found with. classes: names for a plain array's rows, its background left out (default:
    the file's name); the keys of a dict are names themselves, "potted-plant" becomes "potted plant".
    about: further fields of Token. Raises InputError for anything but arrays of finite numbers: a pickle that
    asks for any other object is refused before it is made.
    """
    path = Path(path)
    _check_file(path)
    content = _read_npy(path.read_bytes(), path.name)
    if isinstance(content, dict):
        entries = [((re.sub(r"[-_]+", " ", str(key)).strip(),), value) for key, value in content.items()]
    else:
        entries = [(tuple(classes) or (re.sub(r"[-_]+", " ", path.stem).strip(),), content)]
    made = []
    for names, array in entries:
        rows = torch.from_numpy(np.atleast_2d(array).astype(np.float32))
        all_names = (BACKGROUND, *names) if rows.ndim == 2 and len(rows) > 1 else names
        token = Token(rows, all_names, model, branch, **{"init": f"imported from {path.name}", **about})
        try:
            token.validate()
        except InputError as error:
            raise InputError(f"'{path.name}' cannot be imported: {error}") from None
        made.append(token)
    return made


def fetch_voc_sd15(folder: str | Path | None = None, url: str = VOC_SD15_URL) -> list[Path]:
    """Downloads the paper's 20 published tokens for Stable Diffusion 1.5 (MIT licence) and saves them as safetensors.

    They were found on the other half of the guided batch than the paper says, hence branch "unconditional".
    folder: default `folder_for` Stable Diffusion 1.5. Returns the files. Raises InputError without a network, and
    for a download whose SHA-256 is not the known one.
    """
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            data = answer.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise InputError(f"The published tokens cannot be fetched from {url} ({reason}); is there a network?") from None
    if hashlib.sha256(data).hexdigest() != VOC_SD15_SHA256:
        raise InputError(f"What came from {url} is not the file that was published; nothing was imported.")
    with tempfile.TemporaryDirectory() as work:
        file = Path(work) / "tokens_VOC.npy"
        file.write_bytes(data)
        tokens = import_file(file, DEFAULT_HUB_MODEL, branch="unconditional", steps=30)
    folder = Path(folder or folder_for(DEFAULT_HUB_MODEL))
    return [save(folder / file_name(token.names), token) for token in tokens]


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
