"""The two stock-shaped faces of the handler: Orbax's own types, which save lazily inside."""

from __future__ import annotations

import functools
import inspect
import types
import weakref
from typing import Any

from lazy_orbax._orbax import symbols
from lazy_orbax._orbax.standard_handler import put_inside_standard_handler
from lazy_orbax._orbax.symbols import ocp
from lazy_orbax._orbax.waiting import leaving_nobody_waiting
from lazy_orbax.errors import OptionError
from lazy_orbax.handlers.lazy import LazyCheckpointHandler
from lazy_orbax.handlers.stock_fallback import StockFallback
from lazy_orbax.options import LazyOptions
from lazy_orbax.restore.verified import examined
from lazy_orbax.trust.malformed import checked

# What is inside the handlers that `pytree_handler` and `standard_handler` returned.
_INSIDE: weakref.WeakKeyDictionary[Any, LazyCheckpointHandler] = weakref.WeakKeyDictionary()


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
    if not isinstance(lazy, StockFallback):
        shared["handler_impl"] = lazy
    handler = ocp.PyTreeCheckpointHandler(aggregate_filename, **shared)
    _examine_before_reading(handler, aggregate_filename, verifies=lazy.options.verify_restore)
    _INSIDE[handler] = lazy
    handler.async_save = leaving_nobody_waiting(handler.async_save)
    return handler


def _examine_before_reading(
    handler: Any, aggregate_filename: str | None, *, verifies: bool
) -> None:
    """Makes a stock handler look at a checkpoint before it reads it by itself."""
    restore, metadata = handler.restore, handler.metadata

    @functools.wraps(restore)
    def checking(directory: Any, *positional: Any, **keywords: Any) -> Any:
        args = keywords.get("args")
        if args is None:
            given = inspect.signature(restore).bind(directory, *positional, **keywords).arguments
            args = types.SimpleNamespace(**given)
        with examined(directory, args, aggregate_filename, verifies=verifies):
            return restore(directory, *positional, **keywords)

    @functools.wraps(metadata)
    def checking_metadata(directory: Any) -> Any:
        with checked(directory, None, aggregate_filename):
            return metadata(directory)

    handler.restore, handler.metadata = checking, checking_metadata


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
    pytree = pytree_handler(options=options, **kwargs)
    accepted = inspect.signature(ocp.StandardCheckpointHandler).parameters
    shared = {name: value for name, value in kwargs.items() if name in accepted}
    standard = ocp.StandardCheckpointHandler(**shared)
    if put_inside_standard_handler(standard, pytree):
        _INSIDE[standard] = _INSIDE[pytree]
        standard.async_save = leaving_nobody_waiting(standard.async_save)
    return standard


def lazy_part_of(handler: Any) -> LazyCheckpointHandler | None:
    """Returns what saves lazily in a handler; `None` where only the stock way is open.

    Raises:
        OptionError: it is not one of lazy_orbax.
    """
    inside = handler if isinstance(handler, LazyCheckpointHandler) else None
    if handler in _INSIDE:
        inside = _INSIDE[handler]
    if inside is None and not symbols.MISSING:
        raise OptionError(
            f"{handler!r} does not save lazily. Give what lazy_orbax.standard_handler() or "
            "pytree_handler() returned, or a LazyCheckpointHandler."
        )
    return None if isinstance(inside, StockFallback) else inside
