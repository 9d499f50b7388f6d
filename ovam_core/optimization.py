"""Section 3.3 of the paper: the embedding whose heatmaps match given masks (Eqs. 6, 7). Tensors in, tensors out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ovam_core.attention.heatmap import check_embedding, check_weights, heatmaps, merged, resize
from ovam_core.attention.recording import Recording, side_by_side
from ovam_core.errors import InputError
from ovam_core.io.masks import IGNORE
from ovam_core.query import background_embedding, words_in_sentence
from ovam_core.settings import CROSS_ENTROPY, RECIPES, OptimizeSettings

if TYPE_CHECKING:
    from ovam_core.models.adapter import Pipeline

MAX_TOKEN_CLASSES = 32

PROMPT = "A photograph of a {}"

EDGE = 1e-6  # heatmaps are kept this far from 0 and 1: past it the logarithm has no useful gradient


# ------------------------------------------------------------------------------------------ optimisation


@dataclass(frozen=True, eq=False)
class Epoch:
    """What `on_epoch` is told. number: from 1. embedding: the best so far, float32 `[L, E]`, detached."""

    number: int
    of: int
    loss: float
    best_loss: float
    embedding: Tensor


@dataclass(frozen=True, eq=False)
class Optimized:
    """embedding: the one of the lowest loss, float32 `[L, E]` on the CPU; loss: Eq. 6 there; losses: of every epoch.

    stopped: whether it ended before its last epoch; reason: why, one sentence, else "".
    """

    embedding: Tensor
    loss: float
    losses: list[float]
    epochs: int
    seconds: float
    stopped: bool
    reason: str


def initial_embedding(pipe: Pipeline, classes: Sequence[str]) -> Tensor:
    """Where the search starts (section 3.3): `[<SoT>, class, ...]` of "A photograph of a <class>", float32 `[1 +
    classes, E]`.

    A class of several sub-tokens or words starts at their mean. Where the text encoder has no <SoT> (T5) its end token
    takes the background. Raises InputError for names that `text` refuses.
    """
    if not classes:
        raise InputError("There is no class to make a token for: name one, for example cat.")
    if len(classes) > MAX_TOKEN_CLASSES or len(set(classes)) != len(classes):
        raise InputError(f"Name at most {MAX_TOKEN_CLASSES} classes, each of them once.")
    start = background_embedding(pipe, PROMPT.format(classes[0]))
    rows = []
    for name in classes:
        found = words_in_sentence(pipe, PROMPT.format(name), [name])
        rows.append(found.means(found.embedding)[0][None])
    return torch.cat([start, *rows]).float()


def optimize(
    recordings: Sequence[Recording],
    targets: Sequence[np.ndarray],
    start: Tensor,
    settings: OptimizeSettings = RECIPES["fast"],
    on_epoch: Callable[[Epoch], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    weights: Sequence[float] | None = None,
) -> Optimized:
    """The embedding X' that minimises Eq. 6, the sum over images of the sum over tokens of BCE (Eq. 7).

    recordings: one an image, of one model. targets: one an image, uint8 `[H, W]` at image size: the row of `start` that
    each pixel belongs to, 0 for background, 255 to leave it out; an image may be all background if another is not.
    start: `[L, E]`, L at least 2. weights: of each image in the sum, above 0, default 1 each as in Eq. 6.
    on_epoch: called after every epoch. should_stop: asked before every epoch; True ends with the best so far.
    BCE is the mean over labelled pixels of the map at the target's size: that is what the paper's rate of 100
    presupposes. A loss that is not finite ends the search and the best so far is returned; `reason` says so.
    Raises InputError for targets that do not fit.
    """
    settings.validate()
    # Whatever mode the caller is in: this is a search by gradients, and nothing of it is a tensor of inference mode.
    with torch.inference_mode(False), torch.enable_grad():
        return _optimize(recordings, targets, start, settings, on_epoch, should_stop, weights)


def _optimize(
    recordings: Sequence[Recording],
    targets: Sequence[np.ndarray],
    start: Tensor,
    settings: OptimizeSettings,
    on_epoch: Callable[[Epoch], None] | None,
    should_stop: Callable[[], bool] | None,
    weights: Sequence[float] | None,
) -> Optimized:
    for recording in recordings:
        check_embedding(start, recording.embed_dim)
        check_weights(recording)
    tasks = _tasks(recordings, targets, start, weights)
    device = start.device if recordings[0].layers[0].queries.device.type == "cpu" else tasks[0].target.device
    begun = time.perf_counter()
    search = _Search(tasks, start.detach().to(device, torch.float32).clone(), settings, on_epoch, should_stop)
    reason = search.run()
    epochs, seconds = len(search.losses), time.perf_counter() - begun
    stopped = epochs < settings.epochs
    return Optimized(search.best.cpu(), search.best_loss, search.losses, epochs, seconds, stopped, reason)


class _Search:
    """The embedding on its way down the loss."""

    def __init__(
        self,
        tasks: Sequence[_Task],
        origin: Tensor,
        settings: OptimizeSettings,
        on_epoch: Callable[[Epoch], None] | None,
        should_stop: Callable[[], bool] | None,
    ):
        self.tasks, self.origin, self.settings = tasks, origin, settings
        self.on_epoch, self.should_stop = on_epoch, should_stop
        self.x = origin.clone().requires_grad_()
        self.optimizer = _optimizer(self.x, settings)
        self.losses: list[float] = []
        self.best, self.best_loss = origin, math.inf

    def run(self) -> str:
        """Epochs until one of them ends it; why it ended early, "" where it did not."""
        settings = self.settings
        try:
            while True:
                for group in self.optimizer.param_groups:
                    group["lr"] = settings.rate * settings.decay ** (len(self.losses) // settings.decay_every)
                self.optimizer.step(self.epoch)  # type: ignore[arg-type]  # torch takes tensors, its stubs floats
        except _End as end:
            return end.reason

    def epoch(self) -> Tensor:
        """Loss and gradient at x. The optimisers call it, L-BFGS more than once a step."""
        settings = self.settings
        if len(self.losses) == settings.epochs:
            raise _End("")
        if self.should_stop is not None and self.should_stop():
            raise _End(f"Stopped after {len(self.losses)} of {settings.epochs} epochs.")
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.x.device)
        for task in self.tasks:  # one graph at a time: the memory of one image, however many there are
            loss = task.loss(self.x, settings.loss)
            loss.backward(inputs=[self.x])  # and to no weight of the model
            total = total + loss.detach()
        self._note(float(total))
        if settings.proximity:
            pull = settings.proximity * (self.x - self.origin).square().mean()
            pull.backward()
            total = total + pull.detach()
        return total

    def _note(self, loss: float) -> None:
        """Keeps the best and tells of the epoch. Ends the search at a loss or gradient that is no number."""
        if not math.isfinite(loss) or self.x.grad is None or not torch.isfinite(self.x.grad).all():
            if not self.losses:
                raise InputError(
                    "The loss is not finite at the start: the recording or the embedding holds no numbers."
                )
            raise _End(f"The loss was not finite in epoch {len(self.losses) + 1}: a smaller learning rate may help.")
        self.losses.append(loss)
        if loss < self.best_loss:
            self.best, self.best_loss = self.x.detach().clone(), loss
        if self.on_epoch is not None:
            self.on_epoch(Epoch(len(self.losses), self.settings.epochs, loss, self.best_loss, self.best))


class _End(Exception):
    """Leaves an optimiser from within its closure."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


def _optimizer(x: Tensor, settings: OptimizeSettings) -> torch.optim.Optimizer:
    if settings.method == "descent":
        return torch.optim.SGD([x], lr=settings.rate)
    if settings.method == "momentum":
        return torch.optim.SGD([x], lr=settings.rate, momentum=0.9)
    if settings.method == "adam":
        return torch.optim.Adam([x], lr=settings.rate)
    return torch.optim.LBFGS(
        [x],
        lr=settings.rate,
        max_iter=settings.epochs,
        max_eval=settings.epochs + 1,
        history_size=10,
        tolerance_grad=0,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )


@dataclass(frozen=True, eq=False)
class _Task:
    """One image: its recording, `target` bool `[L, H, W]`, `weight` float `[H, W]` with the image's weight as its
    sum.
    """

    recording: Recording
    target: Tensor
    weight: Tensor

    def loss(self, embedding: Tensor, kind: str | None = None) -> Tensor:
        """Eq. 7, or what the published code has in its place: see OptimizeSettings."""
        maps = resize(heatmaps(self.recording, embedding), (self.weight.shape[0], self.weight.shape[1]))
        if kind == CROSS_ENTROPY:
            low, high = maps.min(), maps.max()
            logs = ((maps - low) / (high - low).clamp_min(EDGE)).log_softmax(dim=0)
            return -((logs * self.target).sum(dim=0) * self.weight).sum()
        right = torch.where(self.target, maps, 1 - maps).clamp(EDGE, 1 - EDGE)
        return -(right.log() * self.weight).sum()


def _for_many_questions(recording: Recording, device: torch.device) -> Recording:
    """The recording as it is asked fastest while its weights stay as they are."""
    if recording.stream is not None:
        return recording
    return merged(replace(recording, layers=side_by_side(recording.layers)), device)


def _tasks(
    recordings: Sequence[Recording], targets: Sequence[np.ndarray], start: Tensor, weights: Sequence[float] | None
) -> list[_Task]:
    """One task an image: a label map whole numbers `[H, W]` (IGNORE left out) for each recording. start: `[L, E]`, row
    n the token of label n. Raises InputError, one sentence, for what does not fit together.
    """
    if not recordings or len(recordings) != len(targets):
        raise InputError(f"There are {len(recordings)} recordings and {len(targets)} masks: give one mask an image.")
    weights = [1.0] * len(recordings) if weights is None else weights
    if len(weights) != len(recordings) or not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise InputError("The weights of the images must be numbers above 0, one for each.")
    if start.ndim != 2 or len(start) < 2:
        raise InputError("The embedding to start from needs a background row and at least one row for a class.")
    tasks, seen = [], set()
    for recording, labels, weight in zip(recordings, targets, weights, strict=True):
        labels = np.asarray(labels)
        if labels.ndim != 2 or labels.dtype.kind not in "iub":
            raise InputError(f"A mask must be whole numbers [height, width], not {labels.dtype} {list(labels.shape)}.")
        kept = labels != IGNORE
        seen |= set(np.unique(labels[kept]).tolist())
        if not kept.any():
            raise InputError("A mask has no labelled pixel: mark some of the object and some of the background.")
        stored = recording.layers[0].queries.device
        device = start.device if stored.type == "cpu" else stored
        rows = torch.arange(len(start), device=device)[:, None, None]
        target = torch.from_numpy(labels.astype(np.int64)).to(device)[None] == rows
        weights_of_pixels = torch.from_numpy(kept * (weight / kept.sum())).float().to(device)
        tasks.append(_Task(_for_many_questions(recording, device), target, weights_of_pixels))
    strange, missing = seen - set(range(len(start))), set(range(1, len(start))) - seen
    if strange:
        raise InputError(f"A mask holds the label {max(strange)}, but the embedding has {len(start)} rows.")
    if missing:
        raise InputError(f"The class of label {min(missing)} is in no mask: mark it, or leave the class out.")
    if 0 not in seen:
        raise InputError("No pixel is background: leave some of the image out of the mask.")
    return tasks
