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
from benchmarks.restore import slow_bucket
from benchmarks.restore.cases import STEP, WORKLOADS, Reading, Row, Writing
from benchmarks.restore.samples import samples_of

_ROOT = pathlib.Path(__file__).parents[2]
_HANG_S = 1800
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
                for path in () if WORKLOADS[workload].in_bucket else paths.values():
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
                    name = row.name
                    if WORKLOADS[row.case.workload].in_bucket:
                        name = f"{name}/{1000 * self._latency_s:g}ms"
                        self._count(found)
                    samples += samples_of(name, peer, found, load=load)
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
        told = json.dumps(dataclasses.asdict(run))
        try:
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.restore.child", told],
                cwd=_ROOT,
                env=variables,
                capture_output=True,
                text=True,
                timeout=_HANG_S,
                check=True,
            )
        except subprocess.CalledProcessError as error:
            last = "\n".join(error.stderr.splitlines()[-15:])
            self.failures.append(f"{run}: {error}\n{last}")
            return None
        except subprocess.TimeoutExpired as error:
            self.failures.append(f"{run}: {error}")
            return None
        return json.loads(done.stdout)

    def _count(self, found: list[dict[str, Any]]) -> None:
        """Adds what came to the bucket during each of these restores."""
        assert self._bucket is not None
        for said in found:
            requests = self._bucket.between(said["began_s"], said["ended_s"])
            said["requests"] = len(requests)
            said["round_trips"] = slow_bucket.round_trips(requests)
            said["answered_bytes"] = sum(request.n_bytes for request in requests)
            said["kinds"] = slow_bucket.kinds(requests)
