"""What lies in a directory of a bucket, and how large it is: asked once, and known for a while."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

_LOG = logging.getLogger("lazy_orbax")


@contextlib.contextmanager
def listed(address: str) -> Iterator[dict[str, int] | None]:
    """Gives the bytes of every object, by its path below an address; `None` where none is told.

    Meanwhile epath, and so Orbax, ask for none of these objects again. Then they do: what they were
    told would stay true for them for ever, and a step may be removed and saved again.

    Args:
        address: such as `gs://bucket/path`.
    """
    root = address.removeprefix("gs://").rstrip("/")
    try:
        import fsspec

        # With the arguments of epath it is the same one, whose listings epath looks at first.
        system: Any = fsspec.filesystem("gcs", finalize_on_close=True)
        known = set(system.dircache)
        found = system.find(root, detail=True)
    except Exception as error:  # noqa: BLE001 - Without it, each object is asked for by itself.
        _LOG.debug("%s was not listed: %r.", address, error)
        yield None
        return
    names = {path.removeprefix(f"{root}/"): entry for path, entry in found.items() if path != root}
    sizes = {name: int(entry["size"]) for name, entry in names.items() if not name.endswith("/")}
    try:
        yield sizes
    finally:
        for folder in {f"{root}/{folder}".rstrip("/") for folder in _folders(sizes)} - known:
            system.dircache.pop(folder, None)


def _folders(names: dict[str, int]) -> set[str]:
    """Returns every folder that one of these is in, however far up; the root is an empty name."""
    found = {""}
    for name in names:
        folder = name.rpartition("/")[0]
        while folder not in found:
            found.add(folder)
            folder = folder.rpartition("/")[0]
    return found
