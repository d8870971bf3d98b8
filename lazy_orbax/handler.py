"""The custom handler and its two stock-shaped faces.

A save is `prepare` (which slabs, which offsets: cached), `Save.snapshot` (out of reach of donation
before `save()` returns) and `Save.write` (in Orbax's commit thread). Orbax does the rest:
temporary directories, barriers, publishing, retention; and all of restore.
"""

from __future__ import annotations

import concurrent.futures
import inspect
import json
from typing import Any

import orbax.checkpoint as ocp
from orbax.checkpoint import future

from lazy_orbax import _orbax
from lazy_orbax.errors import OptionError
from lazy_orbax.events import await_publication, final_directory
from lazy_orbax.options import LazyOptions
from lazy_orbax.prepare import prepare
from lazy_orbax.restore import explained
from lazy_orbax.save import Save

_GB = 10**9
_STOCK_CONCURRENT_GB = 96


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
        **stock: Any,
    ):
        """Creates a handler.

        Args:
            options: how to take a snapshot; `None` is `LazyOptions()`.
            save_concurrent_gb: most GB (10**9 bytes) of snapshot in host memory, as is
                `options.host_bytes`; the smaller counts.
            restore_concurrent_gb: as in stock Orbax, most GB being restored at once.
            save_device_host_concurrent_gb: as `save_concurrent_gb`.
            use_compression: compress with zstd. Stock Orbax does by default; see the README.
            **stock: every other keyword of `ocp.PyTreeCheckpointHandler`.

        Raises:
            OptionError: a value is out of range.
        """
        self._options = options or LazyOptions()
        if not isinstance(self._options, LazyOptions):
            raise OptionError(f"options={options!r} is not a lazy_orbax.LazyOptions.")
        self._limit_bytes = self._options.host_limit_bytes
        limits = stock.get("memory_limit_options")
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
                self._limit_bytes = min(self._limit_bytes, int(value * _GB))
        self._commits: list[_Commit] = []
        restore_gb = restore_concurrent_gb or _STOCK_CONCURRENT_GB
        self.settings = _hashable({**stock, "use_compression": use_compression})
        if _orbax.warn_if_stock():
            stock["restore_concurrent_gb"] = restore_gb
        else:
            stock["restore_concurrent_bytes"] = restore_gb * _GB
        super().__init__(use_compression=use_compression, **stock)
        # What is written into the checkpoint: the stock name, so that stock Orbax reads it without
        # being told how. On the class it would clash with the stock handler's registration.
        self.typestr = _orbax.typestr_of_pytree_handler

    async def async_save(self, directory: Any, args: Any) -> list[Any] | None:
        """Puts `args.item` out of reach of donation and starts writing it.

        Args:
            directory: where Orbax wants the item. It may come into being later.
            args: `LazySave`, or Orbax's own arguments of the same fields.

        Returns:
            Futures that are running already. The caller may donate, delete or change what is in
            `args.item` when this returned.

        Raises:
            TreeError: the tree cannot be saved. Nothing was written.
            SaveError: the save failed while it waited for host memory.
        """
        if _orbax.MISSING or getattr(args, "partial_save_mode", False):
            return await super().async_save(directory, args=_orbax.stock_save_args(args))
        self._forget_ended_saves()
        _check_custom_metadata(args.custom_metadata)
        prepared, leaves = prepare(
            self,
            args.item,
            args.save_args,
            ocdbt_target_data_file_size=args.ocdbt_target_data_file_size,
            slab_bytes=self._options.slab_bytes,
        )
        save = Save(
            prepared, self._options, limit_bytes=self._limit_bytes, path=_orbax.path_of(directory)
        )
        others = await _orbax.serialize_others(self, prepared.others, leaves, directory)
        # Created before the snapshot: a state larger than the budget is written while it is taken.
        commit = _Commit(save, directory, args.custom_metadata)
        try:
            save.snapshot(leaves)
        except BaseException:
            for other in others:
                other.cancel()
            raise
        self._commits.append(commit)
        return [commit, *others]

    def restore(self, directory: Any, args: Any = None) -> Any:
        """Restores a tree, by Orbax's own path.

        Args:
            directory: the item's directory.
            args: `LazyRestore`, Orbax's own arguments of the same fields, or `None`.

        Returns:
            A tree with the structure of `args.item`, or of nested dictionaries and lists.

        Raises:
            RestoreError: the target does not fit what is stored; every misfit leaf is named.
        """
        with explained(self, directory, args):
            return super().restore(directory, args=_orbax.stock_restore_args(args))

    def finalize(self, directory: Any) -> None:
        """Lets Orbax merge what the processes wrote. Orbax publishes the step after this."""
        super().finalize(directory)
        place = final_directory(str(directory))
        for commit in self._commits:
            if commit.save.recorder.timeline.directory == place:
                await_publication(commit.save.recorder)

    def close(self) -> None:
        """Waits for what is being saved. A second call does nothing.

        Raises:
            SaveError: a save failed, and nobody was told yet.
        """
        commits, self._commits = self._commits, []
        errors = [error for commit in commits if (error := commit.outcome())]
        super().close()
        if errors:
            raise errors[0]

    def _forget_ended_saves(self) -> None:
        self._commits = [commit for commit in self._commits if commit.is_running()]


class _Commit:
    """What Orbax waits for: `Save.write`, in a thread that starts when the directory exists."""

    def __init__(self, save: Save, directory: Any, custom_metadata: Any):
        self.save = save
        self._told = False
        self._future = future.CommitFutureAwaitingContractedSignals(
            _write(save, directory, custom_metadata), name="lazy_orbax-write"
        )

    def result(self, timeout: float | None = None) -> None:
        """Waits until the item is durable.

        Raises:
            SaveError: it failed.
            TimeoutError: it takes longer than `timeout` seconds.
        """
        try:
            self._future.result(timeout=timeout)
        except TimeoutError:
            raise
        except BaseException as error:
            self._told = True
            # Orbax may have given up before `Save.write` ran, which would have cleaned up.
            self.save.abandon(error)
            raise
        self._told = True

    def outcome(self) -> BaseException | None:
        """Waits for the end and returns what went wrong, if nobody was told yet."""
        if self._told:
            return None
        try:
            self.result()
        except Exception as error:  # noqa: BLE001 - `close` raises it.
            return error
        finally:
            self.save.recorder.end()
        return None

    def is_running(self) -> bool:
        """Whether the save goes on. One that has ended lets go of everything."""
        try:
            self.result(timeout=0)
        except TimeoutError:
            return True
        except Exception:  # noqa: BLE001 - Orbax raised it, or gave up this save with an error.
            pass
        self.save.recorder.end()
        return False

    def cancel(self) -> None:
        """Stops writing and returns the host memory."""
        self.save.fail(concurrent.futures.CancelledError("The save was cancelled."))
        self._future.cancel()


async def _write(save: Save, directory: Any, custom_metadata: Any) -> None:
    save.write(str(await _orbax.created(directory)), custom_metadata)


def _check_custom_metadata(custom_metadata: Any) -> None:
    try:
        json.dumps(custom_metadata)
    except (TypeError, ValueError) as error:
        raise OptionError(f"custom_metadata cannot be written as JSON: {error}.") from error


def _hashable(settings: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((name, repr(value)) for name, value in settings.items()))


def pytree_handler(
    *, options: LazyOptions | None = None, aggregate_filename: str | None = None, **kwargs: Any
) -> ocp.PyTreeCheckpointHandler:
    """Returns a stock `ocp.PyTreeCheckpointHandler` that saves lazily.

    It takes `ocp.args.PyTreeSave` and `PyTreeRestore`.

    Args:
        options: how to take a snapshot; `None` is `LazyOptions()`.
        aggregate_filename: as in stock Orbax.
        **kwargs: the keywords of `LazyCheckpointHandler`, which are those of the stock handler.

    Raises:
        OptionError: a value is out of range.
    """
    lazy = LazyCheckpointHandler(options=options, **kwargs)
    accepted = inspect.signature(ocp.PyTreeCheckpointHandler).parameters
    shared = {name: value for name, value in kwargs.items() if name in accepted}
    if _orbax.MISSING:
        return ocp.PyTreeCheckpointHandler(aggregate_filename, **shared)
    return ocp.PyTreeCheckpointHandler(aggregate_filename, handler_impl=lazy, **shared)


def standard_handler(
    *, options: LazyOptions | None = None, **kwargs: Any
) -> ocp.StandardCheckpointHandler:
    """Returns a stock `ocp.StandardCheckpointHandler` that saves lazily.

    It takes `ocp.args.StandardSave` and `StandardRestore`.

    Args:
        options: how to take a snapshot; `None` is `LazyOptions()`.
        **kwargs: the keywords of `LazyCheckpointHandler`; more than the stock handler takes.

    Raises:
        OptionError: a value is out of range.
    """
    accepted = inspect.signature(ocp.StandardCheckpointHandler).parameters
    shared = {name: value for name, value in kwargs.items() if name in accepted}
    standard = ocp.StandardCheckpointHandler(**shared)
    _orbax.put_inside_standard_handler(standard, pytree_handler(options=options, **kwargs))
    return standard
