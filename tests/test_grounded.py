"""Grounded Diffusion and DatasetDM: state dicts, features, each step against its formula, tokens in a word's place.

The authors' weights are not here: state dicts of random numbers have their names and shapes.
"""

from __future__ import annotations

import json
import math
import warnings
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from pipelines import EMBED, make_small
from reference import Spy

from ovam_core import METHODS, OVAM, InputError, Method, Token
from ovam_core.attention.features import Features
from ovam_core.cli import main
from ovam_core.downstream.datasetdm import DatasetDM, best_instance, sines
from ovam_core.downstream.grounded_diffusion import GroundedDiffusion, without_last
from ovam_core.downstream.pyramid import STABLE_DIFFUSION_1, Layout, layout_of
from ovam_core.downstream.registry import with_weights
from ovam_core.hooks.feature_recorder import record_features
from ovam_core.methods import method_named
from ovam_core.settings import SYSTEMS, SegmentSettings

TINY = Layout((8, 16, 24, 32), EMBED, 77, 4)
PROMPT = "a photograph of the cat and a red bus"
KINDS = {"grounded": GroundedDiffusion, "datasetdm": DatasetDM}


# ------------------------------------------------------------------------------ names and shapes, as published


def block(name: str, given: int, made: int) -> dict[str, tuple[int, ...]]:
    """A residual block of the authors' state dicts."""
    shapes = {f"{name}.stored_{kind}{place}": (n,) for place, n in ((1, given), (2, made)) for kind in ("mean", "var")}
    convolutions = [("conv1", given, 3), ("conv2", made, 3)] + [("conv_sc", given, 1)] * (given != made)
    for conv, n, side in convolutions:
        own = {"weight": (made, n, side, side), "bias": (made,), "u0": (1, made), "sv0": (1,)}
        shapes |= {f"{name}.{conv}.{part}": shape for part, shape in own.items()}
    return shapes


def linear(name: str, given: int, made: int, bias: bool = True) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (made, given)} | ({f"{name}.bias": (made,)} if bias else {})


def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def attention(name: str, width: int, bias: bool) -> dict[str, tuple[int, ...]]:
    shapes = {f"{name}.in_proj_weight": (3 * width, width)} | linear(f"{name}.out_proj", width, width, bias)
    return shapes | ({f"{name}.in_proj_bias": (3 * width,)} if bias else {})


def grounded_shapes(given=(15360, 14080, 8320, 5120), text=768) -> dict[str, tuple[int, ...]]:
    levels = list(zip(("low", "mid", "high", "highest"), given, (16, 32, 64, 128), strict=True))
    shapes = {f"{level}_feature_conv.0.weight": (made, n, 1, 1) for level, n, made in levels}
    for level, width in (("mid", 48), ("high", 112), ("highest", 240)):
        shapes |= block(f"{level}_feature_mix_conv", width, width)
    for layer in (f"transfromer_decoder.layers.{n}" for n in range(3)):
        shapes |= attention(f"{layer}.self_attn", 512, False) | attention(f"{layer}.multihead_attn", 512, False)
        shapes |= linear(f"{layer}.linear1", 512, 2048) | linear(f"{layer}.linear2", 2048, 512)
        shapes |= norm(f"{layer}.norm1", 512) | norm(f"{layer}.norm2", 512) | norm(f"{layer}.norm3", 512)
    shapes |= linear("mlp.layers.0", 512, 512) | linear("mlp.layers.1", 512, 512) | linear("mlp.layers.2", 512, 240)
    return shapes | linear("to_k", 3840, 512, False) | linear("to_q", text, 512, False)


def datasetdm_shapes(given=(17920, 16640, 9600, 5120), maps=(616, 3080, 3080, 3080), text=768):
    levels = zip(("low", "mid", "high", "highest"), given, maps, strict=True)
    shapes = {f"{level}_feature_conv.0.weight": (256, n + more, 1, 1) for level, n, more in levels}
    for level in ("mid", "high", "highest"):
        shapes |= block(f"{level}_feature_mix_conv", 512, 256)
    shapes |= {"query_feat.weight": (20, 256), "query_embed.weight": (20, 256), "level_embed.weight": (3, 256)}
    for mlp in ("query_feat_mlp", "query_embed_mlp"):
        shapes |= linear(mlp, 256 + text, 256, False)
    shapes |= norm("decoder_norm", 256) | linear("class_embed", 256, 3)
    for n in range(10):
        for kind, module in (("self", "self_attn"), ("cross", "multihead_attn")):
            name = f"transformer_{kind}_attention_layers.{n}"
            shapes |= attention(f"{name}.{module}", 256, True) | norm(f"{name}.norm", 256)
        name = f"transformer_ffn_layers.{n}"
        shapes |= (
            linear(f"{name}.linear1", 256, 2048) | linear(f"{name}.linear2", 2048, 256) | norm(f"{name}.norm", 256)
        )
    for n in range(3):
        shapes |= linear(f"mask_embed.layers.{n}", 256, 256)
    return shapes


TINY_SHAPES = {
    "grounded": grounded_shapes((2 * (24 + 5 * 32), 2 * (16 + 4 * 24 + 32), 2 * (8 + 4 * 16 + 24), 2 * 64), EMBED),
    "datasetdm": datasetdm_shapes(
        (2 * (24 + 6 * 32), 2 * (16 + 5 * 24 + 32), 2 * (8 + 5 * 16 + 24), 2 * 64), (308, 1540, 1540, 1540), EMBED
    ),
}


def random_state(shapes, seed=0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        x = torch.randn(shape, generator=generator)
        if "var" in name:
            x = x.abs() + 0.5
        elif "u0" not in name and len(shape) > 1:
            x /= math.sqrt(math.prod(shape[1:]))
        elif len(shape) == 1 and "stored" not in name and "sv0" not in name:
            x = 0.1 * x + float(name.endswith("weight"))  # layer norms' weights; biases that leave something to see
        if name.startswith(("mlp.layers.2", "mask_embed.layers.2")):
            x *= 0.02 if name.startswith("mlp") else 0.08  # else every logit is far from 0, or near it
        state[name] = x
    return state


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    found = {}
    for kind, shapes in TINY_SHAPES.items():
        found[kind] = folder / f"{kind}.pth"
        torch.save(random_state(shapes), found[kind])
    return found


@pytest.fixture(scope="module")
def methods(files):
    return {kind: made(files[kind], layout=TINY) for kind, made in KINDS.items()}


def make_like_sd1() -> StableDiffusionPipeline:
    """The blocks of Stable Diffusion 1, narrow: 64 pixels are latents of 8 x 8 and grids of 8, 4, 2 and 1."""
    parts = make_small().components
    torch.manual_seed(2)
    cross, up = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
    parts["unet"] = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=TINY.channels,
        layers_per_block=2,
        norm_num_groups=8,
        cross_attention_dim=EMBED,
        down_block_types=(cross, cross, cross, "DownBlock2D"),
        up_block_types=("UpBlock2D", up, up, up),
        attention_head_dim=4,
    ).eval()
    parts["scheduler"] = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)
    pipe = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.ovam_name = "small"
    return pipe


@pytest.fixture(scope="module")
def ovam():
    return OVAM(make_like_sd1())


@pytest.fixture(scope="module")
def picture(ovam):
    return ovam.generate(PROMPT, num_inference_steps=2, guidance_scale=4, width=64, height=64, features=True)


# ------------------------------------------------------------------------------------- transcriptions of METHODS


def spectral(state, name, x, padding):
    """A convolution by its weight over the largest singular value, estimated by one power iteration from u0."""
    weight, u = state[f"{name}.weight"], state[f"{name}.u0"][0]
    matrix = weight.reshape(len(weight), -1)
    v = matrix.T @ u
    v = v / max(float(v.norm()), 1e-4)
    u = matrix @ v
    u = u / max(float(u.norm()), 1e-4)
    return F.conv2d(x, weight / (u @ matrix @ v), state[f"{name}.bias"], padding=padding)


def normalised(state, name, place, x, stored):
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    if stored:
        mean, var = state[f"{name}.stored_mean{place}"], state[f"{name}.stored_var{place}"]
    return (x - mean[:, None, None]) / (var[:, None, None] + 1e-4).sqrt()


def residual(state, name, x, stored):
    x = normalised(state, name, 1, x, stored).clamp_min(0)
    h = spectral(state, f"{name}.conv1", x, 1)
    h = spectral(state, f"{name}.conv2", normalised(state, name, 2, h, stored).clamp_min(0), 1)
    return h + (spectral(state, f"{name}.conv_sc", x, 0) if f"{name}.conv_sc.weight" in state else x)


def up(x, size):
    return F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)


def pyramid(state, grids, sides, stored):
    """(low, mid, high, highest) of grids `[C, h, w]`; sides: of the three finer ones."""

    def project(level, x):
        return torch.einsum("oc,bchw->bohw", state[f"{level}_feature_conv.0.weight"][:, :, 0, 0], x)

    low = up(project("low", up(grids[0][None], sides[0])), sides[1])
    mid = torch.cat([low, project("mid", up(grids[1][None], sides[1]))], 1)
    mid = up(residual(state, "mid_feature_mix_conv", mid, stored), sides[2])
    high = torch.cat([mid, project("high", up(grids[2][None], sides[2]))], 1)
    high = residual(state, "high_feature_mix_conv", high, stored)
    highest = torch.cat([high, project("highest", grids[3][None])], 1)
    return low, mid, high, residual(state, "highest_feature_mix_conv", highest, stored)


def layer_norm(state, name, x):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]


def dense(state, name, x):
    return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0)


def attend(state, name, query, key, value, heads=8, hidden=None):
    """Multi-head attention of `[n, C]`; hidden: bool `[queries, keys]`."""
    weights = state[f"{name}.in_proj_weight"].chunk(3)
    biases = state[f"{name}.in_proj_bias"].chunk(3) if f"{name}.in_proj_bias" in state else (0, 0, 0)
    q, k, v = (x @ w.T + b for x, w, b in zip((query, key, value), weights, biases, strict=True))
    out = []
    for a, b, c in zip(q.chunk(heads, 1), k.chunk(heads, 1), v.chunk(heads, 1), strict=True):
        scores = a @ b.T / math.sqrt(a.shape[1])
        scores = scores if hidden is None else scores.masked_fill(hidden, -math.inf)
        out.append(scores.softmax(1) @ c)
    return dense(state, f"{name}.out_proj", torch.cat(out, 1))


def mlp(state, name, x):
    for n in range(2):
        x = dense(state, f"{name}.layers.{n}", x).clamp_min(0)
    return dense(state, f"{name}.layers.2", x)


def grounded(state, grids, sides, embedding, size, stored=False):
    """Logits `[size, size]` of one class embedding `[1, E]`, the features resized before the product."""
    fused = pyramid(state, grids, sides, stored)[-1]
    side = fused.shape[-1]
    patches = [
        fused[0, :, y : y + 4, x : x + 4].flatten() for y in range(0, side, 4) for x in range(0, side, 4)
    ]  # channel, row, column
    memory = dense(state, "to_k", torch.stack(patches))
    query = dense(state, "to_q", embedding)
    for layer in (f"transfromer_decoder.layers.{n}" for n in range(3)):
        x = layer_norm(state, f"{layer}.norm1", query)
        query = query + attend(state, f"{layer}.self_attn", x, x, x)
        x = layer_norm(state, f"{layer}.norm2", query)
        query = query + attend(state, f"{layer}.multihead_attn", x, memory, memory)
        x = dense(state, f"{layer}.linear1", layer_norm(state, f"{layer}.norm3", query)).clamp_min(0)
        query = query + dense(state, f"{layer}.linear2", x)
    return torch.einsum("chw,c->hw", up(fused, size)[0], mlp(state, "mlp", query)[0])


def places_of(height, width, channels=256):
    """Mask2Former's sine embedding, normalised: `[h w, channels]`, rows in the first half."""
    found = torch.zeros(height, width, channels)
    half = channels // 2
    for y in range(height):
        for x in range(width):
            for first, at, side in ((0, y, height), (half, x, width)):
                turn = (at + 1) / (side + 1e-6) * 2 * math.pi
                for i in range(half):
                    angle = turn / 10000 ** (2 * (i // 2) / half)
                    found[y, x, first + i] = math.cos(angle) if i % 2 else math.sin(angle)
    return found.flatten(0, 1)


def datasetdm(state, grids, sides, embedding, size, stored=False):
    """The probability `[size, size]` of the best instance."""
    low, mid, high, highest = pyramid(state, grids, sides, stored)
    fine = sides[2]
    features = up(highest, int(fine * 2.5))[0]
    memories = [up(x, int(fine * share)) for x, share in ((low, 5 / 16), (mid, 5 / 8), (high, 5 / 4))]
    text = embedding.repeat(20, 1)
    places = dense(state, "query_feat_mlp", torch.cat([state["query_embed.weight"], text], 1))
    x = dense(state, "query_embed_mlp", torch.cat([state["query_feat.weight"], text], 1))

    def predicted(x):
        x = layer_norm(state, "decoder_norm", x)
        return dense(state, "class_embed", x), torch.einsum("qc,chw->qhw", mlp(state, "mask_embed", x), features)

    for n in range(10):
        memory = memories[n % 3]
        side = memory.shape[-1]
        hidden = (up(predicted(x)[1][None], side)[0].sigmoid() < 0.5).flatten(1)
        hidden[hidden.all(1)] = False
        keys = memory[0].flatten(1).T + state["level_embed.weight"][n % 3]
        name = f"transformer_cross_attention_layers.{n}"
        where = places_of(side, side)
        seen = attend(state, f"{name}.multihead_attn", x + places, keys + where, keys, hidden=hidden)
        x = layer_norm(state, f"{name}.norm", x + seen)
        name = f"transformer_self_attention_layers.{n}"
        x = layer_norm(state, f"{name}.norm", x + attend(state, f"{name}.self_attn", x + places, x + places, x))
        name = f"transformer_ffn_layers.{n}"
        more = dense(state, f"{name}.linear2", dense(state, f"{name}.linear1", x).clamp_min(0))
        x = layer_norm(state, f"{name}.norm", x + more)
    classes, masks = predicted(x)
    masks = up(masks[None], size)[0]
    shares = classes.softmax(1)[:, :2]
    ranked = sorted(((float(shares[q, c]), q) for q in range(20) for c in range(2)), reverse=True)[:3]
    scored = []
    for share, q in ranked:
        inside = masks[q] > 0
        scored.append((share * float(masks[q].sigmoid()[inside].sum() / (inside.sum() + 1e-6)), q))
    return masks[max(scored)[1]].sigmoid()


def level(name: str) -> int:
    """Of a layer's output: 0 for the coarsest grid."""
    if name in ("conv_in", "mid_block"):
        return 3 if name == "conv_in" else 0
    way, number, kind, _ = name.split(".")
    if way == "down_blocks":
        return 3 - int(number) - (kind == "downsamplers")
    return int(number) + (kind == "upsamplers")


GROUNDED_ORDER = [
    "conv_in",
    *(f"down_blocks.{n}.{x}" for n in range(3) for x in ("attentions.0", "attentions.1", "downsamplers.0")),
    *("down_blocks.3.resnets.0", "down_blocks.3.resnets.1", "mid_block"),
    *("up_blocks.0.resnets.0", "up_blocks.0.resnets.1", "up_blocks.0.upsamplers.0"),
    *(f"up_blocks.{n}.{x}" for n in (1, 2) for x in ("attentions.0", "attentions.1", "upsamplers.0")),
    *(f"up_blocks.3.attentions.{n}" for n in range(3)),
]
WITH_LAST = {"up_blocks.0.resnets.2", "up_blocks.1.attentions.2", "up_blocks.2.attentions.2"}


def grids_of(features, kind):
    found = [[], [], [], []]
    for name, x in features.layers.items():
        if kind == "datasetdm" or name in GROUNDED_ORDER:
            found[level(name)].append(x)
    if kind == "datasetdm":
        for way in ("up_blocks", "mid_block", "down_blocks"):
            for name, x in features.attention.items():
                if name.startswith(way):
                    number = name.split(".")[1]
                    place = 0 if way == "mid_block" else int(number) if way == "up_blocks" else 3 - int(number)
                    found[place] += [head_map[None] for head in x for head_map in head]
    return [torch.cat(x) for x in found]


# ------------------------------------------------------------------------------------------------ state dicts


def test_names_shapes_and_counts_are_the_published():
    with torch.device("meta"):
        nets = {kind: made.__new__(made)._empty(STABLE_DIFFUSION_1, "picture") for kind, made in KINDS.items()}
    shapes = {kind: {name: tuple(x.shape) for name, x in net.state_dict().items()} for kind, net in nets.items()}
    assert shapes == {"grounded": grounded_shapes(), "datasetdm": datasetdm_shapes()}
    counts = {kind: sum(x.numel() for x in net.parameters()) for kind, net in nets.items()}
    assert counts["grounded"] == 18_796_560
    assert round(counts["datasetdm"] / 1e6, 1) == 37.4
    assert STABLE_DIFFUSION_1.features == (14 * 1280, 16640, 9600, 5120)
    assert STABLE_DIFFUSION_1.without_last == (15360, 14080, 8320, 5120)


@pytest.mark.slow
def test_a_file_of_full_size_on_full_features(tmp_path):
    """512 pixels: 15360 channels at 8 x 8 to 5120 at 64 x 64, and a text of 768."""
    state = random_state(grounded_shapes())
    torch.save(state, tmp_path / "grounding_module.pth")
    method = GroundedDiffusion(tmp_path / "grounding_module.pth")
    generator = torch.Generator().manual_seed(5)
    grids = [
        torch.randn(n, side, side, generator=generator)
        for n, side in zip(STABLE_DIFFUSION_1.without_last, (8, 16, 32, 64), strict=True)
    ]
    features = Features({str(n): x for n, x in enumerate(grids)}, {}, 1, (512, 512))
    embedding = torch.randn(1, 768, generator=generator)
    with torch.no_grad():
        found = method.probabilities(features, [embedding])
    expected = grounded(state, grids, (16, 32, 64), embedding, 512).sigmoid()
    assert float(expected.std()) > 0.03
    torch.testing.assert_close(found[0], expected, atol=1e-4, rtol=1e-3)


def test_what_other_programs_wrote_of_the_same(files, tmp_path, methods):
    state = torch.load(files["grounded"], weights_only=True)
    torch.save({f"module.{name}": x for name, x in state.items()}, tmp_path / "parallel.pth")
    torch.save({name: torch.nn.Parameter(x.half()) for name, x in state.items()}, tmp_path / "half.pth")
    for name, kept in (("parallel", state), ("half", {name: x.half().float() for name, x in state.items()})):
        found = GroundedDiffusion(tmp_path / f"{name}.pth", layout=TINY).net.state_dict()
        assert found.keys() == kept.keys()
        assert all(torch.equal(found[key], x) for key, x in kept.items())


class Calls:
    def __reduce__(self):
        return print, ("this must not run",)


def changed(state, **more):
    return {**state, **{name.replace("__", "."): x for name, x in more.items()}}


BROKEN = {
    "a missing name": (lambda s: {n: x for n, x in s.items() if n != "to_k.weight"}, "lacks 'to_k.weight'"),
    "a name more": (lambda s: changed(s, to_v__weight=torch.ones(2)), "has 'to_v.weight'"),
    "another shape": (lambda s: changed(s, to_q__weight=torch.ones(512, 33)), r"'to_q.weight' is \[512, 33\]"),
    "whole numbers": (lambda s: changed(s, to_q__weight=torch.ones(512, EMBED, dtype=torch.int64)), "no tensor of fl"),
    "sparse": (lambda s: changed(s, to_q__weight=torch.ones(512, EMBED).to_sparse()), "no tensor of fl"),
    "on no device": (lambda s: changed(s, to_q__weight=torch.ones(512, EMBED, device="meta")), "no tensor of fl"),
    "not finite": (lambda s: changed(s, to_q__weight=torch.full((512, EMBED), torch.nan)), "not finite"),
    "a number": (lambda s: changed(s, to_q__weight=3.0), "no tensor of fl"),
    "a call": (lambda s: changed(s, to_q__weight=Calls()), "something other than tensors"),
    "a list": (lambda s: list(s.values()), "no state dict"),
    "a tensor": (lambda s: s["to_q.weight"], "no state dict"),
    "other keys": (lambda s: dict(enumerate(s.values())), "no state dict"),
    "nothing": (lambda _: {}, "lacks"),
    "a giant by strides": (lambda s: changed(s, to_q__weight=torch.ones(1).expand(1 << 40)), "'to_q.weight' is"),
    "another system's": (lambda _: random_state(TINY_SHAPES["datasetdm"]), "is refused|lacks"),
    "too many bytes": (lambda s: changed(s, more=torch.zeros(60_000_000)), "larger than|holds more"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_no_such_state_dict(files, tmp_path, capsys, case):
    change, part = BROKEN[case]
    path = tmp_path / "weights.pth"
    torch.save(change(torch.load(files["grounded"], weights_only=True)), path)
    with pytest.raises(InputError, match=part) as caught:
        GroundedDiffusion(path, layout=TINY)
    assert "\n" not in str(caught.value)
    assert "must not run" not in capsys.readouterr().out
    assert "weights.pth" in str(caught.value)


def test_what_is_no_file_of_torch(files, tmp_path):
    whole = files["grounded"].read_bytes()
    cases = {"cut": whole[: len(whole) // 2], "empty": b"", "text": b"<!DOCTYPE html>", "pickle": b"\x80\x02}q\x00."}
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=r"not a whole file of torch"):
            GroundedDiffusion(tmp_path / name, layout=TINY)
    with pytest.raises(InputError, match="no file"):
        GroundedDiffusion(tmp_path / "absent", layout=TINY)
    with pytest.raises(InputError, match="no file"):
        GroundedDiffusion(tmp_path, layout=TINY)
    with (
        zipfile.ZipFile(files["grounded"]) as old,
        zipfile.ZipFile(tmp_path / "packed", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for part in old.namelist():
            new.writestr(part, old.read(part))
    with pytest.raises(InputError, match="compressed"):
        GroundedDiffusion(tmp_path / "packed", layout=TINY)
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as new:
        new.writestr("a.txt", "hello")
    with pytest.raises(InputError, match="something other than tensors"):
        GroundedDiffusion(tmp_path / "other.zip", layout=TINY)
    with pytest.raises(InputError, match="picture or stored"):
        GroundedDiffusion(files["grounded"], layout=TINY, statistics="batch")


# ---------------------------------------------------------------------------------------------------- features


def test_features_are_the_layers_of_the_last_step(ovam):
    pipe, heard, timesteps = ovam.pipe, {}, []
    names = {*GROUNDED_ORDER, *WITH_LAST}

    def keep(name):
        def hook(_module, _inputs, output):
            heard.setdefault(name, []).append(output if isinstance(output, torch.Tensor) else output[0])

        return hook

    handles = [m.register_forward_hook(keep(n)) for n, m in pipe.unet.named_modules() if n in names]
    handles.append(pipe.unet.register_forward_pre_hook(lambda _m, args: timesteps.append(int(args[1]))))
    asked = {"num_inference_steps": 3, "height": 64, "width": 64, "output_type": "pt", "num_images_per_prompt": 2}
    try:
        plain = pipe(PROMPT, generator=torch.Generator().manual_seed(0), **asked).images
        with record_features(pipe) as recorder:
            again = pipe(PROMPT, generator=torch.Generator().manual_seed(0), **asked).images
    finally:
        for handle in handles:
            handle.remove()
    assert torch.equal(torch.as_tensor(plain), torch.as_tensor(again))
    assert len(recorder.recordings) == 2
    for image, features in enumerate(recorder.recordings):
        assert [name for name in features.layers if name not in WITH_LAST] == GROUNDED_ORDER
        assert list(without_last(features.layers)) == GROUNDED_ORDER
        assert features.timestep == timesteps[-1] == 1
        assert features.image_size == (64, 64)
        for name, x in features.layers.items():
            whole = heard[name][-1]  # [u, u, c, c]
            assert torch.equal(x, torch.cat([whole[image], whole[2 + image]]))
    assert not any(len(x._forward_hooks) for x in pipe.unet.modules())
    sizes = {level(name): x.shape[-1] for name, x in features.layers.items()}
    assert sizes == {0: 1, 1: 2, 2: 4, 3: 8}


def test_attention_is_the_conditional_softmax(ovam):
    pipe = ovam.pipe
    with Spy(pipe) as spy, record_features(pipe) as recorder:
        pipe(PROMPT, num_inference_steps=2, height=64, width=64, generator=torch.Generator().manual_seed(0))
    features = recorder.recordings[0]
    assert set(spy.modules) | {"mid_block.attentions.0.transformer_blocks.0.attn2"} == set(features.attention)
    for name, module in spy.modules.items():
        pixels, text = spy.seen[name][-1]
        with torch.no_grad():
            q, k = module.to_q(pixels)[1], module.to_k(text)[1]
        maps = features.attention[name]
        assert maps.shape[:2] == (module.heads, 77)
        for head, (a, b) in enumerate(zip(q.chunk(module.heads, 1), k.chunk(module.heads, 1), strict=True)):
            expected = (a @ b.T / math.sqrt(a.shape[1])).softmax(1).T.reshape(maps.shape[1:])
            torch.testing.assert_close(maps[head], expected, atol=1e-5, rtol=1e-4)


def test_features_are_asked_for_and_kept(ovam, picture, tmp_path):
    features = picture.features
    plain = ovam.generate(PROMPT, num_inference_steps=2, guidance_scale=4, width=64, height=64)
    assert plain.features is None
    assert plain.image.tobytes() == picture.image.tobytes()
    values = sum(x.numel() for kept in (features.layers, features.attention) for x in kept.values())
    assert features.nbytes == 4 * values
    assert picture.nbytes - plain.nbytes == features.nbytes
    picture.save_recording(tmp_path / "cat.safetensors")
    again = ovam.load_recording(tmp_path / "cat.safetensors").features
    for kept, read in ((features.layers, again.layers), (features.attention, again.attention)):
        assert list(kept) == list(read)
        assert all(torch.equal(kept[name], read[name]) for name in kept)
    assert (again.timestep, again.image_size) == (1, (64, 64))
    plain.save_recording(tmp_path / "plain.safetensors")
    assert ovam.load_recording(tmp_path / "plain.safetensors").features is None


def test_memory_at_full_size():
    """What the docstring says of Stable Diffusion 1 at 512 pixels, in float16."""
    layers = sum(n * side**2 for n, side in zip(STABLE_DIFFUSION_1.features, (8, 16, 32, 64), strict=True))
    maps = 8 * 77 * (8**2 + 5 * (16**2 + 32**2 + 64**2))
    assert round(2 * (layers + maps) / 1e6) == 106
    assert round(4 * (layers + maps) / 1e6) == 211


# ------------------------------------------------------------------------------- every step against its formula


@pytest.mark.parametrize("statistics", ["picture", "stored"])
@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_are_the_formulas(files, picture, kind, statistics):
    state = torch.load(files[kind], weights_only=True)
    method = KINDS[kind](files[kind], layout=TINY, statistics=statistics)
    before = {name: x.clone() for name, x in method.net.state_dict().items()}
    embeddings = list(torch.randn(3, 1, EMBED, generator=torch.Generator().manual_seed(4)))
    grids = grids_of(picture.features, kind)
    with torch.no_grad():
        found = method.probabilities(picture.features, embeddings)
    assert found.shape == (3, 64, 64)
    assert found.dtype == torch.float32
    assert float((found[0] - found[1]).abs().max()) > 1e-4  # twenty times what is allowed below
    assert all(0.1 < float(one.mean()) < 0.9 and float(one.std()) > 0.03 for one in found)
    for own, embedding in zip(found, embeddings, strict=True):
        if kind == "grounded":
            expected = grounded(state, grids, (2, 4, 8), embedding, 64, statistics == "stored").sigmoid()
        else:
            expected = datasetdm(state, grids, (2, 4, 8), embedding, 64, statistics == "stored")
        torch.testing.assert_close(own, expected, atol=5e-6, rtol=0)
    assert all(torch.equal(before[name], x) for name, x in method.net.state_dict().items())  # u0 among them


def test_the_places_of_a_grid():
    expected = places_of(5, 3).T.reshape(1, 256, 5, 3)
    torch.testing.assert_close(sines(torch.zeros(1, 256, 5, 3)), expected, atol=1e-5, rtol=1e-4)


def test_the_best_instance_is_sure_and_of_a_class():
    masks = torch.full((4, 2, 2), -5.0)
    masks[0, 0] = 0.1  # of a class, but unsure
    masks[1, 1] = 4.0  # of a class, and sure
    masks[2] = 9.0  # sure of nothing
    classes = torch.tensor([[3.0, 0, 0], [0, 2.8, 0], [0, 0, 9.0], [0, 0, 9.0]])
    assert torch.equal(best_instance(classes, masks), masks[1])


# ------------------------------------------------------------------------------------------- words and tokens


def test_the_class_embedding_of_grounded_diffusion(ovam, methods):
    pipe, method = ovam.pipe, methods["grounded"]
    for caption, word, second in (
        ("a photograph of the cat", "red bus", "photograph"),
        ("the cat of a car", "cat", "cat"),
        ("bus", "car", "photograph"),
        ("", "car", "photograph"),
    ):
        ids = pipe.tokenizer(f"a {second} of a {word}").input_ids
        own = len(pipe.tokenizer(word).input_ids) - 2
        assert ids[-1 - own : -1] == pipe.tokenizer(word).input_ids[1:-1]
        with torch.no_grad():
            expected = pipe.text_encoder(torch.tensor([ids]))[0][0]
        five = expected[5 : len(ids) - 1]  # as the authors' script takes them
        torch.testing.assert_close(expected[-1 - own : -1], five)
        torch.testing.assert_close(method.class_embedding(pipe, caption, word)[0], five.mean(0))
    found = method.class_embedding(pipe, "a toy of a cat", "cat")  # a second word of several tokens
    ids = pipe.tokenizer("a toy of a cat").input_ids
    assert len(ids) > 7
    with torch.no_grad():
        torch.testing.assert_close(found[0], pipe.text_encoder(torch.tensor([ids]))[0][0, -2])


def test_the_class_embedding_of_datasetdm(ovam, methods):
    pipe = ovam.pipe
    ids = pipe.tokenizer("red bus", padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = pipe.text_encoder(ids)[0][0].mean(0)
    torch.testing.assert_close(methods["datasetdm"].class_embedding(pipe, PROMPT, "red bus")[0], expected)


@pytest.mark.parametrize("branch", ["conditional", "unconditional"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_token_stands_where_the_word_does(ovam, picture, methods, kind, branch):
    method = methods[kind]
    row = method.class_embedding(ovam.pipe, PROMPT, "red bus").float()
    token = Token(row, ("bus",), "small", branch)
    two = Token(torch.cat([torch.randn(1, EMBED), row]), ("background", "lorry"), "small", branch)
    found = ovam.segment(picture, ["cat", "red bus", token, two], method=method)
    assert found.labels == ["cat", "red bus", "bus", "lorry"]
    assert found.heatmaps.shape == (4, 64, 64)
    assert found.heatmaps[1].tobytes() == found.heatmaps[2].tobytes() == found.heatmaps[3].tobytes()
    assert np.array_equal(found.masks[1], found.masks[2])
    assert found.heatmaps[0].tobytes() != found.heatmaps[1].tobytes()
    alone = ovam.segment(picture, token, method=method)  # one class at a time: no other changes it
    assert alone.heatmaps[0].tobytes() == found.heatmaps[1].tobytes()
    with torch.no_grad():
        direct = method.probabilities(picture.features, [row])[0]
    assert torch.equal(torch.from_numpy(found.heatmaps[1]), direct)
    assert np.array_equal(found.masks[1], (direct > 0.5).numpy())


def test_thresholds(ovam, picture, methods):
    method = methods["grounded"]
    token = Token(torch.randn(1, EMBED), ("bus",), "small", tau=0.8, alpha=0.9)
    found = ovam.segment(picture, ["cat", token], method=method)
    assert [query.tau for query in found.queries] == [0.5, 0.5]  # a probability: no share of a peak, as tokens' own is
    cut = ovam.segment(picture, ["cat", token], method=method, tau=0.7)
    assert np.array_equal(cut.masks, found.heatmaps > 0.7)
    assert cut.settings.to_json()["method"] == "Grounded Diffusion"
    json.dumps({**cut.settings.to_json(), "tokens": []})


# ------------------------------------------------------------------------------------------------- as methods


def test_the_protocol(methods):
    for method in methods.values():
        assert isinstance(method, Method)
        assert method_named(method) is method
        assert method.about.endswith(".")
        assert len(method.about) < 160
        assert method.name in SYSTEMS
        assert method.name not in METHODS
    assert not any(method.needs_features for method in METHODS.values())


@pytest.mark.parametrize("name", ["grounded-diffusion", "Grounded Diffusion", "datasetdm", "DatasetDM"])
def test_a_name_alone_says_what_is_missing(name):
    with pytest.raises(InputError, match=r"weights are yours to bring: .* at https://github.com/.*--weights"):
        method_named(name)


def test_refusals_before_and_after_a_picture(ovam, picture, methods, tiny, files):
    for kind, method in methods.items():
        plain = replace(picture, features=None)
        with pytest.raises(InputError, match="features=True"):
            ovam.segment(plain, "cat", method=method)
        for wrong, part in (
            ({"sentence": "a cat"}, "words alone"),
            ({"template": "a {}"}, "words alone"),
            ({"step_indices": [0]}, "last step"),
            ({"resolutions": [8]}, "all grids"),
            ({"branch": "unconditional"}, "both halves"),
        ):
            with pytest.raises(InputError, match=part):
                ovam.segment(picture, "cat", method=method, **wrong)
        with pytest.raises(InputError, match="has another"):
            method.check_words(tiny, PROMPT, ["cat"])
        with pytest.raises(InputError, match="tokens"):
            method.check_words(ovam.pipe, PROMPT, ["cat " * 90])
        photo = ovam.photograph(picture.image, PROMPT)
        with pytest.raises(InputError, match="not of a photograph"):
            ovam.segment(photo, "cat", method=method)
        assert kind in KINDS
    with pytest.raises(InputError, match="guidance"):
        ovam.generate(PROMPT, guidance_scale=1, num_inference_steps=1, width=64, height=64, features=True)
    with pytest.raises(InputError, match="multiples of 64"):
        ovam.generate(PROMPT, num_inference_steps=1, width=72, height=64, features=True)
    with pytest.raises(InputError, match=r"method '<class"):
        ovam.segment(picture, "cat", method=GroundedDiffusion)
    with pytest.raises(InputError, match=r"method '5'"):
        ovam.segment(picture, "cat", method=5)
    assert layout_of(ovam.pipe) == TINY
    assert layout_of(tiny) is None


def test_without_guidance_nothing_is_recorded(ovam):
    with pytest.raises(InputError, match="unconditional half"), record_features(ovam.pipe):
        ovam.pipe(PROMPT, num_inference_steps=1, guidance_scale=1.0, height=64, width=64)


def test_a_wide_picture(ovam, methods):
    wide = ovam.generate(PROMPT, num_inference_steps=1, guidance_scale=4, width=128, height=64, features=True)
    for method in methods.values():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = ovam.segment(wide, "cat", method=method)
        assert found.masks.shape == (1, 64, 128)


def test_another_last_timestep_is_told(ovam, picture, methods):
    late = replace(picture, features=replace(picture.features, timestep=21))
    with pytest.warns(UserWarning, match="trained on timestep 1.*ended at 21"):
        ovam.segment(late, "cat", method=methods["grounded"])


# --------------------------------------------------------------------------------------------- the command line


def test_on_the_command_line(ovam, files, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "model"
    ovam.pipe.save_pretrained(folder)
    monkeypatch.setitem(GroundedDiffusion.__init__.__kwdefaults__, "layout", TINY)
    token = Token(torch.randn(1, EMBED), ("bus",), "model", "unconditional")
    token.save(tmp_path / "bus.safetensors")
    out, again, more = (str(tmp_path / name) for name in ("out", "again", "more"))
    run = ["--model", str(folder), "--device", "cpu"]
    asked = [*run, "--words", "cat", "--token", str(tmp_path / "bus.safetensors"), "--method", "grounded-diffusion"]
    weights, kept = ["--weights", str(files["grounded"])], str(tmp_path / "cat.safetensors")
    made = ["generate", PROMPT, "--steps", "2", "--size", "64x64", "--recording", kept, "--out", out]
    assert main([*made, *asked, *weights]) == 0
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert settings["maps"]["method"] == "Grounded Diffusion"
    assert settings["maps"]["tau"] == 0.5

    assert main(["generate", "--settings", f"{out}/settings.json", "--out", again, "--device", "cpu", *weights]) == 0
    for name in ("image.png", "heatmaps.npz", "mask_cat.png", "mask_bus.png"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    assert main(["segment", kept, "--out", more, *asked, *weights]) == 0
    with np.load(tmp_path / "more" / "heatmaps.npz") as here, np.load(tmp_path / "out" / "heatmaps.npz") as there:
        assert np.array_equal(here["maps"], there["maps"])

    capsys.readouterr()
    for arguments, part in (
        ([*made, *asked], "yours to bring"),
        (["generate", "--settings", f"{out}/settings.json", "--out", again], "yours to bring"),
        ([*made, *run, "--words", "cat", *weights], "OVAM takes no weights"),
        ([*made, *asked, "--weights", str(tmp_path / "nothing.pth")], "no file"),
        ([*made, *asked, "--weights", str(files["datasetdm"])], "lacks 'mlp"),
        (["photo", f"{out}/image.png", "--out", out, *asked, *weights], "not of a photograph"),
    ):
        assert main(arguments) == 2
        said = capsys.readouterr().err.strip()
        assert part in said
        assert said.count("\n") == 0


def test_by_name_with_weights(files, monkeypatch):
    monkeypatch.setitem(GroundedDiffusion.__init__.__kwdefaults__, "layout", TINY)  # all systems share it
    assert with_weights("datasetdm", files["datasetdm"]).name == "DatasetDM"
    assert with_weights("grounded diffusion", files["grounded"]).name == "Grounded Diffusion"
    with pytest.raises(InputError, match="takes no weights"):
        with_weights("OVAM", files["grounded"])
    assert SegmentSettings(("cat",)).to_json()["method"] == "OVAM"
