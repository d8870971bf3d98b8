"""Two real processes that measure different things save the same steps."""

from __future__ import annotations

import pytest
from equipment.pods.jobs import reports, run_job

pytestmark = pytest.mark.slow  # `tests/unit/tiers` has threads that agree in the same way.


def test_two_processes_save_at_the_steps_that_the_first_decides(tmp_path):
    first, second = reports(run_job(2, "at_intervals", tmp_path / "run", logs=tmp_path))
    assert first["saved"] == first["steps"] == second["saved"] == second["steps"]
    # Three seconds of each twelve steps, of one second each.
    assert first["report"].startswith("Save every 12 steps: a step takes 1 s, a save costs 3 s")
    assert second["report"].startswith("Save every 19 steps: a step takes 1.1 s, a save costs 5 s")
    assert len(first["saved"]) >= 3
