"""Textual inversion files of strangers: words and the vectors that a text encoder reads for them.

`.safetensors` of diffusers (a tensor by its word), of A1111 (`emb_params`) and of SDXL (`clip_l`, `clip_g`); `.bin` and
`.pt` of torch, read with `weights_only`, which runs nothing.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ovam_core.errors import InputError
from ovam_core.io.npy import MAX_ROWS
from ovam_core.io.token_files import MAX_BYTES, TOKEN_FORMAT, read_header

if TYPE_CHECKING:
    from torch import Tensor

ZIP = b"PK\x03\x04"
NAMELESS = ("emb_params", "*", "clip_l", "clip_g")  # keys that are no word


def is_textual_inversion(data: bytes) -> bool:
    """Whether the first bytes are those of safetensors or of torch's own files."""
    return data.startswith((ZIP, b"\x80\x02")) or data[8:9] == b"{"


def read_textual_inversion(data: bytes, name: str) -> dict[str, np.ndarray]:
    """Vectors float32 `[n, E]` by word, "" where the file names none.

    name: what to call the file in errors. Raises InputError for anything else.
    """
    tensors = _of_safetensors(data, name) if data[8:9] == b"{" else _of_torch(data, name)
    if not tensors or len(tensors) > MAX_ROWS:
        raise InputError(f"'{name}' holds {len(tensors)} tensors; a textual inversion has one for each word.")
    vectors = {word: _vectors(tensor, name) for word, tensor in tensors.items()}
    if {"clip_l", "clip_g"} == vectors.keys():
        first, second = vectors["clip_l"], vectors["clip_g"]
        if len(first) != len(second):
            raise InputError(f"'{name}' has {len(first)} vectors of clip_l and {len(second)} of clip_g; it is broken.")
        return {"": np.concatenate([first, second], axis=1)}
    widths = sorted({x.shape[1] for x in vectors.values()})
    if len(widths) > 1:
        raise InputError(
            f"'{name}' is no textual inversion: its tensors are {', '.join(map(str, widths))} wide, and those of one "
            "model are of one width."
        )
    return {"" if word in NAMELESS else word: x for word, x in vectors.items()}


def _of_safetensors(data: bytes, name: str) -> Mapping[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        header, _ = read_header(data)
        if header.get("__metadata__", {}).get("format") == TOKEN_FORMAT:
            raise InputError(f"'{name}' is a token of this program already: copy it to the folder, or use it as it is.")
        return load(data)
    except InputError:
        raise
    except (SafetensorError, ValueError, RecursionError, KeyError):
        raise InputError(f"'{name}' is not a whole safetensors file; download or make it again.") from None


def _of_torch(data: bytes, name: str) -> Mapping[str, Tensor]:
    """A tensor, a dictionary of them, or A1111's, which has them under "string_to_param"."""
    import torch

    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            parts = archive.infolist()
    except Exception:  # zipfile has many ways to fail
        raise InputError(
            f"'{name}' is not a whole file of torch 1.6 or later; save it again, as safetensors."
        ) from None
    # Nothing is packed in torch's own files: what is could become gigabytes.
    if sum(part.file_size for part in parts) > MAX_BYTES or any(part.compress_type for part in parts):
        raise InputError(f"'{name}' is refused: it holds more than a token's {MAX_BYTES:,} bytes, or is compressed.")
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception:  # a stranger's pickle has many ways to fail
        raise InputError(f"'{name}' is refused: it holds something other than tensors, or is not whole.") from None
    if isinstance(content, torch.Tensor):
        return {"": content}
    if isinstance(content, dict) and isinstance(content.get("string_to_param"), dict):
        said = content.get("name")
        content = {
            said if word in NAMELESS and isinstance(said, str) else word: x
            for word, x in content["string_to_param"].items()
        }
    if not isinstance(content, dict) or not all(isinstance(word, str) for word in content):
        raise InputError(f"'{name}' is no textual inversion: it holds neither a tensor nor tensors by their words.")
    return content


def _vectors(tensor: Any, name: str) -> np.ndarray:
    """Float32 `[n, E]`, checked before anything is made of it: its shape is a stranger's."""
    import torch

    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_meta:
        raise InputError(f"'{name}' is no textual inversion: it holds something other than tensors of numbers.")
    shape = list(tensor.shape)
    if not 1 <= len(shape) <= 2 or min(shape) < 1 or tensor.numel() * 4 > MAX_BYTES or not tensor.is_floating_point():
        kind = str(tensor.dtype).removeprefix("torch.")
        raise InputError(f"'{name}' holds {kind} {shape}, and a textual inversion is floating-point [vectors, width].")
    return np.atleast_2d(tensor.detach().to(torch.float32).numpy())
