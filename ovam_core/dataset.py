"""A data set on disk, made file by file: where things lie, how an image's files are written, how the whole is put together.

    JPEGImages/000012_cat.jpg                 the image
    SegmentationClass/000012_cat.png          its label map, VOC palette: 0 background, classes 1 to 254, 255 uncertain
    ImageSets/Segmentation/train.txt          the names that were kept
    classes.txt                               the name of each label, from 0
    metadata.jsonl                            one row an image, dropped ones too
    heatmaps/, annotations/, parquet/         on request
    README.md                                 a card, by which `datasets.load_dataset(folder)` finds the images
    contact_sheet.png, export.json            to look at
    .ovam/                                    the state: settings.json, a row an image in items/

An image is done when its row lies in `.ovam/items`, which is written last. All else follows from rows, images and label
maps by `assemble`, which can be run at any time and as often as one likes. Every file is written beside its place
and renamed, so at no instant does a name stand for half a file. Names hold numbers and classes, never prompts.
"""

from __future__ import annotations

import errno
import io
import json
import re
import unicodedata
import zipfile
from collections.abc import Iterable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

try:
    import fcntl
except ImportError:  # Windows: exports are not kept apart
    fcntl = None

from . import plot
from .files import beside, write
from .filters import Filters, judge
from .mask import densecrf, label_map
from .prompts import Item, Work

FORMAT = "ovam-export/1"
IMAGES, MASKS, SETS = "JPEGImages", "SegmentationClass", "ImageSets/Segmentation"
HEATMAPS, ANNOTATIONS, PARQUET = "heatmaps", "annotations", "parquet"
STATE, ITEMS = ".ovam", ".ovam/items"
SETTINGS, LOCK = ".ovam/settings.json", ".ovam/lock"
METADATA, CLASSES, SKIPPED, SHEET = "metadata.jsonl", "classes.txt", "skipped.jsonl", "contact_sheet.png"
ABOUT, CARD = "export.json", "README.md"
# Without this `datasets` would take train.txt for the whole train split, by its name.
CARD_TEXT = """---
configs:
- config_name: default
  drop_labels: true
  data_files:
  - split: train
    path: [metadata.jsonl, JPEGImages/*, SegmentationClass/*]
---

Images made by {model}, with label maps from its attention maps (OVAM).

{images} images, {kept} of them kept by the filters: `kept` in metadata.jsonl, and the names in
ImageSets/Segmentation/train.txt. Label maps are palette PNGs: 0 background, then the lines of classes.txt, 255 uncertain.
export.json holds all settings.

    datasets.load_dataset("this folder", split="train").filter(lambda row: row["kept"])
"""
FORMATS = ("voc", "coco", "parquet")

IGNORE = 255
JPEG_QUALITY = 95
SHARD_ROWS = 1000
SHEET_COLUMNS, SHEET_ROWS, SHEET_TILE = 8, 6, 128
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


# ------------------------------------------------------------------------------------------------ one image


@dataclass(frozen=True)
class Job:
    """What a worker needs to write one image. Plain arrays, so that it travels between processes.

    image: uint8 [H, W, 3]. scaled: float32 [L, H, W], A_alpha * D over its own maximum. masks: bool [L, H, W] of Eq. 9.
    taus: the threshold of each; ids: the label of each. uncertain: half-width of the band about tau that gets 255.
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
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:40].strip("-") or "class"


def labels_of(job: Job) -> np.ndarray:
    """The label map of a job, uint8 [H, W]: the class whose scaled map is largest among the masks there, 0 elsewhere;
    255 where the strongest class lies within `uncertain` of its threshold.
    """
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
        f"{MASKS}/{name}.png": _encoded(plot.label_image(labels), "PNG"),
    }
    if job.heatmaps is not None:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, maps=job.heatmaps, classes=np.array(job.item.classes, dtype=np.str_))
        files[f"{HEATMAPS}/{name}.npz"] = buffer.getvalue()
    coverages = [round(float((labels == label).mean()), 6) for label in job.ids]
    row = {
        "file_name": f"{IMAGES}/{name}.jpg",
        "mask_file_name": f"{MASKS}/{name}.png",  # `datasets` loads columns of this ending as pictures
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


def write_done(folder: Path, index: int, files: dict[str, bytes], row: dict[str, Any]) -> None:
    """Writes the files of image number `index`, by path within the folder, then the row that says it is done. Raises OSError."""
    for path, data in files.items():
        write(folder / path, data)
    state = {"row": row, "bytes": {path: len(data) for path, data in files.items()}}
    write(folder / ITEMS / f"{index:06d}.json", _json(state))


def read_done(folder: Path, item: Item) -> dict[str, Any] | None:
    """The row of an image that is done, else None. Files that have gone or have another size mean that it is not."""
    try:
        state = json.loads((folder / ITEMS / f"{item.index:06d}.json").read_bytes())
        whole = all((folder / path).stat().st_size == size for path, size in state["bytes"].items())
        return state["row"] if whole else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def _json(value: Any, indent: int | None = None) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=indent) + "\n").encode()


# ------------------------------------------------------------------------------------------------ the folder


def disk_sentence(error: OSError, folder: Path | str, run: str = "export") -> str:
    """What to tell a person whose export, or other run, met an error of the file system."""
    if error.errno in NO_SPACE:
        return (
            f"The disk of '{folder}' is full; free some space and start the same {run} again, it goes on where it was."
        )
    reason = (error.strerror or str(error) or "not possible").lower()
    return f"Cannot write to '{folder}': {reason}; when that is mended, start the same {run} again."


def check_folder(folder: Path, settings: dict[str, Any], run: str = "export") -> None:
    """Raises ValueError where the folder holds a run of other settings, or other things; changes nothing."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"'{folder}' is a file; choose a folder for the {run}.")
    try:
        there = json.loads((folder / SETTINGS).read_bytes())
    except FileNotFoundError:
        if any(path.name != STATE for path in folder.iterdir()):
            raise ValueError(f"The folder '{folder}' is not empty and holds no {run}; choose another.") from None
        return
    except (OSError, ValueError):
        raise ValueError(f"The settings of the {run} in '{folder}' cannot be read; choose another folder.") from None
    if not isinstance(there, dict):
        raise ValueError(f"The settings of the {run} in '{folder}' cannot be read; choose another folder.")
    for name in [*settings, *(there.keys() - settings.keys())]:
        if there.get(name) != settings.get(name):
            raise ValueError(
                f"The folder '{folder}' holds an {run} with another setting of '{name.replace('_', ' ')}' "
                f"({_short(there.get(name))} there, {_short(settings.get(name))} now); use the same or another folder."
            )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def prepare(folder: Path, settings: dict[str, Any]) -> None:
    """Makes the folders, clears what a killed run left half written, writes the settings. One process does this.

    Raises ValueError where that is not possible.
    """
    check_folder(folder, settings)
    try:
        for name in (IMAGES, MASKS, SETS, ITEMS):
            (folder / name).mkdir(parents=True, exist_ok=True)
        if settings["heatmaps"]:
            (folder / HEATMAPS).mkdir(exist_ok=True)
        clear_parts(folder)
        write(folder / SETTINGS, _json(settings, indent=1))
    except OSError as error:
        raise ValueError(disk_sentence(error, folder)) from None


def clear_parts(folder: Path) -> None:
    """Takes away files that were being written when a process was killed."""
    for part in folder.rglob(".*.part"):
        with suppress(OSError):
            part.unlink()


@contextmanager
def locked(folder: Path, run: str = "export"):
    """Holds the folder, made if need be, for this process; the lock goes with the process, however it ends.

    Raises ValueError where another run is going on in the folder, and where it cannot be made.
    """
    try:
        (folder / STATE).mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK, "wb")
    except OSError as error:
        raise ValueError(disk_sentence(error, folder, run)) from None
    with file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ValueError(
                    f"Another {run} is running in '{folder}'; wait for its end or choose another folder."
                ) from None
        yield


# ------------------------------------------------------------------------------------------------ the whole


def assemble(folder: Path, settings: dict[str, Any], work: Work) -> list[dict[str, Any]]:
    """Puts the data set together from all images that are done; returns their rows, `kept` and `reason` included.

    The same images give the same bytes, by whatever way they came. Raises OSError.
    """
    rows = [row for item in work.items if (row := read_done(folder, item)) is not None]
    rows = judge(rows, Filters(**settings["filters"]))
    kept = [row for row in rows if row["kept"]]
    clear_parts(folder)

    names = ("background", *work.classes)
    write(folder / CLASSES, "".join(f"{name}\n" for name in names).encode())
    write(folder / SETS / "train.txt", "".join(f"{Path(row['file_name']).stem}\n" for row in kept).encode())
    if work.skipped:
        write(folder / SKIPPED, b"".join(_json(vars(one)) for one in work.skipped))
    if "coco" in settings["format"]:
        (folder / ANNOTATIONS).mkdir(exist_ok=True)
        write(folder / ANNOTATIONS / "instances_train.json", _json(coco_instances(folder, kept, work.classes)))
    if "parquet" in settings["format"]:
        write_parquet(folder, kept)
    write(folder / SHEET, _encoded(contact_sheet(folder, kept or rows), "PNG"))  # all dropped: show those
    about = {"images": len(rows), "kept": len(kept), "skipped_prompts": len(work.skipped), "settings": settings}
    write(folder / ABOUT, _json(about, indent=1))
    card = CARD_TEXT.format(model=settings["model"], images=len(rows), kept=len(kept))
    write(folder / CARD, card.encode())
    write(folder / METADATA, b"".join(map(_json, rows)))
    return rows


def read_labels(path: Path) -> np.ndarray:
    """The label map in a palette PNG, uint8 [H, W]."""
    with Image.open(path) as picture:
        return np.array(picture)


def coco_instances(folder: Path, rows: Sequence[dict[str, Any]], classes: Sequence[str]) -> dict[str, Any]:
    """COCO instances of the rows: one annotation a class and image, its pixels as compressed RLE."""
    try:
        from pycocotools import mask as rle
    except ImportError:
        raise ValueError(NEEDS["coco"]) from None
    images, annotations = [], []
    for number, row in enumerate(rows, start=1):
        labels = read_labels(folder / row["mask_file_name"])
        height, width = labels.shape
        images.append({"id": number, "file_name": Path(row["file_name"]).name, "width": width, "height": height})
        for label in [int(label) for label in np.unique(labels) if label not in (0, IGNORE)]:
            encoded = rle.encode(np.asfortranarray(labels == label, dtype=np.uint8))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": label,
                    "iscrowd": 0,
                    "area": int(rle.area(encoded)),
                    "bbox": [float(side) for side in rle.toBbox(encoded)],
                    "segmentation": {"size": [height, width], "counts": encoded["counts"].decode("ascii")},
                }
            )
    categories = [{"id": label, "name": name} for label, name in enumerate(classes, start=1)]
    return {"images": images, "annotations": annotations, "categories": categories}


NEEDS = {
    "coco": "The format coco needs pycocotools; install it with: pip install pycocotools.",
    "parquet": "The format parquet needs pyarrow; install it with: pip install pyarrow.",
}


def check_formats(formats: Iterable[str]) -> None:
    """Raises ValueError for an unknown format and for one whose library is not installed."""
    for name in formats:
        if name not in FORMATS:
            raise ValueError(f"There is no format '{name[:40]}'; choose among {', '.join(FORMATS)}.")
        try:
            if name == "coco":
                import pycocotools.mask  # noqa: F401
            if name == "parquet":
                import pyarrow.parquet  # noqa: F401
        except ImportError:
            raise ValueError(NEEDS[name]) from None


def write_parquet(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """The rows with their pictures as shards of SHARD_ROWS that `datasets` loads: columns image, mask, and the metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    texts = {
        "prompt": pa.string(),
        "negative_prompt": pa.string(),
        "seed": pa.int64(),
        "classes": pa.list_(pa.string()),
    }
    numbers = {
        "class_ids": pa.list_(pa.int64()),
        "clip_scores": pa.list_(pa.float64()),
        "coverages": pa.list_(pa.float64()),
        "coverage": pa.float64(),
    }
    columns = {"image": picture, "mask": picture, **texts, **numbers}
    # What `datasets` reads its features from; other readers pass over it.
    features = {"image": {"_type": "Image"}, "mask": {"_type": "Image"}}
    kinds = {pa.string(): "string", pa.int64(): "int64", pa.float64(): "float64"}
    for name, kind in {**texts, **numbers}.items():
        if pa.types.is_list(kind):
            features[name] = {"_type": "List", "feature": {"dtype": kinds[kind.value_type], "_type": "Value"}}
        else:
            features[name] = {"dtype": kinds[kind], "_type": "Value"}
    about = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pa.schema(list(columns.items()), metadata=about)

    out = folder / PARQUET
    out.mkdir(exist_ok=True)
    count = max(1, -(-len(rows) // SHARD_ROWS))
    names = [f"train-{number:05d}-of-{count:05d}.parquet" for number in range(count)]
    for stale in out.glob("train-*.parquet"):
        if stale.name not in names:
            stale.unlink()
    for number, name in enumerate(names):
        shard = rows[number * SHARD_ROWS : (number + 1) * SHARD_ROWS]
        filled = [
            {
                **{key: row[key] for key in (*texts, *numbers)},
                "image": _picture(folder, row["file_name"]),
                "mask": _picture(folder, row["mask_file_name"]),
            }
            for row in shard
        ]
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(filled, schema=schema), buffer)
        write(out / name, buffer.getvalue())


def _picture(folder: Path, path: str) -> dict[str, Any]:
    return {"bytes": (folder / path).read_bytes(), "path": Path(path).name}


def contact_sheet(folder: Path, rows: Sequence[dict[str, Any]]) -> Image.Image:
    """Up to 48 images of the rows, evenly chosen, their labels laid over them in VOC's colours. RGB."""
    count = min(len(rows), SHEET_COLUMNS * SHEET_ROWS)
    chosen = [rows[number * len(rows) // count] for number in range(count)]
    columns = max(1, min(SHEET_COLUMNS, count))
    line = 14
    height = max(1, -(-count // columns)) * (SHEET_TILE + line)
    sheet = Image.new("RGB", (columns * SHEET_TILE, height), "white")
    draw = ImageDraw.Draw(sheet)
    for place, row in enumerate(chosen):
        x, y = place % columns * SHEET_TILE, place // columns * (SHEET_TILE + line)
        tile = preview(folder, row)
        tile.thumbnail((SHEET_TILE - 4, SHEET_TILE - 4))
        sheet.paste(tile, (x + (SHEET_TILE - tile.width) // 2, y + (SHEET_TILE - tile.height) // 2))
        draw.text((x + 3, y + SHEET_TILE), Path(row["file_name"]).stem[:20], fill="black")
    return sheet


def preview(folder: Path, row: dict[str, Any], opacity: float = 0.5) -> Image.Image:
    """An image of the data set with its labels laid over it in VOC's colours. RGB, the image's size."""
    with Image.open(folder / row["file_name"]) as picture:
        image = np.asarray(picture.convert("RGB"), dtype=np.float32)
    labels = read_labels(folder / row["mask_file_name"])
    paint = np.asarray(plot.VOC_PALETTE, dtype=np.float32).reshape(256, 3)[labels]
    mixed = np.where(labels[..., None] > 0, (1 - opacity) * image + opacity * paint, image)
    return Image.fromarray(np.rint(mixed).astype(np.uint8))


def zip_folder(folder: str | Path, path: str | Path) -> Path:
    """The data set as one zip, without the state in `.ovam`; written beside its place and renamed. Raises OSError.

    path: outside the folder. The same data set gives the same bytes.
    """
    folder, path = Path(folder), Path(path)
    with (
        beside(path) as part,
        zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive,
    ):  # JPEG and PNG do not get smaller
        for file in sorted(file for file in folder.rglob("*") if file.is_file()):
            inside = file.relative_to(folder)
            if inside.parts[0] == STATE or file.name.endswith(".part"):
                continue
            entry = zipfile.ZipInfo(inside.as_posix(), date_time=(1980, 1, 1, 0, 0, 0))
            with open(file, "rb") as source, archive.open(entry, "w", force_zip64=True) as target:
                while block := source.read(1 << 20):
                    target.write(block)
    return path
