"""What Orbax says about a tree that is to be saved."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple


class Destination(NamedTuple):
    """What a plan has to know of where a tree is written.

    Attributes:
        directory: what stands for the item's directory; every directory of a kind has the same.
        target_file_bytes: Orbax's `ocdbt_target_data_file_size`.
    """

    directory: str
    target_file_bytes: int | None


@dataclasses.dataclass(frozen=True)
class LeafInfo:
    """What Orbax says about one leaf.

    Attributes:
        name: the parameter name.
        route: `array`, `host`, or `other` for a leaf that its own type handler must write.
        type_handler: Orbax's type handler for it.
        info: Orbax's `ParamInfo`, for `TreeInfo.directory`.
        save_args: its `SaveArgs`.
    """

    name: str
    route: str
    type_handler: Any
    info: Any
    save_args: Any


@dataclasses.dataclass(frozen=True)
class TreeInfo:
    """Orbax's view of a tree: its leaves, and the trees its metadata is built from.

    Attributes:
        leaves: one for each leaf, in the order of `jax.tree.leaves`.
        infos: the tree of their `ParamInfo`.
        save_args: the tree of their `SaveArgs`.
        directory: what stands for the item's directory in all of it.
    """

    leaves: tuple[LeafInfo, ...]
    infos: Any
    save_args: Any
    directory: str
