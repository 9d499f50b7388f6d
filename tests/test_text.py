"""Words and sentences to embeddings and token positions."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch
from pipelines import make_pipe, make_tokenizer

from ovam_core.errors import InputError
from ovam_core.models.reading import read_tokens
from ovam_core.query import (
    MAX_WORD_CHARS,
    MAX_WORDS,
    attribute_sentence,
    attribute_words,
    encode_padded,
    parse_words,
    token_strings,
    words_in_sentence,
)
from ovam_core.settings import SegmentSettings


def test_parse_words():
    assert parse_words("cat, car;  the red\tbus\n\nCat,, car ,") == ["cat", "car", "the red bus"]
    assert parse_words("café") == ["café"]
    assert parse_words("🐱, 2") == ["🐱", "2"]


@pytest.mark.parametrize("text", ["", "  ", ",;\n", "!!!", "cat, ...", "-", "cat; '", "+"])
def test_no_words_and_punctuation_are_refused(text):
    with pytest.raises(InputError, match=r"no word|not a word"):
        parse_words(text)


def test_too_many_and_too_long_words_are_refused():
    assert len(parse_words(",".join(f"w{i}" for i in range(MAX_WORDS)))) == MAX_WORDS
    with pytest.raises(InputError, match="at most 32"):
        parse_words(",".join(f"w{i}" for i in range(MAX_WORDS + 1)))
    with pytest.raises(InputError, match="longer than 200"):
        parse_words("a" * (MAX_WORD_CHARS + 1))
    with pytest.raises(InputError, match="longer than 200"):
        parse_words("a" * 10_000)


def test_a_word_has_a_prompt_of_its_own(tiny):
    cat, car = attribute_words(tiny, ["cat", "car"])
    assert cat.embedding.shape == (3, 32)  # <SoT> cat <EoT>, no padding
    assert (cat.labels, cat.groups) == (("cat",), ((1,),))
    alone = attribute_words(tiny, ["car"])[0]
    assert torch.equal(car.embedding, alone.embedding)
    assert not car.embedding.requires_grad


def test_sub_tokens_and_phrases_have_one_map(tiny):
    zebra, phrase, articles = attribute_words(tiny, ["zebra", "the red bus", "the"])
    assert token_strings(tiny, "zebra") == ["<SoT>", "z", "e", "b", "r", "a", "<EoT>"]
    assert zebra.groups == ((1, 2, 3, 4, 5),)
    assert phrase.groups == ((2, 3),)  # the content words
    assert articles.groups == ((1,),)  # nothing else to take


def test_template(tiny):
    (one,) = attribute_words(tiny, ["red bus"], template="a photograph of the {}.")
    assert one.labels == ("red bus",)
    strings = token_strings(tiny, "a photograph of the red bus.")
    assert [strings[i] for i in one.groups[0]] == ["red", "bus"]
    for template in ("no place", "{} and {}"):
        with pytest.raises(InputError, match=r"must contain \{\} once"):
            attribute_words(tiny, ["cat"], template=template)


def test_every_token_of_a_sentence_has_a_label(tiny):
    found = attribute_sentence(tiny, "the Cat, zoo")
    assert found.labels == ("<SoT>", "the", "Cat", ",", "z", "o", "o", "<EoT>")
    assert found.groups == tuple((i,) for i in range(8))
    assert found.embedding.shape == (8, 32)


def test_tokens_without_an_entry_are_not_mistaken_for_the_end(tiny):
    """CLIP's unknown token is its end token."""
    assert token_strings(tiny, "é cat")[-2:] == ["cat", "<EoT>"]
    assert token_strings(tiny, "é cat").count("<EoT>") == 1


def test_words_inside_a_sentence(tiny):
    found = words_in_sentence(tiny, "The red bus, a car and the zoo. the  BUS", ["bus", "the zoo", "red  bus"])
    strings = token_strings(tiny, "The red bus, a car and the zoo. the  BUS")
    assert found.labels == ("bus", "the zoo", "red  bus")
    assert [[strings[i] for i in group] for group in found.groups] == [
        ["bus", "BUS"],
        ["z", "o", "o"],
        ["red", "bus"],
    ]
    joint = attribute_sentence(tiny, "The red bus, a car and the zoo. the  BUS")
    assert torch.equal(found.embedding, joint.embedding)
    with pytest.raises(InputError, match="does not stand in the sentence"):
        words_in_sentence(tiny, "a carpet", ["car"])


def test_unpadded_embedding_is_the_start_of_the_padded_one(tiny):
    """CLIP is causal: what stands before the padding does not see it."""
    padded = encode_padded(tiny, "a red bus")
    own = attribute_sentence(tiny, "a red bus").embedding
    assert padded.shape == (77, 32)
    torch.testing.assert_close(own, padded[: len(own)], atol=1e-5, rtol=1e-5)


def test_padded_embedding_is_that_of_the_pipeline(tiny):
    expected, _ = tiny.encode_prompt("a red bus", "cpu", 1, False)
    assert torch.equal(encode_padded(tiny, "a red bus"), expected[0])


def test_a_text_encoder_without_layers():
    pipe = make_pipe(text_layers=0)
    found = attribute_sentence(pipe, "a red bus")
    assert found.embedding.shape == (5, 32)
    torch.testing.assert_close(encode_padded(pipe, "a red bus")[:5], found.embedding)


@pytest.mark.parametrize("ask", [attribute_sentence, encode_padded, token_strings])
def test_too_long_sentences_are_refused_not_cut(tiny, ask):
    ask(tiny, " ".join(["cat"] * 75))
    with pytest.raises(InputError, match="78 tokens and the text encoder takes 77"):
        ask(tiny, " ".join(["cat"] * 76))
    with pytest.raises(InputError, match="shorten it"):
        ask(tiny, "cat " * 2500)


@pytest.mark.parametrize("ask", [attribute_sentence, encode_padded, token_strings])
def test_empty_sentences_are_refused(tiny, ask):
    for text in ("", " \n "):
        with pytest.raises(InputError, match="empty"):
            ask(tiny, text)


def test_words_are_checked_everywhere(tiny):
    for words in ([], ["cat", "?!"], [""]):
        with pytest.raises(InputError, match=r"no word|not a word"):
            attribute_words(tiny, words)
        with pytest.raises(InputError, match=r"no word|not a word"):
            words_in_sentence(tiny, "a cat", words)


def test_textual_inversion_of_several_vectors():
    """The pipeline spells "<toy>" out as "<toy> <toy>_1"; one word, one map."""
    pipe = make_pipe()
    pipe.load_textual_inversion({"<toy>": torch.randn(2, 32)})
    (toy,) = attribute_words(pipe, ["<toy>"])
    assert toy.embedding.shape == (4, 32)
    assert toy.groups == ((1, 2),)


def test_a_pipeline_of_no_known_family_is_refused(fresh):
    fresh.text_encoder_2 = torch.nn.Linear(1, 1)  # two text encoders, but not Stable Diffusion XL's UNet
    with pytest.raises(InputError, match=r"not a text-to-image pipeline of a family.*: load Stable Diffusion"):
        attribute_words(fresh, ["cat"])


def test_each_word_of_a_phrase_counts_alike(tiny):
    """METHODS.md: a phrase is the mean over its content words, each the mean of its sub-tokens."""
    (one,) = attribute_words(tiny, ["red zoo"])
    assert [token_strings(tiny, "red zoo")[row] for row in one.groups[0]] == ["red", "z", "o", "o"]
    maps = torch.rand(len(one.embedding), 3, 5)
    expected = (maps[1] + maps[2:5].mean(0)) / 2
    torch.testing.assert_close(one.means(maps)[0], expected)
    torch.testing.assert_close(one.means(maps[1:5], rows=[1, 2, 3, 4])[0], expected)


def test_questions_leave_the_tokenizer_as_the_pipeline_needs_it(tiny):
    """A fast tokenizer keeps whether it pads; reading words beside a generation must not touch it, nor see it."""
    wrong = []
    stop = threading.Event()

    def generations():
        while not stop.is_set():
            ids = tiny.tokenizer(
                ["a cat"], padding="max_length", max_length=77, truncation=True, return_tensors="pt"
            ).input_ids
            if ids.shape != (1, 77):
                wrong.append(tuple(ids.shape))

    thread = threading.Thread(target=generations)
    thread.start()
    lengths = {len(token_strings(tiny, "a cat")) for _ in range(1500)}
    stop.set()
    thread.join()
    assert lengths == {4}
    assert not wrong


def test_tokens_that_are_added_later_are_known(tiny):
    tokenizer = make_tokenizer()
    pipe = SimpleNamespace(tokenizer=tokenizer)
    assert len(read_tokens(pipe.tokenizer, "zebra").names) == 7
    tokenizer.add_tokens(["zebra"])
    assert len(read_tokens(pipe.tokenizer, "zebra").names) == 3


@pytest.mark.parametrize("field", ["sentence", "template"])
def test_settings_of_another_encoding(field):
    with pytest.raises(InputError, match=r"^'a \\udcff \{\}' holds characters that are not Unicode: write it in UTF-8"):
        SegmentSettings(("cat",), **{field: "a \udcff {}"}).validate()
