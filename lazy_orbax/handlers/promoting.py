"""The newest snapshot in memory goes to a tier, as an ordinary step, by a fresh process.

`python -m lazy_orbax.handlers.promoting RUN DIRECTORY TIER`: the keeper calls it, with the fields
of a `Tier` as JSON. Killed anywhere, it leaves nothing that is listed; the next one removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

from lazy_orbax.errors import KeeperError, LazyOrbaxError
from lazy_orbax.handlers.completing import write
from lazy_orbax.handlers.promoting_parts import follow, lead
from lazy_orbax.handlers.verified_path import verified_in
from lazy_orbax.tiers.kept_steps import UNUSABLE, held_steps, kept_steps
from lazy_orbax.tiers.promoted_steps import newest_in, refuse_others, remove_unfinished, retire
from lazy_orbax.tiers.shelf import Shelf, claim_of
from lazy_orbax.tiers.snapshot_file import held
from lazy_orbax.tiers.tier import Machine, Tier, heard_of

_LOG = logging.getLogger("lazy_orbax")
_NICE = 10


def promote(
    run: str, tier: Tier, directory: str | None = None, machine: Machine | None = None
) -> int | None:
    """Writes the newest whole snapshot of a run to a tier, unless it has one as new.

    It is read from memory first, and compared with its digests; until then no trainer writes over
    it. The step is written, read back and compared with its own digests, and then listed. Older
    ones are removed as the tier says.

    Args:
        run: the run, as `Keeper` was given it.
        tier: where it goes. Its directory is made if it is not there.
        directory: the keeper's directory.
        machine: this one, if the job has several: all must promote at about the same time.

    Returns:
        The step; `None`: nothing was newer.

    Raises:
        KeeperError: there is no whole snapshot of all processes, another program is at it, or
            another run has steps there.
        SaveError: the storage refused it.
        CorruptCheckpointError: what was read back is not what was written; it is not listed.
    """
    shelf = Shelf(directory)
    with _alone(shelf, tier.path):
        refuse_others(tier.path, run)
        if machine is None:
            remove_unfinished(tier.path, run)
            step = _written(run, tier.path, shelf)
        elif machine.part == 0:
            step = lead(run, tier.path, shelf, machine)
        else:
            return follow(run, tier.path, shelf, machine)
        if step is None:
            _tell_of_newer(run, tier.path, shelf)
        if tier.keep is not None:
            retire(tier.path, run, tier.keep)
        return step


def _tell_of_newer(run: str, tier: str, shelf: Shelf) -> None:
    """Says so where a tier gets nothing because it has a newer step than memory."""
    newest, steps = newest_in(tier), kept_steps(shelf, run)
    if steps and steps[0].step < newest:
        _LOG.warning(
            "Step %d of %s is not brought to %s, which has step %d. Remove that there if the job "
            "went back to an older one; else it gets nothing until training has passed it.",
            *(steps[0].step, run, tier, newest),
        )


def _written(run: str, tier: str, shelf: Shelf) -> int | None:
    taken = _taken(shelf, run, newest_in(tier))
    if taken is None:
        return None
    step, values = taken
    write(tier, step, values, create=True, temporary_path_class=verified_in(tier, {"run": run}))
    return step


def _taken(shelf: Shelf, run: str, newest: int) -> tuple[int, dict[str, Any]] | None:
    """Returns the newest step that is whole, read into this process's own memory.

    Args:
        shelf: where the snapshots are.
        run: the run.
        newest: the step that the tier has: older ones are of no use.
    """
    reasons: list[str] = []
    with held_steps(shelf, run) as steps:
        for kept in steps:
            if kept.step <= newest:
                if not reasons:
                    return None
                break
            try:
                kept.refuse_parts()
                with held(kept.paths):
                    kept.refuse_other()
                    return kept.step, kept.values()
            except UNUSABLE as error:
                reasons.append(f"step {kept.step}: {error}")
    raise KeeperError(f"no snapshot of {run} in memory is whole: {'; '.join(reasons) or 'none'}")


@contextlib.contextmanager
def _alone(shelf: Shelf, tier: str) -> Iterator[None]:
    """Keeps another program, of a keeper that died perhaps, away from a tier.

    Raises:
        KeeperError: there is one.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(f"{shelf.path}/{claim_of(f'tier {tier}', 0)}", flags, 0o600)
    try:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise KeeperError(f"another program is bringing a snapshot to {tier}") from error
        yield
    finally:
        os.close(descriptor)


def main(arguments: list[str]) -> int:
    """Promotes. Returns the exit status: 0 where the tier has the newest there is."""
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    run, directory, told = arguments
    tier, machine = heard_of(json.loads(told))
    try:
        step = promote(run, tier, directory, machine)
    except (LazyOrbaxError, OSError) as error:
        _LOG.warning("Nothing of %s was brought to %s: %s", run, tier.path, error)
        return 1
    if step is not None:
        _LOG.warning("Step %d of %s was brought to %s.", step, run, tier.path)
    return 0


if __name__ == "__main__":
    os.nice(_NICE)  # The training comes first.
    raise SystemExit(main(sys.argv[1:]))
