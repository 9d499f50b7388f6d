"""Open-vocabulary attention maps: record a diffusion pipeline once, ask for the heatmap of any word afterwards."""

from ovam_core.attention.goca import Parts, goca
from ovam_core.attention.heatmap import Attribution, attribute, heatmaps, resize
from ovam_core.attention.mask import binary_masks, densecrf, label_map, make_masks, self_attention_map
from ovam_core.attention.recording import LayerColumnSums, LayerQueries, Recording
from ovam_core.hooks.goca_recorder import record_goca
from ovam_core.hooks.photograph import record_image
from ovam_core.hooks.recorder import Recorder, record
from ovam_core.io.masks import read_mask
from ovam_core.io.pictures import read_photo
from ovam_core.methods import ALL_METHODS, Seen, maps_and_masks
from ovam_core.models.load import load_pipeline, not_learned
from ovam_core.models.presets import EMBEDDED, KNOWN_MODELS, ModelDefaults, defaults_for, own_choice
from ovam_core.optimization import RECIPES, Epoch, Optimized, OptimizeSettings, initial_embedding
from ovam_core.query import (
    attribute_sentence,
    attribute_words,
    encode_padded,
    parse_words,
    token_strings,
    words_in_sentence,
)
from ovam_core.tokens import Token

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
