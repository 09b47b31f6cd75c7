"""What lanes cost each other on this machine: the kernels that are measured beside other work."""

from __future__ import annotations

import torch

from hetero.measure.cold_memory import ColdMemory, cold_cpu_memory
from hetero.measure.contention import (
    beside_attention,
    beside_copies,
    torch_beside_paced_copies,
)
from hetero.measure.cpu import MeasuredCpu, Progress
from hetero.measure.effort import Effort
from planner.device import DeviceProfile, Sample
from planner.hardware import EMULATED_LINK_BYTES_PER_S


def measure_contention(
    memory: ColdMemory,
    effort: Effort,
    cpu: MeasuredCpu,
    device: torch.device,
    progress: Progress,
) -> tuple[Sample, ...]:
    """Experts of one token beside copies and beside attention."""
    progress("cpu beside copies and attention")
    kind, shape = effort.kinds[0], (effort.expert_shapes or effort.dense_shapes)[0]
    alone = next(
        (
            sample
            for sample in cpu.samples
            if sample.kernel == "experts"
            and sample.format == kind
            and sample.shape[1:] == shape
            and sample.num_tokens == 1
            and sample.num_threads == cpu.num_threads
        ),
        None,
    )
    if alone is None:
        return ()
    copied = cold_cpu_memory(max(64 << 20, memory.num_bytes // 8))
    budget_s = max(0.1, 2 * effort.budget_s)
    beside = beside_copies(memory, copied, alone, device, budget_s=budget_s)
    case = effort.decode_cases(copied.num_bytes)[0]
    attended = beside_attention(memory, copied, alone, case=case, budget_s=budget_s)
    # Without other samples of the format this one would be its ceiling.
    is_known = any(is_on(attended, each) and kind in each.flop_per_s for each in cpu.devices)
    return (
        *beside,
        *((attended,) if is_known else ()),
        *_measure_emulated_copies(memory, copied, cpu, budget_s),
    )


def _measure_emulated_copies(
    memory: ColdMemory, copied: ColdMemory, cpu: MeasuredCpu, budget_s: float
) -> tuple[Sample, ...]:
    """What torch on one thread loses to the emulated link, at the rate that it has by default."""
    alone = [
        sample
        for sample in cpu.samples
        if sample.kernel == "linear"
        and (sample.backend, sample.format, sample.num_threads) == ("torch", "bfloat16", 1)
        and sample.num_tokens == 1
    ]
    if not alone:
        return ()
    return (
        torch_beside_paced_copies(
            memory,
            copied,
            max(alone, key=lambda sample: sample.call.num_weights),
            link_bytes_per_s=EMULATED_LINK_BYTES_PER_S,
            budget_s=budget_s,
        ),
    )


def is_on(sample: Sample, cpu: DeviceProfile) -> bool:
    return sample.lane == "cpu" and sample.num_threads == cpu.num_threads
