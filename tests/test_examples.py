"""What docs/datasets.md prints, and the example that trains a segmenter, on an export of a few pictures."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ovam_core.cli import main as ovam
from ovam_core.data.metrics import confusion_matrix, iou, matrix_counts

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "datasets.md").read_text(encoding="utf-8")
HERE = {"datasets", "pycocotools", "pathlib", "transformers"}  # what a block begins with that is run here


def load_example():
    spec = importlib.util.spec_from_file_location("train_segmenter", ROOT / "examples" / "train_segmenter.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """A cache of `datasets` of its own: what another run left behind is not read."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def example():
    return load_example()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, example):
    """The folder in which the page's commands were run, with fewer denoising steps and one epoch."""
    folder = tmp_path_factory.mktemp("page")
    commands = re.findall(r"^(?:ovam|python examples/train_segmenter.py) (.*)$", PAGE, re.MULTILINE)
    assert [command.split()[0] for command in commands] == ["export", "dataset"]
    export, train = (re.findall(r'"[^"]*"|\S+', command) for command in commands)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("OVAM_MODEL", "emoji-voc")
        more = ["--steps", "2", "--threads", "1", "--workers", "0", "--device", "cpu"]
        assert ovam([word.strip('"') for word in export] + more) == 0
        example.main([*train, "--epochs", "1", "--size", "64"])
    return folder


def blocks() -> list:
    pairs = re.findall(r"^```python\n(.*?)^```\n+```text\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    own = [(code, printed) for code, printed in pairs if re.match(r"from (\w+)", code)]
    found = [(code, said) for code, said in own if re.match(r"from (\w+)", code)[1] in HERE]
    assert len(found) == 5
    return [pytest.param(*pair, id=str(number)) for number, pair in enumerate(found)]


@pytest.mark.slow
@pytest.mark.parametrize(("code", "printed"), blocks())
def test_a_block_prints_what_the_page_says(code, printed, folder, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(folder)
    exec(compile(code, "block", "exec"), {"__name__": "block"})
    assert capsys.readouterr().out.splitlines()[-len(printed.splitlines()) :] == printed.splitlines()


@pytest.mark.slow
def test_the_trained_model_is_the_pipelines(folder, example):
    """Its labels are the export's, and its label map is that of the network's own scores."""
    from transformers import AutoModelForSemanticSegmentation, pipeline

    picture = Image.open(folder / "dataset" / "JPEGImages" / "000000_cat.jpg")
    segments = pipeline("image-segmentation", model=str(folder / "segmenter"))(picture)
    network = AutoModelForSemanticSegmentation.from_pretrained(folder / "segmenter").eval()
    assert [network.config.id2label[label] for label in range(4)] == ["background", "cat", "bus", "tv"]
    small = np.asarray(picture.resize((64, 64), Image.BILINEAR), np.float32) / 255
    mean, deviation = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)
    pixels = torch.from_numpy((small - mean) / deviation).movedim(-1, 0)[None]
    with torch.no_grad():
        labels = example.labels_of(network(pixels).logits, torch.zeros(1, 128, 128))[0].numpy()
    for segment in segments:
        own = labels == network.config.label2id[segment["label"]]
        assert ((np.asarray(segment["mask"]) > 0) == own).mean() > 0.99
    assert len(segments) == len(np.unique(labels))


def test_its_miou_is_the_packages_own(example):
    random = np.random.default_rng(0)
    predicted, truth = random.integers(0, 4, (2, 3, 8, 8), dtype=np.uint8)
    truth[:, :2] = 255
    from transformers import EvalPrediction

    matrix = example.confusion(EvalPrediction(predicted, truth.astype(np.int64)), 4)
    own = sum(confusion_matrix(*pair, 4) for pair in zip(predicted, truth, strict=True))
    np.testing.assert_array_equal(matrix, own)
    assert example.miou(matrix) == pytest.approx(iou(matrix_counts(own)).mean())


def test_a_mirrored_mask_stays_with_its_picture(example, monkeypatch):
    from transformers import SegformerImageProcessor

    labels = np.zeros((32, 32), np.uint8)
    labels[:, :8], labels[:8] = 1, 255
    mask = Image.fromarray(labels)
    mask.putpalette([0, 0, 0, 255, 255, 255] * 128)  # as the export's
    image = Image.fromarray(np.where(labels[..., None] == 1, 255, 0).astype(np.uint8).repeat(3, -1))
    processor = SegformerImageProcessor(size={"height": 32, "width": 32})
    monkeypatch.setattr(np.random, "rand", lambda: 0.0)
    for augment in (False, True):
        rows = example.prepare(processor, augment)({"image": [image], "mask": [mask]})
        seen = rows["labels"][0].numpy()
        np.testing.assert_array_equal(seen, labels[:, ::-1] if augment else labels)
        bright = rows["pixel_values"][0, 0].numpy() > 0
        np.testing.assert_array_equal(bright[8:], seen[8:] == 1)
