"""Young's and Daly's intervals against the model that Daly's is of."""

from __future__ import annotations

import math

import pytest

from lazy_orbax.tiers.interval_formulas import daly_interval_s, young_interval_s


@pytest.mark.parametrize("mtbf_s", [100.0, 1000.0, 50_000.0])
@pytest.mark.parametrize("cost_s", [0.1, 3.0, 40.0])
def test_dalys_interval_is_the_best_of_his_complete_model(cost_s, mtbf_s):
    def lost(work_s):
        return math.expm1((work_s + cost_s) / mtbf_s) / work_s

    ratio = 1.02
    intervals_s = (mtbf_s * ratio**n for n in range(-1000, 100))
    found = min(intervals_s, key=lost)
    assert lost(daly_interval_s(cost_s, mtbf_s)) < 1.001 * lost(found)
    assert daly_interval_s(cost_s, mtbf_s) == pytest.approx(found, rel=0.05)


def test_where_failures_are_rare_young_and_daly_agree():
    assert young_interval_s(2, 1e8) == 20_000
    assert daly_interval_s(2, 1e8) == pytest.approx(20_000, rel=1e-3)
    assert daly_interval_s(3, 1) == 1  # A save takes longer than nothing fails.


@pytest.mark.parametrize(("mtbf_min", "interval_min"), [(24 * 60, 117), (6 * 60, 57), (15, 9.1)])
def test_intervals_that_dalys_paper_gives(mtbf_min, interval_min):
    """Of saves that take five minutes, in its figures 3 to 5."""
    assert daly_interval_s(5 * 60, mtbf_min * 60) / 60 == pytest.approx(interval_min, rel=0.01)
