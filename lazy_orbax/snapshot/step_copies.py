"""Which arrays in pinned host memory are snapshots already, and what they are copies of.

A step that returns a copy of its input (`SnapshotStep`) remembers that copy here, and a save looks
it up: it writes the copy as it is, and stores the sharding of what was copied. An array of a
user's own in pinned host memory is not known here; it is copied like any other, because it may be
donated or deleted after the save.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import weakref
from collections.abc import Sequence

import jax

_sharding = operator.attrgetter("sharding")


@dataclasses.dataclass(frozen=True)
class Given:
    """What a snapshot is a copy of.

    Attributes:
        sharding: where the original was; of a typed PRNG key, where its data was.
    """

    sharding: jax.sharding.Sharding


# By `id`, for arrays cannot be hashed. An entry goes when its array dies, before the id is reused.
_GIVEN: dict[int, tuple[weakref.ref[jax.Array], Given]] = {}


def remember(array: jax.Array, given: Given) -> None:
    """Notes that `array` is a snapshot, until it dies."""
    key = id(array)
    forget = functools.partial(_forget, key)
    _GIVEN[key] = (weakref.ref(array, forget), given)


def _forget(key: int, _: object) -> None:
    _GIVEN.pop(key, None)


def given_of(array: object) -> Given | None:
    """Returns what `array` is a snapshot of, or `None`."""
    found = _GIVEN.get(id(array))
    return found[1] if found is not None and found[0]() is array else None


def origins(arrays: Sequence[jax.Array]) -> list[jax.sharding.Sharding | Given]:
    """Returns what each array was given as a snapshot of, or where it is."""
    if not _GIVEN:
        return list(map(_sharding, arrays))
    return [given_of(array) or array.sharding for array in arrays]
