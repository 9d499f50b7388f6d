"""Tables of prompts and side files as people's programs write them: read as what they are, or refused by line."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from ovam_core import OVAM
from ovam_core.cli import main
from ovam_core.data.annotated import read_folder
from ovam_core.data.prompts import (
    MAX_REFUSED,
    Bounds,
    Prompt,
    check_classes,
    class_list,
    parse_prompts,
    read_prompts,
    work_list,
)
from ovam_core.data.voc_folder import read_classes, read_voc
from ovam_core.errors import InputError
from ovam_core.io.texts import decoded
from ovam_core.plot import label_image

SENTENCE = "A photograph of a cat, a dog and a car"


def texts(table: str, kind: str = "csv") -> list[str]:
    return [one.text for one in parse_prompts(table, kind)]


def classes(cell: str, kind: str = "csv") -> tuple[str, ...]:
    """The classes of one row, whose cell stands as it is."""
    return parse_prompts(f"prompt,classes\na cat and a dog,{cell}\n", kind)[0].classes


# ------------------------------------------------------------------------------------------------ rows


@pytest.mark.parametrize(
    ("table", "line"),
    [
        (f"prompt\n{SENTENCE}\n", 2),
        (f"prompt,seed\na cat,1\n{SENTENCE},2\n", 3),
        ("prompt;classes\na cat;cat;;dog\n", 2),
        ("prompt,classes\n\na cat,cat\na bus, red, parked\n", 4),
    ],
)
def test_a_row_that_is_longer_than_its_header_is_refused_by_line(table, line):
    with pytest.raises(InputError, match=rf"line {line}: the row has \d values and the first line names \d; .*quotes"):
        parse_prompts(table, "csv")


def test_empty_cells_behind_a_row_are_none():
    assert texts("prompt\na cat,,\n") == ["a cat"]
    assert texts("prompt,classes,,\na cat,cat,,\n") == ["a cat"]


@pytest.mark.parametrize(
    "table",
    [
        f"prompt,classes\n{SENTENCE}\n",
        "prompt,classes\nA photograph of a cat,a dog and a car\n",
        "prompt,classes\nA photograph of a cat, sleeping\n",
        "prompt,negative_prompt\nA photograph of a cat, a dog\n",
        "classes,seed,prompt,negative_prompt\ncat,3,A cat, indoors\n",
        f"prompt,width\n{SENTENCE}\n",
        "prompt,width\nA cat,a dog and a car\n",
        "prompt,width,height\nA cat, sleeping, curled up\n",
        "prompt,notes,notes\nA cat, sleeping,\n",
        "prompt,seed\nA cat, a dog\n",
        "prompt,classes,style\nA cat, dog, sleeping\n",
        "id,prompt,,\n1,A cat with a hat,or a dog,\n",
    ],
)
def test_the_rest_of_a_sentence_is_no_other_column(table):
    with pytest.raises(InputError, match=r"line 2: .* reads like the rest of the prompt"):
        parse_prompts(table, "csv")


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (f'prompt,classes\n"{SENTENCE}",cat;dog\n', Prompt(SENTENCE, ("cat", "dog"), source="line 2")),
        ("prompt,classes\na man on grass, person\n", Prompt("a man on grass", ("person",), source="line 2")),
        ("prompt, classes\na street, car\n", Prompt("a street", ("car",), source="line 2")),
        (
            'prompt,classes\na cat and a dog, "cat, dog"\n',
            Prompt("a cat and a dog", ("cat", "dog"), source="line 2"),
        ),
        (
            "prompt,classes\nsalt and pepper shakers,salt and pepper shaker\n",
            Prompt("salt and pepper shakers", ("salt and pepper shaker",), source="line 2"),
        ),
        (
            'prompt,classes\n"A set table","salt and pepper shaker"\n',
            Prompt("A set table", ("salt and pepper shaker",), source="line 2"),
        ),
        (
            'prompt,classes\nA set table,"salt and pepper shaker"\n',
            Prompt("A set table", ("salt and pepper shaker",), source="line 2"),
        ),
        (
            'prompt,negative_prompt\n"A ""set""\ntable, laid", the night\n',
            Prompt('A "set"\ntable, laid', negative=" the night", source="line 3"),
        ),
        ("prompt,classes\na photo of my pet, cat\n", Prompt("a photo of my pet", ("cat",), source="line 2")),
        ("prompt,classes\na balcony,plant in a pot\n", Prompt("a balcony", ("plant in a pot",), source="line 2")),
        ("prompt,width,height\na cat, 512, 512\n", Prompt("a cat", source="line 2")),
        ("prompt,seed,notes\na cat,5,the best\n", Prompt("a cat", seed=5, source="line 2")),
        ("notes,prompt,source\na cat and a dog, a pet,here\n", Prompt("a pet", source="line 2")),
    ],
)
def test_rows_that_are_what_they_seem(table, expected):
    assert parse_prompts(table, "csv") == [expected]


def test_what_would_help_is_said():
    with pytest.raises(InputError, match="in quotes, or take the space away"):
        parse_prompts("prompt,classes\nmy pet, zebra\n", "csv")
    with pytest.raises(InputError, match=r"in quotes\.$"):
        parse_prompts("prompt,classes\nmy pet, a zebra\n", "csv")


@pytest.mark.parametrize(
    "cell",
    [
        "\"['cat', 'dog']\"",
        '"[""cat"", ""dog""]"',
        "\"('cat', 'dog',)\"",
        "\"{'cat', 'dog'}\"",
        '"cat,dog"',
        "cat;dog",
        " cat | dog",
        "cat、dog",
        "background;cat;dog",
    ],
)
def test_a_list_in_a_cell_is_a_list(cell):
    assert classes(cell) == ("cat", "dog")


@pytest.mark.parametrize(
    "cell",
    [
        "\"['cat' 'dog']\"",
        '"[1, 2]"',
        "\"['cat', dog]\"",
        "[cat",
        "\"('cat', dog)\"",
        '"(cat, dog)"',
        '"{""cat"": 1}"',
        "nan",
    ],
)
def test_a_cell_that_is_no_list_of_names_is_refused_by_line(cell):
    with pytest.raises(InputError, match="line 2"):
        classes(cell)


def test_a_name_may_begin_with_a_bracket():
    assert classes("(potted) plant") == ("(potted) plant",)
    assert classes('"(potted) plant, cat"') == ("(potted) plant", "cat")
    assert classes("(tall)glass;(small) red bus") == ("(tall)glass", "(small) red bus")


@pytest.mark.parametrize(
    ("text", "kind", "where"),
    [
        ('{"annotations": [{"caption": "a cat"}, {"caption": null}]}', "json", "caption 2: the prompt is null"),
        ('{"annotations": [{"caption": 3}]}', "json", "caption 1: the prompt is 3"),
        ('{"prompt": "a cat"}\n{"prompt": null}', "jsonl", "line 2: the prompt is null"),
        ('{"prompt": false}', "jsonl", "line 1: the prompt is false"),
        ('{"prompt": ["a cat"]}', "jsonl", "line 1: the prompt is "),
        ('{"prompt": "a", "negative_prompt": 0}', "jsonl", "line 1: the negative prompt is 0"),
        ('{"prompt": "a", "classes": 0}', "jsonl", "line 1: 'classes' is neither"),
        ('{"prompt": "a", "classes": {"cat": 1}}', "jsonl", "line 1: 'classes' is neither"),
        ('{"prompt": "a", "classes": ["cat", null]}', "jsonl", "line 1: 'classes' is neither"),
        ('{"prompt": "a", "seed": false}', "jsonl", "line 1: the seed 'False'"),
        ('["a cat", 3]', "json", "prompt 2: there is no 'prompt'"),
        ('["a cat", null]', "json", "prompt 2: there is no 'prompt'"),
        ("prompt,seed\na cat,1\nNone,2\n", "csv", "line 3: the prompt is 'None'"),
        ("prompt\nnan\n", "csv", "line 2: the prompt is 'nan'"),
        ("prompt\tseed\na cat\t1.5\n", "tsv", "line 2: the seed '1.5'"),
        ("prompt,prompt\na,b\n", "csv", "names the column 'prompt' twice"),
        ('{"prompt": "a cat"}', "json", "neither a list of prompts nor a COCO captions file"),
        ('{"annotations": [{"bbox": []}]}', "json", "neither a list of prompts nor a COCO captions file"),
        ("[1", "json", "is not JSON"),
    ],
)
def test_a_value_of_another_type_is_refused_where_it_stands(text, kind, where):
    with pytest.raises(InputError, match=where.replace("(", r"\(")):
        parse_prompts(text, kind)


def test_null_is_nothing_where_nothing_need_be():
    (one,) = parse_prompts('{"prompt": "a cat", "classes": null, "seed": null, "negative_prompt": null}', "jsonl")
    assert one == Prompt("a cat", source="line 1")


def test_whole_numbers_of_tables_with_gaps():
    assert [one.seed for one in parse_prompts("prompt,seed\na,5.0\nb,\nc,7\n", "csv")] == [5, None, 7]


# ------------------------------------------------------------------------------------------------ what Windows writes


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_encodings_and_separators_of_spreadsheets(tmp_path, encoding, separator):
    rows = [("Prompt", "classes"), ("a café", "café"), ('"a cat, a dog; both"', '"cat, dog"')]
    file = tmp_path / "p.csv"
    file.write_bytes("".join(f"{separator.join(row)}\r\n" for row in rows).encode(encoding))
    assert [(one.text, one.classes, one.source) for one in read_prompts(file)] == [
        ("a café", ("café",), "line 2"),
        ("a cat, a dog; both", ("cat", "dog"), "line 3"),
    ]


def test_a_hint_of_the_separator():
    (one,) = parse_prompts("sep=;\r\nprompt;seed\r\na cat, alone;4\r\n", "csv")
    assert (one.text, one.seed, one.source) == ("a cat, alone", 4, "line 3")


@pytest.mark.parametrize(
    "data", [b"\x89PNG\r\n\x1a\n\0", b"PK\x03\x04\0\0", "Straße".encode("cp1252"), b"a\0b c d e f"]
)
def test_what_is_no_text_is_refused(tmp_path, data):
    (tmp_path / "p.csv").write_bytes(data)
    with pytest.raises(InputError, match=r"is not (UTF-8 text|a text file)"):
        read_prompts(tmp_path / "p.csv")


def test_decoded_text_has_no_mark():
    assert decoded("\ufeffa\r\nb".encode(), "It") == "a\r\nb"
    assert decoded(b"", "It") == ""
    assert texts("\ufeffprompt\na cat\n") == ["a cat"]


def test_lists_of_prompts_as_json():
    assert texts('["a cat", "a dog"]', "json") == ["a cat", "a dog"]
    (one,) = parse_prompts('[{"prompt": "a cat", "classes": ["cat"], "seed": 3}]', "json")
    assert one == Prompt("a cat", ("cat",), 3, source="prompt 1")
    (one,) = parse_prompts('{"annotations": [{"caption": " a  cat\\n"}]}', "json")
    assert one == Prompt("a cat", source="caption 1")


@pytest.mark.parametrize("written", ["background", "Background", "_background_", "BACKGROUND"])
def test_the_background_needs_no_name(written, tmp_path):
    assert class_list(f"{written}, cat, dog") == ("cat", "dog")
    assert check_classes([written, "cat"]) == ("cat",)
    (one,) = parse_prompts(json.dumps({"prompt": "a", "classes": ["cat", written]}), "jsonl")
    assert one.classes == ("cat",)
    for wrong in (written, f"cat, {written}"):
        with pytest.raises(InputError, match=r"no classes|no class of its own"):
            class_list(wrong)
    (tmp_path / "class_names.txt").write_bytes(f"\ufeff__ignore__\r\n{written}\r\ncat\r\nred bus\r\n".encode())
    assert read_classes(tmp_path) == ("cat", "red bus")


def test_a_voc_folder_as_windows_and_labelme_write_it(tmp_path):
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (tmp_path / folder).mkdir(parents=True)
    files = {"IMG_1": ".JPG", "my cat": ".jpeg", "a 1": ".png", "b": ".jpg", "v1.5": ".jpg", "c": ".PNG"}
    for name, suffix in files.items():
        Image.new("RGB", (8, 8)).save(tmp_path / "JPEGImages" / f"{name}{suffix}")
        label_image(np.full((8, 8), 1, np.uint8)).save(tmp_path / "SegmentationClass" / f"{name}.png")
    lines = ["IMG_1.JPG", "my cat", "a 1", "b  -1", "v1.5", "c.PNG"]
    (tmp_path / "ImageSets/Segmentation/val.txt").write_bytes("\r\n".join(lines).encode("utf-16"))
    (tmp_path / "classes.txt").write_bytes("Background\r\ncat\r\n".encode("utf-8-sig"))
    (tmp_path / "wanted.json").write_bytes(json.dumps({f"{x}{y}": ["cat"] for x, y in files.items()}).encode("utf-16"))
    found = read_voc(tmp_path, classes_from=tmp_path / "wanted.json")
    assert found.names == tuple(files)
    assert [found.photo(item).name for item in found.work.items] == [f"{x}{y}" for x, y in files.items()]
    assert {item.classes for item in found.work.items} == {("cat",)}


def test_annotated_metadata_of_windows(tmp_path, tiny):
    row = {"prompt": "a cat", "seed": 1, "mask": "masks\\cat.png", "class": "cat", "width": 64, "height": 64}
    (tmp_path / "metadata.jsonl").write_bytes((json.dumps(row) + "\r\n").encode("utf-8-sig"))
    (one,) = read_folder(tmp_path, OVAM(tiny))
    assert one.mask == tmp_path / "masks" / "cat.png"
    row["mask"] = "..\\cat.png"
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    with pytest.raises(InputError, match="outside"):
        read_folder(tmp_path, OVAM(tiny))


# ------------------------------------------------------------------------------------------------ bounds


def test_a_text_is_bounded_before_it_is_parsed(tmp_path):
    (tmp_path / "p.json").write_text("[" * 1001)
    with pytest.raises(InputError, match="larger than 1 kB"):
        read_prompts(tmp_path / "p.json", Bounds(bytes=1000))
    with pytest.raises(InputError, match="1,001 characters are more than the 1,000"):
        parse_prompts("[" * 1001, "json", bounds=Bounds(bytes=1000))


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("a\n" * 6, "txt"),
        ("prompt\n" + "a\n" * 6, "csv"),
        ('{"prompt": "a"}\n' * 6, "jsonl"),
        (json.dumps(["a"] * 6), "json"),
    ],
)
def test_rows_are_bounded(text, kind):
    assert len(parse_prompts(text, kind, bounds=Bounds(rows=6))) == 6
    with pytest.raises(InputError, match="more than the 5 prompts"):
        parse_prompts(text, kind, bounds=Bounds(rows=5))


def test_rows_behind_the_bound_are_not_looked_at():
    with pytest.raises(InputError, match="more than the 2 prompts"):
        parse_prompts("prompt\na\nb\nc\nNone\n", "csv", bounds=Bounds(rows=2))


def test_classes_are_bounded():
    with pytest.raises(InputError, match="255 classes are too many"):
        parse_prompts(json.dumps({"prompt": "a", "classes": [f"c{n}" for n in range(255)]}), "jsonl")
    with pytest.raises(InputError, match="longer than 100"):
        parse_prompts(json.dumps({"prompt": "a", "classes": ["c" * 101]}), "jsonl")
    with pytest.raises(InputError, match="characters long"):
        class_list("a," * 100_000)
    with pytest.raises(InputError, match="half of a character"):
        class_list("cat, \ud800")


# ------------------------------------------------------------------------------------------------ many prompts


def test_prompts_that_are_all_refused_end_early():
    asked = []

    def check(prompt, negative):
        asked.append(prompt)
        raise InputError("It has too many tokens.")

    prompts = [Prompt(f"a cat {number}", source=f"line {number}") for number in range(1, 3 * MAX_REFUSED)]
    with pytest.raises(InputError, match=r"the first 1,000 prompts; line 1: It has too many tokens"):
        work_list(prompts, ("cat",), check=check)
    assert len(asked) == MAX_REFUSED


def test_one_good_prompt_and_the_rest_is_listed():
    def check(prompt, negative):
        if prompt != "a cat 5":
            raise InputError("It has too many tokens.")

    prompts = [Prompt(f"a cat {number}", source=f"line {number}") for number in range(1, MAX_REFUSED + 20)]
    work = work_list(prompts, ("cat",), check=check)
    assert (len(work.items), len(work.skipped)) == (1, MAX_REFUSED + 18)


@pytest.mark.parametrize("stated", ["aeroplan", "cta", "zebra"])
def test_a_stated_class_that_is_not_in_the_list_ends_the_export(stated):
    prompts = [Prompt("a cat", ("cat",)), Prompt("x" * 3000, ("cat", stated), source="line 3")]
    with pytest.raises(InputError, match=rf"The class '{stated}' \(line 3\) is not among the classes"):
        work_list(prompts, ("cat", "aeroplane"))


def test_a_row_of_the_background_is_not_searched():
    for written in ("background", "_background_", ["Background"]):
        rows = [{"prompt": "a cat"}, {"prompt": "a cat", "classes": written}, {"prompt": "x", "classes": ["cat"]}]
        prompts = parse_prompts(json.dumps(rows), "json")
        for names in (None, ("cat",)):
            work = work_list(prompts, names)
            assert [item.prompt for item in work.items] == ["a cat", "x"]
            assert [one.reason for one in work.skipped] == ["It names none of the classes."]


def test_how_far_it_is():
    seen = []
    work_list([Prompt("a cat")] * 3, ("cat",), on_prompt=lambda *x: seen.append(x))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_long_prompts_are_listed_without_being_read():
    work = work_list([Prompt("cat " * 600, source="line 1"), Prompt("a cat")], ("cat",))
    assert [one.reason for one in work.skipped] == ["The prompt has 2,400 characters; at most 2,000 are allowed."]


def test_the_command_line_names_the_line(tmp_path, capsys):
    (tmp_path / "p.csv").write_text(f"prompt\n{SENTENCE}\n")
    assert main(["export", "--prompts", str(tmp_path / "p.csv"), "--dry-run", "--out", str(tmp_path / "out")]) == 2
    assert "line 2" in capsys.readouterr().err
