"""Pascal VOC's class names."""

from __future__ import annotations

# Pascal VOC: the 20 names in the order of their ids 1 to 20; 0 is background, 255 is "ignore".
VOC_CLASSES = (
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "dining table",
    "dog",
    "horse",
    "motorbike",
    "person",
    "potted plant",
    "sheep",
    "sofa",
    "train",
    "tv",
)
