"""Recordings on disk: one safetensors file, its tensors by name and all else as JSON in its header. No pickle.

The fields of `Recording`, `GocaRecording` and what they hold are the names in the file. What is read may be a
stranger's: the header is bounded, and every type and shape is checked.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ovam_core.attention.affinity import MAX_MATRIX_PIXELS
from ovam_core.attention.features import Features
from ovam_core.attention.goca import GocaRecording
from ovam_core.attention.modules import Unbound
from ovam_core.attention.reading import Reading
from ovam_core.attention.recording import LayerQueries, Recording
from ovam_core.attention.text_stream import TextStream
from ovam_core.errors import InputError
from ovam_core.io.files import atomic_path

FORMAT = "ovam-picture/1"
PICTURES = ("image", "start")  # the picture, and what its run began from
MAX_HEADER = 16 << 20  # bytes; 1,000 layers of 1,000 steps of their own each have a tenth of it
MAX_LAYERS = 4096
MAX_STEP = 100_000  # of a run
MAX_SIDE = 1024  # of an attention grid, eight times what the largest models have
MAX_IMAGE_SIDE = 65_535  # pixels, as of most files
MAX_LAYER_NAME = 300  # characters of a layer's
DTYPES = {str(x).removeprefix("torch."): x for x in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}
LORA = {"scaling", "_active_adapter", "merged_adapters", "_disable_adapters"}


@dataclass(frozen=True)
class Recordings:
    """What was recorded of one picture, detached from the model: of the wanted half of the guided batch, for GoCA, of
    other halves by branch, and features of the last step. Files of before 2.2 lack those.
    """

    recording: Recording
    goca: GocaRecording | None
    others: dict[str, Recording]
    features: Features | None = None


def write_recordings(
    path: Path, about: Mapping[str, Any], images: Mapping[str, Tensor], recordings: Recordings
) -> None:
    """One file, there whole or not at all. about: JSON. images: uint8 `[H, W, 3]`, of PICTURES. Raises OSError."""
    tensors = {name: image.contiguous() for name, image in images.items()}
    tree = _packed(recordings, "", tensors)
    told = json.dumps({**about, "recordings": tree}, ensure_ascii=False)
    with atomic_path(path) as part:
        try:
            save_file(tensors, part, metadata={"format": FORMAT, "about": told})
        except SafetensorError as error:  # its words for a full disk
            raise OSError(str(error)) from None


def read_recordings(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], Recordings]:
    """(about, images, recordings) of a file that `write_recordings` has made. Raises InputError for any other."""
    told = _header(path)
    try:
        with safe_open(path, "pt", device="cpu") as file:
            # In memory of torch's own: where a tensor begins decides which products a CPU makes, to the last bit.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        about = json.loads(told)
        tree = _unpacked(about.pop("recordings"), tensors)
        (recordings,) = _ANY.validate_python([tree])
        images = {name: tensors[name] for name in PICTURES if name in tensors}
        for image in images.values():
            _must(image.dtype == torch.uint8 and image.ndim == 3 and image.shape[2] == 3 and min(image.shape) > 0)
        _check_recording(recordings.recording)
        for branch, one in recordings.others.items():
            _check_recording(one)
            _check_half(branch, one, recordings.recording)
        if recordings.goca is not None:
            _check_goca(recordings.goca)
        if recordings.features is not None:
            _check_features(recordings.features, recordings.recording)
    except OSError as error:
        raise InputError(f"'{path.name}' cannot be read: {(error.strerror or 'not possible').lower()}.") from None
    except SafetensorError:
        raise InputError(f"'{path.name}' is not a whole safetensors file; copy or make it again.") from None
    except (ValidationError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        raise InputError(
            f"The recording '{path.name}' lacks a part or holds one of the wrong kind; make it again."
        ) from None
    return about, images, recordings


def _header(path: Path) -> str:
    """What the header tells beside the tensors. Raises InputError for a file that is no recording."""
    try:
        if not path.is_file():
            raise InputError(f"There is no recording '{path}' that can be read.")
        size = os.path.getsize(path)
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, MAX_HEADER):
                raise ValueError
            header = json.loads(file.read(length))
        about = header["__metadata__"]
        if about["format"] != FORMAT or not isinstance(about["about"], str):
            raise ValueError
        return about["about"]
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"'{path.name}' cannot be read: {(error.strerror or 'not possible').lower()}.") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InputError(f"'{path.name}' is not a recording of this program (format {FORMAT}).") from None


# ------------------------------------------------------------------------------------- objects to JSON and back

_ANY = TypeAdapter(
    list[Recordings], config=ConfigDict(arbitrary_types_allowed=True, extra="forbid", allow_inf_nan=False)
)


def _packed(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """As JSON; tensors go into `tensors` and leave their names."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().contiguous()
        return {"tensor": name}
    if isinstance(value, Unbound):
        return {"lora": value.lora}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if is_dataclass(value):
        held = {one.name: getattr(value, one.name) for one in fields(value)}
        return {key: _packed(one, f"{name}.{key}".lstrip("."), tensors) for key, one in held.items()}
    if isinstance(value, dict):
        return {key: _packed(one, f"{name}.{key}", tensors) for key, one in value.items()}
    if isinstance(value, tuple | list):
        return [_packed(one, f"{name}.{place}", tensors) for place, one in enumerate(value)]
    return value


def _unpacked(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The JSON with tensors, dtypes and stand-ins of modules in their places; pydantic makes objects of the rest."""
    if isinstance(tree, list):
        return [_unpacked(one, tensors) for one in tree]
    if not isinstance(tree, dict):
        return tree
    match tree:
        case {"tensor": name, **more} if not more:
            return tensors[name]
        case {"dtype": name, **more} if not more:
            return DTYPES[name]
        case {"lora": dict(layers), **more} if not more:
            for one in layers.values():
                _check_lora(one)
            return Unbound(layers)
    return {key: _unpacked(one, tensors) for key, one in tree.items()}


# ----------------------------------------------------------------------------------------------- what must hold


def _must(holds: bool) -> None:
    if not holds:
        raise ValueError


def _check_lora(x: dict[str, Any]) -> None:
    _must(x.keys() <= LORA and all(isinstance(one, float | int) for one in x["scaling"].values()))
    active = x.get("_active_adapter", [])
    for names in ([active] if isinstance(active, str) else active, x.get("merged_adapters", [])):
        _must(isinstance(names, list) and all(isinstance(one, str) for one in names))


def _check_recording(x: Recording) -> None:
    steps = x.step_indices
    _check_steps(steps)
    _must(len(x.timesteps) == len(steps))
    _must(1 <= len(x.layers) <= MAX_LAYERS and len(x.column_sums) <= MAX_LAYERS)
    _must(len({layer.name for layer in x.layers}) == len(x.layers))
    _must(1 <= x.height <= MAX_SIDE and 1 <= x.width <= MAX_SIDE)
    _must(all(1 <= side <= MAX_IMAGE_SIDE for side in x.image_size))
    for layer in x.layers:
        _check_layer(layer, x.stream is None, steps)
    for sums in x.column_sums:
        own = steps if sums.steps is None else sums.steps
        _check_steps(own)
        _must(set(own) <= set(steps) and sums.sums.dtype == torch.float32)
        _must(1 <= sums.height <= MAX_SIDE and 1 <= sums.width <= MAX_SIDE)
        _must(tuple(sums.sums.shape) == (len(own), sums.height * sums.width))
        _must(_is_finite(sums.sums) and bool((sums.sums >= 0).all()))
    if x.stream is not None:
        _check_stream(x.stream, {one.name: one.steps or steps for one in x.layers})
    _check_kept(x)
    _check_reading(x.reading)


def _check_kept(x: Recording) -> None:
    """What is there on request: matrices of self-attention, outputs of joint attention."""
    for one in x.affinities:
        n = one.height * one.width
        _must(min(one.height, one.width) >= 1 and n <= MAX_MATRIX_PIXELS)
        _must(tuple(one.matrix.shape) == (n, n) and one.matrix.dtype == torch.float32)
        _must(_is_finite(one.matrix) and bool((one.matrix >= 0).all()))
    carried = {} if x.stream is None else {block.name: block for block in x.stream.blocks if block.carry is not None}
    _must(len({one.name for one in x.outputs}) == len(x.outputs))
    for layer in x.outputs:
        own = x.step_indices if layer.steps is None else layer.steps
        _check_steps(own)
        _must(set(own) <= set(x.step_indices) and layer.name in carried)
        _must(1 <= layer.height <= MAX_SIDE and 1 <= layer.width <= MAX_SIDE)
        _check_numbers(layer.outputs, 3)
        _, heads, pixels, width = carried[layer.name].tensors[0].shape
        _must(tuple(layer.outputs.shape) == (len(own), pixels, heads * width))
        _must(pixels == layer.height * layer.width and set(own) & set(carried[layer.name].steps) != set())


def _check_half(branch: str, x: Recording, first: Recording) -> None:
    """Another half of the guided batch: of the same image, on the same grid."""
    _must(x.branch == branch != first.branch)
    _must((x.height, x.width, x.image_size) == (first.height, first.width, first.image_size))


def _check_layer(layer: LayerQueries, has_keys: bool, steps: Sequence[int]) -> None:
    own = steps if layer.steps is None else layer.steps
    _check_steps(own)
    _check_name(layer.name)
    _must(set(own) <= set(steps) and isinstance(layer.keys, Unbound) == has_keys)
    _must(1 <= layer.height <= MAX_SIDE and 1 <= layer.width <= MAX_SIDE and layer.scale > 0)
    _check_numbers(layer.queries, 4)
    _must(layer.queries.shape[0] == len(own) and layer.queries.shape[2] == layer.height * layer.width)
    if layer.made is not None:
        _check_numbers(layer.made, 2)
        _must(tuple(layer.made.shape) == (1, layer.queries.shape[1] * layer.queries.shape[3]))
        _must(_is_finite(layer.made))


def _check_stream(stream: TextStream, layers: Mapping[str, Sequence[int]]) -> None:
    _check_steps(stream.steps)
    _check_numbers(stream.modulation, 2)
    _must(len(stream.modulation) == len(stream.steps) and 1 <= len(stream.blocks) <= MAX_LAYERS)
    _must(isinstance(stream.embed, Unbound))
    before: Sequence[int] = stream.steps
    for place, block in enumerate(stream.blocks):
        _check_steps(block.steps)
        _check_name(block.name)
        _must(set(block.steps) <= set(before) and isinstance(block.to_keys, Unbound))
        carried = block.image_keys is not None and block.image_values is not None
        _must(isinstance(block.carry, Unbound) == carried == (len(block.tensors) == 2))
        _must(carried or place == len(stream.blocks) - 1)
        for shown in block.tensors:
            _check_numbers(shown, 4)
            _must(len(shown) == len(block.steps) and shown.shape == block.tensors[0].shape)
        for made in block.made or ():
            _must(made.dtype in DTYPES.values() and _is_finite(made))
        before = block.steps
    reached = {block.name: tuple(block.steps) for block in stream.blocks}
    order = [name for name in reached if name in layers]
    _must(len(reached) == len(stream.blocks) and order == list(layers))
    _must(all(reached[name] == tuple(steps) for name, steps in layers.items()))


def _check_goca(x: GocaRecording) -> None:
    _must(1 <= len(x.layers) <= MAX_LAYERS and 1 <= len(x.finest) <= MAX_LAYERS)
    _must(len({weighted.layer.name for weighted in x.layers}) == len(x.layers))
    joint = x.stream is not None
    for weighted in x.layers:
        layer = weighted.layer
        _check_layer(layer, not joint, (0,))
        _must((weighted.heads is None) == joint == (weighted.others is not None))
        for part in (weighted.heads, weighted.others):
            _check_by_head(part, layer.queries[0])
    for own in x.finest:
        for part in (own.queries, own.keys):
            _check_numbers(part, 3)
        _must(own.queries.shape == own.keys.shape and own.queries.shape[1] == x.height * x.width)
        _must((own.height, own.width) == (x.height, x.width))
        _check_by_head(own.others, own.queries)
    if x.stream is not None:
        _check_stream(x.stream, {one.layer.name: (0,) for one in x.layers})
    _must(None not in (x.options.heads, x.options.layers, x.options.rescale, x.options.even_rows))
    _must(x.options.blur is not None and 0 <= x.options.blur <= MAX_SIDE)
    _must(x.options.propagations is not None and 0 <= x.options.propagations <= MAX_LAYERS)
    _check_reading(x.reading)


def _check_by_head(x: Tensor | None, queries: Tensor) -> None:
    """A number a head and pixel of queries `[heads, n, d]`, where there is one."""
    if x is not None:
        _must(x.shape == queries.shape[:2] and x.dtype == torch.float32 and _is_finite(x))


def _check_features(x: Features, first: Recording) -> None:
    _must(x.image_size == first.image_size and 0 <= x.timestep <= MAX_STEP)
    for kept, dimensions in ((x.layers, 3), (x.attention, 4)):
        _must(1 <= len(kept) <= MAX_LAYERS)
        for name, one in kept.items():
            _check_name(name)
            _check_numbers(one, dimensions)
            _must(max(one.shape[-2:]) <= MAX_SIDE and _is_finite(one))


def _check_reading(x: Reading | None) -> None:
    if x is not None and x.numbers is not None:
        _must(x.numbers.dtype == torch.float32 and x.numbers.ndim == 2 and len(x.numbers) == len(x.parts))


def _check_name(name: str) -> None:
    _must(0 < len(name) <= MAX_LAYER_NAME and name.isprintable())


def _is_finite(x: Tensor) -> bool:
    return bool(torch.isfinite(x).all())


def _check_steps(steps: Sequence[int]) -> None:
    _must(len(steps) > 0 and steps[0] >= 0 and steps[-1] <= MAX_STEP)
    _must(all(before < after for before, after in itertools.pairwise(steps)))


def _check_numbers(x: Tensor, dimensions: int) -> None:
    _must(x.dtype in DTYPES.values() and x.ndim == dimensions and min(x.shape) > 0 and math.prod(x.shape) > 0)
