"""Seconds of one op: every kernel that it is made of written out."""

from __future__ import annotations

import dataclasses
import math

import pytest
from msgspec.structs import replace

from planner.calibration import Correction, Corrections
from planner.cost_model import CostModel, OpCost, Pricer, copy_bytes, predict, sub_batch_shape
from planner.device import Sample
from planner.errors import ProfileError
from planner.hardware import HardwareProfile
from planner.kernels import Backend, Kernel
from planner.model_spec import LayerSpec, ModelSpec, Module
from planner.popularity import Popularity
from planner.priors import prior
from planner.step_graph import Lane, Op, OpKind, Payload, build
from planner.strategies import STRATEGIES, cuts
from planner.workload import BatchShape, decode_shape
from tests.planner.tiny import (
    ATTENTION_MATRICES,
    DENSE_MATRICES,
    EXPERT,
    HEAD_MATRIX,
    HIDDEN,
    LOGITS,
    ROUTER_MATRIX,
    real_machine,
    tiny_device,
    tiny_machine,
    tiny_spec,
)

# Two sequences with 9 tokens in the cache, in decode; 16 bytes per second everywhere.
DECODE = decode_shape(2, 9.0)
MACHINE = tiny_machine(gpu=tiny_device("gpu"))
EMULATED = tiny_machine(gpu=tiny_device("emulated"))
MODULES: tuple[Module, ...] = ("attention", "router", "experts", "dense", "head")
# Products in no time.
SWIFT = 2.0**80


def op(kind: OpKind, *, layer: int | None = None, lane: Lane = "cpu") -> Op:
    module = kind if kind in MODULES else None
    return Op(index=0, kind=kind, lane=lane, layer=layer, module=module)


def copy(payload: Payload, *, layer: int | None = None, lane: Lane = "h2d") -> Op:
    return Op(index=0, kind="copy", lane=lane, payload=payload, layer=layer)


def price(
    one: Op,
    machine: HardwareProfile = MACHINE,
    shape: BatchShape = DECODE,
    *,
    spec: ModelSpec | None = None,
    backend: Backend | None = None,
) -> OpCost:
    backends = {} if backend is None else dict.fromkeys(MODULES, backend)
    return CostModel(machine).op_cost(one, spec or tiny_spec("dm"), shape, backends)


@pytest.mark.parametrize(
    ("kind", "layer", "num_bytes"),
    [
        ("dense", 0, DENSE_MATRICES),
        ("router", 1, ROUTER_MATRIX),
        ("head", None, HEAD_MATRIX),
        # 2 of 4 experts a token, in proportion to 1, 2^-0.6, 3^-0.6, 4^-0.6: 0.7656, 0.5051,
        # 0.3960, 0.3332 are chosen, by 2 tokens 1 - (1 - p)^2 of each: 2.89081 different ones.
        ("experts", 1, 2.890813 * EXPERT),
        # The weights, and 2 sequences * 10 tokens of context * 16 bytes of KV.
        ("attention", 0, ATTENTION_MATRICES + 2 * 10 * 16),
        # The three parts of it: 8 * (2*8 + 2*4 - 8) and 8 * 8 weights of 2 bytes, and the cache.
        ("qkv", 0, 256),
        ("attention_output", 0, 128),
        ("attend", 0, 2 * 10 * 16),
    ],
)
@pytest.mark.parametrize("lane", ["cpu", "gpu"])
def test_an_op_that_memory_bounds_takes_its_bytes_over_the_read_rate(
    kind: OpKind, layer: int | None, num_bytes: float, lane: Lane
) -> None:
    """Where kernels were measured at the speed of light, whoever computes."""
    cost = price(op(kind, layer=layer, lane=lane))

    # five digits where they are those of a power
    rel = 1e-5 if kind == "experts" else 1e-12
    assert cost.seconds == pytest.approx(num_bytes / 16, rel=rel)
    assert cost.least_s == pytest.approx(num_bytes / 16, rel=rel)
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
    device = tiny_device("cpu", read_bytes_per_s=SWIFT, flop_per_s=16.0)
    cost = price(op(kind, layer=layer), tiny_machine(cpu=device))

    assert cost.seconds == pytest.approx(num_flops / 16, rel=1e-12)
    assert cost.bound == "compute"


@pytest.mark.parametrize("num_second", [1, 3, 9])
def test_an_op_of_a_sub_batch_is_priced_for_its_sequences(num_second: int) -> None:
    """4 sequences: the second has what is planned but for one, the first all others."""
    spec, costs = tiny_spec("dm"), CostModel(MACHINE)
    whole = decode_shape(4, 9.0)
    pricer = Pricer(spec, costs, whole)
    for number, num_seqs in ((0, 4 - min(3, num_second)), (1, min(3, num_second))):
        part = Op(
            index=0,
            kind="attend",
            lane="cpu",
            layer=0,
            sub_batch=number,
            num_second_seqs=num_second,
        )
        # 10 tokens of context, 16 bytes each
        assert pricer(part) == pytest.approx(num_seqs * 10 * 16 / 16, rel=1e-12)


def test_a_measured_utilisation_divides_the_speed_of_light() -> None:
    """Products of our kernels at a quarter of the read rate: 768 / 16 * 4, and half of it 96."""
    slow = [
        replace(sample, seconds=4 * sample.seconds) if sample.kernel == "experts" else sample
        for sample in MACHINE.samples
    ]
    cost = price(op("dense", layer=0), replace(MACHINE, samples=tuple(slow)))

    assert cost.seconds == pytest.approx(192.0, rel=1e-12)
    assert cost.least_s == pytest.approx(48.0, rel=1e-12)


def test_decode_attention_adds_the_cache_to_whichever_of_the_projections_is_slower() -> None:
    """384 bytes of weights or 768 FLOP, then 2 * 10 * 16 = 320 bytes of KV, 16 of each a second."""
    machine = tiny_machine(cpu=tiny_device("cpu", flop_per_s=16.0))
    cost = price(op("attention", layer=0), machine)

    assert cost.by_resource["compute"] == pytest.approx(48.0, rel=1e-12)
    assert cost.by_resource["memory"] == pytest.approx(20.0, rel=1e-12)
    assert cost.seconds == pytest.approx(68.0, rel=1e-12)
    assert cost.bound == "compute"


def test_a_window_bounds_the_cache_that_decode_attention_reads() -> None:
    """4 of 10 tokens: 2 sequences * 4 * 16 bytes."""
    cost = price(op("attention", layer=0), spec=windowed(4))

    assert cost.seconds == pytest.approx((ATTENTION_MATRICES + 2 * 4 * 16) / 16, rel=1e-12)


def test_decode_attention_is_affine_in_a_context_that_is_not_whole() -> None:
    """Half a token more of mean context is half the bytes of one."""
    shapes = [decode_shape(2, past) for past in (9.0, 9.5, 10.0)]
    low, mean, high = (price(op("attention", layer=0), shape=shape).seconds for shape in shapes)

    assert mean == pytest.approx((low + high) / 2, rel=1e-12)
    assert high - low == pytest.approx(2 * 16 / 16, rel=1e-12)


def test_prefill_attention_adds_scores_and_values_to_the_projections() -> None:
    """One sequence, 4 new tokens after 2: pairs 4*2 + 4*5/2 = 18, 4 * 8 * 18 = 576 FLOP.

    Projections 2 * 4 * 8 * 24 = 1536 FLOP.
    """
    device = tiny_device("cpu", read_bytes_per_s=SWIFT)
    device = replace(device, flop_per_s={"bfloat16": 16.0, "float32": 32.0})
    shape = prefill(num_tokens=4, num_past_tokens=2.0)
    cost = price(op("attention", layer=0), tiny_machine(cpu=device), shape)

    assert cost.seconds == pytest.approx(1536 / 16 + 576 / 32, rel=1e-12)


def test_prefill_attention_of_a_window_counts_the_keys_that_are_seen() -> None:
    """Window 3, 4 new tokens after 2: 1 query sees 3 (itself and both), the others 3 each."""
    device = tiny_device("cpu", read_bytes_per_s=SWIFT)
    device = replace(device, flop_per_s={"bfloat16": SWIFT, "float32": 32.0})
    shape = prefill(num_tokens=4, num_past_tokens=2.0)
    cost = price(op("attention", layer=0), tiny_machine(cpu=device), shape, spec=windowed(3))

    assert cost.seconds == pytest.approx(4 * 8 * (3 + 3 * 3) / 32, rel=1e-12)


def test_prompts_that_share_a_step_do_not_see_each_other() -> None:
    """8 tokens of two sequences: twice 4 * 5 / 2 = 10 pairs, not 8 * 9 / 2 = 36."""
    device = tiny_device("cpu", read_bytes_per_s=SWIFT)
    device = replace(device, flop_per_s={"bfloat16": SWIFT, "float32": 32.0})
    shape = prefill(num_tokens=8, num_seqs=2)
    cost = price(op("attention", layer=0), tiny_machine(cpu=device), shape)

    assert cost.seconds == pytest.approx(4 * 8 * 20 / 32, rel=1e-12)


@pytest.mark.parametrize(
    ("kind", "layer", "num_ours", "num_torchs"),
    [
        ("embed", None, 8, 8),  # by torch in any case: one pass over rows of hidden 8
        # norm 8, queries, keys and values 16, residual 8; by torch 14 passes
        ("attention", 0, 32, 14 * 8),
        ("router", 1, 8 + 4, 7 * 8),  # norm, and 4 probabilities
        # by torch 6 passes over numbers, a row's worth, and the rows of 2 chosen experts
        ("dispatch", 1, 0, 6 * 4 + 8 * 2),
        ("experts", 1, 0, 0),  # measured with what is around their products
        ("combine", 1, 8, 8),
        ("dense", 0, 16, 5 * 8),  # norm and residual
        ("head", None, 8, 4 * 8),
        ("sample", None, 10, 10),  # the vocabulary
    ],
)
def test_small_kernels_take_their_elements_over_the_rate_at_what_is_assumed_of_it(
    kind: OpKind, layer: int | None, num_ours: int, num_torchs: int
) -> None:
    """8 elements a second, half of which is reached; 2 rows, products in no time."""
    cpu, gpu = (
        tiny_device(kind, read_bytes_per_s=SWIFT, elements_per_s=8.0) for kind in ("cpu", "gpu")
    )
    machine = tiny_machine(cpu=cpu, gpu=gpu)
    one = op(kind, layer=layer)
    costs = [
        price(one, machine),
        price(one, machine, backend="torch"),
        price(replace(one, lane="gpu"), machine),
    ]

    expected = [2 * num / 8 / 0.5 for num in (num_ours, num_torchs, num_torchs)]
    assert [cost.seconds for cost in costs] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("kind", "layer", "num_ours", "num_torchs"),
    [
        # Ours: norm, projections, rotary, attention, output, residual.
        ("attention", 0, 6, 14 + 3),  # by torch 14 passes, two products and the attention
        ("dense", 0, 3, 5 + 3),  # norm, one chain of three products, residual
        ("router", 1, 3, 7 + 1),
        ("dispatch", 1, 0, 7),
        ("combine", 1, 1, 1),
        ("head", None, 2, 4 + 1),
        ("experts", 1, 1, 5 + 1),
    ],
)
def test_every_kernel_that_was_not_measured_costs_a_launch(
    kind: OpKind, layer: int | None, num_ours: int, num_torchs: int
) -> None:
    """0.5 s for a link of our chains, 4 for an operation of torch; 0.5 on the accelerator.

    Attention of a decode step on the CPU is ours whoever computes the products.
    """
    cpu = replace(tiny_device("cpu", launch_s=0.5), torch_launch_s=4.0)
    gpu = replace(tiny_device("gpu", launch_s=0.5), kind="emulated")
    machine = unmeasured(tiny_machine(cpu=cpu, gpu=gpu))
    one = op(kind, layer=layer)
    costs = [
        price(one, machine),
        price(one, machine, backend="torch"),
        price(replace(one, lane="gpu"), machine),
    ]

    own = 4.0 - 0.5 if kind == "attention" else 0.0
    expected = [num_ours * 0.5, num_torchs * 4.0 - own, num_torchs * 0.5]
    assert [cost.by_resource.get("launch", 0.0) for cost in costs] == expected


def test_a_kernel_that_was_measured_has_its_launch_in_it() -> None:
    """Of our dense feed-forward only the norm and the residual cost one."""
    machine = tiny_machine(cpu=tiny_device("cpu", launch_s=0.5))

    assert price(op("dense", layer=0), machine).by_resource["launch"] == 2 * 0.5


def test_an_op_of_a_prefill_by_our_kernels_also_costs_python() -> None:
    """What six operations of torch take, as nothing was measured."""
    cpu = replace(tiny_device("cpu", launch_s=0.5), torch_launch_s=4.0)
    machine = tiny_machine(cpu=cpu)
    one, shape = op("dense", layer=0), prefill(num_tokens=2)

    decode, first = price(one, machine), price(one, machine, shape)
    assert first.by_resource["launch"] - decode.by_resource["launch"] == 6 * 4.0
    # by torch the passes are Python's
    assert price(one, machine, shape, backend="torch").by_resource["launch"] == 5 * 4.0 + 3 * 4.0


def test_a_step_costs_python_beside_its_ops() -> None:
    """What 210 operations of torch take; where it was measured, that."""
    cpu = replace(tiny_device("cpu", launch_s=0.5), torch_launch_s=4.0)
    machine = tiny_machine(cpu=cpu)
    cost = CostModel(machine).host_cost(DECODE)
    assert (cost.seconds, cost.bound, cost.source) == (840.0, "launch", "prior")

    step = Sample(lane="cpu", kernel="step", backend="torch", num_seqs=2, seconds=3.0)
    measured = replace(machine, samples=(*machine.samples, step))
    assert CostModel(measured).host_cost(DECODE).seconds == 3.0


@pytest.mark.parametrize("kind", ["attention", "dense", "router", "experts", "head"])
def test_products_are_priced_at_the_rate_of_who_computes_them(kind: OpKind) -> None:
    """Ours at 1 FLOP/s, torch's at 4, both far below what memory gives."""
    cpu = tiny_device("cpu", flop_per_s=4.0, read_bytes_per_s=SWIFT)
    cpu = replace(cpu, flop_per_s={**cpu.flop_per_s, "float32": SWIFT})
    machine = tiny_machine(cpu=cpu)
    kernels: tuple[Kernel, ...] = ("linear", "experts")
    by_torch = [
        replace(sample, backend="torch") for sample in machine.samples if sample.kernel in kernels
    ]
    ours = [
        replace(sample, seconds=4 * sample.seconds) if sample.kernel in kernels else sample
        for sample in machine.samples
    ]
    machine = replace(machine, samples=(*ours, *by_torch))
    layer = {"dense": 0, "attention": 0, "head": None}.get(kind, 1)
    one = op(kind, layer=layer)

    by_us = price(one, machine).seconds
    assert price(one, machine, backend="torch").seconds == pytest.approx(by_us / 4, rel=1e-12)
    assert price(one, machine, backend="numba").seconds == by_us


def test_prefill_attention_is_a_call_for_each_sequence() -> None:
    """Unmeasured: 5 kernels of ours and 6 operations' worth of Python, one more each sequence."""
    machine = unmeasured(tiny_machine(cpu=tiny_device("cpu", launch_s=0.5)))
    launches = [
        price(op("attention", layer=0), machine, prefill(num_tokens=6, num_seqs=count)).by_resource
        for count in (1, 3)
    ]

    assert [each["launch"] for each in launches] == [(5 + 6 + 1) * 0.5, (5 + 6 + 3) * 0.5]


def test_a_middle_chunk_of_a_prompt_pays_only_python_for_the_head() -> None:
    """No row reaches the head, whose weights are then not read."""
    machine = tiny_machine(cpu=tiny_device("cpu", launch_s=0.5))
    cost = price(op("head"), machine, prefill(num_tokens=4, num_logits=0))

    assert (cost.seconds, cost.bound) == (6 * 0.5, "launch")


def test_experts_that_are_chosen_more_often_are_read_less_often_together() -> None:
    """Two tokens that always choose the same two of four read two experts, not three."""
    spec = tiny_spec("dm")
    skewed = Popularity(probabilities=((), (1.0, 1.0, 0.0, 0.0)))
    one = op("experts", layer=1)

    cost = CostModel(MACHINE, popularity=skewed).op_cost(one, spec, DECODE)
    assert cost.seconds == pytest.approx(2 * EXPERT / 16, rel=1e-12)
    even = Popularity(probabilities=((), (0.5,) * 4))
    cost = CostModel(MACHINE, popularity=even).op_cost(one, spec, DECODE)
    assert cost.seconds == pytest.approx(3 * EXPERT / 16, rel=1e-12)
    usual = Popularity(probabilities=((), *Popularity.usual(4, 2).probabilities))
    cost = CostModel(MACHINE, popularity=usual).op_cost(one, spec, DECODE)
    assert cost.seconds == pytest.approx(price(one).seconds, rel=1e-12)


def test_tokens_in_a_row_choose_as_half_as_many_of_different_texts() -> None:
    """A prompt of 5: as 3 of different texts; uniform choices of 2 of 4 are 4 * (1 - 1/8) = 3.5."""
    even = Popularity(probabilities=((), (0.5,) * 4))
    cost = CostModel(MACHINE, popularity=even).op_cost(
        op("experts", layer=1), tiny_spec("dm"), prefill(num_tokens=5)
    )
    assert cost.seconds == pytest.approx(3.5 * EXPERT / 16, rel=1e-12)


def test_the_source_is_the_least_certain_of_what_takes_a_tenth_of_the_seconds() -> None:
    """A norm that was never measured is no matter; a dense feed-forward beyond samples is."""
    assert price(op("dense", layer=0)).source == "extrapolated"
    assert price(op("dense", layer=0), unmeasured(MACHINE)).source == "prior"
    slow = replace(tiny_device("cpu"), elements_per_s=1.0)
    assert price(op("dense", layer=0), tiny_machine(cpu=slow)).source == "prior"


def unmeasured(machine: HardwareProfile) -> HardwareProfile:
    return replace(machine, samples=())


@pytest.mark.parametrize(
    ("payload", "layer", "num_bytes", "num_copies"),
    [
        # 24 bytes a token, 4 bytes for each of ceil((9 + 1) / 16) = 1 block of a sequence.
        ("batch", None, 2 * 24 + 2 * 4, 6),
        ("hidden", 0, 2 * HIDDEN, 1),
        ("hidden", None, 2 * HIDDEN, 1),
        ("expert_output", 1, 2 * HIDDEN, 1),
        ("routing", 1, 2 * (HIDDEN + 2 * 12), 3),  # 2 chosen experts of 8 + 4 bytes
        ("logits", None, 2 * LOGITS, 1),
        ("kv", 0, 2 * 16, 2),
    ],
)
def test_a_copy_takes_latencies_and_its_bytes_over_the_links_rate(
    payload: Payload, layer: int | None, num_bytes: int, num_copies: int
) -> None:
    machine = tiny_machine(gpu=tiny_device("emulated"), latency_s=0.25)
    cost = price(copy(payload, layer=layer), machine)

    assert cost.seconds == num_copies * 0.25 + num_bytes / 16
    assert cost.bound == "link"


def test_a_copy_is_handed_over_to_another_lane() -> None:
    """2 * 16 bytes at 16 a second after half a second."""
    handover = Sample(lane="cpu", kernel="handover", backend="torch", seconds=0.5)
    machine = replace(EMULATED, samples=(handover,))

    assert price(copy("hidden", layer=0), machine).seconds == 0.5 + 2 * HIDDEN / 16


def test_a_link_that_was_not_measured_reaches_what_is_assumed_of_its_rate() -> None:
    """The emulated one is throttled to its rate, which it keeps."""
    share = prior("copy", "link", "cuda", "float32").utilisation
    costs = [price(copy("hidden", layer=0), machine) for machine in (MACHINE, EMULATED)]

    assert 0.5 < share < 1.0
    assert [cost.seconds for cost in costs] == pytest.approx([2 / share, 2.0], rel=1e-12)
    assert [cost.least_s for cost in costs] == [2.0, 2.0]
    assert costs[1].sigma_s < costs[0].sigma_s


def test_copies_that_were_measured_are_priced_by_their_samples() -> None:
    """32 bytes took 5 s up, though the link's rate says 2; down nothing was measured."""
    sample = Sample(
        lane="h2d", kernel="copy", backend="torch", shape=(32,), memory="pinned", seconds=5.0
    )
    machine = replace(EMULATED, samples=(*EMULATED.samples, sample))
    up, down = (price(copy("hidden", layer=0, lane=lane), machine) for lane in LINK_LANES)

    assert (up.seconds, up.bound, up.source) == (5.0, "link", "measured")
    assert down.seconds == 2 * HIDDEN / 16


LINK_LANES: tuple[Lane, ...] = ("h2d", "d2h")


@pytest.mark.parametrize(
    ("payload", "num_bytes"),
    # 2 tokens: 2 heads of 4 queries, and keys and values of one head, 2 bytes each
    [("qkv", 2 * (8 + 2 * 4) * 2), ("attended", 2 * 8 * 2)],
)
def test_attention_on_both_devices_sends_queries_keys_and_values_and_their_result(
    payload: Payload, num_bytes: int
) -> None:
    cost = price(copy(payload, layer=0), EMULATED)
    assert cost.seconds == pytest.approx(num_bytes / 16, rel=1e-9)


def test_streamed_weights_travel_whole_however_few_experts_are_used() -> None:
    stream = Op(index=0, kind="copy", lane="h2d", payload="weights", module="experts", layer=1)

    assert copy_bytes(stream, tiny_spec("dm"), DECODE) == 4 * EXPERT


def test_only_the_rows_that_need_logits_travel_to_the_head() -> None:
    """4 tokens between layers, 1 row of them to the head."""
    shape = prefill(num_tokens=4, num_logits=1)

    assert copy_bytes(copy("hidden", layer=0), tiny_spec("d"), shape) == 4 * HIDDEN
    assert copy_bytes(copy("hidden"), tiny_spec("d"), shape) == HIDDEN


def test_each_direction_of_the_link_has_its_own_rate() -> None:
    assert EMULATED.link is not None
    machine = replace(EMULATED, link=replace(EMULATED.link, d2h_bytes_per_s=32.0))
    up, down = (price(copy("hidden", layer=0, lane=lane), machine) for lane in LINK_LANES)

    assert (up.seconds, down.seconds) == (2 * HIDDEN / 16, 2 * HIDDEN / 32)


def test_the_bound_is_the_resource_that_takes_most() -> None:
    assert OpCost(seconds=5.0, by_resource={"compute": 2.0, "memory": 3.0}).bound == "memory"
    assert OpCost().bound == "launch"


def test_a_profile_without_the_models_format_is_refused_by_name() -> None:
    device = replace(tiny_device("cpu"), flop_per_s={"float32": 1.0})
    machine = replace(MACHINE, cpu_by_threads=(device,), samples=())
    with pytest.raises(ProfileError, match=r"profile of tiny cpu has no rates for bfloat16"):
        price(op("dense", layer=0), machine)


def test_lanes_that_share_the_hosts_memory_slow_each_other_down() -> None:
    """The CPU reads 16 bytes a second and copies 48: both at once want 64 of 16."""
    machine = tiny_machine(gpu=tiny_device("gpu"), link_bytes_per_s=48.0)

    assert CostModel(machine).slowdowns == {("cpu", "h2d"): 4.0, ("h2d", "cpu"): 4.0}
    assert CostModel(machine.without_gpu()).slowdowns == {}


def test_slowdowns_that_were_measured_replace_those() -> None:
    """Reads of the CPU beside copies: 3 and 5 times as long in two samples, 1 without effect."""
    alone = Sample(lane="cpu", kernel="read", shape=(16,), seconds=1.0)
    beside = [replace(alone, busy=("h2d",), seconds=seconds) for seconds in (3.0, 5.0)]
    quick = replace(alone, busy=("gpu",), seconds=0.5)
    others = replace(alone, num_threads=4, busy=("h2d",), seconds=90.0)
    machine = replace(MACHINE, samples=(alone, *beside, quick, others))

    assert CostModel(machine).slowdowns == {
        ("cpu", "h2d"): pytest.approx(4.0),
        ("h2d", "cpu"): 2.0,
        ("cpu", "gpu"): 1.0,
    }


def test_the_pricer_gives_every_op_its_own_cost() -> None:
    """What it remembers for one layer is right for every layer that it is used for."""
    spec, costs = tiny_spec("dmmdd"), CostModel(real_machine())
    for shape in (DECODE, prefill(num_tokens=6, num_seqs=2, num_past_tokens=3.5, num_logits=1)):
        pricer = Pricer(spec, costs, shape)
        for name, make in STRATEGIES.items():
            for cut in cuts(name, spec, has_gpu=True):
                for each in build(spec, make(spec, shape.phase, cut)).ops:
                    assert pricer(each) == costs.op_cost(each, spec, shape).seconds


def test_the_pricer_tells_layers_of_other_popularity_apart() -> None:
    """Layer 0 reads 2 experts of two tokens, layer 1 reads 4 * (1 - 0.25) = 3."""
    popularity = Popularity(probabilities=((1.0, 1.0, 0.0, 0.0), (0.5,) * 4))
    costs = CostModel(MACHINE, popularity=popularity)
    pricer = Pricer(tiny_spec("mm"), costs, DECODE)

    assert [pricer(op("experts", layer=layer)) for layer in (0, 1)] == pytest.approx(
        [2 * EXPERT / 16, 3 * EXPERT / 16], rel=1e-12
    )


def test_corrections_multiply_prices_and_replace_their_uncertainty() -> None:
    """Dense work of decode takes 1.5 times as long; prefill and other terms are left alone."""
    known = Correction(factor=1.5, sigma=0.07, is_bounded=False, num_runs=3)
    corrections = Corrections(by_key={("cpu", "dense", "decode"): known}, num_runs=3)
    costs, spec, dense = CostModel(MACHINE), tiny_spec("dm"), op("dense", layer=0)
    corrected = CostModel(MACHINE, corrections=corrections)
    plain, better = Pricer(spec, costs, DECODE), Pricer(spec, corrected, DECODE)

    assert better(dense) == 1.5 * plain(dense)
    assert better.cost(dense) == plain.cost(dense)
    assert better.sigma(dense) == 0.07
    assert plain.sigma(dense) == pytest.approx(plain.cost(dense).sigma_s / plain(dense))
    others = (op("head"), op("router", layer=1), op("dense", layer=0, lane="gpu"))
    assert [better(one) for one in others] == [plain(one) for one in others]
    first = Pricer(spec, corrected, prefill(num_tokens=4))
    assert first(dense) == first.cost(dense).seconds


def test_the_seconds_beside_the_ops_have_a_correction_of_their_own() -> None:
    known = Correction(factor=0.5, sigma=0.1, is_bounded=False, num_runs=1)
    corrections = Corrections(by_key={("host", "host", "decode"): known}, num_runs=1)
    machine = tiny_machine(cpu=tiny_device("cpu", launch_s=1.0))
    pricer = Pricer(tiny_spec("d"), CostModel(machine, corrections=corrections), DECODE)

    assert pricer.host_s == 0.5 * pricer.host_cost.seconds == 105.0


def test_an_op_is_as_uncertain_as_its_kernels_are_together() -> None:
    """All of it beyond one sample: 0.05 and 0.06 for each factor of e, of the seconds it takes.

    The expert of the sample has 8 * 8 weights and one token, this one 8 * 16 and two.
    """
    cost = price(op("dense", layer=0))
    sigma = 0.05 + 0.06 * (math.log(2) + math.log(2))

    assert cost.sigma_s == pytest.approx(sigma * cost.seconds, rel=1e-9)


def test_predict_prices_every_op_of_a_step() -> None:
    """All on the CPU, one op after the other: the makespan is the sum."""
    spec, costs = tiny_spec("dm"), CostModel(real_machine())
    graph = build(spec, STRATEGIES["cpu"](spec, "decode", 0))
    timeline = predict(graph, spec, costs, DECODE)

    expected = sum(costs.op_cost(each, spec, DECODE).seconds for each in graph.ops)
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


def test_a_step_that_ran_says_how_many_sequences_were_the_second_sub_batch() -> None:
    """5 of them; where that is not known, as many as were planned, but not all."""
    op = Op(index=0, kind="attend", lane="cpu", layer=0, sub_batch=1, num_second_seqs=6)
    planned = decode_shape(8, 100)
    ran = dataclasses.replace(planned, num_second_seqs=5)
    assert [sub_batch_shape(op, shape).num_seqs for shape in (planned, ran)] == [6, 5]
    assert sub_batch_shape(op, decode_shape(4, 100)).num_seqs == 3
    first = replace(op, kind="attention", lane="gpu", sub_batch=0)
    assert [sub_batch_shape(first, shape).num_seqs for shape in (planned, ran)] == [2, 3]
