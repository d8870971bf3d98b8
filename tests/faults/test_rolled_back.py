"""A step in whose place lie the files of another, and copies that are as good as before."""

import json
import logging
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from equipment.trees import assert_same, on_mesh

import lazy_orbax
from lazy_orbax.errors import CorruptCheckpointError
from lazy_orbax.integrity import digest_file
from lazy_orbax.integrity.digest_file import DIRECTORY


def state_at(step, mesh):
    rng = np.random.default_rng(step)
    host = rng.standard_normal((16, 8), np.float32)
    return {"w": on_mesh(host, mesh, "a", "b"), "n": np.full(3, step)}


def target_of(mesh):
    return jax.tree.map(ocp.utils.to_shape_dtype_struct, state_at(0, mesh))


def handler_of(**options):
    return lazy_orbax.pytree_handler(options=lazy_orbax.LazyOptions(**options))


def manager_at(root, *, naming=None, **options):
    managed = ocp.CheckpointManagerOptions(**(naming or {}))
    return ocp.CheckpointManager(root, item_handlers=handler_of(**options), options=managed)


def restore_args(mesh):
    target = target_of(mesh)
    return ocp.args.PyTreeRestore(
        target, restore_args=ocp.checkpoint_utils.construct_restore_args(target)
    )


def save_steps(root, mesh, steps=(9, 12), naming=None):
    with manager_at(root, naming=naming) as manager:
        for step in steps:
            manager.save(step, args=ocp.args.PyTreeSave(state_at(step, mesh)))
            manager.wait_until_finished()


def save_at(place, tree):
    with ocp.AsyncCheckpointer(handler_of()) as checkpointer:
        checkpointer.save(place, args=ocp.args.PyTreeSave(tree))


def restore_at(place, mesh):
    with ocp.AsyncCheckpointer(handler_of()) as checkpointer:
        return checkpointer.restore(place, args=restore_args(mesh))


def replace(place, by):
    shutil.rmtree(place)
    shutil.copytree(by, place)


def make_older(item):
    """Makes the digests those of a version that did not note the names of the directories."""
    for file in (item / DIRECTORY).glob("process_*"):
        found = digest_file.unseal(file.read_bytes())
        del found["digest"], found["place"]
        file.write_bytes(digest_file.seal(json.dumps(found).encode()[1:]))
        assert digest_file.parse(file.read_bytes()).place == ()


NAMINGS = {
    "number": {},
    "fixed length": {"step_format_fixed_length": 6},
    "prefix": {"step_prefix": "ckpt"},
}


def directory_of(step, naming):
    number = f"{step:06d}" if naming == "fixed length" else str(step)
    return f"ckpt_{number}" if naming == "prefix" else number


@pytest.fixture(params=NAMINGS)
def naming(request):
    return request.param


@pytest.fixture(params=["the item", "the step"])
def rolled_back(request, tmp_path, mesh, naming):
    """A run of steps 9 and 12, in which the files of 9 lie in the place of those of 12."""
    save_steps(tmp_path, mesh, naming=NAMINGS[naming])
    inner = "default" if request.param == "the item" else ""
    old, new = (tmp_path / directory_of(step, naming) / inner for step in (9, 12))
    replace(new, old)
    return tmp_path


def test_a_rolled_back_step_is_not_restored_as_what_it_is_not(rolled_back, mesh, naming):
    with (
        manager_at(rolled_back, naming=NAMINGS[naming]) as manager,
        pytest.raises(CorruptCheckpointError) as raised,
    ):
        manager.restore(12, args=restore_args(mesh))
    for told in ("saved at step 9", "in step 12", "verify_restore=False"):
        assert told in str(raised.value)
    assert raised.value.newest_whole_step == 9
    assert raised.value.file == f"{DIRECTORY}/process_0"


def test_a_copy_that_is_meant_is_restored_without_verification(rolled_back, mesh, naming):
    with manager_at(rolled_back, naming=NAMINGS[naming], verify_restore=False) as manager:
        assert_same(manager.restore(12, args=restore_args(mesh)), state_at(9, mesh))


def test_the_latest_good_step_is_not_one_that_was_rolled_back(rolled_back, mesh, naming):
    with manager_at(rolled_back, naming=NAMINGS[naming]) as manager:
        found = lazy_orbax.restore_latest_good(manager, args=restore_args(mesh))
    assert found.step == 9
    assert [skipped.step for skipped in found.skipped] == [12]
    assert "saved at step 9" in found.skipped[0].why
    assert_same(found.value, state_at(9, mesh))


def test_a_rolled_back_step_is_not_mended_leaf_by_leaf(rolled_back, mesh, naming):
    with (
        manager_at(rolled_back, naming=NAMINGS[naming]) as manager,
        pytest.raises(CorruptCheckpointError, match="saved at step 9"),
    ):
        lazy_orbax.restore_replacing(
            manager,
            12,
            args=restore_args(mesh),
            replacements={"w": np.zeros((16, 8), np.float32)},
        )


def test_verify_tells_which_step_was_rolled_back(rolled_back, mesh, naming):
    assert not mesh.empty
    step = directory_of(12, naming)
    for path, where in ((rolled_back, step), (rolled_back / step, step)):
        report = lazy_orbax.verify(path)
        wrong = [item for item in report.items if item.problems]
        assert [item.directory for item in wrong] == [str(rolled_back / where / "default")]
        assert "saved at step 9" in str(report)


def test_a_rolled_back_step_of_an_older_version(tmp_path, mesh):
    save_steps(tmp_path, mesh)
    make_older(tmp_path / "9" / "default")
    assert_same(restore_in(tmp_path, 9, mesh), state_at(9, mesh))
    replace(tmp_path / "12" / "default", tmp_path / "9" / "default")
    with pytest.raises(CorruptCheckpointError, match="saved at step 9"):
        restore_in(tmp_path, 12, mesh)


def restore_in(root, step, mesh, **keywords):
    with manager_at(root, **keywords) as manager:
        return manager.restore(step, args=restore_args(mesh))


def test_a_rolled_back_step_that_is_an_item_itself(tmp_path, mesh):
    for step in (9, 12):
        save_at(tmp_path / str(step), state_at(step, mesh))
    replace(tmp_path / "12", tmp_path / "9")
    with pytest.raises(CorruptCheckpointError, match="saved at step 9"):
        restore_at(tmp_path / "12", mesh)


@pytest.mark.parametrize("age", ["now", "older"])
@pytest.mark.parametrize(
    ("source", "copy"),
    [
        ("run/12", "other/12"),
        ("run/12", "other/000012"),
        ("run/12", "other/ckpt_12"),
        ("run/12", "best"),
        ("run/12", "llama_7"),
        ("run/12/default", "llama_7"),
        ("run/12/default", "7"),
        ("run/12/default", "weights"),
    ],
)
def test_a_copy_is_restored_as_ever(tmp_path, mesh, source, copy, age, caplog):
    save_steps(tmp_path / "run", mesh, steps=(12,))
    if age == "older":
        make_older(tmp_path / "run" / "12" / "default")
    shutil.copytree(tmp_path / source, tmp_path / copy)
    item = tmp_path / copy if source.endswith("default") else tmp_path / copy / "default"
    with caplog.at_level(logging.WARNING, logger="lazy_orbax"):
        assert_same(restore_at(item, mesh), state_at(12, mesh))
    assert [r for r in caplog.records if r.name == "lazy_orbax"] == []
    report = lazy_orbax.verify(item)
    assert report.ok, str(report)


@pytest.mark.parametrize("age", ["now", "older"])
@pytest.mark.parametrize(
    ("saved", "moved"),
    [
        ("run_3/params", "run_4/params"),
        ("run_3/params", "run_4/params_7"),
        ("final", "12"),
        ("7/params", "8/params"),
    ],
)
def test_what_was_saved_without_a_step_may_be_moved(tmp_path, mesh, saved, moved, age):
    save_at(tmp_path / saved, state_at(1, mesh))
    if age == "older":
        make_older(tmp_path / saved)
    (tmp_path / moved).parent.mkdir(exist_ok=True)
    (tmp_path / saved).rename(tmp_path / moved)
    assert_same(restore_at(tmp_path / moved, mesh), state_at(1, mesh))
    assert lazy_orbax.verify(tmp_path / moved).ok


def test_an_item_with_a_number_in_its_name_by_an_older_version(tmp_path, mesh):
    """It took the number of such an item for the step's."""
    options = ocp.CheckpointManagerOptions(step_prefix="ckpt")
    handlers = {"params_2": handler_of()}
    with ocp.CheckpointManager(tmp_path, item_handlers=handlers, options=options) as manager:
        saved = ocp.args.PyTreeSave(state_at(12, mesh))
        manager.save(12, args=ocp.args.Composite(params_2=saved))
        manager.wait_until_finished()
        make_older(tmp_path / "ckpt_12" / "params_2")
        args = ocp.args.Composite(params_2=restore_args(mesh))
        assert_same(manager.restore(12, args=args)["params_2"], state_at(12, mesh))


def test_the_item_of_another_run_is_not_called_right(tmp_path, mesh, caplog):
    """The number is the same; only the metadata beside it tell."""
    for run in ("a", "b"):
        save_steps(tmp_path / run, mesh, steps=(12,))
    replace(tmp_path / "a" / "12" / "default", tmp_path / "b" / "12" / "default")
    with caplog.at_level(logging.WARNING, logger="lazy_orbax"):
        restore_in(tmp_path / "a", 12, mesh)
    warned = " ".join(r.getMessage() for r in caplog.records if r.name == "lazy_orbax")
    assert "init_timestamp_nsecs is not what was saved" in warned
    assert "is right" not in warned
