"""The families of diffusers pipelines: a small adapter each, with all that recorder and text need to know.

`family_of(pipe)` gives the adapter. `Family` is Stable Diffusion 1 and 2; the others say where they differ.
A new family is a new class here and an entry in FAMILIES; nothing else changes.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .joint import TextStream, Turn, rotated, text_stream

SOT, EOT = "<SoT>", "<EoT>"

# One block of softmax rows in `column_sums`, all heads together. On a CPU it should stay in cache.
COLUMN_BLOCK_BYTES = {"cpu": 2 << 20, "other": 128 << 20}


@dataclass(frozen=True, eq=False)
class Call:
    """What one call of the denoiser was given. batch: its size; height, width: of the latents.

    rotary: what turns queries and keys by their position (cosines and sines), None where nothing does.
    """

    batch: int
    height: int
    width: int
    timestep: Tensor | float
    rotary: Any = None


Form = Callable[[Tensor, Call], Tensor]  # a module's output for some images `[b, ...]` to what is kept of it, `[b, ...]`


@dataclass(frozen=True)
class Tokens:
    """The tokens of a text, special ones included, not padded.

    text: as the tokenizer saw it. ids: what each text encoder reads. An entry for each row of the embedding:
    spans, the (start, end) of its letters in `text`; names, "<SoT>", "<EoT>" or those letters.
    """

    text: str
    ids: tuple[tuple[int, ...], ...]
    spans: tuple[tuple[int, int], ...]
    names: tuple[str, ...]


class Family:
    """Stable Diffusion 1 and 2: a UNet with cross-attention, CLIP's last hidden state.

    pipe: a diffusers pipeline that `fits`. An embedding is `[L, embed_dim]`, a row a token.
    """

    name = "Stable Diffusion 1 and 2"
    about = ""  # what a word's map is, where it is not the cross-attention to the word in place of the prompt
    steps, guidance = 30, 7.5  # usual settings of models that are not known by name

    def __init__(self, pipe: Any):
        self.pipe = pipe

    @classmethod
    def fits(cls, pipe: Any) -> bool:
        return _is_guided_unet(pipe) and getattr(pipe, "text_encoder_2", None) is None

    # The denoiser and its attention.

    @property
    def denoiser(self) -> nn.Module:
        """The module that the scheduler calls once a step."""
        return self.pipe.unet

    @property
    def sample_size(self) -> int | tuple[int, int]:
        """Side, or (height, width), of the latents that the model was trained on."""
        return self.denoiser.config.sample_size

    @property
    def embed_dim(self) -> int:
        """Width of a text embedding."""
        width = self.denoiser.config.cross_attention_dim
        return width if isinstance(width, int) else width[0]

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels of the image to one pixel of each attention grid, finest first."""
        config = self.denoiser.config
        levels = {level for level, kind in enumerate(config.down_block_types) if "CrossAttn" in kind}
        if "CrossAttn" in (config.mid_block_type or ""):
            levels.add(len(config.down_block_types) - 1)
        return tuple(self.pipe.vae_scale_factor * 2**level for level in sorted(levels))

    @property
    def side_multiple(self) -> int:
        """Pixels of which the image's sides must be multiples."""
        return 8

    def attentions(self) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
        """The denoiser's cross-attentions and self-attentions by name, in the order of its modules."""
        cross, own = _attentions(self.denoiser)
        for name, x in cross.items():
            if (
                x.norm_cross
                or getattr(x, "norm_q", None) is not None
                or getattr(x, "norm_k", None) is not None
            ):
                raise ValueError(f"The layer {name} normalises its queries or keys, which is not supported.")
        return cross, own

    def listen(self) -> Listener:
        """Hears whether the run is guided; the recorder removes it after the run."""
        return Listener(self.pipe)

    def call(self, args: tuple, kwargs: dict) -> Call:
        """What the denoiser was given, from its arguments."""
        sample = args[0] if args else kwargs["sample"]
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        return Call(sample.shape[0], *sample.shape[-2:], timestep)

    def grid(self, n: int, call: Call) -> tuple[int, int]:
        """(height, width) of an attention of `n` pixels."""
        return grid_size(n, call.height, call.width)

    def queries(self, attention: nn.Module, projected: Tensor, call: Call) -> Tensor:
        """`to_q`'s output `[b, n, heads * d]` to the queries of the product (Eq. 3), `[b, heads, n, d]`."""
        return _by_head(projected, attention)

    def self_keys(self, attention: nn.Module, projected: Tensor, call: Call) -> Tensor:
        """The same for `to_k`'s output in a self-attention."""
        return _by_head(projected, attention)

    def received(self, query: Tensor, key: Tensor, scale: float) -> Tensor:
        """Self-attention received by each pixel (Eq. 8), `[heads, n, d]` to float32 `[n]`."""
        return column_sums(query, key, scale)

    def scale(self, attention: nn.Module) -> float:
        """Factor of the products before the softmax, 1 / sqrt(d)."""
        return float(attention.scale)

    def keys(self, attention: nn.Module) -> nn.Module | None:
        """Eq. 4 by the model's own modules: an embedding `[L, embed_dim]` to keys `[L, heads * d]`.

        None where the keys are not of the embedding alone: there `stream` makes them.
        """
        return attention.to_k

    def beside_queries(self, names: Collection[str]) -> dict[str, tuple[nn.Module, Form]]:
        """What to keep of each step beside the queries of the attentions `names`: a module whose output it is, and its form."""
        return {}

    def stream(self, kept: dict[str, Tensor]) -> TextStream | None:
        """The text stream of one image, of what `beside_queries` named, `[T, ...]` each; None with cross-attention."""
        return None

    # The text.

    @property
    def encoders(self) -> list[tuple[Any, nn.Module]]:
        """(tokenizer, text encoder) pairs."""
        return [(self.pipe.tokenizer, self.pipe.text_encoder)]

    def spelled(self, text: str) -> str:
        """The text as the tokenizer gets it: textual inversion tokens of several vectors spelled out."""
        convert = getattr(self.pipe, "maybe_convert_prompt", None)
        return convert(text, self.encoders[0][0]) if convert else text

    @property
    def max_tokens(self) -> int:
        """How many tokens the text encoders take, special ones included."""
        return min(
            min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
            for tokenizer, encoder in self.encoders
        )

    def tokenize(self, text: str) -> Tokens:
        """Raises ValueError for an empty text and for one that the pipeline would cut."""
        text = _written(self.spelled(text))
        read = [_read(tokenizer, text) for tokenizer, _ in self.encoders]
        check_length(max(len(x.ids[0]) for x in read), self.max_tokens)
        check_same_cut(read)
        return Tokens(text, tuple(x.ids[0] for x in read), read[0].spans, read[0].names)

    def encode(self, tokens: Tokens) -> Tensor:
        """`[L, embed_dim]` of tokens without padding: what the denoiser would be given for them."""
        encoder = self.encoders[0][1]
        batch = self._batch(tokens.ids[0])
        uses_mask = getattr(encoder.config, "use_attention_mask", False)
        return encoder(batch, attention_mask=torch.ones_like(batch) if uses_mask else None)[0][0]

    def encode_padded(self, text: str) -> Tensor:
        """The embedding over which the softmax runs in generation, by the pipeline's own `encode_prompt`.

        Padding is in it where the model attends to padding, and not where the pipeline masks it.
        """
        return self.pipe.encode_prompt(text, self.pipe._execution_device, 1, False)[0][0]

    def _batch(self, ids: tuple[int, ...]) -> Tensor:
        return torch.tensor([ids], device=self.pipe._execution_device)

    # A photograph, as the denoiser gets it (photo.py).

    photographs = True  # whether the methods below hold

    @property
    def is_plain(self) -> bool:
        """Whether `condition` is all that the denoiser takes beside latents and a timestep."""
        return self._sees_latents_alone and self.denoiser.config.addition_embed_type is None

    @property
    def _sees_latents_alone(self) -> bool:
        """Inpainting and editing models see a mask or an image beside them."""
        vae = getattr(self.pipe, "vae", None)
        return vae is not None and self.denoiser.config.in_channels == vae.config.latent_channels

    @property
    def knows_noise(self) -> bool:
        """Whether `noised` is the noise that the model was trained with."""
        return "beta_schedule" in self.pipe.scheduler.config

    @property
    def photo_multiple(self) -> int:
        """Pixels of which the sides of what the denoiser sees of a photograph must be multiples."""
        return self.pipe.vae_scale_factor

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Pixels `[B, 3, H, W]` in [-1, 1], in the autoencoder's dtype, to scaled latents, float32 `[B, C, h, w]`.

        The mean of the autoencoder's distribution, so that they depend on no seed.
        """
        vae = self.pipe.vae
        mean = vae.encode(pixels).latent_dist.mean
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        return (mean.float() - shift) * vae.config.scaling_factor

    def noised(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """sqrt(a_t) x + sqrt(1 - a_t) noise (DDPM, Eq. 4), all `[T, C, h, w]`; timesteps: int64 `[T]`."""
        from diffusers import DDIMScheduler

        # The sampler's own add_noise counts on a schedule of inference steps and would take another moment's noise.
        schedule = DDIMScheduler.from_config(self.pipe.scheduler.config)
        return schedule.add_noise(latents, noise, timesteps)

    def moment(self, timestep: int, latents: Tensor) -> Tensor | int:
        """A training timestep as the pipeline gives it to the denoiser, for latents `[B, C, h, w]`."""
        return timestep

    def condition(self, captions: Sequence[str], size: tuple[int, int]) -> dict[str, Any]:
        """What the pipeline gives the denoiser beside latents and timestep, by the denoiser's own argument names.

        captions: B texts; an empty one gets what the unconditional half of a guided batch gets where no negative
        prompt is given. size: (height, width) of the image in pixels. Tensors are on the pipeline's device.
        """
        return {"encoder_hidden_states": torch.stack([self.encode_padded(one) for one in captions])}

    # The pipeline's arguments, where they go by different names.

    def arguments(
        self, negative_prompt: str | list[str], after_step: Callable[[int], None]
    ) -> dict[str, Any]:
        """Arguments of `pipe(...)`: a negative prompt, and a function told after each step how many are done.

        `after_step` may raise to end the run.
        """

        def callback(_pipe: Any, step: int, _timestep: Any, values: dict) -> dict:
            after_step(step + 1)
            return values

        return {"negative_prompt": negative_prompt or None, "callback_on_step_end": callback}


class StableDiffusionXL(Family):
    """As Stable Diffusion, with the penultimate hidden states of two CLIP encoders beside each other."""

    name = "Stable Diffusion XL"
    steps, guidance = 30, 5.0

    @classmethod
    def fits(cls, pipe: Any) -> bool:
        return (
            _is_guided_unet(pipe)
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


class _Transformer(Family):
    """A transformer over patches of the latents: one attention grid for all of its layers."""

    pipelines: tuple[str, ...] = ()
    photographs = False  # a family that has its own `condition` says so
    timestep_position = 2  # among the arguments of the denoiser
    pixels = (
        8  # sides that are not multiples of it are refused or rounded by the pipeline, whatever the patches
    )

    @classmethod
    def fits(cls, pipe: Any) -> bool:
        return any(x.__name__ in cls.pipelines for x in type(pipe).__mro__)

    @property
    def denoiser(self) -> nn.Module:
        return self.pipe.transformer

    @property
    def strides(self) -> tuple[int, ...]:
        return (self.pipe.vae_scale_factor * self.denoiser.config.patch_size,)

    @property
    def side_multiple(self) -> int:
        return max(self.pixels, *self.strides)

    def attentions(self) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
        return _attentions(self.denoiser)

    def call(self, args: tuple, kwargs: dict) -> Call:
        sample = args[0] if args else kwargs["hidden_states"]
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[self.timestep_position]
        return Call(sample.shape[0], *sample.shape[-2:], timestep, kwargs.get("image_rotary_emb"))

    def grid(self, n: int, call: Call) -> tuple[int, int]:
        patch = self.denoiser.config.patch_size
        height, width = call.height // patch, call.width // patch
        if height * width != n:
            raise ValueError(f"An attention of {n} pixels does not fit a grid of {height} x {width} patches.")
        return height, width

    @property
    def is_plain(self) -> bool:
        return self._sees_latents_alone

    @property
    def photo_multiple(self) -> int:
        return self.side_multiple

    def moment(self, timestep: int, latents: Tensor) -> Tensor:
        return torch.full((len(latents),), timestep, device=latents.device)


class PixArt(_Transformer):
    """PixArt-Alpha and Sigma: T5's last hidden state, which has an end token and no start; masked padding."""

    name = "PixArt-Alpha and Sigma"
    steps, guidance = 20, 4.5
    pipelines = ("PixArtAlphaPipeline", "PixArtSigmaPipeline")
    photographs = True

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

        return _default(self.pipe, "clean_caption") and is_bs4_available() and is_ftfy_available()

    @property
    def max_tokens(self) -> int:
        return _default(self.pipe, "max_sequence_length")

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

    def arguments(
        self, negative_prompt: str | list[str], after_step: Callable[[int], None]
    ) -> dict[str, Any]:
        return {
            "negative_prompt": negative_prompt,
            "callback": lambda step, _timestep, _latents: after_step(step + 1),
            "callback_steps": 1,
            "use_resolution_binning": False,
        }


class Sana(_Transformer):
    """Sana: linear self-attention, softmax cross-attention; Gemma's last hidden state; masked padding.

    Gemma reads the prompt behind the pipeline's default instruction, for words as for images, as it is causal.
    The instruction's own tokens are cut off as in the pipeline, but for `<bos>` (and the last one, where the
    tokenizer does not merge it with the prompt).
    """

    name = "Sana"
    steps, guidance = 20, 4.5
    pipelines = ("SanaPipeline",)
    photographs = True
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
        return _by_head(_normed(projected, attention.norm_q), attention)

    def self_keys(self, attention: nn.Module, projected: Tensor, call: Call) -> Tensor:
        return _by_head(_normed(projected, attention.norm_k), attention)

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
        return _default(self.pipe, "max_sequence_length")

    def tokenize(self, text: str) -> Tokens:
        text = _written(self.spelled(text))
        instruction = "\n".join(_default(self.pipe, "complex_human_instruction"))
        whole = _read(self.pipe.tokenizer, instruction + text)
        kept = [0, *range(len(self.pipe.tokenizer.encode(instruction)) - 1, len(whole.spans))]
        check_length(len(kept), self.max_tokens)
        spans = [tuple(max(0, x - len(instruction)) for x in whole.spans[i]) for i in kept]
        return Tokens(text, whole.ids, tuple(spans), tuple(whole.names[i] for i in kept))

    def encode(self, tokens: Tokens) -> Tensor:
        batch = self._batch(tokens.ids[0])
        hidden = self.pipe.text_encoder(batch, attention_mask=torch.ones_like(batch))[0][0]
        return torch.cat([hidden[:1], hidden[len(hidden) - len(tokens.spans) + 1 :]])

    def encode_padded(self, text: str) -> Tensor:
        embeddings, mask = self._prompt(text, _default(self.pipe, "complex_human_instruction"))
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

    knows_noise = True  # flow matching has no schedule beside the timestep

    def encode_image(self, pixels: Tensor) -> Tensor:
        """The deep-compression autoencoder (arXiv 2410.10733) gives latents and no distribution."""
        vae = self.pipe.vae
        return vae.encode(pixels).latent.float() * vae.config.scaling_factor

    def noised(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Flow matching: (1 - sigma) x + sigma noise, sigma = t / 1000, the schedule's number of training timesteps.

        That is what a timestep means to the model: a sampler's flow shift only chooses which ones it visits.
        """
        sigma = timesteps.to(latents) / self.pipe.scheduler.config.num_train_timesteps
        sigma = rearrange(sigma, "t -> t 1 1 1")
        return (1 - sigma) * latents + sigma * noise

    def moment(self, timestep: int, latents: Tensor) -> Tensor:
        return super().moment(timestep, latents) * self.denoiser.config.timestep_scale

    def condition(self, captions: Sequence[str], size: tuple[int, int]) -> dict[str, Any]:
        """Captions stand behind the pipeline's instruction; the unconditional half does without."""
        instruction = _default(self.pipe, "complex_human_instruction")
        found = [self._prompt(one, instruction if one.strip() else None) for one in captions]
        texts, masks = (torch.cat(one) for one in zip(*found, strict=True))
        return {"encoder_hidden_states": texts.to(self.denoiser.dtype), "encoder_attention_mask": masks}

    def arguments(
        self, negative_prompt: str | list[str], after_step: Callable[[int], None]
    ) -> dict[str, Any]:
        given = super().arguments(negative_prompt, after_step)
        return {**given, "negative_prompt": negative_prompt, "use_resolution_binning": False}


class HunyuanDiT(_Transformer):
    """HunyuanDiT: normalised and rotated queries; the tokens of BERT, then those of T5, in one softmax.

    The two encoders are of different widths, so an embedding is what the cross-attentions get: T5's half has
    passed the model's own projection. Padding is replaced by learned vectors, which the model attends to.
    """

    name = "HunyuanDiT"
    steps, guidance = 50, 5.0
    pipelines = ("HunyuanDiTPipeline",)
    photographs = True
    pixels = 16
    timestep_position = 1

    def queries(self, attention: nn.Module, projected: Tensor, call: Call) -> Tensor:
        return rotated(_normed(_by_head(projected, attention), attention.norm_q), call.rotary)

    def self_keys(self, attention: nn.Module, projected: Tensor, call: Call) -> Tensor:
        return rotated(_normed(_by_head(projected, attention), attention.norm_k), call.rotary)

    def keys(self, attention: nn.Module) -> nn.Module:
        return _NormedKeys(attention)

    @property
    def encoders(self) -> list[tuple[Any, nn.Module]]:
        return [*super().encoders, (self.pipe.tokenizer_2, self.pipe.text_encoder_2)]

    def tokenize(self, text: str) -> Tokens:
        text = _written(text)
        config = self.denoiser.config
        read = [_read(tokenizer, text) for tokenizer, _ in self.encoders]
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
        original, crop = (_default(self.pipe, x) for x in ("original_size", "crops_coords_top_left"))
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

    def arguments(
        self, negative_prompt: str | list[str], after_step: Callable[[int], None]
    ) -> dict[str, Any]:
        return {**super().arguments(negative_prompt, after_step), "use_resolution_binning": False}


class _JointTransformer(_Transformer):
    """Blocks in which image and text attend to both (MMDiT, arXiv 2403.03206), each with a stream of its own.

    The keys of words are made by carrying them along the text stream (joint.py). A map's softmax is over the words
    alone, as in the other families: what a pixel gives to the image in the model's own softmax is left out. Likewise
    the self-attention map (Eq. 8) is of a softmax over the image's keys alone.
    """

    about = (
        "Joint attention: a word is carried along the text stream, where it reads the image and does not touch it; its "
        "map is the image's attention to it against the other tokens of its attribution prompt."
    )

    @property
    def embed_dim(self) -> int:
        return self.denoiser.config.joint_attention_dim

    def attentions(self) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
        joint = {name: block.attn for name, block in self._blocks().items()}
        return joint, joint

    def _blocks(self) -> dict[str, nn.Module]:
        """By the name of the attention in each."""
        return {f"transformer_blocks.{i}.attn": x for i, x in enumerate(self.denoiser.transformer_blocks)}

    def queries(self, attention: nn.Module, projected: Tensor, call: Call) -> Tensor:
        return rotated(_normed(_by_head(projected, attention), attention.norm_q), call.rotary)

    def self_keys(self, attention: nn.Module, projected: Tensor, call: Call) -> Tensor:
        return rotated(_normed(_by_head(projected, attention), attention.norm_k), call.rotary)

    def scale(self, attention: nn.Module) -> float:
        return (attention.to_q.out_features // attention.heads) ** -0.5

    def keys(self, attention: nn.Module) -> None:
        return None

    def beside_queries(self, names: Collection[str]) -> dict[str, tuple[nn.Module, Form]]:
        """The image's keys and values in all blocks before the last of `names`: words come to it through them."""
        blocks = self._blocks()
        last = max((i for i, name in enumerate(blocks) if name in names), default=0)
        kept: dict[str, tuple[nn.Module, Form]] = {"modulation": (self._modulation, lambda output, call: output)}
        for name, block in list(blocks.items())[:last]:
            kept[f"{name}.keys"] = (block.attn.to_k, functools.partial(self.self_keys, block.attn))
            kept[f"{name}.values"] = (block.attn.to_v, functools.partial(_values, block.attn))
        return kept

    @property
    def _modulation(self) -> nn.Module:
        """Its output tells the text's half of each block what the timestep is."""
        return self.denoiser.time_text_embed

    def stream(self, kept: dict[str, Tensor]) -> TextStream:
        blocks = self._blocks()
        before = sum(f"{name}.keys" in kept for name in blocks)  # the last one's are not needed
        used = dict(list(blocks.items())[: before + 1])
        return text_stream(self.denoiser.context_embedder, used, kept, self._text_rotary)

    _text_rotary: Callable[[Tensor], Turn] | None = None  # of the places `[L]` of text tokens; None: they are not turned

    def _encode_t5(self, tokenizer: Any, encoder: nn.Module, ids: tuple[int, ...]) -> Tensor:
        """T5's last hidden state of the tokens `[L, E]`, which here see the padding behind them as in generation."""
        padding = (tokenizer.pad_token_id,) * (_default(self.pipe, "max_sequence_length") - len(ids))
        return encoder(self._batch(ids + padding))[0][0, : len(ids)]


class StableDiffusion3(_JointTransformer):
    """Stable Diffusion 3 and 3.5: the tokens of both CLIP encoders, beside each other, then those of T5.

    CLIP's rows are filled up with zeros to T5's width. The pipeline can do without T5: then its rows are missing
    in attribution prompts, and zeros in generation.
    """

    name = "Stable Diffusion 3"
    steps, guidance = 28, 7.0
    pipelines = ("StableDiffusion3Pipeline",)
    timestep_position = 3

    def listen(self) -> Listener:
        return SkipListener(self.pipe)

    @property
    def encoders(self) -> list[tuple[Any, nn.Module]]:
        pipe = self.pipe
        clip = [(pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)]
        return clip if pipe.text_encoder_3 is None else [*clip, (pipe.tokenizer_3, pipe.text_encoder_3)]

    def tokenize(self, text: str) -> Tokens:
        text = _written(text)
        read = [_read(tokenizer, text) for tokenizer, _ in self.encoders]
        limits = (*[self.pipe.tokenizer_max_length] * 2, _default(self.pipe, "max_sequence_length"))
        for one, limit in zip(read, limits, strict=False):
            check_length(len(one.spans), limit)
        check_same_cut(read[:2])
        return Tokens(
            text,
            tuple(x.ids[0] for x in read),
            tuple(span for x in read[1:] for span in x.spans),
            tuple(name for x in read[1:] for name in x.names),
        )

    def encode(self, tokens: Tokens) -> Tensor:
        pairs = list(zip(tokens.ids, self.encoders, strict=True))
        clip = [
            encoder(self._batch(ids), output_hidden_states=True).hidden_states[-2][0]
            for ids, (_, encoder) in pairs[:2]
        ]
        beside = torch.cat(clip, dim=-1)
        rows = [F.pad(beside, (0, self.embed_dim - beside.shape[-1]))]
        rows += [self._encode_t5(*pair, ids).to(beside) for ids, pair in pairs[2:]]
        return torch.cat(rows)

    def encode_padded(self, text: str) -> Tensor:
        device = self.pipe._execution_device
        return self.pipe.encode_prompt(text, None, None, device, do_classifier_free_guidance=False)[0][0]


class Flux(_JointTransformer):
    """Flux: T5's last hidden state; latents in patches of 2 x 2; rotated queries and keys.

    The blocks with two streams alone (`transformer_blocks`), as in ConceptAttention: in the later single blocks, which
    are not recorded, text and image share one stream. All text tokens have the same position, so theirs are not rotated.
    Guidance is an input of the model and no second half of the batch: there is no unconditional branch, and a negative
    prompt is refused. Where `true_cfg_scale` makes a second pass each step, that one is left out.
    """

    name = "Flux"
    steps, guidance = 28, 3.5
    pipelines = ("FluxPipeline",)
    pixels = 16

    @property
    def sample_size(self) -> int:
        return self.pipe.default_sample_size

    @property
    def strides(self) -> tuple[int, ...]:
        return (2 * self.pipe.vae_scale_factor,)

    def listen(self) -> Listener:
        return PassListener(self.pipe)

    def call(self, args: tuple, kwargs: dict) -> Call:
        sample = args[0] if args else kwargs["hidden_states"]
        ids = kwargs["img_ids"]
        ids = ids[0] if ids.ndim == 3 else ids
        height, width = (int(x) + 1 for x in ids[:, 1:3].amax(dim=0))
        # The pipeline scales the scheduler's timestep by 0.001; rounding takes out what that cost.
        timestep = (kwargs["timestep"].float() * 1000).round(decimals=2)
        return Call(sample.shape[0], 2 * height, 2 * width, timestep, self.denoiser.pos_embed(ids))

    def grid(self, n: int, call: Call) -> tuple[int, int]:
        height, width = call.height // 2, call.width // 2
        if height * width != n:
            raise ValueError(f"An attention of {n} pixels does not fit a grid of {height} x {width} patches.")
        return height, width

    @property
    def encoders(self) -> list[tuple[Any, nn.Module]]:
        """T5, then CLIP, of which the model sees no single token."""
        return [(self.pipe.tokenizer_2, self.pipe.text_encoder_2), *super().encoders]

    @property
    def max_tokens(self) -> int:
        return _default(self.pipe, "max_sequence_length")

    def tokenize(self, text: str) -> Tokens:
        read = _read(self.pipe.tokenizer_2, _written(self.spelled(text)))
        check_length(len(read.spans), self.max_tokens)
        return read

    def encode(self, tokens: Tokens) -> Tensor:
        return self._encode_t5(*self.encoders[0], tokens.ids[0])

    def encode_padded(self, text: str) -> Tensor:
        device = self.pipe._execution_device
        return self.pipe.encode_prompt(text, device=device, max_sequence_length=self.max_tokens)[0][0]

    def arguments(
        self, negative_prompt: str | list[str], after_step: Callable[[int], None]
    ) -> dict[str, Any]:
        """Raises ValueError for a negative prompt, which the model would not see."""
        asked = [negative_prompt] if isinstance(negative_prompt, str) else negative_prompt
        if any(one.strip() for one in asked or ()):
            raise ValueError(
                f"{self.name} takes no negative prompt, as its guidance is part of the model: leave it empty."
            )
        given = super().arguments("", after_step)
        return {"callback_on_step_end": given["callback_on_step_end"]}


class Flux2(Flux):
    """Flux 2: three hidden states of Mistral beside each other; text tokens are turned by their place in the prompt.

    Mistral reads the prompt behind the pipeline's system message, for words as for images, as it is causal. Of what
    stands around the prompt, attribution prompts keep the start token and the end of the instruction.
    """

    name = "Flux 2"
    steps, guidance = 28, 4.0
    pipelines = ("Flux2Pipeline",)

    @property
    def _modulation(self) -> nn.Module:
        return self.denoiser.double_stream_modulation_txt

    def _text_rotary(self, places: Tensor) -> Turn:
        return self.denoiser.pos_embed(F.pad(places[:, None], (3, 0)))

    @property
    def encoders(self) -> list[tuple[Any, nn.Module]]:
        return [(self.pipe.tokenizer, self.pipe.text_encoder)]

    def tokenize(self, text: str) -> Tokens:
        from diffusers.pipelines.flux2.pipeline_flux2 import format_input

        text = _written(text.replace("[IMG]", "")).strip()
        messages = format_input([text], self.pipe.system_message)
        (around,) = self.pipe.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
        begin = around.rindex(text)
        tokenizer = getattr(self.pipe.tokenizer, "tokenizer", self.pipe.tokenizer)  # a processor's own
        whole = _read(tokenizer, around, add_special_tokens=False)
        check_length(len(whole.spans), self.max_tokens)
        first = next(i for i, (_, end) in enumerate(whole.spans) if end > begin)
        spans = [(start - begin, end - begin) for start, end in whole.spans[first:]]
        return Tokens(text, whole.ids, ((0, 0), *spans), (SOT, *whole.names[first:-1], EOT))

    def encode(self, tokens: Tokens) -> Tensor:
        batch = self._batch(tokens.ids[0])
        hidden = self.pipe.text_encoder(
            batch, attention_mask=torch.ones_like(batch), output_hidden_states=True, use_cache=False
        ).hidden_states
        layers = _default(self.pipe, "text_encoder_out_layers")
        rows = torch.cat([hidden[layer][0] for layer in layers], dim=-1)
        return torch.cat([rows[:1], rows[len(rows) - len(tokens.spans) + 1 :]])


FAMILIES = (Family, StableDiffusionXL, PixArt, Sana, HunyuanDiT, StableDiffusion3, Flux, Flux2)


def family_of(pipe: Any) -> Family:
    """The adapter of a pipeline. Raises ValueError, with the supported families, where there is none."""
    for family in FAMILIES:
        if family.fits(pipe):
            return family(pipe)
    *names, last = (family.name for family in FAMILIES)
    raise ValueError(
        f"{type(pipe).__name__} is not a text-to-image pipeline of a family that can be recorded: "
        f"load {', '.join(names)} or {last}."
    )


# ------------------------------------------------------------------------------------ listening to a pipeline


class Listener:
    """What the recorder hears of a run beside the denoiser's own calls."""

    def __init__(self, pipe: Any):
        self._pipe = pipe
        self._hooks: list[_MethodHook] = []

    @property
    def guided(self) -> bool:
        """Whether the batch is [negative, positive]."""
        return self._pipe.do_classifier_free_guidance

    def counts(self, given: dict[str, Any]) -> bool:
        """Whether a call of the denoiser with these arguments is a step of the run, and no pass beside it."""
        return True

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


class BinListener(Listener):
    """Refuses a size that the pipeline would replace by a near one and crop: maps would not fit the image."""

    def __init__(self, pipe: Any):
        super().__init__(pipe)
        self._hooks.append(_MethodHook(pipe.image_processor, "classify_height_width_bin", self._on_bin))

    def _on_bin(self, method: Callable, given: dict) -> None:
        asked = (given["height"], given["width"])
        drawn = method(**given)
        if tuple(drawn) != asked:
            raise ValueError(
                f"The pipeline would draw {drawn[1]}x{drawn[0]} and crop it to {asked[1]}x{asked[0]}, and the "
                "maps would not fit the image: add use_resolution_binning=False."
            )


class EncodeListener(BinListener):
    """For pipelines that do not keep whether they guide: they say it where they encode the prompt."""

    def __init__(self, pipe: Any):
        super().__init__(pipe)
        self._guided: bool | None = None
        self._hooks.append(_MethodHook(pipe, "encode_prompt", self._on_encode))

    def _on_encode(self, method: Callable, given: dict) -> None:
        self._guided = bool(given["do_classifier_free_guidance"])

    @property
    def guided(self) -> bool:
        if self._guided is None:
            raise ValueError(
                "Nothing says whether this run is guided: call the pipeline, or record with branch='all'."
            )
        return self._guided


class SkipListener(Listener):
    """Stable Diffusion 3.5's skip-layer guidance makes a pass beside the guided batch."""

    def counts(self, given: dict[str, Any]) -> bool:
        return given.get("skip_layers") is None


class PassListener(Listener):
    """For models that have guidance as an input; a true negative prompt has passes of its own, which do not count."""

    guided = False

    def __init__(self, pipe: Any):
        super().__init__(pipe)
        self._pass = ""
        self._hooks.append(_MethodHook(pipe.transformer, "cache_context", self._on_pass))

    def _on_pass(self, method: Callable, given: dict) -> None:
        self._pass = given["name"]

    def counts(self, given: dict[str, Any]) -> bool:
        return self._pass != "uncond"


class _MethodHook:
    """Calls `before(method, arguments by name)` ahead of an object's method, until `remove`."""

    def __init__(self, owner: Any, name: str, before: Callable[[Callable, dict], None]):
        method = getattr(owner, name)
        signature = inspect.signature(method)

        @functools.wraps(method)
        def hooked(*args, **kwargs):
            given = signature.bind(*args, **kwargs)
            given.apply_defaults()
            before(method, given.arguments)
            return method(*args, **kwargs)

        self._owner, self._name = owner, name
        self._before = vars(owner).get(name)
        setattr(owner, name, hooked)

    def remove(self) -> None:
        if self._before is None:
            delattr(self._owner, self._name)
        else:
            setattr(self._owner, self._name, self._before)


def _default(pipe: Any, argument: str) -> Any:
    """The default of an argument of `pipe(...)`."""
    return inspect.signature(type(pipe).__call__).parameters[argument].default


# -------------------------------------------------------------------------------------------------- attention


def _is_guided_unet(pipe: Any) -> bool:
    config = getattr(getattr(pipe, "unet", None), "config", None)
    return (
        getattr(config, "cross_attention_dim", None) is not None
        and getattr(config, "encoder_hid_dim", None) is None  # Kolors and Kandinsky project the text first
        and hasattr(type(pipe), "do_classifier_free_guidance")
    )


def _attentions(denoiser: nn.Module) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    found = {
        name: module
        for name, module in denoiser.named_modules()
        if all(hasattr(module, x) for x in ("to_q", "to_k", "heads", "is_cross_attention"))
    }
    cross = {name: x for name, x in found.items() if x.is_cross_attention}
    if not cross:
        raise ValueError(
            f"This {type(denoiser).__name__} has no cross-attention: there is no word to ask for."
        )
    return cross, {name: x for name, x in found.items() if not x.is_cross_attention}


def _by_head(projected: Tensor, attention: nn.Module) -> Tensor:
    return rearrange(projected, "b n (h d) -> b h n d", h=attention.heads)


def _values(attention: nn.Module, projected: Tensor, call: Call) -> Tensor:
    """`to_v`'s output by head, `[b, heads, n, d]`."""
    return _by_head(projected, attention)


def _normed(x: Tensor, norm: nn.Module | None) -> Tensor:
    return x if norm is None else norm(x)


class _NormedKeys(nn.Module):
    """`to_k`, then `norm_k` on each head: `[L, E]` to `[L, heads * d]`."""

    def __init__(self, attention: nn.Module):
        super().__init__()
        self.to_k, self.norm_k, self.heads = attention.to_k, attention.norm_k, attention.heads

    def forward(self, embedding: Tensor) -> Tensor:
        keys = rearrange(self.to_k(embedding), "l (h d) -> h l d", h=self.heads)
        return rearrange(_normed(keys, self.norm_k), "h l d -> l (h d)")


def grid_size(n: int, latent_height: int, latent_width: int) -> tuple[int, int]:
    """(height, width) of the attention grid of `n` pixels, by halving the latents as a UNet does.

    A UNet rounds odd sides up (padded convolutions) or down (asymmetric padding). Raises ValueError for no
    fit.
    """
    for round_up in (1, 0):
        height, width = latent_height, latent_width
        while height * width > n and height * width > 1:
            height, width = (height + round_up) // 2, (width + round_up) // 2
        if height * width == n:
            return height, width
    raise ValueError(f"An attention of {n} pixels does not fit latents of {latent_height} x {latent_width}.")


def column_sums(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Attention received by each pixel, summed over heads and attending pixels (Eq. 8): float32 `[n]`.

    query, key: `[heads, n, d]`. The `[n, n]` attention is made in blocks of rows: the peak is about two blocks
    of COLUMN_BLOCK_BYTES (at least one row of all heads) in float32, 4 MiB on a CPU; all heads of a 64 x 64
    grid at once would be 512 MiB.
    """
    heads, n, _ = query.shape
    block_bytes = COLUMN_BLOCK_BYTES["cpu" if query.device.type == "cpu" else "other"]
    rows = max(1, min(n, block_bytes // (4 * heads * n)))
    total = torch.zeros(n, dtype=torch.float32, device=query.device)
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        key = rearrange(key.float() * scale, "h n d -> h d n").contiguous()
        for block in query.split(rows, dim=1):
            total += torch.softmax(block.float() @ key, dim=-1).sum(dim=(0, 1))
    return total


def linear_column_sums(query: Tensor, key: Tensor) -> Tensor:
    """The same for linear attention (Sana, arXiv 2410.10629): weights relu(q) . relu(k) / its sum over keys.

    query, key: `[heads, n, d]`. Returns float32 `[n]`; linear in n, no `[n, n]` attention is made.
    """
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        query, key = query.relu().float(), key.relu().float()
        norms = torch.einsum("h n d, h d -> h n", query, key.sum(dim=1))
        asked = (query / (norms[..., None] + 1e-15)).sum(dim=1)
        return torch.einsum("h n d, h d -> n", key, asked)


# ------------------------------------------------------------------------------------------------------- text


def check_length(tokens: int, limit: int) -> None:
    """Raises ValueError for a text of more tokens than the text encoder takes."""
    if tokens > limit:
        raise ValueError(
            f"The text has {tokens} tokens and the text encoder takes {limit}, its start and end included: "
            "shorten it."
        )


def check_same_cut(read: Sequence[Tokens]) -> None:
    """Raises ValueError where tokenizers, whose tokens stand beside each other, differ in their number."""
    if len({len(x.ids[0]) for x in read}) > 1:
        raise ValueError("The tokenizers of this model cut the text in different places: write it another way.")


def _written(text: str) -> str:
    if not text.strip():
        raise ValueError("The text is empty: write at least one word.")
    return text


def _read(tokenizer: Any, text: str, **options: Any) -> Tokens:
    """One tokenizer's tokens: not padded, not truncated."""
    encoded = tokenizer(text, return_offsets_mapping=True, **options)
    ids, pieces = tuple(encoded.input_ids), tokenizer.convert_ids_to_tokens(encoded.input_ids)
    # A lone mark of a space is given the letter behind it, which is not its own.
    offsets = zip(pieces, encoded.offset_mapping, strict=True)
    spans = tuple((start, start if piece == "▁" else end) for piece, (start, end) in offsets)
    names = [text[start:end].strip() or piece for piece, (start, end) in zip(pieces, spans, strict=True)]
    # Only at the ends: CLIP's unknown token is its end token too.
    if ids[0] in {tokenizer.bos_token_id, tokenizer.cls_token_id} - {None}:
        names[0] = SOT
    if ids[-1] in {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None}:
        names[-1] = EOT
    return Tokens(text, (ids,), spans, tuple(names))
