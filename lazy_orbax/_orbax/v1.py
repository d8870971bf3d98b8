"""Orbax v1: where its handler of PyTrees holds one of v0, in whose place ours goes.

`MISSING` says what of that is not there; v1 saves the stock way then. v1 makes a new handler for
each item of each save, and even one for each that it might need.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import importlib.util
import inspect
import threading
import types
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

from lazy_orbax._orbax import functions
from lazy_orbax._orbax.lifecycle import operation_id
from lazy_orbax._orbax.symbols import ocp, probe

if TYPE_CHECKING:
    import orbax.checkpoint.experimental.v1 as ocp1

# v1 may become the top of Orbax, beside or below which v0 stays.
_ROOTS = ("orbax.checkpoint.v1", "orbax.checkpoint", f"{ocp.__name__}.experimental.v1")
_NEEDED = {
    "pytree": ("handlers.pytree_handler", "PyTreeHandler"),
    "create_v0_handler": ("handlers.pytree_handler", "_create_v0_handler"),
    "for_manager": ("handlers.compatibility", "get_compatibility_handler"),
    "response": ("saving.execution", "_SaveResponse"),
    "atomicity": ("saving.execution", "atomicity"),
    "compatible": ("serialization.compatibility", "CompatibleTypeHandler"),
    "arrays": ("serialization.array_leaf_handler", "ArrayLeafHandler"),
    "numpy": ("serialization.numpy_leaf_handler", "NumpyLeafHandler"),
    "scalars": ("serialization.scalar_leaf_handler", "ScalarLeafHandler"),
    "strings": ("serialization.string_leaf_handler", "StringLeafHandler"),
}
# The methods of a `Checkpointer` in which handlers are made; its others call these.
_OF_CHECKPOINTER = (
    "save_checkpointables_async",
    "load_checkpointables",
    "checkpointables_metadata",
)
# The function of `atomicity` that publishes a step.
PUBLISH = "on_commit_callback"
# What methods of those use, by which ours is found and told: a handler that no longer asks would
# save the stock way, and not say so.
_USED = {
    ("pytree", "__init__"): {"_create_v0_handler", "_handler_impl"},
    ("pytree", "save"): {"_handler_impl", "async_save", "path"},
    ("pytree", "_finalize"): {"_handler_impl", "_finalize_async"},
    ("response", "__init__"): {"_operation_id", "_finalize_save"},
    ("response", "_finalize_save"): {"atomicity", PUBLISH},
}

Make: TypeAlias = "Callable[[Any, Any, Any], Inside]"
"""Makes what goes inside, of a `Context`, a registry of type handlers, and a validator."""


def _probe() -> tuple[str, dict[str, Any], list[str]]:
    for root in _ROOTS:
        with contextlib.suppress(ModuleNotFoundError):
            if importlib.util.find_spec(f"{root}._src.handlers.pytree_handler") is not None:
                return root, *_found_in(root)
    return "", {}, ["orbax.checkpoint.experimental.v1"]


def _found_in(root: str) -> tuple[dict[str, Any], list[str]]:
    found, missing = probe(root, _NEEDED)
    for (key, method), names in _USED.items():
        asked: Any = getattr(found.get(key), method, None)
        code = getattr(inspect.unwrap(asked), "__code__", None)
        if key in found and not names <= set(getattr(code, "co_names", ())):
            missing.append(f"{root}._src.{_NEEDED[key][0]}.{_NEEDED[key][1]}.{method}")
    return found, missing


_ROOT, V1, MISSING = _probe()
if not TYPE_CHECKING:
    ocp1 = importlib.import_module(_ROOT) if _ROOT else None

_of_process: list[Make] = []
# Whether this thread publishes a step of ours next, which v1 saves.
_publishes = threading.local()
# Where it is set, one handler is made with it, whatever the process does.
_of_handler: contextvars.ContextVar[Make | None] = contextvars.ContextVar(
    "lazy_orbax_v1", default=None
)


class Inside:
    """What v1's handler of PyTrees asks where it would ask one of v0.

    Attributes:
        is_managed: whether a checkpoint manager of v0 publishes the step, as it does for
            `training.Checkpointer`. Else a function of v1 does, such as `save`.
    """

    def __init__(
        self,
        make: Callable[[int | None], Any],
        end: Callable[..., None],
        in_v0: Callable[[Any], Any],
    ):
        """Makes no handler yet, for most are never asked.

        Args:
            make: makes the handler, given the most bytes that Orbax wants in host memory.
            end: is told the operation, and its error if it failed, when a function has ended.
            in_v0: returns the arguments of a restore in the form of v0.
        """
        self._make, self._end, self._in_v0 = make, end, in_v0
        self.is_managed = False
        # Orbax sets it before it saves.
        self._save_device_host_concurrent_bytes: int | None = None

    @functools.cached_property
    def handler(self) -> Any:
        """The handler."""
        return self._make(self._save_device_host_concurrent_bytes)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # Python looks for these where it copies.
            raise AttributeError(name)
        return getattr(self.handler, name)

    async def async_save(self, directory: Any, args: Any) -> Any:
        """Saves lazily."""
        if not self.is_managed:
            operation = operation_id()
            functions.begin(operation, functools.partial(self._end, operation))
        return await self.handler.async_save(directory, args=args)

    def restore(self, directory: Any, args: Any) -> Any:
        """Restores, and verifies."""
        return self.handler.restore(directory, self._in_v0(args), of_orbax=args)

    async def _finalize_async(self, directory: Any) -> None:
        """A function of v1 publishes the step next, in this thread."""
        if not self.is_managed:
            self.finalize(directory)

    def finalize(self, directory: Any) -> None:
        """The manager publishes the step next, in this thread."""
        self.handler.finalize(directory)
        _publishes.ours = True


def publishes_ours() -> bool:
    """Whether this thread publishes a step of ours now, which v1 saves. It does so once."""
    ours, _publishes.ours = getattr(_publishes, "ours", False), False
    return ours


def hook() -> None:
    """Lets v1's handlers be made with something of ours inside. A second call does nothing.

    This changes four functions of Orbax, which go on as before for all other handlers.
    """
    handlers: Any = importlib.import_module(V1["pytree"].__module__)
    compatibility: Any = importlib.import_module(V1["for_manager"].__module__)
    if handlers._create_v0_handler is not V1["create_v0_handler"]:
        return

    @functools.wraps(V1["create_v0_handler"])
    def create(context: Any, *, type_handler_registry: Any, **keywords: Any) -> Any:
        make = _of_handler.get() or next(reversed(_of_process), None)
        if make is None:
            stock = V1["create_v0_handler"]
            return stock(context, type_handler_registry=type_handler_registry, **keywords)
        return make(context, type_handler_registry, keywords.get("array_metadata_validator"))

    @functools.wraps(V1["for_manager"])
    def for_manager(handler: Any) -> Any:
        found = V1["for_manager"](handler)
        inside = getattr(handler, "_handler_impl", None)
        if isinstance(inside, Inside):
            inside.is_managed = True
            found.finalize = inside.finalize
        return found

    stock_end = V1["response"]._finalize_save

    @functools.wraps(stock_end)
    def finalize_save(response: Any) -> Any:
        return functions.watched(response._operation_id, stock_end(response))

    _hook_checkpointers()
    compatibility.get_compatibility_handler = for_manager
    V1["response"]._finalize_save = finalize_save
    handlers._create_v0_handler = create


def _hook_checkpointers() -> None:
    """Lets a `Checkpointer` go on with what the process made handlers with when it was made."""
    kind = ocp1.training.Checkpointer
    init = kind.__init__

    @functools.wraps(init)
    def noted_init(self: Any, *positional: Any, **keywords: Any) -> None:
        init(self, *positional, **keywords)
        if make := next(reversed(_of_process), None):
            for name in _OF_CHECKPOINTER:
                if method := getattr(type(self), name, None):
                    setattr(self, name, types.MethodType(_with(make, method), self))

    kind.__init__ = noted_init


def _with(make: Make, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def made_with(*positional: Any, **keywords: Any) -> Any:
        with _making_with(make):
            return method(*positional, **keywords)

    return made_with


def make_all_with(make: Make) -> Callable[[], None]:
    """Makes v1's handlers with something of ours inside, in the whole process.

    Returns:
        What undoes it. The second call does nothing.
    """
    hook()
    _of_process.append(make)

    def undo() -> None:
        with contextlib.suppress(ValueError):
            _of_process.remove(make)

    return undo


@contextlib.contextmanager
def _making_with(make: Make) -> Iterator[None]:
    token = _of_handler.set(make)
    try:
        yield
    finally:
        _of_handler.reset(token)


def pytree_handler_with(make: Make) -> type:
    """Returns a class that is v1's `PyTreeHandler` to everybody, with something of ours inside."""
    hook()
    stock = V1["pytree"]

    def init(self: Any, **keywords: Any) -> None:
        with _making_with(make):
            stock.__init__(self, **keywords)

    # The checkpoint holds its name, by which stock Orbax finds the handler again.
    names = {"__module__": stock.__module__, "__qualname__": stock.__qualname__}
    return type(stock.__name__, (stock,), {**names, "__doc__": stock.__doc__, "__init__": init})
