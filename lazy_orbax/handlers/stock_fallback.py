"""What a lazy handler is where this Orbax is not known: its saves are stock saves, with a warning.

Also the checks of what both kinds are given.
"""

from __future__ import annotations

import functools
from typing import Any

from lazy_orbax._orbax import handed_in, symbols
from lazy_orbax._orbax.symbols import ocp
from lazy_orbax.errors import OptionError
from lazy_orbax.options import LazyOptions
from lazy_orbax.restore.misfits import explained
from lazy_orbax.restore.verified import STAGING_BYTES, examined
from lazy_orbax.trust.malformed import checked

GB = 10**9
STOCK_CONCURRENT_GB = STAGING_BYTES // GB


class StockFallback(ocp.PyTreeCheckpointHandler):
    """Takes what `LazyCheckpointHandler` takes, and saves and restores as stock Orbax does."""

    def __init__(
        self,
        *,
        options: LazyOptions | None = None,
        save_concurrent_gb: int | None = None,
        restore_concurrent_gb: int | None = None,
        save_device_host_concurrent_gb: int | str | None = None,
        **keywords: Any,
    ):
        """Warns, and creates a handler.

        Args:
            options: as of `LazyCheckpointHandler`; without effect on saves.
            save_concurrent_gb: the same.
            restore_concurrent_gb: as in stock Orbax.
            save_device_host_concurrent_gb: as `options`.
            **keywords: every other keyword of `ocp.PyTreeCheckpointHandler`.

        Raises:
            OptionError: a value is out of range.
        """
        self.options = checked_options(options)
        limit_bytes(
            self.options,
            save_concurrent_gb=save_concurrent_gb,
            save_device_host_concurrent_gb=save_device_host_concurrent_gb,
            restore_concurrent_gb=restore_concurrent_gb,
            memory_limits=keywords.get("memory_limit_options"),
        )
        symbols.warn_if_stock()
        keywords.setdefault("use_compression", False)
        restore_gb = restore_concurrent_gb or STOCK_CONCURRENT_GB
        super().__init__(restore_concurrent_gb=restore_gb, **keywords)
        self.typestr = ocp.PyTreeCheckpointHandler.typestr

    async def async_save(  # type: ignore[override]
        self, directory: Any, args: Any
    ) -> Any:
        """Saves the stock way."""
        return await super().async_save(directory, args=handed_in.save_args(args))

    def restore(  # type: ignore[override]
        self, directory: Any, args: Any = None
    ) -> Any:
        """Restores the stock way, after a look at what is there.

        Raises:
            OptionError: there are transforms, which stock Orbax does not know.
            RestoreError: the target does not fit what is stored.
            MalformedCheckpointError: it is not a checkpoint that Orbax wrote.
        """
        if getattr(args, "transforms", None) is not None:
            raise OptionError("transforms need an orbax-checkpoint that lazy_orbax knows.")
        stock_args = handed_in.restore_args(args) if args else args
        read = functools.partial(super().restore, directory, args=stock_args)
        with examined(directory, args, verifies=False), explained(self.metadata, directory, args):
            return read()

    def metadata(self, directory: Any) -> Any:
        """Returns what Orbax says about the leaves of a checkpoint.

        Raises:
            MalformedCheckpointError: it is not a checkpoint that Orbax wrote.
        """
        with checked(directory, None):
            return super().metadata(directory)


def checked_options(options: Any) -> LazyOptions:
    """Returns the options, or those by default.

    Raises:
        OptionError: they are something else.
    """
    options = options or LazyOptions()
    if not isinstance(options, LazyOptions):
        raise OptionError(f"options={options!r} is not a lazy_orbax.LazyOptions.")
    return options


def limit_bytes(options: LazyOptions, *, memory_limits: Any, **gb: Any) -> int:
    """Returns the most bytes of snapshot in host memory; the smallest of all limits counts.

    Raises:
        OptionError: a limit is no positive number.
    """
    most_bytes = options.host_limit_bytes
    gb["max_transfer_concurrent_gb"] = getattr(memory_limits, "max_transfer_concurrent_gb", None)
    for name, value in gb.items():
        if value is None or value == "auto":
            continue
        if not isinstance(value, int | float) or value <= 0:
            raise OptionError(f"{name}={value!r} must be a positive number of GB.")
        if not name.startswith("restore"):
            most_bytes = min(most_bytes, int(value * GB))
    return most_bytes
