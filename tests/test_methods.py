"""Every method by name: what it takes and refuses, and that it is the sum of the steps that its description names."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from reference import found_by, generate

from ovam_core import METHODS, InputError, Picture, record
from ovam_core import OVAM as Model
from ovam_core.attention.goca import attribute_weighted, goca, label_pixels
from ovam_core.attention.heatmap import AttributionPrompt, attribute, resize
from ovam_core.attention.mask import make_masks
from ovam_core.hooks.goca_recorder import record_goca
from ovam_core.io.masks import read_mask
from ovam_core.methods import (
    ATTN2MASK,
    DAAM,
    GOCA,
    GOCA_ANY,
    GOCA_TOKEN,
    OVAM,
    OVAM_TOKEN,
    OVAM_WEIGHTED,
    Cut,
)
from ovam_core.models.presets import defaults_for
from ovam_core.ovam import _as_image
from ovam_core.query import Query, attribute_words, caption_words, listed_words
from ovam_core.settings import METHOD_NAMES, GenerateSettings, SegmentSettings

PRESET = replace(defaults_for("emoji-voc"), tau=0.36)
PROMPT = "a photograph of the cat and a red bus"
SIZE = (16, 24)


@pytest.fixture(scope="module")
def seen(tiny):
    with record(tiny, keep=["matrix"]) as r, record_goca(tiny) as g:
        generate(tiny, PROMPT)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 48, 3), np.uint8))
    return Picture(image, r.recordings[0], GenerateSettings(PROMPT), g.recordings[0])


@pytest.fixture
def token():
    embedding = torch.randn(2, 32, generator=torch.Generator().manual_seed(3))
    return AttributionPrompt(embedding, ("cat",), ((1,),))


def test_names():
    assert tuple(METHODS) == METHOD_NAMES
    assert all(name == method.name for name, method in METHODS.items())
    for method in METHODS.values():
        assert method.about.endswith(".")
        assert "\n" not in method.about
        assert len(method.about) < 160
    assert [m.name for m in METHODS.values() if m.asks == "token"] == ["OVAM + token", "GoCA + token"]
    assert not any(m.needs_goca for m in (DAAM, ATTN2MASK, OVAM, OVAM_TOKEN))
    assert all(m.needs_goca for m in (GOCA, GOCA_ANY, GOCA_TOKEN, OVAM_WEIGHTED))


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("Attn2Mask", "ConceptAttention")])
def test_every_method_finds_something(tiny, seen, token, name):
    method = METHODS[name]
    asked = {"tokens": [token]} if method.asks == "token" else {"words": ["cat", "red bus"]}
    found = found_by(method, tiny, seen, **asked)
    labels = ("cat",) if method.asks == "token" else ("cat", "red bus")
    assert found.labels == labels
    coarse = 2 if name == "Dataset Diffusion" else 1
    assert found.maps.shape == (len(labels), SIZE[0] // coarse, SIZE[1] // coarse)
    assert found.maps.dtype == torch.float32
    assert found.maps.min() >= 0
    assert found.maps.max() <= 1
    assert found.masks.shape == (len(labels), 32, 48)
    assert found.masks.dtype == bool


@pytest.mark.parametrize("method", [DAAM, OVAM], ids=lambda m: m.name)
def test_thresholded_methods_are_their_settings(tiny, seen, token, method):
    found = found_by(method, tiny, seen, words=["cat"], tokens=[token])
    maps = attribute(seen.recording, [*attribute_words(tiny, ["cat"]), token])
    torch.testing.assert_close(found.maps, maps)
    for row, (tau, alpha) in enumerate(((method.tau, method.alpha), (method.token_tau, method.token_alpha))):
        expected = make_masks(seen.recording, maps[row : row + 1], seen.image, tau=tau, alpha=alpha, crf=method.crf)
        assert np.array_equal(found.masks[row], expected[0])


def test_attn2mask_looks_at_its_one_step(tiny, seen):
    with pytest.raises(InputError, match="None of these steps"):
        found_by(ATTN2MASK, tiny, seen, words=["cat"])


def test_a_step_of_its_own_is_that_of_each_half(tiny, seen):
    """Whether the half that is asked was recorded alone, or beside the other."""
    with record(tiny, branch="unconditional") as recorder:
        generate(tiny, PROMPT)
    (other,) = recorder.recordings
    method = replace(ATTN2MASK, step=1)
    queries = [replace(query, branch="unconditional") for query in method.words(tiny, SegmentSettings(("cat",)))]
    both = replace(seen, others={"unconditional": other})
    expected = attribute(other.select(steps=[1]), attribute_words(tiny, ["cat"]))
    torch.testing.assert_close(method.heatmaps(tiny, both, queries), expected)
    assert not torch.equal(expected, attribute(other, attribute_words(tiny, ["cat"])))


def test_token_methods_are_ovam_and_its_weighted_form(tiny, seen, token):
    plain = found_by(OVAM_TOKEN, tiny, seen, tokens=[token])
    torch.testing.assert_close(plain.maps, attribute(seen.recording, token))
    weighted = found_by(GOCA_TOKEN, tiny, seen, tokens=[token])
    torch.testing.assert_close(weighted.maps, attribute_weighted(seen.goca, token))
    expected = make_masks(seen.recording, weighted.maps, seen.image, tau=0.8, alpha=0.95, crf=True)
    assert np.array_equal(weighted.masks, expected)
    words = found_by(OVAM_WEIGHTED, tiny, seen, words=["car"])
    torch.testing.assert_close(words.maps, attribute_weighted(seen.goca, attribute_words(tiny, ["car"])))


@pytest.mark.parametrize(("method", "asking"), [(GOCA, caption_words), (GOCA_ANY, listed_words)], ids=["GoCA", "any"])
def test_goca_gives_each_pixel_to_one(tiny, seen, method, asking):
    found = found_by(method, tiny, seen, words=["cat"])  # against the caption's other content words
    maps = goca(seen.goca, asking(tiny, PROMPT, ["cat", "red", "bus"]))
    torch.testing.assert_close(found.maps, maps[:1])
    labels = label_pixels(resize(maps[:1], (32, 48)), resize(maps[1:], (32, 48)))
    assert np.array_equal(found.masks[0], (labels == 1).numpy())
    both = found_by(
        method, tiny, seen, words=["cat", "red bus"], background=["photograph"] if method is GOCA else ["car"]
    )
    assert not (both.masks[0] & both.masks[1]).any()


def test_goca_without_a_background_noun(tiny, seen):
    found = found_by(GOCA_ANY, tiny, seen, words=["cat", "car"], background=())
    full = resize(found.maps, (32, 48))
    labels = label_pixels(full, full[:0], GOCA_ANY.tau)
    assert np.array_equal(found.masks, np.stack([labels == 1, labels == 2]))
    assert not found.masks.any(axis=0)[full.amax(dim=0).numpy() < 0.4].any()


def test_refusals(tiny, seen, token):
    with pytest.raises(InputError, match="no words to look for"):
        SegmentSettings().validate()
    for method in (OVAM_TOKEN, GOCA_TOKEN):
        with pytest.raises(InputError, match="takes tokens, not words"):
            method.check(SegmentSettings(words=("cat",)))
        with pytest.raises(InputError, match="takes tokens, not words"):
            method.check(SegmentSettings(words=("cat",), tokens=(token,)))
    with pytest.raises(InputError, match="compares words; for a token choose"):
        GOCA.check(SegmentSettings(words=("cat",), tokens=(token,)))
    with pytest.raises(InputError, match="compares words; for a token choose"):
        found_by(GOCA, tiny, seen, tokens=[token])
    with pytest.raises(InputError, match="does not stand in the sentence"):
        found_by(GOCA, tiny, seen, words=["car"])


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.needs_goca])
def test_a_picture_without_the_pass(tiny, seen, token, name):
    method = METHODS[name]
    asked = {"tokens": [token]} if method.asks == "token" else {"words": ["cat"]}
    with pytest.raises(InputError, match="needs a pass that was not recorded"):
        found_by(method, tiny, replace(seen, goca=None), **asked)


CUTS = {  # given, kind, preset, the token's own tau, what it comes to
    "given before all": (Cut(0.1, 0.2, 0.3, 0.4), "word", PRESET, 0.9, (0.1, 0.2)),
    "given for tokens": (Cut(0.1, 0.2, 0.3, 0.4), "token", PRESET, 0.9, (0.3, 0.4)),
    "the model's for a word": (Cut(), "word", PRESET, 0.9, (0.36, 0.85)),
    "a token's own": (Cut(0.1), "token", PRESET, 0.9, (0.9, 0.7)),
    "published for a word": (Cut(), "word", None, 0.9, (0.4, 0.85)),
    "published for a token": (Cut(), "token", None, 0.9, (0.8, 0.95)),
}


@pytest.mark.parametrize("case", CUTS)
def test_which_tau_wins(case):
    given, kind, preset, own, expected = CUTS[case]
    query = OVAM.cut(Query(("cat",), None, own, 0.7, kind=kind), given, preset)
    assert (query.tau, query.alpha) == expected


def test_methods_of_another_share_keep_it():
    assert ATTN2MASK.cut(Query(("cat",), None), Cut(), PRESET).tau == 0.5
    assert DAAM.cut(Query(("cat",), None), Cut(alpha=0.2), PRESET).alpha == 1  # it has no self-attention map
    assert GOCA.cut(Query(("cat",), None), Cut(), PRESET).tau == 0.36


def test_a_picture_made_by_hand_says_what_it_lacks(tiny, seen):
    """Not that a text is empty: there is no caption beside the pass that is missing."""
    bare = Picture(seen.image, seen.recording)
    with pytest.raises(InputError, match="needs a pass that was not recorded"):
        found_by(GOCA, tiny, bare, words=["cat"])


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (np.full((32, 48), 0.7), "give bool or whole numbers"),
        (np.ones((32, 48, 3), np.uint8), "give bool or whole numbers"),
        (np.full((32, 48), -1), "numbers that are no labels"),
        (np.full((32, 48), 2**40), "numbers that are no labels"),
        (np.zeros((0, 48), np.uint8), "The mask is empty"),
        (torch.full((32, 48), 0.7, dtype=torch.bfloat16, requires_grad=True), "of bool or whole numbers"),
        (torch.ones(32, 48, dtype=torch.bool).to_sparse(), "give a dense tensor"),
        (torch.ones(32, 48, dtype=torch.bool, device="meta"), "on meta"),
        ([[0, 1]], "The mask is a list; give an array"),
        (None, "The mask is a NoneType"),
    ],
    ids=["float", "colours", "negative", "huge", "no rows", "graded", "sparse", "meta", "list", "none"],
)
def test_a_mask_that_is_no_mask(tiny, seen, mask, said):
    with pytest.raises(InputError, match=said):
        Model(tiny).optimize_token(seen, mask, "cat")


@pytest.mark.parametrize("kind", [bool, np.uint8, np.int8, np.uint16, np.int32, np.uint32, np.int64, torch.Tensor])
def test_a_mask_of_any_whole_numbers(kind):
    labels = np.zeros((4, 6), np.int64)
    labels[1:3, 2:5] = 1
    mask = torch.from_numpy(labels) if kind is torch.Tensor else labels.astype(kind)
    assert np.array_equal(read_mask(_as_image(mask), (4, 6)), labels)
