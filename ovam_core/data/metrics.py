"""How good masks are (section 4.1): counts of pixels per mask, IoU accumulated over a set, mIoU, its interval, tables.

Counts are int64 `[..., 3]`: true positives, false positives, false negatives. One row a mask; `classes` names the class
of each row and `images` the image, so that a set can be drawn again image by image. Label maps, whose classes share the
pixels, are counted in one confusion matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ovam_core.errors import InputError


def confusion(predicted: np.ndarray, truth: np.ndarray, ignore: np.ndarray | None = None) -> np.ndarray:
    """Counts int64 `[3]` of one mask. predicted, truth, ignore: bool `[H, W]`; ignored pixels count nowhere."""
    predicted, truth = np.asarray(predicted, bool), np.asarray(truth, bool)
    if predicted.shape != truth.shape:
        raise InputError(f"The mask is {list(predicted.shape)} and the truth {list(truth.shape)}: make them one size.")
    seen = np.ones_like(truth) if ignore is None else ~np.asarray(ignore, bool)
    counts = (predicted & truth & seen).sum(), (predicted & ~truth & seen).sum(), (~predicted & truth & seen).sum()
    return np.array(counts, dtype=np.int64)


def confusion_matrix(predicted: np.ndarray, truth: np.ndarray, labels: int, ignore: int = 255) -> np.ndarray:
    """Pixels of each pair of labels, int64 `[labels, labels]`: rows are the truth, columns the prediction.

    predicted, truth: whole numbers `[H, W]` below `labels`, 0 the background; pixels whose truth is `ignore` count
    nowhere. Matrices of several images add up to that of the set. Raises InputError for other shapes and other labels.
    """
    predicted, truth = np.asarray(predicted), np.asarray(truth)
    if predicted.shape != truth.shape:
        raise InputError(
            f"The labels are {list(predicted.shape)} and the truth {list(truth.shape)}: make them one size."
        )
    seen = truth != ignore
    rows, columns = truth[seen].astype(np.int64), predicted[seen].astype(np.int64)
    highest = max(rows.max(initial=0), columns.max(initial=0))
    if highest >= labels:
        raise InputError(f"A label map holds the label {highest}, but the labels are 0 to {labels - 1}.")
    return np.bincount(rows * labels + columns, minlength=labels**2).reshape(labels, labels)


def matrix_counts(matrix: np.ndarray) -> np.ndarray:
    """The counts of each label, int64 `[labels, 3]`, for `iou`: true positives, false positives, false negatives."""
    right = np.diagonal(matrix)
    return np.stack([right, matrix.sum(axis=0) - right, matrix.sum(axis=1) - right], axis=1)


def sweep(
    heatmap: np.ndarray, truth: np.ndarray, thresholds: np.ndarray, ignore: np.ndarray | None = None
) -> np.ndarray:
    """Counts int64 `[T, 3]` of the masks `heatmap >= threshold * max` (Eq. 9), all thresholds in one pass.

    heatmap: float `[H, W]`, 0 or more; thresholds: rising, in [0, 1]. A map of zeros gives empty masks.
    """
    truth = np.asarray(truth, bool).ravel()
    seen = np.ones_like(truth) if ignore is None else ~np.asarray(ignore, bool).ravel()
    values, truth = np.asarray(heatmap, np.float64).ravel(), truth[seen]
    cuts = np.asarray(thresholds) * values.max()
    # `passed` thresholds let a pixel through: it is in the first `passed` masks.
    passed = np.searchsorted(cuts, values[seen], side="right") if values.max() > 0 else np.zeros(len(truth), int)
    length = len(cuts) + 1
    inside, outside = (
        np.bincount(passed[which], minlength=length)[::-1].cumsum()[::-1][1:] for which in (truth, ~truth)
    )
    return np.stack([inside, outside, truth.sum() - inside], axis=1).astype(np.int64)


def iou(counts: np.ndarray) -> np.ndarray:
    """TP / (TP + FP + FN) over the last axis: float `[...]`, NaN where nothing was counted."""
    counts = np.asarray(counts, float)
    union = counts.sum(axis=-1)
    return np.divide(counts[..., 0], union, out=np.full(union.shape, np.nan), where=union > 0)


def by_class(counts: np.ndarray, classes: Sequence) -> dict:
    """IoU of each class, its counts accumulated over the set. counts `[n, 3]`, classes `[n]`."""
    names = np.asarray(classes)
    return {name: float(iou(np.asarray(counts)[names == name].sum(axis=0))) for name in sorted(set(names.tolist()))}


def miou(counts: np.ndarray, classes: Sequence) -> float:
    """Mean IoU over the classes that occur, in [0, 1]; NaN for an empty set."""
    values = list(by_class(counts, classes).values())
    return float(np.nanmean(values)) if values else float("nan")


def interval(
    counts: np.ndarray, classes: Sequence, images: Sequence, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Bootstrap interval of the mIoU: images are drawn with replacement, with all their masks; a fixed seed.

    counts `[n, 3]`, classes `[n]`, images `[n]`: which image each mask is of. A class that a draw misses drops out of
    its mean.
    """
    if not len(counts):
        return float("nan"), float("nan")
    means = _drawn(_cells(counts, classes, images), _weights(images, draws, seed))
    low, high = np.nanquantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def gain(
    first: np.ndarray,
    second: np.ndarray,
    classes: Sequence,
    images: Sequence,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """mIoU of `second` less that of `first`, and its bootstrap interval: the same images are drawn for both."""
    weights = _weights(images, draws, seed)
    apart = _drawn(_cells(second, classes, images), weights) - _drawn(_cells(first, classes, images), weights)
    low, high = np.nanquantile(apart, [(1 - level) / 2, (1 + level) / 2])
    return miou(second, classes) - miou(first, classes), float(low), float(high)


def _cells(counts: np.ndarray, classes: Sequence, images: Sequence) -> np.ndarray:
    """Counts `[images, classes, 3]`."""
    (_, rows), (_, columns) = (np.unique(np.asarray(x), return_inverse=True) for x in (images, classes))
    cells = np.zeros((rows.max() + 1, columns.max() + 1, 3))
    np.add.at(cells, (rows, columns), np.asarray(counts))
    return cells


def _weights(images: Sequence, draws: int, seed: int) -> np.ndarray:
    """How often each image is in each draw: `[draws, images]`."""
    n = len(set(np.asarray(images).tolist()))
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws)


def _drawn(cells: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return np.nanmean(iou(np.einsum("di,ick->dck", weights, cells)), axis=1)


def best_threshold(counts: np.ndarray, classes: Sequence, thresholds: np.ndarray) -> tuple[float, float, int]:
    """The single threshold of the highest mIoU. counts `[n, T, 3]` of `sweep`. Returns (threshold, mIoU, its index)."""
    scores = [miou(counts[:, index], classes) for index in range(len(thresholds))]
    best = int(np.nanargmax(scores))
    return float(thresholds[best]), float(scores[best]), best


def table(header: Sequence[str], rows: Sequence[Sequence]) -> str:
    """A Markdown table. The first column is text, the others stand to the right."""
    lines = [list(map(str, header)), ["---"] + ["---:"] * (len(header) - 1), *[list(map(str, row)) for row in rows]]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
