"""What programs may ask: every named endpoint by gradio_client, and as tools by a real client of MCP over HTTP."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import re
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import httpx
import numpy as np
import pytest
from gradio.state_holder import SessionState
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image, ImageDraw
from test_malformed import BAD, is_sentence

import app
import tabs.model
import tabs.programs
from ovam_core import OVAM, Token, plot
from ovam_core.attention.heatmap import claims
from ovam_core.errors import InputError
from ovam_core.methods import METHODS
from ovam_core.optimization import RECIPES
from ovam_core.picture import Segmentation
from ovam_core.query import MAX_WORDS
from ovam_core.settings import SegmentSettings
from tabs import tools
from tabs.doors import MANY_CALLS, MAX_TOOL_CALLS, Doors, watch
from tabs.events import DECODED
from tabs.model import Model
from tabs.programs import Programs, Question, _rows
from tabs.render import MAX_SHOWN, on_screen
from tabs.sentences import OUR_FAULT
from tabs.session import Bounds, Sessions

STEPS, SIDE = 2, 64
PROMPT = "A photograph of a cat and a car on grass"
IMAGE = {
    "prompt": PROMPT,
    "seed": 1,
    "steps": STEPS,
    "guidance": 4,
    "width": SIDE,
    "height": SIDE,
    "negative_prompt": "",
}
ASKED = "words picture sentence tau alpha crf steps grids tokens token_files method".split()
ENDPOINTS = {
    "/generate": ["prompt", "negative_prompt", "seed", "steps", "guidance", "width", "height", "guidance_kind"],
    "/photograph": ["photo", "caption", "timesteps", "seed", "words"],
    "/attribute": ASKED,
    "/masks": ASKED,
    "/point": ["x", "y", "words", "picture"],
    "/archive": ASKED,
    "/optimize": ["mask", "name", "picture", "recipe", "epochs", "rate", "unlabelled"],
    "/tokens": [],
    "/stop": [],
}
TOOLS = ["attribute", "generate", "masks", "optimize", "photograph", "point"]


def connect(address: str, downloads: str | bool = False) -> Client:
    return Client(address, verbose=False, download_files=downloads, httpx_kwargs={"timeout": 120})  # CI is busy


@pytest.fixture(scope="module")
def client(address, tmp_path_factory):
    return connect(address, str(tmp_path_factory.mktemp("downloads")))


@pytest.fixture(scope="module")
def generated(client):
    return client.predict(**IMAGE, api_name="/generate")


@pytest.fixture(scope="module")
def picture(generated, sessions):
    """The one that the server keeps."""
    return sessions.picture_of(generated[0])


@pytest.fixture(scope="module")
def square(tmp_path_factory):
    """A mask of an object in the middle."""
    mask = Image.new("L", (SIDE, SIDE))
    ImageDraw.Draw(mask).rectangle([16, 16, 47, 47], fill=255)
    path = tmp_path_factory.mktemp("mask") / "mask.png"
    mask.save(path)
    return str(path)


def attribute(client, words="cat", **more):
    return client.predict(words, **more, api_name="/attribute")


# ------------------------------------------------------------------------------------- what there is to be called


def test_there_are_these_endpoints_and_no_other(client):
    found = client.view_api(return_format="dict")
    assert found["unnamed_endpoints"] == {}
    names = {name: [one["parameter_name"] for one in of["parameters"]] for name, of in found["named_endpoints"].items()}
    assert names == ENDPOINTS


def test_every_value_has_a_type_and_a_text(client):
    for name, about in client.view_api(return_format="dict")["named_endpoints"].items():
        assert about["description"].endswith("."), name
        for one in [*about["parameters"], *about["returns"]]:
            assert one["python_type"]["type"] != "Any", (name, one["label"])
            assert one["python_type"]["description"], (name, one["label"])


def test_the_texts_of_an_endpoint(client):
    about = client.view_api(return_format="dict")["named_endpoints"]
    types = {one["parameter_name"]: one["python_type"]["type"] for one in about["/attribute"]["parameters"]}
    assert types["words"] == types["picture"] == "str"
    assert types["tau"] == "None | float"
    assert types["crf"] == "bool"
    assert types["tokens"] == "None | list[str]"
    assert types["token_files"] == "None | list[filepath]"
    assert all(f"'{name}'" in types["method"] for name in METHODS)
    returns = {one["label"]: one["python_type"]["type"] for one in about["/attribute"]["returns"]}
    assert returns == {
        "heatmaps": "list[filepath]",
        "masks": "list[filepath]",
        "measures": "dict(str, Any)",
        "facts": "str",
    }
    defaults = {one["parameter_name"]: one["parameter_default"] for one in about["/generate"]["parameters"]}
    assert defaults == dict.fromkeys(ENDPOINTS["/generate"]) | {
        "negative_prompt": "",
        "seed": 0,
        "guidance_kind": "plain",
    }
    needed = [one["parameter_name"] for one in about["/point"]["parameters"] if not one["parameter_has_default"]]
    assert needed == ["x", "y"]


@pytest.mark.parametrize("name", ["begin", "run", "redraw", "take_canvas", "api_generate", "leave"])
def test_handlers_of_the_page_are_no_endpoints(client, name):
    with pytest.raises(ValueError, match="Cannot find a function"):
        client.predict(api_name=f"/{name}")


# ------------------------------------------------------------------------------------------------------- pictures


def test_generate_gives_an_id_an_image_and_facts(generated):
    key, image, facts = generated
    assert re.fullmatch(r"[\w-]{24}", key)
    assert Image.open(image).size == (SIDE, SIDE)
    assert f"seed 1 · {STEPS} steps" in facts
    assert "cpu" in facts


def test_generate_makes_what_the_model_makes(generated, ovam, client):
    more = {"num_inference_steps": STEPS, "guidance_scale": 4, "width": SIDE, "height": SIDE}
    expected = ovam.generate(PROMPT, seed=1, **more)
    assert np.array_equal(np.asarray(Image.open(generated[1])), np.asarray(expected.image))
    again, image, _ = client.predict(**IMAGE, api_name="/generate")
    assert again != generated[0]
    assert np.array_equal(np.asarray(Image.open(image)), np.asarray(expected.image))


def test_what_is_left_out_is_the_models_own(client, ovam, monkeypatch, picture):
    asked = []
    monkeypatch.setattr(OVAM, "draw", lambda _, settings, **more: asked.append(settings) or picture)
    client.predict("A cat", api_name="/generate")
    preset = ovam.preset
    made = asked[0]
    assert (made.prompt, made.negative_prompt, made.seed) == ("A cat", "", 0)
    assert (made.steps, made.guidance) == (preset.steps, preset.guidance)
    assert (made.width, made.height) == (preset.width, preset.height)


def test_a_photograph(client, ovam, tmp_path):
    photo = Image.new("RGB", (1500, 1000), "#88aacc")
    ImageDraw.Draw(photo).ellipse([400, 200, 1000, 800], fill="#aa5500")
    photo.save(tmp_path / "photo.png")
    key, image, facts = client.predict(handle_file(tmp_path / "photo.png"), words="cat, car", api_name="/photograph")
    assert Image.open(image).size == (MAX_SHOWN, round(MAX_SHOWN / 1.5))
    assert "“A photograph of a cat and a car”" in facts
    masks = client.predict("cat", key, crf=False, api_name="/attribute")[1]
    assert Image.open(masks[0]).size == (1500, 1000)
    expected = ovam.segment(
        ovam.photograph(tmp_path / "photo.png", "A photograph of a cat and a car"), "cat", crf=False
    )
    assert np.array_equal(np.asarray(Image.open(masks[0])) > 0, expected.masks[0])


def test_a_page_s_first_picture_has_an_id_too(client, sessions, picture):
    sessions.first = picture
    assert client.predict("cat", "first", crf=False, api_name="/attribute")[2]["words"] == ["cat"]


# ---------------------------------------------------------------------------------------------- who knows a picture


def test_who_knows_the_id_may_ask(address, generated):
    other = connect(address)
    measures = attribute(other, "cat, car", picture=generated[0], crf=False)[2]
    assert measures["words"] == ["cat", "car"]
    with pytest.raises(AppError, match=r"^There is no picture 'no-such' here \(any more\); make one"):
        attribute(other, picture="no-such")
    with pytest.raises(AppError, match="generate one first"):
        attribute(other)


def test_without_an_id_it_is_the_last_picture_of_the_session(address, generated):
    own = connect(address)
    first, _, _ = own.predict(**IMAGE, api_name="/generate")
    second, _, _ = own.predict(**IMAGE | {"seed": 2}, api_name="/generate")
    peaks = [attribute(own, picture=key, crf=False)[2]["peaks"] for key in (first, second, "")]
    assert peaks[0] != peaks[1] == peaks[2]


def test_a_call_without_a_session_gives_a_picture_for_another(address):
    def call(name, *values):
        event = httpx.post(f"{address}gradio_api/call/{name}", json={"data": values}).json()["event_id"]
        answer = httpx.get(f"{address}gradio_api/call/{name}/{event}", timeout=120).text
        return json.loads(answer.split("event: complete\ndata: ")[1])

    key = call("generate", "A cat", "", 1, 1, 4, 64, 64, "plain")[0]
    assert call("point", 3, 4, "cat, dog", key)[0][0].keys() == {"word", "value"}


def test_a_picture_that_is_used_stays_with_its_owner_and_goes_after():
    now = SimpleNamespace(time=0.0)
    made = Sessions("m", Bounds(unconnected=100, seconds=150), clock=lambda: now.time)
    key = made.of(SimpleNamespace(session_hash="ann")).keep(SimpleNamespace(nbytes=1))
    for now.time in (90.0, 180.0, 270.0):
        assert made.picture_of(key).nbytes == 1
    now.time = 371.0
    with pytest.raises(InputError, match=f"no picture '{key}' here"):
        made.picture_of(key)
    made.close()


def test_to_hang_up_stops_the_work_and_leaves_the_pictures():
    made = Sessions("m")
    session = made.of(SimpleNamespace(session_hash="ann"))
    key = session.keep(SimpleNamespace(nbytes=1))
    with session.run("work") as stop:
        made.hang_up("bob")
        assert not stop.is_set()
        made.hang_up("ann")
        assert stop.is_set()
    assert made.picture_of(key)
    assert not session.left
    made.close()


# ----------------------------------------------------------------------------------------------- what is in them


def test_attribute_says_what_the_library_says(client, generated, picture, ovam):
    heatmaps, masks, measures, facts = attribute(client, "cat, the red bus", picture=generated[0])
    found = ovam.segment(picture, ["cat", "the red bus"])
    assert measures["words"] == found.labels
    assert measures["peaks"] == [round(peak, 4) for peak in found.peaks]
    assert measures["presence"] == pytest.approx(found.presence, abs=1e-3)
    assert measures["mask_shares"] == [round(float(mask.mean()), 4) for mask in found.masks]
    for file, mask in zip(masks, found.masks, strict=True):
        assert np.array_equal(np.asarray(Image.open(file)) == 255, mask)
    image, top = on_screen(picture.image), max(found.peaks)
    for file, heatmap in zip(heatmaps, found.heatmaps, strict=True):
        drawn = np.asarray(plot.overlay(image, heatmap, top), int)
        assert np.abs(np.asarray(Image.open(file), int) - drawn).mean() < 3  # WebP loses a little
    assert [file.rpartition("/")[2] for file in heatmaps] == ["heatmap_cat.webp", "heatmap_the-red-bus.webp"]
    assert facts.startswith("2 maps by OVAM from the recording in ")


@pytest.mark.slow
def test_attribute_takes_every_setting(client, generated):
    def asked(**settings):
        return attribute(client, **{"words": "cat, car", "crf": False, **settings})[2]

    plain = asked(picture=generated[0])
    assert asked(picture=generated[0], tau=0.95)["mask_shares"] < plain["mask_shares"]
    assert asked(picture=generated[0], tau=0.95)["peaks"] == plain["peaks"]
    assert asked(picture=generated[0], alpha=0.0)["mask_shares"] != plain["mask_shares"]
    assert asked(picture=generated[0], steps="0-1")["peaks"] != plain["peaks"]
    assert asked(picture=generated[0], grids=["1/16"])["peaks"] != plain["peaks"]
    assert asked(picture=generated[0], sentence="a cat and a car")["peaks"] != plain["peaks"]
    assert asked(picture=generated[0], words="", sentence="a cat")["words"] == ["<SoT>", "a", "cat", "<EoT>"]
    assert asked(picture=generated[0], tokens=["cat · emoji-voc"])["words"] == ["cat", "car", "cat (token)"]


def test_attribute_by_every_method(client, generated):
    answers = {}
    for name in ("DAAM", "OVAM", "GoCA", "GoCA, any word", "OVAM, GoCA's weights"):
        _, _, measures, facts = attribute(client, "cat, car", picture=generated[0], method=name)
        assert measures["words"] == ["cat", "car"]
        assert f"2 maps by {name} from" in facts
        answers[name] = (*measures["peaks"], *measures["mask_shares"])
    assert len(set(answers.values())) == len(answers)
    assert answers["DAAM"][:2] == answers["OVAM"][:2]  # the same maps, cut in another way
    assert sum(answers["GoCA"][2:]) <= 1  # a pixel has one word


def test_masks_come_with_a_label_map_and_numbers(client, generated, picture, ovam):
    label_map, overview, masks, rows, facts = client.predict("cat, car", generated[0], crf=False, api_name="/masks")
    found = ovam.segment(picture, ["cat", "car"], crf=False)
    assert np.array_equal(np.asarray(Image.open(label_map)), found.label_map())
    assert Image.open(overview).size == on_screen(picture.image).size
    for number, (file, row, mask) in enumerate(zip(masks, rows, found.masks, strict=True), start=1):
        assert np.array_equal(np.asarray(Image.open(file)) == 255, mask)
        ys, xs = np.nonzero(mask)
        assert (row["word"], row["label"]) == (found.labels[number - 1], number)
        assert row["pixels"] == mask.sum()
        assert row["share"] == round(float(mask.mean()), 4)
        assert row["box"] == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
    assert "2 maps by OVAM" in facts


def test_an_empty_mask_has_no_box():
    masks = np.zeros((2, 4, 6), bool)
    masks[1, 1:3, 2:] = True
    found = Segmentation(["cat", "car"], np.full((2, 4, 6), 0.5, np.float32), masks, None, SegmentSettings())
    none, some = _rows(found, {"cat": "#000000", "car": "#ffffff"})
    assert (none["pixels"], none["share"], none["box"]) == (0, 0.0, None)
    assert (some["label"], some["pixels"], some["share"], some["box"]) == (2, 8, 0.3333, [2, 1, 6, 3])


def test_point_ranks_words_by_their_maps(client, generated, picture, ovam):
    found = ovam.answer(picture, SegmentSettings(("cat", "car", "grass"), crf=False))
    ranked = client.predict(20, 50, "cat, car, grass", generated[0], api_name="/point")
    expected = [(found.labels[row], round(value, 4)) for row, value in claims(found.heatmaps, 20, 50)]
    assert [(one["word"], one["value"]) for one in ranked] == expected


def test_point_knows_words_of_its_own(client, generated):
    ranked = client.predict(0, SIDE - 1, picture=generated[0], api_name="/point")
    words = [one["word"] for one in ranked]
    assert {"cat", "car", "grass", "sheep", "aeroplane"} <= set(words)
    assert len(words) == len(set(words)) <= MAX_WORDS
    assert not {"photograph", "a", "of"} & set(words)
    assert [one["value"] for one in ranked] == sorted((one["value"] for one in ranked), reverse=True)


def test_point_asks_no_more_of_a_photograph_than_a_screen_shows(sessions, ovam, monkeypatch):
    """Of one with 25 megapixels, the maps of 32 words would have 3 gigabytes."""
    scene = Image.effect_noise((2 * MAX_SHOWN, MAX_SHOWN), 60).convert("RGB")
    photo = ovam.photograph(scene, "a cat and a car")
    key = sessions.of(SimpleNamespace(session_hash="ann")).keep(photo)
    sizes, answer = [], OVAM.answer

    def watched(self, picture, *given, **more):
        sizes.append(picture.image.size)
        return answer(self, picture, *given, **more)

    monkeypatch.setattr(OVAM, "answer", watched)
    with gr.Blocks():
        programs = Programs(Model(ovam, sessions))
    for x, y in ((1500, 700), (0, 0), (2 * MAX_SHOWN - 1, MAX_SHOWN - 1)):
        found = programs.point(SimpleNamespace(session_hash="ann", headers={}), x, y, "cat, car", key)
        whole = answer(ovam, photo, SegmentSettings(("cat", "car"), crf=False))
        expected = {whole.labels[row]: value for row, value in claims(whole.heatmaps, x, y)}
        assert {one["word"]: one["value"] for one in found} == pytest.approx(expected, abs=0.005)
    assert sizes == [(MAX_SHOWN, MAX_SHOWN // 2)] * 3


def test_no_more_files_are_decoded_at_a_time_than_the_page_decodes(sessions, ovam, monkeypatch):
    """Whoever makes 64 calls at a time would hold 64 pictures of 25 megapixels."""
    with gr.Blocks():
        programs = Programs(Model(ovam, sessions))
    under_way, most, decoded = [], [], []

    def decode(*_):
        under_way.append(None)
        most.append(len(under_way))
        time.sleep(0.05)
        under_way.pop()
        decoded.append(None)
        raise InputError("no picture")

    for name in ("check_photo", "read_mask"):
        monkeypatch.setattr(tabs.programs, name, decode)
    monkeypatch.setattr(Programs, "_path", lambda *_: __file__)
    ann = SimpleNamespace(session_hash="ann", headers={})
    key = sessions.of(ann).keep(SimpleNamespace(nbytes=1, image=Image.new("RGB", (8, 8))))

    def call(*given):
        with pytest.raises(gr.Error, match="no picture"):
            given[0](ann, None, *given[1:])

    calls = [(programs.photograph, "a cat"), (programs.optimize, "cat", key)] * 6
    threads = [threading.Thread(target=call, args=one) for one in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(decoded) == 12
    assert max(most) == DECODED


@pytest.mark.parametrize(("large", "order"), [(0, ["ann", "bob"]), (10**9, ["bob", "ann"])])
def test_a_large_answer_keeps_its_turn(sessions, ovam, picture, monkeypatch, large, order):
    """Else each of those that wait would hold its own, at the size of the picture."""
    monkeypatch.setattr(tabs.programs, "LARGE", large)
    monkeypatch.setattr(tabs.model, "SHORT", 0.0)
    with gr.Blocks():
        programs = Programs(Model(ovam, sessions))
    key, done = sessions.of(SimpleNamespace(session_hash="ann")).keep(picture), []
    turns = programs.model.answering

    def other():
        with programs.model.words_of(sessions.of(SimpleNamespace(session_hash="bob"))):
            done.append("bob")

    ann = SimpleNamespace(session_hash="ann", headers={})
    with programs._found(ann, Question("cat", picture=key, crf=False)) as (_, before_word):
        thread = threading.Thread(target=other)
        thread.start()
        while not turns._ring:
            time.sleep(0.01)
        before_word()
        done.append("ann")
    thread.join()
    assert done == order


def test_the_archive_has_everything(client, generated, picture, ovam, tmp_path):
    file = client.predict("cat", generated[0], crf=False, tokens=["cat · emoji-voc"], api_name="/archive")
    with zipfile.ZipFile(file) as archive:
        names = set(archive.namelist())
        maps = np.load(io.BytesIO(archive.read("heatmaps.npz")))["maps"]
    assert {
        "image.png",
        "heatmaps.npz",
        "settings.json",
        "labels.png",
        "mask_cat.png",
        "token_cat.safetensors",
    } <= names
    assert np.allclose(maps[0], ovam.segment(picture, "cat", crf=False).heatmaps[0], atol=1e-6)


# --------------------------------------------------------------------------------------------------------- tokens


def test_a_token_is_learned_and_asked_for(client, generated, square):
    file, name, measures, verdict = client.predict(
        handle_file(square), "cat", generated[0], epochs=6, api_name="/optimize"
    )
    token = Token.load(file)
    assert (token.names, token.prompt, token.seed, token.model) == (("cat",), PROMPT, 1, "emoji-voc")
    assert name == "cat · yours"
    assert name == client.predict(api_name="/tokens")[0]
    assert measures["loss"] < measures["first_loss"]
    assert abs(token.loss - measures["loss"]) < 1e-3
    assert measures["epochs"] == 6
    assert f"{measures['word_iou']:.2f} the word, {measures['token_iou']:.2f} its token" in verdict
    by_name = attribute(client, "cat", picture=generated[0], tokens=[name], crf=False)[2]
    by_file = attribute(client, "cat", picture=generated[0], token_files=[handle_file(file)], crf=False)[2]
    assert by_name == by_file
    assert by_name["words"] == ["cat", "cat (token)"]


def test_a_token_of_another_session_goes_by_its_file_alone(client, generated, square, address):
    file, name, *_ = client.predict(handle_file(square), "cat", generated[0], epochs=1, api_name="/optimize")
    other = connect(address)
    with pytest.raises(AppError, match="There is no token 'cat · yours' here"):
        attribute(other, picture=generated[0], tokens=[name])
    asked = attribute(other, "", picture=generated[0], token_files=[handle_file(file)], crf=False)
    assert asked[2]["words"] == ["cat"]


def test_a_token_learned_on_from_a_picture_without_a_mask(client, generated, square):
    file, *_, line = client.predict(
        handle_file(square), "cat", generated[0], epochs=2, unlabelled=1, api_name="/optimize"
    )
    token = Token.load(file)
    assert json.loads(token.settings)["optimization"]["unlabelled"] == 1
    assert token.names == ("cat",)
    assert "in 2 epochs" in line


def test_tokens_are_listed(client, sessions):
    assert set(sessions.shipped) <= set(client.predict(api_name="/tokens"))


# ------------------------------------------------------------------------------------------------- bad arguments

BAD_IMAGES = {
    "empty prompt": ({"prompt": ""}, "prompt is empty"),
    "long prompt": ({"prompt": "x" * 10_000}, "10,000 characters"),
    "too long a prompt": ({"prompt": "x" * 30_000}, "Prompt has 30,000 characters; at most 20,000"),
    "prompt past the encoder": ({"prompt": "cat " * 90}, "tokens"),
    "a prompt that is a list": ({"prompt": ["cat"]}, "Prompt is a list; write text"),
    "no steps": ({"steps": 0}, "steps is 0; choose a whole number from 1 to 200"),
    "too many steps": ({"steps": 100_000}, "steps is 100000; choose"),
    "part of a step": ({"steps": 2.5}, "Steps is 2.5; give a whole number"),
    "size not a multiple": ({"width": 100}, "multiple of 8"),
    "size too large": ({"height": 8192}, "height is 8192; choose"),
    "a width that is no number": ({"width": {"a": 1}}, "Width is an object; give a number"),
    "guidance nan": ({"guidance": "NaN"}, "Guidance is NaN; give a number"),
    "seed below 0": ({"seed": -1}, "seed is -1; choose"),
    "no seed": ({"seed": None}, "Seed is None; give a number"),
    "seed not whole": ({"seed": 1.5}, "Seed is 1.5; give a whole number"),
    "seed nan": ({"seed": "NaN"}, "Seed is NaN; give a number"),
}
BAD_WORDS = {
    "no words": ({"words": ""}, "word"),
    "words that are a number in a list": ({"words": [1]}, "Words is a list; write text"),
    "punctuation": ({"words": "?!, ..."}, "not a word"),
    "10,000 characters": ({"words": "x" * 10_000}, "10,000 characters"),
    "markup": ({"words": "cat", "sentence": "<img src=x>"}, "cat"),
    "tokens that are no list": ({"tokens": 5}, "no list of names"),
    "a token that is no name": ({"tokens": [["x"]]}, "no list of names"),
    "a token that is not there": ({"tokens": ["zebra"]}, "There is no token 'zebra'"),
    "a tau that is no number": ({"tau": [0.4]}, "Threshold is a list; give a number"),
    "too many tokens": ({"tokens": ["cat · emoji-voc"] * 100_000}, "list of too many"),
    "33 tokens": ({"tokens": ["cat · emoji-voc"] * 33}, "33 tokens are too many"),
    "tau nan": ({"tau": "NaN"}, "Threshold is NaN; give a number"),
    "alpha too large": ({"alpha": 7}, "Alpha is 7; choose a number from 0 to 1"),
    "alpha below 0": ({"alpha": -1}, "Alpha is -1; choose a number from 0 to 1"),
    "steps": ({"steps": "0-99999999999"}, "steps"),
    "a step not run": ({"steps": "150"}, f"None of these steps is in a run of {STEPS}: choose among 0 to {STEPS - 1}"),
    "no grids": ({"grids": []}, "resolution"),
    "grids that are no list": ({"grids": "1/8"}, "grids are no list"),
    "a grid not there": ({"grids": ["1/3"]}, "1/3"),
    "no such method": ({"method": "SAM"}, "SAM"),
    "a method of 100 steps": ({"method": "Attn2Mask"}, "generate an image with 100 steps"),
    "a method of tokens": ({"method": "OVAM + token"}, "choose a token"),
    "a word that is not in the prompt": ({"method": "GoCA", "words": "dog"}, "'dog' does not stand"),
    "steps of one pass": ({"method": "GoCA", "steps": "0-1"}, "name no denoising steps"),
    "a crf that is no switch": ({"crf": "yes"}, "Dense CRF is yes; give true or false"),
    "a picture that is none": ({"picture": "<b>x"}, "There is no picture '&lt;b&gt;x' here"),
    "a picture that is a list": ({"picture": ["x"]}, "Picture is a list; write text"),
    "token files that are none": ({"token_files": ["x"]}, "no file that was uploaded"),
    "token files that are no list": ({"token_files": "x"}, "no list of files"),
}
BAD_POINTS = {
    "outside": ({"x": SIDE}, f"The point {SIDE}, 4 lies outside of the picture of {SIDE}x{SIDE}"),
    "below 0": ({"y": -1}, "lies outside"),
    "a part": ({"x": 1.5}, "x is 1.5; give a whole number"),
    "nan": ({"y": "NaN"}, "y is NaN; give a number"),
    "nothing": ({"x": None}, "x is None; give a number"),
    "no word": ({"words": "?"}, "not a word"),
}
BAD_SEARCHES = {
    "too many pictures without masks": ({"unlabelled": 17}, "number of pictures without masks is 17"),
    "half a picture without a mask": ({"unlabelled": 0.5}, "Pictures without masks"),
    "no name": ({"name": ""}, "The class has no name"),
    "a list of classes": ({"name": "cat, dog"}, "not a name"),
    "no epochs": ({"epochs": 0}, "epochs is 0; choose a whole number from 1 to 500"),
    "too many": ({"epochs": 100_000}, "epochs is 100000; choose"),
    "nan": ({"epochs": "NaN"}, "Epochs is NaN; give a number"),
    "a rate that is text": ({"rate": "much"}, "Learning rate is much; give a number"),
    "no such recipe": ({"recipe": "slow"}, "no recipe 'slow'"),
    "no mask": ({"mask": None}, "There is no mask"),
    "a mask that is text": ({"mask": "/etc/passwd"}, "no file that was uploaded"),
}


def says(part: str, call) -> None:
    with pytest.raises((AppError, ValueError), match=part) as caught:
        call()
    assert "Traceback" not in str(caught.value)
    assert "<" not in str(caught.value).replace("<SoT>", "")


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_bad_images(client, case):
    wrong, part = BAD_IMAGES[case]
    says(part, lambda: client.predict(**IMAGE | wrong, api_name="/generate"))


@pytest.mark.parametrize("case", BAD_WORDS)
def test_bad_words(client, generated, case):
    wrong, part = BAD_WORDS[case]
    asked = {"words": "cat", "picture": generated[0], **wrong}
    says(part, lambda: client.predict(**asked, api_name="/attribute"))


@pytest.mark.parametrize("case", ["punctuation", "tau nan", "a picture that is none", "token files that are none"])
@pytest.mark.parametrize("name", ["masks", "archive"])
def test_bad_words_elsewhere(client, generated, case, name):
    wrong, part = BAD_WORDS[case]
    asked = {"words": "cat", "picture": generated[0], **wrong}
    says(part, lambda: client.predict(**asked, api_name=f"/{name}"))


@pytest.mark.parametrize("case", BAD_POINTS)
def test_bad_points(client, generated, case):
    wrong, part = BAD_POINTS[case]
    asked = {"x": 3, "y": 4, "words": "cat", "picture": generated[0], **wrong}
    says(part, lambda: client.predict(**asked, api_name="/point"))


@pytest.mark.parametrize("case", BAD_SEARCHES)
def test_bad_searches(client, generated, square, case):
    wrong, part = BAD_SEARCHES[case]
    asked = {"mask": handle_file(square), "name": "cat", "picture": generated[0], "epochs": 1, **wrong}
    says(part, lambda: client.predict(**asked, api_name="/optimize"))


def test_masks_that_do_not_fit(client, generated, tmp_path):
    Image.new("L", (SIDE, SIDE)).save(tmp_path / "empty.png")
    Image.new("L", (SIDE, SIDE // 2), 255).save(tmp_path / "flat.png")
    (tmp_path / "text.png").write_text("no picture")
    for name, said in (("empty.png", "empty"), ("flat.png", "shapes differ"), ("text.png", "not a picture")):
        file = handle_file(tmp_path / name)
        says(said, lambda file=file: client.predict(file, "cat", generated[0], api_name="/optimize"))


def test_files_of_the_server_are_no_uploads(address):
    """As a program would ask that does without the client, which uploads what a path names."""
    for meta in ({}, {"meta": {"_type": "gradio.FileData"}}):
        file = {"path": __file__, **meta}
        asked = {"photograph": [file, "", "100", 0, "cat"], "optimize": [file, "cat", "", "fast", 1, None, 0]}
        asked["attribute"] = ["cat", "", "", None, None, True, "", None, None, [file], "OVAM"]
        for name, values in asked.items():
            event = httpx.post(f"{address}gradio_api/call/{name}", json={"data": values}).json()["event_id"]
            answer = httpx.get(f"{address}gradio_api/call/{name}/{event}", timeout=60).text
            assert answer.startswith("event: error")
            assert __file__ not in answer


# What a program could send, as small as it can be, by the names of parameters.
USUAL = {"prompt": "A cat", "words": "cat", "name": "cat", "x": 1, "y": 1, "seed": 0, "epochs": 1}


@pytest.mark.slow
@pytest.mark.parametrize("name", ENDPOINTS)
def test_every_bad_value_in_every_place(ovam, picture, square, monkeypatch, name):
    """Past every check stand answers that cost nothing."""
    sessions = Sessions(ovam.name)
    with gr.Blocks() as page:
        Programs(Model(ovam, sessions))
    watch(page, {})
    event = next(one for one in page.fns.values() if one.api_name == name[1:])
    found = ovam.segment(picture, "cat", crf=False)
    monkeypatch.setattr(OVAM, "draw", lambda *_, **__: picture)
    monkeypatch.setattr(OVAM, "look_at", lambda *_, **__: picture)
    monkeypatch.setattr(OVAM, "answer", lambda *_, **__: found)
    monkeypatch.setattr("tabs.programs._webp", lambda _: b"")
    monkeypatch.setattr("tabs.programs.plot.overlay", lambda *_: None)
    monkeypatch.setattr(Segmentation, "save_zip", lambda _, path: path.write_bytes(b"zip") and path)
    sent = Path(page.GRADIO_CACHE) / "malformed.png"
    sent.parent.mkdir(parents=True, exist_ok=True)
    sent.write_bytes(Path(square).read_bytes())
    file = {"path": str(sent), "meta": {"_type": "gradio.FileData"}}
    request, wrong = SimpleNamespace(session_hash="malformed"), []
    session = sessions.of(request)

    def learned(*_, made=None):
        raise InputError("Learned.")

    monkeypatch.setattr("tabs.programs.learn", learned)

    async def try_all():
        for place, parameter in enumerate(ENDPOINTS[name]):
            for kind, value in BAD.items():
                given = USUAL | {"picture": session.keep(picture), "photo": file, "mask": file}
                values = [given.get(one, field.value) for one, field in zip(ENDPOINTS[name], event.inputs, strict=True)]
                values[place] = value
                try:
                    await page.process_api(event, values, SessionState(page), request)
                except gr.Error as error:
                    if not is_sentence(error.message) or "<img" in error.message:
                        wrong.append((parameter, kind, error.message))
                except Exception as error:
                    wrong.append((parameter, kind, repr(error)))

    asyncio.run(try_all())
    sessions.close()
    assert wrong == []


def test_a_picture_with_no_prompt_is_asked_for_words(ovam, sessions, picture):
    with gr.Blocks():
        programs = Programs(SimpleNamespace(ovam=ovam, sessions=SimpleNamespace(shipped={})))
    with pytest.raises(InputError, match="give some words"):
        programs._usual_words(SimpleNamespace(caption=""))
    assert programs._usual_words(picture) == ("cat", "car", "grass")


def test_no_file_of_a_failed_answer_stays(client, generated, sessions, blocks, monkeypatch):
    def folders():
        return set(blocks_cache.glob("answer-*"))

    blocks_cache = Path(blocks.GRADIO_CACHE)
    attribute(client, picture=generated[0], crf=False)
    before = folders()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tabs.programs.plot.mask_image", full)
    with pytest.raises(AppError, match="disk is full"):
        attribute(client, picture=generated[0], crf=False)
    assert folders() == before


def test_a_bug_is_our_fault_and_keeps_its_traceback(client, monkeypatch, caplog):
    def wrong(*_, **__):
        raise ValueError("axis 7 of <secret>")

    monkeypatch.setattr(OVAM, "draw", wrong)
    with caplog.at_level(logging.ERROR, "ovam"), pytest.raises(AppError) as caught:
        client.predict(**IMAGE, api_name="/generate")
    assert str(caught.value) == OUR_FAULT
    assert "Traceback" in caplog.text
    assert "axis 7 of <secret>" in caplog.text


def test_stop_ends_a_generation(address):
    one = connect(address)
    job = one.submit(**IMAGE | {"steps": 200}, api_name="/generate")
    for _ in range(400):  # until the first step is counted
        if job.status().progress_data:
            break
        time.sleep(0.05)
    one.predict(api_name="/stop")
    with pytest.raises(AppError, match=r"Stopped after \d+ of 200 steps"):
        job.result(timeout=120)


# ------------------------------------------------------------------------------------------------------------ MCP


def speak(address: str, talk):
    """What the coroutine `talk(session)` gives, in a session of MCP."""
    from mcp import ClientSession
    from mcp.client.streamable_http import streamable_http_client

    async def main():
        connection = streamable_http_client(f"{address}gradio_api/mcp/")
        async with connection as (read, write, _), ClientSession(read, write) as session:
            await session.initialize()
            return await talk(session)

    return asyncio.run(main())


def call(address: str, tool: str, **arguments):
    return speak(address, lambda session: session.call_tool(tool, arguments))


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


def texts(result) -> list[str]:
    return [one.text for one in result.content if one.type == "text"]


def images(result) -> list[Image.Image]:
    return [Image.open(io.BytesIO(base64.b64decode(one.data))) for one in result.content if one.type == "image"]


def refused(result) -> str:
    assert result.isError
    (sentence,) = texts(result)
    return sentence


def test_there_are_these_tools_and_no_other(address):
    found = speak(address, lambda session: session.list_tools()).tools
    assert sorted(tool.name for tool in found) == TOOLS
    for tool in found:
        schema, endpoint = tool.inputSchema, ENDPOINTS[f"/{tool.name}"]
        assert list(schema["properties"]) == endpoint
        assert all(one["description"] for one in schema["properties"].values())
        assert all({"type", "oneOf", "enum"} & set(one) for one in schema["properties"].values())
        assert not schema["additionalProperties"]
        assert len(tool.description) > 60
        assert "upload_file_to_gradio" not in tool.description
    of = {tool.name: tool.inputSchema for tool in found}
    assert of["generate"]["required"] == ["prompt"]
    assert of["point"]["required"] == ["x", "y"]
    assert of["photograph"]["properties"]["photo"]["type"] == "string"
    assert of["attribute"]["properties"]["method"]["enum"] == list(METHODS)
    assert of["optimize"]["properties"]["recipe"]["enum"] == list(RECIPES)
    assert httpx.get(f"{address}gradio_api/mcp/schema").status_code == 200


def test_a_model_makes_a_picture_and_gets_its_masks(address, ovam, sessions):
    async def talk(session):
        made = await session.call_tool("generate", IMAGE)
        key = texts(made)[0]
        masks = await session.call_tool("masks", {"words": "cat, car", "picture": key, "crf": False})
        maps = await session.call_tool("attribute", {"words": "cat", "picture": key, "crf": False})
        point = await session.call_tool("point", {"x": 20, "y": 50, "words": "cat, car", "picture": key})
        return made, masks, maps, point

    made, masks, maps, point = speak(address, talk)
    assert not any(one.isError for one in (made, masks, maps, point))
    picture = sessions.picture_of(texts(made)[0])
    assert np.array_equal(np.asarray(images(made)[0]), np.asarray(picture.image))
    found = ovam.segment(picture, ["cat", "car"], crf=False)
    label_map, _, *each = images(masks)
    assert np.array_equal(np.asarray(label_map), found.label_map())
    assert [np.array_equal(np.asarray(one) == 255, mask) for one, mask in zip(each, found.masks, strict=True)] == [
        True
    ] * 2
    numbers = json.loads(next(text for text in texts(masks) if text.startswith("[")))
    assert [(one["word"], one["pixels"]) for one in numbers] == list(
        zip(found.labels, found.masks.sum((1, 2)), strict=True)
    )
    assert [one.format for one in images(maps)] == ["WEBP", "PNG"]
    ranked = [(found.labels[row], round(value, 4)) for row, value in claims(found.heatmaps, 20, 50)]
    assert [(one["word"], one["value"]) for one in json.loads(texts(point)[0])] == ranked


def test_steps_are_told_as_they_go(address):
    told = []

    async def note(_done, _total, message):
        told.append(message)

    result = speak(address, lambda session: session.call_tool("generate", IMAGE, progress_callback=note))
    assert images(result)[0].size == (SIDE, SIDE)
    assert f"Progress Denoising: Step {STEPS} of {STEPS}" in told


@pytest.mark.slow
def test_files_come_as_data_or_from_another_tool(address, square):
    made = call(address, "generate", **IMAGE)
    data = base64.b64encode(Path(square).read_bytes()).decode()
    for photo in (f"data:image/png;base64,{data}", texts(made)[1].removeprefix("Image URL: ")):
        assert images(call(address, "photograph", photo=photo, words="cat"))[0].size == (SIDE, SIDE)
    mask = f"data:image/png;base64,{data}"
    learned = call(address, "optimize", mask=mask, name="cat", picture=texts(made)[0], epochs=2)
    token, name, measures, _ = texts(learned)
    assert name == "cat · yours"
    assert json.loads(measures)["epochs"] == 2
    asked = call(address, "attribute", words="cat", picture=texts(made)[0], token_files=[token], crf=False)
    assert len(images(asked)) == 4  # heatmap and mask of the word and of its token


@pytest.mark.parametrize(
    ("tool", "arguments", "said"),
    [
        ("generate", {"prompt": ""}, "The prompt is empty; describe the picture in a few words."),
        ("generate", {}, "generate lacks its prompt; give it."),
        ("generate", {"prompt": "cat", "steps": "many"}, "Steps is many; give a number."),
        ("generate", {"prompt": "cat", "seed": -1}, "The seed is -1; choose a whole number from 0 to 4294967295."),
        ("generate", {"prompt": "cat", "size": 5}, "generate knows no 'size'; it takes prompt, negative_prompt, "),
        ("masks", {"words": "cat", "picture": "none"}, "There is no picture 'none' here (any more); make one, and "),
        ("masks", {"words": "cat"}, "There is no recorded image in this session (any more); generate one first."),
        ("point", {"x": 1}, "point lacks its y; give it."),
        ("photograph", {"photo": "cat.png"}, tools.NO_FILE),
        ("photograph", {"photo": "https://example.com/cat.png", "words": "cat"}, tools.NO_FILE),
        ("photograph", {"photo": "data:image/png;base64,@@", "words": "cat"}, tools.NO_FILE),
        ("photograph", {"photo": nested(100), "words": "cat"}, "Photo is a list of too many things; at most 1,000"),
        (
            "photograph",
            {"photo": "data:image/png;base64,bm8=", "words": "cat"},
            "'file.png' is not a picture that can be",
        ),
        ("photograph", {"photo": "http://here/file=/etc/passwd", "words": "cat"}, "This is no file that was uploaded"),
        ("stop", {}, "There is no tool 'stop' here; choose among "),
        ("begin", {}, "There is no tool 'begin' here; choose among "),
    ],
)
def test_a_bad_argument_gives_one_sentence(address, tool, arguments, said):
    assert refused(call(address, tool, **arguments)).startswith(said)


def test_each_call_of_a_tool_is_a_visitor_of_its_own(address, sessions):
    """Nobody's pictures push another's out, and nobody waits for another's works."""
    owners = []
    for _ in range(2):
        key = texts(call(address, "generate", **IMAGE | {"steps": 1, "width": 64, "height": 64}))[0]
        owners.append(sessions.pictures._kept[key].owner)
    assert owners[0] is not owners[1]


def test_a_tool_stops_where_its_caller_hangs_up(address, monkeypatch):
    began, ended = threading.Event(), threading.Event()

    def draw(_ovam, settings, *, should_stop=None, **more):
        began.set()
        for _ in range(600):
            if should_stop():
                ended.set()
                break
            time.sleep(0.05)
        raise InputError("stopped")

    monkeypatch.setattr(OVAM, "draw", draw)
    body = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": "generate", "arguments": IMAGE}}
    headers = {"accept": "application/json, text/event-stream"}
    url = f"{address}gradio_api/mcp/"
    with httpx.Client(timeout=60) as http, http.stream("POST", url, json=body, headers=headers) as answer:
        assert answer.status_code == 200
        assert began.wait(30)
        assert not ended.is_set()
    assert ended.wait(30)


def doors(inner, **request) -> httpx.Response:
    """The answer of Doors before an app, to a request of MCP's."""
    page = SimpleNamespace(fns={}, GRADIO_CACHE="/nowhere")
    door = Doors(inner, page, Sessions("m"), 1000)

    async def ask():
        transport = httpx.ASGITransport(door)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as http:
            return await http.request(**{"method": "POST", "url": "/gradio_api/mcp/", **request})

    return asyncio.run(ask())


async def echo(scope, receive, send):
    """Answers with the headers that came."""
    body = b"".join([(await receive())["body"]])
    shown = {name.decode(): value.decode() for name, value in scope["headers"]} | {"length": str(len(body))}
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": json.dumps(shown).encode()})


def test_calls_of_tools_are_bounded_and_named():
    names = [doors(echo, json={"a": 1}).json()[tools.VISITOR] for _ in range(2)]
    assert all(re.fullmatch(r"[0-9a-f]{32}", name) for name in names)
    assert names[0] != names[1]
    assert doors(echo, content=b"x" * (5 << 20)).status_code == 413
    assert doors(echo, method="GET", headers={"accept": "text/event-stream"}).status_code == 405
    assert doors(echo, method="DELETE").status_code == 405
    assert doors(echo, method="GET").status_code == 200
    for closed in ("sse", "messages/", "messages/?session_id=x"):
        assert doors(echo, url=f"/gradio_api/mcp/{closed}").status_code == 404


@pytest.mark.parametrize(("name", "status"), [("ann", 200), ("../x", 400), ("x" * 65, 400), ("", 400)])
def test_nobody_names_the_visitor_of_a_tool(name, status):
    shown = doors(echo, json={"a": 1}, headers={tools.VISITOR: name})
    assert re.fullmatch(r"[0-9a-f]{32}" if status == 200 else "400", shown.json().get(tools.VISITOR, "400"))
    assert doors(echo, url="/gradio_api/queue/data", headers={tools.VISITOR: name}).status_code == status


def test_no_more_tools_work_at_a_time():
    page = SimpleNamespace(fns={}, GRADIO_CACHE="/nowhere")

    async def ask():
        go = asyncio.Event()

        async def slow(scope, receive, send):
            await go.wait()
            await echo(scope, receive, send)

        transport = httpx.ASGITransport(Doors(slow, page, Sessions("m"), 1000))
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as http:
            calls = [asyncio.create_task(http.post("/gradio_api/mcp/", json={})) for _ in range(MAX_TOOL_CALLS)]
            await asyncio.sleep(0.2)
            refused = (await http.post("/gradio_api/mcp/", json={"id": 7})).json()
            go.set()
            answered = [(await one).json() for one in calls]
            return refused, answered, (await http.post("/gradio_api/mcp/", json={})).json()

    refused, answered, later = asyncio.run(ask())
    assert (refused["id"], refused["error"]["message"]) == (7, MANY_CALLS)
    assert all(tools.VISITOR in one for one in [*answered, later])


def test_without_the_package_the_page_says_so_and_starts(monkeypatch, caplog):
    monkeypatch.setattr(tools, "find_spec", lambda name: None)
    with caplog.at_level(logging.WARNING, "ovam"):
        assert not tools.can_serve_tools()
    assert "pip install 'gradio[mcp]'" in caplog.text
    tools.adapt(SimpleNamespace(mcp_server_obj=None))
    monkeypatch.setattr("gradio.networking.url_ok", lambda url: True)
    with gr.Blocks() as page:
        gr.Markdown("here")
    page.sessions, page.most_text = Sessions("m"), 1000
    _, url, _ = app.launch(page, server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    try:
        assert httpx.get(url).status_code == 200
        assert httpx.post(f"{url}gradio_api/mcp/", json={}).status_code in (404, 405)
    finally:
        page.close()
        page.sessions.close()


def test_the_example_of_the_documents(address, picture, monkeypatch):
    monkeypatch.setattr(OVAM, "draw", lambda *_, **__: picture)
    page = (Path(__file__).parent.parent / "docs" / "api.md").read_text(encoding="utf-8")
    example = re.search(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)[1]
    names: dict = {}
    exec(example.replace("http://127.0.0.1:7860/", address), names)
    assert [one["word"] for one in names["ranked"]]
    assert names["name"] == "cat · yours"
    listed = set(re.findall(r"^\| `(/\w+)` \|", page, re.MULTILINE))
    assert listed == set(ENDPOINTS)
