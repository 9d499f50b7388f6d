"""Reads a data set in VOC layout: its list of images, their label maps, and what is to be asked of each."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ovam_core.data.layout import CLASSES, IMAGES, LABEL_MAPS, SETS
from ovam_core.data.prompts import Item, Work, check_classes, find_classes, match_class
from ovam_core.data.runs import digest
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
class VocSet:
    """The images of a split. work: an item an image, its prompt the caption and its classes what is asked for;
    names: of their files, in the same order.
    """

    root: Path
    split: str
    names: tuple[str, ...]
    work: Work

    @property
    def labels(self) -> tuple[str, ...]:
        """The name of each label, from 0."""
        return ("background", *self.work.classes)

    def photo(self, item: Item) -> Path:
        return _photo_file(self.root, self.names[item.index])

    def truth(self, item: Item) -> np.ndarray:
        return read_truth(_truth_file(self.root, self.names[item.index]), len(self.work.classes))

    def fingerprint(self) -> str:
        """Changes with the list, the captions, the classes and the sizes of the files."""
        rows = [
            [
                name,
                item.prompt,
                *item.classes,
                self.photo(item).stat().st_size,
                _truth_file(self.root, name).stat().st_size,
            ]
            for name, item in zip(self.names, self.work.items, strict=True)
        ]
        return digest(json.dumps(rows).encode())


def read_voc(
    root: str | Path, split: str = "val", classes_from: str | Path = GROUND_TRUTH, limit: int | None = None
) -> VocSet:
    """The images of ROOT/ImageSets/Segmentation/<split>.txt, at most `limit`, with what is asked for in each.

    classes_from: "gt", the classes of the image's own truth; or a JSON file, by image name a caption, in which the
    classes are found by name and synonym, or a list of classes, or {"caption": ..., "classes": [...]}. Where there is
    no caption one lists the classes. Raises InputError, one sentence, for what is missing or cannot be read.
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
    if str(classes_from) == GROUND_TRUTH:
        wanted = [("", _present(_truth_file(root, name), classes)) for name in names]
    else:
        wanted = read_wanted(Path(classes_from), names, classes)
    items = [Item(index, caption or caption_of(own), "", 0, own) for index, (caption, own) in enumerate(wanted)]
    return VocSet(root, split, tuple(names), Work(tuple(items), classes))


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
    with open_picture(path, f"'{path}' is not a label map that can be read.") as picture:
        mode, labels = picture.mode, np.array(upright(picture))
    if mode not in ("P", "L"):
        raise InputError(
            f"'{path}' is of mode {mode}; a label map is a palette or grey PNG whose values are the labels."
        )
    highest = int(labels[labels != IGNORE].max(initial=0))
    if highest > classes:
        raise InputError(f"'{path}' holds the label {highest}, but there are {classes} classes.")
    return labels


def read_wanted(file: Path, names: Sequence[str], classes: tuple[str, ...]) -> list[tuple[str, tuple[str, ...]]]:
    """(caption or "", classes) of each image from a JSON file; see `read_voc`."""
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


def _wanted(row: Any, name: str, classes: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    if row is None:
        raise InputError(f"The prompts say nothing of the image '{name}'.")
    if isinstance(row, str):
        return row.strip(), find_classes(row, classes)
    if isinstance(row, list):
        row = {"classes": row}
    caption, stated = (row.get("caption") or "", row.get("classes")) if isinstance(row, dict) else (None, None)
    is_list = isinstance(stated, list) and all(isinstance(one, str) for one in stated)
    if not isinstance(caption, str) or not (is_list or (stated is None and caption)):
        raise InputError(
            f"The prompt of '{name}' is neither a caption nor a list of classes, nor an object with these."
        )
    if stated is None:
        return caption.strip(), find_classes(caption, classes)
    matched = {one: match_class(one, classes) for one in stated if units(one) != [BACKGROUND]}
    unknown = [one for one, match in matched.items() if match is None]
    if unknown:
        raise InputError(f"The class '{unknown[0][:60]}' of '{name}' is not among the classes of the data set.")
    return caption.strip(), tuple(one for one in classes if one in matched.values())


def _present(file: Path, classes: tuple[str, ...]) -> tuple[str, ...]:
    ids = np.unique(read_truth(file, len(classes)))
    return tuple(classes[label - 1] for label in ids if label not in (0, IGNORE))


def _photo_file(root: Path, name: str) -> Path:
    names = [f"{name}{suffix}" for suffix in SUFFIXES]
    return find_file(root / IMAGES, names) or root / IMAGES / names[0]


def _truth_file(root: Path, name: str) -> Path:
    own = f"{name}.png"
    found = find_file(root / LABEL_MAPS, [own]) or find_file(root / LABELME_MAPS, [own])
    return found or root / LABEL_MAPS / own
