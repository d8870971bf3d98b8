"""Our handlers in every place where Orbax takes one."""

from __future__ import annotations

import jax
import numpy as np
import orbax.checkpoint as ocp
import orbax.checkpoint.experimental.v1 as ocp_v1
import pytest
from equipment.oracle import FACES, STOCK_WARNS, arrays_restored_as, face, same
from equipment.trees import abstract, on_mesh
from etils import epath
from orbax.checkpoint import checkpoint_utils, handlers

import lazy_orbax
from lazy_orbax.errors import OptionError
from lazy_orbax.integrity import digest_file, verify

pytestmark = STOCK_WARNS
DIRECTORIES = (True, False)


def state_of(mesh, add=0.0):
    w = np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32) + np.float32(add)
    return {
        "w": on_mesh(w, mesh, "a", "b"),
        "b": on_mesh(w[0], mesh),
        "key": jax.random.key(7),
        "step": 3,
    }


def options_with(directories):
    return ocp.CheckpointManagerOptions(
        async_options=ocp.AsyncOptions(create_directories_asynchronously=directories)
    )


def restoring(face_name, state):
    """Returns the args that put `state` back as it was."""
    if face_name == "standard":
        return ocp.args.StandardRestore(abstract(state))
    kind = face(face_name)
    return kind.restore(state, restore_args=jax.tree.map(arrays_restored_as, state))


@pytest.mark.parametrize("directories", DIRECTORIES)
@pytest.mark.parametrize("face_name", FACES)
def test_as_the_only_handler_of_a_manager(face_name, directories, mesh, tmp_path):
    kind, state = face(face_name), state_of(mesh)
    with ocp.CheckpointManager(
        tmp_path, item_handlers=kind.lazy(), options=options_with(directories)
    ) as manager:
        for step in range(3):
            assert manager.save(step, args=kind.save(state_of(mesh, step)))
        manager.wait_until_finished()
        same(manager.restore(0, args=restoring(face_name, state)), state)
        same(manager.restore(2, args=restoring(face_name, state)), state_of(mesh, 2))
        assert manager.item_metadata(1).tree["w"].shape == (16, 8)
    with ocp.CheckpointManager(tmp_path) as manager:
        assert manager.all_steps() == [0, 1, 2]
        assert set(manager.restore(1)) == set(state)


@pytest.mark.parametrize("directories", DIRECTORIES)
def test_beside_other_items(directories, mesh, tmp_path):
    state, other = state_of(mesh), {"mu": state_of(mesh, 1)["w"], "text": "Grüße"}
    with ocp.CheckpointManager(
        tmp_path,
        options=options_with(directories),
        item_handlers={
            "state": lazy_orbax.standard_handler(),
            "ema": lazy_orbax.pytree_handler(use_ocdbt=False),
            "direct": lazy_orbax.LazyCheckpointHandler(use_zarr3=True),
            "stock": ocp.PyTreeCheckpointHandler(),
            "meta": ocp.JsonCheckpointHandler(),
        },
    ) as manager:
        saved = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            ema=ocp.args.PyTreeSave(other),
            direct=lazy_orbax.args.LazySave(state),
            stock=ocp.args.PyTreeSave(other),
            meta=ocp.args.JsonSave({"position": 4}),
        )
        manager.save(1, args=saved)
        manager.wait_until_finished()
        restored = manager.restore(
            1,
            args=ocp.args.Composite(
                state=restoring("standard", state),
                ema=restoring("pytree", other),
                direct=restoring("direct", state),
                stock=restoring("pytree", other),
                meta=ocp.args.JsonRestore(),
            ),
        )
        assert manager.item_metadata(1)["ema"].tree["text"] is not None
    same(restored.state, state)
    same(restored.ema, other)
    same(restored.direct, state)
    same(restored.stock, other)
    assert restored.meta == {"position": 4}
    with ocp.CheckpointManager(tmp_path) as manager:
        assert set(manager.restore(1).keys()) == {"state", "ema", "direct", "stock", "meta"}


def test_one_handler_for_two_items(mesh, tmp_path):
    first, second = state_of(mesh), state_of(mesh, 1)
    handler = lazy_orbax.pytree_handler()
    with ocp.CheckpointManager(
        tmp_path, item_handlers={"params": handler, "ema": handler}
    ) as manager:
        for step in (1, 2):
            manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.PyTreeSave(first), ema=ocp.args.PyTreeSave(second)
                ),
            )
        manager.wait_until_finished()
        args = ocp.args.Composite(
            params=restoring("pytree", first), ema=restoring("pytree", second)
        )
        for step in (1, 2):
            restored = manager.restore(step, args=args)
            same(restored.params, first)
            same(restored.ema, second)


REGISTERED = {
    "standard": (ocp.args.StandardSave, ocp.args.StandardRestore),
    "pytree": (ocp.args.PyTreeSave, ocp.args.PyTreeRestore),
    "direct": (lazy_orbax.args.LazySave, lazy_orbax.args.LazyRestore),
}


@pytest.mark.parametrize("item", ["state", None])
@pytest.mark.parametrize("face_name", FACES)
def test_in_a_registry(face_name, item, mesh, tmp_path):
    state, handler = state_of(mesh), face(face_name).lazy()
    registry = handlers.DefaultCheckpointHandlerRegistry()
    for args_type in REGISTERED[face_name]:
        registry.add(item, args_type, handler)
    registry.add("meta", ocp.args.JsonSave, ocp.JsonCheckpointHandler())
    registry.add("meta", ocp.args.JsonRestore)
    with ocp.CheckpointManager(tmp_path, handler_registry=registry) as manager:
        saved = ocp.args.Composite(
            state=face(face_name).save(state), meta=ocp.args.JsonSave({"a": 1})
        )
        manager.save(1, args=saved)
        manager.wait_until_finished()
        restored = manager.restore(
            1,
            args=ocp.args.Composite(state=restoring(face_name, state), meta=ocp.args.JsonRestore()),
        )
    same(restored.state, state)
    assert restored.meta == {"a": 1}
    assert len(list((tmp_path / "1" / "state").glob("_METADATA"))) == 1


@pytest.mark.parametrize("face_name", FACES)
@pytest.mark.parametrize("checkpointer", [ocp.Checkpointer, ocp.AsyncCheckpointer])
def test_in_a_checkpointer(checkpointer, face_name, mesh, tmp_path):
    kind, state = face(face_name), state_of(mesh)
    with checkpointer(kind.lazy()) as saver:
        saver.save(tmp_path / "a", args=kind.save(state))
        saver.save(tmp_path / "b", args=kind.save(state_of(mesh, 1)))
        if checkpointer is ocp.AsyncCheckpointer:
            saver.wait_until_finished()
        with pytest.raises(ValueError, match="already exists"):
            saver.save(tmp_path / "a", args=kind.save(state))
        saver.save(tmp_path / "a", args=kind.save(state_of(mesh, 2)), force=True)
        if checkpointer is ocp.AsyncCheckpointer:
            saver.wait_until_finished()
        same(saver.restore(tmp_path / "a", restoring(face_name, state)), state_of(mesh, 2))
        same(saver.restore(tmp_path / "b", restoring(face_name, state)), state_of(mesh, 1))
    # Stock's own checkpointers read the same directory.
    restored = ocp.StandardCheckpointer().restore(tmp_path / "b", abstract(state))
    same(restored, state_of(mesh, 1))
    assert set(ocp.PyTreeCheckpointer().restore(tmp_path / "b")) == set(state)


def test_in_a_composite_handler(mesh, tmp_path):
    state = state_of(mesh)
    composite = ocp.CompositeCheckpointHandler(
        "meta", state=lazy_orbax.standard_handler(), direct=lazy_orbax.LazyCheckpointHandler()
    )
    with ocp.AsyncCheckpointer(composite) as saver:
        saver.save(
            tmp_path / "x",
            ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                direct=lazy_orbax.args.LazySave(state),
                meta=ocp.args.JsonSave([1]),
            ),
        )
        saver.wait_until_finished()
        restored = saver.restore(
            tmp_path / "x",
            ocp.args.Composite(
                state=restoring("standard", state), direct=restoring("direct", state)
            ),
        )
    same(restored.state, state)
    same(restored.direct, state)


def test_without_args_as_older_code_calls_it(mesh, tmp_path):
    state = state_of(mesh)
    with ocp.Checkpointer(lazy_orbax.pytree_handler()) as saver:
        saver.save(tmp_path / "p", state)
        restore_args = jax.tree.map(arrays_restored_as, state)
        same(saver.restore(tmp_path / "p", item=state, restore_args=restore_args), state)
    with ocp.Checkpointer(lazy_orbax.standard_handler()) as saver:
        saver.save(tmp_path / "s", state)
        same(saver.restore(tmp_path / "s", abstract(state)), state)


def test_several_managers_share_a_handler_type(mesh, tmp_path):
    managers = [
        ocp.CheckpointManager(tmp_path / str(i), item_handlers=lazy_orbax.standard_handler())
        for i in range(3)
    ]
    for step in range(2):
        for i, manager in enumerate(managers):
            manager.save(step, args=ocp.args.StandardSave(state_of(mesh, 10 * i + step)))
    for i, manager in enumerate(managers):
        manager.wait_until_finished()
        for step in range(2):
            wanted = state_of(mesh, 10 * i + step)
            same(manager.restore(step, args=restoring("standard", wanted)), wanted)
        manager.close()
        manager.close()


def test_the_manager_keeps_and_deletes_as_told(mesh, tmp_path):
    options = ocp.CheckpointManagerOptions(max_to_keep=2, save_interval_steps=2)
    with ocp.CheckpointManager(
        tmp_path, item_handlers=lazy_orbax.pytree_handler(), options=options
    ) as manager:
        saved = [manager.save(s, args=ocp.args.PyTreeSave(state_of(mesh, s))) for s in range(9)]
        manager.wait_until_finished()
        assert saved == [s % 2 == 0 for s in range(9)]
        assert manager.all_steps() == [6, 8]
        with pytest.raises(ocp.checkpoint_manager.StepAlreadyExistsError):
            manager.save(8, args=ocp.args.PyTreeSave(state_of(mesh)), force=True)


def test_the_handlers_are_of_the_stock_types():
    assert type(lazy_orbax.standard_handler()) is ocp.StandardCheckpointHandler
    assert type(lazy_orbax.pytree_handler()) is ocp.PyTreeCheckpointHandler
    stock = ocp.PyTreeCheckpointHandler()
    assert lazy_orbax.LazyCheckpointHandler().typestr() == stock.typestr()
    assert isinstance(lazy_orbax.LazyCheckpointHandler(), ocp.AsyncCheckpointHandler)


def test_restore_args_from_a_target(mesh, tmp_path):
    """`checkpoint_utils.construct_restore_args`, which many loops use."""
    state = state_of(mesh)
    with ocp.CheckpointManager(tmp_path, item_handlers=lazy_orbax.pytree_handler()) as manager:
        manager.save(0, args=ocp.args.PyTreeSave(state))
        manager.wait_until_finished()
        restore_args = checkpoint_utils.construct_restore_args(state)
        restored = manager.restore(
            0, args=ocp.args.PyTreeRestore(item=state, restore_args=restore_args)
        )
    same(restored, state)


@pytest.mark.parametrize("settings", [{}, {"use_ocdbt": False}, {"use_zarr3": True}], ids=str)
def test_the_v1_api_restores(settings, mesh, tmp_path):
    state = {key: value for key, value in state_of(mesh).items() if key != "key"}
    with ocp.Checkpointer(lazy_orbax.standard_handler(**settings)) as saver:
        saver.save(tmp_path / "x", args=ocp.args.StandardSave(state))
    same(ocp_v1.load(tmp_path / "x", abstract(state)), state)
    assert ocp_v1.metadata(tmp_path / "x").metadata["w"].shape == (16, 8)
    with ocp.CheckpointManager(
        tmp_path / "m", item_handlers={"state": lazy_orbax.pytree_handler(**settings)}
    ) as manager:
        manager.save(5, args=ocp.args.Composite(state=ocp.args.PyTreeSave(state)))
    restored = ocp_v1.load_checkpointables(tmp_path / "m" / "5", {"state": abstract(state)})
    same(restored["state"], state)
    with ocp_v1.training.Checkpointer(tmp_path / "m") as checkpointer:
        assert checkpointer.latest.step == 5


def test_the_bare_handler_saves_at_once(mesh, tmp_path):
    """`handler.save` waits; `finalize` is what a checkpointer calls after it."""
    state = state_of(mesh)
    for face_name in FACES:
        kind, directory = face(face_name), epath.Path(tmp_path / face_name)
        directory.mkdir()
        handler = kind.lazy()
        handler.save(directory, args=kind.save(state))
        handler.finalize(directory)
        same(handler.restore(directory, args=restoring(face_name, state)), state)
        handler.close()
        handler.close()


@pytest.mark.parametrize("through_a_link", [False, True])
@pytest.mark.parametrize("face_name", FACES)
def test_a_path_with_two_dots(face_name, through_a_link, mesh, tmp_path):
    """It is the directory that the file system finds there, links followed, for all of us."""
    kind, state = face(face_name), state_of(mesh)
    (tmp_path / "real" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real" / "deep")
    (tmp_path / "plain").mkdir()
    run = f"{tmp_path}/{'link' if through_a_link else 'plain'}/../run"
    with ocp.CheckpointManager(run, item_handlers=kind.lazy()) as manager:
        assert manager.save(1, args=kind.save(state))
        manager.wait_until_finished()
        same(manager.restore(1, args=restoring(face_name, state)), state)
        assert manager.item_metadata(1).tree["w"].shape == (16, 8)
        found = lazy_orbax.restore_latest_good(manager, args=restoring(face_name, state))
        assert (found.step, found.skipped) == (1, ())
    assert lazy_orbax.verify(run).is_whole
    at = tmp_path / ("real/run" if through_a_link else "run")
    assert lazy_orbax.verify(at).is_whole
    stock_face = "standard" if face_name == "standard" else "pytree"
    with ocp.CheckpointManager(at, item_handlers=face(stock_face).stock()) as manager:
        same(manager.restore(1, args=restoring(stock_face, state)), state)


@pytest.mark.parametrize("checkpointer", [ocp.Checkpointer, ocp.AsyncCheckpointer])
def test_a_relative_path_is_refused_at_once_where_stock_refuses_it(
    checkpointer, mesh, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    state = state_of(mesh)
    with checkpointer(lazy_orbax.standard_handler()) as ours:
        with pytest.raises(OptionError, match=r"run/1.*absolute"):
            ours.save("run/1", args=ocp.args.StandardSave(state))
        ours.save(tmp_path / "run" / "2", args=ocp.args.StandardSave(state))
    with ocp.StandardCheckpointer() as stock:
        same(stock.restore(tmp_path / "run" / "2", abstract(state)), state)
    with checkpointer(lazy_orbax.pytree_handler(use_ocdbt=False)) as ours:
        ours.save("run/3", args=ocp.args.PyTreeSave(state))
    with ocp.PyTreeCheckpointer() as stock:
        restore_args = jax.tree.map(arrays_restored_as, state)
        same(stock.restore(tmp_path / "run" / "3", restore_args=restore_args), state)


@pytest.mark.parametrize("name", ["x.orbax-checkpoint-tmp", "x.orbax-checkpoint-tmp/run", "run_3"])
@pytest.mark.parametrize("item", ["state", "params_2", "7"])
@pytest.mark.parametrize("prefix", [None, "step", "my_step"])
def test_what_a_run_and_an_item_are_called_hides_no_step(prefix, item, name, mesh, tmp_path):
    timelines, run, state = [], tmp_path / name, state_of(mesh)
    lazy_options = lazy_orbax.LazyOptions(on_timeline=timelines.append)
    with ocp.CheckpointManager(
        run,
        item_handlers={item: lazy_orbax.standard_handler(options=lazy_options)},
        options=ocp.CheckpointManagerOptions(step_prefix=prefix),
    ) as manager:
        for step in (12, 13):
            args = ocp.args.Composite(**{item: ocp.args.StandardSave(state)})
            assert manager.save(step, args=args)
            manager.wait_until_finished()
    names = [f"{prefix}_{step}" if prefix else str(step) for step in (12, 13)]
    directories = [str(run / one / item) for one in names]
    assert [each.step for each in timelines] == [12, 13]
    assert [each.directory for each in timelines] == directories
    assert [each.same_as for each in timelines] == [None, directories[0]]
    assert lazy_orbax.verify(run).is_whole
    assert len(lazy_orbax.verify(run).items) == 2
    assert verify.newest_whole_step(directories[1]) == 12
    parts = (run / names[1] / item / digest_file.DIRECTORY).glob("process_*")
    assert [digest_file.parse(part.read_bytes()).step for part in parts] == [13]
