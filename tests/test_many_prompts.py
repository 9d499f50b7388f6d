"""Very many prompts: read as they are needed, kept on the disk, and nothing that grows with their square."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from ovam_core import OVAM
from ovam_core.cli.export import Options, read
from ovam_core.data import export, runs
from ovam_core.data.dataset import finished
from ovam_core.data.export import ExportSettings, batches_of
from ovam_core.data.filters import each_reasons, judge
from ovam_core.data.formats import coco_instances, contact_sheet
from ovam_core.data.layout import FOLDERS
from ovam_core.data.prompts import (
    Bounds,
    Item,
    Prompt,
    PromptFile,
    Skipped,
    Work,
    parse_prompts,
    read_prompts,
    work_list,
)
from ovam_core.errors import InputError
from ovam_core.io import stored
from ovam_core.io.stored import Stored
from ovam_core.io.texts import read_text, text_file
from ovam_core.models.adapter import Adapter
from ovam_core.plot import label_image
from ovam_core.settings import Filters, SegmentSettings
from tabs.generate import GenerateTab

# ----------------------------------------------------------------------------------- sequences in a file


@pytest.fixture
def on_disk(monkeypatch):
    """What is kept goes to a file at once."""
    monkeypatch.setattr(stored, "IN_MEMORY", 256)


@pytest.mark.parametrize("count", [0, 1, 3, 200])
def test_a_stored_sequence_is_what_was_put_into_it(on_disk, count):
    rows = [{"n": n, "share": n / 7, "name": "Zoë 猫 \n", "none": None, "half": "\ud800"} for n in range(count)]
    kept = Stored(rows)
    assert kept == rows
    assert rows == kept
    assert list(kept) == rows
    assert list(reversed(kept)) == rows[::-1]
    assert kept[:2] == rows[:2]
    assert kept[::-1][:24] == rows[::-1][:24]
    assert [kept[n] for n in range(count)] == rows
    assert bool(kept) == bool(rows)
    assert kept != [*rows, {}]
    odd = kept.chosen(range(1, count, 2))
    assert odd == rows[1::2]
    kept.append({"n": -1})
    assert kept[-1] == {"n": -1}
    assert odd == rows[1::2]
    with pytest.raises(IndexError):
        kept[count + 1]


def test_threads_read_a_stored_sequence_at_the_same_time(on_disk):
    kept = Stored(range(2000))
    with ThreadPoolExecutor(4) as pool:
        sums = [pool.submit(sum, kept) for _ in range(4)]
    assert [one.result() for one in sums] == [sum(range(2000))] * 4


# ----------------------------------------------------------------------------------------- files of prompts

TEXTS = {
    "txt": "a cat\r\n\r\n  a dog on grass \na bus\u2028with a line of its own\r",
    "csv": 'sep=;\r\nprompt;classes;seed\r\n"a cat; and\na dog";"cat, dog";3\r\n\r\n"a ""red"" bus";bus;\r\n',
    "tsv": "prompt\tclasses\na cat\tcat\na dog\t\n",
    "jsonl": '{"prompt": "a cat"}\n\n{"prompt": "ein Hund, Zoë", "seed": 4}\n',
    "json": '{"annotations": [{"caption": "a cat\\n"}, {"caption": "a dog"}]}',
}
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le")


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("kind", TEXTS)
def test_a_file_gives_what_its_text_gives(tmp_path, kind, encoding):
    file = tmp_path / f"p.{kind}"
    file.write_bytes(TEXTS[kind].encode(encoding))
    expected = parse_prompts(TEXTS[kind], kind, file.name)
    prompts = PromptFile(file)
    assert list(prompts) == list(prompts) == read_prompts(file) == expected
    assert len(prompts) == len(expected)
    assert expected[0] in prompts
    with text_file(file, "It")("") as text:
        assert text.read() == read_text(file, "It") == TEXTS[kind]


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"a cat\n" * 9000 + b"a d\0g\n", "bytes of 0"),
        (b"a cat\n" * 9000 + b"a d\xffg\n", "not UTF-8"),
        (b"\n \r\n", "holds no prompt"),
        (b"", "holds no prompt"),
        (b"a cat\n" * 20_001, "more than the 20,000"),
        (b"a cat\n" * 40_000, "larger than 200 kB"),
    ],
)
def test_a_fault_at_the_end_of_a_file_is_found_before_anything_is_made(tmp_path, data, sentence):
    (tmp_path / "p.txt").write_bytes(data)
    with pytest.raises(InputError, match=sentence):
        PromptFile(tmp_path / "p.txt", Bounds(200_000, 20_000))


@pytest.mark.parametrize("row", ['"a cat', "a dog,cat,7,8", 'a "dog" x,"cat'])
def test_a_malformed_row_is_named_by_its_line(tmp_path, row):
    (tmp_path / "p.csv").write_text("prompt,classes,seed\n" + "a cat,cat,1\n" * 40 + row + "\n")
    with pytest.raises(InputError, match=r"line 42"):
        PromptFile(tmp_path / "p.csv")


@pytest.mark.parametrize("name", ["", "missing.txt"])
def test_what_is_no_file(tmp_path, name):
    with pytest.raises(InputError, match="cannot be read"):
        PromptFile(tmp_path / name)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_a_pipe_is_read_once(tmp_path):
    os.mkfifo(tmp_path / "p.txt")
    writer = threading.Thread(target=(tmp_path / "p.txt").write_text, args=("a cat\na dog\n",))
    writer.start()
    prompts = PromptFile(tmp_path / "p.txt")
    writer.join()
    assert [one.text for one in prompts] == [one.text for one in prompts] == ["a cat", "a dog"]


def test_the_command_line_reads_no_list(tmp_path):
    (tmp_path / "p.txt").write_text("a cat\na dog\n")
    prompts, classes = read(Options(prompts=str(tmp_path / "p.txt"), out="x"))
    assert isinstance(prompts, PromptFile)
    work = work_list(prompts, classes, negative="blurred", limit=1)
    assert work.items == [Item(0, "a cat", "blurred", 0, ("cat",))]
    work = work_list([Prompt("a cat", negative="dark"), Prompt("a pen")], None, 2, negative="blurred")
    assert [item.negative_prompt for item in work.items] == ["dark", "dark"]
    assert work.skipped == (Skipped("", "a pen", "It names none of the classes."),)


# ------------------------------------------------------------------------------------------------- memory


def peak(make) -> int:
    """Bytes that Python had at once while it was made."""
    gc.collect()
    tracemalloc.start()
    try:
        make()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def lines(folder, count: int) -> None:
    written = (f"a photograph of a {'cat' if n % 2 else 'pen'} number {n}\n" for n in range(count))
    (folder / f"{count}.txt").write_text("".join(written))


def test_ten_times_the_prompts_take_no_more_memory(tmp_path, on_disk):
    """As objects, 2,000 prompts and their items would take half a megabyte and more."""

    def begun(count):
        work = work_list(PromptFile(tmp_path / f"{count}.txt"))
        assert len(work.items) == len(work.skipped) == count // 2
        export._digest_of_items(work)
        assert next(batches_of(work.items, 4)) == work.items[:4]

    for count in (10, 200, 2000):
        lines(tmp_path, count)
    begun(10)  # the vocabulary is made once
    few, many = (peak(lambda count=count: begun(count)) for count in (200, 2000))
    assert many < few + 100_000


def test_ten_times_the_images_take_no_more_memory_at_the_end(tmp_path, on_disk):
    row = {"classes": ["cat"], "prompt": "a cat " * 10, "coverage": 0.5, "clip_scores": [0.5]}

    def ended(count):
        items = tuple(Item(n, "a cat", "", n, ("cat",)) for n in range(count))
        rows = finished(tmp_path, Work(items, ("cat",)), Filters(clip_drop=0.1))
        assert [len(rows), sum(one["kept"] for one in rows)] == [count, count * 9 // 10]

    for name in FOLDERS:
        (tmp_path / name).mkdir(exist_ok=True)
    for number in range(300):
        runs.write_done(tmp_path, number, {}, row)
    few, many = (peak(lambda count=count: ended(count)) for count in (30, 300))
    assert many < few + 100_000  # some 250 bytes an item, which this test makes, and a few a row


# ------------------------------------------------------------------------------- each prompt, each image once


def test_prompts_are_read_once_and_a_shared_negative_prompt_once_in_all(tiny, monkeypatch):
    ovam, read_texts, whole = OVAM(tiny), [], Adapter.tokenize
    settings = ExportSettings.for_model(ovam)
    monkeypatch.setattr(Adapter, "tokenize", lambda self, text: read_texts.append(text) or whole(self, text))
    prompts = [Prompt(f"a cat {n}") for n in range(30)]
    work = work_list([*prompts, Prompt("a cat " * 90)], check=settings.check(ovam), negative="blurred")
    assert sorted(read_texts) == sorted([*(one.text for one in prompts), "a cat " * 90, "blurred"])
    assert len(work.items) == 30
    assert "tokens and the text encoder takes" in work.skipped[0].reason


def test_batches_are_made_when_they_are_asked_for():
    asked = []
    items = (asked.append(n) or Item(n, "a cat", "dark" * (n > 4), n, ("cat",)) for n in range(1000))
    batches = batches_of(items, 2)
    assert [[item.index for item in next(batches)] for _ in range(4)] == [[0, 1], [2, 3], [4], [5, 6]]
    assert len(asked) <= 8


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_start_looks_once_at_each_image(tmp_path, monkeypatch, ranks):
    looked = []
    monkeypatch.setattr(runs, "read_done", lambda _, item: looked.append(item.index) or {})
    items = Stored((n for n in range(50)), unpack=lambda n: Item(n, "a cat", "", n, ("cat",)))
    for rank in range(ranks):
        about = {"batch_size": 4}
        run = export._Run(None, Work(items, ("cat",)), SimpleNamespace(**about), tmp_path, {}, *[None] * 7)
        assert not run.make(runs.Process(rank, ranks), 0)
        assert run.done == run.total
    assert sorted(looked) == list(range(50))


# -------------------------------------------------------------------------------------------- the same bytes


def test_the_fingerprint_of_prompts_is_that_of_the_whole_list():
    for work in (work_list([Prompt("a cat é"), Prompt("a dog", negative="x")], None, 2), Work((), ("cat",))):
        rows = [[item.index, item.prompt, item.negative_prompt, item.seed, *item.classes] for item in work.items]
        assert export._digest_of_items(work) == hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_coco_is_written_as_json_writes_it(tmp_path, count):
    rng = np.random.default_rng(0)
    rows = []
    for number in range(count):
        labels = rng.choice(np.array([0, 1, 3, 255], np.uint8), (6, 9)) * (number != 1)
        label_image(labels).save(tmp_path / f"{number}.png")
        rows.append({"file_name": f"JPEGImages/{number}.jpg", "mask_file_name": f"{number}.png", "labels": labels})
    text = b"".join(coco_instances(tmp_path, rows, ("cat", "Zoë", "bus"))).decode()
    found = json.loads(text)
    assert text == json.dumps(found, ensure_ascii=False) + "\n"
    assert [one["file_name"] for one in found["images"]] == [f"{number}.jpg" for number in range(count)]
    assert [one["name"] for one in found["categories"]] == ["cat", "Zoë", "bus"]
    expected = [
        (number, label, int((row["labels"] == label).sum()))
        for number, row in enumerate(rows, start=1)
        for label in (1, 3)
        if (row["labels"] == label).any()
    ]
    assert [(x["image_id"], x["category_id"], x["area"]) for x in found["annotations"]] == expected
    assert [x["id"] for x in found["annotations"]] == list(range(1, len(expected) + 1))


def test_rows_that_are_stored_are_judged_and_shown_as_a_list_is(tmp_path, on_disk):
    rng = np.random.default_rng(1)
    rows = [
        {
            "classes": ["cat", "dog"],
            "coverage": float(rng.random()),
            "clip_scores": rng.integers(0, 4, 2).astype(float).tolist(),
            "file_name": "a.png",
            "mask_file_name": "b.png",
        }
        for _ in range(60)
    ]
    filters = Filters(clip_drop=0.25)
    kept = Stored(rows)
    assert list(each_reasons(kept, filters)) == list(each_reasons(rows, filters))
    for place, name in enumerate(rows[0]["classes"]):
        ranked = sorted(range(60), key=lambda n: (rows[n]["clip_scores"][place], -n))[:15]
        lowest = [n for n, why in enumerate(each_reasons(kept, filters)) if any(x.text.endswith(name) for x in why)]
        assert lowest == sorted(ranked)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    label_image(np.ones((8, 8), np.uint8)).save(tmp_path / "b.png")
    assert contact_sheet(tmp_path, Stored(judge(rows, filters))) == contact_sheet(tmp_path, judge(rows, filters))


# ----------------------------------------------------------------------------------------- large photographs


def test_words_that_nobody_asked_for_cost_no_masks_and_leave_the_last_maps(tiny):
    ovam, sizes = OVAM(tiny), []
    picture = ovam.photograph(Image.new("RGB", (300, 200), "red"), "a cat on grass")
    ovam.segment(picture, ["cat"], crf=False)
    last = picture.last_maps

    def answer(seen, settings, _):
        sizes.append(max(seen.image.size))
        return ovam.answer(seen, settings)

    model = SimpleNamespace(words_of=lambda _: nullcontext(), answer=answer)
    tab = SimpleNamespace(asked_for=lambda *_: SegmentSettings(words=("cat",)), model=model)
    found = GenerateTab.candidates_of(tab, None, "key", picture, None)
    assert set(sizes) == {64}
    assert picture.last_maps is last
    again = ovam.segment(replace(picture, last_maps=None), ["cat", "grass"], crf=False)
    own = {word["label"]: word["map"] for word in found["groups"][0]["words"]}
    assert set(own) == {"cat", "grass"}
    for label, values in zip(again.labels, again.grid_maps, strict=True):
        assert own[label]["top"] == pytest.approx(float(values.max()), rel=1e-5)
