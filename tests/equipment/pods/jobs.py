"""Starts the processes of a job on this machine, and ends them."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import pathlib
import signal
import socket
import time
from collections.abc import Mapping
from typing import Any

import pytest

_TESTS = pathlib.Path(__file__).parents[2]
HEARTBEAT_TIMEOUT_S = 5
_SLACK_S = 10  # Of a machine with fewer cores than processes.
_TIMEOUT_S = 120


@dataclasses.dataclass(frozen=True)
class Ended:
    """How one process of a job ended.

    Attributes:
        returncode: negative for a signal.
        report: what it printed after `REPORT`, or `None`.
        log: all that it printed.
        ended_s: when it ended, in seconds of `time.monotonic`.
    """

    returncode: int
    report: Any
    log: str
    ended_s: float


def fork_server(*modules: str, variables: Mapping[str, str] | None = None) -> Any:
    """Returns a context of processes that are forked from one which has imported these modules.

    Args:
        *modules: what it imports, and uses nothing of, if it does not run yet.
        variables: of its environment then.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(modules))
    # Python 3.11 does not tell it where to import from, and it says nothing of what it missed.
    roots = [str(_TESTS), str(_TESTS.parent), os.environ.get("PYTHONPATH", "")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, roots)))
        for name, value in (variables or {}).items():
            patch.setenv(name, value)
        multiprocessing.forkserver.ensure_running()
    return context


@dataclasses.dataclass(frozen=True)
class Job:
    """Processes that were started, and where they print."""

    processes: list[Any]
    logs: list[pathlib.Path]


def run_job(n: int, scenario: str, root: pathlib.Path | str, **how: Any) -> list[Ended]:
    """Runs `scenario` of `child.py` on `n` processes and returns how they ended.

    Args:
        n: how many processes.
        scenario: name of a function in `child.py`.
        root: the directory, or address, that it saves to.
        **how: as `start_job` takes it.
    """
    [ended] = ends_of([start_job(n, scenario, root, **how)])
    return ended


def start_job(
    n: int,
    scenario: str,
    root: pathlib.Path | str,
    *,
    logs: pathlib.Path,
    n_devices: int = 2,
    variables: Mapping[str, str] | None = None,
    **arguments: Any,
) -> Job:
    """Starts `scenario` of `child.py` on `n` processes; `ends_of` must follow.

    Args:
        n: how many processes.
        scenario: name of a function in `child.py`.
        root: the directory, or address, that it saves to.
        logs: directory for what the processes print.
        n_devices: devices of each process.
        variables: of the environment, beside the usual ones.
        **arguments: what the scenario is told.
    """
    logs.mkdir(parents=True, exist_ok=True)
    environment = {
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={n_devices}",
        "OMP_NUM_THREADS": "1",
        **(variables or {}),
    }
    told = {"root": str(root), **arguments}
    address = f"127.0.0.1:{_free_port()}"
    paths = [logs / f"{scenario}_{i}.log" for i in range(n)]
    context = fork_server("equipment.pods.child")
    processes = [
        context.Process(
            target=_run, args=((address, n, i), scenario, told, str(path), environment), daemon=True
        )
        for i, path in enumerate(paths)
    ]
    try:
        for process in processes:
            process.start()
    except BaseException:
        _kill(processes)
        raise
    return Job(processes, paths)


def ends_of(jobs: list[Job]) -> list[list[Ended]]:
    """Waits for the processes of all jobs, kills those that hang, and returns how they ended."""
    processes = [process for job in jobs for process in job.processes]
    ends: dict[int, float] = {}
    deadline_s = time.monotonic() + _TIMEOUT_S
    try:
        while running := [p for i, p in enumerate(processes) if i not in ends]:
            remaining_s = deadline_s - time.monotonic()
            sentinels = [process.sentinel for process in running]
            if remaining_s < 0 or not multiprocessing.connection.wait(sentinels, remaining_s):
                break
            for i, process in enumerate(processes):
                if i not in ends and not process.is_alive():
                    ends[i] = time.monotonic()
    finally:
        _kill(processes)
    times_s = iter([ends.get(i, float("inf")) for i in range(len(processes))])
    return [
        [
            Ended(process.exitcode, _report(path), path.read_text(), next(times_s))
            for process, path in zip(job.processes, job.logs, strict=True)
        ]
        for job in jobs
    ]


def assert_killed(ended: list[Ended], victim: int) -> None:
    """Asserts that one process of a job was killed, and that JAX ended the others for that."""
    killed = ended[victim]
    assert killed.returncode == -signal.SIGKILL, killed.log[-4000:]
    for survivor in ended:
        # At once if it was process 0, else when it is missed.
        assert survivor.ended_s - killed.ended_s < HEARTBEAT_TIMEOUT_S + _SLACK_S
        assert survivor.report is None


def _kill(processes: list[Any]) -> None:
    for process in processes:
        if process.pid is not None:
            process.kill()
            process.join()


def _run(*arguments: Any) -> None:
    """Runs in a new process."""
    from equipment.pods import child

    child.main(*arguments)


def reports(ended: list[Ended]) -> list[Any]:
    """Returns what the processes reported; fails where one did not come so far."""
    for process in ended:
        assert process.report is not None, f"a process did not finish:\n{process.log[-6000:]}"
    return [process.report for process in ended]


def _report(log: pathlib.Path) -> Any:
    lines = [line for line in log.read_text().splitlines() if line.startswith("REPORT ")]
    return json.loads(lines[0].removeprefix("REPORT ")) if lines else None


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
