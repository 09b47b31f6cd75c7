"""What the Trace Event Format asks of a file, checked event by event.

The format: "Trace Event Format" of the Chromium project, sections JSON Object Format, Metadata
Events, Complete Events, Instant Events and Flow Events.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from itertools import pairwise
from typing import Any

Event = dict[str, Any]

# Of a time in microseconds with three decimals, as a float.
_ROUNDING_US = 1e-3 / 2
_METADATA = {"process_name", "process_sort_index", "thread_name", "thread_sort_index"}


def read_trace(data: bytes | str) -> list[Event]:
    """The events of a document; an assertion fails where the format is not kept."""
    document = json.loads(data, parse_constant=_refuse)
    assert set(document) == {"displayTimeUnit", "traceEvents"}
    assert document["displayTimeUnit"] in ("ms", "ns")
    events: list[Event] = document["traceEvents"]
    for event in events:
        _check_event(event)
    _check_names(events)
    _check_rows(events)
    _check_arrows(events)
    return events


def of_kind(events: list[Event], ph: str) -> list[Event]:
    return [event for event in events if event["ph"] == ph]


def rows(events: list[Event]) -> dict[tuple[str, str], list[Event]]:
    """Slices by the names of their process and of their row."""
    processes, threads = _names(events)
    found = defaultdict(list)
    for event in of_kind(events, "X"):
        found[processes[event["pid"]], threads[event["pid"], event["tid"]]].append(event)
    return dict(found)


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


def _check_event(event: Event) -> None:
    ph = event["ph"]
    assert ph in ("X", "M", "i", "s", "f"), event
    assert isinstance(event["name"], str) and event["name"]
    assert type(event["pid"]) is int
    assert isinstance(event.get("args", {}), dict)
    if ph == "M":
        assert event["name"] in _METADATA
        assert ("tid" in event) is event["name"].startswith("thread_")
        key, kind = ("name", str) if event["name"].endswith("_name") else ("sort_index", int)
        assert set(event["args"]) == {key} and type(event["args"][key]) is kind
        return
    assert type(event["tid"]) is int
    assert isinstance(event["cat"], str) and event["cat"]
    _check_time(event["ts"])
    assert ("dur" in event) is (ph == "X")
    if ph == "X":
        _check_time(event["dur"])
    if ph == "i":
        assert event["s"] in ("g", "p", "t")
    if ph in ("s", "f"):
        assert type(event["id"]) is int
        assert event.get("bp", "e") == "e" and ("bp" in event) is (ph == "f")


def _check_time(value: object) -> None:
    assert isinstance(value, int | float) and not isinstance(value, bool)
    assert math.isfinite(value) and value >= 0


def _names(events: list[Event]) -> tuple[dict[int, str], dict[tuple[int, int], str]]:
    named = [event for event in of_kind(events, "M") if event["name"].endswith("_name")]
    threads = [event for event in named if "tid" in event]
    return (
        {event["pid"]: event["args"]["name"] for event in named if "tid" not in event},
        {(event["pid"], event["tid"]): event["args"]["name"] for event in threads},
    )


def _check_names(events: list[Event]) -> None:
    """Every process and row has one name, of its own, and one place."""
    processes, threads = _names(events)
    for event in events:
        assert event["pid"] in processes
        assert "tid" not in event or (event["pid"], event["tid"]) in threads
    places = Counter(
        (event["name"], event["pid"], event.get("tid")) for event in of_kind(events, "M")
    )
    assert set(places.values()) <= {1}
    assert len({tid for _, tid in threads}) == len(threads)
    assert len(set(processes.values())) == len(processes)
    assert len({(pid, name) for (pid, _), name in threads.items()}) == len(threads)


def _check_rows(events: list[Event]) -> None:
    """A row's slices are in the order of their times, and none begins before the last one ended."""
    for slices in rows(events).values():
        for one, other in pairwise(slices):
            assert one["ts"] + one["dur"] <= other["ts"] + _ROUNDING_US, (one, other)


def _check_arrows(events: list[Event]) -> None:
    """An arrow has a beginning and an end, each in a slice, and does not point into the past."""
    slices = defaultdict(list)
    for event in of_kind(events, "X"):
        slices[event["pid"], event["tid"]].append(event)
    starts = {event["id"]: event for event in of_kind(events, "s")}
    ends = {event["id"]: event for event in of_kind(events, "f")}
    assert len(starts) == len(of_kind(events, "s")) and len(ends) == len(of_kind(events, "f"))
    assert starts.keys() == ends.keys()
    for number, start in starts.items():
        end = ends[number]
        assert (start["name"], start["cat"]) == (end["name"], end["cat"])
        assert start["ts"] <= end["ts"]
        for event in (start, end):
            assert any(
                each["ts"] - _ROUNDING_US <= event["ts"] <= each["ts"] + each["dur"] + _ROUNDING_US
                for each in slices[event["pid"], event["tid"]]
            )
