"""How much is measured: on CUDA, on a CPU, and in a smoke run."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Sizes:
    """How much is measured, so that the whole takes some minutes.

    rounds: of each comparison; few_rounds: of those that take long; least: seconds of a round. *_steps: denoising
    steps, 0 leaves the row out. *side: pixels of the image. narrow: divides the UNets' channels. grids: of
    self-attentions, (name, side of the grid, heads, d).
    """

    rounds: int
    few_rounds: int
    least: float
    embedded_steps: int
    question_steps: int
    sd15_steps: int
    sd15_side: int
    sdxl_steps: int
    sdxl_side: int
    narrow: int
    side: int
    heatmap_steps: int
    token_steps: int
    plain_epochs: int
    paper_epochs: int
    grids: tuple[tuple[str, int, int, int], ...]
    growth_tokens: tuple[int, ...]
    growth_steps: tuple[int, ...]
    growth_sides: tuple[int, ...]
    growth_images: tuple[int, ...]


SD15_64 = ("SD 1.5 at 512 px, 64 x 64", 64, 8, 40)
SDXL_64 = ("SDXL at 1024 px, 64 x 64", 64, 10, 64)

CUDA = Sizes(
    rounds=7,
    few_rounds=3,
    least=0.1,
    embedded_steps=25,
    question_steps=25,
    sd15_steps=30,
    sd15_side=512,
    sdxl_steps=15,
    sdxl_side=1024,
    narrow=1,
    side=512,
    heatmap_steps=30,
    token_steps=30,
    plain_epochs=2,
    paper_epochs=500,
    grids=(SD15_64, SDXL_64, ("SDXL at 2048 px, 128 x 128", 128, 10, 64)),
    growth_tokens=(2, 8, 32, 77),
    growth_steps=(10, 30, 60),
    growth_sides=(256, 512, 1024),
    growth_images=(1, 2, 4),
)
CPU = replace(
    CUDA,
    rounds=5,
    embedded_steps=10,
    sd15_steps=1,
    sdxl_steps=0,
    heatmap_steps=3,
    token_steps=2,
    grids=(SD15_64, SDXL_64, ("SDXL at 2048 px, 128 x 128, 1 head of 10", 128, 1, 64)),
    growth_steps=(1, 2, 4),
    growth_sides=(256, 512, 768),
)
SMOKE = Sizes(
    rounds=2,
    few_rounds=1,
    least=0.0,
    embedded_steps=1,
    question_steps=2,
    sd15_steps=1,
    sd15_side=64,
    sdxl_steps=1,
    sdxl_side=64,
    narrow=10,
    side=64,
    heatmap_steps=2,
    token_steps=1,
    plain_epochs=2,
    paper_epochs=4,
    grids=(("8 x 8", 8, 2, 40),),
    growth_tokens=(2, 3),
    growth_steps=(1, 2),
    growth_sides=(64, 128),
    growth_images=(1, 2),
)
