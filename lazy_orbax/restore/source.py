"""Where the bytes of chunks come from: a local directory, or an object store."""

# ruff: noqa: D102 - `Source` says what each does.

from __future__ import annotations

import abc
import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from typing import ClassVar

from lazy_orbax.storage.place import Place

_MEBIBYTE = 2**20
# What a bucket answers is held once more than where it goes.
_MOST_AWAITED_BYTES = 256 * _MEBIBYTE
# Of a database's files: they are read often. Where each chunk is one, a process may not open all.
_MOST_KEPT = 16


class Source(abc.ABC):
    """Files of an item, read in ranges.

    Attributes:
        concurrency: reads that are worth while at once.
        gap_bytes: so much is rather read and thrown away than not read.
        run_bytes: most bytes of a read, unless it is one chunk.
        large_bytes: a chunk with more bytes is read, hashed and put in its place in parts.
        part_bytes: most bytes of such a part.
        most_buffers: most buffers of a read.
        requests: how many reads there were.
        n_bytes: how many bytes they were.
    """

    concurrency: ClassVar[int]
    gap_bytes: ClassVar[int]
    run_bytes: ClassVar[int]
    large_bytes: ClassVar[int]
    part_bytes: ClassVar[int]
    most_buffers: ClassVar[int] = 1000  # Linux takes 1024.

    def __init__(self) -> None:
        self._counting = threading.Lock()
        self.requests = self.n_bytes = 0

    def read(self, file: str, start: int, buffers: Sequence[memoryview]) -> None:
        """Fills buffers, one after the other.

        Args:
            file: its path relative to the item.
            start: the first byte.
            buffers: where the bytes go.

        Raises:
            OSError: the storage refused, or there is no such file.
            ValueError: the file ends too early, or the object store refused.
        """
        n_bytes = sum(map(len, buffers))
        with self._counting:
            self.requests += 1
            self.n_bytes += n_bytes
        self._read(file, start, buffers, n_bytes)

    @abc.abstractmethod
    def _read(self, file: str, start: int, buffers: Sequence[memoryview], wanted: int) -> None: ...

    def close(self) -> None:  # noqa: B027 - Most have nothing.
        """Gives back what it holds."""


class Directory(Source):
    """A local directory."""

    concurrency, gap_bytes, run_bytes = 4, 2**16, 4 * _MEBIBYTE
    large_bytes, part_bytes = 4 * _MEBIBYTE, _MEBIBYTE

    def __init__(self, directory: str):
        super().__init__()
        self._directory = directory
        self._lock = threading.Lock()
        self._kept: dict[str, int] = {}

    def _read(self, file: str, start: int, buffers: Sequence[memoryview], wanted: int) -> None:
        with self._open(file) as descriptor:
            for first in range(0, len(buffers), self.most_buffers):
                some = buffers[first : first + self.most_buffers]
                start = _filled(descriptor, file, start, some)

    @contextlib.contextmanager
    def _open(self, file: str) -> Iterator[int]:
        with self._lock:
            descriptor = self._kept.get(file)
            is_kept = descriptor is not None or len(self._kept) < _MOST_KEPT
            if descriptor is None:
                path = os.path.join(self._directory, file)
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
                if is_kept:
                    self._kept[file] = descriptor
        try:
            yield descriptor
        finally:
            if not is_kept:
                os.close(descriptor)

    def close(self) -> None:
        with self._lock:
            while self._kept:
                os.close(self._kept.popitem()[1])


class Bucket(Source):
    """A directory in an object store: each read is a request.

    Invariant, under the lock: answers to `_waiting_for` bytes are awaited, no more than the limit
    unless one alone has more.
    """

    concurrency, gap_bytes, run_bytes = 32, _MEBIBYTE, 4 * _MEBIBYTE
    # A chunk is one request, as TensorStore has it.
    large_bytes, part_bytes = _MOST_AWAITED_BYTES, _MOST_AWAITED_BYTES

    def __init__(self, place: Place):
        super().__init__()
        self._store = place.kvstore
        self._changed = threading.Condition()
        self._waiting_for = 0

    def _read(self, file: str, start: int, buffers: Sequence[memoryview], wanted: int) -> None:
        with self._awaiting(wanted):
            try:
                found = self._store.read(file, byte_range=slice(start, start + wanted)).result()
            except ValueError as error:
                raise ValueError(f"{file}: {error}") from error
            if found.state != "value" or len(found.value) != wanted:
                raise ValueError(f"{file} has no bytes {start} to {start + wanted}")
            content, done = memoryview(found.value), 0
            for buffer in buffers:
                buffer[:] = content[done : done + len(buffer)]
                done += len(buffer)

    @contextlib.contextmanager
    def _awaiting(self, n_bytes: int) -> Iterator[None]:
        with self._changed:
            while self._waiting_for and self._waiting_for + n_bytes > _MOST_AWAITED_BYTES:
                self._changed.wait()
            self._waiting_for += n_bytes
        try:
            yield
        finally:
            with self._changed:
                self._waiting_for -= n_bytes
                self._changed.notify_all()


def _filled(descriptor: int, file: str, start: int, buffers: Sequence[memoryview]) -> int:
    """Fills buffers, no more than the system takes at once. Returns the byte after the last.

    Raises:
        ValueError: the file ends too early.
    """
    wanted = sum(map(len, buffers))
    done = os.preadv(descriptor, buffers, start) if wanted else 0
    while done < wanted:  # Of a long read the system may give a part.
        left, skip = [], done
        for buffer in buffers:
            if skip < len(buffer):
                left.append(buffer[skip:])
            skip = max(0, skip - len(buffer))
        more = os.preadv(descriptor, left, start + done)
        if more == 0:
            raise ValueError(f"{file} ends before byte {start + wanted}")
        done += more
    return start + wanted


def source_of(place: Place) -> Source:
    """Returns what reads the files of an item."""
    return Directory(place.directory) if place.has_special_files else Bucket(place)
