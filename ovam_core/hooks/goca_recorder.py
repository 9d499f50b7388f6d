"""GoCA: weights for heads and layers from one forward pass, scores rescaled at each pixel, maps propagated
along the self-attention ("Making Training-Free Diffusion Segmentors Scale with the Generative Power", arXiv
2603.06178).

    with record(pipe) as recorder, record_goca(pipe) as goca_recorder:
        image = pipe("a cat on a meadow").images[0]
    maps = goca(goca_recorder.recordings[0], caption_words(pipe, "a cat on a meadow", ["cat", "meadow"]))

The hooks only read: the image is bit-identical to one made without them, and none is left afterwards.

The paper asks for the words of the caption, whose keys it has from the pass (`caption_words`). Its weights
are properties of the pass and not of the words. So they also serve, and this is an extension of OVAM's kind,
any other attribution: words that are not in the caption, or an optimised token, whose keys take the place of
the caption's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ovam_core.attention.goca import (
    GocaRecording,
    SelfLayer,
    WeightedLayer,
    head_weights,
    layer_weights,
    reference_affinity,
    resized_self_attention,
)
from ovam_core.attention.heads import Attention
from ovam_core.attention.heatmap import tried_keys
from ovam_core.attention.recording import Branch, LayerQueries, named
from ovam_core.errors import InputError
from ovam_core.hooks.recorder import NO_CALL, Hooked
from ovam_core.models.adapter import Adapter, Call, Pipeline, Take, projection_of, sources
from ovam_core.models.pixart import PixArt
from ovam_core.models.presets import EMBEDDED
from ovam_core.models.registry import adapter_of
from ovam_core.models.sdxl import StableDiffusionXL
from ovam_core.models.stable_diffusion import StableDiffusion

GOCA_ADAPTERS: tuple[type[Adapter], ...] = (  # those whose blocks have both attentions, with a softmax each
    StableDiffusion,
    StableDiffusionXL,
    PixArt,
)
CAUGHT = ("queries", "hidden", "self queries", "self keys")  # of each block
NOISE = 0.1  # the paper's t = 100 of 1000 training timesteps
# Layers of the reference affinity that `reference_layer`'s rule would not choose.
REFERENCES = {EMBEDDED: "up_blocks.2.attentions.1.transformer_blocks.0.attn2"}


def record_goca(
    pipe: Pipeline,
    *,
    branch: Branch = "conditional",
    step: int | None = None,
    layers: Iterable[str] | None = None,
    reference: str | None = None,
) -> GocaRecorder:
    """Record one forward pass inside the `with` block; may stand beside `record` in the same `with`.

    branch: as in `record`; "all" for direct calls of the denoiser.
    step: number of the denoiser's call to keep, from 0. None: the one whose timestep is nearest to a tenth of the
        training's (the paper's t = 100 of 1000); the first call with branch "all".
    layers: names or parts of names of cross-attentions, as in `record`; the mid block only if a part says so.
    reference: name of the cross-attention whose queries make the reference affinity, a part of it is enough; None for
        `reference_layer`'s choice.

    Inside the block it holds, for that one call, the queries of the cross-attentions, what enters their
    output projections, and the queries and keys of the self-attentions beside them: four times `[images, n,
    channels]` a block in the model's dtype, about 92 MB an image for Stable Diffusion 1.5 at 512 px in
    float16. About half of it stays (`GocaRecording.nbytes`). The weights are made at the end of the block, in
    blocks of ATTENTION_BLOCK.

    Raises InputError for a pipeline of no family in GOCA_ADAPTERS, for names that match no layer, and at the end
    of the block when the wanted call was never made.
    """
    return GocaRecorder(pipe, branch, step, layers, reference)


def reference_layer(pipe: Pipeline, names: Sequence[str]) -> str:
    """The cross-attention, of all in `names`, whose queries make the reference affinity.

    The paper's: Stable Diffusion 1 (and 2, of the same build), the second of the 32 x 32 up block, which is
    the last but one up block with attention; SDXL, the first of the last such block (64 x 64); PixArt, the
    middle one, block 13 of 28. Other UNets have what corresponds to Stable Diffusion 1. The embedded model
    has the second of its 16 x 16 up block: what corresponds would be 8 x 8, where an object is a
    handful of pixels.
    """
    known = REFERENCES.get(getattr(pipe, "ovam_name", ""))
    if known is not None and known in names:
        return known
    ups: dict[str, list[str]] = {}
    for name in names:
        if name.startswith("up_blocks."):
            ups.setdefault(name.split(".attentions.")[0], []).append(name)
    if not ups:
        return names[(len(names) - 1) // 2]
    blocks = list(ups.values())
    if isinstance(adapter_of(pipe), StableDiffusionXL):
        return blocks[-1][0]
    chosen = blocks[-2:][0]
    return chosen[min(1, len(chosen) - 1)]


@dataclass(frozen=True)
class _Block:
    """A transformer block: its cross-attention, by name, and its self-attention."""

    name: str
    cross_attention: Attention
    self_attention: Attention


class GocaRecorder(Hooked[GocaRecording]):
    """Context manager made by `record_goca`. `recordings` holds one GocaRecording an image, in the order of
    `pipe(...).images`.
    """

    def __init__(
        self,
        pipe: Pipeline,
        branch: Branch,
        step: int | None,
        layers: Iterable[str] | None,
        reference: str | None,
    ):
        super().__init__(pipe, branch)
        self._step = step
        blocks = _blocks(self._adapter)
        names = [x.name for x in blocks]
        self._kept = _matching(names, layers)
        self._reference = reference_layer(pipe, names) if reference is None else _matching(names, reference)[0]
        self._blocks = [x for x in blocks if x.name in self._kept or x.name == self._reference]
        self._reset()

    def _reset(self) -> None:
        self._number = -1  # of the denoiser's call going on
        self._call = NO_CALL  # what the kept one was given
        self._keeping = False
        self._wanted: float | None = None  # the timestep to keep, where no step was named
        self._images = slice(0)  # the wanted part of the batch
        self._caught: dict[tuple[str, str], Tensor] = {}

    def _attach(self, on: Callable[[Any], None]) -> None:
        on(self._adapter.denoiser.register_forward_pre_hook(self._on_call, with_kwargs=True))
        for block in self._blocks:
            out = projection_of(block.cross_attention, "to_out")[0]
            on(out.register_forward_pre_hook(self._before(block.name, "hidden")))
            for attention, projection, what in (
                (block.cross_attention, "to_q", "queries"),
                (block.self_attention, "to_q", "self queries"),
                (block.self_attention, "to_k", "self keys"),
            ):
                for module, take in sources(attention, projection):
                    on(module.register_forward_hook(self._after(block.name, what, take)))

    def _before(self, name: str, what: str) -> Callable[..., None]:
        return lambda _module, inputs: self._keep(name, what, inputs[0])

    def _after(self, name: str, what: str, take: Take) -> Callable[..., None]:
        return lambda _module, _inputs, output: self._keep(name, what, take(output))

    def _keep(self, name: str, what: str, tensor: Tensor) -> None:
        self._heard.add(f"{name}, {what}")
        if self._keeping:  # a copy of its own, else the view would keep the whole batch alive
            self._note_settings()
            own = self._own(name, tensor.detach())
            if own is not None:
                self._caught[name, what] = own.clone()

    def _on_call(self, _denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._number += 1
        call = self._adapter.call(args, kwargs)
        self._keeping = not self._caught and self._is_wanted(call)
        if self._keeping:
            self._call = call
            self._images = self._wanted_images(call.batch)

    def _is_wanted(self, call: Call) -> bool:
        if self._step is not None:
            return self._number == self._step
        if self._branch == "all":
            return self._number == 0
        timestep = float(torch.as_tensor(call.timestep).flatten()[0])
        if self._wanted is None:  # the run's own schedule is known from its first call on
            scheduler = self._pipe.scheduler
            goal = NOISE * scheduler.config.num_train_timesteps
            coming = [t for t in scheduler.timesteps.tolist() if t <= timestep]  # from a picture, a run begins late
            self._wanted = min(coming, key=lambda t: abs(t - goal))
        return timestep == self._wanted

    @torch.no_grad()
    def _finish(self) -> list[GocaRecording]:
        self._check_heard(self._number + 1)
        self._check_all_heard([f"{x.name}, {what}" for x in self._blocks for what in CAUGHT])
        if not self._caught:
            raise InputError(
                f"Nothing was recorded for GoCA: the model was called {self._number + 1} times, and the wanted call "
                "was not among them; call the pipeline inside the `with` block, or name another step."
            )
        skipped = [x.name for x in self._blocks if any((x.name, what) not in self._caught for what in CAUGHT)]
        if skipped:
            raise InputError(
                f"GoCA looks at all layers of one call, and the run took these from a cache: {', '.join(skipped)}; "
                "switch the cache off, or name another step."
            )
        device = self._caught[self._reference, "queries"].device
        timesteps = torch.as_tensor(self._call.timestep).flatten().expand(self._call.batch)[self._images].tolist()
        with torch.autocast(device.type, enabled=False):
            projections = {
                x.name: _projections(
                    self._as_in_run(projection_of(x.cross_attention, "to_out")[0]),
                    x.cross_attention.heads,
                    self._caught[x.name, "hidden"],
                )
                for x in self._blocks
            }
            return [self._recording(image, int(at), projections) for image, at in enumerate(timesteps)]

    def _recording(self, image: int, timestep: int, projections: dict[str, Tensor]) -> GocaRecording:
        features = self._caught[self._reference, "queries"][image]
        affinity, size = reference_affinity(features), self._adapter.grid(len(features), self._call)
        kept = [x for x in self._blocks if x.name in self._kept]
        self_layers = [self._self_layer(x, image) for x in kept]
        weights = layer_weights(affinity, (resized_self_attention(x, size) for x in self_layers)).tolist()
        height, width = max(((x.height, x.width) for x in self_layers), key=lambda x: x[0] * x[1])
        return GocaRecording(
            layers=tuple(
                self._layer(block, image, projections[block.name], weight)
                for block, weight in zip(kept, weights, strict=True)
            ),
            finest=tuple(x for x in self_layers if (x.height, x.width) == (height, width)),
            timestep=timestep,
            height=height,
            width=width,
            embed_dim=self._adapter.embed_dim,
            reference=self._reference,
            reading=self._adapter.reading,
        )

    def _layer(self, block: _Block, image: int, projections: Tensor, weight: float) -> WeightedLayer:
        attention = block.cross_attention
        projected = self._of_image(block.name, "queries", image)
        queries = self._adapter.queries(attention, projected, self._call).contiguous()
        hidden = rearrange(self._of_image(block.name, "hidden", image)[0], "n (h d) -> h n d", h=attention.heads)
        grid = self._adapter.grid(projected.shape[1], self._call)
        scale, own = self._adapter.scale(attention), self._adapter.keys(attention)
        keys = None if own is None else self._as_in_run(own)
        made = tried_keys(keys, self._adapter.embed_dim, projected.dtype)
        layer = LayerQueries(block.name, *grid, queries, keys, scale, dtype=projected.dtype, made=made)
        return WeightedLayer(layer, head_weights(hidden, projections), weight)

    def _self_layer(self, block: _Block, image: int) -> SelfLayer:
        attention = block.self_attention
        projected, keys = (self._of_image(block.name, what, image) for what in ("self queries", "self keys"))
        return SelfLayer(
            block.name,
            *self._adapter.grid(projected.shape[1], self._call),
            self._adapter.queries(attention, projected, self._call)[0].contiguous(),
            self._adapter.self_keys(attention, keys, self._call)[0].contiguous(),
            self._adapter.scale(attention),
        )

    def _of_image(self, name: str, what: str, image: int) -> Tensor:
        """`[1, n, channels]` in memory of its own, else one image would keep the batch alive."""
        return self._caught[name, what][image : image + 1].clone()


def _projections(project: nn.Module, heads: int, hidden: Tensor) -> Tensor:
    """The output projection's slice of each head, `[heads, d, C]`, without the bias.

    The module may be wrapped (LoRA, offloaded weights): what it does to unit vectors is its matrix.
    """
    units = torch.eye(hidden.shape[-1], dtype=hidden.dtype, device=hidden.device)
    matrix = project(units) - project(torch.zeros_like(units[:1]))
    return rearrange(matrix, "(h d) c -> h d c", h=heads)


def _blocks(adapter: Adapter) -> list[_Block]:
    """The transformer blocks with a self-attention and a cross-attention, in the order of the denoiser's modules."""
    if type(adapter) not in GOCA_ADAPTERS:
        *names, last = (x.name for x in GOCA_ADAPTERS)
        raise InputError(f"GoCA is not there for {adapter.name}: load {', '.join(names)} or {last}, or take OVAM.")
    cross_attentions, self_attentions = adapter.attentions()
    by_parent = {name.rpartition(".")[0]: attention for name, attention in self_attentions.items()}
    parents = {name: name.rpartition(".")[0] for name in cross_attentions}
    blocks = [
        _Block(name, attention, by_parent[parents[name]])
        for name, attention in cross_attentions.items()
        if parents[name] in by_parent
    ]
    if not blocks:
        raise InputError("This model has no block with a self-attention and a cross-attention, which GoCA needs.")
    return blocks


def _matching(names: Sequence[str], parts: Iterable[str] | str | None) -> list[str]:
    """`named`, but at least one."""
    matching = named(names, parts, str)
    if not matching:
        wanted = ", ".join([parts] if isinstance(parts, str) else parts or ())
        raise InputError(f"No layer matches {wanted}: choose among {', '.join(names)}.")
    return matching
