"""Trial: which placements run, which is kept, and what becomes of one that cannot."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import TracebackType
from typing import Self, cast

import pytest
from msgspec.structs import replace

from hetero import LLM
from hetero.errors import MemoryBudgetError
from hetero.model_lookup import find_model, read_model_spec
from hetero.outputs import Measured
from hetero.planning import make_plan
from hetero.prompts import TokensPrompt
from hetero.sampler import SamplingParams
from hetero.trial import trial
from planner.cost_model import CostModel
from planner.estimate import estimate
from planner.model_spec import ModelSpec
from planner.plan import Plan
from planner.workload import Workload
from tests.machines import toy_machine

SPEC = read_model_spec(find_model())
# 30 MB of accelerator memory: too little for all of the demo model.
MACHINE = toy_machine().with_emulated_gpu(memory_bytes=30_000_000, link_bytes_per_s=4e9)
COSTS = CostModel(MACHINE)
WORKLOAD = Workload(prompt_len=64, output_len=32, num_seqs=2)


def silent(line: str) -> None:
    pass


@dataclass(slots=True)
class FakeLLM:
    """Measures what the cost model says, times `slowdown`. Mutable."""

    plan: Plan
    slowdown: float
    open_plans: list[str]
    spec: ModelSpec = SPEC
    calibrate: bool = True
    measured: Measured | None = None
    recorded: list[Workload] = field(default_factory=list)

    def __enter__(self) -> Self:
        self.open_plans.append(self.plan.placement.name)
        assert len(self.open_plans) == 1, "two models at once in memory"
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.open_plans.clear()

    def generate(self, prompts: list[TokensPrompt], params: SamplingParams) -> None:
        assert params.ignore_eos and params.max_tokens is not None
        (prompt_len,) = {len(prompt["prompt_token_ids"]) for prompt in prompts}
        ran = Workload(prompt_len=prompt_len, output_len=params.max_tokens, num_seqs=len(prompts))
        found = estimate(SPEC, self.plan.placement, COSTS, ran)
        self.measured = Measured(
            ttft_s=self.slowdown * found.ttft_s,
            tpot_s=self.slowdown * found.tpot_s,
            e2e_s=self.slowdown * found.e2e_s,
            prefill_tokens_per_s=found.prefill_tokens_per_s / self.slowdown,
            decode_tokens_per_s=found.decode_tokens_per_s / self.slowdown,
        )
        if self.calibrate:
            self.recorded.append(ran)


class Loader:
    """Loads fakes; `slowdowns` by placement name, 1 where it says nothing. Mutable."""

    def __init__(self, slowdowns: dict[str, float] | None = None, fails: str = "") -> None:
        self.slowdowns = slowdowns or {}
        self.fails = fails.split()
        self.loaded: list[FakeLLM] = []
        self._open_plans: list[str] = []

    def __call__(self, plan: Plan) -> LLM:
        name = plan.placement.name
        if name in self.fails:
            raise MemoryBudgetError(f"{name} needs too much")
        fake = FakeLLM(plan, self.slowdowns.get(name, 1.0), self._open_plans)
        self.loaded.append(fake)
        return cast(LLM, fake)


@pytest.fixture(scope="module")
def plan() -> Plan:
    """A plan that uses both devices, so that all on the CPU is another one."""
    made = make_plan(SPEC, MACHINE, WORKLOAD)
    forced = make_plan(SPEC, MACHINE, WORKLOAD, strategy="split")
    rivals = tuple(other for other in made.alternatives if other.name not in ("split", "cpu"))
    cpu = make_plan(SPEC, MACHINE, WORKLOAD, strategy="cpu")
    baseline = replace(
        rivals[0],
        name="cpu",
        cut_by_phase={"prefill": 0, "decode": 0},
        feasible=True,
        e2e_s=cpu.estimate.e2e_s,
    )
    return replace(forced, alternatives=(*rivals, baseline))


def best_rival(plan: Plan) -> str:
    return next(other.name for other in plan.alternatives if other.feasible)


def test_the_plan_its_best_rival_and_the_simplest_placement_run(plan: Plan) -> None:
    load = Loader()
    found = trial(plan, SPEC, COSTS, load, say=silent)
    assert [llm.plan.placement.name for llm in load.loaded] == ["split", best_rival(plan), "cpu"]
    assert found.trial is not None
    assert [row.name for row in found.trial.rows] == ["split", best_rival(plan), "cpu"]


def test_what_is_measured_as_predicted_has_the_predicted_times_of_the_workload(plan: Plan) -> None:
    """8 of 31 decode steps ran: what was measured of a part is stretched to the whole."""
    found = trial(plan, SPEC, COSTS, Loader(), say=silent).trial
    assert found is not None
    assert found.workload == replace(WORKLOAD, output_len=9)
    for row in found.rows:
        assert row.measured is not None
        assert row.measured.ttft_s == pytest.approx(row.predicted.ttft_s)
        assert row.measured.e2e_s == pytest.approx(row.predicted.e2e_s)
    assert found.rows[0].predicted.e2e_s == pytest.approx(plan.estimate.e2e_s)
    assert found.rows[2].predicted.e2e_s == pytest.approx(plan.alternatives[-1].e2e_s)


def test_the_plan_of_a_rival_is_priced_as_the_search_priced_it(plan: Plan) -> None:
    """Its placement is built from a name and two cuts; its price proves that it is the same."""
    load = Loader()
    trial(plan, SPEC, COSTS, load, say=silent)
    rival = next(other for other in plan.alternatives if other.feasible)
    assert load.loaded[1].plan.estimate.e2e_s == pytest.approx(rival.e2e_s)
    assert load.loaded[1].plan.placement.name == rival.name


def test_a_slower_plan_gives_way_to_the_fastest_as_measured(plan: Plan) -> None:
    slow = {"split": 50.0, best_rival(plan): 50.0}
    found = trial(plan, SPEC, COSTS, Loader(slow), say=silent)
    assert found.trial is not None and found.trial.kept == "cpu"
    assert found.placement.name == "cpu"
    assert found.alternatives[0].name == "split"
    assert found.alternatives[0].e2e_s == plan.estimate.e2e_s
    assert "cpu" not in [other.name for other in found.alternatives]
    assert len(found.alternatives) == len(plan.alternatives)


def test_a_plan_that_is_the_fastest_as_measured_stands(plan: Plan) -> None:
    slow = {best_rival(plan): 50.0, "cpu": 50.0}
    found = trial(plan, SPEC, COSTS, Loader(slow), say=silent)
    assert replace(found, trial=None) == plan
    assert found.trial is not None and found.trial.kept == "split"


def test_a_placement_that_does_not_load_is_told_of_and_skipped(plan: Plan) -> None:
    said: list[str] = []
    found = trial(plan, SPEC, COSTS, Loader(fails="split"), say=said.append)
    assert found.trial is not None
    assert found.trial.rows[0].failure == "split needs too much"
    assert found.trial.rows[0].measured is None
    assert found.placement.name != "split"
    assert "warning: split could not be run: split needs too much" in said


def test_where_nothing_can_be_run_every_reason_is_given(plan: Plan) -> None:
    fails = f"split {best_rival(plan)} cpu"
    with pytest.raises(MemoryBudgetError, match=r"split needs too much.*cpu needs too much"):
        trial(plan, SPEC, COSTS, Loader(fails=fails), say=silent)


def test_a_plan_without_rivals_is_tried_alone_and_that_is_said(plan: Plan) -> None:
    said: list[str] = []
    load = Loader()
    found = trial(replace(plan, alternatives=()), SPEC, COSTS, load, say=said.append)
    assert said[0] == "split is the only placement that fits; it is tried alone"
    assert len(load.loaded) == 1
    assert found.trial is not None and found.trial.kept == "split"


def test_only_the_measured_part_is_recorded(plan: Plan) -> None:
    """What warms up is the same prompts, and no part of the calibration log."""
    load = Loader()
    trial(plan, SPEC, COSTS, load, say=silent)
    assert all(llm.recorded == [replace(WORKLOAD, output_len=9)] for llm in load.loaded)
    assert all(llm.calibrate for llm in load.loaded)


def test_a_long_prompt_is_cut_to_one_prefill_step_of_a_few_seconds(plan: Plan) -> None:
    """On a CPU a million times slower 32 tokens are the shortest that is tried."""
    four = Workload(prompt_len=600, output_len=4, num_seqs=4)
    long = replace(plan, workload=four, estimate=replace(plan.estimate, num_concurrent_seqs=4))
    chunked = trial(long, SPEC, COSTS, Loader(), say=silent).trial
    chunk_tokens = plan.placement.prefill.max_num_tokens
    assert chunked is not None and chunked.workload.prompt_len == min(600, chunk_tokens // 4)
    cpu = replace(
        MACHINE.cpu,
        read_bytes_per_s=1e4,
        flop_per_s={kind: rate / 1e6 for kind, rate in MACHINE.cpu.flop_per_s.items()},
    )
    slow = CostModel(replace(MACHINE, cpu_by_threads=(cpu,)))
    short = trial(plan, SPEC, slow, Loader(), say=silent).trial
    assert short is not None and short.workload.prompt_len == 32


def load_for_real(plan: Plan) -> LLM:
    return LLM(plan=plan, profile=toy_machine(), max_model_len=24)


def test_real_models_run_one_after_the_other() -> None:
    """The demo model, on the CPU and on the emulated accelerator."""
    machine = toy_machine().with_emulated_gpu(memory_bytes=10**9, link_bytes_per_s=4e9)
    workload = Workload(prompt_len=16, output_len=4)
    made = make_plan(SPEC, machine, workload)
    found = trial(made, SPEC, CostModel(machine), load_for_real, say=silent)
    assert found.trial is not None and len(found.trial.rows) >= 2
    times = {row.name: row.measured.e2e_s for row in found.trial.rows if row.measured is not None}
    assert len(times) == len(found.trial.rows)
    assert found.trial.kept == min(times, key=lambda name: times[name])
    assert found.placement.name == found.trial.kept
