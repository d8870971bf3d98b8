"""A module whose names are imported when somebody asks for them.

Whoever only looks at a checkpoint need not wait for JAX and Orbax, which take a second to import.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def exports(
    module: dict[str, Any], homes: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Returns `__getattr__` and `__dir__` of a module.

    Args:
        module: its `globals()`. What was asked for stays there.
        homes: the module that each name is taken from; one below `module` is what it names.
    """

    def get(name: str) -> Any:
        home = homes.get(name)
        if home is None:
            raise AttributeError(f"module {module['__name__']!r} has no attribute {name!r}")
        found = importlib.import_module(home)
        if home != f"{module['__name__']}.{name}":
            found = getattr(found, name)
        module[name] = found
        return found

    return get, lambda: sorted({*module, *homes})
