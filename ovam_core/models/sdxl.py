"""Stable Diffusion XL: two text encoders, and a UNet that is told sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ovam_core.models.adapter import Pipeline, TextEncoder
from ovam_core.models.reading import Tokenizer, Tokens, at_last_scale, by_encoder, last_clip_skip, last_lora_scale
from ovam_core.models.stable_diffusion import StableDiffusion, is_guided_unet


class StableDiffusionXL(StableDiffusion):
    """As Stable Diffusion, with the penultimate hidden states of two CLIP encoders beside each other."""

    name = "Stable Diffusion XL"
    pipelines = ("StableDiffusionXLPipeline", "StableDiffusionXLPAGPipeline")
    starts: ClassVar[Mapping[str, str]] = {
        "StableDiffusionXLPipeline": "StableDiffusionXLImg2ImgPipeline",
        "StableDiffusionXLPAGPipeline": "StableDiffusionXLPAGImg2ImgPipeline",
    }
    steps, guidance = 30, 5.0

    @classmethod
    def fits(cls, pipe: Pipeline) -> bool:
        return (
            is_guided_unet(pipe)
            and hasattr(pipe, "text_encoder_2")
            and getattr(pipe.unet.config, "addition_embed_type", None) == "text_time"
        )

    @property
    def encoders(self) -> list[tuple[Tokenizer, TextEncoder]]:
        encoder = self.pipe.text_encoder_2
        second = [(self.pipe.tokenizer_2, encoder)]
        refiner = self.pipe.text_encoder is None and getattr(encoder, "config", None) is not None
        if refiner and encoder.config.hidden_size == self.embed_dim:
            return second
        return super().encoders + second

    def encode_batch(self, tokens: Sequence[Tokens]) -> Tensor:
        layer = -2 - (last_clip_skip(self.pipe) or 0)
        with at_last_scale(self.pipe, [encoder for _, encoder in self.encoders]):
            hidden = [
                encoder(self._batch(ids), output_hidden_states=True).hidden_states[layer]
                for ids, (_, encoder) in zip(by_encoder(tokens), self.encoders, strict=True)
            ]
        return torch.cat(hidden, dim=-1)

    def encode_padded(self, text: str) -> Tensor:
        device = self.pipe._execution_device
        how = {"clip_skip": last_clip_skip(self.pipe), "lora_scale": last_lora_scale(self.pipe)}
        return self.pipe.encode_prompt(text, device=device, do_classifier_free_guidance=False, **how)[0][0]

    @property
    def is_plain(self) -> bool:
        """The refiner takes an aesthetic score in place of the target size."""
        config, pooled = self.denoiser.config, self.pipe.text_encoder_2.config.projection_dim
        added = 6 * config.addition_time_embed_dim + pooled
        return self.sees_latents_alone and config.projection_class_embeddings_input_dim == added

    def condition(self, captions: Sequence[str], size: tuple[int, int]) -> dict[str, Any]:
        """The sizes that the model is told are those of an image that was made at `size` and not cropped."""
        prompts = [self._prompt(caption) for caption in captions]
        texts, pooled = (torch.cat(tensors) for tensors in zip(*prompts, strict=True))
        sizes = torch.tensor([[*size, 0, 0, *size]], dtype=texts.dtype, device=texts.device)
        added = {"text_embeds": pooled, "time_ids": sizes.repeat(len(captions), 1), **self._no_images}
        return {"encoder_hidden_states": texts, "added_cond_kwargs": added}

    def _prompt(self, caption: str) -> tuple[Tensor, Tensor]:
        """Embeddings `[1, 77, E]` and pooled ones `[1, P]`. The pipeline may have zeros for no negative prompt."""
        device, empty = self.pipe._execution_device, not caption.strip()
        how = {"clip_skip": last_clip_skip(self.pipe), "lora_scale": last_lora_scale(self.pipe)}
        encoded = self.pipe.encode_prompt(caption, device=device, do_classifier_free_guidance=empty, **how)
        return encoded[1::2] if empty else encoded[::2]
