"""Lazy asynchronous checkpoints for JAX, in Orbax and in Orbax's own format.

What this package exports is public, and what its modules `args`, `errors`, `reports` and
`transforms` do.
Everything else is private, whatever its name.
"""

from lazy_orbax import args, errors, reports, transforms
from lazy_orbax.handlers.lazy import LazyCheckpointHandler
from lazy_orbax.handlers.prewarm import prewarm
from lazy_orbax.handlers.stock_shaped import pytree_handler, standard_handler
from lazy_orbax.handlers.v1 import v1_registry
from lazy_orbax.integrity.verify import verify
from lazy_orbax.options import LazyOptions
from lazy_orbax.pods.node_local import node_local_options
from lazy_orbax.recovery.failed_saves import log_failed_saves
from lazy_orbax.recovery.preemption import Preemption
from lazy_orbax.restore.latest_good import restore_latest_good
from lazy_orbax.restore.load import load
from lazy_orbax.restore.replacing import FromStep, restore_replacing
from lazy_orbax.save.durable_path import DurablePath
from lazy_orbax.save.in_flight import wait_until_staged
from lazy_orbax.snapshot.snapshot_step import SnapshotStep
from lazy_orbax.snapshot.split_step import split_step
from lazy_orbax.timeline import RestoreTimeline, SaveTimeline

__all__ = [
    "DurablePath",
    "FromStep",
    "LazyCheckpointHandler",
    "LazyOptions",
    "Preemption",
    "RestoreTimeline",
    "SaveTimeline",
    "SnapshotStep",
    "args",
    "errors",
    "load",
    "log_failed_saves",
    "node_local_options",
    "prewarm",
    "pytree_handler",
    "reports",
    "restore_latest_good",
    "restore_replacing",
    "split_step",
    "standard_handler",
    "transforms",
    "v1_registry",
    "verify",
    "wait_until_staged",
]
__version__ = "0.1.0"
