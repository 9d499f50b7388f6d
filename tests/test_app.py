"""The page: its API by gradio_client, and its looks and ways in a headless Chromium, driven as a visitor would.

Screenshots are kept in tests/artifacts (not in git): open them after a change to the page.
"""

from __future__ import annotations

import time
import zipfile

import numpy as np
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from page import set_steps, shoot, sources
from PIL import Image

import app
from ovam_core.settings import MapSettings
from tabs.desk import NO_IMAGE
from tabs.generate import EXAMPLES, grid_name, grid_names, map_settings
from tabs.store import Store

STEPS = 4
PROMPT = "A photograph of a cat and a car on grass"
IMAGE = {"prompt": PROMPT, "seed": 1, "steps": STEPS, "guidance": 4, "width": 128, "height": 128, "negative_prompt": ""}


@pytest.fixture(scope="module")
def client(address, tmp_path_factory):
    return Client(address, verbose=False, download_files=str(tmp_path_factory.mktemp("downloads")))


@pytest.fixture(scope="module")
def generated(client):
    return client.predict(**IMAGE, api_name="/generate")


# ------------------------------------------------------------------------------------------------- the API


def test_the_api_has_these_endpoints_and_no_other(client):
    assert set(client.view_api(return_format="dict")["named_endpoints"]) == {
        "/generate",
        "/photograph",
        "/attribute",
        "/stop",
        "/optimize",
    }


def test_generate_gives_an_image_and_its_facts(generated):
    image, facts = generated
    assert Image.open(image).size == (128, 128)
    assert "seed 1" in facts and f"{STEPS} steps" in facts and "cpu" in facts


def test_generate_twice_gives_the_same_image(client, generated):
    again, _ = client.predict(**IMAGE, api_name="/generate")
    assert np.array_equal(np.asarray(Image.open(again)), np.asarray(Image.open(generated[0])))


def test_attribute_answers_about_it(client, generated):
    masks, gallery, numbers, facts = client.predict("cat, the red bus", api_name="/attribute")
    assert [one["label"] for one in masks["annotations"]] == ["cat", "the red bus"]
    assert [one["caption"].split(" · ")[0] for one in gallery] == ["cat", "the red bus"]
    assert numbers["words"] == ["cat", "the red bus"] and 0 < max(numbers["peaks"]) <= 1
    assert round(numbers["top"], 4) == max(numbers["peaks"])
    assert "2 maps" in facts


def test_attribute_takes_every_setting(client, generated):
    def asked(**settings):
        return client.predict(api_name="/attribute", **{"words": "cat, car", **settings})[2]

    plain = asked(crf=False)
    assert asked(crf=False, tau=0.95)["mask_shares"] < plain["mask_shares"]
    assert asked(crf=False, tau=0.95)["peaks"] == plain["peaks"]
    assert asked(steps="0-1")["peaks"] != plain["peaks"]
    assert asked(grids=["1/16"])["peaks"] != plain["peaks"]
    assert asked(sentence="a cat and a car")["peaks"] != plain["peaks"]
    assert asked(words="", sentence="a cat")["words"] == ["<SoT>", "a", "cat", "<EoT>"]


def test_attribute_by_every_method(client, generated):
    answers = {}
    for name in ("DAAM", "OVAM", "GoCA", "GoCA, any word", "OVAM, GoCA's weights"):
        _, gallery, numbers, facts = client.predict("cat, car", method=name, api_name="/attribute")
        assert numbers["words"] == ["cat", "car"] and len(gallery) == 2 and f"2 maps by {name} from" in facts
        answers[name] = (*numbers["peaks"], *numbers["mask_shares"])
    assert len(set(answers.values())) == len(answers)
    assert answers["DAAM"][:2] == answers["OVAM"][:2]  # the same maps, cut in another way
    assert sum(answers["GoCA"][2:]) <= 1  # a pixel has one word


def test_sessions_do_not_see_each_other(address):
    with pytest.raises(AppError, match="generate one first"):
        Client(address, verbose=False).predict("cat", api_name="/attribute")


BAD_IMAGES = {
    "empty prompt": ({"prompt": ""}, "prompt is empty"),
    "long prompt": ({"prompt": "x" * 10_000}, "10,000 characters"),
    "prompt past the encoder": ({"prompt": "cat " * 90}, "tokens"),
    "no steps": ({"steps": 0}, "less than minimum"),
    "too many steps": ({"steps": 100_000}, "greater than maximum"),
    "part of a step": ({"steps": 2.5}, "steps is 2.5"),
    "size not a multiple": ({"width": 100}, "multiple of 8"),
    "size too large": ({"height": 8192}, "greater than maximum"),
    "guidance nan": ({"guidance": "NaN"}, "is NaN; give a number"),
    "seed below 0": ({"seed": -1}, "less than minimum"),
    "no seed": ({"seed": None}, "seed"),
    "seed not whole": ({"seed": 1.5}, "Seed is 1.5; give a whole number"),
    "seed nan": ({"seed": "NaN"}, "Seed is NaN; give a number"),
}
BAD_WORDS = {
    "no words": ({"words": ""}, "word"),
    "punctuation": ({"words": "?!, ..."}, "not a word"),
    "10,000 characters": ({"words": "x" * 10_000}, "10,000 characters"),
    "markup": ({"words": "cat", "sentence": "<img src=x>"}, "cat"),
    "tokens that are no list": ({"tokens": 5}, "no list of names"),
    "a token that is no name": ({"tokens": [["x"]]}, "no token"),
    "tau nan": ({"tau": "NaN"}, "is NaN; give a number"),
    "alpha too large": ({"alpha": 7}, "greater than maximum"),
    "steps": ({"steps": "0-99999999999"}, "steps"),
    "a step not run": ({"steps": "150"}, "None of these steps is in a run of 4: choose among 0 to 3"),
    "no grids": ({"grids": []}, "resolution"),
    "grids that are no list": ({"grids": None}, "resolution"),
    "a grid not there": ({"grids": ["1/3"]}, "1/3"),
    "no such method": ({"method": "SAM"}, "SAM"),
    "a method of 100 steps": ({"method": "Attn2Mask"}, "generate an image with 100 steps"),
    "a method of tokens": ({"method": "OVAM + token"}, "choose a token"),
    "a word that is not in the prompt": ({"method": "GoCA", "words": "dog"}, "'dog' does not stand"),
    "steps of one pass": ({"method": "GoCA", "steps": "0-1"}, "name no denoising steps"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_bad_images(client, case):
    wrong, part = BAD_IMAGES[case]
    with pytest.raises((AppError, ValueError), match=part) as caught:
        client.predict(**{**IMAGE, **wrong}, api_name="/generate")
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("case", BAD_WORDS)
def test_bad_words(client, generated, case):
    wrong, part = BAD_WORDS[case]
    with pytest.raises((AppError, ValueError), match=part) as caught:
        client.predict(**{"words": "cat", **wrong}, api_name="/attribute")
    assert "Traceback" not in str(caught.value) and "<img" not in str(caught.value)


@pytest.mark.parametrize("wrong", [{"tau": float("nan")}, {"alpha": float("inf")}, {"tau": "0.4"}, {"tau": -1}])
def test_the_functions_behind_check_for_themselves(wrong):
    with pytest.raises(ValueError, match="choose a number"):
        MapSettings(words=("cat",), **wrong).validate()


def test_stop_ends_a_generation(address):
    one = Client(address, verbose=False)
    job = one.submit(**{**IMAGE, "steps": 200}, api_name="/generate")
    for _ in range(200):  # until the first step is counted
        if job.status().progress_data:
            break
        time.sleep(0.05)
    one.predict(api_name="/stop")
    with pytest.raises(AppError, match=r"Stopped after \d+ of 200 steps"):
        job.result(timeout=120)


# ----------------------------------------------------------------------------------------------- the parts


class Bytes:
    def __init__(self, nbytes: int):
        self.nbytes = nbytes


def test_store_is_bounded_in_count_bytes_and_time():
    now = [0.0]
    store = Store(per_owner=2, max_bytes=100, seconds=10, clock=lambda: now[0])
    first, second, third = (store.put("ann", Bytes(10)) for _ in range(3))
    assert store.get(first) is None and store.get(second) and store.get(third)  # two each
    large = store.put("bob", Bytes(95))
    assert store.get(large) and store.nbytes <= 100 and store.get(second) is None
    huge = store.put("cid", Bytes(1000))  # larger than all: kept, alone
    assert len(store) == 1 and store.get(huge)
    now[0] = 9.0
    assert store.get(huge)  # its time begins anew
    now[0] = 18.0
    assert store.get(huge)
    now[0] = 28.0
    store.sweep()
    assert len(store) == 0 and store.get(huge) is None and store.get(None) is None


def test_store_forgets_a_visitor_who_leaves():
    store = Store()
    ann, bob = store.put("ann", Bytes(1)), store.put("bob", Bytes(1))
    store.drop_owner("ann")
    assert store.get(ann) is None and store.get(bob)


def test_grids_are_named_alike_for_every_size(pipe):
    assert grid_names(pipe) == ["1/8", "1/16", "1/32"]
    assert [grid_name((512, 384), one) for one in (64, 32, 16, 8)] == ["1/8", "1/16", "1/32", "1/64"]
    assert [grid_name((200, 120), one) for one in (25, 13, 7)] == ["1/8", "1/16", "1/32"]


def test_words_are_read_without_an_image():
    assert map_settings(None, "cat; Cat, dog", "", 0.4, 0.85, True, "all", []).words == ("cat", "dog")


def test_an_unreachable_hub_falls_back_with_a_notice(monkeypatch):
    def load(model=None, device=None):
        if model is None:
            raise ValueError("The model a/b is not on this machine and the hub cannot be reached: connect.")
        return model

    monkeypatch.delenv("OVAM_MODEL", raising=False)
    monkeypatch.setattr(app, "load_pipeline", load)
    opened, notice = app.open_model()
    assert opened == "emoji-voc" and "could not be loaded" in notice and "hub cannot be reached" in notice


def test_a_model_that_does_not_exist_is_no_reason_for_another(monkeypatch, capsys):
    monkeypatch.setenv("OVAM_MODEL", "no-such-model")
    assert app.main() == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("Error: ") and "no-such-model" in said


def test_examples_work(pipe):
    from ovam_core.ovam import attributions
    from ovam_core.settings import GenerateSettings

    assert len(EXAMPLES) == 3
    for prompt, words in EXAMPLES:
        GenerateSettings.for_model(pipe, prompt).validate(pipe)
        attributions(pipe, MapSettings.from_text(words))


# ---------------------------------------------------------------------------------------------- the browser


def captions(page) -> list[str]:
    return [text.split(" · ")[0] for text in page.locator("#gallery .caption-label").all_inner_texts()]


def generate_now(page) -> None:
    page.click("#generate")
    page.wait_for_selector("#gallery img")
    page.wait_for_selector("#generate:not([disabled])")
    page.wait_for_timeout(500)


def wait_for_words(page, words: list[str]) -> None:
    page.wait_for_function(
        "words => { const all = [...document.querySelectorAll('#gallery .caption-label')].map(one => one.innerText);"
        "return all.length === words.length && all.every((text, n) => text.startsWith(words[n] + ' · ')); }",
        arg=words,
    )


def test_a_visit(visit, tmp_path):
    """Generate; then other words, another threshold, other steps: maps and masks change, the picture never does."""
    page = visit()
    shoot(page, "wide-empty", full=True)
    assert page.is_disabled("#stop") and page.is_disabled("#pack")
    assert "<b>markup</b>" in page.inner_text("#head .notice")
    set_steps(page, STEPS)
    generate_now(page)
    assert captions(page) == ["animal", "car"]
    assert page.get_attribute("#image img", "alt") == "The picture"
    assert page.locator("#gallery img").first.get_attribute("alt").startswith("animal · peak")
    assert f"{STEPS} steps" in page.inner_text("#facts") and "from the recording in" in page.inner_text("#map-facts")
    assert page.locator("#annotated .legend-item").all_inner_texts() == ["animal", "car"]
    assert page.is_disabled("#stop") and page.is_enabled("#pack")
    shoot(page, "wide", full=True)
    picture, maps, masks = sources(page, "#image"), sources(page, "#gallery"), sources(page, "#annotated")

    page.fill("#words textarea, #words input", "")
    page.locator("#words textarea, #words input").press_sequentially("grass, red car", delay=30)  # no Enter needed
    wait_for_words(page, ["grass", "red car"])
    assert sources(page, "#image") == picture and sources(page, "#gallery") != maps

    page.fill("#words textarea, #words input", "cat, zeppelin on a lawn")
    page.wait_for_selector("#note .hint:has-text('never learned: zeppelin, lawn')")
    page.fill("#words textarea, #words input", "grass, red car")
    wait_for_words(page, ["grass", "red car"])
    page.wait_for_selector("#note .hint:has-text('never learned: red.')")

    maps, masks = sources(page, "#gallery"), sources(page, "#annotated")
    page.fill("#tau input[type=number]", "0.9")
    page.press("#tau input[type=number]", "Tab")
    page.wait_for_function(
        "old => [...document.querySelectorAll('#annotated img')].map(one => one.src).join() !== old",
        arg=",".join(masks),
    )
    assert sources(page, "#image") == picture and sources(page, "#gallery") == maps

    page.click("#which > button")
    page.fill("#used textarea, #used input", "0")
    page.press("#used textarea, #used input", "Enter")
    page.wait_for_function(
        "old => [...document.querySelectorAll('#gallery img')].map(one => one.src).join() !== old", arg=",".join(maps)
    )
    assert sources(page, "#image") == picture
    maps = sources(page, "#gallery")
    page.locator("#grids input").nth(1).click()
    page.wait_for_function(
        "old => [...document.querySelectorAll('#gallery img')].map(one => one.src).join() !== old", arg=",".join(maps)
    )
    page.wait_for_timeout(300)
    shoot(page, "wide-which", full=True)

    with page.expect_download() as download:
        page.click("#pack")
    download.value.save_as(tmp_path / "all.zip")
    with zipfile.ZipFile(tmp_path / "all.zip") as archive:
        names = set(archive.namelist())
    assert {"image.png", "heatmaps.npz", "settings.json", "overlay_grass.png", "mask_red-car.png"} <= names
    assert sources(page, "#image") == picture


def test_another_method(visit):
    page = visit()
    set_steps(page, STEPS)
    page.fill("#words textarea, #words input", "cat, car")
    generate_now(page)
    picture, maps, masks = (sources(page, name) for name in ("#image", "#gallery", "#annotated"))
    page.click("#methods > button")
    page.click("#method label:has-text('DAAM')")
    page.wait_for_selector("#map-facts:has-text('by DAAM')")
    page.wait_for_selector("#methods > button:has-text('Method: DAAM')")
    assert (
        sources(page, "#image") == picture
        and sources(page, "#gallery") == maps
        and sources(page, "#annotated") != masks
    )
    assert (
        page.is_disabled("#alpha input[type=number]")
        and page.is_disabled("#crf input")
        and page.is_enabled("#tau input[type=number]")
    )
    page.locator("#method label").filter(has_text="GoCA: ").click()
    page.wait_for_selector("#map-facts:has-text('by GoCA')")
    assert sources(page, "#image") == picture and sources(page, "#gallery") != maps
    page.wait_for_timeout(300)
    shoot(page, "methods", full=True)
    page.fill("#words textarea, #words input", "dog")
    page.wait_for_selector("#note:has-text('does not stand in the sentence')")
    page.locator("#method label").filter(has_text="OVAM: ").click()
    wait_for_words(page, ["dog"])
    page.wait_for_selector("#alpha input[type=number]:not([disabled])")
    assert sources(page, "#image") == picture and not page.is_visible("#note")


def test_a_mistake_is_said_beside_the_words(visit):
    page = visit()
    set_steps(page, STEPS)
    generate_now(page)
    picture, maps = sources(page, "#image"), sources(page, "#gallery")
    page.fill("#words textarea, #words input", "?!")
    page.wait_for_selector("#note:has-text('not a word')")
    assert sources(page, "#gallery") == maps and sources(page, "#image") == picture
    shoot(page, "wide-mistake")
    page.click("#generate")  # refused before anything is queued
    page.wait_for_selector(".toast-body:has-text('not a word')")
    assert page.is_disabled("#stop") and page.is_enabled("#generate")
    page.fill("#words textarea, #words input", "cat")
    wait_for_words(page, ["cat"])
    assert not page.is_visible("#note")


@pytest.fixture
def slow(pipe):
    """A tenth of a second more a step: 200 steps of the embedded model may be over before a slow page shows them."""
    hook = pipe.unet.register_forward_pre_hook(lambda *given: time.sleep(0.1))
    yield
    hook.remove()


def test_stop(visit, slow):
    page = visit()
    set_steps(page, STEPS)
    generate_now(page)
    picture = sources(page, "#image")
    set_steps(page, 200)
    page.click("#generate")
    page.wait_for_selector("#stop:not([disabled])")
    page.wait_for_selector("#image >> text=/[2-9][0-9]*\\/200/")  # the bar counts steps
    shoot(page, "wide-running")
    assert page.is_disabled("#generate")
    page.click("#stop")
    page.wait_for_selector("#facts:has-text('Stopped after')")
    page.wait_for_selector("#generate:not([disabled])")
    assert page.is_disabled("#stop") and sources(page, "#image") == picture  # the picture from before is still there


def test_the_examples_and_the_dice(visit):
    page = visit()
    seed = page.input_value("#seed input")
    page.click("#dice")
    page.wait_for_function("old => document.querySelector('#seed input').value !== old", arg=seed)
    set_steps(page, STEPS)
    for number in (2, 3, 1):
        prompt, words = EXAMPLES[number - 1]
        page.click(f"#examples tbody tr:nth-child({number}) td")
        wait_for_words(page, words.split(", "))
        page.wait_for_selector("#generate:not([disabled])")
        assert page.input_value("#prompt textarea") == prompt


@pytest.mark.parametrize(("name", "width", "height"), [("narrow", 390, 844), ("middle", 799, 900), ("wide", 1280, 900)])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits(visit, name, width, height, scheme):
    page = visit(width, height, scheme)
    shoot(page, f"{name}-{scheme}-empty", full=True)
    set_steps(page, STEPS)
    generate_now(page)
    shoot(page, f"{name}-{scheme}", full=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    give, get = page.locator(".give").bounding_box(), page.locator(".get").bounding_box()
    assert (get["y"] >= give["y"] + give["height"]) if width < 800 else (get["x"] >= give["x"] + give["width"])
    image, masks = page.locator("#image img").bounding_box(), page.locator("#annotated .base-image").bounding_box()
    assert image["width"] >= 300 and abs(image["width"] - image["height"]) < 2
    assert abs(image["width"] - masks["width"]) < 2
    over = page.locator("#annotated .mask").first.bounding_box()  # masks lie on the picture, not beside it
    assert all(abs(over[side] - masks[side]) < 1.5 for side in ("x", "y", "width", "height"))


def test_a_session_that_has_run_out_says_so(visit, monkeypatch):
    page = visit()
    set_steps(page, STEPS)
    generate_now(page)
    monkeypatch.setattr(Store, "get", lambda self, key: None)
    page.fill("#words textarea, #words input", "dog")
    page.wait_for_selector(f"#note:has-text('{NO_IMAGE[:20]}')")
