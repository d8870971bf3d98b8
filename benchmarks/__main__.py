"""Measures everything, or the parts that are asked for.

python -m benchmarks --out benchmarks/results/mine.jsonl
python -m benchmarks --out /tmp/quick.jsonl --size small --parts stall,memory --repeats 3
python -m benchmarks.report benchmarks/results/mine.jsonl
"""

from __future__ import annotations

import argparse
import importlib
import pathlib
import sys
import tempfile
import time

import tqdm

from benchmarks import record
from benchmarks.gpu import MEASUREMENTS
from benchmarks.jobs import Job, Settings, run
from benchmarks.peers import PEERS
from benchmarks.workloads import SIZES, STEPS, WORKLOADS

PARTS = ("stall", "throughput", "memory", "scale", "pods")
ON_REQUEST = ("gpu", "exchanges")


def main() -> int:
    arguments = _arguments()
    settings = Settings(
        directory=str(arguments.directory.resolve()),
        size=arguments.size,
        repeats=arguments.repeats,
        peers=arguments.peers,
        workloads=arguments.workloads,
        steps=arguments.steps,
        gigabytes=arguments.gigabytes,
        devices=arguments.devices,
    )
    arguments.directory.mkdir(parents=True, exist_ok=True)
    plan = {part: importlib.import_module(f"benchmarks.{part}") for part in arguments.parts}
    jobs = {part: module.jobs(settings) for part, module in plan.items()}
    failures: list[str] = []
    total = sum(job.ticks for found in jobs.values() for job in found)
    with tqdm.tqdm(total=total, unit="run", smoothing=0.1) as bar:
        for found in jobs.values():
            failures += _run_part(found, arguments.out, bar)
    for failure in failures:
        print(failure, file=sys.stderr)
    print(f"Records: {arguments.out}. Tables: python -m benchmarks.report {arguments.out}")
    return 1 if failures else 0


def _run_part(jobs: list[Job], out: pathlib.Path, bar: tqdm.tqdm) -> list[str]:
    """Runs the jobs of a part and appends its records. One that fails does not stop the others."""
    samples, failures, accelerator = [], [], "unknown"
    start = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    for job in jobs:
        bar.set_description(job.title)
        goal = bar.n + job.ticks
        try:
            found, accelerator = run(job, lambda: bar.update())
        except RuntimeError as error:
            failures.append(str(error))
        else:
            samples += found
        bar.update(goal - bar.n)
    if not jobs:
        return []
    settings = jobs[0].settings
    context = {
        "time": start,
        "size": settings.size,
        "versions": record.versions(),
        "hardware": record.hardware(pathlib.Path(settings.directory), accelerator),
    }
    record.append(out, record.as_records(samples, context))
    return failures


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--out", type=pathlib.Path, required=True, help="JSON lines; appended to")
    add("--parts", type=_names((*PARTS, *ON_REQUEST)), default=PARTS, help=_parts_help())
    add("--size", choices=SIZES, default="full")
    add("--repeats", type=int, default=5)
    add("--peers", type=_names(PEERS), default=(), help=f"of {', '.join(PEERS)}")
    names = (*WORKLOADS, *MEASUREMENTS)
    add("--workloads", type=_names(names), default=(), help=f"of {', '.join(names)}")
    add("--steps", type=_names(STEPS), default=(), help=f"of {', '.join(STEPS)}, for stall")
    add("--gigabytes", type=float, help="of state, for gpu")
    add("--devices", type=int, default=4, help="CPU devices to emulate; 0 takes the real ones")
    add(
        "--directory",
        type=pathlib.Path,
        default=pathlib.Path(tempfile.gettempdir()),
        help="where checkpoints are written, and removed again; choose the disk to be measured",
    )
    return parser.parse_args()


def _parts_help() -> str:
    return f"of {', '.join(PARTS)}, which are the default, and {', '.join(ON_REQUEST)}"


def _names(allowed: object) -> object:
    def parse(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        if unknown := [name for name in names if name not in allowed]:  # type: ignore[operator]
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not one of {allowed}")
        return names

    return parse


if __name__ == "__main__":
    raise SystemExit(main())
