"""What Orbax publishes a step with, where it takes no class of paths."""

import os

import orbax.checkpoint as ocp
import pytest
from orbax.checkpoint import v1 as ocp1

from lazy_orbax._orbax import publishing, v1
from lazy_orbax.handlers.v1 import lazy_v1
from lazy_orbax.save.durable_path import DurablePath, durable
from lazy_orbax.storage import fsync

ATOMICITY = ocp.path.atomicity


def test_both_ways_of_v1_publish_through_one_function():
    assert v1.V1["atomicity"] is ATOMICITY
    lazy_v1()()
    changed = ATOMICITY.on_commit_callback
    publishing.publish_with(print)
    assert ATOMICITY.on_commit_callback is changed


def test_an_orbax_that_publishes_otherwise_is_noticed(monkeypatch):
    async def otherwise(self):
        await self._temporary_path.publish()

    moved = type("Moved", (), {"__init__": v1.V1["response"].__init__, "_finalize_save": otherwise})
    monkeypatch.setitem(v1._NEEDED, "response", ("saving.execution", "Moved"))
    module = v1.importlib.import_module(v1.V1["response"].__module__)
    monkeypatch.setattr(module, "Moved", moved, raising=False)
    _, _, missing = v1._probe()
    assert [name.rpartition(".")[2] for name in missing] == ["_finalize_save"]


@pytest.mark.parametrize(
    "kind",
    [
        ATOMICITY.AtomicRenameTemporaryPath,
        ATOMICITY.CommitFileTemporaryPath,
        DurablePath,
        type("Other", (ATOMICITY.AtomicRenameTemporaryPath,), {}),
    ],
)
def test_only_what_orbax_chose_to_rename_is_published_in_another_way(tmp_path, kind):
    path = kind.from_final(ocp1.Context().file_options.path_class(tmp_path / "1"))
    made = durable(path)
    if kind is ATOMICITY.AtomicRenameTemporaryPath:
        assert type(made) is DurablePath
        assert (made.get(), made.get_final()) == (path.get(), path.get_final())
    else:
        assert made is path


@pytest.mark.parametrize("way", ["save", "Checkpointer"])
@pytest.mark.parametrize("is_lazy", [True, False])
def test_what_v1_lists_was_synced_with_its_metadata(tmp_path, monkeypatch, way, is_lazy):
    order = []
    rename, sync = os.rename, os.fsync

    def renamed(source, target, **keywords):
        order.append(("rename", os.path.basename(target)))
        return rename(source, target, **keywords)

    def synced(descriptor):
        order.append(("fsync", os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))))
        sync(descriptor)

    undo = lazy_v1()
    if not is_lazy:
        undo()
    monkeypatch.setattr(os, "rename", renamed)
    monkeypatch.setattr(fsync.os, "fsync", synced)
    if way == "save":
        ocp1.save(tmp_path / "1", {"a": 1})
    else:
        with ocp1.training.Checkpointer(tmp_path) as run:
            run.save(1, {"a": 1})
    undo()
    assert sorted(os.listdir(tmp_path)) == ["1"]
    metadata = [i for i, call in enumerate(order) if call == ("fsync", "_CHECKPOINT_METADATA")]
    if is_lazy:
        assert metadata[0] < order.index(("rename", "1"))
    else:
        assert metadata == []
