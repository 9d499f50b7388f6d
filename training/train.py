"""Make `models/emoji-voc` from nothing: `python -m training.train cpu` (or `full`, on a GPU; torch 2.9 or newer).

Four stages, each resumed from its own checkpoint under `training/work/<recipe>`: latents, UNet with text encoder,
autoencoder, annotator; then the pipeline folder is written. The latent space is a fixed linear one, the principal
components of pixel patches, which the autoencoder learns to write and to read: so the UNet need not wait for it, and a
decoder that sees noisy latents forgives the UNet small errors. `--minutes` and `--annotator-minutes` add to a budget on
a later run; `--stop-after` ends a call cleanly before a time limit. No mask is ever seen by the diffusion model or the
autoencoder: only the annotator reads label maps.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from einops import rearrange
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from ovam_core.models.load import WORDS_FILE
from training import annotator, common, model, world
from training.masters import Masters
from training.patches import DEVIATION, PatchSpace
from training.recipes import RECIPES, Recipe

HERE = Path(__file__).parent
CHUNK = 2000  # scenes a latent file
VAE_SEED, ANNOTATOR_SEED = world.HELD_OUT // 2, world.HELD_OUT // 4  # first seeds of their scenes
LATENT_NOISE = 0.3 * DEVIATION  # at most
CAPTION_DROP = 0.1
# Weights that AdamW steps, and not Muon, whatever their shape.
UNET_PLAIN = ("conv_in", "conv_out", "embeddings.", "final_layer_norm")
VAE_PLAIN = ("conv_in", "conv_out", "quant_conv")
RAMP = 100  # first steps of a call, at a rising rate: a run adopted from weights alone has no moments yet
SAVE_EVERY = 120  # seconds
ENCODED = 64  # scenes from which an adopted autoencoder's latent space is told
FLOOR = 0.25  # of the loss weights: without it the first steps, which decide what stands where, weigh next to nothing


class Clock:
    """Wall-clock budget of one call, shared by its stages."""

    def __init__(self, stop_after: float) -> None:
        self.end = time.monotonic() + stop_after

    def over(self) -> bool:
        return time.monotonic() >= self.end


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast() -> torch.autocast:
    return torch.autocast(device().type, torch.bfloat16)


def _render(seed: int, recipe: Recipe) -> tuple[np.ndarray, np.ndarray, str]:
    """Image uint8 [S, S, 3], label map uint8 [S, S] and caption of one seed."""
    made = world.scene(seed, recipe.size, recipe.nouns, recipe.counts)
    return made.image, made.labels, made.caption


def render(seeds: range, recipe: Recipe, pool: ProcessPoolExecutor) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Images uint8 [N, S, S, 3], label maps uint8 [N, S, S] and captions of a range of seeds."""
    images, labels, captions = zip(*pool.map(partial(_render, recipe=recipe), seeds, chunksize=64), strict=True)
    return np.stack(images), np.stack(labels), list(captions)


def _as_input(image: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] to float32 [1, 3, H, W] in [-1, 1]."""
    return rearrange(image, "h w c -> 1 c h w").astype(np.float32) / 127.5 - 1


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """uint8 [N, H, W, 3] to float32 [N, 3, H, W] in [-1, 1] on the device."""
    return rearrange(torch.from_numpy(images).to(device()), "n h w c -> n c h w").float() / 127.5 - 1


def save(path: Path, state: dict) -> None:
    """Beside and renamed, so that a call ended half-way leaves the last good checkpoint."""
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def batches(count: int, size: int, seed: int) -> Iterator[np.ndarray]:
    """Index batches without end, each pass in a new order."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(count)
        yield from (order[start : start + size] for start in range(0, count - size + 1, size))


def crops(images: np.ndarray, side: int, rng: np.random.Generator) -> np.ndarray:
    """The same random window of every image of a batch: four times the steps of whole images at the same cost."""
    top, left = rng.integers(0, images.shape[1] - side + 1, 2)
    return images[:, top : top + side, left : left + side]


def edges(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Differences of neighbours along rows [N, 3, H, W - 1] and along columns [N, 3, H - 1, W]."""
    return images.diff(dim=-1), images.diff(dim=-2)


def reconstruction_loss(made: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """L1 on pixels and on their differences at two scales: sharp outlines without a perceptual network."""
    loss = F.l1_loss(made, image)
    for scale in (1, 2):
        pair = [F.avg_pool2d(picture, scale) if scale > 1 else picture for picture in (made, image)]
        loss = loss + 0.5 * sum(
            F.l1_loss(ours, theirs) for ours, theirs in zip(edges(pair[0]), edges(pair[1]), strict=True)
        )
    return loss


def cosine_rate(now: float, minutes: float, warmup: float = 0.02, floor: float = 0.03) -> float:
    """Linear warm-up, then a cosine to `floor`, as a factor of the peak rate."""
    progress = now / minutes
    if progress < warmup:
        return progress / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def steady_rate(now: float, minutes: float, warmup: float = 0.01, floor: float = 0.05) -> float:
    """Warm-up, a constant rate, and a linear fall over the last third, an hour at most.

    A run can go on from before the fall. `now` and `minutes` are of training, from its start to its end.
    """
    left = (minutes - now) / min(minutes / 3, 60)
    return max(floor, min(1.0, now / (warmup * minutes), left))


class Training(Protocol):
    """One of the three trainings, as `spend` runs it."""

    name: str
    minutes: float  # the budget, of all calls together
    spent: float  # seconds, of all calls together
    samples: int

    def step(self, progress: float, factor: float, /) -> float:
        """One step at `factor` times the rate; the loss. progress: share of the budget that is spent."""

    def save(self) -> None:
        """Writes the checkpoint."""


def spend(training: Training, clock: Clock, rate: Callable[[float, float], float]) -> bool:
    """The loop of all trainings: steps until the minutes are spent (True) or this call's time is over (False).

    rate: (minutes spent, minutes in all) to the factor of the peak rate.
    """
    before, begun = training.spent, time.monotonic()
    saved, losses = begun, []
    for step in itertools.count():
        training.spent = before + time.monotonic() - begun
        done, over = training.spent >= training.minutes * 60, clock.over()  # asked once: what ends the call is saved
        if done or over or time.monotonic() - saved > SAVE_EVERY:
            saved = time.monotonic()
            training.save()
        if done or over:
            return done
        now = training.spent / 60
        losses.append(training.step(now / training.minutes, rate(now, training.minutes) * min(1.0, (step + 1) / RAMP)))
        if step % 100 == 99:
            pace = training.samples / max(training.spent, 1)
            about = f"{training.samples} samples, {pace:.1f}/s, loss {np.mean(losses[-100:]):.4f}"
            print(f"{training.name} {now:5.1f} min {about}", flush=True)
    raise AssertionError("count() has no end")


def resumed(path: Path) -> dict:
    """The checkpoint, or what stands for none."""
    if path.exists():
        return torch.load(path, weights_only=True, map_location=device())
    return {"spent": 0.0, "samples": 0}


def _render_latents(seed: int, recipe: Recipe, path: Path) -> tuple[np.ndarray, str]:
    torch.set_num_threads(1)  # this runs in a pool with a process a core
    image, _, caption = _render(seed, recipe)
    return PatchSpace.load(path).encode(torch.from_numpy(_as_input(image)))[0].half().numpy(), caption


def make_latents(recipe: Recipe, work: Path, pool: ProcessPoolExecutor, clock: Clock) -> bool:
    """The latent space, then latents float16 and captions, a file per CHUNK scenes; what is there already is kept."""
    path = work / "space.npz"
    if not path.exists():
        PatchSpace.fit(render(range(VAE_SEED, VAE_SEED + 1000), recipe, pool)[0], recipe).save(path)
    for first in range(0, recipe.scenes, CHUNK):
        chunk = work / f"latents_{first // CHUNK:04d}.npz"
        if chunk.exists():
            continue
        if clock.over():
            return False
        seeds = range(first, first + CHUNK)
        latents, captions = zip(
            *pool.map(partial(_render_latents, recipe=recipe, path=path), seeds, chunksize=64), strict=True
        )
        np.savez(chunk.with_suffix(".part.npz"), latents=np.stack(latents), captions=np.array(captions))
        chunk.with_suffix(".part.npz").replace(chunk)
        print(f"latents {first + CHUNK}/{recipe.scenes}", flush=True)
    return True


def load_latents(work: Path) -> tuple[torch.Tensor, list[str]]:
    """Latents [N, C, h, w] in the files' dtype, and their captions."""
    files = [np.load(path) for path in sorted(work.glob("latents_*[0-9].npz"))]
    return torch.from_numpy(np.concatenate([file["latents"] for file in files])), [
        str(caption) for file in files for caption in file["captions"]
    ]


def loss_weights(scheduler, limit: float = 5.0, floor: float = FLOOR) -> torch.Tensor:
    """Loss weights of v-prediction by time, float32 [T] with a mean of 1: min(SNR, limit) / (SNR + 1) (Hang et al.,
    2023), and `floor` at least.
    """
    signal = scheduler.alphas_cumprod
    ratio = signal / (1 - signal)
    weights = (ratio.clamp(max=limit) / (ratio + 1)).clamp(min=floor)
    return (weights / weights.mean()).float()


class UNetTraining:
    """UNet and text encoder together, on latents and captions."""

    name = "unet"

    def __init__(self, recipe: Recipe, work: Path, minutes: float):
        self.path, self.recipe, self.minutes = work / "unet.pt", recipe, minutes
        self.scheduler = model.train_scheduler()
        self.weights_of = loss_weights(self.scheduler).to(device())
        latents, captions = load_latents(work)
        self.latents = latents.to(device())
        words = model.tokenizer(world.all_words(recipe.nouns), recipe.max_tokens)
        read = partial(words, padding="max_length", truncation=True, return_tensors="pt")
        self.tokens, self.empty = (read(text).input_ids.to(device()) for text in (captions, ""))
        self.unet, self.encoder = build_unet(recipe, words)
        self.masters = Masters([self.unet, self.encoder], recipe.unet_rate, plain=UNET_PLAIN)
        state = resumed(self.path)
        self.spent, self.samples = state["spent"], state["samples"]
        if "masters" in state:
            self.masters.load_state_dict(state["masters"])
        self.order = batches(len(self.latents), recipe.unet_batch, self.samples)

    def step(self, _progress: float, factor: float) -> float:
        index = torch.from_numpy(next(self.order)).to(device())
        ids = torch.where(torch.rand(len(index), 1, device=device()) < CAPTION_DROP, self.empty, self.tokens[index])
        clean = self.latents[index].float()
        noise = torch.randn_like(clean)
        times = torch.randint(0, self.scheduler.config.num_train_timesteps, (len(index),), device=device())
        noisy = self.scheduler.add_noise(clean, noise, times)
        target = self.scheduler.get_velocity(clean, noise, times)
        made = self.unet(noisy.bfloat16(), times, self.encoder(ids)[0]).sample.float()
        errors = (made - target).square().mean(dim=(1, 2, 3))
        loss = (errors * self.weights_of[times]).mean()
        self.masters.step(loss, factor)
        self.samples += len(index)
        return loss.item()

    def save(self) -> None:
        save(self.path, {"masters": self.masters.state_dict(), "spent": self.spent, "samples": self.samples})


def build_unet(recipe: Recipe, words: CLIPTokenizer) -> tuple[torch.nn.Module, torch.nn.Module]:
    """UNet and text encoder in float32 on the device."""
    unet, encoder = model.unet(recipe).to(device()), model.text_encoder(words, recipe.text_width).to(device())
    if device().type == "cpu":  # the backward pass of PyTorch's fused attention is slow there: a third of the rate
        unet.set_attn_processor(AttnProcessor())
    return unet, encoder


def train_unet(recipe: Recipe, work: Path, minutes: float, clock: Clock) -> bool:
    """True when its minutes are spent."""
    return spend(UNetTraining(recipe, work, minutes), clock, steady_rate)


class AutoencoderTraining:
    """Encoder to the patch components, decoder from noisy ones; no masks in its loss."""

    name = "autoencoder"

    def __init__(self, recipe: Recipe, work: Path, images: np.ndarray):
        self.path, self.recipe, self.minutes, self.images = work / "vae.pt", recipe, recipe.vae_minutes, images
        self.space, self.vae = load_space(work), model.autoencoder(recipe).to(device())
        self.masters = Masters([self.vae], recipe.vae_rate, decay=0.998, plain=VAE_PLAIN)
        state = resumed(self.path)
        self.spent, self.samples = state["spent"], state["samples"]
        if "masters" in state:
            self.masters.load_state_dict(state["masters"])
        self.order = batches(len(images), recipe.vae_batch, self.samples)
        self.rng = np.random.default_rng(self.samples)

    def step(self, progress: float, factor: float) -> float:
        batch = next(self.order)
        # Whole images at the end: group normalisation sees the statistics it will meet in use.
        whole = progress > 0.85
        pixels = (
            self.images[batch[: len(batch) // 4]]
            if whole
            else crops(self.images[batch], self.recipe.size // 2, self.rng)
        )
        picture = to_tensor(pixels)
        if self.rng.random() < 0.5:
            picture = picture.flip(-1)
        latents = self.space.encode(picture)
        noise = LATENT_NOISE * torch.rand(len(latents), 1, 1, 1, device=latents.device) * torch.randn_like(latents)
        encoded = self.vae.encode(picture.bfloat16()).latent_dist.mean.float()
        made = self.vae.decode((latents + noise).bfloat16()).sample.float()
        loss = reconstruction_loss(made, picture) + F.mse_loss(encoded, latents)
        self.masters.step(loss, factor)
        self.samples += len(picture)
        return loss.item()

    def save(self) -> None:
        save(self.path, {"masters": self.masters.state_dict(), "spent": self.spent, "samples": self.samples})


def train_autoencoder(recipe: Recipe, work: Path, pool: ProcessPoolExecutor, clock: Clock) -> bool:
    """True when its minutes are spent."""
    if resumed(work / "vae.pt")["spent"] >= recipe.vae_minutes * 60:
        return True
    images = render(range(VAE_SEED, VAE_SEED + recipe.vae_scenes), recipe, pool)[0]
    return spend(AutoencoderTraining(recipe, work, images), clock, cosine_rate)


def load_space(work: Path) -> PatchSpace:
    return PatchSpace.load(work / "space.npz").to(device())


def load_autoencoder(recipe: Recipe, work: Path) -> torch.nn.Module:
    """The averaged autoencoder, float32 on the device."""
    masters = Masters([model.autoencoder(recipe).to(device())], recipe.vae_rate, plain=VAE_PLAIN)
    masters.load_state_dict(resumed(work / "vae.pt")["masters"])
    vae = model.autoencoder(recipe).to(device()).eval()
    masters.averaged([vae])
    return vae


@torch.no_grad()
def generator_look(vae: torch.nn.Module, space: PatchSpace, images: np.ndarray, noise: float) -> np.ndarray:
    """The same pictures as the decoder shows them, from slightly wrong latents."""
    made = []
    for part in np.array_split(images, max(len(images) // 50, 1)):
        latents = space.encode(to_tensor(part))
        latents = latents + noise * torch.rand(len(part), 1, 1, 1, device=latents.device) * torch.randn_like(latents)
        with autocast():
            decoded = vae.decode(latents).sample.float()
        made.append(rearrange(((decoded.clamp(-1, 1) + 1) * 127.5).byte(), "n c h w -> n h w c").cpu().numpy())
    return np.concatenate(made)


def voc_only(labels: np.ndarray) -> np.ndarray:
    """Label maps of the world to uint8 VOC ids, other nouns to background 0."""
    return np.where(labels < annotator.CLASSES, labels, 0).astype(np.uint8)


class AnnotatorTraining:
    """Supervised segmentation on exact label maps."""

    name = "annotator"

    def __init__(self, work: Path, minutes: float, images: np.ndarray, labels: np.ndarray):
        self.path, self.minutes, self.images = work / "annotator.pt", minutes, images
        self.labels = torch.from_numpy(labels).to(device())
        self.network = annotator.build().to(device())
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=annotator.RATE, weight_decay=1e-3, fused=True)
        state = resumed(self.path)
        self.spent, self.samples = state["spent"], state["samples"]
        if "network" in state:
            self.network.load_state_dict(state["network"])
        if "optimizer" in state:
            self.optimizer.load_state_dict(state["optimizer"])
        self.order = batches(len(images), annotator.BATCH, self.samples)

    def step(self, _progress: float, factor: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = annotator.RATE * factor
        batch = next(self.order)
        pictures, truth = annotator.mirror(
            to_tensor(self.images[batch]), self.labels[torch.from_numpy(batch).to(device())]
        )
        with autocast():
            scores = annotator.logits(self.network, annotator.vary(pictures))
        loss = annotator.loss(scores.float(), truth.long())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.samples += len(batch)
        return loss.item()

    def save(self) -> None:
        state = {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}
        save(self.path, state | {"spent": self.spent, "samples": self.samples})


def train_annotator(recipe: Recipe, work: Path, minutes: float, pool: ProcessPoolExecutor, clock: Clock) -> bool:
    """True when its minutes are spent; then its figures are written."""
    folder = work / "annotator"
    if (folder / "figures.json").exists() and json.loads((folder / "figures.json").read_text())["minutes"] >= minutes:
        return True
    vae, space = load_autoencoder(recipe, work), load_space(work)
    images, labels, _ = render(range(ANNOTATOR_SEED, ANNOTATOR_SEED + recipe.annotator_scenes), recipe, pool)
    images = np.concatenate([images, generator_look(vae, space, images[: len(images) // 2], 2 * LATENT_NOISE)])
    labels = voc_only(np.concatenate([labels, labels[: len(labels) // 2]]))
    training = AnnotatorTraining(work, minutes, images, labels)
    if not spend(training, clock, steady_rate):
        return False
    figures = {"images": training.samples, "minutes": minutes}
    figures |= measure_annotator(training.network, vae, space, recipe, pool)
    print("annotator", figures, flush=True)
    training.network.cpu().half().save_pretrained(folder)
    (folder / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    return True


def measure_annotator(network, vae, space: PatchSpace, recipe: Recipe, pool: ProcessPoolExecutor) -> dict[str, float]:
    """mIoU on 400 scenes that no training sees, as rendered and as the decoder shows them; and without objects'
    borders.
    """
    images, labels, _ = render(range(world.HELD_OUT, world.HELD_OUT + 400), recipe, pool)
    network.eval()
    figures = {}
    for name, shown in (("rendered", images), ("reconstructed", generator_look(vae, space, images, 0.0))):
        parts = np.array_split(shown, 20)
        made = np.concatenate(
            [annotator.annotate(network, [Image.fromarray(image) for image in part]) for part in parts]
        )
        for kind, truth in ((name, voc_only(labels)), (f"{name}_inside", annotator.without_borders(voc_only(labels)))):
            figures[kind] = float(np.nanmean(annotator.intersection_over_union(made, truth)))
    return figures


def adopt(source: Path, recipe: Recipe, work: Path) -> None:
    """Checkpoints in `work`, where it has none, from weights alone, so that a run can go on: the optimisers begin anew.

    source: a pipeline folder that this script wrote, whose latent space its autoencoder tells; or a safetensors file of
    a UNet and its text encoder (keys `unet.` and `text_encoder.`), beside which a facts.json may say how many samples
    and minutes they had, space.npz is their latent space, and vae.safetensors its autoencoder. Raises ValueError for
    what is neither, and for weights of another build than the recipe's.
    """
    words = model.tokenizer(world.all_words(recipe.nouns), recipe.max_tokens)
    if source.is_file():
        _adopt_weights(source, recipe, work, words)
    elif (source / "training.json").is_file():
        _adopt_pipeline(source, recipe, work, words)
    else:
        raise ValueError(f"'{source}' is no folder that this script wrote: it has no training.json.")


def _adopt_weights(file: Path, recipe: Recipe, work: Path, words: CLIPTokenizer) -> None:
    facts_file, space = file.with_name("facts.json"), file.with_name("space.npz")
    facts = json.loads(facts_file.read_text()) if facts_file.exists() else {}
    state = load_file(file)
    parts = {
        part: {name.removeprefix(f"{part}."): weight.float() for name, weight in state.items() if name.startswith(part)}
        for part in ("unet", "text_encoder")
    }
    if space.exists() and not (work / "space.npz").exists():
        shutil.copy(space, work / "space.npz")
    _begin_from(
        parts["unet"], parts["text_encoder"], recipe, work, words, facts.get("minutes", 0), facts.get("samples", 0)
    )
    autoencoder = file.with_name("vae.safetensors")
    if autoencoder.exists():
        weights = {name: weight.float() for name, weight in load_file(autoencoder).items()}
        _begin_autoencoder(weights, recipe, work, facts.get("vae_minutes", 0), facts.get("vae_images", 0))


def _adopt_pipeline(folder: Path, recipe: Recipe, work: Path, words: CLIPTokenizer) -> None:
    facts = json.loads((folder / "training.json").read_text())
    if facts["recipe"] != recipe.name:
        raise ValueError(f"{folder} was made by the recipe {facts['recipe']}, not by {recipe.name}: name that recipe.")
    pipe = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    table = {
        name: weight[: len(words)] if "token_embedding" in name else weight
        for name, weight in pipe.text_encoder.float().state_dict().items()
    }
    _begin_from(
        pipe.unet.float().state_dict(), table, recipe, work, words, facts["unet_minutes"], facts["unet_samples"]
    )
    _begin_autoencoder(pipe.vae.float().state_dict(), recipe, work, facts["vae_minutes"], facts["vae_images"])
    if not (work / "space.npz").exists():
        space_of(pipe.vae.float(), recipe).save(work / "space.npz")
    if annotator.FOLDER.exists() and not (work / "annotator.pt").exists():
        marks = json.loads((annotator.FOLDER / "figures.json").read_text())
        network = annotator.load().float()
        about = {"spent": marks["minutes"] * 60, "samples": marks["images"]}
        save(work / "annotator.pt", {"network": network.state_dict()} | about)
        shutil.copytree(annotator.FOLDER, work / "annotator", dirs_exist_ok=True)


@torch.no_grad()
def space_of(vae: AutoencoderKL, recipe: Recipe) -> PatchSpace:
    """The latent space that an autoencoder was trained to write: a UNet that goes on is at home in no other."""
    images = np.stack([_render(seed, recipe)[0] for seed in range(VAE_SEED, VAE_SEED + ENCODED)])
    tensor = rearrange(torch.from_numpy(images), "n h w c -> n c h w").float() / 127.5 - 1
    return PatchSpace.of_encoder(lambda x: vae.encode(x).latent_dist.mode(), tensor, recipe.size // recipe.latent_size)


def _begin_from(unet_state, encoder_state, recipe: Recipe, work: Path, words: CLIPTokenizer, minutes, samples) -> None:
    """The UNet's checkpoint from weights. Raises ValueError where they do not fit the recipe."""
    if (work / "unet.pt").exists():
        return
    unet, encoder = build_unet(recipe, words)
    try:
        unet.load_state_dict(unet_state)
        encoder.load_state_dict(encoder_state)
    except RuntimeError:
        raise ValueError(f"These weights are of another build than the recipe {recipe.name}'s; begin anew.") from None
    masters = Masters([unet, encoder], recipe.unet_rate, plain=UNET_PLAIN)
    save(work / "unet.pt", {"masters": masters.state_dict(), "spent": minutes * 60, "samples": samples})


def _begin_autoencoder(weights: dict, recipe: Recipe, work: Path, minutes: float, images: int) -> None:
    """The autoencoder's checkpoint from weights, where there is none."""
    if (work / "vae.pt").exists():
        return
    vae = model.autoencoder(recipe)
    vae.load_state_dict(weights)
    masters = Masters([vae], recipe.vae_rate, decay=0.998, plain=VAE_PLAIN)
    save(work / "vae.pt", {"masters": masters.state_dict(), "spent": minutes * 60, "samples": images})


def averaged_unet(recipe: Recipe, work: Path, words: CLIPTokenizer) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The averaged UNet and text encoder of the checkpoint, float32 on the device."""
    masters = Masters(build_unet(recipe, words), recipe.unet_rate, plain=UNET_PLAIN)
    masters.load_state_dict(resumed(work / "unet.pt")["masters"])
    unet, encoder = build_unet(recipe, words)
    masters.averaged([unet, encoder])
    return unet, encoder


def write_pipeline(recipe: Recipe, work: Path, out: Path) -> None:
    """The averaged weights as an ordinary diffusers folder, float16, no file above 9 MB: the hub takes 10 without more
    ado.
    """
    words = model.tokenizer(world.all_words(recipe.nouns), recipe.max_tokens)
    unet, encoder = (part.cpu() for part in averaged_unet(recipe, work, words))
    vae = load_autoencoder(recipe, work).cpu()
    vae.register_to_config(scaling_factor=1.0)  # PatchSpace has scaled the latents already
    for name in ("vae", "unet"):
        shutil.rmtree(out / name, ignore_errors=True)
    # transformers loads weights in the type they are stored in, diffusers in float32: the small one stays float32.
    further = sorted({*common.WORDS, *world.all_words()})
    pipe = model.pipeline(vae.half(), *reversed(model.with_common_words(words, encoder, further)), unet.half())
    pipe.save_pretrained(out, max_shard_size="9MB")
    trained, autoencoder = resumed(work / "unet.pt"), resumed(work / "vae.pt")
    facts = {
        "recipe": recipe.name,
        "unet_samples": trained["samples"],
        "unet_minutes": round(trained["spent"] / 60, 1),
        "vae_images": autoencoder["samples"],
        "vae_minutes": round(autoencoder["spent"] / 60, 1),
        "scenes": recipe.scenes,
        "size": recipe.size,
        "attention_grids": [recipe.latent_size // 2**level for level in range(len(recipe.unet_widths))],
        "latent_size": recipe.latent_size,
        "latent_channels": recipe.latent_channels,
        "device": device().type,
        "unet_parameters": model.parameters(unet),
        "vae_parameters": model.parameters(vae),
    }
    (out / WORDS_FILE).write_text(json.dumps(world.all_words(recipe.nouns)) + "\n")
    (out / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
    if (work / "annotator").exists():
        shutil.copytree(work / "annotator", annotator.FOLDER, dirs_exist_ok=True)


def minutes_of(text: str) -> float:
    """A budget: NaN would never be spent."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no number of minutes above 0")
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", choices=RECIPES)
    parser.add_argument("--minutes", type=minutes_of, help="minutes of UNet training in all, instead of the recipe's")
    parser.add_argument(
        "--annotator-minutes", type=minutes_of, help="minutes of the annotator's in all, instead of the recipe's"
    )
    parser.add_argument(
        "--stop-after", type=float, default=math.inf, help="seconds after which this call saves and ends"
    )
    parser.add_argument(
        "--adopt",
        type=Path,
        metavar="FOLDER",
        help="where there are no checkpoints, go on from this pipeline's weights",
    )
    parser.add_argument("--work", type=Path, help="folder of checkpoints (default training/work/<recipe>)")
    parser.add_argument("--out", type=Path, default=HERE.parent / "models" / "emoji-voc")
    options = parser.parse_args()
    recipe, clock = RECIPES[options.recipe], Clock(options.stop_after)
    work = options.work or HERE / "work" / recipe.name
    work.mkdir(parents=True, exist_ok=True)
    if options.adopt:
        try:
            adopt(options.adopt, recipe, work)
        except ValueError as error:
            parser.error(str(error))
    torch.manual_seed(int(time.time()))
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        done = (
            make_latents(recipe, work, pool, clock)
            and train_unet(recipe, work, options.minutes or recipe.unet_minutes, clock)
            and train_autoencoder(recipe, work, pool, clock)
            and train_annotator(recipe, work, options.annotator_minutes or recipe.annotator_minutes, pool, clock)
        )
    if (work / "unet.pt").exists() and (work / "vae.pt").exists():
        write_pipeline(recipe, work, options.out)
    print("done" if done else "stopped: call again to go on", flush=True)


if __name__ == "__main__":
    main()
