"""Arrays of parts in host memory: what JAX's public function makes, with and without its inside."""

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from lazy_orbax._orbax import parts_in_memory
from lazy_orbax._orbax.parts_in_memory import ArrayMaker


def mesh(*shape, **kwargs):
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return Mesh(devices, ("a", "b")[: len(shape)], **kwargs)


SHARDINGS = {
    "rows": lambda: NamedSharding(mesh(4), P("a")),
    "columns": lambda: NamedSharding(mesh(4), P(None, "a")),
    "grid": lambda: NamedSharding(mesh(2, 2), P("b", "a")),
    "partly replicated": lambda: NamedSharding(mesh(2, 2), P("b")),
    "replicated": lambda: NamedSharding(mesh(4), P()),
    "one device": lambda: SingleDeviceSharding(jax.devices()[1]),
    "explicit": lambda: NamedSharding(mesh(4, axis_types=(AxisType.Explicit,)), P("a")),
}


@pytest.fixture(params=["JAX's own", "public"])
def way(request, monkeypatch):
    if request.param == "public":
        monkeypatch.setattr(parts_in_memory, "_probed", lambda: None)
    else:
        assert parts_in_memory._probed() is not None
    return request.param


@pytest.mark.parametrize("name", SHARDINGS)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, ml_dtypes.int4, np.bool_])
@pytest.mark.parametrize("shape", [(8, 4), (0, 4)])
def test_the_first_and_others_are_what_the_public_function_makes(way, name, dtype, shape):
    sharding, maker = SHARDINGS[name](), ArrayMaker()
    where = sharding.addressable_devices_indices_map(shape)
    for seed in range(2):
        whole = np.random.default_rng(seed).integers(0, 2, shape).astype(dtype)
        wanted = jax.make_array_from_callback(shape, sharding, lambda index, w=whole: w[index])
        parts = [whole[index] for index in where.values()]
        found = maker.array_of(shape, whole.dtype, sharding, parts)
        assert (found.aval, found.sharding, found.committed) == (wanted.aval, sharding, True)
        assert found.weak_type is False
        for mine, other in zip(found.addressable_shards, wanted.addressable_shards, strict=True):
            assert (mine.device, mine.index) == (other.device, other.index)
            np.testing.assert_array_equal(np.asarray(mine.data), np.asarray(other.data))


def test_cpu_devices_take_aligned_memory_as_it_is(way):
    sharding, maker = SingleDeviceSharding(jax.devices("cpu")[0]), ArrayMaker()
    for _ in range(2):
        memory = np.zeros(8192, np.uint8)
        first = -memory.ctypes.data % 64
        part = memory[first : first + 4096].view(np.float32).reshape(32, 32)
        found = maker.array_of((32, 32), part.dtype, sharding, [part])
        assert found.unsafe_buffer_pointer() == part.ctypes.data


@pytest.mark.parametrize("dtype", [">f4", ">c16", "M8[s]", "U3"])
def test_what_jax_has_not_is_an_error_each_time(way, dtype):
    maker, part = ArrayMaker(), np.zeros((2, 2), dtype)
    for _ in range(2):
        with pytest.raises(TypeError, match="not a valid JAX array type|JAX only supports"):
            maker.array_of((2, 2), part.dtype, SHARDINGS["one device"](), [part])


def test_a_jax_without_this_symbol_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(parts_in_memory, "_NEEDED", ("interpreters.pxla", "no_such_thing"))
    parts_in_memory._probed.cache_clear()
    try:
        sharding, maker = SHARDINGS["rows"](), ArrayMaker()
        parts = [np.full((1, 2), i, np.float32) for i in range(4)]
        for _ in range(3):
            found = maker.array_of((4, 2), parts[0].dtype, sharding, parts)
        np.testing.assert_array_equal(found, np.concatenate(parts))
        (said,) = caplog.records
        assert "no_such_thing" in said.getMessage()
    finally:
        parts_in_memory._probed.cache_clear()
