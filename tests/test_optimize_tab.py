"""The second tab: masks as they are painted, what is said of a token, and the whole way in a browser."""

from __future__ import annotations

import base64
import io
import time
from types import SimpleNamespace

import numpy as np
import pytest
from page import chips, set_words, shoot, until, upload_mask
from PIL import Image, ImageDraw

import tabs.optimize as tab
from ovam_core import OVAM, InputError, Token
from ovam_core.errors import Stopped
from ovam_core.io.masks import IGNORE
from ovam_core.optimization import Optimized
from ovam_core.picture import Segmentation
from ovam_core.settings import GenerateSettings, SegmentSettings
from tabs.canvas import (
    BACKGROUND,
    OBJECT,
    PAINT,
    STROKES,
    UPLOAD,
    URL,
    connected,
    handed_over,
    painted_mask,
    read_any,
    spot_of,
    sure_parts,
)
from tabs.examples import EXAMPLES
from tabs.generate import GenerateTab
from tabs.optimize import (
    OptimizeTab,
    by_one_rule,
    class_for,
    class_name,
    company,
    frames,
    search_settings,
    things_named,
)
from tabs.verdict import held_share, right_share, verdict
from tabs.viewer import mask_url

PROMPT = "A photograph of a cat on grass"


def layer(*boxes: tuple[tuple[int, int, int, int], str], size: tuple[int, int] = (512, 512)) -> Image.Image:
    """A transparent layer with boxes in the brush's colours, as the canvas hands it over."""
    drawn = Image.new("RGBA", size)
    for box, color in boxes:
        ImageDraw.Draw(drawn).rectangle(box, fill=color)
    return drawn


def url(drawn: Image.Image) -> str:
    data = io.BytesIO()
    drawn.save(data, "PNG")
    return URL + base64.b64encode(data.getvalue()).decode()


def square_mask(tmp_path) -> str:
    mask = Image.new("L", (128, 128))
    ImageDraw.Draw(mask).rectangle((30, 30, 89, 99), fill=255)
    mask.save(tmp_path / "mask.png")
    return str(tmp_path / "mask.png")


# ------------------------------------------------------------------------------------------------ the mask


def test_a_painted_mask_has_the_true_size_and_place():
    labels = painted_mask(handed_over(url(layer(((100, 200, 299, 399), OBJECT)))), PAINT, (128, 128))
    expected = np.zeros((128, 128), np.uint8)
    expected[50:100, 25:75] = 1
    assert labels.dtype == np.uint8
    assert np.array_equal(labels, expected)


def test_cyan_is_background_and_layers_add_up():
    low, high = layer(((0, 0, 15, 15), OBJECT)), layer(((8, 0, 15, 15), BACKGROUND), ((32, 0, 39, 7), OBJECT))
    labels = painted_mask([low, high], PAINT, (128, 128))
    assert labels[:4, :2].all()
    assert labels[:2, 8:10].all()
    assert labels.sum() == 8 + 4


def test_an_image_that_is_not_square():
    labels = painted_mask([layer(((0, 0, 255, 383), OBJECT), size=(512, 384))], PAINT, (96, 128))
    assert labels.shape == (96, 128)
    assert labels[:, :64].all()
    assert not labels[:, 64:].any()


def test_strokes_leave_the_rest_out():
    labels = painted_mask([layer(((0, 0, 39, 39), OBJECT), ((400, 400, 439, 479), BACKGROUND))], STROKES, (128, 128))
    assert (labels == 1).sum() == 100
    assert (labels == 0).sum() == 200
    assert (labels == IGNORE).sum() == 128 * 128 - 300
    assert labels[0, 0] == 1
    assert labels[100, 100] == 0
    assert labels[64, 64] == IGNORE


@pytest.mark.parametrize(
    ("layers", "way", "said"),
    [
        ([], PAINT, "painted"),
        ([layer()], PAINT, "empty"),
        ([layer(((0, 0, 99, 99), BACKGROUND))], PAINT, "empty"),
        ([layer(((0, 0, 511, 511), OBJECT))], PAINT, "whole image"),
        ([layer(((0, 0, 9, 9), OBJECT))], STROKES, "background"),
        ([layer(((0, 0, 9, 9), BACKGROUND))], STROKES, "object"),
        ([layer(((0, 0, 9, 9), OBJECT), size=(512, 300))], PAINT, "shapes differ"),
    ],
)
def test_bad_paint(layers, way, said):
    with pytest.raises(InputError, match=said):
        painted_mask(layers, way, (128, 128))


def test_no_file_and_no_canvas():
    with pytest.raises(InputError, match="upload one"):
        read_any(UPLOAD, [], None, (128, 128))
    with pytest.raises(InputError, match="Nothing is painted"):
        read_any(PAINT, handed_over(""), None, (128, 128))


@pytest.mark.parametrize("text", ["x", "data:image/webp;base64,aaaa", f"{URL}not base 64", "/etc/passwd"])
def test_what_is_no_canvas(text):
    with pytest.raises(InputError, match="no canvas"):
        handed_over(text)


@pytest.mark.parametrize("name", ["", "   ", "cat, dog", "x" * 61])
def test_bad_class_names(name):
    with pytest.raises(InputError, match="name"):
        class_name(name)


@pytest.mark.parametrize(
    ("recipe", "epochs", "rate"),
    [
        ("slow", 10, 1.0),
        ("fast", 0, 1.0),
        ("fast", 100_000, 1.0),
        ("fast", 2.5, 1.0),
        ("fast", 10, float("nan")),
        ("fast", 10, None),
    ],
)
def test_bad_search_settings(recipe, epochs, rate):
    with pytest.raises(InputError, match=r"choose|number"):
        search_settings(recipe, epochs, rate)


def test_the_place_of_a_click():
    assert spot_of("0.5,0.25", (100, 200)) == (100, 25)
    assert spot_of("1,1.0"[:3], (100, 200)) == (199, 99)
    assert spot_of("0,0", (100, 200)) == (0, 0)
    for text in ("", "0.5", "2,0", "-0.1,0", "nan,0", "0.5,0.5,0.5", "1e-3,0"):
        with pytest.raises(InputError, match="no place"):
            spot_of(text, (100, 200))


def two_parts(side: int) -> np.ndarray:
    mask = np.zeros((side, side), bool)
    mask[side // 8 : side // 2, side // 8 : side // 4] = True
    mask[side // 8 : side // 2, side // 2 :] = True
    return mask


@pytest.mark.parametrize("side", [64, 640])
def test_what_hangs_together(side):
    mask, seeds = two_parts(side), np.zeros((side, side), bool)
    seeds[side // 4, side // 8 + 1] = seeds[side - 1, 0] = True  # the second is in no part
    expected = mask.copy()
    expected[:, side // 2 :] = False
    assert np.array_equal(connected(mask, seeds), expected)
    assert not connected(mask, ~mask).any()
    assert np.array_equal(connected(mask, mask), mask)


def test_sure_parts_keep_away_from_the_edge():
    mask = np.zeros((100, 100), bool)
    mask[:, 50:] = True
    inside, outside = sure_parts(mask)
    assert inside[:, 53:].all()
    assert outside[:, :47].all()
    assert not inside[:, :50].any()
    assert not outside[:, 50:].any()
    speck = np.zeros((100, 100), bool)
    speck[50, 50] = True
    assert np.array_equal(sure_parts(speck)[0], speck)  # too small for an inside


@pytest.mark.parametrize(
    ("caption", "things"),
    [
        ("A photograph of a bird and a boat on the sea", ["bird", "boat"]),
        ("a photo of a potted plant", ["potted plant"]),
        ("Cat", ["cat"]),
        ("a painting of two cats, an apple and the cat near a cat", ["cats", "apple", "cat"]),
        ("a dog that runs as fast as it possibly can", []),
        ("", []),
    ],
)
def test_what_a_caption_says_is_there(caption, things):
    assert things_named(caption) == things


def test_the_class_fits_the_picture():
    assert class_for(["bird"], [], "cat") == "bird"
    assert class_for(["bird", "boat"], [], "cat") == ""  # no cat beside a picture of a bird
    assert class_for(["bird", "boat"], [], "Boat") == "Boat"
    assert class_for(["bird", "boat"], ["ship"], "") == "ship"
    assert class_for(["dog"], ["pet"], " pet ") == "pet"
    assert class_for([], [], "cat") == ""


# ---------------------------------------------------------------------------------------------- the verdict


def told_of(masks: list[np.ndarray], labels: np.ndarray, loss: float = 0.1) -> str:
    asked = SegmentSettings(("<cat>",), tau=0.4, alpha=0.85)
    found = Segmentation(["cat", "cat (token)"], np.zeros((2, 8, 8)), np.stack(masks), None, asked)
    search = Optimized(np.zeros(1), loss, [0.5, loss], 2, 1.0, False, "")
    return verdict("<cat>", found, labels, search)


def test_a_whole_mask_is_compared_by_its_iou():
    labels = np.zeros((8, 8), np.uint8)
    labels[:, :4] = 1
    word, token = labels.astype(bool).copy(), labels.astype(bool)
    word[:, 2:4] = False
    said = told_of([word, token], labels)
    assert "<b>0.50</b>" in said
    assert "<b>1.00</b>" in said
    assert "IoU with your mask" in said
    assert "both masks cut at τ 0.40, α 0.85, dense CRF" in said
    assert "&lt;cat&gt;" in said
    assert "no better" not in said
    assert "no better than the word" in told_of([token, word], labels)
    labels[:, 7] = IGNORE  # as a label map's border
    assert "on the 56 pixels that it labels" in told_of([word, token], labels)


def test_strokes_are_compared_by_what_can_fail():
    labels = np.full((8, 8), IGNORE, np.uint8)
    labels[0, :2], labels[7, :4] = 1, 0
    apart, whole = np.zeros((8, 8), bool), np.zeros((8, 8), bool)
    apart[:2, :2] = apart[4:6, 4:6] = True  # right wherever it was marked, and half of it is elsewhere
    whole[:2, :2] = True
    said = told_of([apart, whole], labels)
    assert "<b>0.500</b>" in said
    assert "<b>0.100</b>" in said
    assert "loss on the 6 pixels that you marked" in said
    assert "100% → 100% are right" in said
    assert "50% → 100% hangs together with your object strokes" in said
    assert "IoU" not in said
    assert "no better than the word" in told_of([apart, whole], labels, loss=0.5)
    labels[0, 4:6] = 0
    assert right_share(whole, labels) == 1
    assert right_share(np.ones((8, 8), bool), labels) == 0.5
    assert held_share(np.zeros((8, 8), bool), labels) == 0


# --------------------------------------------------------------------------------------- on the server


@pytest.fixture(scope="module")
def first(ovam, sessions, address):
    """The picture that the page opens with, made in little time."""
    settings = GenerateSettings.for_model(ovam.pipe, PROMPT, seed=1, steps=6)
    sessions.first = ovam.draw(settings)
    return sessions.first


@pytest.fixture
def own_tab(blocks, first) -> OptimizeTab:
    functions = (getattr(event.fn, "__self__", None) for event in blocks.fns.values())
    return next(one for one in functions if isinstance(one, OptimizeTab))


def sent(own: OptimizeTab, **changed) -> dict:
    values = {"key": "first", "way": PAINT, "word": "", "name": "", "spot": "0.5,0.5", **changed}
    return {getattr(own, name): value for name, value in values.items()}


ANN = SimpleNamespace(session_hash="ann")


def drawn_mask(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text.partition(",")[2]))))


def test_a_words_mask_to_start_from(ovam, first, own_tab):
    expected = ovam.segment(first, "grass").masks[0]
    mail = own_tab.take_word(sent(own_tab, word="grass", name="cat"), ANN)
    assert np.array_equal(drawn_mask(mail["object"]), expected)
    assert mail["background"] is None
    assert mail["key"] == "first"
    assert "“grass”" in mail["said"]
    mail = own_tab.take_word(sent(own_tab, word=" ", name="grass", way=STROKES), ANN)
    assert not (drawn_mask(mail["object"]) & ~expected).any()
    assert not (drawn_mask(mail["background"]) & expected).any()
    nothing = own_tab.take_word(sent(own_tab), ANN)
    assert (nothing["kind"], nothing["place"]) == ("note", "canvas")
    assert "no name" in nothing["said"]


def test_a_click_paints_the_word_that_is_strongest_there(ovam, first, own_tab):
    masks = ovam.segment(first, ["cat", "grass"], crf=True).masks
    y, x = np.argwhere(masks[0])[len(np.argwhere(masks[0])) // 2]
    spot = f"{(x + 0.5) / 128:.5f},{(y + 0.5) / 128:.5f}"
    mail = own_tab.take_spot(sent(own_tab, spot=spot), ANN)
    assert (mail["key"], mail["name"]) == ("first", "cat")
    assert "“cat” is strongest here" in mail["said"]
    assert mail["add"]
    region, seed = drawn_mask(mail["object"]), np.zeros((128, 128), bool)
    seed[y, x] = True
    assert np.array_equal(region, connected(masks[0], seed))
    assert own_tab.take_spot(sent(own_tab, spot="9,9"), ANN)["kind"] == "note"


def kinds(answers) -> list[str | None]:
    """Of the mails of a handler's answers; None where the page stays as it is."""
    return [mail.get("kind") for mail, *_ in answers]


def test_a_picture_that_is_chosen_takes_the_place_of_the_one_under_way(own_tab, few_steps):
    drawing = own_tab.draw_picture(sent(own_tab, prompt="a dog", seed=3), ANN)
    assert kinds([next(drawing)]) == ["working"]
    chosen = own_tab.take_picture(sent(own_tab, from_generate="first", asked="cat"), ANN)
    assert kinds([chosen]) == ["picture"]
    assert set(kinds(drawing)) <= {None}
    assert set(kinds(own_tab.draw_picture(sent(own_tab, prompt="a dog", seed=3), ANN))) == {"working", "picture"}


@pytest.mark.parametrize("ending", ["made", "stopped"])
def test_a_photograph_that_was_replaced_is_forgotten(own_tab, first, monkeypatch, ending):
    session = own_tab.sessions.of(ANN)

    def look_at(*_):
        session.replace(tab.PICTURE)
        if ending == "stopped":
            raise Stopped(0, 1)
        return first

    monkeypatch.setattr(own_tab, "read_photograph", lambda _: ("file", None))
    monkeypatch.setattr(own_tab.model, "look_at", look_at)
    values = sent(own_tab, photo_number=session.replace(tab.PICTURE), number="of a search")
    assert kinds([own_tab.take_photograph(values, ANN)]) == [None]


def test_what_did_not_begin_leaves_the_search_under_way(own_tab, first):
    search = {"recipe": "fast", "epochs": 2, "rate": 0.1, "further": 0}
    mail, number, _ = own_tab.begin(sent(own_tab, paint="", **search | {"name": "cat"}), ANN)
    assert (mail["kind"], mail["place"], number) == ("refused", "learn", "")
    assert "Nothing is painted" in mail["said"]


def test_a_token_that_is_learned_again_is_told_to_the_first_tab(blocks, own_tab, first):
    """A token of one name: the list of those asked for does not change, so nothing else would tell."""
    search = {"recipe": "fast", "epochs": 1, "rate": 0.1, "further": 0, "number": ""}
    values = sent(own_tab, paint=url(layer(((100, 100, 300, 300), OBJECT))), **search | {"name": "cat"})
    told = []
    for _ in range(2):
        _, values[own_tab.number], _ = own_tab.begin(values, ANN)
        *_, (mail, _, label, _, renewed, _) = own_tab.run(values, ANN)
        assert mail["kind"] == "result"
        assert renewed[0] == label == "cat · yours"
        told.append(renewed)
    assert told[0] != told[1]
    functions = (getattr(event.fn, "__self__", None) for event in blocks.fns.values())
    generate = next(one for one in functions if isinstance(one, GenerateTab))
    asked = {field: getattr(field, "value", None) for field in generate.asked_by}
    asked |= {generate.key: "first", generate.renewed: told[1], generate.pick: [label]}
    (column,) = generate.redraw_renewed(asked, ANN)[0]["columns"]
    assert label in [word["asked"] for word in column["words"]]
    assert "columns" not in generate.redraw_renewed(asked | {generate.pick: []}, ANN)[0]
    redrawn = next(event for event in blocks.fns.values() if event.name == "redraw_renewed")
    assert redrawn.targets == [(generate.renewed._id, "change")]


def test_of_a_search_every_loss_is_drawn_and_some_maps(ovam, first):
    epochs = [(np.zeros(1), [0.5] * count, None) for count in range(1, 101)]
    learned = object()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tab, "preview", lambda *_: np.ones((2, 2)))
        made = list(frames(ovam, first, iter([*epochs, (np.zeros(1), [0.5] * 100, learned)]), 100))
    assert [len(frame["losses"]) for frame, _ in made] == [*range(1, 101), 100]
    maps = sum(frame["map"] is not None for frame, _ in made)
    assert 10 < maps <= tab.MAPS_IN_A_RUN + 2
    assert made[-1][1] is learned
    assert made[-1][0]["map"] is not None


def test_pictures_without_masks_come_before_the_search(ovam, first, own_tab):
    session = own_tab.sessions.of(ANN)
    with session.run(tab.WORK) as stop:
        *mails, (last, made) = company(own_tab.model, session, first, "cat", 2, stop)
    assert [mail["said"] for mail, none in mails if none is None] == [
        f"Picture {number} of 2 without a mask" for number in (1, 2)
    ]
    assert last == {}
    assert len(made.pictures) == len(made.labels) == 2
    assert {picture.settings.steps for picture in made.pictures} == {first.settings.steps}
    token, _ = tab.learn(ovam, first, np.eye(128, dtype=np.uint8), "cat", tab.RECIPES["fast"], lambda: False, made=made)
    assert token.names == ("cat",)
    assert token.rivals > 0


def test_pictures_without_masks_are_stopped(own_tab, first):
    session = own_tab.sessions.of(ANN)
    with session.run(tab.WORK) as stop:
        run = company(own_tab.model, session, first, "cat", 2, stop)
        next(run)
        session.stop(tab.WORK)
        with pytest.raises(InputError, match="nothing was learned"):
            list(run)


def test_word_and_token_are_cut_by_one_rule(ovam):
    asked = by_one_rule(ovam, "cat", SimpleNamespace(tau=0.9, alpha=0.1))
    assert (asked.tau, asked.alpha) == (asked.token_tau, asked.token_alpha) == (ovam.preset.tau, ovam.preset.alpha)


# ---------------------------------------------------------------------------------------------- the browser


def open_tab(page) -> None:
    """It opens with a picture."""
    page.get_by_role("tab", name="Optimize a token").click()
    page.wait_for_selector("#learn-facts:has-text('seed 1')")


def sweep(page, points, tool: str = "object", size: float = 7) -> None:
    """A stroke of a brush over the canvas, by the mouse; points: (x, y) in shares of the picture."""
    page.click(f"#canvas [data-tool={tool}]")
    page.fill("#canvas [data-part=size]", str(size))
    page.locator("#canvas canvas").scroll_into_view_if_needed()
    box = page.locator("#canvas canvas").bounding_box()
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places:
        page.mouse.move(*place)
    page.mouse.up()


def painted(page) -> np.ndarray:
    """The canvas, uint8 [H, W, 4]."""
    text = page.evaluate("document.querySelector('#canvas canvas').toDataURL('image/png')")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text.partition(",")[2]))).convert("RGBA"))


def learn(page) -> None:
    page.click("#learn")
    page.wait_for_selector("#verdict .verdict")
    page.wait_for_selector("#learn-result:not(.stale) canvas")


@pytest.fixture
def searches(monkeypatch):
    """What the server's model was given to learn."""
    seen = []
    real = OVAM.learn

    def spy(ovam, pictures, targets, *others, **more):
        seen.append(targets[0])
        return real(ovam, pictures, targets, *others, **more)

    monkeypatch.setattr(OVAM, "learn", spy)
    return seen


@pytest.fixture
def few_steps(monkeypatch):
    def settings(own, text, seed):
        return GenerateSettings.for_model(own.ovam.pipe, text, seed=seed, steps=4)

    monkeypatch.setattr(OptimizeTab, "image_settings", settings)


CIRCLE = [(0.5 + 0.12 * np.cos(angle), 0.45 + 0.12 * np.sin(angle)) for angle in np.linspace(0, 2 * np.pi, 60)]
Y, X = np.mgrid[:128, :128]
DISC = np.hypot((X + 0.5) / 128 - 0.5, (Y + 0.5) / 128 - 0.45) <= 0.12 + 0.125


def test_the_whole_way(visit, first, sessions, searches, few_steps, tmp_path):
    page = visit()
    open_tab(page)
    assert page.input_value("#class-name textarea, #class-name input") == "cat"  # of its prompt
    assert page.input_value("#learn-prompt textarea, #learn-prompt input") == PROMPT
    assert page.is_disabled("#learn-stop")
    assert page.is_disabled("#try")
    canvas, column = (page.locator(one).bounding_box() for one in ("#canvas canvas", ".learn-mask"))
    assert canvas["width"] > column["width"] - 4
    assert canvas["width"] > 500
    shoot(page, "token-empty", full=True)
    for _ in range(2):  # refused: nothing is painted, and nothing else may change
        page.click("#learn")
        page.wait_for_timeout(500)
        page.wait_for_selector("[data-note=learn]:not(:empty)")
        assert page.inner_text("#learn-said") == ""
    assert page.inner_text("#try") == "Go"
    assert page.is_disabled("#try")
    sweep(page, CIRCLE, size=25)
    assert set(np.unique(painted(page)[256, 256])) > {0, 255}  # magenta, in full; the page shows it translucent
    assert float(page.eval_on_selector("#canvas canvas", "one => getComputedStyle(one).opacity")) < 0.7
    page.evaluate(
        "window.frames_drawn = 0; new MutationObserver(() => window.frames_drawn += 1)"
        ".observe(document.querySelector('#curve'), {childList: true})"
    )
    learn(page)
    shoot(page, "token", full=True)
    target = searches[0]
    assert target.shape == (128, 128)
    assert (target.astype(bool) & DISC).sum() / (target.astype(bool) | DISC).sum() >= 0.95
    assert page.evaluate("window.frames_drawn") >= 3  # while it goes on, which is not for long
    assert len(page.get_attribute("#curve polyline", "points").split()) == 60
    assert "IoU with your mask" in page.inner_text("#verdict")
    assert "τ 0.36" in page.inner_text("#verdict")
    assert "epoch 60" in page.get_attribute("#now", "aria-label")
    labels = page.eval_on_selector_all("#learn-result canvas", "all => all.map(one => one.getAttribute('aria-label'))")
    assert [label.split(",")[0] for label in labels] == [
        f"{what} of the {kind} cat" for what in ("Heatmap", "Mask") for kind in ("word", "token")
    ]

    with page.expect_download() as download:
        page.click("#learn-download")
    download.value.save_as(tmp_path / "cat.safetensors")
    assert Token.load(tmp_path / "cat.safetensors").names == ("cat",)
    for place, name in ((1, "ovam-seed-1-cat-token-heatmap.png"), (3, "ovam-seed-1-cat-token-mask.png")):
        with page.expect_download() as download:
            page.locator("#learn-result .c-saves button").nth(place).click()
        assert download.value.suggested_filename == name
        download.value.save_as(tmp_path / name)
    assert Image.open(tmp_path / "ovam-seed-1-cat-token-mask.png").size == (128, 128)

    for count in (1, 2):  # both stay, with their facts
        page.fill("#try-seed input", str(6 + count))
        page.press("#try-seed input", "Tab")
        page.click("#try")
        page.wait_for_selector(f"#tried-strip button:nth-child({count})[aria-pressed=true]")
    page.wait_for_selector("#tried-shown:has-text('seed 8 · 4 steps')")
    page.click("#tried-strip button >> nth=0")
    page.wait_for_selector("#tried-shown:has-text('seed 7 · 4 steps')")

    sweep(page, [(0.1, 0.1)])  # now the result belongs to another mask
    page.wait_for_selector("#learn-result.stale")
    assert "mask has changed" in page.inner_text("#learn-live .l-stale")
    page.click("#canvas [data-do=undo]")
    page.click("#canvas [data-do=clear]")
    assert not painted(page).any()
    assert page.eval_on_selector("#canvas img", "one => one.naturalWidth") == 512  # the picture stays
    assert any("cat · yours" in session.token_names() for session in sessions._sessions.values())
    page.get_by_role("tab", name="Generate", exact=True).click()
    page.get_by_role("tab", name="Optimize a token").click()
    assert page.is_visible("#learn-result")


def test_strokes_and_keys(visit, first, searches):
    page = visit()
    open_tab(page)
    page.click("#way label:has-text('strokes')")
    sweep(page, [(0.45, 0.4), (0.55, 0.5)])
    page.click("#learn")
    page.wait_for_selector("[data-note=learn]:has-text('background (cyan)')")  # beside the button
    assert not searches
    sweep(page, [(0.1, 0.1), (0.1, 0.9)], tool="background")
    page.click("#canvas [data-tool=object]")
    page.focus("#canvas canvas")
    before = painted(page)
    page.keyboard.press("Shift+ArrowRight")
    page.keyboard.press("Space")
    after = painted(page)
    assert (after[..., 3] > before[..., 3]).any()
    page.keyboard.press("Control+z")
    assert np.array_equal(painted(page), before)
    learn(page)
    assert set(np.unique(searches[0])) == {0, 1, IGNORE}
    marked = int((searches[0] != IGNORE).sum())
    assert f"loss on the {marked:,} pixels that you marked" in page.inner_text("#verdict")
    assert "IoU" not in page.inner_text("#verdict")


def test_a_mask_to_go_on_with(visit, first, ovam, searches, tmp_path):
    page = visit()
    open_tab(page)
    upload_mask(page, square_mask(tmp_path))
    shown = painted(page)
    assert (shown[..., 3] > 127).sum() == 60 * 70 * 16
    assert tuple(shown[200, 200, :3]) == tuple(bytes.fromhex(OBJECT[1:]))
    learn(page)
    assert searches[0].sum() == 60 * 70

    page.fill("#fill-word input, #fill-word textarea", "grass")
    page.click("#fill")
    page.wait_for_selector("#canvas .p-said:has-text('“grass”')")
    expected = ovam.segment(first, "grass").masks[0]
    assert np.array_equal(painted(page)[2::4, 2::4, 3] > 127, expected)
    page.click("#canvas [data-do=clear]")
    page.fill("#class-name input, #class-name textarea", "")
    page.click("#canvas [data-tool=click]")
    box = page.locator("#canvas canvas").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] - 20, box["y"] + box["height"] / 2)  # as where what covers the picture is let go on
    page.mouse.up()
    page.wait_for_selector("#canvas .p-said:has-text('is strongest here')")
    clicked = painted(page)
    assert clicked[256, 256, 3] == 255
    word = page.inner_text("#canvas .p-said").split("”")[0].removeprefix("“")
    until(page, lambda: page.input_value("#class-name input, #class-name textarea") == word)
    sweep(page, [(0.1, 0.1), (0.2, 0.1)], tool="background")  # the pointer paints again
    swept = painted(page)
    assert not np.array_equal(swept, clicked)
    everything = mask_url(np.ones((128, 128), bool))
    page.fill("#class-name input, #class-name textarea", "")
    other = {"kind": "paint", "key": "another", "object": everything, "said": "", "name": "dog"}
    page.evaluate("mail => window.ovamLearn.canvas(mail)", other)  # of a picture that is not here any more
    page.wait_for_timeout(300)
    assert np.array_equal(painted(page), swept)
    assert page.input_value("#class-name input, #class-name textarea") == ""
    late = other | {"key": "first"}
    page.evaluate("mail => { window.ovamLearn.busy('Waiting'); window.ovamLearn.canvas(mail); }", late)
    until(page, lambda: not np.array_equal(painted(page), swept))
    assert page.locator("#canvas .paint.coming").count() == 1  # the picture to be is waited for still


def test_calls_that_are_refused_leave_nothing_waiting(visit, first):
    """As where the queue is full: no handler is there to say so."""
    page = visit()
    until(page, lambda: chips(page) == EXAMPLES[0].words.split(", "))
    refused = []

    def refuse(route):
        refused.append(route.request.post_data)
        route.fulfill(status=503, json={"detail": "Queue is full."})

    page.route("**/queue/join**", refuse)
    page.click("#viewer [data-over=steps]")
    set_words(page, "dog")
    until(page, lambda: "got no answer" in page.inner_text("#viewer [data-part=stale]"))
    until(page, lambda: page.locator("#viewer .waits").count() == 0)
    asked = len(refused)
    page.wait_for_timeout(1500)
    assert len(refused) == asked  # not again and again
    page.unroute("**/queue/join**")
    open_tab(page)
    page.route("**/queue/join**", refuse)
    for button in ("#learn-draw", "#fill"):
        page.click(button)
        page.wait_for_selector("#canvas .paint:not(.coming) [data-part=busy][hidden]", state="attached")
    sweep(page, [(0.5, 0.5)])
    assert painted(page).any()
    for pressed in ("#learn", "#learn", "#try-prompt textarea, #try-prompt input"):
        page.press(pressed, "Enter")
        page.wait_for_timeout(300)
    until(page, lambda: page.inner_text("#learn-said") == page.inner_text("#tried-said") == "")


@pytest.fixture
def slowly(monkeypatch):
    """500 epochs of the embedded model may be over before the button is reached: after 20 they wait for it."""
    real = OVAM.learn

    def learn_slowly(*given, on_epoch, should_stop):
        def told(epoch):
            on_epoch(epoch)
            deadline = time.monotonic() + 60
            while epoch.number > 20 and not should_stop() and time.monotonic() < deadline:
                time.sleep(0.05)

        return real(*given, on_epoch=told, should_stop=should_stop)

    monkeypatch.setattr(OVAM, "learn", learn_slowly)


def test_a_second_start_stops_the_first_and_stop_keeps_the_best(visit, first, searches, slowly):
    page = visit()
    open_tab(page)
    sweep(page, CIRCLE, size=25)
    page.click("#learn-more > button")
    page.click("#learn-more label:has-text('paper')")
    page.click("#learn")
    page.wait_for_selector("#learn-said:has-text('of 500')")
    page.click("#canvas [data-do=clear]")
    page.click("#learn")
    page.wait_for_selector("[data-note=learn]:has-text('Nothing is painted')")
    assert "of 500" in page.inner_text("#learn-said")  # it goes on
    page.click("#canvas [data-do=undo]")
    sweep(page, [(0.1, 0.1)], size=25)
    page.wait_for_timeout(500)
    page.click("#learn")
    until(page, lambda: len(searches) == 2)
    assert searches[1].sum() > searches[0].sum()
    assert page.inner_text("#verdict") == ""  # what the first had found is of no use any more
    page.wait_for_selector("#learn-stop:not([disabled])")
    page.click("#learn-stop")
    page.wait_for_selector("#verdict:has-text('Stopped after')")
    page.wait_for_selector("#learn-stop[disabled]")
    assert page.is_enabled("#learn-download")
    assert page.inner_text("#try") == "Go"


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (820, "dark"), (1280, "dark")])
def test_it_fits(visit, first, searches, width, scheme):
    page = visit(width, 844, scheme)
    open_tab(page)
    canvas, column = (page.locator(one).bounding_box() for one in ("#canvas canvas", ".learn-mask"))
    assert canvas["width"] > column["width"] - 4
    assert page.locator(".learn-class").bounding_box()["x"] == page.locator(".learn-picture").bounding_box()["x"]
    assert (column["x"] > 400) == (width > 1023)  # one column below
    sweep(page, CIRCLE, size=25)
    learn(page)
    page.wait_for_timeout(400)  # the page scrolls
    shoot(page, f"token-{width}-{scheme}", full=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    cut = page.evaluate(
        "width => [...document.querySelectorAll('.learn button:not(.label-wrap), .learn label, #learn-results canvas')]"
        ".filter(one => one.offsetParent && (one.getBoundingClientRect().right > width || one.scrollWidth > "
        "one.clientWidth + 1)).map(one => one.textContent.trim())",
        width,
    )
    assert cut == []
