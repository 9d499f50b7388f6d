"""S-CFG in any pipeline: a hook on the denoiser's output gives every region a guidance strength of its own.

    with record(pipe) as recorder, guided_by_region(pipe, prompt, 7.5) as guide:
        image = pipe(prompt, guidance_scale=7.5).images[0]

The hook replaces the conditional half by eps_u + gamma (eps_c - eps_u), of which the pipeline's own formula then makes
eps_u + w gamma (eps_c - eps_u): pipeline and scheduler are left alone, and recorders stand beside it. The maths:
attention/guidance.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ovam_core.attention.goca import (
    SelfLayer,
    aggregate,
    cross_attention,
    head_weights,
    layer_map,
    reference_affinity,
)
from ovam_core.attention.guidance import Grid, agreements, carrier, gain, region_grid, regions
from ovam_core.attention.heads import Attention
from ovam_core.attention.heatmap import summed
from ovam_core.attention.modules import without_hooks
from ovam_core.errors import InputError
from ovam_core.hooks.goca_recorder import projections
from ovam_core.hooks.recorder import NO_CALL, Hooked
from ovam_core.models.adapter import Pipeline, Take, projection_of, sources
from ovam_core.models.goca import goca_blocks, goca_preset
from ovam_core.models.listeners import GUIDED
from ovam_core.models.reading import EOT, SOT
from ovam_core.models.registry import ADAPTERS, adapter_of

SPECIAL = (SOT, EOT)
CACHED = "S-CFG looks at all layers of both halves at every step, and this run took some from a cache: switch it off."


def check_guidance(pipe: Pipeline, scale: float) -> None:
    """Raises InputError, one sentence, where S-CFG cannot guide a run of this scale."""
    adapter = adapter_of(pipe)
    if not adapter.s_cfg:
        *names, last = (one.name for one in ADAPTERS if one.s_cfg)
        raise InputError(
            f"S-CFG is not there for {adapter.name}: load {', '.join(names)} or {last}, or take the plain guidance."
        )
    if not adapter.guides(scale):
        raise InputError(
            f"S-CFG shares out the guidance among regions, and this model at a scale of {scale:g} has none: choose a "
            "scale above 1 with a model that is guided by a negative half, or take the plain guidance."
        )


def guided_by_region(pipe: Pipeline, prompts: str | Sequence[str], scale: float, *, averages: bool = False) -> Guide:
    """Guide one call of `pipe` inside the `with` block by S-CFG.

    prompts: of the call, as given there. scale: its guidance scale. averages: plain means of heads and layers in place
    of GoCA's weights.

    Within a step it holds, for both halves, the map of every cross-attention, `[tokens, height, width]`, and the
    queries and keys of every self-attention in the model's dtype (with `averages` of the finest grid alone); and at
    its end float32 `[n, n]`, n = 64 x 64, 67 MB. Its `recordings` are gamma at each step, float32 `[T, h, w]` an image.

    Raises InputError as `check_guidance`, for a prompt that cannot be read, and within the run where layers are taken
    from a cache or the batch has other parts than the two halves.
    """
    check_guidance(pipe, scale)
    return Guide(pipe, [prompts] if isinstance(prompts, str) else list(prompts), scale, averages)


class Guide(Hooked[Tensor]):
    """Context manager made by `guided_by_region`. It alone of the hooks changes what the denoiser gives."""

    def __init__(self, pipe: Pipeline, prompts: list[str], scale: float, averages: bool):
        super().__init__(pipe, "conditional")
        self._scale, self._averages = scale, averages
        self._preset = goca_preset(self._adapter)
        self._blocks = {x.name: x for x in goca_blocks(self._adapter)}
        self._channels = pipe.vae.config.latent_channels  # of the output; PixArt has those of a variance behind them
        read = [self._adapter.tokenize(prompt).names for prompt in prompts]
        self._content = [[at for at, name in enumerate(names) if name not in SPECIAL] for names in read]
        # T5 has no `<SoT>`: there the prompt's own end token, its last, stands for the background.
        self._ends = [None if names[0] == SOT else len(names) - 1 for names in read]
        self._reset()

    def _reset(self) -> None:
        self._gammas: list[list[Tensor]] = []  # of each step, by image
        self._begin_step()

    def _begin_step(self) -> None:
        self._call, self._guided = NO_CALL, False
        self._conditional = self._unconditional = slice(0)
        self._rows: list[int] = []  # of the batch, whose maps are needed
        self._attended: Tensor | None = None  # bool `[batch, tokens]`, where padding is masked
        self._caught: dict[tuple[str, str], Tensor] = {}
        self._maps: dict[str, dict[int, Tensor]] = {}  # of each layer, by row

    def _attach(self, on: Callable[[Any], None]) -> None:
        on(self._adapter.denoiser.register_forward_pre_hook(self._on_call, with_kwargs=True))
        for name, block in self._blocks.items():
            for module, take in sources(block.cross_attention, "to_q"):
                on(module.register_forward_hook(self._after(name, "queries", take)))
            for module, take in _key_sources(block.cross_attention):
                on(module.register_forward_hook(self._after(name, "keys", take)))
            for projection, what in (("to_q", "self queries"), ("to_k", "self keys")):
                for module, take in sources(block.self_attention, projection):
                    on(module.register_forward_hook(self._after(name, what, take)))
            out = projection_of(block.cross_attention, "to_out")[0]
            on(out.register_forward_pre_hook(self._before_out(name, block.cross_attention, out)))
        on(self._adapter.denoiser.register_forward_hook(self._on_output))

    def _on_call(self, _denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._begin_step()
        self._guided = self._listener.guided
        if not self._guided:  # a callback may end the guidance in the middle of a run
            return
        if self._listener.parts != GUIDED:
            raise InputError(
                f"S-CFG guides a batch of two halves, and this {type(self._pipe).__name__} has one of "
                f"{self._listener.parts.count} parts: switch its other guidance off, or take the plain one."
            )
        self._call = self._adapter.call(args, kwargs)
        halves = [self._listener.images(x, self._call.batch) for x in ("conditional", "unconditional")]
        self._conditional, self._unconditional = halves
        self._rows = [*range(self._call.batch)[self._conditional]]
        if None in self._ends:
            self._rows += range(self._call.batch)[self._unconditional]
        mask = kwargs.get("encoder_attention_mask")
        self._attended = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None

    def _after(self, name: str, what: str, take: Take) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: tuple, output: Tensor) -> None:
            self._heard.add(name)
            if self._guided:
                self._caught[name, what] = self._whole(take(output.detach()))

        return hook

    def _whole(self, output: Tensor) -> Tensor:
        if len(output) != self._call.batch:
            raise InputError(CACHED)
        return output

    def _before_out(self, name: str, attention: Attention, out: nn.Module) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple) -> None:
            if self._guided:
                hidden = self._whole(inputs[0].detach())
                weights = _averaged if self._averages else _weighted_by(out, attention.heads)
                self._maps[name] = dict(self._layer_maps(name, attention, hidden, weights))

        return hook

    def _layer_maps(
        self, name: str, attention: Attention, hidden: Tensor, weights: Callable[[Tensor], Tensor]
    ) -> Iterator[tuple[int, Tensor]]:
        """The layer's map of every token, `[L, h, w]`, by row."""
        projected = self._caught[name, "queries"]
        height, _ = self._adapter.grid(projected.shape[1], self._call)
        queries = self._adapter.queries(attention, projected, self._call)
        keys = self._adapter.self_keys(attention, self._caught.pop((name, "keys")), self._call)
        hidden = rearrange(hidden, "b n (h d) -> b h n d", h=attention.heads)
        for row in self._rows:
            own = keys[row] if self._attended is None else keys[row][:, self._attended[row]]
            scaled = own.float() * self._adapter.scale(attention)
            pixels = layer_map(cross_attention(queries[row], scaled), weights(hidden[row]))
            yield row, rearrange(pixels, "l (h w) -> l h w", h=height)
        if name != self._preset.reference:
            del self._caught[name, "queries"]

    @torch.no_grad()
    def _on_output(self, _denoiser: nn.Module, _args: tuple, output: Any) -> Any:
        if not self._guided:
            return None
        self._check_heard()
        self._check_all_heard(self._blocks.keys())
        if self._maps.keys() != self._blocks.keys():
            raise InputError(CACHED)
        sample = output[0]
        without, given = (sample[half, : self._channels].float() for half in (self._unconditional, self._conditional))
        with torch.autocast(sample.device.type, enabled=False):
            gains = torch.stack([self._gain(image, given[image] - without[image]) for image in range(len(given))])
        guided = sample.clone()
        guided[self._conditional, : self._channels] = (given + gains[:, None] * (given - without)).to(sample.dtype)
        self._gammas.append(list(gains + 1))
        self._begin_step()
        return (guided, *output[1:]) if isinstance(output, tuple) else type(output)(sample=guided)

    def _gain(self, image: int, difference: Tensor) -> Tensor:
        """gamma - 1 of an image, whose halves are apart by `difference`, `[C, h, w]`."""
        row = self._conditional.start + image
        grid = region_grid(self._call.height, self._call.width)
        scores = self._scores(row, grid)
        prompt = image * len(self._content) // (self._conditional.stop - self._conditional.start)
        end = self._ends[prompt]
        background = self._scores(self._unconditional.start + image, grid)[0] if end is None else scores[end]
        carry = carrier([self._self_layer(name, row) for name in self._carrying()], grid)
        times = self._preset.options.propagations or 0
        labels, foreground = regions(scores, background, self._content[prompt], carry, times)
        return gain(difference, labels, foreground, self._scale)

    def _scores(self, row: int, size: Grid) -> Tensor:
        """The layers' maps of a row of the batch in one: `[L, *size]`, one in sum over tokens."""
        grids: dict[Grid, list[Tensor]] = {}  # resizing is linear: maps of one grid are summed first
        for name, weight in zip(self._blocks, self._layer_weights(row), strict=True):
            own = self._maps[name][row]
            grids.setdefault((own.shape[1], own.shape[2]), []).append(weight * own)
        return aggregate([summed(maps) for maps in grids.values()], [1.0] * len(grids), size)

    def _layer_weights(self, row: int) -> list[float]:
        if self._averages:
            return [1 / len(self._blocks)] * len(self._blocks)
        features = self._caught[self._preset.reference, "queries"][row]
        size = self._adapter.grid(len(features), self._call)
        layers = [self._self_layer(name, row) for name in self._blocks]
        return agreements(reference_affinity(features), size, layers, bool(self._preset.options.even_rows)).tolist()

    def _carrying(self) -> list[str]:
        """The blocks along whose self-attention the maps are carried."""
        if self._preset.options.propagation is not None:
            return list(self._preset.options.propagation)
        pixels = {name: self._caught[name, "self queries"].shape[1] for name in self._blocks}
        return [name for name, n in pixels.items() if n == max(pixels.values())]

    def _self_layer(self, name: str, row: int) -> SelfLayer:
        attention = self._blocks[name].self_attention
        projected, keys = (self._caught[name, what][row : row + 1] for what in ("self queries", "self keys"))
        return SelfLayer(
            name,
            *self._adapter.grid(projected.shape[1], self._call),
            self._adapter.queries(attention, projected, self._call)[0],
            self._adapter.self_keys(attention, keys, self._call)[0],
            self._adapter.scale(attention),
        )

    def _finish(self) -> list[Tensor]:
        return [torch.stack(steps) for steps in zip(*self._gammas, strict=True)]


def _averaged(hidden: Tensor) -> Tensor:
    """The same weight for every head: `[heads, n, d]` to `[heads, n]`."""
    return torch.full(hidden.shape[:2], 1 / len(hidden), device=hidden.device)


def _weighted_by(out: nn.Module, heads: int) -> Callable[[Tensor], Tensor]:
    """GoCA's weights of an attention's heads, by its output projection."""

    def weights(hidden: Tensor) -> Tensor:
        if type(out) is nn.Linear and not hasattr(out, "_hf_hook"):
            return head_weights(hidden, rearrange(out.weight.T, "(h d) c -> h d c", h=heads))
        flat = rearrange(hidden, "h n d -> n (h d)")
        return head_weights(hidden, projections(without_hooks(out), heads, flat))

    return weights


def _key_sources(attention: Attention) -> list[tuple[nn.Module, Take]]:
    """`sources` of the keys of a cross-attention, whose keys and values may be fused."""
    fused = getattr(attention, "to_kv", None)
    both = [] if fused is None else [(fused, lambda output: output.chunk(2, dim=-1)[0])]
    return [*sources(attention, "to_k"), *both]
