"""What is asked of a picture, as the page's fields and programs' calls give it, to settings."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ovam_core.errors import InputError
from ovam_core.methods import method_named, settings_of_text
from ovam_core.models.presets import ModelDefaults
from ovam_core.ovam import OVAM
from ovam_core.picture import Picture
from ovam_core.query import background_words
from ovam_core.settings import DEFAULT_METHOD, SegmentSettings, parse_numbers
from ovam_core.tokens import Token

NO_TOKENS = "The tokens are no list of names; choose them from the list."


def segment_settings(
    ovam: OVAM,
    picture: Picture | None,
    *,
    words: str = "",
    sentence: str = "",
    tau: Any,
    alpha: Any,
    crf: bool = True,
    steps: str = "",
    grids: Sequence[Any] = (),
    tokens: Sequence[Token] = (),
    method: str = DEFAULT_METHOD,
) -> SegmentSettings:
    """What is asked, as settings; grids ("1/8", ...) are turned into the resolutions of this recording.

    Words stay in their box while a method looks for tokens alone. Raises InputError for what cannot be read.
    """
    chosen = method_named(method)
    if chosen.asks == "token":
        words = sentence = ""
    # All of them is what a method that weighs every layer, or grid, asks for.
    weighs = chosen.needs_goca or chosen.weighs_grids
    resolutions = None if picture is None or weighs else _resolutions(ovam, picture, grids)
    settings = settings_of_text(
        words,
        sentence,
        tau=tau,
        alpha=alpha,
        crf=crf,
        step_indices=parse_numbers(steps, "denoising steps"),
        resolutions=resolutions,
        tokens=tuple(tokens),
        method=chosen.name,
    )
    return for_tokens(settings, ovam.preset)


def _resolutions(ovam: OVAM, picture: Picture, grids: Sequence[Any]) -> tuple[int, ...]:
    there = grid_names(ovam)
    if unknown := [grid for grid in grids if grid not in there]:
        raise InputError(f"There is no attention grid '{str(unknown[0])[:40]}'; choose among {', '.join(there)}.")
    size, recorded = picture.recording.image_size, picture.recording.resolutions
    return tuple(one for one in recorded if grid_name(size, one) in grids)


def for_tokens(settings: SegmentSettings, preset: ModelDefaults) -> SegmentSettings:
    """The sliders hold for tokens too once they are moved; until then every token keeps to its file's tau and alpha."""
    tau = settings.tau if settings.tau != preset.tau else None
    alpha = settings.alpha if settings.alpha != preset.alpha else None
    return replace(settings, token_tau=tau, token_alpha=alpha)


def grid_name(image_size: tuple[int, int], resolution: int) -> str:
    """An attention grid as a share of the image's side, "1/8" say: the same word for every image size."""
    return f"1/{2 ** round(math.log2(max(image_size) / resolution))}"


def grid_names(ovam: OVAM) -> list[str]:
    """The grids on which this model's cross-attention works, finest first, from its own description."""
    return [f"1/{pixels}" for pixels in ovam.adapter.strides]


def recommended_grid_names(ovam: OVAM) -> list[str]:
    """Those of them that the model's preset names."""
    wanted = ovam.preset.strides
    return [f"1/{pixels}" for pixels in ovam.adapter.strides if wanted is None or pixels in wanted]


def renewal(token: str) -> tuple[str, str]:
    """What tells that another token has taken the place of the one of this name; no two are the same."""
    return token, secrets.token_hex(8)


def prompt_words(caption: str) -> list[str]:
    """The words of a caption that name what one could point at, each once: no "a", no "photograph"."""
    return list(background_words(caption, ()))
