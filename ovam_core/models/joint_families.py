"""The families with joint attention, whose words are carried along the text stream (joint.py)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovam_core.attention.text_stream import TextStream, Turn, rotated, text_stream
from ovam_core.errors import InputError
from ovam_core.models.family import (
    EOT,
    SOT,
    Call,
    FlowTransformer,
    Form,
    Listener,
    PassListener,
    SkipListener,
    Tokens,
    by_head,
    check_length,
    check_same_cut,
    default_of,
    normed,
    read_tokens,
    written,
)


class _JointTransformer(FlowTransformer):
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
        return rotated(normed(by_head(projected, attention), attention.norm_q), call.rotary)

    def self_keys(self, attention: nn.Module, projected: Tensor, call: Call) -> Tensor:
        return rotated(normed(by_head(projected, attention), attention.norm_k), call.rotary)

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

    _text_rotary: Callable[[Tensor], Turn] | None = (
        None  # of the places `[L]` of text tokens; None: they are not turned
    )

    def moment(self, timestep: int, latents: Tensor) -> Tensor:
        return super().moment(timestep, latents).float()  # as flow-matching schedulers count

    def _encode_t5(self, tokenizer: Any, encoder: nn.Module, ids: tuple[int, ...]) -> Tensor:
        """T5's last hidden state of the tokens `[L, E]`, which here see the padding behind them as in generation."""
        padding = (tokenizer.pad_token_id,) * (default_of(self.pipe, "max_sequence_length") - len(ids))
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
        text = written(text)
        read = [read_tokens(tokenizer, text) for tokenizer, _ in self.encoders]
        limits = (*[self.pipe.tokenizer_max_length] * 2, default_of(self.pipe, "max_sequence_length"))
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
            encoder(self._batch(ids), output_hidden_states=True).hidden_states[-2][0] for ids, (_, encoder) in pairs[:2]
        ]
        beside = torch.cat(clip, dim=-1)
        rows = [F.pad(beside, (0, self.embed_dim - beside.shape[-1]))]
        rows += [self._encode_t5(*pair, ids).to(beside) for ids, pair in pairs[2:]]
        return torch.cat(rows)

    def encode_padded(self, text: str) -> Tensor:
        return self._prompt(text)[0][0]

    def _prompt(self, text: str) -> tuple[Tensor, Tensor]:
        """Embeddings `[1, L, E]` with padding, and CLIP's pooled ones `[1, P]`."""
        device = self.pipe._execution_device
        return self.pipe.encode_prompt(text, None, None, device, do_classifier_free_guidance=False)[::2]

    def condition(self, captions: Sequence[str], size: tuple[int, int]) -> dict[str, Any]:
        found = [self._prompt(one) for one in captions]
        texts, pooled = (torch.cat(one) for one in zip(*found, strict=True))
        return {"encoder_hidden_states": texts, "pooled_projections": pooled}


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
            raise InputError(f"An attention of {n} pixels does not fit a grid of {height} x {width} patches.")
        return height, width

    @property
    def encoders(self) -> list[tuple[Any, nn.Module]]:
        """T5, then CLIP, of which the model sees no single token."""
        return [(self.pipe.tokenizer_2, self.pipe.text_encoder_2), *super().encoders]

    @property
    def max_tokens(self) -> int:
        return default_of(self.pipe, "max_sequence_length")

    def tokenize(self, text: str) -> Tokens:
        read = read_tokens(self.pipe.tokenizer_2, written(self.spelled(text)))
        check_length(len(read.spans), self.max_tokens)
        return read

    def encode(self, tokens: Tokens) -> Tensor:
        return self._encode_t5(*self.encoders[0], tokens.ids[0])

    def encode_padded(self, text: str) -> Tensor:
        return self._prompt(text)[0][0]

    def _prompt(self, text: str) -> tuple[Tensor, ...]:
        """What the pipeline makes of a prompt, its embeddings `[1, L, E]` with padding first."""
        device = self.pipe._execution_device
        return self.pipe.encode_prompt(text, device=device, max_sequence_length=self.max_tokens)

    pack = 4

    def packed(self, latents: Tensor) -> Tensor:
        """`[B, n, 4 C]`, a row a patch."""
        return self.pipe._pack_latents(latents, *latents.shape)

    def moment(self, timestep: int, latents: Tensor) -> Tensor:
        return super().moment(timestep, latents).to(latents.dtype) / 1000

    def condition(self, captions: Sequence[str], size: tuple[int, int]) -> dict[str, Any]:
        """An empty caption is the empty prompt; where the model is told a guidance, it is the family's usual one."""
        texts, (stride,) = self._captions(captions), self.strides
        places = self._image_places(texts["encoder_hidden_states"], size[0] // stride, size[1] // stride)
        given = {**texts, "img_ids": places}
        if self.denoiser.config.guidance_embeds:
            given["guidance"] = torch.full((len(captions),), self.guidance, device=places.device)
        return given

    def _captions(self, captions: Sequence[str]) -> dict[str, Tensor]:
        found = [self._prompt(one) for one in captions]
        texts, pooled = (torch.cat([one[i] for one in found]) for i in range(2))
        return {"encoder_hidden_states": texts, "pooled_projections": pooled, "txt_ids": found[0][2]}

    def _image_places(self, texts: Tensor, height: int, width: int) -> Tensor:
        """The patches' places by which they are turned, `[n, 3]`; texts: `[B, L, E]`."""
        return self.pipe._prepare_latent_image_ids(len(texts), height, width, texts.device, texts.dtype)

    def arguments(self, negative_prompt: str | list[str], after_step: Callable[[int], None]) -> dict[str, Any]:
        """Raises InputError for a negative prompt, which the model would not see."""
        asked = [negative_prompt] if isinstance(negative_prompt, str) else negative_prompt
        if any(one.strip() for one in asked or ()):
            raise InputError(
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

        text = written(text.replace("[IMG]", "")).strip()
        messages = format_input([text], self.pipe.system_message)
        (around,) = self.pipe.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
        begin = around.rindex(text)
        tokenizer = getattr(self.pipe.tokenizer, "tokenizer", self.pipe.tokenizer)  # a processor's own
        whole = read_tokens(tokenizer, around, add_special_tokens=False)
        check_length(len(whole.spans), self.max_tokens)
        first = next(i for i, (_, end) in enumerate(whole.spans) if end > begin)
        spans = [(start - begin, end - begin) for start, end in whole.spans[first:]]
        return Tokens(text, whole.ids, ((0, 0), *spans), (SOT, *whole.names[first:-1], EOT))

    def encode(self, tokens: Tokens) -> Tensor:
        batch = self._batch(tokens.ids[0])
        hidden = self.pipe.text_encoder(
            batch, attention_mask=torch.ones_like(batch), output_hidden_states=True, use_cache=False
        ).hidden_states
        layers = default_of(self.pipe, "text_encoder_out_layers")
        rows = torch.cat([hidden[layer][0] for layer in layers], dim=-1)
        return torch.cat([rows[:1], rows[len(rows) - len(tokens.spans) + 1 :]])

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Patches of 2 x 2 latents, normalised by the autoencoder's own statistics: float32 `[B, 4 C, h / 2, w / 2]`."""
        return self.pipe._encode_vae_image(pixels, None).float()

    def packed(self, latents: Tensor) -> Tensor:
        return self.pipe._pack_latents(latents)

    def _captions(self, captions: Sequence[str]) -> dict[str, Tensor]:
        found = [self._prompt(one) for one in captions]
        texts, places = (torch.cat(one) for one in zip(*found, strict=True))
        return {"encoder_hidden_states": texts, "txt_ids": places}

    def _image_places(self, texts: Tensor, height: int, width: int) -> Tensor:
        """`[B, n, 4]`."""
        return self.pipe._prepare_latent_ids(texts.new_empty(len(texts), 1, height, width)).to(texts.device)


def _values(attention: nn.Module, projected: Tensor, call: Call) -> Tensor:
    """`to_v`'s output by head, `[b, heads, n, d]`."""
    return by_head(projected, attention)
