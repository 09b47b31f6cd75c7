"""StepGraph: order, copies and staging buffers of every strategy and cut."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

import pytest
from msgspec.structs import replace as msgspec_replace

from planner import strategies
from planner.model_spec import ModelSpec
from planner.placement import (
    NUM_STREAM_BUFFERS,
    ON_CPU,
    ON_GPU,
    STREAMED,
    LayerPlacement,
    ModulePlacement,
    Placement,
    Runs,
    TierPlacement,
)
from planner.step_graph import (
    LANES,
    Op,
    StepGraph,
    build,
    build_kv_move,
    moved_kv_layers,
)
from planner.strategies import candidates
from planner.workload import PHASES
from tests.planner.tiny import tiny_spec

LAYERS = ("d", "m", "dd", "mm", "dmmd", "mdmdm")


def tiers() -> Iterator[tuple[ModelSpec, TierPlacement]]:
    """Every candidate of every phase, and placements that no strategy makes."""
    for layers in LAYERS:
        for is_tied in (False, True):
            spec = tiny_spec(layers, is_tied=is_tied)
            for phase in PHASES:
                for tier in candidates(spec, phase, has_gpu=True):
                    yield spec, tier
        yield spec, odd_tier(spec)


def odd_tier(spec: ModelSpec) -> TierPlacement:
    """Attention and feed-forward of every layer on different devices, some of it streamed."""
    layers = tuple(
        LayerPlacement(
            attention=(ON_GPU, ON_CPU, STREAMED)[index % 3],
            ffn=(ON_CPU, STREAMED, ON_CPU)[index % 3],
            router=(ON_GPU, ON_CPU, ON_CPU)[index % 3] if layer.is_moe else None,
        )
        for index, layer in enumerate(spec.layers)
    )
    return TierPlacement(
        phase="decode", strategy="odd", cut=0, embedding=ON_CPU, layers=layers, head=ON_CPU
    )


GRAPHS = [(spec, tier, build(spec, tier)) for spec, tier in tiers()]


def names(graph: StepGraph, lane: str) -> list[str]:
    return [op.name for op in graph.ops if op.lane == lane]


def copies(graph: StepGraph, payload: str) -> list[Op]:
    return [op for op in graph.ops if op.payload == payload]


def ancestors(graph: StepGraph) -> list[set[int]]:
    """Ops that must have ended before each op begins, by dependencies alone."""
    found: list[set[int]] = []
    for op in graph.ops:
        found.append(set(op.deps).union(*(found[dep] for dep in op.deps)))
    return found


def test_dependencies_come_before_the_ops_that_wait_for_them() -> None:
    for _, tier, graph in GRAPHS:
        assert graph.phase == tier.phase
        for position, op in enumerate(graph.ops):
            assert op.index == position
            assert all(dep < position for dep in op.deps)
            assert op.deps == tuple(sorted(set(op.deps)))


def test_op_names_are_unique() -> None:
    for _, _, graph in GRAPHS:
        assert max(Counter(op.name for op in graph.ops).values()) == 1


def test_every_module_is_computed_once_where_it_is_placed() -> None:
    for spec, tier, graph in GRAPHS:
        expected: list[tuple[str, int | None, str]] = [("embed", None, tier.embedding.device)]
        for index, layer in enumerate(tier.layers):
            expected += [(module, index, where.device) for module, where in layer.modules()]
        expected += [("head", None, tier.head.device), ("sample", None, "cpu")]
        actual = [
            (op.kind, op.layer, op.lane)
            for op in graph.ops
            if op.kind not in ("copy", "dispatch", "combine")
        ]

        assert actual == expected
        moe = [index for index, layer in enumerate(spec.layers) if layer.is_moe]
        for kind in ("dispatch", "combine"):
            assert [op.layer for op in graph.ops if op.kind == kind] == moe


def test_ops_form_one_chain_from_the_embedding_to_the_sample() -> None:
    """Every op that computes waits, by way of others, for the one before it."""
    for _, _, graph in GRAPHS:
        before = ancestors(graph)
        computing = [op.index for op in graph.ops if op.kind != "copy"]
        for earlier, later in pairwise(computing):
            assert earlier in before[later]


def test_every_gpu_op_waits_for_the_batch() -> None:
    """Positions, slots and block tables must be there; a tier without a GPU op copies nothing."""
    for _, tier, graph in GRAPHS:
        batch = copies(graph, "batch")
        assert len(batch) == tier.uses("gpu")
        before = ancestors(graph)
        for op in graph.ops:
            if op.lane == "gpu":
                assert batch[0].index in before[op.index]


def test_streamed_weights_are_copied_once_a_step_and_others_never() -> None:
    for spec, tier, graph in GRAPHS:
        expected = {
            (module, index) for index in range(spec.num_layers) for module in tier.streamed(index)
        }
        actual = [(op.module, op.layer) for op in copies(graph, "weights")]

        assert len(actual) == len(expected)
        assert set(actual) == expected
        assert all(op.lane == "h2d" for op in copies(graph, "weights"))


def test_a_streamed_op_waits_for_its_weights_and_reads_their_buffer() -> None:
    for _, _, graph in GRAPHS:
        weights = {(op.module, op.layer): op for op in copies(graph, "weights")}
        for op in graph.ops:
            copy = weights.get((op.module, op.layer))
            if op.kind != "copy" and copy is not None:
                assert copy.index in op.deps
                assert copy.buffer == op.buffer is not None


def test_a_buffer_is_filled_after_all_that_read_it_have_ended() -> None:
    for _, _, graph in GRAPHS:
        before = ancestors(graph)
        for copy in copies(graph, "weights"):
            assert copy.layer is not None and copy.buffer is not None
            for op in graph.ops:
                is_reader = op.kind != "copy" and op.buffer == copy.buffer
                if is_reader and op.layer is not None and op.layer < copy.layer:
                    reads_staging = any(
                        other.layer == op.layer and other.module == op.module
                        for other in copies(graph, "weights")
                    )
                    if reads_staging:
                        assert op.index in before[copy.index]


def test_no_more_layers_are_in_flight_than_there_are_buffers() -> None:
    """The copies of layer p of the streamed ones wait for layer p - 2 and for nothing later."""
    for _, tier, graph in GRAPHS:
        streamed = [index for index in range(len(tier.layers)) if tier.streamed(index)]
        before = ancestors(graph)
        for copy in copies(graph, "weights"):
            assert copy.layer is not None
            position = streamed.index(copy.layer)
            assert copy.buffer == position % NUM_STREAM_BUFFERS
            waited = {graph.ops[index].layer for index in before[copy.index]} - {None}
            if position < NUM_STREAM_BUFFERS:
                assert waited == set()
            else:
                last_read = streamed[position - NUM_STREAM_BUFFERS]
                assert max(layer for layer in waited if layer is not None) == last_read


def test_hidden_states_move_only_where_the_device_changes() -> None:
    """Between modules of the residual stream (experts travel by their own payloads)."""
    for _, tier, graph in GRAPHS:
        here = tier.embedding.device
        expected: list[tuple[int | None, str]] = []
        for index, layer in enumerate(tier.layers):
            for module, where in layer.modules():
                if module != "experts" and where.device != here:
                    here = where.device
                    expected.append((index, "h2d" if here == "gpu" else "d2h"))
        if tier.head.device != here:
            expected.append((None, "h2d" if tier.head.device == "gpu" else "d2h"))

        assert [(op.layer, op.lane) for op in copies(graph, "hidden")] == expected


def test_tokens_travel_to_experts_on_the_other_device_and_back() -> None:
    for spec, tier, graph in GRAPHS:
        away = [
            (index, layer.ffn.device)
            for index, layer in enumerate(tier.layers)
            if layer.router is not None and layer.router.device != layer.ffn.device
        ]
        there = [
            (op.layer, "gpu" if op.lane == "h2d" else "cpu") for op in copies(graph, "routing")
        ]
        back = [
            (op.layer, "cpu" if op.lane == "h2d" else "gpu")
            for op in copies(graph, "expert_output")
        ]

        assert there == back == away
        for op in graph.ops:
            if op.kind == "combine" and op.layer is not None:
                router = tier.layers[op.layer].router
                assert router is not None
                assert op.lane == router.device
        assert spec.num_layers == len(tier.layers)


def test_logits_come_down_exactly_where_the_head_is_on_the_gpu() -> None:
    for _, tier, graph in GRAPHS:
        assert [op.lane for op in copies(graph, "logits")] == ["d2h"] * (tier.head.device == "gpu")
        assert graph.ops[-1].kind == "sample"


def test_a_graph_names_the_lanes_that_it_uses() -> None:
    for _, _, graph in GRAPHS:
        assert set(graph.lanes) == {op.lane for op in graph.ops}
        assert sorted(op.index for lane in LANES for op in graph.lane(lane)) == list(
            range(len(graph.ops))
        )


def test_all_on_the_cpu_uses_one_lane() -> None:
    spec = tiny_spec("dm")
    graph = build(spec, strategies.cpu(spec, "decode"))

    assert graph.lanes == ("cpu",)
    assert names(graph, "cpu") == [
        *("embed", "attention[0]", "dense[0]", "attention[1]", "router[1]", "dispatch[1]"),
        *("experts[1]", "combine[1]", "head", "sample"),
    ]


def test_the_lanes_of_an_offloaded_step_written_out() -> None:
    """Three dense layers, all streamed: one copy ahead of the layer that computes."""
    spec = tiny_spec("ddd")
    graph = build(spec, strategies.offload(spec, "decode", 3))

    assert names(graph, "h2d") == [
        "copy batch h2d",
        *("copy weights attention[0] h2d", "copy weights dense[0] h2d"),
        "copy hidden[0] h2d",
        *("copy weights attention[1] h2d", "copy weights dense[1] h2d"),
        *("copy weights attention[2] h2d", "copy weights dense[2] h2d"),
    ]
    assert names(graph, "gpu") == [
        *("attention[0]", "dense[0]", "attention[1]", "dense[1]", "attention[2]", "dense[2]"),
        "head",
    ]
    assert names(graph, "d2h") == ["copy logits d2h"]
    assert names(graph, "cpu") == ["embed", "sample"]


def test_the_lanes_of_experts_on_the_cpu_written_out() -> None:
    spec = tiny_spec("mm", is_tied=True)
    graph = build(spec, strategies.experts_on_cpu(spec, "decode", 1))

    assert names(graph, "gpu") == [
        *("embed", "attention[0]", "router[0]", "combine[0]"),
        *("attention[1]", "router[1]", "dispatch[1]", "experts[1]", "combine[1]", "head"),
    ]
    assert names(graph, "cpu") == ["dispatch[0]", "experts[0]", "sample"]
    assert names(graph, "d2h") == ["copy routing[0] d2h", "copy logits d2h"]
    assert names(graph, "h2d") == ["copy batch h2d", "copy expert_output[0] h2d"]


@pytest.mark.parametrize("is_tied", [True, False])
def test_kv_moves_for_the_layers_whose_device_changes(is_tied: bool) -> None:
    """Split at 3 to split at 1: layers 1 and 2 go up; the other way round, down."""
    spec = tiny_spec("dmmd", is_tied=is_tied)
    three, one = (
        Placement(
            prefill=strategies.split(spec, "prefill", before),
            decode=strategies.split(spec, "decode", after),
        )
        for before, after in ((3, 1), (1, 3))
    )

    assert moved_kv_layers(three.prefill, three.decode) == (1, 2)
    up, down = (build_kv_move(pair.prefill, pair.decode) for pair in (three, one))
    assert [op.name for op in up.ops] == ["copy kv[1] h2d", "copy kv[2] h2d"]
    assert [op.name for op in down.ops] == ["copy kv[1] d2h", "copy kv[2] d2h"]


def test_kv_stays_where_both_phases_keep_it() -> None:
    """Streaming layers and computing experts on the CPU both keep the cache on the GPU."""
    spec = tiny_spec("mm")
    pair = strategies.offload(spec, "prefill", 2), strategies.experts_on_cpu(spec, "decode", 2)

    assert build_kv_move(*pair).ops == ()


def mixed(runs: Runs, num_resident: int, num_slots: int = 0) -> StepGraph:
    """Two expert layers with everything else on the GPU."""
    spec = tiny_spec("mm")
    gpu = strategies.gpu(spec, "decode")
    where = ModulePlacement(lives="cpu", runs=runs, num_resident=num_resident)
    layers = tuple(msgspec_replace(layer, ffn=where) for layer in gpu.layers)
    return build(spec, msgspec_replace(gpu, layers=layers, num_expert_slots=num_slots))


def ops_of(graph: StepGraph, layer: int) -> list[tuple[str, str, str]]:
    """Kind (or payload), lane and part of a layer's ops from its router on."""
    return [
        (op.payload or op.kind, op.lane, op.part)
        for op in graph.ops
        if op.layer == layer and op.kind != "attention"
    ]


def test_missed_experts_on_the_cpu_run_beside_the_residents() -> None:
    """One path each from the router to the sum; without residents there is one."""
    graph = mixed("cpu", 1)
    assert ops_of(graph, 1) == [
        ("router", "gpu", "all"),
        ("dispatch", "gpu", "resident"),
        ("experts", "gpu", "resident"),
        ("routing", "d2h", "all"),
        ("dispatch", "cpu", "missed"),
        ("experts", "cpu", "missed"),
        ("expert_output", "h2d", "all"),
        ("combine", "gpu", "all"),
    ]
    resident, missed = (op for op in graph.ops if op.kind == "experts" and op.layer == 1)
    (combine,) = (op for op in graph.ops if op.kind == "combine" and op.layer == 1)
    assert resident.index in combine.deps and missed.index not in resident.deps
    assert {op.num_resident for op in (resident, missed)} == {1}


def test_a_split_layer_fetches_what_the_cpu_decides() -> None:
    """The copy waits for the decision, the rest of the experts does not wait for the copy."""
    graph = mixed("split", 0, num_slots=4)
    assert ops_of(graph, 0) == [
        ("router", "gpu", "all"),
        ("routing", "d2h", "all"),
        ("dispatch", "cpu", "rest"),
        ("weights", "h2d", "fetched"),
        ("dispatch", "gpu", "fetched"),
        ("experts", "gpu", "fetched"),
        ("experts", "cpu", "rest"),
        ("expert_output", "h2d", "all"),
        ("combine", "gpu", "all"),
    ]
    by_name = {op.name: op for op in graph.ops}
    decide, fetch = by_name["dispatch rest[0]"], by_name["copy weights fetched experts[0] h2d"]
    assert fetch.deps == (decide.index,)
    assert by_name["experts rest[0]"].deps == (decide.index,)
    assert {op.max_fetched for op in graph.ops if op.part in ("fetched", "rest")} == {2}
    assert len(by_name) == len(graph.ops)


def test_experts_beside_residents_are_streamed_ahead() -> None:
    """Both parts on the GPU: the residents need not wait for the copy of the others."""
    graph = mixed("stream", 3)
    by_name = {op.name: op for op in graph.ops}
    copy = by_name["copy weights missed experts[0] h2d"]
    assert copy.deps == ()
    assert copy.index in by_name["experts missed[0]"].deps
    assert copy.index not in by_name["experts resident[0]"].deps


def both_tiers() -> Iterator[tuple[ModelSpec, TierPlacement]]:
    """Attention on both devices in all, some or no layers, in one chain and in two, over modules of
    every kind."""
    places = itertools.product((ON_GPU, STREAMED), (ON_GPU, STREAMED, ON_CPU), (ON_GPU, ON_CPU))
    for layers, (attention, ffn, router) in itertools.product(LAYERS, places):
        spec = tiny_spec(layers)
        for every, num_second_seqs in ((1, 0), (2, 0), (1, 3), (None, 3)):
            found = tuple(
                LayerPlacement(
                    attention=attention,
                    ffn=ffn,
                    router=router if layer.is_moe else None,
                    kv_on_cpu=every is not None and index % every == 0,
                )
                for index, layer in enumerate(spec.layers)
            )
            yield (
                spec,
                TierPlacement(
                    phase="decode",
                    strategy="both",
                    cut=0,
                    embedding=router,
                    layers=found,
                    head=router,
                    num_second_seqs=num_second_seqs,
                ),
            )


BOTH_GRAPHS = [(spec, tier, build(spec, tier)) for spec, tier in both_tiers()]


def chains(graph: StepGraph) -> list[list[Op]]:
    """The ops of each sub-batch; of all sequences where there is one."""
    found = {op.sub_batch for op in graph.ops if op.payload != "weights"}
    return [
        [op for op in graph.ops if op.payload != "weights" and op.sub_batch == number]
        for number in sorted(found, key=str)
    ]


def test_attention_on_both_devices_has_ops_in_an_order_that_can_run() -> None:
    """Dependencies come before; names differ; a chain of ops for each sub-batch, its own batch."""
    for _, tier, graph in BOTH_GRAPHS:
        assert all(dep < op.index for op in graph.ops for dep in op.deps)
        assert [op.index for op in graph.ops] == list(range(len(graph.ops)))
        assert max(Counter(op.name for op in graph.ops).values()) == 1
        before, found = ancestors(graph), chains(graph)
        assert len(found) == (2 if tier.num_second_seqs else 1)
        for chain in found:
            computing = [op.index for op in chain if op.kind != "copy"]
            assert all(early in before[late] for early, late in pairwise(computing))
            (batch,) = (op for op in chain if op.payload == "batch")
            assert all(batch.index in before[op.index] for op in chain if op.lane == "gpu")
        # only copies of weights are of both, and nothing else ties one chain to the other
        own = {op.index: number for number, chain in enumerate(found) for op in chain}
        for op in graph.ops:
            if op.index in own:
                assert {own[dep] for dep in op.deps if dep in own} <= {own[op.index]}


BOTH_PAYLOADS = ("qkv", "attended")


def test_projections_scores_and_output_follow_each_other() -> None:
    """From the GPU to the CPU and back; the weights are read by the first and the last."""
    for _, tier, graph in BOTH_GRAPHS:
        copied = {(op.module, op.layer): op.index for op in copies(graph, "weights")}
        for chain in chains(graph):
            for index, layer in enumerate(tier.layers):
                of_layer = [
                    op
                    for op in chain
                    if op.layer == index and (op.term == "attention" or op.payload in BOTH_PAYLOADS)
                ]
                kinds = [op.payload or op.kind for op in of_layer]
                if layer.kv == "gpu" and not chain[0].sub_batch:
                    assert kinds == ["attention"]
                    continue
                assert kinds == ["qkv", "qkv", "attend", "attended", "attention_output"]
                assert [op.lane for op in of_layer] == ["gpu", "d2h", "cpu", "h2d", "gpu"]
                first, down, attend, up, last = of_layer
                assert down.deps == (first.index,)
                assert attend.deps == (down.index,)
                assert up.deps == (attend.index,)
                assert {first.index, up.index} == set(last.deps)
                assert first.buffer == last.buffer == (index % 2 if tier.streamed(index) else None)
                if layer.attention == STREAMED:
                    assert copied["attention", index] in first.deps


def test_weights_are_copied_once_for_both_sub_batches() -> None:
    """And into a buffer that all ops of both have read, which no copy is filling."""
    for spec, tier, graph in BOTH_GRAPHS:
        expected = [
            (module, index) for index in range(spec.num_layers) for module in tier.streamed(index)
        ]
        assert [(op.module, op.layer) for op in copies(graph, "weights")] == expected
        assert {op.sub_batch for op in copies(graph, "weights")} <= {None}
        before = ancestors(graph)
        for copy in copies(graph, "weights"):
            assert copy.layer is not None
            readers = [
                op
                for op in graph.ops
                if op.kind != "copy"
                and op.buffer == copy.buffer
                and op.layer is not None
                and op.layer < copy.layer
                and op.module in tier.streamed(op.layer)
            ]
            assert all(op.index in before[copy.index] for op in readers)
            users = [op for op in graph.ops if (op.module, op.layer) == (copy.module, copy.layer)]
            for op in users[1:]:
                assert copy.index in before[op.index]


def test_the_lanes_of_two_sub_batches_written_out() -> None:
    """Two dense layers, streamed; the CPU attends for the second while the first has the GPU."""
    spec = tiny_spec("dd")
    whole = msgspec_replace(strategies.offload(spec, "decode", 2), num_second_seqs=3)
    graph = build(spec, msgspec_replace(whole, embedding=ON_GPU))

    assert names(graph, "gpu") == [
        *("embed#1", "qkv[0]#1", "embed#0", "attention[0]#0", "dense[0]#0"),
        *("attention_output[0]#1", "dense[0]#1", "qkv[1]#1", "attention[1]#0", "dense[1]#0"),
        *("head#0", "attention_output[1]#1", "dense[1]#1", "head#1"),
    ]
    assert names(graph, "cpu") == ["attend[0]#1", "attend[1]#1", "sample#0", "sample#1"]
    assert names(graph, "d2h") == [
        *("copy qkv[0]#1 d2h", "copy qkv[1]#1 d2h", "copy logits#0 d2h", "copy logits#1 d2h"),
    ]
    assert names(graph, "h2d") == [
        *("copy batch#1 h2d", "copy batch#0 h2d"),
        *("copy weights attention[0] h2d", "copy weights dense[0] h2d"),
        "copy attended[0]#1 h2d",
        *("copy weights attention[1] h2d", "copy weights dense[1] h2d"),
        "copy attended[1]#1 h2d",
    ]


def test_a_sub_batch_alone_is_the_step_of_its_cache() -> None:
    """Of the first one, as if there were no second; of the second, all caches on the CPU."""
    spec = tiny_spec("dmd")
    gpu = strategies.gpu(spec, "decode")
    on_cpu = tuple(msgspec_replace(layer, kv_on_cpu=True) for layer in gpu.layers)
    both = msgspec_replace(gpu, num_second_seqs=2)

    assert both.alone(0) == gpu
    assert both.alone(1) == msgspec_replace(gpu, layers=on_cpu)
    assert {op.sub_batch for op in build(spec, both.alone(1)).ops} == {None}
    # attention that the CPU does whole keeps its cache there as it is
    assert strategies.cpu(spec, "decode").alone(1) == strategies.cpu(spec, "decode")
