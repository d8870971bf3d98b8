"""The moment before Orbax renames a step: v1 has no place for it, as it takes no class of paths."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from lazy_orbax._orbax.symbols import ocp_path
from lazy_orbax._orbax.v1 import PUBLISH, V1, publishes_ours

_DONE = "lazy_orbax_publishes"


def publish_with(durable: Callable[[Any], Any]) -> None:
    """Lets v1 publish `durable(path)` where it would publish `path`. A second call does nothing.

    This changes one function of Orbax, which goes on as before with steps that are not ours.

    Args:
        durable: takes the temporary path of a step. It is called in the thread that publishes it.
    """
    # v1's functions and v0's managers look in the same module, unless Orbax has moved one of them.
    for module in (V1["atomicity"], ocp_path.atomicity):
        stock = getattr(module, PUBLISH)
        if not hasattr(stock, _DONE):
            setattr(module, PUBLISH, _publishing(stock, durable))


def _publishing(stock: Any, durable: Callable[[Any], Any]) -> Any:
    @functools.wraps(stock)
    async def publish(path: Any, *positional: Any, **keywords: Any) -> Any:
        return await stock(durable(path) if publishes_ours() else path, *positional, **keywords)

    setattr(publish, _DONE, True)
    return publish


def is_only_renamed(path: Any) -> bool:
    """Whether a temporary path is one that Orbax chose, and publishes by one rename."""
    stock = ocp_path.atomicity.AtomicRenameTemporaryPath
    return type(path) is stock and getattr(path, "_snapshot", None) is None


def metadata_store_of(path: Any) -> Any:
    """Returns what writes the metadata of a step as its temporary path is published, or `None`."""
    return getattr(path, "_checkpoint_metadata_store", None)
