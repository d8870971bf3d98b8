"""What processes tell each other about a save: threads stand for processes here."""

from __future__ import annotations

import concurrent.futures
import json
from types import SimpleNamespace

import jax
import pytest
from orbax.checkpoint._src.futures.signaling_client import ThreadSafeKeyValueSignalingClient

from lazy_orbax._orbax import multihost
from lazy_orbax.errors import SaveError
from lazy_orbax.pods import agreement
from lazy_orbax.pods.agreement import Agreement, agreement_on
from lazy_orbax.storage.save_error import save_error


@pytest.fixture
def store(monkeypatch):
    monkeypatch.setattr(agreement, "_LOOK_S", 1)
    monkeypatch.setattr(agreement, "_GRACE_S", 1)
    return ThreadSafeKeyValueSignalingClient()


def settled(store, failures, *, n=3, finish=lambda: None, timeout_s=20, silent=()):
    """What `settle` returns on each of `n` processes; those in `silent` never come to it."""
    members = [
        Agreement("lazy_orbax//7/state", i, tuple(range(n)), 0, True, store) for i in range(n)
    ]
    with concurrent.futures.ThreadPoolExecutor(n) as pool:
        outcomes = {
            i: pool.submit(members[i].settle, failures.get(i), finish, timeout_s)
            for i in range(n)
            if i not in silent
        }
        return {i: outcome.result(30) for i, outcome in outcomes.items()}


def failure_of(process):
    cause = OSError(28, "No space left on device", "/data/7/state/d/abc")
    error = SaveError(
        "disk full", step=7, directory="/data/7/state", leaf="w", file="/d/abc", process=process
    )
    error.__cause__ = cause
    error.errno = cause.errno
    return error


def test_all_have_written(store):
    finished = []
    assert settled(store, {}, finish=lambda: finished.append(1)) == {0: None, 1: None, 2: None}
    assert finished == [1]
    # Only the verdict stays.
    assert [key for key, _ in store.key_value_dir_get("lazy_orbax/")] == [
        "lazy_orbax//7/state/verdict"
    ]


@pytest.mark.parametrize("culprit", [0, 1, 2])
def test_the_number_of_a_failure_is_known_to_all(store, culprit):
    outcomes = settled(store, {culprit: failure_of(culprit)})
    told = {process for process, outcome in outcomes.items() if outcome is not None}
    assert told >= {0, culprit}
    assert {outcomes[process].errno for process in told} == {28}


@pytest.mark.parametrize("culprit", [0, 1, 2])
def test_a_failure_is_known_to_all(store, culprit):
    failure = failure_of(culprit)
    finished = []
    outcomes = settled(store, {culprit: failure}, finish=lambda: finished.append(1))
    assert outcomes[culprit] is failure
    for error in outcomes.values():
        assert (error.process, error.step, error.leaf) == (culprit, 7, "w")
        assert (error.directory, error.file) == ("/data/7/state", "/d/abc")
        assert f"process {culprit}" in str(error)
        assert "disk full" in str(error)
    assert "OSError" in str(outcomes[(culprit + 1) % 3])
    assert not finished


def test_a_failed_merge_is_known_to_all(store):
    outcomes = settled(store, {}, finish=lambda: failure_of(0))
    assert [error.process for error in outcomes.values()] == [0, 0, 0]


def test_a_failure_does_not_wait_for_a_process_that_hangs(store):
    outcomes = settled(store, {2: failure_of(2)}, silent=(1,), timeout_s=60)
    assert [error.process for error in outcomes.values()] == [2, 2]


def test_a_process_that_hangs_is_named(store):
    outcomes = settled(store, {}, silent=(2,), timeout_s=1)
    for error in outcomes.values():
        assert error.process == 2
        assert "process 2 had not written within 1 s" in str(error)


def test_a_leader_that_hangs_is_named(store):
    outcomes = settled(store, {}, silent=(0,), timeout_s=0)
    for error in outcomes.values():
        assert error.process == 0
        assert "process 0, which commits" in str(error)


def test_a_lost_runtime_is_an_error(store, monkeypatch):
    def lost(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("UNAVAILABLE: the coordinator is gone")

    monkeypatch.setattr(store, "key_value_set", lost)
    monkeypatch.setattr(store, "blocking_key_value_get", lost)
    for error in settled(store, {}, n=2, silent=(0,)).values():
        assert "UNAVAILABLE" in str(error)
        assert isinstance(error.__cause__, jax.errors.JaxRuntimeError)
    assert settled(store, {1: failure_of(1)}, n=2, silent=(0,))[1].what == "disk full"


def test_a_long_message_is_cut(store):
    outcomes = settled(store, {1: SaveError("x" * 10**6, process=1)})
    assert len(str(outcomes[0])) < 10**4
    (entry,) = [v for k, v in store.key_value_dir_get("lazy_orbax/") if k.endswith("verdict")]
    assert json.loads(entry)["process"] == 1


@pytest.mark.parametrize(
    ("processes", "options", "me", "members", "leader"),
    [
        ({0, 1}, None, 1, (0, 1), 0),
        ({1, 2}, None, 1, (0, 1, 2), 0),  # The primary host commits, whatever it writes.
        ({1, 2}, {"primary_host": 2}, 1, (1, 2), 2),
        ({0, 1, 2, 3}, {"active_processes": {0, 1}}, 1, (0, 1), 0),
        ({1, 2}, {"primary_host": None}, 2, (1, 2), 1),
        ({0}, None, 0, None, None),
        ({0, 1}, None, 3, None, None),  # It writes nothing: it waits at Orbax's barrier.
        (set(), None, 0, None, None),
    ],
)
def test_who_takes_part(monkeypatch, processes, options, me, members, leader):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    monkeypatch.setattr(multihost, "process_index", lambda: me)
    monkeypatch.setattr(multihost, "key_value_store", lambda: None)
    given = None if options is None else SimpleNamespace(**({"primary_host": 0} | options))
    found = agreement_on(frozenset(processes), given, operation="7", item="state")
    if members is None:
        assert found is None
    else:
        assert (found.processes, found.leader) == (members, leader)
        assert found.shares_directory == (given is None or given.primary_host is not None)


def test_one_process_agrees_with_itself():
    assert agreement_on(frozenset({0}), None, operation="7", item="state") is None


def test_errors_name_the_process_where_there_are_several(monkeypatch):
    assert save_error("/data/7/state", OSError("full")).process is None
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert save_error("/data/7/state", OSError("full")).process == 0
