"""Orbax's options for directories that the processes of a job do not share."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from lazy_orbax._orbax import multihost
from lazy_orbax._orbax.symbols import ocp
from lazy_orbax.errors import OptionError


@dataclasses.dataclass(frozen=True)
class NodeLocalOptions:
    """Options that belong together, for a disk of each node.

    Attributes:
        manager: for `ocp.CheckpointManager(..., options=...)`.
        handler: keywords for the handler of each item: `lazy_orbax.standard_handler(**handler)`,
            `pytree_handler`, or stock Orbax's `PyTreeCheckpointHandler`.
    """

    manager: ocp.CheckpointManagerOptions
    handler: dict[str, Any]


def node_local_options(
    options: ocp.CheckpointManagerOptions | None = None,
) -> NodeLocalOptions:
    """Returns options for saving to directories that are not shared, such as NVMe of each node.

    Every process is its own primary: it writes all shards that it has, once, with metadata of its
    own, and commits them itself. All processes save the same steps, and a step that fails on one
    is committed on none. A checkpoint is restored on as many processes and devices as it was
    saved on, each process where it was, for no directory holds the whole.

    Give each process a directory of its own: where several run on one node, put
    `jax.process_index()` in its name.

    Args:
        options: other options for the manager. They are not changed; a copy is.

    Raises:
        OptionError: they are no options of a manager.
        ValueError: Orbax refuses the combination of options.
    """
    given = ocp.CheckpointManagerOptions() if options is None else options
    if not isinstance(given, ocp.CheckpointManagerOptions):
        raise OptionError(f"options={options!r} is not an ocp.CheckpointManagerOptions.")
    processes = dataclasses.replace(given.multiprocessing_options, primary_host=None)
    # Made in the background, a directory is announced to all processes by the first that has one.
    asynchronous = dataclasses.replace(
        given.async_options or ocp.AsyncOptions(), create_directories_asynchronously=False
    )
    manager = dataclasses.replace(
        given, multiprocessing_options=processes, async_options=asynchronous
    )
    arrays = ocp.type_handlers.ArrayHandler(
        primary_host=None,
        replica_id=None,
        use_replica_parallel=False,
        array_metadata_store=multihost.array_metadata_store(),
    )
    scalars = ocp.type_handlers.ScalarHandler()
    registry = ocp.type_handlers.create_type_handler_registry(
        (int, scalars),
        (float, scalars),
        (bytes, scalars),
        (np.number, scalars),
        (np.ndarray, ocp.type_handlers.NumpyHandler()),
        (jax.Array, arrays),
        (str, ocp.type_handlers.StringHandler()),
    )
    handler = {"multiprocessing_options": processes, "type_handler_registry": registry}
    return NodeLocalOptions(manager, handler)
