"""Beyond 2**31 elements: no program of ours has an index that 32 bits cannot hold.

Without 64-bit integers in JAX every index that a program computes has 32 bits, on every backend.
Nothing here takes memory: the leaves are described, and the programs are only traced.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from lazy_orbax.integrity.chunk_location import chunk_keys
from lazy_orbax.integrity.digest_file import LeafDigests
from lazy_orbax.plan.boxes import Box, parts
from lazy_orbax.plan.shards import Leaf, ReplicaPolicy
from lazy_orbax.plan.slabs import make_plan
from lazy_orbax.pods import consensus
from lazy_orbax.restore import latest_good
from lazy_orbax.snapshot import pack

MOST = np.iinfo(np.int32).max
FOUR = Mesh(np.array(jax.devices()[:4]), ("d",))
PAIRS = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("a", "b"))
ONE = SingleDeviceSharding(jax.devices()[0])
I8, F32, BF16 = np.dtype(np.int8), np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)
GIB = 2**30


def leaves_of(*descriptions):
    return [Leaf(i, f"x{i}", f"[{i}]", *parts) for i, parts in enumerate(descriptions)]


def plan_of(leaves, *, slab_bytes=64 * 2**20, **policy):
    return make_plan(leaves, ReplicaPolicy(**policy), process_index=0, slab_bytes=slab_bytes)


def on(mesh, *spec):
    return NamedSharding(mesh, P(*spec))


TREES = {
    "one leaf on four devices, default options": [((2_870_000_000,), I8, on(FOUR))],
    "the most that can be indexed, and what follows": [
        ((n,), I8, ONE) for n in (MOST - 1, MOST, MOST + 1, MOST + 2)
    ],
    "replicated at the boundary": [
        ((n,), I8, on(FOUR)) for n in (2**31 - 4, 2**31, 2**31 + 4, 2**32 - 4, 2**32, 2**33)
    ],
    "whole slabs of 1 GiB leaves": [((GIB,), I8, ONE)] * 3,
    "four bytes an element": [((GIB // 4,), F32, ONE), ((GIB,), F32, ONE)] * 3,
    "shards that fit of arrays that do not": [((2**33 - 4,), I8, on(FOUR, "d"))] * 2,
    "shards that do not fit either": [((2**33,), I8, on(FOUR, "d"))] * 2,
    "two dimensions": [((2**16, n), I8, on(PAIRS, None, "a")) for n in (2**16 - 4, 2**16, 2**17)],
    "a first dimension that no replica divides": [((3, 2**31), BF16, on(FOUR))],
}


@pytest.mark.parametrize("slab_bytes", [64 * 2**20, 2**32, 2**40])
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("parallel", [True, False])
def test_no_program_packs_what_32_bits_cannot_index(tree, slab_bytes, parallel):
    leaves = leaves_of(*TREES[tree])
    plan = plan_of(leaves, slab_bytes=slab_bytes, parallel=parallel)
    assert sorted(i for slab in plan.slabs for i in slab.leaves) == list(range(len(leaves)))
    for slab in plan.slabs:
        if slab.kind != "mesh":
            continue
        shards = [leaves[i].sharding.shard_shape(leaves[i].shape) for i in slab.leaves]
        assert max(map(math.prod, shards)) <= MOST
        assert sum(math.prod(plan.layouts[i].write_shape) for i in slab.leaves) <= MOST


@pytest.mark.parametrize("into", [True, False])
@pytest.mark.parametrize("slab_bytes", [64 * 2**20, 2**40])
@pytest.mark.parametrize("tree", TREES)
def test_every_value_of_a_program_on_a_device_can_be_indexed_with_32_bits(tree, slab_bytes, into):
    plan = plan_of(leaves_of(*TREES[tree]), slab_bytes=slab_bytes)
    for slab in plan.slabs:
        if slab.kind == "mesh":
            for eqn in on_each_device(traced(plan, slab, into=into)):
                for value in (*eqn.invars, *eqn.outvars):
                    assert math.prod(value.aval.shape) <= MOST, eqn
                    literal = getattr(value, "val", None)
                    assert literal is None or abs(int(literal)) <= MOST, eqn


def test_a_cut_computes_its_start_and_nothing_else():
    """The start of a share is its number times its size: no sum of both, which might not fit."""
    plan = plan_of(leaves_of(((2**31 - 4,), I8, on(FOUR))))
    names = [eqn.primitive.name for eqn in on_each_device(traced(plan, plan.slabs[0], into=False))]
    assert "dynamic_slice" in names
    assert not {"add", "sub", "select_n", "lt"} & set(names)


def test_a_share_of_a_large_shard_is_cut_out_with_bounds_of_64_bits():
    large = jax.ShapeDtypeStruct((2_870_000_000,), I8)
    program = pack.share_of.lower(large, (2_152_500_000,), (717_500_000,)).as_text()
    assert "stablehlo.slice" in program
    assert "2152500000:2870000000" in program
    assert "dynamic" not in program


@pytest.mark.parametrize("shape", [(64,), (8, 6), (3, 8, 5)])
def test_a_part_of_a_shard_is_that_part(shape):
    host = np.arange(math.prod(shape), dtype=np.uint32).reshape(shape)
    start, size = tuple(n // 2 for n in shape), tuple(n - 1 - n // 2 for n in shape)
    found = pack.share_of(jax.device_put(host, ONE), start, size)
    assert np.array_equal(found, host[tuple(slice(n // 2, n - 1) for n in shape)])


def test_processes_agree_on_steps_that_32_bits_cannot_hold(monkeypatch, tmp_path):
    """As when the step counts tokens. What JAX sends without 64-bit integers has 32 bits."""
    steps = [0, MOST, MOST + 1, 2**32, 2**40 + 1]
    manager = SimpleNamespace(directory=tmp_path, reload=lambda: None, all_steps=lambda: steps)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    sent = lambda array: np.asarray(jnp.asarray(array))  # noqa: E731
    monkeypatch.setattr(consensus.multihost_utils, "broadcast_one_to_all", sent)
    found, skipped = latest_good._steps(manager)
    assert [step for step, _ in found] == steps[::-1]
    assert skipped == []


def test_what_touches_a_box_is_found_beyond_32_bits():
    starts = [0, MOST, MOST + 1, 2**32, 2**40, 2**61]
    boxes = tuple(Box((start, 3), (1, 2**31)) for start in starts)
    leaf = LeafDigests("x", "int8", (2**62, 2**33), boxes, tuple(range(len(boxes))))
    for i, start in enumerate(starts):
        for column in (3, 2**31 + 2):
            assert leaf.touching(Box((start, column), (1, 1))) == [(boxes[i], i)]
        for column in (2, 2**31 + 3):
            assert leaf.touching(Box((start, column), (1, 1))) == []


def test_parts_of_a_large_array_follow_each_other():
    shape, end = (3, 2**33 + 5), 0
    for part in parts(shape, 2, 2**26):
        assert part.start[0] * shape[1] + part.start[1] == end
        assert math.prod(part.shape) * 2 <= 2**26
        end += math.prod(part.shape)
    assert end == math.prod(shape)


@pytest.mark.parametrize("driver", ["zarr", "zarr3"])
def test_the_key_of_a_chunk_beyond_32_bits(driver):
    spec = {"driver": driver, "kvstore": {"driver": "memory"}}
    store = ts.open(
        spec, create=True, dtype="int8", shape=[2**40], chunk_layout=ts.ChunkLayout(chunk_shape=[7])
    ).result()
    first = "c/" if driver == "zarr3" else ""
    for start in (MOST - 1, 2**31, 2**32 + 1, 2**40 - 7):
        keys = chunk_keys(store, Box((start,), (7,)))
        assert keys == [f"{first}{n}" for n in range(start // 7, (start + 6) // 7 + 1)]


def traced(plan, slab, *, into):
    return pack.program(plan, slab, into=into)[0].traced().jaxpr


def on_each_device(jaxpr):
    """The equations inside of `shard_map`: outside, shapes are those of all devices together."""
    (outer,) = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "shard_map"]
    todo, found = [outer.params["jaxpr"]], []
    while todo:
        for eqn in todo.pop().eqns:
            inner = [p for p in eqn.params.values() if hasattr(p, "eqns") or hasattr(p, "jaxpr")]
            todo += [getattr(one, "jaxpr", one) for one in inner]
            found += [] if inner else [eqn]
    return found
