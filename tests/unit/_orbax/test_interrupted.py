"""Which threads were interrupted: not those of another manager that start or end at this moment."""

import threading

from lazy_orbax._orbax import interrupted, lifecycle

# What starts a thread, up to Python 3.12 and from 3.13.
STARTS = {"_start_new_thread", "_start_joinable_thread"} & vars(threading).keys()


def test_a_thread_that_is_about_to_start_was_not_interrupted(monkeypatch):
    """Python lists it, and says that it is not alive."""
    found = []

    def looking(start):
        def look_and_start(*args, **keywords):
            found.append((starting in threading.enumerate(), starting.is_alive()))
            found.append(interrupted.await_interrupted())
            return start(*args, **keywords)

        return look_and_start

    for name in STARTS:
        monkeypatch.setattr(threading, name, looking(getattr(threading, name)))
    starting = threading.Thread(target=lambda: None, name=lifecycle.COMMIT_THREAD)
    starting.start()
    starting.join()
    assert found == [(True, False), False]


def test_a_thread_that_ends_at_this_moment_was_not_interrupted(monkeypatch):
    """It was listed a moment ago, and is no more."""
    ending = threading.Thread(target=lambda: None, name=lifecycle.COMMIT_THREAD)
    ending.start()
    ending.join()
    listed = [[ending]]
    monkeypatch.setattr(interrupted, "running_saves", lambda: listed.pop() if listed else [])
    assert not interrupted.await_interrupted()
