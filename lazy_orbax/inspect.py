"""What the command line does, as functions of the same names. They need neither JAX nor a model.

| function | what it answers | record |
|---|---|---|
| `ls` | which steps are there? | `RunListing`, with a `StepEntry` for each |
| `show` | what is in it? | `CheckpointListing`, with an `ItemEntry` and each `LeafEntry` in it |
| `diff` | how do two checkpoints differ? | `Difference`, with a `LeafDifference` for each leaf |
| `verify` | is it what was saved? | `VerifyReport` |
| `du` | what does a run cost? | `DiskUse`, with a `StepCost` and a `FixedLeaf` for each |
| `timeline` | where did the time go? | `RunTimeline`, with a `TimelineEntry` for each |
| `clean` | what did killed saves leave? | `CleanReport`, with an `Abandoned` for each |
| `bench` | what can a storage do? | `StorageSpeed` |
| `html` | one page about all of it | the page |

Every record says what it has as text, with `str`, and as HTML in a notebook.
"""

from typing import TYPE_CHECKING

from lazy_orbax._lazily import exports as _exports

if TYPE_CHECKING:
    from lazy_orbax.inspection.bench import bench
    from lazy_orbax.inspection.clean import clean
    from lazy_orbax.inspection.diff import diff
    from lazy_orbax.inspection.du import du
    from lazy_orbax.inspection.html import html
    from lazy_orbax.inspection.ls import ls
    from lazy_orbax.inspection.show import show
    from lazy_orbax.inspection.timeline import timeline
    from lazy_orbax.integrity.verify import verify

_HOMES = {
    "bench": "lazy_orbax.inspection.bench",
    "clean": "lazy_orbax.inspection.clean",
    "diff": "lazy_orbax.inspection.diff",
    "du": "lazy_orbax.inspection.du",
    "html": "lazy_orbax.inspection.html",
    "ls": "lazy_orbax.inspection.ls",
    "show": "lazy_orbax.inspection.show",
    "timeline": "lazy_orbax.inspection.timeline",
    "verify": "lazy_orbax.integrity.verify",
}

__all__ = ["bench", "clean", "diff", "du", "html", "ls", "show", "timeline", "verify"]
__getattr__, __dir__ = _exports(globals(), _HOMES)
