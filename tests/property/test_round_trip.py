"""Any tree over any mesh comes back bit for bit, by stock Orbax, also onto another mesh."""

import tempfile

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
from equipment.trees import assert_same, random_array
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from property.strategies import DTYPES, devices, divided, meshes, sharding_of

import lazy_orbax

MIB = 2**20
SCALARS = st.one_of(
    st.booleans(),
    st.integers(-(2**31), 2**31 - 1),
    st.floats(allow_nan=False),
    st.text(max_size=5),
)
# Neither dots nor slashes: names that are the same path are another test's.
names = st.text("abz é-%", min_size=1, max_size=4)
# Shrinking would save and restore a hundred times more.
PHASES = [phase for phase in Phase if phase is not Phase.shrink]


@st.composite
def states(draw, most_meshes=2):
    """A tree of sharded arrays and what else stock Orbax takes, and its values on the host."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    some_meshes = draw(st.lists(meshes(devices()), min_size=1, max_size=most_meshes))

    def array():
        dtype = draw(st.sampled_from(DTYPES))
        shape, sharding = draw(divided(draw(st.sampled_from(some_meshes)), most_per_shard=4))
        if shape and draw(st.integers(0, 5)) == 0:  # Several slabs, more than the budget.
            shape = (shape[0] * 2**12, *shape[1:])
        if np.prod(shape) * dtype.itemsize > 4 * MIB:
            shape, sharding = (8,), sharding_of((8,), sharding.mesh)
        memory = draw(st.sampled_from([None, None, None, "pinned_host"]))
        # XLA's layout of packed integers in host memory is not ours to test.
        if memory and dtype != ml_dtypes.int4:
            sharding = sharding.with_memory_kind(memory)
        host = random_array(rng, shape, dtype)
        return jax.device_put(host, sharding, may_alias=False), np.array(host)

    def leaf():
        kind = draw(st.sampled_from(["array"] * 5 + ["numpy", "scalar", "key"]))
        if kind == "array":
            return array()
        if kind == "scalar":
            value = draw(SCALARS)
            return value, value
        if kind == "key":
            seed = draw(st.integers(0, 9))
            return jax.random.key(seed), jax.random.key(seed)
        shape = tuple(draw(st.lists(st.integers(1, 5), max_size=3)))
        host = random_array(rng, shape, draw(st.sampled_from([np.float64, np.int16, np.bool_])))
        return host, np.array(host)

    pairs = {"first": leaf(), "list": [leaf() for _ in range(draw(st.integers(0, 3)))]}
    for name in draw(st.lists(names, max_size=4, unique=True)):
        pairs[name] = leaf() if draw(st.booleans()) else {"inner": leaf()}

    def side(i):
        return jax.tree.map(lambda pair: pair[i], pairs, is_leaf=lambda x: isinstance(x, tuple))

    return side(0), side(1)


def restored(directory, state, sharding_for):
    """What stock Orbax restores, arrays with the shardings that `sharding_for` says."""

    def restore_args(leaf):
        if not isinstance(leaf, jax.Array):
            return ocp.RestoreArgs()
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return ocp.ArrayRestoreArgs(sharding=leaf.sharding)
        return ocp.ArrayRestoreArgs(sharding=sharding_for(leaf))

    with ocp.PyTreeCheckpointer() as stock:
        args = jax.tree.map(restore_args, state)
        return stock.restore(directory, item=state, restore_args=args)


@settings(max_examples=25, phases=PHASES)
@given(
    states(),
    meshes(devices()),
    st.sampled_from(["stage", "direct", "auto"]),
    st.integers(MIB, 8 * MIB),
    st.booleans(),
    st.booleans(),
)
def test_what_is_saved_is_what_stock_orbax_restores(
    pair, other_mesh, mode, slab_bytes, use_ocdbt, use_zarr3
):
    state, wanted = pair
    options = lazy_orbax.LazyOptions(mode=mode, slab_bytes=slab_bytes, host_bytes=MIB)
    handler = lazy_orbax.pytree_handler(options=options, use_ocdbt=use_ocdbt, use_zarr3=use_zarr3)
    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/1"
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(path, args=ocp.args.PyTreeSave(state))
        same = restored(path, state, lambda leaf: leaf.sharding)
        assert_same(same, wanted)
        elsewhere = restored(path, state, lambda leaf: sharding_of(leaf.shape, other_mesh))
        assert_same(elsewhere, wanted)
        for before, after in zip(jax.tree.leaves(state), jax.tree.leaves(same), strict=True):
            if isinstance(before, jax.Array):
                assert after.sharding == before.sharding


@settings(max_examples=10, phases=PHASES)
@given(states(), st.sampled_from(["stage", "direct"]))
def test_the_state_may_be_donated_as_soon_as_save_returns(pair, mode):
    state, wanted = pair
    options = lazy_orbax.LazyOptions(mode=mode, slab_bytes=MIB, host_bytes=MIB)
    step = jax.jit(lambda arrays: [x[::-1] if x.ndim else x for x in arrays], donate_argnums=0)
    with tempfile.TemporaryDirectory() as directory:
        handler = lazy_orbax.pytree_handler(options=options)
        with ocp.AsyncCheckpointer(handler) as checkpointer:
            checkpointer.save(f"{directory}/1", args=ocp.args.PyTreeSave(state))
            for leaf in jax.tree.leaves(state):
                if isinstance(leaf, jax.Array) and leaf.sharding.memory_kind == "device":
                    step([leaf])
                elif isinstance(leaf, np.ndarray):
                    leaf[...] = 0
            checkpointer.wait_until_finished()
        assert_same(restored(f"{directory}/1", state, lambda leaf: leaf.sharding), wanted)


@settings(max_examples=12, phases=PHASES)
@given(states(most_meshes=1), st.booleans(), st.booleans())
def test_what_a_step_copied_is_what_stock_orbax_restores(pair, use_ocdbt, use_zarr3):
    # A program runs on one set of devices and takes no strings: the arrays of the tree.
    both = zip(*map(jax.tree.leaves, pair), strict=True)
    arrays = [(leaf, host) for leaf, host in both if isinstance(leaf, jax.Array)]
    assume(arrays)
    state, wanted = map(list, zip(*arrays, strict=True))
    shardings = [leaf.sharding for leaf in state]
    may_change = [leaf.ndim > 0 and leaf.sharding.memory_kind == "device" for leaf in state]
    step = lazy_orbax.SnapshotStep(
        lambda tree: [x[::-1] if may else x for x, may in zip(tree, may_change, strict=True)]
    )
    abstract = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for x in state]
    options = lazy_orbax.LazyOptions(slab_bytes=MIB, host_bytes=MIB)
    handler = lazy_orbax.pytree_handler(options=options, use_ocdbt=use_ocdbt, use_zarr3=use_zarr3)
    with tempfile.TemporaryDirectory() as directory:
        with ocp.AsyncCheckpointer(handler) as checkpointer:
            after, snapshot = step.with_snapshot(state)
            checkpointer.save(f"{directory}/1", args=ocp.args.PyTreeSave(snapshot))
            step(after)
            checkpointer.wait_until_finished()
        with ocp.PyTreeCheckpointer() as stock:
            args = [ocp.ArrayRestoreArgs(sharding=sharding) for sharding in shardings]
            found = stock.restore(f"{directory}/1", item=abstract, restore_args=args)
        assert_same(found, wanted)
