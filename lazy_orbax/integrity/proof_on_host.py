"""Fingerprints of parts of arrays that lie in host memory, as all do on the CPU backend.

NumPy reads them where they are. A program would find the same, but to compile it takes seconds of
all cores, and most states are saved too seldom to earn that back.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lazy_orbax._jax_context import neutral
from lazy_orbax.integrity import fingerprint
from lazy_orbax.integrity.proof_subjects import Subject, starts_in_shards
from lazy_orbax.plan.shards import Device


@neutral()
def look(subjects: Mapping[int, Subject], arrays: Sequence[Any]) -> dict[Hashable, int]:
    """Waits until arrays are computed, and returns the fingerprints of their parts by their keys.

    The arrays may be donated when this returned: no view of them is left, and nothing is cached on
    them.

    Args:
        subjects: the leaves, by their index among the arrays.
        arrays: those of them that `subjects` names are on CPU devices.

    Raises:
        Misplaced: a device does not hold the part that it is said to hold.
    """
    found: dict[Hashable, int] = {}
    for i, subject in subjects.items():
        shards = _our_shards(arrays[i])
        for part, within in starts_in_shards(subject):
            # Of numbers of less than a byte it is a copy, else a view, which ends with `shards`.
            data = np.asarray(shards[part.device])
            if data.shape != subject.part_shape:
                sizes = zip(within, subject.part_shape, strict=True)
                data = data[tuple(slice(at, at + n) for at, n in sizes)]
            found[part.key] = fingerprint.of_host(data, part.start)
            del data
    return found


def _our_shards(array: jax.Array) -> dict[Device, Any]:
    """Returns the shards of an array of our own that has the memory of the caller's.

    NumPy's views are cached on it and die with it. Cached on the caller's, they would make the next
    step that donates it copy it instead.
    """
    data = [shard.data for shard in array.addressable_shards]
    ours = jax.make_array_from_single_device_arrays(array.shape, array.sharding, data)
    return {shard.device: shard.data for shard in ours.addressable_shards}
