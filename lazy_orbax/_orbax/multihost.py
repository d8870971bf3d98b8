"""Who this process is, and the small store that the processes of a job share."""

from __future__ import annotations

import importlib
import logging
from typing import Any

import jax

from lazy_orbax._orbax.symbols import SRC

_LOG = logging.getLogger("lazy_orbax")
key_value_store = SRC.get("key_value_store", lambda: None)
"""Returns the store."""


def is_primary_host(primary_host: int | None) -> bool:
    """Whether this process, given the primary one, writes what is written once."""
    known = SRC.get("is_primary_host")
    return primary_host in (None, 0) if known is None else known(primary_host)


def process_index() -> int:
    """Returns this process's index, as Orbax counts."""
    return SRC["process_index"]()


def array_metadata_store() -> Any:
    """Returns a store for what is kept beside arrays."""
    return SRC.get("array_metadata_store", lambda: None)()


def coordinator_address() -> str | None:
    """Returns where JAX's coordinator is, as `host:port`; `None` where that is not known."""
    try:
        state = importlib.import_module("jax._src.distributed").global_state
        return state.coordinator_address
    except (ImportError, AttributeError) as error:
        _LOG.warning("JAX %s does not tell where its coordinator is: %s.", jax.__version__, error)
        return None
