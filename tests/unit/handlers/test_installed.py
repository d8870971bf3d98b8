"""`install()`: Orbax's own entry points save lazily, until they are told otherwise."""

import copy
import threading
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from equipment.trees import on_mesh
from etils import epath
from orbax.checkpoint.experimental import v1

import lazy_orbax
from lazy_orbax._orbax import entry_points
from lazy_orbax.errors import OptionError, StockFallbackWarning, StockSaveWarning
from lazy_orbax.handlers import installed
from lazy_orbax.handlers.stock_shaped import lazy_part_of


@pytest.fixture
def tree(mesh):
    return {"w": on_mesh(np.arange(64.0).reshape(8, 8), mesh, "a"), "step": 3}


@pytest.fixture(autouse=True)
def restored_orbax():
    """Whatever a test installed goes with it."""
    yield
    lazy_orbax.uninstall()


def has_digests(directory):
    return any(directory.rglob("lazy_orbax*"))


def by_manager(path, tree, **keywords):
    with ocp.CheckpointManager(path, **keywords) as manager:
        manager.save(0, args=ocp.args.StandardSave(tree))


def by_standard_checkpointer(path, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "0", tree)


def by_pytree_checkpointer(path, tree):
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(path / "0", tree)


def by_items(path, tree):
    with ocp.CheckpointManager(path, item_names=("a", "b")) as manager:
        args = {"a": ocp.args.StandardSave(tree), "b": ocp.args.PyTreeSave(tree)}
        manager.save(0, args=ocp.args.Composite(**args))


def by_own_subclass(path, tree):
    class Handler(ocp.PyTreeCheckpointHandler):
        def __init__(self):
            super().__init__("own", use_zarr3=True)

    with ocp.Checkpointer(Handler()) as checkpointer:  # Its args are not registered: a legacy one.
        checkpointer.save(path / "0", tree)


class OwnStandard(ocp.StandardCheckpointHandler):
    """Its `restore` takes what the stock one does not, and not all that it does."""

    def restore(self, directory, args=None, *, scale=1):
        return jax.tree.map(lambda x: x * scale, super().restore(directory, args=args))


def by_legacy_flax(path, tree):
    checkpoints = pytest.importorskip("flax.training.checkpoints", reason="Flax is not installed")
    checkpoints.save_checkpoint(str(path), tree, 0)


def by_v1(path, tree):
    v1.save(path / "0", tree)


def by_v1_checkpointer(path, tree):
    with v1.training.Checkpointer(path) as checkpointer:
        checkpointer.save(0, tree)


ENTRY_POINTS = [
    by_v1,
    by_v1_checkpointer,
    by_manager,
    by_standard_checkpointer,
    by_pytree_checkpointer,
    by_items,
    by_own_subclass,
    by_legacy_flax,
]


@pytest.mark.parametrize("save", ENTRY_POINTS)
def test_an_entry_point_of_orbax_saves_lazily_while_it_is_installed(tmp_path, tree, save):
    with lazy_orbax.install():
        save(tmp_path / "during", tree)
    save(tmp_path / "after", tree)
    assert has_digests(tmp_path / "during")
    assert not has_digests(tmp_path / "after")
    files = [sorted(p.name for p in (tmp_path / d).iterdir()) for d in ("during", "after")]
    assert files[0] == files[1]


@pytest.mark.parametrize("save", [by_manager, by_standard_checkpointer, by_pytree_checkpointer])
def test_what_was_saved_is_restored_with_and_without_it(tmp_path, tree, save):
    with lazy_orbax.install():
        save(tmp_path, tree)
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)
    (step,) = tmp_path.iterdir()
    item = step / "default" if (step / "default").exists() else step
    for is_installed in (False, True):
        if is_installed:
            lazy_orbax.install()
        with ocp.StandardCheckpointer() as checkpointer:
            restored = checkpointer.restore(item, target)
        np.testing.assert_array_equal(restored["w"], tree["w"])
        assert restored["w"].sharding == tree["w"].sharding
        assert restored["step"] == 3


def save_by_manager(manager, tree):
    manager.save(1, args=ocp.args.StandardSave(tree))
    manager.wait_until_finished()
    manager.restore(1, args=ocp.args.StandardRestore(tree))


def save_items(manager, tree):
    args = {"a": ocp.args.StandardSave(tree), "b": ocp.args.PyTreeSave(tree)}
    manager.save(1, args=ocp.args.Composite(**args))


def save_by_v1(checkpointer, tree):
    checkpointer.save_async(1, tree)


MANAGERS = {
    "manager": (ocp.CheckpointManager, save_by_manager),
    "items": (lambda path: ocp.CheckpointManager(path, item_names=("a", "b")), save_items),
    "v1": (v1.training.Checkpointer, save_by_v1),
}


@pytest.mark.parametrize("kind", MANAGERS)
def test_a_manager_that_is_made_while_it_is_installed_is_lazy_later(tmp_path, tree, kind):
    make, save = MANAGERS[kind]
    init = ocp.PyTreeCheckpointHandler.__init__
    restored = []
    options = lazy_orbax.LazyOptions(on_restore=restored.append)
    with lazy_orbax.install(options):
        manager = make(tmp_path / "lazy")
    assert ocp.PyTreeCheckpointHandler.__init__ is init
    with make(tmp_path / "stock") as stock, manager:
        save(manager, tree)
        assert ocp.PyTreeCheckpointHandler.__init__ is init
        save(stock, tree)
    assert has_digests(tmp_path / "lazy")
    assert not has_digests(tmp_path / "stock")
    assert len(restored) == (kind == "manager")
    files = [sorted(p.name for p in (tmp_path / d).iterdir()) for d in ("lazy", "stock")]
    assert files[0] == files[1]


def test_a_handler_that_another_thread_makes_beside_such_a_manager_is_a_stock_one():
    made = []

    def make():
        made.append(installed.saves_lazily(ocp.StandardCheckpointHandler()))

    with lazy_orbax.install() as installation:
        pass
    with installed._holding(installation):
        thread = threading.Thread(target=make)
        thread.start()
        thread.join()
        make()
    make()
    assert made == [False, True, False]


def test_a_donated_state_is_saved_as_it_was(tmp_path, mesh):
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    state = on_mesh(np.zeros((8, 8)), mesh, "a")
    with lazy_orbax.install(), ocp.CheckpointManager(tmp_path) as manager:
        for i in range(4):
            manager.save(i, args=ocp.args.StandardSave({"x": state}))
            state = step(state)
    for i in range(4):
        assert (lazy_orbax.load(tmp_path / str(i) / "default")["x"] == i).all()


def test_the_last_installation_holds_and_its_end_brings_the_one_before(tmp_path):
    seen = []
    outer = lazy_orbax.LazyOptions(verify_snapshot=7)
    inner = lazy_orbax.LazyOptions(verify_snapshot=8)

    def options():
        seen.append(lazy_part_of(ocp.StandardCheckpointHandler()).options)
        return seen[-1]

    with lazy_orbax.install(outer):
        with lazy_orbax.install(inner):
            assert options() is inner
            assert lazy_orbax.status().options is inner
        assert options() is outer
    assert not lazy_orbax.status().is_installed
    with pytest.raises(OptionError):
        options()


class Meeting:
    """A lock at which two threads meet before either goes on."""

    def __init__(self):
        self.lock, self.both, self.mine = threading.RLock(), threading.Barrier(2), threading.local()

    def __enter__(self):
        if not hasattr(self.mine, "has_met"):
            self.mine.has_met = True
            self.both.wait(30)
        self.lock.acquire()

    def __exit__(self, *_):
        self.lock.release()


def test_two_threads_install_at_once(monkeypatch):
    lock = installed._LOCK
    monkeypatch.setattr(installed, "_LOCK", Meeting())
    installations = []

    def installed_with(mode):
        return lazy_orbax.install(lazy_orbax.LazyOptions(mode=mode))

    threads = [
        threading.Thread(target=lambda mode=mode: installations.append(installed_with(mode)))
        for mode in ("stage", "direct")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    monkeypatch.setattr(installed, "_LOCK", lock)
    holds = {installation.options: installation for installation in installations}
    with holds.pop(lazy_orbax.status().options):
        pass
    assert lazy_orbax.status().options in holds


def test_a_keyword_that_orbax_does_not_know_is_named_with_its_owner():
    lazy_orbax.install()
    with pytest.raises(
        TypeError, match=r"__init__\(\) got an unexpected keyword argument 'useocdbt'"
    ):
        ocp.PyTreeCheckpointHandler(useocdbt=True)


def test_uninstall_ends_all_of_them():
    init = ocp.PyTreeCheckpointHandler.__init__
    for _ in range(2):
        lazy_orbax.install()
    assert ocp.PyTreeCheckpointHandler.__init__ is not init
    lazy_orbax.uninstall()
    assert ocp.PyTreeCheckpointHandler.__init__ is init
    lazy_orbax.uninstall()


@pytest.mark.parametrize(
    ("given", "leaves_it", "compresses"),
    [({}, False, False), ({}, True, True), ({"use_compression": False}, True, False)],
)
def test_whether_it_compresses(given, leaves_it, compresses):
    with lazy_orbax.install(use_compression=leaves_it):
        handler = ocp.PyTreeCheckpointHandler(**given)
    assert lazy_part_of(handler).settings.use_compression == compresses


def test_wrong_options_install_nothing():
    with pytest.raises(OptionError, match="LazyOptions"):
        lazy_orbax.install("fast")
    assert not lazy_orbax.status().is_installed


def test_an_orbax_whose_inside_moved_stays_stock_and_warns(monkeypatch, tmp_path, tree):
    def init(self, aggregate_filename=None, *, use_ocdbt=True):
        raise AssertionError("it is not called")

    with monkeypatch.context() as patched:
        patched.setattr(ocp.PyTreeCheckpointHandler, "__init__", init)
        with pytest.warns(StockFallbackWarning, match="handler_impl"):
            lazy_orbax.install()
        assert ocp.PyTreeCheckpointHandler.__init__ is init
    lazy_orbax.uninstall()
    by_manager(tmp_path, tree)


def test_a_handler_that_was_made_before_saves_the_stock_way_and_warns_once(tmp_path, tree):
    with ocp.CheckpointManager(tmp_path, item_handlers=ocp.StandardCheckpointHandler()) as manager:
        lazy_orbax.install()
        with pytest.warns(StockSaveWarning, match="made before"):
            manager.save(0, args=ocp.args.StandardSave(tree))
        manager.wait_until_finished()
        with warnings.catch_warnings(action="error"):
            manager.save(1, args=ocp.args.StandardSave(tree))
            manager.wait_until_finished()
    assert lazy_orbax.status().n_stock_saves == 2
    assert "2 saves went the stock way" in str(lazy_orbax.status())


def test_an_item_without_a_handler_beside_a_lazy_one_warns(tmp_path, tree, monkeypatch):
    monkeypatch.setattr(lazy_orbax.handlers.stock_saves.STOCK_SAVES, "_has_warned", False)
    handlers = {"a": lazy_orbax.standard_handler()}
    args = {"a": ocp.args.StandardSave(tree), "b": ocp.args.StandardSave(tree)}
    with (
        ocp.CheckpointManager(tmp_path, item_names=("a", "b"), item_handlers=handlers) as manager,
        pytest.warns(StockSaveWarning, match="standard_handler"),
    ):
        manager.save(0, args=ocp.args.Composite(**args))


def test_stock_saves_beside_lazy_ones_are_nobodys_business(tmp_path, tree):
    with warnings.catch_warnings(action="error"):
        by_manager(tmp_path / "lazy", tree, item_handlers=lazy_orbax.standard_handler())
        by_manager(tmp_path / "stock", tree)


def test_a_lazy_handler_that_is_called_after_a_stock_save_is_not_of_that_save(
    tmp_path, tree, monkeypatch
):
    # It is called without a checkpointer, which would give the save a number of its own.
    monkeypatch.setattr(lazy_orbax.handlers.stock_saves.STOCK_SAVES, "_has_warned", False)
    handler = lazy_orbax.standard_handler()
    with warnings.catch_warnings(action="error"):
        by_manager(tmp_path / "stock", tree)
        (tmp_path / "lazy").mkdir()
        handler.save(epath.Path(tmp_path / "lazy"), args=ocp.args.StandardSave(tree))


def test_status_names_the_type_handler_that_somebody_else_registered(tmp_path, tree, mesh):
    class Other(ocp.type_handlers.ArrayHandler):
        pass

    ours = ocp.type_handlers.get_type_handler(jax.Array)
    ocp.type_handlers.register_type_handler(jax.Array, Other(), override=True)
    try:
        with lazy_orbax.install():
            assert any("Other" in reason for reason in lazy_orbax.status().not_lazy)
            by_manager(tmp_path, tree)
    finally:
        ocp.type_handlers.register_type_handler(jax.Array, ours, override=True)
    assert has_digests(tmp_path)
    assert entry_points.array_handler_of_others() == ""


def test_lazy_args_alone_are_enough(tmp_path, tree):
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(0, args=lazy_orbax.args.LazySave(tree))
    assert has_digests(tmp_path)
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)
    with ocp.CheckpointManager(tmp_path) as stock:
        restored = stock.restore(0, args=ocp.args.StandardRestore(target))
    np.testing.assert_array_equal(restored["w"], tree["w"])


HANDLERS = {
    "standard_handler": lazy_orbax.standard_handler,
    "pytree_handler": lambda: lazy_orbax.pytree_handler(aggregate_filename="own", use_zarr3=True),
    "LazyCheckpointHandler": lazy_orbax.LazyCheckpointHandler,
}


@pytest.mark.parametrize("kind", HANDLERS)
def test_a_deep_copy_of_a_handler_saves_lazily_and_by_itself(tmp_path, tree, kind):
    handler = HANDLERS[kind]()
    copied = copy.deepcopy(handler)
    assert type(copied) is type(handler)
    assert lazy_part_of(copied) is not lazy_part_of(handler)
    assert lazy_part_of(copied).settings == lazy_part_of(handler).settings
    handler.close()
    args = {
        "standard_handler": ocp.args.StandardSave,
        "pytree_handler": ocp.args.PyTreeSave,
        "LazyCheckpointHandler": lazy_orbax.args.LazySave,
    }[kind]
    with ocp.CheckpointManager(tmp_path, item_handlers=copied) as manager:
        manager.save(0, args=args({"x": jnp.arange(4)}))
    assert has_digests(tmp_path)
    np.testing.assert_array_equal(lazy_orbax.load(tmp_path / "0" / "default")["x"], np.arange(4))


def test_a_deep_copy_calls_back_whom_the_handler_does(tmp_path, tree):
    class Owner:
        def __init__(self):
            self.lock, self.heard = threading.Lock(), []

        def hear(self, timeline):
            with self.lock:
                self.heard.append(timeline)

    owner = Owner()
    options = lazy_orbax.LazyOptions(on_timeline=owner.hear, on_restore=owner.hear)
    copied = copy.deepcopy(lazy_orbax.pytree_handler(options=options))
    with ocp.AsyncCheckpointer(copied) as checkpointer:
        checkpointer.save(tmp_path / "0", tree)
        checkpointer.wait_until_finished()
        restore_args = ocp.checkpoint_utils.construct_restore_args(tree)
        checkpointer.restore(tmp_path / "0", item=tree, restore_args=restore_args)
    assert len(owner.heard) == 2


@pytest.mark.parametrize("by_name", [False, True])
def test_a_subclass_restores_with_the_signature_that_it_has(tmp_path, tree, by_name):
    path, args = epath.Path(tmp_path), ocp.args.StandardRestore(tree)
    with lazy_orbax.install():
        handler = OwnStandard()
    handler.save(path, args=ocp.args.StandardSave(tree))
    handler.finalize(path)
    given = {"args": args} if by_name else {}
    found = handler.restore(path, *([] if by_name else [args]), scale=2, **given)
    assert found["step"] == 6
    assert np.array_equal(found["w"], np.arange(64.0).reshape(8, 8) * 2)


class OwnPyTree(ocp.PyTreeCheckpointHandler):
    """Its methods have names of their own for what the stock ones take."""

    def restore(self, path, args=None):
        return super().restore(path, args=args)

    def metadata(self, path, *, more=0):
        return more, super().metadata(path)


def test_a_subclass_has_names_of_its_own_for_what_it_takes(tmp_path, tree):
    path, restore_args = epath.Path(tmp_path), ocp.checkpoint_utils.construct_restore_args(tree)
    args = ocp.args.PyTreeRestore(tree, restore_args)
    with lazy_orbax.install():
        handler = OwnPyTree()
    handler.save(path, args=ocp.args.PyTreeSave(tree))
    handler.finalize(path)
    assert handler.restore(path, args)["step"] == handler.restore(path=path, args=args)["step"] == 3
    more, found = handler.metadata(path=path, more=5)
    assert more == 5
    assert found.tree.keys() == tree.keys()
