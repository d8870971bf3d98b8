"""What may stand for a leaf that is lost, and the record of what did."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from lazy_orbax.errors import OptionError


@dataclasses.dataclass(frozen=True)
class FromStep:
    """A replacement: the leaf as an older step has it.

    Attributes:
        step: that step.

    Raises:
        OptionError: it is no step.
    """

    step: int

    def __post_init__(self) -> None:
        if not _is_whole(self.step):
            raise OptionError(f"FromStep({self.step!r}): a step is a whole number, at least 0.")


@dataclasses.dataclass(frozen=True)
class FromNeighbours:
    """A replacement: the leaf rebuilt from the same leaf of the layers beside it.

    It is the mean of both, each weighted by the norm of its gradient, the rule of CheckFree
    (Blagoev, Ersoy and Chen, *All is Not Lost: LLM Recovery without Checkpoints*, 2025,
    arXiv:2506.15461). A layer at an end has one neighbour, which is copied, as in CheckFree+. The
    moments of a rebuilt parameter are zeros.

    The weights are, where they are not given, those in the custom metadata of the item:
    `{"gradient_norms": {"params.blocks.0": 0.7, ...}}`, by the name of a leaf or of a tree of them
    (of stacked layers, a list). They are norms after clipping; 1e-4 is added to each. Where there
    are none, both weigh the same.

    Attributes:
        before: name of the leaf in the layer before, as Orbax names it.
        after: the same of the layer after.
        weights: of the one before and of the one after.
        layer: of a leaf that is a stack of layers, the one that is lost. Its neighbours are in the
            same leaf; `before` and `after` are not given.
        axis: the axis along which they are stacked.

    Raises:
        OptionError: they do not name neighbours, or are no weights.
    """

    before: str | None = None
    after: str | None = None
    weights: tuple[float, float] | None = None
    layer: int | None = None
    axis: int = 0

    def __post_init__(self) -> None:
        names = [name for name in (self.before, self.after) if name is not None]
        if self.layer is not None and (names or not _is_whole(self.layer)):
            raise OptionError(f"{self}: a layer is a whole number, whose neighbours have no names.")
        if self.layer is None and (not names or not all(isinstance(n, str) for n in names)):
            raise OptionError(f"{self} names no neighbour. Give before, after, or both; or layer.")
        if not _is_whole(self.axis):
            raise OptionError(f"{self}: an axis is a whole number, at least 0.")
        if self.weights is not None and not _are_weights(self.weights):
            raise OptionError(f"{self}: weights are two numbers, at least 0 and not both 0.")


@dataclasses.dataclass(frozen=True)
class Replaced:
    """A leaf that was replaced.

    Attributes:
        leaf: the leaf, as Orbax names it.
        by: what it was replaced by.
        why: what is wrong with what was saved.
    """

    leaf: str
    by: str
    why: str


@dataclasses.dataclass(frozen=True)
class RestoredWithReplacements:
    """What `restore_replacing` restored.

    Attributes:
        value: the tree.
        replaced: every leaf that is not what was saved at that step. Keep it with the run.
        not_needed: leaves for which a replacement was given, and which were restored as saved.
        learning_rate_factor: by what CheckFree multiplies the learning rate from here on: 1.1 if a
            layer was rebuilt from its neighbours, else 1.
    """

    value: Any = dataclasses.field(repr=False)
    replaced: tuple[Replaced, ...]
    not_needed: tuple[str, ...]
    learning_rate_factor: float = 1.0


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and int(value) >= 0


def _are_weights(weights: Any) -> bool:
    return (
        isinstance(weights, tuple | list)
        and len(weights) == 2
        and all(isinstance(w, int | float) and math.isfinite(w) and w >= 0 for w in weights)
        and sum(weights) > 0
    )
