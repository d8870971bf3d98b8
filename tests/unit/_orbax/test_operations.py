"""Each thread finds the number of its own save, whoever else begins one."""

import asyncio
import threading

from orbax.checkpoint._src import asyncio_utils
from orbax.checkpoint._src.futures.synchronization import OperationIdGenerator as Ids

from lazy_orbax._orbax.operations import tell_threads_apart

tell_threads_apart()


async def begin():
    return Ids.next_operation_id(), Ids.get_current_operation_id()


def begin_in_another_thread():
    thread = threading.Thread(target=Ids.next_operation_id)
    thread.start()
    thread.join()


def test_a_save_of_another_thread_changes_nothing():
    mine = Ids.next_operation_id()
    begin_in_another_thread()
    assert Ids.get_current_operation_id() == str(mine)


def test_what_a_thread_waits_for_is_begun_by_that_thread():
    Ids.next_operation_id()
    mine, there = asyncio_utils.run_sync(begin())
    begin_in_another_thread()
    assert Ids.get_current_operation_id() == there == str(mine)


def test_so_it_is_where_an_event_loop_runs():
    """As in a notebook: Orbax runs its coroutines in another thread then."""

    async def cell():
        earlier = Ids.next_operation_id()
        mine, there = asyncio_utils.run_sync(begin())
        begin_in_another_thread()
        assert earlier < mine
        assert Ids.get_current_operation_id() == there == str(mine)

    asyncio.run(cell())
