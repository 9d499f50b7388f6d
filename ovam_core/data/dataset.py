"""An exported data set: an image's files from its heatmaps and masks, and the whole from what is done; see
layout.py.
"""

from __future__ import annotations

import io
import unicodedata
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ovam_core import plot
from ovam_core.attention.mask import densecrf, label_map
from ovam_core.data.filters import judged
from ovam_core.data.formats import coco_instances, contact_sheet, write_parquet
from ovam_core.data.layout import (
    ABOUT,
    ANNOTATIONS,
    CARD,
    CARD_TEXT,
    CLASSES,
    HEATMAPS,
    IMAGES,
    ITEMS,
    JPEG_QUALITY,
    LABEL_MAPS,
    METADATA,
    SETS,
    SETTINGS,
    SHEET,
    SKIPPED,
)
from ovam_core.data.prompts import Item, Work
from ovam_core.data.runs import _json, check_folder, clear_parts, digest_of_file, disk_sentence, read_done, write_done
from ovam_core.errors import InputError
from ovam_core.io.files import write_atomically
from ovam_core.io.masks import IGNORE
from ovam_core.io.names import hyphenated
from ovam_core.io.stored import Stored
from ovam_core.settings import Filters

# ------------------------------------------------------------------------------------------------ one image


@dataclass(frozen=True)
class Job:
    """What a worker needs to write one image. Plain arrays, so that it travels between processes.

    image: uint8 [H, W, 3]. scaled: float32 [L, H, W], A_alpha * D over its own maximum. masks: bool [L, H, W] of Eq. 9.
    taus: the threshold of each; ids: the label of each; L may be fewer than the image's classes (min_presence).
    uncertain: half-width of the band about tau that gets 255.
    heatmaps: float16 [L, h, w] to keep, or None. row: what the metadata says of the image so far.
    """

    folder: str
    item: Item
    ids: tuple[int, ...]
    image: np.ndarray
    scaled: np.ndarray
    masks: np.ndarray
    taus: tuple[float, ...]
    crf: bool
    uncertain: float
    heatmaps: np.ndarray | None
    row: dict[str, Any]


def stem(item: Item) -> str:
    """The name of an image's files without its ending: number and classes, ASCII letters, digits, - and _ only."""
    return f"{item.index:06d}_{'_'.join(map(slug, item.classes))}"[:80].rstrip("-_")


def slug(name: str) -> str:
    """ "potted plant" to "potted-plant"; "class" where no letter is left."""
    return hyphenated(unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()) or "class"


def labels_of(job: Job) -> np.ndarray:
    """The label map of a job, uint8 [H, W]: the class whose scaled map is largest among the masks there, 0 elsewhere;
    255 where the strongest class lies within `uncertain` of its threshold.
    """
    if len(job.masks) == 0:  # no class is in the image
        return np.zeros(job.image.shape[:2], np.uint8)
    masks = np.stack([densecrf(mask, job.image) for mask in job.masks]) if job.crf else job.masks
    labels = label_map(job.scaled, masks, job.ids)
    if job.uncertain > 0:
        margins = job.scaled - np.asarray(job.taus, dtype=np.float32)[:, None, None]
        # A class far above its threshold settles the pixel, whatever the others say.
        strongest = margins.max(axis=0)
        labels = np.where(np.abs(strongest) < job.uncertain, np.uint8(IGNORE), labels)
    return labels


def encode(job: Job) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The files of an image by path within the folder, and its finished row. The same job gives the same bytes."""
    name = stem(job.item)
    labels = labels_of(job)
    files = {
        f"{IMAGES}/{name}.jpg": _encoded(Image.fromarray(job.image), "JPEG", quality=JPEG_QUALITY, subsampling=0),
        f"{LABEL_MAPS}/{name}.png": _encoded(plot.label_image(labels), "PNG"),
    }
    if job.heatmaps is not None:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, maps=job.heatmaps, classes=np.array(job.item.classes, dtype=np.str_))
        files[f"{HEATMAPS}/{name}.npz"] = buffer.getvalue()
    coverages = [round(float((labels == label).mean()), 6) for label in job.row["class_ids"]]
    row = {
        "file_name": f"{IMAGES}/{name}.jpg",
        "mask_file_name": f"{LABEL_MAPS}/{name}.png",  # `datasets` loads columns of this ending as pictures
        **({} if job.heatmaps is None else {"heatmaps": f"{HEATMAPS}/{name}.npz"}),
        **job.row,
        "coverages": coverages,
        "coverage": round(float(((labels > 0) & (labels < IGNORE)).mean()), 6),
    }
    return files, row


def write_job(job: Job) -> dict[str, Any]:
    """Writes the files of an image, its row last; returns the row. Runs in a worker process. Raises OSError."""
    files, row = encode(job)
    write_done(Path(job.folder), job.item.index, files, row)
    return row


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def prepare(folder: Path, settings: dict[str, Any]) -> None:
    """Writes the settings, makes the folders, clears what a killed run left half written. One process does this.

    Raises InputError where that is not possible.
    """
    check_folder(folder, settings)
    try:
        (folder / ITEMS).mkdir(parents=True, exist_ok=True)
        clear_parts(folder)
        # Before the other folders, so that they are known for this export's.
        write_atomically(folder / SETTINGS, _json(settings, indent=1))
        for name in (IMAGES, LABEL_MAPS, SETS, *([HEATMAPS] if settings["heatmaps"] else [])):
            (folder / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(disk_sentence(error, folder)) from None


# ------------------------------------------------------------------------------------------------ the whole


def finished(folder: Path, work: Work, filters: Filters) -> Stored[dict[str, Any]]:
    """The rows of all images that are done, in the order of their index, `kept` and `reason` included."""
    there = Stored(row for item in work.items if (row := read_done(folder, item)) is not None)
    return Stored(judged(there, filters))


def assemble(folder: Path, settings: dict[str, Any], work: Work) -> Stored[dict[str, Any]]:
    """Puts the data set together from all images that are done; returns their rows, `kept` and `reason` included.

    However many they are, one row at a time is in memory, and for Parquet those of a shard. The same images give the
    same bytes, by whatever way they came. Raises OSError.
    """
    rows = finished(folder, work, Filters(**settings["filters"]))
    kept = rows.chosen(array("Q", (number for number, row in enumerate(rows) if row["kept"])))
    clear_parts(folder)

    names = ("background", *work.classes)
    write_atomically(folder / CLASSES, "".join(f"{name}\n" for name in names).encode())
    write_atomically(folder / SETS / "train.txt", (f"{Path(row['file_name']).stem}\n".encode() for row in kept))
    if work.skipped:
        write_atomically(folder / SKIPPED, (_json(vars(one)) for one in work.skipped))
    if "coco" in settings["format"]:
        (folder / ANNOTATIONS).mkdir(exist_ok=True)
        write_atomically(folder / ANNOTATIONS / "instances_train.json", coco_instances(folder, kept, work.classes))
    if "parquet" in settings["format"]:
        write_parquet(folder, kept)
    write_atomically(folder / SHEET, _encoded(contact_sheet(folder, kept or rows), "PNG"))  # all dropped: show those
    about = {"images": len(rows), "kept": len(kept), "skipped_prompts": len(work.skipped), "settings": settings}
    write_atomically(folder / ABOUT, _json(about, indent=1))
    write_atomically(folder / METADATA, map(_json, rows))
    digest = digest_of_file(folder / METADATA)
    card = CARD_TEXT.format(model=settings["model"], images=len(rows), kept=len(kept), digest=digest)
    write_atomically(folder / CARD, card.encode())
    return rows
