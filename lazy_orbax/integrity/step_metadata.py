"""What Orbax keeps of a step beside its items, against digests of ours.

Orbax writes that file three times: empty; with everything that matters before it finalizes the
items, which is when its digests are taken; and with the time of the commit, as it publishes. It
may be changed later with Orbax's own `ocp.metadata.metadata_store`, so what differs is told of,
and refuses nothing.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from typing import Any

from lazy_orbax import _paths
from lazy_orbax._paths import STEP_METADATA
from lazy_orbax.errors import MalformedCheckpointError, Problem
from lazy_orbax.integrity import digest_file
from lazy_orbax.integrity.digest import digest_of_text
from lazy_orbax.integrity.digest_file import DigestError
from lazy_orbax.storage.deadline import Deadline
from lazy_orbax.storage.fsync import Inode
from lazy_orbax.storage.place import MOST_BYTES
from lazy_orbax.storage.places import place_of
from lazy_orbax.storage.save_error import save_error
from lazy_orbax.trust.files import ItemFiles

DIGESTS = f"{digest_file.DIRECTORY}/step"
_FORMAT = 1
_TIME_OF_COMMIT = "commit_timestamp_nsecs"
_LOOK_AGAIN_S = 0.01
_UNREADABLE = (ValueError, OSError, KeyError, TypeError, RecursionError, MalformedCheckpointError)


def record(item_directory: str, *, timeout_s: float) -> set[Inode]:
    """Writes the digests of the metadata of the step that an item is of, before it is published.

    Does nothing where Orbax has no such metadata by then.

    Args:
        item_directory: the item's directory, or its address. It has digests of its own.
        timeout_s: most seconds in which the storage may do nothing.

    Returns:
        The directories in which something was written, where they are local.

    Raises:
        SaveError: the storage refused, or did nothing for too long.
    """
    changed: set[Inode] = set()
    item = place_of(item_directory, timeout_s)
    steps = [place_of(place, timeout_s) for place in _paths.places_of_step(item_directory)]

    def read() -> bytes | None:
        found = (step.peek(STEP_METADATA) for step in steps)
        return next((content for content in found if content is not None), None)

    def work() -> None:
        if item.has_directory(digest_file.DIRECTORY) and (
            content := _digests_when_written(read, item.appears_within_s)
        ):
            changed.update(item.write(DIGESTS, content))

    try:
        Deadline(item_directory, timeout_s).run(work, "lazy_orbax-step")
    except (OSError, ValueError) as error:
        raise save_error(item_directory, error, file=f"{item_directory}/{DIGESTS}") from error
    return changed


def check(item_directory: str, step_directory: str) -> list[Problem]:
    """Returns what of a step's metadata is not what was saved with one of its items.

    Args:
        item_directory: the item's directory. Without digests in it nothing is wrong.
        step_directory: the step's, which may be the same.
    """
    step = place_of(step_directory)
    return _differing(ItemFiles(place_of(item_directory)), lambda: step.read(STEP_METADATA))


def check_beside(files: ItemFiles) -> list[Problem]:
    """Returns what `check` does, where the metadata are found. An item may have been copied alone.

    Args:
        files: the item's files.
    """
    return _differing(files, lambda: _metadata_beside(files))


def _metadata_beside(files: ItemFiles) -> bytes | None:
    if (content := files.read(STEP_METADATA, MOST_BYTES)) is not None:
        return content
    _, above = _paths.places_of_step(files.place.directory)
    step = place_of(above)
    content = step.read_if_there(STEP_METADATA)
    if content is None and step.has(STEP_METADATA):
        raise OSError("it is no file")
    return content


def _differing(files: ItemFiles, read: Callable[[], bytes | None]) -> list[Problem]:
    """Returns what of a step's metadata has another digest than in an item.

    Args:
        files: the item's files.
        read: returns the metadata; `None` where there are none.
    """
    if files.size(DIGESTS) is None:
        return []
    try:
        wanted = digest_file.unseal(files.read(DIGESTS, MOST_BYTES) or b"")
        if wanted["format"] != _FORMAT:
            raise DigestError(
                f"it has form {wanted['format']!r}, which a later lazy_orbax can read"
            )
        fields = dict(wanted["fields"])
    except _UNREADABLE as error:
        return [Problem(f"cannot be used: {error}", DIGESTS)]
    try:
        if (content := read()) is None:
            return []
        found = _digests_of(json.loads(content))
    except _UNREADABLE as error:
        return [Problem(f"cannot be read: {error}", STEP_METADATA)]
    advice = f"If it was changed on purpose, remove {DIGESTS} of the item"
    return [
        Problem(f"{name} is not what was saved. {advice}", STEP_METADATA)
        for name, digest in fields.items()
        if found.get(name) != digest
    ]


def _digests_when_written(read: Callable[[], bytes | None], within_s: float) -> bytes | None:
    """Returns the digests of metadata once they are complete; `None` where they will not be.

    Args:
        read: returns the metadata as they are now, or `None` where there are none.
        within_s: for how long to wait, in seconds.
    """
    deadline_s = time.monotonic() + within_s
    while time.monotonic() < deadline_s:
        with contextlib.suppress(OSError, ValueError):  # Just being written.
            if (content := read()) is None:
                return None
            found = json.loads(content)
            if isinstance(found, dict) and found.get("item_handlers") is not None:
                fields = {"format": _FORMAT, "fields": _digests_of(found)}
                return digest_file.seal(json.dumps(fields).encode()[1:])
        time.sleep(_LOOK_AGAIN_S)
    return None


def _digests_of(metadata: Any) -> dict[str, str]:
    """Returns the digest of each field: of its value, not of how that is written."""
    if not isinstance(metadata, dict):
        raise ValueError("it is not an object")
    values = {**metadata, _TIME_OF_COMMIT: metadata.get(_TIME_OF_COMMIT, "missing") != "missing"}
    return {
        name: f"{digest_of_text(json.dumps(value, sort_keys=True)):016x}"
        for name, value in values.items()
    }
