"""The roofline of bench/bench_plans.py against published sizes, and what it calls a violation."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from bench.bench_plans import SHAPES, Shape, roofline_of, violations
from planner.device import DeviceProfile, LinkProfile
from planner.hardware import HardwareProfile
from planner.model_spec import LayerSpec, ModelSpec, RopeSpec
from planner.plan import Plan
from planner.search import search
from planner.workload import Workload

# Billions of parameters of one token, as the makers publish them, the embedding included.
PUBLISHED_ACTIVE = {
    "mistral-7b": 7.25,
    "olmoe-1b-7b": 1.3,
    "qwen3-30b-a3b": 3.3,
    "qwen3-32b": 32.8,
    "mixtral-8x7b": 12.9,
    "llama-3.1-70b": 70.6,
    "mixtral-8x22b": 39.0,
    "qwen3-235b-a22b": 22.0,
    "llama-3.1-405b": 405.0,
    "qwen3-coder-480b-a35b": 35.0,
}
# Billions of parameters in all.
PUBLISHED_TOTAL = {
    "olmoe-1b-7b": 6.9,
    "qwen3-30b-a3b": 30.5,
    "mixtral-8x7b": 46.7,
    "mixtral-8x22b": 141.0,
    "qwen3-235b-a22b": 235.0,
    "qwen3-coder-480b-a35b": 480.0,
}
TOY = Shape(layers=2, hidden=10, heads=2, kv_heads=1, head_dim=5, width=20, vocabulary=100)
EXPERTS = Shape(
    layers=1,
    hidden=10,
    heads=2,
    kv_heads=1,
    head_dim=5,
    width=20,
    vocabulary=100,
    num_experts=4,
    experts_per_token=2,
)


def machine() -> HardwareProfile:
    """10 + 90 bytes and 1 + 9 thousand FLOPs a second."""
    cpu = DeviceProfile(
        name="toy cpu",
        kind="cpu",
        memory_bytes=10**9,
        read_bytes_per_s=10,
        flop_per_s={"float32": 1e3, "bfloat16": 1e3},
        launch_s=0,
    )
    gpu = DeviceProfile(
        name="toy gpu",
        kind="cuda",
        memory_bytes=10**9,
        read_bytes_per_s=90,
        flop_per_s={"float32": 9e3, "bfloat16": 9e3},
        launch_s=0,
    )
    link = LinkProfile(name="toy link", h2d_bytes_per_s=5, d2h_bytes_per_s=5, latency_s=0)
    return HardwareProfile(
        name="toy", provenance="datasheet", cpu_by_threads=(cpu,), gpu=gpu, link=link
    )


def plan() -> Plan:
    """Any plan that fits."""
    spec = ModelSpec(
        name="toy",
        architecture="LlamaForCausalLM",
        dtype="bfloat16",
        hidden_size=8,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        vocab_size=10,
        max_position_embeddings=64,
        layers=(LayerSpec(intermediate_size=16),),
        rope=RopeSpec(theta=1e4),
        is_tied=False,
    )
    found = search(spec, machine(), Workload(prompt_len=4, output_len=4))
    assert found.feasible
    return found


def row(**changes: Any) -> dict[str, Any]:
    """Ten and five times the roofline, planned in a second."""
    values = {
        "feasible": True,
        "plan_s": 1.0,
        "roofline_ttft_s": 1.0,
        "roofline_tpot_s": 0.1,
        "ttft_low_s": 8.0,
        "ttft_s": 10.0,
        "ttft_high_s": 12.0,
        "tpot_low_s": 0.4,
        "tpot_s": 0.5,
        "tpot_high_s": 0.6,
    }
    return values | changes


@pytest.mark.parametrize(("name", "billions"), PUBLISHED_ACTIVE.items())
def test_weights_of_one_token_are_the_published_ones(name: str, billions: float) -> None:
    """Within 3 %: makers publish two digits."""
    shape = SHAPES[name]
    active = shape.weight_bytes(1) / 2 + shape.vocabulary * shape.hidden
    assert active / 1e9 == pytest.approx(billions, rel=0.03)


def test_every_model_has_a_published_size() -> None:
    """Ten models, each checked."""
    assert set(SHAPES) == set(PUBLISHED_ACTIVE)
    assert len(SHAPES) == 10


@pytest.mark.parametrize(("name", "billions"), PUBLISHED_TOTAL.items())
def test_many_tokens_read_all_experts(name: str, billions: float) -> None:
    """The published total, without the embedding."""
    shape = SHAPES[name]
    total = shape.weight_bytes(10_000) / 2 + shape.vocabulary * shape.hidden
    assert total / 1e9 == pytest.approx(billions, rel=0.015)


def test_roofline_of_a_dense_model_can_be_redone_by_hand() -> None:
    """All memories and all devices at once."""
    # attention 10 * 5 * (4 + 2) = 300, feed-forward 3 * 10 * 20 = 600; 2 layers and 10 * 100
    # logits: 2800 weights, 5600 bytes. 20 bytes of cache a layer and token.
    # Past of 3 decode steps: 4, 5, 6. (5600 + 2 * 20 * 5) / 100 bytes/s
    found = roofline_of(TOY, machine(), Workload(prompt_len=4, output_len=4))
    assert found.tpot_s == pytest.approx(58.0)
    # reads: 5600 / 100
    assert found.ttft_s == pytest.approx(56.0)


def test_a_long_prompt_is_bound_by_its_flops() -> None:
    """Products, causal attention, and the logits of one token."""
    # 400 tokens * 2 * 1800 + 2 * 1000 + 2 layers * 4 * 10 * 400 * 401 / 2 = 7858000 FLOP
    found = roofline_of(TOY, machine(), Workload(prompt_len=400, output_len=4))
    assert found.ttft_s == pytest.approx(785.8)


def test_tokens_share_experts() -> None:
    """Two tokens that each choose 2 of 4 experts read 4 (1 - 1/4) = 3 of them."""
    # attention 300, router 40, 600 an expert, 1000 logits
    assert EXPERTS.weight_bytes(1) == 2 * (300 + 40 + 2 * 600 + 1000)
    assert EXPERTS.weight_bytes(2) == 2 * (300 + 40 + 3 * 600 + 1000)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"plan_s": 2.0}, "the plan took 2.00 s"),
        ({"ttft_low_s": 0.9}, "ttft_low_s is 0.9, below the roofline"),
        ({"tpot_s": 0.09, "tpot_low_s": 0.08}, "tpot_low_s is 0.08, below the roofline"),
        ({"tpot_high_s": 0.45}, "tpot_s lies outside its own band"),
    ],
)
def test_what_is_impossible_is_a_violation(changes: dict[str, Any], expected: str) -> None:
    """And nothing else is."""
    assert violations(row(), plan(), None) == []
    assert any(expected in each for each in violations(row(**changes), plan(), None))


def test_a_plan_slower_than_without_the_gpu_is_a_violation() -> None:
    """The same one is not."""
    chosen = plan()
    assert violations(row(), chosen, chosen) == []
    slow = replace(chosen, estimate=replace(chosen.estimate, e2e_s=2 * chosen.estimate.e2e_s))
    assert "without the GPU" in violations(row(), slow, chosen)[0]
