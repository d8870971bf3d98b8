"""Host memory for what is read: where it starts, and that it may be written whole."""

import itertools
import types

import pytest

from lazy_orbax.restore import memory as memory_module
from lazy_orbax.restore.memory import ALIGNMENT, Slabs, aligned, rounded_up

HUGE_PAGE = 2**21


@pytest.mark.parametrize("n_bytes", [1, 63, 64, 4097, 2**21 - 1, 2**21, 2**22 + 5])
def test_memory_starts_where_xla_takes_it(n_bytes):
    memory = aligned(n_bytes)
    memory[:] = 1
    assert memory.nbytes == n_bytes
    assert memory.ctypes.data % (2**21 if n_bytes >= 2**21 else ALIGNMENT) == 0


@pytest.mark.parametrize(("n_bytes", "wanted"), [(0, 0), (1, 64), (64, 64), (65, 128)])
def test_what_comes_next_starts_there_too(n_bytes, wanted):
    assert rounded_up(n_bytes) == wanted


@pytest.fixture
def advised(monkeypatch):
    """What the kernel is told of memory: where that starts, and its size."""
    told = []

    def madvise(address, n_bytes, advice):
        assert advice == memory_module._WITHOUT_HUGE_PAGES
        told.append((address.value, n_bytes.value))

    monkeypatch.setattr(memory_module, "_LIBC", types.SimpleNamespace(madvise=madvise))
    return told


def touches_take(monkeypatch, *seconds):
    """Says how long each first touch takes; the last time, those that follow as well."""
    durations = itertools.chain(seconds, itertools.repeat(seconds[-1]))
    ticks = itertools.chain.from_iterable((0.0, one) for one in durations)
    clock = types.SimpleNamespace(thread_time=ticks.__next__)
    monkeypatch.setattr(memory_module, "time", clock)


def test_huge_pages_that_are_quick_to_touch_are_kept(monkeypatch, advised):
    touches_take(monkeypatch, 0.0002)
    slabs = Slabs()
    for _ in range(3):
        slabs.new(16 * HUGE_PAGE)[:] = 1
    assert advised == []


@pytest.mark.parametrize("seconds", [(0.005,), (*[0.0002] * 15, 0.005)])
def test_once_they_are_slow_to_touch_small_pages_are_asked_for(monkeypatch, advised, seconds):
    touches_take(monkeypatch, *seconds)
    slabs = Slabs()
    made = [slabs.new(16 * HUGE_PAGE) for _ in range(3)]
    for slab in made:
        slab[:] = 1
    assert advised == [(slab.ctypes.data, slab.nbytes) for slab in made]
    assert {slab.ctypes.data % HUGE_PAGE for slab in made} == {0}


def test_what_has_hardly_a_huge_page_stays_as_it_is(monkeypatch, advised):
    touches_take(monkeypatch, 0.005)
    slabs = Slabs()
    for n_bytes in (0, 1, 2 * HUGE_PAGE - 1):
        assert slabs.new(n_bytes).nbytes == n_bytes
    assert advised == []


def test_where_the_system_knows_no_such_advice_memory_is_what_it_is(monkeypatch):
    monkeypatch.setattr(memory_module, "_LIBC", None)
    slab = Slabs().new(4 * HUGE_PAGE)
    slab[:] = 1
    assert slab.ctypes.data % HUGE_PAGE == 0


def test_the_kernel_takes_the_advice():
    slabs = Slabs()
    slabs._has_slow_pages = True
    slab = slabs.new(4 * HUGE_PAGE + 5)
    slab[:] = 7
    assert slab.nbytes == 4 * HUGE_PAGE + 5
    assert (slab == 7).all()
