"""Which steps have all processes of a job sealed? Told in the store that JAX's runtime has.

A process overwrites a snapshot only when it knows what became of the newer one everywhere: if all
have that, the older one is of no use; if one has not, nobody will ever restore the newer one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from lazy_orbax._orbax import multihost
from lazy_orbax.pods.consensus import value_in_time


class Votes:
    """What the processes of a job tell each other of the steps of one item."""

    def __init__(self, name: str, store: Any = None):
        """Begins to take part.

        Args:
            name: the same on all processes of a job, and different in each life of it.
            store: the key-value store; `None` is JAX's.
        """
        self._name, self._process, self._n = name, jax.process_index(), jax.process_count()
        self._store, self._told = store, list[int]()
        if store is None and self._n > 1:
            self._store = multihost.key_value_store()

    def _key(self, step: int, process: int) -> str:
        return f"lazy_orbax/kept/{self._name}/{step}/{process}"

    def tell(self, step: int, *, is_sealed: bool) -> None:
        """Tells the others what became of a step here. Once for each step."""
        if self._n > 1:
            value = "sealed" if is_sealed else "lost"
            self._store.key_value_set(self._key(step, self._process), value, allow_overwrite=True)
            self._told.append(step)

    def settle(self, work: Callable[[], None]) -> None:
        """Runs what comes after a snapshot: telling of it, and making room for the next."""
        work()

    def is_common(self, step: int, *, timeout_s: float) -> bool | None:
        """Returns whether all processes have sealed a step that this one has.

        Args:
            step: the step.
            timeout_s: most seconds to wait for the others.

        Returns:
            `None` if another process has not told yet.
        """
        for process in range(self._n):
            if process == self._process:
                continue
            try:
                told = value_in_time(self._store, self._key(step, process), timeout_s)
            except jax.errors.JaxRuntimeError:  # The job is ending.
                return None
            if told is None:
                return None
            if told != "sealed":
                return False
        self._forget_before(step)
        return True

    def _forget_before(self, step: int) -> None:
        """Removes what was told of steps before one that all have: whoever has it, has read that.

        What was told of a later one, which was passed over while this one was copied, is still to
        be read. Within a life of the job steps grow.
        """
        for old in [told for told in self._told if told < step]:
            self._told.remove(old)
            self._store.key_value_delete(self._key(old, self._process))
