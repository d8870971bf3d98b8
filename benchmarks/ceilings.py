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
_DIRECT_THREADS = 4
_ALIGNMENT_BYTES = 4096


def measure(channel: Channel, directory: pathlib.Path, state: Any) -> None:
    """Measures every ceiling once, for as many bytes as the state has."""
    n_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    block = mmap.mmap(-1, _BLOCK_BYTES)  # Aligned to a page, which O_DIRECT asks for.
    block.write(np.random.default_rng(0).bytes(_BLOCK_BYTES))
    channel.sample(RAW, "durable_write", _buffered_write_s(directory / "buffered", n_bytes, block))
    try:
        direct_s = _direct_write_s(directory, n_bytes, block)
    except OSError:
        pass  # tmpfs and some others have no O_DIRECT.
    else:
        channel.sample(RAW, "durable_write_direct", direct_s)
    meters.drop_from_page_cache(directory)
    channel.sample(RAW, "read", _read_s(directory / "buffered"))
    channel.sample(RAW, "memcpy", _memcpy_s(n_bytes))
    channel.sample(RAW, "dispatch", _dispatch_s(state))


def _write(path: pathlib.Path, n_bytes: int, block: mmap.mmap, flags: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | flags, 0o644)
    try:
        left = n_bytes
        while left > 0:
            left -= os.write(descriptor, memoryview(block)[: min(left, _BLOCK_BYTES)])
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _buffered_write_s(path: pathlib.Path, n_bytes: int, block: mmap.mmap) -> float:
    start_s = time.perf_counter()
    _write(path, n_bytes, block, 0)
    return time.perf_counter() - start_s


def _direct_write_s(directory: pathlib.Path, n_bytes: int, block: mmap.mmap) -> float:
    """Several threads, past the page cache; rounded up to whole blocks of the device."""
    share = -(-n_bytes // (_DIRECT_THREADS * _ALIGNMENT_BYTES)) * _ALIGNMENT_BYTES
    start_s = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(_DIRECT_THREADS) as pool:
        futures = [
            pool.submit(_write, directory / f"direct_{i}", share, block, os.O_DIRECT)
            for i in range(_DIRECT_THREADS)
        ]
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
    source, target = np.ones(n_bytes, np.uint8), np.zeros(n_bytes, np.uint8)
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
