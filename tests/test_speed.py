"""The fast forms against plain ones, and the benchmark of speed in a tiny size. No time is asserted."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from reference import generate

from benchmarks.speed import __main__ as command
from benchmarks.speed import page
from benchmarks.speed.common import PEAK_RESET, Bench, Line, NotOnThisDevice, peak_bytes, race, ratios
from benchmarks.speed.heatmap import plain_heatmaps
from benchmarks.speed.recording import SD15, SDXL, recording_sdxl
from benchmarks.speed.self_attention import by_gradient, by_two_passes, materialised
from benchmarks.speed.sizes import CPU, SMOKE
from benchmarks.speed.synthetic import random_embedding, synthetic_recording
from benchmarks.speed.token import plain_losses
from ovam_core.attention import heatmap
from ovam_core.attention.heatmap import heatmaps
from ovam_core.attention.self_attention import column_sums
from ovam_core.hooks.recorder import record
from ovam_core.optimization import RECIPES, optimize

BENCH = Bench(torch.device("cpu"), SMOKE)


@pytest.fixture(scope="module")
def recording(tiny):
    with record(tiny) as recorder:
        generate(tiny)
    return recorder.recordings[0]


def embedding_of(tokens):
    return torch.randn(tokens, 32, generator=torch.Generator().manual_seed(0)) * 2


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------- softmax and sum, both ways


@pytest.mark.parametrize("kept", [0, 1 << 20], ids=["made again", "kept"])
@pytest.mark.parametrize("sizes", [[2], [2, 2, 2], [3], [1, 4, 2]], ids=str)
def test_derivatives_of_the_fused_sums(monkeypatch, kept, sizes):
    monkeypatch.setattr(heatmap, "KEPT_VALUES", kept)
    monkeypatch.setitem(heatmap.BLOCK_VALUES, "cpu", 100)  # blocks of 64 pixels and one step
    queries = draw(2, 2, 70, 3).double()
    layer = heatmap.LayerQueries("layer", 7, 10, queries, torch.nn.Identity(), 1.0)
    keys = draw(2, sum(sizes), 3, seed=1).double().requires_grad_()
    weight = draw(sum(sizes), 70, seed=2).double()
    assert torch.autograd.gradcheck(lambda x: (heatmap._layer_sums(layer, x, sizes) * weight).sum(dim=1), keys)


@pytest.mark.parametrize("kept", [0, 1 << 20], ids=["made again", "kept"])
@pytest.mark.parametrize("tokens", [2, 5])
def test_fused_maps_and_gradients_are_those_of_autograd(recording, monkeypatch, kept, tokens):
    monkeypatch.setattr(heatmap, "KEPT_VALUES", kept)
    weight = draw(tokens, 16, 24, seed=1) / (16 * 24)
    results = []
    for function in (heatmaps, plain_heatmaps):
        embedding = embedding_of(tokens).requires_grad_()
        maps = function(recording, embedding)
        (maps * weight).sum().backward()
        results.append((maps.detach(), embedding.grad))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-6, rtol=1e-4)
    assert results[0][1].abs().max() > 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [2, 5])
def test_half_precision_queries_count_as_what_they_are(recording, dtype, tokens):
    def stored(kind):
        layers = tuple(replace(x, queries=x.queries.to(dtype).to(kind)) for x in recording.layers)
        return replace(recording, layers=layers)

    results = []
    for kind in (dtype, torch.float32):
        embedding = embedding_of(tokens).requires_grad_()
        maps = heatmaps(stored(kind), embedding)
        maps[-1].mean().backward()
        results.append((maps.detach(), embedding.grad))
    for half, full in zip(*results, strict=True):
        torch.testing.assert_close(half, full, atol=1e-6, rtol=1e-5)


def saved_for_backward(recording, tokens) -> int:
    """Bytes that the graph of `heatmaps` holds."""
    held = {}

    def pack(x):
        held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        heatmaps(recording, embedding_of(tokens).requires_grad_())
    return sum(held.values())


def test_memory_of_a_gradient_does_not_grow_with_the_steps(recording, monkeypatch):
    first_step = recording.select(steps=[0])
    probabilities = 5 * sum(x.queries.shape[1] * x.queries.shape[2] * 4 for x in recording.layers)  # of one step
    few = saved_for_backward(first_step, 5)
    assert saved_for_backward(recording, 5) >= few + 2 * probabilities  # kept while they are few
    monkeypatch.setattr(heatmap, "KEPT_VALUES", 0)
    assert saved_for_backward(recording, 5) == saved_for_backward(first_step, 5) <= few - probabilities


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("tokens", [2, 8, 77])
def test_maps_and_gradients_on_cuda(tokens):
    bench = Bench(torch.device("cuda"), SMOKE)
    recording, _ = synthetic_recording(bench, 3, 128)
    results = []
    for function in (heatmaps, plain_heatmaps):
        embedding = random_embedding(bench, tokens).requires_grad_()
        maps = function(recording, embedding)
        maps[-1].mean().backward()
        results.append((maps.detach(), embedding.grad))
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-5, rtol=0)
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-6, rtol=1e-2)


# -------------------------------------------------------------------------------- column sums, other ways


@pytest.mark.parametrize("loud", [1, 4], ids=["even", "peaked"])
@pytest.mark.parametrize("way", [column_sums, by_gradient, by_two_passes])
def test_ways_to_column_sums(way, loud):
    query, key = draw(2, 96, 40) * loud, draw(2, 96, 40, seed=1) * loud
    expected = materialised(query, key, 40**-0.5)
    torch.testing.assert_close(way(query, key, 40**-0.5), expected, rtol=1e-4, atol=1e-4)
    half = query.half(), key.half()
    expected = materialised(*half, 40**-0.5)
    torch.testing.assert_close(way(*half, 40**-0.5), expected, rtol=1e-2, atol=1e-2)


# -------------------------------------------------------------------------------------------- the benchmark


def test_synthetic_recordings_hold_what_they_say():
    recording, labels = synthetic_recording(BENCH, 2, 64)
    assert [x.queries.shape for x in recording.layers[::5]] == [
        (2, 8, 64, 40),
        (2, 8, 16, 80),
        (2, 8, 4, 160),
    ]
    assert len(recording.layers) == 15
    assert recording.nbytes == 2 * 5 * 8 * 4 * (64 * 40 + 16 * 80 + 4 * 160)
    assert labels.shape == (64, 64)
    assert set(np.unique(labels)) == {0, 1}


@pytest.mark.parametrize(("config", "parameters"), [(SD15, 859_520_964), (SDXL, 2_567_463_684)])
def test_the_architectures_are_the_published_ones(config, parameters):
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    assert sum(x.numel() for x in unet.parameters()) == parameters


def test_the_plain_loop_learns_as_optimize_does():
    recording, labels = synthetic_recording(BENCH, 1, 64)
    start, few = random_embedding(BENCH, 2), replace(RECIPES["paper"], epochs=5, decay_every=2)
    optimized = optimize([recording], [labels], start, few)
    plain = plain_losses(recording, labels, start, 5, few)
    np.testing.assert_allclose(optimized.losses, plain, rtol=1e-4)
    assert min(plain) < plain[0]


@pytest.mark.slow
def test_smoke_run(tmp_path, capsys):
    rows = ["1", "2", "3", "4", "6", "8"]
    assert command.main(["--smoke", "--device", "cpu", "--rows", *rows, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    figures = json.loads((tmp_path / "smoke-cpu.json").read_text())
    assert (tmp_path / "smoke-cpu.md").read_text() == printed
    assert {line["row"] for line in figures["lines"]} == {1, 2, 3, 4, 6, 8}
    assert not figures["failed"]
    assert not figures["not here"]
    for line in figures["lines"]:
        assert min(line["values"]) <= line["median"] <= max(line["values"])
        assert min(line["values"]) > 0
        assert line["seconds"] == {}  # a CPU shows ratios
        assert line["what"] in printed
    rows = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(rows) == len(figures["lines"]) + 2
    assert {line.count("|") for line in rows} == {8}


@pytest.mark.slow
def test_the_server_of_row_5():
    (line,) = page.page_words(Bench(torch.device("cpu"), replace(SMOKE, rounds=1)))
    assert line.row == 5
    assert len(line.values) == 1


@pytest.mark.slow
def test_what_the_start_of_the_server_is_compared_with():
    with page.server(BENCH, ["-c", page.PLAIN]) as (_, start):
        assert start.first > 0
        assert start.usable == pytest.approx(start.first, abs=2)  # nothing answers before the page does


def test_a_row_that_fails_or_is_not_for_this_device_leaves_the_others(monkeypatch, tmp_path, capsys):
    def absent(_bench):
        raise NotOnThisDevice("It needs a larger house.")

    def broken(_bench):
        raise RuntimeError("two\nlines | of text")

    def whole(_bench):
        return [Line(4, "whole", "a / b", [1.0, 3.0, 2.0], "2")]

    monkeypatch.setattr(command, "ROWS", {4: (absent, broken, whole)})
    assert command.main(["--device", "cpu", "--smoke", "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "| 4 | absent | not on this device |  |  |  | It needs a larger house. |" in printed
    assert "RuntimeError: two lines / of text" in printed
    assert "| 4 | whole | a / b | 2 | 1 to 3 | 2 |  |" in printed
    with pytest.raises(NotOnThisDevice, match="SDXL"):
        recording_sdxl(Bench(torch.device("cpu"), CPU))


def test_a_race_takes_turns():
    turns = []
    ways = {"a": lambda: turns.append("a"), "b": lambda: turns.append("b")}
    times = race(BENCH, ways, rounds=3, least=0)
    assert "".join(turns) == "ab" * 3
    assert [len(x) for x in times.values()] == [3, 3]
    assert ratios({"a": [2.0, 9.0], "b": [1.0, 3.0]}, "a", "b") == [2.0, 3.0]


@pytest.mark.skipif(not PEAK_RESET.exists(), reason="this system tells no peak")
def test_peak_memory_is_seen():
    held = peak_bytes(BENCH, lambda: torch.ones(1 << 24))
    assert 64e6 < held < 80e6
