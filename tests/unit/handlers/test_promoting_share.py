"""What one machine leaves of an attempt goes, and nothing of another one."""

import os

from lazy_orbax.handlers.promoting_share import remove_late
from lazy_orbax.save.part import Attempt


def test_what_is_removed_of_a_part_is_of_its_own_attempt(tmp_path):
    item = tmp_path / "3.orbax-checkpoint-tmp" / "default"
    old, new = Attempt("aa", (0, 1)), Attempt("bb", (0, 1))
    for attempt in (old, new):
        (item / attempt.database(1)).mkdir(parents=True)
        (item / attempt.folder).mkdir()
    remove_late(str(item), old, 1)
    assert sorted(os.listdir(item)) == sorted([new.database(1), new.folder])
    remove_late(str(item), new, 1)
    assert os.listdir(tmp_path) == []
