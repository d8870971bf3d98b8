"""Small answers that all processes share. Every process must ask the same questions, in turn."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from lazy_orbax._jax_context import neutral


def any_process(flags: Sequence[bool]) -> list[bool]:
    """Returns which flags are set on any process.

    Args:
        flags: as many on every process.
    """
    return [bool(column.any()) for column in _of_all(flags).T] if flags else []


def which_processes(flag: bool) -> list[int]:
    """Returns the processes on which a flag is set."""
    return np.flatnonzero(_of_all([flag])).tolist()


def highest(number: int) -> int:
    """Returns the highest number of all processes."""
    return int(_of_all([number]).max())


def from_first(numbers: Sequence[int], *, most: int) -> list[int]:
    """Returns the numbers that the first process has.

    Args:
        numbers: what this process has; integers of 64 bits.
        most: with several processes, only so many of them, from the front.
    """
    if jax.process_count() == 1:
        return list(numbers)
    padded = np.zeros(1 + most, np.int64)
    padded[0] = n = min(len(numbers), most)
    padded[1 : 1 + n] = numbers[:n]
    with neutral():
        halves = multihost_utils.broadcast_one_to_all(_halves(padded))
    found = _whole(halves)
    return found[1 : 1 + found[0]].tolist()


def _of_all(numbers: Sequence[int]) -> np.ndarray:
    """Returns the numbers of each process, in a row of its own."""
    mine = np.array(numbers, np.int64)
    if jax.process_count() == 1:
        return mine[np.newaxis]
    with neutral():
        return _whole(multihost_utils.process_allgather(_halves(mine)))


def _halves(numbers: np.ndarray) -> np.ndarray:
    """Of an integer of 64 bits JAX would send only 32."""
    return numbers.view(np.uint32)


def _whole(halves: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(halves).view(np.int64)
