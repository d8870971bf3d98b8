r"""What users declare: how stored leaves become wanted leaves, rule after rule.

Names are those that Orbax gives to leaves, whose keys are joined with dots. A pattern is a regular
expression that has to match all of a name; `re.escape` makes one of a name that has brackets.
Templates of new names repeat groups of a pattern as `\1` or `\g<name>`.

A rule about a parameter is about its moments too, which have their names from it. A pattern that
matches the name of a moment itself is about that moment, whatever `moments` says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from lazy_orbax.errors import TransformError
from lazy_orbax.plan.transforms.rule import LAYER, Rule, made_rule


def rename(
    pattern: str, replacement: str, *, source: str | None = None, moments: bool = True
) -> Rule:
    """Gives leaves other names.

    Args:
        pattern: names of the leaves.
        replacement: template of the names that they get.
        source: the checkpoint whose leaves are meant; `None` is all of them.
        moments: whether the moments of a parameter follow it.
    """
    return made_rule(
        "rename", [pattern, replacement], [pattern], [replacement], {}, (source, moments)
    )


def stack(
    pattern: str,
    into: str,
    axis: int = 0,
    *,
    numbers: Sequence[int] | None = None,
    source: str | None = None,
    moments: bool = True,
) -> Rule:
    """Stacks the layers of a model that become a scanned one.

    Args:
        pattern: names of the leaves. The group `layer`, or else the first one, is the number of
            the layer.
        into: template of the name of the stack.
        axis: the new axis.
        numbers: the numbers of the layers in their order, such as `range(1, 24, 2)`; `None`: those
            that are found, of which none may be missing between the first and the last.
        source: the checkpoint whose leaves are meant; `None` is all of them.
        moments: whether the moments of a parameter follow it.
    """
    settings = {"axis": axis, "numbers": numbers}
    return made_rule("stack", [pattern, into], [pattern], [into], settings, (source, moments))


def unstack(
    name: str,
    into: str,
    axis: int = 0,
    *,
    numbers: Sequence[int] | None = None,
    source: str | None = None,
    moments: bool = True,
) -> Rule:
    """Takes the layers of a scanned model apart.

    Args:
        name: names of the stacks, as a pattern.
        into: template of the names of the layers, in which `{layer}` is the number of the layer.
        axis: the axis along which they are stacked.
        numbers: the numbers of the layers in their order; `None` counts from zero on.
        source: the checkpoint whose leaves are meant; `None` is all of them.
        moments: whether the moments of a parameter follow it.

    Raises:
        TransformError: `into` has no `{layer}`.
    """
    if LAYER not in into:
        raise TransformError([f"unstack({name!r}, {into!r}): the template needs {LAYER}"])
    settings = {"axis": axis, "numbers": numbers}
    return made_rule("unstack", [name, into], [name], [into], settings, (source, moments))


def split(
    name: str,
    into: Sequence[str],
    axis: int,
    sizes: Sequence[int] | None = None,
    *,
    source: str | None = None,
    moments: bool = True,
) -> Rule:
    """Cuts leaves along an axis, such as a fused QKV into three.

    Args:
        name: names of the leaves, as a pattern.
        into: templates of the names of the pieces, in their order.
        axis: the axis.
        sizes: indexes of each piece on that axis; `None`: all have as many.
        source: the checkpoint whose leaves are meant; `None` is all of them.
        moments: whether the moments of a parameter follow it.

    Raises:
        TransformError: there are not as many sizes as templates.
    """
    if sizes is not None and len(sizes) != len(into):
        raise TransformError([f"split({name!r}): {len(into)} names and {len(sizes)} sizes"])
    settings = {"axis": axis, "sizes": None if sizes is None else tuple(sizes)}
    return made_rule("split", [name, list(into)], [name], into, settings, (source, moments))


def fuse(
    names: Sequence[str],
    into: str,
    axis: int,
    *,
    source: str | None = None,
    moments: bool = True,
) -> Rule:
    """Concatenates leaves along an axis, such as Q, K and V of any sizes.

    Args:
        names: names of the leaves, a pattern for each in their order. Leaves belong together for
            which `into` gives the same name.
        into: template of that name.
        axis: the axis.
        source: the checkpoint whose leaves are meant; `None` is all of them.
        moments: whether the moments of a parameter follow it.
    """
    settings = {"axis": axis}
    return made_rule("fuse", [list(names), into], names, [into], settings, (source, moments))


def pad_to(
    name: str,
    shape: Sequence[int | None],
    value: float = 0,
    *,
    source: str | None = None,
    moments: bool = True,
) -> Rule:
    """Fills leaves up behind the end of their axes, such as a vocabulary.

    Args:
        name: names of the leaves, as a pattern.
        shape: the shape that they get; `None` leaves an axis as it is.
        value: what is filled in.
        source: the checkpoint whose leaves are meant; `None` is all of them.
        moments: whether the moments of a parameter follow it; they are filled with zeros.
    """
    settings = {"shape": tuple(shape), "value": value}
    return made_rule("pad_to", [name], [name], (), settings, (source, moments))


def strip(
    name: str, shape: Sequence[int | None], *, source: str | None = None, moments: bool = True
) -> Rule:
    """Leaves out what leaves have behind a shape, such as the padding of a vocabulary.

    Args:
        name: names of the leaves, as a pattern.
        shape: the shape that they get; `None` leaves an axis as it is.
        source: the checkpoint whose leaves are meant; `None` is all of them.
        moments: whether the moments of a parameter follow it.
    """
    return made_rule("strip", [name], [name], (), {"shape": tuple(shape)}, (source, moments))


def transpose(
    name: str,
    axes: Sequence[int] | None = None,
    *,
    source: str | None = None,
    moments: bool = True,
) -> Rule:
    """Exchanges the axes of leaves, as `np.transpose` does.

    Args:
        name: names of the leaves, as a pattern.
        axes: the axes in their new order; `None` reverses them.
        source: the checkpoint whose leaves are meant; `None` is all of them.
        moments: whether the moments of a parameter follow it.
    """
    settings = {"axes": None if axes is None else tuple(axes)}
    return made_rule("transpose", [name], [name], (), settings, (source, moments))


def reshape(
    name: str, shape: Sequence[int], *, source: str | None = None, moments: bool = True
) -> Rule:
    """Merges and splits axes beside each other, as `np.reshape` does.

    Args:
        name: names of the leaves, as a pattern.
        shape: the shape that they get; one -1 stands for what is left.
        source: the checkpoint whose leaves are meant; `None` is all of them.
        moments: whether the moments of a parameter follow it.
    """
    return made_rule("reshape", [name], [name], (), {"shape": tuple(shape)}, (source, moments))


def cast(pattern: str, dtype: Any, *, source: str | None = None, moments: bool = False) -> Rule:
    """Gives leaves another dtype, which happens once, as the last thing.

    Args:
        pattern: names of the leaves.
        dtype: the dtype, or its name.
        source: the checkpoint whose leaves are meant; `None` is all of them.
        moments: whether the moments of a parameter follow it. They have dtypes of their own.

    Raises:
        TransformError: there is no such dtype, or it is not of numbers.
    """
    try:
        named = getattr(ml_dtypes, dtype, dtype) if isinstance(dtype, str) else dtype
        dtype = np.dtype(named)
    except TypeError as failure:
        raise TransformError([f"cast({pattern!r}): {dtype!r} is no dtype"]) from failure
    if dtype.kind in "OSUMm" or dtype.names:
        raise TransformError([f"cast({pattern!r}): {dtype} is no dtype of numbers"])
    return made_rule("cast", [pattern], [pattern], (), {"dtype": dtype}, (source, moments))


def scale(pattern: str, factor: float, *, source: str | None = None, moments: bool = True) -> Rule:
    """Multiplies leaves, after they were cast.

    Adam's moments cannot follow: the first one would be divided by the factor, the second one by
    its square, and what the optimizer does next would be the same only for some optimizers. A
    wanted moment of a scaled parameter is therefore an error.

    Args:
        pattern: names of the leaves.
        factor: the factor.
        source: the checkpoint whose leaves are meant; `None` is all of them.
        moments: `False` leaves moments of a scaled parameter as they are.
    """
    return made_rule("scale", [pattern], [pattern], (), {"factor": factor}, (source, moments))


def select(pattern: str, *, source: str | None = None, moments: bool = False) -> Rule:
    """Drops all leaves but some.

    Args:
        pattern: names of the leaves that stay.
        source: the checkpoint whose leaves are meant; `None` is all of them.
        moments: whether the moments of a parameter that stays do so too.
    """
    return made_rule("select", [pattern], [pattern], (), {}, (source, moments))


def drop(pattern: str, *, source: str | None = None, moments: bool = True) -> Rule:
    """Drops leaves.

    Args:
        pattern: names of the leaves.
        source: the checkpoint whose leaves are meant; `None` is all of them.
        moments: whether the moments of a parameter follow it.
    """
    return made_rule("drop", [pattern], [pattern], (), {}, (source, moments))


def init(pattern: str, value: float | Callable[..., Any]) -> Rule:
    """Makes wanted leaves that are not stored.

    Args:
        pattern: names of the wanted leaves.
        value: a value for all elements, or a function. It is called for each shard with the leaf's
            name, shape and dtype, and the shard as an index into the leaf; it returns the shard.
    """
    return made_rule("init", [pattern], [pattern], (), {"value": value})
