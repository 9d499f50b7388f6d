"""Features of four grids fused from coarse to fine: what Grounded Diffusion and DatasetDM have in common.

Attribute names are those of the authors' state dicts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovam_core.errors import InputError

EPS = 1e-4  # of the batch norms and of the power iteration
STATISTICS = ("picture", "stored")
Statistics = Literal["picture", "stored"]


@dataclass(frozen=True)
class Layout:
    """A UNet as the systems know it. channels: of its four levels, finest first. text: width of an embedding; tokens:
    of a padded prompt. heads: of each attention.
    """

    channels: tuple[int, int, int, int] = (320, 640, 1280, 1280)
    text: int = 768
    tokens: int = 77
    heads: int = 8

    @property
    def features(self) -> tuple[int, int, int, int]:
        """Channels of all that `Features.layers` keeps, both halves, coarsest grid first: DatasetDM's."""
        a, b, c, d = self.channels
        return 2 * (c + 6 * d), 2 * (b + 5 * c + d), 2 * (a + 5 * b + c), 2 * (6 * a + b)

    @property
    def without_last(self) -> tuple[int, int, int, int]:
        """The same without what an upsampler follows at once: Grounded Diffusion's."""
        all_of, (_, b, c, d) = self.features, self.channels
        return all_of[0] - 2 * d, all_of[1] - 2 * c, all_of[2] - 2 * b, all_of[3]


STABLE_DIFFUSION_1 = Layout()


def layout_of(pipe: Any) -> Layout | None:
    """The layout of a pipeline's UNet; None where it is not built as Stable Diffusion 1's is."""
    config = getattr(getattr(pipe, "unet", None), "config", None)
    tokenizer = getattr(pipe, "tokenizer", None)
    if config is None or tokenizer is None:
        return None
    down, up = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
    heads = config.get("num_attention_heads") or config.get("attention_head_dim")
    built = (
        tuple(config.get("down_block_types") or ()) == (down, down, down, "DownBlock2D")
        and tuple(config.get("up_block_types") or ()) == ("UpBlock2D", up, up, up)
        and config.get("layers_per_block") == 2
        and isinstance(heads, int)
        and isinstance(config.get("cross_attention_dim"), int)
    )
    if not built:
        return None
    a, b, c, d = config.block_out_channels
    return Layout((a, b, c, d), config.cross_attention_dim, tokenizer.model_max_length, heads)


def by_grid(layers: Mapping[str, Tensor]) -> list[list[Tensor]]:
    """Tensors `[..., h, w]` in lists of one grid each, coarsest first, in their order. Raises InputError unless there
    are four grids.
    """
    grids: dict[tuple[int, int], list[Tensor]] = {}
    for x in layers.values():
        grids.setdefault((x.shape[-2], x.shape[-1]), []).append(x)
    if len(grids) != 4:
        raise InputError(f"These features lie on {len(grids)} grids and not on four: they are of another model.")
    return [grids[size] for size in sorted(grids)]


def resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    """`[B, C, h, w]` to `[B, C, H, W]`, bilinear, corners not aligned, as both systems resize everything."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class SpectralConv(nn.Conv2d):
    """A convolution whose weight `W` (its outputs by all else) is divided by an estimate of its largest singular value.

    One power iteration at every forward: `v = u0 W / |u0 W|`, `u = v W^T / |v W^T|`, `s = v W^T u^T`; norms are at
    least 1e-4. The buffer stays as it was read: the authors' code writes `u` back in training mode, so that a second
    forward of theirs differs from the first in what the iteration has still to gain. `sv0` is a note nothing reads.
    """

    u0: Tensor

    def __init__(self, given: int, made: int, side: int):
        super().__init__(given, made, side, padding=side // 2)
        self.register_buffer("u0", torch.zeros(1, made))
        self.register_buffer("sv0", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        matrix = self.weight.flatten(1)
        v = F.normalize(self.u0 @ matrix, eps=EPS)
        u = F.normalize(v @ matrix.T, eps=EPS)
        largest = (v @ matrix.T @ u.T).squeeze()
        return F.conv2d(x, self.weight / largest, self.bias, padding=self.padding)


class FusionBlock(nn.Module):
    """Batch norm without affine, ReLU, 3 x 3, batch norm, ReLU, 3 x 3, plus what entered the first convolution.

    The ReLU of the authors' code works in place, so that the shortcut carries the normalised and rectified input, and
    not the input; through a 1 x 1 convolution where the number of channels changes.
    """

    def __init__(self, given: int, made: int, statistics: Statistics):
        super().__init__()
        self.conv1, self.conv2 = SpectralConv(given, made, 3), SpectralConv(made, made, 3)
        self.conv_sc = SpectralConv(given, made, 1) if given != made else None
        self.statistics = statistics
        for place, width in (("1", given), ("2", made)):
            self.register_buffer(f"stored_mean{place}", torch.zeros(width))
            self.register_buffer(f"stored_var{place}", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self._normed(x, "1"))
        made = self.conv2(F.relu(self._normed(self.conv1(x), "2")))
        return made + (x if self.conv_sc is None else self.conv_sc(x))

    def _normed(self, x: Tensor, place: str) -> Tensor:
        if self.statistics == "picture":
            return F.batch_norm(x, None, None, training=True, eps=EPS)
        mean, variance = getattr(self, f"stored_mean{place}"), getattr(self, f"stored_var{place}")
        return F.batch_norm(x, mean, variance, training=False, eps=EPS)


def _projection(given: int, made: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(given, made, 1, bias=False))


class Pyramid(nn.Module):
    """The four grids, `[1, C, h, w]` each, coarsest first and each twice as fine as the one before, fused.

    given: their channels. widths: of each after its 1 x 1 convolution. mixed: of the three fusions.
    """

    def __init__(self, given: Sequence[int], widths: Sequence[int], mixed: Sequence[int], statistics: Statistics):
        super().__init__()
        low, mid, high, highest = map(_projection, given, widths)
        self.low_feature_conv, self.mid_feature_conv = low, mid
        self.high_feature_conv, self.highest_feature_conv = high, highest
        self.mid_feature_mix_conv = FusionBlock(widths[0] + widths[1], mixed[0], statistics)
        self.high_feature_mix_conv = FusionBlock(mixed[0] + widths[2], mixed[1], statistics)
        self.highest_feature_mix_conv = FusionBlock(mixed[1] + widths[3], mixed[2], statistics)

    def fused(self, grids: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(low, mid, high, highest): the first two are already resized for the next level, as both systems take them.

        Each grid but the finest is first brought to the next finer one, then projected.
        """
        _, second, third, finest = ((x.shape[-2], x.shape[-1]) for x in grids)
        low = resized(self.low_feature_conv(resized(grids[0], second)), third)
        mid = self.mid_feature_conv(resized(grids[1], third))
        mid = resized(self.mid_feature_mix_conv(torch.cat([low, mid], dim=1)), finest)
        high = self.high_feature_conv(resized(grids[2], finest))
        high = self.high_feature_mix_conv(torch.cat([mid, high], dim=1))
        highest = torch.cat([high, self.highest_feature_conv(grids[3])], dim=1)
        return low, mid, high, self.highest_feature_mix_conv(highest)


class Mlp(nn.Module):
    """Three linear layers with ReLU between them."""

    def __init__(self, given: int, hidden: int, made: int):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(given, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, made)])

    def forward(self, x: Tensor) -> Tensor:
        first, second, last = self.layers
        return last(F.relu(second(F.relu(first(x)))))
