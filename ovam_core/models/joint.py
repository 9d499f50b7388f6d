"""What the transformers with joint attention have in common: words are carried along the text stream."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import ClassVar

from torch import Tensor, nn

from ovam_core.attention.heads import Attention, Turn, by_head, rotated
from ovam_core.attention.rows import Rows
from ovam_core.attention.text_stream import JointBlock, SingleBlock, TextStream, text_stream
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

    # Of the blocks, those whose outputs tell concepts apart; and what divides their products before the softmax.
    output_blocks: ClassVar[tuple[int, ...]]

    @property
    def embed_dim(self) -> int:
        return self.denoiser.config.joint_attention_dim

    @property
    def output_names(self) -> tuple[str, ...]:
        """Those of `output_blocks`; in a model of fewer blocks as many of its last ones that the text goes on after."""
        names = [name for name, x in self._blocks().items() if not getattr(x, "context_pre_only", False)]
        there = [names[block] for block in self.output_blocks if block < len(names)]
        return tuple(there if len(there) == len(self.output_blocks) else names[-len(self.output_blocks) :])

    def attentions(self) -> tuple[dict[str, Attention], dict[str, Attention]]:
        every: dict[str, Attention] = {name: block.attn for name, block in self._stream_blocks().items()}
        check_processors(every)
        return every, {name: every[name] for name in self._blocks()}

    def _blocks(self) -> dict[str, JointBlock]:
        """By the name of the attention in each."""
        return {f"transformer_blocks.{i}.attn": x for i, x in enumerate(self.denoiser.transformer_blocks)}

    def _stream_blocks(self) -> Mapping[str, JointBlock | SingleBlock]:
        """All that the text goes through, in their order."""
        return self._blocks()

    def queries(self, attention: Attention, projected: Tensor, call: Call) -> Tensor:
        return rotated(by_head(self.image_part(projected, call), attention.heads, attention.norm_q), call.rotary)

    def self_keys(self, attention: Attention, projected: Tensor, call: Call) -> Tensor:
        return rotated(by_head(self.image_part(projected, call), attention.heads, attention.norm_k), call.rotary)

    def _values(self, attention: Attention, projected: Tensor, call: Call) -> Tensor:
        """`to_v`'s output by head, `[b, heads, n, d]`."""
        return by_head(self.image_part(projected, call), attention.heads)

    def scale(self, attention: Attention) -> float:
        return (attention.to_q.out_features // attention.heads) ** -0.5

    def keys(self, _attention: Attention) -> None:
        return None

    def beside_queries(self, names: Collection[str], whole: bool = False) -> dict[str, list[tuple[nn.Module, Form]]]:
        """The image's keys and values in all blocks before the last of `names`: words come to it through them.

        whole: in that one too, if the text goes on after it.
        """
        blocks = self._stream_blocks()
        last = max((i for i, name in enumerate(blocks) if name in names), default=0)
        if whole and not getattr(list(blocks.values())[last], "context_pre_only", False):
            last += 1
        unchanged: Form = lambda output, _call: output  # noqa: E731
        kept = {"modulation": [(self._modulation, unchanged)]}
        for name, block in list(blocks.items())[:last]:
            kept[f"{name}.keys"] = _forms(block.attn, "to_k", functools.partial(self.self_keys, block.attn))
            kept[f"{name}.values"] = _forms(block.attn, "to_v", functools.partial(self._values, block.attn))
        return kept

    @property
    def _modulation(self) -> nn.Module:
        """Its output tells the text's half of each block what the timestep is."""
        return self.denoiser.time_text_embed

    def stream(self, kept: dict[str, Rows | None]) -> TextStream:
        blocks = self._stream_blocks()
        before = sum(f"{name}.keys" in kept for name in blocks)  # the last one's are needed for its outputs alone
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

    def _encode_t5(self, tokenizer: Tokenizer, encoder: TextEncoder, ids: Sequence[tuple[int, ...]]) -> Tensor:
        """T5's last hidden state of texts of one length `[B, L, E]`, which here see the padding behind them as in
        generation.
        """
        length = len(ids[0])
        padding = (tokenizer.pad_token_id,) * (default_of(self.pipe, "max_sequence_length") - length)
        return encoder(self._batch([one + padding for one in ids]))[0][:, :length]


def _forms(attention: Attention, projection: str, form: Form) -> list[tuple[nn.Module, Form]]:
    """A form of a projection, by each module that may make it."""
    return [(module, functools.partial(_taken, take, form)) for module, take in sources(attention, projection)]


def _taken(take: Take, form: Form, output: Tensor, call: Call) -> Tensor:
    return form(take(output), call)
