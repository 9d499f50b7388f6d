"""Rows carry their step; keys are those of the run, whatever is set, moved or stored otherwise."""

from __future__ import annotations

import contextlib
import copy
import warnings

import pytest
import torch
from diffusers import FirstBlockCacheConfig, HeunDiscreteScheduler, PyramidAttentionBroadcastConfig
from diffusers.hooks import apply_pyramid_attention_broadcast
from diffusers.models.attention_processor import (
    AttnProcessor2_0,
    CustomDiffusionAttnProcessor,
    CustomDiffusionAttnProcessor2_0,
    CustomDiffusionXFormersAttnProcessor,
    SD3IPAdapterJointAttnProcessor2_0,
)
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from pipelines import pipe_of
from reference import Spy, generate, triple_loop
from torch import nn

from ovam_core import InputError, Picture, heatmaps, record
from ovam_core.attention.goca import goca
from ovam_core.attention.heatmap import attribute
from ovam_core.attention.mask import self_attention_map
from ovam_core.hooks.goca_recorder import record_goca
from ovam_core.models.reading import read_as
from ovam_core.models.registry import adapter_of
from ovam_core.optimization import initial_embedding, optimize
from ovam_core.ovam import OVAM
from ovam_core.query import attribute_sentence, attribute_words, encode_padded
from ovam_core.settings import OptimizeSettings

PROMPT = "a photograph of the cat"
BINNED = ("pixart-alpha", "sana", "sana-1.5", "hunyuan")


def draw(name, pipe, side=64, steps=2):
    more = {"use_resolution_binning": False} if name in BINNED else {}
    generator = torch.Generator().manual_seed(0)
    pipe(prompt=PROMPT, num_inference_steps=steps, height=side, width=side, generator=generator, **more)


GRIDS = {16 * 24: (16, 24), 8 * 12: (8, 12)}
SIZE = (16, 24)
DEEP = "down_blocks.1"


def cached(pipe, skipped):
    """As DeepCache does: at the steps `skipped` a block gives what it gave before."""
    block, number, before = dict(pipe.unet.named_modules())[DEEP], iter(range(100)), []
    forward = block.forward

    def skipping(*args, **kwargs):
        if next(number) in skipped:
            return before[0]
        before[:] = [forward(*args, **kwargs)]
        return before[0]

    block.forward = skipping


def recorded(pipe, **options):
    with Spy(pipe) as spy, record(pipe, **options) as r:
        generate(pipe, PROMPT, steps=4)
    return r.recordings[0], spy


# ------------------------------------------------------------------------------------------------ steps


@pytest.mark.parametrize("skipped", [(1, 3), (2,), (1, 2, 3)])
def test_layers_that_a_cache_skips(fresh, skipped):
    cached(fresh, skipped)
    recording, spy = recorded(fresh)
    embedding = encode_padded(fresh, PROMPT)
    layer = next(x for x in recording.layers if x.name.startswith(DEEP))
    kept = tuple(x for x in range(4) if x not in skipped)
    assert layer.steps == kept
    assert len(layer.queries) == len(kept)
    weight = {x.name: x.queries.shape[1] for x in recording.layers}

    def mean(part):
        """From the spy: all maps of the layers at the steps that they have."""
        total = count = 0
        for name, calls in spy.seen.items():
            own = kept if name.startswith(DEEP) else range(4)
            rows = [row for row, step in enumerate(own) if step in part]
            assert len(calls) == len(own)
            if rows:
                maps = len(rows) * weight[name]
                total = total + triple_loop(spy, 1, GRIDS, SIZE, embedding, rows, [name]) * maps
                count += maps
        return total / count

    torch.testing.assert_close(heatmaps(recording, embedding), mean(range(4)), atol=1e-5, rtol=0)
    for step in range(4):
        if step in skipped:
            with pytest.warns(UserWarning, match=f"from a cache at the steps {step}, .*{layer.name}"):
                part = recording.select(steps=[step])
            with pytest.raises(InputError, match=f"from a cache at the steps {step}: choose among {kept[0]}"):
                recording.select(steps=[step], layers=[DEEP])
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                part = recording.select(steps=[step])
        assert part.step_indices == (step,)
        assert all(x.steps == (step,) for x in part.layers)
        torch.testing.assert_close(heatmaps(part, embedding), mean([step]), atol=1e-5, rtol=0)
    assert recording.select(steps=[0, 2, 3]).select(steps=[0]).timesteps == recording.timesteps[:1]


def test_steps_of_a_cache_at_recording(fresh):
    cached(fresh, (1, 2))
    recording, _ = recorded(fresh, steps=[1, 3])
    assert {x.name.startswith(DEEP): x.steps for x in recording.layers} == {True: (3,), False: (1, 3)}
    cached(fresh, (1, 2))
    recording, _ = recorded(fresh, steps=[1])
    assert not any(x.name.startswith(DEEP) for x in recording.layers)


def test_broadcast_attention_skips_self_and_cross_attentions(fresh):
    """diffusers' PAB: self-attention every second step, cross-attention every third."""
    apply_pyramid_attention_broadcast(
        fresh.unet,
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            cross_attention_block_skip_range=3,
            spatial_attention_timestep_skip_range=(-1, 2000),
            cross_attention_timestep_skip_range=(-1, 2000),
            spatial_attention_block_identifiers=("attentions",),
            cross_attention_block_identifiers=("attentions",),
            current_timestep_callback=lambda: 500,
        ),
    )
    recording, spy = recorded(fresh)
    steps = {x.steps for x in recording.layers}
    assert steps == {(0, 3)}
    assert {x.steps for x in recording.column_sums} == {(0, 2)}
    embedding = encode_padded(fresh, PROMPT)
    for step in (0, 3):  # the spy hears the modules, which are called each time
        found = heatmaps(recording.select(steps=[step]), embedding)
        torch.testing.assert_close(found, triple_loop(spy, 1, GRIDS, SIZE, embedding, [step]), atol=1e-5, rtol=0)
    with pytest.raises(InputError, match="no self-attention"):
        self_attention_map(recording.select(steps=[3]), 0.5)
    assert self_attention_map(recording, 0.5).min() == 0.5


def test_joint_blocks_that_a_cache_skips():
    """diffusers' first-block cache: at the last step only the first block runs, and words go no further there."""
    pipe = copy.deepcopy(pipe_of("flux-dev"))

    def run(**options):
        with record(pipe, **options) as r:
            pipe(PROMPT, num_inference_steps=3, height=32, width=32, generator=torch.Generator().manual_seed(0))
        return r.recordings[0]

    plain = run()
    vars(pipe.transformer).pop("_diffusers_hook")  # diffusers 0.38 lists the hooks of the blocks once, at the first run
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    recording = run()
    first, *others = recording.layers
    assert first.steps == (0, 1, 2)
    assert {x.steps for x in others} == {(0,)}
    prompts = attribute_words(pipe, ["cat", "bus"])
    torch.testing.assert_close(
        attribute(recording.select(steps=[0]), prompts), attribute(plain.select(steps=[0]), prompts), atol=1e-6, rtol=0
    )
    with pytest.warns(UserWarning, match="from a cache at the steps 1"):
        second = recording.select(steps=[1])
    assert [x.name for x in second.layers] == [first.name]
    assert attribute(second, prompts).shape == (2, second.height, second.width)
    assert attribute(recording, prompts).isfinite().all()


def test_half_of_a_batch_that_a_cache_leaves_out(fresh):
    """As FasterCache does: behind the denoiser's first lines, the conditional half goes on alone."""
    forward, calls = fresh.unet.forward, iter(range(100))

    def halved(sample, timestep, encoder_hidden_states, **kwargs):
        kwargs.pop("return_dict")
        if next(calls) not in (1, 3):
            return forward(sample, timestep, encoder_hidden_states, **kwargs, return_dict=False)
        half = forward(sample.chunk(2)[1], timestep, encoder_hidden_states.chunk(2)[1], **kwargs, return_dict=False)
        return (torch.cat([half[0]] * 2),)

    fresh.unet.forward = halved
    recording, spy = recorded(fresh)
    embedding = encode_padded(fresh, PROMPT)
    assert {x.steps for x in recording.layers} == {(0, 1, 2, 3)}
    for step, item in enumerate((1, 0, 1, 0)):
        found = heatmaps(recording.select(steps=[step]), embedding)
        torch.testing.assert_close(found, triple_loop(spy, item, GRIDS, SIZE, embedding, [step]), atol=1e-5, rtol=0)
    calls = iter(range(100))
    negative, _ = recorded(fresh, branch="unconditional")
    assert {x.steps for x in negative.layers} == {(0, 2)}


def test_two_calls_a_step(fresh):
    fresh.scheduler = HeunDiscreteScheduler.from_config(fresh.scheduler.config)
    cached(fresh, (1, 3))
    with record(fresh) as r:
        generate(fresh, PROMPT, steps=3)
    (recording,) = r.recordings
    assert recording.step_indices == tuple(range(5))
    assert {x.steps for x in recording.layers if x.name.startswith(DEEP)} == {(0, 2, 4)}


def test_goca_says_what_a_cache_skipped(fresh):
    cached(fresh, (1, 2, 3))

    def run():
        with record_goca(fresh, step=2):
            generate(fresh, PROMPT, steps=4)

    with pytest.raises(InputError, match=r"from a cache: down_blocks\.1"):
        run()


# ------------------------------------------------------------------------------------------ keys of the run


def with_lora(pipe, *names, parts=("to_k",)):
    peft = pytest.importorskip("peft")
    for seed, name in enumerate(names or ("default",)):
        config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=list(parts), init_lora_weights="gaussian")
        pipe.unet.add_adapter(config, adapter_name=name)
        for key, weight in pipe.unet.named_parameters():
            if "lora_B" in key and name in key:
                torch.nn.init.normal_(weight, std=0.5, generator=torch.Generator().manual_seed(seed))
    return pipe


def own_keys(pipe, **run):
    """A recording, the run's prompt as one of its layers got it, and the keys that the layer made of it."""
    name = "up_blocks.2.attentions.0.transformer_blocks.0.attn2"
    seen = []
    hook = pipe.unet.get_submodule(name).to_k.register_forward_hook(lambda _m, x, out: seen.append((x[0][1], out[1])))
    with record(pipe) as r:
        generate(pipe, PROMPT, steps=2, **run)
    hook.remove()
    layer = next(x for x in r.recordings[0].layers if x.name == name)
    return r.recordings[0], layer, *seen[0]


@torch.no_grad()
def assert_keys(layer, text, keys):
    torch.testing.assert_close(layer.keys(text), keys, atol=1e-6, rtol=1e-5)


def test_the_scale_of_a_call(fresh):
    recording, layer, text, keys = own_keys(with_lora(fresh), cross_attention_kwargs={"scale": 0.3})
    assert_keys(layer, text, keys)
    assert not torch.allclose(layer.keys(text), fresh.unet.get_submodule(layer.name).to_k(text), atol=1e-2)
    assert heatmaps(recording, text).isfinite().all()


def test_what_is_set_on_a_lora_later(fresh):
    recording, layer, text, keys = own_keys(with_lora(fresh, "one", "two"))
    maps = heatmaps(recording, text)
    for change in (
        lambda: fresh.unet.set_adapters(["one", "two"], [0.2, 3.0]),
        lambda: fresh.unet.set_adapters(["two"], [1.0]),
        lambda: fresh.unet.disable_lora(),
        lambda: fresh.unet.enable_lora(),
        lambda: fresh.unet.delete_adapters("two"),
        lambda: fresh.unet.unload_lora(),
    ):
        change()
        assert_keys(layer, text, keys)
        assert torch.equal(heatmaps(recording, text), maps)


def test_a_lora_that_comes_later_is_not_of_the_run(fresh):
    recording, layer, text, keys = own_keys(fresh)
    maps = heatmaps(recording, text)
    with_lora(fresh)
    assert_keys(layer, text, keys)
    assert torch.equal(heatmaps(recording, text), maps)


CHANGES = {
    "fused": lambda pipe: pipe.unet.fuse_lora(),
    "loaded over": lambda pipe: pipe.unet.load_state_dict({k: -v for k, v in pipe.unet.state_dict().items()}),
    "written in": lambda pipe: [x.data.mul_(2) for n, x in pipe.unet.named_parameters() if "attn2.to_k" in n],
}


@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_are_changed_are_noticed(fresh, change):
    recording, _, text, _ = own_keys(with_lora(fresh))
    start, target = initial_embedding(fresh, ["cat"]), torch.zeros(32, 48, dtype=torch.uint8).numpy()
    target[8:20, 8:20] = 1
    with record_goca(fresh) as goca_recorder:
        generate(fresh, PROMPT, steps=2)
    CHANGES[change](fresh)
    with pytest.raises(InputError, match="no longer those that made this picture"):
        heatmaps(recording, text)
    with pytest.raises(InputError, match="no longer those that made this picture"):
        optimize([recording], [target], start)
    from ovam_core.attention.goca import attribute_weighted

    with pytest.raises(InputError, match="no longer those that made this picture"):
        attribute_weighted(goca_recorder.recordings[0], attribute_words(fresh, ["cat"]))


def test_changed_weights_of_a_text_stream():
    pipe = copy.deepcopy(pipe_of("flux-dev"))
    with record(pipe) as r:
        pipe(PROMPT, num_inference_steps=2, height=32, width=32)
    prompts = attribute_words(pipe, ["cat"])
    assert attribute(r.recordings[0].select(layers=["blocks.1"]), prompts).isfinite().all()
    pipe.transformer.transformer_blocks[0].ff_context.net[2].weight.data *= -1
    with pytest.raises(InputError, match=r"layer transformer_blocks.0.attn are no longer"):
        attribute(r.recordings[0], prompts)


def test_moved_weights_are_the_same_ones(fresh):
    recording, _, text, _ = own_keys(with_lora(fresh))
    maps = heatmaps(recording, text)
    fresh.to(torch.float16)
    torch.testing.assert_close(heatmaps(recording, text), maps, atol=2e-3, rtol=0)


def test_weights_that_are_gone(fresh):
    recording, _, text, _ = own_keys(fresh)
    fresh.unet.to("meta")
    with pytest.raises(InputError, match="weights are gone"):
        heatmaps(recording, text)


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3"])
def test_words_are_read_as_the_last_run_read_its_prompt(name):
    peft = pytest.importorskip("peft")
    pipe = copy.deepcopy(pipe_of(name))
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"], init_lora_weights="gaussian")
    peft.inject_adapter_in_model(config, pipe.text_encoder)
    for key, weight in pipe.text_encoder.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(weight, std=0.5, generator=torch.Generator().manual_seed(0))
    model = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    given = "joint_attention_kwargs" if name == "sd3" else "cross_attention_kwargs"
    seen = []

    def read(**run):
        seen.clear()
        pipe(prompt=PROMPT, num_inference_steps=1, height=64, width=64, guidance_scale=1.0, **run)
        words = attribute_sentence(pipe, PROMPT).embedding[:7]  # up to where SD 3 goes on with T5's tokens
        torch.testing.assert_close(encode_padded(pipe, PROMPT), seen[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(words, seen[0][: len(words)], atol=1e-5, rtol=1e-4)
        return seen[0]

    model.register_forward_pre_hook(lambda _m, _a, kw: seen.append(kw["encoder_hidden_states"][0]), with_kwargs=True)
    plain, scaled = read(), read(**{given: {"scale": 0.2}})
    assert not torch.allclose(plain, scaled, atol=1e-3)
    if name != "sd" or hasattr(pipe.text_encoder, "text_model"):  # else diffusers itself fails
        assert not torch.allclose(plain, read(clip_skip=1), atol=1e-3)
    assert torch.equal(plain, read())


def text_lora(pipe, *encoders, name="default"):
    peft = pytest.importorskip("peft")
    for encoder in encoders or (pipe.text_encoder,):
        config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"], init_lora_weights="gaussian")
        peft.inject_adapter_in_model(config, encoder, adapter_name=name)
        for key, weight in encoder.named_parameters():
            if f"lora_B.{name}" in key:
                torch.nn.init.normal_(weight, std=0.5, generator=torch.Generator().manual_seed(0))
    return pipe


def pictured(pipe, **run):
    """A recording, its picture, and what of the run's prompt the denoiser was given."""
    seen, model = [], pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    hook = model.register_forward_pre_hook(
        lambda _m, _a, kw: seen.append(kw["encoder_hidden_states"]), with_kwargs=True
    )
    with record(pipe) as r, record_goca(pipe) if hasattr(pipe, "unet") else contextlib.nullcontext() as g:
        generator = torch.Generator().manual_seed(0)
        given = {"height": 64, "width": 64, "guidance_scale": 1.0, "num_inference_steps": 1} | run
        image = pipe(prompt=PROMPT, generator=generator, **given).images[0]
    hook.remove()
    return Picture(image, r.recordings[0], goca=g and g.recordings[0]), seen[0][0]


RUNS = {
    "clip_skip": ("sdxl", {"clip_skip": 1}),
    "clip_skip, sd3": ("sd3", {"clip_skip": 1}),
    "scale, sd": ("sd", {"cross_attention_kwargs": {"scale": 0.2}}),
    "scale, sdxl": ("sdxl", {"cross_attention_kwargs": {"scale": 0.2}}),
    "scale, sd3": ("sd3", {"joint_attention_kwargs": {"scale": 0.2}}),
}


@pytest.mark.parametrize("run", RUNS)
def test_words_are_read_as_their_own_run_read_its_prompt(run):
    name, given = RUNS[run]
    pipe = text_lora(copy.deepcopy(pipe_of(name)))
    first, text = pictured(pipe, **given)
    before = OVAM(pipe).segment(first, ["cat"], crf=False).heatmaps
    words = attribute_words(pipe, ["cat"])
    maps = attribute(first.recording, words)
    plain, _ = pictured(pipe)
    torch.testing.assert_close(encode_padded(pipe, PROMPT), pictured(pipe)[1])
    with pytest.raises(InputError, match=run.split(",")[0]):
        attribute(first.recording, attribute_words(pipe, ["cat"]))
    with pytest.raises(InputError, match="the prompt of this picture with"):
        attribute(plain.recording, words)
    with read_as(first.recording.reading):
        torch.testing.assert_close(encode_padded(pipe, PROMPT), text, atol=1e-5, rtol=1e-4)
        again = attribute_words(pipe, ["cat"])
    assert torch.equal(attribute(first.recording.select(steps=[0]), again), maps)
    ovam = OVAM(pipe)
    first.last_maps = None
    assert (ovam.segment(first, ["cat"], crf=False).heatmaps == before).all()
    assert (ovam.segment(plain, ["cat"], crf=False).heatmaps != before).any()
    if first.goca is not None:
        assert len(ovam.segment(first, ["cat", "photograph"], method="GoCA, any word", crf=False).labels) == 2
        with pytest.raises(InputError, match=run.split(",")[0]):
            goca(first.goca, attribute_sentence(pipe, PROMPT))
    # A photograph is read plainly, whatever the call before it.
    pictured(pipe, **given)
    photo = ovam.photograph(first.image, PROMPT)
    found = ovam.segment(photo, ["cat"], crf=False).heatmaps
    pictured(pipe)
    assert (ovam.segment(ovam.photograph(first.image, PROMPT), ["cat"], crf=False).heatmaps == found).all()


def lora_layers(pipe):
    return [x for x in pipe.text_encoder.modules() if hasattr(x, "lora_B")]


READERS = {
    "unloaded": lambda pipe: recurse_remove_peft_layers(pipe.text_encoder),
    "disabled": lambda pipe: [x.enable_adapters(False) for x in lora_layers(pipe)],
    "set": lambda pipe: [x.set_scale("default", 0.5) for x in lora_layers(pipe)],
    "fused": lambda pipe: [x.merge() for x in lora_layers(pipe)],
    "another": lambda pipe: [text_lora(pipe, name="other"), *[x.set_adapter("other") for x in lora_layers(pipe)]],
    "written in": lambda pipe: pipe.text_encoder.load_state_dict(
        {k: -v for k, v in pipe.text_encoder.state_dict().items()}
    ),
}


@pytest.mark.parametrize("change", READERS)
def test_text_encoders_that_are_changed_are_noticed(change):
    pipe = text_lora(copy.deepcopy(pipe_of("sd")))
    picture, _ = pictured(pipe)
    asked = attribute_words(pipe, ["cat"])
    maps = attribute(picture.recording, asked)
    READERS[change](pipe)
    with pytest.raises(InputError, match="text encoder is no longer"):
        attribute(picture.recording, attribute_words(pipe, ["cat"]))
    with pytest.raises(InputError, match="text encoder is no longer"):
        OVAM(pipe).segment(picture, ["cat"], crf=False)
    assert torch.equal(attribute(picture.recording, asked), maps)  # read before
    new, _ = pictured(pipe)
    assert len(OVAM(pipe).segment(new, ["cat"], crf=False).labels) == 1
    if change == "fused":
        for layer in lora_layers(pipe):
            layer.unmerge()
        torch.testing.assert_close(attribute(picture.recording, attribute_words(pipe, ["cat"])), maps)


def test_the_second_text_encoder_is_looked_at_too():
    pipe = copy.deepcopy(pipe_of("sdxl"))
    picture, _ = pictured(pipe)
    text_lora(pipe, pipe.text_encoder_2)
    with pytest.raises(InputError, match="text encoder is no longer"):
        attribute(picture.recording, attribute_words(pipe, ["cat"]))


def test_text_encoders_that_read_the_same(fresh):
    """A LoRA of the denoiser alone, another dtype, the scale of a LoRA that reads nothing, its default."""
    picture, _ = pictured(with_lora(fresh), cross_attention_kwargs={"scale": 0.3})
    maps = attribute(picture.recording, attribute_words(fresh, ["cat"]))
    pictured(fresh)
    assert torch.equal(attribute(picture.recording, attribute_words(fresh, ["cat"])), maps)
    fresh.to(torch.float16)
    torch.testing.assert_close(attribute(picture.recording, attribute_words(fresh, ["cat"])), maps, atol=2e-3, rtol=0)
    fresh.to(torch.float32)
    text_lora(fresh)
    picture, _ = pictured(fresh, cross_attention_kwargs={"scale": 1.0})
    pictured(fresh)
    assert attribute(picture.recording, attribute_words(fresh, ["cat"])).isfinite().all()


# ------------------------------------------------------------------------------------------- processors with weights


LAYER = "up_blocks.2.attentions.0.transformer_blocks.0.attn2"


def custom_diffusion(pipe, kind=CustomDiffusionAttnProcessor, kv=True, q=True):
    """As its training leaves them: on the cross-attentions, and nothing of its own on the self-attentions."""
    torch.manual_seed(3)
    processors = {}
    for name in pipe.unet.attn_processors:
        attention = pipe.unet.get_submodule(name.removesuffix(".processor"))
        own = "attn2" in name
        sizes = {"hidden_size": attention.to_q.in_features, "cross_attention_dim": attention.to_k.in_features}
        processors[name] = kind(train_kv=kv and own, train_q_out=q and own, **sizes)
    pipe.unet.set_attn_processor(processors)
    for name, weight in pipe.unet.named_parameters():
        if "to_q_custom" in name or "to_k_custom" in name:
            weight.data *= 4
    return pipe


@torch.no_grad()
def assert_made_by(pipe, q, k):
    """What is recorded of a layer is what these two modules of it make of what it got."""
    attention, seen = pipe.unet.get_submodule(LAYER), []

    def keep(_m, args, kw):
        seen.append((args[0][1], kw["encoder_hidden_states"][1]))

    hook = attention.register_forward_pre_hook(keep, with_kwargs=True)
    with record(pipe) as r, record_goca(pipe) as g:
        generate(pipe, PROMPT, steps=2)
    hook.remove()
    layer = next(x for x in r.recordings[0].layers if x.name == LAYER)
    pixels, text = seen[0]
    queries = q(pixels).unflatten(-1, (attention.heads, -1)).transpose(0, 1)
    torch.testing.assert_close(layer.queries[0], queries, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(layer.keys(text), k(text), atol=1e-5, rtol=1e-4)
    first = next(x.layer for x in g.recordings[0].layers if x.layer.name == LAYER)
    torch.testing.assert_close(first.keys(text), k(text), atol=1e-5, rtol=1e-4)
    assert torch.isfinite(heatmaps(r.recordings[0], text)).all()


@pytest.mark.parametrize("kind", [CustomDiffusionAttnProcessor, CustomDiffusionAttnProcessor2_0])
@pytest.mark.parametrize(("kv", "q"), [(True, True), (True, False), (False, True), (False, False)])
def test_custom_diffusion_has_queries_and_keys_of_its_own(fresh, kind, kv, q):
    custom_diffusion(fresh, kind, kv, q)
    attention = fresh.unet.get_submodule(LAYER)
    own = attention.processor
    assert_made_by(
        fresh, own.to_q_custom_diffusion if q else attention.to_q, own.to_k_custom_diffusion if kv else attention.to_k
    )


def test_custom_diffusion_from_a_file(fresh, tmp_path):
    trained = custom_diffusion(copy.deepcopy(fresh), q=False)
    trained.unet.save_attn_procs(tmp_path, safe_serialization=False)
    fresh.unet.load_attn_procs(tmp_path, weight_name="pytorch_custom_diffusion_weights.bin", _pipeline=fresh)
    own = fresh.unet.get_submodule(LAYER).processor
    assert torch.equal(
        own.to_k_custom_diffusion.weight, trained.unet.get_submodule(LAYER).processor.to_k_custom_diffusion.weight
    )
    assert_made_by(fresh, fresh.unet.get_submodule(LAYER).to_q, own.to_k_custom_diffusion)
    with record(fresh) as r:
        generate(fresh, PROMPT, steps=1)
    words = attribute_words(fresh, ["cat"])
    maps = attribute(r.recordings[0], words)
    fresh.unet.set_attn_processor(AttnProcessor2_0())
    assert torch.equal(attribute(r.recordings[0], words), maps)


def test_processors_are_read_or_refused_by_name(fresh):
    custom_diffusion(fresh, CustomDiffusionXFormersAttnProcessor)
    cross, _ = adapter_of(fresh).attentions()
    assert adapter_of(fresh).keys(cross[LAYER]) is cross[LAYER].processor.to_k_custom_diffusion

    class LoRAAttnProcessor(nn.Module):  # as diffusers had it
        def __init__(self):
            super().__init__()
            self.to_k_lora = nn.Linear(4, 4)

    fresh.unet.get_submodule(LAYER).set_processor(LoRAAttnProcessor())
    with pytest.raises(InputError, match=rf"The LoRAAttnProcessor of the layer {LAYER} has weights"):
        record(fresh)
    pipe = copy.deepcopy(pipe_of("sd3"))
    attention = pipe.transformer.transformer_blocks[0].attn
    attention.processor = SD3IPAdapterJointAttnProcessor2_0(8, 8, 4)
    assert adapter_of(pipe).attentions()
    attention.processor = LoRAAttnProcessor()
    with pytest.raises(InputError, match=r"LoRAAttnProcessor of the layer transformer_blocks\.0\.attn"):
        record(pipe)


def test_keys_of_the_text_beside_those_of_the_image_are_refused(fresh):
    fresh.unet.get_submodule(LAYER).added_kv_proj_dim = 32
    with pytest.raises(InputError, match=f"The layer {LAYER} attends to the text and to the image at once"):
        record(fresh)


# --------------------------------------------------------------------------------- storage that is not computed in


class Packed(nn.Linear):
    """As bitsandbytes has it: whole numbers and a factor, computed in the dtype of what comes."""

    @classmethod
    def of(cls, linear):
        packed = cls(linear.in_features, linear.out_features, bias=False)
        factor = linear.weight.detach().abs().max() / 127
        packed.register_buffer("factor", factor)
        packed.weight = nn.Parameter((linear.weight.detach() / factor).round().to(torch.int8), requires_grad=False)
        return packed

    def forward(self, x):
        return x @ (self.weight.to(x.dtype) * self.factor.to(x.dtype)).T


class Buffered(nn.Module):
    """As GPTQ has it: no parameter at all."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("packed", linear.weight.detach().to(torch.bfloat16))

    def forward(self, x):
        return x @ self.packed.to(x.dtype).T


class Wrapped(torch.Tensor):
    """As torchao has it: a tensor of another class that says it is float32."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


def replaced(pipe, change):
    for _, module in list(pipe.unet.named_modules()):
        if hasattr(module, "to_k"):
            module.to_k = change(module.to_k)


def wrapped(linear):
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Wrapped))
    return linear


STORED = {
    "packed": lambda pipe: replaced(pipe, Packed.of),
    "buffers": lambda pipe: replaced(pipe, Buffered),
    "subclass": lambda pipe: replaced(pipe, wrapped),
    "float8": lambda pipe: pipe.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32),
    "bfloat16": lambda pipe: pipe.unet.enable_layerwise_casting(torch.bfloat16, torch.float32),
    "float8 under a LoRA": lambda pipe: with_lora(pipe).unet.enable_layerwise_casting(torch.float8_e5m2, torch.float32),
}


@pytest.mark.parametrize("storage", STORED)
def test_keys_of_weights_that_are_stored_otherwise(fresh, storage):
    STORED[storage](fresh)
    recording, layer, text, keys = own_keys(fresh)
    found = heatmaps(recording, text.double())
    torch.testing.assert_close(found, heatmaps(recording, text))
    torch.testing.assert_close(layer.keys(text), keys, atol=1e-6, rtol=1e-5)
    embedding = text[:2].clone().requires_grad_()
    loss = heatmaps(recording, embedding)[1].square().sum()
    loss.backward()
    assert all(x.grad is None for name, x in fresh.unet.named_parameters() if "lora" not in name)
    slope, at = embedding.grad, text[:2].clone().double()
    moved = at + 1e-3 * (slope / slope.norm()).double()
    rise = heatmaps(recording, moved.float())[1].square().sum() - loss.detach()
    torch.testing.assert_close(rise.item(), 1e-3 * slope.norm().item(), rtol=0.1, atol=1e-4)


@pytest.mark.parametrize("name", ["sdxl", "pixart-alpha", "sana-1.5", "hunyuan", "sd3", "flux-dev", "flux-2"])
def test_layerwise_casting_in_all_families(name):
    pipe = copy.deepcopy(pipe_of(name))
    model = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    with record(pipe) as r:
        draw(name, pipe)
    (recording,) = r.recordings
    maps = attribute(recording, attribute_words(pipe, ["cat", "red bus"]))
    assert maps.isfinite().all()
    assert maps.std() > 0
    start = initial_embedding(pipe, ["cat"])
    target = torch.zeros(64, 64, dtype=torch.uint8).numpy()
    target[16:40, 16:40] = 1
    found = optimize([recording], [target], start, OptimizeSettings(epochs=4))
    assert found.loss < found.losses[0]


# --------------------------------------------------------------------------------------------- modes of autograd


@pytest.mark.parametrize("name", ["sd", "sana", "sd3", "flux-2"])
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_a_search_in_any_mode(name, mode):
    pipe = pipe_of(name)
    target = torch.zeros(64, 64, dtype=torch.uint8).numpy()
    target[16:40, 16:40] = 1

    def search():
        with record(pipe) as r:
            draw(name, pipe)
        start = initial_embedding(pipe, ["cat"])
        return optimize(r.recordings, [target], start, OptimizeSettings(epochs=3))

    with mode():
        inside = search()
    outside = search()
    assert inside.losses == outside.losses
    assert torch.equal(inside.embedding, outside.embedding)
    assert not inside.embedding.is_inference()


def test_a_model_loaded_in_inference_mode():
    with torch.inference_mode():
        pipe = copy.deepcopy(pipe_of("sd"))
        for module in pipe.unet.modules():
            for key, weight in list(module._parameters.items()):
                if weight is not None:
                    module._parameters[key] = nn.Parameter(weight.clone())
        with record(pipe) as r:
            pipe(PROMPT, num_inference_steps=2, height=64, width=64)
        target = torch.zeros(64, 64, dtype=torch.uint8).numpy()
        target[16:40, 16:40] = 1
        found = optimize(r.recordings, [target], initial_embedding(pipe, ["cat"]), OptimizeSettings(epochs=3))
    assert found.loss < found.losses[0]
