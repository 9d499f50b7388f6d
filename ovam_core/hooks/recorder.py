"""Hook a diffusers pipeline and keep the pixel queries of its cross-attentions (section 3.2 of the paper).

    with record(pipe) as recorder:
        image = pipe("a photograph of a cat").images[0]
    recording = recorder.recordings[0]

The hooks only read: the image is bit-identical to one made without them, and none is left afterwards.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from ovam_core.attention.affinity import Affinity, check_size
from ovam_core.attention.heads import Attention
from ovam_core.attention.heatmap import tried_keys
from ovam_core.attention.modules import LoraSettings, as_set, lora_settings
from ovam_core.attention.recording import (
    BRANCHES,
    Branch,
    LayerColumnSums,
    LayerOutputs,
    LayerQueries,
    Recording,
    along_stream,
    empty_queries,
    named,
    side_by_side,
)
from ovam_core.attention.rows import Rows
from ovam_core.attention.text_stream import TextStream
from ovam_core.errors import InputError
from ovam_core.models.adapter import Call, Form, Pipeline, Take, projection_of, sources
from ovam_core.models.listeners import EVERY_ROW
from ovam_core.models.presets import defaults_for
from ovam_core.models.registry import adapter_of

Made = TypeVar("Made")  # the kind of recording
Subject = TypeVar("Subject")  # what a hook is told beside a module's output

NO_CALL = Call(batch=0, height=0, width=0, timestep=0)  # before the denoiser's first
MATRIX, OUTPUTS = "matrix", "outputs"  # what is kept on request


def record(
    pipe: Pipeline,
    *,
    branch: Branch = "conditional",
    steps: Iterable[int] | None = None,
    layers: Iterable[str] | None = None,
    resolutions: Iterable[int] | None = None,
    self_attention: bool = True,
    offload: bool = False,
    dtype: torch.dtype | None = None,
    keep: Iterable[str] = (),
    mirrored: Iterable[int] = (),
) -> Recorder:
    """Record one call of `pipe` inside the `with` block; see the module's docstring.

    branch: which half of the guided batch to keep. The paper's is "conditional"; the authors' published code
        keeps "unconditional". "all" keeps every item of the batch as an image of its own: for direct calls of
        the UNet or transformer, where the pipeline's guidance says nothing.
    steps: numbers of the denoiser's calls to keep, from 0 (default all). Memory is proportional to their count; with
        joint attention it is up to three times that of the queries, as the image's keys and values are kept beside
        them, in every block up to the last one of `layers`.
    layers: names or parts of names, as in `pipe.unet.named_modules()` (`pipe.transformer`). Default: every
        cross-attention, in a UNet those of the down and up blocks, as in the paper. The mid block is kept only if a
        part says "mid_block", the single-stream blocks of Flux only if one says "single_transformer_blocks".
    resolutions: larger grid sides to keep, such as {16, 8} (default all).
    self_attention: also keep the column sums of the highest-resolution self-attentions (Eq. 8); float32 [T, n] a
        layer. Made in blocks of rows: about twice COLUMN_BLOCK_BYTES at a time, never [heads, n, n].
    offload: move the queries, and keys and values beside them, to host memory as they come (pinned, if the model runs
        on CUDA).
    dtype: storage dtype of the same (default: the model's).
    keep: "matrix", the self-attention of each grid as a matrix, mean over layers, heads and those of the kept steps
        that the model recommends: float32 [n, n],
        67 MB for a grid of 64 x 64, and a fifteenth of that for all coarser ones; more than 96 x 96 are refused.
        "outputs", what the pixels read in the joint attentions of `Adapter.output_names`, in the storage dtype [T, n,
        channels]: for Flux at 1024 pixels 100 MB a step, for Stable Diffusion 3 13 MB.
    mirrored: numbers of calls that see the image in a mirror: all that is recorded of them is turned back.

    Raises InputError for a pipeline of no family in `registry`, and at the end of the block when nothing was caught.
    """
    kept = frozenset(keep)
    if unknown := sorted(kept - {MATRIX, OUTPUTS}):
        raise InputError(f"There is no '{str(unknown[0])[:40]}' to keep; choose among {MATRIX} and {OUTPUTS}.")
    return Recorder(pipe, branch, steps, layers, resolutions, self_attention, offload, dtype, kept, frozenset(mirrored))


class _Removable(Protocol):
    def remove(self) -> None: ...


class Hooked(ABC, Generic[Made]):
    """A context manager whose hooks listen to one call of a pipeline; what it caught are its `recordings`.

    A subclass says what to hook (`_attach`), what to forget (`_reset`) and what was caught (`_finish`). The hooks
    return nothing, so none changes what the model computes, but for those of S-CFG (guidance.py).
    """

    def __init__(self, pipe: Pipeline, branch: Branch):
        if branch not in BRANCHES:
            raise InputError(f"branch is {branch!r}: choose 'conditional', 'unconditional' or 'all'.")
        self.recordings: list[Made] = []
        self._pipe = pipe
        self._branch = branch
        self._adapter = adapter_of(pipe)
        self._handles: list[_Removable] = []
        self._heard: set[str] = set()  # attentions of which a hook has been called, kept or not
        self._lora: LoraSettings | None = None  # what the denoiser's LoRA layers were set to within the run
        self._call = NO_CALL  # what the denoiser was given
        self._images = slice(0)  # the wanted part of the batch

    @abstractmethod
    def _attach(self, on: Callable[[_Removable], None]) -> None:
        """Hooks what is to be heard, and hands every handle to `on`."""

    @abstractmethod
    def _reset(self) -> None:
        """Forgets what was caught."""

    @abstractmethod
    def _finish(self) -> list[Made]:
        """The recordings of what was caught. Raises InputError where that is nothing."""

    def __enter__(self) -> Self:
        if self._handles:
            raise InputError("This recorder is already in use: make a new one.")
        self._reset()
        self.recordings, self._lora, self._heard = [], None, set()
        if self._branch != "all" and not self._adapter.parts_known:
            raise InputError(
                f"What the rows of a batch of this {type(self._pipe).__name__} mean is not known: use a text-to-image "
                f"pipeline of the same model, or {EVERY_ROW}"
            )
        self._listener = self._adapter.listen()
        self._listener.on_step = self._check_heard
        self._handles.append(self._listener)
        self._attach(self._handles.append)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        try:
            if kind is None:
                self.recordings = self._finish()
        finally:
            self._reset()

    def _note_settings(self) -> None:
        """What holds for the run alone, from within a call: diffusers takes its LoRA scale back at its end."""
        if self._lora is None:
            self._lora = lora_settings(self._adapter.denoiser)

    def _as_in_run(self, module: nn.Module) -> nn.Module:
        return as_set(module, self._lora or {})

    def _own(self, name: str, output: Tensor) -> Tensor | None:
        """A module's output for the wanted images; None where a cache left them out of the batch."""
        batch = self._call.batch
        if len(output) == batch:
            return output[self._images]
        parts = self._listener.parts
        if parts.perturbed and len(output) * parts.count == batch * (parts.count - parts.perturbed):
            return None if self._branch == "all" else output[self._images]
        if 2 * len(output) == batch and self._branch != "all" and self._listener.guided:
            # FasterCache makes out the negative half at some steps, and passes on the positive one alone.
            return output if self._branch == "conditional" else None
        raise InputError(f"The layer {name} computed {len(output)} parts of a batch of {batch}: it cannot be recorded.")

    def _wanted_images(self, batch: int) -> slice:
        """The part of the denoiser's batch that the branch means."""
        if self._branch == "all":
            return slice(0, batch)
        return self._listener.images(self._branch, batch)

    def _check_heard(self, calls: int = 1) -> None:
        """Raises InputError where no hook of an attention was called: at the first step, before the image is made."""
        denoiser = self._adapter.denoiser
        if not self._heard and (calls or is_compiled(denoiser)):
            raise InputError(f"Nothing can be recorded: {why_unheard(denoiser)}")

    def _check_all_heard(self, names: Collection[str]) -> None:
        """Raises InputError where a part of the model is compiled, and with it some of these attentions."""
        denoiser = self._adapter.denoiser
        unheard = [name for name in names if name not in self._heard]
        if unheard and is_compiled(denoiser):
            raise InputError(f"The layer {unheard[0]} cannot be recorded: {why_unheard(denoiser)}")


class Recorder(Hooked[Recording]):
    """Context manager made by `record`. `recordings` holds one Recording an image, as ordered in `pipe(...).images`."""

    def __init__(
        self,
        pipe: Pipeline,
        branch: Branch,
        steps: Iterable[int] | None,
        layers: Iterable[str] | None,
        resolutions: Iterable[int] | None,
        self_attention: bool,
        offload: bool,
        dtype: torch.dtype | None,
        keep: frozenset[str],
        mirrored: frozenset[int],
    ):
        super().__init__(pipe, branch)
        self._steps = None if steps is None else frozenset(steps)
        self._resolutions = None if resolutions is None else frozenset(resolutions)
        self._offload = offload
        self._copied_from: set[torch.device] = set()
        self._dtype = dtype
        self._cross_attentions, self._self_attentions = self._adapter.attentions()
        self._kept_names = set(named(self._cross_attentions, layers, str))
        names = self._adapter.output_names if OUTPUTS in keep else ()
        if OUTPUTS in keep and not names:
            raise InputError(
                f"What pixels read in joint attention is not there in {self._adapter.name}: load a model of Stable "
                "Diffusion 3, Flux or Flux 2, or choose another method."
            )
        self._read = {name: self._cross_attentions[name] for name in names}
        self._beside = self._adapter.beside_queries(self._kept_names | self._read.keys(), bool(names))
        self._received, self._matrix, self._mirrored = self_attention, MATRIX in keep, mirrored
        if not self_attention and not self._matrix:
            self._self_attentions = {}
        self._reset()

    def _reset(self) -> None:
        self._schedule: Any = None  # the scheduler's timesteps of this run, to notice a second one
        self._number = -1  # of the denoiser's call going on
        self._call = NO_CALL  # what it was given
        self._keeping = False  # whether that call is one of the wanted steps
        self._images = slice(0)  # the wanted part of the batch
        self._largest = (0, 0)  # largest attention grid seen
        self._timesteps: list[Tensor | float] = []
        self._step_indices: list[int] = []
        self._queries: dict[str, dict[int, Tensor]] = {}  # of each layer, by the number of the step
        self._dtypes: dict[str, torch.dtype] = {}  # what the layers compute in
        self._grids: dict[str, tuple[int, int]] = {}
        self._waiting: dict[str, Tensor] = {}  # self-attention queries until their keys come
        self._sums: dict[str, dict[int, Tensor]] = {}
        self._streamed: dict[str, dict[int, Tensor]] = {}  # what the adapter keeps beside the queries
        self._matrices: dict[tuple[int, int], _Matrix] = {}  # of each grid
        self._outputs: dict[str, dict[int, Tensor]] = {}

    def _attach(self, on: Callable[[_Removable], None]) -> None:
        on(self._adapter.denoiser.register_forward_pre_hook(self._on_call, with_kwargs=True))
        for name, attention in self._cross_attentions.items():
            for module, take in sources(attention, "to_q"):
                on(module.register_forward_hook(self._hook(self._on_query, name, attention, take)))
        for name, attention in self._self_attentions.items():
            for module, take in sources(attention, "to_q"):
                on(module.register_forward_hook(self._hook(self._on_self_query, name, attention, take)))
            for module, take in sources(attention, "to_k"):
                on(module.register_forward_hook(self._hook(self._on_self_key, name, attention, take)))
        for name, attention in self._read.items():
            out = projection_of(attention, "to_out")[0]
            on(out.register_forward_pre_hook(self._before(self._hook(self._on_output, name, attention))))
        for name, made in self._beside.items():
            for module, form in made:
                on(module.register_forward_hook(self._hook(self._on_beside, name, form)))

    def _hook(
        self,
        method: Callable[[str, Subject, Tensor], None],
        name: str,
        subject: Subject,
        take: Take = lambda output: output,
    ) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: tuple, output: Tensor) -> None:
            self._heard.add(name)
            if self._keeping:
                self._note_settings()
                own = self._own(name, take(output.detach()))
                if own is not None:
                    method(name, subject, own)

        return hook

    @staticmethod
    def _before(hook: Callable[..., None]) -> Callable[..., None]:
        """A hook on a module's output as one on its input."""
        return lambda module, inputs: hook(module, (), inputs[0])

    def _in_place(self, pixels: Tensor, dim: int) -> Tensor:
        """Pixels along `dim`, at their places in the image where the call saw that in a mirror."""
        if self._number not in self._mirrored:
            return pixels
        grid = self._adapter.grid(pixels.shape[dim], self._call)
        return pixels.unflatten(dim, grid).flip(dim + 1).flatten(dim, dim + 1)

    def _on_call(self, _denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        schedule = getattr(self._pipe.scheduler, "timesteps", None)
        if self._number >= 0 and schedule is not self._schedule:
            raise InputError("record() covers one call of the pipeline: use one `with` block for each call.")
        self._schedule = schedule
        self._keeping = False
        if not self._listener.counts(kwargs):
            return
        self._number += 1
        self._call = self._adapter.call(args, kwargs)
        self._images = self._wanted_images(self._call.batch)
        self._keeping = self._steps is None or self._number in self._steps
        if self._keeping:
            timestep = self._call.timestep
            self._timesteps.append(timestep.flatten()[0] if isinstance(timestep, Tensor) else timestep)
            self._step_indices.append(self._number)

    def _on_query(self, name: str, attention: Attention, query: Tensor) -> None:
        query = self._adapter.image_part(query, self._call)
        grid = self._adapter.grid(query.shape[1], self._call)
        self._largest = max(self._largest, grid, key=lambda x: x[0] * x[1])
        if name not in self._kept_names:
            return
        if self._resolutions is not None and max(grid) not in self._resolutions:
            return
        self._grids[name] = grid
        self._dtypes[name] = query.dtype
        query = self._adapter.queries(attention, query, self._call)
        self._queries.setdefault(name, {})[self._number] = self._stored(self._in_place(query, 2))

    def _stored(self, query: Tensor) -> Tensor:
        """A copy of its own, else the view would keep the whole batch alive."""
        dtype = self._dtype or query.dtype
        pinned = self._offload and query.is_cuda
        if pinned:
            self._copied_from.add(query.device)
        device = "cpu" if self._offload else query.device
        store = torch.empty(query.shape, dtype=dtype, device=device, pin_memory=pinned)
        return store.copy_(query, non_blocking=pinned)

    def _on_beside(self, name: str, form: Form, output: Tensor) -> None:
        made = form(output, self._call)
        made = self._in_place(made, 2) if made.ndim == 4 else made  # keys and values, and no modulation
        self._streamed.setdefault(name, {})[self._number] = self._stored(made)

    def _on_output(self, name: str, _attention: Attention, output: Tensor) -> None:
        self._grids[name] = self._adapter.grid(output.shape[1], self._call)
        self._outputs.setdefault(name, {})[self._number] = self._stored(self._in_place(output, 1))

    def _on_self_query(self, name: str, _attention: Attention, query: Tensor) -> None:
        self._waiting[name] = query

    def _on_self_key(self, name: str, attention: Attention, key: Tensor) -> None:
        query = self._waiting.pop(name, None)
        if query is None or key.shape[1] != query.shape[1]:
            return
        largest = max((h * w for h, w in (self._grids[x] for x in self._sums)), default=0)
        counted = self._received and query.shape[1] >= largest
        if not counted and not self._matrix:
            return
        grid, scale = self._adapter.grid(query.shape[1], self._call), self._adapter.scale(attention)
        query = self._in_place(self._adapter.queries(attention, query, self._call), 2)
        key = self._in_place(self._adapter.self_keys(attention, key, self._call), 2)
        if self._matrix:
            self._add_to_matrix(grid, query, key, scale)
        if not counted:
            return
        if query.shape[2] > largest:  # a finer layer: the coarser ones seen before it do not count
            self._sums = {}
        self._grids[name] = grid
        sums = torch.stack([self._adapter.received(q, k, scale) for q, k in zip(query, key, strict=True)])
        self._sums.setdefault(name, {})[self._number] = sums.cpu() if self._offload else sums

    def _add_to_matrix(self, grid: tuple[int, int], query: Tensor, key: Tensor, scale: float) -> None:
        if grid not in self._matrices:
            check_size(*grid)
            n = query.shape[2]
            self._matrices[grid] = _Matrix([query.new_zeros(n, n, dtype=torch.float32) for _ in query])
        matrix, recommended = self._matrices[grid], self._is_recommended()
        if recommended and not matrix.recommended:
            matrix.restart()
        elif matrix.recommended and not recommended:
            return
        for total, one, other in zip(matrix.totals, query, key, strict=True):
            self._adapter.add_attention(total, one, other, scale)
        matrix.count += 1

    def _finish(self) -> list[Recording]:
        self._check_heard(self._number + 1)
        self._check_all_heard(self._kept_names | self._self_attentions.keys())
        if self._number < 0:
            raise InputError("Nothing was recorded: call the pipeline inside the `with record(pipe)` block.")
        if not self._queries:
            raise InputError(
                f"Nothing was recorded: the run had {self._number + 1} steps and its largest attention grid was "
                f"{self._largest[0]} x {self._largest[1]}; check steps, layers and resolutions."
            )
        for device in self._copied_from:
            torch.cuda.synchronize(device)  # the copies to pinned memory are asynchronous
        sums = {name: _by_image(self._sums[name]) for name in self._self_attentions if name in self._sums}
        read = {name: _by_image(self._outputs.pop(name)) for name in self._read if name in self._outputs}
        images = self._layers()
        streams = self._streams(len(images))
        reading = self._adapter.reading
        height, width = self._largest
        factor = self._pipe.vae_scale_factor
        recordings = []
        for image, (layers, stream) in enumerate(zip(images, streams, strict=True)):
            reached, stream = along_stream(layers, stream)
            recordings.append(
                Recording(
                    layers=reached,
                    column_sums=tuple(
                        LayerColumnSums(n, *self._grids[n], x[image].values, x[image].steps) for n, x in sums.items()
                    ),
                    timesteps=tuple(int(t) for t in self._timesteps),
                    step_indices=tuple(self._step_indices),
                    height=height,
                    width=width,
                    image_size=(self._call.height * factor, self._call.width * factor),
                    embed_dim=self._adapter.embed_dim,
                    branch=self._branch,
                    stream=stream,
                    reading=reading,
                    affinities=self._affinities(image),
                    outputs=tuple(
                        LayerOutputs(n, *self._grids[n], x[image].values, x[image].steps) for n, x in read.items()
                    ),
                )
            )
        return recordings

    def _is_recommended(self) -> bool:
        """Whether the call is no noisier than the model's preset wants it for maps."""
        return float(torch.as_tensor(self._call.timestep).flatten()[0]) <= defaults_for(self._pipe).max_timestep

    def _affinities(self, image: int) -> tuple[Affinity, ...]:
        """The mean self-attention of each grid, the finest first."""
        grids = sorted(self._matrices.items(), key=lambda one: -one[0][0] * one[0][1])
        device = "cpu" if self._offload else None
        return tuple(Affinity(*grid, matrix.totals[image].div_(matrix.count).to(device)) for grid, matrix in grids)

    def _layers(self) -> list[list[LayerQueries]]:
        """The layers of each image. The queries that were caught are taken: stacking costs the memory of one layer."""
        images: list[list[LayerQueries]] = []
        for name in [x for x in self._cross_attentions if x in self._queries]:
            attention, (height, width) = self._cross_attentions[name], self._grids[name]
            keys, scale, dtype = self._adapter.keys(attention), self._adapter.scale(attention), self._dtypes.get(name)
            made = None
            if keys is not None:
                keys = self._as_in_run(keys)
                made = tried_keys(keys, self._adapter.embed_dim, dtype)
            empty = torch.empty if keys is None else empty_queries
            for image, rows in enumerate(_by_image(self._queries.pop(name), empty)):
                if image == len(images):
                    images.append([])
                layer = LayerQueries(name, height, width, rows.values, keys, scale, rows.steps, dtype, made)
                images[image].append(layer)
        streamed = any(x.keys is None for layers in images for x in layers)
        return images if streamed else [list(side_by_side(layers)) for layers in images]

    def _streams(self, images: int) -> list[TextStream | None]:
        """The text stream of each image; None with cross-attention."""
        caught = {name: _by_image(self._streamed.pop(name)) for name in self._beside if name in self._streamed}
        streams: list[TextStream | None] = []
        made: dict[str, tuple[Tensor, ...]] = {}
        for image in range(images):
            kept = {name: caught[name][image] if name in caught else None for name in self._beside}
            stream = self._adapter.stream(kept)
            if stream is not None:
                stream = replace(stream.as_set(self._lora or {}), dtype=next(iter(self._dtypes.values()), None))
                made = made or {block.name: now for block, now in stream.tried(self._adapter.embed_dim)}
                stream = replace(stream, blocks=tuple(replace(x, made=made[x.name]) for x in stream.blocks))
            streams.append(stream)
        return streams


@dataclass(eq=False)
class _Matrix:
    """Of one grid: the sum over layers and steps of the self-attention, float32 `[n, n]` an image; of how many."""

    totals: list[Tensor]
    count: int = 0
    recommended: bool = False

    def restart(self) -> None:
        """Forgets the steps that are noisier than the model recommends: the first of the others has come."""
        for total in self.totals:
            total.zero_()
        self.count, self.recommended = 0, True


def is_compiled(denoiser: nn.Module) -> bool:
    """Whether torch.compile was put on a model, its forward, or modules within it."""
    return any(
        hasattr(module, "_orig_mod")
        or getattr(module, "_compiled_call_impl", None) is not None
        or hasattr(module.forward, "_torchdynamo_orig_callable")
        for module in denoiser.modules()
    )


def why_unheard(denoiser: nn.Module) -> str:
    """Why no hook was called, and what to do about it."""
    if is_compiled(denoiser):
        return (
            "the model is compiled, and what was compiled calls no hooks; call the pipeline within "
            "torch.compiler.set_stance('force_eager'), or load the model again and do not compile it."
        )
    kinds = sorted({type(x.processor).__name__ for x in denoiser.modules() if hasattr(x, "processor")})
    return (
        f"the attention layers of this {type(denoiser).__name__} run without to_q and to_qkv, by their processor "
        f"({', '.join(kinds) or 'unknown'}); set the usual one with set_default_attn_processor()."
    )


def _by_image(caught: dict[int, Tensor], empty: Callable[..., Tensor] = torch.empty) -> list[Rows]:
    """Tensors `[images, ...]` by the number of their step to rows for each image, in memory of its own that `empty`
    makes, pinned if they are.
    """
    images, tensors = [], list(caught.values())
    for image in range(tensors[0].shape[0]):
        rows = [tensor[image] for tensor in tensors]
        store = empty(
            (len(rows), *rows[0].shape),
            dtype=rows[0].dtype,
            device=rows[0].device,
            pin_memory=tensors[0].is_pinned(),
        )
        images.append(Rows(tuple(caught), torch.stack(rows, out=store)))
    return images
