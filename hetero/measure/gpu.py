"""A GPU's kernels, its link, and the memory that is taken before any weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

import torch

from hetero.measure.attention import prefill_sample, torch_decode_sample
from hetero.measure.ceilings import gpu_ceilings
from hetero.measure.cold_memory import ColdMemory, cold_gpu_memory, gpu_cold_bytes
from hetero.measure.cpu import KV_SHARE, Progress
from hetero.measure.effort import Effort
from hetero.measure.elementwise import elementwise_sample
from hetero.measure.experts import torch_experts_sample
from hetero.measure.fingerprint import gpu_used_bytes, nvidia_gpus
from hetero.measure.launch import launch_s
from hetero.measure.linear import linear_sample
from hetero.measure.link import copy_samples, link_profile
from hetero.measure.memory import gpu_read_bytes_per_s
from planner.device import DeviceProfile, LinkProfile, Sample
from planner.model_spec import Dtype, Quantization

# CUDA context, library workspaces: less than this was never seen.
_MIN_RESERVED_GPU_BYTES = 500_000_000
# Less is what a driver keeps for a display.
_MIN_OTHER_GPU_BYTES = 100_000_000
_GPU_DTYPES: tuple[Dtype, ...] = ("bfloat16", "float16", "float32")
_QUANTISATIONS: tuple[Quantization, ...] = get_args(Quantization)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredGpu:
    profile: DeviceProfile
    link: LinkProfile
    samples: tuple[Sample, ...]
    uuid: str
    notes: tuple[str, ...]


def measure_gpu(efforts: Sequence[Effort], progress: Progress) -> MeasuredGpu:
    """Measure the first GPU by one effort or several, a model's own after the usual one."""
    # Before torch is asked for anything, which makes the context.
    used_by_uuid = {gpu.uuid: gpu_used_bytes(gpu.uuid) for gpu in nvidia_gpus()}
    device = torch.device("cuda", 0)
    facts = torch.cuda.get_device_properties(device)
    uuid = f"GPU-{facts.uuid}"
    used_before, torch_before = used_by_uuid.get(uuid), torch.cuda.memory_reserved(device)
    effort, budget_s = efforts[0], efforts[0].budget_s
    progress(f"gpu, {facts.name}: reading memory")
    free, _ = torch.cuda.mem_get_info(device)
    memory = cold_gpu_memory(gpu_cold_bytes(free, max(map(_largest_gpu_bytes, efforts))), device)
    read = gpu_read_bytes_per_s(memory, budget_s=budget_s)
    progress(f"gpu, {facts.name}: matrix products, experts, attention")
    measured = [each for one in efforts for each in measure_gpu_kernels(memory, one)]
    samples = list({sample.call: sample for sample in measured}.values())
    small_op_s = launch_s(device, budget_s=budget_s)
    progress("link between cpu and gpu")
    copies = copy_samples(device, effort.copy_bytes, budget_s=budget_s)
    # All libraries are loaded by now: what is taken and is not torch's own is context and others.
    free, total = torch.cuda.mem_get_info(device)
    torch_bytes = torch.cuda.memory_reserved(device)
    taken = total - free - torch_bytes
    reserved = own_context_bytes(used_before, gpu_used_bytes(uuid), torch_bytes - torch_before)
    del memory
    torch.cuda.empty_cache()
    profile = gpu_ceilings(
        samples,
        name=facts.name,
        memory_bytes=total,
        reserved_bytes=reserved,
        read_bytes_per_s=read,
        launch_s=small_op_s,
    )
    return MeasuredGpu(
        profile=profile,
        link=link_profile(device, copies),
        samples=(*samples, *copies),
        uuid=uuid,
        notes=other_use_notes(taken - reserved, total),
    )


def _largest_gpu_bytes(effort: Effort) -> int:
    """Bytes of the largest product in float32."""
    return 4 * max(rows * columns for rows, columns in (*effort.shapes, *effort.torch_shapes))


def measure_gpu_kernels(memory: ColdMemory, effort: Effort) -> list[Sample]:
    budget_s, device = effort.budget_s, memory.device
    samples = [
        linear_sample(
            memory,
            kind=kind,
            num_tokens=count,
            shape=shape,
            budget_s=budget_s,
            backend="panels" if kind in get_args(Quantization) else "torch",
        )
        for kind in (*_GPU_DTYPES, *_QUANTISATIONS)
        for shape in effort.shapes
        for count in effort.gpu_tokens
    ]
    for kind in (*_GPU_DTYPES[:2], *_QUANTISATIONS):
        samples += [
            torch_experts_sample(
                memory,
                kind=kind,
                shape=case.shape,
                num_experts=case.num_experts or 1,
                tokens_each=case.num_tokens,
                budget_s=budget_s,
            )
            for case in effort.torch_experts(kind, effort.expert_tokens, memory.num_bytes)
        ]
    for case in replace(effort, kv_dtypes=("bfloat16",)).decode_cases(memory.num_bytes // KV_SHARE):
        samples.append(torch_decode_sample(memory, case, budget_s=budget_s))
    for case in effort.prefill_cases(memory.num_bytes // KV_SHARE):
        samples.append(prefill_sample(memory, case, compute_dtype=case.dtype, budget_s=budget_s))
    samples += [
        elementwise_sample(device, "bfloat16", *case, budget_s=budget_s)
        for case in effort.widths_and_rows
    ]
    return samples


def own_context_bytes(used_before: int | None, used_after: int | None, torch_bytes: int) -> int:
    """GPU memory that this process took beside torch's tensors, by what all processes use."""
    if used_before is None or used_after is None:
        return _MIN_RESERVED_GPU_BYTES
    return max(_MIN_RESERVED_GPU_BYTES, used_after - used_before - torch_bytes)


def other_use_notes(other_bytes: int, total_bytes: int) -> tuple[str, ...]:
    """A note where other processes hold GPU memory; they may have ended when a plan is made."""
    if other_bytes < _MIN_OTHER_GPU_BYTES:
        return ()
    return (
        f"measured while other processes held {other_bytes / 1e9:.1f} of the GPU's "
        f"{total_bytes / 1e9:.1f} GB: plans count it as free, unless --gpu-mem-gb says less",
    )
