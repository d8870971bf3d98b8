"""`search`: it finds what is to be found, again the same, and goes on where it ended."""

import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from equipment.trees import assert_same, on_mesh
from etils import epath

import lazy_orbax
from lazy_orbax.combine import search_states
from lazy_orbax.errors import MergeError, OptionError

N = 4
BEST = np.array([-0.3, 0.2, 0.5, 0.6])


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Unit vectors: the state that coefficients make has the coefficients in it."""
    root = tmp_path_factory.mktemp("search")
    for i in range(N):
        half = jnp.asarray(np.eye(N)[i], jnp.bfloat16)
        tree = {"w": np.eye(N, dtype=np.float32)[i], "half": half, "step": i, "rate": float(i)}
        checkpointer = ocp.Checkpointer(lazy_orbax.pytree_handler())
        checkpointer.save(epath.Path(root / str(i)), args=ocp.args.PyTreeSave(tree))
    return [root / str(i) for i in range(N)]


def distance(tree):
    assert tree["step"] == N - 1
    assert tree["half"].dtype == jnp.bfloat16
    return float(np.linalg.norm(np.asarray(tree["w"]) - BEST))


def test_it_finds_a_better_combination_than_any_average(sources):
    found = lazy_orbax.search(distance, sources, 300)
    assert found.score < 0.1 < found.best_ema < found.last
    assert math.isclose(math.fsum(found.coefficients), 1, abs_tol=1e-9)
    assert np.linalg.norm(np.array(found.coefficients) - BEST) == pytest.approx(found.score, 1e-4)
    assert "searched" in str(found)
    assert (found.kept_differences, found.n_evaluated) == (True, 300)


def test_differences_that_do_not_fit_are_streamed(sources, tmp_path, monkeypatch):
    lazy_orbax.search(distance, sources, 10, log=tmp_path / "kept")
    monkeypatch.setattr(search_states, "memory_bytes", lambda: 100)
    found = lazy_orbax.search(distance, sources, 10, log=tmp_path / "streamed")
    assert not found.kept_differences
    logs = [(tmp_path / name).read_text().splitlines()[1:] for name in ("kept", "streamed")]
    for kept, streamed in zip(*(map(json.loads, log) for log in logs), strict=True):
        assert kept["score"] == pytest.approx(streamed["score"], abs=1e-6)


def test_the_same_seed_finds_the_same_and_another_one_something_else(sources):
    found = [lazy_orbax.search(distance, sources, 40, seed=seed) for seed in (1, 1, 2)]
    assert found[0] == found[1]
    assert found[0].coefficients != found[2].coefficients


def test_it_goes_on_where_it_was_interrupted(sources, tmp_path):
    whole = lazy_orbax.search(distance, sources, 30, log=tmp_path / "whole")
    calls = 0

    def failing(tree):
        nonlocal calls
        calls += 1
        if calls == 20:
            raise KeyboardInterrupt
        return distance(tree)

    with pytest.raises(KeyboardInterrupt):
        lazy_orbax.search(failing, sources, 30, log=tmp_path / "log")
    with (tmp_path / "log").open("a") as file:
        file.write('{"candidate": 19, "sco')  # As a killed process leaves it.
    seen = []
    calls = 100
    found = lazy_orbax.search(
        failing, sources, 30, log=tmp_path / "log", on_progress=lambda *told: seen.append(told)
    )
    assert found == whole
    assert calls == 111
    assert seen[-1] == (30, 30)
    assert (tmp_path / "log").read_text() == (tmp_path / "whole").read_text()
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [line["candidate"] for line in lines[1:]] == list(range(30))
    assert [line["origin"] for line in lines[1:4]] == ["last", "uniform", "ema:0.5"]
    with pytest.raises(OptionError, match="log of another search"):
        lazy_orbax.search(distance, sources, 30, log=tmp_path / "log", seed=3)


def test_a_candidate_that_is_not_a_number_is_the_worst(sources, tmp_path):
    scores = iter([1.0, math.nan, *range(2, 12)])
    found = lazy_orbax.search(lambda _: next(scores), sources, 12, log=tmp_path / "log")
    assert (found.score, found.coefficients) == (1.0, (0.0,) * (N - 1) + (1.0,))
    again = lazy_orbax.search(lambda _: pytest.fail("again"), sources, 12, log=tmp_path / "log")
    assert again == found


def test_arrays_are_where_like_says(sources, mesh):
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("a"))
    like = {"w": jax.ShapeDtypeStruct((N,), jnp.float32, sharding=place)}
    seen = []
    lazy_orbax.search(lambda tree: seen.append(tree["w"]) or 0, sources, 2, like=like)
    assert all(array.sharding == place for array in seen)
    assert_same(seen[0], on_mesh(np.eye(N, dtype=np.float32)[-1], mesh, "a"))


@pytest.mark.parametrize("keep", [True, False])
def test_what_is_infinite_in_all_of_them_is_so_in_each_combination(tmp_path, keep):
    mask = np.array([0, -np.inf, np.inf], np.float32)
    for i in range(3):
        checkpointer = ocp.Checkpointer(lazy_orbax.pytree_handler())
        checkpointer.save(epath.Path(tmp_path / f"{i}"), args=ocp.args.PyTreeSave({"mask": mask}))
    seen = []

    def score(tree):
        seen.append(tree["mask"])
        return 0.0

    lazy_orbax.search(score, [tmp_path / f"{i}" for i in range(3)], 20, keep=keep)
    assert_same(seen, [mask] * 20)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.complex64])
def test_narrow_and_complex_floats_are_combined(tmp_path, dtype, keep):
    for i in range(2):
        checkpointer = ocp.Checkpointer(lazy_orbax.pytree_handler())
        tree = {"w": jnp.asarray([1 + i, 3 * i], dtype)}
        checkpointer.save(epath.Path(tmp_path / f"{i}"), args=ocp.args.PyTreeSave(tree))
    seen = []

    def score(tree):
        seen.append(tree["w"])
        return 0.0

    lazy_orbax.search(score, [tmp_path / "0", tmp_path / "1"], 2, keep=keep)
    wanted = [jnp.asarray([2, 3], dtype), jnp.asarray([1.5, 1.5], dtype)]  # The last, the mean.
    assert_same(seen, wanted)


def test_one_source_has_one_combination(sources):
    found = lazy_orbax.search(lambda _: 1.0, sources[:1], 10)
    assert found.coefficients == (1.0,)


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ({"evaluate": 3}, "not callable"),
        ({"budget": 0}, "at least 1"),
        ({"sources": []}, "no sources"),
    ],
)
def test_what_is_wrong_is_said_at_once(sources, keywords, said):
    given = {"evaluate": distance, "sources": sources, "budget": 2} | keywords
    with pytest.raises(OptionError, match=said):
        lazy_orbax.search(**given)


def test_sources_that_do_not_fit_are_refused(sources, tmp_path):
    checkpointer = ocp.Checkpointer(lazy_orbax.pytree_handler())
    checkpointer.save(epath.Path(tmp_path / "x"), args=ocp.args.PyTreeSave({"w": np.ones(3)}))
    with pytest.raises(MergeError, match="leaf half"):
        lazy_orbax.search(distance, [*sources, tmp_path / "x"], 2)


def test_scores_of_other_checkpoints_at_the_same_place_are_none_of_these(sources, tmp_path):
    scores = iter([3.0, 5.0])

    def search_in_place(source):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(source, tmp_path / "run")
        log = tmp_path / "log"
        return lazy_orbax.search(lambda _: next(scores), [tmp_path / "run"], 1, log=log).score

    assert search_in_place(sources[0]) == 3
    with pytest.raises(OptionError, match="another search"):
        search_in_place(sources[1])
    assert search_in_place(sources[0]) == 3


def test_a_file_that_is_no_log_is_refused(sources, tmp_path):
    """It stays as it is, also where its last line has no end, like a log that was cut off."""
    log = tmp_path / "log"
    for content in ("hello\n", "hello", '{"a": 1}', '{"a": 1}\n'):
        log.write_text(content)
        with pytest.raises(OptionError, match="log of a(nother)? search"):
            lazy_orbax.search(distance, sources, 2, log=log)
        assert log.read_text() == content
    log.unlink()
    lazy_orbax.search(distance, sources, 1, log=log)
    whole = log.read_text()
    log.write_text(whole[:9])
    lazy_orbax.search(distance, sources, 1, log=log)
    assert log.read_text() == whole
