"""What only a GPU shows: donation beside a real device-to-host copy, and memory statistics."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from equipment.trees import assert_same

import lazy_orbax


def _gpus():
    try:
        return jax.devices("gpu")
    except RuntimeError:
        return []


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not _gpus(), reason=f"no GPU: jax runs on {jax.default_backend()} (set JAX_PLATFORMS)"
    ),
]
MODES = ("stage", "direct", "auto")


def make_state():
    """About 0.4 GB on the first GPU."""
    device = _gpus()[0]
    keys = jax.random.split(jax.random.key(0), 3)
    return jax.device_put(
        {
            "large": jax.random.normal(keys[0], (8192, 8192)),
            "half": jax.random.normal(keys[1], (4096, 8192), jnp.bfloat16),
            "small": [jnp.full((64, n), n, jnp.float32) for n in range(1, 33)],
            "step": jnp.int32(0),
            "key": keys[2],
        },
        device,
    )


def _step(state):
    key = state.pop("key")
    state = jax.tree.map(lambda x: x + jnp.ones((), x.dtype), state)
    return {**state, "key": jax.random.fold_in(key, 1)}


def _pointers(state):
    leaves = [leaf for name, leaf in state.items() if name in ("large", "half")]
    return [leaf.unsafe_buffer_pointer() for leaf in leaves]


@pytest.mark.parametrize("mode", MODES)
def test_donation(tmp_path, mode):
    donating = jax.jit(lambda state: _step(dict(state)), donate_argnums=0)
    copy = jax.jit(lambda state: jax.tree.map(jnp.copy, state))
    state = donating(make_state())
    handler = lazy_orbax.standard_handler(options=lazy_orbax.LazyOptions(mode=mode))
    options = ocp.CheckpointManagerOptions(max_to_keep=1)
    with ocp.CheckpointManager(tmp_path, item_handlers=handler, options=options) as manager:
        for step in range(10):
            own = copy(state)
            before = _pointers(state)
            manager.save(step, args=ocp.args.StandardSave(state))
            state = donating(state)
            assert _pointers(state) == before
            state = donating(state)
            manager.wait_until_finished()
            with ocp.StandardCheckpointer() as stock:
                assert_same(stock.restore(tmp_path / str(step) / "default"), own)


@pytest.mark.parametrize("mode", MODES)
def test_the_timeline_makes_sense(tmp_path, mode):
    lines = []
    state = make_state()
    n_bytes = sum(
        np.asarray(jax.random.key_data(x)).nbytes if x.dtype.name.startswith("key") else x.nbytes
        for x in jax.tree.leaves(state)
    )
    options = lazy_orbax.LazyOptions(mode=mode, on_timeline=lines.append)
    handler = lazy_orbax.standard_handler(options=options)
    with ocp.CheckpointManager(tmp_path, item_handlers=handler) as manager:
        for step in range(2):
            manager.save(step, args=ocp.args.StandardSave(state))
            manager.wait_until_finished()
        lazy_orbax.wait_until_staged()
    for line in lines:
        assert line.error is None
        assert line.bytes_written == n_bytes
        assert 0 < line.enqueued_s < line.durable_s < line.committed_s
        assert 0 < line.staged_s <= line.durable_s
        # It fits into the memory of any GPU, so `auto` stages it.
        assert line.mode == ("direct" if mode == "direct" else "stage")
    assert len(lines) == 2
    # The second save compiles nothing: it returns long before the bytes are written.
    assert lines[1].enqueued_s < 0.5 * lines[1].durable_s


def test_a_step_that_copies_its_input(tmp_path):
    step = lazy_orbax.SnapshotStep(lambda state: _step(dict(state)))
    copy = jax.jit(lambda state: jax.tree.map(jnp.copy, state))
    state = step(make_state())
    step.compile(state)
    lines = []
    options = lazy_orbax.LazyOptions(on_timeline=lines.append)
    handler = lazy_orbax.standard_handler(options=options)
    with ocp.CheckpointManager(tmp_path, item_handlers=handler) as manager:
        for i in range(3):
            own = copy(state)
            before = _pointers(state)
            state, snapshot = step.with_snapshot(state)
            assert _pointers(state) == before
            manager.save(i, args=ocp.args.StandardSave(snapshot))
            del snapshot
            state = step(step(state))
            assert _pointers(state) == before
            manager.wait_until_finished()
            with ocp.StandardCheckpointer() as stock:
                assert_same(stock.restore(tmp_path / str(i) / "default"), own)
    assert [line.mode for line in lines] == ["in_step"] * 3
