"""Host memory for what is read: where it starts, and that it may be written whole."""

import pytest

from lazy_orbax.restore.memory import ALIGNMENT, aligned, rounded_up


@pytest.mark.parametrize("n_bytes", [1, 63, 64, 4097, 2**21 - 1, 2**21, 2**22 + 5])
def test_memory_starts_where_xla_takes_it(n_bytes):
    memory = aligned(n_bytes)
    memory[:] = 1
    assert memory.nbytes == n_bytes
    assert memory.ctypes.data % (2**21 if n_bytes >= 2**21 else ALIGNMENT) == 0


@pytest.mark.parametrize(("n_bytes", "wanted"), [(0, 0), (1, 64), (64, 64), (65, 128)])
def test_what_comes_next_starts_there_too(n_bytes, wanted):
    assert rounded_up(n_bytes) == wanted
