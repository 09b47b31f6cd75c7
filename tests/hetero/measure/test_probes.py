"""Probes call what the engine calls, and say what they measured. No timing is judged."""

from __future__ import annotations

import ctypes
import math
import threading
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from cpu_kernels.attention import check_attention, decode_attention_links
from cpu_kernels.calls import Chain, Link
from cpu_kernels.experts import check_experts, experts_links
from hetero.engine import Engine, StepResult
from hetero.kv_cache import BLOCK_SIZE
from hetero.measure.attention import (
    AttentionCase,
    decode_rounds,
    decode_sample,
    prefill_sample,
    torch_decode_sample,
)
from hetero.measure.chains import MAX_ROUNDS, num_rounds, timed_chains
from hetero.measure.cold_memory import ColdMemory, cold_cpu_memory
from hetero.measure.elementwise import (
    elementwise_sample,
    norm_sample,
    residual_sample,
    rotary_sample,
    route_sample,
    sampling_sample,
)
from hetero.measure.experts import (
    choices,
    experts_rounds,
    experts_sample,
    ragged_choices,
    torch_experts_sample,
)
from hetero.measure.host import host_samples
from hetero.measure.launch import handover_sample, launch_s, link_s
from hetero.measure.linear import linear_sample, model_shapes
from hetero.measure.link import copy_samples, emulated_bytes_per_s, link_profile
from hetero.measure.memory import cpu_read_bytes_per_s
from hetero.measure.timing import Timing
from hetero.model import quantised
from hetero.model.attention import attend_pages, decode_torch
from hetero.model.moe import Dispatch, experts
from hetero.model.quantised import Panels
from hetero.model_lookup import find_model
from hetero.sampler import SamplingRow
from planner.device import Sample
from planner.kernels import Backend
from planner.model_spec import Dtype, WeightKind
from tests.hetero.measure.tiny_effort import MEMORY_BYTES, two_layers

CPU = torch.device("cpu")
HEADS = (4, 2, 32)


@pytest.fixture(scope="module")
def memory() -> ColdMemory:
    return cold_cpu_memory(MEMORY_BYTES)


def is_rate(value: float) -> bool:
    return math.isfinite(value) and value > 0


def is_measured(sample: Sample) -> bool:
    return is_rate(sample.seconds) and math.isfinite(sample.spread) and sample.spread >= 0


# --- chains


class CountedCall(ctypes.Structure):
    """A call that only its address tells from others."""

    _fields_ = [("word", ctypes.c_int64)]


def test_every_round_of_a_lap_runs_before_one_runs_again() -> None:
    """Ten rounds in chains of a third of the budget; nothing is left out for ever."""
    runs: list[tuple[Link, ...]] = []
    rounds = [[Link(0, CountedCall(), ())] for _ in range(10)]
    clock = iter(np.arange(0.0, 1e3, 0.25))
    with (
        mock.patch.object(Chain, "run", lambda chain: runs.append(chain.links)),
        mock.patch("time.perf_counter", lambda: float(next(clock))),
    ):
        # a chain seems to last 0.25 s: two rounds are a third of 1.5 s
        timed_chains(rounds, num_threads=1, budget_s=1.5)
    warm_up, *timed = runs[1:]
    assert len(warm_up) == 1
    assert {len(links) for links in timed} == {2}
    order = [link for links in timed for link in links]
    first_lap = order[:10]
    assert len({id(link) for link in first_lap}) == len(first_lap)


@given(st.integers(1, 1 << 40), st.integers(0, 1 << 40))
def test_rounds_are_as_many_as_fit_and_one_at_least(memory_bytes: int, round_bytes: int) -> None:
    found = num_rounds(memory_bytes, round_bytes)
    assert 1 <= found <= MAX_ROUNDS
    assert found == 1 or found * round_bytes <= memory_bytes
    assert found == MAX_ROUNDS or (found + 1) * max(1, round_bytes) > memory_bytes


# --- reads and products


@pytest.mark.parametrize("num_threads", [1, 2])
def test_read_rate(memory: ColdMemory, num_threads: int) -> None:
    """A number for any thread count."""
    assert is_rate(cpu_read_bytes_per_s(memory, num_threads=num_threads, budget_s=0.0))


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("kind", ["bfloat16", "float32", "int8", "int4"])
def test_a_product_is_named_by_what_it_was(
    memory: ColdMemory, backend: Backend, kind: WeightKind
) -> None:
    """Format, shape, token count, backend and threads go into the sample."""
    sample = linear_sample(
        memory, kind=kind, num_tokens=3, shape=(64, 256), budget_s=0.0, backend=backend
    )
    assert (sample.lane, sample.kernel, sample.format) == ("cpu", "linear", kind)
    assert (sample.shape, sample.num_tokens, sample.backend) == ((64, 256), 3, backend)
    assert sample.num_threads == torch.get_num_threads()
    assert is_measured(sample)


def test_float16_products_are_torchs(memory: ColdMemory) -> None:
    sample = linear_sample(
        memory, kind="float16", num_tokens=2, shape=(16, 64), budget_s=0.0, backend="torch"
    )
    assert (sample.lane, sample.format, sample.backend) == ("cpu", "float16", "torch")


def chains_of(work: Callable[[], object]) -> list[tuple[Link, ...]]:
    """The links of every chain that some work runs."""
    seen: list[tuple[Link, ...]] = []
    run = Chain.run

    def noted(chain: Chain) -> None:
        seen.append(chain.links)
        run(chain)

    with mock.patch.object(Chain, "run", noted):
        work()
    return seen


def test_products_read_memory_that_was_not_read_for_a_lap() -> None:
    """A chain goes through all of the memory, a piece of its own for every product."""
    small = cold_cpu_memory(40 << 10)
    chains = chains_of(
        # 16 rows of 64 columns, 2 bytes each: 2048 bytes, 20 times in 40960
        lambda: linear_sample(
            small, kind="bfloat16", num_tokens=1, shape=(16, 64), budget_s=0.3, backend="numba"
        )
    )
    panels = [[link.call.panels for link in links] for links in chains]
    longest = max(panels, key=len)
    assert len(set(longest)) == len(longest) > 1
    assert len({panel for chain in panels for panel in chain}) == 20


def test_shapes_of_a_model_are_those_of_its_products() -> None:
    """qkv: 4*32 + 2*2*32 = 256 rows; o, router, head. Experts and dense layers are experts'."""
    shapes = model_shapes(two_layers(), max_elements=1_000_000)
    assert shapes == ((256, 128), (128, 128), (8, 128), (320, 128))


def test_shapes_are_cut_to_the_memory() -> None:
    """6400 / 128 = 50 rows of all but the router's 8."""
    shapes = model_shapes(two_layers(), max_elements=6400)
    assert shapes == ((50, 128), (8, 128))


# --- experts


@given(st.sampled_from([*range(1, 9), 16, 24, 64]), st.integers(1, 40), st.integers(0, 1000))
def test_experts_get_equally_many_tokens(num_experts: int, tokens_each: int, first: int) -> None:
    """Exactly; and no token chooses an expert twice."""
    ids_Tk = choices(num_experts, tokens_each, first)
    counts = Counter(ids_Tk.flatten().tolist())
    assert counts == dict.fromkeys(range(first, first + num_experts), tokens_each)
    assert all(len(set(row)) == len(row) for row in ids_Tk.tolist())


@pytest.mark.parametrize("kind", ["bfloat16", "float32", "int8", "int4"])
def test_experts_are_named_by_what_they_were(memory: ColdMemory, kind: WeightKind) -> None:
    sample = experts_sample(
        memory,
        kind=kind,
        shape=(128, 256),
        num_experts=4,
        tokens_each=3,
        num_threads=2,
        budget_s=0.0,
    )
    assert (sample.lane, sample.kernel, sample.backend) == ("cpu", "experts", "numba")
    assert (sample.format, sample.shape) == (kind, (4, 128, 256))
    assert (sample.num_tokens, sample.num_threads) == (3, 2)
    assert is_measured(sample)


def test_every_round_has_experts_of_its_own() -> None:
    """2 experts of 3 * 128 * 128 * 2 = 98304 bytes: 5 rounds in 1 MiB, ten experts in all.

    The kernel found every expert that was chosen: it does nothing where it does not.
    """
    ids: list[np.ndarray[Any, Any]] = []

    def noted(x: Any, packed: Any, ids_Tk: Any, weights: Any, **others: Any) -> Any:
        ids.append(ids_Tk)
        return experts_links(x, packed, ids_Tk, weights, **others)

    with mock.patch("hetero.measure.experts.experts_links", noted):
        rounds = experts_rounds(
            cold_cpu_memory(1 << 20),
            kind="bfloat16",
            shape=(128, 128),
            num_experts=2,
            tokens_each=3,
            num_threads=1,
        )
    assert [sorted(set(each.flatten().tolist())) for each in ids] == [
        [0, 1],
        [2, 3],
        [4, 5],
        [6, 7],
        [8, 9],
    ]
    assert {each.shape for each in ids} == {(3, 2)}
    links = [link for each in rounds for link in each]
    Chain(links, num_threads=1).run()
    check_experts(links)


@given(st.integers(1, 64), st.integers(1, 64))
def test_ragged_choices_give_every_expert_tokens_and_the_mean_that_is_asked(
    num_experts: int, tokens_each: int
) -> None:
    ids_Tk = ragged_choices(num_experts, tokens_each)
    counts = np.bincount(ids_Tk.ravel(), minlength=num_experts)
    assert counts.sum() == num_experts * tokens_each
    assert counts.min() >= 1
    assert (np.diff(counts[:-1]) >= 0).all()


def test_torchs_experts_are_looped_over_as_by_the_emulated_accelerator(memory: ColdMemory) -> None:
    """Eight experts with three tokens each on average, weights of a lap ago each time."""
    seen: list[tuple[list[int], int, str]] = []

    def noted(tokens: Dispatch, weights: dict[str, torch.Tensor], *, method: Any) -> torch.Tensor:
        ends = [0, *tokens.ends_E.tolist()]
        counts = [end - start for start, end in pairwise(ends)]
        seen.append((counts, weights["gate_up"].data_ptr(), method))
        return experts(tokens, weights, method=method)

    with mock.patch("hetero.measure.experts.experts", noted):
        sample = torch_experts_sample(
            memory, kind="bfloat16", shape=(128, 64), num_experts=8, tokens_each=3, budget_s=0.0
        )
    assert {tuple(counts) for counts, _, _ in seen} == {(1, 2, 2, 3, 3, 4, 4, 5)}
    assert {method for _, _, method in seen} == {"loop"}
    assert len({address for _, address, _ in seen}) == len(seen)
    assert (sample.kernel, sample.backend, sample.format) == ("experts", "torch", "bfloat16")
    assert (sample.shape, sample.num_tokens) == ((8, 128, 64), 3)
    assert is_measured(sample)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_products_of_the_accelerator_are_measured_on_quantised_panels(
    memory: ColdMemory, kind: Any
) -> None:
    """A matrix and experts, from a lap ago each time; on a CPU by unpacking them first."""
    seen: list[tuple[str, int, int]] = []
    multiply, by_expert = quantised.multiply, quantised.multiply_by_expert

    def noted(x: torch.Tensor, panels: Panels, method: str) -> torch.Tensor:
        seen.append((method, panels.num_rows, panels.blobs_EB.data_ptr()))
        return multiply(x, panels, method)  # type: ignore[arg-type]

    def noted_experts(
        x: torch.Tensor, panels: Panels, ends_E: torch.Tensor, method: str
    ) -> torch.Tensor:
        seen.append((method, panels.num_rows, panels.blobs_EB.data_ptr()))
        return by_expert(x, panels, ends_E, method)  # type: ignore[arg-type]

    options: Any = {"kind": kind, "budget_s": 0.0}
    with (
        mock.patch("hetero.measure.linear.multiply", noted),
        mock.patch("hetero.model.moe.multiply_by_expert", noted_experts),
    ):
        one = linear_sample(memory, num_tokens=3, shape=(64, 128), backend="panels", **options)
        some = torch_experts_sample(
            memory, shape=(128, 64), num_experts=8, tokens_each=3, **options
        )
    assert {method for method, _, _ in seen} == {"unpack"}
    # of an expert gate and up, and down
    assert {num_rows for _, num_rows, _ in seen} == {64, 128}
    assert len({address for _, _, address in seen}) == len(seen)
    for sample in (one, some):
        assert (sample.lane, sample.backend, sample.format) == ("cpu", "panels", kind)
        assert is_measured(sample)


# --- attention


@given(
    st.integers(1, 5),
    st.integers(0, 100),
    st.sampled_from([1, 2, 17, 40]),
    st.sampled_from(["bfloat16", "float32"]),
)
def test_a_case_has_blocks_for_its_tokens(
    num_seqs: int, context: int, num_tokens: int, dtype: Dtype
) -> None:
    """By counting them out; every block is in one table once."""
    case = AttentionCase(
        heads=HEADS, dtype=dtype, num_seqs=num_seqs, context=context, num_tokens=num_tokens
    )
    num_blocks = 0
    while num_blocks * BLOCK_SIZE < context + num_tokens:
        num_blocks += 1
    assert case.num_blocks == num_seqs * num_blocks
    assert sorted(case.tables().flatten().tolist()) == list(range(case.num_blocks))
    itemsize = {"bfloat16": 2, "float32": 4}[dtype]
    # keys and values of 2 KV heads of 32
    assert case.kv_bytes == case.num_blocks * BLOCK_SIZE * 2 * 2 * 32 * itemsize


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_decode_reads_all_of_the_context(memory: ColdMemory, dtype: Dtype) -> None:
    """33 tokens of two sequences, and their new ones; each round in keys of its own.

    The kernel found every block: it does nothing where it does not.
    """
    case = AttentionCase(heads=HEADS, dtype=dtype, num_seqs=2, context=33)
    small = cold_cpu_memory(4 * case.kv_bytes)
    seen: list[tuple[list[int], int]] = []

    def noted(q: Any, keys: Any, values: Any, tables: Any, lens: Any, **others: Any) -> Any:
        assert q.shape == (2, 4, 32)
        seen.append((lens.tolist(), keys.ctypes.data))
        return decode_attention_links(q, keys, values, tables, lens, **others)

    with mock.patch("hetero.measure.attention.decode_attention_links", noted):
        rounds = decode_rounds(small, case, num_threads=2)
    assert [lens for lens, _ in seen] == [[34, 34]] * 4
    assert len({address for _, address in seen}) == 4
    for links in rounds:
        Chain(links, num_threads=2).run()
        plan, attend = links
        check_attention((plan, attend))

    sample = decode_sample(memory, case, num_threads=2, budget_s=0.0)
    assert (sample.kernel, sample.backend, sample.format) == ("decode_attention", "numba", dtype)
    assert (sample.shape, sample.num_seqs, sample.context) == (HEADS, 2, 34)
    assert sample.num_threads == 2
    assert is_measured(sample)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_torch_decodes_the_same_tokens(memory: ColdMemory, dtype: Dtype) -> None:
    """The mask lets 34 of the 48 tokens of three blocks be seen, in the cache's format."""
    case = AttentionCase(heads=HEADS, dtype=dtype, num_seqs=2, context=33)
    seen: list[tuple[torch.dtype, list[int]]] = []

    def noted(q: torch.Tensor, kv: Any, reads: Any) -> torch.Tensor:
        seen.append((q.dtype, (reads.mask_S11C == 0).sum(dim=(1, 2, 3)).tolist()))
        assert kv.key.dtype == q.dtype
        return decode_torch(q, kv, reads)

    with mock.patch("hetero.measure.attention.decode_torch", noted):
        sample = torch_decode_sample(memory, case, budget_s=0.0)
    assert set(map(str, seen)) == {str((getattr(torch, dtype), [34, 34]))}
    assert (sample.kernel, sample.backend, sample.format) == ("decode_attention", "torch", dtype)
    assert (sample.shape, sample.num_seqs, sample.context) == (HEADS, 2, 34)
    assert is_measured(sample)


@pytest.mark.parametrize("context", [0, 20])
def test_prefill_reads_past_and_new_tokens(memory: ColdMemory, context: int) -> None:
    """40 new tokens: 40 queries in float32 over as many keys more as there is a past."""
    case = AttentionCase(heads=HEADS, dtype="bfloat16", context=context, num_tokens=40)
    seen: list[tuple[tuple[int, ...], torch.dtype, int, bool]] = []

    def noted(q: torch.Tensor, kv: Any, reads: Any) -> torch.Tensor:
        assert kv.key.dtype == torch.bfloat16
        seen.append((tuple(q.shape), q.dtype, reads.num_keys, reads.mask_TC is None))
        return attend_pages(q, kv, reads)

    with mock.patch("hetero.measure.attention.attend_pages", noted):
        sample = prefill_sample(memory, case, compute_dtype="float32", budget_s=0.0)
    assert set(seen) == {((40, 4, 32), torch.float32, 40 + context, context == 0)}
    assert (sample.kernel, sample.backend) == ("prefill_attention", "torch")
    assert (sample.format, sample.shape) == ("float32", HEADS)
    assert (sample.num_tokens, sample.num_seqs, sample.context) == (40, 1, context)
    assert is_measured(sample)


# --- small kernels


def test_small_kernels_are_named_by_what_they_were() -> None:
    """Rotary prepares queries, keys and values: (4 + 2 * 2) * 32 = 256 numbers a token."""
    found = (
        norm_sample(128, 3, num_threads=2, budget_s=0.0),
        residual_sample(128, 3, num_threads=2, budget_s=0.0),
        rotary_sample(HEADS, 3, num_threads=2, budget_s=0.0),
        route_sample(16, 4, 3, num_threads=2, budget_s=0.0),
    )
    assert [(each.kernel, each.shape) for each in found] == [
        ("norm", (128,)),
        ("residual", (128,)),
        ("rotary", (256,)),
        ("route", (16, 4)),
    ]
    assert {(each.num_tokens, each.num_threads, each.backend) for each in found} == {
        (3, 2, "numba")
    }
    assert all(is_measured(each) for each in found)


def test_a_pass_of_torch_is_a_thirty_second_of_what_is_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Norms of two passes, as many products and as many additions; all took 32 s."""
    names: Counter[str] = Counter()

    class Counted(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            names[func._schema.name] += 1
            return func(*args, **(kwargs or {}))

    def once(call: Callable[[], object], **others: object) -> Timing:
        with Counted():  # type: ignore[no-untyped-call]
            call()
        return Timing(seconds=32.0, spread=0.0)

    monkeypatch.setattr("hetero.measure.elementwise.timed", once)
    sample = elementwise_sample(CPU, "bfloat16", 128, 3, budget_s=0.0)
    num_norms = names["aten::_fused_rms_norm"] or names["aten::rsqrt"]
    assert 2 * num_norms + 2 * num_norms == 32
    assert sample.seconds == 1.0
    assert (sample.kernel, sample.shape, sample.num_tokens) == ("elementwise", (128,), 3)
    assert (sample.lane, sample.backend) == ("cpu", "torch")


def test_sampling_chooses_a_token_of_each_row(memory: ColdMemory) -> None:
    shapes: list[tuple[tuple[int, ...], int]] = []

    def noted(logits: torch.Tensor, rows: list[SamplingRow]) -> None:
        shapes.append((tuple(logits.shape), len(rows)))

    with mock.patch("hetero.measure.elementwise.sample", noted):
        sample = sampling_sample(memory, 256, 5, num_threads=2)
    assert set(shapes) == {((5, 256), 5)}
    assert (sample.lane, sample.backend, sample.num_threads) == ("cpu", "torch", 2)
    assert (sample.kernel, sample.shape, sample.num_seqs) == ("sample", (256,), 5)


# --- launches, steps, hand-overs


@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_small_operation_takes_some_time(memory: ColdMemory, num_threads: int) -> None:
    """In torch and in a chain."""
    assert is_rate(launch_s(CPU, budget_s=0.0))
    assert is_rate(link_s(memory, num_threads=num_threads, budget_s=0.0))


def test_a_handover_leaves_no_thread_behind() -> None:
    before = threading.enumerate()
    sample = handover_sample(num_threads=3)
    assert threading.enumerate() == before
    assert (sample.kernel, sample.shape, sample.num_threads) == ("handover", (), 3)
    assert is_measured(sample)


def test_a_handover_is_measured_on_the_lane_that_is_given() -> None:
    """Which its owner closes."""
    lane = mock.MagicMock()
    handover_sample(lane)
    assert lane.submit.call_count == lane.submit.return_value.wait.call_count == 51
    lane.close.assert_not_called()


def test_steps_are_measured_for_each_number_of_sequences(memory: ColdMemory) -> None:
    """By decode steps of the engine with as many, and ops of theirs; an op by prefills."""
    sizes: Counter[tuple[str, int]] = Counter()
    step = Engine.step

    def noted(engine: Engine) -> StepResult | None:
        result = step(engine)
        if result is not None:
            shape = result.batch.shape
            sizes[shape.phase, shape.num_tokens] += 1
        return result

    before = threading.enumerate()
    with mock.patch.object(Engine, "step", noted):
        found = host_samples(memory, find_model(None), num_threads=1, num_seqs=(1, 3))
    assert threading.enumerate() == before
    assert [(each.kernel, each.num_tokens, each.num_seqs) for each in found] == [
        ("step", 1, 1),
        ("embed", 1, 1),
        ("sample", 1, 1),
        ("op", 1, 1),
        ("step", 1, 3),
        ("embed", 3, 1),
        ("sample", 1, 3),
    ]
    assert all(is_measured(each) and each.num_threads == 1 for each in found)
    assert {("prefill", 1), ("decode", 1), ("decode", 3)} <= set(sizes)


# --- links


def test_emulated_link_is_not_faster_than_stated() -> None:
    """1 MB at 100 MB/s: sleeps, so it can be slower, never faster."""
    rate = emulated_bytes_per_s(
        link_bytes_per_s=1e8, latency_s=0.0, budget_s=0.0, copy_bytes=1_000_000
    )
    assert 0 < rate <= 1e8


@pytest.mark.gpu
def test_copies_go_both_ways_from_both_kinds_of_memory() -> None:
    """Each size each way; the link's rates are those of the largest copies."""
    device, sizes = torch.device("cuda", 0), (4096, 1 << 20)
    copies = copy_samples(device, sizes, budget_s=0.0)
    assert Counter((copy.lane, copy.memory, copy.shape[0]) for copy in copies) == {
        (lane, kind, size): 1
        for lane in ("h2d", "d2h")
        for kind in ("pinned", "pageable")
        for size in sizes
    }
    assert all(is_measured(copy) for copy in copies)
    seconds = {(copy.lane, copy.memory, copy.shape[0]): copy.seconds for copy in copies}
    link = link_profile(device, copies)
    assert link.h2d_bytes_per_s == sizes[1] / seconds["h2d", "pinned", sizes[1]]
    assert link.pageable_d2h_bytes_per_s == sizes[1] / seconds["d2h", "pageable", sizes[1]]
    assert is_rate(link.latency_s)
