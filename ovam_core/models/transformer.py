"""What the transformers over patches have in common, by diffusion and by flow matching."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor

from ovam_core.attention.heads import Attention
from ovam_core.errors import InputError
from ovam_core.models.adapter import Adapter, Call, Denoiser, Pipeline, attentions_of


class TransformerAdapter(Adapter):
    """A transformer over patches of the latents: one attention grid for all of its layers.

    timestep_position: among the arguments of the denoiser. pixels: sides that
    are not multiples of it are refused or rounded by the pipeline, whatever the patches.
    """

    timestep_position: ClassVar[int] = 2
    pixels: ClassVar[int] = 8

    @classmethod
    def fits(cls, pipe: Pipeline) -> bool:
        return cls.draws(type(pipe)) or type(pipe).__name__ in cls.starts.values()

    @property
    def denoiser(self) -> Denoiser:
        return self.pipe.transformer

    @property
    def strides(self) -> tuple[int, ...]:
        return (self.pipe.vae_scale_factor * self.patch,)

    @property
    def side_multiple(self) -> int:
        return max(self.pixels, *self.strides)

    @property
    def patch(self) -> int:
        """Side of a patch, in latents."""
        return self.denoiser.config.patch_size

    def attentions(self) -> tuple[dict[str, Attention], dict[str, Attention]]:
        return attentions_of(self.denoiser)

    def call(self, args: tuple, kwargs: dict[str, Any]) -> Call:
        sample = args[0] if args else kwargs["hidden_states"]
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[self.timestep_position]
        height, width = sample.shape[-2:]
        return Call(len(sample), height, width, timestep, kwargs.get("image_rotary_emb"))

    def grid(self, n: int, call: Call) -> tuple[int, int]:
        height, width = call.height // self.patch, call.width // self.patch
        if height * width != n:
            raise InputError(f"An attention of {n} pixels does not fit a grid of {height} x {width} patches.")
        return height, width

    @property
    def photo_multiple(self) -> int:
        return self.side_multiple

    def moment(self, timestep: int, latents: Tensor) -> Tensor:
        return torch.full((len(latents),), timestep, device=latents.device)


class FlowTransformerAdapter(TransformerAdapter):
    """A transformer that was trained by flow matching (arXiv 2210.02747): its timestep is the share of noise."""

    photo_timestep: ClassVar[int] = 150  # of Flux; the others' is not published

    @property
    def knows_noise(self) -> bool:
        """There is no schedule beside the timestep."""
        return True

    def noised(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """(1 - sigma) x + sigma noise, sigma = t / 1000, the schedule's number of training timesteps.

        That is what a timestep means to the model: a sampler's flow shift only chooses which ones it visits.
        """
        sigma = timesteps.to(latents) / self.pipe.scheduler.config.num_train_timesteps
        sigma = rearrange(sigma, "t -> t 1 1 1")
        return (1 - sigma) * latents + sigma * noise
