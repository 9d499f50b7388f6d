"""Runs that people drive themselves, as docs/families.md writes them: its very lines, on tiny pipelines; and videos,
which are refused by kind.
"""

from __future__ import annotations

import json
import textwrap

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    MotionAdapter,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNetMotionModel,
)
from PIL import Image
from pipelines import make_pipe, make_sdxl
from reference import Spy, triple_loop
from test_docs import DOCS, blocks
from test_rows import load_image_prompt
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModelWithProjection

from ovam_core import OVAM, heatmaps, record
from ovam_core.errors import InputError
from ovam_core.models.load import load_pipeline
from ovam_core.models.registry import ADAPTERS, adapter_of, check_no_video
from ovam_core.query import encode_padded

BLOCKS = [x for page in DOCS if page.name == "families.md" for x in blocks(page, "python")]
(FIRST,) = (x for x in BLOCKS if x.startswith("from diffusers"))
RUNS = {
    "image to image": "AutoPipelineForImage2Image",
    "inpainting": "AutoPipelineForInpainting",
    "ControlNet": "ControlNetModel",
    "IP-Adapter": "load_ip_adapter",
}
PROMPT = "A photograph of a cat"


@torch.random.fork_rng()
def tiny_control(*_, **__) -> ControlNetModel:
    torch.manual_seed(1)
    control = ControlNetModel.from_unet(make_pipe().unet, conditioning_embedding_out_channels=(8, 16)).eval()
    for weight in control.parameters():  # diffusers begins with zeros, which control nothing
        weight.data += 0.01
    return control


@torch.random.fork_rng()
def load_tiny_image_prompt(pipe, name, subfolder, weight_name):
    assert (name, subfolder, weight_name.split(".")[-1]) == ("h94/IP-Adapter", "models", "safetensors")
    load_image_prompt(pipe.unet)
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    vision.update({"projection_dim": 32, "image_size": 16, "patch_size": 8})
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    image_encoder = CLIPVisionModelWithProjection(vision).eval()
    pipe.register_modules(image_encoder=image_encoder, feature_extractor=image_processor)


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What the page's first block leaves behind."""
    rng = np.random.default_rng(0)
    for name in ("photo", "edges"):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(tmp_path / f"{name}.png")
    Image.fromarray(np.pad(np.full((16, 16), 255, np.uint8), 8)).save(tmp_path / "mask.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(OVAM, "from_pretrained", lambda _: OVAM(make_pipe()))
    monkeypatch.setattr(ControlNetModel, "from_pretrained", tiny_control)
    monkeypatch.setattr(StableDiffusionPipeline, "load_ip_adapter", load_tiny_image_prompt)
    found: dict = {}
    exec(FIRST, found)
    found["ovam"].pipe.set_progress_bar_config(disable=True)
    return found


@pytest.mark.parametrize("kind", RUNS)
def test_the_lines_of_the_page(names, kind):
    (lines,) = (x for x in BLOCKS if RUNS[kind] in x and x != FIRST)
    assert len(lines.splitlines()) == 5
    torch.manual_seed(7)
    unet = names["ovam"].pipe.unet
    with Spy(names["ovam"].pipe) as spy:
        exec(lines, names)
    recording, pipe = names["recorder"].recordings[0], names.get("pipe", names["ovam"].pipe)
    assert pipe.unet is unet

    text = encode_padded(pipe, PROMPT)
    maps = heatmaps(recording, text)
    torch.testing.assert_close(maps.sum(dim=0), torch.ones(16, 16), atol=1e-5, rtol=0)
    grids = {16 * 16: (16, 16), 8 * 8: (8, 8)}
    torch.testing.assert_close(maps, triple_loop(spy, 1, grids, (16, 16), text), atol=1e-5, rtol=0)
    assert len(recording.step_indices) == {"image to image": 12}.get(kind, 20)
    assert names["found"].labels == ["cat", "grass"]
    assert names["found"].masks.any(axis=(1, 2)).all()

    (call,) = (x for x in lines.splitlines() if "image = " in x)
    torch.manual_seed(7)
    exec(textwrap.dedent(call), names | {"record": None}, plain := {})
    assert np.array_equal(np.asarray(plain["image"]), np.asarray(names["image"]))


@pytest.mark.parametrize(("auto", "more"), [("Image2Image", ("photo",)), ("Inpainting", ("photo", "mask"))])
def test_the_same_of_sdxl(names, auto, more):
    ovam = OVAM(make_sdxl())
    pipe = names[f"AutoPipelineFor{auto}"].from_pipe(ovam.pipe)
    pipe.set_progress_bar_config(disable=True)
    given = dict(zip(("image", "mask_image"), (names[name] for name in more), strict=False))
    given |= (
        {"num_inference_steps": 4, "height": 32, "width": 32} if auto == "Inpainting" else {"num_inference_steps": 4}
    )
    images = []
    for run in (lambda: pipe(PROMPT, **given), None):
        torch.manual_seed(7)
        if run is not None:
            images.append(run().images[0])
            continue
        with Spy(ovam.pipe) as spy, record(pipe) as recorder:
            images.append(pipe(PROMPT, **given).images[0])
    assert np.array_equal(*map(np.asarray, images))
    text, recording = encode_padded(pipe, PROMPT), recorder.recordings[0]
    size = (recording.height, recording.width)
    grids = {h * w: (h, w) for h, w in {(layer.height, layer.width) for layer in recording.layers}}
    expected = triple_loop(spy, 1, grids, size, text)
    torch.testing.assert_close(heatmaps(recording, text), expected, atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------------------- videos

VIDEOS = (
    *("AnimateDiffPipeline", "AnimateDiffVideoToVideoPipeline", "TextToVideoSDPipeline", "VideoToVideoSDPipeline"),
    *("TextToVideoZeroPipeline", "StableVideoDiffusionPipeline", "I2VGenXLPipeline", "PIAPipeline", "LattePipeline"),
    *("CogVideoXPipeline", "WanPipeline", "WanVideoToVideoPipeline", "LTXPipeline", "HunyuanVideoPipeline"),
    *("MochiPipeline", "SanaVideoPipeline"),
)
MAKES_VIDEOS = "is not a text-to-image pipeline: it makes videos"


@pytest.mark.parametrize("name", VIDEOS)
def test_videos_are_refused_wherever_they_come_in(name, tmp_path):
    pipe = object.__new__(getattr(diffusers, name))  # a whole one is refused by its class all the same
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
    for enter in (lambda: OVAM(pipe), lambda: record(pipe), lambda: OVAM.from_pretrained(str(tmp_path), "cpu")):
        with pytest.raises(InputError, match=f"{name} {MAKES_VIDEOS}") as caught:
            enter()
        assert "\n" not in str(caught.value)


def test_a_hub_model_that_makes_videos_is_refused_before_it_is_downloaded(monkeypatch, tmp_path):
    (tmp_path / "index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_: str(tmp_path / "index.json"))
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", None)
    with pytest.raises(InputError, match=f"somebody/wan cannot be used: WanPipeline {MAKES_VIDEOS}"):
        load_pipeline("somebody/wan", "cpu")


class Frames(StableDiffusionPipeline):
    """As pipelines of the community are."""

    def __call__(self, prompt, num_frames=8, **more):
        raise AssertionError


class FramesBelow(Frames):
    def __call__(self, prompt, **more):
        raise AssertionError


def moving() -> StableDiffusionPipeline:
    """A pipeline for images with a UNet for videos in it."""
    pipe = make_pipe()
    motion = MotionAdapter((16, 32, 32), 1, motion_num_attention_heads=2, motion_norm_num_groups=8)
    pipe.unet = UNetMotionModel.from_unet2d(pipe.unet, motion)
    return pipe


@pytest.mark.parametrize("kind", [Frames, FramesBelow, moving])
def test_videos_of_ones_own_are_refused_by_their_kind(kind):
    pipe = kind() if kind is moving else kind(**make_pipe().components, requires_safety_checker=False)
    for enter in (OVAM, record):
        with pytest.raises(InputError, match=f"{type(pipe).__name__} {MAKES_VIDEOS}"):
            enter(pipe)


def test_images_are_no_videos():
    for family in ADAPTERS:
        for name in (*family.pipelines, *family.starts.values()):
            check_no_video(getattr(diffusers, name), UNet2DConditionModel)
    assert adapter_of(make_pipe()).pipe.scheduler.__class__ is DDIMScheduler
