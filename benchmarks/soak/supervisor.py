"""The supervisor of a soak: starts training processes, ends them, and spoils what they left."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import random
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

from benchmarks.jobs import environment
from benchmarks.soak import counted
from benchmarks.soak.ledger import ENDED, Ledger
from benchmarks.soak.training import KEPT, READY, SHAPES, Options, balloon_of

_ROOT = pathlib.Path(__file__).parents[2]
_DEVICES = 4
_START_S, _END_S = 180, 120
# Room for the steps that are kept, the one in flight and one that was not removed yet; a balloon
# fills it.
_SMALL_DISK_BYTES = 96 * 2**20


def soak(directory: pathlib.Path, minutes: float, seed: int) -> tuple[counted.Counted, bool]:
    """Runs for so long.

    Returns:
        What was counted, and whether a disk could be filled.
    """
    rng, end = random.Random(seed), time.monotonic() + 60 * minutes
    with _small_disk() as small:
        places = [(directory / shape, shape) for shape in SHAPES]
        places += [(small / "run", "large")] if small else []
        runs = []
        for number, (place, shape) in enumerate(places):
            place.mkdir(parents=True, exist_ok=True)
            runs.append((place, directory / f"ledger-{number}.jsonl", shape, place.parent == small))
        while time.monotonic() < end:
            _episode(rng, drawn(rng, *rng.choice(runs)))
        for run in runs:
            _run(dataclasses.replace(drawn(rng, *run), seconds=0), rng, "left alone")
    return counted.counted(Ledger(ledger) for _, ledger, _, _ in runs), small is not None


@contextlib.contextmanager
def _small_disk() -> Iterator[pathlib.Path | None]:
    """Mounts a small file system in memory, or says why it cannot."""
    place = pathlib.Path(tempfile.mkdtemp(prefix="soak"))
    size = f"size={_SMALL_DISK_BYTES}"
    command = ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(place)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        failure = done.stderr.strip() if done.returncode else ""
    except OSError as error:
        failure = str(error)
    if failure:
        print(f"No episodes of a full disk: {failure}", file=sys.stderr)
        place.rmdir()
        yield None
        return
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
        place.rmdir()


def drawn(
    rng: random.Random,
    directory: pathlib.Path,
    ledger: pathlib.Path,
    shape: str,
    small_disk: bool = False,
) -> Options:
    """Returns random options for a process that trains in `directory`."""
    return Options(
        directory=str(directory),
        ledger=str(ledger),
        shape=shape,
        seed=rng.randrange(2**32),
        seconds=rng.uniform(5, 20),
        small_disk=small_disk,
        flipped=None,
        mode=rng.choice(("auto", "stage", "direct")),
        host_bytes=rng.choice((4, 16, 256)) * 2**20,
        write_bytes_per_s=rng.choice((None, None, 20 * 2**20)),
        keywords={
            "use_ocdbt": rng.random() < 0.7,
            "use_zarr3": rng.random() < 0.4,
            "use_compression": rng.random() < 0.3,
        },
        logs=rng.random() < 0.5,
    )


def _episode(rng: random.Random, options: Options) -> None:
    """Runs one training process, or lets one look at a step of which a byte was changed."""
    if rng.random() < 0.2:
        with _flipped(rng, pathlib.Path(options.directory)) as step:
            _run(dataclasses.replace(options, flipped=step, seconds=0), rng, "left alone")
    else:
        endings = ("killed", "terminated", "left alone", "killed early")
        _run(options, rng, rng.choices(endings, (60, 20, 10, 10))[0])


@contextlib.contextmanager
def _flipped(rng: random.Random, directory: pathlib.Path) -> Iterator[int | None]:
    """Changes a byte of a step that is kept and is not the newest one, and puts it back."""
    steps = sorted(int(path.name) for path in directory.glob("*") if path.name.isdigit())
    if len(steps) < 2:
        yield None
        return
    step = rng.choice(steps[-KEPT:-1])
    found = sorted((directory / str(step)).rglob("*"))
    file = rng.choice([one for one in found if one.is_file() and one.stat().st_size])
    position, bit = rng.randrange(file.stat().st_size), 1 << rng.randrange(8)
    _flip(file, position, bit)
    try:
        yield step
    finally:
        _flip(file, position, bit)


def _flip(file: pathlib.Path, position: int, bit: int) -> None:
    with file.open("r+b") as opened:
        opened.seek(position)
        byte = opened.read(1)[0]
        opened.seek(position)
        opened.write(bytes([byte ^ bit]))


def _run(options: Options, rng: random.Random, ending: str) -> None:
    """Runs a training process, ends it, and notes how that went."""
    # One that was killed may have left its balloon.
    balloon_of(options.directory).unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.soak", "--train"]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [*command, json.dumps(dataclasses.asdict(options))],
            env=environment(_DEVICES),
            cwd=_ROOT,
            stdout=subprocess.PIPE,
            stderr=errors,
        )
        try:
            how = _ended(process, options, rng, ending)
        except subprocess.TimeoutExpired:
            how = "hung"
        finally:
            process.kill()
            process.wait()
        errors.seek(0)
        said = {} if how in counted.ENDINGS else {"last": errors.read()[-2000:]}
    Ledger(pathlib.Path(options.ledger)).note(ENDED, ending=how, **said)


def _ended(
    process: subprocess.Popen[bytes], options: Options, rng: random.Random, ending: str
) -> str:
    """Lets a process run, ends it, and returns how that went.

    Raises:
        subprocess.TimeoutExpired: it hung.
    """
    # Some are killed while they restore.
    if ending != "killed early" and not _is_ready(process):
        return f"failed to start, with {process.wait(_END_S)}"
    if ending == "left alone":
        process.wait(options.seconds + _END_S)
    else:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(rng.uniform(0.1, options.seconds))
        process.send_signal(signal.SIGTERM if ending == "terminated" else signal.SIGKILL)
        process.wait(_END_S)
    if process.returncode == -signal.SIGKILL and ending in ("killed", "killed early"):
        return counted.KILLED
    # It may have come to its end before it was to be killed.
    return f"ended with {process.returncode}" if process.returncode else _by_itself(ending)


def _by_itself(ending: str) -> str:
    return "terminated" if ending == "terminated" else "left alone"


def _is_ready(process: subprocess.Popen[bytes]) -> bool:
    """Waits until a process has checked all that is there; false where it ended before.

    Raises:
        subprocess.TimeoutExpired: it hung.
    """
    assert process.stdout is not None
    if not select.select([process.stdout], [], [], _START_S)[0]:
        raise subprocess.TimeoutExpired(process.args, _START_S)
    return process.stdout.readline().strip() == READY.encode()
