"""Which leaves are moments, of which parameter, and where they go when it goes."""

import functools

import numpy as np
import pytest
from equipment.numpy_reader import assert_makes, specs

from lazy_orbax.errors import TransformError
from lazy_orbax.plan.transforms.moments import MOMENTS, find_moments
from lazy_orbax.plan.transforms.rules import (
    cast,
    drop,
    init,
    pad_to,
    rename,
    reshape,
    scale,
    select,
    split,
    stack,
    transpose,
    unstack,
)
from lazy_orbax.plan.transforms.transform_map import TransformMap

A = np.arange(24, dtype=np.float32).reshape(4, 6)
MU, NU = A + 100, A + 200
MATRIX, SQUARE = (4, 6), (4, 4)


@pytest.mark.parametrize(
    ("names", "moments"),
    [
        (["params.w", "opt_state.0.mu.w", "opt_state.0.count"], {"opt_state.0.mu.w": "params.w"}),
        (
            ["params.params.w", "opt_state.1.0.nu.params.w"],
            {"opt_state.1.0.nu.params.w": "params.params.w"},
        ),
        (["w", "opt_state.trace.w"], {"opt_state.trace.w": "w"}),
        (["0.w.value", "1.opt_state.0.mu.w.value"], {"1.opt_state.0.mu.w.value": "0.w.value"}),
        (["model.w", "optimizer.0.mu.w"], {"optimizer.0.mu.w": "model.w"}),
        (
            ["params.a", "params.b", "opt_state.inner_states.x.inner_state.0.mu.a"],
            {"opt_state.inner_states.x.inner_state.0.mu.a": "params.a"},
        ),
        # Most of the moments are about `params`; `ema` has one of them only.
        (
            ["ema.a", "params.a", "params.b", "opt_state.0.mu.a", "opt_state.0.mu.b"],
            {"opt_state.0.mu.a": "params.a", "opt_state.0.mu.b": "params.b"},
        ),
        # Both have all: the parameters are called so.
        (["averages.a", "params.a", "opt_state.0.mu.a"], {"opt_state.0.mu.a": "params.a"}),
        # A parameter that was not saved.
        (["opt_state.0.mu.a"], {"opt_state.0.mu.a": "params.a"}),
        # A parameter whose name is that of a field.
        (
            ["params.mu.w", "params.dense.w", "opt_state.0.mu.mu.w", "opt_state.0.mu.dense.w"],
            {"opt_state.0.mu.mu.w": "params.mu.w", "opt_state.0.mu.dense.w": "params.dense.w"},
        ),
        (["params.encoder.mu.w", "params.encoder.dense.w"], {}),
        (["params.adopted.mu.w", "params.w"], {}),
        (["params.w", "opt_state.0.mu"], {}),
    ],
)
def test_moments_are_found_with_their_parameter(names, moments):
    found = find_moments(dict.fromkeys(names, MATRIX), MOMENTS)
    assert {name: moment.parameter(name) for name, moment in found.items()} == moments


def test_a_moment_knows_whether_it_has_the_shape_of_its_parameter():
    shapes = {"params.w": MATRIX, "opt.mu.w": MATRIX, "opt.v_row.w": (4,)}
    found = find_moments(shapes, MOMENTS)
    assert {moment.head: moment.is_alike for moment in found.values()} == {
        "opt.mu": True,
        "opt.v_row": False,
    }


def state(prefix="params", head="opt_state.0", more_axes=0, **arrays):
    """A tree of parameters and two trees of moments."""
    tree = {}
    for name, array in arrays.items():
        name, array = name.replace("__", "."), array[(None,) * more_axes]
        tree |= {f"{prefix}.{name}": array}
        tree |= {f"{head}.mu.{name}": array + 100, f"{head}.nu.{name}": array + 200}
    return tree


@pytest.mark.parametrize(
    ("rules", "stored", "wanted"),
    [
        ([rename(r"params\.a", "params.b.c")], state(a=A), state(b__c=A)),
        ([rename(r"params\.(.*)", r"model.net.\1")], state(a=A), state("model.net", a=A)),
        ([rename(r"params\.(.*)", r"params.net.\1")], state(a=A), state(net__a=A)),
        # Only what is wanted tells where the tree of parameters begins.
        ([rename(r"params\.(.*)", r"params.net.\1.v")], state(a=A), state("params.net", a__v=A)),
        ([rename(r"params\.(.*)", r"net.\1.v")], state(a=A), state("net", a__v=A)),
        (
            [stack(r"params\.l(\d)\.(.*)", r"params.l.\2"), transpose(r"params\.l\.w", (1, 0, 2))],
            state(l0__w=A, l1__w=A + 1),
            state(l__w=np.stack([A, A + 1], 1)),
        ),
        ([stack(r"(.*)\.l(?P<layer>\d)", r"\1.l")], state(l1=A), state(l=A, more_axes=1)),
        (
            [unstack(r"params\.l\.w", "params.l{layer}.w")],
            state(l__w=np.stack([A, A + 1])),
            state(l0__w=A, l1__w=A + 1),
        ),
        (
            [split(r"params\.x", ["params.a", "params.b"], 1, [2, 4])],
            state(x=A),
            state(a=A[:, :2], b=A[:, 2:]),
        ),
        ([drop(r"params\.b")], state(a=A, b=A), state(a=A)),
        ([select(r"params\.a", moments=True)], state(a=A, b=A), state(a=A)),
        ([select(r"params\..*")], state(a=A), {"params.a": A}),
        (
            [cast(r"params\..*", np.float16)],
            state(a=A),
            {**state(a=A), "params.a": A.astype(np.float16)},
        ),
        (
            [cast(r"params\..*", np.float16, moments=True)],
            state(a=A),
            {name: array.astype(np.float16) for name, array in state(a=A).items()},
        ),
        # What is about the moments themselves.
        (
            [rename(r"opt_state\.0\.(.*)", r"opt_state.1.0.\1"), rename(r"params\.a", "params.b")],
            state(a=A),
            state(head="opt_state.1.0", b=A),
        ),
        (
            [
                rename(r"opt_state\.0\.mu\.a", "opt_state.0.mu.b"),
                drop(r"params\.a", moments=False),
                drop(r".*nu.*"),
            ],
            state(a=A),
            {"opt_state.0.mu.b": MU},
        ),
        (
            [rename(r"params\.a", "params.b", moments=False)],
            state(a=A),
            {"params.b": A, "opt_state.0.mu.a": MU, "opt_state.0.nu.a": NU},
        ),
        (
            [scale(r"params\.a", 2, moments=False)],
            state(a=A),
            {**state(a=A), "params.a": A * 2},
        ),
        (
            [scale(r"params\.a", 2), drop("opt_state.*"), init("opt_state.*", 0)],
            state(a=A),
            {"params.a": A * 2, "opt_state.0.mu.a": A * 0, "opt_state.0.nu.a": A * 0},
        ),
        # A moment of another shape may be renamed, and cast.
        (
            [rename(r"params\.a", "params.b")],
            {"params.a": A, "opt_state.v_row.a": A[0]},
            {"params.b": A, "opt_state.v_row.b": A[0]},
        ),
    ],
)
def test_moments_follow_their_parameter(rules, stored, wanted):
    plan = TransformMap(rules).plan(specs(stored), specs(wanted))
    assert_makes(plan, stored, wanted)


@pytest.mark.parametrize("pattern", [r"params\.a", r".*\.a"])
def test_moments_are_padded_with_zeros(pattern):
    plan = TransformMap([pad_to(pattern, (5, None), -1)]).plan(
        specs(state(a=A)), specs(state(a=np.zeros((5, 6), np.float32)))
    )
    wanted = {name: np.pad(array, ((0, 1), (0, 0))) for name, array in state(a=A).items()}
    wanted["params.a"][4] = -1
    assert_makes(plan, state(a=A), wanted)


@pytest.mark.parametrize(
    "rules",
    [
        [scale(r"params\.a", 2)],
        [scale(".*", 2)],
        [scale(r"opt_state.*", 2)],
        [scale(r"params\.a", 2), rename(r"params\.(.*)", r"params.\1")],
    ],
)
def test_moments_that_would_be_scaled_are_refused(rules):
    with pytest.raises(TransformError, match=r"leaf opt_state\.0\.mu\.a.* do not scale with"):
        TransformMap(rules).plan(specs(state(a=A)), specs(state(a=A)))


def test_a_stack_of_which_one_moment_would_be_scaled_is_refused():
    stored, rules = (
        state(a0=A, a1=A),
        [scale(r"params\.a1", 2), stack(r"params\.a(\d)", "params.a")],
    )
    wanted = state(a=np.stack([A, A]))
    with pytest.raises(TransformError, match=r"leaf opt_state\.0\.mu\.a: .* do not scale with"):
        TransformMap(rules).plan(specs(stored), specs(wanted))


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (transpose, (6, 4)),
        (functools.partial(reshape, shape=(24,)), (24,)),
        (functools.partial(pad_to, shape=(5, 6)), (5, 6)),
    ],
)
def test_a_moment_of_another_shape_does_not_follow_what_is_about_shapes(make, shape):
    stored = {"params.a": A, "opt_state.v_row.a": A[0]}
    wanted = {"params.a": (shape, A.dtype), "opt_state.v_row.a": ((6,), A.dtype)}
    with pytest.raises(TransformError, match=r"opt_state\.v_row\.a: it does not have the shape"):
        TransformMap([make(r"params\.a")]).plan(specs(stored), wanted)
    plan = TransformMap([make(r"params\.a", moments=False)]).plan(specs(stored), wanted)
    assert plan.leaves["opt_state.v_row.a"].rules == ()


def test_another_pattern_tells_what_moments_are():
    stored = {"weights.a": A, "adam.first.a": MU}
    rules = [rename(r"weights\.a", "weights.b")]
    wanted = {"weights.b": A, "adam.first.b": MU}
    with pytest.raises(TransformError, match=r"adam\.first\.a"):
        TransformMap(rules).plan(specs(stored), specs(wanted))
    plan = TransformMap(rules, moments=r"adam\.(first|second)").plan(specs(stored), specs(wanted))
    assert plan.leaves["adam.first.b"].follows == "weights.b"
    assert_makes(plan, stored, wanted)
