"""A token's file as far as it is told without torch: where it lies, how large it may be, what its header says."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ovam_core.errors import InputError
from ovam_core.io.files import shipped_folder

TOKEN_FORMAT = "ovam-token/1"
SUFFIX = ".safetensors"
FOLDER = shipped_folder("tokens")
BACKGROUND = "background"
MAX_BYTES = 4 << 20  # a hundred times the largest token one would make
NUMBER_BYTES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}  # of safetensors' floating-point numbers


@dataclass(frozen=True)
class Listed:
    """What a list says of a token. names: its classes that get a map. shape: rows and width."""

    names: tuple[str, ...]
    model: str
    branch: str
    loss: float | None
    seed: int | None
    shape: tuple[int, int]


def answered(classes: Sequence[str], rivals: int) -> tuple[str, ...]:
    """The rows of a token that get a map: neither the background, where there are several, nor the last `rivals`."""
    return tuple(classes[1 : len(classes) - rivals] if len(classes) > 1 else classes)


def list_token(path: Path) -> Listed:
    """The header of a token's file. Raises InputError, one sentence, for what is no whole token."""
    check_file(path)
    try:
        data = path.read_bytes()
        header, numbers = read_header(data)
    except (OSError, ValueError, RecursionError):
        raise InputError(f"'{path.name}' is not a whole safetensors file; download or make it again.") from None
    about, entry = header.get("__metadata__", {}), header.get("embedding")
    if about.get("format") != TOKEN_FORMAT or not isinstance(entry, dict):
        raise InputError(f"'{path.name}' is not a token of this program (format {TOKEN_FORMAT}).")
    try:
        classes, (rows, width) = json.loads(about["classes"]), entry["shape"]
        whole = entry["data_offsets"] == [0, numbers] and rows * width * NUMBER_BYTES[entry["dtype"]] == numbers
        several = classes if isinstance(classes, list) else [classes]
        if not whole or len(several) != rows or not all(isinstance(x, str) for x in several):
            raise ValueError
        rivals = int(about.get("rivals", "0"))
        if not 0 <= rivals <= max(0, rows - 2):
            raise ValueError
        return Listed(
            names=answered(several, rivals),
            model=about["model"],
            branch=about["branch"],
            loss=float(about["loss"]) if about.get("loss") else None,
            seed=int(about["seed"]) if about.get("seed") else None,
            shape=(rows, width),
        )
    except (KeyError, TypeError, ValueError, RecursionError):
        raise InputError(f"The token '{path.name}' lacks a setting or holds one of the wrong kind.") from None


def read_header(data: bytes) -> tuple[dict, int]:
    """The header of a safetensors file, and the number of bytes behind it. Raises ValueError where there is none."""
    length = int.from_bytes(data[:8], "little")
    if not 2 <= length <= len(data) - 8:
        raise ValueError("no header")
    header = json.loads(data[8 : 8 + length])
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__", {}), dict):
        raise ValueError("no header")
    return header, len(data) - 8 - length


def check_file(path: Path) -> None:
    """Raises InputError for what is no file, and for one larger than MAX_BYTES."""
    try:
        regular, size = path.is_file(), path.stat().st_size
    except (OSError, ValueError):
        regular, size = False, 0
    if not regular:
        raise InputError(f"There is no token file '{path}' that can be read.")
    if size > MAX_BYTES:
        raise InputError(f"'{path.name}' has {size:,} bytes; a token has at most {MAX_BYTES:,}.")


def folder_in(folder: Path, model: str) -> Path:
    """Where the tokens of a model lie: `folder/<last part of its name>`."""
    return folder / (re.sub(r"[^\w.-]+", "-", last_part(model)).strip(".-") or "model")


def last_part(model: str) -> str:
    """Forks and local copies keep the last part of a hub id: runwayml/stable-diffusion-v1-5 is
    stable-diffusion-v1-5.
    """
    return model.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]


# Widths of embeddings, by how the last part of a model's name begins.
WIDTHS = {"stable-diffusion-v1": 768, "stable-diffusion-2": 1024, "stable-diffusion-xl": 2048, "sdxl": 2048}


def known_width(model: str, folder: Path) -> int | None:
    """The width of a model's embeddings: of its tokens in `folder`, of its own folder, of what its name says.

    None where nothing tells it.
    """
    for path in sorted(folder_in(folder, model).glob(f"*{SUFFIX}")):
        try:
            return list_token(path).shape[1]
        except InputError:
            continue
    for part in ("unet", "transformer"):
        try:
            config = json.loads((Path(model) / part / "config.json").read_text(encoding="utf-8"))
            names = ("caption_channels", "joint_attention_dim", "cross_attention_dim")
            width = next((config[name] for name in names if config.get(name)), None)
            return width[0] if isinstance(width, list) else width
        except (OSError, ValueError, TypeError, AttributeError):
            continue
    name = last_part(model).lower()
    return next((width for start, width in WIDTHS.items() if name.startswith(start)), None)


def check_width(name: str, width: int, model: str, folder: Path) -> None:
    """Raises InputError where it is known that the model takes embeddings of another width."""
    taken = known_width(model, folder)
    if taken is not None and taken != width:
        raise InputError(
            f"'{name}' is {width} wide, and {last_part(model)} takes {taken}; it was made for another model (768 is "
            "Stable Diffusion 1, 1024 is 2, and SDXL takes clip_l and clip_g together, 768 + 1280 = 2048)."
        )


def is_sane(largest: float) -> bool:
    """Whether an embedding's largest number can be one: a text encoder's are some tens, a long search's some 10,000."""
    return math.isfinite(largest) and largest <= MAX_VALUE


MAX_VALUE = 1e6
