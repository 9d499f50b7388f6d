"""The frame of the page in a browser: its width, its focus, its keys, its bytes."""

from __future__ import annotations

import gzip
import http.client
from urllib.parse import urlsplit

import pytest
from page import until

from tabs.frame import CSS
from tabs.starting import ASSETS, starting_page

WIDTHS = [390, 820, 1000, 1280, 1920]
TABS = 3
OWN_BYTES = 200_000  # of all our scripts and styles as they lie here
PAGE_BYTES = 120_000  # of the page itself on the wire: what Gradio says of every component, our scripts and styles
ALL_BYTES = 500_000  # of a first visit, Gradio's own scripts and styles included, its first picture not

# What sticks out of the window, and is not within something that scrolls or cuts it off by intention.
OUTSIDE = """() => [...document.querySelectorAll(".gradio-container *")].filter((one) => {
  const box = one.getBoundingClientRect(), window_ = document.documentElement.clientWidth;
  if (!box.width || !box.height || (box.right <= window_ + 1 && box.left >= -1)) return false;
  for (let above = one.parentElement; above; above = above.parentElement)
    if (getComputedStyle(above).overflowX !== "visible") return false;
  return getComputedStyle(one).visibility !== "hidden" && !one.matches(".skip");
}).map((one) => `${one.tagName} ${one.id} ${one.className}`)"""
FRAME = """() => ["main", ".head", '[role="tablist"]'].map((name) => document.querySelector(name))
  .map((one) => one.closest(".tab-wrapper") ?? one).map((one) => one.getBoundingClientRect())
  .map(({left, width}) => [Math.round(left * 10), Math.round(width * 10)].join())"""
COLUMNS = """() => [...document.querySelectorAll(".columns")].filter((one) => one.offsetParent)
  .map((one) => [...one.children].map((child) => Math.round(child.getBoundingClientRect().left)))"""
FOCUS = """() => {
  const one = document.activeElement, style = getComputedStyle(one), box = one.getBoundingClientRect();
  return {name: `${one.tagName} ${one.id} ${one.textContent.trim().slice(0, 30)}`, body: one === document.body,
    ring: style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2, seen: box.width > 1 && box.height > 1};
}"""


def go_to(page, tab: int) -> None:
    page.evaluate("number => document.querySelectorAll('[role=tab]')[number].click()", tab)
    page.wait_for_timeout(400)


@pytest.fixture
def window(visit):
    return visit()


def test_the_width_is_the_same_on_every_tab_and_nothing_sticks_out(window):
    for width in WIDTHS:
        window.set_viewport_size({"width": width, "height": 900})
        window.wait_for_timeout(300)
        assert window.locator("[role=tab]").count() == TABS  # none of them in a menu
        frames = []
        for tab in range(TABS):
            go_to(window, tab)
            frames.append(window.evaluate(FRAME))
            assert window.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
            assert window.evaluate(OUTSIDE) == []
            for columns in window.evaluate(COLUMNS):
                assert (len(set(columns)) == 1) is (width < 1024)
        assert frames[0] == frames[1] == frames[2]
        inner = window.evaluate("document.documentElement.clientWidth")
        assert frames[0][0].split(",")[1] == str(10 * min(inner, 1320))


def test_the_width_stays_during_a_run(window):
    before = window.evaluate(FRAME)
    window.click("#generate")
    for _ in range(8):
        window.wait_for_timeout(150)
        assert window.evaluate(FRAME) == before
    window.click("#stop")
    until(window, lambda: window.is_enabled("#generate"))
    assert window.evaluate(FRAME) == before


@pytest.mark.parametrize(("scheme", "tabs"), [("light", range(TABS)), ("dark", range(1))])
def test_every_control_is_reached_and_shows_it(visit, scheme, tabs):
    page = visit(scheme=scheme)
    for tab in tabs:
        go_to(page, tab)
        page.evaluate("document.activeElement.blur()")
        page.evaluate("window.getSelection().removeAllRanges(); document.querySelector('h1').tabIndex = -1")
        page.focus("h1")
        seen = []
        for _ in range(90):
            page.keyboard.press("Tab")
            page.wait_for_timeout(20)  # Gradio lets outlines grow
            now = page.evaluate(FOCUS)
            if now["body"]:
                break
            seen.append(now)
        assert now["body"], "Tab goes round in circles"
        assert len(seen) > 8
        assert [one["name"] for one in seen if one["seen"] and not one["ring"]] == []
        assert [one["name"] for one in seen if not one["seen"] and one["name"].startswith("DIV")] == []


def test_tabs_by_arrows_and_past_the_controls(window):
    window.focus("[role=tab] >> nth=0")

    def now():
        return window.evaluate(
            "[document.activeElement, document.querySelector('[role=tab][aria-selected=true]')].map(e => e.textContent)"
        )

    for key, name in (
        ("ArrowRight", "Optimize a token"),
        ("ArrowRight", "Batch mask export"),
        ("ArrowRight", "Generate"),
        ("ArrowLeft", "Batch mask export"),
        ("Home", "Generate"),
        ("End", "Batch mask export"),
    ):
        window.keyboard.press(key)
        window.wait_for_timeout(200)
        assert now() == [name, name]
    window.keyboard.press("Home")
    window.focus(".skip")
    assert window.evaluate("document.querySelector('.skip').getBoundingClientRect().top") >= 0
    address = window.url
    window.keyboard.press("Enter")
    assert window.evaluate("document.activeElement.matches('.get') && !!document.activeElement.offsetParent")
    assert window.url == address


def test_the_head_does_not_move_when_the_page_comes(window, browser):
    from tabs.starting import Starting

    for width in (390, 1280):
        window.set_viewport_size({"width": width, "height": 900})
        with Starting("127.0.0.1", 0, ("Loading libraries", "Opening emoji-voc", "Making the first picture")) as begun:
            before = browser.new_page(viewport={"width": width, "height": 900})
            before.goto(begun.address)
            places = [
                page.evaluate(
                    "(({left, top, height}) => [left, top, height].map(Math.round))"
                    "(document.querySelector('.head h1').getBoundingClientRect())"
                )
                for page in (before, window)
            ]
            before.close()
        assert places[0] == pytest.approx(places[1], abs=1)


# ------------------------------------------------------------------------------------------------ bytes


def test_our_own_bytes():
    ours = [*CSS, *ASSETS.glob("*.js")]
    assert sum(len(one.read_bytes()) for one in ours) < OWN_BYTES


def test_the_bytes_of_the_page(address):
    place = urlsplit(address)
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=60)
    connection.request("GET", "/", headers={"Accept-Encoding": "gzip"})
    answer = connection.getresponse()
    sent = answer.read()
    assert answer.headers["Content-Encoding"] == "gzip"
    assert len(sent) < PAGE_BYTES
    assert b"window.gradio_config" in gzip.decompress(sent)


def test_the_bytes_of_a_visit(window):
    """`visit` sees to it that no other machine was asked for any."""
    entries = window.evaluate(
        "['navigation', 'resource'].flatMap((kind) => performance.getEntriesByType(kind))"
        ".filter((one) => !one.name.includes('/queue/')).map((one) => one.encodedBodySize)"
    )
    assert len(entries) > 10
    assert 0 < sum(entries) < ALL_BYTES


def test_the_starting_page_is_small():
    from tabs.starting import Progress

    assert len(gzip.compress(starting_page(Progress(("a", "b", "c"))).encode())) < 6_000
