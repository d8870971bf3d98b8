"""Which saves are verified: of each item of each tree, every so many."""

from __future__ import annotations

import dataclasses
import threading
import weakref

from lazy_orbax.integrity.proof import Evidence, prover_of
from lazy_orbax.plan.slabs import Plan


@dataclasses.dataclass
class _Item:
    """An item that is saved by one plan.

    Attributes:
        n_saves: how many of its saves have begun.
        last: the number of the last one that was looked at, and what is set once it is proven.
    """

    n_saves: int = 0
    last: tuple[int, threading.Event] | None = None


class Turns:
    """Whose turn it is, of the saves of one handler.

    Plans are shared by all handlers and items that save the same tree; turns are not, or else one
    item might have all of them.

    Invariant, under the lock: each save that has begun is counted once, at its plan and item.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._items: weakref.WeakKeyDictionary[Plan, dict[str, _Item]] = weakref.WeakKeyDictionary()

    def next(self, plan: Plan, item: str, every: int) -> Evidence | None:
        """Returns what becomes the evidence for a save that begins, or `None`.

        A save that was looked at and not proven did not have its turn: whatever it failed for, the
        next one is looked at as well.

        Args:
            plan: the plan of the save.
            item: what the saves of one item have in common.
            every: `LazyOptions.verify_snapshot`. Where it is 1 the first save waits until the
                programs are compiled; else none does.
        """
        prover = prover_of(plan)
        with self._lock:
            counted = self._items.setdefault(plan, {}).setdefault(item, _Item())
            counted.n_saves += 1
            prover.note_save(counted.n_saves)
            if not every or not (every == 1 or prover.is_ready):
                return None
            if counted.last is not None:
                number, is_proven = counted.last
                if is_proven.is_set() and counted.n_saves - number < every:
                    return None
            evidence = Evidence(plan, prover)
            counted.last = counted.n_saves, evidence.is_proven
            return evidence
