"""Which steps are whole somewhere, or can be made whole? From what each process says that it has.

Nothing is asked or moved here: whoever has the listings of all comes to the same answer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lazy_orbax.tiers.parity.files import Key, Member

# In place of the address of a machine: this one.
_HERE = ""


@dataclasses.dataclass(frozen=True)
class Source:
    """A member of the group of a lost snapshot, and who has what of it.

    Attributes:
        process: the member.
        n_bytes: of its snapshot.
        snapshot: the address of who has it; `None`: it is the one that was lost.
        parity: the address of who has its parity.
        parity_digest: of its parity.
        digests: of the stripe of each member in it.
    """

    process: int
    n_bytes: int
    snapshot: str | None = None
    parity: str | None = None
    parity_digest: int | None = None
    digests: tuple[int | None, ...] = ()


@dataclasses.dataclass(frozen=True)
class Lost:
    """A snapshot that is not where its process is now, and how to make it.

    Attributes:
        key: which.
        process: whose it is.
        at: the process that wants it: on its machine it is made.
        n_bytes: of it.
        serial: of it.
        copy: the address of a machine that has it; `None`: it is to be made from parity.
        sources: the members of its group.
    """

    key: Key
    process: int
    at: int
    n_bytes: int
    serial: int
    copy: str | None = None
    sources: tuple[Source, ...] = ()

    def as_message(self) -> dict[str, Any]:
        """Returns it for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def told(cls, told: Mapping[str, Any]) -> Lost:
        """Returns what a message says."""
        sources = tuple(
            Source(**{**source, "digests": tuple(source["digests"])}) for source in told["sources"]
        )
        return cls(**{**told, "key": Key.told(told["key"]), "sources": sources})


@dataclasses.dataclass(frozen=True)
class Plan:
    """A step of which all snapshots are there, or can be made.

    Attributes:
        step: the step.
        life: of which life of the job.
        lost: what is to be made.
    """

    step: int
    life: int
    lost: tuple[Lost, ...]


@dataclasses.dataclass(frozen=True)
class _Held:
    """What all machines have: by what it is, who has it, and what that one says of it."""

    snapshots: dict[tuple[Key, int], dict[str, Mapping[str, Any]]]
    parities: dict[tuple[Key, int], dict[str, Mapping[str, Any]]]

    @classmethod
    def of(cls, listings: Sequence[Mapping[str, Any]]) -> _Held:
        found: tuple[Any, Any] = ({}, {})
        for listing in listings:
            for held, name in zip(found, ("snapshots", "parities")):
                for one in listing[name]:
                    who = held.setdefault((Key.told(one), one["process"]), {})
                    # Of two that are the same, the first is what the machine would send.
                    who.setdefault(listing["address"], one)
        return cls(*found)


def plans(
    listings: Sequence[Mapping[str, Any]], items: Iterable[str], newer_than: int | None
) -> tuple[list[Plan], dict[int, str]]:
    """Returns the steps that all processes can have, and why not the others.

    Those of the latest life of the job come first, the newest of each life first.

    Args:
        listings: of each process, what its machine has (`files.listing_of`), and its `address`.
        items: those that are wanted.
        newer_than: older steps are of no use.
    """
    held, wanted = _Held.of(listings), sorted(items)
    steps = {(key.step, key.life) for key, _ in (*held.snapshots, *held.parities)}
    found, missing = [], {}
    for step, life in steps:
        if newer_than is not None and step < newer_than:
            continue
        n_then = _how_many(held, step, life, len(listings))
        if n_then is None:
            missing[step] = "its processes do not agree on how many they were"
            continue
        lost, problems = [], []
        for key in (Key(item, step, life) for item in wanted):
            for at, process in _wants(n_then, len(listings)):
                one = _looked_for(held, listings, key, process, at)
                if isinstance(one, str):
                    problems.append(one)
                    continue
                if one.copy != _HERE:
                    lost.append(one)
        if problems:
            missing[step] = "; ".join(dict.fromkeys(problems[:3]))
        else:
            found.append(Plan(step, life, tuple(lost)))
    found.sort(key=lambda plan: (plan.life, plan.step), reverse=True)
    return found, missing


def _wants(n_then: int, n: int) -> list[tuple[int, int]]:
    """Returns which process wants the snapshots of which: those of its own part of the row.

    Processes stand in a row, then as now, and what is sharded lies along it. That is so wherever
    the mesh has the processes in their order, along the first axis that something is sharded over.
    """
    parts = [range(at * n_then // n, -(-(at + 1) * n_then // n)) for at in range(n)]
    return [(at, process) for at, part in enumerate(parts) for process in part]


def _how_many(held: _Held, step: int, life: int, n: int) -> int | None:
    """Returns how many processes had a step: `n` where nobody says, `None` where they differ."""
    said = {
        one.get("processes")
        for (key, _), who in held.snapshots.items()
        for one in who.values()
        if (key.step, key.life) == (step, life)
    }
    return (said or {n}).pop() if len(said) <= 1 else None


def _looked_for(
    held: _Held, listings: Sequence[Mapping[str, Any]], key: Key, process: int, at: int
) -> Lost | str:
    """Returns where a snapshot is, or how to make it; or what is missing for that."""
    holders = held.snapshots.get((key, process), {})
    mine = [
        one
        for one in listings[at]["snapshots"]
        if Key.told(one) == key and one["process"] == process
    ]
    for address, one in ((_HERE, mine[0]),) if mine else tuple(holders.items())[:1]:
        return Lost(key, process, at, one["n_bytes"], one["serial"], copy=address)
    groups: dict[tuple[int, ...], tuple[Member, ...]] = {}
    for (other, _), who in held.parities.items():
        for one in who.values():
            members = tuple(Member(**member) for member in one["members"])
            numbers = tuple(member.process for member in members)
            if other == key and process in numbers:
                groups[numbers] = members
    why = f"the snapshot of process {process} is nowhere, and nobody has parity of it"
    for members in groups.values():
        sources = _from_group(held, key, process, members)
        if not isinstance(sources, str):
            (mine,) = (member for member in members if member.process == process)
            return Lost(key, process, at, mine.n_bytes, mine.serial, sources=sources)
        why = sources
    return why


def _from_group(
    held: _Held, key: Key, process: int, members: tuple[Member, ...]
) -> tuple[Source, ...] | str:
    """Returns what of a group makes the snapshot of a member again, or what it misses."""
    sources, missing, numbers = [], [], [member.process for member in members]
    for member in members:
        if member.process == process:
            sources.append(Source(process, member.n_bytes))
            continue
        snapshots = held.snapshots.get((key, member.process), {})
        parities = {
            where: one
            for where, one in held.parities.get((key, member.process), {}).items()
            if [other["process"] for other in one["members"]] == numbers
        }
        for what, who in (("snapshot", snapshots), ("parity", parities)):
            if not who:
                missing.append(f"the {what} of process {member.process}")
        for where, parity in tuple(parities.items())[:1]:
            digests = tuple(one["digest"] for one in parity["members"])
            source = Source(
                member.process,
                member.n_bytes,
                next(iter(snapshots), None),
                where,
                parity["parity_digest"],
                digests,
            )
            sources.append(source)
    if missing:
        return (
            f"the snapshot of process {process} is nowhere, and of its group "
            f"{numbers} there is not {', '.join(missing)}"
        )
    return tuple(sources)
