"""Words by Unicode: plurals and spellings of classes, scripts without spaces, letters that are written in two ways."""

from __future__ import annotations

import unicodedata

import pytest
from pipelines import make_pipe, make_tokenizer

from ovam_core.data.prompts import Prompt, class_list, find_classes, match_class, work_list
from ovam_core.data.voc import VOC_CLASSES
from ovam_core.errors import InputError
from ovam_core.models.reading import has_vectors
from ovam_core.models.words import content_words, find_word, listed, plain
from ovam_core.query import attribute_words, background_words, parse_words, token_strings, words_in_sentence

# ------------------------------------------------------------------------------------------------ classes in captions


@pytest.mark.parametrize(
    ("caption", "classes", "found"),
    [
        ("two mice and a cat", ("mouse", "cat"), ("mouse", "cat")),
        ("geese, oxen and children", ("goose", "ox", "child"), ("goose", "ox", "child")),
        ("knives and leaves on shelves", ("knife", "leaf", "shelf"), ("knife", "leaf", "shelf")),
        ("a wolf and wolves", ("wolf",), ("wolf",)),
        ("computer mice", ("computer mouse",), ("computer mouse",)),
        ("three cafés", ("café",), ("café",)),
        ("cacti and cactuses", ("cactus",), ("cactus",)),
        ("a mouse and a cat", ("mice", "cats"), ("mice", "cats")),
        ("a short man", ("shorts",), ()),
        ("a glass of wine", ("glasses",), ()),
        ("the cat's tail", ("cat",), ("cat",)),
        ("a cat.A dog", ("cat", "dog"), ("cat", "dog")),
        ("a hot, dog", ("dog",), ("dog",)),
        ("carpets and catalogues", ("car", "cat"), ()),
        ("two t-shirts", ("t-shirt",), ("t-shirt",)),
        ("traffic lights at night", ("traffic_light",), ("traffic_light",)),
        ("three F16s and F-16s", ("F16", "f-16"), ("F16", "f-16")),
        ("pickup and pick-up trucks", ("pick-up truck",), ("pick-up truck",)),
        ("Boeing 747s", ("boeing_747",), ("boeing_747",)),
        ("mother-in-laws' x-ray boxes", ("x-ray_box",), ("x-ray_box",)),
        ("salt & pepper shakers", ("salt & pepper shaker",), ("salt & pepper shaker",)),
        ("a t-shirt", ("T-Shirts",), ("T-Shirts",)),
    ],
)
def test_plurals_and_singulars(caption, classes, found):
    assert find_classes(caption, classes) == found


@pytest.mark.parametrize(
    ("caption", "coco"),
    [
        ("a man rides a motorbike", "motorcycle"),
        ("two sofas", "couch"),
        ("an aeroplane and a jet", "airplane"),
        ("the television", "tv"),
        ("a table", "dining table"),
        ("houseplants", "potted plant"),
        ("a taxi", "automobile"),
        ("a woman", "people"),
        ("a moped", "motorcycles"),
    ],
)
def test_other_spellings_have_the_synonyms(caption, coco):
    assert find_classes(caption, (coco,)) == (coco,)


def test_every_spelling_means_its_class():
    for spelled, name in {"Motorcycle": "motorbike", "couches": "sofa", "TVs": "tv", "air-plane": None}.items():
        assert match_class(spelled, VOC_CLASSES) == name
    assert match_class("motorbike", ("motorcycle",)) == "motorcycle"  # a token's label, for the class of an export
    assert find_classes("a couch and a sofa", ("couch", "sofa")) == ("couch", "sofa")
    assert find_classes("a settee", ("couch", "sofa")) == ("couch",)


def test_stated_classes_are_vocs_by_their_spellings_alone():
    """A duck and a goose are birds in a caption, and two classes where they are stated."""
    made = [Prompt("a duck", classes=("duck",)), Prompt("a goose", classes=("goose",))]
    work = work_list(made)
    assert work.classes == ("duck", "goose")
    assert [item.classes for item in work.items] == [("duck",), ("goose",)]
    assert work_list([Prompt("a couch", classes=("couch", "TVs"))]).items[0].classes == ("sofa", "tv")
    assert find_classes("a duck", ("goose", "bird")) == ("bird",)


@pytest.mark.parametrize(
    ("caption", "classes", "found"),
    [
        ("一只猫在沙发上", ("猫", "狗", "沙发"), ("猫", "沙发")),
        ("熊猫", ("猫",), ()),
        ("熊猫和猫", ("猫", "熊猫"), ("猫", "熊猫")),
        ("一条马路", ("马",), ()),
        ("一条马路", ("马", "马路"), ("马路",)),
        ("马路上的白马", ("马",), ("马",)),
        ("斑马和牛奶", ("马", "牛"), ()),
        ("火车站", ("车", "火车"), ()),
        ("貓頭鷹", ("貓",), ()),
        ("猫がソファの上にいる", ("猫", "ソファ"), ("猫", "ソファ")),
        ("カーテン", ("カー",), ()),
        ("แมวนั่งบนโซฟา", ("แมว", "โซฟา"), ("แมว", "โซฟา")),
        ("고양이가 소파에 있다", ("고양이", "소파", "개"), ("고양이", "소파")),
        ("新しいTVと猫", ("tv",), ("tv",)),
        ("बिल्ली और कुत्ता", ("बिल्ली", "बिल"), ("बिल्ली",)),
        ("ﾈｺがいる", ("ネコ",), ("ネコ",)),
    ],
)
def test_scripts_of_the_world(caption, classes, found):
    assert find_classes(caption, classes) == found


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("word", ["café", "Ångström", "고양이", "が"])
def test_composed_and_decomposed_are_one(word, form):
    asked, other = unicodedata.normalize(form, word), unicodedata.normalize("NFD" if form == "NFC" else "NFC", word)
    assert find_classes(f"x {other} x", (asked,)) == (asked,)
    assert len(find_word(f"x {other} x", asked)) == 1
    assert class_list(f"{asked}, {other}") == (unicodedata.normalize("NFC", word),)
    assert parse_words(f"{asked}, {other}") == [unicodedata.normalize("NFC", word)]


# ------------------------------------------------------------------------------------------------ lists


@pytest.mark.parametrize("text", ["猫、狗、鸟", "猫，狗，鸟", "猫；狗\n鸟", "猫, 狗;鸟", "猫､狗、 ，鸟,"])  # noqa: RUF001
def test_lists_in_every_script(text):
    assert listed(text) == ["猫", "狗", "鸟"]
    assert class_list(text) == ("猫", "狗", "鸟")
    assert parse_words(text) == ["猫", "狗", "鸟"]


def test_an_arabic_list():
    assert class_list("قطة، كلب؛ طائر") == ("قطة", "كلب", "طائر")


# ------------------------------------------------------------------------------------------------ words in sentences


def places(sentence: str, word: str, edges=()) -> list[str]:
    """The letters of the sentence at which a word is found."""
    return [sentence[pieces[0].start : pieces[-1].end] for pieces in find_word(sentence, word, edges)]


@pytest.mark.parametrize(
    ("sentence", "word", "found"),
    [
        ("一只猫在沙发上", "沙发", ["沙发"]),
        ("TV가 있다", "tv", ["TV"]),
        ("a cafe\u0301 here", "café", ["cafe\u0301"]),
        ("a cafe\u0301 here", "cafe", []),
        ("แม่", "แม", []),
        ("a ca\u00adt, a c\u200dat, a ca\u200bt", "cat", ["ca\u00adt", "c\u200dat", "ca\u200bt"]),
        ("cats\u200band a cat\u200b", "cat", ["cat"]),
        ("می\u200cخواهم", "میخواهم", ["می\u200cخواهم"]),  # noqa: RUF001
        ("ＣＡＴ", "cat", ["ＣＡＴ"]),  # noqa: RUF001
        ("STRASSE und Straße", "straße", ["STRASSE", "Straße"]),
        ("the cat’s tail", "cat's", ["cat’s"]),
        ("the red\u00a0bus", "red bus", ["red\u00a0bus"]),
        ("two ❤️", "❤", ["❤️"]),
        ("a carpet", "car", []),
        ("a red_bus", "bus", []),
    ],
)
def test_where_a_word_stands(sentence, word, found):
    assert places(sentence, word) == found


def test_the_tokens_say_where_words_of_scripts_without_spaces_are():
    sentence = "熊猫和猫"
    assert places(sentence, "猫") == ["猫", "猫"]
    assert [pieces[0].start for pieces in find_word(sentence, "猫", [(0, 2), (2, 3), (3, 4)])] == [3]
    assert places("在沙发上", "沙发", [(0, 1), (1, 4)]) == ["沙发"]  # no place is better


def test_a_mark_does_not_split_the_letters_of_a_word(tiny):
    """Each word of a phrase counts alike: a word that its marks cut in three would count three times."""
    found = words_in_sentence(tiny, "बिल्ली cat", ["बिल्ली cat"])
    assert found.shares is not None
    last = found.groups[0][-1]
    assert token_strings(tiny, "बिल्ली cat")[last] == "cat"
    assert found.shares[0][-1] == pytest.approx(1 / 2)


def test_words_of_a_chinese_sentence_have_their_own_tokens(tiny):
    cat = words_in_sentence(tiny, "一只猫在沙发上", ["猫"])
    sofa = words_in_sentence(tiny, "一只猫在沙发上", ["沙发"])
    assert cat.groups[0]
    assert not set(cat.groups[0]) & set(sofa.groups[0])
    with pytest.raises(InputError, match="does not stand in the sentence"):
        words_in_sentence(tiny, "一只猫在沙发上", ["狗"])


def test_words_for_the_background():
    assert background_words("A photograph of a cat on grass", ["cat"]) == ("grass",)
    assert background_words("a t-shirt and a cat", ["cat"]) == ("t-shirt",)
    assert background_words("一只猫在沙发上", ["猫"]) == ("一只", "在沙发上")
    assert content_words("the cat’s café", ["cat’s"]) == ["the", plain("café")]


@pytest.mark.parametrize(
    "word",
    [
        x.strip()
        for x in """(🐱:1.2)|((red bus:0.8))|cat::2|(cat)1.3|[cat:0.5]|cat:1.3|( cat : 1.3 )|(cat:-1)|(cat:1.3)
    |(cat:1.3) dog|((cat:1.2):1.1)|R2D2:1.3|(cat：1.3)|（cat:1.3）|cat:1.3:2|(cat)++|(cat)--|a (cat)+ dog|(R2D2:2)
    |(boeing 747:1.3)|((cat)):1.3|cat: 1.3|(猫:1.3)|<lora:cat:0.8>|[cat:dog:10]|cat::2 dog::1|dog:1.3)""".split("|")  # noqa: RUF001
    ],
)
def test_weights_are_refused_by_name(tiny, word):
    for ask in (parse_words, lambda text: attribute_words(tiny, [text])):
        with pytest.raises(InputError, match="has a weight, which is read literally"):
            ask(word)


@pytest.mark.parametrize(
    "word",
    [
        x.strip()
        for x in """16:9|(cat)|cat++|area 51|9:30|c++|the (red) bus|f/2.8|room:101|(room:101)|bus (red) 2|boeing (747) 8
    |at 10:30|a clock (at 10:30)|tv (16:9)|(16:9)|(2.35:1)|1:2.5|a smile :)|:-) 3|8:) 2|<3|(ex)-wife|(semi)--truck
    |rgb (0.5)|John 3:16|engine (v8) 2.0|bus (red) - old|H(2)O""".split("|")
    ],
)
def test_what_is_no_weight(word):
    assert parse_words(word) == [word]


# ------------------------------------------------------------------------------------------------ textual inversion


def test_textual_inversion_is_looked_for_where_it_is_loaded():
    import torch

    pipe = make_pipe()
    pipe.maybe_convert_prompt = None  # it is not asked
    assert not has_vectors(pipe.tokenizer)
    attribute_words(pipe, ["cat"])
    del pipe.maybe_convert_prompt
    pipe.load_textual_inversion({"<one>": torch.randn(1, 32)})
    assert not has_vectors(pipe.tokenizer)
    pipe.load_textual_inversion({"<toy>": torch.randn(2, 32)})
    assert has_vectors(pipe.tokenizer)
    assert attribute_words(pipe, ["<toy>"])[0].groups == ((1, 2),)


def test_added_words_are_no_vectors():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["zebra", "cat_1", "lion"])
    assert not has_vectors(tokenizer)
    tokenizer.add_tokens(["lion_1"])
    assert has_vectors(tokenizer)
