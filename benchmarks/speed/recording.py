"""Row 1: `pipe(...)` under the recorder over plain `pipe(...)`.

The embedded model whole, and the UNets of SD 1.5 and (CUDA) SDXL from their published configurations with random
weights. Text encoder and VAE are left out of those two, which makes the ratio the stricter one. Memory: the peak above
what rests in memory before the call.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers
import torch
from torch import Tensor

from benchmarks.speed.common import Bench, Line, NotOnThisDevice, assert_same, megabytes, peak_bytes, race, ratio_line
from ovam_core.attention.recording import Recording
from ovam_core.hooks.recorder import record
from ovam_core.models.load import load_pipeline
from ovam_core.models.presets import EMBEDDED

PROMPT = "A photograph of a cat and a car on grass"

# The published unet/config.json of the two models, where they differ from diffusers' defaults.
SD15 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SDXL = {
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def recording_embedded(bench: Bench) -> list[Line]:
    pipe, steps = load_pipeline(EMBEDDED, str(bench.device)), bench.sizes.embedded_steps
    name = f"{EMBEDDED}, {steps} steps of 128 px"
    return recording_lines(bench, name, pipe, lambda: embedded_call(pipe, steps), bench.sizes.rounds)


def recording_sd15(bench: Bench) -> list[Line]:
    steps, side = bench.sizes.sd15_steps, bench.sizes.sd15_side
    pipe = unet_pipeline(bench, diffusers.StableDiffusionPipeline, SD15)
    name = f"SD 1.5's UNet, {steps} steps of {side} px"
    return recording_lines(bench, name, pipe, lambda: unet_call(bench, pipe, steps, side), bench.sizes.few_rounds)


def recording_sdxl(bench: Bench) -> list[Line]:
    steps, side = bench.sizes.sdxl_steps, bench.sizes.sdxl_side
    if not steps:
        raise NotOnThisDevice("SDXL's UNet has 2.6 billion parameters: a step at 1024 px takes minutes without CUDA.")
    pipe = unet_pipeline(bench, diffusers.StableDiffusionXLPipeline, SDXL)
    name = f"SDXL's UNet, {steps} steps of {side} px"
    return recording_lines(bench, name, pipe, lambda: unet_call(bench, pipe, steps, side), bench.sizes.few_rounds)


def recording_lines(bench: Bench, name: str, pipe: Any, call: Callable[[], Tensor], rounds: int) -> list[Line]:
    """Time and memory of a run that is recorded over those of the same run alone."""

    def recorded(self_attention: bool) -> tuple[Tensor, list[Recording]]:
        with record(pipe, self_attention=self_attention) as recorder:
            images = call()
        return images, recorder.recordings

    expected = call()
    for self_attention in (False, True):
        images, recordings = recorded(self_attention)
        assert_same(images, expected)
    queries = sum(layer.queries.nbytes for recording in recordings for layer in recording.layers)
    del images, recordings, expected
    sides = {
        "plain": call,
        "recorded": partial(recorded, False),
        "recorded with self-attention": partial(recorded, True),
    }
    times = race(bench, sides, rounds, least=0)
    peaks = {side: peak_bytes(bench, run) for side, run in sides.items()}
    targets = {"recorded": "1.03" if bench.on_gpu else "1.05", "recorded with self-attention": "1.15"}
    lines = []
    for side, target in targets.items():
        more, plain = megabytes(peaks[side] - peaks["plain"]), megabytes(peaks["plain"])
        note = f"peak memory {more} over plain's {plain}; the queries kept are {megabytes(queries)}"
        lines.append(ratio_line(bench, 1, name, times, side, "plain", target, note))
    return lines


def embedded_call(pipe: Any, steps: int, images: int = 1) -> Tensor:
    """Images `[images, 3, H, W]` of the embedded model."""
    generator = torch.Generator().manual_seed(0)
    return pipe(
        PROMPT, num_inference_steps=steps, generator=generator, num_images_per_prompt=images, output_type="pt"
    ).images


def unet_pipeline(bench: Bench, kind: type, config: dict[str, Any]) -> Any:
    """A diffusers pipeline of one UNet with random weights; it takes embeddings and gives latents."""
    channels = config.get("block_out_channels", (320, 640, 1280, 1280))
    config = config | {"block_out_channels": tuple(count // bench.sizes.narrow for count in channels)}
    torch.manual_seed(0)
    with bench.device:
        unet = diffusers.UNet2DConditionModel(**config)
    parts: dict[str, Any] = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    if kind is diffusers.StableDiffusionXLPipeline:
        parts |= dict.fromkeys(("text_encoder_2", "tokenizer_2"))
    else:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    scheduler = diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)
    torch.nn.Module.to(unet, bench.dtype)  # diffusers' own warns of what does not concern this
    pipe = kind(unet=unet.eval(), scheduler=scheduler, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def unet_call(bench: Bench, pipe: Any, steps: int, side: int) -> Tensor:
    """Latents of a guided run."""
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator)
    width = pipe.unet.config.cross_attention_dim
    inputs = {"prompt_embeds": draw(1, 77, width), "negative_prompt_embeds": draw(1, 77, width)}
    if pipe.unet.config.addition_embed_type == "text_time":
        inputs |= {"pooled_prompt_embeds": draw(1, 1280), "negative_pooled_prompt_embeds": draw(1, 1280)}
    inputs = {name: x.to(bench.device, bench.dtype) for name, x in inputs.items()}
    return pipe(
        **inputs, num_inference_steps=steps, height=side, width=side, generator=generator, output_type="latent"
    ).images
