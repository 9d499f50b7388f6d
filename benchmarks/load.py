"""Many visitors at once on a hosted page, an export running beside: errors, waiting, and the memory of the server.

    python -m benchmarks.load [--visitors 20] [--requests 300] [--steps 10] [--model MODEL]

Starts the page in a process of its own, with the limits of a Space. Each visitor asks for a picture, then for words in
it, then for the next picture, as soon as the last answer is there. Waiting is from the call to its answer, over the
median of the same call where nobody else is there: the model makes one picture at a time, so with N visitors it is
about N. Memory is the server's resident memory when the first visitor has had all answers, at the end of the load, and
when the visitors have been gone for the time that their pictures are kept. Prints a Markdown table; the exit status is
1 where a call failed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
from gradio_client import Client

from benchmarks.speed.common import megabytes
from ovam_core.models.presets import EMBEDDED

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 300  # seconds for the first page, for all visitors to come, and for the first image of the export
ALONE = 5  # calls of each kind by the only visitor
GRACE = 3  # seconds that a visitor who left is waited for
SETTLED = 5  # seconds more until the memory has gone back
PROMPT = "A photograph of a cat and a car on grass"
WORDS = ("cat, car", "animal, vehicle", "cat, grass", "car, road")
GENERATE, ATTRIBUTE = "generate", "words"

HEADER = """| kind | calls | errors | alone | waiting p50 | waiting p95 |
|---|---:|---:|---:|---:|---:|"""

SERVE = """
import app
from tabs.scratch import ended_by_signals, own_folder
from tabs.session import Bounds, Sessions
with ended_by_signals(), own_folder():
    ovam, notice = app.open_model()
    page = app.build(ovam, notice, Sessions(ovam.name, Bounds(grace={grace})))
    app.launch(page, server_name="127.0.0.1", server_port={port}, quiet=True)
"""


@dataclass
class Calls:
    """What became of the calls: seconds of those that were answered, by kind, and the sentences of the others."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: {GENERATE: [], ATTRIBUTE: []})
    errors: list[tuple[str, str]] = field(default_factory=list)  # (kind, sentence)

    def note(self, kind: str, call: Callable[[], Any]) -> None:
        begun = time.perf_counter()
        try:
            call()
        except Exception as error:
            self.errors.append((kind, f"{type(error).__name__}: {error}"))
        else:
            self.seconds[kind].append(time.perf_counter() - begun)


# ------------------------------------------------------------------------------------------ the server


@contextmanager
def server(model: str) -> Iterator[tuple[str, psutil.Process]]:
    """The page with the limits of a Space: its address and its process. Raises RuntimeError where it shows nothing."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "SPACE_ID": "benchmarks/load",
        "OVAM_MODEL": model,
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_HEARTBEAT_INTERVAL": "1",  # seconds: how soon `Exporting` is seen to have closed
    }
    command = [sys.executable, "-c", SERVE.format(grace=GRACE, port=port)]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL) as process:
        try:
            address = f"http://127.0.0.1:{port}/"
            _wait(lambda: process.poll() is not None or _answers(address), "The page did not start.")
            if process.poll() is not None:
                raise RuntimeError("The page did not start.")
            yield address, psutil.Process(process.pid)
        finally:
            process.terminate()


def _answers(address: str) -> bool:
    try:
        return httpx.get(f"{address}config", timeout=60).status_code == 200
    except httpx.HTTPError:
        return False


def _wait(holds: Callable[[], bool], otherwise: str) -> None:
    end = time.monotonic() + PATIENCE
    while not holds():
        if time.monotonic() > end:
            raise RuntimeError(otherwise)
        time.sleep(0.05)


# ------------------------------------------------------------------------------------------ visitors


@contextmanager
def visitor(address: str) -> Iterator[Client]:
    client = Client(address, verbose=False, download_files=False, analytics_enabled=False)
    try:
        yield client
    finally:
        client.close()


def visit(client: Client, number: int, requests: int, steps: int, calls: Calls) -> None:
    """A picture, words, the next picture, ..."""
    words = itertools.cycle(WORDS[number % len(WORDS) :] + WORDS[: number % len(WORDS)])
    for turn in range(requests):
        if turn % 2:
            calls.note(ATTRIBUTE, lambda: client.predict(next(words), api_name="/attribute"))
        else:
            seed = 1000 * number + turn
            calls.note(GENERATE, partial(client.predict, PROMPT, seed=seed, steps=steps, api_name="/generate"))


class Exporting:
    """An export by a visitor of their own, as the page asks for it; at the end of the block its tab is closed.

    images: made so far.
    """

    def __init__(self, address: str, steps: int):
        self.address, self.steps, self.images = address, steps, 0
        self.error = ""
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Exporting:
        self._thread.start()
        _wait(lambda: self.images > 0 or bool(self.error), "The export made no image.")
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join(PATIENCE)

    def _run(self) -> None:
        try:
            with httpx.Client(base_url=f"{self.address}gradio_api/", timeout=None) as http:
                session = "exporting"
                config = http.get(f"{self.address}config").json()
                for number, data in export_calls(config, self.steps):
                    call = {"fn_index": number, "data": data, "session_hash": session}
                    http.post("queue/join", json=call).raise_for_status()
                    with http.stream("GET", "queue/data", params={"session_hash": session}) as answer:
                        self._listen(answer.iter_lines())
        except Exception as error:
            self.error = f"{type(error).__name__}: {error}"

    def _listen(self, lines: Iterator[str]) -> None:
        for line in lines:
            if self._closing.is_set():
                return
            message = json.loads(line.removeprefix("data: ")) if line.startswith("data: ") else {}
            if message.get("msg") == "process_completed":
                if not message["success"]:
                    self.error = str(message["output"].get("error"))
                return
            if done := re.search(r"<b>([\d,]+)</b> of", json.dumps(message)):
                self.images = int(done[1].replace(",", ""))


def export_calls(config: dict[str, Any], steps: int) -> Iterator[tuple[int, list[Any]]]:
    """Number and values of the page's own calls that export, the one that asks and the one that makes: as many images
    as a Space allows, else as the fields stand.
    """
    components = {one["id"]: one["props"] for one in config["components"]}
    button = next(number for number, props in components.items() if props.get("elem_id") == "export")
    ask = next(one for one in config["dependencies"] if [button, "click"] in one["targets"])
    make = next(one for one in config["dependencies"] if one["trigger_after"] == ask["id"])
    given = {"each": components_max(components, "each") // 2, "export-steps": steps}  # of two classes
    for call in (ask, make):
        values = [(components[number].get("elem_id"), components[number].get("value")) for number in call["inputs"]]
        yield call["id"], [given.get(name, value) for name, value in values]


def components_max(components: dict[int, dict[str, Any]], name: str) -> int:
    return int(next(props["maximum"] for props in components.values() if props.get("elem_id") == name))


# ------------------------------------------------------------------------------------------ measuring


def crowd(address: str, options: argparse.Namespace) -> Calls:
    """The calls of all visitors at the same time; where one cannot come, none begins."""
    calls = Calls()
    begin = threading.Barrier(options.visitors)

    def one(number: int) -> None:
        own = len(range(number, options.requests, options.visitors))
        try:
            with visitor(address) as client:
                begin.wait(PATIENCE)
                visit(client, number, own, options.steps, calls)
        except Exception as error:
            begin.abort()
            calls.errors.append(("visitor", f"{type(error).__name__}: {error}"))

    threads = [threading.Thread(target=one, args=(number,)) for number in range(options.visitors)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return calls


def row(kind: str, alone: Calls, calls: Calls) -> str:
    """The line of the table."""
    usual, seconds = statistics.median(alone.seconds[kind]), calls.seconds[kind]
    errors = sum(of == kind for of, _ in calls.errors)
    waiting = [f"{percentile(seconds, share) / usual:.1f} x" if seconds else "-" for share in (0.5, 0.95)]
    return f"| {' | '.join([kind, str(len(seconds) + errors), str(errors), f'{usual:.2f} s', *waiting])} |"


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that this share of all do not exceed."""
    return sorted(values)[max(0, -(-int(100 * share) * len(values) // 100) - 1)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description=__doc__.splitlines()[0])
    parser.add_argument("--visitors", type=int, default=20)
    parser.add_argument("--requests", type=int, default=300, help="of all visitors together")
    parser.add_argument("--steps", type=int, default=10, help="denoising steps of each picture")
    parser.add_argument("--model", default=EMBEDDED)
    options = parser.parse_args(arguments)
    begun = time.perf_counter()

    def reached(what: str) -> None:
        sys.stderr.write(f"{time.perf_counter() - begun:.0f} s: {what}\n")

    with server(options.model) as (address, process):
        reached("the page is there")
        alone = Calls()
        with visitor(address) as client:
            visit(client, 0, 2, options.steps, Calls())  # that sets up
            visit(client, 0, 2 * ALONE, options.steps, alone)
        if alone.errors:
            raise RuntimeError(f"The only visitor was told: {alone.errors[0][1]}")
        reached("one visitor has been")
        memory = [process.memory_info().rss]
        with Exporting(address, options.steps) as export:
            reached("an export is under way")
            first = export.images
            calls = crowd(address, options)
            exported = export.images - first
        reached("the visitors have left")
        memory.append(process.memory_info().rss)
        time.sleep(GRACE + SETTLED)
        memory.append(process.memory_info().rss)
    print(f"{options.visitors} visitors, {options.requests} calls, {options.steps} steps a picture, {options.model}\n")
    print(HEADER)
    for kind in (GENERATE, ATTRIBUTE):
        print(row(kind, alone, calls))
    print(f"\nThe export made {exported} images meanwhile.{' It failed: ' + export.error if export.error else ''}")
    before, after, left = map(megabytes, memory)
    print(f"Memory of the server: {before} before, {after} after, {left} after the visitors left.")
    print(f"Errors: {len(calls.errors)}")
    for (kind, sentence), count in Counter(calls.errors).most_common(5):
        print(f"  {count} x {kind}: {sentence[:300]}")
    return 1 if calls.errors or export.error else 0


if __name__ == "__main__":
    raise SystemExit(main())
