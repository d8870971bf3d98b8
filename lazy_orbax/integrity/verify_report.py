"""What `verify` tells of a checkpoint."""

from __future__ import annotations

import dataclasses

from lazy_orbax.errors import Problem
from lazy_orbax.view.blocks import Block, Lines
from lazy_orbax.view.viewed import Viewed


@dataclasses.dataclass(frozen=True)
class ItemReport:
    """What was found of one item.

    Attributes:
        directory: the item's directory.
        n_leaves: leaves that were read and compared with their digests.
        n_bytes: their size, in bytes.
        not_covered: what has no digest, and was therefore not looked at.
        problems: what is not as it was saved.
    """

    directory: str
    n_leaves: int
    n_bytes: int
    not_covered: tuple[str, ...]
    problems: tuple[Problem, ...]

    @property
    def is_covered(self) -> bool:
        """Whether there are digests."""
        return self.n_leaves > 0 or bool(self.problems)


@dataclasses.dataclass(frozen=True)
class VerifyReport(Viewed):
    """What `verify` found.

    Attributes:
        path: what was verified.
        items: the items, one after the other.
        problems: what is wrong beside them: not committed, no item, broken metadata of a step.
    """

    path: str
    items: tuple[ItemReport, ...]
    problems: tuple[Problem, ...]

    @property
    def all_problems(self) -> tuple[Problem, ...]:
        """Everything that is wrong."""
        return self.problems + tuple(p for item in self.items for p in item.problems)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong with what is covered. See `ItemReport.not_covered`."""
        return not self.all_problems

    @property
    def is_whole(self) -> bool:
        """Whether nothing is wrong, and something is covered."""
        return self.ok and any(item.is_covered for item in self.items)

    def blocks(self) -> tuple[Block, ...]:
        """Returns what there is to see."""
        parts = [Lines(tuple(f"{self.path}: {p}" for p in self.problems), "problem")]
        for item in self.items:
            state = "CORRUPT" if item.problems else "ok" if item.is_covered else "not covered"
            what = f"{item.directory}: {state}, {item.n_leaves} leaves, {item.n_bytes} bytes"
            parts += [
                Lines((what,), "problem" if item.problems else "note"),
                Lines(tuple(f"  {problem}" for problem in item.problems), "problem"),
                Lines(tuple(f"  not covered: {name}" for name in item.not_covered)),
            ]
        return tuple(part for part in parts if part.lines)
