"""Trains, saves, kills and restarts for as long as one likes, and counts what was lost or wrong.

python -m benchmarks.soak --minutes 30 --directory /disk/soak --out benchmarks/results/soak.jsonl

A supervisor starts a training process with random options, ends it at a random moment (SIGKILL,
SIGTERM, or not at all) and starts the next in the same directory. Before it trains, each process
restores every step that must be there, by stock Orbax and by lazy_orbax in turns, and compares its
bits with those that were noted in a ledger when it was saved. Now and then the disk is full while
a save is in flight, and a byte of an older step is changed before a restart and put back after it.
Fails where a committed step is lost or a restored one is wrong.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import lazy_orbax
from benchmarks import record
from benchmarks.jobs import environment

_DEVICES = 4
_KEPT = 4
_START_S, _END_S = 180, 120
# Room for the steps that are kept, the one in flight and one that was not removed yet; a balloon
# fills it.
_SMALL_DISK_BYTES = 96 * 2**20
SHAPES = ("many", "large", "mixed")
# What is noted of a step in the ledger, and of a process.
_SAVING, _COMMITTED, _FAILED = "saving", "committed", "failed"
_RESTORED, _LOST, _WRONG = "restored", "lost", "wrong"
_HALF_RETIRED = "half retired"
_DETECTED, _HARMLESS, _SILENT = "flip detected", "flip harmless", "flip silent"


class Ledger:
    """An append-only file of what is known; each line is on the disk before anything else happens.

    It lies outside of what is killed, filled and spoiled.
    """

    def __init__(self, path: pathlib.Path):
        self._path = path

    def note(self, event: str, **fields: Any) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps({"event": event, **fields}) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        lines = self._path.read_text().splitlines()
        # A process that was killed may have left half a line.
        found = []
        for line in lines:
            with contextlib.suppress(json.JSONDecodeError):
                found.append(json.loads(line))
        return found


# The training process.


def state_of(shape: str) -> Any:
    """Returns a state over all devices: 200 small leaves, 4 of 2 MiB, or one of each kind."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))

    def put(array: Any, *spec: Any) -> jax.Array:
        return jax.device_put(array, NamedSharding(mesh, P(*spec)))

    rng = np.random.default_rng(0)
    if shape == "many":
        arrays = rng.integers(0, 2**32, (200, 64, 16), dtype=np.uint32)
        return {f"leaf_{i}": {"kernel": put(one, "x")} for i, one in enumerate(arrays)}
    if shape == "large":
        arrays = rng.integers(0, 2**32, (4, 512, 1024), dtype=np.uint32)
        return [put(one, None, "x") for one in arrays]
    return {
        "half": put(rng.integers(0, 2**16, (256, 64), dtype=np.uint16), "x"),
        "bytes": put(rng.integers(0, 2**8, (33, 7), dtype=np.uint8)),
        "count": put(np.uint32(0)),
        "nested": [{"w": put(rng.integers(0, 2**32, (8, n), dtype=np.uint32))} for n in (1, 3, 5)],
    }


@jax.jit
def _copied(state: Any) -> Any:
    return jax.tree.map(jnp.copy, state)


@dataclasses.dataclass(frozen=True)
class Options:
    """What one training process does: all of it drawn by the supervisor."""

    directory: str
    ledger: str
    shape: str
    seed: int
    seconds: float
    small_disk: bool
    flipped: int | None
    mode: str
    host_bytes: int
    write_bytes_per_s: int | None
    keywords: dict[str, bool]


def digest_of(state: Any) -> str:
    """Returns a digest of every leaf's bits, key path, shape and dtype."""
    digest = hashlib.blake2b(digest_size=16)
    for path, leaf in jax.tree_util.tree_leaves_with_path(_copied(state)):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _check(options: Options, ledger: Ledger, target: Any) -> None:
    """Restores all that must be there, and notes what is lost or wrong."""
    events = ledger.read()
    digests: dict[int, set[str]] = {}
    known: list[int] = []
    for event in events:
        if event["event"] == _SAVING:
            digests.setdefault(event["step"], set()).add(event["digest"])
        elif event["event"] == _COMMITTED and event["step"] not in known:
            known.append(event["step"])
    with ocp.CheckpointManager(options.directory) as manager:
        listed = set(manager.all_steps())
    # A later step may have been committed, and an older one retired, without anybody noting it.
    kept = sorted(listed | set(known))[-_KEPT:]
    for step in kept:
        if step in known and step not in listed:
            ledger.note(_LOST, step=step, why="it is not listed")
    rng = random.Random(options.seed)
    for step in sorted(listed):
        flipped = step == options.flipped
        # Stock Orbax does not notice a changed byte, and need not.
        stock = rng.random() < 0.5 and not flipped
        handler = ocp.StandardCheckpointHandler() if stock else lazy_orbax.standard_handler()
        path = pathlib.Path(options.directory) / str(step) / "default"
        try:
            with ocp.Checkpointer(handler) as checkpointer:
                found = checkpointer.restore(path, args=ocp.args.StandardRestore(target))
        except Exception as error:  # noqa: BLE001
            # Killed while it removes an old step, Orbax leaves a part of it, listed.
            fate = _LOST if step in kept else _HALF_RETIRED
            fate = _DETECTED if flipped else fate
            ledger.note(fate, step=step, kept=kept, why=repr(error)[:500])
            continue
        is_right = digest_of(found) in digests.get(step, set())
        if flipped:
            ledger.note(_HARMLESS if is_right else _SILENT, step=step, stock=stock)
        else:
            ledger.note(_RESTORED if is_right else _WRONG, step=step, stock=stock)


def train(options: Options) -> None:
    """Checks what is there, goes on from the newest step, and saves often."""
    logging.disable()  # Orbax tells of every save.
    ledger = Ledger(pathlib.Path(options.ledger))
    leave: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: leave.append(1))
    state = state_of(options.shape)
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    _check(options, ledger, target)
    print("ready", flush=True)
    if options.seconds <= 0:
        return
    change = jax.jit(
        lambda tree: jax.tree.map(lambda x: x * x.dtype.type(3) + x.dtype.type(1), tree),
        donate_argnums=0,
    )
    lazy = lazy_orbax.standard_handler(
        options=lazy_orbax.LazyOptions(
            mode=options.mode,  # type: ignore[arg-type]
            host_bytes=options.host_bytes,
            slab_bytes=2**20,
            write_bytes_per_s=options.write_bytes_per_s,
        ),
        **options.keywords,
    )
    manager_options = ocp.CheckpointManagerOptions(max_to_keep=_KEPT, cleanup_tmp_directories=True)
    end = time.monotonic() + options.seconds
    with ocp.CheckpointManager(
        options.directory, item_handlers=lazy, options=manager_options
    ) as manager:
        step = manager.latest_step() or 0
        if step and step != options.flipped:
            state = manager.restore(step, args=ocp.args.StandardRestore(target))
        loop = _Loop(options, ledger, manager, change)
        while time.monotonic() < end and not leave:
            for _ in range(loop.rng.randrange(1, 4)):
                state, step = change(state), step + 1
            state = loop.save(step, state)
            step += 1
        loop.finish()


class _Loop:
    """Saves, and notes what is known to be committed."""

    def __init__(self, options: Options, ledger: Ledger, manager: Any, change: Any):
        self._options, self._ledger, self._manager = options, ledger, manager
        self._change, self._pending = change, None
        self.rng = random.Random(options.seed)

    def save(self, step: int, state: Any) -> Any:
        """Begins to save, at times on a disk that is full, and returns the next state."""
        self._ledger.note(_SAVING, step=step, digest=digest_of(state), bytes=_bytes_of(state))
        is_full = self._options.small_disk and self.rng.random() < 0.1
        with _full(self._options.directory) if is_full else contextlib.nullcontext():
            try:
                self._manager.save(step, args=ocp.args.StandardSave(state))
                self._note_committed()  # `save` waited for the one before.
                self._pending = step
                state = self._change(state)
                if is_full or self.rng.random() < 0.3:
                    self._manager.wait_until_finished()
                    self._note_committed()
            except Exception as error:  # noqa: BLE001
                self._note_failed(step, error)
        return state

    def finish(self) -> None:
        try:
            self._manager.wait_until_finished()
            self._note_committed()
        except Exception as error:  # noqa: BLE001
            self._note_failed(self._pending, error)

    def _note_committed(self) -> None:
        if self._pending is not None:
            self._ledger.note(_COMMITTED, step=self._pending)
        self._pending = None

    def _note_failed(self, step: int | None, error: Exception) -> None:
        expected = self._options.small_disk
        self._ledger.note(_FAILED, step=step, expected=expected, why=repr(error)[:500])
        self._pending = None


def _bytes_of(state: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state))


@contextlib.contextmanager
def _full(directory: str) -> Iterator[None]:
    """Fills the small disk up to some random rest."""
    balloon = pathlib.Path(directory).parent / "balloon"
    found = os.statvfs(directory)
    free = found.f_bavail * found.f_frsize
    # A save in flight may have taken what was free: then the disk is full already.
    with contextlib.suppress(OSError), balloon.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, free - random.randrange(2**21)))
    try:
        yield
    finally:
        balloon.unlink()


# The supervisor.


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


def _drawn(
    rng: random.Random, directory: pathlib.Path, ledger: pathlib.Path, shape: str
) -> Options:
    return Options(
        directory=str(directory),
        ledger=str(ledger),
        shape=shape,
        seed=rng.randrange(2**32),
        seconds=rng.uniform(5, 20),
        small_disk=False,
        flipped=None,
        mode=rng.choice(("auto", "stage", "direct")),
        host_bytes=rng.choice((4, 16, 256)) * 2**20,
        write_bytes_per_s=rng.choice((None, None, 20 * 2**20)),
        keywords={
            "use_ocdbt": rng.random() < 0.7,
            "use_zarr3": rng.random() < 0.4,
            "use_compression": rng.random() < 0.3,
        },
    )


@contextlib.contextmanager
def _flipped(rng: random.Random, directory: pathlib.Path) -> Iterator[int | None]:
    """Changes a byte of a step that is not the newest one, and puts it back."""
    steps = sorted(int(path.name) for path in directory.glob("*") if path.name.isdigit())
    files = []
    if len(steps) > 1:
        step = rng.choice(steps[:-1])
        files = [f for f in (directory / str(step)).rglob("*") if f.is_file() and f.stat().st_size]
    if not files:
        yield None
        return
    file = rng.choice(files)
    position, bit = rng.randrange(file.stat().st_size), 1 << rng.randrange(8)
    _flip(file, position, bit)
    try:
        yield step
    finally:
        if file.exists():  # It may have been retired.
            _flip(file, position, bit)


def _flip(file: pathlib.Path, position: int, bit: int) -> None:
    with file.open("r+b") as opened:
        opened.seek(position)
        byte = opened.read(1)[0]
        opened.seek(position)
        opened.write(bytes([byte ^ bit]))


def _run(options: Options, rng: random.Random, ending: str) -> str:
    """Runs a training process, and ends it. Returns how that went."""
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "benchmarks.soak",
            "--train",
            json.dumps(dataclasses.asdict(options)),
        ],
        env=environment(_DEVICES),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        # Some are killed while they restore.
        if ending != "killed early" and process.stdout.readline().strip() != "ready":
            process.wait(_START_S)
            return "failed to start"
        if ending == "left alone":
            process.wait(options.seconds + _END_S)
        else:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(rng.uniform(0.1, options.seconds))
            process.send_signal(signal.SIGTERM if ending == "terminated" else signal.SIGKILL)
            process.wait(_END_S)
    except subprocess.TimeoutExpired:
        return "hung"
    finally:
        process.kill()
        process.wait()
    expected = 0 if ending in ("left alone", "terminated") else -signal.SIGKILL
    return ending if process.returncode in (0, expected) else f"ended with {process.returncode}"


def _episode(
    rng: random.Random,
    place: pathlib.Path,
    shape: str,
    ledger: pathlib.Path,
    small: pathlib.Path | None,
) -> str:
    """Runs one training process, or lets one look at a step of which a byte was changed."""
    options = _drawn(rng, place, ledger, shape)
    options = dataclasses.replace(options, small_disk=place.parent == small)
    if rng.random() < 0.2:
        with _flipped(rng, place) as step:
            options = dataclasses.replace(options, flipped=step, seconds=0)
            return _run(options, rng, "left alone")
    endings = ("killed", "terminated", "left alone", "killed early")
    return _run(options, rng, rng.choices(endings, (60, 20, 10, 10))[0])


def soak(directory: pathlib.Path, minutes: float, seed: int) -> dict[str, Any]:
    """Runs for so long, and returns what was counted."""
    rng, endings = random.Random(seed), collections.Counter()
    end, total = time.monotonic() + 60 * minutes, collections.Counter()
    examples: list[dict[str, Any]] = []
    with _small_disk() as small:
        places = [(directory / shape, shape) for shape in SHAPES]
        places += [(small / "run", "large")] if small else []
        ledgers = [directory / f"ledger-{number}.jsonl" for number in range(len(places))]
        for place, _ in places:
            place.mkdir(parents=True, exist_ok=True)
        while time.monotonic() < end:
            number = rng.randrange(len(places))
            endings[_episode(rng, *places[number], ledgers[number], small)] += 1
        for (place, shape), ledger in zip(places, ledgers, strict=True):
            options = _drawn(rng, place, ledger, shape)
            endings[_run(dataclasses.replace(options, seconds=0), rng, "left alone")] += 1
    for ledger in map(Ledger, ledgers):
        for event in ledger.read():
            unexpected = event["event"] == _FAILED and not event["expected"]
            total[event["event"] + (" unexpectedly" if unexpected else "")] += 1
            if event["event"] == _SAVING:
                total["bytes"] += event["bytes"]
            if unexpected or event["event"] in (_LOST, _WRONG, _SILENT):
                examples.append(event)
    return {
        "part": "soak",
        "seed": seed,
        "minutes": minutes,
        "full_disk": small is not None,
        "counts": dict(total),
        "processes": dict(endings),
        "lost": total[_LOST],
        "wrong": total[_WRONG],
        "examples": examples[:20],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", type=pathlib.Path, default=None, help="an empty one")
    parser.add_argument("--out", type=pathlib.Path, help="JSON lines; appended to")
    parser.add_argument("--train", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        train(Options(**json.loads(arguments.train)))
        return 0
    with tempfile.TemporaryDirectory(dir=arguments.directory) as scratch:
        directory = pathlib.Path(scratch)
        result = soak(directory, arguments.minutes, arguments.seed)
        context = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "versions": record.versions(),
            "hardware": record.hardware(directory, "cpu"),
        }
    if arguments.out:
        record.append(arguments.out, [result | context])
    print(json.dumps(result | context, indent=1))
    # Before there are digests a changed byte may go unnoticed; after that never.
    silent = result["counts"].get(_SILENT, 0) if hasattr(lazy_orbax, "verify") else 0
    return 1 if result["lost"] or result["wrong"] or silent else 0


if __name__ == "__main__":
    raise SystemExit(main())
