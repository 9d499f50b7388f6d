"""TODO: what this module is."""

from __future__ import annotations

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

IGNORE = 255

JPEG_QUALITY = 95
