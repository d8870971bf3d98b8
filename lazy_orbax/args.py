"""Arguments for `LazyCheckpointHandler` used directly. Stock-shaped handlers take stock args."""

from __future__ import annotations

import dataclasses
from typing import Any

from lazy_orbax._orbax.symbols import ocp
from lazy_orbax.handlers.lazy import LazyCheckpointHandler
from lazy_orbax.transforms import TransformMap


@ocp.args.register_with_handler(LazyCheckpointHandler, for_save=True)
@dataclasses.dataclass
class LazySave(ocp.args.CheckpointArgs):
    """What to save. The fields are those of `ocp.args.PyTreeSave`.

    Attributes:
        item: the tree to save.
        save_args: a tree of `ocp.SaveArgs` with the structure of `item`, or `None`.
        ocdbt_target_data_file_size: size in bytes at which OCDBT starts another data file; 0 is
            no limit, `None` is Orbax's default.
        custom_metadata: JSON-serializable, stored beside the tree.
    """

    item: Any
    save_args: Any | None = None
    ocdbt_target_data_file_size: int | None = None
    custom_metadata: Any | None = None


@ocp.args.register_with_handler(LazyCheckpointHandler, for_restore=True)
@dataclasses.dataclass
class LazyRestore(ocp.args.CheckpointArgs):
    """What to restore. Most fields are those of `ocp.args.PyTreeRestore`.

    Attributes:
        item: a tree that gives the structure; `None` restores nested dictionaries and lists.
        restore_args: a tree of `ocp.RestoreArgs` with the structure of `item`, or `None`.
        partial_restore: restore only the leaves that `item` names.
        transforms: rules by which the leaves of `item` are made of what is stored; see `load`,
            whose `like` the item is then. `restore_args` and `partial_restore` do not count.
    """

    item: Any | None = None
    restore_args: Any | None = None
    partial_restore: bool = False
    transforms: TransformMap | None = None
