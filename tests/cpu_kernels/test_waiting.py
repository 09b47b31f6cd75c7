"""Words that one thread looks at and another writes."""

from __future__ import annotations

import ctypes
import threading

import pytest

from cpu_kernels import waiting
from cpu_kernels.waiting import WORD_BYTES, spin, words


def test_a_word_that_another_thread_writes_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tells the other by the call in which it begins to look: neither holds the other up."""
    monkeypatch.setattr(
        waiting, "_num_spins", lambda seconds: 10**9
    )  # or the test would end by patience
    flags = words(2)
    first = ctypes.addressof(flags)
    second = first + WORD_BYTES
    other = threading.Thread(target=spin, args=(first, second), kwargs={"seconds": 1.0})
    other.start()
    spin(second, seconds=1.0)
    assert list(flags) == [0, 1] and other.is_alive()
    spin(second, first, seconds=1.0)
    other.join(timeout=20)
    assert not other.is_alive() and list(flags) == [1, 1]


def test_a_word_that_nobody_writes_is_looked_at_for_a_while_only() -> None:
    flags = words(1)
    spin(ctypes.addressof(flags), seconds=1e-4)
    assert flags[0] == 0


def test_a_process_with_one_core_does_not_look(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting._num_spins.cache_clear()
    monkeypatch.setattr(waiting, "available_cores", lambda: 1)
    assert waiting._num_spins(1.0) == 0
    waiting._num_spins.cache_clear()
