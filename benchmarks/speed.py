"""Speed, as ratios: `python -m benchmarks.speed [--device cuda|cpu] [--smoke] [--rows N ...] [--out DIR]`.

One Markdown table, and JSON beside it. Every ratio is measured side by side in one run: its two sides
alternate, the median of several rounds stands in the table with the lowest and the highest. Seconds are
given on a GPU alone; on a CPU, which others use as well, only ratios mean something. What both sides compute
is compared before it is timed.

1 Recording       `pipe(...)` under the recorder over plain `pipe(...)`: the embedded model, and the UNets of
                  SD 1.5 and (CUDA) SDXL from their published configurations with random weights. Text
                  encoder and VAE are left out of those two, which makes the ratio the stricter one. Memory:
                  the peak above what rests in memory before the call.
2 Heatmap         against a loop over layers, steps and heads that resizes each map, as in the published code.
3 Token           the same loop with autograd against `optimize`, an epoch and to the same loss.
4 Self-attention  column sums against materialised attention, and other ways to get them without it.
5 App             from the start of the server to the first page; from a changed word to new pictures.
6 Growth          with tokens, steps, image side and batch.

Rows 2, 3 and 6 ask synthetic recordings of SD 1.5's shapes: smooth fields mixed into the queries of each
layer, and noise. A CPU gets fewer steps, and float32 queries, as it would keep them; CUDA gets 30 steps in
float16.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
import math
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # run as a file, not with -m, its own folder stands there

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ovam_core.attention.heatmap import heatmaps
from ovam_core.attention.recording import LayerQueries, Recording
from ovam_core.attention.self_attention import column_sums
from ovam_core.hooks.recorder import record
from ovam_core.models.load import load_pipeline
from ovam_core.models.presets import EMBEDDED
from ovam_core.optimization import EDGE, RECIPES, Epoch, Optimized, OptimizeSettings, optimize

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "A photograph of a cat and a car on grass"
TOKENS = (3, 8, 77)  # <SoT> word <EoT>; a sentence; a padded prompt
PIXELS = 8  # of the image to one of the latents
EMBED = 768

# The published unet/config.json of the two models, where they differ from diffusers' defaults.
SD15 = {"sample_size": 64, "cross_attention_dim": EMBED, "attention_head_dim": 8}
SDXL = {
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@dataclass(frozen=True)
class Sizes:
    """How much is measured, so that the whole takes some minutes.

    rounds: of each comparison; few_rounds: of those that take long. *_steps: denoising steps, 0 leaves the
    row out. *side: pixels of the image. narrow: divides the UNets' channels. grids: of self-attentions,
    (name, side of the grid, heads, d).
    """

    rounds: int
    few_rounds: int
    embedded_steps: int
    sd15_steps: int
    sd15_side: int
    sdxl_steps: int
    sdxl_side: int
    narrow: int
    side: int
    heatmap_steps: int
    token_steps: int
    plain_epochs: int
    paper_epochs: int
    grids: tuple[tuple[str, int, int, int], ...]
    growth_tokens: tuple[int, ...]
    growth_steps: tuple[int, ...]
    growth_sides: tuple[int, ...]
    growth_images: tuple[int, ...]


SDXL_64 = ("SDXL at 1024 px, 64 x 64", 64, 10, 64)
CUDA = Sizes(
    rounds=7,
    few_rounds=3,
    embedded_steps=25,
    sd15_steps=30,
    sd15_side=512,
    sdxl_steps=15,
    sdxl_side=1024,
    narrow=1,
    side=512,
    heatmap_steps=30,
    token_steps=30,
    plain_epochs=2,
    paper_epochs=500,
    grids=(("SD 1.5 at 512 px, 64 x 64", 64, 8, 40), SDXL_64, ("SDXL at 2048 px, 128 x 128", 128, 10, 64)),
    growth_tokens=(2, 8, 32, 77),
    growth_steps=(10, 30, 60),
    growth_sides=(256, 512, 1024),
    growth_images=(1, 2, 4),
)
CPU = replace(
    CUDA,
    rounds=5,
    embedded_steps=10,
    sd15_steps=1,
    sdxl_steps=0,
    heatmap_steps=3,
    token_steps=2,
    plain_epochs=2,
    grids=(
        ("SD 1.5 at 512 px, 64 x 64", 64, 8, 40),
        SDXL_64,
        ("SDXL at 2048 px, 128 x 128, 1 head of 10", 128, 1, 64),
    ),
    growth_steps=(1, 2, 4),
    growth_sides=(256, 512, 768),
)
SMOKE = Sizes(
    rounds=2,
    few_rounds=1,
    embedded_steps=1,
    sd15_steps=1,
    sd15_side=64,
    sdxl_steps=1,
    sdxl_side=64,
    narrow=10,
    side=64,
    heatmap_steps=2,
    token_steps=1,
    plain_epochs=2,
    paper_epochs=4,
    grids=(("8 x 8", 8, 2, 40),),
    growth_tokens=(2, 3),
    growth_steps=(1, 2),
    growth_sides=(64, 128),
    growth_images=(1, 2),
)


@dataclass(frozen=True)
class Bench:
    """Where and how much. dtype: of models and queries, float16 on CUDA and float32 elsewhere."""

    device: torch.device
    sizes: Sizes

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return torch.float16 if self.on_gpu else torch.float32

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True)
class Line:
    """A line of the table. ratio: what over what; values: one a round; seconds: by side, on a GPU."""

    row: int
    what: str
    ratio: str
    values: list[float]
    target: str = ""
    note: str = ""
    seconds: dict[str, float] = field(default_factory=dict)


class NotHere(Exception):
    """This device cannot show the row; the message says why."""


# ------------------------------------------------------------ how it is measured


Times = dict[str, list[float]]


def race(bench: Bench, ways: dict[str, Callable[[], Any]], rounds: int, least: float = 0.1) -> Times:
    """Seconds a call of each way, round by round, taking turns. Each must have run once: that sets up.

    Short calls are repeated for about `least` seconds a round; 0 for ways that take long, once a round.
    """
    calls = dict.fromkeys(ways, 1)
    if least:
        calls = {name: max(1, min(100, math.ceil(least / _seconds(bench, way, 1)))) for name, way in ways.items()}
    times: Times = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            times[name].append(_seconds(bench, way, calls[name]))
    return times


def _seconds(bench: Bench, way: Callable[[], Any], calls: int) -> float:
    bench.wait()
    begun = time.perf_counter()
    for _ in range(calls):
        way()
        bench.wait()
    return (time.perf_counter() - begun) / calls


def over(times: Times, one: str, other: str) -> list[float]:
    """The ratio of every round."""
    return [a / b for a, b in zip(times[one], times[other], strict=True)]


def compared(
    bench: Bench, row: int, what: str, times: Times, one: str, other: str, target: str = "", note: str = ""
) -> Line:
    """The line of `one` over `other`, with the medians of their seconds on a GPU."""
    seconds = {side: statistics.median(times[side]) for side in (one, other)} if bench.on_gpu else {}
    return Line(row, what, f"time, {one} / {other}", over(times, one, other), target, note, seconds)


def peak_bytes(bench: Bench, way: Callable[[], Any]) -> float:
    """The most memory that `way` had at once, above what was in use before; NaN where it is not known.

    On CUDA what tensors hold; on a CPU the process's resident memory, exact to some megabytes.
    """
    gc.collect()
    if bench.on_gpu:
        before = torch.cuda.memory_allocated(bench.device)
        torch.cuda.reset_peak_memory_stats(bench.device)
        way()
        bench.wait()
        return torch.cuda.max_memory_allocated(bench.device) - before
    if not Path("/proc/self/clear_refs").exists():
        way()
        return math.nan
    ctypes.CDLL(None).malloc_trim(0)  # else freed memory that the process still holds is taken again unseen
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back
    before = _status("VmRSS")
    way()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def megabytes(count: float) -> str:
    return "unknown" if math.isnan(count) else f"{count / 1e6:.0f} MB" if abs(count) < 1e9 else f"{count / 1e9:.1f} GB"


def same(one: Any, other: Any, **tolerance: float) -> None:
    torch.testing.assert_close(one, other, equal_nan=True, **(tolerance or {"rtol": 0, "atol": 0}))


# ------------------------------------------------------------ 1: recording


def embedded_call(pipe: Any, steps: int, images: int = 1) -> Tensor:
    """Images `[images, 3, H, W]` of the embedded model."""
    generator = torch.Generator().manual_seed(0)
    return pipe(
        PROMPT, num_inference_steps=steps, generator=generator, num_images_per_prompt=images, output_type="pt"
    ).images


def unet_pipeline(bench: Bench, kind: str, config: dict) -> Any:
    """A diffusers pipeline of one UNet with random weights; it takes embeddings and gives latents."""
    import diffusers

    channels = config.get("block_out_channels", (320, 640, 1280, 1280))
    config = config | {"block_out_channels": tuple(x // bench.sizes.narrow for x in channels)}
    torch.manual_seed(0)
    with bench.device:
        unet = diffusers.UNet2DConditionModel(**config)
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    if kind == "StableDiffusionXLPipeline":
        parts |= dict.fromkeys(("text_encoder_2", "tokenizer_2"))
    else:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    scheduler = diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)
    torch.nn.Module.to(unet, bench.dtype)  # diffusers' own warns of what does not concern this
    pipe = getattr(diffusers, kind)(unet=unet.eval(), scheduler=scheduler, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def unet_call(bench: Bench, pipe: Any, steps: int, side: int) -> Tensor:
    """Latents of a guided run."""
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator)
    width = pipe.unet.config.cross_attention_dim
    given = {"prompt_embeds": draw(1, 77, width), "negative_prompt_embeds": draw(1, 77, width)}
    if pipe.unet.config.addition_embed_type == "text_time":
        given |= {"pooled_prompt_embeds": draw(1, 1280), "negative_pooled_prompt_embeds": draw(1, 1280)}
    given = {name: x.to(bench.device, bench.dtype) for name, x in given.items()}
    return pipe(
        **given, num_inference_steps=steps, height=side, width=side, generator=generator, output_type="latent"
    ).images


def recording_lines(bench: Bench, name: str, pipe: Any, call: Callable[[], Tensor], rounds: int) -> list[Line]:
    """Time and memory of a run that is recorded over those of the same run alone."""

    def recorded(self_attention: bool) -> tuple[Tensor, list[Recording]]:
        with record(pipe, self_attention=self_attention) as recorder:
            made = call()
        return made, recorder.recordings

    expected = call()
    for self_attention in (False, True):
        made, recordings = recorded(self_attention)
        same(made, expected)
    queries = sum(x.queries.nbytes for one in recordings for x in one.layers)
    del made, recordings, expected
    ways = {
        "plain": call,
        "recorded": partial(recorded, False),
        "recorded with self-attention": partial(recorded, True),
    }
    times = race(bench, ways, rounds, least=0)
    peaks = {side: peak_bytes(bench, way) for side, way in ways.items()}
    targets = {"recorded": "1.03" if bench.on_gpu else "1.05", "recorded with self-attention": "1.15"}
    lines = []
    for side, target in targets.items():
        more, plain = megabytes(peaks[side] - peaks["plain"]), megabytes(peaks["plain"])
        note = f"peak memory {more} over plain's {plain}; the queries kept are {megabytes(queries)}"
        lines.append(compared(bench, 1, name, times, side, "plain", target, note))
    return lines


def recording_embedded(bench: Bench) -> list[Line]:
    pipe, steps = load_pipeline(EMBEDDED, str(bench.device)), bench.sizes.embedded_steps
    name = f"{EMBEDDED}, {steps} steps of 128 px"
    return recording_lines(bench, name, pipe, lambda: embedded_call(pipe, steps), bench.sizes.rounds)


def recording_sd15(bench: Bench) -> list[Line]:
    steps, side = bench.sizes.sd15_steps, bench.sizes.sd15_side
    pipe = unet_pipeline(bench, "StableDiffusionPipeline", SD15)
    name = f"SD 1.5's UNet, {steps} steps of {side} px"
    return recording_lines(bench, name, pipe, lambda: unet_call(bench, pipe, steps, side), bench.sizes.few_rounds)


def recording_sdxl(bench: Bench) -> list[Line]:
    steps, side = bench.sizes.sdxl_steps, bench.sizes.sdxl_side
    if not steps:
        raise NotHere("SDXL's UNet has 2.6 billion parameters: a step at 1024 px takes minutes without CUDA.")
    pipe = unet_pipeline(bench, "StableDiffusionXLPipeline", SDXL)
    name = f"SDXL's UNet, {steps} steps of {side} px"
    return recording_lines(bench, name, pipe, lambda: unet_call(bench, pipe, steps, side), bench.sizes.few_rounds)


# ------------------------------------------------------------ 2: heatmap


def synthetic(bench: Bench, steps: int, side: int) -> tuple[Recording, np.ndarray]:
    """A recording of SD 1.5's shapes, and an object in its image: labels uint8 `[side, side]`, pixels.

    Five layers of 8 heads at each of 1/8, 1/16 and 1/32 of the side, as in its down and up blocks. All of
    them see the same smooth fields, mixed at random, under noise of their own; the object is where the first
    field is high.
    """
    random = torch.Generator(bench.device).manual_seed(0)
    draw = partial(torch.randn, generator=random, device=bench.device)
    fields, finest, heads = draw(1, 12, 6, 6), side // PIXELS, 8
    layers = []
    for factor, d in ((1, 40), (2, 80), (4, 160)):
        grid = finest // factor
        seen = rearrange(F.interpolate(fields, size=(grid, grid), mode="bicubic"), "one f h w -> one (h w) f")
        for number in range(5):
            mixed = rearrange(seen @ draw(12, heads * d) / 4, "one n (h d) -> one h n d", h=heads)
            queries = torch.empty(steps, heads, grid * grid, d, device=bench.device, dtype=bench.dtype)
            for step in range(steps):
                queries[step] = (mixed + draw(heads, grid * grid, d))[0]
            keys = torch.nn.Linear(EMBED, heads * d, bias=False, device=bench.device, dtype=bench.dtype)
            keys.weight.data.copy_(draw(keys.weight.shape) / EMBED**0.5)
            layers.append(LayerQueries(f"grid {grid}, layer {number}", grid, grid, queries, keys, d**-0.5))
    recording = Recording(
        tuple(layers),
        (),
        tuple(range(steps)),
        tuple(range(steps)),
        finest,
        finest,
        (side, side),
        EMBED,
        "conditional",
    )
    high = F.interpolate(fields[:, :1], size=(side, side), mode="bicubic")[0, 0]
    return recording, (high > 0.5).to(torch.uint8).cpu().numpy()


def embedding(bench: Bench, tokens: int) -> Tensor:
    return torch.randn(tokens, EMBED, generator=torch.Generator().manual_seed(1)).to(bench.device)


def plain_heatmaps(recording: Recording, embedding: Tensor) -> Tensor:
    """Eq. 5 as published, differentiable: a softmax, a resize, a sum a layer, step and head. `[L, H, W]`."""
    total, count = 0, 0
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


@torch.no_grad()
def heatmap(bench: Bench) -> list[Line]:
    """The floor is made of the bandwidth of a large copy, which reads and writes its bytes."""
    steps = bench.sizes.heatmap_steps
    recording, _ = synthetic(bench, steps, bench.sizes.side)
    large = torch.zeros(1 << 28 if bench.on_gpu else 1 << 26, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(large)
    lines = []
    for tokens in TOKENS:
        asked = embedding(bench, tokens)
        same(heatmaps(recording, asked), plain_heatmaps(recording, asked), rtol=0, atol=1e-5)
        ways = {
            "plain loop": partial(plain_heatmaps, recording, asked),
            "heatmaps": partial(heatmaps, recording, asked),
            "copy": partial(target.copy_, large),
        }
        times = race(bench, ways, bench.sizes.rounds)
        floor = "reading the queries once"
        times[floor] = [recording.nbytes * copy / (2 * large.nbytes) for copy in times["copy"]]
        what = f"{tokens} tokens, {steps} steps of SD 1.5, {recording.layers[0].queries.dtype}"
        kept = f"{megabytes(recording.nbytes)} of queries"
        aims = "30" if bench.on_gpu else "2", "3" if bench.on_gpu and tokens == 8 else ""
        lines += [
            compared(bench, 2, what, times, "plain loop", "heatmaps", aims[0], kept),
            compared(bench, 2, what, times, "heatmaps", floor, aims[1]),
        ]
    return lines


# ------------------------------------------------------------ 3: token


def plain_losses(
    recording: Recording, labels: np.ndarray, start: Tensor, epochs: int, settings: OptimizeSettings
) -> list[float]:
    """Eqs. 6 and 7 by gradient descent over the plain loop, with autograd: the loss of every epoch."""
    x = start.clone().requires_grad_()
    rows = torch.arange(len(start), device=start.device)
    wanted = (torch.from_numpy(labels).to(start.device) == rows[:, None, None]).float()
    losses = []
    for epoch in range(epochs):
        maps = F.interpolate(plain_heatmaps(recording, x)[None], size=labels.shape, mode="bilinear")[0]
        pairs = zip(maps.clamp(EDGE, 1 - EDGE), wanted, strict=True)
        loss = sum(F.binary_cross_entropy(ours, theirs) for ours, theirs in pairs)
        (gradient,) = torch.autograd.grad(loss, x)
        x.data -= settings.rate * settings.decay ** (epoch // settings.decay_every) * gradient
        losses.append(float(loss.detach()))
    return losses


def token(bench: Bench) -> list[Line]:
    sizes = bench.sizes
    recording, labels = synthetic(bench, sizes.token_steps, sizes.side)
    start, epochs = embedding(bench, 2), sizes.plain_epochs
    few = replace(RECIPES["paper"], epochs=epochs)
    ours = partial(optimize, [recording], [labels], start, few)
    plain = partial(plain_losses, recording, labels, start, epochs, few)
    np.testing.assert_allclose(ours().losses, plain(), rtol=1e-3)

    times = race(bench, {"plain loop": plain, "optimize": ours}, sizes.few_rounds + 2)
    times = {side: [seconds / epochs for seconds in values] for side, values in times.items()}
    peaks = [megabytes(peak_bytes(bench, way)) for way in (plain, ours)]
    note, aim = (
        f"peak memory {peaks[0]} and {peaks[1]}; {epochs} epochs a round",
        "30" if bench.on_gpu else "2",
    )
    name = f"one image of {sizes.token_steps} steps of SD 1.5"
    lines = [compared(bench, 3, f"the paper's recipe, {name}: an epoch", times, "plain loop", "optimize", aim, note)]

    paper = optimize([recording], [labels], start, replace(RECIPES["paper"], epochs=sizes.paper_epochs))
    runs = [reaching(recording, labels, start, paper.loss) for _ in range(sizes.few_rounds)]
    plain_seconds = sizes.paper_epochs * statistics.median(times["plain loop"])
    scaled = f"the plain loop's time is {sizes.paper_epochs} times its epoch"
    what = f"the paper's recipe, {name}: {sizes.paper_epochs} epochs"
    whole = {"plain loop": [plain_seconds], "optimize": [paper.seconds]}
    lines.append(compared(bench, 3, what, whole, "plain loop", "optimize", aim, f"{scaled}; one run"))
    found = "reached" if runs[0].loss <= paper.loss else f"not reached, but {runs[0].loss:.4f},"
    note = f"{paper.loss:.4f} {found} after {runs[0].epochs} epochs; {scaled}"
    what = f"the default recipe, {name}: to the lowest loss of the paper's {sizes.paper_epochs} epochs"
    race_to = {"optimize": [run.seconds for run in runs], "plain loop": [plain_seconds] * len(runs)}
    lines.append(compared(bench, 3, what, race_to, "optimize", "plain loop", "0.1", note))
    return lines


def reaching(recording: Recording, labels: np.ndarray, start: Tensor, goal: float) -> Optimized:
    """The default recipe, ended when it is as good as `goal`."""
    lowest = [math.inf]

    def heard(epoch: Epoch) -> None:
        lowest.append(epoch.best_loss)

    return optimize([recording], [labels], start, RECIPES["fast"], heard, lambda: lowest[-1] <= goal)


# ------------------------------------------------------------ 4: self-attention


def materialised(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """The column sums of the whole `[heads, n, n]` attention."""
    products = query.float() @ rearrange(key.float(), "h n d -> h d n")
    return torch.softmax(products * scale, dim=-1).sum(dim=(0, 1))


def by_gradient(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """The gradient of the attention's summed output with respect to V: the fused kernel's own backward."""
    with torch.enable_grad():
        values = torch.zeros_like(key).requires_grad_()
        made = F.scaled_dot_product_attention(query[None], key[None], values[None], scale=scale)
        (gradient,) = torch.autograd.grad(made.sum(), values)
    return gradient[..., 0].float().sum(dim=0)


def by_two_passes(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Two forward passes of the fused kernel, of which only the logarithms of the sums are taken.

    The first gives each row's, l_i = log sum_j exp(s_ij). Then log sum_i exp(s_ij - l_i) is that of an
    attention in the other direction, with -l_i carried by two more columns: float16 holds it as a high and a
    low part.
    """
    rows = _log_sums(query, key, scale) / -scale
    high = rows.to(query.dtype)
    low = (rows - high.float()).to(query.dtype)
    ones = torch.ones_like(high)
    pad = query.new_zeros(*high.shape, 6)  # the kernel takes multiples of 8
    carrying = torch.cat([query, high[..., None], low[..., None], pad], dim=-1)
    asking = torch.cat([key, ones[..., None], ones[..., None], pad], dim=-1)
    return _log_sums(asking, carrying, scale).exp().sum(dim=0)


def _log_sums(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """log sum_j exp(scale * q_i . k_j), float32 `[heads, n]`."""
    name = "_scaled_dot_product_flash_attention" + ("" if query.is_cuda else "_for_cpu")
    kernel = getattr(torch.ops.aten, name)
    return kernel(query[None], key[None], key[None], scale=scale)[1][0].float()


@torch.no_grad()
def self_attention(bench: Bench) -> list[Line]:
    lines = []
    for name, side, heads, d in bench.sizes.grids:
        random = torch.Generator(bench.device).manual_seed(0)
        shape = (heads, side * side, d)
        draw = partial(torch.randn, shape, generator=random, device=bench.device)
        query, key = draw().to(bench.dtype), draw().to(bench.dtype)
        others = {"the gradient of V": by_gradient, "two fused passes": by_two_passes}
        functions = {"materialised": materialised, "column_sums": column_sums} | others
        ways = {label: partial(function, query, key, d**-0.5) for label, function in functions.items()}
        expected = ways["materialised"]()
        same(ways["column_sums"](), expected, rtol=1e-4, atol=1e-3)
        for other in others:
            same(ways[other](), expected, rtol=1e-2 if bench.on_gpu else 1e-4, atol=1e-3)
        times = race(bench, ways, bench.sizes.rounds)
        peaks = {label: megabytes(peak_bytes(bench, way)) for label, way in ways.items()}
        for one in ("materialised", *others):
            note = f"peak memory {peaks[one]} and {peaks['column_sums']}"
            what = f"{name}, {heads} heads of {d}"
            lines.append(compared(bench, 4, what, times, one, "column_sums", "", note))
    return lines


# ------------------------------------------------------------ 5: app


@contextmanager
def server(bench: Bench) -> Iterator[tuple[str, float]]:
    """`python app.py` on the embedded model: its address, and seconds from the start to the first page."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}/"
    begun = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "app.py"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=_environment(bench) | {"GRADIO_SERVER_PORT": str(port), "GRADIO_SERVER_NAME": "127.0.0.1"},
    ) as process:
        try:
            while True:
                try:
                    with urllib.request.urlopen(address, timeout=60) as answer:
                        answer.read()
                    break
                except OSError:
                    if process.poll() is not None or time.perf_counter() - begun > 300:
                        raise RuntimeError("app.py showed no page.") from None
                    time.sleep(0.02)
            yield address, time.perf_counter() - begun
        finally:
            process.terminate()


def _environment(bench: Bench) -> dict[str, str]:
    return os.environ | {"OVAM_MODEL": EMBEDDED, "OVAM_DEVICE": str(bench.device), "HF_HUB_OFFLINE": "1"}


def bare_start(bench: Bench) -> float:
    """Seconds that Python takes to import what the app stands on and to load the model."""
    code = "import gradio; from ovam_core.pipeline import load_pipeline; load_pipeline()"
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=_environment(bench), check=True)
    return time.perf_counter() - begun


def app_start(bench: Bench) -> list[Line]:
    bare_start(bench)  # the files come from the disk once
    times: Times = {"first page": [], "imports and model": []}
    for _ in range(bench.sizes.few_rounds):
        with server(bench) as (_, seconds):
            times["first page"].append(seconds)
        times["imports and model"].append(bare_start(bench))
    return [compared(bench, 5, f"app.py on {EMBEDDED}", times, "first page", "imports and model")]


def app_word(bench: Bench) -> list[Line]:
    from gradio_client import Client

    with server(bench) as (address, _):
        client = Client(address, verbose=False, download_files=False)
        seeds = iter(range(1000))
        words = map(", ".join, itertools.product(("cat", "dog", "bird", "boat"), ("car", "grass", "sky", "road")))

        def picture() -> Any:
            return client.predict(PROMPT, seed=next(seeds), steps=bench.sizes.embedded_steps, api_name="/generate")

        def changed() -> Any:
            return client.predict(next(words), api_name="/attribute")

        picture(), changed()
        times = race(bench, {"picture": picture, "changed words": changed}, bench.sizes.rounds, least=0)
    note = f"two words, over HTTP, with overlays and masks; {bench.sizes.embedded_steps} steps a picture"
    return [compared(bench, 5, f"app.py on {EMBEDDED}", times, "changed words", "picture", "", note)]


# ------------------------------------------------------------ 6: growth


def growth_lines(bench: Bench, what: str, ways: dict[int, Callable[[], Any]], unit: str) -> list[Line]:
    """Each size over the first one, all in one race."""
    for way in ways.values():
        way()
    times = race(bench, {f"{size} {unit}": way for size, way in ways.items()}, bench.sizes.rounds)
    first, *rest = ways
    lines = []
    for size in rest:
        note = f"{size / first:.3g} times the {unit}"
        lines.append(compared(bench, 6, what, times, f"{size} {unit}", f"{first} {unit}", "", note))
    return lines


@torch.no_grad()
def growth_tokens(bench: Bench) -> list[Line]:
    recording, _ = synthetic(bench, bench.sizes.heatmap_steps, bench.sizes.side)
    ways = {tokens: partial(heatmaps, recording, embedding(bench, tokens)) for tokens in bench.sizes.growth_tokens}
    return growth_lines(bench, "heatmaps", ways, "tokens")


@torch.no_grad()
def growth_steps(bench: Bench) -> list[Line]:
    largest, asked = max(bench.sizes.growth_steps), embedding(bench, 8)
    recording, _ = synthetic(bench, largest, bench.sizes.side)
    ways = {steps: partial(heatmaps, recording.select(steps=range(steps)), asked) for steps in bench.sizes.growth_steps}
    return growth_lines(bench, "heatmaps of 8 tokens", ways, "steps")


@torch.no_grad()
def growth_sides(bench: Bench) -> list[Line]:
    asked, steps = embedding(bench, 8), min(bench.sizes.growth_steps)
    recordings = {side: synthetic(bench, steps, side)[0] for side in bench.sizes.growth_sides}
    maps = {side: partial(heatmaps, one, asked) for side, one in recordings.items()}
    sums = {side: partial(column_sums, *[one.layers[0].queries[0]] * 2, 40**-0.5) for side, one in recordings.items()}
    return [
        *growth_lines(bench, f"heatmaps of 8 tokens, {steps} steps", maps, "pixels a side"),
        *growth_lines(bench, "column_sums of SD 1.5's finest layer", sums, "pixels a side"),
    ]


def growth_images(bench: Bench) -> list[Line]:
    pipe, steps = load_pipeline(EMBEDDED, str(bench.device)), min(bench.sizes.embedded_steps, 5)

    def recorded(images: int) -> list[Recording]:
        with record(pipe) as recorder:
            embedded_call(pipe, steps, images)
        return recorder.recordings

    lines = []
    for images in bench.sizes.growth_images:
        ways = {"plain": partial(embedded_call, pipe, steps, images), "recorded": partial(recorded, images)}
        for way in ways.values():
            way()
        times = race(bench, ways, bench.sizes.few_rounds)
        what = f"self-attention too, {images} images together, {EMBEDDED}, {steps} steps"
        lines.append(compared(bench, 6, what, times, "recorded", "plain"))
    return lines


# ------------------------------------------------------------ the table


ROWS: dict[int, tuple[Callable[[Bench], list[Line]], ...]] = {
    1: (recording_embedded, recording_sd15, recording_sdxl),
    2: (heatmap,),
    3: (token,),
    4: (self_attention,),
    5: (app_start, app_word),
    6: (growth_tokens, growth_steps, growth_sides, growth_images),
}
HEADER = """| row | what | ratio | median | lowest to highest | target | seconds, notes |
|---|---|---|---:|---:|---:|---|"""


def markdown(line: Line) -> str:
    median = statistics.median(line.values)
    spread = f"{min(line.values):.3g} to {max(line.values):.3g}" if len(line.values) > 1 else "one round"
    seconds = ", ".join(f"{side} {value:.3g} s" for side, value in line.seconds.items())
    notes = "; ".join(filter(None, (seconds, line.note)))
    cells = (line.row, line.what, line.ratio, f"{median:.3g}", spread, line.target, notes)
    return f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |"


def machine(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def run(bench: Bench, rows: Sequence[int], report: Callable[[str], None]) -> dict[str, Any]:
    """All wanted rows; what fails is reported and the others go on. Returns what goes into the JSON."""
    found: dict[str, Any] = {"machine": machine(bench.device), "lines": [], "not here": [], "failed": []}
    report(f"{found['machine']}\n\n{HEADER}")
    for row in rows:
        for measure in ROWS[row]:
            begun = time.perf_counter()
            try:
                lines = measure(bench)
            except NotHere as reason:
                found["not here"].append({"row": row, "what": measure.__name__, "why": str(reason)})
                report(f"| {row} | {measure.__name__} | not on this device |  |  |  | {reason} |")
            except Exception as error:
                why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                found["failed"].append({"row": row, "what": measure.__name__, "why": why})
                report(f"| {row} | {measure.__name__} | failed |  |  |  | {why.replace('|', '/')} |")
            else:
                found["lines"] += [asdict(line) | {"median": statistics.median(line.values)} for line in lines]
                report("\n".join(map(markdown, lines)))
            sys.stderr.write(f"{measure.__name__}: {time.perf_counter() - begun:.0f} s\n")
            gc.collect()
            if bench.on_gpu:
                torch.cuda.empty_cache()
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: only that it runs")
    parser.add_argument("--rows", type=int, nargs="+", choices=tuple(ROWS), default=tuple(ROWS))
    parser.add_argument("--out", type=Path, default=Path("outputs/speed"), help="for the table and its JSON")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; choose --device cpu.")
    sizes = SMOKE if options.smoke else CUDA if options.device == "cuda" else CPU
    texts: list[str] = []

    def report(text: str) -> None:
        texts.append(text)
        print(text, flush=True)

    found = run(Bench(torch.device(options.device), sizes), options.rows, report)
    options.out.mkdir(parents=True, exist_ok=True)
    name = f"{'smoke-' if options.smoke else ''}{options.device}"
    (options.out / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (options.out / f"{name}.md").write_text("\n".join(texts) + "\n", encoding="utf-8")
    return 1 if found["failed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
