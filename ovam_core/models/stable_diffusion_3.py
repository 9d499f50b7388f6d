"""Stable Diffusion 3 and 3.5: joint attention, three text encoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ovam_core.attention.heads import Attention
from ovam_core.errors import InputError
from ovam_core.models.adapter import TextEncoder, default_of
from ovam_core.models.joint import JointTransformerAdapter
from ovam_core.models.listeners import Listener, SkipListener
from ovam_core.models.reading import (
    Tokenizer,
    Tokens,
    at_last_scale,
    by_encoder,
    check_length,
    check_same_cut,
    check_written,
    last_clip_skip,
    last_lora_scale,
    one_after_another,
    read_each,
    rows_behind_padding,
)


class StableDiffusion3(JointTransformerAdapter):
    """Stable Diffusion 3 and 3.5: the tokens of both CLIP encoders, beside each other, then those of T5.

    CLIP's rows are filled up with zeros to T5's width. The pipeline can do without T5: then its rows are missing
    in attribution prompts, and zeros in generation.
    """

    name = "Stable Diffusion 3"
    steps, guidance = 28, 7.0
    pipelines = ("StableDiffusion3Pipeline",)
    starts: ClassVar[Mapping[str, str]] = {"StableDiffusion3Pipeline": "StableDiffusion3Img2ImgPipeline"}
    timestep_position = 3
    output_blocks: ClassVar[tuple[int, ...]] = (9,)  # Seg4Diff's

    def attentions(self) -> tuple[dict[str, Attention], dict[str, Attention]]:
        joint, _ = super().attentions()
        for attention in joint.values():
            processor = type(getattr(attention, "processor", None)).__name__
            if attention.norm_q is not None and processor == "FusedJointAttnProcessor2_0":
                raise InputError(
                    "The fused projections of this model leave out the norms of its queries and keys: call "
                    "pipe.transformer.unfuse_qkv_projections() first."
                )
        return joint, joint

    def listen(self) -> Listener:
        return SkipListener(self.pipe)

    @property
    def encoders(self) -> list[tuple[Tokenizer, TextEncoder]]:
        pipe = self.pipe
        clip = [(pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)]
        return clip if pipe.text_encoder_3 is None else [*clip, (pipe.tokenizer_3, pipe.text_encoder_3)]

    def _tokenize(self, texts: Sequence[str]) -> list[Tokens]:
        written = [check_written(text) for text in texts]
        limits = (*[self.pipe.tokenizer_max_length] * 2, default_of(self.pipe, "max_sequence_length"))
        each = []
        for read in zip(*(read_each(tokenizer, written) for tokenizer, _ in self.encoders), strict=True):
            for tokens, limit in zip(read, limits, strict=False):
                check_length(len(tokens.spans), limit)
            check_same_cut(read[:2])
            each.append(one_after_another(read, read[1:]))
        return each

    def encode_batch(self, tokens: Sequence[Tokens]) -> Tensor:
        pairs = list(zip(by_encoder(tokens), self.encoders, strict=True))
        layer = -2 - (last_clip_skip(self.pipe) or 0)
        with at_last_scale(self.pipe, [encoder for _, encoder in self.encoders[:2]]):
            clip = torch.cat(
                [
                    encoder(self._batch(ids), output_hidden_states=True).hidden_states[layer]
                    for ids, (_, encoder) in pairs[:2]
                ],
                dim=-1,
            )
        rows = [F.pad(clip, (0, self.embed_dim - clip.shape[-1]))]
        rows += [self._encode_t5(*pair, ids).to(clip) for ids, pair in pairs[2:]]
        return torch.cat(rows, dim=1)

    def encode_padded(self, text: str) -> Tensor:
        return self._prompt(text)[0][0]

    def padded_rows(self, tokens: Tokens) -> list[int]:
        return rows_behind_padding(tokens, len(tokens.ids[0]), self.pipe.tokenizer_max_length)

    def _prompt(self, text: str) -> tuple[Tensor, Tensor]:
        """Embeddings `[1, L, E]` with padding, and CLIP's pooled ones `[1, P]`."""
        device = self.pipe._execution_device
        how = {"clip_skip": last_clip_skip(self.pipe), "lora_scale": last_lora_scale(self.pipe)}
        return self.pipe.encode_prompt(text, None, None, device, do_classifier_free_guidance=False, **how)[::2]

    def condition(self, captions: Sequence[str], _size: tuple[int, int]) -> dict[str, Any]:
        prompts = [self._prompt(caption) for caption in captions]
        texts, pooled = (torch.cat(tensors) for tensors in zip(*prompts, strict=True))
        return {"encoder_hidden_states": texts, "pooled_projections": pooled}
