"""A training step in two programs, so that copies of the state hide behind the gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from lazy_orbax.errors import OptionError


def split_step(
    grad_fn: Callable[..., tuple[Any, Any]], update_fn: Callable[[Any, Any], Any]
) -> Callable[..., tuple[Any, Any]]:
    """Returns a training step that donates its state only in its second half, the update.

    A program that donates the state waits, on the device, for every copy of it that is under way.
    In one program with the update, forward and backward wait as well. Here they do not: the
    gradients are computed while the state is copied, and only the update waits::

        step = lazy_orbax.split_step(
            lambda state, batch: jax.grad(loss, has_aux=True)(state.params, batch),
            lambda state, grads: state.apply_gradients(grads=grads),
        )
        state, metrics = step(state, batch)
        manager.save(i, args=ocp.args.StandardSave(state))  # copied during the next gradients

    It costs the memory of all gradients at once, which live from one program to the next.

    Args:
        grad_fn: takes the state and the batch, returns gradients and anything else. A plain
            function is jitted. A jitted one is used as it is; it must not donate the state.
        update_fn: takes the state and the gradients, returns the next state. A plain function is
            jitted and donates the state. A jitted one is used as it is.

    Returns:
        A function of the state and the batch, which returns the next state and the second of what
        `grad_fn` returned. Its argument was donated.

    Raises:
        OptionError: one of them cannot be called.
    """
    for name, function in (("grad_fn", grad_fn), ("update_fn", update_fn)):
        if not callable(function):
            raise OptionError(f"{name}={function!r} is not callable.")
    gradients = grad_fn if hasattr(grad_fn, "lower") else jax.jit(grad_fn)
    # Gradients are not donated: the state's buffers take the new state, theirs would take nothing.
    update = update_fn if hasattr(update_fn, "lower") else jax.jit(update_fn, donate_argnums=0)

    def step(state: Any, *batch: Any) -> tuple[Any, Any]:
        grads, aux = gradients(state, *batch)
        return update(state, grads), aux

    return step
