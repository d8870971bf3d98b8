"""Settings of JAX that a user may be under, for one thread or for the whole process."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import compute_on, xla_metadata
from jax.sharding import AxisType, Mesh

Context = Callable[[], contextlib.AbstractContextManager[Any]]

# JAX's name of a setting, and what a user may have set.
VALUES: dict[str, tuple[Any, ...]] = {
    "check_tracer_leaks": (True,),
    "debug_infs": (True,),
    "debug_key_reuse": (True,),
    "debug_nans": (True,),
    "default_matmul_precision": ("highest",),
    "default_prng_impl": ("rbg",),
    "disable_jit": (True,),
    "enable_checks": (True,),
    "enable_custom_prng": (True,),
    "enable_x64": (True, False),
    "legacy_prng_key": ("error",),
    "no_execution": (True,),
    "no_tracing": (True,),
    "numpy_dtype_promotion": ("strict",),
    "numpy_rank_promotion": ("raise",),
    "remove_size_one_mesh_axis_from_type": (True,),
    "softmax_custom_jvp": (False,),
    "threefry_partitionable": (False,),
    "transfer_guard": ("disallow", "disallow_explicit"),
}
# Those that are also set for the whole process, and so for threads of ours.
_GLOBAL = {
    "debug_infs": True,
    "debug_nans": True,
    "disable_jit": True,
    "enable_x64": True,
    "no_execution": True,
    "transfer_guard": "disallow_explicit",
}
_USER = jax.make_user_context(None)


@contextlib.contextmanager
def _globally(name: str, value: Any) -> Iterator[None]:
    directions = ("host_to_device", "device_to_device", "device_to_host")
    names = [f"jax_{name}"]
    if name == "transfer_guard":
        names = [f"jax_transfer_guard_{direction}" for direction in directions]
    before = {each: getattr(jax.config, each) for each in names}
    try:
        for each in names:
            jax.config.update(each, value)
        yield
    finally:
        for each, previous in before.items():
            # JAX takes no `None` back for a guard.
            jax.config.update(each, "allow" if "guard" in each else previous)


@contextlib.contextmanager
def _with_mesh(mesh: Mesh) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        mesh.__enter__()
    try:
        yield
    finally:
        mesh.__exit__(None, None, None)


def _mesh(*axes: str, **keywords: Any) -> Mesh:
    shape = (4, 2) if len(axes) == 2 else (1,)
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return Mesh(devices, axes, **keywords)


def _explicit(*axes: str) -> Mesh:
    return _mesh(*axes, axis_types=(AxisType.Explicit,) * len(axes))


def _in_another(name: str, value: Any) -> Context:
    return lambda: getattr(jax, name)(value)


def _for_all(name: str, value: Any) -> Context:
    return lambda: _globally(name, value)


FLAGS: dict[str, Context] = {
    **{f"{n}={v}": _in_another(n, v) for n, values in VALUES.items() for v in values},
    **{f"global {name}": _for_all(name, value) for name, value in _GLOBAL.items()},
    "default_device": lambda: jax.default_device(jax.devices()[3]),
    "default_device=cpu": lambda: jax.default_device("cpu"),
    "global default_device": lambda: _globally("default_device", jax.devices()[3]),
}
PLACES: dict[str, Context] = {
    "set_mesh": lambda: jax.set_mesh(_mesh("a", "b")),
    "set_mesh explicit": lambda: jax.set_mesh(_explicit("a", "b")),
    "set_mesh of one": lambda: jax.set_mesh(_explicit("other")),
    "with mesh": lambda: _with_mesh(_mesh("a", "b")),
    "abstract mesh": lambda: jax.sharding.use_abstract_mesh(_explicit("a", "b").abstract_mesh),
}
OTHERS: dict[str, Context] = {
    "user context": lambda: _USER("mine"),
    "xla metadata": lambda: xla_metadata.set_xla_metadata(mine="yes"),
    "compile time": jax.ensure_compile_time_eval,
    "named scope": lambda: jax.named_scope("mine"),
}
if hasattr(jax.sharding, "no_collectives"):
    OTHERS["no collectives"] = lambda: jax.sharding.no_collectives({"a", "b"})
if hasattr(compute_on, "compute_on2"):  # Else it is no context.
    OTHERS["compute on host"] = lambda: compute_on.compute_on("device_host")
ALL: dict[str, Context] = {"none": contextlib.nullcontext, **FLAGS, **PLACES, **OTHERS}
