"""What stands behind the tabs: stop flags, what a visitor leaves behind, the one model in one thread at a time."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import tabs.desk
import tabs.optimize
from ovam_core.models.load import load_pipeline
from ovam_core.models.presets import defaults_for
from ovam_core.optimization import RECIPES
from ovam_core.settings import GenerateSettings, MapSettings
from tabs.desk import Desk
from tabs.generate import for_tokens
from tabs.store import Store


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline("emoji-voc", "cpu")


@pytest.fixture
def desk(pipe):
    return Desk(pipe, Store())


def visitor(name: str) -> SimpleNamespace:
    return SimpleNamespace(session_hash=name)


ANN, BOB = visitor("ann"), visitor("bob")


def silent(*_, **__):
    """A progress bar nobody looks at."""


def image(pipe, steps=2):
    return GenerateSettings.for_model(pipe, "A photograph of a cat", seed=1, steps=steps, width=64, height=64)


def test_each_work_has_a_stop_of_its_own(desk):
    desk.begin(ANN, "export")
    running = desk.flag(ANN, "export")
    desk.begin(ANN, "generate")
    queued, others = desk.flag(ANN, "generate"), desk.flag(BOB, "generate")
    desk.stop(ANN, "export")
    assert running.is_set() and not queued.is_set() and not others.is_set()
    desk.end(ANN, "export", running)
    desk.stop(ANN)
    assert queued.is_set() and not others.is_set()


def test_a_run_that_ends_leaves_the_flag_of_the_next_one(desk):
    desk.begin(ANN, "generate")
    first = desk.flag(ANN, "generate")
    desk.begin(ANN, "generate")
    desk.end(ANN, "generate", first)
    desk.stop(ANN, "generate")
    assert desk.flag(ANN, "generate").is_set()


def test_a_look_elsewhere_takes_no_place_on_the_shelf(desk, pipe):
    keys = [desk.keep(desk.draw(image(pipe), "generate", ANN, silent), ANN) for _ in range(2)]
    for _ in range(3):
        desk.draw(image(pipe), "optimize: picture", ANN, silent)
    assert all(desk.store.get(key) is not None for key in keys)


def test_the_half_that_a_token_needs_is_recorded(desk, pipe):
    assert desk.draw(image(pipe), "generate", ANN, silent, "unconditional").recording.branch == "unconditional"


def test_a_lost_connection_is_forgiven(desk, pipe, monkeypatch):
    monkeypatch.setattr(tabs.desk, "GRACE", 0.3)
    key = desk.keep(desk.draw(image(pipe), "generate", ANN, silent), ANN)
    folder = desk.zip_folder(ANN)
    desk.leave(ANN)
    desk.begin(ANN, "generate")  # back again
    time.sleep(0.6)
    assert desk.store.get(key) is not None and folder.exists()
    desk.leave(ANN)
    time.sleep(0.6)
    assert desk.store.get(key) is None and not folder.exists()


def test_leaving_stops_what_runs(desk):
    desk.begin(ANN, "export")
    flag = desk.flag(ANN, "export")
    desk.leave(ANN)
    assert flag.is_set()


def test_one_download_takes_the_place_of_the_last(desk):
    (desk.zip_folder(ANN) / "one.zip").write_text("")
    (desk.zip_folder(ANN) / "two.zip").write_text("")
    assert [path.name for path in desk._zips["ann"].iterdir()] == ["two.zip"]
    desk.forget("ann")


def test_the_model_serves_one_run_at_a_time(desk, pipe, monkeypatch):
    """Gradio lets the next run begin while the thread of a cancelled one still works."""
    at_work, most = [0], [0]
    real = tabs.desk.generate

    def watched(*given, **more):
        at_work[0] += 1
        most[0] = max(most[0], at_work[0])
        try:
            return real(*given, **more)
        finally:
            at_work[0] -= 1

    monkeypatch.setattr(tabs.desk, "generate", watched)
    runs = [
        threading.Thread(target=desk.draw, args=(image(pipe), "generate", visitor(str(n)), silent)) for n in range(3)
    ]
    [run.start() for run in runs]
    [run.join() for run in runs]
    assert most == [1]


def of_an_accelerator():
    raise torch.OutOfMemoryError("CUDA out of memory")


def of_the_processor():
    torch.empty(2**58)  # a real refusal, whose wording is the allocator's


@pytest.mark.parametrize("too_much", [of_an_accelerator, of_the_processor])
def test_short_memory_costs_the_recordings_first_then_one_sentence(desk, pipe, monkeypatch, too_much):
    key = desk.keep(desk.draw(image(pipe), "generate", ANN, silent), ANN)
    real, failures = tabs.desk.generate, [1]

    def short(*given, **more):
        if failures[0]:
            failures[0] -= 1
            too_much()
        return real(*given, **more)

    monkeypatch.setattr(tabs.desk, "generate", short)
    assert desk.draw(image(pipe), "generate", BOB, silent).image.size == (64, 64)
    assert desk.store.get(key) is None
    failures[0] = 2
    with pytest.raises(ValueError, match="too little memory"):
        desk.draw(image(pipe), "generate", BOB, silent)
    monkeypatch.setattr(tabs.desk, "ask", lambda *given: too_much())
    monkeypatch.setattr(tabs.optimize, "optimize", lambda *given: too_much())
    made = desk.find(desk.keep(real(pipe, image(pipe)), ANN))
    with pytest.raises(ValueError, match="fewer words"):
        desk.answer(made, MapSettings(words=("cat",)))
    labels = np.zeros((64, 64), np.uint8)
    labels[:32] = 1
    with pytest.raises(ValueError, match="too little memory"):
        list(tabs.optimize.search(pipe, made, labels, "cat", RECIPES["fast"], lambda: False, desk.alone()))
    assert not desk.driving.locked()


def test_another_fault_is_not_taken_for_short_memory(desk, pipe, monkeypatch):
    def wrong(*given, **more):
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(tabs.desk, "generate", wrong)
    with pytest.raises(RuntimeError, match="shapes"):
        desk.draw(image(pipe), "generate", ANN, silent)


def test_sliders_hold_for_tokens_once_they_are_moved(pipe):
    own = defaults_for(pipe)
    asked = MapSettings(("cat",), tau=own.tau, alpha=own.alpha)
    assert for_tokens(asked, own) == asked
    moved = for_tokens(MapSettings(("cat",), tau=0.7, alpha=own.alpha), own)
    assert (moved.token_tau, moved.token_alpha) == (0.7, None)
