"""A fresh process: writes one checkpoint, or restores one as a peer does, and says what it took.

python -m benchmarks.restore.child '{"peer": "lazy", ...}'
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks import meters
from benchmarks.restore import plain_read
from benchmarks.restore.cases import RAW, STEP, TRANSFORMED, WORKLOADS, Reading, Writing
from benchmarks.restore.measure import Measured, measure

Found = list[dict[str, Any]]


def main() -> None:
    # What libraries print must not get between the lines.
    messages = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    told = json.loads(sys.argv[1])
    print(json.dumps(obey(told)), file=messages, flush=True)


def obey(told: dict[str, Any]) -> Found | None:
    """Does what the fields of a `Writing` or a `Reading` say."""
    if "paths" in told:
        return _write(Writing(**told))
    reading = Reading(**told)
    return _read_plainly(reading) if reading.peer in RAW else _restore(reading)


def _files_of(run: Reading) -> list[pathlib.Path]:
    if WORKLOADS[run.workload].in_bucket:
        return []
    return sorted(meters.files_under(pathlib.Path(run.path) / str(STEP)))


def _said(measured: Measured, state_bytes: int, **more: Any) -> dict[str, Any]:
    return {**dataclasses.asdict(measured), "state_bytes": state_bytes, **more}


def _read_plainly(run: Reading) -> Found | None:
    """Reads the files; `None` where they cannot be read in this way."""
    files = _files_of(run)
    try:
        read = plain_read.reader(run.peer, files)
    except OSError:  # tmpfs and some others have no O_DIRECT.
        return None
    found = []
    for i in range(run.restores):
        memory, measured = measure(read, files, is_first=i == 0)
        found.append(_said(measured, len(memory)))
        del memory
    return found


def _write(run: Writing) -> None:
    """Saves the state by each writer, and writes down the digests of its values."""
    from benchmarks import peers
    from benchmarks.restore import states

    state, digests = states.build(run)
    pathlib.Path(run.digests).write_text(json.dumps(digests))
    for name, path in run.paths.items():
        peer, n_bytes = peers.PEERS[name], states.bytes_of(state)
        with peers.manager(peer, path, state_bytes=n_bytes) as manager:  # type: ignore[arg-type]
            manager.save(STEP, args=peers.save_args(peer, state))
    os.sync()  # Else the page cache keeps what is not on the disk yet.


def _restore(run: Reading) -> Found:
    """Restores what was written, and compares it with what was saved.

    Raises:
        ValueError: it is something else.
    """
    import jax

    from benchmarks.restore import states, transformed

    digests = json.loads(pathlib.Path(run.digests).read_text())
    files, found, reports = _files_of(run), [], []
    of_all = transformed if run.peer == TRANSFORMED else states
    with (_into_another_tree if run.peer == TRANSFORMED else _by_manager)(run, reports) as restore:
        for i in range(run.restores):
            restored, measured = measure(
                lambda: jax.block_until_ready(restore()), files, is_first=i == 0
            )
            found.append(_said(measured, states.bytes_of(restored)))
            if leaves := of_all.wrong(run, restored, digests):
                raise ValueError(f"{len(leaves)} leaves were not restored as saved: {leaves[:10]}")
            del restored
    for said, report in zip(found, reports):
        said["report"] = _fields_of(report)
    return found


@contextlib.contextmanager
def _by_manager(run: Reading, reports: list[Any]) -> Iterator[Callable[[], Any]]:
    """Opens a manager. Yields what restores, and adds what lazy_orbax reports to a list."""
    import orbax.checkpoint as ocp

    from benchmarks import peers
    from benchmarks.restore import states

    # `stock_of_lazy` reads what lazy_orbax wrote.
    peer = peers.PEERS[run.peer.replace("_of_lazy", "_default")]
    args = peers.restore_args(peer, states.wanted(run))
    hook = {"on_restore": reports.append} if run.peer.startswith("lazy") else {}
    with ocp.CheckpointManager(run.path, item_handlers=peer.handler(0, None, **hook)) as manager:
        yield lambda: manager.restore(STEP, args=args)


@contextlib.contextmanager
def _into_another_tree(run: Reading, reports: list[Any]) -> Iterator[Callable[[], Any]]:
    """Yields what restores through transforms, and adds what lazy_orbax reports to a list."""
    from benchmarks.restore import transformed
    from lazy_orbax import LazyOptions, load  # Importing it is no part of a restore.

    path = pathlib.Path(run.path) / str(STEP)
    like, rules = transformed.wanted(run), transformed.rules_of(run)
    options = LazyOptions(on_restore=reports.append)
    yield lambda: load(path, like, transforms=rules, options=options)


def _fields_of(report: Any) -> dict[str, Any]:
    """Returns what a report of lazy_orbax says, as JSON."""
    fields = dataclasses.asdict(report) if dataclasses.is_dataclass(report) else vars(report)
    return json.loads(json.dumps(fields, default=str))


if __name__ == "__main__":
    main()
