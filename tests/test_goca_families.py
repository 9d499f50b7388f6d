"""GoCA at its published settings, a family at a time, against a transcription of its own.

Each pipeline is a tiny one with the levels and blocks of the published model. `Seen` keeps what PyTorch's attention
function was given; `transcribed` makes maps of that in the steps of the paper, with the authors' layers by number, and
shares no code with ovam_core.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pipelines import CROSS, JOINT, make_pipe, pipe_of

from ovam_core.attention.goca import (
    OURS,
    PUBLISHED,
    GocaOptions,
    SelfLayer,
    attribute_weighted,
    cross_attention,
    goca,
    log_mass,
    resized_self_attention,
    token_scores,
)
from ovam_core.attention.heatmap import AttributionPrompt
from ovam_core.errors import InputError
from ovam_core.hooks.goca_recorder import record_goca
from ovam_core.hooks.photograph import denoise, prepare
from ovam_core.methods import GOCA
from ovam_core.models.goca import FLUX_FEW, goca_blocks, goca_preset, short_of_memory
from ovam_core.models.registry import adapter_of
from ovam_core.ovam import OVAM
from ovam_core.query import caption_words, words_in_sentence
from ovam_core.settings import PhotoSettings

CAPTION = "a photograph of the cat"
WORDS = ["cat", "photograph"]
PIXELS = (32, 48)


@dataclass(frozen=True)
class Published:
    """As the table has it. layers, propagation: module names; None: every one."""

    reference: str
    propagation: tuple[str, ...]
    order: int
    count: int
    timestep: int = 100
    weighed: bool = True
    layers: tuple[str, ...] | None = None
    size: tuple[int, int] = PIXELS


def up(level, attention, block=0):
    return f"up_blocks.{level}.attentions.{attention}.transformer_blocks.{block}"


def down(level, attention, block=0):
    return f"down_blocks.{level}.attentions.{attention}.transformer_blocks.{block}"


def flux(block):
    return f"transformer_blocks.{block}" if block < 19 else f"single_transformer_blocks.{block - 19}"


TABLE = {
    "sd-1.5": Published(up(2, 1), (up(3, 0), up(3, 1), down(0, 1)), 2, 16),
    "sdxl-1.0": Published(
        up(1, 0),
        (*(up(1, a, b) for a, b in ((0, 0), (0, 1), (1, 0), (1, 1), (2, 0))), down(1, 0, 0), down(1, 0, 1)),
        2,
        70,
    ),
    "pixart-28": Published("transformer_blocks.13", tuple(f"transformer_blocks.{i}" for i in range(10, 18)), 5, 28),
    "hunyuan-40": Published(
        "blocks.25",
        tuple(f"blocks.{i}" for i in range(20, 30)),
        4,
        10,
        weighed=False,
        layers=tuple(f"blocks.{i}" for i in range(20, 30)),
        size=(64, 96),
    ),
    "flux-57": Published(flux(27), (flux(12), flux(18)), 2, 57, timestep=150, weighed=False),
}


# ------------------------------------------------------------------------------------------- what was attended to


class Seen:
    """Queries, keys, values and mask of every attention `[heads, n, d]`, the projections' inputs and outputs."""

    def __init__(self, pipe, monkeypatch):
        self.model = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
        self.given, self.queries, self.outputs, self._inside = {}, {}, {}, None
        original = F.scaled_dot_product_attention

        def spied(query, key, value, attn_mask=None, *args, **more):
            if self._inside is not None:
                mask = None if attn_mask is None else attn_mask[0]
                self.given[self._inside] = (query[0], key[0], value[0], mask)
            return original(query, key, value, attn_mask, *args, **more)

        monkeypatch.setattr(F, "scaled_dot_product_attention", spied)
        self._handles = []
        for name, module in self.model.named_modules():
            if name.rpartition(".")[2] in ("attn", "attn1", "attn2"):
                self._handles += [
                    module.register_forward_pre_hook(functools.partial(self._enter, name)),
                    module.register_forward_hook(functools.partial(self._leave, name)),
                    module.to_q.register_forward_hook(functools.partial(self._project, name)),
                ]

    def _enter(self, name, module, args):
        self._inside = name

    def _leave(self, name, module, args, output):
        self._inside = None
        self.outputs[name] = output

    def _project(self, name, module, args, output):
        self.queries[name] = output[0]

    def stop(self):
        for handle in self._handles:
            handle.remove()

    def attention(self, name):
        query, key, _, mask = self.given[name]
        logits = query.double() @ key.double().transpose(-1, -2) / query.shape[-1] ** 0.5
        return torch.softmax(logits if mask is None else logits + mask, dim=-1)


@functools.cache
def photo():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (*PIXELS, 3), dtype=np.uint8))


def seen_and_recorded(name, monkeypatch, size=PIXELS, **options):
    pipe = pipe_of(name)
    noisy = prepare(pipe, [photo()], [CAPTION], size=size)
    seen = Seen(pipe, monkeypatch)
    with record_goca(pipe, branch="all", **options) as recorder:
        denoise(pipe, noisy)
    seen.stop()
    return pipe, seen, recorder.recordings[0], noisy.timesteps


# ------------------------------------------------------------------------------------------------- transcription


def grid_of(n, size, strides=(2, 4, 8, 16, 32)):
    return next((size[0] // s, size[1] // s) for s in strides if (size[0] // s) * (size[1] // s) == n)


def cross_parts(seen, block, weighed):
    """(map of every token `[L, n]`, self-attention `[n, n]`, query features) of a block with two attentions."""
    name = f"{block}.attn2"
    heads = seen.attention(name)  # [heads, n, L]
    if weighed:
        values, module = seen.given[name][2].double(), seen.model.get_submodule(name)
        d = values.shape[-1]
        weight = module.to_out[0].weight.double()
        parts = torch.stack(
            [a @ v @ weight[:, i * d : (i + 1) * d].T for i, (a, v) in enumerate(zip(heads, values, strict=True))]
        )
        agreement = (parts * parts.sum(dim=0)).sum(dim=-1)
        shares = agreement / agreement.sum(dim=0)
    else:
        shares = torch.full(heads.shape[:2], 1 / len(heads), dtype=torch.float64)
    own = seen.attention(f"{block}.attn1").mean(dim=0)
    return (heads * shares[..., None]).sum(dim=0).T, own, seen.queries[name].double()


def joint_parts(seen, block, n, text_first):
    """The same of a joint attention: parts of one softmax, and the attention's output for the image."""
    name = f"{block}.attn"
    mean = seen.attention(name).mean(dim=0)
    image = mean[-n:] if text_first else mean[:n]
    to_image = image[:, -n:] if text_first else image[:, :n]
    to_text = image[:, :-n] if text_first else image[:, n:]
    output = seen.outputs[name]
    features = output[0][0] if isinstance(output, tuple) else output[0, -n:]
    return to_text.T, to_image, features.double()


def resized(maps, size):
    return F.interpolate(maps[None], size=size, mode="bilinear", align_corners=False)[0]


def onto(attention, grid, size):
    """S: keys bilinear, queries nearest."""
    keys = resized(attention.reshape(-1, *grid), size).flatten(1)
    return F.interpolate(keys.T.reshape(1, -1, *grid), size=size, mode="nearest")[0].flatten(1).T


def scaled(maps):
    low, high = maps.amin(dim=(1, 2), keepdim=True), maps.amax(dim=(1, 2), keepdim=True)
    return (maps - low) / (high - low)


def blurred(maps, side=5):
    sigma = 0.3 * ((side - 1) * 0.5 - 1) + 0.8
    line = torch.exp(-((torch.arange(side, dtype=torch.float64) - side // 2) ** 2) / (2 * sigma**2))
    kernel = line[:, None] * line[None]
    padded = F.pad(maps[:, None], [side // 2] * 4, mode="replicate")
    return F.conv2d(padded, (kernel / kernel.sum())[None, None])[:, 0]


def transcribed(parts, size, reference, propagation, order, prompt, blur=5, even=False):
    """parts: block -> (maps, self-attention, features); size: of the image."""
    features = parts[reference][2]
    affinity = torch.softmax(features @ features.T / features.shape[1] ** 0.5, dim=-1)
    at = grid_of(len(features), size)
    finest = grid_of(max(len(own) for _, own, _ in parts.values()), size)
    total, sums = 0, 0
    for maps, own, _ in parts.values():
        grid = grid_of(len(own), size)
        attention = onto(own, grid, at)
        weight = (affinity * (attention / attention.sum(dim=1, keepdim=True) if even else attention)).sum()
        total, sums = total + weight * resized(maps.reshape(-1, *grid), finest), sums + weight
    scores = (total / sums).clamp(min=0)
    scores = scores / scores.sum(dim=0)
    rows = sorted({row for group in prompt.groups for row in group})
    content = scores[rows] / scores[rows].sum(dim=0)
    maps = torch.stack([content[[rows.index(row) for row in group]].mean(dim=0) for group in prompt.groups])
    maps = scaled(blurred(maps, blur))
    mean = sum(parts[block][1] for block in propagation) / len(propagation)
    for _ in range(order):
        maps = (mean @ maps.flatten(1).T).T.reshape(maps.shape)
    return scaled(maps)


@pytest.mark.parametrize("name", CROSS | JOINT)
def test_a_word_of_the_padded_caption_is_that_word(name):
    """Wherever padding stands: its rows are those of the caption read without any."""
    pipe = pipe_of(name)
    own, padded = words_in_sentence(pipe, CAPTION, WORDS), caption_words(pipe, CAPTION, WORDS)
    assert padded.labels == own.labels
    for one, other in zip(own.groups, padded.groups, strict=True):
        torch.testing.assert_close(own.embedding[list(one)], padded.embedding[list(other)], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", TABLE)
@torch.no_grad()
def test_the_published_settings(name, monkeypatch):
    published = TABLE[name]
    pipe, seen, recording, timesteps = seen_and_recorded(name, monkeypatch, published.size)
    assert timesteps == (published.timestep,)
    assert recording.timestep == published.timestep
    assert len(recording.layers) == published.count
    assert recording.options == replace(
        PUBLISHED, heads=published.weighed, propagations=published.order, propagation=None
    )
    prompt = caption_words(pipe, CAPTION, WORDS)
    joint = name == "flux-57"
    n = (published.size[0] // 4) * (published.size[1] // 4)
    blocks = published.layers or tuple(dict.fromkeys(x.rpartition(".")[0] for x in seen.given))
    parts = {
        block: joint_parts(seen, block, n, True) if joint else cross_parts(seen, block, published.weighed)
        for block in dict.fromkeys((*blocks, published.reference, *published.propagation))
    }
    assert {x.layer.name.rpartition(".")[0] for x in recording.layers} == set(blocks)
    assert recording.reference.rpartition(".")[0] == published.reference
    assert {x.name.rpartition(".")[0] for x in recording.finest} == set(published.propagation)
    expected = transcribed(parts, published.size, published.reference, published.propagation, published.order, prompt)
    torch.testing.assert_close(goca(recording, prompt).double(), expected, atol=2e-3, rtol=0)


# ------------------------------------------------------------------------------------- what is not in the table


@torch.no_grad()
def test_joint_attention_without_published_settings(monkeypatch):
    """Stable Diffusion 3: Flux's places by depth. Text and image are the other way round."""
    pipe, seen, recording, _ = seen_and_recorded("sd3", monkeypatch)
    parts = {f"transformer_blocks.{i}": joint_parts(seen, f"transformer_blocks.{i}", 96, False) for i in range(3)}
    prompt = caption_words(pipe, CAPTION, WORDS)
    expected = transcribed(parts, PIXELS, "transformer_blocks.1", ["transformer_blocks.0"], 2, prompt, blur=1)
    torch.testing.assert_close(goca(recording, prompt).double(), expected, atol=2e-3, rtol=0)
    assert recording.options == replace(PUBLISHED, heads=False, scaled_blur=True)


@torch.no_grad()
def test_linear_attention(monkeypatch):
    pipe, _, recording, timesteps = seen_and_recorded("sana", monkeypatch, (64, 64))
    assert timesteps == (150,)
    (layer, *_), grid = recording.finest, (recording.height, recording.width)
    assert layer.linear
    products = layer.queries.relu() @ layer.keys.relu().transpose(1, 2)
    expected = (products / products.sum(dim=-1, keepdim=True).clamp_min(1e-15)).mean(dim=0)
    torch.testing.assert_close(resized_self_attention(layer, grid), expected, atol=1e-6, rtol=1e-4)
    assert goca(recording, caption_words(pipe, CAPTION, WORDS)).shape == (2, *grid)


def test_models_of_another_build():
    assert not goca_preset(adapter_of(pipe_of("sd"))).published
    assert goca_preset(adapter_of(pipe_of("sd"))).options.even_rows
    shipped = make_pipe()
    shipped.ovam_name = "emoji-voc"
    assert goca_preset(adapter_of(shipped)).reference == f"{up(2, 1)}.attn2"
    for name, reference, carrying in (
        ("pixart-alpha", 0, (0, 1)),
        ("sana", 0, (0, 1)),
        ("hunyuan", 2, (2,)),
        ("sd3.5", 1, (0,)),
        ("flux-dev", 1, (0, 1)),
        ("flux-2", 1, (0,)),
    ):
        adapter = adapter_of(pipe_of(name))
        names, preset = [x.name for x in goca_blocks(adapter)], goca_preset(adapter)
        assert not preset.published
        assert preset.reference == names[reference]
        assert preset.options.propagation == tuple(names[i] for i in carrying)
        assert preset.options.scaled_blur


# ----------------------------------------------------------------------------------------------------- options


@pytest.fixture(scope="module")
def of_flux():
    pipe = pipe_of("flux-dev")
    ovam = OVAM(pipe)
    return ovam, ovam.photograph(photo(), CAPTION, width=48, height=32)


@torch.no_grad()
def test_a_joint_softmax_in_parts():
    queries, words, pixels = (torch.randn(2, n, 4, generator=torch.Generator().manual_seed(n)) for n in (5, 3, 7))
    whole = torch.softmax(queries @ torch.cat([words, pixels], dim=1).transpose(1, 2) * 0.5, dim=-1)
    part = cross_attention(queries, words * 0.5, log_mass(queries, pixels, 0.5))
    torch.testing.assert_close(part.transpose(1, 2), whole[..., :3])
    own = SelfLayer("one", 1, 7, torch.cat([queries, queries[:, :2]], dim=1), pixels, 0.5)
    own = replace(own, others=log_mass(own.queries, words, 0.5))
    torch.testing.assert_close(resized_self_attention(own, (1, 7))[:5], whole[..., 3:].mean(dim=0))


@torch.no_grad()
def test_the_shorter_list_of_flux(monkeypatch):
    preset = short_of_memory(adapter_of(pipe_of("flux-57")))
    assert preset.layers == tuple(f"{flux(block)}.attn" for block in FLUX_FEW)
    pipe, _, few, _ = seen_and_recorded("flux-57", monkeypatch, preset=preset)
    assert [x.layer.name for x in few.layers] == list(preset.layers)
    assert len(few.stream.blocks) == 30  # words come no further
    assert goca(few, caption_words(pipe, CAPTION, WORDS)).shape == (2, 8, 12)
    with pytest.raises(InputError, match="for Flux alone"):
        short_of_memory(adapter_of(pipe_of("sd3")))
    with pytest.raises(InputError, match="No layer is called nowhere"):
        record_goca(pipe, preset=replace(preset, layers=("nowhere",)))


@torch.no_grad()
def test_options_stand_in_for_the_published_ones(of_flux):
    ovam, picture = of_flux
    prompt, recording = caption_words(ovam.pipe, CAPTION, WORDS), picture.goca
    whole = GocaOptions(True, False, False, 0, 1)
    assert GocaOptions(propagations=3).over(OURS) == replace(OURS, propagations=3)
    assert whole.over(OURS) == replace(whole, even_rows=True, scaled_blur=True)
    usual = goca(recording, prompt)
    assert torch.equal(usual, goca(recording, prompt, GocaOptions(heads=False)))
    first, second = (x.name for x in recording.finest)
    for options in (
        GocaOptions(propagation=(first,)),
        GocaOptions(names=("single_transformer_blocks", "transformer_blocks.0")),
        GocaOptions(layers=False),
        GocaOptions(propagations=0, blur=0),
    ):
        assert not torch.allclose(goca(recording, prompt, options), usual)
    only = token_scores(recording, prompt.embedding, GocaOptions(names=(second,)))
    alone = replace(recording, layers=tuple(x for x in recording.layers if x.layer.name == second))
    torch.testing.assert_close(only, token_scores(alone, prompt.embedding))
    with pytest.raises(InputError, match="has none of the layers nowhere"):
        goca(recording, prompt, GocaOptions(names=("nowhere",)))
    with pytest.raises(InputError, match="has none of the layers nowhere"):
        goca(recording, prompt, GocaOptions(propagation=("nowhere",)))
    with pytest.raises(InputError, match="heads of a joint attention are not weighed"):
        goca(recording, prompt, GocaOptions(heads=True))


@torch.no_grad()
def test_a_photograph_of_flux_by_every_method_of_goca(of_flux, tmp_path):
    ovam, picture = of_flux
    assert picture.settings.timesteps == (150,) == PhotoSettings.for_model(ovam.pipe).timesteps
    assert PhotoSettings.for_model(pipe_of("sd")).timesteps == (100,)
    assert picture.goca.timestep == 150
    method = replace(GOCA, options=GocaOptions(propagations=0))
    plain, unpropagated = ovam.segment(picture, WORDS, method="GoCA"), ovam.segment(picture, WORDS, method=method)
    assert not np.allclose(plain.heatmaps, unpropagated.heatmaps)
    absent = ovam.segment(picture, ["red bus", "car"], method="GoCA, any word")
    token = AttributionPrompt(torch.randn(2, 24, generator=torch.Generator().manual_seed(0)), ("x",), ((1,),))
    assert attribute_weighted(picture.goca, token).shape == (1, 8, 12)
    found = ovam.load_recording(picture.save_recording(tmp_path / "flux.safetensors"))
    assert found.goca.nbytes == picture.goca.nbytes
    again = ovam.segment(found, ["red bus", "car"], method="GoCA, any word")
    assert np.array_equal(again.heatmaps, absent.heatmaps)
    assert [x.layer.name for x in found.goca.layers] == [x.layer.name for x in picture.goca.layers]


def test_the_settings_of_a_model_can_be_set():
    pipe = pipe_of("flux-dev")
    ovam = OVAM(pipe)
    ovam.goca = replace(goca_preset(ovam.adapter), layers=("transformer_blocks.2.attn",))
    picture = ovam.photograph(photo(), CAPTION, width=48, height=32)
    assert [x.layer.name for x in picture.goca.layers] == ["transformer_blocks.2.attn"]
