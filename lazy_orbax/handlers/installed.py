"""Orbax's own entry points made lazy, for as long as one likes; and what is lazy now."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import threading
import types
from collections.abc import Iterator
from typing import Any

from lazy_orbax._orbax import entry_points, v1
from lazy_orbax._orbax.standard_handler import inside_standard_handler
from lazy_orbax._orbax.symbols import MISSING
from lazy_orbax.handlers.lazy import LazyCheckpointHandler
from lazy_orbax.handlers.stock_fallback import checked_options
from lazy_orbax.handlers.stock_saves import STOCK_SAVES
from lazy_orbax.handlers.stock_shaped import dress, dress_standard, saves_lazily
from lazy_orbax.handlers.v1 import lazy_v1
from lazy_orbax.options import LazyOptions
from lazy_orbax.view.text import counted


@dataclasses.dataclass(frozen=True)
class Status:
    """What saves lazily in this process. `print` it.

    Attributes:
        is_installed: whether `install()` holds.
        not_lazy: why not all saves of trees are lazy; one sentence for each reason.
        n_stock_saves: how many saves of trees went the stock way since `install()`, or since the
            first lazy handler was made.
        options: how handlers that are made now take snapshots; `None` where nothing is installed.
    """

    is_installed: bool
    not_lazy: tuple[str, ...]
    n_stock_saves: int
    options: LazyOptions | None

    def __str__(self) -> str:
        whose = "Orbax's own entry points save" if self.is_installed else "Handlers you give save"
        lines = [f"{whose} lazily.", *(f"Not lazy: {reason}" for reason in self.not_lazy)]
        if self.n_stock_saves:
            lines.append(f"{counted(self.n_stock_saves, 'save')} went the stock way.")
        return "\n".join(lines)


class Installation:
    """What `install()` returned: a `with` block ends it.

    Attributes:
        options: how handlers take snapshots that are made while it holds.
        use_compression: whether each handler decides if it compresses; else none does.
        undo_v1: makes Orbax v1 save as before it.
    """

    def __init__(self, options: LazyOptions, *, use_compression: bool):
        """Makes Orbax v1 save lazily; v0 follows the last installation."""
        self.options, self.use_compression = options, use_compression
        self.undo_v1 = lazy_v1(options, use_compression=use_compression)

    def __enter__(self) -> Installation:
        """Returns itself: it holds already."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        """Ends it. What was installed before holds again."""
        with _LOCK:
            _set([other for other in _INSTALLED if other is not self])


_LOCK = threading.RLock()
# Under the lock: the last one holds. Orbax is changed while there is one, or a manager is at work
# that was made while there was, and what undoes that.
_INSTALLED: list[Installation] = []
_AT_WORK: list[Installation] = []
_UNDO: list[entry_points.Undo] = []
# Whose handlers a manager makes.
_OF_MANAGER: contextvars.ContextVar[Installation | None] = contextvars.ContextVar(
    "lazy_orbax_installation", default=None
)


def install(options: LazyOptions | None = None, *, use_compression: bool = False) -> Installation:
    """Makes Orbax's own entry points save lazily from now on, in this process.

    These are `ocp.CheckpointManager` without handlers of one's own, `ocp.StandardCheckpointer`,
    `ocp.PyTreeCheckpointer`, and every `ocp.StandardCheckpointHandler` and
    `ocp.PyTreeCheckpointHandler` that is made afterwards, by whomever: Flax, say. A save by a
    handler that was made before goes the stock way; the first such save warns.

    In Orbax v1 these are `ocp.v1.save`, its relatives, and `training.Checkpointer`.

    Where this Orbax is not one that lazy_orbax knows, it warns, and saves stay stock saves.

    Args:
        options: how to take snapshots; `None` is `LazyOptions()`.
        use_compression: leave it to each handler whether it compresses; stock handlers do unless
            told otherwise. By default none does: `examples/guides/differences.md` says why.

    Returns:
        A context manager: what it installed ends with the `with` block, and what was installed
        before holds again. Without `with`, call `uninstall()`.

    Raises:
        OptionError: `options` is something else.
    """
    options = checked_options(options)
    STOCK_SAVES.watch()
    with _LOCK:  # Of several threads the last one holds, in v0 and in v1.
        installation = Installation(options, use_compression=use_compression)
        _set([*_INSTALLED, installation])
    return installation


def uninstall() -> None:
    """Undoes every `install()`. What was made meanwhile goes on saving lazily."""
    _set([])


def status() -> Status:
    """Returns what saves lazily in this process, and why not what does not."""
    with _LOCK:
        options = _INSTALLED[-1].options if _INSTALLED else None
    reasons = [f"this Orbax has no {name}, so every save is a stock save." for name in MISSING]
    reasons += [f"Orbax v1 has no {name}, so its saves are stock saves." for name in v1.MISSING]
    if other := entry_points.array_handler_of_others():
        reasons.append(
            f"{other} is the type handler for jax.Array. Where it serializes in its own way it "
            "saves those leaves, and Orbax restores them in any case."
        )
    if options is None:
        reasons.append("Orbax's own entry points, until you call lazy_orbax.install().")
    return Status(options is not None, tuple(reasons), STOCK_SAVES.n_saves, options)


def _set(installed: list[Installation]) -> None:
    with _LOCK:
        for ended in (one for one in _INSTALLED if one not in installed):
            ended.undo_v1()
        _INSTALLED[:] = installed
        _change_orbax()
        STOCK_SAVES.set_installed(is_installed=bool(installed))


def _change_orbax() -> None:
    """Changes Orbax where that is wanted, and else undoes it. The caller has the lock."""
    wanted = bool(_INSTALLED or _AT_WORK)
    if wanted and not _UNDO:
        _UNDO.append(entry_points.when_made(_inside, dress, _dress_standard))
        _UNDO.append(entry_points.when_managers_are_made(_for_its_manager))
    while _UNDO and not wanted:
        _UNDO.pop()()


def _holds() -> Installation | None:
    """Returns what holds for what is made now in this context."""
    with _LOCK:
        return _OF_MANAGER.get() or next(reversed(_INSTALLED), None)


def _for_its_manager() -> Any:
    """Returns the context of a manager that is made now: what holds now holds in it later."""
    installation = _holds()
    return functools.partial(_holding, installation) if installation else contextlib.nullcontext


@contextlib.contextmanager
def _holding(installation: Installation) -> Iterator[None]:
    """Lets an installation hold here, in this context alone, though it has ended."""
    with _LOCK:
        _AT_WORK.append(installation)
        _change_orbax()
    token = _OF_MANAGER.set(installation)
    try:
        yield
    finally:
        _OF_MANAGER.reset(token)
        with _LOCK:
            _AT_WORK.remove(installation)
            _change_orbax()


def _inside(keywords: dict[str, Any]) -> LazyCheckpointHandler | None:
    """Returns what a stock handler saves through that is made with these keywords."""
    installation = _holds()
    if installation is None:  # Uninstalled just now, or a manager of somebody else is at work.
        return None
    compresses = installation.use_compression and keywords.pop("use_compression", True)
    return LazyCheckpointHandler(
        options=installation.options, **{**keywords, "use_compression": compresses}
    )


def _dress_standard(standard: Any) -> None:
    inside = inside_standard_handler(standard)
    if saves_lazily(inside):
        dress_standard(standard, inside)
