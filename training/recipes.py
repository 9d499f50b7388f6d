"""The two recipes: `full` for a GPU and about 25 minutes, `cpu` for two cores and a few hours."""

from __future__ import annotations

from dataclasses import dataclass

from training.nouns import NOUNS, VOC_NOUNS, Noun


@dataclass(frozen=True)
class Recipe:
    """Sizes and budgets. Budgets are minutes of training, so a slower machine trains less, not longer."""

    name: str
    nouns: tuple[Noun, ...]
    counts: tuple[float, ...]  # share of scenes with 1, 2, ... objects
    size: int  # pixels
    vae_widths: tuple[int, ...]
    latent_channels: int
    unet_widths: tuple[int, ...]  # one a resolution
    plain_levels: int  # the finest ones, that attend to the text alone and only on the way up
    unet_layers: int
    heads: int
    time_width: int
    text_width: int
    max_tokens: int
    scenes: int  # latents made once
    vae_scenes: int
    vae_minutes: float
    vae_batch: int
    unet_minutes: float
    unet_batch: int
    vae_rate: float
    unet_rate: float
    annotator_scenes: int
    annotator_minutes: float

    @property
    def latent_size(self) -> int:
        return self.size // 2 ** (len(self.vae_widths) - 1)


CPU = Recipe(
    name="cpu",
    nouns=VOC_NOUNS,
    counts=(0.35, 0.4, 0.25),
    size=128,
    vae_widths=(32, 64, 96),
    latent_channels=8,
    unet_widths=(64, 96, 160, 160),
    plain_levels=1,
    unet_layers=1,
    heads=4,
    time_width=384,
    text_width=256,
    max_tokens=20,
    scenes=60_000,
    vae_scenes=8_000,
    vae_minutes=75,
    vae_batch=16,
    vae_rate=2e-3,
    unet_minutes=240,
    unet_batch=32,
    unet_rate=8e-4,
    annotator_scenes=36_000,
    annotator_minutes=85,
)

FULL = Recipe(
    name="full",
    nouns=NOUNS,
    counts=(0.3, 0.35, 0.25, 0.1),
    size=256,
    vae_widths=(48, 96, 128, 128),
    latent_channels=16,
    unet_widths=(128, 192, 256),
    plain_levels=0,
    unet_layers=1,
    heads=8,
    time_width=512,
    text_width=384,
    max_tokens=28,
    scenes=150_000,
    vae_scenes=30_000,
    vae_minutes=5,
    vae_batch=64,
    vae_rate=1e-3,
    unet_minutes=14,
    unet_batch=512,
    unet_rate=6e-4,
    annotator_scenes=30_000,
    annotator_minutes=3,
)

RECIPES = {recipe.name: recipe for recipe in (CPU, FULL)}
