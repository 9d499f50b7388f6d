"""Open-vocabulary attention maps: record a diffusion pipeline once, ask for the heatmap of any word afterwards."""

from .goca import Parts, goca, record_goca
from .heatmap import attribute, heatmaps, resize
from .mask import binary_masks, densecrf, label_map, make_masks, self_attention_map
from .methods import ALL_METHODS, Seen, maps_and_masks
from .optimize import RECIPES, Epoch, Optimized, OptimizeSettings, initial_embedding, read_mask
from .photo import read_photo, record_image
from .pipeline import EMBEDDED, KNOWN_MODELS, ModelDefaults, defaults_for, load_pipeline, not_learned
from .recorder import LayerColumnSums, LayerQueries, Recorder, Recording, own_choice, record
from .text import (
    Attribution,
    attribute_sentence,
    attribute_words,
    encode_padded,
    parse_words,
    token_strings,
    words_in_sentence,
)
from .tokens import Token

__all__ = [
    "ALL_METHODS",
    "EMBEDDED",
    "KNOWN_MODELS",
    "RECIPES",
    "Attribution",
    "Epoch",
    "LayerColumnSums",
    "LayerQueries",
    "ModelDefaults",
    "OptimizeSettings",
    "Optimized",
    "Parts",
    "Recorder",
    "Recording",
    "Seen",
    "Token",
    "attribute",
    "attribute_sentence",
    "attribute_words",
    "binary_masks",
    "defaults_for",
    "densecrf",
    "encode_padded",
    "goca",
    "heatmaps",
    "initial_embedding",
    "label_map",
    "load_pipeline",
    "make_masks",
    "maps_and_masks",
    "not_learned",
    "own_choice",
    "parse_words",
    "read_mask",
    "read_photo",
    "record",
    "record_goca",
    "record_image",
    "resize",
    "self_attention_map",
    "token_strings",
    "words_in_sentence",
]
