"""What is packed without a program, against what the program packs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equipment.kept import plan_of
from equipment.training import cached_on_host
from equipment.trees import on_mesh, random_array
from jax.sharding import Mesh

from lazy_orbax.snapshot import device_to_host
from lazy_orbax.snapshot.pack_on_host import packed_on_host

DEVICES = np.array(jax.devices()[:8])
MESH = Mesh(DEVICES[[5, 2, 7, 0, 3, 6, 1, 4]].reshape(4, 2), ("a", "b"))
# Whole; shared along either axis by two, four or all; carried whole by every replica.
PLACES = [
    ((8, 6), ("a", "b")),
    ((8, 6), ("a",)),
    ((3, 8), (None, "b")),
    ((16, 3), ()),
    ((3, 5), ()),
    ((), ()),
    ((16,), (("b", "a"),)),
]


@pytest.mark.parametrize("dtypes", [[np.float32], [jnp.bfloat16, np.int16], [jnp.int4, np.int8]])
def test_it_packs_what_the_program_packs(dtypes):
    rng = np.random.default_rng(0)
    leaves = [
        on_mesh(random_array(rng, shape, dtypes[i % len(dtypes)]), MESH, *spec)
        for i, (shape, spec) in enumerate(PLACES)
    ]
    plan = plan_of(leaves)
    (slab,) = plan.slabs
    found = packed_on_host(plan, slab, leaves)
    packed = device_to_host.to_host(device_to_host.stage(plan, slab, leaves)).arrays[0]
    ours, wanted = (
        device_to_host.views(plan, device_to_host.Held(slab, (buffers,), None, on_host=True))
        for buffers in (found, packed)
    )
    assert [(piece, view.tobytes()) for piece, view in ours] == [
        (piece, view.tobytes()) for piece, view in wanted
    ]
    assert sum(buffer.nbytes for buffer in found.values()) <= slab.n_bytes


def test_it_takes_the_shards_of_this_process():
    host = np.arange(16, dtype=np.float32)
    leaf = on_mesh(host, Mesh(DEVICES, ("a",)), "a")
    plan = plan_of([leaf])
    (slab,) = plan.slabs
    mine = dataclasses.replace(slab, pieces=slab.pieces[2:4])
    found = packed_on_host(plan, mine, [leaf])
    assert {device.id: buffer.tolist() for device, buffer in found.items()} == {
        DEVICES[2].id: [4, 5],
        DEVICES[3].id: [6, 7],
    }


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, jnp.int4])
def test_it_keeps_no_view_of_the_arrays(dtype):
    wanted = random_array(np.random.default_rng(0), (16, 256), dtype)
    given = [on_mesh(wanted, MESH, "a", "b"), on_mesh(wanted, MESH)]
    # JAX may have taken the memory of `wanted` itself, which nobody can donate.
    own = jax.jit(lambda x: [jnp.copy(y) for y in x], out_shardings=[x.sharding for x in given])
    leaves = jax.block_until_ready(own(given))
    plan = plan_of(leaves)
    found = [packed_on_host(plan, slab, leaves) for slab in plan.slabs]
    assert not cached_on_host(leaves)
    before = [[s.data.unsafe_buffer_pointer() for s in x.addressable_shards] for x in leaves]
    shardings = [leaf.sharding for leaf in leaves]
    step = jax.jit(lambda x: [-y for y in x], donate_argnums=0, out_shardings=shardings)
    leaves = jax.block_until_ready(step(leaves))
    after = [[s.data.unsafe_buffer_pointer() for s in x.addressable_shards] for x in leaves]
    assert after == before
    assert len(found) == 1
