"""Saves of steps that may link to the one before, and what stock Orbax makes of them."""

from __future__ import annotations

import orbax.checkpoint as ocp
from equipment.trees import assert_same


def save(manager, step, state):
    """Saves a step, and waits for it."""
    manager.save(step, args=ocp.args.PyTreeSave(state))
    manager.wait_until_finished()


def stock_restores(directory, step, wanted):
    """Checks that stock Orbax restores a step bit for bit."""
    with ocp.CheckpointManager(directory, item_handlers=ocp.PyTreeCheckpointHandler()) as stock:
        args = ocp.args.PyTreeRestore(wanted, ocp.checkpoint_utils.construct_restore_args(wanted))
        assert_same(stock.restore(step, args=args), wanted)
