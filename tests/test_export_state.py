"""What the server keeps of exports: whose they are, how long, what takes whose place; and what an export reports."""

from __future__ import annotations

import threading
import zipfile
from dataclasses import replace
from types import SimpleNamespace

import pytest
from export_child import PIPE

from ovam_core import OVAM
from ovam_core.data.dataset import finished
from ovam_core.data.export import ExportSettings, export_dataset, plan
from ovam_core.data.prompts import Prompt, template_prompts, work_list
from ovam_core.data.runs import read_done
from ovam_core.errors import InputError
from ovam_core.settings import Filters
from tabs import exports as state
from tabs.exports import NEVER, Exports, address, described
from tabs.session import HOSTED, LOCAL, Limits, Sessions, StopFlag

SETTINGS = ExportSettings(steps=1, guidance=7.5, width=64, height=64, crf=False, threads=1)


def work_of(*names: str, images: int = 1):
    return work_list(template_prompts("a {}", names), names, images)


CAT, DOG, BUS = work_of("cat"), work_of("dog"), work_of("bus")


def visitor(name: str) -> SimpleNamespace:
    return SimpleNamespace(session_hash=name)


@pytest.fixture
def now():
    return [0.0]


@pytest.fixture
def exports(now):
    made = Exports(keep=100.0, clock=lambda: now[0])
    yield made
    made.close()


def filled(exports: Exports, owner: str, work, nbytes: int = 10):
    """An export of which a file is there already."""
    export = exports.ask(owner, "title", work, SETTINGS)
    with exports.making(export, StopFlag("export")) as folder:
        folder.mkdir(exist_ok=True)
        (folder / "file").write_bytes(b"x" * nbytes)
    return export


# ------------------------------------------------------------------------------------------- what there is


def test_the_same_goes_on_in_the_same_folder(exports):
    first = filled(exports, "ann", CAT)
    assert exports.ask("ann", "title", CAT, SETTINGS) is first
    others = [
        exports.ask("bob", "title", CAT, SETTINGS),
        exports.ask("ann", "title", DOG, SETTINGS),
        exports.ask("ann", "title", CAT, replace(SETTINGS, steps=2)),
    ]
    assert len({export.place for export in (first, *others)}) == 4
    assert (first.folder / "file").exists()
    assert exports.find("ann", described(CAT, SETTINGS, None)) is first
    assert exports.find("cy", described(CAT, SETTINGS, None)) is None


def test_tokens_are_part_of_it_and_stay_with_it(exports, tmp_path):
    (tmp_path / "one").write_bytes(b"1")
    by_token = exports.ask("ann", "title", CAT, SETTINGS, tmp_path)
    assert exports.ask("ann", "title", CAT, SETTINGS) is not by_token
    assert exports.ask("ann", "title", CAT, SETTINGS, tmp_path) is by_token
    (tmp_path / "one").write_bytes(b"2")
    assert exports.ask("ann", "title", CAT, SETTINGS, tmp_path) is not by_token
    assert by_token.settings.tokens == str(by_token.place / "tokens")
    assert (by_token.place / "tokens" / "one").read_bytes() == b"1"


def test_no_folder_stays_where_the_disk_is_full(exports, tmp_path, monkeypatch):
    made = []

    def full(_tokens, place):
        made.append(place.parent)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state.shutil, "copytree", full)
    with pytest.raises(OSError, match="No space"):
        exports.ask("ann", "title", CAT, SETTINGS, tmp_path)
    assert len(made) == 1
    assert not made[0].exists()
    assert exports.of("ann") == []


def test_nobody_finds_anothers(exports):
    own = exports.ask("ann", "title", CAT, SETTINGS)
    assert exports.get("ann", own.key) is own
    for owner, key in (("bob", own.key), ("", own.key), ("ann", own.key[:-1]), ("ann", ""), ("ann", None), ("ann", [])):
        with pytest.raises(InputError, match="not kept any more"):
            exports.get(owner, key)
        with pytest.raises(InputError, match="not kept any more"):
            exports.remove(owner, key)
    assert exports.of("bob") == []
    assert len(own.key) >= 24
    assert own.key in address(own.zip)


def test_the_list_has_the_one_used_last_first(exports, now):
    made = []
    for work in (CAT, DOG, BUS):
        now[0] += 1.0
        made.append(filled(exports, "ann", work))
    assert exports.of("ann") == made[::-1]
    now[0] += 1.0
    exports.ask("ann", "title", DOG, SETTINGS)
    assert exports.of("ann") == [made[1], made[2], made[0]]


# ------------------------------------------------------------------------------------------------ what goes


def test_exports_free_the_disk(exports, now):
    first = filled(exports, "ann", CAT)
    second = exports.ask("ann", "title", DOG, SETTINGS)
    with exports.making(second, StopFlag("export")) as folder:
        folder.mkdir()
        now[0] = 1000.0
        exports.sweep()
        assert not first.place.exists()
        assert folder.exists()  # it is being made
        assert exports.next_due() == NEVER
    assert exports.next_due() == 1100.0
    now[0] += 99.0
    exports.sweep()
    assert folder.exists()
    now[0] += 1.0
    exports.sweep()
    assert not second.place.exists()
    last = filled(exports, "ann", BUS)
    exports.close()
    assert not last.place.exists()


def test_the_oldest_of_an_owner_goes(now):
    exports = Exports(keep=100.0, each=2, clock=lambda: now[0])
    of_bob = filled(exports, "bob", CAT)
    made = []
    for work in (CAT, DOG, BUS):
        now[0] += 1.0
        made.append(filled(exports, "ann", work))
    assert exports.of("ann") == [made[2], made[1]]
    assert [export.place.exists() for export in (of_bob, *made)] == [True, False, True, True]
    exports.close()


def test_those_of_strangers_that_were_never_made_are_bounded(now, monkeypatch):
    """Each page that is opened on a Space is a new owner."""
    monkeypatch.setattr(state, "MOST", 2)
    exports = Exports(keep=100.0, each=3, clock=lambda: now[0])
    made = filled(exports, "ann", CAT)
    made.done = 1
    asked = []
    for owner in ("bob", "cy", "dan", "eve"):
        now[0] += 1.0
        asked.append(exports.ask(owner, "title", CAT, SETTINGS))
    assert [export.place.exists() for export in (made, *asked)] == [True, False, False, True, True]
    assert exports.of("bob") == []
    exports.close()


def test_all_together_have_room(now):
    exports = Exports(keep=100.0, nbytes=250, clock=lambda: now[0])
    made = []
    for owner in ("ann", "bob", "cy"):
        now[0] += 1.0
        made.append(filled(exports, owner, CAT, nbytes=100))
    assert [export.place.exists() for export in made] == [False, True, True]
    exports.close()


def test_one_that_is_removed_goes_at_once_or_with_its_run(exports):
    idle, busy = filled(exports, "ann", CAT), exports.ask("ann", "title", DOG, SETTINGS)
    exports.remove("ann", idle.key)
    assert not idle.place.exists()
    flag = StopFlag("export")
    with exports.making(busy, flag) as folder:
        folder.mkdir()
        exports.remove("ann", busy.key)
        assert flag.is_set()
        assert folder.exists()
        assert exports.of("ann") == []
    assert not busy.place.exists()
    with pytest.raises(InputError, match="not kept any more"), exports.making(busy, StopFlag("export")):
        pass


# ----------------------------------------------------------------------------------------- who takes whose place


@pytest.mark.parametrize("several", [True, False])
@pytest.mark.parametrize("owner", ["ann", "bob"])
@pytest.mark.parametrize("work", [CAT, DOG], ids=["same", "other"])
def test_a_second_run_stops_what_it_takes_the_place_of(several, owner, work):
    exports = Exports(keep=100.0, several=several)
    first, second = exports.ask("ann", "title", CAT, SETTINGS), exports.ask(owner, "title", work, SETTINGS)
    flag, order = StopFlag("export"), []

    def later():
        with exports.making(second, StopFlag("export")):
            order.append("second")

    worker = threading.Thread(target=later)
    with exports.making(first, flag):
        worker.start()
        in_the_way = first is second or (owner == "ann" and not several)
        if not in_the_way:
            worker.join(10)
        while in_the_way and not flag.is_set():
            pass
        order.append("first")
    worker.join(10)
    assert flag.is_set() == in_the_way
    assert order == (["first", "second"] if in_the_way else ["second", "first"])
    exports.close()


def test_a_run_that_is_stopped_while_it_waits_has_no_folder(exports):
    export, flag = exports.ask("ann", "title", CAT, SETTINGS), StopFlag("export")
    flag.set()
    with exports.making(export, flag) as folder:
        assert folder is None
    with exports.making(export, StopFlag("export")) as first, exports.making(export, flag) as second:
        assert (first, second) == (export.folder, None)


# ------------------------------------------------------------------------------------------------- visitors


def test_a_visitor_is_known_again_by_a_name_that_nobody_can_make():
    hosted = Sessions("emoji-voc", limits_of_exports=HOSTED)
    ann = hosted.of(visitor("ann"))
    name = ann.visitor
    own = hosted.exports.ask(name, "title", CAT, SETTINGS)
    ann.close()
    assert own.place.exists()  # whoever reloads the page comes back for it
    again = hosted.of(visitor("ann after a reload"))
    assert hosted.exports.of(again.visitor) == []
    assert again.recognize(name) == name
    assert hosted.exports.of(again.visitor) == [own]
    bob = hosted.of(visitor("bob"))
    theirs = bob.visitor
    stranger = Sessions("emoji-voc", limits_of_exports=HOSTED)
    forged = name.partition(".")[0] + "." + theirs.partition(".")[2]
    for said in ("", ".", name[:-1], name + "0", forged, "ann", "é", stranger.of(visitor("x")).visitor):
        assert bob.recognize(said) == theirs != name
    assert len({hosted.new_visitor() for _ in range(50)}) == 50
    hosted.close()
    stranger.close()
    assert not own.place.exists()


def test_on_a_space_an_export_waits_an_hour_even_if_nobody_comes_again(now):
    hosted = Sessions("emoji-voc", limits_of_exports=HOSTED, clock=lambda: now[0])
    hosted.connected = lambda _: True
    ann = hosted.of(visitor("ann"))
    export = hosted.exports.ask(ann.visitor, "title", CAT, SETTINGS)
    with ann.making(export, StopFlag("export")) as folder:
        folder.mkdir()
    assert hosted._timer.interval == HOSTED.keep
    now[0] = HOSTED.keep
    hosted.sweep()  # as the timer does
    assert not export.place.exists()
    hosted.close()


def test_on_ones_own_machine_all_exports_are_ones_own():
    local = Sessions("emoji-voc", limits_of_exports=LOCAL)
    ann, bob = local.of(visitor("ann")), local.of(visitor("bob"))
    export = filled(local.exports, ann.visitor, CAT)
    assert local.exports.of(bob.recognize("anything")) == [export]
    with zipfile.ZipFile(export.pack()) as packed:
        assert packed.namelist() == ["file"]
    local.close()
    assert not export.place.exists()


def test_the_bounds_of_a_space():
    assert isinstance(HOSTED, Limits)
    assert HOSTED.exports * HOSTED.megabytes <= HOSTED.disk < LOCAL.disk


# --------------------------------------------------------------------------------------- what an export reports


@pytest.fixture(scope="module")
def tiny():
    return OVAM(PIPE)


def test_each_batch_is_announced_before_its_images(tiny, tmp_path):
    work, told = work_of("cat", "dog", images=2), []
    settings = replace(SETTINGS, batch_size=2)
    export_dataset(
        tiny,
        work,
        settings,
        tmp_path / "out",
        workers=0,
        on_batch=lambda batch: told.append([item.seed for item in batch]),
        on_image=lambda progress: told.append(progress.row["seed"]),
    )
    assert told == [[0, 1], 0, [2, 3], 1, 2, 3] or told == [[0, 1], 0, 1, [2, 3], 2, 3]


def test_what_is_done_is_read_with_its_reasons(tiny, tmp_path):
    work, folder = work_of("cat", images=3), tmp_path / "out"
    filters = Filters(min_coverage=0.9)
    stop_after = iter([False] * 4 + [True] * 99)
    summary = export_dataset(
        tiny, work, replace(SETTINGS, filters=filters), folder, workers=0, should_stop=lambda: next(stop_after)
    )
    assert summary.stopped
    assert 1 <= len(summary.rows) < 3
    assert finished(folder, work, filters) == summary.rows
    there = [item for item in work.items if read_done(folder, item) is not None]
    assert [row["seed"] for row in finished(folder, work, filters)] == [item.seed for item in there]
    judged = finished(folder, work, Filters(min_coverage=0.9, max_coverage=0.95))
    for row in judged:
        assert row["kept"] == (0.9 <= row["coverage"] <= 0.95)
        assert bool(row["reason"]) != row["kept"]


@pytest.mark.parametrize("formats", [("voc",), ("voc", "coco"), ("voc", "parquet")])
@pytest.mark.parametrize("images", [1, 4])
def test_a_plan_without_a_folder_bounds_what_is_made(tiny, tmp_path, formats, images):
    work = work_list([Prompt("a cat and a dog")], ("cat", "dog"), images)
    settings = replace(SETTINGS, formats=formats)
    planned = plan(tiny, work, settings, None)
    assert (planned.images, planned.done) == (images, 0)
    folder = tmp_path / "out"
    export_dataset(tiny, work, settings, folder, workers=0)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and ".ovam" not in path.parts)
    assert size <= planned.largest_bytes
    assert plan(tiny, work, settings, folder).done == images
