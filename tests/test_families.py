"""Each family on a tiny random pipeline of diffusers' own classes, against what its attention was given.

`AttentionSpy` listens to PyTorch's attention function itself: queries, keys and masks as the model
has made them.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pipelines import pipe_of

from ovam_core import heatmaps, record
from ovam_core.attention.heatmap import attribute
from ovam_core.attention.mask import self_attention_map
from ovam_core.errors import InputError, Stopped
from ovam_core.models.load import load_pipeline
from ovam_core.models.presets import defaults_for
from ovam_core.models.registry import ADAPTERS, adapter_of
from ovam_core.optimization import OptimizeSettings, initial_embedding, optimize
from ovam_core.ovam import OVAM
from ovam_core.query import attribute_sentence, attribute_words, background_embedding, encode_padded, token_strings
from ovam_core.settings import GenerateSettings, SegmentSettings

PROMPT = "a photograph of the cat"

# name -> (pixels of the image, grid of the heatmaps)
SIZES = {
    "sd": ((32, 48), (16, 24)),
    "sdxl": ((32, 48), (8, 12)),
    "pixart-alpha": ((32, 48), (8, 12)),
    "pixart-sigma": ((32, 48), (8, 12)),
    "sana": ((32, 64), (8, 16)),
    "sana-1.5": ((32, 64), (8, 16)),
    "hunyuan": ((64, 96), (4, 6)),
}
ALL = list(SIZES)


def generate(name, prompt=PROMPT, steps=2, guidance=4.0, **more):
    """Float images `[images, 3, height, width]`."""
    height, width = more.pop("size", SIZES[name][0])
    if name.startswith(("pixart", "sana", "hunyuan")):
        more.setdefault("use_resolution_binning", False)
    return pipe_of(name)(
        prompt,
        num_inference_steps=steps,
        guidance_scale=guidance,
        height=height,
        width=width,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
        **more,
    ).images


class AttentionSpy:
    """What PyTorch's attention function was given in each attention: name -> [(q, k, mask)] a step."""

    def __init__(self, name, monkeypatch):
        pipe = pipe_of(name)
        model = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
        self.cross, self.own, self.inputs, self._inside, self._handles = {}, {}, {}, None, []
        original = F.scaled_dot_product_attention

        def spied(query, key, value, attn_mask=None, *args, **more):
            if self._inside is not None:
                seen = self.cross if model.get_submodule(self._inside).is_cross_attention else self.own
                seen.setdefault(self._inside, []).append((query, key, attn_mask))
            return original(query, key, value, attn_mask, *args, **more)

        monkeypatch.setattr(F, "scaled_dot_product_attention", spied)
        for key, module in model.named_modules():
            if key.endswith(("attn1", "attn2")) and "mid_block" not in key:
                enter = functools.partial(self._enter, key)
                self._handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
                self._handles.append(module.register_forward_hook(self._leave))

    def _enter(self, name, module, args, kwargs):
        self._inside = name
        self.inputs.setdefault(name, []).append(args[0] if args else kwargs["hidden_states"])

    def _leave(self, *_):
        self._inside = None

    def stop(self):
        for handle in self._handles:
            handle.remove()

    def probabilities(self, seen, item):
        """Softmax of one item of the batch, `[heads, n, keys]`."""
        query, key, mask = (None if x is None else x[item].double() for x in seen)
        logits = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        return torch.softmax(logits if mask is None else logits + mask, dim=-1)

    def maps(self, item, size):
        """Eq. 5 with every head of every layer and step resized on its own: `[tokens, *size]`."""
        found = []
        for calls in self.cross.values():
            for seen in calls:
                for head in self.probabilities(seen, item):
                    shrink = round((size[0] * size[1] / len(head)) ** 0.5)
                    grid = head.T.reshape(1, -1, size[0] // shrink, size[1] // shrink)
                    found.append(F.interpolate(grid, size=size, mode="bilinear", align_corners=False)[0])
        return torch.stack(found).mean(dim=0).float()


def recorded(name, monkeypatch, options=None, **more):
    spy = AttentionSpy(name, monkeypatch)
    with record(pipe_of(name), **(options or {})) as recorder:
        generate(name, **more)
    spy.stop()
    return recorder.recordings, spy


@functools.cache
def recording_of(name: str):
    with record(pipe_of(name)) as recorder:
        generate(name)
    return recorder.recordings[0]


def attended(maps):
    """The tokens that a mask left: a masked one gets exactly nothing anywhere."""
    return maps[maps.amax(dim=(1, 2)) > 0]


# -------------------------------------------------------------------------------------------------- recording


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_image_is_bit_identical_and_nothing_is_left_on_the_pipeline(name, guidance):
    pipe = pipe_of(name)

    def state():
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in adapter_of(pipe).denoiser.modules()]
        return hooks, set(vars(pipe)), set(vars(pipe.image_processor))

    before = state()
    plain = generate(name, guidance=guidance)
    after = state()  # a pipeline remembers its last run by itself
    with record(pipe):
        image = generate(name, guidance=guidance)
    assert torch.equal(plain, image)
    assert plain.shape == (1, 3, *SIZES[name][0])
    assert state() == after
    assert after[0] == before[0]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_the_padded_prompt_gives_the_attention_of_the_model(name, guidance, monkeypatch):
    (recording,), spy = recorded(name, monkeypatch, guidance=guidance)
    size = SIZES[name][1]
    assert (recording.height, recording.width) == size
    assert recording.image_size == SIZES[name][0]
    item = 1 if guidance > 1 else 0  # the batch is [negative, positive]
    expected = spy.maps(item, size)
    maps = heatmaps(recording, encode_padded(pipe_of(name), PROMPT))
    torch.testing.assert_close(maps, attended(expected), atol=1e-5, rtol=0)
    assert maps.std(dim=(1, 2)).max() > 1e-3  # a flat map would match anything
    assert len({round(float(x), 4) for x in maps.mean(dim=(1, 2))}) > 3  # and so would tokens in any order
    masked = name.startswith(("pixart", "sana"))
    assert (len(maps) < len(expected)) == masked


@pytest.mark.parametrize("name", ALL)
def test_the_other_half_of_the_batch(name, monkeypatch):
    (recording,), spy = recorded(name, monkeypatch, {"branch": "unconditional"}, negative_prompt="the red bus")
    expected = attended(spy.maps(0, SIZES[name][1]))
    if name.startswith("sana"):  # the pipeline reads a negative prompt without the instruction
        pipe = pipe_of(name)
        embeddings, mask, *_ = pipe.encode_prompt("the red bus", False, complex_human_instruction=None)
        embedding = embeddings[0][mask[0].bool()]
    else:
        embedding = encode_padded(pipe_of(name), "the red bus")
    torch.testing.assert_close(heatmaps(recording, embedding), expected, atol=1e-5, rtol=0)
    with (
        pytest.raises(InputError, match="no unconditional half"),
        record(pipe_of(name), branch="unconditional"),
    ):
        generate(name, guidance=1.0)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_several_images_a_prompt_and_another_shape(name, guidance, monkeypatch):
    (height, width), grid = SIZES[name]
    recordings, spy = recorded(
        name, monkeypatch, size=(width, height), guidance=guidance, num_images_per_prompt=2, steps=1
    )
    assert len(recordings) == 2
    embedding = encode_padded(pipe_of(name), PROMPT)
    for image, recording in enumerate(recordings):
        assert (recording.height, recording.width) == grid[::-1]
        expected = attended(spy.maps(image + (2 if guidance > 1 else 0), grid[::-1]))
        torch.testing.assert_close(heatmaps(recording, embedding), expected, atol=1e-5, rtol=0)
    assert not torch.equal(recordings[0].layers[0].queries, recordings[1].layers[0].queries)


@pytest.mark.parametrize("name", ALL)
def test_several_prompts(name, monkeypatch):
    prompts = ["the red bus", "a car"]
    recordings, spy = recorded(name, monkeypatch, prompt=prompts, steps=1, negative_prompt=["", ""])
    for image, (prompt, recording) in enumerate(zip(prompts, recordings, strict=True)):
        expected = attended(spy.maps(2 + image, SIZES[name][1]))
        maps = heatmaps(recording, encode_padded(pipe_of(name), prompt))
        torch.testing.assert_close(maps, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["sdxl", "pixart-sigma", "hunyuan"])
def test_column_sums_are_those_of_the_models_self_attention(name, monkeypatch):
    (recording,), spy = recorded(name, monkeypatch)
    finest = max(calls[0][0].shape[2] for calls in spy.own.values())
    names = [key for key, calls in spy.own.items() if calls[0][0].shape[2] == finest]
    assert [x.name for x in recording.column_sums] == names
    for layer in recording.column_sums:
        for step, seen in enumerate(spy.own[layer.name]):
            expected = spy.probabilities(seen, 1).sum(dim=(0, 1)).float()
            torch.testing.assert_close(layer.sums[step], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["sana", "sana-1.5"])
def test_column_sums_of_linear_attention(name, monkeypatch):
    (recording,), spy = recorded(name, monkeypatch)
    model = pipe_of(name).transformer
    assert [x.name for x in recording.column_sums] == [f"transformer_blocks.{i}.attn1" for i in range(2)]
    for layer in recording.column_sums:
        module = model.get_submodule(layer.name)
        for step, pixels in enumerate(spy.inputs[layer.name]):
            with torch.no_grad():
                query, key, value = module.to_q(pixels[1:]), module.to_k(pixels[1:]), module.to_v(pixels[1:])
                if module.norm_q is not None:
                    query, key = module.norm_q(query), module.norm_k(key)
                expected, mixed = 0, []
                for q, k, v in zip(
                    *(x[0].double().chunk(module.heads, dim=-1) for x in (query, key, value)), strict=True
                ):
                    weights = q.relu() @ k.relu().T
                    weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-15)
                    expected = expected + weights.sum(dim=0)
                    mixed.append(weights @ v)
                # These weights are the model's attention: they make its output.
                out = module.to_out[0](torch.cat(mixed, dim=-1).float())
                torch.testing.assert_close(out, module(pixels[1:])[0], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(layer.sums[step], expected.float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_timesteps_are_the_schedulers(name):
    recording = recording_of(name)
    assert recording.timesteps == tuple(int(t) for t in pipe_of(name).scheduler.timesteps)
    assert recording.step_indices == (0, 1)


@pytest.mark.parametrize("name", ALL)
def test_steps_and_self_attention_can_be_left_out(name):
    with record(pipe_of(name), steps=[1], self_attention=False) as recorder:
        generate(name)
    (part,) = recorder.recordings
    embedding = encode_padded(pipe_of(name), PROMPT)
    torch.testing.assert_close(heatmaps(part, embedding), heatmaps(recording_of(name).select(steps=[1]), embedding))
    assert part.column_sums == ()
    attention = self_attention_map(recording_of(name), 0.85)
    assert attention.shape == SIZES[name][1]
    assert attention.min() == pytest.approx(0.85)


# ------------------------------------------------------------------------------------------------------- text


def test_tokens_of_each_family():
    letters = ["z", "o", "o"]
    assert token_strings(pipe_of("sdxl"), "the red zoo") == ["<SoT>", "the", "red", *letters, "<EoT>"]
    t5 = token_strings(pipe_of("pixart-sigma"), "the red zoo")
    assert t5[:2] == ["the", "red"]
    assert t5[-4:] == [*letters, "<EoT>"]
    sana = token_strings(pipe_of("sana"), "The red zoo")
    assert sana[0] == "<SoT>"
    assert "".join(sana[1:]).replace("▁", "") == "theredzoo"
    both = token_strings(pipe_of("hunyuan"), "the red zoo")
    assert both == ["<SoT>", "the", "red", *letters, "<EoT>", *t5]


@pytest.mark.parametrize("name", ALL)
def test_unpadded_text_is_encoded_as_in_generation(name):
    """What stands before the padding does not see it: causal, or masked."""
    pipe = pipe_of(name)
    own = attribute_sentence(pipe, "the red bus").embedding
    padded = encode_padded(pipe, "the red bus")
    assert own.shape[1] == adapter_of(pipe).embed_dim
    if name == "hunyuan":
        bert = len(pipe.tokenizer("the red bus").input_ids)
        padded = torch.cat([padded[:bert], padded[77 : 77 + len(own) - bert]])
    torch.testing.assert_close(own, padded[: len(own)], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_any_word_has_one_map(name):
    pipe = pipe_of(name)
    recording = recording_of(name)
    found = attribute_words(pipe, ["cat", "zebra", "the red bus"])  # the last two are not in the prompt
    maps = attribute(recording, found)
    assert maps.shape == (3, *SIZES[name][1])
    for one, word in zip(found, ("cat", "zebra", "the red bus"), strict=True):
        strings = token_strings(pipe, word)
        taken = "".join(strings[i] for i in one.groups[0]).replace("▁", "")
        times = 2 if name == "hunyuan" else 1  # its two encoders both read the word
        assert taken == word.removeprefix("the ").replace(" ", "") * times
    alone = attribute(recording, attribute_words(pipe, ["zebra"]))
    torch.testing.assert_close(maps[1], alone[0])
    joint = heatmaps(recording, found[1].embedding)
    torch.testing.assert_close(joint.sum(dim=0), torch.ones(SIZES[name][1]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ALL)
def test_the_longest_text_and_one_that_is_too_long(name):
    pipe = pipe_of(name)
    limit = {"pixart-alpha": 120, "pixart-sigma": 300, "sana": 300, "sana-1.5": 300}.get(name, 77)
    special = {"pixart-alpha": 1, "pixart-sigma": 1, "sana": 1, "sana-1.5": 1}.get(name, 2)
    room = limit - special - (token_strings(pipe, "cat")[1:2] == ["▁"])
    text = " ".join(["cat"] * room)
    assert len(encode_padded(pipe, text)) == (333 if name == "hunyuan" else limit)
    with pytest.raises(InputError, match=f"takes {limit}, its start and end included: shorten it"):
        attribute_sentence(pipe, text + " cat")
    with pytest.raises(InputError, match="empty"):
        attribute_sentence(pipe, "  ")


def test_the_row_of_the_background():
    for name in ("sd", "sdxl", "sana", "hunyuan"):
        first = attribute_sentence(pipe_of(name), PROMPT).embedding[:1]
        assert torch.equal(background_embedding(pipe_of(name), PROMPT), first)
    last = attribute_sentence(pipe_of("pixart-alpha"), PROMPT).embedding[-1:]
    assert torch.equal(background_embedding(pipe_of("pixart-alpha"), PROMPT), last)


# ----------------------------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize("name", ALL)
def test_gradient_reaches_the_embedding_and_no_weight(name):
    pipe = pipe_of(name)
    start = initial_embedding(pipe, ["car"])
    assert start.shape == (2, adapter_of(pipe).embed_dim)
    weights = torch.rand(SIZES[name][1], generator=torch.Generator().manual_seed(0))

    def loss(embedding):
        return (heatmaps(recording_of(name), embedding)[1] * weights).sum()

    x = start.clone().requires_grad_()
    loss(x).backward()
    step = 1e-3 * start.norm() * x.grad / x.grad.norm()
    with torch.no_grad():
        slope = (loss(start + step) - loss(start - step)) / 2
    torch.testing.assert_close((x.grad * step).sum(), slope, rtol=0.05, atol=1e-4)
    assert x.grad[1].abs().max() > 0
    assert all(p.grad is None for p in adapter_of(pipe).denoiser.parameters())


@pytest.mark.parametrize("name", ALL)
def test_token_optimisation_runs(name):
    target = np.zeros(SIZES[name][0], np.uint8)
    target[: target.shape[0] // 2] = 1
    start = initial_embedding(pipe_of(name), ["car"])
    settings = OptimizeSettings(epochs=2, method="adam", rate=0.01)
    found = optimize([recording_of(name)], [target], start, settings)
    assert found.losses[1] < found.losses[0]
    assert found.embedding.shape == start.shape


# -------------------------------------------------------------------------------------------------- pipelines


@pytest.mark.parametrize("name", ["pixart-alpha", "pixart-sigma", "sana"])
def test_a_size_that_would_be_cropped_is_refused(name):
    before = set(vars(pipe_of(name).image_processor))
    with pytest.raises(InputError, match="use_resolution_binning=False"), record(pipe_of(name)):
        generate(name, use_resolution_binning=True)
    assert set(vars(pipe_of(name).image_processor)) == before


@pytest.mark.parametrize("name", ALL)
def test_arguments_of_a_call(name):
    """A negative prompt or none, and a function that hears of every step and can end the run."""
    family = adapter_of(pipe_of(name))
    done = []
    generate(name, **family.arguments("", done.append))
    assert done == [1, 2]

    def stop(number):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), record(pipe_of(name)):
        generate(name, **family.arguments("the red bus", stop))
    assert "encode_prompt" not in vars(pipe_of(name))


@pytest.mark.parametrize("name", ALL)
def test_generate_makes_an_image_and_answers_words(name):
    pipe, told = pipe_of(name), []
    width = min(96, defaults_for(pipe).max_size)
    settings = GenerateSettings.for_model(pipe, PROMPT, negative_prompt="red", steps=2, width=width, height=64)
    made = OVAM(pipe).draw(settings, on_step=lambda done, of: told.append((done, of)))
    assert told == [(0, 2), (1, 2), (2, 2)]
    assert made.image.size == (width, 64)
    assert made.dtype == "float32"
    found = OVAM(pipe).answer(made, SegmentSettings(words=("cat", "zebra"), crf=False))
    assert found.labels == ["cat", "zebra"]
    assert found.heatmaps.shape == (2, 64, width)
    assert made.recording.height == 64 // adapter_of(pipe).strides[0]
    with pytest.raises(Stopped):
        OVAM(pipe).draw(settings, should_stop=lambda: len(told) > 3 or told.append(None))
    if width == 96:  # else the model is too small for another size
        with pytest.raises(InputError, match="The height is 68 pixels, which is not a multiple of"):
            replace(settings, height=68).validate(pipe)
    with pytest.raises(InputError, match=r"The negative prompt cannot be used: .* shorten it"):
        replace(settings, negative_prompt="cat " * 301).validate(pipe)


def test_guidance_is_unknown_outside_the_pipeline():
    pipe = pipe_of("pixart-sigma")
    latents, text = torch.randn(2, 4, 16, 16), encode_padded(pipe, "the cat")[None].repeat(2, 1, 1)

    def call():
        with torch.no_grad():
            pipe.transformer(latents, text, timestep=torch.tensor([5, 5]), added_cond_kwargs={})

    with pytest.raises(InputError, match="branch='all'"), record(pipe):
        call()
    with record(pipe, branch="all") as recorder:
        call()
    assert len(recorder.recordings) == 2


@pytest.mark.parametrize("name", ALL)
def test_a_folder_is_loaded_and_known_by_its_family(name, tmp_path, monkeypatch):
    monkeypatch.setenv("OVAM_DEVICE", "cpu")
    pipe_of(name).save_pretrained(tmp_path / name)
    pipe = load_pipeline(str(tmp_path / name))
    assert type(adapter_of(pipe)) is type(adapter_of(pipe_of(name)))
    defaults, family = defaults_for(pipe), adapter_of(pipe)
    assert (defaults.steps, defaults.guidance) == (family.steps, family.guidance)
    assert defaults.height == family.denoiser.config.sample_size * pipe.vae_scale_factor
    torch.testing.assert_close(encode_padded(pipe, PROMPT), encode_padded(pipe_of(name), PROMPT))


@pytest.mark.parametrize("kind", ["DiTPipeline", "StableDiffusion3InpaintPipeline", "LuminaPipeline"])
def test_other_pipelines_are_refused_with_the_families_that_there_are(kind):
    with pytest.raises(InputError) as caught:
        record(object.__new__(getattr(diffusers, kind)))
    assert "\n" not in str(caught.value)
    for name in (kind, *(family.name for family in ADAPTERS)):
        assert name in str(caught.value)
