"""Scenes with exact masks: 1 to 4 pictures over a procedural background, a caption and a label map.

`scene(seed, size, nouns)` is a pure function of its arguments, so a data set is a range of seeds.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from training import backgrounds, sprites
from training.nouns import NOUNS, Noun

LABELS = {noun.name: number for number, noun in enumerate(NOUNS, start=1)}  # VOC ids 1..20 come first
MAX_OVERLAP = 0.12
SIDES = ((0.6, 0.88), (0.44, 0.6), (0.38, 0.5), (0.3, 0.42))  # of the image, with 1 to 4 objects
TURN = 4  # degrees, a deviation
HELD_OUT = 10_000_000  # first seed of the scenes that no training ever sees
BACKGROUND_SYNONYMS = {"sea": "water", "road": "street", "forest": "wood", "field": "meadow", "snow": "the winter"}
UNCOUNTED = {
    "furniture",
    "food",
    "people",
    "clothes",
    "luggage",
    "grapes",
    "glasses",
    "scissors",
    "corn",
    "bread",
    "cheese",
}


@dataclass(frozen=True)
class Scene:
    """`image` uint8 [S, S, 3]; `labels` uint8 [S, S], 0 background, else LABELS; `caption`; what is in it."""

    image: np.ndarray
    labels: np.ndarray
    caption: str
    nouns: tuple[str, ...]
    background: str


@cache
def _scaled(name: str, number: int, side: int) -> Image.Image:
    """A picture with premultiplied edges at a coarse set of sizes, cached: resizing dominates otherwise."""
    picture = sprites.load()[name][number]
    scale = side / max(picture.size)
    return picture.resize([max(2, round(length * scale)) for length in picture.size], Image.LANCZOS)


def _place(name: str, side: int, rng: np.random.Generator) -> np.ndarray:
    """One picture of a noun, flipped, turned and tinted: float32 [h, w, 4], colour 0..255, alpha 0..1."""
    number = int(rng.integers(len(sprites.load()[name])))
    picture = _scaled(name, number, max(8, side // 4 * 4))
    if rng.random() < 0.5:
        picture = picture.transpose(Image.FLIP_LEFT_RIGHT)
    picture = picture.rotate(float(rng.normal(0, TURN)), Image.BICUBIC, expand=True)
    pixels = np.asarray(picture, np.float32)
    tint = rng.uniform(0.85, 1.12) + rng.normal(0, 0.04, 3)
    return np.dstack([np.clip(pixels[..., :3] * tint, 0, 255), pixels[..., 3] / 255])


def _paste(canvas: np.ndarray, labels: np.ndarray, picture: np.ndarray, label: int, rng) -> bool:
    """Draw in place where at most MAX_OVERLAP of an earlier object is hidden; False if no such place was found."""
    size, (height, width) = len(canvas), picture.shape[:2]
    solid = picture[..., 3] > 0.5
    for _ in range(30):
        top = int(rng.integers(min(-height // 20, size - height), max(size - height + height // 20, 1) + 1))
        left = int(rng.integers(min(-width // 20, size - width), max(size - width + width // 20, 1) + 1))
        y0, x0, y1, x1 = max(top, 0), max(left, 0), min(top + height, size), min(left + width, size)
        inside = (slice(y0, y1), slice(x0, x1))
        cut = (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))
        covered = labels[inside][solid[cut]]
        hidden = [np.sum(covered == old) / np.sum(labels == old) for old in np.unique(covered) if old]
        if max(hidden, default=0) <= MAX_OVERLAP:
            alpha = picture[cut][..., 3:]
            canvas[inside] = canvas[inside] * (1 - alpha) + picture[cut][..., :3] * alpha
            labels[inside][solid[cut]] = label
            return True
    return False


def article(word: str) -> str:
    if word in UNCOUNTED:
        return word
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def _word(noun: Noun, rng: np.random.Generator) -> str:
    """The class name three times in four, else a synonym or, more rarely, a hypernym."""
    chance = rng.random()
    if noun.synonyms and chance < 0.17:
        return str(rng.choice(noun.synonyms))
    if noun.hypernyms and chance > 0.92:
        return str(rng.choice(noun.hypernyms))
    return noun.name


def _caption(words: list[str], background: str, rng: np.random.Generator) -> str:
    place = backgrounds.BACKGROUNDS[background][0]
    if rng.random() < 0.2:
        place = place.replace(background, BACKGROUND_SYNONYMS.get(background, background))
    things = [article(word) for word in words]
    listed = things[0] if len(things) == 1 else ", ".join(things[:-1]) + " and " + things[-1]
    chance = rng.random()
    if chance < 0.4:
        return f"A photograph of {listed}" + ("" if rng.random() < 0.5 else f" {place}")
    if chance < 0.65:
        return f"{listed} {place}"
    if chance < 0.8:
        return f"a picture of {listed} {place}"
    if chance < 0.9 and len(things) == 2:
        return f"{things[0]} next to {things[1]} {place}"
    return f"{listed}"


def scene(
    seed: int, size: int = 128, nouns: tuple[Noun, ...] = NOUNS, counts: tuple[float, ...] = (0.2, 0.45, 0.35)
) -> Scene:
    """One scene. `counts[k]` is the share of scenes with k + 1 objects; nouns are drawn evenly, without repeats."""
    rng = np.random.default_rng(seed)
    count = int(rng.choice(len(counts), p=counts)) + 1
    background = str(rng.choice(list(backgrounds.BACKGROUNDS)))
    canvas = backgrounds.paint(background, size, rng)
    labels = np.zeros((size, size), np.uint8)
    low, high = SIDES[count - 1]
    shown: list[Noun] = []
    for number in rng.choice(len(nouns), count, replace=False):
        noun = nouns[number]
        picture = _place(noun.name, round(size * rng.uniform(low, high)), rng)
        if _paste(canvas, labels, picture, LABELS[noun.name], rng):
            shown.append(noun)
    order = rng.permutation(len(shown))
    caption = _caption([_word(shown[index], rng) for index in order], background, rng)
    return Scene(canvas.round().astype(np.uint8), labels, caption, tuple(noun.name for noun in shown), background)


def all_words(nouns: tuple[Noun, ...] = NOUNS) -> list[str]:
    """Every whole word any caption can hold, sorted: the vocabulary of the tokenizer."""
    phrases = [text for noun in nouns for text in (noun.name, *noun.synonyms, *noun.hypernyms)]
    phrases += [phrase for phrase, _ in backgrounds.BACKGROUNDS.values()]
    phrases += [*backgrounds.BACKGROUNDS, *BACKGROUND_SYNONYMS.values()]
    phrases += ["a an the photograph picture of and next to on in at against with"]
    return sorted({word for phrase in phrases for word in phrase.split()})
