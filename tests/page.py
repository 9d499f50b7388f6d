"""What the tests of the page share: the server, a headless Chromium, and a visitor's hands."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import app
from ovam_core import OVAM
from tabs.session import Sessions

ARTIFACTS = Path(__file__).parent / "artifacts"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def pytest_collection_modifyitems(items) -> None:
    """What drives a browser takes its time."""
    for item in items:
        if "browser" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.browser)
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="module")
def ovam():
    return OVAM.from_pretrained("emoji-voc", "cpu")


@pytest.fixture(scope="module")
def sessions(ovam):
    """What the server keeps for the visitors of `address`."""
    made = Sessions(ovam.name)
    yield made
    made.close()


@pytest.fixture(scope="module")
def blocks(ovam, sessions):
    return app.build(ovam, "a notice with <b>markup</b>", sessions)


@pytest.fixture(scope="module")
def address(blocks):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gradio.networking.url_ok", lambda url: True)  # it gives up after 3 s, little on a busy machine
        _, url, _ = app.launch(blocks, server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    yield url
    blocks.close()


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def profile(browser):
    """The browser's, one for all visits of a module, so that the page's scripts are fetched and compiled once."""
    context = browser.new_context()
    yield context
    context.close()


@pytest.fixture
def visit(profile, address):
    """Opens the page in a tab; at the end nothing may have been asked of another machine, nor gone wrong."""
    pages, faults = [], []

    def heard(request):
        if not request.url.startswith((address, "data:", "blob:")):
            faults.append(f"outside: {request.url}")

    def open_page(width=1280, height=900, scheme="light"):
        page = profile.new_page()
        pages.append(page)
        page.set_viewport_size({"width": width, "height": height})
        page.emulate_media(color_scheme=scheme)
        page.set_default_timeout(120_000)  # CI may have half of a core
        page.on("request", heard)
        page.on("pageerror", lambda error: faults.append(f"script: {error}"))
        page.goto(address)
        page.wait_for_selector("#generate")
        page.wait_for_timeout(500)
        return page

    yield open_page
    for page in pages:
        if not page.is_closed():
            page.evaluate("localStorage.clear()")  # the next visitor is a stranger
            page.close()
    profile.clear_cookies()
    assert not faults


def shoot(page, name: str, full: bool = False) -> None:
    ARTIFACTS.mkdir(exist_ok=True)
    page.screenshot(path=ARTIFACTS / f"{name}.png", full_page=full)


def set_number(page, selector: str, value: int) -> None:
    """Types a number until the field holds it: a page still being put together on a busy machine sets its own again."""
    field = f"{selector} input[type=number]"
    for _ in range(6):
        page.fill(field, str(value))
        page.press(field, "Tab")
        page.wait_for_timeout(500)
        if page.input_value(field) == str(value):
            return
    raise AssertionError(f"{selector} does not keep {value}")


def set_steps(page, steps: int) -> None:
    page.click("#advanced > button")
    set_number(page, "#steps", steps)
    page.click("#advanced > button")


def set_words(page, words: str) -> None:
    page.fill("#words textarea", words)


def generate_now(page) -> None:
    """Presses the button and waits for the picture with its words."""
    before = shown(page)
    page.click("#generate")
    until(page, lambda: (now := shown(page)) and (now != before or not before))
    page.wait_for_selector("#stop[disabled]")
    page.wait_for_timeout(300)


def wait_for_picture(page, prompt: str) -> None:
    """Waits for the picture of a prompt, with nothing said to be out of date."""
    page.wait_for_function(
        """prompt => {
            const text = name => document.querySelector(`#viewer [data-part=${name}]`)?.textContent ?? '';
            return text('caption').includes(prompt) && !text('stale').trim();
        }""",
        arg=prompt,
    )


def chips(page) -> list[str]:
    """The words below the picture."""
    return page.eval_on_selector_all("#viewer .v-word", "all => all.map(one => one.firstChild.textContent.trim())")


def wait_for_chips(page, words: list[str]) -> None:
    until(page, lambda: chips(page) == words and not page.inner_text("#viewer [data-part=stale]").strip())


def shown(page) -> str:
    """What tells the picture on the page from others; "" before there is one."""
    return page.evaluate("window.ovamPage?.picture() ?? ''")


def until(page, holds) -> None:
    """Waits for what the server did, which the page may show too briefly to be seen."""
    for _ in range(600):
        if holds():
            return
        page.wait_for_timeout(100)
    raise AssertionError("it never came to that")


def upload(page, selector: str, file: str, shown: str) -> None:
    """Hands a file to a field until `shown` stands on the page: a field that just appeared may not listen yet.

    `shown` must stay: what a page shows only while it uploads may be gone before it is looked for.
    """
    from playwright.sync_api import TimeoutError

    page.wait_for_selector(f"{selector} input[type=file]", state="attached")
    page.wait_for_timeout(500)
    for patience in (20_000, 20_000, 60_000):
        try:
            page.set_input_files(f"{selector} input[type=file]", file, timeout=patience)
            page.wait_for_selector(shown, timeout=patience)
            return
        except TimeoutError:
            continue
    raise AssertionError(f"{selector} does not take {file}")


def upload_mask(page, file: str) -> None:
    """On the second tab, where it is shown on the canvas."""
    upload(page, "#mask-file", file, "#canvas .p-said:has-text('Your mask')")


def sources(page, selector: str) -> list[str]:
    return page.eval_on_selector_all(f"{selector} img", "all => all.map(one => one.src)")
