"""Devices of any number of processes, for planning without those processes."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np


class FakeMemory:
    kind = "device"


class FakeDevice:
    """As much of a device as shardings and plans ask for."""

    platform = "cpu"
    device_kind = "fake"

    def __init__(self, id_: int, process_index: int):
        self.id, self.process_index = id_, process_index

    def __repr__(self) -> str:
        return f"FakeDevice({self.id}, process {self.process_index})"

    def default_memory(self) -> FakeMemory:
        return FakeMemory()

    def addressable_memories(self) -> list[FakeMemory]:
        return [FakeMemory()]


def fake_mesh(
    process_of_device: Sequence[int], shape: Sequence[int], names: Sequence[str]
) -> jax.sharding.Mesh:
    """A mesh whose n-th device belongs to process `process_of_device[n]`."""
    devices = [FakeDevice(i, process) for i, process in enumerate(process_of_device)]
    return jax.sharding.Mesh(np.array(devices, dtype=object).reshape(shape), tuple(names))
