"""The latent space: principal components of square pixel patches, a patch a latent position."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from einops import einsum, rearrange
from torch import Tensor

from training.recipes import Recipe

LEVELLING = 0.5  # of the way to equal deviations, in exponents
DEVIATION = 0.5  # of the latents over all


@dataclass(frozen=True)
class PatchSpace:
    """center float32 [patch], axes float32 [channels, patch]; patch = 3 * side * side values in [-1, 1]."""

    side: int
    center: Tensor
    axes: Tensor

    @classmethod
    def fit(cls, images: np.ndarray, recipe: Recipe) -> PatchSpace:
        """Components of uint8 [N, S, S, 3], scaled most of the way to equal deviations and to DEVIATION over all.

        Untouched ones would drown what tells a cat from a dog under colour and place.
        """
        side = recipe.size // recipe.latent_size
        patches = rearrange(images, "n (h a) (w b) c -> (n h w) (c a b)", a=side, b=side)
        patches = torch.from_numpy(patches[:: max(1, len(patches) // 100_000)]).double() / 127.5 - 1
        center = patches.mean(0)
        values, vectors = torch.linalg.eigh(torch.cov(patches.T))
        deviations = values.flip(0)[: recipe.latent_channels].sqrt()
        axes = vectors.T.flip(0)[: recipe.latent_channels] / deviations[:, None] ** LEVELLING
        overall = (deviations ** (2 - 2 * LEVELLING)).mean().sqrt()
        return cls(side, center.float(), (axes * DEVIATION / overall).float())

    @classmethod
    def of_encoder(cls, encode: Callable[[Tensor], Tensor], images: Tensor, side: int) -> PatchSpace:
        """The space that an autoencoder's encoder has learned, by least squares over images [N, 3, H, W] in [-1, 1].

        `fit` would give other axes: where two components vary almost alike, and in their signs, a library decides.
        """
        patches = rearrange(images.double(), "n c (h a) (w b) -> (n h w) (c a b)", a=side, b=side)
        latents = rearrange(encode(images).double(), "n k h w -> (n h w) k")
        center = patches.mean(0)
        patches = patches - center
        # What scenes hardly vary in is damped: of it the encoder has learned nothing.
        gram = patches.T @ patches
        damped = gram + 1e-6 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        axes = torch.linalg.solve(damped, patches.T @ (latents - latents.mean(0))).T
        # encode(x) = axes (x - center): the center at which the mean patch has the mean latent.
        return cls(side, (center - torch.linalg.pinv(axes) @ latents.mean(0)).float(), axes.float())

    def encode(self, images: Tensor) -> Tensor:
        """float [N, 3, H, W] in [-1, 1] to latents float32 [N, channels, H / side, W / side]."""
        patches = rearrange(images.float(), "n c (h a) (w b) -> n h w (c a b)", a=self.side, b=self.side)
        return einsum(patches - self.center, self.axes, "n h w p, k p -> n k h w")

    def to(self, device: torch.device) -> PatchSpace:
        return replace(self, center=self.center.to(device), axes=self.axes.to(device))

    def save(self, path: Path) -> None:
        np.savez(path, side=self.side, center=self.center.numpy(), axes=self.axes.numpy())

    @classmethod
    def load(cls, path: Path) -> PatchSpace:
        stored = np.load(path)
        return cls(int(stored["side"]), torch.from_numpy(stored["center"]), torch.from_numpy(stored["axes"]))
