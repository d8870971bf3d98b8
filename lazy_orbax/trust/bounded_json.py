"""JSON of bounded depth, and what is wrong in it: what the checks of Orbax's files share."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from lazy_orbax.errors import MalformedCheckpointError
from lazy_orbax.trust.files import brief

MOST_DIMENSIONS = 32

# Says where (for a leaf its key path, and the part), what was found and what was wanted.
Complain = Callable[[str | tuple[str, str], Any, str], None]


class Complaints:
    """Collects what is wrong in one file."""

    def __init__(self, file: Any):
        self._file, self._problems = file, []

    def __call__(self, where: str | tuple[str, str], found: Any, wanted: str) -> None:
        """Notes one thing. The parameters are those of `Complain`."""
        if isinstance(where, tuple):  # Put into words only where there is something to say.
            where = f"leaf {brief(where[0])}, {where[1]}"
        self._problems.append(f"{where}: found {brief(found)}, wanted {wanted}")

    def raise_all(self) -> None:
        """Raises what was noted, if anything was.

        Raises:
            MalformedCheckpointError: something was.
        """
        if self._problems:
            raise MalformedCheckpointError.of(self._file, self._problems)


def is_shape(value: Any) -> bool:
    """Whether a value is a list of sizes."""
    if not isinstance(value, list) or len(value) > MOST_DIMENSIONS:
        return False
    for size in value:  # noqa: SIM110 - `all` takes twice as long, and leaves are many.
        if type(size) is not int or not 0 <= size < 2**62:
            return False
    return True


def parse_json(content: bytes | str, where: Any, wanted: type = dict) -> Any:
    """Returns JSON as values, of bounded depth.

    Raises:
        MalformedCheckpointError: it is no JSON, is nested too deeply, or is not a `wanted`.
    """
    try:
        text = content.decode() if isinstance(content, bytes) else content
        value = json.loads(text)
    except RecursionError as error:
        raise MalformedCheckpointError(where, "JSON nested too deeply", "flat metadata") from error
    except ValueError as error:
        found = f"{len(content)} bytes that are no JSON ({brief(str(error))})"
        raise MalformedCheckpointError(where, found, "a JSON object") from error
    if not isinstance(value, wanted):
        raise MalformedCheckpointError(where, brief(value), f"a JSON {wanted.__name__}")
    return value
