"""Which saves are verified: of each item of each tree, every so many."""

from __future__ import annotations

import dataclasses
import threading
import weakref

from lazy_orbax.integrity.proof import Evidence, prover_of
from lazy_orbax.plan.slabs import Plan

# Items that are remembered of a plan. Who gives each save a name of its own has ever new ones.
_MOST_ITEMS = 100
# So many saves of a plan, of any items, count as one more of one item.
_OF_ANY_ITEM = 10


@dataclasses.dataclass
class _Counted:
    """Saves by one plan.

    Attributes:
        n_saves: how many have begun.
        last: the number of the last one that was looked at, and what is set once it is proven.
    """

    n_saves: int = 0
    last: tuple[int, threading.Event] | None = None

    def was_looked_at(self, every: int) -> bool:
        """Whether one of the last `every` saves was looked at, and was not found wrong."""
        return (
            self.last is not None and self.last[1].is_set() and self.n_saves - self.last[0] < every
        )


@dataclasses.dataclass
class _Plan:
    """Saves by one plan: all of them, and those of each item. Who saved last is the last item."""

    all: _Counted = dataclasses.field(default_factory=_Counted)
    items: dict[str, _Counted] = dataclasses.field(default_factory=dict)

    def count(self, item: str) -> _Counted:
        """Counts a save that begins. Returns what is known of its item."""
        counted = self.items[item] = self.items.pop(item, None) or _Counted()
        if len(self.items) > _MOST_ITEMS:
            del self.items[next(iter(self.items))]
        counted.n_saves += 1
        self.all.n_saves += 1
        return counted

    def is_due(self, counted: _Counted, every: int) -> bool:
        """Whether a save of an item, which was counted, is to be looked at."""
        if counted.last is not None:
            return not counted.was_looked_at(every)
        # Its first save of all need not be looked at where another item's was, just before: who
        # begins a run, or ten, of a tree that is known pays no more than who goes on with one.
        return counted.n_saves >= every or not self.all.was_looked_at(every)


class Turns:
    """Whose turn it is, of all the saves of this process.

    Plans are shared by all items that save the same tree; turns are not, or else one item might
    have all of them. They are shared by handlers, for a handler may be made for one save.

    Invariant, under the lock: each save that has begun is counted once, at its plan and item.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._plans: weakref.WeakKeyDictionary[Plan, _Plan] = weakref.WeakKeyDictionary()

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
            saves = self._plans.setdefault(plan, _Plan())
            counted = saves.count(item)
            prover.note_save(max(counted.n_saves, saves.all.n_saves // _OF_ANY_ITEM))
            if not every or not (every == 1 or prover.is_ready):
                return None
            if not saves.is_due(counted, every):
                return None
            evidence = Evidence(plan, prover)
            counted.last = counted.n_saves, evidence.is_proven
            saves.all.last = saves.all.n_saves, evidence.is_proven
            return evidence


TURNS = Turns()
