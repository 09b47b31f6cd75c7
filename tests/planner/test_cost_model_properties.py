"""Prices of ops on any machine: more work never takes less, nothing is faster than its roofline."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from planner.cost_model import CostModel, predict
from planner.device import DeviceProfile, Sample
from planner.hardware import HardwareProfile
from planner.kernels import Backend, Kernel, KernelCall
from planner.model_spec import ModelSpec, Module
from planner.popularity import Popularity
from planner.speed_of_light import speed_of_light
from planner.step_graph import Lane, Op, OpKind, build
from planner.strategies import STRATEGIES
from planner.workload import BatchShape, decode_shape
from tests.planner.replay import ROOT, read_model
from tests.planner.sampled import GROUP, devices, factors, grids, sample_of
from tests.planner.tiny import real_machine

PROPERTY = settings(deadline=None, derandomize=True, max_examples=60)
ROUNDING = 1 + 1e-9

MACHINES = sorted(path.stem for path in (ROOT / "profiles" / "machines").glob("*.json"))
MODELS = ("llama-3.1-8b", "qwen3-30b-a3b")
# Heads, hidden size and widths of experts at which there are samples; those of a small model.
HEADS = (4, 2, 64)
MODULES: dict[OpKind, Module] = {
    "attention": "attention",
    "router": "router",
    "experts": "experts",
    "dense": "dense",
    "head": "head",
}
OPS: tuple[tuple[OpKind, int | None], ...] = (
    ("embed", None),
    ("attention", 0),
    ("dense", 0),
    ("router", 1),
    ("dispatch", 1),
    ("experts", 1),
    ("combine", 1),
    ("head", None),
    ("sample", None),
)


@cache
def reference(name: str) -> HardwareProfile:
    """A machine of profiles/machines."""
    return HardwareProfile.load(Path(ROOT / "profiles" / "machines" / f"{name}.json"))


@cache
def small_spec() -> ModelSpec:
    """A dense layer and one of experts, all matrices in whole groups of weights."""
    model = read_model("qwen3-30b-a3b")
    experts = dataclasses.replace(
        model.layers[0], intermediate_size=GROUP, num_experts=8, num_experts_per_token=2
    )
    dense = dataclasses.replace(
        experts, intermediate_size=3 * GROUP, num_experts=0, num_experts_per_token=0
    )
    return dataclasses.replace(
        model,
        name="small",
        hidden_size=2 * GROUP,
        num_heads=HEADS[0],
        num_kv_heads=HEADS[1],
        head_dim=HEADS[2],
        vocab_size=8 * GROUP,
        layers=(dense, experts),
    )


def spec_of(model: str) -> ModelSpec:
    """A model with a dense layer first and one of experts after it, of its own shapes."""
    spec = read_model(model)
    kinds = {layer.is_moe: layer for layer in spec.layers}
    dense = kinds.get(False) or dataclasses.replace(
        spec.layers[0], num_experts=0, num_experts_per_token=0
    )
    experts = kinds.get(True) or dataclasses.replace(
        spec.layers[0], num_experts=8, num_experts_per_token=2
    )
    return dataclasses.replace(spec, layers=(dense, experts))


@st.composite
def samples_of(
    draw: st.DrawFn, device: DeviceProfile, lane: Lane, backend: Backend
) -> list[Sample]:
    """Products, experts and attention, each at all crossings of a few rows and sizes."""
    calls: dict[Kernel, list[list[KernelCall]]] = {"linear": [], "experts": []}
    rows, sizes = draw(grids(512)), draw(grids(32))
    for size in sizes:
        linear = KernelCall(
            kernel="linear", shape=(GROUP, GROUP * size), format="bfloat16", backend=backend
        )
        experts = dataclasses.replace(linear, kernel="experts", shape=(4, GROUP, GROUP * size))
        for each in (linear, experts):
            calls[each.kernel].append([dataclasses.replace(each, num_tokens=n) for n in rows])
    attention = KernelCall(
        kernel="decode_attention", shape=HEADS, format="bfloat16", backend=backend
    )
    contexts = draw(grids(4096))
    calls["decode_attention"] = [
        [dataclasses.replace(attention, num_seqs=n, context=size) for n in rows]
        for size in contexts
    ]
    found: list[Sample] = []
    for by_size in calls.values():
        below = [0.0] * len(rows)
        for by_rows in by_size:
            for place, call in enumerate(by_rows):
                least_s = max(
                    speed_of_light(call, device).seconds,
                    below[place],
                    below[place - 1] if place else 0.0,
                )
                below[place] = least_s * draw(factors)
                found.append(sample_of(call, below[place], lane, backend))
    return found


@st.composite
def machines(draw: st.DrawFn) -> HardwareProfile:
    """A machine with an accelerator, nothing of it measured, or its products and attention."""
    cpu, gpu = draw(devices("cpu")), draw(devices("cuda"))
    plain = real_machine()
    samples: list[Sample] = []
    if draw(st.booleans()):
        samples += draw(samples_of(cpu, "cpu", "numba"))
        samples += draw(samples_of(gpu, "gpu", "torch"))
    return replace(plain, cpu_by_threads=(cpu,), gpu=gpu, samples=tuple(samples))


ops = st.builds(
    lambda what, lane: Op(
        index=0, kind=what[0], lane=lane, layer=what[1], module=MODULES.get(what[0])
    ),
    st.sampled_from(OPS),
    st.sampled_from(("cpu", "gpu")),
)


def prompt(num_tokens: int, num_past_tokens: int = 0, num_seqs: int = 1) -> BatchShape:
    return BatchShape(
        phase="prefill",
        num_tokens=num_tokens,
        num_seqs=num_seqs,
        num_past_tokens=num_past_tokens,
        num_logits=num_seqs,
    )


def check_monotone(machine: HardwareProfile, spec: ModelSpec, op: Op, data: st.DataObject) -> None:
    """Tokens of a prompt, sequences of a decode step, and the context of both."""
    costs = CostModel(machine)
    few, many = sorted(data.draw(st.tuples(st.integers(1, 4096), st.integers(1, 4096))))
    short, long = sorted(data.draw(st.tuples(st.integers(1, 9999), st.integers(1, 9999))))
    for less, more in (
        (prompt(few, short), prompt(many, short)),
        (prompt(few, short), prompt(few, long)),
        (decode_shape(few, short), decode_shape(many, short)),
        (decode_shape(few, short), decode_shape(few, long)),
    ):
        before, after = (costs.op_cost(op, spec, shape) for shape in (less, more))
        assert before.seconds <= after.seconds * ROUNDING, (less, more)
        for cost in (before, after):
            assert cost.least_s <= cost.seconds * ROUNDING
            assert sum(cost.by_resource.values()) == pytest.approx(cost.seconds, rel=1e-9)


@PROPERTY
@given(machines(), ops, st.data())
def test_more_tokens_or_context_never_take_less(
    machine: HardwareProfile, op: Op, data: st.DataObject
) -> None:
    """On machines of any proportions, measured or not."""
    check_monotone(machine, small_spec(), op, data)


@PROPERTY
@given(st.sampled_from(MACHINES), st.sampled_from(MODELS), ops, st.data())
def test_more_tokens_or_context_never_take_less_on_reference_machines(
    name: str, model: str, op: Op, data: st.DataObject
) -> None:
    machine = reference(name)
    if machine.gpu is None:
        op = replace(op, lane="cpu")
    check_monotone(machine, spec_of(model), op, data)


def roofline_s(spec: ModelSpec, op: Op, shape: BatchShape, device: DeviceProfile) -> float:
    """Weights and cache that must be read, or products that must be done, whichever takes longer.

    From the model alone: norms and scales left out, every expert that a token chooses read once.
    """
    rows = shape.num_logits if op.kind == "head" else shape.num_tokens
    if op.module is None or rows == 0:
        return 0.0
    num_weights = float(spec.num_params(op.module, op.layer) - spec.hidden_size)
    num_products = 2 * rows * num_weights
    cache_bytes = 0.0
    if op.kind == "attention":
        num_weights -= 2 * spec.head_dim  # norms of queries and keys
        num_products = 2 * rows * num_weights
        if shape.phase == "decode":
            context = shape.num_past_tokens + 1
            cache_bytes = shape.num_seqs * context * 2 * spec.kv_size * spec.dtype_bytes
    if op.kind == "experts":
        assert op.layer is not None
        layer = spec.layers[op.layer]
        expert = 3 * spec.hidden_size * layer.intermediate_size
        num_weights = float(expert * layer.num_experts_per_token)
        num_products = 2 * rows * num_weights
    read_s = (num_weights * spec.dtype_bytes + cache_bytes) / device.read_bytes_per_s
    return max(read_s, num_products / device.flop_per_s[spec.dtype])


@PROPERTY
@given(
    st.none() | st.sampled_from(MACHINES),
    machines(),
    ops,
    st.integers(1, 4096),
    st.integers(0, 9999),
    st.booleans(),
)
def test_no_op_is_faster_than_its_roofline(
    name: str | None, random: HardwareProfile, op: Op, num: int, past: int, is_decode: bool
) -> None:
    machine = random if name is None else reference(name)
    spec = small_spec() if name is None else spec_of("qwen3-30b-a3b")
    if machine.gpu is None:
        op = replace(op, lane="cpu")
    device = machine.gpu if op.lane == "gpu" else machine.cpu
    assert device is not None
    shape = decode_shape(num, past) if is_decode else prompt(num, past)
    cost = CostModel(machine).op_cost(op, spec, shape)

    assert cost.seconds * ROUNDING >= roofline_s(spec, op, shape, device)


@PROPERTY
@given(
    st.sampled_from(MACHINES),
    st.sampled_from(MODELS),
    st.sampled_from(sorted(STRATEGIES)),
    st.floats(1.0, 20.0),
    st.integers(1, 64),
    st.integers(1, 4096),
)
def test_more_bandwidth_never_makes_a_step_longer(
    name: str, model: str, strategy: str, factor: float, num: int, past: int
) -> None:
    """Of either memory, on machines that were not measured: of each op, and of a whole step."""
    machine, spec = reference(name), spec_of(model)
    if machine.gpu is None:
        strategy = "cpu"
    graph = build(spec, STRATEGIES[strategy](spec, "decode", 1))
    before_s = {op.index: price(machine, spec, op, num, past) for op in graph.ops}
    step_s = predict(graph, spec, CostModel(machine), decode_shape(num, past)).makespan_s
    for wider in with_wider_memory(machine, factor):
        for op in graph.ops:
            assert price(wider, spec, op, num, past) <= before_s[op.index] * ROUNDING
        found = predict(graph, spec, CostModel(wider), decode_shape(num, past))
        assert found.makespan_s <= step_s * ROUNDING


def price(machine: HardwareProfile, spec: ModelSpec, op: Op, num: int, past: int) -> float:
    return CostModel(machine).op_cost(op, spec, decode_shape(num, past)).seconds


def with_wider_memory(machine: HardwareProfile, factor: float) -> list[HardwareProfile]:
    """The CPU's memory faster, and the GPU's."""

    def wider(device: DeviceProfile) -> DeviceProfile:
        return replace(device, read_bytes_per_s=factor * device.read_bytes_per_s)

    found = [replace(machine, cpu_by_threads=tuple(wider(cpu) for cpu in machine.cpu_by_threads))]
    if machine.gpu is not None:
        found.append(replace(machine, gpu=wider(machine.gpu)))
    return found


layers_of_experts = st.integers(1, 256).flatmap(
    lambda num: st.tuples(st.just(num), st.integers(1, num))
)


@PROPERTY
@given(layers_of_experts, st.integers(1, 4000), st.integers(1, 4000))
def test_distinct_experts_of_even_and_usual_choices_are_between_k_and_all(
    layer: tuple[int, int], some: int, more: int
) -> None:
    """And rise with the tokens; one token chooses k."""
    num_experts, chosen = layer
    few, many = sorted((some, more))
    for found in (Popularity.even(num_experts, chosen), Popularity.usual(num_experts, chosen)):
        less, most = (found.distinct_experts(0, num_tokens) for num_tokens in (few, many))

        assert chosen <= less * ROUNDING and most <= num_experts * ROUNDING
        assert less <= most * ROUNDING
        assert found.distinct_experts(0, 1) == pytest.approx(chosen)


@st.composite
def popularities(draw: st.DrawFn) -> tuple[Popularity, int]:
    """How often tokens that choose k different experts each chose which; and k."""
    num_experts = draw(st.integers(1, 12))
    chosen = draw(st.integers(1, num_experts))
    choice = st.lists(
        st.integers(0, num_experts - 1), min_size=chosen, max_size=chosen, unique=True
    )
    tokens = draw(st.lists(choice, min_size=1, max_size=12))
    counts = [sum(expert in token for token in tokens) for expert in range(num_experts)]
    return Popularity.from_counts([counts], len(tokens)), chosen


@PROPERTY
@given(popularities(), st.integers(1, 4000), st.integers(1, 4000))
def test_distinct_experts_by_popularity_are_between_k_and_all(
    popularity: tuple[Popularity, int], some: int, more: int
) -> None:
    """And rise with the tokens; never more than by even choices, which spread the most."""
    found, chosen = popularity
    num_experts = len(found.probabilities[0])
    few, many = sorted((some, more))
    less, most = (found.distinct_experts(0, num_tokens) for num_tokens in (few, many))

    assert chosen <= less * ROUNDING and most <= num_experts * ROUNDING
    assert less <= most * ROUNDING
    assert found.distinct_experts(0, 1) == pytest.approx(chosen)
    even = num_experts * (1 - (1 - chosen / num_experts) ** few)
    assert less <= even * ROUNDING


@PROPERTY
@given(popularities(), st.integers(1, 64), st.booleans())
def test_experts_that_a_popularity_names_are_priced_as_many_as_it_expects(
    popularity: tuple[Popularity, int], num_seqs: int, is_gpu: bool
) -> None:
    """Never more seconds than by even choices, of which there are as many."""
    found, chosen = popularity
    layer = dataclasses.replace(
        small_spec().layers[1],
        num_experts=len(found.probabilities[0]),
        num_experts_per_token=chosen,
    )
    spec = dataclasses.replace(small_spec(), layers=(layer,))
    lane: Lane = "gpu" if is_gpu else "cpu"
    op = Op(index=0, kind="experts", lane=lane, layer=0, module="experts")
    shape, machine = decode_shape(num_seqs, 9), reference("desktop-rtx4090")
    alike = Popularity.even(len(found.probabilities[0]), chosen)
    even = CostModel(machine, popularity=alike).op_cost(op, spec, shape)
    skewed = CostModel(machine, popularity=found).op_cost(op, spec, shape)

    assert skewed.seconds <= even.seconds * ROUNDING
