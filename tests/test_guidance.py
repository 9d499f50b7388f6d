"""S-CFG: each step against a transcription of its formula, plain guidance where gamma is one, hooks that go away."""

from __future__ import annotations

import functools
import json
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import LatentConsistencyModelPipeline, LCMScheduler, PixArtSigmaPipeline, StableDiffusionPAGPipeline
from pipelines import make_pipe, make_pixart, make_small, pipe_of
from reference import assert_refused, probabilities

from benchmarks import guidance as benchmark
from ovam_core import OVAM, InputError, record
from ovam_core.attention import guidance as maths
from ovam_core.attention.goca import SelfLayer, even_rows, layer_weights, reference_affinity, resized_self_attention
from ovam_core.cli import main
from ovam_core.errors import Stopped
from ovam_core.hooks import guidance as hooks
from ovam_core.hooks.guidance import guided_by_region
from ovam_core.models.goca import goca_preset
from ovam_core.models.registry import adapter_of
from ovam_core.picture import load_settings
from ovam_core.settings import GUIDANCE_KINDS, GenerateSettings
from training.nouns import VOC_CLASSES

PROMPT, NEGATIVE = "a photograph of the cat", "the red bus"
FAMILIES = ("sd", "sdxl", "pixart-sigma")
SCALE = 4.0


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def denoiser_of(pipe):
    return adapter_of(pipe).denoiser


@functools.cache
def sharp_pipe(name):
    """Pixels that attend to few others: five products with an even attention leave maps of rounding errors alone."""
    if name != "pixart-sigma":
        return pipe_of(name)
    torch.manual_seed(0)
    pipe = make_pixart(PixArtSigmaPipeline)
    for key, weight in pipe.transformer.named_parameters():
        if key.endswith(("attn1.to_q.weight", "attn1.to_k.weight")):
            weight.data *= 12
        if key.endswith(("attn2.to_q.weight", "attn2.to_k.weight")):
            weight.data *= 4
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe, prompt=PROMPT, steps=2, seeds=(3,), **more):
    binning = {"use_resolution_binning": False} if "PixArt" in type(pipe).__name__ else {}
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipe(
        prompt,
        negative_prompt=NEGATIVE if isinstance(prompt, str) else [NEGATIVE] * len(prompt),
        num_inference_steps=steps,
        guidance_scale=SCALE,
        height=32,
        width=48,
        generator=generators,
        output_type="pt",
        **binning,
        **more,
    ).images


# ----------------------------------------------------------------------------------------- an independent transcription


def resized(maps, size):
    return F.interpolate(maps[None], size=size, mode="bilinear", align_corners=False)[0]


def scaled(maps):
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return torch.where(high > low, (maps - low) / (high - low), 0)


def blurred(maps, blur=5):
    """OpenCV's sigma; edge pixels repeated; a blur of 5 on 64 pixels, the nearest odd number on fewer."""
    size = 2 * max(0, round((blur * max(maps.shape[1:]) / 64 - 1) / 2)) + 1
    sigma = 0.3 * ((size - 1) / 2 - 1) + 0.8
    weights = np.array([np.exp(-((x - size // 2) ** 2) / (2 * sigma**2)) for x in range(size)])
    weights /= weights.sum()
    out = np.zeros(maps.shape)
    wide = np.pad(maps.numpy(), ((0, 0), (size // 2,) * 2, (size // 2,) * 2), mode="edge")
    for dy in range(size):
        for dx in range(size):
            out += weights[dy] * weights[dx] * wide[:, dy : dy + maps.shape[1], dx : dx + maps.shape[2]]
    return torch.from_numpy(out).float()


def regions_of(scores, background, content, affinity, times):
    """Steps 2 to 4."""
    objects = scaled(blurred(scores[: max(content) + 1] / sum(scores[at] for at in content)))
    maps = torch.cat([objects, background[None]])
    for _ in range(times):
        maps = torch.einsum("pq,lq->lp", affinity, maps.flatten(1)).reshape(maps.shape)
    maps = scaled(maps)
    return maps[:-1].argmax(0), scaled(blurred(maps[-1:]))[0] < 0.5


def gamma_of(difference, labels, foreground, scale):
    """Step 5, region by region; the smoothing as the authors' code has it, its 0.5 divided by unsquared."""
    height, width = difference.shape[1:]
    distances = np.sqrt((difference.double().numpy() ** 2).sum(0))

    def nearest(y, x):
        return y * labels.shape[0] // height, x * labels.shape[1] // width

    at = [[nearest(y, x) for x in range(width)] for y in range(height)]
    labels = np.array([[int(labels[one]) for one in row] for row in at])
    inside = np.array([[bool(foreground[one]) for one in row] for row in at])
    foremost = distances[inside].sum() / (inside.sum() + 1e-8)
    gamma = np.ones((height, width))
    for label in np.unique(labels):
        own = labels == label
        gamma[own] = foremost / (distances[own].sum() / (own.sum() + 1e-8) + 1e-8)
    gamma = np.minimum(np.clip(gamma, 0.8, 3.0), 15 / scale)
    kernel = np.array(
        [[np.exp(-((y / (2 * 0.5)) ** 2)) * np.exp(-((x / (2 * 0.5)) ** 2)) for x in (-1, 0, 1)] for y in (-1, 0, 1)]
    )
    kernel /= kernel.sum()
    wide, out = np.pad(gamma, 1, mode="reflect"), np.zeros_like(gamma)
    for y in range(3):
        for x in range(3):
            out += kernel[y, x] * wide[y : y + height, x : x + width]
    return torch.from_numpy(out).float()


class Steps:
    """What each attention module was given at each call of the denoiser, and what that made before any guide."""

    def __init__(self, pipe):
        self.modules = {n: x for n, x in denoiser_of(pipe).named_modules() if n.endswith(("attn1", "attn2"))}
        self.calls, self.pipe = [], pipe

    def __enter__(self):
        denoiser = denoiser_of(self.pipe)
        self.handles = [
            denoiser.register_forward_pre_hook(lambda *_: self.calls.append({})),
            denoiser.register_forward_hook(lambda _m, _i, out: self.calls[-1].update(plain=out[0].clone())),
            *(x.register_forward_pre_hook(self.listen(name), with_kwargs=True) for name, x in self.modules.items()),
        ]
        return self

    def listen(self, name):
        return lambda _m, args, kwargs: self.calls[-1].update(
            {name: (args[0].clone(), kwargs.get("encoder_hidden_states"))}
        )

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()

    def after(self):
        """The same with what the denoiser gives in the end; to be called within the guide."""
        hook = denoiser_of(self.pipe).register_forward_hook(
            lambda _m, _i, out: self.calls[-1].update(made=out[0].clone())
        )
        self.handles.append(hook)


def self_attention(steps, call, name, row):
    pixels = call[name.replace("attn2", "attn1")][0][row]
    return probabilities(steps.modules[name.replace("attn2", "attn1")], pixels, pixels).mean(0)


def cross_attention(steps, call, name, row, tokens, averages):
    """Step 1: the layer's map `[L, n]`."""
    module, (pixels, text) = steps.modules[name], call[name]
    text = text[row][:tokens]
    shares = probabilities(module, pixels[row], text)
    if averages:
        return shares.mean(0).T
    values = module.to_v(text).chunk(module.heads, dim=-1)
    matrix = module.to_out[0].weight.chunk(module.heads, dim=1)
    added = torch.stack([a @ v @ w.T for a, v, w in zip(shares, values, matrix, strict=True)])  # O_n
    agreement = (added * added.sum(0)).sum(-1)
    return torch.einsum("hnl,hn->ln", shares, agreement / agreement.sum(0))


def resized_matrix(attention, grid, size):
    """Attended pixels bilinear, attending ones the nearest."""
    columns = resized(attention.reshape(-1, *grid), size).flatten(1)
    return torch.stack(
        [
            columns[y * grid[0] // size[0] * grid[1] + x * grid[1] // size[1]]
            for y in range(size[0])
            for x in range(size[1])
        ]
    )


def grid_of(pixels, latents=(16, 24)):
    return next((latents[0] >> k, latents[1] >> k) for k in range(4) if (latents[0] >> k) * (latents[1] >> k) == pixels)


@torch.no_grad()
def aggregated(steps, call, preset, row, tokens, averages):
    """Steps 1 and 2 of GoCA on the latents' grid: `[L, 16, 24]`."""
    maps, weights = [], []
    for name in preset.layers:
        grid = grid_of(call[name][0].shape[1])
        maps.append(resized(cross_attention(steps, call, name, row, tokens, averages).reshape(-1, *grid), (16, 24)))
        features = steps.modules[preset.reference].to_q(call[preset.reference][0][row])
        affinity = torch.softmax(features @ features.T / features.shape[1] ** 0.5, -1)
        attention = resized_matrix(self_attention(steps, call, name, row), grid, grid_of(len(features)))
        if preset.options.even_rows:
            attention = attention / attention.sum(1, keepdim=True)
        weights.append(1.0 if averages else float((affinity * attention).sum()))
    total = sum(weight / sum(weights) * one for weight, one in zip(weights, maps, strict=True)).clamp(min=0)
    return total / total.sum(0)


@torch.no_grad()
def expected(pipe, steps, call, averages):
    """What S-CFG makes of the conditional half of one call."""
    preset, names = goca_preset(adapter_of(pipe)), adapter_of(pipe).tokenize(PROMPT).names
    has_start = names[0] == "<SoT>"
    content = [at for at, name in enumerate(names) if name not in ("<SoT>", "<EoT>")]
    tokens = 77 if has_start else len(names)
    scores = aggregated(steps, call, preset, 1, tokens, averages)
    background = aggregated(steps, call, preset, 0, tokens, averages)[0] if has_start else scores[len(names) - 1]
    carried = []
    for name in preset.options.propagation:
        attention = self_attention(steps, call, name, 1)
        carried.append(resized_matrix(attention, grid_of(len(attention)), (16, 24)))
    labels, foreground = regions_of(scores, background, content, sum(carried), preset.options.propagations)
    without, given = call["plain"][:, :4]
    gamma = gamma_of(given - without, labels, foreground, SCALE)
    return without + gamma * (given - without), gamma


@pytest.mark.parametrize("averages", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_each_step_is_the_formula(name, averages):
    pipe = sharp_pipe(name)
    with ExitStack() as stack:
        steps = stack.enter_context(Steps(pipe))
        guide = stack.enter_context(guided_by_region(pipe, PROMPT, SCALE, averages=averages))
        steps.after()
        run(pipe)
    assert len(steps.calls) == 2
    for number, call in enumerate(steps.calls):
        half, gamma = expected(pipe, steps, call, averages)
        torch.testing.assert_close(guide.recordings[0][number], gamma, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(call["made"][1, :4], half, atol=1e-4, rtol=1e-4)
        assert gamma.max() - gamma.min() > 0.02
        assert torch.equal(call["made"][0], call["plain"][0])  # the negative half
        assert torch.equal(call["made"][1, 4:], call["plain"][1, 4:])  # PixArt's variance
    assert guide.recordings[0].shape == (2, 16, 24)


# ------------------------------------------------------------------------------------------------------- the maths


@pytest.mark.parametrize("size", [(64, 16), (24, 32)])
def test_regions_and_strengths_on_larger_grids(size):
    scores = noise(7, *size).mul(2).softmax(0)
    background, affinity = (
        noise(*size, seed=1).sigmoid(),
        noise(size[0] * size[1], size[0] * size[1], seed=2).softmax(1),
    )
    affinity = 0.5 * affinity + 0.5 * torch.eye(len(affinity))

    def carry(maps):
        return (maps.flatten(1) @ affinity.T).reshape(maps.shape)

    found = maths.regions(scores, background, [1, 2, 4], carry, 2)
    labels, foreground = regions_of(scores, background, [1, 2, 4], affinity, 2)
    assert torch.equal(found[0], labels)
    assert torch.equal(found[1], foreground)
    assert set(labels.flatten().tolist()) == {0, 1, 2, 3, 4}
    difference = noise(4, 2 * size[0], 2 * size[1], seed=3) * (1 + torch.arange(2 * size[1]) / 40)
    for scale in (2.0, 10.0):
        gain = maths.gain(difference, labels, foreground, scale)
        torch.testing.assert_close(gain + 1, gamma_of(difference, labels, foreground, scale), atol=1e-5, rtol=1e-5)


def test_the_bounds_of_gamma():
    labels = torch.arange(16).repeat(16, 1) // 8  # left and right
    foreground = labels == 0
    difference = torch.ones(4, 16, 16)
    difference[:, :, 8:] = 0.01
    for scale, most in ((2.0, 3.0), (7.5, 2.0), (10.0, 1.5)):
        gain = maths.gain(difference, labels, foreground, scale)
        assert float(gain[0, 0]) == 0.0  # exactly: gamma one leaves the guidance as it is
        assert float(gain[0, -1]) == pytest.approx(most - 1, abs=1e-6)
    assert float(maths.gain(difference, labels, ~foreground, 4.0)[0, 0]) == pytest.approx(-0.2, abs=1e-6)
    assert float(maths.gain(difference, labels, labels > 5, 4.0)[0, 0]) == pytest.approx(-0.2, abs=1e-6)  # none at all


def test_gamma_does_not_depend_on_what_is_predicted():
    """The difference in v, or x, is that in eps times one number of the step."""
    difference, labels, foreground = (
        noise(4, 8, 8),
        torch.arange(64).reshape(8, 8) // 20,
        torch.arange(64).reshape(8, 8) < 30,
    )
    first = maths.gain(difference, labels, foreground, 5.0)
    for factor in (0.3, -7.0):
        torch.testing.assert_close(
            maths.gain(factor * difference, labels, foreground, 5.0), first, atol=1e-5, rtol=1e-5
        )


def test_the_grid_of_regions():
    sizes = {(64, 64): (64, 64), (128, 128): (64, 64), (32, 32): (32, 32), (96, 64): (64, 43), (16, 128): (8, 64)}
    assert {size: maths.region_grid(*size) for size in sizes} == sizes


def layer(height, width, seed):
    queries, keys = 2 * noise(2, 2, height * width, 3, seed=seed)
    return SelfLayer("one", height, width, queries, keys, 3**-0.5)


@pytest.mark.parametrize("size", [(4, 6), (8, 12), (3, 5)])
def test_resizing_the_maps_is_resizing_the_matrix(size):
    """GoCA's own functions make the matrix of every layer on the grid."""
    layers = [layer(4, 6, 0), layer(2, 3, 1), layer(8, 12, 2), layer(4, 6, 3)]
    matrices = [resized_self_attention(x, size) for x in layers]
    maps = noise(3, *size, seed=4)
    moved = (maps.flatten(1) @ (sum(matrices) / 4).T).reshape(maps.shape)
    torch.testing.assert_close(maths.carrier(layers, size)(maps), moved, atol=1e-5, rtol=1e-5)
    affinity = reference_affinity(noise(size[0] * size[1], 5, seed=5))
    for even in (False, True):
        own = layer_weights(affinity, [even_rows(x) if even else x for x in matrices])
        torch.testing.assert_close(maths.agreements(affinity, size, layers, even), own, atol=1e-6, rtol=1e-5)


# ------------------------------------------------------------------------------------------- beside all that is there


@pytest.mark.parametrize("name", FAMILIES)
def test_a_gamma_of_one_is_plain_guidance(name, monkeypatch):
    monkeypatch.setattr(hooks, "gain", lambda difference, *_: torch.zeros(difference.shape[1:]))
    pipe = pipe_of(name)
    with record(pipe) as plain:
        image = run(pipe)
    with record(pipe) as recorder, guided_by_region(pipe, PROMPT, SCALE) as guide:
        assert torch.equal(run(pipe), image)
    assert torch.equal(guide.recordings[0], torch.ones(2, 16, 24))
    for one, other in zip(recorder.recordings[0].layers, plain.recordings[0].layers, strict=True):
        assert torch.equal(one.queries, other.queries)
    monkeypatch.undo()
    with guided_by_region(pipe, PROMPT, SCALE):
        assert not torch.equal(run(pipe), image)


def test_a_gamma_of_one_in_bfloat16(monkeypatch):
    monkeypatch.setattr(hooks, "gain", lambda difference, *_: torch.zeros(difference.shape[1:]))
    pipe = make_pipe().to(torch.bfloat16)
    image = run(pipe)
    with guided_by_region(pipe, PROMPT, SCALE):
        assert torch.equal(run(pipe), image)


def test_the_recording_goes_on(fresh):
    """What is recorded are the queries of the guided run, whichever hook came first."""
    found = []
    for order in (0, 1):
        with ExitStack() as stack:
            made = [lambda: record(fresh), lambda: guided_by_region(fresh, PROMPT, SCALE)]
            entered = [stack.enter_context(one()) for one in (made if order else made[::-1])]
            image = run(fresh, steps=3)
        found.append((image, entered[1 - order].recordings[0]))
    (first, one), (second, other) = found
    assert torch.equal(first, second)
    assert one.step_indices == other.step_indices == (0, 1, 2)
    for own, again in zip(one.layers, other.layers, strict=True):
        assert torch.equal(own.queries, again.queries)


def test_images_of_a_batch_are_guided_each_by_its_own_prompt(fresh):
    prompts = [PROMPT, "the red car"]
    with guided_by_region(fresh, prompts, SCALE) as guide:
        together = run(fresh, prompts, seeds=(3, 4))
    for number, prompt in enumerate(prompts):
        with guided_by_region(fresh, prompt, SCALE) as alone:
            image = run(fresh, prompt, seeds=(3 + number,))
        torch.testing.assert_close(together[number], image[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(guide.recordings[number], alone.recordings[0], atol=1e-3, rtol=1e-3)


def test_both_forms_of_the_denoisers_answer(fresh):
    text = fresh.encode_prompt([PROMPT], "cpu", 1, True, [NEGATIVE])
    given = (noise(1, 4, 8, 8).repeat(2, 1, 1, 1), 500, torch.cat([text[1], text[0]]))
    plain = fresh.unet(*given).sample
    with guided_by_region(fresh, PROMPT, SCALE):
        fresh._guidance_scale, fresh._interrupt = SCALE, False
        whole, (first,) = fresh.unet(*given), fresh.unet(*given, return_dict=False)
    assert torch.equal(whole.sample, first)
    assert torch.equal(whole[0], first)
    assert torch.equal(first[0], plain[0])
    assert not torch.equal(first[1], plain[1])


def test_fused_projections(fresh):
    with guided_by_region(fresh, PROMPT, SCALE):
        image = run(fresh)
    fresh.fuse_qkv_projections()
    with guided_by_region(fresh, PROMPT, SCALE):
        torch.testing.assert_close(run(fresh), image, atol=1e-4, rtol=1e-4)


def hooks_on(pipe):
    modules = [*denoiser_of(pipe).modules()]
    return sum(len(x._forward_hooks) + len(x._forward_pre_hooks) for x in modules) + ("step" in vars(pipe.scheduler))


@pytest.mark.parametrize("name", FAMILIES)
def test_hooks_are_gone_after_an_exception(name):
    pipe = pipe_of(name)
    settings = GenerateSettings(PROMPT, steps=3, guidance=SCALE, width=64, height=64, guidance_kind="s-cfg")
    with pytest.raises(Stopped):
        OVAM(pipe).draw(settings, should_stop=lambda: hooks_on(pipe) > 0)
    assert hooks_on(pipe) == 0
    image = run(pipe)
    with pytest.raises(ZeroDivisionError), guided_by_region(pipe, PROMPT, SCALE):
        raise ZeroDivisionError
    assert hooks_on(pipe) == 0
    assert torch.equal(run(pipe), image)


# --------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("name", ["sana", "hunyuan", "sd3", "flux-dev"])
def test_families_without_it(name):
    with pytest.raises(InputError, match=r"S-CFG is not there for .*: load Stable Diffusion 1 and 2, .* or PixArt"):
        GenerateSettings(PROMPT, guidance=4.0, width=64, height=64, guidance_kind="s-cfg").validate(pipe_of(name))


@pytest.mark.parametrize("kind", ["s-cfg", "s-cfg-average"])
def test_no_guidance_has_no_regions(kind, fresh):
    for scale in (0.0, 1.0):
        with pytest.raises(InputError, match=f"at a scale of {scale:g} has none: choose a scale above 1"):
            OVAM(fresh).generate(PROMPT, guidance_scale=scale, guidance=kind, width=64, height=64)


def test_guidance_within_the_model_has_no_regions(fresh):
    parts = fresh.components | {"scheduler": LCMScheduler.from_config(fresh.scheduler.config)}
    parts["unet"] = type(fresh.unet).from_config(fresh.unet.config, time_cond_proj_dim=8)
    ovam = OVAM(LatentConsistencyModelPipeline(**parts, requires_safety_checker=False))
    assert not ovam.serves_s_cfg
    with pytest.raises(InputError, match="guided by a negative half"):
        ovam.generate(PROMPT, guidance="s-cfg", width=64, height=64)


def test_other_parts_of_the_batch(fresh):
    pipe = StableDiffusionPAGPipeline(
        **fresh.components, requires_safety_checker=False, pag_applied_layers=["down_blocks.0"]
    )
    with pytest.raises(InputError, match="one of 3 parts: switch its other guidance off"):
        OVAM(pipe).generate(PROMPT, num_inference_steps=2, guidance="s-cfg", width=64, height=64)


def test_layers_from_a_cache(fresh):
    attention = fresh.unet.up_blocks[1].attentions[0].transformer_blocks[0].attn2
    attention.forward = lambda hidden, **_: torch.zeros_like(hidden)
    with pytest.raises(InputError, match="took some from a cache"):
        OVAM(fresh).generate(PROMPT, num_inference_steps=2, guidance="s-cfg", width=64, height=64)


@pytest.mark.parametrize("kind", ["cfg", "S-CFG", 3, None, ["s-cfg"]])
def test_a_guidance_that_is_none(kind, fresh):
    with pytest.raises(InputError, match="choose plain, s-cfg or s-cfg-average"):
        GenerateSettings(PROMPT, width=64, height=64, guidance_kind=kind).validate(fresh)


# ---------------------------------------------------------------------------------------------------- settings, files


def test_settings_of_files():
    plain = GenerateSettings(PROMPT)
    assert "guidance_kind" not in plain.to_json()
    assert GenerateSettings.from_json(plain.to_json()) == plain  # as older files are
    guided = replace(plain, guidance_kind="s-cfg-average")
    assert guided.to_json() == plain.to_json() | {"guidance_kind": "s-cfg-average"}
    assert GenerateSettings.from_json(json.loads(json.dumps(guided.to_json()))) == guided


@pytest.fixture(scope="module")
def small():
    return OVAM(make_small())


def files_of(folder):
    return {one.name: one.read_bytes() for one in sorted(folder.iterdir())}


def test_the_command_line_replays(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("ovam_core.cli.generate.open_model", lambda *_: small)
    asked = ["--words", "cat", "--size", "64x64", "--steps", "2", "--guidance", "5", "--no-crf"]
    plain, first, again, back, half = (tmp_path / name for name in ("plain", "first", "again", "back", "half"))
    assert main(["generate", PROMPT, *asked, "--out", str(plain)]) == 0
    assert main(["generate", PROMPT, *asked, "--guidance-kind", "s-cfg", "--out", str(first)]) == 0
    settings = str(first / "settings.json")
    assert load_settings(settings, GenerateSettings)[0].guidance_kind == "s-cfg"
    assert main(["generate", "--settings", settings, "--out", str(again)]) == 0
    assert files_of(again) == files_of(first)
    assert files_of(first)["image.png"] != files_of(plain)["image.png"]
    assert main(["generate", "--settings", settings, "--guidance-kind", "plain", "--out", str(back)]) == 0
    assert files_of(back) == files_of(plain)
    assert main(["generate", "--settings", settings, "--guidance-kind", "s-cfg-average", "--out", str(half)]) == 0
    assert files_of(half)["image.png"] not in (files_of(first)["image.png"], files_of(plain)["image.png"])
    capsys.readouterr()
    assert main(["generate", "--settings", settings, "--guidance", "1", "--out", str(half)]) == 2
    assert_refused(capsys.readouterr().err.removesuffix("\n"), "a scale of 1 has none")
    assert main(["generate", PROMPT, "--guidance-kind", "cfg"]) == 2


def test_from_a_picture_and_in_a_recording(small, tmp_path):
    start = small.generate(PROMPT, num_inference_steps=2, guidance="plain", width=64, height=64).image
    picture = small.generate("the red car", num_inference_steps=4, guidance="s-cfg", width=64, height=64, start=start)
    assert picture.recording.step_indices == (0, 1)
    file = tmp_path / "one.safetensors"
    picture.save_recording(file)
    assert small.load_recording(file).settings.guidance_kind == "s-cfg"


# -------------------------------------------------------------------------------------------------------- the table


def test_the_table_of_the_benchmark(tmp_path, small, monkeypatch):
    """A stand-in finds the first thing of a guided picture, all of a plain one, and is not asked twice."""
    monkeypatch.setattr(benchmark, "caption_of", lambda names: "the red " + " ".join(["cat"] * len(names)))
    monkeypatch.setattr(benchmark, "COST_STEPS", 1)
    ovam = OVAM(small.pipe)
    ovam.preset = replace(ovam.preset, width=64, height=64)
    asked = benchmark.prompts(2, 4000)
    assert asked == benchmark.prompts(2, 4000)
    assert [len(set(one.names)) for one in asked] == [2, 2, 3, 3]
    rounds = []

    def annotate(images):
        kind = GUIDANCE_KINDS[len(rounds) % 3]
        part = asked[len(rounds) // 3 * 2 : len(rounds) // 3 * 2 + 2]
        rounds.append(kind)
        labels = np.zeros((len(images), 20, 20), np.uint8)
        for label_map, one in zip(labels, part, strict=True):
            for at, name in enumerate(one.names if kind == "plain" else one.names[:1]):
                label_map[at, :4] = VOC_CLASSES.index(name) + 1
        return labels

    def arguments(work):
        about = ["--prompts", "2", "--scales", "5", "--steps", "1", "--rounds", "1", "--batch", "2"]
        return [*about, "--work", str(tmp_path / work), "--out", str(tmp_path / work)]

    assert benchmark.main(arguments("a"), annotate, ovam) == 0
    assert len(rounds) == 6
    figures = json.loads((tmp_path / "a" / "guidance.json").read_text())
    rows = {title: {(row["scale"], row["kind"]): row for row in found} for title, found in figures["rows"].items()}
    assert list(rows) == ["all", "2 things", "3 things"]
    assert rows["2 things"][5.0, "s-cfg"]["found"] == 50
    assert rows["3 things"][5.0, "s-cfg-average"]["over_plain"] == pytest.approx(-200 / 3)
    assert rows["all"][5.0, "plain"] | {"found": 100, "over_plain": 0, "low": 0, "high": 0} == rows["all"][5.0, "plain"]
    assert figures["cost"].keys() == {"s-cfg", "s-cfg-average"}
    text = (tmp_path / "a" / "guidance.md").read_text()
    assert "| w, all | plain | S-CFG, GoCA | points over plain, 95 % | S-CFG, averages |" in text

    def never(_images):
        raise AssertionError

    assert benchmark.main(arguments("a"), never, ovam) == 0
    assert json.loads((tmp_path / "a" / "guidance.json").read_text())["rows"] == figures["rows"]


def test_differences_are_paired():
    plain = [[True, True], [True, False], [False, False, False]] * 5
    same = benchmark.compared(plain, plain)
    assert (same["found"], same["over_plain"], same["low"], same["high"]) == (pytest.approx(300 / 7), 0, 0, 0)
    more = benchmark.compared([[True] * len(one) for one in plain], plain)
    assert more["over_plain"] == pytest.approx(400 / 7)
    assert 0 < more["low"] < 400 / 7 < more["high"] < 100
