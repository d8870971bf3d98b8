"""The training process of a soak: checks what is there, goes on from it, and saves often."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import logging
import os
import pathlib
import random
import signal
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import lazy_orbax
from benchmarks.soak import ledger as events
from benchmarks.soak.ledger import Ledger

KEPT = 4
SHAPES = ("many", "large", "mixed")
READY = "ready"


@dataclasses.dataclass(frozen=True)
class Options:
    """What one training process does: all of it drawn by the supervisor."""

    directory: str
    ledger: str
    shape: str
    seed: int
    seconds: float
    small_disk: bool
    flipped: int | None
    mode: str
    host_bytes: int
    write_bytes_per_s: int | None
    keywords: dict[str, bool]
    logs: bool


def state_of(shape: str) -> Any:
    """Returns a state over all devices: 200 small leaves, 4 of 2 MiB, or one of each kind."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))

    def put(array: Any, *spec: Any) -> jax.Array:
        return jax.device_put(array, NamedSharding(mesh, P(*spec)))

    rng = np.random.default_rng(0)
    if shape == "many":
        arrays = rng.integers(0, 2**32, (200, 64, 16), dtype=np.uint32)
        return {f"leaf_{i}": {"kernel": put(one, "x")} for i, one in enumerate(arrays)}
    if shape == "large":
        arrays = rng.integers(0, 2**32, (4, 512, 1024), dtype=np.uint32)
        return [put(one, None, "x") for one in arrays]
    return {
        "half": put(rng.integers(0, 2**16, (256, 64), dtype=np.uint16), "x"),
        "bytes": put(rng.integers(0, 2**8, (33, 7), dtype=np.uint8)),
        "count": put(np.uint32(0)),
        "nested": [{"w": put(rng.integers(0, 2**32, (8, n), dtype=np.uint32))} for n in (1, 3, 5)],
    }


@jax.jit
def _copied(state: Any) -> Any:
    return jax.tree.map(jnp.copy, state)


def digest_of(state: Any) -> str:
    """Returns a digest of every leaf's bits, key path, shape and dtype."""
    digest = hashlib.blake2b(digest_size=16)
    for path, leaf in jax.tree_util.tree_leaves_with_path(_copied(state)):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def check(options: Options, ledger: Ledger, target: Any) -> dict[int, str]:
    """Restores all that is there, and notes what is lost or wrong.

    Returns:
        The digest that each step must have.
    """
    # A step is saved again only where it was not published: what it held before is not right then.
    noted = ledger.read()
    digests = {one["step"]: one["digest"] for one in noted if one["event"] == events.SAVING}
    known = {one["step"] for one in noted if one["event"] == events.COMMITTED}
    with ocp.CheckpointManager(options.directory) as manager:
        listed = set(manager.all_steps())
    # A later step may have been committed, and an older one retired, without anybody noting it.
    kept = sorted(listed | known)[-KEPT:]
    for step in kept:
        if step not in listed:
            ledger.note(events.LOST, step=step, why="it is not listed")
    rng = random.Random(options.seed)
    for step in sorted(listed):
        flipped = step == options.flipped
        # Stock Orbax does not notice a changed byte, and need not.
        stock = rng.random() < 0.5 and not flipped
        handler = ocp.StandardCheckpointHandler() if stock else lazy_orbax.standard_handler()
        path = pathlib.Path(options.directory) / str(step) / "default"
        try:
            with ocp.Checkpointer(handler) as checkpointer:
                found = checkpointer.restore(path, args=ocp.args.StandardRestore(target))
        except Exception as error:  # noqa: BLE001
            # Killed while it removes an old step, Orbax leaves a part of it, listed.
            fate = events.LOST if step in kept else events.HALF_RETIRED
            fate = events.DETECTED if flipped else fate
            ledger.note(fate, step=step, kept=kept, stock=stock, why=repr(error)[:500])
            continue
        is_right = digest_of(found) == digests.get(step)
        if flipped:
            ledger.note(events.HARMLESS if is_right else events.SILENT, step=step)
        else:
            ledger.note(events.RESTORED if is_right else events.WRONG, step=step, stock=stock)
    return digests


def train(options: Options) -> None:
    """Checks what is there, goes on from the newest step, and saves often."""
    logging.disable()  # Orbax tells of every save.
    ledger = Ledger(pathlib.Path(options.ledger))
    leave: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: leave.append(1))
    state = state_of(options.shape)
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    digests = check(options, ledger, target)
    print(READY, flush=True)
    if options.seconds <= 0:
        return
    change = jax.jit(
        lambda tree: jax.tree.map(lambda x: x * x.dtype.type(3) + x.dtype.type(1), tree),
        donate_argnums=0,
    )
    end = time.monotonic() + options.seconds
    with _manager(options) as manager:
        failed = lazy_orbax.log_failed_saves(manager) if options.logs else None
        step = manager.latest_step() or 0
        if step:
            state = manager.restore(step, args=ocp.args.StandardRestore(target))
            is_right = digest_of(state) == digests.get(step)
            ledger.note(events.RESTORED if is_right else events.WRONG, step=step, stock=False)
        loop = _Loop(options, ledger, manager, change, failed)
        while time.monotonic() < end and not leave:
            for _ in range(loop.rng.randrange(1, 4)):
                state, step = change(state), step + 1
            state = loop.save(step, state)
            step += 1
        loop.finish()


def _manager(options: Options) -> ocp.CheckpointManager:
    lazy = lazy_orbax.standard_handler(
        options=lazy_orbax.LazyOptions(
            mode=options.mode,  # type: ignore[arg-type]
            host_bytes=options.host_bytes,
            slab_bytes=2**20,
            write_bytes_per_s=options.write_bytes_per_s,
        ),
        **options.keywords,
    )
    manager_options = ocp.CheckpointManagerOptions(max_to_keep=KEPT, cleanup_tmp_directories=True)
    return ocp.CheckpointManager(options.directory, item_handlers=lazy, options=manager_options)


class _Loop:
    """Saves, and notes of each save what became of it.

    Args:
        failed: where the manager logs failures; `None` where it raises them.
    """

    def __init__(
        self,
        options: Options,
        ledger: Ledger,
        manager: ocp.CheckpointManager,
        change: Any,
        failed: lazy_orbax.reports.FailedSaves | None,
    ):
        self._options, self._ledger, self._manager = options, ledger, manager
        self._change, self._failed = change, failed
        self._n_logged = 0  # Of the logged failures, how many are noted.
        self._pending: int | None = None  # The step that is in flight.
        self._refused: int | None = None  # The step before, if a full disk refused it.
        self.rng = random.Random(options.seed)

    def save(self, step: int, state: Any) -> Any:
        """Begins to save, at times on a disk that is full, and returns the next state."""
        is_full = self._options.small_disk and self.rng.random() < 0.1
        self._ledger.note(
            events.SAVING,
            step=step,
            digest=digest_of(state),
            bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(state)),
            full=is_full,
        )
        with _full(self._options.directory, self.rng) if is_full else contextlib.nullcontext():
            try:
                has_begun = self._manager.save(step, args=ocp.args.StandardSave(state))
                self._note_pending(is_full)  # `save` waited for the one before.
                if not has_begun:
                    last = self._failed.last if self._failed else None
                    raise last or RuntimeError("the manager did not save")
                self._pending = step
                state = self._change(state)
                if is_full or self.rng.random() < 0.3:
                    self._manager.wait_until_finished()
                    self._note_pending(is_full)
            except Exception as error:  # noqa: BLE001
                self._note_failed(step, error, is_full)
        return state

    def finish(self) -> None:
        try:
            self._manager.wait_until_finished()
            self._note_pending(is_full=False)
        except Exception as error:  # noqa: BLE001
            self._note_failed(self._pending, error, is_full=False)

    def _note_pending(self, is_full: bool) -> None:
        """Notes what became of the step in flight, of which no failure was raised."""
        n_logged = self._failed.count if self._failed else 0
        if self._pending is not None:
            if n_logged > self._n_logged and not self._is_published(self._pending):
                assert self._failed is not None
                self._note_one_failed(self._pending, self._failed.last, is_full)
            else:
                self._ledger.note(events.COMMITTED, step=self._pending)
                self._refused = None
        self._pending, self._n_logged = None, n_logged

    def _note_failed(self, step: int | None, error: Exception, is_full: bool) -> None:
        """Notes what became of `step`, and of the one before that was still in flight."""
        if self._pending not in (None, step):
            # Which of the two failed does not follow from the error. What is published must stay.
            if self._is_published(self._pending):
                self._note_pending(is_full)
            else:
                self._note_one_failed(self._pending, error, is_full)
        self._pending = None
        self._note_one_failed(step, error, is_full)

    def _note_one_failed(self, step: int | None, error: Exception | None, is_full: bool) -> None:
        # Orbax tells of a failure twice where its own files were refused as well.
        is_told_again = self._refused is not None and (
            getattr(error, "step", None) == self._refused
            or getattr(error, "errno", None) == errno.ENOSPC
        )
        self._ledger.note(
            events.FAILED,
            step=step,
            expected=is_full or is_told_again,
            again=is_told_again and not is_full,
            why=repr(error)[:500],
        )
        self._refused = step if is_full else None

    def _is_published(self, step: int | None) -> bool:
        return (pathlib.Path(self._options.directory) / str(step)).is_dir()


def balloon_of(directory: str) -> pathlib.Path:
    """Returns the file that fills the disk of `directory`."""
    return pathlib.Path(directory).parent / "balloon"


@contextlib.contextmanager
def _full(directory: str, rng: random.Random) -> Iterator[None]:
    """Fills the small disk up to some random rest."""
    balloon = balloon_of(directory)
    found = os.statvfs(directory)
    free = found.f_bavail * found.f_frsize
    # A save in flight may have taken what was free: then the disk is full already.
    with contextlib.suppress(OSError), balloon.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, free - rng.randrange(2**21)))
    try:
        yield
    finally:
        balloon.unlink(missing_ok=True)
