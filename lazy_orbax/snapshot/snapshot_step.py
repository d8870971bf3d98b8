"""A training step that can return a copy of its input state, made by the step itself."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from lazy_orbax._jax_context import looks_for_nans, neutral
from lazy_orbax.errors import OptionError
from lazy_orbax.plan.shards import is_key
from lazy_orbax.snapshot.host_copies import has_pinned_host, in_pinned_host
from lazy_orbax.snapshot.step_copies import Given, remember


@dataclasses.dataclass(frozen=True)
class _Variant:
    """The step that copies, for one structure of the state.

    Attributes:
        run: takes what the step takes. Returns what it returns, and copies of the leaves that are
            copied by the step.
        by_step: which leaves those are.
        ahead: which arrays are copied by a program of their own, before the step.
        given: for every leaf that is copied to pinned host memory, what the copy is of.
    """

    run: Any
    by_step: tuple[int, ...]
    ahead: tuple[int, ...]
    given: dict[int, Given]


class SnapshotStep:
    """Runs a training step. On request the step also returns a copy of the state that it was given.

    One program donates the state and copies it to pinned host memory. The compiler may therefore
    let the copy overlap forward and backward. `save()` writes the copy as it is::

        step = lazy_orbax.SnapshotStep(train_step)
        for i, batch in enumerate(batches):
            if manager.should_save(i):
                state, snapshot = step.with_snapshot(state, batch)
                manager.save(i, args=ocp.args.StandardSave(snapshot))
                del snapshot
            else:
                state = step(state, batch)

    The snapshot holds the state *before* the batch: a run that restores it begins with batch `i`.
    The copy takes no device memory. It takes as many bytes of host memory as the state has on all
    devices of this process, where each replica counts. The memory is free again when you have
    dropped the snapshot and the save has written it.

    The leaves may be `jax.Array`s of any shape, dtype and sharding, typed keys, NumPy arrays and
    numbers. The copy has the same structure, shapes and dtypes.
    """

    def __init__(
        self,
        train_step: Callable[..., Any],
        *,
        static_argnums: int | Sequence[int] = (),
        static_argnames: str | Sequence[str] = (),
    ):
        """Wraps a step; nothing is compiled yet.

        Args:
            train_step: takes the state and anything else, returns anything. A plain function is
                jitted and donates its first argument. A jitted one is used as it is.
            static_argnums: as in `jax.jit`. Say it again for a jitted function that has it.
            static_argnames: as in `jax.jit`. Say it again for a jitted function that has it.

        Raises:
            OptionError: `train_step` cannot be called.
        """
        if not callable(train_step):
            raise OptionError(f"train_step={train_step!r} is not callable.")
        self._static = {"static_argnums": static_argnums, "static_argnames": static_argnames}
        self._step: Any = train_step
        if not hasattr(train_step, "lower"):
            self._step = jax.jit(train_step, donate_argnums=0, **self._static)
        self._variants: dict[Any, _Variant] = {}

    def __call__(self, state: Any, *args: Any, **kwargs: Any) -> Any:
        """Runs the step, without a copy."""
        return self._step(state, *args, **kwargs)

    def with_snapshot(self, state: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Runs the step, and returns what it returned and a copy of `state`.

        `state` is donated. The copy has its structure. Its arrays are in pinned host memory; they
        are not copied again, so read them or drop them, but do not donate or delete them before
        their save is committed: it would fail. NumPy arrays are copied, numbers stay what they
        are. Where the backend has no pinned host memory, the copy is made on the device, before
        the step, and is saved as any array is.

        Args:
            state: a pytree; what `train_step` takes first.
            *args: the other arguments of `train_step`.
            **kwargs: its keyword arguments.
        """
        leaves, treedef = jax.tree.flatten(state)
        variant = self._variant(leaves, treedef, (args, kwargs))
        keys = {i: jax.random.key_impl(leaves[i]) for i in variant.given if is_key(leaves[i])}
        copies = {
            i: copy.deepcopy(leaf)
            for i, leaf in enumerate(leaves)
            if not isinstance(leaf, jax.Array)
        }
        # Enqueued before the step that donates, so the step waits for these few.
        with neutral():
            copies |= {i: _copied_ahead(leaves[i], variant.given.get(i)) for i in variant.ahead}
        del leaves
        # The state ends here: it is donated, and only what the step returned is left of it.
        result, by_step = variant.run(state, *args, **kwargs)
        copies |= zip(variant.by_step, by_step, strict=True)
        with neutral():
            for i, given in variant.given.items():
                copies[i] = _placed_as(given, copies[i])
                if i in keys:
                    copies[i] = jax.random.wrap_key_data(copies[i], impl=keys[i])
                # From here on `save()` knows the array, and writes it without a copy.
                remember(copies[i], given)
        return result, treedef.unflatten([copies[i] for i in range(len(copies))])

    def compile(self, state: Any, *args: Any, **kwargs: Any) -> None:
        """Compiles the step with and without the copy, so that no step of the loop has to.

        Args:
            state: a state like those of the loop. It is neither donated nor changed.
            *args: the other arguments of `train_step`, or their `jax.ShapeDtypeStruct`s.
            **kwargs: its keyword arguments.
        """
        leaves, treedef = jax.tree.flatten(state)
        states = [leaves]
        if _runs_anywhere(leaves, args, kwargs):
            # A program that copies to the host returns arrays that are committed to their device.
            # For those the step is compiled once more.
            with neutral():
                states.append([_committed(leaf) for leaf in leaves])
        for each in states:
            tree = treedef.unflatten(each)
            self._step.lower(tree, *args, **kwargs).compile()
            variant = self._variant(each, treedef, (args, kwargs))
            variant.run.lower(tree, *args, **kwargs).compile()

    def _variant(self, leaves: Sequence[Any], treedef: Any, others: Any) -> _Variant:
        """Returns the step that copies leaves like these, beside other arguments like these."""
        anywhere = _runs_anywhere(leaves, others)
        places = tuple(
            (leaf.sharding, leaf.committed) if isinstance(leaf, jax.Array) else None
            for leaf in leaves
        )
        # What a program returns is checked then, and the old state may be what is to be replaced.
        apart = looks_for_nans()
        key = (treedef, anywhere, apart, places)
        if key not in self._variants:
            with neutral():
                self._variants[key] = self._make_variant(leaves, anywhere=anywhere, apart=apart)
        return self._variants[key]

    def _make_variant(self, leaves: Sequence[Any], *, anywhere: bool, apart: bool) -> _Variant:
        targets: dict[int, Any] = {}
        ahead, given = [], {}
        for i, leaf in enumerate(leaves):
            if not isinstance(leaf, jax.Array):
                continue
            if _has_pinned_twin(leaf.sharding):
                given[i] = Given(_data(leaf).sharding)
            if apart or i not in given:
                ahead.append(i)
            elif anywhere:
                targets[i] = jax.memory.Space.Host
            elif leaf.committed:
                targets[i] = in_pinned_host(given[i].sharding)
            else:  # It is not known on which devices the step will put it.
                ahead.append(i)
        step = self._step

        def with_copy(state: Any, *args: Any, **kwargs: Any) -> Any:
            before = jax.tree.leaves(state)
            # Placed by `device_put` alone: with `out_shardings` as well XLA for CPU gives back
            # arrays on the device.
            by_step = [jax.device_put(_data(before[i]), target) for i, target in targets.items()]
            return step(state, *args, **kwargs), by_step

        run = jax.jit(with_copy, donate_argnums=0, **self._static)
        return _Variant(run, tuple(targets), tuple(ahead), given)


def _runs_anywhere(*trees: Any) -> bool:
    """Whether no argument is committed to devices, so that a program of them may run anywhere."""
    leaves = jax.tree.leaves(trees)
    return not any(getattr(leaf, "committed", False) for leaf in leaves)


def _committed(leaf: Any) -> Any:
    return jax.device_put(leaf, leaf.sharding) if isinstance(leaf, jax.Array) else leaf


def _data(array: jax.Array) -> jax.Array:
    return jax.random.key_data(array) if is_key(array) else array


def _has_pinned_twin(sharding: jax.sharding.Sharding) -> bool:
    """Whether arrays placed so are in device memory that has pinned host memory beside it."""
    device = next(iter(sharding.addressable_devices), None)
    if device is None or sharding.memory_kind not in (None, device.default_memory().kind):
        return False
    return has_pinned_host(device)


def _copied_ahead(array: jax.Array, given: Given | None) -> jax.Array:
    """Enqueues a copy to pinned host memory, or in the memory where the array is."""
    if given is None:
        return jax.device_put(array, array.sharding, may_alias=False)
    target = in_pinned_host(given.sharding)
    return jax.device_put(_data(array), target, may_alias=False)


def _placed_as(given: Given, copy_: jax.Array) -> jax.Array:
    """Returns a copy as the original was: a step may have spread what was committed nowhere."""
    target = in_pinned_host(given.sharding)
    if copy_.sharding.is_equivalent_to(target, copy_.ndim):
        return copy_
    return jax.device_put(copy_, target)
