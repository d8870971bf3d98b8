"""Applies a rule that makes one leaf of several."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

from lazy_orbax.plan.transforms import virtual_array as arrays
from lazy_orbax.plan.transforms.entries import Entry, Match
from lazy_orbax.plan.transforms.leaves import Leaves, changed
from lazy_orbax.plan.transforms.moments import Moment
from lazy_orbax.plan.transforms.rule import Rule
from lazy_orbax.plan.transforms.scalars import MisfitError

_LAYER_GROUP = "layer"


@dataclasses.dataclass(frozen=True)
class Member:
    """A leaf that is one of several which become one.

    Attributes:
        slot: which of them it is.
        entry: the leaf.
        moment: of which parameter the new leaf is a moment.
    """

    slot: int
    entry: Entry
    moment: Moment | None


def put_together(leaves: Leaves, number: int, rule: Rule) -> int:
    """Applies `stack` or `fuse`, and returns for how many leaves it did something.

    Args:
        leaves: the leaves, which are changed; what cannot be done becomes a problem of theirs.
        number: the number of the rule.
        rule: the rule.
    """
    n_leaves, old, new = 0, [], []
    groups: dict[str, dict[str, list[Member]]] = collections.defaultdict(dict)
    for i, pattern in enumerate(rule.patterns):
        found, n_about = leaves.fitting(number, rule, pattern)
        n_leaves += n_about
        for match in found:
            with leaves.trying(rule, match.entry):
                name, moment = leaves.named(match, rule.into[0])
                slot = _layer(match) if rule.verb == "stack" else i
                member = Member(slot, match.entry, moment)
                groups[name].setdefault(match.entry.source, []).append(member)
    for name, by_source in groups.items():
        for members in _groups(list(by_source.values())):
            with leaves.trying(rule, name):
                new.append(_together(name, members, number, rule))
                old += [member.entry for member in members]
    leaves.replace(old, new, rule)
    return n_leaves


def _layer(match: Match) -> int:
    """Returns the number of a layer."""
    groups = match.match.re.groupindex
    if not match.match.re.groups:
        raise MisfitError("the pattern has no group that is the number of the layer")
    text = match.match[_LAYER_GROUP if _LAYER_GROUP in groups else 1]
    if text is None or not text.isdecimal():
        raise MisfitError(
            f"found {text!r} as the number of the layer, wanted digits; "
            "name its group, as in (?P<layer>\\d+)"
        )
    return int(text)


def _groups(by_source: Sequence[list[Member]]) -> list[list[Member]]:
    """Returns what becomes one leaf: of all checkpoints, unless each has the same slots."""
    slots = [member.slot for members in by_source for member in members]
    if len(set(slots)) == len(slots):
        return [[member for members in by_source for member in members]]
    return list(by_source)


def _together(name: str, members: Sequence[Member], number: int, rule: Rule) -> Entry:
    """Returns the leaf that several become."""
    slots = _slots(members, rule)
    members = sorted(members, key=lambda member: slots.index(member.slot))
    operation = arrays.stacked if rule.verb == "stack" else arrays.fused
    array = operation([member.entry.array for member in members], rule.settings["axis"])
    entries = [member.entry for member in members]
    sources = {entry.source for entry in entries}
    rules = sorted({rule for entry in entries for rule in entry.rules})
    return changed(
        dataclasses.replace(entries[0], rules=tuple(rules)),
        number,
        name=name,
        array=array,
        moment=members[0].moment,
        refusal=next((entry.refusal for entry in entries if entry.refusal), ""),
        origins=tuple(dict.fromkeys(origin for entry in entries for origin in entry.origins)),
        source=sources.pop() if len(sources) == 1 else "",
    )


def _slots(members: Sequence[Member], rule: Rule) -> Sequence[int]:
    """Returns what the members must be, in their order; refuses others."""
    counts = collections.Counter(member.slot for member in members)
    twice = [str(member.entry) for member in members if counts[member.slot] > 1]
    if twice:
        raise MisfitError(f"found {' and '.join(twice)} for one place")
    if rule.verb == "stack":
        wanted = rule.settings["numbers"] or range(min(counts), max(counts) + 1)
        names = [f"layer {i}" for i in wanted]
    else:
        wanted, names = range(len(rule.patterns)), rule.patterns
    missing = [name for i, name in zip(wanted, names, strict=True) if i not in counts]
    odd = [str(member.entry) for member in members if member.slot not in wanted]
    if missing or odd:
        raise MisfitError(
            f"found {len(members)} leaves such as {members[0].entry}, "
            f"but nothing for {', '.join(missing[:5])}"
            if missing
            else f"found {', '.join(odd[:5])}, wanted layers {list(wanted)} only"
        )
    return wanted
