"""What is no argument of a function gets one error at once, which says what is wanted."""

import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import lazy_orbax
from lazy_orbax.cli import main as command_line
from lazy_orbax.errors import OptionError


def save_steps(root, steps=(1, 2), **keywords):
    handler = lazy_orbax.pytree_handler(use_ocdbt=False)
    options = ocp.CheckpointManagerOptions(**keywords)
    with ocp.CheckpointManager(root, item_handlers=handler, options=options) as manager:
        for step in steps:
            tree = {"w": jax.numpy.arange(8.0) + step, "b": jax.numpy.ones(3)}
            manager.save(step, args=ocp.args.PyTreeSave(tree))
            manager.wait_until_finished()


@pytest.fixture
def manager(tmp_path):
    save_steps(tmp_path / "run")
    handler = lazy_orbax.pytree_handler(use_ocdbt=False)
    with ocp.CheckpointManager(tmp_path / "run", item_handlers=handler) as manager:
        yield manager


@pytest.fixture
def args():
    target = {
        "w": jax.ShapeDtypeStruct((8,), np.float32),
        "b": jax.ShapeDtypeStruct((3,), np.float32),
    }
    return ocp.args.PyTreeRestore(
        target, restore_args=ocp.checkpoint_utils.construct_restore_args(target)
    )


@pytest.mark.parametrize("given", ["a string", None, "checkpointer", "handler"])
def test_what_is_no_manager(tmp_path, given, args):
    made = {
        "a string": lambda: str(tmp_path),
        "checkpointer": lambda: ocp.Checkpointer(lazy_orbax.pytree_handler()),
        "handler": lazy_orbax.pytree_handler,
    }
    wrong = made.get(given, lambda: None)()
    for restore in (
        lambda: lazy_orbax.restore_latest_good(wrong, args=args),
        lambda: lazy_orbax.restore_replacing(wrong, 1, args=args, replacements={}),
    ):
        with pytest.raises(OptionError, match="CheckpointManager") as raised:
            restore()
        assert repr(wrong)[:20] in str(raised.value)


def test_a_manager_of_ones_own_will_do(manager, args):
    class Wrapped:
        def __getattr__(self, name):
            return getattr(manager, name)

    assert lazy_orbax.restore_latest_good(Wrapped(), args=args).step == 2


@pytest.mark.parametrize("wrong", [["w"], "w", None, {1: np.ones(3)}, [("w", 1)]])
def test_what_are_no_replacements(manager, args, wrong):
    with pytest.raises(OptionError, match="replacements") as raised:
        lazy_orbax.restore_replacing(manager, 2, args=args, replacements=wrong)
    assert repr(wrong) in str(raised.value)
    assert "FromStep" in str(raised.value)


@pytest.mark.parametrize("wrong", ["0", 1.0, None, True, -1])
def test_what_is_no_step(wrong):
    with pytest.raises(OptionError, match=r"FromStep\(.*whole number"):
        lazy_orbax.FromStep(wrong)
    assert lazy_orbax.FromStep(np.int64(3)).step == 3


def corrupt(manager, step, leaf):
    (file,) = [
        f for f in (manager.directory / str(step) / "default" / leaf).iterdir() if f.name == "0"
    ]
    content = bytearray(file.read_bytes())
    content[-1] ^= 8
    file.write_bytes(content)


@pytest.mark.parametrize("is_whole", [True, False])
@pytest.mark.parametrize("older", [0, 2])
def test_a_step_that_cannot_serve_for_another_is_refused_though_it_is_not_needed(
    manager, args, older, is_whole
):
    if not is_whole:
        corrupt(manager, 2, "w")
    with pytest.raises(OptionError, match=rf"w.*FromStep\({older}\)") as raised:
        lazy_orbax.restore_replacing(
            manager, 2, args=args, replacements={"w": lazy_orbax.FromStep(older)}
        )
    assert "1" in str(raised.value), "the steps that could serve"


def test_a_step_that_can_serve_for_another_does(manager, args):
    corrupt(manager, 2, "w")
    found = lazy_orbax.restore_replacing(
        manager,
        2,
        args=args,
        replacements={"w": lazy_orbax.FromStep(1), "b": lazy_orbax.FromStep(1)},
    )
    assert np.array_equal(found.value["w"], np.arange(8.0) + 1)
    assert found.not_needed == ("b",)


@pytest.mark.parametrize("wrong", [{}, {"max_to_keep": 2}, [], 0, "options"])
def test_what_are_no_options_of_a_manager(wrong):
    with pytest.raises(OptionError, match="CheckpointManagerOptions") as raised:
        lazy_orbax.node_local_options(wrong)
    assert repr(wrong) in str(raised.value)


@pytest.mark.parametrize("wrong", [None, 3, b"run", ["run"]])
def test_what_is_no_path(wrong):
    with pytest.raises(OptionError, match="path") as raised:
        lazy_orbax.verify(wrong)
    assert repr(wrong) in str(raised.value)


# One directory too high.


@pytest.mark.parametrize("names", [("first", "second"), ("run_1", "run_2"), ("2024", "2025")])
@pytest.mark.parametrize("naming", [{}, {"step_prefix": "ckpt"}])
def test_verify_one_directory_too_high_names_the_runs(tmp_path, names, naming, capsys):
    for name in names:
        save_steps(tmp_path / name, **naming)
    (tmp_path / "notes").mkdir()
    (tmp_path / "readme.txt").write_text("a file")
    with pytest.raises(OptionError, match="is not a run, but holds runs") as raised:
        lazy_orbax.verify(tmp_path)
    for name in names:
        assert str(tmp_path / name) in str(raised.value)
    assert "notes" not in str(raised.value)
    assert command_line.main(["verify", str(tmp_path)]) == 2
    assert str(tmp_path / names[0]) in capsys.readouterr().err


def test_verify_of_a_directory_without_runs_says_so(tmp_path):
    (tmp_path / "notes" / "1").mkdir(parents=True)
    with pytest.raises(OptionError, match="holds no checkpoint"):
        lazy_orbax.verify(tmp_path)


def test_a_run_with_a_run_beside_its_steps_is_a_run(tmp_path):
    save_steps(tmp_path / "run")
    save_steps(tmp_path / "run" / "eval_1")
    report = lazy_orbax.verify(tmp_path / "run")
    assert report.is_whole
    assert {item.directory: item.is_covered for item in report.items} == {
        str(tmp_path / "run" / "1" / "default"): True,
        str(tmp_path / "run" / "2" / "default"): True,
        str(tmp_path / "run" / "eval_1"): False,
    }
    assert "a run of its own" in str(report)


def test_a_step_that_lost_its_metadata_and_its_item_is_still_a_step(tmp_path):
    save_steps(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "2")
    (tmp_path / "run" / "2").mkdir()
    report = lazy_orbax.verify(tmp_path / "run")
    assert [problem.what for problem in report.all_problems] == ["holds no item"]


def test_a_step_without_metadata_is_no_run_for_the_number_in_the_name_of_its_item(tmp_path):
    handlers = {"params_2": lazy_orbax.pytree_handler()}
    with ocp.CheckpointManager(tmp_path, item_handlers=handlers) as manager:
        saved = ocp.args.PyTreeSave({"w": np.arange(3)})
        manager.save(1, args=ocp.args.Composite(params_2=saved))
    (tmp_path / "1" / "_CHECKPOINT_METADATA").unlink()
    (item,) = lazy_orbax.verify(tmp_path).items
    assert item.is_covered
