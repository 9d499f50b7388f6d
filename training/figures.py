"""The figures of the model card: `python -m training.figures` measures them on the CPU and writes the card.

Three questions: does the model draw what it is asked for (judged by the annotator), do the maps of two nouns
find the right one of two objects, and how well do those maps cut it out, all on scenes no training has seen.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ovam_core.attention.heatmap import attribute, resize
from ovam_core.attention.mask import self_attention_map
from ovam_core.attention.recording import Recording
from ovam_core.hooks import photograph as photo
from ovam_core.hooks.recorder import record
from ovam_core.models.load import load_pipeline
from ovam_core.models.presets import EMBEDDED, defaults_for, recommended_part
from ovam_core.models.registry import adapter_of
from ovam_core.query import caption_of, encode_padded, words_in_sentence
from training import annotator, world
from training.nouns import VOC_CLASSES, VOC_NOUNS
from training.recipes import RECIPES

HERE = Path(__file__).parent
CARD = HERE.parent / "models" / "emoji-voc"
TIMES = (100, 200, 300)
THRESHOLDS = np.linspace(0.1, 0.95, 18)


def prompt_for(name: str) -> str:
    """The paper's prompt, with the article English wants."""
    return f"A photograph of {world.article(name)}"


@torch.no_grad()
def record_scene(pipe, image: np.ndarray, caption: str, times=TIMES, seed: int = 0) -> list[Recording]:
    """One recording a time, from one UNet pass over the picture (uint8 [H, W, 3]) noised to each of `times`."""
    latent = photo.encode(pipe, [Image.fromarray(image)], image.shape[:2])[0]
    noisy = photo.noised(pipe, latent, times, seed).to(pipe.unet.dtype)
    context = encode_padded(pipe, caption).expand(len(times), -1, -1)
    with record(pipe, branch="all") as recorder:
        pipe.unet(noisy, torch.tensor(times, device=noisy.device), context)
    return recorder.recordings


def word_maps(pipe, recordings: list[Recording], words: list[str], size: int) -> np.ndarray:
    """OVAM maps float32 [words, size, size] of the model's own grids, mean over the recordings; a prompt for each
    word.
    """
    asked = [words_in_sentence(pipe, prompt_for(word), [word]) for word in words]
    maps = torch.stack([attribute(recommended_part(pipe, one), asked) for one in recordings]).mean(0)
    return resize(maps, (size, size)).cpu().numpy()


def image_side(pipe) -> int:
    """Pixels of the images that the UNet was trained on."""
    return pipe.unet.config.sample_size * pipe.vae_scale_factor


def two_object_scenes(count: int, size: int = 128):
    """Held-out scenes of two different VOC objects, with exact masks, `size` pixels wide."""
    seed = world.HELD_OUT
    while count:
        made = world.scene(seed, size, VOC_NOUNS, (0.0, 1.0))
        seed += 1
        if len(made.nouns) == 2:
            count -= 1
            yield made


def which_of_two(pipe, scenes: int) -> dict[str, float]:
    """Share of object pixels won by the right noun of two, and mean IoU at the best single threshold."""
    right = pixels = 0
    overlaps = []
    for made in two_object_scenes(scenes, image_side(pipe)):
        recordings = record_scene(pipe, made.image, made.caption)
        maps = word_maps(pipe, recordings, list(made.nouns), len(made.image))
        masks = np.stack([made.labels == world.LABELS[name] for name in made.nouns])
        right += ((maps[0] > maps[1]) & masks[0]).sum() + ((maps[1] > maps[0]) & masks[1]).sum()
        pixels += masks.sum()
        relative = maps / maps.max(axis=(1, 2), keepdims=True)
        cut = relative[None] >= THRESHOLDS[:, None, None, None]
        overlaps.append((cut & masks).sum((2, 3)) / (cut | masks).sum((2, 3)))
    mean = np.concatenate(overlaps, axis=1).mean(1)
    return {"which_of_two": right / pixels, "iou": mean.max(), "iou_threshold": THRESHOLDS[mean.argmax()]}


def ceiling(side: int, scenes: int, size: int = 128, tau: float = 0.8) -> float:
    """mIoU of perfect maps: the exact mask of each object averaged over a grid of `side` pixels, brought back, cut at
    `tau`.
    """
    overlaps: dict[str, list[int]] = {}
    for made in two_object_scenes(scenes, size):
        for name in made.nouns:
            mask = torch.from_numpy(made.labels == world.LABELS[name])
            coarse = torch.nn.functional.adaptive_avg_pool2d(mask[None].float(), side)
            cut = resize(coarse, (size, size))[0] >= tau * coarse.max()
            both, either = overlaps.setdefault(name, [0, 0])
            overlaps[name] = [both + int((cut & mask).sum()), either + int((cut | mask).sum())]
    return float(np.mean([both / either for both, either in overlaps.values()]))


SHOWN = 0.01  # share of the picture that a class must cover to count as found


def three_found(pipe, network, prompts: int, batch: int = 4) -> float:
    """Share of prompts of three objects in whose picture the annotator finds all three. Seeds from 0."""
    settings, rng = defaults_for(pipe), np.random.default_rng(0)
    names = [rng.choice(VOC_CLASSES, 3, replace=False) for _ in range(prompts)]
    found = 0
    for first in range(0, prompts, batch):
        part = names[first : first + batch]
        images = pipe(
            [caption_of(list(three)) for three in part],
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            generator=[torch.Generator().manual_seed(first + number) for number in range(len(part))],
        ).images
        for three, labels in zip(part, annotator.annotate(network, images), strict=True):
            found += all((labels == VOC_CLASSES.index(name) + 1).mean() >= SHOWN for name in three)
    return found / prompts


def received_attention(pipe, scenes: int) -> dict[str, float]:
    """Eq. 8 against exact masks: does a pixel of an object receive more self-attention than one of the background?

    Probability that it does, for a random pixel of each (area under the ROC curve; 0.5 says nothing), mean over scenes.
    """
    areas = []
    for made in two_object_scenes(scenes, image_side(pipe)):
        recordings = record_scene(pipe, made.image, made.caption)
        received = torch.stack([self_attention_map(recording, 0.0) for recording in recordings]).mean(0)
        values = resize(received[None], made.labels.shape)[0].numpy()
        inside, outside = values[made.labels > 0], np.sort(values[made.labels == 0])
        areas.append(np.searchsorted(outside, inside).mean() / len(outside))
    return {"received_auc": float(np.mean(areas))}


def largest_class(labels: np.ndarray) -> int:
    """The VOC id with the most pixels in a label map uint8 [H, W]; 0 where there is background alone."""
    counts = np.bincount(labels.ravel(), minlength=annotator.CLASSES)[1:]
    return int(counts.argmax()) + 1 if counts.any() else 0


def drawn(pipe, network, seeds: int, sheet: Path) -> dict[str, float]:
    """Share of "A photograph of a <classname>" in which that class is the largest the annotator finds."""
    settings = defaults_for(pipe)
    rows, found, seconds = [], [], []
    for number, name in enumerate(VOC_CLASSES, start=1):
        begun = time.monotonic()
        images = pipe(
            [prompt_for(name)] * seeds,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in range(seeds)],
        ).images
        seconds.append((time.monotonic() - begun) / seeds)
        found.append([largest_class(labels) == number for labels in annotator.annotate(network, images)])
        rows.append(np.concatenate([np.asarray(image) for image in images], axis=1))
    Image.fromarray(np.concatenate(rows)).save(sheet, quality=88)
    by_class = {name: float(np.mean(hits)) for name, hits in zip(VOC_CLASSES, found, strict=True)}
    begun = time.monotonic()
    pipe(prompt_for("cat"), num_inference_steps=settings.steps, guidance_scale=settings.guidance)
    return {"drawn": float(np.mean(found)), "drawn_by_class": by_class, "seconds_an_image": time.monotonic() - begun}


def command_of(training: dict, marks: dict) -> str:
    """The command that spends these minutes."""
    recipe, more = RECIPES[training["recipe"]], ""
    if training["unet_minutes"] > recipe.unet_minutes + 1:
        more += f" --minutes {training['unet_minutes']:.0f}"
    if marks["minutes"] > recipe.annotator_minutes:
        more += f" --annotator-minutes {marks['minutes']:.0f}"
    return f"python -m training.train {recipe.name}{more}"


def further_rows(figures: dict) -> str:
    """Rows of the card for what an edition may have been measured for: Markdown, "" for nothing."""
    rows = []
    if "three_found" in figures:
        what = f"all of three found, each on 1 % of the picture at least ({figures['three_prompts']} prompts)"
        rows.append((what, f"{figures['three_found']:.1%}", "60 %"))
    if "ceiling" in figures:
        what = f"a perfect map of the {figures['grid']} x {figures['grid']} grid, cut at 0.8: mIoU"
        rows.append((what, f"{figures['ceiling']:.1%}", "84 %"))
    if "named" in figures:
        what = f"pictures of the sheet named right by eye, without the rows' names and in random order ({figures['named']['of']})"
        rows.append((what, f"{figures['named']['right'] / figures['named']['of']:.1%}", "85 %"))
    if "beside" in figures:
        other = figures["beside"]
        shares = f"which of two {other['which_of_two']:.1%}, three found {other['three_found']:.1%}"
        rows.append(("the first edition on the same scenes", f"IoU {other['iou']:.3f}, {shares}", ""))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def card(figures: dict, training: dict, marks: dict) -> str:
    full = training["recipe"] == "full"
    targets = ("90 %", "95 %", "0.75") if full else ("100 %", "95 %", "0.70")
    shipped = (
        "The shipped weights are from the full GPU recipe."
        if full
        else "**The shipped weights are from the CPU recipe, not from the full GPU recipe**: 20 VOC classes, 128 x 128 pixels."
    )
    begun = f", begun from {training['begun_from']}" if "begun_from" in training else ""
    grids = " and ".join(f"{side} x {side}" for side in training["attention_grids"])
    drawn = figures["drawn_by_class"]
    weakest = [name for name in sorted(drawn, key=drawn.get)[:5] if drawn[name] < 0.9]
    weak = f" Weakest classes: {', '.join(weakest)}." if weakest else ""
    classes = ", ".join(f"{name} {drawn[name]:.0%}" for name in VOC_CLASSES)
    return f"""---
license: mit
pipeline_tag: text-to-image
library_name: diffusers
---
# emoji-voc

A latent diffusion model small enough to ship with the code that reads its attention. An ordinary
`StableDiffusionPipeline` folder (`AutoencoderKL`, `UNet2DConditionModel` with cross-attention on grids of {grids},
`CLIPTextModel`, `CLIPTokenizer`), trained here from nothing. It is a demonstrator and a test bed, not a
picture maker.

{shipped}

| | |
|---|---|
| recipe | `{command_of(training, marks)}` ({training["device"]}); a run can be several, each going on from the last |
| image | {training["size"]} x {training["size"]} pixels, latents {training["latent_size"]} x {training["latent_size"]} x {training["latent_channels"]} |
| UNet | {training["unet_parameters"] / 1e6:.1f} M parameters, {training["unet_samples"]:,} samples in {training["unet_minutes"]:.0f} minutes, drawn from {training["scenes"]:,} scenes{begun} |
| autoencoder | {training["vae_parameters"] / 1e6:.1f} M parameters, {training["vae_images"]:,} crops in {training["vae_minutes"]:.0f} minutes |
| text encoder | CLIP with no layers: token and position embeddings and the final norm, trained with the UNet |
| objective | v-prediction, min-SNR weights, 10 % empty captions, EMA; bfloat16 weights with float32 masters, Muon and AdamW |

**Data.** Scenes of 1 to {len(RECIPES[training["recipe"]].counts)} Noto Color Emoji pictures over {len(world.backgrounds.BACKGROUNDS)} procedural backgrounds, rendered by `training/world.py`
with captions. No mask ever supervised the diffusion model, its attention least of all: what the maps show emerged.

## Figures
Measured by `python -m training.figures` on a CPU, on scenes and seeds that no training saw.

| figure | measured | target |
|---|---|---|
| "A photograph of a <classname>": the annotator finds that class as the largest ({figures["seeds"]} seeds x 20 classes) | {figures["drawn"]:.1%} | {targets[0]} |
| which of two: object pixels won by the right noun, each asked for alone in "A photograph of a <classname>" ({figures["scenes"]} scenes, t = 100, 200, 300; chance 50 %) | {figures["which_of_two"]:.1%} | {targets[1]} |
| mean IoU of those maps (attention grids that the model's defaults use) at the best single threshold ({figures["iou_threshold"]:.2f} of the peak) | {figures["iou"]:.3f} | {targets[2]} |
{further_rows(figures)}| self-attention map (Eq. 8): a pixel of an object receives more attention than one of the background (0.5 says nothing) | {figures["received_auc"]:.2f} | |
| seconds for one image, default steps, {figures["threads"]} cores | {figures["seconds_an_image"]:.1f} | 2.5 at most |
| annotator ({marks["images"]:,} images in {marks["minutes"]:.0f} minutes), mIoU on 400 held-out rendered scenes | {marks["rendered"]:.1%} | 95 % |
| the same without the pixel on either side of a border, as VOC leaves out its objects' outlines | {marks["rendered_inside"]:.1%} | |
| annotator, mIoU on the same scenes seen through the autoencoder | {marks["reconstructed"]:.1%} | 87 % |
| the same without borders | {marks["reconstructed_inside"]:.1%} | |

Drawn, by class: {classes}.

![Contact sheet: a row a class, a column a seed](contact-sheet.jpg)

One row a VOC class in id order, one column a seed.

**Tokens** of the 20 classes lie in `tokens/emoji-voc`, made by `python -m training.annotated`: from one annotated picture a class and
eight pictures without masks, whose other things are the token's rivals in one softmax (docs/methods.md says how, docs/quality.md
what that gains).

## Limits
It knows the words of its captions (`words.json`) and nothing else: a thousand more are tokens at the mean of those it
knows, so that they leave the rest of a prompt alone, any other falls back to characters, and none has a meaningful map.{weak} Small objects and fine outlines are
soft, an animal may mix the two poses of its class, and scenes of three objects often lose one. It knows no photographs.

What was drawn is judged by the annotator, which {"reaches" if marks["rendered"] >= 0.95 else "misses"} its own target of 95 % and may recognise what a person would
not: hence the row of pictures named by eye.

## Licence
Weights and code: MIT. The pictures it was trained on are rendered from Noto Color Emoji, SIL Open Font License 1.1 (see
`training/LICENSE-sprites.txt`); the dining tables were drawn for this project.
"""


def measure(pipe, network, seeds: int, scenes: int, prompts: int, sheet: Path) -> dict[str, float | dict]:
    """All figures of one model but those of its training."""
    size = image_side(pipe)
    finest = size // min(defaults_for(pipe).strides or adapter_of(pipe).strides)
    figures = which_of_two(pipe, scenes) | received_attention(pipe, scenes)
    figures |= {"grid": finest, "ceiling": ceiling(finest, scenes, size)}
    print({name: round(float(value), 3) for name, value in figures.items()}, flush=True)
    figures |= {"three_found": three_found(pipe, network, prompts), "three_prompts": prompts}
    figures |= drawn(pipe, network, seeds, sheet)
    return {name: value if isinstance(value, dict | int) else float(value) for name, value in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10, help="pictures of each class")
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--prompts", type=int, default=100, help="of three objects")
    parser.add_argument("--model", type=Path, default=CARD)
    parser.add_argument("--beside", type=Path, metavar="FOLDER", help="another edition, measured on the same scenes")
    options = parser.parse_args()
    torch.set_num_threads(2)
    if not annotator.FOLDER.exists():
        parser.exit(2, "The figures need the annotator in training/annotator: python -m training.train makes it.\n")
    network, counts = annotator.load(), (options.seeds, options.scenes, options.prompts)
    pipe = load_pipeline(EMBEDDED if options.model == CARD else str(options.model), "cpu")
    figures = {"seeds": options.seeds, "scenes": options.scenes, "threads": torch.get_num_threads()}
    figures |= measure(pipe, network, *counts, options.model / "contact-sheet.jpg")
    if options.beside is not None:
        other = load_pipeline(str(options.beside), "cpu")
        other.ovam_name = EMBEDDED  # its preset
        with tempfile.TemporaryDirectory() as folder:
            figures["beside"] = measure(other, network, *counts, Path(folder) / "sheet.jpg")
    training = json.loads((options.model / "training.json").read_text())
    marks = json.loads((annotator.FOLDER / "figures.json").read_text())
    named = options.model / "named.json"  # by someone who looked at the pictures without their rows' names
    if named.exists():
        figures["named"] = json.loads(named.read_text())
    (options.model / "figures.json").write_text(json.dumps(figures | {"annotator": marks}, indent=1) + "\n")
    (options.model / "README.md").write_text(card(figures, training, marks))
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
