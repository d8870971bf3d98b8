"""Orbax's own handlers: how they are made lazy from now on, and who saves the stock way."""

from __future__ import annotations

import functools
import inspect
import types
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax

from lazy_orbax._orbax.symbols import MISSING, SRC, ocp, warn_if_stock

Undo = Callable[[], None]


def when_made(
    inside: Callable[[dict[str, Any]], Any],
    pytree: Callable[[Any, Any, str | None], None],
    standard: Callable[[Any], None],
) -> Undo:
    """Lets Orbax's handlers of trees that are made from now on save through another handler.

    The seam is the public keyword `handler_impl` of `ocp.PyTreeCheckpointHandler`. Who gives it is
    left alone. Where this Orbax has none, this warns and changes nothing.

    Args:
        inside: returns what is to save, given the keywords that the handler is made with; `None`
            leaves the handler alone.
        pytree: called with each new `ocp.PyTreeCheckpointHandler`, what `inside` returned, and the
            name of its aggregate file.
        standard: called with each new `ocp.StandardCheckpointHandler`.

    Returns:
        What undoes it. Handlers that were made meanwhile stay as they are.
    """
    kind, standard_kind = ocp.PyTreeCheckpointHandler, ocp.StandardCheckpointHandler
    signature = inspect.signature(kind.__init__)
    missing = [] if "handler_impl" in signature.parameters else ["handler_impl="]
    if warn_if_stock(MISSING or missing):
        return lambda: None
    init, init_standard = kind.__init__, standard_kind.__init__

    @functools.wraps(init)
    def lazy_init(self: Any, *positional: Any, **keywords: Any) -> None:
        try:
            given = signature.bind(self, *positional, **keywords).arguments
        except TypeError:  # Orbax says whose keyword it is not.
            return init(self, *positional, **keywords)
        del given[next(iter(signature.parameters))]
        file = given.pop("aggregate_filename", None)
        if given.pop("handler_impl", None) is not None:
            return init(self, *positional, **keywords)
        lazy = inside(given)
        if lazy is None:
            return init(self, *positional, **keywords)
        init(self, *positional, **keywords, handler_impl=lazy)
        return pytree(self, lazy, file)

    @functools.wraps(init_standard)
    def lazy_init_standard(self: Any, *positional: Any, **keywords: Any) -> None:
        init_standard(self, *positional, **keywords)
        standard(self)

    kind.__init__, standard_kind.__init__ = lazy_init, lazy_init_standard

    def undo() -> None:
        kind.__init__, standard_kind.__init__ = init, init_standard

    return undo


def when_managers_are_made(within: Callable[[], Callable[[], AbstractContextManager[Any]]]) -> Undo:
    """Lets managers that are made from now on make their handlers in a context of somebody.

    A manager has an `ocp.CompositeCheckpointHandler`, which makes the handlers that nobody gave it
    at its first save or restore.

    Args:
        within: called when a manager is made; returns what makes that context, for each call.

    Returns:
        What undoes it. Managers that were made meanwhile stay as they are.
    """
    kind = ocp.CompositeCheckpointHandler
    init = kind.__init__

    @functools.wraps(init)
    def noted_init(self: Any, *positional: Any, **keywords: Any) -> None:
        init(self, *positional, **keywords)
        _call_within(self, within())

    kind.__init__ = noted_init

    def undo() -> None:
        kind.__init__ = init

    return undo


def _call_within(composite: Any, context: Callable[[], AbstractContextManager[Any]]) -> None:
    kind = type(composite)

    @functools.wraps(kind.async_save)
    async def async_save(self: Any, *positional: Any, **keywords: Any) -> Any:
        with context():
            return await kind.async_save(self, *positional, **keywords)

    @functools.wraps(kind.restore)
    def restore(self: Any, *positional: Any, **keywords: Any) -> Any:
        with context():
            return kind.restore(self, *positional, **keywords)

    # As methods, they go with a copy.
    composite.async_save = types.MethodType(async_save, composite)
    composite.restore = types.MethodType(restore, composite)


def note_stock_saves(note: Callable[[Any, bool], None]) -> None:
    """Calls `note` before each save of a tree that goes the stock way, from now on.

    Args:
        note: takes the directory of the item, as Orbax hands it in, and whether its handler was
            made by Orbax itself, because nobody gave one.
    """
    if MISSING:
        return
    kind, made_by_orbax = SRC["base"], weakref.WeakSet[Any]()
    init, save = kind.__init__, kind.async_save

    @functools.wraps(init)
    def noted_init(self: Any, *positional: Any, **keywords: Any) -> None:
        init(self, *positional, **keywords)
        if type(self) is kind and _is_made_by_orbax():
            made_by_orbax.add(self)

    @functools.wraps(save)
    async def noted(self: Any, directory: Any, *positional: Any, **keywords: Any) -> Any:
        if type(self) is kind:  # Not a lazy handler, which derives from it.
            note(directory, self in made_by_orbax)
        return await save(self, directory, *positional, **keywords)

    kind.__init__, kind.async_save = noted_init, noted


def _is_made_by_orbax() -> bool:
    """Whether Orbax makes the handler that is being made, and not somebody who calls Orbax."""
    frame = inspect.currentframe()
    while frame is not None:
        module, name = str(frame.f_globals.get("__name__")), frame.f_code.co_name
        if name != "__init__" and not module.startswith("lazy_orbax."):
            return module.startswith("orbax.")
        frame = frame.f_back
    return False


def array_handler_of_others() -> str:
    """Returns the name of the type handler for `jax.Array` that somebody put in Orbax's place."""
    handler = ocp.type_handlers.get_type_handler(jax.Array)
    return "" if type(handler) is ocp.type_handlers.ArrayHandler else type(handler).__qualname__
