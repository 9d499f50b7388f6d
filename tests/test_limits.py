"""What bounds the page before any work is done, and what is given back: canvas, bodies, sessions, disk, port."""

from __future__ import annotations

import asyncio
import base64
import errno
import io
import json
import os
import signal
import socket
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import httpx
import pytest
from gradio.state_holder import SessionState
from PIL import Image
from starlette._utils import get_route_path

import app
from ovam_core.data.prompts import Prompt
from ovam_core.errors import InputError
from tabs.canvas import MAX_LAYER_BYTES, MAX_LAYER_PIXELS, MAX_LAYERS, MAX_PAINT, URL, flattened
from tabs.doors import Beats, Doors, _path, watch
from tabs.events import LETTERBOX, MAX_CHARS, NO_MEMORY, NO_ROOM, stamped
from tabs.export import OWN, prompts_of
from tabs.fields import small_enough
from tabs.optimize import OptimizeTab
from tabs.scratch import ended_by_signals, patient, sweep
from tabs.sentences import OUR_FAULT, shown
from tabs.session import FULL, HOSTED, LOCAL, Bounds, Sessions

ROOT = Path(app.__file__).parent


def png(width: int, height: int, mode: str = "RGBA", color=(230, 159, 0, 255)) -> bytes:
    data = io.BytesIO()
    Image.new(mode, (width, height), color).save(data, "PNG")
    return data.getvalue()


def huge(width: int, height: int) -> bytes:
    """A PNG that says it is this large and holds next to nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes((8, 6, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


LAYER = png(64, 64)


@pytest.fixture
def nothing_decoded(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("decoded")

    monkeypatch.setattr(Image.Image, "load", fail)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)


# ------------------------------------------------------------------------------------------------ the canvas


def test_layers_lie_upon_one_another(tmp_path):
    (tmp_path / "top.png").write_bytes(png(4, 4, color=(0, 0, 255, 255)))
    left = Image.new("RGBA", (4, 4))
    left.paste((255, 0, 0, 255), (0, 0, 2, 4))
    drawn = flattened([str(tmp_path / "top.png"), left])
    assert drawn.getpixel((0, 0)) == (255, 0, 0, 255)
    assert drawn.getpixel((3, 3)) == (0, 0, 255, 255)


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ([], "Nothing is painted"),
        ([huge(30_000, 30_000)], "too large"),
        ([huge(MAX_LAYER_PIXELS // 1024 + 1, 1024)], "4097x1024; at most"),
        ([huge(8, 8)] * (MAX_LAYERS + 1), "layers"),
        ([b"\x89PNG" + b"x" * MAX_LAYER_BYTES], "MB"),
        ([b"no picture"], "no picture"),
        (["/no/such/file.png"], "no picture"),
    ],
)
def test_layers_are_bounded_before_they_are_decoded(nothing_decoded, layers, said):
    with pytest.raises(InputError, match=said):
        flattened(layers)


def test_layers_that_are_broken_or_differ():
    with pytest.raises(InputError, match="no picture that can be read"):
        flattened([huge(8, 8)])
    with pytest.raises(InputError, match="differ in size"):
        flattened([png(4, 4), png(4, 5)])


def tab_of(blocks, kind: str):
    return next(
        event.fn.__self__
        for event in blocks.fns.values()
        if getattr(event.fn, "__qualname__", "").startswith(f"{kind}.") and hasattr(event.fn, "__self__")
    )


def begun(tab, request, **changed):
    """What the page is told where a search is asked for."""
    values = {field: field.value for field in (tab.way, *tab.search_by)} | {
        tab.key: None,
        tab.paint: "",
        tab.name: "cat",
    }
    mail, number, _ = tab.begin(values | {getattr(tab, name): value for name, value in changed.items()}, request)
    assert number == ""
    return mail


def test_without_a_picture_nothing_is_decoded(blocks, nothing_decoded):
    tab = tab_of(blocks, "OptimizeTab")
    assert isinstance(tab, OptimizeTab)
    paint = URL + base64.b64encode(LAYER).decode()
    mail = begun(tab, SimpleNamespace(session_hash="nobody"), paint=paint)
    assert (mail["kind"], mail["place"]) == ("refused", "learn")
    assert "generate one first" in mail["said"]


def test_what_is_no_canvas_is_not_decoded(blocks, sessions, nothing_decoded):
    tab, request = tab_of(blocks, "OptimizeTab"), SimpleNamespace(session_hash="painter")
    picture = SimpleNamespace(nbytes=1, image=Image.new("RGB", (8, 8)))
    key = sessions.of(request).keep(picture)
    for wrong in ("x", "/etc/passwd", "data:image/svg+xml;base64,PHN2Zz4=", f"{URL}?", 5):
        assert "paint anew" in begun(tab, request, key=key, paint=wrong)["said"]
    for wrong in ([1], {"layers": 5}, True):
        assert "write text" in begun(tab, request, key=key, paint=wrong)["said"]
    large = URL + base64.b64encode(huge(30_000, 30_000)).decode()
    assert "too large" in begun(tab, request, key=key, paint=large)["said"]


def test_what_is_painted_may_be_longer_than_other_texts(blocks):
    tab = tab_of(blocks, "OptimizeTab")
    event = next(event for event in blocks.fns.values() if getattr(event.fn, "__qualname__", "") == "OptimizeTab.begin")
    place = event.inputs.index(tab.paint)
    for length, said in ((MAX_PAINT, None), (MAX_PAINT + 1, "at most 2,000,000 can be sent")):
        values = [getattr(field, "value", None) for field in event.inputs]
        values[place] = "x" * length
        ask = blocks.preprocess_data(event, values, None)
        if said:
            with pytest.raises(gr.Error, match=said):
                asyncio.run(ask)
        else:
            assert asyncio.run(ask)[place] == values[place]


CHILD = """
import io, os, sys
from PIL import Image
from tabs.canvas import flattened
from tabs.scratch import trim_memory

def now():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6

def layer():
    data = io.BytesIO()
    Image.new("RGBA", (2048, 2048), (230, 159, 0, 9)).save(data, "PNG", compress_level=1)
    return data.getvalue()

one = layer()
flattened([one])
trim_memory()
before = now()
for _ in range(3):
    flattened([one] * 4)
trim_memory()
after = now()
peak = int(next(x for x in open("/proc/self/status") if x.startswith("VmHWM")).split()[1]) / 1e3
print(before, after, peak)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc")
def test_the_memory_of_a_canvas_is_bounded_and_returns():
    out = subprocess.run([sys.executable, "-c", CHILD], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    before, after, peak = map(float, out.split())
    layer = 2048 * 2048 * 4 / 1e6
    assert after - before < layer
    assert peak - before < 6 * layer  # two upon one another, the result, and what PIL needs of its own


# ------------------------------------------------------------------------------------- photographs, prompts


def test_pictures_are_bounded_by_their_header(tmp_path, nothing_decoded):
    (tmp_path / "large.png").write_bytes(huge(6000, 6000))
    with pytest.raises(InputError, match="6000x6000"):
        small_enough(str(tmp_path / "large.png"), HOSTED.pixels)
    assert small_enough(str(tmp_path / "large.png"), LOCAL.pixels)
    assert small_enough(str(tmp_path / "none.png"), 1) is not None  # for others to say
    assert small_enough(None, 1) is None


def test_prompts_are_bounded_before_they_are_read(tmp_path, monkeypatch):
    names = [f"class {number}" for number in range(254)]
    rows = tmp_path / "rows.txt"
    rows.write_text("a cat\n" * (HOSTED.prompts + 1))
    with pytest.raises(InputError, match="200 prompts"):
        prompts_of(OWN, "", names, "", str(rows), HOSTED)
    with pytest.raises(InputError, match="200 prompts"):
        prompts_of(OWN, "", names, rows.read_text(), None, HOSTED)
    with pytest.raises(InputError, match="500,000"):
        prompts_of(OWN, "", names, "x" * (HOSTED.text + 1), None, HOSTED)
    large = tmp_path / "large.json"
    large.write_bytes(b'{"annotations": [' + b" " * HOSTED.text + b"]}")
    for reader in ("json.loads", "csv.reader"):
        monkeypatch.setattr(reader, lambda *_, **__: pytest.fail("parsed"))
    with pytest.raises(InputError, match="500 kB"):
        prompts_of(OWN, "", names, "", str(large), HOSTED)
    assert prompts_of(OWN, "", [], "a cat", None, HOSTED)[0] == [Prompt("a cat", source="line 1")]


# --------------------------------------------------------------------------------------------------- sessions


def test_sessions_are_bounded_and_those_with_something_stay():
    made = Sessions("emoji-voc", Bounds(sessions=3))
    ann, *_ = (made.of(SimpleNamespace(session_hash=name)) for name in ("ann", "bob", "cas"))
    key = ann.keep(SimpleNamespace(nbytes=1))
    for number in range(100):
        made.of(SimpleNamespace(session_hash=str(number)))
    assert len(made._sessions) == 3
    assert made.of(SimpleNamespace(session_hash="ann")).picture(key)
    for name in ("98", "99"):
        made.of(SimpleNamespace(session_hash=name)).keep(SimpleNamespace(nbytes=1))
    with pytest.raises(InputError, match="Too many visitors") as caught:
        made.of(SimpleNamespace(session_hash="one more"))
    assert str(caught.value) == FULL
    made.close()


def test_works_that_were_only_announced_keep_nobody_out():
    now = [0.0]
    made = Sessions("emoji-voc", Bounds(sessions=3), clock=lambda: now[0])
    for number in range(10):
        made.of(SimpleNamespace(session_hash=str(number))).begin("generate")
    for number in range(7, 10):
        made.of(SimpleNamespace(session_hash=str(number))).download_folder()
    with pytest.raises(InputError, match="Too many visitors"):
        made.of(SimpleNamespace(session_hash="one more"))
    now[0] = made.bounds.unconnected
    assert made.of(SimpleNamespace(session_hash="one more"))
    made.close()


def test_only_ones_own_connection_ends_a_session():
    now = [0.0]
    beats = Beats(lambda: now[0])
    assert beats.open("ann")
    beats.heard("ann")
    now[0] = 1000.0
    assert beats.open("ann")  # a second page, or a stranger
    assert not beats.close("ann")  # whoever closes first
    assert beats.close("ann")
    assert beats.open("ann")  # back again
    assert beats.close("ann")
    beats.heard("bob")  # a program without such a connection
    now[0] = 2000.0
    assert not beats.open("bob")


def test_what_is_known_of_connections_is_bounded():
    beats = Beats(most=5)
    assert beats.open("ann")
    for number in range(100):
        beats.heard(str(number))
    assert len(beats._first) == 5
    assert beats.connected("ann")
    assert beats.close("ann")
    assert not beats.connected("ann")
    assert not beats._open  # who is forgotten does not stay there


# ------------------------------------------------------------------------------------------------- the doors


def asked(inner, method="POST", path="/gradio_api/queue/join", tmp_path=None, **more) -> httpx.Response:
    """A request through the doors to an app that stands in for Gradio's."""
    function = SimpleNamespace(api_name="generate", fn=print)
    page = SimpleNamespace(fns={0: function, 1: SimpleNamespace(api_name="js", fn=None)}, GRADIO_CACHE=str(tmp_path))
    doors = Doors(inner, page, SimpleNamespace(leave=print), 1000)

    async def ask():
        transport = httpx.ASGITransport(app=doors)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return await client.request(method, path, **more)

    return asyncio.run(ask())


@pytest.mark.parametrize(
    ("path", "root", "inner"),
    [
        ("/gradio_api/run/f", "/gradio", "/gradio_api/run/f"),
        ("/gradio/gradio_api/run/f", "/gradio", "/gradio_api/run/f"),
        ("/gradio", "/gradio", ""),
        ("/gradio_api/run/f", "", "/gradio_api/run/f"),
        ("/a/b", "/a/", "/a/b"),
        ("/a/b", "https://here/a", "/a/b"),
    ],
)
def test_only_the_whole_root_is_no_part_of_the_path(path, root, inner):
    assert _path({"path": path, "root_path": root}) == inner == get_route_path({"path": path, "root_path": root})


async def echo(scope, receive, send):
    message = await receive()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": message.get("body", b"")})


CALL = {"data": [], "session_hash": "ann", "fn_index": 0}


def test_a_call_goes_through_as_it_came():
    assert asked(echo, json=CALL).json() == CALL
    assert asked(echo, path="/gradio_api/call/generate", json={"data": [1]}).json() == {"data": [1]}
    own = asked(echo, path="/gradio_api/run/generate", json={"data": []}).json()["session_hash"]
    assert own != asked(echo, path="/gradio_api/run/generate", json={"data": []}).json()["session_hash"]


@pytest.mark.parametrize(
    ("more", "status", "said"),
    [
        ({"content": b"{"}, 400, "not JSON"),
        ({"content": b"[" * 100_000}, 400, "not JSON"),
        ({"content": b"1" * 5000}, 400, "not JSON"),
        ({"json": []}, 400, "no JSON object"),
        ({"content": json.dumps(CALL | {"data": "\ud800"}).encode()}, 400, "'data'"),
        ({"json": CALL | {"fn_index": 99}}, 404, "no function"),
        ({"json": CALL | {"fn_index": 1}}, 404, "no function"),
        ({"json": CALL | {"fn_index": "0"}}, 404, "no function"),
        ({"json": CALL | {"trigger_id": "x"}}, 400, "cannot be read"),
        ({"json": CALL | {"session_hash": "x" * 2000}}, 400, "64 letters"),
        ({"json": CALL | {"session_hash": ["x"]}}, 400, "64 letters"),
        ({"json": CALL | {"session_hash": "../x"}}, 400, "64 letters"),
        ({"json": CALL | {"session_hash": ""}}, 400, "64 letters"),
        ({"content": b"x" * (2 << 20)}, 413, "1 MB"),
        ({"json": {"data": []}, "path": "/gradio_api/run/leave"}, 404, "/leave"),
        ({"json": {"data": []}, "path": "/gradio_api/call/js"}, 404, "/js"),
        ({"json": {"data": [], "fn_index": 1}, "path": "/gradio_api/run/v2x"}, 404, "no function"),
        ({"json": {"data": []}, "path": "/gradio_api/run/v2x"}, 404, "/v2x"),
        ({"json": {"fn_index": 0}, "path": "/gradio_api/run/v2/generate"}, 400, "'data'"),
        ({"json": {"fn_index": 0}, "path": "/gradio_api/call/v2/"}, 400, "'data'"),
        ({"json": {"fn_index": 0}, "path": "/gradio_api/call/v2/js"}, 404, "/js"),
        ({"content": b"x" * (22 << 20), "path": "/gradio_api/upload"}, 413, "21 MB"),
        ({"method": "GET", "path": "/monitoring/summary"}, 404, "no such address"),
        ({"method": "GET", "path": "/monitoring"}, 404, "no such address"),
        ({"method": "GET", "path": "/gradio_api/proxy=http://a.b/"}, 404, "no such address"),
        ({"method": "GET", "path": "/gradio_api/file=HTTPS://a.b/"}, 404, "no such address"),
        ({"method": "GET", "path": "/gradio_api/deep_link"}, 404, "no such address"),
        ({"path": "/gradio_api/process_recording"}, 404, "no such address"),
        ({"method": "GET", "path": f"/gradio_api/heartbeat/{'x' * 65}"}, 400, "64 letters"),
        ({"method": "GET", "path": f"/gradio_api/queue/data?session_hash={'x' * 65}"}, 400, "64 letters"),
    ],
)
def test_what_does_not_pass(more, status, said, tmp_path):
    def fail(*_):
        pytest.fail("reached Gradio")

    async def reads(scope, receive, send):
        if scope["path"].endswith("upload"):
            while (await receive()).get("more_body"):
                pass
        fail()

    answer = asked(reads, tmp_path=tmp_path, **more)
    assert answer.status_code == status
    assert said in answer.json()["error"] == answer.json()["detail"]


def test_gradio_keeps_no_layers_of_a_canvas():
    assert asked(echo, path="/gradio_api/component_server", data={"type": "layer"}).status_code == 404


def test_gradios_faults_are_sentences(tmp_path):
    def failing(error):
        async def fail(*_):
            raise error

        return fail

    full = asked(failing(OSError(errno.ENOSPC, "no space", "/secret")), tmp_path=tmp_path, path="/gradio_api/upload")
    assert (full.status_code, full.json()["error"]) == (507, NO_ROOM)
    other = asked(failing(KeyError("secret")), json=CALL)
    assert other.status_code == 400
    assert "secret" not in other.text

    def answering(said):
        async def answer(scope, receive, send):
            await send({"type": "http.response.start", "status": 500, "headers": []})
            await send({"type": "http.response.body", "body": json.dumps({"error": said}).encode()})

        return answer

    assert asked(answering("Seed is x; give a number."), json=CALL).status_code == 422
    assert asked(answering(OUR_FAULT), json=CALL).status_code == 500


@pytest.mark.parametrize("ours", [True, False])
def test_what_is_left_of_an_upload_that_broke_off_goes_from_ones_own_folder(tmp_path, ours):
    cache = tmp_path / ("ovam-page-1" if ours else "everybody") / "gradio"
    (cache / "0123").mkdir(parents=True)
    (cache / "0123" / "whole.png").touch()

    async def breaks_off(*_):
        (cache / "tmp1234").touch()
        raise ConnectionError

    assert asked(breaks_off, path="/gradio_api/upload", tmp_path=cache).status_code == 400
    assert sorted(path.name for path in cache.rglob("*")) == ["0123", *(() if ours else ("tmp1234",)), "whole.png"]


def test_a_mail_like_the_last_is_another(blocks):
    """Else the page, which hears of changes alone, would go on waiting."""
    mail, box, state = {"kind": "note"}, SimpleNamespace(elem_classes=[LETTERBOX]), SimpleNamespace()
    first, second = (stamped([box, state], (mail, {"kind": "value"})) for _ in range(2))
    assert first[0] != second[0]
    assert first[0] | {"stamp": ""} == mail | {"stamp": ""}
    assert first[1] == {"kind": "value"}
    assert stamped([box], gr.skip()) == gr.skip()
    assert stamped([box], mail).keys() == {"kind", "stamp"}
    assert sum(LETTERBOX in (one.elem_classes or ()) for one in blocks.blocks.values() if one.is_rendered) == 6


def test_what_is_typed_is_no_longer_than_what_may_be_sent(blocks):
    """A text that the server refuses unread, beside no field."""
    boxes = [one for one in blocks.blocks.values() if isinstance(one, gr.Textbox) and one.visible is True]
    assert {one.label for one in boxes if not one.max_length} == {"Prompts, one a line"}
    assert max(one.max_length or 0 for one in boxes) <= MAX_CHARS


def test_files_are_cleared_away_while_others_come(tmp_path):
    """Gradio's task that does so every hour would end with its first error."""
    (tmp_path / "answer-1").mkdir()
    (tmp_path / "answer-2").mkdir()
    (tmp_path / "answer-2" / "mask.png").touch()
    (tmp_path / "0123").mkdir()
    calls = []

    def clear_files(_page, age):
        calls.append(age)
        if len(calls) == 1:
            raise RuntimeError("Set changed size during iteration")

    page = SimpleNamespace(GRADIO_CACHE=str(tmp_path))
    patient(clear_files)(page, 60)
    assert calls == [60, 60]
    assert len(list(tmp_path.iterdir())) == 3  # one is still being filled, perhaps
    for folder in ("answer-1", "answer-2"):
        os.utime(tmp_path / folder, (0, 0))
    patient(clear_files)(page, 60)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0123", "answer-2"]


# ------------------------------------------------------------------------- faults beside the handlers


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/secret"), NO_ROOM),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), NO_ROOM),
        (RuntimeError("I/O error: No space left on device (os error 28)"), NO_ROOM),
        (MemoryError(), NO_MEMORY),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), NO_MEMORY),
        (ValueError("a bug of ours, /secret"), OUR_FAULT),
        (InputError("Too <b>much</b>; give less."), "Too &lt;b&gt;much&lt;/b&gt;; give less."),
    ],
)
@pytest.mark.parametrize("where", ["handler", "answer"])
def test_what_goes_wrong_is_said(error, said, where, monkeypatch):
    def fail(*_, **__):
        raise error

    with gr.Blocks() as page:
        box, out = gr.Textbox(label="Box"), gr.Textbox()
        event = gr.Button().click(fail if where == "handler" else str, box, out)
    watch(page, {})
    if where == "answer":
        monkeypatch.setattr(gr.Textbox, "postprocess", fail)
    function = page.fns[event["id"]] if isinstance(event, dict) else next(iter(page.fns.values()))
    with pytest.raises(gr.Error) as caught:
        asyncio.run(page.process_api(block_fn=function, inputs=["x"], state=SessionState(page)))
    assert caught.value.message == said


def test_no_sentence_names_a_folder_of_the_server(monkeypatch, tmp_path):
    monkeypatch.setenv("GRADIO_TEMP_DIR", "/srv/cache")
    assert shown("The file '/srv/cache/0af3/my prompts.txt' is empty.") == "The file 'my prompts.txt' is empty."
    assert shown(f"No {Path.home()}/models/x.bin here.") == "No x.bin here."
    assert shown("/srv/cache/a/b.png: no") == "b.png: no"
    assert shown("a share of 1/8, and 1/16/2") == "a share of 1/8, and 1/16/2"
    assert shown("half \ud800") == "half ?"


# ---------------------------------------------------------------------------------------------------- disk

HOLDER = """
import sys, tempfile, time
from tabs.scratch import ended_by_signals, own_folder
with ended_by_signals(), own_folder() as folder:
    tempfile.mkdtemp(prefix="ovam-session-")
    (folder / "gradio").mkdir()
    print(folder, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def start(tmp_path):
    """Starts a process that holds a folder; gives it and the folder's name."""
    running = []

    def begin():
        environment = {**os.environ, "TMPDIR": str(tmp_path)}
        environment.pop("GRADIO_TEMP_DIR", None)
        one = subprocess.Popen([sys.executable, "-c", HOLDER], cwd=ROOT, env=environment, stdout=-1, text=True)
        running.append(one)
        return one, Path(one.stdout.readline().strip())

    yield begin
    for one in running:
        one.kill()
        one.wait()


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_what_was_killed_is_cleared_away_at_the_next_start_and_at_the_end(start, tmp_path):
    killed, left = start()
    killed.kill()
    killed.wait()
    assert (left / "gradio").is_dir()
    _, living = start()
    assert not left.exists()
    ended, folder = start()
    assert (living / "gradio").is_dir()  # of a process that still runs
    assert folder.is_dir()
    ended.send_signal(signal.SIGTERM)
    assert ended.wait(30) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [living.name, f"{living.name}.lock"]


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="signals")
def test_what_nohup_ignores_is_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ended_by_signals():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            signal.raise_signal(signal.SIGHUP)
            with pytest.raises(SystemExit):
                signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_others_links_are_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "target").write_text("kept")
    (tmp_path / "ovam-page-1.lock").symlink_to(tmp_path / "target")
    (tmp_path / "ovam-page-1").symlink_to(tmp_path / "mine")
    (tmp_path / "ovam-page-2").mkdir()  # nobody knows whose
    sweep(tmp_path)
    assert (tmp_path / "target").read_text() == "kept"
    assert (tmp_path / "mine").is_dir()
    assert (tmp_path / "ovam-page-2").is_dir()


# ---------------------------------------------------------------------------------------------------- port


@pytest.fixture
def no_model(monkeypatch):
    monkeypatch.setattr(app, "open_model", lambda _: pytest.fail("opened a model"))


def test_a_taken_port_is_said(no_model, monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setenv("GRADIO_SERVER_PORT", str(port))
        assert app.main() == 2
    assert capsys.readouterr().err.startswith(f"Error: Port {port} of '127.0.0.1' cannot be served")
    assert app.wanted_port() == port


@pytest.mark.parametrize(
    "error",
    [
        ValueError("When localhost is not accessible, ... or check your proxy settings to allow access to localhost."),
        Exception("Couldn't start the app because ... Check your network or proxy settings to ensure ..."),
        httpx.ProxyError("403 Forbidden"),
        httpx.ConnectError("no way"),
        OSError("Cannot find empty port in range: 7860-7959."),
    ],
)
def test_a_page_that_cannot_start_says_so(ovam, monkeypatch, capsys, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(app, "open_model", lambda _: (ovam, ""))
    monkeypatch.setattr(app, "opens_with_picture", lambda _: False)
    monkeypatch.setattr(app, "build", lambda *_: SimpleNamespace(is_running=False, close=lambda verbose: None))
    monkeypatch.setattr(app, "launch", fail)
    assert app.main() == 2
    said = capsys.readouterr().err
    assert said.startswith("Error: The page cannot start: ")
    assert said.count("\n") == 1


def test_a_bug_at_the_start_keeps_its_traceback(monkeypatch):
    def fail(*_, **__):
        raise ValueError("of ours")

    monkeypatch.setattr(app, "build", lambda *_: SimpleNamespace(is_running=False, close=lambda verbose: None))
    monkeypatch.setattr(app, "launch", fail)
    monkeypatch.setattr(app, "opens_with_picture", lambda _: False)
    with pytest.raises(ValueError, match="of ours"):
        app.serve(SimpleNamespace(name="emoji-voc"), "", None)


@pytest.mark.parametrize("port", ["seven", "0", "65536", "1" * 400, "-1", "80.5"])
def test_a_port_that_is_none_is_said(no_model, monkeypatch, capsys, port):
    monkeypatch.setenv("GRADIO_SERVER_PORT", port)
    assert app.main() == 2
    said = capsys.readouterr().err
    assert said.startswith("Error: GRADIO_SERVER_PORT is")
    assert len(said) < 200


def test_no_port_is_any_port(no_model, monkeypatch):
    monkeypatch.delenv("GRADIO_SERVER_PORT", raising=False)
    assert app.wanted_port() is None
