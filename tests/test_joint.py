"""Models with joint attention on tiny random pipelines of diffusers' own classes.

The reference is each model's own blocks: called with other words in the prompt's place, before the image as it was in
the run, a block gives the words' way through it and shows PyTorch's attention function their keys.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pipelines import make_flux, pipe_of

import app
from ovam_core import heatmaps, record, tokens
from ovam_core.attention.heatmap import attribute
from ovam_core.attention.mask import self_attention_map
from ovam_core.cli import main
from ovam_core.errors import InputError
from ovam_core.models.binding import bound
from ovam_core.models.load import load_pipeline
from ovam_core.models.presets import defaults_for
from ovam_core.models.registry import adapter_of
from ovam_core.optimization import OptimizeSettings, initial_embedding, optimize
from ovam_core.ovam import OVAM
from ovam_core.query import attribute_sentence, attribute_words, encode_padded, token_prompt, token_strings
from ovam_core.settings import GenerateSettings, SegmentSettings
from ovam_core.tokens import Token

PROMPT = "a photograph of the cat"
IMAGE, GRID = (32, 48), (8, 12)
SD3 = ["sd3", "sd3.5", "sd3-without-t5"]
FLUX = ["flux-dev", "flux-schnell", "flux-2"]
ALL = SD3 + FLUX
SINGLES = "flux-singles"


def generate(name, prompt=PROMPT, steps=2, guidance=4.0, size=IMAGE, **more):
    """Float images `[images, 3, height, width]`."""
    return pipe_of(name)(
        prompt=prompt,
        num_inference_steps=steps,
        guidance_scale=guidance,
        height=size[0],
        width=size[1],
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
        **more,
    ).images


def positive(name, guidance=4.0) -> int:
    """The conditional item of the batch: only Stable Diffusion 3 has [negative, positive]."""
    return 1 if name in SD3 and guidance > 1 else 0


# --------------------------------------------------------------------------------------------------- reference


class Spy:
    """What each block of a pipeline was given, and its joint attention after norms and rotation: name -> one a step."""

    def __init__(self, name, monkeypatch):
        self.name, self.model, self.text_first = name, pipe_of(name).transformer, name.startswith("flux")
        parts = ["transformer_blocks", *(["single_transformer_blocks"] if name == SINGLES else [])]
        named = {f"{part}.{i}.attn": x for part in parts for i, x in enumerate(getattr(self.model, part))}
        self.names, self.blocks = list(named), list(named.values())
        self.given = {x: [] for x in self.names}
        self.attended = {x: [] for x in self.names}
        self._inside, self._handles, self._ids = None, [], None
        original = F.scaled_dot_product_attention

        def spied(query, key, value, *args, **more):
            if self._inside is not None:
                self.attended[self._inside].append((query, key))
            return original(query, key, value, *args, **more)

        monkeypatch.setattr(F, "scaled_dot_product_attention", spied)
        self._handles.append(self.model.register_forward_pre_hook(self._on_model, with_kwargs=True))
        for x, block in zip(self.names, self.blocks, strict=True):
            before = functools.partial(self._on_block, x)
            self._handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
            self._handles += self._listen(x, block)

    def _listen(self, name, block):
        enter = functools.partial(self._enter, name)
        before = block.attn.register_forward_pre_hook(enter, with_kwargs=True)
        return [before, block.attn.register_forward_hook(self._leave)]

    def _on_model(self, module, args, kwargs):
        self._ids = kwargs.get("img_ids")

    def _on_block(self, name, module, args, kwargs):
        self.given[name].append(kwargs)

    def _enter(self, name, module, args, kwargs):
        self._inside = name

    def _leave(self, *_):
        self._inside = None

    def stop(self):
        for handle in self._handles:
            handle.remove()

    def parts(self, seen, item):
        """(image queries, image keys, text keys) of one item, `[heads, n or L, d]`."""
        query, key = (x[item] for x in seen)
        n = GRID[0] * GRID[1]
        if self.text_first:
            return query[:, -n:], key[:, -n:], key[:, :-n]
        return query[:, :n], key[:, :n], key[:, n:]

    def model_maps(self, item):
        """Image queries against the model's own text keys, softmax over the text alone: `[tokens, *GRID]`."""
        found = []
        for calls in self.attended.values():
            for seen in calls:
                query, _, key = self.parts(seen, item)
                found.append(plain_maps(query.double(), key.double()))
        return torch.cat(found).mean(dim=0).float()

    def maps_of(self, item, embedding, names=None, steps=None):
        """The maps of other words by the model's own blocks, which read them in the prompt's place."""
        found = []
        listening = [x for pair in zip(self.names, self.blocks, strict=True) for x in self._listen(*pair)]
        for step in range(len(self.given[self.names[0]])) if steps is None else steps:
            text = self.model.context_embedder(embedding)[None]
            for name, block in zip(self.names, self.blocks, strict=True):
                given = {**self.given[name][step], "encoder_hidden_states": text}
                for key in given.keys() & {"hidden_states", "temb", "temb_mod_img", "temb_mod_txt"}:
                    given[key] = given[key][item : item + 1]
                if self.text_first:
                    places = torch.zeros(len(embedding), self._ids.shape[-1])
                    if self.name == "flux-2":
                        places[:, 3] = torch.arange(len(embedding))
                    ids = torch.cat([places, self._ids[0] if self._ids.ndim == 3 else self._ids])
                    given["image_rotary_emb"] = self.model.pos_embed(ids)
                text, _ = block(**given)
                query, _, key = self.parts(self.attended[name].pop(), 0)
                if names is None or name in names:
                    found.append(plain_maps(query, key))
        for handle in listening:
            handle.remove()
        return torch.cat(found).mean(dim=0)


def plain_maps(query, key):
    """Softmax over tokens, `[heads, tokens, *GRID]`."""
    logits = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    return torch.softmax(logits, dim=-1).transpose(-1, -2).unflatten(-1, GRID)


def recorded(name, monkeypatch, options=None, **more):
    spy = Spy(name, monkeypatch)
    with record(pipe_of(name), **(options or {})) as recorder:
        generate(name, **more)
    spy.stop()
    return recorder.recordings, spy


@functools.cache
def recording_of(name: str):
    with record(pipe_of(name)) as recorder:
        generate(name)
    return recorder.recordings[0]


def words_of(name, count=3, seed=1):
    width = adapter_of(pipe_of(name)).embed_dim
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


# --------------------------------------------------------------------------------------------------- recording


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_image_is_bit_identical_and_nothing_is_left_on_the_pipeline(name, guidance):
    pipe = pipe_of(name)

    def state():
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in pipe.transformer.modules()]
        return hooks, set(vars(pipe)), set(vars(pipe.transformer))

    plain = generate(name, guidance=guidance)
    after = state()  # a pipeline remembers its last run by itself
    with record(pipe):
        image = generate(name, guidance=guidance)
    assert torch.equal(plain, image)
    assert plain.shape == (1, 3, *IMAGE)
    assert state() == after
    assert not any(after[0])


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_the_padded_prompt_gives_the_attention_of_the_model(name, guidance, monkeypatch):
    (recording,), spy = recorded(name, monkeypatch, guidance=guidance)
    assert (recording.height, recording.width) == GRID
    assert recording.image_size == IMAGE
    expected = spy.model_maps(positive(name, guidance))
    maps = heatmaps(recording, encode_padded(pipe_of(name), PROMPT))
    assert len(maps) == {"sd3-without-t5": 77 + 256, "sd3": 77 + 256, "sd3.5": 77 + 256}.get(name, 512)
    torch.testing.assert_close(maps, expected, atol=2e-6, rtol=1e-3)
    # A flat map would match anything, and so would tokens in any order.
    assert (maps.std(dim=(1, 2)) / maps.mean(dim=(1, 2))).max() > 0.05
    assert maps.mean(dim=(1, 2)).max() > 1.2 / len(maps)


@pytest.mark.parametrize("name", ALL)
def test_the_carried_prompt_has_the_keys_of_the_model_in_every_block_and_step(name, monkeypatch):
    (recording,), spy = recorded(name, monkeypatch)
    embedding = encode_padded(pipe_of(name), PROMPT)
    with torch.no_grad():
        found = list(recording.stream.keys(embedding, [len(embedding)], spy.names))
    assert len(found) == 3
    for name_of_block, keys in zip(spy.names, found, strict=True):
        own = torch.stack([spy.parts(x, positive(name))[2] for x in spy.attended[name_of_block]])
        torch.testing.assert_close(keys, own, atol=1e-4, rtol=1e-4)
    changed = (found[2] - found[0]).abs().max()
    assert changed > 0.1  # the stream does change the text
    assert (found[1][0] - found[1][1]).abs().max() > 1e-3  # from step to step too


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_other_words_are_carried_as_the_models_blocks_carry_them(name, count, monkeypatch):
    (recording,), spy = recorded(name, monkeypatch)
    words = words_of(name, count)
    with torch.no_grad():
        expected = spy.maps_of(positive(name), words)
    maps = heatmaps(recording, words)
    torch.testing.assert_close(maps, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(maps.sum(dim=0), torch.ones(GRID), atol=1e-5, rtol=0)
    assert count == 1 or maps.std(dim=(1, 2)).max() > 1e-3


def test_single_stream_blocks_that_are_named(monkeypatch):
    layers = ["transformer_blocks", "single_transformer_blocks"]
    (recording,), spy = recorded(SINGLES, monkeypatch, {"layers": layers})
    assert [x.name for x in recording.layers] == spy.names
    assert len(spy.names) == 5
    assert [x.name for x in recording.column_sums] == spy.names[:2]  # the self-attention map stays what it was
    prompt = encode_padded(pipe_of(SINGLES), PROMPT)
    torch.testing.assert_close(heatmaps(recording, prompt), spy.model_maps(0), atol=2e-6, rtol=1e-3)
    words = words_of(SINGLES, 3)
    with torch.no_grad():
        every, one = spy.maps_of(0, words), spy.maps_of(0, words, names=[spy.names[3]], steps=[1])
        keys = list(recording.stream.keys(prompt, [len(prompt)], spy.names))
    torch.testing.assert_close(heatmaps(recording, words), every, atol=1e-5, rtol=0)
    assert (keys[4] - keys[2]).abs().max() > 0.1  # the text goes on changing
    part = recording.select(steps=[1], layers=["single_transformer_blocks.1"])
    torch.testing.assert_close(heatmaps(part, words), one, atol=1e-5, rtol=0)
    assert len(recording.select(steps=[1]).layers) == 5
    again = bound(pipe_of(SINGLES), recording.detached())
    assert torch.equal(heatmaps(again, words), heatmaps(recording, words))
    with record(pipe_of(SINGLES)) as recorder:
        generate(SINGLES)
    assert [x.name for x in recorder.recordings[0].layers] == spy.names[:2]


@pytest.mark.parametrize("name", SD3)
def test_the_other_half_of_the_batch(name, monkeypatch):
    (recording,), spy = recorded(name, monkeypatch, {"branch": "unconditional"}, negative_prompt="the red bus")
    maps = heatmaps(recording, encode_padded(pipe_of(name), "the red bus"))
    torch.testing.assert_close(maps, spy.model_maps(0), atol=2e-6, rtol=1e-3)


@pytest.mark.parametrize("name", ["sd3.5", "flux-dev", "flux-2"])
def test_several_images_have_recordings_of_their_own(name, monkeypatch):
    recordings, spy = recorded(name, monkeypatch, prompt=[PROMPT, "the red bus"], num_images_per_prompt=2)
    assert len(recordings) == 4
    first = 4 if name == "sd3.5" else 0
    words = words_of(name)
    for image, recording in enumerate(recordings):
        with torch.no_grad():
            expected = spy.maps_of(first + image, words)
        torch.testing.assert_close(heatmaps(recording, words), expected, atol=1e-5, rtol=0)
    stores = {x.stream.blocks[0].image_keys.untyped_storage().data_ptr() for x in recordings}
    assert len(stores) == 4
    same = torch.equal(recordings[0].stream.modulation, recordings[2].stream.modulation)
    assert same == (name == "flux-2")  # it knows no pooled text


@pytest.mark.parametrize("name", ALL)
def test_self_attention_is_that_of_the_image_alone(name, monkeypatch):
    (recording,), spy = recorded(name, monkeypatch)
    assert [x.name for x in recording.column_sums] == spy.names
    for layer in recording.column_sums:
        for step, seen in enumerate(spy.attended[layer.name]):
            query, key, _ = spy.parts(seen, positive(name))
            logits = query.double() @ key.double().transpose(-1, -2) / query.shape[-1] ** 0.5
            expected = torch.softmax(logits, dim=-1).sum(dim=(0, 1)).float()
            torch.testing.assert_close(layer.sums[step], expected, atol=1e-4, rtol=1e-4)
    attention = self_attention_map(recording, 0.85)
    assert attention.shape == GRID
    assert attention.min() == pytest.approx(0.85)


@pytest.mark.parametrize("name", ALL)
def test_timesteps_are_the_schedulers(name):
    recording = recording_of(name)
    assert recording.timesteps == tuple(int(t) for t in pipe_of(name).scheduler.timesteps)
    assert recording.step_indices == (0, 1)


# ----------------------------------------------------------------------------------------- parts of a recording


@pytest.mark.parametrize("name", ["sd3.5", "flux-dev", "flux-2"])
def test_steps_and_layers_can_be_chosen_before_and_after(name, monkeypatch):
    options = {"steps": [0, 2], "layers": ["blocks.1."], "self_attention": False}
    (part,), spy = recorded(name, monkeypatch, options, steps=3)
    words = words_of(name)
    with torch.no_grad():
        expected = spy.maps_of(positive(name), words, names=spy.names[1:2], steps=[0, 2])
    torch.testing.assert_close(heatmaps(part, words), expected, atol=1e-5, rtol=0)
    assert [x.name for x in part.stream.blocks] == spy.names[:2]  # what comes after the layer is not kept
    assert [len(x.tensors) for x in part.stream.blocks] == [2, 0]
    one = part.layers[0].queries
    assert part.nbytes == 3 * one.nbytes + part.stream.modulation.nbytes
    assert part.stream.modulation.shape == (2, 6 * 16 if name == "flux-2" else 16)

    with record(pipe_of(name)) as recorder:
        generate(name, steps=3)
    (whole,) = recorder.recordings
    chosen = whole.select(steps=[0, 2], layers=["blocks.1."])
    torch.testing.assert_close(heatmaps(chosen, words), heatmaps(part, words))
    assert [x.name for x in chosen.stream.blocks] == spy.names[:2]
    assert len(whole.stream.blocks) == 3
    with torch.no_grad():
        expected = spy.maps_of(positive(name), words, names=[spy.names[0], spy.names[2]])
    some = heatmaps(whole.select(layers=["blocks.0", "blocks.2"]), words)
    torch.testing.assert_close(some, expected, atol=1e-5, rtol=0)


def test_layers_and_steps_that_are_not_there_are_refused_in_one_sentence():
    for options in ({"layers": ["attn2"]}, {"steps": [9]}, {"resolutions": [5]}):
        with (
            pytest.raises(InputError, match=r"Nothing was recorded.*check steps, layers"),
            record(pipe_of("sd3.5"), **options),
        ):
            generate("sd3.5")
    with pytest.raises(InputError, match="No recorded layer matches"):
        recording_of("sd3.5").select(layers=["attn2"])


def test_the_size_of_a_recording_is_three_times_its_queries_less_the_last_layers():
    recording = recording_of("sd3")
    queries = recording.layers[0].queries.nbytes
    stream = 2 * 2 * queries + recording.stream.modulation.nbytes
    assert recording.stream.nbytes == stream
    assert recording.nbytes == 3 * queries + stream + sum(x.sums.nbytes for x in recording.column_sums)


@pytest.mark.parametrize("name", ["sd3", "flux-schnell"])
def test_storage_in_half_precision(name):
    with record(pipe_of(name), dtype=torch.bfloat16) as recorder:
        generate(name)
    (half,) = recorder.recordings
    for block in half.stream.blocks:
        assert all(x.dtype == torch.bfloat16 for x in block.tensors)
    assert half.layers[0].queries.dtype == torch.bfloat16
    words = words_of(name)
    torch.testing.assert_close(heatmaps(half, words), heatmaps(recording_of(name), words), atol=0.03, rtol=0)


def test_a_model_in_half_precision():
    name = "flux-dev"
    pipe = make_flux(True)
    pipe.transformer.load_state_dict(pipe_of(name).transformer.state_dict())
    pipe.text_encoder_2.load_state_dict(pipe_of(name).text_encoder_2.state_dict())
    pipe.to(torch.bfloat16).set_progress_bar_config(disable=True)
    with record(pipe) as recorder:
        pipe(PROMPT, num_inference_steps=2, height=32, width=48, output_type="latent")
    (recording,) = recorder.recordings
    maps = heatmaps(recording, encode_padded(pipe, PROMPT))
    assert maps.dtype == torch.float32
    torch.testing.assert_close(maps.sum(dim=0), torch.ones(GRID), atol=1e-4, rtol=0)
    x = words_of(name).requires_grad_()
    heatmaps(recording, x)[0].sum().backward()
    assert torch.isfinite(x.grad).all()
    assert x.grad.abs().max() > 0


def test_a_recording_moves_as_a_whole():
    moved = recording_of("sd3.5").to("meta")
    found = [x.queries for x in moved.layers] + [x.sums for x in moved.column_sums] + [moved.stream.modulation]
    found += [x for block in moved.stream.blocks for x in block.tensors]
    assert len(found) == 3 + 3 + 1 + 4
    assert all(x.is_meta for x in found)


# --------------------------------------------------------------------------------------------------------- words


def test_tokens_of_each_family():
    letters = ["z", "o", "o"]
    clip = ["<SoT>", "the", "red", *letters, "<EoT>"]
    t5 = token_strings(pipe_of("flux-dev"), "the red zoo")
    assert t5[:2] == ["the", "red"]
    assert t5[-4:] == [*letters, "<EoT>"]
    assert token_strings(pipe_of("sd3"), "the red zoo") == [*clip, *t5]
    assert token_strings(pipe_of("sd3-without-t5"), "the red zoo") == clip
    mistral = token_strings(pipe_of("flux-2"), "the red zoo")
    assert [x for x in mistral if x != "Ġ"] == clip  # a space of its own before letters


@pytest.mark.parametrize("name", ALL)
def test_unpadded_text_is_encoded_as_in_generation(name):
    pipe = pipe_of(name)
    own = attribute_sentence(pipe, "the red bus").embedding
    padded = encode_padded(pipe, "the red bus")
    if name in SD3:
        clip = len(pipe.tokenizer("the red bus").input_ids)
        padded = torch.cat([padded[:clip], padded[77 : 77 + len(own) - clip]])
    if name == "flux-2":  # its padding stands ahead; between the start token and the prompt stands the system message
        start = 512 - len(adapter_of(pipe).tokenize("the red bus").ids[0])
        padded = torch.cat([padded[start : start + 1], padded[-len(own) + 1 :]])
    torch.testing.assert_close(own, padded[: len(own)], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_the_padded_prompt_is_what_the_model_was_given(name):
    seen = []

    def hook(module, args, kwargs):
        seen.append(kwargs["encoder_hidden_states"][positive(name)])

    handle = pipe_of(name).transformer.register_forward_pre_hook(hook, with_kwargs=True)
    generate(name)
    handle.remove()
    assert torch.equal(encode_padded(pipe_of(name), PROMPT), seen[0])


@pytest.mark.parametrize("name", ALL)
def test_any_word_has_one_map_that_does_not_depend_on_its_neighbours(name, monkeypatch):
    (recording,), spy = recorded(name, monkeypatch)
    pipe = pipe_of(name)
    found = attribute_words(pipe, ["cat", "zebra", "the red bus"])  # the last two are not in the prompt
    maps = attribute(recording, found)
    assert maps.shape == (3, *GRID)
    for one, own, word in zip(found, maps, ("cat", "zebra", "the red bus"), strict=True):
        strings = token_strings(pipe, word)
        taken = "".join(strings[i] for i in one.groups[0]).replace("▁", "")
        times = 2 if name in ("sd3", "sd3.5") else 1  # CLIP and T5 both read the word
        assert taken == word.removeprefix("the ").replace(" ", "") * times
        with torch.no_grad():
            expected = spy.maps_of(positive(name), one.embedding)[list(one.groups[0])].mean(dim=0)
        torch.testing.assert_close(own, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "room", "limit"), [("sd3", 75, 77), ("sd3-without-t5", 75, 77), ("flux-dev", 511, 512)]
)
def test_the_longest_text_and_one_that_is_too_long(name, room, limit):
    pipe = pipe_of(name)
    text = " ".join(["cat"] * room)
    assert len(attribute_sentence(pipe, text).labels) >= limit
    with pytest.raises(InputError, match=f"takes {limit}, its start and end included: shorten it"):
        attribute_sentence(pipe, text + " cat")
    with pytest.raises(InputError, match="empty"):
        attribute_sentence(pipe, "  ")


def test_the_system_message_counts_against_the_length_of_flux_2():
    pipe = pipe_of("flux-2")
    taken = len(adapter_of(pipe).tokenize("cat").ids[0]) - 1
    assert taken > 100
    text = " ".join(["cat"] * (512 - taken))
    assert len(attribute_sentence(pipe, text).labels) == 512 - taken + 2
    with pytest.raises(InputError, match="takes 512, its start and end included: shorten it"):
        attribute_sentence(pipe, text + " cat")


# -------------------------------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize("name", ["sd3.5", "sd3", "flux-dev", "flux-2"])
@pytest.mark.parametrize("count", [2, 3])
def test_gradient_is_autograds_through_the_models_blocks(name, count, monkeypatch):
    (recording,), spy = recorded(name, monkeypatch)
    weights = torch.rand(count, *GRID, generator=torch.Generator().manual_seed(0))
    mine, plain = (words_of(name, count).requires_grad_() for _ in range(2))
    (heatmaps(recording, mine) * weights).sum().backward()
    assert all(p.grad is None for p in pipe_of(name).transformer.parameters())
    (expected,) = torch.autograd.grad((spy.maps_of(positive(name), plain) * weights).sum(), plain)
    torch.testing.assert_close(mine.grad, expected, atol=1e-5, rtol=1e-3)
    assert expected.abs().max() > 1e-3


@pytest.mark.parametrize("name", ["sd3.5", "flux-dev"])
def test_gradient_of_few_values_at_a_time(name, monkeypatch):
    words = words_of(name, 3)
    recording = recording_of(name)

    def gradient():
        x = words.clone().requires_grad_()
        heatmaps(recording, x)[1].square().sum().backward()
        return x.grad

    whole = gradient()
    monkeypatch.setattr("ovam_core.attention.heatmap.BLOCK_VALUES", {"cpu": 2 * 8 * 64, "other": 1})  # a step at a time
    monkeypatch.setattr("ovam_core.attention.heatmap.KEPT_VALUES", 0)
    torch.testing.assert_close(gradient(), whole, atol=1e-6, rtol=1e-4)


def test_gradient_of_a_recording_made_in_inference_mode():
    pipe = pipe_of("sd3")
    with torch.inference_mode(), record(pipe) as recorder:
        generate("sd3")
    x = words_of("sd3").requires_grad_()
    heatmaps(recorder.recordings[0], x)[0].sum().backward()
    y = words_of("sd3").requires_grad_()
    heatmaps(recording_of("sd3"), y)[0].sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("name", ALL)
def test_a_token_is_learned_saved_and_asked_for(name, tmp_path):
    pipe, target = pipe_of(name), np.zeros(IMAGE, np.uint8)
    target[:16] = 1
    start = initial_embedding(pipe, ["car"])
    assert start.shape == (2, adapter_of(pipe).embed_dim)
    found = optimize([recording_of(name)], [target], start, OptimizeSettings(epochs=3, method="adam", rate=0.01))
    assert found.loss < found.losses[0]
    token = tokens.Token(found.embedding, ("background", "car"), "tiny")
    path = token.save(tmp_path / "car.safetensors")
    asked = token_prompt(pipe, Token.load(path))
    assert torch.equal(attribute(recording_of(name), asked)[0], heatmaps(recording_of(name), found.embedding)[1])


# ----------------------------------------------------------------------------------------------------- pipelines


def test_a_pass_of_skip_layer_guidance_is_no_step():
    options = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 0.6}
    seen = []
    handle = pipe_of("sd3.5").transformer.register_forward_pre_hook(lambda *_: seen.append(1))
    with record(pipe_of("sd3.5")) as recorder:
        generate("sd3.5", steps=3, **options)
    handle.remove()
    assert len(seen) == 4  # of which one skips layers
    assert recorder.recordings[0].step_indices == (0, 1, 2)
    assert len(recorder.recordings) == 1
    assert all(len(x.queries) == 3 for x in recorder.recordings[0].layers)


def test_the_negative_pass_of_a_true_guidance_is_no_step(monkeypatch):
    (recording,), spy = recorded("flux-dev", monkeypatch, negative_prompt="red", true_cfg_scale=3.0)
    assert recording.step_indices == (0, 1)
    spy.attended = {name: calls[::2] for name, calls in spy.attended.items()}
    maps = heatmaps(recording, encode_padded(pipe_of("flux-dev"), PROMPT))
    torch.testing.assert_close(maps, spy.model_maps(0), atol=2e-6, rtol=1e-3)


def test_an_image_to_edit_is_refused_with_flux_2():
    picture = Image.new("RGB", (64, 64))
    with pytest.raises(InputError, match="Flux 2 sees an image beside"), record(pipe_of("flux-2")):
        generate("flux-2", image=picture)


def test_flux_has_no_unconditional_half():
    with (
        pytest.raises(InputError, match="record the conditional branch"),
        record(pipe_of("flux-dev"), branch="unconditional"),
    ):
        generate("flux-dev")


@pytest.mark.parametrize("name", ALL)
def test_generate_makes_an_image_and_answers_words(name):
    pipe, told = pipe_of(name), []
    settings = GenerateSettings.for_model(pipe, PROMPT, steps=2, width=64, height=96)
    made = OVAM(pipe).draw(settings, on_step=lambda done, of: told.append((done, of)))
    assert told == [(0, 2), (1, 2), (2, 2)]
    assert made.image.size == (64, 96)
    assert made.recording.height == 96 // adapter_of(pipe).strides[0]
    found = OVAM(pipe).answer(made, SegmentSettings(words=("cat", "zebra"), crf=False))
    assert found.labels == ["cat", "zebra"]
    assert found.heatmaps.shape == (2, 96, 64)
    with pytest.raises(InputError, match="The height is 67 pixels, which is not a multiple of"):
        replace(settings, height=67).validate(pipe)


def test_a_negative_prompt_is_taken_or_refused():
    settings = GenerateSettings.for_model(pipe_of("sd3"), PROMPT, steps=1, width=64, height=64)
    with_red = replace(settings, negative_prompt="red")
    plain, changed = (OVAM(pipe_of("sd3")).draw(x).image for x in (settings, with_red))
    assert plain.tobytes() != changed.tobytes()
    for negative in ("red", ["", "red"]):
        with pytest.raises(InputError, match="Flux takes no negative prompt"):
            adapter_of(pipe_of("flux-dev")).arguments(negative, print)
    with pytest.raises(InputError, match="leave it empty"):
        OVAM(pipe_of("flux-dev")).draw(replace(with_red, guidance=3.5))


@pytest.mark.parametrize("name", ["sd3", "flux-dev"])
def test_a_folder_is_loaded_and_known_by_its_family(name, tmp_path, monkeypatch):
    monkeypatch.setenv("OVAM_DEVICE", "cpu")
    pipe_of(name).save_pretrained(tmp_path / name)
    pipe = load_pipeline(str(tmp_path / name))
    assert type(adapter_of(pipe)) is type(adapter_of(pipe_of(name)))
    defaults, family = defaults_for(pipe), adapter_of(pipe)
    assert (defaults.steps, defaults.guidance) == (family.steps, family.guidance)
    assert defaults.height == (32 if name in SD3 else 128) * 2
    torch.testing.assert_close(encode_padded(pipe, PROMPT), encode_padded(pipe_of(name), PROMPT))


def test_the_command_line_and_the_page_say_what_the_map_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OVAM_DEVICE", "cpu")
    about = "a word is carried along the text stream, where it reads the image and does not touch it"
    pipe = pipe_of("flux-schnell")
    pipe.save_pretrained(tmp_path / "model")
    options = ["--model", str(tmp_path / "model"), "--steps", "1", "--size", "64x64", "--no-crf"]
    assert main(["generate", PROMPT, *options, "--words", "cat", "--out", str(tmp_path / "out")]) == 0
    assert about in capsys.readouterr().out
    monkeypatch.setattr(pipe, "ovam_name", "tiny", raising=False)
    shown = [x["props"] for x in app.build(OVAM(pipe)).config["components"] if x["props"].get("elem_id") == "about"]
    assert about in shown[0]["value"]
