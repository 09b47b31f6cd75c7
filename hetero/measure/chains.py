"""Seconds of our kernels as the engine runs them: in chains, without Python between them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence

from cpu_kernels.calls import Chain, Link
from hetero.measure.timing import MIN_CALLS, Timing, host_seconds

# Rounds of a small kernel before the same weights are read again, where memory holds more.
MAX_ROUNDS = 512


def timed_chains(rounds: Sequence[Sequence[Link]], *, num_threads: int, budget_s: float) -> Timing:
    """Time one round; rounds should read memory that was last touched a lap ago.

    A chain lasts a third of the budget or a round, so that what starts it does not count.
    """

    def chain(count: int, start: int) -> Chain:
        links = itertools.chain.from_iterable(rounds[start : start + count])
        return Chain(tuple(links), num_threads=num_threads)

    chain(1, 0).run()  # loads the kernels
    once_s = host_seconds(chain(1, min(1, len(rounds) - 1)).run)
    length = max(1, min(len(rounds), int(budget_s / MIN_CALLS / once_s)))
    starts = range(0, len(rounds) - length + 1, length)
    chains = itertools.cycle([chain(length, start) for start in starts])
    samples: list[float] = []
    deadline = time.perf_counter() + budget_s
    while len(samples) < MIN_CALLS or time.perf_counter() < deadline:
        samples.append(host_seconds(next(chains).run))
    return Timing.of(samples, num_calls=length)


def num_rounds(memory_bytes: int, round_bytes: int) -> int:
    """Rounds of so many bytes that memory holds, at least one."""
    return max(1, min(MAX_ROUNDS, memory_bytes // max(1, round_bytes)))


def repeated(make: Callable[[], Sequence[Link]], count: int) -> list[Sequence[Link]]:
    """So many rounds, each made anew: a chain sets its links' counters to 0 once."""
    return [make() for _ in range(count)]
