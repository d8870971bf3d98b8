"""Rules, and what they come to for names, shapes and dtypes."""

from __future__ import annotations

import collections
import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lazy_orbax.errors import TransformError
from lazy_orbax.plan.boxes import Shape
from lazy_orbax.plan.transforms.apply import apply
from lazy_orbax.plan.transforms.entries import Entry
from lazy_orbax.plan.transforms.leaves import Leaves
from lazy_orbax.plan.transforms.moments import MOMENTS, find_moments
from lazy_orbax.plan.transforms.part import Origin
from lazy_orbax.plan.transforms.rule import Rule
from lazy_orbax.plan.transforms.scalars import MisfitError
from lazy_orbax.plan.transforms.transform_plan import TransformPlan, WantedLeaf
from lazy_orbax.plan.transforms.virtual_array import constant, stored_array

Specs = Mapping[str, tuple[Sequence[int], Any]]
"""Shape and dtype of each leaf, by name."""


@dataclasses.dataclass(frozen=True)
class TransformMap:
    """Rules by which wanted leaves are made from stored ones, applied one after the other.

    Each wanted leaf must be made exactly once, and each stored leaf be wanted or dropped. Moments
    of an optimizer follow the rules of their parameter.

    Attributes:
        rules: the rules.
        sources: names of the checkpoints, where there are several.
        moments: matches the path of a tree of moments, such as `opt_state.0.mu`.
    """

    rules: Sequence[Rule]
    sources: Sequence[str] = ()
    moments: str = MOMENTS

    def __post_init__(self):
        object.__setattr__(self, "rules", tuple(self.rules))
        object.__setattr__(self, "sources", tuple(self.sources))
        problems = [
            f"rule {rule}: found source {rule.source!r}, wanted one of {list(self.sources)}"
            for rule in self.rules
            if rule.source is not None and rule.source not in self.sources
        ]
        if problems:
            raise TransformError(problems)

    def plan(
        self, stored: Specs | Mapping[str, Specs], wanted: Specs | None = None
    ) -> TransformPlan:
        """Applies the rules to names, shapes and dtypes.

        Args:
            stored: the stored leaves; where there are several checkpoints, those of each, by the
                name of the checkpoint.
            wanted: the wanted leaves; `None` wants whatever the rules leave, in any shape.

        Raises:
            TransformError: the rules do not make each wanted leaf once, in its shape and dtype; a
                rule is about no leaf; or nobody wants a stored leaf.
        """
        given = wanted or {}
        names = {name: (tuple(shape), _dtype(dtype)) for name, (shape, dtype) in given.items()}
        leaves = Leaves(self._entries(stored), names)
        counts = []
        for number, rule in enumerate(self.rules):
            if rule.verb == "init":
                counts.append(sum(1 for name in names if re.fullmatch(rule.patterns[0], name)))
                continue
            counts.append(apply(leaves, number, rule))
            if leaves.problems:
                raise TransformError(leaves.problems)
        if wanted is None:
            names = {e.name: (e.array.shape, e.array.dtype) for e in leaves.entries.values()}
        problems = [
            f"rule {rule}: it is about no leaf; mend its pattern, or remove it"
            for rule, n in zip(self.rules, counts, strict=True)
            if not n
        ]
        made = self._made(leaves, names, problems)
        if problems:
            raise TransformError(problems)
        rules = tuple(zip(self.rules, counts, strict=True))
        return TransformPlan(rules, made, tuple(leaves.dropped))

    def _entries(self, stored: Any) -> Iterable[Entry]:
        """Returns the stored leaves of all checkpoints."""
        if self.sources and set(stored) != set(self.sources):
            raise TransformError(
                [f"found checkpoints {sorted(stored)}, wanted {sorted(self.sources)}"]
            )
        for source, specs in stored.items() if self.sources else [("", stored)]:
            shapes = {name: tuple(shape) for name, (shape, _) in specs.items()}
            moments = find_moments(shapes, self.moments)
            for name, (_, dtype) in specs.items():
                origin = Origin(name, source)
                array = stored_array(shapes[name], _dtype(dtype), origin)
                yield Entry(name, array, (origin,), source, moments.get(name))

    def _made(
        self, leaves: Leaves, wanted: Mapping[str, tuple[Shape, Any]], problems: list[str]
    ) -> dict[str, WantedLeaf]:
        """Returns how each wanted leaf is made, and adds to `problems` what is not."""
        by_name: dict[str, list[Entry]] = collections.defaultdict(list)
        for entry in leaves.entries.values():
            by_name[entry.name].append(entry)
        left = [entry for name in by_name if name not in wanted for entry in by_name[name]]
        made = {}
        for name, (shape, dtype) in wanted.items():
            found = [self._of_entry(entry, shape, dtype, problems) for entry in by_name[name]]
            found += self._initial(name, shape, dtype, problems)
            if len(found) > 1:
                ways = " and ".join(self._way(leaf) for leaf in found)
                problems.append(f"leaf {name}: it is made {len(found)} times, {ways}")
            elif not found:
                near = difflib.get_close_matches(name, [entry.name for entry in left], 1, 0.8)
                hint = f"; {near[0]} is there, which nobody wants" if near else ""
                problems.append(
                    f"leaf {name}: nothing becomes it, wanted {dtype}{list(shape)}; rename() what "
                    f"is stored, or init() it{hint}"
                )
            else:
                made[name] = found[0]
        for entry in left:
            why = entry.refusal or "nobody wants it; drop() it, or select() others"
            known_as = f"leaf {entry.origins[0]}"
            if entry.name != entry.origins[0].leaf:
                known_as += f", now {entry.name}{self._after(entry.rules)}"
            problems.append(f"{known_as}: {why}")
        return made

    def _of_entry(self, entry: Entry, shape: Shape, dtype: Any, problems: list[str]) -> WantedLeaf:
        """Returns the wanted leaf that a leaf became; adds to `problems` where it does not fit."""
        array, after = entry.array, self._after(entry.rules)
        if entry.refusal:
            problems.append(f"leaf {entry.name}: {entry.refusal}")
        elif array.shape != shape:
            problems.append(
                f"leaf {entry.name}: found {array.dtype}{list(array.shape)}{after}, wanted "
                f"{dtype}{list(shape)}; {_advice(array.shape, shape)}"
            )
        elif array.dtype != dtype:
            problems.append(
                f"leaf {entry.name}: found {array.dtype}{after}, wanted {dtype}; add "
                f"cast({re.escape(entry.name)!r}, {str(dtype)!r})"
            )
        follows = entry.moment.parameter(entry.name) if entry.moment is not None else None
        return WantedLeaf(entry.name, shape, dtype, array, entry.origins, entry.rules, follows)

    def _initial(
        self, name: str, shape: Shape, dtype: Any, problems: list[str]
    ) -> list[WantedLeaf]:
        """Returns the wanted leaf as each rule makes it that initializes it."""
        found = []
        for number, rule in enumerate(self.rules):
            if rule.verb == "init" and re.fullmatch(rule.patterns[0], name):
                value = rule.settings["value"]
                try:
                    made = value if callable(value) else constant(shape, dtype, value)
                except MisfitError as failure:
                    problems.append(f"leaf {name}: {rule}: {failure}")
                    made = constant(shape, dtype, 0)
                found.append(WantedLeaf(name, shape, dtype, made, rules=(number,)))
        return found

    def _way(self, leaf: WantedLeaf) -> str:
        """Returns from what, and by which rules, a leaf is made."""
        origins = ", ".join(map(str, leaf.origins[:3])) or "nothing"
        return f"from {origins}{self._after(leaf.rules)}"

    def _after(self, rules: Sequence[int]) -> str:
        """Returns which rules were applied, for a message."""
        return f" after {', '.join(str(self.rules[i]) for i in rules)}" if rules else ""


def _dtype(dtype: Any) -> Any:
    """Returns a dtype as NumPy has it, unless it has none."""
    try:
        return np.dtype(dtype)
    except TypeError:
        return dtype


def _advice(found: Shape, wanted: Shape) -> str:
    """Returns which rule may help where a shape does not fit."""
    if sorted(found) == sorted(wanted):
        return "transpose() it"
    if len(found) == len(wanted) and all(n <= m for n, m in zip(found, wanted)):
        return "pad_to() it"
    if len(found) == len(wanted) and all(n >= m for n, m in zip(found, wanted)):
        return "strip() it"
    if np.prod(found, dtype=object) == np.prod(wanted, dtype=object):
        return "reshape() it"
    if len(found) == len(wanted) - 1:
        return "stack() it with the other layers"
    if len(found) == len(wanted) + 1:
        return "unstack() it"
    return "mend the rules, or what is wanted"
