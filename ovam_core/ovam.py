"""One image and its maps, from settings to files: what the command line and the app share.

`generate` is the costly half (an image and its recording; photo.py has that of a photograph), `ask` the cheap one
(maps and masks of any words), `save` and `load_settings` the way to the disk and back. Nothing here knows attention:
that is recorder.py and heatmap.py; nothing here knows Gradio.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ovam_core import plot, tokens
from ovam_core.attention.heatmap import Attribution, resize
from ovam_core.attention.mask import make_masks
from ovam_core.errors import InputError, Stopped
from ovam_core.hooks.goca_recorder import NOISE, record_goca
from ovam_core.hooks.photograph import _told, denoise, prepare
from ovam_core.hooks.recorder import record
from ovam_core.io.pictures import read_photo
from ovam_core.methods import GocaMethod, Method, Seen, maps_and_masks, method_named
from ovam_core.models.families import family_of
from ovam_core.models.presets import own_grids, own_steps
from ovam_core.picture import Generation, Maps, _distinct
from ovam_core.query import attribute_sentence, attribute_words, caption_of, words_in_sentence
from ovam_core.settings import GenerateSettings, MapSettings, PhotoSettings


def photograph(
    pipe: Any, photo: Image.Image | str | Path, settings: PhotoSettings, with_goca: bool = False
) -> Generation:
    """A photograph with its recording, as `generate` gives an image with its own; `ask` and `save` take both.

    `image` is the upright RGB picture at the upload's size, and so are the maps and masks. with_goca: record, beside
    it, GoCA's pass: the one at the timestep nearest to the paper's 100. Raises InputError for
    settings that `validate` refuses and for pictures that `read_photo` and `fitted_size` refuse.
    """
    settings.validate(pipe)
    begun = time.perf_counter()
    image = read_photo(photo)
    noisy = prepare(pipe, [image], [settings.caption], settings.timesteps, settings.seed, settings.size)
    goal = NOISE * pipe.scheduler.config.num_train_timesteps
    nearest = min(range(len(noisy.timesteps)), key=lambda step: abs(noisy.timesteps[step] - goal))
    beside = record_goca(pipe, branch="all", step=nearest) if with_goca else nullcontext()
    with record(pipe, branch="all") as recorder, beside as weighted:
        denoise(pipe, noisy)
    return Generation(
        image=image,
        recording=_told(recorder.recordings[0], noisy),
        settings=settings,
        model=getattr(pipe, "ovam_name", str(getattr(pipe, "name_or_path", "unknown"))),
        device=str(pipe._execution_device),
        seconds=time.perf_counter() - begun,
        dtype=str(family_of(pipe).denoiser.dtype).removeprefix("torch."),
        goca=None if weighted is None else weighted.recordings[0],
    )


def default_caption(asked: MapSettings) -> str:
    """What to tell the model of a photograph: the sentence, or that it shows the words and the tokens' classes; nothing,
    for tokens that were found without a text. Raises InputError as `branch_for` does.
    """
    if branch_for(asked) == "unconditional":
        return ""
    names = [name for path in asked.tokens for name in tokens.load(path).names]
    return asked.sentence or caption_of(list(dict.fromkeys([*asked.words, *names])))


MAX_WORK_PIXELS = 1 << 21  # masks of larger photographs are made at this area: a dense CRF takes seconds a megapixel

MAX_ANSWER = 500_000_000  # values of the maps at image size, 2 GB


def generate(
    pipe: Any,
    settings: GenerateSettings,
    on_step: Callable[[int, int], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    branch: str = "conditional",
    with_goca: bool = False,
) -> Generation:
    """Makes one image under the recorder.

    on_step: called with (steps done, steps in all) after every denoising step, once with 0 before the first.
    should_stop: asked at every step; where it says True, `Stopped` is raised and nothing is kept.
    branch: half of the guided batch to record; `branch_for` knows which one token files need.
    with_goca: record the pass of GoCA beside it, for the methods that need one.
    Raises InputError for settings that `validate` refuses, and where `record_goca` does not know the model's family.
    """
    settings.validate(pipe)
    beside = record_goca(pipe, branch=branch) if with_goca else nullcontext()
    begun = time.perf_counter()

    def after_step(done: int) -> None:
        done = min(done, settings.steps)  # some schedulers take a step or two more than asked for
        if should_stop is not None and should_stop():
            raise Stopped(done, settings.steps)
        if on_step is not None:
            on_step(done, settings.steps)

    after_step(0)
    family = family_of(pipe)
    # A generator on the CPU draws the same noise whatever the device.
    generator = torch.Generator("cpu").manual_seed(settings.seed)
    with record(pipe, branch=branch) as recorder, beside as weighted:
        images = pipe(
            prompt=settings.prompt,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            width=settings.width,
            height=settings.height,
            generator=generator,
            **family.arguments(settings.negative_prompt, after_step),
        ).images
    return Generation(
        image=images[0],
        recording=recorder.recordings[0],
        settings=settings,
        model=getattr(pipe, "ovam_name", str(getattr(pipe, "name_or_path", "unknown"))),
        device=str(pipe._execution_device),
        seconds=time.perf_counter() - begun,
        dtype=str(family.denoiser.dtype).removeprefix("torch."),
        goca=None if weighted is None else weighted.recordings[0],
    )


def branch_for(settings: MapSettings) -> str:
    """The half of the guided batch to record for these settings: the one their tokens were found on.

    Raises InputError for tokens of different halves, which no one recording serves.
    """
    branches = {tokens.load(path).branch for path in settings.tokens} or {"conditional"}
    if len(branches) > 1:
        raise InputError("These tokens were found on different halves of the guided batch; use them one at a time.")
    return branches.pop()


def attributions(pipe: Any, settings: MapSettings) -> list[Attribution]:
    """The words or sentence of the settings, then their tokens, as embeddings.

    Raises InputError where the text encoder cannot take the text, or a token file cannot be used with this model.
    """
    settings.validate()
    return _of_text(pipe, settings) + [tokens.attribution(pipe, tokens.load(path)) for path in settings.tokens]


def _of_text(pipe: Any, settings: MapSettings) -> list[Attribution]:
    if settings.sentence.strip():
        if settings.words:
            return [words_in_sentence(pipe, settings.sentence, settings.words)]
        return [attribute_sentence(pipe, settings.sentence)]
    return attribute_words(pipe, settings.words, template=settings.template) if settings.words else []


def check_served(pipe: Any, settings: MapSettings, made: GenerateSettings | PhotoSettings) -> None:
    """Raises InputError, one sentence, where an image of the settings `made` can have no recording for the method."""
    method = method_named(settings.method)
    if method.steps is not None and getattr(made, "steps", None) != method.steps:
        raise InputError(
            f"{method.name} looks at step {method.only} of a run of {method.steps}: generate an image with "
            f"{method.steps} steps, or choose another method."
        )
    if isinstance(made, GenerateSettings):
        _check_parts(pipe, settings, made)
    if isinstance(method, GocaMethod):
        try:
            method.asking(pipe, made.caption, settings.words)
        except InputError as error:
            raise InputError(f"{method.name} cannot be asked this: {error}") from None


def _check_parts(pipe: Any, settings: MapSettings, made: GenerateSettings) -> None:
    """Refuses steps and grids that no recording of this image can have."""
    # A second-order scheduler calls the model twice a step, PNDM once more than it has steps.
    calls = made.steps * getattr(pipe.scheduler, "order", 1) + 1
    if settings.steps is not None and min(settings.steps) >= calls:
        raise InputError(f"None of these steps is in a run of {made.steps}: choose among 0 to {made.steps - 1}.")
    side, strides = max(made.width, made.height), family_of(pipe).strides
    grids = {side // stride for stride in strides} | {-(-side // stride) for stride in strides}
    if settings.resolutions is not None and not grids & set(settings.resolutions):
        listed = ", ".join(str(grid) for grid in sorted(grids, reverse=True))
        raise InputError(f"No attention grid is {settings.resolutions[-1]} wide: choose among {listed}.")


@torch.no_grad()
def ask(pipe: Any, generation: Generation, settings: MapSettings) -> Maps:
    """Heatmaps and masks of words, from the recording alone; the image is not made again.

    Raises InputError for settings that the recording cannot answer (a step or resolution it does not hold, a method
    that needs another one, a token of the other half of the guided batch).
    """
    settings.validate()
    settings = settings.filled(pipe)
    check_served(pipe, settings, generation.settings)
    method = method_named(settings.method)
    if method.needs_goca and generation.goca is None:
        raise InputError(f"{method.name} needs a pass that was not recorded with this image; choose another method.")
    recording = generation.recording.select(steps=settings.steps, resolutions=settings.resolutions)
    if settings.resolutions is None:
        recording = own_grids(pipe, recording)
    if settings.steps is None and method.only is None:
        recording = own_steps(pipe, recording)
    seen = Seen(_work_image(generation.image), recording, generation.settings.caption, generation.goca)
    if isinstance(method, GocaMethod):
        labels, maps, masks = _compare(pipe, generation, settings, replace(method, tau=settings.tau), seen)
    else:
        labels, maps, masks = _cut(pipe, generation, settings, method, seen)
    masks = np.stack([plot.resize_mask(mask, generation.image.size) for mask in masks])
    full = resize(maps, (generation.image.height, generation.image.width)).float().cpu().numpy()
    return Maps(labels, full, masks, [float(one.max()) for one in full])


def _compare(
    pipe: Any, generation: Generation, settings: MapSettings, method: GocaMethod, seen: Seen
) -> tuple[list[str], torch.Tensor, np.ndarray]:
    """Labels, maps and masks at the size of `seen.image`, of a method that gives each pixel to one word."""
    _check_answer(settings.words, generation.image)
    found = maps_and_masks(method, pipe, seen, settings.words)
    return list(found.labels), found.maps, found.masks


def _cut(
    pipe: Any, generation: Generation, settings: MapSettings, method: Method, seen: Seen
) -> tuple[list[str], torch.Tensor, np.ndarray]:
    """Labels, maps and masks at the size of `seen.image`, of a method that cuts each map for itself."""
    recording = method.select(seen.recording)
    loaded = [tokens.load(path) for path in settings.tokens]
    for token in loaded:
        if token.branch != recording.branch:
            names = ", ".join(token.names)
            raise InputError(
                f"The token '{names}' was found on the {token.branch} half of the guided batch and this image was "
                f"recorded on the {recording.branch} one: make the image again with the token chosen."
            )
    of_text = _of_text(pipe, settings)
    of_tokens = [tokens.attribution(pipe, token) for token in loaded]
    words = [label for part in of_text for label in part.labels]
    # A word and the token of the same name stand side by side: say which is which.
    named = [f"{label} (token)" if label in words else label for part in of_tokens for label in part.labels]
    labels = _distinct([*words, *named])
    _check_answer(labels, generation.image)

    bodies = tuple(token.embedding.numpy().tobytes() for token in loaded)  # a file may change under its name
    question = (
        method.name,
        settings.words,
        settings.sentence,
        settings.template,
        settings.steps,
        settings.resolutions,
        bodies,
    )
    last = generation._last  # which another thread may replace at any time
    if last is None or last[0] != question:
        last = generation._last = (question, method.maps(seen, [*of_text, *of_tokens]))
    maps = last[1]

    # Words share a threshold; every token may bring its own. A method without self-attention keeps to 1.
    cuts = [(settings.tau, settings.alpha if method.alpha < 1 else 1.0)] * len(words)
    for token in loaded:
        tau = token.tau if settings.token_tau is None else settings.token_tau
        alpha = token.alpha if settings.token_alpha is None else settings.token_alpha
        cuts += [(tau, alpha if method.token_alpha < 1 else 1.0)] * len(token.names)
    masks = np.zeros((len(labels), seen.image.height, seen.image.width), dtype=bool)
    for tau, alpha in dict.fromkeys(cuts):
        rows = [row for row, cut in enumerate(cuts) if cut == (tau, alpha)]
        crf = settings.crf and method.crf
        masks[rows] = make_masks(recording, maps[rows], seen.image, tau=tau, alpha=alpha, crf=crf)
    return labels, maps, masks


def _check_answer(labels: Sequence[str], image: Image.Image) -> None:
    if len(labels) * image.width * image.height > MAX_ANSWER:
        raise InputError(
            f"{len(labels)} words on a picture of {image.width}x{image.height} need too much memory; ask for fewer, or "
            "make it smaller."
        )


def _work_image(image: Image.Image) -> Image.Image:
    """The picture in which masks are made: itself, or for a large photograph one of MAX_WORK_PIXELS of its shape."""
    scale = math.sqrt(MAX_WORK_PIXELS / (image.width * image.height))
    if scale >= 1:
        return image
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
