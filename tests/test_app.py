"""The page: its API by gradio_client, and its looks and ways in a headless Chromium, driven as a visitor would.

Screenshots are kept in tests/artifacts (not in git): open them after a change to the page.
"""

from __future__ import annotations

import logging
import time
import zipfile

import gradio as gr
import httpx
import numpy as np
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from page import set_steps, shoot, sources
from PIL import Image
from pipelines import make_pipe

import app
from ovam_core import OVAM, InputError
from ovam_core.attention import mask
from ovam_core.errors import HubUnreachable
from ovam_core.methods import settings_of_text
from ovam_core.models.load import learned_words
from ovam_core.settings import GenerateSettings, SegmentSettings
from tabs.events import OUR_FAULT, Inputs, handler
from tabs.fields import NO_CRF
from tabs.generate import EXAMPLES, grid_name, grid_names, segment_settings, vocabulary
from tabs.session import NO_IMAGE, Session

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
    found = client.view_api(return_format="dict")["named_endpoints"]
    names = {name: [one["parameter_name"] for one in about["parameters"]] for name, about in found.items()}
    assert names == {
        "/generate": ["prompt", "negative_prompt", "seed", "steps", "guidance", "width", "height"],
        "/photograph": ["photo", "caption", "timesteps", "seed", "words"],
        "/attribute": ["words", "sentence", "tau", "alpha", "crf", "steps", "grids", "tokens", "method"],
        "/stop": [],
        "/optimize": ["mask", "name", "recipe", "epochs", "rate"],
    }


def test_generate_gives_an_image_and_its_facts(generated):
    image, facts = generated
    assert Image.open(image).size == (128, 128)
    assert "seed 1" in facts
    assert f"{STEPS} steps" in facts
    assert "cpu" in facts


def test_generate_twice_gives_the_same_image(client, generated):
    again, _ = client.predict(**IMAGE, api_name="/generate")
    assert np.array_equal(np.asarray(Image.open(again)), np.asarray(Image.open(generated[0])))


def test_attribute_answers_about_it(client, generated):
    masks, gallery, numbers, facts = client.predict("cat, the red bus", api_name="/attribute")
    assert [one["label"] for one in masks["annotations"]] == ["cat", "the red bus"]
    assert [one["caption"].split(" · ")[0] for one in gallery] == ["cat", "the red bus"]
    assert numbers["words"] == ["cat", "the red bus"]
    assert 0 < max(numbers["peaks"]) <= 1
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
        assert numbers["words"] == ["cat", "car"]
        assert len(gallery) == 2
        assert f"2 maps by {name} from" in facts
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
    "no steps": ({"steps": 0}, "steps is 0; choose a whole number from 1 to 200"),
    "too many steps": ({"steps": 100_000}, "steps is 100000; choose"),
    "part of a step": ({"steps": 2.5}, "steps is 2.5"),
    "size not a multiple": ({"width": 100}, "multiple of 8"),
    "size too large": ({"height": 8192}, "height is 8192; choose"),
    "a width that is no number": ({"width": {"a": 1}}, "Width is .*; give a number"),
    "no height": ({"height": None}, "Height is None; give a number"),
    "guidance nan": ({"guidance": "NaN"}, "is NaN; give a number"),
    "seed below 0": ({"seed": -1}, "seed is -1; choose"),
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
    "a token that is no name": ({"tokens": [["x"]]}, "no list of names"),
    "a tau that is no number": ({"tau": [0.4]}, "is a list; give a number"),
    "no alpha": ({"alpha": None}, "is None; give a number"),
    "too many tokens": ({"tokens": ["cat · emoji-voc"] * 100_000}, "list of too many"),
    "33 tokens": ({"tokens": ["cat · emoji-voc"] * 33}, "33 tokens are too many"),
    "tau nan": ({"tau": "NaN"}, "is NaN; give a number"),
    "alpha too large": ({"alpha": 7}, "Alpha is 7; choose a number from 0 to 1"),
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
    assert "Traceback" not in str(caught.value)
    assert "<img" not in str(caught.value)


@pytest.mark.parametrize("wrong", [{"tau": float("nan")}, {"alpha": float("inf")}, {"tau": "0.4"}, {"tau": -1}])
def test_the_functions_behind_check_for_themselves(wrong):
    with pytest.raises(ValueError, match="choose a number"):
        SegmentSettings(words=("cat",), **wrong).validate()


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


def set_method(client, address: str, blocks, name: str) -> None:
    """Chooses a method as the page does, which updates sliders and the switch of the dense CRF in this session."""
    number = next(number for number, event in blocks.fns.items() if event.name == "rules")
    body = {"data": [name], "fn_index": number, "session_hash": client.session_hash}
    httpx.post(f"{address}gradio_api/run/predict", json=body, timeout=60).raise_for_status()


def test_checks_outlive_an_update_of_a_component(client, generated, address, blocks):
    """Gradio makes a new component of a session's where one is updated: what was done to the old one is gone."""
    set_method(client, address, blocks, "DAAM")
    state = blocks.state_holder[client.session_hash]
    alpha = next(block for block in blocks.blocks.values() if getattr(block, "elem_id", "") == "alpha")
    assert state[alpha._id] is not alpha
    assert state[alpha._id].interactive is False
    for wrong in ("NaN", "0.4", [1], None):
        with pytest.raises(AppError, match=r"is .*; give a number"):
            client.predict("cat", alpha=wrong, api_name="/attribute")
    for wrong, part in ((7, "choose a number from 0 to 1"), (-1, "choose a number from 0 to 1")):
        with pytest.raises(AppError, match=part) as caught:
            client.predict("cat", alpha=wrong, api_name="/attribute")
        assert "Traceback" not in str(caught.value)
    set_method(client, address, blocks, "OVAM")
    assert state[alpha._id].interactive is True
    with pytest.raises(AppError, match="is NaN; give a number"):
        client.predict("cat", alpha="NaN", api_name="/attribute")


def test_a_bug_is_our_fault_and_keeps_its_traceback(client, monkeypatch, caplog):
    def wrong(*_, **__):
        raise ValueError("axis 7 of <secret>")

    monkeypatch.setattr(OVAM, "draw", wrong)
    with caplog.at_level(logging.ERROR, "ovam"), pytest.raises(AppError) as caught:
        client.predict(**IMAGE, api_name="/generate")
    assert str(caught.value) == OUR_FAULT
    assert "Traceback" in caplog.text
    assert "axis 7 of <secret>" in caplog.text


# ----------------------------------------------------------------------------------------------- the parts


def test_a_handler_says_each_kind_of_fault(caplog):
    @handler
    def given(error):
        raise error

    with pytest.raises(gr.Error) as caught:
        given(InputError("no <b> & so on"))
    assert caught.value.message == "no &lt;b&gt; &amp; so on"
    assert not caplog.text
    own = gr.Error("as it is")
    with pytest.raises(gr.Error) as caught:
        given(own)
    assert caught.value is own
    with pytest.raises(gr.Error) as caught:
        given(ValueError("of torch"))
    assert caught.value.message == OUR_FAULT
    assert "of torch" in caplog.text


def test_a_handler_that_gives_several_answers_says_them_too():
    closed = []

    @handler
    def given(error):
        try:
            yield 1
            raise error
        finally:
            closed.append(1)

    answers = given(InputError("no"))
    assert next(answers) == 1
    with pytest.raises(gr.Error, match="no"):
        next(answers)
    answers = given(InputError("no"))
    next(answers)
    answers.close()  # a visitor who left
    assert closed == [1, 1]


def test_inputs_are_read_as_what_they_should_be(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    with gr.Blocks():
        seed, slider, box = gr.Number(label="Seed", precision=0), gr.Slider(0, 1, label="Share"), gr.Textbox()
        names, group, way = gr.Dropdown([], multiselect=True), gr.CheckboxGroup(["a"]), gr.Radio(["a", "b"])
        file, tick = gr.File(), gr.Checkbox()

    def of(field, value):
        return Inputs({field: value})

    assert of(seed, 3.0).whole(seed) == 3
    assert of(seed, None).whole(seed) is None
    assert of(slider, 0.25).number(slider) == 0.25
    for field, wrong in (
        (seed, 1.5),
        (seed, "3"),
        (seed, True),
        (seed, 10**400),
        (slider, -(10**400)),
        (seed, float("nan")),
        (slider, None),
        (slider, float("inf")),
    ):
        with pytest.raises(InputError, match=f"{field.label} is .*; give a (whole )?number"):
            of(field, wrong).whole(field)
    assert of(box, None).text(box) == ""
    assert of(box, 5).text(box) == "5"
    assert of(names, None).names(names, "no") == []
    assert of(names, ["x"]).names(names, "no") == ["x"]
    for wrong in (5, "cat", {"a": 1}):
        with pytest.raises(InputError, match="no list"):
            of(names, wrong).names(names, "no list")
        with pytest.raises(InputError, match="choose among a"):
            of(group, wrong).several(group)
        with pytest.raises(InputError, match="choose a or b"):
            of(way, wrong).choice(way)
    assert of(way, "b").choice(way) == "b"
    assert of(file, None).file(file) is None
    (tmp_path / "x.png").touch()
    uploaded = f"{file.GRADIO_CACHE}/x.png"
    assert of(file, {"path": uploaded}).file(file) == uploaded
    for elsewhere in (__file__, "x", f"{file.GRADIO_CACHE}/../x.png", "http://a/x.png", 5, "\0", "\ud800", "x" * 9999):
        with pytest.raises(InputError, match="uploaded"):
            of(file, {"path": elsewhere}).file(file)
    with pytest.raises(InputError, match="not on the server any more"):
        of(file, {"path": f"{file.GRADIO_CACHE}/gone.png"}).file(file)
    for no_file in (5, "cat", [{"path": uploaded}], True):
        with pytest.raises(InputError, match="uploaded"):
            of(file, no_file).file(file)
    assert of(tick, None).ticked(tick) is False
    for wrong in (1, "yes", [True]):
        with pytest.raises(InputError, match="true or false"):
            of(tick, wrong).ticked(tick)


def test_without_simplecrf_the_switch_is_off_and_says_why(ovam, monkeypatch):
    def switches(page):
        return [block for block in page.blocks.values() if isinstance(block, gr.Checkbox) and block.label == "dCRF"]

    assert [(one.value, one.interactive, one.info) for one in switches(app.build(ovam))] == [(True, True, None)] * 2
    monkeypatch.setattr(mask, "crf_available", lambda: False)
    without = app.build(ovam)
    assert [(one.value, one.interactive, one.info) for one in switches(without)] == [(False, False, NO_CRF)] * 2
    rules = next(event.fn for event in without.fns.values() if event.name == "rules")
    assert not rules("OVAM")[2].interactive
    monkeypatch.undo()
    assert rules("OVAM")[2].interactive
    assert not rules("DAAM")[2].interactive


def test_grids_are_named_alike_for_every_size(ovam):
    assert grid_names(ovam) == ["1/4", "1/8", "1/16", "1/32"]
    assert [grid_name((512, 384), one) for one in (64, 32, 16, 8)] == ["1/8", "1/16", "1/32", "1/64"]
    assert [grid_name((200, 120), one) for one in (25, 13, 7)] == ["1/8", "1/16", "1/32"]


def test_a_model_whose_words_are_not_known_says_nothing_of_them(ovam):
    assert vocabulary(ovam).count("<button") == len(learned_words(ovam.pipe)) > 50
    assert not {"a", "of", "the"} & set(learned_words(ovam.pipe))
    assert vocabulary(OVAM(make_pipe())) == ""


def test_words_are_read_without_an_image(ovam):
    asked = segment_settings(ovam, None, words="cat; Cat, dog", tau=0.4, alpha=0.85, steps="all")
    assert asked.words == ("cat", "dog")


def test_an_unreachable_hub_falls_back_with_a_notice(monkeypatch):
    def load(model=None):
        if model is None:
            raise HubUnreachable("The model a/b is not on this machine and the hub cannot be reached: connect.")
        return model

    monkeypatch.delenv("OVAM_MODEL", raising=False)
    monkeypatch.setattr(OVAM, "from_pretrained", load)
    opened, notice = app.open_model()
    assert opened == "emoji-voc"
    assert "could not be loaded" in notice
    assert "hub cannot be reached" in notice
    monkeypatch.setenv("OVAM_MODEL", "a/b")
    assert app.open_model()[0] == "emoji-voc"


def test_a_model_that_does_not_exist_is_no_reason_for_another(monkeypatch, capsys):
    monkeypatch.setenv("OVAM_MODEL", "no-such-model")
    assert app.main() == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("Error: ")
    assert "no-such-model" in said


def test_examples_work(ovam):
    assert len(EXAMPLES) == 3
    for prompt, words in EXAMPLES:
        GenerateSettings.for_model(ovam.pipe, prompt).validate(ovam.pipe)
        ovam.queries(settings_of_text(words))


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
    assert page.is_disabled("#stop")
    assert page.is_disabled("#pack")
    assert "<b>markup</b>" in page.inner_text("#head .notice")
    set_steps(page, STEPS)
    generate_now(page)
    assert captions(page) == ["bird", "ship"]
    assert page.get_attribute("#image img", "alt") == "The picture"
    assert page.locator("#gallery img").first.get_attribute("alt").startswith("bird · peak")
    assert f"{STEPS} steps" in page.inner_text("#facts")
    assert "from the recording in" in page.inner_text("#map-facts")
    assert page.locator("#annotated .legend-item").all_inner_texts() == ["bird", "ship"]
    assert page.is_disabled("#stop")
    assert page.is_enabled("#pack")
    shoot(page, "wide", full=True)
    picture, maps, masks = sources(page, "#image"), sources(page, "#gallery"), sources(page, "#annotated")

    page.fill("#words textarea, #words input", "")
    page.locator("#words textarea, #words input").press_sequentially("grass, red car", delay=30)  # no Enter needed
    wait_for_words(page, ["grass", "red car"])
    assert sources(page, "#image") == picture
    assert sources(page, "#gallery") != maps

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
    assert sources(page, "#image") == picture
    assert sources(page, "#gallery") == maps

    page.click("#which > button")
    page.fill("#used textarea, #used input", "0")
    page.press("#used textarea, #used input", "Enter")
    page.wait_for_function(
        "old => [...document.querySelectorAll('#gallery img')].map(one => one.src).join() !== old", arg=",".join(maps)
    )
    assert sources(page, "#image") == picture
    maps = sources(page, "#gallery")
    page.locator("#grids input").nth(2).click()  # 1/16 beside 1/8
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
    page.fill("#prompt textarea", PROMPT)
    page.fill("#words textarea, #words input", "cat, car")
    generate_now(page)
    picture, maps, masks = (sources(page, name) for name in ("#image", "#gallery", "#annotated"))
    page.click("#methods > button")
    page.click("#method label:has-text('DAAM')")
    page.wait_for_selector("#map-facts:has-text('by DAAM')")
    page.wait_for_selector("#methods > button:has-text('Method: DAAM')")
    assert sources(page, "#image") == picture
    assert sources(page, "#gallery") == maps
    assert sources(page, "#annotated") != masks
    assert page.is_disabled("#alpha input[type=number]")
    assert page.is_disabled("#crf input")
    assert page.is_enabled("#tau input[type=number]")
    page.locator("#method label").filter(has_text="GoCA: ").click()
    page.wait_for_selector("#map-facts:has-text('by GoCA')")
    assert sources(page, "#image") == picture
    assert sources(page, "#gallery") != maps
    page.wait_for_timeout(300)
    shoot(page, "methods", full=True)
    page.fill("#words textarea, #words input", "dog")
    page.wait_for_selector("#note:has-text('does not stand in the sentence')")
    page.locator("#method label").filter(has_text="OVAM: ").click()
    wait_for_words(page, ["dog"])
    page.wait_for_selector("#alpha input[type=number]:not([disabled])")
    assert sources(page, "#image") == picture
    assert not page.is_visible("#note")


def test_a_mistake_is_said_beside_the_words(visit):
    page = visit()
    set_steps(page, STEPS)
    generate_now(page)
    picture, maps = sources(page, "#image"), sources(page, "#gallery")
    page.fill("#words textarea, #words input", "?!")
    page.wait_for_selector("#note:has-text('not a word')")
    assert sources(page, "#gallery") == maps
    assert sources(page, "#image") == picture
    shoot(page, "wide-mistake")
    page.click("#generate")  # refused before anything is queued
    page.wait_for_selector(".toast-body:has-text('not a word')")
    assert page.is_disabled("#stop")
    assert page.is_enabled("#generate")
    page.fill("#words textarea, #words input", "cat")
    wait_for_words(page, ["cat"])
    assert not page.is_visible("#note")


def test_a_word_that_the_model_knows_is_a_click_away(visit, ovam):
    page = visit()
    set_steps(page, STEPS)
    generate_now(page)
    assert f"knows {len(learned_words(ovam.pipe))} words" in page.inner_text("#vocabulary summary")
    page.click("#vocabulary summary")
    assert page.locator("#vocabulary button").all_inner_texts() == learned_words(ovam.pipe)
    asked = [*EXAMPLES[0][1].split(", "), "sheep"]
    for _ in range(2):  # a second click changes nothing
        page.click("#vocabulary button:text-is('sheep')")
        wait_for_words(page, asked)
        assert page.input_value("#words textarea, #words input") == ", ".join(asked)
    shoot(page, "wide-vocabulary")


@pytest.fixture
def slow(ovam):
    """A tenth of a second more a step: 200 steps of the embedded model may be over before a slow page shows them."""
    hook = ovam.pipe.unet.register_forward_pre_hook(lambda *_: time.sleep(0.1))
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
    assert page.is_disabled("#stop")
    assert sources(page, "#image") == picture


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
    assert image["width"] >= 300
    assert abs(image["width"] - image["height"]) < 2
    assert abs(image["width"] - masks["width"]) < 2
    over = page.locator("#annotated .mask").first.bounding_box()  # masks lie on the picture, not beside it
    assert all(abs(over[side] - masks[side]) < 1.5 for side in ("x", "y", "width", "height"))


def test_a_session_that_has_run_out_says_so(visit, monkeypatch):
    page = visit()
    set_steps(page, STEPS)
    generate_now(page)
    monkeypatch.setattr(Session, "find", lambda self, key: None)
    page.fill("#words textarea, #words input", "dog")
    page.wait_for_selector(f"#note:has-text('{NO_IMAGE[:20]}')")


def test_the_page_goes_on_after_a_bug(visit, monkeypatch):
    page = visit()
    set_steps(page, STEPS)
    with monkeypatch.context() as patch:
        patch.setattr(OVAM, "draw", lambda *_, **__: [][1])
        page.click("#generate")
        page.wait_for_selector(f".toast-body:has-text('{OUR_FAULT}')")
        page.wait_for_selector("#generate:not([disabled])")
        assert "index" not in page.inner_text(".toast-body")
    generate_now(page)


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
