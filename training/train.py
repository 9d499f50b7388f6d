"""Make `models/emoji-voc` from nothing: `python -m training.train cpu` (or `full`, on a GPU).

Four stages, each resumed from its own checkpoint under `training/work/<recipe>`: latents, UNet with text
encoder, autoencoder, annotator; then the pipeline folder is written. The latent space is a fixed linear one, the
principal components of pixel patches, which the autoencoder learns to write and to read: so the UNet need not wait for
it, and a decoder that sees noisy latents forgives the UNet small errors. `--minutes` and
`--annotator-minutes` add to a budget on a later run; `--stop-after` ends a call cleanly before a time limit. No mask is ever seen by
the diffusion model: only the annotator reads label maps.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import EMAModel
from einops import rearrange
from PIL import Image

from ovam_core.models.load import WORDS_FILE
from training import annotator, common, model, world
from training.patches import DEVIATION, PatchSpace
from training.recipes import RECIPES, Recipe

HERE = Path(__file__).parent
CHUNK = 2000  # scenes a latent file
VAE_SEED, ANNOTATOR_SEED = world.HELD_OUT // 2, world.HELD_OUT // 4  # first seeds of their scenes
LATENT_NOISE = 0.3 * DEVIATION  # at most
CAPTION_DROP = 0.1
RAMP = 100  # first steps of a call, at a rising rate: a run adopted from weights alone has no moments yet


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
    images, labels, captions = zip(*pool.map(partial(_render, recipe=recipe), seeds, chunksize=64))
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
        loss = loss + 0.5 * sum(F.l1_loss(ours, theirs) for ours, theirs in zip(edges(pair[0]), edges(pair[1])))
    return loss


def rate_at(progress: float, warmup: float = 0.02, floor: float = 0.03) -> float:
    """Linear warm-up, then a cosine to `floor`, as a factor of the peak rate."""
    if progress < warmup:
        return progress / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def steady_rate(now: float, minutes: float, warmup: float = 0.01, floor: float = 0.05) -> float:
    """Warm-up, a constant rate, and a linear fall over the last fifth, half an hour at most.

    A run can go on from before the fall. `now` and `minutes` are of training, from its start to its end.
    """
    left = (minutes - now) / min(0.2 * minutes, 30)
    return max(floor, min(1.0, now / (warmup * minutes), left))


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
        latents, captions = zip(*pool.map(partial(_render_latents, recipe=recipe, path=path), seeds, chunksize=64))
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


def min_snr_weights(scheduler, limit: float = 5.0) -> torch.Tensor:
    """Loss weights of v-prediction by time, float32 [T] with a mean of 1: min(SNR, limit) / (SNR + 1) (Hang et al., 2023)."""
    signal = scheduler.alphas_cumprod
    ratio = signal / (1 - signal)
    weights = ratio.clamp(max=limit) / (ratio + 1)
    return (weights / weights.mean()).float()


def velocity_loss(
    unet, noisy: torch.Tensor, context: torch.Tensor, times: torch.Tensor, target: torch.Tensor
) -> torch.Tensor:
    """Squared error of the predicted velocity, mean over each sample: [N]."""
    with autocast():
        made = unet(noisy, times, context).sample
    return (made.float() - target).square().mean(dim=(1, 2, 3))


def unet_optimizer(weights: list[torch.nn.Parameter], recipe: Recipe) -> torch.optim.AdamW:
    return torch.optim.AdamW(weights, lr=recipe.unet_rate, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)


def unet_average(weights: list[torch.nn.Parameter]) -> EMAModel:
    return EMAModel(weights, decay=0.9995, use_ema_warmup=True, power=0.75)


def train_unet(recipe: Recipe, work: Path, minutes: float, clock: Clock) -> bool:
    """UNet and text encoder together, with an exponential moving average of both.

    Compiled, where the recipe says so, the UNet starts two minutes later and trains 1.2 x as fast from then on.
    """
    path, scheduler = work / "unet.pt", model.train_scheduler()
    weights_of = min_snr_weights(scheduler).to(device())
    latents, captions = load_latents(work)
    latents = latents.float().to(device())
    words = model.tokenizer(world.all_words(recipe.nouns), recipe.max_tokens)
    tokens = words(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(device())
    empty = words("", padding="max_length", return_tensors="pt").input_ids.to(device())
    unet, encoder = model.unet(recipe).to(device()), model.text_encoder(words, recipe.text_width).to(device())
    if device().type == "cpu":  # the backward pass of PyTorch's fused attention is slow there: a third of the rate
        unet.set_attn_processor(AttnProcessor())
    predict = torch.compile(unet) if recipe.compiled else unet
    weights = [*unet.parameters(), *encoder.parameters()]
    optimizer, average = unet_optimizer(weights, recipe), unet_average(weights)
    state = {"spent": 0.0, "samples": 0}
    if path.exists():
        state = torch.load(path, weights_only=True, map_location="cpu")
        unet.load_state_dict(state["unet"])
        encoder.load_state_dict(state["encoder"])
        optimizer.load_state_dict(state["optimizer"])
        average.load_state_dict(state["average"])
    average.to(device())
    spent, samples, losses = state["spent"], state["samples"], []
    begun = saved = time.monotonic()
    for step, batch in enumerate(batches(len(latents), recipe.unet_batch, samples)):
        now = spent + time.monotonic() - begun
        done, over = now >= minutes * 60, clock.over()  # asked once: what ends the call is saved
        if done or over or time.monotonic() - saved > 120:
            saved = time.monotonic()
            save(
                path,
                {
                    "unet": unet.state_dict(),
                    "encoder": encoder.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "average": average.state_dict(),
                    "spent": now,
                    "samples": samples,
                },
            )
        if done or over:
            return done
        for group in optimizer.param_groups:
            group["lr"] = recipe.unet_rate * steady_rate(now / 60, minutes) * min(1.0, (step + 1) / RAMP)
        index = torch.from_numpy(batch).to(device())
        ids = torch.where(torch.rand(len(batch), 1, device=device()) < CAPTION_DROP, empty, tokens[index])
        clean = latents[index]
        noise = torch.randn_like(clean)
        times = torch.randint(0, scheduler.config.num_train_timesteps, (len(batch),), device=device())
        noisy, target = scheduler.add_noise(clean, noise, times), scheduler.get_velocity(clean, noise, times)
        loss = (velocity_loss(predict, noisy, encoder(ids)[0], times, target) * weights_of[times]).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        average.step(weights)
        samples += len(batch)
        losses.append(loss.item() if step % 10 == 0 else losses[-1])
        if step % 200 == 199:
            print(
                f"unet {now / 60:5.1f} min {samples} samples {samples / max(now, 1):.1f}/s  loss {np.mean(losses[-200:]):.4f}",
                flush=True,
            )
    raise AssertionError("batches() has no end")


def train_autoencoder(recipe: Recipe, work: Path, pool: ProcessPoolExecutor, clock: Clock) -> bool:
    """Encoder to the patch components, decoder from noisy ones. True when its minutes are spent."""
    path, vae, space = work / "vae.pt", model.autoencoder(recipe).to(device()), load_space(work)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=recipe.vae_rate, betas=(0.9, 0.98), weight_decay=1e-4)
    state = torch.load(path, weights_only=True, map_location="cpu") if path.exists() else {"spent": 0.0, "samples": 0}
    if state["spent"] >= recipe.vae_minutes * 60:
        return True
    if "vae" in state:
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
    images = render(range(VAE_SEED, VAE_SEED + recipe.vae_scenes), recipe, pool)[0]
    begun = saved = time.monotonic()
    spent, samples = state["spent"], state["samples"]
    rng = np.random.default_rng(samples)
    for step, batch in enumerate(batches(len(images), recipe.vae_batch, samples)):
        now = spent + time.monotonic() - begun
        progress = now / (recipe.vae_minutes * 60)
        for group in optimizer.param_groups:
            group["lr"] = recipe.vae_rate * rate_at(progress)
        # Whole images at the end: group normalisation sees the statistics it will meet in use.
        whole = progress > 0.8
        picture = to_tensor(images[batch[: len(batch) // 4]] if whole else crops(images[batch], recipe.size // 2, rng))
        latents = space.encode(picture)
        noise = LATENT_NOISE * torch.rand(len(latents), 1, 1, 1, device=latents.device) * torch.randn_like(latents)
        with autocast():
            encoded = vae.encode(picture).latent_dist.mean.float()
            made = vae.decode(latents + noise).sample.float()
        loss = reconstruction_loss(made, picture) + F.mse_loss(encoded, latents)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        samples += len(batch)
        done, over = now >= recipe.vae_minutes * 60, clock.over()
        if step % 100 == 0:
            error, apart = F.l1_loss(made, picture).item() * 127.5, F.mse_loss(encoded, latents).item()
            print(f"vae {now / 60:5.1f} min {samples} images  L1 {error:.2f}/255  encoder {apart:.4f}", flush=True)
        if done or over or time.monotonic() - saved > 120:
            saved = time.monotonic()
            save(path, {"vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "spent": now, "samples": samples})
        if done or over:
            return done
    raise AssertionError("batches() has no end")


def load_space(work: Path) -> PatchSpace:
    return PatchSpace.load(work / "space.npz").to(device())


def load_autoencoder(recipe: Recipe, work: Path) -> torch.nn.Module:
    vae = model.autoencoder(recipe).to(device()).eval()
    vae.load_state_dict(torch.load(work / "vae.pt", weights_only=True, map_location="cpu")["vae"])
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


def annotator_optimizer(network: torch.nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(network.parameters(), lr=annotator.RATE, weight_decay=1e-3, fused=True)


def train_annotator(recipe: Recipe, work: Path, minutes: float, pool: ProcessPoolExecutor, clock: Clock) -> bool:
    """Supervised segmentation on exact label maps. True when its minutes are spent; then its figures are written."""
    folder, path = work / "annotator", work / "annotator.pt"
    if (folder / "figures.json").exists() and json.loads((folder / "figures.json").read_text())["minutes"] >= minutes:
        return True
    vae, space = load_autoencoder(recipe, work), load_space(work)
    network = annotator.build().to(device())
    optimizer = annotator_optimizer(network)
    state = torch.load(path, weights_only=True, map_location="cpu") if path.exists() else {"spent": 0.0, "samples": 0}
    if "network" in state:
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
    images, labels, _ = render(range(ANNOTATOR_SEED, ANNOTATOR_SEED + recipe.annotator_scenes), recipe, pool)
    images = np.concatenate([images, generator_look(vae, space, images[: len(images) // 2], 2 * LATENT_NOISE)])
    labels = torch.from_numpy(voc_only(np.concatenate([labels, labels[: len(labels) // 2]]))).to(device())
    begun = saved = time.monotonic()
    spent, samples, losses = state["spent"], state["samples"], []
    for step, batch in enumerate(batches(len(images), annotator.BATCH, samples)):
        now = spent + time.monotonic() - begun
        done, over = now >= minutes * 60, clock.over()  # asked once: what ends the call is saved
        if done or over or time.monotonic() - saved > 120:
            saved = time.monotonic()
            save(
                path,
                {
                    "network": network.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "spent": now,
                    "samples": samples,
                },
            )
        if done:
            break
        if over:
            return False
        for group in optimizer.param_groups:
            group["lr"] = annotator.RATE * steady_rate(now / 60, minutes) * min(1.0, (step + 1) / RAMP)
        pictures, truth = annotator.mirror(to_tensor(images[batch]), labels[torch.from_numpy(batch).to(device())])
        with autocast():
            scores = annotator.logits(network, annotator.vary(pictures))
        loss = annotator.loss(scores.float(), truth.long())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        samples += len(batch)
        losses.append(loss.item() if step % 10 == 0 else losses[-1])
        if step % 100 == 99:
            print(f"annotator {now / 60:5.1f} min {samples} images  loss {np.mean(losses[-100:]):.4f}", flush=True)
    figures = {"images": samples, "minutes": minutes, **measure_annotator(network, vae, space, recipe, pool)}
    print("annotator", figures, flush=True)
    network.cpu().half().save_pretrained(folder)
    (folder / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    return True


def measure_annotator(network, vae, space: PatchSpace, recipe: Recipe, pool: ProcessPoolExecutor) -> dict[str, float]:
    """mIoU on 400 scenes that no training sees, as rendered and as the decoder shows them; and without objects' borders."""
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


def adopt(folder: Path, recipe: Recipe, work: Path) -> None:
    """Checkpoints in `work`, where it has none, from the weights of a pipeline this script wrote, so that it can go on.

    Weights alone: the optimizers begin anew. A pipeline holds the averaged weights of the end of a run, which the
    first minutes at the full rate unsettle; a checkpoint from before the fall is the better start where there is one.
    """
    if not (folder / "training.json").is_file():
        raise ValueError(f"'{folder}' is no folder that this script wrote: it has no training.json.")
    facts = json.loads((folder / "training.json").read_text())
    if facts["recipe"] != recipe.name:
        raise ValueError(f"{folder} was made by the recipe {facts['recipe']}, not by {recipe.name}: name that recipe.")
    pipe = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    words = model.tokenizer(world.all_words(recipe.nouns), recipe.max_tokens)
    unet, encoder, vae = pipe.unet.float(), model.text_encoder(words, recipe.text_width), pipe.vae.float()
    trained = {
        name: weight[: len(words)] if "token_embedding" in name else weight
        for name, weight in pipe.text_encoder.state_dict().items()
    }
    encoder.load_state_dict(trained)
    weights = [*unet.parameters(), *encoder.parameters()]
    if not (work / "unet.pt").exists():
        save(
            work / "unet.pt",
            {
                "unet": unet.state_dict(),
                "encoder": encoder.state_dict(),
                "optimizer": unet_optimizer(weights, recipe).state_dict(),
                "average": unet_average(weights).state_dict(),
                "spent": facts["unet_minutes"] * 60,
                "samples": facts["unet_samples"],
            },
        )
    if not (work / "vae.pt").exists():
        state = {"vae": vae.state_dict(), "spent": facts["vae_minutes"] * 60, "samples": facts["vae_images"]}
        save(work / "vae.pt", state)
    if annotator.FOLDER.exists() and not (work / "annotator.pt").exists():
        network, marks = annotator.load().float(), json.loads((annotator.FOLDER / "figures.json").read_text())
        save(
            work / "annotator.pt",
            {
                "network": network.state_dict(),
                "optimizer": annotator_optimizer(network).state_dict(),
                "spent": marks["minutes"] * 60,
                "samples": marks["images"],
            },
        )
        shutil.copytree(annotator.FOLDER, work / "annotator", dirs_exist_ok=True)


def write_pipeline(recipe: Recipe, work: Path, out: Path) -> None:
    """The averaged weights as an ordinary diffusers folder, float16, no file above 9 MB: the hub takes 10 without more ado."""
    state = torch.load(work / "unet.pt", weights_only=True, map_location="cpu")
    words = model.tokenizer(world.all_words(recipe.nouns), recipe.max_tokens)
    unet, encoder = model.unet(recipe), model.text_encoder(words, recipe.text_width)
    average = EMAModel([*unet.parameters(), *encoder.parameters()])
    average.load_state_dict(state["average"])
    average.copy_to([*unet.parameters(), *encoder.parameters()])
    vae = load_autoencoder(recipe, work).cpu()
    vae.register_to_config(scaling_factor=1.0)  # PatchSpace has scaled the latents already
    for part, name in ((vae, "vae"), (unet, "unet")):
        shutil.rmtree(out / name, ignore_errors=True)
    # transformers loads weights in the type they are stored in, diffusers in float32: the small one stays float32.
    further = sorted({*common.WORDS, *world.all_words()})
    pipe = model.pipeline(vae.half(), *reversed(model.with_common_words(words, encoder, further)), unet.half())
    pipe.save_pretrained(out, max_shard_size="9MB")
    facts = {
        "recipe": recipe.name,
        "unet_samples": state["samples"],
        "unet_minutes": round(state["spent"] / 60, 1),
        "vae_images": torch.load(work / "vae.pt", weights_only=True, map_location="cpu")["samples"],
        "vae_minutes": recipe.vae_minutes,
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
