"""Flux and Flux 2: joint attention, guidance as an input of the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovam_core.attention.heads import Turn
from ovam_core.attention.text_stream import JointBlock, SingleBlock
from ovam_core.errors import InputError
from ovam_core.models.adapter import Call, TextEncoder, default_of
from ovam_core.models.joint import JointTransformerAdapter
from ovam_core.models.listeners import Listener, PassListener
from ovam_core.models.reading import EOT, SOT, Tokenizer, Tokens, check_length, check_written, read_each, read_tokens


class Flux(JointTransformerAdapter):
    """Flux: T5's last hidden state; latents in patches of 2 x 2; rotated queries and keys.

    The blocks with two streams alone (`transformer_blocks`), as in ConceptAttention, unless the later single-stream
    blocks are named: there text and image, one behind the other, go through the same modules, and words are carried
    along in the same way. All text tokens have the same position, so they are not rotated.
    Guidance is an input of the model and no second half of the batch: there is no unconditional branch, and a negative
    prompt is refused. Where `true_cfg_scale` makes a second pass each step, that one is left out.
    """

    name = "Flux"
    steps, guidance = 28, 3.5
    pipelines = ("FluxPipeline",)
    starts: ClassVar[Mapping[str, str]] = {"FluxPipeline": "FluxImg2ImgPipeline"}
    pixels = 16
    pack = 4
    output_blocks: ClassVar[tuple[int, ...]] = (15, 16, 17, 18)  # ConceptAttention's

    @property
    def sample_size(self) -> int:
        return self.pipe.default_sample_size

    @property
    def patch(self) -> int:
        return 2  # the pipeline packs latents before the denoiser gets them

    def _stream_blocks(self) -> Mapping[str, JointBlock | SingleBlock]:
        singles = enumerate(self.denoiser.single_transformer_blocks)
        return {**self._blocks(), **{f"single_transformer_blocks.{i}.attn": x for i, x in singles}}

    def image_part(self, projected: Tensor, call: Call) -> Tensor:
        """In a single-stream block the text stands before the image."""
        return projected[:, -(call.height // self.patch) * (call.width // self.patch) :]

    def listen(self) -> Listener:
        return PassListener(self.pipe)

    def call(self, args: tuple, kwargs: dict[str, Any]) -> Call:
        sample = args[0] if args else kwargs["hidden_states"]
        ids = kwargs["img_ids"]
        ids = ids[0] if ids.ndim == 3 else ids
        if len(ids[:, 0].unique()) > 1:
            raise InputError(f"{self.name} sees an image beside the one it makes: record it without reference images.")
        height, width = (int(x) + 1 for x in ids[:, 1:3].amax(dim=0))
        # The pipeline scales the scheduler's timestep by 0.001; rounding takes out what that cost.
        timestep = (kwargs["timestep"].float() * 1000).round(decimals=2)
        return Call(len(sample), self.patch * height, self.patch * width, timestep, self.denoiser.pos_embed(ids))

    @property
    def encoders(self) -> list[tuple[Tokenizer, TextEncoder]]:
        """T5, then CLIP, of which the model sees no single token."""
        return [(self.pipe.tokenizer_2, self.pipe.text_encoder_2), *super().encoders]

    @property
    def word_encoders(self) -> list[tuple[Tokenizer, TextEncoder]]:
        return self.encoders[:1]

    @property
    def max_tokens(self) -> int:
        return default_of(self.pipe, "max_sequence_length")

    def _tokenize(self, texts: Sequence[str]) -> list[Tokens]:
        each = read_each(self.pipe.tokenizer_2, [check_written(self.spelled(text)) for text in texts])
        check_length(max(len(read.spans) for read in each), self.max_tokens)
        return each

    def encode_batch(self, tokens: Sequence[Tokens]) -> Tensor:
        return self._encode_t5(*self.encoders[0], [x.ids[0] for x in tokens])

    def encode_padded(self, text: str) -> Tensor:
        return self._prompt(text)[0][0]

    def _prompt(self, text: str) -> tuple[Tensor, ...]:
        """What the pipeline makes of a prompt, its embeddings `[1, L, E]` with padding first."""
        device = self.pipe._execution_device
        return self.pipe.encode_prompt(text, device=device, max_sequence_length=self.max_tokens)

    def packed(self, latents: Tensor) -> Tensor:
        """`[B, n, 4 C]`, a row a patch."""
        return self.pipe._pack_latents(latents, *latents.shape)

    def moment(self, timestep: int, latents: Tensor) -> Tensor:
        return super().moment(timestep, latents).to(latents.dtype) / 1000

    def condition(self, captions: Sequence[str], size: tuple[int, int]) -> dict[str, Any]:
        """An empty caption is the empty prompt; where the model is told a guidance, it is the family's usual one."""
        texts, (stride,) = self._captions(captions), self.strides
        places = self._image_places(texts["encoder_hidden_states"], size[0] // stride, size[1] // stride)
        condition: dict[str, Any] = {**texts, "img_ids": places}
        if self.denoiser.config.guidance_embeds:
            condition["guidance"] = torch.full((len(captions),), self.guidance, device=places.device)
        return {**condition, **self._no_images}

    @property
    def _no_images(self) -> dict[str, Any]:
        """What a loaded IP-Adapter gets beside the text: no image."""
        loaded = getattr(self.denoiser, "encoder_hid_proj", None) is not None
        return {"joint_attention_kwargs": {"ip_hidden_states": []}} if loaded else {}

    def _captions(self, captions: Sequence[str]) -> dict[str, Tensor]:
        prompts = [self._prompt(caption) for caption in captions]
        texts, pooled = (torch.cat([prompt[i] for prompt in prompts]) for i in range(2))
        return {"encoder_hidden_states": texts, "pooled_projections": pooled, "txt_ids": prompts[0][2]}

    def _image_places(self, texts: Tensor, height: int, width: int) -> Tensor:
        """The patches' places by which they are turned, `[n, 3]`; texts: `[B, L, E]`."""
        return self.pipe._prepare_latent_image_ids(len(texts), height, width, texts.device, texts.dtype)

    def guides(self, _guidance: float) -> bool:
        return False

    def arguments(self, negative_prompt: str | list[str], after_step: Callable[[int], None]) -> dict[str, Any]:
        """Raises InputError for a negative prompt, which the model would not see."""
        prompts = [negative_prompt] if isinstance(negative_prompt, str) else negative_prompt
        if any(prompt.strip() for prompt in prompts or ()):
            raise InputError(
                f"{self.name} takes no negative prompt, as its guidance is part of the model: leave it empty."
            )
        shared = super().arguments("", after_step)
        return {"callback_on_step_end": shared["callback_on_step_end"], **self._no_images}


class Flux2(Flux):
    """Flux 2: three hidden states of Mistral beside each other; text tokens are turned by their place in the prompt.

    Mistral reads the prompt behind the pipeline's system message, for words as for images, as it is causal. Of what
    stands around the prompt, attribution prompts keep the start token and the end of the instruction.
    """

    name = "Flux 2"
    steps, guidance = 28, 4.0
    pipelines = ("Flux2Pipeline",)
    output_blocks: ClassVar[tuple[int, ...]] = (5, 6, 7)  # these, and the temperature, as its authors' code has them
    temperature: ClassVar[float] = 1000.0
    starts: ClassVar[Mapping[str, str]] = {}  # a picture there is one to look at, not one to begin from

    def _stream_blocks(self) -> Mapping[str, JointBlock | SingleBlock]:
        """Its single-stream blocks have a modulation of their own and one projection for everything: not these."""
        return self._blocks()

    @property
    def _modulation(self) -> nn.Module:
        return self.denoiser.double_stream_modulation_txt

    @property
    def _text_rotary(self) -> Callable[[Tensor], Turn]:
        return lambda places: self.denoiser.pos_embed(F.pad(places[:, None], (3, 0)))

    @property
    def encoders(self) -> list[tuple[Tokenizer, TextEncoder]]:
        return [(self.pipe.tokenizer, self.pipe.text_encoder)]

    def _tokenize(self, texts: Sequence[str]) -> list[Tokens]:
        return [self._tokenize_one(text) for text in texts]

    def _tokenize_one(self, text: str) -> Tokens:
        from diffusers.pipelines.flux2.pipeline_flux2 import format_input

        text = check_written(text.replace("[IMG]", "")).strip()
        messages = format_input([text], self.pipe.system_message)
        (around,) = self.pipe.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
        begin = around.rindex(text)
        tokenizer = getattr(self.pipe.tokenizer, "tokenizer", self.pipe.tokenizer)  # a processor's own
        whole = read_tokens(tokenizer, around, add_special_tokens=False)
        check_length(len(whole.spans), self.max_tokens)
        first = next(i for i, (_, end) in enumerate(whole.spans) if end > begin)
        spans = [(start - begin, end - begin) for start, end in whole.spans[first:]]
        return Tokens(text, whole.ids, ((0, 0), *spans), (SOT, *whole.names[first:-1], EOT))

    def encode_batch(self, tokens: Sequence[Tokens]) -> Tensor:
        batch = self._batch([x.ids[0] for x in tokens])
        hidden = self.pipe.text_encoder(
            batch, attention_mask=torch.ones_like(batch), output_hidden_states=True, use_cache=False
        ).hidden_states
        layers = default_of(self.pipe, "text_encoder_out_layers")
        rows = torch.cat([hidden[layer] for layer in layers], dim=-1)
        return torch.cat([rows[:, :1], rows[:, rows.shape[1] - len(tokens[0].spans) + 1 :]], dim=1)

    def padded_rows(self, tokens: Tokens) -> list[int]:
        """Padding stands ahead, and between the start and the text the system message."""
        return [self.max_tokens - len(tokens.ids[0]), *range(self.max_tokens - len(tokens.spans) + 1, self.max_tokens)]

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Patches of 2 x 2 latents, normalised by the autoencoder's statistics: float32 `[B, 4 C, h / 2, w / 2]`."""
        return self.pipe._encode_vae_image(pixels, None).float()

    def packed(self, latents: Tensor) -> Tensor:
        return self.pipe._pack_latents(latents)

    def _captions(self, captions: Sequence[str]) -> dict[str, Tensor]:
        prompts = [self._prompt(caption) for caption in captions]
        texts, places = (torch.cat(tensors) for tensors in zip(*prompts, strict=True))
        return {"encoder_hidden_states": texts, "txt_ids": places}

    def _image_places(self, texts: Tensor, height: int, width: int) -> Tensor:
        """`[B, n, 4]`."""
        return self.pipe._prepare_latent_ids(texts.new_empty(len(texts), 1, height, width)).to(texts.device)
