"""Which slabs are staged on the device and which go straight to the host."""

from __future__ import annotations

import math

import jax

from lazy_orbax.layout import Device
from lazy_orbax.plan import Slab
from lazy_orbax.snapshot import is_in_host_memory

# Some memory is always lost to fragmentation.
_USABLE_FRACTION = 0.95


class Room:
    """Says, slab by slab, how the bytes of one save are put out of reach of donation."""

    def __init__(self, mode: str):
        """Starts with all the device memory that the next step leaves free.

        Args:
            mode: `auto`, `stage` or `direct`.
        """
        self._mode = mode
        self._free_bytes: dict[Device, float] = {}

    def mode_for(self, slab: Slab) -> str:
        """Returns `host`, `stage` or `direct`, and counts the device memory that it takes."""
        if slab.kind == "host":
            return "host"
        if slab.kind == "shards":
            return "direct"
        if self._mode != "auto" or is_in_host_memory(slab):
            return self._mode if self._mode != "auto" else "stage"
        if jax.process_count() > 1:
            # Staging is one program for all processes, so all would have to agree to run it.
            return "direct"
        assert slab.mesh is not None
        devices = list(slab.mesh.devices.flat)
        for device in devices:
            if device not in self._free_bytes:
                self._free_bytes[device] = _free_device_bytes(device)
        if any(self._free_bytes[device] < slab.device_bytes for device in devices):
            return "direct"
        for device in devices:
            self._free_bytes[device] -= slab.device_bytes
        return "stage"


def _free_device_bytes(device: Device) -> float:
    """Returns the memory of `device` that a step at its peak leaves free, in bytes.

    Where the backend has no statistics everything is assumed to fit.
    """
    stats = device.memory_stats()
    if not stats or "bytes_limit" not in stats:
        return math.inf
    used = max(stats.get("peak_bytes_in_use", 0), stats.get("bytes_in_use", 0))
    return stats["bytes_limit"] * _USABLE_FRACTION - used
