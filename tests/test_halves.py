"""Both halves of the guided batch: words asked of the negative prompt's own, against the triple loop on that half."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import pipe_of
from reference import Spy, assert_refused, triple_loop

from ovam_core import OVAM, InputError, Picture, Token, record
from ovam_core.attention.heatmap import resize
from ovam_core.attention.mask import binary_masks, self_attention_map
from ovam_core.cli import main
from ovam_core.picture import load_settings
from ovam_core.query import attribute_words, halves_of
from ovam_core.settings import GenerateSettings, SegmentSettings

PROMPT = "a photograph of the cat"
GRIDS, SIZE = {1024: (32, 32), 256: (16, 16)}, (32, 32)
SMALL = {"num_inference_steps": 2, "width": 64, "height": 64}


@pytest.fixture(scope="module")
def ovam(tiny):
    return OVAM(tiny)


@pytest.fixture(scope="module")
def drawn(ovam, tiny):
    with Spy(tiny) as spy:
        picture = ovam.generate(PROMPT, negative_prompt="car", branch="all", **SMALL)
    return picture, spy


def token_of(branch, name="dog"):
    rows = torch.randn(2, 32, generator=torch.Generator().manual_seed(1))
    return Token(rows, ("background", name), "tiny", branch, tau=0.5, alpha=0.3)


# ------------------------------------------------------------------------------------------------ maps and masks


@pytest.mark.parametrize(("half", "item"), [("unconditional", 0), ("conditional", 1), (None, 1)])
def test_words_are_of_the_half_that_is_asked(ovam, tiny, drawn, half, item):
    picture, spy = drawn
    found = ovam.segment(picture, ["car", "cat"], crf=False, branch=half, tau=0.6, alpha=0.2)
    recording = picture.others["unconditional"] if item == 0 else picture.recording
    attention = self_attention_map(recording, 0.2)
    for row, prompt in enumerate(attribute_words(tiny, ["car", "cat"])):
        expected = triple_loop(spy, item, GRIDS, SIZE, prompt.embedding)[list(prompt.groups[0])].mean(dim=0)
        np.testing.assert_allclose(found.grid_maps[row], expected.numpy(), atol=1e-5)
        weighted = resize((torch.as_tensor(found.grid_maps[row]) * attention)[None], (64, 64))
        assert np.array_equal(found.masks[row], binary_masks(weighted, 0.6)[0].numpy())
    received = ovam.received_attention(found)
    assert list(received) == [half or "conditional"]
    close = self_attention_map(recording, 0).numpy()
    np.testing.assert_allclose(next(iter(received.values())), close, atol=1e-6)


def test_the_halves_differ_and_one_alone_is_the_same(ovam, drawn):
    picture, _ = drawn
    one = ovam.segment(picture, "cat", crf=False, branch="conditional")
    other = ovam.segment(picture, "cat", crf=False, branch="unconditional")
    assert not np.array_equal(one.heatmaps, other.heatmaps)
    assert np.array_equal(ovam.segment(picture, "cat", crf=False).heatmaps, one.heatmaps)  # no stale map of the other
    alone = ovam.generate(PROMPT, negative_prompt="car", branch="unconditional", **SMALL)
    assert np.array_equal(np.asarray(alone.image), np.asarray(picture.image))
    assert alone.others == {}
    same = ovam.segment(alone, "cat", crf=False, branch="unconditional")
    assert np.array_equal(same.heatmaps, other.heatmaps)
    assert np.array_equal(same.masks, other.masks)
    plain = ovam.generate(PROMPT, negative_prompt="car", **SMALL)
    assert np.array_equal(ovam.segment(plain, "cat", crf=False).masks, one.masks)
    assert picture.nbytes > 1.9 * plain.recording.nbytes


def test_named_steps_and_grids_hold_for_both(ovam, tiny, drawn):
    picture, spy = drawn
    found = ovam.segment(picture, "car", crf=False, branch="unconditional", step_indices=[1], resolutions=[16])
    (prompt,) = attribute_words(tiny, ["car"])
    names = [x.name for x in picture.recording.layers if x.resolution == 16]
    loop = triple_loop(spy, 0, GRIDS, SIZE, prompt.embedding, steps=[1], names=names)
    np.testing.assert_allclose(found.grid_maps[0], loop[list(prompt.groups[0])].mean(dim=0).numpy(), atol=1e-5)
    assert ovam.evolution(picture, "car", "grids", branch="unconditional").places == (32, 16)
    with pytest.raises(InputError, match="None of these steps"):
        ovam.segment(picture, "car", branch="unconditional", step_indices=[7])


def test_tokens_of_both_halves_beside_words(ovam, drawn):
    picture, _ = drawn
    ours, theirs = token_of("conditional", "dog"), token_of("unconditional", "cow")
    found = ovam.segment(picture, ["cat", ours, theirs], crf=False, branch="unconditional")
    assert found.labels == ["cat", "dog", "cow"]
    for row, (asked, half) in enumerate((("cat", "unconditional"), (ours, None), (theirs, None))):
        alone = ovam.segment(picture, [asked], crf=False, branch=half)
        assert np.array_equal(found.masks[row], alone.masks[0])
    assert not np.array_equal(found.heatmaps[1], found.heatmaps[2])
    assert halves_of(found.settings) == "all"


@pytest.mark.parametrize("name", ["sdxl", "pixart-alpha", "sana", "hunyuan", "sd3"])
def test_other_families(name):
    """Both at once are what each is alone."""
    ovam = OVAM(pipe_of(name))
    settings = GenerateSettings.for_model(
        ovam.pipe, PROMPT, negative_prompt="the red bus", steps=1, guidance=4.0, width=64, height=64
    )
    both = ovam.draw(settings, branch="all")
    for half in ("conditional", "unconditional"):
        alone = ovam.draw(settings, branch=half)
        asked = {"queries": "cat", "crf": False, "branch": half}
        assert np.array_equal(ovam.segment(both, **asked).heatmaps, ovam.segment(alone, **asked).heatmaps)
        assert np.array_equal(np.asarray(both.image), np.asarray(alone.image))
    assert both.goca is None


def test_goca_looks_at_one_half(ovam, drawn):
    picture, _ = drawn
    asked = {"queries": ["cat"], "method": "GoCA, any word", "crf": False}
    plain = ovam.segment(picture, **asked)
    assert np.array_equal(ovam.segment(picture, **asked, branch="conditional").masks, plain.masks)
    with pytest.raises(InputError, match="looks at the conditional half"):
        ovam.segment(picture, **asked, branch="unconditional")
    with pytest.raises(InputError, match="found on the unconditional half"):
        ovam.segment(picture, [token_of("unconditional")], method="GoCA + token")


# ------------------------------------------------------------------------------------------------ refusals


def test_a_half_that_was_not_recorded(ovam):
    plain = ovam.generate(PROMPT, **SMALL)
    with pytest.raises(InputError, match="make it again with the unconditional one chosen"):
        ovam.segment(plain, "cat", branch="unconditional")
    other = ovam.generate(PROMPT, branch="unconditional", **SMALL)
    with pytest.raises(InputError, match="make it again with the conditional one chosen"):
        ovam.segment(other, "cat", branch="conditional")
    with pytest.raises(InputError, match="found on the unconditional half"):
        ovam.segment(plain, [token_of("unconditional")])


@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_without_guidance_there_is_one_half(ovam, guidance):
    picture = ovam.generate(PROMPT, guidance_scale=guidance, branch="all", **SMALL)
    assert picture.others == {}
    assert picture.recording.branch == "conditional"
    assert ovam.segment(picture, "cat", crf=False, branch="conditional").labels == ["cat"]
    with pytest.raises(InputError, match="Without guidance there is no unconditional half"):
        ovam.segment(picture, "cat", branch="unconditional")
    with pytest.raises(InputError, match="Without guidance there is no unconditional half"):
        ovam.check_answerable(SegmentSettings(("cat",), tokens=(token_of("unconditional"),)), picture.settings)
    with pytest.raises(InputError, match="Without guidance there is no unconditional half"):
        ovam.generate(PROMPT, guidance_scale=guidance, branch="unconditional", **SMALL)


def test_a_model_whose_guidance_is_an_input():
    ovam = OVAM(pipe_of("flux-dev"))
    settings = GenerateSettings.for_model(ovam.pipe, PROMPT, steps=1, width=64, height=64)
    picture = ovam.draw(settings, branch="all")
    assert picture.others == {}
    with pytest.raises(InputError, match="Without guidance"):
        ovam.segment(picture, "cat", branch="unconditional")


@pytest.mark.parametrize("branch", ["all", "negative", "", 1])
def test_what_is_no_half(ovam, drawn, branch):
    with pytest.raises(InputError, match=r"The half is .*; choose conditional or unconditional"):
        ovam.segment(drawn[0], "cat", branch=branch)


def test_a_photograph_has_the_half_of_its_caption(ovam):
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    captioned, bare = (ovam.photograph(photo, caption, width=64, height=64) for caption in ("the cat", ""))
    assert ovam.segment(bare, "cat", crf=False, branch="unconditional").labels == ["cat"]
    assert ovam.segment(captioned, "cat", crf=False, branch="conditional").labels == ["cat"]
    with pytest.raises(InputError, match="look at it without a caption"):
        ovam.segment(captioned, "cat", branch="unconditional")
    with pytest.raises(InputError, match="look at it with a caption"):
        ovam.segment(bare, "cat", branch="conditional")


def test_a_recording_of_every_row(ovam, tiny):
    """By hand: a recording that is of no half answers for either."""
    with record(tiny, branch="all") as recorder:
        image = tiny(PROMPT, num_inference_steps=1, height=64, width=64).images[0]
    picture = Picture(image, recorder.recordings[0])
    asked = [ovam.segment(picture, "cat", crf=False, branch=half).heatmaps for half in ("conditional", "unconditional")]
    assert np.array_equal(*asked)


# ------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("asked", "half"),
    [
        (SegmentSettings(words=("cat",)), "conditional"),
        (SegmentSettings(words=("cat",), branch="unconditional"), "unconditional"),
        (SegmentSettings(sentence="a cat", branch="unconditional"), "unconditional"),
        (SegmentSettings(tokens=(token_of("unconditional"),)), "unconditional"),
        (SegmentSettings(words=("cat",), tokens=(token_of("unconditional"),)), "all"),
        (SegmentSettings(tokens=(token_of("unconditional"), token_of("conditional"))), "all"),
        (SegmentSettings(), "conditional"),
    ],
)
def test_what_is_to_be_recorded(asked, half):
    assert halves_of(asked) == half


def test_settings_without_a_half_are_what_they_were():
    plain = SegmentSettings(words=("cat",))
    assert "branch" not in plain.to_json()
    other = SegmentSettings(words=("cat",), branch="unconditional")
    again = json.loads(json.dumps(other.to_json()))
    assert SegmentSettings.from_json(again) == other


def test_the_command_line_and_its_replay(tmp_path, capsys):
    about = ["--model", "emoji-voc", "--device", "cpu", "--steps", "2", "--size", "64x64", "--no-crf", "--words", "cat"]
    out, again = tmp_path / "out", tmp_path / "again"
    half = ["--branch", "unconditional"]
    kept = ["--recording", str(tmp_path / "dog.safetensors")]
    assert main(["generate", "a dog", "--negative-prompt", "a cat", *about, *half, *kept, "--out", str(out)]) == 0
    ask = ["segment", *kept[1:], "--device", "cpu", "--no-crf", "--words", "cat", "--out", str(tmp_path / "more")]
    assert main([*ask, *half]) == 0
    assert (tmp_path / "more" / "heatmaps.npz").read_bytes() == (out / "heatmaps.npz").read_bytes()
    assert main(ask) == 2
    assert_refused(capsys.readouterr().err.strip(), "belongs to the conditional half")
    _, asked, _, _ = load_settings(out / "settings.json", GenerateSettings)
    assert asked.branch == "unconditional"
    assert main(["generate", "--settings", str(out / "settings.json"), "--out", str(again)]) == 0
    assert {x.name: x.read_bytes() for x in again.iterdir()} == {x.name: x.read_bytes() for x in out.iterdir()}
    capsys.readouterr()
    assert main(["generate", "a dog", "--guidance", "1", *about, *half, "--out", str(tmp_path / "no")]) == 2
    assert_refused(capsys.readouterr().err.strip(), "Without guidance")
    assert not (tmp_path / "no").exists()
