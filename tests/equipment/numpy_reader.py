"""Makes shards of wanted leaves from stored NumPy arrays, as a reader would."""

import itertools
import math

import numpy as np

from lazy_orbax.plan.boxes import Box
from lazy_orbax.plan.transforms.takes import Fill, Init, Take


def whole(shape):
    return Box((0,) * len(shape), tuple(shape))


def read(takes, box, dtype, stored):
    """Executes what makes a shard, and checks that its elements are written once.

    Args:
        takes: what makes the shard.
        box: the shard.
        dtype: its dtype.
        stored: the stored leaves, by name, or by checkpoint and name.
    """
    shard, n_written = np.empty(box.shape, dtype), np.zeros(box.shape, int)
    for take in takes:
        n_written[take.index] += 1
        if isinstance(take, Take):
            view = shard[take.index].transpose(take.axes).reshape(take.shape, copy=False)
            assert view.shape == take.shape == take.box.shape
            leaves = stored[take.source] if take.source else stored
            assert take.box.is_within(whole(leaves[take.leaf].shape)) or not take.box.shape
            view[...] = leaves[take.leaf][take.box.index]
            if take.factor is not None:
                np.multiply(view, take.factor, out=view, casting="unsafe")
        else:
            assert isinstance(take, Fill | Init)
            shard[take.index] = take.value if isinstance(take, Fill) else take.values()
    assert (n_written == 1).all()
    return shard


def n_read(takes):
    """Elements that takes read."""
    return sum(math.prod(take.shape) for take in takes if isinstance(take, Take))


def grid(shape, cuts):
    """The boxes between `cuts` of each axis."""
    edges = [sorted({0, n, *(c for c in own if c < n)}) for n, own in zip(shape, cuts, strict=True)]
    sides = [list(itertools.pairwise(own)) for own in edges]
    for corner in itertools.product(*sides):
        yield Box(tuple(a for a, _ in corner), tuple(b - a for a, b in corner))


def specs(arrays):
    """Shape and dtype of each array, by name."""
    return {name: (array.shape, array.dtype) for name, array in arrays.items()}


def assert_makes(plan, stored, wanted):
    """Checks that a plan makes the wanted arrays, whole and in quarters along each axis."""
    for name, array in wanted.items():
        boxes = [whole(array.shape), *grid(array.shape, [(n // 2,) for n in array.shape])]
        for box in boxes:
            takes = plan.takes(name, box)
            shard = read(takes, box, array.dtype, stored)
            assert shard.tobytes() == np.ascontiguousarray(array[box.index]).tobytes(), (name, box)
            assert n_read(takes) <= math.prod(box.shape)
