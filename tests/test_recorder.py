"""The recorder: it changes nothing, keeps what it says, and its maps are the attention of the model."""

from __future__ import annotations

import pytest
import torch
from diffusers import HeunDiscreteScheduler
from pipelines import make_pipe
from reference import Spy, generate, probabilities, triple_loop
from torch.utils._python_dispatch import TorchDispatchMode

from ovam_core import heatmaps, record
from ovam_core.attention.heatmap import attribute
from ovam_core.attention.self_attention import COLUMN_BLOCK_BYTES, column_sums
from ovam_core.errors import InputError
from ovam_core.models.stable_diffusion import grid_size
from ovam_core.query import attribute_words, encode_padded

PROMPT = "a photograph of the cat"
# Latents of 16 x 24 for images of 32 x 48: grids of the two levels with attention.
GRIDS = {16 * 24: (16, 24), 8 * 12: (8, 12)}
SIZE = (16, 24)


def hooks_of(pipe) -> int:
    return sum(len(x._forward_hooks) + len(x._forward_pre_hooks) for x in pipe.unet.modules())


def recorded(pipe, spy_on="attn2", record_options=None, **options):
    """Recordings of a short run, and what the attention modules were given."""
    with Spy(pipe, spy_on) as spy, record(pipe, **(record_options or {})) as r:
        generate(pipe, **options)
    return r.recordings, spy


@pytest.fixture(scope="module")
def run(tiny):
    recordings, spy = recorded(tiny)
    return recordings[0], spy


# Nothing changes


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_image_is_bit_identical_and_hooks_are_gone(tiny, guidance):
    before = hooks_of(tiny)
    plain = generate(tiny, guidance=guidance)
    with record(tiny):
        inside = hooks_of(tiny)
        image = generate(tiny, guidance=guidance)
    assert torch.equal(torch.as_tensor(plain), torch.as_tensor(image))
    assert inside > before
    assert hooks_of(tiny) == before


def test_hooks_are_gone_after_an_exception(tiny):
    before = hooks_of(tiny)

    def fail(*_):
        raise RuntimeError("stop here")

    recording = record(tiny)
    with pytest.raises(RuntimeError, match="stop here"), recording:
        generate(tiny, callback_on_step_end=fail)
    assert hooks_of(tiny) == before
    assert recording.recordings == []


def test_an_exception_of_the_body_is_not_hidden_by_an_empty_recording(tiny):
    with pytest.raises(KeyError), record(tiny):
        raise KeyError("mine")


def test_recorder_can_be_used_again_but_not_nested(tiny):
    again = record(tiny)
    for _ in range(2):
        with again:
            generate(tiny, steps=2)
        assert len(again.recordings) == 1
    with again:
        generate(tiny, steps=2)
        with pytest.raises(InputError, match="already in use"):
            again.__enter__()


# The maps are the model's attention


@pytest.mark.parametrize("shape", ["sd1", "sd2"])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_padded_prompt_gives_the_attention_probabilities(shape, guidance, tiny, tiny_sd2):
    pipe = tiny if shape == "sd1" else tiny_sd2
    recordings, spy = recorded(pipe, guidance=guidance)
    item = 1 if guidance > 1 else 0  # the batch is [negative, positive]
    embedding = encode_padded(pipe, PROMPT)
    assert torch.equal(embedding, next(iter(spy.seen.values()))[0][1][item])
    expected = triple_loop(spy, item, GRIDS, SIZE)
    maps = heatmaps(recordings[0], embedding)
    assert maps.shape == (77, *SIZE)
    assert maps.dtype == torch.float32
    torch.testing.assert_close(maps, expected, atol=1e-5, rtol=0)
    assert expected.std(dim=(1, 2)).max() > 1e-3  # a flat map would match anything


@pytest.mark.parametrize("tokens", [1, 2, 3, 9])
def test_any_embedding_equals_the_triple_loop(run, tokens):
    recording, spy = run
    embedding = torch.randn(tokens, 32, generator=torch.Generator().manual_seed(tokens)) * 2
    maps = heatmaps(recording, embedding)
    torch.testing.assert_close(maps, triple_loop(spy, 1, GRIDS, SIZE, embedding), atol=1e-5, rtol=0)
    torch.testing.assert_close(maps.sum(dim=0), torch.ones(SIZE), atol=1e-5, rtol=0)


def test_words_equal_the_triple_loop(tiny, run):
    recording, spy = run
    attributions = attribute_words(tiny, ["car", "zebra", "the red bus"])
    maps = attribute(recording, attributions)
    for found, one in zip(maps, attributions, strict=True):
        loop = triple_loop(spy, 1, GRIDS, SIZE, one.embedding)
        torch.testing.assert_close(found, loop[list(one.groups[0])].mean(dim=0), atol=1e-5, rtol=0)


def test_unconditional_branch_is_the_other_half(tiny):
    recordings, spy = recorded(tiny, record_options={"branch": "unconditional"}, negative_prompt="car")
    assert recordings[0].branch == "unconditional"
    torch.testing.assert_close(
        heatmaps(recordings[0], encode_padded(tiny, "car")),
        triple_loop(spy, 0, GRIDS, SIZE),
        atol=1e-5,
        rtol=0,
    )
    with pytest.raises(InputError, match="no unconditional half"), record(tiny, branch="unconditional"):
        generate(tiny, guidance=1.0)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_several_prompts_and_images_a_prompt(tiny, guidance):
    prompts = ["the cat", "a red bus"]
    recordings, spy = recorded(tiny, prompt=prompts, num_images_per_prompt=2, guidance=guidance, steps=2)
    assert len(recordings) == 4
    for image, recording in enumerate(recordings):
        maps = heatmaps(recording, encode_padded(tiny, prompts[image // 2]))
        item = image + (4 if guidance > 1 else 0)
        torch.testing.assert_close(maps, triple_loop(spy, item, GRIDS, SIZE), atol=1e-5, rtol=0)
    owners = {x.layers[0].queries.untyped_storage().data_ptr() for x in recordings}
    assert len(owners) == 4  # dropping one recording frees its memory


@pytest.mark.parametrize(("height", "width"), [(48, 32), (32, 32), (40, 24)])
def test_sizes_that_are_not_square(tiny, height, width):
    latent = (height // 2, width // 2)
    half = tuple((x + 1) // 2 for x in latent)
    recordings, spy = recorded(tiny, height=height, width=width, steps=2)
    recording = recordings[0]
    assert (recording.height, recording.width) == latent
    assert recording.image_size == (height, width)
    assert {(x.height, x.width) for x in recording.layers} == {latent, half}
    grids = {h * w: (h, w) for h, w in (latent, half)}
    maps = heatmaps(recording, encode_padded(tiny, PROMPT))
    torch.testing.assert_close(maps, triple_loop(spy, 1, grids, latent), atol=1e-5, rtol=0)


def test_grid_size():
    assert grid_size(64 * 96, 64, 96) == (64, 96)
    assert grid_size(16 * 24, 64, 96) == (16, 24)
    assert grid_size(5 * 8, 17, 30) == (5, 8)  # odd sides are rounded up
    assert grid_size(4 * 7, 17, 30) == (4, 7)  # or down
    with pytest.raises(InputError, match="does not fit"):
        grid_size(77, 64, 96)


# A part of the run


def test_steps_at_recording_and_afterwards(tiny, run):
    full, spy = run
    embedding = encode_padded(tiny, PROMPT)
    (part,), _ = recorded(tiny, record_options={"steps": [0, 2]})
    expected = triple_loop(spy, 1, GRIDS, SIZE, steps=[0, 2])
    for recording in (part, full.select(steps=[0, 2])):
        assert recording.step_indices == (0, 2)
        assert recording.timesteps == (full.timesteps[0], full.timesteps[2])
        torch.testing.assert_close(heatmaps(recording, embedding), expected, atol=1e-5, rtol=0)
    assert part.select(steps=[2]).step_indices == (2,)  # numbers of the run, not of the recording
    assert part.nbytes * 3 == full.nbytes * 2


def test_layers_and_resolutions_at_recording_and_afterwards(tiny, run):
    full, spy = run
    embedding = encode_padded(tiny, PROMPT)
    assert full.resolutions == (24, 12)
    small = [x.name for x in full.layers if (x.height, x.width) == (8, 12)]
    (by_resolution,), _ = recorded(tiny, record_options={"resolutions": {12}})
    (by_name,), _ = recorded(tiny, record_options={"layers": ["blocks.1.attentions.0", "up_blocks.1"]})
    assert {x.name for x in by_name.layers} >= set(small)
    expected = triple_loop(spy, 1, GRIDS, SIZE, names=small)
    for recording in (by_resolution, full.select(resolutions=[12]), full.select(layers=small)):
        assert [x.name for x in recording.layers] == small
        assert (recording.height, recording.width) == SIZE  # the size of the heatmaps stays
        torch.testing.assert_close(heatmaps(recording, embedding), expected, atol=1e-5, rtol=0)


def test_default_layers_are_those_of_the_paper(tiny, run):
    names = [x.name for x in run[0].layers]
    assert names == [x for x in run[1].modules if x.endswith("attn2")]
    assert not any("mid_block" in x for x in names)
    (mid,), _ = recorded(tiny, record_options={"layers": "mid_block"})
    assert [x.name for x in mid.layers] == ["mid_block.attentions.0.transformer_blocks.0.attn2"]
    assert (mid.layers[0].height, mid.layers[0].width) == (4, 6)


def test_selecting_nothing_says_what_there_is(run):
    with pytest.raises(InputError, match="24, 12"):
        run[0].select(resolutions=[64])
    with pytest.raises(InputError, match="up_blocks"):
        run[0].select(layers=["nothing"])
    with pytest.raises(InputError, match="0 to 2"):
        run[0].select(steps=[30])


def test_selected_steps_share_memory(run):
    full = run[0]
    for steps in ([1], [1, 2], [0, 2], range(3)):
        part = full.select(steps=steps)
        assert (
            part.layers[0].queries.untyped_storage().data_ptr() == full.layers[0].queries.untyped_storage().data_ptr()
        )


@pytest.mark.parametrize("options", [{"steps": [50]}, {"layers": ["nothing"]}, {"resolutions": [64]}])
def test_a_recording_that_caught_nothing_raises(tiny, options):
    before = hooks_of(tiny)
    with pytest.raises(InputError, match="Nothing was recorded"), record(tiny, **options):
        generate(tiny, steps=2)
    assert hooks_of(tiny) == before
    with pytest.raises(InputError, match="call the pipeline inside"), record(tiny):
        pass


def test_two_calls_in_one_block_are_refused(tiny):
    def twice():
        generate(tiny, steps=2)
        generate(tiny, steps=2)

    with pytest.raises(InputError, match="one call of the pipeline"), record(tiny):
        twice()


def test_an_interrupted_run_gives_the_steps_done(tiny):
    def stop(pipe, step, timestep, state):
        pipe._interrupt = step == 1
        return state

    with record(tiny) as r:
        generate(tiny, steps=4, callback_on_step_end=stop)
    assert r.recordings[0].step_indices == (0, 1)
    assert all(x.queries.shape[0] == 2 for x in r.recordings[0].layers)


def test_a_step_is_a_call_of_the_unet(fresh):
    fresh.scheduler = HeunDiscreteScheduler.from_config(fresh.scheduler.config)
    (recording,), _ = recorded(fresh, steps=3)
    assert recording.step_indices == tuple(range(5))  # Heun: two calls a step but the last
    assert recording.timesteps[1] == recording.timesteps[2]


@pytest.mark.parametrize(("height", "width"), [(16, 24), (17, 10)])
def test_direct_calls_of_the_unet(tiny, height, width):
    latents = torch.randn(2, 4, height, width, generator=torch.Generator().manual_seed(0))
    text = torch.stack([encode_padded(tiny, "the cat")] * 2)
    with torch.no_grad(), Spy(tiny) as spy, record(tiny, branch="all") as r:
        for t in (100, 300):
            tiny.unet(latents, t, encoder_hidden_states=text)
    assert len(r.recordings) == 2
    assert r.recordings[0].timesteps == (100, 300)
    half = (height + 1) // 2, (width + 1) // 2
    grids = {h * w: (h, w) for h, w in ((height, width), half)}
    for item in range(2):
        maps = heatmaps(r.recordings[item], text[0])
        torch.testing.assert_close(maps, triple_loop(spy, item, grids, (height, width)), atol=1e-5, rtol=0)


# Number formats, adapters, memory


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
def test_half_precision_storage(tiny, run, dtype, tolerance):
    full = run[0]
    (half,), _ = recorded(tiny, record_options={"dtype": dtype})
    assert all(x.queries.dtype == dtype for x in half.layers)
    assert sum(x.queries.nbytes for x in half.layers) * 2 == sum(x.queries.nbytes for x in full.layers)
    embedding = encode_padded(tiny, PROMPT)
    maps = heatmaps(half, embedding)
    assert maps.dtype == torch.float32
    torch.testing.assert_close(maps, heatmaps(full, embedding), atol=tolerance, rtol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
def test_half_precision_model(fresh, dtype, tolerance):
    fresh.to(dtype=dtype)
    plain = generate(fresh, steps=2)
    with Spy(fresh) as spy, record(fresh) as r:
        image = generate(fresh, steps=2)
    assert torch.equal(torch.as_tensor(plain), torch.as_tensor(image))
    recording = r.recordings[0]
    assert recording.layers[0].queries.dtype == dtype
    maps = heatmaps(recording, encode_padded(fresh, PROMPT))
    assert maps.dtype == torch.float32
    torch.testing.assert_close(maps, triple_loop(spy, 1, GRIDS, SIZE), atol=tolerance, rtol=0)
    torch.testing.assert_close(maps.sum(dim=0), torch.ones(SIZE), atol=1e-4, rtol=0)


def test_attention_slicing(fresh):
    fresh.enable_attention_slicing(1)
    plain = generate(fresh)
    with record(fresh) as r:
        assert torch.equal(torch.as_tensor(generate(fresh)), torch.as_tensor(plain))
    recordings, spy = recorded(fresh)
    assert torch.equal(recordings[0].layers[0].queries, r.recordings[0].layers[0].queries)
    maps = heatmaps(recordings[0], encode_padded(fresh, PROMPT))
    torch.testing.assert_close(maps, triple_loop(spy, 1, GRIDS, SIZE), atol=1e-5, rtol=0)
    assert recordings[0].column_sums


def test_lora(fresh):
    peft = pytest.importorskip("peft")
    without, _ = recorded(fresh)
    fresh.unet.add_adapter(
        peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k"], init_lora_weights="gaussian")
    )
    for name, parameter in fresh.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(0))
    plain = generate(fresh)
    with Spy(fresh) as spy, record(fresh) as r:
        image = generate(fresh)
    assert torch.equal(torch.as_tensor(plain), torch.as_tensor(image))
    embedding = encode_padded(fresh, PROMPT)
    maps = heatmaps(r.recordings[0], embedding)
    torch.testing.assert_close(maps, triple_loop(spy, 1, GRIDS, SIZE), atol=1e-5, rtol=0)
    assert not torch.allclose(r.recordings[0].layers[0].queries, without[0].layers[0].queries, atol=1e-3)


@pytest.mark.parametrize("kind", ["model", "sequential"])
def test_offloaded_weights(fresh, run, kind):
    """accelerate's hooks, with the CPU in the part of the accelerator: keys must come from wherever the weights are."""
    accelerate = pytest.importorskip("accelerate")
    embedding = encode_padded(fresh, PROMPT)
    if kind == "model":
        accelerate.cpu_offload_with_hook(fresh.unet, execution_device="cpu")
    else:
        accelerate.cpu_offload(fresh.unet, execution_device="cpu")
        assert fresh.unet.conv_in.weight.is_meta
    plain = generate(fresh)
    with record(fresh) as r:
        assert torch.equal(torch.as_tensor(generate(fresh)), torch.as_tensor(plain))
    (recording,) = r.recordings
    torch.testing.assert_close(heatmaps(recording, embedding), heatmaps(run[0], embedding), atol=1e-6, rtol=0)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="enable_model_cpu_offload() needs an accelerator")
def test_model_cpu_offload_on_cuda(fresh):
    fresh.enable_model_cpu_offload()
    with record(fresh, offload=True) as r:
        generate(fresh)
    queries = r.recordings[0].layers[0].queries
    assert queries.device.type == "cpu"
    assert queries.is_pinned()
    maps = attribute(r.recordings[0], attribute_words(fresh, ["cat", "red bus"]))
    assert maps.shape == (2, *SIZE)
    assert maps.isfinite().all()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="offload= moves memory only from an accelerator")
def test_offload_frees_the_accelerator(fresh):
    fresh.to("cuda")
    held = {}
    for offload in (False, True):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        with record(fresh, offload=offload) as r:
            generate(fresh)
        held[offload] = torch.cuda.memory_allocated() - before
        nbytes = r.recordings[0].nbytes
        del r
    assert held[False] >= nbytes
    assert held[True] < nbytes / 10


def test_memory_is_what_nbytes_says(tiny, run):
    """`steps=` divides it, `offload=` leaves tensors on the host that the same questions work on."""
    full = run[0]
    storages = {x.queries.untyped_storage().data_ptr(): x.queries.untyped_storage().nbytes() for x in full.layers}
    storages |= {x.sums.untyped_storage().data_ptr(): x.sums.untyped_storage().nbytes() for x in full.column_sums}
    assert sum(storages.values()) == full.nbytes  # no view keeps the negative half alive
    (one,), _ = recorded(tiny, record_options={"steps": [1], "offload": True})
    assert one.nbytes * 3 == full.nbytes
    assert one.layers[0].queries.device.type == "cpu"
    (bare,), _ = recorded(tiny, record_options={"self_attention": False})
    assert bare.column_sums == ()
    assert bare.nbytes == sum(x.queries.nbytes for x in full.layers)
    assert full.to("cpu").nbytes == full.nbytes


# Self-attention


def test_column_sums_equal_the_direct_formula(tiny):
    recordings, spy = recorded(tiny, spy_on="attn1")
    sums = recordings[0].column_sums
    assert {(x.height, x.width) for x in sums} == {SIZE}  # the highest resolution only
    assert [x.name for x in sums] == [x for x in spy.seen if spy.seen[x][0][0].shape[1] == 16 * 24]
    for layer in sums:
        for step, (pixels, _) in enumerate(spy.seen[layer.name]):
            attention = probabilities(spy.modules[layer.name], pixels[1], pixels[1])  # rows sum to one
            torch.testing.assert_close(layer.sums[step], attention.sum(dim=(0, 1)), atol=1e-3, rtol=1e-5)
    assert sums[0].sums.shape == (3, 16 * 24)


def test_column_sums_follow_images_and_steps(tiny):
    with Spy(tiny, "attn1") as spy, record(tiny, steps=[1]) as r:
        generate(tiny, ["the cat", "a car"], steps=2)
    for image, recording in enumerate(r.recordings):
        layer = recording.column_sums[0]
        pixels = spy.seen[layer.name][1][0][2 + image]
        expected = probabilities(spy.modules[layer.name], pixels, pixels).sum(dim=(0, 1))
        torch.testing.assert_close(layer.sums, expected[None], atol=1e-3, rtol=1e-5)


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that any operation returned."""

    def __init__(self):
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **(kwargs or {}))
        self.nbytes = max(
            [self.nbytes, *(x.nbytes for x in torch.utils._pytree.tree_leaves(made) if isinstance(x, torch.Tensor))]
        )
        return made


def test_column_sums_stay_in_blocks():
    """A 64 x 64 grid, all heads: 512 MiB of attention, never more than a block of it at a time."""
    heads, n = 8, 64 * 64
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(heads, n, 4, generator=generator).half() for _ in range(2))
    with Largest() as largest:
        sums = column_sums(q, k, 0.5)
    assert n * 4 < largest.nbytes <= COLUMN_BLOCK_BYTES["cpu"] < heads * n * n * 4 / 100
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums.sum().item(), float(heads * n), atol=1, rtol=0)
    expected = torch.softmax(q[0].float() @ k[0].float().T * 0.5, dim=-1).sum(dim=0)
    torch.testing.assert_close(column_sums(q[:1], k[:1], 0.5), expected, atol=1e-2, rtol=1e-4)


# Refusals


def test_pipelines_that_cannot_be_recorded():
    from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel

    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    with pytest.raises(InputError, match="not a text-to-image pipeline"):
        record(DDPMPipeline(unet, DDIMScheduler()))
    pipe = make_pipe()
    with pytest.raises(InputError, match="branch is"):
        record(pipe, branch="both")
