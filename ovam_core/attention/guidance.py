"""S-CFG's maths: regions of one denoising step from its attention maps, and the strength of guidance in each.

Classifier-free guidance goes eps_u + w (eps_c - eps_u), the same w everywhere. S-CFG (Shen et al., CVPR 2024, arXiv
2404.05384) divides the picture into the regions of the prompt's words and gives each the strength gamma w at which its
difference is as large as that of the foreground. The maps are GoCA's (goca.py) or plain averages.

gamma is a ratio of differences of one step, so it is the same whatever the denoiser predicts: of v or x the difference
is that of eps times one number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ovam_core.attention.goca import SelfLayer, blur_size, gaussian_blur, min_max, self_attention_rows
from ovam_core.attention.heatmap import summed

Grid = tuple[int, int]  # height, width
Carry = Callable[[Tensor], Tensor]  # maps `[L, H, W]` one step along the self-attention

REGION_GRID = 64  # larger side of the grid of regions, where the latents are not smaller
BLUR = 5  # of GoCA, on a grid of 64 x 64
FOREGROUND = 0.5  # where `<SoT>` is weaker than that
WEAKEST, STRONGEST = 0.8, 3.0  # gamma
STRONGEST_SCALE = 15.0  # gamma times w
SMOOTHING = 0.5**0.5  # sigma of the 3 x 3 Gaussian over gamma; the authors' code writes 0.5 and so divides
EPSILON = 1e-8


def region_grid(height: int, width: int) -> Grid:
    """(height, width) of the grid of regions for latents of this size: theirs, but no side longer than REGION_GRID."""
    shrunk = min(1.0, REGION_GRID / max(height, width))
    return max(1, round(height * shrunk)), max(1, round(width * shrunk))


def regions(
    scores: Tensor, background: Tensor, content: Sequence[int], carry: Carry, times: int
) -> tuple[Tensor, Tensor]:
    """Which token has each pixel, int64 `[H, W]`, and what is foreground, bool `[H, W]`.

    scores: of the prompt's tokens, float32 `[L, H, W]`, one in sum over tokens. background: of the token that stands
    for none, `[H, W]`, as it is. content: places of the tokens that are no special ones, rising; those up to the last
    of them have regions, `<SoT>` included. carry: of `carrier`, done `times` times.
    """
    total = scores[list(content)].sum(dim=0)
    shares = torch.where(total > 0, scores[: content[-1] + 1] / total, 1 / len(content))
    blur = blur_size(BLUR, max(scores.shape[1:]))
    maps = torch.cat([background[None], min_max(gaussian_blur(shares, blur))])
    for _ in range(times):
        maps = carry(maps)
    maps = min_max(maps)
    return maps[1:].argmax(dim=0), min_max(gaussian_blur(maps[:1], blur))[0] < FOREGROUND


def gain(difference: Tensor, labels: Tensor, foreground: Tensor, scale: float) -> Tensor:
    """gamma - 1 at each pixel of the latents, float32 `[h, w]`.

    difference: eps_c - eps_u, `[C, h, w]`. labels, foreground: of `regions`, brought to the latents' size. scale: w.
    gamma is the mean norm of the difference in the foreground over that in the pixel's region, within bounds, smoothed.
    It is less by one, so that a gamma of one leaves the guidance as it is to the last bit.
    """
    norms = difference.float().norm(dim=0).flatten()
    both = torch.stack([labels, foreground.long()])[None].float()
    labels, inside = F.interpolate(both, size=difference.shape[1:], mode="nearest")[0].flatten(1)
    members = F.one_hot(labels.long()).float()  # a product, not a scatter, whose sums differ from run to run on a GPU
    means = norms @ members / (members.sum(dim=0) + EPSILON)
    foremost = (norms * inside).sum() / (inside.sum() + EPSILON)
    gamma = (foremost / (means + EPSILON))[labels.long()].clamp(WEAKEST, STRONGEST).clamp(max=STRONGEST_SCALE / scale)
    return smoothed((gamma - 1).reshape(difference.shape[1:]))


def smoothed(values: Tensor) -> Tensor:
    """A Gaussian of 3 x 3 pixels on values `[h, w]`, which are reflected at the edges."""
    at = torch.arange(-1, 2, device=values.device, dtype=values.dtype)
    kernel = torch.exp(-(at**2) / (2 * SMOOTHING**2))
    kernel = kernel / kernel.sum()
    padded = F.pad(values[None, None], [1] * 4, mode="reflect")
    return F.conv2d(padded, torch.outer(kernel, kernel)[None, None])[0, 0]


# ------------------------------------------------------------------------- self-attention on another grid than its own

# GoCA resizes a self-attention `[n, n]` to a grid of m pixels, `[m, m]`: its attending pixels (rows) are the nearest,
# its attended ones (columns) bilinear. Both are linear, so what it is multiplied with is resized in its place: a step
# of a run has no time for matrices of 4,096 x 4,096 a layer.


def carrier(layers: Sequence[SelfLayer], size: Grid) -> Carry:
    """Multiplies maps `[L, *size]` by the layers' mean self-attention, each as `resized_self_attention` has it.

    It holds one matrix float32 `[m, n]` for each grid among the layers, m at most size's and n at most its own pixels.
    """
    grids: dict[Grid, list[SelfLayer]] = {}
    for layer in layers:
        grids.setdefault((layer.height, layer.width), []).append(layer)
    rows_of = _rows_for(size)
    means = {grid: summed(map(rows_of, ones)) / len(layers) for grid, ones in grids.items()}

    def carry(maps: Tensor) -> Tensor:
        parts = [_spread(rows @ _drawn_to(maps, grid).flatten(1).T, grid, size) for grid, rows in means.items()]
        return rearrange(summed(parts), "(h w) l -> l h w", h=size[0])

    return carry


def agreements(affinity: Tensor, size: Grid, layers: Sequence[SelfLayer], even_rows: bool) -> Tensor:
    """`layer_weights` of `resized_self_attention` of the layers: float32 `[layers]`, one in sum.

    affinity: R on a grid of `size`, `[m, m]`. even_rows: as there.
    """
    drawn: dict[Grid, Tensor] = {}
    found = []
    for layer in layers:
        grid = layer.height, layer.width
        if grid not in drawn:
            drawn[grid] = _drawn_to(rearrange(affinity, "m (h w) -> m h w", h=size[0]), grid).flatten(1)
        rows = _rows_for(size)(layer)
        if even_rows:
            rows = rows / (rows @ _drawn_to(affinity.new_ones(1, *size), grid).flatten())[:, None]
        found.append((drawn[grid] * _spread(rows, grid, size)).sum())
    agreement = torch.stack(found)
    return agreement / agreement.sum()


def _rows_for(size: Grid) -> Callable[[SelfLayer], Tensor]:
    """Of a layer's head-averaged self-attention, the rows that a grid of `size` needs: float32 `[rows, n]`."""

    def rows(layer: SelfLayer) -> Tensor:
        needed, _ = _nearest((layer.height, layer.width), size, layer.queries.device)
        return torch.cat(list(self_attention_rows(layer, needed)))

    return rows


def _spread(rows: Tensor, grid: Grid, size: Grid) -> Tensor:
    """Rows of `_rows_for`, `[rows, ...]`, one for each pixel of `size`: `[m, ...]`."""
    return rows[_nearest(grid, size, rows.device)[1]]


def _nearest(grid: Grid, size: Grid, device: torch.device) -> tuple[Tensor, Tensor]:
    """The pixels of `grid` that are nearest to some pixel of `size`, rising, and for each of those its own of them."""
    pixels = torch.arange(grid[0] * grid[1], device=device, dtype=torch.float32).reshape(1, 1, *grid)
    return F.interpolate(pixels, size=size, mode="nearest").flatten().long().unique(return_inverse=True)


def _drawn_to(maps: Tensor, grid: Grid) -> Tensor:
    """The transpose of bilinear resizing from `grid`: maps `[L, H, W]` to `[L, *grid]`."""
    if maps.shape[1:] == grid:
        return maps
    rows, columns = (_resizing(small, large, maps) for small, large in zip(grid, maps.shape[1:], strict=True))
    return rows.T @ (maps @ columns)


def _resizing(small: int, large: int, like: Tensor) -> Tensor:
    """Bilinear resizing along one side as a matrix, `[large, small]`."""
    units = torch.eye(small, device=like.device, dtype=like.dtype)
    return F.interpolate(units[None], size=large, mode="linear", align_corners=False)[0].T
