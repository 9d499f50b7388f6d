"""Row 7: what many prompts cost before the first image: a dry run over reading their file, and memory and time of a
hundred times the prompts.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path

import psutil
import torch

from benchmarks.speed.common import Bench, Line, megabytes, peak_bytes, race, ratio_line
from ovam_core.data.export import ExportSettings, Plan, batches_of, fingerprint, plan
from ovam_core.data.prompts import PromptFile, Work, work_list
from ovam_core.data.voc import VOC_CLASSES
from ovam_core.models.presets import EMBEDDED
from ovam_core.ovam import OVAM

CAPTIONS, FEW, MANY = 60_000, 1_000, 100_000


def many_prompts(bench: Bench) -> list[Line]:
    return [*_dry_run(bench), *_growth(bench)]


def _dry_run(bench: Bench) -> list[Line]:
    ovam = OVAM.from_pretrained(EMBEDDED, str(bench.device))
    settings = ExportSettings.for_model(ovam)
    with _captions(CAPTIONS // _part(bench)) as file:

        def reading() -> int:
            return len(PromptFile(file))

        def dry_run() -> Plan:
            return plan(ovam, work_list(PromptFile(file), check=settings.check(ovam)), settings, None)

        assert reading() == dry_run().images
        times = race(bench, {"dry run": dry_run, "reading the file": reading}, bench.sizes.few_rounds, least=0)
        seconds = sorted(times["dry run"])[len(times["dry run"]) // 2]
        note = f"{seconds:.3g} s: every caption is read by {EMBEDDED}'s tokenizer; target 10 s"
        what = f"{reading():,} captions"
        return [ratio_line(bench, 7, what, times, "dry run", "reading the file", "", note)]


def _growth(bench: Bench) -> list[Line]:
    """Peak of resident memory, and time, of an export up to its first batch."""
    ovam = OVAM.from_pretrained(EMBEDDED, "cpu")
    settings = ExportSettings.for_model(ovam)
    on_cpu = replace(bench, device=torch.device("cpu"))

    def begin(file: Path) -> Work:
        work = work_list(PromptFile(file))
        fingerprint(ovam, work, settings, settings.queries(ovam, work))
        next(batches_of(work.items, 4))
        return work

    few, many = FEW // _part(bench), MANY // _part(bench)
    with _captions(few) as small, _captions(many) as large:
        begin(small)
        added = {few: peak_bytes(on_cpu, lambda: begin(small)), many: peak_bytes(on_cpu, lambda: begin(large))}
        times = race(bench, {f"{many:,}": lambda: begin(large), f"{few:,}": lambda: begin(small)}, 1, least=0)
    what = f"start of an export of {many:,} prompts over {few:,}"
    whole = resident_bytes()
    memory = Line(7, what, "memory of the process at its peak", [(whole + added[many]) / (whole + added[few])], "1.05")
    note = ", ".join(f"{megabytes(size)} more with {count:,}" for count, size in added.items())
    growth = ratio_line(bench, 7, what, times, f"{many:,}", f"{few:,}", "", f"{many / few:.3g} times the prompts")
    return [replace(memory, note=note), growth]


def resident_bytes() -> int:
    return psutil.Process().memory_info().rss


def _part(bench: Bench) -> int:
    """By what the numbers are divided in a smoke run."""
    return 1 if bench.sizes.embedded_steps > 1 else 100


@contextmanager
def _captions(count: int) -> Iterator[Path]:
    """A file of so many captions, each naming a class or two."""
    about = list(product(("small", "large", "red", "old"), VOC_CLASSES, ("in a park", "on the street", "by a house")))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "captions.txt"
        with file.open("w") as lines:
            for number in range(count):
                kind, name, where = about[number % len(about)]
                lines.write(f"A {kind} {name} {where}, {number}\n")
        yield file
