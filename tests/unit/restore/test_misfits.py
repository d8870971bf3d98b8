"""What a restore complains of: the shape of a leaf only where Orbax insists on it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from equipment.oracle import STOCK_WARNS
from etils import epath

import lazy_orbax
from lazy_orbax.errors import CorruptCheckpointError, RestoreError

pytestmark = STOCK_WARNS
TREE = {"a": jnp.arange(5000.0), "b": jnp.arange(8.0), "n": np.arange(6), "k": jax.random.key(0)}


@pytest.fixture
def saved(tmp_path):
    handler, directory = lazy_orbax.standard_handler(), epath.Path(tmp_path)
    handler.save(directory, args=ocp.args.StandardSave(TREE))
    handler.finalize(directory)
    return handler, directory


def cut_short(directory):
    files = directory.glob("ocdbt.process_*/d/*")
    largest = max(files, key=lambda file: file.stat().length)
    largest.write_bytes(largest.read_bytes()[:5000])


@pytest.mark.parametrize(
    ("other", "strict"), [({"b": jnp.zeros(4)}, False), ({"n": np.zeros(4)}, True)]
)
def test_a_shape_that_orbax_does_not_insist_on_hides_no_damage(saved, other, strict):
    handler, directory = saved
    args = ocp.args.StandardRestore({**TREE, **other}, strict=strict)
    assert handler.restore(directory, args=args)["a"].shape == (5000,)
    cut_short(directory)
    with pytest.raises(CorruptCheckpointError, match="is not what was saved:\n.*a"):
        handler.restore(directory, args=args)


def test_a_shape_that_orbax_does_not_insist_on_hides_no_other_error(saved):
    handler, directory = saved
    target = {**TREE, "b": jnp.zeros(4), "a": object()}
    with pytest.raises(ValueError, match="Unsupported type: <class 'object'>"):
        handler.restore(directory, args=ocp.args.StandardRestore(target, strict=False))


@pytest.mark.parametrize(
    ("name", "wanted", "text"),
    [
        ("b", {"global_shape": (4,)}, r"found \[8\], wanted \[4\]"),
        ("k", {"global_shape": (3,), "dtype": TREE["k"].dtype}, r"found \[2\], wanted \[3, 2\]"),
    ],
)
def test_the_shape_that_is_told_is_the_one_in_the_arguments(saved, name, wanted, text):
    _, directory = saved
    restore_args = ocp.checkpoint_utils.construct_restore_args(TREE)
    restore_args[name] = ocp.ArrayRestoreArgs(sharding=TREE["b"].sharding, **wanted)
    args = ocp.args.PyTreeRestore(TREE, restore_args)
    with pytest.raises(RestoreError, match=rf"\['{name}'\]: {text}"):
        lazy_orbax.pytree_handler().restore(directory, args=args)


def test_who_looks_for_the_words_of_orbax_finds_them(saved):
    handler, directory = saved
    args = ocp.args.StandardRestore({**TREE, "b": jnp.zeros(4)})
    for one in (ocp.StandardCheckpointHandler(), handler):
        with pytest.raises(ValueError, match="is not compatible with the stored.*strict=False"):
            one.restore(directory, args=args)


def test_another_rank_is_named_where_orbax_would_cut(saved):
    handler, directory = saved
    target = {**TREE, "b": jnp.zeros((2, 4)), "a": jnp.zeros(4)}
    with pytest.raises(RestoreError) as caught:
        handler.restore(directory, args=ocp.args.StandardRestore(target, strict=False))
    assert "['b']: found [8], wanted [2, 4]" in str(caught.value)
    assert "['a']" not in str(caught.value)
    assert "Ranks do not match" in str(caught.value)


def test_the_shape_of_a_leaf_hides_no_error_of_another_kind(saved):
    _, directory = saved
    args = ocp.checkpoint_utils.construct_restore_args(TREE)
    args["b"] = ocp.ArrayRestoreArgs(sharding=TREE["b"].sharding, global_shape=(4,))
    target = ocp.args.PyTreeRestore({**TREE, "n": {"m": 1}}, args | {"n": {"m": None}})
    partial = dataclasses.replace(target, partial_restore=True)
    for handler in (ocp.PyTreeCheckpointHandler(), lazy_orbax.pytree_handler()):
        with pytest.raises(TypeError, match="Type mismatch at key path .*'n'"):
            handler.restore(directory, args=partial)


def test_an_array_that_is_wanted_as_a_number_is_named(saved):
    handler, directory = saved
    args = ocp.args.StandardRestore({**TREE, "n": 3})
    with pytest.raises(RestoreError, match=r"\['n'\]: found an array.*\[6\](.|\n)*not a scalar"):
        handler.restore(directory, args=args)


def test_without_a_target_the_shapes_in_the_arguments_are_named(saved):
    _, directory = saved
    args = ocp.checkpoint_utils.construct_restore_args(TREE)
    args["b"] = ocp.ArrayRestoreArgs(sharding=TREE["b"].sharding, global_shape=(4,))
    with pytest.raises(RestoreError, match=r"\['b'\]: found \[8\], wanted \[4\]"):
        lazy_orbax.pytree_handler().restore(directory, args=ocp.args.PyTreeRestore(None, args))
