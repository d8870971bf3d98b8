"""One save in flight: what was snapshotted goes to the host, then to storage, slab by slab."""

from __future__ import annotations

import contextlib
import enum
import queue
import threading
import time
import traceback
import weakref
from collections.abc import Sequence
from typing import Any

import jax

from lazy_orbax import in_flight, snapshot
from lazy_orbax.drain import Pace, drain, give_back_memory, yield_to_training
from lazy_orbax.errors import SaveError
from lazy_orbax.events import Recorder
from lazy_orbax.host_budget import HOST_BUDGET, Lease, ReservationAborted
from lazy_orbax.options import LazyOptions
from lazy_orbax.plan import Slab
from lazy_orbax.prepare import Prepared
from lazy_orbax.proof import prover_of
from lazy_orbax.room import Room
from lazy_orbax.snapshot import Held
from lazy_orbax.stale import Fingerprints
from lazy_orbax.sync import Inode
from lazy_orbax.write import Writer, own_directories, save_error


class State(enum.Enum):
    """Where a save is."""

    SNAPSHOT = "snapshot"
    STAGED = "staged"
    DURABLE = "durable"
    FAILED = "failed"


_OVER = (State.DURABLE, State.FAILED)


class Save:
    """One save of one item.

    Three threads meet here: the caller's takes the snapshot, ours brings it to the host, Orbax's
    commit thread writes it. Invariant, under the lock: the state only moves forward, and once it
    is `DURABLE` or `FAILED` no lease of host memory is added.
    """

    def __init__(
        self,
        prepared: Prepared,
        options: LazyOptions,
        *,
        limit_bytes: int,
        pace: Pace,
        path: str,
        fingerprints: Fingerprints,
    ):
        """Starts the clock; `snapshot` starts the work.

        Args:
            prepared: the plan.
            options: how to take the snapshot.
            limit_bytes: most bytes of snapshot in host memory.
            pace: how fast it may be written.
            path: the item's directory, which need not exist yet.
            fingerprints: what the saves before held.
        """
        self.recorder = Recorder(path, options.on_timeline)
        self._prepared, self._options, self._limit_bytes = prepared, options, limit_bytes
        self._path, self._pace, self._fingerprints = path, pace, fingerprints
        self.synced_directories: set[Inode] = set()
        self._evidence = prover_of(prepared.plan).due(prepared.plan, options.verify_snapshot)
        self._texts: dict[str, str] = {}
        self._lock = threading.Lock()
        self._state = State.SNAPSHOT
        self._error: SaveError | None = None
        self._write_began = self._write_ended = False
        self._snapshot_raised = False
        self._past_staging, self._ended = threading.Event(), threading.Event()
        self._leases: list[Lease] = []
        self._arriving: list[weakref.ref[Any]] = []
        self._on_device: queue.SimpleQueue[Held | None] = queue.SimpleQueue()
        self._on_host: queue.SimpleQueue[tuple[Held, Lease] | None] = queue.SimpleQueue()
        self._stager = threading.Thread(
            target=self._bring_to_host, name="lazy_orbax-stage", daemon=True
        )

    @property
    def is_over(self) -> bool:
        """Whether it is durable or has failed."""
        return self._state in _OVER

    def _move(self, state: State, error: SaveError | None = None) -> bool:
        """Moves the state forward. Returns whether the save was not over yet."""
        with self._lock:
            if self._state in _OVER:
                return False
            self._state, self._error = state, error
            if state in _OVER:
                self._ended.set()
        self._past_staging.set()
        HOST_BUDGET.wake()
        return True

    def fail(self, error: BaseException) -> None:
        """Ends the save with `error` as its cause, unless it is over."""
        failure = error if isinstance(error, SaveError) else save_error(self._path, error)
        if failure is not error:
            failure.__cause__ = error
        if self._move(State.FAILED, failure):
            self.recorder.end(error=failure)

    def abandon(self, error: BaseException) -> None:
        """Ends the save with `error`, and drops what it holds unless `write` is about to."""
        self.fail(error)
        if not self._write_began:
            self._drop()

    def forget(self) -> None:
        """Takes the save off the list that `wait_until_staged` goes through: it was told of."""
        in_flight.discard(self)

    @property
    def failure(self) -> SaveError | None:
        """What the save failed with, if it has."""
        return self._error

    @property
    def write_began(self) -> bool:
        """Whether the directory existed in time for `write`."""
        return self._write_began

    @property
    def is_writing(self) -> bool:
        """Whether `write` is at work."""
        return self._write_began and not self._write_ended

    @property
    def own_directories(self) -> list[str]:
        """Names of the directories in the item's that only this process writes to."""
        return own_directories(self._prepared.format)

    def _drop(self) -> None:
        """Waits for our thread and returns every byte."""
        if self._stager.ident is not None:
            self._stager.join()
        for waiting in (self._on_device, self._on_host):
            while not waiting.empty():
                waiting.get()
        for lease in self._leases:
            lease.release()

    def wait_until_staged(self, timeout_s: float | None) -> None:
        """Waits until every byte is in host memory.

        Raises:
            SaveError: the save has failed.
            TimeoutError: it is not staged yet.
        """
        if not self._past_staging.wait(timeout_s):
            raise TimeoutError(f"{self._path} was not staged within {timeout_s} s.")
        self.forget()
        if self._error is not None:
            raise self._error

    # The caller's thread.

    def snapshot(self, leaves: Sequence[Any]) -> None:
        """Puts every byte out of reach of donation. The caller may donate when this returned.

        Args:
            leaves: the leaves of the tree that was prepared.

        Raises:
            SaveError: it failed. Nothing is held then.
        """
        plan, keys = self._prepared.plan, set(self._prepared.keys)
        others = [(leaf.name, leaves[i]) for i, leaf in self._prepared.others]
        self._texts = {name: value for name, value in others if isinstance(value, str)}
        mine = [
            jax.random.key_data(leaves[i]) if i in keys else leaves[i]
            for i in self._prepared.positions
        ]
        in_flight.add(self)
        self._stager.start()
        room, modes = Room(self._options.mode), set()
        try:
            if self._evidence is not None:
                self._evidence.take(mine)
            for slab in plan.slabs:
                mode = room.mode_for(slab)
                modes.add(mode)
                if mode == "stage" and not snapshot.is_in_host_memory(slab):
                    self._on_device.put(snapshot.take(plan, slab, mine, mode))
                else:
                    # Not through our thread: it may be waiting for the very bytes of this slab.
                    kind = snapshot.reusable(plan, slab) if mode == "stage" else None
                    lease = self._reserve(slab, kind, exists=mode == "in_step")
                    held = snapshot.take(plan, slab, mine, mode, lease.buffer)
                    self._arriving += [weakref.ref(array) for array in held.arrays]
                    self._on_host.put((held, lease))
                    del held
        except BaseException as error:
            self._snapshot_raised = True
            self._on_device.put(None)
            self.abandon(error)
            self.forget()
            if isinstance(error, Exception) and self._error is not None:
                raise self._error  # noqa: B904 - It has its own cause, perhaps of another thread.
            raise
        self._on_device.put(None)
        device_modes = sorted(modes - {"host"}, reverse=True)
        mode = "+".join(device_modes) or "host"
        self.recorder.note(mode=mode, reason=room.reason, bytes_written=plan.n_bytes)
        self.recorder.mark("enqueued")

    def _reserve(self, slab: Slab, kind: Any = None, *, exists: bool = False) -> Lease:
        start_s = time.perf_counter()
        limit_bytes = self._limit_bytes
        if exists:
            lease = HOST_BUDGET.count(slab.n_bytes, limit_bytes=limit_bytes)
        else:
            lease = HOST_BUDGET.reserve(
                slab.n_bytes, limit_bytes=limit_bytes, aborted=lambda: self.is_over, kind=kind
            )
        if threading.current_thread() is not self._stager:
            waited_s = self.recorder.timeline.waited_s + time.perf_counter() - start_s
            self.recorder.note(waited_s=waited_s)
        with self._lock:
            if self._state not in _OVER:
                self._leases.append(lease)
                return lease
        lease.release()
        raise ReservationAborted("The save is over.")

    # Our thread.

    def _bring_to_host(self) -> None:
        """Copies what was staged on the device to the host, as the budget lets it."""
        if self._options.low_priority:
            yield_to_training()
        try:
            while (held := self._on_device.get()) is not None:
                lease = self._reserve(held.slab)
                self._on_host.put((snapshot.to_host(held), lease))
                del held  # The device copy dies here.
            for arriving in self._arriving:
                snapshot.await_arrival(arriving())
            if self._move(State.STAGED):
                self.recorder.mark("staged")
        except BaseException as error:  # noqa: BLE001 - `write` raises it, in Orbax's thread.
            self.fail(error)
        finally:
            self._on_host.put(None)
        plan, every = self._prepared.plan, self._options.verify_snapshot
        prover_of(plan).begin_to_prepare(plan, every, lower_priority=yield_to_training)

    # Orbax's commit thread.

    def write(self, directory: str, custom_metadata: Any) -> None:
        """Writes the snapshot to `directory` and returns when it is durable.

        Args:
            directory: the item's directory, which exists.
            custom_metadata: JSON-serializable, stored beside the tree.

        Raises:
            SaveError: something failed, here or on the way to the host.
        """
        self._write_began = True
        if self._options.low_priority:
            yield_to_training()
        try:
            if not self.is_over:
                prepared, timeout_s = self._prepared, self._options.storage_timeout_s
                writer = Writer(prepared.plan, prepared.format, directory, timeout_s=timeout_s)
                writer.evidence = self._evidence
                with contextlib.closing(writer):
                    plan, pace, ended = prepared.plan, self._pace, self._ended
                    drain(self._on_host, writer, plan, pace=pace, ended=ended)
                    if not self.is_over:
                        fingerprint = writer.finish(custom_metadata, self._texts)
                        self._fingerprints.compare(self.recorder, fingerprint)
                        self.synced_directories = writer.synced_directories
                self._move(State.DURABLE)
        except BaseException as error:  # noqa: BLE001 - Raised below.
            self.fail(error)
            traceback.clear_frames(error.__traceback__)  # They hold slabs.
        self._drop()
        self._write_ended = True
        give_back_memory()
        if self._error is None:
            self.recorder.mark("durable")
        elif not self._snapshot_raised:
            raise self._error
