"""Learning a token on from pictures that nobody drew a mask on: what they show, what stands where, what is learned.

A class's name, asked alone, has a mask in pictures of other things too. Asked beside the other things of its picture,
each pixel goes to the name whose map is strongest there and the dense CRF finds the edges: so generated pictures of a
class among others label themselves. The others are rows of X' of their own (Eqs. 3 and 6), rivals in one softmax,
which teach what the class is not. Not in the paper; docs/methods.md has what it gains.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from ovam_core.attention.mask import label_map
from ovam_core.checks import check_whole
from ovam_core.errors import InputError
from ovam_core.io.masks import IGNORE
from ovam_core.optimization import MAX_TOKEN_CLASSES
from ovam_core.picture import Picture, Segmentation
from ovam_core.presence import named_words
from ovam_core.query import caption_of
from ovam_core.settings import MAX_UNLABELLED

# What may stand beside a class where its user names nothing: things that every model knows, unlike one another.
COMPANIONS = (
    *("person", "car", "dog", "chair", "boat", "horse"),
    *("bus", "bottle", "sheep", "bicycle", "cat", "train"),
)
SECOND = 0.4  # share of the pictures in which two other things stand beside the class, not one
WEIGHT = 4.0  # of all pictures without masks, over that of the annotated ones
TEMPLATE = "A photograph of a {}"  # in which each thing is asked for


@dataclass(frozen=True)
class Scene:
    """A picture to be made: the things that it is to show, and its seed."""

    names: tuple[str, ...]
    seed: int

    @property
    def prompt(self) -> str:
        return caption_of(self.names)


@dataclass(frozen=True, eq=False)
class Unlabelled:
    """Pictures with labels that the model gave them. labels: uint8 `[H, W]` each, the place in `names` from 1, 0 for
    background, 255 for what is left out. names: the classes that are learned, then the things beside them.
    """

    pictures: tuple[Picture, ...]
    labels: tuple[np.ndarray, ...]
    names: tuple[str, ...]


def scenes(classes: Sequence[str], among: Sequence[str], count: int, seed: int = 0) -> list[Scene]:
    """`count` pictures, each of one of the classes in turn and of one or two of the others; the same ones for the same
    arguments.

    among: what may stand beside a class; what shares a word with one is left out. The other classes may too. Raises
    InputError for a count outside 1 to MAX_UNLABELLED a class, where nothing is left to stand beside a class, and for
    more things in all than a token has rows for.
    """
    check_whole("The number of pictures without masks", count, 1, MAX_UNLABELLED * len(classes))
    others = companions(classes, among)
    rng = np.random.default_rng([seed, count])
    planned = []
    for number in range(count):
        own = classes[number % len(classes)]
        beside = [name for name in (*classes, *others) if name != own]
        if not beside:
            raise InputError(f"Nothing is left to stand beside '{own}': name other things.")
        few = min(len(beside), 2 if rng.random() < SECOND else 1)
        names = [own, *(beside[place] for place in rng.choice(len(beside), few, replace=False))]
        rng.shuffle(names)
        planned.append(Scene(tuple(names), int(rng.integers(1 << 31))))
    shown = len({*classes, *(name for scene in planned for name in scene.names)})
    if shown > MAX_TOKEN_CLASSES:
        raise InputError(
            f"These pictures would show {shown} different things and a token has rows for {MAX_TOKEN_CLASSES}: name "
            "fewer things, or make fewer pictures."
        )
    return planned


def companions(classes: Sequence[str], among: Sequence[str]) -> tuple[str, ...]:
    """The things of `among`, each once, that share no word with a class. Raises InputError for what is no name."""
    among = [among] if isinstance(among, str) else list(among)
    if strange := [name for name in among if not isinstance(name, str) or not name.strip()]:
        raise InputError(f"What may stand beside the class is {strange[0]!r:.60}: give names, for example dog.")
    words = frozenset().union(*(named_words(name) for name in classes))
    plain = {clean.casefold(): clean for clean in (" ".join(name.split()) for name in reversed(among))}
    return tuple(name for name in reversed(plain.values()) if not named_words(name) & words)


def own_labels(found: Segmentation, names: Sequence[str], absent: Collection[str] = ()) -> np.ndarray:
    """A picture's labels from its things, each asked for by name: uint8 `[H, W]`, the place of each in `names` from 1.

    Where masks meet, the stronger map wins. absent: labels that are probably not there: what is theirs is left out,
    255, since something is there.
    """
    ids = [IGNORE if name in absent else names.index(name) + 1 for name in found.labels]
    return label_map(found.heatmaps, found.masks, ids)


@dataclass(frozen=True, eq=False)
class Lesson:
    """What one search learns from, as `OVAM.learn` takes it."""

    pictures: tuple[Picture, ...]
    targets: tuple[np.ndarray, ...]
    weights: tuple[float, ...]
    rivals: tuple[str, ...]


def lesson(
    pictures: Sequence[Picture], targets: Sequence[np.ndarray], classes: Sequence[str], made: Unlabelled
) -> Lesson:
    """Annotated pictures of weight 1 and those without masks, together WEIGHT times as heavy. made.names: the classes
    first.

    Things that no label shows get no row.
    """
    own = len(classes)
    shown = np.unique(np.concatenate([labels.ravel() for labels in made.labels])) if made.labels else np.empty(0, int)
    beside = [int(label) for label in shown if own < label < IGNORE]
    renumbered = np.zeros(256, np.uint8)
    renumbered[IGNORE] = IGNORE
    renumbered[: own + 1] = np.arange(own + 1)
    renumbered[beside] = own + 1 + np.arange(len(beside))
    further = tuple(renumbered[labels] for labels in made.labels)
    return Lesson(
        pictures=(*pictures, *made.pictures),
        targets=(*targets, *further),
        weights=(*[1.0] * len(pictures), *[WEIGHT * len(pictures) / max(1, len(further))] * len(further)),
        rivals=tuple(made.names[label - 1] for label in beside),
    )
