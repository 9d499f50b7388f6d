"""State dicts of strangers: torch's `.pth` files, read with `weights_only`, which runs nothing, and checked by name,
shape and size before anything is made of them.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ovam_core.errors import InputError

WIDEST = 8  # bytes of a number, at most
MAX_PICKLE = 1 << 20  # bytes of the names and shapes, a hundred times what they take
MAX_PARTS = 4096  # of the archive: one a tensor, and a handful
PARALLEL = "module."  # what torch's DataParallel puts before every name


def read_weights(
    path: str | Path, shapes: Mapping[str, tuple[int, ...]], system: str, source: str
) -> dict[str, Tensor]:
    """The tensors of a state dict by name, float32, of just these names and shapes.

    system, source: for messages, whose weights they are and where they are published. Raises InputError, one sentence,
    for a file that cannot be read, is too large, packed, no whole file of torch 1.6 or later, holds anything beside
    tensors of finite numbers, or tensors of other names or shapes.
    """
    path = Path(path)
    _check_archive(path, shapes, system)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # a stranger's pickle has many ways to fail
        raise InputError(f"'{path.name}' is refused: it holds something other than tensors, or is not whole.") from None
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise InputError(f"'{path.name}' is no state dict: it does not hold tensors by their names.")
    found: dict[str, Any] = dict(content)
    if found and all(name.startswith(PARALLEL) for name in found):
        found = {name.removeprefix(PARALLEL): x for name, x in found.items()}
    others = sorted(shapes.keys() - found.keys()) or sorted(found.keys() - shapes.keys())
    if others:
        how = "lacks" if others[0] in shapes else "has"
        raise InputError(
            f"'{path.name}' is not a file of {system}'s weights: it {how} '{others[0][:100]}'; take the one that its "
            f"authors publish at {source}."
        )
    return {name: _numbers(found[name], name, shape, path.name, system) for name, shape in shapes.items()}


def _check_archive(path: Path, shapes: Mapping[str, tuple[int, ...]], system: str) -> None:
    """Raises InputError for what is no archive of torch's, or holds more than such weights can."""
    most = sum(math.prod(shape) for shape in shapes.values()) * WIDEST + MAX_PICKLE
    try:
        if not path.is_file():
            raise InputError(f"There is no file '{str(path)[:200]}' of weights that can be read.")
        if path.stat().st_size > 2 * most:
            raise InputError(f"'{path.name}' is refused: it is larger than {system}'s weights can be.")
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"'{path.name}' cannot be read: {(error.strerror or 'not possible').lower()}.") from None
    except Exception:  # zipfile has many ways to fail
        raise InputError(
            f"'{path.name}' is not a whole file of torch 1.6 or later: download it again, or save its state dict anew."
        ) from None
    # Nothing is packed in torch's own files: what is could become gigabytes.
    names = sum(part.file_size for part in parts if part.filename.endswith(".pkl"))
    if sum(part.file_size for part in parts) > most or names > MAX_PICKLE or len(parts) > MAX_PARTS:
        raise InputError(f"'{path.name}' is refused: it holds more than {system}'s weights.")
    if any(part.compress_type for part in parts):
        raise InputError(f"'{path.name}' is refused: it is compressed, which torch's own files are not.")


def _numbers(x: Any, name: str, shape: tuple[int, ...], file: str, system: str) -> Tensor:
    """Float32 in memory of its own; its shape is looked at before it is copied."""
    if not isinstance(x, Tensor) or x.layout != torch.strided or x.is_meta or not x.is_floating_point():
        raise InputError(f"'{file}' is refused: '{name}' is no tensor of floating-point numbers.")
    if tuple(x.shape) != tuple(shape):
        raise InputError(f"'{file}' does not fit: '{name}' is {list(x.shape)}, and {system}'s is {list(shape)}.")
    made = x.detach().to(torch.float32).contiguous()
    if not bool(torch.isfinite(made).all()):
        raise InputError(f"'{file}' is refused: '{name}' holds numbers that are not finite; download it again.")
    return made.clone()
