"""The quality tables and the making of the shipped tokens, small, with a stand-in for the trained annotator."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import classes, quality, rendered
from benchmarks import optimize as optimize_table
from ovam_core import OVAM, Picture, Token, tokens
from ovam_core.attention.heatmap import attribute, resize
from ovam_core.attention.mask import make_masks
from ovam_core.data.metrics import confusion
from ovam_core.hooks.photograph import record_image
from ovam_core.models.presets import recommended_grids, recommended_part
from ovam_core.optimization import initial_embedding
from ovam_core.query import words_in_sentence
from training import annotated, backgrounds, world
from training.nouns import VOC_CLASSES

CLASSES = ("bird", "potted plant")
PROMPT = "A photograph of a {}"
ROUNDING = 1e-9
ROOT = Path(__file__).parent.parent


def stand_in(images, number=None):
    """Label maps: a disk of the class whose turn it is."""
    rows, columns = np.mgrid[:128, :128]
    disk = (rows - 64) ** 2 + (columns - 64) ** 2 < 40**2
    labels = np.zeros((len(images), 128, 128), np.uint8)
    for label_map in labels:
        label_map[disk] = number or 3
        label_map[:20, :30] = 16
    return labels


@pytest.fixture(scope="module")
def ovam():
    return OVAM.from_pretrained("emoji-voc", "cpu")


@pytest.fixture
def library(ovam, tmp_path):
    for name in CLASSES:
        token = Token(initial_embedding(ovam.pipe, [name]), ("background", name), "emoji-voc")
        token.save(tmp_path / "tokens" / tokens.file_name([name]))
    return tmp_path / "tokens"


def options(tmp_path, library):
    return [
        "--smoke",
        "--classes",
        *CLASSES,
        "--tokens",
        str(library),
        "--work",
        str(tmp_path / "work"),
        "--out",
        str(tmp_path / "out"),
    ]


@pytest.mark.slow
def test_smoke_subset_of_the_quality_tables(ovam, tmp_path, library):
    assert quality.main(options(tmp_path, library), stand_in, ovam) == 0
    figures = json.loads((tmp_path / "out" / "quality.json").read_text())
    text = (tmp_path / "out" / "quality.md").read_text()
    assert list(figures["sets"]) == ["voc-sim", "captions"]
    for figures_of_set in figures["sets"].values():
        rows = figures_of_set["rows"]
        methods = {(row["name"], row["asked"]) for row in rows if row["table"] == "Methods"}
        all_of_it = ("DAAM, all grids and steps", "OVAM, all grids and steps")
        assert methods == {
            (name, kind)
            for name in ("DAAM", "OVAM", "OVAM, own tau", "Attn2Mask", *all_of_it)
            for kind in ("name", "token")
        }
        assert {row["table"] for row in rows} == {
            "Methods",
            "Post-processing",
            "Ceiling",
            "Resolutions",
            "Steps",
            "Alpha",
            "Refinements",
        }
        assert sum(row["table"] == "Resolutions" for row in rows) == 2 * (2**4 - 1)  # sets of four grids
        for row in rows:
            # Of two images the bootstrap draws each one alone as well: the mIoU of both lies between theirs.
            assert row["n"] == 2
            assert 0 <= row["low"] <= row["miou"] + ROUNDING
            assert row["miou"] <= row["high"] + ROUNDING
            assert row["high"] <= 100
            assert row["best_low"] <= row["best_miou"] + ROUNDING
            assert row["best_miou"] <= row["best_high"] + ROUNDING
        assert sum(row["low"] < row["high"] for row in rows) > len(rows) / 2  # the images differ
    scenes = {row["name"]: row for row in figures["rendered"]}
    assert {"OVAM, name", "OVAM, token", "GoCA", "GoCA without propagation", "GoCA + token"} <= set(scenes)
    assert {row["n"] for row in scenes.values()} == {2}
    assert all(0 <= row["miou"] <= 100 for row in scenes.values())
    assert scenes["OVAM, name"]["over"][0] == 0
    for words in ("GoCA without rescaling", "exact masks", "Token over name", "Attn2Mask, token"):
        assert words in text
    assert " nan" not in text

    # Again: nothing is generated, and the figures are the same.
    def never(*_):
        raise AssertionError("an image was made again")

    assert quality.main(options(tmp_path, library), never, ovam) == 0
    assert json.loads((tmp_path / "out" / "quality.json").read_text()) == figures
    assert not list(tmp_path.rglob("*.jpg"))


@pytest.mark.slow
def test_a_run_that_was_cut_off_goes_on(ovam, tmp_path, library):
    seen = []

    def twice(images):
        seen.append(1)
        if len(seen) > 1:
            raise KeyboardInterrupt
        return stand_in(images)

    with pytest.raises(KeyboardInterrupt):
        quality.main(options(tmp_path, library), twice, ovam)
    (lines,) = (tmp_path / "work" / "voc-sim").glob("*.jsonl")
    lines.write_text(lines.read_text() + '{"key": "bird-10')  # killed while it wrote
    seen.clear()

    def count(images):
        seen.append(1)
        return stand_in(images)

    quality.main(options(tmp_path, library), count, ovam)
    assert len(seen) == 7  # of 8 annotated images, one was there


def test_a_row_is_the_packages_own_mask(ovam, library):
    ((image, recording),) = annotated.generations(ovam.pipe, ["A photograph of a bird"], [7], steps=3)
    token = Token.load(library / "bird.safetensors")
    queries = quality.queries_of(ovam, "bird", token)
    rows = [
        row
        for row in quality.main_rows(3, [16, 8, 4], ovam.preset)
        if row.table == "Methods" or row.resolutions == (16, 8)
    ]
    truth = stand_in([image])[0] == 3
    results = quality.evaluate(ovam, Picture(image, recording), truth, queries, rows)
    for row in rows:
        part = quality.part_of(row, ovam, recording)
        with torch.no_grad():
            maps = attribute(part, queries[row.kind].attribution)
        mask = make_masks(part, maps, image, tau=row.tau, alpha=row.alpha, crf=row.crf)[0]
        assert results[row.key]["counts"] == confusion(mask, truth).tolist()


def test_the_rows_of_the_methods_are_what_a_user_is_given(ovam, library):
    """`OVAM.segment` at the published thresholds finds the same pixels."""
    ((image, recording),) = annotated.generations(ovam.pipe, ["A photograph of a bird"], [7], steps=3)
    token = Token.load(library / "bird.safetensors")
    rows = {
        row.key: row
        for row in quality.main_rows(3, [16, 8, 4], ovam.preset)
        if row.key in ("Methods / OVAM / name", "Methods / OVAM / token", "Methods / DAAM / name")
    }
    truth = stand_in([image])[0] == 3
    picture = Picture(image, recording)
    results = quality.evaluate(ovam, picture, truth, quality.queries_of(ovam, "bird", token), list(rows.values()))
    for key, row in rows.items():
        words_or_token = {"queries": [token]} if row.kind == "token" else {"queries": ["bird"], "template": PROMPT}
        segmentation = ovam.segment(picture, **words_or_token, method=row.name, tau=row.tau, alpha=row.alpha)
        assert results[key]["counts"] == confusion(segmentation.masks[0], truth).tolist()


def test_a_perfect_map_is_cut_by_the_grid_alone(ovam):
    """Cells of 8 x 8 pixels: edges on them are found at a half, and lie further in at the paper's 0.8."""
    ((_, recording),) = annotated.generations(ovam.pipe, ["A photograph of a bird"], [7], steps=3)
    truth = np.zeros((128, 128), bool)
    truth[32:96, 32:96] = True
    exact = quality.perfect_map(truth, recommended_grids(ovam.pipe, recording))
    assert exact.shape == (16, 16)
    assert exact.unique().tolist() == [0, 1]
    assert exact.sum() == 64
    shown = resize(exact[None], (128, 128))[0].numpy()
    kept = {tau: (shown >= tau).sum() / truth.sum() for tau in (0.5, 0.8)}
    assert kept[0.5] == pytest.approx(1, abs=0.02)
    assert 0.8 < kept[0.8] < 0.9


def test_the_rendered_scenes_are_measured_by_the_packages_own_masks(ovam, library):
    """A row's counts are those of masks made by hand; the caption lists the objects and the place."""
    loaded = {name: Token.load(library / tokens.file_name([name])) for name in CLASSES}
    ((seed, scene),) = rendered.scenes(1, CLASSES)
    assert set(scene.nouns) == set(CLASSES)
    assert seed >= rendered.FIRST_SCENE
    caption = rendered.caption_for(scene)
    for name in (*CLASSES, backgrounds.BACKGROUNDS[scene.background][0]):
        assert name in caption
    figures = {row["name"]: row for row in rendered.measure(ovam, loaded, 1)}
    assert figures[rendered.BASE]["over"] == figures[rendered.TUNED]["over_tuned"] == [0, 0, 0]
    image = Image.fromarray(scene.image)
    recording = recommended_part(ovam.pipe, record_image(ovam.pipe, image, caption, seed=seed))
    scores = []
    for name in scene.nouns:
        maps = attribute(recording, words_in_sentence(ovam.pipe, f"A photograph of a {name}", [name]))
        mask = make_masks(recording, maps, image, tau=0.4, alpha=0.85, crf=True)[0]
        truth = scene.labels == world.LABELS[name]
        scores.append((mask & truth).sum() / (mask | truth).sum())
    assert figures["OVAM, name"]["miou"] == pytest.approx(100 * np.mean(scores))


def test_seeds_and_captions_of_the_tables(library):
    first = quality.planned_images("voc-sim", 1000, 3, 0, CLASSES)
    assert [image.seed for image in first] == [1000, 1001, 1002] * 2
    assert min(image.seed for image in first) > max(annotated.SEEDS)
    captions = quality.planned_images("captions", 1000, 0, 40, VOC_CLASSES)
    assert len({image.key for image in captions}) == 40
    others = quality.planned_images("captions", 2000, 0, 40, VOC_CLASSES)
    assert not {image.key for image in captions} & {image.key for image in others}
    assert any(name not in image.prompt for image in captions for name in image.classes)  # by another word
    with pytest.raises(SystemExit):
        quality.main(["--first-seed", "3"])
    with pytest.raises(ValueError, match="no token for aeroplane"):
        quality.main(["--tokens", str(library)], stand_in, object())


def test_main_object():
    labels = stand_in([None])[0]
    assert quality.main_object(labels, ("bird", "potted plant")) == "bird"
    assert quality.main_object(labels, ("potted plant",)) == "potted plant"
    assert quality.main_object(labels, ("cat",)) is None


def test_images_made_together_are_those_made_alone(ovam):
    prompts = ["a cat", "a dog", "a bus"]
    together = list(annotated.generations(ovam.pipe, prompts, [1, 2, 3], steps=2, batch=2))
    assert len(together) == 3
    for (image, recording), prompt, seed in zip(together, prompts, [1, 2, 3], strict=True):
        ((image_alone, recording_alone),) = annotated.generations(ovam.pipe, [prompt], [seed], steps=2)
        assert np.abs(np.asarray(image, int) - np.asarray(image_alone, int)).max() <= 2
        queries, queries_alone = recording.layers[0].queries, recording_alone.layers[0].queries
        torch.testing.assert_close(queries, queries_alone, atol=1e-3, rtol=1e-3)


@pytest.mark.slow
def test_the_script_that_makes_the_shipped_tokens(ovam, tmp_path, monkeypatch):
    turns = []

    def annotate(_network, images):
        turns.append(1)
        return stand_in(images, 3 if len(turns) % 2 == 0 else 9)  # every other image shows a chair

    monkeypatch.setattr(annotated.annotator, "load", lambda: None)
    monkeypatch.setattr(annotated.annotator, "annotate", annotate)
    monkeypatch.setattr(annotated.OVAM, "from_pretrained", lambda *_: ovam)
    folder, out = tmp_path / "folder", tmp_path / "tokens"
    small = ["--steps", "2", "--epochs", "2", "--classes", "bird", "chair", "--unlabelled", "1"]
    assert annotated.main(["--folder", str(folder), "--out", str(out), *small]) == 0
    row, other = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert (other["class"], other["seed"]) == ("chair", annotated.SEEDS[0])
    assert (row["class"], row["seed"]) == ("bird", annotated.SEEDS[1])
    assert (np.asarray(Image.open(folder / row["mask"])) > 0).sum() == (stand_in([0])[0] == 3).sum()
    token = Token.load(out / "bird.safetensors")
    assert (token.names, token.seed, token.prompt) == (("bird",), row["seed"], "A photograph of a bird")
    how = json.loads(token.settings)["optimization"]
    assert (how["images"], how["unlabelled"], how["stay"]) == (1, 1, annotated.PROXIMITY)
    assert token.rivals in (1, 2)
    assert set(token.classes[2:]) < set(VOC_CLASSES)
    with pytest.raises(ValueError, match="shows a cat"):
        annotated.find(ovam.pipe, None, "cat", steps=1, seeds=[1, 2])


@pytest.mark.slow
def test_the_table_of_recipes(ovam, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(optimize_table.OVAM, "from_pretrained", lambda *_: ovam)
    monkeypatch.setattr(optimize_table.annotator, "load", lambda: None)
    monkeypatch.setattr(optimize_table.annotator, "annotate", lambda _, images: stand_in(images))
    small = {"paper": optimize_table.CANDIDATES["paper"], "fast": optimize_table.CANDIDATES["fast"]}
    monkeypatch.setattr(optimize_table, "CANDIDATES", small)
    file = tmp_path / "table.json"
    assert optimize_table.main(["--quick", "--classes", "bird", "--steps", "2", "--json", str(file)]) == 0
    said = capsys.readouterr().out
    for words in ("| recipe | loss at 1 |", "class name", "fast"):
        assert words in said
    rows = {row["recipe"]: row for row in json.loads(file.read_text())}
    assert len(rows["fast"]["losses"]) == 25
    assert rows["fast"]["losses"][-1] <= rows["paper"]["losses"][-1] <= rows["paper"]["losses"][0]


def test_classes_are_drawn_from_the_table(tmp_path):
    figures = json.loads((ROOT / "benchmarks/quality.json").read_text())
    found = classes.panels(figures)
    assert [title for title, _, _ in found] == [
        f"{method}, {about}" for about in ("one object", "several objects") for method in classes.METHODS
    ]
    (row,) = (
        row["by_class"]
        for row in figures["sets"]["voc-sim"]["rows"]
        if (row["table"], row["name"], row["asked"]) == ("Methods", "OVAM, own tau", "token")
    )
    _, names, values = found[2]
    assert dict(zip(names, values["token"], strict=True)) == row
    assert (np.diff(values["token"]) >= 0).all()
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib")
    assert classes.main(["--out", str(tmp_path / "classes.png")]) == 0
    with Image.open(tmp_path / "classes.png") as image:
        assert image.size == (1210, 990)
