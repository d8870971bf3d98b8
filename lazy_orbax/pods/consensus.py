"""Small answers that all processes share. Every process must ask the same questions, in turn."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from lazy_orbax._jax_context import neutral
from lazy_orbax._orbax import multihost
from lazy_orbax.errors import SaveError


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


def of_each(number: int) -> list[int]:
    """Returns the number of each process; an integer of 64 bits."""
    return _of_all([number])[:, 0].tolist()


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


def told_by_leader(
    key: str, ask: Callable[[], list[int]], options: Any, *, timeout_s: float
) -> list[int]:
    """Returns what the leading process answers, without the devices: steps go on there.

    Args:
        key: where in the store it tells it. Different for each question of a job.
        ask: returns the answer. Only the leader's is asked.
        options: Orbax's `MultiprocessingOptions`, which say who leads and who asks.
        timeout_s: how long the others wait for the leader to come to this question.

    Raises:
        SaveError: the leader did not answer in time.
    """
    if jax.process_count() == 1:
        return ask()
    leader = getattr(options, "primary_host", 0)
    if leader is None:
        leader = min(getattr(options, "active_processes", None) or {0})
    store = multihost.key_value_store()
    if multihost.process_index() == leader:
        answer = ask()
        store.key_value_set(key, json.dumps(answer), allow_overwrite=True)
        return answer
    value = value_in_time(store, key, timeout_s)
    if value is None:
        what = f"process {leader} did not say within {timeout_s:.0f} s whether to save"
        raise SaveError(what, process=leader)
    return json.loads(value)


def value_in_time(store: Any, key: str, timeout_s: float) -> str | None:
    """Waits for a value of the key-value store; `None` where none came in time."""
    try:
        return store.blocking_key_value_get(key, max(1, int(timeout_s)))
    except TimeoutError:
        return None
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" in str(error):
            return None
        raise


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
