"""What is not honest is refused: leaves made twice or never, rules without effect, misfits."""

import numpy as np
import pytest
from equipment.numpy_reader import assert_makes, specs

from lazy_orbax.errors import TransformError
from lazy_orbax.plan.transforms.rules import drop, fuse, init, rename, select, stack
from lazy_orbax.plan.transforms.transform_map import TransformMap

F32, BF16 = np.dtype(np.float32), "bfloat16"
A = np.arange(24, dtype=np.float32).reshape(4, 6)


@pytest.mark.parametrize(
    ("rules", "stored", "wanted", "problems"),
    [
        (
            [],
            {"a": ((2,), F32)},
            {"a": ((2,), F32), "b": ((3,), F32)},
            [
                "leaf b: nothing becomes it, wanted float32[3]; rename() what is stored, or "
                "init() it"
            ],
        ),
        (
            [],
            {"kernel_0": ((2,), F32)},
            {"kernel_1": ((2,), F32)},
            [
                "leaf kernel_1: nothing becomes it, wanted float32[2]; rename() what is stored, or "
                "init() it; kernel_0 is there, which nobody wants",
                "leaf kernel_0: nobody wants it; drop() it, or select() others",
            ],
        ),
        (
            [rename("a", "b")],
            {"a": ((2,), F32)},
            {},
            [
                "leaf a, now b after rename('a', 'b'): nobody wants it; drop() it, or select() "
                "others"
            ],
        ),
        (
            [init("a", 0)],
            {"a": ((2,), F32)},
            {"a": ((2,), F32)},
            ["leaf a: it is made 2 times, from a and from nothing after init('a', value=0)"],
        ),
        (
            [init("a", 0), init(".", 1)],
            {},
            {"a": ((2,), F32)},
            [
                "leaf a: it is made 2 times, from nothing after init('a', value=0) and from "
                "nothing after init('.', value=1)"
            ],
        ),
        (
            [rename("x", "y"), init("z", 0), stack(r"l(\d)", "l"), select(".")],
            {"a": ((2,), F32)},
            {"a": ((2,), F32)},
            [
                "rule rename('x', 'y'): it is about no leaf; mend its pattern, or remove it",
                "rule init('z', value=0): it is about no leaf; mend its pattern, or remove it",
                "rule stack('l(\\\\d)', 'l', axis=0): it is about no leaf; mend its pattern, or "
                "remove it",
            ],
        ),
        (
            [rename("a", "b")],
            {"a": ((2,), F32)},
            {"b": ((2,), F32.newbyteorder())},
            [
                "leaf b: found float32 after rename('a', 'b'), wanted >f4; add cast('b', '>f4')",
            ],
        ),
        (
            [],
            {"a.b": ((2,), F32)},
            {"a.b": ((2,), np.int32)},
            ["leaf a.b: found float32, wanted int32; add cast('a\\\\.b', 'int32')"],
        ),
    ],
)
def test_what_is_wrong_is_said_by_leaf_and_by_rule(rules, stored, wanted, problems):
    with pytest.raises(TransformError) as caught:
        TransformMap(rules).plan(stored, wanted)
    assert list(caught.value.problems) == problems
    assert all(problem in str(caught.value) for problem in problems)


@pytest.mark.parametrize(
    ("found", "wanted", "advice"),
    [
        ((2, 3), (3, 2), "transpose() it"),
        ((2, 3), (2, 4), "pad_to() it"),
        ((2, 3), (2, 2), "strip() it"),
        ((2, 3), (6,), "reshape() it"),
        ((2, 3), (4, 2, 3), "stack() it with the other layers"),
        ((4, 2, 3), (2, 3), "unstack() it"),
        ((2, 3), (1, 4), "mend the rules, or what is wanted"),
    ],
)
def test_a_shape_that_does_not_fit_is_named_with_what_may_help(found, wanted, advice):
    with pytest.raises(TransformError) as caught:
        TransformMap([]).plan({"a": (found, F32)}, {"a": (wanted, F32)})
    expected = f"leaf a: found float32{list(found)}, wanted float32{list(wanted)}; {advice}"
    assert caught.value.problems == (expected,)


def test_only_ten_problems_are_shown_of_many():
    with pytest.raises(TransformError, match="and 11 more") as caught:
        TransformMap([]).plan({}, {f"a{i}": ((), F32) for i in range(21)})
    assert len(caught.value.problems) == 21


def test_dtypes_are_compared_by_meaning():
    stored = {"a": ([2], "float32"), "b": ((), "<U4"), "key": ((), "key<fry>")}
    plan = TransformMap([]).plan(stored, {**stored, "a": ((2,), np.float32)})
    assert plan.leaves["a"].shape == (2,)
    assert plan.leaves["key"].dtype == "key<fry>"


def test_leaves_of_two_checkpoints_become_one_tree():
    stored = {"base": {"w": A, "old": A}, "lora": {"w": A + 1, "b": A + 2}}
    rules = [
        drop("old", source="base"),
        rename("w", "w.lora", source="lora"),
        rename("w", "w.base", source="base"),
    ]
    wanted = {"w.base": A, "w.lora": A + 1, "b": A + 2}
    plan = TransformMap(rules, ["base", "lora"]).plan(
        {name: specs(leaves) for name, leaves in stored.items()}, specs(wanted)
    )
    assert_makes(plan, stored, wanted)
    assert list(map(str, plan.dropped)) == ["base:old"]


def test_select_and_moments_are_those_of_one_checkpoint():
    one = {"params.w": A, "opt_state.0.mu.w": A + 1}
    stored = {"base": one, "other": {"params.v": A + 2, "opt_state.0.mu.v": A + 3}}
    rules = [
        select(r"params\..*", source="other"),
        rename(r"params\.w", "params.x", source="base"),
    ]
    wanted = {"params.x": A, "opt_state.0.mu.x": A + 1, "params.v": A + 2}
    plan = TransformMap(rules, ["base", "other"]).plan(
        {name: specs(leaves) for name, leaves in stored.items()}, specs(wanted)
    )
    assert_makes(plan, stored, wanted)


@pytest.mark.parametrize(
    ("rules", "stored", "wanted"),
    [
        # Experts of a mixture, each from a checkpoint of its own.
        (
            [
                rename("w", "w_0", source="x"),
                rename("w", "w_1", source="y"),
                stack(r"w_(\d)", "w"),
            ],
            {"x": {"w": A}, "y": {"w": A + 1}},
            {"w": np.stack([A, A + 1])},
        ),
        (
            [fuse(["q", "k"], "qk", 0)],
            {"x": {"q": A}, "y": {"k": A + 1}},
            {"qk": np.concatenate([A, A + 1])},
        ),
        (
            [
                fuse(["q", "k"], "qk", 0),
                rename("qk", "qk_x", source="x"),
                rename("qk", "qk_y", source="y"),
            ],
            {"x": {"q": A, "k": A + 1}, "y": {"q": A + 2, "k": A + 3}},
            {"qk_x": np.concatenate([A, A + 1]), "qk_y": np.concatenate([A + 2, A + 3])},
        ),
    ],
)
def test_leaves_of_several_checkpoints_become_one_leaf(rules, stored, wanted):
    plan = TransformMap(rules, ["x", "y"]).plan(
        {name: specs(leaves) for name, leaves in stored.items()}, specs(wanted)
    )
    assert_makes(plan, stored, wanted)


def test_a_leaf_that_two_checkpoints_have_is_refused():
    spec = {"w": ((2,), F32)}
    with pytest.raises(TransformError, match="leaf w: it is made 2 times, from x:w and from y:w"):
        TransformMap([], ["x", "y"]).plan({"x": spec, "y": spec}, spec)


def test_checkpoints_must_be_those_of_the_map():
    with pytest.raises(TransformError, match=r"found checkpoints \['z'\], wanted \['x', 'y'\]"):
        TransformMap([], ["y", "x"]).plan({"z": {}}, {})
