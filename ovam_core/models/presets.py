"""Usual settings of the models that are known by name, and the part of a recording that their masks are made of."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ovam_core.attention.recording import Recording
from ovam_core.models.adapter import Pipeline
from ovam_core.models.registry import adapter_of, model_name

EMBEDDED = "emoji-voc"
DEFAULT_HUB_MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"


@dataclass(frozen=True)
class ModelDefaults:
    """Usual settings of a model.

    steps, guidance: of `pipe(...)`. height, width: of an image, in pixels; max_size: the larger side at most.
    strides: attention grids to use, by the image's pixels to one of theirs; None for all recorded. max_timestep: the
    largest timestep, of 1000, whose attention is used.
    dtype: the one its weights are meant for on CUDA. tau, alpha: threshold (Eq. 9) and self-attention floor (Eq. 8) for
    words; token_tau, token_alpha for optimised tokens: the paper's, unless the model has been measured. presence: slope
    and offset of `calibrated`; None where it has not been measured.
    """

    steps: int
    guidance: float
    height: int
    width: int
    max_size: int
    strides: tuple[int, ...] | None = None
    max_timestep: int = 1000
    dtype: torch.dtype = torch.float16
    tau: float = 0.4
    alpha: float = 0.85
    token_tau: float = 0.8
    token_alpha: float = 0.95
    presence: tuple[float, float] | None = None


_SD1 = ModelDefaults(steps=30, guidance=7.5, height=512, width=512, max_size=1024)
_SD2_768 = ModelDefaults(steps=30, guidance=7.5, height=768, width=768, max_size=1280)
_SDXL = ModelDefaults(steps=30, guidance=5.0, height=1024, width=1024, max_size=1536)
_PIXART = ModelDefaults(steps=20, guidance=4.5, height=1024, width=1024, max_size=1536)
_PIXART_512 = ModelDefaults(steps=20, guidance=4.5, height=512, width=512, max_size=1024)
# Gemma's and Sana's activations leave the range of float16.
_SANA = ModelDefaults(steps=20, guidance=4.5, height=1024, width=1024, max_size=1536, dtype=torch.bfloat16)
_HUNYUAN = ModelDefaults(steps=50, guidance=5.0, height=1024, width=1024, max_size=1280)
_SD3 = ModelDefaults(steps=28, guidance=7.0, height=1024, width=1024, max_size=1536)
_SD35_MEDIUM = replace(_SD3, steps=40, guidance=4.5, dtype=torch.bfloat16)
_SD35_LARGE = replace(_SD3, guidance=3.5, dtype=torch.bfloat16)
_SD35_TURBO = replace(_SD35_LARGE, steps=4, guidance=0.0)
_FLUX_DEV = ModelDefaults(steps=28, guidance=3.5, height=1024, width=1024, max_size=1536, dtype=torch.bfloat16)
_FLUX_SCHNELL = replace(_FLUX_DEV, steps=4, guidance=0.0)
_FLUX_2 = replace(_FLUX_DEV, guidance=4.0)

KNOWN_MODELS: dict[str, ModelDefaults] = {
    # Its other grids, 32 x 32 among them, and its first steps find little (docs/embedded-model.md).
    # Both tau by the mean mIoU of both sets on seeds from 2000, which the tables do not use; alpha made no difference.
    EMBEDDED: ModelDefaults(
        steps=25,
        guidance=4.0,
        height=128,
        width=128,
        max_size=256,
        strides=(8,),
        max_timestep=600,
        tau=0.36,
        token_tau=0.38,
        presence=(8.13, 15.40),  # of benchmarks/presence.py
    ),
    DEFAULT_HUB_MODEL: _SD1,
    "CompVis/stable-diffusion-v1-4": _SD1,
    "stabilityai/stable-diffusion-2-base": _SD1,
    "stabilityai/stable-diffusion-2-1-base": _SD1,
    "stabilityai/stable-diffusion-2-1": _SD2_768,
    "stabilityai/stable-diffusion-xl-base-1.0": _SDXL,
    "PixArt-alpha/PixArt-XL-2-512x512": _PIXART_512,
    "PixArt-alpha/PixArt-XL-2-1024-MS": _PIXART,
    "PixArt-alpha/PixArt-Sigma-XL-2-512-MS": _PIXART_512,
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": _PIXART,
    "Efficient-Large-Model/Sana_600M_1024px_diffusers": _SANA,
    "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers": _SANA,
    "Tencent-Hunyuan/HunyuanDiT-Diffusers": _HUNYUAN,
    "Tencent-Hunyuan/HunyuanDiT-v1.1-Diffusers": _HUNYUAN,
    "Tencent-Hunyuan/HunyuanDiT-v1.2-Diffusers": _HUNYUAN,
    "stabilityai/stable-diffusion-3-medium-diffusers": _SD3,
    "stabilityai/stable-diffusion-3.5-medium": _SD35_MEDIUM,
    "stabilityai/stable-diffusion-3.5-large": _SD35_LARGE,
    "stabilityai/stable-diffusion-3.5-large-turbo": _SD35_TURBO,
    "black-forest-labs/FLUX.1-dev": _FLUX_DEV,
    "black-forest-labs/FLUX.1-schnell": _FLUX_SCHNELL,
    "black-forest-labs/FLUX.2-dev": _FLUX_2,
}


def defaults_for(pipe_or_name: Pipeline | str) -> ModelDefaults:
    """The settings of a known model, by its name or by a pipeline of that name.

    For an unknown model: its family's usual steps and guidance, the size its denoiser was trained at. If only a name is
    given: 30 steps, guidance 7.5, 512 pixels.
    """
    name = pipe_or_name if isinstance(pipe_or_name, str) else model_name(pipe_or_name)
    if name in KNOWN_MODELS:
        return KNOWN_MODELS[name]
    if isinstance(pipe_or_name, str):
        return _SD1
    adapter = adapter_of(pipe_or_name)
    sample = adapter.sample_size
    height, width = (sample, sample) if isinstance(sample, int) else sample
    factor = pipe_or_name.vae_scale_factor
    height, width = height * factor, width * factor
    return ModelDefaults(adapter.steps, adapter.guidance, height, width, max_size=2 * max(height, width))


def recommended_part(pipe: Pipeline, recording: Recording) -> Recording:
    """The part of a recording that the model's defaults name: its grids and its timesteps."""
    return recommended_steps(pipe, recommended_grids(pipe, recording))


def recommended_grids(pipe: Pipeline, recording: Recording) -> Recording:
    """The recording with the attention grids that the model's defaults name; with all where they name none of them."""
    strides, side = defaults_for(pipe).strides, max(recording.image_size)
    kept = [grid for grid in recording.resolutions if strides is not None and round(side / grid) in strides]
    return recording.select(resolutions=kept or None)


def recommended_steps(pipe: Pipeline, recording: Recording) -> Recording:
    """The recording without the steps that are noisier than the model's defaults want; with all where none is left."""
    max_timestep = defaults_for(pipe).max_timestep
    pairs = zip(recording.step_indices, recording.timesteps, strict=True)
    return recording.select(steps=[step for step, timestep in pairs if timestep <= max_timestep] or None)
