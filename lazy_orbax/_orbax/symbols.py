"""Orbax, and every non-public symbol of it that lazy_orbax needs, probed when this is imported.

Where one is missing, `MISSING` says which, `HANDLER_BASE` is stock Orbax's public handler and the
handlers of lazy_orbax save the stock way, with a warning. Orbax 0.12 is what this was read from.
Orbax 1.0 moves that API from `orbax.checkpoint` to `orbax.checkpoint.v0`: it is taken from there
where it is there.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lazy_orbax.errors import StockFallbackWarning

if TYPE_CHECKING:
    import orbax.checkpoint as ocp
    from orbax.checkpoint import future
    from orbax.checkpoint import path as ocp_path
else:
    _IS_MOVED = importlib.util.find_spec("orbax.checkpoint.v0") is not None
    ocp = importlib.import_module("orbax.checkpoint.v0" if _IS_MOVED else "orbax.checkpoint")
    future = importlib.import_module(f"{ocp.__name__}.future")
    ocp_path = importlib.import_module(f"{ocp.__name__}.path")

_NEEDED = {
    "base": ("handlers.base_pytree_checkpoint_handler", "BasePyTreeCheckpointHandler"),
    "fill_args": (
        "handlers.base_pytree_checkpoint_handler",
        "_fill_missing_save_or_restore_args",
    ),
    "array_metadata_serializer": ("metadata.array_metadata_store", "Serializer"),
    "tree_metadata": ("metadata.tree", "InternalTreeMetadata"),
    "array_metadata_store": ("metadata.array_metadata_store", "Store"),
    "key_value_store": ("futures.signaling_client", "get_signaling_client"),
    "random_key_impl": ("metadata.array_metadata", "RANDOM_KEY_IMPL"),
    "sharding_metadata": ("metadata.sharding", "from_jax_sharding"),
    "process_index": ("multihost.multihost", "process_index"),
    "is_primary_host": ("multihost.multihost", "is_primary_host"),
    "operation_ids": ("futures.synchronization", "OperationIdGenerator"),
    "merge": ("serialization.ocdbt_utils", "merge_ocdbt_per_process_files"),
    "validate_array_metadatas": ("metadata.array_metadata_store", "validate_all_array_metadatas"),
    "process_subdir": ("serialization.ocdbt_utils", "get_process_index_for_subdir"),
    "is_replicated_sharding": ("serialization.jax_array_handlers", "_is_replicated_sharding"),
    "build_array_write_spec": ("serialization.tensorstore_utils", "build_array_write_spec"),
    "build_kvstore_tspec": ("serialization.tensorstore_utils", "build_kvstore_tspec"),
    "is_empty_node": ("tree.utils", "is_empty_node"),
    "is_empty_or_leaf": ("tree.utils", "is_empty_or_leaf"),
}


def probe(root: str, needed: Mapping[str, tuple[str, str]]) -> tuple[dict[str, Any], list[str]]:
    """Returns symbols of Orbax by the keys of `needed`, and the names of those that are missing.

    Args:
        root: the package whose `_src` has them.
        needed: the module below that, and the symbol in it.
    """
    found, missing = {}, []
    for key, (module, symbol) in needed.items():
        name = f"{root}._src.{module}"
        try:
            found[key] = getattr(importlib.import_module(name), symbol)
        except (ImportError, AttributeError):
            missing.append(f"{name}.{symbol}")
    return found, missing


SRC, MISSING = probe(ocp.__name__, _NEEDED)
MISFITS = ("structures do not match", "Structure mismatch")
"""What Orbax says where a target has another structure than the checkpoint."""
HANDLER_BASE: type = ocp.PyTreeCheckpointHandler if MISSING else SRC["base"]


def warn_if_stock(missing: Sequence[str] = MISSING) -> bool:
    """Returns whether only the stock way is open, after warning about it."""
    if missing:
        warnings.warn(
            f"lazy_orbax does not know this orbax-checkpoint ({_version()}): "
            f"{', '.join(missing)} is missing. Saves are stock saves: correct, but blocking. "
            "Install a lazy_orbax made for this release, or an older orbax-checkpoint.",
            StockFallbackWarning,
            stacklevel=3,
        )
    return bool(missing)


def _version() -> str:
    """Returns Orbax's version, which it has at its top wherever the API is."""
    return getattr(importlib.import_module("orbax.checkpoint"), "__version__", "unknown")
