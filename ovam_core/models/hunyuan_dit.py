"""HunyuanDiT: a transformer with cross-attention to two text encoders of different widths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ovam_core.attention.heads import Attention, Turn, by_head, normed, rotated
from ovam_core.attention.modules import call_frozen
from ovam_core.models.adapter import Call, TextEncoder, default_of
from ovam_core.models.reading import (
    Tokenizer,
    Tokens,
    by_encoder,
    check_length,
    check_written,
    one_after_another,
    read_each,
    rows_behind_padding,
)
from ovam_core.models.transformer import TransformerAdapter


class HunyuanDiT(TransformerAdapter):
    """HunyuanDiT: normalised and rotated queries; the tokens of BERT, then those of T5, in one softmax.

    The two encoders are of different widths, so an embedding is what the cross-attentions get: T5's half has
    passed the model's own projection. Padding is replaced by learned vectors, which the model attends to.
    """

    name = "HunyuanDiT"
    steps, guidance = 50, 5.0
    pipelines = ("HunyuanDiTPipeline",)
    pixels = 16
    timestep_position = 1

    @property
    def embed_dim(self) -> int:
        return self.denoiser.config.cross_attention_dim

    def queries(self, attention: Attention, projected: Tensor, call: Call) -> Tensor:
        return rotated(by_head(projected, attention.heads, attention.norm_q), call.rotary)

    def self_keys(self, attention: Attention, projected: Tensor, call: Call) -> Tensor:
        return rotated(by_head(projected, attention.heads, attention.norm_k), call.rotary)

    def keys(self, attention: Attention) -> nn.Module:
        return _NormedKeys(attention)

    @property
    def encoders(self) -> list[tuple[Tokenizer, TextEncoder]]:
        return [*super().encoders, (self.pipe.tokenizer_2, self.pipe.text_encoder_2)]

    def _tokenize(self, texts: Sequence[str]) -> list[Tokens]:
        written = [check_written(text) for text in texts]
        limits = self.denoiser.config.text_len, self.denoiser.config.text_len_t5
        each = []
        for read in zip(*(read_each(tokenizer, written) for tokenizer, _ in self.encoders), strict=True):
            for tokens, limit in zip(read, limits, strict=True):
                check_length(len(tokens.spans), limit)
            each.append(one_after_another(read, read))
        return each

    def encode_batch(self, tokens: Sequence[Tokens]) -> Tensor:
        hidden = []
        for ids, (_, encoder) in zip(by_encoder(tokens), self.encoders, strict=True):
            batch = self._batch(ids)
            hidden.append(encoder(batch, attention_mask=torch.ones_like(batch))[0])
        return self._joined(*hidden)

    def encode_padded(self, text: str) -> Tensor:
        (bert, bert_mask), (t5, t5_mask) = (self._prompt(text, index) for index in range(2))
        joined, mask = self._joined(bert[0], t5[0]), torch.cat([bert_mask[0], t5_mask[0]]).bool()
        padding = self.denoiser.text_embedding_padding.to(joined)
        return torch.where(mask[:, None].to(joined.device), joined, padding)

    def padded_rows(self, tokens: Tokens) -> list[int]:
        return rows_behind_padding(tokens, len(tokens.ids[0]), self.denoiser.config.text_len)

    def _prompt(self, text: str, index: int) -> tuple[Tensor, Tensor]:
        """One encoder's embeddings `[1, L, E]` with padding, and the mask of it `[1, L]`."""
        return self.pipe.encode_prompt(
            text,
            device=self.pipe._execution_device,
            dtype=self.denoiser.dtype,
            do_classifier_free_guidance=False,
            text_encoder_index=index,
        )[::2]

    def moment(self, timestep: int, latents: Tensor) -> Tensor:
        return super().moment(timestep, latents).to(latents.dtype)

    def condition(self, captions: Sequence[str], size: tuple[int, int]) -> dict[str, Any]:
        """The original size and crop that the model is told are the pipeline's defaults."""
        prompts = [[*self._prompt(caption, 0), *self._prompt(caption, 1)] for caption in captions]
        bert, bert_mask, t5, t5_mask = (torch.cat(tensors) for tensors in zip(*prompts, strict=True))
        original, crop = (default_of(self.pipe, x) for x in ("original_size", "crops_coords_top_left"))
        sizes = torch.tensor([[*original, *size, *crop]], dtype=bert.dtype, device=bert.device)
        return {
            "encoder_hidden_states": bert,
            "text_embedding_mask": bert_mask,
            "encoder_hidden_states_t5": t5,
            "text_embedding_mask_t5": t5_mask,
            "image_meta_size": sizes.repeat(len(captions), 1),
            "style": torch.zeros(len(captions), dtype=torch.int64, device=bert.device),
            "image_rotary_emb": self._rotary(size),
        }

    def _rotary(self, size: tuple[int, int]) -> Turn:
        """Of the grid, `[n, d]`, which is laid over that of a square image of 512 pixels."""
        from diffusers.models.embeddings import get_2d_rotary_pos_embed
        from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid

        model, (stride,) = self.denoiser, self.strides
        grid = (size[0] // stride, size[1] // stride)
        return get_2d_rotary_pos_embed(
            model.inner_dim // model.num_heads,
            get_resize_crop_region_for_grid(grid, 512 // stride),
            grid,
            device=self.pipe._execution_device,
            output_type="pt",
        )

    def _joined(self, bert: Tensor, t5: Tensor) -> Tensor:
        projected = call_frozen(self.denoiser.text_embedder, t5, dtype=self.denoiser.dtype).to(bert.device)
        return torch.cat([bert.to(projected.dtype), projected], dim=-2)

    def arguments(self, negative_prompt: str | list[str], after_step: Callable[[int], None]) -> dict[str, Any]:
        return {**super().arguments(negative_prompt, after_step), "use_resolution_binning": False}


class _NormedKeys(nn.Module):
    """`to_k`, then `norm_k` on each head: `[L, E]` to `[L, heads * d]`."""

    def __init__(self, attention: Attention):
        super().__init__()
        self.to_k, self.norm_k, self.heads = attention.to_k, attention.norm_k, attention.heads

    def forward(self, embedding: Tensor) -> Tensor:
        keys = rearrange(self.to_k(embedding), "l (h d) -> h l d", h=self.heads)
        return rearrange(normed(keys, self.norm_k), "h l d -> l (h d)")
