"""Makes a snapshot that this machine does not have: a copy of it, or from parity of a group."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from lazy_orbax.errors import KeeperError
from lazy_orbax.tiers.parity import files, stripes
from lazy_orbax.tiers.parity.errand import Errand
from lazy_orbax.tiers.parity.files import Key
from lazy_orbax.tiers.parity.settings import NodeSettings
from lazy_orbax.tiers.parity.survey import Lost
from lazy_orbax.tiers.shelf import Shelf
from lazy_orbax.tiers.snapshot_file import SnapshotError, read_snapshot


def make_whole(settings: NodeSettings, lost: Lost, reached: Callable[[str], None]) -> None:
    """Makes a snapshot, and puts it where its process looks for it. It is checked before.

    Args:
        settings: of this node.
        lost: which snapshot, and who has what of it.
        reached: called with the name of each stage.

    Raises:
        KeeperError: somebody does not answer, or lies; or there is no room.
        OSError: there is no memory.
    """
    shelf = Shelf(settings.directory)
    name, becomes = files.rebuilt_place(shelf, settings.run, lost.process, lost.key)
    try:
        with (
            Errand(settings) as errand,
            contextlib.closing(files.room_for(shelf, name, lost.n_bytes)) as file,
        ):
            _fill(errand, file.memory[: lost.n_bytes], lost)
        reached("filled")
        _check(shelf.path_of(name), settings.run, lost)
        os.rename(shelf.path_of(name), shelf.path_of(becomes))
    finally:
        shelf.remove(name)


def _fill(errand: Errand, target: np.ndarray, lost: Lost) -> None:
    about = dataclasses.asdict(lost.key)
    if lost.copy is not None:
        told = {**about, "what": "snapshot", "process": lost.process}
        for at, part in errand.pull(lost.copy, told, target.size):
            target[at : at + len(part)] = np.frombuffer(part, np.uint8)
        return
    sources, sizes = lost.sources, [source.n_bytes for source in lost.sources]
    n, place = len(sources), [source.process for source in sources].index(lost.process)

    def pull_parity(holder: int) -> stripes.Parts:
        source = sources[holder]
        told = {**about, "what": "parity", "process": source.process}
        length = stripes.parity_bytes(sizes, holder)
        return _checked(errand, source.parity, told, length, source.parity_digest)

    def pull_stripe(owner: int, holder: int) -> stripes.Parts:
        source = sources[owner]
        told = {**about, "what": "stripe", "process": source.process}
        told |= {"n": n, "owner": owner, "holder": holder}
        first, end = stripes.stripe_of(sizes[owner], n, owner, holder)
        wanted = sources[holder].digests[owner]
        return _checked(errand, source.snapshot, told, end - first, wanted)

    stripes.rebuild(target, sizes, place, pull_parity, pull_stripe)


def _checked(
    errand: Errand, address: str | None, told: dict[str, Any], n_bytes: int, digest: int | None
) -> stripes.Parts:
    assert address is not None
    incoming = errand.pull(address, told, n_bytes)
    yield from incoming
    if incoming.digest != digest:
        raise KeeperError(
            f"the {told['what']} of process {told['process']}, which {address} has, is not what "
            "it was when the parity was made"
        )


def _check(path: str, run: str, lost: Lost) -> None:
    """Refuses what is not the snapshot that was lost. The bytes of its leaves are checked later."""
    try:
        found = read_snapshot(path)
    except (SnapshotError, OSError) as error:
        raise KeeperError(f"what was put together is no snapshot: {error}") from error
    told = (found.facts["run"], found.facts["process"], Key.told(found.facts))
    if told != (run, lost.process, lost.key) or found.serial != lost.serial:
        raise KeeperError("what was put together is another snapshot than was wanted")
