"""What does the planner promise of ten models on every reference machine, and is it possible?

One row for each pair: the placement, its predicted times with their bands (10th to 90th percentile)
and what binds each phase. Nothing is measured and no weights are needed. Beside the prediction
stands a roofline that this file works out from published shapes and the ceilings of the profile,
not from the planner's prices. What would change our mind: a time, or the low end of its band, below
its roofline, or a plan that takes two seconds; either makes the exit status 1.

    python bench/bench_plans.py [--models A,B] [--machines A,B] [--quick] [--check] [--output FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hetero.measure.store import find_profile, machine_names
from hetero.model_lookup import find_model, read_model_spec
from planner.hardware import HardwareProfile
from planner.plan import Plan, TimeMetric
from planner.search import search
from planner.workload import Workload

MAX_PLAN_S = 2.0
QUICK_MACHINES = ("desktop-rtx3060", "rtx4090-epyc9354", "h100-sapphire-rapids", "cpu-server")
QUICK_MODELS = ("mistral-7b", "qwen3-30b-a3b", "qwen3-235b-a22b")
# What rounding may take off a time.
ROUNDING = 1e-9
# All models here are published in bfloat16.
DTYPE_BYTES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A published decoder; `width` is of the dense feed-forward, or of each of the k experts."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    width: int
    vocabulary: int
    num_experts: int = 0
    experts_per_token: int = 1

    def active_weights(self, num_experts: float) -> float:
        """Weights of the products where so many experts get tokens, the logits' included."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        feed_forward = 3 * self.hidden * self.width * num_experts
        router = self.hidden * self.num_experts
        head = self.hidden * self.vocabulary
        return self.layers * (attention + feed_forward + router) + head

    def weight_bytes(self, num_tokens: int) -> float:
        """Weights that so many tokens read, each once; the router chooses evenly."""
        if self.num_experts == 0:
            return self.active_weights(1) * DTYPE_BYTES
        unchosen = (1 - self.experts_per_token / self.num_experts) ** num_tokens
        return self.active_weights(self.num_experts * (1 - unchosen)) * DTYPE_BYTES

    def kv_bytes(self, num_tokens: float) -> float:
        """Keys and values of so many tokens, all layers."""
        return 2.0 * self.layers * self.kv_heads * self.head_dim * num_tokens * DTYPE_BYTES

    def prompt_flops(self, num_tokens: int) -> float:
        """Products of a prompt (logits of its last token only) and its causal attention."""
        head = self.hidden * self.vocabulary
        in_layers = self.active_weights(self.experts_per_token) - head
        products = 2.0 * num_tokens * in_layers + 2.0 * head
        pairs = num_tokens * (num_tokens + 1) / 2
        return products + 4.0 * self.layers * self.heads * self.head_dim * pairs


SHAPES = {
    "mistral-7b": Shape(
        layers=32, hidden=4096, heads=32, kv_heads=8, head_dim=128, width=14336, vocabulary=32768
    ),
    "olmoe-1b-7b": Shape(
        layers=16,
        hidden=2048,
        heads=16,
        kv_heads=16,
        head_dim=128,
        width=1024,
        vocabulary=50304,
        num_experts=64,
        experts_per_token=8,
    ),
    "qwen3-30b-a3b": Shape(
        layers=48,
        hidden=2048,
        heads=32,
        kv_heads=4,
        head_dim=128,
        width=768,
        vocabulary=151936,
        num_experts=128,
        experts_per_token=8,
    ),
    "qwen3-32b": Shape(
        layers=64, hidden=5120, heads=64, kv_heads=8, head_dim=128, width=25600, vocabulary=151936
    ),
    "mixtral-8x7b": Shape(
        layers=32,
        hidden=4096,
        heads=32,
        kv_heads=8,
        head_dim=128,
        width=14336,
        vocabulary=32000,
        num_experts=8,
        experts_per_token=2,
    ),
    "llama-3.1-70b": Shape(
        layers=80, hidden=8192, heads=64, kv_heads=8, head_dim=128, width=28672, vocabulary=128256
    ),
    "mixtral-8x22b": Shape(
        layers=56,
        hidden=6144,
        heads=48,
        kv_heads=8,
        head_dim=128,
        width=16384,
        vocabulary=32768,
        num_experts=8,
        experts_per_token=2,
    ),
    "qwen3-235b-a22b": Shape(
        layers=94,
        hidden=4096,
        heads=64,
        kv_heads=4,
        head_dim=128,
        width=1536,
        vocabulary=151936,
        num_experts=128,
        experts_per_token=8,
    ),
    "llama-3.1-405b": Shape(
        layers=126,
        hidden=16384,
        heads=128,
        kv_heads=8,
        head_dim=128,
        width=53248,
        vocabulary=128256,
    ),
    "qwen3-coder-480b-a35b": Shape(
        layers=62,
        hidden=6144,
        heads=96,
        kv_heads=8,
        head_dim=128,
        width=2560,
        vocabulary=151936,
        num_experts=160,
        experts_per_token=8,
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """Seconds that no placement can be below."""

    ttft_s: float
    tpot_s: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", help="names by commas (default: the ten of this file)")
    parser.add_argument("--machines", help="names by commas (default: every reference machine)")
    parser.add_argument("--prompt-len", type=int, default=512)
    parser.add_argument("--output-len", type=int, default=128, help="at least 2")
    parser.add_argument("--quick", action="store_true", help="three models on four machines")
    parser.add_argument(
        "--check", action="store_true", help="no plan is slower than the same machine's CPU alone"
    )
    parser.add_argument("--output", type=Path, help="write the document here too")
    args = parser.parse_args()
    if args.output_len < 2:
        parser.error("--output-len must be at least 2: one token has no time after the first")
    models = names(args.models, QUICK_MODELS if args.quick else tuple(SHAPES), tuple(SHAPES))
    known = machine_names()
    machines = names(args.machines, QUICK_MACHINES if args.quick else known, known)
    workload = Workload(prompt_len=args.prompt_len, output_len=args.output_len)
    profiles = [find_profile(name) for name in machines]
    say_header()
    rows = [run(args, model, profile, workload) for model in models for profile in profiles]
    document = {
        "question": __doc__.partition("\n")[0],
        "environment": {"python": platform.python_version(), "processor": platform.machine()},
        "command": [Path(sys.executable).name, *sys.argv],
        "workload": {"prompt_len": workload.prompt_len, "output_len": workload.output_len},
        "rows": rows,
    }
    text = json.dumps(document, indent=2)
    print(text)
    if args.output is not None:
        args.output.write_text(text + "\n")
    bad = [row for row in rows if row["violations"]]
    slowest_s = max(row["plan_s"] for row in rows)
    num_feasible = sum(row["feasible"] for row in rows)
    say(
        f"{len(rows)} rows, {num_feasible} feasible, slowest plan {slowest_s:.2f} s, {len(bad)} bad"
    )
    sys.exit(1 if bad else 0)


def names(given: str | None, default: tuple[str, ...], known: tuple[str, ...]) -> tuple[str, ...]:
    """Names from an argument; exits where one is unknown."""
    if given is None:
        return default
    chosen = tuple(given.split(","))
    unknown = [name for name in chosen if name not in known]
    if unknown:
        sys.exit(f"{', '.join(unknown)}: not one of {', '.join(known)}")
    return chosen


def run(
    args: argparse.Namespace, model: str, profile: HardwareProfile, workload: Workload
) -> dict[str, Any]:
    """One row: a model on a machine."""
    spec = read_model_spec(find_model(model))
    began_s = time.perf_counter()
    plan = search(spec, profile, workload)
    plan_s = time.perf_counter() - began_s
    roofline = roofline_of(SHAPES[model], profile, workload)
    row: dict[str, Any] = {
        "model": model,
        "machine": profile.name,
        "feasible": plan.feasible,
        "weights_bytes": spec.total_weight_bytes(),
        "roofline_ttft_s": roofline.ttft_s,
        "roofline_tpot_s": roofline.tpot_s,
        "plan_s": plan_s,
    }
    if plan.feasible:
        row |= predicted(plan)
    alone = None
    if args.check and profile.gpu is not None:
        alone = search(spec, profile.without_gpu(), workload)
    row["violations"] = violations(row, plan, alone)
    tell(row)
    return row


def roofline_of(shape: Shape, profile: HardwareProfile, workload: Workload) -> Roofline:
    """All memories read at once at their nominal rates, all devices compute at their peaks.

    A prompt also reads its weights. A decode step reads the mean past of all steps.
    """
    devices = [profile.cpu] + ([profile.gpu] if profile.gpu is not None else [])
    bytes_per_s = sum(device.read_bytes_per_s for device in devices)
    flop_per_s = sum(device.flop_per_s["bfloat16"] for device in devices)
    mean_past = workload.prompt_len + max(0, workload.output_len - 2) / 2
    return Roofline(
        ttft_s=max(
            shape.prompt_flops(workload.prompt_len) / flop_per_s,
            shape.weight_bytes(workload.prompt_len) / bytes_per_s,
        ),
        tpot_s=(shape.weight_bytes(1) + shape.kv_bytes(mean_past)) / bytes_per_s,
    )


def predicted(plan: Plan) -> dict[str, Any]:
    """What the planner says of a plan that fits."""
    estimate = plan.estimate
    found: dict[str, Any] = {
        "placement": plan.placement.name,
        "cut": {"prefill": plan.placement.prefill.cut, "decode": plan.placement.decode.cut},
    }
    times: dict[TimeMetric, float] = {
        "ttft_s": estimate.ttft_s,
        "tpot_s": estimate.tpot_s,
        "e2e_s": estimate.e2e_s,
    }
    for metric, seconds in times.items():
        low_s, high_s = estimate.band_by_metric[metric]
        start = metric.removesuffix("_s")
        found |= {metric: seconds, f"{start}_low_s": low_s, f"{start}_high_s": high_s}
    found |= {f"bound_{phase}": bound for phase, bound in estimate.bottleneck_by_phase.items()}
    return found


def violations(row: dict[str, Any], plan: Plan, alone: Plan | None) -> list[str]:
    """What is impossible about a row, or too slow; `alone` is the plan without the GPU."""
    found = []
    if row["plan_s"] >= MAX_PLAN_S:
        found.append(f"the plan took {row['plan_s']:.2f} s, {MAX_PLAN_S} s are allowed")
    if row["feasible"]:
        for metric in ("ttft", "tpot"):
            least_s = row[f"roofline_{metric}_s"] * (1 - ROUNDING)
            for key in (f"{metric}_s", f"{metric}_low_s"):
                if row[key] < least_s:
                    found.append(f"{key} is {row[key]:.4g}, below the roofline of {least_s:.4g}")
            if not row[f"{metric}_low_s"] <= row[f"{metric}_s"] <= row[f"{metric}_high_s"]:
                found.append(f"{metric}_s lies outside its own band")
    if alone is not None and alone.feasible:
        if not plan.feasible:
            found.append("it fits without the GPU only")
        elif plan.estimate.e2e_s > alone.estimate.e2e_s * (1 + ROUNDING):
            found.append(
                f"e2e_s is {plan.estimate.e2e_s:.4g}, without the GPU {alone.estimate.e2e_s:.4g}"
            )
    return found


def say_header() -> None:
    say(
        f"{'model':22} {'machine':22} {'placement':32} {'TTFT s (10-90 %)':>26} "
        f"{'TPOT ms (10-90 %)':>27} {'x roofline':>11}  bound"
    )


def tell(row: dict[str, Any]) -> None:
    start = f"{row['model']:22} {row['machine']:22} "
    if row["feasible"]:
        ttft = f"{row['ttft_s']:.3g} ({row['ttft_low_s']:.3g}-{row['ttft_high_s']:.3g})"
        tpot_ms, low_ms, high_ms = (1e3 * row[f"tpot_{key}s"] for key in ("", "low_", "high_"))
        tpot = f"{tpot_ms:.3g} ({low_ms:.3g}-{high_ms:.3g})"
        ratios = "/".join(f"{row[f'{m}_s'] / row[f'roofline_{m}_s']:.1f}" for m in ("ttft", "tpot"))
        bound = f"{row['bound_prefill']} / {row['bound_decode']}"
        say(f"{start}{row['placement']:32} {ttft:>26} {tpot:>27} {ratios:>11}  {bound}")
    else:
        say(f"{start}does not fit: {row['weights_bytes'] / 1e9:.0f} GB of weights")
    for violation in row["violations"]:
        say(f"    VIOLATION: {violation}")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
