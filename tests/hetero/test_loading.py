"""Sizes of the caches that a plan is loaded with."""

from __future__ import annotations

import math

from msgspec.structs import replace

from hetero.loading import _kv_blocks
from planner.hardware import HardwareProfile
from planner.kv_blocks import KVBlocks, bytes_per_block, kv_bytes
from planner.memory import MARGIN_SHARE, needs
from planner.model_spec import ModelSpec
from planner.placement import Placement
from planner.plan import Plan
from planner.search import search
from planner.strategies import cpu, gpu
from planner.workload import Workload
from tests.machines import toy_machine
from tests.tiny_models import tiny_model, tiny_spec

# Sequences of 24 tokens: 2 blocks each.
WAVE = Workload(prompt_len=16, output_len=8, num_seqs=6)


def machine(gpu_bytes: int) -> HardwareProfile:
    return toy_machine().with_emulated_gpu(memory_bytes=gpu_bytes, link_bytes_per_s=4e9)


def plan_of(spec: ModelSpec, placement: Placement) -> Plan:
    plan = search(spec, machine(10**9), WAVE, strategy="gpu")
    return replace(plan, placement=placement)


def moving(spec: ModelSpec) -> Placement:
    """Prompts on the GPU in steps of 16 tokens: pages of two prompts are enough."""
    prefill = replace(gpu(spec, "prefill"), max_num_tokens=16)
    return Placement(prefill=prefill, decode=cpu(spec, "decode"))


def test_pages_of_prompts_hold_the_longest_one() -> None:
    """A length of 160 tokens is 10 blocks; six sequences need 12, two prompts 2."""
    spec = tiny_spec(tiny_model("llama"))
    plan, hardware = plan_of(spec, moving(spec)), machine(10**9)
    assert _kv_blocks(plan, spec, hardware, 6, 160) == KVBlocks(first=12, prompts=10)
    assert _kv_blocks(plan, spec, hardware, 6, 64) == KVBlocks(first=12, prompts=4)
    assert _kv_blocks(plan, spec, hardware, 1, 160) == KVBlocks(first=10, prompts=10)
    stays = Placement(prefill=cpu(spec, "prefill"), decode=cpu(spec, "decode"))
    assert _kv_blocks(plan_of(spec, stays), spec, hardware, 6, 160) == KVBlocks(first=12)


def test_pages_of_prompts_take_no_more_than_there_is() -> None:
    """Room for three blocks beside the planned two: 5 of the 10 that the longest would need."""
    spec = tiny_spec(tiny_model("llama"))
    plan = plan_of(spec, moving(spec))
    need = needs(spec, plan.placement, WAVE, machine(10**9))["gpu"]
    block_bytes = bytes_per_block(spec, plan.placement, "gpu")
    free_bytes = need.needed_bytes + 3 * block_bytes
    hardware = machine(math.ceil(free_bytes / (1 - MARGIN_SHARE["gpu"])) + 1)
    assert _kv_blocks(plan, spec, hardware, 6, 160) == KVBlocks(first=12, prompts=5)


def test_two_sub_batches_have_the_planned_second_one() -> None:
    """Four of six sequences in the first, two in the second; longer ones in the first."""
    spec = tiny_spec(tiny_model("llama"))
    decode = replace(gpu(spec, "decode"), num_second_seqs=2)
    prefill = replace(gpu(spec, "prefill"), max_num_tokens=16)
    placement = Placement(prefill=prefill, decode=decode)
    plan = plan_of(spec, placement)
    blocks = _kv_blocks(plan, spec, machine(10**9), 6, 160)
    assert blocks == KVBlocks(first=10, second=4, prompts=10)
    assert kv_bytes(spec, placement, WAVE, "cpu") == 4 * 16 * 2 * spec.kv_bytes_per_token(0)
