"""`Tier`: a directory to which a keeper brings snapshots, how often, and how many stay there."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from lazy_orbax import _paths
from lazy_orbax.errors import OptionError
from lazy_orbax.integrity.digest import digest_of_bytes
from lazy_orbax.pods import consensus
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


def checked_tiers(tiers: Any, run: str, directory: str | None) -> tuple[Tier, ...]:
    """Returns the tiers of a run. If there are any, every process must call it.

    Args:
        tiers: what the caller gave.
        run: the run.
        directory: this process's keeper's, as `Keeper` was given it.

    Raises:
        KeeperError: it cannot be had.
        OptionError: they are no `Tier`s; two of them, or one and the run, are one directory; or
            the processes of the job do not share one keeper.
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
    if tiers:
        _refuse_several_keepers(Shelf(directory).path)
    return tuple(tiers)


def told_of(tiers: Sequence[Tier]) -> list[dict[str, Any]]:
    """Returns the fields of tiers, as a keeper hears of them."""
    return [dataclasses.asdict(tier) for tier in tiers]


def _refuse_several_keepers(directory: str) -> None:
    """Refuses tiers to a job whose processes do not share one memory: they have whole steps."""
    status = os.stat(directory)
    boot = _BOOT.read_text() if _BOOT.exists() else ""
    here = digest_of_bytes(f"{boot} {status.st_dev} {status.st_ino}".encode()) >> 2
    (first,) = consensus.from_first([here], most=1)
    elsewhere = consensus.which_processes(here != first)
    if elsewhere:
        raise OptionError(
            f"tiers need one keeper that all processes of the job share, and process "
            f"{elsewhere[0]} has another than process 0: it is on another machine, or has another "
            "`directory`. Leave `tiers` out, and let the manager save."
        )
