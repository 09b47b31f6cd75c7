"""Caches are divided so that both devices end together: never over budget, never slower."""

from __future__ import annotations

import dataclasses

import pytest
from msgspec.structs import replace

from planner import strategies
from planner.cache_fronts import with_fronts
from planner.candidate import Candidate, Wave
from planner.cost_model import CostModel
from planner.hardware import HardwareProfile
from planner.model_spec import LayerSpec, ModelSpec
from planner.placement import KV_BLOCK_TOKENS, Placement
from planner.plan import Plan
from planner.search import search
from planner.workload import Workload
from tests.planner.tiny import tiny_device, tiny_machine, tiny_spec

SPEC = tiny_spec("dd")
# 4 sequences of 320 tokens, 20 blocks: 1280 * 32 bytes of cache.
WAVE = Workload(prompt_len=200, output_len=120, num_seqs=4)
NUM_BLOCKS = 20


def machine(gpu_read: float = 160.0, gpu_bytes: int = 1_000_000) -> HardwareProfile:
    """A GPU as fast as its CPU, or faster; and a link that takes no time to speak of."""
    return tiny_machine(
        cpu=tiny_device("cpu", read_bytes_per_s=160.0),
        gpu=tiny_device("emulated", read_bytes_per_s=gpu_read, memory_bytes=gpu_bytes),
        link_bytes_per_s=1e9,
    )


def candidate(
    hardware: HardwareProfile, spec: ModelSpec = SPEC, *, wave: Workload = WAVE, num_second: int = 0
) -> Candidate:
    """All on the GPU, perhaps in two sub-batches."""
    decode = replace(strategies.gpu(spec, "decode"), strategy="mixed", num_second_seqs=num_second)
    prefill = strategies.gpu(spec, "prefill")
    placement = Placement(prefill=replace(prefill, strategy="mixed"), decode=decode)
    return Candidate(placement, Wave(spec, CostModel(hardware), wave, wave.num_seqs))


def divided(whole: Candidate, num_blocks: int) -> Candidate:
    decode = whole.placement.decode
    layers = tuple(
        replace(layer, kv_on_cpu=True, num_gpu_kv_tokens=num_blocks * KV_BLOCK_TOKENS)
        for layer in decode.layers
    )
    decode = replace(decode, layers=layers, num_second_seqs=0)
    return Candidate(replace(whole.placement, decode=decode), whole.wave)


@pytest.mark.parametrize("num_second", [0, 1])
@pytest.mark.parametrize("gpu_read", [160.0, 480.0])
def test_both_devices_attend_until_they_end_together(gpu_read: float, num_second: int) -> None:
    """As fast as any number of blocks, within what a sixteenth of them is; sub-batches or not."""
    whole = candidate(machine(gpu_read), num_second=num_second)
    found = with_fronts(whole)
    every = [divided(whole, count) for count in range(1, NUM_BLOCKS)]
    best = min(every, key=lambda each: each.times.e2e_s)
    assert best.times.e2e_s < 0.96 * whole.times.e2e_s
    assert found.placement.decode.num_second_seqs == 0
    assert found.times.e2e_s <= 1.02 * best.times.e2e_s
    share = found.placement.decode.num_gpu_kv_tokens / (KV_BLOCK_TOKENS * NUM_BLOCKS)
    # the GPU reads 1 of 2 bytes, or 3 of 4; contexts are 200 to 320 tokens
    assert share == pytest.approx(0.8 * gpu_read / (gpu_read + 160.0), abs=0.12)


def test_no_front_is_over_budget() -> None:
    """With memory for the half of each, a quarter, ... and for none at all."""
    fitting = candidate(machine()).memory["gpu"].needed_bytes
    shares, counts = (1.0, 0.8, 0.6, 0.5, 0.4, 0.3), []
    for share in shares:
        whole = candidate(machine(gpu_bytes=int(share * fitting / 0.96) + 1))
        found = with_fronts(whole)
        if found is not whole:
            assert found.lacking_bytes == 0
        counts.append(found.placement.decode.num_gpu_kv_tokens)
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1]


def test_a_placement_stays_where_there_is_nothing_to_gain() -> None:
    """Slow CPUs, small caches, windows, attention on the CPU; a single token."""
    slow = tiny_machine(cpu=tiny_device("cpu", read_bytes_per_s=0.1), gpu=tiny_device("emulated"))
    windowed = LayerSpec(intermediate_size=16, window=8)
    short = Workload(prompt_len=16, output_len=16)
    hidden = dataclasses.replace(SPEC, layers=(windowed, windowed))
    cases = [
        candidate(slow),
        candidate(machine(), wave=short),
        candidate(machine(), hidden),
        candidate(machine(), wave=Workload(prompt_len=320, output_len=1, num_seqs=4)),
    ]
    on_cpu = strategies.placement(SPEC, "cpu", 0)
    cases.append(Candidate(on_cpu, cases[0].wave))
    for each in cases:
        assert with_fronts(each) is each


def test_tiers_of_decode_are_left_out_and_those_of_prefill_stay() -> None:
    whole = candidate(machine())
    tiers = (whole.placement.prefill, whole.placement.decode)
    smaller = tuple(replace(each, max_num_tokens=1) for each in tiers)
    tiered = Candidate(replace(whole.placement, smaller=smaller), whole.wave)
    found = with_fronts(tiered)
    assert found is not tiered
    assert found.placement.smaller == smaller[:1]


def test_a_plan_has_divided_caches_where_they_gain() -> None:
    """It goes through its file unchanged; the estimate is of what is placed."""
    hardware = machine(gpu_read=480.0, gpu_bytes=40_000)
    plan = search(SPEC, hardware, WAVE, prefers_simple=False)
    assert plan.feasible
    assert plan.placement.decode.num_gpu_kv_tokens > 0
    assert Plan.from_json(plan.to_json(), source="it") == plan
    wave = Wave(SPEC, CostModel(hardware), WAVE, plan.estimate.num_concurrent_seqs)
    again = Candidate(plan.placement, wave)
    assert again.lacking_bytes == 0
    assert plan.estimate.e2e_s == pytest.approx(again.times.e2e_s, rel=1e-9)
    others = [each.e2e_s for each in plan.alternatives if each.feasible and each.e2e_s]
    assert others and plan.estimate.e2e_s < min(others)
