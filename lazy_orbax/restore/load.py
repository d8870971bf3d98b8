"""`load`: a checkpoint on any machine, without the devices or the code that saved it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from lazy_orbax import _paths
from lazy_orbax._machine import memory_bytes, without_garbage_collection
from lazy_orbax.errors import (
    MalformedCheckpointError,
    OptionError,
    RestoreError,
    summarize,
)
from lazy_orbax.integrity.sidecar_files import string_at
from lazy_orbax.options import LazyOptions
from lazy_orbax.plan.transforms.transform_map import TransformMap
from lazy_orbax.plan.transforms.transform_plan import TransformPlan
from lazy_orbax.restore.like import Likeness, Rule, likeness_of, likeness_of_stored
from lazy_orbax.restore.opened import item_at, missing_is_corrupt, opened, raise_wrong
from lazy_orbax.restore.planned import read_planned
from lazy_orbax.restore.transformed import Checkpoint, read_transformed
from lazy_orbax.storage.places import place_of
from lazy_orbax.timeline import RestoreRecorder

# Of what only passes through host memory, on the way to devices.
_LIMIT_BYTES = 2**32


def load(  # noqa: PLR0913 - Keywords, of which most calls give none.
    path: Any,
    like: Any = None,
    *,
    mesh: Any = None,
    rule: Rule | None = None,
    transforms: TransformMap | None = None,
    dry_run: bool = False,
    options: LazyOptions | None = None,
) -> Any:
    """Reads a checkpoint, or what is wanted of it. It need not have been saved by lazy_orbax.

    Without `like` and `mesh` it returns NumPy arrays: no device is looked up, and neither the
    devices nor the classes of the job that saved need be there.

    Args:
        path: an item, or a step that has one item; a directory or a `gs://` address. With
            transforms of several checkpoints, a dictionary of them by their names.
        like: the tree to return: arrays or `jax.ShapeDtypeStruct`s (shape, dtype and, for devices,
            sharding), numbers and strings. Leaves of the checkpoint that it does not name are not
            read. `None` is all that was saved, as nested dictionaries and lists; data of typed
            PRNG keys as they are stored.
        mesh: the mesh on whose devices the arrays go.
        rule: returns the `PartitionSpec` of a leaf on the mesh, of its name (keys joined by dots)
            and shape; `None` puts all of each array on each device.
        transforms: rules by which the leaves of `like` are made of stored ones.
        dry_run: return the `TransformPlan`, which prints as a table, and read no array.
        options: its `verify_restore`, `on_restore` and `on_restore_progress` count.

    Returns:
        The tree; with `dry_run` the plan.

    Raises:
        OptionError: there is no item, or several; or arguments that need each other.
        RestoreError: `like` does not fit what is stored; every misfit leaf is named.
        TransformError: the rules do not make each wanted leaf once.
        CorruptCheckpointError: what is stored is not what was saved.
        MalformedCheckpointError: it is not a checkpoint that Orbax wrote.
    """
    several = path if isinstance(path, Mapping) else {"": path}
    if transforms is None and (dry_run or several is path):
        raise OptionError("dry_run, and several checkpoints, are for transforms only. Give them.")
    if like is None and (transforms is not None or mesh is not None):
        raise OptionError("transforms and mesh need `like`, such as what load(path) alone returns.")
    options = options or LazyOptions()
    recorder = RestoreRecorder(str(path), options.on_restore_progress)
    try:
        with without_garbage_collection():
            verifies = options.verify_restore
            sources = {name: opened(item_at(one), verifies) for name, one in several.items()}
            if transforms is None:
                return _as_it_is(like, _Place(mesh, rule), sources[""], recorder)
            wanted = likeness_of(like, None, mesh, rule)
            plan = _planned(wanted, transforms, sources)
            return plan if dry_run else _transformed(wanted, plan, sources, recorder)
    except BaseException as error:
        recorder.note(error=error)
        raise
    finally:
        recorder.report(options.on_restore)


def _as_it_is(like: Any, place: _Place, source: Checkpoint, recorder: RestoreRecorder) -> Any:
    tree = source.contents.tree
    assert tree is not None
    if like is None:
        wanted = likeness_of_stored(tree, source.formats)
        _refuse_oversize(wanted, source)
    else:
        wanted = likeness_of(like, source.formats, place.mesh, place.rule)
    digests = source.stored.leaves if source.stored is not None else {}
    with missing_is_corrupt(recorder, source):
        found = read_planned(
            wanted.wanted, source.contents, digests, limit_bytes=_LIMIT_BYTES, recorder=recorder
        )
    raise_wrong(source, found.wrong, found.unchecked)
    recorder.mark("on_device", "verified")
    return _rebuilt(wanted, found.values, {"": source})


class _Place(NamedTuple):
    mesh: Any
    rule: Rule | None


def _planned(
    wanted: Likeness, transforms: TransformMap, sources: Mapping[str, Checkpoint]
) -> TransformPlan:
    specs = {
        name: {leaf: (form.shape, form.dtype) for leaf, form in source.formats.items()}
        for name, source in sources.items()
    }
    leaves = {leaf.name: (leaf.shape, leaf.dtype) for leaf in wanted.wanted}
    return transforms.plan(specs if transforms.sources else specs[""], leaves)


def _transformed(
    wanted: Likeness,
    plan: TransformPlan,
    sources: Mapping[str, Checkpoint],
    recorder: RestoreRecorder,
) -> Any:
    recorder.note(transforms=plan.report)
    with missing_is_corrupt(recorder, *sources.values()):
        found = read_transformed(
            wanted.wanted, plan, sources, limit_bytes=_LIMIT_BYTES, recorder=recorder
        )
    for name, source in sources.items():
        raise_wrong(source, found.wrong[name], found.unchecked[name])
    recorder.mark("on_device", "verified")
    return _rebuilt(wanted, found.values, sources)


def _rebuilt(wanted: Likeness, values: Mapping[int, Any], sources: Mapping[str, Checkpoint]) -> Any:
    leaves = list(wanted.leaves)
    for position, value in values.items():
        leaves[position] = value
        if (name := wanted.keys.get(position)) is not None:
            kinds = [s.contents.keys[name] for s in sources.values() if name in s.contents.keys]
            leaves[position] = jax.random.wrap_key_data(value, impl=kinds[0] if kinds else None)
    texts = [_strings(source) for source in sources.values()] if wanted.strings else []
    missing = []
    for name, position in wanted.strings.items():
        found = [text for text in (string_at(one, name) for one in texts) if text is not None]
        if not found:
            missing.append(f"leaf {name}: found no such string")
        leaves[position] = found[0] if found else None
    if missing:
        raise RestoreError(f"What is wanted does not fit the checkpoint:{summarize(missing)}")
    return wanted.rebuild(leaves)


def _strings(source: Checkpoint) -> Any:
    place = place_of(source.contents.directory)
    return json.loads(place.read(_paths.STRINGS)) if place.has(_paths.STRINGS) else {}


def _refuse_oversize(wanted: Likeness, source: Checkpoint) -> None:
    """Checks that what the checkpoint alone says is to be read fits this machine.

    Raises:
        MalformedCheckpointError: it does not.
    """
    n_bytes = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in wanted.wanted)
    if n_bytes > memory_bytes():
        raise MalformedCheckpointError(
            source.contents.directory,
            f"arrays that declare {n_bytes} bytes",
            f"at most the {memory_bytes()} bytes of memory here, or `like`, which says how much is "
            "wanted",
        )
