"""A saver killed at an exact request of a save to `gs://`: what another process finds there."""

from __future__ import annotations

from typing import NamedTuple

import pytest
from equipment.daily import every
from gcs.proxy import Fault
from gcs.uploads import (
    CHUNK,
    COMMIT,
    DATA,
    ITEM_COMMIT,
    MANIFEST,
    MERGED,
    MERGED_DATA,
    SHARDING,
    STEP_DIGESTS,
    STEP_METADATA,
    TREE,
    WRITE_SHAPES,
)


class Point(NamedTuple):
    """Where the saver dies: at the request of `pattern` after `skip` others.

    With `stall` the request is at the door and never gets in; with `mute` the server has obeyed
    and nobody is told.
    """

    what: str
    pattern: str
    action: str
    skip: int = 0
    keywords: dict[str, bool] = {}  # noqa: RUF012 - Nobody changes it.

    def __str__(self) -> str:
        return f"{'zarr' if self.keywords else 'ocdbt'}: {self.what}"


ZARR = {"use_ocdbt": False}
POINTS = [
    Point("before the step's metadata", STEP_METADATA, "stall"),
    Point("before the first data", DATA, "stall"),
    Point("after the first data", DATA, "mute"),
    Point("before the manifest", MANIFEST, "stall"),
    Point("after the manifest", MANIFEST, "mute"),
    Point("before the second data", DATA, "stall", 1),
    Point("before _METADATA", TREE, "stall"),
    Point("after _METADATA", TREE, "mute"),
    Point("before _sharding", SHARDING, "stall"),
    Point("after array_metadatas", WRITE_SHAPES, "mute"),
    Point("before the merge's data", MERGED_DATA, "stall"),
    Point("after the merge's data", MERGED_DATA, "mute"),
    Point("before the merge's manifest", MERGED, "stall"),
    Point("after the merge's manifest", MERGED, "mute"),
    Point("before the handlers in the step's metadata", STEP_METADATA, "stall", 1),
    Point("before the digests of that", STEP_DIGESTS, "stall"),
    Point("after the digests of that", STEP_DIGESTS, "mute"),
    Point("before the item's commit file", ITEM_COMMIT, "stall"),
    Point("after the item's commit file", ITEM_COMMIT, "mute"),
    Point("before the commit time", STEP_METADATA, "stall", 2),
    Point("before the commit file", COMMIT, "stall"),
    Point("after the commit file", COMMIT, "mute"),
    Point("before the first chunk", CHUNK, "stall", 0, ZARR),
    Point("after the first chunk", CHUNK, "mute", 0, ZARR),
    Point("before the last chunk", CHUNK, "stall", 7, ZARR),
    Point("before the commit file", COMMIT, "stall", 0, ZARR),
    Point("after the commit file", COMMIT, "mute", 0, ZARR),
]


@pytest.fixture(scope="module")
def witness(start_for_module):
    """Another process, which only knows the address."""
    return start_for_module()


@pytest.mark.parametrize("point", every(2, POINTS), ids=str)
def test_a_killed_saver(start, witness, proxy, root, point, tell):
    saver = start()
    saver.do("open", root, **point.keywords)
    saver.do("save", 1)
    met = Fault(point.pattern, point.action, skip=point.skip, times=1)
    with proxy.breaking(met):
        saver.begin("save", 2)
        met.await_request()
        saver.kill()
    committed = [1, 2] if (point.pattern, point.action) == (COMMIT, "mute") else [1]
    assert witness.do("open", root, stock=True) == committed
    assert witness.do("wrong", *committed) == []
    witness.do("open", root, **point.keywords)
    steps = [*committed, committed[-1] + 1]
    witness.do("save", steps[-1])
    assert witness.do("open", root, stock=True) == steps
    assert witness.do("wrong", *steps) == []
    tell("Savers killed on gs://", str(point), f"newest step: {committed[-1]}")
