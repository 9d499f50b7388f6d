"""A heatmap taken apart: Eq. 5's sum by denoising step, grid, layer or head, in one pass over the recording."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from ovam_core.attention.heatmap import (
    AttributionPrompt,
    check_embedding,
    check_finite,
    check_weights,
    compute_device,
    keys_of,
    probabilities,
    resize,
)
from ovam_core.attention.reading import check_reading
from ovam_core.attention.recording import LayerQueries, Recording
from ovam_core.errors import InputError

Over = Literal["steps", "grids", "layers", "heads"]
Place = int | str  # number of a step or a head, larger side of a grid, name of a layer

BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.attentions\.(\d+)(?:\.transformer_blocks\.(\d+))?\.attn2")
MID = re.compile(r"mid_block\.attentions\.(\d+)(?:\.transformer_blocks\.(\d+))?\.attn2")
TRANSFORMER = re.compile(r"(?:transformer_)?blocks\.(\d+)\.attn2?")


@dataclass(frozen=True, eq=False)
class Evolution:
    """The heatmap of one word, a frame for each of what it is taken apart over.

    places: what each frame is of: the number of a denoising step or of a head, from 0, the larger side of a grid, the
    name of a layer. labels: the same for people. maps: float32 `[N, h, w]` in [0, 1] at the size of the recording's
    heatmaps, each the mean of its attention maps. weights: float64 `[N]`, one in sum, each frame's share of the
    attention maps that the word's heatmap is the mean of; 0 for frames that are not part of it (steps that the model's
    defaults leave out, say).
    """

    over: Over
    places: tuple[Place, ...]
    labels: tuple[str, ...]
    maps: np.ndarray
    weights: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """The word's heatmap (Eq. 5), float32 `[h, w]`: the frames' mean by their weights."""
        return np.tensordot(self.weights, self.maps, axes=1).astype(np.float32)


def check_over(over: object) -> None:
    """Raises InputError for what no heatmap is taken apart over."""
    if over not in get_args(Over):
        raise InputError(f"A heatmap is not taken apart over {str(over)[:40]!r}: choose {', '.join(get_args(Over))}.")


@torch.no_grad()
def evolutions(
    recording: Recording, prompts: Sequence[AttributionPrompt], over: Over, used: Recording | None = None
) -> list[Evolution]:
    """One Evolution a label, the labels of all prompts in their order.

    The frames are of what `recording` holds. used: the part of it that the heatmap is the mean of; None for all. Steps
    at which a cache skipped every layer have no frame. Each block of attention is made once and summed at once: held
    are the frames alone. Raises InputError as `attribute` does, for another `over`, and over heads where layers differ
    in their number.
    """
    check_over(over)
    if over == "heads" and len(numbers := {layer.queries.shape[1] for layer in recording.layers}) > 1:
        listed = ", ".join(map(str, sorted(numbers)))
        raise InputError(f"These layers have {listed} heads, of which none is another's: choose one grid or one layer.")
    check_reading(recording.reading, [x.reading for x in prompts])
    for prompt in prompts:
        check_embedding(prompt.embedding, recording.embed_dim)
    counts = frames_of(recording, over)
    counted = frames_of(used or recording, over)
    shares = np.array([counted.get(place, 0) for place in counts], dtype=np.float64)
    maps = _means(recording, prompts, over, counts)
    check_weights(recording)
    check_finite(maps)
    labels = tuple(labels_of(recording, over, tuple(counts)))
    return [Evolution(over, tuple(counts), labels, one, shares / shares.sum()) for one in maps.cpu().numpy()]


def of_as_many_heads(recording: Recording) -> Recording:
    """The recording, or that of its finest grid where its layers differ in their number of heads."""
    numbers = {layer.queries.shape[1] for layer in recording.layers}
    return recording if len(numbers) == 1 else recording.select(resolutions=recording.resolutions[:1])


def frames_of(recording: Recording, over: Over) -> dict[Place, int]:
    """The frames, in the order of the run and of its layers, with the number of attention maps in each."""
    counts: dict[Place, int] = dict.fromkeys(recording.step_indices, 0) if over == "steps" else {}
    for layer in recording.layers:
        steps, heads = layer.queries.shape[:2]
        places = _places(recording, layer, over)
        for place in places:
            counts[place] = counts.get(place, 0) + steps * heads // len(places)
    if over == "grids":
        counts = dict(sorted(counts.items(), reverse=True))
    return {place: count for place, count in counts.items() if count}


def _places(recording: Recording, layer: LayerQueries, over: Over) -> Sequence[Place]:
    """The frames that a layer's maps go to: one a row of its steps, one a head, or one for all."""
    if over == "steps":
        return recording.step_indices if layer.steps is None else layer.steps
    if over == "heads":
        return range(layer.queries.shape[1])
    return [layer.resolution if over == "grids" else layer.name]


def _means(recording: Recording, prompts: Sequence[AttributionPrompt], over: Over, counts: dict[Place, int]) -> Tensor:
    """float32 `[labels, N, height, width]`."""
    device = compute_device(recording, prompts[0].embedding)
    sizes = [len(prompt.embedding) for prompt in prompts]
    stacked = torch.cat([prompt.embedding.to(device) for prompt in prompts])
    labels, number = sum(len(prompt.labels) for prompt in prompts), {place: n for n, place in enumerate(counts)}
    grids: dict[tuple[int, int], Tensor] = {}  # sums over what is not kept apart, [labels, N, n]
    with torch.autocast(device.type, enabled=False):
        for layer, keys in zip(recording.layers, keys_of(recording, stacked, sizes), strict=True):
            grid = layer.height, layer.width
            sums = grids.setdefault(grid, torch.zeros(labels, len(counts), grid[0] * grid[1], device=device))
            rows = torch.tensor([number[place] for place in _places(recording, layer, over)], device=device)
            for pixels, at, block in probabilities(layer, keys, sizes):
                means = _label_means(prompts, sizes, block)
                if over == "steps":
                    sums[:, rows[at], pixels] += means.sum(dim=2)
                elif over == "heads":
                    sums[:, rows, pixels] += means.sum(dim=1)
                else:
                    sums[:, rows, pixels] += means.sum(dim=(1, 2))[:, None]
    size, total = (recording.height, recording.width), torch.zeros(labels, len(counts), 1, 1, device=device)
    for (height, _), sums in grids.items():  # resizing is linear: once a grid
        total = total + resize(rearrange(sums, "l f (h w) -> l f h w", h=height).flatten(0, 1), size).unflatten(
            0, (labels, len(counts))
        )
    return total / torch.tensor(list(counts.values()), device=device)[:, None, None]


def _label_means(prompts: Sequence[AttributionPrompt], sizes: list[int], block: Tensor) -> Tensor:
    """Probabilities `[t, heads, sum(sizes), pixels]` to the mean over each label's tokens, `[labels, t, heads, n]`."""
    split = rearrange(block, "t h l n -> l t h n").split(sizes)
    return torch.stack([mean for prompt, maps in zip(prompts, split, strict=True) for mean in prompt.means(maps)])


# ------------------------------------------------------------------------------------------------ labels


def labels_of(recording: Recording, over: Over, places: Sequence[Place]) -> list[str]:
    """The frames' names for people: "step 3, t 881", "16x16" (width and height), "up 2.1 (16x16)", "head 0"."""
    if over == "steps":
        timesteps = dict(zip(recording.step_indices, recording.timesteps, strict=True))
        return [f"step {place}, t {timesteps[int(place)]}" for place in places]
    if over == "heads":
        return [f"head {place}" for place in places]
    if over == "grids":
        sizes = {layer.resolution: f"{layer.width}x{layer.height}" for layer in recording.layers}
        return [sizes[int(place)] for place in places]
    layers = {layer.name: layer for layer in recording.layers}
    short = [short_name(str(place)) for place in places]
    names = short if len(set(short)) == len(short) else [str(place) for place in places]
    return [
        f"{name} ({layers[str(place)].width}x{layers[str(place)].height})"
        for name, place in zip(names, places, strict=True)
    ]


def short_name(name: str) -> str:
    """A layer's name as people read it: block, attention in it, and transformer in that if there are several.

    "up_blocks.2.attentions.1.transformer_blocks.0.attn2" is "up 2.1", its next "up 2.1.1"; "transformer_blocks.7.attn"
    is "block 7". Other names stay.
    """
    if found := BLOCK.fullmatch(name):
        way, *numbers = found.groups()
    elif found := MID.fullmatch(name):
        way, numbers = "mid", list(found.groups())
    elif found := TRANSFORMER.fullmatch(name):
        way, numbers = "block", list(found.groups())
    else:
        return name
    if way != "block" and numbers[-1] in (None, "0"):
        numbers = numbers[:-1]
    return f"{way} {'.'.join(numbers)}"
