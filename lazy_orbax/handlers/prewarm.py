"""Before training: plans, compiles and allocates what the first save would."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lazy_orbax._jax_context import neutral, setting
from lazy_orbax._orbax.records import Destination
from lazy_orbax.errors import TreeError
from lazy_orbax.handlers.lazy import LazyCheckpointHandler
from lazy_orbax.handlers.stock_shaped import lazy_part_of
from lazy_orbax.integrity.proof import prover_of
from lazy_orbax.plan.shards import Device
from lazy_orbax.plan.slabs import Plan, Slab
from lazy_orbax.snapshot import device_to_host
from lazy_orbax.snapshot.choose_mode import Room
from lazy_orbax.snapshot.device_to_host import Held
from lazy_orbax.snapshot.host_budget import HOST_BUDGET, Lease
from lazy_orbax.storage.places import place_of


def prewarm(
    handler: Any,
    abstract_state: Any,
    *,
    directory: Any = "/",
    save_args: Any = None,
    ocdbt_target_data_file_size: int | None = None,
) -> None:
    """Does what makes the first save of a tree slower than the next ones.

    It makes the plan, compiles the programs that pack, and touches the host memory that a save
    takes, up to the budget. Unless `LazyOptions.verify_snapshot` is 0, it also compiles the
    programs that verify a save of arrays on accelerators. It returns when all of that is done.

    Call it before the training loop, in every process, with the handler that will save. It takes
    device memory for the larger of one slab (`LazyOptions.slab_bytes` over all local devices) and
    one leaf, and gives it back before it returns. It writes no file.

    Args:
        handler: what `standard_handler()` or `pytree_handler()` returned, or a
            `LazyCheckpointHandler`.
        abstract_state: the tree that will be saved, of `jax.ShapeDtypeStruct`s, arrays, or both.
            What counts are structure, shapes, dtypes, shardings and weak types; no value is read.
            A `jax.ShapeDtypeStruct` without a sharding stands for an array on the default device.
        directory: where it will be saved; all that counts is whether that is local or `gs://`.
        save_args: the tree of `ocp.SaveArgs` that will be given, or `None`.
        ocdbt_target_data_file_size: what the arguments of the save will say of it, in bytes.

    Raises:
        OptionError: `handler` is not one of lazy_orbax, or Orbax cannot write to `directory`.
        TreeError: such a tree cannot be saved, or a leaf has a sharding that is not concrete.
    """
    lazy = lazy_part_of(handler)
    if lazy is None:
        return  # It saves the stock way, which was warned about.
    state = jax.tree.map(_stand_in, abstract_state)
    destination = Destination(place_of(str(directory)).stand_in(), ocdbt_target_data_file_size)
    plan = lazy.plan_for(state, save_args, destination)
    values = jax.tree.leaves(state)
    stand_ins = [values[leaf.position] for leaf in plan.leaves]
    room = Room(lazy.options.mode)
    taken: list[tuple[Held, Lease]] = []
    try:
        for slab in plan.slabs:
            if slab.kind == "host":
                continue
            if HOST_BUDGET.in_flight_bytes + slab.n_bytes > lazy.limit_bytes:
                _give_back(taken)
            taken.append(_rehearse(lazy, plan, slab, room.mode_for(slab), stand_ins))
    finally:
        _give_back(taken)
    if lazy.options.verify_snapshot:
        prover_of(plan).prepare(plan)
    for rehearsed in (_like, _zeros):  # Programs that nothing but a rehearsal runs.
        rehearsed.cache_clear()


def _rehearse(
    lazy: LazyCheckpointHandler, plan: Plan, slab: Slab, mode: str, stand_ins: Sequence[Any]
) -> tuple[Held, Lease]:
    """Takes a slab of zeros to the host, as a save would."""
    kind = device_to_host.reusable(plan, slab) if mode == "stage" else None
    lease = HOST_BUDGET.reserve(
        slab.n_bytes, limit_bytes=lazy.limit_bytes, aborted=lambda: False, kind=kind
    )
    try:
        leaves: list[Any] = [None] * len(plan.leaves)
        for i in slab.leaves:
            leaf = plan.leaves[i]
            assert leaf.sharding is not None
            # A program for weakly typed arrays is another one.
            weak_type = getattr(stand_ins[i], "weak_type", False)
            leaves[i] = _made(leaf.shape, leaf.dtype, leaf.sharding, weak_type)
        held = device_to_host.take(plan, slab, leaves, mode, lease.buffer)
        del leaves
        return device_to_host.to_host(held), lease
    except BaseException:
        lease.release()
        raise


def _give_back(taken: list[tuple[Held, Lease]]) -> None:
    while taken:
        held, lease = taken.pop()
        buffer = held.buffer
        del held
        lease.release(jax.block_until_ready(buffer))


def _stand_in(leaf: Any) -> Any:
    """Returns an array without memory that looks like what `leaf` stands for."""
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    sharding = leaf.sharding
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(_default_device())
    if not isinstance(sharding, jax.sharding.Sharding):
        raise TreeError(f"{leaf} has the sharding {sharding!r}; prewarm wants a concrete one.")
    return _like(leaf.shape, leaf.dtype, sharding, bool(leaf.weak_type))


@functools.lru_cache(maxsize=4096)
def _like(
    shape: tuple[int, ...], dtype: Any, sharding: jax.sharding.Sharding, weak_type: bool
) -> jax.Array:
    array = _made(shape, dtype, sharding, weak_type)
    if not jnp.issubdtype(dtype, jax.dtypes.prng_key):  # Keys are small, and asked for their data.
        array.delete()  # It still tells its shape, dtype and sharding.
    return array


def _default_device() -> Device:
    default = setting("default_device")
    return default if isinstance(default, jax.Device) else jax.local_devices(backend=default)[0]


def _made(
    shape: tuple[int, ...], dtype: Any, sharding: jax.sharding.Sharding, weak_type: bool
) -> jax.Array:
    # JAX makes a weakly typed array of a number alone, as wide as numbers are.
    is_wide = not weak_type or np.asarray(np.zeros((), dtype).item()).dtype == dtype
    with neutral(), jax.enable_x64(is_wide):
        return _zeros(shape, dtype, sharding, weak_type)()


@functools.lru_cache(maxsize=4096)
def _zeros(
    shape: tuple[int, ...], dtype: Any, sharding: jax.sharding.Sharding, weak_type: bool
) -> Any:
    def make() -> jax.Array:
        if weak_type:
            return jnp.broadcast_to(jnp.asarray(np.zeros((), dtype).item()), shape)
        return jnp.zeros(shape, dtype)

    return jax.jit(make, out_shardings=sharding)
