"""What the transformers with joint attention have in common: words are carried along the text stream."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import ClassVar

from torch import Tensor, nn

from ovam_core.attention.heads import Attention, Turn, by_head, rotated
from ovam_core.attention.rows import Rows
from ovam_core.attention.text_stream import JointBlock, TextStream, text_stream
from ovam_core.models.adapter import Call, Form, Take, TextEncoder, check_processors, default_of, sources
from ovam_core.models.reading import Tokenizer
from ovam_core.models.transformer import FlowTransformerAdapter


class JointTransformerAdapter(FlowTransformerAdapter):
    """Blocks in which image and text attend to both (MMDiT, arXiv 2403.03206), each with a stream of its own.

    The keys of words are made by carrying them along the text stream (attention/text_stream.py). A map's softmax is
    over the words alone, as in the other families: what a pixel gives to the image in the model's softmax is left out.
    Likewise the self-attention map (Eq. 8) is of a softmax over the image's keys alone.
    """

    about: ClassVar[str] = (
        "Joint attention: a word is carried along the text stream, where it reads the image and does not touch it; its "
        "map is the image's attention to it against the other tokens of its attribution prompt."
    )

    @property
    def embed_dim(self) -> int:
        return self.denoiser.config.joint_attention_dim

    def attentions(self) -> tuple[dict[str, Attention], dict[str, Attention]]:
        joint: dict[str, Attention] = {name: block.attn for name, block in self._blocks().items()}
        check_processors(joint)
        return joint, joint

    def _blocks(self) -> dict[str, JointBlock]:
        """By the name of the attention in each."""
        return {f"transformer_blocks.{i}.attn": x for i, x in enumerate(self.denoiser.transformer_blocks)}

    def queries(self, attention: Attention, projected: Tensor, call: Call) -> Tensor:
        return rotated(by_head(projected, attention.heads, attention.norm_q), call.rotary)

    def self_keys(self, attention: Attention, projected: Tensor, call: Call) -> Tensor:
        return rotated(by_head(projected, attention.heads, attention.norm_k), call.rotary)

    def scale(self, attention: Attention) -> float:
        return (attention.to_q.out_features // attention.heads) ** -0.5

    def keys(self, _attention: Attention) -> None:
        return None

    def beside_queries(self, names: Collection[str]) -> dict[str, list[tuple[nn.Module, Form]]]:
        """The image's keys and values in all blocks before the last of `names`: words come to it through them."""
        blocks = self._blocks()
        last = max((i for i, name in enumerate(blocks) if name in names), default=0)
        whole: Form = lambda output, _call: output  # noqa: E731
        kept = {"modulation": [(self._modulation, whole)]}
        for name, block in list(blocks.items())[:last]:
            kept[f"{name}.keys"] = _forms(block.attn, "to_k", functools.partial(self.self_keys, block.attn))
            kept[f"{name}.values"] = _forms(block.attn, "to_v", functools.partial(_values, block.attn))
        return kept

    @property
    def _modulation(self) -> nn.Module:
        """Its output tells the text's half of each block what the timestep is."""
        return self.denoiser.time_text_embed

    def stream(self, kept: dict[str, Rows | None]) -> TextStream:
        blocks = self._blocks()
        before = sum(f"{name}.keys" in kept for name in blocks)  # the last one's are not needed
        used = dict(list(blocks.items())[: before + 1])
        return text_stream(self.denoiser.context_embedder, used, kept, self._text_rotary)

    @property
    def _text_rotary(self) -> Callable[[Tensor], Turn] | None:
        """Turns text tokens by their places `[L]`; None where they are not turned."""
        return None

    def moment(self, timestep: int, latents: Tensor) -> Tensor:
        return super().moment(timestep, latents).float()  # as flow-matching schedulers count

    def steps_run(self, steps: int, strength: float) -> int:
        return steps - int(max(steps - min(steps * strength, steps), 0))

    def _encode_t5(self, tokenizer: Tokenizer, encoder: TextEncoder, ids: tuple[int, ...]) -> Tensor:
        """T5's last hidden state of the tokens `[L, E]`, which here see the padding behind them as in generation."""
        padding = (tokenizer.pad_token_id,) * (default_of(self.pipe, "max_sequence_length") - len(ids))
        return encoder(self._batch(ids + padding))[0][0, : len(ids)]


def _forms(attention: Attention, projection: str, form: Form) -> list[tuple[nn.Module, Form]]:
    """A form of a projection, by each module that may make it."""
    return [(module, functools.partial(_taken, take, form)) for module, take in sources(attention, projection)]


def _taken(take: Take, form: Form, output: Tensor, call: Call) -> Tensor:
    return form(take(output), call)


def _values(attention: Attention, projected: Tensor, _call: Call) -> Tensor:
    """`to_v`'s output by head, `[b, heads, n, d]`."""
    return by_head(projected, attention.heads)
