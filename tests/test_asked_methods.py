"""`answer` by every method: as methods.py on the same recording, refusals before an image is made, the command line."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import make_pipe
from reference import found_by

from ovam_core import METHODS, OVAM, Picture, Token
from ovam_core.attention.heatmap import resize
from ovam_core.cli import main
from ovam_core.errors import InputError
from ovam_core.hooks.goca_recorder import record_goca
from ovam_core.hooks.photograph import denoise, prepare
from ovam_core.io.pictures import read_photo
from ovam_core.methods import ATTN2MASK, CONCEPT_ATTENTION, DAAM, WeightedMethod, check_settings, settings_of_text
from ovam_core.picture import load_settings
from ovam_core.query import token_prompt
from ovam_core.settings import DEFAULT_METHOD, GenerateSettings, PhotoSettings, SegmentSettings
from ovam_core.tokens import BACKGROUND

PROMPT = "a photograph of the cat and a red bus"
SIDES = {"width": 64, "height": 64}
WORDS = ("cat", "red bus")
OTHERS = (ATTN2MASK, CONCEPT_ATTENTION)  # which need a run of 100 steps, and joint attention
BY_WORDS = [name for name, one in METHODS.items() if one.asks == "words" and one not in OTHERS]
BY_TOKEN = [name for name, one in METHODS.items() if one.asks == "token"]


@pytest.fixture(scope="module")
def made(tiny):
    settings = GenerateSettings.for_model(tiny, PROMPT, steps=4, seed=2, **SIDES)
    return OVAM(tiny).draw(settings, with_goca=True, keep=["matrix"])


@pytest.fixture(scope="module")
def token() -> Token:
    embedding = torch.randn(2, 32, generator=torch.Generator().manual_seed(3))
    return Token(embedding, (BACKGROUND, "cat"), "unknown", tau=0.5, alpha=0.9)


def seen_of(made) -> Picture:
    return replace(made, last_maps=None)


def assert_same(answer, found, size):
    assert tuple(answer.labels) == found.labels
    assert np.allclose(answer.heatmaps, resize(found.maps, size).numpy(), atol=1e-5)
    assert np.array_equal(answer.masks, found.masks)


def test_the_image_is_the_same_and_the_pass_is_counted(tiny, made):
    plain = OVAM(tiny).draw(made.settings)
    assert np.array_equal(np.asarray(plain.image), np.asarray(made.image))
    assert plain.goca is None
    assert made.goca.nbytes > 0
    assert made.nbytes - plain.nbytes >= made.goca.nbytes
    with record_goca(tiny) as weighted:
        OVAM(tiny).draw(made.settings)
    assert made.goca.timestep == weighted.recordings[0].timestep
    assert torch.equal(made.goca.finest[0].queries, weighted.recordings[0].finest[0].queries)


@pytest.mark.parametrize("name", BY_WORDS)
def test_words_by_every_method(tiny, made, name):
    tau = METHODS[name].tau
    answer = OVAM(tiny).answer(made, SegmentSettings(WORDS, method=name, tau=tau, alpha=0.85))
    assert_same(answer, found_by(METHODS[name], tiny, seen_of(made), WORDS), (made.image.height, made.image.width))


@pytest.mark.parametrize("name", BY_TOKEN)
def test_tokens_by_every_method(tiny, made, token, name):
    asked = [token_prompt(tiny, token)]
    answer = OVAM(tiny).answer(made, SegmentSettings(tokens=(token,), method=name, token_tau=0.8, token_alpha=0.95))
    expected = found_by(METHODS[name], tiny, seen_of(made), tokens=asked)
    assert_same(answer, expected, (made.image.height, made.image.width))


def test_the_sliders_rule_what_the_method_uses(tiny, made):
    def masks(name, **settings):
        return (
            OVAM(tiny)
            .answer(
                made, SegmentSettings(WORDS, **{"method": name, "tau": 0.4, "alpha": 0.85, "crf": False, **settings})
            )
            .masks
        )

    plain = masks("DAAM")
    assert np.array_equal(plain, masks("DAAM", alpha=0.1, crf=True))
    assert (masks("DAAM", tau=0.9) < plain).any()
    assert not np.array_equal(masks("OVAM"), masks("OVAM", alpha=0.0))
    assert np.array_equal(masks("GoCA"), masks("GoCA", alpha=0.1, crf=True))
    weighted = next(name for name in BY_WORDS if isinstance(METHODS[name], WeightedMethod))
    assert (masks(weighted, tau=0.9) < masks(weighted)).any()


def test_one_method_after_another_is_not_the_last_answer(tiny, made):
    weighted = next(name for name in BY_WORDS if isinstance(METHODS[name], WeightedMethod))
    first = OVAM(tiny).answer(made, SegmentSettings(WORDS, crf=False)).heatmaps
    other = OVAM(tiny).answer(made, SegmentSettings(WORDS, crf=False, method=weighted)).heatmaps
    assert not np.allclose(first, other)
    assert np.array_equal(first, OVAM(tiny).answer(made, SegmentSettings(WORDS, crf=False)).heatmaps)


@pytest.mark.slow
def test_attn2mask_looks_at_step_50_of_100(tiny):
    made = OVAM(tiny).draw(GenerateSettings.for_model(tiny, PROMPT, steps=100, **SIDES))
    answer = OVAM(tiny).answer(made, SegmentSettings(WORDS, method="Attn2Mask"))
    assert_same(answer, found_by(ATTN2MASK, tiny, seen_of(made), WORDS), (64, 64))  # tau its own, 0.5
    assert OVAM(tiny).filled(SegmentSettings(WORDS, method="Attn2Mask")).tau == ATTN2MASK.tau
    assert OVAM(tiny).filled(SegmentSettings(WORDS, method="DAAM")).tau == DAAM.tau


def test_a_photograph_by_goca(tiny):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3), np.uint8))
    made = OVAM(tiny).look_at(image, PhotoSettings(PROMPT, (20, 90, 300)), with_goca=True)
    with record_goca(tiny, branch="all") as weighted:
        denoise(tiny, prepare(tiny, [image], [PROMPT], (90,)))
    assert made.goca.timestep == 90 == weighted.recordings[0].timestep
    answer = OVAM(tiny).answer(made, SegmentSettings(WORDS, method="GoCA"))
    assert answer.masks.shape == (2, 60, 90)
    assert not answer.masks.all(0).any()
    assert_same(answer, found_by(METHODS["GoCA"], tiny, seen_of(made), WORDS), (60, 90))


REFUSED = {
    "no such method": ({"method": "DINO"}, "There is no method 'DINO'; choose among DAAM"),
    "a number": ({"method": 3}, "There is no method '3'"),
    "words by token": ({"method": "OVAM + token"}, "takes tokens, not words"),
    "no token": ({"method": "GoCA + token", "words": ()}, "choose a token"),
    "a sentence": ({"method": "GoCA", "sentence": "the cat"}, "asks for words alone"),
    "steps": ({"method": "GoCA", "step_indices": (1,)}, "name no denoising steps"),
    "steps of Attn2Mask": ({"method": "Attn2Mask", "step_indices": (1,)}, "name no denoising steps"),
    "resolutions": ({"method": "OVAM, GoCA's weights", "resolutions": (8,)}, "name no resolutions"),
    "a run of 4": ({"method": "Attn2Mask"}, "generate an image with 100 steps"),
    "not in the prompt": ({"method": "GoCA", "words": ("car",)}, "GoCA cannot be asked this: 'car' does not stand"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_asked(tiny, made, case):
    change, part = REFUSED[case]
    with pytest.raises(InputError, match=part.replace("+", r"\+")) as caught:
        OVAM(tiny).answer(made, SegmentSettings(**{"words": WORDS, **change}))
    assert "\n" not in str(caught.value)


def test_without_the_pass_and_for_a_photograph(tiny, made, token):
    plain = OVAM(tiny).draw(made.settings)
    with pytest.raises(InputError, match="needs a pass that was not recorded"):
        OVAM(tiny).answer(plain, SegmentSettings(WORDS, method="GoCA"))
    with pytest.raises(InputError, match="100 steps"):
        OVAM(tiny).check_answerable(SegmentSettings(WORDS, method="Attn2Mask"), PhotoSettings(PROMPT))
    with pytest.raises(InputError, match="compares words"):
        check_settings(SegmentSettings(WORDS, tokens=(token,), method="GoCA"))
    assert settings_of_text("", method="OVAM + token").words == ()  # the sentence about tokens is the method's


# ------------------------------------------------------------------------------------------ the command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model") / "tiny"
    make_pipe().save_pretrained(path)
    return str(path)


def test_method_on_the_command_line(folder, tmp_path, capsys):
    common = ["--model", folder, "--device", "cpu", "--words", *WORDS]
    out, again = tmp_path / "out", tmp_path / "again"
    assert (
        main(["generate", PROMPT, "--steps", "2", "--size", "64x64", "--method", "goca", "--out", str(out), *common])
        == 0
    )
    _, asked, *_ = load_settings(out / "settings.json", GenerateSettings)
    assert asked.method == "GoCA"
    assert json.loads((out / "settings.json").read_text())["maps"]["method"] == "GoCA"
    assert main(["generate", "--settings", str(out / "settings.json"), "--out", str(again), "--device", "cpu"]) == 0
    assert {x.name: x.read_bytes() for x in again.iterdir()} == {x.name: x.read_bytes() for x in out.iterdir()}

    about = ["photo", str(out / "image.png"), "--caption", PROMPT, *common, "--out", str(tmp_path / "photo")]
    assert main([*about, "--method", "GoCA, any word"]) == 0
    pipe = make_pipe()
    made = OVAM(pipe).look_at(read_photo(out / "image.png"), PhotoSettings(PROMPT), with_goca=True)
    expected = OVAM(pipe).answer(made, SegmentSettings(WORDS, method="GoCA, any word"))
    with np.load(tmp_path / "photo" / "heatmaps.npz") as file:
        assert np.allclose(file["maps"], expected.heatmaps, atol=1e-4)
    capsys.readouterr()
    for wrong, part in (
        ("dino", "There is no method 'dino'"),
        ("attn2mask", "100 steps"),
        ("ovam + token", "takes tokens"),
    ):
        assert main([*about, "--method", wrong]) == 2
        said = capsys.readouterr().err.strip()
        assert said.startswith("Error: ")
        assert part in said
        assert "\n" not in said


def test_an_old_settings_file_is_by_ovam(tmp_path, tiny, made):
    asked = SegmentSettings(WORDS, crf=False)
    OVAM(tiny).answer(made, asked).save(tmp_path)
    about = json.loads((tmp_path / "settings.json").read_text())
    del about["maps"]["method"]
    (tmp_path / "settings.json").write_text(json.dumps(about))
    assert load_settings(tmp_path / "settings.json", GenerateSettings)[1].method == DEFAULT_METHOD
