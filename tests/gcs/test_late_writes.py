"""A write that a failed save has given up must not come to lie over a later save of that step."""

from __future__ import annotations

import pytest
from gcs.proxy import Fault
from gcs.uploads import CHUNK, DATA, MANIFEST, MERGED, MERGED_DATA, STEP_DIGESTS, STEP_METADATA

TIMEOUT_S = 2.0
SLACK_S = 8.0
# What is held stays held: the client does not give it up.
PATIENT = {"TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "60"}
HELD = {
    "chunks": (CHUNK, {"use_ocdbt": False}),
    "data": (DATA, {}),
    "manifest": (MANIFEST, {}),
    "merged data": (MERGED_DATA, {}),
    "merged manifest": (MERGED, {}),
    "step digests": (STEP_DIGESTS, {}),
}


@pytest.mark.parametrize("held", HELD)
def test_a_save_of_the_same_step_waits_or_is_refused(start, proxy, root, held):
    job = start(**PATIENT)
    pattern, keywords = HELD[held]
    job.do("open", root, timeout_s=TIMEOUT_S, **keywords)
    job.do("save", 1)
    late = Fault(pattern, "late")
    with proxy.breaking(late):
        failed = job.attempt("save", 2, seed=20)
        assert failed.error == "SaveError", failed.trace
        late.times = late.met  # What comes now is of another save, and passes.

        refused = job.attempt("save", 2, seed=21)
        assert refused.error == "SaveError", refused.trace
        assert "earlier save" in refused.message
        assert "Save another step" in refused.message
        assert refused.took_s < TIMEOUT_S + SLACK_S
        assert job.do("in_flight_bytes") == 0
        job.do("save", 3)  # Another step is not held up.

        job.do("open", root, timeout_s=60, **keywords)
        began = proxy.add(Fault(STEP_METADATA, "delay"))
        # By force, for a step was saved that comes after it.
        job.begin("save", 2, seed=22, force=True)
        began.await_request()
    # Now what was held is carried out.
    saved = job.end()
    assert not saved.error, saved.trace
    assert job.do("open", root, stock=True) == [1, 2, 3]
    assert job.do("wrong", 2, seed=22) == []
    assert job.do("wrong", 1, 3) == []
