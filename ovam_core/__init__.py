"""Open-vocabulary attention maps: record a diffusion pipeline once, ask for the heatmap of any word afterwards."""

from .heatmap import attribute, heatmaps, resize
from .mask import binary_masks, densecrf, label_map, make_masks, self_attention_map
from .optimize import RECIPES, Epoch, Optimized, OptimizeSettings, initial_embedding, read_mask
from .pipeline import EMBEDDED, KNOWN_MODELS, ModelDefaults, defaults_for, load_pipeline
from .recorder import LayerColumnSums, LayerQueries, Recorder, Recording, record
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
    "Recorder",
    "Recording",
    "Token",
    "attribute",
    "attribute_sentence",
    "attribute_words",
    "binary_masks",
    "defaults_for",
    "densecrf",
    "encode_padded",
    "heatmaps",
    "initial_embedding",
    "label_map",
    "load_pipeline",
    "make_masks",
    "parse_words",
    "record",
    "resize",
    "self_attention_map",
    "token_strings",
    "words_in_sentence",
]
