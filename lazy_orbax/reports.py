"""What functions of lazy_orbax return: records to read, which nobody has to construct.

| function | record |
|---|---|
| `verify` | `VerifyReport`, with an `ItemReport` for each item |
| `restore_latest_good` | `LatestGood`, with a `Skipped` for each step that was passed over |
| `restore_replacing` | `RestoredWithReplacements`, with a `Replaced` for each such leaf |
| `log_failed_saves` | `FailedSaves` |
| `Preemption.last_save` | `LastSave` |
| `node_local_options` | `NodeLocalOptions` |
| `install` | `Installation`, a context manager |
| `status` | `Status` |
| `StepTimes.report` | `StallReport` |
"""

from lazy_orbax.handlers.installed import Installation, Status
from lazy_orbax.integrity.verify import ItemReport, VerifyReport
from lazy_orbax.pods.node_local import NodeLocalOptions
from lazy_orbax.recovery.failed_saves import FailedSaves
from lazy_orbax.recovery.preemption import LastSave
from lazy_orbax.restore.latest_good import LatestGood, Skipped
from lazy_orbax.restore.replacing import Replaced, RestoredWithReplacements
from lazy_orbax.save.step_times import StallReport

__all__ = [
    "FailedSaves",
    "Installation",
    "ItemReport",
    "LastSave",
    "LatestGood",
    "NodeLocalOptions",
    "Replaced",
    "RestoredWithReplacements",
    "Skipped",
    "StallReport",
    "Status",
    "VerifyReport",
]
