"""Lazy asynchronous checkpoints for JAX, in Orbax and in Orbax's own format.

What this package exports is public, and what its modules `args`, `errors`, `inspect`, `reports`
and `transforms` do.
Everything else is private, whatever its name.
"""

from typing import TYPE_CHECKING

from lazy_orbax._lazily import exports as _exports

if TYPE_CHECKING:
    from lazy_orbax import args, errors, inspect, reports, transforms
    from lazy_orbax.combine.export import export
    from lazy_orbax.combine.merge import merge
    from lazy_orbax.combine.params_of import params_of
    from lazy_orbax.combine.schedules import merge_coefficients
    from lazy_orbax.combine.search import search
    from lazy_orbax.handlers.installed import install, status, uninstall
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
    from lazy_orbax.restore.replacements import FromNeighbours, FromStep
    from lazy_orbax.restore.replacing import restore_replacing
    from lazy_orbax.save.durable_path import DurablePath
    from lazy_orbax.save.in_flight import wait_until_staged
    from lazy_orbax.save.step_times import StepTimes
    from lazy_orbax.snapshot.snapshot_step import SnapshotStep
    from lazy_orbax.snapshot.split_step import split_step
    from lazy_orbax.tiers.advise import TierCost, advise
    from lazy_orbax.tiers.keeping import Keeper
    from lazy_orbax.tiers.newest import restore_newest
    from lazy_orbax.tiers.parity.odds import parity_survives
    from lazy_orbax.tiers.parity.settings import Parity
    from lazy_orbax.tiers.save_interval import SaveIntervalPolicy
    from lazy_orbax.tiers.tier import Tier
    from lazy_orbax.timeline import RestoreTimeline, SaveTimeline
    from lazy_orbax.timeline_lines import timeline_file

# Where each name comes from, once somebody asks for it: `import lazy_orbax` imports no JAX.
_HOMES = {
    "DurablePath": "lazy_orbax.save.durable_path",
    "FromNeighbours": "lazy_orbax.restore.replacements",
    "FromStep": "lazy_orbax.restore.replacements",
    "Keeper": "lazy_orbax.tiers.keeping",
    # By way of its args, which Orbax must know of as soon as there is such a handler.
    "LazyCheckpointHandler": "lazy_orbax.args",
    "LazyOptions": "lazy_orbax.options",
    "Parity": "lazy_orbax.tiers.parity.settings",
    "Preemption": "lazy_orbax.recovery.preemption",
    "RestoreTimeline": "lazy_orbax.timeline",
    "SaveIntervalPolicy": "lazy_orbax.tiers.save_interval",
    "SaveTimeline": "lazy_orbax.timeline",
    "SnapshotStep": "lazy_orbax.snapshot.snapshot_step",
    "StepTimes": "lazy_orbax.save.step_times",
    "Tier": "lazy_orbax.tiers.tier",
    "TierCost": "lazy_orbax.tiers.advise",
    "advise": "lazy_orbax.tiers.advise",
    "args": "lazy_orbax.args",
    "errors": "lazy_orbax.errors",
    "export": "lazy_orbax.combine.export",
    "inspect": "lazy_orbax.inspect",
    "install": "lazy_orbax.handlers.installed",
    "load": "lazy_orbax.restore.load",
    "log_failed_saves": "lazy_orbax.recovery.failed_saves",
    "merge": "lazy_orbax.combine.merge",
    "merge_coefficients": "lazy_orbax.combine.schedules",
    "node_local_options": "lazy_orbax.pods.node_local",
    "params_of": "lazy_orbax.combine.params_of",
    "parity_survives": "lazy_orbax.tiers.parity.odds",
    "prewarm": "lazy_orbax.handlers.prewarm",
    "pytree_handler": "lazy_orbax.handlers.stock_shaped",
    "reports": "lazy_orbax.reports",
    "restore_latest_good": "lazy_orbax.restore.latest_good",
    "restore_newest": "lazy_orbax.tiers.newest",
    "restore_replacing": "lazy_orbax.restore.replacing",
    "search": "lazy_orbax.combine.search",
    "split_step": "lazy_orbax.snapshot.split_step",
    "standard_handler": "lazy_orbax.handlers.stock_shaped",
    "status": "lazy_orbax.handlers.installed",
    "timeline_file": "lazy_orbax.timeline_lines",
    "transforms": "lazy_orbax.transforms",
    "uninstall": "lazy_orbax.handlers.installed",
    "v1_registry": "lazy_orbax.handlers.v1",
    "verify": "lazy_orbax.integrity.verify",
    "wait_until_staged": "lazy_orbax.save.in_flight",
}

__all__ = [
    "DurablePath",
    "FromNeighbours",
    "FromStep",
    "Keeper",
    "LazyCheckpointHandler",
    "LazyOptions",
    "Parity",
    "Preemption",
    "RestoreTimeline",
    "SaveIntervalPolicy",
    "SaveTimeline",
    "SnapshotStep",
    "StepTimes",
    "Tier",
    "TierCost",
    "advise",
    "args",
    "errors",
    "export",
    "inspect",
    "install",
    "load",
    "log_failed_saves",
    "merge",
    "merge_coefficients",
    "node_local_options",
    "params_of",
    "parity_survives",
    "prewarm",
    "pytree_handler",
    "reports",
    "restore_latest_good",
    "restore_newest",
    "restore_replacing",
    "search",
    "split_step",
    "standard_handler",
    "status",
    "timeline_file",
    "transforms",
    "uninstall",
    "v1_registry",
    "verify",
    "wait_until_staged",
]
__version__ = "0.1.0"
__getattr__, __dir__ = _exports(globals(), _HOMES)
