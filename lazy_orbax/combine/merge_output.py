"""The step that a merge makes: written beside its place, and put there when it is durable.

It is like the first source: the same tree, names, kinds, chunks and small files, in the same
format, for the same readers. A killed merge leaves a directory with Orbax's mark of what is
temporary: nobody lists it, and `clean` removes it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from typing import Any

import tensorstore as ts

from lazy_orbax import _paths
from lazy_orbax.combine.merge_sources import MergedLeaf, strings_of
from lazy_orbax.combine.merge_writer import LeafWriter
from lazy_orbax.errors import OptionError
from lazy_orbax.inspection import looking
from lazy_orbax.integrity import step_metadata
from lazy_orbax.integrity.step_place import metadata_beside
from lazy_orbax.recovery.leftovers import remove
from lazy_orbax.restore.transformed import Checkpoint
from lazy_orbax.save.step_sync import directories_above, not_durable
from lazy_orbax.storage.fsync import sync_all
from lazy_orbax.storage.place import MOST_BYTES
from lazy_orbax.storage.places import place_of
from lazy_orbax.storage.save_error import save_error

LINEAGE = "lazy_orbax_merge"
"""The key of the custom metadata under which a merged step says what it was made of."""


class Layout:
    """Where the result goes, and what of the first source's step it is like.

    Attributes:
        final: the step's directory.
        name: of the item in it; empty if the step is the item.
        metadata: what Orbax keeps of the step beside its items; `None` where it keeps nothing.
        is_of_v1: whether a function of v1 saved the step.
        first: that source.
        kept: the source that has the strings.
    """

    def __init__(self, out: str, first: Checkpoint, kept: Checkpoint):
        """Looks at the step of the first source.

        Args:
            out: where the result goes.
            first: the first source.
            kept: the source that has the strings.

        Raises:
            OptionError: something is there already.
            MalformedCheckpointError: what Orbax keeps of the first source's step is no JSON object.
        """
        self.first, self.kept = first, kept
        self.final = place_of(_paths.without_dots(out)).absolute.rstrip("/")
        if place_of(self.final).as_path().exists():
            raise OptionError(f"{self.final} is there already. Give a new directory.")
        item = first.contents.directory.rstrip("/")
        step = metadata_beside(item)
        self.name = "" if step in (None, item) else item.rpartition("/")[2]
        self.metadata: dict[str, Any] | None = None
        self.is_of_v1 = False
        if step is not None:
            self.is_of_v1 = place_of(step).has(_paths.STEP_OF_V1)
            self.metadata = looking.step_metadata(step)
            handlers = self.metadata.get("item_handlers")
            if isinstance(handlers, dict):
                mine = {name: kind for name, kind in handlers.items() if name == self.name}
                self.metadata["item_handlers"] = mine

    def temporary(self, number: int) -> str:
        """Returns where the step is until it is published: in an object store, the same place.

        Args:
            number: one that no other merge has.
        """
        if not place_of(self.final).needs_sync:
            return self.final
        return f"{self.final}{_paths.TEMPORARY}-{number}"

    def item(self, root: str) -> str:
        """Returns the directory of the item in the step's."""
        return f"{root}/{self.name}".rstrip("/")

    def create(self, root: str) -> None:
        """Creates the directories of a step that is not published.

        Raises:
            SaveError: the storage refused.
        """
        if place_of(root).needs_sync:
            try:
                os.makedirs(self.item(root))
            except OSError as error:
                raise save_error(root, error) from error

    def remove(self, root: str) -> None:
        """Removes a step unless it was published."""
        place = place_of(root)
        if place.needs_sync:
            if place.may_be_there():
                remove([root])
        elif not place.has(_paths.COMMITTED):
            place.kvstore.delete_range(ts.KvStore.KeyRange()).result()


class Output:
    """The step while it is made. A context, in which its writer may be used.

    Attributes:
        writer: writes its arrays.
    """

    def __init__(self, layout: Layout, root: str, leaves: Sequence[MergedLeaf], process: int):
        """Opens the step, whose directories are there.

        Args:
            layout: where it goes.
            root: where it is until it is published.
            leaves: its leaves.
            process: this process.
        """
        self._layout, self._first, self._process = layout, layout.first, process
        self._step, self._item = place_of(root), place_of(layout.item(root))
        in_database = layout.first.contents.in_database
        self.writer = LeafWriter(self._item, leaves, in_database=in_database, process=process)
        self._syncer = self._step.syncer([f"{_paths.PROCESS_DIRECTORY}{process}"])

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *_: object) -> None:
        self._syncer.close()
        self.writer.close()

    def begin_sync(self) -> None:
        """Starts to sync what is written so far."""
        self._syncer.begin()

    def finish(self, lineage: dict[str, Any], processes: int) -> None:
        """Writes the small files of this process, and makes durable what it wrote.

        Args:
            lineage: what the result was made of, as JSON values.
            processes: how many write.

        Raises:
            SaveError: the storage refused.
        """
        files, texts = {}, {}
        if self._process == 0:
            files, texts = self._small_files(lineage), strings_of(self._layout.kept)
        name, content = self.writer.digests(self._process, processes, files, texts)
        strings = self._layout.kept.contents.files.read(_paths.STRINGS, MOST_BYTES)
        if self._process == 0 and strings is not None:
            files[_paths.STRINGS] = strings
        self._write({**files, name: content})
        self._sync()

    def publish(self, lineage: dict[str, Any], processes: int) -> None:
        """Puts the step in its place, once all processes have finished.

        Args:
            lineage: what it was made of.
            processes: how many wrote.

        Raises:
            SaveError: the storage refused.
        """
        if self._first.contents.in_database:
            self.writer.merge_databases(processes)
        self._write_step_metadata(lineage)
        said = f"Checkpoint commit was successful to {self._layout.final}"
        for place in {self._item.directory: self._item, self._step.directory: self._step}.values():
            place.write(_paths.COMMITTED, said.encode())
        if not self._step.needs_sync:
            return
        self._sync()
        final = self._layout.final
        try:
            os.rename(self._step.directory, final)
        except OSError as error:
            raise save_error(self._step.directory, error) from error
        try:
            sync_all(lambda: directories_above(final), final, timeout_s=self._step.timeout_s)
        except OSError as error:
            raise not_durable(final, error) from error

    def _small_files(self, lineage: dict[str, Any]) -> dict[str, bytes]:
        files = self._first.contents.files
        tree = json.loads(files.read(_paths.TREE, MOST_BYTES) or b"{}")
        tree["custom_metadata"] = {LINEAGE: lineage}
        found = {_paths.TREE: json.dumps(tree).encode()}
        # A leaf may have the name of that directory as well.
        about = [n for n in files.names(_paths.ARRAY_METADATAS) if "/process_" in n]
        for name in (_paths.SHARDINGS, *about):
            if (content := files.read(name, MOST_BYTES)) is not None:
                found[name] = content
        return found

    def _write_step_metadata(self, lineage: dict[str, Any]) -> None:
        metadata = self._layout.metadata
        if metadata is None:
            return
        now = time.time_ns()
        metadata = {
            **metadata,
            "metrics": {},
            "performance_metrics": {},
            "init_timestamp_nsecs": now,
            "commit_timestamp_nsecs": now,
            "custom_metadata": {LINEAGE: lineage},
        }
        markers = {_paths.STEP_OF_V1: b""} if self._layout.is_of_v1 else {}
        files = {_paths.STEP_METADATA: json.dumps(metadata).encode(), **markers}
        self._write(files, of_step=True)
        step_metadata.record(self._item.directory, timeout_s=self._step.timeout_s)

    def _write(self, files: dict[str, bytes], *, of_step: bool = False) -> None:
        place = self._step if of_step else self._item
        try:
            for name, content in files.items():
                if "/" in name and place.needs_sync:
                    folder = os.path.dirname(os.path.join(place.directory, name))
                    os.makedirs(folder, exist_ok=True)
                place.write(name, content)
        except (OSError, ValueError) as error:
            raise save_error(place.directory, error) from error

    def _sync(self) -> None:
        try:
            self._syncer.finish()
        except OSError as error:
            raise save_error(self._step.directory, error) from error
