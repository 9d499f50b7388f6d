"""Row 5: from the start of the server to the first page; from changed words to new pictures."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.speed.common import Bench, Line, Times, race, ratio_line
from benchmarks.speed.recording import PROMPT
from ovam_core.models.presets import EMBEDDED

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 300  # seconds for the first page
BARE = "import gradio; from ovam_core.models.load import load_pipeline; load_pipeline()"


def page_start(bench: Bench) -> list[Line]:
    bare_start(bench)  # the files come from the disk once
    times: Times = {"first page": [], "imports and model": []}
    for _ in range(bench.sizes.few_rounds):
        with server(bench) as (_, seconds):
            times["first page"].append(seconds)
        times["imports and model"].append(bare_start(bench))
    return [ratio_line(bench, 5, f"app.py on {EMBEDDED}", times, "first page", "imports and model")]


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


def bare_start(bench: Bench) -> float:
    """Seconds that Python takes to import what the app stands on and to load the model."""
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", BARE], cwd=ROOT, env=_environment(bench), check=True)
    return time.perf_counter() - begun


@contextmanager
def server(bench: Bench) -> Iterator[tuple[str, float]]:
    """`python app.py` on the embedded model: its address, and seconds from the start to the first page.

    Raises RuntimeError where it ends, or shows nothing in PATIENCE seconds.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}/"
    begun = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "app.py"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=_environment(bench) | {"GRADIO_SERVER_PORT": str(port), "GRADIO_SERVER_NAME": "127.0.0.1"},
    ) as process:
        try:
            while not _answers(address):
                if process.poll() is not None or time.perf_counter() - begun > PATIENCE:
                    raise RuntimeError("app.py showed no page.")
                time.sleep(0.02)
            yield address, time.perf_counter() - begun
        finally:
            process.terminate()


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=60) as answer:
            answer.read()
    except OSError:
        return False
    return True


def _environment(bench: Bench) -> dict[str, str]:
    return os.environ | {
        "OVAM_MODEL": EMBEDDED,
        "OVAM_DEVICE": str(bench.device),
        "HF_HUB_OFFLINE": "1",
        "GRADIO_ANALYTICS_ENABLED": "False",
    }
