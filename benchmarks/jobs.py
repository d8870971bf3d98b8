"""Jobs: what one fresh process measures, and how it is started."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from benchmarks.record import Sample

_ROOT = pathlib.Path(__file__).parents[1]
_DEVICE_FLAG = "--xla_force_host_platform_device_count"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What the user asked for.

    Attributes:
        directory: where checkpoints are written, and removed again.
        size: `full`, `small` or `tiny`.
        repeats: how often everything is measured.
        peers: names from `peers.PEERS`; empty for those that the part compares by itself.
        workloads: names from `workloads.WORKLOADS`, or for `gpu` the names of its measurements;
            empty for all that the part has.
        steps: names from `workloads.STEPS`; empty for all.
        gigabytes: of state, for `gpu`; `None` is what the size says.
        devices: CPU devices to emulate; 0 takes the devices that there are.
    """

    directory: str
    size: str = "full"
    repeats: int = 5
    peers: tuple[str, ...] = ()
    workloads: tuple[str, ...] = ()
    steps: tuple[str, ...] = ()
    gigabytes: float | None = None
    devices: int = 4

    def peers_or(self, *default: str) -> tuple[str, ...]:
        return self.peers or default

    def workloads_of(self, *known: str) -> tuple[str, ...]:
        return tuple(name for name in known if name in (self.workloads or known))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What one process measures.

    Attributes:
        part: the module that measures it.
        settings: what the user asked for.
        workload: the state, as the part understands it.
        peers: who saves in this process, in turns.
        devices: how many CPU devices are emulated; 0 takes the devices that there are.
        ticks: how often the process reports progress.
        step: the kind of step between saves, for the parts that have one.
    """

    part: str
    settings: Settings
    workload: str
    peers: tuple[str, ...]
    devices: int
    ticks: int = 1
    step: str = "idle"

    @property
    def title(self) -> str:
        peers = f" {self.peers[0]}" if len(self.peers) == 1 else ""
        return f"{self.part} {self.workload}{peers}"


@dataclasses.dataclass(frozen=True)
class Channel:
    """Where a measuring process says what it found: a line of JSON for each message."""

    job: Job
    file: TextIO

    def _send(self, **message: Any) -> None:
        print(json.dumps(message), file=self.file, flush=True)

    def sample(
        self, peer: str, metric: str, value: Any, unit: str = "s", *, trace: Any = None
    ) -> None:
        workload = self.job.workload
        if self.job.part == "stall":
            workload = f"{workload}/{self.job.step}"
        sample = Sample(
            part=self.job.part,
            workload=workload,
            peer=peer,
            metric=metric,
            value=value,
            unit=unit,
            trace=trace,
        )
        self._send(sample=dataclasses.asdict(sample))

    def accelerator(self, kind: str) -> None:
        self._send(accelerator=kind)

    def tick(self) -> None:
        self._send(tick=True)


def run(job: Job, on_tick: Callable[[], None]) -> tuple[list[Sample], str]:
    """Measures `job` in a fresh process.

    Returns:
        What it found, and the kind of accelerator it ran on.

    Raises:
        RuntimeError: the process failed; the message ends with the last lines that it printed.
    """
    with (
        tempfile.TemporaryFile("w+") as errors,
        # Nothing stays, even of a process that was killed.
        tempfile.TemporaryDirectory(prefix="lazy-orbax-", dir=job.settings.directory) as directory,
    ):
        settings = dataclasses.replace(job.settings, directory=directory)
        fields = dataclasses.asdict(dataclasses.replace(job, settings=settings))
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.jobs", json.dumps(fields)],
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment(job.devices),
            cwd=_ROOT,
            text=True,
        )
        try:
            found = _listen(process, on_tick)
        except BaseException:
            process.kill()
            process.wait()
            raise
        if status := process.wait():
            errors.seek(0)
            last = "".join(errors.readlines()[-15:])
            raise RuntimeError(f"{job.title}: the process ended with {status}:\n{last}")
    return found


def _listen(process: subprocess.Popen[str], on_tick: Callable[[], None]) -> tuple[Any, str]:
    """Reads what a process says until it ends."""
    samples: list[Sample] = []
    accelerator = "unknown"
    assert process.stdout is not None
    for line in process.stdout:
        message = json.loads(line)
        if "sample" in message:
            samples.append(Sample(**message["sample"]))
        elif "accelerator" in message:
            accelerator = message["accelerator"]
        else:
            on_tick()
    return samples, accelerator


def environment(devices: int) -> dict[str, str]:
    """The environment of a process with that many emulated CPU devices, or with the real ones."""
    flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if not f.startswith(_DEVICE_FLAG)]
    if not devices:
        return os.environ | {"XLA_FLAGS": " ".join(flags)}
    flags.append(f"{_DEVICE_FLAG}={devices}")
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags)}


@contextlib.contextmanager
def scratch(settings: Settings) -> Iterator[pathlib.Path]:
    """A fresh directory for checkpoints, gone afterwards; nothing is left to be written back."""
    directory = pathlib.Path(tempfile.mkdtemp(dir=settings.directory))
    os.sync()
    try:
        yield directory
    finally:
        shutil.rmtree(directory)
        os.sync()


def _main() -> None:
    # What libraries print must not get between the messages.
    messages = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    fields = json.loads(sys.argv[1])
    settings = fields.pop("settings")
    for asked in ("peers", "workloads"):
        settings[asked] = tuple(settings[asked])
    fields["peers"] = tuple(fields["peers"])
    job = Job(settings=Settings(**settings), **fields)
    channel = Channel(job, messages)

    import jax

    channel.accelerator(jax.devices()[0].device_kind)
    importlib.import_module(f"benchmarks.{job.part}").measure(job, channel)


if __name__ == "__main__":
    _main()
