"""The large picture: what the server sends of a result, and what the browser makes of it, pixel by pixel."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from page import shoot
from PIL import Image

from ovam_core import InputError
from ovam_core.attention.heatmap import claims, resize
from ovam_core.attention.mask import label_map, self_attention_map
from ovam_core.models.presets import recommended_part
from ovam_core.plot import VOC_PALETTE, colorize, overlay
from ovam_core.tokens import Token
from tabs import viewer

CSS = Path(viewer.__file__).parent / "assets" / "viewer.css"
WORDS = ["dog", "car", "pet"]
CLASSES = ["dog", "car", "cat", "bus", "horse"]
# Of the theme, what the style sheet takes from it.
THEME = """:root { --body-text-color: #1e293b; --body-text-color-subdued: #64748b; --block-background-fill: #fff;
--border-color-primary: #e2e8f0; --background-fill-secondary: #f8fafc; --primary-500: #6366f1; --primary-600: #4f46e5;
--neutral-900: #0f172a; --radius-lg: 12px; } body { margin: 0; padding: 14px; font-family: sans-serif; }"""


@pytest.fixture(scope="module")
def picture(ovam):
    return ovam.generate("A photograph of a dog and a car on a road", seed=3, num_inference_steps=12)


@pytest.fixture(scope="module")
def found(ovam, picture):
    return ovam.segment(picture, WORDS, crf=False)


@pytest.fixture(scope="module")
def refined(ovam, picture):
    return ovam.segment(picture, WORDS)


def sent(ovam, *found, **more):
    received = [ovam.received_attention(one) for one in found]
    more = {"key": "one", "facts": "seed 3 · 12 steps", "stem": "ovam-seed-3"} | more
    return viewer.answer(list(found), received, ovam.preset, **more)


def values_of(grid) -> np.ndarray:
    data = np.frombuffer(base64.b64decode(grid["data"]), np.uint8).reshape(grid["h"], grid["w"])
    return data / 255 * grid["top"]


def opened(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


# ------------------------------------------------------------------------------------------- what is sent


@pytest.mark.parametrize("values", [np.random.default_rng(0).random((7, 5)), np.zeros((3, 4)), np.ones((1, 1)) * 3e-5])
def test_a_map_is_sent_to_within_a_510th_of_its_peak(values):
    sent, fine = viewer.grid(values), viewer.fine_grid(values)
    assert (sent["w"], sent["h"]) == values.shape[::-1]
    assert sent["top"] == pytest.approx(values.max())
    assert np.abs(values_of(sent) - values).max() <= values.max() / 509
    assert {name: fine[name] for name in sent} == sent
    left = np.frombuffer(base64.b64decode(fine["fine"]), np.uint8).reshape(values.shape) / 255 - 0.5
    assert np.abs(values_of(fine) + left / 255 * fine["top"] - values).max() <= values.max() / 130_000


def test_a_mask_is_sent_as_one_bit_a_pixel(found):
    image = opened(viewer.mask_url(found.masks[0]))
    assert image.mode == "1"
    assert np.array_equal(np.asarray(image), found.masks[0])


def test_a_small_picture_is_sent_without_loss(picture):
    assert np.array_equal(np.asarray(opened(viewer.picture_url(picture.image))), np.asarray(picture.image))


def test_the_maps_on_the_grid_are_those_that_were_resized(found):
    size = found.heatmaps.shape[1:]
    assert np.array_equal(resize(torch.from_numpy(found.grid_maps), size).numpy(), found.heatmaps)
    assert [label for query in found.queries for label in query.labels] == found.labels


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.85, 1.0])
def test_received_attention_gives_every_self_attention_map(ovam, found, alpha):
    received = ovam.received_attention(found)
    used = recommended_part(ovam.pipe, found.picture.recording)
    assert list(received) == ["conditional"]
    expected = self_attention_map(used, alpha).numpy()
    np.testing.assert_allclose(alpha + (1 - alpha) * received["conditional"], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "live", "crf", "has_alpha", "masks"),
    [("OVAM", True, True, True, True), ("DAAM", True, False, False, False), ("GoCA", False, False, False, True)],
)
def test_a_method_says_what_the_browser_can_do(ovam, picture, method, live, crf, has_alpha, masks):
    found = ovam.segment(picture, ["dog", "car"], method=method)
    column = sent(ovam, found)["columns"][0]
    assert (column["method"], column["live"], column["crf"], column["hasAlpha"]) == (method, live, crf, has_alpha)
    assert [word["mask"] is not None for word in column["words"]] == [masks, masks]
    assert list(column["attention"]) == (["conditional"] if has_alpha else [])
    assert [word["peak"] for word in column["words"]] == found.peaks
    assert [word["presence"] for word in column["words"]] == [round(there, 4) for there in found.presence]


def test_an_answer_names_its_picture_and_what_was_asked(ovam, found):
    one, again = sent(ovam, found), sent(ovam, found, with_picture=False)
    assert json.loads(json.dumps(one)) == one
    assert one["prompt"] == "A photograph of a dog and a car on a road" == one["picture"]["alt"]
    assert (one["picture"]["width"], one["picture"]["height"], one["picture"]["full"]) == (128, 128, [128, 128])
    assert one["asked"] == {"tau": ovam.preset.tau, "alpha": ovam.preset.alpha, "crf": False}
    assert again["picture"] == one["picture"] | {"src": None}
    words = one["columns"][0]["words"]
    assert [(word["label"], word["asked"], word["kind"], word["branch"], word["tau"]) for word in words] == [
        (word, word, "word", "conditional", None) for word in WORDS
    ]


def test_tokens_bring_their_own_cut_and_name(ovam, picture):
    embedding = torch.randn(3, ovam.adapter.embed_dim, generator=torch.manual_seed(0))
    token = Token(embedding, ("background", "dog", "car"), ovam.name, tau=0.6, alpha=0.9)
    words = sent(ovam, ovam.segment(picture, ["dog", token], crf=False), token_names=["mine"])["columns"][0]["words"]
    assert [(word["label"], word["asked"], word["kind"], word["tau"], word["alpha"]) for word in words] == [
        ("dog", "dog", "word", None, None),
        ("dog (token)", "mine", "token", 0.6, 0.9),
        ("car", "mine", "token", 0.6, 0.9),
    ]


def test_no_part_of_a_sentence_can_be_taken_away(ovam, picture):
    words = sent(ovam, ovam.segment(picture, sentence="a dog", crf=False))["columns"][0]["words"]
    assert [word["label"] for word in words] == ["<SoT>", "a", "dog", "<EoT>"]
    assert {word["asked"] for word in words} == {None}


def test_a_large_photograph_is_sent_at_the_size_of_a_screen(ovam):
    photo = Image.effect_noise((1500, 900), 60).convert("RGB")
    found = ovam.segment(ovam.photograph(photo, "a dog", width=128, height=80), "dog", crf=False)
    one = sent(ovam, found)["picture"]
    assert (one["width"], one["height"], one["full"]) == (1024, 614, [1500, 900])
    assert opened(one["src"]).size == (1024, 614)


def test_claims_are_ranked_by_value(found):
    for x, y in [(0, 0), (127, 127), (40, 90), (90, 70)]:
        values = found.heatmaps[:, y, x]
        assert claims(found.heatmaps, x, y) == [(row, values[row]) for row in np.argsort(-values, kind="stable")]
        assert claims(torch.from_numpy(found.heatmaps), x, y) == claims(found.heatmaps, x, y)
    assert viewer.point(found, 40, 90)[0].keys() == {"label", "value", "in_mask"}


@pytest.mark.parametrize(("x", "y"), [(128, 0), (0, 128), (-1, 5), (5, -1)])
def test_a_point_outside_is_refused(found, x, y):
    with pytest.raises(InputError, match=rf"{x}, {y} lies outside of the picture of 128x128"):
        claims(found.heatmaps, x, y)


def test_the_element_asks_for_nothing_and_holds_no_template():
    everything = viewer.skeleton() + CSS.read_text() + viewer.SCRIPT
    assert "http" not in everything
    assert "innerHTML" not in everything
    assert "${" not in viewer.skeleton()
    assert "{{" not in viewer.skeleton()


# ------------------------------------------------------------------------------------------- in the browser


@pytest.fixture
def view(browser):
    """Opens a page with nothing but the large picture; nothing may be asked of anybody, nor go wrong."""
    contexts, faults = [], []

    def open_page(payload=None, candidates=None, width=820, height=900, dark=False, layer="heatmap"):
        context = browser.new_context(viewport={"width": width, "height": height}, accept_downloads=True)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: request.url.startswith(("data:", "blob:")) or faults.append(request.url))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.set_content(
            f"""<!doctype html><meta name="viewport" content="width=device-width"><style>{THEME}</style>
            <style>{CSS.read_text()}</style>
            <body class="{"dark" if dark else ""}">{viewer.skeleton()}<script>{viewer.SCRIPT}
            const events = [], root = document.querySelector('.ovam-viewer'), view = ovamViewer(root);
            for (const name of ['add', 'remove', 'mask', 'strip', 'candidates', 'lost'])
              root.addEventListener(`ovam-${{name}}`, event => events.push([name, event.detail]));
            </script>"""
        )
        if payload:
            page.evaluate("sent => view.show(sent)", payload)
            page.evaluate("sent => view.candidates(sent)", candidates)
            assert page.get_attribute("[data-layer=masks]", "aria-pressed") == "true"  # what a visitor sees first
            if layer is not None:
                page.click(f"[data-layer={layer}]")
            settle(page)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not faults


def settle(page) -> None:
    """Until what is shown is drawn."""
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def pixels(page, nth: int = 0) -> np.ndarray:
    """What a canvas shows, RGB."""
    url = page.locator("canvas").nth(nth).evaluate("canvas => canvas.toDataURL()")
    return np.asarray(opened(url).convert("RGB")).astype(int)


def mask_of(page, label: str) -> np.ndarray:
    return masks_of(page, label)[0]


def masks_of(page, *labels: str) -> np.ndarray:
    """Masks bool [labels, H, W] as they stand in the browser."""
    ask = "labels => labels.map(view.mask).map(({width, height, data}) => [width, height, data.join('')])"
    made = page.evaluate(ask, list(labels))
    return np.array([[bit == "1" for bit in bits] for _, _, bits in made]).reshape(-1, made[0][1], made[0][0])


def choose(page, layer: str) -> None:
    page.click(f"[data-layer={layer}]")
    page.mouse.move(2, 2)
    settle(page)


def iou(one: np.ndarray, other: np.ndarray) -> float:
    return (one & other).sum() / max(1, (one | other).sum())


def offers(ovam, picture):
    prompt = ovam.segment(picture, ["dog", "road"], crf=False)
    return viewer.candidates("one", prompt, ovam.segment(picture, CLASSES, crf=False))


@pytest.mark.parametrize("method", ["OVAM", "DAAM"])
def test_masks_of_the_browser_are_those_of_the_server(ovam, picture, view, method):
    page = view(sent(ovam, ovam.segment(picture, WORDS, crf=False, method=method)))
    for tau in (0.2, 0.36, 0.6, 0.95):
        for alpha in (0.0, 0.85, 1.0):
            page.evaluate(f"view.tau({tau}); view.alpha({alpha})")
            asked = ovam.segment(picture, WORDS, crf=False, method=method, tau=tau, alpha=alpha)
            for word, made, mask in zip(WORDS, masks_of(page, *WORDS), asked.masks, strict=True):
                assert iou(made, mask) >= 0.99, (word, tau, alpha)
    assert page.evaluate("events") == []


def test_masks_of_a_larger_picture_agree_too(ovam, view):
    photo = Image.effect_noise((700, 420), 60).convert("RGB")
    picture = ovam.photograph(photo, "a dog and a car", width=128, height=80)
    found = ovam.segment(picture, ["dog", "car"], crf=False, tau=0.5)
    page = view(sent(ovam, found))
    assert min(iou(mask_of(page, word), mask) for word, mask in zip(["dog", "car"], found.masks, strict=True)) >= 0.99


def test_tokens_keep_their_own_threshold_until_a_slider_moves(ovam, picture, view):
    embedding = torch.randn(2, ovam.adapter.embed_dim, generator=torch.manual_seed(0))
    token = Token(embedding, ("background", "dog"), ovam.name, tau=0.6, alpha=0.9)
    page = view(sent(ovam, ovam.segment(picture, ["car", token], crf=False)))
    for tau in (None, ovam.preset.tau, 0.7):
        if tau:
            page.evaluate(f"view.tau({tau})")
        moved = tau == 0.7
        alone = ovam.segment(picture, token, crf=False, tau=tau if moved else 0.6, alpha=None if moved else 0.9)
        if moved:
            alone = ovam.segment(picture, token, crf=False, tau=0.7, alpha=0.9)
        assert iou(mask_of(page, "dog"), alone.masks[0]) >= 0.99


def test_the_dense_crf_is_shown_where_it_was_asked_and_wanted_where_it_was_not(ovam, picture, refined, view):
    page = view(sent(ovam, refined))
    for word, mask in zip(WORDS, refined.masks, strict=True):
        assert np.array_equal(mask_of(page, word), mask)
    raw = ovam.segment(picture, WORDS, crf=False, tau=0.6)
    quiet = page.evaluate("() => { view.tau(0.5); view.tau(0.6); return events.length; }")
    assert quiet == 0
    assert iou(mask_of(page, "dog"), raw.masks[0]) >= 0.99  # at once
    settle(page)
    assert page.text_content("[data-part=busy]") == "sharpening…"
    page.wait_for_timeout(450)
    assert page.evaluate("events.map(one => one[0])") == ["mask"]  # once they rest, and once
    page.evaluate("sent => view.show(sent)", sent(ovam, ovam.segment(picture, WORDS, tau=0.6), with_picture=False))
    settle(page)
    assert page.text_content("[data-part=busy]") == ""
    page.evaluate("view.crf(false)")
    assert iou(mask_of(page, "dog"), raw.masks[0]) >= 0.99
    page.wait_for_timeout(400)
    assert len(page.evaluate("events")) == 1


def test_without_a_dense_crf_on_the_server_it_is_asked_for_once(ovam, found, view):
    page = view(sent(ovam, found))
    page.evaluate("view.crf(true)")
    page.wait_for_timeout(400)
    for _ in range(2):
        page.evaluate("sent => view.show(sent)", sent(ovam, found, with_picture=False))
        page.wait_for_timeout(400)
    assert page.evaluate("events.map(one => one[0])") == ["mask"]


def test_words_are_ranked_as_the_server_ranks_them(ovam, picture, found, view):
    page = view(sent(ovam, found), offers(ovam, picture))
    others = ["road", "cat", "bus", "horse"]  # what is asked is not offered again
    every = ovam.segment(picture, [*WORDS, *others], crf=False)
    groups = dict.fromkeys(WORDS, "asked") | {"road": "prompt"} | dict.fromkeys(others[1:], "classes")
    masks = masks_of(page, *WORDS)
    points = np.random.default_rng(1).integers(0, 128, (30, 2)).tolist()
    for (x, y), ranked in zip(
        points, page.evaluate("points => points.map(one => view.rank(...one))", points), strict=True
    ):
        truth = {every.labels[row]: value for row, value in claims(every.heatmaps, x, y)}
        names, values = [one["label"] for one in ranked], [one["value"] for one in ranked]
        assert {one["label"]: one["group"] for one in ranked} == groups
        assert values == sorted(values, reverse=True)
        assert values == pytest.approx([truth[name] for name in names], abs=2e-3)
        assert all(truth[one] > truth[after] - 4e-3 for one, after in pairwise(names))
        assert [name for name in names if name in WORDS] == [name for name in truth if name in WORDS]  # sent finely
        inside = {one["label"]: one["inMask"] for one in ranked if one["group"] == "asked"}
        assert inside == {word: mask[y, x] for word, mask in zip(WORDS, masks, strict=True)}


def test_each_layer_shows_its_own(ovam, picture, found, view):
    page = view(sent(ovam, found))
    side = pixels(page).shape[0]

    def at(x, y):
        return shown[int((y + 0.5) * side / 128), int((x + 0.5) * side / 128)]

    shown = pixels(page)
    for x, y in [(20, 100), (45, 95), (100, 20)]:
        expected = np.asarray(overlay(picture.image, found.heatmaps[0], found.peaks[0]))[y, x]
        assert np.abs(at(x, y) - expected).max() <= 14
    choose(page, "picture")
    small = Image.fromarray(pixels(page).astype(np.uint8)).resize((128, 128), Image.Resampling.BOX)
    assert np.abs(np.asarray(small, int) - np.asarray(picture.image, int)).mean() < 4
    plain = pixels(page)
    choose(page, "winner")
    shown = pixels(page)
    labels = label_map(found.heatmaps, found.masks)
    colors = [
        tuple(int(word["color"][i : i + 2], 16) for i in (1, 3, 5)) for word in sent(ovam, found)["columns"][0]["words"]
    ]
    inner = _inner(labels, 4)
    assert len(np.unique(labels[inner])) >= 3
    for y, x in np.argwhere(inner)[::97]:
        over = colors[labels[y, x] - 1] if labels[y, x] else (12, 16, 26)
        below = plain[int((y + 0.5) * side / 128), int((x + 0.5) * side / 128)]
        assert np.abs(at(x, y) - (0.6 * np.array(over) + 0.4 * below)).max() <= 6
    choose(page, "masks")
    masks = pixels(page)
    for color in colors:  # an outline of every mask in its colour, where others lie over it too
        assert (np.abs(masks - np.array(color)).max(axis=2) <= 12).sum() > side / 4


def _inner(labels: np.ndarray, n: int) -> np.ndarray:
    """Whether a pixel's neighbours, as far as n, have its label."""
    padded = np.pad(labels, n, mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (2 * n + 1, 2 * n + 1))
    return (windows == labels[..., None, None]).all(axis=(2, 3))


def test_the_sliders_leave_the_picture_alone(ovam, found, view):
    page = view(sent(ovam, found))
    choose(page, "picture")
    before = pixels(page)
    page.evaluate("view.tau(0.7); view.alpha(0.2)")
    settle(page)
    assert np.array_equal(pixels(page), before)
    choose(page, "masks")
    first = pixels(page)
    page.evaluate("view.tau(0.3)")
    settle(page)
    assert not np.array_equal(pixels(page), first)
    page.locator("[data-part=opacity]").fill("1")
    settle(page)
    full = pixels(page)
    page.locator("[data-part=opacity]").fill("0")
    settle(page)
    assert np.abs(full - before).mean() > np.abs(pixels(page) - before).mean() > 0


def test_one_scale_for_all_words(ovam, found, view):
    page = view(sent(ovam, found))
    weak = WORDS[int(np.argmin(found.peaks))]
    page.click(f".v-word:has-text('{weak}')")
    settle(page)
    assert page.text_content(".v-scale b:last-child") == f"{min(found.peaks):.2f}"
    own = pixels(page)
    page.click(".v-toggle")
    page.mouse.move(2, 2)
    settle(page)
    assert page.text_content(".v-scale b:last-child") == f"{max(found.peaks):.2f}"
    assert not np.array_equal(pixels(page), own)
    assert page.get_attribute(".v-toggle", "aria-pressed") == "true"


def test_chips_show_hide_add_and_remove(ovam, picture, found, view):
    page = view(sent(ovam, replace(found, presence=[0.93, None, 0.03])), offers(ovam, picture))
    titles = [page.get_attribute(f".v-word >> nth={number}", "title") for number in range(3)]
    assert titles[:2] == ["Show its map · presence 0.93 of 1", "Show its map"]
    assert titles[2].startswith("Probably not in the picture: presence 0.03 of 1.")
    assert page.locator(".v-chip.absent").all_text_contents() == [f"pet {found.peaks[2]:.2f}probably not there×"]
    assert [one.strip() for one in page.locator(".v-word").all_text_contents()] == [
        f"{word} {peak:.2f}" for word, peak in zip(WORDS, found.peaks, strict=True)
    ]
    assert page.locator(".v-offer").all_text_contents() == ["+ road"]  # what is asked is no offer
    first = pixels(page)
    page.hover(".v-word >> nth=1")
    settle(page)
    assert not np.array_equal(pixels(page), first)
    assert page.get_attribute("canvas", "aria-label").startswith("Heatmap of “car”, peak")
    page.hover(".v-offer")
    settle(page)
    assert page.get_attribute("canvas", "aria-label").startswith("Heatmap of “road”")
    page.mouse.move(2, 2)
    settle(page)
    assert np.array_equal(pixels(page), first)
    page.click(".v-word >> nth=1")
    page.mouse.move(2, 2)
    settle(page)
    assert page.get_attribute("canvas", "aria-label").startswith("Heatmap of “car”")
    assert page.get_attribute(".v-word >> nth=1", "aria-pressed") == "true"
    choose(page, "masks")
    all_masks = pixels(page)
    page.click(".v-dot >> nth=0")
    page.mouse.move(2, 2)
    settle(page)
    assert page.get_attribute(".v-dot >> nth=0", "aria-pressed") == "false"
    assert not np.array_equal(pixels(page), all_masks)
    page.click(".v-x >> nth=2")
    page.click(".v-offer")
    assert page.evaluate("events") == [["remove", {"asked": "pet", "kind": "word"}], ["add", {"word": "road"}]]
    page.evaluate("view.words('dog, ROAD')")
    assert page.locator(".v-chip.gone .v-word").count() == 2
    assert page.locator(".v-offer.waits").count() == 1


def test_what_is_added_is_in_focus(ovam, picture, found, view):
    page = view(sent(ovam, found))
    page.evaluate(
        "sent => view.show(sent)", sent(ovam, ovam.segment(picture, [*WORDS, "road"], crf=False), with_picture=False)
    )
    settle(page)
    assert page.get_attribute("canvas", "aria-label").startswith("Heatmap of “road”")


def test_pointing_by_hand_and_by_keys(ovam, picture, found, view):
    page = view(sent(ovam, found), offers(ovam, picture))
    box = page.locator("canvas").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.3, box["y"] + box["height"] * 0.7)
    assert page.is_visible("[data-part=card]")
    assert page.locator(".v-claim button").count() == 0
    ranked = page.evaluate("view.rank(38, 89)")
    assert page.locator(".v-claim > span").all_text_contents()[:3] == [one["label"] for one in ranked[:3]]
    page.mouse.move(2, 2)
    assert page.is_hidden("[data-part=card]")
    page.focus("canvas")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowUp")
    assert page.locator(".v-claim > b").first.text_content() == f"{page.evaluate('view.rank(66, 62)[0].value'):.2f}"
    page.keyboard.press("Enter")
    listed = page.evaluate("view.rank(66, 62)")
    unasked = [one["label"] for one in listed[:6] if one["group"] != "asked"]
    assert page.locator(".v-claim button").evaluate_all("all => all.map(x => x.dataset.at)") == [
        f"add {x}" for x in unasked
    ]
    page.wait_for_timeout(350)
    assert page.text_content("[data-part=spoken]").startswith("Kept: pixel 66, 62: ")
    page.keyboard.press("Tab")  # into the list
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert [one[0] for one in page.evaluate("events")] == ["add"]
    page.keyboard.press("Escape")
    assert page.is_hidden("[data-part=card]")
    assert page.evaluate("document.activeElement.dataset.part") == "canvas"
    page.mouse.click(box["x"] + 50, box["y"] + 50)
    assert page.is_visible(".v-card.kept")
    page.mouse.click(box["x"] + 51, box["y"] + 50)
    assert page.is_hidden(".v-card.kept")


def test_every_control_can_be_reached_by_keys(ovam, picture, found, view):
    page = view(sent(ovam, found), offers(ovam, picture), layer=None)
    wanted = page.evaluate(
        """() => [...root.querySelectorAll('button, summary, input, canvas[tabindex]')]
        .filter(x => x.checkVisibility()).length"""
    )
    reached = set()
    for _ in range(wanted):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("[...root.querySelectorAll('*')].indexOf(document.activeElement)"))
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineWidth")
        assert outline == "2px"
    assert len(reached) == wanted
    assert -1 not in reached


def test_stale_is_dimmed_and_says_why(ovam, found, view):
    page = view(sent(ovam, found))
    page.evaluate("view.stale('A new picture is coming.')")
    page.wait_for_timeout(300)
    banner = page.locator("[data-part=stale]")
    assert banner.is_visible()
    assert banner.text_content() == "A new picture is coming."
    opacity = "getComputedStyle(document.querySelector('canvas')).opacity"
    assert float(page.evaluate(opacity)) < 0.5
    page.mouse.wheel(0, 150)
    page.wait_for_timeout(200)
    assert banner.evaluate("node => node.getBoundingClientRect().top") >= 0  # it stays in view
    page.evaluate("view.stale(null)")
    page.wait_for_timeout(300)
    assert banner.is_hidden()
    assert page.evaluate(opacity) == "1"
    page.evaluate("view.stale('old')")
    page.evaluate("sent => view.show(sent)", sent(ovam, found, with_picture=False))
    assert banner.is_hidden()


def test_before_the_first_picture_it_says_what_will_appear(view):
    page = view()
    assert page.is_visible(".v-empty")
    assert page.is_hidden(".v-bar")
    assert page.is_hidden(".v-frame")
    page.evaluate("view.tau(0.5); view.crf(true); view.words('cat'); view.candidates(null); view.strip(null)")
    page.evaluate("view.stale('The model is loading.')")
    assert page.is_visible("[data-part=stale]")


def test_a_picture_that_the_page_has_forgotten_is_asked_for(ovam, found, view):
    page = view(sent(ovam, found))
    page.evaluate("sent => view.show(sent)", sent(ovam, found, key="two", with_picture=False))
    assert page.evaluate("events") == [["lost", {"key": "two"}]]
    assert page.is_visible(".v-empty")
    page.evaluate("sent => view.show(sent)", sent(ovam, found, with_picture=False))  # of the first it knows
    assert page.is_hidden(".v-empty")


def test_the_last_answer_wins(ovam, picture, found, view):
    page = view()
    other = sent(ovam, ovam.segment(picture, ["bus"], crf=False), key="two")
    page.evaluate("([a, b]) => Promise.all([view.show(a), view.show(b)])", [sent(ovam, found), other])
    assert page.locator(".v-word").count() == 1


def test_when_it_appeared(ovam, picture, found, view):
    page = view(sent(ovam, found))
    page.click("[data-over=steps]")
    assert page.evaluate("events") == [["strip", {"label": "dog", "over": "steps"}]]
    frames = [
        (f"step {step + 1}", ovam.segment(picture, "dog", crf=False, step_indices=[step]).grid_maps[0])
        for step in (2, 5, 11)
    ]
    page.evaluate("sent => view.strip(sent)", viewer.strip("one", "dog", "steps", frames))
    settle(page)
    before, top = pixels(page), max(values.max() for _, values in frames)
    assert page.locator(".v-frames button").count() == 3
    page.locator("[data-part=scrub]").fill("1")
    settle(page)
    assert page.text_content(".v-scale b:last-child") == f"{top:.2f}"
    shown, side = pixels(page), pixels(page).shape[0]
    full = resize(torch.from_numpy(frames[1][1])[None], (128, 128))[0].numpy()
    grey = np.asarray(picture.image.convert("L"), float)[..., None] * 0.45
    expected = 0.35 * grey + 0.65 * colorize(full, top)
    for x, y in [(20, 100), (45, 95), (100, 20)]:
        assert np.abs(shown[int((y + 0.5) * side / 128), int((x + 0.5) * side / 128)] - expected[y, x]).max() <= 14
    page.click("[data-part=play]")
    page.wait_for_timeout(900)
    assert page.text_content("[data-part=moment]") == "step 12"
    assert page.text_content("[data-part=play]") == "Play"
    page.click(".v-word >> nth=1")  # of another word, its own strip is wanted
    assert page.evaluate("events.at(-1)") == ["strip", {"label": "car", "over": "steps"}]
    page.click(".v-word >> nth=0")
    page.click(".v-strip .v-x")
    page.mouse.move(2, 2)
    settle(page)
    assert page.is_hidden(".v-strip")
    assert np.array_equal(pixels(page), before)


def test_what_is_of_other_steps_is_asked_for_anew(ovam, picture, found, view):
    page = view(sent(ovam, found), offers(ovam, picture))
    page.click("[data-over=grids]")
    page.evaluate("sent => view.strip(sent)", viewer.strip("one", "dog", "grids", [("1/8", np.ones((2, 2)))]))
    assert page.locator(".v-offer").count()
    once = ovam.segment(picture, WORDS, crf=False, step_indices=[0])
    page.evaluate("sent => view.show(sent)", sent(ovam, once))
    assert page.evaluate("events.slice(1)") == [["candidates", {}], ["strip", {"label": "dog", "over": "grids"}]]
    assert page.locator(".v-offer").count() == 0
    assert page.evaluate("view.rank(60, 60).length") == len(WORDS)
    page.evaluate("sent => view.candidates(sent)", offers(ovam, picture))  # late, and still of all steps
    assert page.locator(".v-offer").count() == 0
    again = viewer.candidates("one", ovam.segment(picture, CLASSES, crf=False, step_indices=[0]))
    page.evaluate("sent => view.candidates(sent)", again)
    assert page.evaluate("view.rank(60, 60).length") == len({*WORDS, *CLASSES})
    page.evaluate("sent => view.show(sent)", sent(ovam, once))
    assert page.evaluate("events.length") == 3


def test_what_does_not_come_is_waited_for_no_more(ovam, picture, found, view):
    page = view(sent(ovam, found), offers(ovam, picture))
    page.click("[data-over=steps]")
    page.click(".v-offer >> nth=0")
    assert page.locator(".waits").count() == 2
    page.evaluate("view.noStrip()")
    page.evaluate("view.unanswered()")
    assert page.locator(".waits").count() == 0


def test_methods_side_by_side(ovam, picture, found, view):
    goca = ovam.segment(picture, WORDS, method="GoCA, any word")
    daam = ovam.segment(picture, WORDS, method="DAAM")
    page = view(sent(ovam, found, daam, goca))
    assert page.locator(".v-column b").all_text_contents() == ["OVAM", "DAAM", "GoCA, any word"]
    assert page.locator(".v-column small").all_text_contents() == [
        f"peak {x.peaks[0]:.2f}" for x in (found, daam, goca)
    ]
    assert page.text_content(".v-scale b:last-child") == "peak"
    widths = {round(box["width"]) for box in (page.locator(".v-column").nth(n).bounding_box() for n in range(3))}
    assert len(widths) == 1
    page.click(".v-column >> nth=2")
    assert np.array_equal(mask_of(page, "car"), goca.masks[1])
    assert page.text_content("[data-part=caption]").endswith("· GoCA, any word")
    choose(page, "winner")
    assert page.get_attribute(".v-column >> nth=2", "aria-pressed") == "true"
    small = pixels(page, 3)
    assert len(np.unique(small.reshape(-1, 3), axis=0)) > 10


def test_a_method_that_cannot_answer_says_so_in_its_column(ovam, picture, found, view):
    payload = sent(ovam, found)
    payload["columns"].append(viewer.failed_column("Attn2Mask", "Attn2Mask looks at step 50 of a run of 100."))
    page = view(payload)
    assert page.text_content(".v-column >> nth=1").endswith("Attn2Mask looks at step 50 of a run of 100.")
    assert page.is_disabled(".v-column >> nth=1")
    page.evaluate("view.tau(0.7)")
    page.wait_for_timeout(400)
    assert page.evaluate("events") == []


def test_a_picture_without_words_is_shown_on_every_layer(ovam, picture, view):
    page = view(viewer.unanswered(picture, ovam.preset, key="one", facts="seed 3", stem="ovam-seed-3"))
    plain = pixels(page)
    for layer in ("masks", "winner", "heatmap"):
        choose(page, layer)
        assert np.array_equal(pixels(page), plain)
    page.click("canvas")
    assert page.text_content(".v-card p") == "No word is asked for yet."


def test_another_picture_comes_with_its_own_threshold(ovam, picture, found, view):
    page = view(sent(ovam, found))
    other = sent(ovam, ovam.segment(picture, WORDS, crf=False, tau=0.5), key="two")
    page.evaluate("view.tau(0.8)")
    page.evaluate("sent => view.show(sent)", other)
    assert iou(mask_of(page, "dog"), ovam.segment(picture, "dog", crf=False, tau=0.5).masks[0]) >= 0.99
    page.evaluate("view.stale('A new picture is coming.'); view.tau(0.8)")  # moved while it is made
    page.evaluate("sent => view.show(sent)", sent(ovam, found))
    assert iou(mask_of(page, "dog"), ovam.segment(picture, "dog", crf=False, tau=0.8).masks[0]) >= 0.99


@pytest.fixture
def saved(ovam, picture, refined, view):
    page = view(sent(ovam, refined), offers(ovam, picture))
    page.click(".v-word >> nth=1")

    def save(kind: str) -> tuple[str, Image.Image]:
        page.click("[data-part=menu] summary")
        with page.expect_download() as download:
            page.click(f"[data-save={kind}]")
        return download.value.suggested_filename, Image.open(download.value.path())

    return save


def test_everything_can_be_saved(picture, refined, saved):
    pixels = np.asarray(picture.image)
    name, image = saved("picture")
    assert name == "ovam-seed-3.png"
    assert np.array_equal(np.asarray(image.convert("RGB")), pixels)
    name, image = saved("mask")
    assert name == "ovam-seed-3-car-mask.png"
    assert image.mode == "L"
    assert np.array_equal(np.asarray(image), refined.masks[1].astype(np.uint8) * 255)
    name, image = saved("cutout")
    cut = np.asarray(image)
    assert name == "ovam-seed-3-car-cutout.png"
    assert image.mode == "RGBA"
    assert np.array_equal(cut[..., 3], refined.masks[1].astype(np.uint8) * 255)
    assert np.array_equal(cut[..., :3][refined.masks[1]], pixels[refined.masks[1]])
    name, image = saved("labels")
    assert name == "ovam-seed-3-labels.png"
    assert image.mode == "P"
    assert (np.asarray(image) != refined.label_map()).mean() < 0.01
    assert tuple(image.getpalette()) == VOC_PALETTE
    name, image = saved("heatmap")
    shown = np.asarray(image.convert("RGB").resize((128, 128), Image.Resampling.BOX), int)
    expected = np.asarray(overlay(picture.image, refined.heatmaps[1], refined.peaks[1]), int)
    assert name == "ovam-seed-3-car-heatmap.png"
    assert image.size == (512, 512)
    assert np.abs(shown - expected).mean() < 4


def test_texts_of_strangers_stay_texts(ovam, found, view):
    bad = "<img src=x onerror='events.push(1)'>"
    payload = sent(ovam, found, facts=bad, key=bad) | {"prompt": bad}
    payload["picture"]["alt"] = bad
    payload["columns"][0]["words"][0] |= {"label": bad, "asked": bad}
    payload["columns"][0] |= {"method": bad, "about": bad}
    offer = {"label": bad + "2", "map": payload["columns"][0]["words"][0]["map"]}
    page = view(payload, {"key": bad, "groups": [{"name": "prompt", "words": [offer]}]})
    page.evaluate("bad => view.stale(bad)", bad)
    page.evaluate("bad => view.strip({key: bad, label: bad, over: bad, frames: []})", bad)
    page.click("canvas")
    assert page.locator(".ovam-viewer img").count() == 0
    assert page.evaluate("events") == []
    assert page.locator(".v-word").first.text_content().startswith(bad)


@pytest.mark.parametrize(("width", "dark"), [(390, False), (820, True), (1280, False), (1920, True)])
def test_nothing_is_cut_off(ovam, picture, found, view, width, dark):
    words = [*WORDS, "a very long phrase about the road", "sheep", "train", "potted plant", "motorbike", "tv", "bus"]
    many = [ovam.segment(picture, words, crf=False, method=method) for method in ("OVAM", "DAAM")]
    page = view(
        sent(ovam, *many, facts="seed 3 · 12 steps · guidance 4 · 128 × 128 px · 2.0 s on cpu"),
        offers(ovam, picture),
        width,
        900,
        dark,
    )
    page.evaluate(
        "sent => view.strip(sent)",
        viewer.strip("one", "dog", "heads", [(f"head {n}", found.grid_maps[0]) for n in range(40)]),
    )
    for layer in ("masks", "winner", "picture", "heatmap"):
        choose(page, layer)
        page.click("canvas >> nth=0", position={"x": 200, "y": 200})
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        outside = page.evaluate(
            """() => [...root.querySelectorAll('*')]
            .filter(x => x.checkVisibility() && !x.closest('.v-frames, .v-spoken'))
            .map(x => x.getBoundingClientRect())
            .filter(box => box.left < -0.5 || box.right > innerWidth + 0.5).length"""
        )
        assert outside == 0
        page.keyboard.press("Escape")
    box = page.locator("canvas").first.bounding_box()
    assert box["height"] <= 0.7 * 900 + 1
    assert abs(box["width"] - box["height"]) <= 1
    shoot(page, f"viewer-{width}", full=True)
