"""Words carried along the text stream of a model with joint attention: they read the image and do not touch it.

In joint attention (Stable Diffusion 3, Flux) the text has a stream of its own: each block changes it by what it reads
in the image, so a layer's text keys are no projection of the embedding alone. ConceptAttention (arXiv 2502.04320) lets
further words take the prompt's way: in every block their queries meet their own keys and the image's, while no pixel
meets theirs. The image's keys and values, kept from one run, therefore give the keys of any words afterwards: those
that the model makes of them at the prompt's place, before this image. Of the padded prompt they are the model's own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ovam_core.attention.heads import Attention, Turn, by_head, rotated
from ovam_core.attention.modules import LoraSettings, as_set, call_frozen, probe, unbound, without_hooks
from ovam_core.attention.rows import Rows, common, rows_of


class JointAttention(Attention, Protocol):
    """A joint attention of diffusers: the image's projections, and here the text's."""

    add_q_proj: nn.Module
    add_k_proj: nn.Module
    add_v_proj: nn.Module
    to_add_out: nn.Module
    norm_added_q: nn.Module | None
    norm_added_k: nn.Module | None


class JointBlock(Protocol):
    """A block of diffusers in which image and text attend to both, the text's half. The last one may lack what follows
    the attention.
    """

    attn: JointAttention
    norm1_context: nn.Module
    norm2_context: nn.Module
    ff_context: nn.Module


class SingleBlock(Protocol):
    """A block of Flux in which text and image, one behind the other, go through the same modules."""

    attn: Attention
    norm: nn.Module
    proj_mlp: nn.Module
    act_mlp: nn.Module
    proj_out: nn.Module


@dataclass(frozen=True, eq=False)
class StreamBlock:
    """One block of the text stream, and what its image stream showed to the text, for one image.

    name: of its attention. to_keys: text and modulation to keys. carry: the text to the next block's, by
    image_keys and image_values `[T, heads, n, d]`, normalised and rotated; all three None in the last block.
    steps: those whose text comes to this block and goes through it, fewer from block to block where a cache skipped
    some. made: what `tried` gave at the end of the run, None where that was not asked.
    """

    name: str
    to_keys: nn.Module
    carry: nn.Module | None
    image_keys: Tensor | None
    image_values: Tensor | None
    steps: tuple[int, ...]
    made: tuple[Tensor, ...] | None = None

    @property
    def tensors(self) -> list[Tensor]:
        return [x for x in (self.image_keys, self.image_values) if x is not None]

    def onwards(
        self, text: Tensor, modulation: Tensor, turn: Turn | None, sizes: Sequence[int], dtype: torch.dtype | None
    ) -> Tensor:
        """The text `[T, L, C]` after this block; prompts of `sizes` tokens do not read one another."""
        if self.carry is None or self.image_keys is None:
            raise ValueError(f"The text ends in the block {self.name}.")
        mask = _prompt_mask(sizes, self.image_keys.shape[2], text.device)
        shown = self.image_keys, self.image_values
        return call_frozen(self.carry, text, modulation, turn, *shown, mask, dtype=dtype)

    def read(self, text: Tensor, modulation: Tensor, turn: Turn | None, dtype: torch.dtype | None) -> Tensor:
        """What the text of one prompt, `[T, L, C]`, reads here before the output projection: `[T, L, heads * d]`."""
        if not isinstance(self.carry, TextStep):
            raise ValueError(f"Nothing is read in the block {self.name}.")
        shown = self.image_keys, self.image_values
        return call_frozen(TextRead(self.carry), text, modulation, turn, *shown, dtype=dtype)

    def tried(self, text: Tensor, modulation: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, ...]:
        """Keys, and what is carried on before one pixel of probes, of one text `[1, 1, C]` and modulation `[1, C]`."""
        keys = call_frozen(without_hooks(self.to_keys), text, modulation, None, dtype=dtype)
        if self.carry is None or self.image_keys is None:
            return (keys,)
        _, heads, _, width = self.image_keys.shape
        shown = probe(1, heads, 1, width, seed=1), probe(1, heads, 1, width, seed=2)
        return keys, call_frozen(without_hooks(self.carry), text, modulation, None, *shown, None, dtype=dtype)

    def each(self, change: Callable[[Tensor], Tensor]) -> StreamBlock:
        """The same with `change` applied to both tensors."""
        keys, values = (None if x is None else change(x) for x in (self.image_keys, self.image_values))
        return replace(self, image_keys=keys, image_values=values)

    def detached(self) -> StreamBlock:
        """As `Recording.detached`."""
        return replace(
            self.each(Tensor.cpu),
            to_keys=unbound(self.to_keys),
            carry=None if self.carry is None else unbound(self.carry),
            made=None if self.made is None else tuple(x.cpu() for x in self.made),
        )

    def at(self, steps: tuple[int, ...]) -> StreamBlock:
        """The same with some of its steps."""
        return replace(self.each(lambda x: rows_of(x, self.steps, steps)), steps=steps)


@dataclass(frozen=True, eq=False)
class TextStream:
    """All that words need to be carried along the text stream of one image's run.

    embed: from an embedding `[L, E]` into the stream, `[L, C]`. blocks: every block up to the last one whose keys are
    asked for. modulation: `[T, C]`, what the timestep (and the prompt as a whole) says to the blocks at each step.
    rotary: turns queries and keys by their tokens' places `[L]` in the prompt; None where the model does not.
    steps: of the modulation's rows. dtype: what the modules compute in, see `call_frozen`.
    """

    embed: nn.Module
    blocks: tuple[StreamBlock, ...]
    modulation: Tensor
    rotary: Callable[[Tensor], Turn] | None
    steps: tuple[int, ...]
    dtype: torch.dtype | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held by the image's keys and values and the modulation."""
        return sum(x.nbytes for block in self.blocks for x in block.tensors) + self.modulation.nbytes

    def keys(self, embedding: Tensor, sizes: Sequence[int], names: Collection[str]) -> Iterator[Tensor]:
        """Keys `[T, heads, L, d]` in each block of `names`, in the blocks' order, dtype and device.

        embedding: `[L, E]`, attribution prompts of `sizes` rows one after the other; each is carried as if it were
        alone. Differentiable with respect to it; of every block the inputs alone are kept for the gradient.
        """
        for block, text, modulation, turn in self._carried(embedding, sizes):
            if block.name in names:
                yield call_frozen(block.to_keys, text, modulation, turn, dtype=self.dtype)

    def outputs(self, embedding: Tensor, names: Collection[str]) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """What the tokens read in each block of `names`, before its output projection: steps, and `[T, L, heads * d]`.

        embedding: `[L, E]`, one prompt. The blocks must hold what their image showed.
        """
        for block, text, modulation, turn in self._carried(embedding, [len(embedding)]):
            if block.name in names:
                yield block.steps, block.read(text, modulation, turn, self.dtype)

    def _carried(
        self, embedding: Tensor, sizes: Sequence[int]
    ) -> Iterator[tuple[StreamBlock, Tensor, Tensor, Turn | None]]:
        """Each block with the text `[T, L, C]` that comes to it, the modulation, and what turns the text."""
        # Tensors of a run under inference_mode: autograd refuses to save even what is cut from them.
        modulation = self.modulation.clone() if self.modulation.is_inference() else self.modulation
        text = repeat(call_frozen(self.embed, embedding, dtype=self.dtype), "l c -> t l c", t=len(modulation))
        places = torch.cat([torch.arange(size, device=text.device) for size in sizes])
        turn = None if self.rotary is None else self.rotary(places)
        steps = self.steps
        for block in self.blocks:
            if block.steps != steps:
                text, modulation = (rows_of(x, steps, block.steps) for x in (text, modulation))
                steps = block.steps
            yield block, text, modulation, turn
            if block.carry is not None:
                # Text is its only argument: autograd refuses to save tensors of a run under inference_mode.
                onwards = partial(block.onwards, modulation=modulation, turn=turn, sizes=sizes, dtype=self.dtype)
                text = checkpoint(onwards, text, use_reentrant=False, preserve_rng_state=False)

    def up_to(self, names: Collection[str], read: Collection[str] = ()) -> TextStream:
        """The stream as far as the last block of `names`, or of `read`, whose outputs are asked."""
        last = max(i for i, block in enumerate(self.blocks) if block.name in {*names, *read})
        end = self.blocks[last]
        if end.name not in read:
            end = replace(end, carry=None, image_keys=None, image_values=None)
        return replace(self, blocks=(*self.blocks[:last], end))

    def each(self, change: Callable[[Tensor], Tensor]) -> TextStream:
        """The same with `change` applied to every tensor; all of them have the steps first."""
        return replace(self, blocks=tuple(x.each(change) for x in self.blocks), modulation=change(self.modulation))

    def detached(self) -> TextStream:
        """As `Recording.detached`; what turns the text goes, too."""
        blocks = tuple(x.detached() for x in self.blocks)
        return replace(self, embed=unbound(self.embed), blocks=blocks, modulation=self.modulation.cpu(), rotary=None)

    def at(self, steps: Collection[int]) -> TextStream:
        """The same with some of its steps, as far as any of them comes."""
        chosen = [(block, common(block.steps, steps)) for block in self.blocks]
        kept = common(self.steps, steps)
        return replace(
            self,
            blocks=tuple(block.at(own) for block, own in chosen if own),
            modulation=rows_of(self.modulation, self.steps, kept),
            steps=kept,
        )

    def as_set(self, settings: LoraSettings) -> TextStream:
        """The same, its modules as `as_set` has them."""
        blocks = tuple(
            replace(
                x, to_keys=as_set(x.to_keys, settings), carry=None if x.carry is None else as_set(x.carry, settings)
            )
            for x in self.blocks
        )
        return replace(self, embed=as_set(self.embed, settings), blocks=blocks)

    @torch.no_grad()
    def tried(self, width: int) -> Iterator[tuple[StreamBlock, tuple[Tensor, ...]]]:
        """What each block makes of a probe; width: of an embedding."""
        text = call_frozen(without_hooks(self.embed), probe(1, width), dtype=self.dtype)[None]
        modulation = probe(1, self.modulation.shape[-1], seed=3)
        for block in self.blocks:
            yield block, block.tried(text, modulation, self.dtype)


def text_stream(
    embed: nn.Module,
    blocks: Mapping[str, JointBlock | SingleBlock],
    kept: Mapping[str, Rows | None],
    rotary: Callable[[Tensor], Turn] | None = None,
) -> TextStream:
    """A stream of the model's own modules.

    blocks: those of diffusers by the name of their attention, up to the last one that is asked for. kept:
    "modulation", and for every block "<name>.keys" and "<name>.values", which the last one may lack. Ends before a
    block that none of the steps went through.
    """
    modulation = kept["modulation"]
    assert modulation is not None, "every call of the denoiser has one"
    *_, last = blocks
    steps, stream = modulation.steps, []
    for name in blocks:
        keys, values = (kept.get(f"{name}.{x}") for x in ("keys", "values"))
        if keys is None or values is None:
            if name == last:
                stream.append(StreamBlock(last, _modules(blocks[last])[0], None, None, None, steps))
            break
        steps = common(common(steps, keys.steps), values.steps)
        if not steps:
            break
        shown_keys, shown_values = (rows_of(x.values, x.steps, steps) for x in (keys, values))
        stream.append(StreamBlock(name, *_modules(blocks[name]), shown_keys, shown_values, steps))
    return TextStream(embed, tuple(stream), modulation.values, rotary, modulation.steps)


def _modules(block: Any) -> tuple[nn.Module, nn.Module]:
    """What makes keys of the text in a block, and what carries it through."""
    if hasattr(block, "norm1_context"):
        return TextKeys(block), TextStep(block)
    return SingleKeys(block), SingleStep(block)


class TextKeys(nn.Module):
    """Text `[T, L, C]` and modulation `[T, C]` to its keys in one block, `[T, heads, L, d]`."""

    def __init__(self, block: JointBlock):
        super().__init__()
        attention = block.attn
        self.norm = _adaptive_norm(block)
        self.project, self.norm_key, self.heads = attention.add_k_proj, attention.norm_added_k, attention.heads

    def forward(self, text: Tensor, modulation: Tensor, turn: Turn | None) -> Tensor:
        normed = self.norm(text, modulation)[0]
        return rotated(by_head(self.project(normed), self.heads, self.norm_key), turn)


class _Attends(nn.Module):
    """A text's attention to itself and the image."""

    to_query: nn.Module
    to_key: nn.Module
    to_value: nn.Module
    norm_query: nn.Module | None
    norm_key: nn.Module | None
    heads: int

    def attend(
        self, normed: Tensor, turn: Turn | None, image_keys: Tensor, image_values: Tensor, mask: Tensor | None
    ) -> Tensor:
        """What the text reads, `[T, L, heads * d]`. normed: the text, ready for attention, `[T, L, C]`."""
        query = rotated(by_head(self.to_query(normed), self.heads, self.norm_query), turn)
        key = rotated(by_head(self.to_key(normed), self.heads, self.norm_key), turn)
        value = by_head(self.to_value(normed), self.heads)
        keys, values = torch.cat([key, image_keys], dim=2), torch.cat([value, image_values], dim=2)
        read = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
        return rearrange(read, "t h l d -> t l (h d)")


class TextStep(_Attends):
    """One block's text stream: `[T, L, C]` to `[T, L, C]`, by attention to itself and to the image, then feed-forward.

    image_keys, image_values: `[T, heads, n, d]`. mask: bool `[L, L + n]`, what each token may read; None for all.
    """

    def __init__(self, block: JointBlock):
        super().__init__()
        attention = block.attn
        self.norm = _adaptive_norm(block)
        self.to_query, self.norm_query = attention.add_q_proj, attention.norm_added_q
        self.to_key, self.norm_key = attention.add_k_proj, attention.norm_added_k
        self.to_value, self.to_out = attention.add_v_proj, attention.to_add_out
        self.heads = attention.heads
        self.norm_2, self.feed_forward = block.norm2_context, block.ff_context

    def forward(
        self,
        text: Tensor,
        modulation: Tensor,
        turn: Turn | None,
        image_keys: Tensor,
        image_values: Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        read, (gate, shift, scale, gate_2) = self.read(text, modulation, turn, image_keys, image_values, mask)
        text = text + gate * self.to_out(read)
        text = text + gate_2 * self.feed_forward(self.norm_2(text) * (1 + scale) + shift)
        # Where float16 ends, Flux goes on with its largest number.
        return text.clip(-65504, 65504) if text.dtype == torch.float16 else text

    def read(
        self,
        text: Tensor,
        modulation: Tensor,
        turn: Turn | None,
        image_keys: Tensor,
        image_values: Tensor,
        mask: Tensor | None,
    ) -> tuple[Tensor, list[Tensor]]:
        """What the text reads, `[T, L, heads * d]`, and the gate, shift, scale and gate for what follows."""
        normed, *rest = self.norm(text, modulation)
        return self.attend(normed, turn, image_keys, image_values, mask), rest


class SingleKeys(nn.Module):
    """`TextKeys` of a single-stream block."""

    def __init__(self, block: SingleBlock):
        super().__init__()
        attention = block.attn
        self.norm, self.to_key, self.norm_key = block.norm, attention.to_k, attention.norm_k
        self.heads = attention.heads

    def forward(self, text: Tensor, modulation: Tensor, turn: Turn | None) -> Tensor:
        normed, _ = self.norm(text, emb=modulation)
        return rotated(by_head(self.to_key(normed), self.heads, self.norm_key), turn)


class SingleStep(_Attends):
    """`TextStep` of a single-stream block: attention and feed-forward beside each other, then one projection."""

    def __init__(self, block: SingleBlock):
        super().__init__()
        attention = block.attn
        self.norm, self.heads = block.norm, attention.heads
        self.to_query, self.to_key, self.to_value = attention.to_q, attention.to_k, attention.to_v
        self.norm_query, self.norm_key = attention.norm_q, attention.norm_k
        self.widen, self.activate, self.to_out = block.proj_mlp, block.act_mlp, block.proj_out

    def forward(
        self,
        text: Tensor,
        modulation: Tensor,
        turn: Turn | None,
        image_keys: Tensor,
        image_values: Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        normed, gate = self.norm(text, emb=modulation)
        read = self.attend(normed, turn, image_keys, image_values, mask)
        both = torch.cat([read, self.activate(self.widen(normed))], dim=2)
        text = text + gate[:, None] * self.to_out(both)
        return text.clip(-65504, 65504) if text.dtype == torch.float16 else text


class TextRead(nn.Module):
    """The first half of a step: what one prompt's tokens read, `[T, L, heads * d]`, before the output projection."""

    def __init__(self, step: TextStep):
        super().__init__()
        self.step = step

    def forward(
        self, text: Tensor, modulation: Tensor, turn: Turn | None, image_keys: Tensor, image_values: Tensor
    ) -> Tensor:
        return self.step.read(text, modulation, turn, image_keys, image_values, None)[0]


class _ModulatedNorm(nn.Module):
    """The block's own norm: the text made ready for attention; gate, shift, scale and gate `[T, 1, C]` for the rest."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.norm = norm

    def forward(self, text: Tensor, modulation: Tensor) -> tuple[Tensor, ...]:
        normed, *rest = self.norm(text, emb=modulation)
        return normed, *(x[:, None] for x in rest)


class _LastNorm(_ModulatedNorm):
    """The same in the last block of Stable Diffusion 3, where the text ends at its keys and values."""

    def forward(self, text: Tensor, modulation: Tensor) -> tuple[Tensor, ...]:
        return (self.norm(text, modulation),)


class _SharedNorm(_ModulatedNorm):
    """The same in Flux 2, where the modulation `[T, 6 C]` is made once for all blocks, not from `[T, C]` in each."""

    def forward(self, text: Tensor, modulation: Tensor) -> tuple[Tensor, ...]:
        shift, scale, *rest = modulation[:, None].chunk(6, dim=-1)
        return self.norm(text) * (1 + scale) + shift, *rest


def _adaptive_norm(block: JointBlock) -> _ModulatedNorm:
    if getattr(block, "context_pre_only", False):
        return _LastNorm(block.norm1_context)
    if isinstance(block.norm1_context, nn.LayerNorm):
        return _SharedNorm(block.norm1_context)
    return _ModulatedNorm(block.norm1_context)


def _prompt_mask(sizes: Sequence[int], n: int, device: torch.device) -> Tensor | None:
    """What a token may read: those of its own prompt and all `n` pixels, bool `[L, L + n]`; None for one prompt."""
    if len(sizes) == 1:
        return None
    prompt = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).to(device)
    return F.pad(prompt[:, None] == prompt, (0, n), value=True)
