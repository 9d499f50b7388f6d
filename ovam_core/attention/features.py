"""What a UNet's layers made at one step, of both halves of the guided batch, and its cross-attention to the prompt.

Kept for systems with trained modules of their own (downstream/). `hooks/feature_recorder.py` records it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Features:
    """Of one image.

    layers: by name, in the order in which the UNet runs them, `[2 C, h, w]`: the unconditional half's channels, then
    the conditional half's, in the model's dtype. attention: by the name of the cross-attention, in the order of
    the UNet's modules, `[heads, L, h, w]`: the conditional half's softmax over the L tokens of the prompt, padding
    included, same dtype. timestep: of the step, of 1000. image_size: (height, width) in pixels.
    """

    layers: dict[str, Tensor]
    attention: dict[str, Tensor]
    timestep: int
    image_size: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Bytes held: 106 MB for Stable Diffusion 1 at 512 x 512 in float16, twice that in float32."""
        return sum(x.nbytes for kept in (self.layers, self.attention) for x in kept.values())

    def detached(self) -> Features:
        """The same in host memory."""
        layers, attention = ({name: x.cpu() for name, x in one.items()} for one in (self.layers, self.attention))
        return replace(self, layers=layers, attention=attention)
