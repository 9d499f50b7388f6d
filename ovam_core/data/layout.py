"""A data set on disk, made file by file: where things lie, how an image's files are written, how the whole is put
together.

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

EXPORT_FORMAT = "ovam-export/1"

IMAGES, LABEL_MAPS, SETS = "JPEGImages", "SegmentationClass", "ImageSets/Segmentation"

HEATMAPS, ANNOTATIONS, PARQUET = "heatmaps", "annotations", "parquet"

STATE, ITEMS = ".ovam", ".ovam/items"

SETTINGS, LOCK = ".ovam/settings.json", ".ovam/lock"

FOLDERS = (STATE, ITEMS, IMAGES, LABEL_MAPS, "ImageSets", SETS, HEATMAPS, ANNOTATIONS, PARQUET)

METADATA, CLASSES, SKIPPED, SHEET = "metadata.jsonl", "classes.txt", "skipped.jsonl", "contact_sheet.png"

ABOUT, CARD = "export.json", "README.md"

# Without `configs` `datasets` would take train.txt for the whole train split, by its name. With it, its cache knows a
# folder by its name and this text alone: without the digest of the rows it gives those of another folder "dataset".
CARD_TEXT = """---
configs:
- config_name: default
  description: rows {digest}
  drop_labels: true
  data_files:
  - split: train
    path: [metadata.jsonl, JPEGImages/*, SegmentationClass/*]
---

Images made by {model}, with label maps from its attention maps (OVAM).

{images} images, {kept} of them kept by the filters: `kept` in metadata.jsonl, and the names in
ImageSets/Segmentation/train.txt. Label maps are palette PNGs: 0 background, then the lines of classes.txt, 255 \
uncertain.
export.json holds all settings.

    datasets.load_dataset("this folder", split="train").filter(lambda row: row["kept"])
"""

JPEG_QUALITY = 95
