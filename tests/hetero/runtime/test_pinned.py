"""Pinned host memory: chunks, refusals, and copies that keep to one chunk at a time."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable

import pytest
import torch

from hetero.runtime.devices import CudaAccelerator
from hetero.runtime.pinned import PinnedArena, pieces

PAGE = mmap.PAGESIZE
CHUNK = 4 * PAGE
REFUSED = 2  # cudaErrorMemoryAllocation


class Driver:
    """Registers so many chunks and refuses the rest, as CUDA refuses what overlaps another."""

    def __init__(self, num_allowed: int = 1000) -> None:
        self.num_allowed = num_allowed
        self.num_asked = 0
        self.registered: dict[int, int] = {}
        self._lock = threading.Lock()

    def register(self, address: int, num_bytes: int) -> int:
        with self._lock:
            self.num_asked += 1
            assert address % PAGE == num_bytes % PAGE == 0
            for start, size in self.registered.items():
                assert address >= start + size or address + num_bytes <= start
            if len(self.registered) == self.num_allowed:
                return REFUSED
            self.registered[address] = num_bytes
            return 0

    def unregister(self, address: int) -> None:
        del self.registered[address]


def arena_of(driver: Driver) -> PinnedArena:
    return PinnedArena(
        driver.register, driver.unregister, chunk_bytes=CHUNK, segment_bytes=16 * PAGE
    )


def test_a_piece_has_its_bytes_and_is_pinned_to_the_page() -> None:
    driver = Driver()
    arena = arena_of(driver)
    sizes = [1, PAGE, CHUNK + 1, 0, 40 * PAGE]
    taken = [arena.take(size) for size in sizes]

    assert [tensor.nbytes for tensor in taken] == sizes
    assert arena.pinned_bytes == (1 + 1 + 5 + 0 + 40) * PAGE == sum(driver.registered.values())
    assert max(driver.registered.values()) == CHUNK
    assert (arena.unpinned_bytes, arena.refusal) == (0, None)


def test_pieces_are_zero_and_share_no_byte() -> None:
    arena = arena_of(Driver())
    taken = [arena.take(size) for size in (5, 3 * PAGE, CHUNK + 7, 20 * PAGE)]
    assert not any(tensor.any() for tensor in taken)
    for number, tensor in enumerate(taken, start=1):
        tensor.fill_(number)

    assert [set(tensor.tolist()) for tensor in taken] == [{1}, {2}, {3}, {4}]


@pytest.mark.parametrize("num_allowed", range(7))
def test_a_late_refusal_leaves_the_chunks_before_it_pinned(num_allowed: int) -> None:
    """Six chunks are wanted; after the first refusal the system is not asked again."""
    driver = Driver(num_allowed)
    arena = arena_of(driver)
    for _ in range(3):
        arena.take(2 * CHUNK)

    assert arena.pinned_bytes == num_allowed * CHUNK
    assert arena.unpinned_bytes == (6 - num_allowed) * CHUNK
    assert driver.num_asked == min(6, num_allowed + 1)
    assert arena.refusal == (None if num_allowed == 6 else REFUSED)


@pytest.mark.parametrize(
    ("start", "stop", "cuts"),
    [
        (0, CHUNK, [CHUNK]),
        (1, CHUNK - 1, [CHUNK - 2]),
        (0, CHUNK + 1, [CHUNK, CHUNK + 1]),
        (CHUNK - 1, 2 * CHUNK + 3, [1, 1 + CHUNK, CHUNK + 4]),
        (CHUNK, 2 * CHUNK, [CHUNK]),
    ],
)
def test_a_copy_is_cut_where_a_chunk_begins(start: int, stop: int, cuts: list[int]) -> None:
    arena = arena_of(Driver())
    source = arena.take(3 * CHUNK)

    assert arena.cuts(source[start:stop]) == cuts


def test_memory_from_elsewhere_is_copied_whole() -> None:
    arena = arena_of(Driver())
    arena.take(CHUNK)

    assert arena.cuts(torch.zeros(3, dtype=torch.float64)) == [24]


def test_the_pieces_of_a_copy_copy_all_of_it() -> None:
    arena = arena_of(Driver())
    source = arena.take(2 * CHUNK).view(torch.float32).view(2, -1)
    source.copy_(torch.arange(source.numel()).view_as(source))
    target = torch.full_like(source, -1.0)
    copied = [
        (to.copy_(from_), to.nbytes)[1] for to, from_ in pieces(target, source, [CHUNK, 2 * CHUNK])
    ]

    assert copied == [CHUNK, CHUNK]
    torch.testing.assert_close(target, source, rtol=0, atol=0)


def test_threads_take_pieces_at_the_same_time() -> None:
    driver = Driver()
    arena = arena_of(driver)
    found: list[torch.Tensor] = []

    def read(number: int) -> Callable[[], None]:
        def take() -> None:
            for _ in range(20):
                piece = arena.take(3 * PAGE)
                piece.fill_(number)
                found.append(piece)

        return take

    threads = [threading.Thread(target=read(number)) for number in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(int(piece.float().mean()) for piece in found) == [1] * 20 + [2] * 20
    assert all(piece.unique().numel() == 1 for piece in found)
    assert arena.pinned_bytes == 40 * 3 * PAGE == sum(driver.registered.values())


def test_closing_unpins_everything_once() -> None:
    driver = Driver()
    arena = arena_of(driver)
    kept = arena.take(3 * CHUNK)
    arena.close()
    arena.close()

    assert driver.registered == {}
    assert (arena.pinned_bytes, arena.unpinned_bytes) == (0, 0)
    assert not kept.any()  # still there


@pytest.mark.gpu
def test_a_copy_over_chunks_of_a_gpu_arrives_whole() -> None:
    """Chunks of 256 MiB: the copy begins in the first and ends in the second."""
    accelerator = CudaAccelerator(budget_bytes=2_000_000_000)
    try:
        source = accelerator.host_buffer(300 << 20)
        source.view(torch.int32).copy_(torch.arange(75 << 20, dtype=torch.int32))
        target = accelerator.allocate(source.nbytes, "a copy")
        accelerator.lanes["h2d"].submit(lambda: accelerator.copy_into(target, source), ()).wait()

        assert len(accelerator.host_memory.cuts(source)) == 2
        assert accelerator.host_memory.unpinned_bytes == 0
        torch.testing.assert_close(target.cpu(), source, rtol=0, atol=0)
    finally:
        accelerator.close()


@pytest.mark.gpu
def test_after_memory_that_cannot_be_pinned_the_gpu_goes_on() -> None:
    """The error of a refused registration is not taken for that of a later kernel."""
    accelerator = CudaAccelerator(budget_bytes=1_000_000_000)
    try:
        pinned = accelerator.host_buffer(1 << 20)
        assert accelerator._register(pinned.data_ptr(), pinned.nbytes) != 0  # registered already

        assert torch.ones(4, device=accelerator.device).sum().item() == 4.0
    finally:
        accelerator.close()
