"""Scratch memory begins at a cache line, grows, and stays where it is while it is enough."""

from __future__ import annotations

import ctypes

from cpu_kernels.scratch import ALIGNMENT, Scratch


def test_every_address_is_a_cache_lines_start() -> None:
    """And all the bytes asked for may be written."""
    scratch = Scratch()
    for num_bytes in (1, 63, 64, 1000, 12345, 1 << 20):
        address = scratch.address(num_bytes)
        ctypes.memset(address, 0xFF, num_bytes)
        assert address % ALIGNMENT == 0


def test_a_smaller_call_gets_the_same_memory() -> None:
    """Memory that was touched is used again."""
    scratch = Scratch()
    address = scratch.address(1000)

    assert scratch.address(10) == address
    assert scratch.address(1250) == address
    assert scratch.num_bytes == 1250


def test_a_larger_call_gets_a_quarter_more_than_it_asked_for() -> None:
    """A context that grows by a token a step seldom moves."""
    scratch = Scratch()
    assert scratch.num_bytes == 0
    scratch.address(1000)
    scratch.address(2000)

    assert scratch.num_bytes == 2500


def test_two_scratches_are_two_places() -> None:
    """Calls on two threads do not share one."""
    first, second = Scratch(), Scratch()

    assert abs(first.address(4096) - second.address(4096)) >= 4096
