"""A program is compiled once, whoever asks first and whatever it is given."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equipment.gates import HANG_S
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from lazy_orbax.snapshot.programs import PROGRAMS, Program, shared

ONE = NamedSharding(Mesh(np.array(jax.devices()[:1]), ("a",)), P())


class Jitted:
    """Counts how often a jitted function is compiled."""

    def __init__(self, function):
        self.n_compiled = 0
        self._jitted = jax.jit(function, in_shardings=ONE, out_shardings=ONE)

    def trace(self, *stand_ins):
        self.n_compiled += 1
        return self._jitted.trace(*stand_ins)

    def __call__(self, *arguments):
        return self._jitted(*arguments)


def doubling(dtype=np.float32):
    jitted = Jitted(lambda x: x + x)
    return jitted, Program(jitted, [jax.ShapeDtypeStruct((4,), dtype)])


def test_it_is_compiled_by_whoever_asks_first():
    jitted, program = doubling()
    assert not program.is_compiled
    program.compiled()
    assert program.is_compiled
    assert program(jnp.arange(4.0)).tolist() == [0, 2, 4, 6]
    assert jitted.n_compiled == 1
    jitted, program = doubling()
    assert program(jnp.arange(4.0)).tolist() == [0, 2, 4, 6]
    assert program.is_compiled
    assert jitted.n_compiled == 1


def test_arrays_of_weak_types_and_anywhere_need_no_other_program():
    jitted, program = doubling()
    weak = jnp.broadcast_to(jnp.asarray(2.0), (4,))
    assert weak.weak_type
    here = jax.device_put(np.ones(4, np.float32), SingleDeviceSharding(jax.devices()[0]))
    for array in (weak, here, jax.device_put(weak, ONE), jnp.ones(4)):
        assert program(array).tolist() == (2 * np.array(array)).tolist()
    assert jitted.n_compiled == 1


@pytest.mark.parametrize("dtype", [jnp.int4, jnp.uint4])
def test_numbers_of_less_than_a_byte_are_taken(dtype):
    jitted, program = doubling(dtype)
    assert program.is_compiled  # Nothing is to be compiled ahead.
    assert program(jnp.arange(4, dtype=dtype)).tolist() == [0, 2, 4, 6]
    assert jitted.n_compiled == 0


@pytest.mark.parametrize("dtype", [np.bool_, np.complex64, jnp.bfloat16, jnp.float8_e4m3fn])
def test_numbers_of_whole_bytes_are_compiled_ahead(dtype):
    assert not Program(None, [jax.ShapeDtypeStruct((4,), dtype)]).is_compiled


def test_who_comes_second_waits_for_the_first():
    jitted, program = doubling()
    began, goes_on = threading.Event(), threading.Event()
    original = jitted.trace

    def trace(*stand_ins):
        began.set()
        assert goes_on.wait(HANG_S)
        return original(*stand_ins)

    jitted.trace = trace
    found = []
    threads = [threading.Thread(target=lambda: found.append(program.compiled())) for _ in range(2)]
    threads[0].start()
    assert began.wait(HANG_S)
    threads[1].start()
    goes_on.set()
    for thread in threads:
        thread.join(HANG_S)
    assert found[0] is found[1]
    assert jitted.n_compiled == 1


def test_a_failure_is_raised_and_tried_again():
    jitted, program = doubling()
    original, jitted.trace = jitted.trace, None
    with pytest.raises(TypeError):
        program.compiled()
    assert not program.is_compiled
    jitted.trace = original
    assert program.compiled() is program.compiled()


def test_what_looks_alike_shares_one_while_somebody_keeps_it():
    one = shared("a look", lambda: doubling()[1])
    assert shared("a look", lambda: doubling()[1]) is one
    assert shared("another look", lambda: doubling()[1]) is not one
    del one
    assert "a look" not in PROGRAMS
