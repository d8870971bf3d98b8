"""v1's leaf handlers, as v0's type handlers: the same ones for each save."""

import jax
import numpy as np
import orbax.checkpoint as v0
import pytest
from orbax.checkpoint import v1

from lazy_orbax._orbax.describe import type_handlers_of
from lazy_orbax._orbax.v1 import V1
from lazy_orbax._orbax.v1_leaves import OtherLeaf, TypeHandlers

ARRAY = type(jax.numpy.zeros(1))
stock_leaf = {kind: V1[kind] for kind in ("arrays", "numpy", "scalars", "strings")}


def registry_of(context=None, leaves=None):
    with context or v1.Context():
        handler = v1.handlers.PyTreeHandler(leaf_handler_registry=leaves)
    return TypeHandlers(type_handlers_of(handler._handler_impl))


def leaves_with(leaf_type, handler_type):
    module = __import__("importlib").import_module(
        V1["arrays"].__module__.rpartition(".")[0] + ".registry"
    )
    leaves = module.StandardLeafHandlerRegistry()
    leaves.add(leaf_type, leaf_type, handler_type, override=True)
    return leaves


@pytest.mark.parametrize(
    ("leaf", "kind"),
    [
        (ARRAY, v0.type_handlers.ArrayHandler),
        (np.ndarray, v0.type_handlers.NumpyHandler),
        (int, v0.type_handlers.ScalarHandler),
        (str, v0.type_handlers.StringHandler),
        ("jax.Array", v0.type_handlers.ArrayHandler),
    ],
)
def test_what_is_inside_is_found_and_is_the_same_next_time(leaf, kind):
    first, second = registry_of(), registry_of()
    assert first.has(leaf)
    assert type(first.get(leaf)) is kind
    assert first.get(leaf) is second.get(leaf)


def test_what_saves_in_another_way_is_another_one():
    context = v1.Context()
    context.array.saving.use_replica_parallel = False
    assert registry_of(context).get(ARRAY) is not registry_of().get(ARRAY)
    again = v1.Context(context)  # All its options are copies.
    assert registry_of(context).get(ARRAY) is registry_of(again).get(ARRAY)


def test_a_handler_of_somebody_else_is_equal_to_others_of_its_type_and_is_asked_itself():
    class Words:
        def __init__(self, context=None):
            self.context = context

    class Text:
        pass

    first, second = (registry_of(leaves=leaves_with(Text, Words)).get(Text) for _ in range(2))
    assert isinstance(first, OtherLeaf)
    assert first == second
    assert hash(first) == hash(second)
    assert first != registry_of().get(str)
    assert first.typestr() == second.typestr()
    assert first._leaf_handler is not second._leaf_handler


def test_a_class_made_of_orbax_own_counts_as_that_unless_it_saves_in_its_own_way():
    class Renamed(stock_leaf["arrays"]):
        pass

    class Other(stock_leaf["arrays"]):
        async def serialize(self, params, context):
            raise NotImplementedError

    kinds = [
        type(registry_of(leaves=leaves_with(jax.Array, each)).get(ARRAY))
        for each in (Renamed, Other)
    ]
    assert kinds == [v0.type_handlers.ArrayHandler, OtherLeaf]


def test_there_is_none_for_what_nobody_registered():
    assert not registry_of().has(object)
    with pytest.raises(ValueError, match="object"):
        registry_of().get(object)
