"""What is compared: each arm trains on a first set, then at a tenth of the rate on a second, for steps equal in all.

What an arm got is kept in a file an arm and seed, and the weights after each first set, so that a run goes on where it
was.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.torch import load_file, save
from tqdm import tqdm

from benchmarks.downstream.pictures import Pictures, few_of
from benchmarks.downstream.segmenter import Training, build, evaluate, train
from ovam_core.data.runs import repeatable
from ovam_core.io.files import write_atomically


@dataclass(frozen=True)
class Sizes:
    """Pictures of each kind. few, twice, full: real ones. generated: before the filters."""

    few: int = 100
    twice: int = 200
    full: int = 1000
    generated: int = 1000
    test: int = 500


@dataclass(frozen=True)
class Arm:
    """The same set twice is a training on that set alone."""

    name: str
    first: str
    then: str


def arms_of(sizes: Sizes) -> list[Arm]:
    few, twice, full = (f"real {count}" for count in (sizes.few, sizes.twice, sizes.full))
    alone = {
        few: few,
        twice: twice,
        full: full,
        "names": "synthetic by names",
        "tokens": "synthetic by tokens",
        "annotator": "synthetic, the annotator's masks (ceiling)",
        "shuffled": "synthetic, masks of other pictures (floor)",
    }
    mixed = [Arm(f"synthetic by {way}, then {real}", way, real) for way in ("names", "tokens") for real in (few, full)]
    return [Arm(name, own, own) for own, name in alone.items()] + mixed


def set_of(name: str, folder: Path, seed: int) -> Pictures:
    """A set from the files that `keep_sets` wrote; of the real ones each seed takes a part of its own."""
    kind, _, count = name.partition(" ")
    with np.load(folder / f"{kind}.npz") as arrays:
        pictures = Pictures(arrays["images"], arrays["labels"])
    return few_of(pictures, int(count), seed) if count else pictures


def keep_sets(sets: Mapping[str, Pictures], folder: Path) -> None:
    for name, pictures in sets.items():
        buffer = io.BytesIO()
        np.savez(buffer, images=pictures.images, labels=pictures.labels)
        write_atomically(folder / f"{name}.npz", buffer.getvalue())


def result_file(folder: Path, arm: Arm, seed: int) -> Path:
    return folder / f"{arm.first}-{arm.then}-{seed}.npy".replace(" ", "")


def run(
    arms: Sequence[Arm], seeds: Sequence[int], folder: Path, training: Training, pool: Executor | None
) -> dict[str, np.ndarray]:
    """Counts int64 [seeds, N, 21, 3] of every arm on the test pictures. folder: with the sets."""
    tasks = [
        (first, [arm for arm in arms if arm.first == first], seed)
        for seed in seeds
        for first in dict.fromkeys(arm.first for arm in arms)
    ]
    open_ = [task for task in tasks if not all(result_file(folder, arm, task[2]).exists() for arm in task[1])]
    arguments = zip(*open_, strict=True) if open_ else ([], [], [])
    firsts, groups, own_seeds = arguments
    rest = [folder] * len(open_), [training] * len(open_)
    done = (pool.map if pool else map)(run_first, firsts, groups, own_seeds, *rest)
    for _ in tqdm(done, "trainings", total=len(open_), disable=None):
        pass
    return {arm.name: np.stack([np.load(result_file(folder, arm, seed)) for seed in seeds]) for arm in arms}


def run_first(first: str, arms: Sequence[Arm], seed: int, folder: Path, training: Training) -> None:
    """Trains on a first set, then every arm that goes on from there, in one thread; writes what they got."""
    weights = folder / f"{first}-{seed}.safetensors".replace(" ", "")
    with repeatable(1):
        if not weights.exists():
            network = build(seed)
            train(network, set_of(first, folder, seed), training.steps, training.batch, training.rate, seed)
            write_atomically(weights, save({name: value.contiguous() for name, value in network.state_dict().items()}))
        held_out = set_of("test", folder, seed)
        for arm in arms:
            path = result_file(folder, arm, seed)
            if path.exists():
                continue
            network = build(seed)
            network.load_state_dict(load_file(weights))
            pictures = set_of(arm.then, folder, seed)
            train(network, pictures, training.further, training.batch, training.rate / 10, seed + 1)
            buffer = io.BytesIO()
            np.save(buffer, evaluate(network, held_out))
            write_atomically(path, buffer.getvalue())
