"""How often to save where: from what saves cost, how often something fails, and what survives that.

Failures come at random, independent of each other. After one, the run goes on from the newest save
that survived it. Several tiers are nested as in two-level recovery (N. H. Vaidya, "A case for
two-level distributed recovery schemes", 1995) and in FTI (S. Di et al., "Optimization of multi-
level checkpoint model for large scale HPC applications", 2014): each has the failures that no
cheaper one survives, and lengthens the time of those below it. For one tier this is the complete
model of Daly, with saves that are committed some time after they began.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lazy_orbax.errors import OptionError
from lazy_orbax.tiers.interval_formulas import daly_interval_s, young_interval_s
from lazy_orbax.view.blocks import Block, Column, Lines, Table
from lazy_orbax.view.text import duration_of
from lazy_orbax.view.viewed import Viewed

_MOST_TIERS = 8
# Beyond this exponent a float overflows: nothing is ever finished.
_MOST_EXPONENT = 700.0
_COLUMNS = (
    Column("tier"),
    *(Column(name, is_number=True) for name in ("steps", "time", "saves", "Young", "Daly")),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TierCost:
    """What it costs to save to a tier, and what a save there is good for.

    Attributes:
        name: what you call it.
        cost_s: seconds by which a save makes the training loop longer: a median of
            `StallReport.stalls_s`. 0 where others than the training process do the work.
        survives: the share of failures after which a save there can be restored: above 0, at
            most 1.
        recovery_s: seconds from such a failure until training goes on, with the restart.
        commit_s: seconds from the beginning of a save until it can be restored
            (`SaveTimeline.committed_s`). At least `cost_s` are reckoned with.

    Raises:
        OptionError: a number is out of range.
    """

    name: str
    cost_s: float
    survives: float = 1.0
    recovery_s: float = 0.0
    commit_s: float = 0.0

    def __post_init__(self) -> None:
        for field in ("cost_s", "recovery_s", "commit_s"):
            what = f"{field} of tier {self.name!r}"
            _check(what, getattr(self, field), "at least 0 s", lambda seconds: seconds >= 0)
        what = f"survives of tier {self.name!r}"
        _check(what, self.survives, "0 < share <= 1", lambda share: 0 < share <= 1)

    @property
    def until_committed_s(self) -> float:
        """Seconds from the beginning of a save until it can be restored."""
        return max(self.cost_s, self.commit_s)

    def stretch(self, work_s: float, *, mtbf_s: float, below: float = 1.0) -> float:
        """Returns how many seconds a second of training takes, with this tier and those below it.

        Args:
            work_s: seconds of training between two saves to it.
            mtbf_s: mean seconds between the failures that it is for.
            below: the same without this tier and its failures.
        """
        between = min((work_s * below + self.cost_s) / mtbf_s, _MOST_EXPONENT)
        late_s = self.until_committed_s - self.cost_s
        after = min((self.recovery_s + late_s) / mtbf_s, _MOST_EXPONENT)
        return mtbf_s * math.exp(after) * math.expm1(between) / work_s


@dataclasses.dataclass(frozen=True, kw_only=True)
class TierAdvice:
    """How often to save to a tier.

    Attributes:
        name: of the tier.
        every_steps: steps from a save to the next, or `None`: never.
        mtbf_s: mean seconds between failures that this tier survives and no cheaper one in use.
        saving: share of all time that goes into saves to it.
        young_s: Young's interval for these failures, `sqrt(2 * cost_s * mtbf_s)`.
        daly_s: Daly's, in seconds of training between two saves.
    """

    name: str
    every_steps: int | None = None
    mtbf_s: float = math.inf
    saving: float = 0.0
    young_s: float = math.inf
    daly_s: float = math.inf


@dataclasses.dataclass(frozen=True, kw_only=True)
class Advice(Viewed):
    """How often to save where, and which share of all time is lost then.

    Attributes:
        tiers: one for each, those that survive least first.
        step_s: seconds of a step.
        mtbf_s: mean seconds between failures.
        overhead: share of all time that brings no step forward: the three below together.
        saving: share that goes into saves.
        lost_work: share that goes into steps that are done again.
        recovering: share that goes into recovery.
    """

    tiers: tuple[TierAdvice, ...]
    step_s: float
    mtbf_s: float
    overhead: float
    saving: float
    lost_work: float
    recovering: float

    def every_steps(self, name: str) -> int | None:
        """Returns how many steps are between saves to a tier, or `None` for never.

        Args:
            name: of the tier.

        Raises:
            OptionError: there is no such tier.
        """
        for tier in self.tiers:
            if tier.name == name:
                return tier.every_steps
        names = ", ".join(repr(tier.name) for tier in self.tiers)
        raise OptionError(f"There is no tier {name!r}; the tiers are {names}.")

    def blocks(self) -> tuple[Block, ...]:
        """Returns what there is to see."""
        rows = [
            (
                tier.name,
                str(tier.every_steps),
                duration_of(tier.every_steps * self.step_s),
                f"{tier.saving:.2%}",
                duration_of(tier.young_s),
                duration_of(tier.daly_s),
            )
            for tier in self.tiers
            if tier.every_steps is not None
        ]
        title = (
            f"save every ... for steps of {duration_of(self.step_s)} "
            f"and a failure every {duration_of(self.mtbf_s)}"
        )
        never = [
            f"{tier.name}: never, as other saves make up for these at less cost."
            for tier in self.tiers
            if tier.every_steps is None
        ]
        shares = (
            f"{self.overhead:.2%} of all time is lost: {self.saving:.2%} in saves, "
            f"{self.lost_work:.2%} in steps done again, {self.recovering:.2%} in recovery."
        )
        return (Table(_COLUMNS, tuple(rows), title), Lines((*never, shares)))


def advise(tiers: Sequence[TierCost], *, step_s: float, mtbf_s: float) -> Advice:
    """Says how often to save to which tier, so that the least time is lost.

    Each interval is a whole number of steps, a multiple of the one of the tier before it, and never
    shorter than a save takes to be committed. A tier whose saves do not pay is left out.

    A model is as good as its numbers: failures that come in bursts cost less than it says, saves
    that slow each other down more. With several tiers, a simulation of a run in which each failure
    also ends the saves that are not committed yet loses up to a thirtieth more than this says. Near
    the best interval the loss hardly changes: one half as long again costs a twelfth more.

    Args:
        tiers: what a save to each costs. One of them must survive every failure.
        step_s: seconds of a step without a save, `StallReport.quiet_s`.
        mtbf_s: mean seconds between failures of the whole job: that of a node, over the nodes.

    Raises:
        OptionError: a number is out of range, two tiers have one name, or none survives all.
    """
    for name, value in (("step_s", step_s), ("mtbf_s", mtbf_s)):
        _check(name, value, "more than 0 s", lambda seconds: seconds > 0)
    ordered = sorted(tiers, key=lambda tier: (tier.survives, tier.cost_s))
    names = [tier.name for tier in ordered]
    if not 0 < len(names) <= _MOST_TIERS or len(set(names)) < len(names):
        raise OptionError(f"tiers: found {names}, wanted 1 to {_MOST_TIERS} of different names.")
    if ordered[-1].survives < 1:
        raise OptionError(
            f"tiers: no one survives every failure, the best is {names[-1]!r} with "
            f"survives={ordered[-1].survives}. Add the tier that a run begins from after the worst."
        )
    found = [_Plan.best(used, step_s, mtbf_s) for used in _choices(ordered)]
    return min(found, key=lambda plan: plan.stretch).advice(names, step_s, mtbf_s)


def _choices(ordered: Sequence[TierCost]) -> Iterator[tuple[TierCost, ...]]:
    """Yields tiers to use together: each survives more than the one before, the last all."""
    for n in range(1, len(ordered) + 1):
        for used in itertools.combinations(ordered, n):
            grows = all(a.survives < b.survives for a, b in itertools.pairwise(used))
            if grows and used[-1].survives == 1:
                yield used


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Tiers with their intervals.

    Attributes:
        used: the tiers, each surviving more than the one before.
        every: steps between saves to each, each a multiple of the one before.
        mtbfs_s: mean seconds between the failures that are for each to recover from.
        stretch: seconds that it takes, all in all, for a second of training.
    """

    used: tuple[TierCost, ...]
    every: tuple[int, ...]
    mtbfs_s: tuple[float, ...]
    stretch: float

    @classmethod
    def best(cls, used: tuple[TierCost, ...], step_s: float, mtbf_s: float) -> _Plan:
        """Returns the best intervals. Tier after tier: a better one below is better for all."""
        every, mtbfs_s, stretch, survived = list[int](), list[float](), 1.0, 0.0
        for tier in used:
            tier_mtbf_s = mtbf_s / (tier.survives - survived)
            unit = every[-1] if every else 1
            unit_s = unit * step_s
            # Floats: 0.3 s are three steps of 0.1 s, though 3 * 0.1 > 0.3.
            least = max(1, math.ceil(tier.until_committed_s / unit_s - 1e-9))
            wanted = daly_interval_s(tier.cost_s, tier_mtbf_s) / stretch / unit_s
            around = {max(least, math.floor(wanted)), max(least, math.ceil(wanted))}
            stretched = {
                n: tier.stretch(n * unit_s, mtbf_s=tier_mtbf_s, below=stretch) for n in around
            }
            n = min(stretched, key=lambda n: (stretched[n], n))
            every.append(n * unit)
            mtbfs_s.append(tier_mtbf_s)
            stretch, survived = stretched[n], tier.survives
        return cls(used, tuple(every), tuple(mtbfs_s), stretch)

    def advice(self, names: Sequence[str], step_s: float, mtbf_s: float) -> Advice:
        """Returns what is to be told of it, also of tiers that are not in use.

        Args:
            names: of all tiers.
            step_s: seconds of a step.
            mtbf_s: mean seconds between failures.
        """
        tiers = {}
        for tier, n, tier_mtbf_s in zip(self.used, self.every, self.mtbfs_s, strict=True):
            tiers[tier.name] = TierAdvice(
                name=tier.name,
                every_steps=n,
                mtbf_s=tier_mtbf_s,
                saving=tier.cost_s / (n * step_s) / self.stretch,
                young_s=young_interval_s(tier.cost_s, tier_mtbf_s),
                daly_s=daly_interval_s(tier.cost_s, tier_mtbf_s),
            )
        saving = sum(tier.saving for tier in tiers.values())
        exponents = [t.recovery_s / m for t, m in zip(self.used, self.mtbfs_s, strict=True)]
        recovering = -math.expm1(-sum(exponents))
        overhead = 1 - 1 / self.stretch
        return Advice(
            tiers=tuple(tiers.get(name) or TierAdvice(name=name) for name in names),
            step_s=step_s,
            mtbf_s=mtbf_s,
            overhead=overhead,
            saving=saving,
            lost_work=overhead - saving - recovering,
            recovering=recovering,
        )


def _check(name: str, value: Any, wanted: str, is_right: Callable[[float], bool]) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not is_right(value):
        raise OptionError(f"{name}: found {value!r}, wanted a number, {wanted}.")
