"""What the systems have in common as methods: a `Method` (methods.py) that holds its weights, so it is made and not
listed in METHODS.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ovam_core.attention.features import Features
from ovam_core.attention.heatmap import resize
from ovam_core.downstream.pyramid import STABLE_DIFFUSION_1, STATISTICS, Layout, Statistics, layout_of
from ovam_core.downstream.weights import read_weights
from ovam_core.errors import InputError
from ovam_core.methods import Asks, Cut
from ovam_core.models.presets import ModelDefaults
from ovam_core.picture import Picture
from ovam_core.query import Query
from ovam_core.settings import SYSTEMS, SegmentSettings

if TYPE_CHECKING:
    from ovam_core.models.adapter import Pipeline

Net = TypeVar("Net", bound=nn.Module)
TAU = 0.5  # of the probability, in both papers; no share of a peak


class SystemMethod(ABC, Generic[Net]):
    """A method with trained modules of its own, asked by a class embedding `[1, E]`: a word's, or a token in its place.

    weights: the authors' file, see `read_weights`. statistics: what the batch norms divide by. "picture", the picture's
    own mean and variance: the authors' scripts never switch their module to evaluation, so that is what they were
    trained and published with. "stored": the running ones of the file. layout: of the UNet that the weights are for.
    Raises InputError for any other file.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    asks: ClassVar[Asks] = "words"
    takes_tokens: ClassVar[bool] = True
    cuts_each: ClassVar[bool] = False  # by a probability, which is no share of a map's peak (Eq. 9)
    run_steps: ClassVar[int | None] = None
    step: ClassVar[int | None] = None
    needs_goca: ClassVar[bool] = False
    needs_features: ClassVar[bool] = True
    keeps: ClassVar[frozenset[str]] = frozenset()
    weighs_grids: ClassVar[bool] = False
    crf: ClassVar[bool] = False
    has_alpha: ClassVar[bool] = False

    def __init__(self, weights: str | Path, *, statistics: Statistics = "picture", layout: Layout = STABLE_DIFFUSION_1):
        if statistics not in STATISTICS:
            raise InputError(f"The statistics are {str(statistics)[:40]!r}; choose {' or '.join(STATISTICS)}.")
        self.layout = layout
        with torch.device("meta"):
            net = self._empty(layout, statistics)
        shapes = {name: tuple(x.shape) for name, x in net.state_dict().items()}
        net.load_state_dict(read_weights(weights, shapes, self.name, SYSTEMS[self.name]), assign=True)
        self.net: Net = net.eval().requires_grad_(False)

    @abstractmethod
    def _empty(self, layout: Layout, statistics: Statistics) -> Net:
        """The system's modules, without weights."""

    @abstractmethod
    def class_embedding(self, pipe: Pipeline, caption: str, word: str) -> Tensor:
        """What a word is asked by, `[1, E]`, in the text encoder's dtype; a token of one row stands in its place.

        caption: of the picture. Raises InputError for a word that the text encoder cannot take.
        """

    @abstractmethod
    def probabilities(self, features: Features, embeddings: Sequence[Tensor]) -> Tensor:
        """float32 `[labels, H, W]` in [0, 1] at the picture's recorded size, of class embeddings `[1, E]`, float32.

        Features are float32, on the device of the modules.
        """

    def check(self, settings: SegmentSettings) -> None:
        if settings.sentence.strip() or settings.template != "{}":
            raise InputError(f"{self.name} asks for words alone; leave the attribution sentence and the template out.")
        if settings.step_indices is not None or settings.resolutions is not None:
            raise InputError(f"{self.name} looks at all grids of the last step; name no steps and no resolutions.")
        if settings.branch is not None:
            raise InputError(f"{self.name} looks at both halves of the guided batch; name none.")

    def check_words(self, pipe: Pipeline, caption: str, words: Sequence[str]) -> None:
        self._check_layout(pipe)
        for word in words:
            self.class_embedding(pipe, caption, word)

    def words(self, pipe: Pipeline, settings: SegmentSettings) -> list[Query]:  # noqa: ARG002
        return [Query((word,), None) for word in settings.words]

    def cut(self, query: Query, given: Cut, preset: ModelDefaults | None) -> Query:  # noqa: ARG002
        tau = given.token_tau if query.kind == "token" else given.tau
        return replace(query, tau=TAU if tau is None else tau, alpha=1.0)

    @torch.no_grad()
    def heatmaps(self, pipe: Pipeline, picture: Picture, queries: Sequence[Query]) -> Tensor:
        features = picture.features
        if features is None:
            raise InputError(
                f"{self.name} needs features of the UNet that were not recorded with this image: generate it with "
                "features=True, or choose another method."
            )
        self._check_layout(pipe)
        if features.timestep > 1:
            warnings.warn(
                f"{self.name} was trained on timestep 1, where DDIM and PNDM end at 50 steps; this run ended at "
                f"{features.timestep}.",
                stacklevel=2,
            )
        device = pipe._execution_device
        self.net.to(device)
        embeddings = [
            one.to(device, torch.float32) for query in queries for one in self._embeddings(pipe, picture.caption, query)
        ]
        return self.probabilities(_on(features, device), embeddings)

    def _embeddings(self, pipe: Pipeline, caption: str, query: Query) -> list[Tensor]:
        """`[1, E]` of each label: of a token its own row, of a word what the text encoder makes of it."""
        if query.kind == "token":
            prompt = query.attribution
            return [prompt.embedding[list(rows)] for rows in prompt.groups]
        return [self.class_embedding(pipe, caption, word) for word in query.labels]

    def masks(
        self,
        picture: Picture,
        maps: Tensor,
        queries: Sequence[Query],
        crf: bool = True,  # noqa: ARG002
        on_label: Callable[[], None] | None = None,  # noqa: ARG002
    ) -> np.ndarray:
        full = resize(maps, (picture.image.height, picture.image.width))
        taus = [query.tau for query in queries for _ in query.labels]
        return (full > full.new_tensor(taus)[:, None, None]).cpu().numpy()

    def _check_layout(self, pipe: Pipeline) -> None:
        if layout_of(pipe) != self.layout:
            raise InputError(
                f"These weights of {self.name} are for a UNet of {', '.join(map(str, self.layout.channels))} channels "
                f"and text of {self.layout.text}, and this {type(pipe).__name__} has another: load a model of Stable "
                "Diffusion 1."
            )


def _on(features: Features, device: Any) -> Features:
    layers, attention = (
        {name: x.to(device, torch.float32) for name, x in kept.items()}
        for kept in (features.layers, features.attention)
    )
    return replace(features, layers=layers, attention=attention)
