"""PinnedArena: exact-size host memory that copies run from at the link's full rate."""

from __future__ import annotations

import bisect
import contextlib
import mmap
import threading
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

# A refusal late in a large model leaves the chunks before it pinned; larger ones gain nothing.
CHUNK_BYTES = 256 << 20
# Address space taken at once for many modules; memory is taken page by page as they come.
_SEGMENT_BYTES = 1 << 30
_PAGE_BYTES = mmap.PAGESIZE

# Address and bytes of whole pages -> 0, or CUDA's number of what went wrong.
Register = Callable[[int, int], int]
# Takes back what was registered at an address.
Unregister = Callable[[int], None]


class PinnedArena:
    """Host memory carved from a few mappings, each piece page-locked in chunks. Mutable.

    `pin_memory()` rounds up to a power of two; a registered mapping is exact to the page. Pieces
    may be taken by several threads at a time. Whoever takes one touches its pages before they are
    registered: they lie where that thread's memory policy wants them, and registering, for which
    CUDA holds a lock of the whole process, only locks them. Huge pages are asked for, which makes
    both quicker: registering locks parts of a huge page as it does small ones.

    CUDA refuses a copy that is partly from a registered chunk: `cuts` says where to divide one.

    Parameters
    ----------
    register, unregister : callable
        What page-locks memory and undoes it.
    chunk_bytes : int
        Most bytes that are registered at once; whole pages.
    segment_bytes : int
        Bytes of a mapping, but for pieces that are larger.
    """

    def __init__(
        self,
        register: Register,
        unregister: Unregister,
        *,
        chunk_bytes: int = CHUNK_BYTES,
        segment_bytes: int = _SEGMENT_BYTES,
    ) -> None:
        assert chunk_bytes % _PAGE_BYTES == 0 < chunk_bytes
        self._register = register
        self._unregister = unregister
        self._chunk_bytes = chunk_bytes
        self._segment_bytes = segment_bytes
        self._lock = threading.Lock()
        self._segment = torch.empty(0, dtype=torch.uint8)
        self._used_bytes = 0
        self._registered: list[tuple[int, Tensor]] = []  # with what keeps it mapped
        self._bounds: list[int] = []  # addresses at which a chunk begins or ends, in order
        self.pinned_bytes = 0
        self.unpinned_bytes = 0
        self.refusal: int | None = None

    def take(self, num_bytes: int) -> Tensor:
        """Memory as flat uint8, zero; pinned as far as the system allows."""
        if num_bytes == 0:
            return torch.empty(0, dtype=torch.uint8)
        whole = -(-num_bytes // _PAGE_BYTES) * _PAGE_BYTES
        piece = self._carve(whole)
        piece.numpy()[::_PAGE_BYTES] = 0
        for start in range(0, whole, self._chunk_bytes):
            self._pin(piece[start : start + self._chunk_bytes])
        return piece[:num_bytes]

    def cuts(self, tensor: Tensor) -> list[int]:
        """Bytes of a contiguous tensor after which another chunk begins, and all its bytes."""
        begin = tensor.data_ptr()
        end = begin + tensor.nbytes
        first = bisect.bisect_right(self._bounds, begin)
        # Once each: where a chunk begins, the one before it ends.
        inside = dict.fromkeys(self._bounds[first : bisect.bisect_left(self._bounds, end)])
        return [*(bound - begin for bound in inside), tensor.nbytes]

    def close(self) -> None:
        """Give the pages back to the system's paging; nothing is being copied any more."""
        for address, _ in self._registered:
            self._unregister(address)
        self._registered.clear()
        self._bounds.clear()
        self.pinned_bytes = self.unpinned_bytes = 0

    def _carve(self, num_bytes: int) -> Tensor:
        with self._lock:
            if self._used_bytes + num_bytes > self._segment.nbytes:
                self._segment = _mapping(max(num_bytes, self._segment_bytes))
                self._used_bytes = 0
            piece = self._segment[self._used_bytes : self._used_bytes + num_bytes]
            self._used_bytes += num_bytes
            return piece

    def _pin(self, chunk: Tensor) -> None:
        """Register a chunk; after a refusal none is tried, as the limit is the whole process's."""
        address = chunk.data_ptr()
        error = self.refusal or self._register(address, chunk.nbytes)
        with self._lock:
            bisect.insort(self._bounds, address)
            bisect.insort(self._bounds, address + chunk.nbytes)
            if error:
                self.refusal = error
                self.unpinned_bytes += chunk.nbytes
            else:
                self._registered.append((address, chunk))
                self.pinned_bytes += chunk.nbytes


def _mapping(num_bytes: int) -> Tensor:
    """Fresh memory of this process alone: what it shares with others has no huge pages."""
    mapping = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # Advice: a system without huge pages refuses it, and works as well.
        with contextlib.suppress(OSError):
            mapping.madvise(mmap.MADV_HUGEPAGE)
    # The tensor keeps the mapping, and views keep the tensor's memory.
    return torch.from_numpy(np.frombuffer(mapping, np.uint8))


def pieces(target: Tensor, source: Tensor, cuts: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """A copy divided at `cuts`, bytes of both tensors, which are contiguous."""
    if len(cuts) == 1:
        yield target, source
        return
    to, from_ = target.view(-1).view(torch.uint8), source.view(-1).view(torch.uint8)
    start = 0
    for stop in cuts:
        yield to[start:stop], from_[start:stop]
        start = stop
