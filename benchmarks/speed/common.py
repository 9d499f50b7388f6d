"""What all rows share: where they run, the taking of turns, memory, and the table."""

from __future__ import annotations

import ctypes
import gc
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.sizes import Sizes

PEAK_RESET = Path("/proc/self/clear_refs")  # Linux alone has it

HEADER = """| row | what | ratio | median | lowest to highest | target | seconds, notes |
|---|---|---|---:|---:|---:|---|"""

Times = dict[str, list[float]]  # seconds a call, one value a round, by side


@dataclass(frozen=True)
class Bench:
    """Where and how much. dtype: of models and queries, float16 on CUDA and float32 elsewhere."""

    device: torch.device
    sizes: Sizes

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return torch.float16 if self.on_gpu else torch.float32

    def wait(self) -> None:
        """Until the GPU has done what it was given."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True)
class Line:
    """A line of the table. ratio: what over what; values: one a round; seconds: by side, on a GPU."""

    row: int
    what: str
    ratio: str
    values: list[float]
    target: str = ""
    note: str = ""
    seconds: dict[str, float] = field(default_factory=dict)


Measurement = Callable[[Bench], list[Line]]


class NotOnThisDevice(Exception):
    """This device cannot show the row; the message says why."""


# ------------------------------------------------------------ time


def race(bench: Bench, sides: dict[str, Callable[[], Any]], rounds: int, least: float | None = None) -> Times:
    """Seconds a call of each side, round by round, taking turns. Each must have run once: that sets up.

    Short calls are repeated for about `least` seconds a round, by default the sizes'; 0 for sides that take long, once
    a round.
    """
    calls = dict.fromkeys(sides, 1)
    least = bench.sizes.least if least is None else least
    if least:
        calls = {side: max(1, min(100, math.ceil(least / _seconds(bench, call, 1)))) for side, call in sides.items()}
    times: Times = {side: [] for side in sides}
    for _ in range(rounds):
        for side, call in sides.items():
            times[side].append(_seconds(bench, call, calls[side]))
    return times


def _seconds(bench: Bench, call: Callable[[], Any], calls: int) -> float:
    bench.wait()
    begun = time.perf_counter()
    for _ in range(calls):
        call()
        bench.wait()
    return (time.perf_counter() - begun) / calls


def ratios(times: Times, numerator: str, denominator: str) -> list[float]:
    """One side over another in every round."""
    return [a / b for a, b in zip(times[numerator], times[denominator], strict=True)]


def ratio_line(
    bench: Bench,
    row: int,
    what: str,
    times: Times,
    numerator: str,
    denominator: str,
    target: str = "",
    note: str = "",
) -> Line:
    """The line of one side over another, with the medians of their seconds on a GPU."""
    seconds = {side: statistics.median(times[side]) for side in (numerator, denominator)} if bench.on_gpu else {}
    values = ratios(times, numerator, denominator)
    return Line(row, what, f"time, {numerator} / {denominator}", values, target, note, seconds)


def assert_same(actual: Any, expected: Any, **tolerance: float) -> None:
    """Raises AssertionError where two tensors differ: at all, or by more than `rtol` and `atol`. NaN equals NaN."""
    torch.testing.assert_close(actual, expected, equal_nan=True, **(tolerance or {"rtol": 0, "atol": 0}))


# ------------------------------------------------------------ memory


def peak_bytes(bench: Bench, call: Callable[[], Any]) -> float:
    """The most memory that `call` had at once, above what was in use before; NaN where it is not known.

    On CUDA what tensors hold; on a CPU the process's resident memory, exact to some megabytes.
    """
    gc.collect()
    if bench.on_gpu:
        before = torch.cuda.memory_allocated(bench.device)
        torch.cuda.reset_peak_memory_stats(bench.device)
        call()
        bench.wait()
        return torch.cuda.max_memory_allocated(bench.device) - before
    if not PEAK_RESET.exists():
        call()
        return math.nan
    ctypes.CDLL(None).malloc_trim(0)  # else freed memory that the process still holds is taken again unseen
    PEAK_RESET.write_text("5")  # sets the high-water mark back
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def megabytes(count: float) -> str:
    """Bytes in words."""
    if math.isnan(count):
        return "unknown"
    return f"{count / 1e6:.0f} MB" if abs(count) < 1e9 else f"{count / 1e9:.1f} GB"


# ------------------------------------------------------------ the table


def markdown(line: Line) -> str:
    median = statistics.median(line.values)
    spread = f"{min(line.values):.3g} to {max(line.values):.3g}" if len(line.values) > 1 else "one round"
    seconds = ", ".join(f"{side} {value:.3g} s" for side, value in line.seconds.items())
    notes = "; ".join(filter(None, (seconds, line.note)))
    cells = (line.row, line.what, line.ratio, f"{median:.3g}", spread, line.target, notes)
    return f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |"


def machine(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def run(bench: Bench, rows: Mapping[int, Sequence[Measurement]], report: Callable[[str], None]) -> dict[str, Any]:
    """Measures all rows; what fails is reported and the others go on. Returns what goes into the JSON.

    report: takes the table, piece by piece, as soon as it is known.
    """
    figures: dict[str, Any] = {"machine": machine(bench.device), "lines": [], "not here": [], "failed": []}
    report(f"{figures['machine']}\n\n{HEADER}")
    for row, measurements in rows.items():
        for measure in measurements:
            name = measure.__name__
            begun = time.perf_counter()
            try:
                lines = measure(bench)
            except NotOnThisDevice as reason:
                figures["not here"].append({"row": row, "what": name, "why": str(reason)})
                report(f"| {row} | {name} | not on this device |  |  |  | {reason} |")
            except Exception as error:
                why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                figures["failed"].append({"row": row, "what": name, "why": why})
                report(f"| {row} | {name} | failed |  |  |  | {why.replace('|', '/')} |")
            else:
                figures["lines"] += [asdict(line) | {"median": statistics.median(line.values)} for line in lines]
                report("\n".join(map(markdown, lines)))
            sys.stderr.write(f"{name}: {time.perf_counter() - begun:.0f} s\n")
            gc.collect()
            if bench.on_gpu:
                torch.cuda.empty_cache()
    return figures
