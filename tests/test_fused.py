"""The kernels against the plain forms: compiled where there is a GPU, else by Triton's interpreter, in a child.

An interpreted kernel stays one for the whole process, so `test_all_of_these_interpreted` runs this file once more in a
process of its own, and there the tests of kernels run on the CPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from ovam_core.attention import heatmap
from ovam_core.attention.kernels import fused
from ovam_core.attention.recording import LayerQueries
from ovam_core.attention.self_attention import column_sums

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
WITHOUT_CUDA = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs CUDA")
WITHOUT_KERNELS = pytest.mark.skipif(
    not INTERPRETED and not (torch.cuda.is_available() and fused._runs(torch.device("cuda", 0))),
    reason="needs CUDA; without it test_all_of_these_interpreted runs this",
)
DEVICE = torch.device("cpu") if INTERPRETED else torch.device("cuda", 0)

HALVES = {torch.float32: 1e-5, torch.float16: 1e-4, torch.bfloat16: 1e-4}  # and how near the plain form they come


def with_kernels(test):
    """Where kernels run: on CUDA, and in the interpreter's process."""
    return pytest.mark.cuda(WITHOUT_KERNELS(test))


def on_cuda(test):
    return WITHOUT_CUDA(with_kernels(test))


@pytest.fixture(autouse=True)
def no_way_back(monkeypatch):
    """A kernel that fails is a failure here, not a warning; and what failed in one test is tried again in the next."""
    monkeypatch.setattr(fused, "_failed", set())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The fused kernels")
        yield


@pytest.fixture
def exact():
    """The plain form without TF32, which would be further from the truth than the kernels."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def draw(*shape, seed=0, device=DEVICE):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def draw_layer(steps, heads, n, d, dtype=torch.float32, device=DEVICE):
    """A layer of `n` pixels, its queries as attention leaves them: `[T, n, heads * d]` seen by heads."""
    queries = draw(steps, n, heads, d, device=device).to(dtype).transpose(1, 2)
    return LayerQueries("layer", 1, n, queries, nn.Identity(), 1.0)


def draw_keys(*shape, device=DEVICE):
    """Such that some products are small and some decide the softmax."""
    return draw(*shape, seed=1, device=device) * 3 * shape[-1] ** -0.5


def both(monkeypatch, layer, keys, sizes):
    """(sums `[rows, n]`, gradient of the keys) by the kernels and by the plain form, under random weights."""
    weight = draw(sum(sizes), layer.queries.shape[2], seed=2, device=keys.device)
    found = []
    for by_kernels in (True, False):
        monkeypatch.setattr(fused, "serves", lambda *given, by_kernels=by_kernels: by_kernels)
        own = keys.clone().requires_grad_()
        sums = heatmap._layer_sums(layer, own, sizes)
        (sums * weight).sum().backward()
        found.append((sums.detach(), own.grad))
    return found


def assert_same(found, tolerance):
    (sums, gradient), (plain_sums, plain_gradient) = found
    assert sums.dtype == gradient.dtype == torch.float32
    torch.testing.assert_close(sums, plain_sums, atol=tolerance, rtol=tolerance)
    largest = plain_gradient.abs().max().item()
    assert largest > 1e-2
    torch.testing.assert_close(gradient, plain_gradient, atol=tolerance * largest, rtol=tolerance)


# Sums of probabilities


@with_kernels
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    ("steps", "heads", "n", "d", "sizes"),
    [
        (2, 2, 77, 40, [3]),
        (2, 2, 256, 64, [2]),
        (2, 3, 77, 16, [1, 4]),
        (1, 1, 1, 3, [8]),
        (2, 1, 100, 160, [2, 8, 3]),
        (1, 2, 77, 64, [77]),
        (1, 2, 70, 40, [5] * 5),
        (1, 2, 65, 40, [2] * 21),
    ],
    ids=str,
)
def test_sums_and_gradients(monkeypatch, exact, dtype, steps, heads, n, d, sizes):
    layer, keys = draw_layer(steps, heads, n, d, dtype), draw_keys(heads, sum(sizes), d)
    assert_same(both(monkeypatch, layer, keys, sizes), HALVES[dtype])


@with_kernels
@pytest.mark.parametrize("programs", [1, 12, 1 << 20])
@pytest.mark.parametrize("sizes", [[2, 2], [4]], ids=str)
@pytest.mark.parametrize("steps", [(), (3,)], ids=["shared keys", "keys of each step"])
def test_however_the_work_is_cut(monkeypatch, exact, steps, sizes, programs):
    monkeypatch.setattr(fused, "PROGRAMS", programs)
    layer, keys = draw_layer(3, 2, 130, 40, torch.float16), draw_keys(*steps, 2, sum(sizes), 40)
    assert_same(both(monkeypatch, layer, keys, sizes), 1e-4)


@with_kernels
def test_a_thousand_pixels(monkeypatch, exact):
    layer, keys = draw_layer(1, 2, 1000, 40, torch.float16), draw_keys(2, 5, 40)
    assert_same(both(monkeypatch, layer, keys, [5]), 1e-4)


@with_kernels
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 2, 0), (2, 3, 0, 1)], ids=str)
def test_however_the_queries_lie(monkeypatch, exact, order):
    """Also a part of a larger tensor, as one image's of a batch."""
    sides = [2, 3, 70, 20]
    stored = draw(*(2 * sides[i] for i in order)).permute(*(order.index(i) for i in range(4)))
    queries = stored[1::2, 3:, 70:, ::2]
    assert list(queries.shape) == sides
    assert not queries.is_contiguous()
    layer = LayerQueries("layer", 7, 10, queries, nn.Identity(), 1.0)
    assert_same(both(monkeypatch, layer, draw_keys(3, 7, 20), [3, 4]), 1e-5)


@with_kernels
@pytest.mark.parametrize("sizes", [[2, 2], [3, 4]], ids=str)
def test_products_far_beyond_the_exponential(monkeypatch, exact, sizes):
    layer = draw_layer(2, 2, 70, 16)
    keys = draw_keys(2, sum(sizes), 16) * 300
    (sums, gradient), (plain, _) = both(monkeypatch, layer, keys, sizes)
    torch.testing.assert_close(sums, plain, atol=1e-3, rtol=0)
    assert gradient.isfinite().all()


@with_kernels
def test_small_gradients_are_not_lost(monkeypatch, exact):
    layer, keys = draw_layer(2, 2, 70, 40, torch.float16), draw_keys(2, 3, 40).requires_grad_()
    gradients = []
    monkeypatch.setattr(fused, "serves", lambda *given: True)
    for factor in (1.0, 1e-12):
        sums = heatmap._layer_sums(layer, keys, [3])
        gradients.append(torch.autograd.grad((sums[0] * factor).sum(), keys)[0] / factor)
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


@with_kernels
def test_two_runs_are_the_same_to_the_last_bit(monkeypatch):
    layer, keys = draw_layer(3, 2, 100, 40, torch.float16), draw_keys(2, 5, 40)
    once, again = (both(monkeypatch, layer, keys, [5])[0] for _ in range(2))
    assert all(map(torch.equal, once, again))


@with_kernels
def test_without_a_gradient_and_with_queries_of_inference_mode(monkeypatch):
    monkeypatch.setattr(fused, "serves", lambda *given: True)
    with torch.inference_mode():
        layer = draw_layer(2, 2, 70, 40)
    keys = draw_keys(2, 3, 40)
    assert not heatmap._layer_sums(layer, keys, [3]).requires_grad
    with torch.inference_mode():
        heatmap._layer_sums(layer, keys, [3])
    keys.requires_grad_()
    heatmap._layer_sums(layer, keys, [3])[0].sum().backward()
    assert keys.grad.abs().max() > 0


# Self-attention


@with_kernels
@pytest.mark.parametrize("programs", [1, 20])
@pytest.mark.parametrize(
    ("heads", "n", "d", "dtype"),
    [
        (2, 77, 40, torch.float32),
        (3, 200, 64, torch.float16),
        (1, 64, 160, torch.float16),
        pytest.param(
            2,
            130,
            72,
            torch.bfloat16,
            marks=pytest.mark.skipif(INTERPRETED, reason="Triton interprets no bfloat16 product"),
        ),
    ],
    ids=str,
)
def test_column_sums(monkeypatch, exact, heads, n, d, dtype, programs):
    monkeypatch.setattr(fused, "PROGRAMS", programs)
    query, key = (2 * draw(n, heads, d, seed=seed).to(dtype).transpose(0, 1) for seed in range(2))
    found = []
    for by_kernels in (True, False):
        monkeypatch.setattr(fused, "serves_columns", lambda *given, by_kernels=by_kernels: by_kernels)
        found.append(column_sums(query, key, d**-0.5))
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)
    assert found[0].max() > 2 * heads  # some pixels receive far more than others


# Which way


def test_a_cpu_goes_the_plain_way():
    queries, keys = draw(1, 2, 9, 4, device="cpu"), draw(2, 3, 4, device="cpu")
    assert not fused.serves(keys, queries, [3])
    assert not fused.serves_columns(queries[0], queries[0])


@on_cuda
def test_what_the_kernels_take():
    queries, keys = draw(1, 2, 9, 64), draw(2, 3, 64)
    assert fused.serves(keys, queries, [3])
    assert fused.serves(keys, queries.half(), None)
    assert not fused.serves(keys, queries.cpu(), [3])
    assert not fused.serves(keys.double(), queries, [3])
    assert not fused.serves(keys, queries, [129])
    assert not fused.serves(draw(2, 77, 160), draw(1, 2, 9, 160), [77])
    assert fused.serves_columns(queries[0], queries[0])
    assert not fused.serves_columns(queries[0], queries[0].half())
    assert not fused.serves_columns(draw(1, 2, 9, 64)[0].double(), queries[0].double())


@pytest.mark.filterwarnings("default:The fused kernels")
@pytest.mark.parametrize("fails", ["_sums", "_gradient"])
def test_a_kernel_that_fails_is_said_once_and_replaced(monkeypatch, fails):
    def broken(*given):
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(fused, "_sums", lambda keys, queries, sizes: torch.zeros(sum(sizes), queries.shape[2]))
    monkeypatch.setattr(fused, fails, broken)
    layer = draw_layer(2, 2, 70, 16, device="cpu")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = [both(monkeypatch, layer, draw_keys(2, 3, 16, device="cpu"), [3]) for _ in range(2)]
    assert [str(x.message).split(";")[0] for x in said if "fused" in str(x.message)] == [
        "The fused kernels cannot run here (RuntimeError: no C compiler)"
    ]
    for (sums, gradient), (plain_sums, plain_gradient) in found:
        torch.testing.assert_close(gradient, plain_gradient)
        if fails == "_sums":
            torch.testing.assert_close(sums, plain_sums)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="is the run that it starts")
def test_all_of_these_interpreted():
    """Sums, gradients and column sums of the kernels, without a GPU. No conftest: it brings pipelines and a browser."""
    # The interpreters of older ones (such as older torch brings) stumble over today's NumPy.
    pytest.importorskip("triton", "3.7", reason="needs triton 3.7 or newer: pip install -r tests/requirements.txt")
    here = Path(__file__).resolve()
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", str(here), "-n", "0", "-q", "--noconftest", "-p", "no:cacheprovider"]
    child = subprocess.run(command, cwd=here.parents[1], env=environment, capture_output=True, text=True, timeout=300)
    assert child.returncode == 0, child.stdout + child.stderr
