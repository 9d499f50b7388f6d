"""The published sets in their own layouts, their captions; a sweep of offsets; annotated images and the tables."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import make_pipe
from reference import assert_refused

from ovam_core import OVAM, methods
from ovam_core.attention.goca import label_pixels
from ovam_core.attention.heatmap import attribute, heatmaps, resize
from ovam_core.attention.mask import make_masks
from ovam_core.cli import main
from ovam_core.data.annotated import read_annotated
from ovam_core.data.evaluate import EvaluateSettings, evaluate_dataset, found_labels, make_job, set_queries
from ovam_core.data.label_folder import read_set
from ovam_core.data.label_sets import COCO_NUMBERS, COCO_STUFF_27, LABEL_SETS, Protocol, label_set
from ovam_core.data.voc import VOC_CLASSES
from ovam_core.errors import InputError
from ovam_core.hooks.photograph import record_image
from ovam_core.io.masks import read_mask
from ovam_core.methods import GOCA, GOCA_ANY
from ovam_core.models.presets import recommended_part
from ovam_core.optimization import OptimizeSettings, optimize
from ovam_core.query import attribute_words, caption_of, caption_words, words_in_sentence
from ovam_core.settings import CROSS_ENTROPY, RECIPES, SET_NAMES, TABLES, GenerateSettings, parse_offsets
from ovam_core.tokens import Token

SIDE = 64


@pytest.fixture(scope="module")
def ovam():
    pipe = make_pipe()
    pipe.ovam_name = "tiny"
    return OVAM(pipe)


def photograph(file, seed=0):
    file.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(noise).resize((SIDE, SIDE)).save(file)


def numbers(*values):
    """A map of vertical stripes of these numbers."""
    row = np.repeat(np.array(values, np.uint8), SIDE // len(values))
    return np.broadcast_to(np.pad(row, (0, SIDE - len(row)), mode="edge"), (SIDE, SIDE))


def write_map(file, *values):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.ascontiguousarray(numbers(*values))).save(file)


def seen(data, place=0):
    """The labels of an image's stripes, from left to right."""
    row = data.truth(data.work.items[place])[0]
    return [int(row[0])] + [int(b) for a, b in pairwise(row) if a != b]


# ------------------------------------------------------------------------------------------ names and numbers


def test_the_lists_are_the_fields_own():
    assert tuple(LABEL_SETS) == SET_NAMES
    assert {name: len(one.classes) for name, one in LABEL_SETS.items()} == {
        "voc": 20,
        "pascal-context-59": 59,
        "pascal-context-60": 59,
        "coco-object": 80,
        "coco-stuff-27": 27,
        "cityscapes": 19,
        "ade20k": 150,
    }
    for name, known in {
        "pascal-context-59": {1: "aeroplane", 2: "bag", 37: "person", 40: "pottedplant", 55: "tvmonitor", 59: "wood"},
        "coco-object": {1: "person", 10: "traffic light", 63: "tv", 80: "toothbrush"},
        "coco-stuff-27": {1: "electronic-things", 10: "person-things", 13: "ceiling-stuff", 27: "water-stuff"},
        "cityscapes": {1: "road", 9: "vegetation", 12: "person", 19: "bicycle"},
        "ade20k": {1: "wall", 9: "windowpane", 13: "person", 90: "television receiver", 150: "flag"},
    }.items():
        assert {label: LABEL_SETS[name].classes[label - 1] for label in known} == known
    for one in LABEL_SETS.values():
        words = [one.word(name) for name in one.classes]
        assert len(set(words)) == len(words)
    with pytest.raises(InputError, match="choose among voc, pascal"):
        label_set("kitti")


def test_171_classes_merge_into_27():
    """Against the table of the public implementations, stuff from 91 on: the super-category of each number."""
    public = (
        "17 17 22 20 20 22 15 25 16 13 12 12 17 17 23 15 15 17 15 21 15 25 13 13 13 13 13 22 26 14 14 15 22 21 21 24 "
        "20 22 15 17 16 15 22 24 21 17 25 16 21 17 22 16 21 21 25 21 26 21 24 20 17 14 21 26 15 23 20 21 24 15 24 22 "
        "25 15 20 17 17 22 14 18 18 18 18 18 18 18 26 26 19 19 24"
    )
    coarse = {number: place for place, own in enumerate(COCO_STUFF_27.values()) for number in own}
    assert [coarse[number] for number in range(91, 182)] == list(map(int, public.split()))
    ends = [0, 8, 14, 24, 32, 42, 50, 60, 70, 76, 82, 90]
    assert [coarse[end] for end in ends] == [9, 11, 8, 7, 6, 10, 5, 2, 3, 0, 1, 4]
    assert len(COCO_NUMBERS) == 171
    assert COCO_NUMBERS[79:81] == (89, 91)


# ------------------------------------------------------------------------------------------ layouts

CITY = "frankfurt/frankfurt_000000_000294"
LAYOUTS = {
    "voc": ("JPEGImages/a.jpg", "SegmentationClass/a.png", (0, 1, 20, 255), [0, 1, 20, 255]),
    "pascal-context-59": (
        "JPEGImages/a.jpg",
        "SegmentationClassContext/a.png",
        (0, 1, 40, 59, 255),
        [255, 1, 40, 59, 255],
    ),
    "pascal-context-60": ("JPEGImages/a.jpg", "SegmentationClassContext/a.png", (0, 1, 40, 59), [0, 1, 40, 59]),
    "coco-object": ("images/val2017/a.jpg", "annotations/val2017/a_instanceTrainIds.png", (0, 1, 80), [0, 1, 80]),
    "coco-object stuff": (
        "images/val2017/a.jpg",
        "annotations/val2017/a_labelTrainIds.png",
        (0, 11, 79, 80, 170, 255),
        [1, 12, 80, 0],
    ),
    "coco-object raw": (
        "val2017/a.jpg",
        "stuffthingmaps/val2017/a.png",
        (0, 12, 89, 91, 181, 255, 1),
        [1, 12, 80, 0, 2],
    ),
    "coco-stuff-27": (
        "images/val2017/a.jpg",
        "annotations/val2017/a_labelTrainIds_27.png",
        (0, 12, 26, 255),
        [1, 13, 27, 255],
    ),
    "coco-stuff-27 171": (
        "images/val2017/a.jpg",
        "annotations/val2017/a_labelTrainIds.png",
        (0, 79, 80, 170, 255),
        [10, 5, 18, 25, 255],
    ),
    "coco-stuff-27 raw": (
        "images/val2017/a.jpg",
        "stuffthingmaps_trainval2017/val2017/a.png",
        (0, 89, 91, 156, 181, 255),
        [10, 5, 18, 24, 25, 255],
    ),
    "cityscapes": (
        f"leftImg8bit/val/{CITY}_leftImg8bit.png",
        f"gtFine/val/{CITY}_gtFine_labelIds.png",
        (0, 7, 8, 9, 33, 29, 24),
        [255, 1, 2, 255, 19, 255, 12],
    ),
    "cityscapes train": (
        f"leftImg8bit/val/{CITY}_leftImg8bit.png",
        f"gtFine/val/{CITY}_gtFine_labelTrainIds.png",
        (0, 18, 255, 11),
        [1, 19, 255, 12],
    ),
    "ade20k": (
        "images/validation/a.jpg",
        "annotations/validation/a.png",
        (0, 1, 9, 150),
        [255, 1, 9, 150],
    ),
}
LISTS = {"voc": "Segmentation", "pascal-context-59": "SegmentationContext", "pascal-context-60": "SegmentationContext"}
STRANGE = {"voc": 21, "pascal-context-59": 60, "coco-object": 81, "coco-stuff-27": 27, "cityscapes": 34, "ade20k": 151}


def write_set(root, case, *values):
    name = case.split()[0]
    photo, truth, usual, _ = LAYOUTS[case]
    photograph(root / photo)
    write_map(root / truth, *(values or usual))
    if name in LISTS:
        (root / "ImageSets" / LISTS[name]).mkdir(parents=True, exist_ok=True)
        for split in ("train", "val"):
            (root / "ImageSets" / LISTS[name] / f"{split}.txt").write_text("a\n")
    return name


@pytest.mark.parametrize("case", LAYOUTS)
def test_a_set_is_read_in_its_own_layout(case, tmp_path):
    name = write_set(tmp_path, case)
    expected = LAYOUTS[case][3]
    data = read_set(name, tmp_path)
    assert data.names == (("frankfurt_000000_000294",) if name == "cityscapes" else ("a",))
    assert seen(data) == expected
    assert data.labels == ("background", *LABEL_SETS[name].classes)
    present = sorted({label for label in expected if label not in (0, 255)})
    item = data.work.items[0]
    assert data.work.ids(item.classes) == present
    assert item.prompt == caption_of([LABEL_SETS[name].word(one) for one in item.classes])
    whole = read_set(name, tmp_path, void="background")
    assert seen(whole) == [0 if label == 255 else label for label in expected]
    assert whole.has_background
    assert data.has_background == (name in ("voc", "pascal-context-60", "coco-object"))
    assert data.photo(item).read_bytes() == (tmp_path / LAYOUTS[case][0]).read_bytes()


@pytest.mark.parametrize("name", STRANGE)
def test_a_number_that_the_kind_does_not_have(name, tmp_path):
    write_set(tmp_path, name, 0, STRANGE[name])
    with pytest.raises(InputError, match=f"holds the label {STRANGE[name]}"):
        read_set(name, tmp_path)


def test_what_a_set_lacks_is_said(tmp_path):
    for case, part in (
        ("cityscapes", "no folder '.*leftImg8bit"),
        ("ade20k", "no folder '.*images"),
        ("coco-object", "no folder '.*images"),
        ("pascal-context-59", "no folder '.*JPEGImages"),
    ):
        with pytest.raises(InputError, match=part):
            read_set(case, tmp_path / "none")
    write_set(tmp_path, "ade20k")
    (tmp_path / "annotations/validation/a.png").unlink()
    with pytest.raises(InputError, match=r"no label map of 'a'.*: a\.png"):
        read_set("ade20k", tmp_path)
    for arguments, part in (
        ({"split": "../validation"}, "not the name of a split"),
        ({"split": "training"}, "no folder"),
        ({"void": "class"}, "choose ignore or background"),
        ({"limit": 0}, "limit is 0"),
        ({"names_from": tmp_path / "none.txt"}, "no list of images"),
    ):
        with pytest.raises(InputError, match=part):
            read_set("ade20k", tmp_path, **arguments)


def test_names_from_a_list(tmp_path):
    for name in "cab":
        photograph(tmp_path / f"images/validation/{name}.JPG")
        write_map(tmp_path / f"annotations/validation/{name}.png", ord(name) - 90)
    assert read_set("ade20k", tmp_path).names == ("a", "b", "c")
    (tmp_path / "list.txt").write_text("c.jpg\r\nb\r\n")
    assert read_set("ade20k", tmp_path, names_from=tmp_path / "list.txt").names == ("c", "b")
    assert seen(read_set("ade20k", tmp_path, names_from=tmp_path / "list.txt")) == [ord("c") - 90]
    for text, part in (("d\n", "no photograph 'd'"), ("a\na\n", "twice"), ("\n", "names no image")):
        (tmp_path / "list.txt").write_text(text)
        with pytest.raises(InputError, match=part):
            read_set("ade20k", tmp_path, names_from=tmp_path / "list.txt")


# ------------------------------------------------------------------------------------------ captions, words, background


def asked(tmp_path, case, row, **more):
    """The classes, words, background and caption of the one image of a set, for a row of the file of captions."""
    name = write_set(tmp_path, case)
    (tmp_path / "captions.json").write_text(json.dumps({"a.jpg": row}))
    data = read_set(name, tmp_path, classes_from=tmp_path / "captions.json", **more)
    return data.work.items[0].classes, data.asked[0].parts, data.asked[0].background, data.work.items[0].prompt


ROW = {
    "caption": "a man in a jacket by a tree under clouds",
    "entities": {"person": ["man", "jacket"], "tree": "tree", "clouds": ["clouds"]},
    "background": ["grass"],
}


def test_entities_have_words(tmp_path):
    classes, parts, background, caption = asked(tmp_path, "pascal-context-60", ROW)
    assert classes == ("person", "tree")
    assert parts == (("man", "person"), ("jacket", "person"), ("tree", "tree"))
    assert background == ("grass", "clouds")  # what is no class of the set
    assert caption == ROW["caption"]
    assert asked(tmp_path, "pascal-context-60", {**ROW, "background": None})[2] is None
    listed = {"caption": "a dog", "entities": ["dog", "sky"]}
    assert asked(tmp_path, "pascal-context-60", listed)[1] == (("dog", "dog"), ("sky", "sky"))


def test_gocas_protocol(tmp_path):
    """Context: entities that the truth lacks are background, its missing classes are appended."""
    row = {"caption": "a jet over a man", "entities": {"aeroplane": "jet", "person": "man"}, "background": []}
    kind = label_set("pascal-context-60")
    classes, parts, background, caption = asked(
        tmp_path, "pascal-context-60", row | {"background": ["x"]}, protocol=kind.goca
    )
    assert classes == ("aeroplane", "pottedplant", "wood")
    assert parts == (("jet", "aeroplane"), ("potted plant", "pottedplant"), ("wood", "wood"))
    assert background == ("x", "man")
    assert caption == "a jet over a man, potted plant, wood"


def test_the_protocol_of_each_set():
    said = {name: one.goca for name, one in LABEL_SETS.items()}
    assert said == {
        "voc": Protocol("background", append_missing=True, background=True, split="train"),
        "pascal-context-59": Protocol(append_missing=True),
        "pascal-context-60": Protocol(append_missing=True),
        "coco-object": Protocol(background=True),
        "coco-stuff-27": Protocol(append_missing=True),
        "cityscapes": Protocol(),
        "ade20k": Protocol(background=True),
    }


def test_the_protocol_counts_void_as_background(tmp_path):
    row = {"caption": "a jet", "entities": {"aeroplane": ["jet"]}}
    kind = label_set("voc")
    classes, parts, background, caption = asked(tmp_path, "voc", row, protocol=kind.goca)
    assert (classes, caption) == (("aeroplane", "tv"), "a jet, tv, background")
    assert (parts, background) == ((("jet", "aeroplane"), ("tv", "tv")), None)
    name = write_set(tmp_path, "voc")
    assert seen(read_set(name, tmp_path, protocol=kind.goca)) == [0, 1, 20, 0]
    assert (read_set(name, tmp_path).split, read_set(name, tmp_path, protocol=kind.goca).split) == ("val", "train")
    assert read_set(name, tmp_path, "val", protocol=kind.goca).split == "val"
    assert seen(read_set(name, tmp_path, protocol=kind.goca, void="ignore")) == [0, 1, 20, 255]


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ({"caption": "", "entities": {"tree": "tree"}}, "need a caption"),
        ({"entities": {"tree": "tree"}}, "need a caption"),
        ({"caption": "a tree", "entities": {"tree": [3]}}, "need a caption"),
        ({"caption": "a tree", "entities": "tree"}, "need a caption"),
        ({"caption": "a tree", "entities": {"tree": "tree"}, "background": [""]}, "need a caption"),
        ({"caption": "a thing", "entities": {"tree": "thing", "dog": "Thing"}}, "stands for two classes"),
    ],
)
def test_entities_that_are_refused(tmp_path, row, part):
    with pytest.raises(InputError, match=part):
        asked(tmp_path, "pascal-context-60", row)


def test_a_list_of_classes_that_is_too_long_loses_the_smallest(tmp_path, ovam):
    write_set(tmp_path, "ade20k", *range(1, 33), 32)
    data = read_set("ade20k", tmp_path)
    assert len(data.asked[0].parts) == 32
    kept = data.fitted(lambda caption, words: len(caption.split()) <= 12 and words <= 5)
    assert len(kept.asked[0].parts) == 4  # "A photograph of a x, a y, a z and a w"
    areas = np.bincount(data.truth(data.work.items[0]).ravel())
    assert min(areas[label] for label in data.work.ids(kept.work.items[0].classes)) >= np.sort(areas[1:33])[-4]
    assert kept.work.items[0].prompt == kept.asked[0].caption == caption_of([word for word, _ in kept.asked[0].parts])
    settings = EvaluateSettings.for_model(ovam, "daam", threads=1, crf=False)
    assert evaluate_dataset(ovam, data, settings, workers=0).images == 1


# ------------------------------------------------------------------------------------------ the answer


@pytest.fixture
def worded(tmp_path):
    photo, truth = tmp_path / "images/validation/a.jpg", tmp_path / "annotations/validation/a.png"
    photograph(photo)
    write_map(truth, 13, 5, 0)
    row = {
        "caption": "a man in a jacket by a tree on grass",
        "entities": {"person": ["man", "jacket"], "tree": ["tree"]},
        "background": ["grass"],
    }
    (tmp_path / "captions.json").write_text(json.dumps({"a": row}))
    return read_set("ade20k", tmp_path, classes_from=tmp_path / "captions.json")


def test_several_words_are_one_class(worded, ovam):
    settings = EvaluateSettings.for_model(ovam, "daam", threads=1)
    item = worded.work.items[0]
    job = make_job(ovam, worded, item, set_queries(ovam, worded, settings), settings, None)
    image = Image.open(worded.photo(item))
    recording = record_image(ovam.pipe, image, item.prompt, (100,), seed=0)
    words = ["man", "jacket", "tree"]
    maps = attribute(recording, attribute_words(ovam.pipe, words))
    assert np.array_equal(job.masks, make_masks(recording, maps, image, tau=0.4, alpha=1, crf=False))
    assert job.ids == (13, 13, 5)
    assert set(np.unique(found_labels(job))) <= {0, 13, 5}
    result = evaluate_dataset(ovam, worded, settings, workers=0)
    assert result.miou == result.miou_objects  # ADE20K's 0 is no class
    assert result.matrix[0].sum() == 0
    assert result.settings["set"] == "ade20k"


def test_a_class_with_a_token_is_asked_by_it_once(worded, ovam, tmp_path):
    rows = attribute_words(ovam.pipe, ["the cat"])[0].embedding[:2].float()
    Token(rows, ("background", "person"), "tiny").save(tmp_path / "person.safetensors")
    settings = EvaluateSettings.for_model(ovam, "daam", tokens=str(tmp_path), threads=1)
    job = make_job(ovam, worded, worded.work.items[0], set_queries(ovam, worded, settings), settings, None)
    assert job.ids == (13, 5)


@pytest.mark.parametrize("method", [GOCA, GOCA_ANY])
def test_offsets_are_swept_on_one_pass(worded, ovam, method, tmp_path, monkeypatch):
    offsets = (-0.4, 0.0, 0.4)
    settings = EvaluateSettings.for_model(ovam, method.name, threads=1, offsets=offsets)
    passes = []
    look = OVAM.look_at
    monkeypatch.setattr(OVAM, "look_at", lambda self, *a, **k: passes.append(1) or look(self, *a, **k))
    out = tmp_path / "out"
    result = evaluate_dataset(ovam, worded, settings, out, workers=0)
    assert passes == [1]
    item = worded.work.items[0]
    picture = look(ovam, Image.open(worded.photo(item)), settings.photo(item), with_goca=True)
    truth, words = worded.truth(item), ["man", "jacket", "tree"]
    queries = [methods.Query((word,), None) for word in words]
    maps = resize(replace(method, background=("grass",)).heatmaps(ovam.pipe, picture, queries), truth.shape)
    ids = np.array([0, 13, 13, 5])
    for (offset, matrix), expected in zip(result.sweep, offsets, strict=True):
        assert offset == expected
        found = ids[label_pixels(maps[:3], maps[3:], offset).numpy()]
        for row in (13, 5):
            for column in (0, 13, 5):
                assert matrix[row, column] == ((truth == row) & (found == column)).sum()
    assert np.array_equal(result.matrix, result.sweep[1][1])
    assert result.sweep[0][1][:, 0].sum() <= result.sweep[2][1][:, 0].sum()
    about = json.loads((out / "results.json").read_text())
    assert [one["offset"] for one in about["sweep"]] == list(offsets)
    assert [one["miou"] for one in about["sweep"]] == [one.miou for _, one in result.at_offsets()]
    rows = result.text().split("| offset | mIoU % | without the background % |\n")[1].splitlines()[1:]
    assert [row.split("|")[1].strip() for row in rows] == ["-0.4", "0", "0.4"]
    assert [row.split("|")[2].strip() for row in rows] == [f"{100 * one.miou:.1f}" for _, one in result.at_offsets()]
    again = evaluate_dataset(ovam, worded, settings, out, workers=0)
    assert passes == [1]
    assert np.array_equal(again.sweep[2][1], result.sweep[2][1])


def test_the_words_of_the_background_are_those_of_the_file(worded, ovam, monkeypatch):
    seen_words = []

    def asking(pipe, caption, words):
        seen_words.append(list(words))
        return caption_words(pipe, caption, words)

    monkeypatch.setitem(methods.METHODS, "GoCA", replace(GOCA, asking=asking))
    settings = EvaluateSettings.for_model(ovam, "goca", threads=1)
    make_job(ovam, worded, worded.work.items[0], set_queries(ovam, worded, settings), settings, None)
    assert seen_words == [["man", "jacket", "tree", "grass"]]


def test_sweeps_that_are_refused(worded, ovam):
    for name, offsets, part in (("ovam", (0.1,), "no background"), ("goca", (2.0,), "between -1 and 1")):
        settings = EvaluateSettings.for_model(ovam, name, threads=1, offsets=offsets)
        with pytest.raises(InputError, match=part):
            evaluate_dataset(ovam, worded, settings, workers=0)


def test_offsets_as_people_type_them():
    assert parse_offsets("-0.4:0.4:0.1") == (-0.4, -0.3, -0.2, -0.1, 0.0, 0.1, 0.2, 0.3, 0.4)
    assert parse_offsets("0.2, -0.2,0,0.2") == (-0.2, 0.0, 0.2)
    assert parse_offsets("0:0:1") == (0.0,)
    for text in ("", "a", "0:1", "0:1:0", "1:0:0.1", "0:2:0.5", "nan", "0:inf:1", "0:1:1e-9", "0,,1"):
        with pytest.raises(InputError, match="offsets"):
            parse_offsets(text)


# ------------------------------------------------------------------------------------------ annotated images, tables


@pytest.fixture
def drawn(tmp_path, ovam):
    """Two generated images of a cat, one of a dog and a cat, and a photograph of a dog."""
    values = np.zeros((SIDE, SIDE), np.uint8)
    values[10:40, 8:50] = 1
    Image.fromarray(values * 255).save(tmp_path / "one.png")
    values[40:60, 20:60] = 2
    Image.fromarray(values).save(tmp_path / "two.png")
    photograph(tmp_path / "photo.png", 3)
    made = {"prompt": "A photograph of a cat", "steps": 2, "width": SIDE, "height": SIDE}
    rows = [
        made | {"seed": 1, "mask": "one.png", "class": "cat"},
        made | {"seed": 2, "mask": "one.png", "class": "kitten"},
        made | {"seed": 3, "mask": "two.png", "class": ["dog", "cat"]},
        {"photo": "photo.png", "mask": "one.png", "class": "dog"},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_annotated_images_are_scored_a_class_at_a_time(drawn, ovam):
    data = read_annotated(drawn, ovam)
    assert data.work.classes == VOC_CLASSES
    assert [item.classes for item in data.work.items] == [("cat",), ("cat",), ("dog",), ("cat",), ("dog",)]
    settings = EvaluateSettings.for_model(ovam, "ovam", threads=1, crf=False, table="voc-sim")
    result = evaluate_dataset(ovam, data, settings, workers=0)
    counts = {"cat": np.zeros(2), "dog": np.zeros(2)}  # intersection, union
    for item, example in zip(data.work.items, data.examples, strict=True):
        (name,) = item.classes
        drawing = isinstance(example.image, GenerateSettings)
        picture = ovam.draw(example.image) if drawing else ovam.look_at(example.photo, example.image)
        recording = recommended_part(ovam.pipe, picture.recording)
        maps = attribute(recording, words_in_sentence(ovam.pipe, f"A photograph of a {name}", [name]))
        mask = make_masks(recording, maps, picture.image, tau=0.4, alpha=0.85, crf=False)[0]
        label = 1 if len(example.classes) == 1 else ("dog", "cat").index(name) + 1
        truth = read_mask(example.mask, (SIDE, SIDE), len(example.classes)) == label
        counts[name] += ((mask & truth).sum(), (mask | truth).sum())
    assert {name: result.iou[name] for name in counts} == {
        name: pytest.approx(inside / union) for name, (inside, union) in counts.items()
    }
    assert result.miou == pytest.approx(np.mean([result.iou["cat"], result.iou["dog"]]))
    assert result.settings["table"] == "voc-sim"


def test_the_tables_as_printed_and_as_run(ovam):
    assert TABLES.keys() == {"voc-sim", "coco-cap", "voc-sim-published-code", "coco-cap-published-code"}

    def numbers_of(table, method="ovam"):
        one = EvaluateSettings.for_model(ovam, method, table=table)
        return (one.tau, one.alpha, one.token_tau, one.token_alpha, one.branch, one.template)

    printed = (None, None, None, None, None, "A photograph of a {}")
    assert numbers_of("voc-sim") == numbers_of("coco-cap") == numbers_of("voc-sim", "daam") == printed
    assert numbers_of("voc-sim", "goca, any word")[-1] == numbers_of("voc-sim", "goca + token")[-1] == "{}"
    assert numbers_of("voc-sim-published-code") == (0.4, 0.85, 0.75, 0.95, "unconditional", "A photograph of a {}")
    assert numbers_of("coco-cap-published-code", "ovam + token") == (0.5, 0.91, 0.8, 0.99, "unconditional", "{}")
    assert EvaluateSettings.for_model(ovam, "ovam", table="coco-cap-published-code", tau=0.3).tau == 0.3
    assert EvaluateSettings.for_model(ovam, "daam", table="voc-sim").tau is None
    for name, method, part in (("voc", "ovam", "no table 'voc'"), ("voc-sim-published-code", "daam", "of OVAM alone")):
        with pytest.raises(InputError, match=part):
            EvaluateSettings.for_model(ovam, method, table=name)


def test_a_table_asks_its_half_with_its_thresholds(drawn, ovam, tmp_path):
    rows = attribute_words(ovam.pipe, ["the cat"])[0].embedding[:2].float()
    Token(rows, ("background", "dog"), "tiny", "unconditional").save(tmp_path / "dog.safetensors")
    data = read_annotated(drawn, ovam)
    table = "coco-cap-published-code"
    settings = EvaluateSettings.for_model(ovam, "ovam", threads=1, crf=False, table=table, tokens=str(tmp_path))
    queries = set_queries(ovam, data, settings)
    assert {name: (one.kind, one.tau, one.alpha, one.branch) for name, one in queries.items()} == {
        "cat": ("word", 0.5, 0.91, "unconditional"),
        "dog": ("token", 0.8, 0.99, "unconditional"),
    }
    job = make_job(ovam, data, data.work.items[0], queries, settings, None)
    picture = ovam.draw(data.examples[0].image, branch="unconditional")
    recording = recommended_part(ovam.pipe, picture.recording)
    maps = attribute(recording, attribute_words(ovam.pipe, ["cat"]))
    assert np.array_equal(job.masks, make_masks(recording, maps, picture.image, tau=0.5, alpha=0.91, crf=False))


def test_annotated_sets_that_are_refused(drawn, ovam, worded):
    data = read_annotated(drawn, ovam)
    with pytest.raises(InputError, match="runs of 100 steps"):
        evaluate_dataset(ovam, data, EvaluateSettings.for_model(ovam, "attn2mask", threads=1), workers=0)
    settings = EvaluateSettings.for_model(ovam, "ovam", threads=1, table="voc-sim")
    with pytest.raises(InputError, match="generated images that were annotated"):
        evaluate_dataset(ovam, worded, settings, workers=0)
    with pytest.raises(InputError, match="limit is 0"):
        read_annotated(drawn, ovam, 0)
    (drawn / "one.png").unlink()
    with pytest.raises(InputError, match="no mask file"):
        read_annotated(drawn, ovam)


# ------------------------------------------------------------------------------------------ the published code's recipe


def test_the_published_codes_recipe_is_its_plain_loop(ovam):
    """SGD and StepLR on torch's cross-entropy of the maps scaled over all their values, as the library has it."""
    recording = ovam.draw(GenerateSettings("a cat", steps=2, width=SIDE, height=SIDE), branch="unconditional").recording
    target = np.zeros((SIDE, SIDE), np.uint8)
    target[10:40, 8:50] = 1
    start = attribute_words(ovam.pipe, ["cat"])[0].embedding[:2].float()
    x = start.clone().requires_grad_()
    descent = torch.optim.SGD([x], lr=300)
    decay = torch.optim.lr_scheduler.StepLR(descent, step_size=3, gamma=0.7)
    shares = torch.stack([torch.from_numpy(target == label) for label in (0, 1)]).float()[None]
    losses = []
    for _ in range(7):
        descent.zero_grad()
        maps = resize(heatmaps(recording, x), (SIDE, SIDE))[None]
        scaled = (maps - maps.min()) / (maps.max() - maps.min())
        loss = torch.nn.functional.cross_entropy(scaled, shares)
        losses.append(loss.item())
        loss.backward()
        descent.step()
        decay.step()
    recipe = replace(RECIPES["published-code"], epochs=7, decay_every=3)
    assert optimize([recording], [target], start, recipe).losses == pytest.approx(losses, rel=1e-4)


def test_the_published_codes_numbers():
    one = RECIPES["published-code"]
    assert (one.method, one.rate, one.decay, one.decay_every, one.epochs) == ("descent", 300.0, 0.7, 80, 1000)
    assert (one.loss, one.proximity) == (CROSS_ENTROPY, 0)
    assert one.to_json()["loss"] == CROSS_ENTROPY
    assert "loss" not in RECIPES["paper"].to_json()
    assert OptimizeSettings.from_json(one.to_json()) == one
    with pytest.raises(InputError, match="no loss 'dice'"):
        replace(one, loss="dice").validate()


# ------------------------------------------------------------------------------------------ the command line


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ([], "one of --voc"),
        (["--voc", "x", "--data", "y"], "one of --voc"),
        (["--voc", "x", "--set", "ade20k"], "layout of --data"),
        (["--annotated", "x", "--void", "background"], "leave the options"),
        (["--annotated", "x", "--protocol", "goca"], "leave the options"),
        (["--annotated", "x", "--mirror"], "leave --seed"),
        (["--annotated", "x", "--timesteps", "50"], "leave --seed"),
        (["--annotated", "x", "--size", "64x64"], "leave --seed"),
        (["--annotated", "x", "--seed", "0"], "leave --seed"),
        (["--voc", "x", "--table", "voc-sim"], "--annotated"),
        (["--voc", "x", "--names-from", "y"], "--data"),
        (["--data", "nowhere", "--set", "cityscapes"], "no folder"),
    ],
)
def test_options_that_do_not_go_together(options, part, capsys):
    assert main(["evaluate", *options]) == 2
    assert_refused(capsys.readouterr().err.strip(), part)


def test_the_command_with_gocas_protocol(tmp_path, ovam, capsys):
    ovam.pipe.save_pretrained(tmp_path / "model")
    write_set(tmp_path / "set", "cityscapes", 7, 24, 0)
    model = ["--model", str(tmp_path / "model"), "--device", "cpu", "--threads", "1", "--workers", "0"]
    asked_for = ["--data", str(tmp_path / "set"), "--set", "cityscapes", "--method", "goca", "--protocol", "goca"]
    assert main(["evaluate", *asked_for, *model]) == 0
    said = capsys.readouterr().out
    asked_for[asked_for.index("goca")] = "daam"
    assert main(["evaluate", *asked_for, *model]) == 0  # which has no background to raise
    assert "| offset" not in capsys.readouterr().out
    assert "| offset | mIoU % | without the background % |" in said
    assert [line.split("|")[1].strip() for line in said.split("| offset")[1].splitlines()[2:11]] == [
        "-0.4",
        "-0.3",
        "-0.2",
        "-0.1",
        "0",
        "0.1",
        "0.2",
        "0.3",
        "0.4",
    ]
