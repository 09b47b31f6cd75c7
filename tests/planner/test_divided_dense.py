"""A dense feed-forward divided by its columns: ops, prices, bytes, and HeteGen's balance."""

from __future__ import annotations

import dataclasses

import msgspec
import pytest
from msgspec.structs import replace

from planner import search, strategies
from planner.candidate import Wave
from planner.cost_model import CostModel, Pricer, copy_bytes
from planner.hardware import HardwareProfile
from planner.layer_menu import Menu, layer_placements
from planner.memory import staging_bytes, weight_bytes
from planner.model_spec import DENSE_SHARES, LayerSpec, ModelSpec
from planner.placement import (
    ON_CPU,
    ON_GPU,
    LayerPlacement,
    ModulePlacement,
    Placement,
    Runs,
    TierPlacement,
    check_matches,
)
from planner.plan import Plan
from planner.search_space import Space
from planner.step_graph import Op, StepGraph, build
from planner.tensor_split import DenseModule
from planner.workload import Phase, Workload, decode_shape
from tests.planner.tiny import DENSE, tiny_device, tiny_machine, tiny_spec

NORM = 16  # bytes of the tiny model's
COLUMN = 48  # 3 rows or columns of 8 in bfloat16: one of the 16 columns, which are a share each


def divided(spec: ModelSpec, runs: Runs, num_resident: int) -> Placement:
    where = ModulePlacement(lives="cpu", runs=runs, num_resident=num_resident)

    def tier(phase: Phase) -> TierPlacement:
        gpu = strategies.gpu(spec, phase)
        return replace(gpu, layers=tuple(replace(each, ffn=where) for each in gpu.layers))

    return Placement(prefill=tier("prefill"), decode=tier("decode"))


def graph_of(runs: Runs) -> StepGraph:
    spec = tiny_spec("d")
    return build(spec, divided(spec, runs, 12).decode)


def test_the_cpus_columns_run_beside_the_residents() -> None:
    """What the CPU waits for goes first; the sum waits for both."""
    graph = graph_of("cpu")
    ops = [(op.payload or op.kind, op.lane, op.part) for op in graph.ops if op.layer == 0]
    assert ops == [
        ("attention", "gpu", "all"),
        ("dense_input", "d2h", "all"),
        ("dense", "gpu", "resident"),
        ("dense", "cpu", "missed"),
        ("dense_output", "h2d", "all"),
        ("combine", "gpu", "all"),
    ]
    attention, there, resident, missed, back, combine = (op for op in graph.ops if op.layer == 0)
    assert there.deps == resident.deps == (attention.index,)
    assert missed.deps == (there.index,)
    assert combine.deps == (resident.index, back.index)
    assert len({op.name for op in graph.ops}) == len(graph.ops)


def test_streamed_columns_wait_for_their_copy_only() -> None:
    graph = graph_of("stream")
    (copy,) = (op for op in graph.ops if op.payload == "weights")
    resident, missed = (op for op in graph.ops if op.kind == "dense")
    assert (copy.part, copy.num_resident, copy.buffer) == ("missed", 12, missed.buffer)
    assert copy.index in missed.deps
    assert copy.index not in resident.deps
    assert {op.lane for op in (resident, missed)} == {"gpu"}


@pytest.mark.parametrize("num_resident", [1, 5, 15])
def test_a_part_costs_what_a_narrower_feed_forward_does(num_resident: int) -> None:
    """On a machine that is bound by its memory: the bytes of its columns."""
    spec, costs = tiny_spec("d"), CostModel(tiny_machine(gpu=tiny_device("gpu")))
    price = Pricer(spec, costs, decode_shape(1, 10))
    whole = Op(index=0, kind="dense", lane="gpu", layer=0, module="dense")
    for lane in ("gpu", "cpu"):
        shared = {"lane": lane, "num_resident": num_resident}
        resident = price(replace(whole, part="resident", **shared))
        missed = price(replace(whole, part="missed", **shared))
        beside_s = price(replace(whole, lane=lane)) - 16 * COLUMN / 16.0  # norm and residual
        assert resident - num_resident * COLUMN / 16.0 == pytest.approx(beside_s, rel=0.5)
        assert missed - resident == pytest.approx((16 - 2 * num_resident) * COLUMN / 16.0)
    copy = Op(index=0, kind="copy", lane="h2d", layer=0, module="dense", payload="weights")
    copy = replace(copy, part="missed", num_resident=num_resident)
    assert copy_bytes(copy, spec, price.shape) == (16 - num_resident) * COLUMN + NORM
    for payload in ("dense_input", "dense_output"):
        assert copy_bytes(replace(copy, payload=payload), spec, price.shape) == 16  # 8 in bfloat16


@pytest.mark.parametrize("num_resident", [1, 5, 15])
@pytest.mark.parametrize("runs", ["cpu", "stream"])
def test_each_part_lies_where_it_is_wanted(runs: Runs, num_resident: int) -> None:
    """With a norm of its own; two buffers take what is streamed."""
    spec = tiny_spec("dd")
    placement, gpu = divided(spec, runs, num_resident), strategies.placement(spec, "gpu", 0)
    others = weight_bytes(spec, gpu, "gpu") - 2 * DENSE
    on_gpu, on_cpu = (weight_bytes(spec, placement, device) for device in ("gpu", "cpu"))
    assert on_gpu == others + 2 * (num_resident * COLUMN + NORM)
    assert on_cpu == 2 * ((16 - num_resident) * COLUMN + NORM)
    missed = (16 - num_resident) * COLUMN + NORM
    assert staging_bytes(spec, placement.decode) == (2 * missed if runs == "stream" else 0)


def test_groups_of_quantised_weights_stay_whole() -> None:
    """1000 columns are 62 to a share: 256 are the last whole groups before the fifth."""
    layer = LayerSpec(intermediate_size=1000)
    spec = dataclasses.replace(tiny_spec("d"), layers=(layer,), quantization="int4")
    assert [spec.dense_columns(0, count) for count in (1, 2, 3, 5, 16)] == [0, 0, 128, 256, 1000]
    assert [spec.can_divide(0, count) for count in (2, 3, 15, 16)] == [False, True, True, False]


def test_panels_of_the_cpus_kernels_stay_whole() -> None:
    """29568 columns are 1848 to a share, which are 57 panels of 32 and a part of one."""
    layer = LayerSpec(intermediate_size=29568)
    spec = dataclasses.replace(tiny_spec("d"), layers=(layer,))
    columns = [spec.dense_columns(0, count) for count in range(1, 17)]
    assert columns[0] == 1824 and columns[-1] == 29568
    assert all(count % 32 == 0 for count in columns)


@pytest.mark.parametrize(
    ("spec", "num_resident"),
    [
        (tiny_spec("d"), 16),
        (tiny_spec("d"), 99),
        (dataclasses.replace(tiny_spec("d"), has_mlp_bias=True), 4),
        (dataclasses.replace(tiny_spec("d"), layers=(LayerSpec(intermediate_size=3),)), 4),
    ],
    ids=["all", "more than all", "biases", "no column"],
)
def test_what_cannot_be_divided_so_is_refused_with_its_path(
    spec: ModelSpec, num_resident: int
) -> None:
    why_not = check_matches(divided(spec, "cpu", num_resident), spec)
    assert why_not is not None
    assert why_not.endswith("`$.placement.prefill.layers[0].ffn.num_resident`")
    assert f"after {num_resident} of 16 shares" in why_not
    assert why_not.partition(" - at ")[0].endswith(" possible")


def test_all_tiers_divide_alike() -> None:
    spec = tiny_spec("d")
    placement = replace(divided(spec, "cpu", 4), decode=divided(spec, "cpu", 5).decode)
    assert "divided in more than one way" in str(check_matches(placement, spec))
    placement = replace(placement, decode=strategies.gpu(spec, "decode"))
    assert "divided in more than one way" in str(check_matches(placement, spec))
    assert check_matches(divided(spec, "stream", 15), spec) is None


def test_a_feed_forward_never_runs_split() -> None:
    where = ModulePlacement(lives="cpu", runs="split")
    with pytest.raises(ValueError, match="only experts can run split"):
        LayerPlacement(attention=ON_GPU, ffn=where)
    with pytest.raises(msgspec.ValidationError, match="only experts can run split"):
        msgspec.json.decode(
            '{"attention":{"lives":"gpu","runs":"gpu"},"ffn":{"lives":"cpu","runs":"split"}}',
            type=LayerPlacement,
        )


def decode_chains_s(menu: Menu) -> dict[int, float]:
    """By resident shares, the longest path of a decode layer whose attention is on the GPU."""
    found = {}
    for column in range(len(menu.states)):
        _, where = layer_placements(menu, column)
        if where.attention == ON_GPU and not where.kv_on_cpu and where.ffn.runs in ("cpu", "gpu"):
            if where.ffn == ON_CPU:
                continue
            count = DENSE_SHARES if where.ffn == ON_GPU else where.ffn.num_resident
            found[count] = float(menu.loads_s[0, 1, column])
    return found


@pytest.mark.parametrize("cpu_rate", [1.0, 4.0, 16.0])
def test_the_fastest_division_is_hetegens_balance(cpu_rate: float) -> None:
    """Where weights need not be copied: both sides end together, within one share."""
    machine = tiny_machine(
        cpu=tiny_device("cpu", memory_bytes=10**9, read_bytes_per_s=cpu_rate),
        gpu=tiny_device("gpu", memory_bytes=10**9),
        link_bytes_per_s=1e6,
    )
    spec = dataclasses.replace(tiny_spec("d"), layers=(LayerSpec(intermediate_size=1600),))
    wave = Wave(spec, CostModel(machine), Workload(prompt_len=16, output_len=64), 1)
    chains_s = decode_chains_s(Space(wave, 256).menus[0])
    assert set(chains_s) == set(range(1, DENSE_SHARES + 1))
    price = Pricer(spec, wave.costs, decode_shape(1, 48))
    whole = Op(index=0, kind="dense", lane="gpu", layer=0, module="dense")
    share = DenseModule(
        num_bytes=spec.weight_bytes("dense", 0),
        cpu_s=price(replace(whole, lane="cpu")),
        copy_s=0.0,
        gpu_s=price(whole),
    ).gpu_share
    best = min(chains_s, key=chains_s.__getitem__)
    assert abs(best / DENSE_SHARES - share) <= 1 / DENSE_SHARES


def test_the_search_divides_what_does_not_fit() -> None:
    """Three of four feed-forwards would fit whole: the lanes work at once instead of in turn."""
    spec = dataclasses.replace(tiny_spec("d"), layers=(LayerSpec(intermediate_size=160),) * 4)
    workload = Workload(prompt_len=4, output_len=64)

    def machine(gpu_bytes: int) -> HardwareProfile:
        return tiny_machine(
            cpu=tiny_device("cpu", memory_bytes=10**9, read_bytes_per_s=8.0),
            gpu=tiny_device("gpu", memory_bytes=gpu_bytes),
            link_bytes_per_s=64.0,
        )

    def where(plan: Plan) -> set[int]:
        return {layer.ffn.num_resident for layer in plan.placement.decode.layers}

    needed = search(spec, machine(10**9), workload, strategy="gpu").estimate.bytes_by_device["gpu"]
    tight = machine(int((needed - spec.weight_bytes("dense", 0)) / 0.95))
    plan = search(spec, tight, workload, prefers_simple=False)
    assert plan.feasible and where(plan) - {0}
    named = [each.e2e_s for each in plan.alternatives if each.feasible and each.e2e_s]
    assert plan.estimate.e2e_s < 0.9 * min(named)
