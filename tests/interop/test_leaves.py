"""Every kind of leaf: what stock Orbax does with a tree is what ours must do, byte for byte."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import functools
import itertools
import typing

import flax
import flax.linen as nn
import flax.training.train_state
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from equipment.oracle import (
    MODES,
    STOCK_WARNS,
    attempt,
    bits_of,
    bits_stored,
    described,
    face,
    readable,
    restore,
    save,
    stored,
)
from equipment.trees import on_mesh, random_array
from flax import nnx
from jax._src.sharding_impls import GSPMDSharding
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import lazy_orbax

pytestmark = STOCK_WARNS
RNG = np.random.default_rng(0)
F32 = random_array(RNG, (16, 8), np.float32)


def devices(*shape):
    return np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)


class Pair(typing.NamedTuple):
    first: typing.Any
    second: typing.Any


class Nothing(typing.NamedTuple):
    pass


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Registered:
    weight: typing.Any
    bias: typing.Any


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(nn.relu(nn.Dense(8)(x)))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(4, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(2)])


def mesh_ab():
    return Mesh(devices(4, 2), ("a", "b"))


@functools.cache
def nnx_model():
    return Nnx(nnx.Rngs(0))


@functools.cache
def linen_train_state():
    model = Model()
    params = model.init(jax.random.key(0), jnp.ones((1, 8)))
    state = flax.training.train_state.TrainState.create(
        apply_fn=model.apply, params=params, tx=optax.adamw(1e-3)
    )
    return jax.device_put(state, NamedSharding(mesh_ab(), P()))


def with_layout():
    from jax.experimental.layout import Format, Layout

    x = on_mesh(F32, mesh_ab(), "a", "b")
    return jax.device_put(x, Format(Layout(major_to_minor=(1, 0)), x.sharding))


def sharded(mesh, *spec, array=F32, memory_kind=None):
    return {"x": on_mesh(array, mesh, *spec, memory_kind=memory_kind)}


def on_device(array, index):
    return jax.device_put(array, SingleDeviceSharding(jax.devices()[index]))


def with_gspmd(*spec):
    """An array whose sharding Orbax has no words for, as older compiled functions return it."""
    named = NamedSharding(mesh_ab(), P(*spec))
    hlo = named._to_xla_hlo_sharding(F32.ndim)
    return jax.device_put(F32, GSPMDSharding(tuple(mesh_ab().devices.flat), hlo))


SHARDINGS = {
    "both axes": lambda: sharded(mesh_ab(), "a", "b"),
    "axes swapped": lambda: sharded(mesh_ab(), "b", "a"),
    "both on one": lambda: sharded(mesh_ab(), ("a", "b")),
    "both on one swapped": lambda: sharded(mesh_ab(), ("b", "a")),
    "both on the last": lambda: sharded(mesh_ab(), None, ("a", "b")),
    "replicated": lambda: sharded(mesh_ab()),
    "replicated with trailing None": lambda: sharded(mesh_ab(), None, None),
    "replicated odd": lambda: sharded(mesh_ab(), array=F32[:3, :5]),
    "replicated prime vector": lambda: sharded(mesh_ab(), array=F32[0, :7]),
    "replicated scalar": lambda: sharded(mesh_ab(), array=F32[0, 0]),
    "replicated large odd": lambda: sharded(
        mesh_ab(), array=random_array(RNG, (151, 131), np.float32)
    ),
    "partly replicated a": lambda: sharded(mesh_ab(), "a"),
    "partly replicated b": lambda: sharded(mesh_ab(), None, "b"),
    "partly replicated odd": lambda: sharded(mesh_ab(), "b", array=F32[:6, :3]),
    "partly replicated large odd": lambda: sharded(
        mesh_ab(), "b", array=random_array(RNG, (302, 131), np.float32)
    ),
    "rank 4": lambda: sharded(
        mesh_ab(), None, "b", None, "a", array=random_array(RNG, (3, 2, 5, 8), np.float32)
    ),
    "one device": lambda: {"x": on_device(F32, 3)},
    "uncommitted": lambda: {"x": jnp.asarray(F32)},
    "sub-mesh": lambda: sharded(Mesh(devices(2, 2), ("a", "b")), "a", "b"),
    "sub-mesh replicated": lambda: sharded(Mesh(devices(2, 2), ("a", "b")), "b"),
    "sub-mesh at the end": lambda: sharded(Mesh(np.array(jax.devices()[5:7]), ("a",)), "a"),
    "mesh of one": lambda: sharded(Mesh(devices(1), ("a",)), "a"),
    "mesh reversed": lambda: sharded(Mesh(devices(8)[::-1].reshape(4, 2), ("a", "b")), "a", "b"),
    "mesh permuted, replicas": lambda: sharded(
        Mesh(devices(8)[[3, 1, 4, 0, 5, 7, 2, 6]].reshape(2, 4), ("a", "b")), "a"
    ),
    "explicit axes": lambda: sharded(jax.make_mesh((4, 2), ("a", "b")), "a", "b"),
    "explicit axes, replicas": lambda: sharded(
        jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2), "a"
    ),
    "explicit axes, replicated": lambda: sharded(
        jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    ),
    "auto axes": lambda: sharded(
        jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2), "a", "b"
    ),
    "mixed axes": lambda: sharded(
        jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto, AxisType.Explicit)), "a"
    ),
    "axes of size one": lambda: sharded(Mesh(devices(1, 8, 1), ("a", "b", "c")), ("a", "c"), "b"),
    "axis of size one, replicas": lambda: sharded(Mesh(devices(8, 1), ("a", "b")), "b"),
    "pinned host": lambda: sharded(mesh_ab(), "a", "b", memory_kind="pinned_host"),
    "pinned host, replicated": lambda: sharded(mesh_ab(), memory_kind="pinned_host"),
    "pinned host, partly replicated": lambda: sharded(mesh_ab(), "a", memory_kind="pinned_host"),
    "pinned host, odd": lambda: sharded(mesh_ab(), array=F32[:3, :5], memory_kind="pinned_host"),
    "pinned host, one device": lambda: {
        "x": jax.device_put(F32, SingleDeviceSharding(jax.devices()[2], memory_kind="pinned_host"))
    },
    "unpinned host": lambda: sharded(mesh_ab(), "a", memory_kind="unpinned_host"),
    "one array twice": lambda: (lambda x: {"x": x, "y": x, "z": [x, x]})(
        on_mesh(F32, mesh_ab(), "a")
    ),
    "layout": lambda: {"x": with_layout()},
    "from shards": lambda: {
        "x": jax.make_array_from_callback(
            (8, 4), NamedSharding(mesh_ab(), P("a")), lambda index: F32[:8, :4][index]
        )
    },
    "output of jit": lambda: {
        "x": jax.jit(lambda x: x + 1, out_shardings=NamedSharding(mesh_ab(), P("b")))(
            on_mesh(np.arange(8.0, dtype=np.float32), mesh_ab(), "a")
        )
    },
    "many meshes at once": lambda: {
        "whole": on_mesh(F32, mesh_ab(), "a", "b"),
        "half": on_mesh(F32, Mesh(devices(4), ("a",)), "a"),
        "reversed": on_mesh(F32, Mesh(devices(8)[::-1], ("a",)), "a"),
        "other names": on_mesh(F32, Mesh(devices(4, 2), ("x", "y")), "x"),
        "one": on_device(F32, 7),
        "explicit": on_mesh(F32, jax.make_mesh((8,), ("a",)), "a"),
        "host": on_mesh(F32, mesh_ab(), "b", memory_kind="pinned_host"),
        "numpy": F32,
    },
    "GSPMD alone": lambda: {"x": with_gspmd("a")},
    "GSPMD replicated, beside a number": lambda: {"x": with_gspmd(), "n": 3},
    "GSPMD beside another": lambda: {"x": with_gspmd("a"), "y": on_mesh(F32, mesh_ab(), "a")},
}

NAMES_32 = [
    "bool",
    "int8",
    "int16",
    "int32",
    "uint8",
    "uint16",
    "uint32",
    "float16",
    "float32",
    "bfloat16",
    "complex64",
    "int4",
    "uint4",
    "int2",
    "uint2",
    "float8_e3m4",
    "float8_e4m3",
    "float8_e4m3b11fnuz",
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    "float8_e5m2",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
    "float4_e2m1fn",
]
NAMES_64 = ["int64", "uint64", "float64", "complex128"]


def dtype_of(name):
    return np.dtype(getattr(ml_dtypes, name, name))


def random_of(name, shape):
    return random_array(RNG, shape, dtype_of(name))


def every_value(name):
    """Returns all bit patterns of a small dtype, NaNs with payloads included, in two dimensions."""
    dtype = dtype_of(name)
    if name == "bool" or "int" in name or dtype.itemsize > 2:
        return random_of(name, (16, 8))
    if name.startswith("float4"):
        return np.arange(16, dtype=np.uint8).view(dtype).reshape(8, 2)
    side = 2 ** (4 * dtype.itemsize)
    return np.arange(side**2, dtype=f"u{dtype.itemsize}").view(dtype).reshape(side, side)


def typed(name):
    x = every_value(name)
    return {
        "sharded": on_mesh(x, mesh_ab(), "a", "b"),
        "partly replicated": on_mesh(x, mesh_ab(), "a"),
        "replicated": on_mesh(x[:3, :5], mesh_ab()),
        "scalar": on_mesh(x[0, 0], mesh_ab()),
        # XLA cannot join many of every dtype.
        "many": [on_mesh(x, mesh_ab(), *spec) for spec in (("a",), ("b",), ()) for _ in range(4)],
    }


DTYPES = {f"jax {name}": (lambda name=name: typed(name)) for name in NAMES_32}
DTYPES |= {
    f"numpy {name}": (lambda name=name: {"x": random_of(name, (4, 3)), "y": random_of(name, ())})
    for name in NAMES_32 + NAMES_64
}
# float0 and the types of NumPy alone are not numbers that JAX knows.
DTYPES |= {
    "numpy float0": lambda: {"x": np.zeros((3,), jax.dtypes.float0)},
    "numpy longdouble": lambda: {"x": np.ones((3,), np.longdouble)},
    "numpy object": lambda: {"x": np.array([1, "a", None], object)},
    "numpy text": lambda: {"x": np.array(["a", "bcd"])},
    "numpy bytes": lambda: {"x": np.array([b"a", b"bcd"])},
    "numpy text of rank 0": lambda: {"x": np.array("abc")},
    "numpy datetime64": lambda: {"x": np.array(["2020-01-01"], "datetime64[D]")},
    "numpy structured": lambda: {"x": np.zeros(2, [("a", "i4"), ("b", "f8")])},
    "numpy big-endian": lambda: {"x": np.arange(5, dtype=">f4")},
    "numpy big-endian int": lambda: {"x": np.arange(5, dtype=">i8")},
}

KEYS = {
    "scalar": lambda: {"k": jax.random.key(7)},
    "rbg": lambda: {"k": jax.random.key(7, impl="rbg")},
    "unsafe rbg": lambda: {"k": jax.random.key(7, impl="unsafe_rbg")},
    "batch": lambda: {"k": jax.random.split(jax.random.key(7), 6)},
    "sharded batch": lambda: {
        "k": jax.device_put(
            jax.random.split(jax.random.key(7), 16).reshape(8, 2),
            NamedSharding(mesh_ab(), P("a", "b")),
        )
    },
    "replicated": lambda: {
        "k": jax.device_put(jax.random.key(7), NamedSharding(mesh_ab(), P())),
        "x": on_mesh(F32, mesh_ab(), "a"),
    },
    "batch partly replicated": lambda: {
        "k": jax.device_put(
            jax.random.split(jax.random.key(7, impl="rbg"), 8), NamedSharding(mesh_ab(), P("b"))
        )
    },
    "in pinned host": lambda: {
        "k": jax.device_put(
            jax.random.split(jax.random.key(7), 8),
            NamedSharding(mesh_ab(), P("a"), memory_kind="pinned_host"),
        )
    },
    "on one device": lambda: {"k": jax.device_put(jax.random.key(7), jax.devices()[3])},
    "raw": lambda: {"k": jax.random.PRNGKey(7)},
}

# A memory map and a matrix are subclasses of ndarray.
HOSTS = {
    "Fortran order": lambda: {"x": np.asfortranarray(F32)},
    "strided": lambda: {"x": F32[::3, ::-2]},
    "broadcast": lambda: {"x": np.broadcast_to(F32[0], (4, 8))},
    "rank 0": lambda: {"x": np.array(3.5)},
    "empty": lambda: {"x": np.zeros((0, 4), np.float32)},
    "subclass": lambda: {"x": F32.view(np.recarray)},
    "masked": lambda: {"x": np.ma.array([1.0, 2.0], mask=[True, False])},
    "np.float32": lambda: {"x": np.float32(1.5)},
    "np.float64": lambda: {"x": np.float64(1.5)},
    "np.int64": lambda: {"x": np.int64(-5)},
    "np.uint8": lambda: {"x": np.uint8(5)},
    "np.bool": lambda: {"x": np.bool_(True)},
    "np.float16": lambda: {"x": np.float16(2.5)},
    "np.complex64": lambda: {"x": np.complex64(1 + 2j)},
    "np.str": lambda: {"x": np.str_("abc")},
    "np.bytes": lambda: {"x": np.bytes_(b"abc")},
    "bfloat16 scalar": lambda: {"x": ml_dtypes.bfloat16(1.5)},
    "int": lambda: {"x": 5, "y": -1, "z": 0},
    "int of 63 bits": lambda: {"x": 2**63 - 1},
    "int of 64 bits": lambda: {"x": 2**63},
    "int of 70 bits": lambda: {"x": 2**70},
    "float": lambda: {"x": 1.5, "y": -0.0, "z": float("inf"), "n": float("nan")},
    "bool": lambda: {"x": True, "y": False},
    "complex": lambda: {"x": 1 + 2j},
    "str": lambda: {"x": "text", "y": "", "z": "Grüße, 世界 \n\0"},
    "str and arrays": lambda: {"x": "text", "y": on_mesh(F32, mesh_ab(), "a"), "z": F32, "i": 3},
    "bytes": lambda: {"x": b"abc"},
    "enum": lambda: {"x": AxisType.Auto},
    "datetime": lambda: {"x": datetime.timedelta(1)},
    "set": lambda: {"x": {1, 2}},
    "function": lambda: {"x": len, "y": 1},
    "object": lambda: {"x": object()},
    "dtype": lambda: {"x": np.dtype("float32")},
    "placeholder": lambda: {"x": ocp.PLACEHOLDER, "y": 1},
    "abstract": lambda: {"x": jax.ShapeDtypeStruct((2,), np.float32)},
    "abstract beside an array": lambda: {
        "x": jax.ShapeDtypeStruct((2,), np.float32),
        "y": jnp.ones(3),
    },
    "not scalar array of zero size": lambda: {"x": jnp.zeros((0, 3)), "y": jnp.ones(3)},
    "sharded array of zero size": lambda: sharded(mesh_ab(), "a", array=F32[:0]),
}

CONTAINERS = {
    "None": lambda: {"a": None, "b": F32},
    "empty containers": lambda: {"a": {}, "b": [], "c": (), "d": Nothing(), "e": F32},
    "nested empty": lambda: {"a": {"b": {"c": {}}, "d": [None, [], ()]}, "e": 1},
    "only None": lambda: {"a": None},
    "only empty": lambda: {"a": {}, "b": [], "c": ()},
    "only None in a list": lambda: [None],
    "only an empty dict in a list": lambda: [{}],
    "only a namedtuple of None": lambda: Pair(None, None),
    "only EmptyState": lambda: {"a": optax.EmptyState()},
    "nothing": dict,
    "nothing, a list": list,
    "nothing, a tuple": lambda: (),
    "nothing, None": lambda: None,
    "nothing, a namedtuple": lambda: Nothing(),
    "namedtuple": lambda: Pair(F32, {"x": Pair(1, None)}),
    "lists and tuples": lambda: [F32, (1, [2, (3.5, [F32])]), [{"a": (F32,)}]],
    "long list": lambda: [np.float32([i]) for i in range(12)],
    "dataclass": lambda: {"p": Registered(jnp.asarray(F32), None), "q": Registered(1, {"x": 2})},
    "Linen TrainState": linen_train_state,
    "FrozenDict": lambda: flax.core.freeze({"a": {"b": F32}}),
    "OrderedDict": lambda: collections.OrderedDict(b=F32, a=1),
    "defaultdict": lambda: {"x": collections.defaultdict(int, b=2, a=1)},
    "adamw": lambda: optax.adamw(1e-3).init({"w": on_mesh(F32, mesh_ab(), "a"), "b": jnp.ones(8)}),
    "masked": lambda: {
        "m": optax.masked(optax.adam(1e-3), {"w": True, "b": False}).init(
            {"w": jnp.ones(3), "b": jnp.ones(2)}
        )
    },
    "MaskedNode": lambda: {"a": optax.MaskedNode(), "b": jnp.ones(3)},
    "NNX State": lambda: nnx.state(nnx_model()),
    "NNX optimizer": lambda: nnx.state(
        nnx.Optimizer(nnx_model(), optax.adamw(1e-3), wrt=nnx.Param)
    ),
    "NNX pure dict": lambda: nnx.to_pure_dict(nnx.state(nnx_model())),
}

BARE = {
    "jax array": lambda: on_mesh(F32, mesh_ab(), "a", "b"),
    "jax scalar": lambda: jnp.float32(3),
    "numpy array": lambda: F32,
    "numpy zero": lambda: np.zeros((1,), np.float32),
    "int": lambda: 5,
    "zero": lambda: 0,
    "False": lambda: False,
    "float": lambda: 0.0,
    "str": lambda: "text",
    "empty str": lambda: "",
    "key": lambda: jax.random.key(0),
}


def keyed(*keys):
    return lambda: {key: on_mesh(F32 + i, mesh_ab(), "a") for i, key in enumerate(keys)}


PATHS = {
    "non-ASCII": keyed("Grüße", "世界", "🙂", "e\u0301", "\u00e9"),
    "slashes": keyed("a/b", "mlp/~/linear_0"),
    "slash at the end": keyed("c/"),
    "dots": keyed("a.b", "a.c", ".hidden", "x.", "..."),
    "space and quotes": keyed("a b", "it's", 'say "x"', "tab\t", "%41", "a?b#c", "*", "a:b|c"),
    "newline": keyed("a\nb"),
    "empty": keyed(""),
    "empty beside another": keyed("", "a"),
    "int": lambda: {0: F32, 10: F32 + 1, 2: {3: F32 + 2}, -1: 4},
    "float": lambda: {0.5: F32},
    "tuple": lambda: {("a", "b"): F32},
    "bool": lambda: {True: F32},
    "name of a file in a tree": lambda: {"array_metadatas": {"process_0": F32}, "x": F32},
    "temporary": keyed("x.orbax-checkpoint-tmp-1"),
    "long": keyed("n" * 200),
    "deep": lambda: {"a": {"b": {"c": {"d": {"e": {"f": {"g": {"h": [[[F32]]]}}}}}}}},
    "placeholder directory": keyed("lazy-orbax-directory", "x"),
}

# Fine as keys of a database; as paths they leave the checkpoint, or are not paths at all. Stock
# writes the first outside of the checkpoint, and fails after it began to write most others.
UNSAFE_PATHS = {
    "absolute": keyed("/lazy-orbax-test"),
    "parent": keyed("../x"),
    "parent in the middle": keyed("a/../../x"),
    "two dots": keyed(".."),
    "one dot": keyed("."),
    "one dot in front": keyed("./a"),
    "two slashes": keyed("a//b"),
    "zero byte": keyed("a\0b"),
    "backslash": keyed("a\\b"),
    "name of a file": keyed("_METADATA"),
    "name of another file": keyed("_sharding"),
    "too long for a file": keyed("n" * 300),
}

# Stock saves the last of these over the others, without a word.
CLASHES = {
    "tree and dots": lambda: {"a": {"b": F32}, "a.b": F32 + 1},
    "list and dots": lambda: {"x": [F32], "x.0": F32 + 1},
    "int and dots": lambda: {"x": {0: F32}, "x.0": F32 + 1},
}

GROUPS = {
    "sharding": SHARDINGS,
    "dtype": DTYPES,
    "key": KEYS,
    "host": HOSTS,
    "container": CONTAINERS,
    "bare": BARE,
    "path": PATHS,
}
CASES = [f"{group}: {name}" for group, cases in GROUPS.items() for name in cases]

# Of which the format on disk has something to say.
OF_THE_FORMAT = ("dtype: jax", "container", "path")

# The default format of stock, and the one that shares least with it.
COMBINATIONS = (
    ("standard", {"use_ocdbt": True, "use_zarr3": False}),
    ("pytree", {"use_ocdbt": False, "use_zarr3": True}),
)


def compare(tree, directory, combination, modes=MODES):
    """Saves `tree` with stock and with ours, and asserts that nobody can tell them apart."""
    face_name, settings = combination
    kind = face(face_name)
    stock = kind.stock(**settings, use_compression=False)
    by_stock = directory / face_name / "stock"
    wanted, why = attempt(lambda: save(stock, by_stock, kind.stock_save(tree)))
    for mode in modes:
        lazy = kind.lazy(options=lazy_orbax.LazyOptions(mode=mode), **settings)
        by_us = directory / face_name / mode
        found, error = attempt(lambda: save(lazy, by_us, kind.save(tree)))  # noqa: B023
        assert found == wanted, f"stock: {wanted} {why!r}; ours, {mode}: {found} {error!r}"
        if wanted == "refused":
            if isinstance(error, ValueError):
                assert list(by_us.iterdir()) == []
            else:  # Older releases of Orbax refuse what is written.
                assert isinstance(error.__cause__, ValueError), repr(error)
            continue
        ours, theirs = stored(by_us), stored(by_stock)
        assert ours.keys() == theirs.keys()
        if unlike := [name for name in theirs if ours[name] != theirs[name]]:
            # Of some small floats stock alters NaNs (JAX 0.12): then the source is the oracle.
            assert bits_stored(by_stock, tree) != bits_of(tree), unlike
            assert bits_stored(by_us, tree) == bits_of(tree), unlike
            continue
        assert described(lazy, by_us) == described(stock, by_stock)
        if mode == modes[0]:
            wanted_back = readable(by_stock, stock, face_name, tree)
            assert readable(by_us, stock, face_name, tree) == wanted_back
            assert readable(by_stock, lazy, face_name, tree) == wanted_back
        lazy.close()
    stock.close()
    return wanted


@pytest.mark.parametrize("case", CASES)
def test_a_leaf_is_stored_as_stock_stores_it(case, tmp_path):
    group, name = case.split(": ", 1)
    modes = MODES if group in ("sharding", "dtype", "key") else MODES[:1]
    compare(GROUPS[group][name](), tmp_path, COMBINATIONS[0], modes)


# How bytes leave a device does not depend on the format. The rest runs at night.
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=() if case.startswith(OF_THE_FORMAT) else pytest.mark.slow)
        for case in CASES
    ],
)
def test_a_leaf_is_stored_as_stock_stores_it_in_another_format(case, tmp_path):
    group, name = case.split(": ", 1)
    compare(GROUPS[group][name](), tmp_path, COMBINATIONS[1], MODES[:1])


@pytest.mark.parametrize("name", NAMES_64)
def test_a_leaf_of_64_bits_is_stored_as_stock_stores_it(name, tmp_path):
    with jax.enable_x64(True):
        for combination in COMBINATIONS:
            assert compare(typed(name), tmp_path, combination) == "accepted"


@pytest.mark.parametrize("name", UNSAFE_PATHS)
def test_a_name_that_is_no_path_needs_a_database(name, tmp_path):
    tree = UNSAFE_PATHS[name]()
    assert compare(tree, tmp_path, COMBINATIONS[0]) == "accepted"
    handler, directory = lazy_orbax.pytree_handler(use_ocdbt=False, use_zarr3=True), tmp_path / "x"
    with pytest.raises(lazy_orbax.errors.TreeError, match="stored"):
        save(handler, directory, ocp.args.PyTreeSave(tree))
    assert list(directory.iterdir()) == []


def test_stock_does_not_find_what_it_saved_under_a_name_with_a_backslash(tmp_path):
    """TensorStore takes it for a slash. Where Orbax finds it, there is no reason to refuse it."""
    stock, directory = ocp.PyTreeCheckpointHandler(use_ocdbt=False), tmp_path / "x"
    save(stock, directory, ocp.args.PyTreeSave(UNSAFE_PATHS["backslash"]()))
    assert (directory / "a" / "b" / ".zarray").exists()
    with pytest.raises(FileNotFoundError, match="not found"):
        restore(stock, directory)


@pytest.mark.parametrize("name", CLASHES)
def test_leaves_that_would_overwrite_each_other_are_refused(name, tmp_path):
    for settings in ({"use_ocdbt": True}, {"use_ocdbt": False}):
        directory = tmp_path / str(settings["use_ocdbt"])
        with pytest.raises(lazy_orbax.errors.TreeError, match="both stored as"):
            save(
                lazy_orbax.pytree_handler(**settings),
                directory,
                ocp.args.PyTreeSave(CLASHES[name]()),
            )
        assert list(directory.iterdir()) == []


def test_a_mesh_whose_axes_are_not_alike_is_packed_whole(tmp_path):
    """The bits on disk are those of the array, whatever the types of the axes."""
    for i, kinds in enumerate(itertools.product((AxisType.Auto, AxisType.Explicit), repeat=2)):
        mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=kinds)
        for j, spec in enumerate((("a", "b"), ("a",), (None, "b"), ())):
            tree = {"x": on_mesh(F32, mesh, *spec)}
            directory = tmp_path / f"{i}{j}"
            options = lazy_orbax.LazyOptions(mode="stage")
            save(lazy_orbax.pytree_handler(options=options), directory, ocp.args.PyTreeSave(tree))
            numpy = ocp.args.PyTreeRestore(restore_args={"x": ocp.RestoreArgs(np.ndarray)})
            found = restore(ocp.PyTreeCheckpointHandler(), directory, numpy)
            assert found["x"].tobytes() == F32.tobytes(), (kinds, spec)
