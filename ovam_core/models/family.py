"""What the recorder and text need to know of a pipeline: the adapter of a family of models, and what adapters are made of.

`Family` is Stable Diffusion 1 and 2 and says what an adapter is; `Transformer` is the start of those without a UNet. The
other families say where they differ: in families.py, and with joint attention in joint_families.py.
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from einops import rearrange
from torch import Tensor, nn

from ovam_core.attention.self_attention import column_sums
from ovam_core.attention.text_stream import TextStream
from ovam_core.errors import InputError

SOT, EOT = "<SoT>", "<EoT>"


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


Form = Callable[
    [Tensor, Call], Tensor
]  # a module's output for some images `[b, ...]` to what is kept of it, `[b, ...]`


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
    pack = 1  # latents that `packed` makes one of

    def __init__(self, pipe: Any):
        self.pipe = pipe

    @classmethod
    def fits(cls, pipe: Any) -> bool:
        return is_guided_unet(pipe) and getattr(pipe, "text_encoder_2", None) is None

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
        cross, own = attentions_of(self.denoiser)
        for name, x in cross.items():
            if x.norm_cross or getattr(x, "norm_q", None) is not None or getattr(x, "norm_k", None) is not None:
                raise InputError(f"The layer {name} normalises its queries or keys, which is not supported.")
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
        return by_head(projected, attention)

    def self_keys(self, attention: nn.Module, projected: Tensor, call: Call) -> Tensor:
        """The same for `to_k`'s output in a self-attention."""
        return by_head(projected, attention)

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
        if convert is None:
            return text
        with reader_of(self.encoders[0][0]) as reader:
            return convert(text, reader)

    @property
    def max_tokens(self) -> int:
        """How many tokens the text encoders take, special ones included."""
        return min(
            min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
            for tokenizer, encoder in self.encoders
        )

    def tokenize(self, text: str) -> Tokens:
        """Raises InputError for an empty text, one that is not Unicode, and one that the pipeline would cut."""
        check_unicode(text)
        text = written(self.spelled(text))
        read = [read_tokens(tokenizer, text) for tokenizer, _ in self.encoders]
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

    @property
    def is_plain(self) -> bool:
        """Whether `condition` is all that the denoiser takes beside latents and a timestep."""
        return self._sees_latents_alone and self.denoiser.config.addition_embed_type is None

    @property
    def _sees_latents_alone(self) -> bool:
        """Inpainting and editing models see a mask or an image beside them."""
        vae = getattr(self.pipe, "vae", None)
        return vae is not None and self.denoiser.config.in_channels == self.pack * vae.config.latent_channels

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

    def moment(self, timestep: int, latents: Tensor) -> Tensor | int:
        """A training timestep as the pipeline gives it to the denoiser, for latents `[B, ...]`."""
        return timestep

    def condition(self, captions: Sequence[str], size: tuple[int, int]) -> dict[str, Any]:
        """What the pipeline gives the denoiser beside latents and timestep, by the denoiser's own argument names.

        captions: B texts; an empty one gets what the unconditional half of a guided batch gets where no negative
        prompt is given. size: (height, width) of the image in pixels. Tensors are on the pipeline's device.
        """
        return {"encoder_hidden_states": torch.stack([self.encode_padded(one) for one in captions])}

    # The pipeline's arguments, where they go by different names.

    def arguments(self, negative_prompt: str | list[str], after_step: Callable[[int], None]) -> dict[str, Any]:
        """Arguments of `pipe(...)`: a negative prompt, and a function told after each step how many are done.

        `after_step` may raise to end the run.
        """

        def callback(_pipe: Any, step: int, _timestep: Any, values: dict) -> dict:
            after_step(step + 1)
            return values

        # Without a negative prompt SDXL leaves the embedding of one at 0, which an empty text's is not: None, not "".
        given = [negative_prompt] if isinstance(negative_prompt, str) else negative_prompt or ()
        return {"negative_prompt": negative_prompt if any(given) else None, "callback_on_step_end": callback}


class Transformer(Family):
    """A transformer over patches of the latents: one attention grid for all of its layers."""

    pipelines: tuple[str, ...] = ()
    timestep_position = 2  # among the arguments of the denoiser
    pixels = 8  # sides that are not multiples of it are refused or rounded by the pipeline, whatever the patches

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
        return attentions_of(self.denoiser)

    def call(self, args: tuple, kwargs: dict) -> Call:
        sample = args[0] if args else kwargs["hidden_states"]
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[self.timestep_position]
        return Call(sample.shape[0], *sample.shape[-2:], timestep, kwargs.get("image_rotary_emb"))

    def grid(self, n: int, call: Call) -> tuple[int, int]:
        patch = self.denoiser.config.patch_size
        height, width = call.height // patch, call.width // patch
        if height * width != n:
            raise InputError(f"An attention of {n} pixels does not fit a grid of {height} x {width} patches.")
        return height, width

    @property
    def is_plain(self) -> bool:
        return self._sees_latents_alone

    @property
    def photo_multiple(self) -> int:
        return self.side_multiple

    def moment(self, timestep: int, latents: Tensor) -> Tensor:
        return torch.full((len(latents),), timestep, device=latents.device)


class FlowTransformer(Transformer):
    """A transformer that was trained by flow matching (arXiv 2210.02747): its timestep is the share of noise."""

    knows_noise = True  # there is no schedule beside the timestep

    def noised(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """(1 - sigma) x + sigma noise, sigma = t / 1000, the schedule's number of training timesteps.

        That is what a timestep means to the model: a sampler's flow shift only chooses which ones it visits.
        """
        sigma = timesteps.to(latents) / self.pipe.scheduler.config.num_train_timesteps
        sigma = rearrange(sigma, "t -> t 1 1 1")
        return (1 - sigma) * latents + sigma * noise


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
            raise InputError(
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
            raise InputError("Nothing says whether this run is guided: call the pipeline, or record with branch='all'.")
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
    """Calls `before(method, arguments by name)` ahead of an object's method in this thread, until `remove`."""

    def __init__(self, owner: Any, name: str, before: Callable[[Callable, dict], None]):
        method, thread = getattr(owner, name), threading.get_ident()
        signature = inspect.signature(method)

        @functools.wraps(method)
        def hooked(*args, **kwargs):
            if threading.get_ident() != thread:  # someone else's question about another recording
                return method(*args, **kwargs)
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


def default_of(pipe: Any, argument: str) -> Any:
    """The default of an argument of `pipe(...)`."""
    return inspect.signature(type(pipe).__call__).parameters[argument].default


# -------------------------------------------------------------------------------------------------- attention


def is_guided_unet(pipe: Any) -> bool:
    config = getattr(getattr(pipe, "unet", None), "config", None)
    return (
        getattr(config, "cross_attention_dim", None) is not None
        and getattr(config, "encoder_hid_dim", None) is None  # Kolors and Kandinsky project the text first
        and hasattr(type(pipe), "do_classifier_free_guidance")
    )


def attentions_of(denoiser: nn.Module) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    found = {
        name: module
        for name, module in denoiser.named_modules()
        if all(hasattr(module, x) for x in ("to_q", "to_k", "heads", "is_cross_attention"))
    }
    cross = {name: x for name, x in found.items() if x.is_cross_attention}
    if not cross:
        raise InputError(f"This {type(denoiser).__name__} has no cross-attention: there is no word to ask for.")
    return cross, {name: x for name, x in found.items() if not x.is_cross_attention}


def by_head(projected: Tensor, attention: nn.Module) -> Tensor:
    """`[B, n, heads * d]` to `[B, heads, n, d]`."""
    return rearrange(projected, "b n (h d) -> b h n d", h=attention.heads)


def normed(x: Tensor, norm: nn.Module | None) -> Tensor:
    """Queries or keys of any shape after their own norm, where the layer has one."""
    return x if norm is None else norm(x)


def grid_size(n: int, latent_height: int, latent_width: int) -> tuple[int, int]:
    """(height, width) of the attention grid of `n` pixels, by halving the latents as a UNet does.

    A UNet rounds odd sides up (padded convolutions) or down (asymmetric padding). Raises InputError for no
    fit.
    """
    for round_up in (1, 0):
        height, width = latent_height, latent_width
        while height * width > n and height * width > 1:
            height, width = (height + round_up) // 2, (width + round_up) // 2
        if height * width == n:
            return height, width
    raise InputError(f"An attention of {n} pixels does not fit latents of {latent_height} x {latent_width}.")


# ------------------------------------------------------------------------------------------------------- text


def check_length(tokens: int, limit: int) -> None:
    """Raises InputError for a text of more tokens than the text encoder takes."""
    if tokens > limit:
        raise InputError(
            f"The text has {tokens} tokens and the text encoder takes {limit}, its start and end included: shorten it."
        )


def check_same_cut(read: Sequence[Tokens]) -> None:
    """Raises InputError where tokenizers, whose tokens stand beside each other, differ in their number."""
    if len({len(x.ids[0]) for x in read}) > 1:
        raise InputError("The tokenizers of this model cut the text in different places: write it another way.")


def written(text: str) -> str:
    if not text.strip():
        raise InputError("The text is empty: write at least one word.")
    return text


_readers: WeakKeyDictionary[Any, tuple[int, Any]] = WeakKeyDictionary()  # tokenizer to its length and its copy

_reading = threading.Lock()


def check_unicode(text: str) -> None:
    """Bytes of another encoding arrive as lone surrogates, which no tokenizer takes."""
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise InputError(f"{text[:40]!r} holds characters that are not Unicode: write it in UTF-8.")


@contextmanager
def reader_of(tokenizer: Any) -> Iterator[Any]:
    """A copy of the tokenizer to read texts with, for one thread at a time.

    Whether a fast tokenizer pads is state that its calls change: reading with the pipeline's own, another thread's
    generation could come out unpadded, and a question padded.
    """
    with _reading:
        length, copied = _readers.get(tokenizer, (None, None))
        if length != len(tokenizer):  # textual inversion adds tokens
            copied = copy.deepcopy(tokenizer)
            _readers[tokenizer] = len(tokenizer), copied
        yield copied


def read_ids(tokenizer: Any, text: str, **options: Any) -> Any:
    """The encoding of a text, not padded, not truncated."""
    with reader_of(tokenizer) as reader:
        return reader(text, **options)


def read_tokens(tokenizer: Any, text: str, **options: Any) -> Tokens:
    """One tokenizer's tokens: not padded, not truncated."""
    encoded = read_ids(tokenizer, text, return_offsets_mapping=True, **options)
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
