"""Whole situations: a tree of every kind of leaf, and how, where and by whom it is saved.

What is drawn are records that say what to build, for they are what a failing test prints.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import typing
from collections.abc import Callable
from typing import Any

import jax
import ml_dtypes
import numpy as np
from equipment import contexts
from equipment.trees import random_array
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from property.strategies import divided

MIB = 2**20
_SMALL = "bool int8 uint8 int16 uint16 int32 uint32 float16 float32 bfloat16 complex64"
_TINY = (
    "int4 uint4 int2 uint2 float4_e2m1fn float8_e3m4 float8_e4m3 float8_e4m3b11fnuz float8_e4m3fn "
    "float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu"
)
_WIDE = "int64 uint64 float64 complex128"
JAX_DTYPES = tuple(f"{_SMALL} {_TINY} {_WIDE}".split())
NUMPY_DTYPES = (*JAX_DTYPES, ">i2", ">u2", ">i4", ">u4", ">i8", ">f2", ">f4", ">f8", ">c8", ">c16")
LAYOUTS = ("C", "F", "strided", "reversed", "repeated", "zero-strided", "read-only")


class Name(str, enum.Enum):  # noqa: UP042 - A StrEnum would have the same name.
    """Keys that equal plain text and have another name."""

    A = "a"
    B = "b"


class Pair(typing.NamedTuple):
    """A node whose children have names."""

    first: Any
    second: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Node:
    """A node that is a dataclass, with a field that is no leaf."""

    weight: Any
    bias: Any
    kind: Any = dataclasses.field(default=None, metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class OnDevices:
    """A `jax.Array`: `place` is a sharding, or `None` where JAX chooses."""

    dtype: str
    shape: tuple[int, ...]
    place: Any

    def make(self, rng: np.random.Generator) -> Any:
        host = random_array(rng, self.shape, getattr(ml_dtypes, self.dtype, self.dtype))
        # The copy is JAX's own: on CPU it may take a NumPy array for its memory.
        return jax.device_put(host, self.place, may_alias=False)


@dataclasses.dataclass(frozen=True)
class OnHost:
    """A NumPy array, of any byte order and layout."""

    dtype: str
    shape: tuple[int, ...]
    layout: str

    def make(self, rng: np.random.Generator) -> Any:
        dtype = np.dtype(getattr(ml_dtypes, self.dtype, self.dtype))
        if self.layout == "strided":
            twice = tuple(2 * n for n in self.shape)
            return random_array(rng, twice, dtype)[(slice(None, None, 2),) * len(twice)]
        array = random_array(rng, self.shape, dtype)
        if self.layout == "F":
            return np.asfortranarray(array)
        if self.layout == "reversed":
            return array[(slice(None, None, -1),) * array.ndim]
        if self.layout == "repeated" and array.ndim:
            return np.broadcast_to(array[:1], self.shape)
        if self.layout == "zero-strided":
            return np.broadcast_to(random_array(rng, (), dtype), self.shape)
        if self.layout == "read-only":
            array.flags.writeable = False
        return array


@dataclasses.dataclass(frozen=True)
class Key:
    """Typed PRNG keys."""

    implementation: str
    shape: tuple[int, ...]
    place: Any

    def make(self, rng: np.random.Generator) -> Any:
        one = jax.eval_shape(
            lambda: jax.random.key_data(jax.random.key(0, impl=self.implementation))
        )
        data = rng.integers(0, 2**32, (*self.shape, *one.shape), dtype=np.uint32)
        keys = jax.random.wrap_key_data(data, impl=self.implementation)
        return jax.device_put(keys, self.place)


@dataclasses.dataclass(frozen=True)
class Plain:
    """What is its own value: a number, a text, or what no checkpoint takes."""

    value: Any

    def make(self, rng: np.random.Generator) -> Any:
        return self.value


@dataclasses.dataclass(frozen=True)
class Gone:
    """An array that was deleted."""

    def make(self, rng: np.random.Generator) -> Any:
        array = jax.device_put(np.float32([1, 2]))
        array.delete()
        return array


@dataclasses.dataclass(frozen=True)
class Situation:
    """A tree of records, and how its values are saved.

    Attributes:
        tree: the nodes, with a record in place of every leaf.
        seed: of the values.
        face: standard, pytree or direct.
        settings: keywords of Orbax's handlers.
        options: keywords of `LazyOptions`.
        context: which of `contexts.ALL` our save runs under.
        in_thread: whether it runs in another thread than the main one.
        lazily: whether its arrays are deleted, and changed, as soon as our `save()` returned.
        cast: the dtype that `SaveArgs` asks for, or `None`.
        look_alike: whether a tree that equals it, under other names, is saved before.
    """

    tree: Any
    seed: int
    face: str
    settings: dict[str, bool]
    options: dict[str, Any]
    context: str
    in_thread: bool
    lazily: bool
    cast: str | None
    look_alike: bool

    def values(self, keys: Callable[[Any], Any] = lambda key: key) -> Any:
        """Builds the tree anew, where every type is allowed."""
        with jax.enable_x64(True):
            rng = np.random.default_rng(self.seed)
            return mapped(self.tree, lambda leaf: leaf.make(rng), keys)


def mapped(node: Any, leaf: Callable[[Any], Any], keys: Callable[[Any], Any]) -> Any:
    """Maps leaves and keys, also of a tree whose keys JAX cannot sort."""

    def inner(child: Any) -> Any:
        return mapped(child, leaf, keys)

    if isinstance(node, dict):
        return type(node)((keys(key), inner(child)) for key, child in node.items())
    if isinstance(node, Pair):
        return Pair(*map(inner, node))
    if isinstance(node, Node):
        return Node(inner(node.weight), inner(node.bias), node.kind)
    if isinstance(node, list | tuple):
        return type(node)(map(inner, node))
    return None if node is None else leaf(node)


_TWINS = {1: True, 0: False, "a": Name.A, "b": Name.B}


def twin(key: Any) -> Any:
    """Returns a key that is equal and has, where there is such a one, another name."""
    if type(key) is float and key == 0:
        return -key
    if type(key) is bool or type(key) is Name or isinstance(key, np.integer):
        return key.value if type(key) is Name else int(key)
    try:
        return _TWINS.get(key, key)
    except TypeError:
        return key


def _grid(*shape: int) -> np.ndarray:
    return np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)


def _meshes() -> list[Mesh]:
    explicit = (AxisType.Explicit,) * 2
    return [
        Mesh(_grid(8), ("a",)),
        Mesh(_grid(4, 2), ("a", "b")),
        Mesh(_grid(8)[::-1].reshape(2, 4), ("a", "b")),
        Mesh(_grid(3), ("a",)),
        Mesh(_grid(1), ("a",)),
        Mesh(_grid(4, 2), ("a", "b"), axis_types=explicit),
    ]


def _gspmd(sharding: NamedSharding, n_dims: int) -> Any:
    """The sharding that older compiled functions return, where JAX has it still."""
    from jax._src import sharding_impls

    if not hasattr(sharding_impls, "GSPMDSharding"):
        return sharding
    hlo = sharding._to_xla_hlo_sharding(n_dims)
    return sharding_impls.GSPMDSharding(tuple(sharding.mesh.devices.flat), hlo)


def _bits(dtype: str) -> int:
    return np.dtype(getattr(ml_dtypes, dtype, dtype)).itemsize * 8


@st.composite
def places(draw: Any, most_per_shard: int = 4) -> tuple[tuple[int, ...], Any]:
    """A shape, and a sharding of some class that it can have."""
    kind = draw(st.sampled_from(["mesh", "mesh", "mesh", "device", "none", "gspmd"]))
    if kind in ("device", "none"):
        shape = tuple(draw(st.lists(st.integers(1, 7), max_size=3)))
        device = jax.devices()[draw(st.integers(0, 7))]
        return shape, SingleDeviceSharding(device) if kind == "device" else None
    meshes = _meshes()
    shape, sharding = draw(divided(draw(st.sampled_from(meshes)), most_per_shard=most_per_shard))
    return shape, _gspmd(sharding, len(shape)) if kind == "gspmd" else sharding


@st.composite
def on_devices(draw: Any) -> OnDevices:
    dtype = draw(st.sampled_from(JAX_DTYPES))
    shape, place = draw(places())
    how = draw(st.sampled_from(["small"] * 12 + ["pinned", "pinned", "large", "large", "empty"]))
    if how == "pinned" and place is not None and _bits(dtype) >= 8 and dtype not in _TINY.split():
        if isinstance(place, NamedSharding | SingleDeviceSharding):
            place = place.with_memory_kind("pinned_host")
    elif how == "large" and shape:  # More than a slab, up to two.
        rest = int(np.prod(shape)) * _bits(dtype) // 8
        shape = (shape[0] * max(1, 2 * MIB // rest), *shape[1:])
    elif how == "empty" and shape:
        shape = (0, *shape[1:])
    return OnDevices(dtype, shape, place)


@st.composite
def on_host(draw: Any) -> OnHost:
    dtype = draw(st.sampled_from(NUMPY_DTYPES))
    layout = draw(st.sampled_from(LAYOUTS))
    shape = tuple(draw(st.lists(st.integers(1, 5), max_size=3)))
    how = draw(st.sampled_from(["small"] * 12 + ["large", "empty"]))
    if how == "large" and shape:
        shape = (*shape[:-1], shape[-1] * max(1, 2**20 // int(np.prod(shape))))
    elif how == "empty" and shape:
        shape = (*shape[:-1], 0)
    return OnHost(dtype, shape, layout)


@st.composite
def keys_of_prng(draw: Any) -> Key:
    shape, place = draw(places(most_per_shard=2))
    return Key(draw(st.sampled_from(["threefry2x32", "rbg", "unsafe_rbg"])), shape, place)


_NUMBERS = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.text(max_size=6),
    st.sampled_from([np.float32(1.5), np.int64(-5), np.bool_(True), np.uint8(5), np.float64(-0.0)]),
    st.sampled_from([np.float16(2.5), np.complex64(1 + 2j), ml_dtypes.bfloat16(1.5), 2**64 - 1]),
)
_REFUSED = st.sampled_from([b"abc", 2**70, {1, 2}, len, AxisType.Auto, 1 + 2j, np.dtype("i4")])
leaves = st.one_of(
    on_devices(),
    on_devices(),
    on_devices(),
    on_host(),
    keys_of_prng(),
    st.builds(Plain, _NUMBERS),
)
_KEYS = (
    st.sampled_from(["a", "b", "c", "", "a.b", "a/b", "x y", "Grüße", "世界", "\u00e9", "e\u0301"]),
    st.sampled_from(["a", "b", Name.A, Name.B]),
    st.sampled_from([0, 1, 2, -1, 10, True, False]),
    st.sampled_from([0.0, -0.0, 0.5, 1.0, 1]),
    st.sampled_from([np.int64(1), np.int64(2), 0, 1, 3]),
    st.sampled_from([("a",), ("a", 1), ("b", np.int64(2))]),
    st.text("abz é-%.", min_size=1, max_size=4).filter(lambda text: set(text) != {"."}),
)
_MIXED = st.sampled_from(["a", 1, None, 0.5, Name.A, ("a",)])
empties = st.sampled_from([None, {}, [], ()])


@st.composite
def dictionaries(draw: Any, children: Any) -> Any:
    kinds = _MIXED if draw(st.integers(0, 19)) == 19 else draw(st.sampled_from(_KEYS))
    kind = draw(st.sampled_from([dict, dict, dict, collections.OrderedDict]))
    return kind(draw(st.dictionaries(kinds, children, min_size=1, max_size=4)))


def nodes(children: Any) -> Any:
    """Nodes of every kind over `children`."""
    return st.one_of(
        dictionaries(children),
        dictionaries(children),
        st.lists(children, min_size=1, max_size=3),
        st.lists(children, min_size=1, max_size=3).map(tuple),
        st.builds(Pair, children, children),
        st.builds(Node, children, children, st.sampled_from([None, "text", 1, True])),
    )


@st.composite
def trees(draw: Any) -> Any:
    """Trees of records; one of twelve has a leaf that cannot be saved."""
    tree = draw(nodes(st.recursive(leaves | leaves | empties, nodes, max_leaves=6)))
    if draw(st.integers(0, 11)) == 11:
        bad = draw(st.one_of(st.builds(Plain, _REFUSED), st.builds(Gone)))
        return {"bad": bad, "good": tree}
    return tree


@st.composite
def situations(draw: Any) -> Situation:
    """Everything at once; most of it is left as it is in most of them."""

    def seldom(value: Any, of: int = 3) -> bool:
        return draw(st.integers(0, of)) == of and value

    face = draw(st.sampled_from(["standard", "pytree", "pytree", "direct"]))
    casts = st.sampled_from(["bfloat16", "float32", "float16", "int8", "int32", "float8_e4m3fn"])
    return Situation(
        tree=draw(trees()),
        seed=draw(st.integers(0, 2**16)),
        face=face,
        settings={
            "use_ocdbt": draw(st.booleans()),
            "use_zarr3": draw(st.booleans()),
            "use_compression": draw(st.booleans()),
        },
        options={
            "mode": draw(st.sampled_from(["stage", "direct", "auto"])),
            "slab_bytes": draw(st.sampled_from([MIB, 4 * MIB, 64 * MIB])),
            "host_bytes": draw(st.sampled_from([MIB, 8 * MIB, 256 * MIB])),
            "verify_snapshot": draw(st.sampled_from([0, 1])),
        },
        context=draw(st.sampled_from(["none"] * 30 + sorted(contexts.ALL))),
        in_thread=seldom(True),
        lazily=draw(st.booleans()),
        cast=draw(casts) if seldom(True) else None,
        look_alike=seldom(True),
    )
