"""What lanes cost each other: the CPU's kernels beside copies, and beside each other."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from msgspec.structs import replace

from cpu_kernels.calls import Chain, Link
from hetero.measure.attention import AttentionCase, decode_rounds
from hetero.measure.chains import timed_chains
from hetero.measure.cold_memory import ColdMemory
from hetero.measure.experts import experts_rounds
from hetero.measure.linear import linear_sample
from hetero.measure.timing import Timing, torch_threads
from hetero.runtime.devices import EmulatedAccelerator
from planner.device import Sample
from planner.kernels import HostMemory
from planner.step_graph import Lane

_COPY_BYTES = 32 << 20


@contextmanager
def kept_busy(work: Callable[[], object]) -> Iterator[list[float]]:
    """Repeat some work in a thread of its own for the length of a block; its seconds, each time.

    What the work raises, the block's end raises.
    """
    samples: list[float] = []
    errors: list[BaseException] = []
    is_over, has_begun = threading.Event(), threading.Event()

    def repeat() -> None:
        try:
            with torch.inference_mode():
                while not is_over.is_set():
                    begin_s = time.perf_counter()
                    work()
                    samples.append(time.perf_counter() - begin_s)
                    has_begun.set()
        except BaseException as error:
            errors.append(error)
            has_begun.set()

    thread = threading.Thread(target=repeat, name="hetero-busy", daemon=True)
    thread.start()
    try:
        has_begun.wait()
        samples.clear()
        yield samples
    finally:
        is_over.set()
        thread.join()
    for error in errors:
        raise error


def copying(memory: ColdMemory, device: torch.device) -> tuple[Callable[[], None], HostMemory]:
    """A copy of 32 MiB towards a device; on a machine without one, from memory to memory.

    The second is what the emulated accelerator's link does.
    """
    if device.type == "cuda":
        pinned = torch.zeros(_COPY_BYTES, dtype=torch.uint8, pin_memory=True)
        on_gpu = torch.empty(_COPY_BYTES, dtype=torch.uint8, device=device)
        stream = torch.cuda.Stream(device)

        def upload() -> None:
            with torch.cuda.stream(stream):
                on_gpu.copy_(pinned, non_blocking=True)
            stream.synchronize()

        return upload, "pinned"
    target = torch.empty(_COPY_BYTES // 4, dtype=torch.float32)

    def copy() -> None:
        target.copy_(memory.take("float32", _COPY_BYTES // 4))

    return copy, "pageable"


def beside_copies(
    memory: ColdMemory,
    copied: ColdMemory,
    alone: Sample,
    device: torch.device,
    *,
    budget_s: float,
) -> tuple[Sample, Sample]:
    """Measure experts while copies run, and the copies; `alone` is the same experts' sample."""
    rounds = _rounds_like(alone, memory, alone.num_threads)
    copy, host_memory = copying(copied, device)
    with kept_busy(copy) as copies:
        found = timed_chains(rounds, num_threads=alone.num_threads, budget_s=budget_s)
    beside = Timing.of(copies)
    return (
        replace(alone, busy=("h2d",), seconds=found.seconds, spread=found.spread),
        Sample(
            lane="h2d",
            kernel="copy",
            backend="torch",
            shape=(_COPY_BYTES,),
            memory=host_memory,
            busy=("cpu",),
            seconds=beside.seconds,
            spread=beside.spread,
        ),
    )


def torch_beside_paced_copies(
    memory: ColdMemory,
    copied: ColdMemory,
    alone: Sample,
    *,
    link_bytes_per_s: float,
    budget_s: float,
) -> Sample:
    """Measure a product of torch's one thread while the emulated accelerator's link copies.

    That is what its compute lane loses to its copies; `alone` is the same product's sample.
    """
    accelerator = EmulatedAccelerator(
        budget_bytes=_COPY_BYTES, link_bytes_per_s=link_bytes_per_s, latency_s=0.0
    )
    try:
        target = accelerator.allocate(_COPY_BYTES, "the target of a test copy")

        def copy() -> None:
            accelerator.copy_into(target, copied.take("float32", _COPY_BYTES // 4))

        rows, columns = alone.shape
        with kept_busy(copy), torch_threads(1):
            beside = linear_sample(
                memory,
                kind=alone.format,
                num_tokens=alone.num_tokens,
                shape=(rows, columns),
                budget_s=budget_s,
                backend="torch",
            )
    finally:
        accelerator.close()
    return replace(beside, busy=("h2d",))


def beside_attention(
    memory: ColdMemory,
    cached: ColdMemory,
    alone: Sample,
    *,
    case: AttentionCase,
    budget_s: float,
) -> Sample:
    """Measure experts on all threads but one, while one thread does decode attention."""
    num_threads = max(1, alone.num_threads - 1)
    rounds = _rounds_like(alone, memory, num_threads)
    links = [link for each in decode_rounds(cached, case, num_threads=1) for link in each]
    chain = Chain(links, num_threads=1)
    busy: tuple[Lane, ...] = ("cpu",)
    with kept_busy(chain.run):
        found = timed_chains(rounds, num_threads=num_threads, budget_s=budget_s)
    return replace(
        alone, num_threads=num_threads, busy=busy, seconds=found.seconds, spread=found.spread
    )


def _rounds_like(alone: Sample, memory: ColdMemory, num_threads: int) -> list[Sequence[Link]]:
    """Rounds of the experts that a sample is of."""
    num_experts, hidden, width = alone.shape
    return experts_rounds(
        memory,
        kind=alone.format,
        shape=(hidden, width),
        num_experts=num_experts,
        tokens_each=alone.num_tokens,
        num_threads=num_threads,
    )
