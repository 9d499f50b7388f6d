"""Calls that no page would make: each endpoint, each kind of bad value in each place. The answer is a sentence."""

from __future__ import annotations

import asyncio
import json
import math
import re
import tempfile
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import httpx
import pytest
from gradio.state_holder import SessionState

import app
from ovam_core import OVAM
from ovam_core.settings import GenerateSettings
from tabs.export import ExportTab
from tabs.sentences import MAX_SENTENCE, OUR_FAULT
from tabs.session import HOSTED, Sessions

NAME = "malformed"
BAD = {
    "400 digits": 10**400,
    "as many below 0": -(10**400),
    "no number": math.nan,
    "infinity": math.inf,
    "-1": -1,
    "a part": 1.5,
    "yes": True,
    "none": None,
    "no text": "",
    "a number as text": "NaN",
    "half a character": "\ud800",
    "markup": "<img src=x onerror=alert(1)>",
    "100,000 characters": "x" * 100_000,
    "a choice that is none": "no such choice",
    "a list": ["no such choice"],
    "a list of lists": [[1], [{}]],
    "a long list": ["cat"] * 5000,
    "a deep list": json.loads("[" * 500 + "]" * 500),
    "halves in a list": ["\udfff"],
    "an object": {"a": 1},
    "an update": {"__type__": "update", "value": 1},
    "a file elsewhere": {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}},
    "a file outside": {"path": "../../etc/passwd", "meta": {"_type": "gradio.FileData"}},
    "an address": {"path": "http://127.0.0.1/x.png", "meta": {"_type": "gradio.FileData"}},
    "a file that is none": {"path": 5},
    "a file of halves": {"path": "\ud800\0", "meta": {"_type": "gradio.FileData"}},
}


@pytest.fixture(scope="module")
def page(ovam):
    """With the bounds of a shared Space; its own, as its visitors are none of the others'."""
    sessions = Sessions(ovam.name, limits_of_exports=HOSTED)
    yield app.build(ovam, sessions=sessions)
    sessions.close()


@pytest.fixture(scope="module")
def picture(ovam):
    settings = GenerateSettings.for_model(ovam.pipe, "A cat", seed=1, steps=1, width=64, height=64)
    return ovam.draw(settings, with_goca=True)


@pytest.fixture
def quick(monkeypatch, picture):
    """The model's work is done: what gets so far has passed every check."""
    monkeypatch.setattr(OVAM, "draw", lambda *_, **__: picture)
    monkeypatch.setattr(OVAM, "look_at", lambda *_, **__: picture)
    monkeypatch.setattr(ExportTab, "make", lambda *_: iter([(gr.skip(),) * 6]))


def endpoints(page: gr.Blocks) -> dict[str, object]:
    """One of each function, by name, but those of programs (test_programs.py)."""
    events = (event for event in page.fns.values() if event.fn and event.api_visibility != "public")
    return {event.fn.__qualname__: event for event in events}


NAMES = (
    "GenerateTab.begin",
    "GenerateTab.run",
    "GenerateTab.redraw",
    "GenerateTab.redraw_how",
    "GenerateTab.redraw_renewed",
    "GenerateTab.candidates_anew",
    "GenerateTab.evolution",
    "GenerateTab.film_of",
    "GenerateTab.followed",
    "GenerateTab.recalled",
    "GenerateTab.shown_again",
    "GenerateTab.opened",
    "GenerateTab.settle",
    "GenerateTab.choose",
    "GenerateTab.rules",
    "GenerateTab.brought",
    "GenerateTab.zip_of",
    "GenerateTab.stop_work",
    "OptimizeTab.check_photograph",
    "OptimizeTab.take_photograph",
    "OptimizeTab.take_picture",
    "OptimizeTab.take_if_none",
    "OptimizeTab.draw_picture",
    "OptimizeTab.usual",
    "OptimizeTab.take_mask",
    "OptimizeTab.take_word",
    "OptimizeTab.take_spot",
    "OptimizeTab.begin",
    "OptimizeTab.run",
    "OptimizeTab.elsewhere",
    "OptimizeTab.rest",
    "OptimizeTab.stop_picture",
    "OptimizeTab.stop_work",
    "ExportTab.choose",
    "ExportTab.begin",
    "ExportTab.run",
    "ExportTab.foresee",
    "ExportTab.greet",
    "ExportTab.idle",
    "ExportTab.open",
    "ExportTab.remove",
    "ExportTab.resume",
    "ExportTab.stop_work",
)


def test_these_are_all_endpoints(page):
    others = {name for name in endpoints(page) if "<lambda>" not in name and not name.startswith("_idle")}
    assert others == set(NAMES)


def usual(field) -> object:
    """What the page would send at first, as small as it can be."""
    small = {"Steps": 1, "Width": 64, "Height": 64, "Epochs": 1, "Images a prompt": 1, "dCRF": False}
    return small.get(getattr(field, "label", None), getattr(field, "value", None))


async def call(page: gr.Blocks, event, values: list, state: SessionState) -> None:
    """As the queue does it, to the end."""
    iterator, request = None, SimpleNamespace(session_hash=NAME)
    while True:
        done = await page.process_api(
            block_fn=event, inputs=list(values), state=state, request=request, iterator=iterator
        )
        iterator = done["iterator"]
        if not done["is_generating"]:
            return


def is_sentence(text: str) -> bool:
    text.encode()
    paths = re.escape(tempfile.gettempdir()) + r"|/work/|site-packages|Traceback|Error:"
    return text[:1] != "" and text != OUR_FAULT and len(text) <= MAX_SENTENCE and not re.search(paths, text)


@pytest.mark.parametrize("name", NAMES)
def test_every_bad_value_in_every_place(page, quick, name, picture):
    event, state, wrong = endpoints(page)[name], SessionState(page), []

    async def try_all():
        for place, field in enumerate(event.inputs):
            for kind, value in BAD.items():
                for stateful in event.inputs:  # the ids of pictures, which no client sends
                    if isinstance(stateful, gr.State):
                        state[stateful._id] = page.sessions.of(SimpleNamespace(session_hash=NAME)).keep(picture)
                values = [usual(field) for field in event.inputs]
                values[place] = value
                try:
                    await call(page, event, values, state)
                except gr.Error as error:
                    if not is_sentence(error.message) or "<img" in error.message:
                        wrong.append((getattr(field, "label", None), kind, error.message))
                except Exception as error:
                    wrong.append((getattr(field, "label", None), kind, repr(error)))

    asyncio.run(try_all())
    assert wrong == []


@pytest.mark.parametrize("name", NAMES)
def test_too_few_values(page, name):
    event = endpoints(page)[name]
    if event.inputs:
        with pytest.raises(gr.Error, match="send all of them"):
            asyncio.run(call(page, event, [1] * (len(event.inputs) - 1), SessionState(page)))


def test_too_many_values_are_no_fault(page, quick):
    event = endpoints(page)["GenerateTab.choose"]
    asyncio.run(call(page, event, ["Generate", 1, 2], SessionState(page)))


def test_a_file_that_is_no_picture(page, quick):
    """Uploads of every wrong kind where a picture, a token or prompts are wanted."""
    folder = page.GRADIO_CACHE
    kinds = {"x.png": b"no picture", "x.csv": b"\xff\xfe\0", "x.safetensors": b"\xff" * 99, "x.json": b"[" * 9999}
    own = Path(folder) / "malformed"
    own.mkdir(parents=True, exist_ok=True)
    places = {
        "GenerateTab.brought": None,
        "ExportTab.begin": None,
    }
    for name, body in kinds.items():
        (own / name).write_bytes(body)
        sent = {"path": str(own / name), "meta": {"_type": "gradio.FileData"}}
        for endpoint, place in places.items():
            event = endpoints(page)[endpoint]
            values = [usual(field) for field in event.inputs]
            where = (
                next(n for n, field in enumerate(event.inputs) if isinstance(field, gr.File | gr.UploadButton))
                if place is None
                else place
            )
            values[where] = sent
            if endpoint == "ExportTab.begin":
                values = [
                    "My own prompts" if field.elem_id == "export-way" else value
                    for field, value in zip(event.inputs, values, strict=True)
                ]
            with pytest.raises(gr.Error) as caught:
                asyncio.run(call(page, event, values, SessionState(page)))
            assert is_sentence(caught.value.message), (endpoint, name)
            assert str(own) not in caught.value.message


# --------------------------------------------------------------------------------------- through the server


@pytest.fixture(scope="module")
def web(address):
    with httpx.Client(base_url=address, timeout=60) as client:
        yield client


def post(web: httpx.Client, path: str, body: object) -> httpx.Response:
    return web.post(path, content=json.dumps(body).encode(), headers={"content-type": "application/json"})


@pytest.mark.parametrize("value", ["\ud800", 10**400, math.nan, [[1]], {"path": "/etc/passwd"}, True, "x" * 30_000])
def test_the_server_answers_in_a_sentence(web, blocks, value):
    rules = next(number for number, event in blocks.fns.items() if event.name == "rules")  # which needs no queue
    answer = post(web, "/gradio_api/run/predict", {"data": [value], "fn_index": rules, "session_hash": NAME})
    assert answer.status_code == 422
    assert is_sentence(answer.json()["error"])
    body = {"data": [value, "", 1, 1, 4, 64, 64, "plain"], "session_hash": NAME}
    assert post(web, "/gradio_api/run/generate", body).status_code == 404  # nobody passes by the queue
    queued = post(web, "/gradio_api/call/generate", {"data": body["data"]}).json()["event_id"]
    events = web.get(f"/gradio_api/call/generate/{queued}").text
    assert "event: error" in events
    assert is_sentence(json.loads(events.split("data: ")[-1])["error"])


def test_requests_that_are_none(web):
    for path, body in (
        ("/gradio_api/run/nothing", {"data": []}),
        ("/gradio_api/call/nothing", {"data": []}),
        ("/gradio_api/call/v2/generate", {"no": "parameter"}),
        ("/gradio_api/call/v2/generate", [1]),
        ("/gradio_api/queue/join", {"data": [], "fn_index": 10**9, "session_hash": NAME}),
        ("/gradio_api/queue/join", {"data": [], "session_hash": NAME}),
        ("/gradio_api/queue/join", {"data": [], "fn_index": 0}),
        ("/gradio_api/cancel", {"session_hash": "\ud800"}),
        ("/gradio_api/reset", 5),
        ("/gradio_api/component_server", {"data": {}, "component_id": 1, "session_hash": NAME, "fn_name": "x"}),
        ("/gradio_api/run/generate", "\ud800"),
    ):
        answer = post(web, path, body)
        assert 400 <= answer.status_code < 500, path
        assert answer.json()["detail"], path
    for path in ("/monitoring", "/monitoring/summary", "/gradio_api/deep_link?session_hash=x", "/gradio_api/vibe-code"):
        assert web.get(path).status_code in (403, 404), path
    answer = web.post("/gradio_api/upload", files={"files": ("x" * 400 + "\0/../..", b"x")})
    assert answer.status_code < 500
    assert web.get("/config").status_code == web.get("/gradio_api/info").status_code == 200


def test_nobody_ends_anothers_session(web, sessions):
    mine = sessions.of(SimpleNamespace(session_hash="mine-0123456789"))
    key = mine.keep(SimpleNamespace(nbytes=1))
    for way, body in (("run", {}), ("call", {}), ("queue/join", {"fn_index": 10**6})):
        answer = post(web, f"/gradio_api/{way}/leave", {"data": [], "session_hash": "mine-0123456789"} | body)
        assert answer.status_code in (404, 405)
    assert not mine.left
    assert mine.picture(key)
