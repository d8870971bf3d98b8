"""The closed form is what a simulation of many machines comes to."""

import numpy as np
import pytest

import lazy_orbax
from lazy_orbax.errors import OptionError

HOUR_S, YEAR_S = 3600.0, 365 * 86400.0


def simulated(*, n_machines, group, mtbf_s, exposed_s, n_failures, seed):
    """Returns the share of failures with no other one of the group in the time after them."""
    rng = np.random.default_rng(seed)
    at_s = np.cumsum(rng.exponential(mtbf_s / n_machines, n_failures))
    machine = rng.integers(0, n_machines, n_failures)
    survived, last = 0, {}
    for moment_s, who in zip(at_s[::-1].tolist(), machine[::-1].tolist()):
        # From the end: what comes next in the group, on another machine.
        nexts = last.setdefault(who // group, {})
        others = [then_s for other, then_s in nexts.items() if other != who]
        survived += all(then_s - moment_s > exposed_s for then_s in others)
        nexts[who] = moment_s
    return survived / n_failures


@pytest.mark.parametrize(
    ("group", "mtbf_s", "exposed_s"),
    [(2, 30 * 86400, 6 * HOUR_S), (4, 30 * 86400, 6 * HOUR_S), (8, 10 * 86400, HOUR_S)],
)
def test_a_simulation_comes_to_the_same(group, mtbf_s, exposed_s):
    n = 100_000
    found = simulated(
        n_machines=10_000 // group * group,
        group=group, mtbf_s=mtbf_s, exposed_s=exposed_s, n_failures=n, seed=3,
    )  # fmt: skip
    wanted = lazy_orbax.parity_survives(group=group, machine_mtbf_s=mtbf_s, exposed_s=exposed_s)
    assert 0.9 < wanted < 0.995
    assert abs(found - wanted) < 4 * (wanted * (1 - wanted) / n) ** 0.5


def test_ten_thousand_machines_lose_a_step_to_storage_once_in_decades():
    survives = lazy_orbax.parity_survives(group=4, machine_mtbf_s=5 * YEAR_S, exposed_s=600)
    between_s = 5 * YEAR_S / 10_000
    assert 43 * YEAR_S < between_s / (1 - survives) < 45 * YEAR_S


def test_advice_takes_it_into_account():
    """Memory that survives nearly all makes saves to storage rare."""
    mtbf_s = 5 * YEAR_S / 10_000
    storage = lazy_orbax.TierCost(name="storage", cost_s=1.0, commit_s=60.0)

    def every(survives):
        memory = lazy_orbax.TierCost(name="memory", cost_s=0.05, survives=survives)
        return lazy_orbax.advise([memory, storage], step_s=1.0, mtbf_s=mtbf_s)

    alone = every(0.6)
    survives = lazy_orbax.parity_survives(group=4, machine_mtbf_s=5 * YEAR_S, exposed_s=600)
    protected = every(survives)
    assert protected.every_steps("storage") > 50 * alone.every_steps("storage")
    assert protected.overhead < alone.overhead


@pytest.mark.parametrize(
    "wrong",
    [{"group": 1}, {"machine_mtbf_s": 0}, {"exposed_s": -1}, {"exposed_s": float("nan")}],
    ids=str,
)
def test_a_number_out_of_range_is_named(wrong):
    right = {"group": 4, "machine_mtbf_s": 1e6, "exposed_s": 60.0}
    with pytest.raises(OptionError, match=next(iter(wrong))):
        lazy_orbax.parity_survives(**{**right, **wrong})
