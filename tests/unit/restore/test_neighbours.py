"""`FromNeighbours`: a lost layer is made of the layers beside it, and says so."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from equipment.trees import assert_same, on_mesh
from jax.sharding import Mesh

import lazy_orbax
from lazy_orbax import FromNeighbours
from lazy_orbax.errors import CorruptCheckpointError, OptionError

RNG = np.random.default_rng(7)
pytestmark = pytest.mark.usefixtures("restores_that_fail")


@pytest.fixture
def mesh():
    return Mesh(np.array(jax.devices()[:4]), ("a",))


def state_of(mesh):
    """Three layers, a stack of four, what an optimizer keeps of them, and an end of the model."""

    def floats(*shape):
        return on_mesh(RNG.normal(size=shape).astype(np.float32), mesh, "a")

    params = {
        "blocks": {str(i): {"w": floats(4, 6)} for i in range(3)},
        "scan": floats(4, 8),
        "half": {str(i): floats(4).astype(ml_dtypes.bfloat16) for i in range(3)},
        "embed": floats(4, 3),
        "n": {"0": jnp.arange(4), "1": jnp.arange(4)},
    }
    nu = jax.tree.map(lambda leaf: leaf * 2, params)
    return {"params": params, "opt_state": {"0": {"mu": params, "nu": nu}}}


def manager_of(directory):
    handler = lazy_orbax.pytree_handler(use_ocdbt=False)
    return ocp.CheckpointManager(directory, item_handlers=handler)


def save(directory, state, custom_metadata=None):
    with manager_of(directory) as manager:
        args = ocp.args.PyTreeSave(state, custom_metadata=custom_metadata)
        manager.save(1, args=args)


def lose(directory, leaf, chunk=0):
    """Flips a bit of one chunk of a leaf; chunks of stacks are layers."""
    files = sorted(p for p in (directory / "1" / "default" / leaf).iterdir() if p.name[0] != ".")
    content = bytearray(files[chunk].read_bytes())
    content[-1] ^= 1
    files[chunk].write_bytes(content)


def replaced(directory, state, replacements):
    with manager_of(directory) as manager:
        return lazy_orbax.restore_replacing(
            manager,
            1,
            args=ocp.args.PyTreeRestore(state, ocp.checkpoint_utils.construct_restore_args(state)),
            replacements=replacements,
        )


W = "params.blocks.{}.w"
BETWEEN = FromNeighbours(W.format(0), W.format(2))
NORMS = {"gradient_norms": {"params.blocks.0": 3.0, "params.blocks": 9.0, W.format(2): 1.0}}


@pytest.mark.parametrize(
    ("one", "metadata", "weights"),
    [
        (BETWEEN, None, (1, 1)),
        (BETWEEN, {"mine": 1}, (1, 1)),
        (BETWEEN, NORMS, (3 + 1e-4, 1 + 1e-4)),
        (FromNeighbours(W.format(0), W.format(2), weights=(1, 4)), NORMS, (1, 4)),
        (FromNeighbours(after=W.format(2)), NORMS, (0, 1)),
    ],
)
def test_a_lost_leaf_is_the_weighted_mean_of_its_neighbours(tmp_path, mesh, one, metadata, weights):
    state = state_of(mesh)
    save(tmp_path, state, metadata)
    lose(tmp_path, W.format(1))
    lose(tmp_path, "opt_state.0.nu.blocks.1.w")
    found = replaced(tmp_path, state, {W.format(1): one})
    before, after = (np.asarray(state["params"]["blocks"][i]["w"]) for i in "02")
    mean = (weights[0] * before + weights[1] * after) / sum(weights)
    made = found.value["params"]["blocks"]["1"]["w"]
    np.testing.assert_allclose(np.asarray(made), mean, rtol=1e-6, atol=1e-7)
    assert made.sharding == state["params"]["blocks"]["1"]["w"].sharding
    # Its moments begin anew, the one that was lost too; all else is what was saved.
    wanted = jax.tree.map(lambda leaf: leaf, state)
    wanted["params"]["blocks"]["1"]["w"] = made
    for moment in ("mu", "nu"):
        wanted["opt_state"]["0"][moment]["blocks"]["1"]["w"] = jnp.zeros((4, 6))
    assert_same(found.value, wanted)
    assert [record.leaf for record in found.replaced] == [
        W.format(1),
        "opt_state.0.mu.blocks.1.w",
        "opt_state.0.nu.blocks.1.w",
    ]
    assert found.replaced[1].by == "zeros"
    assert "begins anew" in found.replaced[1].why
    assert "digest" in found.replaced[2].why
    assert found.learning_rate_factor == 1.1


@pytest.mark.parametrize("on_devices", [True, False])
def test_the_mean_of_complex_leaves_has_imaginary_parts(tmp_path, mesh, on_devices):
    leaves = {str(i): np.full((4, 2), i + 2j * i, np.complex64) for i in range(3)}
    state = {i: on_mesh(leaf, mesh, "a") if on_devices else leaf for i, leaf in leaves.items()}
    save(tmp_path, state)
    lose(tmp_path, "1")
    found = replaced(tmp_path, state, {"1": FromNeighbours("0", "2")})
    assert_same(found.value, state)


@pytest.mark.parametrize(("layer", "near"), [(2, (1, 3)), (0, (1, 1)), (3, (2, 2))])
def test_a_lost_layer_of_a_stack_is_made_of_those_beside_it(tmp_path, mesh, layer, near):
    state = state_of(mesh)
    save(tmp_path, state, {"gradient_norms": {"params": [1, 2, 3, 4]}})
    lose(tmp_path, "params.scan", layer)
    lose(tmp_path, "opt_state.0.mu.scan", layer)
    found = replaced(tmp_path, state, {"params.scan": FromNeighbours(layer=layer)})
    stack = np.array(state["params"]["scan"])
    norms = np.array([1, 2, 3, 4]) + 1e-4
    a, b = near
    stack[layer] = (norms[a] * stack[a] + norms[b] * stack[b]) / (norms[a] + norms[b])
    np.testing.assert_allclose(np.asarray(found.value["params"]["scan"]), stack, 1e-5, 1e-6)
    others = np.arange(4) != layer
    for moment in ("mu", "nu"):
        saved = np.asarray(state["opt_state"]["0"][moment]["scan"])
        made = np.asarray(found.value["opt_state"]["0"][moment]["scan"])
        assert_same(made[others], saved[others])
        assert not made[layer].any()
    assert f"layer {a}" in found.replaced[0].by


def test_of_a_stack_nothing_else_may_be_lost(tmp_path, mesh):
    state = state_of(mesh)
    save(tmp_path, state)
    for layer in (1, 2):
        lose(tmp_path, "params.scan", layer)
    with pytest.raises(CorruptCheckpointError, match=r"params\.scan"):
        replaced(tmp_path, state, {"params.scan": FromNeighbours(layer=1)})


def test_what_is_whole_is_not_rebuilt_and_a_moment_alone_is_no_reason(tmp_path, mesh):
    state = state_of(mesh)
    save(tmp_path, state)
    found = replaced(tmp_path, state, {W.format(1): BETWEEN})
    assert_same(found.value, state)
    assert (found.replaced, found.not_needed) == ((), (W.format(1),))
    assert found.learning_rate_factor == 1
    lose(tmp_path, "opt_state.0.nu.blocks.1.w")
    with pytest.raises(CorruptCheckpointError, match="nu"):
        replaced(tmp_path, state, {W.format(1): BETWEEN})


REFUSED = [
    ("params.embed", FromNeighbours("params.scan"), "an embedding or a head"),
    ("params.n.0", FromNeighbours("params.n.1"), "wanted a floating-point dtype"),
    (W.format(1), FromNeighbours("params.nobody"), "no leaf 'params.nobody'"),
    (W.format(1), FromNeighbours(W.format(1)), "to be replaced itself"),
    (W.format(1), FromNeighbours("params.scan"), r"float32\[4, 8\], wanted float32\[4, 6\]"),
    ("params.half.1", FromNeighbours(layer=4), "no such layer"),
    ("params.half.1", FromNeighbours(layer=0, axis=1), "no such layer"),
]


@pytest.mark.parametrize(("leaf", "one", "message"), REFUSED)
def test_what_has_no_neighbours_is_refused(tmp_path, mesh, leaf, one, message):
    state = state_of(mesh)
    save(tmp_path, state)
    with pytest.raises(OptionError, match=message):
        replaced(tmp_path, state, {leaf: one})


def test_norms_that_are_none_are_named(tmp_path, mesh):
    state = state_of(mesh)
    save(tmp_path, state, {"gradient_norms": {"params": -1}})
    lose(tmp_path, W.format(1))
    with pytest.raises(OptionError, match="gradient_norms of params: found -1"):
        replaced(tmp_path, state, {W.format(1): BETWEEN})


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"before": 3},
        {"before": "a", "layer": 1},
        {"layer": -1},
        {"layer": True},
        {"layer": 1, "axis": -1},
        {"before": "a", "weights": (0, 0)},
        {"before": "a", "weights": (1, float("nan"))},
        {"before": "a", "weights": (1,)},
    ],
)
def test_what_names_no_neighbour_is_refused(fields):
    with pytest.raises(OptionError):
        FromNeighbours(**fields)


def test_a_moment_that_begins_as_something_else_needs_a_replacement(tmp_path, mesh):
    state = state_of(mesh)
    state["opt_state"]["0"]["params0"] = state["opt_state"]["0"].pop("mu")
    save(tmp_path, state)
    lose(tmp_path, W.format(1))
    with pytest.raises(OptionError, match="does not begin as zeros"):
        replaced(tmp_path, state, {W.format(1): BETWEEN})
    given = jnp.ones((4, 6))
    name = "opt_state.0.params0.blocks.1.w"
    found = replaced(tmp_path, state, {W.format(1): BETWEEN, name: given})
    made = found.value["opt_state"]["0"]
    assert not made["nu"]["blocks"]["1"]["w"].any()
    # It was not lost: what was saved stays.
    assert_same(made["params0"], state["opt_state"]["0"]["params0"])
