"""What the rows of a batch mean: the right rows of each pipeline, or a refusal that names it; parts that lack."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import (
    AnimateDiffPipeline,
    ControlNetModel,
    ControlNetXSAdapter,
    DiffusionPipeline,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    MotionAdapter,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionControlNetXSPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPAGPipeline,
    UNet2DConditionModel,
    UNetMotionModel,
)
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from PIL import Image
from pipelines import CROSS, make_flux, make_pipe, make_sd3, make_sdxl
from reference import Spy, generate, probabilities, triple_loop

from ovam_core import Picture, heatmaps, record
from ovam_core.attention.heatmap import attribute
from ovam_core.errors import InputError
from ovam_core.hooks.goca_recorder import record_goca
from ovam_core.hooks.photograph import record_image
from ovam_core.models.load import load_pipeline
from ovam_core.models.registry import adapter_of
from ovam_core.ovam import OVAM
from ovam_core.query import attribute_words, encode_padded

PROMPTS = ["the cat", "a red bus"]
GRIDS, SIZE = {16 * 16: (16, 16), 8 * 8: (8, 8)}, (16, 16)  # of images of 32 x 32
SQUARE = {"height": 32, "width": 32, "steps": 2}
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8))
MASK = Image.fromarray(np.pad(np.full((8, 8), 255, np.uint8), 12))


def made(kind, unet=None, **more):
    """A pipeline of another class with the tiny one's parts."""
    parts = make_pipe().components
    if unet is not None:
        parts["unet"] = unet
    pipe = kind(**parts | more, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def unet_of(channels):
    """The tiny UNet for more channels than the image's."""
    torch.manual_seed(0)
    return UNet2DConditionModel.from_config(make_pipe().unet.config, in_channels=channels).eval()


def run(pipe, prompt=None, **more):
    """A short run of any pipeline: float images."""
    given = {"guidance_scale": 4.0, "num_inference_steps": 2, "output_type": "pt"}
    generator = torch.Generator().manual_seed(0)
    return pipe(prompt or PROMPTS, generator=generator, **given | more).images


@torch.no_grad()
def assert_rows(pipe, first, branch="conditional", prompts=PROMPTS, **more):
    """One recording an image, of the rows from `first` on; the image is the one made without."""
    plain = run(pipe, **more)
    with Spy(pipe) as spy, record(pipe, branch=branch) as r:
        images = run(pipe, **more)
    assert torch.equal(images, plain)
    assert len(r.recordings) == len(images) == len(prompts)
    for image, (recording, prompt) in enumerate(zip(r.recordings, prompts, strict=True)):
        text = encode_padded(pipe, prompt) if prompt else adapter_of(pipe).encode_padded("")
        expected = triple_loop(spy, first + image, GRIDS, SIZE, text)
        given = next(iter(spy.seen.values()))[0][1]  # with an image prompt a pair
        given = given[0] if isinstance(given, tuple) else given
        torch.testing.assert_close(given[first + image], text, atol=1e-5, rtol=0)
        found = heatmaps(recording, text)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    others = torch.stack([heatmaps(x, encode_padded(pipe, "the cat")) for x in r.recordings])
    assert (others[0] - others[1]).abs().max() > 1e-4  # each of its own image
    return r.recordings


# Parts of a batch


@pytest.mark.parametrize(
    ("guidance", "pag", "branch", "first"),
    [
        (4.0, 3.0, "conditional", 2),  # [negative, positive, perturbed]
        (4.0, 3.0, "unconditional", 0),
        (1.0, 3.0, "conditional", 0),  # [positive, perturbed]
        (4.0, 0.0, "conditional", 2),
        (1.0, 0.0, "conditional", 0),
    ],
)
def test_perturbed_attention(guidance, pag, branch, first):
    pipe = made(StableDiffusionPAGPipeline)
    pipe.set_pag_applied_layers(["down_blocks.0", "mid"])
    prompts = PROMPTS if branch == "conditional" else ["", ""]
    assert_rows(pipe, first, branch, prompts, guidance_scale=guidance, pag_scale=pag, height=32, width=32)


@pytest.mark.parametrize(("guidance", "first"), [(4.0, 2), (1.0, 0)])
def test_perturbed_self_attention_is_that_of_the_row(guidance, first):
    """The perturbed part never comes to a perturbed layer's queries: the others are as in a layer that is not."""
    pipe = made(StableDiffusionPAGPipeline, pag_applied_layers=["down_blocks.0"])
    with Spy(pipe, "attn1") as spy, record(pipe) as r:
        run(pipe, guidance_scale=guidance, height=32, width=32)
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    for image, recording in enumerate(r.recordings):
        layer = next(x for x in recording.column_sums if x.name == name)
        for step, (pixels, _) in enumerate(spy.seen[name]):
            one = pixels[first + image]
            expected = probabilities(spy.modules[name], one, one).sum(dim=(0, 1))
            torch.testing.assert_close(layer.sums[step], expected, atol=1e-3, rtol=1e-5)


def test_perturbed_attention_of_sdxl():
    pipe = StableDiffusionXLPAGPipeline(**make_sdxl().components, add_watermarker=False, pag_applied_layers=["mid"])
    pipe.set_progress_bar_config(disable=True)
    with Spy(pipe) as spy, record(pipe) as r, record_goca(pipe) as g:
        images = run(pipe, height=32, width=32)
    assert len(r.recordings) == len(g.recordings) == len(images) == 2
    name = r.recordings[0].layers[0].name
    for image, recording in enumerate(r.recordings):
        pixels, text = spy.seen[name][0]
        assert torch.equal(text[2 + image], encode_padded(pipe, PROMPTS[image]))
        expected = spy.modules[name].to_q(pixels[2 + image : 3 + image])
        found = recording.layers[0].queries[0].transpose(0, 1).flatten(1)
        torch.testing.assert_close(found, expected[0], atol=1e-5, rtol=0)


def test_editing_has_the_text_first():
    """InstructPix2Pix: [text and image, image alone, neither]."""
    pipe = made(StableDiffusionInstructPix2PixPipeline, unet_of(8), image_encoder=None)
    assert_rows(pipe, 0, image=[PHOTO] * 2)
    assert_rows(pipe, 4, "unconditional", ["", ""], image=[PHOTO] * 2)
    assert_rows(pipe, 0, image=[PHOTO] * 2, guidance_scale=1.0)


def test_guidance_that_ends_in_the_middle_of_a_run(fresh):
    """As diffusers' guide does it by a callback: the batch is halved from the second step on."""

    def stop(pipe, step, _timestep, values):
        if step == 0:
            pipe._guidance_scale = 0.0
            values["prompt_embeds"] = values["prompt_embeds"].chunk(2)[-1]
        return values

    more = {"callback_on_step_end": stop, "callback_on_step_end_tensor_inputs": ["prompt_embeds"], "steps": 3}
    with Spy(fresh) as spy, record(fresh) as r:
        generate(fresh, PROMPTS, **SQUARE | more)
    assert len(r.recordings) == 2
    for image, recording in enumerate(r.recordings):
        for layer in recording.layers:
            for step, (pixels, _) in enumerate(spy.seen[layer.name]):
                row = image + (2 if step == 0 else 0)
                expected = spy.modules[layer.name].to_q(pixels[row])
                found = layer.queries[step].transpose(0, 1).flatten(1)
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


# What was right


def test_image_to_image():
    pipe = made(StableDiffusionImg2ImgPipeline)
    assert_rows(pipe, 2, image=[PHOTO] * 2, strength=1.0)
    with pytest.raises(InputError, match="StableDiffusionImg2ImgPipeline is not a text-to-image pipeline"):
        OVAM(pipe).generate("the cat", width=64, height=64)


@pytest.mark.parametrize("channels", [4, 9])
def test_inpainting(channels):
    pipe = made(StableDiffusionInpaintPipeline, unet_of(channels))
    assert_rows(pipe, 2, image=PHOTO, mask_image=MASK, height=32, width=32)


def controlnet():
    torch.manual_seed(1)
    return ControlNetModel.from_unet(make_pipe().unet, conditioning_embedding_out_channels=(8, 16)).eval()


@pytest.mark.parametrize("guess", [False, True])
def test_controlnet(guess):
    pipe = made(StableDiffusionControlNetPipeline, controlnet=controlnet())
    assert_rows(pipe, 2, image=[PHOTO] * 2, guess_mode=guess)
    photo = record_image(pipe, PHOTO, "the cat")
    plain = record_image(make_pipe(), PHOTO, "the cat")
    assert torch.equal(photo.layers[0].queries, plain.layers[0].queries)


def test_controlnet_within_the_unet():
    """ControlNet-XS: the attentions of its control are no layers of the UNet."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(make_pipe().unet.config, layers_per_block=2).eval()
    control = ControlNetXSAdapter.from_unet(unet, size_ratio=1, conditioning_embedding_out_channels=(8, 16)).eval()
    parts = {name: x for name, x in make_pipe().components.items() if name != "image_encoder"}
    pipe = StableDiffusionControlNetXSPipeline(
        **parts | {"unet": unet, "controlnet": control}, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    with record(pipe) as r:
        images = run(pipe, image=[PHOTO] * 2)
    assert len(r.recordings) == len(images) == 2
    assert {"ctrl_" in x.name for x in r.recordings[0].layers} == {False}
    with pytest.raises(InputError, match="takes more than an image and a text"):
        record_image(pipe, PHOTO, "the cat")


def test_latent_consistency():
    unet = UNet2DConditionModel.from_config(make_pipe().unet.config, time_cond_proj_dim=8).eval()
    pipe = made(LatentConsistencyModelPipeline, unet, scheduler=LCMScheduler())
    assert_rows(pipe, 0, height=32, width=32)
    picture = OVAM(pipe).generate("the cat", num_inference_steps=2, width=64, height=64)
    assert OVAM(pipe).segment(picture, ["cat"], crf=False).masks.shape == (1, 64, 64)
    with pytest.raises(InputError, match="LatentConsistencyModelPipeline takes no negative prompt"):
        OVAM(pipe).generate("the cat", negative_prompt="a bus", num_inference_steps=2, width=64, height=64)


def test_prompt_embeddings_and_textual_inversion(fresh):
    fresh.load_textual_inversion(torch.randn(1, 32), token="<toy>")
    texts, negative = fresh.encode_prompt(["a <toy>", "the cat"], "cpu", 1, True)
    with Spy(fresh) as spy, record(fresh) as r:
        generate(fresh, None, prompt_embeds=texts, negative_prompt_embeds=negative, num_images_per_prompt=2, **SQUARE)
    assert len(r.recordings) == 4
    for image, prompt in enumerate(["a <toy>", "a <toy>", "the cat", "the cat"]):
        found = heatmaps(r.recordings[image], encode_padded(fresh, prompt))
        torch.testing.assert_close(found, triple_loop(spy, 4 + image, GRIDS, SIZE), atol=1e-5, rtol=0)


# Refusals


def animated():
    parts = make_pipe().components
    torch.manual_seed(0)
    motion = MotionAdapter((16, 32, 32), 1, motion_num_attention_heads=2, motion_norm_num_groups=8)
    parts |= {"unet": UNetMotionModel.from_unet2d(parts["unet"], motion), "motion_adapter": motion}
    del parts["safety_checker"]
    return AnimateDiffPipeline(**parts)


def panorama():
    from diffusers import StableDiffusionPanoramaPipeline

    return made(StableDiffusionPanoramaPipeline)


class HomeMadePipeline(DiffusionPipeline):
    """Made from no pipeline that is known."""

    do_classifier_free_guidance = True

    def __init__(self, vae, text_encoder, tokenizer, unet, scheduler):
        super().__init__()
        self.register_modules(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler)


def home_made():
    parts = make_pipe().components
    return HomeMadePipeline(*(parts[x] for x in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")))


@pytest.mark.parametrize(
    ("make", "name"), [(animated, "AnimateDiffPipeline"), (panorama, "PanoramaPipeline"), (home_made, "HomeMadePipe")]
)
def test_a_batch_of_unknown_rows_is_refused_before_the_image(make, name):
    pipe, calls = make(), []
    pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    hooks = sum(len(x._forward_hooks) for x in pipe.unet.modules())
    with pytest.raises(InputError, match=name), record(pipe):
        run(pipe)
    assert calls == []
    assert sum(len(x._forward_hooks) for x in pipe.unet.modules()) == hooks


class Smoothed(StableDiffusionPipeline):
    """As pipelines of the community are (SEG): a third part behind the guided batch."""

    def __call__(self, prompt, images, parts, guidance):
        self._guidance_scale = guidance
        self.scheduler.set_timesteps(2)
        texts = self.encode_prompt(prompt, "cpu", images, False)[0]
        latents = torch.randn(images, 4, 16, 16)
        for t in self.scheduler.timesteps:
            noise = self.unet(latents.repeat(parts, 1, 1, 1), t, texts.repeat(parts, 1, 1)).sample
            latents = self.scheduler.step(noise.chunk(parts)[0], t, latents).prev_sample


@torch.no_grad()
@pytest.mark.parametrize(
    ("images", "parts", "guidance"), [(1, 3, 4.0), (2, 3, 4.0), (1, 2, 1.0), (2, 2, 1.0), (2, 1, 4.0)]
)
def test_more_rows_than_images_are_noticed_at_the_first_step(images, parts, guidance):
    pipe, calls = made(Smoothed), []
    pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(InputError, match="This Smoothed gives its denoiser"), record(pipe):
        pipe("the cat", images, parts, guidance)
    assert len(calls) == 1
    assert "step" not in vars(pipe.scheduler)
    with record(pipe, branch="all") as r:
        pipe("the cat", images, parts, guidance)
    assert len(r.recordings) == images * parts


@pytest.mark.parametrize(
    "name",
    [
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionInpaintPipeline",
        "StableDiffusionXLInpaintPipeline",
        "StableDiffusionInstructPix2PixPipeline",
        "StableDiffusion3Img2ImgPipeline",
        "FluxFillPipeline",
        "AnimateDiffPipeline",
        "StableVideoDiffusionPipeline",
        "StableDiffusionUpscalePipeline",
    ],
)
def test_a_saved_pipeline_of_another_kind_is_refused(name, tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(InputError, match=f"{name} is not a text-to-image pipeline"):
        load_pipeline(str(tmp_path), "cpu")


def test_a_saved_unet_that_sees_a_mask_is_refused(tmp_path):
    made(StableDiffusionPipeline, unet_of(9)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="sees more than the image that it makes"):
        load_pipeline(str(tmp_path), "cpu")


def test_a_saved_pipeline_with_perturbed_attention_is_read(tmp_path):
    made(StableDiffusionPAGPipeline).save_pretrained(tmp_path)
    ovam = OVAM.from_pretrained(str(tmp_path), "cpu")
    picture = ovam.generate("the cat", num_inference_steps=2, width=64, height=64)
    assert picture.recording.step_indices == (0, 1)


# Pictures that are not what was recorded


@pytest.mark.parametrize("kind", [StableDiffusionInpaintPipeline, StableDiffusionControlNetInpaintPipeline, "sdxl"])
def test_a_crop_that_is_pasted_back_is_refused(kind):
    if kind == "sdxl":
        pipe = StableDiffusionXLInpaintPipeline(**make_sdxl().components, add_watermarker=False)
    elif kind is StableDiffusionInpaintPipeline:
        pipe = made(kind, unet_of(9))
    else:
        pipe = made(kind, controlnet=controlnet())
    pipe.set_progress_bar_config(disable=True)
    whole = PHOTO.resize((96, 64))
    given = {"image": whole, "mask_image": MASK.resize(whole.size), "padding_mask_crop": 4, "height": 32, "width": 32}
    given |= {"output_type": "pil"} | ({"control_image": whole} if hasattr(pipe, "controlnet") else {})
    calls = []
    pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(InputError, match="padding_mask_crop"), record(pipe):
        run(pipe, "the cat", **given)
    assert calls == []
    assert run(pipe, "the cat", **given)[0].size == whole.size


@pytest.mark.parametrize(
    ("image", "match"),
    [
        (PHOTO.resize((96, 64)), "96x64 and what was recorded 32x32"),
        (PHOTO.resize((32, 64)), "32x64"),
        (torch.zeros(1, 4, 16, 16), "give a PIL image"),
    ],
)
def test_a_picture_of_another_shape(tiny, image, match):
    with record(tiny) as r:
        generate(tiny, **SQUARE)
    with pytest.raises(InputError, match=match):
        Picture(image, r.recordings[0])
    assert Picture(PHOTO.resize((128, 128)), r.recordings[0]).image.size == (128, 128)  # upscaled: the same shape


# Halves


@pytest.mark.parametrize("name", ["sd", "sdxl", "pixart-sigma", "hunyuan", "sana"])
def test_words_without_a_text_encoder(name):
    pipe = CROSS[name]()
    for part in ("text_encoder", "text_encoder_2"):
        if hasattr(pipe, part):
            setattr(pipe, part, None)
    with pytest.raises(InputError, match="loaded without a text encoder"):
        attribute_words(pipe, ["cat"])
    with pytest.raises(InputError, match="loaded without its text encoder"):
        record_image(pipe, PHOTO, "")


def test_embeddings_are_recorded_without_a_text_encoder(fresh):
    texts, negative = fresh.encode_prompt("the cat", "cpu", 1, True)
    words = attribute_words(fresh, ["cat"])
    fresh.text_encoder = None
    with record(fresh) as r:
        generate(fresh, None, prompt_embeds=texts, negative_prompt_embeds=negative, **SQUARE)
    assert attribute(r.recordings[0], words).shape == (1, *SIZE)
    with pytest.raises(InputError, match="StableDiffusionPipeline was loaded without a text encoder"):
        attribute_words(fresh, ["cat"])


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2", "tokenizer"])
def test_words_with_one_of_two_encoders(part):
    pipe = make_sdxl()
    setattr(pipe, part, None)
    with pytest.raises(InputError, match="without a text encoder or its tokenizer"):
        attribute_words(pipe, ["cat"])


@pytest.mark.parametrize(
    ("make", "part"), [(make_sd3, "transformer"), (make_pipe, "unet"), (lambda: make_flux(True), "transformer")]
)
def test_the_half_without_a_denoiser(make, part):
    pipe = make()
    setattr(pipe, part, None)
    for ask in (lambda: attribute_words(pipe, ["cat"]), lambda: record(pipe), lambda: OVAM(pipe)):
        with pytest.raises(InputError, match=f"loaded without its {part}"):
            ask()


@pytest.mark.parametrize("make", [make_pipe, make_sd3, make_sdxl])
def test_the_half_without_an_autoencoder(make):
    pipe = make()
    pipe.set_progress_bar_config(disable=True)
    pipe.vae = None
    with record(pipe) as r:
        pipe("the cat", height=32, width=32, num_inference_steps=1, output_type="latent")
    assert attribute(r.recordings[0], attribute_words(pipe, ["cat"])).isfinite().all()
    for ask in (
        lambda: record_image(pipe, PHOTO, "the cat"),
        lambda: OVAM(pipe).generate("the cat", width=64, height=64),
    ):
        with pytest.raises(InputError, match="loaded without its vae"):
            ask()


# An image beside the text


def load_image_prompt(unet):
    """An IP-Adapter of random weights, as diffusers loads one."""
    torch.manual_seed(5)
    keys, number = {}, 1
    for name in unet.attn_processors:
        if name.endswith("attn2.processor"):
            attention = unet.get_submodule(name.removesuffix(".processor"))
            width = attention.to_q.out_features
            keys |= {f"{number}.to_{x}_ip.weight": torch.randn(width, 32) for x in "kv"}
            number += 2
    projection = {"proj.weight": torch.randn(4 * 32, 32), "proj.bias": torch.zeros(4 * 32)}
    projection |= {"norm.weight": torch.ones(32), "norm.bias": torch.zeros(32)}
    unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": keys}])


def test_a_run_and_a_photograph_with_an_image_prompt(fresh):
    plain = record_image(fresh, PHOTO, "the cat", self_attention=True)
    load_image_prompt(fresh.unet)
    assert_rows(fresh, 2, ip_adapter_image_embeds=[torch.randn(4, 1, 32)], height=32, width=32)
    found = record_image(fresh, PHOTO, "the cat", self_attention=True)
    for one, other in zip(found.layers, plain.layers, strict=True):
        torch.testing.assert_close(one.queries, other.queries, atol=1e-6, rtol=0)
    assert "forward" not in vars(fresh.unet.encoder_hid_proj)
    assert OVAM(fresh).photograph(PHOTO, "the cat", width=32, height=32).goca is not None
    with pytest.raises(InputError, match="unload_ip_adapter"):
        OVAM(fresh).generate("the cat", num_inference_steps=1, width=64, height=64)


def test_flux_with_an_image_prompt():
    pictures = []
    for loaded in (False, True):
        torch.manual_seed(0)
        pipe = make_flux(True)
        pipe.set_progress_bar_config(disable=True)
        if loaded:
            kinds = {name: x for name, x in pipe.transformer.attn_processors.items() if name.startswith("transf")}
            made = {name: FluxIPAdapterAttnProcessor(16, 24, [4], [1.0]) for name in kinds}
            pipe.transformer.set_attn_processor(pipe.transformer.attn_processors | made)
            pipe.transformer.encoder_hid_proj = torch.nn.Identity()
        drawn = OVAM(pipe).generate("the cat", num_inference_steps=1, width=64, height=64)
        pictures.append((drawn, OVAM(pipe).photograph(PHOTO, "the cat", width=64, height=64)))
    for plain, one in zip(*pictures, strict=True):
        for x, y in zip(plain.recording.layers, one.recording.layers, strict=True):
            torch.testing.assert_close(x.queries, y.queries, atol=1e-6, rtol=0)


# Hooks that would never fire


def test_fused_projections_are_read():
    pipe, plain = make_pipe(), make_pipe()
    pipe.unet.fuse_qkv_projections()
    recordings = []
    for one in (plain, pipe):
        with record(one) as r, record_goca(one) as g:
            generate(one, **SQUARE)
        recordings.append((r.recordings[0], g.recordings[0]))
    (ours, goca), (theirs, their_goca) = recordings[1], recordings[0]
    for x, y in zip(ours.layers, theirs.layers, strict=True):
        torch.testing.assert_close(x.queries, y.queries, atol=1e-4, rtol=0)
    assert [x.name for x in ours.column_sums] == [x.name for x in theirs.column_sums]
    for x, y in zip(ours.column_sums, theirs.column_sums, strict=True):
        torch.testing.assert_close(x.sums, y.sums, atol=1e-3, rtol=1e-3)
    for x, y in zip(goca.layers, their_goca.layers, strict=True):
        torch.testing.assert_close(x.layer.queries, y.layer.queries, atol=1e-4, rtol=0)
    pipe.unet.unfuse_qkv_projections()  # the fused modules stay, and are no longer called
    with record(pipe) as r:
        generate(pipe, **SQUARE)
    assert torch.equal(r.recordings[0].layers[0].queries, theirs.layers[0].queries)


@pytest.mark.parametrize("make", [make_sd3, lambda: make_flux(True), CROSS["pixart-sigma"]])
def test_fused_projections_of_transformers(make):
    found = []
    for fused in (False, True):
        torch.manual_seed(0)
        pipe = make()
        pipe.set_progress_bar_config(disable=True)
        if fused:
            pipe.transformer.fuse_qkv_projections()
        generator = torch.Generator().manual_seed(0)
        given = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "latent", "generator": generator}
        if hasattr(pipe.image_processor, "classify_height_width_bin"):
            given["use_resolution_binning"] = False
        with record(pipe) as r:
            pipe("the cat", **given)
        found.append(r.recordings[0])
    plain, fused = found
    words = attribute_words(pipe, ["cat", "red bus"])
    torch.testing.assert_close(attribute(fused, words), attribute(plain, words), atol=1e-4, rtol=0)
    assert len(fused.column_sums) == len(plain.column_sums) > 0


def test_fused_projections_that_leave_out_norms():
    pipe = make_sd3("rms_norm")
    pipe.transformer.fuse_qkv_projections()
    with pytest.raises(InputError, match="unfuse_qkv_projections"):
        record(pipe)


def as_compiled(module):
    """What torch.compile leaves of a module that has run: it is called without its hooks."""
    module._compiled_call_impl = module.forward


def test_a_compiled_model_says_so_before_the_image(fresh):
    calls = []
    for name, module in fresh.unet.named_modules():
        if name.endswith(("attn1.to_q", "attn1.to_k", "attn2.to_q")):
            as_compiled(module)
    handle = fresh.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(InputError), record(fresh):
        generate(fresh, **SQUARE)
    assert len(calls) == 1
    handle.remove()
    for hear in (record, record_goca):
        with pytest.raises(InputError, match=r"the model is compiled.*set_stance\('force_eager'\)"), hear(fresh):
            generate(fresh, **SQUARE)
    with pytest.raises(InputError, match="the model is compiled"):
        record_image(fresh, PHOTO, "the cat")


def test_a_layer_that_is_compiled_is_named(fresh):
    as_compiled(fresh.unet.up_blocks[1].attentions[0].transformer_blocks[0].attn2.to_q)
    with pytest.raises(InputError, match=r"The layer up_blocks\.1.*the model is compiled"), record(fresh):
        generate(fresh, **SQUARE)


def test_another_processor_is_named(fresh):
    class Mine:
        def __call__(self, attention, hidden_states, **_):
            return hidden_states * 1.0

    fresh.unet.set_attn_processor(Mine())
    with pytest.raises(InputError, match=r"without to_q and to_qkv, by their processor \(Mine\)"), record(fresh):
        generate(fresh, **SQUARE)
