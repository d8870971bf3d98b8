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

    A program that donates the state waits on the device until every copy of the state that was
    enqueued before has ended. If one program does all, forward and backward wait as well. Here
    `grad_fn` computes the gradients while the state is copied, and only `update_fn` waits::

        step = lazy_orbax.split_step(
            lambda state, batch: jax.grad(loss, has_aux=True)(state.params, batch),
            lambda state, grads: state.apply_gradients(grads=grads),
        )
        state, metrics = step(state, batch)
        manager.save(i, args=ocp.args.StandardSave(state))  # copied during the next gradients

    All gradients stay in device memory between the two programs: as many bytes as the parameters
    have, in the dtype of the gradients.

    Args:
        grad_fn: takes the state and the batch, and returns a pair: the gradients, and anything
            else that is a tree of arrays. This function jits a plain function. It uses a jitted one
            as it is, which must not donate the state.
        update_fn: takes the state and the gradients, and returns the next state, whose arrays
            should have the shapes, dtypes and shardings of the state: only then does the next
            state take over the memory of the old one. This function jits a plain function and lets
            it donate the state. It uses a jitted one as it is.

    Returns:
        A function that takes the state and any arguments of the batch. It returns the next state,
        and the second value that `grad_fn` returned. The caller cannot use the old state any more.

    Raises:
        OptionError: `grad_fn` or `update_fn` cannot be called.
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
