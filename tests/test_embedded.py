"""The embedded model as it ships: an ordinary pipeline folder, and maps that mean something.

The bounds below stand under the figures of the model card by the spread of small samples, and well above what a
map without content reaches on the same images: a uniform map and a blob in the centre.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from ovam_core import tokens
from ovam_core.attention.heatmap import attribute, resize
from ovam_core.models.load import embedded_folder, load_pipeline, unknown_words
from ovam_core.models.presets import recommended_part
from ovam_core.query import token_prompt, words_in_sentence
from training import annotator, figures, world
from training.annotated import generations
from training.nouns import VOC_CLASSES

MIB = 1 << 20


@pytest.fixture(scope="module", autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline("emoji-voc", "cpu")


def test_diffusers_alone_loads_it():
    plain = StableDiffusionPipeline.from_pretrained(embedded_folder())
    plain.set_progress_bar_config(disable=True)
    image = plain("a cat", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    assert image.size == (128, 128)
    attentions = {type(block).__name__ for block in (*plain.unet.down_blocks, *plain.unet.up_blocks)}
    assert attentions >= {"CrossAttnDownBlock2D", "CrossAttnUpBlock2D"}


@pytest.mark.parametrize(
    "prompt", ["An astronaut riding a horse on the moon", "a watercolor painting of a red fox in the snow, detailed"]
)
def test_words_that_were_never_learned_leave_room_for_the_rest(pipe, prompt):
    assert len(pipe.tokenizer(prompt).input_ids) <= 14
    assert {"a", "the", "horse", "snow"}.isdisjoint(unknown_words(pipe, prompt))
    assert {"astronaut", "fox"} & set(unknown_words(pipe, prompt, "qwxz"))


def test_a_word_nobody_knows_is_spelled_out(pipe):
    assert unknown_words(pipe, "a qwxz and a cat", "cat") == ["qwxz"]
    assert len(pipe.tokenizer("qwxz").input_ids) == 6


def test_it_is_small_safetensors_with_a_card():
    files = [path for path in embedded_folder().rglob("*") if path.is_file()]
    assert max(path.stat().st_size for path in files) <= 16 * MIB
    assert sum(path.stat().st_size for path in files) <= 64 * MIB
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".md", ".jpg"}
    assert "recipe" in (embedded_folder() / "README.md").read_text()
    json.loads((embedded_folder() / "figures.json").read_text())


def centred_blob(size: int) -> np.ndarray:
    axis = np.linspace(-1, 1, size)
    return np.exp(-2 * (axis[:, None] ** 2 + axis[None, :] ** 2))


def best_mean_iou(maps: list[np.ndarray], masks: list[np.ndarray]) -> float:
    """Mean IoU at the one threshold, relative to each map's peak, that serves all maps best."""

    def at(threshold: float) -> float:
        cut = [one >= threshold * one.max() for one in maps]
        return float(np.mean([(a & b).sum() / (a | b).sum() for a, b in zip(cut, masks, strict=True)]))

    return max(at(threshold) for threshold in figures.THRESHOLDS)


@pytest.mark.slow
def test_maps_find_their_objects_in_held_out_scenes(pipe):
    maps, masks, right, pixels = [], [], 0, 0
    for made in figures.two_object_scenes(40):
        pair = figures.word_maps(pipe, figures.record_scene(pipe, made.image, made.caption), list(made.nouns), 128)
        own = np.stack([made.labels == world.LABELS[name] for name in made.nouns])
        right += ((pair[0] > pair[1]) & own[0]).sum() + ((pair[1] > pair[0]) & own[1]).sum()
        pixels += own.sum()
        maps += list(pair)
        masks += list(own)
    ours = best_mean_iou(maps, masks)
    uniform = best_mean_iou([np.ones((128, 128))] * len(masks), masks)
    blob = best_mean_iou([centred_blob(128)] * len(masks), masks)
    print(f"rendered: which of two {right / pixels:.1%}, IoU {ours:.3f}, uniform {uniform:.3f}, blob {blob:.3f}")
    assert right / pixels > 0.82
    assert ours > 0.48
    assert ours > 1.5 * max(uniform, blob)


@pytest.mark.slow
def test_maps_find_their_objects_in_generated_images(pipe):
    """20 class words on 20 pictures of "A photograph of a <classname>"; the annotator says where the object is."""
    network, maps, masks = annotator.load(), [], []
    prompts = [figures.prompt_for(name) for name in VOC_CLASSES]
    made = generations(pipe, prompts, [4242] * len(prompts), batch=10)
    for number, (name, (image, recording)) in enumerate(zip(VOC_CLASSES, made, strict=True), start=1):
        mask = annotator.annotate(network, [image])[0] == number
        if mask.mean() >= 0.02:
            maps.append(figures.word_maps(pipe, [recording], [name], 128)[0])
            masks.append(mask)
    ours = best_mean_iou(maps, masks)
    uniform = best_mean_iou([np.ones((128, 128))] * len(masks), masks)
    blob = best_mean_iou([centred_blob(128)] * len(masks), masks)
    print(f"generated: {len(masks)} of 20 drawn, IoU {ours:.3f}, uniform {uniform:.3f}, blob {blob:.3f}")
    assert len(masks) >= 16
    assert ours > max(0.68, 1.25 * max(uniform, blob))


@pytest.mark.slow
def test_the_shipped_tokens_are_of_these_weights(pipe):
    """One a VOC class, and on the picture that each was found on it beats its class name: stale ones would not."""
    shipped = {token.names: token for token in tokens.library(pipe.ovam_name).values()}
    assert set(shipped) == {(name,) for name in VOC_CLASSES}
    for token in shipped.values():
        assert token.model == pipe.ovam_name
        assert token.embedding.shape == (2 + token.rivals, pipe.text_encoder.config.hidden_size)
        assert set(token.classes[2:]) < set(VOC_CLASSES) - set(token.names)
        assert token.loss > 0
        assert token.prompt
        assert token.seed > 0
        how = json.loads(token.settings)["optimization"]
        assert (how["images"], how["unlabelled"]) == (1, 8)
    network, gains = annotator.load(), []
    few = [shipped[name,] for name in ("cat", "car", "train", "sofa", "bird")]
    made = generations(pipe, [token.prompt for token in few], [token.seed for token in few], batch=5)
    for token, (image, recording) in zip(few, made, strict=True):
        mask = annotator.annotate(network, [image])[0] == VOC_CLASSES.index(token.names[0]) + 1
        assert 0.05 <= mask.mean() <= 0.8
        asked = [words_in_sentence(pipe, token.prompt, token.names), token_prompt(pipe, token)]
        word, ours = resize(attribute(recommended_part(pipe, recording), asked), mask.shape).numpy()
        gains.append(best_mean_iou([ours], [mask]) - best_mean_iou([word], [mask]))
    assert np.mean(gains) > 0.02
    assert min(gains) > -0.02
