"""The sets that open-vocabulary segmentation is measured on: classes, how files number them, and where files lie.

Class names and their order are the field's own (VOC's devkit, Pascal Context's 59 classes as mmsegmentation lists them,
COCO's categories, COCO-Stuff's 27 super-categories as IIC and STEGO list them, Cityscapes' 19 evaluated labels,
SceneParse150's objectInfo150); `words` says what is asked for where a name is no word that people write. Label 0 is the
background, 255 is left out (void); the classes are 1, 2, ... in the order of `classes`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ovam_core.data.voc import VOC_CLASSES
from ovam_core.errors import InputError
from ovam_core.io.masks import IGNORE

UNKNOWN = -1  # in a table: a number that no file of the kind holds

PASCAL_CONTEXT = tuple(
    """aeroplane bag bed bedclothes bench bicycle bird boat book bottle building bus cabinet car cat ceiling chair cloth
    computer cow cup curtain dog door fence floor flower food grass ground horse keyboard light motorbike mountain mouse
    person plate platform pottedplant road rock sheep shelves sidewalk sign sky snow sofa table track train tree truck
    tvmonitor wall water window wood""".split()
)

COCO_OBJECT = tuple(
    " ".join(
        """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
        parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella,
        handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard,
        surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange,
        broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv,
        laptop, mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase,
        scissors, teddy bear, hair drier, toothbrush""".split()
    ).split(", ")
)

CITYSCAPES = tuple(
    " ".join(
        """road, sidewalk, building, wall, fence, pole, traffic light, traffic sign, vegetation, terrain, sky, person,
        rider, car, truck, bus, train, motorcycle, bicycle""".split()
    ).split(", ")
)

# The number of each of these in labelIds files, in the same order; all other numbers, to 33, are not evaluated.
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
LAST_CITYSCAPES_ID = 33

ADE20K = tuple(
    " ".join(
        """wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth,
        door, table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, field,
        armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, signboard,
        chest of drawers, counter, sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway,
        case, pool table, pillow, screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower,
        book, hill, bench, countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade machine,
        hovel, bus, towel, light, truck, tower, chandelier, awning, streetlight, booth, television receiver, airplane,
        dirt track, apparel, pole, land, bannister, escalator, ottoman, bottle, buffet, poster, stage, van, ship,
        fountain, conveyer belt, canopy, washer, plaything, swimming pool, stool, barrel, basket, waterfall, tent, bag,
        minibike, cradle, oven, ball, food, step, tank, trade name, microwave, pot, animal, bicycle, lake, dishwasher,
        screen, blanket, sculpture, hood, sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen, plate,
        monitor, bulletin board, shower, radiator, glass, clock, flag""".split()
    ).split(", ")
)

# COCO-Stuff's 27 super-categories, each with its numbers in the files, COCO's ids less one: things, then stuff.
COCO_STUFF_27 = {
    "electronic-things": (*range(71, 77),),
    "appliance-things": (*range(77, 83),),
    "food-things": (*range(51, 61),),
    "furniture-things": (*range(61, 71),),
    "indoor-things": (*range(83, 91),),
    "kitchen-things": (*range(43, 51),),
    "accessory-things": (*range(25, 33),),
    "animal-things": (*range(15, 25),),
    "outdoor-things": (*range(9, 15),),
    "person-things": (0,),
    "sports-things": (*range(33, 43),),
    "vehicle-things": (*range(1, 9),),
    "ceiling-stuff": (101, 102),
    "floor-stuff": (100, *range(113, 118)),
    "food-stuff": (120, 121, 152, 169),
    "furniture-stuff": (97, 106, 107, 109, 111, 122, 129, 132, 155, 160, 164),
    "rawmaterial-stuff": (99, 131, 138, 142),
    "textile-stuff": (91, 92, 103, 104, 108, 130, 136, 140, 151, 166, 167),
    "wall-stuff": (*range(170, 177),),
    "window-stuff": (179, 180),
    "building-stuff": (94, 95, 127, 150, 157, 165),
    "ground-stuff": (110, 124, 125, 135, 139, 143, 144, 146, 148, 153, 158),
    "plant-stuff": (93, 96, 118, 123, 128, 133, 141, 162, 168),
    "sky-stuff": (105, 156),
    "solid-stuff": (126, 134, 149, 159, 161, 181),
    "structural-stuff": (98, 112, 137, 145, 163),
    "water-stuff": (119, 147, 154, 177, 178),
}

# Numbers below 91 that COCO has kept free: 80 of the 91 things exist, and all stuff from 91 to 181.
COCO_GAPS = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)
COCO_THINGS = tuple(number for number in range(91) if number not in COCO_GAPS)
COCO_NUMBERS = (*COCO_THINGS, *range(91, 182))  # the 171 classes, in the order of labelTrainIds


# ------------------------------------------------------------------------------------------------ numbers of files


def table_of(labels: Mapping[int, int]) -> np.ndarray:
    """int16 `[256]`: the label of each number that a file may hold, UNKNOWN for the others."""
    table = np.full(256, UNKNOWN, np.int16)
    for number, label in labels.items():
        table[number] = label
    return table


def from_zero(count: int) -> dict[int, int]:
    """Classes numbered from 0, 255 for what is none."""
    return {number: number + 1 for number in range(count)} | {IGNORE: IGNORE}


def from_one(count: int, zero: int) -> dict[int, int]:
    """Classes numbered from 1; zero: the label that 0 stands for."""
    return {number: number for number in range(1, count + 1)} | {0: zero, IGNORE: IGNORE}


def cityscapes_ids() -> dict[int, int]:
    labels = dict.fromkeys((*range(LAST_CITYSCAPES_ID + 1), IGNORE), IGNORE)  # 255: the licence plates' -1
    return labels | {number: place for place, number in enumerate(CITYSCAPES_IDS, start=1)}


def coco_object(numbers: Sequence[int]) -> dict[int, int]:
    """COCO-Object from files that hold these 171 numbers: the things, all else being background (GroupViT)."""
    labels = {number: place if place <= len(COCO_OBJECT) else 0 for place, number in enumerate(numbers, start=1)}
    return labels | {IGNORE: 0}


def coco_stuff_27(numbers: Sequence[int]) -> dict[int, int]:
    """The 27 from files that hold these 171 numbers, which stand for COCO_NUMBERS."""
    coarse = {number: label for label, own in enumerate(COCO_STUFF_27.values(), start=1) for number in own}
    merged = {number: coarse[fine] for number, fine in zip(numbers, COCO_NUMBERS, strict=True)}
    return merged | {IGNORE: IGNORE}


@dataclass(frozen=True, eq=False)
class Encoding:
    """How the files of one ending number the classes. ending: of a file's name, before .png; labels: see `table_of`."""

    ending: str
    labels: Mapping[int, int]

    def decode(self, numbers: np.ndarray, file: object) -> np.ndarray:
        """The labels of a file's numbers, uint8 `[H, W]`. Raises InputError for one that the kind does not have."""
        labels = table_of(self.labels)[numbers]
        if (labels == UNKNOWN).any():
            strange = int(numbers[labels == UNKNOWN].max())
            raise InputError(f"'{file}' holds the label {strange}, which files of this kind do not have.")
        return labels.astype(np.uint8)


# ------------------------------------------------------------------------------------------------ the sets


@dataclass(frozen=True)
class Protocol:
    """GoCA's way with a set, as its published code has it. void: what is counted of pixels that are left out
    otherwise; known of VOC alone, so that ADE20K's 0 stays void. append_missing: a class of the truth that the caption
    lacks is added at its end. background: so is the word "background". split: what it was measured on, where that is
    not the set's usual one.
    """

    void: str = "ignore"
    append_missing: bool = False
    background: bool = False
    split: str | None = None


@dataclass(frozen=True, eq=False)
class LabelSet:
    """A set of photographs and label maps as it is published.

    title: for people. split: the usual one. background: whether label 0 is a class of the truth, which mIoU then
    includes. lists: the file of names, with {split}; "" for all files of the folder. photos, maps: folders, the first
    that there is. photo_ending: of a photograph's name, before its suffix, that its label map's lacks. encodings: of
    label maps; the first whose file is there. words: what a class is asked by, where that is not its name. goca: its
    protocol.
    """

    name: str
    title: str
    classes: tuple[str, ...]
    split: str
    photos: tuple[str, ...]
    maps: tuple[str, ...]
    encodings: tuple[Encoding, ...]
    background: bool = False
    lists: str = ""
    photo_ending: str = ""
    words: Mapping[str, str] = field(default_factory=dict)
    goca: Protocol = Protocol()

    def word(self, name: str) -> str:
        return self.words.get(name, name)


CONTEXT_WORDS = {"pottedplant": "potted plant", "tvmonitor": "tv monitor"}

# These names are none that captions have, and two things and two stuffs share theirs: the words are this project's.
STUFF_WORDS = {name: name.removesuffix("-things").removesuffix("-stuff") for name in COCO_STUFF_27} | {
    "electronic-things": "electronics",
    "indoor-things": "household object",
    "kitchen-things": "kitchenware",
    "outdoor-things": "street furniture",
    "sports-things": "sports equipment",
    "food-stuff": "fruit",
    "furniture-stuff": "cabinet",
    "rawmaterial-stuff": "raw material",
    "solid-stuff": "rock",
    "structural-stuff": "fence",
}

COCO_PHOTOS = ("images/{split}", "{split}")
COCO_MAPS = ("annotations/{split}", "stuffthingmaps/{split}", "stuffthingmaps_trainval2017/{split}")


def _context(number: int, zero: int, background: bool) -> LabelSet:
    return LabelSet(
        f"pascal-context-{number}",
        f"Pascal Context, {number} classes" + (" with the background" if background else ""),
        PASCAL_CONTEXT,
        "val",
        ("JPEGImages",),
        ("SegmentationClassContext",),
        (Encoding("", from_one(len(PASCAL_CONTEXT), zero)),),
        background,
        "ImageSets/SegmentationContext/{split}.txt",
        words=CONTEXT_WORDS,
        goca=Protocol(append_missing=True),
    )


LABEL_SETS = {
    one.name: one
    for one in (
        LabelSet(
            "voc",
            "Pascal VOC",
            VOC_CLASSES,
            "val",
            ("JPEGImages",),
            ("SegmentationClass",),
            (Encoding("", from_one(len(VOC_CLASSES), 0)),),
            True,
            "ImageSets/Segmentation/{split}.txt",
            goca=Protocol("background", append_missing=True, background=True, split="train"),
        ),
        _context(59, IGNORE, background=False),
        _context(60, 0, background=True),
        LabelSet(
            "coco-object",
            "COCO-Object",
            COCO_OBJECT,
            "val2017",
            COCO_PHOTOS,
            COCO_MAPS,
            (
                Encoding("_instanceTrainIds", from_one(len(COCO_OBJECT), 0)),
                Encoding("_labelTrainIds", coco_object(range(171))),
                Encoding("", coco_object(COCO_NUMBERS) | dict.fromkeys(COCO_GAPS, 0)),
            ),
            True,
            goca=Protocol(background=True),
        ),
        LabelSet(
            "coco-stuff-27",
            "COCO-Stuff, 27 classes",
            tuple(COCO_STUFF_27),
            "val2017",
            COCO_PHOTOS,
            COCO_MAPS,
            (
                Encoding("_labelTrainIds_27", from_zero(len(COCO_STUFF_27))),
                Encoding("_labelTrainIds", coco_stuff_27(range(171))),
                Encoding("", coco_stuff_27(COCO_NUMBERS)),
            ),
            words=STUFF_WORDS,
            goca=Protocol(append_missing=True),
        ),
        LabelSet(
            "cityscapes",
            "Cityscapes",
            CITYSCAPES,
            "val",
            ("leftImg8bit/{split}",),
            ("gtFine/{split}", "gtCoarse/{split}"),
            tuple(
                Encoding(f"_{fine}_{kind}", labels)
                for fine in ("gtFine", "gtCoarse")
                for kind, labels in (("labelTrainIds", from_zero(len(CITYSCAPES))), ("labelIds", cityscapes_ids()))
            ),
            photo_ending="_leftImg8bit",
        ),
        LabelSet(
            "ade20k",
            "ADE20K, SceneParse150",
            ADE20K,
            "validation",
            ("images/{split}",),
            ("annotations/{split}",),
            (Encoding("", from_one(len(ADE20K), IGNORE)),),
            goca=Protocol(background=True),
        ),
    )
}


def label_set(name: str) -> LabelSet:
    """The set of this name, whatever its case. Raises InputError that lists them all."""
    if name.lower() not in LABEL_SETS:
        raise InputError(f"There is no set '{name[:40]}'; choose among {', '.join(LABEL_SETS)}.")
    return LABEL_SETS[name.lower()]
