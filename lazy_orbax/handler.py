"""The custom handler. `faces.py` puts it inside Orbax's own.

A save is `prepare` (which slabs, which offsets: cached), `Save.snapshot` (out of reach of donation
before `save()` returns) and `Save.write` (in Orbax's commit thread). Orbax does the rest:
temporary directories, barriers, publishing, retention; and all of restore.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import orbax.checkpoint as ocp

from lazy_orbax import _orbax, step_metadata, stock
from lazy_orbax.agreement import agreement_on
from lazy_orbax.commit import Commit
from lazy_orbax.drain import Pace
from lazy_orbax.durable import after_publication, before_publication
from lazy_orbax.errors import OptionError, SaveError
from lazy_orbax.events import await_publication, final_directory, publication_failed
from lazy_orbax.forgotten import remember
from lazy_orbax.host_budget import HOST_BUDGET
from lazy_orbax.interrupted import await_interrupted
from lazy_orbax.leftovers import attempt_at, leaving_nobody_waiting, temporary_root
from lazy_orbax.object_store import stand_in
from lazy_orbax.operations import tell_threads_apart
from lazy_orbax.options import LazyOptions
from lazy_orbax.plan import Plan
from lazy_orbax.prepare import prepare
from lazy_orbax.restore import examined, restore
from lazy_orbax.save import Save
from lazy_orbax.stale import Fingerprints
from lazy_orbax.sync import Inode
from lazy_orbax.tree import Destination
from lazy_orbax.untrusted import checked
from lazy_orbax.write import merge

_GB = 10**9
_STOCK_CONCURRENT_GB = 96
# Slabs that fit the budget at once: some are copied while others are written.
_LEAST_SLABS = 4


class LazyCheckpointHandler(_orbax.HANDLER_BASE):
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
            use_compression: compress with zstd. Stock Orbax does by default; see the README.
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
        self._fingerprints = Fingerprints()
        self._multiprocessing_options = keywords.get("multiprocessing_options")
        restore_gb = restore_concurrent_gb or _STOCK_CONCURRENT_GB
        self.settings = _hashable({**keywords, "use_compression": use_compression})
        if _orbax.warn_if_stock():
            keywords["restore_concurrent_gb"] = restore_gb
        else:
            keywords["restore_concurrent_bytes"] = restore_gb * _GB
            tell_threads_apart(_orbax.operation_ids)
        super().__init__(use_compression=use_compression, **keywords)
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
        """
        if _orbax.MISSING or getattr(args, "partial_save_mode", False):
            stock_args = stock.save_args(args) if _orbax.MISSING else args
            return await super().async_save(directory, args=stock_args)
        custom_metadata = _own_json(args.custom_metadata)
        path = stock.path_of(directory)
        if await_interrupted() and temporary_root(path) != path:
            # What Orbax knows of the items of this step went when it published the other one.
            raise SaveError(
                "the save before this one was still being published, because the wait for it was "
                "interrupted (Ctrl-C). It has ended now: save this step again",
                directory=path,
            )
        place = final_directory(path)
        # Before what is left of earlier saves is looked at: this one may have the same directory.
        removes_all = _orbax.is_primary_host(_orbax.primary_host(self))
        attempt = attempt_at(path, _orbax.operation_id(), removes_all=removes_all)
        earlier = self._commits
        self._commits = [commit for commit in earlier if not commit.is_past(place)]
        prepared, leaves = prepare(
            self,
            args.item,
            args.save_args,
            destination=Destination(stand_in(path), args.ocdbt_target_data_file_size),
            slab_bytes=self._slab_bytes,
            abstract=False,
        )
        if failures := [error for commit in earlier if (error := commit.error)]:
            remember(failures, prepared.plan.n_bytes)
        save = Save(
            prepared,
            self.options,
            limit_bytes=self.limit_bytes,
            pace=self._pace,
            path=path,
            fingerprints=self._fingerprints,
        )
        others = await stock.serialize_others(prepared.others, leaves, directory)
        agreement = agreement_on(
            prepared.plan.processes,
            self._multiprocessing_options,
            operation=_orbax.operation_id(),
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
        commit.include(others)
        self._commits.append(commit)
        try:
            save.snapshot(leaves)
        except BaseException as error:
            # The other processes are in the middle of `save()`: this one must go through it too.
            if agreement is None or not isinstance(error, Exception):
                for other in others:
                    other.cancel()
                attempt.fail(commit.give_up(error))
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
            self,
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
        stock_args = stock.restore_args(args) if args and _orbax.MISSING else args
        by_orbax = functools.partial(super().restore, directory, args=stock_args)
        with examined(directory, args, verifies=self.options.verify_restore):
            return restore(self, directory, args, by_orbax)

    def metadata(self, directory: Any) -> Any:
        """Returns what Orbax says about the leaves of a checkpoint.

        Raises:
            MalformedCheckpointError: it is not a checkpoint that Orbax wrote.
        """
        with checked(directory, None):
            return super().metadata(directory)

    def finalize(self, directory: Any) -> None:
        """Lets Orbax merge what the processes wrote, and syncs it. Orbax publishes the step then.

        Raises:
            SaveError: the storage refused it, or did nothing for too long.
        """
        place = final_directory(str(directory))
        here = [c for c in self._commits if c.save.recorder.timeline.directory == place]
        await_publication([c.save.recorder for c in here], after_publication)
        try:
            if not (here and here[-1].is_merged):
                self._merge(directory)
            # Who writes leaves of ours with a type handler of their own may be late.
            synced = [c.save.synced_directories for c in here if not c.has_others]
            timeout_s = self.options.storage_timeout_s
            changed = step_metadata.record(str(directory), timeout_s=timeout_s)
            unchanged = set[Inode]().union(*synced) - changed
            before_publication(str(directory), unchanged, timeout_s=timeout_s)
        except BaseException as error:
            publication_failed(error)
            raise

    def _merge(self, directory: Any) -> None:
        by_orbax = functools.partial(super().finalize, directory)
        merge(self, directory, by_orbax, timeout_s=self.options.storage_timeout_s)

    def close(self) -> None:
        """Waits for what is being saved, and gives host memory back. A second call does nothing.

        Raises:
            SaveError: a save failed, and nobody was told yet.
        """
        await_interrupted()
        commits, self._commits = self._commits, []
        errors = [error for commit in commits if (error := commit.outcome())]
        HOST_BUDGET.drop_idle()
        super().close()
        if errors:
            raise errors[0]


def _own_json(custom_metadata: Any) -> Any:
    """Returns a copy that the caller cannot change any more."""
    try:
        return json.loads(json.dumps(custom_metadata))
    except (TypeError, ValueError) as error:
        raise OptionError(f"custom_metadata cannot be written as JSON: {error}.") from error


def _hashable(settings: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((name, repr(value)) for name, value in settings.items()))
