"""Steps of running plans: what benchmarks of whole placements share."""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from hetero import LLM, SamplingParams
from hetero.api import GenerationStep
from hetero.measure.store import write_atomically
from hetero.outputs import Measured
from planner.cost_model import CostModel
from planner.estimate import estimate
from planner.memory import needs
from planner.model_spec import ModelSpec
from planner.placement import Placement
from planner.plan import Plan
from planner.search import search
from planner.step_graph import StepGraph
from planner.timeline import Timeline
from planner.workload import BatchShape, Phase, Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredStep:
    """A step as it ran; `wall_s` is from the end of the one before it to its own."""

    graph: StepGraph
    shape: BatchShape
    timeline: Timeline
    wall_s: float

    @property
    def phase(self) -> Phase:
        return self.shape.phase


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One call of `generate`: its steps, its times, its tokens by prompt."""

    steps: tuple[MeasuredStep, ...]
    measured: Measured
    token_ids: tuple[tuple[int, ...], ...]


def random_prompts(spec: ModelSpec, workload: Workload, seed: int) -> list[Any]:
    """Prompts of a workload, the same for the same seed."""
    draw = random.Random(seed)
    return [
        {"prompt_token_ids": draw.choices(range(3, spec.vocab_size), k=workload.prompt_len)}
        for _ in range(workload.num_seqs)
    ]


def run(llm: LLM, prompts: Sequence[Any], output_len: int) -> Run:
    """Generate greedily and keep every step."""
    steps: list[MeasuredStep] = []
    begin_s = time.perf_counter()

    def observe(step: GenerationStep) -> None:
        nonlocal begin_s
        end_s, result = time.perf_counter(), step.result
        steps.append(
            MeasuredStep(
                graph=result.graph,
                shape=result.batch.shape,
                timeline=result.timeline,
                wall_s=end_s - begin_s,
            )
        )
        begin_s = end_s

    params = SamplingParams(max_tokens=output_len, temperature=0.0, ignore_eos=True)
    outputs = llm.generate(list(prompts), params, observe=observe)
    assert llm.measured is not None
    tokens = tuple(out.outputs[0].token_ids for out in outputs)
    return Run(steps=tuple(steps), measured=llm.measured, token_ids=tokens)


def plan_of(spec: ModelSpec, costs: CostModel, placement: Placement, workload: Workload) -> Plan:
    """A plan of a placement that was not searched for."""
    plan = search(spec, costs.hardware, workload, strategy="cpu")
    memory = needs(spec, placement, plan.wave, costs.hardware)
    found = estimate(spec, placement, costs, workload, memory)
    return replace(plan, placement=placement, estimate=found)


def write(document: Mapping[str, Any], output: Path | None) -> None:
    """Keep what is there so far: a run that is cut off has its rows."""
    if output is not None:
        data = json.dumps(document, indent=1).encode() + b"\n"
        write_atomically(output, data, is_private=False)


def names_only(argv: Sequence[str], path_options: Sequence[str]) -> list[str]:
    """A command without folders: where files lie on this machine is nobody's business."""
    parts = []
    for before, argument in pairwise(["", *argv]):
        option, equals, value = argument.partition("=")
        if before in path_options:
            parts.append(Path(argument).name)
        elif equals and option in path_options:
            parts.append(f"{option}={Path(value).name}")
        else:
            parts.append(argument)
    return parts


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
