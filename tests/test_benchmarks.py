"""The quality tables and the making of the shipped tokens, small, with a stand-in for the trained annotator."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import optimize as optimize_table
from benchmarks import quality, rendered
from ovam_core import tokens
from ovam_core.attention.heatmap import attribute, resize
from ovam_core.attention.mask import make_masks
from ovam_core.data.metrics import confusion
from ovam_core.hooks.photograph import record_image
from ovam_core.models.load import load_pipeline
from ovam_core.models.presets import own_choice
from ovam_core.optimization import initial_embedding
from ovam_core.query import words_in_sentence
from ovam_core.tokens import Token
from training import annotated, backgrounds, world
from training.nouns import VOC_CLASSES

CLASSES = ("bird", "potted plant")


def stand_in(images, number=None):
    """Label maps: a disk of the class whose turn it is."""
    rows, columns = np.mgrid[:128, :128]
    disk = (rows - 64) ** 2 + (columns - 64) ** 2 < 40**2
    labels = np.zeros((len(images), 128, 128), np.uint8)
    for one in labels:
        one[disk] = number or 3
        one[:20, :30] = 16
    return labels


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline("emoji-voc", "cpu")


@pytest.fixture
def shelf(pipe, tmp_path):
    for name in CLASSES:
        token = Token(initial_embedding(pipe, [name]), ("background", name), "emoji-voc")
        tokens.save(tmp_path / "tokens" / tokens.file_name([name]), token)
    return tmp_path / "tokens"


def options(tmp_path, shelf):
    return [
        "--smoke",
        "--classes",
        *CLASSES,
        "--tokens",
        str(shelf),
        "--work",
        str(tmp_path / "work"),
        "--out",
        str(tmp_path / "out"),
    ]


def test_smoke_subset_of_the_quality_tables(pipe, tmp_path, shelf, capsys):
    assert quality.main(options(tmp_path, shelf), stand_in, pipe) == 0
    figures = json.loads((tmp_path / "out" / "quality.json").read_text())
    text = (tmp_path / "out" / "quality.md").read_text()
    assert list(figures["sets"]) == ["voc-sim", "captions"]
    for one in figures["sets"].values():
        methods = {(row["name"], row["asked"]) for row in one["rows"] if row["table"] == "Methods"}
        all_of_it = ("DAAM, all grids and steps", "OVAM, all grids and steps")
        assert methods == {
            (name, asked)
            for name in ("DAAM", "OVAM", "OVAM, own tau", "Attn2Mask", *all_of_it)
            for asked in ("name", "token")
        }
        assert {row["table"] for row in one["rows"]} == {
            "Methods",
            "Post-processing",
            "Ceiling",
            "Resolutions",
            "Steps",
            "Alpha",
        }
        assert sum(row["table"] == "Resolutions" for row in one["rows"]) == 14
        for row in one["rows"]:
            assert 0 <= row["low"] <= row["miou"] <= row["high"] <= 100 or row["n"] < 5
            assert 0 <= row["best_miou"] <= 100
    apart = {row["name"]: row for row in figures["rendered"]}
    assert {"OVAM, name", "OVAM, token", "GoCA", "GoCA without propagation", "GoCA + token"} <= set(apart)
    assert (
        all(0 <= row["miou"] <= 100 and row["n"] == 2 for row in apart.values()) and apart["OVAM, name"]["over"][0] == 0
    )
    assert "GoCA without rescaling" in text and "exact masks" in text
    assert "Token over name" in text and "Attn2Mask, token" in text and " nan" not in text

    # Again: nothing is generated, and the figures are the same.
    def never(*_):
        raise AssertionError("an image was made again")

    assert quality.main(options(tmp_path, shelf), never, pipe) == 0
    assert json.loads((tmp_path / "out" / "quality.json").read_text()) == figures
    assert not list(tmp_path.rglob("*.jpg"))


def test_a_run_that_was_cut_off_goes_on(pipe, tmp_path, shelf):
    seen = []

    def twice(images):
        seen.append(1)
        if len(seen) > 1:
            raise KeyboardInterrupt
        return stand_in(images)

    with pytest.raises(KeyboardInterrupt):
        quality.main(options(tmp_path, shelf), twice, pipe)
    (lines,) = (tmp_path / "work" / "voc-sim").glob("*.jsonl")
    lines.write_text(lines.read_text() + '{"key": "bird-10')  # killed while it wrote
    seen.clear()

    def count(images):
        seen.append(1)
        return stand_in(images)

    quality.main(options(tmp_path, shelf), count, pipe)
    assert len(seen) == 7  # of 8 annotated images, one was there


def test_a_row_is_the_packages_own_mask(pipe, shelf):
    ((image, recording),) = annotated.generations(pipe, ["A photograph of a bird"], [7], steps=3)
    loaded = {name: tokens.load(shelf / tokens.file_name([name])) for name in CLASSES}
    asked = quality.asked_of(pipe, "bird", loaded)
    rows = [
        row
        for row in quality.main_rows(3, [16, 8, 4], quality.own_cuts(pipe))
        if row.table == "Methods" or row.resolutions == (16, 8)
    ]
    truth = stand_in([image])[0] == 3
    with torch.no_grad():
        results = quality.evaluate(pipe, image, recording, truth, asked, rows)
        for row in rows:
            part = quality.chosen_by(row, pipe, recording)
            maps = attribute(part, asked[row.asked])
            mask = make_masks(part, maps, image, tau=row.tau, alpha=row.alpha, crf=row.crf)[0]
            assert results[row.key]["counts"] == confusion(mask, truth).tolist()


def test_a_perfect_map_is_cut_by_the_grid_alone(pipe):
    """Cells of 8 x 8 pixels: edges on them are found at a half, and lie further in at the paper's 0.8."""
    ((_, recording),) = annotated.generations(pipe, ["A photograph of a bird"], [7], steps=3)
    truth = np.zeros((128, 128), bool)
    truth[32:96, 32:96] = True
    exact = quality.perfect_map(truth, quality.own_grids(pipe, recording))
    assert exact.shape == (16, 16) and exact.unique().tolist() == [0, 1] and exact.sum() == 64
    shown = resize(exact[None], (128, 128))[0].numpy()
    kept = {tau: (shown >= tau).sum() / truth.sum() for tau in (0.5, 0.8)}
    assert kept[0.5] == pytest.approx(1, abs=0.02) and 0.8 < kept[0.8] < 0.9


def test_the_rendered_scenes_are_measured_by_the_packages_own_masks(pipe, shelf):
    """A row's counts are those of masks made by hand; the caption lists the objects and the place."""
    loaded = {name: tokens.load(shelf / tokens.file_name([name])) for name in CLASSES}
    ((seed, made),) = rendered.scenes(1, CLASSES)
    assert set(made.nouns) == set(CLASSES) and seed >= rendered.FIRST_SCENE
    caption = rendered.caption_for(made)
    assert all(name in caption for name in CLASSES) and backgrounds.BACKGROUNDS[made.background][0] in caption
    found = {row["name"]: row for row in rendered.measure(pipe, loaded, 1)}
    picture = Image.fromarray(made.image)
    recording = own_choice(pipe, record_image(pipe, picture, caption, seed=seed))
    scores = []
    for name in made.nouns:
        maps = attribute(recording, words_in_sentence(pipe, f"A photograph of a {name}", [name]))
        mask = make_masks(recording, maps, picture, tau=0.4, alpha=0.85, crf=True)[0]
        truth = made.labels == world.LABELS[name]
        scores.append((mask & truth).sum() / (mask | truth).sum())
    assert found["OVAM, name"]["miou"] == pytest.approx(100 * np.mean(scores))


def test_seeds_and_captions_of_the_tables(tmp_path, shelf):
    first = quality.pictures("voc-sim", 1000, 3, 0, CLASSES)
    assert [one.seed for one in first] == [1000, 1001, 1002] * 2
    assert min(one.seed for one in first) > max(annotated.SEEDS)
    captions = quality.pictures("captions", 1000, 0, 40, VOC_CLASSES)
    assert len({one.key for one in captions}) == 40
    others = quality.pictures("captions", 2000, 0, 40, VOC_CLASSES)
    assert not {one.key for one in captions} & {one.key for one in others}
    assert any(name not in one.prompt for one in captions for name in one.classes)  # by another word
    with pytest.raises(SystemExit):
        quality.main(["--first-seed", "3"])
    with pytest.raises(ValueError, match="no token for aeroplane"):
        quality.main(["--tokens", str(shelf)], stand_in, object())


def test_main_object():
    labels = stand_in([None])[0]
    assert quality.main_object(labels, ("bird", "potted plant")) == "bird"
    assert quality.main_object(labels, ("potted plant",)) == "potted plant"
    assert quality.main_object(labels, ("cat",)) is None


def test_images_made_together_are_those_made_alone(pipe):
    prompts = ["a cat", "a dog", "a bus"]
    together = list(annotated.generations(pipe, prompts, [1, 2, 3], steps=2, batch=2))
    assert len(together) == 3
    for (image, recording), prompt, seed in zip(together, prompts, [1, 2, 3], strict=True):
        ((alone, own),) = annotated.generations(pipe, [prompt], [seed], steps=2)
        assert np.abs(np.asarray(image, int) - np.asarray(alone, int)).max() <= 2
        torch.testing.assert_close(recording.layers[0].queries, own.layers[0].queries, atol=1e-3, rtol=1e-3)


def test_the_script_that_makes_the_shipped_tokens(pipe, tmp_path, monkeypatch, capsys):
    turns = []

    def annotate(network, images):
        turns.append(1)
        return stand_in(images, 3 if len(turns) % 2 == 0 else 9)  # every other image shows a chair

    monkeypatch.setattr(annotated.annotator, "load", lambda: None)
    monkeypatch.setattr(annotated.annotator, "annotate", annotate)
    monkeypatch.setattr(annotated, "load_pipeline", lambda *_: pipe)
    folder, out = tmp_path / "folder", tmp_path / "tokens"
    asked = ["--folder", str(folder), "--out", str(out), "--steps", "2", "--epochs", "2"]
    assert annotated.main([*asked, "--classes", "bird", "chair"]) == 0
    row, other = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert (other["class"], other["seed"]) == ("chair", annotated.SEEDS[0])
    assert row["seed"] == annotated.SEEDS[1] and row["class"] == "bird"
    assert (np.asarray(Image.open(folder / row["mask"])) > 0).sum() == (stand_in([0])[0] == 3).sum()
    token = tokens.load(out / "bird.safetensors")
    assert (token.names, token.seed, token.prompt) == (("bird",), row["seed"], "A photograph of a bird")
    how = json.loads(token.settings)["optimization"]
    assert (how["images"], how["others"], how["apart"], how["stay"]) == (1, 1, annotated.APART, annotated.STAY)
    with pytest.raises(ValueError, match="shows a cat"):
        annotated.find(pipe, None, "cat", steps=1, seeds=[1, 2])


def test_the_table_of_recipes(pipe, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(optimize_table, "load_pipeline", lambda *_: pipe)
    monkeypatch.setattr(optimize_table.annotator, "load", lambda: None)
    monkeypatch.setattr(optimize_table.annotator, "annotate", lambda _, images: stand_in(images))
    small = {"paper": optimize_table.CANDIDATES["paper"], "fast": optimize_table.CANDIDATES["fast"]}
    monkeypatch.setattr(optimize_table, "CANDIDATES", small)
    file = tmp_path / "table.json"
    assert optimize_table.main(["--quick", "--classes", "bird", "--steps", "2", "--json", str(file)]) == 0
    said = capsys.readouterr().out
    assert "| recipe | loss at 1 |" in said and "class name" in said and "fast" in said
    rows = {one["recipe"]: one for one in json.loads(file.read_text())}
    assert len(rows["fast"]["losses"]) == 25
    assert rows["fast"]["losses"][-1] <= rows["paper"]["losses"][-1] <= rows["paper"]["losses"][0]
