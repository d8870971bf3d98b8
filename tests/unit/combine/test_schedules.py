"""Schedules against their closed forms, and against the learning rates that they stand for."""

import math

import numpy as np
import pytest

from lazy_orbax.combine.schedules import merge_coefficients
from lazy_orbax.errors import OptionError

NAMED = ["uniform", "linear", "cosine", "1-sqrt", "ema:0.9", "ema:0"]
DECAYS = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: 0.5 * (1 + np.cos(np.pi * x)),
    "1-sqrt": lambda x: 1 - np.sqrt(x),
}


@pytest.mark.parametrize("n", [1, 2, 5, 64])
@pytest.mark.parametrize("schedule", NAMED)
def test_coefficients_add_up_to_one_and_none_is_negative(schedule, n):
    found = merge_coefficients(schedule, n)
    assert len(found) == n
    assert math.isclose(math.fsum(found), 1, abs_tol=1e-12)
    assert min(found) >= 0


@pytest.mark.parametrize("n", [1, 2, 7])
@pytest.mark.parametrize("schedule", DECAYS)
def test_a_merge_is_a_run_whose_updates_decayed(schedule, n):
    """The sum of checkpoints is the first one, and the updates after it, scaled (2507.17634)."""
    rng = np.random.default_rng(n)
    first, updates = rng.normal(size=3), rng.normal(size=(n - 1, 3))
    checkpoints = first + np.concatenate([np.zeros((1, 3)), np.cumsum(updates, axis=0)])
    merged = np.array(merge_coefficients(schedule, n)) @ checkpoints
    rates = DECAYS[schedule](np.arange(1, n) / n)
    np.testing.assert_allclose(merged, first + rates @ updates, rtol=1e-12)


def test_the_closed_forms():
    np.testing.assert_allclose(merge_coefficients("linear", 4), merge_coefficients("uniform", 4))
    np.testing.assert_allclose(merge_coefficients("cosine", 2), [0.5, 0.5])
    np.testing.assert_allclose(merge_coefficients("cosine", 3), [0.25, 0.5, 0.25])
    np.testing.assert_allclose(merge_coefficients("1-sqrt", 4)[:1], [0.5])
    np.testing.assert_allclose(merge_coefficients("ema:0.5", 4), [0.125, 0.125, 0.25, 0.5])


def test_ema_is_what_a_moving_average_holds():
    values = np.random.default_rng(0).normal(size=9)
    average = values[0]
    for value in values[1:]:
        average = 0.8 * average + 0.2 * value
    assert math.isclose(np.dot(merge_coefficients("ema:0.8", 9), values), average)


def test_numbers_and_functions_are_taken_as_they_are():
    assert merge_coefficients([2, -1], 2) == (2.0, -1.0)
    assert merge_coefficients(np.ones(2), 2) == (1.0, 1.0)
    assert merge_coefficients(lambda n: range(n), 3) == (0.0, 1.0, 2.0)


@pytest.mark.parametrize(
    ("schedule", "n", "said"),
    [
        ("sine", 2, "no schedule 'sine'"),
        ("cosine:2", 2, "no schedule"),
        ("ema", 2, "from 0 to below 1"),
        ("ema:1", 2, "from 0 to below 1"),
        ("ema:x", 2, "from 0 to below 1"),
        ([1.0], 2, "1 coefficients for 2"),
        ([1.0, float("nan")], 2, "not finite"),
        (["a", 1], 2, "must be numbers"),
        (3, 2, "must be numbers"),
        ("uniform", 0, "at least 1"),
    ],
)
def test_what_is_no_schedule_is_refused(schedule, n, said):
    with pytest.raises(OptionError, match=said):
        merge_coefficients(schedule, n)
