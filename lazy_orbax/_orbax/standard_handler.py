"""A stock `StandardCheckpointHandler` that saves through another handler."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from lazy_orbax._orbax.symbols import MISSING, ocp, warn_if_stock


def inside_standard_handler(standard: Any) -> Any:
    """Returns the handler through which `standard` saves, or `None` where that is not known."""
    return getattr(standard, "_impl", None)


def put_inside_standard_handler(
    standard: ocp.StandardCheckpointHandler, pytree: ocp.PyTreeCheckpointHandler
) -> bool:
    """Makes `standard` save and restore through `pytree`, or warns that it cannot.

    Returns:
        Whether `standard` saves lazily now.
    """
    if not isinstance(inside_standard_handler(standard), ocp.PyTreeCheckpointHandler):
        warn_if_stock(["StandardCheckpointHandler._impl"])
        return False
    standard._impl = pytree
    validate = getattr(standard, "_validate_save_state", None)
    supported = getattr(standard, "_supported_types", None)
    if validate is not None and supported is not None:

        def validate_by_type(item: Any, save_args: Any = None) -> Any:
            # What stock Orbax finds out leaf by leaf, in Python, depends only on their types.
            types = set(map(type, jax.tree.leaves(item)))
            is_tree = item is not None and type(item) not in types
            if is_tree and save_args is None and all(map(passes_unchanged, types)):
                return item
            return validate(item, save_args=save_args)

        def passes_unchanged(type_: type) -> bool:
            if issubclass(type_, jax.Array | np.ndarray):
                return True
            return issubclass(type_, supported) and not hasattr(type_, "__array__")

        standard._validate_save_state = validate_by_type
    return not MISSING
