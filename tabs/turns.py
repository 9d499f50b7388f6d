"""Whose turn it is: visitors take turns at what only one work can have at a time, so that a long work of one does not
keep the others waiting.

A work is done in units: a picture, an image of an export, some epochs of a search, a word of an answer. Between two
units it lets go where another visitor waits. Visitors wait in a ring: whoever had a turn and wants another goes to its
end, however many works they have; within one visitor, too, the work that has waited longest is next.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

from ovam_core.errors import InputError

MAX_WAITING = 2  # works of one visitor beside the one that is under way
LOOK_EVERY = 0.1  # seconds between two looks at whether a work that waits was stopped, or its client is gone
TOO_MANY = (
    f"{MAX_WAITING} works of yours are waiting already: let one of them end, or press Stop, before you ask for more."
)


class Turns:
    """Lends one thing, the model say, to one work at a time. Thread safe; clock: for tests."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.clock = clock
        self._changed = threading.Condition()
        self._works: list[Work] = []  # all of them, waiting or not
        self._ring: dict[Hashable, deque[Work]] = {}  # by visitor, those that wait for a unit; the next visitor first
        self._at_work: Work | None = None
        self._since = 0.0  # when the turn began

    def work(self, visitor: Hashable) -> Work:
        """A work of this visitor, to be entered."""
        return Work(self, visitor)

    # ---- for a work; the caller has the lock

    def _begin(self, work: Work) -> None:
        own = [other for other in self._works if other.visitor == work.visitor]
        if len(own) - any(other.begun for other in own) >= MAX_WAITING:
            raise InputError(TOO_MANY)
        self._works.append(work)

    def _end(self, work: Work) -> None:
        self._let_go(work)
        self._works.remove(work)

    def _wait(self, work: Work, should_stop: Callable[[], bool]) -> bool:
        """Waits at the end of the ring for a turn; False where the work is to stop. A turn under way ends."""
        self._ring.setdefault(work.visitor, deque()).append(work)
        self._end_turn(work)
        self._hand_on()
        while self._at_work is not work:
            self._changed.wait(LOOK_EVERY)
            if should_stop():
                self._let_go(work)
                return False
        return True

    def _let_go(self, work: Work) -> None:
        waiting = self._ring.get(work.visitor)
        if waiting is not None and work in waiting:
            waiting.remove(work)
            if not waiting:
                del self._ring[work.visitor]
        self._end_turn(work)
        self._hand_on()

    def _end_turn(self, work: Work) -> None:
        """If it is this work's: its visitor, should more of theirs wait, goes to the end of the ring."""
        if self._at_work is work:
            self._at_work = None
            if work.visitor in self._ring:
                self._ring[work.visitor] = self._ring.pop(work.visitor)

    def _hand_on(self) -> None:
        """Gives the next visitor in the ring a turn, if there is none under way."""
        if self._at_work is not None or not self._ring:
            return
        visitor, waiting = next(iter(self._ring.items()))
        self._at_work, self._since = waiting.popleft(), self.clock()
        self._at_work.begun = True
        if not waiting:
            del self._ring[visitor]
        self._changed.notify_all()


class Work:
    """A work of a visitor, in units, each by `next_unit` or `unit`; a context manager, in which it counts as theirs. To
    enter it raises InputError, one sentence, where MAX_WAITING works of the visitor wait already. Made by `Turns.work`.

    begun: whether it has had a turn.
    """

    def __init__(self, turns: Turns, visitor: Hashable):
        self.visitor, self.begun = visitor, False
        self._turns = turns

    def __enter__(self) -> Work:
        with self._turns._changed:
            self._turns._begin(self)
        return self

    def __exit__(self, *_: object) -> None:
        with self._turns._changed:
            self._turns._end(self)

    def next_unit(self, should_stop: Callable[[], bool], least: float = 0.0) -> bool:
        """Waits until one more unit may be done; False, without the turn, where the work is to stop.

        Between two units others go first, if they wait and the turn has lasted `least` seconds: units that are much
        shorter than others' are done several at a time. should_stop: asked again and again while it waits.
        """
        turns = self._turns
        with turns._changed:
            if should_stop():
                turns._let_go(self)
                return False
            if turns._at_work is self and (not turns._ring or turns.clock() - turns._since < least):
                return True
            return turns._wait(self, should_stop)

    @contextmanager
    def unit(self, should_stop: Callable[[], bool], stopped: Exception) -> Iterator[None]:
        """One unit, after which it lets go. Raises `stopped` where the work is to stop."""
        if not self.next_unit(should_stop):
            raise stopped
        try:
            yield
        finally:
            self.let_go()

    def let_go(self) -> None:
        """The turn, or the place in the ring, is for others."""
        with self._turns._changed:
            self._turns._let_go(self)
