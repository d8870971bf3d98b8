"""The snippets of `examples/guides/modes.md` are one program, and it does what the page says."""

import numpy as np
import orbax.checkpoint as ocp
import pytest
from equipment import pages

import lazy_orbax

PAGE = pages.GUIDES / "modes.md"


@pytest.fixture
def after(tmp_path, monkeypatch):
    """The names that the snippets define, and the timelines of their saves."""
    timelines = []
    options = lazy_orbax.LazyOptions

    def recorded(**keywords):
        return options(on_timeline=timelines.append, **keywords)

    monkeypatch.setattr(lazy_orbax, "LazyOptions", recorded)
    monkeypatch.chdir(tmp_path)
    assert len(pages.blocks(PAGE)) == 4
    return pages.run(PAGE), timelines


def test_the_snippets_save_what_the_page_says(after, tmp_path):
    names, timelines = after
    found = {}
    for way in ("split", "in_step", "no_donation"):
        with ocp.CheckpointManager(tmp_path / way) as stock:
            assert stock.all_steps() == [0, 2, 4]
            found[way] = stock.restore(4)
        found[way + " mode"] = {t.mode for t in timelines if f"/{way}/" in t.directory}
    assert found["split mode"] == found["no_donation mode"] == {"direct"}
    assert found["in_step mode"] == {"in_step"}
    # After batch 4, and before it.
    assert [int(found[w]["step"]) for w in ("split", "in_step", "no_donation")] == [5, 4, 5]
    state = names["new_state"]()
    for batch in names["batches"][:4]:
        state, _ = names["train_step"](state, batch)
    np.testing.assert_allclose(found["in_step"]["params"]["w"], state["params"]["w"], rtol=1e-5)
