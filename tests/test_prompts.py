"""Prompt files, classes in captions, the work list, and the filters' decisions."""

from __future__ import annotations

import json

import pytest
from PIL import Image
from pipelines import EMBED, make_tokenizer

from ovam_core.data.filters import ClipScorer, judge, reasons
from ovam_core.data.prompts import (
    Prompt,
    class_list,
    find_classes,
    match_class,
    parse_prompts,
    read_prompts,
    template_prompts,
    work_list,
)
from ovam_core.data.voc import VOC_CLASSES
from ovam_core.errors import InputError
from ovam_core.settings import Filters


def test_lines():
    text = '\ufeffa cat, a dog\r\n\r\n  a "quoted" bus \u2028 on  \n'
    assert [one.text for one in parse_prompts(text.lstrip("\ufeff"))] == ["a cat, a dog", 'a "quoted" bus \u2028 on']


def test_csv_and_tsv(tmp_path):
    (tmp_path / "p.csv").write_text(
        '\ufeffPrompt,classes,seed,negative_prompt\n"a cat, ""big""\non a sofa","cat;sofa",5,rain\na bus,,,\n'
    )
    first, second = read_prompts(tmp_path / "p.csv")
    assert first == Prompt('a cat, "big"\non a sofa', ("cat", "sofa"), 5, "rain", "line 3")
    assert (second.text, second.classes, second.seed, second.negative) == ("a bus", (), None, "")
    (tmp_path / "p.csv").write_text("classes,prompt\ncat\ndog,a dog\n")  # a short row has no prompt, and is skipped
    assert [one.text for one in read_prompts(tmp_path / "p.csv")] == ["", "a dog"]
    (tmp_path / "p.csv").write_text(",\n ,\n")
    with pytest.raises(InputError, match="no column 'prompt'"):
        read_prompts(tmp_path / "p.csv")
    (tmp_path / "p.tsv").write_text("seed\tprompt\n7\ta cat, alone\n")
    assert read_prompts(tmp_path / "p.tsv")[0].text == "a cat, alone"


def test_jsonl():
    rows = [
        {"prompt": "a\ncat", "classes": ["cat"], "seed": 3},
        {"prompt": "dog", "classes": "dog, cat"},
        {"prompt": "x", "seed": ""},
    ]
    made = parse_prompts("\n".join(map(json.dumps, rows)), "jsonl")
    assert [(one.text, one.classes, one.seed) for one in made] == [
        ("a\ncat", ("cat",), 3),
        ("dog", ("dog", "cat"), None),
        ("x", (), None),
    ]
    for bad in (
        '{"prompt": 3}',
        '{"text": "x"}',
        "[]",
        '{"prompt": "x", "seed": -1}',
        '{"prompt": "x", "seed": true}',
        '{"prompt": "x", "seed": 1.5}',
        '{"prompt": "x", "classes": [1]}',
    ):
        with pytest.raises(InputError):
            parse_prompts(bad, "jsonl") and work_list(parse_prompts(bad, "jsonl"), ("x",))


def test_coco_captions():
    about = {
        "images": [],
        "annotations": [{"id": 1, "image_id": 9, "caption": "Two men on  motorcycles.\n"}, {"caption": "a couch"}],
    }
    made = parse_prompts(json.dumps(about), "json")
    assert [one.text for one in made] == ["Two men on motorcycles.", "a couch"]
    work = work_list(made)
    assert [item.classes for item in work.items] == [("motorbike", "person"), ("sofa",)]
    assert work.classes == VOC_CLASSES


@pytest.mark.parametrize(
    ("caption", "classes"),
    [
        ("A plane over two buses", ("aeroplane", "bus")),
        ("three kitties and puppies", ("cat", "dog")),
        ("people eat hot dogs at a table", ("dining table", "person")),
        ("a train station with no cars", ("car",)),
        ("a potted-plant by the TV", ("potted plant", "tv")),
        ("training for the carnival, a category", ()),
        ("a herd of sheep and COWS", ("cow", "sheep")),
        ("a wine bottle", ("bottle",)),
    ],
)
def test_classes_in_captions(caption, classes):
    assert find_classes(caption, VOC_CLASSES) == classes


def test_class_names():
    assert class_list("voc") == VOC_CLASSES
    assert class_list("cat, red  bus,Cat") == ("cat", "red bus")
    assert match_class("TV-monitor", VOC_CLASSES) == "tv"
    assert match_class("diningtable", VOC_CLASSES) == "dining table"
    assert match_class("zebra", VOC_CLASSES) is None
    assert match_class("hot dog", VOC_CLASSES) is None
    for bad in ("", ",", "background", "x" * 200):
        with pytest.raises(InputError):
            class_list(bad)


def test_work_list_is_numbered_and_seeded():
    work = work_list(
        [*template_prompts("a {}", ("cat", "dog")), Prompt("a dog", seed=2**32 - 1)], ("cat", "dog"), 2, seed=10
    )
    assert [item.index for item in work.items] == list(range(6))
    assert [item.seed for item in work.items] == [10, 11, 12, 13, 2**32 - 1, 0]
    assert work.ids(("dog", "cat")) == [2, 1]
    assert work_list([Prompt("x", ("zebra",)), Prompt("y", ("lion", "zebra"))]).classes == ("zebra", "lion")


def test_skipped_prompts_are_listed():
    def check(prompt, negative):
        if "long" in prompt:
            raise InputError("It is too long.")

    work = work_list(
        [Prompt("a cat"), Prompt("a long cat", source="line 2"), Prompt("a \ud800 cat"), Prompt("a tree")],
        ("cat",),
        check=check,
    )
    assert len(work.items) == 1
    assert work.skipped[0].source == "line 2"
    assert work.skipped[0].reason == "It is too long."
    assert len(work.skipped) == 3
    assert all(one.prompt.encode() for one in work.skipped)


# ------------------------------------------------------------------------------------------------ filters


def row(classes, coverage=0.5, scores=None):
    return {"classes": list(classes), "coverage": coverage, "clip_scores": scores}


def test_coverage():
    rows = [row("a", share) for share in (0.0, 0.049, 0.05, 0.95, 0.951)]
    judged = judge(rows, Filters())
    assert [one["kept"] for one in judged] == [False, False, True, True, False]
    kinds = [[reason.kind for reason in why] for why in reasons(rows, Filters())]
    assert kinds == [["small"], ["small"], [], [], ["large"]]


def test_the_lowest_of_each_class_go():
    rows = [row("a", scores=[n / 10]) for n in range(10)] + [row("b", scores=[n / 100]) for n in range(7)]
    judged = judge(rows, Filters())
    assert [n for n, one in enumerate(judged) if not one["kept"]] == [0, 1, 2, 10, 11]
    assert [reason.kind for reason in reasons(rows, Filters())[0]] == ["clip"]
    assert "of a" in judged[0]["reason"]
    assert [n for n, one in enumerate(judge([row("a", scores=[0.5])] * 4, Filters())) if not one["kept"]] == [
        3
    ]  # of equals the last
    both = judge([row("ab", scores=[0.9, 0.1]), *[row("ab", scores=[0.5, 0.5])] * 3], Filters())
    assert not both[0]["kept"]
    assert "of b" in both[0]["reason"]
    assert all(one["kept"] for one in judge([row("a")] * 10, Filters()))  # no CLIP, no such filter


def test_clip_scorer(tmp_path):
    import torch
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    small = {"hidden_size": EMBED, "intermediate_size": 37, "num_attention_heads": 4, "num_hidden_layers": 1}
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(
        text_config={**small, **special, "vocab_size": len(tokenizer)},
        vision_config={**small, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    CLIPModel(config).save_pretrained(tmp_path)
    CLIPProcessor(CLIPImageProcessor(size=32, crop_size=32), tokenizer).save_pretrained(tmp_path)
    scorer = ClipScorer(str(tmp_path))
    images = [Image.new("RGB", (64, 48), color) for color in ("red", "blue")]
    scores = scorer.scores(images, [("cat", "car"), ("car",)])
    assert [len(own) for own in scores] == [2, 1]
    assert all(-1 <= one <= 1 for own in scores for one in own)
    assert scorer.scores(images[1:], [("car",)])[0][0] == pytest.approx(scores[1][0], abs=1e-5)
    with pytest.raises(InputError, match="cannot be loaded"):
        ClipScorer(str(tmp_path / "nowhere"))
