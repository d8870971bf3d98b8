"""A restore goes by a plan, leaf for leaf; what is unusual goes Orbax's way, and is said."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax

from lazy_orbax._machine import give_back_memory
from lazy_orbax._orbax import handed_in
from lazy_orbax.errors import MalformedCheckpointError
from lazy_orbax.integrity.array_format import formats_of
from lazy_orbax.integrity.stored_item import Piece, StoredItem
from lazy_orbax.restore.compare_arrays import far_from_the_host
from lazy_orbax.restore.planned import Read, read_planned
from lazy_orbax.restore.wanted import MisfitError, OrbaxOnlyError, Request, requested
from lazy_orbax.timeline import RestoreRecorder
from lazy_orbax.trust.contents import Contents

_LOG = logging.getLogger("lazy_orbax")
_MANY_LEAVES = 4096


@dataclasses.dataclass(frozen=True)
class Question:
    """What is to be restored, and how Orbax would do it.

    Attributes:
        directory: the item's directory.
        args: what was asked for, or `None`.
        by_orbax: restores what it is given in the place of `args`.
        metadata: returns what Orbax says of what is in a directory.
        registry: the type handlers.
        limit_bytes: most bytes of host memory for what only passes through it.
        verifies: whether to verify what was restored.
        is_shared: whether all processes restore it together.
        recorder: is told what happened when.
    """

    directory: Any
    args: Any
    by_orbax: Callable[[Any], Any]
    metadata: Callable[[Any], Any]
    registry: Any
    limit_bytes: int
    verifies: bool
    is_shared: bool
    recorder: RestoreRecorder


@dataclasses.dataclass(frozen=True)
class Found:
    """What was restored.

    Attributes:
        value: the tree.
        wrong: the pieces that are known not to be what was saved.
        unchecked: returns the leaves, by name, that were not compared with their digests yet.
    """

    value: Any
    wrong: list[Piece]
    unchecked: Callable[[], Mapping[str, Any]]


def restore_either_way(
    question: Question, contents: Contents | None, stored: StoredItem | None
) -> Found:
    """Restores an item.

    Args:
        question: what to restore.
        contents: what is known to be there.
        stored: the digests of what was saved, if they are to be compared.
    """
    try:
        request, found = _by_plan(question, contents, stored)
    except OrbaxOnlyError as reason:
        return _by_orbax(question, str(reason))
    except (MalformedCheckpointError, MisfitError):
        raise
    except Exception as error:  # What is wrong with it, Orbax finds out and says.
        if error is question.recorder.ended_by:
            raise
        _LOG.info("Orbax restores all of it, for it could not be read by plan: %r.", error)
        return _by_orbax(question, f"it could not be read by plan: {error!r}")
    for position, value in found.values.items():
        request.values[position] = value
    by_name = {leaf.name: request.values[leaf.position] for leaf in request.wanted}
    later = {name: by_name[name] for name in found.unchecked}
    if request.others:
        later |= _others(question, request)
    value = jax.tree_util.tree_unflatten(request.structure, request.values)
    return Found(value, found.wrong, lambda: later | _proven_on_devices(stored, by_name))


def _by_plan(
    question: Question, contents: Contents | None, stored: StoredItem | None
) -> tuple[Request, Read]:
    if contents is None or contents.tree is None:
        raise OrbaxOnlyError("there is no _METADATA")
    if not contents.tree.stores_fill_values:
        raise OrbaxOnlyError("chunks of nothing but fill values may be missing")
    # Keys are for Orbax, which puts them together again.
    formats = formats_of(contents)
    simple = {name: form for name, form in formats.items() if name not in contents.keys}
    request = requested(question.args, contents.tree, simple, question.registry)
    if not request.wanted:
        raise OrbaxOnlyError("no leaf of it is simple")
    digests = stored.leaves if stored is not None else {}
    question.recorder.note(by_orbax=request.others)
    contents.files.forget()
    if len(formats) >= _MANY_LEAVES:  # To parse what describes them took about 4 KB for each.
        give_back_memory()
    found = read_planned(
        request.wanted,
        contents,
        digests,
        limit_bytes=question.limit_bytes,
        recorder=question.recorder,
    )
    return request, found


def _by_orbax(question: Question, reason: str) -> Found:
    question.recorder.note(all_by_orbax=reason)
    value = question.by_orbax(question.args)
    return Found(value, [], lambda: handed_in.named_leaves(value))


def _others(question: Question, request: Request) -> dict[str, Any]:
    """Lets Orbax restore the leaves that are left, and puts them in their places."""
    wanted = {leaf.position for leaf in request.wanted}
    target = [... if i in wanted else value for i, value in enumerate(request.values)]
    item = jax.tree_util.tree_unflatten(request.structure, target)
    restored = question.by_orbax(dataclasses.replace(question.args, item=item))
    found = {}
    names = handed_in.named_leaves(restored)
    for position, value in enumerate(request.structure.flatten_up_to(restored)):
        if position not in wanted:
            request.values[position] = value
    for name in request.others:
        found[name] = names[name]
    return found


def _proven_on_devices(stored: StoredItem | None, leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the leaves far from the host of which there is a fingerprint to compare."""
    known = stored.leaves if stored is not None else {}
    mine = {name: value for name, value in leaves.items() if name in known}
    far = far_from_the_host(mine)
    return {name: value for name, value in far.items() if known[name].fingerprints}
