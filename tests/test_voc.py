"""`evaluate` on a VOC-shaped set of rendered scenes: against numpy, stopped and gone on, by several processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import make_pipe
from reference import assert_refused, found_by

from ovam_core import OVAM, Picture, methods, record
from ovam_core.attention.heatmap import attribute
from ovam_core.attention.mask import label_map, make_masks
from ovam_core.cli import main
from ovam_core.data import evaluate as voc
from ovam_core.data import runs
from ovam_core.data.evaluate import (
    EvaluateSettings,
    evaluate_dataset,
    found_labels,
    make_job,
    method_queries,
    timesteps_of,
)
from ovam_core.data.metrics import confusion_matrix, iou, matrix_counts
from ovam_core.data.runs import Process
from ovam_core.data.voc import VOC_CLASSES
from ovam_core.data.voc_folder import read_truth, read_voc
from ovam_core.errors import InputError
from ovam_core.hooks.goca_recorder import record_goca
from ovam_core.hooks.photograph import denoise, prepare, record_image
from ovam_core.methods import ATTN2MASK, DAAM, GOCA, OVAM_WEIGHTED
from ovam_core.models.load import load_pipeline
from ovam_core.plot import label_image
from ovam_core.query import attribute_words, caption_of
from ovam_core.settings import PhotoSettings
from ovam_core.tokens import Token
from training import world
from training.nouns import VOC_NOUNS

ROOT = Path(__file__).parent.parent
TESTS = Path(__file__).parent
SHAPES = {"first": (64, 64), "second": (48, 64), "third": (64, 40), "fourth": (40, 56)}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    make_pipe().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def pipe(model):
    """Read from the folder, as the command reads it: weights that lie elsewhere in memory differ in a last bit."""
    made = load_pipeline(model, "cpu")
    made.ovam_name = "tiny"
    return made


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Four held-out scenes, cut to different shapes; a frame of ignored pixels in the second, nothing in the fourth."""
    folder = tmp_path_factory.mktemp("voc")
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / name).mkdir(parents=True)
    for number, (name, (height, width)) in enumerate(SHAPES.items()):
        made = world.scene(world.HELD_OUT + number, 64, VOC_NOUNS, (0.0, 1.0))
        labels = made.labels[:height, :width].copy()
        if name == "second":
            labels[:3] = 255
        if name == "fourth":
            labels[:] = 0
        Image.fromarray(made.image[:height, :width]).save(folder / "JPEGImages" / f"{name}.jpg", quality=95)
        label_image(labels).save(folder / "SegmentationClass" / f"{name}.png")
    (folder / "ImageSets/Segmentation/val.txt").write_text("".join(f"{name}\n" for name in SHAPES))
    return folder


@pytest.fixture(scope="module")
def data(root):
    return read_voc(root)


@pytest.fixture(scope="module")
def settings(pipe) -> EvaluateSettings:
    return EvaluateSettings.for_model(OVAM(pipe), "daam", timesteps=(50, 100), seed=7, threads=1)


@pytest.fixture(scope="module")
def result(pipe, data, settings, tmp_path_factory):
    """The undisturbed run."""
    out = tmp_path_factory.mktemp("run") / "out"
    seen = []
    found = evaluate_dataset(OVAM(pipe), data, settings, out, workers=0, on_image=lambda *x: seen.append(x))
    assert seen == [(n, 4) for n in (1, 2, 3, 4)]
    return out, found


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------------ counting


def plain_matrix(predicted, truth, labels) -> np.ndarray:
    matrix = np.zeros((labels, labels), int)
    for row in range(labels):
        for column in range(labels):
            matrix[row, column] = ((truth == row) & (predicted == column)).sum()
    return matrix


def test_confusion_matrix():
    rng = np.random.default_rng(0)
    truth, predicted = rng.integers(0, 4, (9, 11), np.uint8), rng.integers(0, 4, (9, 11), np.uint8)
    truth[:2] = 255
    matrix = confusion_matrix(predicted, truth, 4)
    assert np.array_equal(matrix, plain_matrix(predicted, truth, 4))
    assert matrix.sum() == 7 * 11
    counts = matrix_counts(matrix)
    seen = truth != 255
    for label in range(4):
        ours, theirs = (predicted == label) & seen, truth == label
        assert counts[label].tolist() == [(ours & theirs).sum(), (ours & ~theirs).sum(), (~ours & theirs).sum()]
        assert iou(counts[label]) == (ours & theirs).sum() / (ours | theirs).sum()
    with pytest.raises(InputError, match="one size"):
        confusion_matrix(predicted, truth[1:], 4)
    with pytest.raises(InputError, match="label 3"):
        confusion_matrix(predicted, truth, 3)
    assert confusion_matrix(predicted[:1], truth[:1], 4).sum() == 0  # all ignored


# ------------------------------------------------------------------------------------------------ the data set


def test_what_is_asked_for(root, data):
    assert data.names == tuple(SHAPES)
    assert data.labels == ("background", *VOC_CLASSES)
    for name, item in zip(data.names, data.work.items, strict=True):
        ids = sorted(set(np.unique(np.asarray(Image.open(root / "SegmentationClass" / f"{name}.png")))) - {0, 255})
        assert data.work.ids(item.classes) == ids
        assert item.prompt == caption_of(item.classes)
    assert data.work.items[3].classes == ()
    assert data.work.items[3].prompt == "A photograph"
    assert read_voc(root, limit=2).names == ("first", "second")


def test_classes_from_a_file(root, tmp_path):
    file = tmp_path / "prompts.json"
    rows = {
        "first": "two kittens on a couch",
        "second": ["tv-monitor", "bus"],
        "third": {"caption": "x", "classes": ["cat"]},
        "fourth": {"classes": []},
    }
    file.write_text(json.dumps(rows))
    items = read_voc(root, classes_from=file).work.items
    assert [item.classes for item in items] == [("cat", "sofa"), ("bus", "tv"), ("cat",), ()]
    assert [item.prompt for item in items] == [
        "two kittens on a couch",
        "A photograph of a bus and a tv",
        "x",
        "A photograph",
    ]
    for wrong, part in (
        ({}, "say nothing of the image 'first'"),
        ([], "JSON object"),
        (rows | {"third": ["zebra"]}, "'zebra' of 'third'"),
        (rows | {"third": 3}, "'third' is neither"),
        (rows | {"third": {"caption": 3}}, "neither"),
    ):
        file.write_text(json.dumps(wrong))
        with pytest.raises(InputError, match=part):
            read_voc(root, classes_from=file)


def test_classes_of_the_data_set(root, tmp_path):
    shutil.copytree(root, tmp_path / "own")
    (tmp_path / "own/classes.txt").write_text("background\n" + "".join(f"thing {n}\n" for n in range(1, 21)))
    assert read_voc(tmp_path / "own").labels[1:3] == ("thing 1", "thing 2")
    (tmp_path / "own/classes.txt").write_text("background\ncat\n")
    with pytest.raises(InputError, match="there are 1 classes"):
        read_voc(tmp_path / "own")
    (tmp_path / "own/classes.txt").write_text("cat\n")
    with pytest.raises(InputError, match="must be background"):
        read_voc(tmp_path / "own")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "no image"),
        ("nothing\n", "is missing"),
        ("../first\n", "not the name"),
        ("first\nfirst\n", "twice"),
        (".ovam\n", "not the name"),
    ],
)
def test_lists_that_are_refused(root, tmp_path, text, part):
    shutil.copytree(root, tmp_path / "own")
    (tmp_path / "own/ImageSets/Segmentation/val.txt").write_text(text)
    with pytest.raises(InputError, match=part):
        read_voc(tmp_path / "own")


def test_label_maps_that_are_refused(tmp_path):
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "rgb.png")
    (tmp_path / "text.png").write_text("x")
    for name, part in (("rgb.png", "mode RGB"), ("text.png", "cannot|can be read"), ("none.png", "can be read")):
        with pytest.raises(InputError, match=part):
            read_truth(tmp_path / name, 20)


# ------------------------------------------------------------------------------------------------ the answer


def test_the_result_is_what_one_would_write_down(pipe, root, data, settings, result):
    """Recorded, asked and cut with the public functions; counted by comparing label maps in loops."""
    out, found = result
    matrix = np.zeros((21, 21), int)
    for number, name in enumerate(SHAPES):
        image = Image.open(root / "JPEGImages" / f"{name}.jpg")
        truth = np.asarray(Image.open(root / "SegmentationClass" / f"{name}.png"))
        ids = sorted(set(np.unique(truth).tolist()) - {0, 255})
        labels = np.zeros(truth.shape, np.uint8)
        if ids:
            words = [VOC_CLASSES[label - 1] for label in ids]
            recording = record_image(pipe, image, caption_of(words), (50, 100), seed=7 + number)
            maps = attribute(recording, attribute_words(pipe, words))
            masks = make_masks(recording, maps, image, tau=0.4, alpha=1, crf=False)
            scores = torch.nn.functional.interpolate(maps[None], size=truth.shape, mode="bilinear")[0].numpy()
            labels = label_map(scores, masks, ids)
        assert np.array_equal(np.asarray(Image.open(out / "SegmentationClass" / f"{name}.png")), labels)
        matrix += plain_matrix(labels, truth, 21)
    assert np.array_equal(found.matrix, matrix)
    union = matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
    values = matrix.diagonal()[union > 0] / union[union > 0]
    assert found.miou == pytest.approx(values.mean())
    assert found.miou_objects == pytest.approx(values[1:].mean())
    assert [value for value in found.iou.values() if value is not None] == pytest.approx(values)
    about = json.loads((out / "results.json").read_text())
    assert about["confusion"] == matrix.tolist()
    assert about["miou"] == found.miou
    assert about["iou"]["background"] == values[0]
    assert about["settings"]["method"] == "DAAM"
    assert about["settings"]["timesteps"] == [50, 100]
    assert f"mIoU {100 * values.mean():.1f} %" in (out / "results.md").read_text()
    assert (out / "results.md").read_text().count("\n|") == len(values) + 1


def test_methods_are_looked_up_by_name(pipe, data):
    assert [EvaluateSettings.for_model(OVAM(pipe), name).method for name in ("OVAM", "ovam")] == ["OVAM", "OVAM"]
    assert EvaluateSettings.for_model(OVAM(pipe), "ovam").timesteps == (100,)
    assert timesteps_of(ATTN2MASK, 1000) == (500,)
    assert EvaluateSettings.for_model(OVAM(pipe), "attn2mask").timesteps == (500,)
    with pytest.raises(InputError, match="choose among DAAM; Attn2Mask; OVAM"):
        EvaluateSettings.for_model(OVAM(pipe), "dino")
    for method in (DAAM, ATTN2MASK, methods.OVAM):
        asked = method_queries(OVAM(pipe), data.work, EvaluateSettings.for_model(OVAM(pipe), method.name))
        assert {(one.tau, one.alpha) for one in asked.values()} == {(method.tau, method.alpha)}
    asked = method_queries(OVAM(pipe), data.work, EvaluateSettings.for_model(OVAM(pipe), "ovam", tau=0.7))
    assert {(one.tau, one.alpha) for one in asked.values()} == {(0.7, 0.85)}


def test_dense_crf_follows_where_the_method_has_one(pipe, root, data):
    settings = EvaluateSettings.for_model(OVAM(pipe), "ovam", threads=1)
    asked, item = method_queries(OVAM(pipe), data.work, settings), data.work.items[1]
    job = make_job(OVAM(pipe), data, item, asked, settings, Path("x"))
    image = Image.open(root / "JPEGImages/second.jpg")
    recording = record_image(pipe, image, item.prompt, (100,), seed=1)  # the second image has the noise of seed + 1
    maps = attribute(recording, attribute_words(pipe, item.classes))
    masks = make_masks(recording, maps, image, tau=0.4, alpha=0.85, crf=True)
    found = found_labels(job)
    assert job.crf
    assert np.array_equal(found > 0, masks.any(0))
    assert not make_job(OVAM(pipe), data, item, asked, replace(settings, crf=False), Path("x")).crf


@pytest.mark.parametrize("method", [GOCA, OVAM_WEIGHTED])
def test_methods_of_one_pass(pipe, data, method):
    """GoCA's recorder listens to the same pass; the masks are those of the method itself."""
    settings = EvaluateSettings.for_model(OVAM(pipe), method.name, threads=1, timesteps=(150,))
    item = data.work.items[0]
    job = make_job(OVAM(pipe), data, item, method_queries(OVAM(pipe), data.work, settings), settings, Path("x"))
    image = Image.open(data.photo(item))
    with record(pipe, branch="all") as plain, record_goca(pipe, branch="all") as weighted:
        denoise(pipe, prepare(pipe, [image], [item.prompt], (150,)))
    picture = Picture(image, plain.recordings[0], PhotoSettings(item.prompt), weighted.recordings[0])
    expected = found_by(method, pipe, picture, item.classes)
    assert np.array_equal(found_labels(job) > 0, expected.masks.any(0))
    assert job.crf == method.crf
    assert np.array_equal(found_labels(replace(job, crf=False)) > 0, job.masks.any(0))
    if method is GOCA:
        assert np.array_equal(job.masks, expected.masks)
        assert job.masks.sum(0).max() == 1
    with pytest.raises(InputError, match="one timestep"):
        evaluate_dataset(OVAM(pipe), data, replace(settings, timesteps=(100, 200)))


def test_methods_and_settings_that_do_not_go_together(pipe, data):
    for name, given, part in (
        ("goca", {"alpha": 0.5}, "neither alpha"),
        ("goca", {"crf": True}, "dense CRF"),
        ("goca", {"template": "a {}"}, "no template"),
        ("ovam + token", {}, "tokens alone"),
    ):
        with pytest.raises(InputError, match=part):
            evaluate_dataset(
                OVAM(pipe), data, EvaluateSettings.for_model(OVAM(pipe), name, threads=1, **given), workers=0
            )


def test_tokens_of_either_half(pipe, data, tmp_path):
    rows = attribute_words(pipe, ["the cat"])[0].embedding[:2].float()
    first, second = data.work.items[0].classes
    for name, branch in ((first, "unconditional"), (second, "conditional")):
        Token(rows, ("background", name), "tiny", branch, tau=0.1).save(tmp_path / f"{branch}.safetensors")
    settings = EvaluateSettings.for_model(OVAM(pipe), "daam", tokens=str(tmp_path), threads=1)
    asked = method_queries(OVAM(pipe), data.work, settings)
    assert {asked[name].kind for name in (first, second)} == {"token"}
    assert asked[first].tau == DAAM.token_tau
    job = make_job(OVAM(pipe), data, data.work.items[0], asked, settings, tmp_path)
    image = Image.open(data.photo(data.work.items[0]))
    for row, (name, caption) in enumerate(((first, ""), (second, data.work.items[0].prompt))):
        recording = record_image(pipe, image, caption, (100,), seed=0)
        mask = make_masks(recording, attribute(recording, asked[name].attribution), image, tau=0.8, alpha=1, crf=False)
        assert np.array_equal(job.masks[row], mask[0])


# ------------------------------------------------------------------------------------------ stopped and shared


def test_a_run_that_is_done_does_nothing(pipe, data, settings, result):
    out, found = result
    before = tree(out)
    seen = []
    again = evaluate_dataset(OVAM(pipe), data, settings, out, workers=0, on_image=lambda *x: seen.append(x))
    assert not seen
    assert np.array_equal(again.matrix, found.matrix)
    assert tree(out) == before


def test_stopped_and_gone_on(pipe, data, settings, result, tmp_path):
    out = tmp_path / "out"

    def interrupt(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate_dataset(OVAM(pipe), data, settings, out, workers=0, on_image=interrupt)
    assert len(list((out / ".ovam/items").iterdir())) == 2
    assert not (out / "results.json").exists()
    seen = []
    evaluate_dataset(OVAM(pipe), data, settings, out, workers=0, on_image=lambda *x: seen.append(x))
    assert seen == [(3, 4), (4, 4)]
    assert tree(out) == tree(result[0])


def test_what_went_missing_is_done_again(pipe, data, settings, result, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(result[0], out)
    (out / "SegmentationClass/second.png").unlink()
    (out / ".ovam/items/000002.json").write_text("{")
    evaluate_dataset(OVAM(pipe), data, settings, out, workers=0)
    assert tree(out) == tree(result[0])


def test_shares_of_several_processes(pipe, data, settings, result, tmp_path):
    out = tmp_path / "out"
    voc._begin(out, voc.fingerprint(OVAM(pipe), data, settings, method_queries(OVAM(pipe), data.work, settings)))
    for rank in (2, 1, 0):
        found = evaluate_dataset(OVAM(pipe), data, settings, out, process=Process(rank, 3), workers=0)
        assert (found is None) == (rank > 0)
    assert tree(out) == tree(result[0])
    with pytest.raises(InputError, match="add --out"):
        evaluate_dataset(OVAM(pipe), data, settings, process=Process(0, 2))


def test_without_a_folder(pipe, data, settings, result):
    assert np.array_equal(evaluate_dataset(OVAM(pipe), data, settings, workers=0).matrix, result[1].matrix)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"tau": 0.7}, "tau"),
        ({"method": "OVAM"}, "method"),
        ({"timesteps": (100,)}, "timesteps"),
        ({"seed": 8}, "seed"),
        ({"crf": True}, "crf"),
    ],
)
def test_other_settings_are_refused(pipe, data, settings, result, change, name):
    before = tree(result[0])
    with pytest.raises(InputError, match=f"holds an evaluation with another setting of '{name}'"):
        evaluate_dataset(OVAM(pipe), data, replace(settings, **change), result[0], workers=0)
    assert tree(result[0]) == before


def test_other_data_and_folders_are_refused(pipe, root, data, settings, result, tmp_path):
    with pytest.raises(InputError, match="'data'"):
        evaluate_dataset(
            OVAM(pipe), replace(data, names=("second", "first", *data.names[2:])), settings, result[0], workers=0
        )
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(InputError, match="holds no evaluation"):
        evaluate_dataset(OVAM(pipe), data, settings, tmp_path, workers=0)
    with runs.locked(tmp_path / "out", "evaluation"), pytest.raises(InputError, match="Another evaluation"):
        evaluate_dataset(OVAM(pipe), data, settings, tmp_path / "out", workers=0)


def test_a_truth_of_another_size(pipe, root, settings, tmp_path):
    shutil.copytree(root, tmp_path / "own")
    label_image(np.zeros((64, 63), np.uint8)).save(tmp_path / "own/SegmentationClass/first.png")
    with pytest.raises(InputError, match="'first' is 63x64 and its image 64x64"):
        evaluate_dataset(OVAM(pipe), read_voc(tmp_path / "own"), settings, workers=0)


# ------------------------------------------------------------------------------------------ the command line


def command(root, model, out) -> list[str]:
    return [
        "evaluate",
        "--voc",
        str(root),
        "--method",
        "daam",
        "--timesteps",
        "50,100",
        "--seed",
        "7",
        "--threads",
        "1",
        "--model",
        model,
        "--device",
        "cpu",
        "--workers",
        "0",
        "--out",
        str(out),
    ]


def same_answers(one: Path, other: Path) -> bool:
    """The label maps, and the numbers; the settings name the model's folder."""
    first, second = (json.loads((path / "results.json").read_text()) for path in (one, other))
    first["settings"].pop("model"), second["settings"].pop("model")
    labels = {name: data for name, data in tree(one).items() if name.startswith("SegmentationClass")}
    return first == second and all(tree(other)[name] == data for name, data in labels.items())


@pytest.mark.slow
def test_the_command_killed_and_started_again(root, model, result, tmp_path, capsys):
    """A real kill, in a process of its own, while the third image is written."""
    out = tmp_path / "out"
    code = (
        "import os, signal, sys\n"
        "from ovam_core.cli import main\n"
        "from ovam_core.data import runs\n"
        "write = runs.write_atomically\n"
        "def killed(path, data):\n"
        "    if path.name == '000002.json': os.kill(os.getpid(), signal.SIGKILL)\n"
        "    write(path, data)\n"
        "runs.write_atomically = killed\n"
        "main(sys.argv[1:])\n"
    )
    asked = command(root, model, out)
    ran = subprocess.run(
        [sys.executable, "-c", code, *asked], cwd=ROOT, capture_output=True, text=True, check=False, timeout=400
    )
    assert ran.returncode == -9, ran.stderr[-2000:]
    assert len(list((out / ".ovam/items").iterdir())) == 2
    assert (out / "SegmentationClass/third.png").exists()
    assert main(asked) == 0
    said = capsys.readouterr().out
    assert "| background |" in said
    assert f"mIoU {100 * result[1].miou:.1f} %" in said
    assert "results.json" in said
    assert same_answers(out, result[0])
    assert not list(out.rglob("*.part"))


@pytest.mark.slow
def test_accelerate_with_two_processes(root, model, result, tmp_path):
    """The real launcher and a worker process each; --multi_gpu starts two processes, which find no GPU."""
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
    asked = command(root, model, tmp_path / "two")
    asked[asked.index("--workers") + 1] = "1"
    ran = subprocess.run(
        [*launch, *asked],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.count("mIoU ") == 1
    assert same_answers(tmp_path / "two", result[0])


BAD = {
    "no folder": (["--voc", "nowhere"], "data set in VOC layout"),
    "no split": (["--split", "test"], "no list of images"),
    "split elsewhere": (["--split", "../val"], "not the name of a split"),
    "method": (["--method", "dino"], "no method 'dino'"),
    "prompts": (["--classes-from", "none.json"], "no file 'none.json'"),
    "limit": (["--limit", "0"], "limit is 0"),
    "tau": (["--tau", "nan"], "tau is nan"),
    "timesteps": (["--timesteps", "5000"], "within 0 to 999"),
    "size": (["--size", "33x32"], "not a multiple"),
    "seed": (["--seed", "-1"], "seed is -1"),
    "workers": (["--workers", "-1"], "workers is -1"),
    "threads": (["--threads", "0"], "threads is 0"),
    "tokens": (["--tokens", "nowhere"], "no tokens"),
    "template": (["--template", "cat"], "must contain {}"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_status_2(case, root, model, tmp_path, capsys, monkeypatch):
    options, part = BAD[case]
    monkeypatch.chdir(tmp_path)
    assert main([*command(root, model, "out"), *options]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "image/s]" not in line and line.strip()]
    assert_refused("\n".join(lines), part)
    assert not Path("out").exists()
