"""Any chain of rules makes of any tree, for any shard, what NumPy makes of it."""

import math
import re

import ml_dtypes
import numpy as np
from equipment.numpy_reader import grid, n_read, read, specs, whole
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from lazy_orbax.errors import TransformError
from lazy_orbax.plan.boxes import Box
from lazy_orbax.plan.transforms import rules as r
from lazy_orbax.plan.transforms.transform_map import TransformMap

DTYPES = (np.float32, np.int32, np.float16, ml_dtypes.bfloat16, np.complex64)
PARAMS, MU = "params", "opt_state.0.mu"
NO_BOX = "no box is a box of what is stored"


class Chain:
    """Rules, and what NumPy makes of the same trees: a parameter and its moment, by name."""

    def __init__(self, tree):
        self.tree, self.rules, self.cast, self.n_names = tree, [], set(), 0

    def new_name(self):
        self.n_names += 1
        return f"n{self.n_names}.w"

    def change(self, name, rule, operation, moments=True):
        """Adds a rule that makes one leaf of one, and does it."""
        self.rules.append(rule)
        param, moment = self.tree[name]
        self.tree[name] = operation(param), operation(moment) if moments else moment

    def replace(self, old, new, rule):
        """Adds a rule that makes leaves of others; `new` are pairs by name."""
        self.rules.append(rule)
        was_cast = bool(self.cast & set(old))
        for name in old:
            del self.tree[name]
        self.tree |= new
        self.cast = (self.cast - set(old)) | (set(new) if was_cast else set())

    @property
    def wanted(self):
        """The trees as one, by Orbax's names."""
        return named(self.tree)


def named(tree):
    params = {f"{PARAMS}.{name}": pair[0] for name, pair in tree.items()}
    return params | {f"{MU}.{name}": pair[1] for name, pair in tree.items()}


def pattern(name):
    return re.escape(f"{PARAMS}.{name}")


def rename(draw, chain, name):
    new = chain.new_name()
    rule = r.rename(pattern(name), f"{PARAMS}.{new}")
    chain.replace([name], {new: chain.tree[name]}, rule)


def transpose(draw, chain, name):
    axes = draw(st.permutations(range(chain.tree[name][0].ndim)))
    chain.change(name, r.transpose(pattern(name), axes), lambda x: x.transpose(axes))


def merge(draw, chain, name):
    shape = chain.tree[name][0].shape
    assume(shape)
    first = draw(st.integers(0, len(shape) - 1))
    end = draw(st.integers(first + 1, len(shape)))
    new = (*shape[:first], math.prod(shape[first:end]), *shape[end:])
    chain.change(name, r.reshape(pattern(name), new), lambda x: x.reshape(new))


def divide(draw, chain, name):
    shape = chain.tree[name][0].shape
    assume(shape and math.prod(shape))
    axis = draw(st.integers(0, len(shape) - 1))
    inner = draw(st.sampled_from([i for i in range(1, shape[axis] + 1) if shape[axis] % i == 0]))
    new = (*shape[:axis], shape[axis] // inner, inner, *shape[axis + 1 :])
    chain.change(name, r.reshape(pattern(name), new), lambda x: x.reshape(new))


def pad(draw, chain, name):
    shape = chain.tree[name][0].shape
    assume(shape)
    new = tuple(n + draw(st.integers(0, 3)) for n in shape)
    widths = [(0, m - n) for n, m in zip(shape, new, strict=True)]
    param, moment = chain.tree[name]
    chain.rules.append(r.pad_to(pattern(name), new, 5))
    chain.tree[name] = (np.pad(param, widths, constant_values=5), np.pad(moment, widths))


def strip(draw, chain, name):
    shape = chain.tree[name][0].shape
    new = tuple(draw(st.integers(max(n - 3, 0), n)) for n in shape)
    index = tuple(map(slice, new))
    chain.change(name, r.strip(pattern(name), new), lambda x: x[index])


def cast(draw, chain, name):
    assume(name not in chain.cast and chain.tree[name][0].dtype.kind != "c")
    dtype = draw(st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16, np.float64]))
    moments = draw(st.booleans())
    # What follows must not cast it once more, though the moment may be as it was.
    chain.cast.add(name)
    rule = r.cast(pattern(name), dtype, moments=moments)
    chain.change(name, rule, lambda x: x.astype(dtype), moments)


def scale(draw, chain, name):
    assume(chain.tree[name][0].dtype.kind != "i" and name not in chain.cast)
    dtype = chain.tree[name][0].dtype
    rule = r.scale(pattern(name), 0.5, moments=False)
    chain.change(name, rule, lambda x: np.multiply(x, 0.5).astype(dtype), False)


def unstack(draw, chain, name):
    shape = chain.tree[name][0].shape
    assume(shape and max(shape) > 0)
    axis = draw(st.sampled_from([i for i, n in enumerate(shape) if n]))
    stem = chain.new_name()
    numbers = range(draw(st.integers(0, 2)), 100)[: shape[axis]]
    pairs = chain.tree[name]
    new = {
        f"{stem}.{number}": tuple(np.take(x, i, axis)[...] for x in pairs)
        for i, number in enumerate(numbers)
    }
    into = f"{PARAMS}.{stem}.{{layer}}"
    chain.replace([name], new, r.unstack(pattern(name), into, axis, numbers=numbers))


def split(draw, chain, name):
    shape = chain.tree[name][0].shape
    assume(shape)
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    cuts = sorted(draw(st.lists(st.integers(0, shape[axis]), max_size=2)))
    sizes = np.diff([0, *cuts, shape[axis]]).tolist()
    names = [chain.new_name() for _ in sizes]
    pieces = zip(*(np.split(x, cuts, axis) for x in chain.tree[name]), strict=True)
    rule = r.split(pattern(name), [f"{PARAMS}.{new}" for new in names], axis, sizes)
    chain.replace([name], dict(zip(names, pieces, strict=True)), rule)


def alike(chain, name, skipped=None):
    """Leaves that differ from one in no shape, beside one axis, and in no dtype."""

    def form(pair):
        shapes = [x.shape if skipped is None else np.delete(x.shape, skipped) for x in pair]
        return [(tuple(shape), x.dtype) for shape, x in zip(shapes, pair, strict=True)]

    tree = {other: pair for other, pair in chain.tree.items() if pair[0].ndim}
    tree = tree if skipped is not None else chain.tree
    same = [n for n, pair in tree.items() if pair[0].ndim == chain.tree[name][0].ndim]
    same = [n for n in same if form(chain.tree[n]) == form(chain.tree[name])]
    return [n for n in same if (n in chain.cast) == (name in chain.cast)]


def stack(draw, chain, name):
    names = draw(st.lists(st.sampled_from(alike(chain, name)), min_size=1, max_size=3, unique=True))
    stem, new = chain.new_name(), chain.new_name()
    for i, old in enumerate(names):  # Names that a pattern matches.
        rule = r.rename(pattern(old), f"{PARAMS}.{stem}{i}")
        chain.replace([old], {f"{stem}{i}": chain.tree[old]}, rule)
    axis = draw(st.integers(-1, chain.tree[f"{stem}0"][0].ndim))
    old = [f"{stem}{i}" for i in range(len(names))]
    made = tuple(np.stack([chain.tree[n][k] for n in old], axis) for k in (0, 1))
    rule = r.stack(rf"{pattern(stem)}(\d)", f"{PARAMS}.{new}", axis)
    chain.replace(old, {new: made}, rule)


def fuse(draw, chain, name):
    ndim = chain.tree[name][0].ndim
    assume(ndim)
    axis = draw(st.integers(0, ndim - 1))
    names = draw(
        st.lists(st.sampled_from(alike(chain, name, axis)), min_size=1, max_size=3, unique=True)
    )
    new = chain.new_name()
    made = tuple(np.concatenate([chain.tree[n][k] for n in names], axis) for k in (0, 1))
    rule = r.fuse([pattern(n) for n in names], f"{PARAMS}.{new}", axis)
    chain.replace(names, {new: made}, rule)


def drop(draw, chain, name):
    assume(len(chain.tree) > 1)
    chain.replace([name], {}, r.drop(pattern(name)))


ACTIONS = (
    *(rename, transpose, merge, divide, pad, strip, cast, scale, unstack, split, stack, fuse, drop),
    *(transpose, merge, divide, stack, fuse),
)


@st.composite
def trees(draw):
    """Parameters with moments; some are alike, and all elements differ."""
    tree, first = {}, 0
    for i in range(draw(st.integers(1, 3))):
        shape = tuple(draw(st.lists(st.integers(1, 5), max_size=3)))
        dtype = draw(st.sampled_from(DTYPES))
        for j in range(draw(st.integers(1, 3))):
            pair = []
            for _ in range(2):
                size = math.prod(shape)
                pair.append((np.arange(size) + first).reshape(shape).astype(dtype))
                first += size
            tree[f"x{i}.{j}"] = tuple(pair)
    return tree


@st.composite
def chains(draw):
    """Stored trees, rules, and what NumPy makes of them."""
    stored = draw(trees())
    chain = Chain(dict(stored))
    for _ in range(draw(st.integers(1, 7))):
        name = draw(st.sampled_from(sorted(chain.tree)))
        draw(st.sampled_from(ACTIONS))(draw, chain, name)
    return named(stored), chain


def shards(draw, shape):
    """All shards of a leaf that is cut anywhere."""
    cuts = [draw(st.lists(st.integers(0, max(n, 1)), max_size=2)) for n in shape]
    return list(grid(shape, cuts)) if math.prod(shape) else [whole(shape)]


@settings(suppress_health_check=list(HealthCheck))  # Some chains are refused, and drawn again.
@given(chains(), st.data())
def test_every_shard_is_what_numpy_makes_of_it(situation, data):
    stored, chain = situation
    wanted = chain.wanted
    try:
        plan = TransformMap(chain.rules).plan(specs(stored), specs(wanted))
    except TransformError as refusal:
        assert all(NO_BOX in problem for problem in refusal.problems), refusal
        assume(False)
        return
    for name, array in wanted.items():
        for box in shards(data.draw, array.shape):
            takes = plan.takes(name, box)
            shard = read(takes, box, array.dtype, stored)
            assert shard.tobytes() == np.ascontiguousarray(array[box.index]).tobytes()
            assert n_read(takes) <= math.prod(box.shape)


@st.composite
def reshapes(draw):
    """A shape, and one in which some of its axes beside each other are merged and others split."""
    found, wanted = [], []
    for _ in range(draw(st.integers(1, 3))):
        sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
        one, many = [math.prod(sizes)], list(sizes)
        found, wanted = (
            (found + one, wanted + many) if draw(st.booleans()) else (found + many, wanted + one)
        )
    return tuple(found), tuple(wanted), draw(st.permutations(range(len(wanted))))


@given(reshapes(), st.data())
def test_merging_and_splitting_axes_is_never_refused(situation, data):
    found, wanted, axes = situation
    stored = {"x": np.arange(math.prod(found)).reshape(found)}
    made = stored["x"].reshape(wanted).transpose(axes)
    plan = TransformMap([r.reshape("x", wanted), r.transpose("x", axes)]).plan(
        specs(stored), specs({"x": made})
    )
    for box in shards(data.draw, made.shape):
        assert (read(plan.takes("x", box), box, made.dtype, stored) == made[box.index]).all()


@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 6), st.data())
def test_a_shard_of_a_stack_reads_its_own_elements_only(n_layers, rows, columns, data):
    specs_of = {f"x{i}": ((rows, columns), np.float32) for i in range(n_layers)}
    plan = TransformMap([r.stack(r"x(\d)", "x")]).plan(
        specs_of, {"x": ((n_layers, rows, columns), np.float32)}
    )
    shape = (n_layers, rows, columns)
    for box in shards(data.draw, shape):
        takes = plan.takes("x", box)
        assert n_read(takes) == math.prod(box.shape)
        layers = range(box.start[0], box.start[0] + box.shape[0])
        assert [take.leaf for take in takes] == [f"x{i}" for i in layers]
        assert {take.box for take in takes} == {Box(box.start[1:], box.shape[1:])}
