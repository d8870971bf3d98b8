"""What one save of one item is told: the plan, how to follow it, and who is told of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from lazy_orbax.integrity.proof import Evidence
from lazy_orbax.options import LazyOptions
from lazy_orbax.save.plan_cache import Prepared
from lazy_orbax.save.unchanged_state import Fingerprints
from lazy_orbax.storage.pace import Pace
from lazy_orbax.timeline import Recorder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What is saved, how and where.

    Attributes:
        prepared: the plan.
        texts: leaves that are strings, by name. Orbax writes them; their digests are ours.
        options: how to take the snapshot.
        limit_bytes: most bytes of snapshot in host memory.
        pace: how fast it may be written.
        fingerprints: what the saves before held.
        recorder: its timeline, whose clock runs.
        evidence: for a save that is verified, of what the caller's arrays held.
    """

    prepared: Prepared
    texts: Mapping[str, str]
    options: LazyOptions
    limit_bytes: int
    pace: Pace
    fingerprints: Fingerprints
    recorder: Recorder
    evidence: Evidence | None
