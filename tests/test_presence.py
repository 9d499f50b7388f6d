"""Whether a word is in the picture at all: the formula, what words are compared with, files, export."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from pipelines import make_sd15, pipe_of

from benchmarks.presence import CHOSEN, Asked, area, fitted, kinds_of
from ovam_core import OVAM, InputError
from ovam_core.attention.heatmap import AttributionPrompt, keys_of
from ovam_core.attention.presence import TOP, calibrated, joint_maps, raw_presence, settled
from ovam_core.data import ExportSettings, export_dataset, work_list
from ovam_core.data.layout import PARQUET
from ovam_core.data.prompts import parse_prompts
from ovam_core.presence import SCENERY, caption_phrases, named_words, names_surroundings
from ovam_core.query import attribute_words, words_in_sentence
from ovam_core.settings import Filters, SegmentSettings
from ovam_core.tokens import Token


@pytest.fixture(scope="module")
def ovam():
    return OVAM(make_sd15())


@pytest.fixture(scope="module")
def picture(ovam):
    return ovam.generate("a cat and a red bus", seed=1, num_inference_steps=3, width=64, height=64)


def transcribed(recording, prompts, rivals, compared):
    """The formula with loops over layers, steps, heads and pixels, on the finest grid alone."""
    every = [*prompts, *rivals]
    sizes = [len(one.embedding) for one in every]
    maps = torch.zeros(len(compared), recording.height * recording.width, dtype=torch.float64)
    count = 0
    for layer, keys in zip(
        recording.layers, keys_of(recording, torch.cat([x.embedding for x in every]), sizes), strict=True
    ):
        for step in range(layer.queries.shape[0]):
            own = (keys[step] if keys.ndim == 4 else keys).double()
            for head in range(layer.queries.shape[1]):
                count += 1
                for pixel, query in enumerate(layer.queries[step, head].double()):
                    rows = [math.exp(float(query @ key)) for key in own[head]]
                    values, first = [], 0
                    for prompt, size in zip(every, sizes, strict=True):
                        for group in prompt.groups:
                            values.append(sum(rows[first + row] for row in group) / len(group))
                        first += size
                    for label, wanted in enumerate(compared.tolist()):
                        rest = sum(v for v, yes in zip(values[len(compared) :], wanted, strict=True) if yes)
                        maps[label, pixel] += values[label] / (values[label] + rows[0] + rest)
    return maps / count


@pytest.mark.parametrize("joint", [False, True])
def test_the_formula_as_it_is_written(ovam, picture, joint):
    other = OVAM(pipe_of("sd3")) if joint else ovam
    if joint:
        picture = other.generate("a cat", seed=1, num_inference_steps=1, width=64, height=64)
    recording = settled(picture.recording)
    finest = recording.select(resolutions=[recording.resolutions[0]])
    finest = replace(finest, layers=finest.layers[:1])
    words = attribute_words(other.pipe, ["cat", "red bus"])  # the second of two words and more tokens
    rivals = attribute_words(other.pipe, ["sky", "dog"])
    compared = torch.tensor([[True, True], [True, False]])
    expected = transcribed(finest, words, rivals, compared)
    found = joint_maps(finest, words, rivals, compared).flatten(1)
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-6)
    top = expected.sort(dim=1, descending=True).values[:, : max(1, round(TOP * expected.shape[1]))].mean(dim=1)
    assert raw_presence(finest, words, rivals, compared) == pytest.approx(top.tolist(), rel=1e-4)


def test_without_a_special_token_words_are_compared_alone(picture):
    rows = torch.randn(2, picture.recording.embed_dim, generator=torch.Generator().manual_seed(0))
    prompt = AttributionPrompt(rows, ("a", "b"), ((0,), (1,)))
    maps = joint_maps(picture.recording, [prompt], [], torch.zeros(2, 0, dtype=torch.bool))
    assert maps.shape[0] == 2
    assert bool(((maps >= 0) & (maps <= 1)).all())


def test_grids_are_resized_before_their_mean(ovam, picture):
    words, compared = attribute_words(ovam.pipe, ["cat"]), torch.zeros(1, 0, dtype=torch.bool)
    parts = [picture.recording.select(resolutions=[grid]) for grid in picture.recording.resolutions]
    counts = [sum(x.queries.shape[0] * x.queries.shape[1] for x in part.layers) for part in parts]
    expected = sum(n * joint_maps(part, words, [], compared) for n, part in zip(counts, parts, strict=True)) / sum(
        counts
    )
    torch.testing.assert_close(joint_maps(picture.recording, words, [], compared), expected)


def test_the_settled_steps(picture):
    recording = picture.recording
    assert settled(recording).step_indices == recording.step_indices[-1:]
    turned = replace(recording, timesteps=recording.timesteps[::-1])  # a photograph's, from little noise to much
    assert settled(turned).step_indices == recording.step_indices[:1]
    first, *rest = recording.layers
    cached = replace(recording, layers=(first.at((0, 1), recording.step_indices), *rest))
    assert settled(cached).step_indices == (1,)


@pytest.mark.parametrize("raw", [0.0, 0.02, 0.5, 0.9, 1.0])
def test_calibration(raw):
    assert calibrated(raw, 1.0, 0.0) == pytest.approx(raw, abs=1e-5)
    assert 0 <= calibrated(raw, 40.0, 60.0) <= 1
    inside = min(max(raw, 1e-6), 1 - 1e-6)
    assert calibrated(raw, 2.0, 1.0) == pytest.approx(1 / (1 + math.exp(-1) * ((1 - inside) / inside) ** 2), rel=1e-6)


@pytest.mark.parametrize(
    ("caption", "phrases"),
    [
        ("A photograph of a cat and a red bus on the grass", ["cat", "red bus", "grass"]),
        ("cat, Cat; DOG (a pony)", ["cat", "dog", "pony"]),
        ("a t-shirt next to the dog's bowl", ["t-shirt", "dog's bowl"]),
        ("猫と犬、車", ["猫と犬", "車"]),
        ("", []),
        ("a photo of the", []),
    ],
)
def test_phrases_of_a_caption(caption, phrases):
    assert caption_phrases(caption) == phrases


@pytest.mark.parametrize(
    ("label", "words"),
    [("the Cats", {"cat"}), ("red bus", {"red", "bu"}), ("<SoT>", set()), ("of the", set()), ("bus", {"bu"})],
)
def test_what_a_label_names(label, words):
    assert named_words(label) == words


@pytest.mark.parametrize(
    ("label", "surroundings"),
    [
        ("grass", True),
        ("the blue sky", True),
        ("a Road", True),
        ("road bike", False),
        ("sand castle", False),
        ("", False),
    ],
)
def test_what_names_surroundings(label, surroundings):
    assert names_surroundings(label) == surroundings


def test_a_measured_scale_is_one_of_things(ovam, picture, monkeypatch):
    """On emoji-voc "grass" has 0.05 in a picture on grass."""
    measured = replace(ovam.preset, presence=(8.0, 15.0))
    monkeypatch.setattr("ovam_core.presence.defaults_for", lambda _: measured)
    scores = ovam.segment(picture, ["cat", "the grass", "sea", "street"], crf=False).presence
    assert scores[0] is not None
    assert scores[1:] == [None] * 3


def test_a_word_is_not_compared_with_itself(ovam, picture):
    """The score of "bus" is that of a softmax without the caption's "red bus" and, of "sky", without SCENERY's."""
    found = ovam.segment(picture, ["bus", "sky"], crf=False)
    part = picture.recording
    for word, left_out, score in zip(["bus", "sky"], ["red bus", "sky"], found.presence, strict=True):
        names = [name for name in ("cat", "red bus", *SCENERY) if name != left_out]
        rivals = attribute_words(ovam.pipe, names)
        (raw,) = raw_presence(
            part, attribute_words(ovam.pipe, [word]), rivals, torch.ones(1, len(names), dtype=torch.bool)
        )
        assert score == pytest.approx(raw, rel=1e-5)  # a model that was not measured: the raw score
    assert not ovam.is_absent(0.0)


def test_words_tokens_and_methods(ovam, picture):
    token = Token(
        torch.randn(2, 32, generator=torch.Generator().manual_seed(1)), ("background", "cat"), model=ovam.name
    )
    plain = ovam.segment(picture, ["cat", "dog"], crf=False)
    with_token = ovam.segment(picture, ["cat", "dog", token], crf=False, tau=0.9, resolutions=[8])
    assert with_token.labels == ["cat", "dog", "cat (token)"]
    assert with_token.presence[:2] == pytest.approx(plain.presence)  # whatever grids and thresholds are asked for
    assert 0 < with_token.presence[2] < 1
    alone = ovam.segment(picture, [token], crf=False)
    assert alone.presence == pytest.approx(with_token.presence[2:])  # whatever is asked beside it
    assert ovam.segment(picture, ["cat", "dog"], method="DAAM").presence == pytest.approx(plain.presence)
    goca = ovam.segment(picture, ["cat", "dog"], method="GoCA, any word")
    assert goca.presence == pytest.approx(plain.presence)
    tokens = ovam.segment(picture, sentence="a cat", crf=False)
    assert [x is None for x in tokens.presence] == [label != "cat" for label in tokens.labels]


def test_rivals_are_read_once(ovam, picture, monkeypatch):
    read = []
    monkeypatch.setattr(
        "ovam_core.presence.attribute_words", lambda pipe, words: read.append(words) or attribute_words(pipe, words)
    )
    ovam.segment(picture, ["cat"], crf=False)
    assert read == []
    with torch.no_grad():
        weight = ovam.pipe.text_encoder.get_input_embeddings().weight
        before = weight.clone()
        weight.mul_(1.001)
    try:
        ovam.segment(picture, ["cat"], crf=False)
        assert len(read) == len(SCENERY) + 2
    finally:
        with torch.no_grad():
            weight.copy_(before)


def test_in_the_files_and_without_it(ovam, picture, tmp_path):
    found = ovam.segment(picture, ["cat", "dog"], crf=False)
    found.save(tmp_path)
    rows = json.loads((tmp_path / "settings.json").read_text())["words"]
    assert [row["presence"] for row in rows] == [round(x, 4) for x in found.presence]
    found.presence = []  # made by hand, or by an older version
    assert all("presence" not in row for row in json.loads(found.files()["settings.json"])["words"])
    older = SegmentSettings.from_json({"words": ["cat"], "steps": None})
    assert ovam.answer(picture, older).presence[0] == pytest.approx(ovam.segment(picture, "cat").presence[0])


# ------------------------------------------------------------------------------------------------ export


def exported(ovam, folder, **given):
    prompts = parse_prompts("a cat, a dog and a bus")
    work = work_list(prompts, ("cat", "dog", "bus"))
    given["filters"] = Filters(min_coverage=0, max_coverage=1, clip_drop=0)
    small = {"threads": 1, "steps": 2, "width": 64, "height": 64, "crf": False, "formats": ("voc", "parquet")}
    summary = export_dataset(ovam, work, ExportSettings.for_model(ovam, **small, **given), folder, workers=0)
    return list(summary.rows)


def labels(folder, row):
    return np.asarray(Image.open(folder / row["mask_file_name"]))


def test_export_leaves_out_what_is_not_there(ovam, tmp_path):
    plain = exported(ovam, tmp_path / "plain")
    said = exported(ovam, tmp_path / "said", min_presence=0.0)
    assert all("presences" not in row for row in plain)
    assert [{k: v for k, v in row.items() if k != "presences"} for row in said] == plain
    for row in plain:
        name = row["mask_file_name"]
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "said" / name).read_bytes()
    scores = sorted(score for row in said for score in row["presences"])
    least = (scores[0] + scores[1]) / 2
    left = exported(ovam, tmp_path / "left", min_presence=least)
    dropped = 0
    for row in left:
        for label, score, share in zip(row["class_ids"], row["presences"], row["coverages"], strict=True):
            assert score < least or (labels(tmp_path / "left", row) == label).mean() == pytest.approx(share, abs=1e-6)
            if score < least:
                dropped += 1
                assert share == 0
                assert label not in labels(tmp_path / "left", row)
    assert dropped == 1
    none = exported(ovam, tmp_path / "none", min_presence=1.0, uncertain=0.5)
    assert all(not labels(tmp_path / "none", row).any() and row["coverage"] == 0 for row in none)

    table = pq.read_table(tmp_path / "said" / PARQUET)
    assert "presences" in table.column_names


@pytest.mark.parametrize("value", [-0.1, 1.5, math.nan, "much"])
def test_a_presence_that_cannot_be(ovam, value):
    with pytest.raises(InputError, match="The min presence"):
        ExportSettings.for_model(ovam, width=64, height=64, crf=False, min_presence=value).validate(ovam)


def test_the_settings_of_an_export_without_it_are_as_before(ovam):
    assert "min_presence" not in ExportSettings.for_model(ovam).to_json()
    assert ExportSettings.for_model(ovam, min_presence=0.3).to_json()["min_presence"] == 0.3


def test_words_in_a_sentence_share_a_prompt(ovam, picture):
    prompt = words_in_sentence(ovam.pipe, "a cat and a dog", ["cat", "dog"])
    found = ovam.segment(picture, ["cat", "dog"], sentence="a cat and a dog", crf=False)
    rivals = attribute_words(ovam.pipe, ["cat", "red bus", *SCENERY])
    compared = torch.ones(2, len(rivals), dtype=torch.bool)
    compared[0, 0] = False
    assert found.presence == pytest.approx(raw_presence(picture.recording, [prompt], rivals, compared))


# ------------------------------------------------------------------------------------------------ benchmark


def test_the_area_is_the_share_of_pairs_in_order():
    present, absent = [0.9, 0.5, 0.4], [0.5, 0.1, 0.4, 0.3]
    pairs = [(a > b) + (a == b) / 2 for a in present for b in absent]
    assert area(present, absent) == pytest.approx(np.mean(pairs))
    assert math.isnan(area([], absent))


def test_the_constants_put_a_half_between_present_and_absent():
    scores = {"present": [0.20, 0.22, 0.26, 0.11], "absent": [0.08, 0.09, 0.10, 0.21] * 5}
    asked = [Asked(0, kind, {CHOSEN: score}) for kind, values in scores.items() for score in values]
    line = fitted(asked, CHOSEN)
    assert line[0] > 0
    assert calibrated(0.10, *line) < 0.5 < calibrated(0.20, *line)


def test_what_is_drawn_is_present_whatever_was_asked():
    labels = np.zeros((100, 100), np.uint8)
    labels[:20] = 8  # cat
    labels[50, :50] = 7  # car: half a percent, neither there nor gone
    kinds = kinds_of(labels, ("cat", "dog"))
    assert (kinds["cat"], kinds["dog"], kinds["bus"]) == ("present", "asked", "absent")
    assert (kinds["kitten"], kinds["animal"], kinds["banana"]) == ("synonym", "hypernym", "unknown")
    assert "car" not in kinds
