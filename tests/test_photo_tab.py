"""Photographs on the page: the fields as they are read, the API, and the way of a visitor in a browser."""

from __future__ import annotations

import io
import json
import zipfile
from contextlib import nullcontext

import httpx
import numpy as np
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from page import (
    set_words,
    shoot,
    shown,
    until,
    upload,
    upload_mask,
    wait_for_chips,
    wait_for_picture,
)
from PIL import Image, ImageDraw

from ovam_core import OVAM, InputError, Token
from ovam_core.attention.heatmap import heatmaps
from ovam_core.io.masks import read_mask
from ovam_core.optimization import OptimizeSettings, initial_embedding, optimize
from ovam_core.settings import PhotoSettings, SegmentSettings
from tabs.canvas import UPLOAD, read_any
from tabs.fields import photo_settings, takes_photographs
from tabs.generate import zip_name
from tabs.optimize import picture_mail, preview, search
from tabs.render import MAX_SHOWN, image_facts, on_screen, shrunk
from tabs.verdict import agreement

CAT = SegmentSettings(words=("cat", "red car"))


def scene(width: int, height: int) -> Image.Image:
    """Grass with an orange blob and a red box on it."""
    picture = Image.new("RGB", (width, height), "#5a9a3c")
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, 0, width, height // 3), fill="#9cc9f0")
    draw.ellipse((width // 8, height // 3, width // 2, height * 3 // 4), fill="#e69f00")
    draw.rectangle((width * 5 // 8, height // 2, width * 7 // 8, height * 3 // 4), fill="#c02020")
    return picture


def turned(path, width: int, height: int) -> str:
    """A file of the scene whose pixels lie on their side and whose EXIF orientation says so."""
    exif = Image.Exif()
    exif[0x0112] = 6
    scene(width, height).transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    return str(path)


@pytest.fixture
def photo(tmp_path) -> str:
    return turned(tmp_path / "cat.jpg", 300, 200)


@pytest.fixture
def mask(tmp_path) -> str:
    """Of the blob, at the photograph's size."""
    picture = Image.new("L", (300, 200))
    ImageDraw.Draw(picture).ellipse((37, 66, 150, 150), fill=255)
    picture.save(tmp_path / "mask.png")
    return str(tmp_path / "mask.png")


# ----------------------------------------------------------------------------------------------- the parts


@pytest.fixture(scope="module")
def random_ovam(tiny):
    """Of random weights: the maths is the real one."""
    return OVAM(tiny)


def test_an_empty_caption_is_made_of_the_words(random_ovam):
    def settings(*given):
        return photo_settings(random_ovam, *given)

    assert settings("", "", 3, CAT) == PhotoSettings("A photograph of a cat and a red car", (100,), 3)
    assert settings(" my\n cat ", "300, 50", 0, CAT) == PhotoSettings("my cat", (50, 300), 0)
    sentence = SegmentSettings(words=("cat",), sentence="a cat on grass")
    assert settings("", "100", 0, sentence).caption == "a cat on grass"


@pytest.mark.parametrize("timesteps", ["1000", "many", "0-99999999"])
def test_bad_timesteps(random_ovam, timesteps):
    with pytest.raises(InputError, match="timesteps"):
        photo_settings(random_ovam, "", timesteps, 0, CAT)


def test_only_models_that_can_are_offered(random_ovam, monkeypatch):
    assert takes_photographs(random_ovam)
    monkeypatch.setattr(type(random_ovam.adapter), "is_plain", False)  # its denoiser takes more than image and text
    assert not takes_photographs(random_ovam)


def test_pictures_are_brought_to_the_page():
    small, tall, long = Image.new("RGB", (128, 96)), Image.new("RGB", (1000, 3000)), Image.new("RGB", (5000, 1))
    assert shrunk(small) is small
    assert on_screen(small).size == (512, 384)
    assert shrunk(tall).size == on_screen(tall).size == (round(MAX_SHOWN / 3), MAX_SHOWN)
    assert shrunk(long).size == (MAX_SHOWN, 1)


def test_the_line_of_facts(random_ovam):
    picture = random_ovam.photograph(scene(90, 60), "<b>cat</b>", timesteps=(50, 100), seed=4)
    facts = image_facts(picture)
    assert "&lt;b&gt;" in facts
    assert "timesteps 50, 100" in facts
    assert "noise seed 4" in facts
    assert "90 × 60 px, seen as 40 × 26" in facts
    assert zip_name(picture.settings) == "ovam-photo-noise-4.zip"
    assert "no caption · timestep 100 ·" in image_facts(random_ovam.photograph(scene(90, 60)))


def test_a_token_is_searched_at_the_size_that_the_model_sees(random_ovam, mask):
    picture = random_ovam.photograph(scene(300, 200), "A photograph of a cat")
    labels = read_any(UPLOAD, [], mask, (200, 300))
    assert labels.shape == (200, 300)
    target = random_ovam.target(picture, labels)
    assert target.shape == (26, 40)
    settings = OptimizeSettings(epochs=3)
    *_, (embedding, losses, (token, found)) = search(
        random_ovam, picture, labels, "cat", settings, lambda: False, nullcontext()
    )
    start = initial_embedding(random_ovam.pipe, ["cat"])
    expected = optimize([picture.recording], [target], start, settings)
    assert losses == found.losses == expected.losses
    assert np.array_equal(embedding, expected.embedding)
    assert np.array_equal(token.embedding, expected.embedding)
    assert np.array_equal(preview(random_ovam, picture, embedding), heatmaps(picture.recording, embedding)[1])


def test_the_masks_agreement_is_taken_at_full_size(random_ovam, mask):
    picture = random_ovam.photograph(scene(300, 200), "A photograph of a cat")
    labels = read_mask(mask, (200, 300))
    answer = random_ovam.segment(picture, ["cat", "car"], crf=False)
    for ours, found in zip(agreement(answer, labels), answer.masks, strict=True):
        expected = (found & (labels == 1)).sum() / (found | (labels == 1)).sum()
        assert abs(ours - expected) < 1e-6


def test_large_photographs_on_the_canvas(random_ovam):
    mail = picture_mail("key", random_ovam.photograph(Image.new("RGB", (3000, 1500), "#808080"), "a <cat>"), [])
    assert (mail["width"], mail["height"]) == (1024, 512)
    assert mail["src"].startswith("data:image/webp;base64,")
    assert mail["stem"] == "ovam-photo-noise-0"
    assert "“a &lt;cat&gt;”" in mail["facts"]


# ------------------------------------------------------------------------------------------------- the API


@pytest.fixture(scope="module")
def client(address, tmp_path_factory):
    return Client(address, verbose=False, download_files=str(tmp_path_factory.mktemp("downloads")))


def look(client, photo: str | None, **settings):
    given = {
        "photo": photo and handle_file(photo),
        "caption": "",
        "timesteps": "100",
        "seed": 0,
        "words": "cat",
        **settings,
    }
    return client.predict(**given, api_name="/photograph")


def test_a_photograph_by_the_api(client, ovam, tmp_path):
    path = turned(tmp_path / "large.png", 1500, 1000)
    _, image, facts = look(client, path, words="cat, car")
    shown = np.asarray(Image.open(image), dtype=int)
    assert shown.shape[:2] == (round(MAX_SHOWN / 1.5), MAX_SHOWN)
    assert np.abs(shown - np.asarray(shrunk(scene(1500, 1000)))).max() == 0  # upright
    assert "A photograph of a cat and a car" in facts
    assert "1500 × 1000 px, seen as 156 × 104" in facts

    heatmaps, _, numbers, _ = client.predict("cat, car", crf=False, api_name="/attribute")
    assert [Image.open(one).size for one in heatmaps] == [(MAX_SHOWN, round(MAX_SHOWN / 1.5))] * 2
    picture = ovam.photograph(path, "A photograph of a cat and a car")
    expected = ovam.segment(picture, ["cat", "car"], crf=False)
    assert np.allclose(numbers["peaks"], expected.peaks, atol=1e-3)
    assert np.allclose(numbers["mask_shares"], [found.mean() for found in expected.masks], atol=0.02)


def test_caption_timesteps_and_seed_are_heard(client, photo):
    def peaks(**settings):
        look(client, photo, **settings)
        return client.predict("cat", crf=False, api_name="/attribute")[2]["peaks"]

    plain = peaks()
    assert peaks() == plain
    others = [peaks(caption="a boat on the sea"), peaks(timesteps="500"), peaks(timesteps="100, 200"), peaks(seed=1)]
    assert all(one != plain for one in others)


def test_files_that_are_refused(client, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    scene(300, 300).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:2000])
    scene(20, 20).save(tmp_path / "small.png")
    scene(900, 100).save(tmp_path / "strip.png")
    (tmp_path / "page.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    said = {
        "text.png": "not a picture",
        "cut.jpg": "not whole",
        "small.png": "each side needs",
        "strip.png": "crop it",
        "page.svg": "not a picture",
    }
    for name, part in said.items():
        with pytest.raises(AppError, match=part) as caught:
            look(client, str(tmp_path / name))
        assert "Traceback" not in str(caught.value)
        assert str(tmp_path) not in str(caught.value)
    with pytest.raises(AppError, match="upload one"):
        look(client, None)


@pytest.mark.parametrize("meta", [{}, {"meta": {"_type": "gradio.FileData"}}])
def test_a_path_of_the_server_is_no_photograph(address, photo, meta):
    """As a program would ask that does without the client, which uploads what a path names."""
    asked = [{"path": photo, **meta}, "", "100", 0, "cat"]
    event = httpx.post(f"{address}gradio_api/call/photograph", json={"data": asked}).json()["event_id"]
    answer = httpx.get(f"{address}gradio_api/call/photograph/{event}", timeout=60).text
    assert answer.startswith("event: error")
    assert photo not in answer


@pytest.mark.parametrize(
    ("wrong", "part"),
    [
        ({"timesteps": "1000"}, "timesteps"),
        ({"timesteps": "all"}, "1000 timesteps are too many"),
        ({"timesteps": "0-200"}, "201 timesteps are too many"),
        ({"caption": "cat " * 90}, "The caption"),
        ({"caption": "x" * 3000}, "3,000 characters"),
        ({"seed": -1}, "seed is -1; choose"),
        ({"seed": "NaN"}, "Seed is NaN; give a number"),
        ({"words": ""}, "neither a caption nor a word"),
        ({"words": "?!"}, "not a word"),
    ],
)
def test_settings_that_are_refused(client, photo, wrong, part):
    with pytest.raises((AppError, ValueError), match=part) as caught:
        look(client, photo, **wrong)
    assert "Traceback" not in str(caught.value)


def test_a_token_from_a_photograph_by_the_api(client, photo, mask):
    look(client, photo)
    file, _, _, facts = client.predict(handle_file(mask), "cat", epochs=4, rate=0.1, api_name="/optimize")
    token = Token.load(file)
    assert token.names == ("cat",)
    assert token.prompt == "A photograph of a cat"
    assert token.steps is None
    assert json.loads(token.settings)["photo"]["timesteps"] == [100]
    assert "4 epochs" in facts
    shown = client.predict("cat", crf=False, tokens=["cat · yours"], api_name="/attribute")[2]
    assert shown["words"] == ["cat", "cat (token)"]
    square = Image.new("L", (200, 200))
    square.save(mask)
    with pytest.raises(AppError, match="shapes differ"):
        client.predict(handle_file(mask), "cat", epochs=4, rate=0.1, api_name="/optimize")


# ---------------------------------------------------------------------------------------------- the browser


def upload_photo(page, photo: str) -> None:
    page.click("#source label:has-text('photograph')")
    upload(page, "#photo-file", photo, "#photo-file img")


def caption(page) -> str:
    return page.inner_text("#viewer [data-part=caption]")


def test_a_visit_with_a_photograph(visit, tmp_path):
    page = visit()
    upload_photo(page, turned(tmp_path / "cat.jpg", 1500, 1000))
    assert not page.is_visible("#prompt")
    assert not page.is_visible("#examples")
    assert page.inner_text("#generate") == "Find the words"
    set_words(page, "cat, car")
    page.click("#generate")
    assert "Looking at the photograph" in page.inner_text("#viewer [data-part=stale]")  # at once
    wait_for_picture(page, "A photograph of a cat and a car")
    assert page.inner_text("#generate") == "Find the words"
    assert "1500 × 1000 px" in caption(page)
    box = page.locator("#viewer canvas[data-part=canvas]").bounding_box()
    assert abs(box["width"] / box["height"] - 1.5) < 0.02
    mask = page.evaluate("(() => { const m = window.ovamView.mask('cat'); return [m.width, m.height]; })()")
    assert mask == [MAX_SHOWN, round(MAX_SHOWN / 1.5)]  # on the screen no larger than that
    picture = shown(page)

    set_words(page, "grass")
    wait_for_chips(page, ["grass"])
    assert shown(page) == picture
    assert "A photograph of a cat and a car" in caption(page)  # recorded once
    page.fill("#tau input[type=number]", "0.6")
    page.press("#tau input[type=number]", "Tab")
    page.wait_for_timeout(800)
    assert "?" not in page.url  # an address without the photograph would bring something else
    shoot(page, "photo", full=True)

    assert "1500 × 1000 px" in page.inner_text("#pack")
    with page.expect_download() as download:
        page.click("#pack")
    assert download.value.suggested_filename == "ovam-photo-noise-0.zip"
    download.value.save_as(tmp_path / "all.zip")
    with zipfile.ZipFile(tmp_path / "all.zip") as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    assert {Image.open(io.BytesIO(data)).size for name, data in files.items() if name.endswith(".png")} == {
        (1500, 1000)
    }
    about = json.loads(files["settings.json"])
    assert about["format"] == "ovam-photo/1"
    assert about["photo"]["caption"] == "A photograph of a cat and a car"

    other = tmp_path / "other.png"
    scene(200, 300).save(other)
    page.click("#photo-file [aria-label='Remove Image']")
    upload(page, "#photo-file", str(other), "#photo-file img")
    until(page, lambda: "new photograph" in page.inner_text("#viewer [data-part=stale]"))  # not shown in full beside it
    page.click("#source label:has-text('prompt')")
    page.wait_for_selector("#prompt")
    assert page.inner_text("#generate") == "Generate"
    assert shown(page) == picture


def test_no_photograph_is_said_beside_the_button(visit, tmp_path):
    page = visit()
    page.click("#source label:has-text('photograph')")
    page.wait_for_selector("#photo-file")
    page.click("#generate")
    page.wait_for_selector("#note:has-text('upload one')")
    assert page.is_disabled("#stop")


@pytest.mark.parametrize(("name", "width", "height"), [("narrow", 390, 844), ("wide", 1280, 900)])
def test_it_fits(visit, photo, name, width, height):
    page = visit(width, height)
    upload_photo(page, photo)
    page.click("#generate")
    wait_for_picture(page, "A photograph of a")
    page.wait_for_timeout(500)
    shoot(page, f"photo-{name}", full=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    box = page.locator("#viewer canvas[data-part=canvas]").bounding_box()
    assert abs(box["width"] / box["height"] - 1.5) < 0.02
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width


def test_a_token_from_a_photograph(visit, photo, mask):
    page = visit()
    page.get_by_role("tab", name="Optimize a token").click()
    page.click("#learn-source label:has-text('photograph')")
    page.wait_for_selector("#learn-photo-file input[type=file]", state="attached")
    page.click("#learn-use")
    page.wait_for_selector("[data-note=canvas]:has-text('upload one')")
    page.fill("#class-name input, #class-name textarea", "cat")  # what its caption is made of
    upload(page, "#learn-photo-file", photo, "#learn-facts:has-text('“A photograph of a cat”')")  # recorded at once
    upload_mask(page, mask)
    page.click("#learn")
    page.wait_for_selector("#verdict .verdict")
    page.wait_for_timeout(800)
    shoot(page, "token-photo", full=True)
    box = page.locator("#now").bounding_box()
    assert abs(box["width"] / box["height"] - 1.5) < 0.02
