"""Packs a slab of arrays on CPU devices without a program, as the program would."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from lazy_orbax.plan.slabs import Plan, Slab, carrier_of
from lazy_orbax.snapshot.host_copies import HostShards


def packed_on_host(plan: Plan, slab: Slab, leaves: Sequence[Any]) -> HostShards:
    """Waits for the arrays of a slab, and returns copies of its pieces, packed by device.

    Args:
        plan: the plan that `slab` is from.
        slab: a slab of kind `mesh`, on CPU devices.
        leaves: the arrays of `plan.leaves`, in order. They may be donated when this returned.
    """
    assert slab.mesh is not None
    devices = list(slab.mesh.devices.flat)
    dtype = carrier_of(plan.leaves[slab.leaves[0]].dtype)
    size = sum(math.prod(plan.layouts[i].write_shape) for i in slab.leaves)
    buffers = HostShards()
    shards: dict[tuple[int, Any], jax.Array] = {}
    for i in slab.leaves:
        shards.update(((i, shard.device), shard.data) for shard in leaves[i].addressable_shards)
    for piece in slab.pieces:
        device = devices[piece.device]
        if device not in buffers:
            buffers[device] = np.empty(size, dtype)
        shard = shards[piece.leaf, device]
        part = buffers[device][piece.offset : piece.offset + math.prod(piece.shape)]
        index = piece.index_in_shard if shard.shape != piece.shape else ()
        # A view of the caller's memory is in no variable: it dies here, before anyone donates.
        np.copyto(part.reshape(piece.shape), _view(shard)[index].view(dtype))
    return buffers


def _view(shard: jax.Array) -> np.ndarray:
    """Returns what is in a shard; a view, where it has whole bytes. JAX caches none on `shard`."""
    own = jax.make_array_from_single_device_arrays(shard.shape, shard.sharding, [shard])
    return np.asarray(own)
