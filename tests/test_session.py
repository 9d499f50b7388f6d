"""What stands behind the tabs: what visitors have and for how long, and the one model in one thread at a time."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import tabs.optimize
from ovam_core import OVAM
from ovam_core.errors import InputError, Stopped
from ovam_core.optimization import RECIPES
from ovam_core.settings import GenerateSettings, SegmentSettings
from ovam_core.tokens import BACKGROUND, Token
from tabs.asked import for_tokens
from tabs.model import Model
from tabs.session import HOSTED, LOCAL, MAX_OWN_TOKENS, Bounds, Sessions, limits


@pytest.fixture
def now():
    """The time, which only the test moves on."""
    return [0.0]


@pytest.fixture
def sessions(now):
    made = Sessions("emoji-voc", clock=lambda: now[0])
    yield made
    made.close()


@pytest.fixture
def model(ovam, sessions):
    return Model(ovam, sessions)


def visitor(name: str) -> SimpleNamespace:
    return SimpleNamespace(session_hash=name)


ANN, BOB = visitor("ann"), visitor("bob")


def silent(*_, **__):
    """A progress bar nobody looks at."""


def image(ovam, steps=2):
    return GenerateSettings.for_model(ovam.pipe, "A photograph of a cat", seed=1, steps=steps, width=64, height=64)


class Bytes:
    """A picture, as far as what keeps it looks at it."""

    def __init__(self, nbytes: int = 1):
        self.nbytes = nbytes


# ---------------------------------------------------------------------------------------------- stop flags


def test_each_work_has_a_stop_of_its_own(sessions):
    ann, bob = sessions.of(ANN), sessions.of(BOB)
    ann.begin("export")
    with ann.run("export") as running, bob.run("generate") as others:
        ann.begin("generate")
        with ann.run("generate") as queued:
            ann.stop("export")
            assert running.is_set()
            assert not queued.is_set()
            assert not others.is_set()
            ann.stop()
            assert queued.is_set()
        assert not others.is_set()


def test_stop_works_while_a_run_waits(sessions):
    ann = sessions.of(ANN)
    ann.begin("generate")
    ann.stop("generate")
    with ann.run("generate") as stop:
        assert stop.is_set()


def test_a_run_that_ends_leaves_the_flag_of_the_next_one(sessions):
    ann = sessions.of(ANN)
    ann.begin("generate")
    with ann.run("generate"):
        ann.begin("generate")
    ann.stop("generate")
    with ann.run("generate") as second:
        assert second.is_set()
    with ann.run("generate") as third:
        assert not third.is_set()


def test_the_end_of_a_run_stops_what_works_on_in_another_thread(sessions):
    with pytest.raises(GeneratorExit), sessions.of(ANN).run("export") as stop:
        raise GeneratorExit
    assert stop.is_set()


def test_leaving_stops_what_runs(sessions):
    ann = sessions.of(ANN)
    with ann.run("export") as running:
        sessions.leave(ANN)
        assert running.is_set()


# ------------------------------------------------------------------------------------------------ pictures


@pytest.fixture
def small(now):
    made = Sessions("emoji-voc", Bounds(pictures=2, nbytes=100, seconds=10), clock=lambda: now[0])
    yield made
    made.close()


def test_pictures_are_bounded_in_count_bytes_and_time(small, now):
    ann, bob, cid = (small.of(visitor(name)) for name in ("ann", "bob", "cid"))
    first, second, third = (ann.keep(Bytes(10)) for _ in range(3))
    assert ann.find(first) is None  # two each
    assert ann.find(second)
    assert ann.find(third)
    large = bob.keep(Bytes(95))
    assert bob.find(large)
    assert small.pictures.nbytes <= 100
    assert ann.find(second) is None
    huge = cid.keep(Bytes(1000))  # larger than all: kept, alone
    assert len(small.pictures) == 1
    assert cid.find(huge)
    now[0] = 9.0
    assert cid.find(huge)  # its time begins anew
    now[0] = 18.0
    assert cid.find(huge)
    now[0] = 28.0
    small.sweep()
    assert len(small.pictures) == 0
    assert cid.find(huge) is None
    assert cid.find(None) is None


def test_a_picture_is_its_visitors_alone(sessions):
    ann, bob = sessions.of(ANN), sessions.of(BOB)
    key = ann.keep(Bytes())
    assert ann.find(key)
    assert bob.find(key) is None
    with pytest.raises(InputError, match="generate one first"):
        bob.picture(key)


def test_a_visitor_who_goes_takes_their_pictures_along(sessions):
    ann, bob = sessions.of(ANN), sessions.of(BOB)
    of_ann, of_bob = ann.keep(Bytes()), bob.keep(Bytes())
    ann.close()
    assert ann.find(of_ann) is None
    assert bob.find(of_bob)
    assert len(sessions.pictures) == 1
    ann.keep(Bytes())  # by a run that outlived its visitor
    assert len(sessions.pictures) == 1


def test_memory_is_given_back_even_if_nobody_comes_again(small, now):
    ann = small.of(ANN)
    ann.keep(Bytes())
    assert small._timer.interval == 10
    now[0] = 4.0
    small.leave(ANN)
    assert small._timer.interval == 10  # the picture, before the session
    now[0] = 11.0
    small._wake()
    assert len(small.pictures) == 0
    assert small._timer.interval == small.bounds.grace + 4.0 - 11.0
    small.close()


# ----------------------------------------------------------------------------------------- come and gone


def test_a_lost_connection_is_forgiven(sessions, now):
    ann = sessions.of(ANN)
    key, folder = ann.keep(Bytes()), ann.download_folder()
    sessions.leave(ANN)
    now[0] += sessions.bounds.grace - 1
    sessions.sweep()
    assert sessions.of(ANN) is ann  # back again
    now[0] += sessions.bounds.grace
    sessions.sweep()
    assert ann.find(key) is not None
    assert folder.exists()
    sessions.leave(ANN)
    now[0] += sessions.bounds.grace
    sessions.sweep()
    assert ann.find(key) is None
    assert not folder.exists()
    assert sessions.of(ANN) is not ann


@pytest.mark.parametrize("connected", [True, False])
def test_a_client_that_never_says_goodbye_goes_at_last(sessions, now, connected):
    sessions.connected = lambda owner: connected and owner == "ann"
    patience = sessions.bounds.idle if connected else sessions.bounds.unconnected
    assert patience == (24 * 3600 if connected else 1800)
    ann, bob = sessions.of(ANN), sessions.of(BOB)
    with bob.run("optimize"):
        now[0] = patience - 1
        sessions.sweep()
        assert sessions.of(ANN) is ann
        now[0] += patience
        sessions.sweep()
        assert not bob.closed  # whose run is under way
    assert ann.closed
    sessions.sweep()
    assert sessions.of(BOB) is bob
    now[0] += sessions.bounds.unconnected
    sessions.sweep()
    assert bob.closed


def test_who_was_never_there_may_leave(sessions):
    sessions.leave(ANN)


def test_a_session_that_is_over_takes_no_files(sessions):
    ann = sessions.of(ANN)
    ann.close()
    with pytest.raises(InputError, match="reload"):
        ann.download_folder()
    with pytest.raises(InputError, match="reload"):
        ann.add_token(a_token())


def test_one_download_takes_the_place_of_the_last(sessions):
    ann = sessions.of(ANN)
    (ann.download_folder() / "one.zip").write_text("")
    folder = ann.download_folder()
    (folder / "two.zip").write_text("")
    assert [path.name for path in folder.iterdir()] == ["two.zip"]


# -------------------------------------------------------------------------------------------------- tokens


def a_token(name: str = "cat", width: int = 256) -> Token:
    return Token(torch.ones(2, width), (BACKGROUND, name), "emoji-voc")


def test_a_visitor_has_own_tokens_and_no_one_elses(sessions):
    ann, bob = sessions.of(ANN), sessions.of(BOB)
    name = ann.add_token(a_token("red cat"))
    path = ann.token_file(name)
    assert ann.token_names()[0] == name
    assert name not in bob.token_names()
    assert Token.load(path).names == ann.token(name).names == ("red cat",)
    for stranger in (name, "../../etc/passwd", str(path), None):
        with pytest.raises(InputError, match="There is no token"):
            bob.token(stranger)
        with pytest.raises(InputError, match="There is no token"):
            bob.token_file(stranger)
    ann.close()
    assert not path.exists()
    assert name not in ann.token_names()


def test_a_second_token_of_a_class_replaces_the_first_and_there_is_a_bound(sessions):
    ann = sessions.of(ANN)
    assert ann.add_token(a_token("cat")) == ann.add_token(a_token("cat"))
    assert ann.add_token(a_token("../cat")) != ann.add_token(a_token("..cat"))
    for number in range(MAX_OWN_TOKENS - 3):
        ann.add_token(a_token(f"cat {number}"))
    with pytest.raises(InputError, match=f"{MAX_OWN_TOKENS} tokens"):
        ann.add_token(a_token("one more"))
    folder = ann.token_file("cat · yours").parent
    assert len(list(folder.iterdir())) == MAX_OWN_TOKENS


def test_an_export_is_asked_by_own_tokens_in_place_of_shipped_ones(sessions):
    ann = sessions.of(ANN)
    shipped = {token.names for token in sessions.shipped.values()}
    assert ("cat",) in shipped
    ann.add_token(a_token("cat"))
    ann.add_token(a_token("zebra"))
    with ann.token_copies() as folder:
        copied = [Token.load(path) for path in folder.iterdir()]
    assert {token.names for token in copied} == shipped | {("zebra",)}
    assert len(copied) == len(shipped) + 1
    assert all((token.embedding == 1).all() for token in copied if token.names == ("cat",))
    assert not folder.exists()


def test_a_hosted_page_is_bounded_more_tightly(monkeypatch):
    monkeypatch.delenv("SPACE_ID", raising=False)
    assert limits() is LOCAL
    monkeypatch.setenv("SPACE_ID", "someone/ovam")
    assert limits() is HOSTED
    assert HOSTED.images < LOCAL.images


# ----------------------------------------------------------------------------------------------- the model


def test_a_look_elsewhere_takes_no_place_among_the_pictures(model, sessions, ovam):
    ann = sessions.of(ANN)
    keys = [ann.keep(model.draw(ann, image(ovam), "generate", silent)) for _ in range(2)]
    for _ in range(3):
        model.draw(ann, image(ovam), "optimize: picture", silent)
    assert all(ann.find(key) is not None for key in keys)


def test_the_half_that_a_token_needs_is_recorded(model, sessions, ovam):
    picture = model.draw(sessions.of(ANN), image(ovam), "generate", silent, "unconditional")
    assert picture.recording.branch == "unconditional"


def test_a_run_that_was_stopped_while_it_waited_is_not_made(model, sessions, ovam):
    ann = sessions.of(ANN)
    ann.begin("generate")
    ann.stop()
    with pytest.raises(Stopped, match="0 of 2"):
        model.draw(ann, image(ovam), "generate", silent)


def test_the_model_serves_one_run_at_a_time(model, sessions, ovam, monkeypatch):
    """Gradio lets the next run begin while the thread of a cancelled one still works."""
    at_work, most = [0], [0]
    real = OVAM.draw

    def watched(*given, **more):
        at_work[0] += 1
        most[0] = max(most[0], at_work[0])
        try:
            return real(*given, **more)
        finally:
            at_work[0] -= 1

    monkeypatch.setattr(OVAM, "draw", watched)
    runs = [
        threading.Thread(target=model.draw, args=(sessions.of(visitor(str(n))), image(ovam), "generate", silent))
        for n in range(3)
    ]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert most == [1]


def of_an_accelerator():
    raise torch.OutOfMemoryError("CUDA out of memory")


def of_the_processor():
    torch.empty(2**58)  # a real refusal, whose wording is the allocator's


@pytest.mark.parametrize("too_much", [of_an_accelerator, of_the_processor])
def test_short_memory_costs_the_recordings_first_then_one_sentence(model, sessions, ovam, monkeypatch, too_much):
    ann, bob = sessions.of(ANN), sessions.of(BOB)
    key = ann.keep(model.draw(ann, image(ovam), "generate", silent))
    real, failures = OVAM.draw, [1]

    def short(*given, **more):
        if failures[0]:
            failures[0] -= 1
            too_much()
        return real(*given, **more)

    monkeypatch.setattr(OVAM, "draw", short)
    assert model.draw(bob, image(ovam), "generate", silent).image.size == (64, 64)
    assert ann.find(key) is None
    failures[0] = 2
    with pytest.raises(InputError, match="too little memory"):
        model.draw(bob, image(ovam), "generate", silent)
    monkeypatch.setattr(OVAM, "answer", lambda *given, **more: too_much())
    monkeypatch.setattr(OVAM, "learn", lambda *given, **more: too_much())
    picture = real(ovam, image(ovam))
    with pytest.raises(InputError, match="fewer words"):
        model.answer(picture, SegmentSettings(words=("cat",)))
    labels = np.zeros((64, 64), np.uint8)
    labels[:32] = 1
    with pytest.raises(InputError, match="too little memory"):
        list(tabs.optimize.search(ovam, picture, labels, "cat", RECIPES["fast"], lambda: False, model.turns.work(ann)))
    with model.turns.work(ann) as work:  # it is free again
        assert work.next_unit(lambda: False)


def test_another_fault_is_not_taken_for_short_memory(model, sessions, ovam, monkeypatch):
    def wrong(*_, **__):
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(OVAM, "draw", wrong)
    with pytest.raises(RuntimeError, match="shapes"):
        model.draw(sessions.of(ANN), image(ovam), "generate", silent)


def test_sliders_hold_for_tokens_once_they_are_moved(ovam):
    preset = ovam.preset
    asked = SegmentSettings(("cat",), tau=preset.tau, alpha=preset.alpha)
    assert for_tokens(asked, preset) == asked
    moved = for_tokens(SegmentSettings(("cat",), tau=0.7, alpha=preset.alpha), preset)
    assert (moved.token_tau, moved.token_alpha) == (0.7, None)


def test_a_run_takes_the_place_of_the_one_before(sessions):
    ann = sessions.of(ANN)
    first = ann.replace("generate")
    with ann.run("generate", first) as running:
        assert not running.is_set()
        assert ann.runs("generate")
        second = ann.replace("generate")
        assert running.is_set()
        assert not ann.is_latest("generate", first)
        assert ann.is_latest("generate", second)
        with ann.run("generate", second) as taken:
            assert not taken.is_set()
        assert ann.is_latest("generate", second)
    assert not ann.runs("generate")


def test_a_run_that_was_replaced_before_it_began_stops_at_once(sessions):
    ann, bob = sessions.of(ANN), sessions.of(BOB)
    others = bob.replace("generate")
    first, second = ann.replace("generate"), ann.replace("generate")
    with ann.run("generate", second) as running:  # they may come in any order
        with ann.run("generate", first) as late:
            assert late.is_set()
        assert not running.is_set()
    with bob.run("generate", others) as own, ann.run("export") as other:
        ann.replace("generate")
        assert not own.is_set()
        assert not other.is_set()


def test_a_large_photograph_is_shown_smaller(sessions, ovam):
    ann = sessions.of(ANN)
    large = ovam.photograph(Image.new("RGB", (3000, 1500), "#5a9a3c"), "a cat")
    key = ann.keep(large)
    shown = ann.screen(key)
    assert ann.find(key) is large
    assert shown.image.size == (1024, 512)
    assert shown.recording is large.recording
    assert ann.screen(key) is shown  # whose last maps are there for the next threshold
    small = ann.keep(ovam.photograph(Image.new("RGB", (300, 150), "#5a9a3c"), "a cat"))
    assert ann.screen(small) is ann.find(small)
    assert ann.screen("unknown") is None
