"""Promotions beside a trainer that writes over its snapshots all the time: never a mixture."""

from __future__ import annotations

import itertools
import pathlib
import shutil
import tempfile
import threading

import numpy as np
import orbax.checkpoint as ocp
import pytest

import lazy_orbax
from lazy_orbax.handlers.promoting import promote

N = 2**20


def state(step):
    """Leaves that tell each of which step it is."""
    first = np.arange(N, dtype=np.uint32)
    return {f"leaf {i}": first * np.uint32(2654435761 + i) ^ np.uint32(step) for i in range(4)}


@pytest.fixture
def place():
    above = pathlib.Path(tempfile.mkdtemp(prefix="lo-", dir="/dev/shm"))
    yield str(above / "k")
    shutil.rmtree(above)


@pytest.mark.parametrize("n", [3, pytest.param(60, marks=pytest.mark.slow)])
def test_what_is_listed_is_of_one_step(place, tmp_path, tell, n):
    tier, stops = lazy_orbax.Tier(tmp_path / "tier", every_s=1), threading.Event()
    with lazy_orbax.Keeper("/run", directory=place) as keeper:

        def keep(step):
            keeper.save(step, state(step))
            keeper.wait()

        def train():
            for step in itertools.count(1):
                keep(step)
                if stops.is_set():
                    return

        trainer = threading.Thread(target=train, name="trainer")
        keep(0)
        trainer.start()
        try:
            promoted = [promote("/run", tier, place) for _ in range(n)]
        finally:
            stops.set()
            trainer.join()
        promote("/run", tier, place)
        newest, skipped = keeper.report.newest_step, keeper.report.skipped
        assert keeper.report.failed == 0
    with ocp.CheckpointManager(tier.path) as manager:
        assert manager.latest_step() == newest
        for step in manager.all_steps():
            found = manager.restore(step)
            for name, wanted in state(step).items():
                assert np.array_equal(found[name], wanted), (step, name)
    tell(
        "Promotions beside a trainer",
        f"{n - promoted.count(None)} promoted",
        f"{skipped} steps passed over",
    )
