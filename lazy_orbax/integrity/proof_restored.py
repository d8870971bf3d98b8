"""Whether what was restored lies on its devices as it was saved, without a copy to the host.

The fingerprints that were stored with a verified save add up: a shard of any restore that is made
of whole pieces has the sum of theirs, and a leaf that is all here has the sum of all. Each replica
is looked at, by a program that shares nothing with the restore.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from lazy_orbax.integrity.digest_file import LeafDigests
from lazy_orbax.integrity.proof_programs import compiled, enqueue, results
from lazy_orbax.integrity.proof_subjects import Part, Subject
from lazy_orbax.plan.boxes import Box
from lazy_orbax.plan.shards import Shape, is_key


class Proven(NamedTuple):
    """What was found.

    Attributes:
        right: names of the leaves that are as they were saved, on every device of this process.
        wrong: where the others that could be looked at are not.
    """

    right: frozenset[str]
    wrong: dict[str, str]


def look(saved: Mapping[str, LeafDigests], leaves: Mapping[str, Any]) -> Proven:
    """Compares restored arrays with the fingerprints of what was saved, where there are any.

    Args:
        saved: what is known of the leaves, by name.
        leaves: what was restored, by name. Only arrays of the dtype and shape in which they were
            saved can be looked at, in the memory that programs read.
    """
    arrays = {
        name: jax.random.key_data(leaf) if is_key(leaf) else leaf
        for name, leaf in leaves.items()
        if isinstance(leaf, jax.Array) and name in saved and saved[name].fingerprints
    }
    arrays = {name: array for name, array in arrays.items() if _fits(array, saved[name])}
    names = list(arrays)
    subjects = {i: _subject(name, arrays[name]) for i, name in enumerate(names)}
    found = results(enqueue(compiled(subjects), list(arrays.values())))
    right, wrong = [], {}
    for subject in subjects.values():
        mine = {part: found[part.key] for part in subject.parts}
        told = _compare(subject, saved[subject.name], mine)
        if told:
            wrong[subject.name] = told
        elif told is not None:
            right.append(subject.name)
    return Proven(frozenset(right), wrong)


def _fits(array: jax.Array, saved: LeafDigests) -> bool:
    memory = next(iter(array.sharding.device_set)).default_memory().kind
    same = array.dtype.name == saved.dtype and array.shape == saved.shape and array.size > 0
    return same and array.sharding.memory_kind in (None, memory)


def _subject(name: str, array: jax.Array) -> Subject:
    where = array.sharding.addressable_devices_indices_map(array.shape)
    parts = tuple(
        Part((name, device), device, tuple(part.start or 0 for part in index or ()))
        for device, index in where.items()
    )
    shard_shape = tuple(array.sharding.shard_shape(array.shape))
    return Subject(name, array.shape, array.dtype, array.sharding, shard_shape, parts)


def _compare(subject: Subject, saved: LeafDigests, found: dict[Part, int]) -> str | None:
    """Returns where a leaf is wrong, or an empty text; `None` where that cannot be known."""
    wanted = {part.start: _sum_within(saved, Box(part.start, subject.part_shape)) for part in found}
    if None not in wanted.values():
        wrong = [part for part, value in found.items() if value != wanted[part.start]]
        return ", ".join(f"on {part.device} from {list(part.start)}" for part in wrong)
    if not subject.sharding.is_fully_addressable:
        return None
    by_start: dict[Shape, set[int]] = {}
    for part, value in found.items():
        by_start.setdefault(part.start, set()).add(value)
    unequal = [start for start, values in by_start.items() if len(values) > 1]
    if unequal:
        return f"the replicas from {list(unequal[0])} differ"
    whole = Box((0,) * len(subject.shape), subject.shape)
    total = sum(value for (value,) in by_start.values()) % 2**64
    wanted_total = _sum_within(saved, whole)
    if wanted_total is None:
        return None
    return "" if total == wanted_total else "on some device"


def _sum_within(saved: LeafDigests, box: Box) -> int | None:
    """Returns the fingerprint of a box of a leaf, if that is made of whole pieces."""
    total = volume = 0
    for piece, value in zip(saved.boxes, saved.fingerprints, strict=True):
        limits = zip(piece.start, piece.shape, box.start, box.shape, strict=True)
        if all(b <= a and a + n <= b + m for a, n, b, m in limits):
            total, volume = total + value, volume + math.prod(piece.shape)
    return total % 2**64 if volume == math.prod(box.shape) else None
