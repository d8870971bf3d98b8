"""A thousand snapshots: memory, descriptors and threads stay as they were, and nothing is left."""

from __future__ import annotations

import os
import pathlib
import shutil
import tempfile
import threading

import jax
import jax.numpy as jnp
import pytest

import lazy_orbax

N_BYTES = 2**22


def resources(directory):
    """Files in memory and their bytes, descriptors, threads, and memory of this process's own."""
    sizes = [path.stat().st_size for path in pathlib.Path(directory).glob("*.slabs")]
    status = pathlib.Path("/proc/self/status").read_text()
    own = next(line for line in status.splitlines() if line.startswith("RssAnon"))
    descriptors = len(os.listdir("/proc/self/fd"))
    return sizes, descriptors, threading.active_count(), int(own.split()[1]) * 1024


@pytest.mark.parametrize("n", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_memory_is_flat_and_nothing_is_left(n, tmp_path, tell):
    above = pathlib.Path(tempfile.mkdtemp(prefix="lo-", dir="/dev/shm"))
    directory = str(above / "k")
    advance = jax.jit(lambda x: x + 1, donate_argnums=0)
    state, seen = jnp.zeros(N_BYTES // 4), []
    with lazy_orbax.Keeper(tmp_path, directory=directory) as keeper:
        for step in range(n):
            state = advance(state)
            assert keeper.save(step, state)
            keeper.wait()
            if step in (n // 4, n - 1):
                seen.append(resources(directory))
        assert keeper.report == lazy_orbax.reports.KeeperReport(kept=n, newest_step=n - 1)
    first, last = seen
    assert last[0] == first[0]
    assert len(last[0]) == 2
    assert last[1:3] == first[1:3]
    # What Python and the C library keep for later: less than one snapshot in all these saves.
    assert last[3] - first[3] < N_BYTES
    assert os.listdir(above) == []
    shutil.rmtree(above)
    tell("snapshots in memory", f"{n} saves", f"{last[3] - first[3]} bytes more than at a quarter")
