"""Reads a data set in VOC layout: its list of images, their label maps, and what is to be asked of each.

What sets in other layouts share with it (label_folder.py) is here, too.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np

from ovam_core.data.label_sets import LABEL_SETS, LabelSet, Protocol
from ovam_core.data.layout import CLASSES, IMAGES, LABEL_MAPS, SETS
from ovam_core.data.prompts import Item, Work, check_classes, find_classes, match_class
from ovam_core.data.runs import digest, digest_of_file
from ovam_core.data.voc import VOC_CLASSES
from ovam_core.errors import InputError
from ovam_core.io.files import find_file
from ovam_core.io.masks import IGNORE
from ovam_core.io.pictures import open_picture, upright
from ovam_core.io.texts import read_text
from ovam_core.io.token_files import BACKGROUND
from ovam_core.models.words import units
from ovam_core.query import caption_of

# What a photograph is looked for by, in whatever case; all that `read_photo` reads.
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif")

LABELME_MAPS = "SegmentationClassPNG"  # where older editions of labelme2voc put them

LABELME_CLASSES = "class_names.txt"  # what labelme2voc writes, _background_ first; its list of labels has IGNORED too

IGNORED = "__ignore__"

GROUND_TRUTH = "gt"


# ------------------------------------------------------------------------------------------------ the data set


@dataclass(frozen=True)
class Asked:
    """What is asked of one image. parts: words, each with the class that it is of; several words may be of one class.
    background: words of what is none of them, None for the caption's other content words.
    """

    caption: str
    parts: tuple[tuple[str, str], ...]
    background: tuple[str, ...] | None = None

    @property
    def named(self) -> frozenset[str]:
        return frozenset(name for _, name in self.parts)


@dataclass(frozen=True)
class PhotoSet:
    """The images of a split. work: an item an image, its prompt the caption and its classes what is asked for; names:
    of their files, in the same order. asked: what of each image. kind: layout and classes. void: "ignore", or
    "background", which makes pixels that are left out such. listed: whether the captions are our own lists of classes.
    """

    root: Path
    split: str
    names: tuple[str, ...]
    work: Work
    asked: tuple[Asked, ...] = ()
    kind: LabelSet = LABEL_SETS["voc"]
    void: str = "ignore"
    listed: bool = False

    @property
    def labels(self) -> tuple[str, ...]:
        """The name of each label, from 0."""
        return ("background", *self.work.classes)

    @property
    def has_background(self) -> bool:
        """Whether label 0 is a class of the truth."""
        return self.kind.background or self.void == "background"

    def photo(self, item: Item) -> Path:
        raise NotImplementedError

    def truth_file(self, item: Item) -> Path:
        raise NotImplementedError

    def read(self, item: Item) -> np.ndarray:
        """The label map as it is, uint8 `[H, W]`."""
        raise NotImplementedError

    def truth(self, item: Item) -> np.ndarray:
        """The label map, uint8 `[H, W]`: 0 background, the classes from 1, 255 ignored."""
        labels = self.read(item)
        return np.where(labels == IGNORE, 0, labels).astype(np.uint8) if self.void == "background" else labels

    def fingerprint(self) -> str:
        """Changes with the list, the captions, the classes, the truth and the sizes of the photographs."""
        rows = [
            [name, item.prompt, *item.classes, self.photo(item).stat().st_size, digest_of_file(self.truth_file(item))]
            for name, item in zip(self.names, self.work.items, strict=True)
        ]
        return digest(json.dumps(rows).encode())

    def about(self) -> dict[str, str]:
        """What else a result depends on, where it is not VOC's usual."""
        words = [[one.parts, one.background] for one in self.asked]
        plain = all(word == name for one in self.asked for word, name in one.parts)
        plain = plain and all(one.background is None for one in self.asked)
        about = {} if self.kind.name == "voc" else {"set": self.kind.name}
        about |= {} if self.void == "ignore" else {"void": self.void}
        return about if plain else about | {"words": digest(json.dumps(words).encode())}

    def fitted(self, fits: Callable[[str, int], bool]) -> Self:
        """The set without the smallest classes of images whose own list of classes is too long to be a caption.

        fits: whether a caption, with this many words to ask for, can be read. Captions from a file stay.
        """
        if not self.listed:
            return self
        items, asked = list(self.work.items), list(self.asked)
        for place, item in enumerate(items):
            one = asked[place]
            if fits(one.caption, len(one.parts)):
                continue
            labels = self.truth(item)
            parts = sorted(one.parts, key=lambda part: -int((labels == self.work.ids([part[1]])[0]).sum()))
            while parts and not fits(caption_of([word for word, _ in parts]), len(parts)):
                parts.pop()
            kept = tuple(part for part in one.parts if part in parts)
            asked[place] = replace(one, caption=caption_of([word for word, _ in kept]), parts=kept)
            items[place] = _item(place, asked[place], self.work.classes)
        return replace(self, work=replace(self.work, items=tuple(items)), asked=tuple(asked))


@dataclass(frozen=True)
class VocSet(PhotoSet):
    """A set in VOC layout."""

    def photo(self, item: Item) -> Path:
        return _photo_file(self.root, self.names[item.index])

    def truth_file(self, item: Item) -> Path:
        return _truth_file(self.root, self.names[item.index])

    def read(self, item: Item) -> np.ndarray:
        return read_truth(self.truth_file(item), len(self.work.classes))


SomeSet = TypeVar("SomeSet", bound=PhotoSet)


def asked_items(data: SomeSet, classes_from: str | Path = GROUND_TRUTH, protocol: Protocol | None = None) -> SomeSet:
    """A set of images, of which nothing is asked yet, with what is asked of each.

    classes_from: see `read_voc`. protocol: None to ask what the file names; else entities are matched with the classes
    that the image's truth holds, those of others count as background, and the caption may get words at its end.
    Raises InputError, one sentence, for what cannot be read.
    """
    classes, listed = data.work.classes, str(classes_from) == GROUND_TRUTH
    present = [_present(data, item) if listed or protocol else () for item in data.work.items]
    if listed:
        pairs = [tuple((data.kind.word(name), name) for name in own) for own in present]
        asked = [Asked(caption_of([word for word, _ in one]), one) for one in pairs]
    else:
        asked = read_wanted(Path(classes_from), data.names, classes)
    if protocol is not None:
        asked = [_matched(one, own, data.kind, protocol) for one, own in zip(asked, present, strict=True)]
    for name, one in zip(data.names, asked, strict=True):
        words = [word.lower() for word, _ in one.parts]
        twice = next((word for word in words if words.count(word) > 1), None)
        if twice is not None:
            raise InputError(f"The word '{twice}' of '{name}' stands for two classes; name each by a word of its own.")
    items = tuple(_item(index, one, classes) for index, one in enumerate(asked))
    return replace(data, work=Work(items, classes), asked=tuple(asked), listed=listed and protocol is None)


def _item(index: int, asked: Asked, classes: Sequence[str]) -> Item:
    return Item(index, asked.caption, "", 0, tuple(name for name in classes if name in asked.named))


def unasked(names: Sequence[str], classes: tuple[str, ...]) -> Work:
    """An item for each name, of which nothing is asked yet."""
    return Work(tuple(Item(index, "", "", 0, ()) for index in range(len(names))), classes)


def _matched(asked: Asked, present: Sequence[str], kind: LabelSet, protocol: Protocol) -> Asked:
    """Words of classes that the truth does not hold are the background's; what the protocol adds stands at the end."""
    parts = [part for part in asked.parts if part[1] in present]
    missing = [name for name in present if name not in asked.named] if protocol.append_missing else []
    parts += [(kind.word(name), name) for name in missing]
    added = [kind.word(name) for name in missing] + (["background"] if protocol.background else [])
    dropped = tuple(word for word, name in asked.parts if name not in present)
    end = ("background",) if protocol.background else ()
    background = None if asked.background is None else (*asked.background, *dropped, *end)
    return Asked(", ".join([asked.caption, *added]), tuple(parts), background)


def read_voc(
    root: str | Path,
    split: str = "val",
    classes_from: str | Path = GROUND_TRUTH,
    limit: int | None = None,
    void: str = "ignore",
    protocol: Protocol | None = None,
) -> VocSet:
    """The images of ROOT/ImageSets/Segmentation/<split>.txt, at most `limit`, with what is asked for in each.

    classes_from: "gt", the classes of the image's own truth; or a JSON file, by image name a caption, in which the
    classes are found by name and synonym, or a list of classes, or {"caption": ..., "classes": [...]}, or {"caption":
    ..., "entities": {"person": ["man", "jacket"]}, "background": ["grass"]}: the words of each class, which need not
    be its name, and those of the background. Where there is no caption one lists the classes. void, protocol: see
    `PhotoSet`, `asked_items`. Raises InputError, one sentence, for what is missing or cannot be read.
    """
    root = Path(root)
    if limit is not None and limit < 1:
        raise InputError(f"The limit is {limit}; choose a whole number from 1.")
    names = read_names(root, split)[:limit]
    classes = read_classes(root)
    for name in names:
        for file in (_photo_file(root, name), _truth_file(root, name)):
            if not file.is_file():
                raise InputError(f"'{file.relative_to(root)}' is missing in '{root}', though {split}.txt names it.")
    return asked_items(VocSet(root, split, tuple(names), unasked(names, classes), void=void), classes_from, protocol)


def read_names(root: Path, split: str) -> list[str]:
    """The names of a split, in the order of its list."""
    if not split or Path(split).name != split:
        raise InputError(f"'{split[:40]}' is not the name of a split; write for example val.")
    file = root / SETS / f"{split}.txt"
    if not file.is_file():
        raise InputError(f"There is no list of images '{file}' that can be read: is '{root}' a data set in VOC layout?")
    lines = read_text(file, f"The list '{file}'").splitlines()
    names = [_listed_name(root, line.strip()) for line in lines if line.strip()]
    if not names:
        raise InputError(f"The list '{file}' names no image.")
    for name in names:
        if not _is_name(name):
            raise InputError(f"'{name[:80]}' in {split}.txt is not the name of an image.")
    if len(set(names)) < len(names):
        raise InputError(f"The list '{file}' names an image twice.")
    return names


def _listed_name(root: Path, line: str) -> str:
    """The name in a line of a list: it may have a space, the file's suffix, and VOC's -1, 0 or 1 behind it."""
    for name in (line, re.sub(r"\s+(?:-1|0|1)$", "", line)):
        stem, suffix = os.path.splitext(name)
        for one in (name, stem if suffix.lower() in SUFFIXES else name):
            if _is_name(one) and _photo_file(root, one).is_file():
                return one
    return stem if suffix.lower() in SUFFIXES else name


def _is_name(name: str) -> bool:
    return Path(name).name == name and "\0" not in name and not name.startswith(".")


def read_classes(root: Path) -> tuple[str, ...]:
    """The classes of labels 1, 2, ...: the lines of ROOT/classes.txt, or of labelme's, after the background; VOC's
    without such a file.
    """
    file = next((root / name for name in (CLASSES, LABELME_CLASSES) if (root / name).exists()), None)
    if file is None:
        return VOC_CLASSES
    lines = [" ".join(line.split()) for line in read_text(file, f"The list of classes '{file}'").splitlines()]
    lines = [line for line in lines if line and line != IGNORED]
    if not lines or units(lines[0]) != [BACKGROUND]:
        raise InputError(f"The first line of '{file}' must be background, the name of label 0.")
    return check_classes(lines[1:])


def read_truth(path: Path, classes: int) -> np.ndarray:
    """The label map in a palette or grey PNG, uint8 `[H, W]`: 0 background, 1 to `classes`, 255 ignored."""
    labels = read_numbers(path)
    highest = int(labels[labels != IGNORE].max(initial=0))
    if highest > classes:
        raise InputError(f"'{path}' holds the label {highest}, but there are {classes} classes.")
    return labels


def read_numbers(path: Path) -> np.ndarray:
    """The numbers in a palette or grey PNG, uint8 `[H, W]`."""
    with open_picture(path, f"'{path}' is not a label map that can be read.") as picture:
        mode, labels = picture.mode, np.array(upright(picture))
    if mode not in ("P", "L"):
        raise InputError(
            f"'{path}' is of mode {mode}; a label map is a palette or grey PNG whose values are the labels."
        )
    return labels


def read_wanted(file: Path, names: Sequence[str], classes: tuple[str, ...]) -> list[Asked]:
    """What a JSON file asks of each image; see `read_voc`."""
    if not file.exists():
        raise InputError(f"There is no file '{file}'; give gt or a JSON file of captions or classes.")
    text = read_text(file, f"The file '{file}'")
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError):
        raise InputError(f"'{file}' is not a JSON file that can be read.") from None
    if not isinstance(rows, dict):
        raise InputError(f"'{file}' must be a JSON object with a caption or a list of classes by image name.")
    stems = {os.path.splitext(name)[0]: row for name, row in rows.items() if name.lower().endswith(SUFFIXES)}
    return [_wanted(rows.get(name, stems.get(name)), name, classes) for name in names]


def _wanted(row: Any, name: str, classes: tuple[str, ...]) -> Asked:
    if row is None:
        raise InputError(f"The prompts say nothing of the image '{name}'.")
    if isinstance(row, str):
        return _by_name(row.strip(), find_classes(row, classes))
    if isinstance(row, dict) and "entities" in row:
        return _entities(row, name, classes)
    if isinstance(row, list):
        row = {"classes": row}
    caption, stated = (row.get("caption") or "", row.get("classes")) if isinstance(row, dict) else (None, None)
    is_list = isinstance(stated, list) and all(isinstance(one, str) for one in stated)
    if not isinstance(caption, str) or not (is_list or (stated is None and caption)):
        raise InputError(
            f"The prompt of '{name}' is neither a caption nor a list of classes, nor an object with these."
        )
    if stated is None:
        return _by_name(caption.strip(), find_classes(caption, classes))
    matched = {one: match_class(one, classes) for one in stated if units(one) != [BACKGROUND]}
    unknown = [one for one, match in matched.items() if match is None]
    if unknown:
        raise InputError(f"The class '{unknown[0][:60]}' of '{name}' is not among the classes of the data set.")
    return _by_name(caption.strip(), tuple(one for one in classes if one in matched.values()))


def _by_name(caption: str, names: tuple[str, ...]) -> Asked:
    return Asked(caption or caption_of(names), tuple((name, name) for name in names))


def _entities(row: dict, name: str, classes: tuple[str, ...]) -> Asked:
    """A row with words for each class; those of what is no class of the set are the background's, as are `background`
    and nothing else, where that is there.
    """
    entities, caption, background = row["entities"], row.get("caption"), row.get("background")
    if isinstance(entities, list) and all(isinstance(one, str) for one in entities):
        entities = {one: [one] for one in entities}
    words = list(entities.values()) if isinstance(entities, dict) else [None]
    words += [] if background is None else [background]
    if not isinstance(caption, str) or not caption.strip() or not all(map(_are_words, words)):
        raise InputError(
            f"The entities of '{name}' need a caption and, for each class, its words in it: "
            '{"caption": "...", "entities": {"person": ["man", "jacket"]}, "background": ["grass"]}.'
        )
    listed = {one: [own] if isinstance(own, str) else own for one, own in entities.items()}
    meant = {one: match_class(one, classes) for one in listed}
    parts = tuple(
        dict.fromkeys((word.strip(), meant[one]) for one, own in listed.items() if meant[one] for word in own)
    )
    others = [word.strip() for one, own in listed.items() if not meant[one] for word in own]
    if background is not None:
        background = tuple(dict.fromkeys([*([background] if isinstance(background, str) else background), *others]))
    return Asked(caption.strip(), tuple((word, str(one)) for word, one in parts), background)


def _are_words(value: Any) -> bool:
    """A word, or a list of words; no list of none, which would ask for nothing."""
    words = [value] if isinstance(value, str) else value
    return isinstance(words, list) and all(isinstance(one, str) and one.strip() for one in words)


def _present(data: PhotoSet, item: Item) -> tuple[str, ...]:
    """The classes that an image's truth holds."""
    return tuple(data.work.classes[label - 1] for label in np.unique(data.read(item)) if label not in (0, IGNORE))


def _photo_file(root: Path, name: str) -> Path:
    names = [f"{name}{suffix}" for suffix in SUFFIXES]
    return find_file(root / IMAGES, names) or root / IMAGES / names[0]


def _truth_file(root: Path, name: str) -> Path:
    own = f"{name}.png"
    found = find_file(root / LABEL_MAPS, [own]) or find_file(root / LABELME_MAPS, [own])
    return found or root / LABEL_MAPS / own
