"""The leaves while rules are applied to them: what they are called, and what follows what."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable

from lazy_orbax.plan.transforms.moments import Moment, joined_path
from lazy_orbax.plan.transforms.part import Origin
from lazy_orbax.plan.transforms.rule import Rule
from lazy_orbax.plan.transforms.virtual_array import VirtualArray

Key = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Entry:
    """A leaf, after some rules.

    Attributes:
        name: what it is called now.
        array: what it is now.
        origins: the stored leaves that it was made from.
        source: the checkpoint that it comes from; empty where there is one, or are several.
        moment: of which parameter it is a moment, if it is one.
        rules: numbers of the rules that made it.
        refusal: why it must not be wanted, if it must not.
    """

    name: str
    array: VirtualArray
    origins: tuple[Origin, ...]
    source: str = ""
    moment: Moment | None = None
    rules: tuple[int, ...] = ()
    refusal: str = ""

    @property
    def key(self) -> Key:
        """What no other leaf has."""
        return (self.source, self.name)

    def __str__(self) -> str:
        return f"{self.source}:{self.name}" if self.source else self.name


@dataclasses.dataclass(frozen=True)
class Match:
    """A leaf that a rule is about.

    Attributes:
        entry: the leaf.
        match: what the pattern found, in its name or in that of its parameter.
        follows: whether it is a moment that follows its parameter.
    """

    entry: Entry
    match: re.Match[str]
    follows: bool

    @property
    def is_misfit(self) -> bool:
        """Whether it follows a parameter of another shape."""
        moment = self.entry.moment
        return self.follows and moment is not None and not moment.is_alike

    def is_beside(self, pattern: str) -> bool:
        """Whether it is a moment of a parameter that the pattern is about as well."""
        moment, name = self.entry.moment, self.entry.name
        return moment is not None and re.fullmatch(pattern, moment.parameter(name)) is not None


def matches(entries: Iterable[Entry], rule: Rule, pattern: str) -> list[Match]:
    """Returns the leaves that a pattern of a rule is about."""
    expression, found = re.compile(pattern), []
    for entry in entries:
        if rule.source is not None and entry.source != rule.source:
            continue
        if (match := expression.fullmatch(entry.name)) is not None:
            found.append(Match(entry, match, False))
        elif rule.moments and entry.moment is not None:
            match = expression.fullmatch(entry.moment.parameter(entry.name))
            if match is not None:
                found.append(Match(entry, match, True))
    return found


def renamed(match: Match, name: str, wanted: Collection[str]) -> tuple[str, Moment | None]:
    """Returns the new name of a leaf, and of which parameter it is a moment then.

    Args:
        match: the leaf.
        name: the new name of the leaf, or that of the parameter which it follows.
        wanted: names of the wanted leaves, which tell where a tree of parameters begins.
    """
    entry, moment = match.entry, match.entry.moment
    if moment is None:
        return name, None
    tail = entry.name.removeprefix(f"{moment.head}.")
    if not match.follows:
        head, _ = _cut(name, moment.head, tail)
        return name, dataclasses.replace(moment, head=head)
    prefix, rest = _cut(name, moment.prefix, tail)
    if joined_path(moment.head, rest) not in wanted:
        words = name.split(".")
        ends = [".".join(words[i:]) for i in range(len(words))]
        hits = [end for end in ends if f"{moment.head}.{end}" in wanted]
        if len(hits) == 1:
            prefix, rest = name.removesuffix(hits[0]).removesuffix("."), hits[0]
    return joined_path(moment.head, rest), dataclasses.replace(moment, prefix=prefix)


def _cut(name: str, prefix: str, tail: str) -> tuple[str, str]:
    """Cuts a new name into the path of a tree and one inside of it.

    Args:
        name: the new name.
        prefix: the path of the tree before.
        tail: the path inside of it before.
    """
    if not prefix or name.startswith(f"{prefix}."):
        return prefix, name.removeprefix(f"{prefix}.") if prefix else name
    if name.endswith(f".{tail}"):
        return name.removesuffix(f".{tail}"), tail
    words, depth = name.split("."), prefix.count(".") + 1
    return ".".join(words[:depth]), ".".join(words[depth:])
