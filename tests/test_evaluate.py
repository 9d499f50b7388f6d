"""Counts, IoU, intervals and tables against what one writes down by hand; the methods' published numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from reference import generate

from ovam_core import record
from ovam_core.attention.heatmap import attribute
from ovam_core.attention.mask import binary_masks, make_masks
from ovam_core.data.metrics import best_threshold, by_class, confusion, gain, interval, iou, miou, sweep, table
from ovam_core.errors import InputError
from ovam_core.methods import ATTN2MASK, DAAM, METHODS, OVAM, Cut
from ovam_core.picture import Picture
from ovam_core.query import Query, attribute_words


def pair(seed, shape=(9, 11)):
    rng = np.random.default_rng(seed)
    return rng.random(shape) > 0.6, rng.random(shape) > 0.5


def test_confusion_is_set_arithmetic():
    predicted, truth = pair(0)
    ignore = np.zeros_like(truth)
    ignore[:3] = True
    ours, theirs = ({tuple(x) for x in np.argwhere(mask)} for mask in (predicted, truth))
    assert confusion(predicted, truth).tolist() == [len(ours & theirs), len(ours - theirs), len(theirs - ours)]
    left = [[x for x in s if x[0] >= 3] for s in (ours & theirs, ours - theirs, theirs - ours)]
    assert confusion(predicted, truth, ignore).tolist() == [len(x) for x in left]
    with pytest.raises(InputError, match="one size"):
        confusion(predicted, truth[:2])


@pytest.mark.parametrize("seed", range(4))
def test_sweep_is_the_threshold_of_eq_9(seed):
    rng = np.random.default_rng(seed)
    heatmap = np.round(rng.random((9, 11)), 1).astype(np.float32)  # many pixels exactly on a threshold
    _, truth = pair(seed)
    ignore = rng.random((9, 11)) > 0.8
    thresholds = np.array([0.0, 0.25, 0.5, 0.9, 1.0])
    counts = sweep(heatmap, truth, thresholds, ignore)
    for row, tau in zip(counts, thresholds, strict=True):
        mask = binary_masks(torch.from_numpy(heatmap.astype(np.float64))[None], float(tau))[0].numpy()
        assert row.tolist() == confusion(mask, truth, ignore).tolist()


def test_sweep_of_an_empty_map():
    _, truth = pair(1)
    assert sweep(np.zeros((9, 11)), truth, np.array([0.0, 0.5])).tolist() == [[0, 0, truth.sum()]] * 2


def test_iou_accumulates_over_the_set():
    counts = np.array([[1, 1, 0], [3, 0, 0], [0, 5, 5], [0, 0, 0]])
    assert by_class(counts, ["cat", "cat", "dog", "cow"]) == {
        "cat": 0.8,
        "cow": pytest.approx(np.nan, nan_ok=True),
        "dog": 0,
    }
    assert miou(counts, ["cat", "cat", "dog", "cow"]) == pytest.approx(0.4)
    assert np.isnan(iou(np.zeros(3)))
    assert np.isnan(miou(np.zeros((0, 3)), []))


def test_interval():
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 100, (60, 3))
    classes = np.arange(60) % 3
    low, high = interval(counts, classes, range(60))
    assert low < miou(counts, classes) < high
    assert (low, high) == interval(counts, classes, range(60))
    narrow = interval(np.tile(counts, (9, 1)), np.tile(classes, 9), range(540))
    assert narrow[1] - narrow[0] < 0.6 * (high - low)
    wide = interval(np.tile(counts, (9, 1)), np.tile(classes, 9), np.tile(np.arange(60), 9))
    assert wide == pytest.approx((low, high))  # copies of an image are no further images
    assert interval(np.tile([[1, 1, 0]], (20, 1)), [0] * 20, range(20)) == (0.5, 0.5)
    assert np.isnan(interval(np.zeros((0, 3)), [], [])[0])


def test_interval_is_the_plain_bootstrap():
    rng = np.random.default_rng(1)
    counts, classes = rng.integers(1, 50, (30, 3)), np.arange(30) % 2
    means = []
    for _ in range(2000):
        drawn = rng.integers(0, 30, 30)
        means.append(
            np.mean(
                [
                    counts[drawn][classes[drawn] == c].sum(0)[0] / counts[drawn][classes[drawn] == c].sum()
                    for c in (0, 1)
                ]
            )
        )
    assert interval(counts, classes, range(30)) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.01)


def test_gain_pairs_the_images():
    rng = np.random.default_rng(0)
    first = rng.integers(1, 100, (40, 3))
    second = first + np.array([5, 0, 0])
    middle, low, high = gain(first, second, np.arange(40) % 4, range(40))
    assert 0 < low < middle < high
    assert gain(first, first, [0] * 40, range(40)) == (0, 0, 0)


def test_best_threshold():
    counts = np.array([[[1, 9, 0], [8, 1, 1], [0, 0, 9]], [[2, 9, 0], [2, 5, 5], [9, 0, 1]]])
    threshold, score, index = best_threshold(counts, [0, 0], np.array([0.1, 0.5, 0.9]))
    assert (threshold, index) == (0.9, 2)
    assert score == max(iou(counts.sum(0))) == pytest.approx(9 / 19)


def test_table():
    assert table(["row", "x"], [["a|b", 1]]) == "| row | x |\n| --- | ---: |\n| a/b | 1 |"


def cut(method, kind):
    """(tau, alpha) of a method, as published."""
    query = method.cut(Query(("cat",), None, kind=kind), Cut(), None)
    return query.tau, query.alpha


def test_the_methods_are_the_published_ones():
    methods = (DAAM, ATTN2MASK, OVAM)
    assert [m.name for m in methods] == list(METHODS)[:3] == ["DAAM", "Attn2Mask", "OVAM"]
    assert [cut(m, "word")[0] for m in methods] == [0.4, 0.5, 0.4]
    assert {cut(m, "token")[0] for m in methods} == {0.8}
    assert cut(OVAM, "word") == (0.4, 0.85)
    assert cut(OVAM, "token") == (0.8, 0.95)
    assert (ATTN2MASK.run_steps, ATTN2MASK.step) == (100, 50)
    assert [m.crf for m in methods] == [False, True, True]
    assert DAAM.alpha == ATTN2MASK.alpha == 1


def test_methods_make_masks(tiny):
    with record(tiny) as recorder:
        generate(tiny, steps=3)
    recording = recorder.recordings[0]
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 48, 3), np.uint8))
    picture, prompts = Picture(image, recording), attribute_words(tiny, ["cat"])
    maps = attribute(recording, prompts)
    word = DAAM.cut(Query(("cat",), prompts[0]), Cut(), None)
    expected = make_masks(recording, maps, image, tau=0.4, alpha=1, crf=False)
    assert np.array_equal(DAAM.masks(picture, maps, [word]), expected)
    token = OVAM.cut(Query(("cat",), prompts[0], kind="token"), Cut(), None)
    expected = make_masks(recording, maps, image, tau=0.8, alpha=0.95, crf=True)
    assert np.array_equal(OVAM.masks(picture, maps, [token]), expected)
    assert DAAM.select(recording) is recording
    with pytest.raises(InputError, match="None of these steps"):
        ATTN2MASK.select(recording)
