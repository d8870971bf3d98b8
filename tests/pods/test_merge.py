"""Two processes merge a checkpoint together: each does a share, and one fails, both fail."""

from __future__ import annotations

import numpy as np
import pytest
from equipment.pods import states
from equipment.pods.jobs import reports, run_job

import lazy_orbax


@pytest.mark.parametrize("use_ocdbt", [True, False])
def test_processes_merge_together(tmp_path, use_ocdbt):
    root = tmp_path / "run"
    found = reports(run_job(2, "merged", root, logs=tmp_path, use_ocdbt=use_ocdbt))
    assert [one["failed"]["kind"] for one in found] == ["SaveError", "TypeError"]
    assert "process 1" in found[0]["failed"]["message"]
    assert all(one["bytes"] < 0.7 * states.N_BYTES for one in found)
    assert sum(one["bytes"] for one in found) == states.N_BYTES
    assert sorted(path.name for path in root.iterdir()) == ["1", "2", "3"]
    assert lazy_orbax.verify(root / "3").ok
    merged, first, second = lazy_orbax.load(root / "3"), states.values(1), states.values(2)
    for name, value in first.items():
        if value.dtype.kind == "i":
            assert (merged[name] == value).all()
            continue
        wide = [array.astype(np.float32) for array in (value, second[name])]
        with np.errstate(all="ignore"):
            wanted = np.float32(0.25) * wide[0] + np.float32(0.75) * wide[1]
            assert np.array_equal(wanted.astype(value.dtype), merged[name], equal_nan=True), name
