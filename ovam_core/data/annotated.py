"""From annotated images to token files: a folder of prompts, seeds and masks, or of photographs and masks, or one of
each.

The recording comes from generating, so an annotated image is kept as what makes it again, with the mask drawn on it; a
photograph is kept itself, and is recorded in one forward pass (hooks/photograph.py):

    FOLDER/metadata.jsonl     one JSON object a line; of these keys only prompt, seed, mask and class are needed:
        {"prompt": "A photograph of a cat", "seed": 3, "mask": "cat.png", "class": "cat", "file_name": "cat.jpg",
         "negative_prompt": "", "steps": 30, "guidance": 7.5, "width": 512, "height": 512}
    FOLDER/cat.png            the mask (see `read_mask`); "class" may be a list, its masks then hold labels 1, 2, ...
    FOLDER/cat.jpg            the image, if it is kept: it must be the one that is generated again

        {"photo": "tom.jpg", "mask": "tom.png", "class": "cat", "caption": "A photograph of a cat", "timesteps": [100]}
    FOLDER/tom.jpg            a photograph; caption, timesteps, seed, width and height may be left out
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ovam_core.attention.recording import Branch
from ovam_core.data.dataset import stem
from ovam_core.data.layout import METADATA
from ovam_core.data.prompts import Item, Work, check_classes, match_class
from ovam_core.data.runs import digest, digest_of_file
from ovam_core.data.voc import VOC_CLASSES
from ovam_core.errors import InputError
from ovam_core.hooks.photograph import fitted_size
from ovam_core.io.files import find_file
from ovam_core.io.masks import IGNORE, read_mask
from ovam_core.io.pictures import read_photo
from ovam_core.io.texts import read_text
from ovam_core.models.presets import recommended_part
from ovam_core.optimization import RECIPES, Epoch, Optimized, OptimizeSettings, initial_embedding, optimize
from ovam_core.ovam import OVAM
from ovam_core.picture import Picture
from ovam_core.query import caption_of
from ovam_core.settings import GenerateSettings, PhotoSettings
from ovam_core.tokens import Token
from ovam_core.unlabelled import COMPANIONS, Unlabelled, lesson

MAX_METADATA = 64 << 20

SAME_IMAGE = 8.0  # mean difference of 255: JPEG and other devices stay below, another picture does not

IMAGE_SETTINGS = ("negative_prompt", "steps", "guidance", "guidance_kind", "width", "height")

PHOTO_SETTINGS = ("caption", "timesteps", "seed", "width", "height")


@dataclass(frozen=True)
class Example:
    """One annotated image: its settings, the mask's file, its classes, and the image's file.

    image: what makes the image, `file` then being None or the image if it is kept; or what a photograph is recorded
    with, `file` then being the photograph.
    """

    image: GenerateSettings | PhotoSettings
    mask: Path
    classes: tuple[str, ...]
    file: Path | None = None

    @property
    def photo(self) -> Path:
        """The photograph. Raises InputError where there is none."""
        if self.file is None:
            raise InputError(f"The photograph of '{self.mask.name}' is not named.")
        return self.file


def read_folder(folder: str | Path, ovam: OVAM) -> list[Example]:
    """The rows of FOLDER/metadata.jsonl, settings that a row leaves out being the model's own.

    Raises InputError, one sentence with the line's number, for rows that cannot be used.
    """
    folder = Path(folder)
    file = folder / METADATA
    if not file.is_file():
        raise InputError(f"The folder '{folder}' has no {METADATA} that can be read.")
    lines = read_text(file, f"The file '{file}'", MAX_METADATA).split("\n")  # JSON may hold other line ends
    found = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                found.append(_example(folder, json.loads(line), ovam))
            except (KeyError, TypeError, AttributeError) as error:
                lacks = f"lacks {error}" if isinstance(error, KeyError) else "holds a value of the wrong kind"
                raise InputError(f"Line {number} of {METADATA} {lacks}.") from None
            except (ValueError, RecursionError) as error:
                raise InputError(f"Line {number} of {METADATA}: {error}") from None
    if not found:
        raise InputError(f"'{file}' has no rows; write one for every image.")
    return found


def _example(folder: Path, row: dict, ovam: OVAM) -> Example:
    classes = _classes(row)
    image: GenerateSettings | PhotoSettings
    if row.get("photo") is not None:
        image, file = photo_settings(classes, **{key: row.get(key) for key in PHOTO_SETTINGS}), row["photo"]
    else:
        given = {key: row[key] for key in IMAGE_SETTINGS if row.get(key) is not None}
        image, file = (
            GenerateSettings.for_model(ovam.pipe, row["prompt"], seed=row["seed"], **given),
            row.get("file_name"),
        )
    image.validate(ovam.pipe)
    mask = _inside(folder, row["mask"])
    return Example(image, mask, classes, None if file is None else _inside(folder, file))


def _classes(row: dict) -> tuple[str, ...]:
    named = row.get("class", row.get("classes"))
    if named is None:
        raise KeyError("class")
    classes = (named,) if isinstance(named, str) else tuple(named)
    if not classes or not all(isinstance(name, str) and name.strip() for name in classes):
        raise InputError("the class must be a name, or a list of names.")
    return classes


def photo_settings(classes: Sequence[str], **given: Any) -> PhotoSettings:
    """Settings of a photograph of these classes; a caption that is not given, or None, names them."""
    given = {key: value for key, value in given.items() if value is not None}
    if isinstance(given.get("timesteps"), list):
        given["timesteps"] = tuple(given["timesteps"])
    return PhotoSettings(**{"caption": caption_of(classes), **given})


def _inside(folder: Path, name: str) -> Path:
    """A file of the folder: a row may have been written by a stranger."""
    path = Path(name.replace("\\", "/"))  # as Windows writes folders
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise InputError(f"the file '{name[:80]}' lies outside of the folder.")
    return find_file((folder / path).parent, [path.name]) or folder / path


# ------------------------------------------------------------------------------------------ a set to evaluate on


@dataclass(frozen=True)
class AnnotatedSet:
    """Annotated images to evaluate a method on, each class of an image by itself: what is another class's counts as
    background, as in the paper's tables. work: an item a class of an image; examples: of each item.
    """

    examples: tuple[Example, ...]
    names: tuple[str, ...]
    work: Work
    split: str = "annotated"
    has_background: bool = False

    @property
    def labels(self) -> tuple[str, ...]:
        """The name of each label, from 0."""
        return ("background", *self.work.classes)

    def truth(self, item: Item, size: tuple[int, int]) -> np.ndarray:
        """uint8 `[H, W]` of 0, the label of the item's class, and 255."""
        example, label = self.examples[item.index], self.work.ids(item.classes)[0]
        labels = read_mask(example.mask, size, len(example.classes))
        place = [self._label(name) for name in example.classes].index(label) + 1
        return np.where(labels == IGNORE, IGNORE, np.where(labels == place, label, 0)).astype(np.uint8)

    def _label(self, name: str) -> int:
        return self.work.ids([match_class(name, self.work.classes) or name])[0]

    def picture(
        self, ovam: OVAM, item: Item, branch: Branch, with_goca: bool = False, keep: Collection[str] = ()
    ) -> Picture:
        """The image of an item, made again or recorded. Raises InputError as `check_same` does."""
        return _make(ovam, self.examples[item.index], branch, with_goca, keep)

    def fingerprint(self) -> str:
        """Changes with the images, the classes, the masks and the photographs."""
        files = {file for example in self.examples for file in (example.mask, example.file) if file is not None}
        known = {file: digest_of_file(file) for file in files}
        rows = [
            [name, *item.classes, repr(example.image), known[example.mask], example.file and known[example.file]]
            for name, item, example in zip(self.names, self.work.items, self.examples, strict=True)
        ]
        return digest(json.dumps(rows).encode())

    def about(self) -> dict[str, str]:
        return {"set": "annotated"}


def read_annotated(folder: str | Path, ovam: OVAM, limit: int | None = None) -> AnnotatedSet:
    """The images of FOLDER/metadata.jsonl, at most `limit` rows; classes are VOC's where all of them are such.

    Raises InputError as `read_folder` does, and for a mask that is missing.
    """
    if limit is not None and limit < 1:
        raise InputError(f"The limit is {limit}; choose a whole number from 1.")
    rows = read_folder(folder, ovam)[:limit]
    for one in rows:
        if not one.mask.is_file():
            raise InputError(f"There is no mask file '{one.mask}'.")
    named = list(dict.fromkeys(name for one in rows for name in one.classes))
    classes = VOC_CLASSES if all(match_class(name, VOC_CLASSES) for name in named) else check_classes(named)
    examples = [(one, name) for one in rows for name in one.classes]
    items = tuple(
        Item(index, one.image.caption, "", 0, (match_class(name, classes) or name,))
        for index, (one, name) in enumerate(examples)
    )
    return AnnotatedSet(tuple(one for one, _ in examples), tuple(map(stem, items)), Work(items, classes))


def by_class(examples: Iterable[Example]) -> dict[str, list[Example]]:
    """The examples of each class, for one token a class. Raises InputError for an example of several classes."""
    groups: dict[str, list[Example]] = {}
    for example in examples:
        if len(example.classes) != 1:
            raise InputError(
                f"'{example.mask.name}' has {len(example.classes)} classes; a set of tokens takes one a row."
            )
        groups.setdefault(example.classes[0], []).append(example)
    return groups


def check_same(made: Picture, file: Path) -> None:
    """Raises InputError if the kept image is not the one generated again: its mask would belong to another picture."""
    try:
        kept = read_photo(file)
    except InputError:
        raise InputError(f"The image '{file}' cannot be read; leave its file_name out if it is not kept.") from None
    if kept.size != made.image.size:
        raise InputError(
            f"The image '{file.name}' is {kept.width}x{kept.height} and the one made again is {made.image.width}x"
            f"{made.image.height}: give the width and height it was made with."
        )
    apart = np.abs(np.asarray(kept, float) - np.asarray(made.image.convert("RGB"), float)).mean()
    if apart > SAME_IMAGE:
        raise InputError(
            f"The image '{file.name}' is not what {made.model} makes from its prompt and seed (they differ by "
            f"{apart:.0f} of 255 on average): give the model, seed, steps, guidance and size it was made with."
        )


def learn(
    ovam: OVAM,
    examples: Sequence[Example],
    settings: OptimizeSettings = RECIPES["fast"],
    *,
    branch: Branch = "conditional",
    unlabelled: int = 0,
    among: Sequence[str] = COMPANIONS,
    tau: float | None = None,
    alpha: float | None = None,
    on_image: Callable[[int, int], None] | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> tuple[Token, Optimized]:
    """Generates the images of the examples again, or records their photographs, and finds one token for all (Eq. 6).

    All examples must name the same classes. branch: half of the guided batch; the unconditional one of a photograph is
    a pass without a caption. unlabelled, among: pictures without masks to learn on from, as in `OVAM.optimize_token`.
    tau, alpha: for the token's masks, default the model's. on_image: called with (images
    done, images in all). Raises InputError as `read_mask`, `read_photo`, `check_same` and `optimize` do.
    """
    classes = examples[0].classes
    if any(example.classes != classes for example in examples):
        raise InputError(
            "The rows of an image set must all name the same class; use --annotated for one token a class."
        )
    initial_embedding(ovam.pipe, classes)  # which may refuse a name, before any time is spent on images
    pictures, targets = _record_all(ovam, examples, branch, on_image)
    more: dict[str, Any] = {"tau": tau, "alpha": alpha, "on_epoch": on_epoch, "should_stop": should_stop}
    if not unlabelled:
        return ovam.learn(pictures, targets, classes, settings, **more)
    made = ovam.unlabelled(
        classes,
        unlabelled,
        among,
        like=pictures[0].settings,
        branch=branch,
        on_picture=on_image,
        should_stop=should_stop,
    )
    return ovam.learn_on(pictures, targets, classes, made, settings, **more)


def learn_together(
    ovam: OVAM,
    groups: dict[str, list[Example]],
    settings: OptimizeSettings = RECIPES["fast"],
    unlabelled: int = 0,
    *,
    branch: Branch = "conditional",
    tau: float | None = None,
    alpha: float | None = None,
    on_image: Callable[[int, int], None] | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Iterator[tuple[str, Token, Optimized]]:
    """A token for each class of `groups` (see `by_class`), found in one search in which each is the others' rival.

    One image of one object says what the class is and not what it is not: such a token finds objects of other classes
    too. Here all classes are rows of one X' (Eq. 6), and each token keeps the others' rows as rivals. unlabelled:
    pictures without masks a class, of the classes among one another, to learn on from; see unlabelled.py. All images
    together weigh 1, so that `settings.proximity` means what it does for one class; all recordings are held at a time.
    Raises InputError as `learn` does, and for a single class.
    """
    if len(groups) < 2:
        raise InputError(f"Learning classes together takes two or more; there is {len(groups)}.")
    classes = tuple(groups)
    start = initial_embedding(ovam.pipe, classes)
    examples = [example for group in groups.values() for example in group]
    pictures, targets = _record_all(ovam, examples, branch, on_image)
    places = [np.uint8(classes.index(example.classes[0]) + 1) for example in examples]
    labels = [np.where(target == 1, place, target) for target, place in zip(targets, places, strict=True)]
    made = Unlabelled((), (), classes)
    if unlabelled:
        made = ovam.unlabelled(
            classes,
            unlabelled * len(classes),
            (),
            like=pictures[0].settings,
            branch=branch,
            on_picture=on_image,
            should_stop=should_stop,
        )
    whole = lesson(pictures, labels, classes, made)
    recordings = [recommended_part(ovam.pipe, picture.recording) for picture in whole.pictures]
    weights = [weight / len(examples) for weight in whole.weights]
    found = optimize(recordings, whole.targets, start, settings, on_epoch, should_stop, weights)
    more = {"together": len(classes), "unlabelled": len(made.pictures)}
    for row, name in enumerate(classes, start=1):
        order = [0, row, *(other for other in range(1, len(start)) if other != row)]
        own = replace(found, embedding=found.embedding[order])
        its_own = [picture for picture, example in zip(pictures, examples, strict=True) if example.classes == (name,)]
        rivals = [other for other in classes if other != name]
        yield name, ovam.token_of(its_own, (name,), own, settings, tau, alpha, more, rivals), own


def _record_all(
    ovam: OVAM, examples: Sequence[Example], branch: Branch, on_image: Callable[[int, int], None] | None = None
) -> tuple[list[Picture], list[np.ndarray]]:
    """The images of the examples and their labels. Masks are read before any time is spent on images."""
    targets, made = [], []
    for one in examples:
        try:
            targets.append(_target(ovam, one))
        except InputError as error:  # which one, of a folder of many
            raise InputError(f"{one.mask.name}: {error}") from None
    for number, one in enumerate(examples):
        if on_image is not None:
            on_image(number, len(examples))
        made.append(_make(ovam, one, branch))
    if len({one.recording.branch for one in made}) > 1:
        raise InputError("Some captions are empty and others are not; give every photograph a caption, or none.")
    return made, targets


def _target(ovam: OVAM, example: Example) -> np.ndarray:
    """The mask as labels, uint8 `[H, W]`: at the size of the generated image, or at which the model sees the
    photograph.
    """
    if isinstance(example.image, GenerateSettings):
        return read_mask(example.mask, (example.image.height, example.image.width), len(example.classes))
    photo = read_photo(example.photo)
    labels = read_mask(example.mask, (photo.height, photo.width), len(example.classes))
    height, width = example.image.size or fitted_size(ovam.pipe, photo)
    return np.asarray(Image.fromarray(labels).resize((width, height), Image.Resampling.NEAREST))


def _make(ovam: OVAM, example: Example, branch: Branch, with_goca: bool = False, keep: Collection[str] = ()) -> Picture:
    if isinstance(example.image, PhotoSettings):
        settings = example.image if branch == "conditional" else replace(example.image, caption="")
        return ovam.look_at(example.photo, settings, with_goca=with_goca, keep=keep)
    picture = ovam.draw(example.image, branch=branch, with_goca=with_goca, keep=keep)
    if example.file is not None:
        check_same(picture, example.file)
    return picture
