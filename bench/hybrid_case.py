"""One model under one GPU budget: every placement is loaded once and runs all its workloads."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from bench.by_accelerate import AccelerateModel, median_times, why_not
from bench.measured_steps import MeasuredStep, random_prompts, run
from hetero import LLM
from hetero.errors import HeteroError
from hetero.model_lookup import find_model, read_model_spec
from hetero.planning import lacking_memory, make_plan, usable_hardware
from planner.cost_model import CostModel, copy_bytes, sub_batch_shape
from planner.hardware import AcceleratorName, HardwareProfile, Resources
from planner.model_spec import Dtype, ModelSpec
from planner.plan import Plan
from planner.step_graph import Lane, Op
from planner.workload import PHASES, BatchShape, Phase, Workload

CHOSEN = "chosen"
ACCELERATE = "accelerate"
STRATEGIES = ("offload", "experts-on-cpu", "split", "gpu", "cpu")
ROW_KEYS = (
    "model",
    "budget_share",
    "workload",
    "placement",
    "chosen",
    "predicted_ttft_s",
    "ttft_s",
    "predicted_tpot_s",
    "tpot_s",
    "tokens_per_s",
    "overlap",
)
# Seconds that a first load takes for each GB of weights, until one was seen.
LOAD_S_PER_GB = 1.0

Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What one process does; `placements` in this order, all before `end_s` (`time.time`)."""

    model: str
    folder: str
    profile: str
    accelerator: AcceleratorName
    budget_share: float
    workloads: tuple[tuple[int, int, int], ...]
    placements: tuple[str, ...]
    repetitions: int
    end_s: float
    dtype: Dtype | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """A placement, and the plans (one a workload) that have it."""

    name: str
    plans: tuple[Plan, ...]

    @property
    def carrier(self) -> Plan:
        """The plan with room for all of them."""
        return max(self.plans, key=lambda plan: plan.workload.num_seqs * plan.workload.context_len)


def workload_of(numbers: tuple[int, int, int]) -> Workload:
    num_seqs, prompt_len, output_len = numbers
    return Workload(prompt_len=prompt_len, output_len=output_len, num_seqs=num_seqs)


def workload_name(workload: Workload) -> str:
    return f"{workload.num_seqs} x {workload.prompt_len}+{workload.output_len}"


def measure(task: Task) -> Iterator[Row]:
    """Rows of a task, each as soon as it is there; what has no times says why in `left_out`."""
    profile = HardwareProfile.load(Path(task.profile))
    spec = read_model_spec(find_model(task.folder), task.dtype)
    budget_bytes = int(task.budget_share * spec.total_weight_bytes())
    done: dict[bytes, dict[str, Row]] = {}
    for name in task.placements:
        yield {"asked": name, "begins": True}
        if name == ACCELERATE:
            yield from _accelerate_rows(task, spec, profile, budget_bytes)
            continue
        resources = Resources(accelerator="none")
        if name != "cpu":
            resources = Resources(accelerator=task.accelerator, gpu_bytes=budget_bytes)
        plans: list[Plan] = []
        for numbers in task.workloads:
            try:
                hardware = usable_hardware(profile, resources)
                strategy = None if name == CHOSEN else name
                begin_s = time.perf_counter()
                plan = make_plan(spec, hardware, workload_of(numbers), strategy=strategy)
                plan_s = time.perf_counter() - begin_s
                lacking = lacking_memory(plan, spec, hardware)
            except HeteroError as error:
                yield _left_out(task, name, workload_of(numbers), str(error))
                continue
            if lacking is not None:
                yield _left_out(task, name, workload_of(numbers), lacking, plan)
            elif (known := done.get(_key(plan), {}).get(workload_name(plan.workload))) is not None:
                # Where two names stand for one placement it runs once.
                yield {
                    **known,
                    **_labels(task, name, plan.workload, plan),
                    "same_as": known["asked"],
                }
            else:
                plans.append(plan)
                if name == CHOSEN:
                    yield {"asked": name, "planned": plan.placement.name, "plan_s": plan_s}
        for group in _groups(name, plans):
            for row in _rows_of(task, spec, group):
                if "left_out" not in row:
                    done.setdefault(_key(group.plans[0]), {})[row["workload"]] = row
                yield row


def _key(plan: Plan) -> bytes:
    """What plans share that run the same: the placement, and what of the machine they use."""
    return repr((plan.placement, plan.resources)).encode()


def _groups(name: str, plans: Sequence[Plan]) -> list[_Group]:
    found: dict[bytes, list[Plan]] = {}
    for plan in plans:
        found.setdefault(_key(plan), []).append(plan)
    return [_Group(name=name, plans=tuple(each)) for each in found.values()]


def _rows_of(task: Task, spec: ModelSpec, group: _Group) -> Iterator[Row]:
    """Load a placement and run its workloads, those that there is time for."""
    runs = task.repetitions + 1
    load_s = LOAD_S_PER_GB * spec.total_weight_bytes() / 1e9
    first_s = min(plan.estimate.e2e_s for plan in group.plans)
    if time.time() + load_s + runs * first_s > task.end_s:
        for plan in group.plans:
            yield _left_out(task, group.name, plan.workload, "there is no time left", plan)
        return
    begin_s = time.perf_counter()
    try:
        llm = LLM(
            task.folder,
            plan=group.carrier,
            profile=task.profile,
            calibrate=False,
            max_num_seqs=group.carrier.workload.num_seqs,
            max_model_len=max(plan.workload.context_len for plan in group.plans),
        )
    except HeteroError as error:
        for plan in group.plans:
            yield _left_out(task, group.name, plan.workload, str(error), plan)
        return
    load_s = time.perf_counter() - begin_s
    with llm:
        for plan in group.plans:
            if time.time() + runs * plan.estimate.e2e_s > task.end_s:
                yield _left_out(task, group.name, plan.workload, "there is no time left", plan)
                continue
            try:
                yield {**_row(task, llm, group.name, plan), "load_s": load_s}
            except HeteroError as error:
                yield _left_out(task, group.name, plan.workload, str(error), plan)
    gc.collect()


def _row(task: Task, llm: LLM, name: str, plan: Plan) -> Row:
    """Run a workload, after a short run that loads code."""
    workload = plan.workload
    run(llm, random_prompts(llm.spec, workload, 0), min(2, workload.output_len))
    runs = [
        run(llm, random_prompts(llm.spec, workload, seed), workload.output_len)
        for seed in range(1, task.repetitions + 1)
    ]
    assert llm.predicted is not None
    steps = [step for each in runs for step in each.steps]
    ttft_s = median(each.measured.ttft_s for each in runs)
    tpot_s = median(each.measured.tpot_s for each in runs)
    rates, ceilings = lane_rates(steps, llm.spec, CostModel(llm.hardware)), ceilings_of(llm)
    return {
        **_labels(task, name, workload, plan),
        "predicted_ttft_s": llm.predicted.ttft_s,
        "ttft_s": ttft_s,
        "predicted_tpot_s": llm.predicted.tpot_s,
        "tpot_s": tpot_s,
        "tokens_per_s": median(each.measured.decode_tokens_per_s for each in runs),
        "overlap": _overlap(steps, "decode"),
        "prefill_overlap": _overlap(steps, "prefill"),
        "prefill_tokens_per_s": median(each.measured.prefill_tokens_per_s for each in runs),
        "e2e_s": median(each.measured.e2e_s for each in runs),
        "predicted_e2e_s": llm.predicted.e2e_s,
        "gpu_bytes": llm.device_bytes().get("gpu", 0),
        "bytes_per_s": rates,
        "ceiling_bytes_per_s": ceilings,
        "token_ids": [list(each) for each in runs[-1].token_ids],
    }


def _labels(task: Task, name: str, workload: Workload, plan: Plan | None) -> Row:
    placement = None if plan is None else plan.placement
    return {
        "model": task.model,
        "budget_share": 0.0 if name == "cpu" else task.budget_share,
        "workload": workload_name(workload),
        "placement": name if placement is None or name != CHOSEN else placement.name,
        "asked": name,
        "chosen": name == CHOSEN,
        "cut": None
        if placement is None
        else {phase: placement.tier(phase).cut for phase in PHASES},
    }


def _left_out(task: Task, name: str, workload: Workload, why: str, plan: Plan | None = None) -> Row:
    """A row without times, and the reason."""
    empty = dict.fromkeys(ROW_KEYS)
    return {**empty, **_labels(task, name, workload, plan), "left_out": why}


def _overlap(steps: Sequence[MeasuredStep], phase: Phase) -> float | None:
    """The median share of a step's work that is hidden."""
    found = [step.timeline.overlap() for step in steps if step.phase == phase]
    return median(found) if found else None


def ceilings_of(llm: LLM) -> dict[Lane, float]:
    """The rate that was measured of each lane's memory or link."""
    hardware = llm.hardware
    found: dict[Lane, float] = {"cpu": hardware.cpu.read_bytes_per_s}
    if hardware.gpu is not None and hardware.link is not None:
        found["gpu"] = hardware.gpu.read_bytes_per_s
        found["h2d"] = hardware.link.h2d_bytes_per_s
        found["d2h"] = hardware.link.d2h_bytes_per_s
    return found


def lane_rates(
    steps: Sequence[MeasuredStep], spec: ModelSpec, costs: CostModel
) -> dict[Phase, dict[Lane, float]]:
    """Bytes over seconds of the ops of each lane that move weights or caches, by phase.

    Bytes of experts are of those that tokens are expected to choose, as they were priced; copies of
    hidden states and the like, which are small, do not count for `h2d`. In prefill lanes that
    compute do more with each byte, and their rates say little: those of copies only.
    """
    found: dict[Phase, dict[Lane, float]] = {}
    for phase in PHASES:
        rates: dict[Lane, list[float]] = {}
        for step in steps:
            if step.phase != phase:
                continue
            moved: dict[Lane, tuple[float, float]] = {}
            for span in step.timeline.spans:
                num_bytes = op_bytes(span.op, spec, costs, step.shape)
                if num_bytes and (phase == "decode" or span.op.kind == "copy"):
                    before = moved.get(span.op.lane, (0.0, 0.0))
                    moved[span.op.lane] = (before[0] + num_bytes, before[1] + span.seconds)
            for lane, (num_bytes, seconds) in moved.items():
                if seconds > 0:
                    rates.setdefault(lane, []).append(num_bytes / seconds)
        found[phase] = {lane: median(each) for lane, each in rates.items()}
    return found


def op_bytes(op: Op, spec: ModelSpec, costs: CostModel, shape: BatchShape) -> float:
    """Bytes of weights and caches that an op reads or copies; 0 where these are not its work."""
    if op.sub_batch is not None:
        shape = sub_batch_shape(op, shape)
    if op.kind == "copy":
        if op.part == "fetched":
            assert op.layer is not None
            return costs.expert_load(op, spec, shape).distinct * spec.expert_bytes(op.layer)
        return copy_bytes(op, spec, shape) if op.payload == "weights" else 0.0
    if op.kind == "head":
        return float(spec.weight_bytes("head"))
    if op.layer is None:
        return 0.0
    if op.kind == "experts":
        return costs.expert_load(op, spec, shape).distinct * spec.expert_bytes(op.layer)
    cached = shape.num_seqs * shape.num_past_tokens * spec.kv_bytes_per_token(op.layer)
    if op.kind in ("attention", "qkv"):
        weights = spec.weight_bytes("attention", op.layer)
        return weights + (cached if op.kind == "attention" else 0.0)
    if op.kind == "attend":
        return cached
    if op.kind == "dense":
        if op.part == "all":
            return float(spec.weight_bytes("dense", op.layer))
        resident, missed = spec.part_bytes("dense", op.layer, op.num_resident)
        return float(resident if op.part == "resident" else missed)
    return 0.0


def _accelerate_rows(
    task: Task, spec: ModelSpec, profile: HardwareProfile, budget_bytes: int
) -> Iterator[Row]:
    """The same workloads by accelerate, whose budget is for weights alone."""
    why: str | None = why_not()
    if why is None and time.time() + LOAD_S_PER_GB * spec.total_weight_bytes() / 1e9 > task.end_s:
        why = "there is no time left"
    model = None
    if why is None:
        try:
            model = AccelerateModel(
                Path(task.folder),
                budget_bytes=budget_bytes,
                host_bytes=profile.cpu.memory_bytes,
            )
        except (ValueError, RuntimeError) as error:
            why = str(error)
    for numbers in task.workloads:
        workload = workload_of(numbers)
        row = _left_out(task, ACCELERATE, workload, why or "")
        if model is None or time.time() > task.end_s:
            yield {**row, "left_out": why or "there is no time left"}
            continue
        prompts = [each["prompt_token_ids"] for each in random_prompts(spec, workload, 1)]
        try:
            times = median_times(
                [
                    model.generate(prompts, output_len=workload.output_len)
                    for _ in range(task.repetitions)
                ]
            )
        except (ValueError, RuntimeError) as error:
            yield {**row, "left_out": str(error)}
            continue
        del row["left_out"]
        yield {
            **row,
            "ttft_s": times.ttft_s,
            "tpot_s": times.tpot_s,
            "tokens_per_s": workload.num_seqs / times.tpot_s,
            "e2e_s": times.ttft_s + (workload.output_len - 1) * times.tpot_s,
        }
    if model is not None:
        model.close()
