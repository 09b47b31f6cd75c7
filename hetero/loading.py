"""From a plan and a folder of weights to an engine that can step."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from msgspec.structs import replace

from cpu_kernels.compiling import listening
from hetero.checkpoint import Checkpoint
from hetero.engine import Engine
from hetero.errors import MemoryBudgetError
from hetero.faults import NO_FAULTS, Faults
from hetero.measure.memory_limit import available_memory_bytes
from hetero.model.decoder import Decoder
from hetero.model.expert_step import ExpertTimes
from hetero.planning import MAX_NUM_SEQS
from hetero.runtime.devices import Accelerator, CudaAccelerator, EmulatedAccelerator
from hetero.runtime.weights import load_weights
from hetero.tokenizer import Tokenizer, read_eos_token_ids
from planner.cost_model import Backends, CostModel
from planner.hardware import HardwareProfile
from planner.kv_blocks import (
    BlockSpan,
    KVBlocks,
    kv_blocks,
    num_blocks_for,
    num_front_blocks,
    prompt_span,
)
from planner.memory import kv_block_capacity, needs
from planner.model_spec import ModelSpec
from planner.plan import Plan
from planner.what_if import with_pageable_copies


def make_accelerator(
    plan: Plan, hardware: HardwareProfile, faults: Faults = NO_FAULTS
) -> Accelerator | None:
    """The accelerator that a plan uses, empty; None where the CPU does all the work."""
    if hardware.gpu is None or hardware.link is None or not plan.placement.uses("gpu"):
        return None
    if hardware.gpu.kind == "emulated":
        return EmulatedAccelerator(
            budget_bytes=hardware.gpu.memory_bytes,
            link_bytes_per_s=hardware.link.h2d_bytes_per_s,
            latency_s=hardware.link.latency_s,
            faults=faults,
        )
    return CudaAccelerator(
        budget_bytes=hardware.gpu.memory_bytes - hardware.gpu.reserved_bytes, faults=faults
    )


def load_engine(
    plan: Plan,
    spec: ModelSpec,
    hardware: HardwareProfile,
    checkpoint: Checkpoint,
    accelerator: Accelerator | None,
    tokenizer: Tokenizer | None,
    *,
    backends: Backends,
    costs: CostModel,
    max_num_seqs: int | None,
    max_model_len: int,
    overlap: bool,
    say: Callable[[str], None],
    faults: Faults = NO_FAULTS,
) -> Engine:
    """Read the weights to where the plan wants them, size the KV cache, and warm up.

    The calling thread computes the `cpu` lane from now on: its torch thread count becomes the
    measured one of the profile. `costs` divide the experts of split layers as they were priced.

    Raises
    ------
    MemoryBudgetError
        The host has no room for the plan now, or the accelerator's budget is too small.
    """
    _check_host_memory(plan, spec, hardware)
    num_seqs = _concurrency(plan, spec, hardware, max_num_seqs)
    sizes = plan.estimate.bytes_by_device.items()
    where = ", ".join(f"{size / 1e9:.2f} GB on the {device}" for device, size in sizes)
    say(f"loading {spec.name} as {plan.placement.name}: {where}")
    by_torch = [module for module, backend in backends.items() if backend == "torch"]
    if by_torch and plan.placement.uses("cpu"):
        say(f"products on the CPU by torch, faster here by the profile: {', '.join(by_torch)}")
    torch.set_num_threads(hardware.cpu.num_threads)
    with _told_of_compilation(say):
        weights = load_weights(spec, checkpoint, plan.placement, accelerator, backends=backends)
    if accelerator is not None and accelerator.unpinned_bytes:
        costs = pageable_costs(costs) or costs
    decoder = Decoder.create(
        spec,
        weights,
        accelerator,
        num_threads=hardware.cpu.num_threads,
        expert_times=ExpertTimes(spec, partial(costs.expert_times, spec)),
    )
    engine = Engine(
        decoder=decoder,
        placement=plan.placement,
        accelerator=accelerator,
        tokenizer=tokenizer,
        eos_token_ids=(
            tokenizer.eos_token_ids
            if tokenizer is not None
            else read_eos_token_ids(checkpoint.folder)
        ),
        kv_blocks=_kv_blocks(plan, spec, hardware, num_seqs, max_model_len),
        max_num_seqs=num_seqs,
        max_model_len=max_model_len,
        overlap=overlap,
        faults=faults,
    )
    with _told_of_compilation(say):
        engine.warm_up()
    return engine


def pageable_costs(costs: CostModel) -> CostModel | None:
    """The same where host memory is not pinned; None where the profile does not know."""
    hardware = with_pageable_copies(costs.hardware)
    return None if hardware is None else CostModel(hardware, corrections=costs.corrections)


@contextlib.contextmanager
def _told_of_compilation(say: Callable[[str], None]) -> Iterator[None]:
    """Say when kernels are compiled, which takes long once and never again on this machine."""
    names: list[str] = []

    def hear(name: str) -> None:
        if not names:
            say("compiling CPU kernels for this processor; they are kept for the next time")
        names.append(name)

    begin_s = time.perf_counter()
    with listening(hear):
        yield
    if names:
        say(f"compiled {len(names)} kernels in {time.perf_counter() - begin_s:.0f} s")


def _concurrency(
    plan: Plan, spec: ModelSpec, hardware: HardwareProfile, max_num_seqs: int | None
) -> int:
    """Sequences of a step: as asked, or what was planned and more where memory holds it."""
    if max_num_seqs is not None:
        return max_num_seqs
    more = MAX_NUM_SEQS
    while more > plan.wave.num_seqs:
        trial = replace(plan.wave, num_seqs=more)
        if all(need.fits for need in needs(spec, plan.placement, trial, hardware).values()):
            return more
        more //= 2
    return plan.wave.num_seqs


def _kv_blocks(
    plan: Plan, spec: ModelSpec, hardware: HardwareProfile, num_seqs: int, max_model_len: int
) -> KVBlocks:
    """Room for the sequences of a step, and for longer ones where there is any.

    One sequence of the longest length, or all of the planned length: all of the longest would take
    the whole memory of any machine for a context of 131072.
    """
    usual = replace(plan.wave, num_seqs=num_seqs)
    planned = kv_blocks(plan.placement, usual)
    capacity = kv_block_capacity(spec, plan.placement, usual, hardware)
    longest = num_blocks_for(max_model_len)
    after_front = BlockSpan(start=num_front_blocks(plan.placement)).count(longest)
    in_prompts = (prompt_span(plan.placement) or BlockSpan()).count(longest)
    return KVBlocks(
        first=min(max(after_front, planned.first), capacity.first),
        second=planned.second,
        prompts=min(max(in_prompts, planned.prompts), capacity.prompts),
        fronts=planned.fronts,
    )


def _check_host_memory(plan: Plan, spec: ModelSpec, hardware: HardwareProfile) -> None:
    """Refuse before loading what the host has no room for now.

    The plan was checked against the machine's memory; other processes may hold some of it.
    """
    memory = needs(spec, plan.placement, plan.wave, hardware)
    need = sum(
        each.needed_bytes
        for device, each in memory.items()
        if device == "cpu" or plan.resources.accelerator == "emulated"
    )
    free = available_memory_bytes()
    if need > free:
        raise MemoryBudgetError(
            f"{spec.name} needs {need / 1e9:.2f} GB of host memory but {free / 1e9:.2f} GB is free "
            "now; end other processes, or use a smaller model"
        )
