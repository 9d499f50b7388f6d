"""Heatmaps taken apart, against the triple loop and against recordings of one part; animated pictures of them."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pipelines import CROSS, pipe_of
from reference import Spy, probabilities, triple_loop

from ovam_core import OVAM, InputError, Picture, Token, plot, record
from ovam_core.attention import evolution
from ovam_core.attention.evolution import evolutions, short_name
from ovam_core.attention.heatmap import attribute
from ovam_core.cli import main
from ovam_core.query import attribute_sentence, attribute_words
from ovam_core.settings import EVOLUTIONS, SegmentSettings

PROMPT = "a photograph of the cat"
GRIDS, SIZE = {1024: (32, 32), 256: (16, 16)}, (32, 32)
FEW_BLOCKS = {"cpu": 1 << 9, "other": 1 << 9}  # many blocks of steps and of pixels


@pytest.fixture(scope="module")
def ovam(tiny):
    return OVAM(tiny)


@pytest.fixture(scope="module")
def drawn(ovam, tiny):
    with Spy(tiny) as spy:
        picture = ovam.generate(PROMPT, num_inference_steps=3, width=64, height=64)
    return picture, spy


def close(found, expected):
    torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected), atol=1e-5, rtol=0)


def word_map(spy, prompt, **parts):
    return triple_loop(spy, 1, GRIDS, SIZE, prompt.embedding, **parts)[list(prompt.groups[0])].mean(dim=0)


def head_map(spy, prompt, head, names):
    """One head's mean over layers and steps, each resized on its own."""
    found = []
    for name in names:
        for pixels, _ in spy.seen[name]:
            attention = probabilities(spy.modules[name], pixels[1], prompt.embedding)[head]
            grid = attention.T.reshape(1, -1, *GRIDS[len(attention)])
            found.append(F.interpolate(grid, size=SIZE, mode="bilinear", align_corners=False)[0])
    return torch.stack(found).mean(dim=0)[list(prompt.groups[0])].mean(dim=0)


# ------------------------------------------------------------------------------------------------ the maps


def test_what_it_is_taken_apart_over_is_named_without_torch():
    assert get_args(evolution.Over) == EVOLUTIONS


@pytest.mark.parametrize("blocks", [None, FEW_BLOCKS])
def test_every_frame_is_the_triple_loop_of_its_part(ovam, tiny, drawn, blocks, monkeypatch):
    if blocks:
        monkeypatch.setattr("ovam_core.attention.heatmap.BLOCK_VALUES", blocks)
    picture, spy = drawn
    (prompt,) = attribute_words(tiny, ["car"])
    layers = {x.name: x for x in picture.recording.layers}

    steps = ovam.evolution(picture, "car")
    assert (steps.over, steps.places, steps.maps.dtype) == ("steps", (0, 1, 2), np.float32)
    assert steps.labels == tuple(f"step {n}, t {t}" for n, t in enumerate(picture.recording.timesteps))
    for step, found in zip(steps.places, steps.maps, strict=True):
        close(found, word_map(spy, prompt, steps=[step]))

    grids = ovam.evolution(picture, "car", "grids")
    assert (grids.places, grids.labels) == ((32, 16), ("32x32", "16x16"))
    for side, found in zip(grids.places, grids.maps, strict=True):
        close(found, word_map(spy, prompt, names=[name for name, x in layers.items() if x.resolution == side]))

    each = ovam.evolution(picture, "car", "layers")
    assert each.places == tuple(layers)
    assert each.labels[0] == "down 0.0 (32x32)"
    for name, found in zip(each.places, each.maps, strict=True):
        close(found, word_map(spy, prompt, names=[name]))

    heads = ovam.evolution(picture, "car", "heads")
    assert (heads.places, heads.labels) == ((0, 1, 2, 3), ("head 0", "head 1", "head 2", "head 3"))
    for head, found in zip(heads.places, heads.maps, strict=True):
        close(found, head_map(spy, prompt, head, layers))

    usual = ovam.segment(picture, "car", crf=False).grid_maps[0]
    for one in (steps, grids, each, heads):
        close(one.mean, usual)
        assert one.weights.sum() == pytest.approx(1)
    close(steps.maps.mean(axis=0), usual)  # every step has as many attention maps as another
    assert steps.weights.tolist() == [1 / 3] * 3
    assert steps.maps.std(axis=0).max() > 1e-3  # and its own


def test_a_grid_a_layer_and_their_heads(ovam, tiny, drawn):
    picture, spy = drawn
    (prompt,) = attribute_words(tiny, ["car"])
    names = [x.name for x in picture.recording.layers if x.resolution == 16]
    found = ovam.evolution(picture, "car", "heads", resolutions=[16])
    close(found.maps[1], head_map(spy, prompt, 1, names))
    found = ovam.evolution(picture, "car", "heads", layers=names[-1:])
    close(found.maps[2], head_map(spy, prompt, 2, names[-1:]))
    found = ovam.evolution(picture, "car", layers=names[:1], step_indices=[0, 2])
    assert found.places == (0, 2)
    close(found.maps[1], word_map(spy, prompt, names=names[:1], steps=[2]))


@pytest.mark.parametrize("name", [*CROSS, "sd3.5", "flux-dev", "flux-2"])
def test_every_family(name):
    """Each frame is the map of a recording that holds nothing else."""
    pipe = pipe_of(name)
    more = {"use_resolution_binning": False} if name.startswith(("pixart", "sana", "hunyuan")) else {}
    with record(pipe) as recorder:
        pipe(prompt=PROMPT, num_inference_steps=2, height=64, width=64, output_type="latent", **more)
    recording = recorder.recordings[0]
    prompts = [*attribute_words(pipe, ["cat", "the red bus"]), attribute_sentence(pipe, "a cat")]
    whole = attribute(recording, prompts)
    select = {"steps": "steps", "grids": "resolutions", "layers": "layers"}
    for over, argument in select.items():
        found = evolutions(recording, prompts, over)
        assert len(found) == len(whole)
        for place, *maps in zip(found[0].places, *(one.maps for one in found), strict=True):
            close(np.stack(maps), attribute(recording.select(**{argument: [place]}), prompts))
        for one, expected in zip(found, whole, strict=True):
            close(one.mean, expected)
    finest = evolution.of_as_many_heads(recording)
    for one, expected in zip(evolutions(finest, prompts, "heads"), attribute(finest, prompts), strict=True):
        close(one.mean, expected)
        close(one.maps.mean(axis=0), expected)


def test_layers_of_different_numbers_of_heads(tiny_sd2):
    """Head 3 of one layer is not head 3 of another; without a choice they are the finest grid's."""
    ovam = OVAM(tiny_sd2)
    picture = ovam.generate(PROMPT, num_inference_steps=1, width=64, height=64)
    numbers = {x.resolution: x.queries.shape[1] for x in picture.recording.layers}
    assert len(set(numbers.values())) == 2
    assert len(ovam.evolution(picture, "cat", "heads").places) == numbers[32]
    assert len(ovam.evolution(picture, "cat", "heads", resolutions=[16]).places) == numbers[16]
    with pytest.raises(InputError, match="choose one grid or one layer"):
        evolutions(picture.recording, attribute_words(tiny_sd2, ["cat"]), "heads")


def test_steps_that_a_cache_took_count_for_less(tiny, drawn):
    """A layer without step 1: the frames are true means, and their weighted mean is the heatmap of all maps."""
    recording = drawn[0].recording
    first, *rest = recording.layers
    holed = replace(recording, layers=(first.at((0, 2), (0, 1, 2)), *rest))
    prompts = attribute_words(tiny, ["cat"])
    (found,) = evolutions(holed, prompts, "steps")
    close(found.mean, attribute(holed, prompts)[0])
    close(found.maps[1], attribute(recording.select([1], [x.name for x in rest]), prompts)[0])
    assert found.weights[0] == found.weights[2] > found.weights[1]
    only = replace(recording, layers=tuple(x.at((0, 2), (0, 1, 2)) for x in recording.layers))
    assert evolutions(only, prompts, "steps")[0].places == (0, 2)


def test_what_the_model_does_not_recommend_is_shown_and_does_not_weigh():
    ovam = OVAM.from_pretrained("emoji-voc", "cpu")
    picture = ovam.generate("A photograph of a cat", num_inference_steps=5, width=64, height=64)
    usual = ovam.segment(picture, "cat", crf=False).grid_maps[0]
    steps = ovam.evolution(picture, "cat")
    noisy = [at > ovam.preset.max_timestep for at in picture.recording.timesteps]
    assert any(noisy)
    assert (steps.weights == 0).tolist() == noisy
    layers = ovam.evolution(picture, "cat", "layers")
    assert set(layers.places) == {x.name for x in picture.recording.layers}
    assert 0 < (layers.weights > 0).sum() < len(layers.places)
    for over in EVOLUTIONS:
        close(ovam.evolution(picture, "cat", over).mean, usual)


def test_tokens_and_sentences(ovam, drawn):
    picture, _ = drawn
    rows = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    token = Token(rows, ("background", "cat", "dog"), "tiny")
    found = ovam.segment(picture, [token], crf=False)
    close(ovam.evolution(picture, token, "layers", label="dog").mean, found.grid_maps[1])
    sentence = ovam.evolution(picture, sentence="a cat and a cat", label="cat (2)")
    found = ovam.segment(picture, sentence="a cat and a cat", crf=False)
    close(sentence.mean, found.grid_maps[found.labels.index("cat (2)")])
    with pytest.raises(InputError, match="the labels cat, dog: choose one"):
        ovam.evolution(picture, token)
    with pytest.raises(InputError, match="choose one"):
        ovam.evolution(picture, token, label="cow")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"over": "time"}, "choose steps, grids, layers, heads"),
        ({"over": ["steps"]}, "choose steps, grids, layers, heads"),
        ({"query": ""}, "no words"),
        ({"query": ["cat"]}, "What is asked for is a list: give a word or a Token"),
        ({"query": 5}, "What is asked for is a int: give a word or a Token"),
        ({"query": None}, "What is asked for is a NoneType: give a word or a Token"),
        ({"step_indices": [7]}, "None of these steps"),
        ({"step_indices": []}, "No denoising step"),
        ({"resolutions": [7]}, "No attention grid is 7 wide"),
        ({"layers": ["nowhere"]}, "No recorded layer matches"),
        ({"over": "heads", "layers": ["nowhere"]}, "No recorded layer matches"),
        ({"branch": "unconditional"}, "recorded on the conditional half"),
        ({"branch": "both"}, "The half is 'both'"),
    ],
)
def test_bad_choices(ovam, drawn, asked, said):
    with pytest.raises(InputError, match=said):
        ovam.evolution(drawn[0], **{"query": "cat"} | asked)


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("up_blocks.2.attentions.1.transformer_blocks.0.attn2", "up 2.1"),
        ("down_blocks.0.attentions.0.transformer_blocks.3.attn2", "down 0.0.3"),
        ("mid_block.attentions.0.transformer_blocks.0.attn2", "mid 0"),
        ("transformer_blocks.7.attn", "block 7"),
        ("blocks.0.attn2", "block 0"),
        ("somewhere.attn", "somewhere.attn"),
    ],
)
def test_short_names(name, short):
    assert short_name(name) == short


def test_layers_of_one_short_name_keep_their_own(tiny, drawn):
    recording = drawn[0].recording
    _, second, *_ = recording.layers
    one = replace(second, name="x.transformer_blocks.1.attn"), replace(second, name="x.transformer_blocks.1.attn2")
    found = evolutions(replace(recording, layers=one), attribute_words(tiny, ["cat"]), "layers")[0]
    assert found.labels[0].startswith("x.transformer_blocks.1.attn (")
    twins = replace(second, name="blocks.1.attn"), replace(second, name="transformer_blocks.1.attn")
    found = evolutions(replace(recording, layers=twins), attribute_words(tiny, ["cat"]), "layers")[0]
    assert [label.split(" (")[0] for label in found.labels] == ["blocks.1.attn", "transformer_blocks.1.attn"]


# ------------------------------------------------------------------------------------------------ animated pictures


def read_frames(data):
    picture = Image.open(io.BytesIO(data))
    shown = []
    for number in range(picture.n_frames):
        picture.seek(number)
        picture.load()
        shown.append((picture.convert("RGB"), picture.info["duration"]))
    return picture, shown


def test_frames_and_their_animation():
    image = Image.new("RGB", (64, 48), "red")
    maps = np.stack([np.linspace(0, top, 12, dtype=np.float32).reshape(3, 4) for top in (0.2, 0.8, 0.4)])
    frames = plot.frames(image, maps, ["step 0", "step 1", "step 2"])
    assert {frame.size for frame in frames} == {(256, 192 + plot.CAPTION)}
    below = plot.enlarge(image, 256)
    for frame, one in zip(frames, maps, strict=True):
        shown = frame.crop((0, 0, *below.size))
        assert shown.tobytes() == plot.overlay(below, one, 0.8).tobytes()
    data = plot.animation(frames, 150, 900)
    assert data == plot.animation(plot.frames(image, maps, ["step 0", "step 1", "step 2"]), 150, 900)
    picture, shown = read_frames(data)
    assert (picture.format, picture.is_animated, picture.info["loop"]) == ("WEBP", True, 0)
    assert [duration for _, duration in shown] == [150, 150, 900]
    for (found, _), frame in zip(shown, frames, strict=True):
        assert np.abs(np.asarray(found, float) - np.asarray(frame, float)).mean() < 6


def test_a_large_picture_and_one_frame():
    (frame,) = plot.frames(Image.new("L", (1200, 600)), np.zeros((1, 4, 4), np.float32), ["head 0"])
    assert frame.size == (512, 256 + plot.CAPTION)
    assert read_frames(plot.animation([frame]))[1][0][0].size == frame.size


@pytest.mark.parametrize(
    ("frames", "said"),
    [([], "no picture"), ([Image.new("RGB", (8, 8)), Image.new("RGB", (8, 9))], "one size")],
)
def test_what_cannot_be_animated(frames, said):
    with pytest.raises(InputError, match=said):
        plot.animation(frames)


def test_maps_and_labels_go_together():
    with pytest.raises(InputError, match="2 maps and 1 labels"):
        plot.frames(Image.new("RGB", (8, 8)), np.zeros((2, 4, 4)), ["step 0"])


# ------------------------------------------------------------------------------------------------ files


def test_the_command_line_writes_one_for_each_word(tmp_path):
    out = tmp_path / "out"
    made = ["--model", "emoji-voc", "--device", "cpu", "--steps", "3", "--size", "64x64", "--no-crf", "--out"]
    asked = ["generate", "a cat and a red bus", "--words", "cat", "red bus", "--evolution"]
    assert main([*asked, *made, str(out)]) == 0
    assert {x.name for x in out.glob("*.webp")} == {"evolution_cat.webp", "evolution_red-bus.webp"}
    assert read_frames((out / "evolution_cat.webp").read_bytes())[0].n_frames == 3
    assert main(["generate", "--settings", str(out / "settings.json"), "--out", str(tmp_path / "again")]) == 0
    again = {x.name: x.read_bytes() for x in (tmp_path / "again").iterdir()}
    assert again == {x.name: x.read_bytes() for x in out.iterdir()}


def test_the_command_line_refuses_another_word(tmp_path, capsys):
    assert main(["generate", "a cat", "--words", "cat", "--evolution", "years", "--out", str(tmp_path / "out")]) == 2
    assert "invalid choice: 'years'" in capsys.readouterr().err


def test_a_picture_by_hand_can_be_asked(ovam, tiny, tmp_path):
    with record(tiny) as recorder:
        image = tiny(PROMPT, num_inference_steps=2, height=64, width=64).images[0]
    picture = Picture(image, recorder.recordings[0])
    assert ovam.evolution(picture, "cat").places == (0, 1)
    found = ovam.answer(picture, SegmentSettings(words=("cat", "car"), evolution="grids", crf=False))
    assert [one.labels for one in found.evolutions] == [("32x32", "16x16")] * 2
    close(found.evolutions[1].mean, found.grid_maps[1])
    found.save(tmp_path)
    assert len(list(tmp_path.glob("evolution_*.webp"))) == 2
    plain = ovam.answer(picture, SegmentSettings(words=("cat",), crf=False))
    plain.save(tmp_path)  # another result in the same folder
    assert not list(tmp_path.glob("*.webp"))
    assert plain.evolutions == []
    assert "evolution" not in plain.settings.to_json()
    assert SegmentSettings.from_json(found.settings.to_json() | {"words": ["cat", "car"]}) == found.settings
    with pytest.raises(InputError, match="The evolution is 'years'"):
        ovam.answer(picture, SegmentSettings(words=("cat",), evolution="years"))
