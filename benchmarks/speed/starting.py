"""Row 5 besides: from the start of the server to its first page, over the imports that the page itself waits for; and
the answer of `ovam --help` over the import of torch.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time

from benchmarks.speed.common import Bench, Line, Times, race, ratio_line
from benchmarks.speed.page import ROOT, server

IMPORTS = "import torch, transformers, diffusers, gradio"


def starting_page(bench: Bench) -> list[Line]:
    times: Times = {"first page": [], "imports": []}
    _run(["-c", IMPORTS])  # the files come from the disk once
    for _ in range(bench.sizes.few_rounds):
        times["imports"].append(_run(["-c", IMPORTS]))
        with server(bench) as (_, start):
            times["first page"].append(start.first)
    note = ", ".join(f"{side} {statistics.median(values):.3g} s" for side, values in times.items())
    return [ratio_line(bench, 5, IMPORTS, times, "first page", "imports", "0.2", note)]


def starting_commands(bench: Bench) -> list[Line]:
    sides = {
        "ovam --help": lambda: _run(["-m", "ovam_core", "--help"]),
        "ovam tokens list": lambda: _run(["-m", "ovam_core", "tokens", "list"]),
        "import torch": lambda: _run(["-c", "import torch"]),
    }
    for call in sides.values():
        call()
    times = race(bench, sides, bench.sizes.few_rounds, least=0)
    return [ratio_line(bench, 5, side, times, side, "import torch", "", "no torch in it") for side in list(sides)[:2]]


def _run(arguments: list[str]) -> float:
    """Seconds of a process of Python. Raises CalledProcessError where it fails."""
    begun = time.perf_counter()
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    environment = os.environ | {"GRADIO_ANALYTICS_ENABLED": "False"}
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, env=environment, **quiet)
    return time.perf_counter() - begun
