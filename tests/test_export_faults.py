"""Exports that were killed, or met a full disk, at any moment; links and other people's files in their folders."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from export_child import PIPE, SETTINGS, WORK

from ovam_core import OVAM
from ovam_core.data import dataset, runs
from ovam_core.data import export as export_module
from ovam_core.data.export import export_dataset, plan
from ovam_core.data.formats import zip_folder
from ovam_core.data.layout import FOLDERS
from ovam_core.data.prompts import Item, Work
from ovam_core.errors import InputError
from ovam_core.io import files

ABOUT = {
    "heatmaps": True,
    "format": ["voc"],
    "model": "tiny",
    "filters": {"min_coverage": 0.0, "max_coverage": 1.0, "clip_drop": 0.0},
}
ITEM = Item(0, "a cat", "", 1, ("cat",))


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> Path:
    """The undisturbed export."""
    out = tmp_path_factory.mktemp("export") / "out"
    export_dataset(OVAM(PIPE), WORK, SETTINGS, out, workers=0)
    return out


def tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "lock"
    }


def write(out: Path) -> None:
    """What an export writes, without a model: the folders, an image, and the whole of it."""
    with runs.locked(out):
        runs.check_folder(out, ABOUT)
        dataset.prepare(out, ABOUT)
        job = sample_job(out)
        dataset.write_job(job)
        dataset.assemble(out, ABOUT, Work((ITEM,), ("cat",)))


def sample_job(out: Path) -> dataset.Job:
    image = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    maps = np.linspace(0, 1, 64, dtype=np.float32).reshape(1, 8, 8)
    row = {"prompt": "a cat", "negative_prompt": "", "seed": 1, "classes": ["cat"], "class_ids": [1]}
    row["clip_scores"] = None
    return dataset.Job(str(out), ITEM, (1,), image, maps, maps > 0.5, (0.5,), False, 0.0, maps.astype(np.float16), row)


class Counted:
    """Calls `at` before the call number `count` of those by which files and folders come to be."""

    def __init__(self, monkeypatch, at, count: int):
        self.at, self.left = at, count
        monkeypatch.setattr(os, "replace", self.before(os.replace))
        monkeypatch.setattr(os, "mkdir", self.before(os.mkdir))
        monkeypatch.setattr(Path, "write_bytes", self.before(Path.write_bytes))

    def before(self, function):
        def counted(*arguments, **named):
            self.left -= 1
            if self.left == 0:
                self.at()
            return function(*arguments, **named)

        return counted


def test_killed_before_any_write_it_goes_on(tmp_path, monkeypatch):
    write(tmp_path / "whole")
    whole = tree(tmp_path / "whole")
    count = 0
    while True:
        count += 1
        out = tmp_path / f"killed-{count}"
        child = os.fork()
        if child == 0:
            try:
                Counted(monkeypatch, lambda: os._exit(9), count)
                write(out)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        write(out)
        assert tree(out) == whole, count
        if os.waitstatus_to_exitcode(status) == 0:
            break
    assert count > 20


def sentence(out: Path) -> str | None:
    """What an export says of an error; None where there was none."""
    try:
        write(out)
    except InputError as error:
        return str(error)
    except OSError as error:  # of `write_job` and `assemble`, whose callers say it
        return runs.disk_sentence(error, out)
    return None


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_is_full_at_any_write(tmp_path, monkeypatch, number):
    def full():
        raise OSError(number, os.strerror(number))

    write(tmp_path / "whole")
    whole = tree(tmp_path / "whole")
    for count in range(1, 60):
        out = tmp_path / f"full-{count}"
        with monkeypatch.context() as patch:
            counted = Counted(patch, full, count)
            said = sentence(out)
        if counted.left > 0:
            break
        # A folder that is there need not be made.
        assert said is None or "is full; free some space and start the same export again" in said
        assert not [name for name in tree(out) if files.PART.fullmatch(Path(name).name)]
        write(out)
        assert tree(out) == whole
    assert count > 20


@pytest.fixture
def small_disk(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    if (
        not shutil.which("mount")
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=160k", "none", place], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", place], check=True)


def fill(path: Path) -> None:
    """A file of zeros as large as the disk has room for."""
    with suppress(OSError), path.open("wb", buffering=0) as file:
        while file.write(bytes(4096)) == 4096:
            pass


def test_a_disk_that_is_really_full(small_disk, result):
    stuff = small_disk / "stuff"
    for left in (0, 12_000, 40_000):
        fill(stuff)
        os.truncate(stuff, stuff.stat().st_size - left)
        with pytest.raises(InputError, match="full") as caught:
            export_dataset(OVAM(PIPE), WORK, SETTINGS, small_disk / "out", workers=0)
        assert "\n" not in str(caught.value)
    stuff.unlink()
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    export_dataset(OVAM(PIPE), WORK, SETTINGS, small_disk / "out", workers=0)
    assert tree(small_disk / "out") == tree(result)


# ---------------------------------------------------------------------------------- folders without settings


@pytest.mark.parametrize(
    "made",
    [
        ["JPEGImages", "SegmentationClass", "ImageSets/Segmentation", ".ovam/items"],
        ["JPEGImages"],
        ["ImageSets/Segmentation", "heatmaps", ".ovam/items"],
    ],
)
def test_folders_alone_are_a_fresh_start(made, tmp_path):
    out = tmp_path / "out"
    for name in made:
        (out / name).mkdir(parents=True)
    (out / ".DS_Store").write_bytes(b"x")
    (out / made[0] / f".ovam-1-{'0' * 16}.part").write_bytes(b"half")
    runs.check_folder(out, ABOUT)
    write(out)
    write(tmp_path / "whole")
    assert {name: data for name, data in tree(out).items() if name != ".DS_Store"} == tree(tmp_path / "whole")


def test_settings_without_content_are_none(tmp_path):
    (tmp_path / ".ovam").mkdir()
    (tmp_path / ".ovam/settings.json").write_bytes(b"")
    write(tmp_path)
    assert (tmp_path / "metadata.jsonl").exists()


@pytest.mark.parametrize("mine", ["JPEGImages/mine.jpg", "notes.txt", "ImageSets/Segmentation/val.txt", "other/"])
def test_other_peoples_things_are_no_fresh_start(mine, tmp_path):
    path = tmp_path / mine
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir() if mine.endswith("/") else path.write_text("kept")
    with pytest.raises(InputError, match="not empty and holds no export"):
        plan(OVAM(PIPE), WORK, SETTINGS, tmp_path)
    assert path.exists()


# ------------------------------------------------------------------------------------------------ links


@pytest.mark.parametrize("name", [*FOLDERS, ".ovam/lock", ".ovam/settings.json"])
def test_links_are_not_followed(name, tmp_path):
    out, victim = tmp_path / "out", tmp_path / "victim"
    is_folder = name in FOLDERS
    if is_folder:
        victim.mkdir()
        (victim / "000000.json").write_text("kept")
    else:
        victim.write_text("kept")
    (out / name).parent.mkdir(parents=True)
    (out / name).symlink_to(victim)
    before = tree(victim) if is_folder else victim.read_text()
    with pytest.raises(InputError, match="is a link"):
        export_dataset(OVAM(PIPE), WORK, SETTINGS, out, workers=0)
    with pytest.raises(InputError, match="is a link"), runs.locked(out, "evaluation"):
        pass
    assert (tree(victim) if is_folder else victim.read_text()) == before


def test_a_lock_of_two_names_and_things_in_the_place_of_others(tmp_path):
    (tmp_path / "mine").write_text("kept")
    (tmp_path / "out/.ovam").mkdir(parents=True)
    os.link(tmp_path / "mine", tmp_path / "out/.ovam/lock")
    with pytest.raises(InputError, match="is a link"), runs.locked(tmp_path / "out"):
        pass
    assert (tmp_path / "mine").read_text() == "kept"
    (tmp_path / "other").mkdir()
    (tmp_path / "other/.ovam").write_text("mine")
    with pytest.raises(InputError, match="in the place of a folder"), runs.locked(tmp_path / "other"):
        pass
    (tmp_path / "pipe/.ovam").mkdir(parents=True)
    os.mkfifo(tmp_path / "pipe/.ovam/settings.json")
    with pytest.raises(InputError, match="in the place of a file"):
        runs.check_folder(tmp_path / "pipe", ABOUT)


def test_a_link_in_the_place_of_an_image_is_replaced(tmp_path):
    out = tmp_path / "out"
    write(out)
    image = next((out / "JPEGImages").iterdir())
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(image.stat().st_size))
    whole = image.read_bytes()
    image.unlink()
    image.symlink_to(secret)
    assert runs.read_done(out, ITEM) is None  # of the same size, but a link
    zip_folder(out, tmp_path / "out.zip")
    assert image.relative_to(out).as_posix() not in zipfile.ZipFile(tmp_path / "out.zip").namelist()
    write(out)
    assert image.read_bytes() == whole
    assert not image.is_symlink()
    assert not any(secret.read_bytes())


def test_the_state_names_files_of_the_folder_alone(tmp_path):
    write(tmp_path / "out")
    state = tmp_path / "out/.ovam/items/000000.json"
    secret = tmp_path / "secret"
    secret.write_bytes(b"12345")
    text = state.read_text()
    for path in ("../secret", str(secret), "JPEGImages/../../secret"):
        name = next((tmp_path / "out/JPEGImages").iterdir()).name
        size = (tmp_path / "out/JPEGImages" / name).stat().st_size
        changed = text.replace(f"JPEGImages/{name}", path).replace(f'"{path}": {size}', f'"{path}": 5')
        state.write_text(changed)
        assert f'"{path}": 5' in changed
        assert runs.read_done(tmp_path / "out", ITEM) is None
    state.write_text(text)
    assert runs.read_done(tmp_path / "out", ITEM) is not None


# ------------------------------------------------------------------------------------------------ part files


def test_only_what_was_half_written_here_is_cleared(tmp_path):
    out = tmp_path / "out"
    write(out)
    mine = [
        "mine.part",
        ".mine.part",
        ".mine.12-34.part",
        "JPEGImages/.movie.mp4.part",
        ".ovam-notes.part",
        "sub/.x.part",
    ]
    (out / "sub").mkdir()
    for name in mine:
        (out / name).write_text("kept")
    ours = [out / name / f".ovam-{number}-{number:016x}.part" for number, name in enumerate(("", *FOLDERS), start=7)]
    for path in ours:
        path.parent.mkdir(exist_ok=True)
        path.write_text("half")
    write(out)
    assert all((out / name).read_text() == "kept" for name in mine)
    assert not any(path.exists() for path in ours)


def test_writing_follows_no_link_and_leaves_nothing(tmp_path):
    (tmp_path / "mine").write_text("kept")
    (tmp_path / "out.json").symlink_to(tmp_path / "mine")
    files.write_atomically(tmp_path / "out.json", b"new")
    assert (tmp_path / "mine").read_text() == "kept"
    assert (tmp_path / "out.json").read_bytes() == b"new"
    long = tmp_path / ("x" * 250)
    files.write_atomically(long, b"new")
    assert long.read_bytes() == b"new"
    with pytest.raises(ZeroDivisionError), files.atomic_path(tmp_path / "other"):
        1 / 0  # noqa: B018
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "out.json", "x" * 250}


def test_a_name_that_is_too_long_is_one_sentence(tmp_path):
    for call in (
        lambda out: export_dataset(OVAM(PIPE), WORK, SETTINGS, out, workers=0),
        lambda out: runs.check_folder(out, ABOUT, "evaluation"),
    ):
        with pytest.raises(InputError, match="too long"):
            call(tmp_path / ("x" * 300))


def test_the_bytes_of_an_export_depend_on_none_of_this(result, tmp_path):
    about = export_module.fingerprint(OVAM(PIPE), WORK, SETTINGS, SETTINGS.queries(OVAM(PIPE), WORK))
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation", ".ovam/items"):
        (tmp_path / "out" / name).mkdir(parents=True)
    runs.check_folder(tmp_path / "out", about)
    export_dataset(OVAM(PIPE), WORK, SETTINGS, tmp_path / "out", workers=0)
    assert tree(tmp_path / "out") == tree(result)
