"""Prompts to a data set: its files read by what people will use, and the same bytes by whatever way they came.

The small pipeline of export_child.py makes noise in milliseconds; what the pictures show is not looked at.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import shutil
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from export_child import CLASSES, PIPE, PROMPTS, SETTINGS, WORK, run
from PIL import Image
from pipelines import make_small
from reference import assert_refused

from ovam_core.cli import main
from ovam_core.data import export as export_module
from ovam_core.data import formats, runs
from ovam_core.data.dataset import assemble, prepare, stem
from ovam_core.data.export import ExportSettings, batches_of, export_dataset, measure, plan
from ovam_core.data.formats import preview, read_labels, write_parquet, zip_folder
from ovam_core.data.prompts import Item, Prompt, work_list
from ovam_core.data.runs import Process, cores
from ovam_core.errors import InputError
from ovam_core.ovam import OVAM
from ovam_core.plot import VOC_PALETTE
from ovam_core.query import attribute_words
from ovam_core.settings import Filters
from ovam_core.tokens import Token

ROOT = Path(__file__).parent.parent
TESTS = Path(__file__).parent


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, the state and anything left half written included."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def differing(one: Path, other: Path) -> list[str]:
    first, second = tree(one), tree(other)
    return sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))


@pytest.fixture(scope="module")
def server():
    """A fork server that has the pipeline already: a child begins its export in a fraction of a second."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(TESTS)])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["export_child"])
    first = context.Process(target=time.sleep, args=(0,))
    first.start()  # starts the server, before an export of this process would with a preload of its own
    first.join()
    try:
        yield context
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


@pytest.fixture(scope="module")
def result(server, tmp_path_factory) -> Path:
    """The undisturbed run, made with a worker process."""
    out = tmp_path_factory.mktemp("export") / "out"
    summary = export_dataset(OVAM(PIPE), WORK, SETTINGS, out, workers=1)
    assert summary.made == len(summary.rows) == 8
    assert not summary.stopped
    return out


@pytest.fixture(scope="module")
def rows(result) -> list[dict]:
    """Of all eight images, in their order; some of them kept, or the tests of what is kept would test nothing."""
    found = [json.loads(line) for line in (result / "metadata.jsonl").read_text().splitlines()]
    assert len(found) == 8
    assert any(row["kept"] for row in found)
    return found


# ------------------------------------------------------------------------------------------- read it back


def test_palette_png(result, rows):
    for row in rows:
        with Image.open(result / row["mask_file_name"]) as mask:
            assert mask.mode == "P"
            assert mask.size == (64, 64)
            assert mask.getpalette()[: 3 * 22] == list(VOC_PALETTE)[: 3 * 22]
        labels = read_labels(result / row["mask_file_name"])
        assert set(np.unique(labels)) <= {0, 255, *row["class_ids"]}
        assert row["class_ids"] == [CLASSES.index(name) + 1 for name in row["classes"]]
        shares = [round(float((labels == label).mean()), 6) for label in row["class_ids"]]
        assert row["coverages"] == shares
        assert row["coverage"] == pytest.approx(sum(shares), abs=1e-5)
    assert any(255 in read_labels(result / row["mask_file_name"]) for row in rows)
    assert (result / "classes.txt").read_text().splitlines() == ["background", *CLASSES]


def test_what_is_kept_is_what_the_filters_say(result, rows):
    kept = [row for row in rows if row["kept"]]
    assert {"coverage under 0.11", "coverage over 0.9", ""} == {row["reason"] for row in rows}
    assert all(0.11 <= row["coverage"] <= 0.9 for row in kept)
    assert 0 < len(kept) < len(rows)
    listed = (result / "ImageSets/Segmentation/train.txt").read_text().split()
    assert listed == [Path(row["file_name"]).stem for row in kept]


def test_voc_layout(result):
    """As torchvision's VOCSegmentation and mmsegmentation read it: a list of names, JPEGs and PNGs of the same name."""
    names = (result / "ImageSets/Segmentation/train.txt").read_text().split()
    assert names
    for name in names:
        image = Image.open(result / "JPEGImages" / f"{name}.jpg").convert("RGB")
        mask = Image.open(result / "SegmentationClass" / f"{name}.png")
        assert image.size == mask.size
        assert np.asarray(mask).dtype == np.uint8


def test_imagefolder(result, rows, tmp_path):
    from datasets import load_dataset

    loaded = load_dataset(str(result), split="train", cache_dir=str(tmp_path))
    assert loaded.num_rows == len(rows)
    files = {"train": [str(result / name) for name in ("metadata.jsonl", "JPEGImages/*", "SegmentationClass/*")]}
    named = load_dataset("imagefolder", data_files=files, split="train", cache_dir=str(tmp_path))
    assert list(named["seed"]) == list(loaded["seed"]) == [row["seed"] for row in rows]
    for one, row in zip(loaded, rows, strict=True):
        assert one["prompt"] == row["prompt"]
        assert one["classes"] == row["classes"]
        assert one["kept"] == row["kept"]
        assert one["image"].size == (64, 64)
        assert np.array_equal(np.asarray(one["mask"]), read_labels(result / row["mask_file_name"]))


def test_another_folder_of_the_same_name_is_not_taken_from_the_cache(result, rows, tmp_path):
    """The cache of `datasets` knows a folder by its name and its card alone."""
    from datasets import load_dataset

    def loaded(folder, **how):
        return load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"), **how)

    first, second = (shutil.copytree(result, tmp_path / place / "dataset") for place in ("one", "two"))
    assert loaded(first).num_rows == len(rows)
    settings = json.loads((second / ".ovam/settings.json").read_text())
    assemble(second, settings, replace(WORK, items=WORK.items[:-1]))
    assert loaded(second).num_rows == len(rows) - 1

    moved = tmp_path / "three" / "dataset"
    shutil.copytree(first, moved)
    shutil.rmtree(first)
    assert loaded(moved, download_mode="reuse_cache_if_exists")[0]["image"].size == (64, 64)


def test_parquet(result, rows, tmp_path):
    from datasets import load_dataset

    loaded = load_dataset(str(result / "parquet"), split="train", cache_dir=str(tmp_path))
    kept = [row for row in rows if row["kept"]]
    assert loaded.num_rows == len(kept)
    for one, row in zip(loaded, kept, strict=True):
        assert (one["prompt"], one["seed"], one["class_ids"]) == (row["prompt"], row["seed"], row["class_ids"])
        assert np.array_equal(np.asarray(one["mask"]), read_labels(result / row["mask_file_name"]))
        assert np.array_equal(np.asarray(one["image"]), np.asarray(Image.open(result / row["file_name"])))


def test_parquet_shards(result, rows, tmp_path, monkeypatch):
    import pyarrow.parquet as pq

    monkeypatch.setattr(formats, "SHARD_ROWS", 3)
    for name in ("JPEGImages", "SegmentationClass"):
        (tmp_path / name).symlink_to(result / name)
    write_parquet(tmp_path, rows)
    assert [path.name[:20] for path in sorted((tmp_path / "parquet").iterdir())] == [
        f"train-0000{n}-of-00003"[:20] for n in range(3)
    ]
    assert sum(pq.read_table(path).num_rows for path in (tmp_path / "parquet").iterdir()) == len(rows)
    write_parquet(tmp_path, rows[:2])  # fewer rows: the old shards go
    assert len(list((tmp_path / "parquet").iterdir())) == 1


def test_coco(result, rows):
    from pycocotools import mask as rle

    about = json.loads((result / "annotations/instances_train.json").read_text())
    assert about["categories"] == [{"id": n, "name": name} for n, name in enumerate(CLASSES, start=1)]
    files = {image["id"]: image["file_name"] for image in about["images"]}
    kept = [row for row in rows if row["kept"]]
    assert list(files.values()) == [Path(row["file_name"]).name for row in kept]
    found = {image: np.zeros((64, 64), dtype=np.uint8) for image in files}
    assert len(about["annotations"]) >= len(kept)
    for one in about["annotations"]:
        pixels = rle.decode(one["segmentation"]).astype(bool)
        assert one["area"] == pixels.sum() > 0
        x, y, width, height = (int(side) for side in one["bbox"])
        assert pixels[y : y + height, x : x + width].sum() == one["area"]
        found[one["image_id"]][pixels] = one["category_id"]
    for image, row in zip(files, kept, strict=True):
        labels = read_labels(result / row["mask_file_name"])
        assert np.array_equal(found[image], np.where(labels == 255, 0, labels))


def test_heatmaps(result, rows):
    for row in rows:
        with np.load(result / row["heatmaps"], allow_pickle=False) as file:
            assert file["maps"].dtype == np.float16
            assert file["maps"].shape == (len(row["classes"]), 8, 8)
            assert file["classes"].tolist() == row["classes"]
            assert 0 <= file["maps"].min() < file["maps"].max() <= 1


def test_contact_sheet_preview_and_zip(result, rows, tmp_path):
    assert Image.open(result / "contact_sheet.png").width % 128 == 0
    assert preview(result, rows[0]).size == (64, 64)
    first = zip_folder(result, tmp_path / "a.zip").read_bytes()
    assert first == zip_folder(result, tmp_path / "b.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        whole = {name: data for name, data in tree(result).items() if not name.startswith(".ovam/")}
        assert {name: archive.read(name) for name in archive.namelist()} == whole


def test_images_are_those_of_generate(result, rows):
    """Nothing but prompt, seed and batch makes an image: the pipeline itself makes the same batch."""
    items = WORK.items[2:4]
    images = PIPE(
        [item.prompt for item in items],
        negative_prompt=[item.negative_prompt for item in items],
        num_inference_steps=2,
        guidance_scale=4.0,
        width=64,
        height=64,
        generator=[torch.Generator().manual_seed(item.seed) for item in items],
    ).images
    for image, row in zip(images, rows[2:4], strict=True):
        written = np.asarray(Image.open(result / row["file_name"]), dtype=int)
        assert np.abs(written - np.asarray(image, dtype=int)).mean() < 6  # JPEG
    assert [item.seed for item in WORK.items] == [7, 8, 40, 41, 11, 12, 13, 14]


# --------------------------------------------------------------------------------- the same bytes, always


def test_again_makes_nothing(result, tmp_path):
    before = tree(result)
    summary = export_dataset(OVAM(PIPE), WORK, SETTINGS, result, workers=1)
    assert summary.made == 0
    assert len(summary.rows) == 8
    assert tree(result) == before


@pytest.mark.slow
def test_killed_at_any_instant(server, result, tmp_path):
    """SIGKILL, 24 times, at random moments of exports with and without a worker; then each goes on to its end."""
    chance = random.Random(4)
    begun = server.Event()
    whole = server.Process(target=run, args=(tmp_path / "timed", 1, None, begun))
    whole.start()
    assert begun.wait(300)
    start = time.perf_counter()
    whole.join()
    lasts = time.perf_counter() - start
    kills = folders = halfway = 0
    while kills < 24:
        out, workers = tmp_path / str(folders), folders % 2
        folders += 1
        for _ in range(6):
            begun = server.Event()
            child = server.Process(target=run, args=(out, workers, None, begun))
            child.start()
            assert begun.wait(300)
            child.join(chance.uniform(0.05, 0.9) * lasts)
            killed = child.is_alive()
            child.kill()
            child.join()
            kills += killed
            halfway += killed and 0 < len(list((out / ".ovam/items").glob("*.json"))) < 8
            if not killed:
                break
        child = server.Process(target=run, args=(out, workers))
        child.start()
        child.join(300)
        assert child.exitcode == 0
        assert differing(out, result) == []
    assert halfway >= 3, "no kill hit a half-made data set"


def test_workers_go_with_their_parent(server, tmp_path):
    begun = server.Event()
    child = server.Process(target=run, args=(tmp_path / "out", 2, None, begun))
    child.start()
    assert begun.wait(300)
    while not (own := children_of(child.pid)) and child.is_alive():
        time.sleep(0.01)
    child.kill()
    child.join()
    assert own
    deadline = time.time() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in own) and time.time() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in own if Path(f"/proc/{pid}").exists()]


def children_of(parent: int) -> list[int]:
    return [int(pid) for path in Path(f"/proc/{parent}/task").glob("*/children") for pid in path.read_text().split()]


def test_a_full_disk(server, result, tmp_path):
    out = tmp_path / "out"
    sizes = sorted(len(data) for name, data in tree(result).items() if name.startswith("JPEGImages"))
    for limit, workers in ((1500, 0), (sizes[3], 0), (sizes[5], 0)):
        child = server.Process(target=run, args=(out, workers, limit))
        child.start()
        child.join(300)
        said = out.with_suffix(".said").read_text()
        assert child.exitcode == 2
        assert "full" in said
        assert "start the same export again" in said
        assert "\n" not in said
        assert not list(out.rglob("*.part"))
        for path in out.rglob("*.jpg"):
            Image.open(path).load()  # what is there is whole
    assert list(out.rglob("*.jpg"))
    export_dataset(OVAM(PIPE), WORK, SETTINGS, out, workers=0)
    assert differing(out, result) == []


@pytest.mark.slow
def test_a_full_disk_in_a_worker(tmp_path):
    """The limit is inherited by the worker, whose OSError comes back as the same sentence."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    code = (
        "import sys; sys.path[:0] = sys.argv[2:4]\n"
        "from pathlib import Path\n"
        "from export_child import run\n"
        "if __name__ == '__main__': run(Path(sys.argv[1]), workers=1, largest_file=2500)\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    command = [sys.executable, str(script), str(tmp_path / "out"), str(ROOT), str(TESTS)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=240)
    assert ran.returncode == 2, ran.stderr
    assert "is full" in (tmp_path / "out.said").read_text()
    assert resource.getrlimit(resource.RLIMIT_FSIZE) == before


def test_a_script_that_guards_nothing(server, result, tmp_path):
    """A worker does not run the script that it is started by: here nothing asks for its `__name__`."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys; sys.path[:0] = sys.argv[2:4]\n"
        "from export_child import PIPE, SETTINGS, WORK\n"
        "from ovam_core import OVAM\n"
        "from ovam_core.data.export import export_dataset\n"
        "print(len(export_dataset(OVAM(PIPE), WORK, SETTINGS, sys.argv[1], workers=1).rows))\n"
    )
    command = [sys.executable, str(script), str(tmp_path / "out"), str(ROOT), str(TESTS)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=240)
    assert ran.stdout == "8\n", ran.stderr
    assert differing(tmp_path / "out", result) == []


def test_a_worker_that_dies(result, tmp_path):
    out = tmp_path / "out"

    def kill(progress):
        for worker in multiprocessing.active_children():
            worker.kill()

    with pytest.raises(InputError, match="died"):
        export_dataset(OVAM(PIPE), WORK, SETTINGS, out, workers=1, on_image=kill)
    export_dataset(OVAM(PIPE), WORK, SETTINGS, out, workers=0)
    assert differing(out, result) == []


def test_shares_of_several_processes(result, tmp_path):
    ovam = OVAM(PIPE)
    for ranks in (2, 3):
        out = tmp_path / str(ranks)
        prepare(out, export_module.fingerprint(ovam, WORK, SETTINGS, SETTINGS.queries(ovam, WORK)))
        seen = []
        for rank in reversed(range(ranks)):
            process = Process(rank, ranks)
            summary = export_dataset(OVAM(PIPE), WORK, SETTINGS, out, process=process, workers=0, on_image=seen.append)
            assert (summary.rows is None) == (rank > 0)
        assert len(seen) == 8
        assert seen[-1].done == seen[-1].total
        assert differing(out, result) == []


@pytest.mark.slow
def test_accelerate_with_two_processes(result, tmp_path):
    """The real launcher, two CPU processes, one model folder; against one process. With --cpu accelerate starts only
    one process, whatever --num_processes says; --multi_gpu starts two, and they find no GPU.
    """
    model = tmp_path / "small"
    PIPE.save_pretrained(model)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        "".join(
            json.dumps({"prompt": one.text, "seed": one.seed, "negative_prompt": one.negative}) + "\n"
            for one in PROMPTS
        )
    )
    options = [
        "export",
        "--prompts",
        str(prompts),
        "--classes",
        ", ".join(CLASSES),
        "--images-per-prompt",
        "2",
        "--seed",
        "7",
        "--model",
        str(model),
        "--device",
        "cpu",
        "--steps",
        "2",
        "--guidance",
        "4",
        "--size",
        "64x64",
        "--tau",
        ".8",
        "--alpha",
        ".9",
        "--threads",
        "1",
        "--batch-size",
        "2",
        "--heatmaps",
        "--format",
        "coco",
        "--min-coverage",
        ".11",
        "--max-coverage",
        ".9",
        "--uncertain",
        ".01",
    ]
    one, two = tmp_path / "one", tmp_path / "two"
    assert main([*options, "--out", str(one), "--workers", "0"]) == 0
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--num_processes",
        "2",
        "--multi_gpu",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        "0",
        "-m",
        "ovam_core",
    ]
    ran = subprocess.run(
        [*launch, *options, "--out", str(two), "--workers", "0"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.count("2 processes share the work.") == ran.stdout.count("8 of 8 images") == 1
    assert differing(one, two) == []
    # Scheduler and weights went through files; the images are those of the pipeline in memory all the same.
    same = [name for name in tree(result) if name.startswith(("JPEGImages", "SegmentationClass", "heatmaps"))]
    assert len(same) == 24
    assert all(tree(result)[name] == tree(one)[name] for name in same)


def test_a_batch_has_negative_prompts_or_none():
    """SDXL's image without one must not depend on whether another of the batch has one."""
    parts = list(batches_of(WORK.items, 3))
    assert [item for part in parts for item in part] == list(WORK.items)
    assert max(map(len, parts)) == 3
    assert all(len({bool(item.negative_prompt) for item in part}) == 1 for part in parts)
    assert len({bool(item.negative_prompt) for item in WORK.items}) == 2


def test_out_of_memory_halves_the_batch_once(tmp_path, monkeypatch):
    real, sizes, notes = export_module.make_jobs, [], []

    def crowded(pipe, items, *rest):
        sizes.append(len(items))
        if len(items) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(pipe, items, *rest)

    monkeypatch.setattr(export_module, "make_jobs", crowded)
    settings = replace(SETTINGS, batch_size=4)
    summary = export_dataset(OVAM(PIPE), WORK, settings, tmp_path / "out", workers=0, on_note=notes.append)
    assert sizes == [2, 2, 4, 2, 2]
    assert len(summary.rows) == 8
    assert len(notes) == 1
    assert "batches of 2" in notes[0]
    assert notes[0] in summary.text()
    with pytest.raises(InputError, match="does not fit in memory"):
        export_dataset(OVAM(PIPE), WORK, replace(SETTINGS, batch_size=8), tmp_path / "other", workers=0)


def test_stop_and_go_on(result, tmp_path):
    out, seen = tmp_path / "out", []
    summary = export_dataset(
        OVAM(PIPE), WORK, SETTINGS, out, workers=0, on_image=seen.append, should_stop=lambda: len(seen) >= 3
    )
    assert summary.stopped
    assert len(summary.rows) == summary.made == len(seen) == 4
    assert [one.done for one in seen] == [1, 2, 3, 4]
    assert {one.total for one in seen} == {8}
    assert len((out / "metadata.jsonl").read_text().splitlines()) == 4
    assert json.loads((out / "export.json").read_text())["images"] == 4
    assert not export_dataset(OVAM(PIPE), WORK, SETTINGS, out, workers=0).stopped
    assert differing(out, result) == []


def test_a_file_that_went_missing_is_made_again(result, tmp_path):
    out = tmp_path / "out"
    export_dataset(OVAM(PIPE), WORK, SETTINGS, out, workers=0)
    next(out.glob("JPEGImages/000003*")).write_bytes(b"cut")
    next(out.glob("SegmentationClass/000006*")).unlink()
    (out / ".ovam/items/000001.json").write_text("{")
    assert export_dataset(OVAM(PIPE), WORK, SETTINGS, out, workers=0).made == 3
    assert differing(out, result) == []


# -------------------------------------------------------------------------------------- refusals and plans


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"tau": 0.7}, "tau"),
        ({"steps": 3}, "steps"),
        ({"batch_size": 1}, "batch size"),
        ({"crf": False}, "crf"),
        ({"formats": ("voc",)}, "format"),
        ({"filters": Filters()}, "filters"),
        ({"threads": 2}, "threads"),
        ({"guidance": 4.5}, "guidance"),
    ],
)
def test_other_settings_are_refused(result, change, name):
    before = tree(result)
    with pytest.raises(InputError, match=f"another setting of '{name}'"):
        export_dataset(OVAM(PIPE), WORK, replace(SETTINGS, **change), result, workers=0)
    assert tree(result) == before


def test_other_prompts_and_weights_are_refused(result):
    other = work_list(PROMPTS[::-1], CLASSES, images_per_prompt=2, seed=7)
    with pytest.raises(InputError, match="prompts"):
        export_dataset(OVAM(PIPE), other, SETTINGS, result, workers=0)
    weight = next(PIPE.unet.parameters())
    before = weight.data.clone()
    try:
        weight.data += 1e-3
        with pytest.raises(InputError, match="weights"):
            plan(OVAM(PIPE), WORK, SETTINGS, result)
    finally:
        weight.data.copy_(before)


def test_what_a_lora_is_set_to_is_a_setting(tmp_path):
    peft = pytest.importorskip("peft")
    pipe = make_small()
    pipe.unet.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_k"]), "toy")
    prepare(tmp_path, export_module.fingerprint(OVAM(pipe), WORK, SETTINGS, SETTINGS.queries(OVAM(pipe), WORK)))
    assert plan(OVAM(pipe), WORK, SETTINGS, tmp_path).done == 0
    pipe.unet.set_adapters("toy", 0.5)
    with pytest.raises(InputError, match="weights"):
        plan(OVAM(pipe), WORK, SETTINGS, tmp_path)


def test_weights_that_are_offloaded_are_the_same_ones():
    """accelerate's sequential offload, with the CPU in the part of the accelerator."""
    accelerate = pytest.importorskip("accelerate")
    pipe = make_small()
    before = export_module._weights(OVAM(pipe))
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        accelerate.cpu_offload(part, execution_device="cpu")
    assert pipe.unet.conv_in.weight.is_meta
    assert export_module._weights(OVAM(pipe)) == before
    pipe.unet.conv_in._hf_hook.weights_map["weight"].add_(1)
    assert export_module._weights(OVAM(pipe)) != before


def test_steps_that_are_not_run_are_refused_before_a_picture_is_made(tmp_path):
    with pytest.raises(InputError, match="step"):
        plan(OVAM(PIPE), WORK, replace(SETTINGS, step_indices=(5,)), tmp_path)


def test_a_folder_of_something_else(tmp_path):
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(InputError, match="not empty"):
        export_dataset(OVAM(PIPE), WORK, SETTINGS, tmp_path, workers=0)
    with pytest.raises(InputError, match="is a file"):
        export_dataset(OVAM(PIPE), WORK, SETTINGS, tmp_path / "mine.txt", workers=0)
    assert list(tree(tmp_path)) == ["mine.txt"]


def test_two_exports_in_one_folder(tmp_path):
    with runs.locked(tmp_path / "out"), pytest.raises(InputError, match="Another export is running"):
        export_dataset(OVAM(PIPE), WORK, SETTINGS, tmp_path / "out", workers=0)


def test_plan_and_measure(result, tmp_path):
    planned = plan(OVAM(PIPE), WORK, SETTINGS, tmp_path / "new")
    assert (planned.images, planned.done) == (8, 0)
    assert planned.classes == {"cat": 6, "car": 4, "red bus": 4}
    assert plan(OVAM(PIPE), WORK, SETTINGS, result).done == 8
    assert sum(map(len, tree(result).values())) < planned.largest_bytes
    assert "No CLIP model" in planned.text()
    assert measure(OVAM(PIPE), WORK, SETTINGS).bytes > 1000
    assert not (tmp_path / "new").exists()


def test_summary(result):
    summary = export_dataset(OVAM(PIPE), WORK, SETTINGS, result, workers=0)
    table = {one["class"]: one for one in summary.by_class()}
    assert table["cat"]["images"] == 6
    assert sum(one["small"] + one["large"] for one in table.values()) > 0
    assert f"{summary.kept} kept" in summary.text()
    assert 0.11 < summary.mean_coverage < 0.9


@pytest.mark.parametrize(
    "wrong",
    [
        {"tau": float("nan")},
        {"alpha": 2},
        {"uncertain": -1},
        {"batch_size": 0},
        {"batch_size": True},
        {"threads": 0.5},
        {"formats": ("pascal",)},
        {"filters": Filters(min_coverage=2)},
        {"steps": 0},
        {"width": 12},
    ],
)
def test_settings_that_cannot_be(wrong, tmp_path):
    with pytest.raises(InputError):
        export_dataset(OVAM(PIPE), WORK, replace(SETTINGS, **wrong), tmp_path / "out", workers=0)
    assert not (tmp_path / "out").exists()


def test_a_class_that_nothing_fits(tmp_path):
    work = work_list([Prompt("a cat ?!", ("?!",))], ("?!",))
    with pytest.raises(InputError, match="Neither a token nor a word"):
        export_dataset(OVAM(PIPE), work, SETTINGS, tmp_path / "out", workers=0)


# ------------------------------------------------------------------------------------------------- tokens


@pytest.fixture
def token_folder(tmp_path) -> Path:
    rows = attribute_words(PIPE, ["the cat"])[0].embedding[:2].float()
    token = Token(rows, ("background", "cat"), "small", "unconditional", tau=0.6, alpha=1.0)
    token.save(tmp_path / "tokens" / "cat.safetensors")
    return tmp_path / "tokens"


def test_classes_by_token_and_by_word(token_folder, tmp_path):
    settings = replace(SETTINGS, tokens=str(token_folder), tau=None, alpha=None)
    asked = settings.queries(OVAM(PIPE), WORK)
    assert (asked["cat"].kind, asked["cat"].tau, asked["cat"].alpha, asked["cat"].branch) == (
        "token",
        0.6,
        1.0,
        "unconditional",
    )
    assert (asked["car"].kind, asked["car"].tau, asked["car"].alpha, asked["car"].branch) == (
        "word",
        0.4,
        0.85,
        "conditional",
    )
    planned = plan(OVAM(PIPE), WORK, settings, tmp_path / "out")
    assert planned.by == {"cat": "token", "car": "word", "red bus": "word"}
    assert "car, red bus" in planned.text()
    assert len(export_dataset(OVAM(PIPE), WORK, settings, tmp_path / "out", workers=0).rows) == 8
    changed = Token.load(token_folder / "cat.safetensors")
    replace(changed, embedding=changed.embedding * 2).save(token_folder / "cat.safetensors")
    with pytest.raises(InputError, match="class questions"):
        export_dataset(OVAM(PIPE), WORK, settings, tmp_path / "out", workers=0)


def test_no_tokens(tmp_path):
    for folder in (str(tmp_path), "library"):
        with pytest.raises(InputError, match="no tokens"):
            plan(OVAM(PIPE), WORK, replace(SETTINGS, tokens=folder), tmp_path / "out")


# ------------------------------------------------------------------------------------------- hard prompts

HARD = (
    "a cat, \"quoted\", and 'more'",
    "a cat\non two\r\nlines",
    "a cat 🐈 🎉",
    "حصان a cat قطة",
    "../../a cat/../etc/passwd",
    "C:\\cat\\car",
    "a cat\u2028\u2029\x00\x1b[31m",
    "cat " * 3,
    "<b>cat</b>&amp;",
    "a cat; DROP TABLE",
    "CAT!",
)


def test_hard_prompts(tmp_path):
    long = "a cat " * 1667  # 10,002 characters
    work = work_list(
        [Prompt(text, source=f"line {n}") for n, text in enumerate((*HARD, long, "a dog"))],
        CLASSES,
        check=SETTINGS.check(OVAM(PIPE)),
    )
    assert [one.reason.split(";")[0] for one in work.skipped] == [
        "The prompt has 10,002 characters",
        "It names none of the classes.",
    ]
    out = tmp_path / "deep" / "out"
    export_dataset(OVAM(PIPE), work, replace(SETTINGS, crf=False), out, workers=0)
    rows = [json.loads(line) for line in (out / "metadata.jsonl").read_text().split("\n")[:-1]]
    assert [row["prompt"] for row in rows] == list(HARD)
    assert {path.name for path in tmp_path.iterdir()} == {"deep"}
    assert {path.name for path in (tmp_path / "deep").iterdir()} == {"out"}
    assert all(path.name[:6].isdigit() and path.name.isascii() for path in (out / "JPEGImages").iterdir())
    assert len((out / "skipped.jsonl").read_text().splitlines()) == 2

    from datasets import load_dataset

    loaded = load_dataset(str(out), split="train", cache_dir=str(tmp_path / "cache"))
    assert list(loaded["prompt"]) == list(HARD)


def test_names_hold_no_class_that_could_hurt():
    hard = ("../../etc", "a/b\\c", "猫", "red bus", "x" * 100, "con", "🐈")
    names = [stem(Item(n, "p", "", 0, (name,) * 4)) for n, name in enumerate(hard)]
    assert all(
        name[:7] == f"{n:06d}_" and set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-_")
        for n, name in enumerate(names)
    )
    assert max(map(len, names)) <= 80
    assert len(set(names)) == len(names)


# ---------------------------------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "small"
    PIPE.save_pretrained(folder)
    return folder


def test_command_line(model, tmp_path, capsys):
    out = tmp_path / "out"
    options = [
        "--classes",
        "voc",
        "--limit",
        "3",
        "--out",
        str(out),
        "--model",
        str(model),
        "--device",
        "cpu",
        "--steps",
        "1",
        "--size",
        "64x64",
        "--workers",
        "0",
        "--threads",
        "1",
        "--no-crf",
    ]
    command = ["export", "--template", "A photograph of a {}", *options]
    assert main([*command, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "3 images of 64x64" in said
    assert "aeroplane 1, bicycle 1, bird 1" in said
    assert "Measured on one batch" in said
    assert not out.exists()
    assert main(command) == 0
    said = capsys.readouterr()
    assert "3 of 3 images" in said.out
    assert "contact_sheet.png" in said.out
    assert "3/3" in said.err
    assert min(path.name for path in (out / "JPEGImages").iterdir()) == "000000_aeroplane.jpg"
    assert main([*command, "--tau", "0.5"]) == 2
    assert "another setting of 'tau'" in capsys.readouterr().err


BAD = {
    "empty file": ({"p.txt": "\n \n"}, ["--prompts", "p.txt"], "no prompt"),
    "empty csv": ({"p.csv": ""}, ["--prompts", "p.csv"], "no prompt"),
    "no such file": ({}, ["--prompts", "p.txt"], "cannot be read"),
    "not utf-8": ({"p.txt": b"\xff\xfe\x00"}, ["--prompts", "p.txt"], "UTF-8"),
    "no column": ({"p.csv": "text\ncat\n"}, ["--prompts", "p.csv"], "column 'prompt'"),
    "broken csv": ({"p.csv": 'prompt\n"a cat\n'}, ["--prompts", "p.csv"], "malformed"),
    "broken jsonl": ({"p.jsonl": "{"}, ["--prompts", "p.jsonl"], "not JSON at line 1"),
    "empty list": ({"p.json": "[]"}, ["--prompts", "p.json"], "no prompt"),
    "not coco": ({"p.json": "{}"}, ["--prompts", "p.json"], "COCO captions"),
    "seed in words": ({"p.csv": "prompt,seed\na cat,many\n"}, ["--prompts", "p.csv"], "seed 'many'"),
    "class not in the list": (
        {"p.csv": "prompt,classes\na cat,zebra\n"},
        ["--prompts", "p.csv", "--classes", "cat"],
        "'zebra'",
    ),
    "nothing to see": ({"p.txt": "a zebra"}, ["--prompts", "p.txt"], "none of the classes"),
    "too long": ({"p.txt": "cat " * 2500}, ["--prompts", "p.txt"], "9,999 characters"),
    "no place for the class": ({}, ["--template", "a photograph"], "{}"),
    "class of punctuation": ({}, ["--template", "a {}", "--classes", "?!"], "Neither a token nor a word"),
    "no class": ({}, ["--template", "a {}", "--classes", " , "], "no classes"),
    "many classes": ({}, ["--template", "a {}", "--classes", ",".join(f"c{n}" for n in range(300))], "300 classes"),
    "no images": ({}, ["--template", "a {}", "--images-per-prompt", "0"], "images a prompt is 0"),
    "seed below 0": ({}, ["--template", "a {}", "--seed", "-1"], "seed is -1"),
    "batch": ({}, ["--template", "a {}", "--batch-size", "0"], "batch size is 0"),
    "share": ({}, ["--template", "a {}", "--clip-drop", "30"], "clip drop is 30"),
    "tau": ({}, ["--template", "a {}", "--tau", "nan"], "tau is nan"),
    "format": ({}, ["--template", "a {}", "--format", "tfrecord"], "invalid choice"),
    "workers": ({}, ["--template", "a {}", "--workers", "-1"], "workers is -1"),
    "clip": ({}, ["--template", "a {}", "--clip", "no/such-model"], "CLIP model"),
    "tokens": ({}, ["--template", "a {}", "--tokens", "nowhere"], "no tokens"),
    "neither": ({}, [], "required"),
    "both": ({}, ["--prompts", "p.txt", "--template", "a {}"], "not allowed"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_status_2(case, model, tmp_path, capsys, monkeypatch):
    files, options, part = BAD[case]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name, content in files.items():
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    try:
        status = main(
            [
                "export",
                *options,
                "--out",
                "out",
                "--model",
                str(model),
                "--device",
                "cpu",
                "--size",
                "64x64",
                "--steps",
                "1",
            ]
        )
    except SystemExit as left:
        status = left.code
    said = capsys.readouterr().err.strip()
    assert status == 2, said
    assert_refused(said, part)
    assert not Path("out").exists()


def test_defaults_of_the_model():
    settings = ExportSettings.for_model(OVAM(PIPE), steps=None, crf=False)
    assert (settings.steps, settings.width, settings.batch_size, settings.crf) == (30, 128, 1, False)
    assert settings.threads == cores()
