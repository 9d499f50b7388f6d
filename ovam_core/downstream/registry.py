"""Which system goes by which name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ovam_core.downstream.datasetdm import DatasetDM
from ovam_core.downstream.grounded_diffusion import GroundedDiffusion
from ovam_core.downstream.method import SystemMethod
from ovam_core.downstream.sam import SAM
from ovam_core.errors import InputError
from ovam_core.methods import Method, plain_name
from ovam_core.settings import DEFAULT_METHOD, SYSTEMS

KINDS: tuple[type[SystemMethod[Any]], ...] = (GroundedDiffusion, DatasetDM)


def with_weights(name: str, weights: str | Path) -> Method:
    """The system of this name, in any case, with weights: of a file; for SAM, which refines any method ("goca + sam"),
    of a folder or hub id. Raises InputError for another name, file or folder.
    """
    for kind in KINDS:
        if plain_name(kind.name) == plain_name(name):
            return kind(weights)
    base, _, last = plain_name(name).rpartition(" + ")
    if last == plain_name(SAM.__name__):
        return SAM(weights, base or DEFAULT_METHOD)
    raise InputError(f"{str(name)[:40]} takes no weights; they go with {' or '.join(SYSTEMS)}.")
