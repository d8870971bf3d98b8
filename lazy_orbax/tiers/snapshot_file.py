"""The file of one snapshot in shared memory: its bytes, what they are, and a seal that is set last.

A page holds the seal; the bytes follow, then two texts in JSON: the *layout* says which bytes are
which piece of which leaf, the *facts* say which step of whom it is, with a digest for each piece.
The seal's last word is the digest of the seal. It is 0 while the file is being written, and a
process that dies at any moment leaves a file that is whole or is seen not to be.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import mmap
import os
import stat
import struct
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from lazy_orbax.errors import KeeperError
from lazy_orbax.integrity.digest import digest_of_bytes

PAGE_BYTES = 4096
_SEAL = struct.Struct("<8sQQQQQQQ")
_WORD = struct.Struct("<Q")
_MAGIC = b"lazykep1"
_SEED = 17
# What each snapshot says of itself, at least.
_FACTS = {"run": str, "item": str, "step": int, "life": int, "process": int}


class SnapshotError(ValueError):
    """A file holds no snapshot, or one that is not whole."""


class HeldError(KeeperError):
    """A file cannot be written over now: somebody reads what it holds."""


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A snapshot that was sealed.

    Attributes:
        path: its file.
        serial: how many snapshots of the same run, item and process were sealed before.
        facts: which step of whom it is; `digests`, one for each piece.
        layout: which bytes are which piece of which leaf.
        fingerprint: the digest of the layout: equal for equal plans.
        n_bytes: all of it, from the beginning of the file.
    """

    path: str
    serial: int
    facts: dict[str, Any]
    layout: dict[str, Any]
    fingerprint: int
    n_bytes: int = 0

    @property
    def step(self) -> int:
        """The step."""
        return self.facts["step"]


class SnapshotFile:
    """A file of shared memory that one process writes, again and again.

    Attributes:
        path: where it is.
        inode: which file it is, whatever is there later.
        memory: all of it, as bytes.
    """

    def __init__(self, path: str, n_bytes: int, *, is_mapped_now: bool = False):
        """Maps a file that exists, and makes sure that there is memory behind all of it.

        Args:
            path: the file.
            n_bytes: how much of it is used.
            is_mapped_now: whether all its pages are mapped at once, which takes a moment here;
                else each when it is touched, which takes longer in all.

        Raises:
            SnapshotError: it is not a file of this user's.
            OSError: there is no such file, or not enough memory.
        """
        descriptor = _opened(path, os.O_RDWR)
        try:
            # Of a page without memory behind it, the first write would end this process (SIGBUS).
            os.posix_fallocate(descriptor, 0, n_bytes)
            self._map = mmap.mmap(descriptor, n_bytes, _flags(is_mapped_now))
            self.inode = os.fstat(descriptor).st_ino
        finally:
            os.close(descriptor)
        self.path = path
        self.memory = np.frombuffer(self._map, np.uint8)

    @property
    def n_bytes(self) -> int:
        """How much of the file is used."""
        return len(self._map)

    def break_seal(self) -> None:
        """Makes the file one that holds no snapshot. Before anything in it is changed.

        Raises:
            HeldError: somebody reads it.
            OSError: the file is gone.
        """
        descriptor = _opened(self.path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._map[_SEAL.size : _SEAL.size + _WORD.size] = _WORD.pack(0)
            # A child that was forked meanwhile has the descriptor too, for as long as it lives.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        except BlockingIOError as error:
            raise HeldError(f"{self.path} is being brought to a tier") from error
        finally:
            os.close(descriptor)

    def seal(self, serial: int, layout: bytes, facts: bytes, *, end: int) -> None:
        """Makes the file a whole snapshot.

        Args:
            serial: how many were sealed before it.
            layout: JSON that says which bytes are what.
            facts: JSON that says whose they are.
            end: where the bytes end, and the texts go.
        """
        middle = end + len(layout)
        self._map[end:middle] = layout
        self._map[middle : middle + len(facts)] = facts
        told = (end, len(layout), digest_of_bytes(layout))
        told += (middle, len(facts), digest_of_bytes(facts))
        seal = _SEAL.pack(_MAGIC, serial, *told)
        self._map[: _SEAL.size] = seal
        # The last word: whoever reads it finds everything before it.
        self._map[_SEAL.size : _SEAL.size + _WORD.size] = _word_of(seal)

    def close(self) -> None:
        """Lets go of the memory. Views of it must be gone, or keep it mapped until they are."""
        self.memory = np.empty(0, np.uint8)
        try:
            self._map.close()
        except BufferError:
            return


def _flags(is_mapped_now: bool) -> int:
    return mmap.MAP_SHARED | (getattr(mmap, "MAP_POPULATE", 0) if is_mapped_now else 0)


def _word_of(seal: bytes) -> bytes:
    return _WORD.pack(digest_of_bytes(seal, seed=_SEED))


def _opened(path: str, flags: int) -> int:
    """Opens a file of this user's.

    Raises:
        SnapshotError: it is something else.
    """
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
        os.close(descriptor)
        raise SnapshotError(f"{path} is not a file of user {os.geteuid()}")
    return descriptor


@contextlib.contextmanager
def held(paths: Iterable[str]) -> Iterator[None]:
    """Keeps files from being written over by their trainers, which pass over a step meanwhile.

    Args:
        paths: the files. Whether one still holds what it did is to be looked at inside.

    Raises:
        SnapshotError: one is not a file of this user's.
        OSError: one is gone.
    """
    with contextlib.ExitStack() as stack:
        for path in paths:
            descriptor = _opened(path, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_SH)  # A trainer has it for a moment only.
        yield


def read_memory(path: str, *, is_mapped_now: bool = False) -> np.ndarray:
    """Returns all of a file, as bytes that cannot be written to.

    Args:
        path: the file.
        is_mapped_now: as for a `SnapshotFile`; for one of which all is read.

    Raises:
        SnapshotError: it is not a file of this user's, or is too short.
        OSError: there is none.
    """
    descriptor = _opened(path, os.O_RDONLY)
    try:
        if os.fstat(descriptor).st_size < PAGE_BYTES:
            raise SnapshotError(f"{path} is shorter than a page")
        mapped = mmap.mmap(descriptor, 0, _flags(is_mapped_now), mmap.PROT_READ)
        return np.frombuffer(mapped, np.uint8)
    finally:
        os.close(descriptor)


def read_snapshot(path: str) -> Snapshot:
    """Returns what a file holds. The bytes of its pieces are not looked at.

    Raises:
        SnapshotError: it holds no snapshot that was sealed and is as it was then.
        OSError: it cannot be read.
    """
    memory = read_memory(path)
    seal, word = memory[: _SEAL.size].tobytes(), memory[_SEAL.size :][: _WORD.size].tobytes()
    if word == bytes(_WORD.size):
        raise SnapshotError(f"{path} was being written and never sealed")
    if word != _word_of(seal):
        raise SnapshotError(f"the seal of {path} is torn")
    magic, serial, *told = _SEAL.unpack(seal)
    if magic != _MAGIC:
        raise SnapshotError(f"{path} is of another version of lazy_orbax")
    layout = _text(memory, path, "layout", told[:3])
    facts = _text(memory, path, "facts", told[3:])
    for name, kind in _FACTS.items():
        if not isinstance(facts.get(name), kind):
            raise SnapshotError(f"the facts of {path} have no {name}")
    return Snapshot(path, serial, facts, layout, told[2], told[3] + told[4])


def _text(memory: np.ndarray, path: str, what: str, told: list[int]) -> dict[str, Any]:
    first, n_bytes, digest = told
    content = memory[first : first + n_bytes].tobytes()
    if len(content) != n_bytes or digest_of_bytes(content) != digest:
        raise SnapshotError(f"the {what} of {path} is not what was written")
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise SnapshotError(f"the {what} of {path} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise SnapshotError(f"the {what} of {path} is {type(found).__name__}, wanted an object")
    return found
