"""When to save, decided while the loop runs: from what steps take and what saves have cost in it.

The limit of what saves may cost is the idea of J. Mohan et al., "CheckFreq: Frequent, fine-grained
DNN checkpointing" (FAST 2021), which measures first and adapts then. That the time until a save is
persistent bounds the interval is in the formula of F. Strati et al., "PCcheck: Persistent
concurrent checkpointing for ML" (ASPLOS 2025). The interval for failures that come at a given rate
is that of `advise`.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from lazy_orbax.errors import OptionError
from lazy_orbax.pods.consensus import told_by_leader
from lazy_orbax.tiers.advise import TierCost, advise
from lazy_orbax.view.text import duration_of

# Steps that are timed before the first save, and the most by which a later one is judged.
_FIRST_STEPS, _MOST_STEPS = 10, 200
# The last saves count, by their median: what one costs may change as the storage fills.
_MOST_SAVES = 5
# How long a process of a pod waits for the one that decides: as long as Orbax by default.
_PATIENCE_S = 1200.0
# Policies of this process: each asks under keys of its own, which are the same in the whole pod.
_NUMBERS = itertools.count()


@dataclasses.dataclass(frozen=True, kw_only=True)
class IntervalReport:
    """What this process measured, and what follows. `None` is what is not known yet.

    Attributes:
        step_s: median seconds of a step while no save was under way.
        cost_s: median seconds by which a save made the loop longer, of the last saves.
        commit_s: median seconds of loop from a save until no save was under way.
        every_steps: steps from a save to the next. A save that takes longer than these postpones
            the next one.
        saving: the share of loop time that saves take then.
    """

    step_s: float | None
    cost_s: float | None
    commit_s: float | None
    every_steps: int | None
    saving: float | None

    def __str__(self) -> str:
        if self.step_s is None or self.cost_s is None or self.every_steps is None:
            return "No save has been measured yet."
        return (
            f"Save every {self.every_steps} steps: a step takes {duration_of(self.step_s)}, a save "
            f"costs {duration_of(self.cost_s)}, which is {self.saving:.2%} of the loop."
        )


class SaveIntervalPolicy:
    """Saves as often as saves are allowed to cost, or as failures make it pay.

    A `SaveDecisionPolicy` for `ocp.CheckpointManagerOptions`, and for a `training.Checkpointer` of
    v1. The loop calls `save()` at every step, or at every so many; this says which are saved.

    It times the loop from call to call. What a save costs is how much longer the steps took in
    which it was under way, wherever it made them wait: in `save()`, or after it. So it measures
    saves of every handler. It saves for the first time after ten steps, again when the interval is
    over and no save is under way, and when the job is to be preempted.

    In a pod one process decides, the primary one: it measured. It tells the others at which step
    they will ask it again, through the key-value store of JAX's distributed runtime; at the steps
    between, all say no by themselves. So the processes never differ, and exchange a number or two
    for each save. Make the policies on all processes in the same order.
    """

    def __init__(
        self,
        *,
        most_overhead: float | None = None,
        mtbf_s: float | None = None,
        recovery_s: float = 0.0,
        clock: Callable[[], float] = time.perf_counter,
    ):
        """Knows nothing of the loop yet. Give `most_overhead`, `mtbf_s`, or both.

        Args:
            most_overhead: the share of loop time that saves may take, such as 0.01.
            mtbf_s: mean seconds between failures that these saves are for: the interval is the one
                that `advise` gives, if `most_overhead` allows it.
            recovery_s: seconds from a failure until training goes on.
            clock: returns the time in seconds.

        Raises:
            OptionError: a number is out of range, or neither is given.
        """
        if most_overhead is None and mtbf_s is None:
            raise OptionError("Give most_overhead, mtbf_s, or both: found neither.")
        is_share = isinstance(most_overhead, float) and 0 < most_overhead < 1
        if most_overhead is not None and not is_share:
            found = f"most_overhead: found {most_overhead!r}"
            raise OptionError(f"{found}, wanted a share between 0 and 1, such as 0.01.")
        if mtbf_s is not None:
            _advised(mtbf_s, recovery_s, step_s=1.0, cost_s=1.0, commit_s=1.0)
        self._most_overhead, self._mtbf_s, self._recovery_s = most_overhead, mtbf_s, recovery_s
        self._loop = _Loop(clock)
        self._key, self._n_asked = f"lazy_orbax/save_interval/{next(_NUMBERS)}", 0
        # At which step to ask again, which step was saved last, and what was said last of which.
        self._ask_at, self._saved_at, self._said = 0, -1, (-1, False)

    def should_save(self, step: Any, previous_steps: Sequence[Any], *, context: Any) -> bool:
        """Returns whether to save a step. Orbax calls it.

        Args:
            step: Orbax's record of the step.
            previous_steps: those of the steps that are saved.
            context: Orbax's `DecisionContext`.

        Raises:
            SaveError: the process that decides did not come to this step.
        """
        now, (last, answer) = int(step.step), self._said
        if now == last:  # Asked twice, as by `manager.should_save` before `manager.save`.
            return answer
        self._loop.note(now, is_saving=context.is_saving_in_progress)
        if now < last:  # The loop went back to a step before.
            self._ask_at, self._saved_at = now, min(self._saved_at, now)
        answer = bool(context.reached_preemption)  # All processes know of it at the same step.
        if not answer and now >= self._ask_at:
            newest = previous_steps[-1].step if len(previous_steps) else -1
            self._saved_at = max(self._saved_at, newest)
            answer, self._ask_at = self._ask(now, context)
        if answer:
            self._saved_at = now
            self._loop.begin_save()
        self._said = now, answer
        return answer

    def _ask(self, step: int, context: Any) -> tuple[bool, int]:
        """Returns whether all save this step, and at which step they ask again."""
        self._n_asked += 1
        answer, ask_at = told_by_leader(
            f"{self._key}/{self._n_asked}",
            lambda: self._decide(step),
            context.multiprocessing_options,
            timeout_s=_PATIENCE_S,
        )
        return bool(answer), ask_at

    def _decide(self, step: int) -> list[int]:
        every = self._every()
        if not self._loop.is_quiet:  # A save is under way, or was: there is a step between two.
            return [False, step + 1]
        if every is None:
            return [self._loop.n_quiet >= _FIRST_STEPS, step + 1]
        due = self._saved_at + every
        if step < due:
            return [False, due]
        # What this save costs may change the interval: that is known when it has ended.
        return [True, step + min(every, self._loop.n_commit + 1)]

    def _every(self) -> int | None:
        """Returns how many steps there should be between saves, once one has been measured."""
        loop = self._loop
        step_s, cost_s, commit_s = loop.step_s, loop.cost_s, loop.commit_s
        if step_s is None or cost_s is None or commit_s is None:
            return None
        every = 1
        if self._most_overhead is not None:
            share = self._most_overhead
            every = math.ceil(cost_s * (1 - share) / share / step_s - 1e-9)
        if self._mtbf_s is not None:
            times = {"step_s": step_s, "cost_s": cost_s, "commit_s": commit_s}
            every = max(every, _advised(self._mtbf_s, self._recovery_s, **times))
        return max(1, every)

    def report(self) -> IntervalReport:
        """Returns what this process measured so far. In a pod the primary one's figures count."""
        loop, every, saving = self._loop, self._every(), None
        if every is not None and loop.cost_s is not None and loop.step_s is not None:
            saving = loop.cost_s / (loop.cost_s + every * loop.step_s)
        return IntervalReport(
            step_s=loop.step_s,
            cost_s=loop.cost_s,
            commit_s=loop.commit_s,
            every_steps=every,
            saving=saving,
        )


def _advised(
    mtbf_s: float, recovery_s: float, *, step_s: float, cost_s: float, commit_s: float
) -> int:
    tier = TierCost(name="saves", cost_s=cost_s, commit_s=commit_s, recovery_s=recovery_s)
    every = advise([tier], step_s=step_s, mtbf_s=mtbf_s).every_steps("saves")
    assert every is not None  # It is the only tier.
    return every


class _Loop:
    """Times a loop from call to call, apart while a save is under way.

    Attributes:
        is_quiet: whether the last steps were without a save.
    """

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self._at: tuple[int, float] | None = None
        self._quiet = collections.deque[float](maxlen=_MOST_STEPS)
        self._costs = collections.deque[float](maxlen=_MOST_SAVES)
        self._commits = collections.deque[float](maxlen=_MOST_SAVES)
        self._n_saves = 0
        # Since the first step in which a save is under way: steps, and their seconds.
        self._open: tuple[int, float] | None = None
        self.is_quiet = False

    def note(self, step: int, *, is_saving: bool) -> None:
        """Ends the steps since the last call.

        Args:
            step: the number of this step.
            is_saving: whether a save is under way.
        """
        before, self._at = self._at, (step, self._clock())
        if before is None or step <= before[0]:
            self._open, self.is_quiet = ((0, 0.0) if is_saving else None), False
            return
        n, seconds = step - before[0], self._at[1] - before[1]
        self.is_quiet = not is_saving and self._open is None
        if self.is_quiet:
            self._quiet.append(seconds / n)
            return
        n_before, seconds_before = self._open or (0, 0.0)
        self._open = n_before + n, seconds_before + seconds
        if not is_saving:
            self._end_save(*self._open)
            self._open = None

    def begin_save(self) -> None:
        """Notes that a save begins in the step that begins."""
        self._open = self._open or (0, 0.0)

    def _end_save(self, n: int, seconds: float) -> None:
        if self.step_s is None:
            return
        if self._n_saves == 1:  # The first one plans and compiles: the second is better evidence.
            self._costs.clear()
            self._commits.clear()
        self._n_saves += 1
        self._costs.append(max(0.0, seconds - n * self.step_s))
        self._commits.append(seconds)

    @property
    def n_quiet(self) -> int:
        """Steps that were timed without a save."""
        return len(self._quiet)

    @property
    def step_s(self) -> float | None:
        """Median seconds of a step without a save."""
        return max(statistics.median(self._quiet), 1e-9) if self._quiet else None

    @property
    def cost_s(self) -> float | None:
        """Median seconds by which a save made its steps longer."""
        return statistics.median(self._costs) if self._costs else None

    @property
    def n_commit(self) -> int:
        """Steps in which a save is under way."""
        return math.ceil(self.commit_s / self.step_s) if self.commit_s and self.step_s else 1

    @property
    def commit_s(self) -> float | None:
        """Median seconds of the steps in which a save was under way."""
        return statistics.median(self._commits) if self._commits else None
