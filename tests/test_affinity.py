"""iSeg, FA-Seg and Dataset Diffusion: the recorded matrix against the attention itself, each method against its formula
in NumPy; photographs seen in a mirror.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from pipelines import make_small, pipe_of
from reference import Spy, found_by, generate, probabilities

from ovam_core import METHODS, OVAM, InputError, record
from ovam_core.attention import affinity
from ovam_core.attention.affinity import add_attention, refined, sharpened, spread
from ovam_core.attention.heatmap import attribute
from ovam_core.data.export import ExportSettings, export_methods, make_jobs
from ovam_core.data.prompts import parse_prompts, work_list
from ovam_core.hooks.photograph import record_image
from ovam_core.methods import DATASET_DIFFUSION, FA_SEG, ISEG, HeatmapMethod
from ovam_core.query import attribute_words
from ovam_core.settings import GenerateSettings, PhotoSettings, SegmentSettings

PROMPT = "a photograph of the cat and a red bus"
SIDES = {"width": 64, "height": 64}
SPREADING = (ISEG, FA_SEG, DATASET_DIFFUSION)
GRIDS_OF = ("grid_weights", "matrix_weights")


@pytest.fixture(scope="module")
def small():
    """Latents of 8 x 8."""
    return make_small()


@pytest.fixture(scope="module")
def made(small):
    return OVAM(small).draw(GenerateSettings.for_model(small, PROMPT, steps=3, seed=2, **SIDES), keep=["matrix"])


def picture(seed: int = 0, size: tuple[int, int] = (48, 64)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), np.uint8))


# ------------------------------------------------------------------------------------------- what is recorded


def test_the_matrix_is_the_mean_over_layers_heads_and_steps(tiny):
    """Against the probabilities of each self-attention module's own projections."""
    with Spy(tiny, "attn1") as spy, record(tiny, keep=["matrix"]) as recorder:
        generate(tiny, height=32, width=48)
    found = recorder.recordings[0].affinities
    assert [(x.height, x.width) for x in found] == [(16, 24), (8, 12), (4, 6)]
    for one in found[:2]:  # the last is the middle block's, which Spy leaves out
        n, per_head = one.height * one.width, []
        for name, calls in spy.seen.items():
            for pixels, _ in calls:
                if pixels.shape[1] == n:
                    per_head.append(probabilities(spy.modules[name], pixels[1], pixels[1]).mean(dim=0))
        torch.testing.assert_close(one.matrix, torch.stack(per_head).mean(dim=0), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(one.matrix.sum(dim=1), torch.ones(n))


def test_it_takes_memory_on_request_alone(small, made):
    plain = OVAM(small).draw(made.settings)
    assert plain.recording.affinities == ()
    grids = [(x.height, x.width) for x in made.recording.affinities]
    assert grids == [(8, 8), (4, 4), (2, 2)]
    assert made.nbytes - plain.nbytes == sum(4 * (h * w) ** 2 for h, w in grids)
    assert np.array_equal(np.asarray(plain.image), np.asarray(made.image))


def test_the_matrix_of_linear_attention(monkeypatch):
    """Sana's rows are relu(q) . relu(k) over their sum; a pixel that attends to none has none."""
    query, key = (torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(n)) for n in (0, 1))
    total = torch.zeros(6, 6)
    pipe = pipe_of("sana")
    OVAM(pipe).adapter.add_attention(total, query, key, 0.5)
    scores = torch.einsum("hnd,hmd->hnm", query.relu(), key.relu())
    shares = (scores / scores.sum(dim=-1, keepdim=True)).nan_to_num(0)
    torch.testing.assert_close(total, shares.mean(dim=0))
    plain = torch.zeros(6, 6)
    monkeypatch.setitem(affinity.MATRIX_VALUES, "cpu", 12)  # two rows at a time
    add_attention(plain, query, key, 0.5)
    torch.testing.assert_close(plain, torch.softmax(query @ key.mT * 0.5, dim=-1).mean(dim=0))


@pytest.mark.parametrize("side", [776, 1024])
def test_what_is_too_large_is_refused_before_it_is_made(small, side):
    ovam = OVAM(small)
    settings = replace(GenerateSettings.for_model(small, PROMPT, steps=1), width=side, height=side)
    with pytest.raises(InputError, match=r"would take \d+\.\d GB: make the picture smaller"):
        ovam.check_answerable(SegmentSettings(("cat",), method="iSeg"), settings)
    ovam.check_answerable(SegmentSettings(("cat",)), settings)


def test_a_run_whose_grid_is_too_large_ends_at_its_first_step(small, monkeypatch):
    monkeypatch.setattr(affinity, "MAX_MATRIX_PIXELS", 36)
    with pytest.raises(InputError, match="at most 6 x 6"), record(small, keep=["matrix"]):
        generate(small, height=64, width=64)


# ------------------------------------------------------------------------------------------------- the formulas


def plain_sharpened(matrix: np.ndarray, entropy: float) -> np.ndarray:
    """iSeg's published code, pixel by pixel."""
    n = len(matrix)
    found = np.zeros((n, n))
    for row in range(n):
        for column in range(n):
            value = matrix[row, column] / max(matrix[:, column])
            if value > 0:
                found[row, column] = max(0.0, value + entropy * math.log10(math.e * value))
        if (total := found[row].sum()) > 0:
            found[row] /= total
    return found


def plain_rounds(values: np.ndarray, matrix: np.ndarray, rounds: int) -> np.ndarray:
    """The same code's rounds, which divide by the sum, and its end, which divides by the maximum."""
    values = values - values.min()
    values = values / values.sum()
    for _ in range(rounds):
        values = matrix @ values
        values = values - values.min()
        values = values / values.sum()
    values = values - values.min()
    return values / values.max()


@pytest.mark.parametrize(("entropy", "rounds"), [(0.015, 8), (0.002, 5), (0.2, 10)])  # VOC, Context, COCO
def test_iseg_is_its_published_code(entropy, rounds):
    logits = 3 * torch.randn(12, 12, generator=torch.Generator().manual_seed(4))
    matrix = logits.softmax(dim=-1)
    matrix[3, 5] = 0
    sharp = sharpened(matrix, entropy)
    np.testing.assert_allclose(sharp, plain_sharpened(matrix.double().numpy(), entropy), atol=1e-6)
    maps = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(5))
    found = refined(maps, sharp, rounds)
    for row in range(2):
        expected = plain_rounds(maps[row].flatten().double().numpy(), sharp.double().numpy(), rounds)
        np.testing.assert_allclose(found[row].flatten(), expected, atol=1e-4)


def test_sharpening_leaves_less_entropy_and_the_matrix_as_it_was():
    matrix = torch.randn(9, 9, generator=torch.Generator().manual_seed(1)).softmax(dim=-1)
    before = matrix.clone()

    def entropy(rows):
        return -(rows * rows.clamp_min(1e-12).log()).sum(dim=-1).mean()

    assert entropy(sharpened(matrix, 0.1)) < entropy(sharpened(matrix, 0.0)) < entropy(torch.full((9, 9), 1 / 9))
    assert torch.equal(matrix, before)
    dead = torch.zeros(9, 9)
    assert torch.equal(sharpened(dead, 0.1), dead)
    assert torch.equal(refined(torch.ones(1, 3, 3), matrix, 2), torch.zeros(1, 3, 3))  # a map that says nothing


@pytest.mark.parametrize("power", [1, 2, 4])
def test_a_power_of_the_matrix(power):
    matrix = torch.randn(12, 12, generator=torch.Generator().manual_seed(2)).softmax(dim=-1)
    maps = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(3))
    expected = np.linalg.matrix_power(matrix.double().numpy(), power) @ maps.flatten(1).double().numpy().T
    expected = (expected - expected.min(0)) / (expected.max(0) - expected.min(0))
    np.testing.assert_allclose(spread(maps, matrix, power).flatten(1).T, expected, atol=1e-4)


def resized(one, size):
    return F.interpolate(one[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]


def grid_map(pipe, recording, grid, size):
    """A word's map of one grid, resized by PyTorch's own function."""
    (found,) = attribute(recording.select(resolutions=[grid]), attribute_words(pipe, ["cat"]))
    return resized(found, size)


def as_if_of_the_papers(method):
    """The small UNet's grids of 8 and 4 in the part of 32 and 16 of the papers' 64."""
    coarser = {name: [(n // 2, x) for n, x in getattr(method, name) if n > 1] for name in GRIDS_OF}
    return replace(method, **{name: tuple(pairs) for name, pairs in coarser.items()})


def test_iseg_weighs_maps_over_their_sums_on_their_own_grids(small, made):
    recording = made.recording
    sharp = plain_sharpened(recording.affinities[0].matrix.double().numpy(), 0.015)
    one = torch.rand(4, 4, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(resized(one, (8, 8)).sum(), 4 * one.sum())
    maps = {grid: grid_map(small, recording, grid, (8, 8)) for grid in (8, 4)}
    maps = {grid: (8 / grid) ** 2 * one / one.sum() for grid, one in maps.items()}
    (found,) = found_by(as_if_of_the_papers(ISEG), small, made, words=["cat"]).maps
    start = (0.7 * maps[4] + 0.3 * maps[8]).double().numpy().flatten()
    np.testing.assert_allclose(found.flatten(), plain_rounds(start, sharp, 1), atol=1e-3)  # 1 of 8: of a grid of 64
    (found,) = found_by(ISEG, small, made, words=["cat"]).maps  # of the published grids it has that of 32 alone
    np.testing.assert_allclose(found.flatten(), plain_rounds(maps[4].double().numpy().flatten(), sharp, 1), atol=1e-3)


def test_fa_seg_weighs_maps_as_they_are_and_matrices_too(small, made):
    recording = made.recording
    (found,) = found_by(as_if_of_the_papers(FA_SEG), small, made, words=["cat"]).maps
    start = 0.7 * grid_map(small, recording, 4, (8, 8)) + 0.15 * grid_map(small, recording, 8, (8, 8))
    expected = torch.zeros(8, 8, dtype=torch.float64)
    assert [one.height for one in recording.affinities] == [8, 4, 2]
    for one, weight in zip(recording.affinities, (0.5, 0.1, 0.1), strict=True):
        grid = (one.height, one.width)
        along = torch.linalg.matrix_power(one.matrix.double(), 2) @ resized(start, grid).double().flatten()
        along = (along - along.min()) / (along.max() - along.min())
        expected += weight * resized(along.reshape(grid), (8, 8))
    np.testing.assert_allclose(found, expected / 0.7, atol=1e-3)


def test_a_grid_that_nothing_is_weighed_for_leaves_the_finest_matrix(small, made):
    method = replace(DATASET_DIFFUSION, matrix_weights=((16, 1.0),))
    assert method._affinities(made.recording) == [(1.0, made.recording.affinities[0])]


def test_dataset_diffusion(small, made):
    """Maps of the grid of 16 of 64 along the matrix of 32 of 64, whatever other matrices there are."""
    assert {dict(DATASET_DIFFUSION.grid_weights)[4], dict(DATASET_DIFFUSION.matrix_weights)[2]} == {1.0}
    method = replace(DATASET_DIFFUSION, grid_weights=((1, 1.0),))
    (found,) = found_by(method, small, made, words=["cat"]).maps
    matrix = made.recording.affinities[1].matrix.double().numpy()
    start = grid_map(small, made.recording, 8, (4, 4)).double().numpy().flatten()
    expected = np.linalg.matrix_power(matrix, 4) @ start
    expected = (expected - expected.min()) / (expected.max() - expected.min())
    assert found.shape == (4, 4)
    np.testing.assert_allclose(found.flatten(), expected, atol=1e-3)


def test_grid_weights_of_a_plain_method(small, made):
    weighing = HeatmapMethod("x", "y.", grid_weights=((1, 0.25), (2, 0.75), (8, 9.0)), weighs_grids=True)
    (found,) = found_by(weighing, small, made, words=["cat"]).maps
    fine, coarse = (grid_map(small, made.recording, grid, (8, 8)) for grid in (8, 4))
    torch.testing.assert_close(found, 0.25 * fine + 0.75 * coarse)
    nothing = replace(weighing, grid_weights=((8, 1.0),))  # no such grid: all of them
    (found,) = found_by(nothing, small, made, words=["cat"]).maps
    (expected,) = attribute(made.recording, attribute_words(small, ["cat"]))
    torch.testing.assert_close(found, expected)


# ------------------------------------------------------------------------------------------------ by every door


@pytest.mark.parametrize("method", SPREADING, ids=lambda x: x.name)
def test_a_picture_without_the_matrix_is_refused_with_its_size(small, made, method):
    bare = replace(made, recording=replace(made.recording, affinities=()), last_maps=None)
    with pytest.raises(InputError, match=r"67 MB.*keep=\[\"matrix\"\]"):
        OVAM(small).segment(bare, ["cat"], method=method)
    if method.weighs_grids:
        with pytest.raises(InputError, match="weighs the grids itself"):
            OVAM(small).segment(made, ["cat"], method=method, resolutions=[4])


def test_what_can_be_kept(small):
    for wrong, part in (("sums", "no 'sums' to keep"), ("outputs", "not there in Stable Diffusion")):
        with pytest.raises(InputError, match=part):
            OVAM(small).generate("a cat", num_inference_steps=1, keep=[wrong], **SIDES)


def test_a_file_brings_it_back_and_damage_is_noticed(small, made, tmp_path):
    ovam = OVAM(small)
    path = made.save_recording(tmp_path / "x.safetensors")
    again = ovam.load_recording(path)
    for method in SPREADING:
        answers = [ovam.segment(one, ["cat", "bus"], method=method) for one in (made, again)]
        assert np.array_equal(answers[0].heatmaps, answers[1].heatmaps)
        assert np.array_equal(answers[0].masks, answers[1].masks)
    first = made.recording.affinities[0]
    for wrong in (first.matrix.double(), first.matrix[:3], -first.matrix, first.matrix * torch.nan):
        other = replace(made.recording, affinities=(replace(first, matrix=wrong),))
        replace(made, recording=other).save_recording(path)
        with pytest.raises(InputError, match="lacks a part or holds one of the wrong kind"):
            ovam.load_recording(path)


def test_a_data_set_by_them(small):
    """An export's masks are those of `segment` on the same picture."""
    ovam = OVAM(small)
    prompts = parse_prompts("a photograph of the cat and a bus")
    work = work_list(prompts, ("cat", "bus"), 1, 3)
    for method in SPREADING:
        settings = ExportSettings.for_model(
            ovam, steps=2, method=method.name.lower(), uncertain=0.05, crf=False, **SIDES
        )
        settings.validate(ovam)
        queries = settings.queries(ovam, work)
        assert all(query.tau == method.tau for query in queries.values())
        jobs = make_jobs(ovam, work.items, "", queries, work, settings)
        for item, job in zip(work.items, jobs, strict=True):
            made = ovam.draw(settings.image(item), keep=method.keeps)
            found = ovam.segment(made, item.classes, method=method)
            assert (found.masks != job.masks).mean() < 0.01  # a float's last bit, of maps that are almost even
    plain = ExportSettings.for_model(ovam, **SIDES)
    assert "method" not in plain.to_json()
    for name, part in (("GoCA", "not there for data sets"), ("attn2mask", "run of 100"), ("sam 2", "no method")):
        with pytest.raises(InputError, match=part):
            ExportSettings.for_model(ovam, steps=2, method=name, **SIDES).validate(ovam)
    assert {"OVAM", "DAAM", "iSeg", "FA-Seg"} <= {method.name for method in export_methods()}


# ----------------------------------------------------------------------------------------------------- mirrors


@pytest.mark.parametrize("name", ["sd", "sd3", "pixart-sigma"])
def test_a_photograph_in_a_mirror(name):
    """Its maps are the means of the photograph's and, turned back, of its mirror image's."""
    pipe, photo = pipe_of(name), picture()
    words = attribute_words(pipe, ["cat", "red bus"])
    options = {"timesteps": (50, 100), "seed": 3, "keep": ["matrix"]}
    plain = record_image(pipe, photo, PROMPT, **options)
    turned = record_image(pipe, ImageOps.mirror(photo), PROMPT, **options)
    both = record_image(pipe, photo, PROMPT, mirror=True, **options)
    assert both.timesteps == (50, 100, 50, 100)
    expected = (attribute(plain, words) + attribute(turned, words).flip(-1)) / 2
    torch.testing.assert_close(attribute(both, words), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(attribute(both.select(steps=[0, 1]), words), attribute(plain, words))
    for one, other, together in zip(plain.affinities, turned.affinities, both.affinities, strict=True):
        grid = (one.height, one.width) * 2
        back = other.matrix.reshape(grid).flip(1, 3).reshape(other.matrix.shape)
        torch.testing.assert_close(together.matrix, (one.matrix + back) / 2, rtol=1e-4, atol=1e-6)
    for one, other, together in zip(plain.column_sums, turned.column_sums, both.column_sums, strict=True):
        back = other.sums.unflatten(1, (one.height, one.width)).flip(2).flatten(1)
        torch.testing.assert_close(together.sums, torch.cat([one.sums, back]), rtol=1e-4, atol=1e-4)


def test_mirrors_in_settings_and_files(tiny, tmp_path):
    ovam = OVAM(tiny)
    made = ovam.photograph(picture(), "a cat and a bus", mirror=True)
    assert made.goca is None or made.goca.timestep == 100
    found = ovam.segment(made, ["cat"], crf=False)
    found.save(tmp_path)
    about = json.loads((tmp_path / "settings.json").read_text())["photo"]
    assert about["mirror"] is True
    assert PhotoSettings.from_json(about) == made.settings
    assert "mirror" not in PhotoSettings("a cat").to_json()
    again = ovam.load_recording(made.save_recording(tmp_path / "x.safetensors"))
    assert np.array_equal(ovam.segment(again, ["cat"], crf=False).heatmaps, found.heatmaps)
    with pytest.raises(InputError, match="write true or false"):
        PhotoSettings("a cat", mirror="yes").validate(tiny)


def test_the_methods_are_listed(tiny):
    assert {"iSeg", "FA-Seg", "Dataset Diffusion", "ConceptAttention"} <= METHODS.keys()
    assert [name for name, one in METHODS.items() if not OVAM(tiny).serves(one)] == ["ConceptAttention"]
