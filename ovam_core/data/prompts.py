"""Prompt files and classes to a work list: every image of an export, with its number, prompt, seed and classes.

Nothing here knows a model: `work_list` takes a `check` that says which prompts one refuses.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from itertools import islice, takewhile, zip_longest
from pathlib import Path
from typing import Any
from unicodedata import normalize

import regex
from pluralizer import Pluralizer

from ovam_core.checks import MAX_PROMPT, MAX_SEED, check_text, check_whole
from ovam_core.data.voc import VOC_CLASSES
from ovam_core.errors import InputError
from ovam_core.io.stored import Stored
from ovam_core.io.texts import LARGEST_TEXT, Opened, text_file, text_in_memory
from ovam_core.io.token_files import BACKGROUND
from ovam_core.models.words import Vocabulary, listed, units

MAX_CLASSES = 254  # ids 1 to 254: 0 is the background, 255 is "ignore"

MAX_CLASS_CHARS = 100

MAX_IMAGES = 10_000_000

KINDS = ("txt", "csv", "tsv", "jsonl", "json")

COLUMNS = ("prompt", "classes", "seed", "negative_prompt")

NO_COLUMN = "has no column 'prompt' in its first line; name the columns there."

_SENTENCE = re.compile(r"^\s*(?:or|with)\b|\b(?:and|an?|the)\b", re.IGNORECASE)
_LETTER = re.compile(r"[^\W\d_]")
_QUOTED = re.compile(r"""'[^'\\]*'|"[^"\\]*\"""")
_PYTHON_LIST = re.compile(rf"[\[({{]\s*(?:(?:{_QUOTED.pattern})\s*,\s*)*(?:(?:{_QUOTED.pattern})\s*)?[\])}}]")
_BRACKETED = re.compile(r"\([^(),;|'\"]+\)\s*[^\s,;|]")  # "(potted) plant"
_LATIN = regex.compile(r"(?:.* )?[\p{Latin}\p{M}\d]+")

# Other spellings of the VOC classes, COCO's among them: each means what the others mean. Plurals are made by `_forms`.
SPELLINGS: dict[str, tuple[str, ...]] = {
    "aeroplane": ("airplane", "plane"),
    "bicycle": ("bike",),
    "car": ("automobile",),
    "dining table": ("diningtable", "dinner table"),
    "motorbike": ("motorcycle", "motor bike", "motor cycle"),
    "person": ("human", "persons"),
    "potted plant": ("pottedplant", "houseplant", "house plant", "pot plant", "plant in a pot"),
    "sofa": ("couch", "settee"),
    "tv": ("television", "tv monitor", "tvmonitor", "television set", "tv set"),
}

# What a caption may call them besides.
SYNONYMS: dict[str, tuple[str, ...]] = {
    "aeroplane": ("aircraft", "jet", "airliner", "jetliner", "biplane"),
    "bicycle": ("cycle", "mountain bike", "bicyclist"),
    "bird": tuple("duck goose seagull gull pigeon parrot owl eagle swan sparrow hawk".split()),
    "boat": tuple("ship sailboat canoe kayak ferry yacht rowboat speedboat motorboat".split()),
    "bottle": ("wine bottle", "beer bottle", "water bottle"),
    "bus": ("coach", "double decker", "school bus", "minibus"),
    "car": tuple("taxi cab suv sedan hatchback jeep".split()),
    "cat": tuple("kitten kitty tabby feline".split()),
    "chair": ("armchair", "stool", "rocking chair", "lawn chair"),
    "cow": tuple("cattle bull calf ox steer".split()),
    "dining table": ("table", "kitchen table"),
    "dog": tuple("puppy hound terrier poodle bulldog canine".split()),
    "horse": tuple("pony foal stallion mare colt".split()),
    "motorbike": ("moped", "scooter"),
    "person": tuple(
        """man woman boy girl child kid baby lady guy gentleman player skier surfer skateboarder snowboarder rider
        crowd""".split()
    ),
    "sheep": ("lamb", "ewe"),
    "sofa": ("loveseat",),
    "train": ("locomotive", "railcar", "tram", "subway train"),
    "tv": ("monitor",),
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
    *"熊猫 熊貓 热狗 熱狗 马路 馬路 斑马 斑馬 河马 河馬 海马 海馬 马桶 馬桶 蜗牛 蝸牛 牛奶 牛乳 牛仔 羊毛".split(),
    *"猫头鹰 貓頭鷹 猫粮 狗粮 鸟巢 鳥巢 鳥居 车站 車站 火车站 火車站 汽车站 公共汽车站 公交车站 人行道 人形".split(),
)

# Plurals whose singular is another word.
PLURALS = frozenset("glasses shorts pants tights blinds news goods arms".split())

# What programs write where a text is missing.
NO_TEXT = frozenset(("None", "null", "Null", "NULL", "nan", "NaN", "NAN", "<NA>", "NaT"))

# Of prompts one after the other that a model refuses, before any that it takes: no need to read the rest.
MAX_REFUSED = 1000


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
    """All of an export: items in the order of their index; classes: name number i has the label i + 1.

    Of `work_list` items and skipped are kept on the disk, where they are many.
    """

    items: Sequence[Item]
    classes: tuple[str, ...]
    skipped: Sequence[Skipped] = ()

    def ids(self, names: Iterable[str]) -> list[int]:
        """The labels, 1 to 254, of classes."""
        return [self.classes.index(name) + 1 for name in names]


# ------------------------------------------------------------------------------------------------ prompt files


@dataclass(frozen=True)
class Bounds:
    """How much is read. Bytes (of pasted text, characters) are counted before anything is parsed; rows as they come."""

    bytes: int = LARGEST_TEXT
    rows: int = MAX_IMAGES


class PromptFile(Collection[Prompt]):
    """The prompts of a file, read anew whenever they are gone through: a list of them would fill the memory.

    What the file is, its ending says: .csv, .tsv, .jsonl, .json (a list, or COCO captions: read whole), else lines.
    Raises InputError for a file that cannot be read, that is no text, that is malformed, empty or out of bounds.
    """

    def __init__(self, path: str | Path, bounds: Bounds = Bounds()):
        path = Path(path)
        kind = path.suffix.lower().lstrip(".")
        text = text_file(path, f"The prompt file '{path}'", bounds.bytes)
        self._read = partial(_prompts_of, text, kind if kind in KINDS else "txt", path.name, bounds)
        self._length = sum(1 for _ in self)

    def __iter__(self) -> Iterator[Prompt]:
        return self._read()

    def __len__(self) -> int:
        return self._length

    def __contains__(self, prompt: object) -> bool:
        return any(one == prompt for one in self)


def read_prompts(path: str | Path, bounds: Bounds = Bounds()) -> list[Prompt]:
    """The prompts of a `PromptFile`. Raises InputError as it does."""
    return list(PromptFile(path, bounds))


def parse_prompts(text: str, kind: str = "txt", name: str = "The prompts", bounds: Bounds = Bounds()) -> list[Prompt]:
    """The prompts of a text. kind: one of KINDS. name: what messages call it. Raises InputError as `read_prompts`."""
    if kind not in KINDS:
        raise InputError(f"'{kind}' is not a kind of prompt file; choose among {', '.join(KINDS)}.")
    if len(text) > bounds.bytes:
        raise InputError(
            f"{name}: {len(text):,} characters are more than the {bounds.bytes:,} that are read; split it."
        )
    return list(_prompts_of(text_in_memory(text.removeprefix("\ufeff")), kind, name, bounds))


def _prompts_of(text: Opened, kind: str, name: str, bounds: Bounds) -> Iterator[Prompt]:
    readers: dict[str, Callable[[Opened, str], Iterator[Prompt]]] = {
        "txt": _lines,
        "csv": partial(_table, ","),
        "tsv": partial(_table, "\t"),
        "jsonl": _json_lines,
        "json": _json,
    }
    count = 0
    for count, prompt in enumerate(readers[kind](text, name), start=1):
        if count > bounds.rows:
            raise InputError(f"{name}: there are more than the {bounds.rows:,} prompts that are read; split it.")
        yield prompt
    if not count:
        raise InputError(f"{name} holds no prompt; write one a line.")


def _numbered(text: Opened) -> Iterator[tuple[int, str]]:
    """The lines of a text that are not empty, with their numbers.

    Only line feeds end a line: str.splitlines would also cut at U+2028 and form feeds inside a prompt.
    """
    with text(None) as lines:
        for number, line in enumerate(lines, start=1):
            if written := line.strip():
                yield number, written


def _lines(text: Opened, _name: str) -> Iterator[Prompt]:
    return (Prompt(line, source=f"line {number}") for number, line in _numbered(text))


def _table(delimiter: str, text: Opened, name: str) -> Iterator[Prompt]:
    offset, first = next(_numbered(text), (0, ""))
    if separated := re.fullmatch(r"sep=(.)", first):  # Excel's own hint
        delimiter = separated[1]
    else:
        delimiter, offset = next((x for x in (delimiter, *",;\t|") if "prompt" in _head(first, x)), delimiter), 0
    csv.field_size_limit(1 << 24)
    with text("") as begin:  # some write a space before a quote, which is then none
        spaced = re.search(r'[,;] +"', begin.read(1000)) is not None
    with text("") as file:
        lines = _Remembered(islice(file, offset, None))
        reader = csv.reader(lines, delimiter=delimiter, strict=True, skipinitialspace=spaced)
        table: _Table | None = None
        try:
            for row in reader:
                number, raw = reader.line_num + offset, lines.taken()
                if not any(cell.strip() for cell in row):
                    continue
                if table is None:
                    table = _Table(name, delimiter, row)
                else:
                    yield _from_row(table.cells(row, number, raw), f"line {number}", name)
        except csv.Error as error:
            raise InputError(f"{name} is malformed at line {reader.line_num + offset}: {error}.") from None
    if table is None and first:
        raise InputError(f"{name} {NO_COLUMN}")


class _Remembered(Iterator[str]):
    """Lines, and those that were read since `taken` was last called."""

    def __init__(self, lines: Iterator[str]):
        self._lines, self._read = lines, list[str]()

    def __next__(self) -> str:
        self._read.append(next(self._lines))
        return self._read[-1]

    def taken(self) -> str:
        text = "".join(self._read)
        self._read.clear()
        return text


def _head(line: str, delimiter: str) -> list[str]:
    return [cell.strip().lower() for row in csv.reader([line], delimiter=delimiter) for cell in row]


class _Table:
    """The first line of a table, by which its rows are read."""

    def __init__(self, name: str, delimiter: str, head: list[str]):
        self.name, self.delimiter = name, delimiter
        self.spaced = any(cell.startswith(" ") for cell in head)
        self.columns = [cell.strip().lower() for cell in head]
        if "prompt" not in self.columns:
            raise InputError(f"{name} {NO_COLUMN}")
        for column in COLUMNS:
            if self.columns.count(column) > 1:
                raise InputError(f"{name} names the column '{column}' twice.")

    def cells(self, row: list[str], number: int, raw: str) -> dict[str, str]:
        """A row by its columns. raw: as it is written. Raises InputError for one that is longer than the first line,
        and where the rest of a prompt seems to be taken for another column.
        """
        if any(cell.strip() for cell in row[len(self.columns) :]):
            raise InputError(
                f"{self.name}, line {number}: the row has {len(row)} values and the first line names "
                f"{len(self.columns)}; put a text that holds '{self.delimiter}' in quotes."
            )
        cells = dict(zip_longest(self.columns, row[: len(self.columns)], fillvalue=""))
        if self.delimiter == "," and not _is_quoted(cells["prompt"], raw):
            after = list(zip(self.columns, row, strict=False))[self.columns.index("prompt") + 1 :]
            # A number, and a cell without anything, end what may be a sentence.
            for column, cell in takewhile(lambda x: _LETTER.search(x[1]), after):
                if self._reads_on(column, cell, cells["prompt"]) and not _is_quoted(cell, raw):
                    raise InputError(
                        f"{self.name}, line {number}: '{cell.strip()[:60]}' reads like the rest of the prompt and "
                        f"stands in the column '{column}'; put a prompt that holds commas in quotes"
                        f"{'' if _SENTENCE.search(cell) else ', or take the space away'}."
                    )
        return cells

    def _reads_on(self, column: str, cell: str, prompt: str) -> bool:
        """Whether a cell may be the rest of a sentence: "a cat, a dog and a car" without quotes is two cells."""
        doubtful = cell.startswith(" ") and not self.spaced
        if column == "negative_prompt":
            return doubtful
        if column != "classes":
            return doubtful or _SENTENCE.search(cell) is not None
        names = _names(cell) or [] if len(prompt) <= MAX_PROMPT else []
        return any(
            (doubtful or _SENTENCE.search(name))
            and not (match_class(name, VOC_CLASSES) or find_classes(prompt, (name,)))
            for name in names
            if len(name) <= MAX_CLASS_CHARS
        )


def _is_quoted(cell: str, raw: str) -> bool:
    return '"{}"'.format(cell.replace('"', '""')) in raw


def _json_lines(text: Opened, name: str) -> Iterator[Prompt]:
    for number, line in _numbered(text):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise InputError(f"{name} is not JSON at line {number}.") from None
        yield _from_row(row, f"line {number}", name)


def _json(text: Opened, name: str) -> Iterator[Prompt]:
    """A list of prompts, texts or objects as in JSON lines; or COCO captions: {"annotations": [{"caption": ...}]}."""
    with text("") as file:
        whole = file.read()
    if not whole.strip():
        return
    try:
        value = json.loads(whole)
    except (ValueError, RecursionError):
        raise InputError(f"{name} is not JSON.") from None
    if isinstance(value, list):
        for number, row in enumerate(value, start=1):
            yield _from_row({"prompt": row} if isinstance(row, str) else row, f"prompt {number}", name)
        return
    captions = value.get("annotations") if isinstance(value, dict) else None
    if not isinstance(captions, list) or not all(isinstance(one, dict) and "caption" in one for one in captions):
        raise InputError(
            f"{name} is neither a list of prompts nor a COCO captions file, which has annotations with captions."
        )
    for number, one in enumerate(captions, start=1):
        found = _from_row({"prompt": one["caption"]}, f"caption {number}", name)
        yield replace(found, text=" ".join(found.text.split()))


def _from_row(row: Any, source: str, name: str) -> Prompt:
    where = f"{name}, {source}"
    if not isinstance(row, dict) or "prompt" not in row:
        raise InputError(f"{where}: there is no 'prompt'.")
    return Prompt(
        _text(row["prompt"], "prompt", where).strip(),
        _stated_classes(row.get("classes"), where),
        _seed(row.get("seed"), where),
        "" if row.get("negative_prompt") is None else _text(row["negative_prompt"], "negative prompt", where),
        source,
    )


def _text(value: Any, what: str, where: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{where}: the {what} is {json.dumps(value)[:40]}, which is not text.")
    if value.strip() in NO_TEXT:
        raise InputError(f"{where}: the {what} is '{value.strip()}', which programs write where there is no text.")
    return value


def _seed(value: Any, where: str) -> int | None:
    text = "" if value is None else str(value).strip()
    if not text:
        return None
    # Tables of numbers, some of them missing, are written as 5.0.
    whole = re.fullmatch(r"(\d{1,10})(?:\.0{1,9})?", text, flags=re.ASCII)
    if whole is None or int(whole[1]) > MAX_SEED:
        raise InputError(f"{where}: the seed '{text[:40]}' is not a whole number from 0 to {MAX_SEED}.")
    return int(whole[1])


def _stated_classes(value: Any, where: str) -> tuple[str, ...]:
    """The classes of a row: a list, or a text of names between commas, semicolons or bars, or a list as JSON or Python
    write it. The background, which needs no name, is left out where there are others.
    """
    if value is None:
        return ()
    names = _names(value) if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)) or not all(isinstance(one, str) for one in names):
        raise InputError(f"{where}: 'classes' is neither text nor a list of names: {str(value)[:60]!r}.")
    if len(names) > MAX_CLASSES:
        raise InputError(f"{where}: {len(names)} classes are too many; at most {MAX_CLASSES}.")
    clean = tuple(filter(None, (" ".join(normalize("NFC", one).split()) for one in names)))
    if long := next((one for one in clean if len(one) > MAX_CLASS_CHARS), None):
        raise InputError(f"{where}: the class '{long[:30]}...' is longer than {MAX_CLASS_CHARS} characters.")
    if wrong := next((one for one in clean if one in NO_TEXT or set(one) & set('[]{}"')), None):
        raise InputError(f"{where}: '{wrong}' is not the name of a class.")
    return tuple(one for one in clean if not _is_background(one)) or clean


def _names(text: str) -> list[str] | None:
    """The names in a text; None for one that begins as a list and is none."""
    text = text.strip()
    if not text.startswith(("[", "(", "{")) or _BRACKETED.match(text):
        return listed(text, more="|")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        if not _PYTHON_LIST.fullmatch(text):
            return None
        return [one[1:-1] for one in _QUOTED.findall(text)]
    return value if isinstance(value, list) and all(isinstance(one, str) for one in value) else None


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
    if len(text) > MAX_CLASSES * (MAX_CLASS_CHARS + 2):
        raise InputError(f"The classes are {len(text):,} characters long: a label map holds at most {MAX_CLASSES}.")
    return check_classes(listed(text))


def check_classes(names: Sequence[str]) -> tuple[str, ...]:
    """The names, each once (whatever its case); a background at their head, which is label 0, is left out.

    Raises InputError where they cannot be labels.
    """
    first: dict[str, str] = {}
    for name in names:
        first.setdefault(_plain(name), name)
    if next(iter(first), None) == BACKGROUND:
        del first[BACKGROUND]
    if not first:
        raise InputError("There are no classes; name at least one, or write voc.")
    if len(first) > MAX_CLASSES:
        raise InputError(f"{len(first)} classes are too many: a label map holds at most {MAX_CLASSES}.")
    for name in first.values():
        if len(name) > MAX_CLASS_CHARS:
            raise InputError(f"The class '{name[:30]}...' is longer than {MAX_CLASS_CHARS} characters; shorten it.")
        if _printable(name) != name:
            raise InputError(f"The class '{_printable(name)}' holds half of a character (a lone surrogate).")
    if BACKGROUND in first:
        raise InputError("'background' is no class of its own: label 0 stands for it.")
    return tuple(first.values())


def find_classes(text: str, classes: Sequence[str]) -> tuple[str, ...]:
    """The classes that a caption names, by name, synonym, singular or plural, in the order of the class list.

    No dictionary is asked: in scripts without spaces a name is found inside a longer word, too, 花 in 花生, where the
    word is neither a class nor among DECOYS.
    """
    found = _vocabulary(tuple(classes)).named_in(text)
    return tuple(name for name in classes if name in found)


def match_class(name: str, classes: Sequence[str]) -> str | None:
    """The class of the list that a name means: itself, another spelling ("tv-monitor") or a synonym; None for none."""
    return _vocabulary(tuple(classes)).meaning(name)


def _plain(text: str) -> str:
    return " ".join(units(text))


def _is_background(name: str) -> bool:
    """Whatever its case, and labelme's _background_."""
    return _plain(name) == BACKGROUND


@lru_cache(maxsize=10_000)
def _forms(word: str) -> tuple[str, ...]:
    """A name, its plurals, and its singular where it is a plural itself; of words that end in Latin letters."""
    word = _plain(word)
    if not _LATIN.fullmatch(word):
        return (word,)
    regular = re.sub(r"(?<=[^aeiou])y$", "ie", word)
    regular += "es" if re.search(r"(s|x|z|ch|sh)$", regular) else "s"
    singular = word if word in PLURALS else _inflector().singular(word)
    return tuple(dict.fromkeys((word, _inflector().plural(word), regular, singular)))


@cache
def _inflector() -> Pluralizer:
    return Pluralizer()


def _voc_class(name: str) -> str | None:
    """The VOC class of which a name is a spelling."""
    forms = set(_forms(name))
    return next((one for one in VOC_CLASSES if forms & {one, *SPELLINGS.get(one, ())}), None)


@lru_cache(maxsize=16)
def _vocabulary(classes: tuple[str, ...]) -> Vocabulary:
    """Every word and what class it names."""
    known = Vocabulary()
    for decoy in DECOYS:
        _add(known, decoy, None)
    for name in reversed(classes):  # of two classes with one synonym, the first
        if meant := _voc_class(name):
            for synonym in (meant, *SPELLINGS.get(meant, ()), *SYNONYMS.get(meant, ())):
                _add(known, synonym, name)
    for name in reversed(classes):  # a class's own name stands above another's synonym
        _add(known, name, name)
    for name in classes:  # and as it is written above another's plural
        known.add(name, name)
    return known


def _add(known: Vocabulary, word: str, meaning: str | None) -> None:
    for form in _forms(word):
        known.add(form, meaning)


# ------------------------------------------------------------------------------------------------ work list


def work_list(
    prompts: Collection[Prompt],
    classes: Sequence[str] | None = None,
    images_per_prompt: int = 1,
    seed: int = 0,
    limit: int | None = None,
    check: Callable[[str, str], None] | None = None,
    on_prompt: Callable[[int, int], None] | None = None,
    negative: str = "",
) -> Work:
    """Every image to make. The same arguments give the same list, whatever the machine.

    prompts: gone through once, and before that for the classes that they state where none are given.
    classes: the class list; None takes the classes that the prompts state, VOC's order and labels if all are VOC's
        or none is stated. A prompt without stated classes has those that it names (`find_classes`).
    seed: image i has seed + i; in a prompt with a seed of its own, image j of the prompt has that seed + j.
    limit: at most this many prompts. check: raises InputError for a prompt and negative prompt no image can be made of.
    Such prompts, and those that name no class, are skipped and listed. on_prompt: called with (prompts looked at,
    prompts in all); it may raise to end the work. negative: of prompts without one of their own. Raises InputError
    where nothing is left, where the first MAX_REFUSED prompts are all refused by `check`, and for a stated class that
    is not in the list.
    """
    check_whole("The number of images a prompt", images_per_prompt, 1, 100_000)
    check_whole("The seed", seed, 0, MAX_SEED)
    check_whole("The limit", 1 if limit is None else limit, 1, MAX_IMAGES)
    total = len(prompts) if limit is None else min(limit, len(prompts))
    if total * images_per_prompt > MAX_IMAGES:
        raise InputError(f"{total * images_per_prompt:,} images are too many for one export; at most {MAX_IMAGES:,}.")
    names = _stated(islice(prompts, total)) if classes is None else check_classes(classes)

    items: Stored[Item] = Stored(pack=_values, unpack=_item)
    skipped: Stored[Skipped] = Stored(pack=_values, unpack=lambda values: Skipped(*values))
    refused = 0
    asked = (
        replace(one, negative=negative) if negative and not one.negative else one for one in islice(prompts, total)
    )
    for done, prompt in enumerate(asked, start=1):
        if on_prompt is not None:
            on_prompt(done, total)
        stated = _stated_in(prompt, names)
        try:
            _check_texts(prompt)
            own = stated if prompt.classes else find_classes(prompt.text, names)
            if not own:
                raise InputError("It names none of the classes.")
            if check is not None:
                refused += 1
                check(prompt.text, prompt.negative)
        except InputError as error:
            skipped.append(Skipped(prompt.source, _printable(prompt.text)[:200], " ".join(str(error).split())))
            if not items and refused >= MAX_REFUSED:
                break
            continue
        for number in range(images_per_prompt):
            index = len(items)
            own_seed = (seed + index if prompt.seed is None else prompt.seed + number) % (MAX_SEED + 1)
            items.append(Item(index, prompt.text, prompt.negative, own_seed, own))
    if not items:
        first, which = (
            skipped[0],
            "any prompt" if len(skipped) == total else f"the first {len(skipped):,} prompts",
        )
        raise InputError(f"No image can be made of {which}; {first.source}: {first.reason}")
    return Work(items, names, skipped)


def _values(record: Item | Skipped) -> list[Any]:
    return list(vars(record).values())


def _item(values: list[Any]) -> Item:
    index, prompt, negative, seed, classes = values
    return Item(index, prompt, negative, seed, tuple(classes))


def _stated(prompts: Iterable[Prompt]) -> tuple[str, ...]:
    names = [x for x in dict.fromkeys(name for prompt in prompts for name in prompt.classes) if not _is_background(x)]
    if all(map(_voc_class, names)):  # "duck" and "goose" are two classes where they are stated, and no bird
        return VOC_CLASSES
    return check_classes(names)


def _stated_in(prompt: Prompt, classes: tuple[str, ...]) -> tuple[str, ...]:
    matched = {name: match_class(name, classes) for name in prompt.classes if not _is_background(name)}
    unknown = [name for name, match in matched.items() if match is None]
    if unknown:
        raise InputError(
            f"The class '{unknown[0][:60]}' ({prompt.source}) is not among the classes of this export; add it."
        )
    return tuple(name for name in classes if name in matched.values())


def _check_texts(prompt: Prompt) -> None:
    """Raises InputError for texts of which no image can be made, whatever the model."""
    for what, text in (("prompt", prompt.text), ("negative prompt", prompt.negative)):
        check_text(f"The {what}", text, MAX_PROMPT)
        if _printable(text) != text:
            raise InputError("It holds half of a character (a lone surrogate).")


def _printable(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")
