"""Leaves and slabs of more than 2**31 elements, really saved, and restored by stock Orbax.

They take minutes, 3 GB of disk and up to 9 GB of memory, so they run on request:
`LAZY_ORBAX_LARGE=1 python -m pytest -n 0 tests/interop/test_large_leaves.py`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import lazy_orbax
from lazy_orbax.integrity import digest
from lazy_orbax.plan.shards import Leaf, ReplicaPolicy
from lazy_orbax.plan.slabs import make_plan
from lazy_orbax.snapshot import device_to_host

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.environ.get("LAZY_ORBAX_LARGE") != "1",
        reason="takes 9 GB of memory; runs with LAZY_ORBAX_LARGE=1",
    ),
]
BLOCK = 2**20
GIB = 2**30


def numbers(n: int, seed: int) -> np.ndarray:
    """Returns int8 of which no two blocks are alike, so that nothing can be elsewhere unnoticed."""
    # Aligned as XLA wants it: devices of CPU that have the same numbers share this memory.
    memory = np.empty(n + 64, np.int8)
    found = memory[-memory.ctypes.data % 64 :][:n]
    block = np.random.default_rng(seed).integers(-128, 128, BLOCK, dtype=np.int8)
    for i, start in enumerate(range(0, n, BLOCK)):
        part = found[start : start + BLOCK]
        part[:] = block[: len(part)]
        part[:8] = np.frombuffer(i.to_bytes(8, "little"), np.int8)[: len(part)]
        block = np.roll(block, 1)
    return found


def wrong_blocks(found: np.ndarray, wanted: np.ndarray) -> Iterator[int]:
    """Yields where blocks start that differ: pytest would print the arrays themselves."""
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
    for start in range(0, len(wanted), BLOCK):
        if not np.array_equal(found[start : start + BLOCK], wanted[start : start + BLOCK]):
            yield start


FOUR = Mesh(np.array(jax.devices()[:4]), ("d",))
REPLICATED, DIVIDED = NamedSharding(FOUR, P()), NamedSharding(FOUR, P("d"))
ONE = SingleDeviceSharding(jax.devices()[0])
SLABS = {"slab_bytes": 4 * GIB, "host_bytes": 16 * GIB}
CASES = {  # How many bytes, as what, where, and the options.
    "on four devices, default options": ([2_870_000_000], np.int8, REPLICATED, {}),
    "on one device": ([2_300_000_000], np.int8, ONE, {}),
    "in host memory": ([2_300_000_000], np.int8, None, {}),
    "divided among devices": ([600_000_000 * 4], np.int8, DIVIDED, SLABS),
    "slabs of 4 GiB": ([GIB] * 3, np.int8, ONE, SLABS),
    "slabs of 4 GiB, straight to the host": ([GIB] * 3, np.int8, ONE, SLABS | {"mode": "direct"}),
    "slabs of 4 GiB, four bytes an element": ([GIB] * 3, np.float32, ONE, SLABS),
}


@pytest.mark.parametrize("case", CASES)
def test_stock_orbax_restores_every_bit(tmp_path, case):
    sizes, dtype, sharding, knobs = CASES[case]
    hosts = [numbers(n, seed) for seed, n in enumerate(sizes)]
    handler = lazy_orbax.pytree_handler(options=lazy_orbax.LazyOptions(**knobs))
    state = [host.view(dtype) for host in hosts]
    if sharding is not None:
        state = jax.device_put(state, [sharding] * len(state))
    with ocp.CheckpointManager(tmp_path, item_handlers=handler) as manager:
        manager.save(0, args=ocp.args.PyTreeSave(state))
        manager.wait_until_finished()
    del state
    as_numpy = [ocp.RestoreArgs(restore_type=np.ndarray)] * len(sizes)
    with ocp.CheckpointManager(tmp_path, item_handlers=ocp.PyTreeCheckpointHandler()) as manager:
        found = manager.restore(0, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    for one, wanted in zip(found, hosts, strict=True):
        assert one.dtype == dtype
        assert next(wrong_blocks(one.view(np.int8), wanted), None) is None
    del found
    assert lazy_orbax.verify(tmp_path).is_whole


def test_the_digest_is_of_every_byte():
    """Of memory that only looks like so much: pages of zeros that nobody wrote take none."""
    array = np.zeros(2**32 + 5, np.int8)
    array[[3, 2**31, 2**32]] = 1, 2, 3
    found, hasher = digest.digest_of(array), digest.hasher()
    for part in digest.parts(array.shape, 1, 2**26):
        hasher.update(array[part.index].data)
    assert found == hasher.intdigest()
    array[-1] = 4
    assert found != digest.digest_of(array)


def test_the_share_of_one_process_is_cut_out_right():
    """As with four processes of one device, each of which sends its share to the host."""
    host = numbers(2_870_000_000, seed=0)
    array = jax.device_put(host, REPLICATED)
    leaf = Leaf(0, "x", "['x']", array.shape, array.dtype, REPLICATED)
    plan = make_plan([leaf], ReplicaPolicy(), process_index=0, slab_bytes=GIB)
    (slab,) = plan.slabs
    slab = dataclasses.replace(slab, pieces=slab.pieces[-1:])
    share = dataclasses.replace(plan.layouts[0], holds_whole_shards=False)
    plan = dataclasses.replace(plan, layouts=(share,), slabs=(slab,))
    ((piece, found),) = device_to_host.views(
        plan, device_to_host.to_host(device_to_host.direct(plan, slab, [array]))
    )
    assert piece.shape == found.shape == (717_500_000,)
    assert piece.start == (2_152_500_000,)
    assert next(wrong_blocks(found, host[piece.index]), None) is None
