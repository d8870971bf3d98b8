"""Which slabs are staged on the device and which go straight to the host."""

from __future__ import annotations

import math

from lazy_orbax._machine import free_device_bytes
from lazy_orbax.plan.shards import Device
from lazy_orbax.plan.slabs import Plan, Slab
from lazy_orbax.snapshot.device_to_host import is_in_host_memory
from lazy_orbax.snapshot.pack import is_compiled, local_mesh

_ONLY_WAY = {
    "host": ("host", "not on a device"),
    "given": ("in_step", "the step had copied it to pinned host memory"),
    "shards": ("direct", "its size, layout or memory is not one that is packed"),
}
# To copy more than this takes longer than to compile what copies it beside the next step.
_MOST_COPIED_BYTES = 2**29


class Room:
    """Says, slab by slab, how the bytes of one save are put out of reach of donation."""

    def __init__(self, mode: str, plan: Plan | None = None):
        """Starts with all the device memory that the next step leaves free.

        Args:
            mode: `auto`, `stage` or `direct`.
            plan: the slabs' plan, if nobody is to wait for its programs where a copy is cheaper.
        """
        n_bytes = sum(slab.n_bytes for slab in plan.slabs) if plan is not None else 0
        self._mode, self._plan = mode, plan if n_bytes <= _MOST_COPIED_BYTES else None
        self._free_bytes: dict[Device, float] = {}
        self._reasons: dict[str, str] = {}

    @property
    def reason(self) -> str:
        """Why each mode that `mode_for` returned was chosen, for the first slab that got it."""
        return "; ".join(f"{mode}: {why}" for mode, why in self._reasons.items())

    def mode_for(self, slab: Slab) -> str:
        """Returns what `take` takes; counts the device memory it takes."""
        mode, why = self._choose(slab)
        self._reasons.setdefault(mode, why)
        return mode

    def _choose(self, slab: Slab) -> tuple[str, str]:
        if slab.kind in _ONLY_WAY:
            return _ONLY_WAY[slab.kind]
        if self._mode != "auto":
            return self._mode, "asked for"
        if is_in_host_memory(slab):
            if self._plan is not None and not is_compiled(self._plan, slab):
                return "copy", "what packs it is not compiled yet"
            return "stage", "device memory is host memory here"
        assert slab.mesh is not None
        devices = list(local_mesh(slab.mesh).devices.flat)
        for device in devices:
            if device not in self._free_bytes:
                self._free_bytes[device] = free_device_bytes(device)
        least_bytes = min(self._free_bytes[device] for device in devices)
        why = f"a device had {max(0, least_bytes):.0f} bytes free for {slab.device_bytes}"
        if least_bytes < slab.device_bytes:
            return "direct", why
        for device in devices:
            self._free_bytes[device] -= slab.device_bytes
        return "stage", why if least_bytes < math.inf else "device memory is not counted here"
