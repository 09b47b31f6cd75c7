"""Seconds of one op: every term written out."""

from __future__ import annotations

import dataclasses

import pytest
from msgspec.structs import replace

from planner.cost_model import OpCost, Pricer, copy_bytes, has_grouped_products, op_cost, predict
from planner.errors import ProfileError
from planner.hardware import Backend, DeviceProfile, LinearSample
from planner.model_spec import LayerSpec, ModelSpec, Module
from planner.step_graph import Op, OpKind, Payload, build
from planner.strategies import STRATEGIES, cuts
from planner.workload import BatchShape, decode_shape
from tests.planner.tiny import (
    ATTENTION,
    DENSE,
    EXPERT,
    HEAD,
    HIDDEN,
    LOGITS,
    ROUTER,
    real_machine,
    tiny_device,
    tiny_machine,
    tiny_spec,
)

# Two sequences with 9 tokens in the cache, in decode; 16 bytes per second everywhere.
DECODE = decode_shape(2, 9.0)
MACHINE = tiny_machine(gpu=tiny_device("gpu"))


def op(kind: OpKind, *, layer: int | None = None) -> Op:
    modules = {"attention", "router", "experts", "dense", "head"}
    module = kind if kind in modules else None
    return Op(index=0, kind=kind, lane="cpu", layer=layer, module=module)  # type: ignore[arg-type]


def copy(payload: Payload, *, layer: int | None = None) -> Op:
    return Op(index=0, kind="copy", lane="h2d", payload=payload, layer=layer)


@pytest.mark.parametrize(
    ("kind", "layer", "num_bytes"),
    [
        ("embed", None, 2 * 2 * HIDDEN),  # 2 rows, read and written
        ("dispatch", 1, 2 * 2 * 2 * HIDDEN),  # to each of 2 chosen experts
        ("combine", 1, 2 * 2 * HIDDEN),
        ("dense", 0, DENSE),
        ("router", 1, ROUTER),
        ("head", None, HEAD),
        ("sample", None, 2 * LOGITS),
        # 2 of 4 experts a token: 4 * (1 - (1 - 2/4)**2) = 3 distinct experts for 2 tokens.
        ("experts", 1, 3 * EXPERT),
        # The weights, and 2 sequences * 10 tokens of context * 16 bytes of KV.
        ("attention", 0, ATTENTION + 2 * 10 * 16),
    ],
)
def test_an_op_that_memory_bounds_takes_its_bytes_over_the_read_rate(
    kind: OpKind, layer: int | None, num_bytes: int
) -> None:
    cost = op_cost(op(kind, layer=layer), tiny_spec("dm"), MACHINE, DECODE)

    assert cost.seconds == num_bytes / 16
    assert cost.bound == "memory"


@pytest.mark.parametrize(
    ("kind", "layer", "num_flops"),
    [
        ("dense", 0, 2 * 6 * 8 * 16),  # 2 tokens * 6 * hidden * width: 1536
        ("router", 1, 2 * 2 * 8 * 4),
        ("experts", 1, 2 * 2 * 6 * 8 * 6),  # 2 tokens * 2 experts
        ("head", None, 2 * 2 * 8 * 10),
        ("attention", 0, 2 * 2 * 8 * (2 * 8 + 2 * 4)),
    ],
)
def test_an_op_that_products_bound_takes_its_flops_over_their_rate(
    kind: OpKind, layer: int | None, num_flops: int
) -> None:
    """16 FLOP/s, and memory so fast that it counts for nothing."""
    device = tiny_device(
        "cpu", read_bytes_per_s=2.0**80, attention_bytes_per_s=2.0**80, flop_per_s=16.0
    )
    cost = op_cost(op(kind, layer=layer), tiny_spec("dm"), tiny_machine(cpu=device), DECODE)

    assert cost.seconds == num_flops / 16
    assert cost.bound == "compute"


def test_decode_attention_adds_the_cache_to_whichever_of_the_projections_is_slower() -> None:
    """400 bytes of weights or 768 FLOP, then 2 * 10 * 16 = 320 bytes of KV at 32 bytes per second.

    At 16 bytes and 16 FLOP per second: max(25, 48) + 10.
    """
    device = tiny_device("cpu", flop_per_s=16.0, attention_bytes_per_s=32.0)
    cost = op_cost(op("attention", layer=0), tiny_spec("d"), tiny_machine(cpu=device), DECODE)

    assert (cost.compute_s, cost.memory_s) == (48.0 + 10.0, 25.0 + 10.0)
    assert cost.seconds == 58.0


def test_a_window_bounds_the_cache_that_decode_attention_reads() -> None:
    """4 of 10 tokens: 2 sequences * 4 * 16 bytes."""
    cost = op_cost(op("attention", layer=0), windowed(4), MACHINE, DECODE)

    assert cost.seconds == (ATTENTION + 2 * 4 * 16) / 16


def test_decode_attention_is_affine_in_a_context_that_is_not_whole() -> None:
    """Half a token more of mean context is half the bytes of one."""
    spec = tiny_spec("d")
    shapes = [decode_shape(2, past) for past in (9.0, 9.5, 10.0)]
    low, mean, high = (op_cost(op("attention", layer=0), spec, MACHINE, s).seconds for s in shapes)

    assert mean == (low + high) / 2
    assert high - low == 2 * 16 / 16


def test_prefill_attention_adds_scores_and_values_to_the_projections() -> None:
    """One sequence, 4 new tokens after 2: pairs 4*2 + 4*5/2 = 18, 4 * 8 * 18 = 576 FLOP.

    Projections 2 * 4 * 8 * 24 = 1536 FLOP.
    """
    device = tiny_device("cpu", read_bytes_per_s=2.0**80, flop_per_s=16.0)
    device = replace(device, attention_flop_per_s=32.0)
    shape = prefill(num_tokens=4, num_past_tokens=2.0)
    cost = op_cost(op("attention", layer=0), tiny_spec("d"), tiny_machine(cpu=device), shape)

    assert cost.seconds == 1536 / 16 + 576 / 32


def test_prefill_attention_of_a_window_counts_the_keys_that_are_seen() -> None:
    """Window 3, 4 new tokens after 2: 1 query sees 3 (itself and both), the others 3 each."""
    device = tiny_device("cpu", read_bytes_per_s=2.0**80, flop_per_s=16.0)
    shape = prefill(num_tokens=4, num_past_tokens=2.0)
    cost = op_cost(op("attention", layer=0), windowed(3), tiny_machine(cpu=device), shape)

    assert cost.seconds == (1536 + 4 * 8 * (3 + 3 * 3)) / 16


@pytest.mark.parametrize(
    ("kind", "layer", "num_links", "num_launches"),
    [
        ("attention", 0, 7, 17),
        ("dense", 0, 4, 7),
        ("router", 1, 3, 8),
        ("dispatch", 1, 0, 8),
        ("combine", 1, 1, 1),
        ("head", None, 2, 5),
        ("experts", 1, 2, 4 + 3 * 2),  # two products of each of 3 distinct experts
    ],
)
def test_every_small_operation_costs_a_launch(
    kind: OpKind, layer: int | None, num_links: int, num_launches: int
) -> None:
    """A link of our kernels does more than an operation of torch, which rows are computed with."""
    cpu = replace(tiny_device("cpu", launch_s=0.5), torch_launch_s=4.0)
    emulated = replace(tiny_device("gpu", launch_s=0.5), kind="emulated")
    machine = tiny_machine(cpu=with_torch(cpu, flop_per_s=1.0), gpu=emulated)
    on_cpu, spec = op(kind, layer=layer), tiny_spec("dm")
    on_gpu = dataclasses.replace(on_cpu, lane="gpu")
    modules: tuple[Module, ...] = ("attention", "router", "experts", "dense", "head")
    by_torch: dict[Module, Backend] = dict.fromkeys(modules, "torch")

    assert op_cost(on_cpu, spec, machine, DECODE).launch_s == num_links * 0.5
    assert op_cost(on_gpu, spec, machine, DECODE).launch_s == num_launches * 0.5
    assert op_cost(on_cpu, spec, machine, DECODE, by_torch).launch_s == num_launches * 4.0


def test_a_step_is_embedded_and_sampled_by_torch_and_led_by_python() -> None:
    """One lookup and what 40 take; two operations for each of two sequences, and what 210 take."""
    cpu = replace(tiny_device("cpu", launch_s=0.5), torch_launch_s=4.0)
    costs = [
        op_cost(op(kind), tiny_spec("d"), tiny_machine(cpu=cpu), DECODE)
        for kind in ("embed", "sample")
    ]

    assert [cost.launch_s for cost in costs] == [(1 + 40) * 4.0, (2 * 2 + 210) * 4.0]


@pytest.mark.parametrize("kind", ["attention", "dense", "router", "experts", "head"])
def test_products_are_priced_at_the_rate_of_who_computes_them(kind: OpKind) -> None:
    """Ours at 1 FLOP/s, torch's at 4, both far below what memory gives."""
    ours = tiny_device("cpu", flop_per_s=1.0, read_bytes_per_s=2.0**60)
    cpu = with_torch(replace(ours, attention_bytes_per_s=2.0**60), flop_per_s=4.0)
    layer = {"dense": 0, "attention": 0, "head": None}.get(kind, 1)
    one, machine = op(kind, layer=layer), tiny_machine(cpu=cpu)
    assert one.module is not None
    by_torch: dict[Module, Backend] = {one.module: "torch"}

    by_us = op_cost(one, tiny_spec("dm"), machine, DECODE).compute_s
    assert op_cost(one, tiny_spec("dm"), machine, DECODE, by_torch).compute_s == (
        pytest.approx(by_us / 4, rel=1e-9)
    )


def with_torch(cpu: DeviceProfile, *, flop_per_s: float) -> DeviceProfile:
    sample = LinearSample(dtype="bfloat16", num_tokens=1, flop_per_s=flop_per_s, backend="torch")
    return replace(cpu, linear=(*cpu.linear, sample))


def test_prefill_attention_launches_half_of_its_operations_for_each_sequence() -> None:
    """7 launches for one sequence, 7 * (0.5 + 0.5 * 3) for three."""
    machine = tiny_machine(cpu=tiny_device("cpu", launch_s=0.5))
    spec = tiny_spec("d")
    costs = [
        op_cost(op("attention", layer=0), spec, machine, prefill(num_tokens=6, num_seqs=count))
        for count in (1, 3)
    ]

    assert [cost.launch_s for cost in costs] == [3.5, 7.0]


def test_cuda_multiplies_all_experts_in_one_call_where_rows_are_aligned() -> None:
    """bfloat16 rows of a multiple of 8 elements: the tiny expert of width 6 is not."""
    gpu, cpu = tiny_device("gpu", launch_s=0.5), tiny_device("cpu")
    aligned = tiny_moe(width=16)

    assert has_grouped_products(aligned, gpu.kind)
    assert not has_grouped_products(aligned, cpu.kind)
    assert not has_grouped_products(tiny_spec("m"), gpu.kind)
    on_gpu = Op(index=0, kind="experts", lane="gpu", layer=0, module="experts")
    assert op_cost(on_gpu, aligned, tiny_machine(gpu=gpu), DECODE).launch_s == (4 + 2) * 0.5


def test_a_middle_chunk_of_a_prompt_pays_only_launches_for_the_head() -> None:
    """No row reaches the head, whose weights are then not read."""
    machine = tiny_machine(cpu=tiny_device("cpu", launch_s=0.5))
    shape = prefill(num_tokens=4, num_logits=0)
    cost = op_cost(op("head"), tiny_spec("d"), machine, shape)

    assert (cost.seconds, cost.bound) == (1.0, "launch")


@pytest.mark.parametrize(
    ("payload", "layer", "num_bytes"),
    [
        # 24 bytes a token, 4 bytes for each of ceil((9 + 1) / 16) = 1 block of a sequence.
        ("batch", None, 2 * 24 + 2 * 4),
        ("hidden", 0, 2 * HIDDEN),
        ("hidden", None, 2 * HIDDEN),
        ("expert_output", 1, 2 * HIDDEN),
        ("routing", 1, 2 * (HIDDEN + 2 * 12)),  # 2 chosen experts of 8 + 4 bytes
        ("logits", None, 2 * LOGITS),
        ("kv", 0, 2 * 16),
    ],
)
def test_a_copy_takes_a_latency_and_its_bytes_over_the_links_rate(
    payload: Payload, layer: int | None, num_bytes: int
) -> None:
    machine = tiny_machine(gpu=tiny_device("gpu"), latency_s=0.25)
    cost = op_cost(copy(payload, layer=layer), tiny_spec("dm"), machine, DECODE)

    assert cost.seconds == 0.25 + num_bytes / 16
    assert cost.bound == "link"


def test_streamed_weights_travel_whole_however_few_experts_are_used() -> None:
    stream = Op(index=0, kind="copy", lane="h2d", payload="weights", module="experts", layer=1)

    assert copy_bytes(stream, tiny_spec("dm"), DECODE) == 4 * EXPERT


def test_only_the_rows_that_need_logits_travel_to_the_head() -> None:
    """4 tokens between layers, 1 row of them to the head."""
    shape = prefill(num_tokens=4, num_logits=1)

    assert copy_bytes(copy("hidden", layer=0), tiny_spec("d"), shape) == 4 * HIDDEN
    assert copy_bytes(copy("hidden"), tiny_spec("d"), shape) == HIDDEN


def test_each_direction_of_the_link_has_its_own_rate() -> None:
    machine = tiny_machine(gpu=tiny_device("gpu"))
    assert machine.link is not None
    machine = replace(machine, link=replace(machine.link, d2h_bytes_per_s=32.0))
    up = copy("hidden", layer=0)
    down = Op(index=0, kind="copy", lane="d2h", payload="hidden", layer=0)

    assert op_cost(up, tiny_spec("d"), machine, DECODE).seconds == 2 * HIDDEN / 16
    assert op_cost(down, tiny_spec("d"), machine, DECODE).seconds == 2 * HIDDEN / 32


def test_seconds_are_the_larger_of_compute_and_memory_and_all_of_the_rest() -> None:
    cost = OpCost(compute_s=3.0, memory_s=5.0, launch_s=0.5, link_s=0.25)

    assert cost.seconds == 5.75
    assert cost.bound == "memory"
    assert OpCost(compute_s=3.0, link_s=4.0).bound == "link"


def test_a_profile_without_the_models_format_is_refused_by_name() -> None:
    device = replace(
        tiny_device("cpu"), linear=(LinearSample(dtype="float32", num_tokens=1, flop_per_s=1.0),)
    )
    with pytest.raises(ProfileError, match=r"profile of tiny cpu has no rates for bfloat16"):
        op_cost(op("dense", layer=0), tiny_spec("d"), tiny_machine(cpu=device), DECODE)


def test_the_pricer_gives_every_op_its_own_cost() -> None:
    """What it remembers for one layer is right for every layer that it is used for."""
    spec, machine = tiny_spec("dmmdd"), real_machine()
    for shape in (DECODE, prefill(num_tokens=6, num_seqs=2, num_past_tokens=3.5, num_logits=1)):
        price = Pricer(spec, machine, shape)
        for name, make in STRATEGIES.items():
            for cut in cuts(name, spec, has_gpu=True):
                for each in build(spec, make(spec, shape.phase, cut)).ops:
                    assert price(each) == op_cost(each, spec, machine, shape).seconds


def test_predict_prices_every_op_of_a_step() -> None:
    """All on the CPU, one op after the other: the makespan is the sum."""
    spec, machine = tiny_spec("dm"), real_machine()
    graph = build(spec, STRATEGIES["cpu"](spec, "decode", 0))
    timeline = predict(graph, spec, machine, DECODE)

    expected = sum(op_cost(each, spec, machine, DECODE).seconds for each in graph.ops)
    assert timeline.makespan_s == pytest.approx(expected, rel=1e-14)


def prefill(
    *,
    num_tokens: int,
    num_seqs: int = 1,
    num_past_tokens: float = 0.0,
    num_logits: int = 1,
) -> BatchShape:
    return BatchShape(
        phase="prefill",
        num_tokens=num_tokens,
        num_seqs=num_seqs,
        num_past_tokens=num_past_tokens,
        num_logits=num_logits,
    )


def windowed(window: int) -> ModelSpec:
    return dataclasses.replace(
        tiny_spec("d"), layers=(LayerSpec(intermediate_size=16, window=window),)
    )


def tiny_moe(width: int) -> ModelSpec:
    layer = LayerSpec(intermediate_size=width, num_experts=4, num_experts_per_token=2)
    return dataclasses.replace(tiny_spec("m"), layers=(layer,))
