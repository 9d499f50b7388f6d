"""What test_export.py runs in processes of its own, to kill them. A fork server imports this once, the pipeline included."""

from __future__ import annotations

import multiprocessing
import resource
import sys
from pathlib import Path

import torch
from conftest import make_pipe
from diffusers import AutoencoderKL, StableDiffusionPipeline

from ovam_core.data.export import ExportSettings, export
from ovam_core.data.filters import Filters
from ovam_core.data.prompts import Prompt, work_list
from ovam_core.data.runs import Process


def small_pipe() -> StableDiffusionPipeline:
    """The tiny pipeline with 8 x 8 latents for an image of 64 pixels: a step takes milliseconds."""
    parts = make_pipe().components
    torch.manual_seed(1)
    parts["vae"] = AutoencoderKL(
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
    ).eval()
    pipe = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.ovam_name = "small"
    return pipe


PIPE = small_pipe()
CLASSES = ("cat", "car", "red bus")
PROMPTS = (
    Prompt("a cat"),
    Prompt("the car", seed=40, negative="red"),
    Prompt("a photograph of a cat and the red bus"),
    Prompt("a red bus, a car and a cat"),
)
WORK = work_list(PROMPTS, CLASSES, images_per_prompt=2, seed=7)
SETTINGS = ExportSettings(
    steps=2,
    guidance=4.0,
    width=64,
    height=64,
    tau=0.8,
    alpha=0.9,
    uncertain=0.01,
    formats=("coco", "parquet"),
    heatmaps=True,
    batch_size=2,
    threads=1,
    filters=Filters(min_coverage=0.11, max_coverage=0.9),
)


# The first call of anything imports and sets up: once here, not in each child.
PIPE("a cat", num_inference_steps=1, width=64, height=64, output_type="np")


def run(out: Path, workers: int = 0, largest_file: int | None = None, begun=None) -> None:
    """One export; where it is refused exit status 2, and the sentence in a file beside `out`."""
    if largest_file is not None:  # what a full disk looks like: writes fail midway
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    # A fork server of the child's own would import everything again; a child has no threads to lose in a fork.
    _context = lambda: multiprocessing.get_context("fork")
    if begun is not None:
        begun.set()
    try:
        export(PIPE, WORK, SETTINGS, out, workers=workers, process=Process())
    except ValueError as error:
        out.with_suffix(".said").write_text(str(error))
        sys.exit(2)
