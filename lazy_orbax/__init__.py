"""Lazy asynchronous checkpoints for JAX, in Orbax and in Orbax's own format."""

from lazy_orbax import args, errors
from lazy_orbax.durable import DurablePath
from lazy_orbax.events import SaveTimeline
from lazy_orbax.faces import pytree_handler, standard_handler
from lazy_orbax.failures import FailedSaves, log_failed_saves
from lazy_orbax.handler import LazyCheckpointHandler
from lazy_orbax.in_flight import wait_until_staged
from lazy_orbax.in_step import SnapshotStep
from lazy_orbax.node_local import NodeLocalOptions, node_local_options
from lazy_orbax.options import LazyOptions
from lazy_orbax.preemption import LastSave, Preemption
from lazy_orbax.prewarm import prewarm
from lazy_orbax.split import split_step

__all__ = [
    "DurablePath",
    "FailedSaves",
    "LastSave",
    "LazyCheckpointHandler",
    "LazyOptions",
    "NodeLocalOptions",
    "Preemption",
    "SaveTimeline",
    "SnapshotStep",
    "args",
    "errors",
    "log_failed_saves",
    "node_local_options",
    "prewarm",
    "pytree_handler",
    "split_step",
    "standard_handler",
    "wait_until_staged",
]
__version__ = "0.1.0"
