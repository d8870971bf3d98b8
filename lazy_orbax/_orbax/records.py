"""What Orbax says about a tree that is to be saved."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a handler was told to save, in Orbax's terms. Made once; equal settings save alike.

    Attributes:
        keywords: what the handler was made with, by which settings are compared.
        use_ocdbt: whether arrays are stored in OCDBT.
        use_zarr3: whether they are stored in Zarr v3.
        use_compression: whether they are compressed.
        primary_host: the process that writes what is written once; `None`: each does.
        type_handlers: Orbax's registry of type handlers.
        param_infos: Orbax's function that describes the leaves of a tree.
        tree_options: Orbax's options for `_METADATA`.
        array_metadata_store: Orbax's store for what is kept beside arrays, or `None`.
        array_metadata_validator: Orbax's check of that.
        validates_merge: whether Orbax checks a merged database.
    """

    keywords: tuple[tuple[str, str], ...]
    use_ocdbt: bool = dataclasses.field(compare=False)
    use_zarr3: bool = dataclasses.field(compare=False)
    use_compression: bool = dataclasses.field(compare=False)
    primary_host: int | None = dataclasses.field(compare=False)
    type_handlers: Any = dataclasses.field(compare=False, repr=False)
    param_infos: Callable[..., Any] = dataclasses.field(compare=False, repr=False)
    tree_options: Any = dataclasses.field(compare=False, repr=False)
    array_metadata_store: Any = dataclasses.field(compare=False, repr=False)
    array_metadata_validator: Any = dataclasses.field(compare=False, repr=False)
    validates_merge: bool = dataclasses.field(compare=False)

    def type_handler_for(self, type_: type) -> Any | None:
        """Returns Orbax's type handler for values of `type_`, or `None`."""
        return self.type_handlers.get(type_) if self.type_handlers.has(type_) else None

    def for_leaves(self, type_handlers: Any, keywords: Mapping[str, Any]) -> Settings:
        """Returns settings with other type handlers.

        Args:
            type_handlers: the registry. That its handlers are the same ones is seen at the leaves.
            keywords: what else tells whether settings save alike.
        """
        told = tuple(sorted((name, repr(value)) for name, value in keywords.items()))
        return dataclasses.replace(self, keywords=told, type_handlers=type_handlers)


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
