"""The custom handler: Orbax's protocol, and nothing else.

`stock_shaped.py` puts it inside Orbax's own handlers.

The story of a save is in `begin`, its end in `finish`, a restore in `restore`. Orbax does the rest:
temporary directories, barriers, publishing, retention; and reading.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import TYPE_CHECKING, Any

from etils import epath

from lazy_orbax import _paths
from lazy_orbax._orbax import describe, handed_in, symbols
from lazy_orbax._orbax.operations import tell_threads_apart
from lazy_orbax._orbax.records import Destination, Settings
from lazy_orbax._orbax.symbols import ocp
from lazy_orbax._orbax.waiting import leaving_nobody_waiting
from lazy_orbax.handlers.stock_fallback import (
    GB,
    STOCK_CONCURRENT_GB,
    StockFallback,
    checked_options,
    limit_bytes,
)
from lazy_orbax.handlers.stock_saves import STOCK_SAVES
from lazy_orbax.options import LazyOptions
from lazy_orbax.plan.slabs import Plan
from lazy_orbax.plan.transforms.transform_map import TransformMap
from lazy_orbax.restore.either_way import Question
from lazy_orbax.restore.load import load
from lazy_orbax.restore.verified import agreed, examined, restore
from lazy_orbax.save.begin import Saver, begin
from lazy_orbax.save.finish import end_all, finish
from lazy_orbax.save.merge import merge
from lazy_orbax.save.plan_cache import prepare
from lazy_orbax.save.process_end import finish_at_the_end
from lazy_orbax.save.publication import Publications
from lazy_orbax.save.unchanged_state import Fingerprints
from lazy_orbax.storage.pace import Pace
from lazy_orbax.timeline import RestoreRecorder
from lazy_orbax.trust.malformed import checked

# Slabs that fit the budget at once: some are copied while others are written.
_LEAST_SLABS = 4


class LazyCheckpointHandler(symbols.HANDLER_BASE):
    """Saves trees of `jax.Array`s lazily, in Orbax's own format.

    Use it with `lazy_orbax.args.LazySave` and `LazyRestore`, or through `pytree_handler()` and
    `standard_handler()`, which take stock args. One handler may serve several items.

    A leaf may be a `jax.Array` of any shape, dtype and sharding, a typed key, a NumPy array, a
    number or a string. When `save()` has returned, the caller may donate, delete or change it.

    Attributes:
        options: how it takes a snapshot.
        limit_bytes: most bytes of snapshot in host memory, over all saves of the process.
        typestr: the name of the stock handler, which the checkpoint holds.
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
        self.options = checked_options(options, keywords)
        self.limit_bytes = limit_bytes(
            self.options,
            save_concurrent_gb=save_concurrent_gb,
            save_device_host_concurrent_gb=save_device_host_concurrent_gb,
            restore_concurrent_gb=restore_concurrent_gb,
            memory_limits=keywords.get("memory_limit_options"),
        )
        self._slab_bytes = min(
            self.options.slab_bytes,
            self.limit_bytes // _LEAST_SLABS,
            self.options.write_bytes_per_s or self.options.slab_bytes,
        )
        given = {**keywords, "use_compression": use_compression}
        self._restore_bytes = int((restore_concurrent_gb or STOCK_CONCURRENT_GB) * GB)
        super().__init__(**given, restore_concurrent_bytes=self._restore_bytes)
        tell_threads_apart()
        STOCK_SAVES.watch()
        self._saver = Saver(
            settings=describe.settings_of(self, given),
            options=self.options,
            limit_bytes=self.limit_bytes,
            slab_bytes=self._slab_bytes,
            processes=keywords.get("multiprocessing_options"),
            merge=self._merge,
            pace=Pace(self.options.write_bytes_per_s),
        )
        finish_at_the_end(self._saver)
        # What is written into the checkpoint: the stock name, so that stock Orbax reads it without
        # being told how. On the class it would clash with the stock handler's registration.
        self.typestr = ocp.PyTreeCheckpointHandler.typestr

    def __deepcopy__(self, memo: dict[int, Any]) -> LazyCheckpointHandler:
        """Returns a handler that saves as this one does; what this one is saving stays here."""
        copied = memo[id(self)] = object.__new__(type(self))
        memo[id(self.options)] = self.options  # Who is to be called back is the caller's.
        own = {name: value for name, value in vars(self).items() if name != "_saver"}
        copied.__dict__.update(copy.deepcopy(own, memo))
        copied._saver = dataclasses.replace(
            self._saver,
            merge=copied._merge,
            pace=Pace(self.options.write_bytes_per_s),
            fingerprints=Fingerprints(),
            publications=Publications(),
            commits=[],
        )
        finish_at_the_end(copied._saver)
        return copied

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
        if getattr(args, "partial_save_mode", False):
            return await super().async_save(directory, args=args)
        STOCK_SAVES.note_lazy(directory)
        return await begin(self._saver, directory, args)  # type: ignore[return-value]

    def go_on_for(self, saver: Saver, settings: Settings) -> None:
        """Goes on with what another handler kept from save to save.

        Args:
            saver: of the other handler, which ends what both save.
            settings: how this one saves.
        """
        own = ("options", "limit_bytes", "slab_bytes", "processes", "merge")
        changed = {name: getattr(self._saver, name) for name in own}
        self._saver = dataclasses.replace(saver, settings=settings, **changed)

    @property
    def saver(self) -> Saver:
        """How it saves, and what it keeps from save to save."""
        return self._saver

    @property
    def settings(self) -> Settings:
        """How the handler saves, in Orbax's terms."""
        return self._saver.settings

    @property
    def is_shared(self) -> bool:
        """Whether all processes of the job save and restore together, in one directory."""
        options = self._saver.processes
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

    def restore(self, directory: Any, args: Any = None, *, of_orbax: Any = None) -> Any:
        """Restores a tree, and verifies it (`LazyOptions.verify_restore`).

        Args:
            directory: the item's directory.
            args: `LazyRestore`, Orbax's own arguments of the same fields, or `None`.
            of_orbax: the same, for what Orbax restores, if it takes them in another form.

        Returns:
            A tree with the structure of `args.item`, or of nested dictionaries and lists.

        Raises:
            RestoreError: the target does not fit what is stored; every misfit leaf is named.
            CorruptCheckpointError: what is stored, or was restored, is not what was saved.
            MalformedCheckpointError: it is not a checkpoint that Orbax wrote.
        """
        directory = handed_in.without_dots(directory)
        if isinstance(getattr(args, "transforms", None), TransformMap):
            return self._restore_transformed(str(directory), args)
        stock = super().restore
        question = Question(
            directory,
            args,
            by_orbax=lambda args: stock(
                directory,
                args=args if of_orbax is None else dataclasses.replace(of_orbax, item=args.item),
            ),
            metadata=self.metadata,
            registry=self.settings.type_handlers,
            limit_bytes=self._restore_bytes,
            verifies=self.options.verify_restore,
            is_shared=self.is_shared,
            recorder=RestoreRecorder(str(directory), self.options.on_restore_progress),
        )
        try:
            with examined(directory, args, verifies=question.verifies) as contents:
                return restore(question, contents)
        except BaseException as error:
            question.recorder.note(error=error)
            raise
        finally:
            question.recorder.report(self.options.on_restore)

    def _restore_transformed(self, directory: str, args: Any) -> Any:
        return agreed(
            directory,
            lambda: load(directory, args.item, transforms=args.transforms, options=self.options),
            instead=args.item,
            asks=self.is_shared,
            recorder=RestoreRecorder(directory),
        )

    def metadata(self, directory: Any) -> Any:
        """Returns what Orbax says about the leaves of a checkpoint.

        Raises:
            MalformedCheckpointError: it is not a checkpoint that Orbax wrote.
        """
        directory = handed_in.without_dots(directory)
        with checked(directory, None):
            return super().metadata(directory)

    def finalize(self, directory: Any) -> None:
        """Lets Orbax merge what the processes wrote, and syncs it. Orbax publishes the step then.

        Raises:
            SaveError: the storage refused it, or did nothing for too long.
        """
        finish(self._saver, directory)

    def _merge(self, directory: Any) -> None:
        place = epath.Path(_paths.without_dots(str(directory)))
        by_orbax = functools.partial(super().finalize, place)
        merge(self.settings, place, by_orbax, timeout_s=self.options.storage_timeout_s)

    def close(self) -> None:
        """Waits for what is being saved, and gives host memory back. A second call does nothing.

        Raises:
            SaveError: a save failed, and nobody was told yet.
        """
        try:
            end_all(self._saver)
        finally:
            super().close()


if symbols.MISSING and not TYPE_CHECKING:
    LazyCheckpointHandler = StockFallback
