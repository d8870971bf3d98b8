"""Restores malformed checkpoints by the thousand: `python tests/trust/fuzz.py --cases 10000`.

Each case is a valid tiny checkpoint with something spoiled, restored with a target and without one,
by a handler and by `load`, in a process that is bounded in time and memory. Prints how the cases
ended, and fails where one crashed, hung, took too much memory or said nothing that a user could act
on.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import os
import pathlib
import random
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

_TESTS = pathlib.Path(__file__).parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(_TESTS))

from trust.mutate import MUTATIONS, mutated

_START_S = 120
_CASE_S = 30
# What a restore may take where the library believes that there are 256 MiB: the arrays, in host
# memory and on the device, what TensorStore decodes, and JSON as values.
MOST_GROWN_BYTES = 2**30
_BAD = ("crash", "hang", "memory", "unclear")
COLUMNS = ("same", "different", "refused", "named", "noted", *_BAD)


class Worker:
    """A process that restores, or combines."""

    def __init__(self, root: pathlib.Path, what: str):
        path = [str(_TESTS), str(_TESTS.parent), os.environ.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            [sys.executable, str(_TESTS / "trust" / "worker.py"), str(root), what],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            bufsize=1,
        )
        if self._reply(_START_S) is None:
            raise RuntimeError("the worker did not start")

    def restore(self, name: str, directory: pathlib.Path) -> dict | str:
        """Returns what the worker says, or how it ended."""
        self._process.stdin.write(json.dumps([name, str(directory)]) + "\n")
        reply = self._reply(_CASE_S)
        if reply is not None:
            return reply
        return "hang" if self._process.poll() is None else "crash"

    def _reply(self, timeout_s: float) -> dict | None:
        ready, _, _ = select.select([self._process.stdout], [], [], timeout_s)
        line = self._process.stdout.readline() if ready else ""
        if ready and not line:
            self._process.wait(timeout_s)
        return json.loads(line) if line else None

    def end(self) -> None:
        with self._process:  # Closes the pipes.
            self._process.kill()


@dataclasses.dataclass(frozen=True)
class Case:
    """How one malformed checkpoint ended.

    Attributes:
        number: with the seed, it is made again from this.
        kind: what kind of change it was.
        what: what was changed, and in which valid checkpoint.
        ended: the ways in which its restores ended.
        texts: what was said.
    """

    number: int
    kind: str
    what: str
    ended: tuple[str, ...]
    texts: tuple[str, ...]
    grown_bytes: int = 0
    took_s: float = 0.0


def cases(
    seed: int, numbers: range, scratch: pathlib.Path, what: str = "restore"
) -> Iterator[Case]:
    """Makes malformed checkpoints, and restores or combines them.

    Each depends on the seed and its number alone.
    """
    root, worker = scratch / "valid", None
    names: list[str] = []
    try:
        for number in numbers:
            if worker is None:
                worker = Worker(root, what)
                names = sorted(path.name for path in root.iterdir())
                if what == "combine":  # Those need a checkpoint that says what it holds.
                    names.remove("older")
            rng = random.Random(f"{seed} {number}")
            name, directory = rng.choice(names), scratch / f"case-{number}"
            kind, what = mutated(rng, root / name, directory)
            reply = worker.restore(name, directory)
            shutil.rmtree(directory)
            what = f"{name}: {what}"
            if isinstance(reply, str):
                worker.end()
                worker = None
                yield Case(number, kind, what, (reply,), ())
                continue
            ended = [how for how, _ in reply["ended"]]
            if reply["grown_bytes"] > MOST_GROWN_BYTES:
                ended.append("memory")
            texts = tuple(text for _, text in reply["ended"])
            yield Case(
                number, kind, what, tuple(ended), texts, reply["grown_bytes"], reply["took_s"]
            )
            if reply["rss_bytes"] > 2 * MOST_GROWN_BYTES:
                worker.end()
                worker = None
    finally:
        if worker is not None:
            worker.end()


def is_bad(case: Case) -> bool:
    return any(how in _BAD for how in case.ended)


def table(found: list[Case]) -> list[list[str]]:
    """Returns the restores that ended in each way, by the kind of change."""
    rows = [["(what was spoiled)", "cases", *COLUMNS]]
    for kind in (*MUTATIONS, "all"):
        chosen = [case for case in found if kind in (case.kind, "all")]
        ended = collections.Counter(how for case in chosen for how in case.ended)
        rows.append([kind, str(len(chosen)), *(str(ended[column]) for column in COLUMNS)])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--what", default="restore", choices=("restore", "combine"))
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--show", default="", help="also print the cases that ended like this")
    arguments = parser.parse_args()
    found, start = [], time.monotonic()
    in_memory = pathlib.Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=in_memory if in_memory.is_dir() else None) as scratch:
        numbers = range(arguments.first, arguments.first + arguments.cases)
        for case in cases(arguments.seed, numbers, pathlib.Path(scratch), arguments.what):
            found.append(case)
            if is_bad(case) or arguments.show in case.ended:
                print(case, flush=True)
            if len(found) % 1000 == 0:
                print(f"{len(found)} cases, {time.monotonic() - start:.0f} s", flush=True)
    for row in table(found):
        print("  ".join(cell.ljust(9 if i else 32) for i, cell in enumerate(row)))
    print(
        f"seed {arguments.seed}; most memory {max(case.grown_bytes for case in found) / 2**20:.0f} "
        f"MiB, longest {max(case.took_s for case in found):.1f} s"
    )
    sys.exit(any(map(is_bad, found)))


if __name__ == "__main__":
    main()
