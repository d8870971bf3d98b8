"""Staging memory: never more than the limit at once, but for one group that is larger."""

import jax
import numpy as np
import pytest

from lazy_orbax.integrity.array_format import ArrayFormat
from lazy_orbax.restore import arrays
from lazy_orbax.restore.groups import grouped, in_order, targets_of
from lazy_orbax.restore.wanted import Wanted
from lazy_orbax.trust.ocdbt_nodes import Extent

MIB = 2**20


def leaves(n, n_bytes):
    form = ArrayFormat("zarr", {}, (n_bytes // 4,), (n_bytes // 4,), np.dtype(np.float32), True)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return [Wanted(i, f"x{i}", "array", form, form.shape, form.dtype, place) for i in range(n)]


class Watched:
    """A future that notes how much is in flight when it is asked."""

    def __init__(self, flight, n_bytes):
        self.flight, self.n_bytes = flight, n_bytes

    def result(self):
        self.flight.append(-self.n_bytes)
        return []


@pytest.mark.parametrize("host_memory", [True, False])
def test_other_devices_get_staging_memory_within_the_limit(monkeypatch, host_memory):
    monkeypatch.setattr(arrays, "takes_host_memory", lambda leaf: host_memory)
    flight, most = [], 0
    staging = arrays.Staging(4 * MIB, lambda done: None)
    for group in grouped(((leaf,) for leaf in leaves(20, 5 * MIB // 4)), 4 * MIB):
        staging.reserve(group)
        targets = targets_of(group)
        flight.append(group.n_bytes)
        most = max(most, sum(flight))
        staging.add(group, targets, [Watched(flight, group.n_bytes)])
    staging.finish()
    assert len(staging.values) == 20
    assert sum(flight) == 0
    if host_memory:  # The arrays have it: there is nothing to wait for.
        assert most > 20 * MIB
    else:
        assert most <= 4 * MIB


@pytest.mark.parametrize("limit", [MIB, 40 * MIB])
def test_one_group_that_is_larger_than_the_limit_goes_alone(monkeypatch, limit):
    monkeypatch.setattr(arrays, "takes_host_memory", lambda leaf: False)
    staging, flight, most = arrays.Staging(limit, lambda done: None), [], 0
    for group in grouped(((leaf,) for leaf in leaves(5, 8 * MIB)), limit):
        assert len(group.members) == 1  # A large leaf has memory of its own.
        staging.reserve(group)
        flight.append(group.n_bytes)
        most = max(most, sum(flight))
        staging.add(group, targets_of(group), [Watched(flight, group.n_bytes)])
    staging.finish()
    assert most == (8 * MIB if limit == MIB else 40 * MIB)


def test_leaves_are_read_as_they_lie_in_the_files_subtree_by_subtree():
    names = ["b.x", "step", "b.y", "a.x", "b.z", "rate"]
    mine = [leaf._replace(name=name) for leaf, name in zip(leaves(6, 64), names, strict=True)]
    where = {"b.x": ("g", 64), "b.y": ("f", 64), "b.z": ("f", 0), "step": ("f", 512)}
    values = {f"{name}/0": Extent(file, start, 64) for name, (file, start) in where.items()}
    values["rate/0"] = b"short"
    found = [leaf.name for leaf in in_order(mine, values)]
    assert found == ["b.z", "b.y", "b.x", "rate", "step", "a.x"]
    assert [leaf.name for leaf in in_order(mine, {})] == [
        "b.x",
        "b.y",
        "b.z",
        "step",
        "rate",
        "a.x",
    ]
