"""Views of arrays in host memory. Copies are tested with the snapshots that are made of them."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lazy_orbax.snapshot import host_copies


def donating(array):
    return jax.jit(lambda x: x + 1, donate_argnums=0)(array)


def test_a_view_is_no_copy_and_keeps_what_it_shows():
    array = jnp.arange(1024.0) * 2
    place = array.unsafe_buffer_pointer()
    view = host_copies.view_of(array)
    assert view.__array_interface__["data"][0] == place
    assert array._npy_value is None
    stepped = donating(array)
    assert stepped.unsafe_buffer_pointer() != place
    np.testing.assert_array_equal(view, np.arange(1024.0) * 2)


def test_once_a_view_is_gone_a_step_may_use_the_buffer_again():
    array = jnp.arange(1024.0) * 2
    place = array.unsafe_buffer_pointer()
    assert host_copies.view_of(array).sum() == 1023 * 1024
    assert donating(array).unsafe_buffer_pointer() == place


@pytest.mark.parametrize("dtype", ["bfloat16", "int4", "float8_e4m3fn"])
def test_there_is_no_view_of_what_dlpack_does_not_know(dtype):
    assert host_copies.view_of(jnp.ones(8, dtype)) is None


def test_there_is_no_view_of_what_is_elsewhere():
    gpu = types.SimpleNamespace(platform="gpu")
    assert host_copies.view_of(types.SimpleNamespace(devices=lambda: [gpu])) is None
