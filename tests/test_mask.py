"""Self-attention map, threshold, dense CRF, label map."""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from reference import generate

from ovam_core import record
from ovam_core.attention.heatmap import attribute, resize
from ovam_core.attention.mask import binary_masks, crf_available, densecrf, label_map, make_masks, self_attention_map
from ovam_core.errors import InputError
from ovam_core.query import attribute_words


@pytest.fixture(scope="module")
def recording(tiny):
    with record(tiny) as r:
        generate(tiny)
    return r.recordings[0]


@pytest.fixture
def square():
    """A red square on grey, and a mask that covers it with a shift."""
    image = np.full((64, 80, 3), 200, np.uint8)
    truth = np.zeros((64, 80), bool)
    truth[20:44, 30:54] = True
    image[truth] = (200, 30, 30)
    return image, truth, np.roll(truth, (-3, -3), axis=(0, 1))


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


def test_self_attention_map_is_eq_8(recording):
    received = sum(x.sums.sum(dim=0) for x in recording.column_sums).reshape(16, 24)
    scaled = (received - received.min()) / (received.max() - received.min())
    found = self_attention_map(recording, 0.85)
    torch.testing.assert_close(found, 0.85 + 0.15 * scaled)
    assert found.min().item() == pytest.approx(0.85)
    assert found.max().item() == pytest.approx(1)
    assert found.dtype == torch.float32


def test_self_attention_map_without_effect_or_without_data(recording):
    assert torch.equal(self_attention_map(recording, 1.0), torch.ones(16, 24))
    bare = replace(recording, column_sums=())
    assert torch.equal(self_attention_map(bare, 1), torch.ones(16, 24))
    with pytest.raises(InputError, match="no self-attention"):
        self_attention_map(bare, 0.85)
    flat = replace(
        recording, column_sums=tuple(replace(x, sums=torch.ones_like(x.sums)) for x in recording.column_sums)
    )
    assert torch.equal(self_attention_map(flat, 0.5), torch.ones(16, 24))


def test_self_attention_map_follows_the_steps(recording):
    one = self_attention_map(recording.select(steps=[1]), 0.5)
    assert not torch.allclose(one, self_attention_map(recording, 0.5))


def test_threshold_is_eq_9():
    maps = torch.tensor([[[0.1, 0.2], [0.3, 0.5]], [[0.0, 0.0], [0.0, 0.0]]])
    assert binary_masks(maps, 0.4).tolist() == [
        [[False, True], [True, True]],
        [[False, False], [False, False]],
    ]
    assert binary_masks(maps, 1.0)[0].tolist() == [[False, False], [False, True]]
    attention = torch.tensor([[1.0, 1.0], [1.0, 0.5]])  # the peak is now 0.3
    assert binary_masks(maps, 0.9, attention)[0].tolist() == [[False, False], [True, False]]
    assert binary_masks(maps, 0.0)[0].all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -0.1, 1.1, "0.4", None])
def test_tau_and_alpha_must_be_fractions(recording, bad):
    with pytest.raises(InputError, match=r"tau is .* between 0 and 1"):
        binary_masks(torch.ones(1, 2, 2), bad)
    with pytest.raises(InputError, match=r"alpha is .* between 0 and 1"):
        self_attention_map(recording, bad)


def test_densecrf_follows_the_edges(square):
    image, truth, shifted = square
    refined = densecrf(shifted, image)
    assert refined.dtype == bool
    assert refined.shape == truth.shape
    assert iou(shifted, truth) < 0.7
    assert iou(refined, truth) > 0.95


def test_densecrf_leaves_empty_and_full_masks(square):
    image = square[0]
    for mask in (np.zeros((64, 80), bool), np.ones((64, 80), bool)):
        assert np.array_equal(densecrf(mask, image), mask)
    with pytest.raises(InputError, match=r"give \[H, W\] and \[H, W, 3\]"):
        densecrf(np.zeros((64, 64), bool), image)


def test_without_simplecrf_there_is_one_sentence(square, monkeypatch):
    image, _, shifted = square
    assert crf_available()
    monkeypatch.setitem(sys.modules, "denseCRF", None)
    assert not crf_available()
    for mask in (shifted, np.zeros_like(shifted)):
        with pytest.raises(InputError, match=r"pip install SimpleCRF==0\.2\.1\.1`, or switch the dense CRF off"):
            densecrf(mask, image)


def test_densecrf_takes_any_memory_layout(square):
    image, truth, shifted = square
    transposed = densecrf(shifted.T, image.transpose(1, 0, 2))
    assert iou(transposed.T, truth) > 0.95


def test_make_masks(tiny, recording):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 48, 3), dtype=np.uint8))
    maps = attribute(recording, attribute_words(tiny, ["cat", "car"]))
    masks = make_masks(recording, maps, image, tau=0.7, alpha=0.5, crf=False)
    assert masks.dtype == bool
    assert masks.shape == (2, 32, 48)
    weighted = resize(maps * self_attention_map(recording, 0.5), (32, 48))
    assert np.array_equal(masks, binary_masks(weighted, 0.7).numpy())
    refined = make_masks(recording, maps, image, tau=0.7, alpha=0.5)
    expected = [densecrf(mask, np.asarray(image)) for mask in masks]
    assert np.array_equal(refined, expected)


def test_label_map():
    maps = np.array([[[0.8, 0.4, 0.1, 0.0]], [[0.0, 0.09, 0.1, 0.02]]], np.float32)
    masks = np.array([[[True, True, True, False]], [[False, True, True, False]]])
    labels = label_map(maps, masks)
    # Relative to their own maxima 0.8 and 0.1 the second class wins where both are.
    assert labels.tolist() == [[1, 2, 2, 0]]
    assert labels.dtype == np.uint8
    assert label_map(maps, masks, ids=[20, 8]).tolist() == [[20, 8, 8, 0]]
    assert label_map(np.zeros((0, 2, 2)), np.zeros((0, 2, 2), bool)).tolist() == [[0, 0], [0, 0]]


def test_label_map_refusals():
    maps, masks = np.ones((2, 1, 1)), np.ones((2, 1, 1), bool)
    for ids in ([0, 1], [1, 256]):
        with pytest.raises(InputError, match="between 1 and 255"):
            label_map(maps, masks, ids)
    with pytest.raises(InputError, match="do not go together"):
        label_map(maps, masks, [1])
