"""What a reader does for one box of a wanted leaf: takes, fills, and calls of functions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from lazy_orbax.plan.boxes import Box, Shape
from lazy_orbax.plan.transforms.cuts import Index


@dataclasses.dataclass(frozen=True, slots=True)
class Take:
    """One box of a stored leaf, and where it belongs in the shard.

    `shard[index].transpose(axes).reshape(shape)` is a view of a shard in C order, of the shape of
    the box. The reader casts to the dtype of the shard, and multiplies by `factor` then.

    Attributes:
        leaf: the stored leaf, as Orbax names it.
        box: the part of it that is read.
        index: where it belongs in the shard.
        axes: how the axes of that are exchanged.
        shape: the shape of the box.
        factor: what the view is multiplied by after it was filled, or `None`.
        source: the checkpoint that has the leaf; empty where there is one only.
    """

    leaf: str
    box: Box
    index: Index
    axes: tuple[int, ...]
    shape: Shape
    factor: float | None = None
    source: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Fill:
    """A part of the shard that has one value: `shard[index] = value`.

    Attributes:
        index: the part of the shard.
        value: the value, a scalar of a dtype that the leaf has.
    """

    index: Index
    value: Any


@dataclasses.dataclass(frozen=True, slots=True)
class Init:
    """A shard that a function makes: `shard[index] = init.values()`.

    Attributes:
        index: all of the shard.
        function: what makes it, called with the leaf's name, shape and dtype, and the shard as an
            index into the leaf.
        leaf: the wanted leaf.
        shape: its shape.
        dtype: its dtype.
        box: the shard.
    """

    index: Index
    function: Callable[[str, Shape, Any, Index], Any]
    leaf: str
    shape: Shape
    dtype: Any
    box: Box

    def values(self) -> Any:
        """Returns what the function makes of the shard."""
        return self.function(self.leaf, self.shape, self.dtype, self.box.index)
