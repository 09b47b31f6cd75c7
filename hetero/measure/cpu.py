"""The CPU's kernels by thread count: which number of threads it is used with, and their samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch

from cpu_kernels.threads import physical_cores
from hetero.measure.attention import decode_sample, prefill_sample, torch_decode_sample
from hetero.measure.ceilings import cpu_ceilings, filled
from hetero.measure.cold_memory import ColdMemory
from hetero.measure.effort import QUICK, Effort, ProductCase
from hetero.measure.elementwise import (
    elementwise_sample,
    norm_sample,
    residual_sample,
    rotary_sample,
    route_sample,
    sampling_sample,
)
from hetero.measure.experts import experts_sample, torch_experts_sample
from hetero.measure.fingerprint import cpu_model
from hetero.measure.host import host_samples
from hetero.measure.launch import handover_sample, launch_s, link_s
from hetero.measure.linear import linear_sample
from hetero.measure.memory import cpu_read_bytes_per_s
from hetero.measure.memory_limit import memory_limit_bytes
from hetero.measure.pace import Pace
from hetero.measure.settling import Probe, Settling
from hetero.measure.timing import torch_threads
from hetero.model.products import available_backends, fits_groups
from hetero.model_lookup import find_model
from planner.device import DeviceProfile, Sample
from planner.model_spec import Dtype, ModelSpec, Quantization

Progress = Callable[[str], None]

# A cache of keys and values that is measured takes no more than this part of the memory.
KV_SHARE = 3
_TORCH_DTYPES: tuple[Dtype, ...] = ("bfloat16", "float32")
# Of several thread counts the larger one must win by this share: fewer threads disturb less.
_MORE_THREADS_GAIN = 1.03
# float16 has a fast product on few CPUs and may take 70 times as long as bfloat16.
_FLOAT16_TOKENS = (1, 16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is measured, and the memory that it is rotated through."""

    memory: ColdMemory
    effort: Effort

    @classmethod
    def of(cls, spec: ModelSpec, memory: ColdMemory, effort: Effort) -> Subject:
        """A model's own shapes, rotated through the same memory: never from the caches."""
        # four of the largest product in float32
        return cls(memory=memory, effort=effort.for_model(spec, memory.num_bytes // 16))


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredCpu:
    """The CPU by thread count, the count it is used with, and what was measured."""

    devices: tuple[DeviceProfile, ...]
    num_threads: int
    samples: tuple[Sample, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plain:
    """What decides on a number of threads: plain reads and a product of one token."""

    num_threads: int
    read_bytes_per_s: float
    product: Sample


def measure_cpus(subjects: list[Subject], progress: Progress) -> MeasuredCpu:
    """Choose the thread count by what decides decode, then measure every kernel with it.

    One thread is measured too, more briefly: the emulated accelerator has one.
    """
    memory, effort = subjects[0].memory, subjects[0].effort
    plain = [
        _measure_plain(memory, num_threads, effort, progress)
        for num_threads in thread_counts(physical_cores(), effort)
    ]
    chosen = choose_threads({each.num_threads: each.product.seconds for each in plain})
    samples: list[Sample] = [each.product for each in plain]
    devices: list[DeviceProfile] = []
    for each in plain:
        num_threads, found = each.num_threads, [each.product]
        with torch_threads(num_threads):
            if num_threads == chosen:
                for subject in subjects:
                    found += _measure_kernels(subject.memory, subject.effort, num_threads, progress)
            elif num_threads == 1 and effort.has_all_thread_counts:
                brief = replace(
                    QUICK,
                    torch_tokens=effort.torch_tokens,
                    torch_shapes=effort.torch_shapes,
                    expert_shapes=effort.expert_shapes,
                    rows=effort.rows,
                )
                found += _measure_kernels(memory, brief, num_threads, progress)
            devices.append(
                cpu_ceilings(
                    found,
                    name=cpu_model(),
                    memory_bytes=memory_limit_bytes(),
                    num_threads=num_threads,
                    read_bytes_per_s=each.read_bytes_per_s,
                    launch_s=link_s(memory, num_threads=num_threads, budget_s=effort.budget_s),
                    torch_launch_s=launch_s(torch.device("cpu"), budget_s=effort.budget_s),
                )
            )
        samples += found[1:]
    by_threads = {device.num_threads: device for device in devices}
    products = {each.num_threads: each.product.seconds for each in plain}
    devices = [
        filled(device, by_threads[chosen], products[chosen] / products[device.num_threads])
        if len(device.flop_per_s) < len(by_threads[chosen].flop_per_s)
        else device
        for device in devices
    ]
    unique = {(s.num_threads, s.call): s for s in samples}
    return MeasuredCpu(devices=tuple(devices), num_threads=chosen, samples=tuple(unique.values()))


def thread_counts(num_cores: int, effort: Effort) -> tuple[int, ...]:
    """Thread counts to measure: 1, 2, 4, ... and all; one and all where it must be quick."""
    counts = {1, num_cores}
    if effort.has_all_thread_counts:
        count = 2
        while count < num_cores:
            counts.add(count)
            count *= 2
    return tuple(sorted(counts))


def choose_threads(seconds: dict[int, float]) -> int:
    """The number of threads that is fastest; more only where they gain 3 %.

    Examples
    --------
    >>> choose_threads({1: 2.0, 2: 1.0, 4: 0.99})
    2
    """
    chosen = min(seconds)
    for count in sorted(seconds):
        if seconds[count] * _MORE_THREADS_GAIN < seconds[chosen]:
            chosen = count
    return chosen


def _measure_plain(
    memory: ColdMemory, num_threads: int, effort: Effort, progress: Progress
) -> _Plain:
    progress(f"{_threads(num_threads)}: reading memory")
    # longer than a kernel: all other choices hang on it
    budget_s = 4 * effort.budget_s
    with torch_threads(num_threads):
        return _Plain(
            num_threads=num_threads,
            read_bytes_per_s=cpu_read_bytes_per_s(
                memory, num_threads=num_threads, budget_s=budget_s
            ),
            product=linear_sample(
                memory,
                kind="bfloat16",
                num_tokens=1,
                shape=(2048, 2048),
                budget_s=budget_s,
                backend="numba",
            ),
        )


def _threads(num_threads: int) -> str:
    return f"cpu, {num_threads} thread{'s' if num_threads > 1 else ''}"


def _measure_kernels(
    memory: ColdMemory, effort: Effort, num_threads: int, progress: Progress
) -> list[Sample]:
    """Every kernel of the CPU with the threads that torch is set to."""
    who, settling = _threads(num_threads), Settling(Pace(num_threads))
    parts: tuple[tuple[str, list[Probe]], ...] = (
        ("matrix products", _products(memory, effort)),
        ("experts", _experts(memory, effort, num_threads)),
        ("quantised weights of an emulated accelerator", _panels(memory, effort, num_threads)),
        ("attention", _attention(memory, effort, num_threads)),
        ("small kernels, sampling", _small_kernels(memory, effort, num_threads)),
    )
    for what, probes in parts:
        progress(f"{who}: {what}")
        settling.run(probes)
    progress(f"{who}: again what was disturbed")
    samples = settling.settle(effort.settling_s)
    progress(f"{who}: Python between kernels")
    samples += host_samples(memory, find_model(None, hub_cache=Path()), num_threads=num_threads)
    samples.append(handover_sample(num_threads=num_threads))
    return samples


def _products(memory: ColdMemory, effort: Effort) -> list[Probe]:
    """Ours, and those of torch and of Intel's extension, to choose between."""
    cases = effort.products("numba", effort.kinds)
    for kind in effort.kinds:
        assert kind != "float16"
        for backend, reason in available_backends(kind).items():
            if backend != "numba" and reason is None:
                cases += [
                    case
                    for case in effort.products(backend, (kind,))
                    if kind not in ("int8", "int4") or fits_groups(*case.shape)
                ]
    cases += [
        ProductCase(kind="float16", shape=effort.torch_shapes[0], num_tokens=count, backend="torch")
        for count in _FLOAT16_TOKENS
    ]
    return [
        partial(
            linear_sample,
            memory,
            kind=case.kind,
            num_tokens=case.num_tokens,
            shape=case.shape,
            budget_s=effort.budget_s,
            backend=case.backend,
        )
        for case in cases
    ]


def _experts(memory: ColdMemory, effort: Effort, num_threads: int) -> list[Probe]:
    """Ours, and what a run may choose in their place where weights are not quantised."""
    probes: list[Probe] = [
        partial(
            experts_sample,
            memory,
            kind=case.kind,
            shape=case.shape,
            num_experts=case.num_experts or 1,
            tokens_each=case.num_tokens,
            num_threads=num_threads,
            budget_s=effort.budget_s,
        )
        for case in effort.experts(effort.kinds, memory.num_bytes)
    ]
    probes += [
        partial(
            torch_experts_sample,
            memory,
            kind=dtype,
            shape=case.shape,
            num_experts=case.num_experts or 1,
            tokens_each=case.num_tokens,
            budget_s=effort.budget_s,
        )
        for dtype in _TORCH_DTYPES
        if dtype in effort.kinds
        for case in effort.torch_experts(dtype, effort.torch_tokens, memory.num_bytes)
        if case.flops <= effort.max_flops
    ]
    return probes


def _panels(memory: ColdMemory, effort: Effort, num_threads: int) -> list[Probe]:
    """What an emulated accelerator does with quantised weights, for few tokens and for many.

    It unpacks them before each product: seconds that no number of tokens and no shape changes much.
    """
    if num_threads > 1 and effort.has_all_thread_counts:
        return []  # one thread's are measured
    few_and_many = dict.fromkeys((effort.torch_tokens[0], effort.torch_tokens[-1]))
    rest: dict[str, Any] = {"budget_s": effort.budget_s}
    probes: list[Probe] = []
    for kind in (each for each in effort.kinds if each in get_args(Quantization)):
        for count in few_and_many:
            for shape in effort.torch_shapes[:1]:
                each = {"kind": kind, "num_tokens": count, "shape": shape, **rest}
                probes.append(partial(linear_sample, memory, backend="panels", **each))
            for shape in effort.expert_shapes[:1]:
                each = {"kind": kind, "tokens_each": count, "shape": shape, **rest}
                probes.append(partial(torch_experts_sample, memory, num_experts=1, **each))
    return probes


def _attention(memory: ColdMemory, effort: Effort, num_threads: int) -> list[Probe]:
    """Ours over pages and torch's over prompts; with one thread all of torch's, for emulation."""
    budget_s, max_bytes = effort.budget_s, memory.num_bytes // KV_SHARE
    probes: list[Probe] = [
        partial(decode_sample, memory, case, num_threads=num_threads, budget_s=budget_s)
        for case in effort.decode_cases(max_bytes)
    ]
    probes += [
        # Whatever the model's format: cpu_layers.py widens queries, keys and values for torch.
        partial(prefill_sample, memory, case, compute_dtype="float32", budget_s=budget_s)
        for case in effort.prefill_cases(max_bytes)
    ]
    for dtype in _TORCH_DTYPES if num_threads == 1 else ():
        if dtype not in effort.kinds:
            continue
        each = replace(effort, kv_dtypes=(dtype,), heads=effort.heads[:1])
        probes += [
            partial(torch_decode_sample, memory, case, budget_s=budget_s)
            for case in each.decode_cases(max_bytes)
        ]
        if dtype != "float32":
            probes += [
                partial(prefill_sample, memory, case, compute_dtype=dtype, budget_s=budget_s)
                for case in each.prefill_cases(max_bytes)
            ]
    return probes


def _small_kernels(memory: ColdMemory, effort: Effort, num_threads: int) -> list[Probe]:
    """Between products: ours, torch's, and sampling."""
    probes: list[Probe] = []
    threads, budget_s = {"num_threads": num_threads}, effort.budget_s / 2
    for width, count in effort.widths_and_rows:
        probes.append(partial(norm_sample, width, count, **threads, budget_s=budget_s))
        probes.append(partial(residual_sample, width, count, **threads, budget_s=budget_s))
        probes.append(
            partial(
                elementwise_sample,
                torch.device("cpu"),
                "bfloat16",
                width,
                count,
                budget_s=budget_s,
                cold=memory,
            )
        )
    for count in effort.rows:
        probes.append(partial(rotary_sample, effort.heads[0], count, **threads, budget_s=budget_s))
        probes.append(partial(route_sample, 64, 8, count, **threads, budget_s=budget_s))
    probes += [
        partial(sampling_sample, memory, vocabulary, count, **threads)
        for vocabulary in effort.vocabularies
        for count in effort.num_seqs
    ]
    return probes
