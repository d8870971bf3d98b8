"""What of JAX's settings our own programs run under: always the same, whatever the caller's are.

JAX has settings for the whole process and for one thread: 64-bit types, the mesh, transfer guards,
checks for NaNs. Programs that only copy must not depend on them. A check would refuse a state that
is to be saved as it is, an int64 leaf would be read as int32, and a program that was compiled under
one setting would be compiled again under another.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ParamSpec, TypeVar

import jax

_P = ParamSpec("_P")
_R = TypeVar("_R")

# What checks, or refuses, what a program does.
_CHECKS = {
    "check_tracer_leaks": False,
    "debug_key_reuse": False,
    "disable_jit": False,
    "enable_checks": False,
    "no_execution": False,
    "no_tracing": False,
    "numpy_dtype_promotion": "standard",
    "numpy_rank_promotion": "allow",
    "transfer_guard_device_to_device": "allow",
    "transfer_guard_device_to_host": "allow",
    "transfer_guard_host_to_device": "allow",
}
# What changes the result of some programs, but of no copy, once 64-bit types are allowed.
_RESULTS = {
    "default_device": None,
    "default_matmul_precision": None,
    "default_prng_impl": "threefry2x32",
    "enable_x64": True,
    "threefry_partitionable": True,
}
_NEUTRAL = {**_CHECKS, **_RESULTS}
# Only for threads of our own: in a thread where one of these ended, JAX looks for no NaNs any more,
# though it is told to for the whole process.
_NO_LOOKING = {"debug_infs": False, "debug_nans": False}


def setting(name: str) -> Any:
    """Returns what one of JAX's settings is in this thread."""
    return getattr(jax.config, f"jax_{name}")


def looks_for_nans() -> bool:
    """Whether JAX looks, in this thread, at what programs return."""
    return any(map(setting, _NO_LOOKING))


@contextlib.contextmanager
def neutral() -> Iterator[None]:
    """Runs what is inside, in this thread, under settings that are the same every time.

    It must call nothing of the user's, which would see them. It may run no program that returns
    floats of the user's, at which JAX may look: see `shielded`.
    """
    with _set(_NEUTRAL, mesh=None):
        yield


def shielded(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Makes a function run under `neutral`, where JAX looks for NaNs in a thread of its own."""

    @functools.wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if not looks_for_nans():
            with neutral():
                return function(*args, **kwargs)

        def run_there() -> _R:
            with _set({**_NEUTRAL, **_NO_LOOKING}, mesh=None):
                return function(*args, **kwargs)

        with concurrent.futures.ThreadPoolExecutor(1, "lazy_orbax-shielded") as threads:
            return threads.submit(run_there).result()

    return run


def of_this_thread() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Returns what lets a thread of ours compute what this one would, without its checks.

    For code that is not ours, which may compute what it saves.
    """
    results = {name: setting(name) for name in _RESULTS}
    mesh = jax.sharding.get_mesh()
    settings = {**_CHECKS, **_NO_LOOKING, **results}
    return functools.partial(_set, settings, None if mesh.empty else mesh)


@contextlib.contextmanager
def _set(settings: Mapping[str, Any], mesh: jax.sharding.Mesh | None) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for name, value in settings.items():
            stack.enter_context(getattr(jax, name)(value))
        with jax.set_mesh(mesh):
            yield
