"""Caches divided between the devices: what is refused, blocks and bytes, ops and their prices."""

from __future__ import annotations

import dataclasses
from collections import Counter

import msgspec
import pytest
from msgspec.structs import replace

from planner import strategies
from planner.cost_model import CostModel, Pricer, copy_bytes
from planner.estimate import WavePricer
from planner.kv_blocks import (
    BlockSpan,
    KVBlocks,
    bytes_per_block,
    kv_blocks,
    kv_bytes,
    prompt_span,
)
from planner.memory import activation_bytes, kv_block_capacity, needs
from planner.model_spec import LayerSpec, ModelSpec
from planner.placement import ON_CPU, ON_GPU, LayerPlacement, Placement, TierPlacement
from planner.simulate import makespan_s
from planner.step_graph import Lane, Op, Part, build, build_kv_move
from planner.tier_graphs import TierGraphs
from planner.workload import BatchShape, Workload, decode_shape
from tests.planner.tiny import KV_PER_TOKEN, tiny_device, tiny_machine, tiny_spec

SPEC = tiny_spec("dd")
MACHINE = tiny_machine(gpu=tiny_device("gpu"))


def divided(spec: ModelSpec, num_tokens: int, **changes: int) -> TierPlacement:
    """A decode tier on the GPU, all caches on the CPU but for their first tokens."""
    gpu = strategies.gpu(spec, "decode")
    layers = tuple(
        replace(layer, kv_on_cpu=True, num_gpu_kv_tokens=num_tokens) for layer in gpu.layers
    )
    return replace(gpu, strategy="mixed", layers=layers, **changes)


def placement(spec: ModelSpec, num_tokens: int, prefill: str = "gpu") -> Placement:
    tier = {"gpu": strategies.gpu, "cpu": strategies.cpu}[prefill](spec, "prefill")
    return Placement(prefill=replace(tier, max_num_tokens=32), decode=divided(spec, num_tokens))


def test_only_a_cache_beside_projections_on_the_gpu_is_divided() -> None:
    for attention in (ON_CPU, ON_GPU):
        with pytest.raises(ValueError, match=r"num_gpu_kv_tokens is 16.*set kv_on_cpu, or leave"):
            LayerPlacement(attention=attention, ffn=ON_GPU, num_gpu_kv_tokens=16)


def test_a_cache_is_divided_after_whole_blocks() -> None:
    """In a file too, by the path of the layer; what is left out is none and not written."""
    with pytest.raises(ValueError, match=r"num_gpu_kv_tokens is 40.*16 tokens: 32 or 48"):
        LayerPlacement(attention=ON_GPU, ffn=ON_GPU, kv_on_cpu=True, num_gpu_kv_tokens=40)
    document = msgspec.to_builtins(placement(SPEC, 32))
    assert msgspec.convert(document, Placement) == placement(SPEC, 32)
    for value, message in ((40, "32 or 48"), (-16, ">= 0"), (True, "bool")):
        document["decode"]["layers"][1]["num_gpu_kv_tokens"] = value
        with pytest.raises(msgspec.ValidationError, match=message) as error:
            msgspec.json.decode(msgspec.json.encode(document), type=Placement)
        assert "$.decode.layers[1]" in str(error.value)
    whole = msgspec.to_builtins(strategies.placement(SPEC, "gpu", 0))
    assert "num_gpu_kv_tokens" not in str(whole)


def test_caches_of_a_tier_are_divided_alike_and_in_one_sub_batch() -> None:
    tier = divided(SPEC, 32)
    first = replace(tier.layers[0], num_gpu_kv_tokens=16)
    with pytest.raises(ValueError, match="num_gpu_kv_tokens is 16 in one layer and 32 in another"):
        replace(tier, layers=(first, tier.layers[1]))
    with pytest.raises(ValueError, match="num_second_seqs is 2 and num_gpu_kv_tokens 32: either"):
        replace(tier, num_second_seqs=2)
    whole = replace(tier.layers[0], num_gpu_kv_tokens=0)
    assert replace(tier, layers=(whole, tier.layers[1])).num_gpu_kv_tokens == 32


def test_a_tier_for_smaller_steps_divides_as_the_phases_own_does() -> None:
    whole = placement(SPEC, 32)
    for other in (divided(SPEC, 16, max_num_tokens=1), divided(SPEC, 0, max_num_tokens=1)):
        with pytest.raises(ValueError, match="keeps other caches than the decode tier"):
            replace(whole, smaller=(other,))
    replace(whole, smaller=(divided(SPEC, 32, max_num_tokens=1),))


def test_a_span_counts_the_blocks_in_it() -> None:
    """Of sequences that end before it, in it and behind it; and how long one with so many is."""
    whole, behind, front = BlockSpan(), BlockSpan(start=2), BlockSpan(stop=2)
    assert [whole.count(each) for each in (0, 1, 5)] == [0, 1, 5]
    assert [behind.count(each) for each in (1, 2, 5)] == [0, 0, 3]
    assert [front.count(each) for each in (1, 2, 5)] == [1, 2, 2]
    assert [span.most(3) for span in (whole, behind, front)] == [3, 5, None]
    assert front.most(1) == 1


def test_pages_of_prompts_hold_what_is_decoded_elsewhere() -> None:
    """20 + 33 tokens are 4 blocks, a prompt has 2; 3 prompts are in a step of 32 tokens.

    Computed on the GPU the blocks behind the front leave it: 1 of each prompt, and 3 of a sequence
    that begins again. Computed on the CPU fronts do: 1 of each.
    """
    four = Workload(prompt_len=20, output_len=33, num_seqs=4)
    assert prompt_span(strategies.placement(SPEC, "gpu", 0)) is None
    found = placement(SPEC, 16)
    assert prompt_span(found) == BlockSpan(start=1)
    assert kv_blocks(found, four) == KVBlocks(first=12, prompts=3, fronts=4)
    # of each layer
    block = 2 * 16 * KV_PER_TOKEN
    assert kv_bytes(SPEC, found, four, "gpu") == (4 + 3) * block
    assert kv_bytes(SPEC, found, four, "cpu") == 12 * block
    # one more behind a front, and for its prompt
    assert [bytes_per_block(SPEC, found, each) for each in ("gpu", "cpu")] == [block, block]

    found = placement(SPEC, 16, "cpu")
    assert prompt_span(found) == BlockSpan(stop=1)
    assert kv_blocks(found, four) == KVBlocks(first=12, prompts=3, fronts=4)
    assert kv_bytes(SPEC, found, four, "gpu") == 4 * block
    assert kv_bytes(SPEC, found, four, "cpu") == (12 + 3) * block
    assert [bytes_per_block(SPEC, found, each) for each in ("gpu", "cpu")] == [0, block]


def test_fronts_longer_than_all_sequences_hold_them() -> None:
    """And one whole front at least, for a sequence that is longer than planned."""
    four = Workload(prompt_len=20, output_len=33, num_seqs=4)
    assert kv_blocks(placement(SPEC, 64), four) == KVBlocks(first=0, prompts=0, fronts=16)
    assert kv_blocks(placement(SPEC, 320), four) == KVBlocks(first=0, prompts=0, fronts=20)
    capacity = kv_block_capacity(SPEC, placement(SPEC, 64), four, MACHINE)
    assert capacity.fronts == 16
    assert capacity.first == capacity.prompts > 0


def test_the_gpu_gathers_fronts_only() -> None:
    """2 sequences of 32 tokens: keys of 8 bytes each and 16 in float32, 2 * 2 heads' scores."""
    two = Workload(prompt_len=500, output_len=13, num_seqs=2)
    whole, front = divided(SPEC, 0), divided(SPEC, 32)
    more = activation_bytes(SPEC, front, two, "gpu") - activation_bytes(SPEC, whole, two, "gpu")
    assert more == 2 * 32 * (8 + 16 + 2 * 2 * 4)
    assert activation_bytes(SPEC, front, two, "cpu") == activation_bytes(SPEC, whole, two, "cpu")


def test_more_on_the_gpu_is_less_on_the_cpu() -> None:
    wave = Workload(prompt_len=100, output_len=60, num_seqs=3)
    found = [needs(SPEC, placement(SPEC, 16 * n), wave, MACHINE) for n in range(1, 11)]
    for device, rises in (("gpu", True), ("cpu", False)):
        sizes = [need[device].kv_bytes for need in found]  # type: ignore[index]
        assert sizes == sorted(sizes, reverse=not rises)
    assert found[-1]["cpu"].kv_bytes == 0


def test_both_parts_run_beside_each_other_and_are_merged_before_the_output() -> None:
    spec = tiny_spec("dm")
    graph = build(spec, divided(spec, 32))
    assert max(Counter(op.name for op in graph.ops).values()) == 1
    names = {op.name: op for op in graph.ops}
    for layer in range(2):
        chain = ("qkv[{}]", "copy qkv[{}] d2h", "attend rest[{}]", "copy attended rest[{}] h2d")
        first, down, rest, up = (names[each.format(layer)] for each in chain)
        front, last = names[f"attend resident[{layer}]"], names[f"attention_output[{layer}]"]
        assert [op.lane for op in (first, down, rest, up, front, last)] == [
            *("gpu", "d2h", "cpu", "h2d", "gpu", "gpu")
        ]
        assert (down.deps, rest.deps, up.deps) == ((first.index,), (down.index,), (rest.index,))
        assert front.deps == (first.index,)
        assert set(last.deps) == {first.index, up.index, front.index}
        assert all(op.num_gpu_kv_tokens == 32 for op in (rest, up, front, last))
        assert front.term == rest.term == last.term == "attention"


def test_layers_that_are_not_divided_run_as_they_did() -> None:
    tier, whole = divided(SPEC, 32), divided(SPEC, 0)
    mixed = build(SPEC, replace(tier, layers=(whole.layers[0], tier.layers[1])))
    of_first = [op.name for op in mixed.ops if op.layer == 0]
    assert of_first == [op.name for op in build(SPEC, whole).ops if op.layer == 0]


def prompt_shape(num_tokens: int) -> BatchShape:
    return BatchShape(
        phase="prefill", num_tokens=num_tokens, num_seqs=1, num_past_tokens=0, num_logits=1
    )


@pytest.mark.parametrize(
    ("prefill", "lane", "num_tokens"), [("gpu", "d2h", 50 - 32), ("cpu", "h2d", 32)]
)
def test_the_part_that_is_decoded_elsewhere_moves(
    prefill: str, lane: Lane, num_tokens: int
) -> None:
    found = placement(SPEC, 32, prefill)
    moves = build_kv_move(found.prefill, found.decode).ops
    assert [(op.lane, op.layer) for op in moves] == [(lane, 0), (lane, 1)]
    assert copy_bytes(moves[0], SPEC, prompt_shape(50)) == num_tokens * KV_PER_TOKEN
    short = 0 if lane == "d2h" else 20
    assert copy_bytes(moves[0], SPEC, prompt_shape(20)) == short * KV_PER_TOKEN


def test_a_result_travels_with_its_log_sum_exp() -> None:
    """3 tokens: 2 heads of 4 values of 2 bytes, and 4 bytes for each head."""
    up = next(op for op in build(SPEC, divided(SPEC, 32)).ops if op.payload == "attended")
    assert copy_bytes(up, SPEC, decode_shape(3, 40)) == 3 * (8 * 2 + 2 * 4)


PARTS: tuple[tuple[Part, Lane], ...] = (("resident", "gpu"), ("rest", "cpu"))


@pytest.mark.parametrize("window", [None, 8, 40])
@pytest.mark.parametrize("past", [3.0, 31.0, 32.0, 59.5])
def test_each_device_reads_the_tokens_that_it_has(past: float, window: int | None) -> None:
    """2 sequences, 16 bytes a token, 16 bytes a second: divided after 32, what queries see."""
    layer = LayerSpec(intermediate_size=16, window=window)
    spec = dataclasses.replace(SPEC, layers=(layer, layer))
    context = past + 1
    seen = context if window is None else min(context, window)
    rest = min(seen, max(0.0, context - 32))
    expected = {"cpu": rest, "gpu": seen - rest}
    for part, lane in PARTS:
        op = Op(index=0, kind="attend", lane=lane, layer=0, part=part, num_gpu_kv_tokens=32)
        cost = CostModel(MACHINE).op_cost(op, spec, decode_shape(2, past))
        memory_s = cost.by_resource.get("memory", 0.0)
        assert memory_s == pytest.approx(2 * expected[lane], rel=1e-6)


@pytest.mark.parametrize("num_tokens", [16, 32, 48, 64])
def test_a_decode_step_is_priced_over_all_contexts(num_tokens: int) -> None:
    """The mean of the steps from 20 to 51 past tokens, of fronts before, among and behind these.

    But for block tables, which grow by whole blocks, and a step in which the lanes change places.
    """
    wave = Workload(prompt_len=20, output_len=33, num_seqs=2)
    machine = tiny_machine(gpu=tiny_device("emulated", read_bytes_per_s=1e6), link_bytes_per_s=1e6)
    costs, found = CostModel(machine), placement(SPEC, num_tokens)
    pricer, graph = WavePricer(SPEC, costs, wave, 32), build(SPEC, found.decode)
    steps = []
    for past in range(20, 52):
        price = Pricer(SPEC, costs, decode_shape(2, past), pricer.backends)
        steps.append(makespan_s(graph, price, costs.slowdowns) + price.host_s)
    actual = pricer.decode_step_s(TierGraphs(SPEC, found))
    assert actual == pytest.approx(sum(steps) / len(steps), rel=1e-3)
    terms = pricer.decode_terms(TierGraphs(SPEC, found)).terms
    assert sum(terms.values()) == pytest.approx(actual, rel=1e-6)
