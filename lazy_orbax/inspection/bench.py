"""What a storage can do: durable writes, small files, and reads, as saves and restores do them."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import statistics
import time
import uuid
from collections.abc import Callable
from typing import Any

from lazy_orbax.errors import OptionError
from lazy_orbax.storage.place import Place
from lazy_orbax.storage.places import place_of
from lazy_orbax.view.blocks import Block, Column, Lines, Table
from lazy_orbax.view.text import duration_of, size_of
from lazy_orbax.view.viewed import Viewed

BYTES, PART_BYTES, SMALL = 2**29, 2**24, 32
_AT_ONCE = 8
_SMALL_FILE = b"lazy" * 1024
_COLUMNS = (Column("what"), Column("measured", is_number=True))


@dataclasses.dataclass(frozen=True)
class StorageSpeed(Viewed):
    """What `bench` measured.

    Attributes:
        path: the directory.
        n_bytes: so much was written, and read.
        write_bytes_per_s: of files of 16 MiB, several at once, until they were durable.
        read_bytes_per_s: of the same files.
        is_cached: whether they may have been read from memory.
        small_write_s: median time until one file of 4 KiB was durable.
        small_writes_per_s: how many of these, several at once.
    """

    path: str
    n_bytes: int
    write_bytes_per_s: float
    read_bytes_per_s: float
    is_cached: bool
    small_write_s: float
    small_writes_per_s: float

    def blocks(self) -> tuple[Block, ...]:
        """Returns what there is to see."""
        rows = (
            ("durable writes", f"{size_of(self.write_bytes_per_s)}/s"),
            ("reads", f"{size_of(self.read_bytes_per_s)}/s"),
            ("one small durable file", duration_of(self.small_write_s)),
            ("small durable files", f"{self.small_writes_per_s:.0f}/s"),
        )
        note = f"with {size_of(self.n_bytes)} in files of {size_of(PART_BYTES)}"
        cached = " The reads may have come from memory." if self.is_cached else ""
        return (Table(_COLUMNS, rows, self.path), Lines((f"{note}.{cached}",)))


def bench(
    path: Any,
    *,
    n_bytes: int = BYTES,
    on_progress: Callable[[int, int], None] | None = None,
) -> StorageSpeed:
    """Measures what a storage can do, with TensorStore, as saves and restores use it.

    It writes to a directory of its own there, and removes that in the end.

    Args:
        path: a directory that exists, or a `gs://` address.
        n_bytes: how much to write and to read; at least 16 MiB.
        on_progress: is called with the bytes that were written or read, and with all that will be.

    Raises:
        OptionError: there is no such directory, or `n_bytes` is too small.
        OSError: the storage refused.
        ValueError: TensorStore was refused.
    """
    if type(n_bytes) is not int or n_bytes < PART_BYTES:
        raise OptionError(f"n_bytes: found {n_bytes!r}, wanted at least {PART_BYTES}.")
    if not isinstance(path, str | os.PathLike):
        raise OptionError(f"Give a path: found {path!r}.")
    above = place_of(os.fspath(path))
    if not above.may_be_there():
        raise OptionError(f"{path} is not a directory. Give one that exists.")
    place = place_of(f"{above.absolute.rstrip('/')}/lazy_orbax_bench_{uuid.uuid4().hex}")
    n_parts = n_bytes // PART_BYTES
    done = _Done(2 * n_parts * PART_BYTES, on_progress)
    try:
        write_s = _run(n_parts, lambda n: _write(place, f"part_{n}", os.urandom(2**16) * 256), done)
        is_cached = not _forget(place, [f"part_{n}" for n in range(n_parts)])
        read_s = _run(n_parts, lambda n: place.kvstore.read(f"part_{n}"), done)
        ones = [_run(1, lambda _: _write(place, "small", _SMALL_FILE)) for _ in range(SMALL)]
        many_s = _run(8 * SMALL, lambda n: _write(place, f"small_{n}", _SMALL_FILE), at_once=32)
    finally:
        with contextlib.suppress(OSError, ValueError):
            _remove(place)
    moved = n_parts * PART_BYTES
    small_s = statistics.median(ones)
    speeds = (moved / write_s, moved / read_s, is_cached, small_s, 8 * SMALL / many_s)
    return StorageSpeed(str(path), moved, *speeds)


class _Done:
    """Bytes that were moved, which somebody is told of."""

    def __init__(self, n_bytes: int, tell: Callable[[int, int], None] | None):
        self._all, self._so_far, self._tell = n_bytes, 0, tell

    def more(self) -> None:
        """A part was moved."""
        self._so_far += PART_BYTES
        if self._tell is not None:
            self._tell(self._so_far, self._all)


def _run(
    n: int, start: Callable[[int], Any], done: _Done | None = None, at_once: int = _AT_ONCE
) -> float:
    """Does something so often, a few at once. Returns the seconds that it took."""
    began_s, pending = time.perf_counter(), list[Any]()
    for future in map(start, range(n)):
        pending.append(future)
        if len(pending) == at_once:
            pending.pop(0).result()
            if done:
                done.more()
    for future in pending:
        future.result()
        if done:
            done.more()
    return max(time.perf_counter() - began_s, 1e-9)


def _write(place: Place, name: str, content: bytes) -> Any:
    return place.kvstore.write(name, content)


def _forget(place: Place, names: list[str]) -> bool:
    """Lets the system forget what it holds of files. Returns whether it can have."""
    if not place.has_special_files:
        return True
    if not hasattr(os, "posix_fadvise"):
        return False
    for name in names:
        with open(place.as_path() / name, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def _remove(place: Place) -> None:
    import tensorstore as ts

    place.kvstore.delete_range(ts.KvStore.KeyRange()).result()
    if place.has_special_files:
        place.as_path().rmdir()
