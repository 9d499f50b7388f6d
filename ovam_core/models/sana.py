"""Sana: a transformer with linear self-attention and cross-attention to Gemma."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ovam_core.attention.affinity import add_linear_attention
from ovam_core.attention.heads import Attention, by_head, normed
from ovam_core.attention.self_attention import linear_column_sums
from ovam_core.models.adapter import Call, default_of
from ovam_core.models.listeners import BinListener, Listener
from ovam_core.models.reading import Tokens, check_length, check_written, read_each, read_ids
from ovam_core.models.transformer import FlowTransformerAdapter


class Sana(FlowTransformerAdapter):
    """Sana: linear self-attention, softmax cross-attention; Gemma's last hidden state; masked padding.

    Gemma reads the prompt behind the pipeline's default instruction, for words as for images, as it is causal.
    The instruction's own tokens are cut off as in the pipeline, but for `<bos>` (and the last one, where the
    tokenizer does not merge it with the prompt).
    """

    name = "Sana"
    steps, guidance = 20, 4.5
    pipelines = ("SanaPipeline",)
    pixels = 32
    linear = True

    @property
    def embed_dim(self) -> int:
        return self.denoiser.config.caption_channels

    def listen(self) -> Listener:
        return BinListener(self.pipe)

    def call(self, args: tuple, kwargs: dict[str, Any]) -> Call:
        call = super().call(args, kwargs)
        # Sana 1.5 scales the scheduler's timestep by 0.001; rounding takes out what that cost.
        timestep = torch.as_tensor(call.timestep).float() / self.denoiser.config.timestep_scale
        return replace(call, timestep=timestep.round(decimals=2))

    def queries(self, attention: Attention, projected: Tensor, _call: Call) -> Tensor:
        return by_head(normed(projected, attention.norm_q), attention.heads)

    def self_keys(self, attention: Attention, projected: Tensor, _call: Call) -> Tensor:
        return by_head(normed(projected, attention.norm_k), attention.heads)

    def received(self, query: Tensor, key: Tensor, _scale: float) -> Tensor:
        return linear_column_sums(query, key)

    def add_attention(self, total: Tensor, query: Tensor, key: Tensor, _scale: float) -> None:
        add_linear_attention(total, query, key)

    def keys(self, attention: Attention) -> nn.Module:
        model = self.denoiser
        modules = [model.caption_projection, model.caption_norm, attention.to_k, attention.norm_k]
        return nn.Sequential(*(x for x in modules if x is not None))

    def spelled(self, text: str) -> str:
        return self.pipe._text_preprocessing(text, clean_caption=False)[0]

    @property
    def max_tokens(self) -> int:
        return default_of(self.pipe, "max_sequence_length")

    def _tokenize(self, texts: Sequence[str]) -> list[Tokens]:
        written = [check_written(self.spelled(text)) for text in texts]
        instruction = "\n".join(default_of(self.pipe, "complex_human_instruction"))
        begin, first = len(instruction), len(read_ids(self.pipe.tokenizer, instruction).input_ids) - 1
        each = []
        read = read_each(self.pipe.tokenizer, [instruction + text for text in written])
        for text, whole in zip(written, read, strict=True):
            kept = [0, *range(first, len(whole.spans))]
            check_length(len(kept), self.max_tokens)
            spans = [(max(0, start - begin), max(0, end - begin)) for start, end in (whole.spans[i] for i in kept)]
            each.append(Tokens(text, whole.ids, tuple(spans), tuple(whole.names[i] for i in kept)))
        return each

    def encode_batch(self, tokens: Sequence[Tokens]) -> Tensor:
        batch = self._batch([x.ids[0] for x in tokens])
        hidden = self.pipe.text_encoder(batch, attention_mask=torch.ones_like(batch))[0]
        return torch.cat([hidden[:, :1], hidden[:, hidden.shape[1] - len(tokens[0].spans) + 1 :]], dim=1)

    def encode_padded(self, text: str) -> Tensor:
        embeddings, mask = self._prompt(text, default_of(self.pipe, "complex_human_instruction"))
        return embeddings[0][mask[0].bool()]

    def _prompt(self, text: str, instruction: list[str] | None) -> tuple[Tensor, Tensor]:
        """Embeddings `[1, L, E]` with padding, and the mask of it `[1, L]`."""
        return self.pipe.encode_prompt(
            text,
            do_classifier_free_guidance=False,
            device=self.pipe._execution_device,
            max_sequence_length=self.max_tokens,
            complex_human_instruction=instruction,
        )[:2]

    def encode_image(self, pixels: Tensor) -> Tensor:
        """The deep-compression autoencoder (arXiv 2410.10733) gives latents and no distribution."""
        vae = self.pipe.vae
        return vae.encode(pixels).latent.float() * vae.config.scaling_factor

    def moment(self, timestep: int, latents: Tensor) -> Tensor:
        return super().moment(timestep, latents) * self.denoiser.config.timestep_scale

    def condition(self, captions: Sequence[str], _size: tuple[int, int]) -> dict[str, Any]:
        """Captions stand behind the pipeline's instruction; the unconditional half does without."""
        instruction = default_of(self.pipe, "complex_human_instruction")
        prompts = [self._prompt(caption, instruction if caption.strip() else None) for caption in captions]
        texts, masks = (torch.cat(tensors) for tensors in zip(*prompts, strict=True))
        return {"encoder_hidden_states": texts.to(self.denoiser.dtype), "encoder_attention_mask": masks}

    def arguments(self, negative_prompt: str | list[str], after_step: Callable[[int], None]) -> dict[str, Any]:
        shared = super().arguments(negative_prompt, after_step)
        return {**shared, "negative_prompt": negative_prompt, "use_resolution_binning": False}
