"""Stable Diffusion 1 and 2: a UNet with cross-attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ovam_core.attention.heads import Attention
from ovam_core.errors import InputError
from ovam_core.models.adapter import Adapter, Call, Denoiser, Pipeline, attentions_of
from ovam_core.models.reading import Tokens


class StableDiffusion(Adapter):
    """Stable Diffusion 1 and 2: a UNet with cross-attention, CLIP's last hidden state."""

    name = "Stable Diffusion 1 and 2"
    steps, guidance = 30, 7.5

    @classmethod
    def fits(cls, pipe: Pipeline) -> bool:
        return is_guided_unet(pipe) and getattr(pipe, "text_encoder_2", None) is None

    @property
    def denoiser(self) -> Denoiser:
        return self.pipe.unet

    @property
    def embed_dim(self) -> int:
        width = self.denoiser.config.cross_attention_dim
        return width if isinstance(width, int) else width[0]

    @property
    def strides(self) -> tuple[int, ...]:
        config = self.denoiser.config
        levels = {level for level, kind in enumerate(config.down_block_types) if "CrossAttn" in kind}
        if "CrossAttn" in (config.mid_block_type or ""):
            levels.add(len(config.down_block_types) - 1)
        return tuple(self.pipe.vae_scale_factor * 2**level for level in sorted(levels))

    @property
    def side_multiple(self) -> int:
        return 8

    def attentions(self) -> tuple[dict[str, Attention], dict[str, Attention]]:
        cross, self_attentions = attentions_of(self.denoiser)
        for name, x in cross.items():
            if x.norm_cross or getattr(x, "norm_q", None) is not None or getattr(x, "norm_k", None) is not None:
                raise InputError(f"The layer {name} normalises its queries or keys, which is not supported.")
        return cross, self_attentions

    def call(self, args: tuple, kwargs: dict[str, Any]) -> Call:
        sample = args[0] if args else kwargs["sample"]
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        height, width = sample.shape[-2:]
        return Call(len(sample), height, width, timestep)

    def grid(self, n: int, call: Call) -> tuple[int, int]:
        return grid_size(n, call.height, call.width)

    def encode(self, tokens: Tokens) -> Tensor:
        encoder = self.encoders[0][1]
        batch = self._batch(tokens.ids[0])
        uses_mask = getattr(encoder.config, "use_attention_mask", False)
        return encoder(batch, attention_mask=torch.ones_like(batch) if uses_mask else None)[0][0]

    def encode_padded(self, text: str) -> Tensor:
        return self.pipe.encode_prompt(text, self.pipe._execution_device, 1, False)[0][0]

    @property
    def is_plain(self) -> bool:
        return self._sees_latents_alone and self.denoiser.config.addition_embed_type is None

    def condition(self, captions: Sequence[str], _size: tuple[int, int]) -> dict[str, Any]:
        return {"encoder_hidden_states": torch.stack([self.encode_padded(caption) for caption in captions])}


def is_guided_unet(pipe: Pipeline) -> bool:
    """Whether the pipeline has a UNet that attends to the text encoder's own output, and guidance."""
    config = getattr(getattr(pipe, "unet", None), "config", None)
    return (
        getattr(config, "cross_attention_dim", None) is not None
        and getattr(config, "encoder_hid_dim", None) is None  # Kolors and Kandinsky project the text first
        and hasattr(type(pipe), "do_classifier_free_guidance")
    )


def grid_size(n: int, latent_height: int, latent_width: int) -> tuple[int, int]:
    """(height, width) of the attention grid of `n` pixels, by halving the latents as a UNet does.

    A UNet rounds odd sides up (padded convolutions) or down (asymmetric padding). Raises InputError for no fit.
    """
    for round_up in (1, 0):
        height, width = latent_height, latent_width
        while height * width > n and height * width > 1:
            height, width = (height + round_up) // 2, (width + round_up) // 2
        if height * width == n:
            return height, width
    raise InputError(f"An attention of {n} pixels does not fit latents of {latent_height} x {latent_width}.")
