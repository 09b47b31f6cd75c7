"""Plan replay: what the search answers for a grid of models, machines and workloads, stored.

A refactor changes no stored plan; a change of policy shows as a diff in review. After one:
`python -m tests.planner.replay --write`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import msgspec

from planner import HardwareProfile, ModelSpec, search
from planner.workload import Objective, Workload

ROOT = Path(__file__).parents[2]
PLANS = ROOT / "tests" / "data" / "plans"

DESKTOPS = ("desktop-rtx3090", "desktop-rtx4090", "laptop-rtx4060")
SERVERS = ("server-a100-80gb", "workstation-h100-pcie")

GRID: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("llama-3.1-8b", (*DESKTOPS, *SERVERS)),
    ("mixtral-8x7b", ("desktop-rtx4090", *SERVERS)),
    ("olmoe-1b-7b", (*DESKTOPS, *SERVERS)),
    ("qwen3-30b-a3b", (*DESKTOPS, "workstation-h100-pcie")),
    ("llama-3.1-70b", ("server-a100-80gb",)),
    ("qwen3-235b-a22b", ("server-a100-80gb",)),
)
# A chat turn, and a batch of long prompts.
WORKLOADS: tuple[tuple[Workload, Objective], ...] = (
    (Workload(prompt_len=512, output_len=128), "latency"),
    (Workload(prompt_len=4096, output_len=64, num_seqs=4), "throughput"),
)

PAIRS = tuple((model, machine) for model, machines in GRID for machine in machines)


def read_model(name: str) -> ModelSpec:
    """A model of profiles/models."""
    config = json.loads((ROOT / "profiles" / "models" / f"{name}.json").read_text())
    return ModelSpec.from_config(config, name=name)


def digests(model: str, machine: str) -> list[dict[str, Any]]:
    """What the search answers for each workload, without the layers of the placement."""
    spec = read_model(model)
    hardware = HardwareProfile.load(ROOT / "profiles" / "machines" / f"{machine}.json")
    found = []
    for workload, objective in WORKLOADS:
        plan = search(spec, hardware, workload, objective)
        found.append(
            {
                "workload": msgspec.to_builtins(workload),
                "objective": objective,
                "name": plan.placement.name,
                "cuts": {
                    "prefill": plan.placement.prefill.cut,
                    "decode": plan.placement.decode.cut,
                },
                "feasible": plan.feasible,
                "optimality_gap": plan.optimality_gap,
                "estimate": msgspec.to_builtins(plan.estimate),
                "alternatives": [
                    [other.name, other.feasible, other.e2e_s] for other in plan.alternatives
                ],
            }
        )
    return found


def path_of(model: str, machine: str) -> Path:
    """The stored plans of a model on a machine."""
    return PLANS / f"{model}_{machine}.json"


def main() -> None:
    """Write every stored plan anew."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", required=True)
    parser.parse_args()
    PLANS.mkdir(parents=True, exist_ok=True)
    for old in PLANS.glob("*.json"):
        old.unlink()
    for model, machine in PAIRS:
        text = msgspec.json.format(json.dumps(digests(model, machine)), indent=1)
        path_of(model, machine).write_text(text + "\n")


if __name__ == "__main__":
    main()
