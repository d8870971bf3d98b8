"""Each rule against NumPy, on whole leaves and on shards of them."""

import ml_dtypes
import numpy as np
import pytest
from equipment.numpy_reader import assert_makes, specs

from lazy_orbax.errors import RestoreError, TransformError
from lazy_orbax.plan.transforms.rules import (
    cast,
    drop,
    fuse,
    init,
    pad_to,
    rename,
    reshape,
    scale,
    select,
    split,
    stack,
    strip,
    transpose,
    unstack,
)
from lazy_orbax.plan.transforms.transform_map import TransformMap

BF16 = np.dtype(ml_dtypes.bfloat16)


def numbers(*shape, first=0, dtype=np.float32):
    return (np.arange(np.prod(shape, dtype=int)) + first).reshape(shape).astype(dtype)


A, B, C = numbers(4, 6), numbers(4, 6, first=100), numbers(4, 6, first=200)
CUBE, INTS = numbers(2, 3, 4), numbers(5, dtype=np.int32)
ONE = np.float32(7) * np.ones((), np.float32)


@pytest.mark.parametrize(
    ("rules", "stored", "wanted"),
    [
        ([], {"x": A}, {"x": A}),
        ([rename("x", "y")], {"x": A, "z": B}, {"y": A, "z": B}),
        ([rename(r"a\.(.*)", r"b.\1")], {"a.x": A, "a.y.z": B}, {"b.x": A, "b.y.z": B}),
        ([rename(r"(?P<k>\w)(\d)", r"\g<k>.\2")], {"x1": A}, {"x.1": A}),
        ([rename("x", "y"), rename("y", "z")], {"x": A}, {"z": A}),
        ([stack(r"x(\d+)", "x")], {"x1": B, "x0": A, "x2": C}, {"x": np.stack([A, B, C])}),
        ([stack(r"x(\d+)", "x", axis=1)], {"x0": A, "x1": B}, {"x": np.stack([A, B], 1)}),
        ([stack(r"x(\d+)", "x", axis=-1)], {"x9": A, "x10": B}, {"x": np.stack([A, B], -1)}),
        (
            [stack(r"(\w)_(?P<layer>\d)", r"\1")],
            {"x_0": A, "x_1": B, "y_0": C},
            {"x": np.stack([A, B]), "y": C[None]},
        ),
        ([stack(r"x(\d)", "x", numbers=[2, 0])], {"x0": A, "x2": B}, {"x": np.stack([B, A])}),
        ([stack(r"x(\d+)", "x")], {"x0": ONE, "x1": ONE}, {"x": np.stack([ONE, ONE])}),
        ([unstack("x", "x{layer}")], {"x": CUBE}, {"x0": CUBE[0], "x1": CUBE[1]}),
        (
            [unstack(r"(.*)", r"\1.{layer}.w", axis=-2, numbers=range(4, 7))],
            {"x": CUBE},
            {"x.4.w": CUBE[:, 0], "x.5.w": CUBE[:, 1], "x.6.w": CUBE[:, 2]},
        ),
        ([unstack("x", r"x{layer}")], {"x": INTS[:2]}, {"x0": INTS[0:1][0], "x1": INTS[1:2][0]}),
        (
            [split("x", ["q", "k", "v"], 1, [3, 2, 1])],
            {"x": A},
            {"q": A[:, :3], "k": A[:, 3:5], "v": A[:, 5:]},
        ),
        ([split("x", ["a", "b"], -1)], {"x": A}, {"a": A[:, :3], "b": A[:, 3:]}),
        (
            [split(r"(.)\.wi", [r"\1.gate", r"\1.up"], 0)],
            {"l.wi": A, "m.wi": B},
            {"l.gate": A[:2], "l.up": A[2:], "m.gate": B[:2], "m.up": B[2:]},
        ),
        ([split("x", ["a", "b"], 0, [5, 0])], {"x": INTS}, {"a": INTS, "b": INTS[:0]}),
        ([fuse(["q", "k"], "qk", 1)], {"k": B, "q": A}, {"qk": np.concatenate([A, B], 1)}),
        (
            [fuse([r"(.*)\.q", r"(.*)\.k"], r"\1.qk", 0)],
            {"a.q": A, "a.k": B[:1], "b.q": C, "b.k": B},
            {"a.qk": np.concatenate([A, B[:1]]), "b.qk": np.concatenate([C, B])},
        ),
        (
            [pad_to("x", (5, None), 3)],
            {"x": A},
            {"x": np.pad(A, ((0, 1), (0, 0)), constant_values=3)},
        ),
        ([pad_to("x", (5, 9))], {"x": A}, {"x": np.pad(A, ((0, 1), (0, 3)))}),
        ([pad_to("x", (4, 6))], {"x": A}, {"x": A}),
        ([pad_to("x", (6, 2), 1)], {"x": A[:, :0]}, {"x": np.ones((6, 2), np.float32)}),
        ([pad_to("x", (3,))], {"x": INTS[:0]}, {"x": np.zeros(3, np.int32)}),
        ([strip("x", (3, None))], {"x": A}, {"x": A[:3]}),
        ([strip("x", (0, 2))], {"x": A}, {"x": A[:0, :2]}),
        ([transpose("x")], {"x": CUBE}, {"x": CUBE.T}),
        ([transpose("x", (1, 2, 0))], {"x": CUBE}, {"x": CUBE.transpose(1, 2, 0)}),
        ([transpose("x", (-1, 0, 1))], {"x": CUBE}, {"x": CUBE.transpose(2, 0, 1)}),
        ([reshape("x", (6, 4))], {"x": CUBE}, {"x": CUBE.reshape(6, 4)}),
        ([reshape("x", (2, -1))], {"x": CUBE}, {"x": CUBE.reshape(2, 12)}),
        ([reshape("x", (2, 2, 2, 3))], {"x": A}, {"x": A.reshape(2, 2, 2, 3)}),
        ([reshape("x", (1, 4, 1, 6))], {"x": A}, {"x": A.reshape(1, 4, 1, 6)}),
        ([reshape("x", (2, 12))], {"x": A}, {"x": A.reshape(2, 12)}),
        ([transpose("x"), reshape("x", (24,))], {"x": A}, {"x": A.T.reshape(24)}),
        (
            [transpose("x", (2, 0, 1)), reshape("x", (-1, 3))],
            {"x": CUBE},
            {"x": CUBE.transpose(2, 0, 1).reshape(-1, 3)},
        ),
        (
            [reshape("x", (6, 4)), transpose("x"), reshape("x", (24,))],
            {"x": numbers(24)},
            {"x": numbers(6, 4).T.reshape(24)},
        ),
        ([reshape("x", ())], {"x": INTS[:1]}, {"x": INTS[:1].reshape(())}),
        ([reshape("x", (1, 1))], {"x": ONE}, {"x": ONE.reshape(1, 1)}),
        ([reshape("x", (0, 7))], {"x": INTS[:0]}, {"x": np.zeros((0, 7), np.int32)}),
        ([cast("x", "bfloat16")], {"x": A, "y": B}, {"x": A.astype(BF16), "y": B}),
        (
            [cast(".*", np.float64)],
            {"x": INTS, "y": B},
            {"x": INTS.astype(float), "y": B.astype(float)},
        ),
        ([select("x|y")], {"x": A, "y": B, "z": C}, {"x": A, "y": B}),
        ([drop("z.*")], {"x": A, "z": B, "zz": C}, {"x": A}),
        ([scale("x", 0.5)], {"x": A, "y": B}, {"x": A * np.float32(0.5), "y": B}),
        ([scale("x", 2), scale("x", 4)], {"x": A}, {"x": A * 8}),
        ([init("y", 1.5)], {"x": A}, {"x": A, "y": np.full((2, 3), 1.5, BF16)}),
        (
            [init("y", lambda name, shape, dtype, index: numbers(*shape, dtype=dtype)[index])],
            {"x": A},
            {"x": A, "y": numbers(4, 5)},
        ),
        (
            [
                rename(r"layer(\d)", r"l.\1"),
                stack(r"l\.(\d)", "l"),
                transpose("l", (1, 0, 2)),
                pad_to("l", (None, None, 8), -1),
                cast("l", "bfloat16"),
            ],
            {"layer0": A, "layer1": B},
            {
                "l": np.pad(
                    np.stack([A, B], 1), ((0, 0), (0, 0), (0, 2)), constant_values=-1
                ).astype(BF16)
            },
        ),
        (
            [pad_to("x", (5, 6), 2), scale("x", 0.5), cast("x", "bfloat16")],
            {"x": A},
            {"x": np.pad(A * 0.5, ((0, 1), (0, 0)), constant_values=1).astype(BF16)},
        ),
    ],
)
def test_a_rule_does_what_numpy_does(rules, stored, wanted):
    plan = TransformMap(rules).plan(specs(stored), specs(wanted))
    assert_makes(plan, stored, wanted)


@pytest.mark.parametrize(
    ("rules", "stored", "wanted", "message"),
    [
        ([rename("a|b", "c")], {"a": A, "b": B}, {"c": A}, "both a and b become c"),
        ([rename("a", "b")], {"a": A, "b": B}, {"b": A}, "both b and a become b"),
        ([rename("a", r"\2")], {"a": A}, {"b": A}, r"'\\\\2' does not fit the pattern"),
        ([stack(r"x(\d)", "x")], {"x0": A, "x2": B}, {"x": CUBE}, "but nothing for layer 1"),
        ([stack(r"x(\d+)", "x")], {"x0": A, "x00": B}, {"x": CUBE}, "found x0 and x00 for one"),
        ([stack(r"x(.*)", "x")], {"x0": A, "xy": B}, {"x": CUBE}, "found 'y' as the number"),
        ([stack(r"x.", "x")], {"x0": A}, {"x": CUBE}, "no group that is the number"),
        (
            [stack(r"x(\d)", "x")],
            {"x0": A, "x1": INTS},
            {"x": CUBE},
            r"float32\[4, 6\] and int32\[5\]",
        ),
        ([stack(r"x(\d)", "x", 3)], {"x0": A}, {"x": CUBE}, "axis 3 is not one of 3"),
        ([stack(r"x(\d)", "x", numbers=[0])], {"x0": A, "x1": B}, {"x": A}, "x1, wanted layers"),
        ([unstack("x", "y{layer}", 2)], {"x": A}, {"y0": A}, "axis 2 is not one of 2"),
        ([unstack("x", "y{layer}", numbers=[1])], {"x": A}, {"y1": A}, "found 4 layers, wanted 1"),
        ([split("x", ["a", "b"], 0, [1, 2])], {"x": A}, {}, "found 4 indexes on axis 0, wanted 3"),
        ([split("x", ["a", "b"], 0)], {"x": INTS}, {}, "wanted 2 equal parts on axis 0"),
        ([split("x", ["a", "b"], 4)], {"x": INTS}, {}, "wanted 2 equal parts on axis 4"),
        ([fuse(["a", "b"], "c", 0)], {"a": A}, {}, "found 1 leaves such as a, but nothing for b"),
        ([fuse(["a", "b"], "c", 0)], {"a": A, "b": CUBE}, {}, r"float32\[\*, 6\] and float32\[\*"),
        ([fuse(["a", "a|b"], "c", 0)], {"a": A, "b": B}, {}, "found a and b for one place"),
        ([fuse(["a", "a"], "c", 0)], {"a": A}, {}, "leaf a: fuse.* uses it twice"),
        ([pad_to("x", (3, None))], {"x": A}, {}, r"found \[4, 6\], wanted at most \[3, 6\]"),
        ([pad_to("x", (5,))], {"x": A}, {}, "found 2 axes, wanted 1"),
        ([pad_to("x", (9,), 0.5)], {"x": INTS}, {}, "0.5 is no int32"),
        ([pad_to("x", (9,), "k")], {"x": INTS}, {}, "'k' is no int32"),
        ([strip("x", (5, 1))], {"x": A}, {}, r"found \[4, 6\], wanted at least \[5, 1\]"),
        ([transpose("x", (0, 0))], {"x": A}, {}, "found 2 axes, wanted each of them once"),
        ([reshape("x", (5, 5))], {"x": A}, {}, r"as many elements as \[5, 5\] has"),
        ([reshape("x", (5, -1))], {"x": A}, {}, r"as many elements as \[5, -1\] has"),
        ([reshape("x", (6, 4))], {"x": A}, {}, "no box is a box of what is stored"),
        ([cast("x", "int8"), cast("x", "int4")], {"x": A}, {}, "it was cast to int8 before"),
        ([scale("x", 2), cast("x", "int8")], {"x": A}, {}, "found int8, wanted a floating-point"),
        ([scale("x", 2)], {"x": INTS}, {}, "found int32, wanted a floating-point dtype"),
        ([init("y", 0.5)], {}, {"y": INTS}, "leaf y: init.*: 0.5 is no int32"),
        ([init("y", -1)], {}, {"y": INTS.astype(np.uint8)}, "-1 is no uint8"),
    ],
)
def test_what_a_rule_cannot_do_is_named(rules, stored, wanted, message):
    with pytest.raises(TransformError, match=message):
        TransformMap(rules).plan(specs(stored), specs(wanted))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rename("(", "x"), r"rename\('\(', 'x'\): '\(' is no regular expression"),
        (lambda: unstack("x", "y"), "the template needs {layer}"),
        (lambda: split("x", ["a"], 0, [1, 2]), "1 names and 2 sizes"),
        (lambda: cast("x", "float31"), "'float31' is no dtype"),
        (lambda: cast("x", object), "object is no dtype of numbers"),
        (lambda: TransformMap([drop("x", source="b")], ["a"]), "found source 'b', wanted one of"),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused_when_it_is_made(make, message):
    with pytest.raises(TransformError, match=message) as caught:
        make()
    assert isinstance(caught.value, RestoreError)
    assert caught.value.problems


@pytest.mark.parametrize(
    "text",
    [
        "rename('a', 'b')",
        "rename('a', 'b', source='base', moments=False)",
        "stack('a(\\\\d)', 'b', axis=1, numbers=range(0, 4, 2))",
        "unstack('a', 'b{layer}', axis=0)",
        "split('a', ['b', 'c'], axis=0, sizes=(1, 2))",
        "fuse(['a', 'b'], 'c', axis=-1)",
        "pad_to('a', shape=(5, None), value=0)",
        "strip('a', shape=(5, None))",
        "transpose('a', axes=(1, 0))",
        "transpose('a')",
        "reshape('a', shape=(4, -1))",
        "cast('a', dtype='bfloat16')",
        "scale('a', factor=0.5)",
        "select('a', moments=True)",
        "drop('a')",
        "init('a', value=0)",
    ],
)
def test_a_rule_prints_what_makes_it(text):
    rule = eval(text)
    assert str(rule) == text
    assert eval(str(rule)) == rule
