"""The world behind the embedded model: scenes, captions, vocabulary."""

from __future__ import annotations

import numpy as np
import pytest

from training import model, sprites, world
from training.backgrounds import BACKGROUNDS
from training.nouns import FURTHER_NOUNS, NOUNS, VOC_CLASSES, VOC_NOUNS
from training.recipes import CPU, FULL


def test_vocabulary_is_as_large_as_promised():
    assert tuple(noun.name for noun in VOC_NOUNS) == VOC_CLASSES
    assert len(FURTHER_NOUNS) >= 80
    assert len(BACKGROUNDS) >= 12
    assert len({noun.name for noun in NOUNS}) == len(NOUNS) < 255


def test_every_noun_has_its_packed_pictures():
    pictures = sprites.load()
    for noun in NOUNS:
        assert len(pictures[noun.name]) == len(noun.emoji)
        assert all(sprites.check(image) > 0.1 for image in pictures[noun.name])


def test_a_scene_is_a_function_of_its_seed():
    first, again, other = (world.scene(seed, 96) for seed in (3, 3, 4))
    assert np.array_equal(first.image, again.image)
    assert np.array_equal(first.labels, again.labels)
    assert first.caption == again.caption
    assert not np.array_equal(first.image, other.image)


@pytest.mark.parametrize("size", [128, 256])
def test_masks_are_exact_where_the_picture_differs_from_its_background(size):
    """Each labelled object is there, is named in the scene, and nothing unlabelled was pasted."""
    for seed in range(12):
        made = world.scene(seed, size)
        assert made.image.shape == (size, size, 3)
        assert made.image.dtype == made.labels.dtype == np.uint8
        assert {world.LABELS[name] for name in made.nouns} == set(np.unique(made.labels)) - {0}
        rng = np.random.default_rng(seed)  # the same seed draws count and background first
        rng.choice(3, p=(0.2, 0.45, 0.35))
        name = str(rng.choice(list(BACKGROUNDS)))
        bare = world.backgrounds.paint(name, size, rng).round()
        outside = made.labels == 0
        unchanged = (np.abs(bare - made.image) <= 1).all(axis=2)
        # Only the soft rim of a picture, where alpha is at most a half, may change an unlabelled pixel.
        assert unchanged[outside].mean() > 0.9


def test_captions_name_what_is_there_and_fit_the_encoder():
    words = model.tokenizer(world.all_words(), FULL.max_tokens)
    for seed in range(200):
        made = world.scene(seed, 64)
        ids = words(made.caption).input_ids
        assert len(ids) <= FULL.max_tokens
        pieces = words.convert_ids_to_tokens(ids)
        assert not any(piece.endswith("</w>") and piece != ",</w>" for piece in pieces), made.caption


@pytest.mark.parametrize("recipe", [CPU, FULL], ids=lambda recipe: recipe.name)
def test_no_caption_of_a_recipe_is_cut(recipe):
    words = model.tokenizer(world.all_words(recipe.nouns), recipe.max_tokens)
    captions = [world.scene(seed, 32, recipe.nouns, recipe.counts).caption for seed in range(300)]
    assert max(len(words(caption).input_ids) for caption in captions) <= recipe.max_tokens


def test_no_word_fails_and_known_words_are_one_token():
    words = model.tokenizer(world.all_words(), FULL.max_tokens)
    unknown = words.unk_token_id
    for text in ("bobcat", "Übergröße", "🐈", "مرحبا", "x" * 20):
        ids = words(text).input_ids[1:-1]
        assert ids, text
        assert unknown not in ids, text
    for name in VOC_CLASSES:
        assert len(words(name.upper()).input_ids) == 2 + len(name.split())
