"""Forks a process for every crash: one that has imported everything and started nothing.

Reads a JSON object a line from standard input, runs what it asks for in a fork, and writes how that
ended. It is started with `fscalls.so` preloaded.
"""

from __future__ import annotations

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import ctypes
import dataclasses
import faulthandler
import functools
import json
import pathlib
import secrets
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore  # noqa: F401 - Orbax imports it when it is first needed.
from faults.crash_state import make_state
from orbax.checkpoint import v1 as orbax_v1

import lazy_orbax
from lazy_orbax.combine import export, merge  # noqa: F401 - Imported here, not in each fork.
from lazy_orbax.errors import KeeperError
from lazy_orbax.handlers import promoting_parts
from lazy_orbax.handlers.promoting import promote
from lazy_orbax.handlers.v1 import lazy_v1
from lazy_orbax.tiers import meeting
from lazy_orbax.tiers.tier import Machine

FSCALLS = ctypes.CDLL(os.environ["LD_PRELOAD"])
HANG_S = 60


class Death(NamedTuple):
    """How a process ends.

    Attributes:
        log: where to write which calls began.
        call: which call is not made any more, as it is in the log; if empty all are made.
        nth: which of several such.
        cut: a mounted directory whose power is cut at the same moment.
        late: whether somebody syncs a file of theirs just before that.
    """

    log: str
    call: str = ""
    nth: int = 1
    cut: str = ""
    late: bool = False


# Nothing is compiled so, which would take most of the time; what is written is the same.
OPTIONS = lazy_orbax.LazyOptions(mode="direct", slab_bytes=2**20)


def save(  # noqa: PLR0913 - As they come in a request.
    root: str,
    step: int,
    *,
    stock: bool,
    durable_path: bool,
    v1: str = "",
    linked: bool = False,
    in_database: bool = True,
    memory: str = "",
    machine: Sequence[int] = (),
    gone: str = "",
    made: str = "",
    death: Death | None = None,
) -> None:
    """Saves a step, or makes one of another, and dies before a call, or when it is done.

    Args:
        root: the run, which keeps one step where it is of v0.
        step: the step.
        stock: whether stock Orbax saves it.
        durable_path: whether it is synced before it is listed.
        v1: whether v1 saves it, and how: `save` or `Checkpointer`.
        linked: whether most of it is the same in every step, and linked.
        in_database: whether arrays go to an OCDBT database.
        memory: the directory of a keeper. The step is not saved: what is kept there of the run
            `/run` is brought to `root`, of which that is a tier.
        machine: which machine of how many has that keeper; nothing: there is one.
        gone: a file that is there when no other machine is waited for any more.
        made: `merge` or `export`: what is made of step 1 instead.
        death: how the process ends, if it does.
    """
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("a",))
    state = make_state(step, mesh, frozen=linked)
    if made:
        begin, end = (lambda step, state: make(root, made)), (lambda: None)
    elif memory:
        tier = lazy_orbax.Tier(root, every_s=1, keep=1)
        here = Machine((machine[0],), machine[1]) if machine else None
        secrets.token_hex = lambda n: "70" * n  # Calls are told apart by their names.
        promoting_parts.awaited = meeting.awaited = functools.partial(until_gone, gone)
        begin, end = (lambda step, state: promote("/run", tier, memory, here)), (lambda: None)
    else:
        options = dataclasses.replace(OPTIONS, skip_unchanged=linked)
        handler = None
        if not (stock or v1):
            handler = lazy_orbax.standard_handler(options=options, use_ocdbt=in_database)
        begin, end = _saving(root, handler, durable_path=durable_path, v1=v1)
    if death is None:
        begin(step, state)
        end()
        return
    log_to = os.open(death.log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    mounted = os.open(death.cut, os.O_RDONLY) if death.cut else -1
    FSCALLS.arm(root.encode(), death.call.encode(), death.nth, log_to, mounted, death.late)
    begin(step, state)
    end()
    FSCALLS.disarm()
    os.write(log_to, b"finished\n")
    if death.cut and FSCALLS.cut_power(mounted, death.late):
        raise OSError("the power was not cut")
    os.kill(os.getpid(), signal.SIGKILL)


def until_gone(gone: str, look: Callable[[], Any], patience_s: float, what: str) -> Any:
    """Waits for another machine until that is gone, however long it takes."""
    while (found := look()) is None:
        if os.path.exists(gone):
            raise KeeperError(what)
        time.sleep(0.01)
    return found


def make(root: str, made: str) -> None:
    """Merges step 1 with itself to step 2, or exports it to `model`."""
    if made == "merge":
        lazy_orbax.merge([f"{root}/1"] * 2, "uniform", f"{root}/2", host_bytes=2**20)
    else:
        lazy_orbax.export(f"{root}/1", f"{root}/model", max_shard_bytes=2**20)


def _saving(root: str, handler: Any, *, durable_path: bool, v1: str) -> Any:
    """Returns what begins a save, and what waits for its end."""
    if v1:
        lazy_v1(OPTIONS)
    if v1 == "save":
        return lambda step, state: orbax_v1.save(f"{root}/{step}", state), lambda: None
    if v1:
        checkpointer = orbax_v1.training.Checkpointer(root)
        return functools.partial(checkpointer.save_async, force=True), checkpointer.wait
    path_class = {"temporary_path_class": lazy_orbax.DurablePath} if durable_path else {}
    manager = ocp.CheckpointManager(
        root,
        item_handlers=handler or ocp.StandardCheckpointHandler(),
        options=ocp.CheckpointManagerOptions(max_to_keep=1, **path_class),
    )
    begin = lambda step, state: manager.save(step, args=ocp.args.StandardSave(state))  # noqa: E731
    return begin, manager.wait_until_finished


def in_a_fork(request: dict[str, Any]) -> int:
    """Returns the exit status, negative where a signal ended it."""
    pid = os.fork()
    if pid == 0:
        try:
            signal.alarm(HANG_S)
            faulthandler.register(signal.SIGALRM)
            death = request.pop("death", None)
            save(**request, death=death and Death(**death))
            sys.stderr.flush()
            os._exit(0)
        except BaseException:  # noqa: BLE001 - It is printed.
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main() -> None:
    threads = len(list(pathlib.Path("/proc/self/task").iterdir()))
    print(json.dumps({"threads": threads}), flush=True)
    for line in sys.stdin:
        print(json.dumps({"status": in_a_fork(json.loads(line))}), flush=True)


if __name__ == "__main__":
    main()
