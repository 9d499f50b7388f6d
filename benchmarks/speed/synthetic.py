"""Recordings of SD 1.5's shapes, with no model: smooth fields mixed into the queries of each layer, and noise."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from benchmarks.speed.common import Bench
from ovam_core.attention.recording import LayerQueries, Recording, empty_queries

PIXELS = 8  # of the image to one of the latents
EMBED = 768


def synthetic_recording(bench: Bench, steps: int, side: int) -> tuple[Recording, np.ndarray]:
    """A recording of SD 1.5's shapes, and an object in its image: labels uint8 `[side, side]`, pixels.

    Five layers of 8 heads at each of 1/8, 1/16 and 1/32 of the side, as in its down and up blocks. All of them see the
    same smooth fields, mixed at random, under noise of their own; the object is where the first field is high.
    """
    generator = torch.Generator(bench.device).manual_seed(0)
    draw = partial(torch.randn, generator=generator, device=bench.device)
    fields, finest, heads = draw(1, 12, 6, 6), side // PIXELS, 8
    layers = []
    for factor, d in ((1, 40), (2, 80), (4, 160)):
        grid = finest // factor
        pixels = rearrange(F.interpolate(fields, size=(grid, grid), mode="bicubic"), "1 f h w -> 1 (h w) f")
        for number in range(5):
            mixed = rearrange(pixels @ draw(12, heads * d) / 4, "1 n (h d) -> h n d", h=heads)
            queries = empty_queries((steps, heads, grid * grid, d), device=bench.device, dtype=bench.dtype)
            for step in range(steps):
                queries[step] = mixed + draw(heads, grid * grid, d)
            keys = torch.nn.Linear(EMBED, heads * d, bias=False, device=bench.device, dtype=bench.dtype)
            keys.weight.data.copy_(draw(keys.weight.shape) / EMBED**0.5)
            layers.append(LayerQueries(f"grid {grid}, layer {number}", grid, grid, queries, keys, d**-0.5))
    numbers = tuple(range(steps))
    recording = Recording(tuple(layers), (), numbers, numbers, finest, finest, (side, side), EMBED, "conditional")
    high = F.interpolate(fields[:, :1], size=(side, side), mode="bicubic")[0, 0]
    return recording, (high > 0.5).to(torch.uint8).cpu().numpy()


def random_embedding(bench: Bench, tokens: int) -> Tensor:
    """An attribution prompt's embedding `[tokens, 768]`, noise."""
    return torch.randn(tokens, EMBED, generator=torch.Generator().manual_seed(1)).to(bench.device)
