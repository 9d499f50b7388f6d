"""OVAM: a text-to-image pipeline, what is known of its family and its usual settings, in one object with four verbs.

ovam = OVAM.from_pretrained("emoji-voc")
picture = ovam.generate("A photograph of a cat and a car on grass", seed=1)   # costly once: image and recording
found = ovam.segment(picture, ["cat", "car", "animal"])                       # cheap, any words, any number of times
token = ovam.optimize_token(picture, mask, "cat")
ovam.segment(ovam.photograph("street.jpg", caption="a cat"), [token])
"""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ovam_core.attention.affinity import check_size
from ovam_core.attention.evolution import Evolution, Over, check_over, evolutions, of_as_many_heads
from ovam_core.attention.heatmap import resize
from ovam_core.attention.mask import NO_CRF, crf_available, self_attention_map
from ovam_core.attention.reading import Reading
from ovam_core.attention.recording import Branch, Recording
from ovam_core.errors import InputError, Stopped
from ovam_core.hooks.feature_recorder import check_features, record_features
from ovam_core.hooks.goca_recorder import record_goca
from ovam_core.hooks.guidance import check_guidance, guided_by_region
from ovam_core.hooks.photograph import denoise, fitted_size, prepare, with_run_facts
from ovam_core.hooks.recorder import record
from ovam_core.io.masks import IGNORE, read_mask
from ovam_core.io.pictures import read_photo
from ovam_core.methods import Cut, Method, check_settings, looked_at, method_named, rows_of_labels
from ovam_core.models.binding import bound, bound_goca
from ovam_core.models.goca import GocaPreset
from ovam_core.models.load import load_pipeline
from ovam_core.models.presets import (
    ModelDefaults,
    defaults_for,
    recommended_part,
    recommended_steps,
)
from ovam_core.models.reading import read_as
from ovam_core.models.registry import adapter_of, model_name
from ovam_core.models.starting import fitted_start, start_arguments, starting_from_picture
from ovam_core.optimization import (
    PROMPT,
    RECIPES,
    Epoch,
    Optimized,
    OptimizeSettings,
    initial_embedding,
    optimize,
)
from ovam_core.picture import Picture, Segmentation, load_picture
from ovam_core.plot import resize_mask
from ovam_core.presence import UNLIKELY, PresenceScorer
from ovam_core.query import Query, branch_of, caption_of, token_query
from ovam_core.settings import (
    DEFAULT_METHOD,
    HALVES,
    MAX_GUIDANCE,
    PLAIN,
    S_CFG_AVERAGE,
    GenerateSettings,
    PhotoSettings,
    SegmentSettings,
)
from ovam_core.tokens import BACKGROUND, Token
from ovam_core.unlabelled import COMPANIONS, TEMPLATE, Unlabelled, companions, lesson, own_labels, scenes

if TYPE_CHECKING:
    from ovam_core.models.adapter import Pipeline

MAX_WORK_PIXELS = 1 << 21  # masks of larger photographs are made at this area: a dense CRF takes seconds a megapixel
MAX_ANSWER = 500_000_000  # values of the maps at image size, 2 GB

OnStep = Callable[[int, int], None]


class OVAM:
    """A pipeline with its adapter and preset.

    pipe: any diffusers text-to-image pipeline of a family in models/registry.py. The attributes `pipe`, `adapter`
    (how its family reads text and attends) and `preset` (usual settings, recommended grids, steps and thresholds) may
    be read; the pipeline is never changed. `goca` may be set: the settings that GoCA's pass is recorded by, None for
    the published ones (models/goca.py has them, and a shorter list for Flux). Raises InputError for a pipeline of no
    known family.
    """

    def __init__(self, pipe: Pipeline):
        self.pipe = pipe
        self.adapter = adapter_of(pipe)
        self.preset: ModelDefaults = defaults_for(pipe)
        self.goca: GocaPreset | None = None
        self.presence = PresenceScorer(pipe)

    @classmethod
    def from_pretrained(
        cls, model: str | None = None, device: str | None = None, dtype: torch.dtype | None = None
    ) -> OVAM:
        """Opens "emoji-voc", a folder or a hub id; see `load_pipeline` for the defaults and what is raised."""
        return cls(load_pipeline(model, device, dtype))

    @property
    def name(self) -> str:
        """The model's name, as token files and settings.json hold it."""
        return model_name(self.pipe)

    @property
    def device(self) -> torch.device:
        return self.pipe._execution_device

    @property
    def dtype(self) -> str:
        """Of the denoiser's weights, such as "float16"."""
        return str(self.adapter.denoiser.dtype).removeprefix("torch.")

    @property
    def serves_goca(self) -> bool:
        """Whether the pass that GoCA's methods need can be recorded with this model."""
        try:
            record_goca(self.pipe)
        except InputError:
            return False
        return True

    @property
    def serves_s_cfg(self) -> bool:
        """Whether the guidance can have a strength of its own in every region with this model."""
        try:
            check_guidance(self.pipe, MAX_GUIDANCE)
        except InputError:
            return False
        return True

    def serves(self, method: Method) -> bool:
        """Whether what a method looks at can be recorded with this model."""
        if "outputs" in method.keeps and not self.adapter.output_names:
            return False
        return self.serves_goca or not method.needs_goca

    # ------------------------------------------------------------------------------------ pictures

    def generate(
        self,
        prompt: str,
        *,
        negative_prompt: str = "",
        seed: int = 0,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance: str | None = None,
        width: int | None = None,
        height: int | None = None,
        start: Image.Image | str | Path | None = None,
        strength: float | None = None,
        tokens: Sequence[Token] = (),
        branch: Branch | None = None,
        features: bool = False,
        keep: Collection[str] = (),
        callback_on_step_end: OnStep | None = None,
    ) -> Picture:
        """An image and its recording. None takes the model's own steps, guidance and size.

        seed: 0 to 2**32 - 1; the noise is drawn on the CPU, so it is the same on every device. guidance: how it is
        spread over the picture, "plain", "s-cfg" or "s-cfg-average"; None for plain. start: a picture or its file to
        begin from in place of noise, cropped about its middle to the size; strength: the share of the steps that are
        run then, above 0 to 1 (0.6). tokens: those that will be asked for, where they belong to the
        unconditional half of the guided batch. branch: the half to record, "all" for both; None for that of the tokens.
        features: keep those of the UNet's last step too, for the systems in downstream/: see `record_features`. keep:
        what some methods need beside: "matrix" for iSeg, FA-Seg and Dataset Diffusion, "outputs" for ConceptAttention;
        see `record`.
        callback_on_step_end: called with (steps done, steps in all), once with 0 before the first; it may raise
        `Stopped` to end the run.
        Raises InputError, one sentence, for what this model cannot make.
        """
        if start is None and strength is not None:
            raise InputError("A strength is given and no picture to start from; give start, or leave strength out.")
        settings = GenerateSettings.for_model(
            self.pipe,
            prompt,
            negative_prompt=negative_prompt,
            seed=seed,
            steps=num_inference_steps,
            guidance=guidance_scale,
            width=width,
            height=height,
            start=start,
            strength=strength,
            guidance_kind=guidance,
        )
        branch = branch_of(tokens) if branch is None else branch
        return self.draw(
            settings,
            on_step=callback_on_step_end,
            branch=branch,
            with_goca=self.serves_goca,
            with_features=features,
            keep=keep,
        )

    def draw(
        self,
        settings: GenerateSettings,
        *,
        on_step: OnStep | None = None,
        should_stop: Callable[[], bool] | None = None,
        branch: Branch = "conditional",
        with_goca: bool = False,
        with_features: bool = False,
        keep: Collection[str] = (),
    ) -> Picture:
        """`generate` from whole settings.

        on_step: called with (steps done, steps in all) after every denoising step, once with 0 before the first.
        should_stop: asked at every step; where it says True, `Stopped` is raised and nothing is kept. branch: half of
        the guided batch to record (`halves_of` knows which one a question needs); "all" for both, where there are two:
        the unconditional one is then among the picture's `others`. with_goca: record the pass of GoCA too;
        with_features: the features of the last step; keep: as in `generate`.
        """
        settings.validate(self.pipe)
        if with_features:
            self._check_features(settings)
        settings, pipe = self._begun(settings)
        total = self.steps_run(settings)
        first: Branch = "conditional" if branch == "all" else branch
        rest: list[Branch] = ["unconditional"] if branch == "all" and self.adapter.guides(settings.guidance) else []
        begun = time.perf_counter()

        def after_step(done: int) -> None:
            done = min(done, total)  # some schedulers take a step or two more than asked for
            if should_stop is not None and should_stop():
                raise Stopped(done, total)
            if on_step is not None:
                on_step(done, total)

        after_step(0)
        # A generator on the CPU draws the same noise whatever the device.
        generator = torch.Generator("cpu").manual_seed(settings.seed)
        size: dict[str, Any] = {"width": settings.width, "height": settings.height}
        if settings.start is not None:
            size = start_arguments(pipe, settings.start, settings.strength)
        with ExitStack() as recorders:
            recorded = [recorders.enter_context(record(pipe, branch=half, keep=keep)) for half in (first, *rest)]
            weighted = recorders.enter_context(record_goca(pipe, branch=first, preset=self.goca)) if with_goca else None
            seen = recorders.enter_context(record_features(pipe)) if with_features else None
            if settings.guidance_kind != PLAIN:
                averages = settings.guidance_kind == S_CFG_AVERAGE
                guide = guided_by_region(pipe, settings.prompt, settings.guidance, averages=averages)
                recorders.enter_context(guide)
            images = self.run(
                pipe=pipe,
                prompt=settings.prompt,
                num_inference_steps=settings.steps,
                guidance_scale=settings.guidance,
                generator=generator,
                **size,
                **adapter_of(pipe).arguments(settings.negative_prompt, after_step),
            ).images
        recording, *others = (one.recordings[0] for one in recorded)
        picture = self._picture(images[0], recording, settings, weighted, begun)
        features = None if seen is None else seen.recordings[0]
        return replace(picture, others={one.branch: one for one in others}, features=features)

    def _begun(self, settings: GenerateSettings) -> tuple[GenerateSettings, Pipeline]:
        """The settings with their start picture as the run begins from it, and the pipeline that runs."""
        if settings.start is None:
            return settings, self.pipe
        start = fitted_start(settings.start, (settings.width, settings.height))
        return replace(settings, start=start), starting_from_picture(self.pipe)

    def photograph(
        self,
        photo: Image.Image | str | Path,
        caption: str = "",
        *,
        timesteps: Sequence[int] | None = None,
        seed: int = 0,
        width: int | None = None,
        height: int | None = None,
        mirror: bool = False,
        keep: Collection[str] = (),
    ) -> Picture:
        """A photograph, noised and passed once through the model, as a picture with its recording.

        photo: a picture or its file. caption: what it shows; empty, the pass is that of the unconditional half.
        timesteps: noise, 0 to 999, one pass each; None: 100, as GoCA takes, 150 in flow matching. mirror: see it in a
        mirror, too, and average the maps. keep: as in `generate`. `image` is the upright RGB picture at its own size,
        and so are heatmaps and masks. Raises InputError for what is no picture or cannot be recorded.
        """
        noise = (self.adapter.photo_timestep,) if timesteps is None else tuple(timesteps)
        settings = PhotoSettings(caption, noise, seed, width, height, mirror)
        return self.look_at(photo, settings, with_goca=self.serves_goca, keep=keep)

    def look_at(
        self,
        photo: Image.Image | str | Path,
        settings: PhotoSettings,
        *,
        should_stop: Callable[[], bool] | None = None,
        with_goca: bool = False,
        keep: Collection[str] = (),
    ) -> Picture:
        """`photograph` from whole settings.

        should_stop: asked before every pass; where it says True, `Stopped` is raised. with_goca: record GoCA's pass,
        the one nearest to the model's t (`Adapter.photo_timestep`). keep: as in `generate`.
        """
        settings.validate(self.pipe)
        begun = time.perf_counter()
        image = read_photo(photo)
        about = (settings.timesteps, settings.seed, settings.size, settings.mirror)
        noisy = prepare(self.pipe, [image], [settings.caption], *about)
        goal = self.adapter.photo_timestep / 1000 * self.pipe.scheduler.config.num_train_timesteps
        nearest = min(range(len(noisy.timesteps)), key=lambda step: abs(noisy.timesteps[step] - goal))
        about_goca: dict[str, Any] = {"branch": "all", "step": nearest, "preset": self.goca}
        weighing = record_goca(self.pipe, **about_goca) if with_goca else nullcontext()
        recording = record(self.pipe, branch="all", keep=keep, mirrored=noisy.mirrored)
        with read_as(Reading()), recording as recorder, weighing as weighted:
            denoise(self.pipe, noisy, should_stop)
        return self._picture(image, with_run_facts(recorder.recordings[0], noisy), settings, weighted, begun)

    def steps_run(self, settings: GenerateSettings) -> int:
        """How many of the steps are run: from a picture, fewer."""
        if settings.start is None:
            return settings.steps
        return self.adapter.steps_run(settings.steps, settings.strength)

    def run(self, *, pipe: Pipeline | None = None, **arguments: Any) -> Any:
        """The pipeline's own call; pipe: another one of the same modules."""
        return (pipe or self.pipe)(**arguments)  # type: ignore[operator]  # diffusers' base class is not callable, each pipeline is

    def _picture(
        self,
        image: Image.Image,
        recording: Recording,
        settings: GenerateSettings | PhotoSettings,
        weighted: Any,
        begun: float,
    ) -> Picture:
        return Picture(
            image=image,
            recording=recording,
            settings=settings,
            goca=None if weighted is None else weighted.recordings[0],
            model=self.name,
            device=str(self.device),
            dtype=self.dtype,
            seconds=time.perf_counter() - begun,
        )

    def load_recording(self, path: str | Path) -> Picture:
        """A picture with its recording, from a file of `Picture.save_recording`, to be asked as if it were just made.

        Raises InputError for what is no such file, and where the model is not the one that made it.
        """
        return self.bind(load_picture(path))

    def bind(self, picture: Picture) -> Picture:
        """A picture of another process, or one `detached`, with this model's own layers in its recordings.

        They are found by name. Raises InputError where the model has not the layers of the run, or others' weights in
        them.
        """
        try:
            if picture.settings is not None:
                picture.settings.validate(self.pipe)
            return replace(
                picture,
                recording=bound(self.pipe, picture.recording),
                goca=None if picture.goca is None else bound_goca(self.pipe, picture.goca),
                others={branch: bound(self.pipe, one) for branch, one in picture.others.items()},
                last_maps=None,
            )
        except InputError as error:
            made = f"by {picture.model}" if picture.model else "elsewhere"
            raise InputError(f"This picture was made {made} and cannot be asked with {self.name}: {error}") from None

    # ------------------------------------------------------------------------------------ what is in them

    def segment(
        self,
        picture: Picture,
        queries: str | Token | Sequence[str | Token] = (),
        *,
        method: str | Method = "OVAM",
        sentence: str = "",
        template: str = "{}",
        tau: float | None = None,
        alpha: float | None = None,
        crf: bool = True,
        step_indices: Sequence[int] | None = None,
        resolutions: Sequence[int] | None = None,
        branch: Branch | None = None,
    ) -> Segmentation:
        """Heatmaps and masks of anything in a picture, from its recording alone.

        queries: words, phrases and tokens, in any number; in the answer the words come first, then the tokens. With
        `sentence`, words to be found in it, and without words every token of the sentence. method: a name in METHODS,
        or a Method, such as `GroundedDiffusion(weights)` of downstream/.
        tau, alpha: threshold (Eq. 9) and self-attention floor (Eq. 8), 0 to 1; None: the model's own for words, each
        token's own for tokens. step_indices, resolutions: denoising steps and attention grids to use; None: those that
        the model recommends. branch: half of the guided batch that words are asked of, and that the self-attention is
        of: "unconditional" is the negative prompt's own; None for the conditional one. Raises InputError, one sentence,
        for what the recording cannot answer.
        """
        asked = [queries] if isinstance(queries, str | Token) else list(queries)
        settings = SegmentSettings(
            words=tuple(one for one in asked if not isinstance(one, Token)),
            sentence=" ".join(sentence.split()),
            template=template,
            tau=tau,
            alpha=alpha,
            crf=crf,
            step_indices=None if step_indices is None else tuple(step_indices),
            resolutions=None if resolutions is None else tuple(resolutions),
            tokens=tuple(one for one in asked if isinstance(one, Token)),
            token_tau=tau,
            token_alpha=alpha,
            method=method_named(method).name if isinstance(method, str) else method_named(method),
            branch=branch,
        )
        return self.answer(picture, settings)

    def answer(
        self, picture: Picture, settings: SegmentSettings, *, on_label: Callable[[], None] | None = None
    ) -> Segmentation:
        """`segment` from whole settings. on_label: called before each mask is refined; it may raise to end the answer.

        Raises InputError for settings that the recording cannot answer: a step or resolution that it does not hold, a
        method that needs another one, a token of the other half of the guided batch; and words where the text encoder
        has changed since.
        """
        with torch.no_grad(), read_as(picture.recording.reading):
            return self._answer(picture, settings, on_label)

    def _answer(self, picture: Picture, settings: SegmentSettings, on_label: Callable[[], None] | None) -> Segmentation:
        check_settings(settings)
        settings = self.filled(settings)
        self.check_answerable(settings, picture.settings)
        method = method_named(settings.method)
        seen = replace(self._used_parts(picture, settings), image=_at_work_size(picture.image))
        if not method.needs_features:  # those are of both halves
            _check_branches(settings, picture, method.needs_goca)
        queries = self.queries(settings)
        labels = _distinct(queries)
        if len(labels) * picture.image.width * picture.image.height > MAX_ANSWER:
            size = f"{picture.image.width}x{picture.image.height}"
            raise InputError(
                f"{len(labels)} words on a picture of {size} need too much memory; ask for fewer, or make it smaller."
            )
        maps = self._maps(picture, seen, settings, queries)
        masks = method.masks(seen, maps, queries, settings.crf, on_label)
        full = resize(maps[: len(labels)], (picture.image.height, picture.image.width)).float().cpu().numpy()
        masks = np.stack([resize_mask(mask, picture.image.size) for mask in masks])
        on_grid = maps[: len(labels)].float().cpu().numpy()
        apart = [] if settings.evolution is None else self._evolutions(picture, settings, settings.evolution)
        presence = self.presence.scores(picture.recorded, queries, picture.caption)
        return Segmentation(labels, full, masks, picture, settings, on_grid, tuple(queries), apart, presence)

    def is_absent(self, presence: float | None) -> bool:
        """Whether this presence says that a word is probably not in its picture: never where the model has not been
        measured.
        """
        return self.preset.presence is not None and presence is not None and presence < UNLIKELY

    def received_attention(self, found: Segmentation) -> dict[str, np.ndarray]:
        """The attention that each pixel received (Eq. 8), scaled to [0, 1], so that A_alpha = alpha + (1 - alpha) * it.

        float32 `[h, w]` on the recording's grid for each half of the guided batch that was asked; nothing for a method
        that does without, and for a half that was recorded without self-attention.
        """
        if not method_named(found.settings.method).has_alpha:
            return {}
        seen = self._used_parts(found.picture, found.settings)
        halves = {branch: seen.of_branch(branch) for branch in dict.fromkeys(query.branch for query in found.queries)}
        return {
            branch: self_attention_map(recording, 0).float().cpu().numpy()
            for branch, recording in halves.items()
            if recording.column_sums
        }

    def queries(self, settings: SegmentSettings) -> list[Query]:
        """The words or sentence of the settings, then their tokens, read, with their tau and alpha decided.

        Raises InputError where the text encoder cannot take the text, or a token cannot be used with this model.
        """
        method = method_named(settings.method)
        given = Cut(settings.tau, settings.alpha, settings.token_tau, settings.token_alpha)
        words = method.words(self.pipe, settings)
        if settings.branch is not None:
            words = [replace(query, branch=cast(Branch, settings.branch)) for query in words]
        asked = [*words, *(token_query(self.pipe, token) for token in settings.tokens)]
        return [method.cut(query, given, self.preset) for query in asked]

    def filled(self, settings: SegmentSettings) -> SegmentSettings:
        """The same with the tau and alpha that words will be cut at, in place of None; and without the dense CRF, with
        a warning, where SimpleCRF is not installed.
        """
        method = method_named(settings.method)
        given = Cut(settings.tau, settings.alpha)
        tau = method.cut(Query(("",), None), given, self.preset).tau
        alpha = self.preset.alpha if settings.alpha is None else settings.alpha
        refined = settings.crf and method.crf and not crf_available()
        if refined:
            warnings.warn(NO_CRF, stacklevel=2)
        return replace(settings, tau=tau, alpha=alpha, crf=settings.crf and not refined)

    def check_answerable(self, settings: SegmentSettings, made_with: GenerateSettings | PhotoSettings | None) -> None:
        """Raises InputError, one sentence, where a picture of the settings `made_with` has no recording for the
        method.
        """
        method = method_named(settings.method)
        if made_with is None:
            return
        run = self.steps_run(made_with) if isinstance(made_with, GenerateSettings) else None
        if method.run_steps is not None and run != method.run_steps:
            raise InputError(
                f"{method.name} looks at step {method.step} of a run of {method.run_steps}: generate an image with "
                f"{method.run_steps} steps, or choose another method."
            )
        if method.needs_features:
            self._check_features(made_with)
        if "matrix" in method.keeps and made_with.width is not None and made_with.height is not None:
            finest = min(self.adapter.strides)
            check_size(made_with.height // finest, made_with.width // finest)
        if isinstance(made_with, GenerateSettings):
            self._check_parts(settings, made_with)
        self._check_half(settings, made_with)
        method.check_words(self.pipe, made_with.caption, settings.words)

    def _check_features(self, made_with: GenerateSettings | PhotoSettings) -> None:
        """Refuses what no features of the UNet can be recorded of, for the systems that ask them."""
        check_features(self.pipe)
        if isinstance(made_with, PhotoSettings):
            raise InputError(
                "The features of both halves of the guided batch are recorded of generated images alone, not of a "
                "photograph: generate one, or choose another method."
            )
        if not self.adapter.guides(made_with.guidance):
            raise InputError(
                "Without guidance there is no unconditional half, whose features are asked too: make the picture with "
                "a guidance scale above 1."
            )
        multiple = max(self.adapter.strides)
        for name, side in (("width", made_with.width), ("height", made_with.height)):
            if side % multiple:
                raise InputError(
                    f"The {name} is {side} pixels, and the features of four grids need multiples of {multiple}: "
                    f"{max(multiple, side - side % multiple)} would do."
                )

    def _check_parts(self, settings: SegmentSettings, made_with: GenerateSettings) -> None:
        """Refuses steps and grids that no recording of this image can have."""
        # A second-order scheduler calls the model twice a step, PNDM once more than it has steps.
        run = self.steps_run(made_with)
        calls = run * getattr(self.pipe.scheduler, "order", 1) + 1
        if settings.step_indices is not None and min(settings.step_indices) >= calls:
            raise InputError(f"None of these steps is in a run of {run}: choose among 0 to {run - 1}.")
        side, strides = max(made_with.width, made_with.height), self.adapter.strides
        grids = {side // stride for stride in strides} | {-(-side // stride) for stride in strides}
        if settings.resolutions is not None and not grids & set(settings.resolutions):
            listed = ", ".join(str(grid) for grid in sorted(grids, reverse=True))
            raise InputError(f"No attention grid is {settings.resolutions[-1]} wide: choose among {listed}.")

    def _check_half(self, settings: SegmentSettings, made_with: GenerateSettings | PhotoSettings) -> None:
        """Refuses the half of the guided batch that no recording of these settings can have."""
        asked = {settings.branch, *(token.branch for token in settings.tokens)}
        if isinstance(made_with, PhotoSettings):
            half, other = HALVES if made_with.caption.strip() else HALVES[::-1]
            if other in asked:
                how = "without" if made_with.caption.strip() else "with"
                raise InputError(
                    f"This photograph is of the {half} half alone; look at it {how} a caption for the other one."
                )
        elif "unconditional" in asked and not self.adapter.guides(made_with.guidance):
            raise InputError(
                "Without guidance there is no unconditional half to ask: make the picture with a guidance scale above "
                "1 by a model that is guided so, or ask the conditional one."
            )

    def _used_parts(self, picture: Picture, settings: SegmentSettings) -> Picture:
        """The picture with `_used_part` of each of its recordings."""
        return replace(
            picture,
            recording=self._used_part(picture.recording, settings),
            others={half: self._used_part(one, settings) for half, one in picture.others.items()},
        )

    def _used_part(
        self, recording: Recording, settings: SegmentSettings, layers: Sequence[str] | None = None
    ) -> Recording:
        """The steps, grids and layers that were named, else those that the model recommends."""
        method = method_named(settings.method)
        if layers is None:
            return looked_at(self.pipe, method, recording, settings.step_indices, settings.resolutions)
        used = recording.select(steps=settings.step_indices, layers=layers, resolutions=settings.resolutions)
        return recommended_steps(self.pipe, used) if settings.step_indices is None and method.step is None else used

    def _maps(self, picture: Picture, seen: Picture, settings: SegmentSettings, queries: Sequence[Query]) -> Tensor:
        """The maps of the queries; the last ones again where only the cut has changed."""
        numbers = tuple((token.embedding.numpy().tobytes(), token.names, token.branch) for token in settings.tokens)
        parts = (settings.step_indices, settings.resolutions, settings.branch)
        # Recordings are equal to themselves alone.
        recorded = (picture.recording, picture.goca, picture.features, *picture.others.values(), picture.caption)
        question = (settings.method, settings.words, settings.sentence, settings.template, parts, numbers, recorded)
        last = picture.last_maps  # which another thread may replace at any time
        if last is None or last[0] != question:
            last = picture.last_maps = (
                question,
                method_named(settings.method).heatmaps(self.pipe, seen, queries),
            )
        return last[1]

    def evolution(
        self,
        picture: Picture,
        query: str | Token = "",
        over: Over = "steps",
        *,
        label: str | None = None,
        sentence: str = "",
        template: str = "{}",
        step_indices: Sequence[int] | None = None,
        resolutions: Sequence[int] | None = None,
        layers: Sequence[str] | None = None,
        branch: Branch | None = None,
    ) -> Evolution:
        """The heatmap of a word or a token taken apart: a map for each denoising step, grid, layer or head.

        query: as in `segment`; label: which of its labels, where it has several (a token of several classes, a
        sentence without words). Shown is all that was recorded of what the heatmap is taken apart over, and of the rest
        what the model recommends, unless you name other steps, grids (`resolutions`) or layers (names or parts of them,
        as `record` takes them); heads are of layers that have as many, else of the finest grid. The weighted mean of
        the frames is the word's heatmap of OVAM (Eq. 5), whatever other methods make of it. branch: half of the guided
        batch that a word is asked of. Raises InputError as `segment` does, and for another `over`.
        """
        if not isinstance(query, str | Token):
            raise InputError(f"What is asked for is a {type(query).__name__}: give a word or a Token.")
        words, tokens = ((), (query,)) if isinstance(query, Token) else ((query,) if query.strip() else (), ())
        settings = SegmentSettings(
            words=words,
            sentence=" ".join(sentence.split()),
            template=template,
            crf=False,
            step_indices=None if step_indices is None else tuple(step_indices),
            resolutions=None if resolutions is None else tuple(resolutions),
            tokens=tokens,
            branch=branch,
        )
        check_settings(settings)
        self.check_answerable(settings, picture.settings)
        _check_branches(settings, picture, of_one_pass=False)
        with torch.no_grad(), read_as(picture.recording.reading):
            labels, found = _distinct(self.queries(settings)), self._evolutions(picture, settings, over, layers)
        wanted = labels[0] if label is None and len(labels) == 1 else label
        if wanted not in labels:
            raise InputError(f"This has the labels {', '.join(labels)[:300]}: choose one of them.")
        return found[labels.index(wanted)]

    def _evolutions(
        self, picture: Picture, settings: SegmentSettings, over: str, layers: Sequence[str] | None = None
    ) -> list[Evolution]:
        """One a label, in the order of the queries."""
        check_over(over)
        settings = replace(settings, method=DEFAULT_METHOD)
        queries = self.queries(settings)
        found: dict[int, Evolution] = {}
        places = rows_of_labels(queries)
        for branch in dict.fromkeys(query.branch for query in queries):
            chosen = [n for n, query in enumerate(queries) if query.branch == branch]
            whole = picture.of_branch(branch)
            used = self._used_part(whole, settings, layers)
            if over == "steps":
                every = settings.step_indices or whole.step_indices
                shown = self._used_part(whole, replace(settings, step_indices=every), layers)
            elif over == "heads":
                shown = used = of_as_many_heads(used)
            else:
                shown = whole.select(used.step_indices, layers, settings.resolutions)
            one = evolutions(shown, [queries[n].attribution for n in chosen], cast(Over, over), used)
            found.update(zip([row for n in chosen for row in places[n]], one, strict=True))
        return [found[row] for row in range(len(found))]

    # ------------------------------------------------------------------------------------ tokens

    def optimize_token(
        self,
        pictures: Picture | Sequence[Picture],
        masks: Any,
        classes: str | Sequence[str],
        *,
        recipe: str = "fast",
        unlabelled: int = 0,
        among: Sequence[str] = COMPANIONS,
        on_epoch: Callable[[Epoch], None] | None = None,
    ) -> Token:
        """The token of a class, learned from one picture and its mask, or from several of both (Eqs. 6 and 7).

        masks: one a picture: bool or whole numbers `[H, W]`, a picture, or its file; see `read_mask`. classes: the
        name, or the names of mask values 1, 2, ... recipe: a name in `optimization.RECIPES`, "fast" or "paper".
        unlabelled: pictures without masks to learn on from, 0 to 64; each costs a generation. They show the classes
        among other things, those of `among`, which become the token's rivals: see unlabelled.py.
        Raises InputError for masks that do not fit, and as `optimize` and `unlabelled` do.
        """
        if recipe not in RECIPES:
            raise InputError(f"There is no recipe '{recipe[:40]}'; choose among {', '.join(RECIPES)}.")
        names = (classes,) if isinstance(classes, str) else tuple(classes)
        several = [pictures] if isinstance(pictures, Picture) else list(pictures)
        masks = [masks] if isinstance(pictures, Picture) else list(masks)
        if len(masks) != len(several):
            raise InputError(f"There are {len(several)} pictures and {len(masks)} masks; give each picture its mask.")
        targets = [
            self.target(picture, read_mask(_as_image(mask), (picture.image.height, picture.image.width), len(names)))
            for picture, mask in zip(several, masks, strict=True)
        ]
        if not unlabelled:
            return self.learn(several, targets, names, RECIPES[recipe], on_epoch=on_epoch)[0]
        first = several[0]
        made = self.unlabelled(names, unlabelled, among, like=first.settings, branch=first.recording.branch)
        return self.learn_on(several, targets, names, made, RECIPES[recipe], on_epoch=on_epoch)[0]

    def unlabelled(
        self,
        classes: Sequence[str],
        count: int,
        among: Sequence[str] = COMPANIONS,
        *,
        like: GenerateSettings | PhotoSettings | None = None,
        branch: Branch = "conditional",
        seed: int = 0,
        on_picture: Callable[[int, int], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> Unlabelled:
        """Pictures of the classes among other things, with labels by their names: see unlabelled.py.

        like: a picture's settings, whose steps, guidance and size they share; None or a photograph's: the model's own.
        on_picture: called before each with (pictures made, pictures in all); it may raise `Stopped`. should_stop: asked
        at every step. Raises InputError as `scenes` and `generate` do.
        """
        names = (*classes, *companions(classes, among))
        planned = scenes(classes, among, count, seed)
        whole = like if isinstance(like, GenerateSettings) else GenerateSettings.for_model(self.pipe, planned[0].prompt)
        pictures, labels = [], []
        for number, scene in enumerate(planned):
            if on_picture is not None:
                on_picture(number, len(planned))
            asked = replace(whole, prompt=scene.prompt, seed=scene.seed, start=None, guidance_kind=PLAIN)
            picture = self.draw(asked, branch=branch, should_stop=should_stop)
            found = self.segment(picture, scene.names, template=TEMPLATE, branch=branch, crf=crf_available())
            absent = {name for name, x in zip(found.labels, found.presence, strict=True) if self.is_absent(x)}
            recording = recommended_part(self.pipe, picture.recording)
            pictures.append(replace(picture, recording=recording, goca=None, last_maps=None))
            labels.append(own_labels(found, names, absent))
        return Unlabelled(tuple(pictures), tuple(labels), names)

    def learn_on(
        self,
        pictures: Sequence[Picture],
        targets: Sequence[np.ndarray],
        classes: Sequence[str],
        made: Unlabelled,
        settings: OptimizeSettings = RECIPES["fast"],
        **more: Any,
    ) -> tuple[Token, Optimized]:
        """`learn` from annotated pictures and from those that `unlabelled` made of the same classes. more: as there."""
        whole = lesson(pictures, targets, classes, made)
        return self.learn(
            whole.pictures,
            whole.targets,
            classes,
            settings,
            weights=whole.weights,
            rivals=whole.rivals,
            unlabelled=len(made.pictures),
            **more,
        )

    def target(self, picture: Picture, labels: np.ndarray) -> np.ndarray:
        """Labels uint8 at a picture's size, brought to the size at which the model saw it: what `optimize` takes.

        The maps of a photograph hold no more than that, and the time of an epoch grows with the pixels of its target.
        """
        if not isinstance(picture.settings, PhotoSettings):
            return labels
        height, width = picture.settings.size or fitted_size(self.pipe, picture.image)
        return np.asarray(Image.fromarray(labels).resize((width, height), Image.Resampling.NEAREST))

    def learn(
        self,
        pictures: Sequence[Picture],
        targets: Sequence[np.ndarray],
        classes: Sequence[str],
        settings: OptimizeSettings = RECIPES["fast"],
        *,
        start: Tensor | None = None,
        weights: Sequence[float] | None = None,
        rivals: Sequence[str] = (),
        unlabelled: int = 0,
        tau: float | None = None,
        alpha: float | None = None,
        on_epoch: Callable[[Epoch], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> tuple[Token, Optimized]:
        """`optimize_token` from labels as `target` gives them: the token, and how the search went.

        start: `[1 + classes + rivals, E]`, default their names. weights: of each picture. rivals: names of the labels
        that follow those of the classes; see Token. unlabelled: how many of the pictures, the last ones, bring labels
        that nobody drew. tau, alpha: for the token's masks, default the model's. Raises InputError for a search that
        was stopped before its first epoch, and as `optimize`.
        """
        recordings = [recommended_part(self.pipe, picture.recording) for picture in pictures]
        start = initial_embedding(self.pipe, (*classes, *rivals)) if start is None else start
        found = optimize(recordings, targets, start, settings, on_epoch, should_stop, weights)
        annotated, more = pictures[: len(pictures) - unlabelled], {"unlabelled": unlabelled} if unlabelled else None
        return self.token_of(annotated, classes, found, settings, tau, alpha, more, rivals), found

    def token_of(
        self,
        pictures: Sequence[Picture],
        classes: Sequence[str],
        found: Optimized,
        settings: OptimizeSettings,
        tau: float | None = None,
        alpha: float | None = None,
        more: dict[str, Any] | None = None,
        rivals: Sequence[str] = (),
    ) -> Token:
        """The result of `optimize` as a token that says how it came to be. more: further facts of the search. rivals:
        names of the rows after the classes.
        """
        if not found.losses:
            raise InputError("Stopped before the first epoch: nothing was learned.")
        first = pictures[0].settings
        how = settings.to_json() | {"epochs": found.epochs, "images": len(pictures)} | (more or {})
        about = {} if first is None else first.to_json()
        kind = "photo" if isinstance(first, PhotoSettings) else "image"
        outside = ("prompt", "caption", "seed", "steps")  # fields of the token itself
        kept = {kind: {name: value for name, value in about.items() if name not in outside}, "optimization": how}
        return Token(
            embedding=found.embedding,
            classes=(BACKGROUND, *classes, *rivals),
            rivals=len(rivals),
            model=self.name,
            branch=pictures[0].recording.branch,
            steps=about.get("steps"),
            prompt=pictures[0].caption,
            seed=about.get("seed"),
            init=" | ".join(PROMPT.format(name) for name in classes),
            loss=found.loss,
            settings=json.dumps(kept, sort_keys=True),
            tau=self.preset.token_tau if tau is None else tau,
            alpha=self.preset.token_alpha if alpha is None else alpha,
        )


def default_caption(settings: SegmentSettings) -> str:
    """What to tell the model of a photograph: the sentence, or that it shows the words and the tokens' classes;
    nothing, for tokens that were found without a text. Raises InputError as `branch_of` does.
    """
    if branch_of(settings.tokens) == "unconditional":
        return ""
    names = [name for token in settings.tokens for name in token.names]
    return settings.sentence or caption_of(list(dict.fromkeys([*settings.words, *names])))


def _check_branches(settings: SegmentSettings, picture: Picture, of_one_pass: bool) -> None:
    """Raises InputError for a token, or a half that words are asked of, which was not recorded; of_one_pass: GoCA's is
    of the first half alone.
    """
    own = picture.recording.branch
    recorded = {own} if of_one_pass else {own, *picture.others}
    if own == "all":
        return
    for token in settings.tokens:
        if token.branch not in recorded:
            raise InputError(
                f"The token '{', '.join(token.names)}' was found on the {token.branch} half of the guided batch and "
                f"this image was recorded on the {own} one: make the image again with the token chosen."
            )
    if settings.branch not in (None, *recorded):
        raise InputError(
            f"{method_named(settings.method).name} looks at the {own} half of the guided batch: choose that one, or "
            "another method."
            if of_one_pass
            else f"This image was recorded on the {own} half of the guided batch: make it again with the "
            f"{settings.branch} one chosen, or ask the {own} one."
        )


def _distinct(queries: Sequence[Query]) -> list[str]:
    """Labels that differ, as galleries, legends and files need them: a token beside the word of its name says that it
    is one, and what a sentence holds twice is numbered.
    """
    words = {label for query in queries if query.kind == "word" for label in query.labels}
    plain = [
        f"{label} (token)" if query.kind == "token" and label in words else label
        for query in queries
        for label in query.labels
    ]
    seen: dict[str, int] = {}
    labels = []
    for label in plain:
        seen[label] = seen.get(label, 0) + 1
        labels.append(label if seen[label] == 1 else f"{label} ({seen[label]})")
    return labels


def _at_work_size(image: Image.Image) -> Image.Image:
    """The picture in which masks are made: itself, or for a large photograph one of MAX_WORK_PIXELS of its shape."""
    scale = math.sqrt(MAX_WORK_PIXELS / (image.width * image.height))
    if scale >= 1:
        return image
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)


def _as_image(mask: Any) -> Any:
    """A mask as `read_mask` takes it: an array or a tensor becomes a picture."""
    if isinstance(mask, Image.Image | str | os.PathLike):
        return mask
    if not isinstance(mask, np.ndarray | Tensor):
        raise InputError(f"The mask is a {type(mask).__name__}; give an array [H, W], a PIL image or a file.")
    if isinstance(mask, Tensor) and (mask.layout != torch.strided or mask.is_meta or mask.is_floating_point()):
        kind = f"{mask.dtype}, {mask.layout}, on {mask.device}"
        raise InputError(f"The mask is {kind}; give a dense tensor of bool or whole numbers, [H, W].")
    values = mask.cpu().numpy() if isinstance(mask, Tensor) else mask
    if values.dtype.kind not in "biu" or values.ndim != 2:
        raise InputError(f"The mask is {values.dtype} {list(values.shape)}; give bool or whole numbers, [H, W].")
    if values.dtype == bool:
        return Image.fromarray(values.astype(np.uint8) * 255)
    if values.size == 0 or values.min() < 0 or values.max() > np.iinfo(np.int32).max:
        raise InputError("The mask is empty or holds numbers that are no labels; give 0, the labels from 1, and 255.")
    return Image.fromarray(values.astype(np.int32) if values.max() > IGNORE else values.astype(np.uint8))
