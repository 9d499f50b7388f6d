"""Heatmaps: blocks, the sigmoid of two tokens, gradients. (That they are the model's attention: test_recorder.py.)"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from reference import generate

from ovam_core import heatmaps, record
from ovam_core.attention import heatmap
from ovam_core.attention.heatmap import AttributionPrompt, attribute, resize
from ovam_core.errors import InputError
from ovam_core.query import attribute_sentence, attribute_words


@pytest.fixture(scope="module")
def recording(tiny):
    with record(tiny) as r:
        generate(tiny)
    return r.recordings[0]


def embedding_of(tokens, seed=0):
    return torch.randn(tokens, 32, generator=torch.Generator().manual_seed(seed)) * 2


def plain(recording, embedding):
    """Eq. 5 from the recorded queries, without blocks or short cuts. Differentiable."""
    total, count = 0, 0
    for layer in recording.layers:
        weight = layer.keys.weight.detach()
        for queries in layer.queries:
            keys = (embedding @ weight.T).unflatten(-1, (len(queries), -1))
            for h, q in enumerate(queries):
                attention = torch.softmax(q @ keys[:, h].T * layer.scale, dim=-1)
                grid = attention.T.reshape(1, -1, layer.height, layer.width)
                size = (recording.height, recording.width)
                total = total + F.interpolate(grid, size=size, mode="bilinear", align_corners=False)[0]
                count += 1
    return total / count


@pytest.mark.parametrize("tokens", [1, 2, 3, 77])
@pytest.mark.parametrize("values", [1, 3000, 1 << 18])
def test_blocks_do_not_change_the_sum(recording, monkeypatch, tokens, values):
    monkeypatch.setitem(heatmap.BLOCK_VALUES, "cpu", values)
    embedding = embedding_of(tokens)
    torch.testing.assert_close(heatmaps(recording, embedding), plain(recording, embedding), atol=1e-5, rtol=0)


def test_maps_lie_in_the_unit_interval(recording):
    maps = heatmaps(recording, embedding_of(2) * 100)
    assert maps.min() >= 0
    assert maps.max() <= 1
    assert maps.dtype == torch.float32
    torch.testing.assert_close(maps[0], 1 - maps[1], atol=1e-6, rtol=0)


@pytest.mark.parametrize("tokens", [2, 4])
def test_gradient_of_the_embedding_and_of_nothing_else(tiny, recording, tokens):
    weight = torch.rand(tokens, 16, 24, generator=torch.Generator().manual_seed(1))
    gradients = []
    for function in (heatmaps, plain):
        embedding = embedding_of(tokens).requires_grad_()
        (function(recording, embedding) * weight).sum().backward()
        gradients.append(embedding.grad)
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-3)
    assert gradients[0].abs().max() > 1e-3
    assert all(p.grad is None for p in tiny.unet.parameters())


def test_no_graph_without_a_gradient_to_find(recording):
    assert not heatmaps(recording, embedding_of(3)).requires_grad
    with torch.no_grad():
        assert not heatmaps(recording, embedding_of(3).requires_grad_()).requires_grad


def test_recording_made_under_inference_mode_can_be_differentiated(tiny):
    with record(tiny) as r, torch.inference_mode():
        generate(tiny, steps=2)
    embedding = embedding_of(2).requires_grad_()
    heatmaps(r.recordings[0], embedding)[1].sum().backward()
    assert embedding.grad.abs().max() > 0


def test_half_precision_embedding(recording):
    embedding = embedding_of(3).half()
    maps = heatmaps(recording, embedding)
    assert maps.dtype == torch.float32
    torch.testing.assert_close(maps, heatmaps(recording, embedding.float()))


def test_autocast_around_it_changes_nothing(recording):
    embedding = embedding_of(3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        maps = heatmaps(recording, embedding)
    assert torch.equal(maps, heatmaps(recording, embedding))


@pytest.mark.parametrize("shape", [(3, 16), (32,), (1, 3, 32), (0, 32)])
def test_embeddings_of_another_model_are_refused(recording, shape):
    with pytest.raises(InputError, match=r"this model takes \[tokens, 32\]"):
        heatmaps(recording, torch.zeros(shape))


def test_words_asked_together_are_those_asked_alone(tiny, recording):
    attributions = attribute_words(tiny, ["cat", "zebra", "red bus", "car"])  # prompts of 3, 7, 4 and 3 tokens
    together = attribute(recording, attributions)
    assert together.shape == (4, 16, 24)
    for one, maps in zip(attributions, together, strict=True):
        expected = heatmaps(recording, one.embedding)[list(one.groups[0])].mean(dim=0)
        torch.testing.assert_close(maps, expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(maps, attribute(recording, one)[0], atol=1e-6, rtol=0)


def test_two_token_prompts_together(recording):
    prompts = [AttributionPrompt(embedding_of(2, seed), ("background", "cat"), ((0,), (1,))) for seed in range(3)]
    maps = attribute(recording, prompts)
    expected = torch.cat([plain(recording, x.embedding) for x in prompts])
    torch.testing.assert_close(maps, expected, atol=1e-5, rtol=0)


def test_maps_of_a_sentence_sum_to_one(tiny, recording):
    sentence = attribute_sentence(tiny, "a cat, the red bus")
    maps = attribute(recording, sentence)
    assert len(maps) == len(sentence.labels) == 8
    torch.testing.assert_close(maps.sum(dim=0), torch.ones(16, 24), atol=1e-5, rtol=0)
    with pytest.raises(InputError, match="no word"):
        attribute(recording, [])


def test_resize():
    maps = torch.rand(2, 4, 6)
    assert resize(maps, (4, 6)) is maps
    assert resize(maps, (16, 12)).shape == (2, 16, 12)
    torch.testing.assert_close(resize(torch.ones(1, 2, 2), (5, 7)), torch.ones(1, 5, 7))
