"""One rule, as a record."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from lazy_orbax.errors import TransformError

LAYER = "{layer}"
"""What stands for the number of a layer in a template."""
_ALONE = ("cast", "select", "init")
"""Rules that moments do not follow, unless they are told to."""
FILTERS = ("select", "drop")
_REFERENCE = re.compile(r"\\(?:(\d{1,2})|g<(\w+)>)|\{layer\}")
RENAMING = ("rename", *FILTERS)
"""What fits leaves of every shape and dtype."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """One rule. The functions of `rules` make them.

    Attributes:
        verb: the function that made it.
        patterns: patterns of the names that it is about.
        into: templates of the names that it gives; none where leaves keep theirs.
        settings: what else was passed.
        source: the checkpoint whose leaves it is about; `None` is all of them.
        moments: whether optimizer moments follow their parameter.
        text: how it was written.
    """

    verb: str
    patterns: tuple[str, ...]
    into: tuple[str, ...] = ()
    settings: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    source: str | None = None
    moments: bool = False
    text: str = ""

    def __post_init__(self):
        for pattern in self.patterns:
            try:
                re.compile(pattern)
            except re.error as failure:
                raise TransformError(
                    [f"{self}: {pattern!r} is no regular expression ({failure})"]
                ) from failure

    def __str__(self) -> str:
        return self.text


def made_rule(
    verb: str,
    arguments: Sequence[Any],
    patterns: Sequence[str],
    into: Sequence[str] = (),
    settings: dict[str, Any] | None = None,
    common: tuple[str | None, bool] = (None, False),
) -> Rule:
    """Makes a rule that knows how it was written."""
    settings, (source, moments) = settings or {}, common
    shown = [_shown(argument) for argument in arguments]
    shown += [f"{key}={_shown(value)}" for key, value in settings.items() if value is not None]
    shown += [f"source={source!r}"] if source is not None else []
    shown += [f"moments={moments}"] if moments != (verb not in _ALONE) else []
    text = f"{verb}({', '.join(shown)})"
    return Rule(verb, tuple(patterns), tuple(into), settings, source, moments, text)


def _shown(value: Any) -> str:
    """Returns a setting as it was written, or nearly so."""
    if isinstance(value, np.dtype):
        return repr(value.name)
    return getattr(value, "__name__", None) or repr(value)


def expanded(template: str, match: re.Match[str], layer: int | None = None) -> str:
    """Returns a template with what a pattern found. `Match.expand` parses it for each leaf anew.

    Args:
        template: the template.
        match: what the pattern found.
        layer: what `{layer}` becomes, if anything.

    Raises:
        IndexError: the pattern has no such group.
    """

    def found(reference: re.Match[str]) -> str:
        number, name = reference.groups()
        if number is None and name is None:
            return reference[0] if layer is None else str(layer)
        return match[int(number)] or "" if number else match[name] or ""

    return _REFERENCE.sub(found, template)
