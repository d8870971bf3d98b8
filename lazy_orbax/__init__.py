"""Lazy asynchronous checkpoints for JAX, in Orbax and in Orbax's own format."""

from lazy_orbax import args, errors
from lazy_orbax.handlers.lazy import LazyCheckpointHandler
from lazy_orbax.handlers.prewarm import prewarm
from lazy_orbax.handlers.stock_shaped import pytree_handler, standard_handler
from lazy_orbax.integrity.verify import ItemReport, VerifyReport, verify
from lazy_orbax.options import LazyOptions
from lazy_orbax.pods.node_local import NodeLocalOptions, node_local_options
from lazy_orbax.recovery.failed_saves import FailedSaves, log_failed_saves
from lazy_orbax.recovery.preemption import LastSave, Preemption
from lazy_orbax.restore.latest_good import LatestGood, Skipped, restore_latest_good
from lazy_orbax.restore.replacing import (
    FromStep,
    Replaced,
    RestoredWithReplacements,
    restore_replacing,
)
from lazy_orbax.save.durable_path import DurablePath
from lazy_orbax.save.in_flight import wait_until_staged
from lazy_orbax.snapshot.snapshot_step import SnapshotStep
from lazy_orbax.snapshot.split_step import split_step
from lazy_orbax.timeline import SaveTimeline

__all__ = [
    "DurablePath",
    "FailedSaves",
    "FromStep",
    "ItemReport",
    "LastSave",
    "LatestGood",
    "LazyCheckpointHandler",
    "LazyOptions",
    "NodeLocalOptions",
    "Preemption",
    "Replaced",
    "RestoredWithReplacements",
    "SaveTimeline",
    "Skipped",
    "SnapshotStep",
    "VerifyReport",
    "args",
    "errors",
    "log_failed_saves",
    "node_local_options",
    "prewarm",
    "pytree_handler",
    "restore_latest_good",
    "restore_replacing",
    "split_step",
    "standard_handler",
    "verify",
    "wait_until_staged",
]
__version__ = "0.1.0"
