"""The leaves while rules are applied to them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from lazy_orbax.plan.transforms.entries import Entry, Key, Match, matches, renamed
from lazy_orbax.plan.transforms.moments import Moment
from lazy_orbax.plan.transforms.part import Origin
from lazy_orbax.plan.transforms.rule import RENAMING, Rule, expanded
from lazy_orbax.plan.transforms.scalars import MisfitError


class Leaves:
    """The leaves while rules are applied to them.

    Attributes:
        entries: the leaves, by checkpoint and name.
        wanted: names of the wanted leaves.
        dropped: stored leaves that a rule dropped.
        problems: what the rule that is applied cannot do.
    """

    def __init__(self, entries: Iterable[Entry], wanted: Iterable[str]):
        self.entries: dict[Key, Entry] = {entry.key: entry for entry in entries}
        self.wanted = frozenset(wanted)
        self.dropped: list[Origin] = []
        self.problems: list[str] = []

    def matches(self, rule: Rule, pattern: str) -> list[Match]:
        """Returns the leaves that a pattern of a rule is about."""
        return matches(self.entries.values(), rule, pattern)

    def replace(self, old: Iterable[Entry], new: Sequence[Entry], rule: Rule) -> None:
        """Puts leaves in the place of others, unless two have one name."""
        for entry in old:
            if self.entries.pop(entry.key, None) is None:
                self.problems.append(f"leaf {entry}: {rule} uses it twice")
        for entry in new:
            other = self.entries.setdefault(entry.key, entry)
            if other is not entry:
                both = " and ".join(str(e.origins[0]) for e in (other, entry))
                self.problems.append(f"{rule}: both {both} become {entry}")

    @contextlib.contextmanager
    def trying(self, rule: Rule, subject: Any) -> Iterator[None]:
        """Makes it a problem when a rule does not fit a leaf."""
        try:
            yield
        except MisfitError as failure:
            self.problems.append(f"leaf {subject}: {rule}: {failure}")

    def fitting(self, number: int, rule: Rule, pattern: str) -> tuple[list[Match], int]:
        """Returns the leaves to which a rule can be applied, and how many it is about.

        The others are marked, so that they must not be wanted.

        Args:
            number: the number of the rule.
            rule: the rule.
            pattern: one of its patterns.
        """
        found, about = [], self.matches(rule, pattern)
        for match in about:
            if refusal := _refusal(match, rule):
                marked = changed(match.entry, number, refusal=refusal)
                self.entries[marked.key] = marked
            else:
                found.append(match)
        return found, len(about)

    def named(
        self, match: Match, template: str, layer: int | None = None
    ) -> tuple[str, Moment | None]:
        """Returns the name that a template gives to a leaf, and of what it is a moment then.

        Args:
            match: the leaf.
            template: the template.
            layer: the number of the layer that it becomes, if it becomes several.

        Raises:
            MisfitError: the template does not fit the pattern.
        """
        try:
            name = expanded(template, match.match, layer)
        except IndexError as failure:
            raise MisfitError(f"{template!r} does not fit the pattern ({failure})") from failure
        return renamed(match, name, self.wanted)


def changed(entry: Entry, number: int, **changes: Any) -> Entry:
    """Returns an entry after a rule."""
    return dataclasses.replace(entry, rules=(*entry.rules, number), **changes)


def _refusal(match: Match, rule: Rule) -> str:
    """Returns why a leaf cannot follow its parameter, if it cannot."""
    moment = match.entry.moment
    if moment is None:
        return ""
    parameter = moment.parameter(match.entry.name)
    if rule.verb == "scale":
        return (
            f"it is a moment of {parameter}, which {rule} scales; moments do not scale with their "
            "parameter: drop() them and init() others, or keep them as they are with moments=False"
        )
    if match.is_misfit and rule.verb not in (*RENAMING, "cast"):
        return (
            f"it does not have the shape of {parameter}, which it would follow in {rule}: pass "
            "moments=False and give it a rule of its own, or drop() it"
        )
    return ""
