"""Which mode a slab gets, on backends with and without memory statistics."""

import dataclasses
import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from equipment.fake_devices import fake_mesh
from jax.sharding import Mesh

from lazy_orbax._machine import free_device_bytes
from lazy_orbax.plan.slabs import Slab
from lazy_orbax.snapshot import choose_mode
from lazy_orbax.snapshot.choose_mode import Room

DEVICES = np.array(jax.devices()[:8])
MESH = Mesh(DEVICES.reshape(4, 2), ("a", "b"))
HALF = Mesh(DEVICES[4:].reshape(2, 2), ("a", "b"))


def slabs_of(n, *, n_bytes=100, mesh=HALF):
    return [Slab("mesh", (0,), (None,), (), n_bytes * 4, n_bytes, mesh) for _ in range(n)]


@pytest.fixture
def accelerator(monkeypatch):
    """An accelerator whose devices have so many bytes free, by device."""
    free, asked = {}, []

    def free_bytes(device):
        asked.append(device)
        return free.get(device, math.inf)

    monkeypatch.setattr(choose_mode, "is_in_host_memory", lambda slab: False)
    monkeypatch.setattr(choose_mode, "free_device_bytes", free_bytes)
    return SimpleNamespace(free=free, asked=asked)


@pytest.mark.parametrize(("n_bytes", "mode"), [(2**29, "copy"), (2**29 + 4, "stage")])
def test_what_is_not_compiled_is_copied_unless_that_takes_longer(
    monkeypatch, copying_first, n_bytes, mode
):
    slabs = slabs_of(4)[:2]
    halves = [dataclasses.replace(slab, n_bytes=n_bytes // 2) for slab in slabs]
    monkeypatch.setattr(choose_mode, "is_compiled", lambda plan, slab: False)
    chosen = Room("auto", SimpleNamespace(slabs=halves))
    assert [chosen.mode_for(slab) for slab in halves] == [mode] * 2
    assert Room("auto").mode_for(halves[0]) == "stage"


@pytest.mark.parametrize(
    ("free_bytes", "modes"),
    [
        (math.inf, ["stage"] * 4),
        (400, ["stage"] * 4),
        (399, ["stage"] * 3 + ["direct"]),
        (250, ["stage", "stage", "direct", "direct"]),
        (99, ["direct"] * 4),
        (0, ["direct"] * 4),
        (-1000, ["direct"] * 4),  # The step at its peak took more than is usable.
    ],
)
def test_auto_stages_what_fits_and_sends_the_rest(accelerator, free_bytes, modes):
    accelerator.free.update(dict.fromkeys(HALF.devices.flat, free_bytes))
    chosen = Room("auto")
    assert [chosen.mode_for(slab) for slab in slabs_of(4)] == modes


def test_the_fullest_device_decides(accelerator):
    accelerator.free[HALF.devices[1, 1]] = 150
    chosen = Room("auto")
    assert [chosen.mode_for(slab) for slab in slabs_of(3)] == ["stage", "direct", "direct"]


def test_a_small_slab_still_fits_after_a_large_one_did_not(accelerator):
    accelerator.free.update(dict.fromkeys(HALF.devices.flat, 150))
    chosen = Room("auto")
    (large,), (small,) = slabs_of(1, n_bytes=200), slabs_of(1, n_bytes=100)
    assert [chosen.mode_for(slab) for slab in (large, small)] == ["direct", "stage"]


def test_meshes_that_share_devices_share_their_memory(accelerator):
    accelerator.free.update(dict.fromkeys(DEVICES, 150))
    chosen = Room("auto")
    (first,), (second,) = slabs_of(1, mesh=HALF), slabs_of(1, mesh=MESH)
    (elsewhere,) = slabs_of(1, mesh=Mesh(DEVICES[:4], ("a",)))
    assert [chosen.mode_for(slab) for slab in (first, second, elsewhere)] == [
        "stage",
        "direct",
        "stage",
    ]


def test_memory_is_asked_once_per_device_and_save(accelerator):
    chosen = Room("auto")
    for slab in slabs_of(5):
        chosen.mode_for(slab)
    assert sorted(d.id for d in accelerator.asked) == sorted(d.id for d in HALF.devices.flat)


@pytest.mark.parametrize("mode", ["stage", "direct"])
def test_a_mode_that_was_asked_for_is_used_whatever_is_free(accelerator, mode):
    accelerator.free.update(dict.fromkeys(HALF.devices.flat, 0))
    chosen = Room(mode)
    assert [chosen.mode_for(slab) for slab in slabs_of(2)] == [mode, mode]
    assert accelerator.asked == []


@pytest.mark.parametrize("mode", ["auto", "stage", "direct"])
@pytest.mark.parametrize(
    ("kind", "expected"), [("host", "host"), ("shards", "direct"), ("given", "in_step")]
)
def test_slabs_that_cannot_be_packed_have_one_mode(mode, kind, expected):
    slab = Slab(kind, (0,), (None,), (), 64, 64)
    assert Room(mode).mode_for(slab) == expected


def test_on_cpu_auto_stages(monkeypatch):
    monkeypatch.setattr(choose_mode, "free_device_bytes", lambda device: 0)
    assert Room("auto").mode_for(slabs_of(1)[0]) == "stage"


def test_devices_of_other_processes_do_not_decide(accelerator):
    mesh = fake_mesh([0, 0, 1, 1], (4,), "a")
    here, elsewhere = list(mesh.devices.flat[:2]), list(mesh.devices.flat[2:])
    accelerator.free.update({**dict.fromkeys(here, 100), **dict.fromkeys(elsewhere, 0)})
    chosen = Room("auto")
    assert [chosen.mode_for(slab) for slab in slabs_of(2, mesh=mesh)] == ["stage", "direct"]
    assert accelerator.asked == here


def test_the_reason_has_one_clause_for_each_mode(accelerator):
    accelerator.free.update(dict.fromkeys(HALF.devices.flat, 250))
    chosen = Room("auto")
    assert chosen.reason == ""
    for slab in [*slabs_of(4), Slab("host", (0,), (None,), (), 64, 64)]:
        chosen.mode_for(slab)
    assert chosen.reason == (
        "stage: a device had 250 bytes free for 100; "
        "direct: a device had 50 bytes free for 100; host: not on a device"
    )


def test_the_reason_says_what_else_decides(accelerator, monkeypatch):
    def reason(mode):
        chosen = Room(mode)
        chosen.mode_for(slabs_of(1)[0])
        return chosen.reason

    assert reason("auto") == "stage: device memory is not counted here"
    assert reason("direct") == "direct: asked for"
    monkeypatch.undo()
    assert reason("auto") == "stage: device memory is host memory here"


@pytest.mark.parametrize(
    ("stats", "expected"),
    [
        (None, math.inf),
        ({}, math.inf),
        ({"bytes_in_use": 7}, math.inf),
        ({"bytes_limit": 1000}, 950),
        ({"bytes_limit": 1000, "bytes_in_use": 200}, 750),
        ({"bytes_limit": 1000, "bytes_in_use": 200, "peak_bytes_in_use": 600}, 350),
        ({"bytes_limit": 1000, "bytes_in_use": 700, "peak_bytes_in_use": 600}, 250),
        ({"bytes_limit": 1000, "peak_bytes_in_use": 990}, -40),
    ],
)
def test_what_a_step_at_its_peak_leaves_free(stats, expected):
    device = SimpleNamespace(memory_stats=lambda: stats)
    assert free_device_bytes(device) == pytest.approx(expected)
