"""The first tab in a headless Chromium, as a visitor uses it: one picture, any words, never stale, a link.

Screenshots are kept in tests/artifacts (not in git): open them after a change to the page.
"""

from __future__ import annotations

import json
import time
import zipfile
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from page import (
    chips,
    generate_now,
    set_number,
    set_steps,
    set_words,
    shoot,
    shown,
    until,
    upload,
    wait_for_chips,
    wait_for_picture,
)
from PIL import Image

import app
from ovam_core import OVAM
from ovam_core.attention import mask
from ovam_core.attention.heatmap import claims
from ovam_core.models.load import learned_words
from ovam_core.settings import GenerateSettings, SegmentSettings
from tabs.events import OUR_FAULT
from tabs.examples import EXAMPLES
from tabs.fields import NO_CRF
from tabs.session import NO_IMAGE, Session

STEPS = 4
PROMPT = "A photograph of a cat and a car on grass"
WIDTHS = [("narrow", 390, 844), ("middle", 820, 1180), ("wide", 1280, 900), ("large", 1920, 1080)]


@pytest.fixture
def slow(ovam):
    """A tenth of a second more a step: 200 steps of the embedded model may be over before a slow page shows them."""
    hook = ovam.pipe.unet.register_forward_pre_hook(lambda *_: time.sleep(0.1))
    yield
    hook.remove()


@pytest.fixture
def first(sessions, ovam):
    """The page opens with a picture."""
    example = EXAMPLES[0]
    settings = GenerateSettings.for_model(ovam.pipe, example.prompt, seed=example.seed, steps=STEPS)
    sessions.first = ovam.draw(settings)
    yield sessions.first
    sessions.first = None


def calls(page) -> list[str]:
    """Requests for the server's work from now on."""
    heard: list[str] = []
    page.on("request", lambda request: heard.append(request.url) if "queue/join" in request.url else None)
    return heard


def stale(page) -> str:
    return page.inner_text("#viewer [data-part=stale]").strip()


def caption(page) -> str:
    return page.inner_text("#viewer [data-part=caption]")


def pixels(page, label: str) -> np.ndarray:
    """The mask of a word as the browser has it."""
    found = page.evaluate(
        "label => { const m = window.ovamView.mask(label); return [m.width, m.height, [...m.data]]; }", label
    )
    return np.array(found[2], dtype=bool).reshape(found[1], found[0])


# -------------------------------------------------------------------------------------------- first sight


def test_it_opens_with_a_finished_picture_and_any_word_at_once(visit, first):
    page = visit()
    wait_for_chips(page, ["bird", "ship"])
    assert EXAMPLES[0].prompt in caption(page)
    assert "<b>markup</b>" in page.inner_text("#head .notice")
    assert page.is_disabled("#stop")
    shoot(page, "wide-first", full=True)
    assert urlsplit(page.url).query == ""  # the address is that of the page until something is asked
    set_words(page, "sea, the red boat")
    wait_for_chips(page, ["sea", "the red boat"])
    set_words(page, "sea, the red")
    until(page, lambda: stale(page))
    set_words(page, "sea, the red boat")  # as it was: the same answer once more
    wait_for_chips(page, ["sea", "the red boat"])
    assert EXAMPLES[0].prompt in caption(page)
    assert parse_qs(urlsplit(page.url).query) == {}
    page.click("#viewer [data-layer=picture]")
    shoot(page, "wide-first-words")
    set_steps(page, STEPS)
    page.fill("#prompt textarea", PROMPT)
    page.click("#generate")
    assert PROMPT in stale(page)  # at once, before the server has answered
    wait_for_picture(page, PROMPT)
    assert parse_qs(urlsplit(page.url).query)["prompt"] == [PROMPT]
    page.go_back()
    wait_for_picture(page, EXAMPLES[0].prompt)
    wait_for_chips(page, ["sea", "the red boat"])
    assert page.input_value("#words textarea") == "sea, the red boat"
    assert urlsplit(page.url).query == ""
    page.go_forward()
    wait_for_picture(page, PROMPT)
    assert parse_qs(urlsplit(page.url).query)["prompt"] == [PROMPT]


def test_a_word_of_the_prompt_is_a_click_away_and_so_are_the_models_words(visit, first, ovam):
    page = visit()
    wait_for_chips(page, ["bird", "ship"])
    page.wait_for_selector("#viewer .v-offer:has-text('boat')")
    page.click("#viewer .v-offer:has-text('boat')")
    wait_for_chips(page, ["bird", "ship", "boat"])
    assert page.input_value("#words textarea") == "bird, ship, boat"
    page.click("#viewer [aria-label='Remove ship']")
    wait_for_chips(page, ["bird", "boat"])
    assert f"knows {len(learned_words(ovam.pipe))} words" in page.inner_text("#vocabulary summary")
    page.click("#vocabulary summary")
    assert page.locator("#vocabulary button").all_inner_texts() == learned_words(ovam.pipe)
    for _ in range(2):  # a second click changes nothing
        page.click("#vocabulary button:text-is('sheep')")
        wait_for_chips(page, ["bird", "boat", "sheep"])
        assert page.input_value("#words textarea") == "bird, boat, sheep"


def test_who_claims_a_pixel(visit, first, ovam):
    """The browser ranks as the maps of the package do, with the words that nobody asked for among them."""
    page = visit()
    wait_for_chips(page, ["bird", "ship"])
    page.wait_for_selector("#viewer .v-offer")
    words = ["bird", "ship", "boat", "sea"]
    maps = ovam.segment(first, words, crf=False).heatmaps
    for x, y in ((40, 50), (64, 100), (90, 30), (127, 127), (0, 0)):
        ranked = page.evaluate("([x, y]) => window.ovamView.rank(x, y)", [x, y])
        found = [(one["label"], one["value"]) for one in ranked if one["label"] in words]
        expected = [(words[row], value) for row, value in claims(maps, x, y)]
        np.testing.assert_allclose([value for _, value in found], [value for _, value in expected], atol=0.004)
        gaps = np.diff([value for _, value in expected])
        if (gaps < -0.008).all():  # else a byte of a map may turn the order
            assert [label for label, _ in found] == [label for label, _ in expected]
        assert len(ranked) > 15  # the classes of VOC among them
    box = page.locator("#viewer canvas[data-part=canvas]").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + box["height"] * 0.3)
    page.wait_for_selector("#viewer [data-part=card]:not([hidden])")
    shoot(page, "wide-point")


# ------------------------------------------------------------------------------------------------- a visit


def test_a_visit(visit, tmp_path):
    """Generate; then other words, another threshold, other steps: maps and masks change, the picture never does."""
    page = visit()
    shoot(page, "wide-empty", full=True)
    assert page.is_disabled("#pack")
    set_steps(page, STEPS)
    generate_now(page)
    assert chips(page) == ["bird", "ship"]
    assert f"{STEPS} steps" in caption(page)
    assert f"seed {EXAMPLES[0].seed}" in caption(page)
    assert "from the recording in" in page.inner_text("#map-facts")
    picture, before = shown(page), pixels(page, "bird")
    shoot(page, "wide", full=True)

    set_words(page, "grass, red car")  # no Enter needed
    wait_for_chips(page, ["grass", "red car"])
    page.wait_for_selector("#note .hint:has-text('never learned: red.')")
    set_words(page, "bird, zeppelin on a lawn")
    page.wait_for_selector("#note .hint:has-text('never learned: zeppelin, lawn')")
    wait_for_chips(page, ["bird", "zeppelin on a lawn"])
    assert np.array_equal(pixels(page, "bird"), before)

    def of_boat():
        """Which nobody asked for."""
        ranked = page.evaluate("window.ovamView.rank(90, 90)")
        return next((one["value"] for one in ranked if one["label"] == "boat"), None)

    until(page, of_boat)
    of_all_steps = of_boat()
    page.click("#which > button")
    page.fill("#used textarea, #used input", "0")
    page.press("#used textarea, #used input", "Enter")
    until(page, lambda: not np.array_equal(pixels(page, "bird"), before))
    until(page, lambda: of_boat() not in (None, of_all_steps))  # compared with words of the same steps
    once = pixels(page, "bird")
    page.locator("#grids input").nth(2).click()  # 1/16 beside 1/8
    until(page, lambda: not np.array_equal(pixels(page, "bird"), once))
    shoot(page, "wide-which", full=True)
    assert shown(page) == picture

    assert "128 × 128 px" in page.inner_text("#pack")
    with page.expect_download() as download:
        page.click("#pack")
    assert download.value.suggested_filename == f"ovam-seed-{EXAMPLES[0].seed}.zip"
    download.value.save_as(tmp_path / "all.zip")
    with zipfile.ZipFile(tmp_path / "all.zip") as archive:
        names = set(archive.namelist())
        about = json.loads(archive.read("settings.json"))
    assert {"image.png", "heatmaps.npz", "overlay_bird.png", "mask_zeppelin-on-a-lawn.png"} <= names
    assert about["maps"]["steps"] == [0]
    assert shown(page) == picture


def test_sliders_ask_nothing_of_the_server(visit, ovam):
    page = visit()
    set_steps(page, STEPS)
    generate_now(page)
    page.uncheck("#crf input")
    page.wait_for_timeout(1500)
    picture, heard = shown(page), calls(page)
    known = ovam.draw(GenerateSettings.for_model(ovam.pipe, EXAMPLES[0].prompt, seed=EXAMPLES[0].seed, steps=STEPS))
    for tau, alpha in ((0.3, 0.85), (0.6, 0.85), (0.6, 0.2), (0.9, 1.0)):
        for name, value in (("tau", tau), ("alpha", alpha)):
            page.fill(f"#{name} input[type=number]", str(value))
            page.press(f"#{name} input[type=number]", "Tab")
        expected = ovam.segment(known, ["bird"], tau=tau, alpha=alpha, crf=False).masks[0]
        found = pixels(page, "bird")
        assert (found & expected).sum() / (found | expected).sum() > 0.97
    page.locator("#tau input[type=range]").focus()
    before = pixels(page, "bird").sum()
    for _ in range(30):
        page.keyboard.press("ArrowLeft")
    assert pixels(page, "bird").sum() > before
    page.wait_for_timeout(1200)
    assert heard == []
    assert shown(page) == picture
    assert parse_qs(urlsplit(page.url).query)["tau"] == ["0.6"]
    page.check("#crf input")  # this is the server's work
    until(page, lambda: heard)


def test_methods_side_by_side(visit):
    page = visit()
    set_steps(page, STEPS)
    page.fill("#prompt textarea", PROMPT)
    set_words(page, "cat, car")
    generate_now(page)
    picture = shown(page)
    page.click("#methods > button")
    page.click("#method label:has-text('DAAM')")
    page.wait_for_selector("#map-facts:has-text('by DAAM')")
    page.wait_for_selector("#methods > button:has-text('Method: DAAM')")
    page.wait_for_selector("#alpha input[type=number][disabled]")
    assert page.is_disabled("#crf input")
    assert page.is_enabled("#tau input[type=number]")
    page.click("#beside label:has-text('OVAM') >> nth=0")
    page.locator("#beside label").filter(has_text="GoCA, any word").click()
    page.wait_for_selector("#viewer .v-column >> nth=2")
    columns, methods = (page.locator(one).bounding_box() for one in ("#viewer .v-columns", "#methods"))
    assert columns["y"] + columns["height"] <= methods["y"]
    names = page.locator("#viewer .v-column b").all_inner_texts()
    assert names[0] == "DAAM"
    assert set(names[1:]) == {"OVAM", "GoCA, any word"}
    shoot(page, "methods", full=True)
    assert shown(page) == picture
    page.locator("#beside label").filter(has_text="GoCA, any word").click()
    page.locator("#method label").filter(has_text="GoCA: ").click()
    page.wait_for_selector("#map-facts:has-text('by GoCA')")
    set_words(page, "dog")
    page.wait_for_selector("#note:has-text('does not stand in the sentence')")  # beside the words that do not fit
    assert "does not stand" in stale(page)
    page.locator("#method label").filter(has_text="OVAM: ").click()
    wait_for_chips(page, ["dog"])
    assert stale(page) == ""
    assert not page.is_visible("#note")
    set_words(page, "dog, cat")
    wait_for_chips(page, ["dog", "cat"])
    page.locator("#method label").filter(has_text="GoCA: ").click()
    page.wait_for_selector("#how-note:has-text('does not stand in the sentence')")  # beside the method that was chosen
    assert not page.is_visible("#note")
    assert shown(page) == picture


def test_when_it_appeared(visit, first):
    page = visit()
    wait_for_chips(page, ["bird", "ship"])
    for over, count in (("steps", STEPS), ("grids", 2), ("layers", 3), ("heads", 2)):
        page.click(f"#viewer [data-over={over}]")
        until(page, lambda n=count: page.locator("#viewer [data-part=frames] button").count() >= n)
        page.wait_for_selector(f"#viewer [data-over={over}][aria-pressed=true]")
    page.click("#viewer [data-over=steps]")
    page.wait_for_selector("#viewer [data-over=steps][aria-pressed=true]")
    until(page, lambda: page.locator("#viewer [data-part=frames] button:has-text('step')").count() == STEPS)
    page.click("#viewer .v-strip .v-x")
    page.click("#viewer [data-over=steps]")  # for which the server sends what it sent before
    page.wait_for_selector("#viewer [data-over=steps][aria-pressed=true]")
    page.click("#viewer [data-part=frames] button >> nth=1")
    page.wait_for_function("document.querySelector('#viewer [data-part=moment]')?.textContent.includes('step 1')")
    assert page.inner_text("#viewer [data-part=moment]")
    shoot(page, "wide-strip", full=True)


# -------------------------------------------------------------------------------------------- never stale


def test_a_second_start_takes_the_place_of_the_first(visit, slow):
    page = visit()
    set_steps(page, 40)
    page.click("#examples button >> nth=1")
    page.wait_for_selector("#viewer [data-part=stale]:has-text('step')")
    shoot(page, "wide-running")
    assert EXAMPLES[1].prompt in stale(page)
    page.click("#examples button >> nth=2")
    # Its own steps: those of the first may still be told, and until then the fields are not the new ones'.
    until(page, lambda: EXAMPLES[2].prompt in (said := stale(page)) and "step" in said)
    set_words(page, "dog, road")  # what is asked meanwhile is asked of the picture to be
    page.click("#methods > button")
    page.click("#method label:has-text('DAAM')")
    wait_for_picture(page, EXAMPLES[2].prompt)
    wait_for_chips(page, ["dog", "road"])
    page.wait_for_selector("#map-facts:has-text('by DAAM')")
    page.wait_for_timeout(1500)  # the first one would come late
    assert EXAMPLES[2].prompt in caption(page)
    assert chips(page) == ["dog", "road"]
    assert page.input_value("#prompt textarea") == EXAMPLES[2].prompt
    page.wait_for_selector("#stop[disabled]")


def test_stop_says_so_above_the_picture(visit, slow):
    page = visit()
    set_steps(page, STEPS)
    generate_now(page)
    picture = shown(page)
    set_steps(page, 200)
    page.click("#generate")
    page.wait_for_selector("#viewer [data-part=stale]:has-text('of 200')")
    page.click("#stop")
    assert "Stopping" in stale(page)
    page.wait_for_selector("#said:has-text('Stopped after')")
    assert page.locator("#said").bounding_box()["y"] < 900
    page.wait_for_selector("#stop[disabled]")
    assert stale(page) == ""
    assert shown(page) == picture
    assert f"{STEPS} steps" in caption(page)


def test_a_mistake_is_said_beside_the_words_and_dims_what_does_not_belong(visit):
    page = visit()
    set_steps(page, STEPS)
    generate_now(page)
    picture = shown(page)
    set_words(page, "?!")
    page.wait_for_selector("#note:has-text('not a word')")
    assert "not a word" in stale(page)
    assert (
        float(page.evaluate("getComputedStyle(document.querySelector('#viewer .stale [data-part=canvas]')).opacity"))
        < 0.7
    )
    shoot(page, "wide-mistake")
    page.click("#generate")  # refused before anything is queued
    page.wait_for_timeout(800)
    assert "not a word" in page.inner_text("#note")
    assert page.is_disabled("#stop")
    assert shown(page) == picture
    set_words(page, "cat")
    wait_for_chips(page, ["cat"])
    assert stale(page) == ""
    assert not page.is_visible("#note")
    page.fill("#prompt textarea", "A photograph of a train")
    until(page, lambda: "prompt has changed" in stale(page))
    page.fill("#prompt textarea", EXAMPLES[0].prompt)
    until(page, lambda: stale(page) == "")


def test_enter_makes_the_picture_and_adds_no_line(visit):
    page = visit()
    set_steps(page, STEPS)
    page.fill("#prompt textarea", PROMPT)
    page.press("#prompt textarea", "Enter")
    wait_for_picture(page, PROMPT)
    assert page.input_value("#prompt textarea") == PROMPT


def test_a_session_that_has_run_out_says_so(visit, monkeypatch):
    page = visit()
    set_steps(page, STEPS)
    generate_now(page)
    monkeypatch.setattr(Session, "find", lambda self, key: None)
    set_words(page, "dog")
    page.wait_for_selector(f"#note:has-text('{NO_IMAGE[:20]}')")
    assert NO_IMAGE in stale(page)


def test_the_page_goes_on_after_a_bug(visit, monkeypatch):
    page = visit()
    set_steps(page, STEPS)
    with monkeypatch.context() as patch:
        patch.setattr(OVAM, "draw", lambda *_, **__: [][1])
        page.click("#generate")
        page.wait_for_selector(f".toast-body:has-text('{OUR_FAULT}')")
        page.wait_for_selector("#stop[disabled]")
        assert "index" not in page.inner_text(".toast-body")
        until(page, lambda: stale(page) == "")
    generate_now(page)


# ------------------------------------------------------------------------------- the address, the pictures before


def test_a_link_brings_the_same_page_to_a_friend(visit, browser, address):
    page = visit()
    set_steps(page, STEPS)
    page.click("#advanced > button")
    set_number(page, "#seed", 11)
    page.fill("#prompt textarea", PROMPT)
    set_words(page, "cat, the car & more")
    page.click("#generate")
    wait_for_picture(page, PROMPT)
    page.fill("#tau input[type=number]", "0.55")
    page.press("#tau input[type=number]", "Tab")
    until(page, lambda: "tau=0.55" in page.url)
    wait_for_chips(page, ["cat", "the car & more"])
    page.wait_for_timeout(800)
    asked = {name: values[0] for name, values in parse_qs(urlsplit(page.url).query).items()}
    expected = {"prompt": PROMPT, "words": "cat, the car & more", "seed": "11", "steps": str(STEPS), "tau": "0.55"}
    assert asked == expected
    picture, found = shown(page), pixels(page, "cat")

    friend = browser.new_context().new_page()
    friend.set_default_timeout(120_000)
    friend.goto(page.url)
    wait_for_picture(friend, PROMPT)
    wait_for_chips(friend, ["cat", "the car & more"])
    assert shown(friend) == picture
    until(friend, lambda: np.array_equal(pixels(friend, "cat"), found))
    assert friend.input_value("#prompt textarea") == PROMPT
    friend.context.close()

    page.reload()
    wait_for_picture(page, PROMPT)
    assert shown(page) == picture
    page.click("#examples button >> nth=1")
    wait_for_picture(page, EXAMPLES[1].prompt)
    page.go_back()
    wait_for_picture(page, PROMPT)
    until(page, lambda: shown(page) == picture)
    wait_for_chips(page, ["cat", "the car & more"])
    page.go_forward()
    wait_for_picture(page, EXAMPLES[1].prompt)
    wait_for_chips(page, EXAMPLES[1].words.split(", "))
    page.get_by_role("tab", name="Batch mask export").click()
    until(page, lambda: "tab=export" in page.url)
    page.reload()
    page.wait_for_selector("[role=tab][aria-selected=true]:has-text('Batch mask export')")


def test_an_address_that_cannot_be_read_leaves_the_page_as_it_is(visit, address):
    page = visit()
    page.goto(f"{address}?prompt=a+cat&seed=many&steps=4")
    page.wait_for_selector(".toast-body:has-text(\"seed is 'many'\")")
    page.set_viewport_size({"width": 390, "height": 844})  # where it covers the foot, not the head and tabs
    page.wait_for_timeout(300)
    assert page.locator(".toast-wrap").bounding_box()["y"] > 422
    page.set_viewport_size({"width": 1280, "height": 900})
    until(page, lambda: stale(page) == "")
    page.goto(f"{address}?prompt=a+cat&seed=1&steps=4000&words=cat")
    page.wait_for_selector("#note:has-text('steps is 4000')")


def test_the_pictures_before_come_back_with_their_words(visit):
    page = visit()
    set_steps(page, STEPS)
    generate_now(page)
    picture = shown(page)
    set_words(page, "sea")
    wait_for_chips(page, ["sea"])
    page.fill("#prompt textarea", PROMPT)
    page.click("#generate")
    wait_for_picture(page, PROMPT)
    set_words(page, "cat")
    wait_for_chips(page, ["cat"])
    until(page, lambda: page.locator("#history button").count() == 2)
    shoot(page, "wide-history", full=True)
    heard = calls(page)
    page.click("#history button >> nth=1")
    wait_for_picture(page, EXAMPLES[0].prompt)
    wait_for_chips(page, ["sea"])
    assert shown(page) == picture
    assert page.input_value("#words textarea") == "sea"
    assert page.input_value("#prompt textarea") == EXAMPLES[0].prompt
    assert len(heard) <= 4  # brought back, not made again
    assert page.get_attribute("#history button >> nth=0", "aria-label") == f"Back to “{PROMPT}”: cat"
    page.reload()  # whose recordings are gone for this page: it is made again
    page.wait_for_selector("#history button >> nth=1")
    page.click("#history button[aria-label*='cat and a car']")
    wait_for_picture(page, PROMPT)
    wait_for_chips(page, ["cat"])


def test_the_examples_and_the_dice(visit):
    page = visit()
    page.click("#advanced > button")
    seed = page.input_value("#seed input")
    page.click("#dice")
    page.wait_for_function("old => document.querySelector('#seed input').value !== old", arg=seed)
    for number in (1, 0):
        page.click(f"#examples button >> nth={number}")
        wait_for_picture(page, EXAMPLES[number].prompt)
        wait_for_chips(page, EXAMPLES[number].words.split(", "))
        assert page.input_value("#seed input") == str(EXAMPLES[number].seed)


# ------------------------------------------------------------------------------------------------ its looks


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits(visit, first, scheme):
    page = visit(scheme=scheme)
    wait_for_chips(page, ["bird", "ship"])
    page.wait_for_selector("#viewer .v-offer")
    for name, width, height in WIDTHS:
        page.set_viewport_size({"width": width, "height": height})
        page.wait_for_timeout(300)
        shoot(page, f"{name}-{scheme}", full=True)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        give, get = (page.locator(f"{one} >> visible=true").bounding_box() for one in (".give", ".get"))
        assert (get["y"] >= give["y"] + give["height"]) if width < 1024 else (get["x"] >= give["x"] + give["width"])
        picture = page.locator("#viewer canvas[data-part=canvas]").bounding_box()
        assert picture["width"] >= min(340, width - 60)
        assert abs(picture["width"] - picture["height"]) < 2
        assert picture["y"] < 0.85 * height  # on a phone it is not below examples and folds
        tau = page.locator("#tau").bounding_box()
        notice = page.locator("#head .notice").bounding_box()["height"] + 12  # which few pages have
        assert width < 1024 or tau["y"] + tau["height"] - notice <= height  # moved while the picture is looked at
        assert tau["y"] < page.locator("#viewer [data-part=caption]").bounding_box()["y"]
        folds = page.evaluate("[...document.querySelectorAll('.three > *')].map(one => one.className.split(' ')[1])")
        assert folds == ["give", "get", "more"]  # in the order in which keys go through them
        assert picture["x"] >= 0
        assert picture["x"] + picture["width"] <= width


def test_a_page_without_simplecrf(browser, ovam, monkeypatch):
    monkeypatch.setattr(mask, "crf_available", lambda: False)
    without = app.build(ovam)
    monkeypatch.setattr("gradio.networking.url_ok", lambda url: True)
    _, url, _ = app.launch(without, server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    page = browser.new_page()
    page.goto(url)
    page.wait_for_selector("#crf input[disabled]")
    assert not page.is_checked("#crf input")
    assert NO_CRF in page.inner_text("#crf")
    set_steps(page, STEPS)
    generate_now(page)
    page.close()
    without.close()


# ----------------------------------------------------------------------------- other beginnings, other halves


def test_it_starts_from_a_picture(visit, tmp_path):
    file = tmp_path / "start.png"
    Image.new("RGB", (200, 128), "#3060c0").save(file)
    page = visit()
    set_steps(page, STEPS)
    page.fill("#prompt textarea", PROMPT)
    set_words(page, "cat, car")
    generate_now(page)
    from_noise = shown(page)
    page.click("#start-fold > button")
    upload(page, "#start-file", str(file), "#start-file img")
    page.fill("#strength input[type=number]", "0.5")
    page.press("#strength input[type=number]", "Tab")
    generate_now(page)
    assert shown(page) != from_noise
    assert parse_qs(urlsplit(page.url).query) == {}  # no address holds a visitor's own picture
    shoot(page, "wide-start", full=True)
    with page.expect_download() as download:
        page.click("#pack")
    download.value.save_as(tmp_path / "all.zip")
    with zipfile.ZipFile(tmp_path / "all.zip") as archive:
        about = json.loads(archive.read("settings.json"))["generation"]
        assert (about["start"], about["strength"]) == ("start.png", 0.5)
        assert Image.open(archive.open("start.png")).size == (128, 128)
    page.click("#examples button >> nth=1")  # which begins from noise
    wait_for_picture(page, EXAMPLES[1].prompt)
    assert page.locator("#start-file img").count() == 0


def test_the_negative_prompts_own_maps(visit, ovam, slow):
    page = visit()
    set_steps(page, STEPS)
    page.click("#advanced > button")
    page.fill("#negative textarea, #negative input", "a photograph of a car")
    page.fill("#prompt textarea", PROMPT)
    set_words(page, "cat")
    page.click("#generate")
    wait_for_picture(page, PROMPT)
    before = pixels(page, "cat")
    page.click("#which > button")
    page.click("#half label:has-text('negative')")
    page.wait_for_selector("#how-note:has-text('make it again with')")
    assert "make it again" in stale(page)
    page.click("#half label >> nth=0")
    until(page, lambda: stale(page) == "")
    page.check("#both input")
    picture = shown(page)
    page.click("#generate")
    page.wait_for_selector("#viewer [data-part=stale]:has-text('step')")
    wait_for_picture(page, PROMPT)
    page.click("#half label:has-text('negative')")
    until(page, lambda: not np.array_equal(pixels(page, "cat"), before))
    assert shown(page) == picture
    settings = GenerateSettings.for_model(
        ovam.pipe, PROMPT, negative_prompt="a photograph of a car", seed=EXAMPLES[0].seed, steps=STEPS
    )
    known = ovam.draw(settings, branch="all")
    expected = ovam.answer(known, SegmentSettings(words=("cat",), branch="unconditional")).masks[0]
    until(page, lambda: np.array_equal(pixels(page, "cat"), expected))


def test_when_it_appeared_as_a_film(visit, first, tmp_path):
    page = visit()
    wait_for_chips(page, ["bird", "ship"])
    page.click("#viewer [data-over=steps]")
    until(page, lambda: page.locator("#viewer [data-part=frames] button").count() == STEPS)
    with page.expect_download() as download:
        page.click("#viewer .v-film")
    assert download.value.suggested_filename == f"ovam-seed-{EXAMPLES[0].seed}-bird-steps.webp"
    download.value.save_as(tmp_path / "film.webp")
    assert Image.open(tmp_path / "film.webp").n_frames == STEPS
