"""The families of diffusers pipelines: a small adapter each, with all that recorder and text need to know.

`family_of(pipe)` gives the adapter. Here are those with cross-attention; Stable Diffusion 1 and 2 is `Family` itself
(family.py), those with joint attention are in joint_families.py.
A new family is a new class and an entry in FAMILIES; nothing else changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ovam_core.attention.self_attention import linear_column_sums
from ovam_core.attention.text_stream import rotated
from ovam_core.errors import InputError
from ovam_core.models.family import (
    BinListener,
    Call,
    EncodeListener,
    Family,
    FlowTransformer,
    Listener,
    Tokens,
    Transformer,
    by_head,
    check_length,
    default_of,
    is_guided_unet,
    normed,
    read_ids,
    read_tokens,
    written,
)
from ovam_core.models.joint_families import Flux, Flux2, StableDiffusion3


class StableDiffusionXL(Family):
    """As Stable Diffusion, with the penultimate hidden states of two CLIP encoders beside each other."""

    name = "Stable Diffusion XL"
    steps, guidance = 30, 5.0

    @classmethod
    def fits(cls, pipe: Any) -> bool:
        return (
            is_guided_unet(pipe)
            and getattr(pipe, "text_encoder_2", None) is not None
            and pipe.unet.config.addition_embed_type == "text_time"
        )

    @property
    def encoders(self) -> list[tuple[Any, nn.Module]]:
        second = [(self.pipe.tokenizer_2, self.pipe.text_encoder_2)]
        return second if self.pipe.text_encoder is None else super().encoders + second

    def encode(self, tokens: Tokens) -> Tensor:
        found = [
            encoder(self._batch(ids), output_hidden_states=True).hidden_states[-2][0]
            for ids, (_, encoder) in zip(tokens.ids, self.encoders, strict=True)
        ]
        return torch.cat(found, dim=-1)

    def encode_padded(self, text: str) -> Tensor:
        device = self.pipe._execution_device
        return self.pipe.encode_prompt(text, device=device, do_classifier_free_guidance=False)[0][0]

    @property
    def is_plain(self) -> bool:
        """The refiner takes an aesthetic score in place of the target size."""
        config, pooled = self.denoiser.config, self.pipe.text_encoder_2.config.projection_dim
        added = 6 * config.addition_time_embed_dim + pooled
        return self._sees_latents_alone and config.projection_class_embeddings_input_dim == added

    def condition(self, captions: Sequence[str], size: tuple[int, int]) -> dict[str, Any]:
        """The sizes that the model is told are those of an image that was made at `size` and not cropped."""
        found = [self._prompt(one) for one in captions]
        texts, pooled = (torch.cat(one) for one in zip(*found, strict=True))
        sizes = torch.tensor([[*size, 0, 0, *size]], dtype=texts.dtype, device=texts.device)
        added = {"text_embeds": pooled, "time_ids": sizes.repeat(len(captions), 1)}
        return {"encoder_hidden_states": texts, "added_cond_kwargs": added}

    def _prompt(self, caption: str) -> tuple[Tensor, Tensor]:
        """Embeddings `[1, 77, E]` and pooled ones `[1, P]`. The pipeline may have zeros for no negative prompt."""
        device, empty = self.pipe._execution_device, not caption.strip()
        found = self.pipe.encode_prompt(caption, device=device, do_classifier_free_guidance=empty)
        return found[1::2] if empty else found[::2]


class PixArt(Transformer):
    """PixArt-Alpha and Sigma: T5's last hidden state, which has an end token and no start; masked padding."""

    name = "PixArt-Alpha and Sigma"
    steps, guidance = 20, 4.5
    pipelines = ("PixArtAlphaPipeline", "PixArtSigmaPipeline")

    @property
    def embed_dim(self) -> int:
        config = self.denoiser.config
        return config.caption_channels or config.cross_attention_dim

    def listen(self) -> Listener:
        return EncodeListener(self.pipe)

    def keys(self, attention: nn.Module) -> nn.Module:
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

    def encode(self, tokens: Tokens) -> Tensor:
        batch = self._batch(tokens.ids[0])
        return self.pipe.text_encoder(batch, attention_mask=torch.ones_like(batch))[0][0]

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
        found = [self._prompt(one) for one in captions]
        texts, masks = (torch.cat(one) for one in zip(*found, strict=True))
        shape = {"resolution": None, "aspect_ratio": None}
        if self.denoiser.use_additional_conditions:  # PixArt-Alpha at 1024 pixels
            told = {"resolution": [[*size]], "aspect_ratio": [[size[0] / size[1]]]}
            shape = {name: torch.tensor(x).to(texts).repeat(len(captions), 1) for name, x in told.items()}
        return {
            "encoder_hidden_states": texts,
            "encoder_attention_mask": masks,
            "added_cond_kwargs": shape,
        }

    def arguments(self, negative_prompt: str | list[str], after_step: Callable[[int], None]) -> dict[str, Any]:
        return {
            "negative_prompt": negative_prompt,
            "callback": lambda step, _timestep, _latents: after_step(step + 1),
            "callback_steps": 1,
            "use_resolution_binning": False,
        }


class Sana(FlowTransformer):
    """Sana: linear self-attention, softmax cross-attention; Gemma's last hidden state; masked padding.

    Gemma reads the prompt behind the pipeline's default instruction, for words as for images, as it is causal.
    The instruction's own tokens are cut off as in the pipeline, but for `<bos>` (and the last one, where the
    tokenizer does not merge it with the prompt).
    """

    name = "Sana"
    steps, guidance = 20, 4.5
    pipelines = ("SanaPipeline",)
    pixels = 32

    @property
    def embed_dim(self) -> int:
        return self.denoiser.config.caption_channels

    def listen(self) -> Listener:
        return BinListener(self.pipe)

    def call(self, args: tuple, kwargs: dict) -> Call:
        call = super().call(args, kwargs)
        # Sana 1.5 scales the scheduler's timestep by 0.001; rounding takes out what that cost.
        timestep = (call.timestep.float() / self.denoiser.config.timestep_scale).round(decimals=2)
        return replace(call, timestep=timestep)

    def queries(self, attention: nn.Module, projected: Tensor, call: Call) -> Tensor:
        return by_head(normed(projected, attention.norm_q), attention)

    def self_keys(self, attention: nn.Module, projected: Tensor, call: Call) -> Tensor:
        return by_head(normed(projected, attention.norm_k), attention)

    def received(self, query: Tensor, key: Tensor, scale: float) -> Tensor:
        return linear_column_sums(query, key)

    def keys(self, attention: nn.Module) -> nn.Module:
        model = self.denoiser
        parts = [model.caption_projection, model.caption_norm, attention.to_k, attention.norm_k]
        return nn.Sequential(*(x for x in parts if x is not None))

    def spelled(self, text: str) -> str:
        return self.pipe._text_preprocessing(text, clean_caption=False)[0]

    @property
    def max_tokens(self) -> int:
        return default_of(self.pipe, "max_sequence_length")

    def tokenize(self, text: str) -> Tokens:
        text = written(self.spelled(text))
        instruction = "\n".join(default_of(self.pipe, "complex_human_instruction"))
        whole = read_tokens(self.pipe.tokenizer, instruction + text)
        kept = [0, *range(len(read_ids(self.pipe.tokenizer, instruction).input_ids) - 1, len(whole.spans))]
        check_length(len(kept), self.max_tokens)
        spans = [tuple(max(0, x - len(instruction)) for x in whole.spans[i]) for i in kept]
        return Tokens(text, whole.ids, tuple(spans), tuple(whole.names[i] for i in kept))

    def encode(self, tokens: Tokens) -> Tensor:
        batch = self._batch(tokens.ids[0])
        hidden = self.pipe.text_encoder(batch, attention_mask=torch.ones_like(batch))[0][0]
        return torch.cat([hidden[:1], hidden[len(hidden) - len(tokens.spans) + 1 :]])

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

    def condition(self, captions: Sequence[str], size: tuple[int, int]) -> dict[str, Any]:
        """Captions stand behind the pipeline's instruction; the unconditional half does without."""
        instruction = default_of(self.pipe, "complex_human_instruction")
        found = [self._prompt(one, instruction if one.strip() else None) for one in captions]
        texts, masks = (torch.cat(one) for one in zip(*found, strict=True))
        return {"encoder_hidden_states": texts.to(self.denoiser.dtype), "encoder_attention_mask": masks}

    def arguments(self, negative_prompt: str | list[str], after_step: Callable[[int], None]) -> dict[str, Any]:
        given = super().arguments(negative_prompt, after_step)
        return {**given, "negative_prompt": negative_prompt, "use_resolution_binning": False}


class HunyuanDiT(Transformer):
    """HunyuanDiT: normalised and rotated queries; the tokens of BERT, then those of T5, in one softmax.

    The two encoders are of different widths, so an embedding is what the cross-attentions get: T5's half has
    passed the model's own projection. Padding is replaced by learned vectors, which the model attends to.
    """

    name = "HunyuanDiT"
    steps, guidance = 50, 5.0
    pipelines = ("HunyuanDiTPipeline",)
    pixels = 16
    timestep_position = 1

    def queries(self, attention: nn.Module, projected: Tensor, call: Call) -> Tensor:
        return rotated(normed(by_head(projected, attention), attention.norm_q), call.rotary)

    def self_keys(self, attention: nn.Module, projected: Tensor, call: Call) -> Tensor:
        return rotated(normed(by_head(projected, attention), attention.norm_k), call.rotary)

    def keys(self, attention: nn.Module) -> nn.Module:
        return _NormedKeys(attention)

    @property
    def encoders(self) -> list[tuple[Any, nn.Module]]:
        return [*super().encoders, (self.pipe.tokenizer_2, self.pipe.text_encoder_2)]

    def tokenize(self, text: str) -> Tokens:
        text = written(text)
        config = self.denoiser.config
        read = [read_tokens(tokenizer, text) for tokenizer, _ in self.encoders]
        for one, limit in zip(read, (config.text_len, config.text_len_t5), strict=True):
            check_length(len(one.spans), limit)
        return Tokens(
            text,
            tuple(x.ids[0] for x in read),
            tuple(span for x in read for span in x.spans),
            tuple(name for x in read for name in x.names),
        )

    def encode(self, tokens: Tokens) -> Tensor:
        found = []
        for ids, (_, encoder) in zip(tokens.ids, self.encoders, strict=True):
            batch = self._batch(ids)
            found.append(encoder(batch, attention_mask=torch.ones_like(batch))[0][0])
        return self._joined(*found)

    def encode_padded(self, text: str) -> Tensor:
        (bert, bert_mask), (t5, t5_mask) = (self._prompt(text, index) for index in range(2))
        joined, mask = self._joined(bert[0], t5[0]), torch.cat([bert_mask[0], t5_mask[0]]).bool()
        padding = self.denoiser.text_embedding_padding.to(joined)
        return torch.where(mask[:, None].to(joined.device), joined, padding)

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
        found = [[*self._prompt(one, 0), *self._prompt(one, 1)] for one in captions]
        bert, bert_mask, t5, t5_mask = (torch.cat(one) for one in zip(*found, strict=True))
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

    def _rotary(self, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Cosines and sines `[n, d]` of the grid, which is laid over that of a square image of 512 pixels."""
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
        project = self.denoiser.text_embedder
        weight = next(project.parameters())
        # Weights that are offloaded as a whole wait elsewhere; those on "meta" come and go by themselves.
        device = t5.device if weight.is_meta else weight.device
        return torch.cat([bert.to(weight.dtype), project(t5.to(device, weight.dtype)).to(bert.device)])

    def arguments(self, negative_prompt: str | list[str], after_step: Callable[[int], None]) -> dict[str, Any]:
        return {**super().arguments(negative_prompt, after_step), "use_resolution_binning": False}


class _NormedKeys(nn.Module):
    """`to_k`, then `norm_k` on each head: `[L, E]` to `[L, heads * d]`."""

    def __init__(self, attention: nn.Module):
        super().__init__()
        self.to_k, self.norm_k, self.heads = attention.to_k, attention.norm_k, attention.heads

    def forward(self, embedding: Tensor) -> Tensor:
        keys = rearrange(self.to_k(embedding), "l (h d) -> h l d", h=self.heads)
        return rearrange(normed(keys, self.norm_k), "h l d -> l (h d)")


FAMILIES = (Family, StableDiffusionXL, PixArt, Sana, HunyuanDiT, StableDiffusion3, Flux, Flux2)


def family_of(pipe: Any) -> Family:
    """The adapter of a pipeline. Raises InputError, with the supported families, where there is none."""
    for family in FAMILIES:
        if family.fits(pipe):
            return family(pipe)
    *names, last = (family.name for family in FAMILIES)
    raise InputError(
        f"{type(pipe).__name__} is not a text-to-image pipeline of a family that can be recorded: "
        f"load {', '.join(names)} or {last}."
    )


def check_fits(pipe: Any, name: str, text: str) -> None:
    """A pipeline cuts a long prompt and only logs it; the maps would then miss words in silence."""
    if not text.strip():
        return
    try:
        family_of(pipe).tokenize(text)
    except InputError as error:
        raise InputError(f"The {name} cannot be used: {error}") from None
