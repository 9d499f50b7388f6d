"""The methods that the paper compares (section 4.1; supplement A.3), as settings of one machinery."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image
from torch import Tensor

from .mask import make_masks
from .recorder import Recording


@dataclass(frozen=True)
class Method:
    """How masks are made from a recording.

    steps: denoising steps of the run, None for the model's own number. only: the one step used, None for all.
    tau, alpha: threshold (Eq. 9) and self-attention floor (Eq. 8; 1 leaves it out) for words; token_tau, token_alpha:
    for optimised tokens. crf: whether a dense CRF follows.
    """

    name: str
    steps: int | None
    only: int | None
    crf: bool
    tau: float
    alpha: float
    token_tau: float
    token_alpha: float

    def select(self, recording: Recording) -> Recording:
        """The steps of a recording that the method looks at."""
        return recording if self.only is None else recording.select(steps=[self.only])

    def cut(self, token: bool) -> tuple[float, float]:
        """(tau, alpha) for a token or a word."""
        return (self.token_tau, self.token_alpha) if token else (self.tau, self.alpha)

    def masks(self, recording: Recording, maps: Tensor, image: Image.Image, token: bool = False) -> np.ndarray:
        """Masks bool `[L, H, W]` of maps `[L, h, w]` that were asked of `select(recording)`."""
        tau, alpha = self.cut(token)
        return make_masks(recording, maps, image, tau=tau, alpha=alpha, crf=self.crf)


DAAM = Method("DAAM", None, None, False, 0.4, 1.0, 0.8, 1.0)
ATTN2MASK = Method("Attn2Mask", 100, 50, True, 0.5, 1.0, 0.8, 1.0)
OVAM = Method("OVAM", None, None, True, 0.4, 0.85, 0.8, 0.95)
METHODS = {method.name: method for method in (DAAM, ATTN2MASK, OVAM)}
