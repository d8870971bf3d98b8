"""The fate of an item: where it may go from where, and which of two threads moved it."""

import threading

import pytest

from lazy_orbax.errors import SaveError
from lazy_orbax.recovery.attempt import Attempt, Fate, Part
from lazy_orbax.timeline import Recorder

WAIT_S = 30
WRITTEN = (Fate.WRITING, Fate.WRITTEN)
WAYS = [
    (*WRITTEN, Fate.PUBLISHED),
    (*WRITTEN, Fate.MERGED, Fate.PUBLISHED),
    (*WRITTEN, Fate.FAILED, Fate.CLEAN),
    (*WRITTEN, Fate.MERGED, Fate.FAILED, Fate.CLEAN),
    (Fate.FAILED, Fate.CLEAN),
    (Fate.FAILED, Fate.FORGONE, Fate.FAILED, Fate.CLEAN),
]


def new_part():
    return Part(Recorder("/run/1/state", None), None)


@pytest.mark.parametrize("way", WAYS)
def test_a_fate_goes_its_way_and_nowhere_else(way):
    part = new_part()
    for before, fate, after in zip((Fate.PROMISED, *way), way, (*way[1:], None), strict=False):
        assert part.fate is before
        allowed = {
            other[i + 1] for other in WAYS for i in range(len(other) - 1) if other[i] is fate
        }
        assert part.move(fate)
        for other in set(Fate) - allowed:
            assert not part.move(other), (fate, other)
            assert part.fate is fate
        assert after is None or after in allowed


def test_what_is_written_cannot_fail_before_its_thread_has_ended():
    part = new_part()
    assert part.move(Fate.WRITING)
    assert not part.move(Fate.FAILED)
    assert part.move(Fate.WRITTEN)
    assert part.move(Fate.FAILED)


def test_of_two_threads_that_move_a_fate_one_does():
    for _ in range(200):
        part, barrier, moved = new_part(), threading.Barrier(2), []

        def move(fate, part=part, barrier=barrier, moved=moved):
            barrier.wait(WAIT_S)
            if part.move(fate):
                moved.append(fate)

        fates = (Fate.WRITING, Fate.FAILED)
        threads = [threading.Thread(target=move, args=(fate,)) for fate in fates]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
        assert moved == [part.fate]


def test_nothing_joins_an_attempt_that_was_refused():
    attempt = Attempt("/run/1.orbax-checkpoint-tmp", "1", removes_all=True)
    first, second = new_part(), new_part()
    attempt.join(first)
    attempt.refuse(SaveError("the first"))
    attempt.refuse(SaveError("the second"))
    with pytest.raises(SaveError, match="the first"):
        attempt.join(second)
    assert attempt.parts == [first]
