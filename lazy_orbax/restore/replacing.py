"""Restores a step of which some leaves are lost, with others in their place: only when told to."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from lazy_orbax import _paths
from lazy_orbax._jax_context import neutral
from lazy_orbax._orbax import describe, handed_in, symbols
from lazy_orbax._orbax.symbols import ocp
from lazy_orbax.errors import OptionError, Problem
from lazy_orbax.integrity.stored_item import StoredItem
from lazy_orbax.integrity.verify import raise_corrupt
from lazy_orbax.pods import consensus
from lazy_orbax.restore.either_way import Question
from lazy_orbax.restore.latest_good import refuse_no_manager
from lazy_orbax.restore.neighbours import (
    LEARNING_RATE_FACTOR,
    FreshMoment,
    fresh,
    moments_of,
    rebuilt,
    refuse_neighbours,
)
from lazy_orbax.restore.replacements import (
    FromNeighbours,
    FromStep,
    Replaced,
    RestoredWithReplacements,
)
from lazy_orbax.restore.verified import STAGING_BYTES, examined, restore
from lazy_orbax.timeline import RestoreRecorder

_ANEW = "its parameter is rebuilt, and it begins anew"
_LOG = logging.getLogger("lazy_orbax")


def restore_replacing(
    manager: ocp.CheckpointManager,
    step: int,
    *,
    args: Any,
    replacements: Mapping[str, Any],
    item: str | None = None,
) -> RestoredWithReplacements:
    """Restores a step, and replaces leaves of it that cannot be read or are not what was saved.

    It replaces only leaves that you name, and of these only the ones that need it. It reads the
    step twice: to see which leaves need it, and to restore the others. Every process must call it.

    Args:
        manager: the manager.
        step: the step to restore.
        args: what `manager.restore` takes for the item, with the whole target in `item`.
        replacements: by name of the leaf, as `CorruptCheckpointError.leaf` has it: `FromStep`,
            `FromNeighbours`, or an array of the same shape and dtype.
        item: the item's name, where the manager has several.

    Returns:
        The tree, and what was replaced in it. Each replacement is a warning in the log as well.

    Raises:
        CorruptCheckpointError: something else is wrong: a leaf that is not named, a file that is
            not one leaf's, or the leaf of the older step as well.
        OptionError: a replacement does not fit, the step it is from does not exist or is the one
            to restore, or the step to restore has no digests.
        FileNotFoundError: there is no such step.
    """
    refuse_no_manager("restore_replacing", manager)
    target = getattr(args, "item", None)
    if target is None:
        raise OptionError("restore_replacing needs the whole target in args.item.")
    leaves = handed_in.named_leaves(target)
    _refuse_misfits(leaves, replacements)
    directory = _item_directory(manager, step, item)
    _refuse_absent(manager, step, replacements, item)
    stored = StoredItem(directory)
    if not stored.is_covered:
        raise OptionError(f"{directory} has no digests, so no leaf of it is known to be wrong.")
    moments = moments_of(leaves, replacements)
    wrong = _needed(stored, replacements, moments)
    replacements = {**moments, **replacements}
    found = _Steps(manager, item, args, leaves).read_all(step, wrong, replacements)
    records = _replace(found, wrong, replacements, leaves, directory)
    for record in records:
        _LOG.warning(
            "%s: leaf %s is replaced by %s: %s", directory, record.leaf, record.by, record.why
        )
    not_needed = tuple(name for name in replacements if name not in {**moments, **wrong})
    for name in not_needed:
        _LOG.warning("%s: leaf %s is as it was saved and was not replaced.", directory, name)
    names = ocp.tree.get_param_names(target)
    value = jax.tree.map(lambda name: found[name], names)
    is_rebuilt = any(isinstance(replacements[name], FromNeighbours) for name in wrong)
    factor = LEARNING_RATE_FACTOR if is_rebuilt else 1.0
    return RestoredWithReplacements(value, records, not_needed, factor)


def _replace(
    found: dict[str, Any],
    wrong: Mapping[str, str],
    replacements: Mapping[str, Any],
    leaves: Mapping[str, Any],
    directory: str,
) -> tuple[Replaced, ...]:
    """Puts the values that were given for wrong leaves in their place. Returns all replacements."""
    records = []
    for name, why in wrong.items():
        if isinstance(one := replacements[name], FromStep):
            by = f"step {one.step}"
        elif isinstance(one, FromNeighbours):
            value, by = rebuilt(name, one, found, leaves[name], directory)
            found[name] = _placed(value, leaves[name])
        elif isinstance(one, FreshMoment):
            value, by = fresh(name, one, found, leaves[name], directory)
            found[name] = _placed(value, leaves[name])
        else:
            found[name], by = _placed(replacements[name], leaves[name]), "a given value"
        records.append(Replaced(name, by, why))
    return tuple(records)


class _Steps(NamedTuple):
    """The steps that leaves are taken from, and how they are read."""

    manager: ocp.CheckpointManager
    item: str | None
    args: Any
    leaves: Mapping[str, Any]

    def read_all(
        self, step: int, wrong: Mapping[str, str], replacements: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Restores the leaves that are not wrong, and those that older steps have for others."""
        whole = {name for name, why in wrong.items() if why is _ANEW}
        found = self.read(step, set(self.leaves) - set(wrong) | whole)
        from_steps = {n: r.step for n in wrong if isinstance(r := replacements[n], FromStep)}
        for older in sorted(set(from_steps.values())):
            found |= self.read(older, {n for n, of_step in from_steps.items() if of_step == older})
        return found

    def read(self, step: int, names: Collection[str]) -> dict[str, Any]:
        """Restores the leaves of these names."""
        others = [name for name in self.leaves if name not in names]
        partial = _without(self.args.item, self.leaves, others)
        found = self._restore(step, partial)  # With placeholders for the others.
        return {name: found[name] for name in names}

    def _restore(self, step: int, partial: Any) -> dict[str, Any]:
        args, item = self.args, self.item
        if isinstance(args, ocp.args.StandardRestore):  # It takes no placeholders.
            return _by_ourselves(_item_directory(self.manager, step, item), partial, args)
        own = dataclasses.replace(args, item=partial)
        if item is None:
            return handed_in.named_leaves(self.manager.restore(step, args=own))
        whole = ocp.args.Composite(**{item: own})
        return handed_in.named_leaves(self.manager.restore(step, args=whole)[item])


def _needed(
    stored: StoredItem, replacements: Mapping[str, Any], moments: Mapping[str, FreshMoment]
) -> dict[str, str]:
    """Returns which replacements are needed, and why: the same on all processes.

    Raises:
        CorruptCheckpointError: something is wrong that no replacement is given for.
    """
    wrong: dict[str | None, Problem] = {}
    for problem in stored.check_pieces(stored.pieces):
        wrong.setdefault(problem.leaf, problem)
    # All must restore the same.
    needs = consensus.any_process([name in wrong for name in replacements])
    needed = list(itertools.compress(replacements, needs))
    anew = [name for name, one in moments.items() if one.parameter in needed]
    problems = [*stored.problems, *stored.check_files()]
    problems += [p for leaf, p in wrong.items() if leaf not in replacements and leaf not in anew]
    if consensus.which_processes(bool(problems)):
        elsewhere = Problem("another process found it to be not what was saved")
        look = jax.process_index() == 0
        raise_corrupt(stored.directory, problems or [elsewhere], look=look)
    found = {name: str(wrong.get(name, "another process could not read it")) for name in needed}
    lost = consensus.any_process([name in wrong for name in anew]) if anew else ()
    for name, is_lost in zip(anew, lost, strict=True):
        found[name] = str(wrong.get(name, "it is lost as well")) if is_lost else _ANEW
    return found


def _refuse_absent(
    manager: ocp.CheckpointManager, step: int, replacements: Mapping[str, Any], item: str | None
) -> None:
    """Refuses steps that no leaf can be from, whether or not it will be needed."""
    others = _steps_in(manager)
    del others[step]
    for name, replacement in replacements.items():
        if not isinstance(replacement, FromStep):
            continue
        place = others.get(replacement.step)
        if place is None or not (place / (item or "default")).is_dir():
            raise OptionError(
                f"The replacement of {name} is FromStep({replacement.step}). It must be another "
                f"step than {step} in {manager.directory}: {', '.join(map(str, sorted(others)))}."
            )


def _refuse_misfits(leaves: Mapping[str, Any], replacements: Any) -> None:
    is_mapping = isinstance(replacements, Mapping)
    if not is_mapping or not all(isinstance(name, str) for name in replacements):
        raise OptionError(
            f"replacements={replacements!r} does not name leaves. Give a mapping, such as "
            '{"params.head": FromStep(11)}, or with an array in place of FromStep.'
        )
    for name, replacement in replacements.items():
        if name not in leaves:
            raise OptionError(f"The target has no leaf {name!r}; it has {', '.join(leaves)}.")
        if isinstance(replacement, FromStep | FromNeighbours):
            continue
        found = (np.shape(replacement), getattr(replacement, "dtype", type(replacement)))
        wanted = (np.shape(leaves[name]), getattr(leaves[name], "dtype", type(leaves[name])))
        if found != wanted:
            raise OptionError(
                f"The replacement of {name} is {found[1]}{list(found[0])}, the target wants "
                f"{wanted[1]}{list(wanted[0])}; give that, or FromStep."
            )
    refuse_neighbours(leaves, replacements)


def _by_ourselves(directory: str, partial: Any, args: Any) -> dict[str, Any]:
    restore_args = ocp.checkpoint_utils.construct_restore_args(args.item)
    for arg in jax.tree.leaves(restore_args):
        if hasattr(arg, "strict"):
            arg.strict = args.strict
    whole = ocp.args.PyTreeRestore(partial, restore_args)
    handler = symbols.HANDLER_BASE()
    question = Question(
        directory,
        whole,
        by_orbax=lambda args: handler.restore(epath.Path(directory), args=args),
        metadata=handler.metadata,
        registry=describe.type_handlers_of(handler),
        limit_bytes=STAGING_BYTES,
        verifies=True,
        is_shared=True,
        recorder=RestoreRecorder(directory),
    )
    try:
        with examined(directory, whole, verifies=True) as contents:
            return handed_in.named_leaves(restore(question, contents))
    finally:
        handler.close()


def _item_directory(manager: ocp.CheckpointManager, step: int, item: str | None) -> str:
    place = _steps_in(manager).get(step)
    if place is None:
        raise FileNotFoundError(f"There is no step {step} in {manager.directory}.")
    return str(place / (item or "default"))


def _steps_in(manager: ocp.CheckpointManager) -> dict[int, epath.Path]:
    """Returns the directory of each step."""
    found = [
        each for each in _paths.steps_in(epath.Path(manager.directory)) if not each.is_temporary
    ]
    return {each.step: each.path for each in found if each.step is not None}


def _without(target: Any, leaves: Mapping[str, Any], names: Iterable[str]) -> Any:
    """Returns the target with Orbax's placeholder for these leaves."""
    gone = set(names)
    kept = {name: ocp.PLACEHOLDER if name in gone else leaf for name, leaf in leaves.items()}
    return jax.tree.map(lambda name: kept[name], ocp.tree.get_param_names(target))


def _placed(value: Any, target: Any) -> Any:
    """Puts a given value where the target wants it."""
    sharding = getattr(target, "sharding", None)
    if sharding is None:
        return value
    if isinstance(value, jax.Array) and value.sharding == sharding:
        return value
    with neutral():
        host = np.asarray(value)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
