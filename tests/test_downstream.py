"""Table 3: its pictures are an export's, its arms are trained and kept once, its figures are right."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.downstream import __main__ as downstream
from benchmarks.downstream import arms, claims, pictures, segmenter
from benchmarks.downstream.arms import Arm, Sizes, arms_of
from benchmarks.downstream.pictures import Pictures
from ovam_core.data.export import export_dataset
from ovam_core.data.voc import VOC_CLASSES
from ovam_core.settings import Filters
from training import world
from training.annotated import SEEDS
from training.nouns import VOC_NOUNS
from training.recipes import CPU


def halves(images):
    """A stand-in for the annotator: cats to the left."""
    labels = np.zeros((len(images), 128, 128), np.uint8)
    labels[:, :, :64] = VOC_CLASSES.index("cat") + 1
    return labels


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------------ pictures


@pytest.mark.slow
def test_one_generation_makes_the_bytes_of_two_exports(tmp_path):
    plan = pictures.planned(3, tmp_path / "both", 2, "library")
    (tmp_path / "both").mkdir()
    rows = pictures.export_both(plan, None)
    work = pictures.works(3, plan.settings["names"])
    assert any(len(item.classes) > 1 for item in work.items)
    for way in pictures.WAYS:
        export_dataset(pictures.model(), work, plan.settings[way], tmp_path / way, workers=0)
        assert contents(plan.folders[way]) == contents(tmp_path / way)
        assert all(len(row["clip_scores"]) == len(row["classes"]) for row in rows[way])
        assert all(0 <= score <= 1 for row in rows[way] for score in row["clip_scores"])
    assert [row["clip_scores"] for row in rows["names"]] == [row["clip_scores"] for row in rows["tokens"]]
    assert [row["coverages"] for row in rows["names"]] != [row["coverages"] for row in rows["tokens"]]


def test_scenes_of_the_test_are_nobody_elses():
    test, real = pictures.rendered(pictures.TEST, 3), pictures.rendered(pictures.REAL, 3)
    scene = world.scene(pictures.TEST + 1, 128, VOC_NOUNS, CPU.counts)
    np.testing.assert_array_equal(test.images[1], scene.image)
    np.testing.assert_array_equal(test.labels[1], scene.labels)
    assert not np.array_equal(test.images, real.images)
    firsts = sorted([pictures.TEST, pictures.REAL, pictures.CAPTIONS])
    assert firsts[0] > max(world.HELD_OUT, *SEEDS)
    assert min(np.diff(firsts)) > 100_000


def test_fewer_real_pictures_are_among_more_and_other_ones_for_each_seed():
    numbered = Pictures(np.arange(10)[:, None], np.arange(10)[:, None])
    of = {(count, seed): pictures.few_of(numbered, count, seed).labels.ravel() for count in (2, 4) for seed in (0, 1)}
    assert of[2, 0].tolist() == [0, 1]
    assert of[2, 1].tolist() == [2, 3]
    assert set(of[2, 1]) < set(of[4, 1])


def test_what_the_filter_says_of_itself():
    rows = [
        {"class_ids": [8], "classes": ["cat"], "clip_scores": [score]} for score in (0.4, 0.1, 0.2)
    ]  # shown, shown, not shown
    shown = np.zeros((3, 10, 10), np.uint8)
    shown[:2, 0, 0] = 8
    facts = pictures.filter_facts(rows, shown, np.array([True, False, True]))
    assert facts == pytest.approx({"there": 200 / 3, "there_of_kept": 50, "pairs_won": 50})


# ------------------------------------------------------------------------------------------------ the segmenter


def test_the_network_is_small_and_no_annotator():
    network = segmenter.build(0)
    assert segmenter.parameters(network) <= 5e6
    assert type(network).__name__ == "SegformerForSemanticSegmentation"
    again, other = segmenter.build(0), segmenter.build(1)
    key = "decode_head.linear_fuse.weight"
    torch.testing.assert_close(network.state_dict()[key], again.state_dict()[key], rtol=0, atol=0)
    assert not torch.equal(network.state_dict()[key], other.state_dict()[key])


def test_varied_labels_stay_with_their_pixels():
    """Each colour is a label: what was moved still agrees, and what came from outside counts for nothing."""
    labels = torch.randint(0, 21, (4, 8, 8), dtype=torch.uint8).repeat_interleave(16, 1).repeat_interleave(16, 2)
    images = labels[:, None].float().repeat(1, 3, 1, 1) + 1
    torch.manual_seed(0)
    with torch.random.fork_rng():
        plain = torch.randn
        torch.randn = lambda *size: torch.zeros(*size)  # light and contrast as they are
        try:
            varied, marks = segmenter.vary(images, labels)
        finally:
            torch.randn = plain
    assert marks.min() >= 0
    assert set(marks.unique().tolist()) <= {*range(21), 255}
    known = marks != 255
    same = (varied[:, 0] - 1 - marks).abs() < 0.01  # off the edges, where two colours mix
    assert same[known].float().mean() > 0.6
    assert (varied[:, 0][~known] < 22).all()
    assert 0.2 < known.float().mean() < 1


def test_the_loss_is_cross_entropy_and_dice_by_loops():
    torch.manual_seed(0)
    scores, truth = torch.randn(2, 21, 2, 2), torch.randint(0, 3, (2, 4, 4))
    truth[0, 1, 1] = 255
    shares, cells = scores.softmax(1), [(n, y, x) for n in range(2) for y in range(2) for x in range(2)]
    known = [
        (n, y, x, int(truth[n, 2 * y + 1, 2 * x + 1])) for n, y, x in cells if truth[n, 2 * y + 1, 2 * x + 1] != 255
    ]
    entropy = -np.mean([shares[n, label, y, x].log().item() for n, y, x, label in known])
    overlaps = []
    for label in {label for *_, label in known}:
        both = sum(shares[n, label, y, x].item() for n, y, x, own in known if own == label)
        either = sum(shares[n, label, y, x].item() + (own == label) for n, y, x, own in known)
        overlaps.append(1 - 2 * both / either)
    assert segmenter.loss(scores, truth).item() == pytest.approx(entropy + np.mean(overlaps), rel=1e-5)


@pytest.mark.slow
def test_it_learns_one_picture_by_heart():
    one = pictures.rendered(pictures.REAL, 1)
    network = segmenter.build(0)
    before = claims.once(segmenter.evaluate(network, one)[None])[0]
    segmenter.train(network, one, 40, 1, 2e-3, 0)
    after = claims.once(segmenter.evaluate(network, one)[None])[0]
    assert before < 0.2 < after


# ------------------------------------------------------------------------------------------------ claims


def test_scores_are_those_of_loops():
    random = np.random.default_rng(0)
    counts, weights = random.integers(1, 9, (2, 5, 3, 3)), random.integers(0, 3, (4, 5)).astype(float)
    found = claims.scores(counts, weights)
    for draw in range(4):
        for seed in range(2):
            summed = sum(weights[draw, n] * counts[seed, n] for n in range(5))
            assert found[draw, seed] == pytest.approx(np.mean([c[0] / c.sum() for c in summed]))


@pytest.mark.parametrize(
    ("gained", "says"), [(40, "yes; 2 of 2 seeds gain"), (-40, "no; 0 of 2 seeds gain"), (0, "cannot be told")]
)
def test_a_claim_is_judged_by_its_interval(gained, says):
    random = np.random.default_rng(0)
    worse = np.stack([random.integers(50, 60, (2, 30, 2)), random.integers(50, 60, (2, 30, 2))] * 2, -1)[..., :3]
    better = worse + np.array([gained, 0, 0]) + random.integers(-9, 10, worse.shape) * (gained == 0)
    counts = {"a": better, "b": worse}
    found = claims.verdict(claims.Claim("a over b", "a", "b"), counts, claims.drawn(30))
    assert found["verdict"].startswith(says)
    low, high = found["interval"]
    assert low < found["gain"] < high


def test_every_claim_is_about_arms_that_there_are():
    names = {arm.name for arm in arms_of(Sizes())}
    asked = claims.claims_of(Sizes())
    assert {name for claim in asked for name in (claim.better, claim.worse)} <= names
    assert len({arm.first for arm in arms_of(Sizes())}) == 7


# ------------------------------------------------------------------------------------------------ the whole


@pytest.mark.slow
def test_the_rehearsal_runs_and_goes_on(tmp_path, monkeypatch):
    small = {**downstream.SMALL, "denoising": 2, "training": segmenter.Training(2, 1, 2)}
    small["sizes"] = replace(small["sizes"], generated=6)
    monkeypatch.setattr(downstream, "SMALL", small)
    monkeypatch.setattr(pictures, "FILTERS", Filters(0.0, 1.0, 0.0))
    arguments = ["--small", "--processes", "0", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    assert downstream.main(arguments, halves) == 0
    figures = json.loads((tmp_path / "out" / "downstream.json").read_text())
    text = (tmp_path / "out" / "downstream.md").read_text()
    assert [arm["name"] for arm in figures["arms"]] == [arm.name for arm in arms_of(small["sizes"])]
    for arm in figures["arms"]:
        assert len(arm["seeds"]) == 2
        assert 0 <= arm["miou"] <= 100
        assert arm["miou"] == pytest.approx(np.mean(arm["seeds"]), abs=0.02)
    assert figures["synthetic"]["generated"] == figures["pictures"]["names"] == figures["pictures"]["shuffled"] == 6
    for words in ("share their sprites", "no CLIP image tower", "tokens over names", "by names, then real 16"):
        assert words in text

    # Again, with one arm's result gone: that one is trained anew, to the same figures; nothing else is made.
    def never(*_):
        raise AssertionError("made again")

    monkeypatch.setattr(pictures, "write_batch", never)
    (lost,) = (tmp_path / "work").rglob("names-real4-1.npy")
    lost.unlink()
    trained = []
    monkeypatch.setattr(arms, "train", lambda *given: trained.append(given) or segmenter.train(*given))
    assert downstream.main(arguments, never) == 0
    assert len(trained) == 1
    assert json.loads((tmp_path / "out" / "downstream.json").read_text()) == figures


def test_an_arm_of_one_set_trains_on_it_twice():
    (alone,) = [arm for arm in arms_of(Sizes()) if arm.name == "real 200"]
    assert alone == Arm("real 200", "real 200", "real 200")
