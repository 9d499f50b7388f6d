"""What is kept of one generated image, or of a photograph's passes: enough for the heatmap of any word afterwards."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from ovam_core.attention.affinity import Affinity
from ovam_core.attention.modules import unbound
from ovam_core.attention.reading import Reading
from ovam_core.attention.rows import common, rows_of
from ovam_core.attention.text_stream import TextStream
from ovam_core.errors import InputError

Branch = Literal["conditional", "unconditional", "all"]
BRANCHES = get_args(Branch)
# Layers that are left out unless they are named: of a UNet as in the paper, of Flux for their number.
UNASKED = ("mid_block", "single_transformer_blocks")


@dataclass(frozen=True, eq=False)
class LayerQueries:
    """What one cross-attention layer asked, for one image.

    queries: `[T, heads, n, d]`, n = height * width, row-major, in the storage dtype; normalised and rotated where the
    model does so. On a CPU they are asked fastest where they are `laid_out`.
    keys: the model's own way from embedding to keys, `[L, embed_dim]` -> `[L, heads * d]` (`to_k` in a UNet); None
    where they come from the recording's text stream.
    scale: factor of the products before the softmax, 1 / sqrt(d) (Eq. 3).
    steps: of the rows of `queries`, numbers of the run; None: those of the recording. A cache may have skipped some.
    dtype: what the layer computed in, see `call_frozen`. made: the keys of a probe at the end of the run, by which it
    is noticed that the weights have changed; None where that was not asked.
    """

    name: str
    height: int
    width: int
    queries: Tensor
    keys: nn.Module | None
    scale: float
    steps: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None
    made: Tensor | None = None

    @property
    def resolution(self) -> int:
        """The larger side of the layer's grid."""
        return max(self.height, self.width)

    def at(self, kept: tuple[int, ...], steps: tuple[int, ...]) -> LayerQueries:
        """The layer, whose rows are of `steps`, with those of the kept ones."""
        return replace(self, queries=rows_of(self.queries, steps, kept), steps=kept)

    def detached(self) -> LayerQueries:
        """As `Recording.detached`."""
        keys = None if self.keys is None else unbound(self.keys)
        return replace(self, queries=self.queries.cpu(), keys=keys, made=None if self.made is None else self.made.cpu())


def empty_queries(shape: Sequence[int], **options: Any) -> Tensor:
    """`torch.empty` of `[T, heads, n, d]`; on a CPU (pinned memory is another device's) in the order of `laid_out`."""
    if torch.device(options["device"]).type != "cpu" or options.get("pin_memory"):
        return torch.empty(tuple(shape), **options)
    steps, heads, n, d = shape
    return torch.empty(heads, d, steps, n, **options).permute(2, 0, 3, 1)


def is_laid_out(queries: Tensor) -> bool:
    """Whether all pixels of all steps lie in a row, for each channel of a head."""
    steps, _, n, _ = queries.shape
    return queries.stride(2) == 1 and (steps == 1 or queries.stride(0) == n)


def _are_a_cpus(queries: Tensor) -> bool:
    return queries.device.type == "cpu" and not queries.is_pinned()


def laid_out(queries: Tensor) -> Tensor:
    """Queries `[T, heads, n, d]` in the order in memory in which a CPU multiplies them fastest: one product a head, in
    place of one a head and step, along pixels. As they are on another device, or in memory that is pinned for one.
    """
    if not _are_a_cpus(queries) or is_laid_out(queries):
        return queries
    return empty_queries(queries.shape, dtype=queries.dtype, device=queries.device).copy_(queries)


# Values of a recording's queries, 64 MiB, up to which layers are laid side by side, which copies them.
SMALL = 1 << 24


def alike(layers: Iterable[LayerQueries]) -> list[list[LayerQueries]]:
    """Layers of one grid, width of a head, dtype and scale, with as many steps, together."""
    found: dict[Any, list[LayerQueries]] = {}
    for x in layers:
        steps, _, n, width = x.queries.shape
        found.setdefault((x.height, x.width, n, steps, width, x.queries.dtype, x.scale), []).append(x)
    return list(found.values())


def side_by_side(layers: Sequence[LayerQueries]) -> tuple[LayerQueries, ...]:
    """Layers with their queries `laid_out`, those that are `alike` behind each other in memory: a CPU asks them as one
    (`joint`), as of small grids what surrounds a product takes longer than it does. More than SMALL each on its own.
    """
    laid = {x.name: replace(x, queries=laid_out(x.queries)) for x in layers}
    if sum(x.queries.numel() for x in layers) > SMALL or not all(_are_a_cpus(x.queries) for x in layers):
        return tuple(laid.values())
    for ones in alike(layers):
        if joint(ones) is not None:
            continue
        (steps, _, n, width), heads = ones[0].queries.shape, [x.queries.shape[1] for x in ones]
        store = empty_queries((steps, sum(heads), n, width), dtype=ones[0].queries.dtype, device=torch.device("cpu"))
        for part, x in zip(store.split(heads, dim=1), ones, strict=True):
            laid[x.name] = replace(x, queries=part.copy_(x.queries))
    return tuple(laid.values())


def joint(layers: Sequence[LayerQueries]) -> Tensor | None:
    """The queries of layers that are `alike` as those of one layer, `[T, all heads, n, d]`, a view; None where they do
    not lie behind each other.
    """
    first, heads = layers[0].queries, 0
    for x in layers:
        place = first.storage_offset() + heads * first.stride(1)
        same = x.queries.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (same and x.queries.stride() == first.stride() and x.queries.storage_offset() == place):
            return None
        heads += x.queries.shape[1]
    steps, _, n, width = first.shape
    return first.as_strided((steps, heads, n, width), first.stride()) if is_laid_out(first) else None


@dataclass(frozen=True, eq=False)
class LayerColumnSums:
    """How much attention each pixel received in one self-attention layer: float32 `[T, height * width]`.

    Summed over heads and over the pixels that attend, so each row of `sums` adds up to heads * n. steps: of the rows,
    as in LayerQueries.
    """

    name: str
    height: int
    width: int
    sums: Tensor
    steps: tuple[int, ...] | None = None

    def at(self, kept: tuple[int, ...], steps: tuple[int, ...]) -> LayerColumnSums:
        """As `LayerQueries.at`."""
        return replace(self, sums=rows_of(self.sums, steps, kept), steps=kept)


@dataclass(frozen=True, eq=False)
class LayerOutputs:
    """What each pixel read in one joint attention, before the output projection: `[T, height * width, heads * d]`.

    In the storage dtype. steps: of the rows, as in LayerQueries.
    """

    name: str
    height: int
    width: int
    outputs: Tensor
    steps: tuple[int, ...] | None = None

    def at(self, kept: tuple[int, ...], steps: tuple[int, ...]) -> LayerOutputs:
        """As `LayerQueries.at`."""
        return replace(self, outputs=rows_of(self.outputs, steps, kept), steps=kept)


AnyLayer = TypeVar("AnyLayer", LayerQueries, LayerColumnSums, LayerOutputs)


@dataclass(frozen=True, eq=False)
class Recording:
    """All that is needed to ask for the heatmap of any word of one generated image.

    height, width: size of the heatmaps, the largest attention grid of the run (64 x 64 for SD 1.5 at 512 px).
    image_size: (height, width) of the image in pixels.
    timesteps: the scheduler's timestep of each kept step; step_indices: its number in the run, from 0. A step is
    one call of the denoiser: second-order schedulers (Heun, KDPM2) and PNDM call it more often than
    `num_inference_steps`. Where a cache (DeepCache, FasterCache, ...) skipped a layer at some of them, the layer's own
    `steps` are fewer, and all means are over the attention maps that there are.
    stream: with joint attention, what carries words to their keys; None with cross-attention. Its tensors are up to
    twice the size of the queries. reading: how the run's prompt was read, which is how words are to be; None where that
    is not known. affinities: on request, the self-attention of each grid as a matrix, the finest first: a mean over the
    recorded steps that the model recommends, whichever are selected. outputs: on request, what the pixels read in some
    joint attentions.
    The keys come from the pipeline's own layers as they were set in the run: the scale of a LoRA then, and not what is
    set, loaded or unloaded afterwards. Weights that have themselves changed are refused (`check_same`).
    """

    layers: tuple[LayerQueries, ...]
    column_sums: tuple[LayerColumnSums, ...]
    timesteps: tuple[int, ...]
    step_indices: tuple[int, ...]
    height: int
    width: int
    image_size: tuple[int, int]
    embed_dim: int
    branch: Branch
    stream: TextStream | None = None
    reading: Reading | None = None
    affinities: tuple[Affinity, ...] = ()
    outputs: tuple[LayerOutputs, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes held by the queries, the column sums, the text stream, and what was kept on request."""
        tensors = [x.queries for x in self.layers] + [x.sums for x in self.column_sums]
        tensors += [x.matrix for x in self.affinities] + [x.outputs for x in self.outputs]
        held = sum(x.numel() * x.element_size() for x in tensors)
        return held if self.stream is None else held + self.stream.nbytes

    @property
    def resolutions(self) -> tuple[int, ...]:
        """The larger grid side of the recorded layers, each once, from the largest down."""
        return tuple(sorted({x.resolution for x in self.layers}, reverse=True))

    def select(
        self,
        steps: Iterable[int] | None = None,
        layers: Iterable[str] | None = None,
        resolutions: Iterable[int] | None = None,
    ) -> Recording:
        """The same recording with only some steps, layers or resolutions.

        steps: step numbers of the run (members of `step_indices`); layers: names or parts of names;
        resolutions: larger grid sides. None keeps all. Evenly spaced steps are views of the same memory, others
        are copied. Column sums follow `steps` only. The heatmap size stays. A layer that a cache skipped at all of
        these steps is left out, with a warning. Raises InputError when nothing is left.
        """
        kept = list(self.layers) if layers is None else named(self.layers, layers, lambda x: x.name)
        if resolutions is not None:
            wanted = set(resolutions)
            kept = [x for x in kept if x.resolution in wanted]
        if not kept:
            choice = f"the resolutions {', '.join(map(str, self.resolutions))}"
            if layers is not None:
                choice += f" and the layers {', '.join(x.name for x in self.layers)}"
            raise InputError(f"No recorded layer matches: choose among {choice}.")
        read = [x.name for x in self.outputs]
        stream = None if self.stream is None else self.stream.up_to([x.name for x in kept], read)
        if steps is None:
            return replace(self, layers=tuple(kept), stream=stream)

        chosen = common(self.step_indices, set(steps))
        if not chosen:
            raise InputError(f"None of these steps was recorded: choose among {_ranges(self.step_indices)}.")
        there = self._at(kept, chosen)
        if not there:
            own = sorted({step for x in kept for step in self._steps_of(x)})
            raise InputError(
                f"The run took these layers from a cache at the steps {_listed(chosen)}: choose among {_listed(own)}."
            )
        if len(there) < len(kept):
            skipped = ", ".join(sorted({x.name for x in kept} - {x.name for x in there}))
            warnings.warn(
                f"The run took these layers from a cache at the steps {_listed(chosen)}, so they are not in the maps: "
                f"{skipped}.",
                stacklevel=2,
            )
        numbers = self.step_indices
        return replace(
            self,
            layers=tuple(there),
            column_sums=tuple(self._at(self.column_sums, chosen)),
            outputs=tuple(self._at(self.outputs, chosen)),
            timesteps=tuple(at for at, number in zip(self.timesteps, numbers, strict=True) if number in chosen),
            step_indices=chosen,
            stream=None if stream is None else stream.at(chosen),
        )

    def _steps_of(self, layer: LayerQueries | LayerColumnSums | LayerOutputs) -> tuple[int, ...]:
        return self.step_indices if layer.steps is None else layer.steps

    def _at(self, layers: Sequence[AnyLayer], chosen: tuple[int, ...]) -> list[AnyLayer]:
        """The layers with those of their own rows that are chosen; without the layers that have none."""
        own = [(x, self._steps_of(x)) for x in layers]
        return [x.at(common(steps, chosen), steps) for x, steps in own if common(steps, chosen)]

    def to(self, device: torch.device | str) -> Recording:
        """The same recording with its tensors on `device`. The model's layers stay where they are."""
        return replace(
            self,
            layers=tuple(replace(x, queries=x.queries.to(device)) for x in self.layers),
            column_sums=tuple(replace(x, sums=x.sums.to(device)) for x in self.column_sums),
            stream=None if self.stream is None else self.stream.each(lambda x: x.to(device)),
            affinities=tuple(x.to(device) for x in self.affinities),
            outputs=tuple(replace(x, outputs=x.outputs.to(device)) for x in self.outputs),
        )

    def detached(self) -> Recording:
        """The same in host memory and with none of the model's modules: tensors, and the names of layers.

        It can be written to a file or sent to another process, and be asked once it is bound to the model's own layers
        again (`OVAM.bind`).
        """
        return replace(
            self.to("cpu"),
            layers=tuple(x.detached() for x in self.layers),
            stream=None if self.stream is None else self.stream.detached(),
        )


def named(items: Iterable, parts: Iterable[str] | str | None, name_of: Callable[[Any], str]) -> list:
    """Those of `items` whose name contains one of `parts` (None: any); UNASKED ones only when a part says so."""
    # A lone string is one name, not an iterable of letters.
    parts = [parts] if isinstance(parts, str) else [""] if parts is None else list(parts)

    def wanted(name: str) -> bool:
        return any(part in name and all(x in part or x not in name for x in UNASKED) for part in parts)

    return [x for x in items if wanted(name_of(x))]


def along_stream(
    layers: Sequence[LayerQueries], stream: TextStream | None
) -> tuple[tuple[LayerQueries, ...], TextStream | None]:
    """Layers and the text stream that leads to them, each with the steps at which a word comes to it.

    layers: with steps of their own. Those that no word comes to are left out.
    """
    if stream is None:
        return tuple(layers), None
    own = {x.name: x.steps or () for x in layers}
    steps, blocks = stream.steps, []
    for block in stream.blocks:
        steps = common(common(steps, block.steps), own.get(block.name, steps))
        if not steps:
            break
        blocks.append(block.at(steps))
    reached = {block.name: block.steps for block in blocks}
    kept = [x.at(reached[x.name], x.steps or ()) for x in layers if x.name in reached]
    return tuple(kept), replace(stream, blocks=tuple(blocks))


def _listed(steps: Iterable[int]) -> str:
    return ", ".join(map(str, steps))


def _ranges(indices: tuple[int, ...]) -> str:
    return f"{indices[0]} to {indices[-1]}" if len(indices) > 1 else str(indices[0])
