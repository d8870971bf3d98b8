"""The place of one item of one process: one snapshot stays whole while the next is written."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from lazy_orbax.errors import KeeperError
from lazy_orbax.integrity.digest import digest_of_bytes
from lazy_orbax.plan.slabs import Piece
from lazy_orbax.tiers.keeper_link import KeeperLink
from lazy_orbax.tiers.kept_layout import KeptLayout, view_in
from lazy_orbax.tiers.shelf import GENERATIONS, Shelf, file_of
from lazy_orbax.tiers.snapshot_file import SnapshotError, SnapshotFile, read_snapshot
from lazy_orbax.tiers.votes import Votes

# What is left free for a state that grows a little, so that the keeper is not asked each time.
_ROUND_BYTES = 2**20
# How long another process may be behind.
_VOTE_S = 30.0


class Slot:
    """Two files in memory. One holds the newest snapshot that all processes of the job have.

    Invariant: whoever writes, or changes anything else here, holds `_busy`. The file `_common` is
    not written.

    Attributes:
        names: of the two files.
    """

    def __init__(self, shelf: Shelf, link: KeeperLink, whose: tuple[str, str, int], votes: Votes):
        """Looks at what an earlier life of this process left.

        Args:
            shelf: where the files are.
            link: whom to ask for room.
            whose: run, item and process.
            votes: what the processes of the job tell each other of this item.
        """
        self._shelf, self._link, self._votes = shelf, link, votes
        self._busy = threading.Lock()
        self.names = [file_of(*whose, generation) for generation in range(GENERATIONS)]
        self._files: list[SnapshotFile | None] = [None] * GENERATIONS
        serials = [self._serial_of(name) for name in self.names]
        self._serial = max(serials)
        self._common = serials.index(self._serial)
        # The step of the other file, where it is not known yet whether all have it.
        self._undecided: int | None = None

    def _serial_of(self, name: str) -> int:
        try:
            return read_snapshot(self._shelf.path_of(name)).serial
        except (SnapshotError, OSError):
            return -1

    def begin_life(self, votes: Votes, restored: str | None) -> None:
        """Begins a new life of the job, when what is on its way has ended.

        Args:
            votes: of that life.
            restored: the path of the file that it begins with, which is not to be overwritten
                until all processes have a newer one; `None`: it began with another tier.
        """
        with self._busy:
            if restored is None:
                # Else some processes would write over what others have kept of the life before. It
                # waits for what they tell, for half a minute at most.
                with contextlib.suppress(KeeperError):
                    self._decide()
            self._votes, self._undecided = votes, None
            # One of them may have been made again since, from parity.
            self._serial = max(self._serial, *map(self._serial_of, self.names))
            for i, name in enumerate(self.names):
                if self._shelf.path_of(name) == restored:
                    self._common = i

    def begin(self) -> bool:
        """Whether a snapshot may be written now. If so, `end` must be called."""
        return self._busy.acquire(blocking=False)

    def open(self, n_bytes: int) -> SnapshotFile:
        """Returns the file to write, with its seal broken.

        Raises:
            KeeperError: there is no room, or another process is behind.
            OSError: there is no memory.
        """
        self._decide()
        i = (self._common + 1) % GENERATIONS
        file, path = self._files[i], self._shelf.path_of(self.names[i])
        # A file that somebody removed or cut is no place for anything any more.
        if file is None or file.n_bytes < n_bytes or not _is_there(file):
            if file is not None:
                file.close()
            self._files[i] = None
            n_bytes = -(-n_bytes // _ROUND_BYTES) * _ROUND_BYTES
            self._link.ask({"do": "room", "file": self.names[i], "n_bytes": n_bytes})
            self._files[i] = file = SnapshotFile(path, n_bytes)
        file.break_seal()
        return file

    def _decide(self) -> None:
        """Finds out which file may be overwritten."""
        step = self._undecided
        if step is None:
            return
        is_common = self._votes.is_common(step, timeout_s=_VOTE_S)
        if is_common is None:
            raise KeeperError(f"another process has not told whether it has step {step}")
        self._undecided = None
        self._common = (self._common + is_common) % GENERATIONS

    def seal(self, file: SnapshotFile, step: int, layout: KeptLayout, facts: bytes) -> None:
        """Makes what was written a whole snapshot."""
        file.seal(self._serial + 1, layout.text, facts, end=layout.end)
        self._serial += 1
        self._undecided = step

    def tell(self, step: int, *, is_sealed: bool) -> None:
        """Tells the other processes what became of a step."""
        self._votes.tell(step, is_sealed=is_sealed)

    def settle(self, work: Callable[[], None]) -> None:
        """Runs what comes after a snapshot, now or where nobody waits for it."""
        self._votes.settle(work)

    def end(self) -> None:
        """Ends what `begin` began."""
        self._busy.release()

    def close(self) -> None:
        """Lets go of the memory. The files stay."""
        for file in self._files:
            if file is not None:
                file.close()
        self._files = [None] * GENERATIONS


def _is_there(file: SnapshotFile) -> bool:
    try:
        status = os.stat(file.path)
        # Behind the end of a file that somebody cut, a write would end this process (SIGBUS).
        return status.st_ino == file.inode and status.st_size >= file.n_bytes
    except OSError:
        return False


class Writing:
    """One snapshot on its way to its slot. Nothing of it raises: training goes on without it."""

    def __init__(
        self,
        slot: Slot,
        layout: KeptLayout,
        facts: dict[str, Any],
        told: Callable[[Writing, BaseException | None], None],
    ):
        """Begins nothing yet.

        Args:
            slot: where to.
            layout: which piece goes where.
            facts: which step of whom it is; `texts` are the leaves that are strings.
            told: called once, at the end, with what went wrong.
        """
        self._slot, self._layout, self._facts, self._told = slot, layout, facts, told
        self._file: SnapshotFile | None = None
        self._digests = np.zeros(len(layout.spots), "<u8")
        self._n_put = 0
        self._is_over = False

    @property
    def step(self) -> int:
        """The step."""
        return self._facts["step"]

    def put(self, piece: Piece, view: np.ndarray) -> None:
        """Copies a piece.

        Args:
            piece: which.
            view: its elements, which may change when this returned.
        """
        if self._is_over:
            return
        try:
            if self._file is None:
                self._file = self._slot.open(self._layout.file_bytes(self._facts["texts"]))
            spot = self._layout.spots[id(piece)]
            memory = view_in(self._file.memory, spot)
            np.copyto(memory.view(view.dtype).reshape(view.shape), view)
            # While it is in the processor's cache.
            self._digests[spot.index] = digest_of_bytes(memory)
            self._n_put += 1
        except Exception as error:  # noqa: BLE001 - It is told of, and training goes on.
            self._end(error)

    def finish(self) -> None:
        """Seals the snapshot, if all of it is there."""
        if self._is_over:
            return
        try:
            if self._n_put != len(self._layout.spots) or self._file is None:
                missing = len(self._layout.spots) - self._n_put
                raise KeeperError(f"{missing} of {len(self._layout.spots)} pieces never came")
            facts = {**self._facts, "digests": self._digests.tobytes().hex()}
            self._slot.seal(self._file, self.step, self._layout, json.dumps(facts).encode())
        except Exception as error:  # noqa: BLE001 - It is told of, and training goes on.
            self._end(error)
            return
        self._end(None)

    def end(self, why: BaseException | None = None) -> None:
        """Ends it. What is not finished never will be: its slot is free for the next.

        Args:
            why: what ended the save that it was a part of.
        """
        self._end(why or KeeperError("the save that it was a part of did not come to an end"))

    def _end(self, error: BaseException | None) -> None:
        if not self._is_over:
            self._is_over, self._file = True, None
            self._slot.settle(functools.partial(self._settle, error))

    def _settle(self, error: BaseException | None) -> None:
        try:
            self._slot.tell(self.step, is_sealed=error is None)
        except Exception as failure:  # noqa: BLE001 - The job is ending.
            error = error or failure
        self._slot.end()
        self._told(self, error)
