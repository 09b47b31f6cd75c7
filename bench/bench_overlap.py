"""Is a step whose lanes work at once as much faster as the simulator says?

An MoE of 0.9 B parameters with random weights, on the emulated accelerator: with two cores its
compute has one to itself, and the CPU's lane one thread. Every placement runs with its lanes at
once and one op at a time, in turn in one process; beside the ratio of the two stand what was
predicted and two replays of measured op seconds, which tell apart what may differ: the prices of
ops, what lanes cost each other while both work, and what the executor adds. All-CPU on both cores,
and on one, is there to compare; `other_cores` is what else kept the machine busy meanwhile. What
would change our mind: a measured ratio more than 10 % away from the predicted one, or no placement
that is faster than both all-CPU and everything streamed to the accelerator.

    python bench/bench_overlap.py [--quick] [--check] [--placements A,B] [--repetitions 2]
                                  [--profile FILE] [--models DIR] [--output FILE]

Prints JSON to stdout, a table to stderr. Seconds are of a step's ops, from the first to the last.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

# As a script it finds only its own folder.
sys.path.insert(0, str(Path(__file__).parents[1]))

from msgspec.structs import replace

from bench.make_model import make_model
from bench.measured_steps import (
    MeasuredStep,
    Run,
    names_only,
    plan_of,
    random_prompts,
    run,
    say,
    write,
)
from cpu_kernels.threads import available_cores
from hetero import LLM
from hetero.measure.busy import OtherProcesses
from hetero.measure.fingerprint import cpu_model
from hetero.measure.store import default_cache_dir
from hetero.model_lookup import find_model, read_model_spec
from hetero.planning import base_profile, usable_hardware
from planner import strategies
from planner.backends import cpu_backends
from planner.cost_model import Backends, CostModel, Pricer
from planner.hardware import HardwareProfile, Resources
from planner.model_spec import Dtype, ModelSpec
from planner.placement import NUM_STREAM_BUFFERS, ModulePlacement, Placement, TierPlacement
from planner.simulate import makespan_s, simulate
from planner.step_graph import Lane, Op, StepGraph
from planner.workload import PHASES, Phase, Workload

# Like OLMoE, scaled down: 0.92 B parameters, of which a token uses 0.2 B.
MODEL = {
    "architectures": ["OlmoeForCausalLM"],
    "model_type": "olmoe",
    "vocab_size": 16000,
    "hidden_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "intermediate_size": 512,
    "norm_topk_prob": False,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}
QUICK_LAYERS = 4
PATH_OPTIONS = ("--profile", "--models", "--output")
CHECKED_TOKENS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A placement to run: how it is made, and with how many sequences at once."""

    make: Callable[[ModelSpec, int], Placement]
    is_for_one: bool = True
    times_prompt_tokens: int = 1


def named(strategy: str, share: float) -> Case:
    """A named strategy, cut after a share of the layers."""
    return Case(
        make=lambda spec, num_seqs: strategies.placement(
            spec, strategy, math.ceil(share * spec.num_layers)
        )
    )


def mixed(runs: Any, resident_share: float) -> Case:
    """A share of every layer's experts resident on the GPU; the others run another way."""

    def tier(spec: ModelSpec, base: TierPlacement) -> TierPlacement:
        num_experts = max(layer.num_experts for layer in spec.layers)
        where = ModulePlacement(
            lives="cpu", runs=runs, num_resident=round(resident_share * num_experts)
        )
        num_slots = NUM_STREAM_BUFFERS * num_experts if runs == "split" else 0
        layers = tuple(replace(layer, ffn=where) for layer in base.layers)
        return replace(base, strategy="mixed", layers=layers, num_expert_slots=num_slots)

    def make(spec: ModelSpec, num_seqs: int) -> Placement:
        whole = strategies.placement(spec, "gpu", 0)
        return Placement(prefill=tier(spec, whole.prefill), decode=tier(spec, whole.decode))

    return Case(make=make)


def sub_batches(experts: str) -> Case:
    """Half of the sequences are a second sub-batch, whose caches are on the CPU (NEO)."""

    def make(spec: ModelSpec, num_seqs: int) -> Placement:
        whole = strategies.placement(spec, "gpu", 0)
        if experts == "cpu":
            whole = strategies.placement(spec, "experts-on-cpu", spec.num_layers)
        prefill, decode = (replace(tier, strategy="mixed", cut=0) for tier in whole.tiers)
        return Placement(prefill=prefill, decode=replace(decode, num_second_seqs=num_seqs // 2))

    # The longer the contexts, the more there is to hide.
    return Case(make=make, is_for_one=False, times_prompt_tokens=4)


# `cpu` runs without an accelerator on both cores, `cpu-one-core` on one.
ALONE = ("cpu", "cpu-one-core")
CASES: dict[str, Case] = {
    "gpu": named("gpu", 0.0),
    "offload-all": named("offload", 1.0),
    "offload": named("offload", 0.5),
    "split": named("split", 0.5),
    "experts-on-cpu": named("experts-on-cpu", 1.0),
    "experts-beside": mixed("cpu", 0.5),
    "experts-split": mixed("split", 0.25),
    "sub-batches": sub_batches("gpu"),
    "sub-batches-experts-on-cpu": sub_batches("cpu"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="4 layers, short prompts, one run")
    parser.add_argument("--check", action="store_true", help="tokens equal to all-CPU, in float32")
    parser.add_argument("--placements", metavar="A,B", help=f"of {', '.join((*ALONE, *CASES))}")
    parser.add_argument("--repetitions", type=int, help="runs of each (default: 2, with --quick 1)")
    parser.add_argument("--batches", default="1,8", metavar="A,B", help="sequences that decode")
    parser.add_argument(
        "--prompt-tokens", type=int, help="of all sequences (default: 128, with --quick 64)"
    )
    parser.add_argument("--output-len", type=int, help="tokens (default: 11, with --quick 5)")
    parser.add_argument("--profile", help="of this machine; the stored one, or measured")
    parser.add_argument("--models", type=Path, help="keep the model here, or use that there")
    parser.add_argument("--output", type=Path, help="keep the rows so far here, too")
    args = parser.parse_args()
    chosen = (*ALONE, *CASES) if args.placements is None else tuple(args.placements.split(","))
    unknown = [name for name in chosen if name not in (*ALONE, *CASES)]
    if unknown:
        parser.error(f"--placements: {unknown[0]} is not one of {', '.join((*ALONE, *CASES))}")
    profile = base_profile(args.profile, default_cache_dir(os.environ), say)
    with tempfile.TemporaryDirectory(prefix="hetero-bench-") as folder:
        num_layers = QUICK_LAYERS if args.quick else MODEL["num_hidden_layers"]
        model = (args.models or Path(folder)) / f"overlap-{num_layers}"
        make_model(model, {**MODEL, "num_hidden_layers": num_layers})
        bench = Bench(
            model=model,
            profile=profile,
            repetitions=args.repetitions or (1 if args.quick else 2),
            prompt_tokens=args.prompt_tokens or (64 if args.quick else 128),
            output_len=args.output_len or (5 if args.quick else 11),
            batches=tuple(int(each) for each in args.batches.split(",")),
        )
        command = ["python", "bench/bench_overlap.py", *names_only(sys.argv[1:], PATH_OPTIONS)]
        document = report(bench, chosen, command, output=args.output)
        if args.check:
            document["check"] = {
                name: equals_cpu(bench, CASES[name]) for name in chosen if name in CASES
            }
            write(document, args.output)
    print(json.dumps(document, indent=2))


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What all placements share."""

    model: Path
    profile: HardwareProfile
    repetitions: int
    prompt_tokens: int
    output_len: int
    batches: tuple[int, ...]

    def workload(self, num_seqs: int, case: Case | None = None) -> Workload:
        """The same number of prompt tokens, whatever the number of sequences."""
        tokens = self.prompt_tokens * (1 if case is None else case.times_prompt_tokens)
        return Workload(
            prompt_len=max(1, tokens // num_seqs), output_len=self.output_len, num_seqs=num_seqs
        )

    def max_model_len(self, case: Case | None = None) -> int:
        return self.workload(min(self.batches), case).context_len


def report(
    bench: Bench, names: Sequence[str], command: list[str], *, output: Path | None
) -> dict[str, Any]:
    """Rows of every placement, written as they come."""
    document: dict[str, Any] = {
        "question": __doc__.partition("\n")[0],
        "environment": {
            "cpu": cpu_model(),
            "cores": available_cores(),
            "accelerator": "emulated",
            "profile": {
                "name": bench.profile.name,
                "measured_at": bench.profile.measured_at,
                "confidence": bench.profile.confidence,
            },
        },
        "command": command,
        "workload": {"prompt_tokens": bench.prompt_tokens, "output_len": bench.output_len},
        "rows": [],
    }
    say(f"{'':32} {'at once':>9} {'in turn':>9} ratio  predicted  replayed  executor  others")
    for name in names:
        rows = alone_rows(bench, name) if name in ALONE else rows_of(bench, name, CASES[name])
        document["rows"] += rows
        document["verdict"] = verdict(document["rows"])
        write(document, output)
    for line in document["verdict"]["lines"]:
        say(line)
    return document


def rows_of(bench: Bench, name: str, case: Case) -> list[dict[str, Any]]:
    """A placement: a row for prefill, and one for decode by each number of sequences."""
    rows: list[dict[str, Any]] = []
    with both_ways(bench, case, max(bench.batches)) as (at_once, in_turn):
        spec, costs = at_once.spec, CostModel(at_once.hardware)
        backends = cpu_backends(spec, costs, at_once.plan.wave)
        for num_seqs in bench.batches:
            if num_seqs == 1 and not case.is_for_one:
                continue
            others = OtherProcesses()
            runs = interleaved(bench, at_once, in_turn, bench.workload(num_seqs, case))
            busy = others.found()
            ones, turns = (list(each) for each in zip(*runs, strict=True))
            for phase in PHASES:
                found = compared(
                    steps_of(ones, phase), steps_of(turns, phase), spec, costs, backends
                )
                equal = all(one.token_ids == other.token_ids for one, other in runs)
                key = {"placement": name, "phase": phase, "batch": num_seqs}
                meanwhile = {"other_cores": busy.other_cores, "stolen_cores": busy.stolen_cores}
                rows.append({**key, "tokens_equal": equal, **found, **meanwhile})
                tell(rows[-1])
    return rows


@contextlib.contextmanager
def both_ways(bench: Bench, case: Case, num_seqs: int, **options: Any) -> Iterator[tuple[LLM, LLM]]:
    """The model under a placement, its lanes at once and in turn."""
    hardware = usable_hardware(bench.profile, Resources(accelerator="emulated"))
    dtype: Dtype | None = options.get("dtype")
    spec = read_model_spec(find_model(str(bench.model)), dtype)
    workload = bench.workload(num_seqs, case)
    plan = plan_of(spec, CostModel(hardware), case.make(spec, num_seqs), workload)
    common: dict[str, Any] = {
        "plan": plan,
        "profile": bench.profile,
        "calibrate": False,
        "max_num_seqs": num_seqs,
        "max_model_len": bench.max_model_len(case),
        **options,
    }
    with (
        LLM(bench.model, **common) as at_once,
        LLM(bench.model, overlap=False, **common) as in_turn,
    ):
        yield at_once, in_turn


def interleaved(
    bench: Bench, at_once: LLM, in_turn: LLM, workload: Workload
) -> list[tuple[Run, Run]]:
    """The same prompts both ways, after a run of each that loads code."""
    runs = []
    for seed in range(bench.repetitions + 1):
        prompts = random_prompts(at_once.spec, workload, seed)
        output_len = workload.output_len if seed else 2
        runs.append((run(at_once, prompts, output_len), run(in_turn, prompts, output_len)))
    return runs[1:]


def steps_of(runs: Sequence[Run], phase: Phase) -> list[MeasuredStep]:
    """Steps of a phase that have the most common graph and number of tokens."""
    steps = [step for each in runs for step in each.steps if step.phase == phase]
    kinds = Counter((id(step.graph), step.shape.num_tokens) for step in steps)
    ((kind, _),) = kinds.most_common(1)
    return [step for step in steps if (id(step.graph), step.shape.num_tokens) == kind]


def compared(
    at_once: Sequence[MeasuredStep],
    in_turn: Sequence[MeasuredStep],
    spec: ModelSpec,
    costs: CostModel,
    backends: Backends,
) -> dict[str, Any]:
    """Measured, predicted and replayed seconds of a step; ratios are at once over in turn.

    `replayed_ratio` has op seconds as measured one at a time, and the slowdowns that the simulator
    knows: it differs from the predicted one by the prices of ops. `ideal_s` has them as measured at
    once: what a step takes beyond it is the executor's.
    """
    graph = at_once[0].graph
    shape = at_once[len(at_once) // 2].shape
    prices = Pricer(spec, costs, shape, backends)
    alone, together = op_seconds(in_turn), op_seconds(at_once)
    priced = [prices(op) for op in graph.ops]
    overlap_s = median(step.timeline.makespan_s for step in at_once)
    in_turn_s = median(step.timeline.makespan_s for step in in_turn)
    predicted_s = makespan_s(graph, prices, costs.slowdowns)
    ideal_s = makespan_s(graph, by_op(together))
    return {
        "num_steps": len(at_once),
        "overlap_s": overlap_s,
        "in_turn_s": in_turn_s,
        "measured_ratio": overlap_s / in_turn_s,
        "predicted_s": predicted_s,
        "predicted_in_turn_s": sum(priced),
        "predicted_ratio": predicted_s / sum(priced),
        "predicted_ratio_undisturbed": makespan_s(graph, prices) / sum(priced),
        "replayed_ratio": makespan_s(graph, by_op(alone), costs.slowdowns) / sum(alone),
        "replayed_ratio_undisturbed": makespan_s(graph, by_op(alone)) / sum(alone),
        "ideal_s": ideal_s,
        "executor_share": overlap_s / ideal_s - 1,
        "executor_share_in_turn": in_turn_s / sum(alone) - 1,
        "overlap": median(step.timeline.overlap() for step in at_once),
        "predicted_overlap": simulate(graph, prices, costs.slowdowns).overlap(),
        "slowdowns": slowdowns(graph, alone, together),
        "ops": ops_by_kind(graph, priced, alone, together),
    }


def op_seconds(steps: Sequence[MeasuredStep]) -> list[float]:
    """Median seconds of every op of a graph."""
    return [
        median(step.timeline.spans[index].seconds for step in steps)
        for index in range(len(steps[0].graph.ops))
    ]


def by_op(seconds: Sequence[float]) -> Callable[[Op], float]:
    return lambda op: seconds[op.index]


def slowdowns(
    graph: StepGraph, alone: Sequence[float], together: Sequence[float]
) -> dict[Lane, float]:
    """How many times as long the ops of each lane take with all lanes at once."""
    found: dict[Lane, float] = {}
    for lane in graph.lanes:
        ops = [op.index for op in graph.lane(lane)]
        found[lane] = sum(together[at] for at in ops) / sum(alone[at] for at in ops)
    return found


def ops_by_kind(
    graph: StepGraph,
    priced: Sequence[float],
    alone: Sequence[float],
    together: Sequence[float],
) -> dict[str, dict[str, float]]:
    """Seconds of a step's ops by lane and kind: predicted, in turn, at once."""
    found: dict[str, dict[str, float]] = {}
    for op in graph.ops:
        name = op.kind if op.payload is None else f"copy {op.payload}"
        part = "" if op.part == "all" else f" {op.part}"
        row = found.setdefault(
            f"{op.lane} {name}{part}",
            {"count": 0, "predicted_s": 0.0, "in_turn_s": 0.0, "overlap_s": 0.0},
        )
        row["count"] += 1
        row["predicted_s"] += priced[op.index]
        row["in_turn_s"] += alone[op.index]
        row["overlap_s"] += together[op.index]
    return found


def alone_rows(bench: Bench, name: str) -> list[dict[str, Any]]:
    """All-CPU, on all cores or on one: what an accelerator is to be faster than."""
    profile = bench.profile.without_gpu()
    if name == "cpu-one-core":
        profile = replace(profile, num_threads=1)
    rows: list[dict[str, Any]] = []
    with LLM(
        bench.model,
        profile=profile,
        accelerator="none",
        workload=bench.workload(max(bench.batches)),
        calibrate=False,
        max_num_seqs=max(bench.batches),
        max_model_len=bench.max_model_len(),
    ) as llm:
        costs = CostModel(llm.hardware)
        backends = cpu_backends(llm.spec, costs, llm.plan.wave)
        for num_seqs in bench.batches:
            workload = bench.workload(num_seqs)
            runs = [
                run(llm, random_prompts(llm.spec, workload, seed), bench.output_len)
                for seed in range(bench.repetitions + 1)
            ]
            for phase in PHASES:
                steps = steps_of(runs[1:], phase)
                prices = Pricer(llm.spec, costs, steps[len(steps) // 2].shape, backends)
                rows.append(
                    {
                        "placement": name,
                        "phase": phase,
                        "batch": num_seqs,
                        "num_steps": len(steps),
                        "overlap_s": median(step.timeline.makespan_s for step in steps),
                        "predicted_s": makespan_s(steps[0].graph, prices),
                    }
                )
                tell(rows[-1])
    return rows


def verdict(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How many ratios are within 10 % of the prediction, and whom the fastest placement beats."""
    ratios = [row for row in rows if "measured_ratio" in row]
    near = [row for row in ratios if abs(row["measured_ratio"] / row["predicted_ratio"] - 1) <= 0.1]
    lines = [f"{len(near)} of {len(ratios)} measured ratios within 10 % of the predicted ones"]
    wins = []
    for phase, batch in dict.fromkeys((row["phase"], row["batch"]) for row in rows):
        case = {r["placement"]: r for r in rows if (r["phase"], r["batch"]) == (phase, batch)}
        if not {*ALONE, "offload-all"} <= case.keys():
            continue
        bars = {name: case[name]["overlap_s"] for name in (*ALONE, "offload-all")}
        predicted = {name: case[name]["predicted_s"] for name in bars}
        for name, row in case.items():
            if name in bars or name == "gpu":
                continue
            beats = [each for each in bars if row["overlap_s"] < bars[each]]
            foreseen = [each for each in bars if row["predicted_s"] < predicted[each]]
            wins.append(
                {"placement": name, "phase": phase, "batch": batch, "faster_than": beats,
                 "predicted_faster_than": foreseen}
            )  # fmt: skip
            if {"cpu-one-core", "offload-all"} <= {*beats}:
                lines.append(
                    f"{name} {phase} x{batch} is faster than {', '.join(beats)}; predicted: "
                    f"than {', '.join(foreseen) or 'none'}"
                )
    return {"within_10_percent": len(near), "of": len(ratios), "wins": wins, "lines": lines}


def equals_cpu(bench: Bench, case: Case) -> bool:
    """Greedy tokens in float32, lanes at once and in turn, against all-CPU's."""
    num_seqs = max(bench.batches)
    workload = bench.workload(num_seqs, case)
    with LLM(
        bench.model, profile=bench.profile, accelerator="none", dtype="float32", calibrate=False,
        workload=workload, max_num_seqs=num_seqs, max_model_len=bench.max_model_len(case),
    ) as llm:  # fmt: skip
        prompts = random_prompts(llm.spec, workload, 0)
        expected = run(llm, prompts, CHECKED_TOKENS).token_ids
    with both_ways(bench, case, num_seqs, dtype="float32") as ways:
        return all(run(llm, prompts, CHECKED_TOKENS).token_ids == expected for llm in ways)


def tell(row: Mapping[str, Any]) -> None:
    name = f"{row['placement']} {row['phase']} x{row['batch']}"
    if "in_turn_s" not in row:
        say(f"{name:42} {1e3 * row['overlap_s']:9.2f} ms, predicted {1e3 * row['predicted_s']:.2f}")
        return
    say(
        f"{name:42} {1e3 * row['overlap_s']:9.2f} {1e3 * row['in_turn_s']:9.2f} "
        f"{row['measured_ratio']:5.2f} {row['predicted_ratio']:10.2f} {row['replayed_ratio']:9.2f} "
        f"{row['executor_share']:9.1%} {row['other_cores'] + row['stolen_cores']:7.2f}"
        f"{'' if row['tokens_equal'] else '  TOKENS DIFFER'}"
    )


if __name__ == "__main__":
    main()
