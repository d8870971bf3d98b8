"""Every candidate of a search, one JSON value a line: for people, and to go on from."""

from __future__ import annotations

import json
import math
import os
import pathlib
from typing import Any

from lazy_orbax.combine.search_population import Candidate
from lazy_orbax.errors import OptionError


class SearchLog:
    """The file of a search. Without a path it keeps nothing.

    Attributes:
        scores: those of candidates that an earlier run tried, in order.
    """

    def __init__(self, path: Any, header: dict[str, Any]):
        """Reads what is there. A last line that was cut off is dropped.

        Args:
            path: the file, or `None`.
            header: what must be the same for a search that goes on.

        Raises:
            OptionError: the file is of another search, or no such file at all.
        """
        self._path = None if path is None else pathlib.Path(path)
        self._known: list[dict[str, Any]] = []
        if self._path is None:
            return
        content = self._path.read_bytes() if self._path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
        except ValueError as error:
            raise OptionError(f"{path} is no log of a search: {error}. Give a new file.") from error
        text = json.dumps(header)
        is_mine = lines[0] == json.loads(text) if lines else text.encode().startswith(content)
        if not is_mine:
            raise OptionError(f"{path} is the log of another search. Give a new file.")
        self._known = lines[1:]
        if len(whole) < len(content):
            os.truncate(self._path, len(whole))
        if not lines:
            self._append(header)

    def known(self, number: int, candidate: Candidate) -> float | None:
        """Returns the score that a candidate had; `None` if it was not tried.

        Raises:
            OptionError: another one was tried then: the log is of another release.
        """
        if number >= len(self._known):
            return None
        line = self._known[number]
        if line.get("coefficients") != list(candidate.coefficients):
            what = f"{self._path} has other candidates, from {number} on"
            raise OptionError(f"{what}. Give a new file.")
        return float(line["score"])

    def add(self, number: int, candidate: Candidate, score: float) -> None:
        """Notes the score of a candidate."""
        shown = score if math.isfinite(score) else str(score)  # JSON has no word for it.
        found = {"candidate": number, "origin": candidate.origin, "score": shown}
        self._append({**found, "coefficients": list(candidate.coefficients)})

    def _append(self, line: dict[str, Any]) -> None:
        if self._path is None:
            return
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
