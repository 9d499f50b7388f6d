"""Row 3: token optimisation with autograd over the plain loop against `optimize`, an epoch and to the same loss."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.speed.common import Bench, Line, megabytes, peak_bytes, race, ratio_line
from benchmarks.speed.heatmap import plain_heatmaps
from benchmarks.speed.published import as_published
from benchmarks.speed.synthetic import random_embedding, synthetic_recording
from ovam_core.attention.recording import Recording
from ovam_core.optimization import EDGE, RECIPES, Epoch, Optimized, OptimizeSettings, optimize


def token(bench: Bench) -> list[Line]:
    sizes = bench.sizes
    recording, labels = synthetic_recording(bench, sizes.token_steps, sizes.side)
    start, epochs = random_embedding(bench, 2), sizes.plain_epochs
    few = replace(RECIPES["paper"], epochs=epochs)
    ours = partial(optimize, [recording], [labels], start, few)
    plain = partial(plain_losses, as_published(recording), labels, start, epochs, few)
    np.testing.assert_allclose(ours().losses, plain(), rtol=1e-3)

    times = race(bench, {"plain loop": plain, "optimize": ours}, sizes.few_rounds + 2)
    times = {side: [seconds / epochs for seconds in values] for side, values in times.items()}
    plain_peak, our_peak = (megabytes(peak_bytes(bench, side)) for side in (plain, ours))
    note = f"peak memory {plain_peak} and {our_peak}; {epochs} epochs a round"
    target = "30" if bench.on_gpu else "2"
    name = f"one image of {sizes.token_steps} steps of SD 1.5"
    what = f"the paper's recipe, {name}: an epoch"
    lines = [ratio_line(bench, 3, what, times, "plain loop", "optimize", target, note)]

    paper = optimize([recording], [labels], start, replace(RECIPES["paper"], epochs=sizes.paper_epochs))
    runs = [optimize_until(recording, labels, start, paper.loss) for _ in range(sizes.few_rounds)]
    plain_seconds = sizes.paper_epochs * statistics.median(times["plain loop"])
    scaled = f"the plain loop's time is {sizes.paper_epochs} times its epoch"
    what = f"the paper's recipe, {name}: {sizes.paper_epochs} epochs"
    whole = {"plain loop": [plain_seconds], "optimize": [paper.seconds]}
    lines.append(ratio_line(bench, 3, what, whole, "plain loop", "optimize", target, f"{scaled}; one run"))
    reached = "reached" if runs[0].loss <= paper.loss else f"not reached, but {runs[0].loss:.4f},"
    note = f"{paper.loss:.4f} {reached} after {runs[0].epochs} epochs; {scaled}"
    what = f"the default recipe, {name}: to the lowest loss of the paper's {sizes.paper_epochs} epochs"
    to_the_loss = {"optimize": [run.seconds for run in runs], "plain loop": [plain_seconds] * len(runs)}
    lines.append(ratio_line(bench, 3, what, to_the_loss, "optimize", "plain loop", "0.1", note))
    return lines


def optimize_until(recording: Recording, labels: np.ndarray, start: Tensor, goal: float) -> Optimized:
    """The default recipe, ended when it is as good as `goal`."""
    lowest = math.inf

    def after_epoch(epoch: Epoch) -> None:
        nonlocal lowest
        lowest = epoch.best_loss

    return optimize([recording], [labels], start, RECIPES["fast"], after_epoch, lambda: lowest <= goal)


def plain_losses(
    recording: Recording, labels: np.ndarray, start: Tensor, epochs: int, settings: OptimizeSettings
) -> list[float]:
    """Eqs. 6 and 7 by gradient descent over the plain loop, with autograd: the loss of every epoch."""
    embedding = start.clone().requires_grad_()
    rows = torch.arange(len(start), device=start.device)
    targets = (torch.from_numpy(labels).to(start.device) == rows[:, None, None]).float()
    losses = []
    for epoch in range(epochs):
        maps = F.interpolate(plain_heatmaps(recording, embedding)[None], size=labels.shape, mode="bilinear")[0]
        pairs = zip(maps.clamp(EDGE, 1 - EDGE), targets, strict=True)
        loss = sum(F.binary_cross_entropy(map_, target) for map_, target in pairs)
        (gradient,) = torch.autograd.grad(loss, embedding)
        embedding.data -= settings.rate * settings.decay ** (epoch // settings.decay_every) * gradient
        losses.append(float(loss.detach()))
    return losses
