"""Work that reports as it goes, in a thread of its own: a Gradio generator can only hand on what it has in hand."""

from __future__ import annotations

import contextvars
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any


def in_thread(work: Callable[[Callable[[Any], None]], Any], every: float) -> Iterator[tuple[list[Any], Any]]:
    """Runs `work(report)` in a thread; gives ([what was reported since], None) every `every` seconds in which something
    was, at the end ([the rest], the result). What `work` raises is raised here.
    """
    reports: queue.SimpleQueue = queue.SimpleQueue()
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["result"] = work(reports.put)
        except Exception as error:  # carried over to the caller's thread
            outcome["error"] = error

    # In the caller's context: Gradio keeps there which event is under way.
    worker = threading.Thread(target=contextvars.copy_context().run, args=(run,), daemon=True)
    worker.start()
    while worker.is_alive():
        worker.join(every)
        if worker.is_alive() and (new := _drain(reports)):
            yield new, None
    if "error" in outcome:
        raise outcome["error"]
    yield _drain(reports), outcome["result"]


def _drain(reports: queue.SimpleQueue) -> list[Any]:
    new = []
    while not reports.empty():
        new.append(reports.get())
    return new
