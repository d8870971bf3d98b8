"""Stock Orbax as the oracle of whole situations, not of one property at a time.

What stock accepts we accept: what is on disk is the same, and what stock and we restore of ours is
what stock restores of its own, bit for bit. What stock refuses we refuse, by an error of ours that
names the leaf, and write nothing. Stock saves under no context of JAX's, from the main thread, for
none may change what is saved.

The quick size is a fixed set of examples. The nightly one draws others every time:

    pytest tests/property/test_situations.py -m "" --hypothesis-profile=nightly
"""

from __future__ import annotations

import contextlib
import functools
import math
import pathlib
import tempfile
import threading
import types

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from equipment import contexts
from equipment.oracle import (
    STOCK_WARNS,
    attempt,
    bits_of,
    bits_stored,
    described,
    face,
    readable,
    save,
    stored,
)
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint._src.serialization import replica_slices
from property.situations import Situation, places, situations, twin

import lazy_orbax
from lazy_orbax.errors import LazyOrbaxError
from lazy_orbax.plan.shards import Leaf, ReplicaPolicy, layout_of

pytestmark = STOCK_WARNS
NIGHTLY = settings.get_current_profile_name() == "nightly"
# Shrinking saves and restores a hundred times more: for who looks into what the night found.
PHASES = [phase for phase in Phase if NIGHTLY or phase is not Phase.shrink]

# Where we differ on purpose: what our error says, and what stock does instead.
DELIBERATE = {
    "both stored as": "stock saves one leaf over the other, without a word",
}
# The words of stock's own part of the handler, which sees the tree before us, or of JAX: these name
# the leaf, or are about the tree as a whole.
THEIR_WORDS = ("Unsupported type: ", "Found empty item", "Comparator raised exception")


def sized(quick: int):
    """So many examples, the same every time; or a night's."""
    n_examples = settings().max_examples if NIGHTLY else quick
    return settings(
        max_examples=n_examples,
        derandomize=not NIGHTLY,
        phases=PHASES,
        suppress_health_check=list(HealthCheck),
    )


def save_args(situation: Situation, tree):
    if situation.cast is None or situation.face == "standard":
        return None
    dtype = np.dtype(getattr(ml_dtypes, situation.cast, situation.cast))

    def of_leaf(leaf):
        is_key = isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(
            leaf.dtype, jax.dtypes.prng_key
        )
        return ocp.SaveArgs() if is_key else ocp.SaveArgs(dtype=dtype)

    return jax.tree.map(of_leaf, tree)


def clobber(tree) -> None:
    """Does to a tree what a step that donates it does, and worse."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array):
            leaf.delete()
        elif isinstance(leaf, np.ndarray) and leaf.flags.writeable:
            leaf[...] = np.zeros((), leaf.dtype)


def save_ours(situation: Situation, lazy, args_type, directory: pathlib.Path) -> None:
    """Saves as the situation says, the look-alike before."""

    def args_of(tree):
        arguments = save_args(situation, tree)
        return args_type(tree) if arguments is None else args_type(tree, arguments)

    if situation.look_alike:
        with contextlib.suppress(Exception):
            save(lazy, directory / "before", args_of(situation.values(twin)))
    tree = situation.values()
    with contexts.ALL[situation.context]():
        if not situation.lazily:
            save(lazy, directory / "1", args_of(tree))
            return
        with ocp.AsyncCheckpointer(lazy) as checkpointer:
            checkpointer.save(directory / "1", args=args_of(tree))
            clobber(tree)
            checkpointer.wait_until_finished()


def run_in(thread: bool, action) -> None:
    """Runs it, perhaps in a thread of its own; raises what it raises."""
    if not thread:
        action()
        return
    errors = []

    def caught():
        try:
            action()
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    worker = threading.Thread(target=caught)
    worker.start()
    worker.join()
    if errors:
        raise errors[0]


def check_refusal(error: Exception, tree, directory: pathlib.Path) -> None:
    paths = []
    with contextlib.suppress(Exception):
        paths = [
            jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)
        ]
    said = str(error)
    if not any(text in said for text in THEIR_WORDS):
        assert isinstance(error, LazyOrbaxError), repr(error)
        assert any(path in said for path in paths), said
    assert not any(file.is_file() for file in directory.rglob("*")), "something was written"


def check(situation: Situation, directory: pathlib.Path) -> str:
    kind = face(situation.face)
    tree = situation.values()
    stock = kind.stock(**situation.settings)
    arguments = save_args(situation, tree) if mappable(tree) else None
    given_args = (tree,) if arguments is None else (tree, arguments)
    by_stock, by_us = directory / "stock", directory / "ours" / "1"
    with jax.enable_x64(True):
        wanted, why = attempt(lambda: save(stock, by_stock, kind.stock_save(*given_args)))
    lazy = kind.lazy(options=lazy_orbax.LazyOptions(**situation.options), **situation.settings)
    (directory / "ours").mkdir()
    action = functools.partial(save_ours, situation, lazy, kind.save, directory / "ours")
    found, error = attempt(lambda: run_in(situation.in_thread, action))
    note(f"stock: {wanted} {why!r}; ours: {found} {error!r}")
    if found == "refused" and wanted == "accepted":
        assert any(text in str(error) for text in DELIBERATE), repr(error)
        return "refused on purpose"
    assert found == wanted, f"stock: {wanted} {why!r}; ours: {found} {error!r}"
    if found == "refused":
        check_refusal(error, tree, by_us)
        return "refused"
    ours, theirs = stored(by_us), stored(by_stock)
    for files in (ours, theirs):
        for name in ("_CHECKPOINT_METADATA", "commit_success.txt"):
            files.pop(name, None)
    assert ours.keys() == theirs.keys()
    if unlike := [name for name in theirs if ours[name] != theirs[name]]:
        # Of some small floats stock alters NaNs (JAX 0.12): then the source is the oracle.
        assert bits_stored(by_stock, tree) != bits_of(tree), unlike
        assert bits_stored(by_us, tree) == bits_of(tree), unlike
        return "better than stock"
    lazy = kind.lazy(**situation.settings)
    with jax.enable_x64(True):
        assert described(lazy, by_us) == described(stock, by_stock)
        back = readable(by_stock, stock, situation.face, tree)
        assert readable(by_us, stock, situation.face, tree) == back
        assert readable(by_us, lazy, situation.face, tree) == back
    assert lazy_orbax.verify(by_us).ok
    return "accepted"


def mappable(tree) -> bool:
    return attempt(lambda: jax.tree.leaves(tree))[0] == "accepted"


@sized(16)
@given(situations())
def test_what_stock_does_with_a_situation_is_what_we_do(situation):
    # What stock refuses it may go on writing.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        check(situation, pathlib.Path(directory))


class Shards:
    """What Orbax asks of an array when it divides shards among replicas; it has no memory."""

    def __init__(self, shape, sharding):
        self.shape, self.sharding = shape, sharding
        data = jax.ShapeDtypeStruct(sharding.shard_shape(shape), np.int8)
        self.addressable_shards = [types.SimpleNamespace(data=data)]


@settings(derandomize=not NIGHTLY)
@given(places(), st.lists(st.sampled_from([1, 2**16, 2**31 - 1, 2**31, 2**32 + 2]), min_size=3))
def test_shares_of_replicas_are_those_of_stock_also_where_32_bits_end(drawn, times):
    shape, sharding = drawn
    shape = tuple(n * m for n, m in zip(shape, times))
    if sharding is None:
        return
    layout = layout_of(
        Leaf(0, "x", "['x']", shape, np.dtype(np.int8), sharding), ReplicaPolicy(), 0
    )
    array = Shards(shape, sharding)
    axis, share, _ = replica_slices.calculate_replica_parallel_axis_and_local_shape(array, None)
    assert layout.share_axis == axis
    assert layout.write_shape == (share or sharding.shard_shape(shape))
    covered = sum(math.prod(layout.write_shape) for _ in layout.regions)
    assert covered == math.prod(shape)
    assert len({region.start for region in layout.regions}) == len(layout.regions)


def test_jax_makes_no_array_that_is_divided_unevenly():
    """So none is drawn. Where one of these ways begins to make them, `places` is to draw them."""
    mesh = Mesh(np.array(jax.devices()[:8]), ("a",))
    divided = NamedSharding(mesh, PartitionSpec("a"))
    host, even = np.arange(13.0), jax.device_put(np.arange(16.0), divided)
    # What a program returns by itself is replicated where it does not divide.
    constrained = jax.jit(lambda x: jax.lax.with_sharding_constraint(x[:13], divided) * 2)
    assert constrained(even).sharding.is_fully_replicated
    shards = [jax.device_put(host[2 * i : 2 * i + 2], jax.devices()[i]) for i in range(8)]
    ways = {
        "device_put": lambda: jax.device_put(host, divided),
        "out_shardings": lambda: jax.jit(lambda x: x[:13], out_shardings=divided)(even),
        "callback": lambda: jax.make_array_from_callback((13,), divided, lambda index: host[index]),
        "shards": lambda: jax.make_array_from_single_device_arrays((13,), divided, shards),
    }
    for way, make in ways.items():
        with pytest.raises(ValueError, match=r"(?s)partitioned 8 times.*13"):
            pytest.fail(f"{way}: {make().sharding}")
