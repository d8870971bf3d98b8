"""Starts the processes of a job on this machine, and ends them."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import socket
import subprocess
import sys
import time
from typing import Any

HERE = pathlib.Path(__file__).parent
HEARTBEAT_TIMEOUT_S = 5
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


def run_job(
    n: int,
    scenario: str,
    root: pathlib.Path | str,
    *,
    logs: pathlib.Path,
    n_devices: int = 2,
    **arguments: Any,
) -> list[Ended]:
    """Runs `scenario` of `child.py` on `n` processes and returns how they ended.

    Args:
        n: how many processes.
        scenario: name of a function in `child.py`.
        root: the directory, or address, that it saves to.
        logs: directory for what the processes print.
        n_devices: devices of each process.
        **arguments: what the scenario is told, JSON-serializable.
    """
    logs.mkdir(parents=True, exist_ok=True)
    roots = [str(HERE.parent.parent), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, roots)),
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={n_devices}",
        "OMP_NUM_THREADS": "1",
    }
    told = json.dumps({"root": str(root), **arguments})
    job = [f"127.0.0.1:{_free_port()}", str(n)]
    paths = [logs / f"{scenario}_{i}.log" for i in range(n)]
    processes = []
    ends: dict[int, float] = {}
    try:
        for i, path in enumerate(paths):
            with path.open("w") as log:
                command = [sys.executable, str(HERE / "child.py"), *job, str(i), scenario, told]
                processes.append(
                    subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
                )
        deadline_s = time.monotonic() + _TIMEOUT_S
        while len(ends) < n and time.monotonic() < deadline_s:
            for i, process in enumerate(processes):
                if i not in ends and process.poll() is not None:
                    ends[i] = time.monotonic()
            _wait_for_any([p for i, p in enumerate(processes) if i not in ends])
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [
        Ended(process.returncode, _report(path), path.read_text(), ends.get(i, float("inf")))
        for i, (process, path) in enumerate(zip(processes, paths, strict=True))
    ]


def reports(ended: list[Ended]) -> list[Any]:
    """Returns what the processes reported; fails where one did not come so far."""
    for process in ended:
        assert process.report is not None, f"a process did not finish:\n{process.log[-6000:]}"
    return [process.report for process in ended]


def _wait_for_any(processes: list[subprocess.Popen[bytes]]) -> None:
    if processes:
        try:
            processes[0].wait(0.1)
        except subprocess.TimeoutExpired:
            return


def _report(log: pathlib.Path) -> Any:
    lines = [line for line in log.read_text().splitlines() if line.startswith("REPORT ")]
    return json.loads(lines[0].removeprefix("REPORT ")) if lines else None


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
