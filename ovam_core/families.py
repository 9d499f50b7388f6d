"""The families of diffusers pipelines: a small adapter each, with all that recorder and text need to know.

`family_of(pipe)` gives the adapter. `Family` is Stable Diffusion 1 and 2; the others say where they differ.
A new family is a new class here and an entry in FAMILIES; nothing else changes.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

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

    def keys(self, attention: nn.Module) -> nn.Module:
        """Eq. 4 by the model's own modules: an embedding `[L, embed_dim]` to keys `[L, heads * d]`."""
        return attention.to_k

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
        if len({len(x.ids[0]) for x in read}) > 1:
            raise ValueError(
                "The tokenizers of this model cut the text in different places: write it another way."
            )
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


class _Transformer(Family):
    """A transformer over patches of the latents: one attention grid for all of its layers."""

    pipelines: tuple[str, ...] = ()
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


class PixArt(_Transformer):
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

        return _default(self.pipe, "clean_caption") and is_bs4_available() and is_ftfy_available()

    @property
    def max_tokens(self) -> int:
        return _default(self.pipe, "max_sequence_length")

    def encode(self, tokens: Tokens) -> Tensor:
        batch = self._batch(tokens.ids[0])
        return self.pipe.text_encoder(batch, attention_mask=torch.ones_like(batch))[0][0]

    def encode_padded(self, text: str) -> Tensor:
        embeddings, mask, *_ = self.pipe.encode_prompt(
            text,
            do_classifier_free_guidance=False,
            device=self.pipe._execution_device,
            clean_caption=self._cleans,
            max_sequence_length=self.max_tokens,
        )
        return embeddings[0][mask[0].bool()]

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
        embeddings, mask, *_ = self.pipe.encode_prompt(
            text,
            do_classifier_free_guidance=False,
            device=self.pipe._execution_device,
            max_sequence_length=self.max_tokens,
            complex_human_instruction=_default(self.pipe, "complex_human_instruction"),
        )
        return embeddings[0][mask[0].bool()]

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
    pixels = 16
    timestep_position = 1

    def queries(self, attention: nn.Module, projected: Tensor, call: Call) -> Tensor:
        return _rotated(_normed(_by_head(projected, attention), attention.norm_q), call)

    def self_keys(self, attention: nn.Module, projected: Tensor, call: Call) -> Tensor:
        return _rotated(_normed(_by_head(projected, attention), attention.norm_k), call)

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
        found, masks = [], []
        for index in range(2):
            embeddings, _, mask, _ = self.pipe.encode_prompt(
                text,
                device=self.pipe._execution_device,
                dtype=self.denoiser.dtype,
                do_classifier_free_guidance=False,
                text_encoder_index=index,
            )
            found.append(embeddings[0])
            masks.append(mask[0].bool())
        joined = self._joined(*found)
        padding = self.denoiser.text_embedding_padding.to(joined)
        return torch.where(torch.cat(masks)[:, None].to(joined.device), joined, padding)

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


FAMILIES = (Family, StableDiffusionXL, PixArt, Sana, HunyuanDiT)


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


def _normed(x: Tensor, norm: nn.Module | None) -> Tensor:
    return x if norm is None else norm(x)


def _rotated(x: Tensor, call: Call) -> Tensor:
    from diffusers.models.embeddings import apply_rotary_emb

    return x if call.rotary is None else apply_rotary_emb(x, call.rotary)


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


def _written(text: str) -> str:
    if not text.strip():
        raise ValueError("The text is empty: write at least one word.")
    return text


def _read(tokenizer: Any, text: str) -> Tokens:
    """One tokenizer's tokens: not padded, not truncated."""
    encoded = tokenizer(text, return_offsets_mapping=True)
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
