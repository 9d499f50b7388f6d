"""ConceptAttention's maps: what pixels and concepts read in joint attention, compared (arXiv 2502.04320).

Concepts are carried along the text stream (text_stream.py): each reads the image and the other concepts, and neither
the image nor the prompt reads them. What a token or a pixel reads, before the output projection, is its output.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ovam_core.attention.heatmap import check_embedding, check_finite, check_weights, resize, summed
from ovam_core.attention.recording import Recording
from ovam_core.attention.rows import common, rows_of
from ovam_core.errors import InputError

NOT_RECORDED = (
    "What the pixels read in joint attention was not recorded with this picture: make it again with this method chosen "
    'from the start, in Python with keep=["outputs"], or choose another method.'
)


@torch.no_grad()
def concept_maps(recording: Recording, concepts: Tensor, temperature: float = 1.0) -> Tensor:
    """The share of each concept at each pixel: the mean over blocks and steps of softmax over concepts of `<o_x, o_c>`,
    o the attention's outputs of a pixel and of a concept, all heads together.

    concepts: `[C, embed_dim]`, a row each. temperature: divides the products. Returns float32 `[C, recording.height,
    recording.width]`, one in sum over concepts. Raises InputError for a recording without outputs, for less than two
    concepts, for rows of another width and as `heatmap.heatmaps` does.
    """
    if not recording.outputs or recording.stream is None:
        raise InputError(NOT_RECORDED)
    check_embedding(concepts, recording.embed_dim)
    if len(concepts) < 2:
        raise InputError("ConceptAttention compares concepts at each pixel: give two or more.")
    check_weights(recording)
    layers = recording.outputs
    device = layers[0].outputs.device
    read = recording.stream.outputs(concepts.to(device), [layer.name for layer in layers])
    maps, count = [], 0
    for layer, (steps, tokens) in zip(layers, read, strict=True):
        own = recording.step_indices if layer.steps is None else layer.steps
        both = common(own, set(steps))
        pixels = rows_of(layer.outputs, own, both)
        tokens = rows_of(tokens, steps, both)
        shares = summed(_shares(one, other, temperature) for one, other in zip(pixels, tokens, strict=True))
        maps.append(resize(shares.unflatten(1, (layer.height, layer.width)), (recording.height, recording.width)))
        count += len(both)
    found = summed(maps) / count
    check_finite(found)
    return found


def _shares(pixels: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """`[n, d]` and `[C, d]` to float32 `[C, n]`."""
    return (tokens.to(pixels.device).float() @ pixels.float().mT / temperature).softmax(dim=0)
