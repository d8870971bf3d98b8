"""`Keeper`: what a training loop has of the keeper that looks after its snapshots in memory."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

import jax

from lazy_orbax import _paths
from lazy_orbax._machine import memory_bytes
from lazy_orbax._orbax import describe, symbols
from lazy_orbax._orbax.records import Destination, Settings
from lazy_orbax.errors import KeeperError, LazyOrbaxError, OptionError
from lazy_orbax.options import LazyOptions
from lazy_orbax.plan.slabs import Plan
from lazy_orbax.pods.node_local import node_local_options
from lazy_orbax.save.job import Job
from lazy_orbax.save.pipeline import Save
from lazy_orbax.save.plan_cache import Prepared, prepare
from lazy_orbax.save.unchanged_state import Fingerprints
from lazy_orbax.storage import threads
from lazy_orbax.storage.pace import Pace
from lazy_orbax.tiers.claim import Claim
from lazy_orbax.tiers.keeper_link import KeeperLink
from lazy_orbax.tiers.keeper_process import KeeperSettings
from lazy_orbax.tiers.kept_layout import has_all_here, layout_of, with_host_leaves
from lazy_orbax.tiers.parity.guard import Guard, Parity, ProtectionReport
from lazy_orbax.tiers.shelf import Shelf
from lazy_orbax.tiers.slot import Writing
from lazy_orbax.tiers.slots import KeeperReport, Slots
from lazy_orbax.tiers.tier import Tier, checked_tiers, told_of
from lazy_orbax.timeline import Recorder

ITEM = "default"
"""The name that Orbax's managers give to the only item of a step."""
_LOG = logging.getLogger("lazy_orbax")
_MEMORY_FRACTION = 0.5


class Keeper:
    """Keeps snapshots of a training state in memory that outlives this process.

    A process of its own, the keeper, looks after that memory: files in `/dev/shm` that only this
    user can open. It is started when there is none. Each process of a job has a `Keeper`; those of
    one machine share the process. After the trainer has died, `restore_newest` takes up the newest
    whole snapshot, without a look at storage.

    Every process of a job makes its `Keeper` at the same point of the program: they agree there on
    what tells this life of the job from others.

    A snapshot that fails never stops training: the log has a warning, and `report` counts it.

    Attributes:
        run: the name of the run.
        tiers: where the keeper brings them.
        slots: the places of its snapshots.

    The idea is that of REFT (arXiv:2310.12670) and of Gemini (SOSP 2023).
    """

    def __init__(  # noqa: PLR0913 - Keywords, of which most calls give none.
        self,
        run: Any,
        *,
        directory: str | None = None,
        limit_bytes: int | None = None,
        linger_s: float = 1800.0,
        complete_after_s: float | None = None,
        tiers: Sequence[Tier] = (),
        options: LazyOptions | None = None,
        parity: Parity | None = None,
    ):
        """Finds the keeper, or starts one, which takes a second.

        Args:
            run: the run's directory, or its `gs://` address: the name under which snapshots are
                found again.
            directory: where the snapshots are: an absolute path in a file system in memory. `None`
                is one of this user's in `/dev/shm`.
            limit_bytes: most bytes of snapshots, of all that the keeper serves. `None` is half of
                this machine's (or container's) memory. The first process that comes sets it.
            linger_s: how many seconds the keeper keeps snapshots after the last process has died.
            complete_after_s: when the last process of the run has been dead for so many seconds,
                the newest whole snapshot is written to storage, as a step of the run. `None`: it
                never is. Nobody may have gone on with the run on another machine by then.
            tiers: directories to which the keeper brings the newest whole snapshot from time to
                time, each as an ordinary step. All machines of the job must see them.
            options: its `mode`, `host_bytes` and `slab_bytes` count.
            parity: how groups of processes keep parity of each other's snapshots, so that a machine
                may be lost with its memory. `None`: they do not.

        Raises:
            OptionError: a value is out of range.
            KeeperError: there is no keeper, and none can be started; or another process that is
                alive writes the snapshots of this process of the run.
        """
        _check(run, limit_bytes, linger_s, complete_after_s)
        self.run = _paths.absolute(os.fspath(run))
        self.tiers, machine = checked_tiers(tiers, self.run, directory)
        shelf = Shelf(directory)
        # What goes to memory alone is not proven by programs: it is compared with its digests.
        self._options = dataclasses.replace(options or LazyOptions(), verify_snapshot=0)
        limit = int(memory_bytes() * _MEMORY_FRACTION) if limit_bytes is None else limit_bytes
        settings = KeeperSettings(directory=shelf.path, limit_bytes=limit, linger_s=float(linger_s))
        whose = {"run": self.run, "process": jax.process_index(), "pid": os.getpid()}
        whose |= {"complete_after_s": complete_after_s, "tiers": told_of(self.tiers, machine)}
        self._link = KeeperLink(settings, whose)
        self._saving: list[concurrent.futures.Future[None]] = []
        self._claim = Claim(shelf, self.run, jax.process_index())
        with contextlib.ExitStack() as undo:
            undo.callback(self._claim.release)
            self._link.ask({"do": "status"})
            guard = None if parity is None else Guard(parity, shelf, self.run)
            self.slots = Slots(shelf, self._link, self.run, guard)
            undo.callback(self.slots.close)  # It ends the node, too.
            self.slots.begin_life()
            if guard is not None:
                guard.join()
            undo.pop_all()

    @property
    def report(self) -> KeeperReport:
        """What became of the snapshots so far."""
        return self.slots.report

    @property
    def protection(self) -> ProtectionReport:
        """What became of the parity of the snapshots so far."""
        return self.slots.guard.report if self.slots.guard else ProtectionReport()

    def save(self, step: int, state: Any, *, item: str = ITEM) -> bool:
        """Takes a snapshot. The caller may donate, delete or change `state` when this returned.

        All processes give the same steps. Where a step is not above the one before, training has
        gone on from an older state: what was kept of the newer one is not mixed with it.

        Args:
            step: the step that `state` is of.
            state: the tree, as a handler would save it.
            item: the name of the item in a checkpoint.

        Returns:
            Whether a snapshot of that step is on its way, or was already. `False` if the one
            before is still being copied, or it failed; see `report`.
        """
        try:
            if self._claim.is_a_childs:
                raise KeeperError("a forked child saves nothing: its parent does")
            if not self.slots.offer(step, item):
                return True
            prepared, leaves = self._prepared(state)
            layout = layout_of(prepared.plan, state)
            writing = self.slots.begin(step, item, layout, prepared.texts(leaves))
        except (LazyOrbaxError, OSError, TypeError) as error:
            self.slots.failed(step, error)
            return False
        if writing is None:
            return False
        save = Save(self._job(prepared, step, item))
        save.take_along(writing)
        try:
            save.snapshot(prepared.arrays(leaves))
        except BaseException as error:
            save.fail(error)
            save.drop()
            if isinstance(error, Exception):
                return False
            raise
        saving = threads.run(save.keep, "lazy_orbax-keep")
        self._saving = [*(one for one in self._saving if not one.done()), saving]
        return True

    def take_along(
        self, path: str, plan: Plan, state: Any, texts: dict[str, str]
    ) -> Writing | None:
        """Begins a snapshot of what is being saved to storage. Handlers call it.

        Args:
            path: the item's directory.
            plan: by which it is saved.
            state: the tree.
            texts: leaves that are strings, by name.

        Returns:
            What takes the pieces; `None` if there is nothing to do, or the step has to be kept by
            a `save` of its own.
        """
        step, item = _paths.step_of_item(path), _paths.final(path).rpartition("/")[2]
        # A manager of another directory saves another run.
        if step is None or _paths.final(path).rsplit("/", 2)[0] != self.run:
            return None
        try:
            if not has_all_here(plan, jax.process_index()):
                return None
            return self.slots.begin_along(step, item, layout_of(plan, state), texts)
        except (LazyOrbaxError, OSError, TypeError) as error:
            self.slots.failed(step, error)
            return None

    def _prepared(self, state: Any) -> tuple[Prepared, list[Any]]:
        slab_bytes = min(self._options.slab_bytes, self._options.host_limit_bytes // 4)
        prepared, leaves = prepare(
            _settings(),
            state,
            None,
            destination=Destination("/kept", None),
            slab_bytes=slab_bytes,
            abstract=False,
        )
        if "tiers-plan" not in prepared.plan.kept:
            plan = with_host_leaves(prepared.plan, jax.process_index(), slab_bytes=slab_bytes)
            prepared.plan.kept["tiers-plan"] = None if plan is prepared.plan else plan
        own = prepared.plan.kept["tiers-plan"]
        return dataclasses.replace(prepared, plan=own or prepared.plan), leaves

    def _job(self, prepared: Prepared, step: int, item: str) -> Job:
        recorder = Recorder(f"{self.run}/{step}/{item}", None)
        recorder.mark("planned")
        return Job(
            prepared=prepared,
            texts={},
            options=self._options,
            limit_bytes=self._options.host_limit_bytes,
            pace=Pace(None),
            fingerprints=Fingerprints(),
            recorder=recorder,
            evidence=None,
        )

    def wait(self, timeout_s: float | None = None) -> None:
        """Waits until no snapshot of `save`, nor its parity, is on its way any more.

        Args:
            timeout_s: most seconds to wait; `None` waits without a limit.
        """
        concurrent.futures.wait(self._saving, timeout_s)
        if self.slots.guard is not None:
            self.slots.guard.wait(timeout_s)

    def close(self, *, discard: bool = True) -> None:
        """Waits for what is on its way, and leaves the keeper. A second call does nothing.

        Args:
            discard: whether the snapshots of this process are removed. The keeper ends when
                nobody is left, and nothing.
        """
        if self._claim.is_a_childs:
            return
        self.wait()
        files = self.slots.close()
        try:
            if discard:
                self._link.ask({"do": "leave", "discard": files}, starts=False)
        except KeeperError as error:
            _LOG.warning("The keeper cannot be told that this process leaves: %s", error)
            for file in files:
                self.slots.shelf.remove(file)
            with contextlib.suppress(KeeperError, OSError):
                self.slots.shelf.tidy()
        finally:
            self._link.close()
            self._claim.release()

    def __enter__(self) -> Keeper:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        # Where training failed, the next try begins with what is kept.
        self.close(discard=kind is None)


@functools.cache
def _settings() -> Settings:
    """Returns how each process would save all that it has, once, as `node_local_options` does."""
    keywords = {**node_local_options().handler, "use_compression": False}
    return describe.settings_of(symbols.HANDLER_BASE(**keywords), keywords)


def _check(run: Any, limit_bytes: Any, linger_s: Any, after_s: Any) -> None:
    if not isinstance(run, str | os.PathLike) or not str(run):
        raise OptionError(f"run={run!r} is no path; give the directory of the run.")
    if limit_bytes is not None and (not isinstance(limit_bytes, int) or limit_bytes < 2**20):
        raise OptionError(f"limit_bytes={limit_bytes!r} must be at least {2**20} (1 MiB).")
    if not isinstance(linger_s, int | float) or not 0 < linger_s < float("inf"):
        raise OptionError(f"linger_s={linger_s!r} must be a finite number of seconds, above 0.")
    if after_s is not None and (not isinstance(after_s, int | float) or not 0 <= after_s < 1e9):
        raise OptionError(f"complete_after_s={after_s!r} must be a number of seconds, or None.")
    if sys.platform != "linux":
        raise KeeperError(f"a keeper needs Linux, and this is {sys.platform}; train without")
    if symbols.MISSING:
        raise KeeperError(f"this version of Orbax is not known: {', '.join(symbols.MISSING)}")
