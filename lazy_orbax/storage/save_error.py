"""What a storage said, as a `SaveError`."""

from __future__ import annotations

import re

from lazy_orbax import _paths
from lazy_orbax.errors import MAIN_THREAD_ENDED, SaveError


def save_error(
    directory: str, error: BaseException, *, leaf: str | None = None, file: str | None = None
) -> SaveError:
    """Returns the `SaveError` for a failure while writing to `directory`.

    Args:
        directory: the item's directory.
        error: what went wrong.
        leaf: the leaves that were being written.
        file: what was being written, where `error` does not name a file.
    """
    import jax  # Whoever only reads need not wait for it.

    text = str(error)
    if "cannot schedule new futures after" in text or "at interpreter shutdown" in text:
        text = f"{text}: {MAIN_THREAD_ENDED}"
    if match := re.search(r"[\"']([^\"']*/[^\"']*)[\"']", text):
        file = match.group(1)
    else:
        file = getattr(error, "filename", None) or file
    failure = SaveError(
        text or type(error).__name__,
        step=_paths.step_of_item(directory),
        directory=directory,
        leaf=leaf or getattr(error, "leaf", None),
        file=file,
        process=jax.process_index() if jax.process_count() > 1 else None,
    )
    failure.errno = _number_of(error, text)
    return failure


def _number_of(error: BaseException, text: str) -> int | None:
    """Returns the operating system's number of an error; TensorStore puts it in the text."""
    found = re.search(r"os_error_code='(\d+)'", text)
    return int(found.group(1)) if found else getattr(error, "errno", None)
