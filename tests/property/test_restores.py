"""Stock Orbax as the oracle of restores: any tree and format, to any place, in any dtype.

What stock restores we restore: the same types, bits, dtypes, shardings, also whether an array is
weakly typed and committed. What stock refuses we refuse. The quick size is a fixed set of examples;
the nightly one draws others every time:

    pytest tests/property/test_restores.py -m "" --hypothesis-profile=nightly
"""

from __future__ import annotations

import dataclasses
import pathlib
import random
import tempfile
from typing import Any

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
from equipment.described import contents
from equipment.oracle import STOCK_WARNS, attempt, face, restore, save
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from property.situations import OnDevices, OnHost, Pair, empties, leaves, mapped, nodes

import lazy_orbax
from lazy_orbax.plan.shards import is_key

pytestmark = STOCK_WARNS
NIGHTLY = settings.get_current_profile_name() == "nightly"
PHASES = [phase for phase in Phase if NIGHTLY or phase is not Phase.shrink]
FACES = ("standard", "pytree", "direct")
DTYPES = "float32 bfloat16 float16 float64 int32 int8 int4 bool complex64 float8_e4m3fn uint32"
_UNKNOWN = frozenset(
    ("uint4", "int2", "uint2", "float4_e2m1fn", "float8_e3m4", "float8_e4m3", "float8_e8m0fnu")
)
# How a tree of targets differs from the one that was saved; most do not.
CHANGES = ("nothing",) * 12 + ("placeholder", "left out", "added", "shape", "plain", "nested")


@dataclasses.dataclass(frozen=True)
class Restores:
    """A checkpoint, and some ways to restore it.

    Attributes:
        tree: nodes, with a record in place of every leaf.
        seed: of the values, and of what each target asks for.
        by_us: whether we save it.
        settings: keywords of the handler that saves it.
        chunk_bytes: what chunks are to have at most, or `None`.
        targets: for each restore the face, what it is given as a target, the way in which that
            differs from what was saved, and whether 64-bit types are allowed.
    """

    tree: Any
    seed: int
    by_us: bool
    settings: dict[str, bool]
    chunk_bytes: int | None
    targets: tuple[tuple[str, str, str, bool], ...]


@st.composite
def restores(draw: Any) -> Restores:
    targets = st.tuples(
        st.sampled_from(FACES),
        st.sampled_from(["abstract", "abstract", "abstract", "values", "none"]),
        st.sampled_from(CHANGES),
        st.booleans(),
    )
    booleans = st.booleans()
    return Restores(
        tree=draw(nodes(st.recursive(leaves | leaves | empties, nodes, max_leaves=6))),
        seed=draw(st.integers(0, 2**16)),
        by_us=draw(booleans),
        settings={
            "use_ocdbt": draw(booleans),
            "use_zarr3": draw(booleans),
            "use_compression": draw(booleans),
        },
        chunk_bytes=draw(st.sampled_from([None, None, 64, 2**10])),
        targets=tuple(draw(st.lists(targets, min_size=3, max_size=3))),
    )


def storable(tree: Any) -> Any:
    """Returns a tree of which TensorStore knows every dtype."""

    def one(leaf: Any) -> Any:
        unknown = isinstance(leaf, OnDevices | OnHost) and leaf.dtype in _UNKNOWN
        return dataclasses.replace(leaf, dtype="int4") if unknown else leaf

    return mapped(tree, one, lambda key: key)


class Wishes:
    """What a target asks for, leaf by leaf, by chance."""

    def __init__(self, seed: Any):
        self._rng = random.Random(seed)

    def sharding(self, shape: tuple[int, ...]) -> Any:
        """Returns a place that an array of such a shape can have; `None` is nowhere."""
        n = self._rng.choice([1, 2, 4, 8])
        devices = self._rng.sample(jax.devices()[:8], n)
        if self._rng.random() < 0.1:
            return None
        if n == 1 and self._rng.random() < 0.5:
            return SingleDeviceSharding(devices[0])
        side = self._rng.choice([k for k in (1, 2, 4, 8) if n % k == 0])
        mesh = Mesh(np.array(devices).reshape(side, n // side), ("x", "y"))
        axes = self._rng.sample(["x", "y", ("x", "y"), None], 4)
        spec, used = [], set()
        for size in shape:
            axis = axes.pop() if axes else None
            names = set([axis] if isinstance(axis, str) else axis or ())
            parts = int(np.prod([mesh.shape[name] for name in names]))
            spec.append(None if names & used or size % parts else axis)
            used |= names if spec[-1] is not None else set()
        kind = "pinned_host" if self._rng.random() < 0.05 else None
        return NamedSharding(mesh, P(*spec), memory_kind=kind)

    def dtype(self, leaf: Any) -> Any:
        if is_key(leaf) or self._rng.random() < 0.7:
            return leaf.dtype
        name = self._rng.choice(DTYPES.split())
        return np.dtype(getattr(ml_dtypes, name, name))

    def shaped(self, leaf: Any) -> Any:
        """Returns what stands for a leaf in an abstract target."""
        if isinstance(leaf, jax.Array):
            sharding = self.sharding(leaf.shape)
            return jax.ShapeDtypeStruct(leaf.shape, self.dtype(leaf), sharding=sharding)
        if isinstance(leaf, np.ndarray | np.generic):
            if self._rng.random() < 0.6:
                return leaf
            sharding = self._rng.choice([None, self.sharding(leaf.shape)])
            return jax.ShapeDtypeStruct(leaf.shape, self.dtype(leaf), sharding=sharding)
        if type(leaf) in (int, float, bool) and self._rng.random() < 0.3:
            return self._rng.choice([0, 0.0, False, np.zeros(()), jax.ShapeDtypeStruct((), "f4")])
        return leaf

    def argument(self, leaf: Any) -> Any:
        """Returns restore args of some kind for a leaf of a target."""
        shape = getattr(leaf, "shape", ())
        make = self._rng.choice(
            [
                *[lambda: usual_args(leaf)] * 3,
                *[lambda: self._array_args(leaf, shape)] * 3,
                lambda: ocp.RestoreArgs(),
                lambda: ocp.RestoreArgs(restore_type=np.ndarray, dtype=self._maybe_dtype(leaf)),
                lambda: ocp.RestoreArgs(restore_type=self._rng.choice([int, float, str, None])),
                lambda: ocp.RestoreArgs(restore_type=jax.Array),
            ]
        )
        return make()

    def _maybe_dtype(self, leaf: Any) -> Any:
        return self.dtype(leaf) if hasattr(leaf, "dtype") and not is_key(leaf) else None

    def _array_args(self, leaf: Any, shape: tuple[int, ...]) -> ocp.ArrayRestoreArgs:
        strict = self._rng.random() < 0.9
        sharding = self.sharding(shape)
        where: dict[str, Any] = {"sharding": sharding}
        if isinstance(sharding, NamedSharding) and self._rng.random() < 0.3:
            where = {"mesh": sharding.mesh, "mesh_axes": sharding.spec}
        if not strict and shape:
            shape = (*shape[:-1], shape[-1] + self._rng.choice([-1, 0, 1, 8]))
        return ocp.ArrayRestoreArgs(
            **where,
            global_shape=self._rng.choice([None, shape]),
            dtype=self._maybe_dtype(leaf),
            strict=strict,
        )

    def changed(self, target: Any, change: str) -> Any:
        """Returns a target that differs from what was saved."""
        leaves, structure = jax.tree.flatten(target)
        if change == "nested":
            return {"one more": target}
        if change == "plain":
            return plain(target)
        if change == "added":
            return {**target, "more": 1} if type(target) is dict else target
        if change == "left out" and isinstance(target, dict) and len(target) > 1:
            gone = self._rng.choice(list(target))
            return {key: value for key, value in target.items() if key is not gone}
        if not leaves:
            return target
        i = self._rng.randrange(len(leaves))
        shape = getattr(leaves[i], "shape", None)
        if change == "placeholder":
            for j in range(len(leaves)):
                leaves[j] = ... if j == i or self._rng.random() < 0.3 else leaves[j]
        elif change == "shape" and shape:
            leaves[i] = jax.ShapeDtypeStruct((*shape[:-1], shape[-1] + 1), leaves[i].dtype)
        return jax.tree.unflatten(structure, leaves)

    def args(self, name: str, how: str, change: str, tree: Any) -> Any:
        """Returns the arguments of a restore, for stock and for us."""
        kind = face(name)
        both = kind.stock_restore, kind.restore
        if how == "none":
            return [make() for make in both]
        target = tree if how == "values" else jax.tree.map(self.shaped, tree)
        target = self.changed(target, change)
        if name == "standard":
            given = {"strict": False} if self._rng.random() < 0.1 else {}
            return [make(target, **given) for make in both]
        partial = {"partial_restore": True} if self._rng.random() < 0.3 else {}
        if self._rng.random() < 0.15:
            return [make(target, **partial) for make in both]
        some = self.argument if self._rng.random() < 0.6 else None
        arguments = jax.tree.map(some or usual_args, target)
        return [make(target, arguments, **partial) for make in both]


def usual_args(leaf: Any) -> ocp.RestoreArgs:
    """Returns the restore args that Orbax makes of a leaf, where it makes some."""
    how, found = attempt(lambda: ocp.checkpoint_utils.construct_restore_args(leaf))
    return found if how == "accepted" else ocp.RestoreArgs()


def plain(node: Any) -> Any:
    """Returns a tree of other containers, whose leaves Orbax names the same."""
    if isinstance(node, dict):
        return {key: plain(value) for key, value in node.items()}
    if isinstance(node, Pair):
        return {"first": plain(node.first), "second": plain(node.second)}
    return [*map(plain, node)] if type(node) in (list, tuple) else node


def all_of(tree: Any) -> Any:
    """Returns what a restored tree is, to compare."""
    more = [
        (leaf.committed, getattr(leaf, "weak_type", None), str(leaf.aval))
        if isinstance(leaf, jax.Array)
        else getattr(getattr(leaf, "flags", None), "writeable", None)
        for leaf in jax.tree.leaves(tree)
    ]
    return jax.tree.structure(tree), list(zip(contents(tree), more, strict=True))


def check(case: Restores, directory: pathlib.Path) -> list[str]:
    kind = face("pytree")
    handler = (kind.lazy if case.by_us else kind.stock)(**case.settings)
    with jax.enable_x64(True):
        rng = np.random.default_rng(case.seed)
        tree = mapped(storable(case.tree), lambda leaf: leaf.make(rng), lambda key: key)
    how, _ = attempt(lambda: jax.tree.leaves(tree))
    if how == "refused":
        return []
    arguments = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=case.chunk_bytes), tree)
    with jax.enable_x64(True):
        how, _ = attempt(lambda: save(handler, directory, ocp.args.PyTreeSave(tree, arguments)))
    if how == "refused":
        return []
    return [check_one(case, i, tree, directory) for i in range(len(case.targets))]


def way_of(timeline: Any) -> str:
    if timeline is None:
        return "not begun"
    if timeline.all_by_orbax:
        return "by Orbax"
    return "in part" if timeline.by_orbax else "by plan"


def check_one(case: Restores, i: int, tree: Any, directory: pathlib.Path) -> str:
    name, how, change, wide = case.targets[i]
    kind, seen = face(name), []
    options = lazy_orbax.LazyOptions(on_restore=seen.append)
    stock, lazy = kind.stock(), kind.lazy(options=options)
    with jax.enable_x64(wide):
        made, args = attempt(lambda: Wishes(f"{case.seed} {i}").args(name, how, change, tree))
        if made == "refused":
            note(repr(args))
            return "no target"
        wanted, theirs = attempt(lambda: restore(stock, directory, args[0]))
        found, ours = attempt(lambda: restore(lazy, directory, args[1]))
        timeline = seen[0] if seen else None  # Some arguments are refused before it begins.
        way = way_of(timeline)
        note(f"{case.targets[i]} {way}\n{args[0]}\nstock: {theirs!r}\nours: {ours!r}\n{timeline}")
        assert found == wanted, f"stock: {wanted} {theirs!r}; ours: {found} {ours!r}"
        if found == "refused":
            return "refused"
        assert all_of(ours) == all_of(theirs)
        return way


@settings(
    max_examples=settings().max_examples if NIGHTLY else 15,
    derandomize=not NIGHTLY,
    phases=PHASES,
    suppress_health_check=list(HealthCheck),
)
@given(restores())
def test_what_stock_restores_is_what_we_restore(case):
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        check(case, pathlib.Path(directory) / "1")
