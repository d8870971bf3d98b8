"""A training process whose storage hangs, fails and refuses, and comes back."""

from __future__ import annotations

import ctypes
import errno
import os
import pathlib
import sys
import threading
import time

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import numpy as np
import orbax.checkpoint as ocp
from equipment.gates import await_budget, join_threads
from equipment.training import SLAB_BYTES, Steps, make_state
from equipment.trees import assert_same
from faults.disks import temporary

import lazy_orbax
from lazy_orbax.errors import SaveError
from lazy_orbax.snapshot.host_budget import HOST_BUDGET

WRITES, SYNCS, CREATES, MERGES, MERGE_SYNCS = 1, 2, 4, 8, 16
# Which calls hang or fail, and with what. Quotas of users and projects answer EDQUOT; what stock
# kernels and NFS servers say of permissions is EACCES or EPERM.
FAULTS = [
    (WRITES, 0, 0),
    (SYNCS, 0, 0),
    (MERGES, 0, 0),
    (MERGE_SYNCS, 0, 0),
    (0, WRITES, errno.EIO),
    (0, SYNCS, errno.EIO),
    (0, WRITES, errno.EDQUOT),
    (0, MERGES, errno.EDQUOT),
    (0, CREATES, errno.EACCES),
    (0, CREATES, errno.EPERM),
]
TIMEOUT_S = 1.0


def main(directory: pathlib.Path) -> None:
    storage_does = ctypes.CDLL(None).storage_does
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
    options = lazy_orbax.LazyOptions(slab_bytes=SLAB_BYTES, storage_timeout_s=TIMEOUT_S)
    state = make_state(mesh)
    steps = Steps(state)
    handler = lazy_orbax.standard_handler(options=options)
    manager = ocp.CheckpointManager(directory, item_handlers=handler)
    step, wanted = 1, steps.bytes_of(state)
    manager.save(step, args=ocp.args.StandardSave(state))
    manager.wait_until_finished()
    for hangs, fails, why in FAULTS:
        state = steps.donating(state)
        storage_does(hangs, fails, why)
        start_s = time.monotonic()
        try:
            manager.save(step + 1, args=ocp.args.StandardSave(state))
            manager.wait_until_finished()
        except SaveError as error:
            assert error.step == step + 1, error
            assert (os.strerror(why) if fails else "storage_timeout_s") in str(error), error
            assert str(directory) in str(error.file), error
            assert "mend the cause and save again" in str(error), error
            if hangs == WRITES:
                # TensorStore reads it still, so it counts.
                assert HOST_BUDGET.in_flight_bytes > 0
            else:
                assert HOST_BUDGET.in_flight_bytes == 0
                # What fails when all is written goes when the next save begins.
                merging = (hangs | fails) & (MERGES | MERGE_SYNCS)
                assert merging or temporary(directory) == [], temporary(directory)
            del error
        else:
            raise AssertionError(f"hanging {hangs}, failing {fails}: the save did not fail")
        assert time.monotonic() - start_s < 20 * TIMEOUT_S
        for _ in range(3):
            state = steps.donating(state)
        jax.block_until_ready(state)
        assert manager.all_steps() == [step]
        with ocp.StandardCheckpointer() as stock:
            assert_same(stock.restore(directory / f"{step}" / "default"), wanted)
        storage_does(0, 0, 0)
        await_budget()
        join_threads("lazy_orbax-merge")
        # The same step: what was written late must not come to lie in it.
        step, wanted = step + 1, steps.bytes_of(state)
        manager.save(step, args=ocp.args.StandardSave(state))
        manager.wait_until_finished()
        manager.reload()
        assert manager.latest_step() == step
        assert temporary(directory) == [], temporary(directory)
        with ocp.StandardCheckpointer() as stock:
            assert_same(stock.restore(directory / f"{step}" / "default"), wanted)
        for old in manager.all_steps()[:-1]:
            manager.delete(old)
    # Threads that hang keep nobody from closing or from ending.
    storage_does(SYNCS, 0, 0)
    try:
        manager.save(step + 1, args=ocp.args.StandardSave(state))
        manager.close()
    except SaveError:
        manager.close()
    else:
        raise AssertionError("the save did not fail")
    assert any(thread.name == "lazy_orbax-sync" for thread in threading.enumerate())
    print("ALL HELD", flush=True)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
