"""Row 5: from the start of the server to its first page, and to the one that can be used; from changed words to new
pictures.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.speed.common import Bench, Line, Times, race, ratio_line
from benchmarks.speed.recording import PROMPT
from ovam_core.models.presets import EMBEDDED

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 300  # seconds for the first page
# As it was before there was a first page: nothing answers until all is imported, opened and laid out.
PLAIN = """
import app, tabs.frame
app.opens_with_picture = lambda _: False
app.serve(*app.open_model())
"""


def page_start(bench: Bench) -> list[Line]:
    times: Times = {"first page": [], "usable page": [], "plain start": []}
    with server(bench, ["-c", PLAIN]):
        pass  # the files come from the disk once
    for _ in range(bench.sizes.few_rounds):
        with server(bench, ["-c", PLAIN]) as (_, start):
            times["plain start"].append(start.usable)
        with server(bench) as (_, start):
            times["first page"].append(start.first)
            times["usable page"].append(start.usable)
    seconds = ", ".join(f"{side} {statistics.median(values):.3g} s" for side, values in times.items())
    what, both = (
        f"app.py on {EMBEDDED}",
        (("first page", "0.5", seconds), ("usable page", "", "with its first picture")),
    )
    return [ratio_line(bench, 5, what, times, side, "plain start", target, note) for side, target, note in both]


def page_words(bench: Bench) -> list[Line]:
    from gradio_client import Client

    with server(bench) as (address, _):
        client = Client(address, verbose=False, download_files=False, analytics_enabled=False)
        seeds = itertools.count()
        pairs = itertools.product(("cat", "dog", "bird", "boat"), ("car", "grass", "sky", "road"))
        words = map(", ".join, itertools.cycle(pairs))

        def picture() -> Any:
            return client.predict(PROMPT, seed=next(seeds), steps=bench.sizes.embedded_steps, api_name="/generate")

        def changed_words() -> Any:
            return client.predict(next(words), api_name="/attribute")

        picture()
        changed_words()
        times = race(bench, {"picture": picture, "changed words": changed_words}, bench.sizes.rounds, least=0)
    note = f"two words, over HTTP, with overlays and masks; {bench.sizes.embedded_steps} steps a picture"
    return [ratio_line(bench, 5, f"app.py on {EMBEDDED}", times, "changed words", "picture", "", note)]


@dataclass(frozen=True)
class Start:
    """Seconds from the start of a server until something answers, and until that is the page itself."""

    first: float
    usable: float


@contextmanager
def server(bench: Bench, program: Sequence[str] = ("app.py",)) -> Iterator[tuple[str, Start]]:
    """`python app.py`, or another program that serves the page, on the embedded model: its address, and its start.

    Raises RuntimeError where it ends, or shows nothing in PATIENCE seconds.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}/"
    begun, first = time.perf_counter(), None
    with subprocess.Popen(
        [sys.executable, *program],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=_environment(bench) | {"GRADIO_SERVER_PORT": str(port), "GRADIO_SERVER_NAME": "127.0.0.1"},
    ) as process:
        try:
            while (ready := _answer(address)) is not True:
                if ready is False and first is None:
                    first = time.perf_counter() - begun
                if process.poll() is not None or time.perf_counter() - begun > PATIENCE:
                    raise RuntimeError("app.py showed no page.")
                time.sleep(0.02)
            usable = time.perf_counter() - begun
            yield address, Start(usable if first is None else first, usable)
        finally:
            process.terminate()


def _answer(address: str) -> bool | None:
    """Whether the page is ready; None where nothing answers."""
    try:
        with urllib.request.urlopen(address, timeout=60) as answer:
            answer.read()
        with urllib.request.urlopen(f"{address}health?page", timeout=60) as answer:
            return json.load(answer)["ready"]
    except urllib.error.HTTPError:
        return False
    except OSError:
        return None


def _environment(bench: Bench) -> dict[str, str]:
    return os.environ | {
        "OVAM_MODEL": EMBEDDED,
        "OVAM_DEVICE": str(bench.device),
        "HF_HUB_OFFLINE": "1",
        "GRADIO_ANALYTICS_ENABLED": "False",
    }
