"""Every method by name: what it takes, what it refuses, and that it is the sum of the steps that its description names."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from reference import generate

from ovam_core import Attribution, attribute, attribute_words, make_masks, record
from ovam_core.attention.goca import attribute_weighted, goca, label_pixels
from ovam_core.attention.heatmap import resize
from ovam_core.hooks.goca_recorder import record_goca
from ovam_core.methods import (
    ALL_METHODS,
    ATTN2MASK,
    DAAM,
    GOCA,
    GOCA_ANY,
    GOCA_TOKEN,
    METHODS,
    OVAM,
    OVAM_TOKEN,
    OVAM_WEIGHTED,
    GocaMethod,
    Seen,
    maps_and_masks,
)
from ovam_core.query import caption_words, listed_words

PROMPT = "a photograph of the cat and a red bus"
SIZE = (16, 24)


@pytest.fixture(scope="module")
def seen(tiny):
    with record(tiny) as r, record_goca(tiny) as g:
        generate(tiny, PROMPT)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 48, 3), np.uint8))
    return Seen(image, r.recordings[0], PROMPT, g.recordings[0])


@pytest.fixture
def token():
    embedding = torch.randn(2, 32, generator=torch.Generator().manual_seed(3))
    return Attribution(embedding, ("cat",), ((1,),))


def test_names():
    assert list(ALL_METHODS)[:3] == list(METHODS) == ["DAAM", "Attn2Mask", "OVAM"]
    assert all(name == method.name for name, method in ALL_METHODS.items())
    for method in ALL_METHODS.values():
        assert method.about.endswith(".") and "\n" not in method.about and len(method.about) < 160
    assert [m.name for m in ALL_METHODS.values() if m.asks == "token"] == ["OVAM + token", "GoCA + token"]
    assert not any(m.needs_goca for m in (DAAM, ATTN2MASK, OVAM, OVAM_TOKEN))
    assert all(m.needs_goca for m in (GOCA, GOCA_ANY, GOCA_TOKEN, OVAM_WEIGHTED))


@pytest.mark.parametrize("name", [name for name in ALL_METHODS if name != "Attn2Mask"])
def test_every_method_finds_something(tiny, seen, token, name):
    method = ALL_METHODS[name]
    asked = {"tokens": [token]} if method.asks == "token" else {"words": ["cat", "red bus"]}
    found = maps_and_masks(method, tiny, seen, **asked)
    labels = ("cat",) if method.asks == "token" else ("cat", "red bus")
    assert found.labels == labels
    assert found.maps.shape == (len(labels), *SIZE) and found.maps.dtype == torch.float32
    assert found.maps.min() >= 0 and found.maps.max() <= 1
    assert found.masks.shape == (len(labels), 32, 48) and found.masks.dtype == bool


@pytest.mark.parametrize("method", [DAAM, OVAM], ids=lambda m: m.name)
def test_thresholded_methods_are_their_settings(tiny, seen, token, method):
    found = maps_and_masks(method, tiny, seen, words=["cat"], tokens=[token])
    maps = attribute(seen.recording, [*attribute_words(tiny, ["cat"]), token])
    torch.testing.assert_close(found.maps, maps)
    for row, (tau, alpha) in enumerate((method.cut(False), method.cut(True))):
        expected = make_masks(seen.recording, maps[row : row + 1], seen.image, tau=tau, alpha=alpha, crf=method.crf)
        assert np.array_equal(found.masks[row], expected[0])


def test_attn2mask_looks_at_its_one_step(tiny, seen):
    with pytest.raises(ValueError, match="None of these steps"):
        maps_and_masks(ATTN2MASK, tiny, seen, words=["cat"])


def test_token_methods_are_ovam_and_its_weighted_form(tiny, seen, token):
    plain = maps_and_masks(OVAM_TOKEN, tiny, seen, tokens=[token])
    torch.testing.assert_close(plain.maps, attribute(seen.recording, token))
    weighted = maps_and_masks(GOCA_TOKEN, tiny, seen, tokens=[token])
    torch.testing.assert_close(weighted.maps, attribute_weighted(seen.goca, token))
    expected = make_masks(seen.recording, weighted.maps, seen.image, tau=0.8, alpha=0.95, crf=True)
    assert np.array_equal(weighted.masks, expected)
    words = maps_and_masks(OVAM_WEIGHTED, tiny, seen, words=["car"])
    torch.testing.assert_close(words.maps, attribute_weighted(seen.goca, attribute_words(tiny, ["car"])))


@pytest.mark.parametrize(("method", "asking"), [(GOCA, caption_words), (GOCA_ANY, listed_words)], ids=["GoCA", "any"])
def test_goca_gives_each_pixel_to_one(tiny, seen, method, asking):
    found = maps_and_masks(method, tiny, seen, words=["cat"])  # against the caption's other content words
    maps = goca(seen.goca, asking(tiny, PROMPT, ["cat", "red", "bus"]))
    torch.testing.assert_close(found.maps, maps[:1])
    labels = label_pixels(resize(maps[:1], (32, 48)), resize(maps[1:], (32, 48)))
    assert np.array_equal(found.masks[0], (labels == 1).numpy())
    both = maps_and_masks(
        method, tiny, seen, words=["cat", "red bus"], background=["photograph"] if method is GOCA else ["car"]
    )
    assert not (both.masks[0] & both.masks[1]).any()


def test_goca_without_a_background_noun(tiny, seen):
    found = maps_and_masks(GOCA_ANY, tiny, seen, words=["cat", "car"], background=())
    full = resize(found.maps, (32, 48))
    labels = label_pixels(full, full[:0], GOCA_ANY.tau)
    assert np.array_equal(found.masks, np.stack([labels == 1, labels == 2]))
    assert not found.masks.any(axis=0)[full.amax(dim=0).numpy() < 0.4].any()


def test_refusals(tiny, seen, token):
    bare = Seen(seen.image, seen.recording, PROMPT)
    with pytest.raises(ValueError, match="no word to look for"):
        maps_and_masks(OVAM, tiny, seen)
    with pytest.raises(ValueError, match="takes tokens, not words"):
        maps_and_masks(OVAM_TOKEN, tiny, seen, words=["cat"])
    with pytest.raises(ValueError, match="takes tokens, not words"):
        maps_and_masks(GOCA_TOKEN, tiny, seen, words=["cat"], tokens=[token])
    with pytest.raises(ValueError, match="compares words; for a token choose"):
        maps_and_masks(GOCA, tiny, seen, words=["cat"], tokens=[token])
    with pytest.raises(ValueError, match="does not stand in the sentence"):
        maps_and_masks(GOCA, tiny, seen, words=["car"])
    for method in ALL_METHODS.values():
        if method.needs_goca:
            with pytest.raises(ValueError, match="needs the pass of record_goca"):
                maps_and_masks(
                    method,
                    tiny,
                    bare,
                    **({"tokens": [token]} if method.asks == "token" else {"words": ["cat"]}),
                )
    assert isinstance(GOCA, GocaMethod)
