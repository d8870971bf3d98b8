"""How long `lazy-orbax` takes to start, and to show many leaves.

python -m benchmarks.command_line

Each command runs in a process of its own, a few times in turns. The least and the median are
printed of its time to the first output, of that to its end, and of its CPU time, which a busy
machine hardly stretches.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

_ROOT = pathlib.Path(__file__).parents[1]
_COMMANDS = ("ls", "show", "du", "diff", "verify", "html")


def make(run: pathlib.Path, n_leaves: int) -> None:
    """Saves a run of one step with so many small leaves."""
    import jax.numpy as jnp
    import orbax.checkpoint as ocp

    import lazy_orbax

    tree = {f"layer_{i // 4}": {} for i in range(n_leaves)}
    for i in range(n_leaves):
        tree[f"layer_{i // 4}"][f"w{i % 4}"] = jnp.full(4, i, jnp.float32)
    with ocp.CheckpointManager(run, item_handlers=lazy_orbax.standard_handler()) as manager:
        manager.save(0, args=ocp.args.StandardSave(tree))


def measure(arguments: list[str]) -> tuple[float, float, float]:
    """Returns the seconds to the first output and to the end of a command, and its CPU time."""
    began_s = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "lazy_orbax", *arguments],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(_ROOT)},
    )
    assert process.stdout is not None
    process.stdout.read(1)
    first_s = time.perf_counter() - began_s
    process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, arguments
    return first_s, time.perf_counter() - began_s, usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--leaves", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        runs = {n: pathlib.Path(directory) / str(n) for n in (4, options.leaves)}
        for n, run in runs.items():
            make(run, n)
        todo = {"--help": ["--help"]}
        for n, run in runs.items():
            for command in _COMMANDS:
                paths = [str(run)] * (1 + (command == "diff"))
                todo[f"{command}, {n} leaves"] = [command, *paths]
        times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in todo}
        for _ in range(options.repeats):
            for name, arguments in todo.items():
                times[name].append(measure(arguments))
    print("| command | first output | end | CPU time |\n|---|---|---|---|")
    for name, found in times.items():
        cells = (f"{min(each):.2f} s ({statistics.median(each):.2f})" for each in zip(*found))
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
