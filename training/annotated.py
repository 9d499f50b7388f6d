"""Makes tokens/emoji-voc: one generated image and one mask a class, then a token a class from that folder.

    python -m training.annotated                        # writes outputs/annotated and tokens/emoji-voc

For each class the first seed of SEEDS is taken at which the annotator finds the class as the largest one, over 5 to 80
% of the image. The quality table uses none of these seeds. Each token learns on from pictures without masks
(`--unlabelled`), in which its class stands among the others.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ovam_core import OVAM
from ovam_core.attention.recording import Recording
from ovam_core.data.annotated import METADATA, by_class, learn, read_folder
from ovam_core.hooks.recorder import record
from ovam_core.models.presets import EMBEDDED
from ovam_core.optimization import RECIPES
from ovam_core.settings import GenerateSettings
from ovam_core.tokens import file_name, folder_for
from training import annotator
from training.figures import largest_class, prompt_for
from training.nouns import VOC_CLASSES

SEEDS = range(1, 61)  # for tokens alone
COVERAGE = (0.05, 0.8)

# Chosen on pictures of seeds from 2000: see docs/quality.md.
PROXIMITY, UNLABELLED = 0.02, 8


def generations(
    pipe,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int | None = None,
    batch: int = 4,
    only: int | None = None,
    keep: Collection[str] = (),
) -> Iterator[tuple[Image.Image, Recording]]:
    """Images with their recordings, made `batch` at a time: faster on a CPU too, and the noise is that of each seed.

    steps: None for the model's own. only: the one step to record. keep: as in `record`.
    """
    for first in range(0, len(prompts), batch):
        part = slice(first, first + batch)
        one = GenerateSettings.for_model(pipe, prompts[first], steps=steps)
        with record(pipe, steps=None if only is None else [only], keep=keep) as recorder:
            images = pipe(
                list(prompts[part]),
                num_inference_steps=one.steps,
                guidance_scale=one.guidance,
                width=one.width,
                height=one.height,
                generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds[part]],
            ).images
        yield from zip(images, recorder.recordings, strict=True)


def find(pipe, network, name: str, steps: int | None = None, seeds: Sequence[int] = SEEDS, batch: int = 1):
    """The first seed whose image shows the class clearly: (seed, image, mask bool [H, W]). ValueError if none does."""
    number = VOC_CLASSES.index(name) + 1
    made = generations(pipe, [prompt_for(name)] * len(seeds), seeds, steps, batch)
    for seed, (image, _) in zip(seeds, made, strict=True):
        labels = annotator.annotate(network, [image])[0]
        covered = (labels == number).mean()
        if largest_class(labels) == number and COVERAGE[0] <= covered <= COVERAGE[1]:
            return seed, image, labels == number
    raise ValueError(f"None of the seeds {seeds[0]} to {seeds[-1]} shows a {name}.")


def write_folder(pipe, network, folder: Path, classes: Sequence[str] = VOC_CLASSES, steps: int | None = None) -> None:
    """Image, mask and metadata.jsonl in the layout of `ovam optimize --annotated`."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in classes:
        seed, image, mask = find(pipe, network, name, steps)
        stem = Path(file_name([name])).stem
        image.save(folder / f"{stem}.png")
        Image.fromarray(mask.astype(np.uint8) * 255).save(folder / f"{stem}-mask.png")
        made = GenerateSettings.for_model(pipe, prompt_for(name), seed=seed, steps=steps)
        rows.append(
            {
                "file_name": f"{stem}.png",
                "mask": f"{stem}-mask.png",
                "class": name,
                "prompt": made.prompt,
                "seed": seed,
                "steps": made.steps,
                "guidance": made.guidance,
                "width": made.width,
                "height": made.height,
            }
        )
        print(f"{name}: seed {seed}, {mask.mean():.0%} of the image", flush=True)
    (folder / METADATA).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("outputs/annotated"), help="for the annotated generations")
    parser.add_argument("--out", type=Path, default=folder_for(EMBEDDED), help="for the tokens")
    parser.add_argument("--classes", nargs="+", default=VOC_CLASSES, choices=VOC_CLASSES, metavar="NAME")
    parser.add_argument("--steps", type=int, help="denoising steps (the model's own)")
    parser.add_argument("--recipe", choices=list(RECIPES), default="fast")
    parser.add_argument("--epochs", type=int, help="the recipe's own")
    parser.add_argument("--proximity", type=float, help=f"the recipe's own; of fast, {PROXIMITY}")
    parser.add_argument("--unlabelled", type=int, default=UNLABELLED, help="pictures without masks")
    parser.add_argument("--tau", type=float)
    parser.add_argument("--alpha", type=float)
    parser.add_argument("--keep", action="store_true", help="take the folder as it is: only make the tokens")
    options = parser.parse_args(arguments)
    ovam = OVAM.from_pretrained(EMBEDDED, "cpu")
    if not options.keep:
        write_folder(ovam.pipe, annotator.load(), options.folder, options.classes, options.steps)
    own = {"proximity": PROXIMITY} if options.recipe == "fast" else {}
    given = {name: value for name in ("epochs", "proximity") if (value := getattr(options, name)) is not None}
    settings = replace(RECIPES[options.recipe], **(own | given))
    groups = by_class(read_folder(options.folder, ovam))
    cuts = {"tau": options.tau, "alpha": options.alpha}
    for name, examples in groups.items():
        more = {"unlabelled": options.unlabelled, "among": [other for other in VOC_CLASSES if other != name]}
        token, search = learn(ovam, examples, settings, **cuts, **more)
        path = token.save(options.out / file_name([name]))
        print(f"{name}: loss {search.loss:.4f} after {search.epochs} epochs: {path}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
