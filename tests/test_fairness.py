"""Visitors take turns: at the model by pictures, images and epochs, at the answers by words; nobody waits for all of
another's work, nobody fills the queue, and what nobody waits for any more ends.
"""

from __future__ import annotations

import random
import re
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import torch
from gradio.context import LocalContext
from gradio_client import Client
from gradio_client.exceptions import AppError
from gradio_client.utils import Status
from PIL import Image

import tabs.model
import tabs.optimize
from benchmarks import load
from ovam_core import OVAM
from ovam_core.data.export import ExportSettings, export_dataset
from ovam_core.data.prompts import template_prompts, work_list
from ovam_core.errors import InputError, Stopped
from ovam_core.optimization import RECIPES
from ovam_core.settings import GenerateSettings, PhotoSettings, SegmentSettings
from ovam_core.tokens import BACKGROUND, Token
from tabs.export import Stopwatch
from tabs.model import MAX_LABELS, Model
from tabs.optimize import search
from tabs.session import MAX_ANNOUNCED, Sessions
from tabs.turns import MAX_WAITING, Turns

PATIENCE = 20  # seconds after which a test that waits has failed


def go_on():
    return False


def until(holds) -> None:
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.002)


def in_line(turns: Turns) -> int:
    with turns._changed:
        return sum(map(len, turns._ring.values()))


class Crowd:
    """Works in threads, which come one after the other while somebody else has the turn."""

    def __init__(self, turns: Turns):
        self.turns, self.threads, self.log = turns, [], []

    def comes(self, visitor, name, units, should_stop=go_on):
        """A work that notes its name at each unit."""

        def run():
            with self.turns.work(visitor) as work:
                for _ in range(units):
                    if not work.next_unit(should_stop):
                        self.log.append(f"{name} stopped")
                        return
                    self.log.append(name)

        before = in_line(self.turns)
        self.threads.append(thread := threading.Thread(target=run, daemon=True))
        thread.start()
        until(lambda: in_line(self.turns) == before + 1)

    def ends(self):
        for thread in self.threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()
        assert not self.turns._ring
        assert not self.turns._works
        assert self.turns._at_work is None
        return " ".join(self.log)


# -------------------------------------------------------------------------------------------------- the turns


@pytest.mark.parametrize(
    ("works", "order"),
    [
        ([("ann", "a", 3), ("bob", "b", 2), ("cid", "c", 1)], "a b c a b a"),
        ([("ann", "a", 5), ("bob", "b", 1)], "a b a a a a"),
        ([("ann", "a1", 2), ("ann", "a2", 2), ("bob", "b", 2)], "a1 b a2 b a1 a2"),  # two works, no more turns
        ([("ann", "a1", 1), ("bob", "b1", 2), ("ann", "a2", 1), ("bob", "b2", 1)], "a1 b1 a2 b2 b1"),
    ],
)
def test_visitors_take_turns(works, order):
    turns = Turns()
    crowd = Crowd(turns)
    with turns.work("first") as first:
        assert first.next_unit(go_on)
        for work in works:
            crowd.comes(*work)
    assert crowd.ends() == order


def test_a_newcomer_waits_for_one_unit_of_each_not_for_the_works():
    turns = Turns()
    crowd = Crowd(turns)
    with turns.work("ann") as long:
        for _ in range(3):
            assert long.next_unit(go_on)  # alone: the turn goes on
        crowd.comes("bob", "b", 1)
        assert long.next_unit(go_on)
        assert crowd.log == ["b"]
    crowd.ends()


def test_short_units_are_done_several_at_a_turn():
    now = [0.0]
    turns = Turns(clock=lambda: now[0])
    crowd = Crowd(turns)
    with turns.work("ann") as short:
        assert short.next_unit(go_on, least=1.0)
        crowd.comes("bob", "b", 1)
        now[0] = 0.9
        assert short.next_unit(go_on, least=1.0)
        assert crowd.log == []
        now[0] = 1.0
        assert short.next_unit(go_on, least=1.0)
        assert crowd.log == ["b"]
    crowd.ends()


def test_who_is_stopped_while_waiting_leaves_the_line_and_the_others_stay():
    turns, stop = Turns(), threading.Event()
    crowd = Crowd(turns)
    with turns.work("first") as first:
        assert first.next_unit(go_on)
        crowd.comes("ann", "a", 2, stop.is_set)
        crowd.comes("bob", "b", 1)
        stop.set()
        until(lambda: in_line(turns) == 1)
        assert crowd.log == ["a stopped"]
    assert crowd.ends() == "a stopped b"


def test_what_was_stopped_between_two_units_lets_go():
    turns = Turns()
    with turns.work("ann") as ann, turns.work("bob") as bob:
        assert ann.next_unit(go_on)
        assert not ann.next_unit(lambda: True)
        assert bob.next_unit(go_on)
        with pytest.raises(Stopped), ann.unit(lambda: True, Stopped(0, 2)):
            raise AssertionError


def test_an_error_in_a_unit_frees_the_turn():
    turns = Turns()
    with pytest.raises(ZeroDivisionError), turns.work("ann") as ann, ann.unit(go_on, Stopped(0, 1)):
        1 / 0  # noqa: B018
    with turns.work("bob") as bob:
        assert bob.next_unit(go_on)


def test_two_works_of_a_visitor_wait_and_the_third_is_refused_to_them_alone():
    turns = Turns()
    crowd = Crowd(turns)
    with turns.work("first") as first:
        assert first.next_unit(go_on)
        for number in range(MAX_WAITING):
            crowd.comes("ann", f"a{number}", 1)
        with (
            pytest.raises(InputError, match=r"^2 works of yours are waiting already: .* press Stop"),
            turns.work("ann"),
        ):
            pass
        crowd.comes("bob", "b", 1)
    crowd.ends()
    assert sorted(crowd.log) == ["a0", "a1", "b"]
    with turns.work("ann"):  # there is room again
        pass


def test_the_work_under_way_does_not_count_as_waiting():
    turns = Turns()
    with turns.work("ann") as ann:
        assert ann.next_unit(go_on)
        with turns.work("ann"), turns.work("ann"):
            with pytest.raises(InputError, match="2 works"), turns.work("ann"):
                pass
            ann.let_go()  # between two of its units it is still the one under way
            with pytest.raises(InputError, match="2 works"), turns.work("ann"):
                pass


def test_one_at_a_time_whatever_happens():
    turns, at_work, faults, done = Turns(), [], [], []

    def one(number):
        chance = random.Random(number)
        stop_at = chance.choice([1, 3, 100])
        asked = [0]

        def should_stop():
            asked[0] += 1
            return asked[0] > 5 * stop_at

        with turns.work(number % 7) as work:
            while work.next_unit(should_stop, chance.choice([0.0, 0.001])) and len(done) < 2000:
                at_work.append(number)
                if len(at_work) > 1:
                    faults.append(list(at_work))
                done.append(number)
                at_work.remove(number)
                if chance.random() < 0.1:
                    work.let_go()
                if chance.random() < 0.02:
                    break

    threads = [threading.Thread(target=one, args=(n,), daemon=True) for n in range(14)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in threads)
    assert not faults
    assert set(done) == set(range(14))
    assert (turns._ring, turns._works, turns._at_work) == ({}, [], None)


# ------------------------------------------------------------------------------------------------- stop flags


@pytest.fixture
def own():
    made = Sessions("emoji-voc")
    yield made
    made.close()


def visitor(name: str) -> SimpleNamespace:
    return SimpleNamespace(session_hash=name)


ANN, BOB = visitor("ann"), visitor("bob")


def test_works_of_one_name_have_flags_of_their_own_and_stop_ends_them_all(own):
    ann = own.of(ANN)
    with ann.run("generate") as waiting:
        with ann.run("generate") as ended:
            pass
        assert ended.is_set()
        assert not waiting.is_set()
        ann.begin("generate")
        ann.begin("export")
        ann.stop()
        with ann.run("generate") as announced, ann.run("export") as other:
            assert all(flag.is_set() for flag in (waiting, announced, other))
        with ann.run("generate") as next_one:
            assert not next_one.is_set()


def test_runs_that_were_announced_and_never_came_are_forgotten(own):
    ann = own.of(ANN)
    for _ in range(50):
        ann.begin("generate")
    ann.stop()
    assert len(ann._flags) <= 4
    ann.begin("generate")
    with ann.run("generate") as flag:
        assert not flag.is_set()


def test_a_stop_of_all_that_may_be_announced_is_heard(own):
    ann = own.of(ANN)
    for _ in range(MAX_ANNOUNCED):
        ann.begin("generate")
    assert len(ann._flags) == MAX_ANNOUNCED
    ann.stop()
    for _ in range(MAX_ANNOUNCED):
        with ann.run("generate") as flag:
            assert flag.is_set()
    with ann.run("generate") as flag:
        assert not flag.is_set()


def test_the_time_of_an_export_is_that_of_its_units():
    now = [0.0]
    watch = Stopwatch(lambda: now[0])

    @contextmanager
    def turn():
        now[0] += 50.0  # waiting
        yield
        now[0] += 100.0  # nobody's: after the unit

    with watch.unit(turn()):
        now[0] += 10.0
        assert not watch.over(10.0 + 50.0)
    assert (now[0], watch.over(100.0)) == (160.0, False)
    with watch.unit(turn()):
        now[0] += 90.0
        assert not watch.over(100.0)
        now[0] += 0.5
        assert watch.over(100.0)  # the unit under way counts
    assert watch.over(100.0)
    assert not watch.over(100.5)
    now[0] = 4 * 200.0
    assert not watch.over(200.0)
    now[0] += 0.5
    assert watch.over(200.0)  # by the clock on the wall


def test_a_run_of_a_session_that_is_over_is_stopped(own):
    ann = own.of(ANN)
    with ann.run("generate") as running:
        ann.close()
        assert running.is_set()
    with ann.run("generate") as late:
        assert late.is_set()


def test_a_connection_that_broke_stops_the_run_it_belongs_to(own):
    events = {"1": SimpleNamespace(alive=True), "2": SimpleNamespace(alive=True)}
    page = SimpleNamespace(_queue=SimpleNamespace(event_ids_to_events=events))
    ann = own.of(ANN)
    marks = LocalContext.blocks.set(page), LocalContext.event_id.set("1")
    try:
        with ann.run("generate") as first:
            LocalContext.event_id.set("2")
            with ann.run("generate") as second:
                assert not first.is_set()
                events["1"].alive = False
                assert first.is_set()
                assert not second.is_set()
    finally:
        LocalContext.blocks.reset(marks[0])
        LocalContext.event_id.reset(marks[1])


# -------------------------------------------------------------------------------------------------- the model


@pytest.fixture
def model(ovam, own):
    return Model(ovam, own)


def silent(*_, **__):
    """A progress bar nobody looks at."""


def image(ovam, steps=2, prompt="A photograph of a cat"):
    return GenerateSettings.for_model(ovam.pipe, prompt, seed=1, steps=steps, width=64, height=64)


def token(rows: int) -> Token:
    names = (BACKGROUND, *(f"class {number}" for number in range(rows)))
    return Token(torch.randn(1 + rows, 256, generator=torch.Generator().manual_seed(0)), names, "emoji-voc")


class Beside:
    """Another visitor's picture, asked for at a moment of the test's choice."""

    def __init__(self, model, ovam, own, log):
        self.model, self.ovam, self.own, self.log = model, ovam, own, log
        self.thread = threading.Thread(target=self._draw, daemon=True)

    def _draw(self):
        self.log.append("bob asks")
        self.model.draw(self.own.of(BOB), image(self.ovam), "generate", silent)
        self.log.append("bob has it")

    def ask(self):
        self.thread.start()
        until(lambda: in_line(self.model.turns) == 1)


@pytest.fixture(scope="module")
def small_export(ovam):
    work = work_list(template_prompts("A photograph of a {}", ("cat",)), ("cat",), 3)
    return work, ExportSettings.for_model(ovam, steps=2, width=64, height=64, crf=False, threads=1)


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file() and "lock" not in path.name)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_picture_waits_for_one_image_of_an_export_whose_bytes_stay(model, own, ovam, small_export, tmp_path):
    work, settings = small_export
    log: list[str] = []
    bob = Beside(model, ovam, own, log)

    real = ovam.run

    def watched(**arguments):
        log.append("picture" if isinstance(arguments["prompt"], str) else "image")
        if log.count("image") == 2 and "bob asks" not in log:
            bob.ask()
        return real(**arguments)

    with pytest.MonkeyPatch.context() as patch, model.turns.work(own.of(ANN)) as turns:
        patch.setattr(ovam, "run", watched)
        summary = export_dataset(
            ovam, work, settings, tmp_path / "a", workers=0, turn=lambda: turns.unit(go_on, Stopped(0, 2))
        )
        bob.thread.join(PATIENCE)
    log.remove("bob has it")
    assert log == ["image", "image", "bob asks", "picture", "image"]
    assert summary.made == 3
    export_dataset(ovam, work, settings, tmp_path / "b", workers=0)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_an_export_that_is_stopped_while_it_waits_ends_with_what_it_has(model, own, ovam, small_export, tmp_path):
    work, settings = small_export
    with model.turns.work(own.of(BOB)) as bob, model.turns.work(own.of(ANN)) as turns:
        assert bob.next_unit(go_on)
        stop = threading.Event()
        threading.Timer(0.05, stop.set).start()
        summary = export_dataset(
            ovam, work, settings, tmp_path, workers=0, turn=lambda: turns.unit(stop.is_set, Stopped(0, 2))
        )
    assert summary.stopped
    assert summary.made == 0


def test_a_picture_waits_for_some_epochs_of_a_search_not_for_all(model, own, ovam, monkeypatch):
    picture = ovam.draw(image(ovam))
    labels = np.zeros((64, 64), np.uint8)
    labels[:32] = 1
    log: list[str] = []
    bob = Beside(model, ovam, own, log)
    real = tabs.optimize.learn

    def watched(*given, **more):
        *first, on_epoch = given

        def told(epoch):
            log.append("epoch")
            if epoch.number == 3:
                bob.ask()
            on_epoch(epoch)

        return real(*first, told, **more)

    monkeypatch.setattr(tabs.optimize, "learn", watched)
    settings = RECIPES["fast"]
    work = model.turns.work(own.of(ANN))
    run = search(ovam, picture, labels, "cat", settings, lambda: not work.next_unit(go_on), work)
    *_, (_, losses, learned) = run
    bob.thread.join(PATIENCE)
    at = log.index("bob asks")
    assert learned is not None
    assert log[at + 1 :].index("bob has it") <= 1  # the next epoch begins when bob lets go, not when he says so
    assert len(losses) > 5


def test_a_search_that_is_stopped_between_two_epochs_keeps_the_best(model, own, ovam):
    picture = ovam.draw(image(ovam))
    labels = np.zeros((64, 64), np.uint8)
    labels[:32] = 1
    with own.of(ANN).run("optimize") as stop, model.turns.work(own.of(ANN)) as work:

        def on_epoch(epoch):
            if epoch.number == 2:
                own.of(ANN).stop()

        found = tabs.optimize.learn(
            ovam, picture, labels, "cat", RECIPES["fast"], lambda: not work.next_unit(stop.is_set), on_epoch
        )
    assert found[1].epochs == 2
    assert found[1].stopped


# --------------------------------------------------------------------------------- a visitor who is not there any more


def leaves_at(own, step):
    def progress(where, desc="", unit=""):
        if desc == "Denoising" and where[0] == step:
            own.leave(ANN)

    return progress


def test_who_left_frees_the_model_within_two_steps(model, own, ovam, monkeypatch):
    with pytest.raises(Stopped) as stopped:
        model.draw(own.of(ANN), image(ovam, 50), "generate", leaves_at(own, 3))
    assert stopped.value.steps <= 5
    passes = []

    def leaving():
        passes.append(1)
        if len(passes) == 3:
            own.leave(ANN)

    hook = ovam.pipe.unet.register_forward_pre_hook(lambda *_: leaving())
    try:
        photo = PhotoSettings("a cat", timesteps=tuple(range(100, 130)))
        with pytest.raises(Stopped, match="3 of 30"):
            model.look_at(own.of(ANN), Image.new("RGB", (64, 64)), photo, "generate")
    finally:
        hook.remove()
    assert len(passes) == 3
    assert not ovam.pipe.unet._forward_pre_hooks
    with model.turns.work(own.of(BOB)) as bob:
        assert bob.next_unit(go_on)


def test_who_left_while_waiting_takes_no_turn(model, own, ovam):
    with model.turns.work(own.of(BOB)) as bob:
        assert bob.next_unit(go_on)
        threading.Timer(0.05, own.leave, [ANN]).start()
        with pytest.raises(Stopped, match="0 of 2"):
            model.draw(own.of(ANN), image(ovam), "generate", silent)


# ------------------------------------------------------------------------------------------------------ words


def test_labels_of_one_answer_are_bounded(model, ovam):
    picture = ovam.draw(image(ovam))
    sides = {"crf": False}
    found = model.answer(picture, SegmentSettings(("cat",), tokens=(token(MAX_LABELS - 1),), **sides))
    assert len(found.labels) == MAX_LABELS
    many = tuple(f"word {number}" for number in range(32))
    for asked, count in [
        (SegmentSettings((), tokens=(token(254),)), 254),
        (SegmentSettings(("cat",), tokens=(token(MAX_LABELS),)), MAX_LABELS + 1),
        (SegmentSettings(many, tokens=(token(30), token(30))), 92),
        (SegmentSettings((), sentence="a cat on grass", tokens=(token(78),)), 84),
    ]:
        with pytest.raises(InputError, match=f"^{count} words and classes .* at most {MAX_LABELS}"):
            model.answer(picture, asked)


def test_an_answer_lets_others_in_between_words_and_is_stopped_there(model, own, ovam, monkeypatch):
    monkeypatch.setattr(tabs.model, "SHORT", 0.0)
    picture = ovam.draw(image(ovam))
    ann, log = own.of(ANN), []
    words = ("cat", "dog", "car", "bus", "bird", "boat")
    asked = SegmentSettings(words, crf=False)

    def bob_asks():
        with model.words_of(own.of(BOB)) as before_word:
            log.append("bob")
            model.answer(picture, SegmentSettings(("tree",), crf=False), before_word)

    thread = threading.Thread(target=bob_asks, daemon=True)
    with model.words_of(ann) as before_word:
        for number in range(4):
            before_word()
            log.append("word")
            if number == 1:
                thread.start()
                until(lambda: in_line(model.answering) == 1)
        assert log == ["word", "word", "bob", "word", "word"]
        ann.stop()
        with pytest.raises(InputError, match="Stopped before all words"):
            before_word()
    thread.join(PATIENCE)
    assert len(model.answer(picture, asked).labels) == len(words)


def test_a_mask_is_asked_for_before_each_is_refined(ovam):
    pytest.importorskip("denseCRF")
    picture = ovam.draw(image(ovam))
    words = ("cat", "dog", "car")
    calls = []
    found = ovam.answer(picture, SegmentSettings(words), on_label=lambda: calls.append(1))
    assert len(calls) == len(words)
    assert np.array_equal(found.masks, ovam.answer(picture, SegmentSettings(words)).masks)

    def enough():
        raise InputError("enough")

    with pytest.raises(InputError, match="enough"):
        ovam.answer(picture, SegmentSettings(words), on_label=enough)


# --------------------------------------------------------------------------------------------- through the server


@pytest.fixture
def held(monkeypatch):
    """Every picture waits at its second step until the test says so; the steps done, by prompt."""
    state = SimpleNamespace(go=threading.Event(), steps={}, ended={})
    real = OVAM.draw

    def slow(ovam, settings, *, on_step=None, **more):
        def told(done, total):
            state.steps[settings.prompt] = done
            if done == 1:
                state.go.wait(PATIENCE)
            if on_step is not None:
                on_step(done, total)

        try:
            picture = real(ovam, settings, on_step=told, **more)
            state.ended[settings.prompt] = "made"
            return picture
        except Stopped as stopped:
            state.ended[settings.prompt] = stopped
            raise

    monkeypatch.setattr(OVAM, "draw", slow)
    yield state
    state.go.set()


def client(address):
    return Client(address, verbose=False, download_files=False, analytics_enabled=False)


def asks(one, prompt, steps=2):
    return one.submit(prompt, "", 1, steps, 5, 64, 64, api_name="/generate")


def test_too_many_works_are_refused_to_their_visitor_alone_and_stop_ends_all(address, held):
    ann, bob = client(address), client(address)
    jobs = [asks(ann, "first of ann", 40)]
    until(lambda: "first of ann" in held.steps)
    jobs += [asks(ann, f"{number} of ann") for number in range(MAX_WAITING)]
    until(lambda: all(job.status().code in (Status.PROCESSING, Status.PROGRESS) for job in jobs))
    time.sleep(0.1)
    refused = asks(ann, "too many")
    with pytest.raises(AppError, match="2 works of yours are waiting already"):
        refused.result(PATIENCE)
    other = asks(bob, "bob's")
    ann.predict(api_name="/stop")
    held.go.set()
    for job in jobs:
        with pytest.raises(AppError, match="Stopped after"):
            job.result(PATIENCE)
    assert other.result(PATIENCE)
    assert held.ended["bob's"] == "made"
    assert held.ended["first of ann"].steps <= 3
    assert set(held.ended) == {"first of ann", "bob's"}


@pytest.mark.parametrize("heartbeat", [True, False])
def test_a_connection_that_breaks_frees_the_model(address, held, heartbeat):
    """As a tab that is closed, and as a client that only listens for its answer."""
    api = f"{address}gradio_api"
    prompt = f"lost {heartbeat}"
    with httpx.Client(timeout=PATIENCE) as http:
        number = next(
            n
            for n, one in enumerate(http.get(f"{address}config").json()["dependencies"])
            if one["api_name"] == "generate"
        )
        name = f"lost{heartbeat}"
        body = {"data": [prompt, "", 1, 50, 5, 64, 64, "plain"], "fn_index": number, "session_hash": name}
        assert http.post(f"{api}/queue/join", json=body).status_code == 200
        listening = f"{api}/heartbeat/{name}" if heartbeat else f"{api}/queue/data?session_hash={name}"
        with http.stream("GET", listening) as answer:
            lines = answer.iter_lines()  # held: without it the connection would be closed
            next(lines)
            until(lambda: held.steps.get(prompt) == 1)
    time.sleep(0.3)
    held.go.set()
    until(lambda: prompt in held.ended)
    assert held.ended[prompt].steps <= 3


@pytest.mark.slow
def test_the_load_in_miniature(monkeypatch, capsys):
    monkeypatch.setattr(load, "ALONE", 1)
    monkeypatch.setattr(load, "SETTLED", 0)
    monkeypatch.setattr(load, "GRACE", 0)
    assert load.main(["--visitors", "3", "--requests", "6", "--steps", "1"]) == 0
    shown = capsys.readouterr().out
    rows = [line.split(" | ") for line in shown.splitlines() if line.startswith(("| generate", "| words"))]
    assert [(row[0].strip("| "), *row[1:3]) for row in rows] == [("generate", "3", "0"), ("words", "3", "0")]
    assert all(float(cell.split(" x")[0]) > 0 for row in rows for cell in row[4:6])
    assert "Errors: 0" in shown
    assert int(re.search(r"made (\d+) images", shown)[1]) >= 0
    assert len(re.findall(r"\d+ MB", shown)) == 3


def test_a_visitor_who_cannot_come_keeps_nobody_waiting(monkeypatch):
    came = []

    @contextmanager
    def visitor(address):
        came.append(address)
        if len(came) == 2:
            raise ConnectionError("no way in")
        yield None

    monkeypatch.setattr(load, "visitor", visitor)
    monkeypatch.setattr(load, "visit", lambda *_: pytest.fail("began"))
    calls = load.crowd("here", SimpleNamespace(visitors=3, requests=3, steps=1))
    assert ("visitor", "ConnectionError: no way in") in calls.errors
    assert len(calls.errors) == 3


def test_percentiles_of_the_load():
    assert [load.percentile([4, 1, 3, 2], share) for share in (0.25, 0.5, 0.95, 1.0)] == [1, 2, 4, 4]
    assert load.percentile([7], 0.5) == 7
