"""The training script, every stage of it, on a recipe of a few seconds."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import save_file

from ovam_core.models.load import load_pipeline
from training import annotator, figures, model, train, world
from training.masters import Masters
from training.patches import DEVIATION, PatchSpace
from training.recipes import CPU, FULL


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    monkeypatch.setattr(train, "CHUNK", 50)
    monkeypatch.setattr(annotator, "FOLDER", tmp_path / "annotator")
    return replace(
        CPU,
        size=32,
        vae_widths=(8, 16),
        unet_widths=(16, 16, 32),
        time_width=64,
        scenes=50,
        vae_scenes=16,
        vae_minutes=0.02,
        vae_batch=8,
        unet_batch=8,
        annotator_scenes=16,
        annotator_minutes=0.01,
        text_width=32,
    )


class Steps:
    """A clock that is over after so many looks at it, however busy the machine is."""

    def __init__(self, left: int):
        self.left = left

    def over(self) -> bool:
        self.left -= 1
        return self.left < 0


def test_every_stage_runs_stops_and_goes_on(tiny, tmp_path):
    work, out, forever = tmp_path / "work", tmp_path / "model", train.Clock(600)
    work.mkdir()
    with ThreadPoolExecutor(1) as pool:
        assert not train.make_latents(tiny, work, pool, train.Clock(0))
        assert train.make_latents(tiny, work, pool, forever)
        latents, captions = train.load_latents(work)
        assert latents.shape == (50, 8, 16, 16)
        assert len(captions) == 50
        assert not train.train_unet(tiny, work, 5, Steps(3))
        first = torch.load(work / "unet.pt", weights_only=True)
        assert train.train_unet(tiny, work, first["spent"] / 60 + 0.01, forever)
        again = torch.load(work / "unet.pt", weights_only=True)
        assert again["samples"] > first["samples"] > 0
        assert not train.train_autoencoder(tiny, work, pool, train.Clock(0)), "a call out of time saves and says so"
        assert (work / "vae.pt").exists()
        assert train.train_autoencoder(tiny, work, pool, forever)
        assert not train.train_annotator(tiny, work, 0.01, pool, train.Clock(0))
        assert train.train_annotator(tiny, work, 0.01, pool, forever)
    marks = json.loads((work / "annotator" / "figures.json").read_text())
    assert marks["images"] > 0
    assert all(
        0 <= marks[name] <= 1 for name in ("rendered", "rendered_inside", "reconstructed", "reconstructed_inside")
    )
    train.write_pipeline(tiny, work, out)
    pipe = StableDiffusionPipeline.from_pretrained(out)
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a cat", num_inference_steps=2).images[0]
    assert image.size == (32, 32)

    adopted = tmp_path / "adopted"
    adopted.mkdir()
    train.adopt(out, tiny, adopted)
    state = torch.load(adopted / "unet.pt", weights_only=True)
    assert state["samples"] == again["samples"]
    assert state["spent"] == pytest.approx(again["spent"], abs=3)
    averages = again["masters"]["average"]["shadow_params"]
    adopted_weights = state["masters"]["weights"]
    assert len(averages) == len(adopted_weights)
    for average, weight in zip(averages, adopted_weights, strict=True):  # through float16; the learned words alone
        assert torch.allclose(average, weight, atol=2e-3)
    for file in work.glob("*.npz"):
        shutil.copy(file, adopted)
    assert train.train_unet(tiny, adopted, state["spent"] / 60 + 0.01, forever), "and it goes on"
    with ThreadPoolExecutor(1) as pool:
        assert train.train_annotator(tiny, adopted, 0.01, pool, forever), "nothing is left of these minutes"
        assert json.loads((adopted / "annotator" / "figures.json").read_text()) == marks
        assert train.train_annotator(tiny, adopted, 0.02, pool, forever)
    more = json.loads((adopted / "annotator" / "figures.json").read_text())
    assert more["minutes"] == 0.02
    assert more["images"] > marks["images"]
    with pytest.raises(ValueError, match="was made by the recipe cpu"):
        train.adopt(out, replace(tiny, name="other"), adopted)


@torch.no_grad()
def test_what_is_adopted_goes_on_in_the_latent_space_of_its_autoencoder():
    """Where components vary almost alike, and in their signs, a library decides: fitted anew they would be others."""
    images, _, _ = zip(*(train._render(seed, CPU) for seed in range(12)), strict=True)
    scenes = train.to_tensor(np.stack(images)).cpu()
    space = PatchSpace.fit(np.stack(images), CPU)
    again = PatchSpace.of_encoder(space.encode, scenes[:8], space.side)
    torch.testing.assert_close(again.encode(scenes[8:]), space.encode(scenes[8:]), atol=0.02, rtol=0)
    vae = AutoencoderKL.from_pretrained(figures.CARD, subfolder="vae").float()
    found = train.space_of(vae, CPU).encode(scenes)
    own = vae.encode(scenes).latent_dist.mode()
    for one, other in zip(found.movedim(1, 0), own.movedim(1, 0), strict=True):
        assert torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1] > 0.99


def test_common_words_take_no_place_of_those_that_are_learned():
    base = model.tokenizer(world.all_words(CPU.nouns), CPU.max_tokens)
    encoder = model.text_encoder(base, 32)
    larger, grown = model.with_common_words(base, encoder, ["moon", "cat", "astronaut"])
    assert all(
        larger.convert_tokens_to_ids(word) == base.convert_tokens_to_ids(word) for word in world.all_words(CPU.nouns)
    )
    assert len(larger) == len(base) + 2
    text = base("a cat and a potted plant on grass", padding="max_length", return_tensors="pt").input_ids
    assert torch.equal(
        larger("a cat and a potted plant on grass", padding="max_length", return_tensors="pt").input_ids, text
    )
    assert torch.equal(encoder(text)[0], grown(text)[0])
    moon, astronaut = (
        grown.get_input_embeddings().weight[larger.convert_tokens_to_ids(word)] for word in ("moon", "astronaut")
    )
    assert torch.equal(moon, astronaut)
    assert moon.norm() > 0


def test_latents_are_the_principal_components_of_patches(tiny):
    """Against numpy's singular value decomposition; DEVIATION over all; as in the file after a round trip."""
    images = np.stack([world.scene(seed, 32).image for seed in range(40)])
    space = PatchSpace.fit(images, tiny)
    latents = space.encode(torch.from_numpy(images.transpose(0, 3, 1, 2)).float() / 127.5 - 1)
    patches = images.reshape(40, 16, 2, 16, 2, 3).transpose(0, 1, 3, 5, 2, 4).reshape(-1, 12) / 127.5 - 1
    axes = np.linalg.svd(patches - patches.mean(0), full_matrices=False)[2][:8]
    ours = space.axes.numpy() / np.linalg.norm(space.axes.numpy(), axis=1, keepdims=True)
    assert np.allclose(np.abs((ours[:8] * axes).sum(1)), 1, atol=1e-3)
    assert latents.std() == pytest.approx(DEVIATION, abs=0.03)


def test_the_full_recipe_is_as_large_as_promised():
    """Built on the meta device: 256 pixels, 32 x 32 latents, within 64 MiB of float16 and 16 MiB a shard."""
    from training import model

    with torch.device("meta"):
        parts = [model.unet(FULL), model.autoencoder(FULL)]
    assert FULL.size == 256
    assert FULL.latent_size >= 32
    assert sum(map(model.parameters, parts)) * 2 < 60 * 2**20


def test_annotator_reads_only_labels_and_measures_iou():
    labels = torch.zeros(4, 4, dtype=torch.uint8).numpy()
    labels[:2] = 3
    predicted = labels.copy()
    predicted[0] = 0
    iou = annotator.intersection_over_union(predicted, labels)
    assert iou[3] == pytest.approx(0.5)
    assert iou[0] == pytest.approx(8 / 12)
    assert torch.isnan(torch.tensor(iou[1]))


@pytest.mark.parametrize("text", ["nan", "inf", "0", "-3", "many"])
@pytest.mark.parametrize("option", ["--minutes", "--annotator-minutes"])
def test_budgets_that_cannot_be_spent(monkeypatch, capsys, tmp_path, option, text):
    monkeypatch.setattr("sys.argv", ["train", "cpu", f"{option}={text}", "--work", str(tmp_path / "work")])
    with pytest.raises(SystemExit) as left:
        train.main()
    assert left.value.code == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


def test_borders_can_be_left_out():
    labels = np.zeros((1, 6, 6), np.uint8)
    labels[0, 3:, 2:] = 7
    touching = [
        [
            any(
                labels[0, y, x] != labels[0, v, u]
                for v, u in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1))
                if 0 <= v < 6 and 0 <= u < 6
            )
            for x in range(6)
        ]
        for y in range(6)
    ]
    void = annotator.without_borders(labels)
    assert np.array_equal(void[0] == annotator.VOID, np.array(touching))
    predicted = np.where(void == annotator.VOID, 1, labels)  # wrong there alone
    assert np.nanmin(annotator.intersection_over_union(predicted, void)) == 1


def test_the_annotators_loss_counts_borders_more():
    truth = torch.zeros(1, 8, 8, dtype=torch.int64)
    truth[:, :, 4:] = 2
    right = 8.0 * torch.nn.functional.one_hot(truth, annotator.CLASSES).movedim(-1, 1).float()
    losses = []
    for column in (0, 3):  # one column of the background taken for the object: far from the border, and beside it
        scores = right.clone()
        scores[..., column] = right[..., 7]
        losses.append(annotator.loss(scores, truth).item())
    assert annotator.loss(right, truth).item() < losses[0] < losses[1]


def test_the_shipped_card_says_what_was_measured():
    measured = json.loads((figures.CARD / "figures.json").read_text())
    trained = json.loads((figures.CARD / "training.json").read_text())
    assert (figures.CARD / "README.md").read_text() == figures.card(measured, trained, measured["annotator"])
    assert measured["annotator"] == json.loads((annotator.FOLDER / "figures.json").read_text())


def test_rows_of_an_edition_that_was_measured_for_more():
    assert figures.further_rows({}) == ""
    beside = {"which_of_two": 0.9, "three_found": 0.25, "iou": 0.61}
    found = {"three_found": 0.5, "three_prompts": 100, "grid": 32, "ceiling": 0.845}
    rows = figures.further_rows(found | {"named": {"right": 150, "of": 200}, "beside": beside}).splitlines()
    assert len(rows) == 4
    assert all(row.count(" | ") == 2 for row in rows)
    assert all(part in row for row, part in zip(rows, ("50.0%", "84.5%", "75.0%", "IoU 0.610"), strict=True))
    assert 1 > figures.ceiling(64, 4) > figures.ceiling(16, 4) > 0.3


def test_the_figures_noise_a_scene_as_the_training_did():
    """Eq. 4 of DDPM with the schedule's own sums, whatever sampler the pipeline carries."""
    pipe = load_pipeline("emoji-voc", "cpu")
    made = world.scene(world.HELD_OUT, 128)
    seen = []
    hook = pipe.unet.register_forward_pre_hook(lambda module, given: seen.append(given))
    figures.record_scene(pipe, made.image, made.caption, times=(100, 300))
    hook.remove()
    noisy, times = seen[0][:2]
    pixels = torch.from_numpy(made.image.transpose(2, 0, 1)[None]).float() / 127.5 - 1
    with torch.no_grad():
        clean = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
    noise = torch.randn(noisy.shape, generator=torch.Generator().manual_seed(0))
    kept = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)[times][:, None, None, None]
    assert times.tolist() == [100, 300]
    assert torch.allclose(noisy, kept.sqrt() * clean + (1 - kept).sqrt() * noise, atol=1e-4)


def test_loss_weights():
    scheduler = train.model.train_scheduler()
    weights = train.loss_weights(scheduler)
    signal = scheduler.alphas_cumprod.double().numpy()
    expected = np.minimum(signal / (1 - signal), 5) * (1 - signal)  # min(SNR, 5) / (SNR + 1)
    expected = np.maximum(expected, 0.25)
    assert np.allclose(weights, expected / expected.mean(), rtol=1e-4)


def test_masters_are_what_the_optimisers_alone_would_make():
    """One convolution by Muon on its matrix, one bias by AdamW, in float32; the module holds them rounded."""
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(40, 48, 3)
    matrix, bias = layer.weight.detach().flatten(1).clone(), layer.bias.detach().clone()
    masters = Masters([layer], rate=1e-2)
    picture = torch.randn(2, 40, 5, 5).bfloat16()
    masters.step(layer(picture).float().square().mean(), 0.5)
    matrix.grad, bias.grad = (weight.grad for weight in masters.weights)
    torch.optim.Muon([matrix], lr=5e-3, momentum=0.95, weight_decay=1e-2, adjust_lr_fn="match_rms_adamw").step()
    torch.optim.AdamW([bias], lr=5e-3, betas=(0.9, 0.99), weight_decay=1e-3).step()
    assert torch.allclose(masters.weights[0], matrix, atol=1e-6)
    assert torch.allclose(masters.weights[1], bias, atol=1e-6)
    assert torch.equal(layer.weight, masters.weights[0].reshape(48, 40, 3, 3).bfloat16())
    plain = torch.nn.Conv2d(40, 48, 3)
    masters.averaged([plain])
    assert torch.allclose(plain.weight.flatten(1), masters.average.shadow_params[0])


def test_a_start_of_weights_alone(tiny, tmp_path):
    """The state dict of a longer run elsewhere, with its latent space beside it."""
    words = model.tokenizer(world.all_words(tiny.nouns), tiny.max_tokens)
    unet, encoder = model.unet(tiny), model.text_encoder(words, tiny.text_width)
    state = {f"unet.{name}": weight.half() for name, weight in unet.state_dict().items()}
    state |= {f"text_encoder.{name}": weight for name, weight in encoder.state_dict().items()}
    source, work = tmp_path / "start", tmp_path / "work"
    source.mkdir()
    work.mkdir()
    save_file(state, source / "live.safetensors")
    (source / "facts.json").write_text(json.dumps({"samples": 93120, "minutes": 75.3}))
    PatchSpace.fit(np.stack([world.scene(seed, 32).image for seed in range(20)]), tiny).save(source / "space.npz")
    vae = model.autoencoder(tiny)
    save_file({name: weight.contiguous() for name, weight in vae.state_dict().items()}, source / "vae.safetensors")
    train.adopt(source / "live.safetensors", tiny, work)
    assert torch.allclose(train.load_autoencoder(tiny, work).cpu().encoder.conv_in.weight, vae.encoder.conv_in.weight)
    begun = torch.load(work / "unet.pt", weights_only=True)
    assert begun["samples"] == 93120
    assert begun["spent"] == pytest.approx(75.3 * 60)
    assert (work / "space.npz").read_bytes() == (source / "space.npz").read_bytes()
    adopted, _ = train.averaged_unet(tiny, work, words)
    assert torch.allclose(adopted.conv_in.weight, unet.conv_in.weight, atol=1e-3)
    with pytest.raises(ValueError, match="another build"):
        train.adopt(source / "live.safetensors", replace(tiny, unet_widths=(16, 32, 32)), tmp_path)
