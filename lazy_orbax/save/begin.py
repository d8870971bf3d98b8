"""The story of `save()`, in order. Start reading here: each line opens the next file.

A handler hands over what Orbax wants saved. When this has returned, the caller may donate, delete
or change it; what is left to do happens in the background, and `finish` tells how it ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from lazy_orbax import _paths
from lazy_orbax._orbax import handed_in, lifecycle, metrics, multihost
from lazy_orbax._orbax.interrupted import await_interrupted
from lazy_orbax._orbax.records import Destination, Settings
from lazy_orbax.errors import OptionError, SaveError
from lazy_orbax.integrity.proof_turns import TURNS
from lazy_orbax.options import LazyOptions
from lazy_orbax.pods.agreement import agreement_on
from lazy_orbax.recovery.attempt import attempt_at
from lazy_orbax.recovery.cleaning import end_earlier
from lazy_orbax.recovery.retired_steps import remember
from lazy_orbax.save.commit import Commit
from lazy_orbax.save.job import Job
from lazy_orbax.save.linked_chunks import refuse_unlinkable
from lazy_orbax.save.pipeline import Save
from lazy_orbax.save.plan_cache import Prepared, prepare
from lazy_orbax.save.publication import Publications
from lazy_orbax.save.refused_trees import refuse_relative
from lazy_orbax.save.step_times import note_begun
from lazy_orbax.save.unchanged_state import Fingerprints
from lazy_orbax.snapshot.host_budget import HOST_BUDGET
from lazy_orbax.storage.pace import Pace
from lazy_orbax.storage.places import place_of
from lazy_orbax.timeline import Recorder, SaveTimeline


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Saver:
    """How one handler saves, and what it keeps from save to save.

    Attributes:
        settings: how it saves, in Orbax's terms.
        options: how it takes a snapshot.
        limit_bytes: most bytes of snapshot in host memory.
        slab_bytes: most bytes of a slab.
        processes: Orbax's `MultiprocessingOptions`, or `None`.
        merge: merges in a directory what several processes wrote.
        pace: how fast it may write.
        fingerprints: what its last saves held.
        publications: what it has finalized and Orbax has not published yet.
        commits: its saves of which more may come.
    """

    settings: Settings
    options: LazyOptions
    limit_bytes: int
    slab_bytes: int
    processes: Any
    merge: Callable[[Any], None]
    pace: Pace
    fingerprints: Fingerprints = dataclasses.field(default_factory=Fingerprints)
    publications: Publications = dataclasses.field(default_factory=Publications)
    commits: list[Commit] = dataclasses.field(default_factory=list)

    @property
    def has_unfinished(self) -> bool:
        """Whether something of its saves may be left to do."""
        return bool(self.commits or self.publications.has_pending)

    def forget_what_is_over(self) -> None:
        """Lets go of the saves of which nothing more will come. Others may begin meanwhile."""
        for commit in [commit for commit in self.commits if commit.part.is_over]:
            with contextlib.suppress(ValueError):  # Another thread was here.
                self.commits.remove(commit)


async def begin(saver: Saver, directory: Any, args: Any) -> list[Commit]:
    """Puts `args.item` out of reach of donation and starts writing it.

    Args:
        saver: how the handler saves.
        directory: where Orbax wants the item. It may come into being later.
        args: `LazySave`, or Orbax's own arguments of the same fields.

    Returns:
        What Orbax waits for, which is running already.

    Raises:
        OptionError: Orbax cannot write to such a directory, or nothing can be linked there.
        TreeError: the tree cannot be saved. Nothing was written.
        SaveError: the save failed while it waited for host memory.
        NotDurableError: an earlier step was published unheard, and cannot be synced any more.
    """
    custom_metadata = own_json(args.custom_metadata)
    path, operation = handed_in.path_of(directory), lifecycle.operation_id()
    recorder = Recorder(path, saver.options.on_timeline, _record)
    _refuse_after_interruption(path)
    # Before what is left of earlier saves is looked at: this one may have the same directory.
    removes_all = multihost.is_primary_host(saver.settings.primary_host)
    attempt = attempt_at(path, operation, removes_all=removes_all)
    failures = _end_earlier_saves(saver, path)
    prepared, leaves = prepare(
        saver.settings,
        args.item,
        args.save_args,
        destination=Destination(place_of(path).stand_in(), args.ocdbt_target_data_file_size),
        slab_bytes=saver.slab_bytes,
        abstract=False,
    )
    refuse_relative(path, uses_ocdbt=bool(prepared.format.own_directories))
    if saver.options.skip_unchanged:
        refuse_unlinkable(path)
    if failures:
        remember(failures, prepared.plan.n_bytes, item_directory=path)
    save = Save(_job(saver, prepared, leaves, recorder))
    others = await handed_in.serialize_others(saver.settings, prepared.others, leaves, directory)
    item = _paths.final(path).rpartition("/")[2]
    writers = prepared.plan.processes
    agreement = agreement_on(writers, saver.processes, operation=operation, item=item)
    # Created before the snapshot: a state larger than the budget is written while it is taken.
    with _beside(saver.options.keeper, save, prepared, leaves, args.item):
        commit = Commit(
            save,
            directory,
            custom_metadata,
            attempt=attempt,
            agreement=agreement,
            merge=saver.merge,
        )
    commit.others = others
    # From here on the next save, or `close`, ends this one where Orbax does not.
    saver.commits.append(commit)
    note_begun(recorder)
    _put_out_of_reach(commit, prepared.arrays(leaves))
    metrics.record_blocking(recorder.timeline)
    return [commit]


@contextlib.contextmanager
def _beside(
    keeper: Any, save: Save, prepared: Prepared, leaves: Sequence[Any], item: Any
) -> Iterator[None]:
    """Lets a keeper have what is saved, unless the save is refused within."""
    if keeper is not None:
        texts = prepared.texts(leaves)
        save.take_along(keeper.take_along(save.path, prepared.plan, item, texts))
    try:
        yield
    except BaseException:
        save.drop()
        raise


def own_json(custom_metadata: Any) -> Any:
    """Returns a copy that the caller cannot change any more.

    Raises:
        OptionError: it cannot be written as JSON.
    """
    try:
        return json.loads(json.dumps(custom_metadata))
    except (TypeError, ValueError) as error:
        raise OptionError(f"custom_metadata cannot be written as JSON: {error}.") from error


def _record(timeline: SaveTimeline) -> None:
    metrics.record_save(timeline, host_peak_bytes=HOST_BUDGET.peak_bytes)


def _refuse_after_interruption(path: str) -> None:
    """Waits for a save of Orbax that Ctrl-C has made it forget, and refuses the one it began.

    What Orbax knows of the items of the new step went when it published the other one.
    """
    if await_interrupted() and _paths.temporary_root(path) != path:
        raise SaveError(
            "the save before this one was still being published, because the wait for it was "
            "interrupted (Ctrl-C). It has ended now: save this step again",
            directory=path,
        )


def _end_earlier_saves(saver: Saver, path: str) -> list[BaseException]:
    """Ends the saves that Orbax has done with. Returns what they failed with."""
    # Where several processes go through `save()` together, `close` raises what failed.
    saver.publications.catch_up(raises=jax.process_count() == 1)
    earlier = list(saver.commits)
    end_earlier([commit.part for commit in earlier], _paths.final(path))
    saver.forget_what_is_over()
    return [error for commit in earlier if (error := commit.part.failure)]


def _job(saver: Saver, prepared: Prepared, leaves: Sequence[Any], recorder: Recorder) -> Job:
    every = saver.options.verify_snapshot
    recorder.mark("planned")
    return Job(
        prepared=prepared,
        texts=prepared.texts(leaves),
        options=saver.options,
        limit_bytes=saver.limit_bytes,
        pace=saver.pace,
        fingerprints=saver.fingerprints,
        recorder=recorder,
        evidence=TURNS.next(prepared.plan, recorder.item, every),
    )


def _put_out_of_reach(commit: Commit, arrays: Sequence[Any]) -> None:
    try:
        commit.save.snapshot(arrays)
    except BaseException as error:
        if commit.lose(error):
            return  # The other processes are in the middle of `save()`: this one goes on too.
        if isinstance(error, Exception) and commit.save.failure is not None:
            # It has its own cause, perhaps of another thread.
            raise commit.save.failure  # noqa: B904
        raise
