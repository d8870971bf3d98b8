"""The custom handler. `faces.py` puts it inside Orbax's own.

A save is `prepare` (which slabs, which offsets: cached), `Save.snapshot` (out of reach of donation
before `save()` returns) and `Save.write` (in Orbax's commit thread). Orbax does the rest:
temporary directories, barriers, publishing, retention; and all of restore.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import jax
from etils import epath

from lazy_orbax import _paths, step_metadata, stock, threads
from lazy_orbax._orbax import describe, lifecycle, multihost, symbols
from lazy_orbax._orbax.interrupted import await_interrupted
from lazy_orbax._orbax.operations import tell_threads_apart
from lazy_orbax._orbax.symbols import ocp
from lazy_orbax._orbax.waiting import leaving_nobody_waiting
from lazy_orbax.agreement import agreement_on
from lazy_orbax.attempt import Fate, attempt_at
from lazy_orbax.cleaning import end_earlier
from lazy_orbax.commit import Commit
from lazy_orbax.durable import before_publication
from lazy_orbax.errors import OptionError, SaveError
from lazy_orbax.forgotten import remember
from lazy_orbax.host_budget import HOST_BUDGET
from lazy_orbax.object_store import stand_in
from lazy_orbax.options import LazyOptions
from lazy_orbax.pace import Pace
from lazy_orbax.plan import Plan
from lazy_orbax.prepare import prepare
from lazy_orbax.publication import Publications, await_publication, publication_failed
from lazy_orbax.refuse import refuse_relative
from lazy_orbax.restore import examined, restore
from lazy_orbax.save import Job, Save
from lazy_orbax.stale import Fingerprints
from lazy_orbax.sync import Inode
from lazy_orbax.tree import Destination
from lazy_orbax.untrusted import checked
from lazy_orbax.write import merge

_GB = 10**9
_STOCK_CONCURRENT_GB = 96
# Slabs that fit the budget at once: some are copied while others are written.
_LEAST_SLABS = 4


class LazyCheckpointHandler(symbols.HANDLER_BASE):
    """Saves trees of `jax.Array`s lazily, in Orbax's own format.

    Use it with `lazy_orbax.args.LazySave` and `LazyRestore`, or through `pytree_handler()` and
    `standard_handler()`, which take stock args. One handler may serve several items.
    """

    def __init__(
        self,
        *,
        options: LazyOptions | None = None,
        save_concurrent_gb: int | None = None,
        restore_concurrent_gb: int | None = None,
        save_device_host_concurrent_gb: int | str | None = None,
        use_compression: bool = False,
        **keywords: Any,
    ):
        """Creates a handler.

        Args:
            options: how to take a snapshot; `None` is `LazyOptions()`.
            save_concurrent_gb: most GB (10**9 bytes) of snapshot in host memory, as is
                `options.host_bytes`; the smaller counts.
            restore_concurrent_gb: as in stock Orbax, most GB being restored at once.
            save_device_host_concurrent_gb: as `save_concurrent_gb`.
            use_compression: compress with zstd, as stock Orbax does by default. Why not here:
                `examples/guides/differences.md`.
            **keywords: every other keyword of `ocp.PyTreeCheckpointHandler`.

        Raises:
            OptionError: a value is out of range.
        """
        self.options = options or LazyOptions()
        if not isinstance(self.options, LazyOptions):
            raise OptionError(f"options={options!r} is not a lazy_orbax.LazyOptions.")
        self.limit_bytes = self.options.host_limit_bytes
        limits = keywords.get("memory_limit_options")
        for name, value in (
            ("save_concurrent_gb", save_concurrent_gb),
            ("save_device_host_concurrent_gb", save_device_host_concurrent_gb),
            ("max_transfer_concurrent_gb", getattr(limits, "max_transfer_concurrent_gb", None)),
            ("restore_concurrent_gb", restore_concurrent_gb),
        ):
            if value is None or value == "auto":
                continue
            if not isinstance(value, int | float) or value <= 0:
                raise OptionError(f"{name}={value!r} must be a positive number of GB.")
            if not name.startswith("restore"):
                self.limit_bytes = min(self.limit_bytes, int(value * _GB))
        self._slab_bytes = min(
            self.options.slab_bytes,
            self.limit_bytes // _LEAST_SLABS,
            self.options.write_bytes_per_s or self.options.slab_bytes,
        )
        self._pace = Pace(self.options.write_bytes_per_s)
        self._commits: list[Commit] = []
        self._publications = Publications()
        self._fingerprints = Fingerprints()
        self._multiprocessing_options = keywords.get("multiprocessing_options")
        restore_gb = restore_concurrent_gb or _STOCK_CONCURRENT_GB
        given = {**keywords, "use_compression": use_compression}
        if symbols.warn_if_stock():
            super().__init__(**given, restore_concurrent_gb=restore_gb)
        else:
            super().__init__(**given, restore_concurrent_bytes=restore_gb * _GB)
            self.settings = describe.settings_of(self, given)
            tell_threads_apart()
        # What is written into the checkpoint: the stock name, so that stock Orbax reads it without
        # being told how. On the class it would clash with the stock handler's registration.
        self.typestr = ocp.PyTreeCheckpointHandler.typestr

    @leaving_nobody_waiting
    async def async_save(self, directory: Any, args: Any) -> list[Any] | None:
        """Puts `args.item` out of reach of donation and starts writing it.

        Args:
            directory: where Orbax wants the item. It may come into being later.
            args: `LazySave`, or Orbax's own arguments of the same fields.

        Returns:
            Futures that are running already. The caller may donate, delete or change what is in
            `args.item` when this returned.

        Raises:
            OptionError: Orbax cannot write to such a directory.
            TreeError: the tree cannot be saved. Nothing was written.
            SaveError: the save failed while it waited for host memory.
            NotDurableError: an earlier step was published unheard, and cannot be synced any more.
        """
        if symbols.MISSING or getattr(args, "partial_save_mode", False):
            stock_args = stock.save_args(args) if symbols.MISSING else args
            return await super().async_save(directory, args=stock_args)
        custom_metadata = _own_json(args.custom_metadata)
        path = stock.path_of(directory)
        if await_interrupted() and _paths.temporary_root(path) != path:
            # What Orbax knows of the items of this step went when it published the other one.
            raise SaveError(
                "the save before this one was still being published, because the wait for it was "
                "interrupted (Ctrl-C). It has ended now: save this step again",
                directory=path,
            )
        place = _paths.final(path)
        # Before what is left of earlier saves is looked at: this one may have the same directory.
        removes_all = multihost.is_primary_host(self.settings.primary_host)
        attempt = attempt_at(path, lifecycle.operation_id(), removes_all=removes_all)
        # Where several processes go through `save()` together, `close` raises what failed.
        self._publications.catch_up(raises=jax.process_count() == 1)
        earlier = self._commits
        end_earlier([commit.part for commit in earlier], place)
        self._commits = [commit for commit in earlier if not commit.part.is_over]
        prepared, leaves = prepare(
            self.settings,
            args.item,
            args.save_args,
            destination=Destination(stand_in(path), args.ocdbt_target_data_file_size),
            slab_bytes=self._slab_bytes,
            abstract=False,
        )
        refuse_relative(path, uses_ocdbt=bool(prepared.format.own_directories))
        if failures := [error for commit in earlier if (error := commit.part.failure)]:
            remember(failures, prepared.plan.n_bytes)
        job = Job(
            prepared=prepared,
            texts=prepared.texts(leaves),
            options=self.options,
            limit_bytes=self.limit_bytes,
            pace=self._pace,
            path=path,
            fingerprints=self._fingerprints,
        )
        save = Save(job)
        others = await stock.serialize_others(prepared.others, leaves, directory)
        agreement = agreement_on(
            prepared.plan.processes,
            self._multiprocessing_options,
            operation=lifecycle.operation_id(),
            item=place.rpartition("/")[2],
        )
        # Created before the snapshot: a state larger than the budget is written while it is taken.
        commit = Commit(
            save,
            directory,
            custom_metadata,
            attempt=attempt,
            agreement=agreement,
            merge=self._merge,
        )
        commit.others = others
        self._commits.append(commit)
        try:
            save.snapshot(prepared.arrays(leaves))
        except BaseException as error:
            if commit.lose(error):
                return [commit]
            if isinstance(error, Exception) and save.failure is not None:
                raise save.failure  # noqa: B904 - It has its own cause, perhaps of another thread.
            raise
        return [commit]

    @property
    def is_shared(self) -> bool:
        """Whether all processes of the job save and restore together, in one directory."""
        options = self._multiprocessing_options
        alone = getattr(options, "primary_host", 0) is None
        return not alone and getattr(options, "active_processes", None) is None

    def plan_for(self, item: Any, save_args: Any, destination: Destination) -> Plan:
        """Returns the plan with which a tree like `item`, whose values are not read, is saved.

        Raises:
            TreeError: such a tree cannot be saved.
        """
        prepared, _ = prepare(
            self.settings,
            item,
            save_args,
            destination=destination,
            slab_bytes=self._slab_bytes,
            abstract=True,
        )
        return prepared.plan

    def restore(self, directory: Any, args: Any = None) -> Any:
        """Restores a tree, by Orbax's own path, and verifies it (`LazyOptions.verify_restore`).

        Args:
            directory: the item's directory.
            args: `LazyRestore`, Orbax's own arguments of the same fields, or `None`.

        Returns:
            A tree with the structure of `args.item`, or of nested dictionaries and lists.

        Raises:
            RestoreError: the target does not fit what is stored; every misfit leaf is named.
            CorruptCheckpointError: what is stored, or was restored, is not what was saved.
            MalformedCheckpointError: it is not a checkpoint that Orbax wrote.
        """
        directory = stock.without_dots(directory)
        stock_args = stock.restore_args(args) if args and symbols.MISSING else args
        by_orbax = functools.partial(super().restore, directory, args=stock_args)
        with examined(directory, args, verifies=self.options.verify_restore):
            return restore(
                directory,
                args,
                by_orbax,
                metadata=self.metadata,
                verifies=self.options.verify_restore,
                is_shared=self.is_shared,
            )

    def metadata(self, directory: Any) -> Any:
        """Returns what Orbax says about the leaves of a checkpoint.

        Raises:
            MalformedCheckpointError: it is not a checkpoint that Orbax wrote.
        """
        directory = stock.without_dots(directory)
        with checked(directory, None):
            return super().metadata(directory)

    def finalize(self, directory: Any) -> None:
        """Lets Orbax merge what the processes wrote, and syncs it. Orbax publishes the step then.

        Raises:
            SaveError: the storage refused it, or did nothing for too long.
        """
        place = _paths.final(str(directory))
        here = [c for c in self._commits if c.save.recorder.timeline.directory == place]
        publication = await_publication([c.save.recorder for c in here])
        self._publications.add(publication)
        try:
            if not (here and here[-1].part.fate is Fate.MERGED):
                self._merge(directory)
            # Who writes leaves of ours with a type handler of their own may be late.
            synced = [c.save.synced_directories for c in here if not c.others]
            timeout_s = self.options.storage_timeout_s
            changed = step_metadata.record(str(directory), timeout_s=timeout_s)
            unchanged = set[Inode]().union(*synced) - changed
            before_publication(publication, str(directory), unchanged, timeout_s=timeout_s)
        except BaseException as error:
            publication_failed(error)
            raise

    def _merge(self, directory: Any) -> None:
        by_orbax = functools.partial(
            super().finalize, epath.Path(_paths.without_dots(str(directory)))
        )
        settings = None if symbols.MISSING else self.settings
        merge(settings, directory, by_orbax, timeout_s=self.options.storage_timeout_s)

    def close(self) -> None:
        """Waits for what is being saved, and gives host memory back. A second call does nothing.

        Raises:
            SaveError: a save failed, and nobody was told yet.
        """
        await_interrupted()
        commits, self._commits = self._commits, []
        errors: list[BaseException] = [*self._publications.end()]
        errors += [error for commit in commits if (error := commit.outcome())]
        HOST_BUDGET.drop_idle()
        threads.dismiss_idle()
        super().close()
        if errors:
            raise errors[0]


def _own_json(custom_metadata: Any) -> Any:
    """Returns a copy that the caller cannot change any more."""
    try:
        return json.loads(json.dumps(custom_metadata))
    except (TypeError, ValueError) as error:
        raise OptionError(f"custom_metadata cannot be written as JSON: {error}.") from error
