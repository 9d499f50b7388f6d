"""Whether a word is in a picture at all: its attention against that of the picture's other words, under one softmax.

A word's own map says where it would be, and it has a peak whether the word is there or not. What tells the two apart is
what else a pixel could be: a dog's map is high on a cat, and a cat's is higher there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
from einops import rearrange
from torch import Tensor

from ovam_core.attention.heatmap import AttributionPrompt, compute_device, keys_of, probabilities, resize, summed
from ovam_core.attention.recording import Recording

STEPS = 0.1  # share of the steps that are looked at: those of the least noise, where the picture is settled
TOP = 0.1  # share of the map's cells whose mean is the score: an object's, not a pixel's
TINY = torch.finfo(torch.float32).tiny


@torch.no_grad()
def joint_maps(
    recording: Recording,
    prompts: Sequence[AttributionPrompt],
    rivals: Sequence[AttributionPrompt],
    compared: Tensor,
) -> Tensor:
    """The map of each label against rivals: float32 `[labels, recording.height, recording.width]` in [0, 1].

    At a pixel, head, layer and step a label has `e / (e + s + sum of r)`: e the exponential of its product of query and
    key (its tokens' mean), r the same of each rival it is compared with, s that of the rivals' first special token
    (`<SoT>`, T5: `</s>`). The map is the mean over steps, layers and heads, bilinear where grids differ.
    prompts, rivals: what has labels, and what they are compared with. compared: bool `[labels, rivals]`.
    """
    every = [*prompts, *rivals]
    sizes = [len(one.embedding) for one in every]
    device = compute_device(recording, every[0].embedding)
    stacked = torch.cat([one.embedding.to(device) for one in every])
    rows, means = _means(every, len(prompts))
    own, others = means[: len(compared)].to(device), means[len(compared) :].to(device)
    rest = compared.to(device, torch.float32) @ others
    rest[:, 0] += 1  # the special token
    grids: dict[tuple[int, int], Tensor] = {}
    with torch.autocast(device.type, enabled=False):
        for layer, keys in zip(recording.layers, keys_of(recording, stacked, sizes), strict=True):
            maps = torch.zeros(len(own), layer.height * layer.width, device=device)
            # One softmax over all that is compared with anything; a ratio of its shares is one over fewer.
            for pixels, _, block in probabilities(layer, keys[..., rows, :], [len(rows)]):
                shares = own @ block
                maps[:, pixels] += (shares / (shares + rest @ block).clamp_min(TINY)).sum(dim=(0, 1))
            grid = layer.height, layer.width
            maps = rearrange(maps, "l (h w) -> l h w", h=layer.height)
            grids[grid] = grids[grid] + maps if grid in grids else maps
    total = summed(resize(maps, (recording.height, recording.width)) for maps in grids.values())
    return total / sum(layer.queries.shape[0] * layer.queries.shape[1] for layer in recording.layers)


def raw_presence(
    recording: Recording,
    prompts: Sequence[AttributionPrompt],
    rivals: Sequence[AttributionPrompt],
    compared: Tensor,
) -> list[float]:
    """The score of each label, 0 to 1: the mean of the largest tenth of its joint map at the steps of least noise."""
    maps = joint_maps(settled(recording), prompts, rivals, compared).flatten(1)
    return maps.topk(max(1, round(TOP * maps.shape[1])), dim=1).values.mean(dim=1).tolist()


def calibrated(raw: float, slope: float, offset: float) -> float:
    """`sigmoid(slope * log(raw / (1 - raw)) + offset)`: a half where present and absent are as likely."""
    raw = min(max(raw, 1e-6), 1 - 1e-6)
    return 1 / (1 + math.exp(-slope * math.log(raw / (1 - raw)) - offset))


def settled(recording: Recording) -> Recording:
    """The recording with its tenth of the steps of the least noise, one at least; of those at which every layer was
    recorded, where a cache skipped some.
    """
    steps = set(recording.step_indices)
    for layer in recording.layers:
        steps &= steps if layer.steps is None else set(layer.steps)
    times = dict(zip(recording.step_indices, recording.timesteps, strict=True))
    if not steps:
        return recording
    chosen = sorted(steps, key=lambda step: (times[step], -step))
    return recording.select(steps=chosen[: math.ceil(STEPS * len(chosen))])


def _means(prompts: Sequence[AttributionPrompt], asked: int) -> tuple[list[int], Tensor]:
    """Which rows of all prompts, one after the other, are compared: a special token's, then the labels' own. And
    float32 `[labels, rows]`: what each counts for in a label.

    asked: how many prompts are no rivals. The special token is the first of the rivals', so that no score depends on
    what is asked beside it; else of what is asked; else, where every row is a label's, the first row.
    """
    firsts = list(accumulate((len(one.embedding) for one in prompts), initial=0))
    groups = [
        [first + row for row in group] for first, one in zip(firsts, prompts, strict=False) for group in one.groups
    ]
    named = {row for group in groups for row in group}
    rivals_first = [*range(firsts[asked], firsts[-1]), *range(firsts[asked])]
    rows = [next((row for row in rivals_first if row not in named), 0), *sorted(named)]
    means = torch.zeros(len(groups), len(rows))
    shares = [
        shares for one in prompts for shares in one.shares or [[1 / len(group)] * len(group) for group in one.groups]
    ]
    for label, (group, parts) in enumerate(zip(groups, shares, strict=True)):
        means[label, [rows.index(row, 1) for row in group]] = torch.tensor(parts, dtype=torch.float32)
    return rows, means
