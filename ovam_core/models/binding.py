"""A detached recording, bound again: a model's own layers, found by name, in the places of those of the run."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace

import torch

from ovam_core.attention.goca import GocaRecording
from ovam_core.attention.heads import Attention
from ovam_core.attention.heatmap import check_layer_weights, check_stream_weights, check_weights, tried_keys
from ovam_core.attention.modules import as_recorded
from ovam_core.attention.recording import LayerQueries, Recording, side_by_side
from ovam_core.attention.rows import Rows
from ovam_core.attention.text_stream import StreamBlock, TextStream
from ovam_core.errors import InputError
from ovam_core.models.adapter import Adapter, Pipeline
from ovam_core.models.registry import adapter_of


@torch.no_grad()
def bound(pipe: Pipeline, recording: Recording) -> Recording:
    """The recording with the layers of this pipeline, set as they were in the run (the scale of a LoRA).

    Raises InputError for a pipeline that has not its layers, or others' weights in them.
    """
    adapter = adapter_of(pipe)
    recording = recording.detached()
    layers = _bound(adapter, recording.layers, recording.embed_dim)
    if (recording.stream is None) != all(x.keys is not None for x in layers):
        raise InputError(_OTHER.format(layers[0].name))
    stream = None if recording.stream is None else _bound_stream(adapter, recording.stream, layers)
    recording = replace(recording, layers=layers, stream=stream)
    check_weights(recording)
    return recording


@torch.no_grad()
def bound_goca(pipe: Pipeline, recording: GocaRecording) -> GocaRecording:
    """The same for GoCA's recording."""
    adapter, recording = adapter_of(pipe), recording.detached()
    layers = _bound(adapter, tuple(x.layer for x in recording.layers), recording.embed_dim)
    if (recording.stream is None) != all(x.keys is not None for x in layers):
        raise InputError(_OTHER.format(layers[0].name))
    stream = None if recording.stream is None else _bound_stream(adapter, recording.stream, layers)
    check_layer_weights(layers, recording.embed_dim)
    check_stream_weights(stream, recording.embed_dim)
    weighted = zip(recording.layers, layers, strict=True)
    return replace(recording, layers=tuple(replace(x, layer=layer) for x, layer in weighted), stream=stream)


_OTHER = "The layer {} of this recording is not one of this model: open the model that it was made with."


def _bound(adapter: Adapter, layers: tuple[LayerQueries, ...], width: int) -> tuple[LayerQueries, ...]:
    if width != adapter.embed_dim:
        raise InputError(
            f"This recording takes embeddings {width} wide and the model gives {adapter.embed_dim}: open the model "
            "that it was made with."
        )
    cross, _ = adapter.attentions()
    bound = tuple(_bound_layer(adapter, cross, x, width) for x in layers)
    return bound if any(x.keys is None for x in bound) else side_by_side(bound)


def _bound_layer(
    adapter: Adapter, attentions: Mapping[str, Attention], layer: LayerQueries, width: int
) -> LayerQueries:
    """The layer with the model's way to its keys; with joint attention there is none, and none is looked for."""
    attention = attentions.get(layer.name)
    _, heads, _, d = layer.queries.shape
    if attention is None or attention.heads != heads or adapter.scale(attention) != layer.scale:
        raise InputError(_OTHER.format(layer.name))
    own = adapter.keys(attention)
    if own is None or layer.keys is None:
        return replace(layer, keys=own)
    keys = as_recorded(own, layer.keys)
    if tried_keys(keys, width, layer.dtype).shape != (1, heads * d):
        raise InputError(_OTHER.format(layer.name))
    return replace(layer, keys=keys)


def _bound_stream(adapter: Adapter, stream: TextStream, layers: tuple[LayerQueries, ...]) -> TextStream:
    """The text stream with the model's modules, as far as it went."""
    cross, _ = adapter.attentions()
    nothing = Rows((0,), torch.zeros(1))
    whole = adapter.stream(dict.fromkeys(adapter.beside_queries(cross.keys(), True), nothing))
    assert whole is not None, "the layers have no keys of their own"
    queries = {x.name: x.queries.shape for x in layers}
    names = [x.name for x in whole.blocks]
    recorded = [x.name for x in stream.blocks]
    if unlike := [one for one, own in itertools.zip_longest(recorded, names[: len(recorded)]) if one != own]:
        raise InputError(_OTHER.format(unlike[0]))
    blocks = tuple(_bound_block(own, x) for own, x in zip(whole.blocks, stream.blocks, strict=False))
    found = replace(stream, embed=as_recorded(whole.embed, stream.embed), blocks=blocks, rotary=whole.rotary)
    try:
        tried = dict(zip(names, (made for _, made in found.tried(adapter.embed_dim)), strict=False))
    except RuntimeError:  # of products whose sides do not fit
        raise InputError(_OTHER.format(names[0])) from None
    for name, (_, heads, _, d) in queries.items():
        if tried[name][0].shape != (1, heads, 1, d):
            raise InputError(_OTHER.format(name))
    for block in blocks:
        pairs = zip(block.made or (), tried[block.name], strict=False)
        if any(then.shape != now.shape for then, now in pairs):
            raise InputError(_OTHER.format(block.name))
    return found


def _bound_block(own: StreamBlock, block: StreamBlock) -> StreamBlock:
    if block.carry is not None and own.carry is None:
        raise InputError(_OTHER.format(block.name))
    carry = None if block.carry is None or own.carry is None else as_recorded(own.carry, block.carry)
    return replace(block, to_keys=as_recorded(own.to_keys, block.to_keys), carry=carry)
