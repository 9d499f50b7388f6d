"""The adapter of a family of models: all that the recorder and text need to know of a diffusers pipeline.

`Adapter` is the contract, with what most families have in common; each family says in its own file what is its own.
Which pipeline has which adapter: registry.py.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeGuard

import torch
from torch import Tensor, nn

from ovam_core.attention.affinity import add_attention
from ovam_core.attention.heads import Attention, Turn, by_head
from ovam_core.attention.reading import Reading
from ovam_core.attention.rows import Rows
from ovam_core.attention.self_attention import column_sums
from ovam_core.attention.text_stream import TextStream
from ovam_core.errors import InputError
from ovam_core.models.listeners import Listener
from ovam_core.models.reading import (
    Tokenizer,
    Tokens,
    check_length,
    check_same_cut,
    check_unicode,
    check_written,
    device_of,
    has_vectors,
    read_each,
    reader_of,
    reading_of,
)

if TYPE_CHECKING:
    from diffusers.models.modeling_utils import ModelMixin as Denoiser
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline as Pipeline
    from transformers import PreTrainedModel as TextEncoder
else:
    Pipeline = Denoiser = TextEncoder = Any  # neither library is imported for a name


@dataclass(frozen=True, eq=False)
class Call:
    """What one call of the denoiser was given. batch: its size; height, width: of the latents.

    rotary: what turns queries and keys by their position, None where nothing does.
    """

    batch: int
    height: int
    width: int
    timestep: Tensor | float
    rotary: Turn | None = None


# A module's output for some images `[b, ...]` to what is kept of it, `[b, ...]`.
Form = Callable[[Tensor, Call], Tensor]
Take = Callable[[Tensor], Tensor]  # a projection out of the output of the module that makes it

# Texts that a text encoder reads in one call: some families read a long instruction with each.
ENCODED_TOGETHER = 8
# Tokens of a text of which so many cost little more than one: reading the weights takes the time.
SHORT = 5

# Weights that attention processors have beside the attention's own: Custom Diffusion's projections, which take the
# place of those, and an IP-Adapter's, which are of the image alone.
CUSTOM_DIFFUSION = tuple(f"to_{x}_custom_diffusion" for x in ("q", "k", "v", "out"))
IP_ADAPTER = ("to_k_ip", "to_v_ip", "norm_")


class Adapter(ABC):
    """A family of models. An embedding is `[L, embed_dim]`, a row a token.

    A family must say: `fits`, `denoiser`, `embed_dim`, `strides`, `side_multiple`, `attentions`, `call`, `grid`,
    `encode_batch`, `encode_padded` and `condition`. All else has the answer of most families.

    name: as messages call it. pipelines: diffusers' classes that draw from a text alone. about: what a word's map is,
    where it is not the cross-attention to the word in place of the prompt. steps, guidance: usual settings of models
    that are not known by name (presets.py). pack: latents that `packed` makes one of. remembers: whether text
    encoders and tokenizers are all that reads a word, none of them long at a word, so that what was read can be kept
    (remembered.py). starts: diffusers' class that starts from a picture, by that of `pipelines` which has the same
    modules (starting.py). photo_timestep: the usual noise on a photograph, of 1000: GoCA's published t. linear: whether
    self-attention is linear, without a softmax. s_cfg: whether S-CFG can guide it (hooks/guidance.py). temperature: by
    which the products of ConceptAttention are divided, where there are `output_names`.
    """

    name: ClassVar[str]
    pipelines: ClassVar[tuple[str, ...]]
    about: ClassVar[str] = ""
    steps: ClassVar[int]
    guidance: ClassVar[float]
    pack: ClassVar[int] = 1
    remembers: ClassVar[bool] = False
    starts: ClassVar[Mapping[str, str]] = {}
    photo_timestep: ClassVar[int] = 100
    linear: ClassVar[bool] = False
    s_cfg: ClassVar[bool] = False
    temperature: ClassVar[float] = 1.0

    def __init__(self, pipe: Pipeline):
        """pipe: one that `fits`."""
        self.pipe = pipe

    @classmethod
    def draws(cls, kind: type) -> bool:
        """Whether a class of pipelines is one of the family that draws from a text alone."""
        return any(x.__name__ in cls.pipelines for x in kind.__mro__)

    @classmethod
    @abstractmethod
    def fits(cls, pipe: Pipeline) -> bool:
        """Whether a pipeline is of this family."""

    # The denoiser and its attention.

    @property
    @abstractmethod
    def denoiser(self) -> Denoiser:
        """The module that the scheduler calls once a step."""

    @property
    def sample_size(self) -> int | tuple[int, int]:
        """Side, or (height, width), of the latents that the model was trained on."""
        return self.denoiser.config.sample_size

    @property
    @abstractmethod
    def embed_dim(self) -> int:
        """Width of a text embedding."""

    @property
    @abstractmethod
    def strides(self) -> tuple[int, ...]:
        """Pixels of the image to one pixel of each attention grid, finest first."""

    @property
    @abstractmethod
    def side_multiple(self) -> int:
        """Pixels of which the image's sides must be multiples."""

    @abstractmethod
    def attentions(self) -> tuple[dict[str, Attention], dict[str, Attention]]:
        """The denoiser's cross-attentions and self-attentions by name, in the order of its modules.

        Joint attentions are both. Raises InputError where there is none, or of a kind that cannot be recorded.
        """

    def listen(self) -> Listener:
        """Hears whether the run is guided; the recorder removes it after the run."""
        return Listener(self.pipe)

    @property
    def parts_known(self) -> bool:
        """Whether it is known what the rows of the pipeline's batch mean (`Listener.parts`)."""
        return True

    @abstractmethod
    def call(self, args: tuple, kwargs: dict[str, Any]) -> Call:
        """What the denoiser was given, from its arguments."""

    @abstractmethod
    def grid(self, n: int, call: Call) -> tuple[int, int]:
        """(height, width) of an attention of `n` pixels. Raises InputError for an `n` that does not fit the latents."""

    def image_part(self, projected: Tensor, _call: Call) -> Tensor:
        """The pixels' rows of what an attention projects, `[b, n, ...]`, where the text has rows among them."""
        return projected

    def queries(self, attention: Attention, projected: Tensor, _call: Call) -> Tensor:
        """`to_q`'s output `[b, n, heads * d]` to the queries of the product (Eq. 3), `[b, heads, n, d]`."""
        return by_head(projected, attention.heads)

    def self_keys(self, attention: Attention, projected: Tensor, _call: Call) -> Tensor:
        """The same for `to_k`'s output in a self-attention."""
        return by_head(projected, attention.heads)

    def received(self, query: Tensor, key: Tensor, scale: float) -> Tensor:
        """Self-attention received by each pixel (Eq. 8), `[heads, n, d]` to float32 `[n]`."""
        return column_sums(query, key, scale)

    def add_attention(self, total: Tensor, query: Tensor, key: Tensor, scale: float) -> None:
        """Adds the self-attention, the mean of the heads, to `total` float32 `[n, n]`; query, key: `[heads, n, d]`."""
        add_attention(total, query, key, scale)

    def scale(self, attention: Attention) -> float:
        """Factor of the products before the softmax, 1 / sqrt(d)."""
        return float(attention.scale)

    def keys(self, attention: Attention) -> nn.Module | None:
        """Eq. 4 by the model's own modules: an embedding `[L, embed_dim]` to keys `[L, heads * d]`.

        None where the keys are not of the embedding alone: there `stream` makes them.
        """
        return projection_of(attention, "to_k")

    def beside_queries(self, _names: Collection[str], _whole: bool = False) -> dict[str, list[tuple[nn.Module, Form]]]:
        """What to keep of each step beside the queries of the attentions of these names.

        By a name of its own: the modules whose output it may be, of which one runs, and its form. whole: what the last
        of the names showed to the text, too.
        """
        return {}

    @property
    def output_names(self) -> tuple[str, ...]:
        """The joint attentions whose outputs tell concepts apart (attention/outputs.py); none with cross-attention."""
        return ()

    def stream(self, _kept: dict[str, Rows | None]) -> TextStream | None:
        """The text stream of one image, of what `beside_queries` named; None with cross-attention.

        Each has rows of its own; it is None where the run never came to it.
        """
        return None

    # The text.

    @property
    def encoders(self) -> list[tuple[Tokenizer, TextEncoder]]:
        """(tokenizer, text encoder) pairs."""
        return [(self.pipe.tokenizer, self.pipe.text_encoder)]

    def spelled(self, text: str) -> str:
        """The text as the tokenizer gets it: textual inversion tokens of several vectors spelled out."""
        convert = getattr(self.pipe, "maybe_convert_prompt", None)
        if convert is None or not has_vectors(self.encoders[0][0]):
            return text
        with reader_of(self.encoders[0][0]) as reader:
            return convert(text, reader)

    @property
    def word_encoders(self) -> list[tuple[Tokenizer, TextEncoder]]:
        """Those of them that words are read by."""
        return self.encoders

    @property
    def max_tokens(self) -> int:
        """How many tokens the text encoders take, special ones included."""
        return min(
            min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
            for tokenizer, encoder in self.encoders
        )

    @property
    def reading(self) -> Reading:
        """How texts are read now."""
        return reading_of(self.pipe, [encoder for _, encoder in self.word_encoders])

    def tokenize(self, text: str) -> Tokens:
        """As `tokenize_all`, of one text."""
        return self.tokenize_all([text])[0]

    def tokenize_all(self, texts: Sequence[str]) -> list[Tokens]:
        """The tokens of each text, in one call of each tokenizer.

        Raises InputError for an empty text, one that is not Unicode, one that the pipeline would cut, and where the
        pipeline was loaded without what reads it.
        """
        if any(part is None for pair in self.word_encoders for part in pair):
            raise InputError(
                f"This {type(self.pipe).__name__} was loaded without a text encoder or its tokenizer, by which words "
                "are read: load the whole model, or ask with embeddings of your own."
            )
        for text in texts:
            check_unicode(text)
        return self._tokenize(texts)

    def _tokenize(self, texts: Sequence[str]) -> list[Tokens]:
        written = [check_written(self.spelled(text)) for text in texts]
        each = []
        for read in zip(*(read_each(tokenizer, written) for tokenizer, _ in self.encoders), strict=True):
            check_length(max(len(x.ids[0]) for x in read), self.max_tokens)
            check_same_cut(read)
            each.append(Tokens(read[0].text, tuple(x.ids[0] for x in read), read[0].spans, read[0].names))
        return each

    def encode(self, tokens: Tokens) -> Tensor:
        """`[L, embed_dim]` of tokens without padding: what the denoiser would be given for them."""
        return self.encode_all([tokens])[0]

    def encode_all(self, tokens: Sequence[Tokens]) -> list[Tensor]:
        """The same of several, in one call of each text encoder for those of one length, ENCODED_TOGETHER at most.

        None gets padding, so what a family's text encoders make of that does not matter. Where the family says so,
        short texts are always as many, the last one repeated: products of one size have the same bits in each row,
        whatever the others are, so a word's embedding does not depend on what is read with it.
        """
        lengths: dict[tuple[int, ...], list[int]] = {}
        for place, one in enumerate(tokens):
            lengths.setdefault((len(one.spans), *map(len, one.ids)), []).append(place)
        found: dict[int, Tensor] = {}
        for places in lengths.values():
            for first in range(0, len(places), ENCODED_TOGETHER):
                part = places[first : first + ENCODED_TOGETHER]
                batch = [tokens[place] for place in part]
                if self.remembers and len(batch[0].ids[0]) <= SHORT:
                    batch += batch[-1:] * (ENCODED_TOGETHER - len(batch))
                found.update(zip(part, self.encode_batch(batch), strict=False))
        return [found[place] for place in range(len(tokens))]

    @abstractmethod
    def encode_batch(self, tokens: Sequence[Tokens]) -> Tensor:
        """`[B, L, embed_dim]` of texts of one length."""

    @abstractmethod
    def encode_padded(self, text: str) -> Tensor:
        """The embedding over which the softmax runs in generation, by the pipeline's own `encode_prompt`.

        Padding is in it where the model attends to padding, and not where the pipeline masks it.
        """

    def padded_rows(self, tokens: Tokens) -> list[int]:
        """Where each row of `encode` stands among those of `encode_padded`: at its own place, if padding comes last."""
        return list(range(len(tokens.spans)))

    def _batch(self, ids: Sequence[tuple[int, ...]]) -> Tensor:
        """`[B, L]` of texts of one length, where the text encoders take them."""
        return torch.tensor(list(ids), device=device_of(self.pipe, [encoder for _, encoder in self.word_encoders]))

    def check_whole(self) -> None:
        """Raises InputError where a part was left out without which no image is made of a text, or seen with one."""
        parts = {part: getattr(self.pipe, part, None) for part in ("vae", "scheduler")}
        parts["text encoder"] = None if any(x is None for pair in self.encoders for x in pair) else True
        missing = [part for part, found in parts.items() if found is None]
        if missing:
            raise InputError(
                f"This {type(self.pipe).__name__} was loaded without its {missing[0]}: load the whole model."
            )

    # A photograph, as the denoiser gets it (hooks/photograph.py).

    def text_alone(self) -> AbstractContextManager[None]:
        """Within it the denoiser takes `condition`, whatever else was loaded into it (an IP-Adapter)."""
        return nullcontext()

    @property
    def is_plain(self) -> bool:
        """Whether `condition` is all that the denoiser takes beside latents and a timestep."""
        return self.sees_latents_alone

    @property
    def sees_latents_alone(self) -> bool:
        """Inpainting and editing models see a mask or an image beside them."""
        vae = getattr(self.pipe, "vae", None)
        seen = getattr(self.denoiser.config, "in_channels", None)  # ControlNet-XS, within the UNet, tells none
        return vae is not None and seen == self.pack * vae.config.latent_channels

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

    def packed(self, latents: Tensor) -> Tensor:
        """Latents `[B, C, h, w]` as the denoiser takes them, `[B, ...]`."""
        return latents

    def moment(self, timestep: int, _latents: Tensor) -> Tensor | int:
        """A training timestep as the pipeline gives it to the denoiser, for latents `[B, ...]`."""
        return timestep

    @abstractmethod
    def condition(self, captions: Sequence[str], size: tuple[int, int]) -> dict[str, Any]:
        """What the pipeline gives the denoiser beside latents and timestep, by the denoiser's own argument names.

        captions: B texts; an empty one gets what the unconditional half of a guided batch gets where no negative
        prompt is given. size: (height, width) of the image in pixels. Tensors are on the pipeline's device.
        """

    # A run.

    def guides(self, guidance: float) -> bool:
        """Whether a run of this guidance scale has an unconditional half."""
        return guidance > 1 and getattr(self.denoiser.config, "time_cond_proj_dim", None) is None

    def steps_run(self, steps: int, strength: float) -> int:
        """How many of the steps diffusers runs of them from a picture, as its `get_timesteps` counts."""
        return min(int(steps * strength), steps)

    # The pipeline's arguments, where they go by different names.

    def arguments(self, negative_prompt: str | list[str], after_step: Callable[[int], None]) -> dict[str, Any]:
        """Arguments of `pipe(...)`: a negative prompt, and a function told after each step how many are done.

        `after_step` may raise to end the run.
        """

        def callback(_pipe: Pipeline, step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            after_step(step + 1)
            return values

        prompts = [negative_prompt] if isinstance(negative_prompt, str) else negative_prompt or ()
        if "negative_prompt" not in inspect.signature(type(self.pipe).__call__).parameters:  # LCM's
            if any(prompts):
                raise InputError(f"This {type(self.pipe).__name__} takes no negative prompt: leave it empty.")
            return {"callback_on_step_end": callback}
        # Without a negative prompt SDXL leaves the embedding of one at 0, which an empty text's is not: None, not "".
        return {"negative_prompt": negative_prompt if any(prompts) else None, "callback_on_step_end": callback}


def projection_of(attention: Attention, name: str) -> Any:
    """The module that makes an attention's "to_q", "to_k", "to_v" or "to_out": its processor's own, where Custom
    Diffusion has trained one, else that of the attention.
    """
    trained = getattr(getattr(attention, "processor", None), f"{name}_custom_diffusion", None)
    return getattr(attention, name) if trained is None else trained


def check_processors(attentions: Mapping[str, Attention]) -> None:
    """Raises InputError for a processor with weights that are not known here: keys or queries may come from them."""
    for name, attention in attentions.items():
        processor = getattr(attention, "processor", None)
        parts = [x for x, _ in processor.named_parameters()] if isinstance(processor, nn.Module) else []
        known = CUSTOM_DIFFUSION + (IP_ADAPTER if hasattr(processor, "to_k_ip") else ())
        if any(not x.startswith(known) for x in parts):
            raise InputError(
                f"The {type(processor).__name__} of the layer {name} has weights of its own that cannot be read: set "
                "the usual one, such as AttnProcessor2_0(), with set_attn_processor()."
            )


def sources(attention: Attention, projection: str) -> list[tuple[nn.Module, Take]]:
    """The modules that may give an attention's projection, "to_q", "to_k" or "to_v", each with what takes it out.

    Its own one (`projection_of`); and where `fuse_qkv_projections` has put all three into one product, that. Only one
    of them runs.
    """
    found: list[tuple[nn.Module, Take]] = [(projection_of(attention, projection), lambda output: output)]
    fused = getattr(attention, "to_qkv", None)
    if fused is not None:
        place = ("to_q", "to_k", "to_v").index(projection)
        found.append((fused, lambda output: output.chunk(3, dim=-1)[place]))
    return found


def default_of(pipe: Pipeline, argument: str) -> Any:
    """The default of an argument of `pipe(...)`."""
    return inspect.signature(type(pipe).__call__).parameters[argument].default


def attentions_of(denoiser: Denoiser) -> tuple[dict[str, Attention], dict[str, Attention]]:
    """The cross-attentions and the self-attentions among a denoiser's modules. Raises InputError without the former."""
    attentions = {name: module for name, module in denoiser.named_modules() if _is_attention(module)}
    check_processors(attentions)
    cross = {name: x for name, x in attentions.items() if x.is_cross_attention}
    if not cross:
        raise InputError(f"This {type(denoiser).__name__} has no cross-attention: there is no word to ask for.")
    return cross, {name: x for name, x in attentions.items() if not x.is_cross_attention}


def _is_attention(module: object) -> TypeGuard[Attention]:
    return all(hasattr(module, x) for x in ("to_q", "to_k", "heads", "is_cross_attention"))
