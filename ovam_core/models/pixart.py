"""PixArt-Alpha and Sigma: a transformer with cross-attention to T5."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ovam_core.attention.heads import Attention
from ovam_core.models.adapter import default_of
from ovam_core.models.listeners import EncodeListener, Listener
from ovam_core.models.reading import Tokens
from ovam_core.models.transformer import TransformerAdapter


class PixArt(TransformerAdapter):
    """PixArt-Alpha and Sigma: T5's last hidden state, which has an end token and no start; masked padding."""

    name = "PixArt-Alpha and Sigma"
    s_cfg = True
    steps, guidance = 20, 4.5
    pipelines = ("PixArtAlphaPipeline", "PixArtSigmaPipeline")

    @property
    def embed_dim(self) -> int:
        config = self.denoiser.config
        return config.caption_channels or config.cross_attention_dim

    def listen(self) -> Listener:
        return EncodeListener(self.pipe)

    def keys(self, attention: Attention) -> nn.Module:
        projection = self.denoiser.caption_projection
        return attention.to_k if projection is None else nn.Sequential(projection, attention.to_k)

    def spelled(self, text: str) -> str:
        return self.pipe._text_preprocessing(text, clean_caption=self._cleans)[0]

    @property
    def _cleans(self) -> bool:
        """Whether the pipeline rewrites captions: its default, where the packages for it are installed."""
        from diffusers.utils import is_bs4_available, is_ftfy_available

        return default_of(self.pipe, "clean_caption") and is_bs4_available() and is_ftfy_available()

    @property
    def max_tokens(self) -> int:
        return default_of(self.pipe, "max_sequence_length")

    def encode_batch(self, tokens: Sequence[Tokens]) -> Tensor:
        batch = self._batch([x.ids[0] for x in tokens])
        return self.pipe.text_encoder(batch, attention_mask=torch.ones_like(batch))[0]

    def encode_padded(self, text: str) -> Tensor:
        embeddings, mask = self._prompt(text)
        return embeddings[0][mask[0].bool()]

    def _prompt(self, text: str) -> tuple[Tensor, Tensor]:
        """Embeddings `[1, L, E]` with padding, and the mask of it `[1, L]`."""
        return self.pipe.encode_prompt(
            text,
            do_classifier_free_guidance=False,
            device=self.pipe._execution_device,
            clean_caption=self._cleans,
            max_sequence_length=self.max_tokens,
        )[:2]

    def condition(self, captions: Sequence[str], size: tuple[int, int]) -> dict[str, Any]:
        prompts = [self._prompt(caption) for caption in captions]
        texts, masks = (torch.cat(tensors) for tensors in zip(*prompts, strict=True))
        shape: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.denoiser.use_additional_conditions:  # PixArt-Alpha at 1024 pixels
            told = {"resolution": [[*size]], "aspect_ratio": [[size[0] / size[1]]]}
            shape = {name: torch.tensor(x).to(texts).repeat(len(captions), 1) for name, x in told.items()}
        return {"encoder_hidden_states": texts, "encoder_attention_mask": masks, "added_cond_kwargs": shape}

    def arguments(self, negative_prompt: str | list[str], after_step: Callable[[int], None]) -> dict[str, Any]:
        return {
            "negative_prompt": negative_prompt,
            "callback": lambda step, _timestep, _latents: after_step(step + 1),
            "callback_steps": 1,
            "use_resolution_binning": False,
        }
