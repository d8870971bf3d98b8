"""What NumPy reads of arrays on CPU devices: right, and without a trace on them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equipment.trees import on_mesh, random_array
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from lazy_orbax.integrity import fingerprint, proof_on_host
from lazy_orbax.integrity.proof_subjects import Misplaced, Part, Subject

DTYPES = [np.bool_, np.int8, np.float32, np.complex64, jnp.bfloat16, jnp.float8_e4m3fn, jnp.int4]


def subject_of(array, parts, part_shape):
    return Subject("leaf", array.shape, array.dtype, array.sharding, part_shape, parts)


def shards_of(array):
    where = array.sharding.devices_indices_map(array.shape)
    parts = tuple(
        Part(device, device, tuple(part.start or 0 for part in index))
        for device, index in where.items()
    )
    return subject_of(array, parts, array.sharding.shard_shape(array.shape))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", [("a", "b"), ("b",), ()])
def test_each_shard_has_its_fingerprint(mesh, dtype, spec):
    host = np.asarray(random_array(np.random.default_rng(1), (8, 6), dtype))
    array = on_mesh(host, mesh, *spec)
    where = array.sharding.devices_indices_map(array.shape)
    found = proof_on_host.look({0: shards_of(array)}, [array])
    for device, index in where.items():
        start = tuple(part.start or 0 for part in index)
        assert found[device] == fingerprint.of_host(host[index], start)


def test_parts_of_shards(mesh):
    host = np.asarray(random_array(np.random.default_rng(2), (16, 6), jnp.bfloat16))
    array = jax.device_put(host, NamedSharding(mesh, P(None, "b")))
    devices = [mesh.devices[i, 1] for i in range(4)]
    parts = tuple(Part(i, device, (4 * i, 3)) for i, device in enumerate(devices))
    found = proof_on_host.look({0: subject_of(array, parts, (4, 3))}, [array])
    for i in range(4):
        assert found[i] == fingerprint.of_host(host[4 * i : 4 * i + 4, 3:], (4 * i, 3))


def test_a_device_without_the_part_is_named(mesh):
    array = on_mesh(np.zeros((16, 6), np.float32), mesh, "a")
    subject = subject_of(array, (Part(0, mesh.devices[0, 0], (4, 0)),), (4, 6))
    with pytest.raises(Misplaced, match="does not hold the part at") as raised:
        proof_on_host.look({0: subject}, [array])
    assert raised.value.leaf == "leaf"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "placed",
    [
        lambda mesh: NamedSharding(mesh, P("a", "b")),
        lambda mesh: NamedSharding(mesh, P()),
        lambda mesh: SingleDeviceSharding(mesh.devices[1, 1]),
    ],
    ids=["sharded", "replicated", "on one device"],
)
def test_nothing_is_left_on_the_array(mesh, dtype, placed):
    """A view would make the step that donates the array copy it."""
    array = jax.jit(lambda: jnp.ones((8, 6), dtype), out_shardings=placed(mesh))()
    places = [shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards]
    proof_on_host.look({0: shards_of(array)}, [array])
    assert array._npy_value is None
    assert all(shard.data._npy_value is None for shard in array.addressable_shards)
    step = jax.jit(lambda x: ~x if x.dtype == np.bool_ else x + x, donate_argnums=0)
    stepped = step(array)
    assert [shard.data.unsafe_buffer_pointer() for shard in stepped.addressable_shards] == places


def test_an_array_that_was_donated_is_refused(mesh):
    array = on_mesh(np.zeros((16, 6), np.float32), mesh, "a")
    subject = shards_of(array)
    array.delete()
    with pytest.raises(RuntimeError, match="deleted"):
        proof_on_host.look({0: subject}, [array])
