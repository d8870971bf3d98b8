"""One save in flight: what was snapshotted goes to the host, then to storage, slab by slab.

Three threads meet here. The caller's puts the bytes out of reach of donation, ours brings them to
the host, Orbax's commit thread writes them. What one has finished waits for the next in a queue.
"""

from __future__ import annotations

import contextlib
import enum
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from lazy_orbax._machine import give_back_memory, is_urgent, yield_to_training
from lazy_orbax.errors import SaveError
from lazy_orbax.integrity.proof import prover_of
from lazy_orbax.plan.slabs import Plan, Slab
from lazy_orbax.save import in_flight
from lazy_orbax.save.beside import Beside, PiecesBeside
from lazy_orbax.save.holding import Holding
from lazy_orbax.save.job import Job
from lazy_orbax.save.write_loop import drain
from lazy_orbax.save.writer import Writer
from lazy_orbax.snapshot import device_to_host
from lazy_orbax.snapshot.choose_mode import Room
from lazy_orbax.snapshot.compiling import compiling_of
from lazy_orbax.snapshot.host_budget import HOST_BUDGET, Lease, ReservationAborted
from lazy_orbax.storage.fsync import Inode
from lazy_orbax.storage.save_error import save_error


class State(enum.Enum):
    """Where the bytes of an item are."""

    SNAPSHOT = "on their way to host memory"
    STAGED = "all in host memory, or on storage already"
    DURABLE = "all on storage, synced; nothing is held"
    FAILED = "no more are copied or written; what is held is being returned"


_OVER = (State.DURABLE, State.FAILED)


class Save:
    """One save of one item.

    Invariant, under the lock: the state only moves forward, and once it is `DURABLE` or `FAILED`
    no lease of host memory is added.

    Attributes:
        recorder: its timeline, with what it failed with.
        synced_directories: where everything is synced when it is durable, below a local directory.
    """

    def __init__(self, job: Job):
        """Begins nothing yet: `snapshot` starts the work."""
        self.recorder = job.recorder
        self.synced_directories: set[Inode] = set()
        self._job, self._holding = job, Holding()
        self._lock, self._state = threading.Lock(), State.SNAPSHOT
        self._past_staging, self._ended = threading.Event(), threading.Event()
        self._stager = threading.Thread(
            target=self._bring_to_host, name="lazy_orbax-stage", daemon=True
        )

    @property
    def path(self) -> str:
        """The item's directory, as Orbax named it before it existed."""
        return self.recorder.path

    @property
    def is_over(self) -> bool:
        """Whether it is durable or has failed."""
        return self._state in _OVER

    @property
    def failure(self) -> SaveError | None:
        """What the save failed with, if it has."""
        error = self.recorder.timeline.error
        return error if isinstance(error, SaveError) else None

    @property
    def own_directories(self) -> Sequence[str]:
        """Names of the directories in the item's that only this process writes to."""
        return self._job.prepared.format.own_directories

    def _move(self, state: State, failure: SaveError | None = None) -> bool:
        """Moves the state forward. Returns whether the save was not over yet."""
        with self._lock:
            if self._state in _OVER:
                return False  # Whoever ended it first has said why; a later reason would hide that.
            if failure is not None:
                self.recorder.note(error=failure)
            self._state = state
            if state in _OVER:
                self._ended.set()  # A writer that waits for its pace need not any more.
        # Both ends of the host budget may wait for this: who reserves, and who waits for staging.
        self._past_staging.set()
        HOST_BUDGET.wake()
        return True

    def fail(self, error: BaseException) -> None:
        """Ends the save with `error` as its cause, unless it is over."""
        failure = error if isinstance(error, SaveError) else save_error(self.path, error)
        if failure is not error:
            failure.__cause__ = error
        if self._move(State.FAILED, failure):
            self.recorder.end(error=failure)

    def drop(self) -> None:
        """Returns every byte of a save that is over and that nobody will write."""
        # Our thread ends by itself, for a save that is over gets no lease; then nobody adds any.
        if self._stager.ident is not None:
            self._stager.join()
        self._holding.drop(self.failure)

    def forget(self) -> None:
        """Takes the save off the list that `wait_until_staged` goes through: it was told of."""
        in_flight.discard(self)

    def wait_until_staged(self, timeout_s: float | None) -> None:
        """Waits until every byte is in host memory.

        Raises:
            SaveError: the save has failed.
            TimeoutError: it is not staged yet.
        """
        if not self._past_staging.wait(timeout_s):
            raise TimeoutError(f"{self.path} was not staged within {timeout_s} s.")
        self.forget()
        if self.failure is not None:
            raise self.failure

    # The caller's thread.

    def take_along(self, beside: Beside | None) -> None:
        """Sets what else takes the pieces. Before `snapshot`."""
        self._holding.beside = beside

    def snapshot(self, arrays: Sequence[Any]) -> None:
        """Puts every byte out of reach of donation. The caller may donate when this returned.

        Where it raises, the save goes on holding what it has until it is failed and dropped.

        Args:
            arrays: the values of the plan's leaves, in order.
        """
        plan, modes = self._job.prepared.plan, set()
        room = Room(self._job.options.mode, plan)
        in_flight.add(self)
        try:
            self._stager.start()
        except BaseException as error:
            self._lose(error)
            self._holding.on_host.put(None)  # There is no thread that would say that none come.
            raise
        try:
            if self._job.evidence is not None:
                self._job.evidence.take(arrays)
            for slab in plan.slabs:
                modes.add(mode := room.mode_for(slab))
                self._put_out_of_reach(plan, slab, arrays, mode)
        except BaseException as error:
            self._lose(error)
            raise
        finally:
            # Also after a failure: our thread waits for it, and nobody else ends it.
            self._holding.on_device.put(None)
        mode = "+".join(sorted(modes - {"host"}, reverse=True)) or "host"
        self.recorder.note(mode=mode, reason=room.reason, bytes_written=plan.n_bytes)
        self.recorder.mark("enqueued")

    def _lose(self, error: BaseException) -> None:
        """Before the writer is told that no more comes, or it might take what there is for all."""
        self.forget()  # `save()` raises it.
        self.fail(error)

    def _put_out_of_reach(self, plan: Plan, slab: Slab, arrays: Sequence[Any], mode: str) -> None:
        if mode == "stage" and not device_to_host.is_in_host_memory(slab):
            # No lease yet: what is staged is memory of the device until our thread brings it.
            self._holding.on_device.put(device_to_host.take(plan, slab, arrays, mode))
            return
        # Not through our thread: it may be waiting for the very bytes of this slab.
        kind = device_to_host.reusable(plan, slab) if mode == "stage" else None
        start_s = time.perf_counter()
        lease = self._reserve(slab, kind, exists=mode == "in_step")
        waited_s = self.recorder.timeline.waited_s + time.perf_counter() - start_s
        self.recorder.note(waited_s=waited_s)
        # From here on the caller's arrays are out of it: what is held is our own copy.
        held = device_to_host.take(plan, slab, arrays, mode, lease.buffer)
        self._holding.arriving += [weakref.ref(array) for array in held.arrays]
        self._holding.on_host.put((held, lease))

    def _reserve(self, slab: Slab, kind: Any = None, *, exists: bool = False) -> Lease:
        limit_bytes = self._job.limit_bytes
        if exists:
            lease = HOST_BUDGET.count(slab.n_bytes, limit_bytes=limit_bytes)
        else:
            lease = HOST_BUDGET.reserve(
                slab.n_bytes, limit_bytes=limit_bytes, aborted=lambda: self.is_over, kind=kind
            )
        with self._lock:
            if self._state not in _OVER:
                self._holding.leases.append(lease)
                return lease
        # The save ended while this waited: `drop` may have been here, so this lease ends now.
        lease.release()
        raise ReservationAborted("The save is over.")

    # Our thread.

    def _bring_to_host(self) -> None:
        """Copies what was staged on the device to the host, as the budget lets it."""
        if self._job.options.low_priority:
            yield_to_training()
        holding = self._holding
        try:
            while (held := holding.on_device.get()) is not None:
                lease = self._reserve(held.slab)
                holding.on_host.put((device_to_host.to_host(held), lease))
                del held  # The device copy dies here.
            for arriving in holding.arriving:
                device_to_host.await_arrival(arriving())
            if self._move(State.STAGED):
                self.recorder.mark("staged")
        except BaseException as error:  # noqa: BLE001 - `write` raises it, in Orbax's thread.
            self.fail(error)
        finally:
            # The writer ends after what is in the queue, whether all is there or not.
            holding.on_host.put(None)
        plan, every = self._job.prepared.plan, self._job.options.verify_snapshot
        prover_of(plan).begin_to_prepare(plan, every, lower_priority=yield_to_training)

    # Orbax's commit thread.

    def write(self, directory: str, custom_metadata: Any) -> None:
        """Writes the snapshot to `directory`, and drops it. It is durable when this returned.

        Args:
            directory: the item's directory, which exists.
            custom_metadata: JSON-serializable, stored beside the tree.

        Raises:
            SaveError: something failed, here or on the way to the host.
        """
        self._run(lambda: self._write(directory, custom_metadata))
        give_back_memory()
        if self.failure is not None:
            raise self.failure
        self.recorder.mark("durable")

    def keep(self) -> None:
        """Hands the pieces to what was taken along, and to nothing else. In a thread of ours."""
        self._run(self._keep)
        self.forget()

    def _run(self, work: Callable[[], None]) -> None:
        """Does what makes the snapshot durable, and drops it."""
        if self._job.options.low_priority:
            yield_to_training()
        try:
            if not self.is_over:
                work()
                self._move(State.DURABLE)
        except BaseException as error:  # noqa: BLE001 - `failure` has it.
            self.fail(error)
            traceback.clear_frames(error.__traceback__)  # They hold slabs.
        # Written or not, nobody reads the slabs any more: their leases end here at the latest.
        self.drop()
        if self._job.options.mode != "direct" and not is_urgent():
            plan = self._job.prepared.plan
            compiling_of(plan).begin(plan, lower_priority=yield_to_training)

    def _write(self, directory: str, custom_metadata: Any) -> None:
        job, plan = self._job, self._job.prepared.plan
        writer = Writer(
            plan, job.prepared.format, directory, timeout_s=job.options.storage_timeout_s
        )
        writer.evidence, writer.beside = job.evidence, self._holding.beside
        with contextlib.closing(writer):
            if job.options.skip_unchanged:
                writer.link_unchanged()
            drain(self._holding.on_host, writer, plan, pace=job.pace, ended=self._ended)
            if not self.is_over:
                fingerprint = writer.finish(custom_metadata, job.texts)
                self.recorder.note(bytes_linked=writer.bytes_linked)
                job.fingerprints.compare(self.recorder, fingerprint)
                self.synced_directories = writer.synced_directories

    def _keep(self) -> None:
        job, beside = self._job, self._holding.beside
        assert beside is not None
        writer, on_host = PiecesBeside(beside), self._holding.on_host
        drain(on_host, writer, job.prepared.plan, pace=job.pace, ended=self._ended)
        if not self.is_over:
            beside.finish()
