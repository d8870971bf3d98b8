"""A snapshot in memory is written to storage, as an ordinary step of the run, by a fresh process.

`python -m lazy_orbax.handlers.completing RUN DIRECTORY`: the keeper calls it.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from typing import Any

from etils import epath

from lazy_orbax import _paths
from lazy_orbax._orbax.symbols import ocp
from lazy_orbax.errors import KeeperError, LazyOrbaxError
from lazy_orbax.handlers.stock_shaped import pytree_handler
from lazy_orbax.tiers.kept_steps import UNUSABLE, KeptStep, kept_steps
from lazy_orbax.tiers.promoted_steps import listed
from lazy_orbax.tiers.shelf import Shelf

_LOG = logging.getLogger("lazy_orbax")


def complete(run: str, directory: str | None = None) -> int:
    """Writes the newest whole snapshot of a run to storage. Returns its step.

    Every item that the run kept must be whole, with every byte of it on this machine. Arrays are
    written as NumPy arrays, whatever devices they were on: a restore with a target puts them
    where that says, and one without a target returns NumPy arrays.

    Args:
        run: the run's directory, or its `gs://` address, which must be there.
        directory: the keeper's directory.

    Raises:
        KeeperError: there is no such snapshot, or somebody has gone on with the run since.
        SaveError: the storage refused it.
    """
    if not epath.Path(run).is_dir():
        raise KeeperError(f"there is no directory {run} to which a step could be written")
    reasons: list[str] = []
    for kept in kept_steps(Shelf(directory), run):
        _refuse_if_outlived(run, kept)
        try:
            values = kept.values()
        except UNUSABLE as error:
            reasons.append(f"step {kept.step}: {error}")
            continue
        write(run, kept.step, values)
        return kept.step
    raise KeeperError(f"no snapshot of {run} in memory is whole: {'; '.join(reasons) or 'none'}")


def write(
    run: str,
    step: int,
    values: dict[str, Any],
    *,
    handlers: Mapping[str, Any] | None = None,
    **options: Any,
) -> None:
    """Writes a step as a manager of the run would.

    Args:
        run: the run's directory or address.
        step: the step.
        values: the tree of each item.
        handlers: what saves each item; `None`: as a manager would.
        **options: more of `ocp.CheckpointManagerOptions`.

    Raises:
        SaveError: the storage refused it.
    """
    how = ocp.CheckpointManagerOptions(**{"create": False, **_naming(run), **options})
    saving = handlers or {item: pytree_handler() for item in values}
    with ocp.CheckpointManager(run, item_handlers=saving, options=how) as manager:
        args = {item: ocp.args.PyTreeSave(value) for item, value in values.items()}
        manager.save(step, args=ocp.args.Composite(**args), force=True)
        manager.wait_until_finished()


def _refuse_if_outlived(run: str, kept: KeptStep) -> None:
    """Refuses to write into a run with which somebody else has gone on.

    Raises:
        KeeperError: there is a step that is as new, or was written later.
    """
    root = epath.Path(run)
    for path, stored, is_temporary in _paths.steps_in(root) if root.exists() else ():
        if is_temporary or stored is None:
            continue
        if stored >= kept.step or _begun_s(path) > kept.written_s:
            raise KeeperError(f"step {kept.step} is not written: {path} is newer")


def _naming(run: str) -> dict[str, Any]:
    """Returns how the run's manager names steps, as those that are there tell."""
    for stored, path in listed(run):
        prefix, _, digits = path.name.rpartition("_")
        length = len(digits) if digits.startswith("0") and stored else None
        return {"step_prefix": prefix or None, "step_format_fixed_length": length}
    return {}


def _begun_s(step: Any) -> float:
    """Returns when a step in storage was begun, as Orbax says; it may have taken its time."""
    try:
        told = json.loads((step / _paths.STEP_METADATA).read_text())
        return told["init_timestamp_nsecs"] / 1e9
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0


def main(arguments: list[str]) -> int:
    """Completes a run. Returns the exit status: 0 where a step was written."""
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    try:
        step = complete(*arguments)
    except LazyOrbaxError as error:
        _LOG.warning("%s", error)
        return 1
    _LOG.warning("Step %d of %s was written.", step, arguments[0])
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
