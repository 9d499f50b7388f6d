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
the caption's. With joint attention they are carried along the text stream (attention/text_stream.py), as the caption's
own are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ovam_core.attention.goca import (
    GocaRecording,
    SelfLayer,
    WeightedLayer,
    even_rows,
    head_weights,
    log_mass,
    reference_affinity,
    resized_self_attention,
)
from ovam_core.attention.heatmap import tried_keys
from ovam_core.attention.recording import Branch, LayerQueries, named
from ovam_core.attention.rows import Rows
from ovam_core.attention.text_stream import TextStream
from ovam_core.errors import InputError
from ovam_core.hooks.recorder import NO_CALL, Hooked
from ovam_core.models.adapter import Call, Form, Pipeline, Take, projection_of, sources
from ovam_core.models.goca import GocaBlock, GocaPreset, goca_blocks, goca_preset
from ovam_core.models.registry import adapter_of

QUERIES, HIDDEN, SELF_QUERIES, SELF_KEYS, OUTPUT = "queries", "hidden", "self queries", "self keys", "output"
ONE_STEP = (0,)  # the steps of a recording of one pass


def record_goca(
    pipe: Pipeline,
    *,
    branch: Branch = "conditional",
    step: int | None = None,
    layers: Iterable[str] | None = None,
    reference: str | None = None,
    preset: GocaPreset | None = None,
) -> GocaRecorder:
    """Record one forward pass inside the `with` block; may stand beside `record` in the same `with`.

    branch: as in `record`; "all" for direct calls of the denoiser.
    step: number of the denoiser's call to keep, from 0. None: the one whose timestep is nearest to the model's t
        (`Adapter.photo_timestep`, 100 of 1000, Flux 150); the first call with branch "all".
    layers: names or parts of names of the attentions that count, as in `record`; None for the preset's.
    reference: name of the attention whose features make the reference affinity, a part of it is enough; None for the
        preset's.
    preset: the settings of the model; None for `goca_preset`, the published ones.

    Inside the block it holds, for that one call, the queries of the cross-attentions, what enters their
    output projections, and the queries and keys of the self-attentions beside them: four times `[images, n,
    channels]` a block in the model's dtype, about 92 MB an image for Stable Diffusion 1.5 at 512 px in
    float16. About half of it stays (`GocaRecording.nbytes`). With joint attention queries, and keys and values of all
    blocks up to the last. The weights are made at the end of the block, in blocks of ATTENTION_BLOCK.

    Raises InputError for a pipeline of no family, for names that match no layer, and at the end of the block when the
    wanted call was never made.
    """
    found = goca_preset(adapter_of(pipe)) if preset is None else preset
    blocks = goca_blocks(adapter_of(pipe))
    names = [x.name for x in blocks]
    if layers is not None:
        found = replace(found, layers=tuple(_matching(names, layers)))
    if reference is not None:
        found = replace(found, reference=_matching(names, reference)[0])
    return GocaRecorder(pipe, branch, step, blocks, found)


class GocaRecorder(Hooked[GocaRecording]):
    """Context manager made by `record_goca`. `recordings` holds one GocaRecording an image, in the order of
    `pipe(...).images`.
    """

    def __init__(
        self, pipe: Pipeline, branch: Branch, step: int | None, blocks: Sequence[GocaBlock], preset: GocaPreset
    ):
        super().__init__(pipe, branch)
        self._step, self._preset = step, preset
        carrying = preset.options.propagation or ()
        wanted = {*preset.layers, *carrying, preset.reference}
        if unknown := sorted(wanted - {x.name for x in blocks}):
            raise InputError(f"No layer is called {unknown[0]}: choose among {', '.join(x.name for x in blocks)}.")
        self._blocks = [x for x in blocks if x.name in wanted]
        self._counted = [x.name for x in self._blocks if x.name in preset.layers]
        self._carrying = [x.name for x in self._blocks if x.name in carrying] or self._counted
        self._joint = self._blocks[0].is_joint
        reached = {*self._counted, *self._carrying}
        self._beside = self._adapter.beside_queries(reached) if self._joint else {}
        self._reset()

    def _reset(self) -> None:
        self._number = -1  # of the denoiser's call going on
        self._call = NO_CALL  # what the kept one was given
        self._keeping = False
        self._wanted: float | None = None  # the timestep to keep, where no step was named
        self._images = slice(0)  # the wanted part of the batch
        self._text: Tensor | None = None  # of the wanted images
        self._caught: dict[tuple[str, str], Tensor] = {}

    def _parts(self, block: GocaBlock) -> list[str]:
        """What must be caught of a block."""
        named = [OUTPUT] if block.name == self._preset.reference and self._preset.of_output else []
        if block.is_joint:
            keys = [] if f"{block.name}.keys" in self._beside else [SELF_KEYS]
            return [QUERIES, *keys, *named]
        return [QUERIES, HIDDEN, SELF_QUERIES, SELF_KEYS, *named]

    def _attach(self, on: Callable[[Any], None]) -> None:
        on(self._adapter.denoiser.register_forward_pre_hook(self._on_call, with_kwargs=True))
        for block in self._blocks:
            for what in self._parts(block):
                self._listen(on, block, what)
        for name, made in self._beside.items():
            for module, form in made:
                on(module.register_forward_hook(self._formed(name, form)))

    def _listen(self, on: Callable[[Any], None], block: GocaBlock, what: str) -> None:
        if what == HIDDEN:
            out = projection_of(block.cross_attention, "to_out")[0]
            on(out.register_forward_pre_hook(self._before(block.name, what)))
        elif what == OUTPUT:
            module: Any = block.cross_attention
            on(module.register_forward_hook(self._after(block.name, what, _of_image)))
        else:
            attention = block.cross_attention if what == QUERIES else block.self_attention
            for module, take in sources(attention, "to_k" if what == SELF_KEYS else "to_q"):
                on(module.register_forward_hook(self._after(block.name, what, take)))

    def _before(self, name: str, what: str) -> Callable[..., None]:
        return lambda _module, inputs: self._keep(name, what, inputs[0])

    def _after(self, name: str, what: str, take: Take) -> Callable[..., None]:
        return lambda _module, _inputs, output: self._keep(name, what, take(output))

    def _formed(self, name: str, form: Form) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: tuple, output: Tensor) -> None:
            if self._keeping:
                own = self._own(name, output.detach())
                if own is not None:
                    self._caught[name, ""] = form(own, self._call).clone()

        return hook

    def _keep(self, name: str, what: str, tensor: Tensor) -> None:
        self._heard.add(f"{name}, {what}")
        if self._keeping:  # a copy of its own, else the view would keep the whole batch alive
            self._note_settings()
            own = self._own(name, tensor.detach())
            if own is not None:
                self._caught[name, what] = self._adapter.image_part(own, self._call).clone()

    def _on_call(self, _denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not self._listener.counts(kwargs):
            self._keeping = False
            return
        self._number += 1
        call = self._adapter.call(args, kwargs)
        self._keeping = not self._caught and self._is_wanted(call)
        if self._keeping:
            self._call = call
            self._images = self._wanted_images(call.batch)
            if self._joint:
                self._text = kwargs["encoder_hidden_states"].detach()[self._images].clone()

    def _is_wanted(self, call: Call) -> bool:
        if self._step is not None:
            return self._number == self._step
        if self._branch == "all":
            return self._number == 0
        timestep = float(torch.as_tensor(call.timestep).flatten()[0])
        scheduler = self._pipe.scheduler
        schedule = scheduler.timesteps.tolist()
        here = min(schedule, key=lambda t: abs(t - timestep))  # which some models get in their own precision
        if self._wanted is None:  # the run's own schedule is known from its first call on
            goal = self._adapter.photo_timestep / 1000 * scheduler.config.num_train_timesteps
            coming = [t for t in schedule if t <= here]  # from a picture, a run begins late
            self._wanted = min(coming, key=lambda t: abs(t - goal))
        return here == self._wanted

    @torch.no_grad()
    def _finish(self) -> list[GocaRecording]:
        self._check_heard(self._number + 1)
        needed = [(x.name, what) for x in self._blocks for what in self._parts(x)]
        self._check_all_heard([f"{name}, {what}" for name, what in needed])
        if not self._caught:
            raise InputError(
                f"Nothing was recorded for GoCA: the model was called {self._number + 1} times, and the wanted call "
                "was not among them; call the pipeline inside the `with` block, or name another step."
            )
        needed += [(name, "") for name in self._beside]
        skipped = dict.fromkeys(name for name, what in needed if (name, what) not in self._caught)
        if skipped:
            raise InputError(
                f"GoCA looks at all layers of one call, and the run took these from a cache: {', '.join(skipped)}; "
                "switch the cache off, or name another step."
            )
        device = self._caught[self._preset.reference, QUERIES].device
        timesteps = torch.as_tensor(self._call.timestep).flatten().expand(self._call.batch)[self._images].tolist()
        with torch.autocast(device.type, enabled=False):
            return [self._recording(image, int(at)) for image, at in enumerate(timesteps)]

    def _recording(self, image: int, timestep: int) -> GocaRecording:
        preset = self._preset
        features = self._caught[preset.reference, OUTPUT if preset.of_output else QUERIES][image]
        affinity, size = reference_affinity(features), self._adapter.grid(len(features), self._call)
        stream, text_keys = self._text_stream(image)
        self_layers = {
            x.name: self._self_layer(x, image, stream, text_keys.get(x.name))
            for x in self._blocks
            if x.name in {*self._counted, *self._carrying}
        }
        agreements, evened = [], []
        for name in self._counted:
            attention = resized_self_attention(self_layers[name], size)
            agreements.append(float((affinity * attention).sum()))
            evened.append(float((affinity * even_rows(attention)).sum()))
        height, width = max(((x.height, x.width) for x in self_layers.values()), key=lambda x: x[0] * x[1])
        finest = [x for x in self_layers.values() if (x.height, x.width) == (height, width)]
        carrying = [x for x in finest if x.name in self._carrying] or finest
        if self._joint:  # else the tensors of layers and stream
            carrying = [replace(x, queries=x.queries.clone(), keys=x.keys.clone()) for x in carrying]
        kept = [x for x in self._blocks if x.name in self._counted]
        return GocaRecording(
            layers=tuple(
                self._layer(block, image, self_layers[block.name], even / sum(evened), agreement)
                for block, even, agreement in zip(kept, evened, agreements, strict=True)
            ),
            finest=tuple(carrying),
            timestep=timestep,
            height=height,
            width=width,
            embed_dim=self._adapter.embed_dim,
            reference=preset.reference,
            reading=self._adapter.reading,
            options=replace(preset.options, propagation=None),
            stream=None if stream is None else stream.up_to(self._counted),
        )

    def _layer(self, block: GocaBlock, image: int, own: SelfLayer, weight: float, agreement: float) -> WeightedLayer:
        attention, scale = block.cross_attention, self._adapter.scale(block.cross_attention)
        if block.is_joint:
            layer = LayerQueries(
                block.name, own.height, own.width, own.queries[None], None, scale, ONE_STEP, own.queries.dtype
            )
            return WeightedLayer(layer, None, weight, agreement, log_mass(own.queries, own.keys, scale))
        projected = self._image(block.name, QUERIES, image)
        queries = self._adapter.queries(attention, projected, self._call).contiguous()
        grid = self._adapter.grid(projected.shape[1], self._call)
        hidden = rearrange(self._image(block.name, HIDDEN, image)[0], "n (h d) -> h n d", h=attention.heads)
        keys_of = self._adapter.keys(attention)
        keys = None if keys_of is None else self._as_in_run(keys_of)
        made = tried_keys(keys, self._adapter.embed_dim, projected.dtype)
        layer = LayerQueries(block.name, *grid, queries, keys, scale, dtype=projected.dtype, made=made)
        return WeightedLayer(layer, head_weights(hidden, self._projections(block)), weight, agreement)

    def _projections(self, block: GocaBlock) -> Tensor:
        attention = block.cross_attention
        out = self._as_in_run(projection_of(attention, "to_out")[0])
        return projections(out, attention.heads, self._caught[block.name, HIDDEN])

    def _self_layer(self, block: GocaBlock, image: int, stream: TextStream | None, text: Tensor | None) -> SelfLayer:
        """text: keys of the run's own text in the same softmax, `[heads, L, d]`; None where there are none."""
        attention = block.self_attention
        projected = self._image(block.name, QUERIES if block.is_joint else SELF_QUERIES, image)
        queries = self._adapter.queries(attention, projected, self._call)[0].contiguous()
        scale = self._adapter.scale(attention)
        streamed = [] if stream is None else [x.image_keys for x in stream.blocks if x.name == block.name]
        if streamed and streamed[0] is not None:
            keys = streamed[0][0]
        else:
            keys = self._adapter.self_keys(attention, self._image(block.name, SELF_KEYS, image), self._call)[0]
        return SelfLayer(
            block.name,
            *self._adapter.grid(projected.shape[1], self._call),
            queries,
            keys.contiguous(),
            scale,
            None if text is None else log_mass(queries, text.to(queries.device), scale),
            self._adapter.linear,
        )

    def _text_stream(self, image: int) -> tuple[TextStream | None, dict[str, Tensor]]:
        """The text stream of an image, and the keys `[heads, L, d]` that its own text had in each block."""
        if self._text is None:
            return None, {}
        kept = {name: Rows(ONE_STEP, self._caught[name, ""][image : image + 1].clone()) for name in self._beside}
        stream = self._adapter.stream(dict(kept))
        assert stream is not None, "with joint attention"
        dtype = self._caught[self._preset.reference, QUERIES].dtype
        stream = replace(stream.as_set(self._lora or {}), dtype=dtype)
        made = {block.name: now for block, now in stream.tried(self._adapter.embed_dim)}
        stream = replace(stream, blocks=tuple(replace(x, made=made[x.name]) for x in stream.blocks))
        text = self._text[image]
        names = [x.name for x in self._blocks if x.name in {*self._counted, *self._carrying}]
        return stream, dict(zip(names, (keys[0] for keys in stream.keys(text, [len(text)], names)), strict=True))

    def _image(self, name: str, what: str, image: int) -> Tensor:
        """`[1, n, channels]` in memory of its own, else one image would keep the batch alive."""
        return self._caught[name, what][image : image + 1].clone()


def _of_image(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The image's part of what a joint attention gives, where it is apart from the text's."""
    return output[0] if isinstance(output, tuple) else output


def projections(project: nn.Module, heads: int, hidden: Tensor) -> Tensor:
    """The output projection's slice of each head, `[heads, d, C]`, without the bias.

    hidden: what enters it, `[..., heads * d]`. The module may be wrapped (LoRA, offloaded weights): what it does to
    unit vectors is its matrix.
    """
    units = torch.eye(hidden.shape[-1], dtype=hidden.dtype, device=hidden.device)
    matrix = project(units) - project(torch.zeros_like(units[:1]))
    return rearrange(matrix, "(h d) c -> h d c", h=heads)


def _matching(names: Collection[str], parts: Iterable[str] | str) -> list[str]:
    """`named`, but at least one."""
    parts = [parts] if isinstance(parts, str) else list(parts)
    matching: list[str] = named(names, parts, str)
    if not matching:
        raise InputError(f"No layer matches {', '.join(parts)}: choose among {', '.join(names)}.")
    return matching
