import logging
import queue
import threading

import jax
import pytest

from lazy_orbax import timeline
from lazy_orbax.save.publication import Publications, await_publication
from lazy_orbax.timeline import Recorder, SaveTimeline

PUBLISHED = "/jax/orbax/write/background_finalize_secs"


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves when told to."""

    class Clock:
        now_s = 100.0

        def perf_counter(self):
            return self.now_s

    clock = Clock()
    monkeypatch.setattr(timeline, "time", clock)
    return clock


def test_moments_are_seconds_since_save_was_entered(clock):
    recorder = Recorder("/run/5.orbax-checkpoint-tmp/state", None)
    for moment, at_s in (("enqueued", 0.25), ("staged", 1.5), ("durable", 4.0)):
        clock.now_s = 100.0 + at_s
        recorder.mark(moment)
    recorder.note(mode="stage", bytes_written=64, waited_s=0.125)
    clock.now_s = 105.0
    recorder.end(committed=True)
    assert recorder.timeline == SaveTimeline(
        directory="/run/5/state",
        step=5,
        mode="stage",
        bytes_written=64,
        waited_s=0.125,
        enqueued_s=0.25,
        staged_s=1.5,
        durable_s=4.0,
        committed_s=5.0,
    )


def test_a_timeline_that_ends_without_publication_has_no_committed_moment(clock):
    recorder = Recorder("/run/5", None)
    recorder.end()
    assert recorder.timeline.committed_s is None
    assert recorder.timeline.error is None


def test_on_timeline_is_called_once_and_nothing_changes_after_that(clock):
    reported = []
    recorder = Recorder("/run/5", reported.append)
    recorder.mark("enqueued")
    assert reported == []
    error = ValueError("disk")
    recorder.end(error=error)
    first = recorder.timeline
    recorder.end(committed=True)
    recorder.mark("durable")
    recorder.note(mode="direct")
    assert reported == [first]
    assert recorder.timeline is first
    assert first.error is error
    assert first.committed_s is None
    assert first.durable_s is None


def test_two_threads_that_end_a_timeline_report_it_once():
    reported, gate = [], threading.Barrier(8)
    recorder = Recorder("/run/5", reported.append)

    def end():
        gate.wait(30)
        recorder.end(committed=True)

    threads = [threading.Thread(target=end, daemon=True) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(reported) == 1


def test_on_timeline_may_read_the_timeline_it_was_given():
    # It is called without the lock: reading, or ending again, is not a deadlock.
    seen = []

    def on_timeline(timeline):
        recorder.end()
        seen.append(recorder.timeline is timeline)

    recorder = Recorder("/run/5", on_timeline)
    recorder.end(committed=True)
    assert seen == [True]


def test_an_exception_in_on_timeline_is_logged_and_goes_no_further(caplog):
    def on_timeline(timeline):
        raise RuntimeError("a broken callback")

    recorder = Recorder("/run/5/state", on_timeline)
    with caplog.at_level(logging.ERROR, logger="lazy_orbax"):
        recorder.end(committed=True)
    (record,) = caplog.records
    assert "/run/5/state" in record.getMessage()
    assert "a broken callback" in str(record.exc_info[1])


def test_where_no_thread_can_be_started_on_timeline_is_called_in_this_one(monkeypatch):
    def start(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    seen = []
    Recorder("/run/5", lambda timeline: seen.append(threading.current_thread())).end()
    assert seen == [threading.current_thread()]


def test_what_orbax_publishes_in_this_thread_ends_what_waits_for_it():
    reported = []
    recorders = [Recorder(f"/run/5/{item}", reported.append) for item in "ab"]
    for recorder in recorders:
        await_publication([recorder])
    jax.monitoring.record_event_duration_secs("/jax/some/other/event", 1.0)
    assert reported == []

    other = threading.Thread(
        target=lambda: jax.monitoring.record_event_duration_secs(PUBLISHED, 1.0)
    )
    other.start()
    other.join(30)
    assert reported == [], "another thread's publication ended ours"

    jax.monitoring.record_event_duration_secs(PUBLISHED, 1.0)
    assert [timeline.directory for timeline in reported] == ["/run/5/a", "/run/5/b"]
    assert all(timeline.committed_s is not None for timeline in reported)
    jax.monitoring.record_event_duration_secs(PUBLISHED, 1.0)
    assert len(reported) == 2


def test_a_timeline_is_frozen():
    with pytest.raises(AttributeError):
        SaveTimeline(directory="/run/5", step=5).mode = "stage"  # type: ignore[misc]


def test_a_listener_of_others_that_raises_does_not_keep_us_from_listening():
    def raises(event, duration_secs, **_):
        raise ValueError("a broken listener")

    reported = []
    jax.monitoring.clear_event_listeners()
    jax.monitoring.register_event_duration_secs_listener(raises)
    try:
        await_publication([Recorder("/run/5/a", reported.append)])
    finally:
        jax.monitoring.unregister_event_duration_listener(raises)
    jax.monitoring.record_event_duration_secs(PUBLISHED, 1.0)
    assert [timeline.directory for timeline in reported] == ["/run/5/a"]


def test_a_publication_of_another_thread_that_is_at_work_is_left_to_it():
    gate, made, reported = threading.Event(), queue.SimpleQueue(), []

    def publish():
        publication = await_publication([Recorder("/run/5/a", reported.append)])
        publication.is_there = lambda: True
        made.put(publication)
        gate.wait(30)

    thread = threading.Thread(target=publish, daemon=True)
    thread.start()
    publications = Publications()
    publications.add(made.get(timeout=30))
    publications.catch_up(raises=True)
    assert reported == []
    gate.set()
    thread.join(30)
    publications.catch_up(raises=True)
    assert [timeline.committed_s is not None for timeline in reported] == [True]
    publications.catch_up(raises=True)
    assert len(reported) == 1


def test_who_catches_up_waits_for_another_thread_that_does_so():
    is_syncing, gate, made = threading.Event(), threading.Event(), queue.SimpleQueue()

    def refuses():
        is_syncing.set()
        gate.wait(30)
        raise OSError("the disk is gone")

    def publish():
        publication = await_publication([Recorder("/run/5/a", lambda timeline: None)])
        publication.sync, publication.is_there = refuses, lambda: True
        made.put(publication)

    publisher = threading.Thread(target=publish, daemon=True)
    publisher.start()
    publisher.join(30)
    publications = Publications()
    publications.add(made.get(timeout=30))  # A thread of ours syncs.
    assert is_syncing.wait(30)
    threading.Timer(0.01, gate.set).start()
    with pytest.raises(OSError, match="the disk is gone"):
        publications.catch_up(raises=True)


def test_what_could_not_be_synced_is_told_once():
    """Where several processes save together, not before the last of them is past it."""

    def refuses():
        raise OSError("the disk is gone")

    reported, publications = [], Publications()
    publication = await_publication([Recorder("/run/5/a", reported.append)])
    publication.sync, publication.is_there = refuses, lambda: True
    publications.add(publication)
    publications.catch_up(raises=False)
    (failure,) = publications.end()
    assert str(failure) == "the disk is gone"
    assert publications.end() == []
    assert [timeline.error for timeline in reported] == [failure]


def test_a_step_that_orbax_gave_up_is_not_reported_as_published():
    reported, publications = [], Publications()
    recorder = Recorder("/run/5/a", reported.append)
    publications.add(await_publication([recorder]))
    publications.catch_up(raises=True)
    assert reported == []
    after = Recorder("/run/6/a", reported.append)
    await_publication([after])
    jax.monitoring.record_event_duration_secs(PUBLISHED, 1.0)
    assert [timeline.directory for timeline in reported] == ["/run/6/a"]
