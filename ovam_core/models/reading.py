"""How a text is read: what a tokenizer makes of it, with the letters that each token stands for."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovam_core.attention.modules import lora_settings
from ovam_core.attention.reading import Reading
from ovam_core.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer
else:
    Tokenizer = Any  # transformers is not imported for its name

FEW = 8  # numbers of a weight by which it is known again

SOT, EOT = "<SoT>", "<EoT>"

# Words of a phrase that name nothing one could point at.
FUNCTION_WORDS = frozenset(
    """a an the this that these those of in on at to with and or by for from near under over behind beside between
    into onto is are be its his her their my your our some any very""".split()
)


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


def read_tokens(tokenizer: Tokenizer, text: str, **options: Any) -> Tokens:
    """One tokenizer's tokens: not padded, not truncated."""
    return read_each(tokenizer, [text], **options)[0]


def read_each(tokenizer: Tokenizer, texts: Sequence[str], **options: Any) -> list[Tokens]:
    """The same of several texts, each on its own, in one call of the tokenizer."""
    encoded = read_ids(tokenizer, list(texts), return_offsets_mapping=True, **options)
    each = zip(texts, encoded.input_ids, encoded.offset_mapping, strict=True)
    return [_tokens(tokenizer, *one) for one in each]


def _tokens(tokenizer: Tokenizer, text: str, read: list[int], mapping: list[tuple[int, int]]) -> Tokens:
    ids, pieces = tuple(read), tokenizer.convert_ids_to_tokens(read)
    # A lone mark of a space is given the letter behind it, which is not its own.
    offsets = zip(pieces, mapping, strict=True)
    spans = tuple((start, start if piece == "▁" else end) for piece, (start, end) in offsets)
    names = [text[start:end].strip() or piece for piece, (start, end) in zip(pieces, spans, strict=True)]
    # Only at the ends: CLIP's unknown token is its end token too.
    if ids[0] in {tokenizer.bos_token_id, tokenizer.cls_token_id} - {None}:
        names[0] = SOT
    if ids[-1] in {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None}:
        names[-1] = EOT
    return Tokens(text, (ids,), spans, tuple(names))


def read_ids(tokenizer: Tokenizer, text: str | list[str], **options: Any) -> Any:
    """The tokenizer's encoding of a text or of several, not padded, not truncated."""
    with reader_of(tokenizer) as reader:
        return reader(text, **options)


def by_encoder(tokens: Sequence[Tokens]) -> list[list[tuple[int, ...]]]:
    """What each text encoder reads of several texts."""
    return [list(ids) for ids in zip(*(one.ids for one in tokens), strict=True)]


def one_after_another(read: Sequence[Tokens], rows: Sequence[Tokens]) -> Tokens:
    """One text as several tokenizers read it, the rows of its embedding being the tokens of some of them in turn."""
    return Tokens(
        read[0].text,
        tuple(x.ids[0] for x in read),
        tuple(span for x in rows for span in x.spans),
        tuple(name for x in rows for name in x.names),
    )


def rows_behind_padding(tokens: Tokens, first: int, padded: int) -> list[int]:
    """The rows of a text as two encoders read it in turn, where the first one's are padded: `first` of them are its
    tokens, `padded` its padding too.
    """
    return [row if row < first else row - first + padded for row in range(len(tokens.spans))]


_readers: WeakKeyDictionary[Tokenizer, tuple[tuple, Tokenizer]] = WeakKeyDictionary()  # to its state and its copy
_reading = threading.Lock()


def _unlock() -> None:
    global _reading
    _reading = threading.Lock()


if hasattr(os, "register_at_fork"):  # else a process forked while a thread was reading would wait for that for ever
    os.register_at_fork(after_in_child=_unlock)


@contextmanager
def reader_of(tokenizer: Tokenizer) -> Iterator[Tokenizer]:
    """A copy of the tokenizer to read texts with, for one thread at a time.

    Whether a fast tokenizer pads is state that its calls change: reading with the pipeline's own, another thread's
    generation could come out unpadded, and a question padded.
    """
    with _reading:
        known = _readers.get(tokenizer)
        state = tokenizer_state(tokenizer)
        if known is None or known[0] != state:
            known = _readers[tokenizer] = state, copy.deepcopy(tokenizer)
        yield known[1]


def tokenizer_state(tokenizer: Tokenizer) -> tuple[Any, int]:
    """What differs once tokens were added (its length) or taken out (what does its work): by textual inversion."""
    return getattr(tokenizer, "_tokenizer", None), len(tokenizer)


_with_vectors: WeakKeyDictionary[Tokenizer, tuple[tuple, bool]] = WeakKeyDictionary()


def has_vectors(tokenizer: Tokenizer) -> bool:
    """Whether a word of textual inversion stands for several vectors: diffusers names them "<toy>", "<toy>_1", ...

    Found once for each state of a tokenizer, which sorts its added words whenever it is asked for them.
    """
    known, state = _with_vectors.get(tokenizer), tokenizer_state(tokenizer)
    if known is None or known[0] != state:
        added = tokenizer.added_tokens_encoder
        known = _with_vectors[tokenizer] = state, any(f"{word}_1" in added for word in added)
    return known[1]


_asked: ContextVar[Reading | None] = ContextVar("reading", default=None)


@contextmanager
def read_as(reading: Reading | None) -> Iterator[None]:
    """Within it words are read with the settings of a recording's run (`Recording.reading`); None: with those of the
    pipeline's last call, as outside.
    """
    before = _asked.set(reading)
    try:
        yield
    finally:
        _asked.reset(before)


def last_clip_skip(pipe: Any) -> int | None:
    """How many of CLIP's last layers the pipeline's last call left out (`clip_skip`): words are read as its prompt was.

    None before its first call. Within `read_as` those of that reading.
    """
    asked = _asked.get()
    return getattr(pipe, "_clip_skip", None) if asked is None else asked.clip_skip


def last_lora_scale(pipe: Any) -> float | None:
    """The scale of LoRA layers that the pipeline's last call was given, text encoders included; None for none.

    Within `read_as` that of that reading.
    """
    asked = _asked.get()
    if asked is not None:
        return asked.lora_scale
    given = (getattr(pipe, f"_{name}_kwargs", None) for name in ("cross_attention", "joint_attention"))
    return next((x["scale"] for x in given if x and x.get("scale") is not None), None)


@contextmanager
def at_last_scale(pipe: Any, encoders: Sequence[Any]) -> Iterator[None]:
    """Within it the LoRA layers of text encoders are at `last_lora_scale`."""
    scale = last_lora_scale(pipe)
    scaled = [] if scale is None else [x for x in encoders if x is not None and lora_settings(x)]
    if not scaled:
        yield
        return
    from diffusers.utils import scale_lora_layers, unscale_lora_layers

    for encoder in scaled:
        scale_lora_layers(encoder, scale)
    try:
        yield
    finally:
        for encoder in scaled:
            unscale_lora_layers(encoder, scale)


def device_of(pipe: Any, encoders: Sequence[nn.Module | None]) -> torch.device:
    """Where text encoders take their tokens: that of their weights, which the pipeline looks for among all its modules;
    where hooks move those, the pipeline knows.
    """
    modules = [x for encoder in encoders if isinstance(encoder, nn.Module) for x in encoder.modules()]
    if not modules or any(hasattr(x, hook) for x in modules for hook in ("_hf_hook", "_diffusers_hook")):
        return pipe._execution_device
    weight = next((x for module in modules for x in module.parameters(recurse=False)), None)
    return pipe._execution_device if weight is None else weight.device


def reading_of(pipe: Any, encoders: Sequence[nn.Module | None]) -> Reading:
    """How these text encoders of a pipeline, None for one that is not loaded, read a text now."""
    rows: dict[str, Tensor] = {}
    kinds: set[torch.dtype] = set()
    scaled = False
    for place, encoder in enumerate(encoders):
        if not isinstance(encoder, nn.Module):
            continue
        for name, weight in encoder.named_parameters():
            if weight.ndim == 2 and "lora_" not in name:
                rows[f"{place}.{name.replace('.base_layer', '')}"] = _few(weight)
                kinds |= {weight.dtype} if weight.is_floating_point() else set()
        layers = lora_settings(encoder)
        for name, layer in encoder.named_modules():
            for adapter in _in_use(layer) if layer in layers else ():
                rows[f"{place}.{name} {adapter}"] = _few_of_lora(layer, adapter)
                scaled = True
    return Reading(
        last_clip_skip(pipe),
        last_lora_scale(pipe) if scaled else None,
        tuple(rows),
        torch.stack([x.to(next(iter(rows.values())).device) for x in rows.values()]).cpu() if rows else None,
        max((torch.finfo(kind).eps for kind in kinds), default=0.0),
    )


def _few(weight: Tensor) -> Tensor:
    """A few of a weight's numbers, float32 `[FEW]`; NaN where it is on the device "meta", or packed."""
    if weight.is_meta or type(weight) not in (nn.Parameter, Tensor):
        return torch.full((FEW,), torch.nan)
    few = weight.detach()[0].flatten()[:FEW].float()
    return F.pad(few, (0, FEW - len(few)))


def _in_use(layer: Any) -> list[str]:
    """The adapters of a LoRA layer that add to what it makes."""
    if layer.disable_adapters:
        return []
    return [x for x in layer.active_adapters if x in layer.scaling and x not in layer.merged_adapters]


def _few_of_lora(layer: Any, adapter: str) -> Tensor:
    weight = layer.lora_B[adapter].weight if adapter in layer.lora_B else layer.lora_embedding_B[adapter]
    return layer.scaling[adapter] * _few(weight)


def check_written(text: str) -> str:
    """The text. Raises InputError for one without a word."""
    if not text.strip():
        raise InputError("The text is empty: write at least one word.")
    return text


def check_unicode(text: str) -> None:
    """Raises InputError for lone surrogates, which no tokenizer takes: bytes of another encoding arrive as these."""
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise InputError(f"{text[:40]!r} holds characters that are not Unicode: write it in UTF-8.")


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
