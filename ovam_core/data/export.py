"""Prompts to a segmentation data set on disk: resumable, over one device or many.

    work = work_list(template_prompts("A photograph of a {}", VOC_CLASSES), VOC_CLASSES, images_per_prompt=5)
    summary = export(pipe, work, ExportSettings.for_model(pipe), "out")

The work list (prompts.py) is cut into batches by global index, always the same ones; process r of N makes the batches
r, r + N, ... An image depends on its prompt, its seed and its batch, and on nothing else: so a killed export that
goes on, and one by any number of processes, ends with the bytes of an undisturbed one. Dense CRF, encoding and writing
happen in worker processes beside the generation. What lies on disk, and how, is dataset.py.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ovam_core import tokens
from ovam_core.attention.heatmap import Attribution, attribute, resize
from ovam_core.attention.mask import binary_masks, self_attention_map
from ovam_core.attention.recording import Recording
from ovam_core.data import runs as dataset
from ovam_core.data.dataset import Job, assemble, encode, prepare, write_job
from ovam_core.data.filters import ClipScorer, Filters, reason_kinds
from ovam_core.data.formats import check_formats
from ovam_core.data.layout import FORMAT, SKIPPED
from ovam_core.data.prompts import Item, Skipped, Work, match_class
from ovam_core.data.runs import QUEUE, Process, cores, digest, process_pool, repeatable, worker_count
from ovam_core.errors import InputError, Stopped, is_out_of_memory
from ovam_core.hooks.recorder import record
from ovam_core.models.families import family_of
from ovam_core.models.presets import defaults_for, own_grids, own_steps
from ovam_core.query import attribute_words
from ovam_core.settings import GenerateSettings

MAX_BATCH = 256

LIBRARY = "library"  # ExportSettings.tokens: the tokens that ship for the model


@dataclass(frozen=True)
class ExportSettings:
    """Everything besides the work list that the bytes of a data set depend on. `for_model` fills in the model's own.

    steps, guidance, width, height: as in GenerateSettings. tau, alpha: threshold of Eq. 9 and floor of Eq. 8 for
    all classes, 0 to 1; None: the model's for words, a token's own for tokens. crf: dense CRF. uncertain: pixels
    whose strongest class lies this close to its threshold get 255, in units of the map's maximum, 0 to 1; 0 for none.
    timesteps, resolutions: denoising steps and attention grids to use, None for the model's own. tokens: None asks for classes
    by name, "library" by the tokens of the model, else a folder of them; a class without a token is asked by name.
    formats: of FORMATS, "voc" always there. heatmaps: keep them as float16 [classes, h, w] at latent size.
    batch_size: images made together. threads: of the CPU, where that makes the images: sums over two threads round
    otherwise than over one, so several processes must not each choose for themselves; None leaves them.
    clip: hub id or folder of a CLIP model for its filter, None for no such filter.
    """

    steps: int
    guidance: float
    width: int
    height: int
    tau: float | None = None
    alpha: float | None = None
    crf: bool = True
    uncertain: float = 0.0
    timesteps: tuple[int, ...] | None = None
    resolutions: tuple[int, ...] | None = None
    tokens: str | None = None
    formats: tuple[str, ...] = ("voc",)
    heatmaps: bool = False
    batch_size: int = 1
    threads: int | None = None
    clip: str | None = None
    filters: Filters = field(default_factory=Filters)

    @classmethod
    def for_model(cls, pipe: Any, **given: Any) -> ExportSettings:
        """Settings with the model's defaults for what is not given or None. Batches of 4 on a GPU, of 1 elsewhere."""
        given = {name: value for name, value in given.items() if value is not None}
        own = GenerateSettings.for_model(pipe, "any")
        kind = pipe._execution_device.type
        defaults = {
            "steps": own.steps,
            "guidance": own.guidance,
            "width": own.width,
            "height": own.height,
            "batch_size": 4 if kind == "cuda" else 1,
            "threads": cores() if kind == "cpu" else None,
        }
        return cls(**{**defaults, **given})

    def image(self, item: Item | None = None) -> GenerateSettings:
        """The settings of one image; of any, if none is given."""
        item = item or Item(0, "any", "", 0, ())
        sizes = {"steps": self.steps, "guidance": self.guidance, "width": self.width, "height": self.height}
        return GenerateSettings(item.prompt, item.negative_prompt, item.seed, **sizes)

    def validate(self, pipe: Any) -> None:
        """Raises InputError, one sentence, for what this model cannot make."""
        self.image().validate(pipe)
        for name, value in (("tau", self.tau), ("alpha", self.alpha), ("uncertain", self.uncertain)):
            real = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is not None and not (real and math.isfinite(value) and 0 <= value <= 1):
                raise InputError(f"The setting {name} is {value}; choose a number from 0 to 1.")
        for name, value, highest in (
            ("batch size", self.batch_size, MAX_BATCH),
            ("number of threads", self.threads or 1, 1024),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= highest:
                raise InputError(f"The {name} is {value}; choose a whole number from 1 to {highest}.")
        check_formats(self.formats)
        self.filters.validate()

    def check(self, pipe: Any) -> Callable[[str, str], None]:
        """What `work_list` takes as `check`: refuses prompts that this model cannot take."""

        def check(prompt: str, negative: str) -> None:
            replace(self.image(), prompt=prompt, negative_prompt=negative).validate(pipe)

        return check


@dataclass(frozen=True)
class Progress:
    """An image was written. done, total: of this process's share, those of earlier runs included. row: its metadata
    before the filters; row["file_name"] and row["mask_file_name"] are paths within the folder.
    """

    done: int
    total: int
    row: dict[str, Any]


@dataclass
class Timings:
    """Seconds of this process. generation: the pipeline; maps: heatmaps, masks, CLIP; waiting: for workers that are
    behind, the last ones included; assembling: the end; total: all of it.
    """

    generation: float = 0.0
    maps: float = 0.0
    waiting: float = 0.0
    assembling: float = 0.0
    total: float = 0.0

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, name, getattr(self, name) + time.perf_counter() - begun)


# ------------------------------------------------------------------------------------------------ plan


@dataclass(frozen=True, eq=False)
class Question:
    """How a class is asked for. by: "word" or "token". mark: of the text, or of the token's own numbers: an embedding
    that is computed differs in its last bits with the number of threads.
    """

    attribution: Attribution
    tau: float
    alpha: float
    branch: str = "conditional"
    by: str = "word"
    mark: str = ""


@dataclass(frozen=True)
class Plan:
    """What an export would make. done: images that are there already. classes: images a class, in the list's order.
    by: "word" or "token" a class. largest_bytes: of the data set, an upper bound. skipped: prompts that no image is made of.
    """

    images: int
    done: int
    classes: dict[str, int]
    by: dict[str, str]
    skipped: tuple[Skipped, ...]
    largest_bytes: int
    settings: ExportSettings

    def text(self) -> str:
        """A few lines for people."""
        tokens_used = sum(by == "token" for by in self.by.values())
        size = f"{self.settings.width}x{self.settings.height}"
        lines = [
            f"{self.images:,} images of {size}, {self.settings.steps} steps each; {self.done:,} are there already.",
            "Images a class: " + ", ".join(f"{name} {count:,}" for name, count in self.classes.items()) + ".",
        ]
        if self.settings.tokens is not None:
            words = [name for name, by in self.by.items() if by == "word"]
            named = f" By name, for want of a token: {', '.join(words)}." if words else ""
            lines.append(f"{tokens_used} of {len(self.by)} classes are asked for by token.{named}")
        if self.settings.clip is None:
            lines.append("No CLIP model is given: images are filtered by coverage alone.")
        if self.skipped:
            lines.append(
                f"{len(self.skipped):,} prompts are skipped; the first is {self.skipped[0].source}: {self.skipped[0].reason}"
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class Estimate:
    """Measured on one batch: seconds and bytes an image, and for all images that are still to be made."""

    image_seconds: float
    image_bytes: float
    seconds: float
    bytes: float

    def text(self) -> str:
        return (
            f"Measured on one batch: {self.image_seconds:.1f} s and {self.image_bytes / 1000:,.0f} kB an image; "
            f"about {duration(self.seconds)} on one such device and {self.bytes / 1e6:,.1f} MB in all."
        )


def duration(seconds: float) -> str:
    """ "45 s", "12 min", "3.5 h"."""
    return (
        f"{seconds:.0f} s"
        if seconds < 90
        else f"{seconds / 60:.0f} min"
        if seconds < 5400
        else f"{seconds / 3600:.1f} h"
    )


def plan(pipe: Any, work: Work, settings: ExportSettings, out: str | Path) -> Plan:
    """What `export` would do; writes nothing. Raises InputError for whatever `export` would refuse."""
    settings.validate(pipe)
    asked = questions(pipe, work, settings)
    dataset.check_folder(Path(out), fingerprint(pipe, work, settings, asked))
    counts = Counter(name for item in work.items for name in item.classes)
    classes = {name: counts[name] for name in work.classes if counts[name]}
    pixels = settings.width * settings.height
    per_image = 4 * pixels + 2000  # JPEG and PNG stay below their pixels
    if settings.heatmaps:
        per_image += 2 * pixels // 16 * max(len(item.classes) for item in work.items)
    if "parquet" in settings.formats:
        per_image *= 2
    done = sum(dataset.read_done(Path(out), item) is not None for item in work.items)
    by = {name: asked[name].by for name in classes}
    return Plan(len(work.items), done, classes, by, work.skipped, per_image * len(work.items), settings)


def measure(pipe: Any, work: Work, settings: ExportSettings, done: int = 0, clip: ClipScorer | None = None) -> Estimate:
    """Makes the first batch, in memory, to say how long the rest takes. done: images that need not be made."""
    asked = questions(pipe, work, settings)
    begun = time.perf_counter()
    with repeatable(settings.threads):
        jobs = make_jobs(pipe, work.items[: settings.batch_size], "", asked, work, settings, clip)
    seconds = (time.perf_counter() - begun) / len(jobs)
    sizes = [sum(map(len, encode(job)[0].values())) for job in jobs]
    size = sum(sizes) / len(sizes) * (2 if "parquet" in settings.formats else 1)
    return Estimate(seconds, size, seconds * (len(work.items) - done), size * len(work.items))


def questions(pipe: Any, work: Work, settings: Any, template: str = "{}") -> dict[str, Question]:
    """How each class of the work is asked for. settings: ExportSettings, or others with `tokens`, `tau` and `alpha`.

    template: the attribution prompt of a class that is asked for by name. Raises InputError for a class that neither
    token nor word fits.
    """
    own = defaults_for(pipe)
    used = {name for item in work.items for name in item.classes}
    found = _tokens(pipe, work.classes, settings) if settings.tokens is not None else {}
    asked = {}
    for name in [name for name in work.classes if name in used]:
        if name in found:
            asked[name] = found[name]
            continue
        try:
            attribution = attribute_words(pipe, [name], template)[0]
        except InputError as error:
            raise InputError(f"Neither a token nor a word fits the class '{name[:60]}': {error}") from None
        asked[name] = Question(attribution, own.tau, own.alpha, mark=template.replace("{}", name))
    return {
        name: replace(
            one,
            tau=one.tau if settings.tau is None else settings.tau,
            alpha=one.alpha if settings.alpha is None else settings.alpha,
        )
        for name, one in asked.items()
    }


def _tokens(pipe: Any, classes: Sequence[str], settings: Any) -> dict[str, Question]:
    model = getattr(pipe, "ovam_name", "")
    folder = tokens.folder_for(model) if settings.tokens == LIBRARY else Path(settings.tokens)
    loaded = [tokens.load(path) for path in tokens.library(model, folder).values()]
    if not loaded:
        raise InputError(f"There are no tokens in '{folder}'; make some with optimize, or ask for the classes by name.")
    found: dict[str, Question] = {}
    for token in sorted(loaded, key=lambda token: len(token.names)):  # a class's own token before a joint one
        for row, label in enumerate(token.names):
            name = match_class(label, classes)
            if name is None or name in found:
                continue
            joint = tokens.attribution(pipe, token)
            own = Attribution(joint.embedding, (name,), (joint.groups[row],))
            mark = f"{row} {digest(token.embedding.float().numpy().tobytes())}"
            found[name] = Question(own, token.tau, token.alpha, token.branch, "token", mark)
    return found


def fingerprint(pipe: Any, work: Work, settings: ExportSettings, asked: dict[str, Question]) -> dict[str, Any]:
    """What the bytes of a data set depend on, as it is kept in its folder; nothing of it names the machine."""
    own = asdict(settings)
    formats = own.pop("formats")
    items = [[item.index, item.prompt, item.negative_prompt, item.seed, *item.classes] for item in work.items]
    values = {
        "program": FORMAT,
        **own,
        "tokens": None if settings.tokens is None else "yes",
        "format": sorted({"voc", *formats}),
        "classes": list(work.classes),
        "images": len(work.items),
        "prompts": digest(json.dumps(items).encode()),
        **about_model(pipe, asked),
    }
    return json.loads(json.dumps(values))  # as it will be read again: tuples are lists


def about_model(pipe: Any, asked: dict[str, Question]) -> dict[str, str]:
    """What the model and the questions put to it are known by; nothing of it names the machine."""
    classes = [
        [
            name,
            one.by,
            one.tau,
            one.alpha,
            one.branch,
            one.mark,
        ]
        for name, one in asked.items()
    ]
    return {
        "model": getattr(pipe, "ovam_name", type(pipe).__name__),
        "device": pipe._execution_device.type,
        "precision": str(family_of(pipe).denoiser.dtype).removeprefix("torch."),
        "class_questions": digest(json.dumps(classes).encode()),
        "weights": _weights(pipe),
    }


def _weights(pipe: Any) -> str:
    """A digest of a few numbers of every weight: another training, an adapter or a scheduler make another one."""
    # Names that begin with _ say where a scheduler came from, and in an order that changes from run to run.
    config = sorted((name, value) for name, value in pipe.scheduler.config.items() if not name.startswith("_"))
    digest = hashlib.sha256(f"{type(pipe.scheduler).__name__} {config}".encode())
    family = family_of(pipe)
    for part in (*(encoder for _, encoder in family.encoders), family.denoiser, pipe.vae):
        for name, weight in part.named_parameters():
            flat = weight.detach().flatten()
            digest.update(name.encode() + flat[:: max(1, len(flat) // 8)][:8].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


# ------------------------------------------------------------------------------------------------ images and maps


@torch.no_grad()
def make_jobs(
    pipe: Any,
    items: Sequence[Item],
    folder: str | Path,
    asked: dict[str, Question],
    work: Work,
    settings: ExportSettings,
    clip: ClipScorer | None = None,
    should_stop: Callable[[], bool] | None = None,
    timings: Timings | None = None,
) -> list[Job]:
    """One batch: images, recordings, heatmaps and masks, ready for a worker. Raises Stopped where it is asked to."""
    timings = timings or Timings()
    with timings.of("generation"):
        images, recordings = _generate(pipe, items, asked, settings, should_stop)
    with timings.of("maps"):
        scores = clip.scores(images, [item.classes for item in items]) if clip else [None] * len(items)
        return [
            _job(
                folder,
                item,
                image,
                {branch: own[n] for branch, own in recordings.items()},
                score,
                asked,
                work,
                settings,
            )
            for n, (item, image, score) in enumerate(zip(items, images, scores, strict=True))
        ]


def _generate(
    pipe: Any,
    items: Sequence[Item],
    asked: dict[str, Question],
    settings: ExportSettings,
    should_stop: Callable[[], bool] | None,
) -> tuple[list[Image.Image], dict[str, list[Recording]]]:
    """The images of a batch, and for each branch that a class needs their recordings."""

    def after_step(done: int) -> None:
        if should_stop is not None and should_stop():
            raise Stopped(done, settings.steps)

    wanted = [asked[name] for item in items for name in item.classes]
    keep = {
        "steps": settings.timesteps,
        "resolutions": settings.resolutions,
        "self_attention": any(one.alpha < 1 for one in wanted),
    }
    with ExitStack() as stack:
        recorders = {
            branch: stack.enter_context(record(pipe, branch=branch, **keep))
            for branch in sorted({x.branch for x in wanted})
        }
        images = pipe(
            prompt=[item.prompt for item in items],
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            width=settings.width,
            height=settings.height,
            # On the CPU, one an image: the noise depends on neither the device nor the batch.
            generator=[torch.Generator("cpu").manual_seed(item.seed) for item in items],
            **family_of(pipe).arguments([item.negative_prompt for item in items], after_step),
        ).images
    made = {branch: recorder.recordings for branch, recorder in recorders.items()}
    if settings.resolutions is None:
        made = {branch: [own_grids(pipe, one) for one in recordings] for branch, recordings in made.items()}
    if settings.timesteps is None:
        made = {branch: [own_steps(pipe, one) for one in recordings] for branch, recordings in made.items()}
    return images, made


def _job(
    folder: str | Path,
    item: Item,
    image: Image.Image,
    recordings: dict[str, Recording],
    scores: list[float] | None,
    asked: dict[str, Question],
    work: Work,
    settings: ExportSettings,
) -> Job:
    own = [asked[name] for name in item.classes]
    maps, scaled, masks = weigh(recordings, own, (image.height, image.width))
    kept = maps.to(torch.float16).cpu().numpy() if settings.heatmaps else None
    row = {
        "prompt": item.prompt,
        "negative_prompt": item.negative_prompt,
        "seed": item.seed,
        "classes": list(item.classes),
        "class_ids": work.ids(item.classes),
        "clip_scores": scores,
    }
    return Job(
        folder=str(folder),
        item=item,
        ids=tuple(row["class_ids"]),
        image=np.asarray(image.convert("RGB")),
        scaled=scaled.float().cpu().numpy(),
        masks=masks.cpu().numpy(),
        taus=tuple(one.tau for one in own),
        crf=settings.crf,
        uncertain=settings.uncertain,
        heatmaps=kept,
        row=row,
    )


def weigh(
    recordings: dict[str, Recording], own: Sequence[Question], size: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Answers to the questions of one image, from its recordings by branch: (maps, scaled, masks).

    maps: D of each, float32 `[L, h, w]` at latent size. scaled: A_alpha * D over its own maximum, float32 `[L, H, W]` at
    `size`. masks: of Eq. 9 with each question's own tau and alpha, bool `[L, H, W]`.
    """
    found: dict[int, torch.Tensor] = {}
    for branch, recording in recordings.items():
        places = [place for place, one in enumerate(own) if one.branch == branch]
        if places:  # all classes of a branch read the queries once
            found.update(zip(places, attribute(recording, [own[place].attribution for place in places]), strict=True))
    maps = torch.stack([found[place] for place in range(len(own))])
    weighted = torch.cat(
        [
            resize((one_map * self_attention_map(recordings[one.branch], one.alpha).to(maps.device))[None], size)
            for one_map, one in zip(maps, own, strict=True)
        ]
    )
    masks = torch.cat([binary_masks(weighted[n : n + 1], one.tau) for n, one in enumerate(own)])
    scaled = weighted / weighted.amax(dim=(1, 2), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return maps, scaled, masks


# ------------------------------------------------------------------------------------------------ the run


@dataclass
class Summary:
    """What an export made. rows: the metadata of all images that are done, with `kept` and `reason`; None in a process
    that is not the first. stopped: `should_stop` said so. made: images of this run and process.
    """

    rows: list[dict[str, Any]] | None
    total: int
    made: int
    stopped: bool
    timings: Timings
    skipped: tuple[Skipped, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def kept(self) -> int:
        return sum(row["kept"] for row in self.rows or ())

    @property
    def mean_coverage(self) -> float:
        """Of the kept images, 0 to 1; 0 for none."""
        own = [row["coverage"] for row in self.rows or () if row["kept"]]
        return sum(own) / len(own) if own else 0.0

    def by_class(self) -> list[dict[str, Any]]:
        """For each class: class, images, kept, small, large, clip (dropped for that reason), coverage (mean of the kept).

        An image of several classes counts in each of them; one with several reasons counts in each of these.
        """
        groups: dict[str, list[tuple[dict, float]]] = {}
        for row in self.rows or ():
            for name, share in zip(row["classes"], row["coverages"], strict=True):
                groups.setdefault(name, []).append((row, share))
        table = []
        for name, members in groups.items():
            reasons = Counter(kind for row, _ in members for kind in reason_kinds(row["reason"]))
            shares = [share for row, share in members if row["kept"]]
            dropped = {kind: reasons[kind] for kind in ("small", "large", "clip")}
            coverage = sum(shares) / len(shares) if shares else 0.0
            table.append({"class": name, "images": len(members), "kept": len(shares), **dropped, "coverage": coverage})
        return table

    def text(self) -> str:
        """A table for a terminal."""
        heads = ("class", "images", "kept", "small", "large", "low CLIP", "coverage")
        lines = [
            heads,
            *(
                (
                    one["class"],
                    *(str(one[key]) for key in ("images", "kept", "small", "large", "clip")),
                    f"{one['coverage']:.1%}",
                )
                for one in self.by_class()
            ),
        ]
        widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
        table = [
            "  ".join(cell.ljust(w) if n == 0 else cell.rjust(w) for n, (cell, w) in enumerate(zip(line, widths)))
            for line in lines
        ]
        done = len(self.rows or ())
        last = f"{done:,} of {self.total:,} images, {self.kept:,} kept, {done - self.kept:,} dropped; mean coverage {self.mean_coverage:.1%}."
        if self.skipped:
            last += f" {len(self.skipped):,} prompts were skipped, see {SKIPPED}."
        return "\n".join([*table, last, *self.notes])


def export(
    pipe: Any,
    work: Work,
    settings: ExportSettings,
    out: str | Path,
    *,
    process: Process | None = None,
    workers: int | None = None,
    clip: ClipScorer | None = None,
    on_image: Callable[[Progress], None] | None = None,
    on_note: Callable[[str], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Summary:
    """Makes the images of a work list that are not there yet, then the data set of all of them.

    process: this process's share, for several that export into one folder. workers: processes for dense CRF and
    files; 0 does it in this one, None chooses. clip: a scorer that is loaded already, for `settings.clip`. on_image:
    called in this thread for every image written. on_note: sentences for people. should_stop: asked at every
    denoising step; when it says True, the images under way are dropped and the data set of those that are done is put together.
    Raises InputError, one sentence, for settings that cannot be, a folder of another export, a full disk, a worker
    that died, a model that does not fit in memory. The same call goes on where it was.
    """
    process = process or Process()
    folder, timings = Path(out), Timings()
    settings.validate(pipe)
    asked = questions(pipe, work, settings)
    about = fingerprint(pipe, work, settings, asked)
    dataset.check_folder(folder, about)
    if settings.clip is not None and clip is None:
        clip = ClipScorer(settings.clip, pipe._execution_device)

    first = process.rank == 0
    with timings.of("total"), dataset.locked(folder) if first else nullcontext(), repeatable(settings.threads):
        if first:
            prepare(folder, about)
        process.wait()
        run = _Run(pipe, work, settings, folder, asked, clip, timings, on_image, on_note, should_stop)
        stopped = run.make(process, worker_count(process.ranks) if workers is None else workers)
        rows = None
        if not stopped or process.ranks == 1:
            process.wait()
            if first:
                with timings.of("assembling"):
                    rows = _assemble(folder, about, work, complete=not stopped)
    return Summary(rows, len(work.items), run.made, stopped, timings, work.skipped, tuple(run.notes))


def _assemble(folder: Path, about: dict[str, Any], work: Work, complete: bool) -> list[dict[str, Any]]:
    try:
        rows = assemble(folder, about, work)
    except OSError as error:
        raise InputError(dataset.disk_sentence(error, folder)) from None
    if complete and len(rows) < len(work.items):
        raise InputError(
            f"{len(work.items) - len(rows)} images are missing in '{folder}'; start the same export again."
        )
    return rows


@dataclass
class _Run:
    """The batches of one process."""

    pipe: Any
    work: Work
    settings: ExportSettings
    folder: Path
    asked: dict[str, Question]
    clip: ClipScorer | None
    timings: Timings
    on_image: Callable[[Progress], None] | None
    on_note: Callable[[str], None] | None
    should_stop: Callable[[], bool] | None
    made: int = 0
    done: int = 0
    total: int = 0
    halved: bool = False
    notes: list[str] = field(default_factory=list)

    def make(self, process: Process, workers: int) -> bool:
        """Makes what is missing of this process's share; returns whether it was stopped."""
        size = self.settings.batch_size
        batches = list(batches_of(self.work.items, size))
        share = batches[process.rank :: process.ranks]
        there = {item.index for batch in share for item in batch if dataset.read_done(self.folder, item) is not None}
        self.done, self.total = len(there), sum(map(len, share))
        share = [batch for batch in share if any(item.index not in there for item in batch)]
        if not share:
            return False
        try:
            with process_pool(workers) as pool:
                return self._batches(share, there, pool, QUEUE * max(workers, 1))
        except BrokenProcessPool:
            raise InputError(
                "A process that writes the files died, perhaps for want of memory; start the same export again, it goes "
                "on where it was."
            ) from None
        except OSError as error:
            raise InputError(dataset.disk_sentence(error, self.folder)) from None

    def _batches(self, share: Sequence[Sequence[Item]], there: set[int], pool: Executor, queue: int) -> bool:
        pending: deque[Future] = deque()
        stopped = False
        try:
            for batch in share:
                if self.should_stop is not None and self.should_stop():
                    raise Stopped(0, self.settings.steps)
                for jobs in self._parts(batch):
                    # A batch is made whole again if one of its images is missing: alone it could differ in rounding.
                    for job in (job for job in jobs if job.item.index not in there):
                        self._collect(pending, queue - 1)
                        pending.append(pool.submit(write_job, job))
        except Stopped:
            stopped = True
        self._collect(pending, 0)
        return stopped

    def _collect(self, pending: deque[Future], keep: int) -> None:
        """Takes what is written, in order, and waits until no more than `keep` are under way."""
        while pending and (len(pending) > keep or pending[0].done()):
            with self.timings.of("waiting"):
                row = pending.popleft().result()
            self.made += 1
            self.done += 1
            if self.on_image is not None:
                self.on_image(Progress(self.done, self.total, row))

    def _parts(self, batch: Sequence[Item]) -> Iterator[list[Job]]:
        """The jobs of a batch; in two halves once a batch did not fit in memory."""
        jobs = None if self.halved else self._try(batch)
        if jobs is not None:
            yield jobs
            return
        half = max(1, self.settings.batch_size // 2)
        if not self.halved and self.settings.batch_size > 1:
            self.halved = True
            note = f"Batches of {self.settings.batch_size} do not fit in memory: going on with batches of {half}."
            self.notes.append(note)
            if self.on_note is not None:
                self.on_note(note)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        for start in range(0, len(batch), half):
            jobs = self._try(batch[start : start + half])
            if jobs is None:
                raise InputError(
                    f"A batch of {half} does not fit in memory; choose a smaller batch size, smaller images or fewer timesteps."
                )
            yield jobs

    def _try(self, items: Sequence[Item]) -> list[Job] | None:
        """The jobs, or None if they do not fit in memory. Returning frees what the traceback kept alive."""
        try:
            return make_jobs(
                self.pipe,
                items,
                self.folder,
                self.asked,
                self.work,
                self.settings,
                self.clip,
                self.should_stop,
                self.timings,
            )
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return None


def batches_of(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """The items in their order, `size` at a time; those without a negative prompt apart from those with one.

    SDXL embeds no negative prompt otherwise than an empty one beside others, and an image must not depend on its batch.
    """
    for _, run in groupby(items, key=lambda item: bool(item.negative_prompt)):
        alike = list(run)
        yield from (alike[start : start + size] for start in range(0, len(alike), size))
