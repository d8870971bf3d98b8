"""Two items of one step that share a handler."""

import threading

import numpy as np
import orbax.checkpoint as ocp
from equipment.gates import within
from equipment.trees import on_mesh

import lazy_orbax
from lazy_orbax._orbax import handed_in
from lazy_orbax.save.pipeline import Save


def test_an_item_that_is_durable_before_the_next_is_enqueued_is_still_told_committed(
    tmp_path, mesh, monkeypatch
):
    timelines, began, durable = [], [], threading.Event()
    options = lazy_orbax.LazyOptions(on_timeline=timelines.append)
    handler = lazy_orbax.pytree_handler(options=options)
    path_of, write = handed_in.path_of, Save.write

    def write_and_tell(self, *args):
        write(self, *args)
        durable.set()

    def path_when_the_item_before_is_durable(directory):
        assert not began or durable.wait(30)
        began.append(directory)
        return path_of(directory)

    monkeypatch.setattr(Save, "write", write_and_tell)
    monkeypatch.setattr(handed_in, "path_of", path_when_the_item_before_is_durable)
    tree = {"w": on_mesh(np.ones((8, 8), np.float32), mesh, "a")}
    args = ocp.args.Composite(a=ocp.args.PyTreeSave(tree), b=ocp.args.PyTreeSave(tree))
    handlers = {"a": handler, "b": handler}
    with ocp.CheckpointManager(tmp_path, item_handlers=handlers) as manager:
        for step in (1, 2):
            within(manager.save, step, args=args)
            within(manager.wait_until_finished)
    assert [timeline.committed_s is not None for timeline in timelines] == [True] * 4
    assert len({timeline.directory for timeline in timelines}) == 4
