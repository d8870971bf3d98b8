"""Gates and faults at named places of a save, and waits that end."""

from __future__ import annotations

import contextlib
import faulthandler
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lazy_orbax.save import in_flight, writer
from lazy_orbax.snapshot import device_to_host
from lazy_orbax.snapshot.host_budget import HOST_BUDGET
from lazy_orbax.storage import fsync

HANG_S = 60
PLACES: dict[str, tuple[Any, str]] = {
    "copy": (device_to_host, "take"),
    "to the host": (device_to_host, "to_host"),
    "views": (device_to_host, "views"),
    "open": (writer.Writer, "__init__"),
    "hand over": (writer.Writer, "write"),
    "wait": (writer.Writer, "wait"),
    "finish": (writer.Writer, "finish"),
    "sync": (fsync, "_sync"),
}


class Boom(Exception):
    """What is raised where a test wants a failure."""


class Gate:
    """Holds calls until it is opened.

    Attributes:
        reached: set when a call arrived.
        opened: set to let calls go on.
    """

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()

    def await_call(self) -> None:
        """Waits until a call is held."""
        assert self.reached.wait(HANG_S), "the gate was never reached"


@contextlib.contextmanager
def held_at(place: str | None, *, call: int = 1) -> Iterator[Gate]:
    """Holds the `call`-th and later calls of a function of the library until the gate is opened."""
    gate = Gate()

    def wait() -> None:
        gate.reached.set()
        assert gate.opened.wait(HANG_S), f"nobody opened the gate at {place}"

    with _before(place, call, wait):
        try:
            yield gate
        finally:
            gate.opened.set()


@contextlib.contextmanager
def failing_at(place: str, *, call: int = 1, error: BaseException | None = None) -> Iterator[None]:
    """Makes the `call`-th and later calls of a function of the library raise."""
    raised = error or Boom(f"no luck at {place}")

    def fail() -> None:
        raise raised

    with _before(place, call, fail):
        yield


@contextlib.contextmanager
def _before(place: str | None, call: int, do: Callable[[], None]) -> Iterator[None]:
    if place is None:
        yield
        return
    owner, name = PLACES[place]
    original = getattr(owner, name)
    lock, calls = threading.Lock(), 0

    def patched(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        with lock:
            calls += 1
            due = calls >= call
        if due:
            try:
                do()
            except BaseException:
                del args, kwargs  # The traceback must not keep them.
                raise
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, patched)
        yield


def within(call: Callable[..., Any], *args: Any, timeout_s: float = HANG_S, **kwargs: Any) -> Any:
    """Returns `call(...)`; fails the test, instead of hanging it, where that takes too long.

    The call is in this thread, because Orbax treats the main thread differently. What hangs is
    unwound by failing every save in flight, so that the next test can run.
    """
    hung = threading.Event()

    def rescue() -> None:
        hung.set()
        faulthandler.dump_traceback(file=sys.__stderr__)
        for stuck in in_flight.saves():
            stuck.fail(Boom("the test gave this save up"))

    watchdog = threading.Timer(timeout_s, rescue)
    watchdog.daemon = True
    watchdog.start()
    try:
        return call(*args, **kwargs)
    finally:
        watchdog.cancel()
        if hung.is_set():
            pytest.fail(f"{call} took more than {timeout_s} s")


def await_budget(n_bytes: int = 0) -> None:
    """Waits until no more than `n_bytes` of host memory are reserved."""
    with HOST_BUDGET._changed:
        done = HOST_BUDGET._changed.wait_for(
            lambda: HOST_BUDGET.in_flight_bytes <= n_bytes, timeout=HANG_S
        )
    assert done, f"{HOST_BUDGET.in_flight_bytes} bytes are still reserved"


def join_threads(*names: str) -> None:
    """Waits until no thread of these names is alive."""
    for thread in threading.enumerate():
        if thread.name.startswith(names):
            # Not `thread.join`: Orbax's threads raise there what they failed with.
            threading.Thread.join(thread, HANG_S)
            assert not thread.is_alive(), f"{thread.name} is still running"
