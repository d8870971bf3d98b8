"""A temporary path of Orbax that is synced before its step is listed."""

from __future__ import annotations

import asyncio
import functools
from typing import Any

from lazy_orbax._orbax.publishing import is_only_renamed, metadata_store_of
from lazy_orbax._orbax.symbols import ocp_path
from lazy_orbax.errors import OptionError
from lazy_orbax.save.publication import publication_failed
from lazy_orbax.save.step_sync import (
    TIMEOUT_S,
    directories_above,
    not_durable,
    not_synced,
    published_with,
    step_at,
)
from lazy_orbax.storage.fsync import sync_all
from lazy_orbax.storage.places import place_of
from lazy_orbax.storage.save_error import save_error


def durable(path: Any) -> Any:
    """Returns what publishes a local step as `DurablePath` does.

    Args:
        path: its temporary path. One that is not published by a rename is returned as it is.
    """
    if not (is_only_renamed(path) and place_of(str(path.get())).needs_sync):
        return path
    made = DurablePath.from_final(
        path.get_final(), checkpoint_metadata_store=metadata_store_of(path)
    )
    return made if made.get() == path.get() else path


class DurablePath(ocp_path.atomicity.AtomicRenameTemporaryPath):
    """Has a step on storage, synced, before Orbax lists it. For local directories.

    Without it, Orbax renames the step some milliseconds before lazy_orbax syncs the rename. A power
    cut between the two may leave a step that Orbax lists, and whose own metadata are empty. Its
    arrays are whole. Its custom metadata are lost, and a manager without handlers must be told how
    to restore it. Give it to
    Orbax as `ocp.CheckpointManagerOptions(temporary_path_class=lazy_orbax.DurablePath)`, or to an
    `ocp.AsyncCheckpointer`; it serves every handler.
    """

    @classmethod
    def from_final(cls, final_path: Any, **keywords: Any) -> DurablePath:
        """Returns the temporary path of what will be at `final_path`.

        Raises:
            OptionError: it is not a local directory.
        """
        if not place_of(str(final_path)).needs_sync:
            raise OptionError(
                f"DurablePath is for local directories, not {final_path}. "
                "An object store needs none: leave temporary_path_class out."
            )
        store = keywords.pop("checkpoint_metadata_store", None)
        if store is not None:
            keywords["checkpoint_metadata_store"] = _SyncedMetadata(store)
        path = super().from_final(final_path, **keywords)
        assert isinstance(path, cls)
        return path

    async def finalize(self) -> None:
        """Syncs what is in the directory, renames it, and syncs the rename.

        Raises:
            SaveError: the storage refused, or did nothing for too long.
        """
        directory, final = str(self.get()), str(self.get_final())
        if published_with(directory) != directory:  # An item: its step comes after it.
            await super().finalize()
            return
        failure, step = save_error, step_at(directory)
        timeout_s = step.timeout_s
        changed = functools.partial(not_synced, step, directory)
        try:
            await asyncio.to_thread(sync_all, changed, directory, timeout_s=timeout_s)
            await super().finalize()
            failure = not_durable
            above = functools.partial(directories_above, final)
            await asyncio.to_thread(sync_all, above, final, timeout_s=timeout_s)
        except OSError as error:
            raised = failure(directory, error)
            publication_failed(raised)
            raise raised from error


class _SyncedMetadata:
    """Orbax's store of small JSON files, of which each is synced when it was written.

    Orbax writes the last of them and renames in one go.
    """

    def __init__(self, store: Any):
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def update(self, file_path: Any, **values: Any) -> None:
        """Updates a file, and waits until that is durable."""
        self._store.update(file_path, **values)
        self._store.wait_until_finished()
        sync_all(lambda: [str(file_path)], str(file_path), timeout_s=TIMEOUT_S)
