"""What is different where a checkpoint goes to an object store: addresses and retries.

A write that an object store has acknowledged is durable: there is nothing to sync, and an object
appears whole or not at all. What may fail is the way there: `deadline.py`.
"""

from __future__ import annotations

import json
from typing import Any

import tensorstore as ts

from lazy_orbax import _paths
from lazy_orbax._orbax import on_disk
from lazy_orbax._orbax.symbols import ocp
from lazy_orbax.errors import OptionError

# They stand for the item's directory in everything that is kept from save to save.
_DIRECTORY = "lazy-orbax-directory"
_BUCKET = "lazy-orbax-bucket"

# `LazyOptions.storage_timeout_s` of who reads without options.
STORAGE_TIMEOUT_S = 300.0
# The share of the deadline in which TensorStore may try again: its own error says which object it
# was and what the server answered, so it should come before ours.
_RETRY_SHARE = 2 / 3
_FIRST_DELAY_S = 1.0
_LONGEST_DELAY_S = 32.0


def scheme_of(directory: str) -> str:
    """Returns `gs` for `gs://bucket/path`, and nothing for a local directory."""
    scheme, separator, _ = directory.partition("://")
    return scheme if separator else ""


def stand_in(directory: str) -> str:
    """Returns what stands for `directory`, and every other of its kind, in a plan.

    Raises:
        OptionError: Orbax cannot write there.
    """
    scheme = scheme_of(directory)
    if not scheme:
        return f"/{_DIRECTORY}"
    address = f"{scheme}://{_BUCKET}/{_DIRECTORY}"
    if on_disk.directory_kvstore_spec(address).get("bucket") != _BUCKET:
        raise OptionError(
            f"{directory}: orbax-checkpoint {ocp.__version__} does not write to {scheme}:// (it "
            "would take the address for a local path). Use gs:// or a local directory, which may "
            "be a mounted bucket."
        )
    return address


def kvstore_spec(template: str, directory: str) -> dict[str, Any]:
    """Returns a key-value store's spec with `directory` in the place of its stand-in.

    Args:
        template: JSON that Orbax made for the stand-in of `directory`.
        directory: the item's directory.

    Raises:
        OptionError: the template is for a directory of another kind.
    """
    scheme = scheme_of(directory)
    if (_BUCKET in template) != bool(scheme):
        raise OptionError(
            f"{directory}: Orbax told where to save only after the save was planned for another "
            "kind of storage. Give the checkpointer the address itself."
        )
    if not scheme:
        path = _paths.without_dots(directory)
        return json.loads(template.replace(f"/{_DIRECTORY}", _as_json(path)))
    bucket, _, path = directory.removeprefix(f"{scheme}://").partition("/")
    return json.loads(
        template.replace(_BUCKET, _as_json(bucket)).replace(_DIRECTORY, _as_json(path))
    )


def plain_kvstore_spec(directory: str) -> dict[str, Any]:
    """Returns the spec of a directory, or an address, as a plain key-value store."""
    scheme = scheme_of(directory)
    if not scheme:
        return {"driver": "file", "path": _paths.without_dots(directory).rstrip("/") + "/"}
    bucket, _, path = directory.removeprefix(f"{scheme}://").partition("/")
    driver = {"gs": "gcs"}.get(scheme, scheme)
    return {"driver": driver, "bucket": bucket, "path": path.rstrip("/") + "/"}


def open_store(directory: str, timeout_s: float = STORAGE_TIMEOUT_S) -> ts.KvStore:
    """Returns a directory, or an address, as a plain key-value store.

    Args:
        directory: the directory.
        timeout_s: most seconds in which an object store may do nothing.
    """
    context = ts.Context(context_spec(directory, timeout_s))
    return ts.KvStore.open(plain_kvstore_spec(directory), context=context).result()


def _as_json(text: str) -> str:
    return json.dumps(text)[1:-1]


def context_spec(directory: str, timeout_s: float) -> dict[str, Any]:
    """Returns what TensorStore is to be told of retries; nothing for a local directory.

    How many requests run at once stays TensorStore's: `TENSORSTORE_GCS_REQUEST_CONCURRENCY` or 32.
    """
    scheme = scheme_of(directory)
    if not scheme:
        return {}
    first_s = min(_FIRST_DELAY_S, timeout_s / 32)
    longest_s = min(_LONGEST_DELAY_S, timeout_s / 8)
    tries, total_s = 0, 0.0
    while total_s <= timeout_s * _RETRY_SHARE:
        total_s += min(first_s * 2**tries, longest_s) + first_s  # The last is the jitter.
        tries += 1
    retries = {
        "max_retries": tries - 1,
        "initial_delay": f"{round(first_s * 1000)}ms",
        "max_delay": f"{round(longest_s * 1000)}ms",
    }
    return {f"{'gcs' if scheme == 'gs' else scheme}_request_retries": retries}
