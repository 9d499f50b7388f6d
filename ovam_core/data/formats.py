"""Formats of a data set beside VOC's: COCO instances, Parquet shards; its contact sheet, a preview and a zip of it."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ovam_core import plot
from ovam_core.data.layout import PARQUET, STATE
from ovam_core.errors import InputError
from ovam_core.io.files import atomic_path
from ovam_core.io.masks import IGNORE
from ovam_core.settings import FORMATS

SHARD_ROWS = 1000

SHEET_COLUMNS, SHEET_ROWS, SHEET_TILE = 8, 6, 128


def read_labels(path: Path) -> np.ndarray:
    """The label map in a palette PNG, uint8 [H, W]."""
    with Image.open(path) as picture:
        return np.array(picture)


def coco_instances(folder: Path, rows: Iterable[dict[str, Any]], classes: Sequence[str]) -> Iterator[bytes]:
    """COCO instances of the rows as JSON, piece by piece: one annotation a class and image, its pixels as compressed
    RLE. Annotations, which stand behind all images, wait in a file.
    """
    try:
        from pycocotools import mask as rle
    except ImportError:
        raise InputError(NEEDS["coco"]) from None
    ids = count(1)
    with TemporaryFile() as annotations:
        yield b'{"images": ['
        for number, row in enumerate(rows, start=1):
            labels = read_labels(folder / row["mask_file_name"])
            height, width = labels.shape
            image = {"id": number, "file_name": Path(row["file_name"]).name, "width": width, "height": height}
            yield _entry(image, first=number == 1)
            for label in [int(label) for label in np.unique(labels) if label not in (0, IGNORE)]:
                encoded = rle.encode(np.asfortranarray(labels == label, dtype=np.uint8))
                annotation = {
                    "id": next(ids),
                    "image_id": number,
                    "category_id": label,
                    "iscrowd": 0,
                    "area": int(rle.area(encoded)),
                    "bbox": [float(side) for side in rle.toBbox(encoded)],
                    "segmentation": {"size": [height, width], "counts": encoded["counts"].decode("ascii")},
                }
                annotations.write(_entry(annotation, first=annotation["id"] == 1))
        yield b'], "annotations": ['
        annotations.seek(0)
        while block := annotations.read(1 << 20):
            yield block
    categories = [{"id": label, "name": name} for label, name in enumerate(classes, start=1)]
    yield b'], "categories": ' + json.dumps(categories, ensure_ascii=False).encode() + b"}\n"


def _entry(value: dict[str, Any], first: bool) -> bytes:
    """An entry of a list, as `json.dumps` writes lists."""
    return (b"" if first else b", ") + json.dumps(value, ensure_ascii=False).encode()


NEEDS = {
    "coco": "The format coco needs pycocotools; install it with: pip install pycocotools.",
    "parquet": "The format parquet needs pyarrow; install it with: pip install pyarrow.",
}


def check_formats(formats: Iterable[str]) -> None:
    """Raises InputError for an unknown format and for one whose library is not installed."""
    for name in formats:
        if name not in FORMATS:
            raise InputError(f"There is no format '{name[:40]}'; choose among {', '.join(FORMATS)}.")
        try:
            if name == "coco":
                import pycocotools.mask  # noqa: F401
            if name == "parquet":
                import pyarrow.parquet  # noqa: F401
        except ImportError:
            raise InputError(NEEDS[name]) from None


def write_parquet(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """The rows with their pictures as shards of SHARD_ROWS that `datasets` loads: columns image, mask, and the
    metadata.
    """
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
    if len(rows) and "presences" in rows[0]:
        numbers["presences"] = pa.list_(pa.float64())
    columns = {"image": picture, "mask": picture, **texts, **numbers}
    # What `datasets` reads its features from; other readers pass over it.
    features: dict[str, dict[str, Any]] = {"image": {"_type": "Image"}, "mask": {"_type": "Image"}}
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
        with atomic_path(out / name) as part:
            pq.write_table(pa.Table.from_pylist(filled, schema=schema), part)


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
        atomic_path(path) as part,
        zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive,
    ):  # JPEG and PNG do not get smaller
        for file in sorted(file for file in folder.rglob("*") if file.is_file() and not file.is_symlink()):
            inside = file.relative_to(folder)
            if inside.parts[0] == STATE or file.name.endswith(".part"):
                continue
            entry = zipfile.ZipInfo(inside.as_posix(), date_time=(1980, 1, 1, 0, 0, 0))
            with open(file, "rb") as source, archive.open(entry, "w", force_zip64=True) as target:
                while block := source.read(1 << 20):
                    target.write(block)
    return path
