import concurrent.futures
import threading

import pytest

from lazy_orbax.errors import LazyOrbaxError
from lazy_orbax.snapshot.host_budget import HostBudget, ReservationAborted

WAIT_S = 30  # Only ever reached by a test that fails.


def never() -> bool:
    return False


class Request:
    """A reservation in a thread of its own, and whether it waits, was admitted or gave up."""

    def __init__(self, budget, n_bytes, *, limit_bytes=100, admissions=None):
        self.aborted = threading.Event()
        self.asked = threading.Event()
        self.over = threading.Event()
        self.lease = self.error = None
        self._budget = budget
        self._admissions = admissions if admissions is not None else []

        def aborted():
            # Asked with the budget's lock held, once the request is in the queue.
            self.asked.set()
            return self.aborted.is_set()

        def reserve():
            try:
                self.lease = budget.reserve(n_bytes, limit_bytes=limit_bytes, aborted=aborted)
                self._admissions.append(self)
            except ReservationAborted as error:
                self.error = error
            self.over.set()

        self.thread = threading.Thread(target=reserve, daemon=True)
        self.thread.start()
        assert self.asked.wait(WAIT_S)

    def assert_waits(self, *, in_flight_bytes):
        """Makes the request look at the budget once more, and asserts that it is not admitted."""
        self.asked.clear()
        self._budget.wake()
        assert self.asked.wait(WAIT_S), "it does not wait any more"
        self._budget.wake()  # Has the lock only when the request has made up its mind.
        assert self._budget.in_flight_bytes == in_flight_bytes

    def admitted(self):
        assert self.over.wait(WAIT_S), "never admitted"
        self.thread.join(WAIT_S)
        assert self.error is None
        return self.lease


@pytest.fixture
def budget():
    return HostBudget()


def test_what_fits_is_admitted_at_once_and_counted(budget):
    leases = [budget.reserve(n, limit_bytes=100, aborted=never) for n in (10, 20, 70)]
    assert (budget.in_flight_bytes, budget.peak_bytes) == (100, 100)
    for lease, left in zip(leases, (90, 70, 0)):
        lease.release()
        assert budget.in_flight_bytes == left
    assert budget.peak_bytes == 100


def test_a_request_waits_until_enough_is_returned(budget):
    first = budget.reserve(60, limit_bytes=100, aborted=never)
    second = budget.reserve(30, limit_bytes=100, aborted=never)
    waiting = Request(budget, 50)
    second.release()  # 60 + 50 is still too much.
    waiting.assert_waits(in_flight_bytes=60)
    first.release()
    waiting.admitted().release()
    assert budget.in_flight_bytes == 0


def test_requests_are_admitted_in_the_order_they_came(budget):
    admissions = []
    held = budget.reserve(100, limit_bytes=100, aborted=never)
    requests = [Request(budget, 100, admissions=admissions) for _ in range(5)]
    held.release()
    for i, request in enumerate(requests):
        lease = request.admitted()
        assert admissions == requests[: i + 1]
        lease.release()


def test_a_small_request_does_not_overtake_a_large_one(budget):
    held = budget.reserve(50, limit_bytes=100, aborted=never)
    large = Request(budget, 80)
    small = Request(budget, 1)
    large.assert_waits(in_flight_bytes=50)
    small.assert_waits(in_flight_bytes=50)  # It would fit, but it came later.
    held.release()
    large.admitted().release()
    small.admitted().release()


def test_a_piece_larger_than_the_limit_goes_through_alone(budget):
    small = budget.reserve(1, limit_bytes=100, aborted=never)
    huge = Request(budget, 10**9)
    huge.assert_waits(in_flight_bytes=1)
    small.release()
    lease = huge.admitted()
    assert budget.in_flight_bytes == 10**9
    after = Request(budget, 1)
    after.assert_waits(in_flight_bytes=10**9)
    lease.release()
    after.admitted().release()
    assert budget.peak_bytes == 10**9


def test_each_request_has_its_own_limit(budget):
    held = budget.reserve(60, limit_bytes=100, aborted=never)
    strict = Request(budget, 10, limit_bytes=50)
    strict.assert_waits(in_flight_bytes=60)
    held.release()
    strict.admitted().release()
    wide = budget.reserve(60, limit_bytes=100, aborted=never)
    Request(budget, 10, limit_bytes=70).admitted().release()
    wide.release()


def test_an_aborted_request_reserves_nothing_and_lets_the_next_one_in(budget):
    held = budget.reserve(50, limit_bytes=100, aborted=never)
    large, small = Request(budget, 80), Request(budget, 10)
    small.assert_waits(in_flight_bytes=50)
    large.aborted.set()
    budget.wake()
    assert large.over.wait(WAIT_S)
    assert isinstance(large.error, ReservationAborted)
    assert isinstance(large.error, LazyOrbaxError)
    small.admitted().release()
    held.release()
    assert budget.in_flight_bytes == 0


def test_a_request_that_is_aborted_already_is_not_admitted(budget):
    with pytest.raises(ReservationAborted):
        budget.reserve(1, limit_bytes=100, aborted=lambda: True)
    assert budget.in_flight_bytes == budget.peak_bytes == 0


def test_an_aborted_that_raises_leaves_the_queue_as_it_was(budget):
    def aborted():
        raise KeyError("broken")

    with pytest.raises(KeyError):
        budget.reserve(1, limit_bytes=100, aborted=aborted)
    budget.reserve(1, limit_bytes=100, aborted=never).release()


def test_bytes_that_exist_are_counted_at_once_and_others_wait_for_them(budget):
    existing = budget.count(150, limit_bytes=100)
    assert (budget.in_flight_bytes, budget.peak_bytes) == (150, 150)
    waiting = Request(budget, 80)
    budget.count(1, limit_bytes=100).release()  # Is not behind the one that waits.
    waiting.assert_waits(in_flight_bytes=150)
    existing.release()
    waiting.admitted().release()
    assert budget.in_flight_bytes == 0


def test_bytes_that_exist_take_the_place_of_idle_buffers(budget):
    for lease in [budget.reserve(40, limit_bytes=100, aborted=never, kind="k") for _ in "ab"]:
        lease.release(object())
    assert budget.idle_bytes == 80
    existing = budget.count(50, limit_bytes=100)
    assert budget.idle_bytes == 40
    existing.release()


def test_a_second_release_returns_nothing_more(budget):
    first = budget.reserve(10, limit_bytes=100, aborted=never)
    second = budget.reserve(5, limit_bytes=100, aborted=never)
    for _ in range(3):
        first.release()
        assert budget.in_flight_bytes == 5
    second.release()
    assert budget.in_flight_bytes == 0


def test_zero_bytes_are_admitted_beside_a_full_budget(budget):
    full = budget.reserve(100, limit_bytes=100, aborted=never)
    Request(budget, 0).admitted().release()
    assert budget.in_flight_bytes == 100
    full.release()


def test_many_threads_stay_under_the_limit_and_all_come_through(budget):
    sizes = [1 + (7 * i) % 40 for i in range(32)]
    start, seen, done = threading.Barrier(8), [], []

    def work(mine):
        start.wait(WAIT_S)
        for n_bytes in mine:
            lease = budget.reserve(n_bytes, limit_bytes=100, aborted=never)
            seen.append(budget.in_flight_bytes)
            lease.release()
            done.append(n_bytes)

    threads = [threading.Thread(target=work, args=(sizes[i::8],), daemon=True) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive()
    assert sorted(done) == sorted(sizes)
    assert max(seen) <= budget.peak_bytes <= 100
    assert budget.in_flight_bytes == 0


def lease_of(budget, n_bytes, kind, *, limit_bytes=100):
    return budget.reserve(n_bytes, limit_bytes=limit_bytes, aborted=never, kind=kind)


def test_a_buffer_that_was_written_goes_to_the_next_lease_of_its_kind(budget):
    lease = lease_of(budget, 10, "a")
    assert lease.buffer is None
    lease.release("memory")
    assert (budget.in_flight_bytes, budget.idle_bytes) == (0, 10)
    other, none = lease_of(budget, 10, "b"), lease_of(budget, 10, None)
    assert other.buffer is none.buffer is None
    again = lease_of(budget, 10, "a")
    assert again.buffer == "memory"
    assert (budget.in_flight_bytes, budget.idle_bytes) == (30, 0)


def test_a_buffer_is_given_to_one_lease_only(budget):
    lease_of(budget, 10, "a").release("memory")
    assert [lease_of(budget, 10, "a").buffer for _ in range(2)] == ["memory", None]


def test_a_buffer_of_no_kind_is_not_kept_for_leases_of_no_kind(budget):
    lease_of(budget, 10, None).release("memory")
    assert lease_of(budget, 10, None).buffer is None


def test_idle_buffers_make_room_the_longest_unused_first(budget):
    leases = [lease_of(budget, 30, kind) for kind in "abc"]
    for lease, kind in zip(leases, "abc"):
        lease.release(kind)
    assert budget.idle_bytes == 90
    large = lease_of(budget, 50, "large")
    assert budget.in_flight_bytes + budget.idle_bytes <= 100
    assert lease_of(budget, 30, "c").buffer == "c"
    assert lease_of(budget, 10, "a").buffer is None
    large.release()


def test_what_a_lease_takes_over_is_not_counted_twice(budget):
    lease_of(budget, 60, "a").release("a")
    lease_of(budget, 40, "b").release("b")
    assert lease_of(budget, 60, "a").buffer == "a"
    assert lease_of(budget, 40, "b").buffer == "b"
    assert budget.in_flight_bytes == 100


def test_a_second_release_keeps_no_buffer(budget):
    lease = lease_of(budget, 10, "a")
    lease.release()
    lease.release("memory")
    assert budget.idle_bytes == 0


def test_a_piece_larger_than_the_limit_is_not_kept_beside_others(budget):
    lease_of(budget, 1000, "huge").release("huge")
    lease_of(budget, 1, "a")
    assert budget.idle_bytes == 0


def test_idle_memory_is_given_back_when_asked(budget):
    lease_of(budget, 10, "a").release("memory")
    budget.drop_idle()
    assert budget.idle_bytes == 0
    assert lease_of(budget, 10, "a").buffer is None


def test_what_is_read_yet_counts_until_it_is_not_and_nobody_waits_for_it_in_vain():
    budget = HostBudget()
    lease = budget.reserve(60, limit_bytes=100, aborted=lambda: False)
    reader = concurrent.futures.Future()
    lease.hold([reader])
    lease.release()
    lease.release()
    assert budget.in_flight_bytes == 60
    with pytest.raises(ReservationAborted, match="60 bytes of host memory are held"):
        budget.reserve(50, limit_bytes=100, aborted=lambda: False)
    budget.reserve(40, limit_bytes=100, aborted=lambda: False).release()
    reader.set_result(None)
    assert budget.in_flight_bytes == 0
    budget.reserve(100, limit_bytes=100, aborted=lambda: False).release()


def test_what_is_read_no_more_is_returned_when_it_is_released():
    budget = HostBudget()
    lease = budget.reserve(60, limit_bytes=100, aborted=lambda: False)
    reader = concurrent.futures.Future()
    lease.hold([reader])
    reader.set_result(None)
    assert budget.in_flight_bytes == 60
    lease.release()
    assert budget.in_flight_bytes == 0
