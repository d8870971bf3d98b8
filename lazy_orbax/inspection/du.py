"""What a run costs on storage: each step, and what is stored again and again."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import stat
from typing import Any

from lazy_orbax.errors import MalformedCheckpointError
from lazy_orbax.inspection.leaves import ItemLeaves
from lazy_orbax.inspection.looking import RUN, Seen, items_of, look
from lazy_orbax.inspection.ls import StepEntry, ls
from lazy_orbax.storage.fsync import Inode
from lazy_orbax.storage.places import place_of
from lazy_orbax.view.blocks import Block, Column, Lines, Node, Table, Tree
from lazy_orbax.view.text import counted, size_of
from lazy_orbax.view.viewed import Viewed

_MOST_SHOWN = 20
_STEPS = (
    Column("step", is_number=True),
    Column("size", is_number=True),
    Column("linked", is_number=True),
    Column("again", is_number=True),
    Column("state"),
)
_FIXED = (Column("never changes"), Column("size", is_number=True), Column("steps", is_number=True))


@dataclasses.dataclass(frozen=True)
class StepCost:
    """What a step takes.

    Attributes:
        step: its number, or `None` if its name tells none.
        path: the step's directory.
        state: as in `StepEntry`.
        n_bytes: bytes of its files, but for those that are hard links to a file of an older step:
            so each file is counted once.
        linked_bytes: bytes of these links.
        repeated_bytes: bytes of leaves that are stored again as they are in the step before it, by
            their digests; `None` where there are none to compare.
    """

    step: int | None
    path: str
    state: str
    n_bytes: int
    linked_bytes: int
    repeated_bytes: int | None


@dataclasses.dataclass(frozen=True)
class FixedLeaf:
    """A leaf that is the same in every step that has it.

    Attributes:
        item: the item that it is of.
        name: of the leaf, as Orbax names it.
        n_bytes: of its elements.
        n_steps: how many steps have it.
    """

    item: str
    name: str
    n_bytes: int
    n_steps: int


@dataclasses.dataclass(frozen=True)
class DiskUse(Viewed):
    """What `du` found.

    Attributes:
        path: the run.
        steps: what each takes, oldest first.
        fixed: the leaves that never change, by their digests, largest first.
        n_compared: how many steps have digests.
    """

    path: str
    steps: tuple[StepCost, ...]
    fixed: tuple[FixedLeaf, ...]
    n_compared: int

    @property
    def n_bytes(self) -> int:
        """Bytes of all steps."""
        return sum(step.n_bytes for step in self.steps)

    @property
    def uncommitted_bytes(self) -> int:
        """Bytes of steps that are not committed."""
        return sum(step.n_bytes for step in self.steps if step.state != "committed")

    @property
    def repeated_bytes(self) -> int:
        """Bytes of leaves that are stored again as they were in the step before."""
        return sum(step.repeated_bytes or 0 for step in self.steps)

    @property
    def linked_bytes(self) -> int:
        """Bytes of hard links to files of older steps, which are not stored again."""
        return sum(step.linked_bytes for step in self.steps)

    def blocks(self) -> tuple[Block, ...]:
        """Returns what there is to see."""
        rows = tuple(
            (
                str(step.step if step.step is not None else "-"),
                size_of(step.n_bytes),
                size_of(step.linked_bytes) if step.linked_bytes else "-",
                "-" if step.repeated_bytes is None else size_of(step.repeated_bytes),
                step.state,
            )
            for step in self.steps
        )
        wrong = frozenset(n for n, step in enumerate(self.steps) if step.state != "committed")
        shown: list[Block] = [Table(_STEPS, rows, self.path, wrong)]
        if self.fixed:
            largest = self.fixed[:_MOST_SHOWN]
            shown.append(
                Table(
                    _FIXED,
                    tuple(
                        (f"{leaf.item}/{leaf.name}", size_of(leaf.n_bytes), str(leaf.n_steps))
                        for leaf in largest
                    ),
                )
            )
        shown.append(Lines(tuple(self._summary())))
        return tuple(shown)

    def _summary(self) -> list[str]:
        kept = [step.n_bytes for step in self.steps if step.state == "committed"]
        lines = [f"{size_of(self.n_bytes)} in {counted(len(self.steps), 'step')}"]
        if kept:
            each = size_of(sum(kept) / len(kept))
            lines[0] += f": to keep one more costs {each}"
        if self.linked_bytes:
            lines.append(f"{size_of(self.linked_bytes)} more are linked to older steps' files")
        if self.uncommitted_bytes:
            wasted = size_of(self.uncommitted_bytes)
            lines.append(f"{wasted} in steps that are not committed: see clean")
        if self.n_compared > 1:
            n, again = len(self.fixed), size_of(self.repeated_bytes)
            lines.append(f"{n} leaves never change; {again} are stored again as they were")
        else:
            lines.append("which leaves never change is not known: too few steps have digests")
        return lines

    def tree(self) -> Tree:
        """Returns the steps as a tree of sizes."""
        nodes = tuple(
            Node(step.path.rpartition("/")[2], size_of(step.n_bytes), step.n_bytes)
            for step in self.steps
        )
        return Tree(Node(self.path, size_of(self.n_bytes), self.n_bytes, nodes))


# What a leaf holds, as far as its digests tell.
_Values = dict[tuple[str, str], tuple[Any, int]]


def du(run: Any) -> DiskUse:
    """Says what the steps of a run cost, and which leaves never change.

    It reads no array: what is the same is told by the digests of lazy_orbax.

    Args:
        run: a directory with many steps, or its `gs://` address.

    Raises:
        OptionError: there is no run.
        OSError: the storage refused.
    """
    seen = look(run, (RUN,))
    costs, all_values, before = [], list[_Values](), _Values()
    steps = ls(seen.path).steps
    seen_files: set[Inode] = set()
    told = {entry.path for entry in steps if entry.state == "committed" and entry.with_digests}
    for entry in steps:
        # One step alone has nothing to be the same as.
        values = _values_of(entry) if len(told) > 1 and entry.path in told else None
        linked_bytes, repeated = _linked_bytes(entry.path, seen_files), None
        if values is not None:
            if all_values:
                same = (n for key, (held, n) in values.items() if before.get(key) == (held, n))
                repeated = max(0, sum(same) - linked_bytes)
            all_values.append(values)
            before = values
        own_bytes = entry.n_bytes - linked_bytes
        of_bytes = own_bytes, linked_bytes, repeated
        costs.append(StepCost(entry.step, entry.path, entry.state, *of_bytes))
    return DiskUse(str(seen.path), tuple(costs), _fixed(all_values), len(all_values))


def _linked_bytes(step: str, seen: set[Inode]) -> int:
    """Returns the bytes of files that were seen already under another name, and notes the rest."""
    n_bytes = 0
    for folder, _, names in os.walk(step) if place_of(step).has_special_files else ():
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # A run may go on meanwhile.
                found = os.lstat(os.path.join(folder, name))
                if found.st_nlink > 1 and stat.S_ISREG(found.st_mode):
                    file = found.st_dev, found.st_ino
                    n_bytes += found.st_size if file in seen else 0
                    seen.add(file)
    return n_bytes


def _values_of(entry: StepEntry) -> _Values | None:
    """Returns the digests of each leaf of a step; `None` where they cannot be read."""
    place = place_of(entry.path).as_path()
    names = tuple(sorted(child.name for child in place.iterdir()))
    kind = "item" if entry.items == (place.name,) else "step"
    found: _Values = {}
    try:
        for item, directory in items_of(Seen(kind, place, names)).items():
            if item not in entry.with_digests:
                continue
            leaves = ItemLeaves(directory)
            sizes = {leaf.name: leaf.n_bytes for leaf in leaves.entries}
            for name, leaf in leaves.digests.items():
                held = (leaf.dtype, leaf.shape, leaf.digests, leaf.boxes)
                found[item, name] = (held, sizes.get(name, 0))
    except (MalformedCheckpointError, FileNotFoundError):
        return None
    return found


def _fixed(steps: list[_Values]) -> tuple[FixedLeaf, ...]:
    """Returns the leaves that are in more than one step, and are the same in all of these."""
    held: dict[tuple[str, str], list[tuple[Any, int]]] = {}
    for values in steps:
        for key, value in values.items():
            held.setdefault(key, []).append(value)
    fixed = [
        FixedLeaf(item, name, values[0][1], len(values))
        for (item, name), values in held.items()
        if len(values) > 1 and all(value == values[0] for value in values)
    ]
    return tuple(sorted(fixed, key=lambda leaf: -leaf.n_bytes))
