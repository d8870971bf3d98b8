"""Snapshots of one process become those of several, each in the memory of its own machine."""

from __future__ import annotations

import json
import os
import pathlib
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

import lazy_orbax
from lazy_orbax.handlers.promoting import promote
from lazy_orbax.tiers.shelf import Shelf, file_of
from lazy_orbax.tiers.snapshot_file import Snapshot, SnapshotFile
from lazy_orbax.tiers.tier import Machine


def machines(above: pathlib.Path, kept: str, of: int) -> list[str]:
    """Returns the directories of keepers, of which each has the part of one process.

    Shards go round; what is not divided is on all machines.

    Args:
        above: where they are made.
        kept: the directory of a keeper of a run of one process.
        of: how many machines there are.
    """
    places = [str(above / f"machine{process}") for process in range(of)]
    for process, place in enumerate(places):
        shelf = Shelf(place)
        for _, snapshot in Shelf(kept).snapshots():
            assert isinstance(snapshot, Snapshot)
            facts = snapshot.facts
            whose = facts["run"], facts["item"], process, snapshot.serial % 2
            path = f"{shelf.path}/{file_of(*whose)}"
            _write(snapshot, path, process, of)
            assert os.stat(path).st_mode & 0o777 == 0o600
    return places


def promoted(run: str, tiers: Sequence[lazy_orbax.Tier], places: Sequence[str]) -> list[Any]:
    """Promotes on all machines at once. Returns the step, or the error, of each."""
    found: list[Any] = [None] * len(places)

    def on(i: int) -> None:
        machine = Machine((i,), len(places))
        try:
            found[i] = promote(run, tiers[i], places[i], machine)
        except (lazy_orbax.errors.LazyOrbaxError, OSError) as error:
            found[i] = error

    threads = [threading.Thread(target=on, args=(i,)) for i in range(1, len(places))]
    for thread in threads:
        thread.start()
    on(0)
    for thread in threads:
        thread.join()
    return found


def _write(snapshot: Snapshot, path: str, process: int, of: int) -> None:
    content = pathlib.Path(snapshot.path).read_bytes()
    layout, facts = dict(snapshot.layout), dict(snapshot.facts)
    digests = np.frombuffer(bytes.fromhex(facts["digests"]), "<u8")
    pieces, mine, own = layout["pieces"], [], []
    seen: dict[int, int] = {}
    for i, (leaf, _, start, shape) in enumerate(pieces):
        turn = seen[leaf] = seen.get(leaf, -1) + 1
        is_divided = shape != layout["leaves"][leaf][2]
        if is_divided and turn % of != process:
            continue
        if is_divided or leaf % of == process:
            own.append([leaf, start])
        mine.append(i)
    layout |= {"pieces": [pieces[i] for i in mine], "own": own}
    facts |= {"process": process, "processes": of, "digests": digests[mine].tobytes().hex()}
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
    file = SnapshotFile(path, len(content) + 2**16)
    file.memory[: len(content)] = np.frombuffer(content, np.uint8)
    file.seal(
        snapshot.serial, json.dumps(layout).encode(), json.dumps(facts).encode(), end=len(content)
    )
    file.close()
