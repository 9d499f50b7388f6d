"""Prompts to a segmentation data set on disk: resumable, over one device or many.

    work = work_list(template_prompts("A photograph of a {}", VOC_CLASSES), VOC_CLASSES, images_per_prompt=5)
    summary = export_dataset(ovam, work, ExportSettings.for_model(ovam), "out")

The work list (prompts.py) is cut into batches by global index, always the same ones; process r of N makes the batches
r, r + N, ... An image depends on its prompt, its seed and its batch, and on nothing else: so a killed export that
goes on, and one by any number of processes, ends with the bytes of an undisturbed one. Dense CRF, encoding and writing
happen in worker processes beside the generation. What lies on disk, and how, is dataset.py.
"""

from __future__ import annotations

import gc
import hashlib
import json
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ovam_core.attention.heatmap import AttributionPrompt
from ovam_core.attention.mask import NO_CRF, crf_available
from ovam_core.attention.modules import lora_settings
from ovam_core.attention.reading import Reading
from ovam_core.attention.recording import Branch, Recording
from ovam_core.data import runs
from ovam_core.data.dataset import Job, assemble, encode, prepare, write_job
from ovam_core.data.filters import ClipScorer, each_reasons
from ovam_core.data.formats import SHEET_COLUMNS, SHEET_ROWS, SHEET_TILE, check_formats
from ovam_core.data.layout import EXPORT_FORMAT, SKIPPED
from ovam_core.data.prompts import Item, Skipped, Work, match_class
from ovam_core.data.runs import QUEUE, Process, cores, digest, process_pool, repeatable, worker_count
from ovam_core.errors import InputError, Stopped, is_out_of_memory
from ovam_core.hooks.recorder import record
from ovam_core.methods import (
    METHODS,
    NOTHING_GIVEN,
    Cut,
    Method,
    cut_maps,
    looked_at,
    method_named,
    over_peak,
    weighted_maps,
)
from ovam_core.models.presets import ModelDefaults
from ovam_core.models.reading import read_as
from ovam_core.ovam import OVAM
from ovam_core.picture import Picture
from ovam_core.query import Query, token_query, word_queries
from ovam_core.settings import (
    DEFAULT_METHOD,
    LATER,
    LIBRARY,
    Alpha,
    BatchSize,
    Filters,
    GenerateSettings,
    MinPresence,
    SegmentSettings,
    Settings,
    Tau,
    Threads,
    Uncertain,
    check_negative_prompt,
    check_prompt,
)
from ovam_core.tokens import folder_for, library


@dataclass(frozen=True)
class ExportSettings(Settings):
    """Everything besides the work list that the bytes of a data set depend on. `for_model` fills in the model's own.

    steps, guidance, width, height: as in GenerateSettings. tau, alpha: threshold of Eq. 9 and floor of Eq. 8 for all
    classes, 0 to 1; None: the model's for words, a token's own for tokens. crf: dense CRF. uncertain: pixels whose
    strongest class lies this close to its threshold get 255, in units of the map's maximum, 0 to 1; 0 for none.
    step_indices, resolutions: denoising steps and attention grids to use, None for the model's own. tokens: None asks
    for classes by name, "library" by the tokens of the model, else a folder of them; a class without a token is asked
    by name. formats: of FORMATS, "voc" always there. heatmaps: keep them as float16 [classes, h, w] at latent size.
    batch_size: images made together. threads: of the CPU, where that makes the images: sums over two threads round
    otherwise than over one, so several processes must not each choose for themselves; None leaves them. clip: hub id or
    folder of a CLIP model for its filter, None for no such filter. method: a name of METHODS, one of `export_methods`.
    min_presence: a class whose presence in an image (docs/methods.md) is lower is left out of its labels, and
    metadata.jsonl says the presence of each; 0 says it and leaves none out, None does neither.
    """

    steps: int
    guidance: float
    width: int
    height: int
    tau: Tau = None
    alpha: Alpha = None
    crf: bool = True
    uncertain: Uncertain = 0.0
    step_indices: tuple[int, ...] | None = field(default=None, metadata={"key": "timesteps"})
    resolutions: tuple[int, ...] | None = None
    tokens: str | None = None
    formats: tuple[str, ...] = ("voc",)
    heatmaps: bool = False
    batch_size: BatchSize = 1
    threads: Threads = None
    clip: str | None = None
    filters: Filters = field(default_factory=Filters)
    method: str = field(default=DEFAULT_METHOD, metadata=LATER)
    min_presence: MinPresence = field(default=None, metadata=LATER)

    @classmethod
    def for_model(cls, ovam: OVAM, **given: Any) -> ExportSettings:
        """Settings with the model's defaults for what is not given or None. Batches of 4 on a GPU, of 1 elsewhere."""
        given = {name: value for name, value in given.items() if value is not None}
        if "method" in given:
            given["method"] = method_named(given["method"]).name
        kind = ovam.device.type
        usual = {name: getattr(ovam.preset, name) for name in ("steps", "guidance", "width", "height")}
        usual |= {"batch_size": 4 if kind == "cuda" else 1, "threads": cores() if kind == "cpu" else None}
        usual["crf"] = crf_available()
        return cls(**(usual | given))

    def image(self, item: Item | None = None) -> GenerateSettings:
        """The settings of one image; of any, if none is given."""
        item = item or Item(0, "any", "", 0, ())
        return GenerateSettings(
            item.prompt, item.negative_prompt, item.seed, self.steps, self.guidance, self.width, self.height
        )

    def validate(self, ovam: OVAM) -> None:
        """Raises InputError, one sentence, for what this model cannot make."""
        self.image().validate(ovam.pipe)
        self.check_fields()
        if self.crf and not crf_available():
            raise InputError(NO_CRF)
        check_formats(self.formats)
        self.filters.validate()
        self._check_method(ovam)

    def _check_method(self, ovam: OVAM) -> None:
        method = method_named(self.method)
        if method not in export_methods():
            names = ", ".join(one.name for one in export_methods())
            raise InputError(f"{method.name} is not there for data sets; choose among {names}.")
        asked = SegmentSettings(
            words=("any",), method=self.method, step_indices=self.step_indices, resolutions=self.resolutions
        )
        method.check(asked)
        ovam.check_answerable(asked, self.image())

    def queries(self, ovam: OVAM, work: Work) -> dict[str, Query]:
        """How each class is asked for; see `class_queries`. tau and alpha, where given, hold for words and tokens."""
        given = Cut(self.tau, self.alpha, self.tau, self.alpha)
        return class_queries(ovam, work, self.tokens, given, method_named(self.method), preset=ovam.preset)

    def check(self, ovam: OVAM) -> Callable[[str, str], None]:
        """What `work_list` takes as `check`: refuses prompts that this model cannot take.

        What else `validate` refuses does not hang on them, nor is a negative prompt that many share read for each.
        """
        check_negative = lru_cache(maxsize=16)(partial(check_negative_prompt, ovam.pipe))

        def check(prompt: str, negative: str) -> None:
            check_prompt(ovam.pipe, prompt)
            check_negative(negative)

        return check


def export_methods() -> list[Method]:
    """Those that cut each map for itself, of what a batch's recordings hold."""
    return [one for one in METHODS.values() if one.cuts_each and one.asks == "words" and not one.needs_goca]


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


@dataclass(frozen=True)
class Plan:
    """What an export would make. done: images that are there already. classes: images a class, in the list's order. by:
    "word" or "token" a class. largest_bytes: of the data set, an upper bound. skipped: prompts that no image is made
    of.
    """

    images: int
    done: int
    classes: dict[str, int]
    by: Mapping[str, str]
    skipped: Sequence[Skipped]
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
            first = self.skipped[0]
            lines.append(f"{len(self.skipped):,} prompts are skipped; the first is {first.source}: {first.reason}")
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


def plan(ovam: OVAM, work: Work, settings: ExportSettings, out: str | Path | None) -> Plan:
    """What `export` would do; writes nothing. out: None where no folder is chosen yet. Raises InputError for whatever
    `export` would refuse.
    """
    settings.validate(ovam)
    queries = settings.queries(ovam, work)
    if out is not None:
        runs.check_folder(Path(out), fingerprint(ovam, work, settings, queries))
    counts = Counter(name for item in work.items for name in item.classes)
    classes = {name: counts[name] for name in work.classes if counts[name]}
    pixels = settings.width * settings.height
    per_image = 4 * pixels + 2000  # JPEG and PNG stay below their pixels
    if settings.heatmaps:
        per_image += 2 * pixels // 16 * max(len(item.classes) for item in work.items)
    if "parquet" in settings.formats:
        per_image *= 2
    done = 0 if out is None else sum(runs.read_done(Path(out), item) is not None for item in work.items)
    by = {name: queries[name].kind for name in classes}
    sheet = min(len(work.items), SHEET_COLUMNS * SHEET_ROWS) * 4 * SHEET_TILE**2
    largest = per_image * len(work.items) + sheet + 20_000  # lists, card and settings
    return Plan(len(work.items), done, classes, by, work.skipped, largest, settings)


def measure(
    ovam: OVAM, work: Work, settings: ExportSettings, done: int = 0, clip: ClipScorer | None = None
) -> Estimate:
    """Makes the first batch, in memory, to say how long the rest takes. done: images that need not be made."""
    queries = settings.queries(ovam, work)
    begun = time.perf_counter()
    with repeatable(settings.threads):
        jobs = make_jobs(ovam, work.items[: settings.batch_size], "", queries, work, settings, clip)
    seconds = (time.perf_counter() - begun) / len(jobs)
    sizes = [sum(map(len, encode(job)[0].values())) for job in jobs]
    size = sum(sizes) / len(sizes) * (2 if "parquet" in settings.formats else 1)
    return Estimate(seconds, size, seconds * (len(work.items) - done), size * len(work.items))


def class_queries(
    ovam: OVAM,
    work: Work,
    tokens: str | None = None,
    given: Cut = NOTHING_GIVEN,
    method: Method = METHODS[DEFAULT_METHOD],
    preset: ModelDefaults | None = None,
    template: str = "{}",
) -> dict[str, Query]:
    """How each class of the work is asked for: by a token where there is one, else by its name.

    tokens: None for names alone, LIBRARY for the tokens of the model, else a folder of them. given, method, preset:
    what decides tau and alpha, see `Cut`. template: the attribution prompt of a class that is asked for by name.
    Raises InputError for a class that neither token nor word fits.
    """
    used = {name for item in work.items for name in item.classes}
    by_token = {} if tokens is None else _token_queries(ovam, work.classes, tokens)
    queries = {}
    for name in [name for name in work.classes if name in used]:
        query = by_token.get(name)
        if query is None:
            try:
                with read_as(Reading()):  # as OVAM draws, whatever the pipeline's last call was
                    query = word_queries(ovam.pipe, [name], template=template)[0]
            except InputError as error:
                raise InputError(f"Neither a token nor a word fits the class '{name[:60]}': {error}") from None
        queries[name] = method.cut(query, given, preset)
    return queries


def _token_queries(ovam: OVAM, classes: Sequence[str], tokens: str) -> dict[str, Query]:
    folder = folder_for(ovam.name) if tokens == LIBRARY else Path(tokens)
    loaded = list(library(ovam.name, folder).values())
    if not loaded:
        raise InputError(f"There are no tokens in '{folder}'; make some with optimize, or ask for the classes by name.")
    queries: dict[str, Query] = {}
    for token in sorted(loaded, key=lambda token: len(token.names)):  # a class's own token before a joint one
        for row, label in enumerate(token.names):
            name = match_class(label, classes)
            if name is None or name in queries:
                continue
            joint = token_query(ovam.pipe, token)
            prompt = joint.attribution
            alone = AttributionPrompt(prompt.embedding, (name,), (prompt.groups[row],))
            mark = f"{row} {digest(token.embedding.float().numpy().tobytes())}"
            queries[name] = replace(joint, labels=(name,), prompt=alone, mark=mark)
    return queries


def fingerprint(ovam: OVAM, work: Work, settings: ExportSettings, queries: dict[str, Query]) -> dict[str, Any]:
    """What the bytes of a data set depend on, as it is kept in its folder; nothing of it names the machine."""
    own = settings.to_json() | {"filters": asdict(settings.filters)}
    formats = own.pop("formats")
    values = {
        "program": EXPORT_FORMAT,
        **own,
        "tokens": None if settings.tokens is None else "yes",
        "format": sorted({"voc", *formats}),
        "classes": list(work.classes),
        "images": len(work.items),
        "prompts": _digest_of_items(work),
        **about_model(ovam, queries),
    }
    return json.loads(json.dumps(values))  # as it will be read again: tuples are lists


def _digest_of_items(work: Work) -> str:
    """`digest` of the items as one list of JSON, which need not be in memory."""
    found = hashlib.sha256(b"[")
    for number, item in enumerate(work.items):
        row = [item.index, item.prompt, item.negative_prompt, item.seed, *item.classes]
        found.update((", " if number else "").encode() + json.dumps(row).encode())
    found.update(b"]")
    return found.hexdigest()[:16]


def about_model(ovam: OVAM, queries: dict[str, Query]) -> dict[str, str]:
    """What the model and the questions put to it are known by; nothing of it names the machine."""
    classes = [[name, query.kind, query.tau, query.alpha, query.branch, query.mark] for name, query in queries.items()]
    return {
        "model": ovam.name,
        "device": ovam.device.type,
        "precision": ovam.dtype,
        "class_questions": digest(json.dumps(classes).encode()),
        "weights": _weights(ovam),
    }


def _weights(ovam: OVAM) -> str:
    """A digest of a few numbers of every weight: another training, an adapter, what a LoRA is set to or a scheduler
    make another one.
    """
    # Names that begin with _ say where a scheduler came from, and in an order that changes from run to run.
    config = sorted((name, value) for name, value in ovam.pipe.scheduler.config.items() if not name.startswith("_"))
    digest = hashlib.sha256(f"{type(ovam.pipe.scheduler).__name__} {config}".encode())
    for part in (*(encoder for _, encoder in ovam.adapter.encoders), ovam.adapter.denoiser, ovam.pipe.vae):
        for name, weight in part.named_parameters():
            flat = _where_it_lies(part, name, weight).detach().flatten()
            digest.update(name.encode() + flat[:: max(1, len(flat) // 8)][:8].float().cpu().numpy().tobytes())
        settings = lora_settings(part)
        for name, module in part.named_modules():
            if module in settings:
                digest.update(f"{name} {sorted(settings[module].items())}".encode())
    return digest.hexdigest()[:16]


def _where_it_lies(part: nn.Module, name: str, weight: Tensor) -> Tensor:
    """The weight's numbers: those on the device "meta" are kept by accelerate's hook, which brings them when called."""
    if not weight.is_meta:
        return weight
    place, _, own = name.rpartition(".")
    module: Any = part.get_submodule(place)
    return module._hf_hook.weights_map[own]


# ------------------------------------------------------------------------------------------------ images and maps


@torch.no_grad()
def make_jobs(
    ovam: OVAM,
    items: Sequence[Item],
    folder: str | Path,
    queries: dict[str, Query],
    work: Work,
    settings: ExportSettings,
    clip: ClipScorer | None = None,
    should_stop: Callable[[], bool] | None = None,
    timings: Timings | None = None,
) -> list[Job]:
    """One batch: images, recordings, heatmaps and masks, ready for a worker. Raises Stopped where it is asked to."""
    timings = timings or Timings()
    with timings.of("generation"):
        images, recordings = _generate(ovam, items, queries, settings, should_stop)
    with timings.of("maps"):
        scores = clip.scores(images, [item.classes for item in items]) if clip else [None] * len(items)
        return [
            _job(
                ovam,
                folder,
                item,
                image,
                {branch: own[n] for branch, own in recordings.items()},
                score,
                queries,
                work,
                settings,
            )
            for n, (item, image, score) in enumerate(zip(items, images, scores, strict=True))
        ]


def _generate(
    ovam: OVAM,
    items: Sequence[Item],
    queries: dict[str, Query],
    settings: ExportSettings,
    should_stop: Callable[[], bool] | None,
) -> tuple[list[Image.Image], dict[Branch, list[Recording]]]:
    """The images of a batch, and for each branch that a class needs their recordings."""

    def after_step(done: int) -> None:
        if should_stop is not None and should_stop():
            raise Stopped(done, settings.steps)

    method = method_named(settings.method)
    wanted = [queries[name] for item in items for name in item.classes]
    keep = partial(
        record,
        ovam.pipe,
        steps=settings.step_indices,
        resolutions=settings.resolutions,
        self_attention=any(query.alpha < 1 for query in wanted),
        keep=method.keeps,
    )
    with ExitStack() as stack:
        recorders = {
            branch: stack.enter_context(keep(branch=branch)) for branch in sorted({query.branch for query in wanted})
        }
        images = ovam.run(
            prompt=[item.prompt for item in items],
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            width=settings.width,
            height=settings.height,
            # On the CPU, one an image: the noise depends on neither the device nor the batch.
            generator=[torch.Generator("cpu").manual_seed(item.seed) for item in items],
            **ovam.adapter.arguments([item.negative_prompt for item in items], after_step),
        ).images
    named = (settings.step_indices, settings.resolutions)
    made = {
        branch: [looked_at(ovam.pipe, method, one, *named) for one in recorder.recordings]
        for branch, recorder in recorders.items()
    }
    return images, made


def _job(
    ovam: OVAM,
    folder: str | Path,
    item: Item,
    image: Image.Image,
    recordings: dict[Branch, Recording],
    scores: list[float] | None,
    queries: dict[str, Query],
    work: Work,
    settings: ExportSettings,
) -> Job:
    own = [queries[name] for name in item.classes]
    first, *others = recordings
    picture = Picture(image, recordings[first], others={branch: recordings[branch] for branch in others})
    method = method_named(settings.method)
    maps = method.heatmaps(ovam.pipe, picture, own)
    weighted = weighted_maps(picture, maps, own, (image.height, image.width))
    kept = maps.to(torch.float16).cpu().numpy() if settings.heatmaps else None
    ids = work.ids(item.classes)
    presences = _presences(ovam, picture, own, item.prompt) if settings.min_presence is not None else None
    shown = [n for n in range(len(own)) if presences is None or not _is_lower(presences[n], settings.min_presence)]
    row = {
        "prompt": item.prompt,
        "negative_prompt": item.negative_prompt,
        "seed": item.seed,
        "classes": list(item.classes),
        "class_ids": ids,
        "clip_scores": scores,
        **({} if presences is None else {"presences": presences}),
    }
    return Job(
        folder=str(folder),
        item=item,
        ids=tuple(ids[n] for n in shown),
        image=np.asarray(image.convert("RGB")),
        scaled=over_peak(weighted).float().cpu().numpy()[shown],
        masks=cut_maps(weighted, own).cpu().numpy()[shown],
        taus=tuple(own[n].tau for n in shown),
        crf=settings.crf and method.crf,
        uncertain=settings.uncertain,
        heatmaps=kept,
        row=row,
    )


def _presences(ovam: OVAM, picture: Picture, queries: Sequence[Query], prompt: str) -> list[float | None]:
    """Of each class, as metadata.jsonl holds it."""
    with read_as(picture.recording.reading):
        scores = ovam.presence.scores(picture.of_branch, queries, prompt)
    return [None if score is None else round(score, 4) for score in scores]


def _is_lower(presence: float | None, least: float | None) -> bool:
    return presence is not None and least is not None and presence < least


@dataclass
class Summary:
    """What an export made. rows: the metadata of all images that are done, with `kept` and `reason`; None in a process
    that is not the first. stopped: `should_stop` said so. made: images of this run and process.
    """

    rows: Sequence[dict[str, Any]] | None
    total: int
    made: int
    stopped: bool
    timings: Timings
    skipped: Sequence[Skipped] = ()
    notes: tuple[str, ...] = ()
    filters: Filters = field(default_factory=Filters)

    @property
    def kept(self) -> int:
        return sum(row["kept"] for row in self.rows or ())

    @property
    def mean_coverage(self) -> float:
        """Of the kept images, 0 to 1; 0 for none."""
        return sum(row["coverage"] for row in self.rows or () if row["kept"]) / max(self.kept, 1)

    def by_class(self) -> list[dict[str, Any]]:
        """For each class: class, images, kept, small, large, clip (dropped for that reason), coverage (mean of the
        kept).

        An image of several classes counts in each of them; one with several reasons counts in each of these.
        """
        rows = self.rows or []
        table: dict[str, dict[str, Any]] = {}
        counted = {"images": 0, "kept": 0, "small": 0, "large": 0, "clip": 0, "coverage": 0.0}
        for row, why in zip(rows, each_reasons(rows, self.filters), strict=True):
            for name, share in zip(row["classes"], row["coverages"], strict=True):
                of_class = table.setdefault(name, {"class": name, **counted})
                for kind in ("images", *{reason.kind for reason in why}, *(() if why else ("kept",))):
                    of_class[kind] += 1
                of_class["coverage"] += 0.0 if why else share
        return [one | {"coverage": one["coverage"] / max(one["kept"], 1)} for one in table.values()]

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
            "  ".join(
                cell.ljust(w) if n == 0 else cell.rjust(w) for n, (cell, w) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        ]
        done = len(self.rows or ())
        counts = f"{done:,} of {self.total:,} images, {self.kept:,} kept, {done - self.kept:,} dropped"
        last = f"{counts}; mean coverage {self.mean_coverage:.1%}."
        if self.skipped:
            last += f" {len(self.skipped):,} prompts were skipped, see {SKIPPED}."
        return "\n".join([*table, last, *self.notes])


def export_dataset(
    ovam: OVAM,
    work: Work,
    settings: ExportSettings,
    out: str | Path,
    *,
    process: Process | None = None,
    workers: int | None = None,
    clip: ClipScorer | None = None,
    on_image: Callable[[Progress], None] | None = None,
    on_batch: Callable[[Sequence[Item]], None] | None = None,
    on_note: Callable[[str], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    turn: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Summary:
    """Makes the images of a work list that are not there yet, then the data set of all of them.

    process: this process's share, for several that export into one folder. workers: processes for dense CRF and
    files; 0 does it in this one, None chooses. clip: a scorer that is loaded already, for `settings.clip`.
    on_image: called in this thread for every image written; on_batch: before each batch is made. on_note: sentences
    for people. should_stop: asked at every denoising step; when it says True, the images under way are dropped and
    the data set of those that are done is put together. turn: entered for each batch, between which the model is
    free for others; it may raise Stopped. Raises InputError, one sentence, for settings that cannot be, a folder of
    another export, a full disk, a worker that died, a model that does not fit in memory. The same call goes on
    where it was.
    """
    process = process or Process()
    folder, timings = Path(out), Timings()
    settings.validate(ovam)
    queries = settings.queries(ovam, work)
    about = fingerprint(ovam, work, settings, queries)
    runs.check_folder(folder, about)
    if settings.clip is not None and clip is None:
        clip = ClipScorer(settings.clip, ovam.device)

    first = process.rank == 0
    with timings.of("total"), runs.locked(folder) if first else nullcontext():
        if first:
            prepare(folder, about)
        process.wait()
        run = _Run(ovam, work, settings, folder, queries, clip, timings, on_image, on_batch, on_note, should_stop, turn)
        stopped = run.make(process, worker_count(process.ranks) if workers is None else workers)
        rows = None
        if not stopped or process.ranks == 1:
            process.wait()
            if first:
                with timings.of("assembling"):
                    rows = _assemble(folder, about, work, complete=not stopped)
    return Summary(rows, len(work.items), run.made, stopped, timings, work.skipped, tuple(run.notes), settings.filters)


def _assemble(folder: Path, about: dict[str, Any], work: Work, complete: bool) -> Sequence[dict[str, Any]]:
    try:
        rows = assemble(folder, about, work)
    except OSError as error:
        raise InputError(runs.disk_sentence(error, folder)) from None
    if complete and len(rows) < len(work.items):
        raise InputError(
            f"{len(work.items) - len(rows)} images are missing in '{folder}'; start the same export again."
        )
    return rows


@dataclass
class _Run:
    """The batches of one process."""

    ovam: OVAM
    work: Work
    settings: ExportSettings
    folder: Path
    queries: dict[str, Query]
    clip: ClipScorer | None
    timings: Timings
    on_image: Callable[[Progress], None] | None
    on_batch: Callable[[Sequence[Item]], None] | None
    on_note: Callable[[str], None] | None
    should_stop: Callable[[], bool] | None
    turn: Callable[[], AbstractContextManager[None]]
    made: int = 0
    done: int = 0
    total: int = 0
    halved: bool = False
    notes: list[str] = field(default_factory=list)

    def make(self, process: Process, workers: int) -> bool:
        """Makes what is missing of this process's share; returns whether it was stopped."""
        there: set[int] = set()
        for batch in self._share(process):
            self.total += len(batch)
            there |= {item.index for item in batch if runs.read_done(self.folder, item) is not None}
        self.done = len(there)
        if self.done == self.total:
            return False
        left = (batch for batch in self._share(process) if any(item.index not in there for item in batch))
        try:
            with process_pool(workers) as pool:
                return self._batches(left, there, pool, QUEUE * max(workers, 1))
        except BrokenProcessPool:
            raise InputError(
                "A process that writes the files died, perhaps for want of memory; start the same export again, it "
                "goes on where it was."
            ) from None
        except OSError as error:
            raise InputError(runs.disk_sentence(error, self.folder)) from None

    def _share(self, process: Process) -> Iterator[Sequence[Item]]:
        """The batches of this process, made when they are asked for."""
        return islice(batches_of(self.work.items, self.settings.batch_size), process.rank, None, process.ranks)

    def _batches(self, share: Iterable[Sequence[Item]], there: set[int], pool: Executor, queue: int) -> bool:
        pending: deque[Future] = deque()
        stopped = False
        try:
            for batch in share:
                if self.should_stop is not None and self.should_stop():
                    raise Stopped(0, self.settings.steps)
                if self.on_batch is not None:
                    self.on_batch(batch)
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
                    f"A batch of {half} does not fit in memory; choose a smaller batch size, smaller images or "
                    "fewer timesteps."
                )
            yield jobs

    def _try(self, items: Sequence[Item]) -> list[Job] | None:
        """The jobs, or None if they do not fit in memory. Returning frees what the traceback kept alive."""
        try:
            with self.turn(), repeatable(self.settings.threads):
                return make_jobs(
                    self.ovam,
                    items,
                    self.folder,
                    self.queries,
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


def batches_of(items: Iterable[Item], size: int) -> Iterator[Sequence[Item]]:
    """The items in their order, `size` at a time; those without a negative prompt apart from those with one.

    SDXL embeds no negative prompt otherwise than an empty one beside others, and an image must not depend on its batch.
    """
    for _, run in groupby(items, key=lambda item: bool(item.negative_prompt)):
        while batch := list(islice(run, size)):
            yield batch
