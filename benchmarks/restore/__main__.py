"""Measures restores, each in a fresh process, in turns with stock Orbax and plain reads.

python -m benchmarks.restore --directory DISK --json benchmarks/results/restore.jsonl
python -m benchmarks.restore --cases small,cast --repeats 3 --peers stock_default,lazy
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import tempfile
import time

import tqdm

from benchmarks import record
from benchmarks.restore import table
from benchmarks.restore.cases import CASES, PEERS, WORKLOADS, rows_of
from benchmarks.restore.slow_bucket import is_installed
from benchmarks.restore.turns import Turns, writers_of
from benchmarks.workloads import SIZES


def main() -> int:
    arguments = _arguments()
    rows = rows_of(arguments.cases, arguments.peers)
    if not rows:
        print("None of these peers takes part in these cases.", file=sys.stderr)
        return 2
    if any(WORKLOADS[row.case.workload].in_bucket for row in rows) and not is_installed():
        print("The case gs needs a server: pip install -e '.[test]'", file=sys.stderr)
        return 2
    context = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "size": arguments.size,
        "versions": record.versions(),
        "hardware": record.hardware(arguments.directory, "cpu" if arguments.devices else "real"),
    }
    found = []
    turns = Turns(
        directory=arguments.directory,
        size=arguments.size,
        devices=arguments.devices,
        restores=1 if arguments.only_first else 2,
        latency_s=arguments.latency_ms / 1000,
        keeps=arguments.keep,
    )
    total = len(writers_of(rows)) + sum(len(row.peers) for row in rows) * arguments.repeats
    with turns, tqdm.tqdm(total=total, unit="process", smoothing=0.1) as bar:
        turns.write(rows, bar)
        for row in rows:
            samples = turns.take(row, arguments.repeats, bar)
            # After each, so that what was measured is there if the next one is given up.
            records = record.as_records(samples, context)
            found += records
            if arguments.json is not None:
                record.append(arguments.json, records)
    print(table.section(table.by_key(found)))
    for failure in turns.failures:
        print(failure, file=sys.stderr)
    return 1 if turns.failures else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.restore", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--cases", type=_names(CASES), default=tuple(CASES), help=f"of {', '.join(CASES)}")
    add("--peers", type=_names(PEERS), default=(), help=f"of {', '.join(PEERS)}; else the case's")
    add("--repeats", type=int, default=5)
    add("--size", choices=SIZES, default="full")
    add("--devices", type=int, default=4, help="CPU devices to emulate; 0 takes the real ones")
    add("--latency-ms", type=float, default=50.0, help="of each request to the bucket")
    add("--only-first", action="store_true", help="no second restore in each process")
    add("--json", type=pathlib.Path, help="JSON lines; appended to")
    add("--keep", action="store_true", help="leave the checkpoints, and read those left before")
    add(
        "--directory",
        type=pathlib.Path,
        default=pathlib.Path(tempfile.gettempdir()),
        help="where checkpoints are written, and removed again; choose the disk to be measured",
    )
    return parser.parse_args()


def _names(allowed: object) -> object:
    def parse(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        if unknown := [name for name in names if name not in allowed]:  # type: ignore[operator]
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not one of {list(allowed)}")  # type: ignore[call-overload]
        return names

    return parse


if __name__ == "__main__":
    raise SystemExit(main())
