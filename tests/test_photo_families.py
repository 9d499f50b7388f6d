"""Photographs on each family: the denoiser is given what its pipeline gives it; what it attends to is recorded."""

from __future__ import annotations

import functools
import inspect

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid
from einops import rearrange
from PIL import Image
from pipelines import CROSS, JOINT, make_pixart_1024, make_sdxl_without_zeros, pipe_of
from test_families import ALL, PROMPT, SIZES, AttentionSpy, attended
from test_joint import GRID, IMAGE, SD3, Spy

from ovam_core import heatmaps
from ovam_core.data.annotated import Example, learn, photo_settings
from ovam_core.errors import InputError
from ovam_core.hooks.goca_recorder import record_goca
from ovam_core.hooks.photograph import Noisy, check_kind, denoise, fitted_size, noised, record_image, record_images
from ovam_core.models.registry import ADAPTERS, adapter_of
from ovam_core.optimization import OptimizeSettings
from ovam_core.ovam import OVAM
from ovam_core.query import encode_padded
from ovam_core.settings import PhotoSettings, SegmentSettings

# 90 x 45 pixels at the area of the model's own images, in multiples of a latent or a patch (Sana: of 32).
SEEN = {
    "sd": (22, 46),
    "sdxl": (22, 46),
    "pixart-alpha": (48, 88),
    "pixart-sigma": (48, 88),
    "sana": (32, 96),
    "sana-1.5": (32, 96),
    "hunyuan": (96, 176),
}


def picture(height: int = 45, width: int = 90, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8))


# ------------------------------------------------------------------------- what the pipeline gives the denoiser


@functools.cache
def pipe_of_kind(kind: str):
    others = {"pixart-1024": make_pixart_1024, "sdxl-without-zeros": make_sdxl_without_zeros}
    return others[kind]() if kind in others else pipe_of(kind)


def calls_of(pipe, run) -> list[dict]:
    """The arguments of each call of the denoiser in `run()`, by name; without those left out, None or {}."""
    model, found = adapter_of(pipe).denoiser, []
    names = inspect.signature(model.forward)

    def listen(module, args, kwargs):
        given = names.bind(*args, **kwargs).arguments
        given = {name: x for name, x in given.items() if x is not None and name != "return_dict"}
        found.append({name: x for name, x in given.items() if isinstance(x, torch.Tensor) or x != {}})

    handle = model.register_forward_pre_hook(listen, with_kwargs=True)
    try:
        run()
    finally:
        handle.remove()
    return found


def passes_like(pipe, theirs: list[dict], captions: list[str], size) -> list[dict]:
    """Our calls of the denoiser for the latents and timesteps of the pipeline's run."""
    latents = torch.stack([x["hidden_states" if "hidden_states" in x else "sample"] for x in theirs])
    at = tuple(pipe.scheduler.timesteps.tolist())
    noisy = Noisy(latents, at, adapter_of(pipe).condition(captions, size), "conditional")
    return calls_of(pipe, lambda: denoise(pipe, noisy))


def assert_same(ours: list[dict], theirs: list[dict]) -> None:
    """Bit for bit, dtypes and shapes too."""
    for own, their in zip(ours, theirs, strict=True):
        own["timestep"] = torch.as_tensor(own["timestep"])
        assert own.keys() == their.keys()
        for name in own:
            torch.testing.assert_close(
                own[name], their[name], atol=0, rtol=0, msg=functools.partial("{}: {}".format, name)
            )


@torch.no_grad()
@pytest.mark.parametrize("kind", [*ALL, "pixart-1024", "sdxl-without-zeros"])
def test_the_denoiser_is_given_what_its_pipeline_gives_it(kind):
    """A guided batch [unconditional, conditional] of the pipeline, and the same latents with captions ["", prompt]."""
    pipe, size = pipe_of_kind(kind), SIZES[kind.replace("1024", "alpha").removesuffix("-without-zeros")][0]
    plain = {"use_resolution_binning": False} if kind.startswith(("pixart", "sana", "hunyuan")) else {}
    theirs = calls_of(
        pipe,
        lambda: pipe(
            PROMPT,
            num_inference_steps=2,
            guidance_scale=4.0,
            height=size[0],
            width=size[1],
            output_type="latent",
            **plain,
        ),
    )
    at = pipe.scheduler.timesteps.tolist()
    assert len(theirs) == len(at) == 2
    ours = passes_like(pipe, theirs, ["", PROMPT], size)
    assert_same(ours, theirs)
    assert (kind == "pixart-1024") == ("pixart" in kind and ours[0]["added_cond_kwargs"]["resolution"] is not None)


@torch.no_grad()
@pytest.mark.parametrize("name", JOINT)
@pytest.mark.parametrize("prompt", [PROMPT, ""])
def test_a_denoiser_with_joint_attention_is_given_what_its_pipeline_gives_it(name, prompt):
    """At the family's usual guidance. Stable Diffusion 3 has a guided batch; Flux has one caption an image."""
    pipe = pipe_of(name)
    guidance = adapter_of(pipe).guidance
    plain = {"num_inference_steps": 2, "height": IMAGE[0], "width": IMAGE[1], "output_type": "latent"}
    theirs = calls_of(pipe, lambda: pipe(prompt=prompt, guidance_scale=guidance, **plain))
    assert len(theirs) == 2
    assert len(theirs[0]["hidden_states"]) == (2 if name in SD3 else 1)
    assert ("guidance" in theirs[0]) == (name in ("flux-dev", "flux-2"))
    captions = ["", prompt] if name in SD3 else [prompt]
    assert_same(passes_like(pipe, theirs, captions, IMAGE), theirs)


@torch.no_grad()
@pytest.mark.parametrize("name", ["flux-dev", "flux-schnell", "flux-2"])
def test_a_denoiser_in_half_precision_is_given_what_its_pipeline_gives_it(name):
    pipe = JOINT[name]().to(torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    run = {"num_inference_steps": 2, "height": IMAGE[0], "width": IMAGE[1], "output_type": "latent"}
    theirs = calls_of(pipe, lambda: pipe(prompt=PROMPT, guidance_scale=adapter_of(pipe).guidance, **run))
    assert_same(passes_like(pipe, theirs, [PROMPT], IMAGE), theirs)
    recording = record_image(pipe, picture(), PROMPT, (700, 300, 999), size=IMAGE, steps=[0, 2])
    assert recording.timesteps == (700, 999)  # as asked for, where bfloat16 knows 699.2 and 1000


# -------------------------------------------------------------------------------------- the pass, written by hand


def kept_signal(name: str, timesteps) -> torch.Tensor:
    """The product of 1 - beta up to each timestep, of the schedules in test_families."""
    if name in ("sd", "sdxl"):
        betas = torch.linspace(0.0001**0.5, 0.02**0.5, 1000) ** 2
    else:
        betas = torch.linspace(0.0001, 0.02, 1000)
    return torch.cumprod(1 - betas, 0)[list(timesteps)]


def noisy_latents(name: str, image: Image.Image, size, timesteps, seed: int) -> list[torch.Tensor]:
    pipe = pipe_of(name)
    values = torch.from_numpy(np.array(image.resize(size[::-1], Image.Resampling.LANCZOS)))
    # The layout in memory is photograph.py's: a convolution's rounding depends on it, and the UNets make much of that.
    encoded = pipe.vae.encode(values[None].permute(0, 3, 1, 2).float() / 127.5 - 1)
    mean = encoded.latent if name.startswith("sana") else encoded.latent_dist.mean
    clean = mean.contiguous() * pipe.vae.config.scaling_factor
    noise = torch.randn((len(timesteps), *clean.shape[1:]), generator=torch.Generator().manual_seed(seed))
    if name.startswith("sana"):
        return [(1 - t / 1000) * clean + t / 1000 * one for t, one in zip(timesteps, noise, strict=True)]
    return [
        signal.sqrt() * clean + (1 - signal).sqrt() * one
        for signal, one in zip(kept_signal(name, timesteps), noise, strict=True)
    ]


def call_by_hand(name: str, latents: torch.Tensor, t: int, caption: str, size) -> None:
    """One call of the denoiser with arguments made of the pipeline's own helpers. No caption: its negative half."""
    pipe, empty, batch = pipe_of(name), not caption, torch.tensor([t])
    half = int(empty)
    if name == "sd":
        found = pipe.encode_prompt(caption, pipe.device, 1, empty)
        pipe.unet(latents, batch, found[half])
    elif name == "sdxl":
        found = pipe.encode_prompt(caption, do_classifier_free_guidance=empty)
        texts, pooled = found[half], found[2 + half]
        sizes = pipe._get_add_time_ids(size, (0, 0), size, texts.dtype, pooled.shape[-1])
        pipe.unet(latents, batch, texts, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes})
    elif name.startswith("pixart"):
        found = pipe.encode_prompt(caption, empty)
        texts, mask = found[2 * half : 2 * half + 2]
        told = {"resolution": None, "aspect_ratio": None}
        pipe.transformer(latents, texts, batch, told, encoder_attention_mask=mask)
    elif name.startswith("sana"):
        instruction = inspect.signature(type(pipe).__call__).parameters["complex_human_instruction"].default
        found = pipe.encode_prompt(caption, empty, complex_human_instruction=instruction)
        texts, mask = found[2 * half : 2 * half + 2]
        scaled = batch * (0.001 if name == "sana-1.5" else 1.0)
        pipe.transformer(latents, texts, scaled, encoder_attention_mask=mask)
    else:
        bert, t5 = (
            pipe.encode_prompt(caption, do_classifier_free_guidance=empty, text_encoder_index=index)
            for index in range(2)
        )
        grid = (size[0] // 16, size[1] // 16)
        rotary = get_2d_rotary_pos_embed(8, get_resize_crop_region_for_grid(grid, 32), grid, output_type="pt")
        pipe.transformer(
            latents,
            batch.float(),
            encoder_hidden_states=bert[half],
            text_embedding_mask=bert[2 + half],
            encoder_hidden_states_t5=t5[half],
            text_embedding_mask_t5=t5[2 + half],
            image_meta_size=torch.tensor([[1024.0, 1024.0, *size, 0, 0]]),
            style=torch.tensor([0]),
            image_rotary_emb=rotary,
        )


@torch.no_grad()
def pass_by_hand(name: str, image: Image.Image, timesteps, caption: str, seed: int) -> None:
    for latents, t in zip(noisy_latents(name, image, SEEN[name], timesteps, seed), timesteps, strict=True):
        call_by_hand(name, latents, t, caption, SEEN[name])


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("caption", [PROMPT, ""])
def test_the_recording_is_that_of_a_pass_by_hand(name, caption, monkeypatch):
    """Two timesteps, 2:1, rotated by EXIF: queries and maps are those that PyTorch's attention was given."""
    lying = picture(90, 45)
    lying.getexif()[0x0112] = 6
    upright = Image.fromarray(np.rot90(np.asarray(lying), -1).copy())
    recording = record_image(pipe_of(name), lying, caption, (100, 300), seed=5)
    assert recording.image_size == SEEN[name] == fitted_size(pipe_of(name), upright)
    assert (recording.timesteps, recording.step_indices) == ((100, 300), (0, 1))
    assert recording.branch == ("conditional" if caption else "unconditional")

    spy = AttentionSpy(name, monkeypatch)
    pass_by_hand(name, upright, (100, 300), caption, 5)
    spy.stop()
    assert {x.name for x in recording.layers} == set(spy.cross)
    for layer in recording.layers:
        for step, (query, _, _) in enumerate(spy.cross[layer.name]):
            torch.testing.assert_close(layer.queries[step], query[0], atol=1e-5, rtol=1e-5)
    if caption and not name.startswith("sd"):  # odd grids, which the spy's maps do not know: test_photo has them
        expected = attended(spy.maps(0, (recording.height, recording.width)))
        maps = heatmaps(recording, encode_padded(pipe_of(name), caption))
        torch.testing.assert_close(maps, expected, atol=1e-5, rtol=0)


def joint_latents(pipe, image: Image.Image, timesteps, seed: int) -> list[torch.Tensor]:
    """What the denoiser is to get: normalised, noised, and with Flux in patches of 2 x 2."""
    values = torch.from_numpy(np.array(image.resize(IMAGE[::-1], Image.Resampling.LANCZOS)))
    mean = pipe.vae.encode(values[None].permute(0, 3, 1, 2).float() / 127.5 - 1).latent_dist.mean
    if "Flux2" in type(pipe).__name__:
        norm, patches = pipe.vae.bn, rearrange(mean, "b c (h y) (w x) -> b (c y x) h w", y=2, x=2)
        spread = (norm.running_var + pipe.vae.config.batch_norm_eps).sqrt()
        clean = (patches - norm.running_mean[:, None, None]) / spread[:, None, None]
    else:
        clean = (mean - 0.1) * pipe.vae.config.scaling_factor
    noise = torch.randn((len(timesteps), *clean.shape[1:]), generator=torch.Generator().manual_seed(seed))
    mixed = [(1 - t / 1000) * clean + t / 1000 * one for t, one in zip(timesteps, noise, strict=True)]
    if "Flux2" in type(pipe).__name__:
        return [rearrange(x, "b c h w -> b (h w) c") for x in mixed]
    if "Flux" in type(pipe).__name__:
        return [rearrange(x, "b c (h y) (w x) -> b (h w) (c y x)", y=2, x=2) for x in mixed]
    return mixed


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd3", "flux-dev", "flux-2"])
def test_latents_of_a_photograph_for_joint_attention(name):
    pipe, timesteps = JOINT[name](), (100, 300, 0)
    if name == "flux-2":
        pipe.vae.bn.running_mean.normal_()
        pipe.vae.bn.running_var.uniform_(0.5, 2)
    calls = calls_of(pipe, lambda: record_image(pipe, picture(), PROMPT, timesteps, seed=5, size=IMAGE))
    for call, expected, t in zip(calls, joint_latents(pipe, picture(), timesteps, 5), timesteps, strict=True):
        torch.testing.assert_close(call["hidden_states"], expected, atol=1e-5, rtol=1e-5)
        assert call["timestep"].tolist() == pytest.approx([t if name == "sd3" else t / 1000])


@torch.no_grad()
@pytest.mark.parametrize("name", JOINT)
@pytest.mark.parametrize("caption", [PROMPT, ""])
def test_maps_of_a_photograph_are_the_joint_attention_of_the_pass(name, caption, monkeypatch):
    pipe, spy = pipe_of(name), Spy(name, monkeypatch)
    recording = record_image(pipe, picture(), caption, (100, 300), size=IMAGE)
    spy.stop()
    assert (recording.height, recording.width) == GRID
    assert recording.image_size == IMAGE
    assert (recording.timesteps, recording.step_indices) == ((100, 300), (0, 1))
    assert recording.branch == ("conditional" if caption else "unconditional")
    maps = heatmaps(recording, encode_padded(pipe, caption or PROMPT))
    if caption:
        torch.testing.assert_close(maps, spy.model_maps(0), atol=2e-6, rtol=1e-3)
    words = torch.randn(3, adapter_of(pipe).embed_dim, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(heatmaps(recording, words), spy.maps_of(0, words), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["sd3.5", "flux-dev", "flux-2"])
def test_several_photographs_with_joint_attention(name):
    pipe, images, captions = pipe_of(name), [picture(seed=1), picture(50, 100, seed=2)], [PROMPT, "a red bus"]
    words = torch.randn(2, adapter_of(pipe).embed_dim, generator=torch.Generator().manual_seed(1))
    together = record_images(pipe, images, captions, (50, 200), seed=4, size=IMAGE)
    assert len(together) == 2
    found = [heatmaps(x, words) for x in together]
    for n, maps in enumerate(found):
        alone = record_image(pipe, images[n], captions[n], (50, 200), seed=4 + n, size=IMAGE)
        torch.testing.assert_close(maps, heatmaps(alone, words), atol=1e-4, rtol=1e-3)
    assert (found[0] - found[1]).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["sd3", "flux-schnell", "flux-2"])
def test_words_are_answered_at_the_photographs_size_with_joint_attention(name):
    size = {} if name == "sd3" else {"width": 64, "height": 32}
    made = OVAM(pipe_of(name)).look_at(picture(), PhotoSettings(PROMPT, **size))
    assert made.recording.image_size == ((32, 64) if size else (48, 88))
    found = OVAM(pipe_of(name)).answer(made, SegmentSettings(("cat", "zebra"), crf=False))
    assert found.heatmaps.shape == found.masks.shape == (2, 45, 90)
    assert (found.heatmaps.std(axis=(1, 2)) > 0).all()


@pytest.mark.parametrize("name", ["sdxl", "pixart-sigma", "sana", "hunyuan"])
def test_several_photographs_in_one_batch(name):
    images, captions = [picture(seed=1), picture(50, 100, seed=2)], [PROMPT, "a red bus"]
    together = record_images(pipe_of(name), images, captions, (50, 200), seed=4)
    assert len(together) == 2
    for n, recording in enumerate(together):
        alone = record_image(pipe_of(name), images[n], captions[n], (50, 200), seed=4 + n)
        assert recording.timesteps == alone.timesteps == (50, 200)
        for ours, theirs in zip(recording.layers, alone.layers, strict=True):
            torch.testing.assert_close(ours.queries, theirs.queries, atol=1e-4, rtol=1e-3)
        for ours, theirs in zip(recording.column_sums, alone.column_sums, strict=True):
            torch.testing.assert_close(ours.sums, theirs.sums, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ALL)
def test_words_are_answered_at_the_photographs_size(name):
    made = OVAM(pipe_of(name)).look_at(picture(), PhotoSettings(PROMPT))
    assert (made.dtype, made.recording.image_size) == ("float32", SEEN[name])
    found = OVAM(pipe_of(name)).answer(made, SegmentSettings(("cat", "zebra"), crf=False))
    assert found.heatmaps.shape == found.masks.shape == (2, 45, 90)
    assert (found.heatmaps.std(axis=(1, 2)) > 0).all()


@pytest.mark.parametrize("name", ["sdxl", "sana"])
def test_a_token_is_learned_from_a_photograph(name, tmp_path):
    picture().save(tmp_path / "a.png")
    mask = np.zeros((45, 90), np.uint8)
    mask[10:30, 20:60] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    example = Example(photo_settings(("cat",)), tmp_path / "mask.png", ("cat",), tmp_path / "a.png")
    token, found = learn(OVAM(pipe_of(name)), [example], OptimizeSettings(epochs=2, method="adam", rate=0.01))
    assert found.losses[1] < found.losses[0]
    assert token.embedding.shape == (2, adapter_of(pipe_of(name)).embed_dim)


# ---------------------------------------------------------------------------------------------------------- GoCA


@torch.no_grad()
@pytest.mark.parametrize("name", ["sdxl", "pixart-alpha", "pixart-sigma"])
def test_goca_sees_the_pass_that_is_nearest_to_the_papers(name):
    pipe = pipe_of(name)
    made = OVAM(pipe).look_at(picture(), PhotoSettings(PROMPT, (300, 90), seed=2), with_goca=True)
    latents = noisy_latents(name, picture(), SEEN[name], (300, 90), 2)[1]
    with record_goca(pipe, branch="all") as recorder:
        call_by_hand(name, latents, 90, PROMPT, SEEN[name])
    (expected,) = recorder.recordings
    assert made.goca.timestep == expected.timestep == 90
    for ours, theirs in zip(made.goca.layers, expected.layers, strict=True):
        torch.testing.assert_close(ours.layer.queries, theirs.layer.queries, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.heads, theirs.heads, atol=1e-3, rtol=1e-3)
        assert ours.weight == pytest.approx(theirs.weight, abs=1e-5)
    found = OVAM(pipe).answer(made, SegmentSettings(("cat", "photograph"), method="GoCA"))
    assert found.heatmaps.shape == found.masks.shape == (2, 45, 90)


# --------------------------------------------------------------------------------------- noise, sizes, refusals


def test_sanas_noise_is_the_timesteps_share_whatever_the_flow_shift():
    pipe, latents, timesteps = CROSS["sana"](), torch.randn(4, 3, 5), (0, 100, 999)
    noise = torch.randn(3, 4, 3, 5, generator=torch.Generator().manual_seed(3))
    sigma = torch.tensor([0, 0.1, 0.999])[:, None, None, None]
    solver = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, final_sigmas_type="zero"
    )
    for scheduler in (FlowMatchEulerDiscreteScheduler(shift=1.0), FlowMatchEulerDiscreteScheduler(shift=5.0), solver):
        pipe.scheduler = scheduler
        found = noised(pipe, latents, timesteps, seed=3)
        torch.testing.assert_close(found, (1 - sigma) * latents + sigma * noise, atol=1e-6, rtol=1e-5)
        scheduler.set_timesteps(7)  # its own noise is that share as well, but for timesteps cut to whole ones
        torch.testing.assert_close(
            scheduler.sigmas[:-1].float(), scheduler.timesteps.float() / 1000, atol=1.1e-3, rtol=0
        )


SIDES = [("sdxl", 2, (24, 38)), ("pixart-sigma", 8, (24, 56)), ("sana", 32, (32, 96)), ("hunyuan", 16, (64, 112))]


@pytest.mark.parametrize(("name", "multiple", "size"), SIDES)
def test_the_sides_of_what_is_seen(name, multiple, size):
    pipe = pipe_of(name)
    for shape in ((61, 90), (100, 40), (77, 77)):
        assert all(side % multiple == 0 for side in fitted_size(pipe, picture(*shape)))
    assert record_image(pipe, picture(), PROMPT, size=size).image_size == size
    with pytest.raises(InputError, match=f"width is {size[1] - 1} pixels, which is not a multiple of {multiple};"):
        record_image(pipe, picture(), PROMPT, size=(size[0], size[1] - 1))


@pytest.mark.parametrize("name", [*ALL, "sd3", "flux-dev", "flux-2"])
def test_models_that_see_more_than_an_image_and_a_text_are_refused(name):
    pipe = (CROSS | JOINT)[name]()
    check_kind(pipe)
    adapter_of(pipe).denoiser.register_to_config(in_channels=9)  # as of an inpainting model
    with pytest.raises(InputError, match="takes more than an image and a text; load") as caught:
        record_image(pipe, picture(), PROMPT)
    assert "\n" not in str(caught.value)
    assert all(x.name in str(caught.value) for x in ADAPTERS)


def test_the_refiner_and_unknown_noise_are_refused():
    pipe = CROSS["sdxl"]()
    pipe.unet.register_to_config(projection_class_embeddings_input_dim=5 * 8 + 24)  # five sizes and scores, not six
    with pytest.raises(InputError, match="takes more than"):
        check_kind(pipe)
    pipe = CROSS["sdxl"]()
    pipe.scheduler = EDMEulerScheduler()
    with pytest.raises(InputError, match=r"EDMEulerScheduler .* does not tell the noise"):
        check_kind(pipe)
