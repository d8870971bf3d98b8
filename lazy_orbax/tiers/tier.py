"""`Tier`: a directory to which a keeper brings snapshots, how often, and how many stay there."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import secrets
from collections.abc import Sequence
from typing import Any

import jax

from lazy_orbax import _paths
from lazy_orbax.errors import OptionError
from lazy_orbax.integrity.digest import digest_of_bytes
from lazy_orbax.pods import consensus
from lazy_orbax.storage.place import Place
from lazy_orbax.storage.places import place_of
from lazy_orbax.tiers.shelf import Shelf

_BOOT = pathlib.Path("/proc/sys/kernel/random/boot_id")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tier:
    """A directory to which the keeper brings the newest snapshot from time to time.

    It becomes an ordinary run of Orbax: stock managers list it, restore from it, and may save into
    it at other steps.

    Attributes:
        path: an absolute path, such as one on the machine's own NVMe or on a shared disk; or a
            `gs://` address. It is not the run's own, nor in it.
        every_s: after how many seconds the next snapshot is brought there, if there is a newer one.
        keep: how many of the steps that were brought there stay; `None`: all of them. Other steps
            are never removed.

    Raises:
        OptionError: a value is out of range.
    """

    path: Any = dataclasses.field(kw_only=False)
    every_s: float
    keep: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.path, str | os.PathLike) or not str(self.path):
            raise OptionError(f"path={self.path!r} is no path; give the directory of the tier.")
        object.__setattr__(self, "path", _paths.absolute(os.fspath(self.path)))
        if not isinstance(self.every_s, int | float) or not 0 < self.every_s < float("inf"):
            raise OptionError(f"every_s={self.every_s!r} must be a number of seconds, above 0.")
        if self.keep is not None and (not isinstance(self.keep, int) or self.keep < 1):
            raise OptionError(f"keep={self.keep!r} must be a number of steps, above 0, or None.")


@dataclasses.dataclass(frozen=True)
class Machine:
    """A machine of a job on several.

    Attributes:
        processes: those that share the keeper there.
        of: how many processes the job has.
    """

    processes: tuple[int, ...]
    of: int

    @property
    def part(self) -> int:
        """Its number, and that of what it writes: its first process."""
        return min(self.processes)


def checked_tiers(
    tiers: Any, run: str, directory: str | None
) -> tuple[tuple[Tier, ...], Machine | None]:
    """Returns the tiers of a run, and this machine if there are several.

    If there are tiers, every process must call it.

    Args:
        tiers: what the caller gave.
        run: the run.
        directory: this process's keeper's, as `Keeper` was given it.

    Raises:
        KeeperError: it cannot be had.
        OptionError: they are no `Tier`s; two of them, or one and the run, are one directory; or
            not all machines of the job see the same directory there.
    """
    if not isinstance(tiers, Sequence) or not all(isinstance(one, Tier) for one in tiers):
        raise OptionError(f"tiers={tiers!r} must be a list of lazy_orbax.Tier.")
    places = [run, *(one.path for one in tiers)]
    for i, path in enumerate(places):
        for other in places[:i]:
            if _paths.is_in(path, other) or _paths.is_in(other, path):
                raise OptionError(
                    f"The tier {path} is another tier too, or the run, or in one, or around it: "
                    f"found {other}. Give each tier a directory of its own."
                )
    machine = _machine(Shelf(directory).path) if tiers else None
    if machine is not None:
        for tier in tiers:
            _refuse_not_shared(tier.path)
    return tuple(tiers), machine


def told_of(tiers: Sequence[Tier], machine: Machine | None = None) -> list[dict[str, Any]]:
    """Returns the fields of tiers, as a keeper hears of them, and of this machine."""
    here = {} if machine is None else {"machine": dataclasses.asdict(machine)}
    return [{**dataclasses.asdict(tier), **here} for tier in tiers]


def heard_of(told: dict[str, Any]) -> tuple[Tier, Machine | None]:
    """Returns a tier, and this machine, of what `told_of` said of them."""
    fields = dict(told)
    here = fields.pop("machine", None)
    machine = None if here is None else Machine(tuple(here["processes"]), here["of"])
    return Tier(**fields), machine


def _machine(directory: str) -> Machine | None:
    """Returns the processes with which this one shares a keeper; `None`: with all of the job."""
    status = os.stat(directory)
    boot = _BOOT.read_text() if _BOOT.exists() else ""
    here = digest_of_bytes(f"{boot} {status.st_dev} {status.st_ino}".encode()) >> 2
    keepers = consensus.of_each(here)
    mine = tuple(process for process, each in enumerate(keepers) if each == here)
    return None if len(mine) == len(keepers) else Machine(mine, len(keepers))


def _refuse_not_shared(tier: str) -> None:
    """Refuses a tier that is not one directory for all machines. Every process must call it.

    Raises:
        OptionError: process 0 could not write there, or another does not find what it wrote.
    """
    (number,) = consensus.from_first([secrets.randbits(62)], most=1)
    place, name = place_of(tier), f"{_paths.MEETING}-{number}"
    is_first, why = jax.process_index() == 0, ""
    if is_first:
        try:
            place.kvstore.write(name, b"shared").result()
        except Exception as error:  # noqa: BLE001 - Clients of buckets raise many types.
            why = f": {error}"
    try:
        if consensus.which_processes(bool(why)):
            raise OptionError(f"process 0 cannot write to the tier {tier}{why}")
        blind = consensus.which_processes(not _sees(place, name))
    finally:
        if is_first and not why:
            place.kvstore.write(name, None).result()
    if blind:
        raise OptionError(
            f"The tier {tier} is not shared: process {blind[0]} does not find there what process 0 "
            "wrote. The processes of the job do not share one machine, so that a tier must be a "
            "directory that all machines see: on a shared file system, or gs://. A disk of each "
            "machine is no tier of such a job: leave it out."
        )


def _sees(place: Place, name: str) -> bool:
    """Whether a file is there. Whatever goes wrong, the other processes wait for the answer."""
    try:
        return place.peek(name) is not None
    except Exception:  # noqa: BLE001 - Clients of buckets raise many types.
        return False
