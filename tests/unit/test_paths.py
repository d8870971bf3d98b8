"""What a path says of steps, items and temporary directories."""

import pathlib

import pytest

from lazy_orbax import _paths

MARK = ".orbax-checkpoint-tmp"


@pytest.mark.parametrize(
    ("path", "directory", "step"),
    [
        ("/run/12/state", "/run/12/state", 12),
        ("/run/12", "/run/12", 12),
        ("/run/12/", "/run/12/", 12),
        ("/run/0/state", "/run/0/state", 0),
        ("/run/000012/state", "/run/000012/state", 12),
        ("/run/step_12/state", "/run/step_12/state", 12),
        ("/run/my-step-12/state", "/run/my-step-12/state", 12),
        ("/run/12.orbax-checkpoint-tmp/state", "/run/12/state", 12),
        ("/run/12.orbax-checkpoint-tmp-1699999999/state", "/run/12/state", 12),
        (
            "/run/12.orbax-checkpoint-tmp/state.orbax-checkpoint-tmp",
            "/run/12/state",
            12,
        ),
        ("gs://bucket/run/12/state", "gs://bucket/run/12/state", 12),
        ("/run/final", "/run/final", None),
        ("/run/v2b/state", "/run/v2b/state", None),
        ("/3/run/state", "/3/run/state", None),
        ("", "", None),
    ],
)
def test_the_final_directory_and_the_step_in_it(path, directory, step):
    assert _paths.final(path) == directory
    assert _paths.step_of_item(directory) == step
    assert _paths.step_of_item(path) == step


@pytest.mark.parametrize(
    ("path", "directory", "step"),
    [
        ("gs://bucket/run/step_12/params_2", "gs://bucket/run/step_12/params_2", 12),
        ("gs://bucket/run/step_12/final", "gs://bucket/run/step_12/final", 12),
        ("gs://bucket/run/final/params_2", "gs://bucket/run/final/params_2", 2),
        (f"/run/step_12{MARK}/params_2{MARK}", "/run/step_12/params_2", 12),
        (f"/run/step_12{MARK}/3{MARK}", "/run/step_12/3", 12),
        (f"/run_3/step_12{MARK}", "/run_3/step_12", 12),
        (f"/2024/step_12{MARK}", "/2024/step_12", 12),
        (f"/run_3/final{MARK}", "/run_3/final", None),
        (f"/run_3/final{MARK}/params_2{MARK}", "/run_3/final/params_2", None),
        (f"/x{MARK}/run/12/state", f"/x{MARK}/run/12/state", 12),
        (f"/x{MARK}/run/12{MARK}/state{MARK}", f"/x{MARK}/run/12/state", 12),
        (f"/x{MARK}/12{MARK}/state{MARK}", f"/x{MARK}/12/state", 12),
        (f"/x{MARK}/y/12{MARK}/", f"/x{MARK}/y/12/", 12),
        (f"/x{MARK}/12", f"/x{MARK}/12", 12),
        (f"/x{MARK}/state", "/x/state", None),
        (f"/x{MARK}/params_2", "/x/params_2", None),
        (f"/run/x{MARK}/state", "/run/x/state", None),
    ],
)
def test_only_the_names_of_the_step_and_of_the_item_count(path, directory, step):
    assert _paths.final(path) == directory
    assert _paths.step_of_item(path) == step


def test_an_item_with_a_number_in_its_name_does_not_hide_the_step():
    assert _paths.step_of_item("/run/12/layer_3") == 12


@pytest.mark.parametrize(
    ("directory", "root"),
    [
        (f"/run/5{MARK}/state{MARK}", f"/run/5{MARK}"),
        (f"/run/5{MARK}/state", f"/run/5{MARK}"),
        (f"/run/5{MARK}", f"/run/5{MARK}"),
        (f"/run{MARK}/5/state", ""),
        (f"/run{MARK}/5", ""),
        (f"/run{MARK}/state", f"/run{MARK}"),
        (f"/run{MARK}/params_2", f"/run{MARK}"),
        (f"/run{MARK}/run/5{MARK}", f"/run{MARK}/run/5{MARK}"),
        ("/run/5/state", ""),
        (f"gs://bucket/5{MARK}/state{MARK}", ""),
        (f"5{MARK}/state", ""),
        ("", ""),
    ],
)
def test_what_is_the_directory_of_a_step(directory, root):
    assert _paths.temporary_root(directory) == root


@pytest.mark.parametrize(
    ("name", "step", "is_temporary"),
    [
        ("12", 12, False),
        ("0", 0, False),
        ("000012", 12, False),
        ("step_12", 12, False),
        ("my-step-12", 12, False),
        (f"12{MARK}", 12, True),
        (f"step_12{MARK}-1699999999", 12, True),
        (f"final{MARK}", None, True),
        (f"final{MARK}-1699999999", None, True),
        ("final", None, False),
        ("v2", None, False),
        ("12b", None, False),
        ("metadata", None, False),
        ("", None, False),
    ],
)
def test_what_the_name_of_a_directory_says(name, step, is_temporary):
    assert _paths.step_of(name) == step
    assert _paths.is_temporary(name) == is_temporary
    assert _paths.is_temporary(f"/run/{name}") == is_temporary


@pytest.mark.parametrize(
    ("directory", "item"),
    [
        ("/run/12/state", "/run/*/state"),
        ("/run/step_12/state", "/run/*/state"),
        ("/run/12", "/run/*"),
        ("gs://bucket/run/12/state/", "gs://bucket/run/*/state"),
        ("/run/final", "/run/final"),
        ("/run/step_12/params_2", "/run/*/params_2"),
        (f"/run/step_12{MARK}/params_2{MARK}", "/run/*/params_2"),
        (f"/run_3/step_12{MARK}", "/run_3/*"),
        (f"/run_3/final{MARK}", "/run_3/final"),
        (f"/run_3/final{MARK}/state", "/run_3/final/state"),
        (f"/x{MARK}/12{MARK}/state{MARK}", f"/x{MARK}/*/state"),
    ],
)
def test_the_directories_of_an_item_have_the_step_out_in_common(directory, item):
    assert _paths.item_of(directory) == item


def test_where_the_step_and_the_run_of_an_item_may_be():
    assert _paths.places_of_step("/runs/run/12/state/") == ("/runs/run/12/state", "/runs/run/12")
    assert _paths.places_of_run("/runs/run/12/state") == {"/runs/run/12", "/runs/run"}
    assert _paths.places_of_run("/12") == set()


def test_the_steps_of_a_run_are_in_order_and_nothing_else_is_among_them(tmp_path):
    names = [f"3{MARK}", "10", "step_2", "metadata", f"final{MARK}", "notes.txt", "9"]
    for name in names:
        (tmp_path / name).mkdir()
    found = _paths.steps_in(pathlib.Path(tmp_path))
    assert [(each.path.name, each.step, each.is_temporary) for each in found] == [
        (f"final{MARK}", None, True),
        ("step_2", 2, False),
        (f"3{MARK}", 3, True),
        ("9", 9, False),
        ("10", 10, False),
    ]


def test_two_dots_are_what_the_file_system_makes_of_them(tmp_path):
    (tmp_path / "real" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real" / "deep")
    for path, found in [
        (f"{tmp_path}/link/../run", f"{tmp_path}/real/run"),
        (f"{tmp_path}/real/../run/5", f"{tmp_path}/run/5"),
        (f"{tmp_path}/link/..", f"{tmp_path}/real"),
        (f"{tmp_path}/link/run", f"{tmp_path}/link/run"),
        (f"{tmp_path}/a..b/..c", f"{tmp_path}/a..b/..c"),
        ("gs://bucket/a/../b", "gs://bucket/a/../b"),
        ("", ""),
    ]:
        assert _paths.without_dots(path) == found


def test_an_absolute_path_has_no_slash_at_its_end(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path, found in (
        ("run/", f"{tmp_path}/run"),
        ("/a//run", "/a/run"),
        ("gs://bucket/run/", "gs://bucket/run"),
    ):
        assert _paths.absolute(path) == found
