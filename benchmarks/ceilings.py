"""What the machine could do: the same bytes, with nobody's checkpointing in between."""

from __future__ import annotations

import concurrent.futures
import mmap
import os
import pathlib
import time
from typing import Any

import jax
import numpy as np

from benchmarks import meters
from benchmarks.jobs import Channel

RAW = "raw"
"""The peer that ceilings are recorded as."""

_BLOCK_BYTES = 8 * 2**20
_THREADS = 4
# As large as a leaf of `few_large`, which is a file: what is synced at once.
_SYNCED_BYTES = 64 * 2**20
_ALIGNMENT_BYTES = 4096


def measure(channel: Channel, directory: pathlib.Path, state: Any) -> None:
    """Measures every ceiling once, for as many bytes as the state has."""
    n_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    block = mmap.mmap(-1, _BLOCK_BYTES)  # Aligned to a page, which O_DIRECT asks for.
    block.write(np.random.default_rng(0).bytes(_BLOCK_BYTES))
    start_s = time.perf_counter()
    _write(directory / "buffered", n_bytes, block, 0, n_bytes)
    channel.sample(RAW, "durable_write", time.perf_counter() - start_s)
    threads_s = _write_by_threads_s(directory / "threads", n_bytes, block, 0, _SYNCED_BYTES)
    channel.sample(RAW, "durable_write_threads", threads_s)
    try:
        direct_s = _write_by_threads_s(directory / "direct", n_bytes, block, os.O_DIRECT, n_bytes)
    except OSError:
        pass  # tmpfs and some others have no O_DIRECT.
    else:
        channel.sample(RAW, "durable_write_direct", direct_s)
    meters.drop_from_page_cache(directory)
    channel.sample(RAW, "read", _read_s(directory / "buffered"))
    channel.sample(RAW, "memcpy", _memcpy_s(n_bytes))
    channel.sample(RAW, "dispatch", _dispatch_s(state))


def _write(
    path: pathlib.Path, n_bytes: int, block: mmap.mmap, flags: int, synced_bytes: int
) -> None:
    """Writes a file and syncs it, each time after so many bytes."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | flags, 0o644)
    try:
        for start in range(0, n_bytes, synced_bytes):
            left = min(synced_bytes, n_bytes - start)
            while left > 0:
                left -= os.write(descriptor, memoryview(block)[: min(left, _BLOCK_BYTES)])
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_by_threads_s(
    path: pathlib.Path, n_bytes: int, block: mmap.mmap, flags: int, synced_bytes: int
) -> float:
    """Writes a file with each of several threads; rounded up to whole blocks of the device."""
    share = -(-n_bytes // (_THREADS * _ALIGNMENT_BYTES)) * _ALIGNMENT_BYTES
    start_s = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        files = (path.with_name(f"{path.name}_{i}") for i in range(_THREADS))
        futures = [pool.submit(_write, file, share, block, flags, synced_bytes) for file in files]
        for future in futures:
            future.result()
    return time.perf_counter() - start_s


def _read_s(path: pathlib.Path) -> float:
    into = bytearray(_BLOCK_BYTES)
    start_s = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(into):
            pass
    return time.perf_counter() - start_s


def _memcpy_s(n_bytes: int) -> float:
    # Touched before, so that page faults are not counted as copying.
    source, target = np.ones(n_bytes, np.uint8), np.ones(n_bytes, np.uint8)
    start_s = time.perf_counter()
    np.copyto(target, source)
    return time.perf_counter() - start_s


def _dispatch_s(state: Any) -> float:
    """Time until a program that takes the whole tree, and does nothing, was handed over."""
    empty = jax.jit(lambda tree: 0)
    jax.block_until_ready(empty(state))
    start_s = time.perf_counter()
    result = empty(state)
    taken_s = time.perf_counter() - start_s
    jax.block_until_ready(result)
    return taken_s
