"""Segment Anything as an annotator on the second tab: offered where OVAM_SAM names its weights, loaded at a click."""

from __future__ import annotations

import logging
import os
from threading import Lock

import numpy as np
from PIL import Image

from ovam_core.downstream.sam import Prompt, Segmenter, check_weights
from ovam_core.errors import InputError

VARIABLE = "OVAM_SAM"  # hub id or folder


class Annotator:
    """The mask of what lies at a pixel. weights: hub id or folder of a SAM, of which no more than the kind is read yet.

    Raises InputError for what is none.
    """

    def __init__(self, weights: str):
        check_weights(weights)
        self._weights = weights
        self._segmenter: Segmenter | None = None
        self._loading = Lock()

    @classmethod
    def at_hand(cls) -> Annotator | None:
        """That of OVAM_SAM; None without it, and, with a line in the log, where it cannot be used."""
        weights = os.environ.get(VARIABLE, "").strip()
        if not weights:
            return None
        try:
            return cls(weights)
        except InputError as error:
            logging.getLogger("ovam").warning("Clicks are answered without %s=%s: %s", VARIABLE, weights[:200], error)
            return None

    def mask(self, image: Image.Image, x: int, y: int, device: object) -> np.ndarray:
        """bool [H, W] of the picture's size. Raises InputError where the weights cannot be loaded, or find nothing."""
        with self._loading:
            if self._segmenter is None:
                self._segmenter = Segmenter(self._weights)
        found = self._segmenter.masks(image, [Prompt((x, y))], str(device))[0]
        if not found.any():
            raise InputError("SAM finds nothing at this pixel; click elsewhere, or paint the object.")
        return found
