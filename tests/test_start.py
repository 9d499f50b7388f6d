"""The start of the page: its first page before the model, the way from one to the other, signals, ports, stubs."""

from __future__ import annotations

import http.client
import http.server
import importlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

import app
from ovam_core.errors import InputError
from tabs import frame, starting
from tabs.head import head
from tabs.starting import Starting, WithoutStubs, listen, wanted_host

ROOT = Path(__file__).parent.parent
STEPS = ("Loading libraries", "Opening the model", "Making the first picture")


@pytest.fixture
def begun():
    with Starting("127.0.0.1", 0, STEPS) as made:
        yield made


def ask(port, path="/", method="GET", body=None, headers=None):
    """Status, headers and text of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read().decode()
    finally:
        connection.close()


# -------------------------------------------------------------------------------------------- the first page


def test_the_first_page_needs_none_of_what_takes_long():
    heavy = "torch|numpy|PIL|diffusers|transformers|gradio|uvicorn|starlette|fastapi|httpx|matplotlib|pydantic"
    code = f"import app, re, sys; print([name for name in sys.modules if re.fullmatch({heavy!r}, name)])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_page_is_whole(begun):
    status, headers, text = ask(begun.port, "/?words=cat&__theme=dark")
    assert status == 200
    assert headers["Cache-Control"] == "no-store"
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert head("", "starting") in text
    assert "<!-- head -->" not in text
    assert "/* progress */" not in text
    assert 'aria-live="polite"' in text
    assert not re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=[\"'](?!data:)", text)  # all of it is here
    assert not re.findall(r"url\(|@import", text)
    assert len(text) < 20_000


def test_the_colours_are_those_of_the_theme():
    css, page = frame.THEME._get_theme_css(), (starting.ASSETS / "starting.html").read_text(encoding="utf-8")
    roots = r":root \{(.*?)\}", r":root\.dark \{(.*?)\}"
    ours = [dict(re.findall(r"--([\w-]+): ([^;]+);", re.search(root, page, re.DOTALL)[1])) for root in roots]
    light, dark = (dict(re.findall(r"--([\w-]+): ([^;]+);", part)) for part in css.split("}")[:2])
    dark = light | dark

    def value(theme, name):
        while name.startswith("var("):
            name = theme[name[6:-1]]
        return {"white": "#ffffff"}.get(name, name)

    for theme, colours in zip((light, dark), ours, strict=True):
        assert len(colours) >= 7
        for name, colour in colours.items():
            if name != "error":
                assert value(theme, theme[name]) == colour, name


def test_progress_is_told(begun):
    begun.part(1, 4, "transformers")
    begun.open_model("a/<b>")
    begun.step(2, "Making the first picture")
    begun.part(7, 25, "7 of 25 steps")
    status, headers, text = ask(begun.port, "/health")
    told = json.loads(text)
    assert (status, headers["Retry-After"], headers["Content-Type"]) == (503, "1", "application/json")
    assert told["steps"] == ["Loading libraries", "Opening a/<b>", "Making the first picture"]
    assert (told["step"], told["part"], told["note"]) == (2, 7 / 25, "7 of 25 steps")
    assert (told["model"], told["ready"]) == ("a/<b>", False)
    assert ask(begun.port, "/health?page")[0] == 200  # for the page itself
    _, _, page = ask(begun.port)
    assert "a/<b>" not in page
    assert "a/&lt;b&gt;" in page
    assert "a/\\u003cb>" in page


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/config"),
        ("POST", "/gradio_api/queue/join"),
        ("GET", "/gradio_api/heartbeat/abc"),
        ("PUT", "/"),
        ("POST", "/health"),
        ("GET", "/../etc/passwd"),
        ("OPTIONS", "/gradio_api/call/generate"),
        ("HEAD", "/theme.css"),
    ],
)
def test_all_else_is_asked_to_come_again(begun, method, path):
    body = b'{"data": [1]}' if method in ("POST", "PUT") else None
    status, headers, text = ask(begun.port, path, method, body)
    assert (status, headers["Retry-After"]) == (503, "1")
    if method != "HEAD":
        sentence = "This page is still starting: Loading libraries. Please come again."
        assert json.loads(text) == {"error": sentence, "detail": sentence}


def test_a_large_request_hears_the_answer(begun):
    assert ask(begun.port, "/gradio_api/upload", "POST", b"x" * 900_000)[0] == 503


@pytest.mark.parametrize("root", ["/ovam", "/ovam/", "https://demo.org/ovam"])
def test_behind_a_proxy(begun, monkeypatch, root):
    monkeypatch.setenv("GRADIO_ROOT_PATH", root)
    for path in ("/", "/ovam", "/ovam/"):
        assert ask(begun.port, path)[0] == 200
    assert "steps" in json.loads(ask(begun.port, "/ovam/health")[2])
    assert ask(begun.port, "/ovamhealth")[2].count("steps") == 0


def test_what_is_no_request_harms_nobody(begun):
    with socket.create_connection(("127.0.0.1", begun.port)) as one:
        one.sendall(b"\x16\x03\x01\x00\xff nonsense\r\n\r\n")
        one.recv(100)
    with socket.create_connection(("127.0.0.1", begun.port)):  # says nothing
        assert ask(begun.port)[0] == 200


# -------------------------------------------------------------------------------------------- handing over


class Echo(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "3")
        self.end_headers()
        self.wfile.write(b"new")

    def log_message(self, *_):
        pass


def test_no_request_is_lost_on_the_way(begun):
    """Clients ask without a pause while the sockets change hands."""
    over, answers, faults = threading.Event(), [], []

    def visit():
        while not over.is_set():
            try:
                answers.append(ask(begun.port)[2][:3])
            except OSError as error:
                faults.append(error)

    visitors = [threading.Thread(target=visit) for _ in range(4)]
    for one in visitors:
        one.start()
    while len(answers) < 20:
        time.sleep(0.01)
    (listening,) = begun.hand_over()
    time.sleep(0.3)  # nobody serves; they wait
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Echo, bind_and_activate=False)
    server.socket.close()
    server.socket = listening
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    before = len(answers)
    while len(answers) < before + 20:
        time.sleep(0.01)
    over.set()
    for one in visitors:
        one.join()
    server.shutdown()
    server.server_close()
    assert not faults
    assert set(answers) == {"<!d", "new"}
    assert answers[-1] == "new"


def test_who_was_let_in_before_is_answered(begun):
    with socket.create_connection(("127.0.0.1", begun.port), timeout=30) as early:
        time.sleep(0.3)  # it is in
        for one in begun.hand_over():
            one.close()
        early.sendall(b"GET /config HTTP/1.1\r\nHost: x\r\n\r\n")
        assert early.recv(1000).startswith(b"HTTP/1.1 503")


def test_the_page_takes_the_port_and_says_that_it_is_ready(blocks, capfd):
    with Starting("127.0.0.1", 0, STEPS) as begun:
        assert ask(begun.port, "/health")[0] == 503
        with frame.in_place_of(begun):
            try:
                _, url, _ = app.launch(blocks, server_name=begun.name, server_port=begun.port, prevent_thread_lock=True)
                assert url == begun.address == f"http://127.0.0.1:{begun.port}/"
                assert ask(begun.port, "/health")[::2] == (200, '{"ready":true}')
                status, _, text = ask(begun.port)
                assert (status, "window.gradio_config" in text) == (200, True)
                assert f"Running on local URL:  http://127.0.0.1:{begun.port}" in capfd.readouterr().out
            finally:
                blocks.close(verbose=False)
    with socket.create_server(("127.0.0.1", begun.port)):  # it is free again
        pass


# -------------------------------------------------------------------------------------------- ports


def test_the_first_free_port_is_taken(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(starting, "FIRST_PORT", port)
        found = listen("127.0.0.1", None)
        assert found[0].getsockname()[1] > port
        found[0].close()
        monkeypatch.setenv("GRADIO_NUM_PORTS", "1")
        with pytest.raises(InputError, match=f"^Port {port} of '127.0.0.1' cannot be served: address already in use;"):
            listen("127.0.0.1", None)


@pytest.mark.parametrize("number", ["many", "0", "-1", "1.5"])
def test_a_number_of_ports_that_is_none_is_said(monkeypatch, number):
    monkeypatch.setenv("GRADIO_NUM_PORTS", number)
    with pytest.raises(InputError, match=re.escape(f"GRADIO_NUM_PORTS is '{number}'; set it to a whole number")):
        listen("127.0.0.1", None)


@pytest.mark.parametrize("name", ["no.such.host.invalid", "256.1.1.1", "a..b", "x" * 300])
def test_a_host_that_is_none_is_said(name):
    with pytest.raises(InputError, match="cannot be served: "):
        listen(name, 7999)


@pytest.mark.parametrize(
    ("name", "host", "address"),
    [
        (None, "127.0.0.1", "http://127.0.0.1:{}/"),
        ("", "127.0.0.1", "http://127.0.0.1:{}/"),
        ("0.0.0.0", "0.0.0.0", "http://localhost:{}/"),
        ("[::1]", "::1", "http://[::1]:{}/"),
        ("localhost", "localhost", "http://localhost:{}/"),
    ],
)
def test_where_it_listens(monkeypatch, name, host, address):
    monkeypatch.delenv("GRADIO_SERVER_NAME", raising=False)
    if name is not None:
        monkeypatch.setenv("GRADIO_SERVER_NAME", name)
    assert wanted_host() == host
    if host == "::1" and not socket.has_ipv6:
        pytest.skip("no IPv6 on this machine")
    try:
        begun = Starting(host, 0 if host != "localhost" else free_port(), STEPS)
    except InputError as error:
        pytest.skip(str(error))
    with begun:
        assert begun.address == address.format(begun.port)
        if host in ("127.0.0.1", "0.0.0.0", "localhost"):
            assert ask(begun.port)[0] == 200


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        return one.getsockname()[1]


# -------------------------------------------------------------------------------------------- what goes wrong


@contextmanager
def process(**environment):
    """`python app.py`: its process, and its port."""
    port = free_port()
    variables = {"GRADIO_SERVER_PORT": str(port), "OVAM_MODEL": "emoji-voc", "HF_HUB_OFFLINE": "1"} | environment
    # A shell has its background processes ignore it, and so do their children.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    one = subprocess.Popen(
        [sys.executable, "app.py"], cwd=ROOT, env=os.environ | variables, stdout=-1, stderr=-1, text=True
    )
    signal.signal(signal.SIGINT, before)
    try:
        yield one, port
    finally:
        one.kill()
        one.communicate()


def wait_for(port):
    for _ in range(3000):
        try:
            return ask(port, "/health")
        except OSError:
            time.sleep(0.02)
    raise AssertionError("nothing answers")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)], ids=["Ctrl-C", "SIGTERM"])
def test_a_signal_during_the_start_ends_it_cleanly(number, status):
    with process() as (one, port):
        assert wait_for(port)[0] == 503
        one.send_signal(number)
        out, err = one.communicate(timeout=120)
        assert one.returncode == status
        assert err == ""
        assert out == f"* This page is starting on http://127.0.0.1:{port}/\n"


@pytest.mark.slow
def test_a_start_that_fails_is_said_on_the_page_and_the_terminal():
    with process(OVAM_MODEL="no-such-model") as (one, port):
        told = ""
        while not told:  # as the page does
            told = json.loads(ask(port, "/health?page")[2]).get("error", "") if wait_for(port) else ""
            told = "" if told.startswith("This page is still starting") else told
            time.sleep(0.1)
        _, err = one.communicate(timeout=120)
    assert one.returncode == 2
    assert err.strip().splitlines()[-1].startswith("Error: There is no model 'no-such-model'")
    assert told.startswith("There is no model 'no-such-model'")


def test_nobody_is_waited_for_where_nobody_came(begun):
    before = time.monotonic()
    begun.fail("It could not.")
    assert time.monotonic() - before < 1
    assert json.loads(ask(begun.port, "/health")[2])["error"] == "It could not."


def test_a_fault_is_told_without_places_of_the_server(begun):
    begun.fail(f"<b>The model in {ROOT / 'models' / 'mine'} cannot be loaded.")
    said = json.loads(ask(begun.port, "/health")[2])["error"]
    assert str(ROOT) not in said
    assert said.startswith("&lt;b&gt;The model in ")


# -------------------------------------------------------------------------------------------- the first picture


class Painter:
    """An OVAM whose pictures are words."""

    def __init__(self, name="emoji-voc", device="cpu", fault=None):
        self.name, self.fault = name, fault
        self.device = type("Device", (), {"type": device})()

    def generate(self, prompt, seed, callback_on_step_end):
        for done in range(26):
            callback_on_step_end(done, 25)
        if self.fault:
            raise self.fault
        return f"{prompt} {seed}"


@pytest.mark.parametrize(
    ("name", "device", "zero", "opens"),
    [
        ("emoji-voc", "cpu", "", True),
        ("emoji-voc", "cuda", "", True),
        ("a/b", "cuda", "", True),
        ("a/b", "mps", "", True),
        ("a/b", "cpu", "", False),
        ("a/b", "cuda", "true", False),
    ],
)
def test_which_models_open_with_a_picture(monkeypatch, name, device, zero, opens):
    monkeypatch.setenv("SPACES_ZERO_GPU", zero)
    assert app.opens_with_picture(Painter(name, device)) is opens


def test_the_first_picture_is_the_first_example():
    from tabs.examples import EXAMPLES

    steps = []
    with app.drawing(Painter(), lambda *step: steps.append(step)) as picture:
        assert picture() == f"{EXAMPLES[0].prompt} {EXAMPLES[0].seed}"
    assert steps == [(done, 25) for done in range(26)]


@pytest.mark.parametrize("fault", [InputError("There is too little memory."), RuntimeError("of ours")])
def test_a_page_does_without_its_first_picture(fault, caplog):
    with app.drawing(Painter(fault=fault), lambda *_: None) as picture:
        assert picture() is None
    assert ("of ours" in caplog.text) is isinstance(fault, RuntimeError)


def test_a_picture_that_would_take_long_is_given_up(monkeypatch):
    monkeypatch.setattr(app, "DRAWING", 0.5)
    steps = []

    def slow(done, total):
        steps.append(done)
        time.sleep(0.1)

    with app.drawing(Painter(), slow) as picture:
        assert picture() is None
    assert 0 < len(steps) < 10


def test_a_start_that_is_over_draws_no_further():
    begun = threading.Event()

    def wait(done, total):
        begun.set()
        time.sleep(0.02)

    def start():
        with app.drawing(Painter(), wait):
            begun.wait(10)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start()
    assert not [one for one in threading.enumerate() if one.name.endswith("(draw)")]


# -------------------------------------------------------------------------------------------- imports


def test_gradio_writes_no_stubs_at_the_start(monkeypatch, tmp_path):
    """The finder changes one function of one module; all else is imported as ever."""
    package = tmp_path / "gradio"
    package.mkdir()
    (package / "__init__.py").write_text("from gradio.component_meta import made\n")
    (package / "component_meta.py").write_text(
        "def create_or_modify_pyi(*_):\n    raise OSError('written')\n"
        "def made():\n    return create_or_modify_pyi(1, 2)\n"
    )
    finder = WithoutStubs()
    assert finder.find_spec("json", None) is None
    code = "import sys; sys.path.insert(0, sys.argv[1]); from tabs.starting import WithoutStubs\n"
    code += "sys.meta_path.insert(0, WithoutStubs()); import gradio; print(gradio.made())"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "None"
    assert callable(importlib.import_module("gradio.component_meta").create_or_modify_pyi)  # Gradio still has it


# -------------------------------------------------------------------------------------------- in a browser


def test_the_starting_page_becomes_the_page(browser):
    """It follows the start, keeps the address, and says what went wrong."""
    with Starting("127.0.0.1", 0, STEPS) as begun:
        context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme="dark")
        page, outside = context.new_page(), []
        page.on("request", lambda one: outside.append(one.url) if not one.url.startswith(begun.address) else None)
        page.goto(f"{begun.address}?words=cat&seed=3#here")
        page.wait_for_selector("li.now:has-text('Loading libraries')")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(10, 15, 30)"
        root = page.evaluate("(({scrollWidth, clientWidth}) => [scrollWidth, clientWidth])(document.documentElement)")
        assert root[0] == root[1]
        begun.open_model("emoji-voc")
        page.wait_for_selector("li.now:has-text('Opening emoji-voc')")
        assert page.inner_text(".badge > span") == "emoji-voc"
        begun.step(2, "Making the first picture")
        begun.part(10, 25, "10 of 25 steps")
        page.wait_for_selector("li.now:has-text('10 of 25 steps')")
        assert page.get_by_role("progressbar").evaluate("bar => bar.value") == pytest.approx(0.65 + 0.35 * 0.4)
        assert page.inner_text("#said") == "Making the first picture. The page opens here by itself."
        begun.fail("There is no <b>model</b>.")
        page.wait_for_selector("#said[role=alert]")
        assert page.inner_text("#said") == "There is no <b>model</b>."
        assert not page.is_visible("progress")

        (listening,) = begun.hand_over()
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Ready, bind_and_activate=False)
        server.socket.close()
        server.socket = listening
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        page.wait_for_selector("h1:has-text('up')")
        assert page.url == f"{begun.address}?words=cat&seed=3#here"
        server.shutdown()
        server.server_close()
        context.close()
        assert outside == [] or set(outside) == {"data:,"}


class Ready(Echo):
    def do_GET(self):
        body = b'{"ready": true}' if self.path.startswith("/health") else b"<h1>up</h1>"
        self.send_response(200)
        self.send_header("Content-Type", "application/json" if self.path.startswith("/health") else "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
