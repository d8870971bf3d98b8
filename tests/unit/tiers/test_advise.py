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
from lazy_orbax.tiers.advise import TierCost, daly_interval_s, stretch_with, young_interval_s

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
                    return self._recover()

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
    ("tiers", "mtbf_s", "tolerance"),
    [
        ([TierCost(name="one", cost_s=10)], 5000, 0.01),
        ([TierCost(name="one", cost_s=10, recovery_s=400, commit_s=120)], 5000, 0.01),
        ([TierCost(name="one", cost_s=60, recovery_s=300)], 1000, 0.01),
        ([MEMORY, BUCKET], 2000, 0.03),
        ([MEMORY, DISK, BUCKET], 5000, 0.03),
        ([TierCost(name="free", cost_s=0, survives=0.5, commit_s=30), BUCKET], 2000, 0.03),
    ],
    ids=lambda value: "+".join(t.name for t in value) if isinstance(value, list) else str(value),
)
def test_so_much_is_lost_in_a_simulation(tiers, mtbf_s, tolerance):
    """100,000 failures: the share that is lost is known to half a percent of itself."""
    advice = lazy_orbax.advise(tiers, step_s=0.5, mtbf_s=mtbf_s)
    used = [tier for tier in tiers if advice.every_steps(tier.name)]
    intervals_s = [advice.every_steps(tier.name) * advice.step_s for tier in used]
    lost = Simulated(used, intervals_s, mtbf_s, seed=7).run(20_000 * mtbf_s)
    assert advice.overhead == pytest.approx(lost, rel=tolerance)
