"""The annotator: a small supervised network that stands in for the paper's human annotators.

It reads the world's exact label maps, never the diffusion model's attention, and labels *generated* images.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from einops import rearrange
from PIL import Image

CLASSES = 21  # background and the 20 VOC classes
VOID = 255  # as in VOC's label maps: a pixel that counts for nothing
RATE, BATCH = 1.5e-3, 8
BORDER = 3.0  # weight of a pixel beside another label
FOLDER = Path(__file__).parent / "annotator"


def build() -> UNet2DModel:
    """A convolutional U-Net of diffusers' own blocks, used without its time input; its first level sees single
    pixels.
    """
    return UNet2DModel(
        in_channels=3,
        out_channels=CLASSES,
        block_out_channels=(16, 32, 64, 96, 128, 128),
        down_block_types=("DownBlock2D",) * 6,
        up_block_types=("UpBlock2D",) * 6,
        layers_per_block=1,
        norm_num_groups=8,
        add_attention=False,
    )


def logits(network: UNet2DModel, images: torch.Tensor) -> torch.Tensor:
    """float [N, 3, H, W] in [-1, 1] to class scores [N, 21, H, W]; H and W divisible by 32."""
    return network(images, 0).sample


def border(labels: torch.Tensor) -> torch.Tensor:
    """bool [N, H, W]: the pixels of label maps [N, H, W] that touch one of another label, on either side."""
    rows, columns = labels[:, 1:] != labels[:, :-1], labels[:, :, 1:] != labels[:, :, :-1]
    above, below = F.pad(rows, (0, 0, 1, 0)), F.pad(rows, (0, 0, 0, 1))
    return above | below | F.pad(columns, (1, 0)) | F.pad(columns, (0, 1))


def without_borders(labels: np.ndarray) -> np.ndarray:
    """Label maps uint8 [N, H, W] with the pixel on either side of a border VOID, as VOC leaves out its objects'
    outlines.
    """
    return np.where(border(torch.from_numpy(labels)).numpy(), VOID, labels).astype(np.uint8)


def loss(scores: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Cross-entropy, and one minus the soft Dice overlap of the batch's classes: thin objects count as wide ones do.

    Borders count BORDER times (after the weight map of U-Net, Ronneberger et al. 2015): most errors lie there.
    `scores` float32 [N, 21, H, W], `truth` int64 [N, H, W]; a scalar.
    """
    shares = scores.softmax(1)
    marks = F.one_hot(truth, CLASSES).movedim(-1, 1)
    both, either = (shares * marks).sum((0, 2, 3)), (shares + marks).sum((0, 2, 3))
    present = marks.sum((0, 2, 3)) > 0
    weights = 1 + (BORDER - 1) * border(truth).float()
    entropy = (weights * F.cross_entropy(scores, truth, reduction="none")).sum() / weights.sum()
    return entropy + (1 - 2 * both[present] / either[present]).mean()


def mirror(images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Half of the batches, pictures with their label maps, seen in a mirror."""
    return (images.flip(-1), labels.flip(-1)) if torch.rand(()) < 0.5 else (images, labels)


def vary(images: torch.Tensor) -> torch.Tensor:
    """Blur, noise, light and contrast, so that the network does not lean on the renderer's crispness."""
    count = len(images)
    blurred = F.interpolate(F.avg_pool2d(images, 2), scale_factor=2, mode="bilinear")
    share = torch.rand(count, 1, 1, 1, device=images.device) * (torch.rand(count, 1, 1, 1, device=images.device) < 0.5)
    images = images * (1 - share) + blurred * share
    images = images * (1 + 0.15 * torch.randn(count, 3, 1, 1, device=images.device))
    images = images + 0.1 * torch.randn(count, 3, 1, 1, device=images.device)
    return images + 0.06 * torch.rand(count, 1, 1, 1, device=images.device) * torch.randn_like(images)


def intersection_over_union(predicted: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """IoU of classes 0..20 accumulated over a set of label maps, VOID left out (NaN for a class in neither)."""
    known = labels != VOID
    pairs = np.bincount(labels[known].astype(int) * CLASSES + predicted[known], minlength=CLASSES**2)
    matrix = pairs.reshape(CLASSES, CLASSES)
    union = matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
    return np.where(union > 0, matrix.diagonal() / np.maximum(union, 1), np.nan)


def load(folder: Path = FOLDER) -> UNet2DModel:
    return UNet2DModel.from_pretrained(folder).eval()


@torch.no_grad()
def annotate(network: UNet2DModel, images: list[Image.Image]) -> np.ndarray:
    """Label maps uint8 [N, H, W] (VOC ids, 0 background) of RGB pictures of one size, each seen in a mirror as well."""
    pixels = torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images]))
    seen = rearrange(pixels, "n h w c -> n c h w").float().to(network.device) / 127.5 - 1
    shares = logits(network, seen).softmax(1) + logits(network, seen.flip(-1)).softmax(1).flip(-1)
    return shares.argmax(1).byte().cpu().numpy()
