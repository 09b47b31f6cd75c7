"""What the CPU's layers keep between steps: memory, and each layer's chain of kernels.

A decode step of one token spends as long in Python as in kernels if every kernel is called anew.
So the chain of a layer is built once for each number of tokens, over arrays that stay in place,
and a step only tells it where its hidden states are.
"""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from cpu_kernels.calls import Chain, Link
from cpu_kernels.scratch import Scratch
from hetero.model.attention import LayerKV, as_array

# Numbers of tokens whose chains are kept: those of decode steps as sequences come and go. A layer's
# take some 10 KB. Of prefill steps, whose arrays are large, only the last ones' are.
_MAX_WORKSPACES = 32
_MAX_LARGE = 2
_FEW_TOKENS = 64


_Built = TypeVar("_Built")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Steps:
    """Links of some part of a layer, and which of them read its x and write its out."""

    links: tuple[Link, ...]
    reads_x: tuple[Link, ...] = ()
    writes_out: tuple[Link, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Program:
    """A chain. `run` tells its calls where x is and where out is to be.

    `states` are the calls that say whether what they were given was in its bounds.
    """

    chain: Chain
    reads_x: Sequence[ctypes.Structure]
    writes_out: Sequence[ctypes.Structure]
    states: Sequence[ctypes.Structure]

    def run(self, x: NDArray[Any], out: NDArray[Any]) -> NDArray[Any]:
        """Run it on arrays of the shapes and formats that it was built for; returns out."""
        assert x.flags.c_contiguous and out.flags.c_contiguous
        x_at, out_at = x.ctypes.data, out.ctypes.data
        for call in self.reads_x:
            call.x = x_at
        for call in self.writes_out:
            call.out = out_at
        self.chain.run()
        for call in self.states:
            if call.state != 0:
                raise AssertionError(f"{type(call).__name__} found indices out of bounds")
        return out


class Workspace:
    """Arrays and chains of steps of one number of tokens. Mutable; one step at a time."""

    def __init__(self, memory: dict[str, Scratch], scratch: Scratch, num_threads: int) -> None:
        self.scratch = scratch
        self._memory = memory
        self._num_threads = num_threads
        self._arrays: dict[str, NDArray[Any]] = {}
        self._kept: dict[Hashable, tuple[tuple[object, ...], Any]] = {}

    def array(self, name: str, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """The array of this name, of any contents; steps of all sizes share its memory."""
        found = self._arrays.get(name)
        if found is None or found.shape != shape or found.dtype != dtype:
            num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
            memory = self._memory.setdefault(name, Scratch()).take(num_bytes)
            found = self._arrays[name] = memory[:num_bytes].view(dtype).reshape(shape)
        return found

    def kept(self, key: Hashable, keeps: tuple[object, ...], build: Callable[[], _Built]) -> _Built:
        """What was built for a key, built at first, and again for others than it was built for.

        `keeps` is what it was built for, by identity, and lives as long.
        """
        found = self._kept.get(key)
        if found is None or any(new is not old for new, old in zip(keeps, found[0], strict=True)):
            found = self._kept[key] = (keeps, build())
        built: _Built = found[1]
        return built

    def program(
        self, key: Hashable, keeps: tuple[object, ...], build: Callable[[], Steps]
    ) -> Program:
        """The program of a key's steps."""
        return self.kept(key, keeps, lambda: self.compose(build()))

    def compose(self, steps: Steps) -> Program:
        """A program of these steps."""
        # 0 items: how many is found when it runs
        is_small = all(link.call.num_items == 1 for link in steps.links)
        return Program(
            Chain(steps.links, num_threads=1 if is_small else self._num_threads),
            [link.call for link in steps.reads_x],
            [link.call for link in steps.writes_out],
            [link.call for link in steps.links if hasattr(link.call, "state")],
        )


@dataclass(slots=True, kw_only=True)
class CpuKernels:
    """How the CPU computes: threads, and what calls use again. Mutable; one step at a time."""

    num_threads: int
    inv_freq_F: NDArray[np.float32]
    # Of decode steps, and of prefill steps: a chain holds what it was built with.
    _scratches: tuple[Scratch, Scratch] = field(default_factory=lambda: (Scratch(), Scratch()))
    _memory: dict[str, Scratch] = field(default_factory=dict)
    _workspaces: OrderedDict[int, Workspace] = field(default_factory=OrderedDict)
    _pages: dict[int, tuple[LayerKV, NDArray[Any], NDArray[Any]]] = field(default_factory=dict)

    def workspace(self, num_tokens: int) -> Workspace:
        """Where steps of so many tokens are done."""
        found = self._workspaces.get(num_tokens)
        if found is None:
            is_large = num_tokens > _FEW_TOKENS
            same = [size for size in self._workspaces if (size > _FEW_TOKENS) == is_large]
            for oldest in same[: len(same) + 1 - (_MAX_LARGE if is_large else _MAX_WORKSPACES)]:
                del self._workspaces[oldest]
            found = self._workspaces[num_tokens] = Workspace(
                self._memory, self._scratches[is_large], self.num_threads
            )
        self._workspaces.move_to_end(num_tokens)
        return found

    def pages_of(self, kv: LayerKV) -> tuple[NDArray[Any], NDArray[Any]]:
        """Keys and values of a layer as arrays, made once: a view costs 10 us."""
        if id(kv) not in self._pages:
            self._pages[id(kv)] = (kv, as_array(kv.key), as_array(kv.value))
        return self._pages[id(kv)][1:]
