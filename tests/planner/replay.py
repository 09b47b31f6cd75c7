"""Plan replay: what the search answers for a grid of models, machines and workloads, stored.

A refactor changes no stored plan; a change of policy shows as a diff in review, a line for each
plan. After one: `python -m tests.planner.replay --write`. Tests look at a part of the grid, which
has every pair of a model and a machine; `--check` looks at all of it.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from planner import HardwareProfile, ModelSpec, search
from planner.model_profile import read_model_profile
from planner.placement import LayerPlacement, ModulePlacement, TierPlacement
from planner.plan import Plan
from planner.workload import Objective, Workload

ROOT = Path(__file__).parents[2]
PLANS = ROOT / "tests" / "data" / "plans"

MODELS = (
    "llama-3.1-8b",
    "qwen3-32b",
    "opt-30b",
    "llama-3.1-70b",
    "olmoe-1b-7b",
    "deepseek-v2-lite",
    "qwen3-30b-a3b",
    "mixtral-8x7b",
    "gpt-oss-120b",
    "qwen3-235b-a22b",
    "deepseek-v3",
    "kimi-k2",
)
MACHINES = (
    "laptop-rtx4060",
    "t4-cloud",
    "desktop-rtx3090",
    "desktop-rtx4090",
    "rtx4090-2xeon-amx",
    "server-a100-80gb",
    "workstation-h100-pcie",
    "h200-emerald-rapids",
)
# A chat turn, a long document, some requests at once, and a batch job.
WORKLOADS: dict[str, tuple[Workload, Objective]] = {
    "chat": (Workload(prompt_len=512, output_len=128), "latency"),
    "document": (Workload(prompt_len=8192, output_len=512), "latency"),
    "requests": (Workload(prompt_len=512, output_len=256, num_seqs=16), "latency"),
    "batch": (Workload(prompt_len=1024, output_len=128, num_seqs=64), "throughput"),
}


# Machines are given as much CPU memory as these need: as they are, they have room for neither.
CPU_BYTES = {"deepseek-v3": 2 * 10**12, "kimi-k2": 3 * 10**12}


def read_model(name: str) -> ModelSpec:
    """A model of profiles/models."""
    config = json.loads((ROOT / "profiles" / "models" / f"{name}.json").read_text())
    if "architectures" in config:
        return ModelSpec.from_config(config, name=name)
    return read_model_profile(config).spec()


def checked_workload(model: str, machine: str) -> str:
    """The workload of a model and machine that tests look at: each has a quarter of the pairs."""
    return list(WORKLOADS)[(MODELS.index(model) + MACHINES.index(machine)) % len(WORKLOADS)]


def digest(model: str, machine: str, workload: str) -> dict[str, Any]:
    """What the search answers, layers that are placed alike counted."""
    hardware = HardwareProfile.load(ROOT / "profiles" / "machines" / f"{machine}.json")
    if model in CPU_BYTES:
        rooms = (replace(each, memory_bytes=CPU_BYTES[model]) for each in hardware.cpu_by_threads)
        hardware = replace(hardware, cpu_by_threads=tuple(rooms))
    spec, (what, objective) = read_model(model), WORKLOADS[workload]
    # a document as long as the model can read
    prompt_len = min(what.prompt_len, spec.max_position_embeddings - what.output_len)
    plan = search(spec, hardware, replace(what, prompt_len=prompt_len), objective)
    return {
        "machine": machine,
        "workload": workload,
        "feasible": plan.feasible,
        **{phase: _tier(plan.placement.tier(phase)) for phase in ("prefill", "decode")},
        "smaller": [f"{each.phase} {_tier(each)}" for each in plan.placement.smaller],
        "num_concurrent": plan.estimate.num_concurrent_seqs,
        **{key: getattr(plan.estimate, key) for key in ("ttft_s", "tpot_s", "e2e_s")},
        "gap": plan.optimality_gap,
        "bytes": plan.estimate.bytes_by_device,
        "others": _others(plan),
    }


def _others(plan: Plan) -> dict[str, float | None]:
    """Seconds of the alternatives; None where they do not fit."""
    return {each.name: each.e2e_s if each.feasible else None for each in plan.alternatives}


def _tier(tier: TierPlacement) -> str:
    """Steps, ends and layers of a tier, in few words: `2048 tokens: 40 gpu gpu/cpu+12`."""
    counts = Counter(_layer(layer) for layer in tier.layers)
    layers = ", ".join(f"{count} {text}" for text, count in sorted(counts.items()))
    ends = f"{_module(tier.embedding)}..{_module(tier.head)}"
    second = f", {tier.num_second_seqs} second" if tier.num_second_seqs else ""
    slots = f", {tier.num_expert_slots} slots" if tier.num_expert_slots else ""
    return f"{tier.strategy} {tier.max_num_tokens}{second}{slots}: {ends}; {layers}"


def _layer(layer: LayerPlacement) -> str:
    parts = "/".join(_module(where) for _, where in layer.modules())
    count = layer.num_gpu_kv_tokens
    where = f" kv on cpu from {count}" if count else " kv on cpu"
    return parts + (where if layer.kv_on_cpu else "")


def _module(where: ModulePlacement) -> str:
    """`gpu`, `cpu`, `stream` and `split` say where it lives too."""
    return where.runs + (f"+{where.num_resident}" if where.num_resident else "")


def stored(model: str) -> dict[tuple[str, str], dict[str, Any]]:
    """The stored plans of a model by machine and workload."""
    rows = json.loads(path_of(model).read_text())
    return {(row["machine"], row["workload"]): row for row in rows}


def path_of(model: str) -> Path:
    """The stored plans of a model."""
    return PLANS / f"{model}.json"


def differences(found: dict[str, Any], known: dict[str, Any]) -> Iterator[str]:
    """What two digests do not share; seconds to 1e-9, as logarithms differ between libraries."""
    ours, theirs = _flat(found), _flat(known)
    for key in sorted(ours.keys() | theirs.keys()):
        one, other = ours.get(key), theirs.get(key)
        if one != other and not _are_close(one, other):
            yield f"{key}: {one!r}, stored is {other!r}"


def _are_close(one: object, other: object) -> bool:
    if not isinstance(one, float) or not isinstance(other, float):
        return False
    return math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-9)


def _flat(value: Any, where: str = "") -> dict[str, Any]:
    """Every leaf of a JSON document by its path."""
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {where: value}
    return {
        path: leaf
        for key, inner in value.items()
        for path, leaf in _flat(inner, f"{where}.{key}").items()
    }


def _check() -> int:
    """Print what differs from the stored plans; 1 where anything does."""
    status = 0
    for model in MODELS:
        for (machine, workload), known in stored(model).items():
            for text in differences(digest(model, machine, workload), known):
                print(f"{model} {machine} {workload} {text}")
                status = 1
    return status


def _write() -> None:
    """Write every stored plan anew, each on a line of its own."""
    PLANS.mkdir(parents=True, exist_ok=True)
    for old in PLANS.glob("*.json"):
        old.unlink()
    for model in MODELS:
        rows = [
            json.dumps(digest(model, machine, workload))
            for machine in MACHINES
            for workload in WORKLOADS
        ]
        path_of(model).write_text("[\n" + ",\n".join(rows) + "\n]\n")
        print(model, flush=True)


def main() -> int:
    """Write or check all stored plans."""
    parser = argparse.ArgumentParser(description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", action="store_true")
    what.add_argument("--check", action="store_true")
    if parser.parse_args().check:
        return _check()
    _write()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
