"""`export`: a step becomes files of tensors that other libraries read, in the format safetensors.

The files are mapped into memory, and the reader of a restore reads into them. So no tensor is held:
the pages are the kernel's, and each stored byte is read once, however many tensors are made of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import mmap
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lazy_orbax._orbax.restored_kinds import NUMPY
from lazy_orbax.combine.exported import Exported, ExportedTensor
from lazy_orbax.combine.tensor_files import (
    INDEX,
    Tensor,
    TensorFile,
    files_of,
    index_of,
    refusal_of,
)
from lazy_orbax.errors import OptionError, TransformError
from lazy_orbax.inspection.looking import ITEM, RUN, STEP, look, newest_step
from lazy_orbax.plan.boxes import Box
from lazy_orbax.plan.transforms import rules
from lazy_orbax.plan.transforms.scalars import is_float
from lazy_orbax.plan.transforms.transform_map import TransformMap
from lazy_orbax.plan.transforms.transform_plan import TransformPlan, WantedLeaf
from lazy_orbax.plan.transforms.virtual_array import VirtualArray, cast
from lazy_orbax.recovery.unfinished_exports import published
from lazy_orbax.restore.chunk import Target
from lazy_orbax.restore.groups import Group, Member
from lazy_orbax.restore.opened import (
    item_at,
    missing_is_corrupt,
    opened,
    raise_wrong,
    refuse_unstored,
)
from lazy_orbax.restore.transformed import Checkpoint, Reading, families_of
from lazy_orbax.restore.wanted import Wanted
from lazy_orbax.storage.places import place_of
from lazy_orbax.timeline import RestoreRecorder

_DROPS_PAGES = hasattr(mmap, "MADV_DONTNEED")


def export(  # noqa: PLR0913 - Keywords, of which most calls give none.
    step: Any,
    out: Any,
    *,
    map: TransformMap | None = None,
    dtype: Any = None,
    max_shard_bytes: int = 5 * 10**9,
    host_bytes: int = 2**28,
    dry_run: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Exported:
    """Writes a step as safetensors: files of tensors, and an index where there are several.

    The directory appears whole or not at all. What is read is compared with the digests of the
    save, where it has some, before that.

    Args:
        step: the directory or `gs://` address of an item, of a step that has one item, or of a run,
            of which the newest committed step is taken.
        out: a local directory that is not there yet.
        map: rules that name the tensors and make them of stored leaves; `None` takes every array
            under the name that Orbax gives it.
        dtype: what floating-point tensors are cast to, where no `cast` of `map` says more. A real
            one leaves complex tensors as they are.
        max_shard_bytes: most bytes of tensors in a file, unless one tensor has more.
        host_bytes: so many bytes of the files are mapped into memory at once, or one stored leaf.
        dry_run: write nothing, read no array, and say what would be written.
        on_progress: is called with the bytes that have come, and with all that will.

    Returns:
        What was written. As text it is a table.

    Raises:
        OptionError: there is no such checkpoint, something is at `out` already, or too little room.
        TransformError: a rule does not fit, or the format has no such tensor.
        CorruptCheckpointError: what is stored is not what was saved.
        MalformedCheckpointError: it is not a checkpoint that Orbax wrote.
        OSError: the storage refused. Nothing is left of what was written.
    """
    _refuse_numbers(max_shard_bytes=max_shard_bytes, host_bytes=host_bytes)
    if map is not None and map.sources:
        raise OptionError("export reads one checkpoint, and the map has names of several.")
    target = _target(out)
    seen = look(step, (ITEM, STEP, RUN))
    source = opened(item_at((newest_step(seen) if seen.kind == RUN else seen).path), True)
    refuse_unstored(source)
    plan = _planned(source, map or TransformMap([]), dtype)
    files = files_of([_tensor(leaf) for leaf in plan.leaves.values()], max_shard_bytes)
    report = _report(source, str(target), plan, files, dry_run=dry_run)
    if not dry_run:
        _refuse_full(target.parent, sum(report.files.values()))
        recorder = RestoreRecorder(report.step, on_progress)
        recorder.note(bytes_wanted=report.n_bytes)
        _write(target, files, plan, source, host_bytes, recorder)
    return report


def _tensor(leaf: WantedLeaf) -> Tensor:
    n_bytes = math.prod(leaf.shape) * leaf.dtype.itemsize
    return Tensor(leaf.name, leaf.dtype, leaf.shape, n_bytes)


def _write(
    target: pathlib.Path,
    files: Sequence[TensorFile],
    plan: TransformPlan,
    source: Checkpoint,
    host_bytes: int,
    recorder: RestoreRecorder,
) -> None:
    with published(target) as temporary:
        maps = {file.name: _mapped(temporary / file.name, file) for file in files}
        with missing_is_corrupt(recorder, source):
            _fill(maps, files, plan, source, host_bytes, recorder)
        for memory in maps.values():
            memory.flush()
        if (index := index_of(files, recorder.timeline.bytes_wanted)) is not None:
            (temporary / INDEX).write_bytes(index)


def _refuse_numbers(**numbers: Any) -> None:
    for name, value in numbers.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise OptionError(f"{name}={value!r} must be a whole number of bytes, at least 1.")


def _target(out: Any) -> pathlib.Path:
    """Returns where the files go."""
    if not isinstance(out, str | os.PathLike) or not place_of(os.fspath(out)).has_special_files:
        raise OptionError(f"export writes to a local directory, and found {out!r}.")
    target = pathlib.Path(os.path.abspath(out))
    if os.path.lexists(target):
        raise OptionError(f"{target} is there already. Give a directory that is not.")
    if not target.parent.is_dir():
        raise OptionError(f"{target.parent} is not a directory. Make it first.")
    return target


def _refuse_full(parent: pathlib.Path, n_bytes: int) -> None:
    free_bytes = shutil.disk_usage(parent).free
    if n_bytes > free_bytes:
        raise OptionError(f"{parent} has {free_bytes} bytes left, and {n_bytes} are to be written.")


def _planned(source: Checkpoint, transforms: TransformMap, dtype: Any) -> TransformPlan:
    """Returns what the rules come to, cast to what was wanted.

    Raises:
        TransformError: they do not fit, or make what the format does not have.
    """
    specs = {name: (form.shape, form.dtype) for name, form in source.formats.items()}
    plan = transforms.plan(specs)
    if dtype is not None:
        wanted = rules.cast("", dtype).settings["dtype"]
        leaves = {name: _cast(leaf, wanted) for name, leaf in plan.leaves.items()}
        plan = dataclasses.replace(plan, leaves=leaves)
    refused = [(name, refusal_of(name, leaf.dtype)) for name, leaf in plan.leaves.items()]
    problems = [f"leaf {name}: {why}" for name, why in refused if why]
    if not plan.leaves:
        problems = ["the rules leave nothing to export"]
    if problems:
        raise TransformError(problems)
    return plan


def _cast(leaf: WantedLeaf, dtype: np.dtype) -> WantedLeaf:
    assert isinstance(leaf.made, VirtualArray)
    loses_imaginary_part = leaf.dtype.kind == "c" and dtype.kind != "c"
    if not is_float(leaf.dtype) or leaf.made.is_cast or loses_imaginary_part:
        return leaf
    return dataclasses.replace(leaf, dtype=dtype, made=cast(leaf.made, dtype))


def _report(
    source: Checkpoint,
    out: str,
    plan: TransformPlan,
    files: Sequence[TensorFile],
    *,
    dry_run: bool,
) -> Exported:
    tensors = []
    for file in files:
        for name in file.offsets:
            leaf = plan.leaves[name]
            n_bytes, origins = _tensor(leaf).n_bytes, tuple(map(str, leaf.origins))
            made = ExportedTensor(name, str(leaf.dtype), leaf.shape, n_bytes, file.name, origins)
            tensors.append(made)
    tree = source.contents.tree
    others = set(tree.leaves) - set(source.formats) if tree is not None else set()
    return Exported(
        step=source.contents.directory,
        out=out,
        dry_run=dry_run,
        files={file.name: file.n_bytes for file in files},
        tensors=tuple(tensors),
        dropped=tuple(map(str, plan.dropped)),
        left_out=tuple(sorted(others)),
        n_bytes=sum(tensor.n_bytes for tensor in tensors),
        verified=source.stored is not None and not dry_run,
    )


def _mapped(path: pathlib.Path, file: TensorFile) -> mmap.mmap:
    """Makes a file, with all the room that it needs: writing to a map cannot tell that none is."""
    with open(path, "xb+") as opened_file:
        opened_file.write(file.header)
        opened_file.truncate(file.n_bytes)
        opened_file.flush()
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(opened_file.fileno(), 0, file.n_bytes)
        except OSError as error:
            error.filename = str(path)
            raise
        return mmap.mmap(opened_file.fileno(), file.n_bytes)


def _fill(
    maps: Mapping[str, mmap.mmap],
    files: Sequence[TensorFile],
    plan: TransformPlan,
    source: Checkpoint,
    host_bytes: int,
    recorder: RestoreRecorder,
) -> None:
    """Reads every tensor to its place.

    Raises:
        CorruptCheckpointError: something is not what was saved.
    """
    places = {name: (maps[file.name], at) for file in files for name, at in file.offsets.items()}
    wanted = [
        Wanted(i, leaf.name, NUMPY, None, leaf.shape, leaf.dtype)
        for i, leaf in enumerate(plan.leaves.values())
    ]
    done_bytes = 0
    with contextlib.closing(Reading(plan, {"": source})) as reading:
        for group in _groups(families_of(wanted, plan), host_bytes):
            targets = [_target_of(places[m.wanted.name], m.wanted) for m in group.members]
            for future in reading.start(group, targets):
                future.result()
            del targets
            for memory in maps.values() if _DROPS_PAGES else ():
                memory.madvise(mmap.MADV_DONTNEED)  # The kernel has the pages, and writes them.
            recorder.arrived(done_bytes := done_bytes + group.n_bytes)
    raise_wrong(source, reading.wrong[""], reading.unchecked[""])


def _groups(families: Iterator[list[Wanted]], host_bytes: int) -> Iterator[Group]:
    members: list[Member] = []
    done = 0
    for family in families:
        n_bytes = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in family)
        if members and done + n_bytes > host_bytes:
            yield Group(tuple(members), done)
            members, done = [], 0
        boxes = ((Box((0,) * len(leaf.shape), leaf.shape),) for leaf in family)
        members += [Member(leaf, mine, 0, 0) for leaf, mine in zip(family, boxes, strict=True)]
        done += n_bytes
    if members:
        yield Group(tuple(members), done)


def _target_of(place: tuple[mmap.mmap, int], leaf: Wanted) -> tuple[Target, ...]:
    memory, offset = place
    n = math.prod(leaf.shape)
    array = np.frombuffer(memory, leaf.dtype, n, offset) if n else np.empty(0, leaf.dtype)
    return (Target(array.reshape(leaf.shape), None, rounds_once=True),)
