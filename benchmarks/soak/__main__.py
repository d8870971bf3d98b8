"""The command line of a soak."""

from __future__ import annotations

import argparse
import json
import pathlib
import shutil
import sys
import tempfile
import time

from benchmarks import record, soak
from benchmarks.soak import supervisor
from benchmarks.soak.counted import KILLED
from benchmarks.soak.training import Options, train


def main() -> int:
    arguments = _arguments()
    if arguments.train:
        train(Options(**json.loads(arguments.train)))
        return 0
    arguments.directory.mkdir(parents=True, exist_ok=True)
    directory = pathlib.Path(tempfile.mkdtemp(dir=arguments.directory.resolve()))
    start_s = time.monotonic()
    found, full_disk = supervisor.soak(directory, arguments.minutes, arguments.seed)
    result = {
        "part": "soak",
        "seed": arguments.seed,
        "minutes": round((time.monotonic() - start_s) / 60, 1),
        "full_disk": full_disk,
        "counts": dict(found.counts),
        "processes": dict(found.processes),
        "kills": found.processes[KILLED],
        "lost": found.lost,
        "wrong": found.wrong,
        "faults": found.faults,
        "examples": found.examples,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": record.versions(),
        "hardware": record.hardware(directory, "cpu"),
    }
    if arguments.out:
        record.append(arguments.out, [result])
    print(json.dumps(result, indent=1))
    if not found.is_good:
        print(f"The ledgers, and what is left of the steps: {directory}", file=sys.stderr)
        return 1
    shutil.rmtree(directory)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=soak.__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--directory",
        type=pathlib.Path,
        default=pathlib.Path(tempfile.gettempdir()),
        help="the disk; what is written is removed again, unless something was lost or wrong",
    )
    parser.add_argument("--out", type=pathlib.Path, help="JSON lines; appended to")
    parser.add_argument("--train", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
