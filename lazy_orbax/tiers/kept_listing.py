"""What a keeper has: its snapshots, whole or not, and what a crash left without a keeper."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import time
from typing import Any

from lazy_orbax.inspection.clean import QUIET_S, Abandoned
from lazy_orbax.tiers import messages
from lazy_orbax.tiers.keeper_link import connected
from lazy_orbax.tiers.shelf import Shelf, place_for
from lazy_orbax.tiers.snapshot_file import Snapshot
from lazy_orbax.view.blocks import Block, Column, Lines, Table
from lazy_orbax.view.text import duration_of, size_of
from lazy_orbax.view.viewed import Viewed

_ANSWER_S = 10.0
_COLUMNS = (
    Column("run"),
    Column("item"),
    Column("process", is_number=True),
    Column("step", is_number=True),
    Column("size", is_number=True),
    Column("age", is_number=True),
    Column(""),
)


@dataclasses.dataclass(frozen=True)
class KeptEntry:
    """A file of a snapshot.

    Attributes:
        path: where it is.
        n_bytes: the memory that it takes.
        age_s: seconds since it was last written to, by its own clock.
        run: whose it is; `None` where the file does not tell.
        item: of which item.
        process: of which process.
        step: of which step.
        problem: why it is no whole snapshot; `None` if it is one.
    """

    path: str
    n_bytes: int
    age_s: float
    run: str | None = None
    item: str | None = None
    process: int | None = None
    step: int | None = None
    problem: str | None = None


@dataclasses.dataclass(frozen=True)
class KeptListing(Viewed):
    """What a keeper has.

    Attributes:
        directory: where it has it.
        pid: the keeper; `None` if there is none.
        limit_bytes: most bytes of snapshots; `None` without a keeper.
        clients: the processes that are connected, each with its `run`, `process` and `pid`.
        snapshots: the files.
        tiers: the tiers of each `run`, with `path`, `every_s` and `keep`; whether something is
            being brought there (`is_busy`), and how the last try ended: `status`, 0 where the tier
            has the newest step there was, and `None` before the first.
    """

    directory: str
    pid: int | None
    limit_bytes: int | None
    clients: tuple[dict[str, Any], ...]
    snapshots: tuple[KeptEntry, ...]
    tiers: tuple[dict[str, Any], ...] = ()

    def blocks(self) -> tuple[Block, ...]:
        """Returns what there is to see."""
        rows = tuple(
            (
                one.run or "?",
                one.item or "?",
                "?" if one.process is None else str(one.process),
                "?" if one.step is None else str(one.step),
                size_of(one.n_bytes),
                duration_of(one.age_s),
                one.problem or "whole",
            )
            for one in self.snapshots
        )
        who = "no keeper"
        if self.pid is not None:
            used_bytes = sum(one.n_bytes for one in self.snapshots)
            who = (
                f"keeper {self.pid} with {len(self.clients)} processes, "
                f"{size_of(used_bytes)} of {size_of(self.limit_bytes or 0)}"
            )
        table = (Table(_COLUMNS, rows, self.directory),) if rows else ()
        tiers = [f"{one['run']} to {one['path']}: {self._state(one)}" for one in self.tiers]
        return (*table, Lines((f"{self.directory}: {who}", *tiers)))

    def _state(self, tier: dict[str, Any]) -> str:
        if tier["is_busy"]:
            return "on its way"
        told = {0: "the newest is there", None: "nothing yet"}
        return told.get(tier["status"], f"failed, see {self.directory}/keeper.log")


def kept(directory: str | None = None) -> KeptListing:
    """Returns what a keeper has, and changes nothing.

    Args:
        directory: the keeper's; `None` is this user's usual one.

    Raises:
        KeeperError: it is another user's.
    """
    place = place_for(directory)
    if not os.path.isdir(place):
        return KeptListing(place, None, None, (), ())
    shelf, told = Shelf(place), {}
    with contextlib.suppress(OSError), connected(place) as peer:
        told = messages.asked(peer, {"do": "status"}, timeout_s=_ANSWER_S)
    entries = []
    for file, snapshot in itertools.chain(shelf.snapshots(), shelf.parities()):
        path = shelf.path_of(file)
        with contextlib.suppress(FileNotFoundError):
            status = os.stat(path)
            entry = KeptEntry(path, status.st_size, max(0.0, time.time() - status.st_mtime))
            if isinstance(snapshot, Snapshot):
                facts = {name: snapshot.facts.get(name) for name in ("run", "item", "process")}
                age_s = max(0.0, time.time() - float(snapshot.facts.get("written_s", 0.0)))
                if "members" in snapshot.facts:
                    facts["item"] = f"{facts['item']} (parity)"
                entry = dataclasses.replace(entry, **facts, step=snapshot.step, age_s=age_s)
            else:
                entry = dataclasses.replace(entry, problem=str(snapshot))
            entries.append(entry)
    clients = tuple(told.get("clients", ()))
    tiers, n_bytes = tuple(told.get("tiers", ())), told.get("limit_bytes")
    return KeptListing(place, told.get("pid"), n_bytes, clients, tuple(entries), tiers)


def left_in_memory(
    run: str, *, dry_run: bool, quiet_s: float = QUIET_S, directory: str | None = None
) -> tuple[Abandoned, ...]:
    """Finds snapshots of a run that nobody looks after, and removes them if that is wanted.

    Args:
        run: the run, as `Keeper` was given it.
        dry_run: whether to remove nothing.
        quiet_s: younger ones are kept.
        directory: the keeper's.

    Raises:
        KeeperError: the directory is another user's.
    """
    listing, found = kept(directory), []
    for one in listing.snapshots:
        if one.run != run:
            continue
        why = None
        if listing.pid is not None:
            why = f"keeper {listing.pid} removes it when nobody comes back"
        elif one.age_s < quiet_s:
            why = "it was written just now"
        removed = why is None and not dry_run
        if removed:
            Shelf(listing.directory).remove(os.path.basename(one.path))
        found.append(Abandoned(one.path, one.n_bytes, one.age_s, removed, why))
    return tuple(found)


def stop(directory: str | None = None, *, discard: bool) -> bool:
    """Ends the keeper. Returns whether there was one.

    Args:
        directory: the keeper's.
        discard: whether its snapshots are removed, also where there is no keeper.
    """
    place = place_for(directory)
    if not os.path.isdir(place):
        return False
    try:
        with connected(place) as peer:
            messages.asked(peer, {"do": "stop", "discard": discard}, timeout_s=_ANSWER_S)
        return True
    except OSError:
        if discard:
            Shelf(place).remove_all()
        return False
