"""Restores the newest step there is: from memory, a tier or storage; and says why that one."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping
from typing import Any

import jax

from lazy_orbax import _paths
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
from lazy_orbax.tiers.kept_steps import add_newest
from lazy_orbax.tiers.kept_tree import KeptTree, NotAtHandError
from lazy_orbax.tiers.parity import restoring
from lazy_orbax.tiers.restored_tier import (
    MOST_STEPS,
    from_tier,
    refuse_more_than_a_target,
    steps_in_tier,
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
        tier: where it was: `"memory"`, the path of a tier, or `"storage"`.
        why: why this step, from there.
        skipped: what was passed over, newest first, and why.
        rebuilt: snapshots that were not on their machine, and were made there from parity on other
            machines, or copied from one.
    """

    step: int
    value: Any = dataclasses.field(repr=False)
    tier: str
    why: str
    skipped: tuple[Skipped, ...]
    rebuilt: tuple[restoring.Rebuilt, ...] = ()


def restore_newest(manager: ocp.CheckpointManager, keeper: Keeper, *, args: Any = None) -> Newest:
    """Restores the newest whole step among the snapshots in memory, the tiers and a run.

    A snapshot in memory counts if all processes have theirs of that step, every byte is what was
    put there, and this machine has what each of its processes wants: with the shardings that were
    saved it always has; with others, where its own processes hold the bytes. Else the next older
    snapshot or step in one of the keeper's tiers is tried, and then storage, by
    `restore_latest_good`. Each step that is passed over makes a warning in the log. Every process
    must call this; they agree on the step.

    Args:
        manager: the manager of the run.
        keeper: of this process, for the same run.
        args: what `manager.restore` takes; memory and tiers do not follow `restore_args` and
            `transforms`.

    Returns:
        The step, what was restored, from where, and what was passed over and why.

    Raises:
        OptionError: the first is no manager, the second no keeper, or they are of two runs.
        RestoreError: the target does not fit a step that is whole.
        CorruptCheckpointError: nothing can be restored; each step is named with the reason.
        FileNotFoundError: there is no step at all.
    """
    refuse_no_manager("restore_newest", manager)
    _refuse_other_than_a_keeper_of(manager, keeper)
    manager.reload()
    stored = consensus.from_first(sorted(manager.all_steps(), reverse=True)[:1], most=1)
    skipped: list[Skipped] = []
    newest, others = _before_storage(keeper, args, stored, skipped)
    if newest is not None:
        return newest
    _warn_of(skipped)
    try:
        found = restore_latest_good(manager, args=args)
    except (FileNotFoundError, CorruptCheckpointError) as error:
        if stored and (newest := _after_all(keeper, args, [], (), skipped)):
            return newest
        for one in skipped:
            error.add_note(f"Passed over: step {one.step}, {one.directory}: {one.why}")
        raise
    if found.skipped and any(step > found.step for step, _ in others):
        found = dataclasses.replace(found, value=None)  # There may be no room for both.
        if newest := _after_all(keeper, args, [found.step], found.skipped, skipped):
            return newest
        found = restore_latest_good(manager, args=args)
    newer = [one for one in skipped if one.step is None or one.step > found.step]
    keeper.slots.begin_life()
    kept = [step for step, where in others if where >= 0]
    older = f"; memory has {kept[0]}" if kept else ""
    why = f"no newer snapshot in memory{' or in a tier' if keeper.tiers else ''} is whole{older}"
    return Newest(found.step, found.value, STORAGE, why, (*newer, *found.skipped))


def _refuse_other_than_a_keeper_of(manager: ocp.CheckpointManager, keeper: Any) -> None:
    if not isinstance(keeper, Keeper):
        raise OptionError(f"restore_newest takes a lazy_orbax.Keeper, and found {keeper!r}.")
    if _paths.absolute(os.fspath(manager.directory)) != keeper.run:
        raise OptionError(
            f"restore_newest takes the manager and the keeper of one run, and found those of "
            f"{manager.directory} and {keeper.run}."
        )


def _after_all(
    keeper: Keeper, args: Any, least: list[int], broken: tuple[Skipped, ...], skipped: list[Skipped]
) -> Newest | None:
    """Restores what is older than a broken step in storage, and newer than what is whole there."""
    again: list[Skipped] = []
    found, _ = _before_storage(keeper, args, least, again)
    if found is not None:
        return dataclasses.replace(found, skipped=(*broken, *found.skipped))
    new = [one for one in again if one not in skipped]
    _warn_of(new)
    skipped += new
    return None


def _warn_of(skipped: list[Skipped]) -> None:
    for one in skipped:
        _LOG.warning("Step %s in %s is passed over: %s", one.step, one.directory, one.why)


def _before_storage(
    keeper: Keeper, args: Any, stored: list[int], skipped: list[Skipped]
) -> tuple[Newest | None, list[tuple[int, int]]]:
    """Restores from memory or a tier, if that is newer. Returns what, and the steps that are there.

    Args:
        keeper: of this process.
        args: what `manager.restore` takes.
        stored: the newest step in storage, if there is one.
        skipped: gets what is passed over.
    """
    targets = _targets(args)
    made = restoring.make_whole(keeper.slots.guard, targets, stored[0] if stored else None)
    at_hand, passed = _at_hand(keeper, made)
    in_tiers, out_of_reach = _in_tiers(keeper)
    skipped += passed + out_of_reach
    keys = _newest_first(_candidates(at_hand, targets), in_tiers)
    most = _MOST_NUMBERS + 2 * MOST_STEPS * len(keeper.tiers)
    flat = consensus.from_first([number for key in keys for number in key], most=most)
    pairs = list(zip(flat[::2], flat[1::2], strict=True))
    for step, where in pairs:
        if stored and step < stored[0]:
            break
        tier = None if where >= 0 else keeper.tiers[~where].path
        if tier is None:
            value, error = _tried(at_hand.get((step, where), {}), targets)
        else:
            value, error = from_tier(tier, step, keeper.run, targets)
        failed = consensus.which_processes(error is not None)
        if not failed:
            newer = [one for one in skipped if one.step is None or one.step > step]
            newest = stored[0] if stored else "none"
            why = f"{tier or MEMORY} has it whole; the newest in storage is {newest}"
            keeper.slots.begin_life(None if tier else _own_files(at_hand[step, where], targets))
            restoring.protect_again(keeper.slots.guard, () if tier else targets, step, where)
            value, rebuilt = _shaped(value, args), () if tier else made.rebuilt
            return Newest(step, value, tier or MEMORY, why, tuple(newer), rebuilt), []
        if any(consensus.any_process([_is_for_the_caller(error)])):
            raise error or RestoreError(f"Step {step} could not be restored on another process.")
        skipped.append(_skipped(step, error, failed, tier or keeper.slots.shelf.path))
    return None, pairs


def _targets(args: Any) -> dict[str, Any]:
    """Returns what is wanted of each item: Orbax's own arguments."""
    if isinstance(args, ocp.args.Composite):
        return dict(args.items())
    return {ITEM: args}


_Items = dict[str, list[Snapshot]]
_AtHand = dict[tuple[int, int], _Items]
"""Snapshots of the run on this machine, of each item, by step and life of the job."""


def _at_hand(keeper: Keeper, made: restoring.MadeWhole) -> tuple[_AtHand, list[Skipped]]:
    found: _AtHand = {}
    skipped = [Skipped(step, keeper.slots.shelf.path, why) for step, why in made.missing]
    mine = set(keeper.slots.files([ITEM]))
    for file, snapshot in keeper.slots.shelf.snapshots():
        if isinstance(snapshot, SnapshotError):
            if file in mine:
                skipped.append(Skipped(None, keeper.slots.shelf.path_of(file), str(snapshot)))
        elif snapshot.facts.get("run") == keeper.run:
            items = found.setdefault((snapshot.step, snapshot.facts["life"]), {})
            add_newest(items.setdefault(snapshot.facts["item"], []), snapshot)
    return found, skipped


def _candidates(at_hand: _AtHand, targets: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Returns the steps of which this process has all items: of the latest life first."""
    process = jax.process_index()
    whole = [
        (life, step)
        for (step, life), items in at_hand.items()
        if all(
            any(snapshot.facts["process"] == process for snapshot in items.get(item, ()))
            for item in targets
        )
    ]
    return [(step, life) for life, step in sorted(whole, reverse=True)]


def _newest_first(
    in_memory: list[tuple[int, int]], in_tiers: list[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Returns steps and where they are. Those in memory keep their order, before equal ones."""
    found, rest = [], sorted(in_tiers, reverse=True)
    for key in in_memory:
        while rest and rest[0][0] > key[0]:
            found.append(rest.pop(0))
        found.append(key)
    return found + rest


def _in_tiers(keeper: Keeper) -> tuple[list[tuple[int, int]], list[Skipped]]:
    """Returns the steps in tiers, each with which tier it is: -1 is the first one."""
    found, skipped = [], []
    for i, tier in enumerate(keeper.tiers):
        try:
            found += [(step, ~i) for step in steps_in_tier(tier.path)]
        except Exception as error:  # noqa: BLE001 - The clients of buckets raise many types.
            skipped.append(Skipped(None, tier.path, f"it cannot be listed: {error}"))
    return found, skipped


def _tried(items: _Items, targets: Mapping[str, Any]) -> tuple[dict[str, Any], Exception | None]:
    """Restores all items of a step, or says why not."""
    try:
        values = {}
        for item, args in targets.items():
            if item not in items:
                raise NotAtHandError(f"this process has no snapshot of the item {item}")
            refuse_more_than_a_target(item, args)
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


def _own_files(items: _Items, targets: Mapping[str, Any]) -> dict[str, str]:
    process = jax.process_index()
    mine = {
        item: [one.path for one in items[item] if one.facts["process"] == process]
        for item in targets
    }
    return {item: paths[0] for item, paths in mine.items() if paths}


def _skipped(step: int, error: Exception | None, failed: list[int], where: str) -> Skipped:
    if error is None:
        return Skipped(step, where, f"process {failed[0]} could not restore it")
    why = str(error.problems[0]) if isinstance(error, CorruptCheckpointError) else str(error)
    return Skipped(step, getattr(error, "directory", where), why)


def _shaped(values: dict[str, Any], args: Any) -> Any:
    """Returns what `manager.restore` would."""
    if isinstance(args, ocp.args.Composite):
        return ocp.args.Composite(**values)
    return values[ITEM]
