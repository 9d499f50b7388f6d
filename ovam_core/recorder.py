"""Hook a diffusers pipeline and keep the pixel queries of its cross-attentions (section 3.2 of the paper).

    with record(pipe) as recorder:
        image = pipe("a photograph of a cat").images[0]
    recording = recorder.recordings[0]

The hooks only read: the image is bit-identical to one made without them, and none is left afterwards.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor

from .families import family_of
from .family import Call
from .joint import TextStream
from .pipeline import defaults_for

Branch = Literal["conditional", "unconditional", "all"]
BRANCHES = get_args(Branch)


@dataclass(frozen=True, eq=False)
class LayerQueries:
    """What one cross-attention layer asked, for one image.

    queries: `[T, heads, n, d]`, n = height * width, row-major, in the storage dtype; normalised and rotated where the
    model does so.
    keys: the model's own way from embedding to keys, `[L, embed_dim]` -> `[L, heads * d]` (`to_k` in a UNet); None where
    they come from the recording's text stream.
    scale: factor of the products before the softmax, 1 / sqrt(d) (Eq. 3).
    """

    name: str
    height: int
    width: int
    queries: Tensor
    keys: Callable[[Tensor], Tensor] | None
    scale: float

    @property
    def resolution(self) -> int:
        """The larger side of the layer's grid."""
        return max(self.height, self.width)


@dataclass(frozen=True, eq=False)
class LayerColumnSums:
    """How much attention each pixel received in one self-attention layer: float32 `[T, height * width]`.

    Summed over heads and over the pixels that attend, so each row of `sums` adds up to heads * n.
    """

    name: str
    height: int
    width: int
    sums: Tensor


@dataclass(frozen=True, eq=False)
class Recording:
    """All that is needed to ask for the heatmap of any word of one generated image.

    height, width: size of the heatmaps, the largest attention grid of the run (64 x 64 for SD 1.5 at 512 px).
    image_size: (height, width) of the image in pixels.
    timesteps: the scheduler's timestep of each kept step; step_indices: its number in the run, from 0. A step is
    one call of the denoiser: second-order schedulers (Heun, KDPM2) and PNDM call it more often than
    `num_inference_steps`.
    stream: with joint attention, what carries words to their keys; None with cross-attention. Its tensors are up to
    twice the size of the queries.
    The keys come from the pipeline's own layers: an adapter loaded or unloaded afterwards changes the maps.
    """

    layers: tuple[LayerQueries, ...]
    column_sums: tuple[LayerColumnSums, ...]
    timesteps: tuple[int, ...]
    step_indices: tuple[int, ...]
    height: int
    width: int
    image_size: tuple[int, int]
    embed_dim: int
    branch: str
    stream: TextStream | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held by the queries, the column sums and the text stream."""
        tensors = [x.queries for x in self.layers] + [x.sums for x in self.column_sums]
        own = sum(x.numel() * x.element_size() for x in tensors)
        return own if self.stream is None else own + self.stream.nbytes

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
        are copied. Column sums follow `steps` only. The heatmap size stays.
        Raises ValueError when nothing is left.
        """
        kept = named(self.layers, layers, lambda x: x.name)
        if resolutions is not None:
            wanted = set(resolutions)
            kept = [x for x in kept if x.resolution in wanted]
        if not kept:
            choice = f"the resolutions {', '.join(map(str, self.resolutions))}"
            if layers is not None:
                choice += f" and the layers {', '.join(x.name for x in self.layers)}"
            raise ValueError(f"No recorded layer matches: choose among {choice}.")
        stream = None if self.stream is None else self.stream.up_to([x.name for x in kept])
        if steps is None:
            return replace(self, layers=tuple(kept), stream=stream)

        wanted = set(steps)
        rows = [row for row, index in enumerate(self.step_indices) if index in wanted]
        if not rows:
            raise ValueError(f"None of these steps was recorded: choose among {_ranges(self.step_indices)}.")
        return replace(
            self,
            layers=tuple(replace(x, queries=_take_rows(x.queries, rows)) for x in kept),
            column_sums=tuple(replace(x, sums=_take_rows(x.sums, rows)) for x in self.column_sums),
            timesteps=tuple(self.timesteps[row] for row in rows),
            step_indices=tuple(self.step_indices[row] for row in rows),
            stream=None if stream is None else stream.each(lambda x: _take_rows(x, rows)),
        )

    def to(self, device: torch.device | str) -> Recording:
        """The same recording with its tensors on `device`. The model's layers stay where they are."""
        return replace(
            self,
            layers=tuple(replace(x, queries=x.queries.to(device)) for x in self.layers),
            column_sums=tuple(replace(x, sums=x.sums.to(device)) for x in self.column_sums),
            stream=None if self.stream is None else self.stream.each(lambda x: x.to(device)),
        )


def own_choice(pipe, recording: Recording) -> Recording:
    """The part of a recording that the model's defaults name: its grids and its timesteps."""
    return own_steps(pipe, own_grids(pipe, recording))


def own_grids(pipe, recording: Recording) -> Recording:
    """The recording with the attention grids that the model's defaults name; with all where they name none of them."""
    strides, side = defaults_for(pipe).strides, max(recording.image_size)
    wanted = [one for one in recording.resolutions if strides is not None and round(side / one) in strides]
    return recording.select(resolutions=wanted or None)


def own_steps(pipe, recording: Recording) -> Recording:
    """The recording without the steps that are noisier than the model's defaults want; with all where none is left."""
    noisiest = defaults_for(pipe).noisiest
    pairs = zip(recording.step_indices, recording.timesteps, strict=True)
    return recording.select(steps=[step for step, timestep in pairs if timestep <= noisiest] or None)


def record(
    pipe,
    *,
    branch: Branch = "conditional",
    steps: Iterable[int] | None = None,
    layers: Iterable[str] | None = None,
    resolutions: Iterable[int] | None = None,
    self_attention: bool = True,
    offload: bool = False,
    dtype: torch.dtype | None = None,
) -> Recorder:
    """Record one call of `pipe` inside the `with` block; see the module's docstring.

    branch: which half of the guided batch to keep. The paper's is "conditional"; the authors' published code
        keeps "unconditional". "all" keeps every item of the batch as an image of its own: for direct calls of
        the UNet or transformer, where the pipeline's guidance says nothing.
    steps: numbers of the denoiser's calls to keep, from 0 (default all). Memory is proportional to their count; with joint
        attention it is up to three times that of the queries, as the image's keys and values are kept beside them, in
        every block up to the last one of `layers`.
    layers: names or parts of names, as in `pipe.unet.named_modules()` (`pipe.transformer`). Default: every
        cross-attention, in a UNet those of the down and up blocks, as in the paper. The mid block is kept only if a
        part says "mid_block".
    resolutions: larger grid sides to keep, such as {16, 8} (default all).
    self_attention: also keep the column sums of the highest-resolution self-attentions (Eq. 8); float32 [T, n] a
        layer. Made in blocks of rows: about twice COLUMN_BLOCK_BYTES at a time, never [heads, n, n].
    offload: move the queries, and keys and values beside them, to host memory as they come (pinned, if the model runs on
        CUDA).
    dtype: storage dtype of the same (default: the model's).

    Raises ValueError for a pipeline of no family in `families`, and at the end of the block when nothing was caught.
    """
    return Recorder(pipe, branch, steps, layers, resolutions, self_attention, offload, dtype)


class Hooked:
    """A context manager whose hooks listen to one call of a pipeline; what it caught are its `recordings`.

    A subclass says what to hook (`_attach`), what to forget (`_reset`) and what was caught (`_finish`).
    """

    def __init__(self, pipe: Any, branch: Branch):
        if branch not in BRANCHES:
            raise ValueError(f"branch is {branch!r}: choose 'conditional', 'unconditional' or 'all'.")
        self.recordings: list = []
        self._pipe = pipe
        self._branch = branch
        self._family = family_of(pipe)
        self._handles: list = []

    def __enter__(self) -> Self:
        if self._handles:
            raise ValueError("This recorder is already in use: make a new one.")
        self._reset()
        self.recordings = []
        self._listener = self._family.listen()
        self._handles.append(self._listener)
        self._attach(self._handles.append)
        return self

    def __exit__(self, kind, error, trace) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        try:
            if kind is None:
                self.recordings = self._finish()
        finally:
            self._reset()

    def _wanted_images(self, batch: int) -> slice:
        """The part of the denoiser's batch that the branch means."""
        if self._branch == "all":
            return slice(0, batch)
        if not self._listener.guided:
            if self._branch == "unconditional":
                raise ValueError("Without guidance there is no unconditional half: record the conditional branch.")
            return slice(0, batch)
        half = batch // 2  # diffusers concatenates [negative, positive]
        return slice(half, batch) if self._branch == "conditional" else slice(0, half)


class Recorder(Hooked):
    """Context manager made by `record`. `recordings` holds one Recording an image, in the order of `pipe(...).images`."""

    def __init__(self, pipe, branch, steps, layers, resolutions, self_attention, offload, dtype):
        super().__init__(pipe, branch)
        self._steps = None if steps is None else frozenset(steps)
        self._resolutions = None if resolutions is None else frozenset(resolutions)
        self._offload = offload
        self._copied_from: set[torch.device] = set()
        self._dtype = dtype
        self._cross, self._self = self._family.attentions()
        self._kept_names = set(named(self._cross, layers, str))
        self._beside = self._family.beside_queries(self._kept_names)
        if not self_attention:
            self._self = {}
        self._reset()

    def _reset(self) -> None:
        self._schedule = None  # the scheduler's timesteps of this run, to notice a second one
        self._number = -1  # of the denoiser's call going on
        self._call: Call | None = None  # what it was given
        self._keeping = False  # whether that call is one of the wanted steps
        self._images = slice(0)  # the wanted part of the batch
        self._largest = (0, 0)  # largest attention grid seen
        self._timesteps: list[Tensor | float] = []
        self._step_indices: list[int] = []
        self._queries: dict[str, list[Tensor]] = {}
        self._grids: dict[str, tuple[int, int]] = {}
        self._waiting: dict[str, Tensor] = {}  # self-attention queries until their keys come
        self._sums: dict[str, list[Tensor]] = {}
        self._streamed: dict[str, list[Tensor]] = {}  # what the family keeps beside the queries

    def _attach(self, on: Callable[[Any], None]) -> None:
        on(self._family.denoiser.register_forward_pre_hook(self._on_call, with_kwargs=True))
        for name, attention in self._cross.items():
            on(attention.to_q.register_forward_hook(self._hook(self._on_query, name, attention)))
        for name, attention in self._self.items():
            on(attention.to_q.register_forward_hook(self._hook(self._on_self_query, name, attention)))
            on(attention.to_k.register_forward_hook(self._hook(self._on_self_key, name, attention)))
        for name, (module, form) in self._beside.items():
            on(module.register_forward_hook(self._hook(self._on_beside, name, form)))

    # What the hooks do. None of them returns a value, so none changes what the model computes.

    def _hook(self, method, name, own):
        def hook(module, inputs, output):
            if self._keeping:
                method(name, own, output.detach())

        return hook

    def _on_call(self, denoiser, args, kwargs) -> None:
        schedule = getattr(self._pipe.scheduler, "timesteps", None)
        if self._number >= 0 and schedule is not self._schedule:
            raise ValueError("record() covers one call of the pipeline: use one `with` block for each call.")
        self._schedule = schedule
        self._keeping = False
        if not self._listener.counts(kwargs):
            return
        self._number += 1
        self._call = self._family.call(args, kwargs)
        self._images = self._wanted_images(self._call.batch)
        self._keeping = self._steps is None or self._number in self._steps
        if self._keeping:
            timestep = self._call.timestep
            self._timesteps.append(timestep.flatten()[0] if isinstance(timestep, Tensor) else timestep)
            self._step_indices.append(self._number)

    def _on_query(self, name, attention, query) -> None:
        grid = self._family.grid(query.shape[1], self._call)
        self._largest = max(self._largest, grid, key=lambda x: x[0] * x[1])
        if name not in self._kept_names:
            return
        if self._resolutions is not None and max(grid) not in self._resolutions:
            return
        self._grids[name] = grid
        query = self._family.queries(attention, query[self._images], self._call)
        self._queries.setdefault(name, []).append(self._stored(query))

    def _stored(self, query: Tensor) -> Tensor:
        """An own copy, else the view would keep the whole batch alive."""
        dtype = self._dtype or query.dtype
        pinned = self._offload and query.is_cuda
        if pinned:
            self._copied_from.add(query.device)
        device = "cpu" if self._offload else query.device
        store = torch.empty(query.shape, dtype=dtype, device=device, pin_memory=pinned)
        return store.copy_(query, non_blocking=pinned)

    def _on_beside(self, name, form, output) -> None:
        self._streamed.setdefault(name, []).append(self._stored(form(output[self._images], self._call)))

    def _on_self_query(self, name, attention, query) -> None:
        self._waiting[name] = query[self._images]

    def _on_self_key(self, name, attention, key) -> None:
        query = self._waiting.pop(name, None)
        if query is None or key.shape[1] != query.shape[1]:
            return
        largest = max((h * w for h, w in (self._grids[x] for x in self._sums)), default=0)
        if query.shape[1] < largest:
            return
        if query.shape[1] > largest:  # a finer layer: the coarser ones seen before it do not count
            self._sums = {}
        self._grids[name] = self._family.grid(query.shape[1], self._call)
        query = self._family.queries(attention, query, self._call)
        key = self._family.self_keys(attention, key[self._images], self._call)
        pairs = zip(query, key, strict=True)
        sums = torch.stack([self._family.received(q, k, self._family.scale(attention)) for q, k in pairs])
        self._sums.setdefault(name, []).append(sums.cpu() if self._offload else sums)

    # From what was caught to recordings.

    def _finish(self) -> list[Recording]:
        if self._number < 0:
            raise ValueError("Nothing was recorded: call the pipeline inside the `with record(pipe)` block.")
        if not self._queries:
            raise ValueError(
                f"Nothing was recorded: the run had {self._number + 1} steps and its largest attention grid was "
                f"{self._largest[0]} x {self._largest[1]}; check steps, layers and resolutions."
            )
        for device in self._copied_from:
            torch.cuda.synchronize(device)  # the copies to pinned memory are asynchronous

        layers: list[list[LayerQueries]] = []
        for name in [x for x in self._cross if x in self._queries]:
            attention, (height, width) = self._cross[name], self._grids[name]
            keys = self._family.keys(attention)
            # Popped layer by layer: stacking costs the memory of one layer, not of all.
            for image, queries in enumerate(_by_image(self._queries.pop(name))):
                if image == len(layers):
                    layers.append([])
                layers[image].append(LayerQueries(name, height, width, queries, keys, self._family.scale(attention)))
        sums = {name: _by_image(self._sums[name]) for name in self._self if name in self._sums}
        beside = {name: _by_image(self._streamed.pop(name)) for name in self._beside}
        factor = self._pipe.vae_scale_factor
        common = {
            "timesteps": tuple(int(t) for t in self._timesteps),
            "step_indices": tuple(self._step_indices),
            "height": self._largest[0],
            "width": self._largest[1],
            "image_size": (self._call.height * factor, self._call.width * factor),
            "embed_dim": self._family.embed_dim,
            "branch": self._branch,
        }
        return [
            Recording(
                layers=tuple(own),
                column_sums=tuple(LayerColumnSums(n, *self._grids[n], sums[n][image]) for n in sums),
                stream=self._family.stream({name: x[image] for name, x in beside.items()}),
                **common,
            )
            for image, own in enumerate(layers)
        ]


def named(items: Iterable, parts: Iterable[str] | str | None, name_of: Callable[[Any], str]) -> list:
    """Those of `items` whose name contains one of `parts` (None: any); the mid block only when a part says so."""
    # A lone string is one name, not an iterable of letters.
    parts = [parts] if isinstance(parts, str) else [""] if parts is None else list(parts)

    def wanted(name: str) -> bool:
        return any(part in name and ("mid_block" in part or "mid_block" not in name) for part in parts)

    return [x for x in items if wanted(name_of(x))]


def _by_image(steps: list[Tensor]) -> list[Tensor]:
    """T tensors `[images, ...]` to one `[T, ...]` an image, each in memory of its own, pinned if they are."""
    images = []
    for image in range(steps[0].shape[0]):
        rows = [step[image] for step in steps]
        store = torch.empty(
            (len(rows), *rows[0].shape),
            dtype=rows[0].dtype,
            device=rows[0].device,
            pin_memory=steps[0].is_pinned(),
        )
        images.append(torch.stack(rows, out=store))
    return images


def _take_rows(x: Tensor, rows: list[int]) -> Tensor:
    """Rows of `x`: a view where they are evenly spaced, a copy otherwise."""
    step = rows[1] - rows[0] if len(rows) > 1 else 1
    if all(b - a == step for a, b in itertools.pairwise(rows)):
        return x[rows[0] : rows[-1] + 1 : step]
    return x[rows]


def _ranges(indices: tuple[int, ...]) -> str:
    return f"{indices[0]} to {indices[-1]}" if len(indices) > 1 else str(indices[0])
