"""Which images of an export are kept: coverage of the masks and CLIP similarity, as in section 4.3 of the paper.

The decisions are pure functions of the rows of all images: made once, at the end, the same however many processes made
the images. Only `ClipScorer` needs a model.
"""

from __future__ import annotations

import math
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from ovam_core.errors import InputError
from ovam_core.settings import Filters

CLIP_TEMPLATE = "A photograph of a {}"


@dataclass(frozen=True)
class Reason:
    """Why an image is dropped. kind: for tables. text: for the metadata."""

    kind: Literal["small", "large", "clip"]
    text: str


def reasons(rows: Sequence[dict[str, Any]], filters: Filters) -> list[list[Reason]]:
    """Why each row is dropped, as of `each_reasons`."""
    return list(each_reasons(rows, filters))


def each_reasons(rows: Iterable[dict[str, Any]], filters: Filters) -> Iterator[list[Reason]]:
    """Why each row is dropped, row by row; an empty list for one that is kept. rows are gone through twice.

    rows: with `classes`, `coverage` (share of labelled pixels of the image, 0 to 1) and `clip_scores` (one a class, or
    None where there was no CLIP). An image of several classes is judged by the coverage of them all together, and
    dropped if it is among the lowest `clip_drop` of any of its classes.
    """
    lowest_of = lowest_of_classes(rows, filters.clip_drop)
    for number, row in enumerate(rows):
        of_row = []
        if row["coverage"] < filters.min_coverage:
            of_row.append(Reason("small", f"coverage under {filters.min_coverage:.3g}"))
        if row["coverage"] > filters.max_coverage:
            of_row.append(Reason("large", f"coverage over {filters.max_coverage:.3g}"))
        share = f"{filters.clip_drop:.3g}"
        lowest = lowest_of.get(number, ())
        of_row += [Reason("clip", f"CLIP similarity in the lowest {share} of {name}") for name in lowest]
        yield of_row


def judge(rows: Sequence[dict[str, Any]], filters: Filters) -> list[dict[str, Any]]:
    """The rows as of `judged`."""
    return list(judged(rows, filters))


def judged(rows: Iterable[dict[str, Any]], filters: Filters) -> Iterator[dict[str, Any]]:
    """The rows with `kept` (bool) and `reason` (text, "" for kept) set, in the same order; see `each_reasons`."""
    for row, why in zip(rows, each_reasons(rows, filters), strict=True):
        yield {**row, "kept": not why, "reason": "; ".join(reason.text for reason in why)}


def lowest_of_classes(rows: Iterable[dict[str, Any]], share: float) -> dict[int, list[str]]:
    """By the number of a row the classes of which it is among the lowest `share` by CLIP score; of equals the later one
    goes.
    """
    scores: dict[str, array[float]] = defaultdict(lambda: array("d"))
    numbers: dict[str, array[int]] = defaultdict(lambda: array("q"))
    for number, row in enumerate(rows):
        for name, score in zip(row["classes"], row["clip_scores"] or (), strict=False):
            scores[name].append(score)
            numbers[name].append(number)
    lowest: dict[int, list[str]] = defaultdict(list)
    for name, own in scores.items():
        later_first = np.lexsort((-np.asarray(numbers[name]), np.asarray(own)))
        # 0.3 * 10 is a hair under 3 in binary.
        for place in later_first[: math.floor(share * len(own) + 1e-9)]:
            lowest[numbers[name][place]].append(name)
    return lowest


class ClipScorer:
    """Cosine similarity of images to "A photograph of a <classname>" under a CLIP model of transformers.

    name: hub id, such as "openai/clip-vit-base-patch32", or a folder. Raises InputError where it cannot be loaded.
    """

    def __init__(self, name: str, device: str | torch.device = "cpu"):
        from transformers import CLIPModel, CLIPProcessor

        try:
            self._model = CLIPModel.from_pretrained(name).to(device).eval()  # type: ignore[arg-type]  # a wrapped method
            self._processor = CLIPProcessor.from_pretrained(name)
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise InputError(
                f"The CLIP model '{name[:100]}' cannot be loaded; give a folder, connect to the hub, or leave "
                f"--clip out to go without that filter: {reason}"
            ) from None
        self.name = name

    @torch.no_grad()
    def scores(self, images: Sequence[Image.Image], classes: Sequence[Sequence[str]]) -> list[list[float]]:
        """For each image the similarity to each of its own classes, -1 to 1, rounded to six digits."""
        names = sorted({name for own in classes for name in own})
        texts = [CLIP_TEMPLATE.format(name) for name in names]
        limit = self._model.config.text_config.max_position_embeddings
        inputs = self._processor(
            text=texts, images=list(images), return_tensors="pt", padding=True, truncation=True, max_length=limit
        )
        found = self._model(**inputs.to(self._model.device))
        cosine = (found.image_embeds.float() @ found.text_embeds.float().T).cpu()
        return [[round(float(cosine[row, names.index(name)]), 6) for name in own] for row, own in enumerate(classes)]
