"""What of a run is on a shelf: snapshots, and parity of those of others, as records to send."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np

from lazy_orbax.errors import KeeperError
from lazy_orbax.tiers import messages
from lazy_orbax.tiers.keeper_link import connected
from lazy_orbax.tiers.parity.settings import NodeSettings
from lazy_orbax.tiers.shelf import GENERATIONS, Shelf, file_of, parity_file_of
from lazy_orbax.tiers.snapshot_file import (
    PAGE_BYTES,
    Snapshot,
    SnapshotError,
    SnapshotFile,
    read_memory,
    read_snapshot,
)

# Memory for it is cleared at some GB a second.
_ROOM_S = 120.0
_ROUND_BYTES = 2**20
# Which has the seal, whatever it says.
_SEAL_BYTES = 256

PARITY_BEGINS = PAGE_BYTES
"""Where the bytes of parity are in their file."""


@dataclasses.dataclass(frozen=True, order=True)
class Key:
    """Which snapshot of a process: the same on all processes of a run.

    Attributes:
        item: the item.
        step: the step.
        life: of which life of the job.
    """

    item: str
    step: int
    life: int

    @classmethod
    def told(cls, told: dict[str, Any]) -> Key:
        """Returns what a message or the facts of a snapshot say."""
        return cls(str(told["item"]), int(told["step"]), int(told["life"]))

    def fits(self, snapshot: Any) -> bool:
        """Whether a file, as the shelf reads it, is of that snapshot."""
        return isinstance(snapshot, Snapshot) and Key.told(snapshot.facts) == self


@dataclasses.dataclass(frozen=True)
class Member:
    """A member of a group, when it made parity.

    Attributes:
        process: which process it was.
        n_bytes: of its snapshot.
        serial: of its snapshot.
        digest: of the stripe that is in the parity; `None` for the one that has the parity.
    """

    process: int
    n_bytes: int
    serial: int
    digest: int | None = None


def snapshot_of(shelf: Shelf, run: str, process: int, key: Key) -> Snapshot:
    """Returns a snapshot of a process of this or of an earlier job.

    Raises:
        KeeperError: there is none.
    """
    return _first(shelf.snapshots(), "snapshot", run, process, key)


def parity_of(shelf: Shelf, run: str, process: int, key: Key) -> Snapshot:
    """Returns the parity that a process has of the others.

    Raises:
        KeeperError: there is none.
    """
    return _first(shelf.parities(), "parity", run, process, key)


def _first(
    held: Iterable[tuple[str, Any]], what: str, run: str, process: int, key: Key
) -> Snapshot:
    for _, found in held:
        if key.fits(found) and (found.facts["run"], found.facts["process"]) == (run, process):
            return found
    raise KeeperError(f"there is no {what} of process {process} at step {key.step} here")


def listing_of(shelf: Shelf, run: str) -> dict[str, list[dict[str, Any]]]:
    """Returns what of a run is on a shelf, as a message has it.

    Returns:
        `snapshots`, each with item, step, life, process, processes, serial and n_bytes; and
        `parities`, each with item, step, life, process, members and parity_digest.
    """
    told: dict[str, list[dict[str, Any]]] = {"snapshots": [], "parities": []}
    names = ("item", "step", "life", "process", "processes")
    for kind, files in (("snapshots", shelf.snapshots()), ("parities", shelf.parities())):
        for _, found in files:
            if isinstance(found, Snapshot) and found.facts["run"] == run:
                one = {name: found.facts.get(name) for name in names}
                if kind == "parities":
                    one |= {name: found.facts[name] for name in ("members", "parity_digest")}
                told[kind].append({**one, "serial": found.serial, "n_bytes": found.n_bytes})
    return told


def room_for(shelf: Shelf, file: str, n_bytes: int) -> SnapshotFile:
    """Returns a file of the shelf to write, with its seal broken. The keeper makes room for it.

    Raises:
        KeeperError: there is no room, or no keeper.
        OSError: there is no memory.
    """
    n_bytes = -(-n_bytes // _ROUND_BYTES) * _ROUND_BYTES
    try:
        with connected(shelf.path) as peer:
            ask = {"do": "room", "file": file, "n_bytes": n_bytes}
            messages.asked(peer, ask, timeout_s=_ROOM_S)
    except OSError as error:
        raise KeeperError(f"the keeper in {shelf.path} makes no room: {error}") from error
    opened = SnapshotFile(shelf.path_of(file), n_bytes, is_mapped_now=True)
    opened.break_seal()
    return opened


def parity_place(shelf: Shelf, run: str, process: int, key: Key) -> str:
    """Returns the file for new parity. That of the other snapshot here, which may be needed, stays.

    Args:
        shelf: the shelf.
        run: the run.
        process: whose parity it will be.
        key: of which snapshots it will be.
    """
    names = {file_of(run, key.item, process, i) for i in range(GENERATIONS)}
    kept = [
        Key.told(found.facts)
        for file, found in shelf.snapshots()
        if file in names and isinstance(found, Snapshot) and not key.fits(found)
    ]
    places = [parity_file_of(run, key.item, process, i) for i in range(GENERATIONS)]
    taken = {file for file, found in shelf.parities() if any(one.fits(found) for one in kept)}
    free = [place for place in places if place not in taken]
    return free[0] if free else places[0]


def rebuilt_place(shelf: Shelf, run: str, process: int, key: Key) -> tuple[str, str]:
    """Returns the file in which a lost snapshot is made, and the one that it becomes when whole."""
    names = [file_of(run, key.item, process, i) for i in range(GENERATIONS + 1)]
    serials = dict.fromkeys(names[:GENERATIONS], -1)
    for file, found in shelf.snapshots():
        if file in serials and isinstance(found, Snapshot):
            serials[file] = found.serial
    return names[-1], min(serials, key=lambda file: serials[file])


def of_others(shelf: Shelf, settings: NodeSettings, item: str, life: int) -> list[str]:
    """Returns the files of other lives, of processes that nobody on this machine is any more."""
    found = []
    for file, one in itertools.chain(shelf.snapshots(), shelf.parities()):
        if isinstance(one, Snapshot) and (one.facts["run"], one.facts["item"]) == (
            settings.run,
            item,
        ):
            process = one.facts["process"]
            is_old = one.facts["life"] != life and process != settings.process
            if is_old and not shelf.is_claimed(settings.run, process):
                found.append(file)
    return found


@dataclasses.dataclass(frozen=True)
class Opened:
    """A file that is read, as long as it is what it was.

    Attributes:
        memory: all of it.
        seal: its first bytes, when it was opened.
        begins: the first byte that is meant.
        ends: where they end.
    """

    memory: np.ndarray
    seal: bytes
    begins: int
    ends: int

    def is_as_it_was(self) -> bool:
        """Whether nobody has begun to overwrite it."""
        return self.memory[:_SEAL_BYTES].tobytes() == self.seal


def opened(found: Snapshot) -> Opened:
    """Returns the bytes of a snapshot, or of parity.

    Raises:
        SnapshotError: it is being overwritten.
        OSError: it is gone.
    """
    memory = read_memory(found.path, is_mapped_now=True)
    seal = memory[:_SEAL_BYTES].tobytes()
    if read_snapshot(found.path).serial != found.serial:
        raise SnapshotError(f"{found.path} was overwritten")
    if "parity_bytes" in found.facts:
        length = int(found.facts["parity_bytes"])
        return Opened(memory, seal, PARITY_BEGINS, PARITY_BEGINS + length)
    return Opened(memory, seal, 0, found.n_bytes)
