"""What does each placement reach as the GPU's memory shrinks from all of a model to a tenth of it?

Two mixtures of experts with random weights, in the shapes of Qwen3-30B-A3B and Mixtral with fewer
layers, under GPU budgets of 10 to 100 % of their weights (caches and staging are within the budget
too): the plan that hetero chooses, every named strategy, all-CPU, and accelerate's
`device_map="auto"` where it is installed and there is CUDA (its budget is for weights alone).
Predicted stands beside measured, achieved bytes/s of every lane beside its ceiling. Where there is
no GPU all of it is emulated, with smaller models and workloads: those speeds are a CPU core's. What
would change our mind: a chosen plan slower than a strategy that fits; on a GPU, where the model is
at least twice the budget, one that is not 4 times as fast as layer-by-layer offload, or a link that
is below 90 % of its measured rate while it streams.

    python bench/bench_hybrid.py [--accelerator NAME] [--minutes N] [--quick] [--check]
                                 [--models DIR] [--profile FILE] [--save-profile FILE]
                                 [--output FILE]

The cases that matter most come first; what there is no time for is left out, and said. Rows are
written to --output as they come. --save-profile measures the machine in full first and keeps the
profile there, with what lscpu says beside it. Prints JSON to stdout, a table to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch

# As a script it finds only its own folder.
sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.hybrid_case import ACCELERATE, CHOSEN, ROW_KEYS, STRATEGIES, Row, Task, measure
from bench.make_model import make_model
from bench.measured_steps import names_only, say, write
from cpu_kernels.threads import available_cores
from hetero.measure.fingerprint import cpu_model
from hetero.measure.store import default_cache_dir, kernel_cache_dir
from hetero.planning import base_profile
from planner.hardware import AcceleratorName, HardwareProfile

Size = Literal["gpu", "emulated", "tiny"]
Workloads = tuple[tuple[int, int, int], ...]

COMMON = {
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
}
QWEN = {
    **COMMON,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "intermediate_size": 6144,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
MIXTRAL = {
    **COMMON,
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "intermediate_size": 14336,
    "sliding_window": None,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """What is run, and how it differs from what it stands for.

    `workloads` are (sequences, prompt tokens, output tokens); `cuts` says what is smaller.
    """

    models: dict[str, dict[str, Any]]
    workloads: Workloads
    minutes: float
    cuts: str


SCALES: dict[Size, Scale] = {
    "gpu": Scale(
        # 21 and 30 GB; with fewer layers the two in transit would not fit into a quarter.
        models={
            "qwen3-30b-a3b": {**QWEN, "num_hidden_layers": 16},
            "mixtral-8x7b": {**MIXTRAL, "num_hidden_layers": 10},
        },
        workloads=((1, 512, 64), (16, 512, 64), (1, 4096, 64)),
        minutes=9.5,
        cuts="16 of 48 layers, 10 of 32",
    ),
    "emulated": Scale(
        # 0.7 GB each
        models={
            "qwen3-30b-a3b": {
                **QWEN,
                "num_hidden_layers": 12,
                "vocab_size": 16000,
                "hidden_size": 1024,
                "num_attention_heads": 16,
                "num_experts": 32,
                "num_experts_per_tok": 4,
                "moe_intermediate_size": 256,
            },
            "mixtral-8x7b": {
                **MIXTRAL,
                "num_hidden_layers": 12,
                "vocab_size": 16000,
                "hidden_size": 1024,
                "num_attention_heads": 16,
                "num_key_value_heads": 4,
                "intermediate_size": 1024,
            },
        },
        workloads=((1, 64, 9), (16, 16, 9), (1, 256, 9)),
        minutes=4.7,
        cuts=(
            "12 of 48 and 12 of 32 layers, hidden size 1024, 32 experts (4 a token) of 256 and 8 "
            "of 1024, vocabulary 16000; 64+9, 16+9 and 256+9 tokens for 512+64, 512+64 and 4096+64"
        ),
    ),
    "tiny": Scale(
        models={
            "qwen3-30b-a3b": {
                **QWEN,
                "num_hidden_layers": 6,
                "vocab_size": 512,
                "hidden_size": 128,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 32,
                "num_experts": 8,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 256,
            },
        },
        workloads=((1, 8, 3), (2, 8, 3)),
        minutes=1.0,
        cuts="all of it",
    ),
}
# Where most is to be gained, then the rest.
SHARES = (0.5, 0.25, 0.1, 0.75, 1.0)
QUICK_SHARES = (0.5,)
PATH_OPTIONS = ("--models", "--profile", "--save-profile", "--output")
# What a process that is over its time may take to end by itself.
GRACE_S = 20.0
OFFLOAD_GOAL, LINK_GOAL = 4.0, 0.9
# Budgets that the model is at least twice as large as.
OVERFULL_SHARE = 0.5
CHECKED: tuple[str, ...] = (CHOSEN, "offload", "experts-on-cpu", "split")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--accelerator", choices=("cuda", "emulated"), help="default: cuda where there is one"
    )
    parser.add_argument("--size", choices=SCALES, help="default: by the accelerator")
    parser.add_argument("--minutes", type=float, help="for all of it (default: 9.5, emulated 4.7)")
    parser.add_argument("--quick", action="store_true", help="half of the model, at most 1.8 min")
    parser.add_argument("--check", action="store_true", help="tokens of small models, in float32")
    parser.add_argument("--repetitions", type=int, default=1, help="runs of each (default: 1)")
    parser.add_argument("--models", type=Path, help="keep the models here, or use those there")
    parser.add_argument("--profile", help="of this machine; the stored one, or measured")
    parser.add_argument("--save-profile", type=Path, help="measure the machine, and keep it here")
    parser.add_argument("--output", type=Path, help="keep the rows so far here, too")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        for row in measure(msgspec.convert(json.loads(args.one), Task)):
            print(json.dumps(row), flush=True)
        return
    begin_s = time.time()
    accelerator: AcceleratorName = args.accelerator or (
        "cuda" if torch.cuda.is_available() else "emulated"
    )
    size: Size = args.size or ("gpu" if accelerator == "cuda" else "emulated")
    scale = SCALES[size]
    minutes = args.minutes or (min(1.8, scale.minutes) if args.quick else scale.minutes)
    with tempfile.TemporaryDirectory(prefix="hetero-bench-") as name:
        folder = Path(name)
        profile = profile_file(args, folder)
        bench = Bench(
            accelerator=accelerator,
            scale=scale,
            shares=QUICK_SHARES if args.quick else SHARES,
            models=args.models or folder / "models",
            profile=profile,
            cache=folder / "cache",
            repetitions=args.repetitions,
            end_s=begin_s + 60 * minutes,
        )
        command = ["python", "bench/bench_hybrid.py", *names_only(sys.argv[1:], PATH_OPTIONS)]
        document = report(bench, size, command, output=args.output)
        if args.check:
            document["check"] = check(bench)
        document["minutes"] = (time.time() - begin_s) / 60
        write(document, args.output)
    print(json.dumps(document, indent=1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What all processes share."""

    accelerator: AcceleratorName
    scale: Scale
    shares: tuple[float, ...]
    models: Path
    profile: Path
    cache: Path
    repetitions: int
    end_s: float

    def folder(self, model: str) -> Path:
        config = self.scale.models[model]
        return self.models / f"{model}-{config['num_hidden_layers']}-{config['hidden_size']}"


def profile_file(args: argparse.Namespace, folder: Path) -> Path:
    """The machine in a file: measured now where it is to be kept, or as it is known."""
    file = folder / "profile.json"
    if args.save_profile is None:
        found = base_profile(args.profile, default_cache_dir(os.environ), say)
        file.write_bytes(found.to_json())
        return file
    command = [sys.executable, "-m", "hetero", "profile", "-o", str(args.save_profile)]
    subprocess.run(command, check=True, stdout=sys.stderr)
    facts = subprocess.run(["lscpu"], check=True, capture_output=True)
    args.save_profile.with_suffix(".lscpu.txt").write_bytes(facts.stdout)
    file.write_bytes(args.save_profile.read_bytes())
    return file


def tasks(bench: Bench) -> list[Task]:
    """What processes do, the most important first: models take turns at every budget.

    All-CPU and, where it may still run, accelerate come with the first budget of a model: the first
    depends on none.
    """
    found = []
    for at, share in enumerate(bench.shares):
        for model in bench.scale.models:
            names = [CHOSEN, *STRATEGIES]
            if at:
                names.remove("cpu")
            if share <= OVERFULL_SHARE:
                names.insert(2, ACCELERATE)
            found.append(
                Task(
                    model=model,
                    folder=str(bench.folder(model)),
                    profile=str(bench.profile),
                    accelerator=bench.accelerator,
                    budget_share=share,
                    workloads=bench.scale.workloads,
                    placements=tuple(names),
                    repetitions=bench.repetitions,
                    end_s=bench.end_s,
                )
            )
    return found


def report(bench: Bench, size: Size, command: list[str], *, output: Path | None) -> dict[str, Any]:
    """Rows of all cases, written as they come."""
    profile = HardwareProfile.load(bench.profile)
    gpu = profile.gpu
    document: dict[str, Any] = {
        "question": __doc__.partition("\n")[0],
        "environment": {
            "cpu": cpu_model(),
            "cores": available_cores(),
            "accelerator": bench.accelerator,
            "gpu": None if gpu is None else gpu.name,
            "torch": torch.__version__,
            "profile": {
                "name": profile.name,
                "measured_at": profile.measured_at,
                "confidence": profile.confidence,
                "notes": profile.notes,
            },
        },
        "command": command,
        "size": size,
        "cut": bench.scale.cuts,
        "rows": [],
        "left_out": [],
        "planned": [],
        "verdict": {},
    }
    say(f"{'':44} {'TTFT':>22} {'TPOT':>22}  tokens/s  overlap")
    for task in tasks(bench):
        make_model(bench.folder(task.model), bench.scale.models[task.model])
        for row in rows_of(task, bench):
            if "planned" in row:
                document["planned"].append(row)
                continue
            document["left_out" if "left_out" in row else "rows"].append(row)
            tell(row)
            document["verdict"] = verdict(
                document["rows"], has_rival_cpu=bench.accelerator == "cuda"
            )
            write(document, output)
    for line in document["verdict"].get("lines", ()):
        say(line)
    return document


def rows_of(task: Task, bench: Bench) -> Iterator[Row]:
    """Run a task in a process of its own, and what is left of it in another if that one dies."""
    left = list(task.placements)
    while left:
        if time.time() > task.end_s:
            for name in left:
                yield {**_key_of(task, name), "left_out": "there is no time left"}
            return
        command = [sys.executable, __file__, "--one"]
        command.append(json.dumps(asdict(replace(task, placements=tuple(left)))))
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=environment(bench.cache)
        )
        watchdog = threading.Timer(max(0.0, task.end_s - time.time()) + GRACE_S, process.kill)
        watchdog.start()
        at_work = left[0]
        assert process.stdout is not None
        for line in process.stdout:
            row: Row = json.loads(line)
            at_work = row["asked"]
            if "begins" not in row:
                yield row
        watchdog.cancel()
        if process.wait() == 0:
            return
        why = f"its process ended with {process.returncode}"
        yield {**_key_of(task, at_work), "left_out": why}
        left = left[left.index(at_work) + 1 :]


def _key_of(task: Task, name: str) -> Row:
    """A row that says nothing but what it is of: all workloads of a placement."""
    return {
        **dict.fromkeys(ROW_KEYS),
        "model": task.model,
        "budget_share": task.budget_share,
        "placement": name,
        "asked": name,
        "chosen": name == CHOSEN,
    }


def environment(cache: Path) -> dict[str, str]:
    """The own environment with another cache folder: no run learns from another.

    Compiled kernels stay where they are.
    """
    kernels = os.environ.get("HETERO_KERNEL_CACHE")
    if kernels is None:
        kernels = str(kernel_cache_dir(default_cache_dir(os.environ)))
    return {**os.environ, "HETERO_KERNEL_CACHE": kernels, "XDG_CACHE_HOME": str(cache)}


def verdict(rows: Sequence[Mapping[str, Any]], *, has_rival_cpu: bool) -> dict[str, Any]:
    """The chosen plan against offload and against the fastest, and what the link reached.

    All-CPU is no rival beside the emulated accelerator, which leaves a plan one core less.
    """
    gains, links, ranks = [], [], []
    for key in dict.fromkeys(_case(row) for row in rows if row["chosen"]):
        case = [row for row in rows if _case(row) == key]
        if has_rival_cpu:
            case += [row for row in rows if row["asked"] == "cpu" and _case(row)[::2] == key[::2]]
        (chosen,) = (row for row in case if row["chosen"])
        label = dict(zip(("model", "budget_share", "workload"), key, strict=True))
        for name in ("offload", ACCELERATE):
            for row in case:
                if row["asked"] == name and key[1] <= OVERFULL_SHARE:
                    ratio = row["e2e_s"] / chosen["e2e_s"]
                    gains.append({**label, "over": name, "ratio": ratio})
        fastest = min(case, key=lambda row: row["e2e_s"])
        ranks.append(
            {**label, "chosen": chosen["placement"], "fastest": fastest["placement"],
             "ratio": chosen["e2e_s"] / fastest["e2e_s"]}
        )  # fmt: skip
    for row in rows:
        for phase, rates in row.get("bytes_per_s", {}).items():
            if "h2d" in rates and "same_as" not in row:
                share = rates["h2d"] / row["ceiling_bytes_per_s"]["h2d"]
                label = dict(zip(("model", "budget_share", "workload"), _case(row), strict=True))
                links.append(
                    {**label, "placement": row["placement"], "phase": phase, "share": share}
                )
    reached = [each for each in gains if each["ratio"] >= OFFLOAD_GOAL]
    near = [each for each in links if each["share"] >= LINK_GOAL]
    lines = [
        f"chosen at least {OFFLOAD_GOAL:.0f} times as fast as layer-by-layer offload where the "
        f"model is twice the budget or more: {len(reached)} of {len(gains)} "
        f"(ratios {_spread([each['ratio'] for each in gains])})",
        f"link at {LINK_GOAL:.0%} of its measured rate or more while streaming: {len(near)} of "
        f"{len(links)} (shares {_spread([each['share'] for each in links])})",
        f"chosen over fastest: {_spread([each['ratio'] for each in ranks])}",
    ]
    return {"over_offload": gains, "link": links, "choice": ranks, "lines": lines}


def _case(row: Mapping[str, Any]) -> tuple[str, float, str]:
    return row["model"], row["budget_share"], row["workload"]


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "none"
    ordered = sorted(values)
    return f"{ordered[0]:.2f} to {ordered[-1]:.2f}, median {ordered[len(ordered) // 2]:.2f}"


def check(bench: Bench) -> dict[str, bool]:
    """Greedy tokens of a small model in float32 under half of its weights, against all-CPU's."""
    scale = SCALES["tiny"]
    small = replace(bench, scale=scale, shares=(OVERFULL_SHARE,), end_s=time.time() + 300)
    found = {}
    for model, config in scale.models.items():
        make_model(small.folder(model), config)
        (task,) = (each for each in tasks(small) if each.model == model)
        task = replace(task, placements=("cpu", *CHECKED), dtype="float32")
        rows = [row for row in rows_of(task, small) if "token_ids" in row]
        expected = {row["workload"]: row["token_ids"] for row in rows if row["asked"] == "cpu"}
        for row in rows:
            name = f"{model} {row['workload']} {row['asked']}"
            found[name] = row["token_ids"] == expected[row["workload"]]
    return found


def tell(row: Mapping[str, Any]) -> None:
    share = "" if not row["budget_share"] else f"{row['budget_share']:.0%}"
    mark = "*" if row["chosen"] else " "
    name = f"{row['model']} {share:>4} {row['workload'] or '':13} {mark}{row['placement']}"
    if "left_out" in row:
        say(f"{name:60} left out: {row['left_out'][:90]}")
        return
    say(
        f"{name:60} {times(row, 'ttft_s')} {times(row, 'tpot_s')} {row['tokens_per_s']:8.1f} "
        f"{'' if row['overlap'] is None else format(row['overlap'], '7.0%')}"
        f"{' as ' + row['same_as'] if 'same_as' in row else ''}"
    )


def times(row: Mapping[str, Any], key: str) -> str:
    """Measured, and predicted in brackets."""
    predicted = row[f"predicted_{key}"]
    beside = "" if predicted is None else f"({1e3 * predicted:.1f})"
    return f"{1e3 * row[key]:10.1f} {beside:>11}"


if __name__ == "__main__":
    main()
