"""Prompt files and classes to a work list: every image of an export, with its number, prompt, seed and classes.

Nothing here knows a model: `work_list` takes a `check` that says which prompts one refuses.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from ovam_core.checks import MAX_SEED
from ovam_core.data.voc import VOC_CLASSES
from ovam_core.errors import InputError

MAX_CLASSES = 254  # ids 1 to 254: 0 is the background, 255 is "ignore"

MAX_CLASS_CHARS = 100

MAX_IMAGES = 10_000_000

KINDS = ("txt", "csv", "tsv", "jsonl", "json")

# Other words for the VOC classes in captions; regular plurals are made by `_plurals`.
SYNONYMS: dict[str, tuple[str, ...]] = {
    "aeroplane": ("airplane", "plane", "aircraft", "jet", "airliner", "jetliner", "biplane"),
    "bicycle": ("bike", "cycle", "mountain bike", "bicyclist"),
    "bird": (
        "duck",
        "goose",
        "geese",
        "seagull",
        "gull",
        "pigeon",
        "parrot",
        "owl",
        "eagle",
        "swan",
        "sparrow",
        "hawk",
    ),
    "boat": ("ship", "sailboat", "canoe", "kayak", "ferry", "yacht", "rowboat", "speedboat", "motorboat"),
    "bottle": ("wine bottle", "beer bottle", "water bottle"),
    "bus": ("coach", "double decker", "school bus", "minibus"),
    "car": ("automobile", "taxi", "cab", "suv", "sedan", "hatchback", "jeep"),
    "cat": ("kitten", "kitty", "tabby", "feline"),
    "chair": ("armchair", "stool", "rocking chair", "lawn chair"),
    "cow": ("cattle", "bull", "calf", "calves", "ox", "oxen", "steer"),
    "dining table": ("diningtable", "table", "dinner table", "kitchen table"),
    "dog": ("puppy", "hound", "terrier", "poodle", "bulldog", "canine"),
    "horse": ("pony", "foal", "stallion", "mare", "colt"),
    "motorbike": ("motorcycle", "motor bike", "motor cycle", "moped", "scooter"),
    "person": (
        "people",
        "human",
        "man",
        "men",
        "woman",
        "women",
        "boy",
        "girl",
        "child",
        "children",
        "kid",
        "baby",
        "lady",
        "guy",
        "gentleman",
        "player",
        "skier",
        "surfer",
        "skateboarder",
        "snowboarder",
        "rider",
        "crowd",
    ),
    "potted plant": ("pottedplant", "houseplant", "house plant", "pot plant", "plant in a pot"),
    "sheep": ("lamb", "ewe"),
    "sofa": ("couch", "loveseat", "settee"),
    "train": ("locomotive", "railcar", "tram", "subway train"),
    "tv": ("television", "tv monitor", "tvmonitor", "monitor", "television set", "tv set"),
}

# Phrases that hold the name of a class and show none.
DECOYS = (
    "hot dog",
    "corn dog",
    "train station",
    "train track",
    "bus stop",
    "bus station",
    "bus shelter",
    "table tennis",
    "tennis table",
    "boat house",
    "bird house",
    "birdhouse",
    "cat food",
    "dog food",
    "dog house",
    "horse shoe",
    "bottle cap",
    "bottle opener",
    "car wash",
    "ski lift chair",
    "table cloth",
    "train set",
)


@dataclass(frozen=True)
class Prompt:
    """One row of a prompt file. source: where it stood, for messages. classes: as written, () if not said."""

    text: str
    classes: tuple[str, ...] = ()
    seed: int | None = None
    negative: str = ""
    source: str = ""


@dataclass(frozen=True)
class Item:
    """One image to make. index: its global number, from 0; classes: names of the work's class list, in its order."""

    index: int
    prompt: str
    negative_prompt: str
    seed: int
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Skipped:
    """A prompt of which no image can be made, and why."""

    source: str
    prompt: str
    reason: str


@dataclass(frozen=True)
class Work:
    """All of an export: items in the order of their index; classes: name number i has the label i + 1."""

    items: tuple[Item, ...]
    classes: tuple[str, ...]
    skipped: tuple[Skipped, ...] = ()

    def ids(self, names: Iterable[str]) -> list[int]:
        """The labels, 1 to 254, of classes."""
        return [self.classes.index(name) + 1 for name in names]


# ------------------------------------------------------------------------------------------------ prompt files


def read_prompts(path: str | Path) -> list[Prompt]:
    """The prompts of a file; what it is, its ending says: .csv, .tsv, .jsonl, .json (COCO captions), else lines.

    Raises InputError for a file that cannot be read, that is not UTF-8, that is malformed or empty.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"The prompt file '{path}' is not UTF-8 text; save it as UTF-8.") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not possible"
        raise InputError(f"The prompt file '{path}' cannot be read: {reason.lower()}.") from None
    kind = path.suffix.lower().lstrip(".")
    return parse_prompts(text, kind if kind in KINDS else "txt", str(path.name))


def parse_prompts(text: str, kind: str = "txt", name: str = "The prompts") -> list[Prompt]:
    """The prompts of a text. kind: one of KINDS. name: what messages call it. Raises InputError as `read_prompts`."""
    if kind not in KINDS:
        raise InputError(f"'{kind}' is not a kind of prompt file; choose among {', '.join(KINDS)}.")
    readers: dict[str, Callable[[str, str], list[Prompt]]] = {
        "txt": _lines,
        "csv": partial(_table, ","),
        "tsv": partial(_table, "\t"),
        "jsonl": _json_lines,
        "json": _coco,
    }
    prompts = readers[kind](text, name)
    if not prompts:
        raise InputError(f"{name} holds no prompt; write one a line.")
    return prompts


def _lines(text: str, _name: str) -> list[Prompt]:
    # Only line feeds end a line: str.splitlines would also cut at U+2028 and form feeds inside a prompt.
    lines = (line.strip() for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n"))
    return [Prompt(line, source=f"line {number}") for number, line in enumerate(lines, start=1) if line]


def _table(delimiter: str, text: str, name: str) -> list[Prompt]:
    if not text.strip():
        return []
    csv.field_size_limit(1 << 24)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise InputError(f"{name} is malformed at line {reader.line_num}: {error}.") from None
    head = [cell.strip().lower() for cell in rows[0][1]] if rows else []
    if "prompt" not in head:
        raise InputError(f"{name} has no column 'prompt' in its first line; name the columns there.")
    return [_from_row(dict(zip(head, row, strict=False)), f"line {number}", name) for number, row in rows[1:]]


def _json_lines(text: str, name: str) -> list[Prompt]:
    prompts = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise InputError(f"{name} is not JSON at line {number}.") from None
        if not isinstance(row, dict) or "prompt" not in row:
            raise InputError(f"{name} has no 'prompt' at line {number}.")
        prompts.append(_from_row(row, f"line {number}", name))
    return prompts


def _coco(text: str, name: str) -> list[Prompt]:
    """COCO captions: {"annotations": [{"caption": ...}, ...]}."""
    if not text.strip():
        return []
    try:
        captions = [str(one["caption"]) for one in json.loads(text)["annotations"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InputError(f"{name} is not a COCO captions file: it has no annotations with captions.") from None
    return [Prompt(" ".join(text.split()), source=f"caption {number}") for number, text in enumerate(captions, start=1)]


def _from_row(row: dict[str, Any], source: str, name: str) -> Prompt:
    seed = row.get("seed")
    if seed is not None and str(seed).strip():
        if not re.fullmatch(r"\d{1,10}", str(seed).strip(), flags=re.ASCII) or int(seed) > MAX_SEED:
            raise InputError(
                f"{name}, {source}: the seed '{str(seed)[:40]}' is not a whole number from 0 to {MAX_SEED}."
            )
        seed = int(seed)
    else:
        seed = None
    classes = row.get("classes") or ()
    if isinstance(classes, str):
        classes = re.split(r"[,;|]", classes)
    elif not isinstance(classes, (list, tuple)) or not all(isinstance(one, str) for one in classes):
        raise InputError(f"{name}, {source}: 'classes' is neither text nor a list of names.")
    clean = tuple(filter(None, (" ".join(one.split()) for one in classes)))
    text, negative = row.get("prompt") or "", row.get("negative_prompt") or ""
    if not all(isinstance(one, str) for one in (text, negative)):
        raise InputError(f"{name}, {source}: the prompt is not text.")
    return Prompt(text.strip(), clean, seed, negative, source)


def template_prompts(template: str, classes: Sequence[str]) -> list[Prompt]:
    """One prompt a class, its name in the place of {}: "A photograph of a {}". Raises InputError without one {}."""
    if template.count("{}") != 1:
        raise InputError(f"The template '{template[:80]}' must hold {{}} once, where the class goes.")
    return [Prompt(template.replace("{}", name), (name,), source=f"class {name}") for name in classes]


# ------------------------------------------------------------------------------------------------ classes


def class_list(text: str) -> tuple[str, ...]:
    """ "voc", or names "cat, red bus" in the order of their labels. Raises InputError for none and too many."""
    if text.strip().lower() == "voc":
        return VOC_CLASSES
    return check_classes([" ".join(one.split()) for one in re.split(r"[,;\n]", text) if one.strip()])


def check_classes(names: Sequence[str]) -> tuple[str, ...]:
    """The names, each once (whatever its case). Raises InputError where they cannot be labels."""
    first: dict[str, str] = {}
    for name in names:
        first.setdefault(_plain(name), name)
    if not first:
        raise InputError("There are no classes; name at least one, or write voc.")
    if len(first) > MAX_CLASSES:
        raise InputError(f"{len(first)} classes are too many: a label map holds at most {MAX_CLASSES}.")
    for name in first.values():
        if len(name) > MAX_CLASS_CHARS:
            raise InputError(f"The class '{name[:30]}...' is longer than {MAX_CLASS_CHARS} characters; shorten it.")
    if "background" in first:
        raise InputError("'background' is no class of its own: label 0 stands for it.")
    return tuple(first.values())


def find_classes(text: str, classes: Sequence[str]) -> tuple[str, ...]:
    """The classes that a caption names, by name, synonym or plural, in the order of the class list."""
    words, pattern = _vocabulary(tuple(classes))
    found = {words[_plain(match.group())] for match in pattern.finditer(_plain(text))}
    return tuple(name for name in classes if name in found)


def match_class(name: str, classes: Sequence[str]) -> str | None:
    """The class of the list that a name means: itself, another spelling ("tv-monitor") or a synonym; None for none."""
    return _vocabulary(tuple(classes))[0].get(_plain(name))


def _plain(text: str) -> str:
    return re.sub(r"[\s_-]+", " ", text.casefold()).strip()


def _plurals(word: str) -> tuple[str, ...]:
    if re.search(r"(s|x|z|ch|sh)$", word):
        return (word, word + "es")
    if re.search(r"[^aeiou]y$", word):
        return (word, word[:-1] + "ies")
    return (word, word + "s")


@lru_cache(maxsize=16)
def _vocabulary(classes: tuple[str, ...]) -> tuple[dict[str, str | None], re.Pattern]:
    """Every word and what class it names (None: a decoy), and a pattern that prefers the longest."""
    words: dict[str, str | None] = dict.fromkeys(form for decoy in DECOYS for form in _plurals(decoy))
    for name in classes:
        for synonym in SYNONYMS.get(_plain(name), ()):
            for form in _plurals(_plain(synonym)):
                words[form] = name
    for name in classes:  # a class's own name stands above another's synonym
        for form in _plurals(_plain(name)):
            words[form] = name
    longest_first = sorted(words, key=len, reverse=True)
    return words, re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)")


# ------------------------------------------------------------------------------------------------ work list


def work_list(
    prompts: Sequence[Prompt],
    classes: Sequence[str] | None = None,
    images_per_prompt: int = 1,
    seed: int = 0,
    limit: int | None = None,
    check: Callable[[str, str], None] | None = None,
) -> Work:
    """Every image to make. The same arguments give the same list, whatever the machine.

    classes: the class list; None takes the classes that the prompts state, VOC's order and labels if all are VOC's
        or none is stated. A prompt without stated classes has those that it names (`find_classes`).
    seed: image i has seed + i; in a prompt with a seed of its own, image j of the prompt has that seed + j.
    limit: at most this many prompts. check: raises InputError for a prompt and negative prompt no image can be made of.
    Such prompts, and those that name no class, are skipped and listed. Raises InputError where nothing is left, and
    for a stated class that is not in the list.
    """
    for name, value, low, high in (
        ("number of images a prompt", images_per_prompt, 1, 100_000),
        ("seed", seed, 0, MAX_SEED),
        ("limit", 1 if limit is None else limit, 1, MAX_IMAGES),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise InputError(f"The {name} is {value}; choose a whole number from {low} to {high}.")
    prompts = prompts[:limit]
    if len(prompts) * images_per_prompt > MAX_IMAGES:
        raise InputError(
            f"{len(prompts) * images_per_prompt:,} images are too many for one export; at most {MAX_IMAGES:,}."
        )
    names = _stated(prompts) if classes is None else check_classes(classes)

    items: list[Item] = []
    skipped: list[Skipped] = []
    for prompt in prompts:
        own = _classes_of(prompt, names)
        try:
            if not own:
                raise InputError("It names none of the classes.")
            _check_text(prompt.text)
            _check_text(prompt.negative)
            if check is not None:
                check(prompt.text, prompt.negative)
        except InputError as error:
            skipped.append(Skipped(prompt.source, _printable(prompt.text)[:200], " ".join(str(error).split())))
            continue
        for number in range(images_per_prompt):
            index = len(items)
            own_seed = (seed + index if prompt.seed is None else prompt.seed + number) % (MAX_SEED + 1)
            items.append(Item(index, prompt.text, prompt.negative, own_seed, own))
    if not items:
        first = skipped[0]
        raise InputError(f"No image can be made of any prompt; {first.source}: {first.reason}")
    return Work(tuple(items), names, tuple(skipped))


def _stated(prompts: Sequence[Prompt]) -> tuple[str, ...]:
    names = [name for prompt in prompts for name in prompt.classes]
    if all(match_class(name, VOC_CLASSES) for name in names):
        return VOC_CLASSES
    return check_classes(names)


def _classes_of(prompt: Prompt, classes: tuple[str, ...]) -> tuple[str, ...]:
    if not prompt.classes:
        return find_classes(prompt.text, classes)
    matched = {name: match_class(name, classes) for name in prompt.classes}
    unknown = [name for name, match in matched.items() if match is None]
    if unknown:
        raise InputError(
            f"The class '{unknown[0][:60]}' ({prompt.source}) is not among the classes of this export; add it."
        )
    return tuple(name for name in classes if name in matched.values())


def _check_text(text: str) -> None:
    if _printable(text) != text:
        raise InputError("It holds half of a character (a lone surrogate).")


def _printable(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")
