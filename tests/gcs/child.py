"""The start of a child process: what it is told of the server comes before it imports clients."""

from __future__ import annotations

import os
from typing import Any


def run(connection: Any, environment: dict[str, str]) -> None:
    """Obeys commands until the other end closes."""
    os.environ.update(environment)
    from gcs import jobs

    jobs.serve(connection)
