"""Orbax is asked once for leaves that are alike, and the answer is what it would say of each."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from equipment.trees import on_mesh
from jax.sharding import Mesh

import lazy_orbax
from lazy_orbax._orbax import on_disk
from lazy_orbax._orbax.describe import describe_tree
from lazy_orbax._orbax.records import Destination

MESH = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("a", "b"))
KEYS = {"impl": "fry"}


def leaf(shape=(8, 6), dtype=np.float32, spec=("a",), **save_args):
    return on_mesh(np.ones(shape, dtype), MESH, *spec), ocp.SaveArgs(**save_args)


TREES = {
    "alike": [leaf() for _ in range(5)],
    "none alike": [
        leaf(),
        leaf(shape=(6, 8), spec=(None, "a")),
        leaf(dtype=jnp.bfloat16),
        leaf(dtype=np.int32),
        leaf(spec=("a", "b")),
        leaf(dtype=jnp.bfloat16, spec=("b",)),
        leaf(spec=()),
        leaf(dtype=np.int32, spec=()),
        leaf(chunk_byte_size=8),
        leaf(dtype=jnp.bfloat16, chunk_byte_size=8),
        leaf(shard_axes=(0,)),
    ],
}


def asked(monkeypatch, specs, tree, ext_metadata=None):
    """Asks for each leaf of a tree. Returns the answers, and how often Orbax was asked."""
    values, save_args = [value for value, _ in tree], [args for _, args in tree]
    handler = lazy_orbax.LazyCheckpointHandler()
    info = describe_tree(handler.settings, values, save_args, Destination("/somewhere", None))
    calls, build = [], on_disk.SRC["build_array_write_spec"]

    def counted(*args, **keywords):
        calls.append(keywords)
        return build(*args, **keywords)

    with monkeypatch.context() as patch:
        patch.setitem(on_disk.SRC, "build_array_write_spec", counted)
        found = [
            specs().of(
                one,
                shape=value.shape,
                write_shape=value.sharding.shard_shape(value.shape),
                dtype=value.dtype,
                sharding=value.sharding,
                ext_metadata=ext_metadata,
            )
            for one, value in zip(info.leaves, values, strict=True)
        ]
    return found, len(calls)


@pytest.mark.parametrize("name", TREES)
def test_the_answers_are_those_for_each_leaf_alone(name, monkeypatch):
    tree, together = TREES[name], on_disk.ArraySpecs()
    alone, n_alone = asked(monkeypatch, on_disk.ArraySpecs, tree, KEYS)
    found, n_found = asked(monkeypatch, lambda: together, tree, KEYS)
    assert (n_alone, n_found) == (len(tree), 1 if name == "alike" else len(tree))
    for i, ((spec, metadata), (of_one, its_metadata)) in enumerate(zip(found, alone, strict=True)):
        assert metadata == its_metadata
        assert metadata.param_name == str(i)
        assert without_path(spec) == without_path(of_one)
    assert len({id(spec) for spec, _ in found}) == n_found


class Quiet(ocp.SaveArgs):
    def __repr__(self):
        return "quiet"


def test_save_args_tell_leaves_apart_whatever_they_print(monkeypatch):
    together = on_disk.ArraySpecs()
    tree = [(leaf()[0], Quiet(chunk_byte_size=size)) for size in (8, 16)]
    found, n_asked = asked(monkeypatch, lambda: together, tree)
    assert n_asked == 2
    assert [metadata.chunk_shape for _, metadata in found] == [(1, 2), (1, 3)]


def without_path(spec):
    base = spec.get("base", spec)
    kvstore = {key: value for key, value in base["kvstore"].items() if key != "path"}
    return spec | {"base": base | {"kvstore": kvstore}, "kvstore": None}


def test_what_is_stored_beside_keys_tells_them_apart(monkeypatch):
    together = on_disk.ArraySpecs()
    tree = TREES["alike"][:1]
    asked(monkeypatch, lambda: together, tree)
    ((_, metadata),), n_asked = asked(monkeypatch, lambda: together, tree, KEYS)
    assert n_asked == 1
    assert metadata.ext_metadata == KEYS
