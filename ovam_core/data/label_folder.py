"""Reads the sets of label_sets.py from the folders in which they are published.

    pascal-context-59, -60   JPEGImages/NAME.jpg, SegmentationClassContext/NAME.png (0 background, 1 to 59),
                             ImageSets/SegmentationContext/val.txt
    coco-object              images/val2017/NAME.jpg (or val2017/), annotations/val2017/NAME_instanceTrainIds.png
                             (GroupViT's: 0 background, 1 to 80), or what coco-stuff-27 reads
    coco-stuff-27            images/val2017/NAME.jpg, annotations/val2017/ or stuffthingmaps/val2017/ with NAME.png
                             (COCO's id less one, 255 void), NAME_labelTrainIds.png (171), NAME_labelTrainIds_27.png
    cityscapes               leftImg8bit/val/CITY/NAME_leftImg8bit.png, gtFine/val/CITY/NAME_gtFine_labelTrainIds.png
                             or NAME_gtFine_labelIds.png
    ade20k                   images/validation/NAME.jpg, annotations/validation/NAME.png (0 other, 1 to 150)

Pascal Context's 459 labels in .mat files are not read, nor are COCO's annotations in JSON: both are turned into label
maps by the public converters that these layouts come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ovam_core.data.label_sets import Encoding, LabelSet, Protocol, label_set
from ovam_core.data.prompts import Item
from ovam_core.data.voc_folder import (
    GROUND_TRUTH,
    SUFFIXES,
    PhotoSet,
    asked_items,
    read_numbers,
    read_voc,
    unasked,
)
from ovam_core.errors import InputError
from ovam_core.io.files import find_file
from ovam_core.io.texts import read_text


@dataclass(frozen=True)
class FolderSet(PhotoSet):
    """A set in a published layout. photos: files, one a name; truths: label maps with how they number the classes."""

    photos: tuple[Path, ...] = ()
    truths: tuple[tuple[Path, Encoding], ...] = ()

    def photo(self, item: Item) -> Path:
        return self.photos[item.index]

    def truth_file(self, item: Item) -> Path:
        return self.truths[item.index][0]

    def read(self, item: Item) -> np.ndarray:
        file, encoding = self.truths[item.index]
        return encoding.decode(read_numbers(file), file)


def read_set(
    name: str,
    root: str | Path,
    split: str | None = None,
    classes_from: str | Path = GROUND_TRUTH,
    limit: int | None = None,
    void: str | None = None,
    protocol: Protocol | None = None,
    names_from: str | Path | None = None,
) -> PhotoSet:
    """The images of a split of a set of LABEL_SETS, with what is asked of each.

    split: None for the protocol's, or the usual one. limit: at most this many. void: "ignore" or "background", for
    pixels that the truth leaves out; None for the protocol's, or to ignore them. classes_from, protocol: see
    `read_voc`, `asked_items`. names_from: a file of names, one a line, in their order, in place of all that the split
    has. Raises InputError, one sentence, for what is missing or cannot be read.
    """
    kind, root = label_set(name), Path(root)
    void = void or (protocol.void if protocol else "ignore")
    if void not in ("ignore", "background"):
        raise InputError(f"Void pixels are counted as '{void[:40]}'; choose ignore or background.")
    if split is None:
        split = (protocol.split if protocol else None) or kind.split
    if kind.name == "voc" and names_from is None:
        return read_voc(root, split, classes_from, limit, void, protocol)
    if limit is not None and limit < 1:
        raise InputError(f"The limit is {limit}; choose a whole number from 1.")
    if kind.name == "voc":
        raise InputError("A set in VOC layout has its lists in the folder: write one there and name it as --split.")
    if not split or Path(split).name != split or split in (".", ".."):
        raise InputError(f"'{split[:40]}' is not the name of a split; write for example {kind.split}.")
    folder = _folder(root, kind.photos, split, kind)
    there = _photos(folder, kind.photo_ending)
    names = _names(root, split, kind, names_from) or sorted(there)
    names = names[:limit]
    missing = next((one for one in names if one not in there), None)
    if missing is not None or not names:
        what = "no photograph" if missing is None else f"no photograph '{missing[:80]}{kind.photo_ending}'"
        raise InputError(f"There is {what} in '{folder}', where {kind.title} has its own.")
    if len({Path(one).name for one in names}) < len(names):
        raise InputError(f"Two photographs of '{folder}' have one name in different folders; give each its own.")
    maps = _folder(root, kind.maps, split, kind)
    data = FolderSet(
        root,
        split,
        tuple(Path(one).name for one in names),
        unasked(names, kind.classes),
        kind=kind,
        void=void,
        photos=tuple(there[one] for one in names),
        truths=tuple(_truth(maps, one, kind) for one in names),
    )
    return asked_items(data, classes_from, protocol)


def _folder(root: Path, folders: Sequence[str], split: str, kind: LabelSet) -> Path:
    """The first of these folders that there is."""
    tried = [root / one.format(split=split) for one in folders]
    found = next((one for one in tried if one.is_dir()), None)
    if found is None:
        raise InputError(f"There is no folder '{tried[0]}': is '{root}' {kind.title} as it is published?")
    return found


def _photos(folder: Path, ending: str) -> dict[str, Path]:
    """Photographs of a folder, and of those in it (Cityscapes' towns), by name: TOWN/NAME without ending and suffix."""
    photos: dict[str, Path] = {}
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() in SUFFIXES and file.stem.endswith(ending) and not file.name.startswith("."):
            name = file.relative_to(folder).with_name(file.stem.removesuffix(ending)).as_posix()
            photos.setdefault(name, file)
    return photos


def _names(root: Path, split: str, kind: LabelSet, names_from: str | Path | None) -> list[str]:
    """The names of a list, in its order; none where there is none."""
    if names_from is None and not kind.lists:
        return []
    file = Path(names_from) if names_from is not None else root / kind.lists.format(split=split)
    if not file.is_file():
        raise InputError(f"There is no list of images '{file}' that can be read.")
    lines = (line.strip() for line in read_text(file, f"The list '{file}'").splitlines())
    names = [_plain_name(line, kind.photo_ending) for line in lines if line]
    if not names:
        raise InputError(f"The list '{file}' names no image.")
    if len(set(names)) < len(names):
        raise InputError(f"The list '{file}' names an image twice.")
    return names


def _plain_name(line: str, ending: str) -> str:
    stem = line[: -len(Path(line).suffix)] if Path(line).suffix.lower() in SUFFIXES else line
    return stem.replace("\\", "/").removesuffix(ending)


def _truth(folder: Path, name: str, kind: LabelSet) -> tuple[Path, Encoding]:
    """The label map of a photograph, the first kind of file that there is."""
    place = folder / name
    for encoding in kind.encodings:
        found = find_file(place.parent, [f"{place.name}{encoding.ending}.png"])
        if found is not None:
            return found, encoding
    wanted = " or ".join(f"{place.name}{one.ending}.png" for one in kind.encodings)
    raise InputError(f"There is no label map of '{name[:80]}' in '{folder}': {wanted}.")
