"""The fingerprint: what it is, that host and device agree on it, and what it finds."""

import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from equipment.trees import random_array
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as np_st
from jax._src.sharding_impls import GSPMDSharding  # Not public: what jitted functions returned.
from jax.sharding import (
    Mesh,
    NamedSharding,
    SingleDeviceSharding,
)
from jax.sharding import PartitionSpec as P

from lazy_orbax.integrity import fingerprint, fingerprint_traced
from lazy_orbax.integrity.fingerprint import of_host
from lazy_orbax.integrity.proof_programs import compiled, enqueue, results
from lazy_orbax.integrity.proof_subjects import Misplaced, Part, Subject

DEVICES = jax.devices()[:8]
MESH = Mesh(np.array(DEVICES).reshape(4, 2), ("a", "b"))
DTYPES = [
    np.bool_,
    np.int8,
    np.uint16,
    np.int32,
    np.int64,
    np.float16,
    np.float32,
    np.float64,
    np.complex64,
    np.complex128,
    *(
        getattr(ml_dtypes, name)
        for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2", "int4", "uint4", "int2")
    ),
]


def slowly(array, start):
    """The definition, word for word, in Python's integers."""
    if fingerprint.is_small(array.dtype):
        array = array.astype(np.int8)
    if not array.ndim:
        array, start = array.reshape(1), (0,)
    itemsize, total = array.dtype.itemsize, 0
    for place in np.ndindex(*array.shape):
        *outer, last = (i + j for i, j in zip(place, start, strict=True))
        weight = math.prod(weight_of(len(outer) - i, at) for i, at in enumerate(outer))
        for k, byte in enumerate(np.ascontiguousarray(array[place]).tobytes()):
            word, shift = divmod(last * itemsize + k, 4)
            total += (byte << 8 * shift) * weight * weight_of(0, word)
    return total % 2**64


def weight_of(axis, coordinate):
    return int(fingerprint.weights(axis, np.array([coordinate], np.uint64))[0])


def on_devices(array, *, parts=None, part_shape=None):
    """The fingerprint of each device's shard, or of the parts."""
    if parts is None:
        part_shape = array.sharding.shard_shape(array.shape)
        where = array.sharding.addressable_devices_indices_map(array.shape)
        parts = tuple(
            Part(device, device, tuple(part.start or 0 for part in index))
            for device, index in where.items()
        )
    subject = Subject("leaf", array.shape, array.dtype, array.sharding, part_shape, parts)
    return results(enqueue(compiled({0: subject}), [array]))


def placed(host, sharding):
    with jax.enable_x64(True):
        return jax.device_put(host, sharding)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "start"),
    [
        ((), ()),
        ((7,), (3,)),
        ((5, 3), (2, 1)),
        ((3, 2, 5), (2**33, 5, 4095)),
        ((2, 2, 2, 2), (0, 4095, 2**12 - 1, 2**40 + 1)),
    ],
)
def test_the_host_computes_what_is_defined(dtype, shape, start):
    array = random_array(np.random.default_rng(1), shape, dtype)
    assert of_host(np.asarray(array), start) == slowly(np.asarray(array), start)


@pytest.mark.parametrize(
    ("shape", "start", "order"),
    [
        ((70_001,), (4093,), "C"),
        ((3, 50_000), (1, 7), "C"),
        ((70_000, 2), (11, 1), "C"),
        ((1300, 1100), (5, 2), "F"),
        ((40, 50, 60), (1, 2, 3), "F"),
        ((2**22 + 3,), (1,), "C"),
    ],
)
@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.float32, np.complex64])
def test_the_host_takes_large_parts_folds(shape, start, order, dtype):
    """The sum of the fingerprints of single rows, each of which is one block."""
    rng = np.random.default_rng(2)
    array = np.asarray(random_array(rng, shape, dtype), order=order)
    if len(shape) == 1:
        cuts = [0, 1, 17, shape[0] // 2 + 1, shape[0]]
        rows = [(array[a:b], (start[0] + a,)) for a, b in zip(cuts, cuts[1:], strict=False)]
    else:
        every = range(0, shape[0], max(1, shape[0] // 50))
        step = every.step
        rows = [(array[i : i + step], (start[0] + i, *start[1:])) for i in every]
    total = sum(of_host(np.ascontiguousarray(row), at) for row, at in rows) % 2**64
    assert of_host(array, start) == total


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((), P()),
        ((8,), P()),
        ((8,), P(("a", "b"))),
        ((8, 6), P("a", "b")),
        ((8, 6), P("b")),
        ((4, 3, 10), P(None, None, "b")),
        ((16, 4), P(("b", "a"))),
    ],
)
def test_devices_compute_what_the_host_does(dtype, shape, spec):
    host = np.asarray(random_array(np.random.default_rng(3), shape, dtype))
    array = placed(host, NamedSharding(MESH, spec))
    found = on_devices(array)
    where = array.sharding.devices_indices_map(shape)
    assert set(found) == set(DEVICES)
    for device, value in found.items():
        start = tuple(part.start or 0 for part in where[device])
        assert value == of_host(host[where[device]], start), device


@pytest.mark.parametrize("dtype", [np.int8, ml_dtypes.bfloat16, np.float32, np.float64, np.bool_])
@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((2**20 + 8,), P("a")),  # Longer than a digit, and shards start within one.
        ((2**21,), P()),
        ((4, 2**17 + 2), P("a", "b")),
        ((2**15, 24), P("a")),
        ((4, 600, 333), P("a")),
    ],
)
def test_large_shards(dtype, shape, spec):
    host = np.asarray(random_array(np.random.default_rng(4), shape, dtype))
    array = placed(host, NamedSharding(MESH, spec))
    where = array.sharding.devices_indices_map(shape)
    for device, value in on_devices(array).items():
        start = tuple(part.start or 0 for part in where[device])
        assert value == of_host(host[where[device]], start), device


@pytest.mark.parametrize("dtype", [np.int8, ml_dtypes.bfloat16, np.float32, np.complex128])
@pytest.mark.parametrize("shape", [(3000, 101), (7, 90_000), (300_001,)])
def test_programs_count_from_far_starts(dtype, shape):
    host = np.asarray(random_array(np.random.default_rng(5), shape, dtype))
    start = tuple(range(2**32, 2**32 + len(shape)))
    with jax.enable_x64(True):
        shard, first = jnp.asarray(host), jnp.asarray(np.array(start, np.int64))
        assert int(jax.jit(traced)(shard, first)) == of_host(host, start)


def traced(shard, start):
    shard = fingerprint_traced.as_integers(shard)
    by = fingerprint_traced.weights_traced(shard.shape, shard.dtype, start)
    return fingerprint_traced.of_traced(shard, by)


SHARDINGS = {
    "one device": lambda: SingleDeviceSharding(DEVICES[5]),
    "a mesh of some devices": lambda: NamedSharding(Mesh(np.array(DEVICES[2:6]), "x"), P("x")),
    "devices in another order": lambda: NamedSharding(Mesh(np.array(DEVICES[::-1]), "x"), P("x")),
    "GSPMD": lambda: GSPMDSharding(
        DEVICES, NamedSharding(MESH, P("b", "a"))._to_xla_hlo_sharding(2)
    ),
    "replicated GSPMD": lambda: GSPMDSharding.get_replicated(DEVICES),
    "no axes": lambda: NamedSharding(Mesh(np.array(DEVICES[3]), ()), P()),
}


@pytest.mark.parametrize("name", SHARDINGS)
def test_every_kind_of_sharding(name):
    host = np.asarray(random_array(np.random.default_rng(6), (8, 12), np.float32))
    array = jax.device_put(host, SHARDINGS[name]())
    where = array.sharding.devices_indices_map(array.shape)
    found = on_devices(array)
    assert set(found) == set(where)
    for device, value in found.items():
        start = tuple(part.start or 0 for part in where[device])
        assert value == of_host(host[where[device]], start)


def test_parts_of_shards():
    host = np.asarray(random_array(np.random.default_rng(7), (16, 6), ml_dtypes.bfloat16))
    array = jax.device_put(host, NamedSharding(MESH, P(None, "b")))
    devices = [MESH.devices[i, 1] for i in range(4)]
    parts = tuple(Part(i, device, (4 * i, 3)) for i, device in enumerate(devices))
    found = on_devices(array, parts=parts, part_shape=(4, 3))
    for i in range(4):
        assert found[i] == of_host(host[4 * i : 4 * i + 4, 3:], (4 * i, 3))


def test_a_device_without_the_part_is_named():
    array = jax.device_put(np.zeros((16, 6)), NamedSharding(MESH, P("a")))
    with pytest.raises(Misplaced, match="does not hold the part at") as raised:
        on_devices(array, parts=(Part(0, MESH.devices[0, 0], (4, 0)),), part_shape=(4, 6))
    assert raised.value.leaf == "leaf"


@pytest.mark.parametrize("n", [1, 4, 5, 18])
def test_many_leaves_share_programs(n):
    hosts = [np.asarray(random_array(np.random.default_rng(i), (8, 2), np.int32)) for i in range(n)]
    sharding = NamedSharding(MESH, P("a"))
    device = MESH.devices[1, 0]
    subjects = {
        i: Subject(str(i), (8, 2), np.dtype("i4"), sharding, (2, 2), (Part(i, device, (2, 0)),))
        for i in range(n)
    }
    runs = list(compiled(subjects))
    assert len({id(run.program) for run in runs}) == min(2, -(-n // 4))
    found = results(enqueue(runs, [jax.device_put(host, sharding) for host in hosts]))
    assert found == {i: of_host(host[2:4], (2, 0)) for i, host in enumerate(hosts)}


def test_coordinates_beyond_32_bits():
    """The same part elsewhere has another fingerprint, wherever that is."""
    one = np.ones((1, 1), np.float32)
    places = [0, 2**31, 2**32, 2**32 + 1, 2**43, 2**50]
    assert (
        len({of_host(one, (i, 0)) for i in places} | {of_host(one, (0, i)) for i in places}) == 11
    )


@pytest.mark.parametrize("shape", [(2**31 + 2**12 + 1,), (2, 2**31 + 2**12), (2**31 + 3, 2)])
def test_no_program_counts_in_32_bits(shape):
    """Large arrays are not made here: what a program computes with is read."""
    with jax.enable_x64(True):
        start = jax.ShapeDtypeStruct((len(shape),), np.int64)
        text = jax.jit(traced).lower(jax.ShapeDtypeStruct(shape, np.int8), start).as_text()
    assert "ui64>" in text
    assert "i32>" not in text


# What it finds.


def arrays(least=1):
    shapes = np_st.array_shapes(min_dims=1, max_dims=3, max_side=9).filter(
        lambda shape: math.prod(shape) >= least
    )
    dtypes = st.sampled_from([np.int8, np.uint16, np.float32, np.int64, np.complex64])
    return st.tuples(shapes, dtypes, st.integers(0, 2**32 - 1)).map(
        lambda drawn: random_array(np.random.default_rng(drawn[2]), drawn[0], drawn[1])
    )


def bits_of(array):
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


@given(arrays(), st.data())
def test_every_changed_bit_is_found(array, data):
    changed = array.copy()
    bit = data.draw(st.integers(0, 8 * array.nbytes - 1))
    changed.reshape(-1).view(np.uint8)[bit // 8] ^= 1 << bit % 8
    start = tuple(data.draw(st.integers(0, 2**33)) for _ in array.shape)
    assert of_host(array, start) != of_host(changed, start)


@given(arrays(least=2), st.data())
def test_unequal_elements_that_changed_places_are_found(array, data):
    flat = array.reshape(-1)
    i = data.draw(st.integers(0, flat.size - 1))
    j = data.draw(st.integers(0, flat.size - 1))
    swapped = flat.copy()
    swapped[[i, j]] = flat[[j, i]]
    same = bits_of(swapped).tobytes() == bits_of(flat).tobytes()
    start = (0,) * array.ndim
    assert (of_host(swapped.reshape(array.shape), start) == of_host(array, start)) == same


def test_a_swap_of_two_numbers_that_differ_in_sign_alone_is_found():
    """Modulo 2**32 none of these would be: the difference is 2**31, times an even number."""
    ones = np.ones((64, 64), np.float32)
    signs = {
        of_host(np.where(np.arange(4096).reshape(64, 64) == i, -ones, ones), (0, 0))
        for i in range(4096)
    }
    assert len(signs) == 4096


@given(arrays(least=2), st.data())
def test_a_shift_is_found(array, data):
    flat = array.reshape(-1)
    moved = np.roll(flat, data.draw(st.integers(1, flat.size - 1)))
    same = bits_of(moved).tobytes() == bits_of(flat).tobytes()
    start = (0,) * array.ndim
    assert (of_host(moved.reshape(array.shape), start) == of_host(array, start)) == same


def test_rows_blocks_and_axes_that_changed_places_are_found():
    array = np.arange(64, dtype=np.float32).reshape(8, 8)
    others = [
        array.T,
        array[::-1],
        array[:, ::-1],
        np.roll(array, 4, 0),
        np.block([[array[4:, :4], array[:4, 4:]], [array[:4, :4], array[4:, 4:]]]),
        array.reshape(4, 16)[:, [*range(8, 16), *range(8)]].reshape(8, 8),
    ]
    found = [of_host(other, (0, 0)) for other in (array, *others)]
    assert len(set(found)) == len(found)


@given(arrays(), st.data())
def test_parts_add_up(array, data):
    axis = data.draw(st.integers(0, array.ndim - 1))
    at = data.draw(st.integers(0, array.shape[axis]))
    first, second = np.split(array, [at], axis)
    start = tuple(data.draw(st.integers(0, 9000)) for _ in array.shape)
    moved = (*start[:axis], start[axis] + at, *start[axis + 1 :])
    both = of_host(first, start) + of_host(second, moved)
    assert of_host(array, start) == both % 2**64


# Parts of more than 2**31 elements, of which only the tables of weights are made.

HUGE = [
    ((2**33,), np.int8, (0,)),
    ((2**33,), np.int8, (2**33 - 5,)),
    ((3, 2**31 + 2**14), np.int8, (2**34, 2**32 + 7)),
    ((2**10, 2**22), np.int16, (2**31 - 3, 2**31 - 2**13 + 1)),
    ((2, 5, 2**29), np.int32, (2**31 - 1, 2**40, 3)),
    ((2**32,), np.float64, (2**32 - 1,)),
]


@pytest.mark.parametrize(("shape", "dtype", "start"), HUGE)
def test_the_weights_of_huge_parts_are_those_of_the_host(shape, dtype, start):
    dtype = np.dtype(dtype)
    each = fingerprint.DIGIT * fingerprint.WORD_BYTES // dtype.itemsize
    assert shape[-1] % each == 0
    with jax.enable_x64(True):
        at = jnp.asarray(start, jnp.int64).astype(jnp.uint64)
        by = fingerprint_traced._weights_of_cut_rows(shape, dtype, at, each)
        by = jax.tree.map(np.asarray, by)
    rng, last = np.random.default_rng(0), math.prod(shape) - 1
    for place in [0, last, 2**31 - 1, 2**31, *map(int, rng.integers(0, last, 200))]:
        row, column = divmod(place, each)
        outer = int((by.next_rows if by.carry[column] else by.rows)[row])
        index = [int(a + b) for a, b in zip(np.unravel_index(place, shape), start, strict=True)]
        for i, by_word in enumerate(by.words):
            byte = index[-1] * dtype.itemsize + 4 * i
            places = [*index[:-1], byte // 4]
            axes = range(len(places) - 1, -1, -1)
            each_axis = [
                int(fingerprint.weights(axis, np.array([coordinate], np.uint64))[0])
                for axis, coordinate in zip(axes, places, strict=True)
            ]
            wanted = math.prod(each_axis) << 8 * (byte % 4)
            assert outer * int(by_word[column]) % 2**64 == wanted % 2**64, (place, i)


@pytest.mark.parametrize(("shape", "dtype", "start"), HUGE)
def test_no_program_for_huge_parts_counts_in_32_bits(shape, dtype, start):
    def look(shard, within, start):
        part = jax.lax.dynamic_slice(shard, list(within), shape)
        by = fingerprint_traced.weights_traced(part.shape, part.dtype, start)
        return fingerprint_traced.of_traced(part, by)

    whole = (shape[0] + 9, *shape[1:])
    index = jax.ShapeDtypeStruct((len(shape),), np.int64)
    with jax.enable_x64(True):
        lowered = jax.jit(look).lower(jax.ShapeDtypeStruct(whole, dtype), index, index)
        assert lowered.out_info.dtype == np.uint64
    text = lowered.as_text()
    counting = [line for line in text.splitlines() if "iota" in line or "dynamic_slice" in line]
    assert any("iota" in line for line in counting)
    assert not [line for line in counting if "tensor<i32>" in line or "ui32>" in line]
