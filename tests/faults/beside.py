"""Saves at odd moments, each in a process of its own: `python beside.py CASE DIRECTORY`."""

import asyncio
import multiprocessing
import os
import signal
import sys
import threading
import time

os.environ["JAX_PLATFORMS"] = "cpu"

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint._src.path import atomicity

import lazy_orbax
from lazy_orbax._orbax import process_end
from lazy_orbax.errors import SaveError
from lazy_orbax.save.writer import Writer

CASE, DIRECTORY = sys.argv[1:]
STATE = {"x": jnp.arange(1000.0), "y": np.arange(5)}
SAVE = ocp.args.StandardSave(STATE)


def manager(name):
    """A checkpoint manager whose waits end soon."""
    options = ocp.CheckpointManagerOptions(async_options=ocp.AsyncOptions(timeout_secs=20))
    handler = lazy_orbax.standard_handler()
    return ocp.CheckpointManager(f"{DIRECTORY}/{name}", item_handlers=handler, options=options)


def directories_come_late():
    """Orbax creates the directory of a step only a moment after it began."""
    make = atomicity._create_tmp_directory

    async def late(*args, **kwargs):
        await asyncio.sleep(0.3)
        return await make(*args, **kwargs)

    atomicity._create_tmp_directory = late


def two_threads():
    both, found = threading.Barrier(2), {}

    def train(name):
        try:
            with manager(name) as mine:
                for step in range(5):
                    both.wait()
                    mine.save(step, args=SAVE)
                    mine.wait_until_finished()
                found[name] = mine.all_steps()
        except BaseException as error:  # noqa: BLE001
            found[name] = repr(error)
            both.abort()

    threads = [threading.Thread(target=train, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(found)


def interrupted():
    handler, gate = lazy_orbax.standard_handler(), threading.Event()
    finalize = handler.finalize

    def slow_finalize(*args):
        gate.wait(20)
        finalize(*args)

    def where():
        """Names of the functions that the main thread is in, with the place in the innermost."""
        frame, names = sys._current_frames()[threading.main_thread().ident], []
        place = frame.f_lasti
        while frame:
            names.append(frame.f_code.co_name)
            frame = frame.f_back
        return place, names

    def press():
        before = None
        # Twice at the same place in `join`: it waits there.
        while not (before == (now := where()) and "join" in now[1]):
            before = now
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # A shell's background ignores it.
    handler.finalize = slow_finalize
    checkpointer = ocp.AsyncCheckpointer(handler, timeout_secs=20)
    checkpointer.save(f"{DIRECTORY}/1", args=SAVE)
    threading.Thread(target=press).start()
    try:
        checkpointer.wait_until_finished()
    except KeyboardInterrupt:
        print("interrupted")
    threading.Timer(1, gate.set).start()
    checkpointer.save(f"{DIRECTORY}/2", args=SAVE)
    checkpointer.close()
    print(sorted(os.listdir(DIRECTORY)))


def refused(state, *, closes):
    directories_come_late()
    mine = manager("refused")
    try:
        mine.save(0, args=ocp.args.StandardSave(state))
    except Exception as error:  # noqa: BLE001
        print(type(error).__name__)
    if closes:
        mine.close()


def main_thread_ends():
    handler, main = lazy_orbax.standard_handler(), threading.main_thread()

    def save():
        main.join()
        try:
            asyncio.run(handler.async_save(DIRECTORY, args=SAVE))
        except SaveError as error:
            print(error)

    threading.Thread(target=save).start()


def in_flight(place="finish", then=lambda: None, after=lambda: None):
    """The step is not written yet, or not published, when the main thread ends."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    handler, reached, ending = lazy_orbax.standard_handler(), threading.Event(), threading.Event()
    owner = handler if place == "finalize" else Writer
    method = getattr(owner, place)

    def late(*args):
        reached.set()
        assert ending.wait(20)
        then()
        return method(*args)

    running_saves = process_end.running_saves

    def asked():
        """What finishes saves at the end of the main thread asks which there are."""
        ending.set()
        return running_saves()

    process_end.running_saves = asked
    setattr(owner, place, late)
    checkpointer = ocp.AsyncCheckpointer(handler, timeout_secs=20)
    checkpointer.save(f"{DIRECTORY}/0", args=SAVE)
    assert reached.wait(20)
    after()
    print("the end")


def press_ctrl_c():
    """While a storage that never answers is waited for."""
    os.kill(os.getpid(), signal.SIGINT)
    threading.Event().wait()


def interrupt():
    raise KeyboardInterrupt


def fail():
    raise OSError("the disk is gone")


def fork():
    """What a data loader does: a child, which must not take the save for its own."""
    child = multiprocessing.get_context("fork").Process(target=print, args=("a child",))
    child.start()
    child.join(20)
    print("exit code", child.exitcode)


CASES = {
    "in flight": in_flight,
    "in flight, raises": lambda: in_flight(after=fail),
    "in flight, exits": lambda: in_flight(after=lambda: sys.exit(3)),
    "in flight, interrupted": lambda: in_flight(after=interrupt),
    "in flight, fails": lambda: in_flight(then=fail),
    "in flight, for ever": lambda: in_flight(then=press_ctrl_c),
    "in flight, forks": lambda: in_flight("finalize", after=fork),
    "two threads": two_threads,
    "interrupted": interrupted,
    "refused": lambda: refused({"x": np.zeros(3, jnp.uint4)}, closes=False),
    "refused, closed": lambda: refused({"x": np.zeros(3, jnp.uint4)}, closes=True),
    "refused by Orbax": lambda: refused({"x": object()}, closes=False),
    "main thread ends": main_thread_ends,
}
CASES[CASE]()
