"""Whole steps of a run in the memory of this machine, and the trees that they are."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from lazy_orbax.errors import KeeperError, LazyOrbaxError
from lazy_orbax.storage import threads
from lazy_orbax.tiers.kept_tree import KeptTree
from lazy_orbax.tiers.shelf import Shelf
from lazy_orbax.tiers.snapshot_file import Snapshot, SnapshotError, held, read_snapshot
from lazy_orbax.timeline import RestoreRecorder


class KeptStep(NamedTuple):
    """A step in one life of its job.

    Attributes:
        step: the step.
        items: the snapshots of each item, of one process or of several.
    """

    step: int
    items: dict[str, list[Snapshot]]

    @property
    def written_s(self) -> float:
        """When the last of it was written."""
        return max(one.facts["written_s"] for each in self.items.values() for one in each)

    def values(self) -> dict[str, Any]:
        """Returns the tree of each item, with NumPy arrays; every byte is compared first.

        Raises:
            NotAtHandError: other machines have some of it.
            CorruptCheckpointError: a piece is not what was put there.
            SnapshotError: a snapshot makes no sense.
        """
        recorder = RestoreRecorder(str(self.step))
        return {
            item: KeptTree(snapshots).restored(None, recorder, on_devices=False)
            for item, snapshots in self.items.items()
        }

    @property
    def life(self) -> int:
        """In which life of the job it was taken."""
        return next(one.facts["life"] for each in self.items.values() for one in each)

    def refuse_parts(self, here: Sequence[int] | None = None) -> None:
        """Refuses a step of which the snapshot of a process is not here.

        Args:
            here: the processes that are to be; `None`: all.

        Raises:
            KeeperError: there is such a process.
        """
        for item, snapshots in self.items.items():
            wanted = range(max(one.facts["processes"] for one in snapshots))
            missing = set(wanted if here is None else here)
            missing -= {one.facts["process"] for one in snapshots}
            if missing:
                whose = f"all {len(wanted)} processes" if here is None else f"{list(here)}"
                raise KeeperError(
                    f"step {self.step} of the item {item}: found no snapshot of process "
                    f"{min(missing)} in {snapshots[0].path.rpartition('/')[0]}, wanted those of "
                    f"{whose}"
                )

    def refuse_other(self) -> None:
        """Refuses a step if somebody has begun to write over it since it was found.

        Raises:
            SnapshotError: somebody has.
            OSError: it is gone.
        """
        for snapshots in self.items.values():
            for one in snapshots:
                if read_snapshot(one.path).facts != one.facts:
                    raise SnapshotError(f"{one.path} was written over meanwhile")

    @property
    def paths(self) -> list[str]:
        """Its files."""
        return [one.path for snapshots in self.items.values() for one in snapshots]


@contextlib.contextmanager
def held_steps(shelf: Shelf, run: str) -> Iterator[list[KeptStep]]:
    """Yields the steps of a run, as `kept_steps` does; nobody writes over the first of them.

    A trainer that would goes on, and passes over a step.

    Args:
        shelf: where the snapshots are.
        run: the name of the run.
    """
    with contextlib.ExitStack() as first:
        with held_all(shelf):  # For the moment that it takes to look.
            found = kept_steps(shelf, run)
            for kept in found[:1]:
                first.enter_context(held(kept.paths))
        yield found


@contextlib.contextmanager
def held_all(shelf: Shelf) -> Iterator[None]:
    """Keeps all that is in memory from being written over. Trainers pass over steps meanwhile."""
    with contextlib.ExitStack() as everything:
        for file in shelf.files():
            with contextlib.suppress(SnapshotError, OSError):
                everything.enter_context(held([shelf.path_of(file)]))
        yield


@contextlib.contextmanager
def held_for(shelf: Shelf, most_s: float) -> Iterator[None]:
    """Does what `held_all` does, for a while: whoever waits for storage meanwhile may hang.

    Args:
        shelf: where the snapshots are.
        most_s: most seconds. Afterwards trainers write again, whatever goes on here.
    """
    is_over = threading.Event()
    with contextlib.ExitStack() as holding:
        holding.enter_context(held_all(shelf))
        release = lambda: None if is_over.wait(most_s) else holding.close()  # noqa: E731
        threads.run(release, "lazy_orbax-hold")
        try:
            yield
        finally:
            is_over.set()


UNUSABLE = (LazyOrbaxError, SnapshotError, OSError)
"""What says that a step in memory cannot be used, and another may be."""


def kept_steps(shelf: Shelf, run: str) -> list[KeptStep]:
    """Returns the steps that have all items, those of the latest life first, the newest first.

    What an earlier life has beyond the latest one is left out: the job went back before that.

    Args:
        shelf: where the snapshots are.
        run: the name of the run.
    """
    found: dict[tuple[int, int], KeptStep] = {}
    for _, snapshot in shelf.snapshots():
        if isinstance(snapshot, Snapshot) and snapshot.facts["run"] == run:
            key = snapshot.step, snapshot.facts["life"]
            items = found.setdefault(key, KeptStep(snapshot.step, {})).items
            add_newest(items.setdefault(snapshot.facts["item"], []), snapshot)
    wanted = {item for kept in found.values() for item in kept.items}
    whole = [kept for kept in found.values() if set(kept.items) == wanted]
    whole.sort(key=_order, reverse=True)
    return [kept for kept in whole if kept.step <= whole[0].step]


def add_newest(snapshots: list[Snapshot], one: Snapshot) -> None:
    """Adds a snapshot to others of its step, unless its process took that step again since.

    Args:
        snapshots: of one item at one step in one life of the job, one of each process.
        one: another one.
    """
    for i, other in enumerate(snapshots):
        if other.facts["process"] == one.facts["process"]:
            snapshots[i] = max(other, one, key=lambda snapshot: snapshot.serial)
            return
    snapshots.append(one)


def _order(kept: KeptStep) -> tuple[int, int]:
    """Returns what grows from step to step of a life, and from life to life."""
    return kept.life, kept.step
