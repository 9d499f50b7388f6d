"""Record what the layers of a Stable Diffusion 1 UNet make at the last step of a run, for the systems in downstream/.

    with record(pipe) as recorder, record_features(pipe) as feature_recorder:
        image = pipe("a photograph of a cat").images[0]
    features = feature_recorder.recordings[0]

The hooks only read: the image is bit-identical to one made without them, and none is left afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ovam_core.attention.features import Features
from ovam_core.attention.heads import Attention, by_head
from ovam_core.errors import InputError
from ovam_core.hooks.recorder import NO_CALL, Hooked
from ovam_core.models.adapter import Pipeline, Take, sources
from ovam_core.models.registry import adapter_of
from ovam_core.models.stable_diffusion import StableDiffusion


def record_features(pipe: Pipeline) -> FeatureRecorder:
    """Record the last step of one guided run inside the `with` block; may stand beside `record` in the same `with`.

    Kept are, for both halves of the guided batch, the outputs of `feature_modules`, and of the conditional half the
    cross-attentions' softmax over the prompt as the run had it: for Stable Diffusion 1 at 512 pixels 106 MB an image in
    float16, 211 MB in float32, of which the attention is a third. While the step runs, the queries and keys of one
    attention at a time are held beside it.

    The last step is the call whose timestep is the last of the scheduler's: 1 with DDIM and PNDM at 50 steps, which is
    what the systems were trained on; other samplers end at another one (`Features.timestep`).

    Raises InputError for a pipeline of another family, for a run without guidance, and at the end of the block when the
    step was never made or was taken from a cache.
    """
    return FeatureRecorder(pipe)


def feature_modules(unet: Any) -> dict[str, nn.Module]:
    """The layers whose outputs are kept, by name, in the order in which they run.

    `conv_in`; of each down block its attentions, or its resnets where it has none, then its downsampler; the middle
    block; of each up block the same, then its upsampler.
    """
    return dict(_feature_modules(unet))


def _feature_modules(unet: Any) -> Iterator[tuple[str, nn.Module]]:
    yield "conv_in", unet.conv_in
    for number, block in enumerate(unet.down_blocks):
        yield from _of_block(f"down_blocks.{number}", block, "downsamplers")
    yield "mid_block", unet.mid_block
    for number, block in enumerate(unet.up_blocks):
        yield from _of_block(f"up_blocks.{number}", block, "upsamplers")


def _of_block(name: str, block: Any, resampler: str) -> Iterator[tuple[str, nn.Module]]:
    layers = "attentions" if getattr(block, "attentions", None) else "resnets"
    for kind in (layers, resampler):
        for number, module in enumerate(getattr(block, kind, None) or ()):
            yield f"{name}.{kind}.{number}", module


class FeatureRecorder(Hooked[Features]):
    """Context manager made by `record_features`. `recordings` holds one Features an image, as ordered in `.images`."""

    def __init__(self, pipe: Pipeline):
        super().__init__(pipe, "conditional")
        check_features(pipe)
        self._modules = feature_modules(self._adapter.denoiser)
        self._attentions, _ = self._adapter.attentions()
        self._reset()

    def _reset(self) -> None:
        self._number = -1  # of the denoiser's call going on
        self._call = NO_CALL
        self._keeping = False
        self._timestep = 0.0
        self._images = slice(0)  # the conditional part of the batch
        self._unconditional = slice(0)
        self._layers: dict[str, Tensor] = {}  # `[images, 2 C, h, w]`
        self._maps: dict[str, Tensor] = {}  # `[images, heads, L, h, w]`
        self._queries: dict[str, Tensor] = {}  # until their keys come

    def _attach(self, on: Callable[[Any], None]) -> None:
        on(self._adapter.denoiser.register_forward_pre_hook(self._on_call, with_kwargs=True))
        for name, module in self._modules.items():
            on(module.register_forward_hook(self._on_layer(name)))
        for name, attention in self._attentions.items():
            for module, take in sources(attention, "to_q"):
                on(module.register_forward_hook(self._on_queries(name, take)))
            for module, take in sources(attention, "to_k"):
                on(module.register_forward_hook(self._on_keys(name, attention, take)))

    def _on_call(self, _denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._number += 1
        self._call = self._adapter.call(args, kwargs)
        self._timestep = float(torch.as_tensor(self._call.timestep).flatten()[0])
        self._images = self._listener.images("conditional", self._call.batch)
        if self._listener.parts.unconditional is None:
            raise InputError(
                "Without guidance there is no unconditional half, whose features are kept too: raise the guidance "
                "scale above 1."
            )
        self._unconditional = self._listener.images("unconditional", self._call.batch)
        self._keeping = self._timestep == float(self._pipe.scheduler.timesteps[-1])

    def _on_layer(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: tuple, output: Any) -> None:
            self._heard.add(name)
            if self._keeping:
                made = self._whole(name, output if isinstance(output, Tensor) else output[0])
                self._layers[name] = torch.cat([made[self._unconditional], made[self._images]], dim=1)

        return hook

    def _on_queries(self, name: str, take: Take) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: tuple, output: Tensor) -> None:
            self._heard.add(name)
            if self._keeping:
                self._queries[name] = self._whole(name, take(output))[self._images]

        return hook

    def _on_keys(self, name: str, attention: Attention, take: Take) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: tuple, output: Tensor) -> None:
            projected = self._queries.pop(name, None)
            if self._keeping and projected is not None:
                queries = self._adapter.queries(attention, projected, self._call)
                keys = by_head(self._whole(name, take(output))[self._images], attention.heads)
                scores = torch.einsum("bhnd,bhld->bhln", queries.float(), keys.float()) * self._adapter.scale(attention)
                grid = self._adapter.grid(projected.shape[1], self._call)
                self._maps[name] = scores.softmax(dim=2).unflatten(3, grid).to(projected.dtype)

        return hook

    def _whole(self, name: str, output: Tensor) -> Tensor:
        """A layer's output for the whole batch. Raises InputError where a cache left a part of it out."""
        if len(output) != self._call.batch:
            raise InputError(
                f"The layer {name} computed {len(output)} parts of a batch of {self._call.batch}: its features cannot "
                "be recorded; switch off what skips them."
            )
        return output.detach()

    def _finish(self) -> list[Features]:
        self._check_heard(self._number + 1)
        self._check_all_heard([*self._modules, *self._attentions])
        if not self._layers:
            raise InputError(
                f"No features were recorded: the model was called {self._number + 1} times, and the last step of the "
                "schedule was not among them."
            )
        whole = {name: self._layers.get(name) for name in self._modules}
        maps = {name: self._maps.get(name) for name in self._attentions}
        if skipped := [name for name, x in (whole | maps).items() if x is None]:
            raise InputError(
                f"The last step took these layers from a cache: {', '.join(skipped)[:200]}; switch the cache off."
            )
        factor = self._pipe.vae_scale_factor
        return [
            Features(
                layers={name: x[image].clone() for name, x in whole.items() if x is not None},
                attention={name: x[image].clone() for name, x in maps.items() if x is not None},
                timestep=round(self._timestep),
                image_size=(self._call.height * factor, self._call.width * factor),
            )
            for image in range(self._images.stop - self._images.start)
        ]


def check_features(pipe: Pipeline) -> None:
    """Raises InputError where this pipeline's features cannot be recorded."""
    adapter = adapter_of(pipe)
    if not isinstance(adapter, StableDiffusion):
        raise InputError(f"The features of {adapter.name} are not recorded: load a model of Stable Diffusion 1.")
