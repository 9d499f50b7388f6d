"""GoCA's published settings, model by model, and what takes their place in models of another build.

They are those of the authors' code (arXiv 2603.06178): the layers that count, the middle block among them, how heads
weigh, which layer's features are the reference, along which self-attentions maps are propagated, and how often, and the
noise on a photograph (`Adapter.photo_timestep`). A model of a published build takes them to the letter; in another one
the same places are taken by depth, the blur follows the grid, and in a UNet rows of S sum to one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ovam_core.attention.goca import OURS, PUBLISHED, GocaOptions
from ovam_core.attention.heads import Attention
from ovam_core.errors import InputError
from ovam_core.models.adapter import Adapter
from ovam_core.models.flux import Flux, Flux2
from ovam_core.models.hunyuan_dit import HunyuanDiT
from ovam_core.models.pixart import PixArt
from ovam_core.models.presets import EMBEDDED
from ovam_core.models.registry import model_name
from ovam_core.models.sana import Sana
from ovam_core.models.sdxl import StableDiffusionXL
from ovam_core.models.stable_diffusion_3 import StableDiffusion3


@dataclass(frozen=True)
class GocaBlock:
    """A transformer block by the name of its cross-attention; a joint attention is both."""

    name: str
    cross_attention: Attention
    self_attention: Attention

    @property
    def is_joint(self) -> bool:
        return self.cross_attention is self.self_attention


@dataclass(frozen=True)
class GocaPreset:
    """What GoCA looks at in one model, by names of `goca_blocks`.

    reference: whose features make the reference affinity, its queries, or with of_output its attention's output.
    layers: those that count. options: all else, `propagation` among it. published: whether the model is of a published
    build.
    """

    reference: str
    layers: tuple[str, ...]
    options: GocaOptions
    of_output: bool = False
    published: bool = True


@dataclass(frozen=True)
class _Blocks:
    """The published settings of a transformer, blocks by their numbers of `count` in all. layers: None for all."""

    count: int
    reference: int
    propagation: Sequence[int]
    order: int
    layers: Sequence[int] | None = None
    heads: bool = True
    of_output: bool = False


_PIXART = _Blocks(28, 13, range(10, 18), 5)
_HUNYUAN = _Blocks(40, 25, range(20, 30), 4, range(20, 30), heads=False)
_FLUX = _Blocks(57, 27, (12, 18), 2, heads=False, of_output=True)  # 19 with two streams, then 38 with one
TRANSFORMERS: dict[type[Adapter], _Blocks] = {
    PixArt: _PIXART,
    HunyuanDiT: _HUNYUAN,
    Flux: _FLUX,
    # Not published: the nearest, joint attention as Flux, cross-attention as PixArt.
    Flux2: _FLUX,
    StableDiffusion3: _FLUX,
    Sana: _PIXART,
}
# The embedded model's would lie on the grid of 8 x 8, where an object is a handful of pixels: this one is on 16 x 16.
REFERENCES = {EMBEDDED: "up_blocks.2.attentions.1.transformer_blocks.0.attn2"}
FLUX_FEW = (12, 18, 27, 28, 29)  # blocks of Flux that its authors take where memory is short


def goca_preset(adapter: Adapter) -> GocaPreset:
    """The settings of a model. Raises InputError where it has no block with both attentions."""
    names = [x.name for x in goca_blocks(adapter)]
    blocks = TRANSFORMERS.get(type(adapter))
    if blocks is not None:
        return _of_transformer(names, blocks)
    preset = _of_xl(names) if isinstance(adapter, StableDiffusionXL) else _of_unet(names)
    known = REFERENCES.get(model_name(adapter.pipe))
    return replace(preset, reference=known) if known in names else preset


def short_of_memory(adapter: Adapter) -> GocaPreset:
    """`goca_preset` of Flux with the few layers that its authors take where memory is short (FLUX_FEW).

    Raises InputError for a model that has not Flux's blocks.
    """
    names, whole = [x.name for x in goca_blocks(adapter)], goca_preset(adapter)
    if type(adapter) is not Flux or not whole.published:
        raise InputError("GoCA's shorter list of layers is published for Flux alone: take the usual one.")
    return replace(whole, layers=tuple(names[block] for block in FLUX_FEW))


def goca_blocks(adapter: Adapter) -> list[GocaBlock]:
    """The blocks with a self-attention and a cross-attention, or a joint one, in the order of the denoiser's modules.

    Raises InputError where there is none.
    """
    cross_attentions, self_attentions = adapter.attentions()
    if any(adapter.keys(x) is None for x in cross_attentions.values()):
        return [GocaBlock(name, attention, attention) for name, attention in cross_attentions.items()]
    by_parent = {name.rpartition(".")[0]: attention for name, attention in self_attentions.items()}
    parents = {name: name.rpartition(".")[0] for name in cross_attentions}
    blocks = [
        GocaBlock(name, attention, by_parent[parents[name]])
        for name, attention in cross_attentions.items()
        if parents[name] in by_parent
    ]
    if not blocks:
        raise InputError("This model has no block with a self-attention and a cross-attention, which GoCA needs.")
    return blocks


def _of_transformer(names: list[str], blocks: _Blocks) -> GocaPreset:
    count, published = len(names), len(names) == blocks.count

    def at_depth(block: int) -> int:
        return int((block + 0.5) * count / blocks.count)

    def of(numbers: Sequence[int]) -> tuple[str, ...]:
        return tuple(names[x] for x in dict.fromkeys(map(at_depth, numbers)))

    options = replace(
        PUBLISHED,  # all layers have the same grid, so rows of S are as they are
        heads=blocks.heads,
        propagations=blocks.order,
        propagation=of(blocks.propagation),
        scaled_blur=not published,
    )
    layers = tuple(names) if blocks.layers is None else of(blocks.layers)
    return GocaPreset(names[at_depth(blocks.reference)], layers, options, blocks.of_output, published)


def _of_unet(names: list[str]) -> GocaPreset:
    """Stable Diffusion 1.5's (and 2's, of the same build): the second attention of the last but one up block that has
    any is the reference, `up3.0`, `up3.1` and `down0.1` carry. In others the last up block's first two and the first
    down block's last.
    """
    ups, downs = _levels(names, "up_blocks."), _levels(names, "down_blocks.")
    if not ups:
        return GocaPreset(names[-1], tuple(names), replace(OURS, propagation=None), published=False)
    at_reference = ups[-2:][0]
    carried = (*ups[-1][:2], *(downs[0][-1:] if downs else ()))
    published = [len(x) for x in ups] == [3, 3, 3] and [len(x) for x in downs] == [2, 2, 2]
    options = replace(PUBLISHED if published else OURS, propagation=carried)
    return GocaPreset(at_reference[min(1, len(at_reference) - 1)], tuple(names), options, published=published)


def _of_xl(names: list[str]) -> GocaPreset:
    """SDXL's: the first block of the last up block that has any is the reference; that up block's but for the last, and
    those of the first down block's first attention carry.
    """
    ups, downs = _levels(names, "up_blocks."), _levels(names, "down_blocks.")
    first = [name for name in downs[0] if ".attentions.0." in name] if downs else []
    carried = (*(ups[-1][:-1] or ups[-1]), *first)
    published = [len(x) for x in ups] == [30, 6] and [len(x) for x in downs] == [4, 20]
    options = replace(PUBLISHED if published else OURS, propagation=carried)
    return GocaPreset(ups[-1][0], tuple(names), options, published=published)


def _levels(names: list[str], way: str) -> list[list[str]]:
    """The blocks of a UNet's way, by level, in the order of its modules."""
    levels: dict[str, list[str]] = {}
    for name in names:
        if name.startswith(way):
            levels.setdefault(name.split(".attentions.")[0], []).append(name)
    return list(levels.values())
