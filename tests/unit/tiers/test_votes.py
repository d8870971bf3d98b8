"""Processes tell each other which steps they have; one that says nothing is not waited for."""

import jax
import pytest

from lazy_orbax.tiers.votes import Votes


class Store:
    """The key-value store of a job, whose processes all have told what they will."""

    def __init__(self):
        self.values = {}

    def key_value_set(self, key, value, *, allow_overwrite):
        assert allow_overwrite
        self.values[key] = value

    def key_value_delete(self, key):
        self.values.pop(key, None)

    def blocking_key_value_get(self, key, timeout_s):
        if key not in self.values:
            raise TimeoutError(key)
        return self.values[key]


@pytest.fixture
def processes(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    store, votes = Store(), []
    for process in range(3):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        votes.append(Votes("life/default", store))
    return votes


def test_a_step_is_common_when_all_have_told_that_they_have_it(processes):
    first, second, third = processes
    first.tell(7, is_sealed=True)
    second.tell(7, is_sealed=True)
    assert first.is_common(7, timeout_s=1) is None
    third.tell(7, is_sealed=True)
    assert [votes.is_common(7, timeout_s=1) for votes in processes] == [True] * 3
    assert first.is_common(8, timeout_s=1) is None


def test_one_that_lost_it_is_enough(processes):
    first, second, third = processes
    second.tell(7, is_sealed=False)
    third.tell(7, is_sealed=True)
    assert first.is_common(7, timeout_s=1) is False


def test_what_nobody_asks_about_any_more_takes_no_room(processes):
    store = processes[0]._store
    for step in range(20):
        has_it = [votes for votes in processes if step % 3 > 0 or votes is not processes[1]]
        for votes in processes:
            votes.tell(step, is_sealed=votes in has_it)
        # Who has not, does not ask.
        assert {votes.is_common(step, timeout_s=1) for votes in has_it} == {step % 3 > 0}
        assert len(store.values) <= 6
    # Who is late finds what the others told of the last step that all have.
    assert {key.split("/")[-2] for key in store.values} == {"19"}


def test_what_was_told_of_a_step_that_was_passed_over_stays_until_it_is_read(processes):
    first, second, third = processes
    first.tell(6, is_sealed=False)  # While 5 was still being copied.
    for votes in processes:
        votes.tell(5, is_sealed=True)
    for votes in (second, third):
        votes.tell(6, is_sealed=True)
    assert first.is_common(5, timeout_s=1) is True
    assert second.is_common(6, timeout_s=1) is False  # And not: it has not told.


def test_a_runtime_that_ends_is_no_answer(processes):
    def ended(key, timeout_s):
        raise jax.errors.JaxRuntimeError("UNAVAILABLE")

    processes[0]._store.blocking_key_value_get = ended
    assert processes[0].is_common(7, timeout_s=1) is None


def test_one_process_has_nobody_to_ask():
    votes = Votes("life/default")
    votes.tell(7, is_sealed=True)
    assert votes.is_common(7, timeout_s=1) is True
