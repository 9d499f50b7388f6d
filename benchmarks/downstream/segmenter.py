"""The segmenter: a SegFormer of `transformers` from a config, random weights, trained on the CPU; not the annotator's
network, which is a convolutional U-Net.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from benchmarks.downstream.pictures import Pictures
from ovam_core.data.metrics import confusion_matrix, matrix_counts
from ovam_core.data.voc import VOC_CLASSES
from ovam_core.io.masks import IGNORE

CLASSES = 1 + len(VOC_CLASSES)
WIDTHS, DEPTHS, DECODER = (24, 48, 96, 192), (1, 1, 2, 1), 96
INIT = 0.15  # deviation of the weights: SegFormer's 0.02 is for networks that are wider
WARM_UP = 0.05  # share of the steps


@dataclass(frozen=True)
class Training:
    """steps: on the first set, at `rate`; further: on the second, at a tenth of it; batch: pictures a step."""

    steps: int = 750
    further: int = 250
    batch: int = 8
    rate: float = 2e-3


def build(seed: int) -> SegformerForSemanticSegmentation:
    """Class scores at a quarter of the image's side, as SegFormer has it."""
    config = SegformerConfig(
        num_labels=CLASSES,
        hidden_sizes=list(WIDTHS),
        depths=list(DEPTHS),
        decoder_hidden_size=DECODER,
        num_attention_heads=[1, 2, 4, 8],
        sr_ratios=[4, 2, 1, 1],
        initializer_range=INIT,
        drop_path_rate=0.0,
        classifier_dropout_prob=0.0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return SegformerForSemanticSegmentation(config)


def parameters(network: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in network.parameters())


def seen(images: torch.Tensor) -> torch.Tensor:
    """uint8 [N, H, W, 3] to float [N, 3, H, W] about zero, laid out as it lies: faster on a CPU than channels first."""
    return images.movedim(-1, 1).float() / 64 - 2


def vary(images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mirror, scale, shift, light and contrast of each picture, with its label map. float [N, 3, H, W], [N, H, W]."""
    count = len(images)
    theta = torch.zeros(count, 2, 3)
    scale = 2 ** torch.empty(count).uniform_(-0.5, 0.5)
    theta[:, 0, 0] = torch.where(torch.rand(count) < 0.5, -scale, scale)
    theta[:, 1, 1] = scale
    theta[:, :, 2] = torch.empty(count, 2).uniform_(-0.25, 0.25)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, align_corners=False)
    # Counted from IGNORE, so that the zeros which grid_sample puts outside mean just that.
    marks = F.grid_sample(IGNORE - labels[:, None].float(), grid, mode="nearest", align_corners=False)
    light = moved * (1 + 0.2 * torch.randn(count, 1, 1, 1)) + 0.2 * torch.randn(count, 3, 1, 1)
    return light, IGNORE - marks[:, 0].round().long()


def loss(scores: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Cross-entropy, and one minus the soft Dice overlap of the batch's labels, at half the size of the pictures.

    Without the second all is background for the first thousand steps. scores: float [N, 21, h, w], truth: int64
    [N, H, W], IGNORE left out; a scalar.
    """
    truth = truth[:, 1::2, 1::2]
    scores = F.interpolate(scores, truth.shape[1:], mode="bilinear", align_corners=False)
    known = (truth != IGNORE)[:, None]
    shares = scores.softmax(1) * known
    marks = F.one_hot(truth.where(known[:, 0], 0), CLASSES).movedim(-1, 1) * known
    both, either = (shares * marks).sum((0, 2, 3)), (shares + marks).sum((0, 2, 3))
    present = marks.sum((0, 2, 3)) > 0
    entropy = F.cross_entropy(scores, truth, ignore_index=IGNORE)
    return entropy + (1 - 2 * both[present] / either[present]).mean()


def train(
    network: SegformerForSemanticSegmentation, pictures: Pictures, steps: int, batch: int, rate: float, seed: int
) -> None:
    """AdamW, a warm-up and a straight fall to zero; every picture once before any is seen again."""
    images, labels = torch.from_numpy(pictures.images), torch.from_numpy(pictures.labels)
    optimizer = torch.optim.AdamW(network.parameters(), rate, weight_decay=0.01)
    warm = max(1, round(WARM_UP * steps))
    network.train().to(memory_format=torch.channels_last)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        order = torch.cat([torch.randperm(len(pictures)) for _ in range(-(-steps * batch // len(pictures)))])
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = rate * min((step + 1) / warm, (steps - step) / (steps - warm + 1))
            chosen = order[step * batch : (step + 1) * batch]
            varied, marks = vary(seen(images[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss(network(pixel_values=varied).logits, marks).backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()


@torch.no_grad()
def evaluate(network: SegformerForSemanticSegmentation, pictures: Pictures, batch: int = 20) -> np.ndarray:
    """Counts int64 [N, 21, 3] of each picture and label, for `metrics.iou`."""
    network.eval()
    counts = []
    for first in range(0, len(pictures), batch):
        own = pictures.part(slice(first, first + batch))
        scores = network(pixel_values=seen(torch.from_numpy(own.images))).logits
        scores = F.interpolate(scores, own.labels.shape[1:], mode="bilinear", align_corners=False)
        for predicted, truth in zip(scores.argmax(1).numpy(), own.labels, strict=True):
            counts.append(matrix_counts(confusion_matrix(predicted, truth, CLASSES)))
    return np.stack(counts)
