"""The third tab: what is said before the start, bounds on the server, what is shown of an export, and in a browser
exports that are stopped, replaced, found again after a reload, and gone on with.
"""

from __future__ import annotations

import json
import re
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import numpy as np
import pytest
from page import set_number, shoot
from PIL import Image

import tabs.export as tab
from ovam_core.data.export import ExportSettings, Plan, Summary, Timings, export_dataset, plan
from ovam_core.data.formats import zip_folder
from ovam_core.data.prompts import Item, Prompt, Skipped, Work, template_prompts, work_list
from ovam_core.errors import InputError
from ovam_core.settings import Filters
from tabs import report
from tabs.export import OWN, TEMPLATE, Rates, prompts_of, title_of, within
from tabs.report import bar, forecast, gallery, results, size_text
from tabs.session import HOSTED, Limits, Sessions
from tabs.worker import in_thread


@pytest.fixture(scope="module")
def sessions(ovam):
    """Those of a Space: visitors are none of one another's."""
    made = Sessions(ovam.name, limits_of_exports=HOSTED)
    yield made
    made.close()


def test_a_worker_hands_on_reports_then_the_result():
    def work(report):
        for number in range(3):
            report(number)
            time.sleep(0.05)
        return "done"

    seen = list(in_thread(work, 0.01))
    assert [one for reports, _ in seen for one in reports] == [0, 1, 2]
    assert [result for _, result in seen][-1] == "done"
    assert all(result is None for _, result in seen[:-1])


def test_a_worker_raises_what_the_work_raises():
    def work(_):
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        list(in_thread(work, 0.01))


# --------------------------------------------------------------------------------------------- what is asked


def test_bounds():
    small = Limits(prompts=2, images=3, megabytes=1, seconds=1)
    within(small, [Prompt("a cat")], 3)
    with pytest.raises(InputError, match="3 prompts are too many"):
        within(small, [Prompt("a cat")] * 3, 1)
    with pytest.raises(InputError, match="4 images are too many"):
        within(small, [Prompt("a cat")] * 2, 2)


def test_prompts_by_each_way(tmp_path):
    prompts, classes = prompts_of(TEMPLATE, "a {}", ["cat", "dog"], "ignored", None)
    assert [one.text for one in prompts] == ["a cat", "a dog"]
    assert classes == ("cat", "dog")
    assert title_of(TEMPLATE, "a {}", prompts, None) == "a {}"
    assert len(prompts_of(TEMPLATE, "a {}", [], "", None)[0]) == 20
    prompts, classes = prompts_of(OWN, "", [], "a cat\n\na dog", None)
    assert [one.text for one in prompts] == ["a cat", "a dog"]
    assert classes is None
    assert title_of(OWN, "a {}", prompts, None) == "a cat and 1 more"
    table = tmp_path / "prompts.csv"
    table.write_text("prompt,classes\na kitten,cat\n")
    prompts, _ = prompts_of(OWN, "", [], "", str(table))
    assert prompts[0].classes == ("cat",)
    assert title_of(OWN, "", prompts, str(table)) == "a kitten (prompts.csv)"


@pytest.mark.parametrize(
    ("way", "template", "names", "text", "said"),
    [
        (OWN, "", [], "", "no prompts"),
        (OWN, "", [], "x" * 2_000_001, "2,000,001"),
        (TEMPLATE, "a photograph", ["cat"], "", "{}"),
        (TEMPLATE, "a {}", ["x" * 200], "", "."),
    ],
)
def test_bad_prompts(way, template, names, text, said):
    with pytest.raises(InputError, match=said):
        prompts_of(way, template, names, text, None)


@pytest.fixture
def page(blocks):
    """The tab itself."""
    begin = next(
        event.fn for event in blocks.fns.values() if getattr(event.fn, "__qualname__", "") == "ExportTab.begin"
    )
    return begin.__self__


def values_of(page) -> dict:
    return {component: component.value for component in page.given}


CLIENT = SimpleNamespace(session_hash="client")


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("each", "NaN", "Images a prompt is NaN; give a number"),
        ("each", 1.5, "Images a prompt is 1.5; give a whole number"),
        ("each", None, "number of images a prompt is None"),
        ("each", 10**9, "images are too many"),
        ("each", 101, "202 images are too many here"),
        ("seed", -1, "seed is -1"),
        ("low", "much", "Least coverage is much; give a number"),
        ("high", None, "Most coverage is None; give a number"),
        ("high", 7, "max coverage is 7"),
        ("steps", 0, "steps is 0; choose"),
        ("classes", "cat", "no list of names"),
        ("classes", [1], "no list of names"),
        ("formats", ["pdf"], "pdf"),
        ("way", "another", "no choice 'another'"),
        ("by", ["x"], "no choice"),
        ("file", {"path": "/etc/passwd"}, "uploaded"),
    ],
)
def test_what_a_client_may_send(page, field, value, said):
    values = {**values_of(page), getattr(page, field): value}
    if field == "file":
        values[page.way] = OWN
    assert re.search(said, page.foresee(values, CLIENT).replace("&#x27;", "'"))  # before anything starts
    with pytest.raises(gr.Error, match=said):
        page.begin(dict(values), CLIENT)
    assert page.exports.of(page.sessions.of(CLIENT).visitor) == []


def test_what_is_too_large_is_refused_before_it_starts(page, monkeypatch):
    monkeypatch.setattr(page, "limits", replace(HOSTED, megabytes=0.5))
    assert 'class="refused">This would be up to 1 MB' in page.foresee(values_of(page), CLIENT)
    with pytest.raises(gr.Error, match="up to 1 MB"):
        page.begin(values_of(page), CLIENT)


def test_what_the_page_sends_begins(page):
    ann = SimpleNamespace(session_hash="ann")
    (number, key, stale), _, note, moment, kept = page.begin(values_of(page), ann)
    session = page.sessions.of(ann)
    assert "of 4" in moment
    assert "<b>4 images</b>" in note
    assert not stale
    assert session.is_latest("export", number)
    assert page.exports.get(session.visitor, key).total == 4
    assert f'data-export="{key}"' in kept
    # another export on the right: it is out of date
    (again, same, stale), *_, moment, _ = page.begin({**values_of(page), page.shown: "another"}, ann)
    assert (same, stale) == (key, True)
    assert 'class="stale"' in moment
    assert not session.is_latest("export", number)
    assert session.is_latest("export", again)
    session.stop()


@pytest.mark.parametrize(
    "data", [None, 5, [], {}, {"export": None}, {"export": ["x"]}, {"export": "é"}, {"export": "x"}]
)
def test_what_a_client_may_ask_of_the_list(page, data):
    for act in (page.open, page.remove):
        with pytest.raises(gr.Error, match="not kept any more"):
            act(CLIENT, gr.EventData(None, data))
    with pytest.raises(gr.Error, match="not kept any more"):
        page.resume(None, CLIENT, gr.EventData(None, data))
    session = page.sessions.of(CLIENT)
    page.greet(values_of(page), CLIENT, gr.EventData(None, {"visitor": data}))
    assert page.sessions.of(CLIENT).visitor == session.visitor
    with pytest.raises(gr.Error, match="not kept any more"):
        list(page.run("a key of something else", CLIENT))


# ---------------------------------------------------------------------------------------- before it begins


def planned_of(images: int, settings: ExportSettings, done: int = 0, skipped: tuple = ()) -> Plan:
    return Plan(images, done, {"cat": images}, {"cat": "word"}, skipped, 70_000 * images, settings)


def run_of(seconds: float, generation: float, images: int, tmp_path: Path) -> Summary:
    """A run whose every image has 1000 bytes, with 500 beside each."""
    rows = [{"file_name": f"{n}.jpg", "mask_file_name": f"{n}.png"} for n in range(images)]
    for n in range(images):
        (tmp_path / f"{n}.jpg").write_bytes(b"x" * 900)
        (tmp_path / f"{n}.png").write_bytes(b"x" * 100)
    (tmp_path / "contact_sheet.png").write_bytes(b"x" * 400 * images)
    (tmp_path / "metadata.jsonl").write_bytes(b"x" * 100 * images)
    return Summary(rows, images, images, False, Timings(generation=generation, total=seconds))


def test_an_estimate_is_by_what_was_measured(ovam, tmp_path):
    rates, settings = Rates(), ExportSettings.for_model(ovam, steps=10, crf=False)
    assert rates.estimate(planned_of(4, settings)) is None
    rates.add(settings, Summary([], 4, 0, True, Timings()), 3.0, tmp_path)  # made nothing
    assert rates.estimate(planned_of(4, settings)) is None
    rates.add(settings, run_of(20.0, 16.0, 4, tmp_path), 20.0, tmp_path)  # 4 s of steps and 1 s beside, an image
    same = rates.estimate(planned_of(8, settings, done=2))
    assert same.image_seconds == pytest.approx(5.0)
    assert same.seconds == pytest.approx(6 * 5.0)
    assert same.bytes == pytest.approx(8 * 1500)
    assert rates.estimate(planned_of(100, settings)).bytes == pytest.approx(100 * 1000 + 48 * 500)
    assert rates.estimate(planned_of(2, replace(settings, steps=20))).seconds == pytest.approx(2 * (8.0 + 1.0))
    wide = replace(settings, width=2 * settings.width)
    assert rates.estimate(planned_of(2, wide)).seconds == pytest.approx(2 * 2 * 5.0)
    assert rates.estimate(planned_of(2, replace(settings, formats=("voc", "parquet")))).bytes == 2 * 2000 + 2 * 500
    # runs like it count for more than others
    rates.add(replace(settings, steps=40), run_of(400.0, 400.0, 4, tmp_path), 400.0, tmp_path)
    assert rates.estimate(planned_of(1, settings)).seconds == pytest.approx(5.0)
    assert rates.estimate(planned_of(1, replace(settings, steps=40))).seconds == pytest.approx(100.0)


def test_an_estimate_holds(ovam, tmp_path):
    """Of six images by two that were made, against the six: the number exactly, the bytes within a third."""
    settings = ExportSettings.for_model(ovam, steps=1, width=64, height=64, crf=False, threads=1)
    few, many = (work_list(template_prompts("a {}", ("cat", "dog")), ("cat", "dog"), images) for images in (1, 3))
    rates = Rates()
    summary = export_dataset(ovam, few, settings, tmp_path / "few", workers=0)
    rates.add(settings, summary, summary.timings.total, tmp_path / "few")
    planned = plan(ovam, many, settings, None)
    foreseen = rates.estimate(planned)
    made = export_dataset(ovam, many, settings, tmp_path / "many", workers=0)
    size = zip_folder(tmp_path / "many", tmp_path / "many.zip").stat().st_size
    assert planned.images == len(made.rows) == 6
    assert foreseen.bytes * 2 / 3 <= size <= foreseen.bytes * 4 / 3
    assert size <= planned.largest_bytes


def test_what_is_said_before_it_begins(ovam):
    settings = ExportSettings.for_model(ovam, width=128, height=128)
    unknown = forecast(planned_of(4, settings), None, 600.0)
    assert "<b>4 images</b> of 128 × 128 px · at most 280 kB" in unknown
    assert "how long is known after the first export here" in unknown
    usual = tab.Estimate(50.0, 9000.0, 1000.0, 36_000.0)
    known = forecast(planned_of(4, settings, done=1), usual, 600.0)
    assert "about 36 kB, at most 280 kB · about 17 min" in known
    assert "Made already: 1; Export goes on with the rest." in known
    assert "All are made already." in forecast(planned_of(4, settings, done=4), None, 600.0)
    assert "One run lasts 10 min at most here" in known
    assert "One run" not in forecast(planned_of(4, settings), usual, 3600.0)
    skipped = (Skipped("line 2", "<b>nothing</b>", "It names none of the classes."),)
    said = forecast(planned_of(1, settings, skipped=skipped), None, 600.0)
    assert "<b>1 image</b> of" in said
    assert "1 prompt is skipped</summary>" in said
    assert "&lt;b&gt;nothing&lt;/b&gt;" in said
    assert "No token is here for cat" in forecast(planned_of(1, replace(settings, tokens="x")), None, 600.0)


@pytest.mark.parametrize(
    ("nbytes", "text"), [(0, "1 kB"), (12_345, "12 kB"), (3.44e6, "3.4 MB"), (1.2e9, "1.2 GB"), (12e9, "12.0 GB")]
)
def test_sizes_in_words(nbytes, text):
    assert size_text(nbytes) == text


# ------------------------------------------------------------------------------------------- while it runs


def test_the_bar_says_how_far_how_fast_how_long_and_what():
    assert "<b>5</b> of 20 · 60 a minute · 15 s left" in bar(5, 20, 2, 2.0)
    assert "a minute" not in bar(20, 20, 5, 5.0)
    assert "30 an hour" in bar(1, 20, 1, 120.0)
    assert "Now: “a &lt;cat&gt;”, seed 7" in bar(0, 2, 0, 0.0, Item(0, "a <cat>", "", 7, ("cat",)))
    assert "stale" not in bar(0, 2, 0, 0.0)


def rows_of(*shares: float, name: str = "cat", least: float = 0.1) -> list[dict]:
    return [
        {
            "file_name": f"JPEGImages/{number:06d}_cat.jpg",
            "mask_file_name": f"SegmentationClass/{number:06d}_cat.png",
            "prompt": "a <cat>",
            "seed": number,
            "classes": [name],
            "class_ids": [1],
            "clip_scores": None,
            "coverages": [share],
            "coverage": share,
            "kept": share >= least,
            "reason": "" if share >= least else f"coverage under {least:.3g}",
        }
        for number, share in enumerate(shares)
    ]


def test_the_gallery_shows_the_newest_and_counts_the_rest(tmp_path):
    shown = gallery(tmp_path, rows_of(*[0.5] * 144))
    assert shown.count("<figure>") == report.SHOWN == 24
    assert "and 120 more" in shown
    assert [int(seed) for seed in re.findall(r"· seed (\d+)<", shown)] == list(range(143, 119, -1))
    few = gallery(tmp_path, rows_of(0.5, 0.01))
    assert few.count("<figure>") == 2
    assert "more" not in few
    assert few.count("dropped: coverage under 0.1") == 1
    assert few.index("cat 1%") < few.index("cat 50%")
    assert 'alt="Label map: cat 50%"' in few
    assert "a &lt;cat&gt;" in few
    assert "<cat>" not in few
    assert f'<i style="background:{report.color(1)}"></i>cat 50%' in few
    assert report.color(1) == "#800000"
    assert gallery(tmp_path, []) == report.NOTHING_YET


def summary_of(rows: list[dict], skipped: tuple = ()) -> Summary:
    return Summary(rows, len(rows), len(rows), False, Timings(), skipped, (), Filters(min_coverage=0.1))


def test_results_have_a_plot_a_table_and_what_was_left_out():
    skipped = tuple(Skipped(f"line {n}", f"prompt {n}", "It names none of the classes.") for n in range(150))
    said = results(summary_of([*rows_of(0.2, 0.4, 0.05), *rows_of(0.7, name="<dog>")], skipped))
    assert "cat: 3 images from 5% to 40%, mean 30% of 2 kept; &lt;dog&gt;: 1 image from 70% to 70%" in said
    assert re.findall(r'cx="([\d.]+)%" cy="\d+" r="3.5" class="(\w+)"', said) == [
        ("5.00", "lost"),
        ("20.00", "kept"),
        ("40.00", "kept"),
        ("70.00", "kept"),
    ]
    assert re.findall(r'<line x1="([\d.]+)%" x2="\1%" y1="3"', said) == ["30.00", "70.00"]
    cells = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", said)]
    assert cells[1:3] == [["cat", "3", "2", "1", "0", "30%"], ["&lt;dog&gt;", "1", "1", "0", "0", "70%"]]
    assert "1 image is dropped by the filters" in said
    assert ["000002_cat", "a &lt;cat&gt;", "coverage under 0.1"] in cells
    assert "150 prompts are skipped" in said
    assert ["line 99", "prompt 99", "It names none of the classes."] in cells
    assert "and 50 more, listed in the data set" in said
    assert "<dog>" not in said
    assert "No image was finished" in results(summary_of([]))
    assert "none kept" in results(summary_of(rows_of(0.01)))


def test_a_plot_of_thousands_stays_small():
    said = results(summary_of(rows_of(*np.linspace(0, 1, 5000))))
    drawn = [float(x) for x in re.findall(r'cx="([\d.]+)%"', said)]
    assert len(drawn) == report.DOTS
    assert np.abs(np.array(drawn) - np.linspace(0, 100, len(drawn))).max() < 0.5  # as they are spread
    assert "600 of each class are drawn" in said
    assert len(said) < 150_000


def test_the_list_of_those_that_are_kept(sessions):
    work = Work(tuple(Item(n, f"a cat {n}", "", n, ("cat",)) for n in range(4)), ("cat", "dog"))
    settings = ExportSettings(steps=7, guidance=1.0, width=64, height=64)
    ann = sessions.new_visitor()
    unfinished = sessions.exports.ask(ann, "a <cat> {}", work, settings)
    unfinished.done = 3
    finished = sessions.exports.ask(ann, "others", work, replace(settings, steps=8))
    finished.done = 4
    finished.folder.mkdir()
    (finished.folder / "file").write_bytes(b"x" * 50_000)
    finished.pack()
    said = report.kept(sessions.exports.of(ann), 3600.0, ann)
    assert said.index("Unfinished") < said.index("a &lt;cat&gt; {}") < said.index("<h3>Finished") < said.index("others")
    assert "cat · 3 of 4 images · 7 steps" in said
    assert f'data-visitor="{ann}"' in said
    acts = re.findall(r'data-act="(\w+)" data-export="([\w-]+)"', said)
    assert acts == [
        *((act, unfinished.key) for act in ("resume", "open", "remove")),
        *((act, finished.key) for act in ("open", "remove")),
    ]
    assert said.count("Download zip · 50 kB") == 1
    assert "Each waits 1 hour" in said
    assert report.kept([], 3600.0, "") == '<div class="exports" data-visitor=""></div>'


# ---------------------------------------------------------------------------------------------- the browser


def open_tab(page) -> None:
    page.get_by_role("tab", name="Batch mask export").click()
    page.wait_for_selector("#export-note p")


def ask_little(page, each: int) -> None:
    page.click("#export-more > button")
    set_number(page, "#export-steps", 1)
    set_number(page, "#each", each)


@pytest.fixture
def waiting(monkeypatch):
    """The first export goes on after its first image only when it is stopped: it may be over before a slow page shows
    it.
    """
    real, begun = tab.export_dataset, []

    def export(*given, on_image, should_stop, **more):
        begun.append(1)

        def told(progress):
            on_image(progress)
            deadline = time.monotonic() + 60
            while len(begun) == 1 and not should_stop() and time.monotonic() < deadline:
                time.sleep(0.05)

        return real(*given, on_image=told, should_stop=should_stop, **more)

    monkeypatch.setattr(tab, "export_dataset", export)


def test_an_export_stopped_found_again_after_a_reload_and_gone_on_with(visit, waiting, tmp_path):
    page = visit()
    open_tab(page)
    assert page.is_disabled("#export-stop")
    shoot(page, "export-empty", full=True)
    ask_little(page, 2)
    page.click("#export")
    page.wait_for_selector("#exported figure")
    assert re.search("Now: “A photograph of a (cat|dog)”, seed", page.inner_text("#export-state"))
    page.click("#export-stop")
    page.wait_for_selector("#export-facts:has-text('Stopped')")
    before = int(page.inner_text("#export-state b"))
    assert 1 <= before < 4

    page.reload()
    open_tab(page)
    row = page.wait_for_selector(f"#export-kept li:has-text('{before} of 4 images · 1 step')")
    assert "A photograph of a {}" in row.inner_text()
    page.click("#export-kept button[data-act=resume]")
    page.wait_for_selector("#export-facts:has-text('4 of 4')")
    assert f"{4 - before} made in this run" in page.inner_text("#export-facts")
    assert page.locator("#exported figure").count() == 4  # those of the run before, too
    page.wait_for_selector("#export-kept h3:has-text('Finished')")
    page.wait_for_selector("#export-stop[disabled]")

    said = page.inner_text("#export-facts a")
    with page.expect_download() as download:
        page.click("#export-kept a:has-text('Download zip')")
    download.value.save_as(tmp_path / "data.zip")
    assert said == f"Download zip · {size_text((tmp_path / 'data.zip').stat().st_size)}"
    with zipfile.ZipFile(tmp_path / "data.zip") as archive:
        assert archive.testzip() is None
        assert not [name for name in archive.namelist() if name.startswith(".")]
        archive.extractall(tmp_path / "data")
    rows = [json.loads(line) for line in (tmp_path / "data" / "metadata.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["A photograph of a cat"] * 2 + ["A photograph of a dog"] * 2
    for row in rows:
        assert Image.open(tmp_path / "data" / row["file_name"]).size == (128, 128)
        labels = Image.open(tmp_path / "data" / row["mask_file_name"])
        assert labels.mode == "P"
        assert set(np.unique(np.asarray(labels))) <= {0, *row["class_ids"]}

    loaded = "all => all.every(one => one.complete && one.naturalWidth === 128)"
    page.wait_for_function(f"({loaded})([...document.querySelectorAll('#exported img')])")
    page.focus("#exported figure >> nth=1 >> button")
    page.keyboard.press("Enter")
    page.wait_for_selector("dialog.export-look[open]")
    assert page.locator("dialog img").count() == 2
    seen = page.inner_text("dialog")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("dialog") != seen
    shoot(page, "export-enlarged")
    page.keyboard.press("Escape")
    assert page.locator("dialog[open]").count() == 0

    page.click("#export-kept button[data-act=remove]")
    page.wait_for_selector("#export-kept li", state="detached")


def test_a_second_start_takes_the_place_of_the_first(visit, waiting, sessions):
    work = work_list([Prompt("a cat")])
    sessions.exports.ask(sessions.new_visitor(), "of somebody else", work, ExportSettings(1, 1.0, 64, 64))
    page = visit(390, 844)
    open_tab(page)
    assert page.locator("#export-kept li").count() == 0
    ask_little(page, 2)
    page.click("#export")
    page.wait_for_selector("#exported figure")
    set_number(page, "#each", 1)
    page.wait_for_selector("#export-note:has-text('2 images')")
    page.click("#export")
    page.wait_for_selector("#export-facts:has-text('2 of 2')")
    assert "2 of 2" in page.inner_text("#export-state")
    page.wait_for_selector("#export-stop[disabled]")
    page.wait_for_selector("#export-kept li:has-text('2 of 2 images')")
    left = page.inner_text("#export-kept li:has-text('of 4 images')")
    assert "Resume" in left
    assert page.locator("#exported figure").count() == 2
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_own_prompts_and_a_mistake(visit):
    page = visit(820, 1180)
    open_tab(page)
    page.click("#export-way label:has-text('My own')")
    page.wait_for_selector("#export-note .refused:has-text('no prompts')")
    page.click("#export")
    page.wait_for_selector(".toast-body:has-text('no prompts')")
    assert page.is_enabled("#export")
    ask_little(page, 1)
    page.fill("#low input[type=number]", "0.95")  # next to nothing is kept
    page.fill("#export-prompts textarea", "A cat and a dog on grass\n<b>nothing</b> known here")
    page.wait_for_selector("#export-note:has-text('1 prompt is skipped')")
    page.click("#export")
    page.wait_for_selector("#export-facts:has-text('1 of 1')")
    assert "1 prompt was skipped" in page.inner_text("#export-facts")
    assert "dropped: coverage under 0.95" in page.inner_text("#exported figcaption")
    assert page.locator("#export-table .summary tbody tr").count() == 2
    page.click("#export-table summary:has-text('1 image is dropped')")
    page.click("#export-table summary:has-text('1 prompt is skipped')")
    assert "coverage under 0.95" in page.inner_text("#export-table .reasons >> nth=0")
    assert "<b>nothing</b> known here" in page.inner_text("#export-table .reasons >> nth=1")
    for width, scheme in ((390, "light"), (820, "dark"), (1280, "dark"), (1920, "light")):
        page.emulate_media(color_scheme=scheme)
        page.set_viewport_size({"width": width, "height": 900})
        page.wait_for_timeout(200)
        shoot(page, f"export-{width}-{scheme}", full=True)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        parts = "#export, #export-state, #export-note, #export-kept li, #exported figure, #export-table figure, .wide"
        right = page.eval_on_selector_all(parts, "all => all.map(one => one.getBoundingClientRect().right)")
        assert max(right) <= width
