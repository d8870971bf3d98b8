"""Restores the newest step there is: from memory, or from storage; and says why that one."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import jax

from lazy_orbax._orbax.symbols import ocp
from lazy_orbax.errors import (
    CorruptCheckpointError,
    LazyOrbaxError,
    OptionError,
    RestoreError,
)
from lazy_orbax.pods import consensus
from lazy_orbax.restore.latest_good import Skipped, refuse_no_manager, restore_latest_good
from lazy_orbax.tiers.keeping import ITEM, Keeper
from lazy_orbax.tiers.kept_tree import KeptTree, NotAtHandError
from lazy_orbax.tiers.parity.restoring import (
    MadeWhole,
    Rebuilt,
    make_whole,
    protect_again,
)
from lazy_orbax.tiers.snapshot_file import Snapshot, SnapshotError
from lazy_orbax.timeline import RestoreRecorder

MEMORY, STORAGE = "memory", "storage"
# Two for each snapshot that the first process has: there are no more than its generations.
_MOST_NUMBERS = 64
_LOG = logging.getLogger("lazy_orbax")


@dataclasses.dataclass(frozen=True)
class Newest:
    """What `restore_newest` restored.

    Attributes:
        step: the step that was restored.
        value: what `CheckpointManager.restore` returns for it.
        tier: where it was: `"memory"` or `"storage"`.
        why: why this step, from there.
        skipped: what was passed over, newest first, and why.
        rebuilt: snapshots that were not on their machine, and were made there from parity on other
            machines, or copied from one.
    """

    step: int
    value: Any
    tier: str
    why: str
    skipped: tuple[Skipped, ...]
    rebuilt: tuple[Rebuilt, ...] = ()


def restore_newest(manager: ocp.CheckpointManager, keeper: Keeper, *, args: Any = None) -> Newest:
    """Restores the newest whole step among the snapshots in memory and the checkpoints of a run.

    A snapshot in memory counts if all processes have theirs of that step, every byte is what was
    put there, and this machine has what each of its processes wants: with the shardings that were
    saved it always has; with others, where its own processes hold the bytes. Else the next older
    snapshot is tried, and then storage, by `restore_latest_good`. Each step that is passed over
    makes a warning in the log. Every process must call this; they agree on the step.

    Args:
        manager: the manager of the run.
        keeper: of this process, for the same run.
        args: what `manager.restore` takes; memory does not follow `restore_args`, `transforms`.

    Returns:
        The step, what was restored, from where, and what was passed over and why.

    Raises:
        OptionError: the first is no manager, or the second no keeper.
        RestoreError: the target does not fit a step that is whole.
        CorruptCheckpointError: nothing can be restored; each step is named with the reason.
        FileNotFoundError: there is no step at all.
    """
    refuse_no_manager("restore_newest", manager)
    if not isinstance(keeper, Keeper):
        raise OptionError(f"restore_newest takes a lazy_orbax.Keeper, and found {keeper!r}.")
    manager.reload()
    targets = _targets(args)
    stored = consensus.from_first(sorted(manager.all_steps(), reverse=True)[:1], most=1)
    made = make_whole(keeper.slots.guard, targets, stored[0] if stored else None)
    at_hand, skipped = _at_hand(keeper, made)
    keys = _candidates(at_hand, targets)
    flat = consensus.from_first([number for key in keys for number in key], most=_MOST_NUMBERS)
    for step, life in zip(flat[::2], flat[1::2], strict=True):
        if stored and step < stored[0]:
            break
        value, error = _tried(at_hand.get((step, life), {}), targets)
        failed = consensus.which_processes(error is not None)
        if not failed:
            newer = [one for one in skipped if one.step is None or one.step > step]
            why = f"memory has it whole; the newest in storage is {stored[0] if stored else 'none'}"
            keeper.slots.begin_life(_own_files(at_hand[step, life], targets))
            protect_again(keeper.slots.guard, targets, step, life)
            return Newest(step, _shaped(value, args), MEMORY, why, (*newer,), made.rebuilt)
        if any(consensus.any_process([_is_for_the_caller(error)])):
            raise error or RestoreError(f"Step {step} could not be restored on another process.")
        skipped.append(_skipped(step, error, failed, keeper))
    for one in skipped:
        _LOG.warning("The snapshot in memory of step %s is passed over: %s", one.step, one.why)
    try:
        found = restore_latest_good(manager, args=args)
    except (FileNotFoundError, CorruptCheckpointError) as error:
        for one in skipped:
            error.add_note(f"Passed over in memory: step {one.step}, {one.directory}: {one.why}")
        raise
    newer = [one for one in skipped if one.step is None or one.step > found.step]
    keeper.slots.begin_life()
    older = f"; memory has {flat[0]}" if flat else ""
    why = f"no newer snapshot in memory is whole{older}"
    return Newest(found.step, found.value, STORAGE, why, (*newer, *found.skipped))


def _targets(args: Any) -> dict[str, Any]:
    """Returns what is wanted of each item: Orbax's own arguments."""
    if isinstance(args, ocp.args.Composite):
        return dict(args.items())
    return {ITEM: args}


_Items = dict[str, list[Snapshot]]
_AtHand = dict[tuple[int, int], _Items]
"""Snapshots of the run on this machine, of each item, by step and life of the job."""


def _at_hand(keeper: Keeper, made: MadeWhole) -> tuple[_AtHand, list[Skipped]]:
    found: _AtHand = {}
    skipped = [Skipped(step, keeper.slots.shelf.path, why) for step, why in made.missing]
    mine = set(keeper.slots.files([ITEM]))
    for file, snapshot in keeper.slots.shelf.snapshots():
        if isinstance(snapshot, SnapshotError):
            if file in mine:
                skipped.append(Skipped(None, keeper.slots.shelf.path_of(file), str(snapshot)))
        elif snapshot.facts.get("run") == keeper.run:
            items = found.setdefault((snapshot.step, snapshot.facts["life"]), {})
            items.setdefault(snapshot.facts["item"], []).append(snapshot)
    return found, skipped


def _candidates(at_hand: _AtHand, targets: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Returns the steps of which this process has all items; the one that was sealed last first."""
    process, sealed = jax.process_index(), {}
    for key, items in at_hand.items():
        mine = [
            snapshot
            for item in targets
            for snapshot in items.get(item, ())
            if snapshot.facts["process"] == process
        ]
        if len(mine) == len(targets):
            sealed[key] = max(snapshot.serial for snapshot in mine)
    return sorted(sealed, key=lambda key: sealed[key], reverse=True)


def _tried(items: _Items, targets: Mapping[str, Any]) -> tuple[dict[str, Any], Exception | None]:
    """Restores all items of a step, or says why not."""
    try:
        values = {}
        for item, args in targets.items():
            if item not in items:
                raise NotAtHandError(f"this process has no snapshot of the item {item}")
            _refuse_more_than_a_target(item, args)
            values[item] = KeptTree(items[item]).restored(
                getattr(args, "item", None),
                RestoreRecorder(items[item][0].path),
                is_part=bool(getattr(args, "partial_restore", False)),
            )
        return values, None
    except Exception as error:  # noqa: BLE001 - All processes hear of it before it is raised.
        return {}, error


def _is_for_the_caller(error: Exception | None) -> bool:
    """Whether no older step helps: the caller is wrong, or this machine is in trouble."""
    if error is None or isinstance(error, NotAtHandError | SnapshotError | OSError):
        return False
    return isinstance(error, RestoreError) or not isinstance(error, LazyOrbaxError)


def _refuse_more_than_a_target(item: str, args: Any) -> None:
    """Leaves to storage what Orbax alone knows how to do.

    Raises:
        NotAtHandError: the arguments say more of the leaves than a target does.
    """
    for name in ("restore_args", "transforms"):
        if getattr(args, name, None):
            raise NotAtHandError(
                f"the item {item} is wanted with `{name}`, which memory does not follow; "
                "give shapes, dtypes and shardings as the target, `item`"
            )


def _own_files(items: _Items, targets: Mapping[str, Any]) -> dict[str, str]:
    process = jax.process_index()
    mine = {
        item: [one.path for one in items[item] if one.facts["process"] == process]
        for item in targets
    }
    return {item: paths[0] for item, paths in mine.items() if paths}


def _skipped(step: int, error: Exception | None, failed: list[int], keeper: Keeper) -> Skipped:
    if error is None:
        return Skipped(step, keeper.slots.shelf.path, f"process {failed[0]} could not restore it")
    why = str(error.problems[0]) if isinstance(error, CorruptCheckpointError) else str(error)
    directory = getattr(error, "directory", keeper.slots.shelf.path)
    return Skipped(step, directory, why)


def _shaped(values: dict[str, Any], args: Any) -> Any:
    """Returns what `manager.restore` would."""
    if isinstance(args, ocp.args.Composite):
        return ocp.args.Composite(**values)
    return values[ITEM]
