"""The two stock-shaped faces of the handler: Orbax's own types, which save lazily inside."""

from __future__ import annotations

import copy
import functools
import inspect
import types
import weakref
from collections.abc import Callable
from typing import Any

from lazy_orbax._orbax import symbols
from lazy_orbax._orbax.standard_handler import put_inside_standard_handler
from lazy_orbax._orbax.symbols import ocp
from lazy_orbax._orbax.waiting import leaving_nobody_waiting
from lazy_orbax.errors import LazyOrbaxError, OptionError
from lazy_orbax.handlers.lazy import LazyCheckpointHandler
from lazy_orbax.handlers.stock_fallback import StockFallback
from lazy_orbax.options import LazyOptions
from lazy_orbax.restore.misfits import explained
from lazy_orbax.restore.verified import examined
from lazy_orbax.trust.malformed import checked

# What is inside the handlers that `pytree_handler` and `standard_handler` returned.
_INSIDE: weakref.WeakKeyDictionary[Any, LazyCheckpointHandler] = weakref.WeakKeyDictionary()
# What belongs to one handler, not to its copy.
_PUT_ON = {"async_save", "restore", "metadata", "_validate_save_state", "__deepcopy__"}


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
    dress(handler, lazy, aggregate_filename)
    return handler


def dress(handler: Any, lazy: Any, aggregate_filename: str | None) -> None:
    """Gives a stock handler that saves through a lazy one what it needs beside that.

    Args:
        handler: an `ocp.PyTreeCheckpointHandler`.
        lazy: what it saves and restores through.
        aggregate_filename: what it was made with.
    """
    _examine_before_reading(handler, aggregate_filename, verifies=lazy.options.verify_restore)
    _INSIDE[handler] = lazy
    handler.async_save = leaving_nobody_waiting(handler.async_save)
    handler.__deepcopy__ = lambda memo: _copied(
        handler, memo, lambda copied: dress(copied, copy.deepcopy(lazy, memo), aggregate_filename)
    )


def _copied(handler: Any, memo: dict[int, Any], dress_again: Callable[[Any], None]) -> Any:
    """What `copy.deepcopy` returns: as of a stock handler, without what we put on it, and that."""
    copied = memo[id(handler)] = object.__new__(type(handler))
    own = {name: value for name, value in vars(handler).items() if name not in _PUT_ON}
    copied.__dict__.update(copy.deepcopy(own, memo))
    dress_again(copied)
    return copied


def _examine_before_reading(
    handler: Any, aggregate_filename: str | None, *, verifies: bool
) -> None:
    """Makes a stock handler look at a checkpoint before it reads it by itself."""
    restore, metadata = handler.restore, handler.metadata

    @functools.wraps(restore)
    def checking(*positional: Any, **keywords: Any) -> Any:
        directory, args = _asked(restore, positional, keywords)
        with examined(directory, args, aggregate_filename, verifies=verifies):
            return restore(*positional, **keywords)

    @functools.wraps(metadata)
    def checking_metadata(*positional: Any, **keywords: Any) -> Any:
        with checked(_asked(metadata, positional, keywords)[0], None, aggregate_filename):
            return metadata(*positional, **keywords)

    handler.restore, handler.metadata = checking, checking_metadata


def _asked(
    function: Callable[..., Any], positional: tuple[Any, ...], keywords: dict[str, Any]
) -> tuple[Any, Any]:
    """Returns the directory and Orbax's arguments of a call; older ones as if they were those.

    A subclass may have a signature of its own.
    """
    given = inspect.signature(function).bind(*positional, **keywords).arguments
    directory = positional[0] if positional else next(iter(given.values()))
    found = [one for one in positional if isinstance(one, ocp.args.CheckpointArgs)]
    args = keywords.get("args") or next(iter(found), None)
    return directory, types.SimpleNamespace(**given) if args is None else args


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
    dress_standard(standard, pytree)
    return standard


def dress_standard(standard: Any, pytree: Any) -> None:
    """Lets a stock `ocp.StandardCheckpointHandler` save lazily.

    Args:
        standard: the handler.
        pytree: an `ocp.PyTreeCheckpointHandler` that saves lazily.
    """
    if not put_inside_standard_handler(standard, pytree):
        return
    _INSIDE[standard] = _INSIDE[pytree]
    standard.async_save = leaving_nobody_waiting(standard.async_save)
    standard.restore = _explaining_its_own_errors(standard)
    standard.__deepcopy__ = lambda memo: _copied(
        standard, memo, lambda copied: dress_standard(copied, copy.deepcopy(pytree, memo))
    )


def _explaining_its_own_errors(standard: Any) -> Callable[..., Any]:
    """Returns its `restore`, where what it refuses before it asks the lazy one is explained too."""
    restore = standard.restore

    @functools.wraps(restore)
    def explaining(*positional: Any, **keywords: Any) -> Any:
        try:
            return restore(*positional, **keywords)
        except LazyOrbaxError:
            raise
        except ValueError:
            with explained(standard.metadata, *_asked(restore, positional, keywords)):
                raise

    return explaining


def saves_lazily(handler: Any) -> bool:
    """Whether a stock handler saves through a lazy one."""
    return handler in _INSIDE


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
