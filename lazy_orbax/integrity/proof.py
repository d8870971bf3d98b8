"""Whether what is written is what the caller's arrays held: fingerprints, piece by piece.

Programs of their own read the arrays on their devices before `save()` returns, and leave a few
words for each leaf and device. Arrays that lie in host memory are read there, without programs.
What is handed to the storage has to have the same fingerprint, at the place where TensorStore was
told to put it.

Not looked at are arrays that the caller holds in host memory which devices can reach: no program of
ours makes what is written of them.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from lazy_orbax._members import members_of
from lazy_orbax.integrity import fingerprint, proof_on_host
from lazy_orbax.integrity.proof_programs import Run, compiled, enqueue, results
from lazy_orbax.integrity.proof_subjects import (
    Misplaced,
    check_cover,
    starts_in_shards,
    subjects_of,
)
from lazy_orbax.plan.slabs import Piece, Plan

# The save of a plan whose programs are begun: who saves once does not pay for them.
_COMPILED_AT = 2
# Where that fails, it is tried again when there were so many times more saves.
_LATER = 10
_LOG = logging.getLogger("lazy_orbax")


class Prover:
    """The programs that look at what a plan saves.

    Invariant, under the lock: of one item, `_n_saves` saves have begun, and of no other more; at
    most one thread compiles, and none does before the save of number `_begin_at`.
    """

    def __init__(self) -> None:
        self._lock, self._compiling = threading.Lock(), threading.Lock()
        self._n_saves, self._begin_at = 0, _COMPILED_AT
        self._runs: list[Run] | None = None
        # Goes on where a thread was stopped that compiled.
        self._programs: Iterator[list[Run] | None] | None = None
        self._failure: Misplaced | None = None
        self._thread: threading.Thread | None = None
        self._stopped = threading.Event()

    def note_save(self, number: int) -> None:
        """Notes that a save begins.

        Args:
            number: how many of its item have begun with it.
        """
        with self._lock:
            self._n_saves = max(self._n_saves, number)

    @property
    def is_ready(self) -> bool:
        """Whether a save need not wait for programs; where the plan is wrong, it needs none."""
        return self._runs is not None or self._failure is not None

    def begin_to_prepare(
        self, plan: Plan, every: int, *, lower_priority: Callable[[], None]
    ) -> None:
        """Compiles the programs in a thread, if later saves will use them.

        Args:
            plan: the plan.
            every: `LazyOptions.verify_snapshot`.
            lower_priority: called in that thread.
        """
        with self._lock:
            if not every or self._thread is not None or self._n_saves < self._begin_at:
                return

            def prepare() -> None:
                lower_priority()
                try:
                    self.prepare(plan, goes_on=lambda: not self._stopped.is_set())
                except Exception:  # noqa: BLE001 - Saves go on; the log has it.
                    self._put_off()

            # The interpreter waits for it: a compiler must not run while the process is taken down.
            thread = threading.Thread(target=prepare, name="lazy_orbax-proof", daemon=False)
            with contextlib.suppress(RuntimeError):  # No thread is to be had now: the next save.
                thread.start()
                self._thread = thread
                _PREPARING.add(self)

    def _put_off(self) -> None:
        """Lets a later save begin anew. Called where an error is handled."""
        with self._lock:
            self._begin_at = _LATER * self._n_saves
            self._thread = None
        _LOG.exception(
            "Snapshots are not verified (LazyOptions.verify_snapshot): the programs for it could "
            "not be compiled. This is tried again after %d saves of the tree.",
            self._begin_at,
        )

    def stop(self) -> None:
        """Ends the thread that compiles after its next program. A later save goes on with it."""
        with self._lock:
            thread = self._thread
        if thread is None:
            return
        self._stopped.set()
        thread.join()
        self._stopped.clear()
        with self._lock:
            self._thread = None if self._runs is None else thread

    def prepare(self, plan: Plan, goes_on: Callable[[], bool] = lambda: True) -> list[Run]:
        """Returns the calls that look at a plan's leaves; compiles them, if that was not done.

        Args:
            plan: the plan.
            goes_on: asked after each program. What is not compiled then is compiled later.

        Raises:
            Misplaced: the plan does not cover a leaf, or names a device that does not hold it.
        """
        with self._compiling:
            if self._failure is not None:
                raise self._failure
            if self._runs is None:
                try:
                    self._runs = self._all_while(goes_on, plan)
                except Misplaced as error:  # What else fails, memory perhaps, is tried again.
                    self._failure = error
                    raise
            return self._runs or []

    def _all_while(self, goes_on: Callable[[], bool], plan: Plan) -> list[Run] | None:
        """Compiles program after program; stops as well where the main thread has ended."""
        self._programs = self._programs or _all_of(plan)
        try:
            for runs in self._programs:
                if runs is not None or not (goes_on() and threading.main_thread().is_alive()):
                    return runs
        except BaseException:
            self._programs = None  # It has ended.
            raise
        raise AssertionError("The last one tells of all.")


def _all_of(plan: Plan) -> Iterator[list[Run] | None]:
    """Compiles a program between one `None` and the next, and yields all calls when it is done.

    Raises:
        Misplaced: the plan does not cover a leaf, or names a device that does not hold it.
    """
    check_cover(plan)
    far, near = subjects_of(plan)
    for subject in near.values():
        starts_in_shards(subject)
    runs = []
    for run in compiled(far) if far else ():
        runs.append(run)
        yield None
    yield runs


# Whose threads may be compiling.
_PREPARING: weakref.WeakSet[Prover] = weakref.WeakSet()


def stop_preparing() -> None:
    """Ends the threads that compile, and waits for that."""
    for prover in members_of(_PREPARING):
        prover.stop()


class Evidence:
    """The fingerprints of one save's pieces, in the caller's arrays and as they are written.

    Attributes:
        found: the fingerprint of what is on storage of each piece, by the `id` of the piece.
        is_proven: set when everything was written, and was what it had to be.
    """

    def __init__(self, plan: Plan, prover: Prover):
        """Does nothing yet; `take` does."""
        self._plan, self._prover = plan, prover
        self._enqueued: list[tuple[Run, jax.Array]] = []
        self._wanted: dict[Any, int] = {}
        self.found: dict[int, int] = {}
        self.is_proven = threading.Event()

    def take(self, leaves: Sequence[Any]) -> None:
        """Enqueues programs that read the caller's arrays; those in host memory are read at once.

        Args:
            leaves: the values of `plan.leaves`. They may be donated or changed when this returned.

        Raises:
            Misplaced: the plan does not fit the arrays.
        """
        self._enqueued = enqueue(self._prover.prepare(self._plan), leaves)
        _, near = subjects_of(self._plan)  # Not kept: large, and seldom needed.
        self._wanted |= proof_on_host.look(near, leaves)
        for slab in self._plan.slabs:
            for piece in slab.pieces if slab.kind == "host" else ():
                value = np.asarray(leaves[piece.leaf])
                self._wanted[id(piece)] = fingerprint.of_host(value, (0,) * value.ndim)

    def differs(self, piece: Piece, index: tuple[slice, ...], view: np.ndarray) -> str | None:
        """Returns what is wrong with what is written, or `None`.

        Args:
            piece: which piece it is said to be.
            index: where it goes in the leaf.
            view: what is written there, before it is cast.
        """
        self._collect()
        found = self._note(piece, index, view)
        wanted = self._wanted.get(id(piece), found)
        if wanted == found:
            return None
        place = ", ".join(f"{part.start}:{part.stop}" for part in index)
        return (
            f"what is written at [{place}] is not what the array held: its fingerprint is "
            f"{found:016x}, the array's is {wanted:016x}"
        )

    def is_cast(self, piece: Piece, index: tuple[slice, ...], view: np.ndarray) -> None:
        """Notes what is stored of a piece, where that is not what was given."""
        self._note(piece, index, view)

    def conclude(self) -> str | None:
        """Concludes that all was proven, now that no more is written.

        Returns:
            The name of a leaf of which not every piece was written. If there is one, it was not.
        """
        pieces = (piece for slab in self._plan.slabs for piece in slab.pieces)
        absent = (piece.leaf for piece in pieces if id(piece) not in self.found)
        missing = next((self._plan.leaves[leaf].name for leaf in absent), None)
        if missing is None:
            self.is_proven.set()
        return missing

    def _note(self, piece: Piece, index: tuple[slice, ...], view: np.ndarray) -> int:
        found = fingerprint.of_host(view, [part.start for part in index])
        self.found[id(piece)] = found
        return found

    def _collect(self) -> None:
        """Waits for the devices."""
        if self._enqueued:
            self._wanted |= results(self._enqueued)
            self._enqueued = []


def prover_of(plan: Plan) -> Prover:
    """Returns the one prover of a plan."""
    return plan.kept.setdefault(Prover, Prover())
