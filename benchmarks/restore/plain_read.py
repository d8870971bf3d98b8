"""Reads the files of a checkpoint into fresh memory: what a restore could cost at the least."""

from __future__ import annotations

import mmap
import os
import pathlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

_BLOCK_BYTES = 8 * 2**20
_ALIGNMENT_BYTES = 4096


def reader(peer: str, files: list[pathlib.Path]) -> Callable[[], mmap.mmap]:
    """Returns what reads `files`, as the name of the peer says: `raw_4`, `raw_direct_4`.

    Raises:
        OSError: the file system has no `O_DIRECT`.
    """
    flags = os.O_DIRECT if "direct" in peer else 0
    threads = int(peer.rpartition("_")[2])
    sizes = [path.stat().st_size for path in files]
    for path in files:
        os.close(os.open(path, os.O_RDONLY | flags))
    return lambda: _read(files, sizes, flags=flags, threads=threads)


def _read(files: list[pathlib.Path], sizes: list[int], *, flags: int, threads: int) -> mmap.mmap:
    """Reads all, in blocks that threads take in turns, into memory that nobody used before.

    Raises:
        OSError: a file ended early.
    """
    rooms = [-(-size // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES for size in sizes]
    memory = mmap.mmap(-1, max(1, sum(rooms)))
    # As NumPy does for large arrays; else the page faults cost more than the reads.
    memory.madvise(mmap.MADV_HUGEPAGE)
    view = memoryview(memory)
    blocks, start = [], 0
    for path, size, room in zip(files, sizes, rooms):
        for at in range(0, size, _BLOCK_BYTES):
            into = view[start + at : start + min(at + _BLOCK_BYTES, room)]
            blocks.append((path, at, min(_BLOCK_BYTES, size - at), into))
        start += room
    opened, lock = {}, threading.Lock()

    def read(block: tuple[pathlib.Path, int, int, memoryview]) -> None:
        path, at, wanted, into = block
        with lock:
            if path not in opened:
                opened[path] = os.open(path, os.O_RDONLY | flags)
        n_read = 0
        while n_read < wanted:
            more = os.preadv(opened[path], [into[n_read:]], at + n_read)
            if not more:
                raise OSError(f"{path} ends at {at + n_read}")
            n_read += more

    try:
        if threads == 1:
            for block in blocks:
                read(block)
        else:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(read, blocks))
    finally:
        for descriptor in opened.values():
            os.close(descriptor)
    return memory
