"""Which leaves are moments of which parameter, in the trees that Optax's optimizers keep?"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterable, Mapping

from lazy_orbax.plan.boxes import Shape

_FIELDS = (
    "mu nu nu_max trace ema m m1 m2 n v v_row v_col s x0 z exp_avg exp_avg_sq grad_sum "
    "grad_sum_sq params0 init_params acc_grads avg_grad mean_grads sum_sq_diff_grads "
    "sum_of_squares sum_sq_norm_grads init_particles cumulative_gradients subgradients reward "
    "e_g e_x prev_updates step_sizes"
)
MOMENTS = (
    r"(?:.+\.)?(?:[^.]*_)?opt(?:_[^.]*|im[^.]*)?\.(?:.+\.)?(?:" + "|".join(_FIELDS.split()) + ")"
)
"""Matches the path of a tree of moments: a field of Optax's states, inside of `opt_state`.

A parameter may be called `mu` as well, so that an optimizer must stand before the field.
"""
_MOST_ASKED = 4


@dataclasses.dataclass(frozen=True, slots=True)
class Moment:
    """What an optimizer keeps for a parameter.

    Attributes:
        head: the path of the tree of moments, such as `opt_state.0.mu`.
        prefix: the path of the tree of parameters, such as `params`.
        is_alike: whether it was stored in the shape of its parameter.
    """

    head: str
    prefix: str
    is_alike: bool = True

    def parameter(self, name: str) -> str:
        """Returns the name of the parameter of the moment that has this name."""
        return joined_path(self.prefix, name.removeprefix(self.head + "."))


def joined_path(*parts: str) -> str:
    """Returns a name made of paths, of which some may be empty."""
    return ".".join(part for part in parts if part)


def find_moments(shapes: Mapping[str, Shape], pattern: str) -> dict[str, Moment]:
    """Returns the moments among leaves, by name.

    The parameters of a tree of moments are the tree which holds most of its paths.

    Args:
        shapes: shapes of the leaves of one checkpoint, by name.
        pattern: what the path of a tree of moments must match.
    """
    heads: dict[str, str] = {}
    trees = collections.defaultdict(list)
    known: dict[str, bool] = {}
    expression = re.compile(pattern)
    for name in shapes:
        for dot in re.finditer(r"\.", name):
            head = name[: dot.start()]
            if head not in known:
                known[head] = expression.fullmatch(head) is not None
            if known[head]:
                heads[name] = head
                trees[head].append(name[dot.end() :])
                break
    parameters = [name for name in shapes if name not in heads]
    found = {}
    for head, tails in trees.items():
        prefix = _prefix(tails, parameters)
        for tail in tails:
            name, parameter = f"{head}.{tail}", joined_path(prefix, tail)
            shape = shapes.get(parameter, shapes[name])
            found[name] = Moment(head, prefix, shape == shapes[name])
    return found


def _prefix(tails: list[str], parameters: Iterable[str]) -> str:
    """Returns the path of the tree that holds most of the paths `tails`."""
    names, candidates = set(parameters), set()
    for tail in sorted(tails, key=lambda tail: -tail.count("."))[:_MOST_ASKED]:
        ending = f".{tail}"
        candidates |= {name.removesuffix(ending) for name in names if name.endswith(ending)}
        if tail in names:
            candidates.add("")

    def merit(prefix: str) -> tuple[int, bool, int, str]:
        n_held = sum(joined_path(prefix, tail) in names for tail in tails)
        return (-n_held, "params" not in prefix.split("."), prefix.count("."), prefix)

    return min(candidates, key=merit, default="params")
