"""What of Orbax v1 is needed, and what if it is not there."""

import copy
import types

import pytest
from orbax.checkpoint import v1 as ocp

from lazy_orbax._orbax import v1


def test_this_orbax_has_all_of_it():
    assert v1.MISSING == []
    assert v1.ocp1 is ocp


def test_a_symbol_that_is_gone_is_named(monkeypatch):
    monkeypatch.setitem(v1._NEEDED, "pytree", ("handlers.moved", "PyTreeHandler"))
    _, _, missing = v1._probe()
    assert any(name.endswith("_src.handlers.moved.PyTreeHandler") for name in missing)


def test_no_v1_at_all_is_named(monkeypatch):
    monkeypatch.setattr(v1, "_ROOTS", ("orbax.checkpoint.v7",))
    assert v1._probe() == ("", {}, ["orbax.checkpoint.experimental.v1"])


@pytest.mark.parametrize(
    ("key", "method"), [key for key in v1._USED if key[0] == "pytree"], ids=lambda key: str(key)
)
def test_a_handler_that_no_longer_asks_is_noticed(monkeypatch, key, method):
    def otherwise(self):
        return self._v2_handler

    importing = v1.importlib.import_module
    stock = vars(importing(v1.V1["pytree"].__module__))
    moved = type("PyTreeHandler", (v1.V1["pytree"],), {method: otherwise})
    module = types.SimpleNamespace(**{**stock, "PyTreeHandler": moved})
    monkeypatch.setattr(
        v1.importlib,
        "import_module",
        lambda name: module if name.endswith("handlers.pytree_handler") else importing(name),
    )
    _, _, missing = v1._probe()
    assert [name.rpartition(".")[2] for name in missing] == [method]


def test_the_last_who_makes_is_asked_and_each_is_undone_by_itself():
    first, second = (v1.make_all_with(lambda *_, name=name: name) for name in ("first", "second"))
    handler = ocp.handlers.PyTreeHandler
    assert handler()._handler_impl == "second"
    first()
    assert handler()._handler_impl == "second"
    second()
    second()
    assert (
        type(handler()._handler_impl)
        is v1.importlib.import_module("orbax.checkpoint").BasePyTreeCheckpointHandler
    )


def test_one_class_is_made_with_something_else():
    lazy = v1.pytree_handler_with(lambda *_: "ours")
    assert lazy()._handler_impl == "ours"
    assert ocp.handlers.PyTreeHandler()._handler_impl != "ours"
    stock = ocp.handlers.PyTreeHandler
    assert (lazy.__module__, lazy.__qualname__) == (stock.__module__, stock.__qualname__)


def test_what_is_inside_makes_its_handler_when_it_is_asked_and_can_be_copied():
    made = []
    inside = v1.Inside(lambda n_bytes: made.append(n_bytes) or {"a": 1}, end=print, in_v0=print)
    copied = copy.deepcopy(inside)
    assert made == []
    copied._save_device_host_concurrent_bytes = 7
    assert list(copied.keys()) == ["a"]
    assert made == [7]
