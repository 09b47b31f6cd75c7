"""Make a model folder of random bfloat16 weights in the shapes of a configuration.

    python bench/make_model.py FOLDER < config.json

One safetensors file a layer, an index, and the configuration last: a folder that has it is whole,
and is left as it is. No tokenizer: prompts are token ids. Routers have 20 times the spread of the
other matrices, so that tokens differ in their experts; they still favour a few, which a trained
router would not.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from hetero.model.families import expected_tensors
from planner.model_spec import ModelSpec

# Values are drawn once; every tensor is a stretch of them that begins elsewhere.
NUM_DRAWN = 1 << 22
WEIGHT_STD = 0.02
ROUTER_GAIN = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    make_model(args.folder, json.load(sys.stdin))


def make_model(folder: Path, config: dict[str, Any]) -> None:
    """Write the weights file by file, which holds one layer in memory at a time."""
    if (folder / "config.json").exists():
        return
    spec = ModelSpec.from_config(config, name=folder.name)
    folder.mkdir(parents=True, exist_ok=True)
    drawn = torch.randn(NUM_DRAWN, generator=torch.Generator().manual_seed(0))
    drawn = (drawn * WEIGHT_STD).bfloat16()
    shapes = expected_tensors(spec)
    weight_map = {name: file_of(name) for name in shapes}
    numbers = {name: number for number, name in enumerate(shapes)}
    for file in dict.fromkeys(weight_map.values()):
        tensors = {
            name: tensor_of(name, shapes[name], drawn, start=997 * numbers[name] % NUM_DRAWN)
            for name in shapes
            if weight_map[name] == file
        }
        save_file(tensors, folder / file)
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index)
    (folder / "config.json").write_text(json.dumps(config))
    print(f"made {folder.name}: {spec.total_weight_bytes() / 1e9:.2f} GB", file=sys.stderr)


def file_of(name: str) -> str:
    layer = name.split(".")[2] if name.startswith("model.layers.") else "outside"
    return f"model-{layer}.safetensors"


def tensor_of(
    name: str, shape: tuple[int, ...], drawn: torch.Tensor, *, start: int
) -> torch.Tensor:
    """Random values for matrices, ones for norms."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    count = torch.Size(shape).numel()
    repeats = -(-(start + count) // drawn.numel())
    values = drawn.repeat(repeats)[start : start + count].view(shape)
    return values * ROUTER_GAIN if name.endswith("gate.weight") else values.clone()


if __name__ == "__main__":
    main()
