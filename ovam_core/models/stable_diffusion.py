"""Stable Diffusion 1 and 2: a UNet with cross-attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ovam_core.attention.heads import Attention
from ovam_core.errors import InputError
from ovam_core.models.adapter import Adapter, Call, Denoiser, Pipeline, attentions_of
from ovam_core.models.listeners import Listener, UNetListener, unet_parts_known
from ovam_core.models.reading import Tokens, at_last_scale, last_clip_skip, last_lora_scale


class StableDiffusion(Adapter):
    """Stable Diffusion 1 and 2: a UNet with cross-attention, CLIP's last hidden state."""

    name = "Stable Diffusion 1 and 2"
    s_cfg = True
    pipelines: ClassVar[tuple[str, ...]] = (
        "StableDiffusionPipeline",
        "StableDiffusionPAGPipeline",
        "LatentConsistencyModelPipeline",
        "AltDiffusionPipeline",
    )
    starts: ClassVar[Mapping[str, str]] = {
        "StableDiffusionPipeline": "StableDiffusionImg2ImgPipeline",
        "StableDiffusionPAGPipeline": "StableDiffusionPAGImg2ImgPipeline",
    }
    steps, guidance = 30, 7.5
    remembers = True

    @classmethod
    def fits(cls, pipe: Pipeline) -> bool:
        one_encoder = getattr(pipe, "text_encoder_2", None) is None
        return (
            is_guided_unet(pipe) and one_encoder and getattr(pipe.unet.config, "addition_embed_type", "") != "text_time"
        )

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
        ways = (config.down_block_types, reversed(config.up_block_types))
        levels = {level for way in ways for level, kind in enumerate(way) if "CrossAttn" in kind}
        if "CrossAttn" in (config.mid_block_type or ""):
            levels.add(len(config.down_block_types) - 1)
        return tuple(self.pipe.vae_scale_factor * 2**level for level in sorted(levels))

    @property
    def side_multiple(self) -> int:
        return 8

    def attentions(self) -> tuple[dict[str, Attention], dict[str, Attention]]:
        found = attentions_of(self.denoiser)
        # ControlNet-XS has the attentions of its control within the blocks of the UNet.
        cross, self_attentions = ({name: x for name, x in one.items() if "ctrl_" not in name} for one in found)
        for name, x in cross.items():
            if x.norm_cross or getattr(x, "norm_q", None) is not None or getattr(x, "norm_k", None) is not None:
                raise InputError(f"The layer {name} normalises its queries or keys, which is not supported.")
            if getattr(x, "added_kv_proj_dim", None) is not None:
                raise InputError(f"The layer {name} attends to the text and to the image at once: it is not supported.")
        return cross, self_attentions

    def listen(self) -> Listener:
        return UNetListener(self.pipe)

    @property
    def parts_known(self) -> bool:
        return unet_parts_known(self.pipe)

    def call(self, args: tuple, kwargs: dict[str, Any]) -> Call:
        sample = args[0] if args else kwargs["sample"]
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        height, width = sample.shape[-2:]
        return Call(len(sample), height, width, timestep)

    def grid(self, n: int, call: Call) -> tuple[int, int]:
        return grid_size(n, call.height, call.width)

    def encode_batch(self, tokens: Sequence[Tokens]) -> Tensor:
        encoder: Any = self.encoders[0][1]
        batch = self._batch([x.ids[0] for x in tokens])
        uses_mask = getattr(encoder.config, "use_attention_mask", False)
        mask, skipped = torch.ones_like(batch) if uses_mask else None, last_clip_skip(self.pipe)
        with at_last_scale(self.pipe, [encoder]):
            if skipped is None:
                return encoder(batch, attention_mask=mask)[0]
            hidden = encoder(batch, attention_mask=mask, output_hidden_states=True).hidden_states
        return getattr(encoder, "text_model", encoder).final_layer_norm(hidden[-(skipped + 1)])

    def encode_padded(self, text: str) -> Tensor:
        if not hasattr(self.pipe, "encode_prompt"):  # InstructPix2Pix
            return self.pipe._encode_prompt(text, self.pipe._execution_device, 1, False)[0]
        how = {"clip_skip": last_clip_skip(self.pipe), "lora_scale": last_lora_scale(self.pipe)}
        return self.pipe.encode_prompt(text, self.pipe._execution_device, 1, False, **how)[0][0]

    @property
    def is_plain(self) -> bool:
        return self.sees_latents_alone and self.denoiser.config.addition_embed_type is None

    def condition(self, captions: Sequence[str], _size: tuple[int, int]) -> dict[str, Any]:
        condition = {"encoder_hidden_states": torch.stack([self.encode_padded(caption) for caption in captions])}
        return {**condition, "added_cond_kwargs": self._no_images} if self._no_images else condition

    @property
    def _no_images(self) -> dict[str, Any]:
        """What an IP-Adapter demands beside the text: no image (`text_alone`)."""
        return {"image_embeds": []} if self._ip_adapter is not None else {}

    @property
    def _ip_adapter(self) -> nn.Module | None:
        loaded = getattr(self.denoiser.config, "encoder_hid_dim_type", None) == "ip_image_proj"
        return self.denoiser.encoder_hid_proj if loaded else None

    def arguments(self, negative_prompt: str | list[str], after_step: Callable[[int], None]) -> dict[str, Any]:
        """Raises InputError for a loaded IP-Adapter, without whose image the pipeline cannot run."""
        if self._ip_adapter is not None:
            raise InputError(
                "The IP-Adapter that is loaded needs an image beside the prompt: call pipe.unload_ip_adapter(), or "
                "give it one in a call of your own within record(pipe)."
            )
        return super().arguments(negative_prompt, after_step)

    @contextmanager
    def text_alone(self) -> Iterator[None]:
        """An IP-Adapter makes nothing of no image, and so adds nothing to the attention to the text."""
        adapter = self._ip_adapter
        if adapter is None:
            yield
            return
        former = vars(adapter).get("forward")  # of the object itself: accelerate's, perhaps
        adapter.forward = lambda _images: []
        try:
            yield
        finally:
            del adapter.forward
            if former is not None:
                adapter.forward = former


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
