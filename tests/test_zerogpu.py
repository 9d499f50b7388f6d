"""A GPU that is lent for one call, in a forked worker: the same pictures and maps, and nothing of the device here.

`Lender` stands for `spaces.GPU`: its worker is forked at the first call and lives on for the next ones, arguments and
what comes back are pickled, and a worker that dies is told by the error that `spaces` has for it.
"""

from __future__ import annotations

import inspect
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import types
from dataclasses import replace
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import make_small, pipe_of

from ovam_core.attention.heatmap import heatmaps
from ovam_core.errors import InputError, Stopped
from ovam_core.models.presets import EMBEDDED
from ovam_core.optimization import initial_embedding
from ovam_core.ovam import OVAM
from ovam_core.query import encode_padded
from ovam_core.settings import RECIPES, GenerateSettings, PhotoSettings, SegmentSettings
from tabs import zerogpu
from tabs.export import ExportTab
from tabs.model import Model
from tabs.session import Bounds, Sessions
from tabs.zerogpu import DIED, OnZeroGPU, WorkerError, kept

PROMPT = "a photograph of the cat"
ASKED = SegmentSettings(words=("cat",), crf=False)
SECOND = SegmentSettings(words=("red bus", "car"), crf=False)
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8))

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="a worker is forked")


class Lender:
    """asked: seconds that each call asked for. refusal: what a call raises in place of running."""

    def __init__(self):
        self.asked: list[int] = []
        self.refusal: gr.Error | None = None
        self.process = None

    def __call__(self, duration):
        return lambda task: lambda *given: self._call(task, duration, given)

    def _call(self, task, duration, given):
        self.asked.append(duration(*given))
        if self.refusal is not None:
            raise self.refusal
        if self.process is None or not self.process.is_alive():
            self._fork(task)
        self.pipe.send_bytes(pickle.dumps(given))
        ended = False
        try:
            while True:
                try:
                    event = pickle.loads(self.pipe.recv_bytes())
                except EOFError:
                    raise gr.Error("GPU task aborted", title="ZeroGPU worker error") from None
                if event is None:
                    ended = True
                    return
                yield event
        finally:
            while not ended and self.process.is_alive():  # left: `spaces`, too, waits for the worker to come to an end
                self.left.set()
                try:
                    ended = pickle.loads(self.pipe.recv_bytes()) is None
                except EOFError:
                    break

    def _fork(self, task):
        context = multiprocessing.get_context("fork")
        self.pipe, theirs = context.Pipe()
        self.left = context.Event()

        def serve():
            self.pipe.close()
            while True:
                given = pickle.loads(theirs.recv_bytes())
                self.left.clear()
                events = task(*given)
                for event in events:
                    data = pickle.dumps(event)
                    assert b"torch" not in data, "a tensor leaves the worker"
                    theirs.send_bytes(data)
                    if self.left.is_set():
                        events.close()
                        break
                theirs.send_bytes(pickle.dumps(None))

        # As in `spaces`: not in the thread that was forked, whose own threads are gone.
        def in_thread():
            worker = threading.Thread(target=serve, daemon=True)
            worker.start()
            worker.join()

        self.process = context.Process(target=in_thread, daemon=True)
        self.process.start()
        theirs.close()

    def kill(self):
        if self.process is not None and self.process.is_alive():
            os.kill(self.process.pid, signal.SIGKILL)
            self.process.join()


class OwnDevice:
    """Any use of the device by this process, as the test can see it, and moves that a worker makes."""

    def __init__(self, patch, pipe):
        here = os.getpid()

        def only_lent(name, owner, attribute):
            original = getattr(owner, attribute)

            def guarded(*args, **more):
                if os.getpid() == here:
                    pytest.fail(f"{name} in the process that has no device")
                return original(*args, **more)

            patch.setattr(owner, attribute, guarded)

        only_lent("the pipeline was called", type(pipe), "__call__")
        only_lent("the pipeline was moved", type(pipe), "to")
        only_lent("the denoiser ran", type(pipe.unet), "forward")
        only_lent("the autoencoder decoded", type(pipe.vae), "decode")
        only_lent("the autoencoder encoded", type(pipe.vae), "encode")
        only_lent("the scheduler stepped", type(pipe.scheduler), "step")
        for name in ("_lazy_init", "init", "current_device", "synchronize", "mem_get_info"):
            only_lent(f"torch.cuda.{name}", torch.cuda, name)
        only_lent("Tensor.cuda", torch.Tensor, "cuda")
        only_lent("a backward pass", torch.Tensor, "backward")


@pytest.fixture
def lender():
    lender = Lender()
    yield lender
    lender.kill()


@pytest.fixture
def jobs(tmp_path, monkeypatch) -> Path:
    """Where the folders of jobs are made."""
    folder = tmp_path / "jobs"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def ovam(lender) -> OnZeroGPU:
    return OnZeroGPU(make_small(), lender, device="cpu")


@pytest.fixture(scope="module")
def plain() -> OVAM:
    return OVAM(make_small())


@pytest.fixture
def guarded(ovam, monkeypatch):
    OwnDevice(monkeypatch, ovam.pipe)


def settings_of(ovam: OVAM, **given) -> GenerateSettings:
    return GenerateSettings.for_model(ovam.pipe, PROMPT, **{"steps": 3, "width": 64, "height": 64, "seed": 5} | given)


def same(first, second, of_first: OVAM, of_second: OVAM) -> None:
    assert np.array_equal(np.asarray(first.image), np.asarray(second.image))
    for asked in (ASKED, SECOND):
        one, other = of_first.answer(first, asked), of_second.answer(second, asked)
        assert np.array_equal(one.heatmaps, other.heatmaps)
        assert np.array_equal(one.masks, other.masks)


# ------------------------------------------------------------------------------------------ the same results


def test_a_picture_of_a_worker_is_that_of_the_process_itself(ovam, lender, guarded, jobs):
    seen: list[tuple[int, int]] = []
    lent = ovam.draw(settings_of(ovam), on_step=lambda *step: seen.append(step), with_goca=True)
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]
    asked = replace(SECOND, method="GoCA, any word")
    answers = [ovam.answer(lent, x) for x in (ASKED, SECOND, asked)]
    again = ovam.draw(settings_of(ovam, seed=6))
    assert len(lender.asked) == 2
    assert not list(jobs.iterdir())
    assert np.array_equal(ovam.answer(lent, ASKED).heatmaps, answers[0].heatmaps)  # of the file that is gone
    assert lent.recording.step_indices == (0, 1, 2)
    assert not np.array_equal(np.asarray(again.image), np.asarray(lent.image))


def test_the_maps_are_the_same_to_the_bit(plain, ovam):
    lent = ovam.draw(settings_of(ovam), branch="all", with_goca=True)
    own = plain.draw(settings_of(plain), branch="all", with_goca=True)
    same(own, lent, plain, ovam)
    assert (lent.settings, lent.model, lent.dtype) == (own.settings, own.model, own.dtype)
    assert lent.others.keys() == own.others.keys()
    embedding = encode_padded(plain.pipe, "the red bus")
    for half, recording in own.others.items():
        assert torch.equal(heatmaps(lent.others[half], embedding), heatmaps(recording, embedding))
    asked = replace(SECOND, method="GoCA, any word")
    assert np.array_equal(ovam.answer(lent, asked).heatmaps, plain.answer(own, asked).heatmaps)


@pytest.mark.parametrize("name", ["sd3", "pixart-sigma"])
def test_other_families(name, lender):
    plain, lent = OVAM(pipe_of(name)), OnZeroGPU(pipe_of(name), lender, device="cpu")
    given = {"steps": 2}
    same(plain.draw(settings_of(plain, **given)), lent.draw(settings_of(plain, **given)), plain, lent)


def test_a_photograph(plain, ovam, guarded, tmp_path):
    settings = PhotoSettings("the cat", timesteps=(100, 300), seed=2)
    PHOTO.save(tmp_path / "x.png")
    lent = ovam.look_at(tmp_path / "x.png", settings, with_goca=True)
    assert lent.settings == settings
    assert lent.image.size == (80, 60)
    assert lent.recording.timesteps == (100, 300)
    with pytest.raises(InputError, match=r"cannot be read|no picture|There is no"):
        ovam.look_at(tmp_path / "none.png", settings)


def test_a_photograph_has_the_same_maps(plain, ovam):
    settings = PhotoSettings("the cat", timesteps=(100, 300), seed=2)
    same(plain.look_at(PHOTO, settings), ovam.look_at(PHOTO, settings), plain, ovam)


def target() -> np.ndarray:
    labels = np.zeros((64, 64), np.uint8)
    labels[16:48, 8:40] = 1
    return labels


def test_a_token_is_learned_in_the_worker(ovam, guarded, tmp_path):
    """The process itself makes no backward pass: torch refuses one in a process forked after it."""
    lent = ovam.draw(settings_of(ovam))
    seen = []
    token, found = ovam.learn(
        [lent], [target()], ["cat"], replace(RECIPES["fast"], epochs=6), tau=0.3, on_epoch=seen.append
    )
    assert [epoch.number for epoch in seen] == list(range(1, found.epochs + 1))
    assert all(epoch.embedding.shape == (2, 32) for epoch in seen)
    assert found.losses[-1] < found.losses[0]
    assert (token.names, token.tau, token.model, token.seed) == (("cat",), 0.3, "small", 5)
    found = ovam.answer(lent, SegmentSettings(tokens=(token,), crf=False))
    assert found.labels == ["cat"]
    assert type(token).load(token.save(tmp_path / "x.safetensors")).names == ("cat",)


def test_the_token_is_the_same(plain, ovam):
    settings = replace(RECIPES["fast"], epochs=4)
    start = initial_embedding(plain.pipe, ["cat"])
    lent = ovam.draw(settings_of(ovam))
    token, found = ovam.learn([lent], [target()], ["cat"], settings, start=start)
    own, expected = plain.learn([plain.draw(settings_of(plain))], [target()], ["cat"], settings, start=start)
    assert torch.equal(token.embedding, own.embedding)
    assert found.losses == expected.losses
    for name in ("classes", "model", "branch", "tau", "alpha", "steps", "prompt", "seed", "init", "loss", "settings"):
        assert getattr(token, name) == getattr(own, name)


def test_pictures_without_masks_are_made_in_the_worker(plain, ovam):
    settings, found = replace(RECIPES["fast"], epochs=3), []
    for one in (ovam, plain):
        made = one.unlabelled(["cat"], 1, ["dog"], like=settings_of(one))
        token, _ = one.learn_on([one.draw(settings_of(one))], [target()], ["cat"], made, settings)
        found.append((made.labels[0], token))
    assert np.array_equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1].embedding, found[1][1].embedding)
    assert found[0][1].classes == found[1][1].classes
    assert found[0][1].settings == found[1][1].settings


@pytest.mark.parametrize("verb", ["draw", "look_at", "learn"])
def test_the_verbs_are_called_as_ovam_s(verb):
    own, lent = (inspect.signature(getattr(kind, verb)).parameters for kind in (OVAM, OnZeroGPU))
    assert [(name, x.kind, x.default) for name, x in lent.items()] == [(n, x.kind, x.default) for n, x in own.items()]


# ------------------------------------------------------------------------------------------------ its faults


def test_stop_ends_the_worker_at_its_next_step(ovam, lender):
    seen: list[int] = []
    settings = settings_of(ovam, steps=100)
    with pytest.raises(Stopped) as caught:
        ovam.draw(settings, on_step=lambda done, _: seen.append(done), should_stop=lambda: len(seen) > 2)
    assert 2 <= caught.value.steps < 100
    assert caught.value.total == 100
    first = lender.process.pid
    assert ovam.draw(settings_of(ovam)).recording.step_indices == (0, 1, 2)
    assert lender.process.pid == first, "the worker goes on"


def test_stop_before_a_gpu_is_asked_for(ovam, lender):
    lent = ovam.draw(settings_of(ovam))
    for run in (
        lambda: ovam.draw(settings_of(ovam), should_stop=lambda: True),
        lambda: ovam.look_at(PHOTO, PhotoSettings("the cat"), should_stop=lambda: True),
    ):
        with pytest.raises(Stopped):
            run()
    with pytest.raises(InputError, match="Stopped before the first epoch"):
        ovam.learn([lent], [target()], ["cat"], should_stop=lambda: True)
    assert len(lender.asked) == 1


def test_a_search_that_is_stopped_keeps_the_best(ovam):
    lent, seen = ovam.draw(settings_of(ovam)), []
    settings = replace(RECIPES["paper"], epochs=5000)
    token, found = ovam.learn(
        [lent], [target()], ["cat"], settings, on_epoch=seen.append, should_stop=lambda: len(seen) > 3
    )
    assert found.stopped
    assert 4 <= found.epochs < 5000
    assert found.loss == min(found.losses)
    assert token.names == ("cat",)


def test_an_on_step_that_raises_ends_the_worker_too(ovam, lender):
    def on_step(done, _total):
        if done == 2:
            raise Stopped(done, 100)

    with pytest.raises(Stopped):
        ovam.draw(settings_of(ovam, steps=100), on_step=on_step)
    assert ovam.draw(settings_of(ovam)).seconds > 0


def test_a_worker_that_dies_is_one_sentence_and_nothing_is_lost(ovam, lender, jobs):
    before = ovam.draw(settings_of(ovam))

    def on_step(done, _total):
        if done == 2:
            lender.kill()

    with pytest.raises(InputError) as caught:
        ovam.draw(settings_of(ovam, steps=100), on_step=on_step)
    assert str(caught.value) == DIED
    assert "\n" not in DIED
    assert ovam.answer(before, ASKED).labels == ["cat"]
    assert ovam.draw(settings_of(ovam)).recording.step_indices == (0, 1, 2)
    assert not list(jobs.iterdir())


def test_what_the_lender_refuses_is_one_sentence(ovam, lender):
    lender.refusal = gr.Error("You have exceeded your free ZeroGPU quota\n(60s requested). ", title="ZeroGPU quota")
    with pytest.raises(InputError) as caught:
        ovam.draw(settings_of(ovam))
    assert str(caught.value) == (
        "There is no GPU for this just now: You have exceeded your free ZeroGPU quota (60s requested)."
    )


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (InputError("It cannot be."), InputError, "It cannot be."),
        (RuntimeError("CUDA out of memory"), InputError, zerogpu.NO_MEMORY),
        (MemoryError(), InputError, zerogpu.NO_MEMORY),
        (ZeroDivisionError("a bug"), WorkerError, "ZeroDivisionError: a bug"),
    ],
)
def test_errors_of_the_worker_come_over(ovam, monkeypatch, error, kind, said):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(zerogpu.Draw, "run", fails)
    with pytest.raises(kind) as caught:
        ovam.draw(settings_of(ovam))
    assert said in str(caught.value)
    assert ("Traceback" in str(caught.value)) == (kind is WorkerError)


def test_what_is_wrong_is_said_before_a_gpu_is_asked_for(ovam, lender):
    with pytest.raises(InputError, match="width is 65"):
        ovam.draw(settings_of(ovam, width=65))
    with pytest.raises(InputError, match="timestep"):
        ovam.look_at(PHOTO, PhotoSettings("the cat", timesteps=(5000,)))
    with pytest.raises(InputError, match="makes no data sets"):
        ovam.run(prompt="a cat")
    assert lender.asked == []


# ------------------------------------------------------------------------------------------------- its bounds


def test_how_long_a_call_asks_for(ovam, monkeypatch):
    def seconds(**given) -> float:
        return zerogpu.Draw("", settings_of(ovam, **given), "conditional", False).seconds(ovam)

    assert seconds(steps=20) == pytest.approx(2 * seconds(steps=10))
    assert seconds(steps=10) == pytest.approx(10 * zerogpu.STEP, rel=0.01)
    assert seconds(width=128, height=128) > seconds()
    assert ovam.seconds(zerogpu.Draw("", settings_of(ovam), "conditional", False)) == zerogpu.LEAST
    monkeypatch.setattr(zerogpu, "STEP", 60.0)
    assert ovam.seconds(zerogpu.Draw("", settings_of(ovam), "conditional", False)) == zerogpu.MOST
    look = zerogpu.Look("", PHOTO, PhotoSettings("x", timesteps=(1, 2, 3)), False)
    assert look.seconds(ovam) == pytest.approx(180, rel=0.01)


def test_recordings_are_kept_within_their_bytes(plain):
    made = plain.draw(settings_of(plain, steps=8), branch="all", with_goca=True)
    assert kept(plain, made, made.nbytes) is made
    half = kept(plain, made, made.nbytes * 2 // 3)
    assert half.recording.step_indices == half.others["unconditional"].step_indices == (0, 2, 4, 6)
    assert half.nbytes <= made.nbytes * 2 // 3
    least = kept(plain, made, 1)
    assert least.recording.step_indices == (0,)
    assert plain.answer(least, ASKED).labels == ["cat"]


@pytest.mark.slow
def test_the_embedded_model_keeps_what_its_preset_names(lender, monkeypatch):
    ovam = OnZeroGPU(OVAM.from_pretrained(EMBEDDED, "cpu").pipe, lender, device="cpu")
    monkeypatch.setattr(zerogpu, "MAX_KEPT", 4 << 20)
    picture = ovam.generate("A photograph of a cat", seed=1, num_inference_steps=8)
    assert picture.recording.resolutions == (16,)
    assert max(picture.recording.timesteps) <= 600
    assert picture.nbytes <= 4 << 20
    assert ovam.segment(picture, "cat").masks.any()


# ------------------------------------------------------------------------------------------------- the page


def test_the_page_s_model_works_as_it_is(ovam, guarded):
    """Turns, stop flags and progress are those of any other model."""
    model, told = Model(ovam, Sessions("small", Bounds())), []
    session = model.sessions.of(types.SimpleNamespace(session_hash="a"))
    session.begin("generate")
    picture = model.draw(session, settings_of(ovam), "generate", lambda step, **_: told.append(step))
    assert told[-1] == (3, 3)
    with model.words_of(session) as before_word:
        assert model.answer(picture, ASKED, before_word).labels == ["cat"]
    session.begin("generate")
    timer = threading.Timer(0.3, session.stop)
    timer.start()
    begun = time.monotonic()
    with pytest.raises(Stopped):
        model.draw(session, settings_of(ovam, steps=200), "generate", lambda *_, **__: time.sleep(0.01))
    timer.join()
    assert time.monotonic() - begun < 60


def test_the_page_makes_no_data_sets_and_says_so_before_they_are_asked_for(ovam):
    sessions = Sessions("small", Bounds())
    with gr.Blocks():
        tab = ExportTab(Model(ovam, sessions))
    values, ann = {field: field.value for field in tab.given}, types.SimpleNamespace(session_hash="a")
    assert "makes no data sets" in tab.foresee(values, ann)
    with pytest.raises(gr.Error, match="makes no data sets"):
        tab.begin(values, ann)
    assert tab.exports.of(sessions.of(ann).visitor) == []


def test_elsewhere_the_package_is_not_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "spaces", None)
    monkeypatch.delenv("SPACES_ZERO_GPU", raising=False)
    monkeypatch.setenv("OVAM_DEVICE", "cpu")
    assert not zerogpu.is_zerogpu()
    assert type(zerogpu.open_ovam(EMBEDDED)) is OVAM


def test_on_a_space_the_model_stays_in_host_memory(monkeypatch):
    lender = Lender()
    monkeypatch.setenv("SPACES_ZERO_GPU", "true")
    monkeypatch.setenv("OVAM_MODEL", EMBEDDED)
    monkeypatch.setattr(zerogpu, "spaces", types.SimpleNamespace(GPU=lender), raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # as `spaces` has it say
    ovam = zerogpu.open_ovam()
    assert type(ovam) is OnZeroGPU
    assert ovam.device.type == "cpu"
    assert ovam.dtype == "float16"
    assert ovam.name == EMBEDDED
    assert lender.asked == []


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_is_begun_in_the_worker_alone():
    """In a process of its own: the tests before may have begun CUDA here, which no fork survives."""
    import subprocess

    code = """
import torch
from pipelines import make_small
from test_zerogpu import Lender, settings_of, ASKED
from tabs.zerogpu import OnZeroGPU
lender = Lender()
ovam = OnZeroGPU(make_small(), lender)
picture = ovam.draw(settings_of(ovam))
assert picture.device.startswith("cuda"), picture.device
assert ovam.answer(picture, ASKED).labels == ["cat"]
assert not torch.cuda.is_initialized()
lender.kill()
"""
    tests = Path(__file__).parent
    paths = os.pathsep.join([str(tests), str(tests.parent)])
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": paths})
