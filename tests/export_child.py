"""What test_export.py runs in processes of its own, to kill them. A fork server imports it once, with its pipeline."""

from __future__ import annotations

import multiprocessing
import resource
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import tqdm.auto
from pipelines import make_small

from ovam_core import OVAM
from ovam_core.data import runs
from ovam_core.data.export import ExportSettings, export_dataset
from ovam_core.data.prompts import Prompt, work_list
from ovam_core.data.runs import Process
from ovam_core.settings import Filters

PIPE = make_small()
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


def forked(workers: int) -> ProcessPoolExecutor:
    """A fork server of the child's own would import everything again. The fork is taken before other threads begin:
    what they hold at that instant would stay held in the worker.
    """
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork"), initializer=runs._begin_worker)
    pool.submit(int)
    return pool


def run(out: Path, workers: int = 0, largest_file: int | None = None, begun=None) -> None:
    """One export; where it is refused exit status 2, and the sentence in a file beside `out`."""
    if largest_file is not None:  # what a full disk looks like: writes fail midway
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    runs._processes = forked
    # The one it has is the fork server's and all its children's: a child killed within it would stop the others.
    for bar in (tqdm.std.tqdm, tqdm.auto.tqdm):
        bar.set_lock(threading.RLock())
    if begun is not None:
        begun.set()
    try:
        export_dataset(OVAM(PIPE), WORK, SETTINGS, out, workers=workers, process=Process())
    except ValueError as error:
        out.with_suffix(".said").write_text(str(error))
        sys.exit(2)
