"""The few knobs of lazy_orbax."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from lazy_orbax._machine import memory_bytes
from lazy_orbax.errors import OptionError
from lazy_orbax.timeline import RestoreTimeline, SaveTimeline

Mode = Literal["auto", "stage", "direct"]

_MODES = ("auto", "stage", "direct")
_MIB = 2**20
# Half of it for one snapshot in flight is what an unhurried host can spare beside data loading.
_DEFAULT_HOST_FRACTION = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class LazyOptions:
    """How lazy_orbax takes and writes a snapshot.

    Attributes:
        mode: `"stage"` copies the state on the device before `save()` returns and drains that
            copy in the background; `"direct"` sends it straight to pinned host memory and needs
            no device memory; `"auto"` stages what fits in the device memory that the next step
            leaves free and sends the rest directly. On CPU devices it copies up to 512 MiB in
            `save()` as long as a thread compiles what stages. A leaf of which one device has 2**31
            or more elements is sent directly in every mode.
        host_bytes: most bytes of snapshot held in host memory by all saves of this process at
            once. `None` is half of this machine's (or container's) memory. A state larger than
            this streams through: `save()` then blocks until the rest fits.
        slab_bytes: size of the pieces in which a snapshot is copied and written, in bytes over
            all local devices. A leaf larger than this makes a piece of its own. At most a quarter
            of `host_bytes`, and a second's worth of `write_bytes_per_s`.
        write_bytes_per_s: most bytes a second that one handler writes, on average. `None` is as
            fast as the storage takes them. A limit helps steps that slow down during a save.
        low_priority: run our threads, and those of TensorStore that they start, at a lower
            scheduling priority (Linux only). This helps training steps that use every core.
        verify_restore: compare what was restored with the digests that were saved with it, and
            raise `CorruptCheckpointError` where it differs. Costs about a copy to the host of what
            was restored. Checkpoints without digests are restored as they are. A directory whose
            name is that of a step, and which holds the files of another step, is corrupt as well;
            a copy in another run, or under a name that is no step's, is fine. If you copied one
            step to the name of another on purpose, restore it with `False`.
        verify_snapshot: prove, for every so many saves, that what is written is what the arrays
            held: 1 is every save, 0 none. A fingerprint of the arrays is computed where they are,
            before `save()` returns, by a program that shares nothing with the one that copies; it
            reads them once (their bytes over the bandwidth of the device's memory), and the host
            computes the same of what it writes. A save that differs fails, names the leaf and is
            not committed. Arrays on CPU devices need no program: NumPy reads them, in the caller's
            thread. With 1, the first save waits until the programs are compiled. Otherwise saves
            go on meanwhile: a thread compiles the programs after the second save of a tree began,
            or `prewarm` does, and the first save that finds them is verified.
        skip_unchanged: do not write again what is, by its digest, the same in the committed step
            before: frozen weights, the base under an adapter. The new step gets a hard link to the
            file of such a chunk, so it stays whole when the older step is deleted. Only in a local
            directory; elsewhere a save raises `OptionError`.
            Steps share what did not change: a disk that damages it damages it in all of them.
        storage_timeout_s: most seconds in which the storage may do nothing; the save then fails.
            An object store (`gs://`) acknowledges a write in that time, retries included. A local
            directory grows, or the sync of one file ends: a slow disk may take as long as it
            wants, one that hangs may not.
        keeper: a `lazy_orbax.Keeper`, which takes a snapshot in memory of each step that is saved
            to storage, from the same copy in host memory.
        on_timeline: called once per saved item, in a thread of its own, when it was committed or
            has failed. The save waits up to 5 seconds for it to return, and then ends without it.
            The log has what it raises, `SystemExit` included; the save goes on. It must not save
            or wait for saves: Orbax's `save` and `wait_until_finished` raise `OptionError` in it.
        on_restore: called once per restored item with its `RestoreTimeline`, when it was restored
            or has failed, in the thread that restores. The log has what it raises.
        on_restore_progress: called in that thread, again and again, with the bytes that have come
            and the bytes that will: for a progress bar. What it raises ends the restore.

    Raises:
        OptionError: a value is out of range.
    """

    mode: Mode = "auto"
    host_bytes: int | None = None
    slab_bytes: int = 64 * _MIB
    write_bytes_per_s: int | None = None
    low_priority: bool = False
    skip_unchanged: bool = False
    storage_timeout_s: float = 300.0
    verify_restore: bool = True
    verify_snapshot: int = 100
    keeper: Any = None
    on_timeline: Callable[[SaveTimeline], None] | None = None
    on_restore: Callable[[RestoreTimeline], None] | None = None
    on_restore_progress: Callable[[int, int], None] | None = None

    def __post_init__(self) -> None:
        if self.mode not in _MODES:
            raise OptionError(f"mode={self.mode!r} is not one of {', '.join(map(repr, _MODES))}.")
        for name in ("host_bytes", "slab_bytes", "write_bytes_per_s"):
            value = getattr(self, name)
            if value is None and name != "slab_bytes":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < _MIB:
                raise OptionError(
                    f"{name}={value!r} must be a whole number of bytes, at least {_MIB} (1 MiB)."
                )
        for name in ("low_priority", "skip_unchanged", "verify_restore"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name}={getattr(self, name)!r} is neither True nor False.")
        every = self.verify_snapshot
        if not isinstance(every, int) or every < 0:
            raise OptionError(
                f"verify_snapshot={every!r} must be a whole number of saves: 1 verifies every one, "
                "0 none."
            )
        timeout_s = self.storage_timeout_s
        is_number = isinstance(timeout_s, int | float) and not isinstance(timeout_s, bool)
        if not is_number or not 1 <= timeout_s < float("inf"):
            raise OptionError(
                f"storage_timeout_s={timeout_s!r} must be a finite number of seconds, at least 1."
            )
        if self.keeper is not None and not hasattr(self.keeper, "take_along"):
            raise OptionError(f"keeper={self.keeper!r} is not a lazy_orbax.Keeper.")
        self._check_callables()

    def _check_callables(self) -> None:
        for name in ("on_timeline", "on_restore", "on_restore_progress"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise OptionError(f"{name}={value!r} is not callable.")

    @property
    def host_limit_bytes(self) -> int:
        """The budget in bytes, with the default resolved for this machine."""
        if self.host_bytes is not None:
            return self.host_bytes
        return int(memory_bytes() * _DEFAULT_HOST_FRACTION)
