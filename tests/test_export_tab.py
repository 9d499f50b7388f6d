"""The third tab: bounds on the server, the disk it uses, and an export stopped and gone on with in a browser."""

from __future__ import annotations

import json
import time
import zipfile
from types import SimpleNamespace

import gradio as gr
import numpy as np
import pytest
from page import set_number, shoot
from PIL import Image

import tabs.export as tab
from ovam_core.data.prompts import Prompt
from ovam_core.errors import InputError
from tabs.export import OWN, TEMPLATE, bar, prompts_of, within
from tabs.session import Limits
from tabs.worker import in_thread


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
    assert len(prompts_of(TEMPLATE, "a {}", [], "", None)[0]) == 20
    prompts, classes = prompts_of(OWN, "", [], "a cat\n\na dog", None)
    assert [one.text for one in prompts] == ["a cat", "a dog"]
    assert classes is None
    table = tmp_path / "prompts.csv"
    table.write_text("prompt,classes\na kitten,cat\n")
    assert prompts_of(OWN, "", [], "", str(table))[0][0].classes == ("cat",)


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


def test_the_bar_says_how_far_how_fast_how_long():
    assert "<b>5</b> of 20 · 60 a minute · 15 s left" in bar(5, 20, 2, 2.0)
    assert "a minute" not in bar(20, 20, 5, 5.0)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("each", "NaN", "Images a prompt is NaN; give a number"),
        ("each", 1.5, "Images a prompt is 1.5; give a whole number"),
        ("each", None, "number of images a prompt is None"),
        ("each", 10**9, "images are too many"),
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
def test_what_a_client_may_send(blocks, field, value, said):
    begin = next(
        event.fn for event in blocks.fns.values() if getattr(event.fn, "__qualname__", "") == "ExportTab.begin"
    )
    page = begin.__self__
    values = {component: component.value for component in page.given}
    values[getattr(page, field)] = value
    if field == "file":
        values[page.way] = OWN
    with pytest.raises(gr.Error, match=said):
        begin(values, SimpleNamespace(session_hash="client"))


def test_what_the_page_sends_begins(blocks):
    begin = next(
        event.fn for event in blocks.fns.values() if getattr(event.fn, "__qualname__", "") == "ExportTab.begin"
    )
    values = {component: component.value for component in begin.__self__.given}
    assert "of 4" in begin(values, SimpleNamespace(session_hash="client"))[-1]


# ---------------------------------------------------------------------------------------------- the browser


def open_tab(page) -> None:
    page.get_by_role("tab", name="Batch mask export").click()
    page.wait_for_selector("#export")


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


def test_an_export_stopped_and_gone_on_with(visit, waiting, tmp_path):
    page = visit()
    open_tab(page)
    assert page.is_disabled("#export-stop")
    assert page.is_disabled("#export-download")
    shoot(page, "export-empty", full=True)
    page.click("#export-more > button")
    set_number(page, "#export-steps", 12)
    set_number(page, "#low", 0)
    set_number(page, "#each", 4)
    page.click("#export")
    page.wait_for_selector("#exported img")
    page.click("#export-stop")
    page.wait_for_selector("#export-facts:has-text('Stopped')")
    page.wait_for_selector("#export:not([disabled])")
    before = int(page.inner_text("#export-state b"))
    assert 1 <= before < 8
    page.click("#export")
    page.wait_for_selector("#export-facts:has-text('8 of 8')", timeout=300_000)
    assert f"{8 - before} made in this run" in page.inner_text("#export-facts")
    page.wait_for_selector("#export-download:not([disabled])")
    page.wait_for_timeout(500)
    shoot(page, "export", full=True)
    with page.expect_download() as download:
        page.click("#export-download")
    download.value.save_as(tmp_path / "data.zip")
    with zipfile.ZipFile(tmp_path / "data.zip") as archive:
        assert archive.testzip() is None
        assert not [name for name in archive.namelist() if name.startswith(".")]
        archive.extractall(tmp_path / "data")
    rows = [json.loads(line) for line in (tmp_path / "data" / "metadata.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["A photograph of a cat"] * 4 + ["A photograph of a dog"] * 4
    for row in rows:
        assert Image.open(tmp_path / "data" / row["file_name"]).size == (128, 128)
        labels = Image.open(tmp_path / "data" / row["mask_file_name"])
        assert labels.mode == "P"
        assert set(np.unique(np.asarray(labels))) <= {0, *row["class_ids"]}


def test_own_prompts_and_a_mistake(visit):
    page = visit()
    open_tab(page)
    page.click("#export-way label:has-text('My own')")
    page.wait_for_selector("#export-prompts textarea")
    page.click("#export")
    page.wait_for_selector(".toast-body:has-text('no prompts')")
    assert page.is_enabled("#export")
    page.click("#export-more > button")
    set_number(page, "#export-steps", 4)
    page.fill("#export-prompts textarea", "A cat and a dog on grass\n<b>nothing</b> known here")
    set_number(page, "#each", 1)
    page.click("#export")
    page.wait_for_selector("#export-facts:has-text('1 of 1')")
    assert "1 prompts were skipped" in page.inner_text("#export-facts")
    assert page.locator("#export-table tbody tr").count() == 2


@pytest.mark.parametrize(("name", "width"), [("narrow", 390), ("wide", 1280)])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits(visit, name, width, scheme):
    page = visit(width, 844, scheme)
    open_tab(page)
    shoot(page, f"export-{name}-{scheme}", full=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
