"""Prefetch: experts of a layer that are copied ahead of its gate, chunk by chunk."""

# B bytes of an expert

from __future__ import annotations

from collections.abc import Callable

from planner.placement import NUM_EXPERT_CHUNKS

# Where chunks begin: whole cache lines.
_ALIGNMENT = 64


def chunk_begin(num_bytes: int, chunk: int) -> int:
    """Where a chunk of an expert begins, and the one before it ends.

    Examples
    --------
    >>> [chunk_begin(1000, chunk) for chunk in range(4)]
    [0, 320, 640, 1000]
    """
    if chunk == NUM_EXPERT_CHUNKS:
        return num_bytes
    return num_bytes * chunk // NUM_EXPERT_CHUNKS // _ALIGNMENT * _ALIGNMENT


class Prefetch:
    """Experts on their way to slots of a half, in this order. Mutable.

    One lane copies, another may look at the same time: what it sees as arrived stays so.
    """

    def __init__(self, experts: tuple[int, ...]) -> None:
        self.slots = {expert: slot for slot, expert in enumerate(experts)}
        self._num_chunks = dict.fromkeys(experts, 0)

    def num_chunks(self, expert: int) -> int:
        """Chunks of an expert that have arrived."""
        return self._num_chunks.get(expert, 0)

    def arrived(self) -> frozenset[int]:
        """Experts that are there as a whole."""
        found = self._num_chunks.items()
        return frozenset(expert for expert, count in found if count == NUM_EXPERT_CHUNKS)

    def copy(
        self, copy_chunk: Callable[[int, int, int], None], is_called: Callable[[], bool]
    ) -> None:
        """Copy chunks of (expert, slot, chunk) until all have arrived, or another is called for.

        Before each chunk it is asked: what is urgent waits for no more than one.
        """
        for expert, slot in self.slots.items():
            for chunk in range(NUM_EXPERT_CHUNKS):
                if is_called():
                    return
                copy_chunk(expert, slot, chunk)
                self._num_chunks[expert] = chunk + 1
