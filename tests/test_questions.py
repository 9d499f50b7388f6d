"""A question read in one go and asked in few products: the same as word after word, layer after layer."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from pipelines import make_pipe, pipe_of
from reference import generate

from benchmarks.speed.heatmap import plain_heatmaps
from benchmarks.speed.published import as_published, published_losses, published_maps
from ovam_core import record
from ovam_core.attention import crf, heatmap
from ovam_core.attention.heatmap import AttributionPrompt, attribute, heatmaps, merged, resize
from ovam_core.attention.recording import alike, is_laid_out, laid_out, side_by_side
from ovam_core.errors import InputError
from ovam_core.models import remembered
from ovam_core.models.reading import device_of, has_vectors, read_as, read_tokens
from ovam_core.models.registry import adapter_of
from ovam_core.optimization import RECIPES, optimize
from ovam_core.query import attribute_sentence, attribute_words

EIGHT = ["cat", "car", "dog", "bus", "the red bus", "zebra", "a", "tree"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def recording(tiny):
    with record(tiny) as recorder:
        generate(tiny)
    return recorder.recordings[0]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --------------------------------------------------------------------------------------------- in few products


def word(seed, scale=1.0, row=1):
    """A prompt of three rows, one of which gets a map; the first is that of every other such prompt."""
    embedding = torch.cat([draw(1, 32), draw(2, 32, seed=seed + 1)]) * scale
    return AttributionPrompt(embedding, (str(seed),), ((row,),))


PROMPTS = {
    "one": [word(1)],
    "with a start in common": [word(1), word(2), word(3)],
    "with all but the word in common": [
        replace(word(1), embedding=torch.cat([draw(1, 32), x, draw(1, 32, seed=9)]))
        for x in (draw(1, 32, seed=5), draw(1, 32, seed=6))
    ],
    "with some in common": [word(1), word(1), word(2)],
    "other rows of three": [word(1, row=0), word(2, row=2)],
    "among others": [
        AttributionPrompt(draw(5, 32), ("a", "b"), ((1, 2), (3,))),
        word(1),
        AttributionPrompt(draw(2, 32, seed=3), ("pair",), ((1,),)),
        word(2),
    ],
    "far beyond the exponential": [word(1, 300.0), word(2, 300.0)],
}


@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
def test_words_asked_together_are_softmaxes_of_their_own(recording, prompts):
    plain = as_published(replace(recording, layers=recording.layers))
    whole = replace(recording, layers=plain.layers)  # without the middle block, which that form leaves out
    expected = [row for x in prompts for row in x.means(plain_heatmaps(plain, x.embedding))]
    with torch.no_grad():
        found = attribute(
            replace(whole, layers=tuple(x for x in recording.layers if "mid_block" not in x.name)), prompts
        )
        torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=0)
        torch.testing.assert_close(attribute(whole, prompts), found, atol=1e-6, rtol=0)


def test_what_words_have_in_common_is_multiplied_once(recording, monkeypatch):
    rows = []
    products = heatmap._products
    monkeypatch.setattr(heatmap, "_products", lambda keys, block: rows.append(keys.shape[-2]) or products(keys, block))
    attribute(recording, PROMPTS["with all but the word in common"])
    assert set(rows) == {3}  # the start is taken off; one other and two words are left of six rows


def test_a_gradient_goes_to_every_row(recording):
    prompt = word(1)
    embedding = prompt.embedding.clone().requires_grad_()
    attribute(recording, replace(prompt, embedding=embedding))[0].mean().backward()
    assert (embedding.grad.abs().amax(dim=1) > 0).all()


@pytest.mark.parametrize("tokens", [2, 3, 7])
@pytest.mark.parametrize("values", [100, 3000, 1 << 19])
def test_however_the_queries_lie(recording, monkeypatch, tokens, values):
    assert all(is_laid_out(x.queries) for x in recording.layers)
    monkeypatch.setitem(heatmap.BLOCK_VALUES, "cpu", values)
    embedding, results = draw(tokens, 32), []
    as_given = replace(recording, layers=tuple(replace(x, queries=x.queries.contiguous()) for x in recording.layers))
    again = replace(recording, layers=side_by_side(as_given.layers))
    apart = replace(recording, layers=tuple(replace(x, queries=laid_out(x.queries)) for x in as_given.layers))
    for one in (recording, again, as_given, apart, merged(recording, CPU)):
        x = embedding.clone().requires_grad_()
        maps = heatmaps(one, x)
        maps[-1].square().mean().backward()
        results.append((maps.detach(), x.grad))
    assert not any(is_laid_out(x.queries) for x in as_given.layers)
    for maps, gradient in results[1:]:
        torch.testing.assert_close(maps, results[0][0], atol=1e-6, rtol=0)
        torch.testing.assert_close(gradient, results[0][1], atol=1e-7, rtol=1e-4)
    assert torch.equal(results[0][0], results[1][0])


def test_steps_and_layers_of_queries_that_are_laid_out(recording):
    given = replace(recording, layers=tuple(replace(x, queries=x.queries.contiguous()) for x in recording.layers))
    for steps in ([0], [1, 2], [0, 2]):
        for tokens in (2, 5):
            found, plain = (heatmaps(x.select(steps=steps), draw(tokens, 32)) for x in (recording, given))
            torch.testing.assert_close(found, plain, atol=1e-6, rtol=0)


def test_layers_of_one_shape_become_one(recording, monkeypatch):
    one = merged(recording, CPU)
    shapes = {(x.height, x.width, x.queries.shape[-1]) for x in recording.layers}
    assert len(one.layers) == len(shapes) < len(recording.layers)
    assert sum(x.queries.shape[1] for x in one.layers) == sum(x.queries.shape[1] for x in recording.layers)
    assert all(
        own.queries.data_ptr() in {x.queries.data_ptr() for x in recording.layers} for own in one.layers
    )  # views, no copies
    some = recording.select(layers=[x.name for x in recording.layers[::2]])
    torch.testing.assert_close(heatmaps(some, draw(3, 32)), heatmaps(merged(some, CPU), draw(3, 32)))
    handle = recording.layers[0].keys.register_forward_hook(lambda *_: None)
    assert merged(recording, CPU) is recording  # someone listens
    handle.remove()
    copies = [replace(x, queries=x.queries.contiguous()) for x in recording.layers]
    monkeypatch.setattr("ovam_core.attention.recording.SMALL", 100)
    large = replace(recording, layers=side_by_side(copies))  # too large to be copied again
    assert all(is_laid_out(x.queries) for x in large.layers)
    assert [x.name for x in merged(large, CPU).layers] == [x.name for y in alike(large.layers) for x in y]


def test_an_optimisation_of_merged_layers_takes_the_same_way(recording, monkeypatch):
    labels = np.zeros((32, 48), np.uint8)
    labels[8:20, 10:30] = 1
    few = replace(RECIPES["fast"], epochs=6)
    found = optimize([recording], [labels], draw(2, 32), few)
    monkeypatch.setattr("ovam_core.attention.heatmap.merged", lambda recording, _: recording)
    monkeypatch.setattr("ovam_core.optimization.merged", lambda recording, _: recording)
    plain = optimize([recording], [labels], draw(2, 32), few)
    np.testing.assert_allclose(found.losses, plain.losses, rtol=1e-4)


def test_the_published_way_is_the_same_sum(recording):
    recording = replace(recording, layers=tuple(x for x in recording.layers if "mid_block" not in x.name))
    theirs = as_published(recording)
    count = sum(x.queries.shape[0] * x.queries.shape[1] for x in recording.layers)
    maps = resize(heatmaps(recording, draw(5, 32)), recording.image_size)
    torch.testing.assert_close(published_maps(theirs, draw(5, 32)) / count, maps, atol=1e-5, rtol=0)
    labels = np.zeros(recording.image_size, np.uint8)
    labels[8:20, 10:30] = 1
    target = torch.from_numpy(np.stack([labels == 0, labels == 1])).float()
    few = replace(RECIPES["paper"], epochs=4, rate=1.0)
    ours = optimize([recording], [labels], draw(2, 32), few).losses
    np.testing.assert_allclose(published_losses(theirs, target, draw(2, 32), few), ours, rtol=1e-4)


# ------------------------------------------------------------------------------------------------ read in one go


class Counted:
    """How often a text encoder is called."""

    def __init__(self, monkeypatch, pipe):
        self.count, kind, forward = 0, type(pipe.text_encoder), type(pipe.text_encoder).forward

        def counted(module, *args, **kwargs):
            self.count += 1
            return forward(module, *args, **kwargs)

        monkeypatch.setattr(kind, "forward", counted)

    def of(self, call):
        before = self.count
        found = call()
        return self.count - before, found


SHORT = ["cat", "car", "dog", "bus", "tree", "bird", "road", "sky"]


def test_eight_words_are_one_call_of_the_text_encoder_and_none_the_next_time(fresh, monkeypatch):
    fresh.tokenizer.add_tokens(SHORT)
    fresh.text_encoder.resize_token_embeddings(len(fresh.tokenizer))
    counted = Counted(monkeypatch, fresh)
    calls, words = counted.of(lambda: attribute_words(fresh, SHORT))
    assert calls == 1
    again, known = counted.of(lambda: attribute_words(fresh, SHORT))
    assert again == 0
    assert [x is y for x, y in zip(words, known, strict=True)] == [True] * 8
    assert counted.of(lambda: attribute_words(fresh, ["sky"]))[0] == 1


def test_where_the_text_encoder_is_the_pipeline_does_not_look_for(fresh, monkeypatch):
    monkeypatch.setattr(type(fresh), "_execution_device", property(lambda _: pytest.fail("it looks")))
    attribute_words(fresh, ["cat"])
    for hook in ("_hf_hook", "_diffusers_hook"):  # of accelerate and of diffusers: they move the weights
        other = make_pipe()
        setattr(next(other.text_encoder.children()), hook, object())
        with monkeypatch.context() as patch:
            patch.setattr(type(other), "_execution_device", property(lambda _: torch.device("meta")))
            assert device_of(other, [other.text_encoder]) == torch.device("meta")


@pytest.mark.parametrize(
    "name", ["sd", "sdxl", "pixart-alpha", "sana", "hunyuan", "sd3", "sd3-without-t5", "flux-dev", "flux-2"]
)
def test_every_family_reads_words_together_as_alone(name):
    pipe = pipe_of(name)
    family = adapter_of(pipe)
    tokens = family.tokenize_all(EIGHT)
    assert tokens == [family.tokenize(text) for text in EIGHT]
    with torch.no_grad():
        together = family.encode_all(tokens)
        alone = [family.encode_batch([one])[0] for one in tokens]
    for one, other, read in zip(together, alone, tokens, strict=True):
        assert one.shape == (len(read.names), family.embed_dim)
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_a_words_embedding_does_not_depend_on_its_neighbours(tiny):
    """To the last bit: exports read each class alone, the page all words of a question."""
    together = attribute_words(tiny, EIGHT)
    for prompt, name in zip(together, EIGHT, strict=True):
        if len(prompt.embedding) <= 5:
            assert torch.equal(attribute_words(tiny, [name])[0].embedding, prompt.embedding)


# --------------------------------------------------------------------------------------- what was read before


def embedded(pipe):
    return attribute_words(pipe, ["cat"])[0].embedding


def changed_row(pipe):
    pipe.text_encoder.get_input_embeddings().weight.data[read_tokens(pipe.tokenizer, "cat").ids[0][1]] = draw(32)


def changed_weight(pipe):
    next(x for x in pipe.text_encoder.modules() if isinstance(x, torch.nn.Linear)).weight.data.mul_(1.5)


def changed_in_place(pipe):
    bias = next(x for name, x in pipe.text_encoder.named_modules() if name.endswith("fc2")).bias
    with torch.no_grad():
        bias[-1] += 1  # none of the numbers that are looked at


def other_encoder(pipe):
    torch.manual_seed(99)
    pipe.text_encoder = type(pipe.text_encoder)(pipe.text_encoder.config).eval()


def with_hook(pipe):
    pipe.text_encoder.register_forward_hook(lambda _module, _args, output: (output[0] + 1,))


def a_word_more(pipe):
    pipe.tokenizer.add_tokens(["cat"])
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer))


def lora(pipe):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "fc1"], init_lora_weights="gaussian")
    peft.inject_adapter_in_model(config, pipe.text_encoder)
    for key, weight in pipe.text_encoder.named_parameters():
        if "lora_B" in key:
            weight.data.normal_(generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "change",
    [changed_row, changed_weight, changed_in_place, other_encoder, with_hook, a_word_more, lora],
)
def test_words_are_read_again_after_a_change(fresh, change):
    before = embedded(fresh).clone()
    assert embedded(fresh) is embedded(fresh)
    change(fresh)
    found = embedded(fresh).clone()
    assert found.shape != before.shape or not torch.allclose(found, before, atol=1e-3)
    remembered._read.clear()
    assert torch.equal(embedded(fresh), found)


def test_a_reading_of_other_settings_is_another(fresh):
    from ovam_core.attention.reading import Reading

    plain = embedded(fresh).clone()
    with read_as(Reading(clip_skip=1)):
        skipped = embedded(fresh).clone()
        assert not torch.allclose(skipped, plain, atol=1e-3)
    assert torch.equal(embedded(fresh), plain)


def test_what_was_read_can_be_changed_by_who_asked(fresh):
    found = embedded(fresh)
    kept = found.clone()
    found *= 2
    assert torch.equal(embedded(fresh), kept)


def test_a_lora_is_set_and_taken_off_again(fresh):
    lora(fresh)
    with_lora = embedded(fresh).clone()
    for module in fresh.text_encoder.modules():
        if isinstance(vars(module).get("scaling"), dict):
            module.scaling = dict.fromkeys(module.scaling, 0.0)
    without = embedded(fresh).clone()
    assert not torch.allclose(with_lora, without, atol=1e-4)


def test_a_word_of_textual_inversion_in_place_of_another(fresh):
    """The tokenizer is as long as before, and knows another word."""
    fresh.load_textual_inversion({"<one>": draw(2, 32)})
    assert has_vectors(fresh.tokenizer)
    (one,) = attribute_words(fresh, ["<one>"])
    assert one.groups == ((1, 2),)
    fresh.unload_textual_inversion()
    assert not has_vectors(fresh.tokenizer)
    pieces = attribute_words(fresh, ["<two>"])[0]
    fresh.load_textual_inversion({"<two>": draw(2, 32, seed=7)})
    assert has_vectors(fresh.tokenizer)
    (two,) = attribute_words(fresh, ["<two>"])
    assert two.groups == ((1, 2),) != pieces.groups
    table = fresh.text_encoder.get_input_embeddings().weight
    assert read_tokens(fresh.tokenizer, "<two>").ids[0][1] == len(fresh.tokenizer) - 2
    torch.testing.assert_close(table[-2:], draw(2, 32, seed=7))


def test_no_more_questions_are_kept_than_a_few(fresh, monkeypatch):
    monkeypatch.setattr(remembered, "MOST", 3)
    for number in range(6):
        attribute_sentence(fresh, f"a cat {number}")
    assert len(remembered._read[fresh]) == 3


# --------------------------------------------------------------------------------------------- several dense CRFs


@pytest.fixture
def masks():
    image = np.random.default_rng(0).integers(0, 40, (40, 56, 3), dtype=np.uint8)
    made = np.zeros((4, 40, 56), bool)
    for number, mask in enumerate(made[:3]):
        mask[5 + number : 25 + number, 8:30] = True
        image[mask] += 30
    return made, image  # the last one is empty


@pytest.fixture(autouse=True)
def forgotten():
    crf._kept.clear()


def pool_is_up(seconds=60):
    pool = crf._pool(os.getpid())
    until = time.monotonic() + seconds
    while pool is not None and not pool.is_up and time.monotonic() < until:
        time.sleep(0.02)
    return pool


def test_masks_refined_in_processes_are_those_of_one_after_the_other(masks, monkeypatch):
    monkeypatch.setattr(crf.os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    made, image = masks
    expected = np.stack([crf.densecrf(mask, image) for mask in made])
    assert np.array_equal(crf.densecrf_each(made, image), expected)  # until they are there, it is done here
    pool = pool_is_up()
    assert pool is not None
    assert pool.is_up
    crf._kept.clear()
    with monkeypatch.context() as patch:
        plain = crf.densecrf
        patch.setattr(
            crf, "densecrf", lambda mask, image: plain(mask, image) if not mask.any() else pytest.fail("here")
        )
        assert np.array_equal(crf.densecrf_each(made, image), expected)
    crf._kept.clear()
    for process in pool._all:
        process._process.kill()  # as if the system had ended them
    assert np.array_equal(crf.densecrf_each(made, image), expected)
    crf._pool.cache_clear()


def test_only_masks_that_changed_are_refined(masks, monkeypatch):
    monkeypatch.setattr(crf, "_pool", lambda _process: None)
    made, image = masks
    refined = []
    plain = crf.densecrf
    monkeypatch.setattr(crf, "densecrf", lambda mask, image: refined.append(mask) or plain(mask, image))
    first = crf.densecrf_each(made, image)
    assert len(refined) == 4
    assert np.array_equal(crf.densecrf_each(made[::-1], image), first[::-1])
    assert len(refined) == 4
    other = made.copy()
    other[1, 30, 40] = True
    crf.densecrf_each(other, image)
    assert len(refined) == 5
    crf.densecrf_each(made, 255 - image)
    assert len(refined) == 9


def test_an_answer_is_told_before_each_mask_and_may_be_ended(masks):
    made, image = masks
    told = []
    crf.densecrf_each(made, image, lambda: told.append(1))
    assert len(told) == 4

    def ends():
        told.append(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        crf.densecrf_each(made, image, ends)
    assert len(told) == 5


def test_several_masks_are_refused_as_one_is(masks, monkeypatch):
    made, image = masks
    with pytest.raises(InputError, match=r"give \[H, W\] and \[H, W, 3\]"):
        crf.densecrf_each(made, image[1:])
    crf.densecrf_each(made, image)
    monkeypatch.setitem(sys.modules, "denseCRF", None)
    with pytest.raises(InputError, match="needs SimpleCRF"):
        crf.densecrf_each(made, image)
