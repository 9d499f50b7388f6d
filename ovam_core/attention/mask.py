"""Section 3.4 of the paper: self-attention map (Eq. 8), threshold (Eq. 9), dense CRF, one label map."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from ovam_core.attention.crf import NO_CRF as NO_CRF
from ovam_core.attention.crf import crf_available as crf_available
from ovam_core.attention.crf import densecrf as densecrf
from ovam_core.attention.crf import densecrf_each
from ovam_core.attention.heatmap import resize, summed
from ovam_core.attention.recording import Recording
from ovam_core.errors import InputError


def self_attention_map(recording: Recording, alpha: float) -> Tensor:
    """A_alpha (Eq. 8): the attention each pixel received, scaled to [alpha, 1]; alpha 1 is a map of ones.

    Returns float32 `[recording.height, recording.width]`. Raises InputError for an alpha outside [0, 1], and for a
    recording without self-attention if alpha < 1.
    """
    _check_unit("alpha", alpha)
    if alpha == 1:
        return torch.ones(recording.height, recording.width, device=recording.layers[0].queries.device)
    if not recording.column_sums:
        raise InputError(
            "This recording has no self-attention (or a cache skipped it at these steps): record with "
            "self_attention=True, choose other steps, or set alpha to 1."
        )
    size = (recording.height, recording.width)
    received = summed(
        resize(rearrange(layer.sums.sum(dim=0), "(h w) -> 1 h w", h=layer.height), size)[0]
        for layer in recording.column_sums
    )
    low, high = received.min(), received.max()
    if high <= low:
        return torch.ones_like(received)
    return alpha + (1 - alpha) * (received - low) / (high - low)


def binary_masks(maps: Tensor, tau: float, attention: Tensor | None = None) -> Tensor:
    """Eq. 9: where A_alpha * D >= tau * max(A_alpha * D), a map at a time.

    maps: `[L, H, W]`, not negative; attention: A_alpha `[H, W]` or None for ones; tau in [0, 1].
    Returns bool `[L, H, W]`. A map that is zero everywhere gives an empty mask.
    """
    _check_unit("tau", tau)
    weighted = maps if attention is None else maps * attention.to(maps.device)
    peak = weighted.amax(dim=(-2, -1), keepdim=True)
    return (weighted >= tau * peak) & (peak > 0)


def make_masks(
    recording: Recording,
    maps: Tensor,
    image: Image.Image,
    *,
    tau: float = 0.4,
    alpha: float = 0.85,
    crf: bool = True,
) -> np.ndarray:
    """Masks of the paper: maps times A_alpha, bilinear to the image's size, threshold, dense CRF.

    maps: `[L, recording.height, recording.width]` of `heatmap.attribute`; tau and alpha in [0, 1] (0.4 and 0.85
    for words, 0.8 and 0.95 for optimised tokens). Returns bool `[L, H, W]` at the size of `image`.
    """
    weighted = maps.detach() * self_attention_map(recording, alpha).to(maps.device)
    masks = binary_masks(resize(weighted, (image.height, image.width)), tau).cpu().numpy()
    if not crf:
        return masks
    pixels = np.asarray(image.convert("RGB"))
    return densecrf_each(masks, pixels)


def label_map(maps: np.ndarray, masks: np.ndarray, ids: Sequence[int] | None = None) -> np.ndarray:
    """Masks of several classes in one image of labels: uint8 `[H, W]`, 0 background.

    maps: `[L, H, W]`; masks: bool `[L, H, W]`; ids: the label of each, 1 to 255 (default 1, 2, ...). Where masks
    overlap, the class whose map is larger relative to its own maximum wins.
    """
    ids = list(range(1, len(masks) + 1)) if ids is None else list(ids)
    if maps.shape != masks.shape or len(ids) != len(masks):
        raise InputError(f"{list(maps.shape)} maps, {list(masks.shape)} masks and {len(ids)} ids do not go together.")
    if any(not 1 <= int(x) <= 255 for x in ids):
        raise InputError("Label ids must lie between 1 and 255: 0 is the background.")
    if len(masks) == 0:
        return np.zeros(masks.shape[1:], dtype=np.uint8)
    peaks = maps.max(axis=(1, 2), keepdims=True)
    scores = np.where(masks, maps / np.where(peaks > 0, peaks, 1), -np.inf)
    winners = np.asarray(ids, dtype=np.uint8)[scores.argmax(axis=0)]
    return np.where(masks.any(axis=0), winners, 0).astype(np.uint8)


def _check_unit(name: str, value: float) -> None:
    if not isinstance(value, Real) or not math.isfinite(value) or not 0 <= value <= 1:
        raise InputError(f"{name} is {value}: give a number between 0 and 1.")
