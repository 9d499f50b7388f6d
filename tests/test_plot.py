"""Pictures of maps and masks."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from ovam_core import plot
from ovam_core.data.voc import VOC_CLASSES
from ovam_core.errors import InputError


@pytest.fixture
def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8))


def test_palette_is_vocs():
    triples = np.reshape(plot.VOC_PALETTE, (256, 3)).tolist()
    assert triples[:4] == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]]
    assert triples[20] == [0, 64, 128]
    assert triples[255] == [224, 224, 192]
    assert len(VOC_CLASSES) == 20
    assert VOC_CLASSES[14] == "person"


def test_same_scale_means_same_colour():
    low, high = np.full((4, 4), 0.2), np.full((4, 4), 0.4)
    assert not np.array_equal(plot.colorize(low, 0.4), plot.colorize(high, 0.4))
    assert np.array_equal(plot.colorize(low), plot.colorize(high))  # each on its own scale
    assert np.array_equal(plot.colorize(low, 0.8), plot.colorize(high, 1.6))


@pytest.mark.parametrize("heatmap", [np.zeros((3, 5)), np.full((3, 5), np.nan)])
def test_maps_without_a_peak_have_the_bottom_colour(heatmap):
    with np.errstate(all="ignore"):
        colours = plot.colorize(heatmap, 0.0)
    assert colours.shape == (3, 5, 3)
    assert (colours == colours[0, 0]).all()


def test_overlay_has_the_size_of_the_picture_and_follows_the_map(photo):
    heatmap = np.zeros((6, 10), dtype=np.float32)
    heatmap[:, 5:] = 1
    mixed = np.asarray(plot.overlay(photo, heatmap, opacity=1.0)).astype(int)
    assert mixed.shape == (24, 40, 3)
    assert np.abs(mixed[:, 0] - plot.colorize(np.zeros((1, 1)), 1.0)[0, 0]).max() <= 1
    assert np.abs(mixed[:, -1] - plot.colorize(np.ones((1, 1)), 1.0)[0, 0]).max() <= 1
    dimmed = np.asarray(plot.overlay(photo, heatmap, opacity=0.0))
    assert dimmed.max() <= 255 * plot.DIM + 1


def test_overlay_refuses_an_opacity_that_is_none(photo):
    with pytest.raises(InputError, match="opacity"):
        plot.overlay(photo, np.zeros((2, 2)), opacity=float("nan"))


def test_label_image_keeps_ids(tmp_path):
    labels = np.array([[0, 1], [20, 255]], dtype=np.uint8)
    plot.label_image(labels).save(tmp_path / "labels.png")
    again = Image.open(tmp_path / "labels.png")
    assert again.mode == "P"
    assert np.array_equal(np.asarray(again), labels)
    assert again.convert("RGB").getpixel((1, 0)) == (128, 0, 0)
    with pytest.raises(InputError, match="uint8"):
        plot.label_image(labels.astype(int))


def test_colours_differ_and_repeat():
    many = plot.word_colors([f"word {n}" for n in range(len(plot.COLORS) + 1)])
    assert len(set(plot.COLORS)) == len(plot.COLORS)
    assert many["word 0"] == many[f"word {len(plot.COLORS)}"] == plot.COLORS[0]


def test_enlarge_is_by_whole_numbers():
    assert plot.enlarge(Image.new("RGB", (128, 96))).size == (512, 384)
    assert plot.enlarge(Image.new("RGB", (600, 520))).size == (600, 520)
