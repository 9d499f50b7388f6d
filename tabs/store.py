"""Recordings of visitors, kept on the server within bounds: how many each, how many bytes in all, and for how long.

Gradio's own session state copies and keeps whatever it is given; a recording can be a gigabyte. The page holds only a
random id, which is also what lets nobody else ask for it.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

GIB = 1 << 30


@dataclass
class _Entry:
    owner: str
    value: Any
    used: float


class Store:
    """A bounded shelf of values that have `.nbytes`, thread safe, least recently used out first.

    per_owner: values one visitor may have. max_bytes: of all together; the newest value is kept even where it alone is
    larger, or a large model could not be used at all. seconds: time to live since the last use.
    """

    def __init__(
        self,
        per_owner: int = 2,
        max_bytes: int = 4 * GIB,
        seconds: float = 1800.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.per_owner, self.max_bytes, self.seconds, self.clock = per_owner, max_bytes, seconds, clock
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # least recently used first
        self._lock = threading.RLock()
        self._timer: threading.Timer | None = None

    def put(self, owner: str, value: Any) -> str:
        """Keeps a value for a visitor and returns its id, a long random string."""
        key = secrets.token_urlsafe(18)
        with self._lock:
            self._entries[key] = _Entry(owner, value, self.clock())
            own = [one for one, entry in self._entries.items() if entry.owner == owner]
            for one in own[: -self.per_owner]:
                del self._entries[one]
            self.sweep()
        return key

    def get(self, key: str | None) -> Any:
        """The value, its time to live begun anew; None if there is none (any more)."""
        with self._lock:
            self.sweep()
            entry = self._entries.get(key or "")
            if entry is None:
                return None
            entry.used = self.clock()
            self._entries.move_to_end(key)
            return entry.value

    def clear(self) -> None:
        """Forgets everything of everybody."""
        with self._lock:
            self._entries.clear()

    def drop_owner(self, owner: str) -> None:
        """Forgets all that a visitor has."""
        with self._lock:
            for key in [key for key, entry in self._entries.items() if entry.owner == owner]:
                del self._entries[key]

    def sweep(self) -> None:
        """Lets go of what has outlived its time or does not fit, and sees to it that it is called again."""
        with self._lock:
            oldest = self.clock() - self.seconds
            for key in [key for key, entry in self._entries.items() if entry.used <= oldest]:
                del self._entries[key]
            while len(self._entries) > 1 and self.nbytes > self.max_bytes:
                self._entries.popitem(last=False)
            self._wake_later()

    def _wake_later(self) -> None:
        """Memory is given back on time even if nobody ever comes again."""
        if self._entries and (self._timer is None or not self._timer.is_alive()):
            self._timer = threading.Timer(max(1.0, self.seconds / 4), self._wake)
            self._timer.daemon = True
            self._timer.start()

    def _wake(self) -> None:
        with self._lock:
            self._timer = None  # this thread is still alive; without it the next one would not be started
            self.sweep()

    @property
    def nbytes(self) -> int:
        with self._lock:
            return sum(entry.value.nbytes for entry in self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)
