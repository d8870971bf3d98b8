"""Applies one rule to the leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lazy_orbax.plan.transforms import virtual_array as arrays
from lazy_orbax.plan.transforms.leaves import Leaves, changed
from lazy_orbax.plan.transforms.put_together import put_together
from lazy_orbax.plan.transforms.rule import FILTERS, Rule
from lazy_orbax.plan.transforms.scalars import MisfitError
from lazy_orbax.plan.transforms.virtual_array import VirtualArray

Piece = tuple[str, int | None, VirtualArray]
"""The template of its name, its number if it is a layer, and what it is."""
Operation = Callable[[VirtualArray, Mapping[str, Any]], VirtualArray]
_IN_PLACE: Mapping[str, Operation] = {
    "pad_to": lambda array, given: arrays.padded(array, given["shape"], given["value"]),
    "strip": lambda array, given: arrays.stripped(array, given["shape"]),
    "transpose": lambda array, given: arrays.permuted(array, given["axes"]),
    "reshape": lambda array, given: arrays.reshaped(array, given["shape"]),
    "cast": lambda array, given: arrays.cast(array, given["dtype"]),
    "scale": lambda array, given: arrays.scaled(array, given["factor"]),
    "rename": lambda array, given: array,
}


def apply(leaves: Leaves, number: int, rule: Rule) -> int:
    """Applies a rule, and returns for how many leaves it did something.

    Args:
        leaves: the leaves, which are changed; what cannot be done becomes a problem of theirs.
        number: the number of the rule.
        rule: the rule; it is not `init`, which makes leaves of nothing.
    """
    if rule.verb in FILTERS:
        return _filter(leaves, rule)
    if rule.verb in _IN_PLACE:
        return _change(leaves, number, rule)
    if rule.verb in _APART:
        return _take_apart(leaves, number, rule)
    return put_together(leaves, number, rule)


def _filter(leaves: Leaves, rule: Rule) -> int:
    """Applies `select` or `drop`."""
    found = [match.entry for match in leaves.matches(rule, rule.patterns[0])]
    gone = found
    if rule.verb == "select" and found:
        kept = {entry.key for entry in found}
        asked = [e for e in leaves.entries.values() if rule.source in (None, e.source)]
        gone = [entry for entry in asked if entry.key not in kept]
    leaves.dropped += [origin for entry in gone for origin in entry.origins]
    leaves.replace(gone, (), rule)
    return len(found)


def _change(leaves: Leaves, number: int, rule: Rule) -> int:
    """Applies a rule that makes one leaf of each."""
    old, new = [], []
    found, n_leaves = leaves.fitting(number, rule, rule.patterns[0])
    for match in found:
        entry, settings = match.entry, rule.settings
        if rule.verb == "pad_to" and match.is_beside(rule.patterns[0]):
            settings = {**settings, "value": 0}
        with leaves.trying(rule, entry):
            array = _IN_PLACE[rule.verb](entry.array, settings)
            name, moment = entry.name, entry.moment
            if rule.into:
                name, moment = leaves.named(match, rule.into[0])
            new.append(changed(entry, number, name=name, array=array, moment=moment))
            old.append(entry)
    leaves.replace(old, new, rule)
    return n_leaves


def _take_apart(leaves: Leaves, number: int, rule: Rule) -> int:
    """Applies a rule that makes several leaves of each."""
    old, new = [], []
    found, n_leaves = leaves.fitting(number, rule, rule.patterns[0])
    for match in found:
        entry = match.entry
        with leaves.trying(rule, entry):
            pieces = _APART[rule.verb](entry.array, rule)
            for template, layer, array in pieces:
                name, moment = leaves.named(match, template, layer)
                new.append(changed(entry, number, name=name, array=array, moment=moment))
            old.append(entry)
    leaves.replace(old, new, rule)
    return n_leaves


def _layers(array: VirtualArray, rule: Rule) -> list[Piece]:
    """Returns the layers of a stack."""
    layers = arrays.unstacked(array, rule.settings["axis"])
    numbers = rule.settings["numbers"] or range(len(layers))
    if len(numbers) != len(layers):
        raise MisfitError(f"found {len(layers)} layers, wanted {len(numbers)}")
    return [(rule.into[0], i, layer) for i, layer in zip(numbers, layers, strict=True)]


def _sections(array: VirtualArray, rule: Rule) -> list[Piece]:
    """Returns the pieces of a leaf that is split."""
    axis, sizes, n = rule.settings["axis"], rule.settings["sizes"], len(rule.into)
    if sizes is None:
        if not -len(array.shape) <= axis < len(array.shape) or array.shape[axis] % n:
            raise MisfitError(f"found {list(array.shape)}, wanted {n} equal parts on axis {axis}")
        sizes = (array.shape[axis] // n,) * n
    sections = arrays.split(array, axis, sizes)
    return [(name, None, part) for name, part in zip(rule.into, sections, strict=True)]


_APART = {"unstack": _layers, "split": _sections}
