"""Orbax v1, whose saves become lazy: of the whole process, or of one `Context`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from lazy_orbax._orbax import symbols, v1
from lazy_orbax._orbax.publishing import publish_with
from lazy_orbax._orbax.symbols import ocp
from lazy_orbax._orbax.v1_leaves import TypeHandlers, restore_args_in_v0
from lazy_orbax.handlers.lazy import LazyCheckpointHandler
from lazy_orbax.handlers.stock_fallback import GB, checked_options
from lazy_orbax.options import LazyOptions
from lazy_orbax.save.begin import Saver
from lazy_orbax.save.durable_path import durable
from lazy_orbax.save.finish import end_function
from lazy_orbax.save.process_end import finish_at_the_end


def lazy_v1(
    options: LazyOptions | None = None, *, use_compression: bool = False
) -> Callable[[], None]:
    """Makes Orbax v1 save lazily, in this whole process.

    That is `ocp.v1.save`, `save_async`, `save_checkpointables`, their asynchronous forms and
    `training.Checkpointer`: each PyTree that any of them saves from now on, unless a handler of
    somebody else takes it. What they load is verified, if lazy_orbax saved it.

    Args:
        options: how to take a snapshot; `None` is `LazyOptions()`.
        use_compression: leave it to the context whether arrays are compressed, as they are by
            default there. By default none is: `examples/guides/differences.md` says why.

    Returns:
        What undoes it. Saves in flight are finished as they began.

    Raises:
        OptionError: the options are something else.
    """
    make = _maker(checked_options(options), use_compression=use_compression)
    if symbols.warn_if_stock([*symbols.MISSING, *v1.MISSING]):
        return lambda: None
    publish_with(durable)
    return v1.make_all_with(make)


def v1_registry(options: LazyOptions | None = None, *, use_compression: bool = False) -> Any:
    """Returns a registry for a `Context` of Orbax v1, with which it saves PyTrees lazily.

    It has what the global registry has now, and takes more with `add`. Give it to a context with
    `context.checkpointables.registry = lazy_orbax.v1_registry()`.

    Args:
        options: how to take a snapshot; `None` is `LazyOptions()`.
        use_compression: leave it to the context whether arrays are compressed, as they are by
            default there. By default none is: `examples/guides/differences.md` says why.

    Raises:
        OptionError: the options are something else.
    """
    make = _maker(checked_options(options), use_compression=use_compression)
    if symbols.warn_if_stock([*symbols.MISSING, *v1.MISSING]):
        return v1.ocp1.handlers.local_registry()
    publish_with(durable)
    stock, lazy = v1.ocp1.handlers.PyTreeHandler, v1.pytree_handler_with(make)
    everything = v1.ocp1.handlers.global_registry()
    registry = v1.ocp1.handlers.local_registry(include_global_registry=False)
    for handler, name in everything.get_all_entries():
        registry.add(
            lazy if handler is stock else handler,
            checkpointable_name=name,
            secondary_typestrs=everything.get_secondary_typestrs(handler),
        )
    return registry


def _maker(options: LazyOptions, *, use_compression: bool) -> v1.Make:
    """Returns what makes the inside of a handler, for each save another."""
    # What the first handler has is kept for all: which saves are under way, and what they held.
    kept: list[Saver] = []

    def make(context: Any, type_handlers: Any, validator: Any) -> v1.Inside:
        def handler(transfer_bytes: int | None) -> LazyCheckpointHandler:
            compresses = use_compression and context.array.saving.use_compression
            made = _handler(
                options, context, type_handlers, validator, transfer_bytes, compresses=compresses
            )
            if not kept:
                kept.append(made.saver)
                finish_at_the_end(made.saver)
            made.go_on_for(kept[0], made.settings)
            return made

        def end(operation: str, error: BaseException | None) -> None:
            for saver in kept:
                end_function(saver, operation, error)

        strict = not context.array.loading.enable_padding_and_truncation
        return v1.Inside(handler, end, functools.partial(restore_args_in_v0, strict=strict))

    return make


def _handler(
    options: LazyOptions,
    context: Any,
    type_handlers: Any,
    validator: Any,
    transfer: int | None,
    *,
    compresses: bool,
) -> LazyCheckpointHandler:
    """Returns a handler that does as a context says, in the terms of v0."""
    saving, memory, processes = context.array.saving, context.memory, context.multiprocessing
    alike = {
        "use_ocdbt": saving.use_ocdbt,
        "use_zarr3": saving.use_zarr3,
        "use_compression": compresses,
        "multiprocessing_options": ocp.options.MultiprocessingOptions(
            primary_host=processes.primary_host,
            active_processes=processes.active_processes,
            barrier_sync_key_prefix=processes.barrier_sync_key_prefix,
        ),
        "enable_post_merge_validation": saving.enable_post_merge_validation,
        "pytree_metadata_options": context.pytree.saving.pytree_metadata_options,
        "enable_pinned_host_transfer": saving.enable_pinned_host_transfer,
    }
    handler = LazyCheckpointHandler(
        options=options,
        save_concurrent_gb=_gb(memory.write_concurrent_bytes),
        restore_concurrent_gb=_gb(memory.read_concurrent_bytes),
        save_device_host_concurrent_gb=_gb(transfer),
        type_handler_registry=type_handlers,
        array_metadata_validator=validator,
        **alike,
    )
    settings = handler.settings.for_leaves(TypeHandlers(type_handlers), alike)
    handler.go_on_for(handler.saver, settings)
    return handler


def _gb(n_bytes: int | None) -> Any:
    return n_bytes and n_bytes / GB
