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
from typing import Literal, Self

import torch
from einops import rearrange
from torch import Tensor, nn

Branch = Literal["conditional", "unconditional", "all"]

# One block of softmax rows in `column_sums`, all heads together. On a CPU it should stay in cache.
COLUMN_BLOCK_BYTES = {"cpu": 2 << 20, "other": 128 << 20}


@dataclass(frozen=True, eq=False)
class LayerQueries:
    """What one cross-attention layer asked, for one image.

    queries: `[T, heads, n, d]`, n = height * width, row-major, in the storage dtype.
    keys: the layer's own `to_k`, `[..., L, embed_dim]` -> `[..., L, heads * d]`.
    scale: factor of the products before the softmax, 1 / sqrt(d) (Eq. 3).
    """

    name: str
    height: int
    width: int
    queries: Tensor
    keys: Callable[[Tensor], Tensor]
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
    one call of the UNet: second-order schedulers (Heun, KDPM2) and PNDM call it more often than
    `num_inference_steps`.
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

    @property
    def nbytes(self) -> int:
        """Bytes held by the queries and column sums."""
        tensors = [x.queries for x in self.layers] + [x.sums for x in self.column_sums]
        return sum(x.numel() * x.element_size() for x in tensors)

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
        kept = _named(self.layers, _strings(layers))
        if resolutions is not None:
            wanted = set(resolutions)
            kept = [x for x in kept if x.resolution in wanted]
        if not kept:
            names = ", ".join(x.name for x in self.layers)
            raise ValueError(
                "No recorded layer matches: choose among the resolutions "
                f"{', '.join(map(str, self.resolutions))} and the layers {names}."
            )
        if steps is None:
            return replace(self, layers=tuple(kept))

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
        )

    def to(self, device: torch.device | str) -> Recording:
        """The same recording with its tensors on `device`. The model's layers stay where they are."""
        return replace(
            self,
            layers=tuple(replace(x, queries=x.queries.to(device)) for x in self.layers),
            column_sums=tuple(replace(x, sums=x.sums.to(device)) for x in self.column_sums),
        )


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
        `pipe.unet`, where the pipeline's guidance says nothing.
    steps: numbers of the UNet calls to keep, from 0 (default all). Memory is proportional to their count.
    layers: names or parts of names, as in `pipe.unet.named_modules()`. Default: every cross-attention of the down
        and up blocks, as in the paper. The mid block is kept only if a part says "mid_block".
    resolutions: larger grid sides to keep, such as {16, 8} (default all).
    self_attention: also keep the column sums of the highest-resolution self-attentions (Eq. 8); float32 [T, n] a
        layer. Made in blocks of rows: about twice COLUMN_BLOCK_BYTES at a time, never [heads, n, n].
    offload: move the queries to host memory as they come (pinned, if the model runs on CUDA).
    dtype: storage dtype of the queries (default: the model's).

    Raises ValueError for a pipeline without a UNet with cross-attention, and at the end of the block when
    nothing was caught.
    """
    return Recorder(pipe, branch, steps, layers, resolutions, self_attention, offload, dtype)


class Recorder:
    """Context manager made by `record`. `recordings` holds one Recording an image, in the order of `pipe(...).images`."""

    def __init__(self, pipe, branch, steps, layers, resolutions, self_attention, offload, dtype):
        if branch not in ("conditional", "unconditional", "all"):
            raise ValueError(f"branch is {branch!r}: choose 'conditional', 'unconditional' or 'all'.")
        self.recordings: list[Recording] = []
        self._pipe = pipe
        self._branch = branch
        self._steps = None if steps is None else frozenset(steps)
        self._resolutions = None if resolutions is None else frozenset(resolutions)
        self._offload = offload
        self._dtype = dtype
        self._cross, self._self = _attentions(pipe)
        self._kept_names = {name for name, _ in _named(self._cross.items(), _strings(layers), lambda x: x[0])}
        if not self_attention:
            self._self = {}
        self._handles: list = []
        self._reset()

    def _reset(self) -> None:
        self._schedule = None  # the scheduler's timesteps of this run, to notice a second one
        self._call = -1  # number of the UNet call going on
        self._keeping = False  # whether that call is one of the wanted steps
        self._images = slice(0)  # the wanted part of the batch
        self._latent = (0, 0)
        self._largest = (0, 0)  # largest attention grid seen
        self._timesteps: list[Tensor | float] = []
        self._step_indices: list[int] = []
        self._queries: dict[str, list[Tensor]] = {}
        self._grids: dict[str, tuple[int, int]] = {}
        self._waiting: dict[str, Tensor] = {}  # self-attention queries until their keys come
        self._sums: dict[str, list[Tensor]] = {}

    def __enter__(self) -> Self:
        if self._handles:
            raise ValueError("This recorder is already in use: make a new one with record(pipe).")
        self._reset()
        self.recordings = []
        on = self._handles.append
        on(self._pipe.unet.register_forward_pre_hook(self._on_unet, with_kwargs=True))
        for name, attention in self._cross.items():
            on(attention.to_q.register_forward_hook(self._hook(self._on_query, name, attention)))
        for name, attention in self._self.items():
            on(attention.to_q.register_forward_hook(self._hook(self._on_self_query, name, attention)))
            on(attention.to_k.register_forward_hook(self._hook(self._on_self_key, name, attention)))
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

    # What the hooks do. None of them returns a value, so none changes what the model computes.

    def _hook(self, method, name, attention):
        def hook(module, inputs, output):
            if self._keeping:
                method(name, attention, output.detach())

        return hook

    def _on_unet(self, unet, args, kwargs) -> None:
        sample = args[0] if args else kwargs["sample"]
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        schedule = getattr(self._pipe.scheduler, "timesteps", None)
        if self._call >= 0 and schedule is not self._schedule:
            raise ValueError("record() covers one call of the pipeline: use one `with` block for each call.")
        self._schedule = schedule
        self._call += 1
        self._latent = tuple(sample.shape[-2:])
        self._images = self._wanted_images(sample.shape[0])
        self._keeping = self._steps is None or self._call in self._steps
        if self._keeping:
            first = timestep.flatten()[0] if isinstance(timestep, Tensor) else timestep
            self._timesteps.append(first)
            self._step_indices.append(self._call)

    def _wanted_images(self, batch: int) -> slice:
        if self._branch == "all":
            return slice(0, batch)
        if not self._pipe.do_classifier_free_guidance:
            if self._branch == "unconditional":
                raise ValueError(
                    "Without guidance there is no unconditional half: record the conditional branch."
                )
            return slice(0, batch)
        half = batch // 2  # diffusers concatenates [negative, positive]
        return slice(half, batch) if self._branch == "conditional" else slice(0, half)

    def _on_query(self, name, attention, query) -> None:
        grid = grid_size(query.shape[1], *self._latent)
        self._largest = max(self._largest, grid, key=lambda x: x[0] * x[1])
        if name not in self._kept_names:
            return
        if self._resolutions is not None and max(grid) not in self._resolutions:
            return
        self._grids[name] = grid
        query = rearrange(query[self._images], "b n (h d) -> b h n d", h=attention.heads)
        self._queries.setdefault(name, []).append(self._stored(query))

    def _stored(self, query: Tensor) -> Tensor:
        """An own copy, else the view would keep the whole batch alive."""
        dtype = self._dtype or query.dtype
        pinned = self._offload and query.is_cuda
        device = "cpu" if self._offload else query.device
        store = torch.empty(query.shape, dtype=dtype, device=device, pin_memory=pinned)
        return store.copy_(query, non_blocking=pinned)

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
        self._grids[name] = grid_size(query.shape[1], *self._latent)
        heads = "b n (h d) -> b h n d"
        query = rearrange(query, heads, h=attention.heads)
        key = rearrange(key[self._images], heads, h=attention.heads)
        sums = torch.stack([column_sums(q, k, attention.scale) for q, k in zip(query, key, strict=True)])
        self._sums.setdefault(name, []).append(sums.cpu() if self._offload else sums)

    # From what was caught to recordings.

    def _finish(self) -> list[Recording]:
        if self._call < 0:
            raise ValueError("Nothing was recorded: call the pipeline inside the `with record(pipe)` block.")
        if not self._queries:
            raise ValueError(
                f"Nothing was recorded: the run had {self._call + 1} steps and its largest attention grid was "
                f"{self._largest[0]} x {self._largest[1]}; check steps, layers and resolutions."
            )
        if self._offload and torch.cuda.is_available():
            torch.cuda.synchronize()  # the copies to pinned memory are asynchronous

        layers: list[list[LayerQueries]] = []
        for name in [x for x in self._cross if x in self._queries]:
            attention, (height, width) = self._cross[name], self._grids[name]
            # Popped layer by layer: stacking costs the memory of one layer, not of all.
            for image, queries in enumerate(_by_image(self._queries.pop(name))):
                if image == len(layers):
                    layers.append([])
                layers[image].append(
                    LayerQueries(name, height, width, queries, attention.to_k, float(attention.scale))
                )
        sums = {name: _by_image(self._sums[name]) for name in self._self if name in self._sums}
        factor = self._pipe.vae_scale_factor
        common = {
            "timesteps": tuple(int(t) for t in self._timesteps),
            "step_indices": tuple(self._step_indices),
            "height": self._largest[0],
            "width": self._largest[1],
            "image_size": (self._latent[0] * factor, self._latent[1] * factor),
            "embed_dim": next(iter(self._cross.values())).cross_attention_dim,
            "branch": self._branch,
        }
        return [
            Recording(
                layers=tuple(own),
                column_sums=tuple(LayerColumnSums(n, *self._grids[n], sums[n][image]) for n in sums),
                **common,
            )
            for image, own in enumerate(layers)
        ]


def grid_size(n: int, latent_height: int, latent_width: int) -> tuple[int, int]:
    """(height, width) of the attention grid of `n` pixels, by halving the latents as the UNet does.

    A UNet rounds odd sides up (padded convolutions) or down (asymmetric padding). Raises ValueError for no fit.
    """
    for round_up in (1, 0):
        height, width = latent_height, latent_width
        while height * width > n and height * width > 1:
            height, width = (height + round_up) // 2, (width + round_up) // 2
        if height * width == n:
            return height, width
    raise ValueError(f"An attention of {n} pixels does not fit latents of {latent_height} x {latent_width}.")


def column_sums(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Attention received by each pixel, summed over heads and attending pixels (Eq. 8): float32 `[n]`.

    query, key: `[heads, n, d]`. The `[n, n]` attention is made in blocks of rows: the peak is about two blocks of
    COLUMN_BLOCK_BYTES (at least one row of all heads) in float32, 4 MiB on a CPU; all heads of a 64 x 64 grid
    at once would be 512 MiB.
    """
    heads, n, _ = query.shape
    block_bytes = COLUMN_BLOCK_BYTES["cpu" if query.device.type == "cpu" else "other"]
    rows = max(1, min(n, block_bytes // (4 * heads * n)))
    total = torch.zeros(n, dtype=torch.float32, device=query.device)
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        key = rearrange(key.float() * scale, "h n d -> h d n").contiguous()
        for block in query.split(rows, dim=1):
            total += torch.softmax(block.float() @ key, dim=-1).sum(dim=(0, 1))
    return total


def _attentions(pipe) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """The UNet's cross-attentions and self-attentions by name, in the order of its modules."""
    unet = getattr(pipe, "unet", None)
    if unet is None or not hasattr(type(pipe), "do_classifier_free_guidance"):
        raise ValueError(
            f"{type(pipe).__name__} is not a text-to-image pipeline with a UNet: load Stable Diffusion 1 or 2."
        )
    found = {
        name: module
        for name, module in unet.named_modules()
        if all(hasattr(module, x) for x in ("to_q", "to_k", "heads", "is_cross_attention"))
    }
    cross = {name: x for name, x in found.items() if x.is_cross_attention}
    if not cross:
        raise ValueError(
            f"The UNet of this {type(pipe).__name__} has no cross-attention: there is no word to ask for."
        )
    for name, x in cross.items():
        if x.norm_cross or getattr(x, "norm_q", None) is not None or getattr(x, "norm_k", None) is not None:
            raise ValueError(f"The layer {name} normalises its queries or keys, which is not supported.")
    return cross, {name: x for name, x in found.items() if not x.is_cross_attention}


def _named(items, parts: list[str] | None, name_of=lambda x: x.name) -> list:
    """Those of `items` whose name contains one of `parts`; the mid block only when a part says so."""
    parts = [""] if parts is None else parts

    def wanted(name: str) -> bool:
        return any(part in name and ("mid_block" in part or "mid_block" not in name) for part in parts)

    return [x for x in items if wanted(name_of(x))]


def _strings(values: Iterable[str] | str | None) -> list[str] | None:
    """A lone string is one name, not an iterable of letters."""
    return [values] if isinstance(values, str) else None if values is None else list(values)


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
