"""HostEvent: nobody misses the end of work, whether they still look or sleep already."""

from __future__ import annotations

import threading
import time

import pytest

from hetero.runtime import host_event
from hetero.runtime.host_event import HostEvents


def test_whoever_waits_longer_than_it_looks_is_woken() -> None:
    (event,) = HostEvents(1).all
    waiting = [threading.Thread(target=event.wait) for _ in range(3)]
    for thread in waiting:
        thread.start()
    while len(event._sleepers) < 3:
        time.sleep(1e-4)
    event.end(1.0, 2.0)
    for thread in waiting:
        thread.join(timeout=20)
        assert not thread.is_alive()
    assert event.is_done and event.span_s(0.5) == (0.5, 1.5)


def test_the_end_is_not_missed_by_one_that_is_about_to_sleep(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It happens after the last look and before the sleep."""
    (event,) = HostEvents(1).all
    monkeypatch.setattr(host_event, "spin", lambda address, told=0, **_: None)
    real = threading.Lock

    def lock_after_the_end() -> object:
        event.end(0.0, 0.0)
        return real()

    monkeypatch.setattr(threading, "Lock", lock_after_the_end)
    event.wait()


def test_an_end_is_told_before_its_thread_waits_for_another() -> None:
    """Two threads that each wait for the other's end, and tell theirs first, both go on."""
    first, second = HostEvents(2).all
    thread = threading.Thread(target=lambda: second.end(0.0, 0.0, (first,)))
    thread.start()
    first.end(0.0, 0.0, (second,))
    thread.join(timeout=20)
    first.wait()
    second.wait()
    assert first.is_done and second.is_done


def test_an_error_is_raised_by_every_wait_until_the_events_are_taken_back() -> None:
    events = HostEvents(2)
    first, second = events.all
    first.fail(ZeroDivisionError("no"))
    for _ in range(2):
        with pytest.raises(ZeroDivisionError, match="no"):
            first.wait()
    assert not second.is_done
    events.clear()
    assert not first.is_done and first.error is None
    first.end(0.0, 0.0)
    first.wait()
