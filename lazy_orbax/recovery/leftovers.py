"""Removing what a failed save wrote to a local disk.

Stock Orbax leaves it until the process ends: on a full disk every later save fails for it. Removed
is only what carries Orbax's mark of what is temporary.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import time
from collections.abc import Iterable

from lazy_orbax import _paths

# Orbax writes the metadata of a step from a thread of its own.
_STEP_METADATA_S = 0.5
_TRIES = 3
# How long a save that is refused waits for Orbax to create its directories.
_DIRECTORIES_S = 5
_log = logging.getLogger("lazy_orbax")


def holds_a_step(root: str) -> bool:
    """Whether Orbax made the directory for a step. It may take it a moment to say so."""
    deadline_s = time.monotonic() + _STEP_METADATA_S
    files = [os.path.join(root, name) for name in (_paths.STEP_METADATA, _paths.STEP_OF_V1)]
    while os.path.isdir(root) and not any(map(os.path.lexists, files)):
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.01)
    return True


def remove_if_empty(path: str) -> bool:
    """Removes a directory unless something is in it. Returns whether it is gone."""
    try:
        os.rmdir(path)
    except OSError:
        return not os.path.lexists(path)
    return True


def remove(paths: Iterable[str]) -> bool:
    """Removes as many directories as can be. Returns whether all are gone."""
    gone = [_remove_tree(path) for path in paths]
    return all(gone)


def _remove_tree(path: str) -> bool:
    """Removes a directory, but nothing that a link in it leads to. Returns whether it is gone."""
    problems: list[OSError] = []
    for _ in range(_TRIES):
        problems.clear()
        shutil.rmtree(path, onerror=lambda *told: problems.append(told[2][1]))
        if not os.path.lexists(path):
            return True
        if any(problem.errno not in (errno.ENOENT, errno.ENOTEMPTY) for problem in problems):
            break
    _log.warning("What a failed save left in %s could not be removed: %s", path, problems[:1])
    return False
