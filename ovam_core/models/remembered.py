"""Questions whose words were read, kept while all that reads them is as it was.

Compared each time: the tokenizers; the text encoders' weights, by where they are, how often they were changed in place
and a few numbers of each; the rows of their tables that the words take; who listens to them; and what torch was told
that tells in the last bits. Text encoders with LoRA layers, hooks that move weights or weights that cannot be read are
asked anew each time. A question is kept as a whole, as the last bits of a long text's embedding may depend on what was
read with it.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ovam_core.attention.heatmap import AttributionPrompt
from ovam_core.attention.modules import lora_settings
from ovam_core.attention.reading import Reading
from ovam_core.models.adapter import Adapter
from ovam_core.models.reading import Tokens, by_encoder, tokenizer_state

MOST = 32  # questions of a pipeline


@dataclass(frozen=True, eq=False)
class _Read:
    """state: of what read it. rows: of each text encoder's table. versions: of the embeddings, which others hold."""

    state: Hashable
    reading: Reading
    tokens: tuple[Tokens, ...]
    rows: list[Tensor]
    prompts: tuple[AttributionPrompt, ...]
    versions: list[int]


_read: WeakKeyDictionary[Any, dict[Hashable, _Read]] = WeakKeyDictionary()


def recalled(family: Adapter, question: Hashable, reading: Reading) -> list[AttributionPrompt] | None:
    """The prompts of a question, if it was asked before and would be read the same. reading: how texts are read now."""
    known = _read.get(family.pipe, {}).get(question)
    if known is None or known.state != _state(family) or not known.reading.is_same(reading):
        return None
    versions = [x.embedding._version for x in known.prompts]
    rows = _rows(family, known.tokens)
    if versions != known.versions or not all(map(torch.equal, rows, known.rows)):
        return None
    return list(known.prompts)


def remember(
    family: Adapter,
    question: Hashable,
    reading: Reading,
    tokens: Sequence[Tokens],
    prompts: Sequence[AttributionPrompt],
) -> None:
    """Keeps what was read, where it can be told whether it would be read the same again."""
    state = _state(family)
    if state is None or not reading.is_same(reading):
        return
    versions = [x.embedding._version for x in prompts]
    kept = _read.setdefault(family.pipe, {})
    kept[question] = _Read(state, reading, tuple(tokens), _rows(family, tokens), tuple(prompts), versions)
    for old in list(kept)[:-MOST]:
        kept.pop(old, None)


def _state(family: Adapter) -> Hashable | None:
    """What differs once anything has changed that is seen without the weights' numbers; None where none can tell."""
    parts_there = all(part is not None for pair in family.word_encoders for part in pair)
    if not family.remembers or not parts_there or torch.is_inference_mode_enabled():
        return None
    parts: list[Hashable] = [
        torch.get_num_threads(),
        torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
    ]
    for tokenizer, encoder in family.word_encoders:
        state, weights = tokenizer_state(tokenizer), _weights(encoder)
        if state[0] is None or weights is None:
            return None
        parts += [id(tokenizer), state, id(encoder), weights]
    return tuple(parts)


def _weights(encoder: Any) -> Hashable | None:
    if not isinstance(encoder, nn.Module) or lora_settings(encoder):
        return None
    parts: list[Hashable] = []
    for module in encoder.modules():
        own = vars(module)
        if "forward" in own or hasattr(module, "_diffusers_hook") or own["training"]:
            return None
        parts.append((len(own["_forward_hooks"]), len(own["_forward_pre_hooks"])))
        for weight in own["_parameters"].values():
            if weight is not None and (type(weight) is not nn.Parameter or weight.is_inference()):
                return None
            parts.append(None if weight is None else (id(weight), weight.data_ptr(), weight._version))
    return tuple(parts)


def _rows(family: Adapter, tokens: Sequence[Tokens]) -> list[Tensor]:
    """The rows of each text encoder's table of tokens that the texts take."""
    each = zip(by_encoder(tokens), family.word_encoders, strict=True)
    tables: list[tuple[list[int], Any]] = [
        (sorted({one for of_text in ids for one in of_text}), encoder) for ids, (_, encoder) in each
    ]
    return [encoder.get_input_embeddings().weight.detach()[ids] for ids, encoder in tables]
