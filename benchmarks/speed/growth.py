"""Row 6: how time grows with tokens, steps, image side and batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.speed.common import Bench, Line, race, ratio_line
from benchmarks.speed.recording import embedded_call
from benchmarks.speed.synthetic import random_embedding, synthetic_recording
from ovam_core.attention.heatmap import heatmaps
from ovam_core.attention.recording import Recording
from ovam_core.attention.self_attention import column_sums
from ovam_core.hooks.recorder import record
from ovam_core.models.load import load_pipeline
from ovam_core.models.presets import EMBEDDED


@torch.no_grad()
def growth_tokens(bench: Bench) -> list[Line]:
    recording, _ = synthetic_recording(bench, bench.sizes.heatmap_steps, bench.sizes.side)
    calls = {count: partial(heatmaps, recording, random_embedding(bench, count)) for count in bench.sizes.growth_tokens}
    return growth_lines(bench, "heatmaps", calls, "tokens")


@torch.no_grad()
def growth_steps(bench: Bench) -> list[Line]:
    embedding = random_embedding(bench, 8)
    recording, _ = synthetic_recording(bench, max(bench.sizes.growth_steps), bench.sizes.side)
    calls = {
        steps: partial(heatmaps, recording.select(steps=range(steps)), embedding) for steps in bench.sizes.growth_steps
    }
    return growth_lines(bench, "heatmaps of 8 tokens", calls, "steps")


@torch.no_grad()
def growth_sides(bench: Bench) -> list[Line]:
    embedding, steps = random_embedding(bench, 8), min(bench.sizes.growth_steps)
    recordings = {side: synthetic_recording(bench, steps, side)[0] for side in bench.sizes.growth_sides}
    maps = {side: partial(heatmaps, recording, embedding) for side, recording in recordings.items()}
    finest = {side: recording.layers[0].queries[0] for side, recording in recordings.items()}
    sums = {side: partial(column_sums, queries, queries, 40**-0.5) for side, queries in finest.items()}
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
        sides = {"plain": partial(embedded_call, pipe, steps, images), "recorded": partial(recorded, images)}
        for call in sides.values():
            call()
        times = race(bench, sides, bench.sizes.few_rounds)
        what = f"self-attention too, {images} images together, {EMBEDDED}, {steps} steps"
        lines.append(ratio_line(bench, 6, what, times, "recorded", "plain"))
    return lines


def growth_lines(bench: Bench, what: str, calls: dict[int, Callable[[], Any]], unit: str) -> list[Line]:
    """Each size over the first one, all in one race."""
    for call in calls.values():
        call()
    times = race(bench, {f"{size} {unit}": call for size, call in calls.items()}, bench.sizes.rounds)
    first, *rest = calls
    lines = []
    for size in rest:
        note = f"{size / first:.3g} times the {unit}"
        lines.append(ratio_line(bench, 6, what, times, f"{size} {unit}", f"{first} {unit}", "", note))
    return lines
