"""Pictures that begin from a picture: diffusers' own image-to-image call bit for bit, and the maps of its steps."""

from __future__ import annotations

import copy
import inspect
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionPAGPipeline,
)
from PIL import Image
from pipelines import make_pipe, make_sdxl_without_zeros, pipe_of
from reference import Spy, assert_refused, triple_loop

from ovam_core import OVAM, InputError, record
from ovam_core.cli import main
from ovam_core.errors import Stopped
from ovam_core.models.starting import fitted_start, starting_from_picture
from ovam_core.optimization import RECIPES
from ovam_core.picture import load_settings
from ovam_core.query import attribute_words
from ovam_core.settings import GenerateSettings, SegmentSettings

PROMPT = "a photograph of the cat"
STARTS = ["sd", "sdxl", "sd3", "sd3.5", "flux-dev", "flux-schnell"]
OTHERS = ["pixart-alpha", "pixart-sigma", "sana", "hunyuan", "flux-2"]
RNG = np.random.default_rng(0)
START = Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8))


def by_diffusers(pipe, start=START, seed=3, **more):
    """The image of diffusers' own pipeline, made by its own way from one to the other."""
    made = AutoPipelineForImage2Image.from_pipe(pipe)
    made.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    return np.asarray(made(PROMPT, image=start, generator=generator, **more).images[0])


# ------------------------------------------------------------------------------------------------ the picture


@pytest.mark.parametrize("name", STARTS)
@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_the_image_is_that_of_diffusers(name, strength):
    pipe = pipe_of(name)
    settings = GenerateSettings(
        PROMPT, seed=3, steps=5, guidance=4.0, width=64, height=64, start=START, strength=strength
    )
    picture = OVAM(pipe).draw(settings)
    sides = {"width": 64, "height": 64} if name.startswith(("sd3", "flux")) else {}
    expected = by_diffusers(pipe, strength=strength, num_inference_steps=5, guidance_scale=4.0, **sides)
    assert np.array_equal(np.asarray(picture.image), expected)
    run = 3 if strength < 1 else 5
    assert picture.recording.step_indices == tuple(range(run))
    assert len(picture.recording.timesteps) == run
    assert list(picture.recording.timesteps) == sorted(picture.recording.timesteps, reverse=True)
    assert OVAM(pipe).segment(picture, "cat", crf=False).heatmaps.shape == (1, 64, 64)


def test_a_true_negative_prompt_of_flux_is_no_step():
    """By hand; diffusers makes its pass after the prompt's, and does not say so."""
    pipe, found = starting_from_picture(pipe_of("flux-dev")), []
    for more in ({}, {"true_cfg_scale": 3.0, "negative_prompt": "the red bus"}):
        with record(pipe) as recorder:
            generator = torch.Generator().manual_seed(0)
            pipe(PROMPT, image=START, strength=0.6, num_inference_steps=5, generator=generator, **more)
        found.append(recorder.recordings[0])
    assert found[0].timesteps == found[1].timesteps
    for plain, other in zip(found[0].layers, found[1].layers, strict=True):
        assert torch.equal(plain.queries[0], other.queries[0])
        assert not torch.equal(plain.queries[1], other.queries[1])


@pytest.mark.parametrize("kind", [HeunDiscreteScheduler, PNDMScheduler, EulerAncestralDiscreteScheduler])
def test_other_schedulers(fresh, kind):
    fresh.scheduler = kind.from_config(fresh.scheduler.config)
    picture = OVAM(fresh).draw(GenerateSettings(PROMPT, seed=3, steps=4, width=64, height=64, start=START))
    expected = by_diffusers(fresh, strength=0.6, num_inference_steps=4, guidance_scale=4.0)
    assert np.array_equal(np.asarray(picture.image), expected)


def test_perturbed_attention(fresh):
    pipe = StableDiffusionPAGPipeline(
        **fresh.components, requires_safety_checker=False, pag_applied_layers=["up.block_1"]
    )
    ovam = OVAM(pipe)
    settings = GenerateSettings(PROMPT, seed=3, steps=2, width=64, height=64, start=START)
    picture = ovam.draw(settings, branch="all")
    expected = by_diffusers(pipe, strength=0.6, num_inference_steps=2, guidance_scale=4.0)
    assert np.array_equal(np.asarray(picture.image), expected)
    assert set(picture.others) == {"unconditional"}


def test_the_maps_are_the_triple_loop_of_the_steps_that_ran(fresh):
    ovam = OVAM(fresh)
    with Spy(fresh) as spy:
        picture = ovam.generate(
            PROMPT, negative_prompt="car", num_inference_steps=5, width=64, height=64, start=START, branch="all"
        )
    assert {len(calls) for calls in spy.seen.values()} == {3}
    (prompt,) = attribute_words(fresh, ["car"])
    for half, item in (("unconditional", 0), ("conditional", 1)):
        found = ovam.segment(picture, "car", crf=False, branch=half).grid_maps[0]
        loop = triple_loop(spy, item, {1024: (32, 32), 256: (16, 16)}, (32, 32), prompt.embedding)
        expected = loop[list(prompt.groups[0])].mean(dim=0).numpy()
        np.testing.assert_allclose(found, expected, atol=1e-5)
    steps = ovam.evolution(picture, "car")
    assert steps.places == (0, 1, 2)
    fresh.scheduler.set_timesteps(5)
    assert picture.recording.timesteps == tuple(fresh.scheduler.timesteps.tolist()[2:])


def test_the_pipeline_stays_as_it_is(fresh):
    fresh.ovam_name = "tiny"
    ovam = OVAM(fresh)
    ovam.generate(PROMPT, num_inference_steps=4, width=64, height=64)

    def state():
        modules = [x for part in fresh.components.values() if isinstance(x := part, torch.nn.Module)]
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for x in modules for m in x.modules()]
        kinds = [x.dtype for x in modules]
        scheduler = {name: str(value) for name, value in vars(fresh.scheduler).items()}
        own = {name: id(value) for name, value in vars(fresh).items() if name != "_interrupt"}
        return hooks, kinds, scheduler, own, copy.deepcopy(dict(fresh.config)), dict(fresh.unet.config)

    before = state()
    picture = ovam.generate(PROMPT, num_inference_steps=5, width=64, height=64, start=START, strength=0.4)
    assert state() == before
    assert picture.model == "tiny"
    made = starting_from_picture(fresh)
    assert made.unet is fresh.unet
    assert made.vae is fresh.vae
    assert made.scheduler is not fresh.scheduler


def test_nothing_is_added_to_the_picture_that_the_pipeline_would_not_add():
    pipe = pipe_of("sdxl")
    assert starting_from_picture(pipe).watermark is None
    assert starting_from_picture(make_sdxl_without_zeros()).config.force_zeros_for_empty_prompt is False


def test_progress_counts_the_steps_that_run(tiny):
    seen = []
    about = {"num_inference_steps": 5, "width": 64, "height": 64, "start": START, "strength": 0.4}
    OVAM(tiny).generate(PROMPT, callback_on_step_end=lambda done, total: seen.append((done, total)), **about)
    assert seen == [(0, 2), (1, 2), (2, 2)]
    settings = GenerateSettings(PROMPT, steps=5, width=64, height=64, start=START, strength=0.4)
    with pytest.raises(Stopped) as stopped:
        OVAM(tiny).draw(settings, should_stop=lambda: True)
    assert (stopped.value.steps, stopped.value.total) == (0, 2)


@pytest.mark.parametrize(("steps", "strength"), [(25, 0.04), (10, 0.1), (4, 0.25)])
def test_goca_looks_at_a_step_that_runs(tiny, steps, strength):
    """The one nearest to the paper's t = 100 may lie before the run's first."""
    picture = OVAM(tiny).generate(
        PROMPT, num_inference_steps=steps, width=64, height=64, start=START, strength=strength
    )
    assert len(picture.recording.timesteps) == 1
    assert picture.goca.timestep == picture.recording.timesteps[0]


# ------------------------------------------------------------------------------------------------ the start


def test_the_start_covers_the_size():
    wide = Image.new("RGB", (300, 100), "red")
    wide.paste("blue", (100, 0, 200, 100))
    fitted = fitted_start(wide, (64, 64))
    assert fitted.size == (64, 64)
    assert np.asarray(fitted)[:, 2:-2, 2].min() > 250  # the middle third, at the picture's whole height
    assert fitted_start(Image.new("L", (1, 1), 7), (64, 96)).getpixel((3, 3)) == (7, 7, 7)
    assert fitted_start(START, (64, 64)).tobytes() == START.tobytes()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "I;16", "1"])
def test_starts_of_any_mode(tmp_path, mode):
    Image.new("L", (40, 30), 255).convert(mode).save(tmp_path / "x.tif")
    assert fitted_start(tmp_path / "x.tif", (64, 64)).mode == "RGB"


def test_a_photograph_is_turned_upright_and_tells_nothing_more(tmp_path):
    about = Image.Exif()
    about[0x0112], about[0x010F] = 6, "a camera"
    picture = Image.new("RGB", (64, 128), "red")
    picture.paste("blue", (0, 64, 64, 128))
    picture.save(tmp_path / "x.jpg", exif=about, quality=100)
    fitted = fitted_start(str(tmp_path / "x.jpg"), (128, 64))
    assert fitted.getpixel((10, 30))[2] > 200  # its lower half is the left one
    assert fitted.getpixel((120, 30))[0] > 200
    assert fitted.info == {}
    assert not fitted.getexif()


@pytest.mark.parametrize(
    ("start", "said"),
    [
        (5, "The start is a int"),
        (np.zeros((4, 4, 3), np.uint8), "The start is a ndarray"),
        (b"PNG", "The start is a bytes"),
        ("/nowhere/x.png", "There is no picture"),
        (__file__, "is not a picture"),
    ],
)
def test_what_is_no_start(tiny, start, said):
    with pytest.raises(InputError, match=said):
        OVAM(tiny).generate(PROMPT, num_inference_steps=2, width=64, height=64, start=start)


@pytest.mark.parametrize("strength", [0, -0.1, 1.01, float("nan"), float("inf"), "0.5", True, 0.001])
def test_strengths_that_cannot_be(tiny, strength):
    with pytest.raises(InputError, match=r"The strength is .*from 0\.005 to 1"):
        OVAM(tiny).generate(PROMPT, width=64, height=64, start=START, strength=strength)


@pytest.mark.parametrize(("steps", "strength", "least"), [(2, 0.4, "0.5"), (3, 0.3, "0.334"), (25, 0.03, "0.04")])
def test_one_step_at_least_runs(tiny, steps, strength, least):
    about = {"num_inference_steps": steps, "width": 64, "height": 64, "start": START}
    with pytest.raises(InputError, match=f"none of {steps} steps: choose {least} at least"):
        OVAM(tiny).generate(PROMPT, **about, strength=strength)
    assert len(OVAM(tiny).generate(PROMPT, **about, strength=float(least)).recording.timesteps) == 1


@pytest.mark.parametrize("name", OTHERS)
def test_families_that_start_from_no_picture(name):
    ovam = OVAM(pipe_of(name))
    settings = GenerateSettings.for_model(ovam.pipe, PROMPT, width=64, height=64, start=START)
    with pytest.raises(InputError, match="cannot start from a picture: leave it out, or load a model of Stable Diff"):
        settings.validate(ovam.pipe)


def test_a_consistency_model_counts_its_steps_otherwise(fresh):
    pipe = LatentConsistencyModelPipeline(
        **fresh.components | {"scheduler": LCMScheduler()}, requires_safety_checker=False
    )
    with pytest.raises(InputError, match="cannot start from a picture"):
        OVAM(pipe).generate(PROMPT, num_inference_steps=4, width=64, height=64, start=START)


def test_a_strength_needs_a_start(tiny):
    with pytest.raises(InputError, match="no picture to start from"):
        OVAM(tiny).generate(PROMPT, width=64, height=64, strength=0.5)


def test_steps_of_the_whole_run_alone_can_be_asked(tiny):
    ovam = OVAM(tiny)
    made = GenerateSettings(PROMPT, steps=5, width=64, height=64, start=START, strength=0.4)
    ovam.check_answerable(SegmentSettings(words=("cat",), step_indices=(1,)), made)
    with pytest.raises(InputError, match="in a run of 2: choose among 0 to 1"):
        ovam.check_answerable(SegmentSettings(words=("cat",), step_indices=(4,)), made)
    with pytest.raises(InputError, match="step 50 of a run of 100"):
        ovam.check_answerable(SegmentSettings(words=("cat",), method="Attn2Mask"), replace(made, steps=100))
    whole = replace(made, steps=100, strength=1.0)
    ovam.check_answerable(SegmentSettings(words=("cat",), method="Attn2Mask"), whole)


# ------------------------------------------------------------------------------------------------ settings, files


def test_settings_without_a_start_are_what_they_were():
    plain = GenerateSettings(PROMPT)
    keys = ["prompt", "negative_prompt", "seed", "steps", "guidance", "width", "height"]
    assert list(plain.to_json()) == keys
    assert GenerateSettings.from_json(plain.to_json()) == plain
    begun = GenerateSettings(PROMPT, start=START, strength=0.3)
    assert list(begun.to_json()) == [*keys, "start", "strength"]
    assert begun.to_json()["start"] == "start.png"
    assert GenerateSettings.from_json(json.loads(json.dumps(begun.to_json()))).strength == 0.3


def test_a_token_of_such_a_picture_says_so(tiny):
    ovam = OVAM(tiny)
    picture = ovam.draw(GenerateSettings(PROMPT, steps=2, width=64, height=64, start=START))
    mask = np.zeros((64, 64), bool)
    mask[:32] = True
    quick = replace(RECIPES["fast"], epochs=1)
    token, _ = ovam.learn([picture], [mask.astype(np.uint8)], ["cat"], quick)
    assert json.loads(token.settings)["image"]["strength"] == 0.6
    plain = ovam.draw(GenerateSettings(PROMPT, steps=1, width=64, height=64))
    token, _ = ovam.learn([plain], [mask.astype(np.uint8)], ["cat"], quick)
    kept = json.loads(token.settings)["image"]
    assert kept.keys() == {"negative_prompt", "guidance", "width", "height"}


def test_the_command_line_and_its_replay(tmp_path, capsys):
    Image.fromarray(RNG.integers(0, 256, (70, 90, 4), dtype=np.uint8), "RGBA").save(tmp_path / "photo.png")
    about = ["--model", "emoji-voc", "--device", "cpu", "--steps", "4", "--size", "96x64", "--no-crf"]
    begun = ["--start", str(tmp_path / "photo.png"), "--strength", "0.5", "--words", "cat"]
    out, again = tmp_path / "out", tmp_path / "again"
    assert main(["generate", "a cat", *about, *begun, "--out", str(out)]) == 0
    assert "2 steps" in capsys.readouterr().out
    assert Image.open(out / "start.png").size == (96, 64)
    (tmp_path / "photo.png").unlink()
    assert main(["generate", "--settings", str(out / "settings.json"), "--out", str(again)]) == 0
    assert {x.name: x.read_bytes() for x in again.iterdir()} == {x.name: x.read_bytes() for x in out.iterdir()}
    more = ["generate", "--settings", str(out / "settings.json"), "--strength", "1", "--out", str(again)]
    assert main(more) == 0
    made, *_ = load_settings(again / "settings.json", GenerateSettings)
    assert (made.strength, made.start.size) == (1.0, (96, 64))
    assert main(["generate", "a cat", *about, "--words", "cat", "--out", str(out)]) == 0
    assert not (out / "start.png").exists()  # a result that has none


def test_the_command_line_refuses(tmp_path, capsys):
    common = ["--model", "emoji-voc", "--device", "cpu", "--words", "cat", "--out", str(tmp_path / "out")]
    for more, said in (
        (["--strength", "0.5"], "no picture to start from"),
        (["--start", str(tmp_path / "none.png")], "There is no picture"),
        (["--start", __file__], "is not a picture"),
    ):
        assert main(["generate", "a cat", *common, *more]) == 2
        assert_refused(capsys.readouterr().err.strip(), said)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["../start.png", "/etc/passwd", "other.png", 3])
def test_settings_that_name_another_picture(tmp_path, name):
    made = GenerateSettings("a cat").to_json() | {"start": name, "strength": 0.5}
    about = {"format": GenerateSettings.FORMAT, "model": "m", "device": "cpu", "generation": made, "maps": {}}
    (tmp_path / "settings.json").write_text(json.dumps(about))
    with pytest.raises(InputError, match="one of the wrong kind"):
        load_settings(tmp_path / "settings.json", GenerateSettings)


def test_settings_whose_picture_is_gone(tmp_path):
    made = GenerateSettings("a cat").to_json() | {"start": "start.png", "strength": 0.5}
    about = {"format": GenerateSettings.FORMAT, "model": "m", "device": "cpu", "generation": made, "maps": {}}
    (tmp_path / "settings.json").write_text(json.dumps(about))
    with pytest.raises(InputError, match="There is no picture"):
        load_settings(tmp_path / "settings.json", GenerateSettings)


@pytest.mark.parametrize("name", STARTS)
def test_what_the_adapter_says_of_both_pipelines(name):
    """`encode_prompt` and its limits are those of the pipeline that draws."""
    pipe = pipe_of(name)
    calls = [inspect.signature(type(one).__call__).parameters for one in (pipe, starting_from_picture(pipe))]
    limits = [call["max_sequence_length"].default for call in calls if "max_sequence_length" in call]
    assert len(limits) in (0, 2)
    assert len(set(limits)) <= 1


def test_the_pipelines_are_made_on_each_other_alone():
    assert starting_from_picture(make_pipe()).safety_checker is None
