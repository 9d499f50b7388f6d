"""Row 2: heatmaps against a loop over layers, steps and heads that resizes each map, as in the published code."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from benchmarks.speed.common import Bench, Line, assert_same, megabytes, race, ratio_line
from benchmarks.speed.published import as_published
from benchmarks.speed.synthetic import random_embedding, synthetic_recording
from ovam_core.attention.heatmap import heatmaps
from ovam_core.attention.recording import Recording

TOKENS = (3, 8, 77)  # <SoT> word <EoT>; a sentence; a padded prompt


@torch.no_grad()
def heatmap(bench: Bench) -> list[Line]:
    """The floor is made of the bandwidth of a large copy, which reads and writes its bytes."""
    steps = bench.sizes.heatmap_steps
    recording, _ = synthetic_recording(bench, steps, bench.sizes.side)
    plain = as_published(recording)
    large = torch.zeros(1 << 28 if bench.on_gpu else 1 << 26, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(large)
    lines = []
    for tokens in TOKENS:
        embedding = random_embedding(bench, tokens)
        assert_same(heatmaps(recording, embedding), plain_heatmaps(plain, embedding), rtol=0, atol=1e-5)
        sides = {
            "plain loop": partial(plain_heatmaps, plain, embedding),
            "heatmaps": partial(heatmaps, recording, embedding),
            "copy": partial(target.copy_, large),
        }
        times = race(bench, sides, bench.sizes.rounds)
        floor = "reading the queries once"
        times[floor] = [recording.nbytes * copy / (2 * large.nbytes) for copy in times["copy"]]
        what = f"{tokens} tokens, {steps} steps of SD 1.5, {recording.layers[0].queries.dtype}"
        kept = f"{megabytes(recording.nbytes)} of queries"
        over_loop, over_floor = "30" if bench.on_gpu else "2", "3" if bench.on_gpu and tokens == 8 else ""
        lines += [
            ratio_line(bench, 2, what, times, "plain loop", "heatmaps", over_loop, kept),
            ratio_line(bench, 2, what, times, "heatmaps", floor, over_floor),
        ]
    return lines


def plain_heatmaps(recording: Recording, embedding: Tensor) -> Tensor:
    """Eq. 5 as published, differentiable: a softmax, a resize, a sum a layer, step and head. `[L, H, W]`."""
    total, count = torch.zeros((), device=embedding.device), 0
    for layer in recording.layers:
        weight = layer.keys.weight.detach()
        keys = F.linear(embedding.to(weight.dtype), weight).float()
        for step in layer.queries:
            for query, key in zip(step, rearrange(keys, "l (h d) -> h l d", h=len(step)), strict=True):
                attention = torch.softmax(query.float() @ key.T * layer.scale, dim=-1)
                maps = rearrange(attention, "(h w) l -> 1 l h w", h=layer.height)
                size = (recording.height, recording.width)
                total = total + F.interpolate(maps, size=size, mode="bilinear", align_corners=False)[0]
                count += 1
    return total / count
