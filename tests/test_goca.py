"""GoCA: every step against plain loops over its formula; the recorder against the attention modules themselves."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from pipelines import CROSS, make_pipe
from reference import Spy, generate, probabilities

from ovam_core import heatmaps, record
from ovam_core.attention.goca import (
    ATTENTION_BLOCK,
    GocaOptions,
    SelfLayer,
    aggregate,
    attribute_weighted,
    blur_size,
    cross_attention,
    even_rows,
    gaussian_blur,
    goca,
    head_weights,
    label_pixels,
    layer_map,
    layer_weights,
    min_max,
    propagate,
    reference_affinity,
    rescale,
    resized_self_attention,
    token_scores,
)
from ovam_core.attention.heatmap import AttributionPrompt, layer_keys
from ovam_core.errors import InputError
from ovam_core.hooks.goca_recorder import record_goca
from ovam_core.query import (
    attribute_sentence,
    attribute_words,
    background_words,
    caption_words,
    encode_padded,
    listed_words,
    words_in_sentence,
)

PROMPT = "a photograph of the cat"
SIZE = (16, 24)
MIDDLE = "mid_block.attentions.0.transformer_blocks.0.attn2"
PLAIN = GocaOptions(heads=False, layers=False, rescale=False, blur=0, propagations=0)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_self_layer(height, width, heads=2, d=3, seed=0):
    queries, keys = noise(2, heads, height * width, d, seed=seed)
    return SelfLayer("one", height, width, queries, keys, d**-0.5)


def full_attention(layer):
    """Head-averaged self-attention `[n, n]`."""
    heads = [torch.softmax(q @ k.T * layer.scale, dim=-1) for q, k in zip(layer.queries, layer.keys, strict=True)]
    return sum(heads) / len(heads)


# Step 1: heads


def test_head_weights_are_the_formula():
    hidden, projections = noise(3, 5, 4), noise(3, 4, 6, seed=1)
    weights = head_weights(hidden, projections)
    for pixel in range(5):
        added = [hidden[n, pixel] @ projections[n] for n in range(3)]  # O_n
        output = sum(added)
        agreement = [float(torch.dot(x, output)) for x in added]
        expected = torch.tensor([x / sum(agreement) for x in agreement])
        torch.testing.assert_close(weights[:, pixel], expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(weights.sum(dim=0), torch.ones(5), atol=1e-5, rtol=0)
    assert weights.min() < 0  # not clamped


def test_heads_that_add_nothing_weigh_the_same():
    hidden = noise(4, 3, 2)
    hidden[:, 1] = 0
    weights = head_weights(hidden, noise(4, 2, 5, seed=1))
    assert torch.equal(weights[:, 1], torch.full((4,), 0.25))
    assert weights.isfinite().all()


def test_layer_map_is_the_weighted_sum_of_heads():
    attention, weights = noise(3, 4, 5).softmax(dim=1), noise(3, 5, seed=1)
    maps = layer_map(attention, weights)
    for token in range(4):
        for pixel in range(5):
            expected = sum(float(weights[n, pixel] * attention[n, token, pixel]) for n in range(3))
            assert maps[token, pixel].item() == pytest.approx(expected, abs=1e-5)


# Step 2: layers


def test_reference_affinity_is_the_formula():
    features = noise(6, 5)
    affinity = reference_affinity(features)
    for p in range(6):
        values = [math.exp(float(features[p] @ features[q]) / math.sqrt(5)) for q in range(6)]
        torch.testing.assert_close(affinity[p], torch.tensor(values) / sum(values), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(("grid", "size"), [((4, 6), (2, 3)), ((2, 3), (4, 6)), ((3, 5), (3, 5)), ((5, 3), (3, 2))])
@pytest.mark.parametrize("block", [1, 1 << 20])
def test_resized_self_attention(grid, size, block, monkeypatch):
    monkeypatch.setitem(ATTENTION_BLOCK, "cpu", block)
    layer = make_self_layer(*grid)
    found = resized_self_attention(layer, size)
    evened = even_rows(found)
    attention = rearrange(full_attention(layer), "q (h w) -> q 1 h w", h=grid[0])
    keys = F.interpolate(attention, size=size, mode="bilinear", align_corners=False).flatten(1)
    for y in range(size[0]):
        for x in range(size[1]):
            nearest = (y * grid[0] // size[0]) * grid[1] + x * grid[1] // size[1]
            torch.testing.assert_close(found[y * size[1] + x], keys[nearest], atol=1e-6, rtol=1e-5)
            expected = keys[nearest] / keys[nearest].sum()
            torch.testing.assert_close(evened[y * size[1] + x], expected, atol=1e-6, rtol=1e-5)


def test_with_even_rows_a_layers_weight_does_not_depend_on_its_grid():
    """The same attention on a grid twice as fine counts as much, but for what bilinear resizing blurs; as published a
    quarter.
    """
    coarse = make_self_layer(4, 4)
    even = SelfLayer("even", 4, 4, torch.zeros(1, 16, 2), torch.zeros(1, 16, 2), 1.0)
    finer = SelfLayer("finer", 8, 8, torch.zeros(1, 64, 2), torch.zeros(1, 64, 2), 1.0)
    affinity = reference_affinity(noise(16, 3))
    sizes = [resized_self_attention(x, (4, 4)) for x in (even, finer, coarse)]
    weights = layer_weights(affinity, map(even_rows, sizes))
    assert weights[0].item() == pytest.approx(weights[1].item(), rel=1e-5)
    published = layer_weights(affinity, sizes)
    assert published[0].item() == pytest.approx(4 * published[1].item(), rel=1e-5)


def test_layer_weights_are_the_formula():
    affinity = noise(6, 6).softmax(dim=-1)
    attentions = [noise(6, 6, seed=seed).softmax(dim=-1) for seed in (1, 2, 3)]
    sums = [sum(float(affinity[p, q] * s[p, q]) for p in range(6) for q in range(6)) for s in attentions]
    weights = layer_weights(affinity, iter(attentions))
    torch.testing.assert_close(weights, torch.tensor(sums) / sum(sums), atol=1e-6, rtol=1e-5)
    assert weights.sum().item() == pytest.approx(1, abs=1e-6)


def test_aggregate_is_the_formula():
    maps = [noise(3, 2, 3), noise(3, 4, 6, seed=1)]
    found = aggregate(maps, [0.3, 0.7], (4, 6))
    resized = F.interpolate(maps[0][None], size=(4, 6), mode="bilinear", align_corners=False)[0]
    for y in range(4):
        for x in range(6):
            scores = [max(0.0, float(0.3 * resized[k, y, x] + 0.7 * maps[1][k, y, x])) for k in range(3)]
            expected = [s / sum(scores) for s in scores] if sum(scores) else [1 / 3] * 3
            torch.testing.assert_close(found[:, y, x], torch.tensor(expected), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.sum(dim=0), torch.ones(4, 6), atol=1e-5, rtol=0)


# Steps 3 and 4


def test_rescaled_scores_sum_to_one():
    scores = noise(4, 3, 5).softmax(dim=0)
    content = rescale(scores[[1, 2]])
    torch.testing.assert_close(content.sum(dim=0), torch.ones(3, 5), atol=1e-6, rtol=0)
    torch.testing.assert_close(content[0], scores[1] / (scores[1] + scores[2]), atol=1e-6, rtol=1e-5)
    assert torch.equal(rescale(torch.zeros(2, 1, 1)), torch.full((2, 1, 1), 0.5))


@pytest.mark.parametrize("size", [1, 3, 5])
def test_blur_is_a_gaussian(size):
    maps = noise(2, 4, 6)
    found, reach = gaussian_blur(maps, size), size // 2
    sigma = 0.3 * ((size - 1) * 0.5 - 1) + 0.8
    for y in range(4):
        for x in range(6):
            total, weight = 0.0, 0.0
            for dy in range(-reach, reach + 1):
                for dx in range(-reach, reach + 1):
                    w = math.exp(-(dy * dy + dx * dx) / (2 * sigma**2))
                    total += w * float(maps[1, min(max(y + dy, 0), 3), min(max(x + dx, 0), 5)])
                    weight += w
            assert found[1, y, x].item() == pytest.approx(total / weight, abs=1e-5)


def test_blur_follows_the_grid():
    assert [blur_size(5, side) for side in (8, 16, 32, 64, 96, 128)] == [1, 1, 3, 5, 7, 9]
    assert blur_size(0, 64) == 1
    with pytest.raises(InputError, match="odd"):
        gaussian_blur(noise(1, 4, 4), 4)


def test_min_max():
    maps = torch.stack([noise(3, 4), torch.full((3, 4), 0.5)])
    found = min_max(maps)
    torch.testing.assert_close(found[0], (maps[0] - maps[0].min()) / (maps[0].max() - maps[0].min()))
    assert torch.equal(found[1], torch.zeros(3, 4))


@pytest.mark.parametrize("block", [1, 1 << 20])
def test_propagate_multiplies_by_the_mean_attention(block, monkeypatch):
    monkeypatch.setitem(ATTENTION_BLOCK, "cpu", block)
    layers = [make_self_layer(3, 4, seed=seed) for seed in (1, 2)]
    maps = noise(2, 3, 4).abs()
    mean = (full_attention(layers[0]) + full_attention(layers[1])) / 2
    once = torch.stack([sum(mean[:, q] * m.flatten()[q] for q in range(12)) for m in maps])
    twice = torch.stack([mean @ m for m in once])
    for times, expected in ((1, once), (2, twice)):
        torch.testing.assert_close(
            propagate(maps, layers, times), min_max(expected.reshape(2, 3, 4)), atol=1e-5, rtol=1e-4
        )


def test_propagation_with_the_identity_changes_nothing():
    pixels = torch.eye(12)[None] * 100
    identity = SelfLayer("identity", 3, 4, pixels, pixels, 1.0)
    maps = min_max(noise(2, 3, 4))
    torch.testing.assert_close(propagate(maps, [identity], 5), maps)


@pytest.mark.parametrize("offset", [0.0, 0.3])
def test_label_pixels(offset):
    objects, backgrounds = noise(3, 4, 5).sigmoid(), noise(2, 4, 5, seed=1).sigmoid()
    labels, alone = label_pixels(objects, backgrounds, offset), label_pixels(objects, backgrounds[:0], offset)
    for y in range(4):
        for x in range(5):
            scores = [max(backgrounds[:, y, x].tolist()) + offset, *objects[:, y, x].tolist()]
            assert labels[y, x] == scores.index(max(scores))
            scores[0] = offset
            assert alone[y, x] == scores.index(max(scores))


# The recorder, against the modules


class Projected:
    """What every cross-attention's output projection made, bias included."""

    def __init__(self, pipe):
        self.modules = {n: m for n, m in pipe.unet.named_modules() if n.endswith("attn2")}
        self.outputs = {}

    def __enter__(self):
        def listen(name):
            def hook(module, args, output):
                self.outputs.setdefault(name, []).append(output.clone())

            return hook

        self.handles = [x.to_out[0].register_forward_hook(listen(n)) for n, x in self.modules.items()]
        return self

    def __exit__(self, *error):
        for handle in self.handles:
            handle.remove()


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def run(request):
    pipe = make_pipe(request.param)
    with (
        Spy(pipe, middle=True) as cross,
        Spy(pipe, "attn1", middle=True) as own,
        Projected(pipe) as projected,
        record(pipe) as r,
        record_goca(pipe, step=1) as g,
    ):
        image = generate(pipe)
    return pipe, r.recordings[0], g.recordings[0], cross, own, projected, image


def head_parts(module, pixels, text):
    """O_n of each head from the module's own weights: `[heads, n, C]`."""
    values = module.to_v(text)
    d = values.shape[1] // module.heads
    weight = module.to_out[0].weight
    attention = probabilities(module, pixels, text)
    return torch.stack(
        [attention[n] @ values[:, n * d : (n + 1) * d] @ weight[:, n * d : (n + 1) * d].T for n in range(module.heads)]
    )


@torch.no_grad()
def test_contributions_of_heads_sum_to_the_layers_output(run):
    _, _, seen, cross, _, projected, _ = run
    assert [x.layer.name for x in seen.layers] == list(cross.modules)
    for one in seen.layers:
        module = cross.modules[one.layer.name]
        pixels, text = (x[1] for x in cross.seen[one.layer.name][1])  # step 1, conditional half
        parts = head_parts(module, pixels, text)
        output = projected.outputs[one.layer.name][1][1] - module.to_out[0].bias
        torch.testing.assert_close(parts.sum(dim=0), output, atol=1e-5, rtol=1e-4)
        agreement = (parts * output).sum(dim=-1)
        torch.testing.assert_close(one.heads, agreement / agreement.sum(dim=0), atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(one.heads.sum(dim=0), torch.ones(len(pixels)), atol=1e-4, rtol=0)


@torch.no_grad()
def test_cross_attention_is_the_modules_own(run):
    pipe, _, seen, cross, _, _, _ = run
    other = attribute_words(pipe, ["red bus"])[0].embedding
    for one in seen.layers:
        module, (pixels, text) = cross.modules[one.layer.name], cross.seen[one.layer.name][1]
        for embedding in (text[1], other):
            found = cross_attention(one.layer.queries[0], layer_keys(one.layer, embedding))
            expected = probabilities(module, pixels[1], embedding)
            torch.testing.assert_close(rearrange(found, "h l n -> h n l"), expected, atol=1e-5, rtol=0)


GRIDS = {16 * 24: (16, 24), 8 * 12: (8, 12), 4 * 6: (4, 6)}


def plain_weights(cross, own, reference, item=1, step=1):
    """Layer weights, rows of S summing to one, from the spies alone."""
    grids = GRIDS
    features = cross.modules[reference].to_q(cross.seen[reference][step][0][item])
    affinity = torch.softmax(features @ features.T / features.shape[1] ** 0.5, dim=-1)
    size = grids[len(features)]
    sums = []
    for name, calls in own.seen.items():
        pixels = calls[step][0][item]
        attention, grid = probabilities(own.modules[name], pixels, pixels).mean(dim=0), grids[len(pixels)]
        keys = F.interpolate(attention.reshape(-1, 1, *grid), size=size, mode="bilinear")
        both = F.interpolate(keys.flatten(1).T.reshape(1, -1, *grid), size=size, mode="nearest")[0].flatten(1).T
        sums.append((affinity * (both / both.sum(dim=1, keepdim=True))).sum())
    return torch.stack(sums) / sum(sums)


@torch.no_grad()
def test_layer_weights_of_a_pass(run):
    _, _, seen, cross, own, _, _ = run
    assert seen.reference == "up_blocks.1.attentions.1.transformer_blocks.0.attn2"
    assert (seen.height, seen.width) == SIZE
    weights = torch.tensor([x.weight for x in seen.layers])
    torch.testing.assert_close(weights, plain_weights(cross, own, seen.reference), atol=1e-5, rtol=1e-4)
    assert weights.sum().item() == pytest.approx(1, abs=1e-5)
    fine = [x.name for x in seen.finest]
    assert fine == [x.layer.name for x in seen.layers if (x.layer.height, x.layer.width) == SIZE]


@torch.no_grad()
def test_all_of_goca_against_the_modules(run):
    """From the pixels and texts that the modules were given to the maps, in plain steps."""
    pipe, _, seen, cross, own, _, _ = run
    asked = caption_words(pipe, PROMPT, ["cat", "photograph"])
    total = 0
    for name, weight in zip(cross.modules, plain_weights(cross, own, seen.reference), strict=True):
        pixels, text = (x[1] for x in cross.seen[name][1])
        parts = head_parts(cross.modules[name], pixels, text)
        agreement = (parts * parts.sum(dim=0)).sum(dim=-1)
        attention = probabilities(cross.modules[name], pixels, text)
        maps = (attention * (agreement / agreement.sum(dim=0))[..., None]).sum(dim=0).T
        grid = GRIDS[len(pixels)]
        total = total + weight * F.interpolate(maps.reshape(1, -1, *grid), size=SIZE, mode="bilinear")[0]
    total = total.clamp(min=0)
    scores = total / total.sum(dim=0)
    rows = [row for group in asked.groups for row in group]
    content = scores[rows] / scores[rows].sum(dim=0)
    maps = torch.stack([content[[rows.index(row) for row in group]].mean(dim=0) for group in asked.groups])
    maps = min_max(gaussian_blur(maps, blur_size(5, 24)))
    finest = [x.name.replace("attn2", "attn1") for x in seen.finest]
    pixels = {name: own.seen[name][1][0][1] for name in finest}
    mean = sum(probabilities(own.modules[x], pixels[x], pixels[x]).mean(dim=0) for x in finest) / len(finest)
    for _ in range(2):
        maps = (mean @ maps.flatten(1).T).T.reshape(2, *SIZE)
    found = goca(seen, asked)
    assert found.shape == (2, *SIZE)
    torch.testing.assert_close(found, min_max(maps), atol=5e-3, rtol=0)


def test_without_its_parts_it_is_ovam(tiny):
    """The same number of heads in every layer: plain means over heads and layers are the mean over all maps."""
    with record(tiny, steps=[1]) as r, record_goca(tiny, step=1, layers=["down_blocks", "up_blocks"]) as g:
        generate(tiny)
    embedding = encode_padded(tiny, "the red bus")
    torch.testing.assert_close(
        token_scores(g.recordings[0], embedding, PLAIN),
        heatmaps(r.recordings[0], embedding),
        atol=1e-5,
        rtol=0,
    )


def test_words_that_are_not_in_the_caption(run):
    pipe, _, seen, *_ = run
    with pytest.raises(InputError, match="does not stand"):
        caption_words(pipe, PROMPT, ["bus"])
    joint = goca(seen, listed_words(pipe, PROMPT, ["red bus", "car", "cat"]))
    alone = goca(seen, attribute_words(pipe, ["red bus", "car", "cat"]))
    for maps in (joint, alone):
        assert maps.shape == (3, *SIZE)
        assert torch.equal(maps.amin(dim=(1, 2)), torch.zeros(3))
        assert torch.equal(maps.amax(dim=(1, 2)), torch.ones(3))
    asked = attribute_words(pipe, ["red bus", "car"])
    scores = [token_scores(seen, one.embedding) for one in asked]
    expected = torch.stack([x[list(one.groups[0])].mean(dim=0) for x, one in zip(scores, asked, strict=True)])
    torch.testing.assert_close(attribute_weighted(seen, asked), expected)


def test_a_token_and_its_background(run):
    """Both rows of a token are content: their scores sum to one before they are rescaled."""
    _, _, seen, *_ = run
    token = AttributionPrompt(noise(2, 32), ("cat", "background"), ((1,), (0,)))
    whole, unscaled = (goca(seen, token, GocaOptions(rescale=rescaled)) for rescaled in (True, False))
    torch.testing.assert_close(whole, unscaled, atol=1e-4, rtol=0)
    cat = attribute_weighted(seen, AttributionPrompt(token.embedding, ("cat",), ((1,),)))
    torch.testing.assert_close(cat[0], token_scores(seen, token.embedding)[1])


def test_words_for_the_background():
    assert background_words("A photograph of a cat and a red Bus on the grass", ["cat"]) == (
        "red",
        "bus",
        "grass",
    )
    assert background_words("A photograph of a cat", ["cat"]) == ("photograph",)
    assert background_words("a dining table next to a cat", ["Dining Table", "cat"]) == ()
    assert background_words("", ["cat"]) == ()


# Nothing changes


def hooks_of(pipe) -> int:
    return sum(len(x._forward_hooks) + len(x._forward_pre_hooks) for x in pipe.unet.modules())


@pytest.mark.parametrize("shape", ["sd1", "sd2"])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_image_is_unchanged(shape, guidance):
    pipe = make_pipe(shape)
    plain = generate(pipe, guidance=guidance)
    with record_goca(pipe) as g, record(pipe):
        image = generate(pipe, guidance=guidance)
    assert torch.equal(torch.as_tensor(plain), torch.as_tensor(image))
    assert len(g.recordings) == 1
    assert hooks_of(pipe) == 0


def test_hooks_are_gone_after_an_exception(fresh):
    recorder = record_goca(fresh)

    def stopped():
        assert hooks_of(fresh) > 0
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), recorder:
        stopped()
    assert hooks_of(fresh) == 0
    assert recorder.recordings == []
    with pytest.raises(InputError, match="already in use"), recorder, recorder:
        pass
    assert hooks_of(fresh) == 0


def test_the_step_of_little_noise(tiny):
    with record(tiny) as r, record_goca(tiny) as g:
        generate(tiny, steps=7)
    at = min(r.recordings[0].timesteps, key=lambda t: abs(t - 100))
    assert g.recordings[0].timestep == at
    row = r.recordings[0].timesteps.index(at)
    mine = {x.layer.name: x.layer for x in g.recordings[0].layers}
    assert mine.keys() - {x.name for x in r.recordings[0].layers} == {MIDDLE}
    for theirs in r.recordings[0].layers:
        assert torch.equal(mine[theirs.name].queries[0], theirs.queries[row])


@pytest.mark.parametrize("branch", ["conditional", "unconditional"])
def test_branches_and_several_images(tiny, branch):
    with record(tiny, steps=[0], branch=branch) as r, record_goca(tiny, step=0, branch=branch) as g:
        generate(tiny, ["the cat", "a car"], steps=2)
    assert len(g.recordings) == 2
    for mine, theirs in zip(g.recordings, r.recordings, strict=True):
        own = {x.layer.name: x.layer for x in mine.layers}
        assert all(torch.equal(own[layer.name].queries, layer.queries) for layer in theirs.layers)
    assert not torch.equal(g.recordings[0].layers[0].heads, g.recordings[1].layers[0].heads)


@pytest.mark.parametrize(("height", "width"), [(16, 24), (17, 10)])
def test_direct_calls_of_the_unet(tiny, height, width):
    latents = noise(2, 4, height, width)
    text = torch.stack([encode_padded(tiny, "the cat")] * 2)
    with torch.no_grad(), record_goca(tiny, branch="all") as together:
        tiny.unet(latents, torch.tensor([100, 300]), encoder_hidden_states=text)
    assert [x.timestep for x in together.recordings] == [100, 300]
    for image, at in enumerate((100, 300)):
        with torch.no_grad(), record_goca(tiny, branch="all") as alone:
            tiny.unet(latents[image : image + 1], at, encoder_hidden_states=text[:1])
        asked = listed_words(tiny, "", ["cat", "car"])
        maps = [goca(x, asked) for x in (together.recordings[image], alone.recordings[0])]
        assert maps[0].shape == (2, height, width)
        torch.testing.assert_close(*maps, atol=1e-3, rtol=0)


def test_chosen_layers_and_reference(tiny):
    with record_goca(tiny, layers=["down_blocks.0"], reference="down_blocks.1") as g:
        generate(tiny, steps=2)
    seen = g.recordings[0]
    assert [x.layer.name for x in seen.layers] == ["down_blocks.0.attentions.0.transformer_blocks.0.attn2"]
    assert seen.reference == "down_blocks.1.attentions.0.transformer_blocks.0.attn2"
    assert seen.layers[0].weight == pytest.approx(1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(fresh, dtype):
    fresh.to(dtype=dtype)
    plain = generate(fresh, steps=2)
    with record_goca(fresh) as g:
        image = generate(fresh, steps=2)
    assert torch.equal(torch.as_tensor(plain), torch.as_tensor(image))
    seen = g.recordings[0]
    assert seen.layers[0].layer.queries.dtype == seen.finest[0].keys.dtype == dtype
    assert seen.layers[0].heads.dtype == torch.float32
    maps = goca(seen, caption_words(fresh, PROMPT, ["cat", "photograph"]))
    assert maps.dtype == torch.float32
    assert maps.isfinite().all()


@torch.no_grad()
def test_lora_on_the_output_projection(fresh):
    peft = pytest.importorskip("peft")
    fresh.unet.add_adapter(
        peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_out.0"], init_lora_weights="gaussian")
    )
    for name, parameter in fresh.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(0))
    with Spy(fresh) as spy, record_goca(fresh, step=0) as g:
        generate(fresh, steps=1)
    one = g.recordings[0].layers[0]
    module, (pixels, text) = spy.modules[one.layer.name], spy.seen[one.layer.name][0]
    hidden = rearrange(probabilities(module, pixels[1], text[1]), "h n l -> h n l") @ rearrange(
        module.to_v(text[1]), "l (h d) -> h l d", h=module.heads
    )
    project, empty = module.to_out[0], torch.zeros(1, hidden.shape[0] * hidden.shape[2])
    parts = []
    for n in range(module.heads):
        lone = torch.zeros_like(hidden)
        lone[n] = hidden[n]
        parts.append(project(rearrange(lone, "h n d -> n (h d)")) - project(empty))
    agreement = (torch.stack(parts) * sum(parts)).sum(dim=-1)
    torch.testing.assert_close(one.heads, agreement / agreement.sum(dim=0), atol=1e-3, rtol=1e-3)


def test_memory_is_what_nbytes_says(tiny):
    with record_goca(tiny) as g:
        generate(tiny, ["the cat", "a car"])
    for seen in g.recordings:
        tensors = [t for x in seen.layers for t in (x.layer.queries, x.heads)]
        tensors += [t for x in seen.finest for t in (x.queries, x.keys)]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        assert sum(storages.values()) == seen.nbytes == seen.to("cpu").nbytes


# Other families


@pytest.mark.parametrize(("family", "size"), [("sdxl", (8, 12)), ("pixart-alpha", (8, 12))])
@torch.no_grad()
def test_other_families(family, size):
    pipe = CROSS[family]()
    pipe.set_progress_bar_config(disable=True)
    options = {"use_resolution_binning": False} if family.startswith("pixart") else {}
    plain = generate(pipe, **options)
    with record(pipe, steps=[1]) as r, record_goca(pipe, step=1) as g:
        image = generate(pipe, **options)
    assert torch.equal(torch.as_tensor(plain), torch.as_tensor(image))
    seen = g.recordings[0]
    mine = {x.layer.name: x.layer for x in seen.layers}
    assert all(torch.equal(mine[theirs.name].queries, theirs.queries) for theirs in r.recordings[0].layers)
    for one in seen.layers:
        torch.testing.assert_close(one.heads.sum(dim=0), torch.ones(one.heads.shape[1]), atol=1e-3, rtol=0)
    assert sum(x.weight for x in seen.layers) == pytest.approx(1, abs=1e-5)
    if family == "sdxl":
        assert seen.reference == "up_blocks.1.attentions.0.transformer_blocks.0.attn2"
    assert goca(seen, caption_words(pipe, PROMPT, ["cat", "photograph"])).shape == (2, *size)
    assert goca(seen, listed_words(pipe, PROMPT, ["red bus", "car"])).shape == (2, *size)


# Refusals


def test_what_cannot_be_recorded_or_asked(tiny, run):
    from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel

    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    with pytest.raises(InputError, match="not a text-to-image pipeline"):
        record_goca(DDPMPipeline(unet, DDIMScheduler()))
    with pytest.raises(InputError, match="branch is"):
        record_goca(tiny, branch="both")
    with pytest.raises(InputError, match="No layer matches nowhere"):
        record_goca(tiny, layers="nowhere")
    with pytest.raises(InputError, match="wanted call was not among them"), record_goca(tiny, step=9):
        generate(tiny, steps=2)
    pipe, _, seen, *_ = run
    with pytest.raises(InputError, match="compares words"):
        goca(seen, words_in_sentence(pipe, "the cat", ["cat"]))
    with pytest.raises(InputError, match="no word"):
        goca(seen, [])
    with pytest.raises(InputError, match=r"takes \[tokens, 32\]"):
        goca(seen, AttributionPrompt(noise(2, 31), ("a", "b"), ((0,), (1,))))
    sentence = attribute_sentence(pipe, "the cat")
    torch.testing.assert_close(token_scores(seen, sentence.embedding).sum(dim=0), torch.ones(SIZE), atol=1e-5, rtol=0)
