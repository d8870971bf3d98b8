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

    Each process is its own primary. It writes every shard that it has once, and its own metadata,
    and commits them itself. All processes save the same steps. If a step fails on one process, no
    process commits it.

    No directory holds the whole state. Restore with as many processes and devices as saved, and
    each process from the directory that it wrote.

    Give each process a directory of its own. If several processes run on one node, put
    `jax.process_index()` in the name.

    Args:
        options: what else the manager should do; `None` is `ocp.CheckpointManagerOptions()`. This
            function changes a copy.

    Returns:
        The options of the manager, and the keywords of the handler that go with them.

    Raises:
        OptionError: `options` is not an `ocp.CheckpointManagerOptions`.
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
