"""Which saves of v1's functions run, and who hears of their end."""

import threading

import pytest
from equipment.gates import within

from lazy_orbax._orbax import functions
from lazy_orbax._orbax.functions import Functions


def test_an_operation_goes_on_from_its_first_item_to_its_end():
    found, told = Functions(), []
    assert not found.is_going_on("1")
    found.begin("1", told.append)
    found.begin("1", told.append)  # Another item.
    assert found.is_going_on("1")
    assert not found.has_running
    assert found.run("1")
    assert found.is_going_on("1")
    assert found.has_running
    found.end("1", None)
    assert not found.is_going_on("1")
    assert told == [None, None]
    within(found.await_all)


def test_an_operation_without_an_item_of_ours_is_not_watched():
    async def stock():
        pass

    running = stock()
    assert functions.watched("no number of Orbax", running) is running
    running.close()


def test_an_operation_that_orbax_gave_up_ends_when_its_thread_begins_another():
    found, told = Functions(), []
    found.begin("1", told.append)
    thread = threading.Thread(target=found.begin, args=("2", told.append))
    thread.start()
    within(thread.join)
    assert found.is_going_on("1")
    assert found.is_going_on("2")
    found.begin("3", told.append)
    assert not found.is_going_on("1")
    assert found.is_going_on("3")
    assert not found.run("1")
    assert told == []


def test_who_hears_of_the_end_may_raise_and_it_is_the_end_nevertheless():
    found = Functions()

    def refuse(error):
        raise OSError("the disk is gone")

    found.begin("1", refuse)
    found.run("1")
    with pytest.raises(OSError, match="the disk is gone"):
        found.end("1", None)
    assert not found.is_going_on("1")


def test_the_end_is_awaited():
    found = Functions()
    found.begin("1", lambda error: None)
    found.run("1")
    waiting = threading.Thread(target=found.await_all)
    waiting.start()
    found.end("1", OSError())
    within(waiting.join)
