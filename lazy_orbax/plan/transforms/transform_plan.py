"""What the rules come to for one checkpoint and one wanted tree: what goes where."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lazy_orbax.errors import TransformError
from lazy_orbax.plan.boxes import Box, Shape
from lazy_orbax.plan.transforms.part import Origin
from lazy_orbax.plan.transforms.rule import Rule
from lazy_orbax.plan.transforms.scalars import MisfitError
from lazy_orbax.plan.transforms.takes import Fill, Init, Take
from lazy_orbax.plan.transforms.virtual_array import VirtualArray

_MOST_ORIGINS = 3


@dataclasses.dataclass(frozen=True)
class WantedLeaf:
    """How a wanted leaf is made.

    Attributes:
        name: the leaf, as Orbax names it.
        shape: its shape.
        dtype: its dtype.
        made: what it is, of what is stored, or the function that makes it.
        origins: the stored leaves that it is made from.
        rules: numbers of the rules that make it.
        follows: the parameter whose rules it follows, of a moment.
    """

    name: str
    shape: Shape
    dtype: Any
    made: VirtualArray | Callable[..., Any]
    origins: tuple[Origin, ...] = ()
    rules: tuple[int, ...] = ()
    follows: str | None = None

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}{list(self.shape)}"


@dataclasses.dataclass(frozen=True)
class TransformPlan:
    """What goes where. `str()` of it is a table for people.

    Attributes:
        rules: the rules, and for how many leaves each did something.
        leaves: the wanted leaves, by name.
        dropped: the stored leaves that a rule dropped.
    """

    rules: tuple[tuple[Rule, int], ...]
    leaves: Mapping[str, WantedLeaf]
    dropped: tuple[Origin, ...]

    def takes(self, leaf: str, box: Box) -> tuple[Take | Fill | Init, ...]:
        """Returns what makes a shard of a wanted leaf; together they cover it once.

        Args:
            leaf: the wanted leaf, as Orbax names it.
            box: the shard. Takes are meant for one in C order.

        Raises:
            TransformError: the rules leave of the shard too many boxes of what is stored.
        """
        wanted = self.leaves[leaf]
        if isinstance(wanted.made, VirtualArray):
            try:
                return wanted.made.takes(box)
            except MisfitError as failure:
                rules = ", ".join(str(self.rules[i][0]) for i in wanted.rules)
                problem = f"leaf {leaf}, shard {box}: {failure}; change {rules}"
                raise TransformError([problem]) from failure
        return (Init((...,), wanted.made, leaf, wanted.shape, wanted.dtype, box),)

    @property
    def stored_leaves(self) -> frozenset[Origin]:
        """The stored leaves of which something is read."""
        return frozenset(
            part.origin
            for leaf in self.leaves.values()
            if isinstance(leaf.made, VirtualArray)
            for part in leaf.made.parts
            if part.origin is not None
        )

    @property
    def report(self) -> dict[str, Any]:
        """The same as what `json.dumps` takes."""
        return {
            "rules": [{"rule": str(rule), "leaves": n} for rule, n in self.rules],
            "leaves": {name: self._leaf_report(leaf) for name, leaf in self.leaves.items()},
            "dropped": list(map(str, self.dropped)),
        }

    def _leaf_report(self, leaf: WantedLeaf) -> dict[str, Any]:
        """Returns what the report says of a leaf."""
        report = {
            "shape": list(leaf.shape),
            "dtype": str(leaf.dtype),
            "from": list(map(str, leaf.origins)),
            "rules": list(leaf.rules),
        }
        return report if leaf.follows is None else {**report, "follows": leaf.follows}

    def table(self) -> str:
        """Returns what goes where, a line for each wanted leaf, and the rules."""
        rows = [("wanted", "is", "from", "by rule")]
        for leaf in self.leaves.values():
            numbers = ", ".join(map(str, leaf.rules)) or "-"
            follows = f", following {leaf.follows}" if leaf.follows and leaf.rules else ""
            what = f"{leaf.dtype}{list(leaf.shape)}"
            rows.append((leaf.name, what, _listed(leaf.origins) or "nothing", numbers + follows))
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = [
            "  ".join([*(cell.ljust(n) for cell, n in zip(row, widths)), row[3]]) for row in rows
        ]
        lines += [f"rule {i}: {rule} ({n} leaves)" for i, (rule, n) in enumerate(self.rules)]
        if self.dropped:
            lines.append(f"dropped: {', '.join(map(str, self.dropped))}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()


def _listed(origins: Sequence[Origin]) -> str:
    """Returns the names of stored leaves, of many only the first and the last."""
    if len(origins) <= _MOST_ORIGINS:
        return ", ".join(map(str, origins))
    return f"{origins[0]} ... {origins[-1]} ({len(origins)} leaves)"
