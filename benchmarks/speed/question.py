"""Row 8: a question to the embedded model, from words to maps of the image's size, and what it is made of.

Beside the authors' published code (published.py): its words are those of one sentence, which share a softmax; ours are
prompts of their own. Over the time of the picture; reading over maps; queries as a CPU lays them out over the same as
the run gives them; an epoch of token optimisation; and dense CRFs of several words over that of one.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from benchmarks.speed.common import Bench, Line, NotOnThisDevice, assert_same, race, ratio_line
from benchmarks.speed.published import as_published, published_losses, published_question
from benchmarks.speed.recording import PROMPT
from benchmarks.speed.synthetic import random_embedding, synthetic_recording
from ovam_core.attention import crf
from ovam_core.attention.heatmap import attribute, heatmaps, resize
from ovam_core.attention.recording import Recording, side_by_side
from ovam_core.models import remembered
from ovam_core.models.presets import EMBEDDED
from ovam_core.optimization import RECIPES, optimize
from ovam_core.ovam import OVAM
from ovam_core.picture import Picture
from ovam_core.query import attribute_sentence, attribute_words

WORDS = ("cat", "car", "dog", "bird", "bus", "boat", "horse", "train")
TOKENS = {"one word": 3, "a sentence": 8, "a padded prompt": 77}


def question(bench: Bench) -> list[Line]:
    ovam, picture = drawn(bench)
    recording, theirs = picture.recording, as_published(picture.recording)
    sentence = " ".join(WORDS)
    with torch.no_grad():
        ours = resize(heatmaps(recording, attribute_sentence(ovam.pipe, sentence).embedding), recording.image_size)
        count = sum(x.queries.shape[0] * x.queries.shape[1] for x in recording.layers)
        assert_same(published_question(ovam.pipe, theirs, sentence) / count, ours, rtol=0, atol=1e-5)
    lines = []
    for count in (1, len(WORDS)):
        words = WORDS[:count]
        prompts = attribute_words(ovam.pipe, words)
        sides: dict[str, Callable[[], Any]] = {
            "published": partial(published_question, ovam.pipe, theirs, " ".join(words)),
            "question": partial(asked, ovam, recording, words),
            "first question": anew(partial(asked, ovam, recording, words)),
            "reading": partial(attribute_words, ovam.pipe, words),
            "first reading": anew(partial(attribute_words, ovam.pipe, words)),
            "maps": partial(attribute, recording, prompts),
        }
        for call in sides.values():
            call()
        times = race(bench, sides, bench.sizes.rounds)
        times["picture"] = [picture.seconds] * bench.sizes.rounds
        what = f"{count} word{'s' * (count > 1)}, {EMBEDDED}, {len(recording.step_indices)} steps, all layers"
        line = partial(ratio_line, bench, 8, what, times)
        lines += [
            line("published", "question", "3", "words that were read before, as on the page; theirs in one sentence"),
            line("published", "first question", "", "words that were not"),
            line("question", "picture"),
            line("reading", "maps", "0.1", "words that were read before"),
            line("first reading", "maps", "", "words that were not"),
        ]
    return lines


def epoch(bench: Bench) -> list[Line]:
    ovam, picture = drawn(bench)
    recording, theirs = picture.recording, as_published(picture.recording)
    start = attribute_words(ovam.pipe, WORDS[:1])[0].embedding[:2].float()
    labels = np.zeros(recording.image_size, np.uint8)
    labels[labels.shape[0] // 4 : -labels.shape[0] // 4, labels.shape[1] // 4 : -labels.shape[1] // 4] = 1
    target = (torch.from_numpy(labels).to(start.device) == torch.arange(2, device=start.device)[:, None, None]).float()
    few = replace(RECIPES["paper"], epochs=10 * bench.sizes.plain_epochs)
    sides = {
        "published": partial(published_losses, theirs, target, start, few),
        "optimize": partial(optimize, [recording], [labels], start, few),
    }
    # Later ones differ: at this rate a small difference grows from epoch to epoch.
    np.testing.assert_allclose(sides["optimize"]().losses[:4], sides["published"]()[:4], rtol=1e-3)
    what = f"an epoch of token optimisation, {EMBEDDED}, {len(recording.step_indices)} steps, all layers"
    return [ratio_line(bench, 8, what, race(bench, sides, bench.sizes.rounds), "published", "optimize", "5")]


def layout(bench: Bench) -> list[Line]:
    if bench.on_gpu:
        raise NotOnThisDevice("Queries are laid out for a CPU alone.")
    lines = []
    made, _ = synthetic_recording(bench, bench.sizes.heatmap_steps, bench.sizes.side)
    for name, recording, width in (
        (EMBEDDED, drawn(bench)[1].recording, None),
        ("SD 1.5's shapes", made, random_embedding(bench, 1).shape[1]),
    ):
        folded, plain = as_laid_out(recording), as_published(recording)
        folded = replace(folded, layers=tuple(x for x in folded.layers if not x.name.startswith("mid_block")))
        for what, tokens in TOKENS.items():
            embedding = torch.randn(tokens, width or recording.embed_dim, generator=torch.Generator().manual_seed(1))
            assert_same(heatmaps(folded, embedding), heatmaps(plain, embedding), rtol=0, atol=1e-5)
            sides = {"folded": partial(heatmaps, folded, embedding), "unfolded": partial(heatmaps, plain, embedding)}
            times = race(bench, sides, bench.sizes.rounds)
            lines.append(ratio_line(bench, 8, f"{what}, {tokens} tokens, {name}", times, "folded", "unfolded", "1"))
        pair = torch.randn(2, recording.embed_dim, generator=torch.Generator().manual_seed(1))
        sides = {"folded": partial(gradient, folded, pair), "unfolded": partial(gradient, plain, pair)}
        times = race(bench, sides, bench.sizes.rounds)
        lines.append(ratio_line(bench, 8, f"maps and gradient of 2 tokens, {name}", times, "folded", "unfolded", "1"))
    return lines


def dense_crf(bench: Bench) -> list[Line]:
    if not crf.crf_available():
        raise NotOnThisDevice(crf.NO_CRF)
    side, lines = min(bench.sizes.side, 128), []
    image = np.random.default_rng(0).integers(0, 60, (side, side, 3), dtype=np.uint8)
    masks = []
    for number in range(len(WORDS)):
        shape = Image.new("1", (side, side))
        ImageDraw.Draw(shape).ellipse((number * 4, side // 8, side // 2 + number * 6, side - side // 8), fill=1)
        masks.append(np.asarray(shape))
        image[masks[-1]] += 20
    np.testing.assert_array_equal(crf.densecrf_each(masks, image), [crf.densecrf(mask, image) for mask in masks])
    pool, patience = crf._pool(os.getpid()), time.perf_counter() + 60
    while pool is not None and not pool.is_up and time.perf_counter() < patience:
        time.sleep(0.05)
    np.testing.assert_array_equal(forgotten(masks, image), [crf.densecrf(mask, image) for mask in masks])
    sides = {
        "one": partial(crf.densecrf, masks[0], image),
        "eight": partial(forgotten, masks, image),
        "eight in a row": partial(lambda: [crf.densecrf(mask, image) for mask in masks]),
        "one of eight changed": partial(changed, masks, image, itertools.count()),
    }
    times = race(bench, sides, bench.sizes.rounds)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    what = f"dense CRF, {side}x{side}"
    lines.append(ratio_line(bench, 8, what, times, "eight", "one", "", f"{cores} cores"))
    lines.append(ratio_line(bench, 8, what, times, "eight in a row", "one", "", "as before"))
    lines.append(ratio_line(bench, 8, what, times, "one of eight changed", "one"))
    return lines


@cache
def drawn(bench: Bench) -> tuple[OVAM, Picture]:
    """The embedded model and a picture of its usual steps."""
    ovam = OVAM.from_pretrained(EMBEDDED, device=str(bench.device))
    ovam.generate(PROMPT, num_inference_steps=1)
    return ovam, ovam.generate(PROMPT, num_inference_steps=bench.sizes.question_steps)


def asked(ovam: OVAM, recording: Recording, words: Sequence[str]) -> Tensor:
    """From words to maps of the image's size."""
    return resize(attribute(recording, attribute_words(ovam.pipe, words)), recording.image_size)


def anew(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call as if nothing had been read before."""

    def forgetful() -> Any:
        remembered._read.clear()
        return call()

    return forgetful


def as_laid_out(recording: Recording) -> Recording:
    return replace(recording, layers=side_by_side(recording.layers))


def gradient(recording: Recording, start: Tensor) -> Tensor:
    embedding = start.clone().requires_grad_()
    return torch.autograd.grad(heatmaps(recording, embedding)[1].square().mean(), embedding)[0]


def forgotten(masks: Sequence[np.ndarray], image: np.ndarray) -> np.ndarray:
    """Masks refined as if none had been before."""
    crf._kept.clear()
    return crf.densecrf_each(masks, image)


def changed(masks: Sequence[np.ndarray], image: np.ndarray, numbers: Iterator[int]) -> np.ndarray:
    """All masks refined after one of them has changed, at the pixel of the next number."""
    first = masks[0].copy()
    first.flat[next(numbers) % first.size] ^= True
    return crf.densecrf_each([first, *masks[1:]], image)
