"""ConceptAttention against each model's own blocks: called with the concepts in the prompt's place, before the image as
it was in the run, a block's attention shows what they read.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from pipelines import pipe_of

from ovam_core import METHODS, OVAM, InputError, record
from ovam_core.attention.outputs import concept_maps
from ovam_core.hooks.photograph import record_image
from ovam_core.methods import CONCEPT_ATTENTION
from ovam_core.models.registry import adapter_of
from ovam_core.query import attribute_words
from ovam_core.settings import GenerateSettings, SegmentSettings
from ovam_core.tokens import BACKGROUND, Token

PROMPT = "a photograph of the cat and a red bus"
IMAGE, GRID = (32, 48), (8, 12)
N = GRID[0] * GRID[1]
# The blocks whose outputs are compared: published ones, or as many of the last that the text goes on after.
READ = {"sd3": [1], "sd3.5": [1], "flux-dev": [0, 1, 2], "flux-2": [0, 1, 2]}


def generate(name, guidance=4.0, steps=2):
    return pipe_of(name)(
        prompt=PROMPT,
        num_inference_steps=steps,
        guidance_scale=guidance,
        height=IMAGE[0],
        width=IMAGE[1],
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images


class Spy:
    """What each block was given in a run, and what its joint attention gave: a list of steps for each block."""

    def __init__(self, name, monkeypatch):
        self.name, self.model = name, pipe_of(name).transformer
        self.text_first = name.startswith("flux")
        self.blocks = list(self.model.transformer_blocks)
        self.given, self.gave = [[] for _ in self.blocks], [[] for _ in self.blocks]
        self.inside = None
        original = F.scaled_dot_product_attention

        def spied(*args, **more):
            output = original(*args, **more)
            if self.inside is not None:
                self.gave[self.inside].append(output)
            return output

        monkeypatch.setattr(F, "scaled_dot_product_attention", spied)
        self.handles = [self.model.register_forward_pre_hook(lambda _m, _a, kwargs: self.see(kwargs), with_kwargs=True)]
        for number, block in enumerate(self.blocks):
            self.handles += [
                block.register_forward_pre_hook(self.before(number), with_kwargs=True),
                block.attn.register_forward_pre_hook(self.enter(number)),
                block.attn.register_forward_hook(self.leave),
            ]

    def see(self, kwargs):
        self.ids = kwargs.get("img_ids")

    def before(self, number):
        return lambda _module, _args, kwargs: self.given[number].append(kwargs)

    def enter(self, number):
        def hook(*_):
            self.inside = number

        return hook

    def leave(self, *_):
        self.inside = None

    def pixels(self, output):
        """The image's part of what an attention gave, `[n, heads * d]`."""
        part = output[:, -N:] if self.text_first else output[:, :N]
        return part.transpose(0, 1).flatten(1)

    def text(self, output):
        part = output[:, :-N] if self.text_first else output[:, N:]
        return part.transpose(0, 1).flatten(1)

    @torch.no_grad()
    def maps_of(self, item, concepts, read, temperature):
        """ConceptAttention's formula with the model's own blocks: `[C, *GRID]`."""
        found = []
        steps = len(self.given[0])
        runs = [[one[item] for one in calls[:steps]] for calls in self.gave]
        for step in range(steps):
            text = self.model.context_embedder(concepts)[None]
            for number, block in enumerate(self.blocks):
                given = {**self.given[number][step], "encoder_hidden_states": text}
                for key in given.keys() & {"hidden_states", "temb", "temb_mod_img", "temb_mod_txt"}:
                    given[key] = given[key][item : item + 1]
                if self.text_first:
                    places = torch.zeros(len(concepts), self.ids.shape[-1])
                    if self.name == "flux-2":
                        places[:, 3] = torch.arange(len(concepts))
                    ids = torch.cat([places, self.ids[0] if self.ids.ndim == 3 else self.ids])
                    given["image_rotary_emb"] = self.model.pos_embed(ids)
                text, _ = block(**given)
                if number in read:
                    tokens, pixels = self.text(self.gave[number][-1][0]), self.pixels(runs[number][step])
                    scores = tokens.double() @ pixels.double().T / temperature
                    found.append(torch.softmax(scores, dim=0))
        return torch.stack(found).mean(dim=0).unflatten(1, GRID).float()

    def stop(self):
        for handle in self.handles[:1]:
            handle.remove()
        for number, _ in enumerate(self.blocks):
            self.handles[1 + 3 * number].remove()


@pytest.mark.parametrize("name", READ)
def test_maps_are_the_formula_on_the_models_own_blocks(name, monkeypatch):
    pipe, adapter = pipe_of(name), adapter_of(pipe_of(name))
    plain = generate(name)
    spy = Spy(name, monkeypatch)
    with record(pipe, keep=["outputs"]) as recorder:
        image = generate(name)
    spy.stop()
    assert torch.equal(plain, image)
    recording = recorder.recordings[0]
    names = [f"transformer_blocks.{number}.attn" for number in READ[name]]
    assert [x.name for x in recording.outputs] == names
    concepts = torch.randn(3, adapter.embed_dim, generator=torch.Generator().manual_seed(1))
    for temperature in (1.0, adapter.temperature):
        expected = spy.maps_of(1 if name.startswith("sd3") else 0, concepts, READ[name], temperature)
        found = concept_maps(recording, concepts, temperature)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.sum(dim=0), torch.ones(GRID))
    one = concept_maps(recording.select(steps=[1]), concepts) + concept_maps(recording.select(steps=[0]), concepts)
    torch.testing.assert_close(one / 2, concept_maps(recording, concepts))


def test_the_published_blocks():
    """Of models as deep as those of the papers."""
    for name, depth, expected in (("flux-dev", 19, (15, 16, 17, 18)), ("flux-2", 8, (5, 6, 7)), ("sd3", 24, (9,))):
        adapter = adapter_of(pipe_of(name))
        blocks = [f"transformer_blocks.{number}.attn" for number in range(depth)]
        adapter._blocks = lambda names=blocks: dict.fromkeys(names)
        assert adapter.output_names == tuple(blocks[number] for number in expected)
    assert [adapter_of(pipe_of(name)).temperature for name in ("sd3", "flux-dev", "flux-2")] == [1, 1, 1000]


@pytest.fixture(scope="module")
def made():
    pipe = pipe_of("flux-dev")
    return OVAM(pipe).draw(GenerateSettings.for_model(pipe, PROMPT, steps=2, width=64, height=64), keep=["outputs"])


def test_words_against_the_captions_other_words(made):
    pipe = pipe_of("flux-dev")
    ovam = OVAM(pipe)
    found = ovam.segment(made, ["cat", "red bus"], method="ConceptAttention")
    background = ["photograph"]
    rows = [
        prompt.embedding[list(prompt.groups[0])].mean(dim=0)
        for prompt in attribute_words(pipe, ["cat", "red bus", *background])
    ]
    expected = concept_maps(made.recording, torch.stack(rows))
    np.testing.assert_allclose(found.grid_maps, expected[:2], atol=1e-5)
    winners = F.interpolate(expected[None], size=(64, 64), mode="bilinear", align_corners=False)[0].argmax(dim=0)
    assert np.array_equal(found.masks, np.stack([winners == 0, winners == 1]))


def test_a_file_brings_the_outputs_back(made, tmp_path):
    ovam = OVAM(pipe_of("flux-dev"))
    path = made.save_recording(tmp_path / "x.safetensors")
    again = ovam.load_recording(path)
    answers = [ovam.segment(one, ["cat", "bus"], method="conceptattention").heatmaps for one in (made, again)]
    assert np.array_equal(*answers)
    first, *rest = made.recording.outputs
    for wrong in (
        replace(first, name="elsewhere"),
        replace(first, outputs=first.outputs[:, 1:]),
        replace(first, name=rest[0].name),
    ):
        other = replace(made.recording, outputs=(wrong, *rest))
        replace(made, recording=other).save_recording(path)
        with pytest.raises(InputError, match="lacks a part or holds one of the wrong kind"):
            ovam.load_recording(path)


def test_a_photograph_in_a_mirror():
    pipe = pipe_of("sd3")
    photo = generate("sd3")[0].permute(1, 2, 0).mul(255).byte().numpy()
    photo = Image.fromarray(photo).resize((96, 64))
    concepts = torch.randn(2, adapter_of(pipe).embed_dim, generator=torch.Generator().manual_seed(1))
    plain, turned = (
        concept_maps(record_image(pipe, one, "a cat", keep=["outputs"]), concepts)
        for one in (photo, ImageOps.mirror(photo))
    )
    both = concept_maps(record_image(pipe, photo, "a cat", mirror=True, keep=["outputs"]), concepts)
    torch.testing.assert_close(both, (plain + turned.flip(-1)) / 2, rtol=1e-3, atol=1e-4)


def test_refusals(tiny, made):
    pipe = pipe_of("flux-dev")
    ovam = OVAM(pipe)
    bare = replace(made, recording=replace(made.recording, outputs=()), last_maps=None)
    token = Token(torch.zeros(2, 24), (BACKGROUND, "cat"), "x")
    refused = {
        "not recorded": (lambda: ovam.segment(bare, ["cat", "bus"], method="ConceptAttention"), 'keep=\\["outputs"\\]'),
        "a token": (lambda: ovam.segment(made, [token], method="ConceptAttention"), "compares words; for a token"),
        "a template": (
            lambda: ovam.segment(made, ["cat"], method="ConceptAttention", template="the {}"),
            "asks for words alone",
        ),
        "a UNet": (
            lambda: OVAM(tiny).check_answerable(
                SegmentSettings(("cat",), method="ConceptAttention"), GenerateSettings("a cat")
            ),
            "reads joint attention, which Stable Diffusion 1",
        ),
        "one word": (
            lambda: ovam.check_answerable(
                SegmentSettings(("cat",), method="ConceptAttention"), GenerateSettings("a cat", width=64, height=64)
            ),
            "compares words at each pixel",
        ),
        "one concept": (lambda: concept_maps(made.recording, torch.zeros(1, 24)), "give two or more"),
        "another width": (lambda: concept_maps(made.recording, torch.zeros(2, 23)), "this model takes"),
    }
    for case, (ask, part) in refused.items():
        with pytest.raises(InputError, match=part) as caught:
            ask()
        assert "\n" not in str(caught.value), case
    assert ovam.serves(METHODS["ConceptAttention"])
    assert CONCEPT_ATTENTION.keeps == {"outputs"}
