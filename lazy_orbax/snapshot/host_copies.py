"""Arrays in host memory: copies, pinned where the backend has it, else pageable; and views.

Nothing is cached on the arrays. The copies are ours alone.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from lazy_orbax.plan.shards import PINNED_HOST, Device

_LOG = logging.getLogger("lazy_orbax")


class HostShards(dict[Any, np.ndarray]):
    """The shards of an array in host memory, by device."""


def has_pinned_host(device: Device) -> bool:
    """Whether copies to the host can be enqueued into pinned memory."""
    return any(memory.kind == PINNED_HOST for memory in device.addressable_memories())


@functools.lru_cache(maxsize=4096)
def in_pinned_host(sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
    """Returns where arrays are that are placed so, but in pinned host memory."""
    return sharding.with_memory_kind(PINNED_HOST)


def view_of(array: jax.Array) -> np.ndarray | None:
    """Returns a view of an array on one CPU device, which may not be donated as long as it lives.

    `None` where the device has memory of its own, or DLPack does not know the dtype.
    """
    (device,) = array.devices()
    if device.platform != "cpu":
        return None
    with contextlib.suppress(BufferError, RuntimeError, TypeError):
        return np.from_dlpack(array)  # type: ignore[arg-type]
    return None


def enqueue(arrays: Sequence[jax.Array]) -> Sequence[jax.Array | HostShards]:
    """Enqueues copies of arrays to pinned host memory, or waits for them where there is none."""
    if not arrays:
        return ()
    if has_pinned_host(next(iter(arrays[0].sharding.addressable_devices))):
        with _unless_refused():
            targets = [in_pinned_host(array.sharding) for array in arrays]
            # may_alias=False: an array that is in pinned host memory already would not be copied.
            return jax.device_put(list(arrays), targets, may_alias=False)
    return [_copied(array) for array in arrays]


def bring(ours: jax.Array) -> HostShards:
    """Brings an array of our own to host memory and waits for it."""
    if has_pinned_host(ours.addressable_shards[0].device):
        with _unless_refused():
            return shards_of(jax.device_put(ours, in_pinned_host(ours.sharding)))
    ours.copy_to_host_async()
    return shards_of(ours)


def shards_of(ours: jax.Array | HostShards) -> HostShards:
    """Returns the shards of our own array as NumPy arrays: views, where it is in host memory."""
    if isinstance(ours, HostShards):
        return ours
    return HostShards({shard.device: np.asarray(shard.data) for shard in ours.addressable_shards})


@contextlib.contextmanager
def _unless_refused() -> Iterator[None]:
    """Goes on with pageable host memory where pinned memory is refused: slower, and correct."""
    try:
        yield
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        _LOG.warning("No pinned host memory left; copying through pageable memory: %s", error)


def _copied(array: jax.Array) -> HostShards:
    """Copies the shards to the host, one at a time, and leaves nothing cached on the array."""
    copies = HostShards()
    for shard in array.addressable_shards:
        ours = jax.device_put(shard.data, shard.data.sharding, may_alias=False)
        copies[shard.device] = np.asarray(ours)
    return copies
