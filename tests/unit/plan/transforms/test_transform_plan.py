"""What a plan says of itself, and that it asks only for bytes that are wanted."""

import json
import math

import numpy as np
import pytest
from equipment.numpy_reader import n_read

from lazy_orbax.errors import TransformError
from lazy_orbax.plan.boxes import Box
from lazy_orbax.plan.transforms.rules import cast, drop, init, pad_to, reshape, stack, transpose
from lazy_orbax.plan.transforms.takes import Fill, Init, Take
from lazy_orbax.plan.transforms.transform_map import TransformMap

F32 = np.dtype(np.float32)


def state(n_layers):
    names = ["params", "opt_state.0.mu"]
    stored = {f"{head}.l{i}.w": ((4, 6), F32) for head in names for i in range(n_layers)}
    return {**stored, "step": ((), np.int32), "old": ((), F32)}


RULES = [
    stack(r"params\.l(\d)\.w", "params.l.w"),
    drop("old"),
    cast(r"params\..*", "bfloat16"),
    init("new", 0.5),
]
WANTED = {
    "params.l.w": ((5, 4, 6), "bfloat16"),
    "opt_state.0.mu.l.w": ((5, 4, 6), F32),
    "step": ((), np.int32),
    "new": ((3,), F32),
}


def test_the_table_says_what_goes_where():
    plan = TransformMap(RULES).plan(state(5), WANTED)
    assert str(plan) == plan.table()
    lines = [line.split() for line in plan.table().splitlines()]
    assert lines[1] == [
        *("params.l.w", "bfloat16[5,", "4,", "6]"),
        *("params.l0.w", "...", "params.l4.w", "(5", "leaves)", "0,", "2"),
    ]
    assert lines[2][-3:] == ["0,", "following", "params.l.w"]
    assert lines[3] == ["step", "int32[]", "step", "-"]
    assert lines[4] == ["new", "float32[3]", "nothing", "3"]
    assert "rule 3: init('new', value=0.5) (1 leaves)" in plan.table()
    assert plan.table().endswith("dropped: old")


def test_the_report_is_json():
    plan = TransformMap(RULES).plan(
        state(2),
        {
            **WANTED,
            **{
                name: ((2, *spec[0][1:]), spec[1]) for name, spec in WANTED.items() if ".l." in name
            },
        },
    )
    report = plan.report
    assert json.loads(json.dumps(report)) == report
    assert report["rules"][0] == {"rule": str(RULES[0]), "leaves": 4}
    assert report["leaves"]["opt_state.0.mu.l.w"] == {
        "shape": [2, 4, 6],
        "dtype": "float32",
        "from": ["opt_state.0.mu.l0.w", "opt_state.0.mu.l1.w"],
        "rules": [0],
        "follows": "params.l.w",
    }
    assert report["leaves"]["new"]["from"] == []
    assert report["dropped"] == ["old"]


def test_a_shard_of_a_stack_asks_only_for_its_layers_and_rectangles():
    plan = TransformMap(RULES).plan(state(5), WANTED)
    takes = plan.takes("params.l.w", Box((1, 2, 3), (2, 2, 3)))
    assert takes == tuple(
        Take(
            f"params.l{layer}.w",
            Box((2, 3), (2, 3)),
            (slice(i, i + 1), slice(0, 2), slice(0, 3)),
            (0, 1, 2),
            (2, 3),
        )
        for i, layer in enumerate([1, 2])
    )


def test_what_is_stored_and_not_read_is_known():
    plan = TransformMap(RULES).plan(state(5), WANTED)
    assert {origin.leaf for origin in plan.stored_leaves} == set(state(5)) - {"old"}


def test_a_leaf_without_axes_is_a_view_too():
    plan = TransformMap(RULES).plan(state(5), WANTED)
    assert plan.takes("step", Box((), ())) == (Take("step", Box((), ()), (...,), (), ()),)


def test_padding_is_filled_and_not_read():
    plan = TransformMap([pad_to("v", (10, None))]).plan({"v": ((7, 4), F32)}, {"v": ((10, 4), F32)})
    assert plan.takes("v", Box((8, 0), (2, 4))) == (Fill((slice(0, 2), slice(0, 4)), F32.type(0)),)
    assert n_read(plan.takes("v", Box((5, 0), (5, 2)))) == 4


def test_a_function_makes_a_shard_of_a_leaf():
    def ones_at(name, shape, dtype, index):
        assert (name, shape, dtype, index) == ("new", (3,), F32, (slice(1, 3),))
        return np.ones(2, dtype)

    plan = TransformMap([init("new", ones_at)]).plan({}, {"new": ((3,), F32)})
    (made,) = plan.takes("new", Box((1,), (2,)))
    assert isinstance(made, Init)
    assert (made.values() == 1).all()
    assert "ones_at" in plan.table()
    assert not plan.stored_leaves


def test_an_empty_shard_needs_nothing():
    plan = TransformMap([]).plan({"v": ((7, 4), F32)}, {"v": ((7, 4), F32)})
    assert plan.takes("v", Box((3, 0), (0, 4))) == ()


@pytest.mark.parametrize(
    ("rules", "stored", "box", "n_takes"),
    [
        ([], (64, 8), Box((0, 0), (64, 8)), 1),
        ([transpose("x")], (64, 8), Box((0, 0), (8, 64)), 1),
        # Heads that are split off: one box, unless a head is cut.
        ([reshape("x", (16, 4, 8))], (64, 8), Box((0, 0, 0), (16, 4, 8)), 1),
        ([reshape("x", (16, 4, 8))], (64, 8), Box((4, 0, 0), (4, 4, 8)), 1),
        ([reshape("x", (16, 4, 8))], (64, 8), Box((0, 0, 0), (16, 2, 8)), 16),
        ([reshape("x", (512,))], (64, 8), Box((0,), (512,)), 1),
        ([reshape("x", (512,))], (64, 8), Box((12,), (301,)), 3),
        # Heads that move in front: rows of memory of the shard are not those of what is stored.
        ([reshape("x", (8, 2, 4)), transpose("x", (1, 0, 2))], (8, 8), Box((0,) * 3, (2, 8, 4)), 2),
        ([reshape("x", (8, 2, 4)), transpose("x", (0, 2, 1))], (8, 8), Box((0,) * 3, (8, 4, 2)), 2),
        # Reshaped there and back is nothing.
        ([reshape("x", (512,)), reshape("x", (32, 16))], (64, 8), Box((0, 0), (32, 16)), 1),
    ],
)
def test_a_shard_is_made_of_as_few_boxes_as_it_can_be(rules, stored, box, n_takes):
    wanted = np.zeros(stored)
    for rule in rules:
        given = rule.settings
        wanted = (
            wanted.transpose(given["axes"])
            if rule.verb == "transpose"
            else wanted.reshape(given["shape"])
        )
    plan = TransformMap(rules).plan({"x": (stored, F32)}, {"x": (wanted.shape, F32)})
    takes = plan.takes("x", box)
    assert len(takes) == n_takes
    assert n_read(takes) == math.prod(box.shape)


def test_more_boxes_than_anyone_means_are_refused():
    n = 2**21
    rules = [reshape("x", (n, 2)), transpose("x")]
    plan = TransformMap(rules).plan({"x": ((2 * n,), F32)}, {"x": ((2, n), F32)})
    with pytest.raises(TransformError, match=r"shard \[0:2, 0:2097152\]: found 2097152 box"):
        plan.takes("x", Box((0, 0), (2, n)))
    assert len(plan.takes("x", Box((0, 0), (1, 5)))) == 5
