"""Who saves: stock Orbax, lazy_orbax, nobody."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp

import lazy_orbax

# What lazy_orbax calls with a report of each restore; versions that make none have no such option.
_RESTORE_HOOKS = [
    field.name
    for field in dataclasses.fields(lazy_orbax.LazyOptions)
    if field.name == "on_restore"  # Not what is told of the progress.
]
OnTimeline = Callable[[lazy_orbax.SaveTimeline], None] | None


@dataclasses.dataclass(frozen=True)
class Peer:
    """One way to save.

    Attributes:
        name: as in the records.
        handler: makes a handler, given the bytes of the state and a callback for timelines.
        args: whose arguments it takes: `standard`, `pytree` or `empty`.
        in_step: whether the step before copies the state that is saved: `SnapshotStep`.
    """

    name: str
    handler: Callable[[int, OnTimeline], Any]
    args: str = "standard"
    in_step: bool = False


class EmptyHandler(ocp.AsyncCheckpointHandler):
    """Saves nothing: what `CheckpointManager` costs by itself."""

    async def async_save(self, directory: Any, args: Any) -> None:
        del directory, args

    def save(self, directory: Any, args: Any) -> None:
        del directory, args

    def restore(self, directory: Any, args: Any = None) -> None:
        del directory, args


@ocp.args.register_with_handler(EmptyHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class EmptyArgs(ocp.args.CheckpointArgs):
    """The arguments of `EmptyHandler`."""


def _stock_default(state_bytes: int, on_timeline: OnTimeline) -> Any:
    del state_bytes, on_timeline
    return ocp.StandardCheckpointHandler()


def _stock_best(state_bytes: int, on_timeline: OnTimeline) -> Any:
    del state_bytes, on_timeline
    return ocp.PyTreeCheckpointHandler(
        use_zarr3=True, use_compression=False, enable_pinned_host_transfer=True
    )


def _floor(state_bytes: int, on_timeline: OnTimeline) -> Any:
    del state_bytes, on_timeline
    return EmptyHandler()


def _lazy(
    state_bytes: int,
    on_timeline: OnTimeline,
    *,
    host_fraction: float | None = None,
    options: dict[str, Any] | None = None,
    on_restore: Callable[[Any], None] | None = None,
    **keywords: Any,
) -> Any:
    knobs = dict(options or {})
    if on_restore is not None:
        knobs |= dict.fromkeys(_RESTORE_HOOKS, on_restore)
    if host_fraction is not None:
        knobs["host_bytes"] = quarter_bytes(state_bytes, host_fraction)
    return lazy_orbax.standard_handler(
        options=lazy_orbax.LazyOptions(on_timeline=on_timeline, **knobs), **keywords
    )


def quarter_bytes(state_bytes: int, fraction: float = 0.25) -> int:
    """The budget of `lazy_quarter`. lazy_orbax takes no less than 1 MiB."""
    return max(2**20, int(state_bytes * fraction))


_VARIANTS: dict[str, dict[str, Any]] = {
    "lazy": {},
    "lazy_zarr3": {"use_zarr3": True},
    "lazy_files": {"use_ocdbt": False},
    "lazy_zarr3_files": {"use_zarr3": True, "use_ocdbt": False},
    "lazy_compressed": {"use_compression": True},
    "lazy_stage": {"options": {"mode": "stage"}},
    "lazy_direct": {"options": {"mode": "direct"}},
    "lazy_quarter": {"host_fraction": 0.25},
    "lazy_unverified": {"options": {"verify_restore": False}},
    "lazy_low_priority": {"options": {"low_priority": True}},
    "lazy_slab16": {"options": {"slab_bytes": 16 * 2**20}},
    "lazy_slab256": {"options": {"slab_bytes": 256 * 2**20}},
}

NONE = "none"
"""No checkpoint: the loop that the others are compared with."""

PEERS: dict[str, Peer] = {
    "stock_default": Peer("stock_default", _stock_default),
    "stock_best": Peer("stock_best", _stock_best, args="pytree"),
    "floor": Peer("floor", _floor, args="empty"),
    "in_step": Peer("in_step", _lazy, in_step=True),
    **{name: Peer(name, functools.partial(_lazy, **knobs)) for name, knobs in _VARIANTS.items()},
}
DEFAULT = ("stock_default", "stock_best", "lazy")


def save_args(peer: Peer, state: Any) -> Any:
    if peer.args == "empty":
        return EmptyArgs()
    return (ocp.args.PyTreeSave if peer.args == "pytree" else ocp.args.StandardSave)(state)


def restore_args(peer: Peer, state: Any) -> Any:
    """Asks for what was saved, in the shardings of `state`."""
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    if peer.args == "empty":
        return EmptyArgs()
    if peer.args == "pytree":
        targets = ocp.checkpoint_utils.construct_restore_args(abstract)
        return ocp.args.PyTreeRestore(item=abstract, restore_args=targets)
    return ocp.args.StandardRestore(abstract)


@contextlib.contextmanager
def manager(
    peer: Peer,
    directory: pathlib.Path,
    *,
    state_bytes: int,
    on_timeline: OnTimeline = None,
    max_to_keep: int | None = None,
) -> Iterator[ocp.CheckpointManager]:
    """Opens a `CheckpointManager` of this peer; leaving waits for what it saves."""
    options = ocp.CheckpointManagerOptions(max_to_keep=max_to_keep)
    handler = peer.handler(state_bytes, on_timeline)
    with ocp.CheckpointManager(directory, item_handlers=handler, options=options) as opened:
        yield opened


def rotated(names: tuple[str, ...], repeat: int) -> tuple[str, ...]:
    """The peers in another order for each repeat: nobody is always the one after the slow one."""
    cut = repeat % len(names)
    return names[cut:] + names[:cut]
