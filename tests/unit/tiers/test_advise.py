"""How often to save where: formulas against a simulation, and against every other interval."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lazy_orbax
from lazy_orbax.errors import OptionError
from lazy_orbax.tiers.advise import TierCost
from lazy_orbax.tiers.interval_formulas import young_interval_s

MEMORY = TierCost(name="memory", cost_s=0.5, survives=0.8, recovery_s=20, commit_s=2)
DISK = TierCost(name="disk", cost_s=2, survives=0.9, recovery_s=40, commit_s=10)
BUCKET = TierCost(name="bucket", cost_s=5, recovery_s=200, commit_s=60)


class Simulated:
    """A run with random failures, event by event: nothing of the formulas is in it.

    Attributes:
        now_s: the time.
        work_s: seconds of training that the state has behind it.
        in_saves_s: seconds that went into saves, also those that were done again.
    """

    def __init__(self, tiers, intervals_s, mtbf_s, seed):
        self._random = random.Random(seed)
        self._tiers, self._mtbf_s = tiers, mtbf_s
        self._intervals_s = intervals_s
        self._fails_at_s = self._random.expovariate(1 / mtbf_s)
        # For each tier: its newest save that can be restored, and those that will be.
        self._newest, self._coming = [0.0] * len(tiers), [[] for _ in tiers]
        self.now_s = self.work_s = 0.0

    def _pass(self, seconds):
        """Lets time go by; returns whether nothing failed meanwhile."""
        fails = self._fails_at_s < self.now_s + seconds
        self.now_s = self._fails_at_s if fails else self.now_s + seconds
        for i, coming in enumerate(self._coming):
            for at_s, work_s in [save for save in coming if save[0] <= self.now_s]:
                self._newest[i] = max(self._newest[i], work_s)
                coming.remove((at_s, work_s))
        return not fails

    def run(self, until_s):
        unit_s = self._intervals_s[0]
        while self.now_s < until_s:
            n = round(self.work_s / unit_s) + 1
            if not self._pass(unit_s):
                self._recover()
                continue
            self.work_s = n * unit_s
            self._save(n)
        return 1 - self.work_s / self.now_s

    def _save(self, n):
        for i, tier in enumerate(self._tiers):
            if n % round(self._intervals_s[i] / self._intervals_s[0]) == 0:
                self._coming[i].append((self.now_s + tier.until_committed_s, self.work_s))
                if not self._pass(tier.cost_s):
                    self._recover()
                    return

    def _recover(self):
        """Falls back to the newest save that survives; another failure may come meanwhile."""
        while True:
            hit = self._random.random()
            survive = [i for i, tier in enumerate(self._tiers) if tier.survives > hit]
            for i in range(survive[0]):
                self._newest[i] = -math.inf
            for coming in self._coming:
                coming.clear()
            self.work_s = max(self._newest[i] for i in survive)
            source = next(i for i in survive if self._newest[i] == self.work_s)
            self._fails_at_s = self.now_s + self._random.expovariate(1 / self._mtbf_s)
            if self._pass(self._tiers[source].recovery_s):
                return


@pytest.mark.parametrize(
    ("n_failures", "tolerance"),
    [(3000, 0.06), pytest.param(40_000, 0.04, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize(
    ("tiers", "mtbf_s"),
    [
        ([TierCost(name="one", cost_s=10)], 5000),
        ([TierCost(name="late", cost_s=10, recovery_s=400, commit_s=120)], 5000),
        ([TierCost(name="dear", cost_s=60, recovery_s=300)], 1000),
        ([MEMORY, BUCKET], 2000),
        ([MEMORY, DISK, BUCKET], 5000),
        ([TierCost(name="free", cost_s=0, survives=0.5, commit_s=30), BUCKET], 2000),
    ],
    ids=lambda value: "+".join(t.name for t in value) if isinstance(value, list) else str(value),
)
def test_so_much_is_lost_in_a_simulation(tiers, mtbf_s, n_failures, tolerance):
    advice = lazy_orbax.advise(tiers, step_s=0.5, mtbf_s=mtbf_s)
    assert all(tier.every_steps for tier in advice.tiers)
    intervals_s = [tier.every_steps * advice.step_s for tier in advice.tiers]
    lost = Simulated(tiers, intervals_s, mtbf_s, seed=7).run(n_failures * mtbf_s)
    assert advice.overhead == pytest.approx(lost, rel=tolerance)


@pytest.mark.parametrize("mtbf_s", [300.0, 4000.0])
@pytest.mark.parametrize("cost_s", [0.0, 0.3, 20.0])
def test_no_other_number_of_steps_is_better(cost_s, mtbf_s):
    tier = TierCost(name="disk", cost_s=cost_s, commit_s=7, recovery_s=30)
    (found,) = lazy_orbax.advise([tier], step_s=2, mtbf_s=mtbf_s).tiers
    lost = {n: tier.stretch(2 * n, mtbf_s=mtbf_s) for n in range(4, 1000)}
    assert lost[found.every_steps] <= 1.0001 * min(lost.values())


@pytest.mark.parametrize("mtbf_s", [150.0, 500.0, 20_000.0])
def test_with_the_tier_below_no_other_interval_is_better(mtbf_s):
    """The tier below has failures of its own, which lengthen the time between saves to this one."""
    below = TierCost(name="below", cost_s=0, survives=0.8, recovery_s=100)
    above = TierCost(name="above", cost_s=9, recovery_s=300)
    found = lazy_orbax.advise([below, above], step_s=1, mtbf_s=mtbf_s)
    assert found.every_steps("below") == 1
    stretch = below.stretch(1, mtbf_s=mtbf_s / 0.8)
    lost = {n: above.stretch(n, mtbf_s=mtbf_s / 0.2, below=stretch) for n in range(1, 2000)}
    assert lost[found.every_steps("above")] <= (1 + 1e-6) * min(lost.values())


@pytest.mark.parametrize("mtbf_s", [500.0, 20_000.0])
def test_no_other_pair_of_intervals_is_much_better(mtbf_s):
    advice = lazy_orbax.advise([MEMORY, BUCKET], step_s=1, mtbf_s=mtbf_s)

    def lost(every, multiple):
        below = MEMORY.stretch(every, mtbf_s=mtbf_s / 0.8)
        return BUCKET.stretch(every * multiple, mtbf_s=mtbf_s / 0.2, below=below)

    pairs = [(n, k) for n in range(2, 300) for k in range(1, 50) if n * k >= 60]
    best = min(itertools.starmap(lost, pairs))
    # The best interval of the second tier need not be a multiple of the best one of the first.
    assert 1 / (1 - advice.overhead) <= 1.002 * best


def test_an_interval_is_whole_steps_a_multiple_and_no_shorter_than_a_commit():
    slow = TierCost(name="slow", cost_s=0.01, commit_s=100)
    advice = lazy_orbax.advise([MEMORY, slow], step_s=0.7, mtbf_s=1000)
    memory, bucket = (tier.every_steps for tier in advice.tiers)
    assert memory * 0.7 >= 2
    assert bucket * 0.7 >= 100 > (bucket - memory) * 0.7
    assert bucket % memory == 0


@pytest.mark.parametrize(("mtbf_s", "best"), [(3, 1), (5, 2), (10, 2), (20, 3), (50, 5)])
def test_of_the_whole_numbers_around_the_best_interval_the_better_one_is_taken(mtbf_s, best):
    """Daly's intervals are 1.15, 1.54, 2.25, 3.27 and 5.28 steps."""
    tier = TierCost(name="disk", cost_s=0.3)
    assert lazy_orbax.advise([tier], step_s=1, mtbf_s=mtbf_s).every_steps("disk") == best
    assert best == min(range(1, 100), key=lambda n: tier.stretch(n, mtbf_s=mtbf_s))


def test_what_commits_in_three_steps_is_saved_every_three():
    """Three times 0.1 is more than 0.3 in binary: that is no fourth step."""
    free = TierCost(name="free", cost_s=0, commit_s=3 * 0.1)
    assert lazy_orbax.advise([free], step_s=0.1, mtbf_s=1e4).every_steps("free") == 3


def test_a_tier_that_does_not_pay_is_left_out():
    slow = TierCost(name="slow memory", cost_s=9, survives=0.1)
    twin = TierCost(name="twin", cost_s=30)
    advice = lazy_orbax.advise([twin, BUCKET, slow], step_s=1, mtbf_s=1e4)
    assert [tier.name for tier in advice.tiers] == ["slow memory", "bucket", "twin"]
    assert [bool(tier.every_steps) for tier in advice.tiers] == [False, True, False]
    assert "slow memory: never" in str(advice)
    alone = lazy_orbax.advise([BUCKET], step_s=1, mtbf_s=1e4)
    assert advice.overhead == alone.overhead


def test_of_two_tiers_that_survive_alike_the_better_one_is_used():
    """The cheaper one does not win where it takes long to recover from."""
    cheap = TierCost(name="cheap", cost_s=1, recovery_s=2000)
    fast = TierCost(name="fast", cost_s=2, recovery_s=10)
    advice = lazy_orbax.advise([cheap, fast], step_s=1, mtbf_s=1e4)
    assert advice.every_steps("cheap") is None
    assert advice.every_steps("fast")


def test_shares_of_one_tier():
    advice = lazy_orbax.advise(
        [TierCost(name="disk", cost_s=10, recovery_s=100)], step_s=1, mtbf_s=1e4
    )
    n = advice.every_steps("disk")
    assert n == pytest.approx(young_interval_s(10, 1e4), rel=0.03)
    assert advice.recovering == pytest.approx(100 / 1e4, rel=0.01)
    assert advice.saving == pytest.approx(10 / (n + 10) * (1 - advice.overhead) * (n + 10) / n)
    assert advice.lost_work == pytest.approx((n + 10) / 2 / 1e4, rel=0.05)


seconds = st.floats(0, 1e4)


@given(
    st.lists(st.tuples(seconds, seconds, seconds, st.floats(0.01, 1)), min_size=0, max_size=3),
    st.floats(1e-3, 100),
    st.floats(1, 1e8),
)
def test_any_tiers_have_an_advice(rows, step_s, mtbf_s):
    tiers = [
        TierCost(name=str(n), cost_s=cost, commit_s=commit, recovery_s=recovery, survives=share)
        for n, (cost, commit, recovery, share) in enumerate([*rows, (5.0, 10.0, 50.0, 1.0)])
    ]
    advice = lazy_orbax.advise(tiers, step_s=step_s, mtbf_s=mtbf_s)
    used = [tier for tier in advice.tiers if tier.every_steps]
    assert all(b.every_steps % a.every_steps == 0 for a, b in itertools.pairwise(used))
    commits = {tier.name: tier.until_committed_s for tier in tiers}
    assert all(tier.every_steps * step_s >= commits[tier.name] * 0.999999 for tier in used)
    assert 0 <= advice.overhead <= 1
    parts = (advice.saving, advice.lost_work, advice.recovering)
    assert sum(parts) == pytest.approx(advice.overhead)
    assert min(parts) > -1e-6
    assert str(advice).splitlines()[-1].startswith(f"{advice.overhead:.2%} of all time is lost")


def test_it_says_what_to_do():
    advice = lazy_orbax.advise([MEMORY, BUCKET], step_s=0.5, mtbf_s=20_000)
    title, head, memory, bucket, shares = str(advice).splitlines()
    assert title == "save every ... for steps of 500 ms and a failure every 5.56 h"
    assert head.split() == ["tier", "steps", "time", "saves", "Young", "Daly"]
    assert memory.split()[:2] == ["memory", str(advice.every_steps("memory"))]
    assert bucket.split()[:2] == ["bucket", str(advice.every_steps("bucket"))]
    assert "in saves" in shares


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"cost_s": -1}, "cost_s of tier 'x': found -1, wanted a number, at least 0 s"),
        ({"cost_s": math.nan}, "cost_s of tier 'x': found nan"),
        ({"recovery_s": "long"}, "recovery_s of tier 'x': found 'long'"),
        ({"commit_s": math.inf}, "commit_s of tier 'x': found inf"),
        ({"survives": 0}, "survives of tier 'x': found 0, wanted a number, 0 < share <= 1"),
        ({"survives": 80}, "survives of tier 'x': found 80"),
        ({"survives": True}, "survives of tier 'x': found True"),
    ],
)
def test_a_number_out_of_range_is_named(change, problem):
    with pytest.raises(OptionError) as caught:
        TierCost(**{"name": "x", "cost_s": 1.0, **change})
    assert str(caught.value).startswith(problem)


@pytest.mark.parametrize(
    ("tiers", "how", "problem"),
    [
        ([], {}, "tiers: found [], wanted 1 to 8"),
        ([BUCKET, BUCKET], {}, "tiers: found ['bucket', 'bucket']"),
        ([MEMORY, DISK], {}, "the best is 'disk' with survives=0.9"),
        ([BUCKET], {"step_s": 0}, "step_s: found 0, wanted a number, more than 0 s"),
        ([BUCKET], {"mtbf_s": None}, "mtbf_s: found None"),
    ],
)
def test_what_cannot_be_advised_on_is_said(tiers, how, problem):
    with pytest.raises(OptionError) as caught:
        lazy_orbax.advise(tiers, **{"step_s": 1.0, "mtbf_s": 1000.0, **how})
    assert problem in str(caught.value)


def test_who_asks_for_a_tier_that_is_not_there_hears_which_are():
    advice = lazy_orbax.advise([BUCKET], step_s=1, mtbf_s=1000)
    with pytest.raises(OptionError, match="There is no tier 'memory'; the tiers are 'bucket'"):
        advice.every_steps("memory")
