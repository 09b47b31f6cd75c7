"""Whatever fails, at whichever moment: no hang, nothing lost, and no token of another changes."""

from __future__ import annotations

import faulthandler
import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from hetero import LLM, SamplingParams
from hetero.api import GenerationStep
from hetero.errors import MemoryBudgetError, UsageError
from hetero.faults import POINTS, VARIABLE, Fault, Faults, InjectedFaultError
from planner import strategies
from planner.model_spec import ModelSpec
from planner.placement import KV_BLOCK_TOKENS, Placement
from planner.workload import Workload
from tests.hetero.test_expert_slots import slotted
from tests.hetero.test_mixed_experts import Mix, mixed, placed
from tests.hetero.test_sub_batches import many_blocks, sub_batches_by_hand
from tests.machines import toy_machine
from tests.tiny_models import save_tiny_model

__all__ = ["many_blocks"]

PROMPTS: Any = [
    {"prompt_token_ids": [(17 * at + 3 * size) % 101 for at in range(size)]} for size in (9, 21, 4)
]
# One draws: its generator has to be where it was when a step is run again.
PARAMS = [
    SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True),
    SamplingParams(max_tokens=3, temperature=1.0, seed=3, ignore_eos=True),
    SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True),
]
# A step of these models takes a few milliseconds.
WATCHDOG_S = 60.0


def streamed(spec: ModelSpec) -> Placement:
    return Placement(
        prefill=strategies.offload(spec, "prefill", spec.num_layers),
        decode=strategies.offload(spec, "decode", spec.num_layers),
    )


def halves(spec: ModelSpec) -> Placement:
    return Placement(
        prefill=strategies.split(spec, "prefill", 1), decode=strategies.split(spec, "decode", 1)
    )


def divided_experts(spec: ModelSpec) -> Placement:
    split = Mix(runs="split", num_resident=2)
    return mixed(spec, split, split)


def elsewhere(spec: ModelSpec) -> Placement:
    """Decode on the CPU goes on beside prefill."""
    return Placement(
        prefill=strategies.offload(spec, "prefill", spec.num_layers),
        decode=strategies.cpu(spec, "decode"),
    )


def two_sub_batches(spec: ModelSpec) -> Placement:
    decode = replace(strategies.gpu(spec, "decode"), strategy="mixed", num_second_seqs=1)
    return Placement(prefill=strategies.gpu(spec, "prefill"), decode=decode)


def slots_that_change(spec: ModelSpec) -> Placement:
    """What was fetched stays, and what is guessed is copied ahead."""
    return slotted(spec, 2, "lru", prefetch=True)


def divided_caches(spec: ModelSpec) -> Placement:
    """The first block of every sequence on the GPU, the others on the CPU."""
    gpu = strategies.gpu(spec, "decode")
    layers = tuple(
        replace(layer, kv_on_cpu=True, num_gpu_kv_tokens=KV_BLOCK_TOKENS) for layer in gpu.layers
    )
    decode = replace(gpu, strategy="mixed", layers=layers)
    return Placement(prefill=strategies.gpu(spec, "prefill"), decode=decode)


PLACES: dict[str, Callable[[ModelSpec], Placement]] = {
    "streamed": streamed,
    "halves": halves,
    "divided experts": divided_experts,
    "slots that change": slots_that_change,
    "divided caches": divided_caches,
    "elsewhere": elsewhere,
    "two sub-batches": two_sub_batches,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("olmoe")
    save_tiny_model("olmoe", folder, seed=17)
    return folder


@pytest.fixture(scope="module")
def expected(model: Path) -> list[tuple[int, ...]]:
    with LLM(model, profile=toy_machine(), accelerator="none") as llm:
        return tokens_of(llm)


def tokens_of(llm: LLM, observe: Any = None) -> list[tuple[int, ...]]:
    outputs = llm.generate(PROMPTS, PARAMS, observe=observe)
    return [out.outputs[0].token_ids for out in outputs]


@contextmanager
def watched() -> Iterator[None]:
    """A hang ends the tests, with what every thread was doing."""
    faulthandler.dump_traceback_later(WATCHDOG_S, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


@contextmanager
def failing(llm: LLM, *faults: Fault) -> Iterator[Faults]:
    """Let a loaded model fail for a while."""
    engine = llm._open_engine()
    before, engine._faults = engine._faults, Faults(faults)
    try:
        with watched():
            yield engine._faults
    finally:
        engine._faults = before


def moments() -> Iterator[int]:
    """The 1st to the 12th time, then each half as late again: to the end of any run."""
    yield from range(1, 13)
    yield from (round(12 * 1.5**power) for power in itertools.count(1))


def assert_as_new(llm: LLM, expected: list[tuple[int, ...]]) -> None:
    """All blocks are free, and the next run is as if nothing had been."""
    pools = llm._open_engine().scheduler.pools
    for pool in filter(None, (*pools.decode, pools.prompts)):
        pool.check_integrity()
        assert pool.num_free == pool.num_blocks
    assert tokens_of(llm) == expected


@pytest.mark.parametrize("point", ["copy", "compute", "cpu", "interrupt", "logits", "memory"])
@pytest.mark.parametrize("name", PLACES)
def test_a_run_that_fails_at_any_moment_loses_nothing(
    model: Path,
    expected: list[tuple[int, ...]],
    name: str,
    point: str,
    request: pytest.FixtureRequest,
) -> None:
    """It fails the first time, the second, and so on, until it passes without a failure."""
    split = (0, 0, 0)
    if name == "two sub-batches":
        split = (0, 1, 1)
        request.getfixturevalue("many_blocks")
    threads = threading.active_count()
    with placed(model, PLACES[name], max_num_seqs=3) as llm, sub_batches_by_hand(split):
        scheduler = llm._open_engine().scheduler
        most = (scheduler.max_num_batched_tokens, scheduler.max_decode_seqs)
        num_failed = 0
        for first in moments():
            with failing(llm, Fault(point=point, first=first, lasts=False)) as faults:
                found = outcome(llm)
            if not faults.fired:
                assert found == expected
                break
            num_failed += 1
            if point == "memory":
                assert found == expected, "a smaller step gives the same tokens"
                # Every moment is to find the engine as it was planned.
                scheduler.max_num_batched_tokens, scheduler.max_decode_seqs = most
            elif point == "logits":
                assert_only_one_failed(found, expected)
            else:
                assert isinstance(found, KeyboardInterrupt | InjectedFaultError)
            assert_as_new(llm, expected)
        assert num_failed or point == "cpu"
    assert threading.active_count() == threads


def outcome(llm: LLM) -> Any:
    """The tokens of a run, or what it raised."""
    try:
        return tokens_of(llm)
    except (InjectedFaultError, KeyboardInterrupt) as error:
        return error


def assert_only_one_failed(found: list[tuple[int, ...]], expected: list[tuple[int, ...]]) -> None:
    """One sequence has less than it should have, all of it right."""
    pairs = list(zip(found, expected, strict=True))
    (short,) = [pair for pair in pairs if pair[0] != pair[1]]
    assert len(short[0]) < len(short[1]) and short[1][: len(short[0])] == short[0]


def test_a_row_of_nan_says_so(model: Path) -> None:
    nan = Fault(point="logits", first=2, lasts=False)
    with placed(model, halves, max_num_seqs=3) as llm, failing(llm, nan):
        outputs = llm.generate(PROMPTS, PARAMS)
    reasons = [(out.outputs[0].finish_reason, out.outputs[0].stop_reason) for out in outputs]
    assert sorted(reasons) == [("error", "numerical_error"), ("length", None), ("length", None)]


@pytest.mark.parametrize("name", ["streamed", "elsewhere"])
def test_memory_that_stays_short_makes_steps_smaller_and_smaller(
    model: Path, expected: list[tuple[int, ...]], name: str
) -> None:
    """Twice for prompts of 34 tokens (17, 8), told and kept for later, and in the plan."""
    seen: list[tuple[str, int]] = []
    told: list[str] = []

    def watch(step: GenerationStep) -> None:
        seen.append((step.result.batch.phase, step.result.batch.shape.num_tokens))
        told.extend(event.text for event in step.result.events)

    with placed(model, PLACES[name], max_num_seqs=3) as llm:
        planned = llm.plan
        with (
            failing(
                llm,
                Fault(point="memory", first=1, lasts=False),
            ) as first,
            watched(),
        ):
            assert tokens_of(llm, watch) == expected
        with failing(llm, Fault(point="memory", first=1, lasts=False)) as second:
            assert tokens_of(llm, watch) == expected
        assert first.fired == second.fired == ["memory"]
        chunk = llm.plan.placement.prefill.max_num_tokens
        assert llm.plan.estimate.ttft_s >= planned.estimate.ttft_s
    assert [max(size for phase, size in seen if phase == "prefill"), chunk] == [17, 8]
    assert told == [
        "a prefill step of 34 tokens ran out of memory: no more than 17 tokens a step from now on",
        "a prefill step of 17 tokens ran out of memory: no more than 8 tokens a step from now on",
    ]


def test_no_memory_for_the_smallest_step_is_an_error_that_says_what_to_do(
    model: Path, expected: list[tuple[int, ...]]
) -> None:
    with placed(model, halves, max_num_seqs=3) as llm:
        with (
            failing(llm, Fault(point="memory", first=1, lasts=True)),
            pytest.raises(MemoryBudgetError, match=r"prefill step of 8 tokens .*--gpu-mem-gb"),
        ):
            tokens_of(llm)
        assert_as_new(llm, expected)


def test_decode_steps_without_memory_have_fewer_sequences_in_turns(
    model: Path, expected: list[tuple[int, ...]]
) -> None:
    """Of three one at a time: none waits for longer than for the two others."""
    order: list[str] = []

    def watch(step: GenerationStep) -> None:
        batch = step.result.batch
        if batch.phase == "decode":
            order.extend(item.sequence.seq_id for item in batch.items)
            assert len(batch.items) == 1

    with placed(model, halves, max_num_seqs=3) as llm:
        prefill = llm._open_engine()._graphs.find("prefill", 34)[1]
        num_passed = sum(op.lane != "cpu" for op in prefill.ops)
        with failing(llm, Fault(point="memory", first=num_passed + 1, lasts=False)) as faults:
            assert tokens_of(llm, watch) == expected
        assert faults.fired
    assert [len(set(order[at : at + 3])) for at in range(3)] == [3, 3, 3]


def test_memory_that_another_program_has_taken_is_told_before_anything_runs(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = threading.active_count()
    monkeypatch.setenv(VARIABLE, "allocate:2")
    with pytest.raises(MemoryBudgetError, match=r"needs .* GB is free now; plan with"):
        LLM(
            model,
            profile=toy_machine(),
            accelerator="emulated",
            strategy="gpu",
            gpu_mem_gb=1,
            workload=Workload(prompt_len=16, output_len=8),
        )
    assert threading.active_count() == threads


@pytest.mark.parametrize("point", ["copy", "compute", "cpu", "interrupt"])
def test_what_fails_while_the_model_warms_up_leaves_no_thread(
    model: Path, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = threading.active_count()
    monkeypatch.setenv(VARIABLE, f"{point}:1")
    with watched(), pytest.raises((InjectedFaultError, KeyboardInterrupt)):
        LLM(
            model,
            profile=toy_machine(),
            accelerator="emulated",
            strategy="split",
            gpu_mem_gb=1,
            workload=Workload(prompt_len=16, output_len=8),
        )
    assert threading.active_count() == threads


@pytest.mark.parametrize("text", ["copy", "copy:", "copy:0", "copy:x", "disk:1", "copy:1,,", ":1"])
def test_what_is_no_fault_is_refused_by_name(text: str) -> None:
    with pytest.raises(UsageError, match="points are allocate, "):
        Faults.parse(text)


def test_faults_are_read_and_fire_when_they_say() -> None:
    faults = Faults.parse(" copy:2+ , logits:1")
    assert [faults.fires("copy") for _ in range(4)] == [False, True, True, True]
    assert [faults.fires("logits") for _ in range(2)] == [True, False]
    assert not any(faults.fires(point) for point in POINTS if point not in ("copy", "logits"))
    assert Faults.parse("").fired == []


def test_a_cache_that_cannot_be_moved_for_want_of_memory_is_moved_again(
    model: Path, expected: list[tuple[int, ...]]
) -> None:
    """Its step is recorded by then, and must not be run again; at the second failure it is told."""
    with placed(model, elsewhere, max_num_seqs=3) as llm:
        prefill = llm._open_engine()._graphs.find("prefill", 34)[1]
        first = sum(op.lane != "cpu" for op in prefill.ops) + 1
        with failing(llm, Fault(point="memory", first=first, lasts=False)) as faults:
            assert tokens_of(llm) == expected
        assert faults.fired
        with (
            failing(llm, Fault(point="memory", first=first, lasts=True)),
            pytest.raises(MemoryBudgetError, match=r"moving the cache of a prompt of \d+ tokens"),
        ):
            tokens_of(llm)
        assert_as_new(llm, expected)
