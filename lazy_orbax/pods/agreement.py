"""What became of a save on the other processes: a failure of one fails it on all.

Orbax's commit threads meet at a barrier when every process has written, and one that raised never
comes, so the others would wait until their timeout. So before that each process *tells* how it went
in the key-value store of JAX's distributed runtime, the *leader* (Orbax's primary host) reads what
all told, and publishes a *verdict*, which the others wait for. Nothing runs on the devices.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax

from lazy_orbax._orbax import multihost
from lazy_orbax.errors import SaveError
from lazy_orbax.pods.consensus import value_in_time

# How long a process that is not the leader waits longer than the leader does.
_GRACE_S = 10
# While the leader waits for one process, it looks so often whether another has failed.
_LOOK_S = 1
_MOST_CHARACTERS = 4000


@dataclasses.dataclass(frozen=True)
class Agreement:
    """The processes that write one item together, and where they tell how it went.

    Attributes:
        key: where in the store, different for each save and item.
        process: this process.
        processes: all that take part.
        leader: the one that gives the verdict.
        shares_directory: whether all write to one directory, which the leader merges.
        store: the key-value store, with the methods of Orbax's signaling clients.
    """

    key: str
    process: int
    processes: tuple[int, ...]
    leader: int
    shares_directory: bool
    store: Any

    def settle(
        self,
        failure: SaveError | None,
        finish: Callable[[], SaveError | None] | None,
        timeout_s: float,
    ) -> SaveError | None:
        """Returns what the save failed with on any process, or `None`.

        A process that failed does not wait for the others.

        Args:
            failure: how it went here.
            finish: what the leader does once all have written; it returns its failure.
            timeout_s: how long the leader waits for the others.
        """
        try:
            if self.process == self.leader:
                failure = failure or self._first_failure(timeout_s)
                if failure is None and finish is not None:
                    failure = finish()
                self._tell("verdict", failure)
                if failure is None:
                    self.store.key_value_delete(f"{self.key}/told/")
                return failure
            self._tell(f"told/{self.process}", failure)
            if failure is not None:
                return failure
            return self._verdict(timeout_s + _GRACE_S)
        except jax.errors.JaxRuntimeError as error:
            lost = SaveError(f"JAX's distributed runtime failed: {error}", process=self.process)
            lost.__cause__ = error
            return failure or lost

    def all_told(self) -> bool:
        """Whether this process is the leader and every other one has told how it went by now."""
        if self.process != self.leader:
            return False
        try:
            entries = self.store.key_value_dir_get(f"{self.key}/told/")
        except jax.errors.JaxRuntimeError:
            return False
        told = {int(key.rpartition("/")[2]) for key, _ in entries}
        return told >= set(self.processes) - {self.leader}

    def _tell(self, name: str, failure: SaveError | None) -> None:
        self.store.key_value_set(f"{self.key}/{name}", _encoded(failure), allow_overwrite=True)

    def _first_failure(self, timeout_s: float) -> SaveError | None:
        """Waits until every other process told how it went, or one that it failed."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            entries = self.store.key_value_dir_get(f"{self.key}/told/")
            told = {int(key.rpartition("/")[2]): value for key, value in entries}
            for _, value in sorted(told.items()):
                if (failure := _decoded(value)) is not None:
                    return failure
            missing = [p for p in self.processes if p not in told and p != self.leader]
            if not missing:
                return None
            if time.monotonic() > deadline_s:
                return SaveError(
                    f"{_names(missing)} had not written within {timeout_s:.0f} s; storage may "
                    "hang there, or the process may not take part in this save",
                    process=missing[0],
                )
            value_in_time(self.store, f"{self.key}/told/{missing[0]}", _LOOK_S)

    def _verdict(self, timeout_s: float) -> SaveError | None:
        value = value_in_time(self.store, f"{self.key}/verdict", timeout_s)
        if value is None:
            return SaveError(
                f"{_names([self.leader])}, which commits, did not say within {timeout_s:.0f} s "
                "whether all processes have written",
                process=self.leader,
            )
        return _decoded(value)


def agreement_on(
    processes: frozenset[int], options: Any, *, operation: str, item: str
) -> Agreement | None:
    """Returns with whom this process has to agree, or `None` if with nobody.

    Args:
        processes: those that write arrays of the item.
        options: Orbax's `MultiprocessingOptions`, or `None` for its default. Where it names the
            active processes, those take part; else `processes` and the primary host.
        operation: Orbax's number of this save, the same on every process.
        item: the item's name.
    """
    if jax.process_count() == 1:
        return None
    primary = getattr(options, "primary_host", 0)
    active = getattr(options, "active_processes", None)
    members = set(active or processes)
    if active is None and primary is not None:
        members.add(primary)
    process = multihost.process_index()
    if len(members) < 2 or process not in members:
        return None
    prefix = getattr(options, "barrier_sync_key_prefix", None) or ""
    return Agreement(
        f"lazy_orbax/{prefix}/{operation}/{item}",
        process,
        tuple(sorted(members)),
        min(members) if primary is None else primary,
        shares_directory=primary is not None,
        store=multihost.key_value_store(),
    )


def _names(processes: Iterable[int]) -> str:
    listed = [str(process) for process in processes]
    return f"process {listed[0]}" if len(listed) == 1 else f"processes {', '.join(listed)}"


def _encoded(failure: SaveError | None) -> str:
    if failure is None:
        return "null"
    cause = failure.__cause__
    kind = f"{type(cause).__name__}: " if cause is not None else ""
    facts = {
        name: getattr(failure, name) for name in ("step", "directory", "leaf", "file", "errno")
    }
    what = (kind + failure.what)[:_MOST_CHARACTERS]
    return json.dumps({"what": what, "process": failure.process, **facts})


def _decoded(value: str) -> SaveError | None:
    facts = json.loads(value)
    if facts is None:
        return None
    number = facts.pop("errno")
    failure = SaveError(facts.pop("what"), **facts)
    failure.errno = number
    return failure
