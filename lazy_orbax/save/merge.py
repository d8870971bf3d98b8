"""Lets Orbax merge what the processes wrote, within a deadline."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import tensorstore as ts
from etils import epath

from lazy_orbax import _paths
from lazy_orbax._orbax import on_disk
from lazy_orbax._orbax.records import Settings
from lazy_orbax.save.item_stores import CONTEXT
from lazy_orbax.storage.deadline import Deadline
from lazy_orbax.storage.places import place_of
from lazy_orbax.storage.save_error import save_error


def merge(
    settings: Settings, directory: Any, by_orbax: Callable[[], None], *, timeout_s: float
) -> None:
    """Lets Orbax merge what the processes wrote.

    Args:
        settings: how the handler saved.
        directory: the item's directory.
        by_orbax: does it in a local directory.
        timeout_s: most seconds in which the storage may do nothing.

    Raises:
        SaveError: the storage refused something, or did not answer in time.
    """
    place = str(directory)
    merging = by_orbax
    retries = place_of(place, timeout_s).context_spec()
    if retries:  # Orbax would not tell TensorStore of them.
        path, spec = epath.Path(place), {**CONTEXT, **retries}
        merging = functools.partial(_merge_with, settings, path, spec)
    try:
        Deadline(place, timeout_s).run(merging, "lazy_orbax-merge")
    except Exception as error:  # Each storage client has errors of its own.
        raise save_error(place, error, file=f"{place}/{_paths.MANIFEST}") from error


# Values as small as this are kept in nodes. One node for the readers.
INLINE_BYTES, _NODE_BYTES = 2**10, 100_000_000


def database_in(base: ts.KvStore, context: ts.Context, node_bytes: int = _NODE_BYTES) -> ts.KvStore:
    """Returns an OCDBT database, which is made if it is not there.

    Args:
        base: its directory.
        context: of TensorStore.
        node_bytes: most bytes of a node of its tree.
    """
    config = {"max_inline_value_bytes": INLINE_BYTES, "max_decoded_node_bytes": node_bytes}
    spec = {"driver": "ocdbt", "base": base.spec().to_json(), "config": config}
    return ts.KvStore.open(spec, context=context).result()


def merge_databases(
    base: ts.KvStore,
    parts: Sequence[ts.KvStore],
    context: ts.Context,
    wait: Callable[[Iterable[Any]], None],
) -> None:
    """Makes one database of several in its directory. It refers to their files.

    Args:
        base: the directory.
        parts: the databases.
        context: of TensorStore.
        wait: waits for futures of TensorStore.
    """
    transaction = ts.Transaction(atomic=True)
    into = database_in(base, context).with_transaction(transaction)
    wait([part.experimental_copy_range_to(into) for part in parts])
    wait([transaction.commit_async()])


def _merge_with(settings: Settings, directory: Any, spec: dict[str, Any]) -> None:
    context = ts.Context(spec)
    # Not `asyncio.run`: it cancels what other threads run.
    with contextlib.closing(asyncio.new_event_loop()) as loop:
        loop.run_until_complete(on_disk.finalize(settings, directory, context))
