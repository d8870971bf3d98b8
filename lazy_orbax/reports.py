"""What functions of lazy_orbax return: records to read, which nobody has to construct.

| function | record |
|---|---|
| `verify` | `VerifyReport`, with an `ItemReport` for each item |
| `restore_latest_good` | `LatestGood`, with a `Skipped` for each step that was passed over |
| `restore_newest` | `Newest`, with a `Rebuilt` for each snapshot that was made again |
| `Keeper.report` | `KeeperReport` |
| `Keeper.protection` | `ProtectionReport` |
| `restore_replacing` | `RestoredWithReplacements`, with a `Replaced` for each such leaf |
| `merge` | `Merged` |
| `search` | `Searched` |
| `log_failed_saves` | `FailedSaves` |
| `Preemption.last_save` | `LastSave` |
| `node_local_options` | `NodeLocalOptions` |
| `install` | `Installation`, a context manager |
| `status` | `Status` |
| `StepTimes.report` | `StallReport` |
| `advise` | `Advice`, with a `TierAdvice` for each tier |
| `SaveIntervalPolicy.report` | `IntervalReport` |
| `export` | `Exported`, with an `ExportedTensor` for each |

The functions of `lazy_orbax.inspect` say there which record they return.
"""

from typing import TYPE_CHECKING

from lazy_orbax._lazily import exports as _exports

if TYPE_CHECKING:
    from lazy_orbax.combine.exported import Exported, ExportedTensor
    from lazy_orbax.combine.merge import Merged
    from lazy_orbax.combine.search import Searched
    from lazy_orbax.handlers.installed import Installation, Status
    from lazy_orbax.inspection.bench import StorageSpeed
    from lazy_orbax.inspection.clean import Abandoned, CleanReport
    from lazy_orbax.inspection.diff import Difference, LeafDifference
    from lazy_orbax.inspection.du import DiskUse, FixedLeaf, StepCost
    from lazy_orbax.inspection.leaves import LeafEntry
    from lazy_orbax.inspection.ls import RunListing, StepEntry
    from lazy_orbax.inspection.show import CheckpointListing, ItemEntry
    from lazy_orbax.inspection.timeline import RunTimeline, TimelineEntry
    from lazy_orbax.integrity.verify_report import ItemReport, VerifyReport
    from lazy_orbax.pods.node_local import NodeLocalOptions
    from lazy_orbax.recovery.failed_saves import FailedSaves
    from lazy_orbax.recovery.preemption import LastSave
    from lazy_orbax.restore.latest_good import LatestGood, Skipped
    from lazy_orbax.restore.replacements import Replaced, RestoredWithReplacements
    from lazy_orbax.save.step_times import StallReport
    from lazy_orbax.tiers.advise import Advice, TierAdvice
    from lazy_orbax.tiers.keeping import KeeperReport
    from lazy_orbax.tiers.newest import Newest
    from lazy_orbax.tiers.parity.guard import ProtectionReport
    from lazy_orbax.tiers.parity.restoring import Rebuilt
    from lazy_orbax.tiers.save_interval import IntervalReport

_HOMES = {
    "Abandoned": "lazy_orbax.inspection.clean",
    "Advice": "lazy_orbax.tiers.advise",
    "CheckpointListing": "lazy_orbax.inspection.show",
    "CleanReport": "lazy_orbax.inspection.clean",
    "Difference": "lazy_orbax.inspection.diff",
    "DiskUse": "lazy_orbax.inspection.du",
    "Exported": "lazy_orbax.combine.exported",
    "ExportedTensor": "lazy_orbax.combine.exported",
    "FailedSaves": "lazy_orbax.recovery.failed_saves",
    "FixedLeaf": "lazy_orbax.inspection.du",
    "Installation": "lazy_orbax.handlers.installed",
    "IntervalReport": "lazy_orbax.tiers.save_interval",
    "ItemEntry": "lazy_orbax.inspection.show",
    "ItemReport": "lazy_orbax.integrity.verify_report",
    "KeeperReport": "lazy_orbax.tiers.keeping",
    "LastSave": "lazy_orbax.recovery.preemption",
    "LatestGood": "lazy_orbax.restore.latest_good",
    "LeafDifference": "lazy_orbax.inspection.diff",
    "LeafEntry": "lazy_orbax.inspection.leaves",
    "Merged": "lazy_orbax.combine.merge",
    "Newest": "lazy_orbax.tiers.newest",
    "NodeLocalOptions": "lazy_orbax.pods.node_local",
    "ProtectionReport": "lazy_orbax.tiers.parity.guard",
    "Rebuilt": "lazy_orbax.tiers.parity.restoring",
    "Replaced": "lazy_orbax.restore.replacements",
    "RestoredWithReplacements": "lazy_orbax.restore.replacements",
    "RunListing": "lazy_orbax.inspection.ls",
    "RunTimeline": "lazy_orbax.inspection.timeline",
    "Searched": "lazy_orbax.combine.search",
    "Skipped": "lazy_orbax.restore.latest_good",
    "StallReport": "lazy_orbax.save.step_times",
    "Status": "lazy_orbax.handlers.installed",
    "StepCost": "lazy_orbax.inspection.du",
    "StepEntry": "lazy_orbax.inspection.ls",
    "StorageSpeed": "lazy_orbax.inspection.bench",
    "TierAdvice": "lazy_orbax.tiers.advise",
    "TimelineEntry": "lazy_orbax.inspection.timeline",
    "VerifyReport": "lazy_orbax.integrity.verify_report",
}

__all__ = [
    "Abandoned",
    "Advice",
    "CheckpointListing",
    "CleanReport",
    "Difference",
    "DiskUse",
    "Exported",
    "ExportedTensor",
    "FailedSaves",
    "FixedLeaf",
    "Installation",
    "IntervalReport",
    "ItemEntry",
    "ItemReport",
    "KeeperReport",
    "LastSave",
    "LatestGood",
    "LeafDifference",
    "LeafEntry",
    "Merged",
    "Newest",
    "NodeLocalOptions",
    "ProtectionReport",
    "Rebuilt",
    "Replaced",
    "RestoredWithReplacements",
    "RunListing",
    "RunTimeline",
    "Searched",
    "Skipped",
    "StallReport",
    "Status",
    "StepCost",
    "StepEntry",
    "StorageSpeed",
    "TierAdvice",
    "TimelineEntry",
    "VerifyReport",
]
__getattr__, __dir__ = _exports(globals(), _HOMES)
