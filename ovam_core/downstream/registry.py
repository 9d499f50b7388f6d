"""Which system goes by which name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ovam_core.downstream.datasetdm import DatasetDM
from ovam_core.downstream.grounded_diffusion import GroundedDiffusion
from ovam_core.downstream.method import SystemMethod
from ovam_core.errors import InputError
from ovam_core.methods import plain_name
from ovam_core.settings import SYSTEMS

KINDS: tuple[type[SystemMethod[Any]], ...] = (GroundedDiffusion, DatasetDM)


def with_weights(name: str, weights: str | Path) -> SystemMethod[Any]:
    """The system of this name, in any case, with the weights of a file. Raises InputError for another name or file."""
    for kind in KINDS:
        if plain_name(kind.name) == plain_name(name):
            return kind(weights)
    raise InputError(f"{str(name)[:40]} takes no weights; they go with {' or '.join(SYSTEMS)}.")
