"""What Orbax says about a tree that is to be saved."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class LeafInfo:
    """What Orbax says about one leaf.

    Attributes:
        name: the parameter name.
        route: `array`, `host`, or `other` for a leaf that its own type handler must write.
        type_handler: Orbax's type handler for it.
        info: Orbax's `ParamInfo`, for `PLACEHOLDER_DIRECTORY`.
        save_args: its `SaveArgs`.
    """

    name: str
    route: str
    type_handler: Any
    info: Any
    save_args: Any


@dataclasses.dataclass(frozen=True)
class TreeInfo:
    """Orbax's view of a tree: its leaves, and the trees its metadata is built from."""

    leaves: tuple[LeafInfo, ...]
    infos: Any
    save_args: Any
