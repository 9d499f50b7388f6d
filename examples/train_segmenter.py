"""Train a segmenter on an exported data set.

    ovam export --template "A photograph of a {}" --classes voc --images-per-prompt 50 --out dataset
    python examples/train_segmenter.py dataset --out segmenter
    python examples/train_segmenter.py dataset --out segmenter --pretrained nvidia/mit-b0    # from the hub

The pictures that the export's filters kept are cut into a training and a test part; mIoU of the test part is logged
after each epoch. The folder that is written is an ordinary model of `transformers`:

    pipeline("image-segmentation", model="segmenter")("street.jpg")
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, load_dataset
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    EvalPrediction,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerImageProcessor,
    Trainer,
    TrainingArguments,
)

IGNORE = 255  # pixels that the export calls uncertain


def read_export(folder: Path, test_share: float, seed: int) -> tuple[Dataset, Dataset, list[str]]:
    """Training part, test part, and the name of each label, background first."""
    if not all((folder / name).is_file() for name in ("classes.txt", "metadata.jsonl")):
        raise SystemExit(f"There is no data set in {folder}: give the folder that `ovam export --out` wrote.")
    names = (folder / "classes.txt").read_text(encoding="utf-8").splitlines()
    # Read anew: the cache of `datasets` holds the paths of the pictures, and the folder may have been moved.
    pictures = load_dataset(str(folder), split="train", download_mode="reuse_cache_if_exists")
    pictures = pictures.filter(lambda kept: kept, input_columns="kept")
    if len(pictures) < 2:
        raise SystemExit(f"The filters kept {len(pictures)} pictures of {folder}; at least two are needed.")
    parts = pictures.train_test_split(test_share, seed=seed)
    return parts["train"], parts["test"], names


def make_model(names: list[str], pretrained: str | None, size: int):
    """(model, image processor): a small SegFormer with random weights, or a published one with a new head."""
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: label for label, name in enumerate(names)}}
    if pretrained:
        processor = AutoImageProcessor.from_pretrained(pretrained, size={"height": size, "width": size})
        processor.do_reduce_labels = False  # label 0 is the background, not nothing
        return AutoModelForSemanticSegmentation.from_pretrained(
            pretrained, ignore_mismatched_sizes=True, **labels
        ), processor
    config = SegformerConfig(
        hidden_sizes=[24, 48, 96, 192],
        depths=[1, 1, 2, 1],
        decoder_hidden_size=96,
        sr_ratios=[4, 2, 1, 1],
        initializer_range=0.15,  # the usual 0.02 is for wider networks: this one would hardly begin to learn
        **labels,
    )
    return SegformerForSemanticSegmentation(config), SegformerImageProcessor(size={"height": size, "width": size})


def prepare(processor, augment: bool):
    """Turns rows of the data set into tensors, as they are asked for; training pictures are mirrored now and then."""

    def transform(rows: dict) -> dict:
        images, masks = [image.convert("RGB") for image in rows["image"]], rows["mask"]
        for number in range(len(images)):
            if augment and np.random.rand() < 0.5:
                images[number] = images[number].transpose(Image.FLIP_LEFT_RIGHT)
                masks[number] = masks[number].transpose(Image.FLIP_LEFT_RIGHT)
        return dict(processor(images, segmentation_maps=masks, return_tensors="pt"))

    return transform


def confusion(prediction: EvalPrediction, classes: int) -> np.ndarray:
    """Pixels of each pair of labels [classes, classes]: rows are the truth."""
    predicted, truth = prediction.predictions, prediction.label_ids
    known = truth != IGNORE
    pairs = np.bincount(classes * truth[known].astype(int) + predicted[known], minlength=classes**2)
    return pairs.reshape(classes, classes)


def miou(matrix: np.ndarray) -> float:
    """Mean over the labels that occur, background among them, as VOC has it."""
    right = matrix.diagonal()
    union = matrix.sum(0) + matrix.sum(1) - right
    return float((right[union > 0] / union[union > 0]).mean())


def labels_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The predicted label map at the truth's size: kept in place of the logits, which are many times larger."""
    return torch.nn.functional.interpolate(logits, labels.shape[-2:], mode="bilinear").argmax(1).to(torch.uint8)


def main(arguments: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder that `ovam export` made")
    parser.add_argument("--out", type=Path, default=Path("segmenter"), help="folder for the trained model")
    parser.add_argument("--pretrained", help="begin from a model of the hub or a folder, such as nvidia/mit-b0")
    parser.add_argument("--epochs", type=float, default=50)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, help="learning rate (1e-3, with --pretrained 6e-5)")
    parser.add_argument("--size", type=int, default=128, help="pixels a side; SegFormers of the hub: 512")
    parser.add_argument("--test-share", type=float, default=0.2, help="part of the pictures that is not trained on")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if not 0 < options.test_share < 1:
        parser.error("--test-share is a part of the pictures: a number between 0 and 1.")

    torch.manual_seed(options.seed)
    training, test, names = read_export(options.data, options.test_share, options.seed)
    model, processor = make_model(names, options.pretrained, options.size)
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(options.out / "log"),
            num_train_epochs=options.epochs,
            per_device_train_batch_size=options.batch,
            per_device_eval_batch_size=options.batch,
            learning_rate=options.rate or (6e-5 if options.pretrained else 1e-3),
            warmup_steps=0.05,
            eval_strategy="epoch",
            logging_strategy="epoch",
            save_strategy="no",
            remove_unused_columns=False,  # the transform needs them
            dataloader_pin_memory=torch.cuda.is_available(),
            report_to="none",
            seed=options.seed,
        ),
        train_dataset=training.with_transform(prepare(processor, augment=True)),
        eval_dataset=test.with_transform(prepare(processor, augment=False)),
        compute_metrics=lambda seen: {"miou": miou(confusion(seen, len(names)))},
        preprocess_logits_for_metrics=labels_of,
    )
    trainer.train()
    trainer.save_model(options.out)
    processor.save_pretrained(options.out)
    score = trainer.evaluate()["eval_miou"]
    print(f"{len(training)} pictures trained on; mIoU of {len(test)} others: {score:.1%}. Written: {options.out}")
    return score


if __name__ == "__main__":
    main()
