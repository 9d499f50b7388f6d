"""Every method of the papers by name, and their combinations: settings and functions over what was recorded
of one image.

    with record(pipe) as recorder, record_goca(pipe) as goca_recorder:
        image = pipe(prompt).images[0]
    seen = Seen(image, recorder.recordings[0], prompt, goca_recorder.recordings[0])
    found = maps_and_masks(ALL_METHODS["GoCA"], pipe, seen, words=["cat"])

DAAM, Attn2Mask and OVAM: section 4.1 and supplement A.3 of the OVAM paper. GoCA: goca.py.
`ALL_METHODS[name].about` is a line for an interface; `asks` says whether a method takes words (and tokens
beside them) or tokens alone; `needs_goca` whether the pass of `record_goca` must be there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ovam_core.attention.goca import GocaRecording, Parts, attribute_weighted, goca, label_pixels
from ovam_core.attention.heatmap import Attribution, attribute, resize
from ovam_core.attention.mask import make_masks
from ovam_core.attention.recording import Recording
from ovam_core.errors import InputError
from ovam_core.query import attribute_words, background_words, caption_words, listed_words

Asks = Literal["words", "token"]


@dataclass(frozen=True, eq=False)
class Seen:
    """What was recorded of one image. Masks are made at the size of `image`.

    caption: the prompt of the recorded passes. goca: of `record_goca`, for the methods with `needs_goca`.
    """

    image: Image.Image
    recording: Recording
    caption: str = ""
    goca: GocaRecording | None = None


@dataclass(frozen=True, eq=False)
class Found:
    """maps: float32 `[labels, h, w]` in [0, 1], the recording's size. masks: bool `[labels, H, W]`, the
    image's size.
    """

    labels: tuple[str, ...]
    maps: Tensor
    masks: np.ndarray


@dataclass(frozen=True)
class Method:
    """Masks from the heatmaps of a recording, each map cut for itself (Eq. 9).

    steps: denoising steps of the run, None for the model's own number. only: the one step used, None for all.
    tau, alpha: threshold (Eq. 9) and self-attention floor (Eq. 8; 1 leaves it out) for words; token_tau,
    token_alpha: for optimised tokens. crf: whether a dense CRF follows. about: one line that says what it
    does.
    """

    name: str
    about: str
    steps: int | None
    only: int | None
    crf: bool
    tau: float
    alpha: float
    token_tau: float
    token_alpha: float
    asks: Asks = "words"

    needs_goca: ClassVar[bool] = False

    def select(self, recording: Recording) -> Recording:
        """The steps of a recording that the method looks at."""
        return recording if self.only is None else recording.select(steps=[self.only])

    def cut(self, token: bool) -> tuple[float, float]:
        """(tau, alpha) for a token or a word."""
        return (self.token_tau, self.token_alpha) if token else (self.tau, self.alpha)

    def maps(self, seen: Seen, asked: Sequence[Attribution]) -> Tensor:
        """Heatmaps float32 `[labels, h, w]` of words or tokens."""
        return attribute(self.select(seen.recording), asked)

    def masks(self, recording: Recording, maps: Tensor, image: Image.Image, token: bool = False) -> np.ndarray:
        """Masks bool `[L, H, W]` of maps `[L, h, w]` that were asked of `select(recording)`."""
        tau, alpha = self.cut(token)
        return make_masks(recording, maps, image, tau=tau, alpha=alpha, crf=self.crf)

    def run(
        self,
        pipe: Any,
        seen: Seen,
        words: Sequence[str],
        tokens: Sequence[Attribution],
        background: Sequence[str],
    ) -> Found:
        """As `maps_and_masks`; these methods know no background words."""
        asked = [*(attribute_words(pipe, words) if words else []), *tokens]
        maps, recording = self.maps(seen, asked), self.select(seen.recording)
        kinds = [(False, maps[: len(words)]), (True, maps[len(words) :])]
        masks = [self.masks(recording, part, seen.image, token) for token, part in kinds if len(part)]
        return Found(tuple(label for one in asked for label in one.labels), maps, np.concatenate(masks))


@dataclass(frozen=True)
class WeightedMethod(Method):
    """The same with GoCA's weights for heads and layers, from the one pass that they are made of: this
    project's extension.
    """

    needs_goca: ClassVar[bool] = True

    def maps(self, seen: Seen, asked: Sequence[Attribution]) -> Tensor:
        return attribute_weighted(seen.goca, asked)


@dataclass(frozen=True)
class GocaMethod:
    """Words compared with each other and with background nouns at each pixel; the largest score has the
    pixel.

    asking: (pipe, caption, words) to their attribution. parts: the steps of GoCA in use. offset: added to the
    background's score, the largest of its nouns'. tau: the background's score where there is no such noun.
    """

    name: str
    about: str
    asking: Callable[[Any, str, Sequence[str]], Attribution]
    parts: Parts = Parts()
    offset: float = 0.0
    tau: float = 0.4

    steps: ClassVar[int | None] = None
    only: ClassVar[int | None] = None
    crf: ClassVar[bool] = False
    asks: ClassVar[Asks] = "words"
    needs_goca: ClassVar[bool] = True

    def run(
        self,
        pipe: Any,
        seen: Seen,
        words: Sequence[str],
        tokens: Sequence[Attribution],
        background: Sequence[str],
    ) -> Found:
        """As `maps_and_masks`."""
        if tokens:
            raise InputError(f"{self.name} compares words; for a token choose {GOCA_TOKEN.name} or {OVAM_TOKEN.name}.")
        maps = goca(seen.goca, self.asking(pipe, seen.caption, [*words, *background]), self.parts)
        size = (seen.image.height, seen.image.width)
        full = resize(maps, size)
        pixels = label_pixels(full[: len(words)], full[len(words) :], self.offset if background else self.tau)
        masks = torch.stack([pixels == number for number in range(1, len(words) + 1)])
        return Found(tuple(words), maps[: len(words)], masks.cpu().numpy())


@torch.no_grad()
def maps_and_masks(
    method: Method | GocaMethod,
    pipe: Any,
    seen: Seen,
    words: Sequence[str] = (),
    tokens: Sequence[Attribution] = (),
    background: Sequence[str] | None = None,
) -> Found:
    """What a method finds of words and tokens, in that order.

    words: as `attribute_words` takes them. tokens: of `tokens.attribution`. background: nouns of what is none
    of the words, for the methods that compare (GoCA); None for the caption's other content words
    (`background_words`), among which a synonym of a word that is asked for would take its pixels: then name
    them. Raises InputError for nothing asked, for words of a method that asks for tokens and the other way
    round, without the recording that the method needs, and as the steps of the method do.
    """
    if method.asks == "token" and (words or not tokens):
        raise InputError(f"{method.name} takes tokens, not words: choose a token and no words, or another method.")
    if not words and not tokens:
        raise InputError("There is no word to look for: give at least one.")
    if method.needs_goca and seen.goca is None:
        raise InputError(f"{method.name} needs the pass of record_goca beside the recording: record the image anew.")
    words = list(words)
    background = background_words(seen.caption, words) if background is None else background
    return method.run(pipe, seen, words, tokens, background)


DAAM = Method(
    "DAAM",
    "The mean of all attention maps of a word, cut at a share of its peak.",
    None,
    None,
    False,
    0.4,
    1.0,
    0.8,
    1.0,
)

ATTN2MASK = Method(
    "Attn2Mask",
    "The maps of step 50 of a run of 100 steps alone, cut, then refined by a dense CRF.",
    100,
    50,
    True,
    0.5,
    1.0,
    0.8,
    1.0,
)

OVAM = Method(
    "OVAM",
    "The mean of all maps, times the self-attention a pixel receives, cut, then refined by a dense CRF.",
    None,
    None,
    True,
    0.4,
    0.85,
    0.8,
    0.95,
)

OVAM_TOKEN = Method(
    "OVAM + token",
    "OVAM with an embedding that was learned from a mask in place of the word.",
    None,
    None,
    True,
    0.4,
    0.85,
    0.8,
    0.95,
    asks="token",
)

GOCA = GocaMethod(
    "GoCA",
    "Words of the prompt, compared at each pixel: weighted heads and layers, spread along the self-attention.",
    caption_words,
)

GOCA_ANY = GocaMethod(
    "GoCA, any word",
    "GoCA for any word: what is compared is read as a list of its own. An extension of the paper.",
    listed_words,
)

OVAM_WEIGHTED = WeightedMethod(
    "OVAM, GoCA's weights",
    "OVAM on one pass, with GoCA's weights of heads and layers for the plain mean. Extends both papers.",
    None,
    None,
    True,
    0.4,
    0.85,
    0.8,
    0.95,
)

GOCA_TOKEN = WeightedMethod(
    "GoCA + token",
    "A learned embedding in place of the word, under GoCA's weights, on one pass. Extends both papers.",
    None,
    None,
    True,
    0.4,
    0.85,
    0.8,
    0.95,
    asks="token",
)

METHODS = {method.name: method for method in (DAAM, ATTN2MASK, OVAM)}  # those that any recording serves

ALL_METHODS: dict[str, Method | GocaMethod] = METHODS | {
    method.name: method for method in (OVAM_TOKEN, GOCA, GOCA_ANY, OVAM_WEIGHTED, GOCA_TOKEN)
}


def method_named(name: str) -> Method | GocaMethod:
    """The method of this name, whatever its case. Raises InputError that lists them all."""
    found = {one.lower(): method for one, method in ALL_METHODS.items()}
    if str(name).lower() not in found:
        raise InputError(f"There is no method '{str(name)[:40]}'; choose among {'; '.join(ALL_METHODS)}.")
    return found[str(name).lower()]
