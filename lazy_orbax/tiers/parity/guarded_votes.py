"""Votes on steps that count when they have parity."""

from __future__ import annotations

from collections.abc import Callable

from lazy_orbax.tiers.parity.files import Key
from lazy_orbax.tiers.parity.guard import Guard
from lazy_orbax.tiers.votes import Votes


class GuardedVotes(Votes):
    """Votes of a process whose snapshots count when they have parity."""

    def __init__(self, guard: Guard, item: str, life: int):
        """Begins to take part.

        Args:
            guard: which sees to parity.
            item: the item.
            life: the life of the job.
        """
        super().__init__(f"{life}/{item}")
        self._guard, self._item, self._life = guard, item, life
        self._is_first = True

    def is_common(self, step: int, *, timeout_s: float) -> bool | None:
        """Returns whether all processes have a step that this one has."""
        is_common = super().is_common(step, timeout_s=timeout_s)
        if is_common and self._is_first:
            self._is_first = False
            self._guard.forget_before(self._item, self._life)
        return is_common

    def settle(self, work: Callable[[], None]) -> None:
        """Runs what waits for parity where nobody waits for it."""
        self._guard.run(work)

    def tell(self, step: int, *, is_sealed: bool) -> None:
        """Tells the others what became of a step here, when it has parity or will have none."""
        key = Key(self._item, step, self._life)
        if not is_sealed:
            try:
                self._guard.lost(key)
            finally:
                super().tell(step, is_sealed=False)
            return
        has_parity = self._guard.exchange(key)
        super().tell(step, is_sealed=has_parity or self._guard.is_in_vain)
