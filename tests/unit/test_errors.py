import errno

import jax.numpy as jnp
import numpy as np
import pytest

from lazy_orbax import errors
from lazy_orbax.errors import SaveError, summarize
from lazy_orbax.storage.save_error import save_error

WHERE = {"step": 7, "leaf": "params.w", "file": "d/abc", "directory": "/run/7/state"}


@pytest.mark.parametrize(
    "given",
    [
        (),
        ("step",),
        ("leaf", "directory"),
        ("step", "leaf", "file", "directory"),
    ],
)
def test_a_save_error_names_what_is_known_and_nothing_else(given):
    error = SaveError("No space left", **{name: WHERE[name] for name in given})
    for name, value in WHERE.items():
        assert (f"{name} {value}" in str(error)) == (name in given), name
        assert getattr(error, name) == (value if name in given else None)
    assert "No space left" in str(error)
    assert "None" not in str(error)


def test_step_zero_is_a_step():
    assert "step 0" in str(SaveError("x", step=0))


def test_a_save_error_without_a_place_has_no_empty_brackets():
    assert "()" not in str(SaveError("The save was cancelled"))


@pytest.mark.parametrize(
    ("error", "leaf", "file"),
    [
        (
            ValueError('Error writing "/run/7.tmp/state/w/0.0": disk full'),
            "w",
            "/run/7.tmp/state/w/0.0",
        ),
        (OSError(28, "No space left on device", "/run/7/state/d/1"), None, "/run/7/state/d/1"),
        (RuntimeError("out of memory"), None, None),
    ],
)
def test_the_file_that_the_storage_named_is_in_the_error(error, leaf, file):
    found = save_error("/run/7.orbax-checkpoint-tmp/state", error, leaf=leaf)
    assert (found.step, found.leaf, found.file) == (7, leaf, file)
    assert found.directory == "/run/7.orbax-checkpoint-tmp/state"
    assert str(error) in str(found)


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/run/7/state/d/1"), errno.ENOSPC),
        # TensorStore's are of another type, and have it in their text.
        (ValueError("Failed to write: No space left [os_error_code='28']"), errno.ENOSPC),
        (RuntimeError("out of memory"), None),
    ],
)
def test_the_number_of_an_error_is_kept(error, number):
    assert save_error("/run/7", error).errno == number


def test_an_error_without_words_is_named_by_its_type():
    assert "MemoryError" in str(save_error("/run/7", MemoryError()))


@pytest.mark.parametrize("n_problems", [0, 1, 9, 10, 11, 5000])
def test_at_most_ten_problems_are_shown_and_the_rest_counted(n_problems):
    text = summarize([f"problem<{i}>" for i in range(n_problems)])
    assert text.count("problem<") == min(n_problems, 10)
    assert ("more" in text) == (n_problems > 10)
    if n_problems > 10:
        assert f"and {n_problems - 10} more" in text
        assert "problem<9>" in text
        assert "problem<10>" not in text


def test_every_error_is_in_the_one_tree():
    classes = [
        x for x in vars(errors).values() if isinstance(x, type) and x.__module__ == errors.__name__
    ]
    assert len(classes) >= 6
    for cls in set(classes) - {errors.Problem}:
        assert issubclass(cls, errors.LazyOrbaxError | Warning)
        assert cls.__doc__


@pytest.mark.parametrize(
    ("cls", "also"),
    [
        (errors.OptionError, ValueError),
        (errors.TreeError, ValueError),
        (errors.DeletedArrayError, errors.TreeError),
        (errors.DeletedArrayError, RuntimeError),
        (errors.SaveError, RuntimeError),
        (errors.RestoreError, ValueError),
        (errors.TransformError, errors.RestoreError),
    ],
)
def test_code_that_catches_what_stock_raises_still_catches(cls, also):
    assert issubclass(cls, also)


# What the first look at a tree refuses, by key path, all at once.


@pytest.fixture
def refused():
    import lazy_orbax
    from lazy_orbax._orbax.records import Destination
    from lazy_orbax.save.plan_cache import prepare
    from lazy_orbax.storage import places

    handler = lazy_orbax.LazyCheckpointHandler()

    def refuse(tree, cls):
        with pytest.raises(cls) as raised:
            prepare(
                handler.settings,
                tree,
                None,
                destination=Destination(places.place_of("/").stand_in(), None),
                slab_bytes=2**20,
                abstract=False,
            )
        return str(raised.value)

    return refuse


def test_every_deleted_array_is_named(refused):
    tree = {"layers": [jnp.ones(3), jnp.ones((2, 2), jnp.bfloat16)], "alive": jnp.ones(1)}
    for leaf in tree["layers"]:
        leaf.delete()
    text = refused(tree, errors.DeletedArrayError)
    assert "['layers'][0]: float32[3]" in text
    assert "['layers'][1]: bfloat16[2, 2]" in text
    assert "alive" not in text


def test_deleted_arrays_are_shown_ten_at_most(refused):
    tree = [jnp.ones(()) for _ in range(13)]
    for leaf in tree:
        leaf.delete()
    text = refused(tree, errors.DeletedArrayError)
    assert text.count("float32[]") == 10
    assert "and 3 more" in text


@pytest.mark.parametrize(
    ("leaf", "said"),
    [
        (object(), "object"),
        ({1, 2}, "set"),
        (np.zeros((0, 3), np.float32), "float32[0, 3]"),
        (jnp.zeros((4, 0), jnp.int8), "int8[4, 0]"),
    ],
)
def test_a_leaf_that_cannot_be_saved_is_named_with_its_type(refused, leaf, said):
    text = refused({"ok": np.ones(2), "bad": [1, leaf]}, errors.TreeError)
    assert f"['bad'][1]: {said}" in text
    assert "'ok'" not in text


def test_leaves_of_one_name_are_named_both(refused):
    text = refused({"a": {"b": 1}, "a.b": 2, "c": 3}, errors.TreeError)
    assert "['a']['b']" in text
    assert "['a.b']" in text
    assert "'c'" not in text


@pytest.mark.parametrize("tree", [{}, [], None])
def test_a_tree_without_leaves_is_refused(refused, tree):
    assert "no leaves" in refused(tree, errors.TreeError)


def test_an_integer_that_no_array_holds_is_refused_by_name(refused):
    assert "['n']" in refused({"n": 2**64}, errors.TreeError)
