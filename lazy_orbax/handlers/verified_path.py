"""Temporary paths of Orbax for steps that are read back, and compared, before they are listed.

A step carries a mark from its beginning: who promotes knows its own steps, finished or not.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

from etils import epath

from lazy_orbax._orbax.symbols import ocp_path
from lazy_orbax._paths import PROMOTED
from lazy_orbax.errors import CorruptCheckpointError
from lazy_orbax.integrity.verify import problems_before_publication
from lazy_orbax.recovery import leftovers
from lazy_orbax.save.durable_path import DurablePath
from lazy_orbax.storage.places import place_of


class _Verified:
    """What both kinds of paths do more than others. Items in a step are left alone.

    Attributes:
        run: the directory in which steps are verified.
        told: what the mark of a step says.
        last_look: is called before a step is published, and may refuse that.
    """

    run = ""
    told: dict[str, Any]
    last_look: Callable[[], None]

    def _is_of_step(self: Any) -> bool:
        return self.get_final().parent == epath.Path(self.run)

    async def create(self: Any) -> Any:
        made = await super().create()  # type: ignore[misc]
        if self._is_of_step():
            mark, place = json.dumps(self.told).encode(), place_of(str(made))
            try:
                await asyncio.to_thread(place.write, PROMOTED, mark)
            except BaseException:  # Without a mark nobody would know whose it is.
                leftovers.remove([str(made)] if place.needs_sync else [])
                raise
        return made

    async def finalize(self: Any) -> None:
        """Publishes the step, if it is what was saved.

        Raises:
            CorruptCheckpointError: it is not.
        """
        if self._is_of_step():
            await asyncio.to_thread(_refuse_unlike, str(self.get()))
            type(self).last_look()
        await super().finalize()  # type: ignore[misc]


def _refuse_unlike(directory: str) -> None:
    problems = problems_before_publication(directory)
    if problems:
        raise CorruptCheckpointError(directory, problems)


class _Directory(_Verified, DurablePath):
    """In a file system. It is also synced before it is listed."""


class _InBucket(_Verified, ocp_path.atomicity.CommitFileTemporaryPath):
    """In an object store, where a file says that it is committed."""


def verified_in(
    run: str, told: dict[str, Any], last_look: Callable[[], None] = lambda: None
) -> type[Any]:
    """Returns a class of temporary paths for steps that are verified before they are listed.

    Args:
        run: the directory of the steps, or its address.
        told: what the mark of a step says, as JSON values.
        last_look: is called when a step is verified, and may refuse to list it.
    """
    kind = _Directory if place_of(run).needs_sync else _InBucket
    return type(
        kind.__name__, (kind,), {"run": run, "told": told, "last_look": staticmethod(last_look)}
    )
