"""Rules as JSON values, for the command line and for files beside a checkpoint."""

from __future__ import annotations

from typing import Any

from lazy_orbax.errors import TransformError
from lazy_orbax.plan.transforms import rules
from lazy_orbax.plan.transforms.rule import Rule
from lazy_orbax.plan.transforms.transform_map import TransformMap

_MAKE = {
    rule.__name__: rule
    for rule in (
        *(rules.cast, rules.drop, rules.fuse, rules.init, rules.pad_to, rules.rename),
        *(rules.reshape, rules.scale, rules.select, rules.split, rules.stack, rules.strip),
        *(rules.transpose, rules.unstack),
    )
}
_FORM = 'wanted [verb, arguments..., {"keyword": value, ...}], such as ["rename", "a", "b"]'


def map_of(values: Any) -> TransformMap:
    """Returns the rules that JSON values mean.

    Args:
        values: a list of rules, each a list of its verb and its arguments; an object at the end of
            it has those with a keyword.

    Raises:
        TransformError: they mean none.
    """
    if not isinstance(values, list):
        raise TransformError([f"rules: found {type(values).__name__}, wanted a list of rules"])
    found, problems = [], []
    for number, value in enumerate(values):
        try:
            found.append(_rule_of(value))
        except (TypeError, ValueError) as error:
            what = error.args[0] if isinstance(error, TypeError) else error
            problems.append(f"rule {number}: {what}; {_FORM}")
    if problems:
        raise TransformError(problems)
    return TransformMap(found)


def _rule_of(value: Any) -> Rule:
    if not isinstance(value, list) or not value or str(value[0]) not in _MAKE:
        raise TypeError(f"found {value!r}")
    verb, *arguments = value
    keywords = arguments.pop() if arguments and isinstance(arguments[-1], dict) else {}
    return _MAKE[verb](*arguments, **keywords)
