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

from typing import TYPE_CHECKING

from lazy_orbax._lazily import exports as _exports

if TYPE_CHECKING:
    from lazy_orbax.handlers.installed import Installation, Status
    from lazy_orbax.integrity.verify_report import ItemReport, VerifyReport
    from lazy_orbax.pods.node_local import NodeLocalOptions
    from lazy_orbax.recovery.failed_saves import FailedSaves
    from lazy_orbax.recovery.preemption import LastSave
    from lazy_orbax.restore.latest_good import LatestGood, Skipped
    from lazy_orbax.restore.replacing import Replaced, RestoredWithReplacements
    from lazy_orbax.save.step_times import StallReport

_HOMES = {
    "FailedSaves": "lazy_orbax.recovery.failed_saves",
    "Installation": "lazy_orbax.handlers.installed",
    "ItemReport": "lazy_orbax.integrity.verify_report",
    "LastSave": "lazy_orbax.recovery.preemption",
    "LatestGood": "lazy_orbax.restore.latest_good",
    "NodeLocalOptions": "lazy_orbax.pods.node_local",
    "Replaced": "lazy_orbax.restore.replacing",
    "RestoredWithReplacements": "lazy_orbax.restore.replacing",
    "Skipped": "lazy_orbax.restore.latest_good",
    "StallReport": "lazy_orbax.save.step_times",
    "Status": "lazy_orbax.handlers.installed",
    "VerifyReport": "lazy_orbax.integrity.verify_report",
}

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
__getattr__, __dir__ = _exports(globals(), _HOMES)
