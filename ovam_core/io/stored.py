"""Sequences that may be longer than memory is large: a record is a line of JSON, read when it is asked for."""

from __future__ import annotations

import json
import threading
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from tempfile import SpooledTemporaryFile
from typing import Any, TypeVar, overload

IN_MEMORY = 1 << 20  # bytes of records; more of them lie in a file without a name, which goes with the sequence

T = TypeVar("T")


def _as_it_is(value: Any) -> Any:
    return value


class Stored(Sequence[T]):
    """Records in the order in which they were added; each that is asked for is made anew. Threads may share it.

    pack, unpack: a record to what JSON knows, and back. It equals any sequence of equal records.
    """

    def __init__(
        self,
        records: Iterable[T] = (),
        pack: Callable[[T], Any] = _as_it_is,
        unpack: Callable[[Any], T] = _as_it_is,
    ):
        self._pack, self._unpack = pack, unpack
        self._file = SpooledTemporaryFile(max_size=IN_MEMORY)  # noqa: SIM115  # closed with its last reader
        self._lock = threading.Lock()
        self._begins = array("Q")
        self._end = 0
        self.extend(records)

    def append(self, record: T) -> None:
        line = json.dumps(self._pack(record), separators=(",", ":")).encode() + b"\n"
        with self._lock:
            self._file.seek(self._end)
            self._file.write(line)
            self._begins.append(self._end)
            self._end += len(line)

    def extend(self, records: Iterable[T]) -> None:
        for record in records:
            self.append(record)

    def chosen(self, numbers: Iterable[int]) -> Stored[T]:
        """Some of the records, by their numbers; they are not copied, and none is added."""
        some: Stored[T] = Stored(pack=self._pack, unpack=self._unpack)
        some._file, some._lock, some._end = self._file, self._lock, self._end
        some._begins = array("Q", (self._begins[number] for number in numbers))
        return some

    def _read(self, begin: int) -> T:
        with self._lock:
            self._file.seek(begin)
            line = self._file.readline()
        return self._unpack(json.loads(line))

    def __len__(self) -> int:
        return len(self._begins)

    def __iter__(self) -> Iterator[T]:
        return map(self._read, self._begins)

    @overload
    def __getitem__(self, number: int) -> T: ...
    @overload
    def __getitem__(self, number: slice) -> list[T]: ...
    def __getitem__(self, number: int | slice) -> T | list[T]:
        if isinstance(number, slice):
            return [self._read(begin) for begin in self._begins[number]]
        return self._read(self._begins[number])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str | bytes):
            return NotImplemented
        return len(self) == len(other) and all(one == two for one, two in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        more = ", ..." if len(self) > 3 else ""
        return f"Stored([{', '.join(map(repr, self[:3]))}{more}])"
