"""What a save to `gs://` survives, and how it fails: the fault matrix.

Each row is a fault, met by the save of step 2 after step 1 was committed. Whatever comes of it,
step 2 is either whole or not listed, step 1 is untouched, no host memory is kept, and the save of
step 2 works once the fault is gone.
"""

from __future__ import annotations

import collections
import dataclasses
import re

import pytest
from gcs.proxy import Fault
from gcs.uploads import COMMIT, DATA, MANIFEST, MERGED, STEP_DIGESTS, STEP_METADATA, TREE

TIMEOUT_S = 6.0
# Where the save is to fail, it may do so soon.
FATAL_TIMEOUT_S = 3.0
# The client gives an upload up that stands still after some 6 s, at the least, and tries again.
STALL_S = 20.0
# Beyond the deadline: whatever else a save does, on a machine with other work to do.
SLACK_S = 8.0

CHUNK = r"upload \S*/2/default/w/"
ZARR = {"use_ocdbt": False}


@dataclasses.dataclass(frozen=True)
class Row:
    """A fault, and what should come of it.

    Attributes:
        what: for the table.
        fault: its arguments.
        error: the class of the error, or nothing where the save survives.
        says: what is in the error's text, beside the directory.
        by_orbax: the error is of a file that Orbax writes itself.
    """

    what: str
    fault: dict
    error: str = ""
    says: tuple[str, ...] = ()
    by_orbax: bool = False
    keywords: dict = dataclasses.field(default_factory=dict)
    timeout_s: float = TIMEOUT_S

    def __str__(self) -> str:
        return self.what


def of(pattern: str, action: str, **more: object) -> dict:
    return {"pattern": pattern, "action": action, **more}


SURVIVED = [
    Row("data: 503 three times", of(DATA, "status", times=3)),
    Row("data: 429 three times", of(DATA, "status", times=3, status=429)),
    Row("data: reset twice", of(DATA, "reset", times=2)),
    Row("data: acknowledgement lost twice", of(DATA, "lost", times=2)),
    Row("data: one request stalls", of(DATA, "stall", times=1), timeout_s=STALL_S),
    Row("chunk: 503 three times", of(CHUNK, "status", times=3), keywords=ZARR),
    Row("chunk: acknowledgement lost twice", of(CHUNK, "lost", times=2), keywords=ZARR),
    Row("chunk: one request stalls", of(CHUNK, "stall", times=1), keywords=ZARR, timeout_s=STALL_S),
    Row("manifest: 503 twice", of(MANIFEST, "status", times=2)),
    Row("manifest: acknowledgement lost", of(MANIFEST, "lost", times=1)),
    Row("_METADATA: acknowledgement lost", of(TREE, "lost", times=1)),
    Row("merged manifest: 503 twice", of(MERGED, "status", times=2)),
    Row("merged manifest: acknowledgement lost", of(MERGED, "lost", times=1)),
    Row("merged manifest: one request stalls", of(MERGED, "stall", times=1), timeout_s=STALL_S),
    Row("step metadata: 503 once", of(STEP_METADATA, "status", times=1)),
    Row("step metadata, with handlers: 503 once", of(STEP_METADATA, "status", skip=1, times=1)),
    Row("step digests: 503 twice", of(STEP_DIGESTS, "status", times=2)),
    Row("step digests: acknowledgement lost", of(STEP_DIGESTS, "lost", times=1)),
    Row("commit file: 503 once", of(COMMIT, "status", times=1)),
    Row("commit file: acknowledgement lost", of(COMMIT, "lost", times=1)),
    Row("everything: 20 ms late", of(r".*", "delay", delay_s=0.02)),
    Row("the third upload: 503", of(r"upload", "status", skip=2, times=1)),
]
FATAL = [
    Row("data: 403", of(DATA, "status", status=403), "SaveError", ("PERMISSION_DENIED",)),
    Row("data: 404 (no such bucket)", of(DATA, "status", status=404), "SaveError", ("NOT_FOUND",)),
    Row("data: 503 for ever", of(DATA, "status"), "SaveError", ("503", "retry attempts")),
    Row("data: stalls for ever", of(DATA, "stall"), "SaveError", ("storage_timeout_s",)),
    Row("chunk: 403", of(CHUNK, "status", status=403), "SaveError", ("/w/",), keywords=ZARR),
    Row("chunk: stalls for ever", of(CHUNK, "stall"), "SaveError", ("/w",), keywords=ZARR),
    Row("_METADATA: 403", of(TREE, "status", status=403), "SaveError", ("_METADATA",)),
    Row("merged manifest: 403", of(MERGED, "status", status=403), "SaveError", ("manifest.ocdbt",)),
    Row("merged manifest: 503 for ever", of(MERGED, "status"), "SaveError", ("manifest.ocdbt",)),
    Row("merged manifest: stalls for ever", of(MERGED, "stall"), "SaveError", ("manifest.ocdbt",)),
    Row(
        "step digests: 403", of(STEP_DIGESTS, "status", status=403), "SaveError", ("digests/step",)
    ),
    Row("step digests: stall for ever", of(STEP_DIGESTS, "stall"), "SaveError", ("digests/step",)),
    Row(
        "commit file: 403",
        of(COMMIT, "status", status=403),
        "OSError",
        ("commit_success.txt",),
        by_orbax=True,
    ),
    Row("commit file: stalls", of(COMMIT, "stall"), "FSTimeoutError", by_orbax=True),
]


@pytest.fixture(scope="module")
def job(start_for_module):
    return start_for_module()


# They wait for seconds, and others of their kind remain.
LONG = {
    "chunk: one request stalls",
    "merged manifest: one request stalls",
    "chunk: stalls for ever",
    "merged manifest: 503 for ever",
}
ROWS = [
    pytest.param(row, marks=[pytest.mark.slow] * (row.what in LONG), id=row.what)
    for row in SURVIVED + FATAL
]


@pytest.mark.parametrize("row", ROWS)
def test_a_fault(job, proxy, root, row, tell):
    timeout_s = FATAL_TIMEOUT_S if row.error else row.timeout_s
    assert job.do("open", root, timeout_s=timeout_s, **row.keywords) == []
    job.do("save", 1)
    with proxy.breaking(Fault(**row.fault)) as fault:
        outcome = job.attempt("save", 2)
    assert fault.met, "the fault met nothing"
    tell("Faults on gs://", row.what, outcome.error or "committed", f"{outcome.took_s:5.1f} s")
    assert outcome.error == row.error, outcome.trace
    assert outcome.took_s < timeout_s + SLACK_S
    assert job.do("in_flight_bytes") == 0
    if row.error:
        for text in row.says:
            assert text in outcome.message
        if not row.by_orbax:
            assert "step 2" in outcome.message
            assert f"{root}/2/default" in outcome.message
    # What another process sees, which knows nothing but the bucket.
    assert job.do("open", root, stock=True) == ([1] if row.error else [1, 2])
    assert job.do("wrong", 1) == []
    job.do("open", root, **row.keywords)
    following = 2 if row.error else 3
    job.do("save", following)
    steps = list(range(1, following + 1))
    assert job.do("open", root, stock=True) == steps
    assert job.do("wrong", *steps) == []


READ = r"read \S*/1/default/ocdbt.process_0/d/"


@pytest.mark.parametrize(
    ("what", "fault"),
    [
        ("download: 503 twice", of(READ, "status", times=2)),
        ("download: reset twice", of(READ, "reset", times=2)),
        ("download: cut short twice", of(READ, "truncate", times=2)),
        ("download: one request stalls", of(READ, "stall", times=1)),
    ],
)
def test_a_fault_while_restoring(job, proxy, root, what, fault, tell):
    job.do("open", root)
    job.do("save", 1)
    with proxy.breaking(Fault(**fault)) as met:
        outcome = job.attempt("wrong", 1)
    assert met.met
    assert (outcome.error, outcome.result) == ("", []), outcome.trace
    tell("Faults on gs://", what, "restored", f"{outcome.took_s:5.1f} s")


@pytest.mark.parametrize(
    ("what", "flips"),
    [
        ("one download", of(READ, "flip", times=1)),
        ("every download", of(READ, "flip")),
    ],
)
def test_a_flipped_bit_in_a_download_is_noticed(job, proxy, root, what, flips, tell):
    """Stock Orbax restores it as other numbers."""
    job.do("open", root)
    job.do("save", 1)
    with proxy.breaking(Fault(**flips)) as met:
        outcome = job.attempt("wrong", 1)
    assert met.met
    assert outcome.error == "CorruptCheckpointError", outcome.trace
    assert f"{root}/1/default" in outcome.message
    tell("Faults on gs://", f"a flipped bit: {what}", outcome.error, f"{outcome.took_s:5.1f} s")
    # On storage it is whole.
    assert job.attempt("wrong", 1).result == []


# Some of these no reader looks at any more.
UNREAD = r"(default/)?commit_success.txt|default/(ocdbt.process_0/)?(d/.*|manifest.ocdbt)"


@pytest.mark.parametrize("form", ["ocdbt", "zarr"])
def test_a_flipped_bit_in_any_object_is_told_of_or_harmless(job, proxy, root, form, tell):
    job.do("open", root, **ZARR if form == "zarr" else {})
    job.do("save", 1, custom_metadata={"note": "x" * 1000})
    names = job.do("objects", 1)
    assert {"_CHECKPOINT_METADATA", "default/_METADATA", "commit_success.txt"} < set(names)
    ended = collections.Counter()
    for name in names:
        with proxy.breaking(Fault(rf"read \S*/1/{re.escape(name)}$", "flip")) as met:
            outcome = job.attempt("wrong", 1)
            problems = job.do("problems", 1)
        assert outcome.error or outcome.result == [], name
        assert outcome.error in ("", "CorruptCheckpointError"), outcome.trace
        assert problems or (not outcome.error and re.fullmatch(UNREAD, name)), name
        kind = re.sub(r"(?<=/d/).*|[\d.]+$", "*", name)
        how = "refused" if outcome.error else "told of" if problems else "harmless"
        ended[kind, f"{how}{'' if met.met else ', never read'}"] += 1
    for (kind, how), n in ended.items():
        tell("Flipped bits on gs://", form, kind, how, str(n))
    assert job.do("problems", 1) == job.do("wrong", 1) == []


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("_CHECKPOINT_METADATA", "custom_metadata is not what was saved"),
        ("default/lazy_orbax_digests/step", "its own digest does not fit"),
    ],
)
def test_a_flipped_bit_in_the_metadata_of_a_step_is_told_of(job, proxy, root, name, told, tell):
    """It refuses nothing: Orbax has a way to change that file."""
    # So long that the bit in the middle is one of it.
    job.do("open", root)
    job.do("save", 1, custom_metadata={"note": "x" * 1000})
    assert job.do("problems", 1) == []
    with proxy.breaking(Fault(rf"read \S*/1/{name}", "flip")) as met:
        (problem,) = job.do("problems", 1)
        assert told in problem
        assert any(told in line for line in job.do("warnings_while_restoring", 1))
    assert met.met
    tell("Faults on gs://", f"a flipped bit: {name}", "told of; restored rightly")
    assert job.do("problems", 1) == []
    assert job.do("warnings_while_restoring", 1) == []


def test_a_changed_byte_in_the_metadata_of_a_step_is_found_in_the_bucket(job, root):
    job.do("open", root)
    job.do("save", 1, custom_metadata={"note": "x" * 30})
    n_changed, unnoticed = job.do("changes_unnoticed", 1, "_CHECKPOINT_METADATA", every=5)
    assert n_changed > 50
    assert unnoticed == []


def test_the_digests_of_a_step_wait_for_its_metadata(job, proxy, root):
    job.do("open", root)
    job.do("save", 1)
    looks = Fault(r"read \S*/2/_CHECKPOINT_METADATA", "delay", skip=3)
    with proxy.breaking(Fault(STEP_METADATA, "late", skip=1, times=1), looks):
        job.begin("save", 2, custom_metadata={"note": "late"})
        looks.await_request()
    saved = job.end()
    assert not saved.error, saved.trace
    assert job.do("problems", 2) == []
    job.do("spoil", 2, "_CHECKPOINT_METADATA", b"{}")
    assert "custom_metadata is not what was saved" in "".join(job.do("problems", 2))
