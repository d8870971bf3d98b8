"""When to save, by a clock that moves when it is told to."""

from __future__ import annotations

import concurrent.futures
import itertools
import threading
from types import SimpleNamespace

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from orbax.checkpoint import v1
from orbax.checkpoint._src.futures.signaling_client import ThreadSafeKeyValueSignalingClient

import lazy_orbax
from lazy_orbax._orbax import multihost
from lazy_orbax.errors import OptionError, SaveError
from lazy_orbax.tiers import save_interval
from lazy_orbax.tiers.advise import TierCost
from lazy_orbax.tiers.save_interval import SaveIntervalPolicy

FIRST = save_interval._FIRST_STEPS


class Loop:
    """A loop whose steps and saves take as long as a test says.

    Attributes:
        saved: the steps that the policy let it save.
        cost_s: seconds by which a save makes its first step longer.
        n_commit: steps in which a save is under way, the first too.
        stride: every so many steps it calls the policy.
    """

    def __init__(self, *, step_s=1.0, cost_s=2.0, n_commit=1, stride=1, **how):
        self.step_s, self.cost_s, self.n_commit, self.stride = step_s, cost_s, n_commit, stride
        self.now_s, self.step, self.saved, self.left = 100.0, 0, [], 0
        self.policy = SaveIntervalPolicy(clock=lambda: self.now_s, **how)

    def asks(self, *, preempted=False):
        context = ocp.checkpoint_managers.DecisionContext(
            is_saving_in_progress=self.left > 0,
            reached_preemption=preempted,
            multiprocessing_options=ocp.options.MultiprocessingOptions(),
        )
        previous = [SimpleNamespace(step=step) for step in self.saved]
        return self.policy.should_save(
            SimpleNamespace(step=self.step), previous_steps=previous, context=context
        )

    def save(self):
        self.saved.append(self.step)
        self.now_s += self.cost_s
        self.left = self.n_commit

    def run(self, n_steps):
        for _ in range(n_steps):
            self.step += 1
            if self.step % self.stride == 0 and self.asks():
                self.save()
            self.now_s += self.step_s
            self.left = max(0, self.left - 1)
        return self

    @property
    def intervals(self):
        return [b - a for a, b in itertools.pairwise(self.saved)]


def test_it_is_a_policy_of_both_apis():
    policy = SaveIntervalPolicy(most_overhead=0.01)
    assert isinstance(policy, ocp.checkpoint_managers.SaveDecisionPolicy)
    assert isinstance(policy, v1.training.save_decision_policies.SaveDecisionPolicy)


@pytest.mark.parametrize("share", [0.01, 0.05, 0.5])
def test_saves_take_the_share_of_the_loop_that_they_may(share):
    loop = Loop(most_overhead=share).run(700)
    assert loop.saved[0] == FIRST + 1  # The first call begins the first step.
    # Two seconds of each interval, of which each step takes one.
    every = -(-2 * (1 - share) // share)
    assert set(loop.intervals) == {every}
    assert 2 / (2 + every) <= share < 2 / (2 + every - 1)
    assert loop.policy.report() == lazy_orbax.reports.IntervalReport(
        step_s=1, cost_s=2, commit_s=3, every_steps=every, saving=2 / (2 + every)
    )


def test_the_cost_is_seen_wherever_it_hides():
    """Ten steps with a save are each a tenth of a second longer: that is one second."""
    loop = Loop(most_overhead=0.01, cost_s=0.0, n_commit=10)
    for _ in range(500):
        loop.step_s = 1.1 if loop.left else 1.0
        loop.run(1)
    # The step that a save begins in was not longer here.
    assert loop.policy.report().cost_s == pytest.approx(0.9)
    assert loop.intervals[-1] == 90


def test_saves_that_become_dearer_become_rarer_and_the_other_way_round():
    loop = Loop(most_overhead=0.02, cost_s=1.0).run(1000)
    assert loop.intervals[-1] == 49
    loop.cost_s = 4.0
    loop.run(3000)
    assert loop.intervals[-1] == 196
    loop.cost_s = 0.5
    loop.run(3000)
    assert loop.intervals[-1] == 25


def test_the_first_save_is_not_judged_by_once_there_is_another():
    loop = Loop(most_overhead=0.02, cost_s=10.0).run(FIRST + 1)
    loop.cost_s = 1.0
    loop.run(1000)
    assert loop.intervals[0] == 490
    assert set(loop.intervals[1:]) == {49}


def test_a_step_that_takes_long_once_is_not_taken_for_the_rule():
    loop = Loop(most_overhead=0.02, cost_s=1.0).run(500)
    loop.now_s += 3600
    assert set(loop.run(500).intervals) == {49}


@pytest.mark.parametrize("mtbf_s", [500.0, 20_000.0])
def test_for_failures_at_a_rate_it_takes_the_advice(mtbf_s):
    loop = Loop(mtbf_s=mtbf_s, recovery_s=60.0, n_commit=4).run(2000)
    tier = TierCost(name="it", cost_s=2, commit_s=6, recovery_s=60)
    advised = lazy_orbax.advise([tier], step_s=1, mtbf_s=mtbf_s).every_steps("it")
    assert set(loop.intervals) == {advised}
    assert advised == pytest.approx((2 * 2 * mtbf_s) ** 0.5, rel=0.05)


def test_where_both_are_given_the_limit_holds():
    assert set(Loop(mtbf_s=500.0, most_overhead=0.01).run(1000).intervals) == {198}
    assert Loop(mtbf_s=1e6, most_overhead=0.5).run(9000).intervals[-1] > 1900


@pytest.mark.parametrize("n_commit", [1, 7])
def test_saves_that_cost_nothing_come_one_after_the_other_with_a_step_between(n_commit):
    loop = Loop(most_overhead=0.01, cost_s=0.0, n_commit=n_commit).run(200)
    assert set(loop.intervals) == {n_commit + 1}


def test_a_loop_that_calls_it_every_five_steps():
    loop = Loop(most_overhead=0.02, cost_s=1.0, stride=5).run(2000)
    assert loop.policy.report().step_s == 1.0
    assert set(loop.intervals) == {50}  # 49 would do.


def test_asked_twice_of_a_step_it_says_the_same():
    loop = Loop(most_overhead=0.02).run(FIRST)
    loop.step += 1
    assert loop.asks()
    loop.now_s += 1
    assert loop.asks()
    loop.save()
    loop.now_s += 1
    loop.left -= 1
    # The second between is of the save: three in all.
    assert loop.run(500).intervals[0] == 147


def test_it_saves_when_the_job_is_to_be_preempted():
    loop = Loop(most_overhead=0.02).run(2)
    loop.step += 1
    assert loop.asks(preempted=True)


def test_a_save_that_was_forced_counts():
    loop = Loop(most_overhead=0.02, cost_s=1.0, n_commit=3).run(FIRST + 1 + 20)
    loop.step += 1
    loop.save()  # As by `manager.save(..., force=True)`, which asks nobody.
    loop.now_s += 1
    loop.left -= 1
    loop.run(400)
    assert loop.intervals[:3] == [21, 49, 49]
    assert loop.policy.report().step_s == 1.0


def test_a_loop_that_goes_back_saves_again():
    loop = Loop(most_overhead=0.02, cost_s=1.0).run(300)
    loop.step, loop.saved = 40, [11]
    loop.run(200)
    assert loop.saved[1] == 90
    assert set(loop.intervals[1:]) == {49}


def test_going_back_is_no_step():
    loop = Loop(most_overhead=0.02).run(2)
    loop.step = 0
    assert loop.run(1).policy.report().step_s == 1


def test_before_a_save_it_has_nothing_to_report():
    policy = Loop(most_overhead=0.02).run(5).policy
    assert policy.report().every_steps is None
    assert str(policy.report()) == "No save has been measured yet."
    said = str(Loop(most_overhead=0.02).run(50).policy.report())
    assert said == (
        "Save every 98 steps: a step takes 1 s, a save costs 2 s, which is 2.00% of the loop."
    )


@pytest.mark.parametrize(
    ("how", "problem"),
    [
        ({}, "Give most_overhead, mtbf_s, or both"),
        ({"most_overhead": 1}, "most_overhead: found 1, wanted a share between 0 and 1"),
        ({"most_overhead": 0.0}, "most_overhead: found 0.0"),
        ({"mtbf_s": 0}, "mtbf_s: found 0, wanted a number, more than 0 s"),
        ({"mtbf_s": 10, "recovery_s": -1}, "recovery_s of tier 'saves': found -1"),
    ],
)
def test_what_it_cannot_go_by_is_named(how, problem):
    with pytest.raises(OptionError) as caught:
        SaveIntervalPolicy(**how)
    assert str(caught.value).startswith(problem)


# A pod: threads stand for processes, each with a clock of its own.


@pytest.fixture
def pod(monkeypatch):
    """Runs a function of its number in each of `n` processes; returns what they returned."""
    store, here = ThreadSafeKeyValueSignalingClient(), threading.local()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost, "process_index", lambda: here.process)
    monkeypatch.setattr(multihost, "key_value_store", lambda: store)
    monkeypatch.setattr(save_interval, "_NUMBERS", itertools.repeat(0))

    def run(n, work):
        def process(i):
            here.process = i
            return work(i)

        with concurrent.futures.ThreadPoolExecutor(n) as pool:
            return [done.result(60) for done in [pool.submit(process, i) for i in range(n)]]

    run.store = store
    return run


def test_all_processes_save_what_the_first_one_decides(pod):
    """The others are slower, their saves dearer and under way for longer."""

    def work(i):
        how = {"cost_s": 1.0 + 5 * i, "step_s": 1.0 + 0.3 * i, "n_commit": 1 + 9 * i}
        return Loop(most_overhead=0.02, **how).run(600).saved

    first, second, third = pod(3, work)
    assert first == second == third
    assert first == list(range(FIRST + 1, 601, 49))
    # Between saves nothing is exchanged.
    n_keys = len(pod.store.key_value_dir_get("lazy_orbax/save_interval/0/"))
    assert n_keys < FIRST + 4 * len(first)


def test_a_first_process_that_does_not_come_is_named(pod, monkeypatch):
    monkeypatch.setattr(save_interval, "_PATIENCE_S", 1)

    def work(i):
        if i == 0:
            return "does not come"
        with pytest.raises(SaveError) as caught:
            Loop(most_overhead=0.02).run(1)
        return str(caught.value)

    _, said = pod(2, work)
    assert "process 0 did not say within 1 s whether to save" in said


# Orbax's own managers.


def training(policy, clock, save, *, step_s=1.0, cost_s=3.0, n_steps=60):
    """Runs a loop, in which the clock moves by what steps and saves cost."""
    saved = []
    for step in range(1, n_steps + 1):
        if save(step):
            saved.append(step)
            clock[0] += cost_s
        clock[0] += step_s
    return saved


def test_a_manager_saves_as_it_says(tmp_path):
    clock = [0.0]
    policy = SaveIntervalPolicy(most_overhead=0.2, clock=lambda: clock[0])
    options = ocp.CheckpointManagerOptions(save_decision_policy=policy)
    handler = lazy_orbax.standard_handler()
    with ocp.CheckpointManager(tmp_path, item_handlers=handler, options=options) as manager:

        def save(step):
            was_saved = manager.save(step, args=ocp.args.StandardSave({"x": np.arange(4)}))
            manager.wait_until_finished()
            return was_saved

        saved = training(policy, clock, save)
        assert manager.all_steps() == saved == list(range(FIRST + 1, 61, 12))


def test_a_checkpointer_of_v1_saves_as_it_says(tmp_path):
    clock = [0.0]
    policy = SaveIntervalPolicy(most_overhead=0.2, clock=lambda: clock[0])
    context = v1.Context()
    context.checkpointables.registry = lazy_orbax.v1_registry()
    with v1.training.Checkpointer(
        tmp_path, context=context, save_decision_policy=policy
    ) as checkpointer:

        def save(step):
            response = checkpointer.save_async(step, {"x": np.arange(4)})
            return response is not None and response.result()

        saved = training(policy, clock, save)
        steps = [checkpoint.step for checkpoint in checkpointer.checkpoints]
    assert steps == saved == list(range(FIRST + 1, 61, 12))


def test_beside_other_policies_of_orbax(tmp_path):
    clock = [0.0]
    policy = SaveIntervalPolicy(most_overhead=0.2, clock=lambda: clock[0])
    policies = ocp.checkpoint_managers
    both = policies.AnySavePolicy([policy, policies.SpecificStepsPolicy({2, 20})])
    options = ocp.CheckpointManagerOptions(save_decision_policy=both)
    with ocp.CheckpointManager(tmp_path, options=options) as manager:

        def save(step):
            was_saved = manager.save(step, args=ocp.args.StandardSave({"x": np.arange(4)}))
            manager.wait_until_finished()
            return was_saved

        assert training(policy, clock, save) == [2, 11, 20, 32, 44, 56]
