"""Runs the processes: who writes what, and who restores it when."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from typing import Any

import tqdm

from benchmarks.jobs import environment
from benchmarks.peers import rotated
from benchmarks.record import Sample
from benchmarks.restore import slow_bucket, table
from benchmarks.restore.cases import STEP, WORKLOADS, Reading, Row, Writing

_ROOT = pathlib.Path(__file__).parents[2]
_HANG_S = 1800
# Of fields of lazy_orbax's reports: the house puts units into names.
_UNITS = {"_s": "s", "_bytes": "bytes"}
_KEPT = "lazy-orbax-restore"


def writers_of(rows: list[Row]) -> dict[str, list[str]]:
    """Returns, for each workload that these rows restore, who has to write it."""
    pairs = ((row.case.workload, row.case.writer_for(peer)) for row in rows for peer in row.peers)
    found: dict[str, list[str]] = {}
    for workload, writer in dict.fromkeys(pairs):
        found.setdefault(workload, []).append(writer)
    return found


class Turns:
    """Checkpoints in a directory or a bucket, and fresh processes that restore them in turns.

    Attributes:
        failures: what processes said that failed. The others go on.
    """

    def __init__(
        self,
        *,
        directory: pathlib.Path,
        size: str,
        devices: int,
        restores: int,
        latency_s: float,
        keeps: bool,
    ):
        self.failures: list[str] = []
        self._directory, self._size, self._keeps = directory.resolve(), size, keeps
        self._devices, self._restores, self._latency_s = devices, restores, latency_s
        self._stack = contextlib.ExitStack()
        self._bucket: slow_bucket.SlowBucket | None = None

    def __enter__(self) -> Turns:
        self._directory.mkdir(parents=True, exist_ok=True)
        if self._keeps:
            self._directory = self._directory / _KEPT / f"{self._size}-{self._devices}"
            self._directory.mkdir(parents=True, exist_ok=True)
        else:
            name = tempfile.mkdtemp(prefix=f"{_KEPT}-", dir=self._directory)
            self._directory = pathlib.Path(name)
            self._stack.callback(shutil.rmtree, name)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def write(self, rows: list[Row], bar: tqdm.tqdm) -> None:
        """Writes what these rows read, unless it was kept."""
        for workload, writers in writers_of(rows).items():
            bar.set_description(f"writing {workload}")
            paths = {writer: self._path(workload, writer) for writer in writers}
            if not self._is_kept(workload, paths):
                for path in paths.values():
                    shutil.rmtree(path, ignore_errors=True)
                digests = self._digests(workload)
                writing = Writing(workload=workload, size=self._size, digests=digests, paths=paths)
                self._start(writing, latency_s=0.0)
            bar.update()

    def take(self, row: Row, repeats: int, bar: tqdm.tqdm) -> list[Sample]:
        """Restores a row that often by each of its peers, each time in another order."""
        samples: list[Sample] = []
        for repeat in range(repeats):
            for peer in rotated(row.peers, repeat):
                bar.set_description(f"{row.name}, {peer}")
                reading = Reading(
                    workload=row.case.workload,
                    size=self._size,
                    digests=self._digests(row.case.workload),
                    path=self._path(row.case.workload, row.case.writer_for(peer)),
                    peer=peer,
                    target=row.target,
                    dtype=row.case.dtype,
                    restores=self._restores,
                )
                load = os.getloadavg()[0]
                found = self._start(reading, latency_s=self._latency_s)
                if found:
                    samples += self._samples(row, peer, found, load)
                bar.update()
        return samples

    def _digests(self, workload: str) -> str:
        return str(self._directory / f"{workload}.digests.json")

    def _path(self, workload: str, writer: str) -> str:
        name = f"{workload}-{writer}"
        if not WORKLOADS[workload].in_bucket:
            return str(self._directory / name)
        if self._bucket is None:
            self._bucket = self._stack.enter_context(slow_bucket.opened())
        return self._bucket.address(name)

    def _is_kept(self, workload: str, paths: dict[str, str]) -> bool:
        """Whether an earlier run left all of it: managers show only what was committed."""
        there = (pathlib.Path(path, str(STEP)).is_dir() for path in paths.values())
        return pathlib.Path(self._digests(workload)).is_file() and all(there)

    def _start(self, run: Reading | Writing, *, latency_s: float) -> Any:
        """Runs a process to its end. Returns what it said, or `None`, and notes a failure."""
        variables = environment(self._devices)
        if self._bucket is not None:
            variables |= self._bucket.environment
            self._bucket.latency_s = latency_s
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.restore.child", json.dumps(dataclasses.asdict(run))],
            cwd=_ROOT,
            env=variables,
            capture_output=True,
            text=True,
            timeout=_HANG_S,
            check=False,
        )
        if done.returncode:
            last = "\n".join(done.stderr.splitlines()[-15:])
            self.failures.append(f"{run}: the process ended with {done.returncode}:\n{last}")
            return None
        return json.loads(done.stdout)

    def _samples(
        self, row: Row, peer: str, found: list[dict[str, Any]], load: float
    ) -> list[Sample]:
        in_bucket = WORKLOADS[row.case.workload].in_bucket

        def sample(metric: str, value: float | None, unit: str, trace: Any = None) -> Sample:
            return Sample(
                part=table.PART,
                workload=row.name if not in_bucket else f"{row.name}/{1000 * self._latency_s:g}ms",
                peer=peer,
                metric=metric,
                value=value,
                unit=unit,
                trace=trace,
            )

        first = found[0]
        samples = [
            sample("peak_above", first["peak_bytes"] - first["state_bytes"], "bytes"),
            sample("peak", first["peak_bytes"], "bytes"),
            sample("state", first["state_bytes"], "bytes"),
            sample("from_storage", first["read_bytes"], "bytes"),
            sample("asked", first["asked_bytes"], "bytes"),
            sample("read_calls", first["read_calls"], "calls"),
            sample("load", load, ""),
        ]
        for name, said in zip(("first", "second"), found):
            samples.append(sample(name, said["ended_s"] - said["began_s"], "s"))
            samples.append(sample(f"{name}_cpu", said["cpu_s"], "s"))
            samples.append(sample(f"{name}_cached", said["cached_bytes"], "bytes"))
            if self._bucket is not None and in_bucket:
                requests = self._bucket.between(said["began_s"], said["ended_s"])
                of_kind = slow_bucket.kinds(requests)
                n_bytes = sum(request.n_bytes for request in requests)
                trips = slow_bucket.round_trips(requests)
                samples.append(sample(f"{name}_requests", len(requests), "requests", of_kind))
                samples.append(sample(f"{name}_round_trips", trips, "requests"))
                samples.append(sample(f"{name}_answered", n_bytes, "bytes"))
        report = first.get("report", {})
        if report:
            samples.append(sample("report", None, "text", report))
        for name, value in report.items():
            if isinstance(value, int | float):
                unit = next((u for end, u in _UNITS.items() if name.endswith(end)), "")
                samples.append(sample(f"report_{name}", value, unit))
        return samples
