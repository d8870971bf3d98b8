"""The places of all items of one process, and what became of its snapshots."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import secrets
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax

from lazy_orbax.errors import KeeperError
from lazy_orbax.pods import consensus
from lazy_orbax.storage import threads
from lazy_orbax.tiers.keeper_link import KeeperLink
from lazy_orbax.tiers.kept_layout import KeptLayout
from lazy_orbax.tiers.parity.guard import Guard
from lazy_orbax.tiers.parity.guarded_votes import GuardedVotes
from lazy_orbax.tiers.shelf import Shelf
from lazy_orbax.tiers.slot import Slot, Writing
from lazy_orbax.tiers.snapshot_file import HeldError, Snapshot
from lazy_orbax.tiers.votes import Votes

_LOG = logging.getLogger("lazy_orbax")
# A second, in nanoseconds.
_APART = 10**9


@dataclasses.dataclass(frozen=True)
class KeeperReport:
    """What became of the snapshots of one process so far.

    Attributes:
        kept: snapshots that are, or were, whole in memory.
        skipped: steps that were passed over, because the one before was still being copied, or the
            one before that was being read, to go to a tier.
        failed: snapshots that failed.
        newest_step: the step of the newest whole one of this process's life; `None`: there is none.
        error: why the last one failed, if it did.
    """

    kept: int = 0
    skipped: int = 0
    failed: int = 0
    newest_step: int | None = None
    error: str | None = None


class _Offer(NamedTuple):
    """The newest step of an item in this life of the job.

    Attributes:
        step: the step, kept or not.
        is_along: whether a save to storage offered it, and `Keeper.save` has not yet.
        is_kept: whether that save took it along.
    """

    step: int = -1
    is_along: bool = False
    is_kept: bool = False


class Slots:
    """The places of all items of one process.

    Invariant, under the lock: `report` counts each snapshot once, when its fate is known.

    Attributes:
        shelf: the directory in memory.
        life: which life of the job this is: when it began, in nanoseconds since 1970. A later life
            has a higher number, where clocks go back too.
        report: what became of the snapshots so far.
        guard: sees to parity on other machines; `None`: nobody does.
    """

    def __init__(self, shelf: Shelf, link: KeeperLink, run: str, guard: Guard | None = None):
        """Begins with none.

        Args:
            shelf: where they are.
            link: whom to ask for room.
            run: the name of the run.
            guard: sees to parity on other machines, where that is wanted.
        """
        self.shelf, self.life, self.report = shelf, 0, KeeperReport()
        self.guard = guard
        self._link, self._run, self._lock = link, run, threading.Lock()
        self._slots: dict[str, Slot] = {}
        self._offered: dict[str, _Offer] = {}

    def begin_life(self, restored: Mapping[str, str] | None = None) -> None:
        """Tells snapshots from now on apart from those before. Every process must call it.

        A step that is taken a second time, from an older state, may come to other values: nobody
        may put snapshots of both together.

        Args:
            restored: the file of each item with which this life begins.
        """
        known = [one.facts["life"] for one in self._known() if one.facts["run"] == self._run]
        # Where clocks went back, machines that are away may have what came after the same life:
        # another number than this one, whenever they are back.
        earliest = max([self.life, *known]) + 1 + secrets.randbelow(_APART)
        self._live(consensus.highest(max(time.time_ns(), earliest)), restored)

    def _known(self) -> Iterator[Snapshot]:
        for _, found in itertools.chain(self.shelf.snapshots(), self.shelf.parities()):
            if isinstance(found, Snapshot):
                yield found

    def offer(self, step: int, item: str) -> bool:
        """Hears of a step before it is taken. Every process must call it, with the same steps.

        Where steps go back, the caller has gone on from an older state: a new life begins, as soon
        as the snapshot that is on its way has ended.

        Args:
            step: the step.
            item: the item.

        Returns:
            Whether it is still to be taken: no save to storage took it along.
        """
        last = self._offered.get(item, _Offer())
        if last.is_along and last.step == step:
            self._offered[item] = _Offer(step)
            return not last.is_kept
        if step <= last.step:
            # All come to the same number, and need not meet for that.
            self._live(self.life + 1)
        self._offered[item] = _Offer(step)
        return True

    def _live(self, life: int, restored: Mapping[str, str] | None = None) -> None:
        self.life = life
        self._offered.clear()
        for item in {*self._slots, *(restored or {})}:
            path = (restored or {}).get(item)
            self._slot(item).begin_life(self._votes(item), path)

    def _votes(self, item: str) -> Votes:
        if self.guard is not None:
            return GuardedVotes(self.guard, item, self.life)
        return Votes(f"{self.life}/{item}")

    def begin(
        self, step: int, item: str, layout: KeptLayout, texts: dict[str, str]
    ) -> Writing | None:
        """Returns a snapshot that may be written now; `None`: the one before is not done.

        Args:
            step: the step.
            item: the item.
            layout: what goes where.
            texts: the leaves that are strings, by name.

        Raises:
            TreeError: leaves cannot be kept.
        """
        layout.refuse_others()
        slot = self._slot(item)
        if not slot.begin():
            threads.run(functools.partial(self._tell_of_skipped, slot, step), "lazy_orbax-skip")
            with self._lock:
                self.report = dataclasses.replace(self.report, skipped=self.report.skipped + 1)
            _LOG.info("Step %d is not kept in memory: the one before is still copied.", step)
            return None
        facts = {
            "run": self._run,
            "item": item,
            "step": step,
            "life": self.life,
            "process": jax.process_index(),
            "processes": jax.process_count(),
            "written_s": time.time(),
            "texts": texts,
        }
        return Writing(slot, layout, facts, self._told)

    def begin_along(
        self, step: int, item: str, layout: KeptLayout, texts: dict[str, str]
    ) -> Writing | None:
        """Does what `begin` does, for a save to storage. `offer` may come before or after it."""
        if self._offered.get(item, _Offer()).step == step:
            return None
        self.offer(step, item)
        self._offered[item] = _Offer(step, is_along=True)
        writing = self.begin(step, item, layout, texts)
        self._offered[item] = _Offer(step, is_along=True, is_kept=writing is not None)
        return writing

    def _tell_of_skipped(self, slot: Slot, step: int) -> None:
        """Tells the other processes, which may be far away: the training does not wait for that."""
        try:
            slot.tell(step, is_sealed=False)
        except Exception as error:  # noqa: BLE001 - The job is ending, and training goes on.
            _LOG.info("Nobody can be told that step %d is not kept: %s", step, error)

    def _slot(self, item: str) -> Slot:
        with self._lock:
            if item not in self._slots:
                whose = (self._run, item, jax.process_index())
                self._slots[item] = Slot(self.shelf, self._link, whose, self._votes(item))
            return self._slots[item]

    def _told(self, writing: Writing, error: BaseException | None) -> None:
        if isinstance(error, HeldError):
            with self._lock:
                self.report = dataclasses.replace(self.report, skipped=self.report.skipped + 1)
            _LOG.info("Step %d is not kept in memory: %s.", writing.step, error)
            return
        if error is not None:
            self.failed(writing.step, error)
            return
        with self._lock:
            self.report = dataclasses.replace(
                self.report, kept=self.report.kept + 1, newest_step=writing.step, error=None
            )
        try:
            self._link.keep_up()
        except (KeeperError, OSError) as failure:
            _LOG.info("Nobody looks after the snapshots: %s", failure)

    def failed(self, step: int, error: BaseException) -> None:
        """Notes that a step could not be kept."""
        text = str(error) or type(error).__name__
        with self._lock:
            is_new = text != self.report.error
            self.report = dataclasses.replace(
                self.report, failed=self.report.failed + 1, error=text
            )
        if is_new:  # What fails at each step is said once.
            _LOG.warning("Step %d is not kept in memory: %s", step, text)

    def files(self, items: Sequence[str]) -> list[str]:
        """Returns the names of this process's files."""
        return [name for item in items for name in self._slot(item).names]

    def close(self) -> list[str]:
        """Lets go of the memory. Returns the names of the files."""
        names = self.files(list(self._slots))
        if self.guard is not None:
            names += self.guard.files(list(self._slots))
            self.guard.close()
        for slot in self._slots.values():
            slot.close()
        self._slots.clear()
        return names
